"""Annotated planes in volumes: supervision on the plane alone, at its own resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class AnnotatedPlane(NamedTuple):
    """One annotated slice of a volume.

    Attributes:
        axis: axis of the volume (Z, Y, X) that the plane is perpendicular to.
        position: where it crosses that axis, in voxels of the volume; not whole in general.
        labels: (P, Q) labels at the plane's own resolution, along the two other axes; negative where unknown.
        scale: voxels of the volume per pixel of ``labels``, along the two other axes. As in nnU-Net's
            resampling, pixel i lies at ``(i + 0.5) * scale - 0.5``.
    """

    axis: int
    position: float
    labels: Tensor
    scale: tuple[float, float]

    def places(self, label: int) -> Tensor:
        """(N, 3) coordinates in the volume of the plane's pixels with a label."""
        return self.in_volume((self.labels == label).nonzero().float())

    def in_volume(self, pixels: Tensor) -> Tensor:
        """(N, 3) coordinates in the volume of places (N, 2) in the plane, in pixels."""
        found = torch.full((len(pixels), 3), self.position)
        for column, axis in enumerate(self.others):
            found[:, axis] = (pixels[:, column] + 0.5) * self.scale[column] - 0.5
        return found

    @property
    def others(self) -> tuple[int, int]:
        """The two axes of the volume that lie in the plane."""
        first, second = (a for a in range(3) if a != self.axis)
        return first, second


def look_up(planes: Sequence[AnnotatedPlane], voxels: Tensor) -> Tensor:
    """Labels of the voxels through which a plane passes; -1 elsewhere.

    A plane makes a layer that is one voxel thick and has no hole, however the crop is turned, bent or
    zoomed: along the axis of the crop that crosses it most steeply, it takes the one voxel whose centre is
    nearest to it. Labels are those of the plane's nearest pixel.

    Args:
        planes: the annotated planes of one volume, on the device of ``voxels``.
        voxels: (B, *patch, 3) coordinates in the volume of a crop's voxels.

    Returns:
        (B, *patch) int64.
    """
    found = torch.full(voxels.shape[:-1], -1, dtype=torch.int64, device=voxels.device)
    for plane in planes:
        distance = (voxels[..., plane.axis] - plane.position) / _step(voxels[..., plane.axis])
        pixels = [((voxels[..., a] + 0.5) / s - 0.5).round().long() for a, s in zip(plane.others, plane.scale)]
        inside = (distance >= -0.5) & (distance < 0.5)
        for pixel, size in zip(pixels, plane.labels.shape):
            inside = inside & (pixel >= 0) & (pixel < size)
        first, second = (pixel.clamp(0, size - 1) for pixel, size in zip(pixels, plane.labels.shape))
        found = torch.where(inside & (found < 0), plane.labels[first, second].long(), found)
    return found


def _step(coordinate: Tensor) -> Tensor:
    """How much a (B, *patch) coordinate changes from voxel to voxel along the axis where it changes most."""
    steps = []
    for axis in range(1, coordinate.ndim):
        if coordinate.shape[axis] > 1:
            difference = coordinate.diff(dim=axis)
            last = difference.narrow(axis, difference.shape[axis] - 1, 1)
            steps.append(torch.cat([difference, last], axis).abs())
    return torch.stack(steps).amax(0).clamp_min(1e-6)
