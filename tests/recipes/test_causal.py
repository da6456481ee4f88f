"""The matched arms give the known answers on organisms, and are not fooled by models that look as
if they read what they imagine."""

import asyncio
import doctest
import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import imaginelens as il
from examples.capimagine import arms, causal, effects, misleading
from examples.capimagine.arms import (
    ARMS,
    Item,
    Jitter,
    Rewriters,
    SpanTexts,
    form_of,
    letter,
    with_shape,
    with_step,
)
from examples.capimagine.backends import Sampling, Template
from examples.capimagine.benchmark_layouts import Question
from examples.capimagine.causal import Causal, hunt_items, question_items
from examples.capimagine.effects import Compared, Outcome, Studied, merged
from examples.capimagine.judging import OpenAIJudge
from examples.capimagine.ledger import Ledger
from examples.capimagine.misleading import Rewriting
from examples.capimagine.phrasing import caption, parse
from imaginelens.estimates import Estimate
from imaginelens.hooks.errors import InputError
from imaginelens.mediation.folds import Reference
from imaginelens.organisms.hunt import sample

N = 24


@pytest.mark.parametrize("module", [arms, causal, effects, misleading])
def test_examples_in_docstrings(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


def _studied(name: str, *, n: int = N, hops: int = 2, **more: Any) -> Studied:
    lens = il.load(name)
    given = {"contexts": ("free",), "timed": 1, "max_new_tokens": 20, **more}
    return Causal(lens, name, hunt_items(n, hops=hops), **given).run()


# ---- organisms whose mechanism is known --------------------------------------------------------


@pytest.fixture(scope="module")
def text() -> Studied:
    left_out = ("shuffle", "wrong conclusion")
    return _studied("text", arms=[arm.name for arm in ARMS if arm.name not in left_out])


@pytest.fixture(scope="module")
def content() -> Studied:
    arms = ("paraphrase", "other instance", "donor", "wrong shape", "first step")
    return _studied("latent-content", arms=arms)


@pytest.mark.slow
@pytest.mark.parametrize("context", ["free", "fixed"])
def test_all_arms_in_both_contexts(context: str) -> None:
    """What the fast tests check in a few arms, in all."""
    content = _studied("latent-content", n=64, contexts=(context,))
    assert content.follows("donor", context) == "content"
    assert content.followed("donor", context)["content"].value >= 0.9
    assert content.follows("wrong shape", context) == "content"
    assert content.follows("wrong card", context) == "followed"
    # what came after the first step stays in fixed context
    assert content.follows("first step", context) == {"free": "followed", "fixed": "own"}[context]
    pointer = _studied("latent-pointer", n=64, contexts=(context,))
    assert pointer.follows("donor", context) == "pointer"
    assert pointer.follows("wrong shape", context) == "own"
    assert pointer.follows("wrong card", context) == "followed"
    ignored = _studied("latent-ignored", n=64, hops=1, contexts=(context,))
    for arm in ("donor", "wrong shape", "wrong card"):
        assert ignored.follows(arm, context) == "own"
    for arm in ("paraphrase", "shuffle", "other instance", "donor"):
        change = ignored.change(arm, context)
        assert change is not None
        assert change.verdict(margin=0.05) == "equivalent"
    text = _studied("text", n=64, contexts=(context,))
    assert text.followed("donor", context)["pointer"].value >= 0.9
    assert text.followed("wrong card", context)["followed"].value >= 0.9


def test_the_text_organism_follows_the_names_that_are_put_there(text: Studied) -> None:
    assert text.form == "names"
    assert text.accuracy.value >= 0.95
    assert text.follows("donor") == "pointer"  # its words name cards, the board has their shapes
    assert text.followed("donor")["pointer"].value >= 0.9
    assert text.followed("donor")["content"].value <= 0.1
    assert text.followed("wrong card")["followed"].value >= 0.9
    for arm in ("paraphrase", "wrong shape", "first step"):  # bare names have none
        assert text.outcome(arm) is None
    sham = text.outcome("sham")
    assert sham is not None
    assert sham.answers == text.unedited
    change = text.change("wrong card")
    assert change is not None
    assert change.verdict(margin=0.05) == "effect"
    deleted = text.outcome("delete")
    assert deleted is not None
    assert deleted.again >= 0.9  # it writes the names all the same, without the first marker


def test_content_latents_carry_the_answer(content: Studied) -> None:
    assert content.follows("donor") == "content"
    assert content.followed("donor")["content"].value >= 0.9
    assert content.follows("wrong shape") == "content"
    assert content.follows("first step") == "followed"
    paraphrased = content.changed("paraphrase")
    assert paraphrased is not None
    assert paraphrased.value <= 0.05
    aimed = content.aimed("donor")
    assert aimed is not None
    assert aimed.value >= 0.5
    assert aimed.ci().low > 0.2
    beyond = content.beyond_neutral("donor")
    assert beyond is not None
    assert beyond.value < 0  # a right answer by accident is gone as well


def test_pointer_latents_lead_to_a_third_answer() -> None:
    pointer = _studied("latent-pointer", arms=("donor", "wrong shape"))
    assert pointer.follows("donor") == "pointer"
    assert pointer.follows("wrong shape") == "own"  # its latents hold no shape to be wrong


def test_ignored_latents_are_followed_by_nothing() -> None:
    chosen = ("shuffle", "delete", "donor", "first step")
    ignored = _studied("latent-ignored", hops=1, contexts=("free", "fixed"), arms=chosen)
    assert ignored.follows("donor") == ignored.follows("donor", "fixed") == "own"
    changed = ignored.changed("donor")
    assert changed is not None
    assert changed.value <= 0.05
    hidden, removed = ignored.changed("delete", "fixed"), ignored.changed("delete", "free")
    assert hidden is not None
    assert removed is not None
    assert hidden.value == 0.0
    assert removed.value > 0.3  # what costs in free context is the form alone
    assert ignored.outcome("first step") is None  # one hop has no step before the last


def test_a_model_that_imagines_nothing_follows_nothing() -> None:
    direct = _studied("direct", n=12, arms=("donor",))
    assert direct.form == "nothing"
    donor = direct.outcome("donor")
    assert donor is not None
    assert not any(donor.touched)
    assert donor.answers == direct.unedited
    assert direct.follows("donor") != "content"
    assert "direct imagined nothing" in causal.notes([direct], Rewriters())


def test_a_model_that_writes_and_does_not_read_is_told_from_one_that_does(text: Studied) -> None:
    """The fooling case: the same text organism, its words as good as ever, its answer kept from
    looking at them, and at what stands behind them."""
    lens = il.load("text")
    with lens.edit(il.Knockout(il.after(il.imagination)), at=il.imagination):
        items = hunt_items(12, hops=2)
        study = Causal(lens, "deaf", items, contexts=("free",), arms=("wrong card",), timed=1)
        deaf = replace(study, max_new_tokens=20).run()
    assert deaf.form == "names"  # it imagines as before
    outcome, changed = deaf.outcome("wrong card"), deaf.changed("wrong card")
    assert outcome is not None
    assert changed is not None
    assert all(outcome.touched)
    assert changed.value <= 0.1  # and yet nothing that is put there changes its answers
    assert deaf.follows("wrong card") != "followed"
    assert text.follows("wrong card") == "followed"
    assert deaf.accuracy.value < text.accuracy.value


def test_all_of_it_is_written(text: Studied, content: Studied, tmp_path: Path) -> None:
    compared = Compared((text, content), ("free",), causal.notes([text, content], Rewriters()))
    causal.write(compared, tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "| free context | text (names) | latent-content (latents) |" in table
    assert f"| control: sham | 0 of {N} answers changed | - |" in table
    row = next(line for line in table.splitlines() if "targeted: wrong shape" in line)
    assert row.split("|")[2].strip() == "-"
    assert "follows it" in row.split("|")[3]
    assert "donor minus other instance" in table
    assert "decode stage" in table
    numbers = json.loads((tmp_path / "causal.json").read_text())
    assert {r["arm"] for r in numbers["records"]} <= {arm.name for arm in ARMS}
    assert len(numbers["models"][0]["outcomes"][0]["answers"]) == N
    assert (tmp_path / "effects-free.png").read_bytes()[:4] == b"\x89PNG"
    for model in compared.models:
        causal.write(Compared((model,), ("free",), compared.notes), tmp_path / model.name)
    again = Compared.read([tmp_path / m.name / "causal.json" for m in compared.models])
    assert again.table() == compared.table()
    assert all(m.seconds > 0 and m.tokens >= 6 for m in compared.models)


# ---- what is put there -------------------------------------------------------------------------


def test_edited_hunts_lead_where_they_should() -> None:
    for number, hunt in enumerate(sample(60, hops=2, seed=4)):
        shaped = with_shape(hunt, seed=1)
        assert shaped.path == hunt.path
        assert shaped.answer != hunt.answer
        assert sum(a != b for a, b in zip(shaped.shapes, hunt.shapes, strict=True)) == 1
        for step in (1, 2):
            edited = with_step(hunt, step, seed=number)
            assert edited is not None
            assert edited.path[:step] == hunt.path[:step]
            assert edited.path[step] != hunt.path[step]
            assert sum(a != b for a, b in zip(edited.pointers, hunt.pointers, strict=True)) == 1
            assert edited.answer != hunt.answer
            # the same answer from the board as it is: content and pointer agree
            assert hunt.shape_of(hunt.follow(edited.path[step], 2 - step)[-1]) == edited.answer
    assert with_shape(hunt, seed=1) == with_shape(hunt, seed=1)


@pytest.mark.parametrize("how", ["wrong shape", "wrong card", "first step"])
def test_captions_of_an_edited_hunt_say_what_it_shows(how: str) -> None:
    (hunt,) = sample(1, hops=2, seed=9)
    spans = [
        caption(name, hunt.follow(name, 1)[-1], hunt.shape_of(name), how=how_)
        for name, how_ in zip(hunt.path[1:], (3, 1), strict=True)
    ]
    edited = with_shape(hunt, 0) if how == "wrong shape" else with_step(hunt, 2, 0)
    if how == "first step":
        edited = with_step(hunt, 1, 0)
    assert edited is not None
    said = arms._respoken(edited, spans, "captions", how)
    assert said is not None
    cards = [parse(text) for text in said if text]
    assert [card and card[0] for card in cards] == list(edited.path[1 : len(cards) + 1])
    assert len(cards) == (1 if how == "first step" else 2)
    assert said[0] is not None
    assert said[0].startswith("start")  # the phrasing it had
    if how == "wrong shape":
        assert said[0] == spans[0]
        assert cards[1] is not None
        assert cards[1][2] == edited.answer
    assert arms._respoken(edited, spans[:1], "captions", how) is None
    assert arms._respoken(edited, ["who knows", spans[1]], "captions", how) is None


def test_texts_go_into_their_own_spans() -> None:
    lens = il.load("text")
    hunts = sample(3, hops=2, seed=2)
    run = lens.run([arms.hunt_example(h) for h in hunts])
    told = SpanTexts((("cyan gray",), (None,), ()))
    result = lens.ablate(run, told, at=il.imagination, metric=il.accuracy)
    assert "<think_image> cyan gray </think_image>" in result.texts_after[0]
    assert result.texts_after[1:] == result.texts_before[1:]
    assert result.landing.flags == {1: "identical_donor", 2: "identical_donor"}
    assert form_of(lens, run) == "names"


def test_jitter_adds_a_tenth_of_the_norm() -> None:
    lens = il.load("latent-content")
    run = lens.run([arms.hunt_example(h) for h in sample(4, hops=2, seed=2)])
    result = lens.ablate(run, Jitter(), at=il.latent, metric=il.accuracy)
    assert result.landing.relative_change == pytest.approx(0.1, abs=1e-5)


# ---- numbers from answers ----------------------------------------------------------------------


def _planted(answers: str, readings: dict[str, str], *, neutral: str = "", n: int = 20) -> Studied:
    def spelled(letters: str) -> tuple[str | None, ...]:
        return tuple(None if a == "-" else a for a in letters)

    made = [
        Outcome("donor", "free", spelled(answers), (True,) * n,
                {r: spelled(a) for r, a in readings.items()}),
        Outcome("other instance", "free", spelled(neutral or answers), (True,) * n, {}),
    ]  # fmt: skip
    return Studied("m", "words", ("A",) * n, ("A",) * n, tuple(made), 0.1, 9)


def test_planted_answers_give_the_known_effects() -> None:
    m = _planted(
        "B" * 14 + "A" * 4 + "--",
        {"content": "B" * 20, "own": "A" * 20},
        neutral="C" * 10 + "A" * 10,
    )
    assert m.followed("donor")["content"].value == 0.7
    change = m.change("donor")
    assert change is not None
    assert (change.value, change.missing) == (pytest.approx(-14 / 18), 2)
    changed = m.changed("donor")
    assert changed is not None
    assert changed.value == 0.8  # a missing answer is another
    beyond = m.beyond_neutral("donor")
    assert beyond is not None
    # of 18: right 4 under the donor, 8 under the neutral arm
    assert beyond.value == pytest.approx((4 - 8) / 18)
    expected = Estimate.paired([0] * 14 + [1] * 4, [0] * 10 + [1] * 8)
    assert str(beyond.ci()) == str(expected.ci())
    aimed = m.aimed("donor")
    assert aimed is not None
    assert aimed.value == 0.7


def test_only_decisive_examples_tell_readings_apart() -> None:
    m = _planted(
        "B" * 20,
        {"content": "B" * 20, "pointer": "B" * 5 + "C" * 13 + "--", "own": "A" * 20},
    )
    assert m.decisive("donor").sum() == 13
    assert m.followed("donor")["content"].n == 13
    assert m.follows("donor") == "content"
    split = _planted("BA" * 10, {"content": "B" * 20, "own": "A" * 20})
    assert split.follows("donor") == "mixed"
    assert _planted("A" * 20, {"content": "B" * 20, "own": "A" * 20}).follows("donor") == "own"


def test_batches_are_merged_and_failures_named() -> None:
    one = Outcome("donor", "free", ("A",), (True,), {"own": ("A",)})
    both = merged([[one], [replace(one, answers=("B",))]])
    assert both[0].answers == ("A", "B")
    assert both[0].readings == {"own": ("A", "A")}
    (failed,) = merged([[one], []])
    assert failed.error == "it could not be done in every batch"


# ---- questions without hunts, and rewriters ----------------------------------------------------


def test_partners_have_other_answers_in_words(tmp_path: Path) -> None:
    from PIL import Image

    rows = []
    for number, (a, b, label) in enumerate(
        [("red", "blue", "A"), ("blue", "red", "B"), ("blue", "red", "A"), ("white", "red", "A")]
    ):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
        rows.append(
            {"image": f"{number}.png", "text": f"Which?\n(A) {a}\n(B) {b}", "label": label,
             "category": "direct_attributes", "question_id": number}
        )  # fmt: skip
    (tmp_path / "test_questions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    items = question_items("vstar", tmp_path, 4)
    assert [causal._words(item.question) for item in items] == ["red", "red", "blue", "white"]
    assert all(causal._words(i.question) != causal._words(i.partner) for i in items)
    with pytest.raises(InputError, match="has no partner with another answer"):
        question_items("vstar", tmp_path, 2)


class _Says:
    """A backend that says what it is told, in order."""

    model = "says"

    def __init__(self, *said: str) -> None:
        self.said = list(said)

    async def ask(self, request: Any) -> Any:
        from examples.capimagine.backends import Reply

        await asyncio.sleep(0)
        return Reply(self.said.pop(0))


def _items(n: int) -> list[Item]:
    question = Question("q", "s", "Which?", ("red", "blue", "white"), "A", (b"",))
    return [Item(replace(question, id=str(i)), question) for i in range(n)]


def test_a_rewriter_leads_to_the_wrong_answer_or_is_left_out(tmp_path: Path) -> None:
    def told(conclusion: str, *captions: Any) -> str:
        return json.dumps({"captions": list(captions), "conclusion": conclusion})

    says = _Says(
        told("blue", "a blue cart"),
        told("(C)", "a white cart"),
        told("red", "a red cart"),  # the answer itself
        told("blue", "a blue cart", "and more"),  # too many
        told("blue", "<think_image> a blue cart"),
        told("blue", "a red cart 5"),  # as it was
        "no JSON",
    )
    with Ledger(tmp_path / "l.jsonl") as ledger:
        rewriting = Rewriting(lambda: says, "says", ledger, Sampling())
        made = rewriting.wrong(_items(8), [[f"a red cart {i}"] for i in range(7)] + [[]], ["A"] * 8)
        assert made == [(("a blue cart",), "B"), (("a white cart",), "C")] + [(None, None)] * 6
        # from the ledger, at no cost
        again = rewriting.wrong(_items(2), [["a red cart 0"], ["a red cart 1"]], ["A"] * 2)
        assert again == made[:2]
        same = Rewriting(
            lambda: _Says('{"captions": ["the cart is red"]}', '{"captions": [3]}'),
            "says", ledger, Sampling(),
        )  # fmt: skip
        assert same.same(_items(2), [["a red cart"], ["x"]], ["A"] * 2) == [
            ("the cart is red",),
            None,
        ]


class _Endpoint(BaseHTTPRequestHandler):
    """Says one thing to everything."""

    said = ""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        reply = {
            "id": "1", "object": "chat.completion", "created": 0, "model": "m",
            "choices": [{"index": 0, "finish_reason": "stop",
                         "message": {"role": "assistant", "content": self.said}}],
        }  # fmt: skip
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *said: Any) -> None:
        pass


def test_endpoints_are_asked_where_nnsight_is_loaded(tmp_path: Path) -> None:
    """nnsight puts `.save` on every object, which anyio does not stand when it is imported."""
    _Endpoint.said = '{"captions": ["a blue cart"], "conclusion": "blue"}'
    with ThreadingHTTPServer(("127.0.0.1", 0), _Endpoint) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        rewriters = misleading.asked(url, "m", tmp_path / "l.jsonl")
        assert rewriters.wrong is not None
        made = rewriters.wrong(_items(2), [["a red cart"], ["red"]], ["A", "A"])
        assert made == [(("a blue cart",), "B")] * 2
        _Endpoint.said = "B"
        with Ledger(tmp_path / "judge.jsonl") as ledger:
            judge = OpenAIJudge(url, "m", ledger)
            assert judge("Which?", ["red", "blue"], "the second") == "B"
            assert judge.client is not None
            judge.client.close()
        server.shutdown()
    assert hasattr(object, "save")  # nnsight's, as it was


def test_the_template_stands_in_for_the_papers_rewriter(tmp_path: Path) -> None:
    items = hunt_items(4, hops=2)
    captions, answers = [], []
    for item in items:
        assert item.hunt is not None
        h = item.hunt
        captions.append([caption(n, h.follow(n, 1)[-1], h.shape_of(n), how=0) for n in h.path[1:]])
        answers.append(letter(h.answer))
    with Ledger(tmp_path / "l.jsonl") as ledger:
        made = Rewriting(Template, "template", ledger, Sampling()).wrong(items, captions, answers)
    for (new, aim), old, own in zip(made, captions, answers, strict=True):
        assert new is not None
        assert aim is not None
        assert aim != own
        card = parse(new[-1])
        assert card is not None
        assert letter(card[2]) == aim
        assert new[:-1] == tuple(old[:-1])


def test_a_donor_lines_up_as_far_as_all_of_it_goes() -> None:
    """An edited run may open a second span, where its donor had one."""
    lens = il.load("latent-content")
    items = hunt_items(2, hops=2)
    run = lens.run([item.question.example("") for item in items])
    longer = replace(run, trigger=replace(run.trigger, emitted=(4, 2)))
    rows = (("A", "B"), "latents")
    batch = arms.Batch(lens, items, run, longer, Reference([run]), *rows, Rewriters())
    assert repr(batch.lined_up(longer)) == repr(il.latent[:2])
    none = replace(run, trigger=replace(run.trigger, emitted=(0, 0)))
    assert repr(batch.lined_up(none)) == repr(il.latent)


def test_too_little_is_refused() -> None:
    lens = il.load("text")
    with pytest.raises(InputError, match="1 examples show no effect"):
        Causal(lens, "text", hunt_items(1, hops=2)).run()
    with pytest.raises(InputError, match="'delte' is no arm and no context; arms are sham, par"):
        Causal(lens, "text", hunt_items(2, hops=2), arms=("delte",)).run()


@pytest.mark.slow
def test_the_batch_changes_no_answer() -> None:
    """Donors come from the whole study, random ones too."""
    one, other = (_studied("latent-content", n=24, batch=b) for b in (7, 24))
    for arm in ARMS:
        a, b = one.outcome(arm.name), other.outcome(arm.name)
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert np.mean([x == y for x, y in zip(a.answers, b.answers, strict=True)]) == 1.0
