"""Latents that were recorded elsewhere: in another process, by vLLM, or by the authors' own code.

A recording is one tensor (step, d_model) for each sample, under the sample's id. It is a donor like
a run, without a model: `il.Swap(recorded)`. Files that may hold code (pickles) are read as plain
tensors and words, or refused.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from imaginelens.hooks.appearing import appearing
from imaginelens.hooks.errors import CheckpointError, DonorError, brief, quoted
from imaginelens.hooks.positions import LatentPositions, Positions
from imaginelens.hooks.run import Run
from imaginelens.hooks.states import States, pad
from imaginelens.hooks.tokens import TokenMap

VERSION = 1
HEADER = "imaginelens_latents"
READ = (".safetensors", ".pt", ".pth", ".json")
# how Monet's precompute_teacher_latents.py names its files, and how many layers each holds
MONET = ("latent_last_layer_", "latent_all_layers_", "latent_")
FAR = 2.0  # times as far from its own row's latents as from another's: not this row's


@dataclass(frozen=True, repr=False, eq=False)
class Latents:
    """Recorded latents by the id of their sample, in the order of the rows they go into.

    As a donor, row i of the recording goes into row i of the run, or its only row into all:
    `lens.edit(il.Swap(recorded), at=il.latent)`. Put it in order with `select` or `aligned`, and
    hold it against your model with `check`.

    Attributes:
        samples: by id, (step, d_model), as they were fed back.
        spans: the span of each step, by id, where that was recorded.
        keys_of: what identifies each sample's input, by id, where that was recorded: as
            `run.tokens.keys`.
        first: the step at which the first state of every sample was fed. A recording of what the
            last layer put out at latent positions begins at step 1: what is put out at one step is
            fed at the next.
        origin: where the recording is from.

    Raises:
        DonorError: there are no samples, or they are not (step, d_model) of one width and dtype.

    >>> recorded = Latents({"a": torch.zeros(2, 4), "b": torch.ones(2, 4)})
    >>> recorded
    Latents of 2 samples, 2 steps of width 4, torch.float32
    >>> recorded.select(["b", "a"]).ids
    ('b', 'a')
    """

    samples: Mapping[str, Float[torch.Tensor, "step d_model"]]
    spans: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    keys_of: Mapping[str, str] = field(default_factory=dict)
    first: int = 0
    origin: str = ""

    def __post_init__(self) -> None:
        if not self.samples:
            raise DonorError("the recording has no samples; give at least one, {id: tensor}")
        if self.first < 0:
            raise DonorError(f"first is {self.first}; steps are counted from 0")
        kinds: dict[tuple[int, torch.dtype, torch.device], str] = {}
        for name, states in self.samples.items():
            if not isinstance(states, torch.Tensor) or states.dim() != 2:
                shape = tuple(getattr(states, "shape", ()))
                raise DonorError(
                    f"sample {quoted(name)} is a {type(states).__name__} of shape {shape}, "
                    "expected a tensor (step, d_model)"
                )
            odd = int((~states.isfinite()).sum())
            if odd or not states.is_floating_point():
                raise DonorError(
                    f"sample {quoted(name)} is of {states.dtype} with {odd} values that are not "
                    "finite; a recording has finite floats"
                )
            kinds.setdefault((states.shape[1], states.dtype, states.device), name)
        if len(kinds) > 1:
            told = ", ".join(f"{n!r} width {w} in {d} on {v}" for (w, d, v), n in kinds.items())
            raise DonorError(f"the samples differ: {brief(told)}; record all with one model")
        for name, numbers in self.spans.items():
            if name not in self.samples or len(numbers) != len(self.samples[name]):
                raise DonorError(
                    f"spans has {len(numbers)} numbers for sample {name!r}; give one for each step"
                )

    # ---- where they come from ------------------------------------------------------------------

    @staticmethod
    def of(run: Run, *, ids: Sequence[str] | None = None) -> "Latents":
        """Take the latents of a run, to save them or to use them without it.

        Args:
            ids: one for each example; "0", "1" and so on if left out.

        Raises:
            DonorError: ids are not one each, or the run's latents are written tokens.
        """
        if run.trigger.written:
            raise DonorError(
                "nothing was fed back in this run, whose latents are written tokens; save the "
                "states of a site with run.cache.save(path)"
            )
        names = [str(row) for row in range(len(run))] if ids is None else list(map(str, ids))
        if len(set(names)) != len(run):
            raise DonorError(
                f"{len(names)} ids, {len(set(names))} of them different, were given for "
                f"{len(run)} examples; give each its own"
            )
        counts = [int(n) for n in run.latent_mask.sum(1)]
        rows = list(enumerate(zip(names, counts, strict=True)))
        return Latents(
            {name: run.latents[row, :n].detach().clone() for row, (name, n) in rows},
            {name: tuple(run.latent_span[row, :n].tolist()) for row, (name, n) in rows},
            dict(zip(names, run.tokens.keys, strict=True)),
            origin="a run of imaginelens",
        )

    @staticmethod
    def from_steps(
        trajectories: Mapping[str, Any],
        *,
        dtype: torch.dtype | None = None,
        first: int = 0,
        origin: str = "",
    ) -> "Latents":
        """Take what a recorder collected: for each request the vectors of its steps, as lists,
        arrays or tensors; None, or an empty list, where a request fed nothing back.

        This is what `LatentRecorder.get_all()` and `.get_all_tensors()` of Monet's vLLM patch give.

        Args:
            dtype: of the states; that of the tensors, or float32, if left out. Monet's recorder
                rounds to float16.

        Raises:
            DonorError: the steps of a request are not vectors of one width.

        >>> Latents.from_steps({"0_7": [[0.0, 1.0], [1.0, 0.0]], "1_7": []}).counts()
        [2, 0]
        """
        found = {str(name): _stacked(name, steps) for name, steps in trajectories.items()}
        widths = {each.shape[1] for each in found.values() if each is not None}
        width = widths.pop() if len(widths) == 1 else 0
        kind = next((each.dtype for each in found.values() if each is not None), torch.float32)
        filled = {
            name: torch.zeros(0, width, dtype=kind) if each is None else each
            for name, each in found.items()
        }
        recorded = Latents(filled, first=first, origin=origin)
        return recorded if dtype is None else recorded.to(dtype=dtype)

    @staticmethod
    def load(
        path: str | Path,
        *,
        layer: int | None = None,
        first: int = 0,
        dtype: torch.dtype | None = None,
    ) -> "Latents":
        """Read a recording from a file, or from a folder with a file for each sample.

        Read are what `save` wrote; safetensors with a tensor (step, d_model) for each id; JSON of
        `{id: [[...], ...]}`; and `.pt` files of tensors, such as Monet's
        `latent_last_layer_<dataset>_<sample>.pt`, whose ids then are `<dataset>_<sample>`.

        Args:
            layer: which layer, where files hold (layer, step, d_model), as Monet's
                `latent_all_layers_*.pt` do; -1 is the last.
            first: the step at which each first state was fed; see the class.
            dtype: convert to this; recordings are often in bfloat16 or float16.

        Raises:
            CheckpointError: there is no such file, it cannot be read, or it is a pickle of more
                than tensors and words.
            DonorError: it holds something else than latents, or a file's name is not its sample's.
        """
        source = Path(path)
        if source.is_dir():
            files = sorted(f for f in source.iterdir() if f.suffix in READ and f.is_file())
            if not files:
                raise CheckpointError(
                    f"{source!s} has no file that ends in {', '.join(READ)}; give the folder of a "
                    "recording"
                )
        else:
            files = [source]
        parts = [_read(file, layer) for file in files]
        samples: dict[str, torch.Tensor] = {}
        for file, part in zip(files, parts, strict=True):
            again = sorted(set(samples) & set(part.samples))
            if again:
                raise DonorError(f"{file.name} holds sample {again[0]!r} a second time; keep one")
            samples |= part.samples
        recorded = replace(
            parts[0],
            samples=samples,
            spans={name: span for part in parts for name, span in part.spans.items()},
            keys_of={name: key for part in parts for name, key in part.keys_of.items()},
            first=parts[0].first or first,
        )
        return recorded if dtype is None else recorded.to(dtype=dtype)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file and return its path; ids, spans and keys are in its header.

        >>> import tempfile
        >>> recorded = Latents({"a": torch.ones(2, 4)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Latents.load(recorded.save(Path(folder) / "latents.safetensors"))["a"].sum()
        tensor(8.)
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path!s} should end in .safetensors, the format it gets")
        words = {
            "version": VERSION,
            "ids": list(self.samples),
            "spans": {name: list(spans) for name, spans in self.spans.items()},
            "keys": dict(self.keys_of),
            "first": self.first,
            "origin": self.origin,
        }
        tensors = {str(i): each.contiguous().cpu() for i, each in enumerate(self.samples.values())}
        path.parent.mkdir(parents=True, exist_ok=True)
        with appearing(path) as partial:
            save_file(tensors, partial, metadata={HEADER: json.dumps(words), "format": "pt"})
        return path

    # ---- what they are -------------------------------------------------------------------------

    def __getitem__(self, name: str) -> torch.Tensor:
        """The states of one sample, (step, d_model)."""
        return self.samples[self._known(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of the samples, in the order of rows."""
        return tuple(self.samples)

    @property
    def width(self) -> int:
        """The size of a state."""
        return int(next(iter(self.samples.values())).shape[1])

    def counts(self) -> list[int]:
        """How many states each sample has."""
        return [len(states) for states in self.samples.values()]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Latents":
        """The same recording on another device or in another precision.

        An edit casts nothing by itself: `recorded.to(lens.model.device, lens.model.dtype)`.
        """
        moved = {n: each.to(device=device, dtype=dtype) for n, each in self.samples.items()}
        return replace(self, samples=moved)

    def select(self, ids: Sequence[str]) -> "Latents":
        """Some samples by id, in this order: that of the rows they go into.

        Raises:
            DonorError: an id is not in the recording, or named twice.
        """
        if isinstance(ids, str):
            raise DonorError(f"ids is the text {ids!r}, expected a list of ids; write [{ids!r}]")
        names = [self._known(name) for name in ids]
        if len(set(names)) != len(names):
            raise DonorError("an id is named twice; each row takes a sample of its own")
        return replace(
            self,
            samples={name: self.samples[name] for name in names},
            spans={name: self.spans[name] for name in names if name in self.spans},
            keys_of={name: self.keys_of[name] for name in names if name in self.keys_of},
        )

    def aligned(self, to: Run | TokenMap) -> "Latents":
        """The samples in the order of a run's rows (or of `lens.tokens(inputs)`), by their inputs.

        Raises:
            DonorError: the recording does not say of what inputs it is, or lacks one.
        """
        wanted = (to.tokens if isinstance(to, Run) else to).keys
        if len(self.keys_of) != len(self):
            raise DonorError(
                f"{len(self) - len(self.keys_of)} of {len(self)} samples do not say of which input "
                "they are; order them by id with recorded.select([...])"
            )
        by_key = {key: name for name, key in self.keys_of.items()}
        missing = [row for row, key in enumerate(wanted) if key not in by_key]
        if missing:
            raise DonorError(
                f"the inputs of {len(missing)} of {len(wanted)} rows, the first is row "
                f"{missing[0]}, are not in the recording; record them, or leave them out"
            )
        return self.select([by_key[key] for key in wanted])

    def check(self, run: Run) -> float:
        """Hold the recording against a run of the same inputs on your model, before you swap it.

        Returns the largest distance of a recorded state from the run's own, relative to its norm: 0
        for the same model in the same precision, about 0.01 after bfloat16.

        Raises:
            DonorError: rows, width or numbers of steps differ; the rows are in another order (by
                their inputs, where those are known, and else because another row's latents are much
                nearer); or the states are those of the step before.
        """
        if len(self) != len(run):
            raise DonorError(
                f"the recording has {len(self)} samples and the run {len(run)} rows; choose with "
                "recorded.select([...])"
            )
        if self.width != run.latents.shape[-1]:
            raise DonorError(
                f"the recording has states of width {self.width} and the model of "
                f"{run.latents.shape[-1]}; it is another model's"
            )
        self._check_keys(run)
        theirs = [run.latents[r][run.latent_mask[r]].double().cpu() for r in range(len(run))]
        ours = [each.double().cpu() for each in self.samples.values()]
        apart = torch.tensor([[self._distance(a, b) for b in theirs] for a in ours])
        if len(self.keys_of) != len(self):
            self._check_order(apart)
        self._check_steps(ours, theirs)
        return max((self._distance(a, b, worst=True) for a, b in zip(ours, theirs, strict=True)))

    def _check_keys(self, run: Run) -> None:
        places = {key: row for row, key in enumerate(run.tokens.keys)}
        for row, name in enumerate(self.samples):
            key = self.keys_of.get(name)
            if key is None or key == run.tokens.keys[row]:
                continue
            where = places.get(key)
            whose = "an input that is not in the run" if where is None else f"row {where}'s input"
            raise DonorError(
                f"row {row} of the recording, sample {name!r}, is of {whose}; put it in order with "
                "recorded.aligned(run)"
            )

    def _check_order(self, apart: torch.Tensor) -> None:
        for row, name in enumerate(self.samples):
            nearest = int(apart[row].argmin())
            if apart[row, row] > FAR * apart[row, nearest]:
                raise DonorError(
                    f"row {row} of the recording, sample {name!r}, lies nearer to the latents of "
                    f"row {nearest} ({float(apart[row, nearest]):.2g} of their norm) than to those "
                    f"of its own row ({float(apart[row, row]):.2g}); order the samples as the "
                    "run's inputs with recorded.select([...])"
                )

    def _check_steps(self, ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
        later = replace(self, first=self.first + 1)
        for row, (name, mine, own) in enumerate(zip(self.samples, ours, theirs, strict=True)):
            shifted, here = later._distance(mine, own), self._distance(mine, own)
            if len(mine) > 1 and here > FAR * shifted:
                raise DonorError(
                    f"sample {name!r} holds what latents put out ({shifted:.2g} from the run's "
                    f"latents one step later, {here:.2g} from those at its own steps), which is "
                    f"fed at the next step; load it with first={self.first + 1}"
                )
            # the last state that was put out is fed nowhere
            if len(mine) + self.first not in (len(own), len(own) + (self.first > 0)):
                raise DonorError(
                    f"row {row}, sample {name!r}, has {len(mine)} states from step {self.first} "
                    f"on, and the run fed {len(own)}; run it with latents=il.Force("
                    f"{len(mine) + self.first}), or select steps with at=il.latent[...]"
                )

    def _distance(self, mine: torch.Tensor, own: torch.Tensor, *, worst: bool = False) -> float:
        """How far recorded states are from those of a run at the same steps, of their norm."""
        other = own[self.first : self.first + len(mine)]
        if not len(other):
            return float("nan") if len(mine) or len(own) else 0.0
        apart = (mine[: len(other)] - other).norm(dim=1) / other.norm(dim=1).clamp_min(1e-30)
        return float(apart.max() if worst else apart.mean())

    # ---- as a donor ----------------------------------------------------------------------------

    def states(self, site: str, at: Positions) -> States:
        """The states this recording gives as a donor.

        Raises:
            DonorError: something else than latents is asked for, or steps that it does not have.
        """
        if site != "hook_latent" or not isinstance(at, LatentPositions):
            raise DonorError(
                f"a recording holds latents and has no states for {at!r} of {site!r}; use "
                "site='hook_latent' with at=il.latent or its steps"
            )
        rows = [self._chosen(name, at) for name in self.samples]
        known = len(self.keys_of) == len(self)
        keys = tuple(self.keys_of[name] for name in self.samples) if known else None
        return replace(pad(rows), keys=keys)

    def _chosen(self, name: str, at: LatentPositions) -> torch.Tensor:
        states = self.samples[name]
        steps = np.arange(self.first + len(states))
        if at.span is not None:
            if name not in self.spans:
                raise DonorError(
                    f"{at!r} names a span, and the recording does not say where the spans of "
                    f"sample {name!r} begin; name steps of all spans, as in il.latent[2:4]"
                )
            steps = steps[np.array([-1] * self.first + list(self.spans[name])) == at.span]
        if isinstance(at.index, int):
            steps = steps[at.index : at.index + 1 or None]
        elif at.index is not None:
            steps = steps[at.index]
        if len(steps) and steps.min() < self.first:
            raise DonorError(
                f"{at!r} begins at step {int(steps.min())} and the recording at step {self.first}; "
                f"use at=il.latent[{self.first}:]"
            )
        return states[steps - self.first]

    def _known(self, name: object) -> str:
        if name not in self.samples:
            held = ", ".join(map(repr, list(self.samples)[:5])) + ", ..." * (len(self) > 5)
            raise DonorError(f"the recording has no sample {name!r}; it has {held}")
        return str(name)

    def __contains__(self, name: object) -> bool:
        return name in self.samples

    def __repr__(self) -> str:
        low, high = min(self.counts()), max(self.counts())
        steps = f"{low}" if low == high else f"{low} to {high}"
        some = next(iter(self.samples.values()))
        begin = f", from step {self.first} on" if self.first else ""
        origin = f"; {self.origin}" if self.origin else ""
        return (
            f"Latents of {len(self)} sample{'s' * (len(self) != 1)}, {steps} steps of width "
            f"{self.width}, {some.dtype}{begin}{origin}"
        )


# ---- files -------------------------------------------------------------------------------------


def _read(file: Path, layer: int | None) -> Latents:
    """One file of a recording."""
    if not file.is_file():
        raise CheckpointError(f"there is no file or folder {str(file)!r}; check the path")
    if file.suffix == ".safetensors":
        return _from_safetensors(file, layer)
    if file.suffix == ".json":
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{file.name} is no JSON ({brief(error)}); write it anew"
            ) from error
        if not isinstance(found, dict):
            raise DonorError(
                f"{file.name} holds a {type(found).__name__}, expected {{id: [vector, ...]}}, such "
                "as recorder.get_all() of Monet gives"
            )
        return Latents.from_steps(found, origin=file.name)
    if file.suffix not in READ:
        raise CheckpointError(
            f"{file.name} ends in {file.suffix!r}, and recordings are read from "
            f"{', '.join(READ)}; save them as safetensors"
        )
    return _from_pt(file, layer)


def _from_safetensors(file: Path, layer: int | None) -> Latents:
    try:
        with safe_open(file, framework="pt") as opened:
            words = json.loads((opened.metadata() or {}).get(HEADER, "null"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file.name} is torn, or no safetensors file ({brief(error)}); write it anew"
        ) from error
    if words is None:
        found = {name: _of_layer(name, each, layer) for name, each in tensors.items()}
        return Latents(found, origin=file.name)
    if not isinstance(words, dict) or words.get("version") != VERSION:
        raise CheckpointError(
            f"{file.name} has another version of the format of recordings than {VERSION}; read it "
            "with the version of imaginelens that wrote it"
        )
    try:
        return Latents(
            {name: tensors[str(i)] for i, name in enumerate(words["ids"])},
            {name: tuple(spans) for name, spans in words["spans"].items()},
            dict(words["keys"]),
            int(words["first"]),
            str(words["origin"]),
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{file.name} does not hold a recording as this version writes it ({brief(error)}); "
            "save it again"
        ) from error


def _from_pt(file: Path, layer: int | None) -> Latents:
    """A file of torch.save, of which only tensors and plain words are read."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises errors of all kinds
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{file.name} cannot be read as tensors and words alone, and a pickle of anything else "
            f"could run code; save it as safetensors ({brief(why)})"
        ) from error
    if isinstance(found, torch.Tensor):
        return Latents({file.stem: _of_layer(file.stem, found, layer)}, origin=file.name)
    if not isinstance(found, dict):
        raise DonorError(
            f"{file.name} holds a {type(found).__name__}, expected a tensor, {{id: tensor}}, or "
            "Monet's {'metadata_info': ..., 'latent': tensor}"
        )
    if "latent" not in found:
        steps = {
            str(name): _of_layer(str(name), each, layer) if isinstance(each, torch.Tensor) else each
            for name, each in found.items()
        }
        return Latents.from_steps(steps, origin=file.name)
    name = next(
        file.stem.removeprefix(p) for p in MONET if file.stem.startswith(p) or p == MONET[-1]
    )
    said = found.get("metadata_info")
    for prefix in MONET[:2]:  # inside the file the same words stand without "latent_"
        said = said.removeprefix(prefix.removeprefix("latent_")) if isinstance(said, str) else None
    if said is not None and said != name:
        raise DonorError(
            f"{file.name} holds the latents of sample {said!r}, which its name does not say; the "
            "recording was renamed or shuffled, so find out which is right"
        )
    latent = found["latent"]
    if not isinstance(latent, torch.Tensor):
        raise DonorError(f"{file.name} has a {type(latent).__name__} as its latent, not a tensor")
    return Latents({name: _of_layer(name, latent, layer)}, origin=file.name)


def _of_layer(name: str, states: torch.Tensor, layer: int | None) -> torch.Tensor:
    """The states of one layer, (step, d_model)."""
    if states.dim() == 3 and layer is not None:
        if not -len(states) <= layer < len(states):
            raise DonorError(
                f"sample {name!r} has {len(states)} layers, and layer={layer} is none of them"
            )
        return states[layer]
    if states.dim() == 3:
        raise DonorError(
            f"sample {name!r} has shape {tuple(states.shape)}, (layer, step, d_model); say which "
            "layer was fed back, as layer=-1 for the last"
        )
    return states


def _stacked(name: Any, steps: Any) -> torch.Tensor | None:
    """The vectors of one request as one tensor; None where there are none."""
    try:
        if isinstance(steps, torch.Tensor):
            found = steps
        elif steps is None or not len(steps):
            return None
        elif isinstance(steps, np.ndarray):
            found = torch.from_numpy(np.array(steps))
        elif all(isinstance(step, torch.Tensor) for step in steps):
            found = torch.stack(list(steps))
        else:
            array = np.asarray(steps)
            with np.errstate(over="ignore"):  # what becomes infinite is told below
                single = array.astype(np.float32) if array.dtype == np.float64 else array
            found = torch.from_numpy(single)
        if found.dim() != 2:
            raise ValueError(f"they have the shape {tuple(found.shape)}")
        return found
    except (ValueError, TypeError, LookupError, RuntimeError) as error:  # RecursionError is one
        raise DonorError(
            f"the steps of {quoted(name)} are no vectors of one width ({brief(error)}); give "
            "[[...], [...]]"
        ) from error
