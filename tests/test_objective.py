"""One training step: who teaches whom, which terms count, and what is reported about it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import Tensor, nn

from nnunetv2_cmems import trainers
from nnunetv2_cmems.config import CMEMSConfig, IntensityConfig, SynthesisConfig, TermConfig
from nnunetv2_cmems.method.exemplars import UNDEFORMED, ExemplarBank
from nnunetv2_cmems.method.label_space import Classes, LabelSpace, Regions
from nnunetv2_cmems.method.networks import MemberOutput, MutualNetworks
from nnunetv2_cmems.method.objective import (
    Batches,
    Objective,
    Supervised,
    batch_sizes,
    competence,
    overlap,
    teacher,
    unlabelled_statistics,
)

DIMENSIONS = pytest.mark.parametrize("d", [2, 3])
CPU = torch.device("cpu")
SIZE = 8
CLASSES = Classes(("one", "two"))
REGIONS = Regions(("both", "one", "two"), None, ((1, 2), (1,), (2,)))
OFF = TermConfig(enabled=False)
ON = TermConfig()
SAME = IntensityConfig(probability=0.0)
# Nothing is perturbed: what is predicted can be worked out by hand.
CALM = CMEMSConfig(
    supervised=ON, synthetic=OFF, image=ON, feature=ON, tau=0.9, dice_weight=0.0, pseudo_dice_weight=0.0, cutmix=0.0,
    competence=False, exemplar_views=UNDEFORMED,
    supervised_intensity=SAME, weak=SAME, strong=SAME, unlabelled_views=UNDEFORMED,
    synthesis=SynthesisConfig(joint=UNDEFORMED, separate=UNDEFORMED, unlabelled_background=1.0, known_beyond=1.0),
)  # fmt: skip
PRESETS = {name: getattr(trainers, name).config for name in trainers.__all__}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)


def exemplar(d: int = 2) -> Tensor:
    label = torch.zeros([12] * d, dtype=torch.long)
    label[(slice(3, 6),) * d], label[(slice(7, 10),) * d] = 1, 2
    return label


def objective(
    config: CMEMSConfig,
    d: int = 2,
    batches: Batches | None = None,
    space: LabelSpace = CLASSES,
    label: Tensor | None = None,
    size: int = SIZE,
) -> Objective:
    if label is None:
        label = exemplar(d)
    bank = ExemplarBank([torch.randn(1, *label.shape) + label], [label], [size] * d, CPU)
    if batches is None:
        batches = batch_sizes(config, 8)
    return Objective(config, bank, batches, space, supervised_weights=None, pseudo_weights=None, autocast=contextlib.nullcontext)


def certain(k: int, batch: int = 2, d: int = 2, sure: float = 30.0) -> Tensor:
    """Logits of three classes that say class k everywhere."""
    logits = torch.zeros(batch, 3, *[SIZE] * d)
    logits[:, k] = sure
    return logits


def unsure(batch: int = 2, d: int = 2) -> Tensor:
    return torch.zeros(batch, 3, *[SIZE] * d, requires_grad=True)


class FakeNetwork:
    """Stands in for MutualNetworks: says what it is told to, and remembers what it was asked.

    Args:
        weak: one logits tensor per member.
        strong: one per member, or a function of the strong view.
        perturbed: one per member.
    """

    def __init__(self, weak: list[Tensor] | None = None, strong: Any = None, perturbed: list[Tensor] | None = None) -> None:
        self.weak, self.strong, self.perturbed = weak, strong, perturbed
        self.supervised = 0.0
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, supervised: list[Tensor], weak: Any, strong: Any, dropout: Any) -> list[MemberOutput]:
        self.calls.append((supervised, weak, strong, dropout))
        outputs = []
        for i, images in enumerate(supervised):
            logits = torch.zeros(len(images), 3, *images.shape[2:])
            logits[:, 0] = self.supervised
            logits.requires_grad_()
            strong_logits = None
            if strong is not None:
                strong_logits = [self.strong(strong[i]) if callable(self.strong) else self.strong[i] if self.strong else certain(0)]
            perturbed = None if dropout is None else [self.perturbed[i] if self.perturbed else certain(0)]
            weak_logits = None if weak is None else self.weak[i] if self.weak else certain(0)
            outputs.append(MemberOutput([logits], strong_logits, perturbed, weak_logits))
        return outputs


def pulled_to(logits: Tensor) -> int:
    """The class that gradient descent raises everywhere; -1 for none."""
    if logits.grad is None or not logits.grad.any():
        return -1
    (k,) = logits.grad.argmin(1).unique().tolist()
    return k


# who teaches whom


def test_pseudo_labels_are_exchanged_across_the_members() -> None:
    strong, perturbed = [unsure(), unsure()], [unsure(), unsure()]
    network = FakeNetwork([certain(1), certain(2)], strong, perturbed)
    step = objective(CALM)(network, torch.randn(2, 1, SIZE, SIZE), 1.0)
    assert float(step.terms["image"]) == pytest.approx(math.log(3), abs=1e-5)
    assert float(step.terms["feature"]) == pytest.approx(math.log(3), abs=1e-5)
    step.total.backward()
    assert [pulled_to(logits) for logits in strong] == [2, 1]
    assert [pulled_to(logits) for logits in perturbed] == [2, 1]


@pytest.mark.parametrize(("said", "expected"), [([2, 1], 0.0), ([1, 2], 30.0)])
def test_loss_is_low_for_who_follows_the_other(said: list[int], expected: float) -> None:
    network = FakeNetwork([certain(1), certain(2)], [certain(k) for k in said], [certain(k) for k in said])
    step = objective(CALM)(network, torch.randn(2, 1, SIZE, SIZE), 1.0)
    assert float(step.terms["image"]) == pytest.approx(expected, abs=1e-3)
    assert float(step.terms["feature"]) == pytest.approx(expected, abs=1e-3)


def test_a_single_member_teaches_itself() -> None:
    strong, perturbed = [unsure()], [unsure()]
    network = FakeNetwork([certain(2)], strong, perturbed)
    step = objective(dataclasses.replace(CALM, num_members=1))(network, torch.randn(2, 1, SIZE, SIZE), 1.0)
    step.total.backward()
    assert pulled_to(strong[0]) == pulled_to(perturbed[0]) == 2
    assert "agreement" not in step.statistics


def test_of_three_members_each_follows_the_mean_of_the_others() -> None:
    # 0 and 1 say class 1, 2 says class 2: only 2's teachers agree well enough to be confident.
    strong = [unsure(), unsure(), unsure()]
    config = dataclasses.replace(CALM, num_members=3, feature=OFF)
    objective(config)(FakeNetwork([certain(1), certain(1), certain(2)], strong), torch.randn(2, 1, SIZE, SIZE), 1.0).total.backward()
    assert [pulled_to(logits) for logits in strong] == [-1, -1, 1]


@DIMENSIONS
def test_pseudo_label_is_the_mean_of_the_others_where_it_reaches_tau(d: int) -> None:
    rows = [[0.9, 0.05, 0.05], [0.2, 0.8, 0.0], [0.4, 0.5, 0.1]]
    probabilities = [torch.tensor(row).reshape(1, 3, *[1] * d) for row in rows]
    for member, tau, label, confident in [(0, 0.6, 1, True), (0, 0.7, 1, False), (1, 0.6, 0, True), (2, 0.6, 0, False), (2, 0.5, 0, True)]:
        taught = CLASSES.decide(teacher(probabilities, member), tau)  # means: 0.3 0.65 0.05; 0.65 0.275 0.075; 0.55 0.425 0.025
        assert taught.labels.shape == taught.confident.shape == (1, *[1] * d)
        assert (int(taught.labels), bool(taught.confident)) == (label, confident)
    alone = CLASSES.decide(teacher(probabilities[:1], 0), 0.9)
    assert (int(alone.labels), bool(alone.confident)) == (0, True), "tau itself is confident"


def test_nobody_confident_nothing_learned() -> None:
    strong, perturbed = [unsure(), unsure()], [unsure(), unsure()]
    network = FakeNetwork([certain(1, sure=3.0), certain(2, sure=3.0)], strong, perturbed)
    step = objective(dataclasses.replace(CALM, tau=1.0, pseudo_dice_weight=1.0))(network, torch.randn(2, 1, SIZE, SIZE), 1.0)
    assert float(step.terms["image"]) == float(step.terms["feature"]) == 0.0
    step.total.backward()
    assert all(pulled_to(logits) == -1 for logits in strong + perturbed)


def test_few_confident_pixels_weigh_little() -> None:
    teacher = torch.zeros(2, 3, SIZE, SIZE)
    teacher[:, 1, 0] = 30.0  # one row in eight
    step = objective(CALM)(FakeNetwork([teacher, teacher], [unsure(), unsure()], [unsure(), unsure()]), torch.randn(2, 1, SIZE, SIZE), 1.0)
    assert float(step.terms["image"]) == pytest.approx(math.log(3) / 8, abs=1e-5)
    assert float(step.terms["feature"]) == pytest.approx(math.log(3) / 8, abs=1e-5)


def test_class_weights_of_the_supervised_and_of_the_taught_pixels() -> None:
    teacher = certain(2)
    teacher[:, :, 0] = certain(1)[:, :, 0]  # class 1 in one row of eight, class 2 in the others
    made = objective(dataclasses.replace(CALM, feature=OFF))
    right, wrong = math.log(1 + 2 * math.exp(-4)), 4 + math.log(1 + 2 * math.exp(-4))
    for supervised, pseudo, image in [
        (None, None, (wrong + 7 * right) / 8),
        ([0.0, 1.0, 1.0], [1.0, 3.0, 1.0], (3 * wrong + 7 * right) / 10),
    ]:
        made.supervised_weights = None if supervised is None else lambda _, values=supervised: torch.tensor(values)
        made.pseudo_weights = None if pseudo is None else torch.tensor(pseudo)
        network = FakeNetwork([teacher, teacher], [certain(2, sure=4.0)] * 2)
        network.supervised = 2.0  # says background, which the weights above leave out
        step = made(network, torch.randn(2, 1, SIZE, SIZE), 1.0)
        assert float(step.terms["image"]) == pytest.approx(image, abs=1e-4)
        foreground = 2 + math.log(1 + 2 * math.exp(-2))
        assert (float(step.terms["supervised"]) == pytest.approx(foreground, abs=1e-4)) == (supervised is not None)


def test_weight_of_dice_in_the_supervised_and_in_the_taught_terms() -> None:
    off = dataclasses.replace(CALM, image=OFF)
    values = {}
    for name in ("none", "dice_weight", "pseudo_dice_weight"):
        torch.manual_seed(0)
        random.seed(0)
        config = off if name == "none" else dataclasses.replace(off, **{name: 2.0})
        network = FakeNetwork([certain(1)] * 2, None, [torch.zeros(2, 3, SIZE, SIZE)] * 2)
        values[name] = objective(config)(network, torch.randn(2, 1, SIZE, SIZE), 1.0).terms
    assert float(values["none"]["feature"]) == float(values["dice_weight"]["feature"]) == pytest.approx(math.log(3), abs=1e-5)
    assert float(values["pseudo_dice_weight"]["feature"]) == pytest.approx(math.log(3) + 2 * (1 - 2 / 4), abs=1e-5)
    supervised = {name: float(terms["supervised"]) for name, terms in values.items()}
    assert supervised["none"] == supervised["pseudo_dice_weight"] < supervised["dice_weight"]


def test_labels_are_cut_and_mixed_like_the_strong_views() -> None:
    """Two images, told apart by intensity and class: a pupil who reads the class off each pixel of
    its strong view makes no mistake only if the labels were mixed by the view's own boxes."""
    unlabelled = torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1).expand(2, 1, SIZE, SIZE)
    weak = torch.cat([certain(1, 1), certain(2, 1)])

    def read(view: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(view), 30.0 * (view < 1.5), 30.0 * (view > 1.5)], 1)

    mixed = 0
    for _ in range(8):
        network = FakeNetwork([weak, weak], read)
        step = objective(dataclasses.replace(CALM, cutmix=1.0, feature=OFF))(network, unlabelled, 1.0)
        assert float(step.terms["image"]) < 1e-3
        ((_, u_w, u_s, _),) = network.calls
        assert all(torch.allclose(view, unlabelled, atol=1e-4) for view in u_w), "weak views are not mixed"
        mixed += sum(not torch.allclose(view, unlabelled, atol=1e-4) for view in u_s)
        assert not torch.allclose(u_s[0], u_s[1], atol=1e-4), "each member has boxes of its own"
    assert mixed >= 12


# regions and what is not annotated


def of_regions(signs: list[int], batch: int = 2, d: int = 2) -> Tensor:
    """Logits that are sure of the inside (1) or outside (-1) of each region, or of nothing (0), everywhere."""
    return (30.0 * torch.tensor(signs)).reshape(1, 3, *[1] * d).expand(batch, 3, *[SIZE] * d).clone()


@DIMENSIONS
def test_each_region_is_taught_where_it_is_sure(d: int) -> None:
    strong, perturbed = [unsure(d=d), unsure(d=d)], [unsure(d=d), unsure(d=d)]
    network = FakeNetwork([of_regions([1, -1, 0], d=d), of_regions([-1, 0, 1], d=d)], strong, perturbed)
    step = objective(CALM, d, space=REGIONS)(network, torch.randn(2, 1, *[SIZE] * d), 1.0)
    assert float(step.terms["image"]) == pytest.approx(2 / 3 * math.log(2), abs=1e-5)
    assert float(step.terms["feature"]) == pytest.approx(2 / 3 * math.log(2), abs=1e-5)
    step.total.backward()
    for pupil, taught in ((0, [-1, 0, 1]), (1, [1, -1, 0])):  # by the other one
        for logits in (strong[pupil], perturbed[pupil]):
            assert logits.grad is not None
            assert torch.equal(logits.grad.sign(), -of_regions(taught, d=d).sign())


def test_regions_are_cut_and_mixed_like_the_strong_views() -> None:
    unlabelled = torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1).expand(2, 1, SIZE, SIZE)
    weak = torch.cat([of_regions([1, 1, -1], 1), of_regions([1, -1, 1], 1)])

    def read(view: Tensor) -> Tensor:
        first = 60.0 * (view < 1.5) - 30
        return torch.cat([torch.full_like(view, 30.0), first, -first], 1)

    for _ in range(8):
        network = FakeNetwork([weak, weak], read)
        config = dataclasses.replace(CALM, cutmix=1.0, feature=OFF, pseudo_dice_weight=1.0)
        assert float(objective(config, space=REGIONS)(network, unlabelled, 1.0).terms["image"]) < 1e-3
        ((_, _, u_s, _),) = network.calls
        assert not all(torch.allclose(view, unlabelled, atol=1e-4) for view in u_s)


def supervised_gradient(made: Objective, d: int) -> tuple[Tensor, Any]:
    """The gradient of the first member's supervised logits, all 0 and hence 0.5 for each region, and its batch."""
    batches = [made.supervised_batch(torch.randn(2, 1, *made.bank.patch)) for _ in range(2)]
    given, seen = iter(batches), []
    made.supervised_batch = lambda *_: next(given)  # type: ignore[method-assign]

    def network(supervised: list[Tensor], *_: Any) -> list[MemberOutput]:
        seen.extend(torch.zeros(len(x), 3, *made.bank.patch, requires_grad=True) for x in supervised)
        return [MemberOutput([logits], None, None, None) for logits in seen]

    made(network, None, 1.0).total.backward()
    assert seen[0].grad is not None
    return seen[0].grad, batches[0]


@DIMENSIONS
def test_supervised_regions_are_those_of_the_label_map(d: int) -> None:
    config = dataclasses.replace(CALM, synthetic=ON, image=OFF, feature=OFF)
    gradient, batch = supervised_gradient(objective(config, d, Batches(2, 2, 2), REGIONS), d)
    known = batch.mask[:, None].expand_as(gradient)
    assert known[:2].all() and not known[2:].all(), "exemplar views are known altogether, synthetic ones near their organs"
    assert torch.equal(gradient != 0, known)
    assert torch.equal((gradient < 0) & known, REGIONS.target(batch.labels) & known)
    assert all(region.any() for region in REGIONS.masks(REGIONS.target(batch.labels)))


@DIMENSIONS
@pytest.mark.parametrize("space", [CLASSES, REGIONS])
@pytest.mark.parametrize("dice_weight", [0.0, 1.0])
def test_what_is_not_annotated_gets_no_gradient(d: int, space: LabelSpace, dice_weight: float) -> None:
    """The patch is the whole exemplar, of which one half is not annotated."""
    label = exemplar(d)
    label[..., 8:] = -1
    config = dataclasses.replace(CALM, image=OFF, feature=OFF, dice_weight=dice_weight)
    gradient, batch = supervised_gradient(objective(config, d, Batches(2, 0, 0), space, label, size=12), d)
    touched = gradient.abs().sum(1) > 0
    assert torch.equal(touched, (label >= 0).expand_as(touched))
    assert set(batch.labels[batch.mask].unique().tolist()) == {0, 1, 2}


# what is asked of the networks


@pytest.mark.parametrize(
    ("image", "feature", "terms"),
    [(ON, ON, {"image", "feature"}), (OFF, ON, {"feature"}), (ON, OFF, {"image"}), (OFF, OFF, set())],
)
@pytest.mark.parametrize(("supervised", "synthetic"), [(ON, ON), (ON, OFF), (OFF, ON)])
def test_disabled_terms_are_neither_computed_nor_reported(
    image: TermConfig, feature: TermConfig, terms: set[str], supervised: TermConfig, synthetic: TermConfig
) -> None:
    config = dataclasses.replace(CALM, image=image, feature=feature, supervised=supervised, synthetic=synthetic)
    network = FakeNetwork()
    step = objective(config)(network, torch.randn(2, 1, SIZE, SIZE), 1.0)
    ((images, u_w, u_s, dropout),) = network.calls
    assert set(step.terms) == terms | {name for name in ("supervised", "synthetic") if getattr(config, name).enabled}
    assert (u_w is not None, u_s is not None, dropout is not None) == (bool(terms), image.enabled, feature.enabled)
    sizes = batch_sizes(config, 8)
    assert [len(batch) for batch in images] == [sizes.exemplar + sizes.synthetic] * 2
    assert all(len(view) == 2 for stream in (u_w, u_s) if stream is not None for view in stream)


@pytest.mark.parametrize(
    ("progress", "image", "feature"), [(0.0, False, False), (0.3, True, False), (0.5, True, False), (0.75, True, True)]
)
def test_terms_that_do_not_weigh_yet_are_not_computed(progress: float, image: bool, feature: bool) -> None:
    config = dataclasses.replace(CALM, image=TermConfig(rampup=0.5), feature=TermConfig(start=0.5, rampup=0.5))
    network = FakeNetwork()
    step = objective(config)(network, torch.randn(2, 1, SIZE, SIZE), progress)
    ((_, u_w, u_s, dropout),) = network.calls
    assert u_w is not None and "coverage" in step.statistics, "coverage and agreement are followed from the start"
    assert (u_s is not None, dropout is not None) == (image, feature)
    assert set(step.terms) == {"supervised"} | {name for name, on in (("image", image), ("feature", feature)) if on}


def test_total_is_the_weighted_sum_over_terms_and_members() -> None:
    config = dataclasses.replace(
        CALM, supervised=TermConfig(weight=2.0), image=TermConfig(weight=3.0, rampup=0.5), feature=TermConfig(weight=5.0, start=0.2)
    )
    network = FakeNetwork([certain(1), certain(2)], [certain(2, sure=4.0), certain(2)], [certain(1, sure=7.0), certain(1)])
    step = objective(config)(network, torch.randn(2, 1, SIZE, SIZE), 0.25)
    terms = {name: float(value) for name, value in step.terms.items()}
    assert terms["supervised"] == pytest.approx(math.log(3), abs=1e-5)
    assert terms["image"] == pytest.approx((math.log(1 + 2 * math.exp(-4)) + 30) / 2, abs=1e-4)
    assert terms["feature"] == pytest.approx((7 + math.log(1 + 2 * math.exp(-7)) + 0) / 2, abs=1e-4)
    total = 2 * (2 * terms["supervised"] + 1.5 * terms["image"] + 5 * terms["feature"])
    assert float(step.total.detach()) == pytest.approx(total, rel=1e-5)
    assert not any(value.requires_grad for value in step.terms.values())


@DIMENSIONS
def test_views(d: int) -> None:
    """One crop for all views of an unlabelled image; weak and strong appearance drawn for each member."""
    gain_and_offset = IntensityConfig(probability=1.0, brightness=0.5, contrast=(0.5, 2.0))
    config = dataclasses.replace(CMEMSConfig(), image=ON, feature=ON, cutmix=0.0, weak=gain_and_offset, strong=gain_and_offset)
    unlabelled = torch.randn(2, 1, *[12] * d)
    before = unlabelled.clone()
    network = FakeNetwork([certain(1, 2, d)] * 2, [certain(1, 2, d)] * 2, [certain(1, 2, d)] * 2)
    objective(config, d)(network, unlabelled, 1.0)
    assert torch.equal(unlabelled, before)
    ((images, u_w, u_s, _),) = network.calls
    for stream in (images, u_w, u_s):
        assert len(stream) == 2 and stream[0].shape[1:] == (1, *[SIZE] * d) and not torch.allclose(stream[0], stream[1])
    for views in torch.stack([*u_w, *u_s]).flatten(2).unbind(1):
        assert torch.corrcoef(views).min() > 0.999, "the views do not show the same crop"
        assert len({round(float(view.mean()), 4) for view in views}) == 4, "each view has an appearance of its own"


def test_nothing_is_changed_where_everything_is_off() -> None:
    unlabelled = torch.randn(2, 1, 12, 12)
    network = FakeNetwork()
    objective(CALM)(network, unlabelled, 1.0)
    ((_, u_w, u_s, _),) = network.calls
    for view in (*u_w, *u_s):
        torch.testing.assert_close(view, unlabelled[:, :, 2:10, 2:10], rtol=0, atol=1e-4)


@DIMENSIONS
def test_supervised_batch_holds_exemplar_views_then_synthetic_ones(d: int) -> None:
    config = dataclasses.replace(CALM, synthetic=ON)
    batch = objective(config, d, Batches(3, 2, 2)).supervised_batch(torch.randn(2, 1, *[SIZE] * d))
    assert batch.images.shape == (5, 1, *[SIZE] * d) and batch.labels.shape == batch.mask.shape == (5, *[SIZE] * d)
    assert batch.num_exemplar == 3 and batch.labels.dtype == torch.long and batch.mask.dtype == torch.bool
    known = batch.mask.flatten(1).all(1).tolist()
    assert known == [True] * 3 + [False] * 2
    assert (batch.labels[3:] > 0).flatten(1).any(1).all()


@DIMENSIONS
@pytest.mark.parametrize("offset", [(0, 0, 0), (1, -2, 1)])
def test_organs_are_pasted_where_the_exemplar_has_them(d: int, offset: tuple[int, ...]) -> None:
    """A crop of an unlabelled image gets what the exemplar shows at the same place."""
    made = objective(dataclasses.replace(CALM, synthetic=ON), d, Batches(1, 2, 2))
    offsets = torch.tensor([[0.0] * d, list(map(float, offset[:d]))])
    batch = made.supervised_batch(torch.zeros(2, 1, *[SIZE] * d), offsets)
    for label, its_offset in zip(batch.labels[1:], offsets.int().tolist()):
        assert torch.equal(label, made.bank.labels[0][tuple(slice(2 + o, 10 + o) for o in its_offset)])


def test_unknown_pixels_of_synthetic_images_do_not_count() -> None:
    config = dataclasses.replace(CALM, supervised=OFF, synthetic=ON, image=OFF, feature=OFF)
    seen: list[Tensor] = []

    def network(supervised: list[Tensor], *_: Any) -> list[MemberOutput]:
        seen.extend(torch.zeros(len(x), 3, SIZE, SIZE, requires_grad=True) for x in supervised)
        return [MemberOutput([logits], None, None, None) for logits in seen]

    objective(config, batches=Batches(0, 4, 2))(network, torch.randn(2, 1, SIZE, SIZE), 1.0).total.backward()
    for logits in seen:
        assert logits.grad is not None
        touched = (logits.grad.abs().sum(1) > 0).flatten(1).float().mean(1)
        assert (touched > 0).all() and (touched < 1).all()


# with real networks


def real_networks(d: int, members: int) -> MutualNetworks:
    def make() -> nn.Module:
        return PlainConvUNet(
            1, 2, (3, 4), nn.Conv2d if d == 2 else nn.Conv3d, 3, (1, 2), 1, 3, 1, conv_bias=True,
            norm_op=nn.InstanceNorm2d if d == 2 else nn.InstanceNorm3d, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU,
            deep_supervision=True,
        )  # fmt: skip

    return MutualNetworks(make, members)


@DIMENSIONS
@pytest.mark.parametrize("term", ["supervised", "synthetic", "image", "feature"])
@pytest.mark.parametrize(("members", "space"), [(1, CLASSES), (2, CLASSES), (2, REGIONS)])
def test_every_term_reaches_every_member(d: int, term: str, members: int, space: LabelSpace) -> None:
    off = TermConfig(weight=0.0)
    weights = {"supervised": off, "synthetic": off, "image": off, "feature": off, term: ON}
    config = dataclasses.replace(CMEMSConfig(), num_members=members, tau=0.0, competence=False, **weights)
    network = real_networks(d, members)
    step = objective(config, d, space=space)(network, torch.randn(2, 1, *[SIZE] * d), 1.0)
    assert torch.isfinite(step.total) and step.total > 0
    step.total.backward()
    for member in network.members:
        for part in (member.encoder, member.decoder):
            assert sum(float(p.grad.abs().sum()) for p in part.parameters() if p.grad is not None) > 0


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_makes_a_step(preset: str) -> None:
    config = PRESETS[preset]
    unlabelled = torch.randn(2, 1, 12, 12) if config.uses_unlabelled else None
    step = objective(config)(real_networks(2, config.num_members), unlabelled, 1.0)
    assert torch.isfinite(step.total)
    assert set(step.terms) == {name for name in ("supervised", "synthetic", "image", "feature") if getattr(config, name).enabled}
    agreement = {"agreement"} if config.num_members > 1 else set()
    assert set(step.statistics) == ({"coverage", *agreement} if config.uses_unlabelled else set())


def test_without_unlabelled_images_the_labelled_terms_remain() -> None:
    config = dataclasses.replace(CMEMSConfig(), image=OFF, feature=OFF)
    step = objective(config)(real_networks(2, 2), None, 0.5)
    assert set(step.terms) == {"supervised", "synthetic"} and step.statistics == {}
    assert torch.isfinite(step.total) and step.total.requires_grad


# sizes


@pytest.mark.parametrize(
    ("preset", "planned", "expected"),
    [
        ("nnUNetTrainerCMEMS", 2, (1, 1, 2)),
        ("nnUNetTrainerCMEMS", 12, (3, 3, 3)),
        ("nnUNetTrainerCMEMS", 49, (12, 12, 12)),
        ("nnUNetTrainerCMEMS_exemplarOnly", 12, (12, 0, 0)),
        ("nnUNetTrainerCMEMS_noSynthesis", 12, (6, 0, 3)),
        ("nnUNetTrainerCMEMS_imageOnly", 12, (3, 3, 3)),
        ("nnUNetTrainerCMEMS_featureOnly", 12, (3, 3, 3)),
    ],
)
def test_batch_sizes(preset: str, planned: int, expected: tuple[int, int, int]) -> None:
    assert batch_sizes(PRESETS[preset], planned) == expected


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("planned", [2, 3, 8, 10, 13, 26, 49, 104])
def test_a_member_sees_about_as_many_views_as_planned(preset: str, planned: int) -> None:
    config = PRESETS[preset]
    sizes = batch_sizes(config, planned)
    assert abs(sizes.exemplar + sizes.synthetic + 2 * sizes.unlabelled - planned) <= (4 if planned < 8 else 2)
    assert (sizes.unlabelled > 1) == config.uses_unlabelled, "CutMix needs two images"
    assert (sizes.exemplar > 0, sizes.synthetic > 0) == (config.supervised.enabled, config.synthetic.enabled)


def test_given_batch_sizes_count_instead() -> None:
    given = dataclasses.replace(CMEMSConfig(), exemplar_batch=5, synthetic_batch=1, unlabelled_batch=7)
    assert batch_sizes(given, 12) == (5, 1, 7)
    assert batch_sizes(dataclasses.replace(given, synthetic=OFF, image=OFF, feature=OFF), 12) == (5, 0, 0)
    assert batch_sizes(dataclasses.replace(given, supervised=OFF), 12) == (0, 1, 7)


# statistics


def test_coverage_and_agreement() -> None:
    # four pixels: (confidence, class) of member 0 and 1
    said = [[(0.9, 0), (0.9, 1), (0.6, 1), (0.9, 2)], [(0.6, 0), (0.9, 1), (0.6, 2), (0.8, 2)]]
    probabilities = []
    for rows in said:
        p = torch.zeros(1, 3, 2, 2)
        for pixel, (confidence, k) in enumerate(rows):
            y, x = divmod(pixel, 2)
            p[0, :, y, x] = (1 - confidence) / 2
            p[0, k, y, x] = confidence
        probabilities.append(p)
    statistics = unlabelled_statistics([CLASSES.decide(p, 0.75) for p in probabilities], CLASSES)
    assert statistics["coverage"].tolist() == [[3, 4, 2, 3], [2, 4, 2, 3]]
    assert statistics["agreement"].tolist() == [[1, 1], [1.5, 1.5]]
    assert set(unlabelled_statistics([CLASSES.decide(probabilities[0], 0.75)], CLASSES)) == {"coverage"}


@DIMENSIONS
def test_overlap_is_intersection_over_mean_size_for_each_foreground_class(d: int) -> None:
    a = torch.tensor([0, 1, 1, 1, 2, 0]).reshape(1, 6, *[1] * (d - 1))
    b = torch.tensor([0, 0, 1, 1, 3, 2]).reshape(1, 6, *[1] * (d - 1))
    assert overlap(a, b, Classes(("one", "two", "three"))).tolist() == [[2, 0, 0], [2.5, 1, 0.5]]


def test_coverage_and_agreement_of_regions() -> None:
    # two pixels: probabilities of the three regions, of member 0 and 1
    said = [[[0.9, 0.9, 0.4], [0.8, 0.6, 0.1]], [[0.9, 0.1, 0.6], [0.3, 0.7, 0.1]]]
    probabilities = [torch.tensor(pixels).T.reshape(1, 3, 1, 2) for pixels in said]
    statistics = unlabelled_statistics([REGIONS.decide(p, 0.75) for p in probabilities], REGIONS)
    assert statistics["coverage"].tolist() == [[4, 6, 3, 4], [3, 6, 1, 3]]
    assert statistics["agreement"].tolist() == [[1, 1, 0], [1.5, 1.5, 0.5]]


@DIMENSIONS
def test_overlap_of_regions(d: int) -> None:
    a = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]]).bool().reshape(1, 3, 4, *[1] * (d - 1))
    b = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]).bool().reshape(1, 3, 4, *[1] * (d - 1))
    assert overlap(a, b, REGIONS).tolist() == [[2, 0, 1], [2.5, 1, 1.5]]


def test_statistics_of_a_step_are_those_of_its_weak_views() -> None:
    network = FakeNetwork([certain(1), certain(0, sure=0.5)])
    statistics = objective(CALM)(network, torch.randn(2, 1, SIZE, SIZE), 1.0).statistics
    n = 2 * SIZE * SIZE
    assert statistics["coverage"].tolist() == [[n, n, n, n], [0, n, 0, 0]]
    assert statistics["agreement"].tolist() == [[0, 0], [n / 2, 0]]


def test_networks_run_inside_autocast() -> None:
    inside: list[bool] = []
    state = {"on": False}

    @contextlib.contextmanager
    def autocast() -> Any:
        state["on"] = True
        yield
        state["on"] = False

    def network(*arguments: Any) -> list[MemberOutput]:
        inside.append(state["on"])
        return FakeNetwork()(*arguments)

    made = objective(CALM)
    make: Callable[[], Any] = autocast
    made.autocast = make
    made(network, torch.randn(2, 1, SIZE, SIZE), 1.0)
    assert inside == [True], "one call, in the context"


# competence


def told(k: int) -> Tensor:
    """Confident logits of class k for one image."""
    return certain(k, batch=1)


def test_competence_is_the_dice_of_the_worst_class_that_is_shown() -> None:
    """Truth: half class 1, a quarter class 2, a quarter unknown. Member 0 says 1 everywhere, member 1 says 2 everywhere."""
    label = torch.zeros(1, SIZE, SIZE, dtype=torch.long)
    label[:, :4], label[:, 4:6] = 1, 2
    mask = torch.ones_like(label, dtype=torch.bool)
    mask[:, 6:] = False
    batch = Supervised(torch.zeros(1, 1, SIZE, SIZE), label, mask, 1)
    # of 32 + 16 known pixels each: class 1 shares 32 + 0, sizes (48 + 32) / 2 + 32 / 2; class 2 shares 0 + 16, sizes 16 / 2 + (48 + 16) / 2
    assert float(competence([told(1), told(2)], [batch, batch], CLASSES)) == pytest.approx(16 / 40)
    assert float(competence([told(1)], [batch], CLASSES)) == 0.0
    only_one = batch._replace(mask=label == 1)
    assert float(competence([told(1)], [only_one], CLASSES)) == 1.0  # class 2 is not shown, and does not count
    nothing = batch._replace(labels=torch.zeros_like(label))
    assert float(competence([told(1)], [nothing], CLASSES)) == 1.0


def test_members_that_do_not_know_the_exemplar_do_not_teach() -> None:
    """The supervised logits say background: the consistency terms are computed, but weigh nothing."""
    config = dataclasses.replace(CALM, competence=True)
    parts = []
    for one in (CALM, config):
        network = FakeNetwork([certain(1), certain(1)], [unsure(), unsure()], [unsure(), unsure()])
        step = objective(one)(network, torch.randn(2, 1, SIZE, SIZE), 1.0)
        assert float(step.terms["image"]) > 0.5 and float(step.terms["feature"]) > 0.5
        parts.append(float(step.total) - 2 * float(step.terms["supervised"]))
    assert parts[0] > 1.0 and parts[1] == pytest.approx(0.0, abs=1e-6)
