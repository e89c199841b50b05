"""Failures in the middle of a training: those that it survives, and one sentence for each of the others."""

from __future__ import annotations

import copy
import errno
import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CASES, EXEMPLAR, VALIDATION, Workspace, logs, same_weights, weights
from matplotlib.figure import Figure
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as nnunets
from test_trainer_bad_input import damage, files, garbage, refusal

from nnunetv2_cmems.method.networks import MutualNetworks
from nnunetv2_cmems.study import run
from nnunetv2_cmems.trainers import faults, nnUNetTrainerCMEMS, nnUNetTrainerCMEMS_exemplarOnly, prediction
from nnunetv2_cmems.trainers.faults import SkippedSteps, broken_terms

FULL = Path("/dev/full")
needs_dev_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full, the disk that is always full")


def at_epoch(trainer: Any, epoch: int, act: Callable[[], Any]) -> None:
    """Call ``act`` once the epoch begins."""
    start = trainer.on_epoch_start

    def begun() -> None:
        start()
        if trainer.current_epoch == epoch:
            act()

    trainer.on_epoch_start = begun


class Spoilt:
    """An objective whose results pass through ``spoil(number of the call, result)``."""

    def __init__(self, objective: Any, spoil: Callable[[int, Any], Any]) -> None:
        self.objective, self.spoil, self.calls = objective, spoil, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.spoil(self.calls - 1, self.objective(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objective, name)


def spoil_steps(trainer: Any, epoch: int, spoil: Callable[[int, Any], Any]) -> None:
    """Let the objective's results pass through ``spoil`` from an epoch on."""

    def act() -> None:
        trainer._objective = Spoilt(trainer._objective, spoil)

    at_epoch(trainer, epoch, act)


def nan_in(step: Any, term: str) -> Any:
    return step._replace(total=step.total * float("nan"), terms={**step.terms, term: step.terms[term] * float("nan")})


def log_file(trainer: Any) -> str:
    return Path(trainer.log_file).read_text()


def checkpoints(workspace: Workspace) -> dict[str, bytes]:
    return {name: content for name, content in files(workspace.fold()).items() if name.endswith(".pth")}


def fail(error: Callable[[], BaseException]) -> Callable[..., Any]:
    def raises(*_: Any, **__: Any) -> Any:
        raise error()

    return raises


# ------------------------------------------------------------------ numbers that are not finite


def test_a_nan_in_one_term_skips_the_step_and_nothing_else(workspace: Workspace) -> None:
    workspace.configure(iterations_per_epoch=5, ema_decay=0.9)
    trainer = workspace.make()
    states: list[Any] = []
    losses: list[float] = []

    def spoil(number: int, step: Any) -> Any:
        states.append((weights(trainer), copy.deepcopy(trainer.optimizer.state_dict()["state"])))
        if number == 2:
            return nan_in(step, "image")
        losses.append(float(step.total.detach()))
        return step

    spoil_steps(trainer, 0, spoil)
    trainer.run_training()
    (before, optimizer_before), (after, optimizer_after) = states[2:4]
    assert any(name.startswith("teachers.") for name in before) and same_weights(before, after)
    assert all(torch.equal(optimizer_before[i][key], optimizer_after[i][key]) for i in optimizer_before for key in optimizer_before[i])
    assert not same_weights(states[1][0], before) and not same_weights(after, states[4][0]), "the steps around it were taken"
    assert len(losses) == 4 and logs(trainer)["train_losses"] == [pytest.approx(np.mean(losses), rel=1e-5)]
    assert logs(trainer)["steps/skipped"] == [1.0]
    assert log_file(trainer).count("1 of 5 steps were skipped, as these were not finite: image (1)") == 1
    assert json.loads((workspace.fold() / "cmems_history.json").read_text())["steps/skipped"] == [1.0]
    assert np.isfinite(logs(trainer)["loss/image"]).all()


def test_an_infinite_gradient_skips_the_step(workspace: Workspace) -> None:
    workspace.configure(iterations_per_epoch=3)
    trainer = workspace.make()
    states = []
    weight = []

    def spoil(number: int, step: Any) -> Any:
        states.append(weights(trainer))
        for handle in weight:
            handle.remove()
        if number == 1:
            parameter = next(trainer.network.members[1].parameters())
            weight.append(parameter.register_hook(lambda gradient: gradient * float("inf")))
        return step

    spoil_steps(trainer, 0, spoil)
    trainer.run_training()
    assert same_weights(states[1], states[2]) and not same_weights(states[0], states[1])
    assert "1 of 3 steps were skipped, as these were not finite: gradient of member 1 (1)" in log_file(trainer)


def test_ten_skipped_steps_in_a_row_end_the_training(workspace: Workspace) -> None:
    """From epoch 1 on, over the end of an epoch of which no step is left."""
    workspace.configure(num_epochs=4, iterations_per_epoch=6)
    trainer = workspace.make(nnUNetTrainerCMEMS_exemplarOnly)
    spoil_steps(trainer, 1, lambda _, step: nan_in(step, "supervised"))
    message = refusal(trainer.run_training)
    folder = workspace.fold("nnUNetTrainerCMEMS_exemplarOnly")
    for text in ("term supervised, epoch 2, step 3", "10 steps in a row", str(folder), "initial_lr", "without --c"):
        assert text in message, message
    assert "6 of 6 steps were skipped" in log_file(trainer) and np.isnan(logs(trainer)["train_losses"][1])
    saved = torch.load(folder / "checkpoint_latest.pth", map_location="cpu", weights_only=False)["network_weights"]
    assert all(value.isfinite().all() for value in saved.values()) and same_weights(saved, weights(trainer))


def test_too_many_skipped_steps_of_an_epoch() -> None:
    def skipped(steps: int, every: int) -> int:
        counter = SkippedSteps()
        return next(i for i in range(steps + 1) if i == steps or counter.count(["image"] if i % every == 0 else [], steps))

    assert skipped(250, 20) == 250, "13 of 250 are bearable"
    assert skipped(250, 5) == 5 * 25, "the 26th of 250 is too much"
    assert skipped(20, 2) == 20, "a short epoch has ten"


def test_epochs_count_their_skipped_steps_on_their_own() -> None:
    counter = SkippedSteps()
    for broken in (["image", "feature"], [], ["image"]):
        assert counter.count(broken, 250) == ""
    assert counter.end_epoch(3) == "2 of 3 steps were skipped, as these were not finite: image (2), feature (1)"
    assert counter.end_epoch(3) == "" and counter.in_epoch == 0


def test_weights_that_break_in_an_epochs_last_step_reach_no_checkpoint(workspace: Workspace) -> None:
    workspace.configure(num_epochs=3)
    trainer = workspace.make(nnUNetTrainerCMEMS_exemplarOnly)
    folder = workspace.fold("nnUNetTrainerCMEMS_exemplarOnly")
    before: dict[str, bytes] = {}
    end = trainer.on_train_epoch_end

    def broken(outputs: Any) -> None:
        end(outputs)
        if trainer.current_epoch == 1:
            before.update(files(folder))
            with torch.no_grad():
                next(trainer.network.members[0].parameters()).view(-1)[0] = float("inf")

    trainer.on_train_epoch_end = broken
    message = refusal(trainer.run_training)
    assert "weights are broken ('members.0.encoder" in message and "epoch 1" in message and "untouched" in message
    after = files(folder)
    kept = [name for name in before if name.endswith(".pth")]
    assert kept and all(after[name] == before[name] for name in kept)


def test_a_loss_scalers_own_skips_are_no_faults(workspace: Workspace) -> None:
    """At a scale above 1 a gradient may overflow; at 1 it may not, and a NaN is a fault at any scale."""
    workspace.configure(iterations_per_epoch=6)
    trainer = workspace.make(nnUNetTrainerCMEMS_exemplarOnly)
    scales, hooks = [], []

    def spoil(number: int, step: Any) -> Any:
        scales.append(trainer.grad_scaler.get_scale())
        for handle in hooks:
            handle.remove()
        if number in (1, 2, 3):  # at 4, 2 and 1
            hooks.append(next(trainer.network.members[0].parameters()).register_hook(lambda gradient: gradient * float("inf")))
        return nan_in(step, "supervised") if number == 4 else step

    at_epoch(trainer, 0, lambda: setattr(trainer, "grad_scaler", torch.amp.GradScaler("cpu", init_scale=4.0)))
    spoil_steps(trainer, 0, spoil)
    trainer.run_training()
    assert scales == [4.0, 4.0, 2.0, 1.0, 0.5, 0.25]
    assert "2 of 6 steps were skipped, as these were not finite: gradient of member 0 (1), supervised (1)" in log_file(trainer)
    assert np.isfinite(logs(trainer)["train_losses"]).all()


def test_all_gpus_skip_a_step_together(monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"loss": 1.0, "loss/image": 1.0, "agreement": np.nan}
    device = torch.device("cpu")
    assert broken_terms(good, [1.0], None, device) == []
    assert broken_terms({**good, "loss": np.inf}, [np.nan], None, device) == ["total"]
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda flag, _: flag.fill_(1.0))
    assert broken_terms(good, [1.0], None, device) == ["a term on another GPU"]
    assert broken_terms({**good, "loss/image": np.nan}, [1.0], None, device) == ["image"]


# ------------------------------------------------------------------ memory


def on_the_gpu() -> BaseException:
    return torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a capacity of 7.79 GiB of which ...")


def on_the_host() -> BaseException:
    """torch's own error."""
    try:
        torch.empty(1 << 50, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    pytest.skip("this machine promises any amount of memory")


@pytest.mark.parametrize(
    ("error", "said"), [(on_the_gpu, " (2.00 GiB more"), (on_the_host, " (1125899906842624 bytes more"), (MemoryError, ": end other")]
)
def test_out_of_memory_in_a_step(workspace: Workspace, error: Callable[[], BaseException], said: str) -> None:
    trainer = workspace.make(nnUNetTrainerCMEMS_exemplarOnly)
    spoil_steps(trainer, 0, lambda number, step: fail(error)() if number else step)
    message = refusal(trainer.run_training)
    assert f"this machine's memory ran out in epoch 0, step 1{said}" in message, message
    assert "'exemplar_batch' (4) in" in message, "one network, one stream"


def test_following_the_advice_about_memory_helps(workspace: Workspace) -> None:
    """It depends on what there is to lower."""
    plans_file, plans = workspace.base / "nnUNetPlans.json", workspace.plans()
    plans["configurations"]["2d_small"]["batch_size"] = 12
    plans_file.write_text(json.dumps(plans))
    workspace.configure(num_epochs=2)
    trainer = workspace.make()
    spoil_steps(trainer, 1, fail(on_the_gpu))
    before: dict[str, bytes] = {}
    at_epoch(trainer, 1, lambda: before.update(checkpoints(workspace)))
    message = refusal(trainer.run_training)
    for text in (
        f"lower batch_size or patch_size of configuration '2d_small' in {plans_file}, and continue with --c",
        "lower 'exemplar_batch' (3), 'synthetic_batch' (3), 'unlabelled_batch' (3), 'num_members' (2) in cmems.json and start again",
    ):
        assert text in message, message
    assert before and checkpoints(workspace) == before

    plans["configurations"]["2d_small"]["batch_size"] = 4
    plans_file.write_text(json.dumps(plans))
    resumed = workspace.resume()
    spoil_steps(resumed, 1, fail(on_the_gpu))
    message = refusal(resumed.run_training)
    assert "lower patch_size of" in message and "lower 'unlabelled_batch' (2), 'num_members' (2) in" in message, message
    plans["configurations"]["2d_small"]["patch_size"] = [16, 16]
    plans_file.write_text(json.dumps(plans))
    resumed = workspace.resume()
    resumed.run_training()
    assert resumed.current_epoch == 2 and resumed._objective.batches.exemplar == 1
    workspace.configure(num_epochs=2, unlabelled_batch=1)
    assert "unlabelled_batch" in refusal(workspace.resume), "which --c refuses, as the sentence says"


def test_annotated_slices_that_do_not_fit_into_memory(workspace: Workspace) -> None:
    """No smaller batch makes room for them."""
    two = [EXEMPLAR, {**EXEMPLAR, "slice": 2}]
    for exemplars, said in ((two, "all 2 annotated slices .* fewer in 'exemplar'"), ([EXEMPLAR], "patch_size")):
        workspace.configure(exemplar=exemplars)
        trainer = workspace.make()
        trainer._prepare_objective = fail(on_the_gpu)
        assert re.search(f"ran out in epoch 0, step 0.*{said}", refusal(trainer.run_training))


def test_out_of_memory_of_a_gpu_is_named() -> None:
    class Owner:
        device = torch.device("cuda")
        network: Any = MutualNetworks(lambda: torch.nn.Linear(1, 1), 1)

    assert faults.while_predicting(Owner, on_the_gpu()).startswith("the GPU's memory ran out during the prediction (2.00 GiB")
    assert faults.while_predicting(Owner, on_the_host()).startswith("this machine's memory")
    assert faults.while_predicting(Owner, RuntimeError("CUDA error: device-side assert triggered")) == ""
    Owner.network = torch.nn.Linear(1, 1)
    assert faults.while_predicting(Owner, on_the_gpu()) == "", "what nnU-Net's own networks do is nnU-Net's"


def test_out_of_memory_in_the_online_validation(workspace: Workspace) -> None:
    trainer = workspace.make()
    at_epoch(trainer, 0, lambda: setattr(trainer, "loss", fail(on_the_gpu)))
    message = refusal(trainer.run_training)
    assert "ran out in epoch 0, step 2 (2.00 GiB more were asked for)" in message and "--c" in message


@pytest.mark.usefixtures("pools_are_threads")
def test_failures_of_the_final_validation(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """One training, whose validation fails in turn for each reason and then passes."""
    workspace.configure(exemplar=[EXEMPLAR])
    trainer = workspace.train(nnUNetTrainerCMEMS_exemplarOnly)
    folder = workspace.fold("nnUNetTrainerCMEMS_exemplarOnly")
    before = {name: content for name, content in files(folder).items() if name.endswith(".pth")}
    mask = folder / "validation" / f"{VALIDATION[0]}.nii.gz"
    image = workspace.images / f"{VALIDATION[1]}.b2nd"
    whole = image.read_bytes()

    with monkeypatch.context() as patch:
        patch.setattr(prediction, "predict_with_one_network", fail(on_the_gpu))
        message = refusal(trainer.perform_actual_validation)
        assert "memory ran out during the final validation (2.00 GiB" in message and "nnUNet_def_n_proc" in message
        predictor = nnUNetPredictor(device=torch.device("cpu"))
        predictor.network = trainer.network
        message = refusal(lambda: predictor.predict_sliding_window_return_logits(torch.zeros(1, 1, 8, 8)))
        assert "ran out during the prediction" in message and "--not_on_device" in message

    with monkeypatch.context() as patch:
        patch.setattr(nnunets, "compute_metrics_on_folder", fail(lambda: OSError(errno.ENOSPC, "No space left on device")))
        message = refusal(trainer.perform_actual_validation)
        assert f"a file in {mask.parent} cannot be written (No space left on device)" in message and "--val" in message

    with monkeypatch.context() as patch:
        patch.setattr(nnunets, "check_workers_alive_and_busy", fail(lambda: RuntimeError("Some background workers are no longer alive")))
        assert "writes the masks" in refusal(trainer.perform_actual_validation)

    damage(image)
    message = refusal(trainer.perform_actual_validation)
    assert VALIDATION[1] in message and "nnUNetv2_preprocess" in message and "--val" in message
    image.write_bytes(whole)

    compute = nnunets.compute_metrics_on_folder

    def cut(*args: Any, **kwargs: Any) -> Any:
        """What SimpleITK leaves on a full disk, without an error."""
        mask.write_bytes(mask.read_bytes()[:-20])
        return compute(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(nnunets, "compute_metrics_on_folder", cut)
        message = refusal(trainer.perform_actual_validation)
        assert f"cut off ('{mask.name}')" in message and "--val" in message
        assert not (mask.parent / "summary.json").exists()

    with monkeypatch.context() as patch:
        patch.setattr(nnunets, "compute_metrics_on_folder", fail(lambda: ValueError("no case of ours")))
        with pytest.raises(ValueError, match="no case of ours"):
            trainer.perform_actual_validation()

    trainer.perform_actual_validation()
    assert (mask.parent / "summary.json").exists()
    assert {name: files(folder)[name] for name in before} == before


# ------------------------------------------------------------------ worker processes


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
@pytest.mark.parametrize("which", ["dataloader_train", "dataloader_val"])
def test_a_worker_process_that_is_killed(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], which: str
) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    workspace.configure(num_epochs=2, iterations_per_epoch=12, val_iterations_per_epoch=12)
    trainer = workspace.make()
    others = set(multiprocessing.active_children())
    before: dict[str, bytes] = {}

    def kill() -> None:
        before.update(checkpoints(workspace))
        os.kill(getattr(trainer, which)._processes[0].pid, signal.SIGKILL)

    at_epoch(trainer, 1, kill)
    message = refusal(trainer.run_training)
    for text in ("a process that reads images died in epoch 1", "memory", "nnUNet_n_proc_DA (now 2)", "--c"):
        assert text in message, message
    assert "Traceback" not in capfd.readouterr().err
    assert before and checkpoints(workspace) == before
    assert set(multiprocessing.active_children()) <= others
    if which == "dataloader_train":
        monkeypatch.setenv("nnUNet_n_proc_DA", "0")  # lower
        resumed = workspace.resume()
        resumed.run_training()
        assert resumed.current_epoch == 2


def test_what_ends_other_threads_is_still_shown(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is what ends a loader's thread where no sentence came of it."""
    import threading

    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    shown: list[str] = []

    @faults.one_sentence(lambda *_: "")
    def work(_: Any) -> str:
        for name in ("mine", "Thread-7 (results_loop)"):
            thread = threading.Thread(target=fail(lambda: ValueError("oh no")), name=name)
            thread.start()
            thread.join()
            shown.append(capfd.readouterr().err)
        return "done"

    assert work(None) == "done"
    assert "oh no" in shown[0] and not shown[1]
    assert "oh no" in capfd.readouterr().err


def test_no_memory_in_a_worker_process(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """It cannot raise in the main process; the sentence comes with a batch."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    trainer = workspace.make()
    kind = "nnunetv2_cmems.data.unlabelled.UnlabelledLoader.get_indices"
    monkeypatch.setattr(kind, fail(lambda: MemoryError("Unable to allocate 8.00 EiB for an array")))
    message = refusal(trainer.run_training)
    assert "no memory left" in message and "8.00 EiB" in message and "nnUNet_n_proc_DA" in message
    assert "Traceback" not in capfd.readouterr().err


# ------------------------------------------------------------------ files that cannot be read


def shorten(path: Path) -> None:
    """Cut a file in half, as a full disk or a broken copy does."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("suffix", "spoil", "workers"), [("", shorten, 0), ("", damage, 1), ("_seg", garbage, 0), ("_seg", damage, 1), ("", Path.unlink, 0)]
)
def test_a_validation_case_that_cannot_be_read_any_more(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, suffix: str, spoil: Callable[[Path], Any], workers: int
) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", str(workers))
    workspace.configure(exemplar=[EXEMPLAR], num_epochs=2, val_iterations_per_epoch=20)
    trainer = workspace.make(nnUNetTrainerCMEMS_exemplarOnly)

    def act() -> None:
        for case in VALIDATION:
            spoil(workspace.images / f"{case}{suffix}.b2nd")

    at_epoch(trainer, 1, act)
    message = refusal(trainer.run_training)
    assert any(case in message for case in VALIDATION) and "nnUNetv2_preprocess" in message
    assert trainer.current_epoch == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_unlabelled_images_that_are_cut_off(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", str(workers))
    workspace.configure(exemplar=[EXEMPLAR], num_epochs=2, iterations_per_epoch=12)
    trainer = workspace.make()
    unlabelled = [case for case in CASES if case not in (*VALIDATION, EXEMPLAR["case"])]
    at_epoch(trainer, 1, lambda: [shorten(workspace.images / f"{case}.b2nd") for case in unlabelled])
    others = set(multiprocessing.active_children())
    message = refusal(trainer.run_training)
    assert set(multiprocessing.active_children()) <= others, "no worker process outlives the training"
    assert any(f"{case}.b2nd" in message for case in unlabelled) and "nnUNetv2_preprocess" in message


@pytest.mark.usefixtures("pools_are_threads")
def test_a_scan_that_cannot_be_read_for_the_last_picture(workspace: Workspace) -> None:
    """The training and its validation are done; the picture is not worth an error."""
    workspace.configure(exemplar=[EXEMPLAR])
    trainer = workspace.train(nnUNetTrainerCMEMS_exemplarOnly)
    damage(workspace.images / f"{CASES[0]}.b2nd")
    trainer.perform_actual_validation()
    folder = workspace.fold("nnUNetTrainerCMEMS_exemplarOnly")
    assert (folder / "validation" / "summary.json").exists() and not (folder / "unlabelled.png").exists()
    said = log_file(trainer)
    assert f"{folder / 'unlabelled.png'} is not up to date" in said and f"{CASES[0]}.b2nd cannot be read" in said


# ------------------------------------------------------------------ a full disk


@needs_dev_full
def test_a_full_disk_costs_pictures_and_curves_but_not_the_training(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them really writes to a full disk; each is said once."""

    def draw(*args: Any) -> None:
        Figure(figsize=(20, 20)).savefig(FULL, format="png")

    monkeypatch.setattr("nnunetv2.training.logging.nnunet_logger.LocalLogger.plot_progress_png", draw)
    monkeypatch.setattr("nnunetv2_cmems.trainers.history.plot_curves", draw)
    monkeypatch.setattr("nnunetv2_cmems.trainers.snapshot.plot_exemplar", draw)
    workspace.configure(num_epochs=3)
    trainer = workspace.make()
    side_files = ("progress.png", "cmems_progress.png", "exemplar.png", "cmems_history.json", "cmems_reliability.json")

    def fill() -> None:
        for name in side_files[3:]:
            (workspace.fold() / f"{name}.tmp").symlink_to(FULL)

    at_epoch(trainer, 0, fill)
    at_epoch(trainer, 1, fill)
    trainer.run_training()
    assert trainer.current_epoch == 3 and "checkpoint_final.pth" in checkpoints(workspace)
    said = log_file(trainer)
    for name in side_files:
        assert said.count(f"WARNING: {workspace.fold() / name} is not up to date") == 1, name
    assert "No space left on device" in said
    for name in side_files[3:]:  # there is room again in epoch 2
        assert json.loads((workspace.fold() / name).read_text())


@needs_dev_full
def test_a_full_disk_costs_the_log_file_but_not_the_training(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nnunets, "sleep", lambda _: None)
    workspace.configure(num_epochs=2)
    trainer = workspace.make(nnUNetTrainerCMEMS_exemplarOnly)
    at_epoch(trainer, 1, lambda: setattr(trainer, "log_file", str(FULL)))
    trainer.run_training()
    assert trainer.current_epoch == 2


@needs_dev_full
def test_a_full_disk_stops_the_training_at_its_checkpoint(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own writer meets the full disk."""
    workspace.configure(num_epochs=3)
    trainer = workspace.make()
    before: dict[str, bytes] = {}
    save = torch.save

    def fill() -> None:
        before.update(checkpoints(workspace))
        monkeypatch.setattr(torch, "save", lambda content, _: save(content, str(FULL)))

    at_epoch(trainer, 1, fill)
    message = refusal(trainer.run_training)
    monkeypatch.setattr(torch, "save", save)
    assert "checkpoint_latest.pth cannot be written" in message and "make room" in message and "--c" in message
    assert before and checkpoints(workspace) == before and not list(workspace.fold().glob("*.tmp"))
    resumed = workspace.resume()
    assert resumed.current_epoch == 1
    resumed.run_training()
    assert resumed.current_epoch == 3


def test_a_full_disk_at_the_start(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nnunets, "save_json", fail(lambda: OSError(errno.ENOSPC, "No space left on device")))
    message = refusal(workspace.train)
    assert f"a file in {workspace.fold()} cannot be written" in message and "make room" in message


def test_other_errors_are_left_alone(workspace: Workspace) -> None:
    trainer = workspace.make(nnUNetTrainerCMEMS_exemplarOnly)
    spoil_steps(trainer, 0, fail(lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied")))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        trainer.run_training()


# ------------------------------------------------------------------ a benchmark's record


@pytest.mark.parametrize(
    ("lines", "code", "said"),
    [
        (["Epoch 3"], -9, "exit code -9 (killed, most often because memory ran out): Epoch 3"),
        (["Epoch 3", "nnunetv2-cmems: no room", "resource_tracker: 1 leaked"], 1, "exit code 1: nnunetv2-cmems: no room"),
        ([], 1, "exit code 1: no output"),
    ],
)
def test_the_record_of_a_run_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], code: int, said: str
) -> None:
    def call(folder: str) -> int:
        Path(folder, "log.txt").write_text("\n".join(lines))
        return code

    monkeypatch.setattr(run, "_call", call)
    spec = run.RunSpec("Dataset902_Small", "2d_small", "nnUNetPlans", "0", nnUNetTrainerCMEMS.__name__, "ours", 1, 1, device="cpu")
    assert run.train(spec, str(tmp_path)).error == said
