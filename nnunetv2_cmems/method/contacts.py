"""What may touch what, as the annotated slices show it.

Networks that know organs from one slice find them, with full confidence, in slices that lie beyond the organs, too: what is there instead
looks much like them (above the valves of a heart an atrium like a ventricle). The organs' arrangement is another one there: what a
wall keeps apart in the annotated slice touches; and what is one body there are two that hang together by a waist (an atrium and the
outflow tract). Where organs end cannot be learned from one slice; that this cannot be them can.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage
from torch import Tensor

from nnunetv2_cmems.method.label_space import LabelSpace, Regions

STRAY = 0.01
"""Share of the smaller of two organs' borders in the annotated images up to which contacts are slips of the brush."""

TOUCHING = 0.05
"""Share of the smaller of two organs' borders in a slice above which they touch."""

OPEN = 0.25
"""Share of an enclosed organ's border in a slice above which it is not enclosed."""

MOST_LOST = 0.2
"""Share of its row of slices, rounded up, that a class loses at either end at most: where more cannot be it, it is drawn badly."""

NARROW = 0.75
"""Share of a class's narrowest :func:`waist` in the annotated slices below which it has one in a slice of a scan."""

LOBE = 0.4
"""What a waist parts is at least so wide, beside the widest place of the whole."""

FEWEST_RIGHT = 0.5
"""Share of a scan's slices in which what has a wall lies within it, from which on the scan is taken for understood."""

_LEVELS = 32
_FINER = 2  # a mask is enlarged
_SOFTENED = 0.5  # sigma in pixels: the steps of a slanted border are no waists


@dataclass(frozen=True)
class Contacts:
    """What annotated images say about the F classes.

    Attributes:
        apart: for each class which others are shown together with it, and never touch it.
        enclosed: whether it borders on other classes only, never on background.
        waists: the narrowest :func:`waist` of each class that is apart from another and not enclosed; 0 of the others, and where it does
            not count.
        walled: whether it is enclosed by one other class alone. Not kept with the weights: predictions do without.
    """

    apart: tuple[tuple[bool, ...], ...]
    enclosed: tuple[bool, ...]
    waists: tuple[float, ...]
    walled: tuple[bool, ...] = field(default=(), compare=False)

    @classmethod
    def of(cls, labels: Sequence[np.ndarray], space: LabelSpace, *, waists: bool = True) -> Contacts | None:
        """From annotated slices or volumes, label maps negative where nothing is annotated; None where they say nothing. Regions overlap,
        so they have no contacts. ``waists``: whether these count; of volumes they are not known."""
        if isinstance(space, Regions) or not labels:
            return None
        count = len(space.names)
        each = np.stack([count_contacts(label, count) for label in labels])
        counts, there = each.sum(0), each.sum(2)[:, 1:] > 0
        borders = counts.sum(1)
        together = (there[:, :, None] & there[:, None]).any(0)
        apart = together & (counts[1:, 1:] <= STRAY * np.minimum(borders[1:, None], borders[1:]))
        np.fill_diagonal(apart, False)
        enclosed = (borders[1:] > 0) & (counts[1:, 0] <= STRAY * borders[1:])
        if not (apart.any() or enclosed.any()):
            return None
        free = apart.any(1) & ~enclosed & (waists and all(label.ndim == 2 for label in labels))
        walled = enclosed & ((counts[1:, 1:] > STRAY * borders[1:, None]).sum(1) == 1)
        narrowest = tuple(min(waist(label == k + 1) for label in labels) if free[k] else 0.0 for k in range(count))
        return cls(tuple(map(tuple, apart.tolist())), tuple(enclosed.tolist()), narrowest, tuple(walled.tolist()))

    def numbers(self) -> list[float]:
        """F times F whether they are apart, and on the diagonal the waists; F times whether it is enclosed."""
        square = np.array(self.apart, dtype=float) + np.diag(self.waists)
        return [*square.ravel().tolist(), *map(float, self.enclosed)]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float], count: int) -> Contacts:
        """The inverse of :meth:`numbers`, of so many classes. Older checkpoints know of no waists: there the diagonal is 0."""
        square = np.reshape(numbers[: count * count], (count, count))
        apart = (square > 0) & ~np.eye(count, dtype=bool)
        enclosed = (one > 0 for one in numbers[count * count :])
        return cls(tuple(map(tuple, apart.tolist())), tuple(enclosed), tuple(np.diagonal(square).tolist()))

    def kept(self, labels: Tensor) -> Tensor:
        """Labels (Z, Y, X) without classes in slices at the ends of their row that cannot show them.

        From either end on, a class is removed from slices until one comes that may show it: first classes that are not enclosed where they
        touch one that they are kept apart from (the enclosed one is held in its place by what is around it), or have a waist; then
        enclosed ones where more than :data:`OPEN` of their border is background. No more than :data:`MOST_LOST` is removed, and nothing
        where no slice may show it.
        """
        kept = labels.clone()
        for enclosed in (False, True):
            whole = kept.numpy()
            counts = [count_contacts(part, len(self.enclosed)) for part in whole]
            for k in (k for k, one in enumerate(self.enclosed) if one == enclosed and (one or any(self.apart[k]))):
                rows = [z for z, part in enumerate(whole) if (part == k + 1).any()]
                first = self._cannot_be_first(k, whole, counts, rows)
                if first == len(rows):
                    continue
                last = self._cannot_be_first(k, whole, counts, rows[::-1])
                most = math.ceil(MOST_LOST * len(rows))
                for z in rows[: min(most, first)] + rows[len(rows) - min(most, last) :]:
                    kept[z][labels[z] == k + 1] = 0
        return kept

    def within(self, labels: np.ndarray) -> tuple[int, int]:
        """How many slices of labels (Z, Y, X) show a class that one other class encloses, and in how many of these each lies within it.

        Outside of it a class lies open, or touches one that it is kept apart from. Other contacts of one slice may be chance; a wall is
        not. Where few slices are right, networks have learned something else than the organs.
        """
        walled = [k for k, one in enumerate(self.walled) if one]
        parts = [count_contacts(part, len(self.enclosed)) for part in labels[np.isin(labels, [k + 1 for k in walled]).any((1, 2))]]
        return len(parts), sum(not any(self._open(k, counts) or self._touches(k, counts) for k in walled) for counts in parts)

    def arranged(self, labels: np.ndarray, classes: Collection[int]) -> bool:
        """Whether labels (Z, Y, X) show all of these classes, and in at least :data:`FEWEST_RIGHT` of the slices have within its wall what
        has one, see :meth:`within`."""
        shown, right = self.within(labels)
        return bool(np.isin(list(classes), labels).all()) and shown > 0 and right >= FEWEST_RIGHT * shown

    def _cannot_be_first(self, k: int, whole: np.ndarray, counts: Sequence[np.ndarray], order: Sequence[int]) -> int:
        """How many slices, the first ones in this order, cannot show a class. What comes after one that may is not looked at."""
        return sum(1 for _ in itertools.takewhile(lambda z: self._cannot_be(k, whole[z], counts[z]), order))

    def _cannot_be(self, k: int, part: np.ndarray, counts: np.ndarray) -> bool:
        if self.enclosed[k]:
            return self._open(k, counts)
        if self._touches(k, counts):
            return True
        least = NARROW * self.waists[k]
        return least > 0 and waist(part == k + 1) < least

    def _open(self, k: int, counts: np.ndarray) -> bool:
        """Whether too much of an enclosed class's border is background."""
        return bool(counts[k + 1, 0] > OPEN * counts[k + 1].sum())

    def _touches(self, k: int, counts: np.ndarray) -> bool:
        """Whether a class touches one that it is kept apart from."""
        borders = counts.sum(1)
        touching = counts[k + 1, 1:] > TOUCHING * np.minimum(borders[k + 1], borders[1:])
        return bool((touching & np.array(self.apart[k])).any())


def waist(mask: np.ndarray) -> float:
    """How wide the narrowest passage between two parts of a mask (Y, X) is, beside the narrower one of these.

    Widths are those of the largest discs that fit: without its outermost ``t`` pixels the mask falls apart, and into the narrower part
    fits a disc of the radius ``r``; this is the least ``t / r``. Into a part fits a disc of at least :data:`LOBE` times the largest one's
    radius. 1 where there are no two parts, as in what is convex; 0 where they do not hang together.
    """
    if not mask.any():
        return 1.0
    y, x = np.nonzero(mask)
    around = np.pad(mask[y.min() : y.max() + 1, x.min() : x.max() + 1], 1).astype(float)
    fine = ndimage.zoom(ndimage.gaussian_filter(around, _SOFTENED), _FINER, order=1) > 0.5
    depth = ndimage.distance_transform_edt(fine)
    least = 1.0
    for level in np.linspace(0, depth.max(), _LEVELS, endpoint=False):
        parts, count = ndimage.label(depth > level, np.ones((3, 3)))
        if count > 1:
            second = np.sort(ndimage.maximum(depth, parts, range(1, count + 1)))[-2]
            if second >= LOBE * depth.max():
                least = min(least, float(level / second))
    return least


def touching(counts: np.ndarray) -> list[tuple[int, int]]:
    """The pairs of classes, counted from 1, that touch in these contacts, slips of the brush aside."""
    borders = counts.sum(1)
    pairs = itertools.combinations(range(1, len(counts)), 2)
    return [(one, other) for one, other in pairs if counts[one, other] > STRAY * min(borders[one], borders[other])]


def count_contacts(label: np.ndarray, count: int) -> np.ndarray:
    """(1 + F, 1 + F), of a label map with F classes: how many pairs of neighbouring voxels are of these two values; 0 of the same ones,
    and of what is not annotated."""
    found = np.zeros((count + 1) ** 2)
    for axis in range(label.ndim):
        along = np.moveaxis(label, axis, 0)
        one, other = along[:-1], along[1:]
        here = (one != other) & (one >= 0) & (other >= 0)
        found += np.bincount(one[here].astype(np.int64) * (count + 1) + other[here], minlength=len(found))
    square = found.reshape(count + 1, count + 1)
    return square + square.T
