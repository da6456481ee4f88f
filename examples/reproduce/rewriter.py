"""A language model that rewrites imagination so that it misleads, behind an OpenAI-like endpoint.

The paper takes Qwen3-32B and does not publish its prompt; this one is ours.
"""

import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass

from examples.capimagine.client import plain_address
from imaginelens.hooks.errors import InputError

PROMPT = """\
A model looks at a picture to answer a question, and writes down what it imagines to see.
Question: {question}
What it imagines: {imagined}
The right answer: {answer}
Rewrite what it imagines, in the same style and length, so that it leads to a wrong answer. Change \
only what decides the answer. Reply with the rewritten text alone.
"""


@dataclass(frozen=True)
class Rewriter:
    """Asks `model` at `url`, such as "http://localhost:8000/v1" of a vLLM server.

    The key, where one is wanted, is taken from OPENAI_API_KEY.
    """

    url: str
    model: str
    timeout: float = 120.0

    def __call__(self, question: str, imagined: str, answer: str) -> str:
        """Imagination that leads elsewhere.

        Raises:
            InputError: there is no such endpoint, it gives no text, or the address holds a key.
        """
        content = PROMPT.format(question=question, imagined=imagined, answer=answer)
        body = {
            "model": self.model, "temperature": 0.0,
            "messages": [{"role": "user", "content": content}],
        }  # fmt: skip
        request = urllib.request.Request(
            f"{plain_address(self.url).rstrip('/')}/chat/completions", json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        if key := os.environ.get("OPENAI_API_KEY"):
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                said = json.load(reply)["choices"][0]["message"]["content"]
        except (OSError, ValueError, KeyError, IndexError) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            raise InputError(
                f"the rewriter at {self.url!r} gave no text ({type(error).__name__}: {error}); "
                "start a server there that speaks like OpenAI's"
            ) from error
        # a model that thinks aloud says its text last
        return str(said).rpartition("</think>")[2].strip()
