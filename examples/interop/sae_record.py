"""What SAELens makes of edited features, for an environment of its own.

sae-lens 6.51 declares `transformer-lens>=2.16`, and cannot be imported beside transformer-lens 4,
from which the class it builds on was removed. So its numbers are recorded once and compared with
(`sae_recorded.json`). It needs SAELens only, not this library:

    pip install sae-lens==6.51.1 transformer-lens==3.9.0 transformers==5.23.0
    python examples/interop/sae_record.py > examples/interop/sae_recorded.json

To have `tests/interop/test_with_sae.py` ask SAELens itself, put it into an environment of its own
with this library, which declares transformer-lens 4, so the older one needs `--no-deps`:

    pip install sae-lens==6.51.1 && pip install --no-deps transformer-lens==3.9.0
"""

import json
import warnings
from importlib.metadata import version
from typing import Any

import torch

WIDTH, FEATURES, CELLS, TOP = 8, 12, 5, 3
EDITED = {3: 2.5, 7: 0.0}  # features, and what they are set to
NORMS = ("none", "constant_norm_rescale", "layer_norm")


def waves(*shape: int, start: int) -> torch.Tensor:
    """Numbers that look random and need not be stored."""
    count = torch.Size(shape).numel()
    return torch.cos(1.7 * torch.arange(start, start + count, dtype=torch.float64) ** 1.3).reshape(
        shape
    )


def weights() -> dict[str, torch.Tensor]:
    """The weights of every SAE here."""
    return {
        "W_enc": waves(WIDTH, FEATURES, start=0),
        "b_enc": 0.3 * waves(FEATURES, start=200),
        "W_dec": waves(FEATURES, WIDTH, start=300),
        "b_dec": 0.5 * waves(WIDTH, start=500),
    }


def threshold() -> torch.Tensor:
    """Of the JumpReLU."""
    return 0.4 + 0.3 * waves(FEATURES, start=600)


def states() -> torch.Tensor:
    """What is encoded."""
    return 2 * waves(CELLS, WIDTH, start=700)


def saes() -> dict[str, Any]:
    """SAEs of SAELens by name: each kind, and each way of normalising its input."""
    import sae_lens
    from sae_lens.saes.sae import SAEMetadata

    common = {"d_in": WIDTH, "d_sae": FEATURES, "dtype": "float64", "device": "cpu"}
    made: dict[str, Any] = {}
    for norm in NORMS:
        config = {**common, "normalize_activations": norm}
        config["metadata"] = SAEMetadata(hook_name="blocks.1.hook_resid_post")
        made[f"standard, {norm}"] = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(**config))
        made[f"topk, {norm}"] = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(**config, k=TOP))
        made[f"jumprelu, {norm}"] = sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(**config))
    for name, sae in made.items():
        own = weights() | ({"threshold": threshold()} if name.startswith("jumprelu") else {})
        if name.startswith("topk"):
            own = {key: value for key, value in own.items() if key in sae.state_dict()}
        sae.load_state_dict(own)
    return made


def hooked(sae: Any, x: torch.Tensor) -> torch.Tensor:
    """SAELens' own forward with its error term, and some features set by a hook."""

    def put(features: torch.Tensor, hook: Any) -> torch.Tensor:
        features = features.clone()
        for feature, value in EDITED.items():
            features[..., feature] = value
        return features

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it prefers to be told of the error term elsewhere
        sae.use_error_term = True
        return sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", put)])


def main() -> None:
    """Print what SAELens finds, as JSON."""
    found: dict[str, Any] = {}
    for name, sae in saes().items():
        with torch.no_grad():
            features = sae.encode(states())
        found[name] = {"features": features.tolist(), "edited": hooked(sae, states()).tolist()}
    versions = {key: version(key) for key in ("sae-lens", "transformer-lens", "torch")}
    print(json.dumps({"versions": versions, "saes": found}))


if __name__ == "__main__":
    main()
