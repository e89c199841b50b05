"""A student that learns from trained members: its loss, what it reads, and the stock model that it becomes."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONFIGURATION, DATASET_ID, EXEMPLAR, TRAINING, VALIDATION, Workspace
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from test_sources import move_to_unlabelled
from torch import Tensor, nn

from nnunetv2_cmems import trainers
from nnunetv2_cmems.commands import export
from nnunetv2_cmems.commands.export import export_model, export_student
from nnunetv2_cmems.config import CMEMSConfig, IntensityConfig, SpatialConfig
from nnunetv2_cmems.data.unlabelled import UnlabelledLoader
from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.method.distillation import Distillation, distillation_loss
from nnunetv2_cmems.method.exemplars import UNDEFORMED
from nnunetv2_cmems.method.label_space import Classes, LabelSpace, Regions
from nnunetv2_cmems.method.networks import MutualNetworks
from nnunetv2_cmems.trainers.distillation import Student, distil, student_config

CLASSES = Classes(("one", "two"))
REGIONS = Regions(("all", "part"), None, ((1, 2), (2,)))
SAME = IntensityConfig(probability=0.0)
DIMENSIONS = pytest.mark.parametrize("d", [2, 3])
SPACES = pytest.mark.parametrize("space", [CLASSES, REGIONS])


def heads(space: LabelSpace) -> int:
    return 3 if space is CLASSES else 2


def maps(rows: list[list[float]], d: int) -> Tensor:
    """(1, K, ..., n), a row a pixel."""
    return torch.tensor(rows).T.reshape(1, len(rows[0]), *[1] * (d - 1), len(rows)).contiguous()


# ------------------------------------------------------------------ loss


@DIMENSIONS
def test_loss_of_classes(d: int) -> None:
    """Two pixels; the first one's target is torn between two classes, the student's softmax (0.5, 0.25, 0.25)."""
    logits = maps([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]], d).log() + 7  # a softmax does not see what is added
    target = maps([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], d)
    expected = (0.5 * math.log(2) + 0.5 * math.log(4) + math.log(2)) / 2
    assert distillation_loss([logits], target, CLASSES).item() == pytest.approx(expected)


@DIMENSIONS
def test_loss_of_regions(d: int) -> None:
    logits = maps([[0.0, math.log(3)]], d)  # sigmoids 1/2 and 3/4
    expected = (math.log(2) + 0.25 * math.log(4 / 3) + 0.75 * math.log(4)) / 2
    assert distillation_loss([logits], maps([[0.9, 0.25]], d), REGIONS).item() == pytest.approx(expected)


@DIMENSIONS
@SPACES
def test_no_gradient_where_the_student_says_the_same(space: LabelSpace, d: int) -> None:
    logits = torch.randn(2, heads(space), *[4] * d, requires_grad=True)
    distillation_loss([logits], space.probabilities(logits).detach(), space).backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-7
    logits.grad = None
    distillation_loss([logits], space.probabilities(logits + torch.randn_like(logits)).detach(), space).backward()
    assert logits.grad.abs().max() > 1e-3


@DIMENSIONS
@SPACES
def test_coarse_resolutions_learn_means(space: LabelSpace, d: int) -> None:
    """Weights 2/3, 1/3 and 0; the coarse target is the mean of 2^d pixels."""
    fine, coarse, coarsest = (torch.randn(2, heads(space), *[n] * d) for n in (4, 2, 1))
    target = space.probabilities(torch.randn_like(fine))
    means = target.reshape(2, -1, *[2] * (2 * d)).mean([3 + 2 * axis for axis in range(d)])
    parts = [distillation_loss([logits], goal, space).item() for logits, goal in ((fine, target), (coarse, means))]
    assert distillation_loss([fine, coarse, coarsest], target, space).item() == pytest.approx((2 * parts[0] + parts[1]) / 3, rel=1e-5)


# ------------------------------------------------------------------ one step


class Pixelwise(nn.Module):
    """A network without neighbourhoods: logits of each pixel by its intensity."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        return torch.cat([images, -images], 1)


def distillation(teachers: nn.Module, **views: Any) -> Distillation:
    config = dataclasses.replace(CMEMSConfig(), unlabelled_views=UNDEFORMED, **views)
    return Distillation(config, teachers, (8, 8), (1.0, 1.0), REGIONS, contextlib.nullcontext)


def test_the_teachers_see_the_scan_and_the_student_a_strong_view_of_it() -> None:
    teachers, student = Pixelwise(), Pixelwise()
    crops = torch.randn(4, 1, 8, 8)
    distillation(teachers, cutmix=0.0)(student, crops, 0.5)
    assert torch.allclose(teachers.seen[0], crops, atol=1e-5), "UNDEFORMED reads the crop itself"
    assert not torch.allclose(student.seen[0], crops, atol=0.1)
    distillation(teachers, strong=SAME, cutmix=0.0)(student, crops, 0.5)
    assert torch.allclose(student.seen[1], crops, atol=1e-5)


def test_scans_and_targets_are_mixed_alike() -> None:
    """Networks that agree at every pixel agree on a mixture: the loss is the target's entropy, which cannot be undercut."""
    crops = torch.randn(4, 1, 8, 8)
    teachers, student = Pixelwise(), Pixelwise()
    step = distillation(teachers, strong=SAME, cutmix=1.0)(student, crops, 0.5)
    assert not torch.allclose(student.seen[0], crops, atol=0.1), "mixed"
    p = student(student.seen[0]).sigmoid()
    assert step.total.item() == pytest.approx(-(p * p.log() + (1 - p) * (1 - p).log()).mean().item(), rel=1e-5)
    assert step.terms["distillation"] == step.total


def test_a_student_has_its_teachers_views_and_what_prediction_asks() -> None:
    trained = dataclasses.replace(
        CMEMSConfig(), num_members=4, architecture="mixed", ema_decay=0.9, optimizer="sgd", initial_lr=0.5, num_epochs=7,
        exemplar_views=SpatialConfig(mirror=True), strong=SAME,
    )  # fmt: skip
    config = student_config(trained, 12, 3)
    assert (config.num_members, config.architecture, config.ema_decay) == (1, "plans", 0.0)
    assert (config.num_epochs, config.iterations_per_epoch, config.seed) == (1, 12, 3)
    assert config.unlabelled_views == dataclasses.replace(trained.unlabelled_views, mirror=True), "its predictions are mirrored"
    assert (config.optimizer, config.initial_lr, config.strong) == ("adamw", None, SAME), "nnU-Net's rate is none for AdamW"


# ------------------------------------------------------------------ from trained members to a stock model


def train(workspace: Workspace, trainer: Any = trainers.nnUNetTrainerCMEMS, **overrides: Any) -> Path:
    """The model folder of a short training with one exemplar."""
    workspace.configure(**{"exemplar": [EXEMPLAR], "iterations_per_epoch": 4, "log_hidden_accuracy": False, **overrides})
    return Path(workspace.train(trainer).output_folder).parent


def content(folder: Path, fold: int = 0) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(folder / f"fold_{fold}" / "checkpoint_final.pth", weights_only=False)
    return checkpoint


def stock(folder: Path) -> nnUNetPredictor:
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), (0,))
    return predictor


def members(workspace: Workspace, checkpoint: Mapping[str, Any]) -> MutualNetworks:
    """The trained networks, ready to predict."""
    trainer = workspace.make()
    manager = trainer.configuration_manager
    made: Any = trainer.build_network_architecture(trainer.plans_manager, manager, 1, trainer.label_manager.num_segmentation_heads, False)
    made.load_state_dict(checkpoint["network_weights"])
    loaded: MutualNetworks = made.eval()
    return loaded


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    return parser.parse_args(["-d", str(DATASET_ID), "-c", CONFIGURATION, *words])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_stock_model_that_predicts_as_the_members_do_together(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It needs no label, touches neither model nor data, and comes nearer to the mean than the member that it starts from."""
    model = train(workspace, strong={"probability": 0.0}, cutmix=0.0, unlabelled_views={"probability": 0.0})  # easy to imitate
    shutil.rmtree(workspace.base / "gt_segmentations")
    for label in workspace.images.glob("*_seg.b2nd"):
        label.unlink()
    before = {**files(model), **files(workspace.base)}
    out = tmp_path / "out"
    export.run(parse("-o", str(out), "--distil", "--distil-steps", "40", "-device", "cpu", "--seed", "2"))
    assert f"nnUNetv2_predict_from_modelfolder -i INPUT -o OUTPUT -m {out} -f 0\n" in capsys.readouterr().out
    assert {**files(model), **files(workspace.base)} == before

    assert sorted(path.name for path in out.glob("fold_*")) == ["fold_0"]
    checkpoint = torch.load(out / "fold_0" / "checkpoint_final.pth", weights_only=True)
    assert checkpoint["trainer_name"] == "nnUNetTrainer" and checkpoint["init_args"]["fold"] == 0
    note = json.loads((out / "exported_from.json").read_text())["folds"]["fold_0"]
    taught = [{"fold": "0", "members": 2, "checkpoint": "checkpoint_final.pth"}]
    assert note == {"distilled_from": taught, "scans": len(TRAINING), "steps": 40, "seed": 2}

    student, teachers = stock(out).network.eval(), members(workspace, content(model))
    images = torch.from_numpy(np.concatenate([workspace.image(case)[0] for case in VALIDATION]))[:, None, :32, :32]
    with torch.no_grad():
        together, first, found = (net(images).softmax(1) for net in (teachers, teachers.members[0], student))
    distance, before_that = ((net - together).abs().mean().item() for net in (found, first))
    assert distance < 0.85 * before_that


def test_refined_predictions_and_running_means_teach_as_they_are(workspace: Workspace, tmp_path: Path) -> None:
    """What a checkpoint holds besides its members, as those of the default do, is left out of the student."""
    round_of_labels = {"at": [0.5], "arranged_only": False}
    model = train(workspace, num_epochs=2, iterations_per_epoch=1, ema_decay=0.9, scan_labels=round_of_labels)
    taught = {key.split(".")[0] for key in content(model)["network_weights"]}
    assert taught == {"members", "teachers", "refinement"}
    assert export_student(str(model), [0], str(tmp_path / "out"), steps=1, device="cpu").folds == [0]
    names = stock(tmp_path / "out").network.state_dict().keys()
    assert content(tmp_path / "out")["network_weights"].keys() == names


def test_one_seed_gives_one_student(workspace: Workspace, tmp_path: Path) -> None:
    model = train(workspace)
    found = []
    for number, seed in enumerate((1, 1, 2)):
        export_student(str(model), [0], str(tmp_path / str(number)), steps=2, device="cpu", seed=seed)
        found.append(content(tmp_path / str(number))["network_weights"])
    one, again, other = found
    assert all(torch.equal(again[key], value) for key, value in one.items())
    assert any(not torch.equal(other[key], value) for key, value in one.items())


def test_members_of_two_architectures_teach_one_of_the_plans(workspace: Workspace, tmp_path: Path) -> None:
    model = train(workspace, trainers.nnUNetTrainerCMEMS_crossTeaching)
    assert [type(member) for member in members(workspace, content(model)).members] == [PlainConvUNet, ResidualEncoderUNet]
    assert export_model(str(model), [0], str(tmp_path / "both")).folds == [0], "the first alone"
    assert export_student(str(model), [0], str(tmp_path / "out"), steps=1, device="cpu").folds == [0]
    assert type(stock(tmp_path / "out").network) is PlainConvUNet


def test_all_members_of_several_folds_teach_on_the_scans_of_all(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also folds of one member each, and scans that lie in imagesUn by now."""
    splits = [{"train": TRAINING, "val": VALIDATION}, {"train": [*TRAINING[:2], *VALIDATION], "val": TRAINING[2:]}]
    (workspace.base / "splits_final.json").write_text(json.dumps(splits))
    model = train(workspace, num_members=1)
    workspace.train(fold=1)
    move_to_unlabelled(workspace, [VALIDATION[0]])
    seen: dict[str, Any] = {}
    learn_from, loader = Student.learn_from, UnlabelledLoader.__init__

    def watched(self: Student, weights: Mapping[str, Tensor], config: CMEMSConfig) -> None:
        learn_from(self, weights, config)
        seen["teachers"] = self._objective.teachers.members
        seen["start"] = {key: value.clone() for key, value in self.mutual_networks.members[0].state_dict().items()}

    def read(self: UnlabelledLoader, cases: Mapping[str, Any], *rest: Any, **more: Any) -> None:
        loader(self, cases, *rest, **more)
        seen["folders"] = {case: Path(source.folder).name for case, source in cases.items()}

    monkeypatch.setattr(Student, "learn_from", watched)
    monkeypatch.setattr(UnlabelledLoader, "__init__", read)
    export_student(str(model), [0, 1], str(tmp_path / "out"), steps=1, device="cpu")
    assert seen["folders"] == {
        case: f"nnUNetPlans_{CONFIGURATION}" + ("_unlabelled" if case == VALIDATION[0] else "") for case in [*TRAINING, *VALIDATION]
    }
    for fold, teacher in enumerate(seen["teachers"]):
        expected = members(workspace, content(model, fold)).members[0].state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in teacher.state_dict().items())
    assert len(seen["teachers"]) == 2
    first = seen["teachers"][0].state_dict()
    assert all(torch.equal(value, first[key]) for key, value in seen["start"].items()), "the student starts from the first one"


def test_an_end_in_the_middle_leaves_nothing_but_a_sentence(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, train_step, out = train(workspace), Student.train_step, tmp_path / "out"
    folders: list[int] = []

    def end_with(error: BaseException) -> None:
        def step(self: Student, batch: dict) -> dict:
            folders.append(len(list(tmp_path.glob("out.*.tmp"))))
            if len(folders) % 3 == 0:
                raise error
            return train_step(self, batch)

        monkeypatch.setattr(Student, "train_step", step)
        export_student(str(model), [0], str(out), steps=5, device="cpu")

    with pytest.raises(KeyboardInterrupt):
        end_with(KeyboardInterrupt())
    with pytest.raises(CMEMSError, match="memory ran out while the student was trained"):
        end_with(MemoryError())
    with pytest.raises(CMEMSError, match="process that reads images died.*nnUNet_n_proc_DA"):
        end_with(RuntimeError("One or more background workers are no longer alive. Exiting."))
    assert folders == [1] * 9 and not list(tmp_path.glob("out*"))


def test_a_loss_that_is_not_finite(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = train(workspace)
    monkeypatch.setattr("nnunetv2_cmems.method.distillation.distillation_loss", lambda scales, *_: (scales[0] * torch.nan).sum())
    with pytest.raises(CMEMSError, match=r"student's loss is not a finite number any more \(step \d+ of 20\); give another --seed"):
        export_student(str(model), [0], str(tmp_path / "out"), steps=20, device="cpu")
    assert not list(tmp_path.glob("out*"))


# ------------------------------------------------------------------ refusals


def refused(folder: Path, *needles: str, **arguments: Any) -> None:
    out = folder.parent / "out"
    with pytest.raises(CMEMSError, match=".*".join(needles)):
        export_student(str(folder), [0], str(out), **{"steps": 1, "device": "cpu", **arguments})
    assert not list(out.parent.glob("out*"))


def test_refusals(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = train(workspace)
    with pytest.raises(CMEMSError, match="--distil.*--member.*leave one of the two out"):
        export.run(parse("-o", "out", "--distil", "--member", "0"))
    for words in (("--distil-steps", "0"), ("--distil-steps", "x"), ("-device", "tpu")):
        with pytest.raises(SystemExit):
            parse("-o", "out", *words)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(model, "finds no cuda device", "-device", device="cuda")

    record = model / "fold_0" / "cmems_config.json"
    recorded = json.loads(record.read_text())
    record.write_text(json.dumps({**recorded, "unlabelled": []}))
    refused(model, "cmems_config.json lists no unlabelled scans", "without --distil")
    record.write_text("{")
    refused(model, "cmems_config.json", "cannot be read", "without --distil")
    record.unlink()
    refused(model, "cmems_config.json", "cannot be read", "No such file")
    record.write_text(json.dumps({**recorded, "unlabelled": [*recorded["unlabelled"], "patient999"]}))
    refused(model, "'patient999' is not in", "any more", "plan_and_preprocess again", "without --distil")
    record.write_text(json.dumps(recorded))

    workspace.set_image(TRAINING[0], workspace.image(TRAINING[0])[:, :, :-8])
    refused(model, TRAINING[0], "was preprocessed for other plans")
    shutil.rmtree(workspace.images)
    refused(model, "does not exist", "not preprocessed", "without --distil")
    monkeypatch.delenv("nnUNet_preprocessed")
    refused(model, "nnUNet_preprocessed is not set")


def test_one_network_has_nothing_to_distil(workspace: Workspace) -> None:
    refused(train(workspace, trainers.nnUNetTrainerCMEMS_exemplarOnly), "holds one network", "nothing to distil", "without --distil")


def test_networks_of_another_architecture_than_the_plans(workspace: Workspace) -> None:
    init_args = {**workspace.make().my_init_kwargs, "plans": workspace.plans(), "cmems": {"config": {}}}
    wrong = {f"members.{i}.weight": torch.zeros(1) for i in range(2)}
    with pytest.raises(CMEMSError, match="not of their plans' architecture"):
        distil([wrong], init_args, TRAINING, steps=1, device="cpu")


# ------------------------------------------------------------------ what a prediction costs


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_prediction_passes_each_tile_through_each_network_once(workspace: Workspace, count: int) -> None:
    trainer = workspace.make()
    manager, heads = trainer.configuration_manager, trainer.label_manager.num_segmentation_heads
    made: Any = trainer.build_network_architecture(trainer.plans_manager, manager, 1, heads, False, num_members=count)
    passes = [0] * count
    for number, member in enumerate(made.members):

        def counted(_: nn.Module, images: tuple[Tensor], __: Any, number: int = number) -> None:
            passes[number] += len(images[0])

        member.register_forward_hook(counted)
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.manual_initialization(made, trainer.plans_manager, manager, [made.state_dict()], trainer.dataset_json, "", None)
    image = torch.randn(1, 3, 48, 40)
    predictor.predict_logits_from_preprocessed_data(image)
    tiles = len(predictor._internal_get_sliding_window_slicers(image.shape[1:]))
    assert tiles > 3 and passes == [tiles] * count
