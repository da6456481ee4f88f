"""Latent Sketchpad's vision head: a sketch is drawn cell by cell, each from all that came before.

A head of a family like LVR sees one hidden state. This one sees every hidden state of the sketch so
far and every picture before it, so that it has a state of its own, made anew for each span.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import nn

from imaginelens.hooks.errors import CheckpointError, InputError

HEAD = "regression_head."


@dataclass(frozen=True)
class Cue:
    """A token behind which the loop opens a span: `after` places behind it, whatever is sampled.

    The count is that of Latent Sketchpad's release (`in_action` in model/uni_qwen.py): it runs on
    while it is not zero, and another cue counts as one more place.

    >>> Cue(token=7, after=3).opens([7, 1, 2]), Cue(token=7, after=3).opens([7, 1])
    (True, False)
    """

    token: int
    after: int

    def __post_init__(self) -> None:
        if self.after < 1:
            raise ValueError(
                f"Cue(after={self.after}) opens a span before its token; give 1 or more"
            )

    def opens(self, written: Sequence[int]) -> bool:
        """Whether the next token is the open token, by what was written so far."""
        count = 0
        for token in written:
            count += count > 0
            count = 0 if count == self.after + 1 else count
            count += token == self.token
        return count == self.after


class _FeedForward(nn.Sequential):
    """Norm, linear, GELU, linear; the dropout that comes fourth in its numbering does nothing."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__(
            nn.LayerNorm(width),
            nn.Linear(width, inner, bias=False),
            nn.GELU(),
            nn.Identity(),
            nn.Linear(inner, width, bias=False),
        )


class _Cross(nn.Module):
    """What is drawn looks at the pictures before it, and at what is drawn."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.context_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, context: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """Map (place, width) to what is added to it; `angles` are those of context and x."""
        x, context = self.norm(x), self.context_norm(context)
        key, value = self.to_kv(torch.cat([context, x])).chunk(2, dim=-1)
        return self.to_out(_attend(self.to_q(x), key, value, angles, self.heads))


class _Causal(nn.Module):
    """What is drawn looks at what was drawn before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """Map (place, width) to what is added to it."""
        query, key, value = self.to_qkv(self.norm(x)).chunk(3, dim=-1)
        return self.to_out(_attend(query, key, value, angles, self.heads))


class _Rotary(nn.Module):
    """Rotary angles, in the precision of the checkpoint: in bfloat16 far places share an angle."""

    inv_freq: torch.Tensor

    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.zeros(n))

    def forward(self, slots: Int[torch.Tensor, " place"]) -> torch.Tensor:
        freqs = slots.to(self.inv_freq)[:, None] * self.inv_freq
        return torch.cat([freqs, freqs], dim=-1)


class _Perceiver(nn.Module):
    def __init__(
        self,
        *,
        width: int,
        slots: int,
        heads: int,
        angles: int,
        inner: int,
        depths: tuple[int, int],
    ) -> None:
        super().__init__()
        self.pos_emb = nn.Embedding(slots, width)
        self.rotary_pos_emb = _Rotary(angles)
        self.perceive_layers = nn.ModuleList(
            nn.ModuleList([_Cross(width, heads), _FeedForward(width, inner)])
            for _ in range(depths[0])
        )
        self.layers = nn.ModuleList(
            nn.ModuleList([_Causal(width, heads), _FeedForward(width, inner)])
            for _ in range(depths[1])
        )

    def forward(self, x: torch.Tensor, slots: torch.Tensor, n_context: int) -> torch.Tensor:
        """Map (place, width), of which the first `n_context` are looked at only."""
        x = x + self.pos_emb(slots)
        angles = self.rotary_pos_emb(slots)
        context, x = x[:n_context], x[n_context:]
        for cross, feed in _pairs(self.perceive_layers):
            x = cross(x, context, angles) + x
            x = feed(x) + x
        for causal, feed in _pairs(self.layers):
            x = causal(x, angles[n_context:]) + x
            x = feed(x) + x
        return x


class SketchHead(nn.Module):
    """The vision head (model/uni_qwen.py, `RegressionHeadPerceiver`, and model/perceiver.py).

    An MLP makes the parts of one merged cell, four vision patches, from an embedding or a hidden
    state; a Perceiver reads the parts of the pictures and of the sketch so far.
    """

    def __init__(self, *, d_model: int, parts: int, perceiver: Mapping[str, object]) -> None:
        super().__init__()
        self.perceiver = _Perceiver(**perceiver)  # type: ignore[arg-type]
        self.parts = parts
        width = self.perceiver.pos_emb.embedding_dim
        self.mlp = nn.Sequential(
            nn.Linear(d_model, d_model), nn.GELU(), nn.Linear(d_model, parts * width)
        )

    def forward(
        self,
        images: Float[torch.Tensor, "cell d_model"],
        states: Float[torch.Tensor, "step d_model"],
        room: int,
    ) -> Float[torch.Tensor, "part d_vision"]:
        """The parts of the sketch's newest cell.

        Args:
            images: embeddings of all image tokens before the sketch.
            states: the hidden states that the sketch is drawn from, the newest last.
            room: how many image tokens there are places for; they are filled from the end, and the
                release masks the others.
        """
        x = self.mlp(torch.cat([images, states]))
        x = x.reshape(-1, self.perceiver.pos_emb.embedding_dim)
        first, stop = (room - len(images)) * self.parts, (room + len(states)) * self.parts
        slots = torch.arange(first, stop, device=x.device)
        out: torch.Tensor = self.perceiver(x, slots, len(images) * self.parts)
        return out[-self.parts :]


@dataclass(frozen=True, eq=False)
class Sketcher:
    """Draws the latents of a span with a head that remembers: `LatentSpec.project` of a family
    whose head sees more than one state.

    Attributes:
        room: how many image tokens the head can look back at: 16 pictures of 256 in the release.
    """

    head: SketchHead
    room: int = 4096

    def begin(self, images: Float[torch.Tensor, "cell d_model"], merger: nn.Module) -> "Sketch":
        """A new sketch.

        Args:
            images: embeddings of all image tokens before it, earlier sketches included.
            merger: the model's own, which makes one token of a cell's parts.

        Raises:
            InputError: there are more image tokens than the head can look back at.
        """
        if len(images) > self.room:
            raise InputError(
                f"there are {len(images)} image tokens before a sketch, and its head can look back "
                f"at {self.room}; give fewer pictures, or write fewer tokens"
            )
        return Sketch(self, images, merger)


@dataclass(eq=False)
class Sketch:
    """One sketch while it is drawn: the state of one row and span."""

    sketcher: Sketcher
    images: Float[torch.Tensor, "cell d_model"]
    merger: nn.Module
    states: list[torch.Tensor] = field(default_factory=list)

    def draw(self, h: Float[torch.Tensor, " d_model"]) -> Float[torch.Tensor, " d_model"]:
        """The next latent, from the last hidden state and all that came before it."""
        self.states.append(h)
        with torch.no_grad():
            parts = self.sketcher.head(self.images, torch.stack(self.states), self.sketcher.room)
            return self.merger(parts)[0].to(h)


def build_sketch_head(weights: Mapping[str, torch.Tensor], heads: int) -> SketchHead:
    """Make the head from its weights, whose names begin with `regression_head.`.

    Args:
        heads: attention heads, which the weights do not tell: those of the vision tower.

    Raises:
        CheckpointError: the weights are not those of this head.
    """
    own = {k.removeprefix(HEAD): v for k, v in weights.items() if k.startswith(HEAD)}
    try:
        d_mlp, d_model = own["mlp.2.weight"].shape
        slots, width = own["perceiver.pos_emb.weight"].shape
        angles = len(own["perceiver.rotary_pos_emb.inv_freq"])
        inner = len(own["perceiver.layers.0.1.1.weight"])
    except KeyError as missing:
        raise CheckpointError(
            f"the vision head of latent-sketchpad has no weight {HEAD}{missing.args[0]}; of "
            f"{HEAD}* there are {len(own)} weights, so open the folder that its training wrote"
        ) from missing
    depths = tuple(
        len({name.split(".")[2] for name in own if name.startswith(f"perceiver.{part}.")})
        for part in ("perceive_layers", "layers")
    )
    head = SketchHead(
        d_model=d_model,
        parts=d_mlp // width,
        perceiver={
            "width": width, "slots": slots, "heads": heads, "angles": angles, "inner": inner,
            "depths": depths,
        },
    )  # fmt: skip
    like = own["mlp.2.weight"]
    head = head.to(like.device, like.dtype).eval().requires_grad_(False)
    try:
        head.load_state_dict(own)
    except RuntimeError as error:
        found = " ".join(str(error).split())
        raise CheckpointError(f"the weights {HEAD}* do not fit their head: {found}") from error
    return head


def _pairs(layers: nn.ModuleList) -> Iterator[tuple[nn.Module, nn.Module]]:
    for layer in layers:
        assert isinstance(layer, nn.ModuleList)
        attention, feed = layer
        yield attention, feed


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    angles: torch.Tensor,
    heads: int,
) -> torch.Tensor:
    """Causal attention of the last places, (place, width), over all of them."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in (query, key, value))
    q = _rotated(q * q.shape[-1] ** -0.5, angles[-len(query) :])
    scores = q @ _rotated(k, angles).transpose(1, 2)
    seen = torch.ones_like(scores[0], dtype=torch.bool).tril(len(key) - len(query))
    pattern = scores.masked_fill(~seen, -torch.finfo(scores.dtype).max).softmax(-1)
    return (pattern @ v).transpose(0, 1).flatten(1)


def _rotated(t: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotary positions on the first entries of each head, (head, place, d_head)."""
    n = angles.shape[-1]
    turned, rest = t[..., :n], t[..., n:]
    left, right = turned.chunk(2, dim=-1)
    turned = turned * angles.cos() + torch.cat([-right, left], dim=-1) * angles.sin()
    return torch.cat([turned, rest], dim=-1)
