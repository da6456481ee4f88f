"""The families that recur in depth: one entry each.

What an entry says was read from the released code, named beside it; the released checkpoints
themselves are not verified.
"""

from typing import Any

from imaginelens.hooks.depth import DepthSpec
from imaginelens.hooks.errors import SiteUnavailable


def _huginn_spread(config: Any) -> float:
    """Drawn with init_values["std"], cut at three of those, then scaled like the embeddings."""
    noise = getattr(config, "test_time_noise", 0)
    if noise:
        raise SiteUnavailable(
            f"the config has test_time_noise={noise}, which changes the state at random before "
            "each recurrence, so that no run could be read again; set it to 0"
        )
    return float(config.init_values["std"] * config.init_values["embed_scale"])


DEPTH_FAMILIES: dict[str, DepthSpec] = {
    # seal-rg/recurrent-pretraining, recpre/raven_modeling_minimal.py (arXiv 2502.05171): forward,
    # iterate_forward, core_block_forward, initialize_state. Each norm_2 and norm_4 stands on the
    # stream itself. The attention mask is ignored, positions are those of the whole batch, and the
    # class prepares inputs by `cache_position`. Adaptive exit, noise between recurrences
    # (test_time_noise, off) and the continuous chain of thought are left out.
    "huginn": DepthSpec(
        name="huginn",
        model_types=("huginn_raven",),
        embed="transformer.wte",
        prelude="transformer.prelude",
        core="transformer.core_block",
        coda="transformer.coda",
        adapter="transformer.adapter",
        final_norm="transformer.ln_f",
        parts={
            "attention": "attn",
            "attn_out": "attn",
            "o": "attn.proj",
            "mid": "norm_2",
            "mlp": "mlp",
            "mlp_out": "mlp",
            "mlp_down": "mlp.proj",
        },
        steps_key="mean_recurrence",
        spread=_huginn_spread,
        checkpoints=("tomg-group-umd/huginn-0125",),
    ),
}
