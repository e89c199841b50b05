"""Bad input: one clear sentence each, nothing written or lost."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CASES, CONFIGURATION, EXEMPLAR, TRAINING, VALIDATION, Workspace, logs, same_weights, weights
from nnunetv2.run import run_training
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.trainers import nnUNetTrainerCMEMS_exemplarOnly, nnUNetTrainerCMEMS_imageOnly

UNLABELLED = [case for case in TRAINING if case != EXEMPLAR["case"]]
CASE = str(EXEMPLAR["case"])


def refusal(act: Callable[[], Any]) -> str:
    """The message of the :class:`CMEMSError` that ``act`` raises; it must be of one line."""
    with pytest.raises(CMEMSError) as caught:
        act()
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder but nnU-Net's log files, of which each trainer begins one."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if "training_log" not in name}


def garbage(path: Path) -> None:
    """Put a file that cannot be opened in a file's place. The old one lives on for those who have mapped it into memory."""
    path.unlink()
    path.write_bytes(b"no image" * 100)


def damage(path: Path) -> None:
    """As :func:`garbage`, but it keeps the file's ends, from which it can be opened; only its middle is spoilt."""
    content = bytearray(path.read_bytes())
    spoilt = slice(len(content) // 4, -(len(content) // 4))
    content[spoilt] = b"\xaa" * len(content[spoilt])
    path.unlink()
    path.write_bytes(content)


# ------------------------------------------------------------------ the exemplar


@pytest.mark.parametrize(
    ("exemplar", "said"),
    [
        ({"case": "phantom_tr077", "slice": 1}, ["phantom_tr077", "phantom_tr000"]),
        ({"case": VALIDATION[0], "slice": 1}, [VALIDATION[0], "validation"]),
        ({"case": CASE, "slice": 5}, [CASE, "5", "from 0 to 4"]),
        ({"case": CASE, "slice": 1, "axis": "x"}, [CASE, "x axis", "z"]),
    ],
)
def test_exemplar_that_does_not_exist(workspace: Workspace, exemplar: dict[str, Any], said: list[str]) -> None:
    workspace.configure(exemplar=[exemplar])
    message = refusal(workspace.train)
    assert all(text in message for text in said), message
    assert not files(workspace.fold())


def test_exemplar_that_lacks_a_class(workspace: Workspace) -> None:
    label = workspace.label(CASE)
    label[label == 3] = 0
    workspace.set_label(CASE, label)
    workspace.configure(exemplar=[EXEMPLAR])
    message = refusal(workspace.train)
    assert "'right cavity'" in message and "allow_missing_classes" in message
    assert "wall" not in message and "left cavity" not in message
    assert not files(workspace.fold())

    workspace.configure(exemplar=[EXEMPLAR], allow_missing_classes=True)
    assert workspace.train().current_epoch == 1


def test_no_slice_shows_all_classes(workspace: Workspace) -> None:
    for case in TRAINING:
        workspace.change_properties(case, class_locations={1: np.array([[0, 1, 3, 3]]), 2: np.array([[0, 2, 3, 3]]), 3: []})
    message = refusal(workspace.train)
    assert "'right cavity'" in message and "allow_missing_classes" in message


def test_no_unlabelled_case_is_left(workspace: Workspace) -> None:
    (workspace.base / "splits_final.json").write_text(json.dumps([{"train": [CASE], "val": VALIDATION}]))
    message = refusal(workspace.train)
    assert "no unlabelled" in message and CASE in message and "exemplarOnly" in message
    assert not files(workspace.fold())
    assert workspace.train(nnUNetTrainerCMEMS_exemplarOnly).current_epoch == 1


# ------------------------------------------------------------------ preprocessed files


@pytest.mark.parametrize("case", [CASE, UNLABELLED[0], VALIDATION[0]])
def test_channels_that_do_not_fit(workspace: Workspace, case: str) -> None:
    workspace.configure(exemplar=[EXEMPLAR])
    workspace.set_image(case, np.repeat(workspace.image(case), 2, axis=0))
    message = refusal(workspace.train)
    assert f"{case}.b2nd" in message and "2 channels" in message and "names 1" in message
    assert not files(workspace.fold())


def test_images_that_were_preprocessed_for_other_plans(workspace: Workspace) -> None:
    workspace.configure(exemplar=[EXEMPLAR])
    plans = workspace.plans()
    plans["configurations"][CONFIGURATION]["spacing"] = [1.5, 1.5]
    message = refusal(lambda: workspace.train(plans=plans))
    assert ".b2nd" in message and "1.5 x 1.5 mm" in message and "nnUNetv2_preprocess" in message
    assert not files(workspace.fold())


@pytest.mark.parametrize("case", [CASE, UNLABELLED[0], VALIDATION[0]])
@pytest.mark.parametrize("spoil", [garbage, Path.unlink])
def test_image_that_cannot_be_read_at_the_start(workspace: Workspace, case: str, spoil: Callable[[Path], Any]) -> None:
    workspace.configure(exemplar=[EXEMPLAR])
    spoil(workspace.images / f"{case}.b2nd")
    message = refusal(workspace.train)
    assert case in message
    assert not files(workspace.fold())


def test_exemplars_label_that_cannot_be_read(workspace: Workspace) -> None:
    workspace.configure(exemplar=[EXEMPLAR])
    (workspace.images / f"{CASE}_seg.b2nd").write_bytes(b"no label" * 100)
    message = refusal(workspace.train)
    assert CASE in message and "nnUNetv2_preprocess" in message


@pytest.mark.parametrize("case", [CASE, UNLABELLED[0]])
def test_properties_that_cannot_be_read(workspace: Workspace, case: str) -> None:
    workspace.configure(exemplar=[EXEMPLAR])
    (workspace.images / f"{case}.pkl").write_bytes(b"no pickle")
    message = refusal(workspace.train)
    assert f"{case}.pkl" in message and "nnUNetv2_preprocess" in message


@pytest.mark.parametrize("spoil", [garbage, damage])
def test_image_that_is_damaged_during_the_training(workspace: Workspace, spoil: Callable[[Path], Any]) -> None:
    workspace.configure(exemplar=[EXEMPLAR], num_epochs=2)
    trainer = workspace.make()
    before = damage_after_the_first_epoch(workspace, trainer, spoil)
    message = refusal(trainer.run_training)
    assert any(f"{case}.b2nd" in message for case in UNLABELLED) and "nnUNetv2_preprocess" in message
    assert {name: files(workspace.fold())[name] for name in before} == before
    assert trainer.current_epoch == 1


def test_nan_in_an_image(workspace: Workspace) -> None:
    for case in UNLABELLED:
        workspace.set_image(case, np.full_like(workspace.image(case), np.nan))
    workspace.configure(exemplar=[EXEMPLAR])
    message = refusal(workspace.train)
    assert any(f"{case}.b2nd" in message for case in UNLABELLED) and "NaN" in message


def test_image_that_is_damaged_while_workers_read(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    workspace.configure(exemplar=[EXEMPLAR], num_epochs=2, iterations_per_epoch=12)
    trainer = workspace.make()
    others = set(multiprocessing.active_children())
    before = damage_after_the_first_epoch(workspace, trainer, garbage)
    try:
        message = refusal(trainer.run_training)
    finally:
        for loader in (trainer.dataloader_train, trainer.dataloader_val):
            loader._finish()
    assert any(f"{case}.b2nd" in message for case in UNLABELLED) and "nnUNetv2_preprocess" in message
    assert {name: files(workspace.fold())[name] for name in before} == before
    assert set(multiprocessing.active_children()) <= others


@pytest.mark.parametrize("suffix", ["", "_seg"])
def test_validation_case_that_is_damaged_inside(workspace: Workspace, suffix: str) -> None:
    """It opens, and fails only when the online validation reads it."""
    workspace.configure(exemplar=[EXEMPLAR], val_iterations_per_epoch=20)
    for case in VALIDATION:
        damage(workspace.images / f"{case}{suffix}.b2nd")
    message = refusal(workspace.train)
    assert any(case in message for case in VALIDATION)


def damage_after_the_first_epoch(workspace: Workspace, trainer: Any, spoil: Callable[[Path], Any]) -> dict[str, bytes]:
    """Spoil all unlabelled images once epoch 1 begins; returns a dict that then gets the checkpoints of epoch 0."""
    before: dict[str, bytes] = {}
    start = trainer.on_epoch_start

    def spoilt() -> None:
        if trainer.current_epoch == 1:
            before.update({name: content for name, content in files(workspace.fold()).items() if name.endswith(".pth")})
            assert "checkpoint_latest.pth" in before
            for case in UNLABELLED:
                spoil(workspace.images / f"{case}.b2nd")
        start()

    trainer.on_epoch_start = spoilt
    return before


# ------------------------------------------------------------------ the config


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"taus": 0.9}', ["unknown key 'taus'", "tau"]),
        ('{"weak": {"noize": 1}}', ["unknown key 'weak.noize'"]),
        ('{"tau": "high"}', ["'tau'", "a number"]),
        ('{"num_members": 2.5}', ["'num_members'", "whole number"]),
        ('{"tau": 1.5}', ["'tau'", "1.5", "between 0 and 1"]),
        ('{"exemplar": []}', ["'exemplar'", "annotated slices"]),
        ('{"supervised": {"enabled": false}, "synthetic": {"enabled": false}}', ["nothing is learned"]),
        ("[1, 2]", ["JSON object"]),
        ('{"tau": 0.9', ["cannot be read as JSON"]),
    ],
)
def test_config_file(workspace: Workspace, content: str, said: list[str]) -> None:
    (workspace.base / "cmems.json").write_text(content)
    message = refusal(workspace.make)
    assert str(workspace.base / "cmems.json") in message
    assert all(text in message for text in said), message
    assert not workspace.results.exists()


def test_config_file_of_the_variable_that_does_not_exist(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_cmems_config", str(workspace.base / "nowhere.json"))
    message = refusal(workspace.make)
    assert "nnUNet_cmems_config" in message and "nowhere.json" in message
    assert not workspace.results.exists()


# ------------------------------------------------------------------ what does not work yet


def as_second_stage(workspace: Workspace) -> dict[str, Any]:
    plans = workspace.plans()
    plans["configurations"][CONFIGURATION]["previous_stage"] = "2d"
    return {"plans": plans}


@pytest.mark.parametrize(("kind", "said"), [(as_second_stage, "cascade")])
def test_what_does_not_work_yet_is_refused_at_once(workspace: Workspace, kind: Callable[[Workspace], dict[str, Any]], said: str) -> None:
    message = refusal(lambda: workspace.make(**kind(workspace)))
    assert said in message and "nnUNetTrainerCMEMS" in message
    assert not workspace.results.exists()


def test_network_that_does_not_split(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnunetv2_cmems.trainers.cmems.splits", lambda _: False)
    message = refusal(workspace.train)
    assert "encoder" in message and "feature" in message
    assert workspace.train(nnUNetTrainerCMEMS_imageOnly).current_epoch == 1


# ------------------------------------------------------------------ checkpoints


@pytest.fixture
def stopped(workspace: Workspace) -> Iterator[Workspace]:
    """A training that was stopped after the first of two epochs; its files must outlive every refusal."""
    workspace.configure(num_epochs=2)
    workspace.interrupted(epochs=1)
    yield workspace


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"num_epochs": 3}, ["num_epochs (2 then, 3 now)"]),
        ({"num_epochs": 2, "weak": {"noise": 0.5}}, ["weak.noise (", "0.5 now)"]),
        ({"num_epochs": 2, "exemplar": [EXEMPLAR]}, ["exemplar"]),
        ({"num_epochs": 2, "num_members": 3}, ["2 members", "3", "num_members"]),
    ],
)
def test_continuing_with_another_config(stopped: Workspace, overrides: dict[str, Any], said: list[str]) -> None:
    before = files(stopped.fold())
    stopped.configure(**overrides)
    message = refusal(stopped.resume)
    assert "--c" in message and all(text in message for text in said), message
    assert files(stopped.fold()) == before
    stopped.configure(num_epochs=2)  # restored: it goes on
    resumed = stopped.resume()
    resumed.run_training()
    assert resumed.current_epoch == 2


def test_continuing_with_another_trainer(stopped: Workspace) -> None:
    other = stopped.fold("nnUNetTrainerCMEMS_imageOnly")
    shutil.copytree(stopped.fold(), other)
    before = files(other)
    message = refusal(lambda: stopped.resume(nnUNetTrainerCMEMS_imageOnly))
    assert "written by nnUNetTrainerCMEMS," in message and "nnUNetTrainerCMEMS_imageOnly" in message and "-tr" in message
    assert files(other) == before


def test_checkpoint_of_nnunets_own_trainer(workspace: Workspace) -> None:
    stock = workspace.make(nnUNetTrainer)
    stock.initialize()
    workspace.fold().mkdir(parents=True)
    stock.save_checkpoint(str(workspace.fold() / "checkpoint_final.pth"))
    before = files(workspace.fold())
    for act in (workspace.resume, lambda: run_training.maybe_load_checkpoint(workspace.make(), False, True)):
        message = refusal(act)
        assert "written by nnUNetTrainer," in message and "-tr" in message
    assert files(workspace.fold()) == before


@pytest.mark.parametrize("kind", ["half", "empty", "garbage"])
def test_checkpoint_that_cannot_be_read(stopped: Workspace, kind: str) -> None:
    latest = stopped.fold() / "checkpoint_latest.pth"
    whole = latest.read_bytes()
    latest.write_bytes({"half": whole[: len(whole) // 2], "empty": b"", "garbage": b"no checkpoint" * 99}[kind])
    before = files(stopped.fold())
    message = refusal(stopped.resume)
    assert str(latest) in message and "cannot be read" in message and "--c" in message
    assert files(stopped.fold()) == before
    latest.unlink()  # as the message says: checkpoint_best.pth, of the same epoch, serves instead
    assert stopped.resume().current_epoch == 1


def test_file_that_is_no_checkpoint(stopped: Workspace) -> None:
    latest = stopped.fold() / "checkpoint_latest.pth"
    torch.save({"weights": torch.ones(2)}, latest)
    assert str(latest) in refusal(stopped.resume)
    torch.save([1, 2], latest)
    assert str(latest) in refusal(stopped.resume)


def test_refused_start_leaves_an_earlier_training_alone(workspace: Workspace) -> None:
    workspace.train()
    before = files(workspace.results)
    workspace.configure(exemplar=[{"case": CASE, "slice": 99}])
    refusal(workspace.train)
    assert files(workspace.results) == before


# ------------------------------------------------------------------ NaN


def nan_from_epoch_1(trainer: Any, act: Callable[[], None]) -> dict[str, Any]:
    """Run ``act`` once epoch 1 begins; returns a dict that then gets the weights and the checkpoint of that moment."""
    moment: dict[str, Any] = {}
    start = trainer.on_train_epoch_start

    def poisoned() -> None:
        start()
        if trainer.current_epoch == 1:
            act()
            moment["weights"] = weights(trainer)
            moment["files"] = {name: content for name, content in files(Path(trainer.output_folder)).items() if name.endswith(".pth")}

    trainer.on_train_epoch_start = poisoned
    return moment


def unchanged(trainer: Any, moment: dict[str, Any]) -> bool:
    now = weights(trainer)
    assert set(moment["files"]) == {"checkpoint_latest.pth", "checkpoint_best.pth"}
    assert {name: content for name, content in files(Path(trainer.output_folder)).items() if name.endswith(".pth")} == moment["files"]
    return all(torch.equal(now[key].nan_to_num(7.0), moment["weights"][key].nan_to_num(7.0)) for key in now)


def test_nan_in_a_weight_stops_the_training(workspace: Workspace) -> None:
    workspace.configure(num_epochs=2, iterations_per_epoch=3)
    trainer = workspace.make()

    def poison() -> None:
        with torch.no_grad():
            next(trainer.network.members[0].parameters()).view(-1)[0] = float("nan")

    moment = nan_from_epoch_1(trainer, poison)
    message = refusal(trainer.run_training)
    for text in ("supervised", "synthetic", "epoch 1", "step 0", str(workspace.fold()), "untouched", "initial_lr"):
        assert text in message, message
    assert unchanged(trainer, moment)
    resumed = workspace.resume()
    resumed.run_training()
    assert np.isfinite(logs(resumed)["train_losses"]).all()


def test_the_term_and_the_step_of_a_nan_are_named(workspace: Workspace) -> None:
    """Ten steps in a row are skipped, the last of which is named; see also test_faults.py."""
    workspace.configure(num_epochs=2, iterations_per_epoch=12, checkpoint_every=1)
    trainer = workspace.make(nnUNetTrainerCMEMS_imageOnly)
    steps = iter(range(100))
    at: dict[str, Any] = {}

    def poison() -> None:
        consistency = trainer._objective._consistency

        def spoilt(*args: Any) -> Any:
            broken = next(steps) >= 2  # from the second step on
            if broken:
                at.setdefault("weights", weights(trainer))
            return consistency(*args) * (float("nan") if broken else 1.0)

        trainer._objective._consistency = spoilt

    moment = nan_from_epoch_1(trainer, poison)
    message = refusal(trainer.run_training)
    assert "term image, epoch 1, step 10" in message
    assert unchanged(trainer, {**moment, **at})
    assert not same_weights(at["weights"], moment["weights"])  # the step before was a good one


def test_nan_in_a_gradient_never_reaches_a_checkpoint(workspace: Workspace) -> None:
    """A finite loss can have a gradient that is not."""
    workspace.configure(num_epochs=2, iterations_per_epoch=10)
    trainer = workspace.make()
    moment = nan_from_epoch_1(
        trainer, lambda: next(trainer.network.members[1].parameters()).register_hook(lambda gradient: gradient * float("nan"))
    )
    message = refusal(trainer.run_training)
    assert "term gradient of member 1, epoch 1, step 9" in message
    assert unchanged(trainer, moment)


def test_all_cases_are_in_the_fold() -> None:
    """What the tests above take for granted."""
    assert sorted([*TRAINING, *VALIDATION]) == CASES and CASE in TRAINING
