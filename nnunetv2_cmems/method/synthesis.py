"""The operation Ω: organs cut from the exemplar, transformed, and overlaid on other backgrounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from nnunetv2_cmems.config import SynthesisConfig
from nnunetv2_cmems.method.exemplars import ExemplarCrops
from nnunetv2_cmems.method.perturbations import blur, draw_deformation, sample, sampling_grid


class SyntheticBatch(NamedTuple):
    """Synthetic pairs.

    Attributes:
        images: (B, C, *patch).
        labels: (B, *patch) class indices.
        mask: (B, *patch) bool, the pixels whose label is known.
    """

    images: Tensor
    labels: Tensor
    mask: Tensor


def synthesise(
    crops: ExemplarCrops,
    backgrounds: Tensor,
    unlabelled: Tensor | None,
    config: SynthesisConfig,
    is_unlabelled: Tensor | None = None,
    *,
    unknown: Tensor | None = None,
    spacing: Sequence[float] | None = None,
) -> SyntheticBatch:
    """Ω for a batch: paste the organs of each exemplar crop onto a background (paper, section 3).

    All organs are deformed together; where the exemplar shows several groups of organs that do not
    touch, each group is then deformed again on its own, about its centre. On an unlabelled
    background only the pasted organs and a band around them are known; what lies beyond may show an
    organ that nobody has labelled, and is masked out.

    Args:
        crops: undeformed exemplar crops, B of them.
        backgrounds: (B, C, *patch) the exemplar with its organs inpainted.
        unlabelled: (U, C, *patch) unlabelled crops, or None where there are none.
        config: the ranges.
        is_unlabelled: (B,) bool, which backgrounds are unlabelled images; None: drawn here.
        unknown: (B, 1, *patch) bool, what of ``backgrounds`` is not annotated; None: nothing.
        spacing: the voxels' sides in mm; None: cubes.
    """
    batch, _, *patch = crops.images.shape
    device = crops.images.device
    if is_unlabelled is None:
        is_unlabelled = choose_backgrounds(batch, unlabelled, config, device)
    is_unlabelled = is_unlabelled.reshape(batch, *[1] * (backgrounds.ndim - 1))
    canvas = backgrounds
    if unlabelled is not None:
        others = unlabelled[torch.arange(batch, device=device) % len(unlabelled)]
        canvas = torch.where(is_unlabelled, others, backgrounds)
    joint = draw_deformation(batch, patch, config.joint, device, spacing)
    grid = sampling_grid(patch, joint)
    content = sample(crops.images, grid)
    maps = [crops.labels, crops.groups, *([] if crops.near is None else [crops.near])]
    labels, groups, *surroundings = sample(torch.stack(maps, 1).float(), grid, nearest=True).split(1, 1)
    margin = max(1, round(config.ignore_margin * min(patch)))
    painted = torch.zeros_like(labels)
    for group in range(1, crops.num_groups + 1):
        shape = (groups == group).float()
        organs = content, labels * shape, shape
        if crops.num_groups > 1:
            organs = _move(*organs, config, patch, spacing)
        canvas, painted = _paste(canvas, painted, *organs, margin, config)
    known = dilate(painted > 0, margin) | ~is_unlabelled
    if config.known_beyond < 1:
        near = dilate(painted > 0, max(margin, reach(config, patch)))
        for others in surroundings:
            near = near | (others > 0)
        known = known | ~near
    if unknown is not None:
        known = known & (~unknown | is_unlabelled | (painted > 0))
    return SyntheticBatch(canvas, painted[:, 0].long(), known[:, 0])


def reach(config: SynthesisConfig, patch: Sequence[int]) -> int:
    """Distance in voxels from the organs beyond which an unlabelled background is known."""
    return round(config.known_beyond * min(patch)) if config.known_beyond < 1 else 0


def inpaint(image: Tensor, hole: Tensor) -> Tensor:
    """Fill a hole from its surroundings: a smooth base by pull-push, texture by noise.

    Args:
        image: (B, C, *spatial).
        hole: (B, 1, *spatial) bool.

    Returns:
        A new tensor; outside the hole it equals ``image``.
    """
    known = (~hole).to(image.dtype)
    base = _pull_push(image * known, known.expand_as(image))
    pool = functional.avg_pool2d if image.ndim == 4 else functional.avg_pool3d
    detail = image - pool(image, 3, 1, 1, count_include_pad=False)
    ring = (dilate(hole, 6) & ~dilate(hole, 1)).to(image.dtype)
    axes = list(range(2, image.ndim))
    texture = ((detail**2 * ring).sum(axes, keepdim=True) / ring.sum(axes, keepdim=True).clamp_min(1)).sqrt()
    return torch.where(hole, base + texture * torch.randn_like(image), image)


def dilate(mask: Tensor, radius: int) -> Tensor:
    """A (B, C, *spatial) bool mask, grown by ``radius`` voxels (square neighbourhood)."""
    width = 2 * radius + 1
    for axis in range(2, mask.ndim):  # one axis at a time: the same square; running sums cost the same for any radius
        room = [0, 0] * (mask.ndim - 1 - axis) + [radius + 1, radius]
        sums = functional.pad(mask, room).cumsum(axis, dtype=torch.int32)
        n = mask.shape[axis]
        mask = sums.narrow(axis, width, n) > sums.narrow(axis, 0, n)
    return mask


def choose_backgrounds(batch: int, unlabelled: Tensor | None, config: SynthesisConfig, device: torch.device) -> Tensor:
    """(B,) bool: which pairs get an unlabelled image as background; none where there are none."""
    if unlabelled is None:
        return torch.zeros(batch, dtype=torch.bool, device=device)
    return torch.rand(batch, device=device) < config.unlabelled_background


def _move(
    content: Tensor, labels: Tensor, shape: Tensor, config: SynthesisConfig, patch: Sequence[int], spacing: Sequence[float] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Deform one group of organs about its own centre."""
    move = draw_deformation(len(content), patch, config.separate, content.device, spacing)
    grid = sampling_grid(patch, move, pivots=_centre(shape))
    labels, shape = sample(torch.cat([labels, shape], 1), grid, nearest=True).split(1, 1)
    return sample(content, grid), labels, shape


def _paste(
    canvas: Tensor, painted: Tensor, content: Tensor, labels: Tensor, shape: Tensor, margin: int, config: SynthesisConfig
) -> tuple[Tensor, Tensor]:
    """Overlay one group on the canvas: intensities adapted, border blended."""
    ring = (dilate(shape > 0, margin) & (shape == 0)).float()
    mean, deviation = _statistics(content, ring)
    canvas_mean, canvas_deviation = _statistics(canvas, ring)
    factor = (canvas_deviation / deviation).clamp(0.5, 2.0) ** config.adapt
    content = (content - mean) * factor + mean + config.adapt * (canvas_mean - mean)
    alpha = shape
    if config.blend > 0:
        alpha = blur(shape, torch.full([1] * shape.ndim, config.blend, device=shape.device), config.blend)
    return alpha * content + (1 - alpha) * canvas, torch.where(shape > 0, labels, painted)


def _statistics(image: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    axes = list(range(2, image.ndim))
    total = weight.sum(axes, keepdim=True).clamp_min(1)
    mean = (image * weight).sum(axes, keepdim=True) / total
    variance = ((image - mean) ** 2 * weight).sum(axes, keepdim=True) / total
    return mean, variance.sqrt().clamp_min(1e-2)


def _centre(shape: Tensor) -> Tensor:
    """(B, d) centre of mass of (B, 1, *spatial), as a distance in voxels from the patch's centre."""
    spatial = shape.shape[2:]
    axes = [torch.arange(n, dtype=shape.dtype, device=shape.device) - (n - 1) / 2 for n in spatial]
    position = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    flat = shape.flatten(1)
    return (flat[:, None] * position.flatten(1)).sum(-1) / flat.sum(1, keepdim=True).clamp_min(1)


def _pull_push(value: Tensor, weight: Tensor) -> Tensor:
    """Extend known values (weight 1) over unknown ones (weight 0, value 0), from coarse to fine."""
    size = value.shape[2:]
    if max(size) <= 2:
        axes = list(range(2, value.ndim))
        mean = value.sum(axes, keepdim=True) / weight.sum(axes, keepdim=True).clamp_min(1)
        return value + (1 - weight) * mean
    pool = functional.adaptive_avg_pool2d if value.ndim == 4 else functional.adaptive_avg_pool3d
    half: Any = tuple((n + 1) // 2 for n in size)
    pooled, share = pool(value, half), pool(weight, half)
    known = (share > 0).to(value.dtype)
    coarse = _pull_push(known * pooled / share.clamp_min(1e-6), known)
    mode = "bilinear" if value.ndim == 4 else "trilinear"
    return value + (1 - weight) * functional.interpolate(coarse, size=size, mode=mode, align_corners=False)
