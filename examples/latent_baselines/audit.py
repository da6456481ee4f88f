"""When do latents begin to matter? Audit a model while it trains, and afterwards.

    python -m examples.latent_baselines.audit runs/mirage/free/model --chains eval/chains.jsonl

`Audit` is a callback of transformers' `Trainer`: every so many updates it asks, on a few held-out
pairs, what the answers lose when all latents are replaced (`il.necessity`), and whose prediction
comes true when they are swapped (`il.interchange`). The span is opened by force, so that a model
that has not learned to open one yet is asked the same. It changes nothing of the training.
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

import imaginelens as il
from examples.capimagine import chains as files
from examples.capimagine.chains import Chain
from examples.latent_baselines import rules
from examples.latent_baselines.encoding import asked, encode
from examples.latent_baselines.loop import span_of
from imaginelens.estimates import EstimateError
from imaginelens.hooks import LatentModel
from imaginelens.hooks.errors import ImagineLensError, InputError
from imaginelens.hooks.spec import LatentSpec

Row = dict[str, Any]
# their mean; noise with their mean and spread; zeros; another example's; their own in other order
EDITS = (il.Mean(), il.Noise(), il.Zero(), il.Resample(), il.Shuffle())
HELD = 64


def held_out(chains: Sequence[Chain]) -> tuple[list[Chain], list[Chain]]:
    """The chains to learn from, and the last few, which are kept for audits."""
    if len(chains) <= HELD:
        raise InputError(
            f"{len(chains)} chains leave none to learn from when {HELD} are held out; give --held"
        )
    return list(chains[:-HELD]), list(chains[-HELD:])


def pairs_of(chains: Sequence[Chain], processor: Any) -> il.Pairs:
    """Each chain as a base, with the nearest following one of another answer as its source."""
    examples = [rules.example(chain, asked(chain, processor)) for chain in chains]
    base, source = [], []
    for i in range(len(examples)):
        others = examples[i + 1 :] + examples[:i]
        other = next((e for e in others if e["answer"] != examples[i]["answer"]), None)
        if other is not None:
            base.append(examples[i])
            source.append(other)
    if not base:
        raise InputError("all chains have one answer, so that no swap could show anything")
    return il.Pairs(
        base=base,
        source=source,
        base_answers=[e["answer"] for e in base],
        source_answers=[e["answer"] for e in source],
        hypotheses=rules.hypotheses(chains),
    )


def audited(lens: LatentModel, pairs: il.Pairs, *, steps: int) -> Iterator[Row]:
    """What replacing and swapping the latents does: a row per edit, and one per hypothesis.

    What cannot be told (no run gave an answer, say) is a row of kind "failed", with the reason.
    """
    opened = _forced(lens, steps)
    with _brief(opened, pairs, steps):
        for ask in (_replaced, _swapped):
            try:
                yield from ask(opened, pairs)
            except (ImagineLensError, EstimateError) as error:
                yield {"kind": "failed", "of": str(error)}


def _replaced(lens: LatentModel, pairs: il.Pairs) -> Iterator[Row]:
    for _, line in il.necessity(lens, pairs, edits=list(EDITS)).to_dataframe().iterrows():
        if not line["control"]:
            keys = ("before", "after", "change", "low", "high", "n", "parse_coverage")
            yield {"kind": "necessity", "of": line["edit"], **{k: float(line[k]) for k in keys}}


def _swapped(lens: LatentModel, pairs: il.Pairs) -> Iterator[Row]:
    for name, share in il.interchange(lens, pairs).shares().items():
        shown = {"after": share.value, "low": share.low, "high": share.high, "n": share.n}
        yield {"kind": "interchange", "of": name, **shown}


def _forced(lens: LatentModel, steps: int) -> LatentModel:
    """The same model with its span opened at once, of exactly so many steps, and no other."""
    assert isinstance(lens.spec, LatentSpec)
    spec = replace(
        lens.spec, trigger="forced", forced_at=0, fixed=True, max_steps=steps, budget=steps
    )
    return LatentModel(lens.model, lens.processor, spec)


@contextmanager
def _brief(lens: LatentModel, pairs: il.Pairs, steps: int) -> Iterator[None]:
    """No run writes more than the span, the longest answer and its end: the rest is not read."""
    spelled = lens.tokenizer(list(pairs.base_answers), add_special_tokens=False).input_ids
    usual = lens.model.generation_config
    lens.model.generation_config = copy.deepcopy(usual)
    lens.model.generation_config.max_new_tokens = steps + 3 + max(map(len, spelled))
    try:
        yield
    finally:
        lens.model.generation_config = usual


class Audit(TrainerCallback):
    """Audits a model every so many updates; writes `audit.jsonl`, `audit.png`, `swaps.png`.

    Args:
        held: chains that are not learned from.
        out: where the rows and pictures go; rows of updates that are done again are replaced.
        every: updates between two audits; the first is before any.
        begun: updates of earlier stages.

    Attributes:
        seconds: CPU time that audits have taken.
    """

    def __init__(
        self,
        lens: LatentModel,
        held: Sequence[Chain],
        steps: int,
        out: Path,
        *,
        every: int,
        begun: int = 0,
    ) -> None:
        self.lens, self.steps, self.out = lens, steps, out
        self.every, self.begun = every, begun
        self.pairs = pairs_of(held, lens.processor)
        self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Audit before the first update, unless the stage before has."""
        now = self.begun + state.global_step
        rows = [row for row in read_rows(self.out) if row["update"] <= now]
        write_rows(rows, self.out)
        if state.global_step == 0 and not any(row["update"] == now for row in rows):
            self._audit(now)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Audit every so many updates, and at the last."""
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._audit(self.begun + state.global_step)

    def _audit(self, update: int) -> None:
        started = time.process_time()
        training = self.lens.model.training
        self.lens.model.eval()
        try:
            with torch.random.fork_rng(), torch.no_grad():
                found = list(audited(self.lens, self.pairs, steps=self.steps))
        finally:
            self.lens.model.train(training)
        rows = [row for row in read_rows(self.out) if row["update"] != update]
        rows += [{"update": update, **row} for row in found]
        write_rows(rows, self.out)
        for kind, name in (("necessity", "audit.png"), ("interchange", "swaps.png")):
            if any(row["kind"] == kind for row in rows):
                curves(rows, kind).save(self.out / name)
        self.seconds += time.process_time() - started


# ---- rows and curves ---------------------------------------------------------------------------


def read_rows(out: Path) -> list[Row]:
    """The rows of earlier audits."""
    path = out / "audit.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_rows(rows: Sequence[Row], out: Path) -> None:
    """Write all rows, whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    part = out / "audit.jsonl.part"
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(out / "audit.jsonl")


def curves(rows: Sequence[Row], kind: str) -> Any:
    """Accuracy under each edit, or each hypothesis' share, by update; a plotly figure."""
    import plotly.graph_objects as go

    from imaginelens.view.charts import COLOURS, chart, words

    own = [row for row in rows if row["kind"] == kind]
    lines: dict[str, list[tuple[int, float]]] = {}
    if kind == "necessity":
        lines["latents as they are"] = [(row["update"], row["before"]) for row in own]
    for row in own:
        lines.setdefault(row["of"], []).append((row["update"], row["after"]))
    said, y = {
        "necessity": ("Accuracy when all latents are replaced", "share of right answers"),
        "interchange": ("Whose prediction comes true when latents are swapped", "share of pairs"),
    }[kind]
    ends = {name: max(points) for name, points in lines.items()}
    alt = "; ".join(f"{name}: {share:.2f} at update {u}" for name, (u, share) in ends.items())
    figure = chart(
        said, x="update", y=y, alt=f"{said}. {alt}.", notes=[f"{int(own[-1]['n'])} held-out pairs"]
    )
    for number, (name, points) in enumerate(lines.items()):
        at = sorted(dict(points).items())
        figure.add_trace(
            go.Scatter(
                x=[u for u, _ in at], y=[v for _, v in at], mode="lines+markers", name=words(name),
                line={"color": COLOURS[number % len(COLOURS)], "width": 2}, marker={"size": 6},
            )
        )  # fmt: skip
    figure.update_yaxes(range=[-0.03, 1.03])
    return figure


# ---- the command -------------------------------------------------------------------------------


def likeness(lens: LatentModel, chains: Sequence[Chain], latents: torch.Tensor) -> list[float]:
    """Mean cosine, step by step, of latents and what the replies' pictures would have them be."""
    span = span_of(lens)
    items, refused = encode(lens, span, chains)
    if refused or any(item.targets is None for item in items):
        return []  # chains for evaluation show nothing in their replies
    aims = torch.stack([item.targets for item in items if item.targets is not None])
    return [float(c) for c in torch.cosine_similarity(latents, aims, dim=-1).mean(0)]


def main() -> None:
    """Audit a trained model on held-out chains, and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a folder that train.py wrote, or a Hub id")
    parser.add_argument("--chains", type=Path, required=True, help="chains not learned from")
    parser.add_argument("--n", type=int, default=512, help="how many of them")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lens = il.load(args.model)
    if not isinstance(lens.spec, LatentSpec):
        raise SystemExit(f"{args.model} has no latent family")
    chains = files.load(args.chains)[: args.n]
    pairs = pairs_of(chains, lens.processor)
    with torch.no_grad():
        run = lens.run([asked(chain, lens.processor) for chain in chains])
    right = [a == chain.answer for a, chain in zip(run.answers, chains, strict=True)]
    print(f"accuracy {sum(right) / len(right):.3f} on {len(right)}, the span opened by the model")
    if run.latents.shape[1] == lens.spec.max_steps:
        found = ", ".join(f"{c:.3f}" for c in likeness(lens, chains, run.latents))
        print(f"cosine of each step to the reply's pictures: {found or 'they show none'}")
    else:
        print("no run opened a span of its own")
    for row in audited(lens, pairs, steps=lens.spec.max_steps):
        if row["kind"] == "failed":
            print(f"failed       {row['of']}")
            continue
        interval = f"[{row['low']:.3f}, {row['high']:.3f}]"
        if row["kind"] == "necessity":
            interval = f"unedited {row['before']:.3f}, change {row['change']:.3f} {interval}"
        print(f"{row['kind']:12} {row['of']:14} {row['after']:.3f} {interval}, n {row['n']:.0f}")


if __name__ == "__main__":
    main()
