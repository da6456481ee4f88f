"""ImagineLens: what do the latent tokens of a multimodal model cause?

Everything is imported when first used, so that `import imaginelens` costs little.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "imaginelens.hooks": (
        "ActivationCache",
        "AddNoise",
        "CheckpointError",
        "Constant",
        "DonorError",
        "Edit",
        "EditContext",
        "EditTouchedNothing",
        "FAMILIES",
        "FirstRepeat",
        "Force",
        "HookNameError",
        "HookRegistry",
        "ImagineLensError",
        "InputError",
        "Landing",
        "LatentModel",
        "LatentSpec",
        "Mean",
        "Metric",
        "Noise",
        "Pairs",
        "PatchResult",
        "PositionError",
        "Project",
        "Replace",
        "Resample",
        "Run",
        "Sham",
        "Shuffle",
        "SiteUnavailable",
        "Skip",
        "Slerp",
        "Steer",
        "Swap",
        "TokenMap",
        "Zero",
        "accuracy",
        "answer",
        "answers",
        "base_answer",
        "before_answer",
        "flip",
        "get_act_name",
        "image",
        "kl",
        "last_prompt",
        "latent",
        "log_prob",
        "logit_diff",
        "positions",
        "prob",
        "source_answer",
        "span",
        "text",
    ),
    "imaginelens.organisms": ("Organism", "load", "organisms"),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}
__all__ = [*_WHERE, "__version__"]

if TYPE_CHECKING:
    from imaginelens.hooks import (
        ActivationCache as ActivationCache,
        AddNoise as AddNoise,
        CheckpointError as CheckpointError,
        Constant as Constant,
        DonorError as DonorError,
        Edit as Edit,
        EditContext as EditContext,
        EditTouchedNothing as EditTouchedNothing,
        FAMILIES as FAMILIES,
        FirstRepeat as FirstRepeat,
        Force as Force,
        HookNameError as HookNameError,
        HookRegistry as HookRegistry,
        ImagineLensError as ImagineLensError,
        InputError as InputError,
        Landing as Landing,
        LatentModel as LatentModel,
        LatentSpec as LatentSpec,
        Mean as Mean,
        Metric as Metric,
        Noise as Noise,
        Pairs as Pairs,
        PatchResult as PatchResult,
        PositionError as PositionError,
        Project as Project,
        Replace as Replace,
        Resample as Resample,
        Run as Run,
        Sham as Sham,
        Shuffle as Shuffle,
        SiteUnavailable as SiteUnavailable,
        Skip as Skip,
        Slerp as Slerp,
        Steer as Steer,
        Swap as Swap,
        TokenMap as TokenMap,
        Zero as Zero,
        accuracy as accuracy,
        answer as answer,
        answers as answers,
        base_answer as base_answer,
        before_answer as before_answer,
        flip as flip,
        get_act_name as get_act_name,
        image as image,
        kl as kl,
        last_prompt as last_prompt,
        latent as latent,
        log_prob as log_prob,
        logit_diff as logit_diff,
        positions as positions,
        prob as prob,
        source_answer as source_answer,
        span as span,
        text as text,
    )
    from imaginelens.organisms import Organism as Organism
    from imaginelens.organisms import load as load
    from imaginelens.organisms import organisms as organisms


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"imaginelens has no {name!r}; see dir(imaginelens)")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
