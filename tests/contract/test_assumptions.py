"""Every behaviour of nnsight, transformers, transformer-lens and torch that this library relies on.

A new release of one of them fails here first, and says which assumption broke. What the assumptions
are for is tested elsewhere, by the laws of our own functions.
"""

import copy
import inspect
import os
import re
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nnsight
import pytest
import tiny
import torch
import transformers
from assumed import ASSUMPTIONS, ROOT, Assumption, AssumptionBroke, assumed, page
from nnsight.intervention.iterator import Iterations
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

# ---- small models --------------------------------------------------------------------------------


class Two(nn.Module):
    """Two linear maps, the first called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](self.layers[0](x)))


class Line(nn.Module):
    """Three linear maps, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def line() -> tuple[Line, nnsight.NNsight, torch.Tensor]:
    torch.manual_seed(0)
    model = Line()
    return model, nnsight.NNsight(model), torch.randn(2, 4)


def traced(wrapped: nnsight.NNsight, inputs: dict[str, Any], *workers: Callable[[], None]) -> Any:
    """One trace as the engine writes it: one invoke with data, an empty one for each worker."""
    results: list[Any] = []

    def keep(*args: Any, **kwargs: Any) -> Any:
        results.append(wrapped._module(*args, **kwargs))
        return results[0]

    with wrapped.trace(fn=keep) as tracer:
        with tracer.invoke(**inputs):
            pass
        for worker in workers:
            with tracer.invoke():
                worker()
    return results[0]


@cache
def qwen() -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """A tiny Qwen2.5-VL with one picture in each of two rows."""
    model, processor = tiny.build("qwen2_5_vl", dtype=torch.float32)
    pictures = [tiny.image(24, 16, seed=i) for i in range(2)]
    return (
        model,
        processor,
        tiny.inputs("qwen2_5_vl", processor, ["a", "bcd"], pictures, torch.float32),
    )


def plain(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def called(model: Any, batch: dict[str, Any], **options: Any) -> dict[str, Any]:
    """What `generate` gives to a `custom_generate`."""
    seen: dict[str, Any] = {}

    def instead(model: Any, input_ids: Any, *rest: Any, **kwargs: Any) -> torch.Tensor:
        seen.update(model=model, input_ids=input_ids, rest=rest, kwargs=kwargs)
        return input_ids

    with torch.no_grad():
        model.generate(**plain(batch), custom_generate=instead, max_new_tokens=3, **options)
    return seen


def differ(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


# ---- nnsight -------------------------------------------------------------------------------------


@assumed(
    "nnsight",
    used="hooks/engine.py: with wrapped.trace(fn=keep)",
    look="NNsight.trace, its argument fn",
)
def a_trace_runs_a_callable_with_the_inputs_of_its_invoke() -> None:
    """`trace(fn=callable)` calls it in the place of the model with the arguments of the one invoke
    that has any, and modules that it calls are seen."""
    model, wrapped, x = line()
    seen = []
    result = traced(wrapped, {"x": x}, lambda: seen.append(wrapped.get("layers.1").output))
    assert torch.equal(result, model(x))
    assert torch.equal(seen[0], model.layers[1](model.layers[0](x)))


@assumed(
    "nnsight",
    used="hooks/engine.py: for worker in workers",
    look="how invokes without arguments are batched and started",
)
def empty_invokes_wait_in_any_order() -> None:
    """Empty invokes see the whole batch and wait each for its own module, in any order of
    registration."""
    _, wrapped, x = line()
    order: list[int] = []

    def watch(number: int) -> Callable[[], None]:
        def worker() -> None:
            value = wrapped.get(f"layers.{number}").output
            order.append(number)
            assert len(value) == 2

        return worker

    traced(wrapped, {"x": x}, watch(2), watch(0), watch(1))
    assert order == [0, 1, 2]


@assumed(
    "nnsight",
    used="hooks/engine.py: those that share one act in their order",
    look="Interleaver.handle, the order of mediators that wait for one place",
)
def workers_at_one_place_act_in_order() -> None:
    """Workers that write the same module's output act in the order of their registration, each on
    what the one before left."""
    model, wrapped, x = line()

    def times(k: float, plus: float) -> Callable[[], None]:
        def worker() -> None:
            envoy = wrapped.get("layers.2")
            envoy.output = envoy.output * k + plus

        return worker

    result = traced(wrapped, {"x": x}, times(2.0, 0.0), times(1.0, 5.0))
    assert torch.allclose(result, model(x) * 2 + 5)


@assumed(
    "nnsight",
    used="hooks/engine.py: setattr(envoy, slot",
    look="Envoy.output and Envoy.input as properties with setters",
)
def an_assigned_output_or_input_is_what_the_model_goes_on_with() -> None:
    """Assigning `envoy.output` or `envoy.input` replaces the value for everything behind it, and
    what was read before stays as it was."""
    model, wrapped, x = line()

    def output() -> None:
        envoy = wrapped.get("layers.0")
        envoy.output = torch.zeros_like(envoy.output)

    def input() -> None:
        envoy = wrapped.get("layers.2")
        envoy.input = envoy.input + 1

    with torch.no_grad():
        changed = traced(wrapped, {"x": x}, output, input)
        wanted = model.layers[2](model.layers[1](torch.zeros(2, 4)) + 1)
    assert torch.equal(changed, wanted)


@assumed(
    "nnsight",
    used="hooks/engine.py: wrapped.get(path)",
    look="Envoy.get, and whether paths begin at the root's attributes",
)
def a_path_begins_at_the_wrapped_model() -> None:
    """`wrapped.get("layers.0")` finds a module by its path within the wrapped model, as
    `get_submodule` does."""
    model, wrapped, _ = line()
    assert wrapped.get("layers.1")._module is model.get_submodule("layers.1")
    assert wrapped._module is model


@assumed("nnsight", used="hooks/prefix.py: envoy.skip(", look="Envoy.skip")
def a_skipped_module_does_not_run() -> None:
    """`envoy.skip(value)` gives the value as the module's output and does not run the module."""
    model, wrapped, x = line()
    result = traced(wrapped, {"x": x}, lambda: wrapped.get("layers.0").skip(torch.ones(2, 4)))
    result.sum().backward()
    assert model.layers[0].weight.grad is None  # nothing of it was computed
    assert torch.equal(result, model.layers[2](model.layers[1](torch.ones(2, 4))))


@assumed(
    "nnsight",
    used="hooks/engine.py: Iterations(call, call + 1)",
    look="nnsight.intervention.iterator.Iterations",
)
def a_later_call_of_a_module_is_reached() -> None:
    """Inside `Iterations(k, k + 1)` a worker waits for the k-th call of a module in one run."""
    torch.manual_seed(0)
    model, x = Two(), torch.randn(2, 4)
    wrapped, seen = nnsight.NNsight(model), []

    def later() -> None:
        for _ in Iterations(1, 2):
            seen.append(wrapped.get("layers.0").output)

    traced(wrapped, {"x": x}, later)
    assert torch.equal(seen[0], model.layers[0](model.layers[0](x)))


@assumed(
    "nnsight",
    used="mediation/gradients.py: grad",
    look="whether trace() enters no_grad, or detaches what is read",
)
def gradients_pass_through_a_trace() -> None:
    """A trace leaves the caller's grad mode alone, and the gradient flows from the result to a
    tensor that a worker put in."""
    _, wrapped, x = line()
    leaf = torch.ones(2, 4, requires_grad=True)

    def put() -> None:
        wrapped.get("layers.0").output = leaf

    result = traced(wrapped, {"x": x}, put)
    (grad,) = torch.autograd.grad(result.sum(), leaf)
    assert float(grad.abs().sum()) > 0
    with torch.no_grad():
        assert not traced(wrapped, {"x": x}, put).requires_grad


@assumed(
    "nnsight",
    used="hooks/registry.py: engine.forward",
    look="what a trace raises for an error in a worker, and what it leaves on the model",
)
def an_error_in_a_worker_is_raised_and_leaves_the_model_clean() -> None:
    """An exception in a worker leaves the trace as an exception of the same type, and the model
    computes afterwards what it did before."""
    model, wrapped, x = line()
    before = model(x)

    def boom() -> None:
        assert wrapped.get("layers.1").output is not None
        raise ZeroDivisionError("on purpose")

    with pytest.raises(ZeroDivisionError, match="on purpose"):
        traced(wrapped, {"x": x}, boom)
    assert torch.equal(model(x), before)
    assert torch.equal(traced(wrapped, {"x": x}), before)


@assumed(
    "nnsight",
    used="hooks/engine.py: a hook, while",
    look="Interleaver.interleaving, and where RawTraces and engine.joins read it",
)
def it_is_known_whether_a_trace_is_running() -> None:
    """`wrapped.interleaver.interleaving` is true while a trace of that wrapper runs the model, and
    false outside."""
    _, wrapped, x = line()
    inside = []
    assert not wrapped.interleaver.interleaving
    wrapped._module.layers[0].register_forward_pre_hook(
        lambda m, a: inside.append(bool(wrapped.interleaver.interleaving))
    )
    traced(wrapped, {"x": x}, lambda: wrapped.get("layers.1").output)
    assert inside == [True]
    assert not wrapped.interleaver.interleaving


@assumed(
    "nnsight",
    used="hooks/engine.py: Mediator(_BODY",
    look="nnsight.intervention.interleaver: Mediator, and Interleaver.mediators",
)
def workers_can_be_added_to_a_running_trace() -> None:
    """While a trace runs, a `Mediator(code, globals, locals)` that is started on its interleaver
    and put among its `mediators` takes part in it after `reindex()`, and is `alive` until it is
    done."""
    from nnsight.intervention.interleaver import Mediator

    model, wrapped, x = line()
    code, seen = compile("worker()", "<assumed>", "exec"), []

    def worker() -> None:
        envoy = wrapped.get("layers.1")
        seen.append(envoy.output)
        envoy.output = envoy.output * 2

    def run(**inputs: Any) -> torch.Tensor:
        interleaver = wrapped.interleaver
        theirs, own = interleaver.mediators, Mediator(code, {}, {"worker": worker})
        own.start(interleaver)
        assert own.alive
        interleaver.mediators = [own, *theirs]
        interleaver.reindex()
        try:
            return results.append(wrapped._module(**inputs)) or results[0]
        finally:
            assert not own.alive
            interleaver.mediators = theirs
            interleaver.reindex()

    results: list[Any] = []
    with wrapped.trace(fn=run) as tracer:
        with tracer.invoke(x=x):
            pass
    middle = model.layers[1](model.layers[0](x))
    assert torch.equal(seen[0], middle)
    assert torch.equal(results[0], model.layers[2](middle * 2))


@assumed(
    "nnsight",
    used="hooks/raw_traces.py: def interleave",
    look="NNsight.interleave, _batch_size and _batch, which RawTraces overrides",
)
def a_wrapper_may_say_how_inputs_are_batched_and_run() -> None:
    """`NNsight` calls its own `interleave(fn, *args, batcher=None, **kwargs)`, `_batch_size` and
    `_batch` for each trace, so that a subclass can override them."""
    asked: list[str] = []

    class Own(nnsight.NNsight):
        def interleave(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
            asked.append("interleave")
            return super().interleave(fn, *args, **kwargs)

        def _batch_size(self, *inputs: Any, **kwargs: Any) -> int:
            asked.append("size")
            return super()._batch_size(*inputs, **kwargs)

        def _batch(self, invokes: Any, fn: Any) -> Any:
            asked.append("batch")
            return super()._batch(invokes, fn)

    _, _, x = line()
    wrapped = Own(Line())
    traced(wrapped, {"x": x}, lambda: wrapped.get("layers.1").output)
    assert set(asked) == {"interleave", "size", "batch"}
    assert "batcher" in inspect.signature(nnsight.NNsight.interleave).parameters


@assumed(
    "nnsight",
    used="pyproject.toml: beartype",
    look="whether the mount is gone (then `-p beartype` in pyproject.toml can go, too)",
)
def importing_it_puts_save_on_every_object() -> None:
    """Importing nnsight mounts `.save` on every object, so that beartype must be imported before
    it in the tests, and our code writes `nnsight.save(x)`."""
    assert hasattr(3, "save")
    assert callable(nnsight.save)


@assumed(
    "nnsight",
    used="hooks/tensor_parallel.py: BODY_FORWARD",
    look="nnsight.intervention.source.BODY_FORWARD, and who puts a wrapper back around a module",
)
def a_flagged_forward_runs_inside_the_place() -> None:
    """A `forward` that was put on a module runs within its `output` and `input` if the module has
    the flag `BODY_FORWARD` before it is wrapped."""
    from nnsight.intervention.source import BODY_FORWARD

    def install_forward(module: nn.Module, own: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Named as what makes transformers' wrappers, which nnsight leaves outside otherwise."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            return 2 * own(x)

        module.forward = forward

    for flagged in (True, False):
        torch.manual_seed(0)
        model, x = Line(), torch.randn(2, 4)
        layer = model.layers[1]
        alone = layer(model.layers[0](x))
        install_forward(layer, layer.forward)
        if flagged:
            layer.__dict__[BODY_FORWARD] = True
        seen: list[torch.Tensor] = []
        wrapped = nnsight.NNsight(model)
        traced(wrapped, {"x": x}, lambda at=wrapped, to=seen: to.append(at.get("layers.1").output))
        assert torch.equal(seen[0], 2 * alone if flagged else alone)


# ---- transformers: modules -----------------------------------------------------------------------


@assumed(
    "transformers",
    used=("hooks/engine.py: def first_tensor", "hooks/prefix.py: isinstance(s, torch.Tensor)"),
    look="the return statement of the decoder layers (output[0] of a tensor is its first row)",
)
def a_decoder_layer_returns_a_tensor() -> None:
    """A decoder layer returns the stream itself, and its attention a tuple that begins with what it
    adds."""
    model, _, batch = qwen()
    layer, found = model.model.language_model.layers[0], {}
    handles = [
        layer.register_forward_hook(lambda m, a, o: found.update(layer=o)),
        layer.self_attn.register_forward_hook(lambda m, a, o: found.update(attention=o)),
        model.model.visual.register_forward_hook(lambda m, a, o: found.update(tower=o)),
    ]
    with torch.no_grad():
        model(**plain(batch))
    for handle in handles:
        handle.remove()
    assert isinstance(found["layer"], torch.Tensor)
    assert isinstance(found["attention"], tuple)
    assert found["attention"][0].shape == found["layer"].shape


@assumed(
    "transformers",
    used="hooks/engine.py: pooler_output",
    look="the output class of the vision towers; what the text model takes of it",
)
def a_vision_tower_returns_what_the_text_model_takes_as_pooler_output() -> None:
    """The vision tower returns a `ModelOutput` whose `pooler_output`, where it has one, is what is
    written over the image placeholders."""
    model, _, batch = qwen()
    found: dict[str, Any] = {}
    handles = [
        model.model.visual.register_forward_hook(lambda m, a, o: found.update(tower=o)),
        model.model.language_model.layers[0].register_forward_pre_hook(
            lambda m, a, k: found.update(stream=a[0] if a else k["hidden_states"]), with_kwargs=True
        ),
    ]
    with torch.no_grad():
        model(**plain(batch))
    for handle in handles:
        handle.remove()
    assert isinstance(found["tower"], transformers.utils.ModelOutput)
    pooled = found["tower"].pooler_output
    pooled = torch.cat(list(pooled)) if isinstance(pooled, tuple | list) else pooled
    entered = found["stream"][batch["input_ids"] == model.config.image_token_id]
    assert torch.equal(entered, pooled)


@assumed(
    "transformers",
    used="hooks/sites.py: overwritten by image features",
    look="where image features are written into inputs_embeds",
)
def image_features_overwrite_the_embeddings_of_their_placeholders() -> None:
    """The token embedding's output at image positions is overwritten before any layer reads it, and
    at other positions it is the first layer's input."""
    model, _, batch = qwen()
    inputs, image = plain(batch), batch["input_ids"] == model.config.image_token_id

    def at(where: torch.Tensor) -> float:
        def add(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            return out + where[..., None]

        with torch.no_grad():
            before = model(**inputs).logits
            handle = model.get_input_embeddings().register_forward_hook(add)
            after = model(**inputs).logits
            handle.remove()
        return differ(before, after)

    assert at(image) == 0.0
    assert at(~image) > 1e-3


@assumed(
    "transformers",
    used=("hooks/structure.py: get_encoder(modality=", "hooks/structure.py: get_decoder()"),
    look="PreTrainedModel.get_decoder and get_encoder, and their modality argument",
)
def generic_accessors_find_the_parts_of_a_model() -> None:
    """`get_decoder()`, `get_encoder(modality="image")`, `get_input_embeddings()` and
    `get_output_embeddings()` give the text model, the vision tower, the token embedding and the
    head."""
    model, _, _ = qwen()
    assert model.get_encoder(modality="image") is model.model.visual
    inner = {id(m) for m in model.get_decoder().modules()}
    assert id(model.model.language_model.layers) in inner
    assert model.get_input_embeddings() is model.model.language_model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    text, _ = tiny.build("idefics3")
    assert text.get_encoder(modality="image") is text.model.vision_model


@assumed(
    "transformers",
    used=(
        "hooks/structure.py: get_text_config(decoder=True)",
        "hooks/prefix.py: get_text_config(decoder=True)",
    ),
    look="PreTrainedConfig.get_text_config",
)
def the_text_config_is_found_in_any_config() -> None:
    """`config.get_text_config(decoder=True)` has the text model's sizes, however configs nest."""
    for name in ("qwen2_5_vl", "llava", "gemma3", "idefics3"):
        model, _ = tiny.build(name)
        text = model.config.get_text_config(decoder=True)
        assert text.num_hidden_layers >= 2
        assert text.hidden_size == model.get_input_embeddings().embedding_dim


@assumed(
    "transformers",
    used="hooks/generate.py: ln_final.hook_normalized",
    look="what lm_head is given in each class",
)
def the_head_reads_the_final_norms_output() -> None:
    """What the head reads is the final norm's output, which is what latent families feed back."""
    for name in ("qwen2_5_vl", "qwen3_vl", "llava", "gemma3"):
        model, processor = tiny.build(name)
        batch = tiny.inputs(name, processor, ["a"], [tiny.image(24, 24, seed=0)])
        found: dict[str, torch.Tensor] = {}
        decoder = model.get_decoder()
        decoder = getattr(decoder, "language_model", decoder)
        handles = [
            decoder.norm.register_forward_hook(lambda m, a, o, f=found: f.update(norm=o)),
            model.lm_head.register_forward_pre_hook(lambda m, a, f=found: f.update(head=a[0])),
        ]
        with torch.no_grad():
            model(**plain(batch))
        for handle in handles:
            handle.remove()
        assert torch.equal(found["norm"], found["head"]), name


@assumed(
    "transformers",
    used="hooks/behaviour.py: _deepstack_process",
    look="Qwen3-VL's text model: where and how it adds image features between layers",
)
def deepstack_adds_between_layers() -> None:
    """Qwen3-VL's text model has `_deepstack_process`, and adds image features to the stream behind
    its first layers, outside of the layer modules."""
    model, processor = tiny.build("qwen3_vl")
    batch = tiny.inputs("qwen3_vl", processor, ["a"], [tiny.image(24, 24, seed=0)])
    assert any(hasattr(m, "_deepstack_process") for m in model.modules())
    layers, found = model.model.language_model.layers, {}
    handles = [
        layers[0].register_forward_hook(lambda m, a, o: found.update(left=o)),
        layers[1].register_forward_pre_hook(
            lambda m, a, k: found.update(entered=a[0] if a else k["hidden_states"]),
            with_kwargs=True,
        ),
    ]
    with torch.no_grad():
        model(**plain(batch))
    for handle in handles:
        handle.remove()
    image = batch["input_ids"] == model.config.image_token_id
    moved = (found["left"] - found["entered"]).abs().amax(-1)
    assert bool((moved[image] > 0).all())
    assert float(moved[~image].max()) == 0.0


@assumed(
    "transformers",
    used=(
        "hooks/model.py: get_vision_window_index",
        "hooks/structure.py: permute_input_for_window_attn",
    ),
    look="transformers.vision_utils.get_vision_window_index, and Qwen2.5-VL's vision tower",
)
def window_order_of_the_projectors_rows_can_be_computed() -> None:
    """Qwen2.5-VL's tower has `permute_input_for_window_attn`, and `get_vision_window_index` gives
    the order in which its merger sees the image tokens."""
    from transformers.vision_utils import get_vision_window_index

    model, _, batch = qwen()
    visual = model.model.visual
    assert hasattr(visual, "permute_input_for_window_attn")
    index, _ = get_vision_window_index(
        batch["image_grid_thw"],
        spatial_merge_size=visual.spatial_merge_size,
        window_size=visual.window_size,
        patch_size=visual.patch_size,
    )
    n = int((batch["input_ids"] == model.config.image_token_id).sum())
    assert sorted(index.tolist()) == list(range(n))


# ---- transformers: positions ---------------------------------------------------------------------


@assumed(
    "transformers",
    used=("hooks/engine.py: rope_deltas", "hooks/behaviour.py: rope_deltas"),
    look="Qwen2.5-VL's forward: what it keeps of the last prompt, and under which name",
)
def the_last_prompts_position_offset_is_kept_on_a_module() -> None:
    """A forward over a prompt leaves `rope_deltas` on a module, as an attribute of its own, and the
    next forward without positions uses it."""
    model, _, batch = qwen()
    holders = [m for m in model.modules() if "rope_deltas" in vars(m)]
    assert holders
    with torch.no_grad():
        model(**plain(batch))
    assert isinstance(holders[0].rope_deltas, torch.Tensor)


@assumed(
    "transformers",
    used="hooks/prompts.py: mm_token_type_ids",
    look="Qwen2.5-VL's compute_3d_position_ids, and what the processor returns",
)
def without_token_types_positions_are_wrong_without_a_word() -> None:
    """Processors of multi-axis models return `mm_token_type_ids`, and without them Qwen2.5-VL
    counts one-dimensional positions without an error."""
    model, _, batch = qwen()
    inputs = plain(batch)
    assert "mm_token_type_ids" in inputs
    with torch.no_grad():
        right = model(**inputs).logits
        model.model.rope_deltas = None
        wrong = model(**{k: v for k, v in inputs.items() if k != "mm_token_type_ids"}).logits
    assert differ(right, wrong) > 1e-4


@assumed(
    "transformers",
    used=("hooks/resuming.py: position_ids", "hooks/script.py: position_ids"),
    look="the position_ids argument of multi-axis models",
)
def explicit_positions_override_everything_that_is_remembered() -> None:
    """With explicit `position_ids` a forward does not depend on what ran before."""
    model, _, batch = qwen()
    inputs = plain(batch) | {"position_ids": tiny.positions(model, batch)}
    with torch.no_grad():
        model.model.rope_deltas = None
        one = model(**inputs).logits
        model.model.rope_deltas = torch.full((2, 1), 17)
        other = model(**inputs).logits
    assert differ(one, other) == 0.0


@assumed(
    "transformers",
    used=("hooks/behaviour.py: _PREFIX_LMS", "hooks/model.py: self.behaviour.first_position"),
    look="PaliGemma's forward: where positions begin, and what its token_type_ids mean",
)
def paligemma_counts_from_one_and_reads_its_prompt_both_ways() -> None:
    """PaliGemma numbers positions from 1 where it is given none, and its prompt's tokens, of type
    0, see those behind them."""
    model, processor = tiny.build("paligemma")
    batch = plain(tiny.inputs("paligemma", processor, ["abc"], [tiny.image(16, 16, seed=0)]))
    width = batch["input_ids"].shape[1]
    numbered = torch.arange(1, width + 1)[None]
    other = batch | {"input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, -1] += 1
    with torch.no_grad():
        own = model(**batch).logits
        assert differ(own, model(**batch, position_ids=numbered).logits) < 1e-9
        assert differ(own[:, -2], model(**other).logits[:, -2]) > 1e-6


@assumed(
    "transformers",
    used="hooks/behaviour.py: _looks_ahead",
    look="which classes take token_type_ids, and what their masks are made of",
)
def classes_whose_images_look_ahead_ask_for_token_types() -> None:
    """Gemma 3's forward takes `token_type_ids`, from which the tokens of one image see each other,
    and classes without such masks do not take them."""
    gemma, _ = tiny.build("gemma3")
    llava, _ = tiny.build("llava")
    assert "token_type_ids" in inspect.signature(gemma.forward).parameters
    assert "token_type_ids" not in inspect.signature(llava.forward).parameters


@assumed(
    "transformers",
    used="hooks/registry.py: overlay",
    look="what stands between token embedding and first layer: latents are laid over the former",
)
def what_the_embedding_puts_out_enters_the_first_layer() -> None:
    """At text positions the token embedding's output, scaled where the class scales, is the first
    layer's input to the last bit."""
    for name in ("qwen2_5_vl", "qwen3_vl", "gemma3", "llava", "internvl"):
        model, processor = tiny.build(name)
        batch = tiny.inputs(name, processor, ["ab"], [tiny.image(24, 24, seed=0)])
        decoder = model.get_decoder()
        decoder = getattr(decoder, "language_model", decoder)
        found: dict[str, torch.Tensor] = {}
        handles = [
            model.get_input_embeddings().register_forward_hook(
                lambda m, a, o, f=found: f.update(embedded=o)
            ),
            decoder.layers[0].register_forward_pre_hook(
                lambda m, a, k, f=found: f.update(entered=a[0] if a else k["hidden_states"]),
                with_kwargs=True,
            ),
        ]
        with torch.no_grad():
            model(**plain(batch))
        for handle in handles:
            handle.remove()
        text = batch["input_ids"] != model.config.image_token_id
        assert torch.equal(found["embedded"][text], found["entered"][text]), name


@assumed(
    "transformers",
    used=(
        "hooks/behaviour.py: hidden_size_per_layer_input",
        "hooks/prefix.py: num_kv_shared_layers",
    ),
    look="Gemma 3n's and Gemma 4's text configs: what they call per-layer inputs and shared caches",
)
def special_text_models_say_so_in_their_config() -> None:
    """Text configs of models with per-layer inputs, or with layers that read other layers' keys,
    have `hidden_size_per_layer_input` and `num_kv_shared_layers`."""
    config = transformers.Gemma3nTextConfig()
    assert config.hidden_size_per_layer_input > 0
    assert config.num_kv_shared_layers >= 0


@assumed(
    "transformers",
    used="hooks/attention.py: s_aux",
    look="what GPT-OSS gives its attention function for its sinks, which hook_pattern refuses",
)
def attention_sinks_come_as_an_argument_of_that_name() -> None:
    """Classes with attention sinks pass them to the attention function as `s_aux`."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

    assert "s_aux=" in inspect.getsource(GptOssAttention.forward)


@assumed(
    "transformers",
    used="hooks/behaviour.py: create_position_ids_from_input_ids",
    look="Kosmos-2's position table: its name, and that positions begin behind the padding id",
)
def kosmos_numbers_its_tokens_from_the_padding_id_on() -> None:
    """Kosmos-2's table of positions has `create_position_ids_from_input_ids` and `padding_idx`, and
    its first position is behind that."""
    from transformers.models.kosmos2 import modeling_kosmos2

    table = modeling_kosmos2.Kosmos2TextSinusoidalPositionalEmbedding(8, 4, padding_idx=1)
    ids = torch.tensor([[5, 6]])
    made = table.create_position_ids_from_input_ids(ids, table.padding_idx)
    assert made.tolist() == [[2, 3]]


# ---- transformers: attention ---------------------------------------------------------------------


@assumed(
    "transformers",
    used="hooks/attention.py: ALL_ATTENTION_FUNCTIONS",
    look="how attention classes find their function: hook_pattern and il.Knockout depend on it",
)
def attention_classes_ask_the_registry_by_its_name() -> None:
    """The forward of an attention class names `ALL_ATTENTION_FUNCTIONS`, which is how we know that
    a registered function of ours will be used."""
    model, _, _ = qwen()
    forward = inspect.unwrap(type(model.model.language_model.layers[0].self_attn).forward)
    assert "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names


@cache
def _seen_by_attention() -> dict[str, Any]:
    """What a registered attention function is given, once it is the config's."""
    model, _, batch = qwen()
    seen: dict[str, Any] = {"calls": 0, "batch": batch}

    def own(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        seen["calls"] += 1
        seen.update(module=module, query=query, key=key, value=value, mask=mask, kwargs=kwargs)
        repeats = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(repeats, 1) for each in (key, value))
        scores = query @ key.transpose(2, 3) * kwargs["scaling"]
        scores = scores if mask is None else scores + mask
        mixed = torch.softmax(scores.float(), -1).to(value) @ value
        return mixed.transpose(1, 2).contiguous(), None

    from transformers.masking_utils import eager_mask

    transformers.AttentionInterface.register("assumed", own)
    transformers.AttentionMaskInterface.register("assumed", eager_mask)
    configs = [model.config, model.model.language_model.layers[0].self_attn.config]
    before = [config._attn_implementation_internal for config in configs]
    with torch.no_grad():
        seen["plain"] = model(**plain(batch)).logits
        for config in configs:
            config._attn_implementation_internal = "assumed"
        seen["ours"] = model(**plain(batch)).logits
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name
        seen["again"] = model(**plain(batch)).logits
    return seen


@assumed(
    "transformers",
    used=(
        "hooks/attention.py: AttentionInterface.register",
        "hooks/attention.py: _attn_implementation_internal",
    ),
    look="AttentionInterface, and when a model reads config._attn_implementation_internal",
)
def a_registered_attention_function_is_used_from_the_next_forward_on() -> None:
    """Setting `config._attn_implementation_internal` to a registered name makes the next forward
    call that function, and setting it back the one after it the old one; nothing is cached."""
    seen = _seen_by_attention()
    model, _, _ = qwen()
    assert seen["calls"] == len(model.model.language_model.layers)
    real = seen["batch"]["attention_mask"].bool()
    assert differ(seen["plain"][real], seen["ours"][real]) < 1e-4
    assert torch.equal(seen["plain"], seen["again"])


@assumed(
    "transformers",
    used="hooks/attention.py: def _pattern_attention",
    look="eager_attention_forward of the classes: argument order, shapes, names",
)
def an_attention_function_gets_heads_first_and_shared_keys_once() -> None:
    """An attention function is given (module, query, key, value, mask, scaling=, dropout=), with
    axes (example, head, position, d_head) after rotation, and keys and values not repeated."""
    seen = _seen_by_attention()
    config = seen["module"].config
    assert seen["query"].shape[1] == config.num_attention_heads
    assert seen["key"].shape[1] == seen["value"].shape[1] == config.num_key_value_heads
    assert config.num_key_value_heads < config.num_attention_heads
    assert {"scaling", "dropout"} <= set(seen["kwargs"])


@assumed(
    "transformers",
    used=("hooks/attention.py: eager_mask", "hooks/attention.py: torch.finfo(mask.dtype).min"),
    look="transformers.masking_utils.eager_mask",
)
def the_eager_mask_is_added_to_scores() -> None:
    """With `eager_mask` registered, the mask is (example, 1, query, key), 0 where a key is seen and
    the dtype's lowest number where not."""
    mask = _seen_by_attention()["mask"]
    assert mask.dim() == 4
    assert mask.shape[1] == 1
    assert set(mask.unique().tolist()) == {0.0, torch.finfo(mask.dtype).min}


@assumed(
    "transformers",
    used="hooks/prefix.py: TRANSFORMERS_SDPA_FORCE_GQA",
    look="transformers.integrations.sdpa_attention; repeated keys cost a quarter of a map's time",
)
def shared_keys_are_left_alone_if_the_environment_says_so() -> None:
    """TRANSFORMERS_SDPA_FORCE_GQA=1 in the environment, read in every call, gives torch's attention
    the shared keys unrepeated, with the same result."""
    model, _, batch = qwen()
    inputs, heads = plain(batch), []

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is nn.functional.scaled_dot_product_attention:
                given = dict(zip(("query", "key"), args, strict=False)) | (kwargs or {})
                heads.append((given["query"].shape[1], given["key"].shape[1]))
            return func(*args, **(kwargs or {}))

    def run() -> tuple[torch.Tensor, tuple[int, int]]:
        heads.clear()
        with torch.no_grad(), Watch():
            logits = model(**inputs).logits
        return logits, heads[-1]

    name = "TRANSFORMERS_SDPA_FORCE_GQA"
    assert name not in os.environ
    repeated, (n, m) = run()
    assert n == m
    os.environ[name] = "1"
    try:
        shared, (n, m) = run()
    finally:
        del os.environ[name]
    assert n > m
    assert differ(repeated, shared) < 1e-4


# ---- transformers: generate ----------------------------------------------------------------------


@assumed(
    "transformers",
    used=("hooks/generate.py: def __call__", "hooks/model.py: custom_generate=loop.__call__"),
    look="GenerationMixin.generate: what it calls custom_generate with",
)
def generate_hands_over_to_a_callable() -> None:
    """`generate(custom_generate=fn)` calls fn(model, input_ids, logits_processor,
    stopping_criteria, generation_config, **kwargs) in the place of its own loop and returns what it
    returns."""
    model, _, batch = qwen()
    seen = called(model, batch)
    assert seen["model"] is model
    assert torch.equal(seen["input_ids"], batch["input_ids"])
    named = seen["rest"] or tuple(
        seen["kwargs"][n] for n in ("logits_processor", "stopping_criteria", "generation_config")
    )
    assert isinstance(named[0], LogitsProcessorList)
    assert isinstance(named[1], StoppingCriteriaList)
    assert named[2].max_length == batch["input_ids"].shape[1] + 3


@assumed(
    "transformers",
    used=("hooks/sampling.py: _pad_token_tensor", "hooks/sampling.py: _eos_token_tensor"),
    look="GenerationMixin._prepare_special_tokens",
)
def special_tokens_are_tensors_on_the_generation_config() -> None:
    """The generation config that the loop is given has `_pad_token_tensor` and
    `_eos_token_tensor`."""
    model, processor, batch = qwen()
    seen = called(model, batch)
    config = next(v for v in (*seen["rest"], *seen["kwargs"].values()) if hasattr(v, "do_sample"))
    assert int(config._pad_token_tensor) == processor.tokenizer.pad_token_id
    assert processor.tokenizer.eos_token_id in config._eos_token_tensor.flatten().tolist()


@assumed(
    "transformers",
    used=("hooks/generate.py: position_ids", 'hooks/generate.py: kwargs["position_ids"]'),
    look="GenerationMixin._prepare_position_ids_for_generation, and the classes' overrides",
)
def generate_prepares_positions_and_a_cache() -> None:
    """The loop is given `position_ids`, that do not count padding, and an empty cache."""
    model, _, batch = qwen()
    kwargs = called(model, batch)["kwargs"]
    wanted = tiny.positions(model, batch)
    real = batch["attention_mask"].bool()
    assert torch.equal(kwargs["position_ids"][-3:, real], wanted[:, real])
    assert kwargs["past_key_values"].get_seq_length() == 0


@assumed(
    "transformers",
    used=(
        "hooks/generate.py: is_first_iteration=True",
        "hooks/generate.py: next_sequence_length=1",
    ),
    look="prepare_inputs_for_generation of GenerationMixin and of the classes",
)
def inputs_of_a_step_are_cut_to_what_was_not_read() -> None:
    """`prepare_inputs_for_generation(ids, is_first_iteration=True, **kwargs)` gives the whole
    prompt with its pictures, and with `next_sequence_length=1` the last column with its
    position."""
    model, _, batch = qwen()
    kwargs = called(model, batch)["kwargs"]
    first = model.prepare_inputs_for_generation(
        batch["input_ids"], is_first_iteration=True, **kwargs
    )
    assert torch.equal(first["input_ids"], batch["input_ids"])
    step = model.prepare_inputs_for_generation(batch["input_ids"], next_sequence_length=1, **kwargs)
    assert step["input_ids"].shape[1] == 1
    assert step["position_ids"].shape[-1] == 1


@assumed(
    "transformers",
    used="hooks/generate.py: _update_model_kwargs_for_generation",
    look="GenerationMixin._update_model_kwargs_for_generation",
)
def kwargs_of_the_next_step_carry_cache_mask_and_positions() -> None:
    """`_update_model_kwargs_for_generation(outputs, kwargs, is_encoder_decoder=)` carries the cache
    on and gives mask and positions one more column."""
    model, _, batch = qwen()
    kwargs = called(model, batch)["kwargs"]
    inputs = model.prepare_inputs_for_generation(
        batch["input_ids"], is_first_iteration=True, **kwargs
    )
    width = kwargs["position_ids"].shape[-1]
    mask = kwargs["attention_mask"].shape[-1]
    with torch.no_grad():
        outputs = model(**inputs, return_dict=True)
    after = model._update_model_kwargs_for_generation(outputs, kwargs, is_encoder_decoder=False)
    assert after["past_key_values"] is outputs.past_key_values
    assert after["attention_mask"].shape[-1] == mask + 1
    assert after["position_ids"].shape[-1] == width + 1
    assert int(after["position_ids"].max()) == int(kwargs["position_ids"][..., :width].max()) + 1


@assumed(
    "transformers",
    used="hooks/generate.py: mm_encoder_outputs",
    look="where generate encodes multimodal inputs; pictures withheld from it run in our prefill",
)
def generate_encodes_pictures_before_the_loop_begins() -> None:
    """With pixels, `generate` runs the vision tower before it calls the loop, where no hook would
    see it; without them, given to the first forward, the loop's prefill runs it."""
    model, _, batch = qwen()
    runs: list[str] = []
    handle = model.model.visual.register_forward_hook(lambda m, a, o: runs.append("tower"))
    try:
        seen = called(model, batch)
        assert "mm_encoder_outputs" in seen["kwargs"] or not runs
        assert runs == ["tower"]
        runs.clear()
        called(model, {k: v for k, v in batch.items() if k != "pixel_values"})
        assert runs == []
    finally:
        handle.remove()


@assumed(
    "transformers",
    used="hooks/generate.py: stopping_criteria(input_ids, None)",
    look="StoppingCriteriaList.__call__",
)
def stopping_criteria_say_which_rows_are_done() -> None:
    """A `StoppingCriteriaList` called with ids and None for scores gives one bool for each row."""
    stops = StoppingCriteriaList(
        [transformers.MaxLengthCriteria(3), transformers.EosTokenCriteria(7)]
    )
    ids = torch.tensor([[1, 7], [1, 2]])
    assert stops(ids, None).tolist() == [True, False]


@assumed(
    "transformers",
    used="hooks/model.py: SuppressTokensLogitsProcessor",
    look="SuppressTokensLogitsProcessor, which il.Skip uses",
)
def suppressed_tokens_cannot_be_sampled() -> None:
    """`SuppressTokensLogitsProcessor(ids, device=)` puts -inf at those tokens and leaves the
    others."""
    found = transformers.SuppressTokensLogitsProcessor([1], device="cpu")(
        torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 3)
    )
    assert found.tolist() == [[0.0, float("-inf"), 0.0]]


@assumed(
    "transformers",
    used="hooks/model.py: GenerationMixin.generate(",
    look="GenerationMixin.generate as a plain function of a model",
)
def the_mixins_generate_can_be_called_past_a_class() -> None:
    """`GenerationMixin.generate(model, ...)` is what `model.generate` does where the class does not
    override it."""
    from transformers.generation import GenerationMixin

    model, _, batch = qwen()
    inputs = plain(batch)
    with torch.no_grad():
        one = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        other = GenerationMixin.generate(model, **inputs, max_new_tokens=2, do_sample=False)
    assert torch.equal(one, other)


@assumed(
    "transformers",
    used="hooks/bytoken.py: model.prepare_inputs_for_generation = instead",
    look="whether generate asks the instance for prepare_inputs_for_generation",
)
def a_method_put_on_the_instance_is_used() -> None:
    """A function put on a model as `prepare_inputs_for_generation` is what generation calls, and
    deleting it brings the class's own back."""
    model, _ = tiny.fresh("llava", dtype=torch.float32)
    asked: list[int] = []
    own = model.prepare_inputs_for_generation

    def counted(*args: Any, **kwargs: Any) -> Any:
        asked.append(1)
        return own(*args, **kwargs)

    model.prepare_inputs_for_generation = counted
    ids = torch.tensor([[1, 5, 6]])
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    del model.prepare_inputs_for_generation
    assert len(asked) >= 2
    assert model.prepare_inputs_for_generation.__func__ is type(model).prepare_inputs_for_generation


# ---- transformers: cache and logits --------------------------------------------------------------


def _caches() -> tuple[Any, Any, dict[str, Any]]:
    from transformers.cache_utils import DynamicCache

    model, _, batch = qwen()
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    inputs = plain(batch) | {"position_ids": tiny.positions(model, batch)}
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)
    return model, cache, inputs


@assumed(
    "transformers",
    used=("hooks/prefix.py: layer.keys, layer.values", "hooks/prefix.py: new.layers"),
    look="transformers.cache_utils.DynamicCache and DynamicLayer",
)
def a_dynamic_cache_has_layers_with_keys_and_values() -> None:
    """`DynamicCache.layers` is a list of one layer each with `keys` and `values`, (example,
    key/value head, position, d_head), and None before anything was read."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    model, cache, inputs = _caches()
    text = model.config.get_text_config(decoder=True)
    assert len(cache.layers) == text.num_hidden_layers
    layer = cache.layers[0]
    assert type(layer) is DynamicLayer
    n_rows, width = inputs["input_ids"].shape
    assert layer.keys.shape[:3] == (n_rows, text.num_key_value_heads, width)
    assert layer.values.shape[2] == width
    empty = DynamicCache(config=text)
    assert all(each.keys is None for each in empty.layers)


@assumed(
    "transformers",
    used="hooks/prefix.py: def repeated",
    look="DynamicLayer.update: it must concatenate, not write in place, for copies share tensors",
)
def a_copied_cache_grows_by_itself() -> None:
    """A shallow copy of a cache, and of its layers, can be read on from, with rows repeated, and
    leaves the first one as it was."""
    model, cache, inputs = _caches()
    width = inputs["input_ids"].shape[1]
    before = cache.layers[0].keys.clone()
    for rows in ([0, 1], [0, 0, 1]):
        grown = _grown(model, cache, inputs, rows)
        assert grown.layers[0].keys.shape[::2][:2] == (len(rows), width + 1)
        assert torch.equal(cache.layers[0].keys, before)


def _grown(model: Any, cache: Any, inputs: dict[str, Any], rows: list[int]) -> Any:
    """A copy of a cache, with copies of some rows, after one more column was read."""
    grown = copy.copy(cache)
    grown.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in grown.layers if rows != [0, 1] else ():
        layer.keys, layer.values = layer.keys[rows], layer.values[rows]
    ones = torch.ones(len(rows), 1, dtype=torch.long)
    with torch.no_grad():
        model(
            input_ids=inputs["input_ids"][rows, -1:],
            attention_mask=torch.cat([inputs["attention_mask"][rows], ones], 1),
            position_ids=inputs["position_ids"][:, rows, -1:] + 1,
            past_key_values=grown,
        )
    return grown


@assumed(
    "transformers",
    used="hooks/prefix.py: DynamicSlidingWindowLayer",
    look="DynamicCache(config=...): which layer classes it makes",
)
def sliding_layers_have_a_class_of_their_own() -> None:
    """`DynamicCache(config=...)` makes a `DynamicSlidingWindowLayer` where the config's layer
    slides, and a plain `DynamicLayer` elsewhere."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    model, _ = tiny.build("gemma3")
    text = model.config.get_text_config(decoder=True)
    kinds = [type(layer) for layer in DynamicCache(config=text).layers]
    wanted = [
        DynamicSlidingWindowLayer if "sliding" in kind else DynamicLayer
        for kind in text.layer_types
    ]
    assert kinds == wanted
    assert DynamicSlidingWindowLayer in kinds


@assumed(
    "transformers",
    used="hooks/prefix.py: logits_to_keep",
    look="the logits_to_keep argument of the classes' forward",
)
def logits_of_chosen_columns_alone_can_be_asked_for() -> None:
    """`logits_to_keep=tensor of columns` gives the logits of those columns."""
    model, _, batch = qwen()
    inputs = plain(batch) | {"position_ids": tiny.positions(model, batch)}
    with torch.no_grad():
        whole = model(**inputs).logits
        some = model(**inputs, logits_to_keep=torch.tensor([1, 4])).logits
    assert differ(whole[:, [1, 4]], some) < 1e-5


@assumed(
    "transformers",
    used="hooks/tensor_parallel.py: .install_forward.<locals>.",
    look="TensorParallelLayer.install_forward, and what model.tp_plan puts on each layer",
)
def a_split_layer_has_a_forward_of_install_forward() -> None:
    """Tensor parallelism puts on a layer a `forward` that is made in an `install_forward`, whose
    `self` is what splits it: `SequenceParallel` by positions, others by weights, and those of the
    module `expert_parallel` by experts."""
    from transformers.distributed import expert_parallel, tensor_parallel

    for kind in ("ColwiseParallel", "RowwiseParallel", "SequenceParallel"):
        plain = nn.LayerNorm(4, elementwise_affine=False)
        layer: Any = plain if kind == "SequenceParallel" else nn.Linear(4, 4)
        split = getattr(tensor_parallel, kind)()
        split.install_forward(layer, None)
        assert ".install_forward.<locals>." in layer.forward.__qualname__
        assert inspect.getclosurevars(layer.forward).nonlocals["self"] is split
    assert expert_parallel.ExpertParallelLayer.__module__.endswith(".expert_parallel")


# ---- transformers: checkpoints and processors ----------------------------------------------------


@assumed(
    "transformers",
    used=("hooks/loading.py: output_loading_info=True", "hooks/loading.py: _model_mapping"),
    look="from_pretrained(output_loading_info=True), and the private mapping of the auto classes",
)
def loading_tells_which_weights_are_missing() -> None:
    """`from_pretrained(output_loading_info=True)` gives the model and a dict with `missing_keys`,
    `unexpected_keys` and `mismatched_keys`; `AutoModelForImageTextToText._model_mapping` knows the
    config classes it opens."""
    model, _, _ = qwen()
    assert type(model.config) in transformers.AutoModelForImageTextToText._model_mapping
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        _, info = type(model).from_pretrained(
            folder, use_safetensors=True, output_loading_info=True
        )
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= set(info)
    assert not info["missing_keys"]


@assumed(
    "transformers",
    used=(
        "examples/capimagine/resuming.py: _load_from_checkpoint",
        "examples/capimagine/resuming.py: _load_best_model",
    ),
    look="Trainer._load_from_checkpoint: if names are mapped now, ExactResume can go",
)
def a_checkpoint_has_other_names_than_the_model_in_memory() -> None:
    """`save_pretrained` writes Qwen2.5-VL's weights under other names than the model's own, and
    `Trainer._load_from_checkpoint` looks for those it has in memory, so that a training that is
    resumed restarts silently without `ExactResume`."""
    from safetensors import safe_open

    model, _, _ = qwen()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safe_open(Path(folder) / "model.safetensors", framework="pt") as file:
            written = set(file.keys())
    own = set(model.state_dict())
    assert len(written & own) < len(own) / 2
    load = inspect.signature(transformers.Trainer._load_from_checkpoint).parameters
    assert list(load)[1:3] == ["resume_from_checkpoint", "model"]
    source = inspect.getsource(transformers.Trainer._load_from_checkpoint)
    assert "load_state_dict" in source or "load_sharded_checkpoint" in source
    assert callable(transformers.Trainer._load_best_model)


@assumed(
    "transformers",
    used="hooks/processors.py: def get_attributes",
    look="ProcessorMixin.get_attributes and from_args_and_dict, which image_only overrides",
)
def a_processors_parts_can_be_named_and_left_out() -> None:
    """`ProcessorMixin.get_attributes()` lists a processor's parts, and `from_args_and_dict(args,
    processor_dict)` builds one from them, so that the video part can be left out where torchvision
    is missing."""
    stock = transformers.Qwen2_5_VLProcessor
    assert "video_processor" in transformers.ProcessorMixin.get_attributes.__func__(stock)
    assert "image_processor" in stock.get_attributes()
    parameters = list(inspect.signature(stock.from_args_and_dict).parameters)
    assert parameters[:2] == ["args", "processor_dict"]


@assumed(
    "transformers",
    used=(
        "hooks/processors.py: _raise_exceptions_for_missing_entries=False",
        "src/imaginelens/organisms/organism.py: cached_file",
    ),
    look="transformers.utils.cached_file",
)
def a_file_that_is_not_there_is_none() -> None:
    """`cached_file(folder, name, _raise_exceptions_for_missing_entries=False)` gives a path, or
    None where there is no such file."""
    from transformers.utils import cached_file

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "here.json").write_text("{}")
        options = {"_raise_exceptions_for_missing_entries": False}
        assert cached_file(folder, "nowhere.json", **options) is None
        assert Path(cached_file(folder, "here.json", **options)).name == "here.json"


@assumed(
    "transformers",
    used="src/imaginelens/organisms/checkpoint.py: Qwen2VLImageProcessorPil",
    look="the image processors without torchvision; pillow must be enough",
)
def pictures_need_pillow_alone() -> None:
    """There is an image processor without torchvision, `Qwen2VLImageProcessorPil`, and pixels of a
    PIL image come out as rows of patches."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    found = Qwen2VLImageProcessorPil()(tiny.image(56, 56, seed=0), return_tensors="pt")
    rows = int(found["image_grid_thw"].prod())
    assert found["pixel_values"].shape[0] == rows


# ---- TransformerLens -----------------------------------------------------------------------------


def _points() -> Any:
    from transformer_lens import HookedRootModule
    from transformer_lens.hook_points import HookPoint

    class Small(HookedRootModule):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Module()])
            self.blocks[0].hook_out = HookPoint()
            self.setup()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks[0].hook_out(x) + 1

    return Small()


@assumed(
    "transformer_lens",
    used="hooks/bound.py: self.setup()",
    look="HookedRootModule.setup and hook_dict",
)
def setup_names_every_hook_point() -> None:
    """`HookedRootModule.setup()` fills `hook_dict` with all `HookPoint`s by their path and gives
    each its `name`."""
    model = _points()
    assert set(model.hook_dict) == {"blocks.0.hook_out"}
    assert model.blocks[0].hook_out.name == "blocks.0.hook_out"


@assumed(
    "transformer_lens",
    used=("hooks/bound.py: point._forward_hooks", "hooks/bound.py: _backward_hooks"),
    look="HookPoint.add_hook: where hooks are put",
)
def hooks_are_torch_hooks_of_the_hook_point() -> None:
    """While `run_with_hooks` runs, its hooks are forward hooks of the `HookPoint` modules, called
    as fn(value, hook=point), and their return value goes on; afterwards they are gone."""
    model, held = _points(), []

    def double(value: torch.Tensor, hook: Any) -> torch.Tensor:
        held.append((len(hook._forward_hooks), hook.name))
        return value * 2

    found = model.run_with_hooks(torch.ones(2), fwd_hooks=[("blocks.0.hook_out", double)])
    assert found.tolist() == [3.0, 3.0]
    assert held == [(1, "blocks.0.hook_out")]
    assert not model.blocks[0].hook_out._forward_hooks


@assumed(
    "transformer_lens",
    used="hooks/bound.py: super().run_with_cache",
    look="HookedRootModule.run_with_cache",
)
def run_with_cache_gives_the_output_and_a_dict() -> None:
    """`HookedRootModule.run_with_cache` gives the model's output and what the hook points saw, by
    name."""
    found, cache = _points().run_with_cache(torch.ones(2))
    assert found.tolist() == [2.0, 2.0]
    assert cache["blocks.0.hook_out"].tolist() == [1.0, 1.0]


@assumed(
    "transformer_lens",
    used=("hooks/names.py: def get_act_name", "hooks/cache.py: get_act_name"),
    look="transformer_lens.utils.get_act_name; our names follow it",
)
def short_names_are_spelled_alike() -> None:
    """TransformerLens' `get_act_name` spells short names of sites as ours does."""
    from transformer_lens.utilities import get_act_name as theirs

    from imaginelens.hooks.names import get_act_name as ours

    for short in (
        "resid_pre",
        "resid_mid",
        "resid_post",
        "attn_out",
        "mlp_out",
        "q",
        "k",
        "v",
        "z",
        "pattern",
    ):
        assert theirs(short, 3) == ours(short, 3), short


@assumed(
    "transformer_lens",
    used=("hooks/bound.py: ActivationCache(", "hooks/bound.py: def to_transformer_lens"),
    look="transformer_lens.ActivationCache",
)
def its_cache_is_made_of_a_dict_and_a_model() -> None:
    """`ActivationCache(dict, model, has_batch_dim=)` takes any mapping of names, finds
    `cache["resid_post", 1]` in it, and has `cache_dict`."""
    from transformer_lens import ActivationCache

    model = _points()
    held = {"blocks.1.hook_resid_post": torch.ones(1, 2, 3)}
    cache = ActivationCache(held, model, has_batch_dim=True)
    assert cache["resid_post", 1] is held["blocks.1.hook_resid_post"]
    assert set(cache.cache_dict) == set(held)


@assumed(
    "transformer_lens",
    used="hooks/bound.py: TransformerLensConfig(",
    look="transformer_lens.config.TransformerLensConfig",
)
def its_config_takes_our_sizes() -> None:
    """`TransformerLensConfig` is made of the sizes that its tools ask for, by the names we give."""
    from transformer_lens.config import TransformerLensConfig

    config = TransformerLensConfig(
        d_model=8, d_head=4, n_layers=2, n_ctx=16, n_heads=2, d_vocab=10, d_mlp=16, device="cpu",
        n_key_value_heads=1, default_prepend_bos=False, normalization_type="RMS",
        uses_rms_norm=True, final_rms=True, dtype=torch.float32,
    )  # fmt: skip
    assert (config.n_layers, config.n_heads, config.d_model) == (2, 2, 8)


@assumed(
    "transformer_lens",
    used="hooks/bound.py: def forward",
    look="transformer_lens.patching: how it calls run_with_hooks (why there is a BoundModel)",
)
def patching_calls_the_model_with_tokens_alone() -> None:
    """`patching.get_act_patch_resid_pre` calls `model.run_with_hooks(tokens, fwd_hooks=[...])`
    without any input but the tokens, and asks `cfg` for the number of layers."""
    from types import SimpleNamespace

    from transformer_lens import patching

    asked: list[tuple[tuple[Any, ...], set[str]]] = []

    class Spy(nn.Module):
        cfg = SimpleNamespace(
            n_layers=1, n_heads=1, device="cpu", n_key_value_heads=None, d_model=3
        )

        def run_with_hooks(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            asked.append((args, set(kwargs)))
            return torch.zeros(1, 2, 4)

    tokens = torch.tensor([[1, 2]])
    cache = {"blocks.0.hook_resid_pre": torch.zeros(1, 2, 3)}
    from transformer_lens import ActivationCache

    patching.get_act_patch_resid_pre(
        Spy().eval(), tokens, ActivationCache(cache, Spy()), lambda logits: logits.sum()
    )
    assert len(asked) == 2
    for args, named in asked:
        assert torch.equal(args[0], tokens)
        assert named <= {"fwd_hooks"}


@assumed(
    "transformer_lens",
    used="probes/interchange.py: _tools()",
    look="transformer_lens.tools.analysis.interchange, which find_subspace uses",
)
def its_tools_for_interchange_are_where_we_take_them() -> None:
    """`tools.analysis.interchange` has `fit_das`, `arbitrary_targets`, `SubspaceInterchange`,
    `random_basis`, `NormMatchedPlacebo` and `intervened_logits`."""
    from transformer_lens.tools.analysis import interchange

    names = "fit_das arbitrary_targets SubspaceInterchange random_basis NormMatchedPlacebo"
    for name in (*names.split(), "intervened_logits"):
        assert callable(getattr(interchange, name)), name
    basis = interchange.random_basis(6, 2, 0)
    torch.testing.assert_close(basis.T @ basis, torch.eye(2).to(basis), atol=1e-5, rtol=0)


@assumed(
    "transformer_lens",
    used=("tests/conftest.py: PIP_NO_INDEX", "docs/decisions.md: boot_transformers"),
    look="its loader of processors: if it installs nothing any more, the tests' guard can go",
)
def its_loader_may_install_torchvision() -> None:
    """`boot_transformers` may run pip in-process for a missing torchvision, so nothing of ours
    calls it, and the tests cut pip off."""
    from transformer_lens.model_bridge.sources.transformers import helpers

    assert "pip" in inspect.getsource(helpers._ensure_torchvision)
    assert os.environ["PIP_NO_INDEX"] == "1"
    for folder in ("hooks", "mediation", "probes", "src"):
        for file in (ROOT / folder).rglob("*.py"):
            assert "boot_transformers(" not in file.read_text(encoding="utf-8"), file


@assumed(
    "transformer_lens",
    used=(
        "hooks/model.py: original_model",
        "hooks/structure.py: transformer_lens.",
        "hooks/structure.py: _original_component",
    ),
    look="TransformerBridge: what it keeps the model as, and where it puts its components",
)
def a_bridge_keeps_the_model_and_replaces_its_blocks() -> None:
    """A `TransformerBridge` has the Hugging Face model as `original_model`, whose blocks it has
    replaced by components of its own, with the old ones as `_original_component`."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = model(ids).logits
        bridge = build_bridge_from_module(model, "LlamaForCausalLM", hf_config=config)
        after = bridge.original_model(ids).logits
    assert bridge.original_model is model
    assert type(model.model.layers[0]).__module__.startswith("transformer_lens.")
    assert any("_original_component" in name for name, _ in model.named_modules())
    assert differ(before, after) < 1e-4


# ---- torch ---------------------------------------------------------------------------------------


@assumed(
    "torch",
    used="hooks/padding.py: TorchFunctionMode",
    look="torch.overrides.TorchFunctionMode and scaled_dot_product_attention",
)
def a_function_mode_sees_attention_and_may_change_it() -> None:
    """A `TorchFunctionMode` sees calls of `scaled_dot_product_attention` by identity and may give
    it other arguments by name."""
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is nn.functional.scaled_dot_product_attention:
                seen.append(1)
                given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
                return func(**given | {"is_causal": True})
            return func(*args, **(kwargs or {}))

    q = torch.randn(1, 1, 3, 2)
    with Mode():
        found = nn.functional.scaled_dot_product_attention(q, q, q)
    assert seen == [1]
    assert torch.equal(found[0, 0, 0], q[0, 0, 0])


@assumed(
    "torch",
    used=("hooks/edits.py: torch.Generator().manual_seed", "hooks/sampling.py: generator"),
    look="torch.Generator",
)
def a_private_generator_leaves_the_global_one_alone() -> None:
    """Drawing from a `torch.Generator` gives the same numbers for the same seed and does not move
    the global random state."""
    before = torch.random.get_rng_state()
    one, other = (
        torch.randn(3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        for _ in range(2)
    )
    assert torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)


@assumed(
    "torch",
    used="hooks/recorded.py: weights_only=True",
    look="torch.load(weights_only=True): recordings in .pt files must never run code",
)
def a_pickle_of_more_than_tensors_is_refused() -> None:
    """`torch.load(weights_only=True)` reads dicts of tensors and words, and raises an
    UnpicklingError for anything that would call a function."""
    import pickle

    class Code:
        def __reduce__(self) -> Any:
            return (os.mkdir, ("never",))

    with tempfile.TemporaryDirectory() as folder:
        good, bad = Path(folder) / "good.pt", Path(folder) / "bad.pt"
        torch.save({"a": torch.ones(2), "b": "word"}, good)
        torch.save({"a": Code()}, bad)
        assert torch.load(good, weights_only=True)["b"] == "word"
        with pytest.raises(pickle.UnpicklingError):
            torch.load(bad, weights_only=True)
    assert not Path("never").exists()


@assumed(
    "torch",
    used="hooks/bytoken.py: register_forward_pre_hook(completed, with_kwargs=True)",
    look="nn.Module.register_forward_pre_hook",
)
def a_pre_hook_may_complete_keyword_arguments() -> None:
    """A forward pre-hook with `with_kwargs=True` that returns (args, kwargs) changes what the
    module is given, and `remove()` takes it off."""
    layer = nn.Linear(2, 2)
    handle = layer.register_forward_pre_hook(
        lambda m, a, k: (a, {"input": k["input"] * 0}), with_kwargs=True
    )
    x = torch.ones(1, 2)
    assert torch.equal(layer(input=x)[0], layer.bias)
    handle.remove()
    assert not torch.equal(layer(input=x)[0], layer.bias)


# ---- the Hub -------------------------------------------------------------------------------------


@assumed(
    "huggingface_hub",
    used=(
        "hooks/hub.py: api.create_repo(",
        "hooks/hub.py: api.upload_folder(",
        "hooks/hub.py: snapshot_download(",
    ),
    look="HfApi.create_repo and upload_folder, and snapshot_download",
)
def the_hub_takes_the_arguments_we_give() -> None:
    """`create_repo`, `upload_folder` and `snapshot_download` take the arguments that we give them,
    and a commit has its `oid`."""
    from huggingface_hub import CommitInfo, HfApi, snapshot_download

    for real, names in (
        (HfApi.create_repo, {"repo_type", "private", "exist_ok"}),
        (HfApi.upload_folder, {"repo_id", "folder_path", "commit_message", "repo_type"}),
        (snapshot_download, {"repo_type", "revision", "allow_patterns"}),
    ):
        assert names <= set(inspect.signature(real).parameters), real.__name__
    assert "oid" in CommitInfo.__dataclass_fields__


@assumed(
    "huggingface_hub",
    used=("hooks/hub.py: OfflineModeIsEnabled", "hooks/hub.py: HFValidationError"),
    look="huggingface_hub.errors: whether our one-sentence errors still catch them",
)
def errors_of_the_hub_are_of_known_kinds() -> None:
    """Offline mode, missing repositories and revisions and invalid ids have errors of their own,
    all of them OSErrors, ValueErrors or `errors.HTTPError`."""
    from huggingface_hub import errors

    for name in (
        "OfflineModeIsEnabled", "LocalEntryNotFoundError", "RepositoryNotFoundError",
        "RevisionNotFoundError", "GatedRepoError", "HFValidationError",
    ):  # fmt: skip
        kind = getattr(errors, name)
        assert issubclass(kind, OSError | ValueError), name


# ---- the tests -----------------------------------------------------------------------------------


@pytest.mark.parametrize("assumption", ASSUMPTIONS, ids=lambda each: each.name)
def test_the_assumption_holds(assumption: Assumption) -> None:
    assumption.hold()


@pytest.mark.parametrize("assumption", ASSUMPTIONS, ids=lambda each: each.name)
def test_it_is_used_where_it_says(assumption: Assumption) -> None:
    assert not assumption.stale()


def test_there_are_many_and_each_is_named_once() -> None:
    names = [each.name for each in ASSUMPTIONS]
    assert len(names) == len(set(names)) >= 30
    assert {each.package for each in ASSUMPTIONS} >= {
        "nnsight",
        "transformers",
        "transformer_lens",
        "torch",
    }


def test_the_page_is_made_of_the_tests() -> None:
    """To renew: PYTHONPATH=tests python tests/contract/test_assumptions.py"""
    assert (ROOT / "docs" / "assumptions.md").read_text(encoding="utf-8") == page()


def test_a_broken_assumption_says_which_where_and_what_to_do() -> None:
    def check() -> None:
        raise RuntimeError("tuple object has no attribute shape")

    broken = Assumption(
        "torch", "x", "Layers are fast.", ("hooks/run.py: Run",), "the layers", check
    )
    with pytest.raises(AssumptionBroke) as told:
        broken.hold()
    wanted = f"torch {version('torch')} breaks an assumption: Layers are fast. Used in hooks/run.py"
    assert str(told.value).startswith(wanted)
    assert "Look at: the layers (What came: RuntimeError: ['tuple object" in str(told.value)
    assert broken.stale() == []
    gone = Assumption("torch", "x", "S.", ("hooks/run.py: no such word", "a.py: b"), "l", check)
    assert gone.stale() == ["hooks/run.py: no such word", "a.py: b"]


def by_name(name: str) -> Assumption:
    return next(each for each in ASSUMPTIONS if each.name == name)


def test_checks_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases that behave otherwise, played: each is found, by its own assumption."""
    from transformers.cache_utils import DynamicLayer

    model, _, _ = qwen()
    layer = model.model.language_model.layers[0]  # wrappers may have put a forward on it
    forward, update = layer.forward, DynamicLayer.update

    def as_tuple(*args: Any, **kwargs: Any) -> Any:  # as in transformers 4
        return (forward(*args, **kwargs),)

    def in_place(self: Any, keys: Any, values: Any, *rest: Any, **kwargs: Any) -> Any:
        if self.keys is not None:
            self.keys.zero_()
        return update(self, keys, values, *rest, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(DynamicLayer, "update", in_place)
        with pytest.raises(AssumptionBroke, match="leaves the first one as it was"):
            by_name("a_copied_cache_grows_by_itself").hold()
    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", as_tuple)
        with pytest.raises(AssumptionBroke, match="returns the stream itself"):
            by_name("a_decoder_layer_returns_a_tensor").hold()
    with monkeypatch.context() as patch:
        patch.setattr(transformers.StoppingCriteriaList, "__call__", lambda *a, **k: True)
        with pytest.raises(AssumptionBroke, match="one bool for each row"):
            by_name("stopping_criteria_say_which_rows_are_done").hold()


def test_the_doctor_names_the_tested_versions() -> None:
    """What the doctor calls tested is what the tests are run with."""
    from imaginelens.view.doctor import TESTED

    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert TESTED == {name: pinned[name] for name in TESTED}
    assert set(TESTED) == {"torch", "transformers", "nnsight", "transformer-lens"}


if __name__ == "__main__":
    (ROOT / "docs" / "assumptions.md").write_text(page(), encoding="utf-8")
