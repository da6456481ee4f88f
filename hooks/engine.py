"""One forward with workers: the only place where this library enters an nnsight trace.

The trace body holds no logic, because nnsight captures its source: everything that decides is in
callables. `workers` wait for the value of a module each; those that share one act in their order.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import nnsight
import torch
from nnsight.intervention.interleaver import Mediator
from nnsight.intervention.iterator import Iterations
from torch import nn
from transformers.utils import ModelOutput

from imaginelens.hooks.errors import InputError

Worker = Callable[[], None]

greenlet: Any = import_module("greenlet")  # it brings no types

# nnsight runs its workers as greenlets of one thread; two threads in one trace corrupt each other.
LOCK = threading.RLock()

_OURS: list[int] = []  # the forwards of this library that are running, by id of the model
_BODY = compile("worker()", __file__, "exec")  # what a worker is to a trace that runs already


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


def forward(
    wrapped: nnsight.NNsight,
    workers: Sequence[Worker],
    inputs: Mapping[str, Any],
    last: Sequence[Worker] = (),
) -> Any:
    """Run the model once: through a trace where there are workers, plainly where there are none,
    and as part of the user's own trace where that calls us. There, `workers` act before the user's
    code at a place, and the `last` behind it.

    Raises:
        InputError: it is called by the body of a trace, or by a hook, while the model runs.
    """
    with LOCK:
        if in_a_body() or (joins(wrapped) and is_ours(wrapped._module)):
            raise InputError(
                "the model was asked to run by the body of a trace, or by a hook function, while "
                "it runs already; call it before or after that, or give it to the trace as fn=..."
            )
    if next(wrapped._module.parameters()).is_meta:
        raise InputError(
            "the model has no weights in this process, where our forwards and the latent loop run; "
            "load them, or trace a prompt with the wrapper that has them elsewhere, at positions "
            "such as il.image.resolve(lens.tokens(inputs), 0)"
        )
    with LOCK, _ours(wrapped._module):
        if joins(wrapped):
            return join(wrapped, workers, inputs, last)
        if not workers and not last and not wrapped._edits:  # which the user may have stored there
            return wrapped._module(**inputs)
        return trace(wrapped, [*workers, *last], inputs)


def joins(wrapped: nnsight.NNsight) -> bool:
    """Whether a forward now is part of a trace that the user has opened."""
    return bool(wrapped.interleaver.interleaving)


def in_a_body() -> bool:
    """Whether this is the code of a running trace, which waits for the model and is no place to
    run it from."""
    return getattr(greenlet.getcurrent(), "mediator", None) is not None


def is_ours(model: nn.Module) -> bool:
    """Whether the forward of this model that runs now is one of this library."""
    return id(model) in _OURS


@contextmanager
def _ours(model: nn.Module) -> Iterator[None]:
    _OURS.append(id(model))
    try:
        yield
    finally:
        _OURS.remove(id(model))


def join(
    wrapped: nnsight.NNsight,
    workers: Sequence[Worker],
    inputs: Mapping[str, Any],
    last: Sequence[Worker] = (),
) -> Any:
    """Run the model once inside the user's trace, with workers of ours among the user's."""
    interleaver = wrapped.interleaver
    theirs = interleaver.mediators
    first, behind = ([Mediator(_BODY, {}, {"worker": w}) for w in own] for own in (workers, last))
    try:
        for mediator in (*first, *behind):
            mediator.start(interleaver)
        interleaver.mediators = [*first, *theirs, *behind]
        interleaver.reindex()
        return wrapped._module(**inputs)
    finally:
        interleaver.mediators = theirs
        for mediator in (*first, *behind):
            if mediator.alive:  # its module was skipped, or the trace was stopped
                mediator.worker.throw(greenlet.GreenletExit)
        interleaver.reindex()


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
        act = first_tensor(value)
        new = fn(act)
        if new is not act:
            setattr(envoy, slot, with_first(value, new))

    return worker


def at_call(worker: Worker, call: int) -> Worker:
    """The same worker at a later call of its module within one forward, counted from 0."""

    def later() -> None:
        for _ in Iterations(call, call + 1):
            worker()

    return later


def first_tensor(value: Any) -> torch.Tensor:
    """The tensor that a module's value is about: itself, the first of several, or, of a vision
    tower's output, what is pooled for the text model."""
    if isinstance(value, ModelOutput):
        value = value[_shown(value)]
    return value[0] if isinstance(value, tuple | list) else value


def with_first(value: Any, new: torch.Tensor) -> Any:
    """The same value, of the same type, with another tensor in that place."""
    if isinstance(value, ModelOutput):
        key = _shown(value)
        return type(value)(**{**value, key: with_first(value[key], new)})
    return type(value)((new, *value[1:])) if isinstance(value, tuple | list) else new


def _shown(value: ModelOutput) -> str:
    return "pooler_output" if value.get("pooler_output") is not None else "last_hidden_state"


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


def visit_stream(
    wrapped: nnsight.NNsight,
    block: str,
    mid: str,
    part: str,
    fn: Callable[[torch.Tensor], torch.Tensor],
) -> Worker:
    """Make a worker for the stream inside a block that gates or scales what its sublayers add.

    What is added is then no module's output, so it is read as a difference of the stream: before
    and behind the first sublayer (`attn_out`), behind both (`mlp_out`). The stream between them
    (`mid`) is written in place, because the block holds the same tensor for its skip connection
    and may scale that as well.
    """

    def worker() -> None:
        envoy = wrapped.get(block)
        before = first_tensor(envoy.input)
        stream = wrapped.get(mid).input
        between = stream.reshape(before.shape)  # some blocks flatten example and position
        if part == "mlp_out":
            out = first_tensor(envoy.output)
            new = _changed(out, out - between, between, fn)
            if new is not out:
                envoy.output = with_first(envoy.output, new)
            return
        held = between.clone()
        new = _changed(held, held - before, before, fn) if part == "attn_out" else fn(held)
        if new is not held or held.requires_grad:
            stream.copy_(new.reshape(stream.shape))

    return worker


def _changed(
    whole: torch.Tensor,
    added: torch.Tensor,
    rest: torch.Tensor,
    fn: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """`whole` = `rest` + `added` with `fn` on `added`: to the bit where nothing changed, and with
    the gradient passing through `added` only."""
    new = fn(added)
    if new is added and not added.requires_grad:
        return whole
    moved = whole + (new - added)
    return rest + new + (moved - rest - new).detach() if moved.requires_grad else moved
