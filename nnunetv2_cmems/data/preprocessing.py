"""nnU-Net's preprocessing for labelled and unlabelled cases, which can be interrupted and taken up again.

Labelled cases go where nnU-Net has them, ``<data_identifier>``; unlabelled ones into the sibling folder
``<data_identifier>_unlabelled``, without a mask. Each case is made by nnU-Net's own preprocessor in a scratch folder and moved
into place file by file, the ``.pkl`` last. That carries a signature of the case's source files and of what the plans say about
preprocessing, so that a later call redoes what has changed, and what was left half done, and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import blosc2
import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle
from nnunetv2.preprocessing.cropping.cropping import create_nonzero_mask
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from tqdm import tqdm

from nnunetv2_cmems.data.planning import Scan, annotation_to_json, in_processes
from nnunetv2_cmems.data.raw import RawCase, RawDataset, source_state
from nnunetv2_cmems.data.sources import MANIFEST, unlabelled_folder
from nnunetv2_cmems.data.unlabelled import resampled_shape
from nnunetv2_cmems.errors import CMEMSError, first_line
from nnunetv2_cmems.files import OURS, write_json

_VERSION = 1  # of what is written; another one is redone
_ENDINGS = ("_seg.b2nd", ".b2nd", "_seg.npy", ".npy", ".npz", ".pkl")  # of a preprocessed case; the longer ones first
_COMPRESSED = 0.05  # what compression leaves of an image at the very least; 0.03 to 0.8 were seen
_PILOT = 5  # cases after which the compression seen so far tells what the others will need
_BY_IMAGE_ALONE = {"ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization"}


def read_manifest(labelled_folder: str) -> dict[str, Any] | None:
    """What :func:`preprocess` wrote beside the unlabelled cases; None where it was not run, or had nothing to say.

    Keys: ``complete`` (false while it runs, and after an interruption), ``configuration_signature`` (see
    :func:`configuration_signature`), ``labelled`` and ``unlabelled`` (cases), ``annotation`` (per labelled case,
    ``{"planes": [["z", 4], ...] or null for a whole volume, "classes": [...]}``, indices counted in the raw image),
    ``skipped`` (case to reason), ``cases`` (per case size and time of its source files, and its signature).

    Raises:
        CMEMSError: the file is unreadable.
    """
    path = os.path.join(unlabelled_folder(labelled_folder), MANIFEST)
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            content: dict[str, Any] = json.load(file)
        _ = content["complete"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CMEMSError(f"{path} cannot be read ({first_line(error)}); run nnUNetv2_cmems plan_and_preprocess again.") from error
    return content


def configuration_signature(plans: Mapping[str, Any], configuration: str) -> str:
    """A short text that changes when the plans change in what preprocessing makes of an image.

    Args:
        plans: content of a plans file.
        configuration: one of its configurations.
    """
    manager = PlansManager(dict(plans))
    content = manager.get_configuration(configuration).configuration
    keys = ("preprocessor_name", "spacing", "normalization_schemes", "use_mask_for_norm", "resampling_fn_data", "resampling_fn_seg")
    relevant = {key: content[key] for key in (*keys, "resampling_fn_data_kwargs", "resampling_fn_seg_kwargs")}
    relevant["transpose_forward"] = manager.transpose_forward
    relevant["image_reader_writer"] = plans["image_reader_writer"]
    if not set(content["normalization_schemes"]) <= _BY_IMAGE_ALONE:
        relevant["intensities"] = manager.foreground_intensity_properties_per_channel
    return _digest([_VERSION, relevant])


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=float).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Task:
    """What has to be done for one configuration. Made by :func:`plan_task`, which writes nothing.

    Attributes:
        dataset: the raw data set.
        scans: its usable cases.
        skipped: cases left out, and why.
        plans: content of the plans file.
        configuration: the configuration's name.
        base: the data set's preprocessed folder.
        folder: the configuration's folder in it.
        writes_manifest: there are unlabelled scans, or masks that are annotated in part.
        signatures: of each case, which its ``.pkl`` has to carry.
        todo: the cases that are missing, half written or out of date.
        sizes: bytes of each of them before compression.
    """

    dataset: RawDataset
    scans: Mapping[str, Scan]
    skipped: Mapping[str, str]
    plans: dict[str, Any]
    configuration: str
    base: str
    folder: str
    writes_manifest: bool
    signatures: Mapping[str, str]
    todo: tuple[str, ...]
    sizes: Mapping[str, int]

    def folder_of(self, case: str) -> str:
        """Where a case belongs."""
        return self.folder if case in self.dataset.labelled else unlabelled_folder(self.folder)

    def bytes_needed(self, compressed: float, done: Container[str] = ()) -> int:
        """Space that the cases still to do take in addition to what they replace.

        Args:
            compressed: what compression leaves of an image.
            done: cases that are finished meanwhile.
        """
        left = [case for case in self.todo if case not in done]
        replaced = sum(os.path.getsize(path) for case in left for path in _files_of(os.path.join(self.folder_of(case), case)))
        return int(compressed * sum(self.sizes[case] for case in left)) - replaced


def plan_task(
    dataset: RawDataset,
    scans: Mapping[str, Scan],
    skipped: Mapping[str, str],
    plans: Mapping[str, Any],
    configuration: str,
    base: str,
) -> Task:
    """Find out which cases of a configuration have to be (re)done.

    Args:
        dataset: the raw data set.
        scans: its usable cases, see :func:`nnunetv2_cmems.data.planning.examine`.
        skipped: the others, and why.
        plans: content of the plans file.
        configuration: the configuration to preprocess.
        base: the data set's preprocessed folder.
    """
    manager = PlansManager(dict(plans))
    configuration_manager = manager.get_configuration(configuration)
    folder = os.path.join(base, configuration_manager.data_identifier)
    of_configuration = configuration_signature(plans, configuration)
    labels = [dataset.dataset_json["labels"], dataset.dataset_json.get("regions_class_order")]
    signatures, sizes = {}, {}
    for case in scans:
        raw_case, is_labelled = dataset.cases[case], case in dataset.labelled
        signatures[case] = _digest([of_configuration, source_state(raw_case), labels if is_labelled else None])
        stem = os.path.join(folder if is_labelled else unlabelled_folder(folder), case)
        if not _is_whole(stem, is_labelled, signatures[case]):
            sizes[case] = _uncompressed(scans[case], dataset.num_channels, manager, configuration_manager)
    partial = any(scan.annotation is not None and scan.annotation.planes is not None for scan in scans.values())
    return Task(
        dataset=dataset,
        scans=scans,
        skipped=skipped,
        plans=dict(plans),
        configuration=configuration,
        base=base,
        folder=folder,
        writes_manifest=dataset.has_unlabelled_folder or bool(dataset.unlabelled) or partial,
        signatures=signatures,
        todo=tuple(sizes),
        sizes=sizes,
    )


def check_space(tasks: Sequence[Task]) -> None:
    """Refuse to start where the preprocessed data cannot fit, however well it is compressed.

    Raises:
        CMEMSError: it cannot.
    """
    place = tasks[0].base
    while not os.path.isdir(place):
        place = os.path.dirname(place) or "."
    needed, free = sum(task.bytes_needed(_COMPRESSED) for task in tasks), shutil.disk_usage(place).free
    if needed > free:
        raise CMEMSError(
            f"no space for {tasks[0].base}: the {sum(len(task.todo) for task in tasks)} images still to be preprocessed need at least "
            f"{_size(needed)} and perhaps {_size(sum(task.bytes_needed(1) for task in tasks))}, but {_size(free)} are free; "
            "free some space, or let nnUNet_preprocessed name a folder on another disk."
        )


def preprocess(task: Task, num_processes: int = 1, verbose: bool = False) -> None:
    """Do what a task says.

    Cases that are no longer in the raw data set leave the two folders; files that do not belong to a case stay. An
    interruption leaves whole cases, which the next call keeps.

    Args:
        task: what is to be done.
        num_processes: processes to work with; one: this one.
        verbose: let nnU-Net's preprocessor print.

    Raises:
        CMEMSError: the space runs out, or will before the end; nnU-Net's preprocessing fails for a case; a file cannot be written.
    """
    unfinished = os.path.join(task.base, f".{os.path.basename(task.folder)}.unfinished")
    manifest = os.path.join(unlabelled_folder(task.folder), MANIFEST)
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        for folder in (task.folder, unfinished, *([unlabelled_folder(task.folder)] if task.writes_manifest else [])):
            os.makedirs(folder, exist_ok=True)
        if task.writes_manifest:
            write_json(manifest, _manifest(task, complete=False))
        elif os.path.isfile(manifest):
            os.remove(manifest)
        _remove_others(task)
        if task.todo:
            _preprocess_cases(task, [_job(task, case, unfinished, verbose) for case in task.todo], num_processes)
        if task.writes_manifest:
            write_json(manifest, _manifest(task, complete=True))
    except OSError as error:
        raise CMEMSError(f"{task.folder} cannot be written ({error.strerror or error}); check permissions and free space.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _preprocess_cases(task: Task, jobs: Sequence[_Job], num_processes: int) -> None:
    written: dict[str, int] = {}

    def compressed() -> float:
        return sum(written.values()) / sum(task.sizes[case] for case in written) if written else 1.0

    try:
        with contextlib.closing(in_processes(_preprocess_case, jobs, num_processes)) as results:
            for case, size in tqdm(results, desc=f"Preprocessing {task.configuration}", total=len(jobs)):
                written[case] = size
                if len(written) >= _PILOT and task.bytes_needed(compressed(), written) > shutil.disk_usage(task.base).free:
                    raise _NoSpace
    except _NoSpace as error:
        shutil.rmtree(jobs[0].unfinished, ignore_errors=True)
        done = set(task.scans) - {case for case in task.todo if not _is_done(task, case)}
        raise CMEMSError(
            f"there is not enough space for {task.base}: the {len(task.scans) - len(done)} cases still to be preprocessed need about "
            f"{_size(task.bytes_needed(compressed(), done))}, but {_size(shutil.disk_usage(task.base).free)} are free. The {len(done)} "
            "finished ones are kept; free some space and run the same command again."
        ) from error


def copy_masks(dataset: RawDataset, cases: Mapping[str, Scan], base: str) -> None:
    """Copy the masks to ``gt_segmentations``, where nnU-Net's validation looks for them.

    Raises:
        CMEMSError: a file cannot be read or written.
    """
    folder = os.path.join(base, "gt_segmentations")
    for case, raw_case in dataset.labelled.items():
        if case not in cases or raw_case.label is None:
            continue
        target = os.path.join(folder, case + dataset.file_ending)
        try:
            os.makedirs(folder, exist_ok=True)
            source = os.stat(raw_case.label)
            if os.path.isfile(target) and (os.stat(target).st_size, os.stat(target).st_mtime_ns) == (source.st_size, source.st_mtime_ns):
                continue
            shutil.copy2(raw_case.label, f"{target}.tmp")
            os.replace(f"{target}.tmp", target)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.remove(f"{target}.tmp")
            raise CMEMSError(f"{target} cannot be written ({error.strerror or error}); check permissions and free space.") from error


# ---------------------------------------------------------------------------------------------------------------------
# One case


class _NoSpace(CMEMSError):
    """The device is full."""


@dataclass(frozen=True)
class _Job:
    raw_case: RawCase
    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]
    folder: str
    unfinished: str
    signature: str
    size: int
    verbose: bool


class _PreprocessorForPartialMasks(DefaultPreprocessor):
    """Normalises a case whose mask is annotated in part as it would without a mask.

    nnU-Net marks the empty surroundings of an image in the mask, where that is background, and may leave them out of the
    mean and the standard deviation. "Not annotated" is not background, so they would count.
    """

    not_annotated: int | None = None

    def _normalize(
        self,
        data: np.ndarray,
        seg: np.ndarray,
        configuration_manager: ConfigurationManager,
        foreground_intensity_properties_per_channel: dict[str, Any],
    ) -> np.ndarray:
        if self.not_annotated is not None and (seg == self.not_annotated).any():
            seg = np.where(create_nonzero_mask(data), 0, -1)[None]
        normalised: np.ndarray = super()._normalize(data, seg, configuration_manager, foreground_intensity_properties_per_channel)
        return normalised


def _job(task: Task, case: str, unfinished: str, verbose: bool) -> _Job:
    return _Job(
        raw_case=task.dataset.cases[case],
        plans=task.plans,
        configuration=task.configuration,
        dataset_json=task.dataset.dataset_json,
        folder=task.folder_of(case),
        unfinished=unfinished,
        signature=task.signatures[case],
        size=task.sizes[case],
        verbose=verbose,
    )


def _preprocess_case(job: _Job) -> tuple[str, int]:
    """Preprocess a case and move it into place.

    Returns:
        The case, and the bytes that it takes.
    """
    case, is_labelled = job.raw_case.case, job.raw_case.label is not None
    manager = PlansManager(job.plans)
    configuration = manager.get_configuration(job.configuration)
    base = configuration.preprocessor_class
    preprocessor = type(base.__name__, (_PreprocessorForPartialMasks, base), {})(verbose=job.verbose)
    preprocessor.not_annotated = manager.get_label_manager(job.dataset_json).ignore_label
    stem, target = os.path.join(job.unfinished, case), os.path.join(job.folder, case)
    try:
        preprocessor.run_case_save(stem, list(job.raw_case.images), job.raw_case.label, manager, configuration, job.dataset_json)
        properties = load_pickle(f"{stem}.pkl")
        properties[OURS] = {"signature": job.signature}
        write_pickle(properties, f"{stem}.pkl")
        for path in _files_of(target):  # the .pkl first: what is half replaced is not whole
            os.remove(path)
        if is_labelled:
            os.replace(f"{stem}_seg.b2nd", f"{target}_seg.b2nd")
        os.replace(f"{stem}.b2nd", f"{target}.b2nd")
        os.replace(f"{stem}.pkl", f"{target}.pkl")
        return case, sum(os.path.getsize(path) for path in _files_of(target))
    except Exception as error:  # nnU-Net's preprocessor and blosc2 raise anything
        if _is_full(error, job):
            raise _NoSpace from error
        reason = f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__
        raise CMEMSError(f"nnU-Net's preprocessing fails for case '{case}', {job.raw_case.images[0]} ({reason}).") from error
    finally:
        for path in _files_of(stem):
            os.remove(path)


def _is_full(error: Exception, job: _Job) -> bool:
    """Whether a failure to write was for lack of space; blosc2 gives no reason."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return isinstance(error, RuntimeError) and shutil.disk_usage(job.unfinished).free < job.size


def _files_of(stem: str) -> list[str]:
    """The existing files of a preprocessed case, the ``.pkl`` first; old formats included."""
    return [f"{stem}{ending}" for ending in reversed(_ENDINGS) if os.path.isfile(f"{stem}{ending}")]


def _is_whole(stem: str, is_labelled: bool, signature: str) -> bool:
    """Whether a case is there with all its files, made from the present sources and plans."""
    arrays = [f"{stem}.b2nd", f"{stem}_seg.b2nd"] if is_labelled else [f"{stem}.b2nd"]
    if not all(os.path.isfile(path) for path in (*arrays, f"{stem}.pkl")):
        return False
    try:
        if load_pickle(f"{stem}.pkl")[OURS]["signature"] != signature:
            return False
        shapes = {blosc2.open(urlpath=path, mode="r").shape[1:] for path in arrays}
    except Exception:  # a damaged file raises anything; a file of nnU-Net's own has no signature
        return False
    return len(shapes) == 1


def _is_done(task: Task, case: str) -> bool:
    return _is_whole(os.path.join(task.folder_of(case), case), case in task.dataset.labelled, task.signatures[case])


def _uncompressed(scan: Scan, num_channels: int, manager: PlansManager, configuration: ConfigurationManager) -> int:
    """Bytes of a preprocessed image before compression."""
    shape, spacing = ([values[axis] for axis in manager.transpose_forward] for values in (scan.shape_after_crop, scan.spacing))
    return math.prod(resampled_shape(shape, spacing, configuration)) * num_channels * np.dtype(np.float32).itemsize


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def _remove_others(task: Task) -> None:
    """Remove the files of cases that are not (or no longer) wanted; other files stay."""
    for folder in (task.folder, unlabelled_folder(task.folder)):
        wanted = {case for case in task.scans if task.folder_of(case) == folder}
        for path, case in _case_files(folder):
            if case not in wanted:
                os.remove(path)
    with contextlib.suppress(OSError):
        if not task.writes_manifest:
            os.rmdir(unlabelled_folder(task.folder))  # if nothing is in it


def _case_files(folder: str) -> Iterator[tuple[str, str]]:
    """Files of preprocessed cases in a folder, each with its case."""
    if not os.path.isdir(folder):
        return
    for name in os.listdir(folder):
        ending = next((ending for ending in _ENDINGS if name.endswith(ending)), None)
        if ending is not None:
            yield os.path.join(folder, name), name.removesuffix(ending)


def _manifest(task: Task, complete: bool) -> dict[str, Any]:
    annotation = {case: annotation_to_json(scan.annotation) for case, scan in task.scans.items() if scan.annotation is not None}
    return {
        "version": _VERSION,
        "complete": complete,
        "dataset": task.dataset.name,
        "plans": task.plans["plans_name"],
        "configuration": task.configuration,
        "configuration_signature": configuration_signature(task.plans, task.configuration),
        "labelled": [case for case in task.scans if case in task.dataset.labelled],
        "unlabelled": [case for case in task.scans if case in task.dataset.unlabelled],
        "skipped": dict(task.skipped),
        "annotation": annotation,
        "cases": {
            case: {"sources": source_state(task.dataset.cases[case]), "signature": signature} for case, signature in task.signatures.items()
        },
    }


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"
