"""From sites and positions to cells: every cell once, split as said, and refusals in a sentence."""

from collections import Counter
from functools import cache
from typing import Any

import planted
import pytest
import tiny

import imaginelens as il
from imaginelens.hooks.errors import HookNameError, InputError
from imaginelens.mediation.cells import Cell
from imaginelens.mediation.selecting import cells_of, split

PICTURE = tiny.image(40, 24, seed=0)  # 3 x 5 cells
PROMPT = tiny.prompt("qwen2_5_vl", "red?")
LAYERS, HEADS, KV_HEADS = 3, 4, 2


@cache
def seeing() -> tuple[il.LatentModel, il.Run]:
    model, processor = tiny.build("qwen2_5_vl")
    lens = il.LatentModel(model, processor, spec=False)
    return lens, lens.run(images=PICTURE, text=PROMPT, max_new_tokens=2)


@cache
def looping(kind: str = "chain") -> tuple[il.LatentModel, il.Run]:
    p = planted.planted(kind)
    return p.lens, p.lens.run(list(p.pairs.base))


def cells(
    of: tuple[il.LatentModel, il.Run] | None = None, **options: Any
) -> list[tuple[Cell, Any]]:
    lens, run = looping() if of is None else of
    return cells_of(lens, [run], **{"sites": "resid_post", "positions": il.latent, **options})


def test_a_short_name_is_every_layer_and_latents_are_their_steps() -> None:
    found = cells()
    steps = [(cell.layer, cell.position) for cell, _ in found]
    assert steps == [(layer, f"latent[{t}]") for layer in (0, 1) for t in range(3)]
    for cell, at in found:
        assert cell.sites == (f"blocks.{cell.layer}.hook_resid_post",)
        assert (cell.site, cell.head) == ("resid_post", None)
        assert repr(at) == cell.position


def test_every_cell_is_there_once() -> None:
    found = cells(sites=["resid_post", "z", "hook_latent"], positions=il.latent)
    assert max(Counter(cell for cell, _ in found).values()) == 1
    assert Counter(cell.site for cell, _ in found) == {"resid_post": 6, "z": 6, "hook_latent": 3}
    assert {cell.layer for cell, _ in found if cell.site == "hook_latent"} == {None}


def test_a_slice_and_a_span_of_latents_are_split_and_a_step_is_not() -> None:
    _, run = looping()
    assert list(map(repr, split([run], il.latent[1:]))) == ["latent[1]", "latent[2]"]
    assert list(map(repr, split([run], il.latent[-2:]))) == ["latent[1]", "latent[2]"]
    assert list(map(repr, split([run], il.span[0].latent[0:2]))) == [
        "span[0].latent[0]",
        "span[0].latent[1]",
    ]
    assert list(map(repr, split([run], il.latent[-1]))) == ["latent[-1]"]


def test_steps_are_as_many_as_the_longest_run_has() -> None:
    lens, run = looping()
    short = lens.run(planted.planted("chain").pairs.base[0], latents=il.Force(1))
    assert len(split([short], il.latent)) == 1
    assert len(split([short, run], il.latent)) == 3
    with pytest.raises(InputError, match=r"latent\[-1:\] counts from the end.*1 to 3 steps"):
        split([short, run], il.latent[-1:])


def test_an_image_is_split_into_the_cells_of_its_grid() -> None:
    _, run = seeing()
    found = split([run], il.image)
    assert list(map(repr, found)) == [f"image[0][{r}, {c}]" for r in range(3) for c in range(5)]
    columns = [int(c) for at in found for c in at.resolve(run.tokens, 0)]
    assert columns == il.image.resolve(run.tokens, 0).tolist()
    assert list(map(repr, split([run], il.image[0][1:, 3:]))) == [
        "image[0][1, 3]",
        "image[0][1, 4]",
        "image[0][2, 3]",
        "image[0][2, 4]",
    ]


def test_other_selectors_and_lists_stay_whole() -> None:
    _, run = looping()
    for at in (il.before_answer, il.last_prompt, il.text.find("is"), il.latent | il.markers):
        assert split([run], at) == [at]
    assert split([run], [il.latent, il.last_prompt]) == [il.latent, il.last_prompt]


def test_heads_are_cells_of_their_own() -> None:
    for name, number in (("z", HEADS), ("k", KV_HEADS), ("rot_k", KV_HEADS), ("rot_q", HEADS)):
        found = cells(seeing(), sites=name, positions=il.last_prompt, heads=True)
        assert [cell.head for cell, _ in found] == list(range(number)) * LAYERS


def test_windows_start_at_every_layer_they_can() -> None:
    found = cells(seeing(), sites="attn_out", positions=il.last_prompt, window=2)
    assert [(cell.layer, cell.sites) for cell, _ in found] == [
        (layer, (f"blocks.{layer}.hook_attn_out", f"blocks.{layer + 1}.hook_attn_out"))
        for layer in range(LAYERS - 1)
    ]
    assert len(cells(seeing(), sites="attn_out", positions=il.last_prompt, window=LAYERS)) == 1


def test_layers_that_are_no_neighbours_make_no_window() -> None:
    apart = ["blocks.0.hook_attn_out", "blocks.2.hook_attn_out"]
    with pytest.raises(InputError, match=r"no 2 neighbouring layers .*which is in 0, 2"):
        cells(seeing(), sites=apart, positions=il.last_prompt, window=2)


def test_what_cannot_be_selected_is_refused_in_a_sentence() -> None:
    for options, message in (
        ({"window": 0}, "window is 0"),
        ({"window": 4}, "no 4 neighbouring layers"),
        ({"sites": "hook_latent", "window": 2}, "'hook_latent' is in no layer"),
        ({"heads": True}, "no heads; leave heads out"),
        ({"positions": []}, "positions is empty"),
        ({"positions": [il.latent[0], il.latent[0]]}, r"holds latent\[0\] twice"),
        ({"positions": ["latent"]}, "positions holds 'latent'"),
        ({"positions": il.latent[7]}, r"no run has a position at latent\[7\]"),
        ({"positions": il.latent[5:]}, r"no run has a position at latent\[5:\]"),
        ({"positions": il.image}, "no run has a position at image"),
    ):
        with pytest.raises(InputError, match=message):
            cells(**options)
    with pytest.raises(InputError, match="none has a latent step"):
        cells(seeing(), positions=il.latent)
    with pytest.raises(InputError, match="holds patches, not tokens"):
        cells(seeing(), sites="vision_encoder.*", positions=il.image)
    with pytest.raises(HookNameError, match="no site matches"):
        cells(sites="resid_pots")
    with pytest.raises(InputError, match="no runs were given"):
        cells_of(looping()[0], [], sites="resid_post", positions=il.latent)


def test_images_of_different_grids_are_not_split() -> None:
    lens, run = seeing()
    other = lens.run(images=tiny.image(24, 24, seed=1), text=PROMPT, max_new_tokens=2)
    with pytest.raises(InputError, match="2 different grids"):
        split([run, other], il.image)
    assert split([run, other], [il.image]) == [il.image]
