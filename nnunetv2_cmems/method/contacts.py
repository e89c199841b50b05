"""What may touch what, as the annotated slices show it.

Networks that know organs from one slice find them, with full confidence, in slices that lie beyond the organs, too: what is there instead
looks much like them (above the valves of a heart an atrium like a ventricle). The organs' arrangement is another one there: what a
wall keeps apart in the annotated slice touches. Where organs end cannot be learned from one slice; that this cannot be them can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nnunetv2_cmems.method.label_space import LabelSpace, Regions

STRAY = 0.01
"""Share of the smaller of two organs' borders in the annotated images up to which contacts are slips of the brush."""

TOUCHING = 0.05
"""Share of the smaller of two organs' borders in a slice above which they touch."""

OPEN = 0.25
"""Share of an enclosed organ's border in a slice above which it is not enclosed."""


@dataclass(frozen=True)
class Contacts:
    """What annotated images say about the F classes.

    Attributes:
        apart: for each class which others are shown together with it, and never touch it.
        enclosed: whether it borders on other classes only, never on background.
    """

    apart: tuple[tuple[bool, ...], ...]
    enclosed: tuple[bool, ...]

    @classmethod
    def of(cls, labels: Sequence[np.ndarray], space: LabelSpace) -> Contacts | None:
        """From annotated slices or volumes, label maps negative where nothing is annotated; None where they say nothing. Regions overlap,
        so they have no contacts."""
        if isinstance(space, Regions) or not labels:
            return None
        count = len(space.names)
        each = np.stack([_contacts(label, count) for label in labels])
        counts, there = each.sum(0), each.sum(2)[:, 1:] > 0
        borders = counts.sum(1)
        together = (there[:, :, None] & there[:, None]).any(0)
        apart = together & (counts[1:, 1:] <= STRAY * np.minimum(borders[1:, None], borders[1:]))
        np.fill_diagonal(apart, False)
        enclosed = (borders[1:] > 0) & (counts[1:, 0] <= STRAY * borders[1:])
        return cls(tuple(map(tuple, apart.tolist())), tuple(enclosed.tolist())) if apart.any() or enclosed.any() else None

    def numbers(self) -> list[float]:
        """F times F whether they are apart, F times whether it is enclosed."""
        return [*(float(one) for row in self.apart for one in row), *map(float, self.enclosed)]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float], count: int) -> Contacts:
        """The inverse of :meth:`numbers`, of so many classes."""
        rows = [tuple(map(bool, numbers[first : first + count])) for first in range(0, len(numbers), count)]
        return cls(tuple(rows[:-1]), rows[-1])

    def kept(self, labels: Tensor) -> Tensor:
        """Labels (Z, Y, X) without classes in slices at the ends of their row that cannot show them.

        From either end on, a class is removed from slices until one comes that may show it: first classes that are not enclosed where they
        touch one that they are kept apart from (the enclosed one is held in its place by what is around it); then enclosed ones
        where more than :data:`OPEN` of their border is background. Nothing is removed where no slice may show it.
        """
        kept = labels.clone()
        for enclosed in (False, True):
            whole = kept.numpy()
            counts = [_contacts(part, len(self.enclosed)) for part in whole]
            for k in (k for k, one in enumerate(self.enclosed) if one == enclosed and (one or any(self.apart[k]))):
                rows = [z for z, part in enumerate(whole) if (part == k + 1).any()]
                wrong = [self._cannot_be(k, counts[z]) for z in rows]
                if all(wrong):
                    continue
                first, last = wrong.index(False), len(wrong) - wrong[::-1].index(False)
                for z in rows[:first] + rows[last:]:
                    kept[z][labels[z] == k + 1] = 0
        return kept

    def _cannot_be(self, k: int, counts: np.ndarray) -> bool:
        borders = counts.sum(1)
        if self.enclosed[k]:
            return bool(counts[k + 1, 0] > OPEN * borders[k + 1])
        touching = counts[k + 1, 1:] > TOUCHING * np.minimum(borders[k + 1], borders[1:])
        return bool((touching & np.array(self.apart[k])).any())


def _contacts(label: np.ndarray, count: int) -> np.ndarray:
    """(1 + F, 1 + F): how many pairs of neighbouring voxels are of these two values; 0 of the same ones, and of what is not annotated."""
    found = np.zeros((count + 1) ** 2)
    for axis in range(label.ndim):
        along = np.moveaxis(label, axis, 0)
        one, other = along[:-1], along[1:]
        here = (one != other) & (one >= 0) & (other >= 0)
        found += np.bincount(one[here].astype(np.int64) * (count + 1) + other[here], minlength=len(found))
    square = found.reshape(count + 1, count + 1)
    return square + square.T
