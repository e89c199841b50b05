"""``nnUNetv2_cmems demo``: the whole way from scans to masks, on made-up data, in a few minutes and without a GPU."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nnunetv2_cmems.commands.device import check_device
from nnunetv2_cmems.config import CONFIG_VARIABLE
from nnunetv2_cmems.errors import CMEMSError

HELP = "train from one annotated slice of made-up scans and show what comes out (minutes, no GPU needed)"

TRAINERS = {"CMEMS": ("nnUNetTrainerCMEMS", 1), "exemplar only": ("nnUNetTrainerCMEMS_exemplarOnly", 2)}
"""Column of the table -> trainer, and its steps for each of CMEMS's.

Both learn from the same slice with networks of the same size and the same augmentation. A step of CMEMS costs about 100 passes
of an image through a network (two networks; 4 exemplar, 4 synthetic and 4 unlabelled images in two views and a perturbed one
each), a step of the other 48 (one network, 16 exemplar images): twice the steps are about the same computation. CMEMS predicts with
the mean of its two networks.
"""

DATASET_ID = 901
CONFIGURATION = "2d_demo"
ITERATIONS_PER_EPOCH = 50

_MARKER = "demo.json"
_OURS = (_MARKER, "demo.png", "scores.json", "configs", "logs", "predictions", "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
# nnU-Net's console script of that name, of this Python, whether or not its folder is on the PATH. nnU-Net takes as many threads as
# there are cores; two commands at a time must share them, or they spend most of their time waiting for each other.
_CALL = """
import multiprocessing, sys
from importlib.metadata import entry_points
name, threads = sys.argv.pop(1), int(sys.argv.pop(1))
multiprocessing.cpu_count = lambda: threads
sys.argv[0] = name
[command] = {point.value: point for point in entry_points(group="console_scripts", name=name)}.values()
sys.exit(command.load()())
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("-o", metavar="FOLDER", default="nnunetv2_cmems_demo", help="folder to make and work in (default: %(default)s)")
    parser.add_argument("-device", choices=("cpu", "cuda", "mps"), default="cpu", help="where to train (default: %(default)s)")
    parser.add_argument(
        "--scans",
        type=int,
        default=24,
        help="scans to train with, at least 5; a fifth is for validation, and of the others one slice is annotated (default: %(default)s)",
    )
    parser.add_argument("--test_scans", type=int, default=6, help="test scans, never seen in training (default: %(default)s)")
    parser.add_argument(
        "--epochs", type=int, default=10, help=f"length of the trainings, in epochs of {ITERATIONS_PER_EPOCH} steps (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the scans and of the trainings (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="start afresh in the folder of an earlier demo")


def run(args: argparse.Namespace) -> None:
    """Run the demo.

    Args:
        args: what :func:`add_arguments` declares.

    Raises:
        CMEMSError: an argument does not fit, the folder is not ours to write into, or a stage failed.
    """
    if args.scans < 5:
        raise CMEMSError(f"--scans is {args.scans}; nnU-Net splits the training scans into 5 folds and needs at least 5 of them.")
    for name in ("test_scans", "epochs"):
        if getattr(args, name) < 1:
            raise CMEMSError(f"--{name} is {getattr(args, name)}; it must be at least 1.")
    if not 0 <= args.seed < 2**31:
        raise CMEMSError(f"--seed is {args.seed}; it must be between 0 and {2**31 - 1}.")
    check_device(args.device, "use -device cpu, which takes a few minutes")
    begin = time.monotonic()
    folder = prepare_folder(Path(args.o).expanduser().absolute(), overwrite=args.overwrite)
    scores = run_pipeline(
        folder, device=args.device, num_training=args.scans, num_test=args.test_scans, epochs=args.epochs, seed=args.seed
    )
    print(f"\nDice on {args.test_scans} unseen scans, learnt from ONE annotated slice; every other label was hidden:\n")
    print(table(scores))
    print(f"\npicture:         {folder / 'demo.png'}")
    for path in sorted(folder.glob(f"nnUNet_results/*/{TRAINERS['CMEMS'][0]}__*/fold_0/exemplar.png")):
        print(f"annotated slice: {path}")
    print(f"time:            {(time.monotonic() - begin) / 60:.1f} min")


def prepare_folder(folder: Path, *, overwrite: bool = False) -> Path:
    """Make ``folder``, or clear it of an earlier demo's files if ``overwrite`` is given.

    Returns:
        ``folder``, which now exists and bears the mark of a demo.

    Raises:
        CMEMSError: ``folder`` is a file, holds files that no demo wrote, holds a demo while ``overwrite`` is false,
            or cannot be written.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise CMEMSError(f"{folder} is a file; name another folder with -o.")
        if folder.is_dir() and any(folder.iterdir()):
            if not (folder / _MARKER).is_file():
                raise CMEMSError(f"{folder} is not empty and was not made by this demo; name another folder with -o.")
            if not overwrite:
                raise CMEMSError(f"{folder} holds an earlier demo; add --overwrite to start afresh, or name another folder with -o.")
            for name in reversed(_OURS):  # the marker last, so that an interruption leaves a demo's folder
                path = folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MARKER).write_text(json.dumps({"made_by": "nnUNetv2_cmems demo"}), encoding="utf-8")
    except OSError as error:
        raise CMEMSError(f"{folder} cannot be written ({error}); name another folder with -o.") from error
    return folder


def run_pipeline(
    folder: Path,
    *,
    device: str = "cpu",
    num_training: int,
    num_test: int,
    epochs: int,
    seed: int = 0,
    shape: Sequence[int] = (8, 96, 96),
    trainers: Mapping[str, tuple[str, int]] | None = None,
    iterations_per_epoch: int = ITERATIONS_PER_EPOCH,
) -> dict[str, np.ndarray]:
    """Scans, nnU-Net's planning and preprocessing, the trainings, the predictions, the picture.

    nnU-Net's own commands do the work, in processes of their own that see the folders and variables set here; this
    process's environment stays as it is. What they say goes to ``folder/logs``.

    Args:
        folder: an existing folder, made by :func:`prepare_folder`.
        device: ``"cpu"``, ``"cuda"`` or ``"mps"``.
        num_training: training scans.
        num_test: test scans.
        epochs: epochs of each training.
        seed: seed of the scans and of the trainings.
        shape: voxels (z, y, x) of a scan.
        trainers: as :data:`TRAINERS`, the default.
        iterations_per_epoch: optimiser steps an epoch of CMEMS.

    Returns:
        Column -> Dice (test scan, class without background); NaN where neither mask shows the class. Also in
        ``folder/scores.json``.

    Raises:
        CMEMSError: a stage failed; names its log file.
    """
    from nnunetv2_cmems.data.phantom import LABELS, write_dataset

    trainers = TRAINERS if trainers is None else trainers
    stages = _Stages(folder / "logs", _environment(folder), total=5)
    number = str(DATASET_ID)

    with stages.bar("make scans"):
        dataset = write_dataset(folder / "nnUNet_raw", DATASET_ID, num_training=num_training, num_test=num_test, seed=seed, shape=shape)
    stages.call("plan", _Command("nnUNetv2_plan_and_preprocess", ("-d", number, "--no_pp", "-npfp", "2")))
    _add_configuration(folder / "nnUNet_preprocessed" / dataset.name / "nnUNetPlans.json")
    stages.call("preprocess", _Command("nnUNetv2_preprocess", ("-d", number, "-c", CONFIGURATION, "-np", "2")))
    (folder / "configs").mkdir()
    trainings, predictions, outputs = [], [], {}
    for name, (trainer, steps) in trainers.items():
        config = {
            "num_epochs": epochs,
            "iterations_per_epoch": steps * iterations_per_epoch,
            "val_iterations_per_epoch": 1,
            "checkpoint_every": epochs,
            "seed": seed,
        }
        path = folder / "configs" / f"{trainer}.json"
        path.write_text(json.dumps(config, indent=4), encoding="utf-8")
        to_train = (number, CONFIGURATION, "0", "-tr", trainer, "-device", device)
        trainings.append(_Command("nnUNetv2_train", to_train, {CONFIG_VARIABLE: str(path), "nnUNet_n_proc_DA": "0"}, epochs, f"_{trainer}"))
        outputs[name] = folder / "predictions" / trainer
        to_predict = (
            "-i", str(dataset / "imagesTs"), "-o", str(outputs[name]), "-d", number, "-c", CONFIGURATION, "-f", "0", "-tr", trainer,
            "-device", device, "-npp", "0", "-nps", "0", "--disable_progress_bar",
        )  # fmt: skip
        predictions.append(_Command("nnUNetv2_predict", to_predict, suffix=f"_{trainer}"))
    stages.call(f"train {' and '.join(trainers)}", *trainings)
    stages.call("predict unseen scans", *predictions)

    cases = _read_cases(dataset, outputs)
    classes = [index for index in LABELS.values() if index > 0]
    scores = {name: np.array([dice(case.predictions[name], case.truth, classes) for case in cases]) for name in trainers}
    by_case = {name: {case.name: list(map(float, row)) for case, row in zip(cases, rows, strict=True)} for name, rows in scores.items()}
    (folder / "scores.json").write_text(json.dumps(by_case, indent=4), encoding="utf-8")
    draw(cases, scores, folder / "demo.png")
    return scores


@dataclass(frozen=True)
class Case:
    """A test scan.

    Attributes:
        name: the case identifier.
        image: (z, y, x), grey values.
        truth: (z, y, x), labels.
        predictions: column of the table -> (z, y, x), labels.
    """

    name: str
    image: np.ndarray
    truth: np.ndarray
    predictions: dict[str, np.ndarray]


def dice(prediction: np.ndarray, truth: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """Dice of each class over a whole scan; NaN where neither mask shows the class.

    Args:
        prediction: labels, any shape.
        truth: labels, the same shape.
        classes: the labels to score.

    Returns:
        (class,), float64.
    """
    scores = np.full(len(classes), np.nan)
    for i, label in enumerate(classes):
        a, b = prediction == label, truth == label
        size = int(a.sum()) + int(b.sum())
        if size:
            scores[i] = 2 * int((a & b).sum()) / size
    return scores


def table(scores: Mapping[str, np.ndarray]) -> str:
    """The mean Dice over the scans, a row for each class and one for their mean.

    Args:
        scores: column -> Dice (scan, class).
    """
    from nnunetv2_cmems.data.phantom import LABELS

    rows = [*(name for name, label in LABELS.items() if label > 0), "mean"]
    columns = {}
    for name, values in scores.items():
        per_class = [float(np.nanmean(column)) if np.isfinite(column).any() else float("nan") for column in values.T]
        columns[name] = [*per_class, float(np.nanmean(per_class)) if np.isfinite(per_class).any() else float("nan")]
    left = max(map(len, rows))
    widths = {name: max(len(name), 5) for name in columns}
    lines = [" " * left + "".join(f"   {name:>{widths[name]}}" for name in columns)]
    for i, row in enumerate(rows):
        lines.append(f"{row:<{left}}" + "".join(f"   {columns[name][i]:>{widths[name]}.3f}" for name in columns))
    return "\n".join(lines)


def draw(cases: Sequence[Case], scores: Mapping[str, np.ndarray], path: Path, rows: int = 3) -> None:
    """Write a picture: a row for each of the first scans, the columns image, truth and one for each trainer.

    Of each scan, the slice is shown in which the class with the fewest voxels has the most.

    Args:
        cases: the test scans, at least one.
        scores: column -> Dice (scan, class).
        path: the PNG file to write.
        rows: the most rows to draw.

    Raises:
        OSError: the file cannot be written.
    """
    from nnunetv2_cmems.data.phantom import LABELS
    from nnunetv2_cmems.study.pictures import montage

    drawn, titles = [], []
    for i, case in enumerate(cases[:rows]):
        counts = np.stack([(case.truth == label).sum((1, 2)) for label in LABELS.values() if label > 0])
        z = int(counts.min(0).argmax()) if counts.min(0).any() else int(counts.sum(0).argmax())
        masks = {"truth": case.truth, **case.predictions}
        drawn.append({"test image": (case.image[z], None), **{name: (case.image[z], mask[z]) for name, mask in masks.items()}})
        titles.append("\n".join(f"{name}: Dice {np.nanmean(values[i]):.2f}" for name, values in scores.items()))
    names = {label: name for name, label in LABELS.items() if label > 0}
    montage(path, drawn, names, row_titles=titles, title="Trained from one annotated slice: unseen scans")


@dataclass(frozen=True)
class _Command:
    """One of nnU-Net's commands: name, arguments, further environment, epochs it reports, what its log file's name ends in."""

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    epochs: int = 1
    suffix: str = ""


class _Bar(tqdm):
    """A progress bar that ends full unless an exception passes."""

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.update(self.total - self.n)
        super().__exit__(kind, error, trace)


class _Stages:
    """Runs the stages one after the other, with a progress bar and log files for each."""

    def __init__(self, logs: Path, environment: dict[str, str], total: int) -> None:
        self.logs = logs
        self.environment = environment
        self.total = total
        self.done = 0

    def bar(self, name: str, steps: int = 1) -> _Bar:
        """The progress bar of the next stage."""
        self.done += 1
        return _Bar(total=steps, desc=f"[{self.done}/{self.total}] {name:<30}", bar_format="{desc} {bar:20} {n_fmt}/{total_fmt}  {elapsed}")

    def call(self, name: str, *commands: _Command) -> None:
        """Run the commands of the next stage side by side; the bar follows the lines ``Epoch <number>`` of their output."""
        bar = self.bar(name, sum(command.epochs for command in commands))
        threads = max(1, min(4, _count_cores() // len(commands)))
        self.logs.mkdir(exist_ok=True)
        running: list[_Running] = []
        with bar:
            try:
                for command in commands:
                    log = self.logs / f"{self.done}_{command.name.removeprefix('nnUNetv2_')}{command.suffix}.log"
                    running.append(_Running(command, log, self.environment, threads))
                while any(process.is_running() for process in running):
                    time.sleep(0.3)
                    bar.update(sum(process.epochs_done() for process in running) - bar.n)
                    if sys.stderr.isatty():
                        bar.refresh()  # the clock
                    for process in running:
                        process.raise_if_failed(name)
                for process in running:
                    process.raise_if_failed(name)
            finally:
                for process in running:
                    process.stop()


class _Running:
    """A command at work. Its output goes to a file, not a pipe: a worker that outlives a failed command would keep a pipe open."""

    def __init__(self, command: _Command, log: Path, environment: Mapping[str, str], threads: int) -> None:
        self.command = command
        self.log = log
        with open(log, "w", encoding="utf-8") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _CALL, command.name, str(threads), *command.arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**environment, **command.environment},
            )

    def is_running(self) -> bool:
        return self.process.poll() is None

    def epochs_done(self) -> int:
        """The last epoch that the output names; all of them once the command has ended."""
        if self.process.poll() == 0:
            return self.command.epochs
        epochs = re.findall(r"\bEpoch (\d+)\s*$", self._output(), flags=re.MULTILINE)
        return min(int(epochs[-1]), self.command.epochs) if epochs else 0

    def raise_if_failed(self, stage: str) -> None:
        if self.process.poll():
            said = [line.strip() for line in self._output().splitlines() if line.strip()]
            last = f" ({said[-1][:300]})" if said else ""
            raise CMEMSError(f"the demo's stage '{stage}' failed{last}; the whole output of {self.command.name} is in {self.log}.")

    def stop(self) -> None:
        if self.is_running():
            self.process.terminate()
            self.process.wait()

    def _output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


def _count_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _environment(folder: Path) -> dict[str, str]:
    """This process's environment with what nnU-Net's commands need in a demo."""
    ours = str(Path(__file__).resolve().parent.parent / "ext_trainer")
    given = [path for path in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if path and path != ours]
    return {
        **os.environ,
        "nnUNet_raw": str(folder / "nnUNet_raw"),
        "nnUNet_preprocessed": str(folder / "nnUNet_preprocessed"),
        "nnUNet_results": str(folder / "nnUNet_results"),
        "nnUNet_extTrainer": os.pathsep.join([ours, *given]),
        "OMP_WAIT_POLICY": "PASSIVE",  # on a busy computer, waiting threads would take the time of working ones
        "nnUNet_compile": "f",  # compiling takes longer than it saves here
        "nnUNet_n_proc_DA": "1",  # 0, the least, is refused by nnU-Net's planner; the trainings take 0
        "nnUNet_def_n_proc": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
    }


def _add_configuration(plans_file: Path) -> None:
    """Add the demo's small configuration to nnU-Net's plans."""
    from nnunetv2_cmems.study.small_configuration import small_configuration

    plans = json.loads(plans_file.read_text(encoding="utf-8"))
    plans["configurations"][CONFIGURATION] = small_configuration(
        plans, "2d", CONFIGURATION, patch_size=(64, 64), spacing=(2.25, 2.25), features=(8, 16, 32, 48), batch_size=16
    )
    plans_file.write_text(json.dumps(plans, indent=4), encoding="utf-8")


def _read_cases(dataset: Path, predictions: Mapping[str, Path]) -> list[Case]:
    import SimpleITK as sitk

    def read(path: Path) -> np.ndarray:
        return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))

    cases = []
    for path in sorted((dataset / "labelsTs").glob("*.nii.gz")):
        name = path.name.removesuffix(".nii.gz")
        predicted = {column: read(folder / path.name) for column, folder in predictions.items()}
        cases.append(Case(name, read(dataset / "imagesTs" / f"{name}_0000.nii.gz"), read(path), predicted))
    return cases
