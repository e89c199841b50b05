"""What the heads mean: classes and regions, with values worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nnunetv2_cmems.method.label_space import Classes, LabelSpace, Regions

DIMENSIONS = pytest.mark.parametrize("d", [2, 3])
CLASSES = Classes(("wall", "cavity"))
REGIONS = Regions(("heart", "left", "cavity"), None, ((1, 2, 3), (1, 2), (2,)))
LABELS = [0, 1, 2, 3, -1]  # the last pixel is unknown


def row(values: list[float], d: int) -> Tensor:
    """(1, ..., n)."""
    return torch.tensor(values).reshape(1, *[1] * (d - 1), len(values))


def heads(rows: list[list[float]], d: int) -> Tensor:
    """(1, heads, ..., n) from one list a head."""
    return torch.cat([row(values, d)[:, None] for values in rows], 1)


@DIMENSIONS
def test_targets(d: int) -> None:
    assert torch.equal(CLASSES.target(row([0, 1, 2, -1], d)), row([0, 1, 2, 0], d))
    target = REGIONS.target(row(LABELS, d))
    assert target.dtype == torch.bool
    assert torch.equal(target, heads([[0, 1, 1, 1, 0], [0, 1, 1, 0, 0], [0, 0, 1, 0, 0]], d).bool())


@DIMENSIONS
@pytest.mark.parametrize("space", [CLASSES, REGIONS])
def test_probabilities_are_of_single_precision(space: LabelSpace, d: int) -> None:
    logits = torch.randn(2, 3, *[4] * d)
    expected = logits.softmax(1) if space is CLASSES else logits.sigmoid()
    assert torch.equal(space.probabilities(logits), expected)
    assert space.probabilities(logits.half()).dtype == torch.float32


@DIMENSIONS
def test_classes_are_decided_by_the_largest(d: int) -> None:
    decided = CLASSES.decide(heads([[0.9, 0.2, 0.4], [0.05, 0.75, 0.35], [0.05, 0.05, 0.25]], d), 0.75)
    assert torch.equal(decided.labels, row([0, 1, 0], d))
    assert torch.equal(decided.confident, row([True, True, False], d))


@DIMENSIONS
def test_each_region_is_decided_on_its_own(d: int) -> None:
    decided = REGIONS.decide(heads([[0.9, 0.75, 0.6], [0.9, 0.25, 0.1], [0.3, 0.7, 0.5]], d), 0.75)
    assert torch.equal(decided.labels, heads([[1, 1, 1], [1, 0, 0], [0, 1, 0]], d).bool())
    assert torch.equal(decided.confident, heads([[1, 1, 0], [1, 1, 1], [0, 0, 0]], d).bool())


@DIMENSIONS
def test_masks_follow_the_names(d: int) -> None:
    masks = list(CLASSES.masks(row([0, 1, 2, 2], d)))
    assert [mask.flatten().int().tolist() for mask in masks] == [[0, 1, 0, 0], [0, 0, 1, 1]]
    masks = list(REGIONS.masks(REGIONS.target(row(LABELS, d))))
    assert [mask.flatten().int().tolist() for mask in masks] == [[0, 1, 1, 1, 0], [0, 1, 1, 0, 0], [0, 0, 1, 0, 0]]
    for space, labels in ((CLASSES, row([0, 1, 2], d)), (REGIONS, REGIONS.target(row(LABELS, d)))):
        assert all(mask.dtype == torch.bool and mask.shape == labels.shape[:1] + labels.shape[-d:] for mask in space.masks(labels))


def test_weights() -> None:
    """Shares 0.6, 0.3 and 0.1 of the known pixels; a region is weighed against its own outside."""
    labels = [torch.tensor([[0, 0, 1], [-1, 0, 0]]), torch.tensor([0, 0, 1, 1, 2, -1, -1])]
    assert CLASSES.weights(labels, 1.0).tolist() == pytest.approx([1 / 1.8, 1 / 0.9, 1 / 0.3])
    space = Regions(("all", "small", "never"), None, ((1, 2), (2,), (3,)))
    weights = space.weights(labels, 1.0)
    assert weights.shape == (3, 2)
    expected = [0.5 / 0.6, 0.5 / 0.4, 0.5 / 0.9, 0.5 / 0.1, 1.0, 1.0]  # what is never shown weighs like what is
    assert weights.flatten().tolist() == pytest.approx(expected)
    assert torch.equal(space.weights(labels, 0.0), torch.ones(3, 2))


@DIMENSIONS
def test_certain_probabilities_decide_for_the_same_labels(d: int) -> None:
    for space, labels in ((CLASSES, row([0, 1, 2, 1], d).to(torch.int8)), (REGIONS, REGIONS.target(row(LABELS, d)).to(torch.int8))):
        probabilities = space.certain(labels)
        assert probabilities.shape == (1, 3, *labels.shape[-d:]) and set(probabilities.unique().tolist()) == {0.0, 1.0}
        decided = space.decide(probabilities, 1.0)
        assert torch.equal(decided.labels.to(torch.int8), labels) and decided.confident.all()


@DIMENSIONS
@pytest.mark.parametrize("space", [CLASSES, REGIONS])
def test_logits_of_probabilities(space: LabelSpace, d: int) -> None:
    probabilities = space.probabilities(torch.randn(2, 3, *[4] * d))
    torch.testing.assert_close(space.probabilities(space.logits(probabilities)), probabilities)
    certain = space.certain(space.decide(probabilities, 0.0).labels)
    extreme = space.logits(certain).half()
    assert torch.isfinite(extreme).all() and torch.equal(space.decide(space.probabilities(extreme), 0.0).labels, certain.argmax(1)
                                                         if space is CLASSES else certain.bool())  # fmt: skip


@DIMENSIONS
def test_logits_that_decide_otherwise(d: int) -> None:
    logits = heads([[1.0, -2.0, 3.0], [2.0, 5.0, 0.0], [-1.0, 0.0, 1.0]], d)
    removed = row([0, 1, 0], d).bool()
    background = torch.zeros_like(removed, dtype=torch.int8)
    assert torch.equal(CLASSES.deciding(logits, background, removed), heads([[1.0, 5.0, 3.0], [2.0, -2.0, 0.0], [-1.0, -2.0, 1.0]], d))
    one = heads([[0, 0, 0], [0, 1, 0], [0, 0, 1]], d).bool()
    assert torch.equal(REGIONS.deciding(logits, one & False, one), heads([[1.0, -2.0, 3.0], [2.0, -5.0, 0.0], [-1.0, 0.0, -1.0]], d))
    second = torch.where(removed, 2, CLASSES.decide(CLASSES.probabilities(logits), 0.0).labels)
    decided = CLASSES.deciding(logits, second, removed)
    assert torch.equal(decided, heads([[1.0, -2.0, 3.0], [2.0, -2.0, 0.0], [-1.0, 5.0, 1.0]], d))
    inside = REGIONS.deciding(logits, heads([[1, 1, 1]] * 3, d), heads([[1, 1, 0]] * 3, d).bool())
    assert torch.equal(inside, heads([[1.0, 2.0, 3.0], [2.0, 5.0, 0.0], [1.0, 0.0, 1.0]], d))
