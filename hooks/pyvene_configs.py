"""pyvene's intervention configs in our words, and ours in pyvene's; pyvene need not be installed.

pyvene (Wu et al. 2024, arXiv 2403.07809) names a component of a layer, a unit and a type of
intervention, and says at each call where in the sources and the base it acts. Here the same config
acts on any model of ours, with pictures and latents, and with a landing for every intervention.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from imaginelens.hooks.edits import Act, Constant, Edit, EditContext, Steer, Swap, Zero
from imaginelens.hooks.entries import CaptureEntry, Entry
from imaginelens.hooks.errors import ImagineLensError, InputError, brief, quoted
from imaginelens.hooks.landing import Landing
from imaginelens.hooks.pyvene_places import donor_at, one_each, places_of, subspaces_of
from imaginelens.hooks.sites import Site
from imaginelens.hooks.states import Donor, pad
from imaginelens.hooks.textedits import edit_entry

if TYPE_CHECKING:
    from imaginelens.hooks.model import LatentModel

# Of a representation, in the order in which a saved config lists them.
_ODD = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
FIELDS = (
    "layer", "component", "unit", "max_number_of_units", "low_rank_dimension",
    "intervention_type", "intervention", "subspace_partition", "group_key",
    "intervention_link_key", "moe_key", "source_representation", "hidden_source_representation",
    "latent_dim",
)  # fmt: skip
_USUAL = {"layer": 0, "component": "block_output", "unit": "pos", "max_number_of_units": 1}
# Which part of a block a component is, and at which end of it; `head_` before it counts heads.
COMPONENTS = {
    "block_input": ("path", "input"),
    "block_output": ("path", "output"),
    "attention_output": ("attention", "output"),
    "attention_value_output": ("o", "input"),
    "query_output": ("q", "output"),
    "key_output": ("k", "output"),
    "value_output": ("v", "output"),
    "mlp_output": ("mlp", "output"),
}
_WITHOUT = {
    "mlp_input": "it lies behind a norm; edit hook_resid_mid or hook_mlp_out instead",
    "attention_input": "it lies behind a norm; edit hook_resid_pre, or q, k and v, instead",
    "mlp_activation": "where the MLP is gated it is no state of its own; edit mlp.hook_pre or "
    "mlp.hook_post instead",
}  # fmt: skip
_ROTATED = ("RotatedSpaceIntervention", "LowRankRotatedSpaceIntervention")
_SWAPPED = ("VanillaIntervention", *_ROTATED)
_ADDED = {"AdditionIntervention": 1.0, "SubtractionIntervention": -1.0}
KINDS = (*_SWAPPED, *_ADDED, "ZeroIntervention", "CollectIntervention")


@dataclass(frozen=True, eq=False)
class Intervention:
    """One intervention of a pyvene config, at a site of ours.

    Attributes:
        site: the name of the site.
        kind: the type of the intervention, as pyvene names it.
        by_head: whether it acts on single heads (the unit `h.pos`).
        source: the constant that is put in; None takes the states of a source.
        rotation: (d_model, rank) of rotated interventions, once they are trained.
        partition: the subspaces that `subspaces` counts, as dimensions; None counts dimensions.
        width: of the state, how many dimensions it changes; None is all.
    """

    site: str
    kind: str
    by_head: bool = False
    source: torch.Tensor | None = None
    rotation: torch.Tensor | None = None
    partition: tuple[tuple[int, ...], ...] | None = None
    width: int | None = None

    @property
    def needs_source(self) -> bool:
        """Whether it takes the states of a source run."""
        return self.source is None and self.kind in (*_SWAPPED, *_ADDED)

    def edit(self, donor: Donor | None = None, subspace: Sequence[int] | None = None) -> Edit:
        """The same as an edit of ours.

        Raises:
            InputError: it reads only, or its source or rotation is missing.
        """
        if self.kind == "CollectIntervention":
            raise InputError("a CollectIntervention edits nothing; read found.collected instead")
        if self.needs_source and donor is None:
            raise InputError(f"{self.kind} at {self.site} takes states of a source; pass sources=")
        if self.kind in _ROTATED:
            if self.rotation is None:
                raise InputError(
                    f"{self.kind} at {self.site} has no rotation yet; pass the trained "
                    "IntervenableModel, or the folder it was saved in"
                )
            assert donor is not None
            columns = self._dimensions(subspace, self.rotation.shape[1])
            return _Rotated(donor, self.rotation[:, list(columns)])
        whole = self._whole(donor)
        if subspace is None and self.width is None:
            return whole
        return _Part(whole, tuple(self._dimensions(subspace, self.width)))

    def _whole(self, donor: Donor | None) -> Edit:
        if self.kind == "ZeroIntervention":
            return Zero()
        if self.kind in _ADDED:
            scale = _ADDED[self.kind]
            if self.source is not None:
                return Steer(self.source, scale)
            assert donor is not None
            return _Added(donor, scale)
        if self.source is not None:
            return Constant(self.source)
        assert donor is not None
        return Swap(donor)

    def _dimensions(self, subspace: Sequence[int] | None, width: int | None) -> Sequence[int]:
        if subspace is None:
            assert width is not None
            return range(width)
        parts = self.partition
        if parts is None:
            return tuple(subspace)
        if max(subspace) >= len(parts):
            raise InputError(
                f"subspaces names subspace {max(subspace)} of {self.kind} at {self.site}, which is "
                f"divided into {len(parts)}"
            )
        return tuple(dimension for number in subspace for dimension in parts[number])


@dataclass(frozen=True)
class Found:
    """What interventions did while they were active: `landings`, by their order in the config, and
    `collected` the states that were only read, (example, position, d_model) of each."""

    landings: tuple[Landing, ...]
    _reads: tuple[CaptureEntry, ...] = field(repr=False)

    @property
    def collected(self) -> list[torch.Tensor]:
        """What each CollectIntervention read, in the order of example and position."""
        found = []
        for entry in self._reads:
            cells = sorted(entry.cells.get(entry.sites[0], []), key=lambda cell: cell[:2])
            rows = sorted({row for row, *_ in cells})
            states = [torch.stack([z for r, _, z in cells if r == row]) for row in rows]
            found.append(pad([z.flatten(1) for z in states]).values)
        return found


@dataclass(frozen=True)
class Interventions:
    """The interventions of a config, on one model."""

    lens: "LatentModel" = field(repr=False)
    parts: tuple[Intervention, ...]

    def __iter__(self) -> Iterator[Intervention]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> Intervention:
        return self.parts[number]

    @contextmanager
    def active(
        self,
        unit_locations: Mapping[str, Any],
        sources: Sequence[Any] | None = None,
        subspaces: Any = None,
    ) -> Iterator[Found]:
        """Make them act in a block, on whatever runs in it.

        Args:
            unit_locations: where, as in pyvene: `{"sources->base": 4}`, `{"sources->base": (3, 4)}`
                and lists of columns by intervention, example and unit; `{"base": ...}` where there
                are no sources. In place of columns any selector, such as `il.latent[0]`.
            sources: an input or `Run` for each intervention that takes one, or one for all.
            subspaces: numbers of subspaces or dimensions, the same in all examples.

        Raises:
            InputError: locations, sources or subspaces do not fit the config.
            EditTouchedNothing: a run in the block was not touched.
        """
        places = places_of(unit_locations, self.parts)
        given = iter(one_each(sources, sum(part.needs_source for part in self.parts)))
        chosen = subspaces_of(subspaces, len(self.parts))
        entries: list[Entry] = []
        for part, place, subspace in zip(self.parts, places, chosen, strict=True):
            if part.kind == "CollectIntervention":
                entries.append(CaptureEntry((part.site,), place.base.resolve))
                continue
            source = next(given) if part.needs_source else None
            donor = None if source is None else donor_at(self.lens, part.site, place, source)
            edit = part.edit(donor, subspace)
            entries.append(edit_entry(edit, place.base, (part.site,), heads=place.heads))
        landings = tuple(e.landing for e in entries if not isinstance(e, CaptureEntry))  # type: ignore[attr-defined]
        reads = tuple(e for e in entries if isinstance(e, CaptureEntry))
        with self.lens.registry.scope(entries):
            yield Found(landings, reads)


def from_pyvene(lens: "LatentModel", config: Any) -> Interventions:
    """Read a pyvene config for a model of ours.

    Args:
        config: a dict (`{"representations": [...], "intervention_types": "VanillaIntervention"}`),
            a representation or a list of them, a folder that `IntervenableModel.save` wrote, or
            pyvene's own IntervenableConfig or IntervenableModel, with its trained rotations.

    Raises:
        InputError: a component, unit or type has no counterpart, and which has.

    >>> import imaginelens as il
    >>> lens = il.load("latent-content")
    >>> task = lens.task(n=1, seed=0)
    >>> swaps = from_pyvene(lens, {"layer": 1, "component": "block_output"})
    >>> swaps[0].site
    'blocks.1.hook_resid_post'
    >>> with swaps.active({"sources->base": 4}, sources=task.source) as found:
    ...     logits, _ = lens.run_with_cache(task.base)
    >>> found.landings[0].positions
    {0: [4]}
    """
    if not isinstance(config, str | Path):
        return _read(lens, config)
    try:
        return _read(lens, config)
    except ImagineLensError:
        raise
    except (*_ODD, RuntimeError) as error:
        raise InputError(
            f"the config in {str(config)!r} is not as IntervenableModel.save wrote it "
            f"({brief(error)}); save it again"
        ) from error


def _read(lens: "LatentModel", config: Any) -> Interventions:
    representations, types, weights, dimensions = _opened(config)
    if len(types) != len(representations):
        raise InputError(
            f"{len(types)} intervention types were given for {len(representations)} "
            "representations; give one, or one each"
        )
    return Interventions(
        lens,
        tuple(
            _intervention(lens, representation, kind, held, width)
            for representation, kind, held, width in zip(
                representations, types, weights, dimensions, strict=True
            )
        ),
    )


def to_pyvene(lens: "LatentModel", edits: Sequence[tuple[str, Edit]]) -> dict[str, Any]:
    """Edits of ours as a pyvene config.

    `pv.IntervenableConfig` wants classes for types: `[getattr(pv, name) for name in
    config["intervention_types"]]`. What a `Swap` takes from where is said to pyvene at the call.

    Args:
        edits: (site, edit), each `il.Swap`, `il.Zero`, `il.Constant(value)` or `il.Steer`.

    Raises:
        InputError: a site or an edit has no counterpart in pyvene.

    >>> import imaginelens as il
    >>> config = to_pyvene(il.load("latent-content"), [("blocks.1.hook_mlp_out", il.Zero())])
    >>> config["representations"], config["intervention_types"]
    ([{'layer': 1, 'component': 'mlp_output', 'unit': 'pos'}], ['ZeroIntervention'])
    """
    representations, types = [], []
    for name, edit in edits:
        site = lens.registry[name]
        layer, component = _component(lens, site)
        representation = {"layer": layer, "component": component, "unit": "pos"}
        kind, constant = _kind(edit, name)
        if constant is not None:
            representation["source_representation"] = constant
        representations.append(representation)
        types.append(kind)
    return {"representations": representations, "intervention_types": types, "mode": "parallel"}


# ---- reading a config --------------------------------------------------------------------------


def _opened(
    config: Any,
) -> tuple[list[dict[str, Any]], list[str], list[Mapping[str, Any]], list[Any]]:
    """A config's representations, types, trained weights and dimensions, one of each in order."""
    weights: list[Mapping[str, Any]] | None = None
    if isinstance(config, str | Path):
        config, weights = _saved(Path(config))
    trained = getattr(config, "interventions", None)
    if trained is not None:  # an IntervenableModel
        weights = [held.state_dict() for held in trained.values()]
        config = config.config
    if not isinstance(config, Mapping | list | tuple) and hasattr(config, "representations"):
        config = {
            name: getattr(config, name, None)
            for name in ("representations", "intervention_types", "mode", "intervention_dimensions")
        }
    if isinstance(config, list | tuple) and not hasattr(config, "_asdict"):
        config = {"representations": list(config)}
    if not isinstance(config, Mapping) or "representations" not in config:
        config = {"representations": [config]}
    mode = config.get("mode") or "parallel"
    if mode != "parallel":
        raise InputError(
            f"the config's mode is {quoted(mode)}: sources that are edited themselves have no "
            "counterpart; run them one after the other, and give the last run as the source"
        )
    listed = config["representations"]
    listed = listed if isinstance(listed, list | tuple) and not _is_one(listed) else [listed]
    found = [_representation(one) for one in listed]
    if not found:
        raise InputError("the config has no representations; give at least one")
    types = config.get("intervention_types")
    usual = types if isinstance(types, list | tuple) else [types] * len(found)
    named = [
        _type_name(one["intervention_type"] or _type_of(one["intervention"]) or kind)
        for one, kind in zip(found, usual, strict=len(usual) == len(found))
    ]
    dimensions = config.get("intervention_dimensions") or [None] * len(found)
    return found, named, weights or [{}] * len(found), list(dimensions)


def _saved(folder: Path) -> tuple[dict[str, Any], list[Mapping[str, Any]]]:
    """A folder that `IntervenableModel.save` wrote."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"{str(folder)!r} holds no config.json; pass a folder that IntervenableModel.save wrote"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        keys = config.get("sorted_keys") or []
        names = [f"intkey_{key}.bin" for key in keys]
        if odd := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{odd[0]!r} is no name of a file beside it")
        weights = [_weights(folder / name) for name in names]
    except InputError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{str(path)!r} is no config that IntervenableModel.save wrote ({brief(error)}); save "
            "it again"
        ) from error
    return config, weights


def _weights(file: Path) -> Mapping[str, Any]:
    """What an intervention has learned; nothing where it has no file."""
    if not file.is_file():
        return {}
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises errors of all kinds
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{str(file)!r} cannot be read as tensors alone, and a pickle of anything else could "
            f"run code ({brief(why)}); save the interventions again"
        ) from error
    if not isinstance(found, Mapping):
        raise InputError(
            f"{str(file)!r} holds a {type(found).__name__}, not tensors by name; save the "
            "interventions again"
        )
    return found


def _is_one(given: Any) -> bool:
    """Whether it is one representation: named, or a list of its fields."""
    return hasattr(given, "_asdict") or (len(given) > 1 and isinstance(given[1], str))


def _representation(given: Any) -> dict[str, Any]:
    if hasattr(given, "_asdict"):
        given = given._asdict()
    if isinstance(given, list | tuple):
        given = dict(zip(FIELDS, given, strict=False))
    if not isinstance(given, Mapping):
        raise InputError(
            f"a representation is {quoted(given)}, expected a dict such as "
            "{'layer': 1, 'component': 'block_output'}"
        )
    unknown = [name for name in given if name not in FIELDS]
    if unknown:
        raise InputError(
            f"a representation has {brief(', '.join(map(repr, unknown)))}, which is not among "
            f"{', '.join(FIELDS)}"
        )
    return {**dict.fromkeys(FIELDS), **_USUAL, **given}


def _type_of(intervention: Any) -> Any:
    return None if intervention is None else type(intervention)


def _type_name(given: Any) -> str:
    """The name of a type: a class, its name, or how a saved config prints it."""
    if given is None:
        return "VanillaIntervention"
    name = given.__name__ if isinstance(given, type) else str(given)
    return name.removeprefix("<class '").removesuffix("'>").rpartition(".")[2]


def _intervention(
    lens: "LatentModel",
    representation: Mapping[str, Any],
    kind: str,
    weights: Mapping[str, Any],
    width: Any,
) -> Intervention:
    component, unit = representation["component"], representation["unit"]
    if kind not in KINDS:
        raise InputError(
            f"{brief(kind)} has no counterpart; those that have are {', '.join(KINDS)}. A SAE's "
            "features are edited with il.Features, noise is il.AddNoise, a function is a hook "
            "function"
        )
    by_head = str(component).startswith("head_")
    if unit != ("h.pos" if by_head else "pos"):
        raise InputError(
            f"the unit {quoted(unit)} of component {quoted(component)} has no counterpart; use "
            "'pos', or 'h.pos' with a head_ component"
        )
    for name in ("group_key", "moe_key"):
        if representation[name] is not None:
            raise InputError(f"a representation's {name} has no counterpart; leave it out")
    if kind in _ROTATED and (by_head or representation["max_number_of_units"] != 1):
        raise InputError(
            f"{kind} over several units, or in heads, rotates them joined into one state, which "
            "has no counterpart; use one unit, with component 'block_output' or the like"
        )
    if by_head and kind == "CollectIntervention":
        raise InputError("CollectIntervention in heads: collect the component without 'head_'")
    site = _site(lens, representation)
    source = representation["source_representation"]
    source = weights.get("source_representation", source)
    if source is None and representation["hidden_source_representation"]:
        raise InputError(
            f"the config says that the source of {kind} at {site.name} is a constant, and does not "
            "hold it; pass the folder it was saved in, or source_representation="
        )
    if source is not None and site.heads is not None and source.dim() == 1:
        source = source.unflatten(0, (site.heads, -1)) if not by_head else source
    partition = representation["subspace_partition"]
    held = weights.get("interchange_dim", width)
    return Intervention(
        site=site.name,
        kind=kind,
        by_head=by_head,
        source=source,
        rotation=_rotation(weights) if kind in _ROTATED else None,
        partition=None if partition is None else tuple(_expanded(part) for part in partition),
        width=None if held is None or by_head or int(held) >= _width(lens, site) else int(held),
    )


def _site(lens: "LatentModel", representation: Mapping[str, Any]) -> Site:
    """The site that a component is, found by the module that carries it."""
    component, layer = str(representation["component"]), representation["layer"]
    plain = component.removeprefix("head_")
    blocks = lens.structure.blocks
    if plain in _WITHOUT:
        raise InputError(f"component {quoted(component)} has no site: {_WITHOUT[plain]}")
    if plain in COMPONENTS:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < len(blocks):
            raise InputError(f"layer is {quoted(layer)}, and the layers are 0 to {len(blocks) - 1}")
        part, end = COMPONENTS[plain]
        path = getattr(blocks[layer], part)
    else:  # a module's own path, as in "model.layers[1].mlp.output"
        path, _, end = component.replace("[", ".").replace("]", "").rpartition(".")
    for site in lens.registry.values():
        if site.path == path and site.kind.slot == end and site.call == 0:
            return site
    known = ", ".join([*COMPONENTS, *(f"head_{name}" for name in list(COMPONENTS)[3:7])])
    raise InputError(
        f"component {quoted(component)} is no site of {type(lens.model).__name__}"
        + (f", where it would be the {end} of {path or 'no module'}" if plain in COMPONENTS else "")
        + f"; components are {known}, or a module's path with .input or .output"
    )


def _component(lens: "LatentModel", site: Site) -> tuple[int, str]:
    """The layer and component of a site, in pyvene's words."""
    if site.layer is not None and not site.is_vision and site.layer < len(lens.structure.blocks):
        block = lens.structure.blocks[site.layer]
        for name, (part, end) in COMPONENTS.items():
            if getattr(block, part) == site.path and end == site.kind.slot:
                return site.layer, name
    if site.kind.slot not in ("input", "output") or site.call:
        raise InputError(
            f"{site.name!r} has no counterpart in pyvene, which acts at the input or output of a "
            "module; use a site such as 'blocks.0.hook_resid_post'"
        )
    parts = [f"[{part}]" if part.isdigit() else f".{part}" for part in site.path.split(".")]
    return site.layer or 0, "".join(parts).removeprefix(".") + f".{site.kind.slot}"


def _kind(edit: Edit, site: str) -> tuple[str, torch.Tensor | None]:
    if type(edit) is Swap:
        return "VanillaIntervention", None
    if type(edit) is Zero:
        return "ZeroIntervention", None
    if type(edit) is Constant and edit.value is not None:
        return "VanillaIntervention", edit.value.flatten()
    if type(edit) is Steer:
        return "AdditionIntervention", (edit.scale * edit.direction).flatten()
    raise InputError(
        f"{type(edit).__name__} at {site!r} has no counterpart in pyvene; il.Swap, il.Zero, "
        "il.Constant(value) and il.Steer have"
    )


def _width(lens: "LatentModel", site: Site) -> int:
    module = lens.model.get_submodule(site.path)
    if isinstance(module, nn.Linear):
        return module.in_features if site.kind.slot == "input" else module.out_features
    return lens.structure.d_model


def _rotation(weights: Mapping[str, Any]) -> torch.Tensor | None:
    """The orthogonal weight of a saved rotation: torch keeps it as a parametrization."""
    own = {
        name.removeprefix("rotate_layer."): value
        for name, value in weights.items()
        if name.startswith("rotate_layer.")
    }
    if "weight" in own:
        return torch.as_tensor(own["weight"]).detach()
    if "parametrizations.weight.original" not in own:
        return None
    layer = nn.Module()
    shape = own["parametrizations.weight.original"].shape
    layer.weight = nn.Parameter(
        torch.eye(*shape, dtype=own["parametrizations.weight.original"].dtype)
    )
    nn.utils.parametrizations.orthogonal(layer)
    layer.load_state_dict(own)
    return torch.as_tensor(layer.weight).detach()


def _expanded(part: Sequence[int]) -> tuple[int, ...]:
    """A subspace: two numbers are the ends of a range."""
    if len(part) != 2:
        return tuple(part)
    start, stop = part
    if not 0 <= start < stop <= 10**6:  # wider than any model
        raise InputError(
            f"a subspace goes from {quoted(start)} to {quoted(stop)}; give dimensions from 0, the "
            "end behind the last"
        )
    return tuple(range(start, stop))


# ---- what it does ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Taking(Edit):
    """An edit that takes the states of a source, row by row."""

    lines_up = True

    donor: Donor

    @property
    def given(self) -> Donor | None:
        return self.donor

    def taken(self, act: Act, ctx: EditContext) -> Act:
        """The source's states of these cells."""
        return Swap(self.donor).apply(act, ctx)


@dataclass(frozen=True)
class _Added(_Taking):
    """Adds the source's states."""

    scale: float

    def apply(self, act: Act, ctx: EditContext) -> Act:
        return act + self.scale * self.taken(act, ctx)


@dataclass(frozen=True)
class _Rotated(_Taking):
    """Sets what the states hold in the span of orthonormal directions to what the source holds."""

    basis: torch.Tensor

    def apply(self, act: Act, ctx: EditContext) -> Act:
        flat, source = act.flatten(1), self.taken(act, ctx).flatten(1)
        if flat.shape[1] != len(self.basis):
            raise InputError(
                f"a rotation of width {len(self.basis)} cannot act on states of width "
                f"{flat.shape[1]} at {ctx.site}"
            )
        basis = self.basis.to(flat)
        return (flat + (source - flat) @ basis @ basis.T).reshape(act.shape)


@dataclass(frozen=True)
class _Part(Edit):
    """Another edit, in some dimensions of the state."""

    lines_up = True

    whole: Edit
    dimensions: tuple[int, ...]

    @property
    def given(self) -> Donor | None:
        return self.whole.given

    def apply(self, act: Act, ctx: EditContext) -> Act:
        new, changed = act.flatten(1).clone(), self.whole.apply(act, ctx).flatten(1)
        if max(self.dimensions) >= new.shape[1]:
            raise InputError(
                f"subspaces name dimension {max(self.dimensions)} of states of width "
                f"{new.shape[1]} at {ctx.site}"
            )
        new[:, list(self.dimensions)] = changed[:, list(self.dimensions)]
        return new.reshape(act.shape)
