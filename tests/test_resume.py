"""A training that is killed at any moment goes on, and ends as if nothing had happened."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import re
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    CONFIGURATION,
    DATASET_ID,
    EXEMPLAR,
    PICTURES,
    Workspace,
    _pools_are_threads,
    in_three_dimensions,
    logs,
    same_weights,
    weights,
    with_regions,
)
from nnunetv2.run import run_training
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.trainers import nnUNetTrainerCMEMS, resume

LATEST, BEST, FINAL = "checkpoint_latest.pth", "checkpoint_best.pth", "checkpoint_final.pth"
EVERY_TERM: dict[str, Any] = {"tau": 0.4, "log_hidden_accuracy": True}
"""Weak enough a threshold that pseudo-labels teach from the first step on."""


def scatter(seed: int = 99) -> None:
    """Random numbers as another process has them."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def same(a: Any, b: Any) -> bool:
    """Whether nested values are equal bit by bit; NaN equals NaN."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or bool(a == b) or bool(a != a and b != b)


def written(fold: Path) -> dict[str, Any]:
    """All that a training leaves in its folder, but for the time of day."""
    history = json.loads((fold / "cmems_history.json").read_text())
    found: dict[str, Any] = {"history": {key: values for key, values in history.items() if not key.endswith("timestamps")}}
    found["reliability"] = json.loads((fold / "cmems_reliability.json").read_text())
    found["config"] = json.loads((fold / "cmems_config.json").read_text())
    for path in fold.glob("checkpoint_*.pth"):
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["logging"] = {key: values for key, values in checkpoint["logging"].items() if not key.endswith("timestamps")}
        found[path.name] = checkpoint
    return found


def differences(a: Any, b: Any, name: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differences(a[key], b[key], f"{name}/{key}")]
    return [] if same(a, b) else [name]


# ------------------------------------------------------------------ the same result


@pytest.mark.parametrize(
    ("config", "prepare"),
    [
        ({}, None),
        ({"optimizer": "sgd", "best_checkpoint": "validation_dice"}, None),
        ({"ema_decay": 0.9, "num_strong": 2, "competence": True}, None),
        ({"num_members": 3, "architecture": "mixed", "checkpoint_every": 2}, None),
        ({"seed": None}, None),
        ({}, with_regions),
        ({"val_iterations_per_epoch": 2}, in_three_dimensions),
    ],
    ids=["adamw", "sgd", "teachers", "mixed", "no seed", "regions", "3d"],
)
def test_a_continued_training_ends_with_the_same_weights(
    workspace: Workspace, config: dict[str, Any], prepare: Callable[[Workspace], dict[str, Any]] | None
) -> None:
    workspace.configure(**{**EVERY_TERM, "num_epochs": 3, "exemplar": [EXEMPLAR], **config})
    arguments = {} if prepare is None else prepare(workspace)
    scatter(5)  # what a training without a seed begins with
    unbroken = workspace.train(**arguments)
    expected = written(Path(unbroken.output_folder))

    workspace.results = workspace.results.with_name("broken")
    os.environ["nnUNet_results"] = str(workspace.results)
    scatter(5)
    workspace.interrupted(2, workspace.make(**arguments))
    scatter()
    resumed = workspace.make(continues=True, **arguments)
    run_training.maybe_load_checkpoint(resumed, True, False)
    assert resumed.current_epoch == 2
    resumed.run_training()
    assert same_weights(weights(resumed), weights(unbroken))
    assert same(resumed.optimizer.state_dict(), unbroken.optimizer.state_dict())
    assert same(logs(resumed), logs(unbroken))
    assert resumed._best_ema == unbroken._best_ema
    found = written(Path(resumed.output_folder))
    assert found.keys() == expected.keys() >= {FINAL, BEST}
    assert differences(found, expected) == []
    assert "loss/feature" in resumed.history.curves and "pseudo_label_dice/mean" in resumed.history.curves


def test_a_checkpoint_of_another_epoch_than_the_latest_serves_as_well(workspace: Workspace) -> None:
    """Killed before the first ``checkpoint_latest.pth``: nnU-Net then takes ``checkpoint_best.pth``."""
    workspace.configure(**EVERY_TERM, num_epochs=3, checkpoint_every=50)
    unbroken = workspace.train()
    workspace.results = workspace.results.with_name("broken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_results", str(workspace.results))
        workspace.interrupted(2)
        assert not (workspace.fold() / LATEST).exists()
        resumed = workspace.resume()
        assert 1 <= resumed.current_epoch <= 2
        resumed.run_training()
    assert same_weights(weights(resumed), weights(unbroken))


# ------------------------------------------------------------------ what a kill leaves behind


def killed_while(workspace: Workspace, function: str, does: Callable[..., bool], **config: Any) -> Any:
    """A training that ends when a function of nnU-Net's or ours is called with arguments for which ``does`` says so."""
    workspace.configure(**EVERY_TERM, num_epochs=3, **config)
    trainer = workspace.make()

    def die(*arguments: Any) -> Any:
        if does(*arguments):
            raise KeyboardInterrupt
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        owner = trainer if hasattr(trainer, function) else os
        original = getattr(owner, function)
        patch.setattr(owner, function, die)
        with pytest.raises(KeyboardInterrupt):
            trainer.run_training()
    return trainer


@pytest.mark.parametrize("best_checkpoint", ["agreement", "validation_dice"])
def test_killed_between_the_latest_and_the_best_checkpoint(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, best_checkpoint: str
) -> None:
    monkeypatch.setattr("nnunetv2_cmems.trainers.history.History.last_is_best", lambda self: len(self._all["train_losses"]) == 2)

    def in_epoch_1(path: str) -> bool:
        return path.endswith(BEST) and trainer_epoch(path) == 2

    def trainer_epoch(path: str) -> int:
        return int(torch.load(Path(path).with_name(LATEST), weights_only=True)["current_epoch"])

    if best_checkpoint == "validation_dice":  # the second epoch is better than the first, the third is worse
        values = iter([0.1, 0.5, 0.01])
        report = nnUNetTrainer.on_validation_epoch_end

        def told(self: Any, outputs: Any) -> None:
            value = next(values)
            report(
                self, [{**output, "tp_hard": np.full(3, value), "fp_hard": np.full(3, 1.0), "fn_hard": np.zeros(3)} for output in outputs]
            )

        monkeypatch.setattr(nnUNetTrainer, "on_validation_epoch_end", told)
    killed_while(workspace, "save_checkpoint", in_epoch_1, best_checkpoint=best_checkpoint)
    assert resume.epochs_done(str(workspace.fold() / BEST)) < resume.epochs_done(str(workspace.fold() / LATEST)) == 2
    resumed = workspace.resume()
    assert resume.epochs_done(str(workspace.fold() / BEST)) == 2
    if best_checkpoint == "validation_dice":
        assert resumed._best_ema == logs(resumed)["ema_fg_dice"][1]
    resumed.run_training()
    assert resume.epochs_done(str(workspace.fold() / BEST)) == 2, "the third epoch is worse"


def test_a_best_checkpoint_of_a_later_epoch_stays(workspace: Workspace) -> None:
    """The epochs after the latest checkpoint are repeated; until then the best of them is not lost."""
    workspace.configure(num_epochs=4, checkpoint_every=2)
    workspace.interrupted(3)
    best = workspace.fold() / BEST
    content = torch.load(best, weights_only=True)
    torch.save({**content, "current_epoch": 3}, best)
    before = best.read_bytes()
    assert workspace.resume().current_epoch == 2
    assert best.read_bytes() == before


def test_killed_between_the_final_checkpoint_and_the_end(workspace: Workspace, pools_are_threads: None) -> None:
    """Before ``checkpoint_latest.pth`` is deleted, and then again in the validation."""
    killed = killed_while(workspace, "remove", lambda path: str(path).endswith(LATEST))
    assert (workspace.fold() / FINAL).is_file() and (workspace.fold() / LATEST).is_file()
    before = torch.load(workspace.fold() / FINAL, weights_only=True)
    for _ in range(2):
        resumed = workspace.resume()
        resumed.run_training()
        assert same_weights(weights(resumed), weights(killed))
        assert not (workspace.fold() / LATEST).exists()
        assert differences(torch.load(workspace.fold() / FINAL, weights_only=True), before) == []
    resumed.perform_actual_validation()
    assert (workspace.fold() / "validation" / "summary.json").is_file()


@pytest.mark.parametrize("continues", [True, False])
def test_temporary_files_of_a_killed_run_are_removed_and_not_read(workspace: Workspace, continues: bool) -> None:
    workspace.configure(num_epochs=2)
    workspace.interrupted(1)
    left = ["checkpoint_best.pth.tmp", "checkpoint_final.pth.tmp", "cmems_history.json.tmp", "exemplar.png.0a1b2c3d.tmp"]
    for name in left:
        (workspace.fold() / name).write_bytes(b"half of a file")
    (workspace.fold() / "notes.tmp").write_text("of the user")
    trainer = workspace.resume() if continues else workspace.make()
    assert trainer.current_epoch == int(continues)
    trainer.run_training()
    assert [path.name for path in workspace.fold().glob("*.tmp")] == ["notes.tmp"]
    assert trainer.current_epoch == 2


def test_a_checkpoint_that_does_not_reach_the_disk_leaves_the_last_one(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace.configure(num_epochs=2)
    trainer = workspace.interrupted(1)
    before = (workspace.fold() / LATEST).read_bytes()

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CMEMSError, match=r"checkpoint_latest\.pth cannot be written .*Input/output error.*untouched.*--c"):
        trainer.save_checkpoint(str(workspace.fold() / LATEST))
    assert (workspace.fold() / LATEST).read_bytes() == before and not list(workspace.fold().glob("*.tmp"))


# ------------------------------------------------------------------ what is in a checkpoint


@pytest.mark.parametrize(
    "config", [{}, {"optimizer": "sgd", "best_checkpoint": "validation_dice", "ema_decay": 0.9}], ids=["ours", "nnU-Net's"]
)
def test_every_checkpoint_is_read_without_running_code(workspace: Workspace, config: dict[str, Any]) -> None:
    workspace.configure(num_epochs=2, **config)
    stopped = workspace.interrupted(1)
    found = {path.name: torch.load(path, weights_only=True) for path in workspace.fold().glob("*.pth")}
    workspace.resume().run_training()
    found[FINAL] = torch.load(workspace.fold() / FINAL, weights_only=True)
    assert set(found) == {LATEST, BEST, FINAL}
    for checkpoint in found.values():
        assert checkpoint["init_args"]["device"] == "cpu" and checkpoint["init_args"]["plans"] == stopped.plans_manager.plans
        assert all(type(value) is float for value in checkpoint["logging"]["train_losses"])
    assert resume.RANDOM not in stopped.my_init_kwargs and stopped.my_init_kwargs["device"] == torch.device("cpu")


def test_plain_values() -> None:
    tensor = torch.ones(2)
    found = resume.plain({"a": (np.float32(0.5), [np.int64(3), np.bool_(True)]), np.int64(2): tensor, "b": np.array([1.5]), "c": Path("x")})
    assert found == {"a": (0.5, [3, True]), 2: tensor, "b": [1.5], "c": "x"}
    assert type(found["a"][0]) is float and type(found["a"][1][1]) is bool and found[2] is tensor


def test_checkpoints_from_before_the_random_numbers_were_kept(workspace: Workspace) -> None:
    """With numpy's scalars and a device, as nnU-Net's own have them; the draws of the first epochs are not repeated."""
    workspace.configure(num_epochs=2)
    workspace.interrupted(1)
    path = workspace.fold() / LATEST
    content = torch.load(path, weights_only=True)
    del content["init_args"][resume.RANDOM]
    content["init_args"]["device"] = torch.device("cpu")
    content["logging"]["train_losses"] = [np.float32(value) for value in content["logging"]["train_losses"]]
    content["_best_ema"] = np.float64(0.5)
    torch.save(content, path)
    first = torch.random.initial_seed()
    resumed = workspace.resume()
    assert torch.random.initial_seed() != first
    resumed.run_training()
    assert resumed.current_epoch == 2


def test_code_in_a_checkpoint_is_not_run(workspace: Workspace, tmp_path: Path) -> None:
    workspace.configure(num_epochs=2)
    workspace.interrupted(1)
    path = workspace.fold() / LATEST

    class Bad:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "was run",)

    torch.save({**torch.load(path, weights_only=True), "more": Bad()}, path)
    with pytest.raises(CMEMSError, match=r"checkpoint_latest\.pth cannot be read .*more than tensors and plain values"):
        workspace.resume()
    assert not (tmp_path / "was run").exists()


# ------------------------------------------------------------------ random numbers


def test_seeds_have_nothing_in_common() -> None:
    runs = [resume.seeds(seed, epoch, stream, 12) for seed in (0, 1, 2) for epoch in (0, 1) for stream in (0, 1, 2)]
    assert len({number for run in runs for number in run}) == 12 * len(runs)
    assert resume.seeds(1, 2, 3, 4) == resume.seeds(1, 2, 3, 12)[:4] and max(max(run) for run in runs) < 2**32


@pytest.mark.parametrize(("device", "workers", "words"), [("cpu", 2, "worker processes"), ("cuda", 0, "a GPU"), ("cuda", 12, "and a GPU")])
def test_what_cannot_be_equal_is_said(device: str, workers: int, words: str) -> None:
    said = resume.how_it_goes_on(torch.device(device), workers)
    assert words in said and "nnUNet_n_proc_DA=0" in said and "will not be" in said
    assert "will be that of a training without a break" in resume.how_it_goes_on(torch.device("cpu"), 0)


def test_random_numbers_go_on(tmp_path: Path) -> None:
    numbers, later = resume.RandomNumbers(), resume.RandomNumbers()
    scatter(1)
    numbers.begin()
    first = draws()
    torch.save(numbers.to_save(), tmp_path / "states.pth")
    then = draws()
    scatter(2)
    later.load(torch.load(tmp_path / "states.pth", weights_only=True))
    assert draws() == first
    draws()
    saved = later.to_save()  # a training that was finished already and is continued
    assert later.go_on() and draws() == then and not later.go_on()
    scatter(3)
    numbers.load(saved)
    assert draws() == first and numbers.go_on() and draws() == then


def draws() -> list[float]:
    """From every generator, of normal ones an odd number: each keeps the second of a pair for later."""
    return [random.gauss(0, 1), random.random(), float(np.random.randn()), float(np.random.rand()), *torch.randn(3).tolist()]


# ------------------------------------------------------------------ kill -9


def train(log: str, environment: dict[str, str], slowly: bool) -> None:
    """nnU-Net's command, in a process of its own. Pictures are left out; ``slowly``: half of a checkpoint, a pause, the other half."""
    os.environ.update(environment)
    sys.stdout = sys.stderr = open(log, "w", encoding="utf-8", buffering=1)
    sys.argv = ["nnUNetv2_train", str(DATASET_ID), CONFIGURATION, "0", "-tr", "nnUNetTrainerCMEMS", "-device", "cpu", "--c"]
    torch.set_num_threads(1)
    if sys.platform.startswith("linux"):
        multiprocessing.set_start_method("fork", force=True)  # workers begin as those of nnU-Net's command do
    patch = pytest.MonkeyPatch()  # never undone: the process ends
    patch.setattr(torch, "set_num_threads", lambda _: None)
    _pools_are_threads(patch)
    for picture in (*PICTURES, "nnunetv2_cmems.trainers.cmems.draw_looks"):
        patch.setattr(picture, lambda *_: None)
    patch.setattr(run_training, "recursive_find_trainer_class_by_name", lambda _: nnUNetTrainerCMEMS)  # imports all of nnU-Net's
    save = torch.save

    def save_slowly(content: Any, path: str) -> None:
        whole = io.BytesIO()
        save(content, whole)
        half = len(whole.getvalue()) // 2
        with open(path, "wb") as file:
            file.write(whole.getvalue()[:half])
            file.flush()
            time.sleep(0.15)
            file.write(whole.getvalue()[half:])

    if slowly:
        patch.setattr(torch, "save", save_slowly)
    run_training.run_training_entry()


PRELOADED = ("nnunetv2.experiment_planning.plan_and_preprocess_api", "nnunetv2_cmems.data.phantom")


class Runs:
    """Attempts at one training, each of which goes on where the last one was killed."""

    def __init__(self, workspace: Workspace, folder: Path) -> None:
        methods = multiprocessing.get_all_start_methods()
        self.context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:  # a fork of a process that has imported all this begins at once
            self.context.set_forkserver_preload(["nnunetv2.run.run_training", "nnunetv2_cmems.trainers", "pytest", *PRELOADED])
        names = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_n_proc_DA", "OMP_NUM_THREADS")
        self.environment = {**{name: os.environ[name] for name in names}, "nnUNet_def_n_proc": "1", "MPLBACKEND": "agg"}
        self.fold = workspace.fold()
        self.folder = folder
        self.logs: list[Path] = []
        self.process: BaseProcess | None = None

    def begin(self, slowly: bool = False) -> None:
        self.logs.append(self.folder / f"attempt_{len(self.logs)}.log")
        self.logs[-1].touch()
        self.process = self.context.Process(target=train, args=(str(self.logs[-1]), self.environment, slowly))
        self.process.start()

    def wait(self, until: Callable[[], Any], seconds: float = 200) -> bool:
        """Wait for something; returns whether the process is still there."""
        deadline = time.monotonic() + seconds
        assert self.process is not None
        while self.process.is_alive():
            if until():
                return True
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.002)
        return False

    def kill(self) -> bool:
        """kill -9; returns whether it hit."""
        assert self.process is not None
        self.process.kill()
        self.process.join()
        return self.process.exitcode == -9

    def finish(self) -> None:
        assert self.process is not None
        self.process.join(200)
        assert self.process.exitcode == 0, self.said()

    def said(self) -> str:
        return self.logs[-1].read_text()

    def epochs_begun(self) -> int:
        return len(re.findall(r": Epoch \d", self.said()))

    def being_written(self) -> list[Path]:
        return [path for path in self.fold.glob("checkpoint_*.pth.tmp") if path.exists() and path.stat().st_size]


@pytest.fixture
def runs(workspace: Workspace, tmp_path: Path) -> Any:
    made = Runs(workspace, tmp_path)
    yield made
    if made.process is not None and made.process.is_alive():
        made.kill()


def test_killed_three_times_and_still_the_same(workspace: Workspace, runs: Runs) -> None:
    """At random moments, one of which is in the middle of a checkpoint."""
    workspace.configure(**EVERY_TERM, num_epochs=6)
    rng = random.Random(3)

    runs.begin()
    assert runs.wait(lambda: runs.epochs_begun() == rng.choice([2, 3])), runs.said()
    time.sleep(rng.uniform(0, 0.3))
    assert runs.kill()

    runs.begin(slowly=True)
    assert runs.wait(lambda: runs.epochs_begun() and runs.being_written()), runs.said()
    assert runs.kill() and runs.being_written()
    for name in (LATEST, BEST):
        assert torch.load(runs.fold / name, weights_only=True)["current_epoch"] > 0, "it is whole"

    runs.begin()
    assert runs.wait(lambda: "Using device" in runs.said()), runs.said()
    time.sleep(rng.uniform(0, 0.3))  # while it starts: a quick machine needs no two seconds for all that is left
    assert runs.kill()

    runs.begin()
    runs.finish()
    assert "WARNING: Cannot continue" not in runs.said() and 1 <= runs.epochs_begun() < 6
    assert "the result will be that of a training without a break" in runs.said()
    assert not list(runs.fold.glob("*.tmp")) and not (runs.fold / LATEST).exists()
    found = written(runs.fold)

    workspace.results = workspace.results.with_name("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_results", str(workspace.results))
        workspace.train()
    assert differences(found, written(workspace.fold())) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_worker_processes_do_not_outlive_a_killed_training(workspace: Workspace, runs: Runs) -> None:
    workspace.configure(num_epochs=50)
    runs.environment["nnUNet_n_proc_DA"] = "2"
    runs.begin()
    assert runs.wait(lambda: runs.epochs_begun()), runs.said()
    assert runs.process is not None
    workers = Path(f"/proc/{runs.process.pid}/task/{runs.process.pid}/children").read_text().split()
    assert len(workers) == 3, "two for the unlabelled crops, one for the validation"
    assert runs.kill()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.endurance
@pytest.mark.timeout(3600)
def test_killed_fifty_times_and_still_the_same(workspace: Workspace, runs: Runs) -> None:
    """Anywhere: while it starts, trains, validates, and in the middle of any checkpoint."""
    workspace.configure(**EVERY_TERM, num_epochs=60, best_checkpoint="validation_dice")
    rng = random.Random(7)
    hits: dict[str, int] = {}
    done, started = 0, time.monotonic()

    def killed(when: str) -> None:
        nonlocal done
        hits[when] = hits.get(when, 0) + runs.kill()
        found = {path.name: torch.load(path, weights_only=True)["current_epoch"] for path in runs.fold.glob("checkpoint_*.pth")}
        latest = found.get(FINAL, found.get(LATEST, 0))
        assert latest >= done, "no epoch is lost whose checkpoint was there"
        done = latest

    def some_time_after(event: Callable[[], Any], most: float) -> None:
        runs.wait(event)
        time.sleep(rng.uniform(0, most))

    while sum(hits.values()) < 50:
        when = rng.choice(["start", "epoch", "checkpoint"])
        runs.begin(slowly=when == "checkpoint")
        if when == "start":
            some_time_after(lambda: "Using device" in runs.said(), 1.5)
        elif when == "epoch":
            count = rng.randint(1, 3)
            some_time_after(lambda: runs.epochs_begun() >= count, 0.5)  # noqa: B023
        else:
            some_time_after(runs.being_written, 0.15)
        killed(when)

    runs.begin(slowly=True)
    runs.wait(lambda: (runs.fold / f"{FINAL}.tmp").exists())
    killed("final checkpoint")
    runs.begin()
    runs.wait((runs.fold / FINAL).exists)
    killed("end of training")
    runs.begin()
    some_time_after(lambda: "Training done" in runs.said(), 0.3)
    killed("validation")
    runs.begin()
    runs.finish()
    assert not list(runs.fold.glob("*.tmp")) and not (runs.fold / LATEST).exists()
    found, seconds = written(runs.fold), time.monotonic() - started
    epochs = sum(len(re.findall(r": Epoch \d", log.read_text())) for log in runs.logs)
    print(f"{sum(hits.values())} kills in {seconds:.0f} s, {epochs} epochs begun for 60: {hits}")

    workspace.results = workspace.results.with_name("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_results", str(workspace.results))
        workspace.train()
    assert differences(found, written(workspace.fold())) == []
