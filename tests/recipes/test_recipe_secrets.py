"""What a recipe must not do: tell a key, or let a dataset write on its data card."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from examples.capimagine import card, rewrite
from examples.capimagine.client import plain_address
from examples.capimagine.hunts import write
from examples.capimagine.judging import OpenAIJudge
from examples.capimagine.ledger import Ledger
from examples.capimagine.template import answer
from examples.reproduce.rewriter import Rewriter
from imaginelens.hooks.errors import InputError
from imaginelens.organisms.hunt import sample

KEY = "sk-planted-0123456789abcdef"
OTHER = "an-open-secret-of-another-name"


@contextmanager
def _endpoint(status: int) -> Iterator[tuple[str, list[str]]]:
    """An endpoint that repeats what it was sent as a key, refusing (or replying, 200)."""
    seen = list[str]()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(self.headers["Authorization"])
            text = f"{seen[-1]} is no good"
            if status == 200:
                text = answer(asked["messages"])
            told: dict[str, Any] = {"error": {"message": text}}
            if status == 200:
                told = {"choices": [{"message": {"content": text}}], "key": seen[-1]}
            body = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("status", [200, 400, 401, 404, 500])
def test_a_key_is_sent_and_never_told(
    tmp_path: Path,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In no ledger, card, refusal, error, output or log, even where an endpoint repeats it."""
    write(sample(2, hops=2, seed=1), tmp_path / "raw")
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", OTHER)
    out, told = tmp_path / "out", ""
    caplog.set_level("DEBUG", logger="examples")
    with _endpoint(status) as (url, seen):
        command = ["rewrite", str(tmp_path / "raw"), "--out", str(out), "--base-url", url]
        command += ["--model", "template", "--api-key-env", "MY_KEY", "--retries", "0"]
        monkeypatch.setattr("sys.argv", command)
        try:
            rewrite.main()
        except SystemExit as error:
            told = str(error)
    assert set(seen) == {f"Bearer {KEY}"}
    assert (told == "") == (status in (200, 400))
    if status in (401, 404, 500):
        assert "[the key] is no good" in told  # the rest of what it says is of use
    captured = capfd.readouterr()
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {"ledger.jsonl"} <= {path.name for path in files}
    if status == 200:
        assert len((out / "ledger.jsonl").read_text().splitlines()) == len(seen)
    text = "".join(path.read_text() for path in files)
    for secret in (KEY, OTHER):
        assert secret not in told + captured.out + captured.err + caplog.text + text


def test_the_rewriter_of_table_3_sends_a_key_and_never_tells_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with _endpoint(401) as (url, seen), pytest.raises(InputError) as caught:
        Rewriter(url, "m")("?", "red", "blue")
    assert seen == [f"Bearer {KEY}"]
    assert KEY not in str(caught.value) + repr(Rewriter(url, "m"))


HOSTILE = "<script>alert(1)</script>|`x`\n# [a](javascript:b) \u202e"


def test_a_dataset_cannot_write_on_its_card(tmp_path: Path) -> None:
    spent = {"replies": 1, "prompt tokens": 1, "completion tokens": 1}
    facts = {
        "kept": 1, "source": HOSTILE, "layout": "monet", "model": HOSTILE,
        "read": {"records": 1, "chains": 1, f"refused: {HOSTILE}": 1},
        "stages": {"filter": {"left": 1, "refused": {HOSTILE: 1}}},
        "kept by subset": {HOSTILE: 1, "Visual_CoT": 2, "\ud800": 3},
        "answer in a caption": 0.0, "answer in a caption before the last": 0.0,
        "cost in the ledger": {"rewrite": spent}, "prompts": {}, "unknown": [],
    }  # fmt: skip
    card.write_card(facts, tmp_path)
    page = (tmp_path / "card.md").read_text(encoding="utf-8")
    lines = page.splitlines()
    bare = re.sub(r"\\.", "", page)  # without what is escaped
    outside = "".join(bare.split("`")[::2])  # what is no code is all that a browser would read
    assert bare.count("`") == 4
    assert "<" not in outside
    assert "](" not in outside
    assert "\u202e" not in page
    assert lines.count("# Chains with imagination in words") == 1
    assert [line for line in lines if line.startswith("#")] == lines[:1]
    rows = [line for line in lines if line.startswith("|")]
    assert {re.sub(r"\\.", "", line).count("|") for line in rows} == {3, 5}
    assert "| Visual_CoT | 2 |" in lines
    assert json.loads((tmp_path / "card.json").read_text())["source"] == HOSTILE


@pytest.mark.parametrize("url", [f"http://me:{KEY}@host/v1", f"http://host/v1?key={KEY}"])
def test_an_address_that_holds_a_key_is_refused_and_not_told(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By each of the three that ask endpoints; an address without one is taken as it is."""
    write(sample(1, hops=2, seed=1), tmp_path / "raw")
    command = ["rewrite", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [*command, "--base-url", url, "--model", "template"])
    with pytest.raises(SystemExit, match="holds a '@' or a '\\?'") as stopped:
        rewrite.main()
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        judge = OpenAIJudge(url, "m", ledger)
        with pytest.raises(InputError, match="perhaps a key") as judged:
            judge("which?", ["a", "b"], "a")
    with pytest.raises(InputError, match="perhaps a key") as rewritten:
        Rewriter(url, "m")("which?", "a cat", "cat")
    assert not any(KEY in str(error.value) for error in (stopped, judged, rewritten))
    assert plain_address("http://[::1]:8000/v1") == "http://[::1]:8000/v1"
    with pytest.raises(InputError, match="no http address"):
        plain_address("localhost:8000")
