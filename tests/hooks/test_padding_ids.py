"""Classes that count positions from their padding id: the same positions in prompts, generation and
reading, alone and padded."""

from collections.abc import Iterator

import pytest
import torch
import walk_checks
import walk_inputs

import imaginelens as il
from imaginelens.hooks import controls
from imaginelens.hooks.bytoken import by_token

Inputs = dict[str, torch.Tensor]
# nnsight says that it renames parts of the vision tower, at which no site is
pytestmark = pytest.mark.filterwarnings("ignore:.*has a submodule named 'output'")


@pytest.fixture(params=["kosmos-2", "kosmos-2.5"], scope="module")
def lens(request: pytest.FixtureRequest) -> Iterator[il.LatentModel]:
    with walk_checks._Double():  # its own masks do not fit into float64
        yield il.LatentModel(walk_checks.build(request.param), spec=walk_checks.SPEC)


def rows_of(lens: il.LatentModel) -> list[Inputs]:
    one, _ = walk_inputs.found_image_inputs(lens.model, 0)
    other, _ = walk_inputs.found_image_inputs(lens.model, 1)
    return [one, walk_inputs.lengthened(other, 3)]


def padded(lens: il.LatentModel) -> Inputs:
    """Both rows, with the id in the padding from which the class counts."""
    batch = walk_inputs.stacked(rows_of(lens))
    batch["input_ids"][batch["attention_mask"] == 0] = lens.model.config.text_config.pad_token_id
    return batch


def run_of(lens: il.LatentModel, inputs: Inputs) -> il.Run:
    return lens.run(inputs, latents=il.Force(2, at=1), max_new_tokens=7, keep_logits=True)


def test_a_prompt_is_read_as_the_class_reads_it(lens: il.LatentModel) -> None:
    """The class finds the positions of a padded prompt by itself; ours are those."""
    given = padded(lens)
    real = given["attention_mask"].bool()
    with torch.no_grad():
        wanted = lens.model(**given, use_cache=False).logits
        found = lens.run_with_hooks(given)
    torch.testing.assert_close(found[real], wanted[real], rtol=0, atol=1e-9)
    assert lens.behaviour.first_position == lens.model.config.text_config.pad_token_id + 1
    assert f"positions count from {lens.behaviour.first_position}" in str(lens.describe())


def test_a_run_is_that_of_stock_generate(lens: il.LatentModel) -> None:
    given = rows_of(lens)[0]
    stock = lens.model.generate(**given, max_new_tokens=6, do_sample=False)
    run = lens.run(given, max_new_tokens=6, latents=il.Skip())
    own = run.sequences
    assert torch.equal(own[:, -6:], stock[:, -6:])
    assert run.position_ids is not None
    first, n = lens.behaviour.first_position, own.shape[1] - 1
    assert run.position_ids[0].tolist() == list(range(first, first + n))


def test_reading_a_run_is_generating_it_and_padding_does_not_count(lens: il.LatentModel) -> None:
    together = run_of(lens, padded(lens))
    assert controls.path_gap(lens, together) < 1e-9
    for row, inputs in enumerate(rows_of(lens)):
        alone = run_of(lens, inputs)
        assert controls.path_gap(lens, alone) < 1e-9
        torch.testing.assert_close(together.latents[row], alone.latents[0], rtol=0, atol=1e-9)
        assert together.texts[row] == alone.texts[0]


def test_counted_from_elsewhere_it_shows(
    lens: il.LatentModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from imaginelens.hooks import bytoken

    given = rows_of(lens)[0]
    right = run_of(lens, given)
    monkeypatch.setattr(bytoken, "behind_padding", lambda model: 0)  # as if it counted from 0
    if lens.model.config.model_type == "kosmos-2":
        assert (run_of(lens, given).latents - right.latents).abs().max() > 1e-4
    else:  # its class counts by itself, and counts padding that the cache holds
        run = run_of(lens, padded(lens))
        assert (run.latents[0] - right.latents[0]).abs().max() > 1e-4


def test_images_under_a_mask_are_selected_and_edited(lens: il.LatentModel) -> None:
    given = padded(lens)
    tokens = lens.tokens(given)
    for row in range(2):
        mask = given["image_embeds_position_mask"][row]
        assert il.image.resolve(tokens, row).tolist() == torch.nonzero(mask)[:, 0].tolist()
    assert tokens.grids[0][0].rows == 0  # learned queries: no token shows a cell
    assert "learned queries look at the whole image" in str(lens.describe())
    with lens.edit(il.Zero(), at=il.image, site="vision_projector.hook_out") as landing:
        lens.run(given, max_new_tokens=2)
    assert len(landing.cells) == 32


def test_the_model_is_as_it_was(lens: il.LatentModel) -> None:
    before = sorted(vars(lens.model))
    with by_token(lens.model, {}):
        assert "prepare_inputs_for_generation" in vars(lens.model)
    with pytest.raises(ZeroDivisionError), by_token(lens.model, {}):
        raise ZeroDivisionError
    assert sorted(vars(lens.model)) == before
