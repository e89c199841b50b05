"""When something fails during a training: what it survives, and one sentence for what it does not.

A picture or a curve that cannot be written is said once and done without. A step whose loss or gradient is no finite number is
skipped, a bounded number of times. A full disk, lost worker processes, exhausted memory and validation cases that cannot be read end
the training with a :class:`CMEMSError`.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import functools
import gc
import gzip
import os
import re
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from matplotlib import pyplot
from nnunetv2.configuration import default_num_processes
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import distributed as dist
from torch import nn

from nnunetv2_cmems.errors import CMEMSError, first_line, show_errors_as_sentences
from nnunetv2_cmems.files import some
from nnunetv2_cmems.method.networks import MutualNetworks
from nnunetv2_cmems.method.objective import Batches, batch_sizes
from nnunetv2_cmems.trainers.distributed import unwrapped

MOST_IN_A_ROW = 10
"""Steps that may be skipped one after the other.

Each step draws other images, views and dropout, so what only spoils one draw passes. If a draw is spoilt in every second step, ten
in a row happen once in a thousand: ten in a row mean that most of the steps are lost, and nobody should wait for such a training.
"""

MOST_OF_AN_EPOCH = 0.1
"""Share of an epoch's steps that may be skipped, where that is more than :data:`MOST_IN_A_ROW`."""

_CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}
_NO_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
_NO_WORKERS = "background workers are no longer alive"  # batchgenerators' and nnU-Net's words
_WORKER_IS_GONE = (EOFError, ConnectionError, FileNotFoundError)  # what a loader's thread meets where it asks a dead worker
_IMAGE_WRITER = "ImageFileWriter"  # in every error of SimpleITK's writer

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


# ------------------------------------------------------------------ numbers that are not finite


def broken_terms(values: Mapping[str, Any], norms: Sequence[float], scaler: Any, device: torch.device) -> list[str]:
    """What is NaN or infinite in a step, by name: terms of the loss, or else gradients. All processes get an answer, or none.

    Args:
        values: ``loss`` and ``loss/<term>``; other keys are ignored.
        norms: each member's gradient norm.
        scaler: the loss scaler, or None. Above a scale of 1 an infinite gradient may be its doing; it then skips the step itself
            and lowers the scale, which is no fault.
        device: where processes of a training on several GPUs talk to each other.
    """
    broken = [name[5:] for name, value in values.items() if name.startswith("loss/") and not np.isfinite(value)]
    if not broken and not np.isfinite(values["loss"]):
        broken = ["total"]
    if not broken:
        broken = [f"gradient of member {i}" for i, norm in enumerate(norms) if not np.isfinite(norm)]
        if broken and scaler is not None and scaler.get_scale() > 1:
            broken = []
    if dist.is_available() and dist.is_initialized():
        anywhere = torch.tensor(float(bool(broken)), device=device)
        dist.all_reduce(anywhere, dist.ReduceOp.MAX)
        return broken or (["a term on another GPU"] if anywhere else [])
    return broken


class SkippedSteps:
    """Steps that were skipped: how many in a row, and which terms were to blame in this epoch."""

    def __init__(self) -> None:
        self.in_a_row = 0
        self.terms: collections.Counter[str] = collections.Counter()
        """Of this epoch: in how many skipped steps a term was not finite."""
        self.in_epoch = 0

    def count(self, broken: Sequence[str], steps: int) -> str:
        """Note how a step went.

        Args:
            broken: what was not finite in it; nothing where the step was taken.
            steps: of an epoch.

        Returns:
            Why the training must stop, or "".
        """
        if not broken:
            self.in_a_row = 0
            return ""
        self.in_a_row += 1
        self.in_epoch += 1
        self.terms.update(broken)
        if self.in_a_row >= MOST_IN_A_ROW:
            return f"{self.in_a_row} steps in a row were skipped"
        if self.in_epoch > max(MOST_IN_A_ROW, MOST_OF_AN_EPOCH * steps):
            return f"{self.in_epoch} steps of this epoch were skipped"
        return ""

    def end_epoch(self, steps: int) -> str:
        """What to say of the epoch, "" where no step was skipped; the next epoch counts from 0."""
        terms = ", ".join(f"{name} ({count})" for name, count in self.terms.most_common())
        said = f"{self.in_epoch} of {steps} steps were skipped, as these were not finite: {terms}" if self.in_epoch else ""
        self.in_epoch = 0
        self.terms.clear()
        return said


def not_finite(trainer: Any, what: str, why: str) -> CMEMSError:
    """The end of a training whose numbers are not finite any more."""
    where = f"epoch {trainer.current_epoch}, step {trainer._step_in_epoch}"
    return CMEMSError(
        f"the loss is not a finite number any more ({what}, {where}): {why}; the last checkpoint in {trainer.output_folder} is untouched: "
        "lower 'initial_lr' in cmems.json and start again without --c."
    )


_NO_WEIGHTS = ("refinement", "atlases")
"""Buffers of :class:`~nnunetv2_cmems.method.networks.MutualNetworks` that no step changes."""


def broken_weights(network: nn.Module) -> str:
    """A sentence that names weights and buffers with NaN or infinity; "" where there are none. Waits for the device once.

    The rule of predictions and what it keeps of annotated volumes are no weights: a rule has NaN and infinity where it knows no limit.
    """
    state = {name: value for name, value in network.state_dict().items() if value.is_floating_point() and name not in _NO_WEIGHTS}
    finite = torch.stack([value.isfinite().all() for value in state.values()]).cpu()
    broken = [name for name, good in zip(state, finite) if not good]
    return f"the networks' weights are broken ({some(broken)})" if broken else ""


# ------------------------------------------------------------------ files that a training can do without


class SideFiles:
    """Writes pictures and curves. Where that fails, it is said once, and the training goes on.

    Args:
        log: nnU-Net's ``print_to_log_file``.
    """

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._failed: set[str] = set()

    def write(self, path: str, write: Callable[[str], Any]) -> None:
        """Call ``write(path)``; a :class:`CMEMSError` or an OSError of it is logged, if it is the first for this file."""
        try:
            with _cycles_freed():
                write(path)
        except (OSError, CMEMSError) as error:
            pyplot.close()  # of a figure that nnU-Net could not save and leaves open
            if path not in self._failed:
                self._failed.add(path)
                self._log(f"WARNING: {path} is not up to date, the training goes on without it: {first_line(error)}")


@contextlib.contextmanager
def _cycles_freed() -> Iterator[None]:
    """Free what was made within the block and refers to itself, as figures do.

    Python would let several of nnU-Net's ``progress.png`` gather, 65 MB each, before it looks for such cycles among all objects.
    As long as it does not look for any, what is new is kept apart, and looking through that alone takes milliseconds.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        gc.collect(0)


# ------------------------------------------------------------------ one sentence for the rest


def one_sentence(
    explain: Callable[[Any, BaseException], str],
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Decorate a method so that what ``explain(self, error)`` has a sentence for ends as a :class:`CMEMSError`.

    Every other exception passes; so does one for which ``explain`` returns "".
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def guarded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            with _errors_of_loaders() as lost:
                try:
                    return function(*args, **kwargs)
                except Exception as error:
                    cause = error.__cause__ if isinstance(error, CMEMSError) and out_of_memory(error.__cause__) else error
                    if lost and _lost_workers(cause) and not isinstance(lost[0].exc_value, _WORKER_IS_GONE):
                        cause = lost[0].exc_value  # what the loader's own thread failed at
                    sentence = "" if cause is None or isinstance(cause, CMEMSError) else explain(args[0], cause)
                    if not sentence:
                        raise
                    lost.clear()
                    show_errors_as_sentences()
                    raise CMEMSError(sentence) from error

        return guarded

    return decorate


@contextlib.contextmanager
def workers_stopped(trainer: Any) -> Iterator[None]:
    """End the processes that read images where the block fails; they would outlive it, and complain when they are ended later."""
    try:
        yield
    except Exception:
        end_workers(trainer.dataloader_train, trainer.dataloader_val)
        raise


def end_workers(*loaders: Any) -> None:
    """End the worker processes of batchgenerators' loaders, as nnU-Net does. Anything else, such as None, has none."""
    for loader in loaders:
        if hasattr(loader, "_finish"):
            loader._finish()


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out: that of a GPU, or this machine's."""
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    )


def while_training(trainer: Any, error: BaseException) -> str:
    """What to do about an error of ``run_training``; "" where only a traceback helps."""
    where = f"in epoch {trainer.current_epoch}, step {getattr(trainer, '_step_in_epoch', 0)}"
    if out_of_memory(error):
        return f"{_memory(trainer, error)} ran out {where}{_asked_for(error)}: {_smaller(trainer)}."
    if _lost_workers(error):
        return (
            f"a process that reads images died {where}, most often because this machine's memory ran out, or the shared memory (/dev/shm) "
            f"of a container: lower the environment variable nnUNet_n_proc_DA (now {get_allowed_n_proc_DA()}) and continue with --c."
        )
    if _cannot_write(error):
        return (
            f"{_file(error, trainer.output_folder)} cannot be written {where} ({_reason(error)}); the last whole checkpoint is untouched: "
            "make room on the disk and continue with --c."
        )
    return ""


def while_validating(trainer: Any, error: BaseException) -> str:
    """What to do about an error of the final validation; "" where only a traceback helps."""
    folder = os.path.join(trainer.output_folder, "validation")
    again = "the training itself is finished and saved; repeat the validation with --val"
    if out_of_memory(error):
        return (
            f"{_memory(trainer, error)} ran out during the final validation{_asked_for(error)}: end other programs that use it, or lower "
            f"the environment variable nnUNet_def_n_proc (now {default_num_processes}); {again}."
        )
    if _lost_workers(error):
        return (
            "a process that writes the masks of the final validation died, most often because this machine's memory ran out: lower the "
            f"environment variable nnUNet_def_n_proc (now {default_num_processes}); {again}."
        )
    if _cannot_write(error):
        return f"{_file(error, folder)} cannot be written ({_reason(error)}): make room on the disk; {again}."
    _, validation = trainer.do_split()
    unreadable = first_unreadable(validation, trainer)
    if unreadable:
        return f"{unreadable}; {again}."
    written = [case for case in validation if os.path.isfile(os.path.join(folder, case + trainer.dataset_json["file_ending"]))]
    try:
        check_masks(folder, written, trainer.dataset_json["file_ending"])
    except CMEMSError as cut:
        return str(cut)
    return ""


def while_predicting(predictor: Any, error: BaseException) -> str:
    """What to do about an error of a prediction; "" where only a traceback helps, and for a network that is not ours."""
    if not out_of_memory(error) or not isinstance(unwrapped(predictor.network), MutualNetworks):
        return ""
    return (
        f"{_memory(predictor, error)} ran out during the prediction{_asked_for(error)}: end other programs that use it, lower -npp and "
        "-nps, or predict with --not_on_device or -device cpu."
    )


def first_unreadable(cases: Iterable[str], trainer: Any) -> str:
    """The first case whose preprocessed image, or whose mask in ``gt_segmentations``, cannot be read; "" where all can."""
    dataset = trainer.preprocessed_dataset()
    for case in cases:
        path = os.path.join(dataset.folder, case)
        try:
            np.asarray(dataset.dataset_class(dataset.folder, [case]).load_case(case)[0][:])
            path = os.path.join(trainer.preprocessed_dataset_folder_base, "gt_segmentations", case + trainer.dataset_json["file_ending"])
            trainer.plans_manager.image_reader_writer_class().read_seg(path)
        except Exception as error:  # damaged files raise nearly anything
            return f"the validation case {path} cannot be read ({first_line(error)}): run nnUNetv2_preprocess again"
    return ""


def check_masks(folder: str, cases: Iterable[str], ending: str) -> None:
    """Refuse predicted masks that are cut off: SimpleITK writes to a full disk without an error, and reads zeros from what is missing.

    Args:
        folder: nnU-Net's ``validation``; its ``summary.json`` is removed where a mask is refused, as it is of these masks.
        cases: the masks' names without ``ending``.
        ending: ``dataset.json``'s; only those of compressed files can be checked.

    Raises:
        CMEMSError: a mask is cut off.
    """
    cut = [f"{case}{ending}" for case in cases if ending.endswith(".gz") and _is_cut(os.path.join(folder, f"{case}{ending}"))]
    if cut:
        with contextlib.suppress(OSError):
            os.remove(os.path.join(folder, "summary.json"))
        raise CMEMSError(
            f"masks in {folder} are cut off ({some(cut)}), most probably because the disk was full, and a summary.json of them is removed: "
            "make room on the disk; the training itself is finished and saved; repeat the validation with --val."
        )


def _is_cut(path: str) -> bool:
    try:
        with gzip.open(path) as file:
            while file.read(1 << 20):
                pass
        return False
    except (EOFError, OSError, zlib.error):
        return True


# ------------------------------------------------------------------ what an error is


@contextlib.contextmanager
def _errors_of_loaders() -> Iterator[list[Any]]:
    """Collect what ends the threads of batchgenerators' loaders.

    What is still in the list at the end is shown as Python shows it, but for a worker that is gone, which the main thread notices.
    """
    lost: list[Any] = []
    previous = threading.excepthook

    def hook(args: Any) -> None:
        if args.thread is not None and "results_loop" in args.thread.name:
            lost.append(args)
        else:
            previous(args)

    threading.excepthook = hook
    try:
        yield lost
    finally:
        threading.excepthook = previous
        for args in lost:
            if not isinstance(args.exc_value, _WORKER_IS_GONE):
                previous(args)


def _lost_workers(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and _NO_WORKERS in str(error)


def _cannot_write(error: BaseException) -> bool:
    return (isinstance(error, OSError) and error.errno in _CANNOT_WRITE) or _IMAGE_WRITER in str(error)


def _file(error: BaseException, folder: str) -> str:
    name = error.filename if isinstance(error, OSError) else None
    return str(name) if name else f"a file in {folder}"


def _reason(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or first_line(error)


def _memory(owner: Any, error: BaseException) -> str:
    on_host = isinstance(error, MemoryError) or "CPUAllocator" in str(error) or owner.device.type == "cpu"
    return "this machine's memory" if on_host else "the GPU's memory"


def _asked_for(error: BaseException) -> str:
    found = re.search(r"allocate ([\d.]+ (?:bytes|[KMGT]iB|[KMGT]?B))", str(error))
    return f" ({found[1]} more were asked for)" if found else ""


def _smaller(trainer: Any) -> str:
    """What makes a step of the training smaller, in the order of how much it changes; before the first one, what it needs at least."""
    if trainer._objective is None and len(trainer.exemplars) > 1:
        return (
            f"all {len(trainer.exemplars)} annotated slices and volumes must fit in it beside the networks: end other programs that use "
            "it, or name fewer in 'exemplar' in cmems.json; start again without --c"
        )
    config = trainer.config if trainer._objective is None else trainer._objective.config  # without streams that cannot be
    plans = os.path.join(trainer.preprocessed_dataset_folder_base, f"{trainer.plans_manager.plans_name}.json")
    batches, smallest = (batch_sizes(config, planned) for planned in (trainer.configuration_manager.batch_size, 1))
    planned = "batch_size or patch_size" if any(new < now for new, now in zip(smallest, batches)) else "patch_size"
    keys = [f"'{name}_batch' ({now})" for name, now in zip(Batches._fields, batches) if now > 1]
    keys += [f"'num_members' ({config.num_members})"] if config.num_members > 1 else []
    ours = f"; or lower {', '.join(keys)} in cmems.json and start again without --c, which refuses another config" if keys else ""
    return (
        f"end other programs that use it, or lower {planned} of configuration '{trainer.configuration_name}' in {plans}, and continue "
        f"with --c{ours}"
    )
