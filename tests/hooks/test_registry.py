"""The registry has TransformerLens' manners: what is added acts, what is removed is gone."""

from typing import Any

import pytest
import tiny
import torch

import imaginelens as il

SPEC = il.LatentSpec(
    name="test", open="<|latent_start|>", close="<|latent_end|>", pad="<|latent_pad|>", max_steps=3
)
SITE, NEXT = "blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"


@pytest.fixture
def lens() -> il.LatentModel:
    return il.LatentModel(*tiny.build("qwen2_5_vl"), spec=SPEC)


GIVEN = {"images": tiny.image(32, 24, 0), "text": tiny.prompt("qwen2_5_vl", "what?")}


def read(lens: il.LatentModel, given: Any = GIVEN, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return lens.run_with_hooks(given, **options)


def halve(act: torch.Tensor, hook: Any) -> torch.Tensor:
    return act * 0.5


def plus(act: torch.Tensor, hook: Any) -> torch.Tensor:
    return act + 1


# ---- lifetimes -------------------------------------------------------------------------------


def test_hooks_act_within_their_block_and_are_gone_behind_it(lens: il.LatentModel) -> None:
    plain = read(lens)
    with lens.hooks([(SITE, halve)]) as same:
        assert same is lens
        inside = read(lens)
        with lens.hooks([(SITE, plus)]):
            both = read(lens)
        assert torch.equal(read(lens), inside)
    assert not torch.equal(inside, plain)
    assert not torch.equal(both, inside)
    assert torch.equal(read(lens), plain)
    assert torch.equal(read(lens, fwd_hooks=[(SITE, halve)]), inside)
    assert torch.equal(read(lens, fwd_hooks=[(SITE, halve), (SITE, plus)]), both)
    assert not torch.equal(read(lens, fwd_hooks=[(SITE, plus), (SITE, halve)]), both)  # in order
    assert lens.registry.entries == []


def test_hooks_are_gone_after_an_error_and_after_a_wrong_name(lens: il.LatentModel) -> None:
    with pytest.raises(ZeroDivisionError), lens.hooks([(SITE, halve)]):
        raise ZeroDivisionError
    with pytest.raises(il.HookNameError, match="did you mean"):
        read(lens, fwd_hooks=[(SITE, halve), ("blocks.1.hook_resid_pots", halve)])
    with pytest.raises(il.HookNameError), lens.edit(il.Zero(), at=il.latent, site="nowhere"):
        pytest.fail("the block must not be entered")
    assert lens.registry.entries == []


def test_added_hooks_stay_until_reset_and_permanent_ones_longer(lens: il.LatentModel) -> None:
    plain, halved = read(lens), read(lens, fwd_hooks=[(SITE, halve)])
    lens.add_hook(SITE, halve)
    assert torch.equal(read(lens), halved)
    assert torch.equal(read(lens), halved)
    lens.reset_hooks()
    assert torch.equal(read(lens), plain)
    lens.add_hook(SITE, halve, is_permanent=True)
    lens.add_hook(SITE, plus)
    lens.reset_hooks()
    assert torch.equal(read(lens), halved)
    with lens.hooks([(SITE, plus)]):
        assert not torch.equal(read(lens), halved)
    assert torch.equal(read(lens), halved)
    lens.reset_hooks(including_permanent=True)
    assert torch.equal(read(lens), plain)


def test_hooks_that_are_not_reset_at_the_end_stay(lens: il.LatentModel) -> None:
    halved = read(lens, fwd_hooks=[(SITE, halve)], reset_hooks_end=False)
    assert torch.equal(read(lens), halved)
    lens.reset_hooks()
    assert not torch.equal(read(lens), halved)


def test_an_entry_can_be_removed_alone(lens: il.LatentModel) -> None:
    halved = read(lens, fwd_hooks=[(SITE, halve)])
    kept, removed = lens.registry.add(SITE, halve), lens.registry.add(SITE, plus)
    assert lens.registry.active == {SITE: [kept, removed]}
    lens.registry.remove(removed)
    assert torch.equal(read(lens), halved)
    lens.registry.clear()
    assert lens.registry.active == {}


def test_two_models_of_one_module_do_not_share_hooks(lens: il.LatentModel) -> None:
    other = il.LatentModel(lens.model, lens.processor, spec=SPEC)
    plain = read(lens)
    other.add_hook(SITE, halve)
    assert torch.equal(read(lens), plain)
    assert not torch.equal(read(other), plain)


# ---- what a hook is given --------------------------------------------------------------------


def test_a_hook_that_returns_none_only_reads(lens: il.LatentModel) -> None:
    seen: list[Any] = []

    def look(act: torch.Tensor, hook: Any) -> None:
        seen.append((hook.name, hook.layer(), tuple(act.shape), hook.columns.tolist()))

    plain = read(lens)
    assert torch.equal(read(lens, fwd_hooks=[(SITE, look)]), plain)
    width = plain.shape[1]
    assert seen == [(SITE, 1, (1, width, 64), list(range(width)))]


def test_filters_of_every_kind_reach_the_same_sites(lens: il.LatentModel) -> None:
    def visited(names_filter: Any) -> list[str]:
        names: list[str] = []
        read(lens, fwd_hooks=[(names_filter, lambda act, hook: names.append(hook.name))])
        return sorted(names)

    wanted = [f"blocks.{i}.hook_resid_post" for i in range(3)]
    for names_filter in ("blocks.*.hook_resid_post", wanted, tuple(wanted),
                         lambda n: n[:6] == "blocks" and n.endswith("resid_post")):  # fmt: skip
        assert visited(names_filter) == wanted
        assert lens.registry.match(names_filter) == wanted
    everything = visited(None)
    assert set(everything) == set(lens.registry) - {"hook_latent"}  # nothing is fed in a prompt


def test_the_context_of_a_hook_lasts_and_belongs_to_its_site(lens: il.LatentModel) -> None:
    def count(act: torch.Tensor, hook: Any) -> None:
        hook.ctx["n"] = hook.ctx.get("n", 0) + 1
        hook.ctx["name"] = hook.name

    entry = lens.registry.add([SITE, NEXT], count)
    for _ in range(3):
        read(lens)
    assert set(entry.sites) == {SITE, NEXT}
    assert {name: point.ctx for name, point in lens.registry.points.items()} == {
        SITE: {"n": 3, "name": SITE},
        NEXT: {"n": 3, "name": NEXT},
    }


def test_hooks_of_one_site_share_their_context_as_in_transformer_lens(lens: il.LatentModel) -> None:
    def put(act: torch.Tensor, hook: Any) -> None:
        hook.ctx["state"] = act.clone()

    def swap_back(act: torch.Tensor, hook: Any) -> torch.Tensor:
        return hook.ctx["state"]

    plain = read(lens)
    hooks = [(SITE, put), (SITE, plus), (SITE, swap_back)]
    assert torch.equal(read(lens, fwd_hooks=hooks), plain)


def test_the_same_in_transformer_lens() -> None:
    """The oracle of the test above: one HookPoint per site, so one ctx for all of its hooks."""
    from transformer_lens.hook_points import HookPoint

    point = HookPoint()
    point.name = "hook"
    point.add_hook(lambda act, hook: hook.ctx.update(state=act.clone()))
    point.add_hook(lambda act, hook: act + 1)
    point.add_hook(lambda act, hook: hook.ctx["state"])
    assert torch.equal(point(torch.ones(2)), torch.ones(2))


def test_a_hook_may_write_into_a_copy_but_the_shape_must_stay(lens: il.LatentModel) -> None:
    with pytest.raises(il.DonorError) as error:
        read(lens, fwd_hooks=[(SITE, lambda act, hook: act[:, 1:])])
    assert f"the hook at {SITE!r} returned shape (1, " in str(error.value)
    assert "return a tensor of the same shape, or None to only read" in str(error.value)
    assert lens.registry.entries == []


def test_hooks_see_every_forward_of_a_generation(lens: il.LatentModel) -> None:
    columns: list[int] = []
    states: list[torch.Tensor] = []

    def look(act: torch.Tensor, hook: Any) -> None:
        columns.extend(hook.columns.tolist())
        assert act.shape[1] == len(hook.columns)
        assert hook.tokens.width >= hook.columns[-1] + 1

    def latent(act: torch.Tensor, hook: Any) -> None:
        states.append(act[0, 0].clone())

    with lens.hooks([(SITE, look), ("hook_latent", latent)]):
        run = lens.run(GIVEN, latents=il.Force(3, at=1), max_new_tokens=7)
    assert columns == list(range(run.tokens.width - 1))  # the last token is never read
    assert torch.equal(torch.stack(states), run.latents[0])


def test_a_backward_hook_sees_and_replaces_the_gradient(lens: il.LatentModel) -> None:
    seen: dict[str, torch.Tensor] = {}

    def keep(grad: torch.Tensor, hook: Any) -> None:
        seen[hook.name] = grad.clone()

    def zero(grad: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.zeros_like(grad)

    early = "blocks.0.hook_resid_post"
    lens.run_with_hooks(GIVEN, bwd_hooks=[(early, keep)])[0, -1, 3].backward()
    assert seen.pop(early).abs().max() > 0
    lens.run_with_hooks(GIVEN, bwd_hooks=[(early, keep), (SITE, zero)])[0, -1, 3].backward()
    assert not seen[early].any()
    lens.model.zero_grad()


# ---- runs and prompts ------------------------------------------------------------------------


def test_a_prompt_is_read_alone_and_a_run_over_its_whole_sequence(lens: il.LatentModel) -> None:
    run = lens.run(GIVEN, latents=il.Force(3, at=1), max_new_tokens=7, keep_logits=True)
    alone, whole = read(lens), read(lens, run)
    width = run.tokens.prompt_width
    assert alone.shape[1] == width
    assert whole.shape[1] == width + 7
    torch.testing.assert_close(whole[:, :width], alone, rtol=0, atol=1e-10)
    torch.testing.assert_close(whole[:, width - 1 : -1], run.logits, rtol=0, atol=1e-10)
    for given in (GIVEN, run):
        assert not torch.equal(read(lens, given, fwd_hooks=[(SITE, halve)]), read(lens, given))


def test_a_hook_at_the_latents_acts_on_what_is_fed(lens: il.LatentModel) -> None:
    run = lens.run(GIVEN, latents=il.Force(3, at=1), max_new_tokens=7)
    columns = il.latent.resolve(run.tokens, 0)
    with lens.hooks([("hook_latent", halve)]):
        changed = lens.run(GIVEN, latents=il.Force(3, at=1), max_new_tokens=7)
    torch.testing.assert_close(changed.latents[0, 0], run.latents[0, 0] / 2, rtol=0, atol=1e-12)
    other = read(lens, run, fwd_hooks=[("hook_latent", halve)])
    plain = read(lens, run)
    assert torch.equal(other[:, : columns[0]], plain[:, : columns[0]])
    assert not torch.equal(other[:, columns[0] :], plain[:, columns[0] :])


# ---- looking things up -----------------------------------------------------------------------


def test_the_registry_is_a_mapping_of_sites(lens: il.LatentModel) -> None:
    registry = lens.registry
    assert SITE in registry
    assert "blocks.9.hook_resid_post" not in registry
    assert registry.get("blocks.9.hook_resid_post") is None
    assert registry[SITE].layer == 1
    assert registry[SITE].kind.axes == ("example", "position", "d_model")
    assert len(registry) == len(list(registry)) == len(registry.match(None))
    with pytest.raises(il.HookNameError, match=r"Qwen2_5_VL.*layers are 0\.\.2"):
        registry["blocks.9.hook_resid_post"]
    with pytest.raises(il.HookNameError, match=r"is a pattern; select with \.match"):
        registry["blocks.*.hook_resid_post"]


def test_an_edit_needs_its_positions(lens: il.LatentModel) -> None:
    with pytest.raises(TypeError, match=r"Zero needs to know where: pass at=il\.latent"):
        lens.registry.add(SITE, il.Zero())
    assert lens.registry.entries == []


def test_a_registered_edit_lands_and_is_judged_call_by_call(lens: il.LatentModel) -> None:
    entry = lens.registry.add(SITE, il.Zero(), at=il.last_prompt)
    read(lens)
    read(lens)
    assert entry.landing.fired == 2
    lens.registry.add(SITE, il.Zero(), at=il.latent)
    with pytest.raises(il.EditTouchedNothing):
        read(lens)
    lens.reset_hooks()
    assert lens.registry.entries == []


def test_a_permanent_edit_is_permanent_or_refused(lens: il.LatentModel) -> None:
    try:
        entry = lens.registry.add(SITE, il.Zero(), at=il.last_prompt, permanent=True)
    except TypeError:
        return
    lens.reset_hooks()
    assert lens.registry.entries == [entry]


@pytest.mark.parametrize(("one", "two"), [("edit", "hook"), ("hook", "edit")])
def test_edits_and_hooks_of_one_site_act_in_the_order_of_registration(
    lens: il.LatentModel, one: str, two: str
) -> None:
    seen: list[torch.Tensor] = []
    for which in (one, two):
        if which == "edit":
            lens.registry.add(SITE, il.Zero(), at=il.last_prompt)
        else:
            lens.add_hook(SITE, plus)
    lens.add_hook(SITE, lambda act, hook: seen.append(act[0, -1].clone()))
    read(lens)
    assert torch.equal(seen[0], torch.full_like(seen[0], 1.0 if one == "edit" else 0.0))
