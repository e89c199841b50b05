"""A training that was killed at any moment goes on as if it had not been: whole checkpoints, and the random numbers to come."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import random
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunetv2_cmems.errors import CMEMSError, first_line

RANDOM = "cmems_random"
"""Key of a checkpoint's ``init_args`` that holds the states of the random number generators."""

_LEFT_BEHIND = ("checkpoint_*.pth.tmp", "cmems_*.json.tmp", "*.png.*.tmp")


# ------------------------------------------------------------------ random numbers


class RandomNumbers:
    """The random numbers of one training, whose states its checkpoints hold.

    Two moments count: before the data are prepared, which draws how the exemplars' organs are painted over, and the next epoch's
    beginning. In between, a run that goes on draws more than one without a break, such as a picture.
    """

    def __init__(self) -> None:
        self._first: Mapping[str, Any] = {}
        self._next: Mapping[str, Any] | None = None

    def begin(self) -> None:
        """Take note of the states; to be called before the data are prepared."""
        self._first = _states()

    def to_save(self) -> dict[str, Any]:
        """For a checkpoint, as tensors and plain types; between two epochs."""
        return {"first": self._first, "next": self._next or _states()}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Prepare the data as the checkpoint's run did; to be called instead of :meth:`begin`."""
        self._first, self._next = saved["first"], saved["next"]
        _restore(self._first)

    def go_on(self) -> bool:
        """Begin the first epoch with the states of the checkpoint, if one was loaded; returns whether."""
        if self._next is None:
            return False
        _restore(self._next)
        self._next = None
        return True


def _states() -> dict[str, Any]:
    """The states of all generators that a training draws from, as tensors and plain types."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys, np.int64)), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def _restore(states: Mapping[str, Any]) -> None:
    """Put the states back; those of a device that this machine lacks are left out."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        for device, state in zip(range(torch.cuda.device_count()), states.get("cuda", ())):
            torch.cuda.set_rng_state(state, device)
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])


def seeds(seed: int, epoch: int, stream: int, count: int) -> list[int]:
    """A seed for each of the processes that draw for a training, which begins or goes on with ``epoch``; they have nothing in common.

    Args:
        seed: the config's.
        epoch: another one gives other seeds, so that a training that goes on does not repeat the draws of its first epochs.
        stream: what the processes draw: 0 for what a step needs, otherwise the number of a loader.
        count: of the processes; the first seeds are the same for any count.
    """
    return [int(drawn) for drawn in np.random.SeedSequence([seed, epoch, stream]).generate_state(count)]


def how_it_goes_on(device: torch.device, workers: int) -> str:
    """For the log: whether a training that goes on will end as one without a break, and what would make it so."""
    said = "The random numbers go on where the checkpoint left them"
    because = ["worker processes draw their images anew"] if workers else []
    if device.type != "cpu":
        because.append("a GPU adds up in an order that varies")
    if not because:
        return f"{said}: the result will be that of a training without a break."
    return (
        f"{said}, but {', and '.join(because)}: the result will not be that of a training without a break, bit by bit, only as good. "
        "A training on a CPU with nnUNet_n_proc_DA=0 from the beginning has the same result."
    )


# ------------------------------------------------------------------ worker processes


class EndsWithTraining:
    """A loader whose worker processes end when the training is killed. Batchgenerators' would live on, and keep their memory.

    Args:
        loader: what the workers draw from.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self.loader)

    def set_thread_id(self, number: int) -> None:
        """What each worker calls first."""
        self.loader.set_thread_id(number)
        training = multiprocessing.parent_process()
        if training is not None:
            threading.Thread(target=_end_with, args=(training,), daemon=True).start()


def _end_with(training: Any) -> None:
    training.join()
    os._exit(1)


# ------------------------------------------------------------------ writing


@contextlib.contextmanager
def written_whole(filename: str) -> Iterator[str]:
    """A temporary name beside ``filename``; what was written there is on the disk before it takes the old file's place.

    Raises:
        CMEMSError: it cannot be written; the old file is untouched.
    """
    temporary = f"{filename}.tmp"
    try:
        yield temporary
        if os.path.isfile(temporary):
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, filename)
            _sync_folder(os.path.dirname(filename))
    except (OSError, RuntimeError) as error:  # torch.save answers a full disk with a RuntimeError
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise CMEMSError(
            f"{filename} cannot be written ({first_line(error)}); the last whole checkpoint is untouched: make room on the disk and "
            "continue with --c."
        ) from error


def _sync_folder(folder: str) -> None:
    with contextlib.suppress(OSError):  # not on Windows, nor on every network drive
        descriptor = os.open(folder or ".", os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def loadable(trainer: Any, numbers: RandomNumbers) -> Iterator[None]:
    """While nnU-Net writes a checkpoint: all that it takes from the trainer is tensors and plain types, and holds ``numbers``."""
    arguments, log = trainer.my_init_kwargs, trainer.logger.local_logger
    trainer._best_ema = plain(trainer._best_ema)
    log.my_fantastic_logging = plain(log.my_fantastic_logging)  # stays so: numpy's rounding would tell a resumed run from another
    trainer.my_init_kwargs = {**plain(arguments), RANDOM: numbers.to_save()}
    try:
        yield
    finally:
        trainer.my_init_kwargs = arguments


def plain(value: Any) -> Any:
    """Built-in types in place of numpy's, and text in place of anything else that ``weights_only=True`` refuses; tensors stay."""
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value] if isinstance(value, list) else tuple(plain(item) for item in value)
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return value if value is None or isinstance(value, Tensor) or type(value) in (bool, int, float, str, bytes) else str(value)


def write_missed_best(trainer: Any, path: str) -> None:
    """Make the best checkpoint of a run that was killed after the latest one of the same epoch, which the trainer has loaded.

    nnU-Net writes the latest one first, and does not know there that it is the best.

    Args:
        trainer: a trainer of ours.
        path: what it has loaded; nothing is done for another checkpoint than the latest.

    Raises:
        CMEMSError: it cannot be written.
    """
    if os.path.basename(path) != "checkpoint_latest.pth":
        return
    is_best = trainer.history.last_is_best()
    if trainer.config.best_checkpoint == "validation_dice":
        smoothed = trainer.logger.get_value("ema_fg_dice", step=-1)
        is_best = trainer._best_ema is None or smoothed > trainer._best_ema
        trainer._best_ema = smoothed if is_best else trainer._best_ema
    best = os.path.join(os.path.dirname(path), "checkpoint_best.pth")
    if is_best and epochs_done(best) < trainer.current_epoch:
        with written_whole(best) as temporary:
            shutil.copyfile(path, temporary)


def remove_leftovers(folder: str) -> None:
    """Remove the temporary files of a run that was killed while it wrote; nothing ever reads them."""
    for pattern in _LEFT_BEHIND:
        for path in Path(folder).glob(pattern):
            with contextlib.suppress(OSError):
                path.unlink()


# ------------------------------------------------------------------ reading


def read_checkpoint(path: str) -> dict[str, Any]:
    """A checkpoint on the CPU, read without running code that it may hold.

    Checkpoints of nnU-Net's own trainers, and our oldest, also have numpy's scalars and a device in them; these are let pass.

    Raises:
        Exception: of nearly any kind, where the file is damaged or holds something else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        pass
    try:
        with torch.serialization.safe_globals(_types_of_nnunet()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, AttributeError) as error:  # the latter before PyTorch 2.5
        raise pickle.UnpicklingError("it is damaged, or holds more than tensors and plain values") from error


def epochs_done(path: str) -> int:
    """The epochs that a checkpoint has behind it; -1 where there is none that can be read."""
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["current_epoch"])
    except Exception:  # damaged files raise nearly anything
        return -1


def _types_of_nnunet() -> list[Any]:
    scalar = np.float64(0).__reduce__()[0]  # its module's name depends on numpy's version; both are in use
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    kinds = {type(np.dtype(kind)) for kind in (np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_)}
    return [torch.device, np.dtype, *kinds, *names]
