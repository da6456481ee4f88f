"""do(X) -> Z: do the latents depend on the input, and how alike are they?

The paper (arXiv 2602.22766, section 2) exchanges whole inputs and finds that the raw cosine of
latents is near 1, between inputs and between steps. Hidden states share a large common vector, so
that a raw cosine near 1 may hide all that tells inputs apart: the ReaLVR authors measure 0.99
between latents of different tasks, of which a linear probe names the task in 99.9%. Here the cosine
stands beside its controls, and the claim rests on two tests: do latents move when the input
changes, more than when it is repeated, and does the nearest other input share the label more often
than by chance?
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from imaginelens.hooks import Force, LatentModel, Pairs, Skip
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.inputs import Example
from imaginelens.hooks.patching import check_arguments
from imaginelens.hooks.positions import LatentPositions, Positions, latent
from imaginelens.mediation.dependence_result import FEWEST, Dependence
from imaginelens.mediation.dependence_runs import Collected, Collector, Inputs, Labels, inputs_of
from imaginelens.mediation.provenance import Provenance

FORMULA = (
    "do(X) -> Z: nearest other input shares the label, against permuted labels; "
    "||Z(x1) - Z(x0)|| / ||Z(x0)||, against a repeated input"
)


def input_dependence(
    lens: LatentModel,
    inputs: Pairs | Sequence[Example],
    *,
    at: Positions = latent,
    site: str = "hook_latent",
    labels: Labels | None = None,
    groups: Sequence[Any] | None = None,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    latents: Skip | Force | None = None,
    permutations: int = 1000,
    seed: int = 0,
) -> Dependence:
    """Test whether the latents depend on the input, and how alike they are, with controls.

    Of pairs the bases and the sources are inputs, each distinct one once. Each is generated as
    hooks are now; then again, up to its last latent, with one constant latent at every step, the
    first that any input fed; half a batch is repeated. `forwards_needed` says what that costs.

    Pairs whose sources are their bases after an edit that takes nothing from another input
    (`pairs.do(il.BlurImage(2.0))`, say) are tested by whether a base finds its own source;
    others, and lists, by whether an input's nearest neighbour shares its label.

    Args:
        at, site: which states; `site="hook_latent"` are the latents as they were fed back.
        labels: one per input (of pairs: the bases', then the sources'), or a function of the
            example; None where it is not known. If left out, the answers.
        groups: one per input or per pair; if left out, those of the pairs, or each example's own
            "group". Without any, a pair is a group.
        latents: `il.Force(k)` makes every run emit k latents.

    Raises:
        InputError: there are fewer than 3 distinct inputs, or fewer than 3 have such states.

    >>> import imaginelens as il
    >>> lens = il.load("latent-content")
    >>> il.input_dependence(lens, lens.task(n=24, seed=0)).finding
    'tells inputs apart'
    """
    _check_call(lens, at, site, batch_size, permutations)
    found = inputs_of(inputs, labels, groups)
    n = len(found.examples)
    if n - len(found.edited) < FEWEST:
        raise InputError(
            f"{n - len(found.edited)} distinct inputs came, and {FEWEST} are needed to compare "
            "any; use more inputs"
        )
    runs = Collector(lens, at, site, max_new_tokens, latents).collect(found, batch_size)
    if not runs.mask.any():
        raise InputError(
            f"none of {n} inputs has a state of {site} at {at!r} ({'; '.join(runs.triggers)}); "
            "look at lens.run(...).text, or pass latents=il.Force(k, at=0) to have latents emitted"
        )
    provenance = Provenance.of(
        lens, keys=runs.keys, seed=seed, formula=FORMULA, forwards=runs.forwards,
        seconds=runs.seconds,
    )  # fmt: skip
    made = Dependence(
        runs.states,
        runs.mask,
        labels=found.labels,
        groups=found.groups,
        pairs=found.pairs,
        twins=found.twins,
        baselines=runs.baselines,
        sham=runs.sham,
        label="answer" if labels is None else "label",
        site=site,
        at=repr(at),
        permutations=permutations,
        seed=seed,
        provenance=provenance,
    )
    return replace(made, control=_control(made, runs, found))


def forwards_needed(n_inputs: int, *, new_tokens: int, batch_size: int = 32) -> int:
    """At most how many forwards `input_dependence` makes for distinct inputs that are answered in
    so many tokens, latents included: two generations per batch, and one of the repeated inputs.

    >>> forwards_needed(96, new_tokens=6)
    42
    """
    return (2 * math.ceil(n_inputs / batch_size) + 1) * new_tokens


def _control(made: Dependence, runs: Collected, found: Inputs) -> Dependence | None:
    """The same study of the states under the constant latent, where 3 inputs have any."""
    if runs.control is None or runs.control_mask is None:
        return None
    instances = np.array([i not in found.edited for i in range(len(found.examples))])
    if (runs.control_mask.any(1) & instances).sum() < FEWEST:
        return None
    return replace(made, states=runs.control, mask=runs.control_mask, baselines=(), sham=None)


def _check_call(
    lens: LatentModel, at: Positions, site: str, batch_size: int, permutations: int
) -> None:
    check_arguments(at=at)
    sites = lens.registry.match(site)  # an unknown site is refused with the nearest names
    if site not in lens.registry:
        raise InputError(f"site is {site!r}, which selects {len(sites)} sites; name one of them")
    if site == "hook_latent" and not isinstance(at, LatentPositions):
        raise InputError(
            f"hook_latent holds latents, and at is {at!r}; select with il.latent, or choose "
            "another site, such as 'ln_final.hook_normalized'"
        )
    if site == "hook_latent" and lens.spec is None:
        raise InputError(
            f"{type(lens.model).__name__} has no latent family, so it feeds nothing back; pass "
            "spec=il.LatentSpec(...) to it, or choose another site and at="
        )
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; run at least 1 input at a time")
    if permutations < 20:
        raise InputError(f"{permutations} permutations cannot give a p-value below 0.05; use 1000")
