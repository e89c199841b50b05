"""Scans seen turned: geometry, and how much each view counts."""

from __future__ import annotations

import math

import pytest
import torch
from test_objective import CLASSES, REGIONS
from test_refinement import ball, dice, says
from torch import Tensor

from nnunetv2_cmems.method.label_space import LabelSpace
from nnunetv2_cmems.method.turns import MeanOfViews, part_to_turn, turned, turned_scan, weight_of

SQUARE = (1.5, 1.5)
CPU = torch.device("cpu")


def spot(height: int, width: int, y: slice, x: slice) -> Tensor:
    """(1, 1, Y, X)"""
    image = torch.zeros(1, 1, height, width)
    image[..., y, x] = 1
    return image


def test_a_quarter_turn_is_exact_on_squares() -> None:
    image = torch.randn(3, 2, 20, 20, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(turned(image, 90, SQUARE), torch.rot90(image, 1, (-2, -1)), atol=1e-4)
    assert torch.allclose(turned(image, -90, SQUARE), torch.rot90(image, -1, (-2, -1)), atol=1e-4)
    assert torch.equal(turned(image, 0, SQUARE), image)


@pytest.mark.parametrize("degrees", [-60.0, 30.0, 77.0])
def test_back_again(degrees: float) -> None:
    image = spot(40, 56, slice(12, 25), slice(20, 38))
    there = turned(image, degrees, SQUARE)
    assert (there - image).abs().max() > 0.9
    assert (turned(there, -degrees, SQUARE) > 0.5).equal(image > 0.5) or ((turned(there, -degrees, SQUARE) - image).abs() > 0.5).sum() < 9


def test_turns_are_in_millimetres() -> None:
    """A square of 24 mm stays one where pixels are not square."""
    image = spot(40, 80, slice(14, 26), slice(28, 52))
    quarter = turned(image, 90, (2.0, 1.0)) > 0.5
    assert ((image > 0.5) ^ quarter).sum() <= 12
    assert ((image > 0.5) ^ (turned(image, 90, SQUARE) > 0.5)).sum() > 200


def test_a_scan_is_turned_slice_by_slice() -> None:
    scan = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    found = turned_scan(scan, 25, SQUARE)
    assert found.shape == scan.shape and found.is_contiguous()
    assert torch.allclose(found[:, 1], turned(scan[None, :, 1], 25, SQUARE)[0])


def test_the_more_members_agree_the_more_a_view_counts() -> None:
    weights = [weight_of(agreement) for agreement in (0.0, 0.3, 0.6, 0.9, 1.0)]
    assert weights == sorted(weights) and weights[0] == weight_of(math.nan) == 1 and math.isfinite(weights[-1])
    assert weights[3] > 10 * weights[1]


@pytest.mark.parametrize("space", [CLASSES, REGIONS], ids=["classes", "regions"])
@pytest.mark.parametrize(("first", "second", "right"), [(0.2, 0.8, True), (0.8, 0.2, False)])
def test_the_view_that_members_agree_on_decides(space: LabelSpace, first: float, second: float, right: bool) -> None:
    """As the scan lies they see the organs in a wrong place; turned, in the right one."""
    truth = ball(12)
    views = MeanOfViews(space, SQUARE, CPU)
    views.add([space.logits(says(truth.roll(9, 1), space, 0.9)[None])[0].half()] * 2, 0.0, first)
    seen = turned_scan(says(truth, space, 0.9), 60, SQUARE).clamp(1e-3, 1 - 1e-3)
    views.add([space.logits(seen[None])[0].half()] * 2, 60, second)
    members = views.logits()
    assert len(members) == 2 and all(member.dtype == torch.float16 and member.shape == seen.shape for member in members)
    found = dice(space.probabilities(members[0][None])[0], truth, space)
    assert (min(found) > 0.85) if right else (max(found) < 0.6)


def test_members_stay_apart_and_weights_add_up() -> None:
    """Twice the same view is that view."""
    truth = ball(12)
    members = [CLASSES.logits(says(shifted, CLASSES, 0.9)[None])[0].half() for shifted in (truth, truth.roll(4, 1))]
    views = MeanOfViews(CLASSES, SQUARE, CPU)
    for _ in range(2):
        views.add(members, 0.0, 0.7)
    found = views.logits()
    assert all(torch.allclose(CLASSES.probabilities(a[None]), CLASSES.probabilities(b[None]), atol=2e-3) for a, b in zip(found, members))
    assert not torch.equal(found[0].argmax(0), found[1].argmax(0))


def test_what_a_view_does_not_show_it_says_nothing_about() -> None:
    """The ends of a long slice are turned out of it."""
    view = torch.zeros(2, 1, 20, 60)
    view[1] = 4.0
    views = MeanOfViews(CLASSES, SQUARE, CPU)
    views.add([view], 0.0, 0.5)
    views.add([view.flip(0)], 90, 0.9)
    (found,) = views.logits()
    decided = found.argmax(0)[0]
    assert decided[:, :18].all() and decided[:, 42:].all() and not decided[:, 24:36].any()


def test_a_view_of_a_part_says_nothing_about_the_rest() -> None:
    """It is turned about its own middle."""
    truth = ball(12)
    here = slice(2, 30), slice(4, 30)
    views = MeanOfViews(CLASSES, SQUARE, CPU)
    first = CLASSES.logits(says(truth.roll(9, 1), CLASSES, 0.9)[None])[0].half()
    views.add([first], 0.0, 0.2)
    seen = turned_scan(says(truth, CLASSES, 0.9)[(..., *here)], 60, SQUARE).clamp(1e-3, 1 - 1e-3)
    views.add([CLASSES.logits(seen[None])[0].half()], 60, 0.9, here)
    (found,) = views.logits()
    part = CLASSES.probabilities(found[None])[0][(..., *here)]
    assert min(dice(part, truth[(..., *here)], CLASSES)) > 0.85
    rest = torch.ones(truth.shape[-2:], dtype=torch.bool)
    rest[here] = False
    said, alone = (CLASSES.probabilities(logits[None])[0] for logits in (found, first))
    assert rest.any() and torch.allclose(said[..., rest], alone[..., rest], atol=2e-3)


def organs(y: slice, x: slice, shape: tuple[int, int, int] = (3, 200, 160)) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[1, y, x] = True
    return mask


@pytest.mark.parametrize("degrees", [0.0, 30.0, -60.0, 90.0, 180.0])
@pytest.mark.parametrize("spacing", [(1.5, 1.5), (2.0, 1.0)], ids=["squares", "oblongs"])
def test_the_turned_part_shows_the_organs(degrees: float, spacing: tuple[float, float]) -> None:
    mask = organs(slice(80, 140), slice(60, 90))
    part = part_to_turn(mask, degrees, spacing, (64, 64))
    sides = [here.stop - here.start for here in part]
    assert sides[0] < 200 and sides[1] < 160 and mask[(1, *part)].sum() == mask.sum()
    shown = turned(mask[(slice(1, 2), *part)][None].float(), degrees, spacing)
    assert shown.sum() == pytest.approx(60 * 30, rel=0.02), "nothing is turned out of it"
    border = torch.ones_like(shown, dtype=torch.bool)
    border[..., 1:-1, 1:-1] = False
    assert not shown[border].any(), "and there is room"


def test_the_turned_part_is_no_smaller_than_the_patch_and_lies_in_the_slices() -> None:
    spot = organs(slice(0, 10), slice(150, 160))
    assert part_to_turn(spot, 45, SQUARE, (64, 48)) == (slice(0, 64), slice(112, 160))
    assert part_to_turn(spot, 45, SQUARE, (256, 48)) == (slice(0, 200), slice(112, 160)), "the patch is larger than the slices"
    assert part_to_turn(organs(slice(0, 200), slice(0, 160)), 45, SQUARE, (64, 48)) == (slice(0, 200), slice(0, 160))
    assert part_to_turn(organs(slice(0, 0), slice(0, 0)), 45, SQUARE, (64, 48)) == (slice(0, 200), slice(0, 160)), "no organ"


def test_a_few_voxels_far_away_do_not_widen_it() -> None:
    mask = organs(slice(80, 120), slice(60, 100))
    alone = part_to_turn(mask, 60, SQUARE, (64, 64))
    mask[2, 5:8, 5:8] = True
    mask[2, 190:193, 150] = True
    for here, there in zip(part_to_turn(mask, 60, SQUARE, (64, 64)), alone):
        assert abs(here.start - there.start) <= 2 and abs(here.stop - there.stop) <= 2
