"""What a probe has learned: arrays that turn states into one score per class, or one number."""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from imaginelens.probes.frames import Frame, States

Scores = Float[np.ndarray, "row score"]


@runtime_checkable
class Readout(Protocol):
    """Learned arrays: each kind of readout says which, and moves from a frame to x."""

    def scores(self, x: States) -> Scores:
        """One score per row and class, or one number per row."""
        ...

    def outside(self, frame: Frame) -> "Readout":
        """The same function of x, of one that was learned on frame(x)."""
        ...

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All that was learned, by name."""
        ...


@dataclass(frozen=True, eq=False)
class Linear:
    """scores = x @ weights.T + bias.

    Attributes:
        weights: (score, d_model).
        bias: (score,).
    """

    weights: Float[np.ndarray, "score d_model"]
    bias: Float[np.ndarray, " score"]

    def scores(self, x: States) -> Scores:
        return x @ self.weights.T + self.bias

    def outside(self, frame: Frame) -> "Linear":
        weights = np.ascontiguousarray(frame.outside(self.weights))
        return Linear(weights, self.bias - weights @ frame.mean)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {"weights": self.weights, "bias": self.bias}


@dataclass(frozen=True, eq=False)
class Layered:
    """scores = relu(x @ inner + inner_bias) @ outer + outer_bias: one hidden layer.

    Attributes:
        inner: (d_model, hidden).
        outer: (hidden, score).
    """

    inner: Float[np.ndarray, "d_model hidden"]
    inner_bias: Float[np.ndarray, " hidden"]
    outer: Float[np.ndarray, "hidden score"]
    outer_bias: Float[np.ndarray, " score"]

    def scores(self, x: States) -> Scores:
        hidden = np.maximum(x @ self.inner + self.inner_bias, 0)
        return hidden @ self.outer + self.outer_bias

    def outside(self, frame: Frame) -> "Layered":
        inner = np.ascontiguousarray(frame.outside(self.inner.T).T)
        shifted = self.inner_bias - frame.mean @ inner
        return Layered(inner, shifted, self.outer, self.outer_bias)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {
            "inner": self.inner,
            "inner_bias": self.inner_bias,
            "outer": self.outer,
            "outer_bias": self.outer_bias,
        }


@dataclass(frozen=True, eq=False)
class Attention:
    """scores = sum over heads of (sum over steps of softmax(query . x) x) . value + bias.

    A step that is nan is not there: it gets no attention. Steps have no order.

    Attributes:
        query: (head, d_model).
        value: (head, score, d_model).
        bias: (score,).
    """

    query: Float[np.ndarray, "head d_model"]
    value: Float[np.ndarray, "head score d_model"]
    bias: Float[np.ndarray, " score"]

    def attention(self, x: Float[np.ndarray, "row step d_model"]) -> Float[np.ndarray, "..."]:
        """How much each head looks at each step, (row, head, step): sums to 1 over steps."""
        there = ~np.isnan(x).any(-1)
        z = np.where(there[..., None], x, 0.0)
        logits = np.where(there[:, None], np.einsum("rsd,hd->rhs", z, self.query), -np.inf)
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        return shares / shares.sum(-1, keepdims=True)

    def scores(self, x: States) -> Scores:
        z = np.where(np.isnan(x), 0.0, x)
        pooled = np.einsum("rhs,rsd->rhd", self.attention(x), z)
        return np.einsum("rhd,hkd->rk", pooled, self.value) + self.bias

    def outside(self, frame: Frame) -> "Attention":
        # query . mean is the same at all steps, and softmax does not see it
        query = np.ascontiguousarray(frame.outside(self.query))
        value = np.ascontiguousarray(frame.outside(self.value))
        return Attention(query, value, self.bias - np.einsum("hkd,d->k", value, frame.mean))

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {"query": self.query, "value": self.value, "bias": self.bias}


@dataclass(frozen=True, eq=False)
class Spread:
    """A readout of some of the classes; the others, of which no training row came, score -inf.

    Attributes:
        inner: the readout; None where there was a single class, which then always wins.
        present: the numbers of the classes that it knows.
        n_classes: how many there are in all.
    """

    arrays: ClassVar[dict[str, np.ndarray]] = {}

    inner: Any
    present: Int[np.ndarray, " class"]
    n_classes: int

    def scores(self, x: States) -> Scores:
        found = np.full((len(x), self.n_classes), -np.inf)
        found[:, self.present] = 0.0 if self.inner is None else self.inner.scores(x)
        return found

    def outside(self, frame: Frame) -> "Spread":
        inner = None if self.inner is None else self.inner.outside(frame)
        return Spread(inner, self.present, self.n_classes)


READOUTS: dict[str, type] = {"linear": Linear, "layered": Layered, "attention": Attention}
