"""What slices that members agree on say about the other slices of a scan."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_refinement import CLASSES, REGIONS, dice, grey, says
from torch import Tensor

from nnunetv2_cmems.method.label_space import LabelSpace
from nnunetv2_cmems.method.propagation import OWN, _order, agreement_in_slices, propagate

SPACES = pytest.mark.parametrize("space", [CLASSES, REGIONS], ids=["classes", "regions"])
DEPTH, SIDE = 7, 72


def cone(grows: float = 1.5, moves: float = 1.0) -> Tensor:
    """(Z, Y, X): an organ in a wall, larger and farther to the right in each slice."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    slices = []
    for z in range(DEPTH):
        radius = 10 + grows * z
        distance = ((y - SIDE / 2) ** 2 + (x - SIDE / 2 - moves * (z - DEPTH // 2)) ** 2).float().sqrt()
        slices.append(torch.where(distance < 0.6 * radius, 1, torch.where(distance < radius, 2, 0)))
    return torch.stack(slices)


def two_members(truth: Tensor, right: range, space: LabelSpace) -> tuple[Tensor, Tensor]:
    """The mean of two members who know the truth in some slices, and are wrong elsewhere, each in its own way; and their agreement."""
    found = []
    for shift in (5, -6):
        says_so = truth.roll((shift, 9), (1, 2))
        says_so[right.start : right.stop] = truth[right.start : right.stop]
        found.append(says_so)
    agreement = agreement_in_slices([space.target(labels[None])[0] for labels in found], space)
    return (says(found[0], space) + says(found[1], space)) / 2, agreement


# ------------------------------------------------------------------ agreement


def test_agreement_is_the_dice_of_two_members_in_each_slice() -> None:
    one, other = torch.zeros(3, 4, 4, dtype=torch.int8), torch.zeros(3, 4, 4, dtype=torch.int8)
    one[0, :2], other[0, 1:3] = 1, 1  # 8 and 8 voxels, 4 shared
    one[1, 0], other[1] = 2, 0
    found = agreement_in_slices([one, other], CLASSES)
    torch.testing.assert_close(found, torch.tensor([[0.5, torch.nan, torch.nan], [torch.nan, 0.0, torch.nan]]), equal_nan=True)


def test_agreement_of_three_is_the_mean_of_their_pairs() -> None:
    one, other = torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4)
    one[:, ..., :2], other[:, ..., 1:3] = 1, 1
    found = agreement_in_slices([one, other, one], REGIONS)
    torch.testing.assert_close(found, torch.full((2, 1), (0.5 + 1.0 + 0.5) / 3))


# ------------------------------------------------------------------ propagation


@SPACES
def test_wrong_slices_follow_the_right_ones(space: LabelSpace) -> None:
    truth = cone()
    before, agreement = two_members(truth, range(2, 5), space)
    after = propagate(before, grey(truth, noise=0.1), agreement, 0.4, space)
    assert after.shape == before.shape
    assert torch.equal(after[:, 2:5].argmax(0), before[:, 2:5].argmax(0)), "anchors stay"
    for part in (slice(0, 2), slice(5, 7)):
        for old, new in zip(dice(before[:, part], truth[part], space), dice(after[:, part], truth[part], space)):
            assert old + 0.2 < new > 0.75
    if space is CLASSES:
        torch.testing.assert_close(after.sum(0), torch.ones_like(after[0]))
    assert (after >= 0).all() and (after <= 1).all()


def test_what_is_far_from_the_anchors_organs_is_doubted() -> None:
    truth = cone(grows=0, moves=0)
    before, agreement = two_members(truth, range(6), CLASSES)
    before[:, 6, :4, :4] = torch.tensor([0.0, 1.0, 0.0])[:, None, None]
    after = propagate(before, grey(truth, noise=0.1), agreement, 0.8, CLASSES)
    torch.testing.assert_close(after[:, 6, :4, :4].amax((1, 2)), torch.tensor([1 - OWN, OWN, 0.0]))


@SPACES
def test_an_organ_is_not_brought_to_slices_where_nobody_sees_it(space: LabelSpace) -> None:
    truth = cone()
    truth[5:] = 0
    before, agreement = two_members(truth, range(2, 5), space)
    assert agreement[:, 5:].isnan().all()
    after = propagate(before, grey(cone(), noise=0.1), agreement, 0.4, space)
    labels = space.decide(after[None], 0.0).labels[0]
    assert not labels[..., 5:, :, :].any() and labels[..., 4, :, :].any()


@pytest.mark.parametrize("image", ["noise", "flat", "two channels"])
def test_nothing_is_drawn_or_changed_and_threads_find_the_same(image: str) -> None:
    truth = cone()
    before, agreement = two_members(truth, range(3, 4), CLASSES)
    scan = {
        "noise": grey(truth),
        "flat": torch.ones(1, *truth.shape),
        "two channels": torch.cat([grey(truth), 2 * grey(truth, seed=1)]),
    }[image]
    kept, state = before.clone(), torch.get_rng_state()
    after = propagate(before, scan, agreement, 0.25, CLASSES)
    assert torch.equal(before, kept) and torch.equal(torch.get_rng_state(), state) and torch.isfinite(after).all()
    with ThreadPoolExecutor(3) as pool:
        for again in pool.map(lambda _: propagate(before, scan, agreement, 0.25, CLASSES), range(3)):
            assert torch.equal(again, after)


@SPACES
@pytest.mark.parametrize("shown", [True, False])
def test_nothing_to_carry(space: LabelSpace, shown: bool) -> None:
    """All slices are anchors, or no slice shows anything."""
    truth = cone() if shown else torch.zeros_like(cone())
    before, agreement = two_members(truth, range(2, 5), space)
    torch.testing.assert_close(propagate(before, grey(cone()), agreement, 1.0, space), before)


def test_a_large_slice_is_registered_at_a_lower_resolution() -> None:
    truth = cone().repeat_interleave(5, 1).repeat_interleave(5, 2)
    before, agreement = two_members(truth, range(2, 5), CLASSES)
    after = propagate(before, grey(truth, noise=0.1), agreement, 0.4, CLASSES)
    assert min(dice(after, truth, CLASSES)) > 0.93 > max(dice(before, truth, CLASSES))


def test_the_nearest_slices_follow_first_and_both_sides_count() -> None:
    assert _order([0, 1, 2, 3, 4, 5], [2, 5]) == [(1, [2]), (3, [2, 5]), (4, [5, 2]), (0, [1])]
    assert _order([0, 3, 9], [9]) == [(3, [9]), (0, [3])], "over slices without the organ"
    assert _order([4], [4]) == []
