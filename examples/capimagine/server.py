"""A local endpoint for tests and the miniature: speaks the OpenAI API, answers by the template.

    python -m examples.capimagine.server --port 0 --calls calls.jsonl

Prints `listening on http://127.0.0.1:PORT/v1`, and serves until it is ended. It can be made to
misbehave as endpoints do: answer every k-th call by an error (`--fail-every`), or by something that
is no JSON (`--garbage-every`), or late (`--delay`). `--calls` writes a line for each call, before
it is answered: the same hash the ledger has, and the status. So a test can tell that no call was
made twice.
"""

import argparse
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from examples.capimagine.backends import fingerprint
from examples.capimagine.template import answer

LARGEST = 1 << 26  # bytes of a request
PICTURE = 9  # tokens, as many as a board has


@dataclass
class Behaviour:
    """How the server behaves; 0 is never.

    Attributes:
        fail_every: every how-manyth call gets HTTP 500.
        garbage_every: every how-manyth call gets a reply that is no JSON.
        delay: seconds before a reply.
        calls: the file that lists the calls.
    """

    fail_every: int = 0
    garbage_every: int = 0
    delay: float = 0.0
    calls: Path | None = None
    count: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self, key: str) -> str:
        """Count a call and say how it is to be answered: `500`, `garbage` or `200`."""
        with self.lock:
            self.count += 1
            outcome = "200"
            if self.garbage_every and self.count % self.garbage_every == 0:
                outcome = "garbage"
            if self.fail_every and self.count % self.fail_every == 0:
                outcome = "500"
            if self.calls:
                with self.calls.open("a") as lines:
                    lines.write(json.dumps({"key": key, "outcome": outcome}) + "\n")
        return outcome


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body in one packet
    behaviour: Behaviour

    def do_POST(self) -> None:
        """Answer `/v1/chat/completions`."""
        size = int(self.headers.get("Content-Length") or 0)
        if size > LARGEST:
            self.close_connection = True
            return self._send(413, _error(f"a request of {size} bytes is too large"))
        raw = self.rfile.read(size)
        if self.path != "/v1/chat/completions":
            return self._send(404, _error(f"there is no {self.path}"))
        try:
            body = json.loads(raw)
            outcome = self.behaviour.next(fingerprint(body))
            if self.behaviour.delay:
                time.sleep(self.behaviour.delay)
            if outcome == "500":
                return self._send(500, _error("made to fail"))
            said = "I would rather not." if outcome == "garbage" else answer(body["messages"])
            usage = _usage(body["messages"], said)
            self._send(200, _completion(body["model"], said, usage))
        except (ValueError, KeyError, TypeError, OSError) as error:
            self._send(400, _error(f"{type(error).__name__}: {error}"))

    def _send(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing about calls."""


class Server(ThreadingHTTPServer):
    """Takes connections until it is shut down; a client that is killed is no error."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing about connections that break off."""


def serve(behaviour: Behaviour, *, port: int = 0) -> Server:
    """Open the port; `.serve_forever()` serves it, `.server_port` names it."""
    handler = type("Handler", (Handler,), {"behaviour": behaviour})
    return Server(("127.0.0.1", port), handler)


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "server_error", "code": None}}


def _usage(messages: list[dict[str, Any]], said: str) -> dict[str, int]:
    """Roughly what a model would count: this is no tokenizer."""
    asked = 0
    for message in messages:
        content = message["content"]
        parts = [{"text": content}] if isinstance(content, str) else content
        asked += sum(len(part["text"]) // 4 if "text" in part else PICTURE for part in parts)
    replied = len(said) // 4 + 1
    return {
        "prompt_tokens": asked,
        "completion_tokens": replied,
        "total_tokens": asked + replied,
    }


def _completion(model: str, said: str, usage: dict[str, int]) -> dict[str, Any]:
    message = {"role": "assistant", "content": said}
    return {
        "id": "chatcmpl-template",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": usage,
    }


def main() -> None:
    """Serve until ended."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=0, help="0 takes one that is free")
    parser.add_argument("--calls", type=Path, help="list the calls in this file")
    parser.add_argument("--fail-every", type=int, default=0, metavar="K")
    parser.add_argument("--garbage-every", type=int, default=0, metavar="K")
    parser.add_argument("--delay", type=float, default=0.0, metavar="SECONDS")
    args = parser.parse_args()
    behaviour = Behaviour(args.fail_every, args.garbage_every, args.delay, args.calls)
    server = serve(behaviour, port=args.port)
    print(f"listening on http://127.0.0.1:{server.server_port}/v1", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
