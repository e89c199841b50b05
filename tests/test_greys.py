"""Which organs differ in grey values where they are annotated, and whether they do in labels of a scan."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunetv2_cmems.method.greys import Brighter, tell_apart, told_apart
from nnunetv2_cmems.method.label_space import Classes, Regions

WALL, CAVITY, FAT = 1, 2, 3
SPACE = Classes(("wall", "cavity", "fat"))


def scan(size: int = 10, slices: int = 3, channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """A bright cavity (radius ``size``) in a dark wall, fat on its outside that is as dark, and noise: (C, Z, 48, 48) and (Z, 48, 48)."""
    distance = np.hypot(*np.mgrid[-24:24, -24:24])
    labels = np.zeros((slices, 48, 48), dtype=np.int16)
    labels[:, distance < size + 6] = FAT
    labels[:, distance < size + 3] = WALL
    labels[:, distance < size] = CAVITY
    noise = np.random.default_rng(0).normal(size=(channels, *labels.shape))
    noise[-1] += 4.0 * (labels == CAVITY) + 2.0 * (labels == 0)
    return noise.astype(np.float32), labels


def annotated(channels: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    image, labels = scan(slices=1, channels=channels)
    return [(torch.from_numpy(image), torch.from_numpy(labels))]


@pytest.mark.parametrize("channels", [1, 2])
def test_what_touches_and_differs_is_told_apart_in_the_channel_that_shows_it_best(channels: int) -> None:
    (pair,) = told_apart(annotated(channels), SPACE)
    assert pair[:3] == (CAVITY, WALL, channels - 1) and pair.probability > 0.95, "fat touches the wall alone, and looks like it"
    image, labels = annotated(channels)[0]
    (dark,) = told_apart([(-image, labels)], SPACE)
    assert dark == Brighter(WALL, CAVITY, channels - 1, dark.probability) and dark.probability == pytest.approx(pair.probability)


def test_regions_and_nothing_are_not_told_apart() -> None:
    assert told_apart([], SPACE) == ()
    assert told_apart(annotated(), Regions(("heart", "cavity"), None, ((1, 2), (2,)))) == ()


def test_organs_of_another_size_that_are_drawn_where_they_are() -> None:
    pairs = told_apart(annotated(), SPACE)
    for size in (6, 10, 16):
        assert tell_apart(pairs, *scan(size))


def test_a_small_heart_that_is_drawn_into_a_large_one() -> None:
    """Arranged as annotated, of the annotated size; but the wall is drawn within what is all cavity."""
    pairs = told_apart(annotated(), SPACE)
    assert not tell_apart(pairs, scan(16)[0], scan(10)[1])


def test_labels_that_show_nothing_tell_nothing_apart() -> None:
    image, labels = scan()
    assert not tell_apart(told_apart(annotated(), SPACE), image, np.where(labels == CAVITY, 0, labels))
