"""From the slices of a scan on which the members agree to its other slices, by registration.

Networks that know their organs from one slice are right where a slice looks like it, and wrong, with full confidence, towards the organs'
ends. Where they are wrong the members contradict each other. A neighbouring slice of the same scan shows the same organs, only a little
deformed: what the members say about a slice that they agree on can be carried over to it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from nnunetv2_cmems.method.boxes import surroundings
from nnunetv2_cmems.method.demons import demons, matched, resampled, shrunk
from nnunetv2_cmems.method.label_space import LabelSpace, Regions
from nnunetv2_cmems.method.objective import overlap

OWN = 0.2
"""Weight of what the members say about a slice, beside what comes from others."""

MARGIN = 0.5
"""How far around the organs slices are registered, in lengths of the longer side of the organs' box."""

_ITERATIONS = 20  # of the demons, at each resolution
_SMOOTHNESS = 1.0  # sigma, in voxels, of the blur of displacements after each iteration
_COARSEST = 48  # about so many voxels along the longer side of the box at the lowest resolution
_FINEST = 64  # and at the highest: displacements are smooth


def agreement_in_slices(members: Sequence[Tensor], space: LabelSpace) -> Tensor:
    """How well members agree on each organ in each slice: the mean Dice of their pairs.

    Args:
        members: labels of one scan in head space, (Z, Y, X) classes or (R, Z, Y, X) regions, by each of two members or more.
        space: what the networks' heads mean.

    Returns:
        (F, Z) for the classes or regions; NaN where none of the members sees any of it.
    """
    pairs = []
    for one, other in itertools.combinations(members, 2):
        slices = [overlap(a[None], b[None], space) for a, b in zip(one.unbind(-3), other.unbind(-3))]
        pairs.append(torch.stack([shared / sizes for shared, sizes in slices], 1))  # 0 / 0 is NaN
    return torch.stack(pairs).nanmean(0)


def agreement_in_scan(labels: Sequence[Tensor], space: LabelSpace) -> float:
    """How well labels of one scan agree: the Dice of their pairs, mean over pairs and organs; NaN where none shows any organ. Arguments
    as for :func:`agreement_in_slices`, but for (1, Z, Y, X) and (1, R, Z, Y, X)."""
    shared = [overlap(one, other, space) for one, other in itertools.combinations(labels, 2)]
    return float(torch.stack([(both[0] / both[1]).nanmean() for both in shared]).mean()) if shared else math.nan


@torch.no_grad()
def propagate(probabilities: Tensor, image: Tensor, agreement: Tensor, share: float, space: LabelSpace) -> Tensor:
    """Probabilities, those of slices that members disagree on carried over from slices that they agree on.

    For each class or region on its own: of the slices in which a member sees it, the ``share`` on which they agree best are anchors. The
    others follow, those next to anchors first: each gets the prediction of its neighbour towards the nearest anchor, and, where there
    is one, that of the nearest anchor on its other side, each deformed onto it and weighted by one over its distance; and
    :data:`OWN` of its own. Deformations come from demons (Thirion, Medical Image Analysis 2, 1998; with the symmetric forces of
    Vercauteren et al., MICCAI 2007) after matching of the histograms, at one or two resolutions, on the mean of the channels. What no
    member sees in a slice is not brought there. No random numbers are drawn.

    Args:
        probabilities: (K, Z, Y, X) of the classes, the background first, or (R, Z, Y, X) of the regions.
        image: (C, Z, Y, X), the preprocessed scan.
        agreement: (F, Z) from :func:`agreement_in_slices`.
        share: of the slices, in (0, 1].
        space: what the networks' heads mean.

    Returns:
        A tensor of the shape of ``probabilities``.
    """
    first = 0 if isinstance(space, Regions) else 1
    found = probabilities.numpy().copy()
    anchors = [_anchors(row, share) for row in agreement.numpy()]
    place = _around([found[first + organ, slices] > 0.5 for organ, slices in enumerate(anchors) if slices])
    if place is None:
        return probabilities
    grey = image.mean(0).numpy()[(slice(None), *place)].astype(np.float32)

    @cache  # organs share most of their slices
    def onto(target: int, source: int) -> sitk.Transform:
        return _deformation(grey[target], grey[source])

    for organ, slices in enumerate(anchors):
        whole = found[first + organ]
        near = whole[(slice(None), *place)]  # a view
        seen = np.flatnonzero(~np.isnan(agreement[organ].numpy())).tolist()
        for target, sources in _order(seen, slices):
            moved = [_moved(near[source], onto(target, source)) for source in sources]
            whole[target] *= OWN  # far from the anchors' organs nothing comes from others
            near[target] += (1 - OWN) * np.average(moved, axis=0, weights=[1 / abs(target - source) for source in sources])
    if first:
        organs = found[1:]
        organs /= np.maximum(organs.sum(0), 1)
        found[0] = 1 - organs.sum(0)
    return torch.from_numpy(found)


def _anchors(agreement: np.ndarray, share: float) -> list[int]:
    """The slices on which members agree best, of those that are not NaN: at least one, unless there is none."""
    seen = np.flatnonzero(~np.isnan(agreement))
    count = max(1, round(share * len(seen)))
    return sorted(seen[np.argsort(-agreement[seen], kind="stable")[:count]].tolist())


def _order(seen: Sequence[int], anchors: Sequence[int]) -> list[tuple[int, list[int]]]:
    """The slices that are no anchors, the nearest to anchors first, and where each gets its prediction from."""
    steps = []
    for target in set(seen) - set(anchors):
        nearest = min(anchors, key=lambda anchor: abs(anchor - target))
        between = [z for z in seen if min(target, nearest) <= z <= max(target, nearest) and z != target]
        sources = [min(between, key=lambda z: abs(z - target))]
        beyond = [anchor for anchor in anchors if (anchor < target) != (nearest < target)]
        if beyond:
            sources.append(min(beyond, key=lambda anchor: abs(anchor - target)))
        steps.append((abs(nearest - target), target, sources))
    return [(target, sources) for _, target, sources in sorted(steps)]


def _around(masks: Sequence[np.ndarray]) -> tuple[slice, ...] | None:
    """The box (y, x) around what the masks (slices, Y, X) show, with :data:`MARGIN`; None where they show nothing."""
    if not masks:
        return None
    shown = torch.from_numpy(np.any([mask.any(0) for mask in masks], axis=0))
    tight = surroundings(shown, [0, 0])
    if tight is None:
        return None
    margin = math.ceil(MARGIN * max(side.stop - side.start for side in tight))
    return surroundings(shown, [margin, margin])


def _deformation(fixed: np.ndarray, moving: np.ndarray) -> sitk.Transform:
    """From places (Y, X) of the fixed image to those of the moving one."""
    target, source = (sitk.GetImageFromArray(image) for image in (fixed, moving))
    if fixed.min() == fixed.max() or moving.min() == moving.max():
        return sitk.Transform(2, sitk.sitkIdentity)
    source = matched(source, target)
    side = max(fixed.shape)
    lowest, highest = (max(0, round(math.log2(side / voxels))) for voxels in (_COARSEST, _FINEST))
    levels = [(shrunk(target, [2**halvings] * 2), shrunk(source, [2**halvings] * 2)) for halvings in range(lowest, highest - 1, -1)]
    return demons(levels, [_ITERATIONS] * len(levels), _SMOOTHNESS)


def _moved(probabilities: np.ndarray, deformation: sitk.Transform) -> np.ndarray:
    """(Y, X), 0 beyond the border."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(probabilities, dtype=np.float32))
    moved: np.ndarray = sitk.GetArrayFromImage(resampled(image, image, deformation))
    return moved
