"""Views of images: deformation, appearance, CutMix. Batched, on the tensor's own device, 2D and 3D.

Every perturbation draws its parameters in one function and applies them in another, so that one draw
can be replayed on image and label. Nothing writes into its input, and nothing waits for the device.
"""

from __future__ import annotations

import functools
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
    size, base = _constant(tuple(patch), device), _base(tuple(patch), device)
    active = (torch.rand(batch, device=device) < config.probability).float()
    matrix = _rotation(batch, d, math.radians(config.rotation), active, device, spacing or [1.0] * d)
    low, high = math.log(config.scale[0]), math.log(config.scale[1])
    zoom = torch.exp(-active * (low + (high - low) * torch.rand(batch, device=device)))
    matrix = matrix * zoom[:, None, None]
    if config.mirror:
        flips = 1 - 2 * active[:, None] * (torch.rand(batch, d, device=device) < 0.5).float()
        matrix = matrix * flips[:, None, :]
    shift = active[:, None] * config.shift * size * (2 * torch.rand(batch, d, device=device) - 1)
    offsets = (base.reshape(-1, d) @ matrix.mT).reshape(batch, *patch, d)
    offsets = offsets + shift.reshape(batch, *[1] * d, d)
    if config.elastic > 0:
        nodes = 2 * torch.rand(batch, d, *[config.elastic_nodes] * d, device=device) - 1
        field = smooth_field(nodes, patch)
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
    return sample(images, sampling_grid(images.shape[2:], deformation, centres, pivots), nearest=nearest)


def sampling_grid(
    spatial: Sequence[int], deformation: Deformation, centres: Tensor | None = None, pivots: Tensor | None = None
) -> Tensor:
    """What :func:`deform` reads of images of this size, (B, *patch, d) as torch's ``grid_sample`` takes it; arguments as there."""
    offsets = deformation.offsets
    size = _constant(tuple(spatial), offsets.device)
    voxels = read_from(deformation, ((size - 1) / 2).expand(offsets.shape[0], -1) if centres is None else centres, pivots)
    return as_grid(voxels, spatial)


def as_grid(voxels: Tensor, spatial: Sequence[int]) -> Tensor:
    """Voxel coordinates (B, *patch, d) in images of this size, as torch's ``grid_sample`` takes them."""
    return ((2 * voxels + 1) / _constant(tuple(spatial), voxels.device) - 1).flip(-1)


def sample(images: Tensor, grid: Tensor, *, nearest: bool = False) -> Tensor:
    """Read (B, C, *patch) from images at a :func:`sampling_grid`; arguments as in :func:`deform`."""
    images = images.expand(len(grid), *images.shape[1:])
    return functional.grid_sample(images, grid, mode="nearest" if nearest else "bilinear", padding_mode="zeros", align_corners=False)


def read_from(deformation: Deformation, centres: Tensor, pivots: Tensor | None = None) -> Tensor:
    """(B, *patch, d) voxel coordinates that :func:`deform` reads from; arguments as there."""
    offsets = deformation.offsets
    batch, d = offsets.shape[0], offsets.shape[-1]
    if pivots is not None:
        centres = centres + pivots - torch.einsum("bij,bj->bi", deformation.matrix, pivots)
    return offsets + centres.reshape(batch, *[1] * d, d)


def smooth_field(nodes: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, *nodes) values at control points, interpolated to (B, C, *size): bicubic for images, linear for volumes.

    One small matrix product an axis. That is what torch's own ``interpolate`` computes, which takes several times as long.
    """
    d = len(size)
    mode = "bicubic" if d == 2 else "linear"
    for axis, n in enumerate(size):
        weights = _interpolation(nodes.shape[2 + axis], n, mode, nodes.device)
        nodes = (nodes.movedim(2 + axis, -1) @ weights).movedim(-1, 2 + axis)
    return nodes.contiguous()


@functools.lru_cache(maxsize=64)
def _interpolation(nodes: int, size: int, mode: str, device: torch.device) -> Tensor:
    """(nodes, size): what each control point adds to each place between the first and the last one."""
    unit = torch.eye(nodes)[None]
    if mode == "linear":
        return functional.interpolate(unit, size=size, mode="linear", align_corners=True)[0].to(device)
    return functional.interpolate(unit[:, None], size=(nodes, size), mode="bicubic", align_corners=True)[0, 0].to(device)


@functools.lru_cache(maxsize=4)
def _base(patch: tuple[int, ...], device: torch.device) -> Tensor:
    """(*patch, d) the voxels' distances from the patch's centre."""
    axes = [torch.arange(n, dtype=torch.float32, device=device) - (n - 1) / 2 for n in patch]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


@functools.lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers on the device; made once, as a copy from the host takes as long as a small kernel."""
    return torch.tensor(values, dtype=torch.float32, device=device)


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
    weights = kernel.mT.reshape(2 * radius + 1, b, c, *[1] * len(spatial)).unbind()
    out = images
    for axis, n in enumerate(spatial):
        padding = [0] * (2 * len(spatial))
        padding[2 * (len(spatial) - 1 - axis)] = padding[2 * (len(spatial) - 1 - axis) + 1] = radius
        padded = functional.pad(out, padding, mode="replicate")
        out = padded.narrow(2 + axis, 0, n) * weights[0]
        for step in range(1, 2 * radius + 1):  # faster than a convolution whose kernel differs from image to image
            out.addcmul_(padded.narrow(2 + axis, step, n), weights[step])
    return out


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
    mean, shift = _mean(reference), _mean(changed)
    centred = changed - shift
    scale = _deviation(reference - mean) / _deviation(centred).clamp_min(1e-5)
    return centred * scale + mean


def _deviation(centred: Tensor) -> Tensor:
    """Standard deviation of each image and channel from its mean 0 (torch's own ``std`` is many times slower on a CPU)."""
    return centred.square().mean(_axes(centred), keepdim=True).sqrt()


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
    field = smooth_field(coarse, images.shape[2:])
    low = images.amin(_axes(images), keepdim=True)
    return (images - low) * torch.exp(amplitude * _uniform(images) * field) + low


def _low_resolution(images: Tensor, largest: float) -> Tensor:
    """Down- and up-sampled by a factor that is drawn once for the batch."""
    factor = random.uniform(1.0, largest)
    small = [max(2, round(n / factor)) for n in images.shape[2:]]
    mode = "bilinear" if images.ndim == 4 else "trilinear"
    reduced = functional.interpolate(images, size=small, mode="nearest-exact")
    return functional.interpolate(reduced, size=images.shape[2:], mode=mode, align_corners=False)
