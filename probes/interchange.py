"""Interchange subspaces: which part of a state, put in from another input, carries a variable?

A basis is learned so that the base's state, with its coordinates in that basis set to the source's,
makes the model answer what a hypothesis predicts (distributed alignment search; Geiger et al. 2024,
arXiv 2303.02536). The learning, the interchange and its placebo are TransformerLens' own
(`transformer_lens.tools.analysis.interchange`): it is given a small module that turns the states at
one position into the logits of the answers, by one forward through our engine at the base's text.

Such a search finds something in almost any model. So it is trained on one half of the pairs and
judged on the other, beside three controls on the same pairs: states moved as far in random
subspaces; a subspace trained as long on arbitrary answers; and the whole state.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int

from imaginelens.estimates import Estimate
from imaginelens.estimates.margin import Margin
from imaginelens.hooks.edits import Act, Edit, EditContext
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.metrics import targets_of
from imaginelens.hooks.model import LatentModel
from imaginelens.hooks.pairs import Hypothesis, Pairs
from imaginelens.hooks.patching import donor_run
from imaginelens.hooks.positions import LatentPositions, Positions, latent
from imaginelens.hooks.run import Run

HOOK = "hook_state"
Found = Literal["found", "not found", "undecided"]
Hits = Float[np.ndarray, " pair"]


@dataclass(frozen=True, repr=False, eq=False)
class Subspace:
    """A learned subspace, and how often its interchange gives what the hypothesis predicts.

    All shares are of held-out pairs for which the prediction is not the base's own answer, so that
    doing nothing is always wrong.

    Attributes:
        basis: orthonormal, for `il.Project(basis.T)` and the like.
        hits: 1.0 where the interchange of the subspace gave the predicted answer.
        placebo: (draw, pair), of states moved as far, in random subspaces of the same rank.
        arbitrary: of a subspace trained as long on arbitrary answers: how often it gave those.
        whole: of the whole state put in.
        groups: the label of each pair's group, or None.
        losses: of the training, by epoch.
    """

    basis: Float[np.ndarray, "d_model rank"]
    hypothesis: str
    hits: Hits
    placebo: Float[np.ndarray, "draw pair"]
    arbitrary: Hits
    whole: Hits
    groups: tuple[Any, ...] | None
    losses: tuple[float, ...]
    where: str

    @property
    def rank(self) -> int:
        """How many dimensions it has."""
        return self.basis.shape[1]

    @cached_property
    def accuracy(self) -> Estimate:
        """How often the subspace gives the predicted answer."""
        return Estimate.share(self.hits, name="interchange accuracy", groups=self.groups)

    @cached_property
    def accuracy_whole(self) -> Estimate:
        """How often the whole state does."""
        return Estimate.share(self.whole, name="accuracy of the whole state", groups=self.groups)

    @cached_property
    def beyond_placebo(self) -> Estimate:
        """How much more often than moving states as far elsewhere."""
        values = self.hits - self.placebo.mean(0)
        name = "interchange accuracy beyond the placebo"
        return Estimate.bounded(values, low=-1, high=1, name=name, groups=self.groups)

    @cached_property
    def beyond_arbitrary(self) -> Estimate:
        """How much more often than a subspace trained on arbitrary answers gives those."""
        name = "interchange accuracy beyond arbitrary answers"
        return Estimate.paired(self.hits, self.arbitrary, name=name, groups=self.groups)

    @cached_property
    def beyond_whole(self) -> Estimate:
        """How much more often than the whole state put in: more is no good sign, for a subspace
        that does what the state itself does not wakes a path that is asleep in the model (Makelov
        et al. 2023, arXiv 2311.17030)."""
        name = "interchange accuracy beyond the whole state's"
        return Estimate.paired(self.hits, self.whole, name=name, groups=self.groups)

    def verdict(self, margin: Margin | None = None) -> Found:
        """Whether the subspace carries the variable, as far as these pairs can tell.

        "found": it is better than both controls, with 95% intervals that leave out 0, and neither
        is shown to be within the margin. "not found": it is within the margin of the placebo, or
        worse (TOST at 5%, or the whole interval), or it does what the whole state does not
        (`beyond_whole`). "undecided": neither.

        Args:
            margin: in shares; 0.05 is 5 points.

        Raises:
            EstimateError: the margin is missing.
        """
        if self.beyond_whole.ci().low > 0:
            return "not found"
        shown = [
            estimate.verdict(margin) == "effect" and estimate.value > 0
            for estimate in (self.beyond_placebo, self.beyond_arbitrary)
        ]
        if all(shown):
            return "found"
        worse = self.beyond_placebo.ci().high < 0
        within = self.beyond_placebo.equivalence(margin).equivalent
        return "not found" if worse or within else "undecided"

    def __repr__(self) -> str:
        rows = (
            ("subspace", self.accuracy),
            ("whole state", self.accuracy_whole),
            ("beyond placebo", self.beyond_placebo),
            ("beyond arbitrary", self.beyond_arbitrary),
        )
        lines = [
            f"Subspace of rank {self.rank} of {len(self.basis)} at {self.where}: interchange "
            f"accuracy for {self.hypothesis!r} on {len(self.hits)} held-out pairs"
        ]
        return "\n".join(lines + [f"  {name:<17} {e.value:.3g} {e.ci()}" for name, e in rows])


def find_subspace(
    lens: LatentModel,
    pairs: Pairs,
    *,
    hypothesis: str | Hypothesis,
    rank: int,
    site: str = "hook_latent",
    at: Positions = latent[0],
    epochs: int = 40,
    lr: float = 0.05,
    draws: int = 3,
    batch_size: int = 32,
    seed: int = 0,
) -> Subspace:
    """Learn the subspace of the states at one position that carries what a hypothesis says.

    The text is held as the base wrote it, and so are later latents. All training pairs make one
    step of the optimiser, so the forwards of half of the pairs are in memory with their gradients.

    Args:
        pairs: half of them (whole groups) train, the others judge.
        hypothesis: the name of one of the pairs' own, or `(base, source, steps) -> answer`.
        rank: of the subspace.
        at: one position of each example, such as `il.latent[1]`; a hypothesis about latents is
            asked for the steps it selects.
        epochs, lr: steps of Adam, and how large.
        draws: random subspaces of the placebo.

    Raises:
        InputError: `at` is not one position in each run, answers begin with the same token, there
            are too few pairs to judge, or an argument is not what it should be.
        EstimateError: fewer than 10 groups are left to judge by.

    >>> import imaginelens as il
    >>> lens = il.load("latent-content")
    >>> task = lens.task(n=48, seed=0)
    >>> found = find_subspace(lens, task, hypothesis="content", rank=8, at=il.latent[1], epochs=6)
    >>> found.basis.shape
    (64, 8)
    """
    rule, name = _rule(pairs, hypothesis)
    _check(lens, pairs, rank, epochs, draws, batch_size, site)
    predicted = _predictions(pairs, rule, at)
    train, test = _halves(pairs, predicted, seed)
    answers = tuple(sorted({*predicted, *pairs.base_answers}))
    parts = [
        _Reading.of(lens, pairs.select(rows), answers, site, at, batch_size)
        for rows in (train, test)
    ]
    targets = np.array([answers.index(answer) for answer in predicted])
    search = _Search(parts[0], parts[1], rank, epochs, lr, seed)
    with _weights_held(lens.model):
        basis, losses = search.learn(targets[train])
        fake = search.arbitrary(predicted, len(answers))
        other, _ = search.learn(fake[train])
        hits = search.hits(basis, targets[test])
        placebo = [search.placebo_hits(basis, targets[test], seed + k) for k in range(draws)]
        arbitrary = search.hits(other, fake[test])
        whole = search.hits(torch.eye(len(basis), dtype=basis.dtype), targets[test])
    return Subspace(
        basis=basis.double().cpu().numpy(),
        hypothesis=name,
        hits=hits,
        placebo=np.stack(placebo),
        arbitrary=arbitrary,
        whole=whole,
        groups=None if pairs.groups is None else tuple(pairs.groups[row] for row in test),
        losses=losses,
        where=f"{at!r} of {site}",
    )


# ---- the search: TransformerLens' own, on a module that reads states --------------------------


@dataclass(frozen=True)
class _Search:
    """TransformerLens' learning and interchange, on the pairs to train on and to judge by."""

    train: "_Reading"
    test: "_Reading"
    rank: int
    epochs: int
    lr: float
    seed: int

    def learn(self, targets: Int[np.ndarray, " pair"]) -> tuple[torch.Tensor, tuple[float, ...]]:
        """The basis whose interchange makes the model answer these, and the losses."""
        n = len(self.train)
        module = self.train.module()
        found = _tools().fit_das(
            module,
            HOOK,
            torch.arange(n),
            torch.arange(n, 2 * n),
            torch.tensor(targets),
            module,
            rank=self.rank,
            epochs=self.epochs,
            batch_size=n,
            lr=self.lr,
            seed=self.seed,
            device=self.train.states.device,
        )
        return found.basis, found.losses

    def arbitrary(self, predicted: Sequence[str], n_answers: int) -> Int[np.ndarray, " pair"]:
        """Other answers in the place of the predicted ones: the same for the same."""
        fake = _tools().arbitrary_targets(list(predicted), n_answers, self.seed)
        return np.asarray(fake.numpy())

    def hits(self, basis: torch.Tensor, targets: Int[np.ndarray, " pair"]) -> Hits:
        """Where the interchange gives the target."""
        return self._hits(_tools().SubspaceInterchange(basis), targets)

    def placebo_hits(
        self, basis: torch.Tensor, targets: Int[np.ndarray, " pair"], seed: int
    ) -> Hits:
        """The same where states are moved as far in a random subspace."""
        tools = _tools()
        other = tools.random_basis(len(basis), self.rank, seed)
        placebo = tools.NormMatchedPlacebo(tools.SubspaceInterchange(basis), other)
        return self._hits(placebo, targets)

    def _hits(self, intervention: Any, targets: Int[np.ndarray, " pair"]) -> Hits:
        n, module = len(self.test), self.test.module()
        logits = _tools().intervened_logits(
            module, HOOK, intervention, torch.arange(n), self.test.states[n:], module, batch_size=n
        )
        return np.asarray(logits.argmax(-1).numpy() == targets, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class _Reading:
    """Base runs, and how to read their answers with other states at one position.

    Attributes:
        states: of the bases, then of the sources, at that position.
        blocks: the rows of each base run, the run, and where it decides the answer.
        tokens: the first token of each answer.
    """

    lens: LatentModel
    states: Float[torch.Tensor, "state d_model"]
    blocks: tuple[tuple[slice, Run, tuple[int, ...]], ...]
    tokens: tuple[int, ...]
    site: str
    at: Positions

    def __len__(self) -> int:
        return len(self.states) // 2

    @staticmethod
    def of(
        lens: LatentModel,
        pairs: Pairs,
        answers: Sequence[str],
        site: str,
        at: Positions,
        batch_size: int,
    ) -> "_Reading":
        blocks, tokens = [], set()
        found: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for start in range(0, len(pairs), batch_size):
            rows = slice(start, min(start + batch_size, len(pairs)))
            for kept, inputs in zip(found, (pairs.base, pairs.source), strict=True):
                run = donor_run(lens, lens.run(list(inputs[rows])), [site], at, "fixed")
                kept.append(_one_each(run, site, at))
                if inputs is pairs.base:
                    columns = tuple(lens.script(run).read_at)
                    blocks.append((rows, run, columns))
                    tokens.add(_first_tokens(lens, run, answers, columns))
        if len(tokens) > 1:
            raise InputError(
                "the answers begin with other tokens in some runs than in others, so that they "
                "cannot be told apart by their first; use pairs whose answers stand alike"
            )
        states = torch.cat([*found[0], *found[1]]).detach()
        return _Reading(lens, states, tuple(blocks), tokens.pop(), site, at)

    def module(self) -> Any:
        """A TransformerLens module: states by number, through a hook, to the answers' logits."""
        from transformer_lens import HookedRootModule
        from transformer_lens.hook_points import HookPoint

        reading = self

        class States(HookedRootModule):
            def __init__(self) -> None:
                super().__init__()
                self.hook_state = HookPoint()
                self.setup()

            def forward(self, numbers: torch.Tensor) -> torch.Tensor:
                states = reading.states[numbers.to(reading.states.device)]
                new = self.hook_state(states)
                if new is states:  # only looked at
                    return states.new_zeros(len(states), len(reading.tokens))
                order = torch.argsort(numbers)
                return reading.logits(new[order])[torch.argsort(order)]

        return States().eval()

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """The logits of the answers with these states in all base runs, in order."""
        found = []
        for rows, run, columns in self.blocks:
            with self.lens.edit(_Lay(states[rows]), at=self.at, site=self.site):
                logits = self.lens.run_with_hooks(run)
            deciding = logits[torch.arange(len(run)), list(columns)]
            found.append(deciding[:, list(self.tokens)])
        return torch.cat(found)


@dataclass(frozen=True, eq=False)
class _Lay(Edit):
    """Puts one state into each row; a gradient goes through."""

    states: torch.Tensor

    def apply(self, act: Act, ctx: EditContext) -> Act:
        return self.states[torch.as_tensor(ctx.rows)].to(act).reshape(act.shape)


def _tools() -> Any:
    from transformer_lens.tools.analysis import interchange

    return interchange


@contextmanager
def _weights_held(model: torch.nn.Module) -> Iterator[None]:
    """No gradient is kept for weights, here."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


# ---- what it is asked ------------------------------------------------------------------------


def _one_each(run: Run, site: str, at: Positions) -> torch.Tensor:
    """The state of each row at the one position that `at` selects."""
    states = run.states(site, at)
    if set(states.counts()) != {1}:
        raise InputError(
            f"{at!r} selects {min(states.counts())} to {max(states.counts())} positions in a run, "
            "and a subspace is learned at one; select one, such as il.latent[0]"
        )
    return states.values[:, 0].flatten(1)


def _first_tokens(
    lens: LatentModel, run: Run, answers: Sequence[str], columns: Sequence[int]
) -> tuple[int, ...]:
    """The token that each answer begins with behind what these runs wrote."""
    if min(columns) < 0:
        raise InputError(
            f"run {list(columns).index(-1)} of a batch wrote no answer, so that nothing could be "
            "read there; leave such pairs out"
        )
    n, found = len(run), []
    for answer in answers:
        targets = targets_of(run, [answer] * n, [None] * n, lens.encode)
        first = {ids[0] for ids in targets.base_ids}
        if len(first) > 1:
            raise InputError(
                f"{answer!r} begins with {len(first)} different tokens in runs of one batch; use "
                "pairs whose answers stand alike"
            )
        found.append(first.pop())
    if len(set(found)) < len(found):
        raise InputError(
            f"some of the {len(answers)} answers begin with the same token, such as those of "
            f"{answers[:3]}, and are told apart by their first; use other pairs"
        )
    return tuple(found)


def _rule(pairs: Pairs, hypothesis: str | Hypothesis) -> tuple[Hypothesis, str]:
    if isinstance(hypothesis, str):
        if hypothesis not in pairs.hypotheses:
            raise InputError(
                f"the pairs have no hypothesis {hypothesis!r}; they have "
                f"{', '.join(pairs.hypotheses) or 'none'}, or pass a function (base, source, steps)"
            )
        return pairs.hypotheses[hypothesis], hypothesis
    return hypothesis, getattr(hypothesis, "__name__", "hypothesis")


def _predictions(pairs: Pairs, rule: Callable[..., str], at: Positions) -> tuple[str, ...]:
    step = at.index if isinstance(at, LatentPositions) else None
    steps = (step,) if isinstance(step, int) else None
    return tuple(rule(base, source, steps) for base, source in pairs)


def _halves(pairs: Pairs, predicted: Sequence[str], seed: int) -> tuple[list[int], list[int]]:
    """Rows to train on, and rows to judge by, in which doing nothing is wrong."""
    units = list(range(len(pairs))) if pairs.groups is None else list(pairs.groups)
    names = list(dict.fromkeys(units))
    order = np.random.default_rng(seed).permutation(len(names))
    first = {names[k] for k in order[: len(names) // 2]}
    train = [row for row, unit in enumerate(units) if unit in first]
    test = [
        row
        for row, unit in enumerate(units)
        if unit not in first and predicted[row] != pairs.base_answers[row]
    ]
    if len(train) < 2 or len(test) < 10:
        raise InputError(
            f"{len(test)} of {len(pairs)} pairs are left to judge by, for which the hypothesis "
            "predicts another answer than the base's own; give at least 10, better 100"
        )
    return train, test


def _check(
    lens: LatentModel, pairs: Any, rank: int, epochs: int, draws: int, batch_size: int, site: str
) -> None:
    for name, value, least in (
        ("rank", rank, 1), ("epochs", epochs, 1), ("draws", draws, 2), ("batch_size", batch_size, 1)
    ):  # fmt: skip
        if value < least:
            raise InputError(f"{name} is {value}; give at least {least}")
    if len(lens.registry.match(site)) != 1:
        raise InputError(
            f"{site!r} names {len(lens.registry.match(site))} sites, and a subspace is learned at "
            "one; name it, such as 'hook_latent'"
        )
