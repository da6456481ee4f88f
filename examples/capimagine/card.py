"""The data card: how many chains went in and out of each stage, by which prompts, at what cost."""

from __future__ import annotations

import html
import io
import json
import math
import platform
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from examples.capimagine.chains import Chain
from examples.capimagine.refused import count
from imaginelens.view.markup import inert

if TYPE_CHECKING:
    from examples.capimagine.asking import Asking
    from examples.capimagine.backends import Request
    from examples.capimagine.data import Reading
    from examples.capimagine.rewrite import Outcome, Settings

UNKNOWN = (
    "the paper's prompts, its judge and the judge's thresholds: those here are ours",
    "the model that refines and judges (it names Qwen3-VL-4B for the captions)",
    "the exact format of a chain, and how many are left (about 17k of 125k)",
)


@dataclass(frozen=True)
class Cost:
    """What calls cost: their number, the pictures and tokens they hold."""

    calls: int = 0
    pictures: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            *(a + b for a, b in zip(_values(self), _values(other), strict=True)),
        )


def _values(cost: Cost) -> tuple[int, ...]:
    return cost.calls, cost.pictures, cost.tokens_in, cost.tokens_out


REPLY_TOKENS = {"rewrite": 60, "refine": 250, "filter": 40}


def estimate(request: Request) -> Cost:
    """Roughly what a request costs: 4 letters to a token, a token for 28x28 pixels."""
    texts = len(request.prompt.text) + len(json.dumps(dict(request.fields)))
    tokens = texts // 4
    for picture in request.pictures:
        with Image.open(io.BytesIO(picture)) as opened:
            width, height = opened.size
        tokens += math.ceil(width / 28) * math.ceil(height / 28)
    stage = re.split(r"[-.]", request.prompt.name)[0]
    return Cost(1, len(request.pictures), tokens, REPLY_TOKENS.get(stage, 100))


def leaks(captions: Sequence[str], answer: str) -> list[bool]:
    """Which captions hold the answer as a word of its own, or as words in a row.

    A caption of the very thing that is asked for has to; one before it gives the answer away.

    >>> leaks(["a red cube", "two greens"], "Red")
    [True, False]
    """
    words = answer.casefold().split()
    pattern = r"\s+".join(map(re.escape, words))
    return [bool(re.search(rf"(?<!\w){pattern}(?!\w)", said.casefold())) for said in captions]


def card(
    source: Path,
    reading: Reading,
    outcomes: Sequence[Outcome],
    kept: Sequence[Chain],
    asking: Asking,
    settings: Settings,
) -> dict[str, Any]:
    """All that is worth knowing about the chains of a run."""
    captioned = [o for o in outcomes if o.captions and not o.refused]
    leaking = [leaks(o.captions, o.chain.answer) for o in captioned]
    stages: dict[str, Any] = {}
    left = len(outcomes)
    for stage in ("structure", *settings.stages()):
        refused = [o.refused for o in outcomes if o.refused and o.stage == stage]
        left -= len(refused)
        stages[stage] = {"left": left, "refused": count(refused)}
    return {
        "source": source.name,
        "layout": reading.layout,
        "read": reading.counts,
        "taken": len(outcomes),
        "stages": stages,
        "kept": len(kept),
        "kept by subset": dict(Counter(chain.subset for chain in kept).most_common()),
        "answer in a caption": _share([any(told) for told in leaking]),
        "answer in a caption before the last": _share([any(told[:-1]) for told in leaking]),
        "captions": sum(len(o.captions) for o in captioned),
        "settings": asdict(settings),
        "model": asking.model,
        "sampling": asdict(asking.sampling),
        "prompts": {p.name: p.hash for p in settings.prompts().values()},
        "cost of this run": {
            "calls": dict(asking.calls),
            "replies from the ledger": dict(asking.reused),
            "endpoint busy": asking.busy,
            "tokens": dict(asking.tokens),
        },
        "cost in the ledger": _paid(asking),
        "versions": {"python": platform.python_version(), **_versions("imaginelens", "openai")},
        "unknown": list(UNKNOWN),
    }


def _paid(asking: Asking) -> dict[str, dict[str, int]]:
    """What all runs on this ledger paid, by stage."""
    paid: dict[str, Counter[str]] = {}
    for entry in asking.ledger:
        spent = paid.setdefault(entry.stage, Counter())
        spent["replies"] += 1
        spent["prompt tokens"] += entry.prompt_tokens
        spent["completion tokens"] += entry.completion_tokens
    return {stage: dict(spent) for stage, spent in paid.items()}


def _share(flags: Sequence[bool]) -> float | None:
    return round(sum(flags) / len(flags), 4) if flags else None


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_card(facts: dict[str, Any], out: Path) -> None:
    """Write the card for programs (`card.json`) and for people (`card.md`)."""
    whole = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
    (out / "card.json").write_text(whole, encoding="utf-8", errors="backslashreplace")
    (out / "card.md").write_text(_page(facts), encoding="utf-8")


def _page(facts: dict[str, Any]) -> str:
    read = facts["read"]
    lines = [
        "# Chains with imagination in words",
        "",
        f"{facts['kept']} chains, from {read['records']} records of `{_code(facts['source'])}` "
        f"(layout {facts['layout']}), rewritten by `{_code(facts['model'])}`.",
        "",
        "| stage | left | refused | why |",
        "|-|-|-|-|",
        _row("read", read["chains"], _kinds(read)),
    ]
    lines += [_row(name, s["left"], s["refused"]) for name, s in facts["stages"].items()]
    lines += ["", "| subset | chains |", "|-|-|"]
    lines += [f"| {_words(subset)} | {n} |" for subset, n in facts["kept by subset"].items()]
    lines += [
        "",
        f"Share of chains with the answer in a caption: {facts['answer in a caption']}; in one "
        f"before the last: {facts['answer in a caption before the last']}.",
        "",
        "Paid in all: " + (_cost(facts["cost in the ledger"]) or "nothing") + ".",
        "",
        "Prompts: " + ", ".join(f"`{k}` ({v[:12]})" for k, v in facts["prompts"].items()) + ".",
        "",
        "Not known:",
        *[f"- {what}" for what in facts["unknown"]],
        "",
    ]
    return "\n".join(lines)


def _kinds(counts: dict[str, int]) -> dict[str, int]:
    mark = "refused: "
    return {k.removeprefix(mark): n for k, n in counts.items() if k.startswith(mark)}


def _row(name: str, left: int, refused: dict[str, int]) -> str:
    why = ", ".join(f"{_words(kind)} {n}" for kind, n in refused.items())
    return f"| {name} | {left} | {sum(refused.values())} | {why} |"


def _words(text: str) -> str:
    """A text of the data as words of a Markdown table: nothing in it is HTML, a link or a column.

    >>> _words("a|b <script> [x](y)")
    'a\\\\|b &lt;script&gt; \\\\[x\\\\](y)'
    """
    line = " ".join(inert(str(text), limit=200).split())
    return re.sub(r"([\\`*\[\]|~!])", r"\\\1", html.escape(line, quote=False))


def _code(text: str) -> str:
    """A text of the data within backticks, where only a backtick means something."""
    return " ".join(inert(str(text), limit=200).replace("`", "'").split())


def _cost(paid: dict[str, dict[str, int]]) -> str:
    return ", ".join(
        f"{stage} {spent['replies']} replies and {spent['prompt tokens']} + "
        f"{spent['completion tokens']} tokens"
        for stage, spent in paid.items()
    )
