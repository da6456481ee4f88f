"""A user's own nnsight traces, beside our edits: what `lens.nnsight` is.

A trace of it runs under whatever is active in the registry, and judges edits as our own verbs do.
Its inputs may be examples, several in one trace; and our verbs may be what it runs, so that the
latents are there to be read. Where an edit cannot act, the trace says so: an edit that nobody
hears of is the worst kind of result.
"""

import inspect
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import nnsight
import torch
from nnsight.intervention.interleaver import EarlyStopException
from torch import nn
from torch.utils.hooks import RemovableHandle

from imaginelens.hooks import engine
from imaginelens.hooks.entries import Chunk, EditEntry, HookEntry
from imaginelens.hooks.errors import EditTouchedNothing, InputError
from imaginelens.hooks.prompts import Prompt
from imaginelens.hooks.run import Run
from imaginelens.hooks.tensor_parallel import keep_collectives
from imaginelens.hooks.textedits import TextEntry
from imaginelens.hooks.widening import Widened

if TYPE_CHECKING:
    from imaginelens.hooks.model import LatentModel


class RawTraces(nnsight.NNsight):
    """nnsight's wrapper of a model, for traces of the user's own: `with lens.nnsight.trace(...):`.

    It takes what nnsight's takes, and beyond that:

    - An example `{"images": ..., "text": ...}`, or a list of them, which it encodes.
    - Several `tracer.invoke(example)`, each with its pictures; their rows are padded on the left.
    - `fn=lens.run`, or another verb: module calls are counted from its first forward, so that
      `tracer.iter[k]` is the forward that reads the k-th generated position, and the prompt at 0.

    Edits and hooks that are active act first, the body of the trace behind them.

    >>> import imaginelens as il
    >>> import nnsight
    >>> lens = il.load("latent-content")
    >>> base = lens.task(n=1, seed=0).base[0]
    >>> with lens.edit(il.Zero(), at=il.last_prompt, site="blocks.1.hook_resid_post") as landing:
    ...     with lens.nnsight.trace(base):
    ...         h = nnsight.save(lens.nnsight.model.language_model.layers[1].output)
    >>> landing.fired, bool((h[0, -1] == 0).all())
    (1, True)
    """

    def __init__(self, lens: "LatentModel") -> None:
        keep_collectives(lens.model)
        super().__init__(lens.model)
        self._lens = weakref.ref(lens)
        lens.registry.guard = partial(_guarded, lens.model, weakref.ref(lens.registry))

    def trace(self, *args: Any, remote: Any = False, **kwargs: Any) -> Any:
        """Open a trace, as nnsight's own `trace`.

        Raises:
            InputError: it should run on another machine.
        """
        if remote:
            raise InputError(
                f"remote={remote!r}: lens.nnsight wraps a model of this process, and latents that "
                "are fed back are made by a loop of this process; trace a prompt remotely with "
                "nnsight.TransformersModel(...) of the same checkpoint, and take its positions "
                "from il.image.resolve(lens.tokens(inputs), 0)"
            )
        return super().trace(*args, **kwargs)

    def session(self, *args: Any, remote: Any = False, **kwargs: Any) -> Any:
        """Open a session, as nnsight's own `session`; it cannot run remotely either."""
        if remote:
            self.trace(remote=remote)
        return super().session(*args, **kwargs)

    def interleave(self, fn: Any, *args: Any, batcher: Any = None, **kwargs: Any) -> Any:
        """Run `fn` under what is active; nnsight calls it for each of its traces."""
        lens = self._lens()
        if lens is None or engine.is_ours(self._module):
            return super().interleave(fn, *args, batcher=batcher, **kwargs)
        active = [e for e in lens.registry.entries if isinstance(e, _HEARD)]
        with engine.LOCK:
            if not active:
                return super().interleave(fn, *args, batcher=batcher, **kwargs)
            run = partial(_read, lens) if fn == "__call__" else fn
            with heard(lens.model, named_entries(active)):
                return super().interleave(run, *args, batcher=batcher, **kwargs)

    def _batch_size(self, *inputs: Any, **kwargs: Any) -> int:
        """How many rows an invoke brings; options of `fn` bring none."""
        if inputs and isinstance(inputs[0], Run | Prompt):
            return len(inputs[0])
        if inputs and isinstance(inputs[0], Sequence) and not isinstance(inputs[0], str):
            return len(inputs[0])
        tensors = any(isinstance(value, torch.Tensor) for value in kwargs.values())
        return 1 if inputs or tensors else 0

    def _batch(self, invokes: list[Any], fn: Any) -> Any:
        """All invokes as what one call of `fn` takes."""
        lens = self._lens()
        if not invokes or lens is None or engine.is_ours(self._module):
            return super()._batch(invokes, fn)
        inputs, options = invokes[0] if len(invokes) == 1 else (([*_examples(invokes)],), {})
        reads = fn == "__call__" or getattr(fn, "func", None) is _read
        bare = reads or isinstance(fn, str)  # a method of the model, not one of ours
        if not inputs or isinstance(inputs[0], torch.Tensor) or not bare:
            return inputs, options
        if isinstance(inputs[0], Run):
            raise InputError(
                "a run was given to a trace of the bare model, which would not see its latents; "
                "pass fn=lens.run_with_hooks to read it, or trace run.prompt.inputs"
            )
        prompt = inputs[0] if isinstance(inputs[0], Prompt) else lens.prompt(inputs[0])
        positions = lens._positions(prompt) if reads else {}
        return inputs[1:], {**prompt.inputs, **positions, **options}


_HEARD = (EditEntry, TextEntry, HookEntry)


@contextmanager
def heard(model: nn.Module, what: str) -> Iterator[None]:
    """Refuse, for a block, forwards of a model that would not hear of what is active.

    Raises:
        EditTouchedNothing: the model was called by something else than this library.
    """

    def refuse(module: nn.Module, args: Any) -> None:
        if not engine.is_ours(module):
            raise _unheard(what)

    handle = model.register_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def _guarded(model: nn.Module, of: weakref.ref[Any]) -> RemovableHandle:
    """The same for as long as something is in a registry, which the model does not keep alive."""

    def refuse(module: nn.Module, args: Any) -> None:
        registry = of()
        entries = [] if registry is None else registry.entries
        active = [e for e in entries if isinstance(e, _HEARD)]
        if active and not engine.is_ours(module):
            raise _unheard(named_entries(active))

    return model.register_forward_pre_hook(refuse)


def _unheard(what: str) -> EditTouchedNothing:
    return EditTouchedNothing(
        f"{what} is active and would touch nothing, for the model was called directly (by "
        "model(...), model.generate(...) or a wrapper of another tool); call lens.run or another "
        "verb, trace with lens.nnsight.trace(inputs), or with fn=lens.run where it should "
        "generate, or take it off first, by lens.registry.clear() or behind its block"
    )


@contextmanager
def has_run(lens: "LatentModel", entry: EditEntry | TextEntry) -> Iterator[None]:
    """Refuse a block in which an edit is active and nothing runs that could hear of it.

    Raises:
        EditTouchedNothing: the model has not run at the end of the block.
        InputError: the block stands in the body of a running trace.
    """
    if engine.in_a_body():
        raise InputError(
            f"{named_entries([entry])} was opened in the body of a running trace; open it around "
            "the trace, so that it is active from the first module on"
        )
    before = lens.registry.forwards
    with heard(lens.model, named_entries([entry])):
        yield
    if lens.registry.forwards == before:
        raise EditTouchedNothing(
            f"{named_entries([entry])} touched nothing, for this model did not run in its block; "
            "run it there, and open a trace of lens.nnsight inside the block, not around it"
        )


def named_entries(entries: Sequence[EditEntry | TextEntry | HookEntry]) -> str:
    """What is active, in a few words."""
    entry = entries[0]
    more = f" (with {len(entries) - 1} more)" if len(entries) > 1 else ""
    if isinstance(entry, HookEntry):
        what = f"hook {getattr(entry.fn, '__name__', type(entry.fn).__name__)}"
        return f"{what} at {', '.join(entry.sites[:3])}{more}"
    return f"{type(entry.edit).__name__} at {entry.at!r}{more}"


def _read(lens: "LatentModel", *args: Any, **inputs: Any) -> Any:
    """The model's own forward on what the user's trace gives it, under what is active."""
    names = inspect.signature(lens.model.forward).parameters
    inputs = {**dict(zip(names, args, strict=False)), **inputs}
    cache = inputs.get("past_key_values")
    if inputs.get("input_ids") is None or (cache is not None and cache.get_seq_length()):
        raise InputError(
            "the trace gives the model "
            + ("a cache that is filled" if inputs.get("input_ids") is not None else "no input_ids")
            + ", so that what stands at each position is not known, and edits are active; give it "
            "the whole prompt, or trace fn=lens.run"
        )
    given = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    prompt = lens.prompt(given)
    if isinstance(prompt, Widened):
        prompt = prompt.plain or prompt
    tokens = lens._map(prompt)
    chunk = Chunk(tokens, 0, tokens.width, prompt.has_images, lens.projector_rows(prompt.inputs))
    lens.registry.begin()
    outputs, stopped = None, None
    try:
        outputs = lens.registry.run(lens.nnsight, lens.model, inputs, chunk)
    except EarlyStopException as stop:  # tracer.stop(), which may come before an edit's site
        stopped = stop
    lens.registry.judge(
        len(prompt),
        "a trace of the bare model reads the prompt alone, which holds no latents and no answer; "
        "trace fn=lens.run to generate, or a run with fn=lens.run_with_hooks",
    )
    if stopped is not None:
        raise stopped
    return outputs


def _examples(invokes: list[Any]) -> Iterator[Any]:
    """The examples of several invokes, in order."""
    for number, (inputs, options) in enumerate(invokes):
        found = inputs[0] if inputs else None
        for example in found if isinstance(found, list | tuple) else [found]:
            if options or not isinstance(example, Mapping) or "input_ids" in example:
                what = "encoded inputs" if found is None or "input_ids" in found else repr(found)
                raise InputError(
                    f"invoke {number} of {len(invokes)} brings {what[:60]}, and several invokes "
                    "are padded and encoded together; give each an example {'images': ..., 'text': "
                    "...} (options go to trace), or one trace the processor's dict for all"
                )
            yield example
