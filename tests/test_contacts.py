"""What never touches in the annotated slices is not both there where it touches in a scan."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from test_outlines import CLASSES, REGIONS, disc, heart, scan
from torch import Tensor

from nnunetv2_cmems.config import ScanLabelsConfig
from nnunetv2_cmems.method.contacts import Contacts
from nnunetv2_cmems.method.label_space import Classes, LabelSpace
from nnunetv2_cmems.method.outlines import Outlines
from nnunetv2_cmems.method.refinement import Refinement, alike_apart, refine

RIGHT = heart(8, 13)  # cavity (1) within a wall (2), a crescent (3) beside it
OPEN_CAVITY = torch.where((RIGHT == 2) & (torch.arange(72) > 38), 0, RIGHT)  # half of the wall is missing
NO_WALL_BETWEEN = torch.where((RIGHT == 2) & (torch.arange(72) < 32), 3, RIGHT)
UNCONFIGURED = ScanLabelsConfig(propagation=0.0, appearance=0.0, smoothing=0.0, growth=0.0, largest_piece=False)


def known(*labels: Tensor, space: LabelSpace = CLASSES) -> Contacts:
    found = Contacts.of([label.numpy() for label in labels or (RIGHT,)], space)
    assert found is not None
    return found


def slices(contacts: Contacts, *drawn: Tensor) -> list[list[int]]:
    """The classes that each slice still shows."""
    labels = torch.stack(drawn)
    before = labels.clone()
    kept = contacts.kept(labels)
    assert torch.equal(labels, before) and kept.dtype == labels.dtype
    assert torch.equal(kept[kept > 0], labels[kept > 0]), "classes only go"
    return [np.unique(part[part > 0]).tolist() for part in kept]


def test_what_the_annotated_slices_show() -> None:
    """The wall touches both others and the background, the cavity touches the wall alone."""
    assert known() == Contacts(((False, False, True), (False, False, False), (True, False, False)), (True, False, False))


def test_a_slip_of_the_brush_is_no_contact() -> None:
    slip = RIGHT.clone()
    slip[30, 24:31] = 1  # of the cavity, through the wall, into the crescent
    assert known(slip).apart[0][2] is False, "seven voxels touch"
    slip = RIGHT.clone()
    slip[18, 38] = 1  # one voxel of cavity at the wall's outer border
    assert known(slip).enclosed[0] is False, "three of its fifty sides are open"
    assert known(*[RIGHT] * 9, slip) == known(), "in ten slices that is a slip"


def test_what_is_never_shown_together_may_touch() -> None:
    only = [torch.where(RIGHT == kept, RIGHT, 0) for kept in (1, 3)]
    assert Contacts.of([label.numpy() for label in only], CLASSES) is None
    assert Contacts.of([], CLASSES) is None
    unknown = torch.where((RIGHT == 2) & (torch.arange(72) > 38), -1, RIGHT)  # not annotated, so not open either
    assert known(unknown).enclosed == (True, False, False)


def test_regions_have_no_contacts() -> None:
    assert Contacts.of([RIGHT.numpy()], REGIONS) is None


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        ([RIGHT, RIGHT], [[1, 2, 3], [1, 2, 3]]),
        ([NO_WALL_BETWEEN, RIGHT, RIGHT], [[1, 2], [1, 2, 3], [1, 2, 3]]),
        ([RIGHT, NO_WALL_BETWEEN, NO_WALL_BETWEEN], [[1, 2, 3], [1, 2], [1, 2]]),
        ([RIGHT, NO_WALL_BETWEEN, RIGHT], [[1, 2, 3]] * 3),
        ([NO_WALL_BETWEEN, NO_WALL_BETWEEN], [[1, 2, 3]] * 2),
        ([torch.zeros_like(RIGHT), NO_WALL_BETWEEN, RIGHT], [[], [1, 2], [1, 2, 3]]),
        ([OPEN_CAVITY, RIGHT, OPEN_CAVITY], [[2, 3], [1, 2, 3], [2, 3]]),
        ([RIGHT, OPEN_CAVITY, RIGHT], [[1, 2, 3]] * 3),
        ([torch.zeros_like(RIGHT)] * 2, [[], []]),
    ],
    ids=["right", "first", "two last", "in their midst", "all", "beyond nothing", "open at both ends", "open in their midst", "nothing"],
)
def test_slices_at_the_ends_lose_what_cannot_be_there(drawn: list[Tensor], expected: list[list[int]]) -> None:
    """The crescent, which is free, gives way; the cavity where it is not enclosed."""
    assert slices(known(), *drawn) == expected


def test_what_a_removed_organ_leaves_open() -> None:
    """Where the crescent is removed that has taken the place of the wall, the cavity is open there."""
    around = torch.where((RIGHT == 2) & (torch.arange(72) < 42), 3, RIGHT)
    assert slices(known(), around, RIGHT) == [[2], [1, 2, 3]]


def test_one_voxel_that_touches_is_not_enough() -> None:
    nearly = RIGHT.clone()
    nearly[30, 25:30] = 3
    assert slices(known(), nearly, RIGHT) == [[1, 2, 3]] * 2


def test_contacts_and_likeness_are_kept_with_the_weights() -> None:
    rule = Refinement(UNCONFIGURED, (True,) * 4, 1.0, contacts=known(), alike=known().apart)
    again = Refinement.from_tensor(rule.to_tensor(), CLASSES)
    assert again.contacts == known() and again.alike == known().apart
    without = Refinement.from_tensor(dataclasses.replace(rule, contacts=None, alike=()).to_tensor(), CLASSES)
    assert without.contacts is None and without.alike == ()
    turns = len(rule.config.turns)
    stored = rule.to_tensor()
    last = Refinement.from_tensor(stored[: len(stored) - turns], CLASSES)  # of a checkpoint from before scans were seen turned
    assert turns and last.config.turns == () and last.contacts == known() and last.alike == known().apart
    older = Refinement.from_tensor(stored[: len(stored) - turns - (3 * 4 + 9)], CLASSES)  # and from before contacts
    assert older.contacts is None and older.alike == () and older.config.turns == ()


@pytest.mark.parametrize("planar", [True, False], ids=["slices", "in space"])
def test_labels_and_predictions_lose_it(planar: bool) -> None:
    drawn = torch.stack([RIGHT, RIGHT, NO_WALL_BETWEEN])
    rule = Refinement(UNCONFIGURED, (True,) * 4, 1.0, outlines=Outlines.of([RIGHT.numpy()], CLASSES), contacts=known())
    probabilities = CLASSES.certain(drawn[None])[0] * 0.9 + 0.025
    labels = rule.drawn(probabilities, scan(drawn), CLASSES, planar)
    assert bool((labels[2] == 3).any()) != planar and (labels[1] == 3).any() and (labels[2] == 1).any()
    logits = CLASSES.logits(probabilities[None])[0]
    refined = rule.logits(logits, scan(drawn), CLASSES, planar)
    assert torch.equal(refined.argmax(0).to(labels.dtype), labels)


def test_the_outline_of_what_is_removed_goes_with_it() -> None:
    """Outlines say how sure a prediction is; not of an organ that is not there."""
    free = Classes(("left", "right"))  # two discs, apart
    both = disc(9, (30, 20)) * 1 + disc(9, (30, 50)) * 2
    touching = disc(9, (30, 32)) * 1
    touching[disc(9, (30, 49)) & (touching == 0)] = 2
    rule = Refinement(
        UNCONFIGURED, (True,) * 3, 1.0, outlines=Outlines.of([both.numpy()], free), contacts=Contacts.of([both.numpy()], free)
    )
    drawn = torch.stack([both, touching]).to(torch.int8)
    image = (drawn > 0).float()[None] + 0.01 * torch.randn(1, *drawn.shape, generator=torch.Generator().manual_seed(0))
    probabilities = free.certain(drawn[None])[0] * 0.9 + 0.03
    refined = rule.logits(free.logits(probabilities[None])[0], image, free, True)
    found = refined.argmax(0)
    assert set(found[0].unique().tolist()) == {0, 1, 2} and not found[1].any(), "both are free, so both give way"


# ------------------------------------------------------------------ grey values


def test_what_is_alike() -> None:
    """The cavity and the crescent are as bright as each other; not so in the second image, nor where they touch."""
    assert alike_apart([(scan(RIGHT[None]), RIGHT[None])], known(), CLASSES) == known().apart
    darker = scan(RIGHT[None], (1.0, 1.5, 0.0, 0.6))
    assert alike_apart([(darker, RIGHT[None])], known(), CLASSES) == ()
    other_channel = torch.cat([scan(RIGHT[None]), darker])
    assert alike_apart([(other_channel, RIGHT[None])], known(), CLASSES) == (), "they must be so in every channel"
    touching = known(NO_WALL_BETWEEN)
    assert alike_apart([(scan(NO_WALL_BETWEEN[None]), NO_WALL_BETWEEN[None])], touching, CLASSES) == ()


def test_one_lends_the_other_its_grey_values() -> None:
    """Half of the cavity is dark in no one's opinion but the crescent's: there cavity is as dark as what is known of the crescent."""
    truth = RIGHT[None]
    image = scan(truth, (3.0, 1.5, 0.0, 1.5))
    muscle = torch.zeros_like(truth, dtype=torch.bool)
    muscle[0] = (RIGHT == 1) & (torch.arange(72) > 38)
    image[0][muscle] -= 0.9
    image[0][(truth == 3) & (torch.arange(64)[:, None] > 30)] -= 0.9  # the crescent shows both
    said = CLASSES.certain(torch.where(muscle, 2, truth)[None])[0] * 0.6 + 0.1  # networks take the dark half for wall
    config = dataclasses.replace(UNCONFIGURED, appearance=0.5)
    alone, shared = (refine(said, image, config, CLASSES, True, alike) for alike in ((), known().apart))
    assert shared[1][muscle].mean() > 1.5 * alone[1][muscle].mean()
    torch.testing.assert_close(shared.sum(0), torch.ones(truth.shape))
