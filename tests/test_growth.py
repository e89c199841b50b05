"""Organs that were drawn too small reach on to the next edge, and only there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nnunetv2_cmems.method import growth
from nnunetv2_cmems.method.growth import borders_on_background, ends_at_edges, grow
from nnunetv2_cmems.method.label_space import Classes, Regions

CLASSES = Classes(("chamber", "neighbour"))
REGIONS = Regions(("both", "chamber"), None, ((1, 2), (1,)))
PLANAR = pytest.mark.parametrize("planar", [True, False], ids=["planar", "in space"])
SHAPE = (3, 40, 44)
ALL = (True, True)


def block(*sides: slice, label: int = 1) -> Tensor:
    labels = torch.zeros(SHAPE, dtype=torch.int8)
    labels[(slice(None), *sides)] = label
    return labels


def scan(truth: Tensor, contrast: float = 1.0, noise: float = 0.1) -> Tensor:
    """(1, Z, Y, X): whatever is inside is bright."""
    return contrast * (truth > 0).float()[None] + noise * torch.randn((1, *truth.shape), generator=torch.Generator().manual_seed(0))


TRUTH = block(slice(10, 26), slice(12, 32))
HALF = block(slice(10, 26), slice(12, 24))
"""The right part of the chamber is missing, and no edge is there."""


def dice(a: Tensor, b: Tensor) -> float:
    return float(2 * ((a > 0) & (b > 0)).sum() / ((a > 0).sum() + (b > 0).sum()))


@PLANAR
def test_what_is_missing_up_to_the_edge_is_filled(planar: bool) -> None:
    found = grow(HALF, scan(TRUTH), 12, ALL, CLASSES, planar)
    assert found.dtype == HALF.dtype and found.shape == HALF.shape
    assert dice(HALF, TRUTH) < 0.76 and dice(found, TRUTH) > 0.95
    assert (found[HALF > 0] == 1).all() and (found[:, :, 34:] == 0).all()


@PLANAR
def test_where_the_border_is_right_nothing_grows(planar: bool) -> None:
    assert torch.equal(grow(TRUTH, scan(TRUTH), 12, ALL, CLASSES, planar), TRUTH)


@PLANAR
def test_large_scans_are_coarser(monkeypatch: pytest.MonkeyPatch, planar: bool) -> None:
    truth, half = (torch.cat([labels] * 4) for labels in (TRUTH, HALF))
    seen: list[int] = []
    walk = growth.random_walker
    monkeypatch.setattr(growth, "random_walker", lambda image, *rest, **more: (seen.append(image[0].size), walk(image, *rest, **more))[1])
    monkeypatch.setattr(growth, "MOST_VOXELS", most := 400 if planar else 2500)
    found = grow(half, scan(truth), 12, ALL, CLASSES, planar)
    assert dice(found, truth) > 0.9 and (found[half > 0] == 1).all()
    assert len(seen) == (12 if planar else 1) and 0 < max(seen) < 1.7 * most, "sides are rounded up"


def test_without_an_edge_farther_out_nothing_grows() -> None:
    assert torch.equal(grow(HALF, scan(TRUTH, contrast=0.0), 12, ALL, CLASSES, True), HALF)


def test_no_farther_than_the_reach() -> None:
    """The true edge is 8 voxels away."""
    short, far = (grow(HALF, scan(TRUTH), reach, ALL, CLASSES, True) for reach in (3, 12))
    assert (short[:, :, 27:] == 0).all() and short.sum() < far.sum() and (far[:, 12:24, 30] == 1).all()
    assert torch.equal(grow(HALF, scan(TRUTH), 0, ALL, CLASSES, True), HALF)


def test_a_neighbour_keeps_what_it_has_and_each_grows_on_its_own_side() -> None:
    neighbour = block(slice(10, 26), slice(24, 28), label=2)
    truth = TRUTH | block(slice(10, 26), slice(2, 12))  # both are too small
    found = grow(HALF + neighbour, scan(truth), 14, ALL, CLASSES, True)
    assert (found[:, 11:25, 3:11] == 1).all() and (found[:, 11:25, 29:31] == 2).all()
    assert torch.equal(found[:, 10:26, 12:28], (HALF + neighbour)[:, 10:26, 12:28])


def test_what_lies_within_organs_does_not_grow() -> None:
    exemplar = block(slice(8, 30), slice(8, 30), label=2)[0] + block(slice(12, 26), slice(12, 26), label=-1)[0]  # 1 within 2
    assert borders_on_background([exemplar.numpy()], CLASSES) == (False, True)
    assert borders_on_background([exemplar.numpy(), HALF[0].numpy()], CLASSES) == (True, True), "another slice shows it otherwise"
    unknown = torch.where(exemplar == 0, -1, exemplar)
    assert borders_on_background([unknown.numpy()], CLASSES) == (False, False), "the border that is seen counts"
    assert borders_on_background([HALF.numpy()], CLASSES) == (True, True), "2 is not shown"
    assert borders_on_background([exemplar.numpy()], REGIONS) == (True, False)
    assert torch.equal(grow(HALF, scan(TRUTH), 12, (False, True), CLASSES, True), HALF)
    found = grow(torch.stack([HALF, HALF]), scan(TRUTH), 12, (True, False), REGIONS, True)
    assert dice(found[0], TRUTH) > 0.95 and torch.equal(found[1], HALF)


@PLANAR
def test_the_annotation_tells_where_edges_can_be_trusted(planar: bool) -> None:
    """An organ that would grow beyond its annotated border, into what looks alike, does not grow in scans."""
    bright, alike = scan(TRUTH), scan(TRUTH | block(slice(26, 40), slice(12, 32)))
    assert ends_at_edges([(bright, TRUTH)], 12, ALL, CLASSES, planar) == ALL, "and what is not shown may"
    assert ends_at_edges([(bright, HALF)], 12, ALL, CLASSES, planar) == (False, True)
    assert ends_at_edges([(bright, TRUTH)] * 9 + [(bright, HALF)], 12, ALL, CLASSES, planar) == ALL, "all images count together"
    assert ends_at_edges([(bright, TRUTH)], 12, (False, True), CLASSES, planar) == (False, True), "what may not grow still may not"
    unknown = torch.where(TRUTH > HALF, -1, HALF)
    assert ends_at_edges([(bright, unknown)], 12, ALL, CLASSES, planar) == ALL, "what is not annotated is no mistake"
    assert ends_at_edges([], 12, ALL, CLASSES, planar) == ALL
    assert ends_at_edges([(alike, TRUTH)], 14, ALL, REGIONS, planar) == (False, False)
    assert ends_at_edges([(bright, TRUTH)], 12, ALL, REGIONS, planar) == ALL


def test_slices_on_their_own_or_as_a_volume() -> None:
    """An organ that is not labelled in a slice grows there from the next one, in space only."""
    labels = HALF.clone()
    labels[2] = 0
    assert (grow(labels, scan(TRUTH), 12, ALL, CLASSES, True)[2] == 0).all()
    deep = torch.cat([TRUTH] * 3), torch.cat([HALF, HALF, HALF * 0])
    assert (grow(deep[1], scan(deep[0]), 12, ALL, CLASSES, False)[6, 14:22, 16:28] == 1).all()


def test_regions_grow_each_on_its_own() -> None:
    labels = REGIONS.target((HALF + block(slice(10, 26), slice(24, 28), label=2))[None])[0].to(torch.int8)
    found = grow(labels, scan(TRUTH), 12, ALL, REGIONS, True)
    assert found.shape == labels.shape and found.dtype == labels.dtype
    assert all(dice(region, TRUTH) > 0.95 for region in found), "the inner one also over the other region"


def test_an_edge_in_any_channel_counts() -> None:
    image = torch.cat([scan(TRUTH, contrast=0.0), scan(TRUTH)])
    assert dice(grow(HALF, image, 12, ALL, CLASSES, True), TRUTH) > 0.9


@PLANAR
@pytest.mark.parametrize(
    "labels", [HALF * 0, block(slice(10, 11), slice(12, 30)), block(slice(None), slice(None))], ids=["none", "too thin", "everywhere"]
)
def test_nothing_to_grow_from_or_into(labels: Tensor, planar: bool) -> None:
    before = labels.clone()
    assert torch.equal(grow(labels, scan(TRUTH), 12, ALL, CLASSES, planar), before) and torch.equal(labels, before)


def test_a_flat_image_and_no_random_numbers() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert torch.equal(grow(HALF, torch.zeros(1, *SHAPE), 12, ALL, CLASSES, True), HALF)
    once, again = (grow(HALF, scan(TRUTH), 12, ALL, CLASSES, True) for _ in range(2))
    assert torch.equal(once, again) and torch.equal(state, torch.get_rng_state())


def test_what_lies_between_organs_does_not_grow() -> None:
    """A wall: most of its border is against what it lies between, about two fifths against the background."""
    wall = block(slice(8, 30), slice(8, 30), label=2)[0] + block(slice(12, 26), slice(12, 26), label=-1)[0]
    wall = torch.where(block(slice(8, 30), slice(4, 8))[0] == 1, 1, wall)
    assert borders_on_background([wall.numpy()], CLASSES)[1] is False
