// The explorer's page: one module, for the notebook widget (`render`) and for saved pages (`still`).
// It draws what the model of the widget holds and sends what the user does; it computes no effect.
// Text of models and users goes through textContent and canvas alone, so that it stays text.

const WATCHED = [
  "z", "mask", "shape", "rows", "columns", "axes", "ends", "places", "units", "setting", "choices",
  "header", "tokens", "images", "grids", "boxes", "selected", "detail", "status", "progress", "live",
];
const MAPPED = 1;
const SMALL = 14;
const LARGE = 58;

function make(tag, options = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "text") node.textContent = value;
    else if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

function number(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  return String(Number(value.toPrecision(digits))).replace("-", "−");
}

function bytesOf(view) {
  if (!view) return new ArrayBuffer(0);
  return view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength);
}

function channels(colour) {
  return [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
}

function mixed(colours, share) {
  const place = Math.min(1, Math.max(0, share)) * (colours.length - 1);
  const low = Math.min(Math.floor(place), colours.length - 2);
  const [a, b] = [channels(colours[low]), channels(colours[low + 1])];
  return a.map((channel, k) => Math.round(channel + (b[k] - channel) * (place - low)));
}

function inkOn([r, g, b]) {
  const linear = [r, g, b].map((c) => {
    const share = c / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  const light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  return (light + 0.05) / 0.05 >= 1.05 / (light + 0.05) ? "#000000" : "#ffffff";
}

// The part of `after` that is not in `before`, by their common beginning and end.
function difference(before, after) {
  let start = 0;
  while (start < before.length && start < after.length && before[start] === after[start]) start += 1;
  let end = 0;
  const most = Math.min(before.length, after.length) - start;
  while (end < most && before[before.length - 1 - end] === after[after.length - 1 - end]) end += 1;
  return [start, after.length - end];
}

class Explorer {
  constructor(model, el) {
    this.model = model;
    this.normal = false;
    this.metric = null;
    this.image = 0;
    this.brush = null;
    this.marked = new Set();
    this.lastChip = null;
    this.busy = null;
    this.hover = null;
    this.pictures = new Map();
    this.waiting = false;
    this.undo = [];
    this.build(el);
    const redraw = () => this.later();
    for (const name of WATCHED) this.listen(`change:${name}`, redraw);
    this.listen("change:status", () => this.onStatus());
    this.listen("change:detail", () => { this.busy = null; });
    this.listen("change:setting", () => { this.marked.clear(); this.metric = null; });
    this.listen("msg:custom", (message, buffers) => this.receive(message, buffers));
    const dark = window.matchMedia("(prefers-color-scheme: dark)");
    dark.addEventListener("change", redraw);
    this.undo.push(() => dark.removeEventListener("change", redraw));
    this.watch = new ResizeObserver(redraw);
    this.watch.observe(this.root);
    this.undo.push(() => this.watch.disconnect());
    this.draw();
    this.onStatus();
  }

  listen(name, callback) {
    this.model.on(name, callback);
    this.undo.push(() => this.model.off(name, callback));
  }

  close() {
    this.undo.forEach((step) => step());
  }

  get(name) {
    return this.model.get(name);
  }

  send(message) {
    this.model.send(message);
  }

  // ---- the frame ---------------------------------------------------------------------------

  build(el) {
    this.title = make("p", { class: "il-title" });
    this.facts = make("p", { class: "il-facts" });
    this.said = make("p", { class: "il-status", role: "status", "aria-live": "polite" });
    this.bar = make("progress", { max: 1, value: 0, "aria-label": "share of the map measured" });
    this.controls = make("div", { class: "il-controls" });
    this.heat = make("canvas", {
      class: "il-heat", tabindex: 0, role: "application", "aria-roledescription": "heat-map",
      onkeydown: (event) => this.key(event), onclick: (event) => this.click(event),
      onpointermove: (event) => this.over(event),
      onpointerleave: () => { this.hover = null; this.tellCell(); },
    });
    this.shimmer = make("div", { class: "il-shimmer", hidden: true, "aria-hidden": "true" });
    this.cell = make("p", { class: "il-cell", "aria-live": "polite" });
    this.legend = make("div", { class: "il-legend" });
    this.picture = make("canvas", {
      class: "il-picture", role: "img",
      onpointerdown: (event) => this.brushFrom(event), onpointermove: (event) => this.brushTo(event),
      onpointerup: (event) => this.brushed(event),
      onpointercancel: () => { this.brush = null; this.later(); },
    });
    this.under = make("p", { class: "il-under" });
    this.chips = make("ol", { class: "il-chips", "aria-label": "tokens of the run, in order" });
    this.addChips = make("button", {
      type: "button", text: "Add as column", disabled: true, onclick: () => this.addMarked(),
    });
    this.shown = make("div", { class: "il-detail" });
    this.buttons = make("div", { class: "il-buttons" });
    this.panels = {
      heat: this.panel("Effects", this.controls,
        make("div", { class: "il-stage" }, this.heat, this.shimmer), this.cell, this.legend),
      detail: this.panel("Before and after", this.shown),
      image: this.panel("Image", this.picture, this.under),
      tokens: this.panel("Tokens", this.chips, this.addChips),
    };
    this.root = make("section", { class: "il-explorer", "aria-label": "patch explorer" },
      make("div", { class: "il-head" }, this.title, this.facts, this.said, this.bar),
      make("div", { class: "il-panels" },
        make("div", { class: "il-column" }, this.panels.heat, this.panels.image),
        make("div", { class: "il-column" }, this.panels.detail, this.panels.tokens)), this.buttons);
    this.root.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.send({ type: "cancel" });
    });
    el.append(this.root);
  }

  panel(title, ...children) {
    const box = make("section", { class: "il-panel", "aria-label": title });
    const grow = make("button", {
      type: "button", class: "il-grow", text: "⤢", "aria-label": `enlarge ${title.toLowerCase()}`,
      "aria-pressed": "false",
      onclick: () => {
        const big = box.classList.toggle("il-big");
        grow.setAttribute("aria-pressed", String(big));
        this.later();
      },
    });
    box.append(make("div", { class: "il-bar" }, make("h2", { text: title }), grow), ...children);
    return box;
  }

  later() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => { this.waiting = false; this.draw(); });
  }

  draw() {
    this.read();
    this.drawHead();
    this.drawControls();
    this.drawHeat();
    this.drawPicture();
    this.drawChips();
    this.drawDetail();
    this.drawButtons();
  }

  // ---- what there is -------------------------------------------------------------------------

  read() {
    this.shape = this.get("shape");
    this.z = new Float32Array(bytesOf(this.get("z")));
    this.mask = new Uint8Array(bytesOf(this.get("mask")));
    const metrics = this.get("choices").metric;
    this.k = Math.max(0, metrics.indexOf(this.metric ?? this.get("setting").metric));
    const boxes = new Float32Array(bytesOf(this.get("boxes")));
    this.boxes = [];
    for (let at = 0; at + 7 < boxes.length; at += 8) {
      const [image, row, column, index, left, top, right, bottom] = boxes.subarray(at, at + 8);
      const grid = this.get("grids")[image] ?? [1, 1];
      const box = Number.isNaN(left)
        ? [column / grid[1], row / grid[0], (column + 1) / grid[1], (row + 1) / grid[0]]
        : [left, top, right, bottom];
      this.boxes.push({ image, row, column, index, box });
    }
    this.limit = 0;
    for (let r = 0; r < this.shape[1]; r += 1) {
      for (let c = 0; c < this.shape[2]; c += 1) {
        const value = this.value(r, c);
        if (!Number.isNaN(value)) this.limit = Math.max(this.limit, Math.abs(value));
      }
    }
    this.limit = this.limit || 1;
  }

  value(row, column) {
    const [, rows, columns] = this.shape;
    const value = this.z[(this.k * rows + row) * columns + column];
    if (!this.normal) return value;
    const [before, other] = this.get("ends")[this.k];
    return before === null || other === null || other === before ? NaN : value / (other - before);
  }

  colour(value) {
    if (Number.isNaN(value)) return channels(this.get("header").unmeasured);
    return mixed(this.get("header").colours, (value / this.limit + 1) / 2);
  }

  get place() {
    const { row, column } = this.get("selected");
    return row === undefined ? null : [row, column];
  }

  // ---- head and controls -----------------------------------------------------------------------

  drawHead() {
    const head = this.get("header");
    const setting = this.get("setting");
    this.title.textContent = `${head.model} (${head.dtype})`;
    const [before, other] = head.answers.map((answer) => (answer === null ? "no answer" : `“${answer}”`));
    const hooks = head.hooks ? `, ${head.hooks} of your own hooks are active` : "";
    this.facts.textContent = `pair ${setting.pair} of ${head.pairs}: edited run answers ${before}, `
      + `donor ${other}; ${head.direction}; ${head.trigger}${hooks}`;
    const status = this.get("status");
    this.said.textContent = status.text ?? "";
    this.said.dataset.kind = status.kind ?? "";
    this.bar.value = this.get("progress");
    this.bar.hidden = status.kind !== "running";
  }

  drawControls() {
    const setting = this.get("setting");
    const choices = this.get("choices");
    const live = this.get("live");
    const key = JSON.stringify([setting, choices, live, this.normal, this.metric]);
    if (key === this.controlsDrawn) return;
    this.controlsDrawn = key;
    const focused = this.controls.querySelector(":focus")?.name;
    const names = ["tab", "site", "metric", "edit", "pair", "donor", "direction", "context"];
    if (setting.tab === "heads") names.splice(1, 0, "at");
    const words = { tab: "columns", at: "heads at", donor: "donor's pair" };
    this.controls.replaceChildren(...names.map((name) => {
      const options = choices[name].map((choice) => {
        const [value, text] = Array.isArray(choice) ? choice : [choice, String(choice)];
        const now = name === "metric" && this.metric ? this.metric : setting[name];
        return make("option", { value, text, selected: value === now });
      });
      const select = make("select", {
        name, disabled: !live && name !== "metric",
        onchange: (event) => this.choose(name, event.target.selectedIndex),
      }, ...options);
      return make("label", {}, `${words[name] ?? name} `, select);
    }), make("label", {}, make("input", {
      type: "checkbox", name: "normal", checked: this.normal,
      onchange: (event) => { this.normal = event.target.checked; this.later(); },
    }), " as share of the pair's difference"));
    if (focused) this.controls.querySelector(`[name="${focused}"]`)?.focus();
  }

  choose(name, index) {
    const choice = this.get("choices")[name][index];
    const value = Array.isArray(choice) ? choice[0] : choice;
    if (!this.get("live")) {
      this.metric = value;
      this.later();
      return;
    }
    this.send({ type: "choose", changes: { [name]: value } });
    this.controlsDrawn = null; // drawn again as it is, should Python refuse
  }

  drawButtons() {
    const live = this.get("live");
    const running = this.get("status").kind === "running";
    const code = this.get("detail").code;
    const key = JSON.stringify([live, running, Boolean(code)]);
    if (key === this.buttonsDrawn) return;
    this.buttonsDrawn = key;
    const focused = this.buttons.querySelector(":focus")?.name;
    const button = (name, text, message, off = false) => make("button", {
      type: "button", name, text, disabled: off, onclick: () => this.send(message),
    });
    this.buttons.replaceChildren(...[
      live ? button("map", "Measure all cells", { type: "map" }, running) : null,
      live ? button("cancel", "Cancel", { type: "cancel" }, !running) : null,
      make("button", {
        type: "button", name: "copy", text: "Copy as code", disabled: !code, onclick: () => this.copy(),
      }),
      ...(live ? ["html", "csv", "png"] : []).map((format) =>
        button(format, `Export ${format.toUpperCase()}`, { type: "export", format }, running)),
    ].filter(Boolean));
    if (focused) this.buttons.querySelector(`[name="${focused}"]`)?.focus();
  }

  async copy() {
    const code = this.get("detail").code ?? "";
    try {
      await navigator.clipboard.writeText(code);
    } catch {
      const area = make("textarea", { class: "il-hidden", "aria-hidden": "true" });
      area.value = code;
      this.root.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    this.said.textContent = "copied: the call that measures this cell";
  }

  receive(message, buffers) {
    if (message?.type !== "file") return;
    const url = URL.createObjectURL(new Blob([bytesOf(buffers[0])], { type: message.mime }));
    const link = make("a", { href: url, download: message.name });
    this.root.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }

  // A map goes on when the page asks for its next row, so that a cancel comes in between.
  onStatus() {
    const status = this.get("status");
    this.busy = null;
    if (status.kind === "running" && this.get("live")) {
      this.send({ type: "step", job: status.job, done: status.done });
    }
  }

  // ---- the heat-map ----------------------------------------------------------------------------

  sized(canvas, width, height) {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    return context;
  }

  drawHeat() {
    const [, rows, columns] = this.shape;
    const names = { rows: this.get("rows"), columns: this.get("columns") };
    const [down, across] = this.get("axes");
    const look = getComputedStyle(this.root);
    const font = `12px ${look.fontFamily}`;
    const probe = this.heat.getContext("2d");
    probe.font = font;
    const longest = (texts) => Math.max(...texts.map((text) => probe.measureText(text).width));
    const left = Math.min(140, longest(names.rows)) + 26;
    const room = Math.max(160, this.heat.parentElement.clientWidth - left - 8);
    const width = Math.max(SMALL, Math.min(LARGE, room / columns));
    const height = Math.max(SMALL, Math.min(30, 420 / rows));
    const wide = Math.min(150, longest(names.columns));
    const slanted = wide > width - 6;
    const below = (slanted ? wide * 0.72 + 18 : 20) + 20;
    this.geometry = { left, top: 6, width, height, rows, columns };
    const pad = slanted ? 8 : 0;
    const context = this.sized(this.heat, left + columns * width + 8 + pad, 6 + rows * height + below);
    context.font = font;
    context.textBaseline = "middle";
    for (let r = 0; r < rows; r += 1) {
      for (let c = 0; c < columns; c += 1) this.drawCell(context, r, c);
    }
    context.fillStyle = look.color;
    context.textAlign = "right";
    const every = Math.ceil(14 / height);
    names.rows.forEach((text, r) => {
      if (r % every === 0) context.fillText(text, left - 6, 6 + (r + 0.5) * height, left - 24);
    });
    const bottom = 6 + rows * height;
    const step = Math.ceil(14 / width);
    names.columns.forEach((text, c) => {
      if (c % step) return;
      context.save();
      context.translate(left + (c + 0.5) * width, bottom + 10);
      if (slanted) context.rotate(-Math.PI / 4);
      context.textAlign = slanted ? "right" : "center";
      context.fillText(text, 0, 0, slanted ? 150 : width);
      context.restore();
    });
    context.textAlign = "left";
    context.fillText(across, left, bottom + below - 10);
    context.save();
    context.translate(9, 6 + (rows * height) / 2);
    context.rotate(-Math.PI / 2);
    context.textAlign = "center";
    context.fillText(down, 0, 0);
    context.restore();
    if (this.place) this.outline(context, ...this.place, look.getPropertyValue("--il-focus").trim());
    this.heat.setAttribute("aria-label", this.inWords());
    this.drawShimmer();
    this.drawLegend();
    this.tellCell();
  }

  drawCell(context, row, column) {
    const { left, top, width, height } = this.geometry;
    const value = this.value(row, column);
    const colour = this.colour(value);
    const [x, y] = [left + column * width, top + row * height];
    context.fillStyle = `rgb(${colour.join(",")})`;
    context.fillRect(x + 0.5, y + 0.5, width - 1, height - 1);
    context.fillStyle = inkOn(colour);
    if (!Number.isNaN(value) && width >= 34 && height >= 14) {
      context.textAlign = "center";
      context.fillText(value.toFixed(2).replace("-0.00", "0.00").replace("-", "−"), x + width / 2, y + height / 2);
    }
    if (this.mask[row * this.shape[2] + column] > MAPPED) { // run on its own: a corner
      context.beginPath();
      context.moveTo(x + width - 7, y + 1);
      context.lineTo(x + width - 1, y + 1);
      context.lineTo(x + width - 1, y + 7);
      context.fill();
    }
  }

  outline(context, row, column, colour) {
    const { left, top, width, height } = this.geometry;
    context.strokeStyle = colour || "#d97706";
    context.lineWidth = 2.5;
    context.strokeRect(left + column * width + 1, top + row * height + 1, width - 2, height - 2);
  }

  drawShimmer() {
    const { left, top, width, height, columns, rows } = this.geometry;
    const status = this.get("status");
    let box = null;
    if (status.kind === "running" && status.done < rows) box = [0, status.done, columns];
    else if (this.busy) box = [this.busy[1], this.busy[0], 1];
    this.shimmer.hidden = box === null;
    if (box === null) return;
    Object.assign(this.shimmer.style, {
      left: `${left + box[0] * width}px`, top: `${top + box[1] * height}px`,
      width: `${box[2] * width}px`, height: `${height}px`,
    });
  }

  drawLegend() {
    const unit = this.normal ? "share of the pair's difference" : this.get("units")[this.k];
    const key = JSON.stringify([this.limit, unit, this.k]);
    if (key === this.legendDrawn) return;
    this.legendDrawn = key;
    const gradient = make("span", { class: "il-gradient", "aria-hidden": "true" });
    gradient.style.background = `linear-gradient(to right, ${this.get("header").colours.join(",")})`;
    const grey = make("span", { class: "il-grey", "aria-hidden": "true" });
    grey.style.background = this.get("header").unmeasured;
    const metric = this.get("choices").metric[this.k];
    this.legend.replaceChildren(
      `effect on ${metric}: `, make("span", { text: number(-this.limit, 3) }), gradient,
      make("span", { text: `${number(this.limit, 3)} ${unit}` }),
      make("span", { class: "il-key" }, grey, " not measured"),
      make("span", { text: "◥ run on its own" }), make("span", { text: "one example: no interval" }));
  }

  inWords() {
    const [, rows, columns] = this.shape;
    let measured = 0;
    let best = null;
    for (let r = 0; r < rows; r += 1) {
      for (let c = 0; c < columns; c += 1) {
        const value = this.value(r, c);
        if (Number.isNaN(value)) continue;
        measured += 1;
        if (best === null || Math.abs(value) > Math.abs(best[2])) best = [r, c, value];
      }
    }
    const most = best ? `, largest ${number(best[2])} at ${this.named(best[0], best[1])}` : "";
    return `${rows} rows by ${columns} columns, ${measured} ${measured === 1 ? "cell" : "cells"} measured${most}. `
      + "Arrow keys move, Enter runs a cell, Escape cancels.";
  }

  named(row, column) {
    const [down, across] = this.get("axes");
    return `${down} ${this.get("rows")[row]}, ${across} ${this.get("columns")[column]}`;
  }

  tellCell() {
    const at = this.hover ?? this.place;
    if (at === null || at[0] >= this.shape[1] || at[1] >= this.shape[2]) {
      this.cell.textContent = "no cell is selected";
      return;
    }
    const value = this.value(...at);
    const told = Number.isNaN(value) ? "not measured" : `effect ${number(value)}`;
    this.cell.textContent = `${this.named(...at)}: ${told}`;
  }

  under_(event) {
    const { left, top, width, height, rows, columns } = this.geometry;
    const row = Math.floor((event.offsetY - top) / height);
    const column = Math.floor((event.offsetX - left) / width);
    return row < 0 || column < 0 || row >= rows || column >= columns ? null : [row, column];
  }

  over(event) {
    this.hover = this.under_(event);
    this.tellCell();
  }

  click(event) {
    const at = this.under_(event);
    if (at) this.run(at);
  }

  run(at) {
    const ran = this.mask[at[0] * this.shape[2] + at[1]] > MAPPED;
    this.busy = this.get("live") && !ran ? at : null;
    this.select(at, "run");
  }

  select([row, column], type = "select") {
    this.model.set("selected", { row, column });
    this.model.save_changes();
    this.send({ type, cell: [row, column] });
    this.later();
  }

  key(event) {
    const [, rows, columns] = this.shape;
    const [row, column] = this.place ?? [0, 0];
    const moves = {
      ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], ArrowLeft: [row, column - 1],
      ArrowRight: [row, column + 1], Home: [row, 0], End: [row, columns - 1],
    };
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      event.stopPropagation();
      this.run([row, column]);
    } else if (event.key in moves) {
      event.preventDefault();
      event.stopPropagation();
      const [r, c] = this.place ? moves[event.key] : [0, 0];
      this.select([Math.min(rows - 1, Math.max(0, r)), Math.min(columns - 1, Math.max(0, c))]);
    }
  }

  // ---- the image -------------------------------------------------------------------------------

  drawPicture() {
    const sources = this.get("images");
    const grids = this.get("grids");
    this.panels.image.hidden = !grids.length && !sources.length;
    if (this.panels.image.hidden) return;
    this.image = Math.min(this.image, Math.max(sources.length, grids.length) - 1);
    const source = sources[this.image];
    const picture = source ? this.loaded(source) : null;
    if (source && !picture.complete) return;
    const ratio = picture ? picture.naturalHeight / picture.naturalWidth : 1;
    const width = Math.min(360, Math.max(140, this.picture.parentElement.clientWidth - 24));
    const height = width * ratio;
    this.frame = { width, height };
    const context = this.sized(this.picture, width, height);
    context.imageSmoothingEnabled = !picture || picture.naturalWidth > 200;
    if (picture) context.drawImage(picture, 0, 0, width, height);
    const row = this.place ? this.place[0] : this.strongestRow();
    const columns = this.columnsOfCells();
    const look = getComputedStyle(this.root);
    for (const cell of this.boxes.filter((each) => each.image === this.image)) {
      const [x, y, right, bottom] = cell.box.map((part, k) => part * (k % 2 ? height : width));
      const column = columns.get(`${cell.row},${cell.column}`);
      const value = column === undefined ? NaN : this.value(row, column);
      if (!Number.isNaN(value)) {
        context.globalAlpha = 0.65 * Math.min(1, Math.abs(value) / this.limit); // no effect, no colour
        context.fillStyle = `rgb(${this.colour(value).join(",")})`;
        context.fillRect(x, y, right - x, bottom - y);
        context.globalAlpha = 1;
      }
      context.lineWidth = 1;
      context.strokeStyle = "rgba(0,0,0,0.55)";
      context.strokeRect(x, y, right - x, bottom - y);
      context.strokeStyle = "rgba(255,255,255,0.8)";
      context.strokeRect(x + 1, y + 1, right - x - 2, bottom - y - 2);
      const chosen = this.place && (this.get("places")[this.place[1]] ?? []).some(
        ([k, r, c]) => k === this.image && r === cell.row && c === cell.column);
      if (chosen || this.brushes(cell)) {
        context.lineWidth = 3;
        context.strokeStyle = look.getPropertyValue("--il-focus").trim() || "#d97706";
        context.strokeRect(x + 2, y + 2, right - x - 4, bottom - y - 4);
      }
    }
    const grid = grids[this.image] ?? [0, 0];
    const shown = columns.size ? `, effects of ${this.get("axes")[0]} ${this.get("rows")[row]}` : "";
    this.picture.setAttribute("aria-label",
      `image ${this.image} of the edited run with its ${grid[0]} by ${grid[1]} image tokens${shown}`);
    this.drawUnder(sources.length, grid, shown);
  }

  drawUnder(count, grid, shown) {
    const key = JSON.stringify([count, grid, shown, this.image, this.get("live")]);
    if (key === this.underDrawn) return;
    this.underDrawn = key;
    const text = `${grid[0]} × ${grid[1]} image tokens${shown}.`
      + (this.get("live") ? " Click or drag over cells to patch them." : "");
    const others = count < 2 ? [] : [make("button", {
      type: "button", text: `image ${this.image + 1} of ${count}: next`,
      onclick: () => { this.image = (this.image + 1) % count; this.later(); },
    })];
    this.under.replaceChildren(text, ...others);
  }

  loaded(source) {
    if (!this.pictures.has(source)) {
      const picture = new Image();
      picture.onload = () => this.later();
      picture.src = source;
      this.pictures.set(source, picture);
    }
    return this.pictures.get(source);
  }

  columnsOfCells() {
    const found = new Map();
    this.get("places").forEach((cells, column) => {
      for (const [image, row, col] of cells) {
        const name = `${row},${col}`;
        if (image === this.image && !found.has(name)) found.set(name, column);
      }
    });
    return found;
  }

  strongestRow() {
    let best = [0, -1];
    for (let r = 0; r < this.shape[1]; r += 1) {
      for (const column of this.columnsOfCells().values()) {
        const size = Math.abs(this.value(r, column));
        if (size > best[1]) best = [r, size];
      }
    }
    return best[0];
  }

  cellAt(event) {
    const [x, y] = [event.offsetX / this.frame.width, event.offsetY / this.frame.height];
    return this.boxes.find((cell) => cell.image === this.image
      && x >= cell.box[0] && y >= cell.box[1] && x < cell.box[2] && y < cell.box[3]);
  }

  brushes(cell) {
    if (!this.brush) return false;
    const { from, to } = this.brush;
    return cell.row >= Math.min(from.row, to.row) && cell.row <= Math.max(from.row, to.row)
      && cell.column >= Math.min(from.column, to.column) && cell.column <= Math.max(from.column, to.column);
  }

  brushFrom(event) {
    const cell = this.cellAt(event);
    if (!cell) return;
    this.picture.setPointerCapture?.(event.pointerId);
    this.brush = { from: cell, to: cell };
    this.later();
  }

  brushTo(event) {
    const cell = this.cellAt(event);
    if (!this.brush || !cell) return;
    this.brush.to = cell;
    this.later();
  }

  brushed() {
    if (!this.brush) return;
    const { from, to } = this.brush;
    this.brush = null;
    const rows = [Math.min(from.row, to.row), Math.max(from.row, to.row) + 1];
    const columns = [Math.min(from.column, to.column), Math.max(from.column, to.column) + 1];
    const known = this.columnOf((rows[1] - rows[0]) * (columns[1] - columns[0]), rows, columns);
    if (known !== null) this.run([this.place?.[0] ?? 0, known]);
    else if (this.get("live")) this.send({ type: "add", at: { image: this.image, rows, columns } });
    this.later();
  }

  // The column that edits just these cells of the image, if there is one.
  columnOf(count, rows, columns) {
    const found = this.get("places").findIndex((cells) => cells.length === count && cells.every(
      ([image, row, column]) => image === this.image && row >= rows[0] && row < rows[1]
        && column >= columns[0] && column < columns[1]));
    return found < 0 ? null : found;
  }

  // ---- tokens ----------------------------------------------------------------------------------

  drawChips() {
    const tokens = this.get("tokens");
    const names = this.get("columns");
    const column = this.place ? names[this.place[1]] : null;
    const key = JSON.stringify([tokens, column, [...this.marked], this.get("live")]);
    this.addChips.disabled = !this.marked.size;
    this.addChips.hidden = !this.get("live");
    if (key === this.chipsDrawn) return;
    this.chipsDrawn = key;
    const focused = [...this.chips.children].findIndex((chip) => chip.contains(document.activeElement));
    this.chips.replaceChildren(...tokens.map((token, k) => {
      const where = token.first === token.last ? `position ${token.first}` : `positions ${token.first} to ${token.last}`;
      const on = this.marked.has(k) || (token.step >= 0 && column === `latent[${token.step}]`);
      const chip = make("button", {
        type: "button", title: `${where}, ${token.kind}`, "aria-pressed": String(on),
        "aria-label": `${token.text}, ${token.kind}, ${where}`,
        onclick: (event) => this.chip(k, event.shiftKey),
      });
      chip.append(make("bdi", { text: token.text }));
      return make("li", { class: `il-chip il-${token.kind}` }, chip);
    }));
    if (focused >= 0) this.chips.children[focused]?.firstChild.focus();
  }

  chip(k, range) {
    const token = this.get("tokens")[k];
    const column = this.get("columns").indexOf(`latent[${token.step}]`);
    if (!range && token.step >= 0 && column >= 0) {
      this.marked.clear();
      this.lastChip = k;
      this.select([this.place?.[0] ?? 0, column]);
      return;
    }
    if (range && this.lastChip !== null) {
      for (let at = Math.min(k, this.lastChip); at <= Math.max(k, this.lastChip); at += 1) this.marked.add(at);
    } else if (!this.marked.delete(k)) this.marked.add(k);
    this.lastChip = k;
    this.later();
  }

  addMarked() {
    const tokens = [...this.marked].sort((a, b) => a - b).map((k) => this.get("tokens")[k]);
    const steps = tokens.map((token) => token.step);
    const inARow = steps.every((step, k) => step >= 0 && step === steps[0] + k);
    const numbers = tokens.flatMap(({ first, last }) => Array.from({ length: last - first + 1 }, (_, k) => first + k));
    const at = inARow ? { latent: [steps[0], steps[steps.length - 1] + 1] } : { tokens: numbers };
    this.marked.clear();
    this.send({ type: "add", at });
    this.later();
  }

  // ---- before and after ------------------------------------------------------------------------

  drawDetail() {
    const detail = this.get("detail");
    const key = JSON.stringify(detail);
    if (key === this.detailDrawn) return;
    this.detailDrawn = key;
    if (!detail.title) {
      this.shown.replaceChildren(make("p", {
        class: "il-hint", text: "Run a cell to see what the model answers with that patch.",
      }));
      return;
    }
    const [before, other, after] = detail.answers.map((answer) => answer ?? "no answer found");
    const flips = detail.flips ? "flips the answer" : "keeps the answer";
    this.shown.replaceChildren(
      make("h3", { text: detail.title }),
      make("dl", { class: "il-answers" },
        make("dt", { text: "unedited" }), make("dd", {}, make("bdi", { text: before })),
        make("dt", { text: "donor" }), make("dd", {}, make("bdi", { text: other })),
        make("dt", { text: "patched" }),
        make("dd", { class: detail.flips ? "il-flips" : "" }, make("bdi", { text: after }), ` (${flips})`)),
      this.texts(detail.texts), this.bars(detail.tokens), this.table(detail.metrics),
      make("p", { class: `il-landing${detail.landing.flag ? " il-warn" : ""}`, text: `${detail.landing.words}; ${detail.site}` }),
      make("details", {}, make("summary", { text: "code" }), make("pre", { tabindex: 0, text: detail.code })));
  }

  texts([before, after]) {
    const [start, end] = difference(before, after);
    const changed = make("p", { class: "il-text" }, make("b", { text: "patched: " }),
      make("bdi", {}, after.slice(0, start),
        ...(end > start ? [make("mark", { text: after.slice(start, end) })] : []), after.slice(end)));
    return make("div", {}, make("p", { class: "il-text" }, make("b", { text: "unedited: " }),
      make("bdi", { text: before })), changed);
  }

  bars(tokens) {
    if (!tokens.length) return make("p", { class: "il-hint", text: "no answer was found, so there are no probabilities to show" });
    const rows = tokens.map((token) => make("tr", {},
      make("th", { scope: "row" }, make("bdi", { text: token.text }), token.role ? ` (${token.role})` : ""),
      this.bar_(token.before, "before"), this.bar_(token.after, "after")));
    return make("table", { class: "il-bars" },
      make("caption", { text: "probability of the answer's first token" }),
      make("tr", {}, make("th", { text: "token", scope: "col" }), make("th", { text: "unedited", scope: "col" }),
        make("th", { text: "patched", scope: "col" })), ...rows);
  }

  bar_(share, kind) {
    const bar = make("span", { class: `il-share il-${kind}`, "aria-hidden": "true" });
    bar.style.width = `${Math.round(share * 72)}px`;
    return make("td", {}, bar, make("span", { text: ` ${(100 * share).toFixed(1)}%` }));
  }

  table(metrics) {
    const columns = ["before", "other", "after", "effect"];
    const words = { before: "unedited", other: "donor", after: "patched", effect: "effect" };
    const rows = metrics.map((metric) => make("tr", {},
      make("th", { scope: "row", text: `${metric.name} (${metric.unit})` }),
      ...columns.map((name) => make("td", { text: number(metric[name]) }))));
    return make("table", { class: "il-numbers" }, make("caption", { text: "metrics" }),
      make("tr", {}, make("th", { text: "metric", scope: "col" }),
        ...columns.map((name) => make("th", { text: words[name], scope: "col" }))), ...rows);
  }
}

function render({ model, el }) {
  const page = new Explorer(model, el);
  return () => page.close();
}

// A saved page: the state is there, nothing can be run, and cells that were run open.
export function still(held, el) {
  const values = new Map(Object.entries(held).map(([name, value]) => {
    if (value === null || typeof value !== "object" || !("base64" in value)) return [name, value];
    const bytes = Uint8Array.from(atob(value.base64), (letter) => letter.charCodeAt(0));
    return [name, new DataView(bytes.buffer)];
  }));
  const listeners = new Map();
  const tell = (name) => (listeners.get(`change:${name}`) ?? []).forEach((callback) => callback());
  const model = {
    get: (name) => values.get(name),
    set: (name, value) => { values.set(name, value); tell(name); },
    save_changes: () => {},
    on: (name, callback) => listeners.set(name, [...(listeners.get(name) ?? []), callback]),
    off: (name, callback) => listeners.set(name, (listeners.get(name) ?? []).filter((each) => each !== callback)),
    send: ({ type, cell }) => {
      if (type !== "run" && type !== "select") return;
      const detail = values.get("details")[cell.join(",")];
      model.set("detail", detail ?? {});
      const text = detail ? `${detail.title}: ${detail.sentence}` : "this cell was not run on its own";
      model.set("status", { kind: "saved", text });
    },
  };
  return render({ model, el });
}

export default { render };
