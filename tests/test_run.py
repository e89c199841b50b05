"""One training of a benchmark in a process of its own: what is recorded, what counts as finished, what an interruption leaves."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGURATION, DATASET, EXEMPLAR, QUICK, Workspace

from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.study import run as module
from nnunetv2_cmems.study.run import RunSpec, fold_folder, is_finished, read_run, run_folder, train, training_command

SPEC = RunSpec("Dataset027_ACDC", "2d", "nnUNetPlans", "0", "nnUNetTrainerCMEMS", "CMEMS", 1, 2, overrides={"seed": 2}, device="cpu")


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """The training process is a shell script; its last argument is the run's folder."""
    path = folder / "stand_in.sh"
    path.write_text(f'#!/bin/sh\nfor folder; do :; done\n{script}\n')
    path.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(path))


def summary(spec: RunSpec = SPEC) -> str:
    """Shell commands that write what nnU-Net's validation writes."""
    fold = f'"$folder/results/{spec.dataset}/{spec.trainer}__{spec.plans}__{spec.configuration}/fold_{spec.fold}/validation"'
    return f"mkdir -p {fold} && echo '{{}}' > {fold}/summary.json"


def test_folders_of_runs_differ() -> None:
    variants = [
        SPEC,
        dataclasses.replace(SPEC, exemplar=2),
        dataclasses.replace(SPEC, seed=3),
        dataclasses.replace(SPEC, trainer="nnUNetTrainerCMEMS_cps"),
        dataclasses.replace(SPEC, plans="nnUNetResEncUNetMPlans"),
        dataclasses.replace(SPEC, study="tau", value=0.8),
        dataclasses.replace(SPEC, study="tau", value=0.9),
    ]
    keys = [spec.key for spec in variants]
    assert len(set(keys)) == len(keys)
    assert keys[0] == "nnUNetTrainerCMEMS__exemplar_1__seed_2" and keys[5] == "nnUNetTrainerCMEMS__tau_0.8__exemplar_1__seed_2"
    assert "/" not in dataclasses.replace(SPEC, study="shots", value="a/../b").key


def test_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, tmp_path, f'sleep 0.2; echo "$nnUNet_cmems_config $nnUNet_results"; {summary()}')
    record = train(SPEC, str(tmp_path))
    folder = Path(run_folder(str(tmp_path), SPEC))
    assert record.state == "finished" and record.error is None and 0.2 <= record.wall_seconds < 20
    assert read_run(str(folder)) == record and record.spec == SPEC and is_finished(str(folder))
    assert json.loads((folder / "cmems.json").read_text()) == {"seed": 2}
    assert (folder / "log.txt").read_text() == f"{folder / 'cmems.json'} {folder / 'results'}\n"
    assert record.command == "nnUNetv2_train Dataset027_ACDC 2d 0 -tr nnUNetTrainerCMEMS -device cpu"
    assert record.versions["nnunetv2"] and record.gpu_hours == 0.0
    assert Path(fold_folder(str(folder))).is_relative_to(folder / "results")


def test_training_without_a_validation_is_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, tmp_path, "true")
    train(SPEC, str(tmp_path))
    assert not is_finished(run_folder(str(tmp_path), SPEC))
    assert not is_finished(str(tmp_path / "nothing"))


def test_failed_run_is_recorded_with_the_last_line_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, tmp_path, "echo fine; echo 'CMEMSError: no such slice'; echo; exit 3")
    record = train(SPEC, str(tmp_path))
    assert record.state == "failed" and record.error == "exit code 3: CMEMSError: no such slice"
    assert not is_finished(run_folder(str(tmp_path), SPEC))


def test_second_attempt_adds_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, tmp_path, "sleep 0.3; exit 1")
    first = train(SPEC, str(tmp_path))
    stand_in(monkeypatch, tmp_path, f"sleep 0.3; {summary()}")
    second = train(dataclasses.replace(SPEC, method="another name", threads=2), str(tmp_path))
    assert second.state == "finished" and second.error is None and second.started == first.started
    assert second.wall_seconds >= first.wall_seconds + 0.3 and second.spec.method == "another name"


def test_other_settings_under_the_same_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, tmp_path, summary())
    train(SPEC, str(tmp_path))
    before = Path(run_folder(str(tmp_path), SPEC), "run.json").read_text()
    with pytest.raises(CMEMSError, match="run.json is of a run with other settings; .* -o"):
        train(dataclasses.replace(SPEC, fold="1"), str(tmp_path))
    assert Path(run_folder(str(tmp_path), SPEC), "run.json").read_text() == before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"spec": {}}', '{"spec": {"dataset": "a"}, "state": "x"}', '{"state": "running"}'])
def test_record_that_cannot_be_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    for act in (read_run, is_finished):
        with pytest.raises(CMEMSError, match="run.json cannot be read as a run of a benchmark"):
            act(str(tmp_path))


def test_interruption_stops_the_training_and_leaves_an_unfinished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, tmp_path, 'echo $$ > "$folder/pid"; sleep 60')
    pid = Path(run_folder(str(tmp_path), SPEC), "pid")

    def interrupt() -> None:
        while not (pid.is_file() and pid.read_text().strip()):
            time.sleep(0.02)
        time.sleep(0.5)  # it is waited for by now
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        train(SPEC, str(tmp_path))
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    folder = run_folder(str(tmp_path), SPEC)
    assert read_run(folder).state == "running" and not is_finished(folder)
    assert read_run(folder).wall_seconds > 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "nnUNetv2_train Dataset027_ACDC 2d 0 -tr nnUNetTrainerCMEMS -device cpu"),
        (
            {"plans": "Other", "device": "cuda", "num_gpus": 2},
            "nnUNetv2_train Dataset027_ACDC 2d 0 -tr nnUNetTrainerCMEMS -p Other -num_gpus 2 -device cuda",
        ),
    ],
)
def test_command(changes: dict[str, Any], expected: str) -> None:
    assert training_command(dataclasses.replace(SPEC, **changes)) == expected


def test_real_training_that_is_killed_goes_on(workspace: Workspace, tmp_path: Path) -> None:
    """Killed after its first checkpoint; the second attempt ends it and says what it cost: 8 epochs of 2 steps of 12 passes."""
    overrides = {**QUICK, "exemplar": [EXEMPLAR], "num_epochs": 8}
    trainer = "nnUNetTrainerCMEMS_exemplarOnly"
    spec = RunSpec(DATASET, CONFIGURATION, "nnUNetPlans", "0", trainer, trainer, 1, 1, overrides=overrides, device="cpu", threads=1)
    folder = Path(run_folder(str(tmp_path), spec))

    def kill() -> None:
        while not list(folder.glob("results/*/*/fold_0/checkpoint_latest.pth")):
            time.sleep(0.01)
        subprocess.run(["pkill", "-9", "-f", str(folder)], check=False)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    first = train(spec, str(tmp_path))
    killer.join(10)
    assert first.state == "failed" and first.error is not None and "exit code -9" in first.error
    second = train(spec, str(tmp_path))
    assert second.state == "finished" and is_finished(str(folder)), (folder / "log.txt").read_text()[-2000:]
    assert "Epoch 7" in (folder / "log.txt").read_text() and (folder / "log.txt").read_text().count("Epoch 0") == 1
    assert second.passes == 8 * 2 * 3 * 4 and second.peak_rss_bytes > 50e6 and second.peak_gpu_bytes is None
