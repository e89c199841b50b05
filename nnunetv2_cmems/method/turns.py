"""Scans seen turned within their slices, as another patient might lie.

Networks know an organ as the annotated image shows it, and turned from there as far as the training turns it. A scan that is turned
farther they see wrong, and contradict each other; turned towards what they know, they see it right, and agree. So the mean over turned
views is taken, in which each counts by the members' agreement about it. With equal weights this is test-time augmentation (Wang et al.,
Neurocomputing 338, 2019).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from nnunetv2_cmems.method.label_space import LabelSpace

EMPHASIS = 4.0
"""Exponent of one over the members' disagreement about a view."""

_LEAST_DISAGREEMENT = 0.02
_OUTLIERS = 0.02  # share of the organs' voxels, at either end of each axis, that may be mistakes far away
_ROOM = 0.0625  # around organs, in patches


def turned(slices: Tensor, degrees: float, spacing: Sequence[float], *, outside: str = "border") -> Tensor:
    """Slices turned about their middle, by bilinear interpolation. What is turned out of them is lost.

    Args:
        slices: (N, C, Y, X).
        degrees: from the axis Y towards the axis X; those of the opposite sign turn back.
        spacing: millimetres (y, x).
        outside: what comes in, ``"border"``: the nearest pixel; or ``"zeros"``.

    Returns:
        A tensor of the shape of ``slices``, in single precision; ``slices`` itself for 0 degrees, if it is of single precision.
    """
    if degrees == 0:
        return slices.float()
    height, width = (side * step for side, step in zip(slices.shape[-2:], spacing))
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = torch.tensor([[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]], device=slices.device)
    grid = functional.affine_grid(matrix.expand(len(slices), 2, 3), list(slices.shape), align_corners=False)
    return functional.grid_sample(slices.float(), grid, mode="bilinear", padding_mode=outside, align_corners=False)


def turned_scan(image: Tensor, degrees: float, spacing: Sequence[float]) -> Tensor:
    """:func:`turned` for all slices of a scan (C, Z, Y, X)."""
    return turned(image.transpose(0, 1), degrees, spacing).transpose(0, 1).contiguous()


def part_to_turn(organs: Tensor, degrees: float, spacing: Sequence[float], patch: Sequence[int]) -> tuple[slice, slice]:
    """The part of all slices in which organs lie, as they are and turned about its middle, with some room around them.

    Turned views need not show what is far from organs. So a scan that is wider than the patch often takes one window instead of several.

    Args:
        organs: where there are organs, bool (Z, Y, X).
        degrees: of the turn.
        spacing: of the slices, millimetres (y, x).
        patch: voxels (y, x) that a network sees at once. No part is smaller, unless the slices are.

    Returns:
        The place of its (y, x); the whole of the slices where there is no organ.
    """
    shape, middle, half = organs.shape[-2:], [], []
    if not organs.any():
        return slice(0, shape[0]), slice(0, shape[1])
    for axis, step in enumerate(spacing):
        share = organs.sum([0, 2 - axis]).cumsum(0) / organs.sum()
        first, last = int((share <= _OUTLIERS).sum()), int((share < 1 - _OUTLIERS).sum())
        middle.append((first + last + 1) / 2)
        half.append((last + 1 - first) / 2 * step)
    cos, sin = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    turned_half = half[0] * cos + half[1] * sin, half[0] * sin + half[1] * cos
    sides = []
    for side, centre, window, step, *lengths in zip(shape, middle, patch, spacing, half, turned_half):
        length = min(side, max(window, 2 * math.ceil(max(lengths) / step + _ROOM * window)))
        start = min(max(0, round(centre - length / 2)), side - length)
        sides.append(slice(start, start + length))
    return sides[0], sides[1]


class MeanOfViews:
    """The weighted mean of what each member says about turned views of a scan, seen as the scan lies.

    Where a view does not show a part of the scan it does not count. The first view must be the whole scan as it is.

    Args:
        space: what the networks' heads mean.
        spacing: of the slices, millimetres (y, x).
        device: where slices are turned back.
    """

    def __init__(self, space: LabelSpace, spacing: Sequence[float], device: torch.device) -> None:
        self._space, self._spacing, self._device = space, spacing, device
        self._means: list[Tensor] = []
        self._weight: Tensor | None = None

    def add(self, logits: Sequence[Tensor], degrees: float, agreement: float, part: tuple[slice, slice] | None = None) -> None:
        """Count a view that is turned by ``degrees``.

        Args:
            logits: each member's, of the turned scan, (heads, Z, Y, X), half or single precision.
            degrees: as in :func:`turned`.
            agreement: of the members about this view, from :func:`~nnunetv2_cmems.method.propagation.agreement_in_scan`.
            part: of the slices that is shown, turned about its middle; None: the whole.
        """
        y, x = part or (slice(None), slice(None))
        if self._weight is None:
            self._weight = torch.zeros(logits[0].shape[-2:], device=self._device)
            self._means = [torch.zeros(member.shape, dtype=torch.float16) for member in logits]
        everything = torch.ones_like(self._weight[y, x])[None, None]
        shown = turned(everything, -degrees, self._spacing, outside="zeros")[0, 0] * weight_of(agreement)
        self._weight[y, x] += shown
        share = shown / self._weight[y, x]
        for mean, member in zip(self._means, logits):
            for z in range(mean.shape[1]):  # volumes are large
                said = turned(self._space.probabilities(member[None, :, z].to(self._device)), -degrees, self._spacing)[0]
                mean[:, z, y, x] = torch.lerp(mean[:, z, y, x].to(said), said, share)

    def logits(self) -> list[Tensor]:
        """Each member's, (heads, Z, Y, X), half precision, on the CPU."""
        return [torch.stack([self._space.logits(piece[None].float())[0].half() for piece in mean.unbind(1)], 1) for mean in self._means]


def weight_of(agreement: float) -> float:
    """How much a view counts: one over the members' disagreement, to the power of :data:`EMPHASIS`; 1 where they see no organ."""
    return 1.0 if math.isnan(agreement) else (1 / max(1 - agreement, _LEAST_DISAGREEMENT)) ** EMPHASIS
