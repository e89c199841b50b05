"""Memory does not grow: neither this process's, nor that of the processes that read images."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pkgutil
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PICTURES, Workspace
from matplotlib import pyplot
from matplotlib.figure import Figure

from nnunetv2_cmems.trainers import nnUNetTrainerCMEMS_exemplarOnly

REAL_PICTURES = {name: pkgutil.resolve_name(name) for name in PICTURES}
needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say how much memory is resident")


def resident(process: int | str = "self") -> int:
    """Bytes of memory that a process has in RAM."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def after_each_step(trainer: Any, act: Callable[[], Any]) -> None:
    step = trainer.train_step

    def stepped(batch: Any) -> Any:
        result = step(batch)
        act()
        return result

    trainer.train_step = stepped


def size_of(tensor: torch.Tensor) -> int:
    """Bytes; 0 for what has no size, as a compiler's tensors of symbolic sizes that an earlier test has left."""
    try:
        return tensor.nbytes
    except RuntimeError:
        return 0


def living() -> Counter[str]:
    """What Python's garbage collector keeps track of, by type; the bytes of tensors; open files."""
    gc.collect()
    objects = gc.get_objects()
    found = Counter(type(found).__name__ for found in objects)
    found["bytes of tensors"] = sum(size_of(found) for found in objects if issubclass(type(found), torch.Tensor))
    found["open files"] = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    return found


def test_nothing_is_left_of_an_epoch(workspace: Workspace) -> None:
    """Every object counts, so that a few epochs tell what 2,000 steps would. What comes but once is no leak."""
    between = 2
    workspace.configure(num_epochs=3 * between, iterations_per_epoch=4)
    trainer = workspace.make()
    begin = trainer.on_epoch_start
    seen: list[Counter[str]] = []

    def counted() -> None:
        begin()
        if trainer.current_epoch % between == between - 1:
            seen.append(living())

    trainer.on_epoch_start = counted
    trainer.run_training()
    first, second, third = seen
    logged = Counter({"list": between})  # nnU-Net's log of each epoch's Dice per class
    more = ((second - first) & (third - second)) - logged
    assert not {kind: count for kind, count in more.items() if count >= between}, "one or more are left of each epoch"


def test_nothing_is_left_of_pictures(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even until Python looks for cycles of references: figures are such, and large."""
    figures: list[weakref.ref[Figure]] = []
    left: list[int] = []

    def draw(*_: Any) -> None:
        figures.append(weakref.ref(pyplot.figure()))
        pyplot.close()

    for name in PICTURES:
        monkeypatch.setattr(name, draw)
    trainer = workspace.make(nnUNetTrainerCMEMS_exemplarOnly)
    end = trainer.on_train_end
    trainer.on_train_end = lambda: (left.append(sum(figure() is not None for figure in figures)), end())
    trainer.run_training()
    assert len(figures) == 3 and left == [0]


@needs_proc
@pytest.mark.endurance
@pytest.mark.parametrize("workers", [0, 2])
def test_2000_steps_need_no_more_memory(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """With pictures, checkpoints and validation: from the second tenth to the last one, at most 2 % more."""
    monkeypatch.setenv("nnUNet_n_proc_DA", str(workers))
    for name, draw in REAL_PICTURES.items():
        monkeypatch.setattr(name, draw)
    workspace.configure(num_epochs=10, iterations_per_epoch=200, val_iterations_per_epoch=10)
    trainer = workspace.make()
    sizes: dict[int | str, list[int]] = {}

    def measure() -> None:
        processes: list[int | str] = ["self", *(child.pid for child in multiprocessing.active_children() if child.pid)]
        for process in processes:
            sizes.setdefault(process, []).append(resident(process))

    after_each_step(trainer, measure)
    try:
        trainer.run_training()
    finally:
        print({process: [int(np.mean(part)) >> 10 for part in np.array_split(values, 20)] for process, values in sizes.items()})
    assert len(sizes["self"]) == 2000 and len(sizes) == 1 + (workers and 3)
    for values in sizes.values():
        tenths = [float(np.mean(part)) for part in np.array_split(values, 10)]
        assert tenths[-1] <= 1.02 * tenths[1], tenths
