"""One small phantom data set, planned and preprocessed by nnU-Net once, and copies of it that a test may damage."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.dummy
import pickle
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
from nnunetv2.run import run_training
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_cmems.data.phantom import write_dataset
from nnunetv2_cmems.study import pictures
from nnunetv2_cmems.study.small_configuration import small_configuration
from nnunetv2_cmems.trainers import nnUNetTrainerCMEMS

DATASET_ID = 902
DATASET = f"Dataset{DATASET_ID}_Small"
CONFIGURATION = "2d_small"
PATCH = (32, 32)
CASES = [f"phantom_tr{i:03d}" for i in range(6)]
TRAINING, VALIDATION = CASES[:4], CASES[4:]
"""Fold 0."""

EXEMPLAR = {"case": CASES[1], "slice": 1}
QUICK: dict[str, Any] = {
    "num_epochs": 1,
    "iterations_per_epoch": 2,
    "val_iterations_per_epoch": 1,
    "seed": 1,
    "checkpoint_every": 1,
    "image": {"start": 0.0, "rampup": 0.2},
    "feature": {"start": 0.0, "rampup": 0.2},
}
"""The config of a training that takes about a second; every term takes part from its second step on."""

PICTURES = (
    "nnunetv2.training.logging.nnunet_logger.LocalLogger.plot_progress_png",
    "nnunetv2_cmems.trainers.history.plot_curves",
    "nnunetv2_cmems.trainers.snapshot.plot_exemplar",
)
"""What draws the pictures of a training, which takes longer than these trainings themselves."""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only lose by more threads, and lose a lot where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_arrives() -> None:
    """A shell lets what it runs in the background ignore Ctrl-C, which some tests send to themselves."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``raw`` and ``preprocessed``: six training scans and two test scans, made ready by nnU-Net itself."""
    root = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        _set_paths(patch, root)
        _pools_are_threads(patch)
        write_dataset(root / "raw", DATASET_ID, "Small", len(CASES), 2, shape=(5, 48, 48))
        extract_fingerprints([DATASET_ID], num_processes=1)
        plan_experiments([DATASET_ID])
        path = root / "preprocessed" / DATASET / "nnUNetPlans.json"
        plans = json.loads(path.read_text())
        plans["configurations"][CONFIGURATION] = small_configuration(
            plans, "2d", CONFIGURATION, patch_size=PATCH, spacing=(2.0, 2.0), features=(8, 16, 16), batch_size=4
        )
        path.write_text(json.dumps(plans))
        preprocess([DATASET_ID], configurations=(CONFIGURATION,), num_processes=(1,))
    (path.parent / "splits_final.json").write_text(json.dumps([{"train": TRAINING, "val": VALIDATION}]))
    return root


def interrupted(trainer: Any, epochs: int) -> Any:
    """The trainer, stopped after so many epochs, like a process that is killed."""
    start = trainer.on_epoch_start

    def stop() -> None:
        if trainer.current_epoch == epochs:
            raise KeyboardInterrupt
        start()

    trainer.on_epoch_start = stop
    with pytest.raises(KeyboardInterrupt):
        trainer.run_training()
    return trainer


class Workspace:
    """A copy of the preprocessed data set that belongs to one test, with an empty results folder beside it.

    Attributes:
        raw: the raw data set; shared by all tests.
        base: the data set's preprocessed folder.
        images: the configuration's folder in it.
        results: nnU-Net's results folder, which does not exist yet.
    """

    def __init__(self, root: Path, prepared: Path) -> None:
        self.raw = prepared / "raw" / DATASET
        self.base = root / "preprocessed" / DATASET
        self.images = self.base / f"nnUNetPlans_{CONFIGURATION}"
        self.results = root / "results"
        shutil.copytree(prepared / "preprocessed" / DATASET, self.base)

    def configure(self, **overrides: Any) -> None:
        """Write ``cmems.json``: a very short training, changed by ``overrides``."""
        (self.base / "cmems.json").write_text(json.dumps({**QUICK, **overrides}))

    def plans(self) -> dict[str, Any]:
        plans: dict[str, Any] = json.loads((self.base / "nnUNetPlans.json").read_text())
        return plans

    def dataset_json(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.base / "dataset.json").read_text())
        return content

    def make(
        self,
        trainer: type[nnUNetTrainer] = nnUNetTrainerCMEMS,
        *,
        fold: int | str = 0,
        continues: bool = False,
        plans: dict[str, Any] | None = None,
        dataset_json: dict[str, Any] | None = None,
        configuration: str = CONFIGURATION,
    ) -> Any:
        """A trainer, as nnU-Net's command makes it, that has not started yet."""
        plans = {**(plans or self.plans()), "continue_training": continues}
        return trainer(plans, configuration, fold, dataset_json or self.dataset_json(), torch.device("cpu"))  # type: ignore[arg-type]

    def train(self, trainer: type[nnUNetTrainer] = nnUNetTrainerCMEMS, **arguments: Any) -> Any:
        """A trainer that has finished its training."""
        made = self.make(trainer, **arguments)
        made.run_training()
        return made

    def interrupted(self, epochs: int, trainer: Any = None) -> Any:
        """A trainer (a new one, if none is given) that was stopped after so many epochs, like a process that is killed."""
        return interrupted(self.make() if trainer is None else trainer, epochs)

    def resume(self, trainer: type[nnUNetTrainer] = nnUNetTrainerCMEMS, fold: int | str = 0) -> Any:
        """A trainer that has loaded what ``--c`` loads."""
        made = self.make(trainer, fold=fold, continues=True)
        run_training.maybe_load_checkpoint(made, True, False)
        return made

    def fold(self, trainer: str = "nnUNetTrainerCMEMS", fold: int | str = 0) -> Path:
        """The folder that a training writes."""
        return self.results / DATASET / f"{trainer}__nnUNetPlans__{CONFIGURATION}" / f"fold_{fold}"

    def image(self, case: str) -> np.ndarray:
        """A preprocessed image (C, Z, Y, X)."""
        return np.array(blosc2.open(str(self.images / f"{case}.b2nd"))[:])

    def set_image(self, case: str, image: np.ndarray) -> None:
        self._write(self.images / f"{case}.b2nd", image)

    def label(self, case: str) -> np.ndarray:
        """A preprocessed label (1, Z, Y, X)."""
        return np.array(blosc2.open(str(self.images / f"{case}_seg.b2nd"))[:])

    def set_label(self, case: str, label: np.ndarray) -> None:
        self._write(self.images / f"{case}_seg.b2nd", label)

    def change_properties(self, case: str, **changes: Any) -> None:
        """Change what nnU-Net saved beside a preprocessed image."""
        path = self.images / f"{case}.pkl"
        path.write_bytes(pickle.dumps({**pickle.loads(path.read_bytes()), **changes}))

    @staticmethod
    def _write(path: Path, array: np.ndarray) -> None:
        path.unlink(missing_ok=True)
        blosc2.asarray(np.ascontiguousarray(array), urlpath=str(path), chunks=(1, 1, *array.shape[2:]))


@pytest.fixture
def workspace(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A data set of one's own, a very short training's config, no worker processes, no pictures."""
    made = Workspace(tmp_path, prepared)
    made.configure()
    _set_paths(monkeypatch, tmp_path)
    monkeypatch.setenv("nnUNet_raw", str(prepared / "raw"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("nnUNet_cmems_config", raising=False)
    monkeypatch.delenv("nnUNet_compile", raising=False)
    for picture in PICTURES:
        monkeypatch.setattr(picture, lambda *_: None)
    monkeypatch.setattr(run_training, "load_pretrained_weights", run_training.load_pretrained_weights)  # the trainer replaces it
    return made


@pytest.fixture
def pools_are_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nnU-Net's validation work in threads: it spawns processes that import everything again, for seconds."""
    _pools_are_threads(monkeypatch)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved during the test."""
    seen: list[Figure] = []
    original = pictures._save

    def remember(figure: Figure, path: Any) -> None:
        seen.append(figure)
        original(figure, path)

    monkeypatch.setattr(pictures, "_save", remember)
    return seen


def in_three_dimensions(workspace: Workspace) -> dict[str, Any]:
    """Plan another configuration of the same preprocessed files, whose slices have the phantom's distance.

    Returns:
        Arguments of :meth:`Workspace.make`.
    """
    plans = workspace.plans()
    spacing = plans["original_median_spacing_after_transp"]
    made = small_configuration(
        plans, "3d_fullres", "3d_small", patch_size=(4, 32, 32), spacing=(spacing[0], 2.0, 2.0), features=(8, 16, 16), batch_size=4
    )
    plans["configurations"]["3d_small"] = {**made, "data_identifier": f"nnUNetPlans_{CONFIGURATION}"}
    (workspace.base / "nnUNetPlans.json").write_text(json.dumps(plans))
    return {"configuration": "3d_small"}


def with_regions(workspace: Workspace) -> dict[str, Any]:
    """Let ``dataset.json`` name regions in place of classes; returns what :func:`in_three_dimensions` does."""
    labels = {"background": 0, "heart": [1, 2, 3], "left": [1, 2], "left cavity": [2]}
    content = {**workspace.dataset_json(), "labels": labels, "regions_class_order": [3, 1, 2]}
    (workspace.base / "dataset.json").write_text(json.dumps(content))
    return {}


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    """A copy of the network's weights."""
    return {key: value.detach().clone() for key, value in trainer.network.state_dict().items()}


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def logs(trainer: Any) -> dict[str, list[Any]]:
    """Everything that was logged, but for the time of day."""
    every = trainer.logger.local_logger.my_fantastic_logging
    return {key: list(values) for key, values in every.items() if not key.endswith("timestamps")}


def _set_paths(patch: pytest.MonkeyPatch, root: Path) -> None:
    for name in ("raw", "preprocessed", "results"):
        patch.setenv(f"nnUNet_{name}", str(root / name))


def _pools_are_threads(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(multiprocessing, "get_context", lambda method=None: multiprocessing.dummy)
