"""Boxes around what a mask shows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def surroundings(mask: Tensor, margins: Sequence[int]) -> tuple[slice, ...] | None:
    """The box around a mask, with a margin in voxels along each axis; None where the mask is empty."""
    sides = []
    for axis, margin in enumerate(margins):
        places = mask.amax([other for other in range(mask.ndim) if other != axis]).nonzero()
        if not len(places):
            return None
        sides.append(slice(max(0, int(places[0]) - margin), int(places[-1]) + 1 + margin))
    return tuple(sides)
