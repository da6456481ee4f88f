"""nnterp's names for the parts of any of our models, for code that was written with them.

nnterp renames the modules of a language model; here the same names read and write the same tensors
inside a trace of `lens.nnsight`, found by the model's structure. nnterp itself cannot be imported
beside nnsight 0.8.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int

from imaginelens.hooks.engine import first_tensor, with_first
from imaginelens.hooks.errors import InputError, SiteUnavailable

if TYPE_CHECKING:
    from imaginelens.hooks.model import LatentModel

Part = Literal["path", "attention", "mlp"]  # the field of a block that a name is about
End = Literal["input", "output"]


class Modules:
    """The module of one kind in each layer, as nnsight shows it: `layers[i]`."""

    def __init__(self, lens: "LatentModel", part: Part) -> None:
        self._lens, self._part = lens, part

    def __len__(self) -> int:
        return len(self._lens.structure.blocks)

    def __getitem__(self, layer: int) -> Any:
        blocks = self._lens.structure.blocks
        if not -len(blocks) <= layer < len(blocks):
            raise IndexError(f"there is no layer {layer} of {len(self)}")
        path = getattr(blocks[layer], self._part)
        if path is None:
            raise SiteUnavailable(
                f"layer {layer} of {type(self._lens.model).__name__} has no module that is known "
                f"to be its {self._part}; lens.registry lists what can be read there"
            )
        return self._lens.nnsight.get(path)


class Values:
    """The tensor at one end of such modules, inside a trace: read it, or assign to it."""

    def __init__(self, modules: Modules, end: End) -> None:
        self._modules, self._end = modules, end

    def __getitem__(self, layer: int) -> torch.Tensor:
        return first_tensor(getattr(self._modules[layer], self._end))

    def __setitem__(self, layer: int, value: torch.Tensor) -> None:
        envoy = self._modules[layer]
        setattr(envoy, self._end, with_first(getattr(envoy, self._end), value))


class NnterpNames:
    """A model under nnterp's names: `lens.nnterp`.

    Attributes:
        layers, attentions, mlps: the modules of each layer.
        layers_input, layers_output, attentions_input, attentions_output, mlps_input, mlps_output:
            their tensors inside a trace, (example, position, d_model).
        num_layers, num_heads, hidden_size, vocab_size: sizes of the text model.

    >>> import imaginelens as il
    >>> import nnsight
    >>> lens = il.load("latent-content")
    >>> model, base = lens.nnterp, lens.task(n=1, seed=0).base[0]
    >>> with model.trace(base):
    ...     model.layers_output[1] = model.layers_output[1] * 0
    ...     h = nnsight.save(model.layers_input[2])
    >>> bool((h == 0).all()), model.num_layers
    (True, 3)
    """

    def __init__(self, lens: "LatentModel") -> None:
        if lens.registry.depth is not None:
            raise InputError(
                f"{lens.registry.depth.spec.name} runs the same blocks several times, and nnterp's "
                "names say nothing of which time; use lens.hooks with the names of lens.registry"
            )
        self._lens = lens
        self.layers = Modules(lens, "path")
        self.attentions = Modules(lens, "attention")
        self.mlps = Modules(lens, "mlp")
        self.layers_input = Values(self.layers, "input")
        self.layers_output = Values(self.layers, "output")
        self.attentions_input = Values(self.attentions, "input")
        self.attentions_output = Values(self.attentions, "output")
        self.mlps_input = Values(self.mlps, "input")
        self.mlps_output = Values(self.mlps, "output")
        self.num_layers = len(self.layers)
        self.num_heads = lens.structure.n_heads
        self.hidden_size = lens.structure.d_model
        self.vocab_size = lens.structure.d_vocab

    @property
    def trace(self) -> Callable[..., Any]:
        """`lens.nnsight.trace`: what the names are read in."""
        return self._lens.nnsight.trace

    @property
    def embed_tokens(self) -> Any:
        """The token embedding, whose output at image and latent positions is overwritten."""
        return self._lens.nnsight.get(self._lens.structure.embed)

    @property
    def ln_final(self) -> Any:
        """The norm before the head; its output is what a latent model feeds back."""
        return self._lens.nnsight.get(self._lens.structure.final_norm)

    @property
    def lm_head(self) -> Any:
        """The unembedding."""
        return self._lens.nnsight.get(self._lens.structure.head)

    @property
    def token_embeddings(self) -> Float[torch.Tensor, "example position d_model"]:
        """What the token embedding puts out; assign to it inside a trace."""
        return self.embed_tokens.output

    @token_embeddings.setter
    def token_embeddings(self, value: Float[torch.Tensor, "example position d_model"]) -> None:
        self.embed_tokens.output = value

    @property
    def input_ids(self) -> Int[torch.Tensor, "example position"]:
        """The token ids that the model was given."""
        return self._lens.nnsight.inputs[1]["input_ids"]

    @property
    def attention_mask(self) -> torch.Tensor:
        """The mask that the model was given."""
        return self._lens.nnsight.inputs[1]["attention_mask"]

    @property
    def logits(self) -> Float[torch.Tensor, "example position vocab"]:
        """What the model puts out."""
        return self._lens.nnsight.output.logits

    @property
    def next_token_probs(self) -> Float[torch.Tensor, "example vocab"]:
        """The probabilities behind the last position."""
        return self.logits[:, -1].softmax(-1)

    def project_on_vocab(self, state: torch.Tensor) -> torch.Tensor:
        """The logits of a state of the stream, through the final norm and the head."""
        return self.lm_head(self.ln_final(state))

    def steer(
        self,
        layers: int | Sequence[int],
        steering_vector: Float[torch.Tensor, " d_model"],
        factor: float = 1.0,
        token_positions: Any = slice(None),
        batch_index: Any = slice(None),
    ) -> None:
        """Add `factor` times a vector to the output of layers, at positions of some examples."""
        for layer in sorted([layers] if isinstance(layers, int) else layers):
            new = self.layers_output[layer].clone()
            new[batch_index, token_positions] += factor * steering_vector.to(new)
            self.layers_output[layer] = new

    def skip_layer(self, layer: int, skip_with: torch.Tensor | None = None) -> None:
        """Leave out one layer: its input, or another tensor, takes its output's place."""
        self.skip_layers(layer, layer, skip_with)

    def skip_layers(
        self, start_layer: int, end_layer: int, skip_with: torch.Tensor | None = None
    ) -> None:
        """Leave out the layers from `start_layer` to `end_layer`, both included.

        They are run, and what they put out is replaced: it may be more than a tensor.
        """
        state = self.layers_input[start_layer] if skip_with is None else skip_with
        for layer in range(start_layer, end_layer + 1):
            self.layers_output[layer] = state

    def __getattr__(self, name: str) -> Any:
        if name == "attention_probabilities":
            raise SiteUnavailable(
                "attention_probabilities are read inside an attention function, which fused "
                "kernels do not show; use lens.run_with_cache(..., "
                "names_filter='*.attn.hook_pattern'), or a hook there, which may also write"
            )
        raise AttributeError(
            f"nnterp's names have no {name!r}; what this model itself calls its parts is under "
            "lens.nnsight"
        )
