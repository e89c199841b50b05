"""Views of images: deformation, appearance, CutMix. Batched, on the tensor's own device, 2D and 3D.

Every perturbation draws its parameters in one function and applies them in another, so that one draw
can be replayed on image and label. Nothing writes into its input, and nothing waits for the device.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from nnunetv2_cmems.config import IntensityConfig, SpatialConfig


class Deformation(NamedTuple):
    """Where each voxel of the output patch is read from.

    Attributes:
        offsets: (B, *patch, d) distance in voxels, from the centre of the crop, in (z,) y, x order.
        matrix: (B, d, d) the linear part of the offsets (rotation, zoom, mirroring).
    """

    offsets: Tensor
    matrix: Tensor


MOST_ANISOTROPIC = 3.0
"""Ratio of the largest to the smallest voxel side above which volumes are turned within slices only (nnU-Net's value)."""


def draw_deformation(
    batch: int, patch: Sequence[int], config: SpatialConfig, device: torch.device, spacing: Sequence[float] | None = None
) -> Deformation:
    """Random rotation, zoom, shift, elastic deformation and mirroring for ``batch`` images.

    Args:
        batch: number of images B.
        patch: size of the output patch in voxels.
        config: the ranges.
        device: where to draw.
        spacing: the voxels' sides in mm; None: cubes. Volumes are turned in millimetres, and about the axis
            of thick slices only.
    """
    d = len(patch)
    size = torch.tensor(patch, dtype=torch.float32, device=device)
    axes = [torch.arange(n, dtype=torch.float32, device=device) - (n - 1) / 2 for n in patch]
    base = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)  # (*patch, d)
    active = (torch.rand(batch, device=device) < config.probability).float()
    matrix = _rotation(batch, d, math.radians(config.rotation), active, device, spacing or [1.0] * d)
    low, high = math.log(config.scale[0]), math.log(config.scale[1])
    zoom = torch.exp(-active * (low + (high - low) * torch.rand(batch, device=device)))
    matrix = matrix * zoom[:, None, None]
    if config.mirror:
        flips = 1 - 2 * active[:, None] * (torch.rand(batch, d, device=device) < 0.5).float()
        matrix = matrix * flips[:, None, :]
    shift = active[:, None] * config.shift * size * (2 * torch.rand(batch, d, device=device) - 1)
    offsets = torch.einsum("bij,nj->bni", matrix, base.reshape(-1, d)).reshape(batch, *patch, d)
    offsets = offsets + shift.reshape(batch, *[1] * d, d)
    if config.elastic > 0:
        nodes = 2 * torch.rand(batch, d, *[config.elastic_nodes] * d, device=device) - 1
        field = functional.interpolate(nodes, size=tuple(patch), mode="bicubic" if d == 2 else "trilinear", align_corners=True)
        strength = active * torch.rand(batch, device=device) * config.elastic
        offsets = offsets + field.movedim(1, -1) * (strength.reshape(batch, *[1] * (d + 1)) * size)
    return Deformation(offsets, matrix)


def deform(
    images: Tensor, deformation: Deformation, centres: Tensor | None = None, *, pivots: Tensor | None = None, nearest: bool = False
) -> Tensor:
    """Read patches from images; beyond the image there is 0.

    Args:
        images: (B, C, *spatial) floats, or (1, C, *spatial) for all.
        deformation: from :func:`draw_deformation`.
        centres: (B, d) voxel coordinates of the patches' centres; None: the images' centres.
        pivots: (B, d) fixed points of rotation and zoom, as distances from the centres; None: the centres.
        nearest: nearest neighbour instead of linear interpolation (for labels).

    Returns:
        (B, C, *patch).
    """
    offsets = deformation.offsets
    batch, d = offsets.shape[0], offsets.shape[-1]
    size = torch.tensor(images.shape[2:], dtype=offsets.dtype, device=offsets.device)
    voxels = read_from(deformation, ((size - 1) / 2).expand(batch, d) if centres is None else centres, pivots)
    grid = ((2 * voxels + 1) / size - 1).flip(-1)
    images = images.expand(batch, *images.shape[1:])
    return functional.grid_sample(images, grid, mode="nearest" if nearest else "bilinear", padding_mode="zeros", align_corners=False)


def read_from(deformation: Deformation, centres: Tensor, pivots: Tensor | None = None) -> Tensor:
    """(B, *patch, d) voxel coordinates that :func:`deform` reads from; arguments as there."""
    offsets = deformation.offsets
    batch, d = offsets.shape[0], offsets.shape[-1]
    if pivots is not None:
        centres = centres + pivots - torch.einsum("bij,bj->bi", deformation.matrix, pivots)
    return offsets + centres.reshape(batch, *[1] * d, d)


def rotation_planes(spacing: Sequence[float]) -> list[tuple[int, int]]:
    """The pairs of axes within which images of this spacing are turned."""
    if len(spacing) == 2:
        return [(0, 1)]
    if max(spacing) / min(spacing) <= MOST_ANISOTROPIC:
        return [(1, 2), (0, 2), (0, 1)]
    thick = max(range(3), key=lambda axis: spacing[axis])
    first, second = (axis for axis in range(3) if axis != thick)
    return [(first, second)]


def _rotation(batch: int, d: int, limit: float, active: Tensor, device: torch.device, spacing: Sequence[float]) -> Tensor:
    angles = active[:, None] * limit * (2 * torch.rand(batch, d, device=device) - 1)
    sin, cos = angles.sin(), angles.cos()
    matrix = torch.eye(d, device=device).repeat(batch, 1, 1)
    for plane, (i, j) in enumerate(rotation_planes(spacing)):
        turn = torch.eye(d, device=device).repeat(batch, 1, 1)
        turn[:, i, i] = turn[:, j, j] = cos[:, plane]
        turn[:, i, j], turn[:, j, i] = -sin[:, plane] * (spacing[j] / spacing[i]), sin[:, plane] * (spacing[i] / spacing[j])
        matrix = matrix @ turn
    return matrix


def change_appearance(images: Tensor, config: IntensityConfig) -> Tensor:
    """Random change of appearance of each image and channel, on its own.

    Changes of zero strength are skipped; with ``probability`` 0 the images come back as they are.

    Args:
        images: (B, C, *spatial), z-scored.
        config: probability and ranges.

    Returns:
        A tensor of the same shape; the input itself where nothing is to be changed.
    """
    if config.probability == 0:
        return images
    if config.bias > 0:
        images = _sometimes(images, _biased(images, config.bias), config)
    if config.curve > 0:
        images = _sometimes(images, _curved(images, config.curve), config)
    if config.gamma != (1.0, 1.0):
        images = _sometimes(images, _gamma(images, config.gamma), config)
    if config.contrast != (1.0, 1.0):
        mean = _mean(images)
        images = _sometimes(images, (images - mean) * _log_uniform(images, config.contrast) + mean, config)
    if config.brightness > 0:
        images = _sometimes(images, images + config.brightness * (2 * _uniform(images) - 1), config)
    if config.blur > 0:
        images = _sometimes(images, blur(images, _uniform(images) * config.blur, config.blur), config)
    if config.low_resolution > 1:
        images = _sometimes(images, _low_resolution(images, config.low_resolution), config)
    if config.noise > 0:
        images = _sometimes(images, images + torch.randn_like(images) * (_uniform(images) * config.noise), config)
    return images


def blur(images: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """Gaussian blur with a sigma for each image and channel.

    Args:
        images: (B, C, *spatial).
        sigma: voxels, broadcastable to (B, C, 1, ...).
        largest: upper bound of ``sigma``; sets the kernel's radius.
    """
    radius = max(1, math.ceil(3 * largest))
    b, c, *spatial = images.shape
    steps = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-0.5 * (steps / sigma.expand(b, c, *[1] * len(spatial)).reshape(b * c, 1).clamp_min(1e-3)) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    convolve = functional.conv2d if len(spatial) == 2 else functional.conv3d
    out = images.reshape(1, b * c, *spatial)
    for axis in range(len(spatial)):
        shape = [b * c, 1] + [1] * len(spatial)
        shape[2 + axis] = 2 * radius + 1
        padding = [0] * (2 * len(spatial))
        padding[2 * (len(spatial) - 1 - axis)] = padding[2 * (len(spatial) - 1 - axis) + 1] = radius
        out = convolve(functional.pad(out, padding, mode="replicate"), kernel.reshape(shape), groups=b * c)
    return out.reshape(images.shape)


class CutMix(NamedTuple):
    """Rectangles that each image takes from the one before it in the batch.

    Attributes:
        box: (B, 1, *spatial) bool, True where the other image's content is taken.
    """

    box: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        """Mix (B, C, *spatial) images, or (B, *spatial) labels or masks."""
        box = self.box if values.ndim == self.box.ndim else self.box[:, 0]
        return torch.where(box, values.roll(1, 0), values)


def draw_cutmix(batch: int, patch: Sequence[int], probability: float, device: torch.device) -> CutMix:
    """Boxes of 2 % to 40 % of the patch, with an aspect ratio of 0.3 to 3.3 (UniMatch's ranges)."""
    d = len(patch)
    volume = 0.02 + 0.38 * torch.rand(batch, device=device)
    aspect = torch.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * torch.rand(batch, d, device=device))
    aspect = aspect / aspect.prod(1, keepdim=True) ** (1 / d)
    sides = (volume[:, None] ** (1 / d) * aspect**0.5).clamp_max(1.0)
    corner = torch.rand(batch, d, device=device) * (1 - sides)
    used = (torch.rand(batch, device=device) < probability) & (batch > 1)
    box = used.reshape(batch, *[1] * d).expand(batch, *patch)
    for axis, n in enumerate(patch):
        position = ((torch.arange(n, device=device) + 0.5) / n)[None]
        inside = (position >= corner[:, axis, None]) & (position < (corner + sides)[:, axis, None])
        box = box & inside.reshape(batch, *[n if i == axis else 1 for i in range(d)])
    return CutMix(box[:, None])


def _parameter_shape(images: Tensor) -> list[int]:
    return [*images.shape[:2], *[1] * (images.ndim - 2)]


def _uniform(images: Tensor) -> Tensor:
    return torch.rand(_parameter_shape(images), device=images.device)


def _log_uniform(images: Tensor, limits: tuple[float, float]) -> Tensor:
    low, high = math.log(limits[0]), math.log(limits[1])
    return torch.exp(low + (high - low) * _uniform(images))


def _sometimes(before: Tensor, after: Tensor, config: IntensityConfig) -> Tensor:
    if config.probability >= 1:
        return after
    return torch.where(_uniform(before) < config.probability, after, before)


def _axes(images: Tensor) -> list[int]:
    return list(range(2, images.ndim))


def _mean(images: Tensor) -> Tensor:
    return images.mean(_axes(images), keepdim=True)


def _with_statistics_of(changed: Tensor, reference: Tensor) -> Tensor:
    """``changed``, shifted and scaled to each image's mean and standard deviation in ``reference``."""
    axes = _axes(reference)
    scale = reference.std(axes, keepdim=True) / changed.std(axes, keepdim=True).clamp_min(1e-5)
    return (changed - _mean(changed)) * scale + _mean(reference)


def _unit_range(images: Tensor) -> Tensor:
    axes = _axes(images)
    low, high = images.amin(axes, keepdim=True), images.amax(axes, keepdim=True)
    return (images - low) / (high - low).clamp_min(1e-5)


def _gamma(images: Tensor, limits: tuple[float, float]) -> Tensor:
    return _with_statistics_of(_unit_range(images).clamp_min(1e-7) ** _log_uniform(images, limits), images)


def _curved(images: Tensor, strength: float, nodes: int = 8) -> Tensor:
    """A random monotone piecewise linear intensity curve, mixed with the identity."""
    position = _unit_range(images) * (nodes - 1)
    steps = torch.rand(*images.shape[:2], nodes - 1, device=images.device) ** 2 + 0.05
    heights = functional.pad(steps.cumsum(-1) / steps.sum(-1, keepdim=True), (1, 0))
    lower = position.floor().clamp(0, nodes - 2)
    flat = lower.flatten(2).long()
    left, right = heights.gather(2, flat), heights.gather(2, flat + 1)
    curved = (left + (right - left) * (position - lower).flatten(2)).reshape(images.shape)
    amount = strength * _uniform(images)
    return _with_statistics_of((1 - amount) * position / (nodes - 1) + amount * curved, images)


def _biased(images: Tensor, amplitude: float, nodes: int = 3) -> Tensor:
    """Multiplication (of the non-negative intensities) by a smooth random field around 1."""
    d = images.ndim - 2
    coarse = 2 * torch.rand(*images.shape[:2], *[nodes] * d, device=images.device) - 1
    field = functional.interpolate(coarse, size=images.shape[2:], mode="bicubic" if d == 2 else "trilinear", align_corners=True)
    low = images.amin(_axes(images), keepdim=True)
    return (images - low) * torch.exp(amplitude * _uniform(images) * field) + low


def _low_resolution(images: Tensor, largest: float) -> Tensor:
    """Down- and up-sampled by a factor that is drawn once for the batch."""
    factor = random.uniform(1.0, largest)
    small = [max(2, round(n / factor)) for n in images.shape[2:]]
    mode = "bilinear" if images.ndim == 4 else "trilinear"
    reduced = functional.interpolate(images, size=small, mode="nearest-exact")
    return functional.interpolate(reduced, size=images.shape[2:], mode=mode, align_corners=False)
