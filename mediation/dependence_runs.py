"""What `input_dependence` runs: every input once, again with one constant latent, some repeated."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from imaginelens.estimates.similarity import mean_offdiagonal
from imaginelens.hooks import Constant, EditContext, Force, LatentModel, Pairs, Run, Skip
from imaginelens.hooks import inputs as edits_of_inputs
from imaginelens.hooks.edits import Act
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.inputs import Example, InputEdit, content_key
from imaginelens.hooks.positions import LatentPositions, Positions, last_prompt, latent
from imaginelens.hooks.states import States
from imaginelens.hooks.tokens import Kind as TokenKind
from imaginelens.hooks.tokens import TokenMap

Labels = Sequence[Any] | Callable[[Example], Any]
FIRST, LAST = "blocks.0.hook_resid_pre", "ln_final.hook_normalized"
TOKENS = 32  # of a prompt and kind, at the most, for the baselines


# ---- which inputs ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """Distinct inputs, and how they belong together.

    Attributes:
        labels, groups: one per input; a label that is not known is None.
        pairs: the numbers of x0 and x1; None for a list of inputs.
        twins: whether each x1 is its x0 after a change that takes nothing from another input.
    """

    examples: tuple[Example, ...]
    labels: tuple[Any, ...] | None
    groups: tuple[Any, ...] | None
    pairs: Int[np.ndarray, "pair 2"] | None
    twins: bool

    @property
    def edited(self) -> set[int]:
        """The inputs that are edited twins of others, and no further instances."""
        if not self.twins or self.pairs is None:
            return set()
        return set(self.pairs[:, 1].tolist()) - set(self.pairs[:, 0].tolist())


def inputs_of(data: Any, labels: Labels | None, groups: Sequence[Any] | None) -> Inputs:
    """The distinct inputs of pairs or of a list of examples, each once, by content.

    Raises:
        InputError: an input cannot be read, or labels or groups are not one per input.
    """
    paired = isinstance(data, Pairs)
    if not paired and (isinstance(data, str | Mapping) or not isinstance(data, Sequence)):
        raise InputError(
            f"the inputs are a {type(data).__name__}, expected il.Pairs or a list of examples "
            "{'images': ..., 'text': ...}"
        )
    examples = [*data.base, *data.source] if paired else list(data)
    numbers = _numbered(examples)
    firsts = [numbers.index(k) for k in range(max(numbers, default=-1) + 1)]
    twins = paired and _are_twins(data.history)
    named = _labels(examples, labels, data if paired else None, twins)
    owner = groups if groups is not None else _own_groups(data, examples)
    if owner is not None and paired and len(owner) == len(data):
        owner = [*owner, *owner]
    if owner is not None and len(owner) != len(examples):
        raise InputError(
            f"{len(owner)} groups came with {len(data)} {'pairs' if paired else 'inputs'}; give "
            "one each"
        )
    pairs = None
    if paired:
        pairs = np.array(numbers).reshape(2, -1).T
        if (pairs[:, 0] == pairs[:, 1]).all():
            raise InputError(
                f"all {len(data)} sources equal their bases, so the input is never changed; use "
                "other sources"
            )
    return Inputs(
        tuple(examples[i] for i in firsts),
        None if named is None else tuple(_known(named, numbers, k) for k in range(len(firsts))),
        None if owner is None else tuple(owner[i] for i in firsts),
        pairs,
        twins,
    )


def _numbered(examples: Sequence[Any]) -> list[int]:
    """Equal inputs get equal numbers."""
    number: dict[str, int] = {}
    found = []
    for i, example in enumerate(examples):
        try:
            found.append(number.setdefault(content_key(example), len(number)))
        except InputError as error:
            raise InputError(f"input {i} cannot be read: {error}") from error
    return found


def _are_twins(history: Sequence[str]) -> bool:
    """Whether the sources are their bases after one edit that takes nothing from another input."""
    edit = getattr(edits_of_inputs, history[-1].split("(")[0], None) if history else None
    return isinstance(edit, type) and issubclass(edit, InputEdit) and not edit.uses_other


def _labels(
    examples: Sequence[Example], given: Labels | None, pairs: Pairs | None, twins: bool
) -> list[Any] | None:
    """One label per input, as given or the answers; twins are told apart without labels."""
    if callable(given):
        found = [given(example) for example in examples]
    elif given is not None:
        found = list(given)
    elif pairs is not None:
        found = [*pairs.base_answers, *pairs.source_answers]
    else:
        found = [example.get("answer") for example in examples]
    if len(found) != len(examples):
        what = "inputs, the bases and then the sources" if pairs is not None else "inputs"
        raise InputError(f"{len(found)} labels came with {len(examples)} {what}; give one each")
    if (twins and given is None) or all(label is None for label in found):
        return None
    for i, label in enumerate(found):
        if not isinstance(label, Hashable) or label != label:
            raise InputError(
                f"the label of input {i} is {label!r}, expected a number or a name, or None where "
                "it is not known"
            )
    return [label.strip().casefold() if isinstance(label, str) else label for label in found]


def _own_groups(data: Any, examples: Sequence[Example]) -> Sequence[Any] | None:
    if isinstance(data, Pairs):
        return data.groups
    found = [example.get("group") for example in examples]
    without = [i for i, group in enumerate(found) if group is None]
    if 0 < len(without) < len(found):
        raise InputError(
            f"{len(without)} of {len(found)} inputs have no group (the first is input "
            f"{without[0]}) and the others have one; give every input its own, or pass groups=..."
        )
    return None if without else found


def _known(named: Sequence[Any], numbers: Sequence[int], k: int) -> Any:
    """The label of an input that occurs several times: the first that is known."""
    found = [label for label, number in zip(named, numbers, strict=True) if number == k]
    return next((label for label in found if label is not None), None)


# ---- baselines: tokens of the prompt -----------------------------------------------------------


@dataclass(frozen=True)
class Baseline:
    """How alike other states of the same runs are between inputs, for comparison.

    Attributes:
        name: which tokens; `site`: where in the model.
        raw, centred: the mean cosine of a token of one input and one of another.
        adjacent: the mean raw cosine of tokens that follow each other; nan where none do.
        n: how many inputs have such tokens.
    """

    name: str
    site: str
    raw: float
    centred: float
    adjacent: float
    n: int


@dataclass(frozen=True)
class _Prompted(Positions):
    """Up to 32 prompt tokens of a kind: the last ones of text, evenly spaced ones of images."""

    kind: TokenKind

    def resolve(self, tokens: TokenMap, row: int) -> np.ndarray:
        columns = tokens.columns(row, self.kind)
        columns = columns[columns < tokens.prompt_width]
        if self.kind == TokenKind.TEXT or len(columns) <= TOKENS:
            return columns[-TOKENS:]
        return columns[np.linspace(0, len(columns) - 1, TOKENS).round().astype(int)]


PLACES: tuple[tuple[str, str, Positions], ...] = (
    ("text tokens", FIRST, _Prompted(TokenKind.TEXT)),
    ("image tokens", FIRST, _Prompted(TokenKind.IMAGE)),
    ("text tokens", LAST, _Prompted(TokenKind.TEXT)),
    ("last prompt token", LAST, last_prompt),
)


def baseline(name: str, site: str, tokens: Sequence[Float[np.ndarray, "_ dim"]]) -> Baseline:
    """The mean cosines of all pairs of tokens of different inputs, without drawing any.

    The mean cosine of two sets of tokens is the inner product of their mean unit vectors.

    >>> same = [np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[2.0, 0.0]])]
    >>> baseline("text tokens", "hook_embed", same).raw
    1.0
    """
    there = [t.astype(np.float64) for t in tokens if len(t)]
    if len(there) < 2:
        return Baseline(name, site, math.nan, math.nan, math.nan, len(there))
    middle = np.mean([t.mean(0) for t in there], axis=0)
    steps = [float((u[1:] * u[:-1]).sum(1).mean()) for u in map(_unit, there) if len(u) > 1]
    kinds = ([_unit(t) for t in there], [_unit(t - middle) for t in there])
    raw, centred = (np.stack([u.mean(0) for u in units]) for units in kinds)
    return Baseline(
        name,
        site,
        mean_offdiagonal(raw @ raw.T),
        mean_offdiagonal(centred @ centred.T),
        float(np.mean(steps)) if steps else math.nan,
        len(there),
    )


def _unit(tokens: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(tokens, axis=1, keepdims=True)
    return np.divide(tokens, norms, out=np.zeros_like(tokens), where=norms > 0)


# ---- runs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collected:
    """The states of all inputs, and of the controls.

    Attributes:
        states, mask: (input, step, dimension), and which steps each input has.
        control, control_mask: the same with one constant latent in the place of all; None where
            the positions are no latents, or no input fed any.
        sham: for each repeated input how far its states moved, relative to their norm, at most.
    """

    states: Float[np.ndarray, "input step dim"]
    mask: Bool[np.ndarray, "input step"]
    control: Float[np.ndarray, "input control_step dim"] | None
    control_mask: Bool[np.ndarray, "input control_step"] | None
    baselines: tuple[Baseline, ...]
    sham: Float[np.ndarray, " repeated"]
    keys: tuple[str, ...]
    triggers: tuple[str, ...]
    forwards: int
    seconds: float


@dataclass(frozen=True)
class _Dummy(Constant):
    """One constant latent that notes what the model would have fed, by row and step."""

    seen: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def apply(self, act: Act, ctx: EditContext) -> Act:
        for cell, (row, step) in enumerate(zip(ctx.rows, ctx.steps, strict=True)):
            self.seen[int(row), int(step)] = act[cell].detach().clone()
        return super().apply(act, ctx)


@dataclass
class Collector:
    """Runs batches of inputs and keeps their states.

    Attributes:
        dummy: the constant latent of the control: the first that any input fed, so that it is one
            the model makes, and does not depend on how inputs are batched.
    """

    lens: LatentModel
    at: Positions
    site: str
    max_new_tokens: int | None
    latents: Skip | Force | None
    dummy: torch.Tensor | None = None
    forwards: int = 0
    seconds: float = 0.0

    def collect(self, inputs: Inputs, batch_size: int) -> Collected:
        """Run everything: each input, each with the constant latent, and some again."""
        n = len(inputs.examples)
        chunks = [range(i, min(i + batch_size, n)) for i in range(0, n, batch_size)]
        plain: list[States] = []
        under: list[States] = []
        keys: list[str] = []
        triggers: list[str] = []
        tokens: list[list[np.ndarray]] = [[] for _ in PLACES]
        total = 2 * len(chunks) + 1
        with tqdm(total=total, desc="input dependence", unit="batch", delay=3, leave=False) as bar:
            for chunk in chunks:
                run = self.run([inputs.examples[i] for i in chunk], PLACES)
                keys += run.tokens.keys
                triggers.append(str(run.trigger))
                plain.append(self._states(run))
                instances = [row for row, i in enumerate(chunk) if i not in inputs.edited]
                for kept, place in zip(tokens, PLACES, strict=True):
                    kept += self._tokens(run, instances, *place[1:])
                bar.update()
                if isinstance(self.at, LatentPositions):
                    under.append(self._under_dummy(run, [inputs.examples[i] for i in chunk]))
                bar.update()
            states, mask = _joined(plain)
            sham = self._sham(inputs.examples, batch_size, states, mask)
            bar.update()
        control, there = _joined(under) if under and mask.any() else (None, None)
        found = [baseline(name, site, t) for (name, site, _), t in zip(PLACES, tokens, strict=True)]
        return Collected(
            states=states,
            mask=mask,
            control=control,
            control_mask=there,
            baselines=tuple(b for b in found if b.n > 1),
            sham=sham,
            keys=tuple(keys),
            triggers=tuple(triggers),
            forwards=self.forwards,
            seconds=self.seconds,
        )

    def run(
        self,
        examples: Sequence[Example],
        places: Sequence[tuple[str, str, Positions]] = (),
        limit: int | None = None,
    ) -> Run:
        """Generate, keeping the states of the site and of some places."""
        wanted = {self.site, *(site for _, site, _ in places)} - {"hook_latent"}
        sites = [name for name in self.lens.registry if name in wanted]
        kept = [at for *_, at in places] + [self.at] * (self.site != "hook_latent")
        run = self.lens.run(
            list(examples),
            names_filter=sites or False,
            positions=kept,
            max_new_tokens=self.max_new_tokens if limit is None else limit,
            latents=self.latents,
        )
        self.forwards += run.forwards
        self.seconds += run.seconds
        return run

    def _states(self, run: Run) -> States:
        found = run.states(self.site, self.at)
        return States(found.values.flatten(2).double().cpu(), found.mask.cpu())

    def _tokens(self, run: Run, rows: Sequence[int], site: str, at: Positions) -> list[np.ndarray]:
        """The states at some prompt tokens, for each row."""
        if site not in run.cache:
            return []
        found = run.states(site, at)
        return [found.values[row][found.mask[row]].float().cpu().numpy() for row in rows]

    def _under_dummy(self, run: Run, examples: Sequence[Example]) -> States:
        """The states that the model makes of the same inputs with the dummy fed at every step.

        It is generated only as far as the last latent: what is written afterwards is not read.
        """
        fed = run.latents[run.latent_mask]
        if self.dummy is None and len(fed):
            self.dummy = fed[0].detach().clone()
        if not len(fed) or self.dummy is None or bool((fed == self.dummy).all()):
            return self._states(run)  # nothing was fed, or nothing else than the dummy
        columns = np.flatnonzero((run.tokens.kind == TokenKind.LATENT).any(0))
        # latents may stand in the prompt, and one token has to be written
        limit = max(int(columns[-1]) + 2 - run.tokens.prompt_width, 1)
        edit = _Dummy(value=self.dummy)
        with self.lens.edit(edit, at=latent):
            again = self.run(examples, limit=limit)
        would = torch.zeros_like(again.latents)
        for (row, step), state in edit.seen.items():
            would[row, step] = state
        return self._states(replace(again, latents=would))

    def _sham(
        self, examples: Sequence[Example], batch_size: int, states: np.ndarray, mask: np.ndarray
    ) -> Float[np.ndarray, " repeated"]:
        """Run some inputs again, in another order and beside others: how far do states move?"""
        n = len(examples)
        some = max(1, min(n, batch_size // 2))
        order = np.unique(np.linspace(0, n - 1, some).round().astype(int))[::-1]
        again, there = _joined([self._states(self.run([examples[i] for i in order]))])
        width = min(mask.shape[1], there.shape[1])
        both = mask[order, :width] & there[:, :width]
        old, new = states[order, :width], again[:, :width]
        moved = relative(new - old, old)
        return np.where(both, moved, 0.0).max(1, initial=0.0)


def relative(
    moved: Float[np.ndarray, "*cell dim"], old: Float[np.ndarray, "*#cell dim"]
) -> Float[np.ndarray, "*cell"]:
    """||moved|| / ||old||; 0 where nothing moved, nan where a zero state did.

    >>> relative(np.array([[0.0, 3.0]]), np.array([[4.0, 0.0]]))
    array([0.75])
    """
    change, size = np.linalg.norm(moved, axis=-1), np.linalg.norm(old, axis=-1)
    size = np.broadcast_to(size, change.shape)
    found = np.divide(change, size, out=np.full_like(change, np.nan), where=size > 0)
    return np.where(change == 0, 0.0, found)


def _joined(parts: Sequence[States]) -> tuple[np.ndarray, np.ndarray]:
    """All batches as one array (input, step, dimension), and its mask."""
    width = max(part.values.shape[1] for part in parts)

    def filled(part: torch.Tensor) -> np.ndarray:
        missing = width - part.shape[1]
        return np.pad(part.numpy(), [(0, 0), (0, missing), *[(0, 0)] * (part.ndim - 2)])

    return (
        np.concatenate([filled(part.values) for part in parts]),
        np.concatenate([filled(part.mask) for part in parts]),
    )
