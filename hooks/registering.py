"""Where an odd class keeps its parts, said by its user: what neither accessor nor name tells."""

from collections.abc import Mapping

from imaginelens.hooks.errors import InputError

# What a whole model holds, by paths in the model; and what a block holds, by paths in the block.
WHOLE = ("decoder", "embed", "blocks", "final_norm", "head", "vision", "projector")
PARTS = (
    "attention",
    "attn_out",
    "mlp",
    "mlp_out",
    "mid",
    "q",
    "k",
    "v",
    "o",
    "mlp_pre",
    "mlp_down",
)

_REGISTERED: dict[str, dict[str, str]] = {}


def register_structure(
    model_type: str,
    *,
    decoder: str | None = None,
    embed: str | None = None,
    blocks: str | None = None,
    final_norm: str | None = None,
    head: str | None = None,
    vision: str | None = None,
    projector: str | None = None,
    **parts: str,
) -> None:
    """Say where models of a type keep their parts, for those that `il.LatentModel` does not find.

    Name only what is not found; a second call for the same type replaces the first. Whether the
    paths exist is checked when a model of that type is wrapped.

    Args:
        model_type: the type in the model's config, `model.config.model_type`.
        decoder: path of the module that runs the blocks; by default the one that holds `blocks`.
        embed: path of the token embedding.
        blocks: path of the list of decoder blocks.
        final_norm: path of the norm before the head: its output is what is fed back.
        head: path of the output head.
        vision: path of the vision tower.
        projector: path of the module whose output is written over the image tokens.
        parts: paths within a block: `attention`, `attn_out` (the module whose output is added to
            the stream), `mid` (whose input is the stream between attention and MLP), `mlp`,
            `mlp_out`, `q`, `k`, `v`, `o`, `mlp_pre`, `mlp_down`.

    Raises:
        InputError: no path is given, or one is no path, or there is no such part.

    >>> register_structure("odd", blocks="trunk.cells", final_norm="trunk.last", mlp="think")
    >>> registered("odd")["mlp"]
    'think'
    """
    given = {
        "decoder": decoder,
        "embed": embed,
        "blocks": blocks,
        "final_norm": final_norm,
        "head": head,
        "vision": vision,
        "projector": projector,
        **parts,
    }
    paths = {name: path for name, path in given.items() if path is not None}
    if not isinstance(model_type, str) or not model_type:
        raise InputError(
            f"a model type is a name, not {model_type!r}; pass model.config.model_type"
        )
    if not paths:
        raise InputError(
            f"register_structure({model_type!r}) names no part; name at least one of "
            f"{', '.join(WHOLE)}"
        )
    for name, path in paths.items():
        if name not in (*WHOLE, *PARTS):
            raise InputError(
                f"{name!r} is no part that register_structure knows; a model has "
                f"{', '.join(WHOLE)}, a block has {', '.join(PARTS)}"
            )
        if not isinstance(path, str) or not all(path.split(".")):
            raise InputError(
                f"{name}={path!r} is no path; write it as in model.named_modules(), "
                "like 'model.language_model.layers'"
            )
    _REGISTERED[model_type] = paths


def registered(model_type: str) -> Mapping[str, str]:
    """What was said of a model type: paths by part, empty where nothing was said."""
    return _REGISTERED.get(model_type, {})
