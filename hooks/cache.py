"""Captured activations with named axes, addressed as `cache["resid_post", 3]`."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors import safe_open
from safetensors.torch import save_file

from imaginelens.hooks.errors import HookNameError
from imaginelens.hooks.names import get_act_name, match

Key = str | tuple[str, int]


@dataclass(frozen=True)
class ActivationCache(Mapping[str, torch.Tensor]):
    """Activations by hook name, (example, position, ...), and which columns they were taken at.

    Attributes:
        activations: by name; zeros fill up where examples have unequal numbers of positions.
        columns: for each name the column of every position, (example, position), -1 where filled
            up; absent for sites without token positions (the vision side).
        axes: the names of each activation's axes.
    """

    activations: dict[str, torch.Tensor] = field(default_factory=dict)
    columns: dict[str, Int[torch.Tensor, "example position"]] = field(default_factory=dict)
    axes: dict[str, tuple[str, ...]] = field(default_factory=dict)

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
        name = get_act_name(*key) if isinstance(key, tuple) else key
        return name in self.activations

    def name(self, key: Key) -> str:
        """Spell a key out as a hook name that this cache holds."""
        name = get_act_name(*key) if isinstance(key, tuple) else key
        if name not in self.activations and get_act_name(name) in self.activations:
            return get_act_name(name)
        if name not in self.activations:
            if not self.activations:
                raise HookNameError(
                    f"nothing was captured, so there is no {name!r}; "
                    "pass names_filter=... to lens.run or lens.run_with_cache"
                )
            match(self.activations, name)  # raises with the nearest captured names
        return name

    def to(self, device: torch.device | str) -> "ActivationCache":
        """The same cache on another device."""
        moved = {name: value.to(device) for name, value in self.activations.items()}
        return ActivationCache(moved, self.columns, self.axes)

    def nbytes(self) -> int:
        """The size of all activations in bytes."""
        return sum(value.numel() * value.element_size() for value in self.activations.values())

    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file and return its path."""
        path = Path(path)
        tensors = {f"values/{n}": v.detach().contiguous().cpu() for n, v in self.items()}
        tensors |= {f"columns/{n}": v.contiguous().cpu() for n, v in self.columns.items()}
        partial = path.with_name(path.name + ".partial")
        save_file(tensors, partial, metadata={"axes": json.dumps(self.axes), "format": "pt"})
        partial.replace(path)
        return path

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> "ActivationCache":
        """Read a cache that `save` wrote."""
        values: dict[str, torch.Tensor] = {}
        columns: dict[str, torch.Tensor] = {}
        with safe_open(path, framework="pt", device=device) as file:
            meta = json.loads((file.metadata() or {}).get("axes", "{}"))
            for key in file.keys():
                group, name = key.split("/", 1)
                (values if group == "values" else columns)[name] = file.get_tensor(key)
        return cls(values, columns, {name: tuple(axes) for name, axes in meta.items()})

    def __repr__(self) -> str:
        lines = [f"ActivationCache: {len(self)} sites, {self.nbytes():,} bytes"]
        for name, value in list(self.activations.items())[:8]:
            named = zip(self.axes.get(name, ()), value.shape, strict=False)
            lines.append(f"  {name}: " + ", ".join(f"{axis} {size}" for axis, size in named))
        return "\n".join(lines + (["  ..."] if len(self) > 8 else []))
