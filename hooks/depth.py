"""Depth recurrence: models that think by running their core blocks many times in one forward.

Prelude blocks make embeddings e of the tokens; a state x, random at first, becomes
core(adapter([x, e])) once per recurrence; coda blocks make logits of the last x. The unrolled depth
is the layer axis here: `blocks.{i}` counts the blocks as they are run, each recurrence anew, and
`recurrences.{r}.hook_state` is the state that enters recurrence r.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import nn
from transformers import PreTrainedModel

from imaginelens.hooks.answers import AnswerFinder
from imaginelens.hooks.entries import Chunk
from imaginelens.hooks.errors import CheckpointError, InputError, SiteUnavailable
from imaginelens.hooks.padding import hidden_padding
from imaginelens.hooks.registering import PARTS, registered
from imaginelens.hooks.sites import STATE, Site, SiteTable, find_sites
from imaginelens.hooks.spec import PromptStyle
from imaginelens.hooks.structure import Block, Structure

FIRST = "recurrences.0.hook_state"
_OURS = {  # arguments of its forwards, and how else to get what they are for
    "num_steps": "wrap the model with lens.family.with_steps(n) as its spec",
    "input_states": f"edit {FIRST!r} instead",
}


@dataclass(frozen=True, kw_only=True)
class DepthSpec:
    """How a family recurs in depth: where its parts are, how often it recurs, how it begins.

    Attributes:
        name: the family's name.
        model_types: the types of config by which it is recognised.
        embed: path of the token embedding, which the head is tied to.
        prelude, core, coda: paths of its lists of blocks.
        adapter: path of the module that is given [x, e] and makes the input of the core.
        final_norm: path of the norm behind the last recurrence and, once more, behind the coda.
        parts: paths within a block, as in `il.register_structure`; `mid` is the module whose
            output is the stream between attention and MLP.
        steps_key: the config key of the number of recurrences.
        spread: of the initial state, from the config: the standard deviation of the normal
            distribution that is cut at three of them.
        steps: the number of recurrences; None is the config's. Set it with `.with_steps(n)`.
        seed: of the initial states; another seed draws others. Set it with `.with_seed(n)`.
        prompt, answer, checkpoints: as in `il.LatentSpec`.

    Raises:
        ValueError: fewer than one recurrence.

    >>> from imaginelens.hooks import FAMILIES
    >>> FAMILIES["huginn"].with_steps(4).with_seed(1).seed
    1
    """

    name: str
    model_types: tuple[str, ...]
    embed: str
    prelude: str
    core: str
    coda: str
    adapter: str
    final_norm: str
    parts: Mapping[str, str]
    steps_key: str
    spread: Callable[[Any], float]
    steps: int | None = None
    seed: int = 0
    prompt: PromptStyle = field(default_factory=PromptStyle)
    answer: AnswerFinder | None = None
    checkpoints: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(
                f"DepthSpec {self.name!r} has steps={self.steps}, expected 1 recurrence or more"
            )

    @property
    def kind(self) -> str:
        """What its latents are: states along the `depth`."""
        return "depth"

    @property
    def strings(self) -> tuple[str, ...]:
        """The family's own tokens: it has none."""
        return ()

    def with_steps(self, n: int) -> "DepthSpec":
        """The same family with another number of recurrences."""
        return replace(self, steps=n)

    def with_seed(self, n: int) -> "DepthSpec":
        """The same family with other initial states."""
        return replace(self, seed=n)


@dataclass(frozen=True)
class Depth:
    """One model of such a family: its unrolled structure, and what its forwards are given.

    Attributes:
        steps: the number of recurrences.
        first: the number of the first core block, which is that of the prelude's blocks.
        per_step: blocks of one recurrence.
    """

    spec: DepthSpec
    structure: Structure
    steps: int
    first: int
    per_step: int
    spread: float

    def sites(self, model: PreTrainedModel) -> SiteTable:
        """Every site of the unrolled model, and the states between its recurrences."""
        table = find_sites(model, self.structure)
        last = "ln_final.hook_normalized"
        table.sites[last] = replace(table[last], call=1)  # the first is behind the recurrences
        table.sites.pop("hook_latent")
        table.unavailable["hook_latent"] = (
            f"{self.spec.name} feeds nothing back, its latents are states along the depth; name "
            f"one of {FIRST!r} to 'recurrences.{self.steps}.hook_state'"
        )
        for r in range(self.steps + 1):
            name, layer = STATE.name.format(r=r), self.first + r * self.per_step
            place = (self.spec.adapter, STATE, r)
            if r == self.steps:  # what leaves the last one
                place = (self.spec.final_norm, replace(STATE, slot="input"), 0)
            path, kind, call = place
            table.sites[name] = Site(name, path, kind, layer=layer, call=call)
        return table

    def given(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], chunk: Chunk
    ) -> dict[str, Any]:
        """What a forward over these columns is given: its initial states, and all recurrences with
        gradients. Positions are columns, for rotary attention reads only their differences, and
        the mask is left out, for it is ignored (see `hidden`).

        Raises:
            InputError: the user has given some of this.
        """
        for name in _OURS.keys() & inputs.keys():
            raise InputError(
                f"{name!r} was given, which this library gives to each forward of the "
                f"{self.spec.name} family; {_OURS[name]}"
            )
        ids = inputs["input_ids"]
        columns = torch.arange(chunk.start, chunk.stop, device=ids.device)
        own = {name: v for name, v in inputs.items() if name != "attention_mask"}
        return own | {
            "position_ids": columns[None],
            "num_steps": (0, self.steps),
            "input_states": self.initial(chunk).to(ids.device, model.dtype),
        }

    def initial(self, chunk: Chunk) -> Float[torch.Tensor, "example position d_model"]:
        """The initial states of some columns: drawn as the model draws them, but each from a
        stream of its own, keyed by the seed, the example and the position in its row."""
        width, tokens = self.structure.d_model, chunk.tokens
        states = torch.zeros(len(tokens), chunk.stop - chunk.start, width, dtype=torch.float64)
        for row, key in enumerate(tokens.keys):
            start = tokens.start(row)
            for column in range(max(start, chunk.start), chunk.stop):
                _draw(states[row, column - chunk.start], self.spec.seed, key, column - start)
        return states * self.spread

    @contextmanager
    def hidden(self, chunk: Chunk) -> Iterator[None]:
        """Hide left padding, which a class of this family does not mask, from one forward."""
        with hidden_padding([chunk.tokens.start(row) for row in range(len(chunk.tokens))]):
            yield

    @contextmanager
    def by_token(self, model: PreTrainedModel) -> Iterator[None]:
        """Have `generate` prepare a model's inputs with the cache that its own forward makes; its
        class asks for `cache_position`, which transformers no longer gives."""
        model.prepare_inputs_for_generation = _next_inputs
        try:
            yield
        finally:
            del model.prepare_inputs_for_generation

    def lines(self) -> Iterator[str]:
        """What the depth axis is, in words."""
        core = self.first, self.first + self.steps * self.per_step - 1
        yield (
            f"depth: {self.steps} recurrences of {self.per_step} blocks within each forward, "
            f"unrolled as blocks.{core[0]} to blocks.{core[1]}; recurrences.{{r}}.hook_state is "
            f"the state that enters recurrence r, and leaves the last at r = {self.steps}"
        )
        yield (
            f"initial states are drawn by this library, by seed ({self.spec.seed}), example and "
            "position, as the model would draw them anew in every forward"
        )


def unrolled(model: PreTrainedModel, spec: DepthSpec) -> Depth:
    """Find the parts of a model that recurs in depth, and lay out its blocks as they are run.

    Raises:
        SiteUnavailable: a part is not where the family has it.
        CheckpointError: the config does not say how often it recurs, and the spec neither.
    """
    config = model.config
    steps = spec.steps or getattr(config, spec.steps_key, None)
    if steps is None:
        raise CheckpointError(
            f"the config of {type(model).__name__} has no {spec.steps_key!r}, so that the number "
            f"of its recurrences is not known; pass spec=il.FAMILIES[{spec.name!r}].with_steps(n)"
        )
    prelude, core, coda = (_listed(model, spec, p) for p in (spec.prelude, spec.core, spec.coda))
    for path in (spec.embed, spec.adapter, spec.final_norm):
        _part(model, spec, path)
    recurring = [replace(block, call=r) for r in range(int(steps)) for block in core]
    head = model.get_output_embeddings()
    heads = [path for path, module in model.named_modules() if module is head]
    structure = Structure(
        decoder=spec.core.rpartition(".")[0],
        embed=spec.embed,
        blocks=(*prelude, *recurring, *coda),
        final_norm=spec.final_norm,
        head=heads[0],
        vision=None,
        vision_blocks=(),
        projector=None,
        image_token_id=None,
        d_model=int(config.hidden_size),
        n_heads=int(config.num_attention_heads),
        n_kv_heads=int(getattr(config, "num_key_value_heads", config.num_attention_heads)),
        d_vocab=head.out_features,
        windowed=False,
    )
    return Depth(spec, structure, int(steps), len(prelude), len(core), spec.spread(config))


def _listed(model: PreTrainedModel, spec: DepthSpec, path: str) -> list[Block]:
    """The blocks of one of the model's lists."""
    of_type = registered(model.config.model_type)
    parts = {**spec.parts, **{n: p for n, p in of_type.items() if n in PARTS}}
    blocks = dict(_part(model, spec, path).named_children())
    found = []
    for name in blocks:
        own: dict[str, Any] = dict.fromkeys(PARTS)
        own |= {part: f"{path}.{name}.{inside}" for part, inside in parts.items()}
        for inside in filter(None, own.values()):
            _part(model, spec, inside)
        found.append(Block(f"{path}.{name}", **own, mid_leaves=True))
    return found


def _part(model: PreTrainedModel, spec: DepthSpec, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise SiteUnavailable(
            f"{type(model).__name__} has no {path!r}, which models of the {spec.name} family "
            "have; pass spec=False if it is none, or a DepthSpec with its own paths"
        ) from None


def _draw(state: torch.Tensor, seed: int, key: str, position: int) -> None:
    """Fill one state from the standard normal distribution, cut at three."""
    stream = hashlib.blake2b(f"{seed}/{key}/{position}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(stream, "big") >> 1)
    nn.init.trunc_normal_(state, a=-3.0, b=3.0, generator=generator)


def _next_inputs(
    input_ids: torch.Tensor,
    *,
    past_key_values: Any = None,
    is_first_iteration: bool = False,
    next_sequence_length: int | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """What of the ids has not been read yet, and the cache of what has."""
    cache = None if is_first_iteration else past_key_values
    read = 0 if cache is None else cache.get_seq_length()
    return {**kwargs, "input_ids": input_ids[:, read:], "past_key_values": cache}
