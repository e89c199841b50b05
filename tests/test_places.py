"""Organs that lie, relative to each other, where annotated volumes show them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from test_refinement import says
from torch import Tensor

from nnunetv2_cmems.config import ScanLabelsConfig
from nnunetv2_cmems.method.label_space import Classes, LabelSpace, Regions
from nnunetv2_cmems.method.places import Places
from nnunetv2_cmems.method.refinement import Refinement

NAMES = ("spine", "left", "right")
CLASSES = Classes(NAMES)
REGIONS = Regions(NAMES, None, ((1,), (2,), (3,)))
SPACES = pytest.mark.parametrize("space", [CLASSES, REGIONS], ids=["classes", "regions"])


def body(shape: tuple[int, int, int] = (24, 48, 40), at: tuple[int, int, int] = (4, 12, 10), step: int = 1) -> np.ndarray:
    """(Z, Y, X): a spine across the slices, a left organ in the first ones and a right one in the last ones; ``step`` slices to one."""
    label = np.zeros(shape, dtype=np.int16)
    z, y, x = at
    label[z : z + 16 * step, y + 14 : y + 18, x + 4 : x + 8] = 1
    label[z : z + 4 * step, y : y + 8, x : x + 8] = 2
    label[z + 12 * step : z + 16 * step, y : y + 8, x : x + 8] = 3
    return label


def decided(found: Tensor, space: LabelSpace) -> Tensor:
    """(Z, Y, X) as a label map; organs of these bodies do not overlap."""
    labels = space.decide(found[None], 0.0).labels[0]
    if space is CLASSES:
        return labels
    assert (labels.sum(0) <= 1).all()
    return (labels * torch.arange(1, 4)[:, None, None, None]).sum(0)


def places(space: LabelSpace = CLASSES, *volumes: np.ndarray, stretched: bool = False) -> Places:
    found = Places.of(volumes or [body()], [], space, stretched)
    assert found is not None
    return found


# ------------------------------------------------------------------ what volumes show


@SPACES
def test_where_organs_lie_seen_from_their_middle(space: LabelSpace) -> None:
    found = places(space)
    expected = np.array([[7.5, 15.5, 5.5], [1.5, 3.5, 3.5], [13.5, 3.5, 3.5]])
    np.testing.assert_allclose(found.middles, expected - expected.mean(0))
    np.testing.assert_allclose(found.spreads[1], [np.arange(n).std() for n in (4, 8, 8)])
    moved = places(space, body(at=(0, 3, 20)))
    np.testing.assert_allclose(moved.middles, found.middles)


def test_two_volumes_say_how_places_differ() -> None:
    other = body()
    other[other == 3] = 0
    other[16:20, 12:20, 16:24] = 3  # 6 voxels farther along x: the common middle moves by 2
    one, both = places(), places(CLASSES, body(), other)
    np.testing.assert_allclose(both.middles[2], one.middles[2] + [0, 0, 2])
    np.testing.assert_allclose(both.spreads[2] ** 2, one.spreads[2] ** 2 + [0, 0, 4])


def test_slices_say_how_far_organs_can_reach() -> None:
    """``body`` has its spine in slices 4 to 19, left in 4 to 7, right in 16 to 19."""
    label = body()
    found = Places.of([], [{z: label[z] for z in (2, 5, 13, 17, 23)}], CLASSES, False)
    assert found is not None
    reaches = {0: (2, 23), 1: (2, 13), 2: (13, 23)}  # the spine is in 5 to 17, left in 5, right in 17
    middles = np.array([sum(reach) / 2 for reach in reaches.values()])
    np.testing.assert_allclose(found.middles[:, 0], middles - middles.mean())
    np.testing.assert_allclose(found.spreads[:, 0], [(high - low) / np.sqrt(12) for low, high in reaches.values()])
    np.testing.assert_allclose(found.middles[:, 1:], places().middles[:, 1:])
    np.testing.assert_allclose(found.spreads[:, 1:], places().spreads[:, 1:])


@pytest.mark.parametrize(
    ("slices", "reaches"),
    [
        ((5, 13), {0: (-3, 21), 1: (-3, 13)}),  # no slice beyond the spine; left begins as far before as the next slice is behind
        ((5, 7, 8), {0: (2, 11), 1: (4, 8)}),
        ((13, 16, 17), {0: (9, 21), 2: (13, 20)}),
        ((5,), {0: None, 1: None}),
    ],
)
def test_where_no_slice_says_how_far(slices: tuple[int, ...], reaches: dict[int, tuple[int, int] | None]) -> None:
    label = body()
    found = Places.of([], [{z: label[z] for z in slices}], CLASSES, False)
    assert found is not None
    for k in range(3):
        assert np.isfinite(found.middles[k, 0]) == (k in reaches)
    for k, reach in reaches.items():
        expected = np.inf if reach is None else (reach[1] - reach[0]) / np.sqrt(12)
        np.testing.assert_allclose(found.spreads[k, 0], expected)
    if None not in reaches.values():
        middles = [sum(reach) / 2 for reach in reaches.values() if reach]
        np.testing.assert_allclose([found.middles[k, 0] for k in reaches], np.array(middles) - np.mean(middles))


def test_a_slice_that_is_annotated_in_part_does_not_say_what_is_not_there() -> None:
    slices = {z: body()[z] for z in (2, 5, 10, 13, 17, 23)}
    slices[10][40:] = -1  # of the left organ nobody knows: it ends before 13, not before 10
    found = Places.of([], [slices], CLASSES, False)
    assert found is not None
    np.testing.assert_allclose(found.spreads[:, 0], np.array([23 - 2, 13 - 2, 23 - 13]) / np.sqrt(12))


@SPACES
def test_places_from_slices_remove_what_lies_elsewhere(space: LabelSpace) -> None:
    label = body()
    known = Places.of([], [{z: label[z] for z in (2, 5, 13, 17, 23)}], space, False)
    assert known is not None
    truth = torch.from_numpy(body((40, 48, 40), at=(3, 10, 12)).astype(np.int64))
    told = truth.clone()
    told[30:38, 10:18, 12:20] = 2
    assert torch.equal(decided(known.seen_in(says(told, space, sure=0.99), space), space), truth)


def test_organs_are_expected_to_end_half_way_to_the_slice_that_does_not_show_them() -> None:
    label = body()
    found = Places.of([], [{z: label[z] for z in (5, 13, 17, 23)}], CLASSES, False)
    assert found is not None and found.ends is not None
    middle = np.mean([(-1 + 23) / 2, (-3 + 13) / 2, (13 + 23) / 2])  # of how far they can reach; the first slice shows spine and left
    np.testing.assert_allclose(found.ends + middle, [[-np.inf, 20], [-np.inf, 9], [15, 20]])
    assert places().ends is None, "a whole volume says it by its spreads"
    both = Places.of([label], [{z: label[z] for z in (5, 13, 17, 23)}], CLASSES, False)
    assert both is not None and both.ends is None
    inner = Places.of([], [{z: label[z] for z in (13, 15)}], CLASSES, False)
    assert inner is None or inner.ends is None, "no slice says where anything ends"


def test_the_outermost_ends_of_several_scans_count() -> None:
    label = body()
    shown = {z: label[z] for z in (2, 5, 13, 17, 23)}
    farther = {**{z: label[z] for z in (2, 5, 13, 17)}, 27: label[23]}
    one, both = (Places.of([], scans, CLASSES, False) for scans in ([shown], [shown, farther]))
    assert one is not None and both is not None and one.ends is not None and both.ends is not None
    # in the second one spine and right reach by 4 slices farther, and so lie by 2 farther, the mean of all by 4 / 3
    np.testing.assert_allclose(both.ends[0], [one.ends[0, 0] - 4 / 3, one.ends[0, 1] + 2 - 4 / 3])
    partial = {z: np.where(label[z] == 3, 0, label[z]) for z in shown}  # what one scan does not show, its slices say nothing of
    some = Places.of([], [shown, partial], CLASSES, False)
    assert some is not None and some.ends is not None
    np.testing.assert_allclose(some.ends[2], one.ends[2])


@SPACES
def test_what_networks_are_sure_of_beyond_an_end_is_not_there(space: LabelSpace) -> None:
    """They draw right organ and spine on for as far as these reach, as no annotated slice shows them what comes there."""
    label = body()
    slices = [{z: label[z] for z in (2, 5, 8, 11, 14, 17, 20, 23)}]
    known = Places.of([], slices, space, True, (1.0, 1.0))
    assert known is not None and known.ends is not None
    truth = torch.from_numpy(body((60, 48, 40), at=(8, 12, 10)).astype(np.int64))
    told = truth.clone()
    told[24:44] = truth[23]
    probabilities = says(told, space, sure=0.9999)
    found = decided(known.seen_in(probabilities, space), space)
    assert torch.equal(found[:24], truth[:24]) and not found[32:].any()
    without = dataclasses.replace(known, ends=None, factors=(1 / 3, 3.0))
    assert torch.equal(decided(without.seen_in(probabilities, space), space), told)


def test_distances_between_slices_limit_how_far_a_body_is_stretched() -> None:
    """Twice as many slices for the same body, which may be or not."""
    label = body()
    slices = [{z: label[z] for z in (2, 5, 8, 11, 14, 17, 20, 23)}]
    truth = torch.from_numpy(body((40, 48, 40), at=(8, 12, 10), step=2).astype(np.int64))
    probabilities = says(truth, CLASSES, sure=0.9999)
    free, near = (Places.of([], slices, CLASSES, True, distances) for distances in ((1.0, 2.0), (1.0, 1.0)))
    assert free is not None and near is not None and free.factors == (1 / 1.25, 2.5)
    assert torch.equal(decided(free.seen_in(probabilities, CLASSES), CLASSES), truth)
    assert not torch.equal(decided(near.seen_in(probabilities, CLASSES), CLASSES), truth)
    unknown = Places.of([], slices, CLASSES, True)
    assert unknown is not None and unknown.factors == places(stretched=True).factors


def test_places_within_slices_only() -> None:
    """One slice says nothing about the others; within it, it does."""
    label = body()
    known = Places.of([], [{5: label[5]}], CLASSES, True)
    assert known is not None
    truth = torch.from_numpy(np.where(body() == 3, 2, body()).astype(np.int64))
    told = truth.clone()
    told[:, :5, 34:] = 2
    assert torch.equal(decided(known.seen_in(says(told, CLASSES, sure=0.99), CLASSES), CLASSES), truth)


def test_what_says_nothing_about_places() -> None:
    empty, single = np.zeros((3, 4, 4), dtype=np.int16), (body() == 1).astype(np.int16)
    assert Places.of([], [], CLASSES, False) is None and Places.of([empty, single], [], CLASSES, False) is None
    assert np.array_equal(places(CLASSES, body(), single).middles, places().middles)


def test_places_are_kept_with_the_weights() -> None:
    partial = body()
    partial[partial == 3] = 0
    slices = Places.of([], [{z: body()[z] for z in (5, 13, 17, 23)}], CLASSES, True, (0.5, 2.0))
    assert slices is not None
    for known in (places(), places(CLASSES, partial, stretched=True), slices):
        rule = Refinement(ScanLabelsConfig(propagation=0.5), (True,) * 4, 1.0, known)
        stored = rule.to_tensor()
        again = Refinement.from_tensor(stored, CLASSES)
        assert again.places is not None and again.single == rule.single and again.config.propagation == 0.5
        np.testing.assert_allclose(again.places.middles, known.middles, rtol=1e-6)
        np.testing.assert_allclose(again.places.spreads, known.spreads, rtol=1e-6)
        assert again.places.stretched == known.stretched and again.config.turns == rule.config.turns
        assert (again.places.ends is None) == (known.ends is None)
        if known.ends is not None:
            np.testing.assert_allclose(again.places.ends, known.ends, rtol=1e-6)
        np.testing.assert_allclose(again.places.factors, known.factors, rtol=1e-6)
    older = Refinement.from_tensor(Refinement(ScanLabelsConfig(), (True,) * 4, 1.0).to_tensor(), CLASSES)
    assert older.places is None


# ------------------------------------------------------------------ what they do to a scan


@SPACES
@pytest.mark.parametrize("sure", [0.91, 0.9999])
def test_what_lies_where_it_should_stays(space: LabelSpace, sure: float) -> None:
    """The patient lies elsewhere in the image, and is an eighth larger."""
    truth = torch.from_numpy(body(at=(2, 9, 15)).astype(np.int64))
    truth = truth.repeat_interleave(torch.tensor([2, *[1] * 7] * 3), 0).repeat_interleave(torch.tensor([2, *[1] * 7] * 6), 1)
    found = places(space).seen_in(says(truth, space, sure), space)
    assert torch.equal(decided(found, space), truth)


def test_a_left_organ_on_the_right_becomes_a_right_one() -> None:
    """A slice does not say which side of the body it is from: the networks are sure that all are left."""
    truth = torch.from_numpy(body(at=(3, 10, 12)).astype(np.int64))
    told = truth.clone()
    told[truth == 3] = 2
    probabilities = says(told, CLASSES, sure=0.999)
    kept = probabilities.clone()
    found = places().seen_in(probabilities, CLASSES)
    assert torch.equal(probabilities, kept), "the input is left alone"
    assert torch.equal(decided(found, CLASSES), truth)
    torch.testing.assert_close(found.sum(0), torch.ones_like(found[0]))


@SPACES
def test_an_organ_far_from_its_place_is_none(space: LabelSpace) -> None:
    truth = torch.from_numpy(body(at=(4, 28, 10)).astype(np.int64))
    told = truth.clone()
    told[4:20, :6, 32:] = 1
    told[18:22, :6, :6] = 3
    found = places(space).seen_in(says(told, space, sure=0.99), space)
    assert torch.equal(decided(found, space), truth)


def test_slices_may_be_nearer_to_each_other() -> None:
    """Twice as many slices for the same body."""
    truth = torch.from_numpy(body((44, 48, 40), step=2).astype(np.int64))
    told = truth.clone()
    told[truth == 3] = 2
    told[truth == 2] = 3
    told[8:12, 12:20, 10:14] = 2  # a little is right
    told[28:36, 12:20, 10:18] = 3
    probabilities = says(told, CLASSES, sure=0.95)
    assert torch.equal(decided(places(stretched=True).seen_in(probabilities, CLASSES), CLASSES), truth)
    assert not torch.equal(decided(places().seen_in(probabilities, CLASSES), CLASSES), truth)


def test_a_class_without_a_place_stays_where_it_is() -> None:
    partial = body()
    partial[partial == 3] = 0
    told = torch.from_numpy(partial.astype(np.int64))
    told[20:22, 40:46, 34:38] = 3
    told[20:22, :4, 34:38] = 2
    found = decided(places(CLASSES, partial).seen_in(says(told, CLASSES), CLASSES), CLASSES)
    assert torch.equal(found == 3, told == 3) and torch.equal(found == 2, torch.from_numpy(partial == 2))


@SPACES
def test_too_little_to_see(space: LabelSpace) -> None:
    nothing = says(torch.zeros(6, 20, 20, dtype=torch.long), space, sure=0.999)
    one = torch.zeros(6, 20, 20, dtype=torch.long)
    one[2:4, 3:9, 3:9] = 1
    for probabilities in (nothing, says(one, space, sure=0.999)):
        assert torch.equal(places(space, stretched=True).seen_in(probabilities, space), probabilities)


def test_nothing_is_drawn() -> None:
    truth = torch.from_numpy(body().astype(np.int64))
    state = torch.random.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
    first, second = (places(stretched=True).seen_in(says(truth, CLASSES), CLASSES) for _ in range(2))
    assert torch.equal(first, second) and first.dtype == torch.float32
    assert torch.equal(state[0], torch.random.get_rng_state()) and state[1] == np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]


def test_labels_and_logits_keep_to_places() -> None:
    truth = torch.from_numpy(body(at=(3, 10, 12)).astype(np.int64))
    told = torch.where(truth == 3, 2, truth)
    image = truth[None].float()
    for known, expected in ((None, told), (places(stretched=True), truth)):
        rule = Refinement(ScanLabelsConfig(appearance=0.0, smoothing=0.0, largest_piece=False), (True,) * 4, 1.0, known)
        logits = CLASSES.logits(says(told, CLASSES, sure=0.99)[None])[0]
        assert torch.equal(rule.logits(logits, image, CLASSES, True).argmax(0), expected)


def test_a_scan_that_ends_within_the_body() -> None:
    """The left organ is beyond the first slice, the spine's half is there."""
    truth = torch.from_numpy(body(at=(3, 10, 12)).astype(np.int64))[11:]
    told = truth.clone()
    told[:2, 40:46, 30:36] = 1
    for stretched in (False, True):
        found = decided(places(stretched=stretched).seen_in(says(told, CLASSES, sure=0.99), CLASSES), CLASSES)
        assert float((found == truth).float().mean()) > 0.99 and not (found == 1)[:2, 40:46, 30:36].any()
        assert float((found[truth == 1] == 1).float().mean()) > 0.9
