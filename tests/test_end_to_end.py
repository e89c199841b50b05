"""nnU-Net's real commands: train, be killed, continue, predict, export, predict without this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import CONFIGURATION, DATASET_ID, VALIDATION, Workspace

COMMANDS = {
    "nnUNetv2_train": "nnunetv2.run.run_training:run_training_entry",
    "nnUNetv2_predict": "nnunetv2.inference.predict_from_raw_data:predict_entry_point",
    "nnUNetv2_predict_from_modelfolder": "nnunetv2.inference.predict_from_raw_data:predict_entry_point_modelfolder",
    "nnUNetv2_cmems": "nnunetv2_cmems.commands.main:main",
}
"""As their packages declare them; a test needs no folder of scripts for them."""

WITHOUT_THE_PACKAGE = """
import os, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "nnunetv2_cmems":
            raise ModuleNotFoundError("blocked: " + name)

sys.meta_path.insert(0, Blocker())
os.environ.pop("nnUNet_extTrainer", None)
try:
    import nnunetv2_cmems
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the package can be imported")
"""


def begin(command: str, *arguments: str, log: Path, before: str = "") -> subprocess.Popen[bytes]:
    """Start one of the commands in a process of its own; what it says goes to ``log``."""
    module, function = COMMANDS[command].split(":")
    script = f"{before}\nif __name__ == '__main__':\n    import torch\n    torch.set_num_threads(1)\n"
    script += f"    torch.set_num_threads = lambda n: None\n    from {module} import {function} as f\n    f()\n"
    environment = {**os.environ, "nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "PYTHONUTF8": "1"}
    with open(log, "wb") as out:
        return subprocess.Popen([sys.executable, "-c", script, *arguments], env=environment, cwd=log.parent, stdout=out, stderr=out)


def run(command: str, *arguments: str, log: Path, before: str = "") -> str:
    """Run one of the commands to its end."""
    process = begin(command, *arguments, log=log, before=before)
    code = process.wait(timeout=500)
    assert code == 0, log.read_text()
    return log.read_text()


def kill_after_the_first_checkpoint(process: subprocess.Popen[bytes], latest: Path, log: Path) -> None:
    try:
        deadline = time.monotonic() + 500
        while not latest.is_file():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()


def read_masks(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in sorted(folder.glob("*.nii.gz"))}


def logged(checkpoint: Path) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = torch.load(checkpoint, map_location="cpu", weights_only=False)["logging"]
    return found


def test_train_be_killed_continue_predict_export(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace.configure(num_epochs=4, iterations_per_epoch=4, architecture="plans", refine_predictions=False)  # as an export predicts
    fold = workspace.fold()
    train = (str(DATASET_ID), CONFIGURATION, "0", "-tr", "nnUNetTrainerCMEMS", "-device", "cpu")

    log = tmp_path / "train.log"
    kill_after_the_first_checkpoint(begin("nnUNetv2_train", *train, log=log), fold / "checkpoint_latest.pth", log)
    assert not (fold / "checkpoint_final.pth").exists()
    before = logged(fold / "checkpoint_latest.pth")
    exemplar = json.loads((fold / "cmems_config.json").read_text())["exemplars"]

    run("nnUNetv2_train", *train, "--c", log=tmp_path / "continue.log")
    after = logged(fold / "checkpoint_final.pth")
    done = len(before["train_losses"])
    assert 1 <= done < 4
    for key, values in before.items():
        assert len(after[key]) == 4, key
        np.testing.assert_equal(after[key][:done], values)
    assert json.loads((fold / "cmems_config.json").read_text())["exemplars"] == exemplar
    cases = json.loads((fold / "validation" / "summary.json").read_text())["metric_per_case"]
    assert [Path(case["prediction_file"]).name for case in cases] == [f"{case}.nii.gz" for case in VALIDATION]
    assert (fold / "progress.png").is_file() and (fold / "cmems_progress.png").is_file()
    numbers = json.loads((fold / "cmems_history.json").read_text())
    assert numbers["loss/supervised"] == pytest.approx(after["loss/supervised"]) and len(numbers["train_losses"]) == 4
    reliability = json.loads((fold / "cmems_reliability.json").read_text())
    assert [sum(epoch["count"]) for epoch in reliability["epochs"]] == [sum(reliability["epochs"][0]["count"])] * 4

    scans = str(workspace.raw / "imagesTs")
    quietly = ("-device", "cpu", "--disable_progress_bar")
    here, aside = ("-npp", "0", "-nps", "0"), ("-npp", "1", "-nps", "1")  # the second command knows no 0
    model = ("-d", str(DATASET_ID), "-c", CONFIGURATION, "-f", "0", "-tr", "nnUNetTrainerCMEMS")
    run("nnUNetv2_predict", "-i", scans, "-o", str(tmp_path / "ours"), *model, *quietly, *here, log=tmp_path / "predict.log")

    said = run("nnUNetv2_cmems", "export", *model[:6], "-o", str(tmp_path / "exported"), log=tmp_path / "export.log")
    assert f"-m {tmp_path / 'exported'} -f 0 1" in said

    for name in ("raw", "preprocessed", "results"):  # the folder is all that is needed
        monkeypatch.delenv(f"nnUNet_{name}")
    folder = ("-i", scans, "-o", str(tmp_path / "theirs"), "-m", str(tmp_path / "exported"), "-f", "0", "1")
    run("nnUNetv2_predict_from_modelfolder", *folder, *quietly, *aside, log=tmp_path / "without.log", before=WITHOUT_THE_PACKAGE)

    ours, theirs = read_masks(tmp_path / "ours"), read_masks(tmp_path / "theirs")
    assert list(ours) == list(theirs) == ["phantom_ts000.nii.gz", "phantom_ts001.nii.gz"]
    for name, mask in ours.items():
        assert mask.shape == (5, 48, 48) and len(np.unique(mask)) > 1
        assert np.array_equal(mask, theirs[name]), name
