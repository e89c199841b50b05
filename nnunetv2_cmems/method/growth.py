"""Organs that reach on to the next edge of the scan.

Networks that know an organ from one slice draw that slice's shape everywhere: too small where the organ is larger, with full
confidence. The organ's grey values then go on beyond a border that runs through its middle, and change at the true one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import torch
from scipy import ndimage
from skimage.segmentation import random_walker
from torch import Tensor

from nnunetv2_cmems.method.label_space import LabelSpace, Regions

EDGE = 2.0
"""How much steeper grey values must be along the border that a piece brings than along the one that it replaces."""

OPEN = 0.5
"""Share of its border that an organ has against the background in the annotated slices, if it is to grow into it. Of what lies between
organs (a wall) background that looks the same is seldom a missing part: on ACDC one grown voxel of the myocardium in four was right."""

MOST_BEYOND = 1.1
"""Size of an annotated organ, grown in its own image, as a multiple of what is annotated, up to which edges tell where it ends."""

MOST_VOXELS = 2 * 10**6
"""Around the organs of one slice or volume; of a larger one every second (third, ...) voxel along each axis takes part, as memory grows
with their number."""

# Where there is nothing but noise, nothing converges. (A filter for the call alone would not be safe with threads.)
for _said in ("The probability range is outside", "Conjugate gradient convergence"):
    warnings.filterwarnings("ignore", _said, UserWarning)

_BETA = 200.0  # how much random walkers avoid edges, for images whose standard deviation is 1
_STEEPNESS = 0.7  # sigma, in voxels, of the Gaussian whose gradient is taken
_TOLERANCE = 1e-2  # of the walkers' probabilities, of which only the largest counts
_FLAT = 1e-3  # standard deviation below which an image has no edges


def grow(labels: Tensor, image: Tensor, reach: float, may_grow: Sequence[bool], space: LabelSpace, planar: bool) -> Tensor:
    """Labels whose organs reach on over background that no edge separates from them. No random numbers are drawn.

    Random walkers (Grady, IEEE TPAMI 28, 2006), which avoid edges, start from each organ without its outermost voxels, and from all
    that lies farther away from organs than ``reach``. Background that an organ's walkers are the likeliest to be in is a candidate. Each
    connected piece of it joins the organ if grey values are :data:`EDGE` times as steep along the border that the organ gets by it
    as along the one that it has. Nothing is taken away from an organ. Organs that lie within or between others do not grow. Regions
    grow each on its own.

    Args:
        labels: (Z, Y, X) classes, or (R, Z, Y, X) regions; integers.
        image: (C, Z, Y, X), the preprocessed scan.
        reach: how far organs may grow, in voxels.
        may_grow: which classes or regions do, from :func:`borders_on_background`.
        space: what the networks' heads mean.
        planar: slice by slice.

    Returns:
        A tensor of the same shape.
    """
    if isinstance(space, Regions):
        return torch.stack([_grown(region, image, reach, {1} if may else set(), planar) for region, may in zip(labels, may_grow)])
    return _grown(labels, image, reach, {organ for organ, may in enumerate(may_grow, 1) if may}, planar)


def borders_on_background(labels: Sequence[np.ndarray], space: LabelSpace) -> tuple[bool, ...]:
    """Which classes or regions have at least :data:`OPEN` of their border against the background: the others lie within or between organs.

    What is not shown counts as bordering on it.

    Args:
        labels: the annotated slices or volumes; -1 is what is not annotated.
        space: what the networks' heads mean.
    """
    shown = [space.shown(label) for label in labels]
    return tuple(is_open((masks[organ] for masks in shown), labels) for organ in range(len(space.names)))


def is_open(masks: Iterable[np.ndarray], labels: Iterable[np.ndarray]) -> bool:
    """Whether at least :data:`OPEN` of the border of a mask in each label map is against background, of all of them together."""
    background = border = 0
    for mask, label in zip(masks, labels):
        ring = ndimage.binary_dilation(mask) & ~mask & (label >= 0)
        background, border = background + int((ring & (label == 0)).sum()), border + int(ring.sum())
    return background >= OPEN * border


def ends_at_edges(
    annotated: Sequence[tuple[Tensor, Tensor]], reach: float, may_grow: Sequence[bool], space: LabelSpace, planar: bool
) -> tuple[bool, ...]:
    """Which of the classes or regions that may grow do not do so beyond their annotated border, in the annotated images themselves.

    Where an organ and what lies around it look alike, a right border is left behind as a wrong one is.

    Args:
        annotated: images (C, Z, Y, X) and label maps (Z, Y, X), negative where nothing is annotated.
        reach: as for :func:`grow`, and so what follows.
    """
    sizes = torch.zeros(2, len(may_grow))
    for image, label in annotated:
        target = space.target(label[None].long())
        for row, labels in enumerate((target[0], grow(target[0].to(torch.int8), image, reach, may_grow, space, planar))):
            sizes[row] += torch.stack([(mask[0] & (label >= 0)).sum() for mask in space.masks(labels[None])])
    return tuple(may and bool(grown <= MOST_BEYOND * size) for may, size, grown in zip(may_grow, *sizes))


def _grown(labels: Tensor, image: Tensor, reach: float, organs: Collection[int], planar: bool) -> Tensor:
    found, grey = labels.numpy().copy(), image.numpy()
    for part in range(len(found)) if planar else (slice(None),):
        found[part] = _to_the_next_edge(found[part], grey[:, part], reach, organs)
    return torch.from_numpy(found)


def _to_the_next_edge(labels: np.ndarray, image: np.ndarray, reach: float, organs: Collection[int]) -> np.ndarray:
    """:func:`grow` for classes (*spatial) of one slice or volume (C, *spatial)."""
    if not labels.any() or image.min() == image.max():
        return labels
    distance = ndimage.distance_transform_edt(labels == 0)
    (box,) = ndimage.find_objects((distance <= reach + 2).astype(np.uint8))
    near, grey = labels[box], image[(slice(None), *box)]
    step = math.ceil((near.size / MOST_VOXELS) ** (1 / near.ndim))
    coarse = (slice(None, None, step),) * near.ndim
    walked = _walk(near[coarse], grey[(slice(None), *coarse)] / max(float(grey.std()), _FLAT), distance[box][coarse] > reach)
    for axis in range(near.ndim) if step > 1 else ():
        walked = walked.repeat(step, axis).take(range(near.shape[axis]), axis)
    steepness = sum(ndimage.gaussian_gradient_magnitude(channel, _STEEPNESS) for channel in grey)
    grown = near.copy()
    for organ in organs:
        pieces, count = ndimage.label((near == 0) & (walked == organ))
        for index, place in enumerate(ndimage.find_objects(pieces, count), 1):
            around = tuple(slice(max(0, side.start - 2), side.stop + 2) for side in place)
            piece = pieces[around] == index
            if _ends_at_an_edge(piece, near[around], organ, steepness[around]):
                grown[around][piece] = organ
    result = labels.copy()
    result[box] = grown
    return result


def _walk(labels: np.ndarray, image: np.ndarray, far: np.ndarray) -> np.ndarray:
    """The label whose walkers are the likeliest in each voxel; background, 0, starts where it is ``far``."""
    seeds = np.zeros(labels.shape, dtype=np.int32)
    for organ in np.unique(labels[labels > 0]):
        seeds[ndimage.binary_erosion(labels == organ)] = organ
    background = int(labels.max()) + 1
    seeds[far] = background
    values = np.unique(seeds[seeds > 0])
    if len(values) < 2 or seeds.all():
        return labels
    order = np.searchsorted(values, seeds) + 1  # numbered without gaps
    order[seeds == 0] = 0
    walked = random_walker(image, order, beta=_BETA, mode="cg_j", tol=_TOLERANCE, channel_axis=0)
    named = values[walked - 1]
    return np.where(named == background, 0, named)


def _ends_at_an_edge(piece: np.ndarray, labels: np.ndarray, organ: int, steepness: np.ndarray) -> bool:
    """Whether the border between a piece and what stays background is :data:`EDGE` times as steep as the one to the organ."""
    ring = ndimage.binary_dilation(piece) & ~piece
    both_sides = []
    for other in (ring & (labels == organ), ring & (labels == 0)):
        if not other.any():
            return False
        both_sides.append(float(steepness[other | (ndimage.binary_dilation(other) & piece)].mean()))
    old, new = both_sides
    return new > EDGE * old
