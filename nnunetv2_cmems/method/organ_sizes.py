"""Organs of other sizes beside each other than one annotation shows.

Networks that learn organs from one image go by their sizes: where the annotated right ventricle is four times as large as the left one's
cavity, a left one that is as large as that is a right one to them. Zooming the whole image changes nothing about it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy import ndimage
from torch import Tensor

from nnunetv2_cmems.method.planes import AnnotatedPlane

MOST = 8
"""Organs of an image that change at a time, chosen at random."""

WIDTHS = 0.8, 1.5
"""How far the change of an organ reaches: sigma of a Gaussian, as a multiple of the organ's radius."""

SMALLEST_PART = 0.1
"""A connected piece of a class is an organ of its own if it has this part of the voxels of the largest one."""


class Organs(NamedTuple):
    """Where the N organs of an image lie.

    Attributes:
        middles: (N, d) voxel coordinates.
        radii: (N,) of the discs, or balls, of the same size, in units of ``sides``.
        sides: (d,) of a voxel, so that the shortest is 1.
    """

    middles: Tensor
    radii: Tensor
    sides: Tensor


def organs_of(label: Tensor, spacing: Sequence[float] | None = None) -> Organs | None:
    """The connected pieces of each class; None where there is none.

    Args:
        label: (*spatial) class indices, on the CPU; 0 or less is no organ.
        spacing: the voxels' sides in mm; None: cubes.
    """
    d = label.ndim
    sides = _sides(d, spacing)
    middles, sizes = [], []
    for value in (value for value in label.unique().tolist() if value > 0):
        parts, count = ndimage.label((label == value).numpy())
        counts = ndimage.sum_labels(parts > 0, parts, range(1, count + 1))
        large = counts >= SMALLEST_PART * counts.max()
        middles += ndimage.center_of_mass(parts > 0, parts, large.nonzero()[0] + 1)
        sizes += counts[large].tolist()
    if not middles:
        return None
    volumes = torch.tensor(sizes, dtype=torch.float32) * sides.prod()
    ball = math.pi if d == 2 else 4 * math.pi / 3
    return Organs(torch.tensor(middles, dtype=torch.float32), (volumes / ball) ** (1 / d), sides)


def organs_of_planes(planes: Sequence[AnnotatedPlane], spacing: Sequence[float] | None = None) -> Organs | None:
    """Likewise those that annotated planes of a volume show, each plane's own; arguments as there, of the volume."""
    found = []
    for plane in planes:
        pixels = None if spacing is None else [step * spacing[axis] for step, axis in zip(plane.scale, plane.others)]
        organs = organs_of(plane.labels.cpu(), pixels)
        if organs is not None:
            shortest = min(plane.scale) if pixels is None else min(pixels) / min(spacing or [1.0])
            found.append((plane.in_volume(organs.middles), organs.radii * shortest))
    if not found:
        return None
    middles, radii = (torch.cat(part) for part in zip(*found))
    return Organs(middles, radii, _sides(3, spacing))


def _sides(d: int, spacing: Sequence[float] | None) -> Tensor:
    return torch.ones(d) if spacing is None else torch.tensor(list(spacing), dtype=torch.float32) / min(spacing)


class SizeChange(NamedTuple):
    """How much the organs of images change.

    Attributes:
        organs: (M,) which ones.
        factors: (B, M) by which each is enlarged in its middle.
        widths: (B, M) how far that reaches, as a multiple of the organ's radius.
    """

    organs: Tensor
    factors: Tensor
    widths: Tensor


def draw_sizes(batch: int, organs: Organs, scale: tuple[float, float]) -> SizeChange:
    """Random changes of up to :data:`MOST` organs, the same ones for all images, each by a factor of its own.

    Args:
        batch: number of images B.
        organs: those that there are.
        scale: smallest and largest factor; each is as likely as its inverse.
    """
    device, count = organs.radii.device, len(organs.radii)
    chosen = torch.randperm(count, device=device)[:MOST]
    low, high = map(math.log, scale)
    factors, widths = torch.rand(2, batch, len(chosen), device=device)
    return SizeChange(chosen, torch.exp(low + (high - low) * factors), WIDTHS[0] + (WIDTHS[1] - WIDTHS[0]) * widths)


def resized(voxels: Tensor, organs: Organs, change: SizeChange) -> Tensor:
    """Where the image with changed organs is read from.

    About the middle of an organ the image is enlarged; the farther from it, the less. One organ changes after the other, so that the
    image is nowhere folded by factors from 0.31 on: along a ray from the middle the slope is least at sqrt(3) sigma, where it is
    1 - 2 (1 / factor - 1) exp(-3 / 2).

    Args:
        voxels: (B, *patch, d) voxel coordinates in the image, see :func:`~nnunetv2_cmems.method.perturbations.read_from`.
        organs: of the image.
        change: from :func:`draw_sizes`.

    Returns:
        (B, *patch, d).
    """
    room = [1] * (voxels.ndim - 2)
    middles, reaches = organs.middles[change.organs], change.widths * organs.radii[change.organs]
    for middle, factor, reach in zip(middles, change.factors.unbind(1), reaches.unbind(1)):
        away = voxels - middle
        near = torch.exp(-((away * organs.sides) ** 2).sum(-1) / (2 * reach.reshape(-1, *room) ** 2))
        voxels = voxels + away * ((1 / factor - 1).reshape(-1, *room) * near)[..., None]
    return voxels
