"""The supervised loss and the confidence-masked consistency, one function for both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional


def class_counts(labels: Sequence[Tensor], num_classes: int) -> Tensor:
    """Pixels of each class, (K,) float64; ``labels`` are integer maps of any shape, negative values do not count."""
    return torch.stack([torch.stack([(label == k).sum() for label in labels]).sum() for k in range(num_classes)]).double()


def weights_from(counts: Tensor, exponent: float) -> Tensor:
    """Cross-entropy weights, ``frequency ** -exponent``, scaled so that the mean over pixels is 1.

    Args:
        counts: (..., K) pixels of each class. One that is not shown gets the weight of the rarest that is.
        exponent: 0 gives equal weights, 1 the full inverse frequency.

    Returns:
        (..., K) float weights. Nothing waits for the device.
    """
    total = counts.sum(-1, keepdim=True)
    rarest = torch.where(counts > 0, counts, total).amin(-1, keepdim=True)
    weights = (torch.where(counts > 0, counts, rarest) / total) ** -exponent
    return (weights / (weights * counts / total).sum(-1, keepdim=True)).float()


def deep_supervision_weights(num_scales: int) -> list[float]:
    """nnU-Net's weights of the resolutions: halved from scale to scale, 0 for the coarsest, sum 1."""
    if num_scales == 1:
        return [1.0]
    raw = [0.5**i for i in range(num_scales - 1)] + [0.0]
    return [weight / sum(raw) for weight in raw]


def weighted_scales(scales: Sequence[Tensor]) -> Iterator[tuple[Tensor, float]]:
    """The resolutions of a prediction, the finest first, each with its weight in the loss; those that have none are left out."""
    return ((scale, weight) for scale, weight in zip(scales, deep_supervision_weights(len(scales))) if weight)


def segmentation_loss(
    scales: Sequence[Tensor],
    target: Tensor,
    mask: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    cross_entropy_weight: float = 1.0,
    dice_weight: float = 1.0,
    dice_over: Literal["shown", "all"] = "shown",
    over_all_pixels: bool = False,
) -> Tensor:
    """Cross-entropy plus soft Dice over the pixels of ``mask``, deeply supervised.

    With the exemplar's labels this is the supervised loss; with the other member's pseudo-labels and
    its confidence mask it is the consistency term (paper, section 3).

    Target and weights are those of a :class:`~nnunetv2_cmems.method.label_space.LabelSpace`: class
    indices make it a softmax over the heads, maps of 0 and 1 per region a sigmoid for each head.

    Args:
        scales: logits (B, K, *spatial_s), the finest resolution first.
        target: (B, *spatial) class indices, or (B, K, *spatial) bool for K regions, at the finest resolution.
        mask: (B, *spatial) bool, the pixels that count, or (B, K, *spatial), those that count for each region; None: all.
        weights: (K,) class weights of the cross-entropy, or (K, 2) for the outside and the inside of each region.
        cross_entropy_weight: weight of the cross-entropy.
        dice_weight: weight of the Dice loss beside the cross-entropy.
        dice_over: which classes the Dice loss counts, see :func:`dice_loss` and :func:`dice_loss_of_all`.
        over_all_pixels: divide the cross-entropy by all pixels instead of those in ``mask``, so that
            few confident pixels weigh little (as FixMatch does).

    Returns:
        A scalar.
    """
    total = scales[0].new_zeros((), dtype=torch.float32)
    for logits, scale_weight in weighted_scales(scales):
        size = logits.shape[2:]
        scale_target = _nearest(target, size)
        scale_mask = None if mask is None else _nearest(mask, size)
        if cross_entropy_weight:
            entropy = cross_entropy(logits, scale_target, scale_mask, weights=weights, over_all_pixels=over_all_pixels)
            total = total + scale_weight * cross_entropy_weight * entropy
        if dice_weight:
            dice = (dice_loss if dice_over == "shown" else dice_loss_of_all)(logits, scale_target, scale_mask)
            total = total + scale_weight * dice_weight * dice
    return total


def cross_entropy(logits: Tensor, target: Tensor, mask: Tensor | None, *, weights: Tensor | None, over_all_pixels: bool) -> Tensor:
    """Weighted cross-entropy, averaged over the masked (or all) pixels by their weights.

    For regions it is the binary one, averaged over the regions too.

    Shape:
        ``logits`` (B, K, *spatial), ``target`` and ``mask`` (B, *spatial) or, for regions, (B, K, *spatial), result a scalar.
    """
    if target.ndim == logits.ndim:
        pixels = functional.binary_cross_entropy_with_logits(logits.float(), target.float(), reduction="none")
    else:
        pixels = functional.cross_entropy(logits.float(), target, reduction="none")
    pixel_weights = torch.ones_like(pixels) if weights is None else _pixel_weights(weights, target)
    counted = pixel_weights if mask is None else pixel_weights * over_heads(mask, pixels)
    divisor = pixel_weights if over_all_pixels else counted
    total, weight = over_processes((pixels * counted).sum(), divisor.sum())
    return total / weight.clamp_min(1e-6)


def dice_loss(logits: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """1 - soft Dice over the batch, mean over the foreground classes (or regions) that the masked target shows.

    A class without a target pixel is left out: pushing it down is the cross-entropy's task, and a
    pseudo-label that lacks a class must not be able to erase it. No class shown gives 0.

    Shape:
        ``logits`` (B, K, *spatial), ``target`` and ``mask`` (B, *spatial) or, for regions, (B, K, *spatial), result a scalar.
    """
    probabilities, one_hot = _masked(logits, target, mask)
    axes = [0, *range(2, logits.ndim)]
    sums = [part.sum(axes) for part in (probabilities * one_hot, probabilities, one_hot)]
    if target.ndim < logits.ndim:
        sums = [each[1:] for each in sums]  # without the background
    intersection, found, size = over_processes(*sums)
    dice = 2 * intersection / (found + size).clamp_min(1e-6)
    shown = (size > 0).float()
    return ((1 - dice) * shown).sum() / shown.sum().clamp_min(1.0)


def dice_loss_of_all(logits: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """1 - soft Dice over the batch, mean over every class, shown or not, the background among them (or every region).

    With squares in the denominator and a smoothing of 1e-5, as the public code of UniMatch and of cross teaching has it.

    Shape:
        ``logits`` (B, K, *spatial), ``target`` and ``mask`` (B, *spatial) or, for regions, (B, K, *spatial), result a scalar.
    """
    probabilities, one_hot = _masked(logits, target, mask)
    axes = [0, *range(2, logits.ndim)]
    intersection, size = over_processes((probabilities * one_hot).sum(axes), probabilities.square().sum(axes) + one_hot.sum(axes))
    return (1 - (2 * intersection + 1e-5) / (size + 1e-5)).mean()


def _masked(logits: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities and target of every head, (B, K, *spatial), 0 outside of the mask."""
    probabilities = logits.float().sigmoid() if target.ndim == logits.ndim else logits.float().softmax(1)
    known = torch.ones_like(probabilities[:, :1]) if mask is None else over_heads(mask, probabilities).float()
    if target.ndim == logits.ndim:
        return probabilities * known, target * known
    return probabilities * known, torch.zeros_like(probabilities).scatter_(1, target[:, None], known)


def mean_squared_error(scales: Sequence[Tensor], probabilities: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference of two predictions, over the heads and all pixels, deeply supervised; 0 outside of ``mask``.

    The consistency of Mean Teacher (Tarvainen & Valpola, NeurIPS 2017).

    Shape:
        ``scales`` probabilities (B, K, *spatial_s), the finest resolution first; ``probabilities`` (B, K, *spatial);
        ``mask`` (B, *spatial) or, for regions, (B, K, *spatial) bool; result a scalar.
    """
    total = scales[0].new_zeros((), dtype=torch.float32)
    for found, scale_weight in weighted_scales(scales):
        size = found.shape[2:]
        squares = (found - _nearest(probabilities, size)).square() * over_heads(_nearest(mask, size), found)
        squared, images = over_processes(squares.mean() * len(squares), squares.new_full((), len(squares)))
        total = total + scale_weight * squared / images
    return total


def over_processes(*sums: Tensor) -> tuple[Tensor, ...]:
    """Sums over a step's images, which several processes may share (``-num_gpus``): those over all of them. One process: as they are.

    Each process then has the loss of the whole step. Its gradient comes out as many times too large as there are processes, and
    of this process's images alone: the mean over the processes, which ``DistributedDataParallel`` takes, is the whole step's.
    All processes must call this equally often, in the same order. The backward pass talks to nobody.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return sums
    whole = torch.cat([part.detach().reshape(-1) for part in sums])
    dist.all_reduce(whole)
    parts = whole.split([part.numel() for part in sums])
    return tuple(all_of.view_as(part) + dist.get_world_size() * (part - part.detach()) for all_of, part in zip(parts, sums))


def over_heads(mask: Tensor, values: Tensor) -> Tensor:
    """A mask of pixels, (B, *spatial), such that it broadcasts to ``values``, which may have a dimension of heads."""
    return mask[:, None] if mask.ndim < values.ndim else mask


def _pixel_weights(weights: Tensor, target: Tensor) -> Tensor:
    if weights.ndim == 1:
        return weights[target]
    outside, inside = weights.reshape(*weights.shape, *[1] * (target.ndim - 2)).unbind(1)
    return torch.where(target, inside, outside)


def _nearest(values: Tensor, size: Sequence[int]) -> Tensor:
    """(B, *spatial) or (B, R, *spatial) labels or masks at another resolution."""
    d = len(size)
    there = values.shape[-d:]
    if there == tuple(size):
        return values
    if all(n % m == 0 for n, m in zip(there, size)):  # the middle of each block, without a copy
        for axis, (n, m) in enumerate(zip(there, size), values.ndim - d):
            values = values.movedim(axis, -1)[..., n // m // 2 :: n // m].movedim(-1, axis)
        return values
    maps = values if values.ndim == d + 2 else values[:, None]
    resized = functional.interpolate(maps.float(), size=tuple(size), mode="nearest-exact")
    return resized.reshape(*values.shape[:-d], *size).to(values.dtype)
