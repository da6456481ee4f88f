"""A cell of the explorer as code that one can paste: the same call, the same number."""

from imaginelens.hooks import Metric
from imaginelens.hooks.positions import EitherPositions, LaterPositions, Positions
from imaginelens.mediation.cells import Cell
from imaginelens.view.explorer_grid import Setting

_EDITS = {"swap": "None", "zero": "il.Zero()", "sham": "il.Sham()"}


def call(
    cell: Cell, at: Positions, setting: Setting, metric: Metric, *, rows: tuple[int, int]
) -> str:
    """The call that measures a cell: `lens.patch` where the base receives, else `il.sweep`.

    Args:
        at: the positions of the cell; rows: the numbers of the base and of the source.
    """
    answers = (f"pairs.base_answers[{setting.pair}]", f"pairs.source_answers[{setting.pair}]")
    inputs = (f"pairs.base[{rows[0]}]", f"pairs.source[{rows[1]}]")
    shared = {"metric": repr(metric), "context": repr(setting.context)}
    names = ("base", "source", "base_answers", "source_answers")
    if setting.edit == "swap" and setting.direction == "denoise":
        where = {"site": repr(cell.sites[0]), "at": spelled(at)}
        heads = {} if cell.head is None else {"heads": f"[{cell.head}]"}
        given = dict(zip(names, (*inputs, *answers), strict=True))
        return f"{_IMPORT}found = {_called('lens.patch', given | where | heads | shared)}"
    one = {n: f"[{v}]" for n, v in zip(names, (*inputs, *answers), strict=True)}
    arguments = {
        "sites": repr(cell.sites[0]),
        "positions": f"[{spelled(at)}]",
        **shared,
        "direction": repr(setting.direction),
        "edit": _EDITS.get(setting.edit, f"edits[{setting.edit!r}]"),
        "heads": str(cell.head is not None),
        "fast": "False",
    }
    found = f"found = {_called('il.sweep', arguments, 'lens', 'pair')}"
    chosen = "" if cell.head is None else f"found = found.sel(head={cell.head})\n"
    return f"{_IMPORT}pair = {_called('il.Pairs', one)}{found}{chosen}"


_IMPORT = "import imaginelens as il\n\n"


def _called(name: str, arguments: dict[str, str], *first: str) -> str:
    lines = [*first, *(f"{key}={value}" for key, value in arguments.items())]
    return f"{name}(\n" + "".join(f"    {line},\n" for line in lines) + ")\n"


def spelled(at: Positions) -> str:
    """A selector as one writes it.

    >>> import imaginelens as il
    >>> spelled(il.latent[0]), spelled(il.latent | il.last_prompt)
    ('il.latent[0]', 'il.latent | il.last_prompt')
    """
    match at:
        case EitherPositions(one=one, other=other):
            return f"{spelled(one)} | {spelled(other)}"
        case LaterPositions(of=of, onward=onward):
            return f"il.{'onward' if onward else 'after'}({spelled(of)})"
    return f"il.{at!r}"
