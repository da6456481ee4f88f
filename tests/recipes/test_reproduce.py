"""The paper's figures and tables: what is claimed, and that each exhibit finds what is known."""

import json
import math
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipes.planted_reproduce import CONFIGS, benchmark, checkpoint, config, derived
from view.reading import read

import imaginelens as il
from examples.reproduce import (
    __main__ as command,
)
from examples.reproduce import do_z, mechanism, table3_text_do_z, table4_do_z
from examples.reproduce.config import read_config
from examples.reproduce.exhibit import TRUST, Drawing, Measured, Number
from examples.reproduce.forecast import forecast
from examples.reproduce.grid import grid, printed
from examples.reproduce.page import render
from examples.reproduce.registry import CRITIQUE, EXHIBITS
from examples.reproduce.store import Kept, Store
from examples.reproduce.subjects import Settings, Subject, organism
from imaginelens.hooks.errors import InputError

# All that is known of the paper's exhibits; figure 1 and table 2 no source describes.
PAPER = {
    "Figure 2a", "Figure 2b", "README heat-maps", "Figure 2c, left", "Figure 2c, right", "Figure 3",
    "Figure 4", "Figure 5", "Figure 6", "Table 1", "Table 3", "Table 4", "TableVQA table",
    "ablation table",
}  # fmt: skip
FAMILIES = {
    "monet-7b.toml": "monet", "lvr-7b.toml": "lvr", "mirage-stage1.toml": "mirage",
    "mirage-stage2.toml": "mirage", "capimagine-7b.toml": "capimagine",
}  # fmt: skip


# ---- what is claimed of the paper ----------------------------------------------------------------


def test_every_figure_and_table_has_an_exhibit() -> None:
    covered = [name for one in EXHIBITS.values() for name in one.covers]
    assert set(covered) == PAPER
    assert len(covered) == len(PAPER)


def test_every_exhibit_says_what_is_unknown_and_is_measured_or_says_why_not() -> None:
    for one in EXHIBITS.values():
        assert one.unknown or not one.covers, one.name
        assert (one.measure is not None and one.organisms) or one.stated, one.name
        assert one.trust in TRUST
        assert all(heading.startswith("paper") for heading in one.paper), one.name
        assert not any("organism" in heading for heading in one.paper)


def test_every_point_of_the_critique_is_taken_up() -> None:
    taken = {answer.split(":")[0] for one in EXHIBITS.values() for answer in one.answers}
    assert taken == set(CRITIQUE)


def test_accuracies_of_v_star_are_shares_of_191_questions() -> None:
    columns = [*EXHIBITS["table1"].paper.values(), *EXHIBITS["ablations"].paper.values()]
    values = [_float(cells["V*"]) for cells in columns]
    values += [_float(v) for v in EXHIBITS["monet_do_z"].paper["paper, Monet-7B on V*"].values()]
    for value in values:
        assert abs(round(value * 1.91) / 1.91 - value) <= 0.06, value
    assert round(100 * 158 / 191, 1) == 82.7
    assert round(100 * 43 / 191, 1) == 22.5


def test_splits_of_v_star_add_up_to_the_whole() -> None:
    for model in ("Qwen2.5-VL-7B", "CapImagine-7B"):
        cells = EXHIBITS["table1"].paper[f"paper, {model}"]
        right = round(1.15 * _float(cells["V* attribute"])) + round(
            0.76 * _float(cells["V* spatial"])
        )
        assert right == round(1.91 * _float(cells["V*"]))
    rows = EXHIBITS["table3"].paper
    wrong = table3_text_do_z.WRONG
    attribute, spatial = rows["paper, on V* attributes"][wrong], rows["paper, on V* spatial"][wrong]
    assert round(1.15 * _float(attribute)) + round(0.76 * _float(spatial)) == 43


def test_mirage_lies_on_a_grid_of_a_quarter_point_cut_to_one_decimal() -> None:
    for cells in EXHIBITS["table4"].paper.values():
        for cell in cells.values():
            value = _float(cell)
            assert any(math.floor(k * 2.5) / 10 == value for k in range(401)), value


@pytest.mark.parametrize("name", ["table4", "monet_do_z"])
def test_changes_are_differences_from_the_unedited(name: str) -> None:
    for cells in EXHIBITS[name].paper.values():
        for row, cell in cells.items():
            if row != do_z.NONE:
                change = float(re.search(r"\(([-+][\d.]+)\)", str(cell)).group(1))
                assert change == pytest.approx(_float(cell) - _float(cells[do_z.NONE]), abs=0.11)


def test_rewriting_loses_what_the_table_says() -> None:
    for cells in EXHIBITS["table3"].paper.values():
        lost = cells[table3_text_do_z.WRONG] - cells[table3_text_do_z.WHOLE]
        assert lost == pytest.approx(cells["change, points"], abs=0.11)


def test_tablevqa_is_the_unweighted_mean() -> None:
    for cells in EXHIBITS["tablevqa"].paper.values():
        parts = [cells[name] for name in ("VWTQ", "VWTQ-syn", "VTabFact")]
        assert np.mean(parts) == pytest.approx(cells["Overall"], abs=0.06)


def _float(cell: Any) -> float:
    return float(str(cell).split()[0])


# ---- what exhibits find --------------------------------------------------------------------------

SMALL = Settings(tau=("mean",), sigma=(), mu=(0.0,))  # two edits, for speed


def small(name: str) -> Subject:
    made = organism(name)
    return Subject(name=name, heading=made.heading, lens=made.lens, settings=SMALL)


@pytest.fixture(scope="module")
def do_z_tables() -> dict[str, Measured]:
    sizes = {"latent-content": 24, "latent-pointer": 24, "latent-ignored": 80}  # nothing takes more
    return {name: table4_do_z.measure(small(name), n=n, seed=0) for name, n in sizes.items()}


def test_do_z_finds_who_needs_latents(do_z_tables: dict[str, Measured]) -> None:
    for name in ("latent-content", "latent-pointer"):
        assert set(do_z_tables[name].facts["verdicts"].values()) == {"effect"}
        assert max(do_z_tables[name].facts["changes"].values()) < -30
    told = table4_do_z.compare(do_z_tables)
    assert "latent-ignored does not need its latents" in told[2]


def test_do_z_is_fooled_by_a_pointer_and_the_report_says_so(
    do_z_tables: dict[str, Measured],
) -> None:
    """Two mechanisms, one table: only the swap tells them apart."""
    tables = [do_z_tables[name].facts["verdicts"] for name in ("latent-content", "latent-pointer")]
    assert tables[0] == tables[1]
    subjects = (small("latent-content"), small("latent-pointer"))
    winners = [mechanism.measure(s, n=48, seed=0).facts["winner"] for s in subjects]
    assert winners == ["content", "pointer"]
    page = render({"table4": {n: Kept(n, m, {}) for n, m in do_z_tables.items()}}, about={})
    said = read(page).one("section", "exhibit").text
    assert "cannot tell a pointer from content" in read(page).text
    assert said  # the first exhibit is there, too, though it was not measured


def test_words_are_followed_where_they_mislead() -> None:
    found = table3_text_do_z.measure(small("text"), n=16, seed=0)
    assert found.facts["before"] > 0.9
    assert found.facts["after"] < 0.1
    assert found.facts["follows"] > 0.9


def test_edits_of_our_own_do_what_they_say() -> None:
    lens = il.load("latent-content")
    task = lens.task(n=8, seed=3)
    reference = lens.run(lens.task(n=32, seed=4).base)
    norms = reference.latents.norm(dim=-1).mean()
    with lens.edit(do_z.RandomTensor().fit(reference), at=il.latent):
        one = lens.run(task.base).latents.flatten(0, 1)
    assert (one - one[0]).abs().max() == 0
    assert float(one[0].norm()) == pytest.approx(float(norms), rel=1e-4)
    with lens.edit(do_z.PureNoise(1.0).fit(reference), at=il.latent):
        noise = lens.run(task.base).latents
    std = reference.latents.double().std(0)
    assert float((noise / std).std()) == pytest.approx(1.0, abs=0.1)
    assert float((noise / std).mean()) == pytest.approx(0.0, abs=0.1)


# ---- results are kept ----------------------------------------------------------------------------


def test_saved_and_read_is_the_same(tmp_path: Path) -> None:
    drawing = Drawing("map", "a map", "nothing", "<svg/>", b"png")
    measured = Measured(
        {"": {"row": Number(1.5), "two": Number(2.0, 1.0, 3.0, 4), "three": "words \u2028 <b>"}},
        ("said",), (drawing,), {"winner": "content"}, 24, 1, 0.5,
    )  # fmt: skip
    store = Store(tmp_path)
    store.save("fig2", "one", Kept("heading", measured, {"n": 24}))
    again = store.read("fig2", "one")
    assert again is not None
    assert repr(again.measured.columns) == repr(measured.columns)
    assert again.measured.figures == measured.figures
    assert again.key == {"n": 24}
    assert store.read("fig2", "other") is None
    (tmp_path / "fig2" / "one.json").write_text("{")
    with pytest.raises(InputError, match="--fresh"):
        store.read("fig2", "one")


def test_what_was_measured_before_an_interruption_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, opened = Store(tmp_path), list[str]()
    names = ("latent-content", "latent-pointer", "latent-ignored")
    exhibit = replace(EXHIBITS["mechanism"], measure=lambda subject, *, n, seed: Measured({}))
    jobs = [command.Job(exhibit, name, 24, 0, "organism") for name in names]
    subject = organism("direct")

    def opens(job: command.Job) -> Subject:
        opened.append(job.subject)
        if job.subject == "latent-ignored" and len(opened) == 3:
            raise KeyboardInterrupt
        return subject

    with pytest.raises(KeyboardInterrupt):
        command.measured(jobs, store, opens, fresh=False)
    assert store.subjects("mechanism") == ["latent-content", "latent-pointer"]
    assert command.measured(jobs, store, opens, fresh=False) == []
    assert opened == [*names, "latent-ignored"]
    other = command.Job(exhibit, "latent-content", 24, 1, "organism")
    command.measured([other], store, opens, fresh=False)
    assert opened[-1] == "latent-content"  # another seed is another result
    assert "kept" in capsys.readouterr().err


# ---- the page ------------------------------------------------------------------------------------

HOSTILE = "<script>alert(1)</script>\"'><img src=https://x.test/a onerror=alert(1)>\u202e"


def test_the_page_is_inert_and_needs_nothing_else() -> None:
    drawing = Drawing("m", HOSTILE, HOSTILE, "<svg xmlns='http://www.w3.org/2000/svg'/>")
    measured = Measured({HOSTILE: {HOSTILE: HOSTILE}}, (HOSTILE,), (drawing,))
    found = {"where": {"x": Kept(HOSTILE, measured, {})}}
    found["where"]["x"].measured.facts["top"] = HOSTILE  # type: ignore[index]
    page = read(render(found, about={HOSTILE: HOSTILE}))
    tags = {node.tag for node in page.walk()}
    assert tags.isdisjoint({"script", "iframe", "object", "link", "form", "base", "svg"})
    for node in page.walk():
        for name, value in node.attributes.items():
            assert not name.startswith("on")
            if name in ("href", "src"):
                assert (value or "").startswith(("#", "data:image/svg+xml;base64,"))
    assert "<script>alert(1)</script>" in page.text  # as words
    assert "\u202e" not in page.text
    policy = [node for node in page.all("meta") if "http-equiv" in node.attributes]
    assert policy[0]["content"].startswith("default-src 'none'")


def test_names_between_backticks_are_links_and_nothing_else_is() -> None:
    told = Measured({}, ("see `table4` and `np`, not `<b>` or `javascript:x`",), facts={"top": "x"})
    page = read(render({"where": {"x": Kept("organism x", told, {})}}, about={}))
    notes = next(n for n in page.all("section", "exhibit") if n["id"] == "where").one("details")
    assert [a["href"] for a in notes.all("a")] == ["#table4"]
    assert [code.text for code in notes.all("code")] == ["table4", "np"]
    assert "`<b>` or `javascript:x`" in notes.text
    assert "`" not in read(render({}, about={})).text


def test_figures_of_one_kind_stand_together() -> None:
    def drawn(name: str, width: int) -> Drawing:
        return Drawing(name, name, name, f"<svg xmlns='x' width=\"{width}\"/>")

    kept = {
        subject: Kept(subject, Measured({}, (), (drawn("map", 1204), drawn("curve", 480))), {})
        for subject in ("a", "b")
    }
    figures = read(render({"fig3": kept}, about={})).all("figure")
    assert [f.one("figcaption").text for f in figures] == [
        "a: map", "b: map", "a: curve", "b: curve"
    ]  # fmt: skip
    assert [f.attributes.get("class") for f in figures] == [None, None, "small", "small"]


def test_links_lead_somewhere() -> None:
    page = read(render({}, about={}))
    ids = {node["id"] for node in page.walk() if "id" in node.attributes}
    assert ids >= {node["href"].removeprefix("#") for node in page.all("a")}
    assert ids >= set(EXHIBITS)


def test_the_paper_and_ours_never_share_a_column() -> None:
    measured = Measured({"": {do_z.NONE: Number(50.0)}}, facts={"verdicts": {}, "changes": {}})
    found = {"x": Kept("organism x (0.2 M parameters)", measured, {})}
    made = grid(EXHIBITS["table4"], found)
    assert made.papers == (True, True, False)
    assert made.headings[-1] == "organism x (0.2 M parameters)"
    first = dict(made.rows)[do_z.NONE]
    assert first == ("64.2", "77.0", "50")
    said = printed(EXHIBITS["table4"], found)
    assert "Unknown in the paper" in said
    assert "sigma" in said
    page = read(render({"table4": found}, about={}))
    table = next(n for n in page.all("table") if n["aria-label"].startswith("table4"))
    assert len(table.all("td", "paper")) == 2 * len(made.rows)


# ---- configs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_shipped_configs_are_read_and_say_what_they_cost(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = read_config(CONFIGS / name)
    assert found.model["family"] == FAMILIES[name]
    fitting = [one for one in EXHIBITS.values() if FAMILIES[name] in one.families]
    said = forecast(found, fitting)
    assert "generations" in said
    assert "nothing was loaded" in said
    assert command.main(["all", "--config", str(CONFIGS / name), "--dry-run"]) == 0
    assert "guess" in capsys.readouterr().out


def test_all_configs_are_tested() -> None:
    assert {path.name for path in CONFIGS.glob("*.toml")} == set(FAMILIES)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("steps = ", "stepps = 1\nsteps = ", "'stepps'"),
        ("[run]", "[runs]\n[run]", "'runs'"),
        ("seed = 0", "", "seed"),
        ('dtype = "bfloat16"', 'dtype = "bf16"', "'bf16'"),
        ('family = "mirage"', 'family = "mirrage"', "'mirrage'"),
        ('answer = "boxed"', 'answer = "box"', "'box'"),
        ("tables = 0", "tables = -1", "tables is -1"),
        ("tables = 0", "tables = true", "tables is True"),
        ("tables = 0", 'tables = "all"', "tables is 'all'"),
        ('tau = ["mean", "random"]', 'tau = ["median"]', "tau"),
        ("sigma = [1.0]", "sigma = []", "sigma"),
        ("mu = [0.0]", "mu = [nan]", "mu"),
        ("vsp = ", "vps = ", "'vps'"),
        ("[do_z]", '[rewriter]\nurl = "x"\nmodel = "y"\n[do_z]', "rewriter"),
        ("[model]", "[model", "no config"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    text = (CONFIGS / "mirage-stage2.toml").read_text()
    assert old in text
    file = tmp_path / "mine.toml"
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=re.escape(words)):
        read_config(file)
    assert command.main(["table4", "--config", str(file), "--dry-run"]) == 1


def test_an_exhibit_of_another_family_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["table3", "--config", str(CONFIGS / "monet-7b.toml"), "--dry-run"]) == 1
    assert "capimagine" in capsys.readouterr().err


def test_what_a_digest_depends_on(tmp_path: Path) -> None:
    whole = read_config(CONFIGS / "mirage-stage2.toml")
    other = config("mirage-stage2.toml", tmp_path / "mirage-stage2.toml", data=whole.data,
                   **{"run.out": "elsewhere"})  # fmt: skip
    assert read_config(other).digest == whole.digest
    other = config("mirage-stage2.toml", tmp_path / "mirage-stage2.toml", data=whole.data,
                   **{"do_z.sigma": [0.5]})  # fmt: skip
    assert read_config(other).digest != whole.digest


# ---- configs on tiny checkpoints of the families -------------------------------------------------

TINY = {
    "model.device": "cpu", "model.dtype": "float32", "model.answer": "tail",
    "run.tables": 0, "run.similarity": 12, "run.timing": 2, "run.map": 6, "run.beyond": 20,
    "run.max_new_tokens": 12, "run.batch_size": 8,
}  # fmt: skip


def test_the_config_of_mirage_runs_on_a_checkpoint_of_its_family(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = checkpoint("latent-content", "mirage", tmp_path / "weights")
    data = {"vsp": benchmark(tmp_path / "vsp", n=16)}
    file = config("mirage-stage2.toml", tmp_path / "tiny.toml", data=data, **TINY,
                  **{"model.id": str(weights), "model.steps": 2, "run.out": str(tmp_path / "out"),
                     "do_z.tau": ["mean"]})  # fmt: skip
    assert command.main(["table4", "--config", str(file)]) == 0
    kept = Store(tmp_path / "out").read("table4", "tiny")
    assert kept is not None
    assert kept.heading == f"ours, Mirage stage 2 ({weights})"
    assert max(kept.measured.facts["changes"].values()) < -20  # its latents carry the answer
    assert "64.2" in capsys.readouterr().out  # the paper's, beside it
    assert "77.0" in (tmp_path / "out" / "report.html").read_text()


@pytest.fixture(scope="module")
def rewriter() -> Iterator[str]:
    """An endpoint that speaks like OpenAI's, and says the same misleading cards to everything."""

    class Replies(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert "imagines" in asked["messages"][0]["content"]
            said = {"choices": [{"message": {"content": "<think> hm </think> red blue"}}]}
            body = json.dumps(said).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Replies)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_config_of_capimagine_runs_with_a_rewriter(tmp_path: Path, rewriter: str) -> None:
    weights = checkpoint("text", "capimagine", tmp_path / "weights")
    data = {"vstar": benchmark(tmp_path / "vstar", n=12)}
    changes = TINY | {"model.id": str(weights), "run.out": str(tmp_path / "out"),
                      "rewriter.url": rewriter, "model.answer": "family"}  # fmt: skip
    file = config("capimagine-7b.toml", tmp_path / "tiny.toml", data=data, **changes)
    assert command.main(["table3", "--config", str(file)]) == 0
    kept = Store(tmp_path / "out").read("table3", "tiny")
    assert kept is not None
    assert kept.measured.facts["before"] > 0.9
    assert kept.measured.facts["after"] < 0.5


def test_without_a_rewriter_the_rest_is_still_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = checkpoint("text", "capimagine", tmp_path / "weights")
    data = {"vstar": benchmark(tmp_path / "vstar", n=6)}
    file = config("capimagine-7b.toml", tmp_path / "tiny.toml", data=data, **TINY,
                  **{"model.id": str(weights), "run.out": str(tmp_path / "out"),
                     "rewriter.url": "http://127.0.0.1:9/v1"})  # fmt: skip
    assert command.main(["table3", "--config", str(file)]) == 1
    assert "127.0.0.1:9" in capsys.readouterr().err
    assert command.main(["fig5", "--config", str(file)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "organism_"),
    [("monet-7b.toml", "latent-content"), ("lvr-7b.toml", "latent-content"),
     ("mirage-stage1.toml", "latent-ignored"), ("capimagine-7b.toml", "text")],
)  # fmt: skip
def test_all_exhibits_of_a_config_run(
    tmp_path: Path, name: str, organism_: str, rewriter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only what needs folders that are not there is left out; Monet's system prompt is no word of
    an organism's, so that its answers mean nothing here."""
    weights = checkpoint(organism_, FAMILIES[name], tmp_path / "weights")
    folders = {
        "vstar": benchmark(tmp_path / "vstar", n=24, split="attribute"),
        "hrbench4k": benchmark(tmp_path / "hr", n=20, seed=1, split="FSP"),
        "tablevqa": benchmark(tmp_path / "tablevqa", n=10, seed=2, split="VWTQ"),
        "vsp": benchmark(tmp_path / "vsp", n=24),
    }
    data = {**folders, "questions": derived(folders["vstar"])}
    changes = {**TINY, "model.id": str(weights), "run.out": str(tmp_path / "out"),
               "rewriter.url": rewriter}  # fmt: skip
    if FAMILIES[name] != "capimagine":
        changes["model.steps"] = 2
    file = config(name, tmp_path / "tiny.toml", data=data, **changes)
    status = command.main(["all", "--config", str(file)])
    said = capsys.readouterr()
    store = Store(tmp_path / "out")
    fitting = [one.name for one in EXHIBITS.values() if FAMILIES[name] in one.families]
    absent = {name for name in fitting if store.read(name, "tiny") is None}
    if FAMILIES[name] != "monet":
        assert status == 0, said.err
        assert not absent
    # what is left out says that it is for want of answers
    assert said.err.count("left out") == len(absent)
    assert absent <= {"verdicts", "matched", "where", "fig2c_probe"}


# ---- all of it -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_exhibits_on_all_organisms_find_what_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["all", "--organisms", "--out", str(tmp_path), "-n", "96"]) == 0
    found = {name: {k: v.measured for k, v in kept.items()}
             for name, kept in command.everything(Store(tmp_path))}  # fmt: skip
    needed, ignored = ("latent-content", "latent-pointer"), ("latent-ignored",)
    for exhibit in ("table4", "monet_do_z"):
        for name in needed:
            assert set(found[exhibit][name].facts["verdicts"].values()) == {"effect"}
        for name in ignored:
            assert set(found[exhibit][name].facts["verdicts"].values()) <= {"equivalent", "both"}
    winners = {name: one.facts["winner"] for name, one in found["mechanism"].items()}
    assert winners == {
        "text": "pointer", "latent-content": "content", "latent-pointer": "pointer",
        "latent-ignored": "ignored", "latent-ignored-aligned": "ignored",
    }  # fmt: skip
    through = {name: one.facts["tnie"]["verdict"] for name, one in found["verdicts"].items()}
    assert through["latent-ignored"] == through["latent-ignored-aligned"] == "equivalent"
    assert {through[name] for name in (*needed, "text")} == {"effect"}
    probe = {name: one.facts for name, one in found["fig2c_probe"].items()}
    assert probe["latent-content"]["latent"] > 0.8
    assert probe["latent-pointer"]["latent"] < 0.4  # used, and not answered from alone
    assert found["table3"]["text"].facts["follows"] > 0.9
    assert {one.facts["rate"] for n, one in found["fig2a"].items() if "latent" in n} == {1.0}
    # the likeness of states does not follow their use
    raw = {name: max(one.facts["raw"]) for name, one in found["fig2"].items()}
    assert raw["latent-ignored"] > 0.8
    assert raw["latent-ignored-aligned"] < 0.4 > raw["latent-content"]
    assert max(found["fig4"]["text"].facts["raw"]) > 0.7
    assert found["matched"]["latent-content"].facts["donor"] > 0.9
    assert found["matched"]["latent-ignored"].facts["targeted"] < 0.05
    out = capsys.readouterr().out
    assert "paper, Mirage stage 1" in out
    page = read((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert len(page.all("section", "exhibit")) == len(EXHIBITS) + 1
    assert all(node["src"].startswith("data:") for node in page.all("img"))
    assert command.main(["table4", "--organisms", "--out", str(tmp_path), "-n", "96"]) == 0
    assert capsys.readouterr().err.count("kept") == len(EXHIBITS["table4"].organisms)
