"""A page whose model is the explorer itself: what a notebook carries between them, carried here."""

import base64
import json
from pathlib import Path
from typing import Any

from browser.chromium import Chromium

from imaginelens.view import explorer_page
from imaginelens.view.explorer import PatchExplorer

_MODEL = """
const values = new Map();
const heard = new Map();
let changed = {};
const read = (base) => new DataView(Uint8Array.from(atob(base), (c) => c.charCodeAt(0)).buffer);
const held = (value) => value !== null && typeof value === "object" && "base64" in value
  ? read(value.base64) : value;
const tell = (name, ...said) => (heard.get(name) ?? []).forEach((each) => each(...said));
window.sent = [];
window.take = (state) => {
  for (const [name, value] of Object.entries(state)) values.set(name, held(value));
  for (const name of Object.keys(state)) tell(`change:${name}`);
};
window.receive = (message, buffers) => tell("msg:custom", message, buffers.map(read));
const model = {
  get: (name) => values.get(name),
  set: (name, value) => { values.set(name, value); changed[name] = value; tell(`change:${name}`); },
  save_changes: () => { window.sent.push({ state: changed }); changed = {}; },
  on: (name, each) => heard.set(name, [...(heard.get(name) ?? []), each]),
  off: (name, each) => heard.set(name, (heard.get(name) ?? []).filter((one) => one !== each)),
  send: (message) => window.sent.push({ message }),
};
window.begin = () => { window.end = render({ model, el: document.getElementById("explorer") }); };
"""


class LivePage:
    """The widget in a browser. After an act of the hand, `settle()` lets both sides say all that
    they have to say; `carry(1)` lets the page say one thing."""

    def __init__(self, browser: Chromium, widget: PatchExplorer, page: Path) -> None:
        self.browser = browser
        self.widget = widget
        self._shown: dict[str, Any] = {}
        page.write_text(
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>explorer</title>'
            f"<style>{explorer_page.style()}</style></head>"
            '<body class="il-page"><main><h1>notebook</h1><div id="explorer"></div></main>'
            f'<script type="module">{explorer_page.script()}{_MODEL}</script></body></html>',
            encoding="utf-8",
        )
        widget.send = self._sent
        browser.open(page)
        self.push()
        browser.evaluate("window.begin()")
        self.settle()

    def settle(self) -> None:
        """Carry messages until there are none, and everything is drawn."""
        while self.carry():
            pass

    def carry(self, most: int = 1000) -> int:
        """Bring Python what the page has said, and the page what became of it; how much it was."""
        said = self.browser.evaluate(f"window.sent.splice(0, {most})")
        for one in said:
            if "state" in one:
                self._shown |= one["state"]
                self.widget.set_state(one["state"])
            else:
                self.widget._handle_custom_msg(one["message"], [])
            self.push()
        self.browser.drawn()
        return len(said)

    def push(self) -> None:
        """Tell the page what has changed in Python."""
        names = [name for name in PatchExplorer.class_own_traits(sync=True) if name[0] != "_"]
        now = {name: getattr(self.widget, name) for name in names}
        new = {k: v for k, v in now.items() if k not in self._shown or self._shown[k] != v}
        self._shown |= new
        if new:
            state = json.dumps({name: _plain(value) for name, value in new.items()})
            self.browser.evaluate(f"window.take({state})")

    def _sent(self, content: Any, buffers: Any = ()) -> None:
        data = json.dumps([base64.b64encode(part).decode() for part in buffers])
        self.browser.evaluate(f"window.receive({json.dumps(content)}, {data})")

    # ---- what a user does ----------------------------------------------------------------------

    def press(self, name: str) -> None:
        """Click a button of the last row, by name."""
        self.browser.click(f"button[name={name}]")

    def choose(self, name: str, text: str) -> None:
        """Choose the option of a select that reads `text`."""
        choose(self.browser, name, text)
        self.settle()


def choose(browser: Chromium, name: str, text: str) -> None:
    """Choose the option of a select that reads `text`."""
    browser.evaluate(
        f"(() => {{ const select = document.querySelector('select[name={name}]');"
        f"const fits = (option) => option.text === {json.dumps(text)};"
        "select.selectedIndex = [...select.options].findIndex(fits);"
        "select.dispatchEvent(new Event('change')); })()"
    )
    browser.drawn()


def cells(browser: Chromium) -> dict[str, tuple[str, tuple[float, float]]]:
    """Of every cell of the heat-map, by the name that is told when the pointer is over it: what is
    told of it, and its middle in the window. There are two rows and two columns at least."""
    browser.box(".il-heat")
    found = browser.evaluate(_HOVER)
    middles = {
        words: (sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points))
        for words, points in found.items()
    }
    return {
        name: (told, middles[words]) for words in found for name, _, told in [words.partition(": ")]
    }


# Outside the cells the page tells of the cell that is selected, so that its own points are those
# between the others'.
_HOVER = """(() => {
  const heat = document.querySelector(".il-heat");
  const told = document.querySelector(".il-cell");
  const box = heat.getBoundingClientRect();
  const leave = () => heat.dispatchEvent(new PointerEvent("pointerleave"));
  leave();
  const selected = told.textContent;
  const found = {};
  const rest = [];
  for (let y = box.top + 2; y < box.bottom; y += 4) {
    for (let x = box.left + 2; x < box.right; x += 4) {
      heat.dispatchEvent(new PointerEvent("pointermove", { clientX: x, clientY: y }));
      if (told.textContent === selected) rest.push([x, y]);
      else (found[told.textContent] ??= []).push([x, y]);
    }
  }
  leave();
  const all = Object.values(found).flat();
  const between = (at, k) => all.some((p) => p[k] <= at[k]) && all.some((p) => p[k] >= at[k]);
  const own = rest.filter((at) => between(at, 0) && between(at, 1));
  if (own.length) found[selected] = own;
  return found;
})()"""


def _plain(value: Any) -> Any:
    return {"base64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value
