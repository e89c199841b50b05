"""Views of images: identity at zero strength, known transformations, replayed draws, untouched inputs."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from nnunetv2_cmems.config import IntensityConfig, SpatialConfig
from nnunetv2_cmems.method.perturbations import Deformation, blur, change_appearance, deform, draw_cutmix, draw_deformation

DIMENSIONS = pytest.mark.parametrize("d", [2, 3])
CPU = torch.device("cpu")
NOTHING: dict[str, Any] = {"rotation": 0.0, "scale": (1.0, 1.0), "shift": 0.0, "elastic": 0.0}
STILL = SpatialConfig(**NOTHING)
WILD = SpatialConfig(rotation=180.0, scale=(0.5, 2.0), shift=0.3, elastic=0.1, mirror=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)


def numbered(*shape: int) -> Tensor:
    """An image without any symmetry: every voxel has a value of its own, none is 0."""
    return torch.arange(1, math.prod(shape) + 1, dtype=torch.float32).reshape(shape)


def by_hand(matrix: Tensor, patch: list[int]) -> Deformation:
    axes = [torch.arange(n, dtype=torch.float32) - (n - 1) / 2 for n in patch]
    base = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    return Deformation((base @ matrix.T)[None], matrix[None])


def centred(image: Tensor, patch: int) -> Tensor:
    """The middle of a (cubic) image, zero-padded where the patch is larger."""
    n, d = image.shape[-1], image.ndim - 2
    if patch >= n:
        return torch.nn.functional.pad(image, [(patch - n) // 2] * (2 * d))
    first = (n - patch) // 2
    return image[(..., *[slice(first, first + patch)] * d)]


# deformation


@DIMENSIONS
@pytest.mark.parametrize(("size", "patch"), [(8, 8), (7, 7), (8, 4), (9, 5), (4, 8), (5, 9)])
@pytest.mark.parametrize("config", [STILL, SpatialConfig(probability=0.0), SpatialConfig(probability=0.0, elastic=0.0)])
@pytest.mark.parametrize("nearest", [False, True])
def test_no_deformation_gives_the_middle_of_the_image(d: int, size: int, patch: int, config: SpatialConfig, nearest: bool) -> None:
    image = numbered(2, 1, *[size] * d)
    out = deform(image, draw_deformation(2, [patch] * d, config, CPU), nearest=nearest)
    torch.testing.assert_close(out, centred(image, patch), rtol=1e-4, atol=1e-3)


def test_sides_of_patch_and_image_may_all_differ() -> None:
    image = numbered(1, 2, 5, 8, 9)
    out = deform(image, draw_deformation(1, (3, 4, 9), STILL, CPU))
    torch.testing.assert_close(out, image[:, :, 1:4, 2:6], rtol=1e-4, atol=1e-3)


@DIMENSIONS
@pytest.mark.parametrize("n", [6, 7])
def test_quarter_turn(d: int, n: int) -> None:
    matrix = torch.eye(d)
    matrix[-2:, -2:] = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    image = numbered(1, 1, *[n] * d)
    expected = torch.rot90(image, -1, (-2, -1))
    turn = by_hand(matrix, [n] * d)
    torch.testing.assert_close(deform(image, turn), expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(deform(image, turn, nearest=True), expected)


@DIMENSIONS
def test_mirroring_flips_each_axis_on_its_own_and_labels_follow(d: int) -> None:
    image, label = numbered(1, 1, *[5] * d), (numbered(1, 1, *[5] * d) % 4)
    axes = [c for r in range(d + 1) for c in itertools.combinations(range(1, d + 1), r)]
    draw = draw_deformation(64, [5] * d, SpatialConfig(**NOTHING, mirror=True), CPU)
    images, labels = deform(image, draw), deform(label, draw, nearest=True)
    seen = set()
    for one, its_label in zip(images, labels):
        (flip,) = [a for a in axes if torch.allclose(one, image[0].flip(a), atol=1e-3)]
        assert torch.equal(its_label, label[0].flip(flip))
        seen.add(flip)
    assert seen == set(axes)


def test_an_image_that_is_not_deformed_is_not_mirrored() -> None:
    image = numbered(1, 1, 5, 5)
    out = deform(image, draw_deformation(32, (5, 5), SpatialConfig(probability=0.0, mirror=True), CPU))
    torch.testing.assert_close(out, image.expand_as(out), rtol=1e-4, atol=1e-3)


@DIMENSIONS
def test_scale_is_the_zoom_of_the_content(d: int) -> None:
    image = torch.zeros(1, 1, *[12] * d)
    image[(..., *[slice(4, 8)] * d)] = 1  # side 4 in the middle
    for scale, side in ((2.0, 8), (0.5, 2)):
        draw = draw_deformation(1, [12] * d, SpatialConfig(**{**NOTHING, "scale": (scale, scale)}), CPU)
        assert int(deform(image, draw, nearest=True).sum()) == side**d


@DIMENSIONS
def test_draws_stay_within_their_ranges(d: int) -> None:
    patch = [6, 8, 10][:d]
    size = torch.tensor(patch, dtype=torch.float32)

    turns = draw_deformation(64, patch, SpatialConfig(**{**NOTHING, "rotation": 20.0}), CPU).matrix
    torch.testing.assert_close(turns @ turns.mT, torch.eye(d).expand_as(turns), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(turns), torch.ones(64), rtol=0, atol=1e-5)
    cosines = turns.diagonal(dim1=1, dim2=2)
    assert (cosines >= math.cos(math.radians(20.0)) ** (d - 1) - 0.2 * (d - 2) - 1e-6).all()
    angles = torch.atan2(turns[:, -1, -2], turns[:, -2, -2]).abs() * 180 / math.pi
    assert angles.max() > 12
    if d == 2:
        assert angles.max() <= 20.001

    zooms = draw_deformation(64, patch, SpatialConfig(**{**NOTHING, "scale": (0.5, 2.0)}), CPU).matrix
    factors = 1 / zooms[:, 0, 0]
    torch.testing.assert_close(zooms, torch.eye(d) / factors[:, None, None])
    assert 0.5 <= factors.min() < 0.7 and 1.4 < factors.max() <= 2.0

    still = draw_deformation(64, patch, STILL, CPU).offsets
    shifts = (draw_deformation(64, patch, SpatialConfig(**{**NOTHING, "shift": 0.25}), CPU).offsets - still) / size
    torch.testing.assert_close(shifts, shifts[(slice(None), *[slice(0, 1)] * d)].expand_as(shifts))
    assert 0.15 < shifts.abs().max() <= 0.2501

    waves = (draw_deformation(64, patch, SpatialConfig(**{**NOTHING, "elastic": 0.1}), CPU).offsets - still) / size
    assert 0.02 < waves.abs().max() < 0.2
    assert waves.std((1, 2)).max() > 0.01, "the field does not vary over the image"


def test_probability_is_that_of_an_image_being_deformed() -> None:
    offsets = draw_deformation(400, (4, 4), SpatialConfig(probability=0.3), CPU).offsets
    still = draw_deformation(1, (4, 4), STILL, CPU).offsets
    deformed = (offsets - still).abs().amax((1, 2, 3)) > 1e-6
    assert 0.2 < deformed.float().mean() < 0.4


@DIMENSIONS
def test_labels_follow_the_image(d: int) -> None:
    label = torch.zeros(1, 1, *[16] * d)
    label[(..., *[slice(5, 12)] * d)] = 1
    draw = draw_deformation(6, [16] * d, SpatialConfig(), CPU)
    image, moved = deform(label, draw), deform(label, draw, nearest=True)
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    assert (moved[image > 0.999] == 1).all() and (moved[image < 0.001] == 0).all()
    assert moved.mean() > 0.02


@DIMENSIONS
def test_one_draw_replays_the_same(d: int) -> None:
    image, patch = torch.rand(3, 2, *[9] * d), [7] * d
    torch.manual_seed(5)
    first = draw_deformation(3, patch, WILD, CPU)
    torch.manual_seed(5)
    again = draw_deformation(3, patch, WILD, CPU)
    assert torch.equal(deform(image, first), deform(image, first))
    assert torch.equal(deform(image, first), deform(image, again))
    other = draw_deformation(3, patch, WILD, CPU)
    assert not torch.equal(deform(image, first), deform(image, other))
    alone = deform(image[1:2], Deformation(first.offsets[1:2], first.matrix[1:2]))
    torch.testing.assert_close(alone, deform(image, first)[1:2])


@DIMENSIONS
def test_centres_move_the_patch(d: int) -> None:
    image = numbered(1, 1, *[10] * d)
    corners = torch.tensor([[0, 3, 5], [7, 2, 0], [4, 4, 4]])[:, :d]
    out = deform(image, draw_deformation(3, [3] * d, STILL, CPU), corners.float() + 1)
    for crop, corner in zip(out, corners.tolist()):
        expected = image[(0, slice(None), *[slice(c, c + 3) for c in corner])]
        torch.testing.assert_close(crop, expected, rtol=1e-4, atol=1e-3)


@DIMENSIONS
def test_beyond_the_image_there_is_zero(d: int) -> None:
    image = torch.ones(1, 1, *[4] * d)
    out = deform(image, draw_deformation(1, [4] * d, STILL, CPU), torch.full((1, d), 20.0))
    assert not out.any()


@DIMENSIONS
def test_pivot_is_a_fixed_point(d: int) -> None:
    pivot = torch.tensor([[2.0, -3.0, 1.0]])[:, :d].expand(8, d)
    image = torch.zeros(1, 1, *[11] * d)
    place = (0, 0, *[int(5 + p) for p in pivot[0]])
    image[place] = 1
    config = SpatialConfig(**{**NOTHING, "rotation": 180.0, "scale": (0.5, 2.0)})
    draw = draw_deformation(8, [11] * d, config, CPU)
    kept = deform(image, draw, pivots=pivot)[(slice(None), *place[1:])]
    torch.testing.assert_close(kept, torch.ones(8), rtol=0, atol=1e-4)
    assert (deform(image, draw)[(slice(None), *place[1:])] < 0.5).any(), "without a pivot the point moves"


@DIMENSIONS
def test_pivot_shifts_in_full(d: int) -> None:
    image, pivots = torch.rand(4, 1, *[9] * d), torch.full((4, d), 2.0)
    draw = draw_deformation(4, [9] * d, SpatialConfig(**{**NOTHING, "shift": 0.3}), CPU)
    torch.testing.assert_close(deform(image, draw, pivots=pivots), deform(image, draw))


@DIMENSIONS
def test_deform_reads_only(d: int) -> None:
    image, centres, pivots = torch.rand(2, 1, *[6] * d), torch.rand(2, d), torch.rand(2, d)
    draw = draw_deformation(2, [5] * d, WILD, CPU)
    before = [t.clone() for t in (image, centres, pivots, *draw)]
    deform(image, draw, centres, pivots=pivots)
    assert all(torch.equal(a, b) for a, b in zip(before, (image, centres, pivots, *draw)))


# appearance

CHANGES: dict[str, Any] = {
    "brightness": 0.5,
    "contrast": (0.3, 0.6),
    "gamma": (2.0, 3.0),
    "noise": 0.5,
    "blur": 2.0,
    "bias": 0.5,
    "curve": 1.0,
    "low_resolution": 3.0,
}
EVERY_CHANGE = pytest.mark.parametrize("name", CHANGES)


def alone(name: str, probability: float = 1.0) -> IntensityConfig:
    return IntensityConfig(probability=probability, **{name: CHANGES[name]})


@DIMENSIONS
@EVERY_CHANGE
def test_each_change_alone(d: int, name: str) -> None:
    images = torch.randn(4, 2, *[8] * d)
    before = images.clone()
    after = change_appearance(images, alone(name))
    assert torch.equal(images, before), "the input was written to"
    assert after.shape == images.shape and after.dtype == images.dtype and torch.isfinite(after).all()
    changed = (after - images).abs().flatten(2).amax(-1) > 1e-3
    assert changed.float().mean() > 0.6, "a tiny blur may leave an image as it is, not most of them"


@DIMENSIONS
@EVERY_CHANGE
def test_constant_image_stays_finite(d: int, name: str) -> None:
    for value in (0.0, -3.0):
        after = change_appearance(torch.full((1, 1, *[6] * d), value), alone(name))
        assert torch.isfinite(after).all()
        if name not in ("brightness", "noise"):
            torch.testing.assert_close(after, torch.full_like(after, value), rtol=0, atol=1e-3)


@DIMENSIONS
@pytest.mark.parametrize("config", [IntensityConfig(probability=0.0, **CHANGES), IntensityConfig(probability=1.0)])
def test_no_change_at_zero_probability_or_strength(d: int, config: IntensityConfig) -> None:
    images = torch.randn(2, 1, *[5] * d)
    assert torch.equal(change_appearance(images, config), images)


@EVERY_CHANGE
def test_probability_of_a_change(name: str) -> None:
    if name == "low_resolution":
        random.seed(1)  # its factor is drawn once for the batch
    images = torch.randn(300, 1, 6, 6)
    changed = (change_appearance(images, alone(name, 0.3)) - images).abs().flatten(1).amax(1) > 1e-4
    assert 0.2 < changed.float().mean() < 0.4


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "low_resolution"])
def test_images_and_channels_are_changed_on_their_own(name: str) -> None:
    images = torch.randn(1, 1, 8, 8).expand(2, 2, 8, 8)
    a, b, c, d = change_appearance(images, alone(name)).flatten(0, 1)
    assert not any(torch.allclose(x, y, atol=1e-4) for x, y in itertools.combinations((a, b, c, d), 2))


@DIMENSIONS
@pytest.mark.parametrize("name", ["contrast", "gamma", "curve"])
def test_mean_is_kept(d: int, name: str) -> None:
    images = torch.randn(3, 2, *[6] * d) + 4
    axes = list(range(2, d + 2))
    after = change_appearance(images, alone(name))
    torch.testing.assert_close(after.mean(axes), images.mean(axes), rtol=0, atol=1e-4)
    factor = after.std(axes) / images.std(axes)
    if name == "contrast":
        assert (factor > 0.299).all() and (factor < 0.601).all()
    else:
        torch.testing.assert_close(factor, torch.ones_like(factor), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["gamma", "curve", "contrast", "brightness"])
def test_intensity_curves_keep_the_order_of_intensities(name: str) -> None:
    images = torch.randn(4, 1, 8, 8)
    after = change_appearance(images, alone(name)).flatten(1)
    ordered = after.gather(1, images.flatten(1).argsort(1))
    assert (ordered.diff(dim=1) >= -1e-5).all()


def test_brightness_is_one_offset_within_its_limit() -> None:
    images = torch.randn(64, 1, 4, 4)
    offset = change_appearance(images, alone("brightness")) - images
    assert (offset.flatten(1).std(1) < 1e-5).all()
    assert offset.min() < -0.35 and offset.max() > 0.35 and offset.abs().max() <= 0.5001


def test_noise_is_within_its_limit() -> None:
    deviation = change_appearance(torch.zeros(32, 1, 32, 32), alone("noise")).flatten(1).std(1)
    assert deviation.max() < 0.55 and deviation.max() > 2 * deviation.min()


@DIMENSIONS
def test_bias_is_smooth_and_leaves_the_darkest_intensity(d: int) -> None:
    images = torch.ones(4, 1, *[12] * d)
    images[(slice(None), slice(None), *[0] * d)] = -2.0
    after = change_appearance(images, alone("bias"))
    torch.testing.assert_close(after.flatten(1)[:, 0], torch.full((4,), -2.0))
    field = (after + 2) / 3
    for axis in range(2, 2 + d):
        assert field.narrow(axis, 1, 11).diff(dim=axis).abs().max() < 0.25
    assert field.flatten(1)[:, 1:].std(1).max() > 0.01


# blur


@DIMENSIONS
def test_blur_of_a_constant_is_constant(d: int) -> None:
    images = torch.full((2, 2, *[5] * d), 3.0)
    torch.testing.assert_close(blur(images, torch.tensor(1.5), 1.5), images)


@DIMENSIONS
def test_blur_of_no_width_changes_nothing(d: int) -> None:
    images = torch.randn(2, 1, *[6] * d)
    torch.testing.assert_close(blur(images, torch.zeros(2, 1, *[1] * d), 2.0), images)


@DIMENSIONS
def test_blurred_point_keeps_its_sum_and_gets_each_channels_width(d: int) -> None:
    n = 13
    images = torch.zeros(2, 2, *[n] * d)
    images[(..., *[n // 2] * d)] = 1.0
    sigma = torch.tensor([[0.7, 1.0], [1.3, 1.5]]).reshape(2, 2, *[1] * d)
    after = blur(images, sigma, 1.5)
    torch.testing.assert_close(after.flatten(2).sum(-1), torch.ones(2, 2))
    steps = torch.arange(n, dtype=torch.float32) - n // 2
    for axis in range(d):
        others = [2 + i for i in range(d) if i != axis]
        variance = (after.sum(others) * steps**2).sum(-1)
        torch.testing.assert_close(variance, sigma.reshape(2, 2) ** 2, rtol=0.05, atol=0)


# CutMix


@DIMENSIONS
def test_cutmix_mixes_image_label_and_mask_by_one_rectangle(d: int) -> None:
    batch, patch = 7, [10] * d
    mix = draw_cutmix(batch, patch, 1.0, CPU)
    number = torch.arange(batch, dtype=torch.float32).reshape(batch, *[1] * d).expand(batch, *patch)
    images, labels, masks = torch.stack([number, -number], 1), number.long(), number % 2 == 0
    before = images.clone(), labels.clone(), masks.clone()
    mixed, mixed_labels, mixed_masks = mix(images), mix(labels), mix(masks)
    assert all(torch.equal(a, b) for a, b in zip(before, (images, labels, masks))), "an input was written to"
    assert torch.equal(mixed[:, 0].long(), mixed_labels) and torch.equal(mixed[:, 1], -mixed[:, 0])
    assert torch.equal(mixed_masks, mixed_labels % 2 == 0) and mixed_labels.dtype == torch.long and mixed_masks.dtype == torch.bool
    for i, label in enumerate(mixed_labels):
        taken = label != i
        assert 0 < taken.sum() < taken.numel()
        assert len(label[taken].unique()) == 1, "from one other image"
        sides = taken.nonzero().amax(0) - taken.nonzero().amin(0) + 1
        assert int(sides.prod()) == int(taken.sum()), "not a rectangle"
    assert len({int(label[label != i][0]) for i, label in enumerate(mixed_labels)}) == batch, "every image is taken from once"


@DIMENSIONS
def test_cutmix_takes_between_2_and_40_percent(d: int) -> None:
    share = draw_cutmix(400, [32, 32, 16][:d], 1.0, CPU).box.flatten(1).float().mean(1)
    assert share.min() > 0.005 and share.max() < 0.45
    assert 0.15 < share.mean() < 0.25


@DIMENSIONS
@pytest.mark.parametrize(("batch", "probability"), [(1, 1.0), (4, 0.0)])
def test_cutmix_never_mixes_a_single_image_or_at_probability_zero(d: int, batch: int, probability: float) -> None:
    for _ in range(10):
        assert not draw_cutmix(batch, [8] * d, probability, CPU).box.any()


def test_probability_of_cutmix() -> None:
    mixed = draw_cutmix(400, (16, 16), 0.3, CPU).box.flatten(1).any(1)
    assert 0.2 < mixed.float().mean() < 0.4
