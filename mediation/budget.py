"""How many rows fit into a forward: memory that is free, over what a row takes."""

from pathlib import Path

import torch

from imaginelens.hooks import LatentModel
from imaginelens.hooks.structure import Structure

_SHARE = 0.5  # of what is free: other things grow, too
_MOST = 256  # rows; beyond, nothing is gained and a failure costs more


def rows_that_fit(lens: LatentModel, *, width: int, suffix: int) -> int:
    """How many rows of a script may be read at once behind a prefix, from 1 to 256.

    Args:
        width: of the whole script, in columns.
        suffix: how many of them are read again.
    """
    fit = _SHARE * free_bytes(lens.model.device) / bytes_per_row(lens, width=width, suffix=suffix)
    return max(1, min(_MOST, int(fit)))


def bytes_per_row(lens: LatentModel, *, width: int, suffix: int) -> int:
    """What a row holds at most while it is read: its cache, the states of one block, its logits."""
    of: Structure = lens.structure
    config = lens.model.config.get_text_config(decoder=True)
    d_head = getattr(config, "head_dim", None) or of.d_model // of.n_heads
    d_mlp = getattr(config, "intermediate_size", None) or 4 * of.d_model
    kept = 2 * len(of.blocks) * of.n_kv_heads * d_head * width
    in_block = suffix * (6 * of.d_model + 3 * int(d_mlp)) + 2 * of.n_heads * d_head * width
    size = next(lens.model.parameters()).element_size()
    return size * (kept + in_block) + 16 * of.d_vocab


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    told = Path("/proc/meminfo")
    if not told.is_file():  # not Linux: a small machine
        return 4 * 2**30
    lines = dict(line.split(":", 1) for line in told.read_text().splitlines() if ":" in line)
    return int(lines["MemAvailable"].split()[0]) * 1024
