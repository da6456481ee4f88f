"""What a model does beyond a plain causal decoder, where ignoring it would make a run wrong."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedModel

from imaginelens.hooks.tokens import Kind, TokenMap

# Types whose tokens count from 1, and whose forward tells prompt from answer by `token_type_ids`:
# neither can be read off a signature.
_PREFIX_LMS = ("paligemma",)
_FULL = "full_attention"


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """Facts of one model that the engine, or whoever builds on it, has to respect.

    Attributes:
        mrope: tokens have several position axes, which the model counts from its token types.
        remembers: modules that keep `rope_deltas`, the offset of the last prompt's positions, and
            use it for whatever runs next without positions of its own.
        first_position: the position of a row's first token.
        written_type: the token type of tokens that the model wrote.
        looks_ahead: which tokens see later ones: those of one image (`images`), the whole prompt
            (`prompt`), or none (`no`).
        deepstack: layers behind which image features are added to the stream, so that at image
            positions their `resid_post` is not the next layer's `resid_pre`; -1 is before all.
        per_layer_inputs: every layer also reads an embedding of the token id, at latent steps too.
        mixing: how each layer mixes positions, as the config names it.
        window: how many positions a sliding layer sees; None if no layer slides.
        tied: the output head is the token embedding.
    """

    mrope: bool
    remembers: tuple[str, ...]
    first_position: int
    written_type: int
    looks_ahead: Literal["no", "images", "prompt"]
    deepstack: tuple[int, ...]
    per_layer_inputs: bool
    mixing: tuple[str, ...]
    window: int | None
    tied: bool

    @property
    def crops(self) -> bool:
        """Whether a cache can be cut back to an earlier position: other layers than those of full
        attention have forgotten what was there."""
        return set(self.mixing) == {_FULL}

    def may_cut(self, tokens: TokenMap, column: int) -> bool:
        """Whether the columns before `column` can be read without those behind it."""
        if column in (0, tokens.width):
            return True
        if self.looks_ahead == "prompt":
            return column >= tokens.prompt_width
        if self.looks_ahead == "images":
            before, behind = tokens.image[:, column - 1], tokens.image[:, column]
            inside = (tokens.kind[:, column - 1 : column + 1] == Kind.VIDEO).all(1)
            return not bool(np.any(inside | (before >= 0) & (before == behind)))
        return True

    def lines(self) -> Iterator[str]:
        """What is not as in a plain causal decoder, in words."""
        if self.mrope:
            yield "positions have several axes, counted from the token types"
        if self.remembers:
            yield "positions of the last prompt are remembered; they are put back after each run"
        if self.first_position:
            yield f"positions count from {self.first_position}"
        if self.looks_ahead != "no":
            which = "tokens of one image" if self.looks_ahead == "images" else "prompt tokens"
            yield f"{which} see each other, later ones included"
        if self.deepstack:
            yield f"image features are added to the stream behind layers {_listed(self.deepstack)}"
        if self.per_layer_inputs:
            yield "every layer also reads an embedding of the token id, at latent steps too"
        if not self.crops:
            kinds = ", ".join(f"{self.mixing.count(k)} {k}" for k in dict.fromkeys(self.mixing))
            slides = "" if self.window is None else f", window {self.window}"
            yield f"layers mix positions in several ways: {kinds}{slides}"
        if self.tied:
            yield "the output head is the token embedding"


def find_behaviour(model: PreTrainedModel, n_layers: int) -> Behaviour:
    """Read off a model, its config and its signature how it behaves."""
    config = model.config
    text = config.get_text_config(decoder=True)
    prefix_lm = config.model_type in _PREFIX_LMS
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    mixing = tuple(getattr(text, "layer_types", None) or ())
    window = getattr(text, "sliding_window", None)
    slides = any("sliding" in kind for kind in mixing)
    if not mixing:
        uses_window = window is not None and getattr(text, "use_sliding_window", True)
        slides, kind = uses_window, "sliding_attention" if uses_window else _FULL
        mixing = (kind,) * n_layers
    return Behaviour(
        mrope=hasattr(model.base_model, "get_rope_index"),
        remembers=tuple(path for path, m in model.named_modules() if "rope_deltas" in vars(m)),
        first_position=int(prefix_lm) or behind_padding(model),
        written_type=int(prefix_lm),
        looks_ahead="prompt" if prefix_lm else _looks_ahead(model, text),
        deepstack=_deepstack(model),
        per_layer_inputs=bool(getattr(text, "hidden_size_per_layer_input", 0)),
        mixing=mixing,
        window=int(window) if slides and window else None,
        tied=head is not None and getattr(head, "weight", None) is embedding.weight,
    )


def behind_padding(model: PreTrainedModel) -> int:
    """Kosmos numbers its tokens from its padding id on, where it makes the positions itself."""
    tables = [m for name, m in model.named_modules() if name.endswith("embed_positions")]
    tables = [m for m in tables if hasattr(m, "create_position_ids_from_input_ids")]
    return int(tables[0].padding_idx) + 1 if tables else 0


def _looks_ahead(model: PreTrainedModel, text: Any) -> Literal["no", "images"]:
    """Gemma 4 says it in its config; Gemma 3 asks for the types that its mask is made from."""
    if getattr(text, "use_bidirectional_attention", None) == "vision":
        return "images"
    takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
    return "images" if takes_types and _has_images(model) else "no"


def _has_images(model: PreTrainedModel) -> bool:
    return any(p.startswith("pixel") for p in inspect.signature(model.forward).parameters)


def _deepstack(model: PreTrainedModel) -> tuple[int, ...]:
    config = model.config
    targets = [layer for _, layer in getattr(config, "deepstack_layer_map", None) or ()]
    targets += list(getattr(config, "spatial_target_layers", None) or ())
    if targets:  # added to what enters these layers
        return tuple(sorted(layer - 1 for layer in targets))
    if not any(hasattr(m, "_deepstack_process") for m in model.modules()):
        return ()
    for part in (getattr(config, "vision_config", None), config):
        indexes = getattr(part, "deepstack_visual_indexes", None)
        if indexes:  # of layers of the tower: they are added behind the first of the decoder
            return tuple(range(len(indexes)))
    return ()


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
