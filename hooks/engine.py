"""One forward with workers: the only place where this library enters an nnsight trace.

The trace body holds no logic, because nnsight captures its source: everything that decides is in
callables. `workers` wait for the value of a module each, so their order does not matter.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import nnsight
import torch
from torch import nn

Worker = Callable[[], None]

# nnsight runs its workers as greenlets of one thread; two threads in one trace corrupt each other.
LOCK = threading.RLock()


def trace(
    wrapped: nnsight.NNsight, workers: Sequence[Worker], inputs: Mapping[str, Any], fn: Any = None
) -> Any:
    """Run the wrapped model, or `fn` in its place, once on `inputs` with `workers` attached."""
    results = []

    def keep(*args: Any, **kwargs: Any) -> Any:  # cheaper than waiting for tracer.result
        results.append((fn or wrapped._module)(*args, **kwargs))
        return results[0]

    with wrapped.trace(fn=keep) as tracer:
        with tracer.invoke(**inputs):
            pass
        for worker in workers:
            with tracer.invoke():
                worker()
    return results[0]


def forward(wrapped: nnsight.NNsight, workers: Sequence[Worker], inputs: Mapping[str, Any]) -> Any:
    """Run the model once: through a trace where there are workers, plainly where there are none."""
    with LOCK:
        if not workers:
            return wrapped._module(**inputs)
        return trace(wrapped, workers, inputs)


@contextmanager
def untouched(stateful: Sequence[nn.Module]) -> Iterator[None]:
    """Put back the state that a forward leaves on these modules (`rope_deltas`), also on error."""
    before = [(module, module.rope_deltas) for module in stateful]
    try:
        with LOCK:
            yield
    finally:
        for module, rope_deltas in before:
            module.rope_deltas = rope_deltas


def visit(
    wrapped: nnsight.NNsight,
    path: str,
    slot: str,
    fn: Callable[[torch.Tensor], torch.Tensor],
) -> Worker:
    """Make a worker that shows the first tensor at a module's input or output to `fn` and puts back
    what it returns; the same tensor back means a read."""

    def worker() -> None:
        envoy = wrapped.get(path)
        value = getattr(envoy, slot)
        act = value[0] if isinstance(value, tuple) else value
        new = fn(act)
        if new is not act:
            setattr(envoy, slot, (new, *value[1:]) if isinstance(value, tuple) else new)

    return worker


def visit_residual(
    wrapped: nnsight.NNsight,
    block: str,
    mid: str,
    fn: Callable[[torch.Tensor], torch.Tensor],
) -> Worker:
    """Make a worker for the residual stream between attention and MLP.

    The input of the second norm is not the stream itself: the skip connection carries the old value
    past it. So the change is also added behind the block.
    """

    def worker() -> None:
        norm = wrapped.get(mid)
        act = norm.input
        new = fn(act)
        if new is act:
            return
        norm.input = new
        envoy = wrapped.get(block)
        out = envoy.output
        if isinstance(out, tuple):
            envoy.output = (out[0] + (new - act), *out[1:])
        else:
            envoy.output = out + (new - act)

    return worker
