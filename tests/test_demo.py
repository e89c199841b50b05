"""The demo command: its folder, its stages, its table and its picture."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pytest

from nnunetv2_cmems.commands import demo
from nnunetv2_cmems.data.phantom import make_scan
from nnunetv2_cmems.errors import CMEMSError


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--scans", "4"], "at least 5"),
        (["--test_scans", "0"], "--test_scans is 0"),
        (["--epochs", "0"], "--epochs is 0"),
        (["--seed", "-1"], "--seed is -1"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    with pytest.raises(CMEMSError, match=sentence):
        demo.run(parse("-o", str(tmp_path / "demo"), *arguments))
    assert not list(tmp_path.iterdir())


def test_missing_device_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(CMEMSError, match="no cuda device"):
        demo.run(parse("-o", str(tmp_path / "demo"), "-device", "cuda"))
    assert not list(tmp_path.iterdir())


def test_folder_is_made_and_not_taken_twice(tmp_path: Path) -> None:
    folder = demo.prepare_folder(tmp_path / "a" / "demo")
    (folder / "predictions").mkdir()
    (folder / "demo.png").write_bytes(b"old")
    (folder / "notes.txt").write_text("the user's own")
    with pytest.raises(CMEMSError, match="--overwrite"):
        demo.prepare_folder(folder)
    assert (folder / "demo.png").exists()
    demo.prepare_folder(folder, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["demo.json", "notes.txt"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_folder_is_left_alone(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "nnUNet_raw").mkdir()
    with pytest.raises(CMEMSError, match="was not made by this demo"):
        demo.prepare_folder(tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["nnUNet_raw"]


def test_file_in_the_folders_place(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("")
    with pytest.raises(CMEMSError, match="is a file"):
        demo.prepare_folder(tmp_path / "demo")
    with pytest.raises(CMEMSError, match="cannot be written"):
        demo.prepare_folder(tmp_path / "demo" / "below")


def test_environment_is_for_the_stages_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_raw", "the user's")
    monkeypatch.setenv("nnUNet_extTrainer", "another")
    environment = demo._environment(tmp_path)
    assert os.environ["nnUNet_raw"] == "the user's"
    assert environment["nnUNet_raw"] == str(tmp_path / "nnUNet_raw")
    ours, theirs = environment["nnUNet_extTrainer"].split(os.pathsep)
    assert Path(ours).name == "ext_trainer" and theirs == "another"


def test_failed_stage_names_its_log_file(tmp_path: Path) -> None:
    stages = demo._Stages(tmp_path / "logs", dict(os.environ), total=1)
    with pytest.raises(CMEMSError, match=r"stage 'plan' failed .*1_pytest_b\.log"):
        stages.call("plan", demo._Command("pytest", ("--version",)), demo._Command("pytest", ("--no-such-option",), suffix="_b"))
    assert "--no-such-option" in (tmp_path / "logs" / "1_pytest_b.log").read_text()


def test_epochs_are_read_from_the_output(tmp_path: Path) -> None:
    running = demo._Running(demo._Command("pytest", ("--no-such-option",), epochs=5), tmp_path / "log", os.environ, threads=1)
    running.process.wait()
    assert running.epochs_done() == 0
    running.log.write_text("Epoch 1\n2026: Epoch 2 \nEpoch time: 3 s\nnot Epoch 4 but")
    assert running.epochs_done() == 2


def test_dice() -> None:
    truth = np.array([[1, 1, 2, 0]])
    prediction = np.array([[1, 0, 3, 0]])
    np.testing.assert_allclose(demo.dice(prediction, truth, [1, 2, 3, 4]), [2 / 3, 0, 0, np.nan])


def test_table() -> None:
    scores = {"CMEMS": np.array([[0.8, np.nan, 0.5], [0.9, 0.6, 0.7]]), "exemplar only": np.array([[0.4, np.nan, 0.1], [0.6, np.nan, 0.1]])}
    lines = demo.table(scores).splitlines()
    assert [line.split("  ")[0].strip() for line in lines] == ["", "wall", "left cavity", "right cavity", "mean"]
    assert [line.split()[-2:] for line in lines[1:]] == [["0.850", "0.500"], ["0.600", "nan"], ["0.600", "0.100"], ["0.683", "0.300"]]
    assert len({len(line) for line in lines}) == 1


def test_picture(tmp_path: Path) -> None:
    cases = []
    for seed in range(2):
        image, label = make_scan(seed, (2, 32, 32))
        cases.append(demo.Case(f"case{seed}", image, label, {"CMEMS": label, "exemplar only": np.zeros_like(label)}))
    scores = {"CMEMS": np.ones((2, 3)), "exemplar only": np.zeros((2, 3))}
    demo.draw(cases, scores, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_whole_way(tmp_path: Path) -> None:
    folder = demo.prepare_folder(tmp_path / "demo")
    scores = demo.run_pipeline(
        folder,
        num_training=5,
        num_test=1,
        epochs=1,
        shape=(4, 48, 48),
        iterations_per_epoch=1,
        trainers={"CMEMS": ("nnUNetTrainerCMEMS", 1)},
    )
    assert scores["CMEMS"].shape == (1, 3)
    assert list(json.loads((folder / "scores.json").read_text())["CMEMS"]) == ["phantom_ts000"]
    assert (folder / "demo.png").is_file()
