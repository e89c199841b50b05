"""Another device than the CPU, without one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TRAINING, VALIDATION, Workspace
from torch.utils import backend_registration

PROGRAM = Path(__file__).with_name("pretended_device.py")
pretended = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="this PyTorch cannot pretend a device"
)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "nnUNet_compile": "f"}
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=PROGRAM.parent, capture_output=True, text=True)


@pretended
def test_a_training_and_its_predictions(workspace: Workspace, tmp_path: Path) -> None:
    """A round of labels, a checkpoint, and views of turned scans included, every tensor is where it is used."""
    (workspace.base / "splits_final.json").write_text(json.dumps([{"train": TRAINING, "val": VALIDATION[:1]}]))
    workspace.configure(num_epochs=2, scan_labels={"at": [0.5], "arranged_only": False, "turns": [-60]})
    scans, output = tmp_path / "scans", tmp_path / "output"
    scans.mkdir(), output.mkdir()
    shutil.copy(next((workspace.raw / "imagesTs").iterdir()), scans)
    done = python(str(PROGRAM), str(workspace.base), str(scans), str(output))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "pretended:0" in done.stdout and len(list(output.glob("*.nii.gz"))) == 1
    assert "Labelling whole unlabelled scans: 3 in" in done.stdout and "Mean Validation Dice" in done.stdout


def test_half_precision(workspace: Workspace) -> None:
    """With autocast and scaled gradients, as on a GPU: no step is skipped, and the losses are those of full precision at first."""
    workspace.configure(num_epochs=2, scan_labels={"at": [0.5], "arranged_only": False}, image={"start": 0.0, "rampup": 0.0})
    losses: dict[bool, list[float]] = {False: [], True: []}
    for half, found in losses.items():
        trainer = workspace.make()
        if half:
            trainer._autocast = lambda: torch.autocast("cpu", dtype=torch.float16)
            trainer.grad_scaler = torch.amp.GradScaler("cpu")
        step = trainer.train_step

        def noted(batch: dict[str, Any], step: Any = step, found: list[float] = found) -> dict[str, Any]:
            done: dict[str, Any] = step(batch)
            found.append(done["loss"])
            return done

        trainer.train_step = noted
        trainer.run_training()
    assert len(losses[True]) == 4 and np.isfinite(losses[True]).all()
    assert losses[True][0] != losses[False][0] and losses[True][0] == pytest.approx(losses[False][0], rel=0.01)
    assert {parameter.dtype for parameter in trainer.network.parameters()} == {torch.float32}


@pretended
def test_what_a_gpu_refuses_is_refused() -> None:
    """Or the training above would prove nothing; and what a GPU takes is taken."""
    mixed = ["on + torch.ones(2)", "torch.ones(2).add_(on)", "torch.ones(2)[on > 0] + on", "torch.nn.Linear(2, 1)(on)", "on.numpy()"]
    taken = ["on + 1 + torch.tensor(1.0)", "on[torch.tensor([0])]", "on.cpu().numpy()", "torch.ones(2).copy_(on)", "float(on.sum())"]
    program = f"""
from pretended_device import *
on = torch.zeros(2, device=DEVICE)
for tried in {mixed + taken}:
    try:
        eval(tried)
        print("taken")
    except RuntimeError as error:
        print("refused", error)
"""
    said = python("-c", program).stdout.splitlines()
    assert len(said) == 10
    assert all("pretended:0 and on the CPU" in line for line in said[:4]) and "numpy() is not supported" in said[4]
    assert said[5:] == ["taken"] * 5
