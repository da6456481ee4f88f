"""What people look at: figures, and the self-contained HTML report."""

from importlib import import_module
from typing import Any

from imaginelens.view.heatmap import heatmap_svg as heatmap_svg
from imaginelens.view.page import render as render
from imaginelens.view.page import write as write
from imaginelens.view.report import Cell as Cell
from imaginelens.view.report import Check as Check
from imaginelens.view.report import Column as Column
from imaginelens.view.report import EditRow as EditRow
from imaginelens.view.report import Example as Example
from imaginelens.view.report import GridCell as GridCell
from imaginelens.view.report import HeatMap as HeatMap
from imaginelens.view.report import KeyNumber as KeyNumber
from imaginelens.view.report import Measure as Measure
from imaginelens.view.report import Mechanism as Mechanism
from imaginelens.view.report import Picture as Picture
from imaginelens.view.report import Prediction as Prediction
from imaginelens.view.report import Report as Report
from imaginelens.view.report import Row as Row
from imaginelens.view.report import Study as Study
from imaginelens.view.report import Token as Token

_FIGURES = {  # drawn by plotly, which is imported when the first is asked for
    "AttentionShares": "attention_picture",
    "Figure": "figure",
    "PatchExplorer": "explorer",
    "attention_shares": "attention_picture",
    "attention_to_latents": "attention_picture",
    "dose_response": "doses",
    "explore": "explorer",
    "forest": "forest_plot",
    "image_overlay": "overlay",
    "lens_heatmap": "probing",
    "probe_heatmap": "probing",
    "similarity_curves": "probing",
    "similarity_matrices": "probing",
    "step_heatmap": "steps",
    "token_strip": "run_strip",
    "trajectories": "latent_plane",
}


def __getattr__(name: str) -> Any:
    if name not in _FIGURES:
        raise AttributeError(f"imaginelens.view has no {name!r}; see dir(imaginelens.view)")
    return getattr(import_module(f"imaginelens.view.{_FIGURES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_FIGURES])
