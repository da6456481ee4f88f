"""The behavioural probe: right on organisms whose latents answer, and not fooled by the others."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image
from scipy import stats

import imaginelens as il
from imaginelens.estimates import power_effect
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.mixture import Mixture
from imaginelens.organisms.hunt import SHAPES
from imaginelens.probes.behavioural import Arm, Behavioural, behavioural_probe
from imaginelens.probes.questions import (
    Question,
    questions_needed,
    read_questions,
    smallest_difference,
)

CHANCE = 1 / 6


def asked(lens: Any, n: int, **more: Any) -> list[dict[str, Any]]:
    """Hunts with the question itself as the derived one: the only one these models were taught."""
    return [
        {"images": e["images"], "text": e["text"], "probe": e["text"], "answer": e["hunt"].answer}
        | more
        for e in lens.task(n, seed=5).base
    ]


@pytest.fixture(scope="module")
def probes() -> dict[str, Behavioural]:
    """The probe of each organism, on 48 hunts."""
    found = {}
    for name in ("latent-content", "latent-pointer", "latent-ignored", "latent-ignored-aligned"):
        lens = il.load(name)
        found[name] = behavioural_probe(
            lens, asked(lens, 48), chance=CHANCE, batch_size=48, max_new_tokens=6
        )
    return found


# ---- organisms ----------------------------------------------------------------------------------


def test_latents_that_carry_the_answer_give_it_without_the_picture(
    probes: dict[str, Behavioural],
) -> None:
    found = probes["latent-content"]
    assert found["latent"].correct >= 40
    assert found["latent"].pvalue() < 1e-12
    assert found["latent"].ci().low > 0.7
    for other in ("text", "other"):
        assert abs(found[other].correct / 48 - CHANCE) < 0.15
        assert found.compare("latent", other).ci().low > 0.4
    assert found["image"].correct >= 46
    assert "the latents alone answer more than text alone and than other latents" in found.summary()


@pytest.mark.parametrize("name", ["latent-pointer", "latent-ignored", "latent-ignored-aligned"])
def test_latents_that_carry_no_answer_are_not_said_to(
    name: str, probes: dict[str, Behavioural]
) -> None:
    """The ignored ones say nothing. The pointer's are read, but say where to look: the probe cannot
    see that, and its sentence claims no more than it found."""
    found = probes[name]
    assert found["image"].correct >= 46
    assert abs(found.compare().value) < 0.15
    assert found["latent"].ci().high < 0.4
    assert "not shown to answer anything" in found.summary()
    assert "does not show that they carry or do nothing" in found.summary()


def test_on_latent_ignored_the_two_arms_write_the_same(probes: dict[str, Behavioural]) -> None:
    found = probes["latent-ignored"]
    same = np.mean(
        [a == b for a, b in zip(found["latent"].answers, found["text"].answers, strict=True)]
    )
    assert same > 0.8
    assert found.compare().equivalence(margin=0.15).equivalent


def test_a_bare_question_as_the_text_arm_would_be_fooled(probes: dict[str, Behavioural]) -> None:
    """Without a span these models answer nothing, and any latents at all would look better."""
    lens = il.load("latent-ignored")
    bare = lens.run([{"text": q["probe"]} for q in asked(lens, 16)], max_new_tokens=6)
    forced = lens.run(
        [{"text": q["probe"]} for q in asked(lens, 16)], latents=il.Force(2, at=0), max_new_tokens=6
    )
    assert bare.parse_coverage < 0.2
    assert forced.parse_coverage > 0.9
    assert probes["latent-ignored"]["text"].coverage > 0.9


def test_every_injection_landed_on_every_step(probes: dict[str, Behavioural]) -> None:
    for found in probes.values():
        for name in ("latent", "other"):
            cells = [cell for landing in found[name].landings for cell in landing.cells]
            assert len(cells) == 48 * 2
            assert not any(landing.flags for landing in found[name].landings)
        assert found["text"].landings == found["image"].landings == ()
        assert found.steps == (2,) * 48


def test_what_is_fed_is_what_the_original_fed() -> None:
    """By hand: one question at a time, with one Replace each."""
    lens = il.load("latent-content")
    questions = asked(lens, 3)
    found = behavioural_probe(
        lens, questions, arms=("latent", "other"), chance=CHANCE, max_new_tokens=6, seed=1
    )
    runs = [lens.run(images=q["images"], text=q["text"], max_new_tokens=6) for q in questions]
    for i, question in enumerate(questions):
        said = []
        for run in runs:
            with lens.edit(il.Replace(run.latents[0]), at=il.latent[:2]):
                injected = lens.run(
                    text=question["probe"], latents=il.Force(2, at=0), max_new_tokens=6
                )
            said.append(injected.answer)
        assert found["latent"].answers[i] == said[i]
        assert found["other"].answers[i] in [a for j, a in enumerate(said) if j != i]


def test_questions_that_are_not_answered_with_the_picture_either_test_nothing() -> None:
    """These organisms never learned questions without hops."""
    lens = il.load("latent-content")
    questions = [
        {**q, "probe": " ".join(w for w in q["text"].split() if w != "then")}
        for q in asked(lens, 24)
    ]
    found = behavioural_probe(
        lens, questions, chance=CHANCE, batch_size=24, max_new_tokens=6,
        arms=("latent", "text", "image"),
    )  # fmt: skip
    assert found["image"].pvalue() > 0.05
    assert "they test nothing" in found.summary()


# ---- runs of unequal length, and none -----------------------------------------------------------


def test_originals_without_latents_are_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    lens = il.load("latent-content")
    questions = asked(lens, 6)
    own = il.LatentModel.run

    def sometimes(self: Any, inputs: Any = None, **options: Any) -> il.Run:
        """The second and the fifth original never open a span; the third is short by a step."""
        run = own(self, inputs, **options)
        if options.get("latents") is None and inputs is not None and "images" in inputs[0]:
            for row, keep in ((1, 0), (4, 0), (2, 1)):
                run.latent_mask[row, keep:] = False
        return run

    monkeypatch.setattr(il.LatentModel, "run", sometimes)
    found = behavioural_probe(lens, questions, chance=CHANCE, max_new_tokens=6)
    assert found.steps == (2, 0, 1, 2, 0, 2)
    assert np.isnan(found["latent"].right).tolist() == [False, True, False, False, True, False]
    assert np.isnan(found["other"].right).tolist() == [False, True, True, False, True, False]
    assert found["image"].n == 6
    assert found.compare().missing == 2
    assert [len(landing.cells) for landing in found["latent"].landings] == [1, 6]
    assert "2 originals fed no latents" in repr(found)
    assert found.to_dataframe()["right"].isna().sum() == 2 + 2 + 3


@pytest.mark.parametrize(
    "fields",
    [{"trigger": "always", "feeds": Mixture(top_k=3), "fixed": True}, {"slot": "replace"}],
    ids=["always", "replace"],
)
def test_families_that_begin_inside_a_span_or_overwrite_its_token_are_given_all_steps(
    fields: dict[str, Any],
) -> None:
    spec = il.LatentSpec(
        name="test", open="<|latent_start|>", close="<|latent_end|>", pad="<|latent_pad|>",
        max_steps=2, **fields,
    )  # fmt: skip
    lens = il.LatentModel(*tiny.build("qwen2_5_vl"), spec=spec)
    own = lens.run
    if spec.trigger != "always":  # the originals would not open a span by themselves
        force = il.Force(2, at=0)
        lens.run = lambda *a, **k: own(*a, **{"latents": force, **k})  # type: ignore[method-assign]
    questions = [
        {
            "images": tiny.image(40, 24, seed=i), "text": tiny.prompt("qwen2_5_vl", "red?"),
            "probe": "blue?", "answer": "x",
        }
        for i in range(3)
    ]  # fmt: skip
    found = behavioural_probe(
        lens, questions, arms=("latent", "text", "other"), chance=CHANCE, max_new_tokens=6
    )
    assert found.steps == (2, 2, 2)
    for name in ("latent", "other"):
        (landing,) = found[name].landings
        assert sorted(row for row, *_ in landing.cells) == [0, 0, 1, 1, 2, 2]


def test_a_model_that_never_feeds_a_latent_cannot_be_probed() -> None:
    lens = il.load("latent-content")
    own = lens.run
    lens.run = lambda *a, **k: own(*a, **{"latents": il.Skip(), **k})  # type: ignore[method-assign]
    with pytest.raises(InputError, match="none of the 4 original questions"):
        behavioural_probe(lens, asked(lens, 4), chance=CHANCE)


# ---- how many questions -------------------------------------------------------------------------


def test_thirty_questions_cannot_show_less_than_37_points() -> None:
    """The paper's number of questions, at four options."""
    assert smallest_difference(30, chance=0.25) == pytest.approx(0.37, abs=0.011)
    assert smallest_difference(30, chance=0.5) == pytest.approx(0.35, abs=0.011)
    assert questions_needed(difference=0.1) > 300
    d, q = 0.37, 0.25
    discordance = (q + d) * (1 - q) + q * (1 - q - d)
    assert power_effect(30, difference=d, discordance=discordance) >= 0.8
    assert power_effect(30, difference=0.2, discordance=0.45 * 0.75 + 0.25 * 0.55) < 0.4


def test_the_plan_is_the_power_of_simulated_probes() -> None:
    n, chance, d = 60, 0.25, 0.25
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        right = rng.random((2, n)) < [[chance + d], [chance]]
        found.append(il.estimates.Estimate.paired(*right.astype(float)).pvalue() < 0.05)
    needed = questions_needed(difference=d, chance=chance)
    assert 0.7 < np.mean(found) < 0.9
    assert abs(needed - n) <= 6
    assert smallest_difference(needed, chance=chance) <= d + 0.006


def test_it_is_said_before_anything_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lens = il.load("latent-content")

    def stop(*_: Any, **__: Any) -> None:
        raise RuntimeError("it runs")

    monkeypatch.setattr(il.LatentModel, "run", stop)
    with pytest.raises(RuntimeError, match="it runs"):
        behavioural_probe(lens, asked(lens, 30), chance=0.25)
    assert "30 questions show one of 0.37 or more with 80% power" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="it runs"):
        behavioural_probe(lens, asked(lens, 2))
    assert "chance level is not known" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="it runs"):
        behavioural_probe(lens, asked(lens, 3), chance=0.25)
    assert "3 questions show none" in capsys.readouterr().err


@pytest.mark.parametrize(("difference", "chance"), [(0.0, 0.25), (0.9, 0.25), (0.2, 1.0)])
def test_a_plan_for_no_shares_is_refused(difference: float, chance: float) -> None:
    with pytest.raises(InputError, match="is none between"):
        questions_needed(difference=difference, chance=chance)


# ---- intervals ----------------------------------------------------------------------------------


def arm(correct: int, n: int, chance: float | None = 0.25, groups: Any = None) -> Arm:
    right = np.array([1.0] * correct + [0.0] * (n - correct))
    return Arm("image", ("A",) * n, right, chance, groups)


def test_intervals_are_clopper_and_pearsons() -> None:
    """23 of 30 is the paper's arm with the image; the ends by the beta quantiles of 1934."""
    interval = arm(23, 30).ci()
    assert interval.low == pytest.approx(stats.beta.ppf(0.025, 23, 8), abs=1e-12)
    assert interval.high == pytest.approx(stats.beta.ppf(0.975, 24, 7), abs=1e-12)
    assert (round(interval.low, 3), round(interval.high, 3)) == (0.577, 0.901)
    assert arm(0, 30).ci().low == 0
    assert arm(13, 16).ci().low == pytest.approx(0.5435, abs=5e-5)
    assert arm(23, 30).pvalue() == stats.binomtest(23, 30, 0.25).pvalue
    with pytest.raises(InputError, match="chance level of the arm"):
        arm(23, 30, None).pvalue()


def test_groups_widen_the_interval() -> None:
    groups = tuple(i // 3 for i in range(30))
    alone, grouped = arm(15, 30), arm(15, 30, groups=groups)
    assert grouped.ci().high - grouped.ci().low > alone.ci().high - alone.ci().low
    assert grouped.pvalue() > alone.pvalue()
    assert "Wilson" in grouped.ci().procedure


def test_coverage_counts_what_was_not_found_as_not_right() -> None:
    half = Arm("text", ("A", None, "B", None), np.array([1.0, 0, 0, 0]), None, None)
    assert half.coverage == 0.5
    assert "1 of 4 right" in repr(half)
    assert "an answer found in 50%" in repr(half)


# ---- questions ----------------------------------------------------------------------------------

WHEELS = Question({}, "how many wheels?\nA. two\nB. four", "four", ("two", "four"))


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("B", "B", "four"),
        ("The answer is (A).", "The answer is (A).", "two"),
        ("so \\boxed{B}", "B", "four"),
        ("Four", "Four", "four"),
        ("it has wheels. B", None, "four"),
        ("I do not know", "I do not know", None),
        ("(D)", "(D)", None),  # no such option
        ("", None, None),
    ],
)
def test_an_option_is_found_by_its_text_or_letter(
    text: str, answer: str | None, found: str | None
) -> None:
    assert WHEELS.found(text, answer) == found


def test_a_file_of_thirty_multiple_choice_questions(tmp_path: Path) -> None:
    lines = []
    for i in range(30):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
        answer = "B" if i % 2 else "four"
        lines.append(
            {
                "images": f"{i}.png", "text": "what colour?", "probe": "how many wheels?",
                "options": ["two", "four", "six"], "answer": answer, "group": i // 2,
            }
        )  # fmt: skip
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    found = read_questions(path, suffix="\nAnswer with the letter.")
    assert len(found) == 30
    assert {q.answer for q in found} == {"four"}
    assert found[3].probe == ("how many wheels?\nA. two\nB. four\nC. six\nAnswer with the letter.")
    assert found[3].example["images"][0].getpixel((0, 0)) == (3, 0, 0)
    assert found[3].group == 1


def test_options_give_the_chance_level_and_groups_reach_the_estimates() -> None:
    lens = il.load("latent-content")
    questions = [
        {**q, "options": list(SHAPES), "group": i // 2} for i, q in enumerate(asked(lens, 20))
    ]
    found = behavioural_probe(
        lens, questions, arms=("latent", "text"), batch_size=20, max_new_tokens=6
    )
    assert found["latent"].chance == CHANCE
    assert found.compare().n_groups == 10
    assert set(found["latent"].answers) <= {*SHAPES, None}
    assert found.questions[0].probe.endswith("F. bar")


GOOD = {"images": Image.new("RGB", (8, 8)), "text": "a?", "probe": "b?", "answer": "c"}


@pytest.mark.parametrize(
    ("questions", "words"),
    [
        ([GOOD], r"1 question\(s\) came"),
        ([], r"0 question\(s\) came"),
        (7, "questions are a int"),
        ([GOOD, "b?"], "question 1 is a str"),
        *[
            ([GOOD, {k: v for k, v in GOOD.items() if k != name}], f"question 1 has no '{name}'")
            for name in GOOD
        ],
        ([GOOD, {**GOOD, "answer": 4}], "has a int as answer"),
        ([GOOD, {**GOOD, "images": "x.png"}], "is a str, expected a PIL image"),
        ([GOOD, {**GOOD, "options": ["c"]}], "give 2 to 8 different ones"),
        ([GOOD, {**GOOD, "options": ["c", "c"]}], "give 2 to 8 different ones"),
        ([GOOD, {**GOOD, "options": ["d", "e"]}], "is none of its options"),
    ],
)
def test_bad_questions_are_told_in_a_sentence(questions: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_questions(questions)


def test_bad_files_are_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a file"):
        read_questions(tmp_path / "none.jsonl")
    path = tmp_path / "questions.jsonl"
    path.write_text('{"images": "x.png"\n')
    with pytest.raises(InputError, match="line 1 of"):
        read_questions(path)
    line = json.dumps({**GOOD, "images": "none.png"})
    path.write_text(f"{line}\n{line}\n")
    with pytest.raises(InputError, match="cannot be read"):
        read_questions(str(path))


@pytest.mark.parametrize("arms", [(), ("latent", "latent"), ("latent", "sound")])
def test_unknown_arms_are_refused(arms: tuple[str, ...]) -> None:
    lens = il.load("latent-content")
    with pytest.raises(InputError, match="the arms are"):
        behavioural_probe(lens, asked(lens, 2), arms=arms)


def test_families_without_spans_to_force_are_refused(probes: dict[str, Behavioural]) -> None:
    model, processor = tiny.build("qwen2_5_vl")
    lens = il.LatentModel(model, processor, spec=False)
    with pytest.raises(InputError, match="no family opens no spans"):
        behavioural_probe(lens, [GOOD, GOOD])
    with pytest.raises(InputError, match="there is no arm 'sound'"):
        probes["latent-content"].compare("latent", "sound")
