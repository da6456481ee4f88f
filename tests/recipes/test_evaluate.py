"""Layouts are read as they are, predictions survive being killed, and scores are known ones."""

import base64
import csv
import doctest
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import imaginelens as il
from examples.capimagine import benchmark_layouts, evaluate, judging, scores
from examples.capimagine.benchmark_layouts import Question, read
from examples.capimagine.chains import Chain, Picture, save
from examples.capimagine.evaluate import Clock, Evaluation, Predictions, load, open_model
from examples.capimagine.judging import OpenAIJudge
from examples.capimagine.ledger import Ledger
from examples.capimagine.refused import Refused
from examples.capimagine.scores import Prediction, Share, score
from imaginelens.hooks.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("module", [benchmark_layouts, judging, scores, evaluate])
def test_examples_in_docstrings(module: Any) -> None:
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


# ---- layouts -----------------------------------------------------------------------------------


def _png(colour: str = "red") -> bytes:
    made = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(made, "PNG")
    return made.getvalue()


def _b64(colour: str = "red") -> str:
    return base64.b64encode(_png(colour)).decode()


def _tsv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as lines:
        table = csv.DictWriter(lines, list(rows[0]), delimiter="\t")
        table.writeheader()
        table.writerows(rows)


def _parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow as pa
    from pyarrow.parquet import write_table

    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(pa.Table.from_pylist(list(rows)), path)


def _jsonl(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))


def _split(name: str, folder: Path) -> tuple[list[Question], list[Refused]]:
    rows = list(read(name, folder))
    return (
        [row for row in rows if isinstance(row, Question)],
        [row for row in rows if isinstance(row, Refused)],
    )


def test_vstar(tmp_path: Path) -> None:
    for folder in ("direct_attributes", "relative_position"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "sa_1.jpg").write_bytes(_png())
    text = (
        "What is the color of the cart?\n(A) red\n(B) dark blue\n(C) white\n(D) green\n"
        "Answer with the option's letter from the given choices directly."
    )
    row = {"image": "direct_attributes/sa_1.jpg", "text": text, "category": "direct_attributes"}
    spatial = {
        "image": "relative_position/sa_1.jpg",
        "text": "Is the dog left or right of the cat?\n(A) left\n(B) right\n",
        "category": "relative_position",
    }
    (tmp_path / "secret.png").write_bytes(_png())
    inside = tmp_path / "vstar"
    inside.mkdir()
    for folder in ("direct_attributes", "relative_position"):
        (tmp_path / folder).rename(inside / folder)
    _jsonl(
        inside / "test_questions.jsonl",
        [
            {**row, "label": "B", "question_id": 0},
            {**spatial, "label": "A", "question_id": 0},
            {**row, "label": "E", "question_id": 1},
            {**row, "label": "A", "question_id": 2, "image": "direct_attributes/none.jpg"},
            {**row, "label": "A", "question_id": 3, "image": "../secret.png"},
            {**row, "label": "A", "question_id": 4, "category": "OCR"},
            {**row, "question_id": 5},
            {**row, "label": "A", "question_id": 6, "text": "What now?"},
            '{"image": "dir',
            {**row, "label": "B", "question_id": 0},
            {**row, "label": "A", "question_id": 9, "image": f"{'x' * 300}.png"},
        ],
    )
    questions, refused = _split("vstar", inside)
    assert [(q.id, q.split, q.answer) for q in questions] == [
        ("attribute/0", "attribute", "B"),
        ("spatial/0", "spatial", "A"),
    ]
    assert questions[0].options == ("red", "dark blue", "white", "green")
    assert questions[0].text.startswith("What is the color of the cart?\nA. red\nB. dark blue")
    assert "Answer with" not in questions[0].text
    example = questions[0].example(" Go.")
    assert example["images"][0].size == (4, 4)
    assert example["text"].endswith("D. green Go.")
    reasons = {one.id: one.reason for one in refused}
    assert list(reasons) == ["1", "2", "3", "4", "5", "6", "8", "0", "9"]
    for id, part in {
        "1": "'E' is none of its 4 options",
        "2": "is not there",
        "3": "outside of the folder",
        "4": "'OCR' is none of",
        "5": "no column 'label'",
        "6": "no options",
        "8": "no column",
        "0": "same id",
        "9": "is not there",
    }.items():
        assert part in reasons[id]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("hrbench4k", "hr_bench_4k.tsv"),
        ("hrbench4k", "HRBench4K.tsv"),
        ("hrbench8k", "hr_bench_8k.parquet"),
        ("hrbench8k", "data/hrbench_8k-00000-of-00001.parquet"),
    ],
)
def test_hrbench(tmp_path: Path, name: str, file: str) -> None:
    words = ["one", "two", "three", "four"]
    rows = [
        {
            "index": 4 * number + turn,
            "question": f"How many? ({number})",
            "answer": "ABCD"[-turn % 4],
            "category": category,
            **dict(zip("ABCD", words[turn:] + words[:turn], strict=True)),
            "cycle_category": str(turn + 1),
            "image": _b64(),
        }
        for number, category in enumerate(["single", "cross"])
        for turn in range(4)
    ]
    rows[5]["image"] = "no base64!"
    rows[6]["image"] = base64.b64encode(b"no picture").decode()
    rows[7]["category"] = "double"
    (_tsv if file.endswith("tsv") else _parquet)(tmp_path / file, rows)
    questions, refused = _split(name, tmp_path)
    assert [q.split for q in questions] == ["FSP"] * 4 + ["FCP"]
    assert len({q.group for q in questions}) == 2
    assert {q.options["ABCD".index(q.answer)] for q in questions} == {"one"}
    assert [one.id for one in refused] == ["5", "6", "7"]
    assert [one.kind for one in refused] == ["picture", "picture", "value"]


def test_mme_realworld_lite(tmp_path: Path) -> None:
    options = ["(A) 1.5", "(B) two", "(C) none", "(D) all", "(E) This image doesn't say."]
    table = {
        "index": 7,
        "question": "How many?",
        "multi-choice options": options,
        "answer": "E",
        "category": "Perception/Monitoring",
        "l2-category": "count",
    }
    _parquet(tmp_path / "a" / "data" / "train-0.parquet", [{**table, "bytes": _b64()}])
    _tsv(tmp_path / "b" / "mme_realworld_lite.tsv", [{**table, "image": _b64()}])
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.png").write_bytes(_png())
    own = {
        "Question_id": "7",
        "Image": "x.png",
        "Text": "How many?",
        "Answer choices": options,
        "Ground truth": "E",
        "Task": "Perception",
        "Subtask": "Monitoring",
    }
    broken = {**own, "Question_id": "8", "Answer choices": "(A) not a list"}
    (tmp_path / "c" / "MME_RealWorld_Lite.json").write_text(json.dumps([own, broken]))
    found = {folder: _split("mme-realworld-lite", tmp_path / folder) for folder in "abc"}
    for questions, _ in found.values():
        (question,) = questions
        assert (question.id, question.split, question.answer) == ("7", "Perception/Monitoring", "E")
        assert question.options[0] == "1.5"
        assert question.options[4] == "This image doesn't say."
    (refused,) = found["c"][1]
    assert refused.id == "8"


def test_blink_shows_all_its_pictures(tmp_path: Path) -> None:
    image = {"bytes": _png(), "path": None}
    row = {
        "idx": "val_Jigsaw_1",
        "question": "Which one fits?",
        "sub_task": "Jigsaw",
        "image_1": image,
        "image_2": {"bytes": _png("blue"), "path": None},
        "image_3": image,
        "image_4": None,
        "choices": ["the second image", "the third image"],
        "answer": "(B)",
        "prompt": "Which one fits?\n(A) the second image\n(B) the third image",
    }
    _parquet(
        tmp_path / "Jigsaw" / "val-0.parquet",
        [row, {**row, "idx": "val_Jigsaw_2", "answer": "hidden"}],
    )
    _parquet(tmp_path / "Multi-view_Reasoning" / "val-0.parquet", [{**row, "idx": "mv_1"}])
    questions, refused = _split("blink", tmp_path)
    assert [(q.id, q.split) for q in questions] == [
        ("val_Jigsaw_1", "Jigsaw"),
        ("mv_1", "Multi-view_Reasoning"),
    ]
    shown = questions[0].example()["images"]
    assert [image.getpixel((0, 0)) for image in shown] == [(255, 0, 0), (0, 0, 255), (255, 0, 0)]
    assert questions[0].answer == "B"
    (one,) = refused
    assert (one.id, "hidden" in one.reason) == ("val_Jigsaw_2", True)


def test_tablevqa(tmp_path: Path) -> None:
    def row(id: str, gt: str) -> dict[str, Any]:
        image = {"bytes": _png(), "path": None}
        return {"qa_id": id, "image": image, "question": "Who?", "gt": gt, "text_html_table": "<t>"}

    for split, gt in (("vwtq", "Ada|Bob"), ("vwtq_syn", "12"), ("vtabfact", "1")):
        _parquet(tmp_path / "data" / f"{split}-0.parquet", [row("0", gt), row("1", gt)])
    _parquet(tmp_path / "data" / "vtabfact-1.parquet", [row("2", "perhaps")])
    questions, refused = _split("tablevqa", tmp_path)
    assert [q.split for q in questions] == ["VWTQ"] * 2 + ["VWTQ-syn"] * 2 + ["VTabFact"] * 2
    assert (questions[4].options, questions[4].answer) == (("true", "false"), "A")
    assert [one.id for one in refused] == ["VTabFact/2"]


def test_vsp_in_mirages_layout(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "1.png").write_bytes(_png())
    row = {
        "text_input": "<image>Is it safe?\nA. Yes\nB. No",
        "image_input": "img/1.png",
        "image_output": "img/2.png",
        "text_output": r"It is. \boxed{A}",
    }
    _jsonl(tmp_path / "test.jsonl", [row, {**row, "text_output": "It is."}])
    questions, refused = _split("vsp", tmp_path)
    assert (questions[0].options, questions[0].answer) == (("Yes", "No"), "A")
    assert refused[0].reason == "it has neither `answer` nor a box in `text_output`"


def test_chains_and_hunts(tmp_path: Path) -> None:
    Image.new("RGB", (84, 84)).save(tmp_path / "a.png")
    chain = Chain(
        id="eval/0",
        subset="eval",
        folder=tmp_path,
        prompt=(Picture("a.png"), "start red then then shape ?"),
        reply=("bar",),
        answer="bar",
    )
    save([chain], tmp_path / "chains.jsonl")
    for data in (tmp_path, tmp_path / "chains.jsonl"):
        (question,), _ = _split("chains", data)
        assert question.options["ABCDEF".index(question.answer)] == "bar"
        assert question.text == "start red then then shape ?"
    hunts = list(read("hunts", limit=3))
    assert [h.id for h in hunts] == ["0", "1", "2"]
    (tmp_path / "chains.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(InputError, match=r"line 1 of chains\.jsonl is no chain"):
        _split("chains", tmp_path)


def test_what_is_not_there_is_said_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no test_questions.jsonl or .*; there is nothing"):
        list(read("vstar", tmp_path))
    with pytest.raises(InputError, match="does not exist"):
        list(read("vstar", tmp_path / "no"))
    with pytest.raises(InputError, match="VSP is not on the Hub under a name we know"):
        list(read("vsp"))
    (tmp_path / "hr_bench_4k.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match=r"breaks off behind row 0 .*fetch it again"):
        list(read("hrbench4k", tmp_path))


def test_no_network_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match=r"craigwu/vstar_bench could not be fetched .* --data"):
        list(read("vstar"))


# ---- scores ------------------------------------------------------------------------------------


def _told(id: str, reply: str, truth: str = "A", **more: Any) -> Prediction:
    given: dict[str, Any] = {
        "id": id,
        "split": "attribute",
        "do": "none",
        "question": "?",
        "options": ("red", "blue", "white", "green"),
        "lettered": True,
        "truth": truth,
        "reply": reply,
        "emitted": 1,
        "touched": False,
        "tokens": 5,
        "seconds": 0.5,
    }
    return Prediction(**{**given, **more})


def test_the_papers_row_comes_out_of_planted_predictions() -> None:
    """CapImagine on V*: 87.8 and 82.9, together 85.9 (Table 1), however the answer is written."""
    forms = [r"\boxed{A}", "(A)", "The answer is A.", "red", "<think_image> (B) </think_image> A"]
    made = [_told(f"a{i}", forms[i % 5] if i < 101 else r"\boxed{B}") for i in range(115)] + [
        _told(f"s{i}", forms[i % 5] if i < 63 else "The answer is C", split="spatial")
        for i in range(76)
    ]
    scored = score(made, "vstar")
    shown = {split: scored["none", split].accuracy for split in ("attribute", "spatial", "all")}
    assert [round(100 * s.value, 1) for s in shown.values()] == [87.8, 82.9, 85.9]
    # Wilson's interval, by its closed form
    n, p, z = 191, 164 / 191, 1.959963984540054
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert shown["all"].low == pytest.approx(middle - half, abs=1e-9)
    assert shown["all"].high == pytest.approx(middle + half, abs=1e-9)
    assert scored.notes == ()
    assert score(made[:-1], "vstar").notes == ("spatial has 76 questions, of which 75 are here",)


def test_a_matcher_that_reads_everything_would_be_fooled() -> None:
    """All four name the wrong option first, and in brackets; three are right."""
    made = [
        _told("0", "<think_image> (B) (C) </think_image> (A)"),
        _told("1", "(B) x</abs_vis_token> The answer is A"),
        _told("2", r"(B) is near. \boxed{A}"),
        _told("3", "(B) or (A)"),
    ]
    scored = score(made, "vstar")["none", "all"]
    assert scored.accuracy.value == 0.75
    assert scored.parsed.value == 0.75
    assert scored.ambiguous == 0.25


def test_judged_and_judge_free_are_kept_apart() -> None:
    made = [
        _told("0", r"\boxed{A}"),
        _told("1", "it looks like the first one"),
        _told("2", "(A) or (B)"),
        _told("3", "hard to say"),
    ]
    asked = []

    def judge(question: str, options: Sequence[str], reply: str) -> str | None:
        asked.append(reply)
        return {"it looks like the first one": "A", "(A) or (B)": "B"}.get(reply)

    scored = score(made, "vstar", judge=judge)["none", "all"]
    assert asked == [p.reply for p in made[1:]]  # what the matcher reads is not paid for
    assert scored.accuracy.value == 0.25
    assert scored.judged is not None
    assert scored.judged.value == 0.5
    assert scored.parsed.value == 0.25
    assert score(made, "vstar")["none", "all"].judged is None


def test_a_judge_answers_unlettered_questions_in_words() -> None:
    plain = {"lettered": False, "options": ("true", "false"), "truth": "B"}
    made = [_told("0", "hm", **plain), _told("1", "hum", **plain)]
    scored = score(made, "hunts", judge=lambda q, o, r: "False" if r == "hm" else "A")
    assert scored["none", "all"].judged == Share.of([True, False])


def test_tablevqa_is_the_unweighted_mean_of_its_splits() -> None:
    """Monet's row: 55.3, 60.4, 78.8 -> 64.8 (Table 2)."""
    rows = []
    for split, n, right in (("VWTQ", 750, 415), ("VWTQ-syn", 250, 151), ("VTabFact", 250, 197)):
        rows += [
            _told(f"{split}{i}", "12" if i < right else "13", "12", options=(), split=split)
            for i in range(n)
        ]
    scored = score(rows, "tablevqa")
    parts = [scored["none", s].accuracy for s in ("VWTQ", "VWTQ-syn", "VTabFact")]
    overall = scored["none", "all"].accuracy
    assert [round(100 * p.value, 1) for p in (*parts, overall)] == [55.3, 60.4, 78.8, 64.8]
    pooled = sum(p.value * p.n for p in parts) / 1250
    assert abs(overall.value - pooled) > 0.03  # another number than pooling would give
    spread = math.sqrt(sum((p.value - p.low) ** 2 for p in parts)) / 3
    assert overall.low == pytest.approx(overall.value - spread)


def test_the_interval_of_a_mean_of_splits_covers() -> None:
    rng = np.random.default_rng(0)
    truth, n, covered = (0.55, 0.6, 0.79), (75, 25, 25), 0
    for _ in range(200):
        shares = [
            Share.of(list(map(bool, rng.random(k) < p))) for p, k in zip(truth, n, strict=True)
        ]
        made = Share.mean(shares)
        covered += made.low <= np.mean(truth) <= made.high
    assert 0.92 <= covered / 200 <= 0.98


def test_turned_options_count_once_and_widen_the_interval() -> None:
    made = []
    for number in range(40):
        for turn in range(4):
            right = number < 30 if turn else number < 20
            made.append(
                _told(f"{number}/{turn}", "A" if right else "B", split="FSP", group=str(number))
            )
    scored = score(made, "hrbench4k")["none", "all"]
    assert scored.accuracy.value == pytest.approx((3 * 30 + 20) / 160)
    assert scored.turned is not None
    assert (scored.turned.value, scored.turned.n) == (0.5, 40)
    alone = Share.of([p.right(p.match.answer) for p in made])
    assert scored.accuracy.high - scored.accuracy.low > 1.4 * (alone.high - alone.low)


def test_open_answers_may_be_lists() -> None:
    assert scores._same_list("Bob, Ada", "Ada|Bob")
    assert scores._same_list("Ada and Bob", "Ada|Bob")
    assert not scores._same_list("Ada", "Ada|Bob")
    assert not scores._same_list("Ada, Ada", "Ada|Bob")


def test_a_do_that_never_landed_is_told() -> None:
    made = [_told(str(i), "A", do=do, touched=False) for do in ("none", "zero") for i in range(9)]
    assert "do(zero) touched no example" in score(made, "hunts").notes[0]
    made = [_told(str(i), "A", do=do, touched=True) for do in ("none", "zero") for i in range(9)]
    assert score(made, "hunts").notes == ("do(zero) touched 9 examples, changed no word",)


class _Client:
    """An OpenAI client that says what it is told."""

    def __init__(self, *said: str) -> None:
        self.said, self.asked = list(said), []
        self.chat = self.completions = self

    def create(self, **request: Any) -> Any:
        self.asked.append(request)
        told = type("Told", (), {})
        message, choice, made = told(), told(), told()
        message.content = self.said.pop(0)
        choice.message = message
        made.choices = [choice]
        return made


def test_the_judge_is_paid_once(tmp_path: Path) -> None:
    client = _Client("B", "NONE")
    with Ledger(tmp_path / "judge.jsonl") as ledger:
        judge = OpenAIJudge("http://x/v1", "m", ledger, client)
        reply = "<think_image> (A) </think_image> the second"
        assert judge("Which?\nA. red\nB. blue", ["red", "blue"], reply) == "B"
        assert judge("Which?\nA. red\nB. blue", ["red", "blue"], reply) == "B"
        assert judge("Which?", ["red", "blue"], "hm") is None
        assert judge("Which?", ["red", "blue"], "<think_image> open") is None  # nothing said
        assert judge.calls == 2
    sent = client.asked[0]["messages"][0]["content"]
    assert "the second" in sent
    assert "(A)" not in sent  # no imagination
    with Ledger(tmp_path / "judge.jsonl") as ledger:
        again = OpenAIJudge("http://x/v1", "m", ledger, _Client())
        assert again("Which?\nA. red\nB. blue", ["red", "blue"], reply) == "B"


# ---- the model before a benchmark --------------------------------------------------------------


@pytest.fixture(scope="module")
def latent() -> il.LatentModel:
    return open_model("latent-content")


def _study(lens: il.LatentModel, **more: Any) -> Evaluation:
    return Evaluation(lens, "hunts", **{"limit": 12, "batch": 6, "max_new_tokens": 20, **more})


def test_sixteen_new_tokens_are_refused_for_models_that_imagine(latent: il.LatentModel) -> None:
    with pytest.raises(InputError, match="16 new tokens end what a organism model imagines"):
        _study(latent, max_new_tokens=16)
    plain = open_model("direct", family="none")
    assert _study(plain, max_new_tokens=16).max_new_tokens == 16
    assert _study(latent, max_new_tokens=None).max_new_tokens == 256  # half of its room


def test_known_accuracies_and_what_do_costs(latent: il.LatentModel, tmp_path: Path) -> None:
    study = _study(latent, limit=16, batch=16, dos=["mean", "sham", "skip"])
    scored = evaluate.evaluate(study, tmp_path / "p.jsonl")
    assert scored["none", "all"].accuracy.value >= 0.95
    assert scored["mean", "all"].accuracy.value <= 0.4
    assert scored["skip", "all"].emission.value == 0.0
    assert scored["none", "all"].emission.value == 1.0
    assert scored["mean", "all"].touched == 1.0
    assert scored.changes["mean", "all"].verdict(margin=0.05) == "effect"
    assert "the sham, the control, changed 0 of 16 replies" in scored.notes
    assert scored["none", "all"].seconds > 0
    ignored = evaluate.evaluate(
        _study(open_model("latent-ignored"), limit=16, batch=16, dos=["mean"]), tmp_path / "i.jsonl"
    )
    assert ignored["mean", "all"].accuracy.value >= 0.9  # the same edit, and nobody reads it


def test_a_text_model_is_edited_in_words(tmp_path: Path) -> None:
    lens = open_model("text")
    scored = evaluate.evaluate(_study(lens, dos=["shuffle"]), tmp_path / "p.jsonl")
    assert scored["none", "all"].accuracy.value >= 0.9
    assert scored["shuffle", "all"].accuracy.value <= 0.6
    assert math.isnan(scored["shuffle", "all"].seconds)
    with pytest.raises(InputError, match=r"do\(zero\) is nothing that can be done to this model;"):
        _study(lens, dos=["zero"])
    with pytest.raises(InputError, match="which imagines nothing"):
        _study(open_model("direct", family="none"), dos=["zero"])


def test_killed_and_resumed_is_as_if_never_killed(latent: il.LatentModel, tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    study = _study(latent, dos=["resample"])
    evaluate.evaluate(study, whole)
    part = Predictions(torn, study.settings, resume=False)
    for prediction, _ in zip(study.run(), range(9), strict=False):
        part.add(prediction)
    with torn.open("a") as lines:
        lines.write('{"id": "9", "split": "2 ho')  # killed in the middle of a line
    assert len(load(torn)[1]) == 9
    with pytest.raises(InputError, match="give --resume to go on with it"):
        evaluate.evaluate(study, torn)
    evaluate.evaluate(study, torn, resume=True)

    def told(path: Path) -> dict[tuple[str, str], str]:
        return {(p.id, p.do): p.reply for p in load(path)[1]}

    assert len(load(torn)[1]) == len(told(torn)) == 24  # none twice
    assert told(torn) == told(whole)
    with pytest.raises(InputError, match="was made with other max_new_tokens"):
        evaluate.evaluate(_study(latent, max_new_tokens=100), torn, resume=True)


def test_the_batch_changes_no_reply(latent: il.LatentModel) -> None:
    def told(batch: int) -> dict[tuple[str, str], str]:
        study = _study(latent, batch=batch, dos=["resample"], limit=6)
        return {(p.id, p.do): p.reply for p in study.run()}

    assert told(1) == told(3)


def test_edits_are_fitted_on_the_other_half(latent: il.LatentModel) -> None:
    """A reference never holds a question that it serves."""
    study = _study(latent, limit=12)
    keys = [set(study._reference(half).tokens.keys) for half in (0, 1)]
    assert not keys[0] & keys[1]
    for question in read("hunts", limit=12):
        assert isinstance(question, Question)
        (key,) = latent.prompt(question.example()).keys
        assert key in keys[evaluate._half(question)]
        assert key not in keys[1 - evaluate._half(question)]


def test_the_clock_leaves_the_prompt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    now: Iterator[float] = iter([10.0, 11.0, 13.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = Clock()
    for _ in range(3):
        clock(torch.zeros(1, 1), torch.zeros(1, 1))
    assert clock.seconds == 3.5


@pytest.mark.slow
def test_sigkill_in_a_process_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "p.jsonl"
    command = [
        sys.executable, "-m", "examples.capimagine.evaluate", "--model", "latent-content",
        "--benchmark", "hunts", "--limit", "64", "--do", "zero", "--resume", "--out", str(out),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    while not (out.exists() and out.read_bytes().count(b"\n") > 10):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    begun = len(load(out)[1])
    assert 0 < begun < 128
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    made = load(out)[1]
    assert len({(p.id, p.do) for p in made}) == len(made) == 128
    again = json.loads(out.with_suffix(".scores.json").read_text())
    assert again["rows"][-1]["do"] == "zero"
