"""The differentiable loop feeds what the library's own loop feeds, whatever shares the batch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from latent_chains import hunts, ragged, tiny_lens
from torch import Tensor

import imaginelens as il
from examples.capimagine.chains import Chain
from examples.latent_baselines.checkpoints import open_to_train, write
from examples.latent_baselines.encoding import Batch, as_batch, asked, collate, encode, targets
from examples.latent_baselines.loop import Answers, Page, Thought, span_of, think
from imaginelens.hooks import Force, LatentModel
from imaginelens.hooks.errors import InputError

STEPS = 2


def _batch(lens: LatentModel, chains: list[Chain]) -> Batch:
    items, refused = encode(lens, span_of(lens), chains)
    assert not refused
    return as_batch(collate(items, pad_id=lens.tokenizer.pad_token_id))


def _think(lens: LatentModel, batch: Batch, **options: object) -> Thought:
    return think(lens.model, span_of(lens), batch.page, batch.answers, **options)  # type: ignore[arg-type]


def _asked(lens: LatentModel, chains: list[Chain]) -> list[dict[str, object]]:
    return [asked(chain, lens.processor) for chain in chains]


@pytest.mark.parametrize("family", ["organism", "mirage", "lvr", "monet"])
def test_latents_and_logits_of_a_ragged_batch_are_the_librarys(tmp_path: Path, family: str) -> None:
    chains, lens = ragged(tmp_path), tiny_lens(family)
    batch, length = _batch(lens, chains), 4
    run = lens.run(
        _asked(lens, chains),
        latents=Force(STEPS, at=0),
        max_new_tokens=STEPS + 2 + length,
        keep_logits=True,
        generation={"eos_token_id": None, "suppress_tokens": [lens.span_tokens.open]},
    )
    written = run.sequences[:, -length - 1 :]
    if lens.spec.force_close:  # elsewhere the token behind the span is sampled
        assert (written[:, 0] == lens.span_tokens.close).all()
        said = Answers(written[:, 1:], torch.ones_like(written[:, 1:]))
        thought = think(lens.model, span_of(lens), batch.page, said)
        logits = lens.model.lm_head(thought.answering)
        assert (logits - run.logits[:, -length:]).abs().max() < 1e-10
    thought = _think(lens, batch)
    assert run.latents.shape == thought.own.shape
    assert (thought.own - run.latents).abs().max() < 1e-10
    assert torch.equal(thought.own, thought.fed)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_a_saved_organism_thinks_in_the_library_what_it_thought_here(
    tmp_path: Path, dtype: torch.dtype, most: float
) -> None:
    chains = [chain for hops in (1, 2, 4) for chain in hunts(tmp_path, 2, seed=hops, hops=hops)]
    lens = open_to_train("latent-content", steps=STEPS, dtype=dtype)
    # replies of one to four pictures: what they show is not of interest here
    chains = [replace(chain, reply=chain.reply[:2]) for chain in chains]
    lens.model.eval()
    thought = _think(lens, _batch(lens, chains))
    write(lens, tmp_path / "saved")
    opened = il.load(tmp_path / "saved")
    assert opened.spec.name == "organism"
    assert opened.model.dtype == dtype
    for examples in ([chain.example() for chain in chains], _asked(opened, chains)):
        run = opened.run(examples)
        assert (run.latents - thought.own).abs().max() < most
    assert [a == c.answer for a, c in zip(run.answers, chains, strict=True)].count(True) >= 2


def test_a_row_alone_is_the_row_in_the_batch(tmp_path: Path) -> None:
    chains, lens = ragged(tmp_path), tiny_lens("organism")
    together = _think(lens, _batch(lens, chains), layers=True)
    for row, chain in enumerate(chains):
        batch = _batch(lens, [chain])
        alone = _think(lens, batch, layers=True)
        length = batch.answers.ids.shape[1]
        for name in ("opening", "own", "closing"):
            assert (getattr(alone, name)[0] - getattr(together, name)[row]).abs().max() < 1e-10
        told = together.answering[row, :length] - alone.answering[0]
        assert told.abs().max() < 1e-10
        deep = together.answering_layers[:, row, :length] - alone.answering_layers[:, 0]
        assert deep.abs().max() < 1e-10


def test_flat_positions_are_noticed(tmp_path: Path) -> None:
    """The oracle can fail: what Qwen2.5-VL does without mm_token_type_ids is far from it."""
    chains, lens = ragged(tmp_path), tiny_lens("organism")
    batch = _batch(lens, chains)
    flat = (batch.page.mask.cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
    wrong = _think(lens, replace(batch, page=replace(batch.page, positions=flat)))
    away = (wrong.own - _think(lens, batch).own).abs().amax((1, 2))
    assert (away[:3] > 1e-3).all()
    assert away[3] < 1e-10  # the row without pictures


def test_gradients_reach_every_latent_and_what_made_it(tmp_path: Path) -> None:
    chains, lens = ragged(tmp_path), tiny_lens("organism")
    lens.model.requires_grad_(True)
    thought = _think(lens, _batch(lens, chains))
    score = lens.model.lm_head(thought.answering[:, 0]).square().mean()
    weights = [w for w in lens.model.model.language_model.parameters() if w.requires_grad]
    for gradient in torch.autograd.grad(score, weights):
        assert gradient.isfinite().all()  # rows with nothing to see, in the padding, are no nan
    leaves: list[Tensor] = []

    def cut(step: int, state: Tensor) -> Tensor:
        leaves.append(state.detach().requires_grad_())
        return leaves[-1]

    thought = _think(lens, _batch(lens, chains), edit=cut)
    score = lens.model.lm_head(thought.answering[:, 0]).square().mean()
    for gradient in torch.autograd.grad(score, leaves, retain_graph=True):
        assert (gradient.abs().amax(1) > 0).all()
        assert gradient.isfinite().all()
    # the second latent is made of the first
    (onward,) = torch.autograd.grad(thought.own[:, 1].square().sum(), leaves[0])
    assert (onward.abs().amax(1) > 0).all()


def test_a_gradient_through_the_loop_is_the_finite_difference(tmp_path: Path) -> None:
    chains, lens = ragged(tmp_path), tiny_lens("organism")
    batch = _batch(lens, chains)
    weight = lens.model.model.language_model.layers[0].mlp.up_proj.weight
    weight.requires_grad_(True)

    def score() -> Tensor:
        return lens.model.lm_head(_think(lens, batch).answering[:, 0]).square().mean()

    (gradient,) = torch.autograd.grad(score(), weight)
    along = gradient / gradient.norm()
    size = 1e-3  # norms are computed in float32, so that smaller steps drown
    with torch.no_grad():
        weight += size * along
        above = score()
        weight -= 2 * size * along
        below = score()
    assert torch.isclose((above - below) / (2 * size), gradient.norm(), rtol=1e-3)


def test_copies_are_the_example_again_and_an_edit_of_one_stays_there(tmp_path: Path) -> None:
    chains, lens = ragged(tmp_path), tiny_lens("organism")
    batch = _batch(lens, chains)
    once = _think(lens, batch)
    ids, mask = (t.repeat_interleave(2, 0) for t in (batch.answers.ids, batch.answers.mask))

    def twist(step: int, state: Tensor) -> Tensor:
        return torch.stack([state[::2], state[::2].roll(1, 0)], dim=1).flatten(0, 1)

    twice = think(lens.model, span_of(lens), batch.page, Answers(ids, mask), edit=twist, copies=2)
    for name in ("opening", "own", "closing", "answering"):
        assert (getattr(twice, name)[::2] - getattr(once, name)).abs().max() < 1e-10
    assert torch.equal(twice.fed[1::2, 0], twice.own[::2, 0].roll(1, 0))
    assert ((twice.closing[1::2] - once.closing).abs().amax(1) > 1e-3).all()


def test_a_latent_sees_the_hints_up_to_its_own_and_what_follows_sees_none(tmp_path: Path) -> None:
    chains, lens = ragged(tmp_path), tiny_lens("organism")
    batch = _batch(lens, chains)
    page, both = batch.hinted, [0, 2]  # rows whose reply shows a picture for each step
    image = page.ids == lens.model.config.image_token_id
    second = (page.aid == 2)[image][:, None]
    other = replace(page, features=torch.where(second, -page.features, page.features))

    def told(page: Page, *, steps: int, hide: bool) -> Thought:
        span = replace(span_of(lens), steps=steps)
        return think(lens.model, span, page, batch.answers, hide_aid=hide)

    def change(name: str, *, steps: int, hide: bool) -> Tensor:
        pair = (getattr(told(p, steps=steps, hide=hide), name) for p in (page, other))
        return next(pair).sub(next(pair)).abs()[both]

    own = change("own", steps=2, hide=True)
    assert own[:, 0].max() < 1e-12
    assert (own[:, 1].amax(1) > 1e-3).all()
    assert (change("own", steps=2, hide=False)[:, 0].amax(1) > 1e-3).all()
    # without latents nothing that the answer sees has seen the second hint
    assert change("answering", steps=0, hide=True)[:, 0].max() < 1e-12
    assert (change("answering", steps=0, hide=False)[:, 0].amax(1) > 1e-3).all()


@pytest.mark.parametrize("family", ["monet-vllm", "coconut", "laser"])
def test_families_that_feed_otherwise_are_refused(family: str) -> None:
    lens = tiny_lens("organism")
    lens.spec = replace(
        il.FAMILIES[family], open=lens.spec.open, close=lens.spec.close, pad=lens.spec.pad
    )
    with pytest.raises(InputError, match="train another family"):
        span_of(lens)


def test_a_model_without_a_family_is_refused() -> None:
    with pytest.raises(InputError, match="no latent family"):
        span_of(il.load("direct"))


def test_targets_are_one_mean_per_step() -> None:
    card = torch.arange(6.0)[:, None]
    assert targets([card[:1], card[4:]], 2)[:, 0].tolist() == [0.0, 4.5]
    assert targets([card], 2)[:, 0].tolist() == [1.0, 4.0]
    assert targets([card], 4)[:, 0].tolist() == [0.5, 2.5, 4.0, 5.0]
    assert targets([card[3:4]], 3)[:, 0].tolist() == [3.0, 3.0, 3.0]


def test_chains_that_cannot_be_learned_from_are_refused_by_name(tmp_path: Path) -> None:
    lens = open_to_train("base", steps=STEPS, dtype=torch.float32)
    good, three, answerless, torn = hunts(tmp_path, 4, seed=3)
    three = replace(three, reply=(*three.reply[:2], three.reply[0]))
    answerless = replace(answerless, answer="hexagon")
    (tmp_path / "3-3-0.png").write_bytes(b"no picture")
    items, refused = encode(lens, span_of(lens), [good, three, answerless, torn])
    assert [item.number for item in items] == [0]
    assert [one.id for one in refused] == ["3/1", "3/2", "3/3"]
    assert "3 pictures" in refused[0].reason
    assert "hexagon" in refused[1].reason
    assert refused[2].kind == "broken picture"


def test_a_plain_model_is_given_the_tokens_and_the_rows_for_a_span(tmp_path: Path) -> None:
    plain = il.load("direct")
    plain.tokenizer.add_tokens(["hexagon"])  # now its words are not the organisms'
    plain.model.resize_token_embeddings(len(plain.tokenizer))
    write(plain, tmp_path / "plain")
    lens = open_to_train(tmp_path / "plain", steps=3, dtype=torch.float32)
    assert not any(w.requires_grad for w in lens.model.model.visual.parameters())
    rows = lens.model.get_input_embeddings().weight
    assert torch.equal(rows[: len(plain.tokenizer)], plain.model.get_input_embeddings().weight)
    write(lens, tmp_path / "latent")
    opened = il.load(tmp_path / "latent")
    assert (opened.spec.name, opened.spec.max_steps) == ("organism", 3)
    chains = hunts(tmp_path / "raw", 3, seed=4)
    items, refused = encode(opened, span_of(opened), chains)
    assert len(refused) == 3  # two pictures, three steps
    items, _ = encode(opened, span_of(opened), [replace(c, reply=c.reply[:1]) for c in chains])
    batch = as_batch(collate(items, pad_id=opened.tokenizer.pad_token_id))
    run = opened.run([chain.example() for chain in chains], latents=Force(3, at=0))
    assert (run.latents - _think(opened, batch).own).abs().max() < 1e-5
