"""`il.explore`: a session of patching as a notebook widget, in one local ES module.

The page asks and Python answers, one message at a time. A map is measured row by row, and the page
asks for each next row, so that a cancel comes in between; no thread touches the model.
"""

import base64
import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

try:
    import anywidget
    import traitlets
except ImportError as error:
    raise ImportError(
        "the explorer is a notebook widget and needs anywidget, which is not installed: "
        "pip install 'imaginelens[notebook]'"
    ) from error

from imaginelens.hooks import Edit, ImagineLensError, InputError, LatentModel, Metric, Pairs
from imaginelens.hooks.metrics import logit_diff
from imaginelens.hooks.patching import Context
from imaginelens.hooks.positions import ImagePositions, Positions, latent, positions
from imaginelens.mediation.effect_map import EffectMap
from imaginelens.mediation.sweep import Direction
from imaginelens.view import explorer_page as told
from imaginelens.view.explorer_state import Explorer
from imaginelens.view.figure import Figure, smaller
from imaginelens.view.maps import heatmap
from imaginelens.view.markup import inert


@dataclass
class _Job:
    """A map that is being measured: what is left of it, and how many parts are done."""

    number: int
    parts: Iterator[tuple[float, EffectMap]]
    done: int = 0


class PatchExplorer(anywidget.AnyWidget):
    """Patch by clicking; made by `il.explore`.

    Everything it shows is on `session` (`session.run`, `session.choose`, `session.code`) and in
    `result`. `close()` lets go of the model.
    """

    _esm = told.script()
    _css = told.style()

    z = traitlets.Bytes().tag(sync=True)
    mask = traitlets.Bytes().tag(sync=True)
    shape: Any = traitlets.List().tag(sync=True)
    rows: Any = traitlets.List().tag(sync=True)
    columns: Any = traitlets.List().tag(sync=True)
    axes: Any = traitlets.List().tag(sync=True)
    ends: Any = traitlets.List().tag(sync=True)
    places: Any = traitlets.List().tag(sync=True)
    units: Any = traitlets.List().tag(sync=True)
    setting: Any = traitlets.Dict().tag(sync=True)
    choices: Any = traitlets.Dict().tag(sync=True)
    header: Any = traitlets.Dict().tag(sync=True)
    tokens: Any = traitlets.List().tag(sync=True)
    images: Any = traitlets.List().tag(sync=True)
    grids: Any = traitlets.List().tag(sync=True)
    boxes = traitlets.Bytes().tag(sync=True)
    selected: Any = traitlets.Dict().tag(sync=True)
    detail: Any = traitlets.Dict().tag(sync=True)
    status: Any = traitlets.Dict().tag(sync=True)
    progress = traitlets.Float(0.0).tag(sync=True)
    live = traitlets.Bool(True).tag(sync=True)

    def __init__(self, session: Explorer) -> None:
        self.session = session
        self._job: _Job | None = None
        self._jobs = 0
        super().__init__(**told.told(session), status=_said("ready", _HOW))
        self.on_msg(self._received)

    # ---- for Python ----------------------------------------------------------------------------

    @property
    def result(self) -> Any:
        """Everything measured so far, as a data frame: a row for each cell and metric."""
        return self.session.result

    def run(self, row: int, column: int) -> Any:
        """Patch one cell of the grid, and show it.

        Raises:
            InputError: there is no such cell.
        """
        found = self.session.run(row, column)
        detail = told.detail_of(self.session, row, column, found)
        with self.hold_sync():
            self._show(told.cells_told(self.session))
            self.selected = {"row": row, "column": column}
            self.detail = detail
            self.status = _said("done", f"{detail['title']}: {detail['sentence']}")
        return found

    def map(self) -> EffectMap:
        """Measure all cells of the grid in one sweep, and show them.

        Raises:
            EditTouchedNothing: no cell reached the run.
        """
        found = self.session.map()
        with self.hold_sync():
            self._show(told.cells_told(self.session))
            self.status = _said("done", self._measured(f"{len(found)} cells"))
            self.progress = 1.0
        return found

    def choose(self, **changes: Any) -> None:
        """Change what is looked at, such as `pair=3, site="attn_out", tab="heads"`.

        Raises:
            InputError: there is no such setting or value.
        """
        old, self._job = self.session.setting, None
        self.session.choose(**changes)
        try:
            state = told.told(self.session)
        except Exception:
            self.session.setting = old
            raise
        with self.hold_sync():
            self._show(state)
            self.selected, self.detail, self.progress = {}, {}, 0.0
            self.status = _said("ready", _HOW)

    def plot(self) -> Figure:
        """The grid as a figure."""
        s = self.session.setting
        title = f"pair {s.pair}: {inert(s.edit, 40)}, {s.direction}, {s.context} context"
        return heatmap(self.session.effect_map, title=title)

    def to_html(self, path: str | Path) -> Path:
        """Write the explorer as one page that needs no kernel and no network; cells that were run
        can be opened there."""
        path = Path(path)
        path.write_text(told.page(self.session), encoding="utf-8")
        return path

    def close(self) -> None:
        """Stop, and let go of the model; `result` stays."""
        self._job = None
        self.live = False
        self.status = _said("closed", "closed: the model was let go of")
        self.session.close()
        super().close()

    # ---- for the page --------------------------------------------------------------------------

    def _received(self, widget: Any, content: Any, buffers: Any) -> None:
        """Answer a message of the page; whatever goes wrong becomes a sentence."""
        try:
            self._answer(content if isinstance(content, Mapping) else {})
        except Exception as error:  # it would be lost in a log that nobody sees
            self._job = None
            self.status = _said("error", _sentence(error))

    def _answer(self, content: Mapping[str, Any]) -> None:
        kind = content.get("type")
        if kind == "step":
            self._step(content)
        elif kind == "cancel":
            self._cancel()
        elif self._job is not None and kind in ("run", "map", "choose", "add"):
            text = "a map is being measured; cancel it first (Esc)"
            self.status = _said("running", text, job=self._job.number, done=self._job.done)
        elif kind == "run":
            self.run(*_cell(content))
        elif kind == "select":
            self._select(*_cell(content))
        elif kind == "map":
            self._start()
        elif kind == "choose":
            self.choose(**{str(k): v for k, v in dict(content.get("changes") or {}).items()})
        elif kind == "add":
            self._add(_selector(content.get("at")))
        elif kind == "export":
            self._export(str(content.get("format")))
        else:
            raise InputError(
                f"the message {kind!r} is not known; send run, map, step, cancel, select, choose, "
                "add or export"
            )

    def _select(self, row: int, column: int) -> None:
        self.session.grid.cell(row, column)
        found = self.session.measured(row, column)
        with self.hold_sync():
            self.selected = {"row": row, "column": column}
            self.detail = {} if found is None else told.detail_of(self.session, row, column, found)

    def _start(self) -> None:
        self._jobs += 1
        self._job = _Job(self._jobs, self.session.parts())
        rows, columns = self.session.grid.shape
        with self.hold_sync():
            self.progress = 0.0
            self.status = _said(
                "running", f"measuring {rows} x {columns} cells", job=self._job.number, done=0
            )

    def _step(self, content: Mapping[str, Any]) -> None:
        """Do the next part of the job; a second view that asks for the same part gets nothing."""
        job = self._job
        if job is None or content.get("job") != job.number or content.get("done") != job.done:
            return
        try:
            share, _ = next(job.parts)
        except StopIteration:
            share = 1.0
        job.done += 1
        rows = self.session.grid.shape[0]
        with self.hold_sync():
            self._show(told.cells_told(self.session))
            self.progress = share
            if share < 1.0:
                text = f"measured {job.done} of {rows} rows"
                self.status = _said("running", text, job=job.number, done=job.done)
            else:
                self._job = None
                self.status = _said("done", self._measured(f"{rows} rows"))

    def _measured(self, what: str) -> str:
        sham = self.session.sham
        if sham is None:
            return f"{what} measured"
        return f"{what} measured; the self-swap changed {self.session.setting.metric} by {sham:.2g}"

    def _cancel(self) -> None:
        if self._job is None:
            return
        done, self._job = self._job.done, None
        rows = self.session.grid.shape[0]
        self.status = _said("cancelled", f"cancelled: {done} of {rows} rows are measured, and stay")

    def _add(self, at: Positions) -> None:
        name = self.session.add(at)
        if self.session.setting.tab == "heads":
            self.choose(at=name)
            return
        names = list(self.session.grid.at)
        row = int(self.selected.get("row", 0))
        with self.hold_sync():
            self._show({**told.grid_told(self.session), **told.cells_told(self.session)})
            self.selected, self.detail = {"row": row, "column": names.index(name)}, {}
            self.status = _said("ready", f"{inert(name, 80)} is a column now; Enter runs it")

    def _export(self, wanted: str) -> None:
        makers = {
            "html": ("text/html", lambda: told.page(self.session).encode()),
            "csv": ("text/csv", self._csv),
            "png": ("image/png", lambda: smaller(self.plot().png())),
        }
        if wanted not in makers:
            raise InputError(f"there is no export as {wanted!r}; choose from {', '.join(makers)}")
        mime, make = makers[wanted]
        name = f"explorer-pair{self.session.setting.pair}.{wanted}"
        self.send({"type": "file", "name": name, "mime": mime}, buffers=[make()])
        self.status = _said("done", f"exported {name}")

    def _csv(self) -> bytes:
        """The result as CSV; text that a spreadsheet would take for a formula is quoted."""
        frame, out = self.result, io.StringIO()
        writer = csv.writer(out)
        writer.writerow(frame.columns)
        for row in frame.itertuples(index=False):
            writer.writerow([_inert(value) for value in row])
        return out.getvalue().encode("utf-8")

    def _show(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is None or self.session.lens is None:
            return bundle
        data, meta = bundle
        figure = self.plot()
        data["text/plain"] = figure.alt
        try:
            data["image/png"] = base64.b64encode(smaller(figure.png(scale=1.5))).decode("ascii")
        except ImportError:  # matplotlib comes with imaginelens[notebook]
            pass
        return data, meta


def explore(
    lens: LatentModel,
    pairs: Pairs,
    *,
    site: str = "resid_post",
    positions: Positions | Sequence[Positions] = latent,
    metric: Metric = logit_diff,
    direction: Direction = "denoise",
    context: Context = "free",
    edits: Mapping[str, Edit] | None = None,
) -> PatchExplorer:
    """Open the notebook widget: click a cell, and that patch runs.

    Show it as the last line of a cell. All that it measures is in `.result`, and `.map()`, `.run()`
    and `.choose()` do from Python what the page does.

    Args:
        site: a short name, such as "resid_post" or "attn_out".
        positions: what the columns are, as in `il.sweep`.
        edits: more edits to choose from, by name, such as `{"mean": il.Mean(reference)}`.

    Raises:
        InputError: an argument is not what it should be.

    >>> import imaginelens as il
    >>> lens = il.load("latent-content")
    >>> widget = explore(lens, lens.task(n=2, seed=0))
    >>> len(widget.map())
    6
    """
    return PatchExplorer(
        Explorer(
            lens, pairs, site=site, positions=positions, metric=metric, direction=direction,
            context=context, edits=dict(edits or {}),
        )
    )  # fmt: skip


_HOW = "click a cell to run that patch; arrows move, Enter runs, Esc cancels"


_numbers = count()


def _said(kind: str, text: str, **more: int) -> dict[str, Any]:
    """A status; no two are equal, or the page would not be told of the second."""
    return {"kind": kind, "text": text, "number": next(_numbers), **more}


def _sentence(error: Exception) -> str:
    """An error in words, without its traceback."""
    words = inert(" ".join(str(error).split()), 400)
    return words if isinstance(error, ImagineLensError) else f"{type(error).__name__}: {words}"


def _cell(content: Mapping[str, Any]) -> tuple[int, int]:
    cell = content.get("cell")
    if not (isinstance(cell, list) and len(cell) == 2 and all(type(n) is int for n in cell)):
        raise InputError(f"cell is {cell!r}, expected [row, column]")
    return cell[0], cell[1]


def _selector(at: Any) -> Positions:
    """What the page selected: `{"latent": [first, behind]}`, `{"tokens": [...]}`, or
    `{"image": k, "rows": [first, behind], "columns": [first, behind]}`."""
    match at:
        case {"latent": [int(first), int(behind)]}:
            return latent[first] if behind == first + 1 else latent[first:behind]
        case {"tokens": [*numbers]} if numbers and all(type(n) is int for n in numbers):
            return positions(numbers)
        case {"image": int(k), "rows": [int(r0), int(r1)], "columns": [int(c0), int(c1)]}:
            rows = r0 if r1 == r0 + 1 else slice(r0, r1)
            columns = c0 if c1 == c0 + 1 else slice(c0, c1)
            return ImagePositions(k, (rows, columns))
    raise InputError(f"{at!r} selects nothing; send latent, tokens, or image with rows and columns")


def _inert(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t\r" and value else value
