"""Erasing: closed forms, the published implementation, and where each method fails."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from imaginelens.hooks.errors import CheckpointError, InputError
from imaginelens.probes.erasing import Eraser, erase
from imaginelens.probes.states import States

N, WIDTH = 600, 12
UNCHECKED: Any = getattr(erase, "__wrapped__", erase)  # for arguments of a wrong type


def drawn(
    n: int = N, classes: int = 4, width: int = WIDTH, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Classes that shift the mean of anisotropic, correlated states."""
    draw = np.random.default_rng(seed)
    shape = np.random.default_rng(99)  # of all samples
    mixing = shape.normal(size=(width, width)) * np.geomspace(3, 0.1, width)
    means = shape.normal(size=(classes, width))
    y = draw.integers(classes, size=n)
    return draw.normal(size=(n, width)) @ mixing + means[y] + 5, y


def one_hot(y: np.ndarray) -> np.ndarray:
    return (y[:, None] == np.unique(y)[None]).astype(float)


def cross_covariance(x: np.ndarray, z: np.ndarray) -> float:
    """The largest, in units of what the states' and the concept's spreads allow."""
    x, z = x - x.mean(0), z - z.mean(0)
    return float(np.abs(x.T @ z / len(x)).max() / (x.std() * z.std()))


def majority(y: np.ndarray) -> float:
    return float(np.unique(y, return_counts=True)[1].max() / len(y))


def refit(x: np.ndarray, y: np.ndarray) -> float:
    """Accuracy of a logistic probe on the states that it was fitted on."""
    from sklearn.linear_model import LogisticRegression

    return float(LogisticRegression(max_iter=2000).fit(x / x.std(), y).score(x / x.std(), y))


# --- LEACE ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 9])
def test_leace_leaves_no_covariance_and_a_refit_probe_at_majority(classes: int) -> None:
    x, y = drawn(classes=classes)
    eraser = erase(x, y)
    erased = eraser.transform(x)
    assert cross_covariance(x, one_hot(y)) > 0.05
    assert cross_covariance(erased, one_hot(y)) < 1e-8
    assert refit(x, y) > majority(y) + 0.1
    assert refit(erased, y) == pytest.approx(majority(y))
    assert eraser.rank == (classes - 1,)
    np.testing.assert_allclose(erased.mean(0), x.mean(0), atol=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of concept-erasure
@pytest.mark.parametrize("classes", [2, 5])
def test_leace_is_the_published_one(classes: int) -> None:
    from concept_erasure import LeaceEraser

    x, y = drawn(classes=classes)
    z = torch.tensor(one_hot(y) if classes > 2 else y[:, None].astype(float))
    theirs = LeaceEraser.fit(
        torch.tensor(x), z, shrinkage=False, constrain_cov_trace=False, svd_tol=1e-8
    )
    ours = erase(x, y)
    np.testing.assert_allclose(ours.projection[0], theirs.P.numpy(), atol=1e-8)
    np.testing.assert_allclose(ours.transform(x), theirs(torch.tensor(x)).numpy(), atol=1e-8)


def test_leace_is_the_formula_it_claims() -> None:
    """P = I - W^+ P_{W S_xz} W with W the inverse root of the covariance, all written out."""
    x, y = drawn()
    xc, z = x - x.mean(0), one_hot(y) - one_hot(y).mean(0)
    values, vectors = np.linalg.eigh(xc.T @ xc / N)
    w = vectors * values**-0.5 @ vectors.T
    columns = np.linalg.svd(w @ (xc.T @ z / N))[0][:, :3]
    p = np.eye(WIDTH) - np.linalg.inv(w) @ columns @ columns.T @ w
    np.testing.assert_allclose(erase(x, y).projection[0], p, atol=1e-9)


def test_leace_does_not_depend_on_the_coordinates_and_the_mean_projection_does() -> None:
    x, y = drawn()
    draw = np.random.default_rng(1)
    turn, shift = draw.normal(size=(WIDTH, WIDTH)), draw.normal(size=WIDTH)

    def gap(method: Any) -> float:
        then = erase(x, y, method=method).transform(x) @ turn + shift
        first = erase(x @ turn + shift, y, method=method).transform(x @ turn + shift)
        return float(np.abs(then - first).max())

    assert gap("leace") < 1e-8
    assert gap("mean") > 0.1


def test_leace_changes_states_least() -> None:
    x, y = drawn()
    moved = {m: np.sum((erase(x, y, method=m).transform(x) - x) ** 2) for m in ("leace", "mean")}
    moved["inlp"] = np.sum((erase(x, y, method="inlp").transform(x) - x) ** 2)
    assert moved["leace"] < min(moved["mean"], moved["inlp"])


def test_where_states_are_white_leace_is_the_mean_projection() -> None:
    x, y = drawn()
    u, _, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
    white = u @ vt * 10
    leace, mean = (erase(white, y, method=m) for m in ("leace", "mean"))
    np.testing.assert_allclose(leace.projection, mean.projection, atol=1e-9)


def test_fewer_examples_than_dimensions() -> None:
    """What lies outside the span of the examples stays; inside, nothing is left."""
    x, y = drawn(n=40, width=100)
    eraser = erase(x, y)
    assert cross_covariance(eraser.transform(x), one_hot(y)) < 1e-8
    outside = np.linalg.svd(x - x.mean(0))[2][-1]
    np.testing.assert_allclose(eraser.projection[0] @ outside, outside, atol=1e-9)


def test_a_quantity_is_erased() -> None:
    x, _ = drawn()
    y = x @ np.linspace(-1, 1, WIDTH) + np.random.default_rng(3).normal(size=N)
    eraser = erase(x, y)
    assert eraser.rank == (1,)
    assert cross_covariance(eraser.transform(x), y[:, None]) < 1e-8
    with pytest.raises(InputError, match="is a quantity, and 'inlp' needs classes"):
        erase(x, y, method="inlp")


def test_what_is_not_linear_is_not_erased() -> None:
    """The limit of all three: an exclusive or is read as well as before, though not linearly."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(2000, 20))
    y = (x[:, 0] * x[:, 1] > 0).astype(int)
    erased = erase(x, y).transform(x)
    assert refit(erased, y) == pytest.approx(majority(y))
    product = (erased[:, 0] * erased[:, 1])[:, None]
    assert refit(product, y) > 0.9


# --- the projections ------------------------------------------------------------------------------


def test_the_mean_projection_makes_class_means_equal() -> None:
    x, y = drawn()
    eraser = erase(x, y, method="mean")
    erased, p = eraser.transform(x), eraser.projection[0]
    for k in np.unique(y):
        np.testing.assert_allclose(erased[y == k].mean(0), x.mean(0), atol=1e-10)
    np.testing.assert_allclose(p, p.T, atol=1e-12)
    np.testing.assert_allclose(p @ p, p, atol=1e-12)


def test_inlp_goes_on_until_a_probe_reads_nothing() -> None:
    x, y = drawn(classes=2)
    one, all_rounds = (erase(x, y, method="inlp", rounds=k) for k in (1, 20))
    p = all_rounds.projection[0]
    np.testing.assert_allclose(p @ p, p, atol=1e-12)
    assert one.rank == (1,)
    assert 1 < all_rounds.rank[0] < WIDTH
    after = all_rounds.leaves(States.of(x, y), step=0)
    assert refit(x, y) > 0.9
    assert after.value < majority(y) + 0.1


def test_inlp_finds_nothing_in_random_labels() -> None:
    x, _ = drawn()
    y = np.random.default_rng(7).integers(2, size=N)
    with pytest.raises(InputError, match="nothing to erase of label at step 0: inlp finds no"):
        erase(x, y, method="inlp")


# --- examples that were not seen ------------------------------------------------------------------


def test_a_rest_remains_in_others_when_learned_from_few() -> None:
    """Erased by 60 examples, a probe of other states still reads the concept; by 5,000, hardly."""
    others = States.of(*drawn(n=1000, seed=1))
    few = erase(*drawn(n=60, seed=2)).leaves(others, step=0)
    many = erase(*drawn(n=5000, seed=2)).leaves(others, step=0)
    assert few.pvalue() < 0.05
    assert few.value > few.null + 0.05  # type: ignore[operator]
    assert many.value < few.value - 0.05
    assert many.value < many.null + 0.05  # type: ignore[operator]


# --- steps ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def states() -> States:
    """Two steps with labels of their own; a third of the examples has no second one."""
    x, y = zip(*(drawn(seed=step) for step in (0, 1)), strict=True)
    mask = np.ones((N, 2), bool)
    mask[::3, 1] = False
    labels = [
        [f"card {a}", f"card {b}" if m else None] for a, b, (_, m) in zip(*y, mask, strict=True)
    ]
    groups = [f"image {i // 2}" for i in range(N)]
    return States.of(np.stack(x, 1), labels, mask=mask, groups=groups, label="card")


def test_each_step_is_erased_by_itself(states: States) -> None:
    eraser = erase(states)
    assert [e.n for e in eraser.active.values()] == [N, N - N // 3]
    for step in (0, 1):
        cell = states.cell(step=step)
        assert cell.y is not None
        alone = erase(cell.x, cell.y)
        np.testing.assert_allclose(eraser.projection[step], alone.projection[0], atol=1e-10)
        np.testing.assert_allclose(eraser.mean[step], cell.x.mean(0), atol=1e-12)
    x = states.cells.read(0, 0, np.arange(N)), states.cells.read(1, 0, np.arange(N))
    whole = eraser.transform(np.stack(x, 1))
    np.testing.assert_array_equal(whole[:, 1], eraser.transform(x[1], step=1))
    assert eraser.groups == {f"image {i}" for i in range(N // 2)}


def test_other_steps_can_be_left_alone(states: States) -> None:
    eraser = erase(states).only(1)
    x = np.random.default_rng(0).normal(size=(3, 2, WIDTH))
    changed = eraser.transform(x)
    np.testing.assert_array_equal(changed[:, 0], x[:, 0])
    assert (changed[:, 1] != x[:, 1]).any()
    assert eraser.rank == (0, 3)
    np.testing.assert_array_equal(eraser.projection[0], np.eye(WIDTH))
    learned = erase(states, steps=[1])
    np.testing.assert_array_equal(learned.projection, eraser.projection)


def test_random_subspaces_have_the_same_rank_and_mean(states: States) -> None:
    eraser = erase(states).only(1)
    one, again, other = eraser.random(3), eraser.random(3), eraser.random(4)
    assert one.rank == eraser.rank
    np.testing.assert_array_equal(one.mean, eraser.mean)
    np.testing.assert_array_equal(one.projection, again.projection)
    assert np.abs(one.projection - other.projection).max() > 0.1
    p = one.projection[1]
    np.testing.assert_allclose([np.trace(p), np.abs(p @ p - p).max()], [WIDTH - 3, 0], atol=1e-12)


def test_saved_and_loaded_is_the_same(states: States, tmp_path: Path) -> None:
    eraser = erase(states).only(1)
    again = Eraser.load(eraser.save(tmp_path / "card"))
    x = np.random.default_rng(0).normal(size=(3, 2, WIDTH))
    np.testing.assert_array_equal(again.transform(x), eraser.transform(x))
    assert repr(again) == repr(eraser) == "Eraser(leace, card at layer 0, step 1: 3 of 12, n=400)"
    assert (again.groups, again.keys, again.at) == (eraser.groups, eraser.keys, eraser.at)
    with pytest.raises(InputError, match="holds an eraser already"):
        eraser.save(tmp_path / "card")
    with pytest.raises(InputError, match=r"holds no eraser\.json"):
        Eraser.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"n_steps": -1}, "steps 1 to 1 of -1"),
        ({"n_steps": 10**9}, "steps 1 to 1 of 1000000000"),
        ({"learned_from": {}}, "no numbers"),
        ({"learned_from": {"x": 3}}, "invalid literal"),
        ({"learned_from": {"0": 3}}, "0.mean"),
        ({"method": "other"}, "its method, keys or groups"),
        ({"keys": [[]]}, "its method, keys or groups"),
        ({"site": None}, "it has no site"),
    ],
)
def test_a_changed_card_is_refused(
    states: States, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    home = erase(states).only(1).save(tmp_path / "card")
    card = json.loads((home / "eraser.json").read_text())
    (home / "eraser.json").write_text(json.dumps(card | change))
    with pytest.raises(CheckpointError, match=told):
        Eraser.load(home)


def test_torn_or_wrong_arrays_are_refused(states: States, tmp_path: Path) -> None:
    home = erase(states).only(1).save(tmp_path / "card")
    good = load_file(home / "eraser.safetensors")
    save_file(good | {"1.mean": good["1.mean"] + 1}, home / "eraser.safetensors")
    with pytest.raises(CheckpointError, match="do not belong together"):
        Eraser.load(home)
    card = json.loads((home / "eraser.json").read_text())
    card.pop("digest")  # as older ones were written
    (home / "eraser.json").write_text(json.dumps(card))
    for name, array, told in (
        ("1.left", good["1.left"][:-1], "do not fit"),
        ("1.mean", np.full_like(good["1.mean"], np.nan), "not finite"),
        ("1.right", good["1.right"].astype(int), "do not fit"),
    ):
        save_file(good | {name: array}, home / "eraser.safetensors")
        with pytest.raises(CheckpointError, match=told):
            Eraser.load(home)
    (home / "eraser.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="does not hold an eraser"):
        Eraser.load(home)


# --- what cannot be done --------------------------------------------------------------------------


def wrong(states: States) -> Iterator[tuple[str, Any]]:
    x, y = drawn()
    eraser = erase(states)
    yield "states have no labels; give one", lambda: erase(x)
    yield "all 600 labels at step 0 are 1", lambda: erase(x, np.ones(N, int))
    yield "3 labels came with 600 examples", lambda: erase(x, y[:3])
    yield "no method 'svd' of erasing", lambda: UNCHECKED(x, y, method="svd")
    yield "rounds is 0", lambda: erase(x, y, rounds=0)
    yield "steps is empty", lambda: erase(states, steps=[])
    yield "no step 2 in states of 2 steps", lambda: erase(states, steps=[2])
    yield "nothing to erase of label at step 0: mean", lambda: erase(x * 0, y, method="mean")
    yield "1 states are nan or infinite", lambda: erase(np.where(x == x[0, 0], np.nan, x), y)
    yield r"only\(2,\) asks for steps at which card is not erased", lambda: eraser.only(2)
    yield r"only\(\) asks for steps", lambda: eraser.only()
    yield "knows steps 0 to 1 and the states have a step 2", lambda: eraser.at_step(2)
    yield "the eraser has 2; say which", lambda: eraser.transform(x)
    yield r"shape \(600, 5\) came, expected", lambda: eraser.transform(x[:, :5], step=0)
    quantity = x[:, 0] + 0.5
    yield "reads classes", lambda: erase(x, y).leaves(States.of(x), quantity, step=0)


def test_one_sentence_says_what_is_wrong(states: States) -> None:
    for message, call in wrong(states):
        with pytest.raises(InputError, match=message):
            call()
