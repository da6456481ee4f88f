"""Cards in notebooks: the numbers of the object, words that stay words, on any background."""

import base64
import io
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image
from view.reading import Node, read

import imaginelens as il
from imaginelens.hooks.landing import Landing
from imaginelens.hooks.tokens import Kind
from imaginelens.mediation.cells import Cell
from imaginelens.mediation.effects import DIFFERS
from imaginelens.mediation.outcomes import PotentialOutcomes
from imaginelens.view import result_cards, static
from imaginelens.view.colour import ColourScale

HOSTILE = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "‮txet", "nul\x00l", "</span>",
    "<s>", "<|latent|>", "' onmouseover='x",
]  # fmt: skip
ELEMENTS = {
    "document", "div", "b", "span", "bdi", "img", "table", "thead", "tbody", "tr", "th", "td",
    "pre",
}  # fmt: skip
ATTRIBUTES = {"style", "title", "alt", "src", "scope", "role", "aria-label"}
SMALL = 60_000


class Hostile:
    """A tokenizer whose every token is written to break a page."""

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(HOSTILE[i % len(HOSTILE)] for i in ids)


@pytest.fixture(scope="module")
def lens() -> Any:
    return il.load("latent-content")


@pytest.fixture(scope="module")
def task(lens: Any) -> Any:
    return lens.task(n=6, seed=0)


@pytest.fixture(scope="module")
def run(lens: Any, task: Any) -> il.Run:
    return lens.run(task.base)


@pytest.fixture(scope="module")
def landing(lens: Any, task: Any) -> Landing:
    donor = lens.run(task.source[0])
    with lens.edit(il.Swap(donor), at=il.latent[1], site="hook_latent") as landing:
        lens.run(task.base[0])
    return landing


@pytest.fixture(scope="module")
def probed(lens: Any) -> tuple[il.probes.ProbeResult, il.probes.ProbeMap]:
    states = il.probes.collect(lens, lens.task(n=60, seed=0), sites="hook_latent")
    return il.probes.fit_probe(states, kind="logistic"), il.probes.probe_map(states)


def effects(n: int = 30) -> il.Effects:
    """Mediated wholly, and by chance nothing else."""
    rng = np.random.default_rng(3)
    base, moved = rng.normal(0, 1, n), rng.normal(4, 1, n)
    noise = rng.normal(0, 0.1, (2, n))
    return PotentialOutcomes.from_arrays(
        y00=base, y11=base + moved, y10=base + noise[0], y01=base + moved + noise[1]
    ).effects()


def effect_map(cells: int = 4, n: int = 12, sign: float = 1.0, **options: Any) -> il.EffectMap:
    """One cell of size 3 in each site, at step 0."""
    coordinates = [
        Cell(site, None, f"latent[{step}]", None, ())
        for site in ("resid_post", "<s>")
        for step in range(cells // 2)
    ]
    after = np.random.default_rng(0).normal(0, 0.01, (len(coordinates), n))
    after[:: cells // 2] += sign * 3.0
    return il.EffectMap.from_arrays(
        cells=coordinates, before=np.zeros(n), after=after, metric="logit_diff", **options
    )


def hostile_run(run: il.Run) -> il.Run:
    return replace(
        run,
        tokens=replace(run.tokens, tokenizer=Hostile()),
        found_answers=tuple(HOSTILE[: len(run)]),
    )


def pixels(node: Node) -> np.ndarray:
    data = base64.b64decode(node["src"].partition("base64,")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def has(image: np.ndarray, colour: str) -> int:
    wanted = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
    return int((np.abs(image - wanted).max(-1) <= 8).sum())  # in 256 colours


@pytest.fixture(scope="module")
def shown(run: il.Run, landing: Landing, probed: Any) -> dict[str, Any]:
    """One of each, and one of each that means harm."""
    hostile = hostile_run(run)
    worst = Landing("<script>", HOSTILE[1], tuple(HOSTILE))
    named = replace(probed[0], label=HOSTILE[0], where=HOSTILE[1], notes=tuple(HOSTILE))
    return {
        "run": run, "tokens": run.tokens, "landing": landing, "effects": effects(),
        "map": effect_map(), "probe": probed[0], "probe map": probed[1],
        "hostile run": hostile, "hostile tokens": hostile.tokens, "hostile landing": worst,
        "hostile probe": named,
        "hostile map": replace(effect_map(edit=HOSTILE[0]), notes=tuple(HOSTILE)),
        "hostile probe map": replace(probed[1], label=HOSTILE[0], notes=tuple(HOSTILE)),
    }  # fmt: skip


KINDS = [
    "run", "tokens", "landing", "effects", "map", "probe", "probe map", "hostile run",
    "hostile tokens", "hostile landing", "hostile probe", "hostile map", "hostile probe map",
]  # fmt: skip


# ---- every card --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_is_well_formed_and_does_nothing(shown: dict[str, Any], kind: str) -> None:
    page = shown[kind]._repr_html_()
    card = read(page)  # tags match
    assert {node.tag for node in card.walk()} <= ELEMENTS
    assert {name for node in card.walk() for name in node.attributes} <= ATTRIBUTES
    assert all(node["src"].startswith("data:image/") for node in card.all("img"))
    assert all(node["alt"] for node in card.all("img"))
    assert not re.search("[\x00\u202e]", page)


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_is_small_and_the_terminal_has_words(shown: dict[str, Any], kind: str) -> None:
    assert len(shown[kind]._repr_html_()) < SMALL
    told = repr(shown[kind])
    assert 0 < len(told) < 4_000


@pytest.mark.parametrize("kind", KINDS)
def test_ink_comes_with_its_paper(shown: dict[str, Any], kind: str) -> None:
    """Else black would lie on a dark notebook: what names its colour names the ground below."""
    for node in read(shown[kind]._repr_html_()).walk():
        style = node.attributes.get("style") or ""
        if re.search(r"(^|;)color:", style):
            assert "background:" in style


def test_the_guards_above_can_fail() -> None:
    with pytest.raises(AssertionError):
        read("<b><i></b></i>")
    assert {node.tag for node in read("<script></script>").walk()} - ELEMENTS == {"script"}


@pytest.mark.parametrize("kind", ["hostile run", "hostile tokens"])
def test_what_a_model_writes_stays_words(shown: dict[str, Any], kind: str) -> None:
    card = read(shown[kind]._repr_html_())
    labels = [node.text for node in card.all("bdi")]
    for word in ("<s>", "<|latent|>", "</span>", "nul[U+0000]l", "[U+202E]txet"):
        assert word in labels
    assert any(label.startswith("<script>alert(1)") for label in labels)


# ---- runs and tokens ---------------------------------------------------------------------------


def test_a_run_shows_pictures_tokens_text_answer_and_trigger(run: il.Run, task: Any) -> None:
    card = read(run._repr_html_())
    assert str(run.trigger) in card.text
    assert [node["alt"] for node in card.all("img")] == [
        f"picture 0 of example {row}, 84 x 84 pixels" for row in range(3)
    ]
    for row in range(3):
        words = task.base[row]["text"]
        assert words in card.text
        assert words in run.tokens.asked(row)
        cells = {line.one("th").text: line.one("td").text for line in card.all("tr")[3 * row :][:3]}
        assert cells["wrote"] == run.texts[row]
        assert cells["answer"] == run.answers[row]
    assert "3 more examples" in card.text
    chips = card.all("span")[:20]
    assert sum(": image\n" in chip["title"] for chip in chips) == 1  # of example 0
    latents = [chip.text for chip in card.all("span") if "latent step" in chip["title"]]
    assert latents == ["z0", "z1"] * 3


def test_a_thumbnail_is_the_picture_of_its_example(run: il.Run, task: Any) -> None:
    """To within what JPEG loses; another example's picture is far off."""
    for row, node in enumerate(read(run._repr_html_()).all("img")):
        drawn = pixels(node)
        far = [
            np.abs(drawn - np.asarray(each["images"].convert("RGB")).astype(int)).mean()
            for each in task.base
        ]
        assert int(np.argmin(far)) == row
        assert far[row] < 20 < 80 < sorted(far)[1]


def test_what_was_asked_is_the_prompt_without_its_picture(run: il.Run) -> None:
    asked = run.tokens.asked(0)
    assert "image" not in asked
    assert "latent" not in asked
    assert run.tokens.text(0, 0, run.tokens.prompt_width) != asked


def test_a_row_without_an_answer_says_so(run: il.Run) -> None:
    lost = replace(run, found_answers=(None,) * len(run))
    assert read(lost._repr_html_()).text.count("(none found)") == 3
    assert "answer None" in repr(lost)


def test_the_terminal_says_what_was_asked_and_written(run: il.Run, task: Any) -> None:
    told = repr(run)
    assert task.base[0]["text"] in told
    assert "answer 'bar'" in told
    assert str(run.trigger) in told
    assert len(told.splitlines()) == 1 + 2 * 4 + 1
    assert "\u202e" not in repr(hostile_run(run))
    assert "\x00" not in repr(hostile_run(run))


def test_long_runs_and_batches_are_cut_and_say_so(run: il.Run) -> None:
    tokens = run.tokens
    wide = {
        name: np.repeat(getattr(tokens, name), 50, axis=1)
        for name in ("ids", "kind", "image", "cell", "box", "span", "step")
    }
    wide["kind"] = np.where(wide["kind"] == Kind.TEXT, Kind.LATENT, wide["kind"])
    long = replace(
        tokens, **{name: np.repeat(each, 20, axis=0) for name, each in wide.items()},
        tokenizer=Hostile(), grids=tokens.grids * 20, keys=tokens.keys * 20,
    )  # fmt: skip
    page = long._repr_html_()
    assert len(page) < SMALL
    assert "boxes …" in page
    assert "117 more examples" in page
    assert len(repr(long)) < 1_000


def test_large_pictures_become_small_ones(run: il.Run) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (3000, 2000, 3), dtype=np.uint8)
    pictures = ((Image.fromarray(noise),) * 5,) * len(run)
    page = replace(run, prompt=replace(run.prompt, pictures=pictures))._repr_html_()
    assert len(page) < SMALL
    assert read(page).text.count("and 3 pictures more") == 3


def test_a_run_whose_pictures_are_not_known_has_none(run: il.Run) -> None:
    blind = replace(run, prompt=replace(run.prompt, pictures=None))
    assert not read(blind._repr_html_()).all("img")


# ---- landings ----------------------------------------------------------------------------------


def test_a_landing_says_where_and_by_how_much(landing: Landing) -> None:
    card = read(landing._repr_html_())
    cells = {row.one("th").text: row.one("td").text for row in card.all("tr")}
    (column,) = landing.positions[0]
    assert cells["touched"] == f"1 cell in 1 row: column {column} of row 0" == landing.touched
    assert cells["relative change"] == f"{landing.relative_change:.4g} (mean)"
    assert landing.touched in repr(landing)


def test_flags_are_words_and_an_edit_that_never_fired_says_so() -> None:
    landing = Landing("Swap", "latent", ("hook_latent",))
    assert "none yet" in read(landing._repr_html_()).text
    landing.flags |= {3: "not_emitted", 5: "identical_donor"}
    text = read(landing._repr_html_()).text
    assert "not_emitted: had no such position3 (rows" in text
    assert "identical_donor: got a state equal to its own5 (rows" in text


def test_a_landing_on_many_cells_stays_small() -> None:
    landing = Landing("Swap", "latent", tuple(f"blocks.{i}.hook_resid_post" for i in range(80)))
    landing.cells += [
        (row, column, "x", 1.0) for row in range(400) for column in range(100, 350)
    ]  # fmt: skip
    landing.flags |= dict.fromkeys(range(400), "identical_donor")
    assert landing.touched.startswith("100000 cells in 400 rows: columns 100, 101, 102, 103, 104, ")
    assert landing.touched.endswith("105 and 244 more of row 2, 397 more rows")
    assert len(landing._repr_html_()) < 4_000
    assert "and 392 more" in landing._repr_html_()


# ---- effects -----------------------------------------------------------------------------------


def test_the_table_holds_the_estimates_and_whether_they_differ_from_0() -> None:
    found = effects()
    rows = {
        row.one("th").text: [cell.text for cell in row.all("td")]
        for row in read(found._repr_html_()).one("tbody").all("tr")
    }
    assert list(rows) == list(found.all)
    for name, estimate in found.all.items():
        value, interval, told = rows[name][:3]
        assert (value, interval) == (f"{estimate.value:.4g}", str(estimate.ci()))
        assert (told == DIFFERS) == (estimate.pvalue() < 0.05) == (0 not in estimate.ci())
    assert rows["tnie"][2] == DIFFERS  # all of it is mediated, and nothing is direct
    assert rows["pnde"][2] == "not told from 0"
    assert "differs from 0 at 5%, each by itself: te, tnie, pnie" in repr(found)


def test_swapped_arms_give_the_other_words() -> None:
    told = effects().worlds
    direct = PotentialOutcomes.from_arrays(
        y00=told.arms["y00"], y11=told.arms["y11"], y10=told.arms["y01"], y01=told.arms["y10"]
    ).effects()
    text = read(direct._repr_html_()).text
    assert text.index("pnde") < text.index(DIFFERS, text.index("pnde")) < text.index("tnde")


def test_too_few_examples_show_the_text() -> None:
    one = PotentialOutcomes.from_arrays(y00=[0.0], y11=[1.0], y10=[0.0], y01=[1.0]).effects()
    card = read(one._repr_html_())
    assert "no intervals" in card.one("pre").text
    assert not card.all("table")


# ---- maps --------------------------------------------------------------------------------------


def test_the_picture_has_the_colours_of_the_effects() -> None:
    blue, red = (ColourScale(1.0).colour(value) for value in (1.0, -1.0))
    up, down = (read(effect_map(sign=sign)._repr_html_()).one("img") for sign in (1.0, -1.0))
    assert has(pixels(up), blue) > 500 > 20 > has(pixels(up), red) - has(pixels(down), blue)
    assert has(pixels(down), red) > 500
    assert "2 position" in up["alt"]
    assert "3" in up["alt"]


def test_a_map_says_what_it_must_not_be_read_without() -> None:
    text = read(effect_map(n=1)._repr_html_()).text
    assert "single example" in text
    assert "no controls" in text
    assert "mean effect on logit_diff, denoise, free context" in text


def test_a_large_map_is_text_and_names_the_plot() -> None:
    found = effect_map(cells=4000, n=3)
    card = read(found._repr_html_())
    assert not card.all("img")
    assert "4000 cells: .plot() draws them" in card.text
    assert "..." in card.one("pre").text
    assert len(repr(found)) < 4_000


def test_a_probe_map_shows_its_picture_and_controls(shown: dict[str, Any]) -> None:
    card = read(shown["probe map"]._repr_html_())
    assert "shuffled labels" in card.one("img")["alt"]
    assert "white is chance" in card.text


def test_a_probe_says_its_verdict_beside_its_controls(shown: dict[str, Any]) -> None:
    result = shown["probe"]
    rows = [row.all("td") for row in read(result._repr_html_()).one("tbody").all("tr")]
    assert len(rows) == 1 + len(result.controls)
    assert rows[0][0].text.startswith(f"{result.score.value:.3f} [")
    assert result.verdict() in read(result._repr_html_()).one("b").text
    for name, number, _ in result.table():
        assert name in repr(result)
        assert number in repr(result)


# ---- what goes wrong is seen -------------------------------------------------------------------


def refuse(error: Exception) -> Callable[..., bytes]:
    def draw(*args: Any) -> bytes:
        raise error

    return draw


@pytest.mark.parametrize("kind", ["map", "probe map"])
def test_without_matplotlib_there_is_the_text(
    shown: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    card = read(shown[kind]._repr_html_())
    assert not card.all("img")
    assert card.one("pre").text.splitlines() == repr(shown[kind]).splitlines()
    assert "pip install 'imaginelens[notebook]'" in card.text


@pytest.mark.parametrize(
    "error", [ImportError("no", name="numpy.core"), ImportError("no"), ValueError("no")]
)
def test_any_other_error_is_raised(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "draw", refuse(error))
    with pytest.raises(type(error), match="no"):
        effect_map()._repr_html_()


def test_a_matplotlib_that_is_broken_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(static, "_MATPLOTLIB", "another")
    with pytest.raises(ImportError, match="halted"):
        effect_map()._repr_html_()


def test_a_notebook_shows_the_error_and_the_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any) -> str:
        raise ValueError("a card that fails")

    monkeypatch.setattr(result_cards, "map_card", broken)
    found = effect_map()
    shell = InteractiveShell()
    bundle, _ = shell.display_formatter.format(found)
    assert bundle["text/plain"] == repr(found)
    assert "text/html" not in bundle
    told = capsys.readouterr()
    assert "a card that fails" in told.out + told.err


def test_a_notebook_takes_the_card(run: il.Run) -> None:
    bundle, _ = InteractiveShell().display_formatter.format(run)
    assert bundle["text/html"] == run._repr_html_()
    assert bundle["text/plain"] == repr(run)
