"""nnsight traces of the user's own: pictures, latents and edits, against traces and hooks alone."""

from pathlib import Path
from typing import Any

import nnsight
import pytest
import tiny
import torch
from nnsight.modeling.transformers import TransformersModel
from untouched import fingerprint, same

import imaginelens as il
from examples.interop import with_nnsight

FAMILIES = ("qwen2_5_vl", "llava", "gemma3", "idefics3")
SPEC = il.LatentSpec(
    name="test", open="<|latent_start|>", close="<|latent_end|>", pad="<|latent_pad|>", max_steps=2
)
ORGANISMS = Path(il.__file__).parent / "organisms" / "checkpoints"


def organism(name: str = "latent-content") -> Any:
    lens = il.load(name)
    lens.model.double()
    return lens


def small(name: str) -> il.LatentModel:
    model, processor = tiny.build(name)
    return il.LatentModel(model.double().eval(), processor, spec=SPEC)


def examples(name: str) -> list[dict[str, Any]]:
    sizes = ((48, 32), (24, 56), (32, 32))
    texts = ("what?", "where is it, and is it red?", "how many")
    return [
        {"images": tiny.image(*size, seed=seed), "text": tiny.prompt(name, text)}
        for seed, (size, text) in enumerate(zip(sizes, texts, strict=True))
    ]


# ---- the example, and what it should find ------------------------------------------------------


@torch.no_grad()
def test_the_example_finds_what_our_own_verbs_find() -> None:
    lens = organism()
    task = lens.task(n=2, seed=3)
    donor = lens.run(task.source[0])
    assert with_nnsight.several_pictures(lens, task.base) < 1e-12
    gap, landing = with_nnsight.edits_inside(lens, task.base[0])
    assert (gap, landing.fired, len(landing.cells)) == (0.0, 1, 9)
    assert with_nnsight.latents_in_a_trace(lens, task.base[0]) == 0.0
    assert with_nnsight.latent_written_by_hand(lens, task.base[0], donor) == (True, 0.0)
    assert with_nnsight.of_a_run(lens, lens.run(task.base[0])) == 0.0


@pytest.mark.parametrize("name", ["latent-content", "latent-ignored"])
@torch.no_grad()
def test_a_latent_written_by_hand_decides_where_latents_are_used(name: str) -> None:
    """Both latents of the source, put into the base by nnsight alone: the answer becomes the
    source's in the organism that reads them, and stays in the one that does not."""
    lens = organism(name)
    task = lens.task(n=1, seed=0)
    base, donor = task.base[0], lens.run(task.source[0])
    places = donor.tokens.latents(0) - donor.tokens.prompt_width + 1
    embed = lens.nnsight.get("model.language_model.embed_tokens")
    with lens.nnsight.trace(fn=lens.run) as tracer:
        with tracer.invoke(base):
            for step in tracer.iter[places.tolist()]:
                embed.output = donor.latents[:, step - places[0]][:, None]
        with tracer.invoke():
            run = nnsight.save(tracer.result)
    wanted = task.source_answers[0] if name == "latent-content" else task.base_answers[0]
    assert (lens.run(base).answer, run.answer) == (task.base_answers[0], wanted)
    with lens.edit(il.Swap(donor), at=il.latent):
        assert torch.equal(lens.run(base).sequences, run.sequences)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_prompt_goes_through_the_remote_path_and_the_latent_loop_does_not() -> None:
    lens = il.load("latent-content")
    base = lens.task(n=1, seed=0).base[0]
    assert with_nnsight.remotely(lens, base, str(ORGANISMS / "latent-content")) == 0.0
    for call in (lens.nnsight.trace, lens.nnsight.session):
        for remote in (True, "local", "https://example.org"):
            with pytest.raises(il.InputError, match="made by a loop of this process; trace a prom"):
                call(remote=remote)


@pytest.mark.filterwarnings("ignore")
def test_without_weights_there_are_positions_and_no_runs() -> None:
    lens = organism()
    there = TransformersModel(
        str(ORGANISMS / "latent-content"), task="image-text-to-text",
        processor=lens.processor, tokenizer=lens.tokenizer,
    )  # fmt: skip
    here = il.LatentModel(there, lens.processor)
    base = lens.task(n=1, seed=0).base[0]
    assert next(here.model.parameters()).is_meta
    at = il.image[0][1, 0:2]
    mapped = (at.resolve(each.tokens(base), 0).tolist() for each in (here, lens))
    assert len(next(mapped)) == 2 == len(next(mapped))
    assert list(here.registry) == list(lens.registry)
    for verb in (here.run, here.run_with_hooks):
        with pytest.raises(il.InputError, match="no weights in this process, where our forwards"):
            verb(base)


@pytest.mark.filterwarnings("ignore")
def test_the_example_runs_as_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    with_nnsight.main()
    said = capsys.readouterr().out
    assert "two pictures in one trace, off by 0\n" in said
    assert "latents read by a raw trace, off by 0\n" in said
    assert "the latent loop, remotely: remote=True: lens.nnsight wraps a model" in said


# ---- pictures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_several_pictures_in_one_trace_are_what_each_is_alone(name: str) -> None:
    lens = small(name)
    one, two, three = examples(name)
    head, layer = lens.nnsight.get(lens.structure.head), lens.structure.blocks[1].path
    with lens.nnsight.trace() as tracer:
        with tracer.invoke(one):
            first = nnsight.save(head.output)
        with tracer.invoke([two, three]):
            lens.nnsight.get(layer).output[:, -1] = 0  # of its own rows only
            others = nnsight.save(head.output)
    site = "blocks.1.hook_resid_post"
    alone = [lens.run_with_hooks(one)]
    for example in (two, three):
        with lens.edit(il.Zero(), at=il.last_prompt, site=site):
            alone.append(lens.run_with_hooks(example))
    for found, own in zip((first[0], *others), alone, strict=True):
        torch.testing.assert_close(found[-own.shape[1] :], own[0], rtol=0, atol=1e-11)


@torch.no_grad()
def test_a_state_goes_from_one_picture_to_another_in_one_forward() -> None:
    """nnsight's barrier between two invokes gives what our patch gives."""
    lens = organism()
    task = lens.task(n=1, seed=0)
    layer = with_nnsight.blocks(lens)[1]
    with lens.nnsight.trace() as tracer:
        both = tracer.barrier(2)
        with tracer.invoke(task.source[0]):
            state = layer.output[:, -1].clone()
            both()
        with tracer.invoke(task.base[0]):
            both()
            layer.output[:, -1] = state
            logits = nnsight.save(lens.nnsight.lm_head.output)
    _, cache = lens.run_with_cache(task.source[0], names_filter=with_nnsight.SITE)
    given = cache[with_nnsight.SITE][0, -1:]
    with lens.edit(il.Replace(given), at=il.last_prompt, site=with_nnsight.SITE):
        ours = lens.run_with_hooks(task.base[0])
    torch.testing.assert_close(logits[:, -ours.shape[1] :], ours, rtol=0, atol=1e-11)


def test_what_cannot_be_put_into_one_trace_is_refused() -> None:
    lens = organism()
    base = lens.task(n=1, seed=0).base[0]
    inputs = lens.prompt(base).inputs

    def two(one: Any, other: Any, **options: Any) -> None:
        with lens.nnsight.trace() as tracer:
            with tracer.invoke(one):
                nnsight.save(lens.nnsight.lm_head.output)
            with tracer.invoke(other, **options):
                nnsight.save(lens.nnsight.lm_head.output)

    def once(given: Any) -> None:
        with lens.nnsight.trace(given):
            nnsight.save(lens.nnsight.lm_head.output)

    with pytest.raises(il.InputError, match="invoke 1 of 2 brings encoded inputs, and several"):
        two(base, inputs)
    with pytest.raises(il.InputError, match=r"invoke 1 of 2 brings .*options go to trace"):
        two(base, base, use_cache=False)
    with pytest.raises(il.InputError, match=r"would not see its latents; pass fn=lens\.run_with_h"):
        once(lens.run(base))
    with pytest.raises(il.InputError, match="cannot run a str; pass"):
        once("a prompt")
    once(inputs)  # a processor's dict is one invoke
    once(lens.prompt(base))


# ---- edits -------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_edit_at_any_site_is_the_same_in_a_raw_trace() -> None:
    lens = small("qwen2_5_vl")
    example = examples("qwen2_5_vl")[0]
    head = lens.nnsight.get(lens.structure.head)
    plain = lens.run_with_hooks(example)
    compared = 0
    for site in lens.registry:
        if site == "hook_latent" or site.startswith("vision_encoder"):
            continue
        at = il.image if site.startswith("vision") else il.last_prompt
        with lens.edit(il.Zero(), at=at, site=site) as ours:
            expected = lens.run_with_hooks(example)
        with lens.edit(il.Zero(), at=at, site=site) as theirs:
            with lens.nnsight.trace(example):
                found = nnsight.save(head.output)
        assert torch.equal(found, expected), site
        assert ours.cells == theirs.cells
        compared += int(not torch.equal(found, plain))
    assert compared > 30


@torch.no_grad()
def test_edits_and_hooks_and_the_body_act_in_this_order() -> None:
    lens = organism()
    base = lens.task(n=1, seed=0).base[0]
    order: list[str] = []

    def hook(act: torch.Tensor, hook: Any) -> torch.Tensor:
        order.append(f"hook after {float(act[0, -1].abs().sum()):.0f}")
        return act + 1

    layer = with_nnsight.blocks(lens)[1]
    with lens.edit(il.Zero(), at=il.last_prompt, site=with_nnsight.SITE):
        with lens.hooks([(with_nnsight.SITE, hook)]), lens.nnsight.trace(base):
            order.append(f"body after {float(layer.output[0, -1].sum()):.0f}")
            with_cache = nnsight.save(layer.output)
    assert order == ["hook after 0", "body after 64"]
    assert (with_cache[0, -1] == 1).all()


@torch.no_grad()
def test_latents_are_edited_and_forced_in_a_raw_trace_of_a_generation() -> None:
    lens = organism()
    task = lens.task(n=3, seed=0)
    donor = lens.run(task.source)
    norm = lens.nnsight.get("model.language_model.norm")
    shapes: list[tuple[int, ...]] = []
    with lens.edit(il.Swap(donor), at=il.latent[0]) as ours:
        expected = lens.run(task.base)
    with lens.edit(il.Swap(donor), at=il.latent[0]) as theirs:
        with lens.nnsight.trace(fn=lens.run) as tracer:
            with tracer.invoke(task.base):
                for _ in tracer.iter[0:3]:
                    shapes.append(tuple(norm.output.shape))
            with tracer.invoke():
                found = nnsight.save(tracer.result)
    assert torch.equal(found.latents, expected.latents)
    assert found.answers == expected.answers != tuple(task.base_answers)
    assert ours.cells == theirs.cells
    assert [shape[0] for shape in shapes] == [3, 3, 3]
    with lens.nnsight.trace(task.base, fn=lens.run, latents=il.Force(3)) as tracer:
        forced = nnsight.save(tracer.result)
    assert forced.latents.shape[1] == 3


@torch.no_grad()
def test_the_loop_feeds_what_the_body_has_written() -> None:
    """Behind the final norm the body of the trace acts before the loop reads its next latent."""
    lens = organism()
    task = lens.task(n=1, seed=0)
    donor = lens.run(task.source[0])
    place = int(donor.tokens.latents(0)[0]) - donor.tokens.prompt_width  # whose state is fed there
    norm = lens.nnsight.get("model.language_model.norm")
    with lens.nnsight.trace(fn=lens.run) as tracer:
        with tracer.invoke(task.base[0]):
            for _ in tracer.iter[[place]]:
                norm.output = donor.latents[:, :1].clone()
        with tracer.invoke():
            run = nnsight.save(tracer.result)
    assert torch.equal(run.latents[:, 0], donor.latents[:, 0])
    with lens.edit(il.Swap(donor), at=il.latent[0]):
        assert torch.equal(lens.run(task.base[0]).latents, run.latents)


def test_gradients_sessions_and_caches_of_a_raw_trace_are_those_under_the_edit() -> None:
    lens = organism()
    base, nn, layers = lens.task(n=1, seed=0).base[0], lens.nnsight, with_nnsight.blocks(lens)
    shift = torch.linspace(-1, 1, 64, dtype=torch.float64)
    kept: list[torch.Tensor] = []

    def keep(grad: torch.Tensor, hook: Any) -> None:
        kept.append(grad.clone())

    with lens.edit(il.Steer(shift), at=il.last_prompt, site=with_nnsight.SITE):
        with nn.trace(base):
            state = layers[0].output
            loss = nn.lm_head.output[0, -1].max()
            with loss.backward():
                gradient = nnsight.save(state.grad.clone())
        logits = lens.run_with_hooks(base, bwd_hooks=[("blocks.0.hook_resid_post", keep)])
        logits[0, -1].max().backward()
        with nn.trace(base) as tracer:
            cache = tracer.cache(modules=[layers[1]])
    assert torch.equal(gradient, kept[0])
    assert gradient.any()
    with nn.session():
        with lens.edit(il.Zero(), at=il.last_prompt, site=with_nnsight.SITE):
            with nn.trace(base):
                zero = layers[1].output[0, -1].clone()
        with nn.trace(base):
            own = nnsight.save(layers[1].output[0, -1] + zero)
    steered = cache["model.model.language_model.layers.1"].output[0, -1]
    torch.testing.assert_close(steered - own.detach(), shift, rtol=0, atol=1e-12)
    lens.model.zero_grad()


@torch.no_grad()
def test_edits_that_nnsight_stores_act_in_our_verbs_at_every_forward() -> None:
    lens = organism()
    base = lens.task(n=1, seed=0).base[0]
    plain = lens.run(base)
    with lens.nnsight.edit(inplace=True):
        with_nnsight.blocks(lens)[1].output[:] = 0
    stored, prompt = lens.run(base, keep_logits=True), lens.run_with_hooks(base)
    lens.nnsight.clear_edits()
    with lens.hooks([(with_nnsight.SITE, lambda act, hook: act * 0)]):
        expected = lens.run(base, keep_logits=True)
        assert torch.equal(lens.run_with_hooks(base), prompt)
    assert torch.equal(stored.logits, expected.logits)
    assert not torch.equal(stored.sequences, plain.sequences)
    assert torch.equal(lens.run(base).sequences, plain.sequences)


@torch.no_grad()
def test_generate_by_itself_feeds_words_back_and_no_latents() -> None:
    """What a raw trace of the model's own `generate` sees: where the run feeds a state, it feeds
    the embedding of the word it wrote."""
    lens = organism()
    base = lens.task(n=1, seed=0).base[0]
    run, inputs = lens.run(base), lens.prompt(base).inputs
    embed = lens.nnsight.get("model.language_model.embed_tokens")
    fed: list[torch.Tensor] = []
    with lens.nnsight.trace(**inputs, fn="generate", max_new_tokens=4, min_new_tokens=4) as tracer:
        for _ in tracer.iter[1:4]:
            fed.append(embed.output[0, 0].clone())
    first = int(run.tokens.latents(0)[0]) - run.tokens.prompt_width
    written = lens.model.get_input_embeddings().weight
    assert all(bool((written == state).all(1).any()) for state in fed)
    assert not torch.equal(fed[first], run.latents[0, 0])


# ---- afterwards --------------------------------------------------------------------------------


class _Boom(Exception):
    pass


def test_nothing_is_left_on_the_model_also_when_the_body_raises() -> None:
    lens = organism()
    base = lens.task(n=1, seed=0).base[0]
    before = fingerprint(lens.model)
    expected = lens.run(base)

    def raising() -> None:
        with lens.edit(il.Zero(), at=il.last_prompt, site=with_nnsight.SITE):
            with lens.nnsight.trace(fn=lens.run) as tracer:
                with tracer.invoke(base):
                    nnsight.save(with_nnsight.blocks(lens)[0].output)
                    raise _Boom

    for _ in range(2):
        with pytest.raises(_Boom):
            raising()
        after = lens.run(base)
        assert torch.equal(after.sequences, expected.sequences)
        assert torch.equal(after.latents, expected.latents)
    assert same(before, fingerprint(lens.model))
    assert lens.nnsight.interleaver.mediators == []
    assert not lens.nnsight.interleaver.interleaving


def test_a_wrapper_whose_lens_is_gone_is_nnsights_own() -> None:
    lens = organism()
    inputs = lens.prompt(lens.task(n=1, seed=0).base[0]).inputs
    expected = lens.model(**inputs).logits
    wrapper = lens.nnsight
    del lens
    with wrapper.trace(**inputs):
        found = nnsight.save(wrapper.lm_head.output)
    assert torch.equal(found, expected)
