"""The explorer: its numbers are those of direct calls, its page is safe, its messages answer."""

import base64
import csv
import gc
import io
import json
import re
import shutil
import subprocess
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import imaginelens as il
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.grid import ImageGrid
from imaginelens.hooks.tokens import TokenMap
from imaginelens.mediation.cells import Cell
from imaginelens.view import explorer_page, explorer_state
from imaginelens.view.explorer import PatchExplorer, _selector, explore
from imaginelens.view.explorer_code import spelled
from imaginelens.view.explorer_grid import Grid, blocks
from imaginelens.view.explorer_state import Explorer

SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def lens() -> Any:
    return il.load("latent-content")


@pytest.fixture(scope="module")
def pairs(lens: Any) -> il.Pairs:
    return lens.task(n=3, seed=0)


@pytest.fixture(scope="module")
def reference(lens: Any, pairs: il.Pairs) -> il.Run:
    return lens.run(list(pairs.base), names_filter="resid_post")


@pytest.fixture
def session(lens: Any, pairs: il.Pairs, reference: il.Run) -> Explorer:
    return Explorer(lens, pairs, edits={"noise": il.AddNoise(0.5, reference=reference)})


@pytest.fixture
def widget(lens: Any, pairs: il.Pairs) -> Iterator[PatchExplorer]:
    made = explore(lens, pairs)
    yield made
    made.close()


def say(widget: PatchExplorer, **message: Any) -> None:
    """What the page sends."""
    widget._handle_custom_msg(message, [])


def stored(value: Any) -> int:
    """How many bytes a trait takes in a notebook's file."""
    return len(value) * 4 // 3 if isinstance(value, bytes) else len(json.dumps(value, default=str))


def step(widget: PatchExplorer) -> None:
    say(widget, type="step", job=widget.status["job"], done=widget.status["done"])


def z_of(widget: PatchExplorer) -> np.ndarray:
    return np.frombuffer(widget.z, dtype=np.float32).reshape(widget.shape)


# ---- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["free", "fixed"])
def test_a_cell_is_what_patch_gives(session: Explorer, lens: Any, context: str) -> None:
    session.choose(pair=1, context=context)
    pairs = session.pairs
    found = {cell: session.run(*cell).values["logit_diff"] for cell in [(0, 0), (1, 0), (1, 1)]}
    for (row, column), value in found.items():
        direct = lens.patch(
            base=pairs.base[1], source=pairs.source[1], site=f"blocks.{row}.hook_resid_post",
            base_answers=pairs.base_answers[1], source_answers=pairs.source_answers[1],
            at=il.latent[column], context=context,
        )  # fmt: skip
        assert value.before == direct.before.item()
        assert value.after == direct.after.item()
        assert value.change == direct.landing.relative_change
    assert len({value.after for value in found.values()}) == 3  # no cell stands for another


def test_all_metrics_of_a_cell_are_those_of_direct_calls(session: Explorer, lens: Any) -> None:
    found, pairs = session.run(1, 0), session.pairs
    assert list(found.values) == ["logit_diff", "log_prob", "prob", "source_answer"]
    for metric in (il.log_prob, il.prob, il.source_answer):
        direct = lens.patch(
            base=pairs.base[0], source=pairs.source[0], site="blocks.1.hook_resid_post",
            base_answers=pairs.base_answers[0], source_answers=pairs.source_answers[0],
            at=il.latent[0], metric=metric,
        )  # fmt: skip
        assert found.values[metric.name].after == direct.after.item()
    assert found.before.answers == direct.answers_before
    assert found.arm.after.answers == direct.answers_after
    assert found.flips


def test_a_map_is_what_sweep_gives(session: Explorer, lens: Any) -> None:
    found = session.map()
    direct = il.sweep(lens, session.pairs[0:1])
    assert (found.effect == direct.effect).all()
    values = [[session.value(r, c) for c in range(2)] for r in range(3)]
    effects = np.array([[v.effect for v in row] for row in values])
    assert np.abs(effects - direct.effect.reshape(3, 2)).max() == 0.0
    assert np.ptp(effects) > 1.0
    assert np.array_equal(session.effect_map.effect, direct.effect)
    for sham in (session.sham, session.effect_map.sham[0], direct.sham[0]):
        assert abs(sham) < 1e-5  # float32: forwards of other shapes may round otherwise
    session.choose(edit="zero")
    assert session.sham is None
    assert session.effect_map.sham is None


def test_the_parts_of_a_map_are_sweeps_of_its_layers(session: Explorer, lens: Any) -> None:
    shares = []
    for layer, (share, part) in enumerate(session.parts()):
        direct = il.sweep(lens, session.pairs[0:1], sites=f"blocks.{layer}.hook_resid_post")
        assert np.array_equal(part.effect, direct.effect)
        shares.append(share)
    assert shares == [1 / 3, 2 / 3, 1.0]


def test_a_map_leaves_cells_that_were_run_as_they_are(session: Explorer) -> None:
    alone = session.run(1, 0).values["logit_diff"]
    session.map()
    assert session.value(1, 0) is alone
    assert session.value(1, 1).how == "map"


def test_what_is_chosen_meanwhile_does_not_label_a_map(session: Explorer) -> None:
    going = session.parts()
    next(going)
    session.choose(edit="zero")
    next(going)
    assert session.value(1, 0) is None
    session.choose(edit="swap")
    assert session.value(1, 0) is not None


def test_nothing_is_run_twice(session: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    first = session.run(1, 0)
    monkeypatch.setattr(explorer_state, "do", None)
    session.choose(metric="prob")
    assert session.run(1, 0) is first
    with pytest.raises(TypeError):
        session.run(1, 1)


@pytest.mark.parametrize(
    "change",
    [{"edit": "zero"}, {"donor": 2}, {"direction": "noise"}, {"pair": 1}, {"site": "resid_pre"}],
)
def test_every_setting_makes_another_measurement(session: Explorer, change: dict[str, Any]) -> None:
    before = session.run(1, 0)
    session.choose(**change)
    after = session.run(1, 0)
    assert before.values["logit_diff"].after != after.values["logit_diff"].after
    assert len(session.result) == 2 * len(session.metrics)


CODED: list[dict[str, Any]] = [
    {},
    {"context": "fixed", "metric": "log_prob"},
    {"donor": 2},
    {"direction": "noise", "pair": 1, "donor": 2},
    {"edit": "zero", "metric": "prob"},
    {"edit": "noise", "direction": "noise"},
    {"tab": "heads"},
    {"tab": "heads", "edit": "zero", "direction": "noise"},
    {"tab": "regions"},
    {"tab": "image", "site": "resid_pre"},
]


@pytest.mark.parametrize("change", CODED, ids=str)
def test_code_measures_the_cell_again(session: Explorer, lens: Any, change: dict[str, Any]) -> None:
    session.choose(**change)
    found: dict[tuple[int, int], float] = {}
    for cell in [(0, 0), (1, 1)]:
        names = {"lens": lens, "pairs": session.pairs, "edits": session.edits}
        exec(session.code(*cell), names)
        found[cell] = names["found"].effect.item()
        value = session.run(*cell).values[session.setting.metric]
        assert found[cell] == pytest.approx(value.effect, abs=1e-6)
    assert found[0, 0] != found[1, 1]


def test_code_knows_columns_that_were_added(session: Explorer, lens: Any) -> None:
    at = il.image[0][0:2, 1:3] | il.after(il.latent[0])
    with pytest.raises(InputError, match="no run has a position"):
        session.add(il.latent[7])
    session.add(il.image[0][0:2, 1:3])
    assert spelled(at) == "il.image[0][0:2, 1:3] | il.after(il.latent[0])"
    names: dict[str, Any] = {"lens": lens, "pairs": session.pairs}
    column = session.grid.columns.index("image[0][0:2, 1:3]")
    exec(session.code(0, column), names)
    assert names["found"].effect.item() == session.run(0, column).values["logit_diff"].effect
    assert names["found"].landing.positions == {0: [4, 5, 7, 8]}


def test_an_edit_that_changes_nothing_says_so(session: Explorer) -> None:
    session.choose(edit="sham")
    found = session.run(1, 0)
    assert found.values["logit_diff"].effect == 0.0
    assert not found.flips
    session.choose(edit="swap", site="resid_pre")
    session.add(il.positions([0]))  # both begin with the same token
    column = session.grid.columns.index("positions([0])")
    same = session.run(0, column)
    assert same.values["logit_diff"].flag == 2
    told = explorer_page.detail_of(session, 0, column, same)
    assert told["landing"]["words"].startswith("nothing changed")


def test_result_is_a_row_for_each_cell_and_metric(session: Explorer) -> None:
    assert list(session.result.columns) == explorer_state._COLUMNS
    assert session.result.empty
    ran = session.run(1, 0)
    session.map()
    frame = session.result
    assert list(frame.columns) == explorer_state._COLUMNS
    assert len(frame) == 4 + 5  # four metrics of one cell, one metric of the five others
    row = frame[(frame.how == "run") & (frame.metric == "logit_diff")].iloc[0]
    assert (row.layer, row.position, row.flag) == (1, "latent[0]", "fired")
    assert row.effect == ran.values["logit_diff"].effect
    assert row.answer_before == ran.before.answers[0] != row.answer_after


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pair": 3}, "pair is 3; choose from 0 to 2"),
        ({"pair": True}, "pair is True"),
        ({"site": "nowhere"}, "site is 'nowhere'"),
        ({"edit": "melt"}, "edit is 'melt'; choose from 'swap', 'zero', 'sham', 'noise'"),
        ({"tab": "heads", "site": "resid_post"}, "has no heads"),
        ({"colour": 1}, "no setting 'colour'"),
    ],
)
def test_a_wrong_choice_is_refused(session: Explorer, change: dict[str, Any], words: str) -> None:
    old = session.setting
    with pytest.raises(InputError, match=re.escape(words)):
        session.choose(**change)
    assert session.setting == old


def test_a_model_without_latents_opens_at_its_regions(pairs: il.Pairs) -> None:
    found = Explorer(il.load("direct"), pairs)
    assert (found.setting.tab, found.setting.at) == ("regions", "last_prompt")
    assert found.grid.columns == ("image", "question", "last_prompt")
    found.choose(tab="steps")
    with pytest.raises(InputError, match="none has a latent step"):
        found.map()


def test_heads_are_those_of_the_position_that_is_chosen(session: Explorer) -> None:
    session.choose(tab="heads")
    whole = session.map().effect
    session.choose(at="latent[1]")
    assert session.grid.column_axis == "head, at latent[1]"
    assert not np.array_equal(session.map().effect, whole)
    with pytest.raises(InputError, match="at is 'nowhere'; choose from latent, last_prompt"):
        session.choose(at="nowhere")


def test_wrong_arguments_are_refused(lens: Any, pairs: il.Pairs) -> None:
    with pytest.raises(InputError, match="expected other names"):
        Explorer(lens, pairs, edits={"swap": il.Zero()})
    with pytest.raises(InputError, match="no cell in row 3"):
        Explorer(lens, pairs).run(3, 0)


def test_a_large_picture_is_cut_into_blocks_that_cover_it_once(session: Explorer) -> None:
    run = session.sides().run
    large = replace(run, tokens=replace(run.tokens, grids=((ImageGrid(18, 23),),)))
    seen = np.zeros((18, 23), dtype=int)
    for at in blocks(large):
        seen[at.cells] += 1  # type: ignore[attr-defined]
    assert (seen == 1).all()
    assert len(blocks(large)) == 48
    assert [repr(at) for at in blocks(run)][:2] == ["image[0][0, 0]", "image[0][0, 1]"]


# ---- messages ----------------------------------------------------------------------------------


def test_run_tells_before_and_after(widget: PatchExplorer) -> None:
    assert np.isnan(z_of(widget)).all()
    assert not any(widget.mask)
    say(widget, type="run", cell=[1, 0])
    value = widget.session.run(1, 0).values["logit_diff"]
    assert z_of(widget)[0, 1, 0] == np.float32(value.effect)
    assert np.isnan(z_of(widget)[0]).sum() == 5
    assert list(widget.mask) == [0, 0, 2, 0, 0, 0]
    detail = widget.detail
    assert detail["answers"] == ["bar", "circle", "circle"]
    assert detail["flips"]
    assert widget.selected == {"row": 1, "column": 0}
    likely = {t["text"]: t for t in detail["tokens"]}
    assert likely["bar"]["role"] == "base"
    assert likely["circle"]["role"] == "source"
    assert likely["bar"]["before"] > 0.9 > 0.1 > likely["bar"]["after"]
    assert detail["landing"]["words"].startswith("landed: 1 state in 1 forward")
    json.dumps(detail, allow_nan=False)


def test_probabilities_are_the_softmax_at_the_answer(widget: PatchExplorer) -> None:
    found = widget.run(0, 0)
    shares = found.arm.after.logits[0].double().softmax(-1)
    told = {t["text"]: t["after"] for t in widget.detail["tokens"]}
    for token in shares.topk(2).indices.tolist():
        assert told[widget.session.open.decode(token)] == float(shares[token])


def test_a_run_without_an_answer_says_so(pairs: il.Pairs) -> None:
    silent = explore(il.load("latent-content", answer=lambda text: None), pairs)
    say(silent, type="run", cell=[1, 0])
    assert silent.status["text"].endswith(
        "no answer was found without the patch, so logit_diff has no value"
    )
    assert (silent.detail["answers"], silent.detail["tokens"]) == ([None] * 3, [])
    assert (silent.mask[2], np.isnan(z_of(silent)).all()) == (2, True)
    json.dumps(silent.detail, allow_nan=False)
    silent.close()


def test_select_tells_only_what_was_run(widget: PatchExplorer) -> None:
    say(widget, type="run", cell=[1, 0])
    say(widget, type="select", cell=[0, 1])
    assert widget.detail == {}
    assert widget.selected == {"row": 0, "column": 1}
    say(widget, type="select", cell=[1, 0])
    assert widget.detail["answers"][2] == "circle"


@pytest.mark.parametrize(
    "message",
    [
        {"type": "run", "cell": [9, 0]},
        {"type": "run", "cell": "1,0"},
        {"type": "run"},
        {"type": "choose", "changes": {"edit": "melt"}},
        {"type": "choose", "changes": [1]},
        {"type": "add", "at": {"latent": [9, 10]}},
        {"type": "add", "at": {"latent": ["__import__('os')", 1]}},
        {"type": "add", "at": None},
        {"type": "export", "format": "exe"},
        {"type": "melt"},
        {},
    ],
    ids=str,
)
def test_errors_are_sentences(widget: PatchExplorer, message: dict[str, Any]) -> None:
    setting = widget.session.setting
    say(widget, **message)
    assert widget.status["kind"] == "error"
    assert "Traceback" not in widget.status["text"]
    assert "\n" not in widget.status["text"]
    assert widget.session.setting == setting
    first = dict(widget.status)
    say(widget, **message)
    assert widget.status != first  # the page is told of the second, too
    assert widget.status["text"] == first["text"]
    say(widget, type="run", cell=[1, 0])
    assert widget.status["kind"] == "done"


def test_an_error_of_the_model_is_a_sentence(
    widget: PatchExplorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"CUDA out of memory\n{SCRIPT}\x00")

    monkeypatch.setattr(explorer_state, "do", broken)
    say(widget, type="run", cell=[1, 0])
    assert widget.status["text"] == f"RuntimeError: CUDA out of memory {SCRIPT}[U+0000]"


def test_a_map_goes_row_by_row_and_stops_when_cancelled(widget: PatchExplorer) -> None:
    say(widget, type="map")
    assert widget.status["kind"] == "running"
    assert widget.progress == 0.0
    assert np.isnan(z_of(widget)).all()
    first = dict(widget.status)
    step(widget)
    assert widget.progress == pytest.approx(1 / 3)
    assert list(widget.mask) == [1, 1, 0, 0, 0, 0]
    say(widget, type="step", job=first["job"], done=first["done"])  # of a second view
    assert list(widget.mask) == [1, 1, 0, 0, 0, 0]
    say(widget, type="run", cell=[2, 0])
    assert widget.status["kind"] == "running"
    assert "cancel it first" in widget.status["text"]
    say(widget, type="cancel")
    assert widget.status["kind"] == "cancelled"
    assert "1 of 3 rows" in widget.status["text"]
    say(widget, type="step", job=first["job"], done=1)
    assert list(widget.mask) == [1, 1, 0, 0, 0, 0]
    say(widget, type="map")
    while widget.status["kind"] == "running":
        step(widget)
    assert list(widget.mask) == [1] * 6
    assert widget.progress == 1.0
    said, sham = widget.status["text"].rsplit(" ", 1)
    assert said == "3 rows measured; the self-swap changed logit_diff by"
    assert 0.0 <= float(sham) < 1e-5


def test_brushed_cells_become_a_column(widget: PatchExplorer) -> None:
    say(widget, type="add", at={"image": 0, "rows": [0, 2], "columns": [1, 2]})
    assert widget.columns[-1] == "image[0][0:2, 1]"
    assert widget.places[-1] == [[0, 0, 1], [0, 1, 1]]
    assert widget.selected == {"row": 0, "column": 2}
    assert widget.shape == [4, 3, 3]
    say(widget, type="add", at={"image": 0, "rows": [0, 2], "columns": [1, 2]})
    assert len(widget.columns) == 3
    say(widget, type="choose", changes={"tab": "heads"})
    say(widget, type="add", at={"tokens": [4]})
    assert (widget.setting["at"], widget.shape) == ("positions([4])", [4, 3, 4])
    assert repr(_selector({"latent": [0, 2]})) == "latent[0:2]"
    assert repr(_selector({"tokens": [4, 7]})) == "positions([4, 7])"


def test_export_sends_files(widget: PatchExplorer, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, bytes] = {}

    def send(content: Any, buffers: Any = None) -> None:
        sent[content["name"].split(".")[-1]] = bytes(buffers[0])

    monkeypatch.setattr(widget, "send", send)
    widget.run(1, 0)
    for kind in ("html", "csv", "png"):
        say(widget, type="export", format=kind)
    assert sent["html"].startswith(b"<!doctype html>")
    assert sent["png"][:4] == b"\x89PNG"
    rows = list(csv.DictReader(io.StringIO(sent["csv"].decode())))
    assert [float(row["effect"]) for row in rows] == widget.result.effect.tolist()


def test_a_table_holds_no_formula(widget: PatchExplorer, monkeypatch: pytest.MonkeyPatch) -> None:
    found = widget.session.run(1, 0)
    planted = replace(found.before, answers=("=HYPERLINK(1)",))
    widget.session._measured[found.key] = replace(found, before=planted)
    assert b"'=HYPERLINK(1)" in widget._csv()
    assert b",=HYPERLINK" not in widget._csv()


def test_close_lets_go_of_the_model(pairs: il.Pairs) -> None:
    lens = il.load("latent-content")
    widget = explore(lens, pairs)
    widget.run(1, 0)
    held = weakref.ref(lens)
    del lens
    gc.collect()
    assert held() is not None
    widget.close()
    gc.collect()
    assert held() is None
    assert len(widget.result) == 4
    say(widget, type="run", cell=[0, 0])
    assert "closed" in widget.status["text"]


# ---- what is shown -----------------------------------------------------------------------------


def test_the_state_of_a_large_map_is_small(widget: PatchExplorer) -> None:
    session = widget.session
    ran = widget.run(1, 0)  # its details stay in the state
    grid = session.grid
    cells = [
        tuple(
            Cell("resid_post", layer, f"latent[{k}]", None, (f"blocks.{layer}.hook_resid_post",))
            for k in range(10)
        )
        for layer in range(28)
    ]
    at = {f"latent[{k}]": il.latent[k] for k in range(10)}
    rows, columns = tuple(map(str, range(28))), tuple(at)
    (key,) = session._grids
    session._grids[key] = Grid(rows, columns, grid.row_axis, grid.column_axis, tuple(cells), at)
    effects = np.random.default_rng(0).normal(size=(3, 28, 10))
    for metric, values in zip(session.metrics, effects, strict=False):  # the fourth is 0 or 1
        measured = il.EffectMap.from_arrays(
            cells=[cell for row in cells for cell in row], before=[0.0], other=[1.0],
            after=values.reshape(-1, 1), metric=metric, unit="", binary=False,
            direction="denoise", context="free", edit="swap", keys=["0"],
        )  # fmt: skip
        session._keep(measured, session.setting)
    widget._show({**explorer_page.grid_told(session), **explorer_page.cells_told(session)})
    assert widget.shape == [4, 28, 10]
    effects[:, 1, 0] = [value.effect for value in ran.values.values()][:3]  # which stays as it was
    assert z_of(widget)[:3] == pytest.approx(effects.astype(np.float32))
    assert widget.detail["answers"]
    state = widget.get_state()
    size = sum(map(stored, state.values()))
    assert 30_000 < size < 200_000  # the script and the picture are in it
    assert size - len(state["_esm"]) - len(state["_css"]) < 60_000


def test_the_notebook_keeps_a_picture_that_shows_the_map(widget: PatchExplorer) -> None:
    def blue() -> int:
        data, _ = widget._repr_mimebundle_()
        assert "application/vnd.jupyter.widget-view+json" in data
        assert "layer" in data["text/plain"]
        png = base64.b64decode(data["image/png"])
        assert len(png) < 300_000
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=int)
        return int((pixels[..., 2] - pixels[..., 0] > 60).sum())

    bar = blue()
    assert blue() == bar
    widget.map()  # four of its six cells are far above 0
    assert blue() > bar + 5_000


def test_a_page_stands_alone_and_text_stays_text(
    widget: PatchExplorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = TokenMap._piece_at
    monkeypatch.setattr(
        TokenMap, "_piece_at",
        lambda self, row, column: SCRIPT if column == 1 else own(self, row, column),
    )  # fmt: skip
    widget.run(1, 0)
    widget.choose()
    written = widget.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//cdn|\bsrc=|@import|url\(", written)
    assert SCRIPT not in written
    assert "<script>" not in written
    assert written.count("<script") == written.count("</script") == 2
    (data,) = re.findall(r'<script type="application/json" id="state">(.*?)</script>', written)
    state = json.loads(data)
    assert state["tokens"][1]["text"] == SCRIPT  # it is there, as text
    assert state["live"] is False
    assert list(state["details"]) == ["1,0"]
    z = np.frombuffer(base64.b64decode(state["z"]["base64"]), dtype=np.float32)
    assert np.array_equal(z, z_of(widget).ravel(), equal_nan=True)
    assert len(written) < 300_000


def test_the_module_writes_no_markup_and_asks_no_network() -> None:
    script = explorer_page.script()
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval("):
        assert word not in script
    for word in ("fetch(", "XMLHttp", "import(", "http:", "https:", "WebSocket", "</script"):
        assert word not in script
    assert not re.search(r"^\s*import\b", script, re.MULTILINE)
    assert "http" not in explorer_page.style()
    assert "url(" not in explorer_page.style()


def test_the_module_parses(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not on PATH")
    for name, text in (("good.mjs", ""), ("bad.mjs", "\nconst = 1;")):
        (tmp_path / name).write_text(explorer_page.script() + text, encoding="utf-8")
        done = subprocess.run([node, "--check", tmp_path / name], capture_output=True, check=False)
        assert (done.returncode == 0) is (name == "good.mjs")


def test_tokens_are_chips_in_order(widget: PatchExplorer) -> None:
    chips = widget.tokens
    assert [c["text"] for c in chips if c["kind"] == "image"] == ["image × 9"]  # noqa: RUF001
    assert [c["text"] for c in chips if c["kind"] == "latent"] == ["z0", "z1"]
    covered = [k for c in chips for k in range(c["first"], c["last"] + 1)]
    assert covered == list(range(len(covered)))
    boxes = np.frombuffer(widget.boxes, dtype=np.float32).reshape(-1, 8)
    assert boxes.shape == (9, 8)
    assert boxes[:, 4:].min() == 0.0
    assert boxes[:, 4:].max() == 1.0
    areas = (boxes[:, 6] - boxes[:, 4]) * (boxes[:, 7] - boxes[:, 5])
    assert areas.sum() == pytest.approx(1.0)
