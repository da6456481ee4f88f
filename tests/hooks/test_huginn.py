"""Depth recurrence: the unrolled depth is the layer axis, and its states are sites."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import reference_loop_depth as loop
import tiny
import tiny_huginn
import torch
import untouched

import imaginelens as il
from imaginelens.hooks import controls, depth
from imaginelens.hooks.depth import FIRST, DepthSpec
from imaginelens.hooks.families import FAMILIES, family_of, register_family

TEXTS = ("2 and 2?", "hm", "seven")
MAX_NEW = 5
R, PRELUDE, CORE, CODA = 3, 1, 2, 2
STATES = [f"recurrences.{r}.hook_state" for r in range(R + 1)]
EVERYWHERE = il.onward(il.positions([0]))
HUGINN = FAMILIES["huginn"]


@cache
def tokenizer() -> Any:
    return tiny.tokenizer(bos=False)


def fresh() -> tiny_huginn.HuginnForCausalLM:
    """A random model whose every weight matters."""
    config = tiny_huginn.HuginnConfig(
        vocab_size=len(tokenizer()),
        n_layers_in_prelude=PRELUDE,
        n_layers_in_recurrent_block=CORE,
        n_layers_in_coda=CODA,
        mean_recurrence=R,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = tiny_huginn.HuginnForCausalLM(config).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.copy_(1 + 0.2 * noise if p.ndim == 1 else 1.2 * p.shape[-1] ** -0.5 * noise)
    model.generation_config.update(eos_token_id=2, pad_token_id=0, max_new_tokens=MAX_NEW)
    return model


@cache
def built() -> tiny_huginn.HuginnForCausalLM:
    return fresh()


def lens_of(spec: DepthSpec | None = None, model: Any = None) -> il.LatentModel:
    return il.LatentModel(built() if model is None else model, tokenizer(), spec=spec)


def given(*which: int) -> list[dict[str, Any]]:
    return [{"text": TEXTS[i]} for i in which]


def ran(lens: il.LatentModel, inputs: Any, **options: Any) -> il.Run:
    """A run with its states at all recurrences and positions."""
    return lens.run(
        inputs,
        max_new_tokens=MAX_NEW,
        names_filter="recurrences.*",
        positions=[EVERYWHERE],
        **options,
    )


def sizes(model: Any, steps: int = R) -> loop.Sizes:
    c = model.config
    return loop.Sizes(c.n_heads, PRELUDE, CORE, CODA, steps, c.rope_base, c.norm_eps)


def traced(lens: il.LatentModel, run: il.Run, row: int) -> loop.Trace:
    """What the reference makes of a row's prompt and initial states."""
    tokens, steps = run.tokens, lens.registry.depth.steps
    prompt = tokens.ids[row, tokens.start(row) : tokens.prompt_width].tolist()
    first = run.cache[FIRST][row]
    return loop.huginn(
        lens.model.state_dict(), prompt, first.__getitem__, sizes(lens.model, steps),
        max_new=MAX_NEW, eos=2,
    )  # fmt: skip


def error_of(run: il.Run, trace: loop.Trace, row: int) -> float:
    """The largest difference of any state; asserts that the ids are the same."""
    start, n = run.tokens.start(row), len(trace.ids)
    assert run.sequences[row, start : start + n].tolist() == trace.ids
    found = [
        run.cache[f"recurrences.{r}.hook_state"][row, : n - 1] - states
        for r, states in enumerate(trace.states)
    ]
    return max(float(f.abs().max()) for f in found)


def measured(lens: il.LatentModel) -> Iterator[tuple[il.Run, loop.Trace, int]]:
    """Runs of one and of three examples, with what they must equal."""
    for some in ((0,), (0, 1, 2)):
        run = ran(lens, given(*some))
        yield from ((run, traced(lens, run, row), row) for row in range(len(some)))


# ---- the reference -----------------------------------------------------------------------------


def test_tokens_and_states_equal_the_reference_alone_and_in_a_padded_batch() -> None:
    for run, trace, row in measured(lens_of()):
        assert error_of(run, trace, row) < 1e-10
        assert len(trace.states) == R + 1
    assert run.tokens.start(1) > 0


def test_the_reference_tells_a_wrong_depth_and_a_wrong_state() -> None:
    lens = lens_of()
    run = ran(lens, given(0))
    short = il.LatentModel(lens.model, tokenizer(), spec=HUGINN.with_steps(R - 1))
    with pytest.raises(AssertionError):
        assert error_of(run, traced(short, run, 0), 0) < 1e-10
    off = traced(lens, run, 0)
    off.states[2] = off.states[2] + 1e-9
    assert error_of(run, off, 0) > 1e-10


@pytest.mark.parametrize("steps", [1, 5])
def test_the_number_of_recurrences_is_given_once(steps: int) -> None:
    lens = lens_of(HUGINN.with_steps(steps))
    names = [f"recurrences.{r}.hook_state" for r in range(steps + 1)]
    assert lens.registry.match("recurrences.*") == names
    assert len(lens.registry.match("*.hook_resid_post")) == PRELUDE + CORE * steps + CODA
    run = ran(lens, given(0))
    assert error_of(run, traced(lens, run, 0), 0) < 1e-10


def test_recurrences_stay_as_many_in_training_mode_and_gradients_reach_them() -> None:
    """The class draws their number anew while it trains, and runs most of them without gradients;
    in evaluation all of them."""
    model = fresh()
    run = ran(lens_of(model=model), given(0))
    again = ran(lens_of(model=model.train()), given(0))
    assert torch.equal(run.sequences, again.sequences)
    lens = lens_of(model=model.eval())
    _, held = lens.run_with_cache(given(0)[0], names_filter=STATES)
    for site, path, call in (
        ("recurrences.1.hook_state", "transformer.adapter", 1),
        ("blocks.4.attn.hook_z", "transformer.core_block.1.attn.proj", 1),
        ("blocks.2.hook_resid_post", "transformer.core_block.1", 0),
    ):
        seen: list[torch.Tensor] = []
        hook = (site, lambda grad, hook, seen=seen: seen.append(grad.flatten(2)))
        with lens.hooks(bwd_hooks=[hook]):
            lens.run_with_hooks(given(0)[0]).square().sum().backward()
        model.zero_grad()
        held_at: list[torch.Tensor] = []
        ids = lens.prompt(given(0)[0]).inputs["input_ids"]
        first = held[FIRST].detach()
        keep = lambda act, held_at=held_at: held_at.append(act) or act.retain_grad()  # noqa: E731
        logits = by_hand(lens, ids, first, path, call, keep, enters="_post" not in site, grad=True)
        logits.square().sum().backward()
        model.zero_grad()
        (wanted,) = (act.grad for act in held_at)
        torch.testing.assert_close(seen[0], wanted[..., : seen[0].shape[-1]], rtol=0, atol=1e-10)
        assert seen[0].abs().max() > 0


# ---- from disk ---------------------------------------------------------------------------------


def write(folder: Path) -> None:
    """A checkpoint that brings its own code, as the released one does."""
    built().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    shutil.copy(tiny_huginn.__file__, folder / "modeling.py")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "modeling.HuginnConfig",
        "AutoModelForCausalLM": "modeling.HuginnForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))


TIED = '_tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "transformer.wte.weight"}'


def test_code_that_says_what_is_tied_as_transformers_4_did_opens(tmp_path: Path) -> None:
    """As the released code does; transformers 5 alone cannot open it."""
    write(tmp_path)
    code = (tmp_path / "modeling.py").read_text()
    assert TIED in code
    (tmp_path / "modeling.py").write_text(
        code.replace(TIED, '_tied_weights_keys = ["lm_head.weight"]')
    )
    with mock.patch("imaginelens.hooks.textmodels._tie_as_now"), pytest.raises(AttributeError):
        opened(tmp_path)
    lens = opened(tmp_path)
    assert lens.model.lm_head.weight is lens.model.transformer["wte"].weight
    for run, trace, row in measured(lens):
        assert error_of(run, trace, row) < 1e-10


def opened(folder: Path, **options: Any) -> il.LatentModel:
    """Its code is copied to a place beside it, not into the user's cache."""
    with mock.patch("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "code")):
        return il.load(folder, dtype=torch.float64, trust_remote_code=True, **options)


def test_a_folder_with_code_of_its_own_opens_and_equals_the_reference(tmp_path: Path) -> None:
    write(tmp_path)
    lens = opened(tmp_path)
    assert type(lens.model) is not tiny_huginn.HuginnForCausalLM
    assert lens.family == HUGINN
    for run, trace, row in measured(lens):
        assert error_of(run, trace, row) < 1e-10
    assert opened(tmp_path, spec=HUGINN.with_steps(2)).registry.depth.steps == 2
    with pytest.raises(il.CheckpointError, match="no config that can be read"):
        il.load(tmp_path)


# ---- sites -------------------------------------------------------------------------------------


def by_hand(
    lens: il.LatentModel,
    ids: torch.Tensor,
    initial: torch.Tensor,
    path: str,
    call: int,
    fn: Callable[[torch.Tensor], torch.Tensor],
    *,
    enters: bool = False,
    grad: bool = False,
) -> torch.Tensor:
    """The logits of a plain forward, with `fn` at one call of a module, by torch's own hooks."""
    module, calls = lens.model.get_submodule(path), []

    def counted(value: torch.Tensor) -> torch.Tensor | None:
        calls.append(value)
        return fn(value) if len(calls) == call + 1 else None

    def entered(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        new = counted(args[0])
        return None if new is None else (new, *args[1:])

    handle = (
        module.register_forward_pre_hook(entered)
        if enters
        else module.register_forward_hook(lambda _, args, out: counted(out))
    )
    with torch.set_grad_enabled(grad):
        logits = lens.model(ids, input_states=initial, num_steps=(0, R)).logits
    handle.remove()
    assert len(calls) > call
    return logits


def home(layer: int) -> tuple[str, int]:
    """The block that is run at a layer, and which of its calls that is."""
    if layer < PRELUDE:
        return f"transformer.prelude.{layer}", 0
    r, k = divmod(layer - PRELUDE, CORE)
    if r < R:
        return f"transformer.core_block.{k}", r
    return f"transformer.coda.{layer - PRELUDE - CORE * R}", 0


INSIDE = {  # site -> module in the block, and whether its input is meant
    "hook_resid_pre": ("", True),
    "hook_attn_out": (".attn", False),
    "attn.hook_z": (".attn.proj", True),
    "hook_resid_mid": (".norm_2", False),
    "mlp.hook_post": (".mlp.proj", True),
    "hook_mlp_out": (".mlp", False),
    "hook_resid_post": ("", False),
}


def loud(act: torch.Tensor) -> torch.Tensor:
    return act * 0.7 + 0.3


def split(act: torch.Tensor) -> torch.Tensor:
    """`loud` on the first half of the features."""
    half = act.shape[-1] // 2
    return torch.cat([loud(act[..., :half]), act[..., half:]], -1)


def places() -> Iterator[tuple[str, str, int, bool]]:
    """Every site of the unrolled model: name, module, call, whether its input is meant."""
    for layer in range(PRELUDE + CORE * R + CODA):
        path, call = home(layer)
        for site, (inside, enters) in INSIDE.items():
            yield f"blocks.{layer}.{site}", path + inside, call, enters
    for r in range(R):
        yield f"recurrences.{r}.hook_state", "transformer.adapter", r, True
    yield f"recurrences.{R}.hook_state", "transformer.ln_f", 0, True
    yield "ln_final.hook_normalized", "transformer.ln_f", 1, False
    yield "hook_embed", "transformer.wte", 0, False
    yield "unembed.hook_out", "lm_head", 0, False


def test_every_site_is_read_and_edited_as_by_hooks_that_count_calls() -> None:
    lens = lens_of()
    assert sorted(lens.registry) == sorted(name for name, *_ in places())
    prompt = lens.prompt(given(0)[0])
    ids = prompt.inputs["input_ids"]
    with torch.no_grad():
        plain, held = lens.run_with_cache(prompt)
    for name, path, call, enters in places():
        seen: list[torch.Tensor] = []
        halves = path.endswith("adapter")
        note = lambda act, seen=seen: seen.append(act)  # noqa: E731
        same = by_hand(lens, ids, held[FIRST], path, call, note, enters=enters)
        assert torch.equal(same, plain)
        read = seen[0][..., : held[name].shape[-1]] if halves else seen[0]
        assert torch.equal(read.reshape(held[name].shape), held[name]), name
        fn = split if halves else loud
        wanted = by_hand(lens, ids, held[FIRST], path, call, fn, enters=enters)
        with torch.no_grad():
            edited = lens.run_with_hooks(prompt, fwd_hooks=[(name, lambda a, hook: loud(a))])
        assert torch.equal(edited, wanted), name
        assert not torch.equal(edited, plain), name


def test_a_state_is_what_the_recurrence_before_left_behind() -> None:
    _, held = lens_of().run_with_cache(given(0)[0])
    for r in range(1, R + 1):
        left = held["resid_post", PRELUDE + CORE * r - 1]
        assert torch.equal(held[f"recurrences.{r}.hook_state"], left)
    assert held["resid_post", -1].shape == held[FIRST].shape


def test_several_edits_along_the_depth_act_together() -> None:
    """Sites that share a module, at several of its calls, in any order of registration."""
    lens = lens_of()
    hooks = [(f"blocks.{layer}.hook_resid_post", lambda a, hook: loud(a)) for layer in (1, 3, 5)]
    hooks.append(("recurrences.2.hook_state", lambda a, hook: loud(a)))
    one = lens.run_with_hooks(given(0)[0], fwd_hooks=hooks)
    other = lens.run_with_hooks(given(0)[0], fwd_hooks=hooks[::-1])
    assert torch.equal(one, other)
    alone = [lens.run_with_hooks(given(0)[0], fwd_hooks=[h]) for h in hooks]
    assert not any(torch.equal(one, a) for a in alone)


# ---- edits of states ---------------------------------------------------------------------------


@pytest.mark.parametrize("r", range(R + 1))
def test_a_swapped_state_makes_what_follows_the_donors(r: int) -> None:
    """Of the same text, with other initial states, everything later is the donor's; of another
    text of the same length, whose embeddings differ, it is not."""
    base, donor = lens_of(), lens_of(HUGINN.with_seed(7))
    site = f"recurrences.{r}.hook_state"
    source, own = ran(donor, given(0)), ran(base, given(0))
    prompt = il.positions(range(len(TEXTS[0])))
    with base.edit(il.Swap(source), at=prompt, site=site) as landing:
        _, held = base.run_with_cache(given(0)[0], names_filter=STATES)
        logits = base.run_with_hooks(given(0)[0])
    wanted, theirs = donor.run_with_cache(given(0)[0], names_filter=STATES)
    assert landing.fired
    n = held[FIRST].shape[1]
    for k, name in enumerate(STATES):
        if k < r:
            assert torch.equal(held[name][0], own.cache[name][0, :n])
            assert not torch.equal(held[name], theirs[name])
        else:
            torch.testing.assert_close(held[name], theirs[name], rtol=0, atol=1e-12)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-12)

    swapped = {"text": TEXTS[0][::-1]}
    with base.edit(il.Swap(source), at=prompt, site=site):
        _, held = base.run_with_cache(swapped, names_filter=STATES)
    torch.testing.assert_close(held[site], theirs[site], rtol=0, atol=0)
    for name in STATES[r + 1 :]:
        assert (held[name] - theirs[name]).abs().max() > 1e-3


@pytest.mark.parametrize("site", [FIRST, STATES[2], STATES[R], "blocks.4.attn.hook_z"])
def test_a_sham_changes_nothing(site: str) -> None:
    lens = lens_of()
    run = ran(lens, given(0, 1, 2), keep_logits=True)
    assert controls.sham_difference(lens, run, site=site, at=EVERYWHERE)[0] == 0.0
    with lens.edit(il.Sham(), at=il.generated, site=site):
        again = ran(lens, given(0, 1, 2), keep_logits=True)
    assert torch.equal(again.logits, run.logits)


@pytest.mark.parametrize("r", range(R + 1))
def test_an_edit_leaves_earlier_recurrences_and_positions_as_they_were(r: int) -> None:
    lens, p = lens_of(), 3
    _, before = lens.run_with_cache(given(0)[0], names_filter=STATES)
    with lens.edit(il.Zero(), at=il.positions([p]), site=f"recurrences.{r}.hook_state"):
        _, after = lens.run_with_cache(given(0)[0], names_filter=STATES)
    for k, name in enumerate(STATES):
        changed = (before[name] != after[name]).any(-1)[0]
        wanted = torch.zeros_like(changed)
        wanted[p] = k >= r
        wanted[p + 1 :] = k > r
        assert torch.equal(changed, wanted), name


def test_an_edit_while_generating_is_the_same_edit_while_reading() -> None:
    lens = lens_of()
    plain = ran(lens, given(0, 1), keep_logits=True)
    for site in ("recurrences.0.hook_state", "recurrences.2.hook_state", "blocks.4.hook_mlp_out"):
        with lens.edit(il.Zero(), at=il.generated, site=site):
            run = ran(lens, given(0, 1), keep_logits=True)
            assert controls.path_gap(lens, run) < 1e-9
        assert not torch.equal(run.logits, plain.logits)


def test_what_no_recurrence_reads_has_no_effect() -> None:
    """An adapter that is blind to the state: only the last one, read by the coda, matters."""
    model = fresh()
    with torch.no_grad():
        model.transformer["adapter"].weight[:, : model.config.n_embd] = 0
    lens = lens_of(model=model)
    plain = lens.run_with_hooks(given(0)[0])
    for r, site in enumerate(STATES):
        with lens.edit(il.Zero(), at=EVERYWHERE, site=site) as landing:
            edited = lens.run_with_hooks(given(0)[0])
        assert landing.fired
        effect = float((edited - plain).abs().max().detach())
        assert (effect == 0.0) if r < R else (effect > 1e-3)


def test_patching_measures_states_along_the_depth() -> None:
    lens = lens_of()
    for context in ("free", "fixed"):
        result = lens.patch(
            base=given(0), source=given(2), site="recurrences.2.hook_state", at=il.last_prompt,
            metric=il.kl, context=context,
        )  # fmt: skip
        assert result.landing.fired
        assert (result.after > 1e-6).all()
    result = lens.ablate(given(0), il.Zero(), at=il.last_prompt, site="blocks.6.hook_resid_post")
    assert result.landing.fired


# ---- initial states ----------------------------------------------------------------------------


def test_reading_a_run_is_generating_it() -> None:
    lens = lens_of()
    sampled = {"do_sample": True, "temperature": 1.5}
    for inputs, options in ((given(0), {}), (given(0, 1, 2), {}), (given(0, 1), sampled)):
        run = ran(lens, inputs, keep_logits=True, generation=options)
        assert controls.path_gap(lens, run) < 1e-9


def test_each_forward_reads_what_is_new() -> None:
    """`generate` goes on from the cache that the class makes."""
    lens, widths = lens_of(), list[int]()
    hook = ("recurrences.1.hook_state", lambda act, hook: widths.append(act.shape[1]))
    with lens.hooks([hook]):
        lens.run(given(0))
    assert widths == [len(TEXTS[0])] + [1] * (MAX_NEW - 1)


def test_without_keyed_states_reading_is_not_generating() -> None:
    """What the class does by itself: another draw in every forward."""
    lens = lens_of()
    given_ = depth.Depth.given

    def own_draws(*args: Any) -> dict[str, Any]:
        return {k: v for k, v in given_(*args).items() if k != "input_states"}

    with mock.patch.object(depth.Depth, "given", own_draws):
        run = ran(lens, given(0), keep_logits=True)
        assert controls.path_gap(lens, run) > 1e-3


def test_a_seed_decides_and_nothing_else_is_drawn() -> None:
    before = torch.get_rng_state()
    run, again = ran(lens_of(), given(0)), ran(lens_of(HUGINN), given(0))
    other = ran(lens_of(HUGINN.with_seed(1)), given(0))
    for name in STATES:
        assert torch.equal(run.cache[name], again.cache[name])
        assert not torch.equal(run.cache[name][0, 0], other.cache[name][0, 0])
    assert torch.equal(before, torch.get_rng_state())


def test_each_position_of_each_example_has_its_own_state_in_any_batch() -> None:
    lens = lens_of()
    batch, alone = ran(lens, given(0, 1, 2)), [ran(lens, given(i)) for i in range(3)]
    for row, one in enumerate(alone):
        n = one.cache[FIRST].shape[1]
        assert torch.equal(batch.cache[FIRST][row, :n], one.cache[FIRST][0])
        for name in STATES:
            gap = batch.cache[name][row, :n] - one.cache[name][0]
            assert gap.abs().max() < 1e-10
        assert run_ids(batch, row) == run_ids(one, 0)
    drawn = torch.cat([one.cache[FIRST][0] for one in alone])
    assert len(torch.unique(drawn, dim=0)) == len(drawn)


def run_ids(run: il.Run, row: int) -> list[int]:
    start = run.tokens.start(row)
    return run.sequences[row, start:].tolist()


def test_initial_states_are_drawn_as_the_model_draws_them() -> None:
    """A normal distribution cut at three standard deviations: its variance has a closed form."""
    lens = lens_of()
    given_ = {"text": "a" * 200}
    drawn = lens.run_with_cache(given_, names_filter=FIRST)[1][FIRST].flatten().detach()
    own = lens.model.initialize_state(torch.empty(200, 24, dtype=torch.float64)).flatten()
    spread = lens.registry.depth.spread
    assert spread == pytest.approx(math.sqrt(2 / 5))
    density = math.exp(-4.5) / math.sqrt(2 * math.pi)
    variance = spread**2 * (1 - 6 * density / math.erf(3 / math.sqrt(2)))
    for values in (drawn, own):
        assert values.abs().max() <= 3 * spread
        assert float(values.var()) == pytest.approx(variance, rel=0.06)
        assert abs(float(values.mean())) < 4 * math.sqrt(variance / len(values))


def test_states_take_the_dtype_of_the_model() -> None:
    lens = lens_of(model=fresh().float())
    run = ran(lens, given(0, 1))
    assert run.cache[FIRST].dtype == torch.float32
    exact = ran(lens_of(), given(0, 1)).cache[FIRST]
    torch.testing.assert_close(run.cache[FIRST].double(), exact, rtol=0, atol=1e-6)


# ---- padding -----------------------------------------------------------------------------------


def test_padding_is_hidden_from_a_class_that_does_not_mask_it() -> None:
    lens = lens_of()
    alone = ran(lens, given(1))
    with mock.patch("imaginelens.hooks.depth.hidden_padding", return_value=nullcontext()):
        seen = ran(lens, given(0, 1))
    n = alone.cache[FIRST].shape[1]
    assert torch.equal(seen.cache[FIRST][1, :2], alone.cache[FIRST][0, :2])
    assert (seen.cache[STATES[1]][1, :n] - alone.cache[STATES[1]][0]).abs().max() > 1e-3


def test_a_class_whose_padding_cannot_be_hidden_is_run_alone() -> None:
    def written_out(q: Any, k: Any, v: Any, is_causal: bool) -> torch.Tensor:
        n, m = q.shape[-2], k.shape[-2]
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if is_causal:
            scores = scores.masked_fill(torch.ones(n, m).triu(1).bool(), -torch.inf)
        return scores.softmax(-1) @ v

    lens = lens_of()
    with mock.patch.object(tiny_huginn.F, "scaled_dot_product_attention", written_out):
        with pytest.raises(il.SiteUnavailable, match="run the inputs one by one"):
            ran(lens, given(0, 1))
        run = ran(lens, given(0))
    assert run.sequences.tolist() == ran(lens, given(0)).sequences.tolist()


# ---- what it says ------------------------------------------------------------------------------


def test_the_model_is_untouched_also_after_an_error() -> None:
    model = fresh()
    lens = lens_of(model=model)
    before = untouched.fingerprint(model)
    ran(lens, given(0, 1))
    with pytest.raises(ZeroDivisionError):
        ran(lens, given(0), generation={"logits_processor": [lambda ids, scores: 1 / 0]})
    assert untouched.same(before, untouched.fingerprint(model))


def test_it_is_recognised_and_described() -> None:
    lens = lens_of()
    assert lens.family == family_of(lens.model.config, None) == HUGINN
    assert lens_of(replace(HUGINN, name="mine")).family.name == "mine"
    assert il.LatentModel(built(), tokenizer(), spec="huginn").family == HUGINN
    said = str(lens.describe())
    assert "depth: 3 recurrences of 2 blocks within each forward" in said
    assert "unrolled as blocks.1 to blocks.6" in said
    assert "huginn: states along the depth" in said
    assert "by seed (0), example and position" in said
    assert HUGINN.kind == "depth"
    assert "9 layers" in repr(lens)
    n = lens.estimate_bytes("recurrences.*", n_examples=2, n_positions=3)
    assert n == (R + 1) * 2 * 3 * 24 * 8


def test_what_it_has_not_is_said() -> None:
    lens = lens_of()
    with pytest.raises(il.SiteUnavailable, match=r"name one of 'recurrences.0.hook_state' to"):
        lens.swap(given(0), given(2))
    with pytest.raises(il.SiteUnavailable, match="does not ask for a registered attention"):
        lens.registry.match("blocks.3.attn.hook_pattern")
    with pytest.raises(il.HookNameError, match="no site matches"):
        lens.registry.match("recurrences.5.hook_state")
    with pytest.raises(ValueError, match="expected 1 recurrence or more"):
        HUGINN.with_steps(0)
    with pytest.raises(il.SiteUnavailable, match=r"has no 'transformer.body', which models of"):
        lens_of(replace(HUGINN, core="transformer.body"))
    with pytest.raises(il.CheckpointError, match=r"has no 'depth'.*with_steps\(n\)"):
        lens_of(replace(HUGINN, steps_key="depth"))
    noisy = fresh()
    noisy.config.test_time_noise = 0.5
    with pytest.raises(il.SiteUnavailable, match="no run could be read again; set it to 0"):
        lens_of(model=noisy)
    with pytest.raises(il.InputError, match=r"'num_steps' was given.*with_steps\(n\)"):
        lens.run(given(0), generation={"num_steps": 2})
    with pytest.raises(il.CheckpointError, match="needs a model with a latent family"):
        lens.run(given(0), latents=il.Force(2))
    with pytest.raises(il.InputError, match="there is a family 'huginn' already"):
        register_family(HUGINN)


def test_models_without_recurrence_are_as_they_were() -> None:
    lens = il.LatentModel(*tiny.fresh("qwen2_5_vl"), spec=False)
    assert lens.registry.depth is None
    assert {site.call for site in lens.registry.values()} == {0}
    assert not lens.registry.table.unavailable.keys() & set(STATES)
