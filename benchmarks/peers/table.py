"""The results as one table, and who is best at what, read from the numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.peers.registry import PEERS
from benchmarks.peers.tasks import TASKS

REFERENCE, OURS = PEERS[0].name, PEERS[1].name
ORDER = [peer.name for peer in PEERS]


def page(results: Mapping[str, Any]) -> str:
    """Everything that `peers.json` holds, for people."""
    rows = sorted(
        (row for row in results["rows"] if row["state"] != "not asked"),
        key=lambda row: (row["task"], ORDER.index(row["peer"])),
    )
    out = [
        "# The same tasks by ImagineLens and by its peers",
        "",
        f"{results['cpu']}, {results['cores']} cores, of which one is used; Python "
        f"{results['python']}; {results['date']}. {results['models']}. Times are ratios of CPU "
        "time within one process, whose variants take turns; the load of the machine, other work "
        f"included, was {results['load']:.0f} when the last peer began. With fewer than 6 rounds "
        "the interval is the range. What the columns mean: `benchmarks/README.md`.",
        "",
        "| task | by | result | off by | CPU time / plain torch | 95 % | memory | lines |",
        "|-|-|-|-:|-:|-|-:|-:|",
        *(_line(row) for row in rows),
        "",
        "Tasks:",
        "",
        *(f"- {task.name}: {task.what}" for task in TASKS),
        "",
        "Best, of those that are right, plain torch aside:",
        "",
        *(f"- {text}" for text in best(rows)),
        "",
        *(
            f"With the versions of {name} plain torch itself gives other numbers than in the "
            "first environment; it is held against those of its own.\n"
            for name in elsewhere(rows)
        ),
        "Setting up is not timed; its lines:",
        "",
        *(f"- {name}: {count}" for name, count in results["setup"].items()),
        "",
        "Versions:",
        "",
        *(f"- {name}: {_versions(found)}" for name, found in results["versions"].items()),
    ]
    return "\n".join(out) + "\n"


def best(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Per task the fastest, the smallest and the shortest; a tie in time is called one.

    Those whose interval reaches the fastest one's are as fast, as far as was measured.
    """
    told = []
    for task in TASKS:
        right = [
            row
            for row in rows
            if row["task"] == task.name and row["state"] == "right" and row["peer"] != REFERENCE
        ]
        timed = [row for row in right if row.get("ratio")]
        parts = []
        if timed:
            first = min(timed, key=lambda row: row["ratio"]["value"])
            fast = [r["peer"] for r in timed if r["ratio"]["low"] <= first["ratio"]["high"]]
            parts.append("least time: " + _names(fast))
        if right:
            least = min(row["lines"] for row in right)
            parts.append(
                f"fewest lines ({least}): "
                + _names([row["peer"] for row in right if row["lines"] == least])
            )
        measured = [row for row in right if row.get("memory") is not None]
        if measured:
            first = min(measured, key=lambda row: row["memory"])
            parts.append(f"least memory ({_mega(first['memory'])}): {first['peer']}")
        told.append(f"{task.name}: " + ("; ".join(parts) or "nobody"))
    return told


def elsewhere(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Peers in whose environment the reference is another one, by the size of its numbers."""
    first = {row["task"]: row["allowed"] for row in rows if row["peer"] == REFERENCE}
    other = {
        row["peer"]
        for row in rows
        if row["allowed"]
        and abs(row["allowed"] / first.get(row["task"], row["allowed"]) - 1) > 1e-3
    }
    return sorted(other, key=ORDER.index)


def _names(peers: Sequence[str]) -> str:
    return " = ".join(sorted(peers, key=ORDER.index))


def _line(row: Mapping[str, Any]) -> str:
    ratio, memory = row.get("ratio"), row.get("memory")
    if row["state"] == "right":
        result = "right"
    else:
        verb = "does it wrong" if row["state"] == "wrong" else "cannot"
        result = f"{verb}: {row['why']}" if row["why"] else verb
    cells = [
        row["task"],
        row["peer"],
        result.replace("|", "\\|"),
        "" if row.get("off") is None else f"{row['off']:.0e}",
        f"{ratio['value']:.2f}" if ratio else "",
        f"{ratio['low']:.2f}..{ratio['high']:.2f}, n = {row['rounds']}" if ratio else "",
        "" if memory is None else _mega(memory),
        str(row["lines"]) if row["state"] == "right" else "",
    ]
    return "| " + " | ".join(cells) + " |"


def _mega(amount: float) -> str:
    return f"{amount / 2**20:.1f} MiB"


def _versions(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items()) or "none"
