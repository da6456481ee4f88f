"""Captured activations with named axes, addressed as `cache["resid_post", 3]`."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from imaginelens.hooks.appearing import appearing
from imaginelens.hooks.errors import CheckpointError, HookNameError, brief
from imaginelens.hooks.names import get_act_name, match

Key = str | tuple[str, int]


_UNREADABLE = (
    ValueError, TypeError, LookupError, AttributeError, RecursionError, ArithmeticError,
)  # fmt: skip


@dataclass(frozen=True)
class ActivationCache(Mapping[str, torch.Tensor]):
    """Activations by hook name, (example, position, ...), and which columns they were taken at.

    Attributes:
        activations: by name; zeros fill up where examples have unequal numbers of positions.
        columns: for each name the column of every position, (example, position), -1 where filled
            up; absent for sites without token positions (the vision side).
        axes: the names of each activation's axes.
        slots: at the projector, (example, column, row of the activation) of every image token.
        n_layers: of the model, so that layer -1 is its last.
    """

    activations: dict[str, torch.Tensor] = field(default_factory=dict)
    columns: dict[str, Int[torch.Tensor, "example position"]] = field(default_factory=dict)
    axes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    slots: dict[str, Int[torch.Tensor, "token 3"]] = field(default_factory=dict)
    n_layers: int | None = None

    def __getitem__(self, key: Key) -> torch.Tensor:
        """Look up by hook name, or by TransformerLens' short name and layer.

        Raises:
            HookNameError: that site was not captured; the message lists what was.
        """
        return self.activations[self.name(key)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.activations)

    def __len__(self) -> int:
        return len(self.activations)

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, str | tuple):
            return False
        return self._spell(key) in self.activations

    def name(self, key: Key) -> str:
        """Spell a key out as a hook name that this cache holds."""
        name = self._spell(key)
        if name not in self.activations:
            if not self.activations:
                raise HookNameError(
                    f"nothing was captured, so there is no {name!r}; "
                    "pass names_filter=... to lens.run or lens.run_with_cache"
                )
            found = match(self.activations, name)  # raises with the nearest captured names
            raise HookNameError(
                f"{name!r} is a pattern, which {len(found)} captured sites match; name one of them"
            )
        return name

    def _spell(self, key: Key) -> str:
        if isinstance(key, str):
            return key if key in self.activations else get_act_name(key)
        short, layer = key
        if layer < 0 and self.n_layers is not None:
            layer += self.n_layers
        return get_act_name(short, layer)

    def to(self, device: torch.device | str) -> "ActivationCache":
        """The same cache on another device."""
        moved = {name: value.to(device) for name, value in self.activations.items()}
        return ActivationCache(moved, self.columns, self.axes, self.slots, self.n_layers)

    def nbytes(self) -> int:
        """The size of all activations in bytes."""
        return sum(value.numel() * value.element_size() for value in self.activations.values())

    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file and return its path.

        Raises:
            CheckpointError: it cannot be written.
        """
        path = Path(path)
        tensors = {f"values/{n}": v.detach().contiguous().cpu() for n, v in self.items()}
        tensors |= {f"columns/{n}": v.contiguous().cpu() for n, v in self.columns.items()}
        tensors |= {f"slots/{n}": v.contiguous().cpu() for n, v in self.slots.items()}
        meta = json.dumps({"axes": self.axes, "n_layers": self.n_layers})
        with appearing(path) as partial:
            save_file(tensors, partial, metadata={"imaginelens": meta, "format": "pt"})
        return path

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> "ActivationCache":
        """Read a cache that `save` wrote.

        Raises:
            CheckpointError: there is no such file, or it is no safetensors file.
        """
        if not Path(path).is_file():
            raise CheckpointError(f"{path!s} is not a file; pass the path that cache.save returned")
        try:
            return cls._read(path, device)
        except (*_UNREADABLE, SafetensorError) as error:
            raise CheckpointError(
                f"{path!s} is not a cache that can be read ({brief(error)}); make it with "
                "cache.save(path)"
            ) from error

    @classmethod
    def _read(cls, path: str | Path, device: str) -> "ActivationCache":
        groups: dict[str, dict[str, torch.Tensor]] = {"values": {}, "columns": {}, "slots": {}}
        with safe_open(path, framework="pt", device=device) as file:
            meta = json.loads((file.metadata() or {}).get("imaginelens", "{}"))
            for key in file.keys():
                group, name = key.split("/", 1)
                groups[group][name] = file.get_tensor(key)
        axes = {name: tuple(axes) for name, axes in meta.get("axes", {}).items()}
        values, columns, slots = groups.values()
        return cls(values, columns, axes, slots, meta.get("n_layers"))

    def __repr__(self) -> str:
        lines = [f"ActivationCache: {len(self)} sites, {self.nbytes():,} bytes"]
        for name, value in list(self.activations.items())[:8]:
            named = zip(self.axes.get(name, ()), value.shape, strict=False)
            lines.append(f"  {name}: " + ", ".join(f"{axis} {size}" for axis, size in named))
        return "\n".join(lines + (["  ..."] if len(self) > 8 else []))
