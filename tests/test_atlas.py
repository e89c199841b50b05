"""Labels of annotated volumes on other scans."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from test_refinement import CLASSES, REGIONS, dice
from torch import Tensor

from nnunetv2_cmems.method.atlas import Atlas, carried
from nnunetv2_cmems.method.label_space import LabelSpace

SPACES = pytest.mark.parametrize("space", [CLASSES, REGIONS], ids=["classes", "regions"])
SHAPE = 20, 44, 48


def body(shape: tuple[int, ...] = SHAPE, moved: tuple[float, float, float] = (0, 0, 0), size: float = 1.0) -> tuple[np.ndarray, Tensor]:
    """A scan (1, Z, Y, X) and its labels: an organ in a wall, a second one beside it that looks the same, and a bone behind both."""
    z, y, x = np.meshgrid(*[np.arange(n) - n / 2 for n in shape], indexing="ij")

    def ball(middle: tuple[float, float, float], radii: tuple[float, float, float]) -> np.ndarray:
        parts = zip((z, y, x), middle, moved, radii)
        return sum(((place - size * at - shift) / (size * radius)) ** 2 for place, at, shift, radius in parts) < 1  # type: ignore[return-value]

    wall, organ, other, bone = (
        ball(*one) for one in (((0, -3, -7), (6, 9, 8)), ((0, -3, -7), (4, 6, 5)), ((0, -3, 9), (4, 6, 5)), ((0, 12, 0), (8, 3, 9)))
    )
    label = np.select([organ, wall], [1, 2], 0)
    grey = np.select([organ | other, wall, bone], [0.6, -0.4, 2.0], 0.0) + 0.02 * x / size
    return (grey + np.random.default_rng(0).normal(0, 0.05, shape))[None].astype(np.float32), torch.from_numpy(label)


@SPACES
def test_labels_come_along(space: LabelSpace) -> None:
    """To a scan of another size, whose organs lie elsewhere, are larger and have other grey values."""
    image, label = body()
    scan, truth = body((24, 52, 50), moved=(1.5, 3.0, -3.0), size=1.2)
    found, known = carried([Atlas(image, label.numpy())], torch.from_numpy(0.7 * scan + 0.5), space)
    assert found.shape == (len(space.names) + (space is CLASSES), 24, 52, 50) and found.dtype == torch.float32
    assert known.shape == truth.shape and known.all()
    assert (found >= 0).all() and (found <= 1 + 1e-6).all()
    if space is CLASSES:
        torch.testing.assert_close(found.sum(0), torch.ones(truth.shape))
    assert min(dice(found, truth, space)) > 0.85


def test_the_organ_on_the_other_side_is_not_taken_for_it() -> None:
    image, label = body()
    scan, truth = body(moved=(0.0, 1.0, 2.0))
    found, _ = carried([Atlas(image, label.numpy())], torch.from_numpy(scan), CLASSES)
    assert not found[:, ..., 30:].argmax(0).any() and truth.any()


def test_several_volumes_are_averaged() -> None:
    atlases = [Atlas(image, label.numpy()) for image, label in (body(), body(size=0.9))]
    scan = torch.from_numpy(body(moved=(0.0, 1.0, 1.0))[0])
    alone = [carried([atlas], scan, CLASSES)[0] for atlas in atlases]
    torch.testing.assert_close(carried(atlases, scan, CLASSES)[0], (alone[0] + alone[1]) / 2)


@SPACES
def test_what_is_not_annotated_stays_unknown(space: LabelSpace) -> None:
    image, label = body()
    partly = label.numpy().copy()
    partly[:, :, 36:] = -1
    found, known = carried([Atlas(image, partly)], torch.from_numpy(image), space)
    assert known[..., :34].all() and not known[2:-2, 4:-4, 38:-4].any()
    assert min(dice(found, label, space)) > 0.9


def test_it_is_the_same_in_every_thread() -> None:
    image, label = body()
    scans = [torch.from_numpy(body(moved=(0, 0, shift))[0]) for shift in (1.0, 2.0)]
    alone = [carried([Atlas(image, label.numpy())], scan, CLASSES)[0] for scan in scans]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda scan: carried([Atlas(image, label.numpy())], scan, CLASSES)[0], scans))
    assert all(torch.equal(a, b) for a, b in zip(alone, together))


@pytest.mark.parametrize("shape", [(1, 44, 48), (3, 44, 48), (20, 5, 48)])
def test_scans_of_a_few_slices(shape: tuple[int, int, int]) -> None:
    image, label = body()
    found, _ = carried([Atlas(image, label.numpy())], torch.from_numpy(body(shape)[0]), CLASSES)
    assert found.shape == (3, *shape) and found.isfinite().all()


def test_a_scan_of_one_grey_is_left_without_organs_or_gets_them_in_its_middle() -> None:
    """There is nothing to register; nothing breaks."""
    image, label = body()
    found, _ = carried([Atlas(image, label.numpy())], torch.zeros(1, *SHAPE), CLASSES)
    torch.testing.assert_close(found.argmax(0), label)


def test_a_volume_of_one_grey_says_nothing_wrong() -> None:
    label = body()[1]
    found, _ = carried([Atlas(np.ones((1, *SHAPE), np.float32), label.numpy())], torch.from_numpy(body()[0]), CLASSES)
    assert found.isfinite().all()


def test_channels_count_together() -> None:
    image, label = body()
    scan = body(moved=(0.0, 1.0, 1.0))[0]
    one = carried([Atlas(image, label.numpy())], torch.from_numpy(scan), CLASSES)[0]
    two = carried([Atlas(np.repeat(image, 2, 0), label.numpy())], torch.from_numpy(np.repeat(scan, 2, 0)), CLASSES)[0]
    torch.testing.assert_close(one, two)
