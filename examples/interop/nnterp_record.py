"""What nnterp reads and writes on a shipped organism, for an environment of nnterp's own.

nnterp 1.3 cannot be imported beside nnsight 0.8, so its numbers are recorded once and compared with
(`nnterp_recorded.json`). It needs only the checkpoint, not this library:

    pip install nnterp==1.3.0 nnsight==0.7.0 transformers==5.23.0 pillow
    python examples/interop/nnterp_record.py > examples/interop/nnterp_recorded.json
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

CHECKPOINTS = Path(__file__).parents[2] / "src" / "imaginelens" / "organisms" / "checkpoints"
NAME = "latent-content"
LAYER, NUMBERS = 1, 6


def inputs(image_token: int) -> dict[str, torch.Tensor]:
    """A prompt with nine image tokens, made without a processor."""
    ids = [3, 1, *[image_token] * 9, 2, 10, 11, 12, 13, 14]
    kinds = [int(token == image_token) for token in ids]
    pixels = torch.cos(torch.arange(36 * 1176, dtype=torch.float64)).reshape(36, 1176)
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "mm_token_type_ids": torch.tensor([kinds]),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 6, 6]]),
    }


def vector() -> torch.Tensor:
    """What is steered with."""
    return torch.linspace(-1, 1, 64, dtype=torch.float64)


def some(act: torch.Tensor) -> list[float]:
    """The first numbers at the last position."""
    return [float(x) for x in act.detach()[0, -1, :NUMBERS]]


def main() -> None:
    """Print what nnterp finds, as JSON."""
    from nnterp import StandardizedTransformer
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    folder = CHECKPOINTS / NAME
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).eval()
    nn: Any = StandardizedTransformer(
        model,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        allow_multimodal=True,
        check_renaming=False,
    )
    given = inputs(model.config.image_token_id)
    ids = given.pop("input_ids")
    read: dict[str, Any] = {}
    with torch.no_grad(), nn.trace(ids, **given):
        read["token_embeddings"] = nn.token_embeddings.save()
        read["layers_input"] = nn.layers_input[LAYER].save()
        read["attentions_input"] = nn.attentions_input[LAYER].save()
        read["attentions_output"] = nn.attentions_output[LAYER].save()
        read["mlps_input"] = nn.mlps_input[LAYER].save()
        read["mlps_output"] = nn.mlps_output[LAYER].save()
        read["layers_output"] = nn.layers_output[LAYER].save()
        read["project_on_vocab"] = nn.project_on_vocab(nn.layers_output[LAYER]).save()
        read["ln_final"] = nn.ln_final.output.save()
        read["logits"] = nn.logits.save()
    with torch.no_grad(), nn.trace(ids, **given):
        nn.steer(LAYER, vector(), factor=3.0, token_positions=-1)
        read["steered"] = nn.logits.save()
    with torch.no_grad(), nn.trace(ids, **given):
        nn.attentions_output[LAYER] = nn.attentions_output[LAYER] * 2
        read["attention_doubled"] = nn.logits.save()
    with torch.no_grad(), nn.trace(ids, **given):
        nn.skip_layers(LAYER, LAYER + 1, layer_returns_tuple=False)
        read["skipped"] = nn.logits.save()
    sizes = {key: getattr(nn, key) for key in ("num_layers", "num_heads", "hidden_size")}
    versions = {key: version(key) for key in ("nnterp", "nnsight", "transformers", "torch")}
    found = {name: some(act) for name, act in read.items()}
    print(json.dumps({"versions": versions, "sizes": sizes, "read": found}, indent=1))


if __name__ == "__main__":
    main()
