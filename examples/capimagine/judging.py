"""A language model says which answer a reply gives, where the matcher cannot tell.

A judge is any function `(question, options, reply) -> answer or None`. `OpenAIJudge` asks any
OpenAI-compatible endpoint and keeps what it was told in a ledger, so that nothing is paid twice.
The paper does not name its judge, nor give its prompt; ours is `prompts/judge.v1.txt`. The judge
sees no imagination and no image, and is not told the right answer.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from examples.capimagine.backends import prompt
from examples.capimagine.client import load_client, plain_address
from examples.capimagine.ledger import Entry, Ledger
from examples.capimagine.matcher import LETTERS, visible
from imaginelens.hooks.errors import InputError

Judge = Callable[[str, Sequence[str], str], str | None]
VERSION = "judge.v1"
LONGEST = 4000  # characters of a reply, from its end: the answer stands there


@dataclass
class OpenAIJudge:
    """Asks an OpenAI-compatible endpoint, at temperature 0.

    Args:
        url: of the endpoint, up to and with `/v1`. The key is taken from OPENAI_API_KEY.
        model: as the endpoint calls it.
        ledger: where replies are kept.

    Raises:
        InputError: the endpoint does not answer, or its address holds a password.
    """

    url: str
    model: str
    ledger: Ledger
    client: Any = None
    calls: int = 0

    def __call__(self, question: str, options: Sequence[str], reply: str) -> str | None:
        """The letter of the option that a reply gives (or its words, for open questions)."""
        template = prompt(VERSION).text
        said = visible(reply)[-LONGEST:]
        asked = template.replace("{question}", question).replace("{reply}", said)
        if not said:
            return None
        key = hashlib.sha256(json.dumps([VERSION, self.model, asked]).encode()).hexdigest()
        entry = self.ledger.get(key)
        if entry is None:
            entry = Entry(key=key, stage="judge", id=question[:60], text=self._ask(asked))
            self.ledger.add(entry)
        return read(entry.text, options)

    def _ask(self, asked: str) -> str:
        load_client()
        from openai import OpenAI, OpenAIError

        if self.client is None:
            key = os.environ.get("OPENAI_API_KEY", "none")
            self.client = OpenAI(
                base_url=plain_address(self.url), api_key=key, max_retries=5, timeout=120
            )
        self.calls += 1
        try:
            made = self.client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": asked}],
                temperature=0.0,
                max_tokens=64,
            )
        except OpenAIError as error:
            raise InputError(
                f"the judge at {self.url} did not answer ({type(error).__name__}); start it and "
                "go on with --resume, or leave --judge out"
            ) from error
        return made.choices[0].message.content or ""


def read(said: str, options: Sequence[str]) -> str | None:
    """What a judge said, if it is what it was asked for.

    >>> read(" (B) ", ["red", "blue"]), read("NONE", ["red", "blue"]), read("C", ["red", "blue"])
    ('B', None, None)
    >>> read("The Nile", [])
    'The Nile'
    """
    said = said.strip()
    if said.upper().strip(".") in ("", "NONE"):
        return None
    if not options:
        return said
    letter = said.strip("().* ").upper()
    return letter if letter and letter in LETTERS[: len(options)] and len(letter) == 1 else None
