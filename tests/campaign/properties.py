"""Laws over models x sites x positions x edits x batches, drawn by hypothesis.

`python tests/campaign/properties.py --cases 10000 --out FILE`. For each case: the edited forward
equals plain torch hooks to the last bit (float64), an untouched forward is what it was, no hook is
left, the landing counts the cells that were meant; and a hook that raises leaves no trace.

It may be stopped at any time, and goes on from the figures in FILE with another seed, unless
`hooks/` has changed since.
"""

import argparse
import ast
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import oracle
import pytest
import tiny
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from untouched import fingerprint, same

import imaginelens as il

FAMILIES = tuple(tiny.FAMILIES)
ROUND = 250  # cases whose figures are kept together
PLAIN = (
    "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out",
    "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "mlp.hook_pre", "mlp.hook_post",
)  # fmt: skip
SITES = tuple(f"blocks.{i}.{site}" for i in (0, 1) for site in PLAIN)
TEXTS = ("what colour?", "where is the red cube?", "how many cats are there now?")
SIZES = ((48, 32), (24, 40), (40, 40))
SPEC = il.LatentSpec(
    name="test", open="<|latent_start|>", close="<|latent_end|>", pad="<|latent_pad|>", max_steps=3
)

Act = torch.Tensor
EDITS: dict[str, tuple[Callable[[float], Any], Callable[[Act, float], Act]]] = {
    "zero": (lambda a: il.Zero(), lambda act, a: torch.zeros_like(act)),
    "add": (lambda a: _Plus(a), lambda act, a: act + a),
    "scale": (lambda a: _Times(a), lambda act, a: act * a),
    "sham": (lambda a: il.Sham(), lambda act, a: act),
}


@dataclass(frozen=True)
class _Plus(il.Edit):
    """Adds a number."""

    by: float

    def apply(self, act: Act, ctx: Any) -> Act:
        return act + self.by


@dataclass(frozen=True)
class _Times(il.Edit):
    """Scales."""

    by: float

    def apply(self, act: Act, ctx: Any) -> Act:
        return act * self.by


@dataclass(frozen=True)
class Case:
    """One draw: a batch of a family, and up to three edits at sites of their own.

    Attributes:
        rows: which of the three inputs the batch has.
        edits: (site, name of an edit, a number for it, columns counted from the end).
        raises: the place in `edits` whose hook raises instead, or None.
    """

    family: str
    rows: tuple[int, ...]
    edits: tuple[tuple[str, str, float, tuple[int, ...]], ...]
    raises: int | None


@st.composite
def cases(draw: Any) -> Case:
    family = draw(st.sampled_from(FAMILIES))
    rows = tuple(draw(st.lists(st.integers(0, 2), min_size=1, max_size=3)))
    sites = draw(st.lists(st.sampled_from(SITES), min_size=1, max_size=3, unique=True))
    edits = tuple(
        (
            site,
            draw(st.sampled_from(tuple(EDITS))),
            draw(st.floats(-2, 2, width=16).filter(lambda a: a not in (0, 1))),
            tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3, unique=True))),
        )
        for site in sites
    )
    raises = draw(st.one_of(st.none(), st.none(), st.integers(0, len(sites) - 1)))
    return Case(family, rows, edits, raises)


@cache
def lens_of(family: str) -> il.LatentModel:
    return il.LatentModel(*tiny.build(family), spec=SPEC)


@cache
def batch_of(family: str, rows: tuple[int, ...]) -> tuple[Any, dict[str, Any], Act]:
    """The prompt as we take it, as a plain forward takes it, and its unedited logits."""
    lens = lens_of(family)
    examples = [
        {"images": tiny.image(*SIZES[i], seed=i), "text": tiny.prompt(family, TEXTS[i])}
        for i in rows
    ]
    prompt = lens.prompt(examples)
    inputs = {**prompt.inputs, "position_ids": tiny.positions(lens.model, dict(prompt.inputs))}
    with torch.no_grad():
        return prompt, inputs, lens.model(**inputs, use_cache=False).logits


@cache
def print_of(family: str) -> dict[str, Any]:
    batch_of(family, (0,))  # in its first forward transformers puts hooks of its own on some models
    return fingerprint(lens_of(family).model)


class Planned(RuntimeError):
    """What a hook of a case raises."""


def check(case: Case) -> str:
    """One case; says what kind it was.

    Raises:
        AssertionError: a law does not hold.
    """
    lens, before = lens_of(case.family), print_of(case.family)
    prompt, inputs, plain = batch_of(case.family, case.rows)
    kind = _raising(lens, prompt, case) if case.raises is not None else _equal(lens, case)
    assert len(lens.registry.active) == 0, "an edit is still registered"
    with torch.no_grad():
        assert torch.equal(lens.model(**inputs, use_cache=False).logits, plain), "it changed"
    if hash(case) % 16 == 0:  # copies all weights
        assert same(fingerprint(lens.model), before), "the model is not as it was"
    return kind


def _positions(case: Case, mask: Act) -> list[list[int]]:
    """Numbers that all rows have: positions count from a row's own first token."""
    shortest = int(mask.sum(1).min())
    return [[shortest - back for back in edit[3]] for edit in case.edits]


def _equal(lens: il.LatentModel, case: Case) -> str:
    prompt, inputs, plain = batch_of(case.family, case.rows)
    mask = inputs["attention_mask"]
    columns = _positions(case, mask)
    theirs, idle = _by_hand(lens, case, inputs, columns, (mask == 0).sum(1).tolist())
    landings = []
    try:
        with ExitStack() as stack, torch.no_grad():
            for (site, name, by, _), at in zip(case.edits, columns, strict=True):
                edit = lens.edit(EDITS[name][0](by), at=il.positions(at), site=site)
                landings.append(stack.enter_context(edit))
            ours = lens.run_with_hooks(prompt)
    except il.EditTouchedNothing:  # such as Zero behind a block that was given zeros
        assert idle, "an edit that changes something was refused"
        return "changes nothing"
    assert not idle, "an edit that changes nothing was not refused"
    assert torch.equal(ours, theirs), f"differs by {float((ours - theirs).abs().max())}"
    for landing, at in zip(landings, columns, strict=True):
        assert len(landing.cells) == len(at) * len(case.rows), (landing, at)
    if all(name == "sham" for _, name, _, _ in case.edits):
        assert torch.equal(ours, plain), "the sham changed something"
        return "sham"
    return f"{len(case.edits)} edits"


def _by_hand(
    lens: il.LatentModel,
    case: Case,
    inputs: dict[str, Any],
    columns: Sequence[list[int]],
    padding: Sequence[int],
) -> tuple[Act, list[str]]:
    """The logits by plain torch hooks, and the sites whose edit left all as it was."""
    idle = []
    pairs = zip(case.edits, columns, strict=True)
    # by hand, resid_mid is a hook on the block's output, too: it has to act before resid_post's
    in_order = sorted(pairs, key=lambda pair: pair[0][0].endswith("hook_resid_post"))
    with ExitStack() as stack, torch.no_grad():
        for (site, name, by, _), at in in_order:

            def put(
                act: Act, site: str = site, name: str = name, by: float = by, at: list[int] = at
            ) -> Act:
                new = act.clone()
                for row, pad in enumerate(padding):
                    there = [pad + k for k in at]
                    new[row, there] = EDITS[name][1](act[row, there], by)
                if name != "sham" and torch.equal(new, act):
                    idle.append(site)
                return new

            stack.enter_context(oracle.hooked(case.family, lens.model, site, put))
        return lens.model(**inputs, use_cache=False).logits, idle


def _raising(lens: il.LatentModel, prompt: Any, case: Case) -> str:
    assert case.raises is not None
    site = case.edits[case.raises][0]

    def broken(act: Act, hook: Any) -> Act:
        raise Planned(site)

    hooks = [(site, broken)]
    hooks += [(edit[0], lambda act, hook: None) for edit in case.edits if edit[0] != site]
    with pytest.raises(Planned, match=re.escape(site)):
        lens.run_with_hooks(prompt, fwd_hooks=hooks)
    return "raised"


def campaign(n: int, number: int = 0) -> dict[str, Any]:
    """Try `n` cases, drawn from a seed; counts of each kind."""
    counted: Counter[str] = Counter()
    families: Counter[str] = Counter()

    @seed(number)
    @settings(
        max_examples=n,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def run(case: Case) -> None:
        counted[check(case)] += 1
        families[case.family] += 1

    run()
    return {"cases": sum(counted.values()), "kinds": dict(counted), "families": dict(families)}


def added(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The figures of two rounds together."""
    counts = {
        name: dict(Counter(before.get(name, {})) + Counter(now[name]))
        for name in ("kinds", "families")
    }
    return {
        "code": now["code"],
        "rounds": before.get("rounds", 0) + 1,
        "cases": before.get("cases", 0) + now["cases"],
        **counts,
    }


def code() -> str:
    """A digest of what is tried; comments do not count."""
    digest = hashlib.sha256()
    for path in sorted((Path(__file__).parents[2] / "hooks").rglob("*.py")):
        digest.update(ast.dump(ast.parse(path.read_bytes())).encode())
    return digest.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    now = code()
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    if found.get("code") != now:
        found = {}
    while (left := options.cases - found.get("cases", 0)) > 0:
        tried = campaign(min(left, ROUND), found.get("rounds", 0))
        found = added(found, {"code": now, **tried})
        partial = options.out.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=1) + "\n")
        partial.replace(options.out)


if __name__ == "__main__":
    main()
