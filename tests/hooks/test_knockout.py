"""Attention knockout against masks written by hand in plain torch; and what must follow from it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
import tiny
import torch
from transformers import LogitsProcessor
from untouched import fingerprint, same

import imaginelens as il
from imaginelens.hooks import attention
from imaginelens.hooks.knockout import Forget, Knockout
from imaginelens.hooks.positions import after, deciding, generated, markers, onward
from imaginelens.hooks.positions import format as formatting
from imaginelens.hooks.tokens import Kind

ARCHS = (
    "qwen2_5_vl",
    "gemma3",
    "llava",
)  # plain; windows and two-way image blocks; no 3-D positions
SPEC = il.LatentSpec(
    name="test", open="<|latent_start|>", close="<|latent_end|>", pad="<|latent_pad|>", max_steps=3
)
Cut = Callable[[int, np.ndarray, np.ndarray], np.ndarray]


def lens_of(name: str) -> il.LatentModel:
    return il.LatentModel(*tiny.build(name), spec=SPEC)


def examples(name: str, n: int = 1) -> list[dict[str, Any]]:
    texts = ("what colour?", "where is the red cube?", "how many cats are there now?")
    sizes = ((48, 32), (24, 40), (40, 40))
    return [
        {"images": tiny.image(*sizes[i], seed=i), "text": tiny.prompt(name, texts[i])}
        for i in range(n)
    ]


class Plan(LogitsProcessor):
    """Makes row i open a span at the steps that plan i says, and nowhere else."""

    def __init__(self, lens: il.LatentModel, plans: list[set[int]], width: int) -> None:
        ids = lens.span_tokens
        self.plans, self.width, self.open = plans, width, ids.open
        self.banned = [ids.open, ids.close, ids.pad, lens.tokenizer.eos_token_id]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.width
        scores = scores.clone()
        scores[:, self.banned] = -1e9
        for row, plan in enumerate(self.plans):
            if step in plan:
                scores[row, self.open] = 1e9
        return scores


def ran(lens: il.LatentModel, given: Any, *plans: set[int], **options: Any) -> il.Run:
    plan = Plan(lens, list(plans), lens.prompt(given).inputs["input_ids"].shape[1])
    return lens.run(
        given, max_new_tokens=10, generation={"logits_processor": [plan]}, keep_logits=True,
        **options,
    )  # fmt: skip


def ragged(lens: il.LatentModel, name: str) -> il.Run:
    """Three rows, padded on the left: they open at different steps, or never."""
    return ran(lens, examples(name, 3), {1}, {3}, set())


def columns(run: il.Run, *kinds: Kind) -> list[np.ndarray]:
    """The columns of each row that are of some kinds, from the map's raw arrays."""
    return [np.flatnonzero(np.isin(row, kinds)) for row in run.tokens.kind]


# ---- the reference: masks in plain torch -----------------------------------------------------


@contextmanager
def masked(
    name: str, model: torch.nn.Module, cut: torch.Tensor, layers: Any, heads: Any, seen: list[int]
) -> Iterator[None]:
    """Have every attention of these layers see its mask less `cut`, (example, query, key)."""

    def without(layer: int) -> Callable[..., Any]:
        def hook(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            n_rows, n, _ = cut.shape
            mask = kwargs["attention_mask"]
            if mask is None:  # then the kernel is told that it is causal
                mask = torch.ones(n, n, dtype=torch.bool).tril().expand(n_rows, 1, n, n)
            assert mask.dtype == torch.bool
            if layers is None or layer in layers:
                seen.append(int((mask[:, 0] & cut).sum()))
                n_heads = module.config.num_attention_heads
                chosen = torch.zeros(n_heads, dtype=torch.bool)
                chosen[list(range(n_heads) if heads is None else heads)] = True
                mask = mask & ~(cut[:, None] & chosen[None, :, None, None])
            return args, {**kwargs, "attention_mask": mask}

        return hook

    blocks = oracle.decoder(name, model).layers
    handles = [
        block.self_attn.register_forward_pre_hook(without(i), with_kwargs=True)
        for i, block in enumerate(blocks)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def edges(width: int, keys: list[np.ndarray], queries: list[np.ndarray] | None) -> torch.Tensor:
    """Edges from queries (None: all) to keys, but no position's to itself."""
    cut = torch.zeros(len(keys), width, width, dtype=torch.bool)
    for row, hidden in enumerate(keys):
        for query in range(width) if queries is None else queries[row]:
            cut[row, query, hidden] = True
    return cut & ~torch.eye(width, dtype=torch.bool)


def plain(lens: il.LatentModel, run: il.Run) -> torch.Tensor:
    """The logits of a run's sequence in one plain forward, latents laid over by a torch hook."""
    script = lens.script(run)
    mask = script.laid[..., None]
    handle = lens.model.get_input_embeddings().register_forward_hook(
        lambda m, a, out: torch.where(mask, script.embeds.to(out), out)
    )
    try:
        with torch.no_grad():
            return lens.model(**script.inputs).logits
    finally:
        handle.remove()


LATENT, IMAGE = (Kind.LATENT,), (Kind.IMAGE,)
EDGES = {  # queries, keys, and the kinds they stand for (None: every position)
    "all -> latent": (None, il.latent, None, LATENT),
    "latent -> image": (il.latent, il.image, LATENT, IMAGE),
    "image -> image": (il.image, il.image, IMAGE, IMAGE),
    "latent -> latent": (il.latent, il.latent, LATENT, LATENT),
}


@pytest.mark.parametrize("how", EDGES)
@pytest.mark.parametrize(
    ("layers", "heads"), [(None, None), ([1, 2], None), (range(1), [0, 3]), ([1], [2])]
)
@pytest.mark.parametrize("name", ARCHS)
def test_knockout_equals_a_mask_written_by_hand(
    name: str, layers: Any, heads: Any, how: str
) -> None:
    lens = lens_of(name)
    run = ragged(lens, name)
    queries, at, looking, hidden = EDGES[how]
    cut = edges(
        run.tokens.width, columns(run, *hidden), None if looking is None else columns(run, *looking)
    )
    cut &= torch.as_tensor(run.tokens.kind != Kind.PAD)[:, :, None]
    seen: list[int] = []
    with masked(name, lens.model, cut, layers, heads, seen):
        wanted = plain(lens, run)
    with lens.edit(Knockout(queries, layers=layers, heads=heads), at=at) as landing:
        found = lens.run_with_hooks(run)
    real = torch.as_tensor(run.tokens.kind != Kind.PAD)
    torch.testing.assert_close(found[real], wanted[real], rtol=0, atol=1e-10)
    assert (found - plain(lens, run))[real].abs().max() > 1e-4  # it is not vacuous
    assert landing.edges == sum(seen) > 0
    assert landing.fired == 1
    assert landing.sites == tuple(
        f"blocks.{i}.attn.hook_pattern" for i in ([0, 1, 2] if layers is None else layers)
    )
    for row, of_row in landing.positions.items():
        assert set(of_row) <= set(columns(run, *hidden)[row].tolist())


def recomputed(
    name: str,
    lens: il.LatentModel,
    given: Any,
    n: int,
    cut: Callable[[np.ndarray, int], torch.Tensor],
) -> tuple[list[int], torch.Tensor]:
    """Latent decoding of one example by full recomputation without a cache, under a mask.

    `cut(kind, prompt_width)` says which edges of the sequence so far are cut.
    """
    inputs = dict(lens.prompt(given).inputs)
    ids, embed = lens.span_tokens, lens.model.get_input_embeddings()
    norm = oracle.decoder(name, lens.model).norm
    width = inputs["input_ids"].shape[1]
    kinds = lens.tokens(given).kind[0].tolist()
    written: list[int] = []
    latents: dict[int, torch.Tensor] = {}
    final: list[torch.Tensor] = []

    def lay(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        for column, z in latents.items():
            out[0, column] = z
        return out

    for step in range(n):
        new = torch.tensor([written], dtype=torch.long)
        whole = {k: v for k, v in inputs.items() if k != "labels"}
        whole["input_ids"] = torch.cat([inputs["input_ids"], new], 1)
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        for types in ("mm_token_type_ids", "token_type_ids"):
            if types in whole:
                whole[types] = torch.cat([inputs[types], torch.zeros_like(new)], 1)
        whole["position_ids"] = tiny.positions(lens.model, whole)
        handles = [
            embed.register_forward_hook(lay),
            norm.register_forward_hook(lambda m, a, out: final.append(out[0, -1])),
        ]
        with torch.no_grad(), masked(
            name, lens.model, cut(np.array(kinds), width)[None], None, None, []
        ):  # fmt: skip
            logits = lens.model(**whole, use_cache=False).logits[0, -1].clone()
        for handle in handles:
            handle.remove()
        logits[[ids.open, ids.close, ids.pad, lens.tokenizer.eos_token_id]] = -1e9
        opened = 1
        if opened < step <= opened + 3:
            latents[width + step] = final[-1]
        token = {opened: ids.open, opened + 4: ids.close} | dict.fromkeys(
            range(opened + 1, opened + 4), ids.pad
        )
        written.append(token.get(step, int(logits.argmax())))
        kinds.append(Kind.LATENT if opened < step <= opened + 3 else Kind.TEXT)
    return written, torch.stack(list(latents.values()))


def _cut(kind: np.ndarray, hidden: np.ndarray, looking: np.ndarray) -> torch.Tensor:
    return edges(len(kind), [np.flatnonzero(hidden)], [np.flatnonzero(looking)])[0]


LIVE: dict[str, tuple[il.Edit, Any, Callable[[np.ndarray, int], torch.Tensor]]] = {
    "all -> latent": (
        Knockout(), il.latent,
        lambda kind, w: _cut(kind, kind == Kind.LATENT, kind >= 0),
    ),
    "latent -> image": (
        Knockout(il.latent), il.image,
        lambda kind, w: _cut(kind, kind == Kind.IMAGE, kind == Kind.LATENT),
    ),
    "forget the image": (
        Forget(), il.image,
        lambda kind, w: _cut(kind, kind == Kind.IMAGE, np.arange(len(kind)) >= w),
    ),
    "forget the image from the first latent on": (
        Forget(onward(il.latent)), il.image,
        lambda kind, w: _cut(kind, kind == Kind.IMAGE, (kind == Kind.LATENT).cumsum() > 0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", LIVE)
@pytest.mark.parametrize("name", ARCHS)
def test_generating_under_a_knockout_equals_full_recomputation_under_a_mask(
    name: str, how: str
) -> None:
    """Keys that wait in the cache are cut as well as new ones, in windows as without."""
    lens, given = lens_of(name), examples(name)[0]
    edit, at, cut = LIVE[how]
    with lens.edit(edit, at=at) as landing:
        run = ran(lens, given, {1})
    width = run.tokens.prompt_width
    written, latents = recomputed(name, lens, given, run.tokens.width - width, cut)
    assert run.sequences[0, width:].tolist() == written
    torch.testing.assert_close(run.latents[0], latents, rtol=0, atol=1e-10)
    assert landing.fired > 1
    untouched = ran(lens, given, {1})
    assert (run.logits - untouched.logits).abs().max() > 1e-4


@pytest.mark.parametrize("name", ARCHS)
def test_reading_what_was_written_under_a_knockout_gives_the_logits_that_wrote_it(
    name: str,
) -> None:
    lens = lens_of(name)
    with lens.edit(Knockout(), at=il.latent):
        run = ragged(lens, name)
        read = lens.run_with_hooks(run)
    width = run.tokens.prompt_width
    real = torch.as_tensor(run.tokens.kind[:, width:] != Kind.PAD)
    n = run.logits.shape[1]
    torch.testing.assert_close(
        read[:, width - 1 : width - 1 + n][real[:, :n]], run.logits[real[:, :n]], rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("name", ARCHS)
def test_a_batch_under_a_knockout_gives_what_its_rows_give_alone(name: str) -> None:
    lens, given = lens_of(name), examples(name, 3)
    plans: list[set[int]] = [{1}, {3}, set()]
    with lens.edit(Knockout(after(il.latent), layers=[0, 2]), at=il.latent | il.image) as landing:
        batch = ragged(lens, name)
    total = 0
    for row, one in enumerate(given):
        with lens.edit(Knockout(after(il.latent), layers=[0, 2]), at=il.latent | il.image) as own:
            if not plans[row]:
                with pytest.raises(il.EditTouchedNothing, match="touched no position in 1 row"):
                    ran(lens, one, plans[row])
                continue
            alone = ran(lens, one, plans[row])
        assert alone.texts[0] == batch.texts[row]
        torch.testing.assert_close(batch.latents[row, :3], alone.latents[0], rtol=0, atol=1e-10)
        total += own.edges
    assert landing.edges == total > 0
    assert landing.flags == {2: "not_emitted"}


# ---- what must follow ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHS)
def test_without_any_path_from_the_latents_nothing_behind_them_depends_on_them(name: str) -> None:
    lens = lens_of(name)
    run = ragged(lens, name)
    behind = [after(il.latent).resolve(run.tokens, row) for row in (0, 1)]
    donor = torch.randn(1, 1, lens.structure.d_model, dtype=torch.float64).expand(3, 3, -1)

    def read(*, cut: bool, swapped: bool, layers: Any = None) -> list[torch.Tensor]:
        with ExitStack() as stack:
            if cut:
                stack.enter_context(lens.edit(Knockout(layers=layers), at=il.latent))
            if swapped:
                stack.enter_context(lens.edit(il.Swap(donor.clone()), at=il.latent))
            logits = lens.run_with_hooks(run)
        return [logits[row, c] for row, c in enumerate(behind)]

    for own, other in zip(read(cut=True, swapped=False), read(cut=True, swapped=True), strict=True):
        assert torch.equal(own, other)  # exactly
    open_paths = zip(read(cut=False, swapped=False), read(cut=False, swapped=True), strict=True)
    assert all((own - other).abs().max() > 1e-2 for own, other in open_paths)
    leaky = zip(  # one layer left open, and it is found
        read(cut=True, swapped=False, layers=[0, 2]),
        read(cut=True, swapped=True, layers=[0, 2]),
        strict=True,
    )
    assert all((own - other).abs().max() > 1e-4 for own, other in leaky)


@pytest.mark.parametrize(
    ("organism", "uses"), [("latent-content", True), ("latent-ignored", False)]
)
def test_knocking_out_the_latents_of_organisms_gives_the_known_answers(
    organism: str, uses: bool
) -> None:
    lens = il.load(organism, dtype=torch.float64)
    task = lens.task(n=64, seed=0)
    run = lens.run(task.base)
    right = np.mean([a == b for a, b in zip(run.answers, task.base_answers, strict=True)])
    result = lens.ablate(
        run, Knockout(deciding), at=il.latent, metric=il.accuracy, context="fixed",
        answers=list(task.base_answers),
    )  # fmt: skip
    free = lens.ablate(
        run, Knockout(after(il.latent)), at=il.latent, metric=il.accuracy,
        answers=list(task.base_answers),
    )  # fmt: skip
    assert right > 0.95
    for found in (result, free):
        if uses:
            assert found.after.nan_to_num(0.0).mean() < 0.3  # one in four, or no answer
        else:
            assert found.after.mean() == right
    # and whatever the latents hold then, the answer's logits do not move at all
    read_at = deciding.resolve(run.tokens, 0)
    with lens.edit(Knockout(), at=il.latent):
        one = lens.run_with_hooks(run)
        with lens.edit(il.Zero(), at=il.latent):
            other = lens.run_with_hooks(run)
    assert torch.equal(one[:, read_at], other[:, read_at])


def test_knockout_is_an_arm_of_necessity() -> None:
    lens = il.load("latent-content")
    table = il.necessity(lens, lens.task(n=16, seed=0), edits=[Knockout(after(il.latent))])
    row = table["Knockout(queries=after(latent))"]
    assert row.change.value < -0.4
    assert table.sham.change.value == 0.0
    assert row.cells == row.expected == 32


@pytest.mark.parametrize("name", ARCHS)
def test_the_pattern_of_a_knockout_is_zero_at_its_edges_and_sums_to_one(name: str) -> None:
    lens = lens_of(name)
    run = ragged(lens, name)
    sites = [f"blocks.{i}.attn.hook_pattern" for i in range(3)]
    with lens.edit(Knockout(generated, layers=[1], heads=[2]), at=il.image):
        _, cache = lens.run_with_cache(run, names_filter=sites)
    _, whole = lens.run_with_cache(run, names_filter=sites)
    column, image = run.tokens.prompt_width + 1, il.image.resolve(run.tokens, 0)
    for layer, site in enumerate(sites):
        pattern = cache[site][0, column]  # (head, key)
        torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern.sum(-1)))
        for head in range(4):
            share = pattern[head, image].sum()
            assert (share == 0.0) == (
                whole[site][0, column, head, image].sum() == 0.0 or (layer == 1 and head == 2)
            )
    torch.testing.assert_close(  # renormalised: the rest keeps its proportions
        cache[sites[1]][0, column, 2],
        (kept := whole[sites[1]][0, column, 2].index_fill(0, torch.as_tensor(image), 0.0))
        / kept.sum(),
        rtol=0, atol=1e-12,
    )  # fmt: skip


def test_a_query_is_never_left_without_a_key() -> None:
    lens = lens_of("qwen2_5_vl")
    run = ragged(lens, "qwen2_5_vl")
    everything = il.positions(range(run.tokens.width))
    with lens.edit(Knockout(), at=everything):
        _, cache = lens.run_with_cache(run, names_filter="blocks.1.attn.hook_pattern")
    pattern = cache["pattern", 1]
    for row in range(3):
        for column in np.flatnonzero(run.tokens.kind[row] != Kind.PAD):
            assert torch.equal(pattern[row, column].argmax(-1), torch.full((4,), int(column)))
            assert bool((pattern[row, column, :, column] == 1.0).all())


def test_knockouts_compose_with_each_other_and_with_other_edits() -> None:
    name = "qwen2_5_vl"
    lens = lens_of(name)
    run = ragged(lens, name)
    site = "blocks.1.attn.hook_z"

    def read(*edits: tuple[il.Edit, Any, str]) -> torch.Tensor:
        with ExitStack() as stack:
            for edit, at, where in edits:
                stack.enter_context(lens.edit(edit, at=at, site=where))
            return lens.run_with_hooks(run)

    one = (Knockout(il.latent), il.image, "hook_latent")
    two = (Knockout(after(il.latent)), il.latent, "hook_latent")
    zero = (il.Zero(), il.latent[1], site)
    both = read(one, two)
    assert torch.equal(both, read(two, one))
    assert not torch.equal(both, read(one))
    assert not torch.equal(both, read(two))
    assert torch.equal(read(one, zero), read(zero, one))
    cut = edges(run.tokens.width, columns(run, *IMAGE), columns(run, *LATENT))
    columns_of = [il.latent[1].resolve(run.tokens, row) for row in range(3)]

    def put(act: torch.Tensor) -> torch.Tensor:
        act = act.clone()
        for row, chosen in enumerate(columns_of):
            act[row, chosen] = 0
        return act

    with masked(name, lens.model, cut, None, None, []), oracle.hooked(name, lens.model, site, put):
        wanted = plain(lens, run)
    real = torch.as_tensor(run.tokens.kind != Kind.PAD)
    torch.testing.assert_close(read(one, zero)[real], wanted[real], rtol=0, atol=1e-10)


# ---- leaving the model alone -----------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHS)
def test_the_model_is_as_it_was_also_when_it_raised(name: str) -> None:
    lens = lens_of(name)
    run = ragged(lens, name)
    before, logits = fingerprint(lens.model), plain(lens, run)

    def boom(act: torch.Tensor, hook: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), lens.edit(Knockout(), at=il.latent):
        with lens.hooks([("blocks.2.attn.hook_z", boom)]):
            lens.run_with_hooks(run)
    with pytest.raises(il.InputError, match="head 4 of a layer with heads 0 to 3"):
        lens.ablate(run, Knockout(heads=[4]), at=il.latent, context="fixed")
    with pytest.raises(il.EditTouchedNothing), lens.edit(Knockout(il.image), at=il.latent):
        lens.run_with_hooks(run)
    assert lens.registry.entries == []
    assert same(before, fingerprint(lens.model))
    assert torch.equal(plain(lens, run), logits)


@pytest.mark.parametrize("name", ARCHS)
def test_the_sham_of_a_knockout_changes_nothing(name: str) -> None:
    """The same attention function, every pattern put back: exactly 0, live and in one forward."""
    lens = lens_of(name)
    run = ragged(lens, name)
    sites = "*.attn.hook_pattern"
    watching = [(sites, lambda act, hook: None)]
    once = lens.run_with_hooks(run, fwd_hooks=watching)
    with lens.edit(il.Sham(), at=after(il.latent), site=sites):
        assert torch.equal(lens.run_with_hooks(run), once)
    with lens.hooks(watching):
        live = ragged(lens, name)
    with lens.edit(il.Sham(), at=after(il.latent), site=sites):
        again = ragged(lens, name)
    assert torch.equal(again.logits, live.logits)


def test_nothing_is_added_to_a_forward_in_which_nothing_is_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lens = lens_of("qwen2_5_vl")
    run = ragged(lens, "qwen2_5_vl")
    monkeypatch.setattr(attention, "_shown", None)  # what our attention function cannot do without
    hooks = [("blocks.1.hook_resid_post", lambda act, hook: None)]
    lens.run_with_hooks(run, fwd_hooks=hooks)
    with pytest.raises(TypeError), lens.edit(Knockout(), at=il.latent):
        lens.run_with_hooks(run, fwd_hooks=hooks)
    assert attention._ACTIVE == {}


def test_patterns_that_grow_are_edited_while_a_run_is_generated() -> None:
    """The first pattern repeated: later queries look where the first one looked, and not at keys
    that came after it."""
    lens, site = lens_of("llava"), "blocks.1.attn.hook_pattern"
    given = examples("llava")[0]
    with lens.edit(il.FirstRepeat(), at=generated, site=site):
        run = ran(lens, given, {1}, names_filter=site, positions=[generated])
    pattern = run.cache["pattern", 1][0]
    assert len(pattern) > 3
    for later in pattern[1:]:
        assert torch.equal(later, pattern[0])
    assert bool((pattern[0, :, run.tokens.prompt_width + 1 :] == 0).all())


# ---- refusals --------------------------------------------------------------------------------


def unchecked(**given: Any) -> None:
    """A knockout as it is made where no annotations are checked."""
    made = Knockout()
    for name, value in given.items():
        object.__setattr__(made, name, value)
    made.__post_init__()


def test_what_cannot_be_cut_is_refused_with_one_sentence() -> None:
    lens = lens_of("qwen2_5_vl")
    run = ragged(lens, "qwen2_5_vl")
    with pytest.raises(il.InputError, match=r"queries=il.answer leaves out .* use queries=il.dec"):
        Knockout(il.answer)
    with pytest.raises(il.InputError, match="queries is 3, expected positions"):
        unchecked(queries=3)
    with pytest.raises(il.InputError, match="names layer 3 of a model with layers 0 to 2"):
        lens.ablate(run, Knockout(layers=[3]), at=il.latent)
    for wrong in ([], [0.5], [-1], [True], "12"):
        with pytest.raises(il.InputError, match="layers"):
            unchecked(layers=wrong)
    with pytest.raises(il.InputError, match=r"acts inside attention and not at 'blocks.1"):
        lens.ablate(run, Knockout(), at=il.latent, site="blocks.1.hook_resid_post")
    with pytest.raises(il.InputError, match=r"has heads of its own; write il.Knockout\(heads=\[0"):
        lens.ablate(run, Knockout(), at=il.latent, heads=[0])
    with pytest.raises(il.PositionError, match="deciding is not known while the run is still"):
        lens.ablate(run, Knockout(deciding), at=il.latent)
    with pytest.raises(il.EditTouchedNothing, match="touched no position in 3 rows"):
        lens.ablate(run, Knockout(il.last_prompt), at=il.latent, context="fixed")
    with pytest.raises(il.SiteUnavailable, match="has no states to edit"):
        Knockout().apply(torch.zeros(1, 2), il.EditContext("x", *[np.zeros(1, int)] * 4))


def test_a_site_may_choose_the_layers() -> None:
    lens = lens_of("qwen2_5_vl")
    run = ragged(lens, "qwen2_5_vl")
    with lens.edit(Knockout(layers=[1]), at=il.latent) as one:
        first = lens.run_with_hooks(run)
    with lens.edit(Knockout(), at=il.latent, site="blocks.1.attn.hook_pattern") as two:
        second = lens.run_with_hooks(run)
    assert torch.equal(first, second)
    assert one.edges == two.edges


def test_attention_that_cannot_be_reached_is_refused() -> None:
    model, processor = tiny.fresh("qwen2_5_vl")
    attention = model.model.language_model.layers[1].self_attn

    class Private(type(attention)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    attention.__class__ = Private
    lens = il.LatentModel(model, processor, spec=SPEC)
    given = examples("qwen2_5_vl")[0]
    with pytest.raises(il.SiteUnavailable, match=r"cannot cut edges in 1 of 3 layers.*layers=\["):
        with lens.edit(Knockout(), at=il.image):
            lens.run(given)
    with lens.edit(Knockout(generated, layers=[0, 2]), at=il.image) as landing:
        lens.run(given, max_new_tokens=4)
    assert landing.edges > 0


def test_a_cache_made_in_advance_is_refused() -> None:
    lens = lens_of("qwen2_5_vl")
    with pytest.raises(il.SiteUnavailable, match=r"the cache holds .* leave cache_implementation"):
        with lens.edit(Knockout(generated), at=il.image):
            lens.run(
                examples("qwen2_5_vl")[0], max_new_tokens=4,
                generation={"cache_implementation": "static"},
            )  # fmt: skip


# ---- selectors -------------------------------------------------------------------------------


@pytest.mark.parametrize("slot", ["after", "replace"])
def test_markers_slots_and_format_are_what_was_written(slot: str) -> None:
    model, processor = tiny.build("qwen2_5_vl")
    lens = il.LatentModel(model, processor, spec=replace(SPEC, slot=slot), answer=lambda t: t[-2:])
    given = examples("qwen2_5_vl", 3)
    run = ran(lens, given, {1, 7}, {3}, set())
    ids, kind = run.tokens.ids, run.tokens.kind
    width, span = run.tokens.prompt_width, lens.span_tokens
    for row in range(3):
        tokens = run.tokens
        opened = [c for c in range(width, tokens.width) if ids[row, c] == span.open]
        closed = [c for c in range(width, tokens.width) if ids[row, c] == span.close]
        assert markers.resolve(tokens, row).tolist() == sorted(opened + closed)
        for k, column in enumerate(opened):
            assert il.span[k].open.resolve(tokens, row).tolist() == [column]
            steps = il.span[k].latent.resolve(tokens, row)
            assert steps[0] == column + (slot == "after")
            assert il.span[k].close.resolve(tokens, row).tolist() == [
                c for c in closed if c == steps[-1] + 1
            ]
        parts = [
            markers.resolve(tokens, row), il.latent.resolve(tokens, row),
            formatting.resolve(tokens, row), il.answer.resolve(tokens, row),
        ]  # fmt: skip
        together = np.unique(np.concatenate(parts))
        assert together.tolist() == generated.resolve(tokens, row).tolist()
        if slot == "after":
            assert sum(map(len, parts)) == len(together)  # no position is of two kinds
    assert (kind == Kind.ANSWER).any()


def test_selectors_are_spelled_as_they_are_written() -> None:
    for selector, spelled in {
        il.latent[1] | markers: "latent[1] | markers",
        il.span[1].open: "span[1].open",
        il.span[0].close: "span[0].close",
        after(il.latent): "after(latent)",
        onward(il.span[0].latent): "onward(span[0].latent)",
        generated: "generated",
        deciding: "deciding",
        formatting: "format",
    }.items():
        assert repr(selector) == spelled


def test_edits_of_markers_alone_and_of_slots_alone_are_those_of_plain_torch() -> None:
    """Live: the open token's embedding is edited while nothing is known of the span to come."""
    name = "qwen2_5_vl"
    lens, given = lens_of(name), examples(name, 3)
    site = "blocks.0.hook_resid_pre"
    run = ragged(lens, name)
    for at, kinds in ((il.span[0].open, "open"), (il.span[0].close, "close")):
        token = getattr(lens.span_tokens, kinds)
        where = [np.flatnonzero(row == token) for row in run.tokens.ids]
        with lens.edit(il.Zero(), at=at, site=site) as landing:
            read = lens.run_with_hooks(run)

        def put(act: torch.Tensor, where: Any = where) -> torch.Tensor:
            act = act.clone()
            for row, chosen in enumerate(where):
                act[row, chosen] = 0
            return act

        with oracle.hooked(name, lens.model, site, put):
            wanted = plain(lens, run)
        assert torch.equal(read, wanted)
        assert landing.positions == {r: c.tolist() for r, c in enumerate(where) if len(c)}
        with lens.edit(il.Zero(), at=at, site=site) as landing:
            live = ran(lens, given, {1}, {3}, set())
        assert landing.positions == {r: c.tolist() for r, c in enumerate(where) if len(c)}
        assert torch.equal(live.latents, run.latents) == (kinds == "close")
    with lens.edit(il.Zero(), at=il.latent), lens.edit(il.Zero(), at=markers, site=site) as landing:
        ragged(lens, name)
    assert landing.rows == [0, 1]


def test_later_selectors_are_the_same_live_and_afterwards() -> None:
    lens = lens_of("qwen2_5_vl")
    with lens.edit(il.Sham(), at=after(il.latent), site="blocks.0.hook_resid_pre") as one:
        with lens.edit(il.Sham(), at=onward(il.latent), site="blocks.0.hook_resid_pre") as two:
            run = ran(lens, examples("qwen2_5_vl", 2), {1}, {1, 6})
    for landing, selector in ((one, after(il.latent)), (two, onward(il.latent))):
        for row in (0, 1):
            known = selector.resolve(run.tokens, row)
            assert landing.positions[row] == [c for c in known if c < run.tokens.width - 1]
