"""The operation Ω: what is pasted carries its label, what nobody knows is masked, the rest stays."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from nnunetv2_cmems.config import SpatialConfig, SynthesisConfig
from nnunetv2_cmems.method.exemplars import UNDEFORMED, ExemplarBank, ExemplarCrops, organ_groups
from nnunetv2_cmems.method.synthesis import dilate, inpaint, synthesise

DIMENSIONS = pytest.mark.parametrize("d", [2, 3])
NOTHING: dict[str, Any] = {"rotation": 0.0, "scale": (1.0, 1.0), "shift": 0.0, "elastic": 0.0}
STILL = SpatialConfig(**NOTHING)
PLAIN: dict[str, Any] = {"joint": STILL, "separate": STILL, "unlabelled_background": 0.0, "known_beyond": 1.0, "blend": 0.0, "adapt": 0.0}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)


def label_with(d: int, size: int, *boxes: tuple[int, tuple[int, ...], int]) -> Tensor:
    """Each box is (class, first corner, side); corners of fewer axes repeat their first entry."""
    label = torch.zeros([size] * d, dtype=torch.long)
    for k, corner, side in boxes:
        full = (corner[0],) * (d - len(corner)) + corner
        label[tuple(slice(c, c + side) for c in full[-d:])] = k
    return label


def crops_of(label: Tensor, image: Tensor, batch: int = 1) -> ExemplarCrops:
    """``batch`` times one exemplar; its background is the image without the organs."""
    groups = organ_groups(label)
    images = image[None].expand(batch, *image.shape)
    labels = label[None].expand(batch, *label.shape)
    return ExemplarCrops(images, labels, groups[None].expand_as(labels), torch.zeros_like(images), int(groups.max()))


def distance(labels: Tensor, a: int, b: int) -> Tensor:
    """From the centre of class a to that of class b in one label map."""
    return (labels == b).nonzero().float().mean(0) - (labels == a).nonzero().float().mean(0)


# what is pasted, where, and what is known


@DIMENSIONS
def test_still_organs_are_pasted_where_they_were(d: int) -> None:
    label = label_with(d, 12, (1, (2, 2), 3), (2, (7, 7), 3))
    image, background = torch.randn(2, *label.shape), torch.randn(1, 2, *label.shape)
    pair = synthesise(crops_of(label, image), background, None, SynthesisConfig(**PLAIN))
    torch.testing.assert_close(pair.images, torch.where(label > 0, image, background), rtol=0, atol=1e-4)
    assert torch.equal(pair.labels[0], label) and pair.labels.dtype == torch.long
    assert pair.mask.all() and pair.mask.dtype == torch.bool


@DIMENSIONS
@pytest.mark.parametrize("adapt", [0.0, 1.0])
def test_on_an_unlabelled_background_only_organs_and_a_band_are_known(d: int, adapt: float) -> None:
    label = label_with(d, 16, (1, (6, 6), 3))
    unlabelled = torch.randn(1, 1, *label.shape)
    config = SynthesisConfig(**{**PLAIN, "unlabelled_background": 1.0, "ignore_margin": 0.125, "adapt": adapt})
    pair = synthesise(crops_of(label, torch.randn(1, *label.shape)), torch.full_like(unlabelled, 99.0), unlabelled, config)
    assert torch.equal(pair.mask[0], label_with(d, 16, (1, (4, 4), 7)) == 1)
    torch.testing.assert_close(pair.images[0, 0][label == 0], unlabelled[0, 0][label == 0])
    assert torch.equal(pair.labels[0], label)


@DIMENSIONS
@pytest.mark.parametrize(("beyond", "unknown"), [(0.25, True), (0.125, False), (0.0, False)])
def test_far_from_the_organs_the_background_is_known_again(d: int, beyond: float, unknown: bool) -> None:
    label = label_with(d, 16, (1, (6, 6), 3))
    config = SynthesisConfig(**{**PLAIN, "unlabelled_background": 1.0, "ignore_margin": 0.125, "known_beyond": beyond})
    zeros = torch.zeros(1, 1, *label.shape)
    pair = synthesise(crops_of(label, zeros[0]), zeros, zeros, config)
    near, far = label_with(d, 16, (1, (4, 4), 7)) == 1, label_with(d, 16, (1, (2, 2), 11)) == 0
    assert torch.equal(pair.mask[0], near | far if unknown else torch.ones_like(near))


def test_an_organ_just_outside_of_the_crop_keeps_its_surroundings_unknown() -> None:
    """Nothing is pasted, but the unlabelled image may show its own organ right at the crop's border."""
    label = label_with(2, 32, (1, (0, 14), 4))  # rows 0 to 3
    bank = ExemplarBank([torch.randn(1, 32, 32)], [label], (16, 16), torch.device("cpu"), reach=4)
    everywhere = torch.ones(1, dtype=torch.bool)
    config = SynthesisConfig(**{**PLAIN, "unlabelled_background": 1.0, "known_beyond": 0.25})  # 4 of 16 voxels
    offsets = torch.tensor([[-2.0, 0.0]])  # the crop shows rows 6 to 21
    crops = bank.draw(1, UNDEFORMED, 1.0, offsets=offsets, placed=everywhere)
    assert not crops.labels.any()
    pair = synthesise(crops, crops.backgrounds, torch.randn(1, 1, 16, 16), config, everywhere)
    expected = torch.ones(16, 16, dtype=torch.bool)
    expected[:2, 2:14] = False  # rows 6 and 7 are within 4 voxels of row 3; the columns are 14 - 4 to 17 + 4, less 8
    assert torch.equal(pair.mask[0], expected)


def test_backgrounds_are_those_that_the_caller_chose() -> None:
    label = label_with(2, 12, (1, (5, 5), 2))
    chosen = torch.tensor([True, False, True, False])
    crops, unlabelled = crops_of(label, torch.zeros(1, 12, 12), 4), torch.full((2, 1, 12, 12), 2.0)
    pair = synthesise(crops, torch.ones(4, 1, 12, 12), unlabelled, SynthesisConfig(**PLAIN), chosen)
    assert torch.equal(pair.images[:, 0, 0, 0] == 2, chosen) and torch.equal(pair.mask.flatten(1).all(1), ~chosen)


def test_without_unlabelled_images_everything_is_known() -> None:
    label = label_with(2, 12, (1, (4, 4), 3))
    config = SynthesisConfig(**{**PLAIN, "unlabelled_background": 1.0})
    pair = synthesise(crops_of(label, torch.zeros(1, 12, 12)), torch.ones(1, 1, 12, 12), None, config)
    assert pair.mask.all() and torch.equal(pair.images[0, 0] == 1, label == 0)


def test_share_of_unlabelled_backgrounds_and_their_reuse() -> None:
    label = label_with(2, 12, (1, (5, 5), 2))
    unlabelled = torch.tensor([2.0, 3.0]).reshape(2, 1, 1, 1).expand(2, 1, 12, 12)
    config = SynthesisConfig(**{**PLAIN, "unlabelled_background": 0.3})
    pair = synthesise(crops_of(label, torch.zeros(1, 12, 12), 200), torch.ones(200, 1, 12, 12), unlabelled, config)
    shown = pair.images[:, 0, 0, 0]
    assert set(shown.tolist()) == {1.0, 2.0, 3.0}
    assert 0.2 < (shown > 1).float().mean() < 0.4
    assert torch.equal(pair.mask.flatten(1).all(1), shown == 1), "exactly the exemplar's own background is known everywhere"


@DIMENSIONS
def test_organs_carry_their_label_wherever_they_go(d: int) -> None:
    size = 30 if d == 2 else 22
    label = label_with(d, size, (1, (2, 2), 7), (3, (12, 12), 8))
    config = SynthesisConfig(**{**PLAIN, "joint": SpatialConfig(), "separate": SpatialConfig(rotation=15.0, shift=0.05)})
    pair = synthesise(crops_of(label, 10.0 * label[None], 8), torch.full((8, 1, *label.shape), -7.0), None, config)
    assert set(pair.labels.unique().tolist()) == {0, 1, 3}, "labels other than the exemplar's"
    for k in (1, 3):
        shown = pair.images[:, 0][pair.labels == k]  # interpolation lowers the values at the organ's border
        assert float(shown.max()) == pytest.approx(10.0 * k, abs=0.01) and float(shown.mean()) > 6.0 * k
    torch.testing.assert_close(pair.images[:, 0][pair.labels == 0], torch.full_like(pair.images[:, 0][pair.labels == 0], -7.0))
    assert not torch.equal(pair.labels[0], pair.labels[1])


@DIMENSIONS
def test_far_from_the_organs_the_background_is_untouched(d: int) -> None:
    size = 32 if d == 2 else 20
    label = label_with(d, size, (1, (4, 4), 3), (2, (11, 11), 3))
    background = torch.randn(2, 1, *label.shape)
    pair = synthesise(crops_of(label, torch.randn(1, *label.shape), 2), background, None, SynthesisConfig(unlabelled_background=0.0))
    far = ~dilate(pair.labels[:, None] > 0, 4)  # three times the default blend's sigma, and one
    assert far.float().mean() > 0.1
    torch.testing.assert_close(pair.images[far], background[far])
    near = dilate(pair.labels[:, None] > 0, 1)
    assert (pair.images[near] != background[near]).any()


@DIMENSIONS
def test_inputs_are_only_read(d: int) -> None:
    label = label_with(d, 12, (1, (1, 1), 3), (2, (8, 8), 3))
    crops = crops_of(label, torch.randn(1, *label.shape), 2)
    background, unlabelled = torch.randn(2, 1, *label.shape), torch.randn(1, 1, *label.shape)
    inputs = [crops.images, crops.labels, crops.groups, crops.backgrounds, background, unlabelled]
    before = [t.clone() for t in inputs]
    synthesise(crops, background, unlabelled, SynthesisConfig())
    assert all(torch.equal(a, b) for a, b in zip(before, inputs))


# together or apart


@DIMENSIONS
def test_touching_organs_move_together_and_distant_ones_apart(d: int) -> None:
    size = 30 if d == 2 else 24
    label = label_with(d, size, (1, (6, 4), 3), (2, (6, 7), 3), (3, (16, 16), 3))
    config = SynthesisConfig(**{**PLAIN, "separate": SpatialConfig(**{**NOTHING, "shift": 0.1})})
    pair = synthesise(crops_of(label, torch.zeros(1, *label.shape), 6), torch.zeros(6, 1, *label.shape), None, config)
    together = torch.stack([distance(one, 1, 2) for one in pair.labels])
    apart = torch.stack([distance(one, 1, 3) for one in pair.labels])
    torch.testing.assert_close(together, distance(label, 1, 2).expand_as(together))
    assert (apart.std(0) > 0.5).all()
    assert apart.sub(distance(label, 1, 3)).abs().max() <= 2 * 0.1 * size + 1


@DIMENSIONS
def test_a_single_group_moves_with_the_joint_transformation_only(d: int) -> None:
    label = label_with(d, 16, (1, (5, 4), 3), (2, (5, 7), 3))
    config = SynthesisConfig(**{**PLAIN, "separate": SpatialConfig(shift=0.2)})
    pair = synthesise(crops_of(label, torch.zeros(1, *label.shape), 3), torch.zeros(3, 1, *label.shape), None, config)
    assert torch.equal(pair.labels, label.expand_as(pair.labels))


@DIMENSIONS
def test_joint_transformation_keeps_the_arrangement(d: int) -> None:
    size = 30 if d == 2 else 24
    label = label_with(d, size, (1, (6, 6), 3), (3, (15, 15), 3))
    config = SynthesisConfig(**{**PLAIN, "joint": SpatialConfig(**{**NOTHING, "shift": 0.1})})
    pair = synthesise(crops_of(label, torch.zeros(1, *label.shape), 4), torch.zeros(4, 1, *label.shape), None, config)
    apart = torch.stack([distance(one, 1, 3) for one in pair.labels])
    torch.testing.assert_close(apart, distance(label, 1, 3).expand_as(apart))
    assert len({tuple((one == 1).nonzero()[0].tolist()) for one in pair.labels}) > 1, "nothing moved"


@DIMENSIONS
def test_a_group_turns_and_grows_about_its_own_centre(d: int) -> None:
    size = 31 if d == 2 else 21
    label = label_with(d, size, (1, (3, 3), 3), (2, (size - 7, size - 7), 5))
    separate = SpatialConfig(**{**NOTHING, "rotation": 180.0, "scale": (0.8, 1.2)})
    config = SynthesisConfig(**{**PLAIN, "separate": separate})
    pair = synthesise(crops_of(label, torch.zeros(1, *label.shape), 4), torch.zeros(4, 1, *label.shape), None, config)
    for one in pair.labels:
        for k in (1, 2):
            centre = (one == k).nonzero().float().mean(0)
            torch.testing.assert_close(centre, (label == k).nonzero().float().mean(0), rtol=0, atol=0.3)


# borders and intensities


@DIMENSIONS
@pytest.mark.parametrize("blend", [0.0, 1.0])
def test_borders(d: int, blend: float) -> None:
    label = label_with(d, 15, (1, (4, 4), 7))
    image, background = torch.ones(1, *label.shape), torch.zeros(1, 1, *label.shape)
    pair = synthesise(crops_of(label, image), background, None, SynthesisConfig(**{**PLAIN, "blend": blend}))
    line = pair.images[(0, 0, *[7] * (d - 1))]
    if blend == 0.0:
        torch.testing.assert_close(line, torch.tensor([0.0] * 4 + [1.0] * 7 + [0.0] * 4), rtol=0, atol=1e-4)
    else:
        assert (line[:8].diff() >= -1e-6).all() and line[0] < 0.01 and line[7] > 0.99
        assert 0.1 < line[3] < 0.45 < 0.55 < line[4] < 0.9, "half-way at the border"
    assert torch.equal(pair.labels[0], label), "blending does not change the label"


@DIMENSIONS
@pytest.mark.parametrize(
    ("gain", "offset", "adapt", "expected"),
    [
        (1.0, 5.0, 1.0, 8.0),
        (1.0, 5.0, 0.5, 5.5),
        (1.0, 5.0, 0.0, 3.0),
        (1.0, -4.0, 1.0, -1.0),
        (1.5, 0.0, 1.0, 4.5),
        (1.5, 5.0, 1.0, 9.5),
        (0.6, 1.0, 1.0, 2.8),
    ],
)
def test_organs_follow_the_intensities_of_the_background(d: int, gain: float, offset: float, adapt: float, expected: float) -> None:
    """Where the background is the exemplar's, seen with another gain and offset, so are the organs."""
    label = label_with(d, 12, (1, (4, 4), 4))
    coordinates = torch.meshgrid(*[torch.arange(12)] * d, indexing="ij")
    surroundings = 1.0 - 2.0 * (sum(coordinates) % 2)  # chequered: mean 0, deviation 1
    image = torch.where(label > 0, torch.tensor(3.0), surroundings)[None]
    config = SynthesisConfig(**{**PLAIN, "adapt": adapt, "ignore_margin": 0.15})
    pair = synthesise(crops_of(label, image), gain * surroundings[None, None] + offset, None, config)
    organ = pair.images[0, 0][label > 0]
    torch.testing.assert_close(organ, torch.full_like(organ, expected), rtol=0, atol=1e-3)


def test_each_image_and_channel_is_adapted_on_its_own() -> None:
    label = label_with(2, 12, (1, (4, 4), 4))
    image = torch.where(label > 0, 3.0, 0.0).expand(2, 12, 12)
    offsets = torch.tensor([[1.0, 2.0], [-3.0, 4.0]])
    background = offsets[:, :, None, None].expand(2, 2, 12, 12)
    pair = synthesise(crops_of(label, image, 2), background, None, SynthesisConfig(**{**PLAIN, "adapt": 1.0}))
    torch.testing.assert_close(pair.images[:, :, 5, 5], 3 + offsets, rtol=0, atol=1e-4)


@DIMENSIONS
def test_finite_whatever_the_organ(d: int) -> None:
    for label in (label_with(d, 8, (1, (0, 0), 8)), label_with(d, 8), label_with(d, 8, (1, (7, 7), 1))):
        crops = crops_of(label, torch.randn(1, *label.shape), 3)
        pair = synthesise(crops, torch.zeros(3, 1, *label.shape), torch.zeros(1, 1, *label.shape), SynthesisConfig())
        assert torch.isfinite(pair.images).all()


# helpers with a job of their own


@DIMENSIONS
@pytest.mark.parametrize("size", [13, 16])
def test_inpainting_forgets_the_organ_and_keeps_the_rest(d: int, size: int) -> None:
    hole = (label_with(d, size, (1, (5, 5), 4)) > 0)[None, None]
    image = torch.randn(1, 2, *[size] * d)
    filled = []
    for organ in (0.0, 1000.0):
        torch.manual_seed(1)
        filled.append(inpaint(torch.where(hole, torch.tensor(organ), image), hole))
    torch.testing.assert_close(filled[0], filled[1])
    outside = ~hole.expand_as(image)
    assert torch.equal(filled[1][outside], image[outside])
    assert filled[1].abs().max() < 8


@DIMENSIONS
def test_inpainting_continues_a_smooth_background(d: int) -> None:
    hole = (label_with(d, 16, (1, (6, 6), 4)) > 0)[None, None]
    constant = torch.full((1, 1, *[16] * d), 4.0)
    torch.testing.assert_close(inpaint(torch.where(hole, torch.tensor(-9.0), constant), hole), constant)
    ramp = torch.arange(16.0).reshape(16, *[1] * (d - 1)).expand(1, 1, *[16] * d)
    filled = inpaint(torch.where(hole, torch.tensor(99.0), ramp), hole)
    assert float((filled - ramp).abs().max()) < 2.5


def test_inpainting_adds_the_texture_of_the_surroundings() -> None:
    hole = (label_with(2, 24, (1, (9, 9), 6)) > 0)[None, None]
    smooth, rough = (float(inpaint(torch.randn(1, 1, 24, 24) * noise, hole)[hole].std()) for noise in (0.01, 1.0))
    assert smooth < 0.05 and 0.4 < rough < 2.0


def test_inpainting_of_nothing_and_of_everything() -> None:
    image = torch.randn(1, 1, 9, 7)
    assert torch.equal(inpaint(image, torch.zeros(1, 1, 9, 7, dtype=torch.bool)), image)
    assert torch.isfinite(inpaint(image, torch.ones(1, 1, 9, 7, dtype=torch.bool))).all()


@DIMENSIONS
@pytest.mark.parametrize("radius", [1, 3])
def test_dilation_grows_a_point_to_a_cube(d: int, radius: int) -> None:
    point = label_with(d, 9, (1, (4, 4), 1)) > 0
    expected = label_with(d, 9, (1, (4 - radius, 4 - radius), 2 * radius + 1)) > 0
    assert torch.equal(dilate(point[None, None], radius)[0, 0], expected)
