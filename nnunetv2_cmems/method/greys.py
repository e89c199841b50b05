"""Which organs the annotated images tell apart by their grey values, and whether labels of a scan do so, too.

Networks that know one slice by heart draw organs where they belong to each other, and of the annotated size, in scans whose organs are
larger: a wall within the cavity that it should surround. What they draw is arranged as annotated, and they agree on it. The grey values
contradict: on both sides of the borders there is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import mannwhitneyu
from torch import Tensor

from nnunetv2_cmems.method.contacts import count_contacts, touching
from nnunetv2_cmems.method.label_space import LabelSpace, Regions

CLEAR = 0.7
"""Probability, in the annotated images, from which on two classes are told apart by their grey values."""

SLACK = 0.1
"""By so much less may this probability be in a scan."""

FEWEST = 5
"""Voxels of either class in a slice that is looked at."""


class Brighter(NamedTuple):
    """One class is brighter than another that it touches.

    Attributes:
        one: the brighter class, counted from 1.
        other: the darker one.
        channel: in which this shows best.
        probability: that a voxel of the one is brighter than a voxel of the other, in the annotated images.
    """

    one: int
    other: int
    channel: int
    probability: float


def told_apart(shown: Sequence[tuple[Tensor, Tensor]], space: LabelSpace) -> tuple[Brighter, ...]:
    """The classes that touch each other in the annotated images and differ in grey values there.

    Args:
        shown: annotated images (C, Z, Y, X) and label maps (Z, Y, X), negative where nothing is annotated.
        space: what the heads mean. Regions overlap, so there are none.
    """
    if isinstance(space, Regions) or not shown:
        return ()
    maps = [(image.numpy(), label.numpy()) for image, label in shown]
    found = []
    for one, other in touching(np.sum([count_contacts(part, len(space.names)) for _, label in maps for part in label], 0)):
        shares = [_mean([_brighter(image[c], label, one, other) for image, label in maps]) for c in range(len(maps[0][0]))]
        channel = max(range(len(shares)), key=lambda c: abs(shares[c] - 0.5))  # where one is NaN, all are
        share = shares[channel]
        if share >= CLEAR:
            found.append(Brighter(one, other, channel, share))
        elif 1 - share >= CLEAR:
            found.append(Brighter(other, one, channel, 1 - share))
    return tuple(found)


def tell_apart(pairs: Sequence[Brighter], image: np.ndarray, labels: np.ndarray) -> bool:
    """Whether all pairs that labels (Z, Y, X) of a scan (C, Z, Y, X) show differ nearly as where they are annotated; not where none is."""
    found = [(pair, _brighter(image[pair.channel], labels, pair.one, pair.other)) for pair in pairs]
    known = [(pair, share) for pair, share in found if not np.isnan(share)]
    return bool(known) and all(share >= pair.probability - SLACK for pair, share in known)


def _brighter(image: np.ndarray, labels: np.ndarray, one: int, other: int) -> float:
    """Probability that a voxel of one class is brighter than a voxel of another in the same slice, equal ones half; NaN where no slice
    has both. Slices count by these voxels."""
    shares, weights = [], []
    for part, label in zip(image, labels, strict=True):
        bright, dark = part[label == one], part[label == other]
        if min(len(bright), len(dark)) >= FEWEST:
            shares.append(mannwhitneyu(bright, dark, method="asymptotic").statistic / (len(bright) * len(dark)))
            weights.append(len(bright) + len(dark))
    return float(np.average(shares, weights=weights)) if shares else float("nan")


def _mean(shares: Sequence[float]) -> float:
    known = [share for share in shares if not np.isnan(share)]
    return float(np.mean(known)) if known else float("nan")
