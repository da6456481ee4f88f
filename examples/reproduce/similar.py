"""How alike states are, between inputs and between steps, with all that is needed to read it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import imaginelens as il
from examples.reproduce import matrices
from examples.reproduce.exhibit import Cell, Drawing, Measured, Number, of
from examples.reproduce.subjects import Subject
from imaginelens.estimates.alike import Inter
from imaginelens.hooks.positions import Positions
from imaginelens.hooks.tokens import Kind, TokenMap
from imaginelens.view.charts import COLOURS, chart, words

LAST = "ln_final.hook_normalized"
SHOWN = 12  # steps that get a panel, at the most


@dataclass(frozen=True)
class Asked(Positions):
    """The text tokens of the prompt, without the system prompt."""

    def resolve(self, tokens: TokenMap, row: int) -> np.ndarray:
        """Those columns of a row."""
        columns = tokens.columns(row, Kind.TEXT)
        return columns[columns < tokens.prompt_width]


BASELINES = {"text token": Asked(), "image token": il.image, "behind the input": il.last_prompt}


def inputs_of(
    subject: Subject, benchmarks: Sequence[str], *, n: int, seed: int
) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """n inputs, uniform over the benchmarks; with what each is a case of, and its answer."""
    names = subject.benchmarks(benchmarks)
    each = -(-n // len(names)) if n else 0
    examples, cases, answers = list[dict[str, Any]](), list[str](), list[str]()
    for name in names:
        pairs = subject.pairs(name, n=each, seed=seed)
        examples += [dict(example) for example in pairs.base]
        answers += pairs.base_answers
        cases += list(pairs.base_answers) if subject.organism else [name] * len(pairs)
    return examples, cases, answers


def study(
    subject: Subject,
    benchmarks: Sequence[str],
    *,
    at: Any,
    site: str,
    n: int,
    seed: int,
    what: str,
) -> Measured:
    """The cosines of states at some positions, beside those of tokens and a constant latent."""
    examples, cases, answers = inputs_of(subject, benchmarks, n=n, seed=seed)
    labels = answers if subject.organism else cases
    found = il.input_dependence(
        subject.lens, examples, at=at, site=site, labels=labels, seed=seed,
        batch_size=subject.settings.batch_size, max_new_tokens=subject.settings.max_new_tokens,
    )  # fmt: skip
    panels = baseline_panels(subject, examples, seed)
    column: dict[str, Cell] = {}
    for step in found.steps[:SHOWN]:
        column[f"step {step}, between inputs"] = Number(found.inter(step).mean())
        if found.control is not None and step in found.control.steps:
            same = Number(found.control.inter(step).mean())
            column[f"step {step}, same prompts with one constant latent"] = same
        column[f"step {step}, whitened"] = Number(found.inter(step).mean("whitened"))
        if found.by == "label":
            p, share = found.permutation_p(step), found.retrieval(step)
            column[f"step {step}, nearest other input is a case of the same"] = (
                f"{100 * share.value:.0f}% ({100 * (share.null or 0):.0f}% by chance, p = {p:.2g})"
            )
    if len(found.steps) > 1:
        column["between adjacent steps of an input"] = of(found.intra.adjacent())
    column |= {f"{name}, between inputs": Number(m.mean()) for name, m in panels.items()}
    order = np.argsort(np.array(cases), kind="stable").tolist()
    names = [cases[i] for i in order]
    figures = [
        _matrices(found, panels, order, names, kind, what) for kind in ("raw", "centred")
    ] + [_curve(found, panels, what)]
    return Measured(
        {"": column},
        (f"{len(examples)} inputs, ordered by {'answer' if subject.organism else 'benchmark'}; "
         "states and tokens are those behind the final norm", found.verdict()),
        tuple(figures),
        {"finding": found.finding, "raw": [found.inter(s).mean() for s in found.steps]},
    )  # fmt: skip


def baseline_panels(subject: Subject, examples: Sequence[Any], seed: int) -> dict[str, Inter]:
    """The same cosines of one text token and one image token of each prompt, drawn at random, and
    of the state behind the whole input: in the layer that latents are taken from (ours)."""
    rows: dict[str, list[np.ndarray]] = {name: [] for name in BASELINES}
    draw_ = np.random.default_rng(seed)
    size = subject.settings.batch_size
    for start in range(0, len(examples), size):
        run = subject.lens.run(
            list(examples[start : start + size]), max_new_tokens=1, names_filter=LAST,
            positions=tuple(BASELINES.values()),
        )  # fmt: skip
        for name, selector in BASELINES.items():
            states = run.states(LAST, selector)
            for row, count in enumerate(states.counts()):
                if count:
                    picked = states.values[row, int(draw_.integers(count))]
                    rows[name].append(picked.double().cpu().numpy())
    return {
        name: Inter.of(np.stack(kept), np.arange(len(kept)))
        for name, kept in rows.items()
        if len(kept) == len(examples)
    }


def _matrices(
    found: il.Dependence, panels: dict[str, Inter], order: list[int], names: list[str], kind: str,
    what: str,
) -> Drawing:  # fmt: skip
    """One panel for each step, then the baselines; inputs that lack a step are grey there."""
    whole = dict[str, np.ndarray]()
    for step in found.steps[:SHOWN]:
        inter = found.inter(step)
        matrix = np.full((len(order), len(order)), np.nan)
        matrix[np.ix_(inter.inputs, inter.inputs)] = getattr(inter, kind)
        whole[f"step {step}"] = matrix
    whole |= {name: getattr(inter, kind) for name, inter in panels.items()}
    sorted_ = {name: matrix[np.ix_(order, order)] for name, matrix in whole.items()}
    title = f"{kind} cosine of every two inputs, {what}"
    return matrices.drawing(sorted_, names, name=f"{kind}-cosines", title=title)


def _curve(found: il.Dependence, panels: dict[str, Inter], what: str) -> Drawing:
    """The mean cosine by step: between inputs, with a constant latent, and with the step before."""
    steps = list(found.steps)
    lines: dict[str, tuple[list[int], list[float]]] = {
        "between inputs": (steps, [found.inter(s).mean() for s in steps])
    }
    if found.control is not None:
        there = [s for s in steps if s in found.control.steps]
        lines["with one constant latent"] = (
            there, [found.control.inter(s).mean() for s in there]
        )  # fmt: skip
    if len(steps) > 1:
        matrix = found.intra.matrix()
        lines["with the step before"] = (steps[1:], [float(matrix[s, s - 1]) for s in steps[1:]])
    told = "; ".join(
        f"{name} {', '.join(f'{value:.2f}' for value in values)}"
        for name, (_, values) in lines.items()
    )
    title = f"mean cosine by step, {what}"
    figure = chart(title, x="step", y="cosine", alt=f"{title}: {told}.", right=230)
    for colour, (name, (x, y)) in zip(COLOURS, lines.items(), strict=False):
        figure.add_scatter(x=x, y=y, name=words(name), mode="lines+markers", line={"color": colour})
    for colour, (name, inter) in zip(COLOURS[3:], panels.items(), strict=False):
        figure.add_scatter(
            x=[steps[0], steps[-1]], y=[inter.mean()] * 2, name=words(name), mode="lines",
            line={"color": colour, "dash": "dash"},
        )  # fmt: skip
    figure.update_xaxes(tickmode="array", tickvals=steps)
    figure.update_yaxes(range=[-0.25, 1.05])
    return Drawing.of(figure, "curve", "mean raw cosine by step")
