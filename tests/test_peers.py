"""The peers: their consistency rules against what was published, in golden values and by independent computation."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EXEMPLAR, Workspace
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import Tensor, nn

from nnunetv2_cmems import trainers
from nnunetv2_cmems.commands.export import export_model
from nnunetv2_cmems.config import CMEMSConfig, IntensityConfig
from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.method.exemplars import UNDEFORMED, ExemplarBank
from nnunetv2_cmems.method.label_space import Classes
from nnunetv2_cmems.method.networks import MemberOutput, MutualNetworks
from nnunetv2_cmems.method.objective import Batches, Objective, Step, passes_per_step
from nnunetv2_cmems.trainers.architectures import counterpart

SPACE = Classes(("one", "two"))
SAME = IntensityConfig(probability=0.0)
SIZE = 4


def preset(name: str, **changes: Any) -> CMEMSConfig:
    config: CMEMSConfig = getattr(trainers, f"nnUNetTrainerCMEMS_{name}").config
    return dataclasses.replace(config, **changes)


class Told:
    """Stands in for the networks: predicts what it is told, for two unlabelled images."""

    def __init__(self, weak: list[Tensor], strong: list[Tensor], perturbed: list[Tensor] | None = None) -> None:
        self.weak, self.strong, self.perturbed = weak, strong, perturbed

    def __call__(self, supervised: list[Tensor], weak: Any, strong: Any, dropout: Any) -> list[MemberOutput]:
        outputs = []
        for i, images in enumerate(supervised):
            assert len(strong[i]) == len(self.strong[i]) and (dropout is not None) == (self.perturbed is not None)
            logits = torch.zeros(len(images), 3, SIZE, SIZE)
            outputs.append(MemberOutput([logits], [self.strong[i]], None if self.perturbed is None else [self.perturbed[i]], self.weak[i]))
        return outputs


def consistency(config: CMEMSConfig, network: Any, progress: float = 1.0) -> tuple[float, Step]:
    """What a step adds to the supervised loss, without any CutMix."""
    config = dataclasses.replace(config, cutmix=0.0, exemplar_views=UNDEFORMED, unlabelled_views=UNDEFORMED, weak=SAME, strong=SAME)
    label = torch.zeros(6, 6, dtype=torch.long)
    label[1:3, 1:3], label[3:5, 3:5] = 1, 2
    bank = ExemplarBank([torch.randn(1, 6, 6)], [label], [SIZE, SIZE], torch.device("cpu"))
    objective = Objective(config, bank, Batches(2, 0, 2), SPACE, None, None, contextlib.nullcontext)
    step = objective(network, torch.randn(2, 1, SIZE, SIZE), progress)
    return float(step.total) - config.num_members * float(step.terms["supervised"]), step


def drawn(*counts: int, spread: float = 4.0) -> list[Tensor]:
    return [spread * torch.randn(count, 3, SIZE, SIZE) for count in counts]


def published_dice(logits: Tensor, teacher: Tensor, tau: float) -> float:
    """UniMatch's and cross teaching's public Dice loss, written anew in numpy, class by class."""
    p, q = (x.softmax(1).double().numpy() for x in (logits, teacher))
    counted = q.max(1) >= tau
    losses = []
    for k in range(3):
        score, target = p[:, k][counted], (q.argmax(1) == k)[counted].astype(float)
        losses.append(1 - (2 * (score * target).sum() + 1e-5) / ((score**2).sum() + (target**2).sum() + 1e-5))
    return float(np.mean(losses))


def cross_entropies(logits: Tensor, teacher: Tensor) -> np.ndarray:
    """(2, Y, X) of the teacher's decision under the pupil's prediction, in numpy."""
    p, decided = logits.softmax(1).double().numpy(), teacher.argmax(1).numpy()
    return -np.log(np.take_along_axis(p, decided[:, None], 1)[:, 0])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# ------------------------------------------------------------------ consistency rules


def test_unimatch() -> None:
    """(l_x + 0.25 l_s1 + 0.25 l_s2 + 0.5 l_fp) / 2 with l_x = (CE + Dice) / 2, all times four."""
    weak, strong, perturbed = drawn(2, 4, 2)
    assert 0 < float((weak.softmax(1).amax(1) < 0.95).float().mean()) < 1
    found, step = consistency(preset("uniMatch"), Told([weak], [strong], [perturbed]))
    first, second = strong[:2], strong[2:]
    l_s1, l_s2, l_fp = (published_dice(x, weak, 0.95) for x in (first, second, perturbed))
    assert found == pytest.approx(4 * (0.25 * l_s1 + 0.25 * l_s2 + 0.5 * l_fp) / 2, rel=1e-4)
    assert float(step.terms["image"]) == pytest.approx((l_s1 + l_s2) / 2, rel=1e-4)
    supervised = 2 * ((math.log(3) + dice_of_the_unsure()) / 2)
    assert float(step.terms["supervised"]) == pytest.approx(supervised, rel=0.35)  # CE + Dice; our Dice leaves the background out


def dice_of_the_unsure() -> float:
    return 1 - 2 * (1 / 3 * 0.25) / (1 / 3 + 0.25)


def test_fixmatch() -> None:
    """The mean over ALL pixels of the cross-entropy where the confidence reaches 0.95; weight 1."""
    weak, strong = drawn(2, 2)
    confident = weak.softmax(1).amax(1).numpy() >= 0.95
    assert 0 < confident.mean() < 1
    found, _ = consistency(preset("fixMatch"), Told([weak], [strong]))
    assert found == pytest.approx((cross_entropies(strong, weak) * confident).mean(), rel=1e-4)


def test_cross_pseudo_supervision() -> None:
    """CE(p1, y2) + CE(p2, y1), every pixel, however unsure."""
    weak, strong = drawn(2, 2, spread=0.1), drawn(2, 2)
    found, _ = consistency(preset("cps"), Told(weak, strong))
    expected = cross_entropies(strong[0], weak[1]).mean() + cross_entropies(strong[1], weak[0]).mean()
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("progress", "share"), [(0.0, math.exp(-5)), (0.5, math.exp(-1.25)), (1.0, 1.0)])
def test_cross_teaching(progress: float, share: float) -> None:
    """0.1 exp(-5 (1 - t)^2) Dice beside (CE + Dice) / 2, hence 0.2 beside CE + Dice; every pixel counts."""
    weak, strong = drawn(2, 2, spread=0.1), drawn(2, 2)
    found, _ = consistency(preset("crossTeaching"), Told(weak, strong), progress)
    expected = published_dice(strong[0], weak[1], 0.0) + published_dice(strong[1], weak[0], 0.0)
    assert found == pytest.approx(0.2 * share * expected, rel=1e-3)


@pytest.mark.parametrize(("progress", "share"), [(0.0, math.exp(-5)), (0.5, math.exp(-1.25)), (1.0, 1.0)])
def test_mean_teacher(progress: float, share: float) -> None:
    """The mean squared difference of the probabilities, over classes and pixels."""
    weak, strong = drawn(2, 2)
    found, _ = consistency(preset("meanTeacher"), Told([weak], [strong]), progress)
    difference = (strong.softmax(1) - weak.softmax(1)).double().numpy()
    assert found == pytest.approx(0.2 * share * (difference**2).mean(), rel=1e-3)


def test_two_strong_views_of_one_crop_differ() -> None:
    """Each has its own appearance and its own rectangle; the pseudo-labels are mixed alike."""
    seen: list[Tensor] = []

    class Watching(Told):
        def __call__(self, supervised: list[Tensor], weak: Any, strong: Any, dropout: Any) -> list[MemberOutput]:
            seen.append(strong[0])
            return super().__call__(supervised, weak, strong, dropout)

    config = preset("uniMatch", unlabelled_views=UNDEFORMED, weak=SAME, strong=SAME, cutmix=1.0)
    bank = ExemplarBank([torch.randn(1, 6, 6)], [torch.eye(6).long() + torch.eye(6).roll(1, 1).long() * 2], [16, 16], torch.device("cpu"))
    crops = torch.stack([torch.full((1, 16, 16), value) for value in (1.0, 2.0)])
    weak, strong, perturbed = (torch.randn(count, 3, 16, 16) for count in (2, 4, 2))

    class Large(Watching):
        def __call__(self, supervised: list[Tensor], weak: Any, strong: Any, dropout: Any) -> list[MemberOutput]:
            seen.append(strong[0])
            return [MemberOutput([torch.zeros(2, 3, 16, 16)], [self.strong[0]], [perturbed], self.weak[0])]

    Objective(config, bank, Batches(2, 0, 2), SPACE, None, None, contextlib.nullcontext)(Large([weak], [strong]), crops, 1.0)
    first, second = seen[0].chunk(2)
    for view in (first, second):
        share = [float((image == other).float().mean()) for image, other in zip(view, (2.0, 1.0))]
        assert all(0 < value < 0.5 for value in share)  # each holds a rectangle of the other image
    assert not torch.equal(first, second)


# ------------------------------------------------------------------ running means


def simple(averaged: bool = True) -> MutualNetworks:
    return MutualNetworks(lambda: nn.Linear(1, 1), 1, averaged=averaged)


def test_running_mean_of_the_weights() -> None:
    networks = simple()
    (member,), (teacher,) = networks.members, networks.teachers
    assert torch.equal(teacher.weight, member.weight) and not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        member.weight.fill_(1.0)
        teacher.weight.fill_(0.0)
    networks.update_teachers(0.75)
    assert float(teacher.weight) == pytest.approx(0.25)
    networks.update_teachers(0.75)
    assert float(teacher.weight) == pytest.approx(0.4375) and float(member.weight) == 1.0
    networks.update_teachers(0.0)
    assert float(teacher.weight) == 1.0


def test_weights_with_running_means_load_where_none_are_kept() -> None:
    """As at inference, where the members predict; a training that goes on gets them back."""
    trained = simple()
    with torch.no_grad():
        trained.teachers[0].weight.fill_(7.0)
    inference, training = simple(averaged=False), simple()
    inference.load_state_dict(trained.state_dict())
    training.load_state_dict(trained.state_dict())
    assert torch.equal(inference.members[0].weight, trained.members[0].weight) and not len(inference.teachers)
    assert float(training.teachers[0].weight) == 7.0


def test_mean_teacher_is_taught_by_its_running_mean(workspace: Workspace) -> None:
    """At the first steps the mean is a true one: after step n it keeps 1 - 1/(n + 1) of itself."""
    workspace.configure(num_epochs=1, iterations_per_epoch=3, exemplar=[EXEMPLAR], seed=1)
    trainer = workspace.make(trainers.nnUNetTrainerCMEMS_meanTeacher)
    seen: list[Tensor] = []
    update = MutualNetworks.update_teachers

    def remember(networks: MutualNetworks, decay: float) -> None:
        seen.append(next(networks.members[0].parameters()).detach().clone())
        update(networks, decay)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MutualNetworks, "update_teachers", remember)
        trainer.run_training()
    networks = trainer.mutual_networks
    assert len(seen) == 3
    torch.testing.assert_close(next(networks.teachers[0].parameters()), torch.stack(seen).mean(0), rtol=1e-4, atol=1e-6)
    assert not torch.equal(seen[0], seen[2])
    assert {id(p) for p in networks.teachers.parameters()}.isdisjoint(id(p) for p in networks.members.parameters())


# ------------------------------------------------------------------ members of two architectures


def test_counterparts_have_as_many_convolutions() -> None:
    common = {"n_stages": 3, "features_per_stage": [8, 16, 32], "n_conv_per_stage_decoder": [2, 2]}
    plain = ("somewhere.PlainConvUNet", {**common, "n_conv_per_stage": [2, 2, 4]})
    residual = ("somewhere.ResidualEncoderUNet", {**common, "n_blocks_per_stage": [1, 1, 2]})
    assert counterpart(*plain) == residual and counterpart(*residual) == plain
    assert counterpart("somewhere.Other", {}) is None
    assert plain[1]["n_conv_per_stage"] == [2, 2, 4]  # untouched


def test_cross_teaching_from_training_to_prediction(workspace: Workspace, tmp_path: Path) -> None:
    workspace.configure(num_epochs=1, iterations_per_epoch=2, exemplar=[EXEMPLAR], seed=1)
    kind = trainers.nnUNetTrainerCMEMS_crossTeaching
    trainer = workspace.train(kind)
    members = list(trainer.mutual_networks.members)
    assert [type(member) for member in members] == [PlainConvUNet, ResidualEncoderUNet]

    weights = torch.load(Path(trainer.output_folder) / "checkpoint_final.pth", weights_only=False)["network_weights"]
    manager = trainer.configuration_manager
    loaded: Any = kind.build_network_architecture(trainer.plans_manager, manager, 1, trainer.label_manager.num_segmentation_heads, False)
    loaded.load_state_dict(weights)
    assert [type(member) for member in loaded.members] == [PlainConvUNet, ResidualEncoderUNet]
    trainer.set_deep_supervision_enabled(False)
    x = torch.randn(1, 1, *manager.patch_size)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x), trainer.network.eval()(x))

    model = Path(trainer.output_folder).parent
    left_out = [{"fold": "0", "member": 1}]
    assert export_model(str(model), ["0"], str(tmp_path / "both")) == ([0], left_out), "of the second, a stock nnU-Net cannot build"
    assert json.loads((tmp_path / "both" / "exported_from.json").read_text())["left_out"] == left_out
    with pytest.raises(CMEMSError, match="number 1 .* has another architecture than the plans"):
        export_model(str(model), ["0"], str(tmp_path / "second"), member=1)
    assert not (tmp_path / "second").exists()
    assert export_model(str(model), ["0"], str(tmp_path / "first"), member=0).folds == [0]


def test_by_default_members_have_two_architectures_where_there_are_two(workspace: Workspace) -> None:
    workspace.configure(architecture="auto")
    trainer = workspace.make()
    trainer.initialize()
    assert [type(member) for member in trainer.network.members] == [PlainConvUNet, ResidualEncoderUNet]
    (workspace.base / "cmems.json").unlink()
    assert workspace.make().config.architecture == "auto"
    assert workspace.make(trainers.nnUNetTrainerCMEMS_paper).config.architecture == "plans"


def test_mixed_members_need_an_architecture_that_has_a_counterpart(workspace: Workspace) -> None:
    workspace.configure(architecture="mixed")
    trainer = workspace.make()
    trainer.configuration_manager.configuration["architecture"]["network_class_name"] = "somewhere.Primus"
    with pytest.raises(CMEMSError, match="no counterpart of somewhere.Primus is known"):
        trainer.initialize()


# ------------------------------------------------------------------ cost


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # one network, 6 exemplar images, 3 unlabelled: 18 and the forward pass of the weak view
        ({"name": "fixMatch"}, 18 + 3 + 9),
        ({"name": "uniMatch"}, 18 + 3 + 2 * 9 + 7.5),
        ({"name": "meanTeacher"}, 18 + 3 + 9),
        ({"name": "cps"}, 2 * (18 + 3 + 9)),
        ({"name": "exemplarOnly"}, 18),
        ({"name": "fixMatch", "ema_decay": 0.9, "feature": trainers.nnUNetTrainerCMEMS_uniMatch.config.feature}, 18 + 3 + 9 + 7.5 + 1.5),
    ],
)
def test_passes_per_step(changes: dict[str, Any], expected: float) -> None:
    config = preset(**changes)
    assert passes_per_step(config, Batches(6, 0, 3 if config.uses_unlabelled else 0)) == pytest.approx(expected)


def test_passes_before_a_term_starts_do_not_count() -> None:
    """CMEMS: 2 (3 * 6 + 3 + 0.8 * (9 + 7.5)); with early steps the terms start after a fifth of these."""
    assert passes_per_step(CMEMSConfig(early_steps=0), Batches(3, 3, 3)) == pytest.approx(68.4)
    early = CMEMSConfig(early_steps=800, num_epochs=16)  # of 4,000
    assert passes_per_step(early, Batches(3, 3, 3)) == pytest.approx(2 * (21 + 0.96 * 16.5))
