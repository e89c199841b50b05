"""Organs of other sizes beside each other: independent, nowhere folded, as far in millimetres along each axis."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nnunetv2_cmems.config import CMEMSConfig
from nnunetv2_cmems.method.exemplars import AS_ANNOTATED, UNDEFORMED, ExemplarBank
from nnunetv2_cmems.method.organ_sizes import MOST, Organs, SizeChange, draw_sizes, organs_of, organs_of_planes, resized
from nnunetv2_cmems.method.planes import AnnotatedPlane

CPU = torch.device("cpu")


def heart(side: int = 96) -> Tensor:
    """A ring (2) with a cavity (3), and an ellipse (1) beside it."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    label = torch.zeros(side, side, dtype=torch.int64)
    radius = ((y - 48.0) ** 2 + (x - 60) ** 2).sqrt()
    label[((y - 48.0) ** 2 / 256 + (x - 32) ** 2 / 100) < 1] = 1
    label[radius < 16] = 2
    label[radius < 10] = 3
    return label


def places(*shape: int) -> Tensor:
    return torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in shape), indexing="ij"), -1)[None]


def all_by(organs: Organs, factor: float, width: float = 1.0) -> SizeChange:
    count = len(organs.radii)
    return SizeChange(torch.arange(count), torch.full((1, count), factor), torch.full((1, count), width))


def draw(scale: tuple[float, float], count: int = 60) -> tuple[Tensor, Tensor]:
    """Images, which are the labels as grey values, and labels of undeformed crops."""
    torch.manual_seed(0)
    bank = ExemplarBank([heart()[None].float()], [heart()], (96, 96), CPU, organ_scale=scale)
    crops = bank.draw(count, UNDEFORMED, foreground=0.0)
    return crops.images[:, 0], crops.labels


def test_organs_change_their_sizes_each_on_its_own() -> None:
    _, labels = draw((0.5, 2.0))
    sizes = torch.stack([(labels == k).flatten(1).sum(1).float() for k in (1, 2, 3)])
    assert sizes.amin() > 0
    true = torch.stack([(heart() == k).sum() for k in (1, 2, 3)])
    for one, other in ((0, 2), (1, 2)):
        ratios = (sizes[one] / sizes[other] / (true[one] / true[other])).log()
        assert ratios.amin() < -0.5 and ratios.amax() > 0.5


def test_image_and_label_change_alike() -> None:
    images, labels = draw((0.5, 2.0))
    assert (images.round().long() == labels).float().mean() > 0.97  # but for borders between grey values
    assert (labels != heart()).float().mean() > 0.01


def test_organs_keep_their_sizes_where_nothing_else_is_asked_for() -> None:
    images, labels = draw(AS_ANNOTATED)
    assert torch.equal(labels, heart().expand_as(labels))
    assert torch.allclose(images, heart().float().expand_as(images), atol=1e-3)


@pytest.mark.parametrize("factor", CMEMSConfig.__dataclass_fields__["organ_scale"].metadata["range"])
def test_the_image_is_nowhere_folded(factor: float) -> None:
    organs = organs_of(heart())
    assert organs is not None
    for width in (0.8, 1.5):
        y, x = resized(places(96, 96), organs, all_by(organs, factor, width))[0].unbind(-1)
        area = y.diff(dim=0)[:, :-1] * x.diff(dim=1)[:-1] - y.diff(dim=1)[:-1] * x.diff(dim=0)[:, :-1]
        assert area.min() > 0


@pytest.mark.parametrize(("factor", "larger"), [(2.0, True), (0.5, False)])
def test_a_disc_is_enlarged_about_its_middle_and_what_is_far_stays(factor: float, larger: bool) -> None:
    disc = ((places(64, 64)[0] - torch.tensor([20.0, 30.0])) ** 2).sum(-1) < 64
    organs = organs_of(disc.long())
    assert organs is not None
    assert organs.middles.tolist() == [[20.0, 30.0]]
    assert organs.radii.tolist() == pytest.approx([8.0], abs=0.2)
    read = resized(places(64, 64), organs, all_by(organs, factor))[0]
    y, x = read.round().long().unbind(-1)
    changed = disc[y, x]
    assert (changed.sum() > 1.3 * disc.sum()) if larger else (changed.sum() < disc.sum() / 1.3)
    assert changed.nonzero().float().mean(0).tolist() == pytest.approx([20.0, 30.0], abs=0.5)
    assert torch.allclose(read[55:, 50:], places(64, 64)[0, 55:, 50:], atol=0.05)


def test_in_thick_slices_the_change_reaches_as_many_millimetres_along_each_axis() -> None:
    label = torch.zeros(9, 41, 41, dtype=torch.int64)
    label[3:6, 14:27, 14:27] = 1
    organs = organs_of(label, (5.0, 1.0, 1.0))
    assert organs is not None
    start = places(9, 41, 41)
    moved = resized(start, organs, all_by(organs, 2.0))[0] - start[0]
    assert 5 * float(moved[6, 20, 20, 0]) == pytest.approx(float(moved[4, 30, 20, 1]), rel=1e-3)  # 10 mm from the middle
    assert float(moved[4, 30, 20, 1]) < -0.5


def test_pieces_of_a_class_are_organs_of_their_own_and_specks_are_none() -> None:
    label = torch.zeros(60, 60, dtype=torch.int64)
    label[5:15, 5:15] = label[40:52, 40:52] = 1
    label[30, 30] = 1
    label[50:, :9] = -1
    organs = organs_of(label)
    assert organs is not None
    assert sorted(organs.middles.tolist()) == [[9.5, 9.5], [45.5, 45.5]]
    assert organs_of(torch.zeros(4, 4, dtype=torch.int64)) is None


def test_no_more_than_so_many_organs_change_at_a_time() -> None:
    organs = Organs(torch.rand(30, 3), torch.ones(30), torch.ones(3))
    change = draw_sizes(2, organs, (0.5, 2.0))
    assert change.factors.shape == (2, MOST)
    assert len(change.organs.unique()) == MOST
    assert 0.5 <= float(change.factors.min()) and float(change.factors.max()) <= 2.0


def test_organs_of_planes_lie_on_them() -> None:
    label = torch.zeros(20, 40, dtype=torch.int64)
    label[4:10, 10:16] = 1
    planes = [AnnotatedPlane(0, 7.25, label, (2.0, 1.0)), AnnotatedPlane(2, 3.0, torch.zeros(5, 5, dtype=torch.int64), (1.0, 1.0))]
    organs = organs_of_planes(planes, (3.0, 1.0, 2.0))
    assert organs is not None
    assert organs.middles.tolist() == [[7.25, 13.5, 12.5]]
    assert organs.sides.tolist() == [3.0, 1.0, 2.0]
    assert organs.radii.tolist() == pytest.approx([(36 * 2 * 2 / torch.pi) ** 0.5])  # 36 pixels of 2 x 2 mm
    assert organs_of_planes(planes[1:]) is None


def test_slices_of_a_volume_change_sizes_in_a_crop() -> None:
    torch.manual_seed(1)
    plane = AnnotatedPlane(0, 4.0, heart(), (1.0, 1.0))
    image = torch.zeros(1, 9, 96, 96)
    known = {}
    for scale in (AS_ANNOTATED, (0.5, 2.0)):
        bank = ExemplarBank([image], [[plane]], (5, 96, 96), CPU, organ_scale=scale)
        crops = bank.draw(8, UNDEFORMED, foreground=1.0)
        assert crops.known is not None
        assert (crops.known.sum(1) <= 1).all()  # one voxel thick
        known[scale] = [(crops.labels[i] == 3).sum() for i in range(8)]
    assert len(set(map(int, known[AS_ANNOTATED]))) == 1
    assert min(known[0.5, 2.0]) < known[AS_ANNOTATED][0] < max(known[0.5, 2.0])
