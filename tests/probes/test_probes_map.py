"""probe_map: exact folds without refitting, its controls, and a test that random labels pass."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestCentroid

import imaginelens as il
from imaginelens.hooks.errors import CheckpointError, InputError
from imaginelens.probes import mapping
from imaginelens.probes.closed_form import (
    PENALTIES,
    gram,
    left_out,
    nearest_mean,
    nested_ridge,
    scale,
)
from imaginelens.probes.fitting import fit_probe
from imaginelens.probes.map_result import ProbeMap
from imaginelens.probes.map_tests import adjusted, pvalues
from imaginelens.probes.mapping import probe_map
from imaginelens.probes.splitting import folds
from imaginelens.probes.states import States


def states(n: int = 120, steps: int = 2, seed: int = 0, **given: object) -> States:
    """A class of three that shows at the last step only, more so at the second layer."""
    rng = np.random.default_rng(seed)
    kinds = np.arange(n) % 3
    x = rng.normal(size=(n, steps, 2, 30))
    x[:, -1, :, 0] += 2.0 * (kinds == 0)[:, None]
    x[:, -1, 1, 1] += 3.0 * (kinds == 1)
    names = [("cat", "dog", "owl")[k] for k in kinds]
    return States.of(x, names, label="animal", **given)


# ---- closed forms against refitting ------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(60, 200), (60, 5), (31, 31)])
@pytest.mark.parametrize("penalty", [1e-3, 1.0, 30.0])
def test_left_out_predictions_are_those_of_refitted_ridge(n: int, d: int, penalty: float) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, d)) + 5, rng.normal(size=(n, 3))
    fold = rng.permutation(n) % 5
    products = gram(torch.tensor(x))
    found = left_out(products, torch.tensor(y), torch.tensor(fold), penalty=penalty)
    for k in range(5):
        refitted = Ridge(penalty).fit(x[fold != k], y[fold != k]).predict(x[fold == k])
        np.testing.assert_allclose(found.numpy()[fold == k], refitted, atol=1e-8)


@pytest.mark.parametrize("d", [4, 150])
def test_nested_choice_and_predictions_are_those_of_literal_refitting(d: int) -> None:
    rng = np.random.default_rng(1)
    n, k = 75, 5
    x, fold = rng.normal(size=(n, d)), rng.permutation(n) % k
    y = np.stack([x[:, 0] + rng.normal(size=n), rng.normal(size=n)], 1)
    products = gram(torch.tensor(x))
    found = nested_ridge(
        products,
        torch.tensor(y)[:, None],
        torch.tensor(fold),
        lambda predicted, rows, part: (predicted[:, 0] - torch.tensor(y)[rows][:, part]) ** 2,
    )
    alphas = [p * scale(products) for p in PENALTIES]

    def error(alpha: float, train: np.ndarray, test: np.ndarray, column: int) -> np.ndarray:
        fitted = Ridge(alpha).fit(x[train], y[train, column])
        return np.asarray((fitted.predict(x[test]) - y[test, column]) ** 2)

    for column in range(2):
        for f in range(k):
            others = [g for g in range(k) if g != f]
            inner = [
                sum(error(a, (fold != f) & (fold != g), fold == g, column).sum() for g in others)
                for a in alphas
            ]
            assert int(found.chosen[f, column]) == int(np.argmin(inner))
            refitted = error(alphas[np.argmin(inner)], fold != f, fold == f, column)
            np.testing.assert_allclose(found.loss.numpy()[fold == f, column], refitted, atol=1e-8)


def test_nearest_mean_is_that_of_refitted_centroids() -> None:
    rng = np.random.default_rng(2)
    n, classes = 90, 3
    y, fold = rng.integers(0, classes, n), rng.permutation(n) % 5
    x = rng.normal(size=(n, 40)) + 3 + np.eye(classes, 40)[y]
    columns = torch.nn.functional.one_hot(torch.tensor(y), classes).double()[..., None]
    found = nearest_mean(gram(torch.tensor(x)), columns, torch.tensor(fold)).argmax(1)[:, 0]
    for k in range(5):
        refitted = NearestCentroid().fit(x[fold != k], y[fold != k]).predict(x[fold == k])
        assert (found.numpy()[fold == k] == refitted).all()


def test_single_precision_states_give_the_same_map_but_for_rounding() -> None:
    given = states()
    small = States.of(given.cells.values.astype(np.float32), list(given.labels))
    assert np.abs(probe_map(given).accuracy - probe_map(small).accuracy).max() <= 1 / 120


def test_equal_states_are_no_better_than_chance() -> None:
    """All predictions tie, and a tie must not count as a hit for every class."""
    flat = States.of(np.ones((60, 1, 4)), list("ab" * 30))
    for kind in ("ridge", "mass_mean"):
        found = probe_map(flat, kind=kind, permutations=20)
        assert found.accuracy[0, 0] <= 0.5
        assert found.p[0, 0] > 0.3


# ---- the map -----------------------------------------------------------------------------------


def test_a_map_finds_the_cells_that_hold_the_label_and_no_other() -> None:
    found = probe_map(states())
    assert found.decodable().tolist() == [[False, False], [True, True]]
    assert found.accuracy[1, 1] > found.accuracy[1, 0] > 0.5
    assert np.abs(found.controls["shuffled labels"] - 1 / 3).max() < 0.03
    assert (found.controls["random features"] < 0.5).all()
    np.testing.assert_allclose(found.selectivity, found.accuracy - found.controls["control task"])
    assert found.selectivity[1, 1] > 0.2
    said = found.summary()
    assert "decodable at 2 of 4 cells" in said
    assert "takes a causal test" in said
    assert "layer 1" in repr(found)
    assert "*" in repr(found)


def test_a_cell_is_the_estimate_of_refitted_probes() -> None:
    """Its accuracy is that of scikit-learn's ridge, fitted fold by fold with its penalties."""
    given = states()
    found, cell = probe_map(given), given.cell(step=1, site=1)
    fold = folds(cell.y, n_folds=5, seed=0)
    assert found.penalties is not None
    unit = scale(gram(torch.tensor(cell.x)))
    names = np.unique(cell.y)
    columns = (cell.y[:, None] == names).astype(float)
    right = np.empty(len(cell.y))
    for k in range(5):
        alpha = found.penalties[1, 1, k] * unit
        fitted = Ridge(alpha).fit(cell.x[fold != k], columns[fold != k])
        right[fold == k] = names[fitted.predict(cell.x[fold == k]).argmax(1)] == cell.y[fold == k]
    np.testing.assert_array_equal(found.scores[1, 1], right)
    estimate = found.estimate(step=1, site="layer 1")
    assert estimate.value == right.mean()
    assert estimate.null == pytest.approx(1 / 3)
    assert found.low[1, 1] == estimate.ci().low
    over = found.estimate(step=1, site=1, over="random features")
    assert over.value == pytest.approx(
        found.accuracy[1, 1] - found.controls["random features"][1, 1]
    )
    assert over.pvalue() < 0.001


def test_quantities_are_read_by_squared_error() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 2, 1, 10))
    sizes = 1000 + 50 * x[:, 1, 0, 0] + 25 * rng.normal(size=100)
    found = probe_map(States.of(x, sizes.tolist(), label="size"))
    assert found.decodable()[:, 0].tolist() == [False, True]
    assert found.accuracy[1, 0] == pytest.approx(0.8, abs=0.08)  # 50^2 / (50^2 + 25^2)
    estimate = found.estimate(step=1)
    assert estimate.value == pytest.approx(found.accuracy[1, 0])
    assert "R^2 of size" in repr(estimate)
    with pytest.raises(InputError, match="no map by 'mass_mean' of quantities"):
        probe_map(States.of(x, sizes.tolist()), kind="mass_mean")


def test_groups_are_kept_whole_and_change_places_whole() -> None:
    """Every group is one image, and all of an image's rows are equal: only groups count."""
    rng = np.random.default_rng(0)
    images = np.repeat(np.arange(30), 4)
    x = rng.normal(size=(30, 1, 1, 200))[images]
    labels = (np.arange(30) % 2)[images].tolist()
    leaky = probe_map(States.of(x, labels))
    whole = probe_map(States.of(x, labels, groups=images.tolist()))
    assert leaky.accuracy[0, 0] > 0.9  # what groups are for
    assert whole.accuracy[0, 0] < 0.75
    assert whole.p[0, 0] > 0.05
    assert whole.estimate(step=0).groups is not None


def test_groups_that_have_one_of_each_class_are_permuted_inside() -> None:
    rng = np.random.default_rng(0)
    kinds = np.tile([0, 1], 40)
    x = rng.normal(size=(80, 1, 1, 10))
    x[:, 0, 0, 0] += 3 * kinds
    pairs = np.repeat(np.arange(40), 2).tolist()
    found = probe_map(States.of(x, kinds.tolist(), groups=pairs))
    assert found.controls["shuffled labels"][0, 0] == pytest.approx(0.5, abs=0.03)
    assert found.decodable().all()


def test_steps_that_cannot_be_probed_are_noted_and_left_out() -> None:
    given = states(steps=3)
    mask = np.ones((120, 3), bool)
    mask[3:, 1] = False
    ragged = States.of(given.cells.values, list(given.labels), mask=mask)
    found = probe_map(ragged, permutations=20)
    assert np.isnan(found.accuracy[1]).all()
    assert not np.isnan(found.accuracy[[0, 2]]).any()
    assert found.notes[0].startswith("step 1: 3 examples have step 1")
    assert not found.decodable()[1].any()
    assert "note: step 1" in repr(found)
    with pytest.raises(InputError, match="step 1 was not probed"):
        found.estimate(step=1)


def test_controls_of_the_states_are_read_in_the_same_folds() -> None:
    given = states()
    pixels = np.random.default_rng(1).normal(size=(120, 1, 1, 7))
    raw = States.of(pixels, list(given.labels))
    model = States.of(given.cells.values[..., ::-1] * 0 + 1.0, list(given.labels))
    both = States(
        given.cells,
        given.mask,
        given.sites,
        given.labels,
        controls={"raw input": raw, "random model": model},
    )
    found = probe_map(both, permutations=20)
    alone = probe_map(raw, permutations=20)
    np.testing.assert_array_equal(found.control_scores["raw input"][1, 1], alone.scores[0, 0])
    assert (found.controls["random model"] <= 0.4).all()
    assert found.estimate(step=1, site=1, over="raw input").value > 0.2
    off = probe_map(both, controls=False, permutations=20)
    assert not off.controls
    np.testing.assert_array_equal(off.accuracy, found.accuracy)
    with pytest.raises(InputError, match="no control 'control task'"):
        assert off.selectivity.size


def test_the_summary_says_from_what_else_it_is_read() -> None:
    given = states()
    double = States.of(given.cells.values + 0.01, list(given.labels))
    both = States(
        given.cells, given.mask, given.sites, given.labels, controls={"raw input": double}
    )
    assert "read as well from raw input" in probe_map(both, permutations=20).summary()
    assert "read as well" not in probe_map(given, permutations=20).summary()


def test_the_control_task_gives_equal_content_equal_labels() -> None:
    """40 contents, each three times: a probe that memorises them does the control task, too."""
    rng = np.random.default_rng(0)
    content = np.tile(np.arange(40), 3)
    x = 3 * rng.normal(size=(40, 1, 1, 100))[content] + rng.normal(size=(120, 1, 1, 100))
    labels = (content % 2).tolist()
    base = States.of(x, labels)
    keyed = States(base.cells, base.mask, base.sites, base.labels, keys=tuple(map(str, content)))
    found = probe_map(keyed)
    assert found.accuracy[0, 0] > 0.9
    assert found.controls["control task"][0, 0] > 0.9
    assert found.selectivity[0, 0] < 0.1
    assert probe_map(base).selectivity[0, 0] > 0.3


# ---- the test ----------------------------------------------------------------------------------


def test_one_cell_has_the_exact_permutation_p() -> None:
    null = np.array([0.4, 0.5, 0.6, 0.5, 0.3])
    assert pvalues(np.array([0.55]), null[None]).tolist() == [2 / 6]
    assert adjusted(np.array([0.55]), null[None], method="max").tolist() == [2 / 6]
    assert pvalues(np.array([0.5]), np.full((1, 5), 0.5)).tolist() == [1.0]
    assert pvalues(np.array([0.9]), np.full((1, 5), 0.5)).tolist() == [1 / 6]


def test_cells_that_never_vary_do_not_sharpen_others() -> None:
    rng = np.random.default_rng(0)
    null = rng.normal(size=(1, 99))
    dead = np.zeros((50, 99))
    alone = pvalues(np.array([1.5]), null)
    among = pvalues(np.array([1.5, *np.zeros(50)]), np.concatenate([null, dead]))
    assert among[0] == alone[0]


def test_max_adjusted_p_are_never_below_the_cells_own() -> None:
    found = probe_map(states(), adjust="max")
    assert (found.q >= found.p - 1e-12).all()
    assert found.decodable().tolist() == [[False, False], [True, True]]
    assert "chance of any false one" in found.summary()


@pytest.mark.parametrize("kind", ["ridge", "mass_mean"])
def test_random_labels_at_few_rows_in_many_dimensions_are_not_decodable(kind: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 2, 3, 3584)).astype(np.float32) + 20
    found = probe_map(States.of(x, rng.permutation(100) % 2 == 0), kind=kind, permutations=100)
    assert not found.decodable().any()
    assert "not decodable at any of 6 cells" in found.summary()
    train = x[:, 0, 0] - x[:, 0, 0].mean(0)
    assert np.linalg.matrix_rank(train) == 99  # every labelling fits it


@pytest.mark.slow
@pytest.mark.parametrize("d", [2, 3584])
def test_p_of_random_labels_is_uniform(d: int) -> None:
    """300 data sets of 40 to 100 rows. In few dimensions the binomial test rejects too often."""
    rng = np.random.default_rng(3)
    n, found, binomial = 100 if d > 100 else 40, [], []
    for _ in range(300):
        x = rng.normal(size=(n, 1, 1, d)).astype(np.float32)
        made = probe_map(States.of(x, rng.permutation(n) % 2), controls=False, permutations=99)
        found.append(made.p[0, 0])
        binomial.append(made.estimate(step=0).pvalue())
    found = np.array(found)
    for level in (0.05, 0.1, 0.2, 0.5):
        share = (found <= level).mean()
        assert share <= level + 3 * np.sqrt(level * (1 - level) / 300)
        assert share >= 0.5 * level  # hits are whole numbers: ties make it a little smaller
    assert stats.kstest(found, "uniform", alternative="greater").pvalue > 0.01
    assert (np.array(binomial) <= 0.05).mean() > (found <= 0.05).mean()  # why labels are permuted


@pytest.mark.slow
def test_false_discoveries_are_bounded_over_a_map() -> None:
    """60 maps of 24 cells without signal: any finding is false, and BH names one in 5% of them."""
    rng = np.random.default_rng(4)
    any_found = []
    for _ in range(60):
        x = rng.normal(size=(60, 4, 6, 50))
        made = probe_map(States.of(x, rng.permutation(60) % 2), controls=False, permutations=100)
        any_found.append(made.decodable().any())
    assert np.mean(any_found) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 60)


# ---- organisms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["latent-content", "latent-pointer"])
def test_name_and_shape_decode_from_pointer_and_content_alike(name: str) -> None:
    """So decoding cannot tell their mechanisms apart, and the summary does not try."""
    lens = il.load(name)
    task = lens.task(n=150, seed=0)
    latents = lens.run(task.base).latents.float().cpu().numpy()
    hunts = [example["hunt"] for example in task.base]
    cards = [[h.path[min(t + 1, h.hops)] for t in range(latents.shape[1])] for h in hunts]
    shapes = [[h.shape_of(c) for c in row] for h, row in zip(hunts, cards, strict=True)]
    for label, values in (("name", cards), ("shape", shapes)):
        found = probe_map(States.of(latents, values, label=label))
        assert found.decodable().any(), found
        assert "causal test" in found.summary()


# ---- kept, told, refused -----------------------------------------------------------------------


def test_a_saved_map_is_the_map(tmp_path: Path) -> None:
    found = probe_map(states(groups=(np.arange(120) // 2).tolist()), permutations=20)
    found.save(tmp_path / "map")
    again = ProbeMap.load(tmp_path / "map")
    assert repr(again) == repr(found)
    assert again.summary() == found.summary()
    np.testing.assert_array_equal(again.scores, found.scores)
    assert again.to_dataframe().equals(found.to_dataframe())
    with pytest.raises(InputError, match=r"holds map\.json already; choose another folder"):
        found.save(tmp_path / "map")
    other = probe_map(states(groups=(np.arange(120) // 2).tolist()), permutations=21)
    other.save(tmp_path / "other")
    (tmp_path / "other" / "map.safetensors").replace(tmp_path / "map" / "map.safetensors")
    with pytest.raises(CheckpointError, match="do not belong together"):
        ProbeMap.load(tmp_path / "map")
    (tmp_path / "map" / "map.json").write_text(json.dumps({"version": 1}))
    with pytest.raises(CheckpointError, match="no probe map"):
        ProbeMap.load(tmp_path / "map")
    with pytest.raises(CheckpointError, match="no probe map"):
        ProbeMap.load(tmp_path / "elsewhere")


def test_a_frame_has_a_row_per_cell() -> None:
    frame = probe_map(states(), permutations=20).to_dataframe()
    assert len(frame) == 4
    assert list(frame.columns[:7]) == ["step", "site", "layer", "n", "accuracy", "low", "high"]
    assert {"control task", "shuffled labels", "random features", "p", "q"} <= set(frame.columns)
    assert ((frame.low <= frame.accuracy) & (frame.accuracy <= frame.high)).all()


@pytest.mark.parametrize(
    ("given", "told", "match"),
    [
        ({"labels": None}, {}, "no labels"),
        ({"labels": ["a"] * 30}, {}, "all 30 labels are a"),
        ({"labels": [0.5] * 30}, {}, "all 30 labels are 0.5"),
        ({}, {"kind": "forest"}, "no kind 'forest'|no probe 'forest'|forest"),
        ({}, {"n_folds": 2}, "n_folds=2"),
        ({}, {"permutations": 5}, "5 permutations"),
        ({"groups": [0] * 15 + [1] * 15}, {}, "2 groups are too few"),
    ],
)
def test_bad_input_is_one_sentence(given: dict, told: dict, match: str) -> None:
    x = np.random.default_rng(0).normal(size=(30, 1, 1, 4))
    labels = given.pop("labels", list("ab" * 15))
    with pytest.raises(InputError, match=match) as caught:
        probe_map(States.of(x, labels, **given), **told)
    assert str(caught.value).count(". ") == 0


class Torn:
    """States on a disk that has lost them."""

    shape = (30, 1, 1, 4)

    def read(self, step: int, layer: int, rows: np.ndarray) -> np.ndarray:
        return np.full((len(rows), 4), np.nan)


def test_states_that_turn_nan_on_disk_are_refused() -> None:
    made = States(Torn(), np.ones((30, 1), bool), ("layer 0",), np.array(list("ab" * 15), object))
    with pytest.raises(InputError, match="30 of 30 states at step 0"):
        probe_map(made)


def test_a_kind_without_a_closed_form_is_fitted_cell_by_cell() -> None:
    found = probe_map(states(60), kind="lda", permutations=20)
    single = fit_probe(states(60), kind="lda", step=1, site=1, permutations=20)
    np.testing.assert_array_equal(found.scores[1, 1], single.accuracy.values)
    np.testing.assert_array_equal(found.null[1, 1], single.shuffled)
    assert found.accuracy[1, 1] > found.accuracy[0, 0]
    assert set(found.controls) == {"control task", "shuffled labels", "random features"}


def test_the_closed_form_of_mass_mean_is_what_fit_probe_fits() -> None:
    given = states()
    found = probe_map(given, kind="mass_mean", permutations=20)
    for site in (0, 1):
        fitted = fit_probe(given, kind="mass_mean", step=1, site=site, permutations=20)
        np.testing.assert_array_equal(found.scores[1, site], fitted.accuracy.values)


def test_a_long_map_says_so_beforehand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    probe_map(states(), permutations=20)
    assert "min" not in capsys.readouterr().err
    monkeypatch.setattr(mapping, "_TOLD", 0.0)
    probe_map(states(), permutations=20)
    assert "probe_map: about 0 min" in capsys.readouterr().err


def test_threads_change_nothing_and_leave_nothing_behind() -> None:
    raw = States.of(np.random.default_rng(1).normal(size=(120, 1, 1, 7)))
    base = states()
    both = States(base.cells, base.mask, base.sites, base.labels, controls={"raw input": raw})
    before = torch.get_num_threads()
    alone = probe_map(both, permutations=20)
    torch.set_num_threads(3)
    try:
        shared = probe_map(both, permutations=20)
        assert torch.get_num_threads() == 3
        broken = States(Torn(), np.ones((30, 1), bool), ("x",), np.array(list("ab" * 15), object))
        with pytest.raises(InputError, match="nan or infinite"):
            probe_map(broken, permutations=20)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(alone.scores, shared.scores)
    np.testing.assert_array_equal(alone.null, shared.null)
    for name, found in alone.control_scores.items():
        np.testing.assert_array_equal(found, shared.control_scores[name])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["ridge", "mass_mean"])
def test_a_map_on_a_gpu_is_the_same(kind: str) -> None:
    here, there = (probe_map(states(), kind=kind, device=device) for device in ("cpu", "cuda"))
    np.testing.assert_array_equal(here.scores, there.scores)
    np.testing.assert_allclose(here.null, there.null, atol=1 / 120)


def test_a_control_that_is_the_same_states_is_no_control() -> None:
    """A dummy is the state itself at step 0, before it is fed."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 30)
    values = rng.normal(size=(60, 2, 1, 8)) + 3 * y[:, None, None, None]
    others = values.copy()
    others[:, 1] = rng.normal(size=(60, 1, 8))
    states = replace(States.of(values, y), controls={"dummy": States.of(others, y)})
    found = probe_map(states)
    assert np.isnan(found.controls["dummy"][0, 0])
    assert found.controls["dummy"][1, 0] < 0.8
    assert "as well from" not in found.summary()
