"""How steps move steps: the powers of a planted chain, and nothing where a loop has no memory."""

import numpy as np
import planted
import pytest
from planted import CHAIN_A, Planted

import imaginelens as il
from imaginelens.mediation.step_influence import step_influence

XS0, XS1 = (0.25, -0.5, 0.125, 0.75), (1.5, 0.8, 2.0, 1.0)


def made(kind: str) -> Planted:
    return planted.planted(kind, xs0=XS0, xs1=XS1)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_a_chain_moves_by_powers_of_its_matrix(direction: str) -> None:
    p = made("chain")
    found = step_influence(p.lens, p.pairs, direction=direction, batch_size=3)
    own, given = p.latents(p.x0), p.latents(p.x1)
    if direction == "noise":
        own, given = given, own
    for s in range(3):
        for t in range(3):
            moved = (given - own)[:, s] @ np.linalg.matrix_power(CHAIN_A, max(t - s, 0)).T
            wanted = np.linalg.norm(moved, axis=1) / np.linalg.norm(own[:, t], axis=1)
            if t < s:
                assert not found.change[s, t].any()
            else:
                assert np.allclose(found.change[s, t], wanted, rtol=0, atol=1e-12)
                assert wanted.min() > 0.05
    for context, effects in (("free", found.free), ("fixed", found.fixed)):
        truth = p.truth[f"single_{context}_{direction}"]
        assert np.allclose(effects.effect, truth.T, rtol=0, atol=1e-12)
        assert effects.context == context
        assert effects.sham is not None
        assert effects.sham.shape == (len(p.pairs),)
        assert not effects.sham.any()
    assert np.abs(found.free.effect - found.fixed.effect)[:2].min() > 0.01
    assert not (found.free.effect - found.fixed.effect)[2].any()


def test_steps_that_do_not_read_each_other_do_not_move() -> None:
    """Both latents of the gate are x, whatever was fed before."""
    p = made("and_gate")
    found = step_influence(p.lens, p.pairs)
    assert not found.change[0, 1].any()
    assert not found.change[1, 0].any()
    assert (found.change[[0, 1], [0, 1]] > 0.1).all()
    assert not found.free.effect.any()  # of a gate, one input alone


def test_steps_of_the_masked_chain_move_and_nobody_reads_them() -> None:
    p = made("masked")
    found = step_influence(p.lens, p.pairs)
    assert (found.change[0, 1:] > 0.05).all()
    assert not found.free.effect.any()


def test_what_it_says() -> None:
    p = made("chain")
    found = step_influence(p.lens, p.pairs)
    assert found.at(replaced=0, moved=2).value == pytest.approx(found.mean[0, 2])
    assert str(found).startswith("StepInfluence: 3 steps, 4 examples")
    for step in (3, -1):
        with pytest.raises(il.InputError, match="from 0 to 2"):
            found.at(replaced=0, moved=step)
    alike = il.Pairs(p.pairs.base, p.pairs.base, ["A"] * 4, ["B"] * 4)
    with pytest.raises(il.EditTouchedNothing, match="changed nothing"):
        step_influence(p.lens, alike)


def test_examples_whose_steps_are_the_same_are_missing_and_not_zero() -> None:
    p = planted.planted("chain", xs0=(0.25, 0.5), xs1=(0.25, 1.5))
    found = step_influence(p.lens, p.pairs)
    assert np.isnan(found.change[:, :, 0]).all()
    assert not found.free.effect[:, 0].any()
    assert np.allclose(found.mean, found.change[:, :, 1])
