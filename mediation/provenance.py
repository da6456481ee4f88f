"""Where a number comes from: model, versions, seed, inputs by hash, cost."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version

from imaginelens.hooks import LatentModel

PACKAGES = ("imaginelens", "torch", "transformers", "nnsight")


@dataclass(frozen=True)
class Provenance:
    """What it takes to say where a study's numbers come from.

    Attributes:
        model: class, and the checkpoint's name if it has one; `revision` its commit.
        inputs: a hash of all token ids and pictures, in order.
        formula: what was estimated.
        forwards, seconds: what it cost.
    """

    model: str
    revision: str
    dtype: str
    device: str
    versions: tuple[tuple[str, str], ...]
    seed: int
    inputs: str
    formula: str
    forwards: int
    seconds: float

    @staticmethod
    def of(
        lens: LatentModel,
        *,
        keys: Iterable[str],
        seed: int,
        formula: str,
        forwards: int,
        seconds: float,
    ) -> "Provenance":
        """Describe a study of `lens` on inputs with these keys (`run.tokens.keys`)."""
        config = lens.model.config
        name = getattr(lens, "name", "") or str(getattr(config, "_name_or_path", ""))
        digest = hashlib.blake2b("/".join(keys).encode(), digest_size=8).hexdigest()
        return Provenance(
            model=" ".join(part for part in (type(lens.model).__name__, name) if part),
            revision=str(getattr(config, "_commit_hash", None) or ""),
            dtype=str(lens.model.dtype).removeprefix("torch."),
            device=str(lens.model.device),
            versions=tuple((package, version(package)) for package in PACKAGES),
            seed=seed,
            inputs=digest,
            formula=formula,
            forwards=forwards,
            seconds=seconds,
        )

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {number}" for name, number in self.versions)
        commit = f" at {self.revision[:8]}" if self.revision else ""
        return (
            f"{self.model}{commit} ({self.dtype}, {self.device}); seed {self.seed}; inputs "
            f"{self.inputs}; {self.forwards} forwards, {self.seconds:.0f} s; {versions}"
        )
