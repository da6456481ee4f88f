"""The demo finds what each organism was built to do, by its numbers alone, and shows the numbers.

19 pairs of this seed are enough: 16 of them are decisive, the fewest that can settle a verdict. To
save time the map has one row here and the table one edit; a slow test runs the demo as it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from view.reading import Node, read

import imaginelens as il
from imaginelens.hooks import Edit, Run
from imaginelens.organisms import Organism, load
from imaginelens.view import demo, parts

PAIRS, SEED = 19, 336
IMPOSTOR, NONE = "impostor", "\N{EN DASH}"
LOADS = {"script", "link", "iframe", "frame", "object", "embed", "base", "a", "form", "audio"}
ADDRESS = {"src", "href", "srcset", "action", "data", "poster", "xlink:href"}
MECHANISM = {
    "latent-content": "content",
    "latent-pointer": "pointer",
    "latent-ignored": "ignored",
    "latent-ignored-aligned": "ignored",
}


@dataclass
class Demo:
    """What one run of the demo wrote, announced and measured."""

    path: Path
    page: Node
    steps: int
    ticks: list[str] = field(default_factory=list)
    found: list[il.Interchange] = field(default_factory=list)

    def article(self, name: str) -> Node:
        return self.page.all("article")[[*MECHANISM, IMPOSTOR].index(name)]

    def line(self, name: str) -> Node:
        rows = self.page.one("section", "overview").one("tbody").all("tr")
        return rows[[*MECHANISM, IMPOSTOR].index(name)]


def load_impostor(name: str) -> Organism:
    """The organisms, and one more: the pointer's weights under the name of the content organism."""
    lens = load("latent-pointer" if name == IMPOSTOR else name)
    assert isinstance(lens, Organism)
    lens.name = "latent-content" if name == IMPOSTOR else name
    return lens


def one_edit(reference: Run | None) -> dict[str, Edit]:
    return {"Mean of other runs": il.Mean(reference)}


@contextmanager
def shortened() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "map_sites", lambda lens: ["hook_latent"])
        patch.setattr(parts, "latent_edits", one_edit)
        patch.setattr(demo, "LAYERS", 0)
        patch.setattr(demo, "load", load_impostor)
        yield patch


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    ticks, found = [], []

    def kept(*args, **options) -> il.Interchange:
        found.append(il.interchange(*args, **options))
        return found[-1]

    with shortened() as patch:
        patch.setattr(demo, "ORGANISMS", (*demo.ORGANISMS, IMPOSTOR))
        patch.setattr(demo, "interchange", kept)
        folder = tmp_path_factory.mktemp("demo")
        path = demo.run_demo(folder, n=PAIRS, seed=SEED, tick=ticks.append)
        steps = demo.steps()
    return Demo(path, read(path.read_text("utf-8")), steps, ticks, found)


def test_it_studies_the_four(shown: Demo) -> None:
    assert demo.ORGANISMS == tuple(MECHANISM)
    names = [article.one("h2").text for article in shown.page.all("article")]
    assert names == [*MECHANISM, "latent-content"]


def test_every_step_is_announced(shown: Demo) -> None:
    assert len(shown.ticks) == shown.steps == 5 * (4 + 2 + 1)
    ours = shown.ticks[: 4 * 7]
    assert len(set(ours)) == len(ours)


@pytest.mark.parametrize("name", MECHANISM)
def test_steps_are_counted_for_organisms_of_this_shape(name: str) -> None:
    lens = load_impostor(name)
    assert lens.card["latent_steps"] == demo.LATENT_STEPS
    assert len(parts.map_sites(lens)) == 1 + demo.LAYERS == 1 + len(lens.structure.blocks)


@pytest.mark.slow
def test_the_demo_as_it_is(tmp_path: Path) -> None:
    ticks: list[str] = []
    path = demo.run_demo(tmp_path, tick=ticks.append)
    assert len(set(ticks)) == len(ticks) == demo.steps() == 4 * (4 + 8 + 7)
    page = read(path.read_text("utf-8"))
    assert path.stat().st_size < 600_000
    assert not page.all("li", "fail")
    headlines = [article.one("p", "headline").text for article in page.all("article")]
    assert [text.rpartition("(")[2] for text in headlines] == [f"{m})." for m in MECHANISM.values()]


def test_the_page_is_one_small_file_that_needs_nothing(shown: Demo) -> None:
    assert [path.name for path in shown.path.parent.iterdir()] == ["report.html"]
    assert shown.path.stat().st_size < 500_000
    assert not [node for node in shown.page.walk() if node.tag in LOADS]
    addresses = [node[name] for node in shown.page.walk() for name in ADDRESS & {*node.attributes}]
    assert addresses
    assert not [address for address in addresses if not address.startswith("data:image/")]
    text = shown.path.read_text("utf-8")
    assert "://" not in text
    assert "url(" not in text


def test_what_was_found_is_said_before_the_first_table(shown: Demo) -> None:
    before, table, _ = shown.path.read_text("utf-8").partition("<table")
    assert table
    opening = [node.text for node in shown.page.one("ul", "verdicts").all("p")]
    for article in shown.page.all("article"):
        for part in ("headline", "detail"):
            sentence = article.one("p", part).text
            assert sentence in opening
            assert sentence in before
    assert len(opening) == 3 * 5


@pytest.mark.parametrize("name", MECHANISM)
def test_the_sentence_names_the_mechanism(shown: Demo, name: str) -> None:
    headline = shown.article(name).one("p", "headline").text
    assert f"({MECHANISM[name]})" in headline
    assert ("look right" in headline) == (name == "latent-ignored-aligned")
    assert ("makes no use" in headline) == (MECHANISM[name] == "ignored")
    assert "100% [81%, 100%] of 16 decisive swaps" in shown.article(name).one("p", "detail").text


def test_another_model_under_that_name_gets_another_sentence(shown: Demo) -> None:
    truth, lie = (shown.article(name).one("p", "headline") for name in ("latent-content", IMPOSTOR))
    assert "(content)" in truth.text
    assert "(pointer)" in lie.text
    assert lie.text == shown.article("latent-pointer").one("p", "headline").text


@pytest.mark.parametrize("index", range(5))
def test_the_shares_are_those_of_the_interchange(shown: Demo, index: int) -> None:
    found = shown.found[index]
    table = shown.page.all("article")[index].one("section", "swap")
    rows = table.one("tbody").all("tr")
    names = [row.one("bdi").text for row in rows]
    assert names == [*found.predictions, "other"]
    for row, share in zip(rows, found.shares().values(), strict=True):
        cell = row.all("td")[-1]
        assert float(cell["data-value"]) == share.value
        assert (float(cell["data-low"]), float(cell["data-high"])) == (share.low, share.high)
        assert int(cell["data-n"]) == share.n == len(found.decisive)
    assert [row.one("bdi").text for row in rows if "winner" in row.classes] == [found.winner()]
    assert f"Decisive: {len(found.decisive)} of {PAIRS} pairs" in table.text


@pytest.mark.parametrize("name", MECHANISM)
def test_the_pair_shown_is_decisive_and_the_same_everywhere(shown: Demo, name: str) -> None:
    found, article = shown.found[list(MECHANISM).index(name)], shown.article(name)
    i = found.decisive[0]
    rows = article.one("section", "swap").one("tbody").all("tr")
    predicted = [row.one("td").text.removesuffix(" ✓") for row in rows]
    assert predicted == [*(answers[i] for answers in found.predictions.values()), NONE]
    ticked = [row.one("bdi").text for row in rows if row.one("td").text.endswith("✓")]
    assert ticked == [MECHANISM[name]]
    assert article.one("p", "after").text.endswith(f" {found.answers[i]}")
    answers = [line.one("b").text for line in article.all("span", "answer-line")]
    assert answers == [found.predictions["ignored"][i], found.predictions["content"][i]]
    assert {cell["data-before"] for cell in article.all("g", "cell")} == {answers[0]}
    assert article.all("li", "answer")[0].text == answers[0]


@pytest.mark.parametrize("name", MECHANISM)
def test_the_overview_says_the_same_as_the_study(shown: Demo, name: str) -> None:
    line, article = shown.line(name), shown.article(name)
    drop, denoised, alike, swap = line.all("td")
    assert line.one("th").text == name
    assert swap.one("b").text == MECHANISM[name]
    numbers = [cell for cell in article.one("dl", "key-numbers").all("dd") if cell.attributes]
    kept = [cell["data-value"] for cell in numbers if "data-value" in cell.attributes]
    assert [cell["data-value"] for cell in (drop, denoised, alike)] == kept
    edited = article.one("section", "do-z").one("tbody").all("tr")
    accuracies = [float(row.one("td")["data-value"]) for row in edited]
    assert float(drop["data-value"]) == pytest.approx(accuracies[0] - min(accuracies))


def test_the_numbers_are_those_of_the_mechanism(shown: Demo) -> None:
    """Each of them alone would mistake one organism for another; together they do not."""
    values = {
        name: [float(cell["data-value"]) for cell in shown.line(name).all("td")[:3]]
        for name in MECHANISM
    }
    columns = zip(*values.values(), strict=True)
    drop, denoised, alike = (dict(zip(values, column, strict=True)) for column in columns)
    assert drop["latent-content"] > 0.5 < drop["latent-pointer"]
    assert drop["latent-ignored"] == drop["latent-ignored-aligned"] == 0
    assert denoised["latent-content"] > 0.9
    assert 0.2 < denoised["latent-pointer"] < 0.8  # a third answer: neither base's nor source's
    assert abs(denoised["latent-ignored"]) < 0.01 > abs(denoised["latent-ignored-aligned"])
    assert alike == {name: float(name != "latent-ignored") for name in MECHANISM}


def test_every_check_passed(shown: Demo) -> None:
    marks = [line.one("span")["aria-label"] for line in shown.page.all("li", "pass")]
    assert marks == ["passed"] * 5 * 6
    assert not shown.page.all("li", "fail")
    landed = [value.text for value in shown.page.all("span", "value") if " of " in value.text]
    assert landed == [f"{PAIRS * 2 * 2} of {PAIRS * 2 * 2}"] * 5


def test_two_pairs_settle_nothing_and_say_so() -> None:
    with shortened():
        found = demo.study(load_impostor("latent-ignored"), n=2, seed=0)
    assert found.headline.endswith("(undetermined).")
    assert found.mechanism is None or found.mechanism.winner is None


def test_share_of_a_constant_total_is_the_plain_mean_with_its_t_interval() -> None:
    effects = np.random.default_rng(0).normal(2.0, 1.0, 40)
    share = parts.share_of_total(effects, np.full(40, 4.0))
    interval = stats.ttest_1samp(effects / 4, 0).confidence_interval(0.95)
    assert share.value == pytest.approx(effects.mean() / 4)
    assert share.interval == pytest.approx((interval.low, interval.high))


def test_the_interval_of_a_share_covers_the_truth() -> None:
    """Effects and totals that vary together: 95% of the intervals hold the ratio of the means."""
    rng = np.random.default_rng(1)
    hits = []
    for _ in range(2000):
        totals = rng.normal(10.0, 3.0, 60)
        low, high = parts.share_of_total(0.4 * totals + rng.normal(0, 1, 60), totals).interval
        hits.append(low <= 0.4 <= high)
    assert 0.93 <= np.mean(hits) <= 0.97


def test_a_pair_without_an_answer_is_left_out_of_the_share() -> None:
    effects, totals = np.array([1.0, np.nan, 3.0, 9.0]), np.array([2.0, 4.0, 6.0, np.nan])
    share = parts.share_of_total(effects, totals)
    assert share == parts.share_of_total(effects[[0, 2]], totals[[0, 2]])
    assert share.n == 2
