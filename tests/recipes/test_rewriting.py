"""Rewriting: captions are true, bad replies are refused, nothing is paid for twice."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from examples.capimagine import rewrite
from examples.capimagine.asking import Asking, Budget, Stopped
from examples.capimagine.backends import (
    PROMPTS,
    Busy,
    Local,
    Reply,
    Request,
    Sampling,
    Template,
    data_uri,
    fingerprint,
    prompt,
)
from examples.capimagine.card import leaks
from examples.capimagine.chains import OPEN, Chain, load
from examples.capimagine.data import read
from examples.capimagine.hunts import crop, mark, write
from examples.capimagine.ledger import Entry, Ledger
from examples.capimagine.phrasing import parse
from examples.capimagine.refused import Refusal, SourceError
from examples.capimagine.replies import BadReply
from examples.capimagine.rewrite import Outcome, Rewriting, Settings, composed, rewritten
from examples.capimagine.server import Behaviour, serve
from examples.capimagine.template import answer, read_cards
from imaginelens.organisms.checkpoint import WORDS
from imaginelens.organisms.hunt import Hunt, render, sample

ROOT = Path(__file__).parents[2]
N, SPOIL = 24, 0.25
HUNTS = sample(N, hops=2, seed=3)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hunts") / "raw"
    write(HUNTS, folder, spoil=SPOIL)
    return folder


@pytest.fixture(scope="module")
def chains(raw: Path) -> list[Chain]:
    return read(raw).chains


@pytest.fixture(scope="module")
def planted(raw: Path) -> dict[str, str]:
    return json.loads((raw / "planted.json").read_text())


def _hunt(chain: Chain) -> Hunt:
    return HUNTS[int(chain.id.split("/")[1])]


class Scripted:
    """The template, unless `reply` has something else to say."""

    model = "template"

    def __init__(self, reply: Callable[[Request], str | None] = lambda request: None) -> None:
        self.asked: list[Request] = []
        self.reply = reply

    async def ask(self, request: Request) -> Reply:
        self.asked.append(request)
        await asyncio.sleep(0)
        said = self.reply(request)
        return Reply(answer(request.messages(data_uri)) if said is None else said, 10, 5)


def _run(
    chains: Sequence[Chain],
    path: Path,
    backend: Any,
    settings: Settings | None = None,
    budget: Budget | None = None,
    **options: Any,
) -> tuple[list[Outcome], Asking]:
    with Ledger(path) as ledger:
        asking = Asking(ledger, backend, "template", Sampling(), budget or Budget(), **options)
        rewriting = Rewriting(asking, settings or Settings())
        return asyncio.run(rewritten(chains, rewriting, concurrency=4)), asking


# -- what the template sees ------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0, 60])
def test_cards_are_read_from_noisy_pixels(noise: float) -> None:
    hunts = sample(250, hops=2, seed=77)
    boards = render(hunts) + np.random.default_rng(0).normal(0, noise, (250, 84, 84, 3))
    boards = np.clip(boards, 0, 255).astype(np.uint8)
    right = 0
    for hunt, board in zip(hunts, boards, strict=True):
        seen = read_cards(np.stack([crop(board, hunt, name) for name in hunt.names]))
        right += sum(
            a == b
            for a, b in zip(
                seen, zip(hunt.names, hunt.pointers, hunt.shapes, strict=True), strict=True
            )
        )
    assert right / (250 * 9) >= 0.995


def _message(task: str, fields: dict[str, Any], *pictures: np.ndarray) -> list[dict[str, Any]]:
    import io

    files = []
    for pixels in pictures:
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        files.append(out.getvalue())
    request = Request(prompt=prompt(task), fields=fields, pictures=tuple(files))
    return request.messages(data_uri)


def test_edits_are_seen_where_they_are_and_not_where_there_is_none() -> None:
    for hunt, board in zip(HUNTS, render(HUNTS), strict=True):
        name = hunt.path[-1]
        said = answer(_message("rewrite-edit.v1", {}, board, mark(board, hunt, name)))
        assert parse(json.loads(said)["caption"]) == (
            name,
            hunt.follow(name, 1)[-1],
            hunt.shape_of(name),
        )
        assert json.loads(answer(_message("rewrite-edit.v1", {}, board, board))) == {"caption": ""}


def test_phrasings_say_nothing_about_the_card() -> None:
    """One card in many grains is put in all four ways, about as often."""
    hunts = [replace(HUNTS[0], noise=i) for i in range(200)]
    cards = [
        crop(board, hunt, hunt.start) for hunt, board in zip(hunts, render(hunts), strict=True)
    ]
    said = Counter(answer(_message("rewrite-zoom.v1", {}, card)) for card in cards)
    assert len(said) == 4
    assert min(said.values()) > 25


def test_the_template_takes_only_messages_of_this_recipe() -> None:
    for messages in ([], [{"role": "user"}], _message("refine.v1", {})[1:] * 2):
        with pytest.raises(ValueError, match=r"not those of this recipe|none of"):
            answer(messages)


def test_every_prompt_says_that_it_is_ours() -> None:
    files = sorted(PROMPTS.glob("*.txt"))
    assert len(files) >= 5
    for file in files:
        assert file.read_text().startswith("# Ours")
        assert prompt(file.stem).text.startswith(f"Task: {file.stem}\n")
    with pytest.raises(SourceError, match=r"no prompt 'refine\.v9'"):
        prompt("refine.v9")


# -- stages ----------------------------------------------------------------------------------------


def test_captions_tell_the_path_and_the_filter_finds_what_was_planted(
    tmp_path: Path, chains: list[Chain], planted: dict[str, str]
) -> None:
    outcomes, _ = _run(chains, tmp_path / "ledger.jsonl", Template())
    assert len(planted) == round(N * SPOIL)
    kinds = {"answer conflict": "conflict", "ambiguous or unanswerable": "unanswerable"}
    assert {o.chain.id: kinds[o.refused.kind] for o in outcomes if o.refused} == planted
    for outcome in outcomes:
        hunt = _hunt(outcome.chain)
        path = [(name, hunt.follow(name, 1)[-1], hunt.shape_of(name)) for name in hunt.path[1:]]
        assert [parse(said) for said in outcome.captions] == path
        chain = composed(outcome, Settings())
        assert chain.imagined == outcome.captions
        (reply,) = chain.reply
        assert isinstance(reply, str)
        assert set(reply.split()) <= set(WORDS)
        assert reply.split()[-1] == outcome.chain.answer


def test_other_thresholds_and_ablations_need_no_new_calls(
    tmp_path: Path, chains: list[Chain], planted: dict[str, str]
) -> None:
    ledger = tmp_path / "ledger.jsonl"
    _run(chains, ledger, Template())
    for settings, kept in (
        (Settings(max_conflict=1.0), {"conflict"}),
        (Settings(max_conflict=1.0, max_unanswerable=1.0), {"conflict", "unanswerable"}),
        (Settings(filter=False), {"conflict", "unanswerable"}),
        (Settings(rewrite=False), set()),
    ):
        outcomes, asking = _run(chains, ledger, None, settings)
        assert not asking.calls
        left = {o.chain.id for o in outcomes if o.refused}
        assert left == {id for id, kind in planted.items() if kind not in kept}


def test_without_rewriting_a_lone_marker_stands_for_each_picture(
    tmp_path: Path, chains: list[Chain]
) -> None:
    settings = Settings(rewrite=False, filter=False)
    outcomes, asking = _run(chains, tmp_path / "ledger.jsonl", None, settings)
    assert not asking.ledger._entries
    (reply,) = composed(outcomes[0], settings).reply
    assert isinstance(reply, str)
    lines = reply.split("\n")
    assert [line == OPEN for line in lines] == [False, True, False, True, False]
    assert lines[-1].endswith(f"\\boxed{{{chains[0].answer}}}")
    assert "<observation>" not in reply
    assert "<abs_vis_token>" not in reply
    (terse,) = composed(outcomes[0], replace(settings, reply="terse", system="")).reply
    assert terse == f"{OPEN}\n{OPEN}\n{chains[0].answer}"


def test_without_refining_the_texts_stay(tmp_path: Path, chains: list[Chain]) -> None:
    settings = Settings(refine=False)
    outcomes, asking = _run(chains[:1], tmp_path / "ledger.jsonl", Template(), settings)
    assert set(asking.calls) == {"rewrite", "filter"}
    (reply,) = composed(outcomes[0], settings).reply
    assert isinstance(reply, str)
    lines = reply.split("\n")
    assert lines[0].startswith("I mark the card that")
    assert lines[1] == f"<think_image> {outcomes[0].captions[0]} </think_image>"


def test_subsets_without_a_branch_are_refused_unless_told(
    tmp_path: Path, chains: list[Chain]
) -> None:
    chain = replace(next(c for c in chains if c.subset == "Visual_CoT"), subset="mine")
    (outcome,), _ = _run([chain], tmp_path / "ledger.jsonl", Template())
    assert outcome.refused is not None
    assert (outcome.refused.kind, outcome.stage) == ("unknown subset", "structure")
    settings = Settings(unknown_subset="zoom")
    (outcome,), _ = _run([chain], tmp_path / "ledger.jsonl", Template(), settings)
    assert outcome.captions


def test_what_has_nothing_to_imagine_or_has_markers_is_refused_before_any_call(
    tmp_path: Path, chains: list[Chain]
) -> None:
    bare = replace(chains[0], reply=("\\boxed{bar}",))
    marked = replace(chains[0], id="m", reply=(*chains[0].reply, "<|im_end|>"))
    backend = Scripted()
    outcomes, _ = _run([bare, marked], tmp_path / "ledger.jsonl", backend)
    kinds = [o.refused.kind for o in outcomes if o.refused]
    assert kinds == ["no picture in the reply", "markers in the reply"]
    assert not backend.asked


def test_a_picture_that_went_missing_since_costs_one_chain(
    tmp_path: Path, chains: list[Chain]
) -> None:
    gone = replace(chains[0], folder=tmp_path)
    outcomes, _ = _run([gone, chains[1]], tmp_path / "ledger.jsonl", Template())
    assert outcomes[0].refused is not None
    assert outcomes[0].refused.kind == "damaged picture"
    assert outcomes[1].captions


def test_which_captions_give_the_answer_away() -> None:
    said = ["a red cube", "Redder than all", "two  RED\ncubes", "infrared", "red"]
    assert leaks(said, "red") == [True, False, True, False, True]
    assert leaks(said, "red cubes") == [False, False, True, False, False]
    assert leaks(["it costs $5 (net)."], "$5") == [True]
    assert leaks([], "x") == []


# -- bad replies -----------------------------------------------------------------------------------

BAD = {
    "no JSON": "I see a card.",
    "empty": "  ",
    "nothing seen": '{"caption": " "}',
    "wrong type": '{"caption": ["x"]}',
    "markers": '{"caption": "x </think_image> \\u0021"}',
    "over-long": json.dumps({"caption": "x " * 5000}),
    "not UTF-8": '{"caption": "\\ud800"}',
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_caption_is_asked_for_once_more(
    tmp_path: Path, chains: list[Chain], kind: str
) -> None:
    backend = Scripted(lambda request: None if request.turns else BAD[kind])
    only = Settings(refine=False, filter=False)
    (outcome,), asking = _run(chains[:1], tmp_path / "ledger.jsonl", backend, only)
    assert outcome.refused is None
    assert asking.calls == {"rewrite": 4}
    ((reply, complaint),) = backend.asked[1].turns
    assert reply == BAD[kind][:2000]
    assert complaint.endswith("Reply again, with JSON only.")
    stubborn = Scripted(lambda request: BAD[kind])
    (outcome,), asking = _run(chains[:1], tmp_path / "other.jsonl", stubborn, only)
    assert outcome.refused is not None
    assert (outcome.refused.kind, outcome.stage) == (f"bad reply: {kind}", "rewrite")
    assert asking.calls == {"rewrite": 2}


@pytest.mark.parametrize("marker", ["<|im_end|>", "<think_image>", "</think_image>", "<image>"])
def test_no_marker_enters_a_chain(marker: str) -> None:
    with pytest.raises(BadReply, match="must not have"):
        rewrite.replies.caption(json.dumps({"caption": f"a {marker} b"}))
    with pytest.raises(BadReply, match="must not have"):
        rewrite.replies.chain(
            json.dumps({"texts": [marker, "bar"], "captions": ["a"]}), count=1, answer="bar"
        )


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ({"texts": ["", "bar"], "captions": []}, "wrong count"),
        ({"texts": ["bar"], "captions": ["a"]}, "wrong count"),
        ({"texts": ["", "\\boxed{ring}"], "captions": ["a"]}, "answer changed"),
        ({"texts": ["", "so it is not bar"], "captions": ["a"]}, "answer changed"),
        ({"texts": ["", 1], "captions": ["a"]}, "wrong type"),
    ],
)
def test_a_refined_chain_keeps_its_captions_and_its_answer(
    reply: dict[str, Any], kind: str
) -> None:
    with pytest.raises(BadReply) as bad:
        rewrite.replies.chain(json.dumps(reply), count=1, answer="bar")
    assert bad.value.kind == kind


@pytest.mark.parametrize("value", [None, "0.5", 1.5, -0.1, float("nan"), [0]])
def test_a_verdict_is_two_shares(value: Any) -> None:
    with pytest.raises(BadReply, match="from 0 to 1"):
        rewrite.replies.verdict(json.dumps({"conflict": value, "unanswerable": 0}))


def test_json_is_found_in_a_fence_and_after_thoughts() -> None:
    said = '<think>{"caption": "no"}</think>\n```json\n{"caption": "a  cube"}\n```'
    assert rewrite.replies.caption(said) == "a cube"


# -- what is paid for ------------------------------------------------------------------------------


def test_a_ledger_torn_anywhere_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    entries = [Entry(key=f"k{i}", stage="refine", id="ä", text="\n\u2028 {}") for i in range(3)]
    with Ledger(path) as ledger:
        for entry in entries:
            ledger.add(entry)
    whole = path.read_bytes()
    second = whole.index(b"\n") + 1
    for cut in range(second, len(whole) + 1):
        path.write_bytes(whole[:cut])
        with Ledger(path) as ledger:
            had = {entry.key for entry in ledger}
            ledger.add(replace(entries[0], key="new"))
        with Ledger(path) as ledger:
            assert {entry.key for entry in ledger} == {*had, "new"}
            assert ledger.get("new") == replace(entries[0], key="new")
            assert had >= {f"k{i}" for i in range(whole[:cut].count(b"\n"))}


_UNTYPED = b'{"key": [], "stage": "s", "id": "1", "text": "t"}'


@pytest.mark.parametrize("line", [b"garbage", b"7", b'{"key": "a"}', b"\xff\xfe", _UNTYPED])
def test_lines_that_are_no_entries_are_passed_over(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.add(Entry(key="a", stage="s", id="1", text="t"))
    path.write_bytes(line + b"\n" + path.read_bytes())
    with Ledger(path) as ledger:
        assert (len(ledger), ledger.torn) == (1, 1)


def test_one_process_holds_a_ledger(tmp_path: Path) -> None:
    with (
        Ledger(tmp_path / "ledger.jsonl"),
        pytest.raises(SourceError, match="held by another process"),
    ):
        Ledger(tmp_path / "ledger.jsonl")
    Ledger(tmp_path / "ledger.jsonl").close()


def test_the_hash_is_of_what_is_sent(tmp_path: Path, chains: list[Chain]) -> None:
    """Pictures count by content, so a server that sees them whole finds the same hash."""
    backend = Scripted()
    _run(chains[:2], tmp_path / "ledger.jsonl", backend)
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        asking = Asking(ledger, None, "template")
        for request in backend.asked:
            body = {"messages": request.messages(data_uri), "model": "template"}
            assert asking.key(request) == fingerprint({**body, **Sampling().options()})
            assert ledger.get(asking.key(request))
            for other in (
                replace(asking, model="another"),
                replace(asking, sampling=Sampling(temperature=0.1)),
            ):
                assert ledger.get(other.key(request)) is None
        changed = replace(request, pictures=(b"x", *request.pictures[1:]))
        assert asking.key(changed) != asking.key(request)


def test_what_two_chains_ask_at_once_is_asked_once(tmp_path: Path, chains: list[Chain]) -> None:
    backend = Scripted()
    twins = [replace(chains[0], id=str(i)) for i in range(4)]
    outcomes, _ = _run(twins, tmp_path / "ledger.jsonl", backend)
    assert len(backend.asked) == 4  # two captions, one chain, one verdict
    assert len({outcome.captions for outcome in outcomes}) == 1


@pytest.mark.parametrize(
    "budget", [Budget(calls=10), Budget(tokens=300), Budget(calls=0), Budget(tokens=0)]
)
def test_a_budget_stops_cleanly_and_the_next_run_goes_on(
    tmp_path: Path, chains: list[Chain], budget: Budget
) -> None:
    path, runs, asked = tmp_path / "ledger.jsonl", 0, Counter[str]()
    while True:
        backend = Scripted()
        try:
            outcomes, asking = _run(chains[:8], path, backend, budget=budget)
            break
        except Stopped as stopped:
            why = str(stopped)
        finally:
            with Ledger(path) as ledger:
                keys = Asking(ledger, None, "template")
                asked.update(keys.key(request) for request in backend.asked)
                paid = len(ledger)
        if budget.calls is not None:
            assert len(backend.asked) == budget.calls
        else:  # three others may be in flight when it is reached
            assert len(backend.asked) * 15 <= (budget.tokens or 0) + 4 * 15
        assert "is spent" in why
        runs += 1
        if 0 in (budget.calls, budget.tokens):
            assert paid == 0
            return
    assert runs == (3 if budget.calls else 1)
    assert set(asked.values()) == {1}
    assert len(asked) == paid == 32
    assert len(outcomes) == 8
    assert sum(asking.reused.values()) + sum(asking.calls.values()) == 32


def test_a_busy_endpoint_is_asked_again_and_a_dead_one_given_up(
    tmp_path: Path, chains: list[Chain]
) -> None:
    count = 0

    def sometimes(request: Request) -> str | None:
        nonlocal count
        count += 1
        if count % 3 == 1:
            raise Busy("too many")
        return None

    path = tmp_path / "ledger.jsonl"
    outcomes, asking = _run(chains[:4], path, Scripted(sometimes), backoff=0.001)
    assert len(outcomes) == 4
    assert asking.busy > 4

    def never(request: Request) -> str | None:
        raise Busy("gone", wait=0.0)

    with pytest.raises(SourceError, match=r"did not answer 3 times, the last time: gone"):
        _run(chains, path, Scripted(never), retries=2)


def test_a_request_that_is_refused_costs_one_chain(tmp_path: Path, chains: list[Chain]) -> None:
    def fussy(request: Request) -> str | None:
        if request.prompt.name == "refine.v1" and chains[1].question == request.fields["question"]:
            raise Refusal("endpoint refuses", "too long")
        return None

    outcomes, _ = _run(chains[:3], tmp_path / "ledger.jsonl", Scripted(fussy))
    assert [outcome.stage for outcome in outcomes] == ["", "refine", ""]


# -- with an endpoint ------------------------------------------------------------------------------


@contextmanager
def _server(**behaviour: Any) -> Iterator[str]:
    server = serve(Behaviour(**behaviour))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _command(raw: Path, out: Path, url: str, *more: str) -> list[str]:
    words = ["rewrite", str(raw), "--out", str(out), "--base-url", url, "--model", "template"]
    return [*words, *more]


def _main(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    monkeypatch.setattr("sys.argv", command)
    rewrite.main()


def _calls(path: Path) -> list[tuple[str, str]]:
    # without a last line that the server is just writing
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [(call["key"], call["outcome"]) for call in map(json.loads, lines)]


def _paid(path: Path) -> set[str]:
    with Ledger(path) as ledger:
        return {entry.key for entry in ledger}


def _files(folder: Path) -> dict[str, str]:
    names = ("chains.jsonl", "refused.jsonl", "verdicts.jsonl")
    return {name: (folder / name).read_text() for name in names}


def test_an_endpoint_that_fails_and_talks_nonsense_gives_the_same_chains(
    tmp_path: Path,
    raw: Path,
    planted: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = tmp_path / "calls.jsonl"
    with _server(calls=log) as url:
        _main(monkeypatch, _command(raw, tmp_path / "a", url, "--dry-run"))
        said = capsys.readouterr().out
        _main(monkeypatch, _command(raw, tmp_path / "a", url, "--system", ""))
    calls = _calls(log)
    assert [line.split()[0] for line in said.splitlines()[2:]] == ["48", "24", "24", "96"]
    assert len(calls) == 96 == len({key for key, _ in calls})
    assert {key for key, _ in calls} == _paid(tmp_path / "a" / "ledger.jsonl")
    card = json.loads((tmp_path / "a" / "card.json").read_text())
    assert card["kept"] == N - len(planted) == len(load(tmp_path / "a" / "chains.jsonl"))
    assert card["stages"]["filter"]["refused"] == {
        "answer conflict": 3,
        "ambiguous or unanswerable": 3,
    }
    assert card["cost of this run"]["calls"] == {"rewrite": 48, "refine": 24, "filter": 24}
    assert "| filter | 18 | 6 |" in (tmp_path / "a" / "card.md").read_text()

    monkeypatch.setattr("examples.capimagine.rewrite.Asking", _hasty)
    with _server(calls=log, fail_every=7, garbage_every=9) as url:
        # one by one, so that no chain meets nonsense twice
        one_by_one = ("--system", "", "--concurrency", "1")
        _main(monkeypatch, _command(raw, tmp_path / "b", url, *one_by_one))
    assert _files(tmp_path / "a") == _files(tmp_path / "b")
    outcomes = Counter(outcome for _, outcome in _calls(log)[96:])
    assert outcomes["500"] > 10
    assert outcomes["garbage"] > 8
    # again: nothing is asked, and the same comes out
    _main(monkeypatch, _command(raw, tmp_path / "b", "http://127.0.0.1:9/v1", "--system", ""))
    assert _files(tmp_path / "a") == _files(tmp_path / "b")
    assert "0 calls, 1" in capsys.readouterr().out


def _hasty(*args: Any) -> Asking:
    return Asking(*args, backoff=0.001)


_AFTER_NNSIGHT = """
import asyncio, sys
import nnsight
assert hasattr(object, "save") and "openai" not in sys.modules
from examples.capimagine.backends import OpenAI, Request, prompt
fields = {"question": "?", "captions": ["cyan then yellow shape bar"], "answer": "bar"}
request = Request(prompt=prompt("wrong.v1"), fields=fields)
print(asyncio.run(OpenAI(sys.argv[1], "template").ask(request)).text)
assert hasattr(object, "save")
"""


def test_an_endpoint_is_asked_where_nnsight_came_first() -> None:
    """nnsight puts `.save` on every object, which anyio does not stand when it is imported."""
    with _server() as url:
        command = [sys.executable, "-c", _AFTER_NNSIGHT, url]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["captions"]) == 1


def test_setup_errors_are_one_sentence(
    tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = ["rewrite", str(raw), "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="needs --model"):
        _main(monkeypatch, bare)
    with pytest.raises(SystemExit, match="needs --base-url"):
        _main(monkeypatch, [*bare, "--model", "m"])
    nobody = _command(raw, tmp_path, "http://127.0.0.1:9/v1", "--retries", "1", "--limit", "1")
    with pytest.raises(SystemExit, match=r"did not answer 2 times.*Connection error"):
        _main(monkeypatch, nobody)
    with _server() as url, pytest.raises(SystemExit, match=r"has no 'template'"):
        _main(monkeypatch, _command(raw, tmp_path, url.removesuffix("/v1")))
    with _server() as url, pytest.raises(SystemExit, match="budget of 5 calls is spent"):
        _main(monkeypatch, _command(raw, tmp_path, url, "--max-calls", "5"))


def _started(raw: Path, out: Path, url: str, *more: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "examples.capimagine.rewrite"]
    return subprocess.Popen(
        [*command, *_command(raw, out, url, *more)[1:]],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for(log: Path, calls: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if len(_calls(log)) >= calls or process.poll() is not None:
            return
        time.sleep(0.01)
    raise AssertionError("the calls did not come")


@pytest.mark.parametrize("concurrency", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_anywhere_no_reply_is_paid_for_twice(
    tmp_path: Path, raw: Path, concurrency: int, record_property: Callable[[str, Any], None]
) -> None:
    log, out = tmp_path / "calls.jsonl", tmp_path / "out"
    kills, paid, again = 0, set[str](), 0
    with _server(calls=log, delay=0.01) as url:
        for number in (7, 45, 80, 10**9):
            before = len(_calls(log))
            process = _started(raw, out, url, "--concurrency", str(concurrency))
            _wait_for(log, number, process)
            if number < 10**9:
                os.kill(process.pid, signal.SIGKILL)
            output = process.communicate()
            assert process.returncode == (-signal.SIGKILL if number < 10**9 else 0), output
            kills += process.returncode != 0
            time.sleep(0.1)  # the server may still write down calls of the dead
            asked = [key for key, _ in _calls(log)[before:]]
            assert paid.isdisjoint(asked)
            paid = _paid(out / "ledger.jsonl")
            again = len(_calls(log)) - len({key for key, _ in _calls(log)})
    assert kills == 3
    assert len(paid) == 96 == len({key for key, _ in _calls(log)})
    assert again <= kills * concurrency  # those that were in flight
    record_property("in flight when killed, asked again", again)
    print(f"concurrency {concurrency}: {again} calls in flight at {kills} kills were asked again")
    _, asking = _run(read(raw).chains, tmp_path / "once.jsonl", Template())
    assert sum(asking.calls.values()) == 96


def test_ctrl_c_waits_for_the_calls_in_flight(tmp_path: Path, raw: Path) -> None:
    log, out = tmp_path / "calls.jsonl", tmp_path / "out"
    with _server(calls=log, delay=0.05) as url:
        process = _started(raw, out, url)
        _wait_for(log, 20, process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        assert process.returncode == 1
        assert "stopped: interrupted" in errors
        assert "Traceback" not in errors
        calls = _calls(log)
    assert 20 <= len(calls) < 96
    assert {key for key, _ in calls} == _paid(out / "ledger.jsonl")
    assert not (out / "chains.jsonl").exists()


def test_the_local_pipeline_is_asked_in_the_same_way(tmp_path: Path, chains: list[Chain]) -> None:
    """An organism that only knows of hunts writes no JSON: refused, and counted as such."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    from imaginelens.organisms.checkpoint import build_processor, folder

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder("base"))
    backend = Local(model, processor=build_processor(latent=False), sampling=Sampling(max_tokens=4))
    (outcome,), asking = _run(chains[:1], tmp_path / "ledger.jsonl", backend)
    assert outcome.refused is not None
    assert outcome.refused.kind.startswith("bad reply")
    assert asking.calls == {"rewrite": 2}
