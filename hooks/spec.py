"""How a model family writes latent tokens, as data: one frozen `LatentSpec` per family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float

from imaginelens.hooks.answers import AnswerFinder
from imaginelens.hooks.errors import CheckpointError
from imaginelens.hooks.insertion import Insertion
from imaginelens.hooks.mixture import Mixture
from imaginelens.hooks.sketchpad import Cue, Sketcher

Token = str | int | None
Hidden = Float[torch.Tensor, "*cell d_model"]
Project = Callable[[Hidden, Bool[torch.Tensor, "*cell"]], Hidden]
Trigger = Literal["sampled", "forced", "prompt", "always"]

NO_TOKEN = -1  # in `SpanTokens`: the family has no such token
# The tokens without which a loop cannot tell where its spans are.
_NEEDED: Mapping[Trigger, tuple[str, ...]] = {
    "sampled": ("open", "close", "pad"),
    "forced": ("open", "close", "pad"),
    "prompt": ("pad",),
    "always": ("close",),
}


@dataclass(frozen=True)
class PromptStyle:
    """How a family's authors prompted it; only for texts that go through the chat template.

    Attributes:
        system: the system message; None leaves the template's own.
        suffix: what their evaluation put behind a multiple-choice question. It is never added for
            you, because it is wrong for any other question.
        reply: the text behind which the model writes, where it is not the template's own.
    """

    system: str | None = None
    suffix: str = ""
    reply: str | None = None


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """Which token opens a latent span, which closes it, what is fed back and for how many steps.

    Attributes:
        name: the family's name.
        open, close, pad: the span's tokens, as strings (looked up in the tokenizer) or ids; None
            where the family has none. `pad` stands in the token ids where a latent is fed.
        config_keys: config keys that hold the ids, tried after the strings.
        steps_key: the config key that sets `max_steps`, and what its value is multiplied by.
        trigger: who opens a span: the model by sampling `open` (`sampled`); the loop at generated
            position `forced_at` (`forced`); the user, who writes a `pad` into the prompt for each
            latent (`prompt`); or nobody, for generation begins inside a span (`always`).
        cue: a token behind which the loop opens a span as well.
        feeds: what is fed: the last hidden `state`; the placeholder's own `embedding`, a free
            variable for edits; or a `Mixture` of token embeddings.
        slot: `after`: the open token's embedding is consumed, z_0 goes into the next slot.
            `replace`: z_0 overwrites the open token's own slot.
        max_steps: the most latents of one span.
        budget: the most latents of a run, over all its spans; None is no such limit. A span that
            meets it ends there, and an open token sampled later opens nothing.
        fixed: always `max_steps` latents; a sampled close token does not end the span early.
        force_close: at the end of a span the close token is emitted, whatever was sampled.
        emit: what the token ids show inside a span: `pad`, or the tokens as `sampled`.
        reopens: an open token sampled inside a span ends it and opens the next (Mirage and what
            was made of its code); otherwise it is ignored like any other token.
        multi_span: whether a second span ends like the first (False reproduces Mirage's release,
            in which it never does).
        project: makes the fed embedding from the last hidden state (after the final norm), given
            the state and whether the input at its position was itself a latent: LVR's head skips
            the first latent of a span. A `Sketcher` makes it from all states of the span. None
            feeds the state as it is.
        project_unembeds: the output head reads the projected state as well.
        on_grid: latents have positions on the grid of the last picture, row by row, instead of
            those of text; the text goes on as behind a picture.
        criterion: ends a span by its state: True where the state that was read last is the end.
            That state has been fed by then. None is no such end.
        inserts: which image tokens come again before each placeholder of a prompt; None is none.
        extras: names, or beginnings of names, of weights that a checkpoint holds beside the model.
        equip: makes the spec of a checkpoint from this one, its config and those weights.
        prompt: how its authors prompted it.
        answer: finds the answer in what it writes, unless a user gives another finder.
        marks: config keys that only this family writes; they decide where strings do not.
        checkpoints: Hub ids of the family, which decide as well.

    >>> LatentSpec(name="mine", open="<lat>", close="</lat>", pad="<pad>", max_steps=4).slot
    'after'
    """

    name: str
    open: Token
    close: Token
    pad: Token
    max_steps: int
    config_keys: Mapping[str, str] | None = None
    steps_key: tuple[str, int] | None = None
    trigger: Trigger = "sampled"
    forced_at: int = 0
    cue: Cue | None = None
    feeds: Literal["state", "embedding"] | Mixture = "state"
    slot: Literal["after", "replace"] = "after"
    budget: int | None = None
    fixed: bool = False
    force_close: bool = True
    emit: Literal["pad", "sampled"] = "pad"
    reopens: bool = False
    multi_span: bool = True
    project: Project | Sketcher | None = None
    project_unembeds: bool = False
    on_grid: bool = False
    inserts: Insertion | None = None
    criterion: Callable[[Float[torch.Tensor, "row d_model"]], Bool[torch.Tensor, " row"]] | None = (
        None
    )
    extras: tuple[str, ...] = ()
    equip: Callable[["LatentSpec", Any, Mapping[str, torch.Tensor]], "LatentSpec"] | None = None
    prompt: PromptStyle = PromptStyle()
    answer: AnswerFinder | None = None
    marks: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ValueError(
                f"LatentSpec {self.name!r} has max_steps={self.max_steps}, expected 1 or more; "
                "for a model without latents pass spec=False"
            )
        if self.budget is not None and self.budget < 1:
            raise ValueError(
                f"LatentSpec {self.name!r} has budget={self.budget}, expected 1 or more; "
                "for a run without latents pass latents=il.Skip()"
            )
        if self.feeds == "embedding" and self.trigger != "prompt":
            raise ValueError(
                f"LatentSpec {self.name!r} feeds placeholders of the prompt and has "
                f"trigger={self.trigger!r}; set trigger='prompt'"
            )
        if self.inserts is not None and (self.trigger != "prompt" or self.feeds != "state"):
            raise ValueError(
                f"LatentSpec {self.name!r} inserts image tokens before placeholders of the prompt "
                f"and has trigger={self.trigger!r}, feeds={self.feeds!r}; set trigger='prompt', "
                "feeds='state'"
            )
        draws = isinstance(self.project, Sketcher)
        if draws and (self.project_unembeds or self.slot == "replace" or self.open is None):
            raise ValueError(
                f"LatentSpec {self.name!r} draws its latents, which begin behind an open token and "
                "are read by no output head; set slot='after', project_unembeds=False and open=..."
            )

    @property
    def kind(self) -> str:
        """What its latents are: `feedback` of states, a `mixture` of tokens, or `free` vectors."""
        if isinstance(self.feeds, Mixture):
            return "mixture"
        return "feedback" if self.feeds == "state" else "free"

    @property
    def looks_back(self) -> bool:
        """Whether more than the state before a latent decides what the loop feeds there."""
        return isinstance(self.project, Sketcher) or self.inserts is not None

    @property
    def placeholders(self) -> str:
        """What a user writes into a prompt for one span of `max_steps` latents.

        Raises:
            ValueError: the family's latents are not in the prompt, or its tokens are no strings.

        >>> from imaginelens.hooks import FAMILIES
        >>> FAMILIES["coconut"].with_steps(2).placeholders
        '<|start-latent|><|latent|><|latent|><|end-latent|>'
        """
        if self.trigger != "prompt" or not isinstance(self.pad, str):
            raise ValueError(
                f"the {self.name} family has no placeholders to write into a prompt "
                f"(trigger={self.trigger!r}, pad={self.pad!r})"
            )
        around = [token if isinstance(token, str) else "" for token in (self.open, self.close)]
        return around[0] + self.pad * self.max_steps + around[1]

    def with_steps(self, n: int) -> "LatentSpec":
        """The same family with another number of steps: of LVR 4, 8 and 16 are evaluated.

        >>> from imaginelens.hooks import FAMILIES
        >>> FAMILIES["lvr"].with_steps(4).max_steps
        4
        """
        return replace(self, max_steps=n)

    @property
    def strings(self) -> tuple[str, ...]:
        """Those of the span's tokens that are given as strings."""
        return tuple(t for t in (self.open, self.close, self.pad) if isinstance(t, str))

    def resolve(self, tokenizer: Any, config: Any) -> "SpanTokens":
        """Find the ids of the span's tokens: by string, then by config key, then as given.

        Raises:
            CheckpointError: a token is in neither the tokenizer nor the config.
        """
        ids = {part: self._token(part, tokenizer, config) for part in ("open", "close", "pad")}
        return SpanTokens(**ids)

    def _token(self, part: str, tokenizer: Any, config: Any) -> int:
        token: Token = getattr(self, part)
        if isinstance(token, int):
            return token
        if token is None and part not in _NEEDED[self.trigger]:
            return NO_TOKEN
        vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
        if token in vocabulary:
            return int(vocabulary[token])
        key = (self.config_keys or {}).get(part)
        value = None if key is None else getattr(config, key, None)
        if value is not None:
            return int(value)
        raise CheckpointError(
            f"the {self.name} family needs its {part} token: {token!r} is not in the tokenizer"
            f"{f' and {key!r} is not in the config' if key else ''}; "
            f"pass spec=dataclasses.replace(spec, {part}=<id>)"
        )


@dataclass(frozen=True)
class SpanTokens:
    """The token ids of a family's spans in one checkpoint; `NO_TOKEN` where it has none."""

    open: int
    close: int
    pad: int


@dataclass(frozen=True)
class Skip:
    """Loop control: the open token is never sampled, so no span opens; placeholders of a prompt are
    read as the tokens they are."""

    def applied_to(self, spec: LatentSpec | None) -> None:
        """A run without a family: nothing opens a span, a prompt that ends open included."""


@dataclass(frozen=True)
class Force:
    """Loop control: every span has exactly `steps` latents; with `at`, one opens at that generated
    position whatever the model would have written there. How a span closes stays the family's."""

    steps: int
    at: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Force({self.steps}) asks for no latents; use il.Skip() for that")

    def applied_to(self, spec: LatentSpec | None) -> LatentSpec:
        """The family's spec with this control in force."""
        if spec is None:
            raise CheckpointError(
                "il.Force needs a model with a latent family; pass spec=LatentSpec(...) to it"
            )
        if spec.trigger == "prompt":
            raise CheckpointError(
                f"il.Force({self.steps}) cannot add latents to the {spec.name} family, whose "
                f"prompt holds one {spec.pad!r} for each; write {self.steps} of them into it"
            )
        if self.at is not None and spec.open is None:
            raise CheckpointError(
                f"the {spec.name} family opens no spans that il.Force(at={self.at}) could place; "
                "leave `at` out"
            )
        forced = replace(
            spec, max_steps=self.steps, fixed=True, criterion=None, budget=None, multi_span=True
        )
        return forced if self.at is None else replace(forced, trigger="forced", forced_at=self.at)
