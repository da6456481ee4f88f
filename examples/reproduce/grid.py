"""The paper's columns and ours as one table: rows by name, a dash where a column has none."""

from collections.abc import Mapping
from dataclasses import dataclass

from examples.reproduce.exhibit import Exhibit
from examples.reproduce.store import Kept

NOTHING = "\N{EN DASH}"


@dataclass(frozen=True)
class Grid:
    """A table of texts; `papers` says which columns are the paper's."""

    headings: tuple[str, ...]
    papers: tuple[bool, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


def grid(exhibit: Exhibit, found: Mapping[str, Kept]) -> Grid:
    """All columns of an exhibit: what the paper reports, then what was measured."""
    columns: dict[str, dict[str, str]] = {
        heading: {row: str(cell) for row, cell in cells.items()}
        for heading, cells in exhibit.paper.items()
    }
    papers = len(columns)
    for kept in found.values():
        for part, cells in kept.measured.columns.items():
            heading = f"{kept.heading} on {part}" if part else kept.heading
            columns[heading] = {row: str(cell) for row, cell in cells.items()}
    names = list(dict.fromkeys(row for cells in columns.values() for row in cells))
    return Grid(
        tuple(columns),
        tuple(k < papers for k in range(len(columns))),
        tuple((n, tuple(c.get(n, NOTHING) for c in columns.values())) for n in names),
    )


def printed(exhibit: Exhibit, found: Mapping[str, Kept]) -> str:
    """The exhibit for a terminal: each row with what every column says of it."""
    made = grid(exhibit, found)
    covers = f" ({', '.join(exhibit.covers)})" if exhibit.covers else ""
    lines = [f"{exhibit.name}: {exhibit.title}{covers}", f"  {exhibit.asks}"]
    lines += [f"  [{exhibit.unit}]"] if exhibit.unit else []
    wide = max((len(heading) for heading in made.headings), default=0)
    for row, cells in made.rows:
        lines.append(f"  {row}")
        lines += [
            f"    {heading:<{wide}}  {cell}"
            for heading, cell in zip(made.headings, cells, strict=True)
            if cell != NOTHING
        ]
    for name, told in sections(exhibit, found):
        lines += [f"  {name}:"] + [f"  - {line}" for line in told]
    return "\n".join(lines)


def sections(exhibit: Exhibit, found: Mapping[str, Kept]) -> list[tuple[str, tuple[str, ...]]]:
    """What stands below the table, by its heading; parts without lines are left out."""
    ours = tuple(exhibit.compare({name: kept.measured for name, kept in found.items()}))
    notes = tuple(
        f"{kept.heading}: {line}" for kept in found.values() for line in kept.measured.says
    )
    stated = (exhibit.stated,) if exhibit.stated else ()
    parts = {
        "Found here": ours, "Not measured here": stated, "What this cannot show": exhibit.limits,
        "The paper says": exhibit.reports, "Unknown in the paper": exhibit.unknown,
        "From the paper's own numbers": exhibit.arithmetic,
        "Points of the critique taken up": exhibit.answers, "Notes on the measurements": notes,
    }  # fmt: skip
    return [(name, told) for name, told in parts.items() if told]
