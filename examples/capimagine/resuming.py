"""Going on exactly where a training was stopped, also when it was killed.

`Trainer` of transformers 5.23 loads a full checkpoint of Qwen2.5-VL without effect. A checkpoint
has the names of the Hub (`visual.*`, `model.layers.*`), and `_load_from_checkpoint` looks for those
in memory (`model.visual.*`, `model.language_model.*`), not strictly. Every name is missed, one
warning is logged, and the training goes on from the weights that the script happened to open;
`load_best_model_at_end` keeps the last weights in the same way. `ExactResume` loads both with
`from_pretrained`, which knows the names, and refuses what does not fit. Adapters, DeepSpeed and
FSDP checkpoints are not affected and are loaded as before.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from imaginelens.hooks.errors import CheckpointError


class ExactResume:
    """Put before a trainer, so that it resumes from the weights of the checkpoint:

    `class Exact(ExactResume, Trainer): ...`
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        trainer: Any = self
        model = trainer.model if model is None else model
        if _loads_by_wrong_names(trainer, model):
            load_weights(model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        trainer: Any = self
        if _loads_by_wrong_names(trainer, trainer.model):
            load_weights(trainer.model, Path(trainer.state.best_model_checkpoint))
        else:
            super()._load_best_model()  # type: ignore[misc]


def _loads_by_wrong_names(trainer: Any, model: Any) -> bool:
    engine = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    return isinstance(model, PreTrainedModel) and not engine


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Load what `save_pretrained` wrote into a model that is there already, exactly.

    Raises:
        CheckpointError: a weight is missing, is left over, or has another shape.
    """
    widest = max((weight.dtype for weight in model.parameters()), key=lambda kind: kind.itemsize)
    saved, info = type(model).from_pretrained(
        folder,
        dtype=widest,  # nothing is rounded on the way
        use_safetensors=True,
        output_loading_info=True,
    )
    for wrong in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[wrong]:
            first = sorted(map(str, info[wrong]))[0]
            raise CheckpointError(
                f"{folder} does not hold the weights of this {type(model).__name__}: "
                f"{len(info[wrong])} {wrong.replace('_', ' ')}, the first is {first}; resume with "
                "the model that was trained"
            )
    with torch.no_grad():
        model.load_state_dict(saved.state_dict())


def last_whole(folder: Path) -> Path | None:
    """The newest checkpoint of a training that was written to its end; None if there is none.

    A trainer writes its state last, so one that was killed while it saved has none, or half of it.
    """
    found = [
        (int(path.name.rsplit("-", 1)[1]), path)
        for path in folder.glob("checkpoint-*")
        if path.name.rsplit("-", 1)[1].isdigit() and _is_whole(path)
    ]
    return max(found)[1] if found else None


def _is_whole(checkpoint: Path) -> bool:
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return f"checkpoint-{state.get('global_step')}" == checkpoint.name
