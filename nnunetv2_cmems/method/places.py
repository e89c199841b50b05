"""Where organs lie relative to each other, learned from annotated volumes, or from several slices of one.

Networks that see a slice, or a window, of a scan cannot know which side of the body it is from, and networks that know their organs from
one volume find more of the same elsewhere. An annotated volume says where its organs lie, seen from their common middle; in other scans
they lie about there, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nnunetv2_cmems.method.label_space import LabelSpace, Regions

TOLERANCE = 0.15
"""How far organs may lie elsewhere than annotated (one standard deviation), in units of the spread of all organs along an axis."""

FREE = 1.5
"""Distance, in standard deviations, from an organ's place up to which a voxel is as likely as at its middle."""

CONFUSED = 0.05
"""Share of the foreground's probability that each class whose place is known has at least, before its place is looked at: networks that
take one organ for another are sure of it."""

SURPRISE = 1e-3
"""Probability that the background has at least: networks that see an organ where there is none are sure of it."""

MOST_STRETCHED = 3.0
"""Largest factor between a scan's distances along an axis that is not resampled and the annotated volume's.
Where slices say where organs end, those of the data set's slices count instead."""

LARGER = 1.25
"""Largest factor, beside that of the slices' distances, by which a body is larger than the annotated one."""

_WIDTHS = (4.0, 4.0, 3.0, 3.0, 2.0, 2.0, 1.5, 1.5, 1.0, 1.0, 1.0, 1.0)  # factors of the spreads, while the middle is looked for
_EXACT = 1.5  # width from which on distances along z are fitted, too: before that a left organ on the right may pull
_SEEN = 0.1  # probability of a class or region from which a voxel counts for the middle
_MOST = 200_000  # voxels that the middle is fitted to
_FEWEST = 5.0  # voxels, by probability, of a class that counts for the middle


@dataclass(frozen=True)
class Places:
    """Middle and spread of each class or region, in voxels along (z, y, x).

    Attributes:
        middles: (F, 3) seen from the mean of all; NaN for what no volume shows.
        spreads: (F, 3) standard deviation of its voxels' places; infinite where slices leave open how far it reaches.
        stretched: slices are not as far apart in every scan, so that distances along z have a factor of the scan's own.
        ends: (F, 2) where each class or region is expected to begin and to end along z, seen from the mean of all; infinite where slices
            leave it open. None: volumes are annotated, whose spreads say it.
        factors: smallest and largest factor of distances along z, where ``stretched``.
    """

    middles: np.ndarray
    spreads: np.ndarray
    stretched: bool
    ends: np.ndarray | None = None
    factors: tuple[float, float] = (1 / MOST_STRETCHED, MOST_STRETCHED)

    @classmethod
    def of(
        cls,
        volumes: Sequence[np.ndarray],
        slices: Sequence[Mapping[int, np.ndarray]],
        space: LabelSpace,
        stretched: bool,
        distances: tuple[float, float] | None = None,
    ) -> Places | None:
        """The places that annotated images show; None where none of them shows two classes or regions.

        Of several images, spreads are those within and between them.

        Args:
            volumes: label maps (Z, Y, X) of whole volumes.
            slices: of each volume of which only slices are annotated, the label maps (Y, X) by their place along z; negative where a slice
                is not annotated.
            space: what the networks' heads mean.
            stretched: see the class.
            distances: smallest and largest factor between the distances of the annotated slices and of other scans' slices; None: it is
                not known. It counts where slices say where organs end: what ends there must be neither stretched to what networks falsely
                see beyond, nor shrunk to what is left of it.
        """
        shown = [_of_volume(volume, space) for volume in volumes] + [_of_slices(some, space) for some in slices]
        found = [one for one in shown if np.isfinite(one.middles[:, 0]).sum() > 1]
        if not found:
            return None
        means = [np.nanmean(one.middles, 0) for one in found]
        middles = np.stack([one.middles - mean for one, mean in zip(found, means)])
        variances = np.stack([one.variances for one in found])
        ends = np.stack([one.ends - mean[0] for one, mean in zip(found, means)])
        known = np.isfinite(middles)
        count = np.maximum(known.sum(0), 1)
        mean = np.where(known, middles, 0).sum(0) / count
        between = (np.where(known, middles - mean, 0) ** 2).sum(0) / count
        within = np.where(known, variances, 0).sum(0) / count
        mean[~known.any(0)] = np.nan
        outermost = np.stack([np.fmin.reduce(ends[..., 0]), np.fmax.reduce(ends[..., 1])], 1)
        outermost = np.where(np.isnan(outermost), [-np.inf, np.inf], outermost)
        told = outermost if np.isfinite(outermost).any() else None
        made = cls(mean, np.sqrt(within + between), stretched, told)
        if told is None or distances is None:
            return made
        return replace(made, factors=(distances[0] / LARGER, distances[1] * LARGER))

    def numbers(self) -> list[float]:
        """6 F + 1 numbers, to be kept with the networks' weights; 2 F + 2 more, for ends, where the last of these is 2 or more."""
        kind = float(self.stretched) + 2 * (self.ends is not None)
        ends = [] if self.ends is None else [*self.ends.ravel().tolist(), *self.factors]
        return [*self.middles.ravel().tolist(), *self.spreads.ravel().tolist(), kind, *ends]

    @classmethod
    def from_numbers(cls, numbers: list[float], count: int) -> tuple[Places | None, list[float]]:
        """The inverse of :meth:`numbers`, and what comes after these numbers.

        Args:
            numbers: those, and others; zeros for None.
            count: of the classes or regions, F.
        """
        places, rest = numbers[: 6 * count + 1], numbers[6 * count + 1 :]
        if not any(places):
            return None, rest
        middles, spreads = np.array(places[:-1], dtype=np.float64).reshape(2, -1, 3)
        kind = int(places[-1])
        if kind < 2:
            return cls(middles, spreads, bool(kind)), rest
        ends, (low, high), rest = np.array(rest[: 2 * count]).reshape(-1, 2), rest[2 * count : 2 * count + 2], rest[2 * count + 2 :]
        return cls(middles, spreads, bool(kind % 2), ends, (low, high)), rest

    def seen_in(self, probabilities: Tensor, space: LabelSpace) -> Tensor:
        """Probabilities of a scan, organs taken from where they do not lie.

        The scan's organs have a common middle, at which these probabilities and the places agree best; it is looked for by EM. Around it
        the likelihood of a class is a Gaussian of its spread and :data:`TOLERANCE`, flat up to :data:`FREE` standard deviations. Classes
        compete for what is foreground, so that a left organ on the right becomes a right one; what no class fits becomes background.
        Regions may overlap, and do not compete.

        Args:
            probabilities: (K, Z, Y, X) of the classes, the background first, or (R, Z, Y, X) of the regions.
            space: what the networks' heads mean.

        Returns:
            A tensor of the shape of ``probabilities``.
        """
        first = 0 if isinstance(space, Regions) else 1
        fit = self._fitted(probabilities.numpy()[first:])
        if fit is None:
            return probabilities
        found = probabilities.numpy().copy()
        organs = found[first:]
        axes = np.meshgrid(*[np.arange(side, dtype=np.float32) for side in organs.shape[1:]], indexing="ij", sparse=True)
        likelihoods = (self._likelihood(k, axes, *fit, 1.0) for k in range(len(organs)))  # one at a time: volumes are large
        if not first:
            for organ, likelihood in zip(organs, likelihoods):
                inside = np.minimum(organ, 1 - SURPRISE) * likelihood
                organ[:] = inside / (inside + np.maximum(1 - organ, SURPRISE))
            return torch.from_numpy(found)
        foreground = organs.sum(0)
        for organ, likelihood, known in zip(organs, likelihoods, self._known):
            if known:
                organ += CONFUSED * foreground
            organ *= likelihood
        np.maximum(found[0], SURPRISE, out=found[0])
        found /= found.sum(0)
        return torch.from_numpy(found)

    def _fitted(self, organs: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """The organs' middle in a scan (3,), and the factor of distances along each axis (3,); None where there is too little to see."""
        places = np.argwhere(organs.max(0) > _SEEN)
        step = -(-len(places) // _MOST) or 1
        places = places[::step]
        weights = step * organs[(slice(None), *places.T)].astype(np.float64)
        known = self._known
        use = known & (weights.sum(1) > _FEWEST)
        if use.sum() < 2:
            return None
        factor = np.ones(3)
        middles = np.where(known[:, None], self.middles, 0)
        variances = self._variances
        middle = np.mean([(one @ places) / one.sum() - shift for one, shift in zip(weights[use], middles[use])], 0)
        for width in _WIDTHS:
            near = np.zeros_like(weights)
            for k in np.flatnonzero(known).tolist():
                near[k] = weights[k] * self._likelihood(k, list(places.T), middle, factor, width)
            mass = near.sum(1)
            if mass.max() < 1:
                break
            # a class counts by what is seen of it, up to as much as of the largest, and by how exactly its place is known
            share = np.minimum(1, mass / mass.max())[:, None] / variances
            total, mass = np.maximum(share.sum(0), 1e-9), np.maximum(mass, 1e-9)[:, None]
            middle = (share * (near @ places / mass - middles * factor)).sum(0) / total
            if self.stretched and width <= _EXACT:
                seen = (share * (near @ (places - middle) ** 2 / mass)).sum(0)[0]
                expected = (share * (middles**2 + np.where(np.isfinite(self.spreads), self.spreads, 0) ** 2)).sum(0)[0]
                factor[0] = np.clip(np.sqrt(seen / expected), *self.factors) if expected > 0 else 1.0
        return middle, factor

    @cached_property
    def _known(self) -> np.ndarray:
        """(F,) bool, what has a place."""
        return np.isfinite(self.middles[:, 0])

    @cached_property
    def _tolerance(self) -> np.ndarray:
        """(3,), a variance; never 0."""
        squares = np.where(np.isfinite(self.spreads), self.middles**2 + self.spreads**2, np.nan)
        overall = np.array([column[np.isfinite(column)].mean() if np.isfinite(column).any() else 0.0 for column in squares.T])
        return TOLERANCE**2 * overall + 0.25

    @cached_property
    def _variances(self) -> np.ndarray:
        """(F, 3), those of places and the tolerance; never 0."""
        return self.spreads**2 + self._tolerance

    def _likelihood(self, k: int, axes: Sequence[np.ndarray], middle: np.ndarray, factor: np.ndarray, width: float) -> np.ndarray:
        """Of a class at places whose coordinates (z, y, x) broadcast, between 0 and 1; 1 for what no volume shows."""
        if not self._known[k]:
            return np.ones((), dtype=np.float32)
        place, deviation = middle + self.middles[k] * factor, factor * width * np.sqrt(self._variances[k])
        parts = [(((axis - place[i]) / deviation[i]) ** 2).astype(np.float32) for i, axis in enumerate(axes)]
        distance = np.sqrt(parts[0] + parts[1] + parts[2])
        squares = np.maximum(0, distance - np.float32(FREE)) ** 2
        if self.ends is not None:
            first, last = (middle[0] + end * factor[0] for end in self.ends[k])
            beyond = np.maximum(0, np.maximum(first - axes[0], axes[0] - last)) / (factor[0] * width * np.sqrt(self._tolerance[0]))
            squares = squares + (beyond**2).astype(np.float32)
        likelihood: np.ndarray = np.exp(-0.5 * squares)
        return likelihood


class _Shown(NamedTuple):
    """What an annotated image says of each class or region: mean and variance of its places, (F, 3) both, NaN for what is not shown, and
    where it is expected to begin and to end along z, (F, 2), infinite where that is left open, NaN for what is not shown."""

    middles: np.ndarray
    variances: np.ndarray
    ends: np.ndarray


def _of_volume(volume: np.ndarray, space: LabelSpace) -> _Shown:
    middles, variances = _moments(_voxels(volume, space))
    return _Shown(middles, variances, np.where(np.isfinite(middles[:, :1]), [-np.inf, np.inf], np.nan))


def _of_slices(slices: Mapping[int, np.ndarray], space: LabelSpace) -> _Shown:
    """Along z an organ reaches from the last slice before it to the first one behind it that does not show it, at most.

    Where there is no such slice on one side, it reaches as far beyond the slices that show it as on the other one, or as these are apart.
    It is expected to end half-way between the last slice that shows it and the next one, if there is one.
    """
    order = sorted(slices)
    whole = [z for z in order if (slices[z] >= 0).all()]  # the others do not say what they do not show
    shown = _voxels(np.stack([slices[z] for z in order]), space)
    middles, variances = _moments(shown)
    ends = np.full((len(shown), 2), np.nan)
    for k, voxels in enumerate(shown):
        if not len(voxels):
            continue
        first, last = (order[int(index)] for index in (voxels[:, 0].min(), voxels[:, 0].max()))
        before, behind = [first - z for z in whole if z < first], [z - last for z in whole if z > last]
        low, high = first - min(before or behind or [last - first]), last + min(behind or before or [last - first])
        middles[k, 0] = (low + high) / 2
        variances[k, 0] = (high - low) ** 2 / 12 if high > low else np.inf
        ends[k] = first - min(before) / 2 if before else -np.inf, last + min(behind) / 2 if behind else np.inf
    return _Shown(middles, variances, ends)


def _voxels(volume: np.ndarray, space: LabelSpace) -> list[np.ndarray]:
    """(N, 3) places (z, y, x) of each class or region in a label map (Z, Y, X)."""
    target = space.target(torch.from_numpy(np.asarray(volume)[None]))
    return [mask[0].nonzero().double().numpy() for mask in space.masks(target)]


def _moments(shown: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    moments = [[voxels.mean(0), voxels.var(0)] if len(voxels) else [[np.nan] * 3] * 2 for voxels in shown]
    middles, variances = np.array(moments, dtype=np.float64).transpose(1, 0, 2)
    return middles, variances
