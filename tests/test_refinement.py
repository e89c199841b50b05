"""Probabilities that follow a scan's own grey values, and labels in as many pieces as the exemplars show."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from nnunetv2_cmems.config import ScanLabelsConfig
from nnunetv2_cmems.method.label_space import Classes, LabelSpace, Regions
from nnunetv2_cmems.method.refinement import Refinement, _binned, in_one_piece, largest_pieces, refine

CLASSES = Classes(("organ", "wall"))
REGIONS = Regions(("both", "organ"), None, ((1, 2), (1,)))
CONFIG = ScanLabelsConfig(appearance=0.7, smoothing=2.0)
SHAPE = (6, 40, 40)
PLANAR = pytest.mark.parametrize("planar", [True, False], ids=["planar", "in space"])


def ball(radius: float, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """A rod through all slices: organ (1) within half the radius, wall (2) around it."""
    y, x = (torch.arange(n) - (n - 1) / 2 for n in shape[1:])
    distance = (y[:, None] ** 2 + x[None] ** 2).sqrt()
    slice_ = torch.where(distance < radius / 2, 1, torch.where(distance < radius, 2, 0))
    return slice_.expand(shape).contiguous()


def grey(truth: Tensor, levels: tuple[float, ...] = (0.0, 3.0, 1.5), noise: float = 0.3, seed: int = 0) -> Tensor:
    """(1, Z, Y, X): each class has a grey value of its own, with noise."""
    return (torch.tensor(levels)[truth] + noise * torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed)))[None]


def says(labels: Tensor, space: LabelSpace, sure: float = 0.9) -> Tensor:
    """Probabilities that say these labels."""
    if isinstance(space, Regions):
        return torch.where(space.target(labels[None])[0], sure, 1 - sure)
    k = len(space.names) + 1
    return torch.nn.functional.one_hot(labels, k).movedim(-1, 0) * (sure - (1 - sure) / (k - 1)) + (1 - sure) / (k - 1)


def dice(found: Tensor, truth: Tensor, space: LabelSpace) -> list[float]:
    decided = space.decide(found[None], 0.0).labels
    masks = zip(space.masks(decided), space.masks(space.target(truth[None])))
    return [float(2 * (a & b).sum() / (a.sum() + b.sum())) for a, b in masks]


@PLANAR
@pytest.mark.parametrize("space", [CLASSES, REGIONS], ids=["classes", "regions"])
def test_a_wrong_border_is_mended(space: LabelSpace, planar: bool) -> None:
    truth = ball(12)
    before = says(ball(12).roll((2, 2), (1, 2)), space)  # every border is in the wrong place
    after = refine(before, grey(truth), CONFIG, space, planar)
    assert after.shape == before.shape
    for old, new in zip(dice(before, truth, space), dice(after, truth, space)):
        assert new > old + 0.1
    assert min(dice(after, truth, space)) > 0.8


def test_the_whole_scan_counts_not_the_slice() -> None:
    """A slice where the networks say nonsense follows the histograms of the others."""
    truth = ball(12)
    before = says(truth, CLASSES)
    before[:, 2] = torch.tensor([0.5, 0.25, 0.25])[:, None, None]
    after = refine(before, grey(truth), CONFIG, CLASSES, True)
    organ = truth[2] == 1
    assert (before[:, 2].argmax(0)[organ] == 0).all() and (after[:, 2].argmax(0)[organ] == 1).float().mean() > 0.9


@PLANAR
def test_probabilities_add_up_and_nothing_is_drawn_or_changed(planar: bool) -> None:
    truth = ball(12)
    before, image = says(ball(15), CLASSES), grey(truth)
    kept, state = before.clone(), torch.get_rng_state()
    after = refine(before, image, CONFIG, CLASSES, planar)
    torch.testing.assert_close(after.sum(0), torch.ones(SHAPE))
    assert (after >= 0).all() and torch.equal(before, kept) and torch.equal(torch.get_rng_state(), state)


def test_switched_off_it_is_the_identity() -> None:
    before = torch.rand(3, *SHAPE).softmax(0)
    assert torch.equal(refine(before, grey(ball(9)), ScanLabelsConfig(appearance=0.0, smoothing=0.0), CLASSES, True), before)
    regions = torch.rand(2, *SHAPE)
    assert torch.equal(refine(regions, grey(ball(9)), ScanLabelsConfig(appearance=0.0, smoothing=0.0), REGIONS, False), regions)


def test_blur_within_slices_or_in_space() -> None:
    before = says(torch.zeros(SHAPE, dtype=torch.long), CLASSES, 1.0)
    before[:, 3, 20, 20] = torch.tensor([0.0, 1.0, 0.0])
    config = ScanLabelsConfig(appearance=0.0)
    reached = [set(refine(before, grey(ball(9)), config, CLASSES, planar)[1].nonzero()[:, 0].tolist()) for planar in (True, False)]
    assert reached == [{3}, {0, 1, 2, 3, 4, 5}]


@pytest.mark.parametrize("space", [CLASSES, REGIONS], ids=["classes", "regions"])
def test_a_scan_without_organs(space: LabelSpace) -> None:
    before = says(torch.zeros(SHAPE, dtype=torch.long), space, 0.999)
    after = refine(before, grey(ball(9)), CONFIG, space, True)
    torch.testing.assert_close(after, before)


def test_a_flat_image_and_a_class_that_is_not_there() -> None:
    truth = ball(12).clamp_max(1)
    after = refine(says(truth, CLASSES, 1.0), torch.zeros(1, *SHAPE), CONFIG, CLASSES, True)
    assert torch.isfinite(after).all() and min(dice(after, truth, Classes(("organ",)))) > 0.9
    assert (after.argmax(0) != 2).all()


def test_channels_add_their_evidence() -> None:
    """Organ and wall look alike in the first channel and differ in the second."""
    truth = ball(12)
    one = grey(truth, (0.0, 2.0, 2.0))
    both = torch.cat([one, grey(truth, (0.0, 2.0, 0.0), seed=1)])
    before = says(ball(12).roll((2, 2), (1, 2)), CLASSES)
    single, double = (dice(refine(before, image, CONFIG, CLASSES, True), truth, CLASSES)[0] for image in (one, both))
    assert double > single + 0.05


def test_bins_hold_what_lies_beyond_the_quantiles() -> None:
    values = torch.cat([torch.linspace(0, 1, 1000), torch.tensor([-1e6, 1e6])])
    bins = _binned(values)
    assert bins[-2] == 0 and bins[-1] == 23 and bins.bincount(minlength=24).min() > 20
    assert len(_binned(torch.randn(3_000_000))) == 3_000_000


# ------------------------------------------------------------------ pieces


def label(*boxes: tuple[int, slice], shape: tuple[int, ...] = (3, 20, 20)) -> np.ndarray:
    """Squares of a value, over all slices; the slice is that of x and y."""
    found = np.zeros(shape, np.int16)
    for value, where in boxes:
        found[..., where, where] = value
    return found


TOGETHER = label((2, slice(4, 10)), (1, slice(6, 8)), shape=(20, 20))
APART = label((2, slice(2, 6)), (1, slice(10, 14)), shape=(20, 20))


@pytest.mark.parametrize(
    ("exemplars", "expected"),
    [
        ([TOGETHER], (True, True, True)),
        ([APART], (False, True, True)),
        ([TOGETHER, APART], (False, True, True)),
        ([TOGETHER, np.zeros_like(TOGETHER)], (True, True, True)),
        ([label((1, slice(2, 4)), (1, slice(5, 7)), shape=(20, 20))], (False, False, False)),
        ([label((1, slice(2, 4)), (1, slice(4, 6)), shape=(20, 20))], (True, True, False)),
        ([label((1, slice(2, 5))), TOGETHER], (True, True, True)),
        ([np.zeros_like(TOGETHER)], (False, False, False)),
        ([], ()),
    ],
    ids=["one", "two", "one and two", "one and none", "same size", "corners touch", "volume", "nothing", "no exemplar"],
)
def test_what_exemplars_show_in_one_piece(exemplars: list[np.ndarray], expected: tuple[bool, ...]) -> None:
    assert in_one_piece(exemplars, CLASSES) == expected


def test_regions_in_one_piece() -> None:
    assert in_one_piece([TOGETHER], REGIONS) == (True, True, True)
    assert in_one_piece([APART], REGIONS) == (False, False, True)


def test_only_the_largest_piece_stays() -> None:
    labels = torch.from_numpy(label((2, slice(2, 9)), (1, slice(4, 6)), (1, slice(7, 8)), (1, slice(12, 14)))).to(torch.int8)
    kept = labels.clone()
    whole = largest_pieces(labels, (True, False, False), 1.0, CLASSES)
    assert (whole[:, 12:, 12:] == 0).all() and torch.equal(whole[:, :12, :12], labels[:, :12, :12])
    each = largest_pieces(labels, (True, True, True), 1.0, CLASSES)
    assert (each[:, 7, 7] == 0).all() and (each[:, 4:6, 4:6] == 1).all() and (each[:, 2, 2] == 2).all()
    assert torch.equal(largest_pieces(labels, (False, False, False), 1.0, CLASSES), labels) and torch.equal(labels, kept)
    assert torch.equal(largest_pieces(labels * 0, (True, True, True), 1.0, CLASSES), labels * 0)


def test_pieces_hang_together_across_slices() -> None:
    labels = torch.zeros(3, 20, 20, dtype=torch.int8)
    labels[0, 2:6, 2:6], labels[1, 2:6, 2:6] = 1, 1
    labels[2, 10:15, 10:15] = 1  # the largest within a slice, but not in space
    assert largest_pieces(labels, (True, True, True), 1.0, CLASSES).nonzero()[:, 0].unique().tolist() == [0, 1]


def test_pieces_of_regions() -> None:
    labels = torch.from_numpy(label((2, slice(2, 9)), (1, slice(4, 6)), (1, slice(7, 8)), (2, slice(12, 14)))).long()
    heads = REGIONS.target(labels[None])[0].to(torch.int8)
    found = largest_pieces(heads, (True, True, True), 1.0, REGIONS)
    assert (found[0, :, 2:9, 2:9] == 1).all() and found[0, :, 12:].sum() == 0, "only what is apart from the foreground goes"
    assert (found[1, :, 7, 7] == 0).all() and (found[1, :, 4:6, 4:6] == 1).all()


def test_pieces_nearly_as_large_as_the_largest_may_stay() -> None:
    """An exemplar slice that shows one kidney says nothing about the other."""
    labels = torch.zeros(1, 20, 20, dtype=torch.int8)
    labels[0, 2:6, 2:6], labels[0, 2:6, 10:13], labels[0, 12:14, 2:5] = 1, 1, 1  # 16, 12 and 6 voxels
    for share, left in ((0.3, 34), (0.5, 28), (0.8, 16), (1.0, 16)):
        assert largest_pieces(labels, (True, True, True), share, CLASSES).sum() == left
    labels[0, 2:6, 13] = 1
    assert largest_pieces(labels, (False, True, False), 1.0, CLASSES).sum() == 16, "one of two equal ones"


@pytest.mark.parametrize("share", [0.7, 1.0])
@pytest.mark.parametrize("space", [CLASSES, REGIONS], ids=["classes", "regions"])
def test_the_piece_that_shows_all_organs_stays_not_the_largest_one(space: LabelSpace, share: float) -> None:
    labels = torch.zeros(1, 40, 40, dtype=torch.long)
    labels[0, 1:13, 1:13], labels[0, 4:10, 4:10] = 2, 1
    labels[0, 15:35, 15:35] = 2  # larger, but of one kind
    heads = space.target(labels[None])[0].to(torch.int8)
    found = torch.stack(list(space.masks(largest_pieces(heads, (True, False, False), share, space)[None]))).any(0)[0]
    assert torch.equal(found, (labels > 0) & (torch.arange(40) < 14))


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_speck_of_what_there_is_hardly_any_of_is_no_piece(share: float) -> None:
    labels = torch.zeros(1, 40, 40, dtype=torch.int8)
    labels[0, 15:35, 15:35], labels[0, 2, 2:4] = 1, 2
    assert torch.equal(largest_pieces(labels, (True, False, False), share, CLASSES), labels * (labels == 1))


# ------------------------------------------------------------------ predictions


@PLANAR
@pytest.mark.parametrize("space", [CLASSES, REGIONS], ids=["classes", "regions"])
def test_refined_logits_decide_for_the_refined_labels(space: LabelSpace, planar: bool) -> None:
    truth = ball(12)
    noted = truth.clone()
    noted[:, :3, :3] = 1  # a second piece
    logits = space.logits(says(noted, space, sure=0.999)[None])[0].half()
    image, rule = grey(truth), Refinement(CONFIG, (True, True, True), 1.0)
    kept = logits.clone()
    refined = rule.logits(logits, image, space, planar)
    assert torch.equal(logits, kept) and torch.isfinite(refined).all()
    labels = space.decide(space.probabilities(refined[None]), 0.0).labels[0]
    assert torch.equal(labels.to(torch.int8), rule.labels(space.probabilities(logits[None])[0], image, space, planar))
    assert not labels[..., :3, :3].any(), "the second piece is gone"


def test_far_from_organs_logits_stay() -> None:
    logits = torch.full((3, *SHAPE), -9.0)
    logits[0] = 9.0
    logits[:, 2:4, 10:20, 10:20] = torch.tensor([-5.0, 5.0, 0.0])[:, None, None, None]
    logits += 0.1 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    kept = logits.clone()
    refined = Refinement(CONFIG, (True, True, True), 1.0).logits(logits, grey(ball(12)), CLASSES, True)
    assert torch.equal(logits, kept) and not torch.equal(refined, kept)
    assert torch.equal(refined[:, :2], logits[:, :2]) and torch.equal(refined[..., 30:], logits[..., 30:])
    empty = torch.stack([torch.full(SHAPE, 9.0), *[torch.full(SHAPE, -9.0)] * 2])
    assert torch.equal(Refinement(CONFIG, (True, True, True), 1.0).logits(empty, grey(ball(12)), CLASSES, True), empty)


@pytest.mark.parametrize("single", [(True, False, True), (False, False)])
def test_a_refinement_is_kept_with_the_weights(single: tuple[bool, ...]) -> None:
    space = Classes(("organ", "wall")[: len(single) - 1])
    config = ScanLabelsConfig(appearance=0.25, smoothing=1.5, largest_piece=False, propagation=0.5, turns=(-30.0, 90.0))
    rule = Refinement(config, single, 0.5)
    again = Refinement.from_tensor(rule.to_tensor(), space)
    assert (again.single, again.share) == (single, 0.5)
    kept = ("appearance", "smoothing", "largest_piece", "propagation", "turns")
    assert all(getattr(again.config, name) == getattr(rule.config, name) for name in kept)
    assert (again.places, again.outlines, again.reach, any(again.grows)) == (None, None, 0.0, False)
    older = Refinement.from_tensor(rule.to_tensor()[: 4 + len(single)], space)  # of a checkpoint from before slices were propagated
    assert older.config.propagation == 0 and older.config.turns == () and older.single == single and older.reach == 0
    growing = dataclasses.replace(rule, grows=(True, *[False] * (len(single) - 2)), reach=2.5)
    again = Refinement.from_tensor(growing.to_tensor(), space)
    assert (again.grows, again.reach) == (growing.grows, 2.5)


@pytest.mark.parametrize("space", [CLASSES, REGIONS], ids=["classes", "regions"])
def test_predictions_grow_to_the_next_edge(space: LabelSpace) -> None:
    """An organ is drawn to its middle; with a reach of 0 it stays so."""
    truth = (ball(24) == 1).long()
    half = truth.clone()
    half[..., 22:] = 0
    logits, image = space.logits(says(half, space, 0.99)[None])[0], grey(truth)
    config = ScanLabelsConfig(appearance=0.0, smoothing=0.5, largest_piece=False)
    found = []
    for reach in (0.0, 14.0):
        rule = Refinement(config, (True,) * 3, 1.0, grows=(True, True), reach=reach)
        probabilities = space.probabilities(rule.logits(logits, image, space, True)[None])[0]
        found.append(dice(probabilities, truth, space)[-1 if space is REGIONS else 0])
    assert found[0] < 0.77 and found[1] > 0.9


def test_logits_follow_the_slices_that_members_agree_on() -> None:
    """Two members agree on all slices but the last."""
    truth = ball(12)
    truth[-1] = ball(12)[0].roll(4, 0)
    wrong = truth.clone()
    wrong[-1] = truth[-1].roll(9, 1)
    agreement = torch.ones(2, len(truth))
    agreement[:, -1] = 0.2
    logits = CLASSES.logits(says(wrong, CLASSES, sure=0.99)[None])[0]
    config = ScanLabelsConfig(appearance=0.0, smoothing=0.0, largest_piece=False, propagation=0.5)
    rule, image = Refinement(config, (True, True, True), 1.0), grey(truth, noise=0.1)
    before, after = (
        dice(CLASSES.probabilities(rule.logits(logits, image, CLASSES, True, known)[None])[0][:, -1:], truth[-1:], CLASSES)
        for known in (None, agreement)
    )
    assert min(after) > max(before) + 0.2
    assert torch.equal(rule.logits(logits, image, CLASSES, True, agreement)[:, :-1].argmax(0), logits[:, :-1].argmax(0))


@pytest.mark.parametrize(("planar", "share", "expected"), [(True, 0.5, True), (True, 0.0, False), (False, 0.5, False)])
def test_slices_count_for_others_where_they_are_apart(planar: bool, share: float, expected: bool) -> None:
    assert Refinement(ScanLabelsConfig(propagation=share), (True,), 1.0).propagates(planar) == expected


@pytest.mark.parametrize("space", [CLASSES, REGIONS], ids=["classes", "regions"])
def test_predictions_are_the_mean_with_what_volumes_say(space: LabelSpace) -> None:
    """Grey values decide between the two; where volumes know nothing the networks say alone; organs that only they see are found."""
    truth = ball(12)
    rule = Refinement(CONFIG, (False,) * 3, 1.0)
    networks, volumes = (says(ball(12).roll(shift, 1), space, 0.99) for shift in (4, -4))
    logits, image = space.logits(networks[None])[0], grey(truth)
    half = torch.full(SHAPE, 0.5)
    alone = rule.logits(logits, image, space, True)
    together = rule.logits(logits, image, space, True, registered=(volumes, half))
    scores = [np.mean(dice(space.probabilities(one[None])[0], truth, space)) for one in (logits, alone, together)]
    assert scores[2] > max(scores[:2]) + 0.02 and scores[2] > 0.95
    torch.testing.assert_close(rule.logits(logits, image, space, True, registered=(volumes, 0 * half)), alone)
    nothing = space.logits(says(torch.zeros(SHAPE, dtype=torch.long), space, 0.9999)[None])[0]
    assert torch.equal(rule.logits(nothing, image, space, True), nothing)
    found = rule.logits(nothing, image, space, True, registered=(says(truth, space, 1.0), half))
    assert min(dice(space.probabilities(found[None])[0], truth, space)) > 0.85
