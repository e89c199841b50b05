"""The losses: golden values worked out by hand, and nnU-Net's own loss where the two must agree."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

from nnunetv2_cmems.method.losses import class_counts, cross_entropy, deep_supervision_weights, dice_loss, segmentation_loss, weights_from

DIMENSIONS = pytest.mark.parametrize("d", [2, 3])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pixels(rows: list[list[float]], d: int) -> Tensor:
    """Logits (1, K, ..., n) whose softmax is the given probabilities, one row a pixel."""
    return torch.tensor(rows).log().T.reshape(1, len(rows[0]), *[1] * (d - 1), len(rows)).contiguous()


def values(row: list[Any], d: int) -> Tensor:
    return torch.tensor(row).reshape(1, *[1] * (d - 1), len(row))


def nnunet_loss(num_scales: int, ignore_label: int | None = None, regions: bool = False) -> Any:
    """The loss that nnU-Net's trainer builds: batch Dice and cross-entropy, deeply supervised."""
    trainer = SimpleNamespace(
        label_manager=SimpleNamespace(has_regions=regions, ignore_label=ignore_label),
        configuration_manager=SimpleNamespace(batch_dice=True),
        is_ddp=False,
        enable_deep_supervision=num_scales > 1,
        _do_i_compile=lambda: False,
        _get_deep_supervision_scales=lambda: [[0.5**i] * 2 for i in range(num_scales)],
    )
    return nnUNetTrainer._build_loss(trainer)


# cross-entropy

TWO = [[0.25, 0.75], [0.5, 0.5]]  # the second pixel's loss is ln 2, the first one's -ln 0.75


@DIMENSIONS
@pytest.mark.parametrize(
    ("weights", "mask", "over_all", "expected"),
    [
        (None, None, False, (0.287682 + 0.693147) / 2),
        ([1.0, 3.0], None, False, (3 * 0.287682 + 0.693147) / 4),
        (None, [True, False], False, 0.287682),
        (None, [True, False], True, 0.287682 / 2),
        ([1.0, 3.0], [True, False], False, 0.287682),
        ([1.0, 3.0], [True, False], True, 3 * 0.287682 / 4),
        ([1.0, 3.0], [False, True], True, 0.693147 / 4),
        (None, [False, False], False, 0.0),
        (None, [False, False], True, 0.0),
    ],
)
def test_cross_entropy(d: int, weights: list[float] | None, mask: list[bool] | None, over_all: bool, expected: float) -> None:
    loss = cross_entropy(
        pixels(TWO, d),
        values([1, 0], d),
        None if mask is None else values(mask, d),
        weights=None if weights is None else torch.tensor(weights),
        over_all_pixels=over_all,
    )
    assert loss.shape == () and float(loss) == pytest.approx(expected, abs=1e-5)


# Dice

FOUR = [[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.1, 0.8, 0.1], [0.5, 0.1, 0.4]]


@DIMENSIONS
@pytest.mark.parametrize(
    ("target", "mask", "expected"),
    [
        ([0, 1, 1, 0], None, 1 - 2 * 1.4 / (1.7 + 2)),  # class 2 is absent and left out
        ([0, 1, 1, 2], None, 1 - (2 * 1.4 / (1.7 + 2) + 2 * 0.4 / (0.7 + 1)) / 2),
        ([0, 1, 1, 0], [False, True, True, True], 1 - 2 * 1.4 / (1.5 + 2)),
        ([0, 1, 1, 2], [True, True, True, False], 1 - 2 * 1.4 / (1.6 + 2)),  # class 2 is masked out
        ([0, 0, 0, 0], None, 0.0),
        ([0, 1, 1, 2], [False] * 4, 0.0),
    ],
)
def test_dice(d: int, target: list[int], mask: list[bool] | None, expected: float) -> None:
    loss = dice_loss(pixels(FOUR, d), values(target, d), None if mask is None else values(mask, d))
    assert loss.shape == () and float(loss) == pytest.approx(expected, abs=1e-5)


def test_dice_counts_over_the_batch() -> None:
    logits, target = pixels(FOUR, 2), values([0, 1, 1, 2], 2)
    apart = torch.cat([logits[..., :2], logits[..., 2:]]), torch.cat([target[..., :2], target[..., 2:]])
    assert float(dice_loss(*apart, None)) == pytest.approx(float(dice_loss(logits, target, None)), abs=1e-6)


@DIMENSIONS
def test_target_without_foreground_cannot_push_foreground_down_by_dice(d: int) -> None:
    logits = torch.randn(2, 3, *[4] * d, requires_grad=True)
    dice_loss(logits, torch.zeros(2, *[4] * d, dtype=torch.long), None).backward()
    assert logits.grad is not None and not logits.grad.any()


# both, deeply supervised


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_weights_of_the_scales_are_nnunets(n: int) -> None:
    assert deep_supervision_weights(n) == pytest.approx(list(nnunet_loss(n).weight_factors))


def test_a_single_scale_counts_in_full() -> None:
    assert deep_supervision_weights(1) == [1.0]


@DIMENSIONS
@pytest.mark.parametrize("num_scales", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_nnunets_loss(d: int, num_scales: int, masked: bool) -> None:
    sizes = [[16 // 2**i] * d for i in range(num_scales)]
    scales = [torch.randn(2, 3, *size) for size in sizes]
    target = torch.randint(0, 3, (2, *sizes[0]))
    mask = torch.rand(2, *sizes[0]) < 0.7 if masked else None
    theirs = target if mask is None else torch.where(mask, target, 3)
    lowered = DownsampleSegForDSTransform([[0.5**i] * d for i in range(num_scales)])
    targets = [torch.stack(scale) for scale in zip(*(lowered(segmentation=t[None].float())["segmentation"] for t in theirs))]
    loss = nnunet_loss(num_scales, 3 if masked else None)
    expected = loss(scales, targets) if num_scales > 1 else loss(scales[0], targets[0])
    # nnU-Net's Dice term is -Dice, ours 1 - Dice
    assert float(segmentation_loss(scales, target, mask)) == pytest.approx(float(expected) + 1, abs=1e-4)


@DIMENSIONS
def test_coarsest_scale_does_not_count(d: int) -> None:
    target = torch.randint(0, 3, (1, *[8] * d))
    fine, coarse = torch.randn(1, 3, *[8] * d), torch.randn(1, 3, *[4] * d, requires_grad=True)
    loss = segmentation_loss([fine, coarse], target)
    assert float(loss) == pytest.approx(float(segmentation_loss([fine], target)))
    assert not loss.requires_grad


@DIMENSIONS
def test_dice_weight(d: int) -> None:
    logits, target = pixels(FOUR, d), values([0, 1, 1, 0], d)
    entropy = -sum(map(math.log, [0.7, 0.6, 0.8, 0.5])) / 4
    dice = 1 - 2.8 / 3.7
    for weight in (0.0, 0.5, 2.0):
        assert float(segmentation_loss([logits], target, dice_weight=weight)) == pytest.approx(entropy + weight * dice, abs=1e-5)


@DIMENSIONS
@pytest.mark.parametrize("over_all", [False, True])
def test_pixels_outside_the_mask_get_no_gradient(d: int, over_all: bool) -> None:
    logits = torch.randn(2, 3, *[6] * d, requires_grad=True)
    mask = torch.rand(2, *[6] * d) < 0.5
    target, weights = torch.randint(0, 3, mask.shape), torch.tensor([1.0, 2.0, 3.0])
    segmentation_loss([logits], target, mask, weights=weights, over_all_pixels=over_all).backward()
    assert logits.grad is not None
    touched = logits.grad.abs().sum(1) > 0
    assert torch.equal(touched, mask)


def test_half_precision_logits_are_summed_in_single_precision() -> None:
    target = torch.randint(0, 2, (1, 400, 400))  # 80,000 of a class: more than half precision can count
    logits = torch.zeros(1, 2, 400, 400, dtype=torch.float16)
    loss = segmentation_loss([logits], target)
    assert loss.dtype == torch.float32
    share = float((target == 1).float().mean())
    assert float(loss) == pytest.approx(math.log(2) + 1 - share / (0.5 + share), abs=1e-3)


# regions

HEADS = [[0.75, 0.5], [0.2, 0.9]]  # two pixels, two regions: sigmoids
INSIDE = [[True, False], [False, True]]


def heads(rows: list[list[Any]], d: int) -> Tensor:
    """(1, K, ..., n) from one row of K values a pixel."""
    return torch.tensor(rows).T.reshape(1, len(rows[0]), *[1] * (d - 1), len(rows)).contiguous()


@DIMENSIONS
@pytest.mark.parametrize(
    ("weights", "mask", "over_all", "expected"),
    [
        (None, None, False, (0.287682 + 0.693147 + 0.223144 + 0.105361) / 4),
        (None, [True, False], False, (0.287682 + 0.693147) / 2),  # the first pixel only
        (None, [[True, False], [True, True]], False, (0.287682 + 0.223144 + 0.105361) / 3),
        (None, [[True, False], [True, True]], True, (0.287682 + 0.223144 + 0.105361) / 4),
        # outside and inside of the first region, then of the second one
        ([[1.0, 3.0], [2.0, 5.0]], None, False, (3 * 0.287682 + 2 * 0.693147 + 0.223144 + 5 * 0.105361) / 11),
        ([[1.0, 3.0], [2.0, 5.0]], [[True, False], [True, True]], True, (3 * 0.287682 + 0.223144 + 5 * 0.105361) / 11),
        (None, [False, False], False, 0.0),
    ],
)
def test_binary_cross_entropy(d: int, weights: list[list[float]] | None, mask: list[Any] | None, over_all: bool, expected: float) -> None:
    counted = None if mask is None else heads(mask, d) if isinstance(mask[0], list) else values(mask, d)
    loss = cross_entropy(
        heads(HEADS, d).logit(),
        heads(INSIDE, d),
        counted,
        weights=None if weights is None else torch.tensor(weights),
        over_all_pixels=over_all,
    )
    assert loss.shape == () and float(loss) == pytest.approx(expected, abs=1e-5)


@DIMENSIONS
@pytest.mark.parametrize(
    ("target", "mask", "expected"),
    [
        (INSIDE, None, 1 - (2 * 0.75 / (0.95 + 1) + 2 * 0.9 / (1.4 + 1)) / 2),
        ([[True, False], [True, False]], None, 1 - 2 * 0.95 / (0.95 + 2)),  # nothing of the second region is shown
        (INSIDE, [True, False], 1 - 2 * 0.75 / (0.75 + 1)),
        (INSIDE, [[True, False], [True, True]], 1 - (2 * 0.75 / (0.95 + 1) + 2 * 0.9 / (0.9 + 1)) / 2),
    ],
)
def test_dice_of_regions(d: int, target: list[list[bool]], mask: list[Any] | None, expected: float) -> None:
    counted = None if mask is None else heads(mask, d) if isinstance(mask[0], list) else values(mask, d)
    assert float(dice_loss(heads(HEADS, d).logit(), heads(target, d), counted)) == pytest.approx(expected, abs=1e-5)


@DIMENSIONS
@pytest.mark.parametrize("num_scales", [1, 3])
@pytest.mark.parametrize(("num_regions", "masked"), [(3, False), (1, False), (1, True)])
def test_equals_nnunets_loss_of_regions(d: int, num_scales: int, num_regions: int, masked: bool) -> None:
    """With a mask for one region only: over several, nnU-Net sums the masked cross-entropy, but takes the mean of the unmasked one."""
    sizes = [[16 // 2**i] * d for i in range(num_scales)]
    scales = [torch.randn(2, num_regions, *size) for size in sizes]
    target = torch.rand(2, num_regions, *sizes[0]) < 0.4
    mask = torch.rand(2, *sizes[0]) < 0.7 if masked else None
    theirs = target if mask is None else torch.cat([target, ~mask[:, None]], 1)
    lowered = DownsampleSegForDSTransform([[0.5**i] * d for i in range(num_scales)])
    targets = [torch.stack(scale) for scale in zip(*(lowered(segmentation=t.float())["segmentation"] for t in theirs))]
    loss = nnunet_loss(num_scales, 9 if masked else None, regions=True)
    expected = loss(scales, targets) if num_scales > 1 else loss(scales[0], targets[0])
    assert float(segmentation_loss(scales, target, mask)) == pytest.approx(float(expected) + 1, abs=1e-4)


@DIMENSIONS
@pytest.mark.parametrize("per_region", [False, True])
@pytest.mark.parametrize("over_all", [False, True])
def test_regions_get_no_gradient_outside_of_their_mask(d: int, per_region: bool, over_all: bool) -> None:
    scales = [torch.randn(2, 3, *[n] * d, requires_grad=True) for n in (8, 4, 2)]
    target = torch.rand(2, 3, *[8] * d) < 0.5
    mask = torch.rand(2, *([3] if per_region else []), *[8] * d) < 0.5
    segmentation_loss(scales, target, mask, weights=torch.rand(3, 2) + 0.5, over_all_pixels=over_all).backward()
    assert scales[0].grad is not None and scales[1].grad is not None and scales[2].grad is None
    counted = mask if per_region else mask[:, None].expand_as(target)
    assert torch.equal(scales[0].grad != 0, counted)
    assert scales[1].grad.any() and not scales[1].grad.all()


# class weights


@pytest.mark.parametrize(
    ("exponent", "expected"),
    [(0.0, [1.0, 1.0, 1.0]), (0.5, [0.787889, 1.114245, 1.929928]), (1.0, [1 / 1.8, 1 / 0.9, 1 / 0.3])],
)
def test_class_weights(exponent: float, expected: list[float]) -> None:
    labels = [torch.tensor([[0, 0, 1], [-1, 0, 0]]), torch.tensor([0, 0, 1, 1, 2, -1, -1])]  # shares 0.6, 0.3, 0.1
    assert weights_from(class_counts(labels, 3), exponent).tolist() == pytest.approx(expected, abs=1e-5)


def test_class_that_nobody_shows_weighs_like_the_rarest() -> None:
    weights = weights_from(class_counts([torch.tensor([0] * 6 + [1] * 3 + [3])], 4), 1.0)
    assert torch.isfinite(weights).all()
    assert float(weights[2]) == float(weights[3]) > float(weights[1])


@pytest.mark.parametrize("exponent", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "num_classes", [3, 5]
)
def test_mean_class_weight_over_the_pixels_is_one(exponent: float, num_classes: int) -> None:
    label = torch.tensor([0] * 13 + [1] * 5 + [2] * 2)
    assert float(weights_from(class_counts([label], num_classes), exponent)[label].mean()) == pytest.approx(1.0, abs=1e-5)
