"""The trainer in nnU-Net's life cycle: what it reads, what it writes, and how it goes on."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from conftest import CASES, EXEMPLAR, PATCH, TRAINING, VALIDATION, Workspace, logs, same_weights, weights
from nnunetv2.run import run_training
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch._dynamo import OptimizedModule

from nnunetv2_cmems import trainers
from nnunetv2_cmems.config import CMEMSConfig, ScanLabelsConfig, SynthesisConfig, TermConfig
from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.trainers import nnUNetTrainerCMEMS, nnUNetTrainerCMEMS_exemplarOnly

UNLABELLED = [case for case in TRAINING if case != EXEMPLAR["case"]]
OFF = TermConfig(enabled=False)
ROUNDS: dict[str, Any] = {"num_epochs": 2, "exemplar": [EXEMPLAR], "scan_labels": {"at": [0.5]}}


def noise_in(workspace: Workspace, cases: list[str]) -> None:
    rng = np.random.default_rng(0)
    for case in cases:
        label = workspace.label(case)
        workspace.set_label(case, rng.integers(0, 4, label.shape).astype(label.dtype))


def no_files_in(workspace: Workspace, cases: list[str]) -> None:
    for case in cases:
        (workspace.images / f"{case}_seg.b2nd").unlink()
        (workspace.base / "gt_segmentations" / f"{case}.nii.gz").unlink()
        workspace.change_properties(case, class_locations={})


def garbage_in(workspace: Workspace, cases: list[str]) -> None:
    for case in cases:
        (workspace.images / f"{case}_seg.b2nd").write_bytes(b"no label at all" * 50)


def damage_in(workspace: Workspace, cases: list[str]) -> None:
    """Files that can be opened, but whose middle cannot be decompressed."""
    for case in cases:
        path = workspace.images / f"{case}_seg.b2nd"
        content = bytearray(path.read_bytes())
        content[len(content) // 4 : -len(content) // 4] = b"\xaa" * len(content[len(content) // 4 : -len(content) // 4])
        path.write_bytes(content)


def without_hidden_accuracy(logged: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {key: values for key, values in logged.items() if not key.startswith(("pseudo_label", "scan_label_dice"))}


# ------------------------------------------------------------------ what is read


def test_labels_of_all_other_training_cases_are_unread(workspace: Workspace) -> None:
    """Noise in their place: the same run; only the logged accuracy of the pseudo-labels sees it."""
    workspace.configure(exemplar=[EXEMPLAR], num_epochs=2, tau=0.3)
    before = workspace.train()
    noise_in(workspace, UNLABELLED)
    after = workspace.train()
    assert same_weights(weights(before), weights(after))
    np.testing.assert_equal(without_hidden_accuracy(logs(after)), without_hidden_accuracy(logs(before)))
    assert logs(after)["pseudo_label_accuracy"] != logs(before)["pseudo_label_accuracy"]


@pytest.mark.parametrize("spoil", [no_files_in, garbage_in, damage_in])
def test_training_needs_no_label_but_the_exemplars(workspace: Workspace, spoil: Callable[[Workspace, list[str]], None]) -> None:
    workspace.configure(exemplar=[EXEMPLAR], tau=0.3)
    before = workspace.train()
    spoil(workspace, UNLABELLED)
    after = workspace.train()
    assert same_weights(weights(before), weights(after))
    np.testing.assert_equal(logs(after), without_hidden_accuracy(logs(before)))
    assert "pseudo_label_accuracy" in logs(before)


def test_automatic_exemplar_is_the_same_with_noise_for_labels(workspace: Workspace) -> None:
    before = workspace.train()
    assert before.exemplars[0].case in TRAINING
    noise_in(workspace, [case for case in TRAINING if case != before.exemplars[0].case])
    after = workspace.train()
    assert after.exemplars[0].spec == before.exemplars[0].spec
    assert same_weights(weights(before), weights(after))


def test_the_exemplars_label_is_read(workspace: Workspace) -> None:
    """The counterpart of the tests above: they would also pass if nothing were learned from any label."""
    workspace.configure(exemplar=[EXEMPLAR])
    before = workspace.train()
    noise_in(workspace, [EXEMPLAR["case"]])  # type: ignore[list-item]
    assert not same_weights(weights(before), weights(workspace.train()))


def test_seed_decides_the_run(workspace: Workspace) -> None:
    first, again = (weights(workspace.train()) for _ in range(2))
    assert same_weights(first, again)
    workspace.configure(seed=2)
    assert not same_weights(first, weights(workspace.train()))


def test_members_are_drawn_afresh(workspace: Workspace) -> None:
    workspace.configure(num_members=3)
    trainer = workspace.make()
    trainer.initialize()
    members = trainer.network.members
    assert len(members) == 3
    for a, b in ((0, 1), (0, 2), (1, 2)):
        for (name, one), other in zip(members[a].named_parameters(), members[b].parameters()):
            assert one.ndim < 4 or not torch.equal(one, other), name  # all convolutions differ; norms and biases begin at constants


def test_config_file_of_the_variable_wins(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace.configure(num_epochs=7)
    (tmp_path / "mine.json").write_text(json.dumps({"num_epochs": 3, "iterations_per_epoch": 11, "val_iterations_per_epoch": 5}))
    monkeypatch.setenv("nnUNet_cmems_config", str(tmp_path / "mine.json"))
    trainer = workspace.make()
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch) == (3, 11, 5)


# ------------------------------------------------------------------ what is written


def test_validation_uses_the_folds_real_labels(workspace: Workspace, pools_are_threads: None) -> None:
    trainer = workspace.train()
    trainer.perform_actual_validation(save_probabilities=True)
    folder = workspace.fold() / "validation"
    summary = json.loads((folder / "summary.json").read_text())
    assert sorted(Path(entry["prediction_file"]).name for entry in summary["metric_per_case"]) == [f"{case}.nii.gz" for case in VALIDATION]
    for entry in summary["metric_per_case"]:
        name = Path(entry["prediction_file"]).name
        mask, truth = (sitk.GetArrayFromImage(sitk.ReadImage(str(f / name))) for f in (folder, workspace.raw / "labelsTr"))
        assert mask.shape == truth.shape
        assert (folder / name.replace(".nii.gz", ".npz")).is_file()  # --npz
        for label in (1, 2, 3):
            expected = 2 * ((mask == label) & (truth == label)).sum() / ((mask == label).sum() + (truth == label).sum())
            assert entry["metrics"][str(label)]["Dice"] == pytest.approx(expected)
    assert trainer.mutual_networks.deep_supervision  # switched on again, as after nnU-Net's own validation


def test_what_was_trained_is_written_down(workspace: Workspace) -> None:
    workspace.configure(exemplar=[EXEMPLAR], tau=0.8, synthesis={"blend": 2.0})
    trainer = workspace.train()
    fold = workspace.fold()
    record = json.loads((fold / "cmems_config.json").read_text())
    assert record["config"] == trainer.config.to_dict()
    assert (record["config"]["tau"], record["config"]["synthesis"]["blend"]) == (0.8, 2.0)
    assert record["exemplars"] == [{**EXEMPLAR, "axis": "z"}]
    assert record["unlabelled"] == UNLABELLED
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["init_args"]["cmems"] == {key: record[key] for key in ("config", "exemplars")}
    assert checkpoint["trainer_name"] == "nnUNetTrainerCMEMS"
    assert same_weights(checkpoint["network_weights"], weights(trainer))
    assert checkpoint["inference_allowed_mirroring_axes"] is None  # the views are not mirrored by default
    assert not list(fold.glob("*.tmp"))
    assert {path.name for path in fold.parent.iterdir()} >= {"plans.json", "dataset.json", "dataset_fingerprint.json"}


def test_mirroring_at_inference_follows_the_exemplars_views(workspace: Workspace) -> None:
    workspace.configure(exemplar_views={"mirror": True})
    assert workspace.train().inference_allowed_mirroring_axes == (0, 1)


@pytest.mark.parametrize(
    ("config", "change"),
    [
        ({"organ_scale": [1, 1]}, False),
        ({"organ_scale": [0.5, 2]}, True),
        (ROUNDS, True),
        ({**ROUNDS, "organ_scale": [1, 1]}, False),
        ({**ROUNDS, "scan_labels": {"at": [0.5], "arranged_only": False}}, False),
        ({**ROUNDS, "exemplar": [{**EXEMPLAR, "slice": EXEMPLAR["slice"] + step} for step in (0, 1)]}, False),
        ({}, False),
    ],
    ids=["as annotated", "asked for", "one slice", "not asked for", "all scans teach", "two slices of a case", "no rounds"],
)
def test_organs_of_exemplar_and_synthetic_images_change_their_sizes(workspace: Workspace, config: dict[str, Any], change: bool) -> None:
    still = {"probability": 0.0, "elastic": 0.0}
    workspace.configure(**config, exemplar_views=still, synthesis={"joint": still, "separate": still})
    trainer = workspace.train()
    labels = torch.cat([trainer._objective.supervised_batch(None).labels for _ in range(8)])
    sizes = {int((label == label.max()).sum()) for label in labels if label.any()}
    assert (len(sizes) > 5) if change else (len(sizes) <= 2), "as annotated, in one slice or two"
    log = next(Path(trainer.output_folder).glob("training_log_*.txt")).read_text()
    assert ("each organ is zoomed on its own, by 0.5 to 2 ('organ_scale')" in log) == change


def test_fold_all(workspace: Workspace) -> None:
    workspace.train(fold="all")
    record = json.loads((workspace.fold(fold="all") / "cmems_config.json").read_text())
    assert sorted([*record["unlabelled"], record["exemplars"][0]["case"]]) == CASES
    assert (workspace.fold(fold="all") / "checkpoint_final.pth").is_file()


def test_disabled_checkpointing_writes_none_and_leaves_what_is_there(workspace: Workspace) -> None:
    fold = workspace.fold()
    fold.mkdir(parents=True)
    for name in ("checkpoint_best.pth", "checkpoint_final.pth"):
        (fold / name).write_bytes(b"whole")
        (fold / f"{name}.tmp").write_bytes(b"half")  # a process was killed while it wrote
    trainer = workspace.make()
    trainer.disable_checkpointing = True
    trainer.run_training()
    assert {path.name: path.read_bytes() for path in fold.glob("*.pth")} == {
        "checkpoint_best.pth": b"whole",
        "checkpoint_final.pth": b"whole",
    }


def test_without_mutual_teaching_there_is_no_unlabelled_stream(workspace: Workspace) -> None:
    trainer = workspace.train(nnUNetTrainerCMEMS_exemplarOnly)
    assert next(trainer.dataloader_train) == {}
    assert trainer.hidden_labels is None


# ------------------------------------------------------------------ presets


def test_each_preset_changes_only_the_config() -> None:
    default = CMEMSConfig()
    as_published: dict[str, Any] = {"architecture": "plans", "competence": False, "scan_labels": ScanLabelsConfig(at=()), "early_steps": 0}
    peer: dict[str, Any] = {**as_published, "synthetic": OFF, "feature": OFF}
    same_views: dict[str, Any] = {"strong": default.weak, "cutmix": 0.0}
    alone: dict[str, Any] = {"num_members": 1, "synthetic": OFF, "image": OFF, "feature": OFF, "early_steps": 0}
    slowly = TermConfig(weight=0.2, rampup=1.0, rampup_shape="gaussian")
    expected: dict[str, dict[str, Any]] = {
        "nnUNetTrainerCMEMS_paper": {
            **as_published, "optimizer": "sgd", "final_class_weighting": 1.0, "synthesis": SynthesisConfig(complete_only=False),
        },
        "nnUNetTrainerCMEMS_exemplarOnly": alone,
        "nnUNetTrainerCMEMS_allLabels": {**alone, "exemplar": "all"},
        "nnUNetTrainerCMEMS_noSynthesis": {"synthetic": OFF},
        "nnUNetTrainerCMEMS_imageOnly": {"feature": OFF},
        "nnUNetTrainerCMEMS_featureOnly": {"image": OFF},
        "nnUNetTrainerCMEMS_meanTeacher": {
            **peer, **same_views, "num_members": 1, "ema_decay": 0.99, "consistency": "mean_squared_error", "tau": 0.0, "image": slowly,
        },
        "nnUNetTrainerCMEMS_cps": {
            **peer, **same_views, "tau": 0.0, "image": TermConfig(), "pseudo_dice_weight": 0.0, "cutmix": 1.0,
        },
        "nnUNetTrainerCMEMS_fixMatch": {**peer, "num_members": 1, "image": TermConfig(), "pseudo_dice_weight": 0.0, "cutmix": 0.0},
        "nnUNetTrainerCMEMS_uniMatch": {
            **as_published, "synthetic": OFF, "num_members": 1, "num_strong": 2, "image": TermConfig(), "feature": TermConfig(),
            "pseudo_cross_entropy_weight": 0.0, "pseudo_dice": "all",
        },
        "nnUNetTrainerCMEMS_crossTeaching": {
            **peer, "architecture": "mixed", **same_views, "tau": 0.0, "image": slowly, "pseudo_cross_entropy_weight": 0.0,
            "pseudo_dice": "all",
        },
    }  # fmt: skip
    assert set(trainers.__all__) == {"nnUNetTrainerCMEMS", *expected}
    for name, changes in expected.items():
        preset = getattr(trainers, name)
        assert preset.config == dataclasses.replace(default, **changes), name
        assert {key for key in vars(preset) if not key.startswith("__")} == {"config"}, name
        assert issubclass(preset, nnUNetTrainerCMEMS)


@pytest.mark.parametrize(
    ("name", "members", "terms"),
    [
        ("nnUNetTrainerCMEMS_paper", 2, {"supervised", "synthetic", "image", "feature"}),
        ("nnUNetTrainerCMEMS", 2, {"supervised", "synthetic", "image", "feature"}),
        ("nnUNetTrainerCMEMS_exemplarOnly", 1, {"supervised"}),
        ("nnUNetTrainerCMEMS_noSynthesis", 2, {"supervised", "image", "feature"}),
        ("nnUNetTrainerCMEMS_imageOnly", 2, {"supervised", "synthetic", "image"}),
        ("nnUNetTrainerCMEMS_featureOnly", 2, {"supervised", "synthetic", "feature"}),
        ("nnUNetTrainerCMEMS_allLabels", 1, {"supervised"}),
        ("nnUNetTrainerCMEMS_meanTeacher", 1, {"supervised", "image"}),
        ("nnUNetTrainerCMEMS_cps", 2, {"supervised", "image"}),
        ("nnUNetTrainerCMEMS_fixMatch", 1, {"supervised", "image"}),
        ("nnUNetTrainerCMEMS_uniMatch", 1, {"supervised", "image", "feature"}),
    ],
)
def test_each_preset_trains(workspace: Workspace, name: str, members: int, terms: set[str]) -> None:
    trainer = workspace.make(getattr(trainers, name))
    trainer.initialize()
    begin = weights(trainer)
    trainer.run_training()
    end = weights(trainer)
    assert len(trainer.network.members) == members
    assert {key[5:] for key in logs(trainer) if key.startswith("loss/")} == terms
    assert all(torch.isfinite(value).all() for value in end.values())
    for member in range(members):
        keys = [key for key in end if key.startswith(f"members.{member}.") and key.endswith("conv.weight")]
        assert keys and not any(torch.equal(begin[key], end[key]) for key in keys)
    assert (workspace.fold(name) / "checkpoint_final.pth").is_file()


# ------------------------------------------------------------------ going on


@pytest.mark.parametrize(("warmup", "early"), [(0.25, 0), (0.5, 4)], ids=["of all steps", "of early steps"])
def test_the_learning_rate_warms_up_and_decays_per_step(workspace: Workspace, warmup: float, early: int) -> None:
    """Over 2 of 8 steps."""
    workspace.configure(num_epochs=2, iterations_per_epoch=4, lr_warmup=warmup, initial_lr=0.01, early_steps=early)
    trainer, rates = workspace.make(), []
    step = trainer.train_step
    trainer.train_step = lambda batch: (step(batch), rates.append(trainer.optimizer.param_groups[0]["lr"]))[0]
    trainer.run_training()
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    expected = [0.01 * (1 - i / 8) ** 0.9 * min(1.0, (i + 1) / 2) for i in range(8)]
    assert rates == pytest.approx(expected)


def test_a_resumed_run_has_the_learning_rate_of_its_progress(workspace: Workspace) -> None:
    workspace.configure(num_epochs=3)
    workspace.interrupted(2)
    resumed = workspace.resume()
    resumed.run_training()
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(0.008 * (1 - 5 / 6) ** 0.9)


def test_wide_networks_get_a_lower_rate() -> None:
    config = CMEMSConfig()
    assert config.learning_rate(8) == pytest.approx(0.008) and config.learning_rate(32) == pytest.approx(0.002)
    assert dataclasses.replace(config, optimizer="sgd").learning_rate(32) == 0.01
    assert dataclasses.replace(config, initial_lr=0.3).learning_rate(32) == 0.3


def test_sgd_is_nnunets_own(workspace: Workspace) -> None:
    workspace.configure(optimizer="sgd")
    trainer = workspace.make()
    trainer.initialize()
    own = nnUNetTrainer.configure_optimizers(trainer)
    assert type(trainer.optimizer) is type(own[0]) and trainer.optimizer.defaults == own[0].defaults
    assert type(trainer.lr_scheduler) is type(own[1]) and trainer.initial_lr == 0.01


def test_class_weights_move_to_their_final_value(workspace: Workspace) -> None:
    workspace.configure(class_weighting=1.0, final_class_weighting=0.0)
    trainer = workspace.make()
    trainer.on_train_start()
    weights_at = trainer._objective.supervised_weights
    assert weights_at(0.0)[0] < weights_at(0.5)[0] < 1.0 and weights_at(0.0)[1:].min() > 1.0
    assert weights_at(1.0).tolist() == pytest.approx([1.0] * 4)


def test_continued_training_counts_on(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace.configure(num_epochs=3)
    stopped = workspace.interrupted(epochs=2)
    monkeypatch.setattr("nnunetv2_cmems.trainers.cmems.choose_exemplar", lambda *_: pytest.fail("the exemplar was chosen anew"))
    resumed = workspace.resume()
    assert resumed.current_epoch == 2
    assert same_weights(weights(resumed), weights(stopped))
    momentum, expected = (
        [state["exp_avg"] for state in trainer.optimizer.state_dict()["state"].values()] for trainer in (resumed, stopped)
    )
    assert momentum and all(torch.equal(a, b) for a, b in zip(momentum, expected, strict=True))
    resumed.run_training()
    assert [exemplar.spec for exemplar in resumed.exemplars] == [exemplar.spec for exemplar in stopped.exemplars]
    assert resumed.current_epoch == 3
    before, after = logs(stopped), logs(resumed)
    for key, values in before.items():
        assert len(after[key]) == 3, key
        np.testing.assert_equal(after[key][:2], values[:2])
    assert (workspace.fold() / "checkpoint_final.pth").is_file()
    assert not (workspace.fold() / "checkpoint_latest.pth").exists()


def test_checkpoint_that_is_older_than_a_key_of_the_config_goes_on(workspace: Workspace) -> None:
    workspace.configure(num_epochs=2)
    workspace.interrupted(epochs=1)
    path = workspace.fold() / "checkpoint_latest.pth"
    content = torch.load(path, weights_only=False)
    del content["init_args"]["cmems"]["config"]["num_strong"], content["init_args"]["cmems"]["config"]["image"]["rampup_shape"]
    torch.save(content, path)
    resumed = workspace.resume()
    resumed.run_training()
    assert resumed.current_epoch == 2


def test_continuing_a_finished_training_changes_nothing(workspace: Workspace) -> None:
    finished = workspace.train()
    resumed = workspace.resume()
    resumed.run_training()
    assert same_weights(weights(resumed), weights(finished))
    assert all(len(values) == 1 for values in logs(resumed).values())


def test_continuing_without_a_checkpoint_begins(workspace: Workspace) -> None:
    resumed = workspace.resume()
    resumed.run_training()
    assert resumed.current_epoch == 1


def test_validation_alone_uses_the_config_of_the_checkpoint(workspace: Workspace, pools_are_threads: None) -> None:
    workspace.configure(num_members=1)
    trained = workspace.train()
    trained.perform_actual_validation()
    masks = {path.name: path.read_bytes() for path in (workspace.fold() / "validation").glob("*.nii.gz")}
    for path in (workspace.fold() / "validation").iterdir():
        path.unlink()
    workspace.configure(num_members=2, num_epochs=9, seed=5, tau=0.5)
    validated = workspace.make()
    run_training.maybe_load_checkpoint(validated, continue_training=False, validation_only=True)
    assert validated.config == trained.config
    assert same_weights(weights(validated), weights(trained))
    validated.perform_actual_validation()
    assert {path.name: path.read_bytes() for path in (workspace.fold() / "validation").glob("*.nii.gz")} == masks
    assert len(masks) == 2


def test_best_checkpoint_can_be_validated_after_training(workspace: Workspace) -> None:
    """What ``--val_best`` does."""
    workspace.configure(num_epochs=2)
    trainer = rigged(workspace.make(), agreement=[0.9, 0.1], dice=[0.1, 0.9])
    trainer.run_training()
    last = weights(trainer)
    trainer.load_checkpoint(str(workspace.fold() / "checkpoint_best.pth"))
    assert not same_weights(weights(trainer), last)
    assert trainer.current_epoch == 1


def test_pretrained_weights_fill_every_member(workspace: Workspace, tmp_path: Path) -> None:
    workspace.configure(num_members=3)
    stock = workspace.make(nnUNetTrainer)
    stock.initialize()
    stock.save_checkpoint(str(tmp_path / "stock.pth"))
    trainer = workspace.make()
    run_training.maybe_load_checkpoint(trainer, False, False, str(tmp_path / "stock.pth"))
    wanted = stock.network.state_dict()
    assert [set(member.state_dict()) == set(wanted) for member in trainer.network.members] == [True, False, True]
    for member in trainer.network.members[::2]:  # the other one is of another architecture, and begins afresh
        for key, value in member.state_dict().items():
            assert torch.equal(value, wanted[key]) != (".seg_layers." in key and key.endswith("weight")), key  # nnU-Net leaves those out
    trainer.run_training()

    plain = workspace.make(nnUNetTrainer)  # nnU-Net's own trainer, in the same process, is served as before
    run_training.maybe_load_checkpoint(plain, False, False, str(tmp_path / "stock.pth"))
    assert all(torch.equal(value, wanted[key]) for key, value in plain.network.state_dict().items() if ".seg_layers." not in key)

    again = workspace.make()  # from a checkpoint of ours: member by member
    run_training.maybe_load_checkpoint(again, False, False, str(workspace.fold() / "checkpoint_final.pth"))
    wanted = trainer.network.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in again.network.state_dict().items() if ".seg_layers." not in key)


def test_network_for_inference_follows_the_weights(workspace: Workspace) -> None:
    """nnU-Net's prediction builds the network without a config."""
    workspace.configure(num_members=3)
    trained = workspace.make()
    trained.initialize()
    plans = PlansManager(workspace.plans())
    network = nnUNetTrainerCMEMS.build_network_architecture(plans, plans.get_configuration(trained.configuration_name), 1, 4, False)
    network.load_state_dict(trained.network.state_dict())
    image = torch.randn(1, 1, *PATCH)
    trained.set_deep_supervision_enabled(False)
    with torch.no_grad():
        separate = torch.stack([member(image) for member in trained.network.eval().members])
        assert torch.allclose(network.eval()(image), separate.mean(0), atol=1e-6)


# ------------------------------------------------------------------ the best checkpoint


def rigged(trainer: Any, agreement: list[float], dice: list[float]) -> Any:
    """``trainer``, which is told the members' agreement and the validation Dice of each epoch."""
    train_step, validation_step = trainer.train_step, trainer.validation_step

    def agreed(batch: dict) -> dict:
        return {**train_step(batch), "agreement": np.array([[agreement[trainer.current_epoch]] * 3, [1.0] * 3])}

    def validated(batch: dict) -> dict:
        value = dice[trainer.current_epoch]
        return {**validation_step(batch), "tp_hard": np.full(3, value), "fp_hard": np.full(3, 2 - 2 * value), "fn_hard": np.zeros(3)}

    trainer.train_step, trainer.validation_step = agreed, validated
    return trainer


def best_epoch(workspace: Workspace) -> int:
    return int(torch.load(workspace.fold() / "checkpoint_best.pth", weights_only=False)["current_epoch"]) - 1


def test_best_checkpoint_follows_the_members_agreement(workspace: Workspace) -> None:
    workspace.configure(num_epochs=3)
    trainer = rigged(workspace.make(), agreement=[0.5, 0.9, 0.1], dice=[0.1, 0.2, 0.9])
    trainer.run_training()
    np.testing.assert_allclose(logs(trainer)["mean_fg_dice"], [0.1, 0.2, 0.9], rtol=1e-6)
    np.testing.assert_allclose(logs(trainer)["agreement/mean"], [0.5, 0.9, 0.1], rtol=1e-6)
    assert best_epoch(workspace) == 1


def test_best_checkpoint_follows_validation_labels_only_when_asked_to(workspace: Workspace) -> None:
    workspace.configure(num_epochs=3, best_checkpoint="validation_dice")
    rigged(workspace.make(), agreement=[0.1, 0.2, 0.9], dice=[0.5, 0.9, 0.1]).run_training()
    assert best_epoch(workspace) == 1


def test_best_checkpoint_is_still_the_best_after_continuing(workspace: Workspace) -> None:
    """The checkpoint must carry what the agreement was before."""
    workspace.configure(num_epochs=2)
    told = {"agreement": [0.9, 0.5], "dice": [0.1, 0.2]}
    workspace.interrupted(epochs=1, trainer=rigged(workspace.make(), **told))
    rigged(workspace.resume(), **told).run_training()
    assert best_epoch(workspace) == 0


# ------------------------------------------------------------------ writing checkpoints


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file")])
def test_full_disk_leaves_the_last_checkpoint_whole(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    workspace.configure(num_epochs=3)
    trainer = workspace.interrupted(epochs=1)
    latest = workspace.fold() / "checkpoint_latest.pth"
    before = latest.read_bytes()

    def fill(_: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        Path(file).write_bytes(before[: len(before) // 2])
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fill)
        with pytest.raises(CMEMSError, match=r"checkpoint_latest\.pth cannot be written .*(No space left|failed writing).*untouched.*--c"):
            trainer.save_checkpoint(str(latest))
        with pytest.raises(CMEMSError, match=r"checkpoint_new\.pth"):
            trainer.save_checkpoint(str(latest.with_name("checkpoint_new.pth")))
    assert latest.read_bytes() == before
    assert sorted(path.name for path in workspace.fold().glob("*.pth*")) == ["checkpoint_best.pth", "checkpoint_latest.pth"]
    resumed = workspace.resume()
    resumed.run_training()
    assert resumed.current_epoch == 3


# ------------------------------------------------------------------ worker processes, compilation


def test_worker_processes(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    others = set(multiprocessing.active_children())
    trainer = workspace.train()
    for loader in (trainer.dataloader_train, trainer.dataloader_val):
        assert isinstance(loader, NonDetMultiThreadedAugmenter)
    assert trainer.current_epoch == 1 and np.isfinite(logs(trainer)["loss/image"]).all()
    assert set(multiprocessing.active_children()) <= others  # nnU-Net's on_train_end ends them


def test_workers_of_one_seed_draw_different_crops(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnunetv2_cmems.trainers.cmems.get_allowed_n_proc_DA", lambda: 2)
    trainer = workspace.make()
    trainer.initialize()
    trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
    try:
        assert trainer.dataloader_train.num_processes == 2
        a, b = (next(trainer.dataloader_train)["data"] for _ in range(2))  # one batch of each worker, in turn
        assert not torch.equal(a, b)
    finally:
        trainer.dataloader_train._finish()
        trainer.dataloader_val._finish()


def test_compilation_is_left_to_nnunet_on_a_cpu(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_compile", "true")
    trainer = workspace.make()
    trainer.initialize()
    assert not isinstance(trainer.network, OptimizedModule)
    assert "torch.compile disabled because device is CPU" in next(workspace.fold().glob("training_log_*.txt")).read_text()


def test_compiled_network_trains_and_is_saved_like_another(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrapper of torch.compile, with the compiler itself switched off, as on a GPU."""
    plain = workspace.train()
    monkeypatch.setattr(nnUNetTrainerCMEMS, "_do_i_compile", lambda _: True)
    with torch.compiler.set_stance("force_eager"):
        compiled = workspace.train()
        assert isinstance(compiled.network, OptimizedModule)
        saved = torch.load(workspace.fold() / "checkpoint_final.pth", weights_only=False)["network_weights"]
        assert same_weights(saved, weights(plain))
        resumed = workspace.resume()
    assert same_weights(resumed.mutual_networks.state_dict(), saved)


# what organs are cut from


@pytest.mark.parametrize(("complete_only", "made"), [(True, False), (False, True)])
def test_no_synthetic_images_of_slices_that_lack_organs(workspace: Workspace, complete_only: bool, made: bool) -> None:
    """Two slices that show all classes together, but neither does alone."""
    shown = workspace.label(CASES[1])
    for case, missing in ((CASES[1], 3), (CASES[2], 1)):
        workspace.set_label(case, np.where(shown == missing, 0, shown))
    exemplars = [{"case": case, "slice": EXEMPLAR["slice"]} for case in CASES[1:3]]
    workspace.configure(exemplar=exemplars, synthesis={"complete_only": complete_only})
    trained = workspace.train()
    assert bool(trained.history.curves.get("loss/synthetic")) == made
    log = next(workspace.fold().glob("training_log_*.txt")).read_text()
    assert ("No synthetic images: no annotated slice shows every class" in log) == (not made)
