"""Every figure says in words what it shows, and is drawn where there is no browser."""

import ast
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import imaginelens as il
from imaginelens.probes.states import States
from imaginelens.probes.steering import DoseResponse
from imaginelens.view.figure import Figure

VIEW = Path(__file__).parents[2] / "src" / "imaginelens" / "view"
SHARED = {"charts.chart", "panels.draw"}  # what others are drawn by

DRAWN: dict[str, Callable[[Any], Figure]] = {
    "attention_picture.attention_to_latents": lambda s: il.view.attention_to_latents(s.lens, s.run),
    "doses.dose_response": lambda s: s.doses.plot(),
    "explorer.plot": lambda s: s.explorer.plot(),
    "forest_plot.forest": lambda s: s.worlds.effects().plot(margin=0.05),
    "latent_plane.trajectories": lambda s: il.view.trajectories(s.run),
    "maps.heatmap": lambda s: s.map.plot(),
    "overlay.image_overlay": lambda s: il.view.image_overlay(s.run, s.cells),
    "probing.lens_heatmap": lambda s: s.table.plot(),
    "probing.probe_heatmap": lambda s: il.probes.probe_map(s.states, controls=False).plot(),
    "probing.similarity_curves": lambda s: il.view.similarity_curves(s.alike),
    "probing.similarity_matrices": lambda s: s.alike.plot(),
    "run_strip.token_strip": lambda s: il.view.token_strip(s.run),
    "steps.step_heatmap": lambda s: il.step_influence(s.lens, s.task[0:2]).plot(),
}


def faults(figure: Figure) -> list[str]:
    """What keeps a figure from readers who see no picture, or run no scripts."""
    found = []
    if not re.search(r"\w+ \w+", figure.alt):
        found.append("no words")
    elif not re.search(r"\d", figure.alt):
        found.append("no number in its words")
    picture = Image.open(io.BytesIO(figure.png(scale=1.0))).convert("RGB")
    if len(picture.getcolors(maxcolors=1 << 24) or ()) < 8:
        found.append("an empty picture")
    return found


@pytest.fixture(scope="module")
def shown() -> Iterator[Any]:
    """Results of every kind that is drawn."""
    lens: Any = il.load("latent-content")
    task = lens.task(n=4, seed=0)
    run = lens.run(task.base)
    noise = np.random.default_rng(0)
    states = States.of(noise.normal(size=(40, 2, 1, 8)), [0, 1] * 20, sites=["hook_latent"])
    before = noise.normal(size=20)
    doses = DoseResponse(
        doses=(-1.0, 1.0), metric=il.logit_diff, before=before,
        after=before + noise.normal(size=(2, 20)), random=before + noise.normal(size=(2, 3, 20)),
        groups=None, flags={}, change=(0.1, 0.1), where="latent", context="free",
    )  # fmt: skip
    explorer = il.explore(lens, task)
    explorer.run(row=1, column=0)
    yield SimpleNamespace(
        lens=lens, task=task, run=run, states=states, doses=doses, explorer=explorer,
        alike=il.probes.similarity(states), table=il.probes.logit_lens(lens, run),
        map=il.sweep(lens, task, context="fixed"),
        cells=il.sweep(lens, task, sites="blocks.0.hook_resid_pre", positions=il.image,
                       metric=il.log_prob, edit=il.Zero(), context="fixed"),
        worlds=il.counterfactuals(lens, task, metric=il.source_answer, controls=False),
    )  # fmt: skip
    explorer.close()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The processes that somebody tries to start, which all fail; and there is no kaleido."""
    import matplotlib.font_manager  # asks for the fonts of the machine when first imported

    assert matplotlib.font_manager
    tried: list[Any] = []

    def refused(*args: Any, **kwargs: Any) -> Any:
        tried.append(args)
        raise OSError("no process here")

    monkeypatch.setattr(subprocess, "Popen", refused)
    monkeypatch.setattr(os, "posix_spawn", refused)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "kaleido", None)
    return tried


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_has_words_and_a_picture_without_a_browser(
    name: str, shown: Any, started: list[Any]
) -> None:
    assert faults(DRAWN[name](shown)) == []
    assert started == []


def figures(folder: Path) -> set[str]:
    """The public functions and methods that return a figure, with their modules."""
    return {
        f"{path.stem}.{node.name}"
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        if isinstance(node.returns, ast.Name) and node.returns.id == "Figure"
    }


def test_no_figure_is_forgotten(tmp_path: Path) -> None:
    assert figures(VIEW) == DRAWN.keys() | SHARED
    (tmp_path / "new.py").write_text("def clock() -> Figure: ...\ndef _own() -> Figure: ...\n")
    assert figures(tmp_path) == {"new.clock"}


def test_figures_that_say_or_show_nothing_are_found() -> None:
    figure = Figure(layout={"width": 200, "height": 100})
    assert faults(figure) == ["no words", "an empty picture"]
    figure.update_layout(meta={"alt": "a map of effects"})
    assert faults(figure)[0] == "no number in its words"
