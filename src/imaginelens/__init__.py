"""ImagineLens: what do the latent tokens of a multimodal model cause?

Everything is imported when first used, so that `import imaginelens` costs little.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "imaginelens.view": (
        "PatchExplorer",
        "explore",
    ),
    "imaginelens.estimates": (
        "Estimate",
        "relative",
    ),
    "imaginelens.hooks": (
        "ActivationCache",
        "AddNoise",
        "Behaviour",
        "BlankImage",
        "BlurImage",
        "CheckpointError",
        "Constant",
        "CropImage",
        "Cue",
        "Delete",
        "DepthSpec",
        "DonorError",
        "Edit",
        "EditContext",
        "EditTouchedNothing",
        "FAMILIES",
        "Features",
        "FirstRepeat",
        "Force",
        "Forget",
        "HookNameError",
        "HookRegistry",
        "ImagineLensError",
        "InputEdit",
        "InputError",
        "Insertion",
        "Intervention",
        "Interventions",
        "Knockout",
        "Landing",
        "LatentModel",
        "LatentSpec",
        "Latents",
        "Mean",
        "Metric",
        "Mixture",
        "Noise",
        "NoiseImage",
        "OccludeCells",
        "Pairs",
        "PasteRegion",
        "PatchResult",
        "PixelEdit",
        "PositionError",
        "Project",
        "Replace",
        "Resample",
        "Rewrite",
        "Run",
        "Sham",
        "Shuffle",
        "SiteUnavailable",
        "Sketcher",
        "Skip",
        "Slerp",
        "Steer",
        "Swap",
        "SwapImage",
        "SwapInstance",
        "SwapText",
        "TextSpec",
        "TokenMap",
        "Truncate",
        "VideoGrid",
        "VocabSpec",
        "Zero",
        "accuracy",
        "after",
        "always_emitters",
        "answer",
        "answers",
        "audio",
        "base_answer",
        "before_answer",
        "deciding",
        "features",
        "flip",
        "format",
        "from_pyvene",
        "generated",
        "get_act_name",
        "hub_origin",
        "image",
        "imagination",
        "inserted",
        "kl",
        "last_prompt",
        "latent",
        "log_prob",
        "logit_diff",
        "markers",
        "onward",
        "positions",
        "prob",
        "register_family",
        "register_structure",
        "source_answer",
        "span",
        "text",
        "to_pyvene",
        "video",
    ),
    "imaginelens.mediation": (
        "Agreement",
        "Attribution",
        "CaptumForward",
        "Cell",
        "Dependence",
        "EffectMap",
        "Effects",
        "FaithfulnessCurve",
        "Interchange",
        "Interventional",
        "MapStore",
        "Necessity",
        "PotentialOutcomes",
        "Selectivity",
        "StepInfluence",
        "Sufficiency",
        "attention_knockout",
        "attribute",
        "attribution_graph",
        "captum_forward",
        "causal_trace",
        "counterfactuals",
        "faithfulness_curve",
        "input_dependence",
        "interchange",
        "interventional",
        "necessity",
        "path_patch",
        "save_graph",
        "selectivity",
        "step_influence",
        "sufficiency",
        "sweep",
    ),
    "imaginelens.organisms": ("Organism", "load"),
}
_PARTS = ("estimates", "hooks", "mediation", "organisms", "probes", "view")
_WHERE = {name: module for module, names in _HOME.items() for name in names}
# the widget needs an extra, and is not for `import *`
__all__ = [*(n for n, home in _WHERE.items() if home != "imaginelens.view"), *_PARTS, "__version__"]

if TYPE_CHECKING:
    from imaginelens.estimates import Estimate as Estimate
    from imaginelens.estimates import relative as relative
    from imaginelens.hooks import FAMILIES as FAMILIES
    from imaginelens.hooks import ActivationCache as ActivationCache
    from imaginelens.hooks import AddNoise as AddNoise
    from imaginelens.hooks import Behaviour as Behaviour
    from imaginelens.hooks import BlankImage as BlankImage
    from imaginelens.hooks import BlurImage as BlurImage
    from imaginelens.hooks import CheckpointError as CheckpointError
    from imaginelens.hooks import Constant as Constant
    from imaginelens.hooks import CropImage as CropImage
    from imaginelens.hooks import Cue as Cue
    from imaginelens.hooks import Delete as Delete
    from imaginelens.hooks import DepthSpec as DepthSpec
    from imaginelens.hooks import DonorError as DonorError
    from imaginelens.hooks import Edit as Edit
    from imaginelens.hooks import EditContext as EditContext
    from imaginelens.hooks import EditTouchedNothing as EditTouchedNothing
    from imaginelens.hooks import Features as Features
    from imaginelens.hooks import FirstRepeat as FirstRepeat
    from imaginelens.hooks import Force as Force
    from imaginelens.hooks import Forget as Forget
    from imaginelens.hooks import HookNameError as HookNameError
    from imaginelens.hooks import HookRegistry as HookRegistry
    from imaginelens.hooks import ImagineLensError as ImagineLensError
    from imaginelens.hooks import InputEdit as InputEdit
    from imaginelens.hooks import InputError as InputError
    from imaginelens.hooks import Insertion as Insertion
    from imaginelens.hooks import Intervention as Intervention
    from imaginelens.hooks import Interventions as Interventions
    from imaginelens.hooks import Knockout as Knockout
    from imaginelens.hooks import Landing as Landing
    from imaginelens.hooks import LatentModel as LatentModel
    from imaginelens.hooks import Latents as Latents
    from imaginelens.hooks import LatentSpec as LatentSpec
    from imaginelens.hooks import Mean as Mean
    from imaginelens.hooks import Metric as Metric
    from imaginelens.hooks import Mixture as Mixture
    from imaginelens.hooks import Noise as Noise
    from imaginelens.hooks import NoiseImage as NoiseImage
    from imaginelens.hooks import OccludeCells as OccludeCells
    from imaginelens.hooks import Pairs as Pairs
    from imaginelens.hooks import PasteRegion as PasteRegion
    from imaginelens.hooks import PatchResult as PatchResult
    from imaginelens.hooks import PixelEdit as PixelEdit
    from imaginelens.hooks import PositionError as PositionError
    from imaginelens.hooks import Project as Project
    from imaginelens.hooks import Replace as Replace
    from imaginelens.hooks import Resample as Resample
    from imaginelens.hooks import Rewrite as Rewrite
    from imaginelens.hooks import Run as Run
    from imaginelens.hooks import Sham as Sham
    from imaginelens.hooks import Shuffle as Shuffle
    from imaginelens.hooks import SiteUnavailable as SiteUnavailable
    from imaginelens.hooks import Sketcher as Sketcher
    from imaginelens.hooks import Skip as Skip
    from imaginelens.hooks import Slerp as Slerp
    from imaginelens.hooks import Steer as Steer
    from imaginelens.hooks import Swap as Swap
    from imaginelens.hooks import SwapImage as SwapImage
    from imaginelens.hooks import SwapInstance as SwapInstance
    from imaginelens.hooks import SwapText as SwapText
    from imaginelens.hooks import TextSpec as TextSpec
    from imaginelens.hooks import TokenMap as TokenMap
    from imaginelens.hooks import Truncate as Truncate
    from imaginelens.hooks import VideoGrid as VideoGrid
    from imaginelens.hooks import VocabSpec as VocabSpec
    from imaginelens.hooks import Zero as Zero
    from imaginelens.hooks import accuracy as accuracy
    from imaginelens.hooks import after as after
    from imaginelens.hooks import always_emitters as always_emitters
    from imaginelens.hooks import answer as answer
    from imaginelens.hooks import answers as answers
    from imaginelens.hooks import audio as audio
    from imaginelens.hooks import base_answer as base_answer
    from imaginelens.hooks import before_answer as before_answer
    from imaginelens.hooks import deciding as deciding
    from imaginelens.hooks import features as features
    from imaginelens.hooks import flip as flip
    from imaginelens.hooks import format as format
    from imaginelens.hooks import from_pyvene as from_pyvene
    from imaginelens.hooks import generated as generated
    from imaginelens.hooks import get_act_name as get_act_name
    from imaginelens.hooks import hub_origin as hub_origin
    from imaginelens.hooks import image as image
    from imaginelens.hooks import imagination as imagination
    from imaginelens.hooks import inserted as inserted
    from imaginelens.hooks import kl as kl
    from imaginelens.hooks import last_prompt as last_prompt
    from imaginelens.hooks import latent as latent
    from imaginelens.hooks import log_prob as log_prob
    from imaginelens.hooks import logit_diff as logit_diff
    from imaginelens.hooks import markers as markers
    from imaginelens.hooks import onward as onward
    from imaginelens.hooks import positions as positions
    from imaginelens.hooks import prob as prob
    from imaginelens.hooks import register_family as register_family
    from imaginelens.hooks import register_structure as register_structure
    from imaginelens.hooks import source_answer as source_answer
    from imaginelens.hooks import span as span
    from imaginelens.hooks import text as text
    from imaginelens.hooks import to_pyvene as to_pyvene
    from imaginelens.hooks import video as video
    from imaginelens.mediation import Agreement as Agreement
    from imaginelens.mediation import Attribution as Attribution
    from imaginelens.mediation import CaptumForward as CaptumForward
    from imaginelens.mediation import Cell as Cell
    from imaginelens.mediation import Dependence as Dependence
    from imaginelens.mediation import EffectMap as EffectMap
    from imaginelens.mediation import Effects as Effects
    from imaginelens.mediation import FaithfulnessCurve as FaithfulnessCurve
    from imaginelens.mediation import Interchange as Interchange
    from imaginelens.mediation import Interventional as Interventional
    from imaginelens.mediation import MapStore as MapStore
    from imaginelens.mediation import Necessity as Necessity
    from imaginelens.mediation import PotentialOutcomes as PotentialOutcomes
    from imaginelens.mediation import Selectivity as Selectivity
    from imaginelens.mediation import StepInfluence as StepInfluence
    from imaginelens.mediation import Sufficiency as Sufficiency
    from imaginelens.mediation import attention_knockout as attention_knockout
    from imaginelens.mediation import attribute as attribute
    from imaginelens.mediation import attribution_graph as attribution_graph
    from imaginelens.mediation import captum_forward as captum_forward
    from imaginelens.mediation import causal_trace as causal_trace
    from imaginelens.mediation import counterfactuals as counterfactuals
    from imaginelens.mediation import faithfulness_curve as faithfulness_curve
    from imaginelens.mediation import input_dependence as input_dependence
    from imaginelens.mediation import interchange as interchange
    from imaginelens.mediation import interventional as interventional
    from imaginelens.mediation import necessity as necessity
    from imaginelens.mediation import path_patch as path_patch
    from imaginelens.mediation import save_graph as save_graph
    from imaginelens.mediation import selectivity as selectivity
    from imaginelens.mediation import step_influence as step_influence
    from imaginelens.mediation import sufficiency as sufficiency
    from imaginelens.mediation import sweep as sweep
    from imaginelens.organisms import Organism as Organism
    from imaginelens.organisms import load as load
    from imaginelens.view import PatchExplorer as PatchExplorer
    from imaginelens.view import explore as explore


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return import_module(f"imaginelens.{name}")
    if name not in _WHERE:
        name = import_module("imaginelens.removed").instead_of(name)
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE, *_PARTS])
