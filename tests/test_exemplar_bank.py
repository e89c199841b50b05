"""Crops of the exemplars: exact where undeformed, inside the image, on the organs when asked."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from nnunetv2_cmems.config import SpatialConfig
from nnunetv2_cmems.method.exemplars import UNDEFORMED, ExemplarBank, organ_groups, shows_every_class

DIMENSIONS = pytest.mark.parametrize("d", [2, 3])
CPU = torch.device("cpu")
@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)


def numbered(size: int, d: int) -> Tensor:
    return torch.arange(1, size**d + 1, dtype=torch.float32).reshape(1, *[size] * d)


def label_with(d: int, size: int, **boxes: tuple[int, int]) -> Tensor:
    """``c2=(3, 6)``: class 2 at [3, 6) along every axis."""
    label = torch.zeros([size] * d, dtype=torch.long)
    for name, (first, last) in boxes.items():
        label[tuple([slice(first, last)] * d)] = int(name[1:])
    return label


def bank(image: Tensor, label: Tensor, patch: int) -> ExemplarBank:
    return ExemplarBank([image], [label], [patch] * label.ndim, CPU)


# crops


@DIMENSIONS
@pytest.mark.parametrize("patch", [5, 6])
def test_undeformed_crops_are_windows_of_the_exemplar(d: int, patch: int) -> None:
    """Voxel by voxel: a crop between the voxels would blur the image and tear the label."""
    image, label = numbered(11, d), label_with(d, 11, c1=(2, 8), c2=(4, 7))
    crops = bank(image, label, patch).draw(12, UNDEFORMED, 1.0)
    corners = set()
    for crop, its_label, group in zip(crops.images, crops.labels, crops.groups):
        number = round(float(crop.flatten()[0])) - 1
        corner = [min(number // 11 ** (d - 1 - axis) % 11, 11 - patch) for axis in range(d)]
        window = tuple(slice(c, c + patch) for c in corner)
        torch.testing.assert_close(crop[0], image[(0, *window)], rtol=0, atol=0.01)
        assert torch.equal(its_label, label[window])
        assert torch.equal(group, (label[window] > 0).long())
        corners.add(tuple(corner))
    assert len(corners) > 3, "the crops do not vary"


@DIMENSIONS
@pytest.mark.parametrize("patch", [5, 6])
@pytest.mark.parametrize("foreground", [0.0, 0.5, 1.0])
def test_crops_stay_inside_the_exemplar(d: int, patch: int, foreground: float) -> None:
    image, label = torch.ones(2, *[9] * d), label_with(d, 9, c1=(0, 1), c2=(8, 9))
    crops = bank(image, label, patch).draw(16, UNDEFORMED, foreground)
    assert crops.images.shape == crops.backgrounds.shape == (16, 2, *[patch] * d)
    assert crops.labels.shape == crops.groups.shape == (16, *[patch] * d)
    torch.testing.assert_close(crops.images, torch.ones_like(crops.images))


@DIMENSIONS
@pytest.mark.parametrize(
    ("patch", "place"), [(3, 0), (3, 3), (3, 4), (3, 10), (4, 0), (4, 3), (4, 4), (4, 10), (5, 3)]
)
def test_crops_on_the_foreground_always_show_it(d: int, patch: int, place: int) -> None:
    label = label_with(d, 11, c1=(place, place + 1))  # a single voxel
    crops = bank(torch.randn(1, *[11] * d), label, patch).draw(8, UNDEFORMED, 1.0)
    assert (crops.labels == 1).flatten(1).any(1).all()


def test_crops_anywhere_cover_the_whole_exemplar() -> None:
    image = numbered(12, 2)
    crops = bank(image, label_with(2, 12, c1=(0, 6)), 5).draw(300, UNDEFORMED, 0.0)
    assert crops.images.min() < 15 and crops.images.max() > 130
    assert 0.4 < (crops.labels > 0).flatten(1).any(1).float().mean() < 0.8


@DIMENSIONS
def test_classes_are_centred_on_equally_often(d: int) -> None:
    label = label_with(d, 15, c1=(2, 10), c3=(11, 12))  # a large class and a single voxel
    crops = bank(torch.zeros(1, *[15] * d), label, 5).draw(200, UNDEFORMED, 1.0)
    middle = crops.labels[(slice(None), *[2] * d)]
    assert 0.35 < (middle == 3).float().mean() < 0.65


@DIMENSIONS
@pytest.mark.parametrize(("size", "patch"), [(5, 9), (6, 10)])
def test_patch_larger_than_the_exemplar(d: int, size: int, patch: int) -> None:
    image, label = numbered(size, d), label_with(d, size, c1=(1, 3))
    crops = bank(image, label, patch).draw(3, UNDEFORMED, 0.5)
    padding = [(patch - size) // 2] * (2 * d)
    for crop, its_label in zip(crops.images, crops.labels):
        torch.testing.assert_close(crop, torch.nn.functional.pad(image, padding), rtol=0, atol=0.01)
        assert torch.equal(its_label, torch.nn.functional.pad(label, padding))


@DIMENSIONS
def test_exemplars_of_different_sizes_keep_their_own_labels(d: int) -> None:
    images = [torch.full((1, *[n] * d), float(value)) for n, value in ((7, 1), (9, 2), (3, 3))]
    labels = [label_with(d, n, **{f"c{value}": (2, 4)}) for n, value in ((7, 1), (9, 2), (3, 3))]
    crops = ExemplarBank(images, labels, [5] * d, CPU).draw(40, UNDEFORMED, 1.0)
    seen = set()
    for image, label in zip(crops.images, crops.labels):
        (number,) = set(image.unique().round().tolist()) - {0.0}
        assert set(label.unique().tolist()) - {0} == {int(number)}
        seen.add(number)
    assert seen == {1.0, 2.0, 3.0}


@DIMENSIONS
def test_placed_crops_lie_at_their_offset_from_the_middle(d: int) -> None:
    image, label = numbered(12, d), label_with(d, 12, c1=(3, 6))
    offsets = torch.tensor([[0.0, 0.0, 0.0], [-2.0, 1.0, 2.0], [1.0, 0.0, -1.0]])[:, :d]
    crops = bank(image, label, 6).draw(3, UNDEFORMED, 1.0, offsets=offsets, placed=torch.tensor([True, True, False]))
    for i in (0, 1):
        window = tuple(slice(3 + int(o), 9 + int(o)) for o in offsets[i])
        torch.testing.assert_close(crops.images[i, 0], image[(0, *window)], rtol=0, atol=0.01)
        assert torch.equal(crops.labels[i], label[window])
    others = bank(image, label, 6).draw(30, UNDEFORMED, 1.0, offsets=offsets[:1].expand(30, d), placed=torch.zeros(30, dtype=torch.bool))
    assert len({float(crop.mean()) for crop in others.images}) > 3, "crops that are not placed vary"


@DIMENSIONS
def test_image_label_and_background_are_deformed_alike(d: int) -> None:
    label = label_with(d, 16, c1=(5, 11))
    image = label[None] * 10.0
    crops = bank(image, label, 12).draw(6, SpatialConfig(), 1.0)
    shown = crops.images[:, 0]
    assert (crops.labels[shown > 9.99] == 1).all() and (crops.labels[shown < 0.01] == 0).all()
    assert torch.equal(crops.groups, crops.labels)
    assert not torch.equal(crops.labels[0], crops.labels[1])


@DIMENSIONS
def test_backgrounds_show_no_organ_and_else_the_image(d: int) -> None:
    image = torch.randn(1, *[17] * d)
    label = label_with(d, 17, c1=(6, 9))
    crops = bank(image + 50.0 * label, label, 17).draw(2, UNDEFORMED, 1.0)
    assert crops.images.max() > 40 and crops.backgrounds.abs().max() < 10
    far = ~torch.zeros([17] * d, dtype=torch.bool)
    far[tuple([slice(3, 12)] * d)] = False
    torch.testing.assert_close(crops.backgrounds[0, 0][far], image[0][far], rtol=0, atol=1e-3)


def test_the_bank_does_not_write_into_what_it_is_given() -> None:
    image, label = torch.randn(1, 9, 9), label_with(2, 9, c1=(3, 6))
    before = image.clone(), label.clone()
    bank(image, label, 5).draw(4, SpatialConfig(), 0.5)
    assert torch.equal(image, before[0]) and torch.equal(label, before[1])


# groups of organs


@DIMENSIONS
@pytest.mark.parametrize(
    ("second", "expected"),
    [((4, 6), 1), ((5, 7), 1), ((9, 11), 2)],  # touching at a corner; a narrow gap; apart
)
def test_organs_that_touch_are_one_group(d: int, second: tuple[int, int], expected: int) -> None:
    label = label_with(d, 12, c1=(1, 4))
    label[(slice(1, 4),) * (d - 1) + (slice(*second),)] = 2
    groups = organ_groups(label)
    assert torch.equal(groups > 0, label > 0)
    assert int(groups.max()) == expected


def test_groups_are_numbered_by_size_whatever_the_class() -> None:
    label = label_with(2, 20, c3=(0, 2), c1=(6, 12), c2=(16, 19))
    groups = organ_groups(label)
    assert [int(groups[place, place]) for place in (0, 7, 17)] == [3, 1, 2]


def test_one_class_in_two_places_is_two_groups() -> None:
    assert int(organ_groups(label_with(2, 12, c1=(0, 3)) + label_with(2, 12, c1=(8, 10))).max()) == 2


def test_at_most_sixteen_groups_are_told_apart() -> None:
    label = torch.zeros(80, 80, dtype=torch.long)
    label[::8, ::8] = 1  # a hundred dots
    label[0, :2] = 1
    groups = organ_groups(label)
    assert int(groups[0, 0]) == 1 and sorted(groups.unique().tolist()) == list(range(17))
    assert int((groups == 16).sum()) == 85


def test_no_foreground_is_no_group() -> None:
    assert not organ_groups(torch.zeros(4, 4, dtype=torch.long)).any()


def test_number_of_groups_is_the_largest_of_all_exemplars() -> None:
    labels = [label_with(2, 12, c1=(0, 3)), label_with(2, 12, c1=(0, 3), c2=(8, 11))]
    crops = ExemplarBank([torch.zeros(1, 12, 12)] * 2, labels, (5, 5), CPU).draw(2, UNDEFORMED, 1.0)
    assert crops.num_groups == 2


# several exemplars


@DIMENSIONS
def test_every_class_has_its_turn_however_few_exemplars_show_it(d: int) -> None:
    """Nine exemplars show class 1, one shows class 2; half of the crops that are to show something are of that one."""
    labels = [label_with(d, 8, c1=(2, 5))] * 9 + [label_with(d, 8, c2=(2, 5))]
    many = ExemplarBank([torch.zeros(1, *[8] * d)] * 10, labels, [8] * d, CPU)
    shown = many.draw(400, UNDEFORMED, 1.0).labels.flatten(1).amax(1)
    assert 0.4 < float((shown == 2).float().mean()) < 0.6
    anywhere = many.draw(400, UNDEFORMED, 0.0).labels.flatten(1).amax(1)
    assert 0.04 < float((anywhere == 2).float().mean()) < 0.18


@DIMENSIONS
def test_exemplar_without_organs_is_shown_but_not_cut_from(d: int) -> None:
    labels = [label_with(d, 8, c1=(2, 5)), torch.zeros([8] * d, dtype=torch.long)]
    both = ExemplarBank([torch.zeros(1, *[8] * d), torch.ones(1, *[8] * d)], labels, [6] * d, CPU)
    crops = both.draw(60, UNDEFORMED, 0.5)
    empty = crops.images.flatten(1).amin(1) == 1
    assert 0.1 < float(empty.float().mean()) < 0.45  # half of those that may be anything
    assert not crops.labels[empty].any() and crops.known is None
    assert not (both.draw(40, UNDEFORMED, 1.0).images == 1).any()
    assert not (both.draw(40, UNDEFORMED, 0.0, whole=True).images == 1).any()


# exemplars that lack a class


def test_what_shows_every_class() -> None:
    assert shows_every_class([[1, 2], [2], [1, 2], []]) == [True, False, True, False]
    assert shows_every_class([[1], [2]]) == [False, False]
    assert shows_every_class([[], []]) == [True, True]


def test_organs_are_cut_from_exemplars_that_show_every_class() -> None:
    labels = [label_with(2, 12, c1=(2, 5)), label_with(2, 12, c1=(2, 8), c2=(5, 8))]
    images = [torch.full((1, 12, 12), float(i)) for i in range(2)]

    def drawn(complete_only: bool, *, whole: bool = True) -> set[float]:
        bank = ExemplarBank(images, labels, [12, 12], CPU, complete_only=complete_only)
        return set(bank.draw(40, UNDEFORMED, 1.0, whole=whole).images.mean((1, 2, 3)).tolist())

    assert drawn(True) == {1.0} and drawn(False) == {0.0, 1.0}
    assert drawn(True, whole=False) == {0.0, 1.0}, "as exemplars all of them serve"
