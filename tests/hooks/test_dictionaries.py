"""Features of a sparse dictionary: closed forms, sham, refusals; and known answers on organisms."""

import dataclasses
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import nn

import imaginelens as il
from imaginelens.hooks import dictionaries
from imaginelens.hooks.dictionaries import Features, features, hook_names
from imaginelens.hooks.states import States

D, WIDTH, CELLS = 8, 12, 6


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Relu(nn.Module):
    """A plain sparse autoencoder; `of` is what its metadata says."""

    def __init__(self, d: int = D, width: int = WIDTH, seed: int = 0, **of: Any) -> None:
        super().__init__()
        self.enc = nn.Parameter(gaussian(d, width, seed=seed))
        self.dec = nn.Parameter(gaussian(width, d, seed=seed + 1))
        self.bias = nn.Parameter(gaussian(d, seed=seed + 2))
        if of:
            self.cfg = dataclasses.make_dataclass("Cfg", list(of))(**of)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return ((x - self.bias) @ self.enc).relu()

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        return f @ self.dec + self.bias


class Norming(Relu):
    """Notes the norm of what it encodes and forgets it once it has decoded, as SAELens does."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        self.size = x.norm(dim=-1, keepdim=True)
        return super().encode(x / self.size)

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        size = self.size
        del self.size
        return super().decode(f) * size


def context(act: torch.Tensor, given: torch.Tensor | None = None) -> il.EditContext:
    """One cell a row."""
    rows, zeros = np.arange(len(act)), np.zeros(len(act), dtype=int)
    states = None if given is None else States(given[:, None], torch.ones(len(given), 1).bool())
    return il.EditContext("hook_latent", rows, zeros + 9, zeros, zeros, given=states)


def apply(edit: Features, act: torch.Tensor) -> torch.Tensor:
    donor = edit.donor if isinstance(edit.donor, torch.Tensor) else None
    with torch.no_grad():
        return edit.apply(act, context(act, None if donor is None else donor[:, 0]))


ACT, DONOR = gaussian(CELLS, D, seed=7), gaussian(CELLS, D, seed=8)


# ---- what it computes ------------------------------------------------------------------------


@torch.no_grad()
def by_hand(sae: Relu, change: dict[int, Any], act: torch.Tensor = ACT) -> torch.Tensor:
    """act' = act + (new features - old features) W_dec: the bias and the error stay."""
    size = act.norm(dim=-1, keepdim=True) if isinstance(sae, Norming) else 1.0
    old = ((act / size - sae.bias) @ sae.enc).relu()
    new = old.clone()
    for feature, value in change.items():
        new[:, feature] = value(old[:, feature]) if callable(value) else value
    return act + (new - old) @ sae.dec * size


@pytest.mark.parametrize("kind", [Relu, Norming])
def test_features_are_set_scaled_and_swapped_and_the_error_stays(kind: type[Relu]) -> None:
    sae = kind()
    donated = sae.encode(DONOR).detach()
    for edit, change in (
        (Features(sae, [3], value=0.0), {3: 0.0}),
        (Features(sae, [5, 2], value=2.5), {5: 2.5, 2: 2.5}),
        (Features(sae, [5, 2], value=[1.0, -2.0]), {5: 1.0, 2: -2.0}),
        (Features(sae, [5, 2], value=torch.tensor([1.0, -2.0])), {5: 1.0, 2: -2.0}),
        (Features(sae, np.array([4]), scale=-3.0), {4: lambda f: -3.0 * f}),
        (Features(sae, [7, 1], donor=DONOR[:, None]), {7: donated[:, 7], 1: donated[:, 1]}),
        (Features(sae, value=0.25), dict.fromkeys(range(WIDTH), 0.25)),
        (Features(sae, donor=DONOR[:, None]), dict(enumerate(donated.T))),
    ):
        new = apply(edit, ACT)
        torch.testing.assert_close(new, by_hand(sae, change), rtol=0, atol=1e-12)
        assert torch.equal(new, ACT) == torch.equal(by_hand(sae, change), ACT)


def test_a_cell_whose_features_stay_keeps_its_state_to_the_last_bit() -> None:
    sae = Relu()
    act = torch.cat([ACT, -torch.zeros(1, D, dtype=torch.float64)])
    for edit in (
        Features(sae, [3, 5], scale=1.0),
        Features(sae, scale=1.0),
        Features(sae, donor=act[:, None]),
    ):
        new = apply(edit, act)
        assert torch.equal(new.view(torch.int64), act.view(torch.int64))
    inactive = sae.encode(act)[:, 3] == 0  # setting to 0 what is 0 changes these cells alone
    assert 0 < int(inactive.sum()) < len(act)
    new = apply(Features(sae, [3], value=0.0), act)
    assert torch.equal((new == act).all(-1), inactive)


def test_an_edit_is_pure_frozen_and_says_what_it_does() -> None:
    sae, act = Relu(), ACT.clone()
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    edit = Features(sae, [3, 1], value=1.0)
    apply(edit, act)
    assert torch.equal(act, ACT)
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())
    assert repr(edit) == "Features(Relu, features=[3, 1], value=1.0)"
    assert repr(Features(sae, scale=0.0)) == "Features(Relu, all features, scale=0.0)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        edit.scale = 2.0  # type: ignore[misc]


def test_cells_do_not_depend_on_each_other() -> None:
    edit = Features(Norming(), [3, 1], value=1.0)
    whole = apply(edit, ACT)
    for cell in range(CELLS):
        torch.testing.assert_close(
            apply(edit, ACT[cell : cell + 1]), whole[cell : cell + 1], rtol=0, atol=1e-12
        )


def test_states_with_heads_are_joined_or_left_to_the_dictionary() -> None:
    flat, joined = Relu(), Relu()
    heads = ACT.reshape(CELLS, 2, D // 2)
    new = apply(Features(flat, [3], value=1.0), heads)
    assert torch.equal(new.flatten(1), apply(Features(flat, [3], value=1.0), ACT))

    class Joins(Relu):  # as SAELens' SAEs of hook_z do
        hook_z_reshaping_mode = True

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return super().encode(x.flatten(-2))

        def decode(self, f: torch.Tensor) -> torch.Tensor:
            return super().decode(f).unflatten(-1, (2, D // 2))

    joins = Joins()
    assert torch.equal(apply(Features(joins, [3], value=1.0), heads), new)
    assert torch.equal(features(heads[None], joins)[0], joined.encode(ACT))


def test_gradients_flow_through_the_features() -> None:
    sae, act = Relu(), ACT.clone().requires_grad_()
    new = Features(sae, [3], value=1.0).apply(act, context(act))
    (grad,) = torch.autograd.grad(new.sum(), act)
    assert not torch.allclose(grad, torch.ones_like(grad))


# ---- reading ---------------------------------------------------------------------------------


def test_features_are_read_from_tensors_states_and_caches() -> None:
    lens = _tiny()
    sae = Relu(d=64, hook_name="blocks.1.hook_resid_post")
    prompt = [{"images": tiny.image(40, 24, seed=0), "text": tiny.prompt("qwen2_5_vl", t)}
              for t in ("red?", "which colour?")]  # fmt: skip
    _, cache = lens.run_with_cache(prompt, names_filter="resid_post", positions=[il.text])
    with torch.no_grad():
        found, by_cache = features(cache["resid_post", 1], sae), features(cache, sae)
        wanted = sae.encode(cache["resid_post", 1])
    assert torch.equal(found, wanted)
    there = cache.columns["blocks.1.hook_resid_post"] >= 0
    assert not bool(there.all())  # texts of unequal length: filled up, and read as 0
    assert torch.equal(by_cache[there], wanted[there])
    assert not bool(by_cache[~there].any())
    states = States(cache["resid_post", 1], there)
    read = features(states, sae)
    assert torch.equal(read.values, by_cache)
    assert read.mask is there
    with pytest.raises(il.DonorError, match=r"reads 'blocks.1.hook_resid_post', which the cache"):
        features(lens.run_with_cache(prompt, names_filter="hook_embed")[1], sae)
    with pytest.raises(il.DonorError, match="does not say which site it reads"):
        features(cache, Relu(d=64))
    with pytest.raises(il.InputError, match=r"not a Run; of a run, pass run\.latents"):
        features(lens.run(prompt[0], max_new_tokens=1), sae)


def test_hook_names_of_other_codebases_are_found() -> None:
    Cfg = dataclasses.make_dataclass("Cfg", ["metadata"])
    Meta = dataclasses.make_dataclass("Meta", ["hook_name", ("hook_name_out", Any, None)])
    new = Relu()
    new.cfg = Cfg(Meta("blocks.1.hook_mlp_out"))
    assert hook_names(new) == ("blocks.1.hook_mlp_out", None)
    assert hook_names(Relu(hook_name="hook_latent")) == ("hook_latent", None)
    new.cfg = Cfg(Meta("blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"))
    assert hook_names(new) == ("blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out")


# ---- in a model ------------------------------------------------------------------------------


@cache
def _tiny() -> il.LatentModel:
    return il.LatentModel(*tiny.fresh("qwen2_5_vl"), spec=False)


def test_in_a_model_it_equals_the_same_edit_in_plain_torch() -> None:
    lens, site = _tiny(), "blocks.1.hook_resid_post"
    prompt = {"images": tiny.image(40, 24, seed=0), "text": tiny.prompt("qwen2_5_vl", "red?")}
    sae = Relu(d=64, hook_name=site)
    columns = lens.tokens(prompt)
    at = il.last_prompt
    place = int(at.resolve(columns, 0)[0])
    with torch.no_grad():
        plain, cache = lens.run_with_cache(prompt, names_filter=site)
        new = cache[site].clone()
        own = sae.encode(new[0, place])
        changed = own.clone()
        changed[3] = 40.0
        new[0, place] = sae.decode(changed) + (new[0, place] - sae.decode(own))
        wanted = lens.run_with_hooks(prompt, fwd_hooks=[(site, lambda act, hook: new)])
        with lens.edit(Features(sae, [3], value=40.0), at=at, site=site) as landing:
            logits, _ = lens.run_with_cache(prompt, names_filter=site)
    assert float((logits - wanted).abs().max()) < 1e-10
    assert float((logits - plain).abs().max()) > 1e-3
    assert landing.fired == 1
    assert landing.positions == {0: [place]}
    with (
        pytest.raises(il.EditTouchedNothing, match="bit for bit"),
        lens.edit(Features(sae, [3], scale=1.0), at=at, site=site),
    ):
        lens.run_with_cache(prompt, names_filter=site)


ACROSS = {"hook_name": "blocks.1.hook_resid_mid", "hook_name_out": "blocks.1.hook_mlp_out"}
MID, OUT = ACROSS.values()


@pytest.mark.parametrize("do", ["value", "scale", "donor"])
def test_a_transcoder_reads_one_site_and_changes_the_other(do: str) -> None:
    lens, at = _tiny(), il.text
    prompts = [
        {"images": tiny.image(40, 24, seed=k), "text": tiny.prompt("qwen2_5_vl", text)}
        for k, text in enumerate(("red?", "what is its colour?"))
    ]
    other = [
        {"images": tiny.image(24, 40, seed=k + 5), "text": tiny.prompt("qwen2_5_vl", text)}
        for k, text in enumerate(("dim?", "how is its surface?"))
    ]
    coder, tokens = Relu(d=64, **ACROSS), lens.tokens(prompts)
    columns = [at.resolve(tokens, row) for row in (0, 1)]
    with torch.no_grad():
        donor = lens.run(other, names_filter=MID, positions=[at], max_new_tokens=1)
        given = donor.states(MID, at)

    def put(act: torch.Tensor, hook: Any) -> torch.Tensor:
        new = act.clone()
        for row, cells in enumerate(columns):
            f = coder.encode(seen[0][row, cells])
            g = f.clone()
            if do == "donor":
                g[:, [3, 5]] = coder.encode(given.values[row, : len(cells)])[:, [3, 5]]
            else:
                g[:, [3, 5]] = 40.0 if do == "value" else f[:, [3, 5]] * 3.0
            new[row, cells] = act[row, cells] + coder.decode(g) - coder.decode(f)
        return new

    seen: list[torch.Tensor] = []
    hooks = [(MID, lambda act, hook: seen.append(act)), (OUT, put)]
    wanted_value = {"value": 40.0, "scale": 3.0, "donor": donor}[do]
    edit = Features(coder, [3, 5], **{do: wanted_value})
    with torch.no_grad():
        plain, _ = lens.run_with_cache(prompts, names_filter=OUT)
        wanted = lens.run_with_hooks(prompts, fwd_hooks=hooks)
        with lens.edit(edit, at=at, site=OUT) as landing:
            logits, _ = lens.run_with_cache(prompts, names_filter=OUT)
    real = torch.as_tensor(tokens.kind != 0)
    assert float((logits - wanted)[real].abs().max()) < 1e-10
    assert float((logits - plain)[real].abs().max()) > 1e-3
    assert landing.sites == (OUT,)
    assert {site for *_, site, _ in landing.cells} == {OUT}
    assert landing.positions == {row: cells.tolist() for row, cells in enumerate(columns)}


class BehindNorm(nn.Module):
    """As in docs/dictionaries.md: reads the stream, and norms it as the model does."""

    def __init__(self, coder: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.coder, self.norm, self.cfg = coder, norm, Relu(d=2, **ACROSS).cfg
        self.decode = coder.decode

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.coder.encode(self.norm(x))
        return found


@pytest.mark.parametrize("arch", ["qwen2_5_vl", "gemma3", "idefics3"])
def test_a_transcoder_behind_a_norm_reads_what_the_mlp_reads(arch: str) -> None:
    lens = il.LatentModel(*tiny.fresh(arch), spec=False)
    prompt = {"images": tiny.image(40, 24, seed=0), "text": tiny.prompt(arch, "red?")}
    coder, at = Relu(d=64).to(torch.float64), il.last_prompt
    place = int(at.resolve(lens.tokens(prompt), 0)[0])
    norm = lens.model.get_submodule(lens.registry[MID].path)
    mlp = next(m for n, m in lens.model.named_modules() if n.endswith("layers.1.mlp")
               and "vision" not in n and "visual" not in n)  # fmt: skip
    behind = lens.model.get_submodule(lens.registry[OUT].path)  # of Gemma, the norm behind the MLP
    seen: list[torch.Tensor] = []

    def put(module: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
        f, new = coder.encode(seen[-1][0, [place]]), out.clone()
        new[0, place] += (coder.decode(f * 3.0) - coder.decode(f))[0]
        return new

    with torch.no_grad():
        plain = lens.run_with_hooks(prompt)
        see = mlp.register_forward_pre_hook(lambda m, given: seen.append(given[0]))
        write = behind.register_forward_hook(put)
        wanted = lens.run_with_hooks(prompt)
        see.remove()
        write.remove()
        logits = {}
        for name, reader in (("normed", BehindNorm(coder, norm)), ("raw", Relu(d=64, **ACROSS))):
            with lens.edit(Features(reader, scale=3.0), at=at, site=OUT):
                logits[name] = lens.run_with_hooks(prompt)
    assert float((wanted - plain).abs().max()) > 1e-3
    assert float((logits["normed"] - wanted).abs().max()) < 1e-10
    assert float((logits["raw"] - wanted).abs().max()) > 1e-3  # the fooling one: the stream itself


@pytest.mark.parametrize("reads", ["blocks.1.ln2.hook_normalized", "blocks.1.mlp.hook_in"])
def test_a_transcoder_that_reads_behind_a_norm_is_refused_with_the_way_out(reads: str) -> None:
    coder = Relu(d=64, hook_name=reads, hook_name_out=OUT)
    said = rf"reads '{reads}' and writes '{OUT}', .* wrap it so that it norms hook_resid_mid itself"
    with pytest.raises(il.InputError, match=said):
        with _tiny().edit(Features(coder, scale=3.0), at=il.last_prompt, site=OUT):
            pass


def test_a_transcoder_acts_while_latents_are_fed_back() -> None:
    """In a generation each forward reads its own states; in fixed context, as in a sweep, too."""
    lens = il.load("latent-content")
    task = lens.task(n=3, seed=0)
    coder = Relu(d=64, **ACROSS).float()
    seen: list[torch.Tensor] = []

    def put(act: torch.Tensor, hook: Any) -> torch.Tensor:
        new = act.clone()
        for row in range(len(act)):
            cells = np.flatnonzero(np.isin(hook.columns, il.latent.resolve(hook.tokens, row)))
            f = coder.encode(seen[-1][row, cells])
            new[row, cells] = act[row, cells] - coder.decode(f) + coder.decode(f * 3.0)
        return new

    with lens.hooks([(MID, lambda act, hook: seen.append(act)), (OUT, put)]), torch.no_grad():
        wanted = lens.run(task.base)
    edit = Features(coder, scale=3.0)
    with lens.edit(edit, at=il.latent, site=OUT) as landing:
        changed = lens.run(task.base)
    plain = lens.run(task.base)
    torch.testing.assert_close(changed.latents, wanted.latents, rtol=0, atol=1e-4)
    assert float((changed.latents - plain.latents).abs().max()) > 0.1
    assert landing.rows == [0, 1, 2]
    for context in ("free", "fixed"):
        how = {"metric": il.log_prob, "context": context}
        one = lens.ablate(task.base, edit, at=il.latent[1], site=OUT, **how)
        swept = il.sweep(lens, task, sites=OUT, positions=[il.latent[1]], edit=edit, **how)
        np.testing.assert_allclose(swept.effect[0], one.effect.numpy(), atol=1e-4)


# ---- known answers on organisms --------------------------------------------------------------

SHAPES = ("bar", "circle", "cross", "ring", "square", "triangle")
LAST = il.latent[1]  # the step at which the hunt has arrived


class Planted(nn.Module):
    """One feature for each shape of the treasure, on where linear discriminants find it, each
    decoded to its mean; and two features for the ends of a direction in which shapes are alike."""

    def __init__(self, states: torch.Tensor, shapes: Sequence[str]) -> None:
        super().__init__()
        labels = torch.tensor([SHAPES.index(shape) for shape in shapes])
        means = torch.stack([states[labels == k].mean(0) for k in range(len(SHAPES))])
        scatter = torch.cov((states - means[labels]).T) + 1e-3 * torch.eye(states.shape[1])
        self.weights = torch.linalg.solve(scatter, means.T)
        self.offset = -0.5 * (means * self.weights.T).sum(-1)
        self.means, self.centre = means, means.mean(0)
        read = self.weights.T - self.weights.mean(1)
        held = torch.cat([means - self.centre, read])  # what moves between shapes, what tells them
        spanned = torch.linalg.svd(held)[2][: 2 * (len(SHAPES) - 1)]
        free = states - self.centre
        free = free - free @ spanned.T @ spanned
        self.aside = torch.linalg.svd(free, full_matrices=False)[2][0]

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        shape = nn.functional.one_hot((x @ self.weights + self.offset).argmax(-1), len(SHAPES))
        along = ((x - self.centre) @ self.aside)[..., None]
        return torch.cat([shape.to(x), along.relu(), (-along).relu()], -1)

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        along = (f[..., -2] - f[..., -1])[..., None] * self.aside
        return f[..., : len(SHAPES)] @ (self.means - self.centre) + along + self.centre


SHAPE, PLACEBO = list(range(len(SHAPES))), [len(SHAPES), len(SHAPES) + 1]


@dataclasses.dataclass(frozen=True)
class Case:
    lens: Any
    base: il.Run
    source: il.Run
    task: il.Pairs
    sae: Planted
    arrived: tuple[str, ...]  # the shape that the source's latents arrive at

    def swapped(self, chosen: list[int]) -> tuple[il.Run, Any]:
        edit = Features(self.sae, chosen, donor=self.source)
        with self.lens.edit(edit, at=LAST) as landing:
            return self.lens.run(self.task.base), landing


@cache
def case(name: str) -> Case:
    lens = il.load(name)
    learn, task = lens.task(n=256, seed=1), lens.task(n=24, seed=0)
    shape = lens.variables["shape"]
    sae = Planted(lens.run(learn.base).latents[:, 1], [shape(e, 1) for e in learn.base])
    return Case(
        lens, lens.run(task.base), lens.run(task.source), task, sae,
        tuple(shape(e, 1) for e in task.source),
    )  # fmt: skip


def read(run: il.Run, sae: Planted) -> list[str]:
    """The shape whose feature is active at the last step."""
    found = features(run.latents[:, 1], sae)[:, : len(SHAPES)]
    assert bool((found.sum(-1) == 1).all())
    return [SHAPES[k] for k in found.argmax(-1).tolist()]


def test_swapping_the_shapes_features_gives_the_donors_answer() -> None:
    found = case("latent-content")
    assert read(found.source, found.sae) == list(found.arrived)
    assert list(found.arrived) == list(found.task.source_answers)
    changed, landing = found.swapped(SHAPE)
    assert list(changed.answers) == list(found.task.source_answers)
    assert landing.rows == list(range(24))
    assert landing.relative_change < 1.5
    assert read(changed, found.sae) == list(found.arrived)


def test_a_placebo_feature_changes_no_answer() -> None:
    found = case("latent-content")
    changed, landing = found.swapped(PLACEBO)
    assert list(changed.answers) == list(found.base.answers)
    assert landing.relative_change > 0.01  # it did move the states


def test_setting_a_feature_chooses_the_answer() -> None:
    found = case("latent-content")
    for number in (0, 3):
        value = [float(k == number) for k in SHAPE]
        edit = Features(found.sae, SHAPE, value=value)
        with found.lens.edit(edit, at=LAST) as landing:
            changed = found.lens.run(found.task.base)
        assert set(changed.answers) == {SHAPES[number]}
        already = {
            i for i, shape in enumerate(read(found.base, found.sae)) if shape == SHAPES[number]
        }
        assert set(landing.flags) == already  # nothing to change there: said, not hidden


def test_a_shape_that_is_read_but_not_used_changes_no_answer() -> None:
    """Fooling case: the pointer organism's latents hold the shape as well, and it goes by the
    name; the ignored one's hold little of it."""
    pointer = case("latent-pointer")
    seen = read(pointer.source, pointer.sae)
    assert np.mean([a == b for a, b in zip(seen, pointer.arrived, strict=True)]) > 0.9
    for name in ("latent-pointer", "latent-ignored"):
        found = case(name)
        changed, landing = found.swapped(SHAPE)
        assert len(landing.rows) == 24
        same = [a == b for a, b in zip(changed.answers, found.base.answers, strict=True)]
        moved = [a == b for a, b in zip(changed.answers, found.task.source_answers, strict=True)]
        assert np.mean(same) > 0.9
        assert np.mean(moved) < 0.1


def test_ablate_and_sweep_take_it_as_any_edit() -> None:
    found = case("latent-content")
    off = Features(found.sae, SHAPE, value=0.0)
    result = found.lens.ablate(found.task.base, off, at=LAST, metric=il.accuracy)
    assert float(result.before.mean()) == 1.0
    assert float(result.after.mean()) < 0.6
    swept = il.sweep(
        found.lens, found.task[:6], sites="hook_latent", positions=il.latent, edit=off,
        metric=il.log_prob, context="fixed",
    )  # fmt: skip
    one = found.lens.ablate(
        found.task[:6].base, off, at=LAST, metric=il.log_prob, context="fixed",
        answers=found.task[:6].base_answers,
    )  # fmt: skip
    np.testing.assert_allclose(swept.effect[1], one.effect.numpy(), atol=1e-4)


# ---- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "was given nothing to do; give one of value"),
        ({"value": 0.0, "scale": 2.0}, "was given value and scale"),
        ({"features": [], "value": 0.0}, r"features is \[\], expected numbers such as"),
        ({"features": [-1], "value": 0.0}, "holds -1; give whole numbers, counted from 0"),
        ({"features": [True], "value": 0.0}, "holds True; give whole numbers"),
        ({"features": [4, 2, 4], "value": 0.0}, "names feature 4 twice"),
        ({"features": [1], "value": float("nan")}, "value is nan, expected finite numbers"),
        ({"features": [1], "scale": float("inf")}, "scale is inf, expected finite numbers"),
        ({"features": [1, 2], "value": [1.0]}, r"value has shape \(1,\), expected one number or"),
        ({"value": [1.0, 2.0]}, r"value has shape \(2,\), expected one number or one for each"),
    ],
)  # fmt: skip
def test_arguments_are_refused_before_anything_runs(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(il.InputError, match=message):
        Features(Relu(), **arguments)


@pytest.mark.parametrize("given", [3, "3", [1.5], [True], [[1]]])
def test_features_that_are_no_numbers_are_refused(given: Any) -> None:
    with pytest.raises(il.InputError, match=r"expected numbers|give whole numbers"):
        dictionaries._chosen(given)


@pytest.mark.parametrize("given", ["zero", None, object()])
def test_values_that_are_no_numbers_are_refused(given: Any) -> None:
    with pytest.raises(il.InputError, match="expected finite numbers"):
        dictionaries._check_numbers("value", [given], (1,))


def test_what_is_no_dictionary_is_refused() -> None:
    for wrong in (nn.Identity(), Relu):
        with pytest.raises(il.InputError, match="expected an object with encode and decode"):
            Features(wrong, value=0.0)


def test_a_feature_out_of_range_is_refused() -> None:
    with pytest.raises(il.InputError, match="names feature 12 of a Relu with features 0 to 11"):
        apply(Features(Relu(), [3, 12], value=0.0), ACT)


def test_a_dictionary_of_another_width_dtype_or_kind_is_refused() -> None:
    edit = Features(Relu(d=D + 1), [3], value=0.0)
    with pytest.raises(il.DonorError, match="cannot encode states of width 8 at hook_latent"):
        apply(edit, ACT)
    edit = Features(Relu(d=D + 1, d_in=D + 1), [3], value=0.0)
    with pytest.raises(il.DonorError, match="encodes states of width 9, and those at hook_latent"):
        apply(edit, ACT)
    with pytest.raises(il.DonorError, match=r"in torch.float64 on cpu, .* in torch.float32 on cpu"):
        apply(Features(Relu(), [3], value=0.0), ACT.float())

    class Odd(Relu):
        def encode(self, x: torch.Tensor) -> Any:
            return (super().encode(x), None)

    with pytest.raises(il.DonorError, match="encode of this Odd gave tuple for 6 states"):
        apply(Features(Odd(), [3], value=0.0), ACT)

    class Wide(Relu):
        def decode(self, f: torch.Tensor) -> torch.Tensor:
            return torch.cat([super().decode(f)] * 2, -1)

    with pytest.raises(il.DonorError, match=r"decodes to shape \(6, 16\), and the states at"):
        apply(Features(Wide(), [3], value=0.0), ACT)


def test_what_is_not_finite_is_refused() -> None:
    act = ACT.clone()
    act[2, 1] = float("nan")
    with pytest.raises(il.DonorError, match="features that are not finite, the first in cell 2"):
        apply(Features(Relu(), [3], value=0.0), act)
    broken = Relu()
    with torch.no_grad():
        broken.dec.fill_(float("inf"))
    with pytest.raises(il.DonorError, match="states that are not finite, the first in cell 0"):
        apply(Features(broken, [3], value=0.0), ACT)


def test_a_dictionary_of_another_site_is_refused() -> None:
    lens = _tiny()
    elsewhere = Features(Relu(d=64, hook_name="blocks.1.hook_resid_post"), [3], value=0.0)
    with (
        pytest.raises(
            il.InputError,
            match=r"made for 'blocks.1.hook_resid_post', pass site='blocks.1.hook_resid_post'; "
            "the edit is at blocks.0.hook_mlp_out",
        ),
        lens.edit(elsewhere, at=il.last_prompt, site="blocks.0.hook_mlp_out"),
    ):
        pass
    unknown = Features(Relu(d=64, hook_name="blocks.1.ln2.hook_normalized"), [3], value=0.0)
    with (
        pytest.raises(il.InputError, match="which this model does not offer"),
        lens.edit(unknown, at=il.last_prompt, site="blocks.1.hook_mlp_out"),
    ):
        pass
    across = {"hook_name": "blocks.1.ln2.hook_normalized", "hook_name_out": "blocks.1.hook_mlp_out"}
    for out, given, message in (
        ("blocks.1.hook_mlp_out", across, "and this model does not offer the first"),
        ("blocks.0.hook_mlp_out", ACROSS, "made for 'blocks.1.hook_mlp_out', pass site="),
        ("blocks.1.hook_resid_mid", ACROSS, "made for 'blocks.1.hook_mlp_out', pass site="),
    ):
        edit = Features(Relu(d=64, **given), [3], value=0.0)
        with (
            pytest.raises(il.InputError, match=message),
            lens.edit(edit, at=il.last_prompt, site=out),
        ):
            pass
    module_path = Features(Relu(d=64, hook_name="model.layers.1"), [3], value=0.0)
    site = "blocks.1.hook_resid_post"
    lens.registry.add(site, module_path, at=il.last_prompt)  # not spelled as ours: not compared
    lens.registry.clear()
