"""One notebook with `lens.edit`, a raw nnsight trace and plain torch hooks: what each gives alone,
or a sentence that says why not."""

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import nnsight
import pytest
import torch
from untouched import fingerprint, same

import imaginelens as il

SITE, LAYER = "blocks.1.hook_resid_post", 1
D = torch.linspace(-1, 1, 64, dtype=torch.float64)
SHIFT = {"edit": D, "hook": D.flip(0) ** 3, "trace": torch.cos(5 * D)}
ORDERS = [("edit", "hook", "trace"), ("hook", "edit", "trace")]


@pytest.fixture
def lens() -> Any:
    lens = il.load("latent-content")
    lens.model.double()
    return lens


@pytest.fixture
def base(lens: Any) -> dict[str, Any]:
    example: dict[str, Any] = lens.task(n=1, seed=0).base[0]
    return example


def layers(lens: Any) -> Any:
    return lens.model.model.language_model.layers


@contextmanager
def hooked(lens: Any, shift: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """A plain torch hook that adds to the last position, and keeps what came."""
    seen: list[torch.Tensor] = []

    def add(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        seen.append(out.detach().clone())
        new = out.clone()
        new[:, -1] += shift
        return new

    handle = layers(lens)[LAYER].register_forward_hook(add)
    try:
        yield seen
    finally:
        handle.remove()


def next_input(lens: Any, base: Any, fn: Any, shift: torch.Tensor | None) -> list[torch.Tensor]:
    """A raw trace that may write; what it saw at the site, and what the next layer got."""
    model = lens.nnsight.model.language_model
    with torch.no_grad(), lens.nnsight.trace(base, fn=fn):
        out = model.layers[LAYER].output
        saw = nnsight.save(out.clone())
        if shift is not None:
            new = out.clone()
            new[:, -1] += shift
            model.layers[LAYER].output = new
        got = nnsight.save(model.layers[LAYER + 1].input.clone())
    return [saw, got]


def mixed(lens: Any, base: Any, fn: Any, order: Sequence[str]) -> dict[str, Any]:
    """Those of the three that are named, nested in this order."""
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        for who in order:
            if who == "edit":
                edit = il.Steer(SHIFT["edit"])
                found["landing"] = stack.enter_context(
                    lens.edit(edit, at=il.last_prompt, site=SITE)
                )
            if who == "hook":
                found["hook"] = stack.enter_context(hooked(lens, SHIFT["hook"]))
        shift = SHIFT["trace"] if "trace" in order else None
        found["trace"], found["next"] = next_input(lens, base, fn, shift)
    return found


def runs(lens: Any) -> dict[str, Any]:
    """What a trace may run: the bare model, and our verbs for a prompt and for a generation."""
    return {"model": None, "prompt": lens.run_with_hooks, "run": lens.run}


@pytest.mark.parametrize("what", ["model", "prompt", "run"])
@pytest.mark.parametrize("order", ORDERS, ids=" > ".join)
def test_three_together_give_the_sum_of_what_each_gives_alone(
    lens: Any, base: Any, order: tuple[str, ...], what: str
) -> None:
    fn = runs(lens)[what]
    before = fingerprint(lens.model)
    plain = mixed(lens, base, fn, ())["next"]
    for who in order:  # each alone adds its own
        alone = mixed(lens, base, fn, (who,))["next"] - plain
        torch.testing.assert_close(alone[0, -1], SHIFT[who], rtol=0, atol=1e-12)
        assert not alone[0, :-1].any()
    found = mixed(lens, base, fn, order)
    total = (found["next"] - plain)[0, -1]
    torch.testing.assert_close(total, sum(SHIFT.values()), rtol=0, atol=1e-12)
    # our edit acts first, then the body of the trace, then torch's hooks
    own = plain[0, -1]
    torch.testing.assert_close(found["trace"][0, -1] - own, SHIFT["edit"], rtol=0, atol=1e-12)
    seen = found["hook"][0][0, -1] - own
    torch.testing.assert_close(seen, SHIFT["edit"] + SHIFT["trace"], rtol=0, atol=1e-12)
    # the proof of landing is of the edit alone
    size = SHIFT["edit"].norm() / own.norm()
    assert found["landing"].relative_change == pytest.approx(float(size), abs=1e-12)
    assert found["landing"].fired == 1
    after = fingerprint(lens.model)
    assert same({**before, "deltas": {}}, {**after, "deltas": {}})  # a forward leaves its own


def adding(shift: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda module, args, out: torch.cat([out[:, :-1], out[:, -1:] + shift], 1)


@pytest.mark.parametrize("order", ORDERS, ids=" > ".join)
def test_the_answer_is_that_of_plain_torch_hooks(lens: Any, base: Any, order: Any) -> None:
    twin = copy.copy(lens.prompt(base).inputs)
    logits: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        for who in order[:2]:
            if who == "edit":
                stack.enter_context(
                    lens.edit(il.Steer(SHIFT["edit"]), at=il.last_prompt, site=SITE)
                )
            else:
                stack.enter_context(hooked(lens, SHIFT["hook"]))
        model = lens.nnsight.model.language_model
        with torch.no_grad(), lens.nnsight.trace(**twin):
            new = model.layers[0].output.clone()
            new[:, -1] += SHIFT["trace"]
            model.layers[0].output = new
            logits["mixed"] = nnsight.save(lens.nnsight.lm_head.output)
    handles = [
        layers(lens)[0].register_forward_hook(adding(SHIFT["trace"])),
        layers(lens)[LAYER].register_forward_hook(adding(SHIFT["edit"] + SHIFT["hook"])),
    ]
    with torch.no_grad():
        torch_only = lens.model(**twin).logits
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(logits["mixed"], torch_only, rtol=0, atol=1e-11)
    assert (torch_only - lens.run_with_hooks(base)).abs().max() > 1e-3


def test_who_only_reads_changes_nothing(lens: Any, base: Any) -> None:
    plain = lens.run(base, keep_logits=True)
    with lens.edit(il.Steer(SHIFT["edit"]), at=il.latent[0]) as alone:
        edited = lens.run(base, keep_logits=True)
    model, read = lens.nnsight.model.language_model, []
    handle = layers(lens)[LAYER].register_forward_hook(lambda m, a, out: read.append(out.shape))
    with lens.edit(il.Steer(SHIFT["edit"]), at=il.latent[0]) as landing:
        with lens.nnsight.trace(fn=lens.run, keep_logits=True) as tracer:
            with tracer.invoke(base):
                nnsight.save(model.layers[0].output)
            with tracer.invoke():
                run = nnsight.save(tracer.result)
    handle.remove()
    assert len(read) == len(run.logits[0]) > 3
    assert torch.equal(run.logits, edited.logits)
    assert torch.equal(run.latents, edited.latents)
    assert not torch.equal(run.latents, plain.latents)
    assert landing.cells == alone.cells


def edited_in_the_body(lens: Any, base: Any) -> None:
    with lens.nnsight.trace(base):
        with lens.edit(il.Zero(), at=il.last_prompt, site=SITE):
            nnsight.save(lens.nnsight.lm_head.output)


def edited_between_trace_and_invoke(lens: Any, base: Any) -> None:
    with lens.nnsight.trace() as tracer:
        with lens.edit(il.Zero(), at=il.last_prompt, site=SITE):
            with tracer.invoke(base):
                nnsight.save(lens.nnsight.lm_head.output)


def test_an_edit_opened_in_the_body_of_a_trace_is_refused(lens: Any, base: Any) -> None:
    """It would begin after the model, or end before it."""
    with pytest.raises(il.InputError, match="opened in the body of a running trace; open it aroun"):
        edited_in_the_body(lens, base)
    with pytest.raises(il.EditTouchedNothing, match="did not run in its block; run it there, and"):
        edited_between_trace_and_invoke(lens, base)
    assert lens.registry.entries == []
    assert lens.run(base).answer is not None  # and the model is as it was


def test_a_trace_around_all_may_hold_torch_hooks(lens: Any, base: Any) -> None:
    """The body begins before the model does, so that a hook put there is in time."""
    plain = mixed(lens, base, None, ())["next"]
    model = lens.nnsight.model.language_model
    with lens.edit(il.Steer(SHIFT["edit"]), at=il.last_prompt, site=SITE):
        with torch.no_grad(), lens.nnsight.trace(base):
            stack = ExitStack()
            stack.enter_context(hooked(lens, SHIFT["hook"]))
            new = model.layers[LAYER].output.clone()
            new[:, -1] += SHIFT["trace"]
            model.layers[LAYER].output = new
            got = nnsight.save(model.layers[LAYER + 1].input.clone())
            stack.close()
    total = (got - plain)[0, -1]
    torch.testing.assert_close(total, sum(SHIFT.values()), rtol=0, atol=1e-12)
    assert not layers(lens)[LAYER]._forward_hooks


def bare(lens: Any, inputs: dict[str, Any]) -> Any:
    return lens.model(**inputs)


def generated(lens: Any, inputs: dict[str, Any]) -> Any:
    return lens.model.generate(**inputs, max_new_tokens=2)


def traced_generation(lens: Any, inputs: dict[str, Any]) -> None:
    with lens.nnsight.trace(**inputs, fn="generate", max_new_tokens=2):
        nnsight.save(lens.nnsight.lm_head.output)


def another_wrapper(lens: Any, inputs: dict[str, Any]) -> None:
    wrapper = nnsight.NNsight(lens.model)
    with wrapper.trace(**inputs):
        nnsight.save(wrapper.lm_head.output)


@pytest.mark.parametrize("call", [bare, generated, traced_generation, another_wrapper])
def test_what_would_not_hear_of_an_edit_is_refused(
    lens: Any, base: Any, call: Callable[..., Any]
) -> None:
    inputs = lens.prompt(base).inputs
    before = fingerprint(lens.model)
    call(lens, inputs)  # by itself it is fine
    with pytest.raises(il.EditTouchedNothing, match="would touch nothing, for the model was calle"):
        with lens.edit(il.Zero(), at=il.last_prompt, site=SITE):
            call(lens, inputs)
    with pytest.raises(il.EditTouchedNothing, match=r"hook double at .* would touch"):
        with lens.hooks([(SITE, double)]):
            call(lens, inputs)
    call(lens, inputs)
    after = fingerprint(lens.model)
    assert same({**before, "deltas": {}}, {**after, "deltas": {}})
    assert lens.registry.entries == []


def double(act: torch.Tensor, hook: Any) -> torch.Tensor:
    return act * 2


@pytest.mark.parametrize("call", [bare, generated, traced_generation, another_wrapper])
@pytest.mark.parametrize("how", ["edit", "hook", "permanent", "left behind"])
def test_what_stays_refuses_the_same_calls_until_it_is_taken_off(
    lens: Any, base: Any, how: str, call: Callable[..., Any]
) -> None:
    inputs = lens.prompt(base).inputs
    before = fingerprint(lens.model)
    plain, bare_logits = lens.run_with_hooks(base), bare(lens, inputs).logits
    if how == "edit":
        lens.registry.add(SITE, il.Zero(), at=il.last_prompt)
    elif how == "left behind":
        with lens.hooks([(SITE, double)], reset_hooks_end=False):
            pass
    else:
        lens.add_hook(SITE, double, is_permanent=how == "permanent")
    said = r"(Zero at last_prompt|hook double at .*) is active and would touch nothing, .*clear\(\)"
    with pytest.raises(il.EditTouchedNothing, match=said):
        call(lens, inputs)
    assert not torch.equal(lens.run_with_hooks(base), plain)  # our verbs hear of it
    if how == "permanent":
        lens.registry.clear()
        with pytest.raises(il.EditTouchedNothing, match=said):
            call(lens, inputs)
    lens.registry.clear(including_permanent=True)
    call(lens, inputs)
    assert torch.equal(bare(lens, inputs).logits, bare_logits)
    after = fingerprint(lens.model)
    assert same({**before, "deltas": {}}, {**after, "deltas": {}})


def test_one_entry_that_is_removed_leaves_the_others_guarded(lens: Any, base: Any) -> None:
    inputs = lens.prompt(base).inputs
    first = lens.registry.add(SITE, double)
    second = lens.registry.add(SITE, il.Zero(), at=il.last_prompt)
    lens.registry.remove(first)
    with pytest.raises(il.EditTouchedNothing, match="Zero at last_prompt is active"):
        bare(lens, inputs)
    lens.registry.remove(second)
    bare(lens, inputs)
    assert not lens.model._forward_pre_hooks


def test_a_model_outlives_its_lens_and_what_was_active_there(base: Any) -> None:
    lens = il.load("latent-content")
    model, inputs = lens.model, lens.prompt(base).inputs
    lens.add_hook(SITE, double)
    with pytest.raises(il.EditTouchedNothing):
        model(**inputs)
    del lens
    gc.collect()
    model(**inputs)  # nobody could take the hook off any more


def test_a_hook_that_stays_is_heard_by_raw_traces_or_they_are_refused(lens: Any, base: Any) -> None:
    lens.add_hook(SITE, double)
    raw = next_input(lens, base, None, None)
    with pytest.raises(il.EditTouchedNothing, match="hook double"):
        traced_generation(lens, lens.prompt(base).inputs)
    lens.reset_hooks()
    plain = next_input(lens, base, None, None)
    assert torch.equal(raw[1], plain[1] * 2)


def test_another_model_than_the_edited_one_is_noticed(lens: Any, base: Any) -> None:
    other = il.load("latent-content")
    with pytest.raises(il.EditTouchedNothing, match="this model did not run in its block"):
        with lens.edit(il.Zero(), at=il.latent):
            other.run(base)
    with pytest.raises(KeyError), lens.edit(il.Zero(), at=il.latent):
        raise KeyError("the user's own error comes through")


def read_logits(lens: Any, base: Any) -> None:
    with lens.nnsight.trace(base):
        nnsight.save(lens.nnsight.lm_head.output)


def stopped_before_it(lens: Any, base: Any) -> None:
    with lens.nnsight.trace(base) as tracer:
        nnsight.save(lens.nnsight.model.language_model.layers[0].output)
        tracer.stop()


def skipping_its_block(lens: Any, base: Any) -> None:
    with lens.nnsight.trace(base):
        layer = lens.nnsight.model.language_model.layers[1]
        layer.skip(layer.input)


def by_embeddings(lens: Any, base: Any) -> None:
    embeds = lens.model.get_input_embeddings()(lens.prompt(base).inputs["input_ids"])
    with lens.nnsight.trace(inputs_embeds=embeds):
        nnsight.save(lens.nnsight.lm_head.output)


@pytest.mark.parametrize(
    ("edit", "at", "site", "trace", "why"),
    [
        (il.Zero(), il.latent, SITE, read_logits, "reads the prompt alone, which holds no latents"),
        (il.Steer(0 * D), il.last_prompt, SITE, read_logits, "bit for bit as they were"),
        (il.Zero(), il.last_prompt, SITE, stopped_before_it, "touched no position"),
        (
            il.Zero(), il.last_prompt, "blocks.1.hook_attn_out", skipping_its_block,
            "touched no position",
        ),
        (il.Zero(), il.last_prompt, SITE, by_embeddings, "no input_ids, so that what stands at"),
    ],
)  # fmt: skip
def test_an_edit_that_a_raw_trace_does_not_reach_is_refused(
    lens: Any, base: Any, edit: il.Edit, at: Any, site: str, trace: Any, why: str
) -> None:
    with pytest.raises((il.EditTouchedNothing, il.InputError), match=why):
        with lens.edit(edit, at=at, site=site):
            trace(lens, base)
    assert lens.registry.entries == []
    assert not lens.nnsight.interleaver.mediators


def running_in_the_body(lens: Any, base: Any) -> None:
    with lens.nnsight.trace(base):
        nnsight.save(lens.nnsight.model.language_model.layers[0].output)
        lens.run(base)


def test_the_model_is_not_run_from_inside_a_run(lens: Any, base: Any) -> None:
    def again(act: torch.Tensor, hook: Any) -> None:
        lens.run(base)

    sentence = "asked to run by the body of a trace, or by a hook function"
    with pytest.raises(il.InputError, match=sentence):
        lens.run_with_hooks(base, fwd_hooks=[(SITE, again)])
    with pytest.raises(il.InputError, match=sentence):
        running_in_the_body(lens, base)
    handle = layers(lens)[0].register_forward_hook(lambda m, a, o: again(o, None))
    with pytest.raises(il.InputError, match=sentence):
        lens.run_with_cache(base)
    handle.remove()
    assert lens.run(base).answer is not None


def test_users_that_write_the_same_place_are_heard_in_order(lens: Any, base: Any) -> None:
    """A writer that does not look at what came takes the place of what was there: torch's hooks
    act last, and the edit's landing speaks of the state that the edit itself saw."""
    with ExitStack() as stack:
        landing = stack.enter_context(lens.edit(il.Zero(), at=il.last_prompt, site=SITE))
        constant = lambda module, args, out: torch.ones_like(out)  # noqa: E731
        handle = layers(lens)[LAYER].register_forward_hook(constant)
        stack.callback(handle.remove)
        saw, got = next_input(lens, base, None, SHIFT["trace"])
    assert not saw[0, -1].any()
    assert (got == 1).all()
    assert landing.relative_change == 1.0
