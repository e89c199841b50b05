"""What never touches in the annotated slices is not both there where it touches in a scan."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from test_outlines import CLASSES, REGIONS, SHAPE, disc, heart, scan
from torch import Tensor
from torch.nn import functional

from nnunetv2_cmems.config import ScanLabelsConfig
from nnunetv2_cmems.method.contacts import LOBE, NARROW, Contacts, waist
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
    assert known().apart == ((False, False, True), (False, False, False), (True, False, False))
    assert known().enclosed == (True, False, False)
    assert known().waists == (0.0, 0.0, waist(RIGHT.numpy() == 3)), "of what is free alone"


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
        ([RIGHT] * 4 + [NO_WALL_BETWEEN] * 2, [[1, 2, 3]] * 4 + [[1, 2]] * 2),
        ([NO_WALL_BETWEEN] * 3 + [RIGHT] * 7 + [NO_WALL_BETWEEN], [[1, 2]] * 3 + [[1, 2, 3]] * 7 + [[1, 2]]),
        ([NO_WALL_BETWEEN] * 4 + [RIGHT] * 6, [[1, 2]] * 2 + [[1, 2, 3]] * 8),
        ([RIGHT, NO_WALL_BETWEEN, RIGHT], [[1, 2, 3]] * 3),
        ([NO_WALL_BETWEEN, NO_WALL_BETWEEN], [[1, 2, 3]] * 2),
        ([torch.zeros_like(RIGHT), NO_WALL_BETWEEN, RIGHT], [[], [1, 2], [1, 2, 3]]),
        ([OPEN_CAVITY, RIGHT, OPEN_CAVITY], [[2, 3], [1, 2, 3], [2, 3]]),
        ([RIGHT, OPEN_CAVITY, RIGHT], [[1, 2, 3]] * 3),
        ([torch.zeros_like(RIGHT)] * 2, [[], []]),
    ],
    ids=[
        "right", "first", "two last", "three first and the last", "no more than a fifth", "in their midst", "all", "beyond nothing",
        "open at both ends", "open in their midst", "nothing",
    ],
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


def test_slices_in_which_the_cavity_is_within_its_wall() -> None:
    """That the crescent touches this wall is chance."""
    nothing, far = torch.zeros_like(RIGHT), torch.where(RIGHT == 3, 0, RIGHT)
    far[:5, :5] = 3  # the crescent, away from the wall
    cavity, wall, crescent = (torch.where(RIGHT == one, RIGHT, 0) for one in (1, 2, 3))
    for drawn, right in ((RIGHT, 1), (far, 1), (OPEN_CAVITY, 0), (NO_WALL_BETWEEN, 0), (cavity, 0)):
        assert known().within(drawn[None].numpy()) == (1, right)
    assert known().within(torch.stack([RIGHT, nothing, OPEN_CAVITY, wall, RIGHT, crescent]).numpy()) == (3, 2)


def test_a_scan_is_arranged_as_annotated() -> None:
    nothing, cavity = torch.zeros_like(RIGHT), torch.where(RIGHT == 1, RIGHT, 0)
    for slices_of, arranged in (
        ([RIGHT, nothing], True),
        ([RIGHT, OPEN_CAVITY, nothing], True),  # a half
        ([RIGHT, OPEN_CAVITY, OPEN_CAVITY], False),
        ([torch.where(RIGHT == 3, 0, RIGHT)], False),  # a class is not there
        ([torch.where(RIGHT == 1, 0, RIGHT)], False),
        ([cavity], False),
        ([nothing], False),
    ):
        assert known().arranged(torch.stack(slices_of).numpy(), [1, 2, 3]) == arranged
    assert known().arranged(torch.where(RIGHT == 3, 0, RIGHT)[None].numpy(), [1, 2])


def test_what_lies_between_several_organs_may_touch_others_elsewhere() -> None:
    """Only of what one organ encloses it is known what is around it: the parts of a brain touch this here and that there."""
    parted = torch.where((RIGHT == 2) & (torch.arange(72) > 38), 3, RIGHT)  # half of the cavity's border is the crescent's
    assert known(parted).enclosed[0]
    assert known(parted).within(OPEN_CAVITY[None].numpy()) == (0, 0)


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


# ------------------------------------------------------------------ waists


def two_discs(neck: int, radii: tuple[int, int] = (9, 9)) -> Tensor:
    """Discs beside each other, joined by a bar of so many pixels across."""
    bar = torch.zeros(SHAPE, dtype=torch.bool)
    bar[30 - neck // 2 : 30 - neck // 2 + neck, 22:46] = True
    return disc(radii[0], (30, 22)) | disc(radii[1], (30, 46)) | bar


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (disc(9, (30, 30)), 1.0),
        (two_discs(0), 0.0),
        (two_discs(3), 1.5 / 8.5),
        (two_discs(7), 3.5 / 8.5),
        (two_discs(11), 5.5 / 8.5),
        (two_discs(5, (9, 5)), 2.5 / 4.5),
        (two_discs(5, (5, 9)), 2.5 / 4.5),
        (two_discs(3, (9, 3)), 1.0),
        (torch.zeros(5, 5, dtype=torch.bool), 1.0),
        (torch.ones(5, 5, dtype=torch.bool), 1.0),
    ],
    ids=["disc", "two pieces", "3 pixels", "7", "11", "of the smaller one", "mirrored", "too small for a part", "nothing", "all"],
)
def test_waist(mask: Tensor, expected: float) -> None:
    assert waist(mask.numpy()) == pytest.approx(expected, abs=0.13)
    large = mask.repeat_interleave(3, 0).repeat_interleave(3, 1)
    assert waist(large.numpy()) == pytest.approx(expected, abs=0.13), "at any resolution"
    if mask.any() and 0 < expected < 1:
        turned = functional.affine_grid(torch.tensor([[[0.8, -0.6, 0.0], [0.6, 0.8, 0.0]]]), [1, 1, 192, 192], align_corners=False)
        square = large[:, :192]
        assert square.sum() == large.sum()
        slanted = functional.grid_sample(square[None, None].float(), turned, align_corners=False)[0, 0] > 0.5
        assert waist(slanted.numpy()) == pytest.approx(expected, abs=0.13), "however it lies"


def waisted(neck: int) -> Tensor:
    """The heart with two discs for the crescent; seven pixels of the wall are theirs, but none of the cavity."""
    y, x = torch.meshgrid(*map(torch.arange, SHAPE), indexing="ij")
    crescent = two_discs(neck)[(x + 11).clamp_max(SHAPE[0] - 1), (y + 4).clamp_max(SHAPE[1] - 1)]  # one above the other
    assert not (crescent & (RIGHT == 1)).any()
    hearts = torch.where(RIGHT == 3, 0, RIGHT)
    return torch.where(crescent & (hearts == 0), 3, hearts)


def test_an_organ_with_a_waist_goes_at_the_ends() -> None:
    """It is two that hang together: slices of other organs, beyond its end."""
    two, body = waisted(3), waisted(17)
    assert waist((two == 3).numpy()) < NARROW * waist((body == 3).numpy()) and LOBE < 1
    everywhere, without = [1, 2, 3], [1, 2]
    for seen in (known(body), known(RIGHT)):
        assert slices(seen, two, *[body] * 4, two, two) == [without, *[everywhere] * 4, without, without]
        assert slices(seen, body, two, body) == [everywhere] * 3, "not in its midst"
        assert slices(seen, two, two) == [everywhere] * 2, "where all slices have one it is how it looks"
    assert slices(known(two), two, body) == [everywhere] * 2, "the annotated slice has one"
    assert slices(known(body, two), two, body) == [everywhere] * 2, "one of the annotated slices has one"


def test_a_slice_with_a_waist_before_one_that_touches() -> None:
    """From either end on either is a reason."""
    for first in ((waisted(3), NO_WALL_BETWEEN), (NO_WALL_BETWEEN, waisted(3))):
        assert slices(known(), *first, *[RIGHT] * 4) == [[1, 2]] * 2 + [[1, 2, 3]] * 4


def test_walls_and_what_they_enclose_have_no_waists() -> None:
    """A wall is thick here and thin there, and the cavity is where it is because of what is around it."""
    thin = RIGHT.clone()
    for columns in (slice(28, 31), slice(45, 48)):
        thin[24:36, columns] = torch.where(RIGHT[24:36, columns] == 2, 1, RIGHT[24:36, columns])
    pinched = torch.where(two_discs(3) & (RIGHT > 0) & (RIGHT < 3), 1, RIGHT)
    assert slices(known(), thin, pinched, RIGHT)[:2] == [[1, 2, 3]] * 2


def test_waists_of_whole_volumes_are_not_known() -> None:
    assert known(torch.stack([RIGHT] * 3)).waists == (0.0,) * 3, "slices are looked at where they are apart"


def test_checkpoints_from_before_waists() -> None:
    numbers = known().numbers()
    assert Contacts.from_numbers(numbers, 3) == known()
    older = [0.0 if index % 4 == 0 and index < 9 else number for index, number in enumerate(numbers)]
    assert Contacts.from_numbers(older, 3) == dataclasses.replace(known(), waists=(0.0,) * 3)


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
