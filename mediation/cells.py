"""One cell of a map: the sites that are edited together, at one position selector and head."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """A coordinate of a map over sites, layers, positions and heads.

    Attributes:
        site: the kind of site without its layer: "resid_post", "attn_out", "z", "hook_latent".
        layer: of the site, or the first of a window of layers; None where sites have no layer.
        position: the selector, as it is written.
        head: the one head that is edited; None is all of the state.
        sites: the full names of the sites that are edited together.

    >>> Cell("resid_post", 1, "latent[0]", None, ("blocks.1.hook_resid_post",)).layer
    1
    """

    site: str
    layer: int | None
    position: str
    head: int | None
    sites: tuple[str, ...]
