"""Models with a planted mechanism: real, generating, looping, and with effects known exactly.

`planted(kind)` gives a Llama whose weights are written by hand, wrapped as a `LatentModel`, pairs
of inputs for it, and what every estimator must find. The input is one number x, held by a token of
the prompt. The model opens a span, feeds back the latents z_1 = step(x, 0), z_{t+1} = step(x, z_t),
closes it and answers "A" or "B" with logit(B) - logit(A) = y = answer(x, z_1, ..., z_T), which is
`il.logit_diff` of base answer "A" and source answer "B". All other logits are 10,000 lower.

Attention, rotary positions, cache and masks are those of transformers. Scores are so large that
from the number on each head puts exactly 1.0 on one position, so values are copied, not mixed (in
sequences up to 300 positions). The norms of the blocks are identities and the two MLPs compute
`step` and `answer`:

    block 0   attention copies x to every position; the MLP writes the next latent
    block 1   attention copies z_1, ..., z_T to the position before the answer; the MLP writes y
    norm      moves the next latent to where a latent is read from; the rest of z is 0

The truth is computed by the recursion above, in numpy, without the model.

>>> p = planted("bilinear", xs0=[0.0], xs1=[1.0])
>>> {name: round(p.truth[name].item(), 6) for name in ("te", "pnde", "tnie", "int_med")}
{'te': 3.425, 'pnde': 1.225, 'tnie': 2.2, 'int_med': 0.6}
>>> p.lens.run(p.pairs.base[0]).text
'<|latent_start|><|latent_pad|><|latent_end|>B<eos>'
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial, wraps
from itertools import accumulate, pairwise, permutations
from typing import Any, Literal

import numpy as np
import tiny
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import imaginelens as il
from imaginelens.hooks.positions import Positions

Context = Literal["free", "fixed"]
Direction = Literal["denoise", "noise"]
XS0, XS1 = (0.0, 0.25, -0.5, 0.125), (1.0, 1.5, 0.75, 2.0)
LATENT_START, LATENT_END, LATENT_PAD = tiny.LATENT
SHARP = 1e8  # of attention scores: what a head does not look at gets a weight of exactly 0.0
LOW = 1e4  # how far below the chosen logits all others are
HEAD_DIM = 8
COS, SIN, CONTENT = 0, 4, 3  # of a head: a pair that turns with the position, one that does not


# --- mechanisms ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mechanism:
    """What a planted model computes; both functions take tensors and arrays alike.

    Attributes:
        step: the next latent (..., width) of x (..., 1) and the latent before it.
        answer: y (..., 1) of x (..., 1) and all latents (..., width).
        steps: T, how many latents are fed back.
        masked: whether every head that would read a latent looks at its own position instead, so
            that `answer` sees zeros whatever is fed back.
    """

    step: Callable[[Any, Any], Any]
    answer: Callable[..., Any]
    steps: int = 1
    width: int = 1
    masked: bool = False


def times(v: Any, matrix: np.ndarray) -> Any:
    """v @ matrix, for a tensor as for an array."""
    return v @ (torch.as_tensor(matrix).to(v) if isinstance(v, torch.Tensor) else matrix)


def sigmoid(v: Any) -> Any:
    return 1 / (1 + math.e**-v)


def smaller(v: Any, w: Any) -> Any:
    return (v + w - abs(v - w)) / 2


CHAIN_A = np.array([[0.5, -0.3], [0.8, 0.25]])  # z_{t+1} = A z_t + B x
CHAIN_B = np.array([1.0, -0.5])
CHAIN_C = np.array([[0.7, 0.2], [-0.4, 1.1], [0.9, 0.6]])  # y = d x + sum_t C_t z_t - 1.2
CHAIN_D = 2.0
CHAIN = Mechanism(
    step=lambda x, z: times(z, CHAIN_A.T) + times(x, CHAIN_B[None]),
    answer=lambda x, *zs: (
        CHAIN_D * x + sum(times(z, c[:, None]) for z, c in zip(zs, CHAIN_C, strict=True)) - 1.2
    ),
    steps=3,
    width=2,
)


def _random(steps: int = 2, width: int = 3, hidden: int = 5) -> Mechanism:
    """Random networks for `step` and `answer`: nothing is known of them but the identities."""
    draw = np.random.default_rng(0).normal
    into, back = draw(size=(1, width)), draw(size=(width, width))
    of_x, of_z = draw(size=(1, hidden)), draw(size=(steps, width, hidden))
    out = -3 * draw(size=(hidden, 1))

    def answer(x: Any, *zs: Any) -> Any:
        units = times(x, of_x) + sum(times(z, w) for z, w in zip(zs, of_z, strict=True))
        return times(sigmoid(2 * units), out) + 2

    return Mechanism(
        step=lambda x, z: 2 * sigmoid(2 * times(x, into) + times(z, back)) - 1,
        answer=answer,
        steps=steps,
        width=width,
    )


MECHANISMS: Mapping[str, Mechanism] = {
    "linear": Mechanism(
        step=lambda x, z: 0.1 + 2 * x,
        answer=lambda x, z: 0.7 * x + 1.3 * z - 1,
    ),
    "bilinear": Mechanism(
        step=lambda x, z: 0.3 + 0.8 * x,
        answer=lambda x, z: 0.5 + x + 2 * z + 0.75 * x * z,
    ),
    "and_gate": Mechanism(
        step=lambda x, z: x,
        answer=lambda x, z1, z2: smaller(z1, z2) - 0.5,
        steps=2,
    ),
    "or_gate": Mechanism(
        step=lambda x, z: x,
        answer=lambda x, z1, z2: -smaller(-z1, -z2) - 0.5,
        steps=2,
    ),
    "chain": CHAIN,
    "saturating": Mechanism(
        step=lambda x, z: 10 * x - 5,
        answer=lambda x, z: sigmoid(2 * z) - 0.5,
    ),
    "cancelling": Mechanism(
        step=lambda x, z: x,
        answer=lambda x, z1, z2: 0.5 * x + z1 - z2 - 0.25,
        steps=2,
    ),
    "fully_mediated": Mechanism(
        step=lambda x, z: x,
        answer=lambda x, z: 3 * z + z * z - 1,
    ),
    "masked": replace(CHAIN, masked=True),
    "random": _random(),
}
KINDS = tuple(MECHANISMS)


# --- the model ----------------------------------------------------------------------------------


class Registers(dict[str, slice]):
    """Which dimensions of the residual stream hold what."""

    def __init__(self, mechanism: Mechanism) -> None:
        sizes = dict.fromkeys(
            ("x", "is_value", "is_question", "is_close", "is_answer", "x_read", "y"), 1
        )
        sizes["z"] = sizes["next"] = mechanism.width
        sizes["z_read"] = mechanism.steps * mechanism.width
        ends = accumulate(sizes.values(), initial=0)
        super().__init__(zip(sizes, (slice(*edge) for edge in pairwise(ends)), strict=True))
        self.size = HEAD_DIM * (1 + mechanism.steps)  # some are left over; nothing reads them


class Writes(nn.Module):
    """An MLP by hand: it adds a function of the stream to one register."""

    def __init__(self, fn: Callable[[torch.Tensor], torch.Tensor], to: slice) -> None:
        super().__init__()
        self.fn, self.to_register = fn, to

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        to = self.to_register
        return nn.functional.pad(self.fn(h), (to.start, h.shape[-1] - to.stop))


class PlantedModel(LlamaForCausalLM):
    """A Llama in float64 whose every weight is written by hand to compute a mechanism.

    Args:
        numbers: by token id, the x that a token holds.
    """

    def __init__(
        self, mechanism: Mechanism, tok: PreTrainedTokenizerFast, numbers: Mapping[int, float]
    ) -> None:
        registers = Registers(mechanism)
        config = LlamaConfig(
            **tiny.text_config(
                tok,
                hidden_size=registers.size,
                num_hidden_layers=2,
                num_attention_heads=1 + mechanism.steps,
                num_key_value_heads=1,
                head_dim=HEAD_DIM,
                attention_bias=True,
                tie_word_embeddings=False,
                # position turns the first pair of a head's dimensions by 1 radian, the last by none
                rope_parameters={"rope_type": "default", "rope_theta": 1e30},
            )
        )
        super().__init__(config)
        self.mechanism, self.registers = mechanism, registers
        self.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id
        )
        self.model.norm = nn.Linear(registers.size, registers.size, bias=False)
        for block in self.model.layers:
            block.input_layernorm, block.post_attention_layernorm = nn.Identity(), nn.Identity()
        self.model.layers[0].mlp = Writes(self._next, registers["next"])
        self.model.layers[1].mlp = Writes(self._y, registers["y"])
        self.double().eval()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self._write_tokens(tok, numbers)
            for block in self.model.layers:
                self._write_attention(block.self_attn)
            self._write_what_attention_copies()
            self._write_norm()

    @wraps(LlamaForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # the kernel that keeps its weights for the backward pass: computed again from such scores,
        # as others do, they are off by 1e-8 on some processors
        with sdpa_kernel(SDPBackend.MATH):
            return super().forward(*args, **kwargs)

    def _next(self, h: torch.Tensor) -> torch.Tensor:
        at = self.registers
        return self.mechanism.step(h[..., at["x_read"]], h[..., at["z"]])

    def _y(self, h: torch.Tensor) -> torch.Tensor:
        at = self.registers
        zs = h[..., at["z_read"]].unflatten(-1, (self.mechanism.steps, -1)).unbind(-2)
        return h[..., at["is_close"]] * self.mechanism.answer(h[..., at["x_read"]], *zs)

    def _write_tokens(self, tok: PreTrainedTokenizerFast, numbers: Mapping[int, float]) -> None:
        """Numbers hold their x; the tokens that the model goes on from say what follows them."""
        at, embed, head = self.registers, self.model.embed_tokens.weight, self.lm_head.weight
        question, a, b = tok.convert_tokens_to_ids(["?", "A", "B"])
        begin, end = tok.convert_tokens_to_ids([LATENT_START, LATENT_END])
        for token, x in numbers.items():
            embed[token, at["x"]] = x
            embed[token, at["is_value"]] = 1
        for mark, tokens, followed_by in (
            ("is_question", [question], [begin]),
            ("is_close", [end], [a, b]),
            ("is_answer", [a, b], [tok.eos_token_id]),
        ):
            embed[tokens, at[mark]] = 1
            head[:, at[mark]] = -LOW
            head[followed_by, at[mark]] = 0
        head[end, at["is_question"]] = -LOW / 2  # what a run without latents goes on with
        head[b, at["y"]] = 1

    def _write_attention(self, attention: nn.Module) -> None:
        """Head 0 looks at the number, head t at the position where z_t is read from the close
        token: a query by its bias, whose angle is the distance (negative: back)."""
        at, steps = self.registers, self.mechanism.steps
        query = attention.q_proj.bias.view(1 + steps, HEAD_DIM)
        query[0, CONTENT] = SHARP
        for t in range(1, 1 + steps):
            back = 0 if self.mechanism.masked else steps + 1 - t
            query[t, COS], query[t, SIN] = SHARP * math.cos(back), -SHARP * math.sin(back)
        attention.k_proj.bias[COS] = 1
        attention.k_proj.weight[CONTENT, at["is_value"]] = 1
        attention.v_proj.weight[:1, at["x"]] = 1
        _copy(attention.v_proj.weight[1:, at["z"]])

    def _write_what_attention_copies(self) -> None:
        first, second = (
            b.self_attn.o_proj.weight.unflatten(1, (-1, HEAD_DIM)) for b in self.model.layers
        )
        first[self.registers["x_read"], 0, 0] = 1
        z_read = second[self.registers["z_read"]].unflatten(0, (self.mechanism.steps, -1))
        for t in range(self.mechanism.steps):
            _copy(z_read[t, :, 1 + t, 1:])

    def _write_norm(self) -> None:
        """The last hidden state holds the next latent where a latent is read, and nothing else."""
        at, weight = self.registers, self.model.norm.weight
        for register in ("y", "is_question", "is_close", "is_answer"):
            weight[at[register], at[register]] = 1
        _copy(weight[at["z"], at["next"]])


def _copy(weight: torch.Tensor) -> None:
    """Make a view of a weight the identity, as far as it reaches."""
    weight.fill_diagonal_(1)


NUMBER = il.text.find("<")  # the token that holds x
CLOSE = il.text.find(LATENT_END)  # il.before_answer, which is not known yet in free context
# What makes which world of a base when the source's states are put there: in free and fixed context
WORLDS: Mapping[tuple[str, Positions], tuple[str, str]] = {
    ("hook_embed", NUMBER): ("y11", "y10"),
    ("blocks.0.hook_resid_pre", NUMBER): ("y11", "y10"),
    ("blocks.0.attn.hook_v", NUMBER): ("y11", "y10"),
    ("blocks.0.hook_resid_mid", NUMBER): ("y00", "y00"),  # x has been read by then
    ("blocks.0.hook_resid_pre", il.latent): ("y01", "y01"),
    ("blocks.0.hook_resid_post", il.latent): ("y01", "y01"),
    ("blocks.1.attn.hook_v", il.latent): ("y01", "y01"),
    ("blocks.0.attn.hook_z", CLOSE): ("y10", "y10"),
    ("blocks.0.hook_resid_post", CLOSE): ("y10", "y10"),
    ("blocks.1.hook_attn_out", CLOSE): ("y01", "y01"),
    ("blocks.1.hook_resid_mid", CLOSE): ("y11", "y11"),
    ("blocks.1.hook_mlp_out", CLOSE): ("y11", "y11"),
    ("ln_final.hook_normalized", CLOSE): ("y11", "y11"),
    ("unembed.hook_out", CLOSE): ("y11", "y11"),
}


# --- the truth ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Planted:
    """A planted model, pairs for it, and what is true of them.

    Attributes:
        x0, x1: the numbers of the base and the source inputs, (pair, 1).
    """

    kind: str
    mechanism: Mechanism
    lens: il.LatentModel
    pairs: il.Pairs
    x0: np.ndarray
    x1: np.ndarray

    def latents(self, x: np.ndarray) -> np.ndarray:
        """Z(x): (pair, step, width), in the register that `latents_of` cuts out of a run's."""
        return self._loop(x, lambda t, z: self.mechanism.step(x, z))

    def latents_of(self, run: il.Run) -> np.ndarray:
        """What a run fed back, (example, step, width); all its other dimensions must be 0."""
        at = self.lens.model.registers["z"]
        fed = run.latents.numpy()
        assert not np.delete(fed, at, axis=-1).any()
        return fed[..., at]

    def y(self, x: np.ndarray, zs: np.ndarray) -> np.ndarray:
        """Y(x, z) of x (pair, 1) and z (pair, step, width): one value per pair."""
        seen = np.zeros_like(zs) if self.mechanism.masked else zs
        return self.mechanism.answer(x, *seen.swapaxes(0, 1))[:, 0]

    def edited(
        self, steps: Collection[int], *, context: Context, direction: Direction = "denoise"
    ) -> np.ndarray:
        """y of each pair with the latents at some steps (from 0) exchanged.

        denoise: the base runs and receives the source's. noise: the source runs and receives the
        base's. In free context latents behind an exchanged one follow from it; in fixed context
        they stay as they were.
        """
        x, other = (self.x0, self.x1) if direction == "denoise" else (self.x1, self.x0)
        given, own = self.latents(other), self.latents(x)

        def feed(t: int, z: np.ndarray) -> np.ndarray:
            if t in steps:
                return given[:, t]
            return own[:, t] if context == "fixed" else self.mechanism.step(x, z)

        return self.y(x, self._loop(x, feed))

    def _loop(self, x: np.ndarray, feed: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
        fed = [np.zeros((len(x), self.mechanism.width))]
        for t in range(self.mechanism.steps):
            fed.append(feed(t, fed[-1]))
        return np.stack(fed[1:], axis=1)

    @cached_property
    def truth(self) -> dict[str, np.ndarray]:
        """One value per pair, or (pair, step).

        Worlds: `y00 y11 y10 y01` with y10 = Y(x1, Z(x0)), and `c0 c1` with all latents zero.
        Effects: `te pnde tnde pnie tnie`, `cde int_ref int_med` at zero latents.
        Shares, of means: `prop_mediated` TNIE/TE, `prop_eliminated` 1 - CDE/TE.
        Steps: `{single,ordered,shapley}_{free,fixed}_{denoise,noise}`, effects of exchanging step t
        alone, after the steps before it, and averaged over all orders. Ordered and Shapley sum to
        PNIE (denoise) and -TNIE (noise). `telescope` is what z_t adds to Y(x1, z) when z_1 to z_T
        go from Z(x0) to Z(x1) one after another; it sums to TNIE.
        """
        z0, z1 = self.latents(self.x0), self.latents(self.x1)
        y00, y11 = self.y(self.x0, z0), self.y(self.x1, z1)
        y10, y01 = self.y(self.x1, z0), self.y(self.x0, z1)
        c0, c1 = self.y(self.x0, 0 * z0), self.y(self.x1, 0 * z1)
        te, cde = y11 - y00, c1 - c0
        found = {"y00": y00, "y11": y11, "y10": y10, "y01": y01, "c0": c0, "c1": c1}
        found |= {"te": te, "pnde": y10 - y00, "tnde": y11 - y01}
        found |= {"pnie": y01 - y00, "tnie": y11 - y10, "cde": cde}
        found |= {"int_ref": y10 - y00 - cde, "int_med": y11 - y10 - y01 + y00}
        with np.errstate(divide="ignore", invalid="ignore"):
            found["prop_mediated"] = (y11 - y10).mean() / te.mean()
            found["prop_eliminated"] = 1 - cde.mean() / te.mean()
        return found | self._by_step()

    def _by_step(self) -> dict[str, np.ndarray]:
        steps = range(self.mechanism.steps)
        found = {}
        for context in ("free", "fixed"):
            for direction in ("denoise", "noise"):
                value = partial(self.edited, context=context, direction=direction)
                single = [value([t]) - value([]) for t in steps]
                orders = [_increments(value, order) for order in permutations(steps)]
                kind = f"{context}_{direction}"
                found[f"single_{kind}"] = np.stack(single, axis=1)
                found[f"ordered_{kind}"] = orders[0]
                found[f"shapley_{kind}"] = np.mean(orders, axis=0)
        # from Y(x1, Z(x0)): the source's latents come back from the first on
        kept = [steps[t:] for t in range(len(steps) + 1)]
        restored = [self.edited(k, context="fixed", direction="noise") for k in kept]
        found["telescope"] = np.diff(restored, axis=0).T
        return found


def _increments(value: Callable[[Sequence[int]], np.ndarray], order: Sequence[int]) -> np.ndarray:
    """What each step, (pair, step), adds to those before it in an order."""
    values = [value(order[:n]) for n in range(len(order) + 1)]
    return np.diff(values, axis=0)[np.argsort(order)].T


# --- making one ---------------------------------------------------------------------------------


def planted(kind: str, *, xs0: Sequence[float] = XS0, xs1: Sequence[float] = XS1) -> Planted:
    """Make the planted model of a kind (one of `KINDS`), with a pair for each x0 and x1.

    By default the first pair goes from 0 to 1, and base inputs answer A (y < 0) and source inputs
    B in all kinds but `bilinear`, whose numbers are the published ones. The two prompts of a pair
    have equal lengths, those of different pairs have not.
    """
    mechanism = MECHANISMS[kind]
    xs = [float(x) for x in (*xs0, *xs1)]
    marks = {f"<{x}>": x for x in xs}
    tok = tiny.tokenizer(*marks, bos=False)
    numbers = dict(zip(tok.convert_tokens_to_ids(list(marks)), marks.values(), strict=True))
    spec = il.LatentSpec(
        name="planted",
        open=LATENT_START,
        close=LATENT_END,
        pad=LATENT_PAD,
        max_steps=mechanism.steps,
        fixed=True,
    )
    base, source = (
        [{"text": f"{'so ' * (i % 3)}x is <{float(x)}>?"} for i, x in enumerate(half)]
        for half in (xs0, xs1)
    )
    return Planted(
        kind,
        mechanism,
        il.LatentModel(PlantedModel(mechanism, tok, numbers), tok, spec),
        il.Pairs(base, source, ["A"] * len(base), ["B"] * len(source)),
        np.array(xs0, dtype=float)[:, None],
        np.array(xs1, dtype=float)[:, None],
    )
