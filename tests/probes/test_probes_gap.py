"""The decodability gap: paired by example, with intervals, and no word on mechanisms."""

import numpy as np
import pytest

from imaginelens.estimates import Estimate
from imaginelens.hooks.errors import InputError
from imaginelens.probes.gap import decodability_gap
from imaginelens.probes.mapping import probe_map
from imaginelens.probes.states import States

KINDS = np.arange(120) % 3


def planted(shifts: list[float], seed: int, labels: list | None = None, **given: object) -> States:
    """Three classes that lie so far apart at each step."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(120, len(shifts), 2, 12))
    for step, shift in enumerate(shifts):
        x[:, step] += shift * np.eye(3, 12)[KINDS][:, None]
    return States.of(x, labels or KINDS.tolist(), label="kind", **given)


def test_the_gap_is_paired_accuracy_at_the_answer_minus_at_the_latent() -> None:
    latents, answers = planted([0.0, 4.0], 0), planted([4.0], 1)
    gap = decodability_gap(latents, answers, permutations=20)
    maps = [probe_map(s, controls=False, permutations=20) for s in (latents, answers)]
    np.testing.assert_allclose(gap.value, maps[1].accuracy - maps[0].accuracy)
    cell = gap.estimate(step=0, site="layer 1")
    same = Estimate.paired(maps[1].scores[0, 1], maps[0].scores[0, 1])
    np.testing.assert_array_equal(cell.values, same.values)
    assert cell.pvalue() == same.pvalue() == gap.p[0, 1]
    assert gap.low[0, 1] == same.ci().low
    assert gap.differs().tolist() == [[True, True], [False, False]]
    assert (gap.q >= gap.p).all()


def test_the_gap_is_negative_where_the_answer_has_lost_it() -> None:
    gap = decodability_gap(planted([4.0], 0), planted([0.0], 1), permutations=20)
    assert (gap.high < 0).all()
    said = gap.summary()
    assert "less in 2" in said
    assert "needs a causal test" in said


def test_two_noises_have_no_gap() -> None:
    found = [
        decodability_gap(planted([0.0] * 4, 2 * k), planted([0.0], 2 * k + 1), permutations=20)
        for k in range(4)
    ]
    assert sum(gap.differs().any() for gap in found) <= 1


def test_one_answer_site_serves_all_layers() -> None:
    answers = planted([4.0], 1)
    one = States.of(answers.cells.values[:, :, :1], KINDS.tolist(), sites=["blocks.7"])
    gap = decodability_gap(planted([0.0], 0), one, permutations=20)
    assert gap.value.shape == (1, 2)
    assert gap.to_dataframe().answer.nunique() == 1


def test_quantities_have_a_gap_of_shares_of_error() -> None:
    rng = np.random.default_rng(0)
    y = rng.normal(size=100)
    noise = rng.normal(size=(2, 100, 1, 1, 5))
    noise[1, :, 0, 0, 0] = y + 0.1 * rng.normal(size=100)
    gap = decodability_gap(*(States.of(each, y.tolist()) for each in noise), permutations=20)
    assert gap.value[0, 0] == pytest.approx(1, abs=0.1)
    assert "R^2" in repr(gap)


def test_a_frame_and_a_table() -> None:
    gap = decodability_gap(planted([0.0, 4.0], 0), planted([4.0], 1), permutations=20)
    frame = gap.to_dataframe()
    np.testing.assert_allclose(frame.gap, frame.answer - frame.latent)
    assert repr(gap).count("*") == 3  # two cells, and the heading that says what a star is
    assert "layer 1" in repr(gap)


@pytest.mark.parametrize(
    ("answers", "match"),
    [
        (lambda: States.of(np.zeros((60, 1, 2, 12)), [0, 1] * 30), "60 answers"),
        (lambda: planted([0.0, 0.0], 1), "answers have 2 steps"),
        (lambda: planted([0.0], 1, sites=["a", "b"]), "lack the sites"),
        (lambda: planted([0.0], 1, labels=[0, 1] * 60), "different labels"),
        (lambda: planted([0.0], 1, groups=list(range(60)) * 2), "different groups"),
    ],
)
def test_states_that_cannot_be_paired_are_refused(answers: object, match: str) -> None:
    with pytest.raises(InputError, match=match):
        decodability_gap(planted([0.0], 0), answers(), permutations=20)
