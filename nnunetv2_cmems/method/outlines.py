"""Round organs, drawn along their outline in each slice.

Networks that know an organ from one slice draw walls as thick as that slice's, within thicker ones and beyond thinner ones, with full
confidence. Where every annotated slice shows an organ, with all that it encloses, as a convex disc, its outline is one smooth closed
curve, and the edges of the scan itself say where: an optimal path in polar coordinates (as Sun & Pallottino, Pattern Recognition 36,
2003, among many), near the one that is drawn. What lies within another organ has no such edge where it is annotated; in predictions it
ends at the grey value at which it does in the annotated slices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial import ConvexHull
from skimage.draw import polygon2mask
from skimage.morphology import convex_hull_image
from torch import Tensor

from nnunetv2_cmems.method.growth import is_open
from nnunetv2_cmems.method.label_space import LabelSpace, Regions

ROUND = 0.95
"""Share of its convex hull that an organ with what it encloses has in each annotated slice, if it is round."""

NEARLY_ROUND = 0.85
"""The same of what is drawn in a slice, if it is to be drawn anew: what is less round is no organ as it is known, but a mistake."""

LEAST_OVERLAP = 0.75
"""Dice of the new disc with the one that was drawn; what differs more is another edge's."""

LEAST_OVERLAP_OVER_IT = 0.6
"""The same where outlines go on over what looks like the organ."""

FEWEST = 12
"""Pixels of a disc that has a shape."""

CLEAR = 0.25
"""How much grey values on both sides of a border differ, beside the two organs' medians, if they tell where it runs."""

NOISY = 0.5
"""Their deviation within the outer organ, likewise, above which they do not tell."""

NEAR = 2.0
"""Distance from an outline, in voxels, up to which it says how sure a prediction is."""

# Lengths are in mean radii of the annotated disc, so that they hold at any resolution.
_ANGLES = 72
_STEP = 0.04  # along a ray
_EDGE_WIDTH = 0.055  # sigma of the Gaussian whose gradient is taken
_LEAST_EDGE_WIDTH = 0.7  # voxels
_AWAY = 0.08  # least distance of an outline from what it encloses
_WALL = 0.2  # how far from what it encloses edges begin to be in the way
_BEHIND = 0.08  # an outline's own edge is not in its way
_IN_THE_WAY = 6.3  # weight of the edges between what is enclosed and the outline, per mean radius
_ROOM = 0.35  # deviation from the drawn radius, in mean radii of the drawn disc, that costs as much as an edge is worth
_MORE_OF_IT = 0.3  # share of this that it costs to go out over what looks like the organ
_LIKE = 2.5  # deviations from the organ's median grey value within which something looks like it
_SMOOTHNESS = 1.0  # price of the square of a change by one step from ray to ray
_MOST_STEPS = 2  # from ray to ray
_NEVER = -1e3
_DEVIATIONS = 1.4826  # of a Gaussian: standard deviation, as a multiple of the median absolute one


class Border(NamedTuple):
    """Where an outline runs between voxels, in one slice.

    Attributes:
        organs: the class or region that it is the outline of, and those that this encloses, counted from 0 on.
        place: the (z, y, x) of the N voxels near it, three tensors (N,).
        distance: (N,) voxels from each one's middle to the outline; negative outside.
    """

    organs: tuple[int, ...]
    place: tuple[Tensor, Tensor, Tensor]
    distance: Tensor


@dataclass(frozen=True)
class Outlines:
    """What annotated slices say of the shape of each of the F classes or regions.

    Attributes:
        radius: mean radius, in voxels, of the disc that it makes with what it encloses; 0: that is not round.
        open: whether the disc borders on background, mostly. The edge around what lies within another organ need not be where it is
            annotated (the papillary muscles of the heart): of that only the hull is taken.
        enclosed: the classes or regions within it, counted from 0 on.
        level: of what is round and within others the grey value at which its border runs: 0 is the median of what is around it, 1 its own
            one; 0 where that is not known, or does not count.
    """

    radius: tuple[float, ...]
    open: tuple[bool, ...]
    enclosed: tuple[tuple[int, ...], ...]
    level: tuple[float, ...]

    @classmethod
    def of(cls, labels: Sequence[np.ndarray], space: LabelSpace, greys: Sequence[np.ndarray] = ()) -> Outlines | None:
        """From annotated slices, label maps (Y, X), negative where nothing is annotated; None where nothing is round, or none is there.

        ``greys``: their grey values (Y, X), the channels' mean; without these levels do not count.
        """
        if not labels:
            return None
        shown = [np.stack(space.shown(label)) for label in labels]
        count = len(space.names)
        sizes = np.sum([masks.sum((1, 2)) for masks in shown], 0)
        filled = [[ndimage.binary_fill_holes(mask) for mask in masks] for masks in shown]
        whole = np.sum([[disc.sum() for disc in discs] for discs in filled], 0)
        within = np.sum([[[(disc & mask).sum() for mask in masks] for disc in discs] for discs, masks in zip(filled, shown)], 0)
        enclosed = tuple(
            tuple(k for k in range(count) if whole[k] < whole[outer] and 2 * within[outer, k] > sizes[k]) for outer in range(count)
        )
        radius, borders, level = [0.0] * count, [False] * count, [0.0] * count
        for k in range(count):
            where = [index for index, masks in enumerate(shown) if masks[k].sum() >= FEWEST]
            discs = [_union(shown[index], [k, *enclosed[k]]) for index in where]
            if not discs or min(map(_roundness, discs)) < ROUND:
                continue
            radius[k] = float(np.mean([math.sqrt(disc.sum() / math.pi) for disc in discs]))
            borders[k] = is_open(discs, [labels[index] for index in where])
            if greys and not borders[k]:
                edges = [_inner_edge(k, shown[index], enclosed, greys[index]) for index in where]
                middles = [sum(edge.sides) / 2 for edge in edges if edge is not None]
                level[k] = float(np.clip(np.mean(middles), 0, 1)) if middles else 0.0
        return cls(tuple(radius), tuple(borders), enclosed, tuple(level)) if any(radius) else None

    def numbers(self) -> list[float]:
        """F radii, F times whether it is open, F times F whether the second is enclosed in the first, and on the diagonal the levels."""
        within = np.array([[float(k in inner) for k in range(len(self.radius))] for inner in self.enclosed]) + np.diag(self.level)
        return [*self.radius, *map(float, self.open), *within.ravel().tolist()]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> Outlines:
        """The inverse of :meth:`numbers`. Older checkpoints know of no levels: there the diagonal is 0."""
        count = math.isqrt(len(numbers) + 1) - 1
        radius, borders, *rows = (tuple(numbers[first : first + count]) for first in range(0, len(numbers), count))
        enclosed = tuple(tuple(k for k in range(count) if row[k] and k != outer) for outer, row in enumerate(rows))
        return cls(radius, tuple(map(bool, borders)), enclosed, tuple(row[k] for k, row in enumerate(rows)))

    def drawn(self, labels: Tensor, image: Tensor, space: LabelSpace) -> Tensor:
        """Labels whose round organs have smooth outlines along edges, slice by slice. No random numbers are drawn.

        What lies within other organs becomes its convex hull. The others get the closed curve along which grey values are steepest, less
        what is in the way between it and what it encloses, near the border that is drawn. A disc stays as it is if less than
        :data:`NEARLY_ROUND` of its hull is drawn, or of that of a round one within it, or if it would change too much. Discs take from
        background, and from what encloses them.

        Args:
            labels: (Z, Y, X) classes, or (R, Z, Y, X) regions; integers.
            image: (C, Z, Y, X), the preprocessed scan.
            space: what the networks' heads mean.

        Returns:
            A tensor of the same shape.
        """
        return self._drawn(labels, image, space, False)[0]

    def traced(self, labels: Tensor, image: Tensor, space: LabelSpace) -> tuple[Tensor, list[Border]]:
        """:meth:`drawn`, and its outlines along edges, with the voxels less than :data:`NEAR` from them that other organs do not keep.

        Here outlines go on, at less cost, over what looks like the organ: through a wall that is thicker than what is drawn, to its edge.
        And what lies within others takes from these, one voxel far, what is beyond the level of its border; its hull is taken then.
        """
        found, curves = self._drawn(labels, image, space, True)
        borders = []
        for index, k, curve in curves:
            organs = k, *(() if isinstance(space, Regions) else self.enclosed[k])
            disc = _union(_masks(found, index, space), organs)
            distance = _distances(curve, disc.shape)
            borders.append(_border(index, organs, disc, distance, np.abs(distance) < NEAR))
        for k, index in itertools.product(self._levelled, range(image.shape[1])):
            masks = _masks(found, index, space)
            edge = _inner_edge(k, masks, self.enclosed, image[:, index].mean(0).numpy())
            if edge is not None:
                distance = (edge.grey - self.level[k]) / (edge.sides[0] - edge.sides[1])  # these are a voxel apart
                borders.append(_border(index, (k,), masks[k], distance, edge.inside | edge.outside))
        return found, borders

    @property
    def _levelled(self) -> list[int]:
        """The classes or regions that have a level."""
        return [k for k, level in enumerate(self.level) if level]

    def _drawn(
        self, labels: Tensor, image: Tensor, space: LabelSpace, over_it: bool
    ) -> tuple[Tensor, list[tuple[int, int, np.ndarray]]]:
        """The labels, and of each outline along edges its slice, its organ and its curve (A, 2)."""
        found, every = labels.clone(), []
        exclusive = not isinstance(space, Regions)
        order = torch.arange(1, len(space.names) + 1)[:, None, None]
        for index, grey in enumerate(image.mean(0).numpy()):
            masks = _masks(labels, index, space)
            if not masks.any():
                continue
            new, curves = self._in_slice(masks, grey, exclusive, over_it)
            drawn = torch.from_numpy(new)
            found[..., index, :, :] = (drawn * order).sum(0) if exclusive else drawn
            every += [(index, k, curve) for k, curve in curves.items()]
        return found, every

    def _in_slice(
        self, masks: np.ndarray, grey: np.ndarray, exclusive: bool, over_it: bool
    ) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Masks (F, Y, X) of a slice (Y, X), with new discs, and for those along edges their curves (A, 2); ``exclusive``: no pixel is in
        two; ``over_it``: outlines go on over what looks like the organ."""
        masks, curves = masks.copy(), {}
        for k in self._levelled if over_it else ():
            edge = _inner_edge(k, masks, self.enclosed, grey)
            if edge is not None:
                new = edge.outside & (edge.grey > self.level[k])
                masks[k] |= new
                if exclusive:
                    masks[_outer(k, self.enclosed)] &= ~new
        as_drawn = [_union(masks, [k, *inner]) for k, inner in enumerate(self.enclosed)]
        fine = [disc.sum() >= FEWEST and _roundness(disc) >= NEARLY_ROUND for disc in as_drawn]
        for k in sorted(range(len(masks)), key=lambda k: len(self.enclosed[k])):
            inner = [other for other in self.enclosed[k] if masks[other].any()]
            if not self.radius[k] or not fine[k] or not all(fine[other] for other in inner if self.radius[other]):
                continue
            core = _union(masks, inner)
            disc = masks[k] | core
            new = _hull(disc)
            if self.open[k]:
                curve = _along_edges(new, core, grey, self.radius[k], over_it)
                new = _hull(polygon2mask(disc.shape, curve))
                least = LEAST_OVERLAP_OVER_IT if over_it else LEAST_OVERLAP
                if 2 * (new & disc).sum() < least * (new.sum() + disc.sum()):
                    continue
                curves[k] = curve
            if exclusive:
                outer = _outer(k, self.enclosed)
                others = [other for other in range(len(masks)) if other not in (k, *inner, *outer)]
                new &= disc | ~_union(masks, others)
                masks[outer] &= ~new
                new &= ~core
            masks[k] = new
        return masks, curves


def _masks(labels: Tensor, index: int, space: LabelSpace) -> np.ndarray:
    """(F, Y, X) bool, of one slice of labels in head space."""
    return torch.cat(list(space.masks(labels[..., index, :, :][None]))).numpy()


def _union(masks: np.ndarray, chosen: Sequence[int]) -> np.ndarray:
    return np.asarray(masks[list(chosen)].any(0))


class _Edge(NamedTuple):
    """Between an organ and what it lies within, in a slice.

    Attributes:
        grey: (Y, X) grey values in which 0 is the median of what is around, and 1 that of what is within.
        inside, outside: (Y, X) bool, the pixels of each that have neighbours in the other one.
        sides: mean grey values of these two.
    """

    grey: np.ndarray
    inside: np.ndarray
    outside: np.ndarray
    sides: tuple[float, float]


def _border(index: int, organs: tuple[int, ...], disc: np.ndarray, distance: np.ndarray, near: np.ndarray) -> Border:
    """Of a slice's pixels that are ``near`` those on whose side of the outline they are drawn."""
    y, x = np.nonzero(near & (disc == (distance > 0)))
    place = torch.full((len(y),), index), torch.from_numpy(y), torch.from_numpy(x)
    return Border(organs, place, torch.from_numpy(distance[y, x].astype(np.float32)))


def _outer(k: int, enclosed: Sequence[Sequence[int]]) -> list[int]:
    """What a class or region lies within."""
    return [other for other, inner in enumerate(enclosed) if k in inner]


def _inner_edge(k: int, masks: np.ndarray, enclosed: Sequence[Sequence[int]], grey: np.ndarray) -> _Edge | None:
    """Of a class or region and what it lies within, from masks (F, Y, X) and grey values (Y, X); None where there is too little of one of
    them, or no clear edge between them."""
    inner = masks[k]
    around = _union(masks, _outer(k, enclosed)) & ~inner
    if min(inner.sum(), around.sum()) < FEWEST:
        return None
    (low, deviation), high = _typical(grey[around]), np.median(grey[inner])
    inside, outside = inner & ndimage.binary_dilation(around), around & ndimage.binary_dilation(inner)
    if deviation >= NOISY * abs(high - low) or not inside.any():
        return None
    scaled = (grey - low) / (high - low)
    sides = float(scaled[inside].mean()), float(scaled[outside].mean())
    return _Edge(scaled, inside, outside, sides) if sides[0] - sides[1] >= CLEAR else None


def _hull(mask: np.ndarray) -> np.ndarray:
    """The convex hull of the pixels' centres; those on one line stay as they are."""
    pixels = np.argwhere(mask)
    if len(pixels) < 3 or np.linalg.matrix_rank(pixels - pixels[0]) < 2:
        return mask
    (box,) = ndimage.find_objects(mask.astype(np.uint8))  # skimage looks at each pixel
    hull = np.zeros_like(mask)
    hull[box] = convex_hull_image(mask[box], offset_coordinates=False)
    return hull


def _roundness(disc: np.ndarray) -> float:
    """Share of its hull that a disc fills."""
    return float(disc.sum() / max(1, _hull(disc).sum()))


def _along_edges(disc: np.ndarray, core: np.ndarray, grey: np.ndarray, radius: float, over_it: bool) -> np.ndarray:
    """The corners (A, 2) of a curve along edges, from the disc (Y, X) that is drawn and what it encloses; ``radius`` is the annotated
    one's; ``over_it``: it goes on over what looks like the organ."""
    centre = ndimage.center_of_mass(core if core.sum() >= FEWEST else disc)
    edges = ndimage.gaussian_gradient_magnitude(grey, max(_LEAST_EDGE_WIDTH, _EDGE_WIDTH * radius))
    near = ndimage.binary_dilation(disc, iterations=max(1, round(3 * _AWAY * radius)))
    edges = edges / max(1e-3, float(np.percentile(edges[near], 90)))
    drawn = _radii(disc, centre, radius)
    rays = np.arange(0, 2 * drawn.max() + _WALL * radius, _STEP * radius)
    inner = _radii(core, centre, radius)[:, None] if core.sum() >= FEWEST else np.zeros((_ANGLES, 1))
    along = ndimage.map_coordinates(edges, _places(centre, rays), order=1, mode="nearest")
    passed = np.cumsum(np.where(rays > inner + _WALL * radius, along, 0), 1) * _STEP
    behind = round(_BEHIND / _STEP)
    in_the_way = np.pad(passed, ((0, 0), (behind, 0)))[:, : len(rays)]
    far = np.abs(rays - drawn[:, None])
    if over_it:
        alike = _like(grey[disc & ~core], ndimage.map_coordinates(grey, _places(centre, rays), order=1, mode="nearest"))
        beyond = np.diff(np.maximum(rays - drawn[:, None], 0), axis=1, prepend=0)
        far -= (1 - _MORE_OF_IT) * np.cumsum(np.where(alike, beyond, 0), 1)
    away = far / (_ROOM * max(radius / 3, float(drawn.mean())))
    score = np.where(rays > inner + _AWAY * radius, along - _IN_THE_WAY * in_the_way - away**2, _NEVER)
    return np.stack(_places(centre, rays[_best_path(score)][:, None]), -1)[:, 0]


def _like(own: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which grey values are like the organ's own ones; none where these are few."""
    if len(own) < FEWEST:
        return np.zeros(others.shape, bool)
    median, deviation = _typical(own)
    return np.asarray(np.abs(others - median) <= _LIKE * deviation)


def _typical(grey: np.ndarray) -> tuple[float, float]:
    """The median, and the deviation about it of what is no outlier."""
    median = np.median(grey)
    return float(median), float(_DEVIATIONS * np.median(np.abs(grey - median)))


def _distances(curve: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Of each pixel's middle (Y, X) from the convex hull of the curve's corners (A, 2); negative outside, where corners may be farther
    away."""
    sides = ConvexHull(curve).equations  # normals that point outwards, and offsets
    middles = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return np.asarray(-(middles @ sides[:, :2].T + sides[:, 2]).max(-1))


def _places(centre: Sequence[float], rays: np.ndarray) -> list[np.ndarray]:
    """y and x (A, N) at these distances (N,), or (A, 1), from the centre, along each of the A rays."""
    angles = np.arange(_ANGLES)[:, None] * (2 * np.pi / _ANGLES)
    return [centre[0] + np.sin(angles) * rays, centre[1] + np.cos(angles) * rays]


def _radii(disc: np.ndarray, centre: Sequence[float], radius: float) -> np.ndarray:
    """(A,): how far a disc reaches along each ray."""
    rays = np.arange(0, math.hypot(*disc.shape), _STEP * radius)
    inside = ndimage.map_coordinates(disc.astype(np.float32), _places(centre, rays), order=1, mode="constant") > 0.5
    last = np.where(inside.any(1), len(rays) - 1 - inside[:, ::-1].argmax(1), 0)
    return rays[last] + _STEP * radius / 2


def _best_path(score: np.ndarray) -> np.ndarray:
    """(A,): the step along each ray of the closed path with the largest score (A, N), by dynamic programming over three turns."""
    rays, steps = score.shape
    price = _SMOOTHNESS * np.arange(-_MOST_STEPS, _MOST_STEPS + 1)[:, None] ** 2
    padded = np.full(steps + 2 * _MOST_STEPS, -np.inf)
    moved_by = np.lib.stride_tricks.sliding_window_view(padded, steps)  # (moves, steps), of what is in it now
    total, origin = score[0], []
    for ray in range(1, 3 * rays):
        padded[_MOST_STEPS:-_MOST_STEPS] = total
        reached = moved_by - price
        origin.append(reached.argmax(0) - _MOST_STEPS)
        total = score[ray % rays] + reached.max(0)
    path = [int(total.argmax())]
    for moved in reversed(origin):
        path.append(path[-1] + int(moved[path[-1]]))
    return np.array(path[::-1])[rays : 2 * rays]
