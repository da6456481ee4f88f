"""Probes from class means: mass-mean (the difference of means) and linear discriminants."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int

from imaginelens.probes.estimators import Probe
from imaginelens.probes.frames import Design
from imaginelens.probes.readouts import Linear, Readout


@dataclass(eq=False)
class MassMeanProbe(Probe):
    """The nearest class mean; for two classes, the side of the midpoint along mu+ - mu-.

    Marks and Tegmark 2023 (arXiv 2310.06824), with the midpoint as bias. Probabilities are those of
    equal round normal classes in the span of the means, as wide as the rows are there.
    """

    kind: ClassVar[str] = "mass_mean"
    standardises: ClassVar[bool] = False
    permutations: ClassVar[int] = 200

    def _solve(
        self, design: Design, labellings: Sequence[np.ndarray], n_classes: int | None
    ) -> list[tuple[Readout, float | None]]:
        assert n_classes is not None
        return [(self._one(design, y, n_classes), None) for y in labellings]

    def _one(self, design: Design, y: np.ndarray, n_classes: int) -> Linear:
        z = np.asarray(design.z)
        means = _means(z, y, n_classes)
        apart = means - means.mean(0)
        _, size, axes = np.linalg.svd(apart, full_matrices=False)
        axes = axes[size > 1e-12 * max(size.max(), 1e-300)]
        within = z @ axes.T - (means @ axes.T)[y]
        variance = float((within**2).mean()) if within.size else 0.0
        if variance <= 1e-20 * float((apart**2).sum() + 1e-300):
            variance = 1.0  # classes without spread: any width gives the same labels
        return Linear(apart / variance, -_half_norms(means, means.mean(0)) / variance)


@dataclass(eq=False)
class LdaProbe(Probe):
    """Linear discriminants with a shrunk covariance: the mass-mean direction, whitened.

    The pooled within-class covariance is moved towards a multiple of the identity by the share of
    Ledoit and Wolf (2004, J. Multivariate Analysis 88:365-411), or by a share that is given.

    Attributes:
        shrinkage: 0 to 1; None for Ledoit and Wolf's.
    """

    kind: ClassVar[str] = "lda"
    standardises: ClassVar[bool] = False
    permutations: ClassVar[int] = 100
    shrinkage: float | None = None

    def _solve(
        self, design: Design, labellings: Sequence[np.ndarray], n_classes: int | None
    ) -> list[tuple[Readout, float | None]]:
        assert n_classes is not None
        return [(self._one(design, y, n_classes), None) for y in labellings]

    def _one(self, design: Design, y: np.ndarray, n_classes: int) -> Linear:
        left, spread, _ = factors = design.once(
            "svd", lambda: np.linalg.svd(np.asarray(design.z), full_matrices=False)
        )
        z = left * spread  # the rows are centred, so that their scatter is diagonal here
        means, counts = _means(z, y, n_classes), np.bincount(y, minlength=n_classes)
        share, target = self._shrunk(z, spread, means, y, counts, len(design.frame.mean))
        weights = _whitened(means, (1 - share) / len(z), spread, counts, share * target)
        bias = -(weights * means).sum(1) / 2 + np.log(counts / len(y))
        return Linear(weights @ factors[2], bias)

    def _shrunk(
        self,
        z: Float[np.ndarray, "row coordinate"],
        spread: Float[np.ndarray, " coordinate"],
        means: Float[np.ndarray, "class coordinate"],
        y: Int[np.ndarray, " row"],
        counts: Int[np.ndarray, " class"],
        width: int,
    ) -> tuple[float, float]:
        """The share of the identity in the covariance, and its size."""
        within = ((z - means[y]) ** 2).sum(1)
        target = float(within.mean()) / width
        if target <= 1e-18 * float((z**2).sum() + 1e-300) / width:
            return 1.0, 1.0  # classes without spread
        if self.shrinkage is not None:
            return self.shrinkage, target
        # |T - B|^2 of the scatter of all rows, which is diagonal, and of that between classes
        gram = means @ means.T * counts
        crossed = float((counts * ((means * spread) ** 2).sum(1)).sum())
        squared = float((spread**4).sum()) - 2 * crossed + float((gram * gram.T).sum())
        return _share(within, max(squared, 0.0) / len(z) ** 2, width), target


def _whitened(
    means: Float[np.ndarray, "class coordinate"],
    scale: float,
    spread: Float[np.ndarray, " coordinate"],
    counts: Int[np.ndarray, " class"],
    ridge: float,
) -> Float[np.ndarray, "class coordinate"]:
    """means (scale (T - sum n m m') + ridge)^-1, with T = diag(spread^2): a diagonal less one term
    per class (Sherman, Morrison and Woodbury)."""
    diagonal = scale * spread**2 + ridge
    inverse = np.where(diagonal > 1e-14 * diagonal.max(), 1 / np.maximum(diagonal, 1e-300), 0.0)
    rooted = np.sqrt(scale * counts)[:, None] * means
    inner = np.eye(len(means)) - (rooted * inverse) @ rooted.T
    solved = np.linalg.lstsq(inner, (rooted * inverse) @ means.T, rcond=1e-13)[0]
    return np.asarray((means + solved.T @ rooted) * inverse)


def ledoit_wolf(centred: Float[np.ndarray, "row coordinate"], *, width: int) -> float:
    """How far to move the covariance of centred rows towards a multiple of the identity, 0 to 1.

    Args:
        width: the dimension of the space, where the rows are given in coordinates of their span.

    >>> ledoit_wolf(np.array([[1.0, 0.0], [-1.0, 0.0]]), width=2)
    0.0
    """
    gram = centred.T @ centred if centred.shape[1] < len(centred) else centred @ centred.T
    return _share((centred**2).sum(1), float((gram**2).sum()) / len(centred) ** 2, width)


def _share(norms: Float[np.ndarray, " row"], squared: float, width: int) -> float:
    """That share, of the squared norms of rows and of their covariance."""
    distance = squared - (float(norms.sum()) / len(norms)) ** 2 / width
    if distance <= 0:
        return 1.0
    error = (float((norms**2).sum()) / len(norms) - squared) / len(norms)
    return float(np.clip(error / distance, 0.0, 1.0))


def _means(
    z: Float[np.ndarray, "row coordinate"], y: Int[np.ndarray, " row"], n_classes: int
) -> Float[np.ndarray, "class coordinate"]:
    inside = np.eye(n_classes)[y]
    return np.asarray(inside.T @ z / inside.sum(0)[:, None])


def _half_norms(
    means: Float[np.ndarray, "class coordinate"], centre: Float[np.ndarray, " coordinate"]
) -> Float[np.ndarray, " class"]:
    """|m|^2 / 2 of each mean less that of their centre, without cancellation far from 0."""
    return np.asarray(((means - centre) * (means + centre)).sum(1) / 2)
