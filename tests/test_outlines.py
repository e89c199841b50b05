"""Round organs are drawn along the edges of the scan; what is not round, or not drawn so, stays."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from nnunetv2_cmems.config import ScanLabelsConfig
from nnunetv2_cmems.method import outlines
from nnunetv2_cmems.method.label_space import Classes, LabelSpace, Regions
from nnunetv2_cmems.method.outlines import Outlines
from nnunetv2_cmems.method.refinement import Refinement

CLASSES = Classes(("cavity", "wall", "crescent"))
REGIONS = Regions(("heart", "cavity"), None, ((1, 2), (1,)))
SPACES = pytest.mark.parametrize("space", [CLASSES, REGIONS], ids=["classes", "regions"])
SHAPE = 64, 72
MIDDLE = 30.0, 38.0


def disc(radius: float, middle: tuple[float, float] = MIDDLE, shape: tuple[int, int] = SHAPE) -> Tensor:
    y, x = (torch.arange(n) - m for n, m in zip(shape, middle))
    return y[:, None] ** 2 + x[None] ** 2 < radius**2


def heart(cavity: float, wall: float, crescent: bool = True) -> Tensor:
    """(Y, X): a cavity within a wall, both of these radii, and a crescent to their left."""
    label = torch.zeros(SHAPE, dtype=torch.int8)
    if crescent:
        label[disc(11, (30, 24))] = 3
    label[disc(wall)] = 2
    label[disc(cavity)] = 1
    return label


def scan(truth: Tensor, levels: tuple[float, ...] = (1.0, 1.5, 0.0, 1.5), noise: float = 0.05) -> Tensor:
    """(1, Z, Y, X): the wall is dark, the cavity bright."""
    return (torch.tensor(levels)[truth.long()] + noise * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0)))[None]


def heads(labels: Tensor, space: LabelSpace) -> Tensor:
    return space.target(labels[None].long())[0].to(torch.int8)


def dice(a: Tensor, b: Tensor) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


EXEMPLAR = heart(8, 13)
KNOWN = {space: Outlines.of([EXEMPLAR.numpy()], space) for space in (CLASSES, REGIONS)}


def known(space: LabelSpace) -> Outlines:
    found = KNOWN[space]
    assert found is not None
    return found


LEVEL = 0.3


def annotated_at_a_level(cavity: float, outer: float, levels: tuple[float, ...] = (1.0, 1.5, 0.0, 1.5)) -> tuple[Tensor, Tensor]:
    """Labels (Y, X) and a scan (1, 1, Y, X) that is blurred; the cavity is annotated up to where it has :data:`LEVEL` of its contrast."""
    truth = heart(cavity, outer, crescent=False)
    blurred = ndimage.gaussian_filter((truth == 1).numpy().astype(np.float32), 1.2)
    label = torch.where((torch.from_numpy(blurred) > LEVEL) & (truth > 0), 1, truth).to(torch.int8)
    grey = scan(truth, levels)[0] + (levels[1] - levels[2]) * torch.from_numpy(blurred - (truth == 1).numpy())
    return label, grey[None, None].float()


def leveled(space: LabelSpace) -> Outlines:
    label, image = annotated_at_a_level(8, 13)
    found = Outlines.of([label.numpy()], space, [image[0, 0].numpy()])
    assert found is not None
    return found


def cavity(labels: Tensor, space: LabelSpace) -> Tensor:
    return labels == 1 if space is CLASSES else labels[1] > 0


def wall(labels: Tensor, space: LabelSpace) -> Tensor:
    return labels == 2 if space is CLASSES else (labels[0] > 0) & (labels[1] == 0)


def test_what_the_annotated_slices_show() -> None:
    """A wall is round with what it encloses, a crescent is not."""
    found = known(CLASSES)
    assert found.enclosed == ((), (0,), ()) and found.open == (False, True, False)
    assert found.radius == (pytest.approx(8, rel=0.03), pytest.approx(13, rel=0.03), 0)
    assert known(REGIONS).enclosed == ((1,), ()) and known(REGIONS).open == (True, False)
    assert Outlines.of([torch.where(EXEMPLAR == 3, EXEMPLAR, 0).numpy()], CLASSES) is None, "nothing is round"
    assert Outlines.of([], CLASSES) is None
    twice = Outlines.of([EXEMPLAR.numpy(), torch.where(disc(20) & (EXEMPLAR == 0), 3, EXEMPLAR).numpy()], CLASSES)
    assert twice is not None and twice.open == (False, False, False), "most of its border is the crescent's"
    torn = EXEMPLAR.clone()
    torn[24:38, 38:] = 0
    assert Outlines.of([EXEMPLAR.numpy(), torn.numpy()], CLASSES) is None, "one slice in which it is not round is enough"


def test_what_is_not_annotated_is_no_background() -> None:
    unknown = torch.where((EXEMPLAR == 0) & (torch.arange(72) > 30), -1, EXEMPLAR)
    found = Outlines.of([unknown.numpy()], CLASSES)
    assert found is not None and not found.open[1], "the border that is seen is the crescent's"


@SPACES
def test_numbers(space: LabelSpace) -> None:
    for found in (known(space), leveled(space)):
        assert Outlines.from_numbers(found.numbers()) == found
        assert len(found.numbers()) == len(space.names) * (len(space.names) + 2)
    assert known(space).level == (0.0,) * len(space.names), "older checkpoints know of none"


@SPACES
@pytest.mark.parametrize("drawn", [10.5, 16.5], ids=["too thin", "too thick"])
def test_a_wall_ends_at_the_edge(space: LabelSpace, drawn: float) -> None:
    truth = torch.stack([heart(6, 13, crescent=False), heart(8, 14, crescent=False)])
    before = heads(torch.stack([heart(6, drawn, crescent=False), heart(8, drawn + 1, crescent=False)]), space)
    after = known(space).drawn(before, scan(truth), space)
    assert after.shape == before.shape and after.dtype == before.dtype
    for z in (0, 1):
        was, is_ = (dice(wall(labels, space)[z], truth[z] == 2) for labels in (before, after))
        assert was < 0.8 and is_ > 0.92
    assert torch.equal(after == 1, before == 1) if space is CLASSES else torch.equal(after[1], before[1]), "what it encloses stays"


def test_half_of_a_border_that_shows_no_edge_is_bridged() -> None:
    truth = heart(6, 13, crescent=False)[None]
    image = scan(truth)
    image[..., 38:] = torch.where(truth[..., 38:] == 0, 0.1, image[..., 38:])  # as dark as the wall
    after = known(CLASSES).drawn(heart(6, 11, crescent=False)[None], image, CLASSES)
    assert dice(after == 2, truth == 2) > 0.85


@SPACES
def test_what_lies_within_becomes_its_hull(space: LabelSpace) -> None:
    truth = heart(8, 13, crescent=False)
    notched = truth.clone()
    notched[29:32, 42:47] = 2  # a papillary muscle
    after = known(space).drawn(heads(notched[None], space), scan(truth[None]), space)
    found = cavity(after, space)[0]
    assert dice(found, truth == 1) > dice(notched == 1, truth == 1) + 0.02 and dice(found, truth == 1) > 0.98


def test_neighbours_keep_what_they_have() -> None:
    before = heart(8, 11)[None]
    after = known(CLASSES).drawn(before, scan(heart(8, 14)[None]), CLASSES)
    assert torch.equal(after == 3, before == 3) and (after == 2).sum() > 1.5 * (before == 2).sum()


def test_what_is_not_drawn_round_stays() -> None:
    truth = heart(8, 13, crescent=False)
    torn = truth.clone()
    torn[26:, 36:] = 0
    spread = truth.clone()
    spread[28:32] = 2
    hole = truth.clone()
    hole[disc(8) & (torch.arange(72) > 34)] = 2  # of what it encloses little is left, a sickle
    hole[disc(7, (30, 34))] = 2
    tiny = heart(0, 1.5, crescent=False)
    line = torch.diag(torch.ones(72))[:64].to(truth.dtype) * 2
    labels = torch.stack([torn, spread, hole, tiny, line, truth * 0])
    assert torch.equal(known(CLASSES).drawn(labels, scan(truth.expand_as(labels)), CLASSES), labels)


def test_another_edge_is_not_taken() -> None:
    """The only edge is that of something much larger."""
    labels = heart(0, 13, crescent=False)[None]
    image = scan(heart(0, 29, crescent=False)[None], noise=0.0)
    after = known(CLASSES).drawn(labels, image, CLASSES)
    assert dice(after == 2, labels == 2) > 0.9


def test_without_edges_nothing_moves() -> None:
    labels = heart(8, 12, crescent=False)[None]
    after = known(CLASSES).drawn(labels, torch.zeros(1, *labels.shape), CLASSES)
    assert dice(after == 2, labels == 2) > 0.97 and torch.equal(after == 1, labels == 1)


def test_the_resolution_does_not_count() -> None:
    truth, drawn = heart(7, 14, crescent=False), heart(7, 11, crescent=False)
    fine = dataclasses.replace(known(CLASSES), radius=tuple(2 * radius for radius in known(CLASSES).radius))
    twice = [label.repeat_interleave(2, 0).repeat_interleave(2, 1)[None] for label in (drawn, truth)]
    after = fine.drawn(twice[0], scan(twice[1]), CLASSES)
    assert dice(after == 2, twice[1] == 2) > 0.93


def test_the_best_path_is_closed() -> None:
    """It follows a ridge of scores through the first ray, and takes no shortcut across a gap."""
    rays, steps = 72, 50
    ridge = np.round(25 + 12 * np.sin(np.arange(rays) / rays * 2 * np.pi)).astype(int)
    score = np.zeros((rays, steps))
    score[np.arange(rays), ridge] = 5
    found = outlines._best_path(score)
    assert np.abs(found - ridge).max() <= 1 and abs(found[0] - found[-1]) <= 2
    score[10:14] = 0
    assert np.abs(outlines._best_path(score) - ridge).max() <= 3


def test_two_calls_draw_the_same() -> None:
    labels, image = heart(6, 11)[None], scan(heart(6, 13)[None])
    first, second = (known(CLASSES).drawn(labels, image, CLASSES) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(labels, heart(6, 11)[None])


# ------------------------------------------------------------------ with the refinement


def rule(space: LabelSpace, on: bool = True) -> Refinement:
    config = ScanLabelsConfig(appearance=0.0, smoothing=0.0, largest_piece=False)
    return Refinement(config, (True,) * (1 + len(space.names)), 1.0, None, known(space) if on else None)


@SPACES
@pytest.mark.parametrize("planar", [True, False])
def test_predictions_have_outlines_where_slices_are_apart(space: LabelSpace, planar: bool) -> None:
    truth, drawn = heart(6, 13, crescent=False)[None], heart(6, 10, crescent=False)[None]
    logits = space.logits(0.9 * space.certain(space.target(drawn[None].long())) + 0.02)[0]
    after = rule(space).logits(logits, scan(truth), space, planar)
    without = rule(space, on=False).logits(logits, scan(truth), space, planar)
    decided = space.decide(space.probabilities(after[None]), 0.0).labels[0].to(torch.int8)
    said = heads(drawn, space)
    expected = known(space).traced(said, scan(truth), space)[0] if planar else said
    assert torch.equal(after, without) != planar
    assert torch.isfinite(after).all() and torch.equal(decided, expected)


@SPACES
def test_outlines_are_kept_with_the_weights(space: LabelSpace) -> None:
    found = Refinement.from_tensor(rule(space).to_tensor(), space).outlines
    assert found is not None and found.numbers() == pytest.approx(known(space).numbers())
    assert Refinement.from_tensor(rule(space, on=False).to_tensor(), space).outlines is None


@SPACES
def test_outlines_run_between_voxels(space: LabelSpace) -> None:
    """Where an export makes voxels smaller, the border is the outline, not a line half way between voxels."""
    truth = heart(6, 13, crescent=False)[None]
    image = scan(truth, noise=0.0)
    said = heads(heart(6, 11, crescent=False)[None], space)
    logits = space.logits(0.9 * space.certain(said[None].long()) + 0.02)[0]
    expected, borders = known(space).traced(said, image, space)
    ((organs, (z, y, x), distance),) = borders
    assert organs == ((1, 0) if space is CLASSES else (0,)) and distance.abs().max() < outlines.NEAR and not z.any()
    radius = distance + ((y - MIDDLE[0]) ** 2 + (x - MIDDLE[1]) ** 2) ** 0.5
    assert radius.std() < 0.15 and radius.mean() == pytest.approx(13, abs=0.7), "it is a circle"
    after = rule(space).logits(logits, image, space, True)
    decided = space.decide(space.probabilities(after[None]), 0.0).labels[0].to(torch.int8)
    assert torch.equal(decided, expected), "no voxel is decided otherwise"

    def larger(coarse: Tensor) -> Tensor:
        fine = functional.interpolate(coarse.transpose(0, 1), scale_factor=4, mode="bilinear").transpose(0, 1)
        labels = space.decide(space.probabilities(fine[None]), 0.0).labels[0]
        return ((labels if space is CLASSES else labels[0]) > 0).squeeze(0)

    circle = disc(4 * float(radius.mean()), (4 * MIDDLE[0] + 1.5, 4 * MIDDLE[1] + 1.5), (4 * SHAPE[0], 4 * SHAPE[1]))
    stepped = space.deciding(logits[None], expected[None], (said != expected)[None])[0]
    assert dice(larger(after), circle) > 0.99 > 0.985 > dice(larger(stepped), circle)


def test_in_predictions_a_wall_goes_on_as_far_as_it_looks_like_wall() -> None:
    """Of one that is more than twice as thick as drawn the outer edge is found; other tissue, however far it goes, is none of it."""
    truth = heart(6, 15.5, crescent=False)[None]
    drawn = heart(6, 10, crescent=False)[None]
    after, (border,) = known(CLASSES).traced(drawn, scan(truth), CLASSES)
    assert dice(drawn == 2, truth == 2) < 0.6 and dice(after == 2, truth == 2) > 0.9 and (border.distance < outlines.NEAR).all()
    assert dice(known(CLASSES).drawn(drawn, scan(truth), CLASSES) == 2, truth == 2) < 0.6, "labels do without"
    other = torch.where((truth == 2) & (drawn != 2), 3, truth)
    stays, _ = known(CLASSES).traced(drawn, scan(other, (1.0, 1.5, 0.0, 0.35)), CLASSES)
    assert dice(stays == 2, drawn == 2) > 0.9


# ------------------------------------------------------------------ levels of what lies within


@SPACES
def test_the_level_of_an_annotated_border(space: LabelSpace) -> None:
    """It is where the annotation runs, between both organs' grey values, whatever these are; of what is enclosed alone."""
    inner = 0 if space is CLASSES else 1
    for levels in ((1.0, 1.5, 0.0, 1.5), (1.0, -40.0, 60.0, 1.5)):
        label, image = annotated_at_a_level(8, 13, levels)
        found = Outlines.of([label.numpy()], space, [image[0, 0].numpy()])
        assert found is not None and found.level[inner] == pytest.approx(LEVEL, abs=0.07)
        assert [level > 0 for level in found.level] == [k == inner for k in range(len(space.names))]


def test_no_level() -> None:
    label, image = annotated_at_a_level(8, 13)
    for flat in (torch.zeros(SHAPE), scan(label, (1.0, 0.5, 0.5, 0.5), noise=1.0)[0]):
        found = Outlines.of([label.numpy()], CLASSES, [flat.numpy()])
        assert found is not None and not any(found.level), "there is no edge"
    wall_alone = torch.where(label == 1, -1, label)
    found = Outlines.of([wall_alone.numpy()], CLASSES, [image[0, 0].numpy()])
    assert found is None or not any(found.level), "nothing lies within"


@SPACES
@pytest.mark.parametrize("levels", [(1.0, 1.5, 0.0, 1.5), (1.0, -40.0, 60.0, 1.5)], ids=["bright", "dark"])
def test_in_predictions_what_lies_within_ends_at_its_level(space: LabelSpace, levels: tuple[float, ...]) -> None:
    """A cavity that is drawn a pixel too small gets what is beyond the level of its border, and its wall loses that."""
    truth, image = annotated_at_a_level(6, 12, levels)
    small = torch.where((truth == 1) & ~disc(6), 2, truth)
    before = heads(small[None], space)
    after, borders = leveled(space).traced(before, image, space)
    assert dice(cavity(before, space)[0], truth == 1) < 0.92 and dice(cavity(after, space)[0], truth == 1) > 0.96
    assert dice(wall(after, space)[0], truth == 2) > dice(wall(before, space)[0], truth == 2)
    assert {border.organs for border in borders} == ({(1, 0), (0,)} if space is CLASSES else {(0,), (1,)})
    for unlevelled in (leveled(space).drawn(before, image, space), known(space).traced(before, image, space)[0]):
        assert torch.equal(cavity(unlevelled, space), cavity(before, space)), "neither labels do so, nor what has no level"


@SPACES
def test_the_level_is_no_line_between_voxels(space: LabelSpace) -> None:
    """Where an export makes voxels smaller, the border is where the image has the level."""
    truth, image = annotated_at_a_level(6, 12)
    said = heads(torch.where((truth == 1) & ~disc(6), 2, truth)[None], space)
    logits = space.logits(0.9 * space.certain(said[None].long()) + 0.02)[0]
    after = dataclasses.replace(rule(space), outlines=leveled(space)).logits(logits, image, space, True)
    decided = space.decide(space.probabilities(after[None]), 0.0).labels[0].to(torch.int8)
    assert torch.equal(decided, leveled(space).traced(said, image, space)[0]), "no voxel is decided otherwise"
    fine = functional.interpolate(after.transpose(0, 1), scale_factor=8, mode="bilinear").transpose(0, 1)
    found = cavity(space.decide(space.probabilities(fine[None]), 0.0).labels[0], space)[0]
    grey = functional.interpolate(image, scale_factor=8, mode="bilinear")[0, 0]
    ring = found & ~torch.from_numpy(ndimage.binary_erosion(found.numpy()))
    assert grey[ring].mean() / 1.5 == pytest.approx(leveled(space).level[0 if space is CLASSES else 1], abs=0.08)


def test_without_an_edge_no_level_counts() -> None:
    truth, image = annotated_at_a_level(6, 12)
    before = torch.where((truth == 1) & ~disc(6), 2, truth)[None]
    noise = scan(truth[None], (1.0, 0.0, 0.0, 0.0), noise=0.5)
    after, borders = leveled(CLASSES).traced(before, noise, CLASSES)
    assert torch.equal(after == 1, before == 1) and all(border.organs == (1, 0) for border in borders)
    little = torch.where(disc(1.5), 1, torch.where(before == 1, 2, before)).to(torch.int8)
    after, _ = leveled(CLASSES).traced(little, image, CLASSES)
    assert torch.equal(after == 1, little == 1), "too few pixels have no grey value of their own"


def test_a_path_that_no_ray_allows() -> None:
    """Where what is enclosed reaches farther from ray to ray than a path may go there is still one."""
    star = disc(4) | torch.zeros(SHAPE, dtype=torch.bool)
    star[29:31, 5:70] = True
    label = torch.where(star, 1, torch.where(disc(7), 2, 0)).to(torch.int8)
    assert torch.isin(known(CLASSES).drawn(label[None], scan(label[None]), CLASSES), torch.arange(4)).all()
    steep = np.full((72, 30), outlines._NEVER)
    steep[::2, 0] = steep[1::2, -1] = 0
    path = outlines._best_path(steep)
    assert path.shape == (72,) and (path >= 0).all() and (path < 30).all()
