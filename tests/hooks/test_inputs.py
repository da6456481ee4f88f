"""do(X): each edit changes exactly the pixels or words it says, and a model sees just that."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

import imaginelens as il
from imaginelens.hooks.inputs import Example, content_key, edit_inputs
from imaginelens.organisms import hunt


def picture(width: int = 24, height: int = 16, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def flat(colour: tuple[int, int, int], size: tuple[int, int] = (24, 16)) -> Image.Image:
    return Image.new("RGB", size, colour)


def example(seed: int = 0, **others: Any) -> dict[str, Any]:
    return {"images": picture(seed=seed), "text": f"question {seed}", **others}


def applied(edit: il.InputEdit, one: Example, other: Example | None = None, seed: int = 0) -> Any:
    return edit.apply(one, other, np.random.default_rng(seed))


def pixels(edited: Example) -> np.ndarray:
    return np.asarray(edited["images"])


BOX = (3, 2, 11, 9)
EDITS = [
    il.SwapInstance(),
    il.SwapImage(),
    il.SwapText(),
    il.BlankImage(),
    il.BlankImage((9, 8, 7)),
    il.BlurImage(2.0),
    il.NoiseImage(20.0),
    il.OccludeCells([(0, 1), (1, 2)], grid=(2, 3)),
    il.OccludeCells(boxes=[BOX]),
    il.CropImage(BOX),
    il.PasteRegion(BOX),
]
PICTURE_EDITS = EDITS[3:]


# ---- every edit ------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", EDITS, ids=repr)
def test_an_edit_is_a_value_that_can_be_written_again_and_changes_nothing_in_place(
    edit: il.InputEdit,
) -> None:
    one, other = example(0, id=3), example(1, id=4)
    before = [content_key(one), content_key(other), dict(one), dict(other)]
    edited = applied(edit, one, other)
    assert [content_key(one), content_key(other), one, other] == before
    assert content_key(edited) != content_key(one)
    assert edited is not one
    assert edited is not other
    assert eval(repr(edit), vars(il)) == edit
    assert hash(edit) == hash(dataclasses.replace(edit))
    assert edit != il.BlurImage(99.0)


def test_only_what_an_edit_names_comes_from_the_other_input() -> None:
    one, other = example(0), {"images": [picture(8, 8, 5)] * 2, "text": "other", "id": 2}
    found = {edit: applied(edit, one, other) for edit in EDITS[:3]}
    assert found[il.SwapInstance()] == other
    assert found[il.SwapImage()] == {"images": other["images"], "text": "question 0"}
    assert found[il.SwapText()] == {"images": one["images"], "text": "other"}


@pytest.mark.parametrize("edit", EDITS[1:], ids=repr)
def test_what_an_example_says_of_itself_does_not_outlive_the_edit(edit: il.InputEdit) -> None:
    """An organism's hunt, or an answer, would speak of the unedited input."""
    one = example(0, id=3, hunt="the whole board", answer="ring")
    assert set(applied(edit, one, example(1))) == {"images", "text", "id"}


def test_the_whole_other_input_keeps_what_it_says_of_itself() -> None:
    other = example(1, hunt="its board", answer="ring")
    assert applied(il.SwapInstance(), example(0, hunt="mine"), other) == other


@pytest.mark.parametrize("edit", PICTURE_EDITS, ids=repr)
def test_pictures_of_every_mode_are_edited_as_the_model_sees_them(edit: il.InputEdit) -> None:
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        given = picture().convert(mode)
        other = example(1)
        one = applied(edit, {"images": given, "text": "x"}, other)
        same = applied(edit, {"images": given.convert("RGB"), "text": "x"}, other)
        assert one["images"].mode == "RGB"
        np.testing.assert_array_equal(pixels(one), pixels(same))


@pytest.mark.parametrize("edit", PICTURE_EDITS, ids=repr)
def test_one_picture_of_several_can_be_chosen_and_a_list_stays_a_list(edit: Any) -> None:
    several = {"images": [picture(seed=0), picture(seed=1)], "text": "x"}
    other = {"images": [picture(seed=2), picture(seed=3)], "text": "y"}
    both = applied(edit, several, other)["images"]
    second = applied(dataclasses.replace(edit, image=1), several, other)["images"]
    assert [list, list] == [type(both), type(second)]
    assert all(new != old for new, old in zip(both, several["images"], strict=True))
    assert second[0] == several["images"][0]
    assert second[1] != several["images"][1]
    single = applied(edit, {**several, "images": several["images"][:1]}, other)["images"]
    assert [p.tobytes() for p in single] == [both[0].tobytes()]


def test_equal_content_has_equal_keys_and_other_content_has_not() -> None:
    one = {"images": picture(), "text": "x"}
    others = [
        {"images": picture(seed=1), "text": "x"},
        {"images": picture(), "text": "y"},
        {"images": None, "text": "x"},
        {"images": [picture()] * 2, "text": "x"},
        {"images": Image.frombytes("RGB", (16, 24), picture().tobytes()), "text": "x"},  # its shape
    ]
    assert content_key({"text": "x", "images": [picture()], "id": 1}) == content_key(one)
    assert len({content_key(other) for other in (one, *others)}) == 6


# ---- pixels ----------------------------------------------------------------------------------


def test_a_blank_picture_has_one_colour_the_mean_or_the_one_given() -> None:
    one = example(0)
    blank = pixels(applied(il.BlankImage(), one))
    assert blank.shape == pixels(one).shape
    assert blank.reshape(-1, 3).var(0).tolist() == [0, 0, 0]
    np.testing.assert_array_equal(blank[0, 0], np.rint(pixels(one).mean((0, 1))))
    given = pixels(applied(il.BlankImage((1, 2, 250)), one))
    assert (given == (1, 2, 250)).all()


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (13, 77, 201)])
@pytest.mark.parametrize("radius", [0.5, 3.0, 40.0])
def test_the_blur_of_a_constant_picture_is_itself(
    colour: tuple[int, int, int], radius: float
) -> None:
    one = {"images": flat(colour), "text": "x"}
    assert applied(il.BlurImage(radius), one)["images"] == one["images"]


def test_a_blurred_point_spreads_like_a_gaussian_of_that_standard_deviation() -> None:
    point = np.zeros((101, 101, 3), dtype=np.uint8)
    point[40:61, 40:61] = 255  # wide enough for the levels of grey to hold the tails
    blurred = pixels(applied(il.BlurImage(6.0), {"images": Image.fromarray(point), "text": "x"}))
    along = blurred[50, :, 0] / 255
    x = np.arange(101)
    wanted = stats.norm.cdf(x, 39.5, 6.0) - stats.norm.cdf(x, 60.5, 6.0)
    wanted = wanted * (stats.norm.cdf(50, 39.5, 6.0) - stats.norm.cdf(50, 60.5, 6.0))
    assert abs(along - wanted).max() < 0.02


def test_noise_has_the_scale_asked_for_and_ends_at_black_and_white() -> None:
    grey = {"images": flat((128, 128, 128), (200, 200)), "text": "x"}
    moved = pixels(applied(il.NoiseImage(10.0), grey)).astype(float) - 128
    n = moved.size
    assert abs(moved.mean()) < 4 * 10 / n**0.5
    # rounding to whole values adds a variance of 1/12
    assert abs(moved.var() / (100 + 1 / 12) - 1) < 4 * (2 / n) ** 0.5
    white = pixels(applied(il.NoiseImage(10.0), {"images": flat((255,) * 3), "text": "x"}))
    assert white.max() == 255
    assert 0.4 < (white == 255).mean() < 0.6  # what goes beyond is cut, not wrapped


def test_noise_has_a_seed_and_does_not_depend_on_the_batch() -> None:
    examples = [example(seed) for seed in range(4)]

    def noisy(rows: list[int], seed: int = 0, scale: float = 20.0) -> list[np.ndarray]:
        given = [examples[i] for i in rows]
        return [pixels(e) for e in edit_inputs(il.NoiseImage(scale), given, given, seed=seed)[0]]

    together = noisy([0, 1, 2, 3])
    for row, alone in enumerate(noisy([3, 1, 0, 2])):
        np.testing.assert_array_equal(alone, together[[3, 1, 0, 2][row]])
    np.testing.assert_array_equal(noisy([2])[0], together[2])
    assert (noisy([2], seed=1)[0] != together[2]).any()
    noise = [found.astype(int) - pixels(one) for found, one in zip(together, examples, strict=True)]
    assert (noise[0] != noise[1]).any()
    # the same draw at another strength, so that a sweep over scales compares like with like
    stronger = noisy([2], scale=40.0)[0].astype(int) - pixels(examples[2])
    inside = (abs(noise[2]) > 3) & (pixels(examples[2]) > 90) & (pixels(examples[2]) < 160)
    assert (np.sign(stronger) == np.sign(noise[2]))[inside].all()


def test_occlusion_changes_exactly_the_box() -> None:
    one = example(0)
    edited = pixels(applied(il.OccludeCells(boxes=[BOX], colour=(7, 8, 9)), one))
    inside = np.zeros(edited.shape[:2], dtype=bool)
    inside[2:9, 3:11] = True
    assert (edited[inside] == (7, 8, 9)).all()
    np.testing.assert_array_equal(edited[~inside], pixels(one)[~inside])
    mean = pixels(applied(il.OccludeCells(boxes=[BOX]), one))
    assert (mean[inside] == np.rint(pixels(one).mean((0, 1)))).all()


@pytest.mark.parametrize("size", [(24, 16), (25, 17), (7, 5)])
@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 7)])
def test_the_cells_of_a_grid_are_the_picture_without_gap_or_overlap(
    size: tuple[int, int], grid: tuple[int, int]
) -> None:
    painted = np.zeros(size[::-1], dtype=int)
    for r in range(grid[0]):
        for c in range(grid[1]):
            edit = il.OccludeCells([(r, c)], grid=grid, colour=(255, 255, 255))
            edited = pixels(applied(edit, {"images": flat((0, 0, 0), size), "text": "x"}))
            painted += edited[..., 0] == 255
    assert (painted == 1).all()


def test_cells_equal_their_boxes_also_those_of_a_model() -> None:
    lens = il.load("latent-content")
    one = lens.task(n=1).base[0]
    tokens = lens.run(one).tokens
    column = int(il.image[0][1, 2].resolve(tokens, 0)[0])
    box = tokens.token(0, column).box
    assert box is not None
    by_cell = applied(il.OccludeCells([(1, 2)], grid=(3, 3)), one)
    assert by_cell["images"] == applied(il.OccludeCells(boxes=[box]), one)["images"]
    assert (pixels(by_cell) != pixels(one)).any(-1)[28:56, 56:].mean() > 0.9


def test_crop_and_paste_move_exactly_the_pixels_of_the_box() -> None:
    one, other = example(0), {"images": picture(30, 12, seed=1), "text": "y"}
    crop = applied(il.CropImage(BOX), one)["images"]
    assert crop == one["images"].crop(BOX)
    pasted = applied(il.PasteRegion(BOX), one, other)["images"]
    wanted = one["images"].copy()
    wanted.paste(other["images"].crop(BOX), BOX[:2])
    assert pasted == wanted
    assert pasted.crop(BOX) == other["images"].crop(BOX)
    # pasting back undoes it
    assert (
        applied(il.PasteRegion(BOX), {"images": pasted, "text": "x"}, one)["images"]
        == (one["images"])
    )


def test_boxes_are_rounded_to_whole_pixels() -> None:
    one = example(0)
    assert applied(il.CropImage((2.6, 1.5, 11.4, 8.51)), one)["images"] == (
        one["images"].crop((3, 2, 11, 9))
    )


# ---- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: il.BlurImage(0), "BlurImage got radius=0, expected a number above 0"),
        (lambda: il.BlurImage(float("nan")), "radius=nan, expected a number above 0"),
        (lambda: il.NoiseImage(float("inf")), "NoiseImage got scale=inf, expected"),
        (
            lambda: il.BlankImage((0, 0, 256)),
            r"colour=\(0, 0, 256\), expected \(red, green, blue\)",
        ),
        (lambda: il.CropImage((0, 0, 1)), r"a box is \(0, 0, 1\), expected \(left, top, right, bo"),
        (lambda: il.CropImage((-1, 0, 5, 9)), r"a box is \(-1, 0, 5, 9\), expected"),
        (lambda: il.CropImage((5, 0, 5, 9)), r"a box is \(5, 0, 5, 9\), expected"),
        (lambda: il.PasteRegion((0, 9, 5, 0)), "with left < right and top < bottom"),
        (lambda: il.PasteRegion((0, 0, 1, float("nan"))), "a box is .*nan.*, expected"),
        (lambda: il.OccludeCells(), "got 0 cells, the grid None and 0 boxes; give cells="),
        (lambda: il.OccludeCells([(0, 0)]), "got 1 cells, the grid None and 0 boxes"),
        (lambda: il.OccludeCells(grid=(2, 2)), r"got 0 cells, the grid \(2, 2\) and 0 boxes"),
        (lambda: il.OccludeCells([(0, 0)], (2, 2), [BOX]), r"1 cells, the grid \(2, 2\) and 1 b"),
        (lambda: il.OccludeCells(grid=(2, 2), boxes=[BOX]), r"0 cells, the grid \(2, 2\) and 1"),
        (lambda: il.OccludeCells([(0, 2)], (2, 2)), r"the cell \(0, 2\), which is outside of its"),
        (lambda: il.OccludeCells([(-1, 0)], (2, 2)), r"the cell \(-1, 0\), which is outside"),
    ],
)
def test_an_edit_that_means_nothing_is_refused_when_it_is_made(make: Any, words: str) -> None:
    with pytest.raises(il.InputError, match=words):
        make()


OTHER = example(1)


@pytest.mark.parametrize(
    ("edit", "one", "other", "words"),
    [
        (il.BlurImage(2), {"text": "x"}, OTHER, "example 1: it has no picture; leave such"),
        (il.BlurImage(2), {"images": [], "text": "x"}, OTHER, "it has no picture"),
        (il.SwapImage(), example(), {"text": "x"}, "the other input has no picture"),
        (il.PasteRegion(BOX), example(), {"text": "x"}, "the other input has no picture"),
        (
            il.BlurImage(2),
            {"images": "a.png", "text": "x"},
            OTHER,
            "is a str, expected a PIL image",
        ),
        (il.SwapText(), {"images": None}, OTHER, r"it is \['images'\], expected \{'images'"),
        (il.SwapText(), example(), {"images": None}, r"the other input is \['images'\], expected"),
        (il.SwapText(), {"input_ids": torch.ones(1)}, OTHER, r"it is \['input_ids'\], expected"),
        (il.SwapText(), example(), "text", "the other input is 'text', expected"),
        (
            il.CropImage((0, 0, 25, 9)),
            example(),
            OTHER,
            r"= \(0, 0, 25, 9\) is not inside of its pic",
        ),
        (
            il.PasteRegion(BOX),
            example(),
            {"images": picture(8, 8), "text": "x"},
            "is not inside of the other input's picture of 8 x 8 pixels",
        ),
        (
            il.PasteRegion(BOX),
            {"images": [picture()] * 2, "text": "x"},
            OTHER,
            "it has a picture number 1 and the other input only 1; choose one that both have",
        ),
        (il.BlurImage(2, image=1), example(), OTHER, "image=1 was asked for, counted from 0, and"),
        (
            il.OccludeCells([(0, 0)], grid=(1, 100)),
            example(),
            OTHER,
            "or covers no pixel of it",
        ),
    ],
)
def test_an_input_that_cannot_be_edited_is_named(
    edit: il.InputEdit, one: Any, other: Any, words: str
) -> None:
    fine = [{"images": [picture(200, 50, seed)] * 2, "text": str(seed)} for seed in (0, 1)]
    with pytest.raises(il.InputError, match=words) as error:
        edit_inputs(edit, [fine[0], one], [fine[1], other], seed=0)
    assert "\n" not in str(error.value)
    assert f"{edit!r} cannot edit example 1: " in str(error.value)


def test_a_torn_picture_is_named(tmp_path: Any) -> None:
    picture(64, 64).save(tmp_path / "torn.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "torn.png").read_bytes()[:500])
    with (
        Image.open(tmp_path / "torn.png") as torn,
        pytest.raises(il.InputError, match="example 0: one of its images cannot be decoded"),
    ):
        edit_inputs(il.BlankImage(), [{"images": torn, "text": "x"}], [OTHER], seed=0)


def test_an_edit_that_needs_another_input_says_so() -> None:
    for edit in (il.SwapInstance(), il.SwapImage(), il.SwapText(), il.PasteRegion(BOX)):
        with pytest.raises(il.InputError, match="takes something from another input, and none"):
            applied(edit, example())


def test_states_are_not_edited_here() -> None:
    with pytest.raises(
        il.InputError, match=r"Zero\(\) is no edit of inputs; give one such as il.B"
    ):
        edit_inputs(il.Zero(), [example()], [OTHER], seed=0)


def test_an_edit_that_changed_nothing_is_an_error_and_some_rows_are_counted() -> None:
    constant, varied = {"images": flat((3, 3, 3)), "text": "x"}, example(0)
    with pytest.raises(il.EditTouchedNothing, match="left all 2 inputs as they were"):
        edit_inputs(il.BlurImage(2.0), [constant] * 2, [OTHER] * 2, seed=0)
    _, line = edit_inputs(il.BlurImage(2.0), [constant, varied], [OTHER] * 2, seed=5)
    assert line == "BlurImage(radius=2.0), seed 5, 1 of 2 unchanged"
    assert json.loads(json.dumps(line)) == line


# ---- what a model makes of it ----------------------------------------------------------------


@pytest.fixture(scope="module")
def lens() -> il.Organism:
    return il.load("latent-content", dtype=torch.float64)


def right(answers: Any, wanted: Any) -> float:
    return float(np.mean([a == w for a, w in zip(answers, wanted, strict=True)]))


def test_another_picture_gives_the_answer_of_its_board_to_the_old_question(
    lens: il.Organism,
) -> None:
    task = lens.task(n=16, seed=5)
    symbolic = [dataclasses.replace(s["hunt"], start=b["hunt"].start).answer for b, s in task]
    swapped = lens.run(task.do(il.SwapImage()).source)
    assert right(swapped.answers, symbolic) >= 0.9
    assert right(swapped.answers, task.base_answers) <= 0.4
    assert right(symbolic, task.base_answers) <= 0.4


def test_another_question_gives_the_answer_that_the_old_board_has_for_it(
    lens: il.Organism,
) -> None:
    def symbolic(base: Example, source: Example) -> str | None:
        answer = dataclasses.replace(base["hunt"], start=source["text"].split()[1]).answer
        return None if answer == base["hunt"].answer else answer

    pairs = lens.task(n=16, seed=5).do(il.SwapText(), answers=symbolic)
    known = pairs.select([i for i, answer in enumerate(pairs.source_answers) if answer])
    assert 4 <= len(known) < 16
    found = lens.run(known.source).answers
    assert right(found, known.source_answers) >= 0.9
    assert right(found, known.base_answers) == 0.0


def test_a_blank_or_blurred_picture_leaves_chance_and_a_little_noise_everything(
    lens: il.Organism,
) -> None:
    task = lens.task(n=16, seed=5)
    for edit in (il.BlankImage(), il.BlurImage(8.0), il.NoiseImage(200.0)):
        found = lens.run(task.do(edit).source).answers
        assert right(found, task.base_answers) <= 0.45, edit  # 1/6 by chance; P(> 7 of 16) = 0.002
    for edit in (il.NoiseImage(5.0), il.BlurImage(0.5)):
        found = lens.run(task.do(edit).source).answers
        assert right(found, task.base_answers) >= 0.9, edit


def test_the_answer_lives_in_the_card_that_the_path_ends_at(lens: il.Organism) -> None:
    """Cells and boxes mean the place they say: the visited card decides, the others do not."""
    task = lens.task(n=16, seed=5)
    rng = np.random.default_rng(0)
    pasted, elsewhere, occluded, wanted = [], [], [], []
    for one in task.base:
        game = one["hunt"]
        last = game.names.index(game.path[-1])
        free = int(rng.choice([k for k in range(9) if game.names[k] not in game.path]))
        shapes = tuple(hunt.SHAPES[(hunt.SHAPES.index(s) + 1) % 6] for s in game.shapes)
        turned = dataclasses.replace(game, shapes=shapes)  # every card has its next shape
        other = {"images": turned.image(), "text": game.question}
        wanted.append(turned.answer)
        pasted.append(applied(il.PasteRegion(_card(last)), one, other))
        elsewhere.append(applied(il.PasteRegion(_card(free)), one, other))
        occluded.append(applied(il.OccludeCells([divmod(free, 3)], grid=(3, 3)), one))
    assert right(lens.run(pasted).answers, wanted) >= 0.9
    assert right(lens.run(elsewhere).answers, task.base_answers) >= 0.9
    assert right(lens.run(occluded).answers, task.base_answers) >= 0.8


def _card(k: int) -> tuple[int, int, int, int]:
    row, col = divmod(k, 3)
    return 28 * col, 28 * row, 28 * col + 28, 28 * row + 28
