"""Who answers the prompts: an endpoint, a model in this process, or the template for organisms.

Any object with `model` and an `async ask(request)` that gives a `Reply` will do (`Rewriter`).
Backends only ask. That nothing is asked twice, retries and budgets are the business of `asking.py`.
"""

import asyncio
import base64
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from examples.capimagine.client import load_client, plain_address
from examples.capimagine.refused import Refusal, SourceError

PROMPTS = Path(__file__).parent / "prompts"
FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}


@dataclass(frozen=True)
class Prompt:
    """A prompt of a version.

    Attributes:
        name: such as `refine.v1`.
        text: as it is sent; its first line names the task.
        hash: of the text, for the card.
    """

    name: str
    text: str
    hash: str


@cache
def prompt(name: str) -> Prompt:
    """Read a prompt file; lines that begin with # are remarks.

    >>> prompt("refine.v1").text.splitlines()[0]
    'Task: refine.v1'
    """
    path = PROMPTS / f"{name}.txt"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in PROMPTS.glob("*.txt")))
        raise SourceError(f"there is no prompt {name!r}; there are {there}")
    lines = path.read_text(encoding="utf-8").split("\n")
    text = "\n".join(line for line in lines if not line.startswith("#")).strip()
    return Prompt(name, text, hashlib.sha256(text.encode()).hexdigest())


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a model is asked.

    Attributes:
        prompt: what to do.
        fields: the words it is about, by name.
        pictures: the files of its pictures, as `encoded` gives them.
        turns: replies that would not do, each with what was said about it.
    """

    prompt: Prompt
    fields: Mapping[str, Any]
    pictures: tuple[bytes, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()

    def messages(self, show: Callable[[bytes], str]) -> list[dict[str, Any]]:
        """The chat in the form of the OpenAI API; `show` gives the address of a picture."""
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": show(picture)}} for picture in self.pictures
        ]
        said = json.dumps(dict(self.fields), ensure_ascii=False)
        content.append({"type": "text", "text": said})
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": self.prompt.text},
            {"role": "user", "content": content},
        ]
        for reply, complaint in self.turns:
            messages += [
                {"role": "assistant", "content": reply},
                {"role": "user", "content": complaint},
            ]
        return messages


@dataclass(frozen=True)
class Reply:
    """What came back, and what it cost in tokens (0 where nobody counts)."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Busy(Exception):
    """The endpoint cannot answer now: ask again after `wait` seconds, if it says so."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class Rewriter(Protocol):
    """A model that answers requests.

    `ask` raises `Busy` if asking again may help, `Refusal` if this request is at fault, and
    `SourceError` if no request can be answered.
    """

    model: str

    async def ask(self, request: Request) -> Reply:
        """Answer one request."""
        ...


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How replies are drawn; ours, the paper does not say.

    Attributes:
        temperature: 0 is greedy.
        max_tokens: of a reply.
        json_mode: ask the endpoint for JSON; a few endpoints cannot.
    """

    temperature: float = 0.0
    max_tokens: int = 1024
    json_mode: bool = True

    def options(self) -> dict[str, Any]:
        """As the OpenAI API takes them."""
        form = {"response_format": {"type": "json_object"}} if self.json_mode else {}
        return {"temperature": self.temperature, "max_tokens": self.max_tokens, **form}


def data_uri(picture: bytes) -> str:
    """A picture as an address that holds it whole."""
    kind = "image/png"
    if picture[:3] == b"\xff\xd8\xff":
        kind = "image/jpeg"
    elif picture[8:12] == b"WEBP":
        kind = "image/webp"
    return f"data:{kind};base64,{base64.b64encode(picture).decode()}"


def digest(picture: bytes) -> str:
    """A picture as the hash of its bytes."""
    return f"sha256:{hashlib.sha256(picture).hexdigest()}"


def fingerprint(body: Mapping[str, Any]) -> str:
    """Hash what is sent to an endpoint; pictures count by their content.

    >>> body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    >>> fingerprint(body) == fingerprint(dict(reversed(body.items())))
    True
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        if isinstance(value, str) and value.startswith("data:") and ";base64," in value:
            return digest(base64.b64decode(value.split(",", 1)[1]))
        return value

    said = json.dumps(plain(body), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(said.encode()).hexdigest()


def encoded(path: Path, *, max_pixels: int) -> bytes:
    """The bytes of a picture as it is sent: the file itself if it is small and of a usual format.

    Raises:
        Refusal: it cannot be read.
    """
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as picture:
            width, height = picture.size
            if picture.format in FORMATS and width * height <= max_pixels:
                return content
            shrink = min(1.0, (max_pixels / (width * height)) ** 0.5)
            size = (max(1, int(width * shrink)), max(1, int(height * shrink)))
            smaller = picture.convert("RGB").resize(size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = f"the picture {path.name!a} cannot be read: {error}"
        raise Refusal("damaged picture", reason) from error
    out = io.BytesIO()
    smaller.save(out, "PNG")
    return out.getvalue()


# -- backends --------------------------------------------------------------------------------------


SECRET = 8  # letters of the shortest key; shorter ones, such as EMPTY, are in other words, too


class OpenAI:
    """Any endpoint that speaks the OpenAI API: vLLM, SGLang, llama.cpp, hosted ones.

    Args:
        base_url: such as `http://127.0.0.1:8000/v1`.
        model: the name that the endpoint knows it by.
        api_key: many local endpoints want none.
        timeout: seconds for one call.

    Raises:
        InputError: the address holds a password, or is none.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str = "EMPTY",
        timeout: float = 120.0,
        sampling: Sampling | None = None,
    ) -> None:
        load_client()  # before openai, which nnsight's `.save` would break
        import openai

        self.model = model
        self.sampling = sampling or Sampling()
        self._errors = openai
        self._key = api_key
        # retries are counted and paid for by whoever asks, so not hidden in the client
        self._client = openai.AsyncOpenAI(
            base_url=plain_address(base_url), api_key=api_key, timeout=timeout, max_retries=0
        )

    async def ask(self, request: Request) -> Reply:
        """Send one request."""
        errors = self._errors
        body = {
            "model": self.model,
            "messages": request.messages(data_uri),
            **self.sampling.options(),
        }
        try:
            # raw, because reading a reply into the client's classes takes longer than asking
            raw = await self._client.chat.completions.with_raw_response.create(**body)
        except (errors.AuthenticationError, errors.PermissionDeniedError) as error:
            raise SourceError(f"the endpoint refuses the key: {self._told(error)}") from error
        except errors.NotFoundError as error:
            raise SourceError(f"the endpoint has no {self.model!r}: {self._told(error)}") from error
        except (errors.RateLimitError, errors.InternalServerError, errors.ConflictError) as error:
            raise Busy(
                self._told(error), _wait(error.response.headers.get("retry-after"))
            ) from error
        except errors.APIConnectionError as error:
            raise Busy(self._told(error)) from error
        except errors.APIStatusError as error:
            raise Refusal("endpoint refuses", f"the endpoint says: {self._told(error)}") from error
        return _reply(self._without_key(raw.text))

    def _told(self, error: Exception) -> str:
        return _short(self._without_key(str(error)) or type(error).__name__)

    def _without_key(self, text: str) -> str:
        """What an endpoint says, without the key: some repeat the one that they refuse."""
        secret = len(self._key) >= SECRET
        return text.replace(self._key, "[the key]") if secret else text

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


def _reply(text: str) -> Reply:
    try:
        body = json.loads(text)
        said = body["choices"][0]["message"]["content"]
        usage = body.get("usage") or {}
        return Reply(
            said or "",
            int(usage.get("prompt_tokens") or 0),
            int(usage.get("completion_tokens") or 0),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise Busy(f"the endpoint's reply is no completion: {text[:200]!a}") from error


def _short(text: str) -> str:
    return " ".join(text.split())[:300]


def _wait(header: str | None) -> float | None:
    try:
        return max(0.0, float(header)) if header else None
    except ValueError:  # a date, which hardly any endpoint sends
        return None


class Local:
    """A vision-language model in this process, through `pipeline("image-text-to-text")`.

    One request at a time: for more, start an endpoint.

    Args:
        model: a name on the Hub or a folder; or a model, and then its `processor` too.
    """

    def __init__(
        self,
        model: Any,
        *,
        processor: Any = None,
        device: str | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        from transformers import pipeline

        self.model = model if isinstance(model, str) else type(model).__name__
        self.sampling = sampling or Sampling()
        self._pipe = pipeline("image-text-to-text", model=model, processor=processor, device=device)
        self._turn = asyncio.Lock()

    async def ask(self, request: Request) -> Reply:
        """Answer one request, in another thread."""
        async with self._turn:
            return await asyncio.to_thread(self._answer, request)

    def _answer(self, request: Request) -> Reply:
        pictures = {str(i): picture for i, picture in enumerate(request.pictures)}
        names = iter(pictures)
        messages = [
            {"role": m["role"], "content": [_part(p, pictures) for p in _parts(m["content"])]}
            for m in request.messages(lambda picture: next(names))
        ]
        warm = self.sampling.temperature > 0
        out = self._pipe(
            text=messages,
            return_full_text=False,
            generate_kwargs={
                "max_new_tokens": self.sampling.max_tokens,
                "do_sample": warm,
                **({"temperature": self.sampling.temperature} if warm else {}),
            },
        )
        return Reply(out[0]["generated_text"])


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _part(part: dict[str, Any], pictures: Mapping[str, bytes]) -> dict[str, Any]:
    if part["type"] == "text":
        return part
    with Image.open(io.BytesIO(pictures[part["image_url"]["url"]])) as picture:
        return {"type": "image", "image": picture.convert("RGB")}


class Template:
    """The deterministic stand-in for organisms (see `template.py`): no model, no calls to pay."""

    model = "template"

    async def ask(self, request: Request) -> Reply:
        """Look at the pixels."""
        from examples.capimagine.template import answer

        return Reply(answer(request.messages(data_uri)))
