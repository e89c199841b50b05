"""nnU-Net's fingerprint and plans, made from all scans, labelled or not.

:func:`examine` reads every scan once and refuses what cannot be trained on; nothing is written. :func:`make_fingerprint`
puts its results into nnU-Net's ``dataset_fingerprint.json``, and :func:`make_plans` lets nnU-Net's own planner work from it.

Spacings, shapes and the size after cropping come from all scans. Intensities of the foreground (CT normalisation needs
them) come from the annotated voxels and, weighted, from the unlabelled scans, see :class:`ForegroundShare`.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import struct
import tempfile
import threading
import zlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, TypeVar

import nnunetv2
import numpy as np
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from tqdm import tqdm

from nnunetv2_cmems.data.annotation import AXES, Annotation, LabelValues, complete_plane, read_annotation
from nnunetv2_cmems.data.raw import RawCase, RawDataset, check_header, spacing_file
from nnunetv2_cmems.errors import CMEMSError, first_line, times
from nnunetv2_cmems.files import OURS, environment, to_json, write_json, write_text

SCANS = "cmems_scans.json"
"""In the data set's preprocessed folder: what :func:`examine` found, so that a second call reads only what changed."""

_SAMPLES = 10_000_000  # foreground intensities of the whole data set, the same number from each scan
_ANNOTATED_SAMPLES = 1_000_000  # of a labelled scan's annotated voxels
_BINS, _VOXELS_PER_BIN = 50, 20
_TRIM = 0.5  # per cent
_RARE = 0.2
_SEED = 1234  # nnU-Net's own
_SPACINGS = 1e-7, 1e7  # mm, smallest and largest
_ODD = 100.0  # times the median spacing, or that part of it: resampling the scan would fill the memory
_GEOMETRY_TOLERANCE = 0.1  # voxels by which the corners of a scan and its mask may lie apart: tools round differently

Job = TypeVar("Job")
Result = TypeVar("Result")


class ScanDefect(CMEMSError):
    """A scan (not its mask) cannot be used, but the others can do without it."""


@dataclass(frozen=True)
class Scan:
    """What is known of a case from having read it whole.

    Attributes:
        shape: voxels (z, y, x), as the reader delivers them.
        spacing: mm (z, y, x).
        shape_after_crop: what nnU-Net's cropping to the nonzero part leaves.
        annotation: what of the mask is annotated; None for an unlabelled scan.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    shape_after_crop: tuple[int, ...]
    annotation: Annotation | None

    def to_json(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "spacing": list(self.spacing),
            "shape_after_crop": list(self.shape_after_crop),
            "annotation": None if self.annotation is None else annotation_to_json(self.annotation),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Scan:
        found = content["annotation"]
        return cls(
            tuple(content["shape"]),
            tuple(content["spacing"]),
            tuple(content["shape_after_crop"]),
            None if found is None else annotation_from_json(found),
        )


@dataclass
class Examination:
    """What :func:`examine` found.

    Attributes:
        scans: by case, the labelled ones first, both sorted.
        skipped: cases that cannot be used, and the sentence that says why.
        foreground: per channel, the sampled intensities of each scan's foreground; None unless asked for.
    """

    scans: dict[str, Scan]
    skipped: dict[str, str]
    foreground: list[list[np.ndarray]] | None = None


def annotation_to_json(annotation: Annotation) -> dict[str, Any]:
    """``{"planes": [["z", 4], ...], or null for a whole volume, "classes": [1, 2], "partial": []}``; indices count in the raw image."""

    def named(planes: Iterable[tuple[int, int]]) -> list[list[Any]]:
        return [[AXES[axis], int(index)] for axis, index in planes]

    planes = None if annotation.planes is None else named(annotation.planes)
    return {"planes": planes, "classes": sorted(annotation.classes), "partial": named(annotation.partial)}


def annotation_from_json(content: Mapping[str, Any]) -> Annotation:
    def numbered(planes: Iterable[Sequence[Any]]) -> tuple[tuple[int, int], ...]:
        return tuple((AXES.index(axis), index) for axis, index in planes)

    planes = None if content["planes"] is None else numbered(content["planes"])
    return Annotation(planes, frozenset(content["classes"]), numbered(content["partial"]))


# ---------------------------------------------------------------------------------------------------------------------
# Reading the scans


def examine(
    dataset: RawDataset,
    *,
    num_processes: int = 1,
    skip_unreadable: bool = False,
    intensities: bool = True,
    known: Mapping[str, Scan] | None = None,
) -> Examination:
    """Read every scan and mask, and refuse what cannot be trained on. Writes nothing.

    Args:
        dataset: the raw data set.
        num_processes: processes to read with.
        skip_unreadable: leave out scans that cannot be read, have NaN or infinite values, or lack a channel.
        intensities: sample the foreground's intensities, which :func:`make_fingerprint` needs.
        known: what an earlier examination found in cases that have not changed; these are not read again, unless
            ``intensities`` are asked for.

    Raises:
        CMEMSError: there is no labelled case; a scan is unusable (without ``skip_unreadable``); a mask is unreadable, lies
            elsewhere than its scan, has values that ``dataset.json`` does not name, or shows nothing.
    """
    if not dataset.labelled:
        raise CMEMSError(
            f"{dataset.folder} has no labelled case yet; paint a slice (nnUNetv2_cmems suggest -d {dataset.name} proposes one), "
            "with the mask in labelsTr and its scan in imagesTr."
        )
    known = {} if intensities or known is None else known
    number = max(_SAMPLES // len(dataset.cases), 1) if intensities else 0
    looks: dict[str, _Look] = {}
    share = None
    with tqdm(desc=f"Looking at the scans of {dataset.name}", total=len(dataset.cases)) as progress:

        def look_at(cases: Mapping[str, RawCase]) -> list[_Look]:
            unknown = [raw_case for case, raw_case in cases.items() if case not in known]
            progress.update(len(cases) - len(unknown))
            jobs = [_LookJob(raw_case, dataset.reader_class, dataset.num_channels, dataset.values, number, share) for raw_case in unknown]
            found = []
            with contextlib.closing(in_processes(_look, jobs, num_processes)) as results:
                for look in results:
                    if look.said:
                        progress.write(look.said)
                    progress.update()
                    found.append(look)
            found.sort(key=lambda look: look.case)
            _refuse_problems(found, skip_unreadable)
            looks.update({look.case: look for look in found})
            return found

        labelled = look_at(dataset.labelled)
        if labelled and all(look.problem for look in labelled) and not any(case in known for case in dataset.labelled):
            raise CMEMSError(f"no labelled scan of {dataset.folder} is left: {labelled[0].problem}")
        if intensities:
            share = ForegroundShare.measure([look.annotated for look in labelled if look.annotated is not None])
        look_at(dataset.unlabelled)
    scans: dict[str, Scan] = {}
    for case in dataset.cases:
        scan = known[case] if case in known else looks[case].scan
        if scan is not None:
            scans[case] = scan
    odd = _odd_spacings(dataset, scans)
    if odd and not skip_unreadable:
        raise CMEMSError(f"{next(iter(odd.values()))} To go on without it, add --skip_unreadable.")
    scans = {case: scan for case, scan in scans.items() if case not in odd}
    if not any(case in scans for case in dataset.labelled):
        raise CMEMSError(f"no labelled scan of {dataset.folder} is left: {next(iter(odd.values()))}")
    foreground = [[looks[case].foreground[c] for case in scans] for c in range(dataset.num_channels)] if intensities else None
    skipped = {case: look.problem for case, look in looks.items() if look.problem} | odd
    return Examination(scans, dict(sorted(skipped.items())), foreground)


def _odd_spacings(dataset: RawDataset, scans: Mapping[str, Scan]) -> dict[str, str]:
    """The scans whose spacing is far from the others', as where the unit is wrong, and what to say of each."""
    if not scans:
        return {}
    median = np.median([scan.spacing for scan in scans.values()], axis=0)
    return {
        case: f"{dataset.cases[case].images[0]} has a spacing of {times(scan.spacing)} mm (z y x) where the median of all scans is "
        f"{times(median)} mm, so it cannot be resampled like them; correct its header, or remove the scan."
        for case, scan in scans.items()
        if (np.asarray(scan.spacing) > _ODD * median).any() or (_ODD * np.asarray(scan.spacing) < median).any()
    }


@dataclass(frozen=True)
class _LookJob:
    raw_case: RawCase
    reader_class: type[BaseReaderWriter]
    num_channels: int
    values: LabelValues
    samples: int
    share: ForegroundShare | None


@dataclass
class _Look:
    """What a worker brings back from one case. ``scan`` is None where there is a ``problem``."""

    case: str
    scan: Scan | None = None
    problem: str = ""
    is_defect: bool = False
    said: str = ""
    foreground: list[np.ndarray] = field(default_factory=list)
    annotated: tuple[np.ndarray, np.ndarray] | None = None


def _look(job: _LookJob) -> _Look:
    look = _Look(job.raw_case.case)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            _look_into(job, look)
    except ScanDefect as error:
        look.problem, look.is_defect = _with_reason(error, printed.getvalue()), True
    except CMEMSError as error:
        look.problem = _with_reason(error, printed.getvalue())
    else:
        look.said = printed.getvalue().strip()
    return look


def _with_reason(error: CMEMSError, printed: str) -> str:
    """nnU-Net's readers print why they fail and raise an error without a message."""
    reason = next((line.removeprefix("ERROR! ") for line in printed.splitlines() if line.startswith("ERROR")), "RuntimeError")
    return str(error).replace("(RuntimeError)", f"({reason})")


def _look_into(job: _LookJob, look: _Look) -> None:
    raw_case, rng = job.raw_case, np.random.default_rng([_SEED, zlib.crc32(job.raw_case.case.encode())])
    reader = job.reader_class()
    images, properties = read_raw_scan(reader, raw_case, job.num_channels)
    annotation = None
    if raw_case.label is not None:
        mask = _read_mask(reader, raw_case.label, raw_case.images[0], images.shape[1:], properties)
        annotation = read_annotation(mask, job.values, raw_case.label)
        if job.samples:
            labels = complete_annotation(mask, annotation, job.values.not_annotated)
            known = labels != job.values.not_annotated
            look.foreground = _sample_foreground(known & (labels > 0), images, job.samples)
            look.annotated = _sample_annotated(known, labels, images, rng)
    elif job.samples and job.share is not None:
        look.foreground = [
            _sample_foreground(job.share.draw(channel, images[channel], rng), images[channel : channel + 1], job.samples)[0]
            for channel in range(len(images))
        ]
    cropped = crop_to_nonzero(images)[0].shape[1:]
    look.scan = Scan(
        tuple(int(n) for n in images.shape[1:]),
        tuple(float(s) for s in properties["spacing"]),
        tuple(int(n) for n in cropped),
        annotation,
    )


def complete_annotation(mask: np.ndarray, annotation: Annotation, not_annotated: int) -> np.ndarray:
    """A mask (Z, Y, X) whose painted planes have their background, see ``complete_plane``."""
    labels = mask.copy()
    for axis, index in annotation.planes or ():
        plane = (slice(None),) * axis + (index,)
        labels[plane] = complete_plane(mask[plane], not_annotated)
    return labels


def read_raw_scan(reader: BaseReaderWriter, raw_case: RawCase, num_channels: int) -> tuple[np.ndarray, dict[str, Any]]:
    """The scan (C, Z, Y, X) and its properties, as nnU-Net's reader delivers them.

    Raises:
        ScanDefect: the scan is unreadable, has another number of channels, NaN or infinite values, or a header that gives no
            spacing or place in space.
    """
    path = raw_case.images[0]
    which = path if len(raw_case.images) == 1 else f"{path} or another channel of it"
    try:
        for file in raw_case.images:
            _check_whole(file)
        images, properties = reader.read_images(raw_case.images)
    except Exception as error:  # readers raise anything
        raise ScanDefect(f"{which} cannot be read ({why_unreadable(error)}); repair or remove the scan.") from error
    if images.ndim != 4 or images.shape[0] != num_channels:
        raise ScanDefect(
            f"{path} has {images.shape[0]} channels or components where dataset.json names {num_channels}; "
            "save each channel as a file of its own (_0000, _0001, ...), or correct dataset.json."
        )
    if not np.isfinite(images).all():
        raise ScanDefect(f"{which} has NaN or infinite values; repair or remove the scan.")
    check_spacing(path, properties["spacing"])
    affine = _affine(properties)
    if affine is not None and not np.isfinite(affine).all():
        raise ScanDefect(f"the header of {path} gives no place in space (NaN or infinite numbers); repair or remove the scan.")
    return images, properties


def check_spacing(path: str, spacing: Sequence[float]) -> None:
    """Refuse what a header gives as spacing but cannot be one.

    Raises:
        ScanDefect: there are not three positive, finite and halfway sensible numbers.
    """
    if len(spacing) != 3:  # as nnU-Net's readers make of colours
        raise ScanDefect(f"{path} has several values in each voxel, such as colours; save each as a channel of its own.")
    if not all(_SPACINGS[0] <= s <= _SPACINGS[1] for s in spacing):
        raise ScanDefect(f"the header of {path} gives a spacing of {times(spacing)} mm (z y x); correct it, or remove the scan.")


def _read_mask(
    reader: BaseReaderWriter, path: str, image_path: str, shape: Sequence[int], image_properties: Mapping[str, Any]
) -> np.ndarray:
    """The mask (Z, Y, X), of the scan's geometry."""
    try:
        _check_whole(path)
        mask, properties = reader.read_seg(path)
    except Exception as error:  # as above
        raise CMEMSError(f"{path} cannot be read ({why_unreadable(error)}); repair the mask.") from error
    if mask.shape[0] != 1:
        raise CMEMSError(f"{path} has {mask.shape[0]} channels or components; a mask has one, with the labels' values.")
    difference = _geometry_difference(shape, image_properties, mask.shape[1:], properties)
    if difference:
        beside = spacing_file(path)
        how = f"; it has to stand in {beside} beside it, as TIFF has no place for it" if beside and not os.path.isfile(beside) else ""
        raise CMEMSError(f"{path} and its scan {image_path} differ in {difference}; save the mask with the geometry of the scan{how}.")
    found: np.ndarray = mask[0]
    return found


def _geometry_difference(
    shape: Sequence[int], properties: Mapping[str, Any], mask_shape: Sequence[int], mask_properties: Mapping[str, Any]
) -> str:
    """In what a scan and its mask differ, in words; empty if in nothing."""
    if tuple(shape) != tuple(mask_shape):
        return f"shape ({times(shape)} and {times(mask_shape)} voxels, z y x)"
    spacing, mask_spacing = (np.asarray(p["spacing"], dtype=float) for p in (properties, mask_properties))
    extent = np.asarray(shape) * np.abs(spacing - mask_spacing)
    if not (extent <= _GEOMETRY_TOLERANCE * spacing).all():  # NaN differs
        return f"spacing ({times(spacing)} and {times(mask_spacing)} mm, z y x)"
    affine, mask_affine = _affine(properties), _affine(mask_properties)
    if affine is None or mask_affine is None:  # formats without a place in the world
        return ""
    dimensions = len(affine) - 1
    size = tuple(shape)[::-1][:dimensions]  # world axes go with (x, y, z)
    corners = np.stack(np.meshgrid(*[[0, n - 1] for n in size], indexing="ij"), axis=-1).reshape(-1, dimensions)
    corners = np.concatenate([corners, np.ones((len(corners), 1))], axis=1)
    apart = np.abs(corners @ (affine - mask_affine).T).max()
    if not apart <= _GEOMETRY_TOLERANCE * spacing[-dimensions:].min():
        return f"origin or direction (their corners lie up to {apart:.3g} mm apart)"
    return ""


def _affine(properties: Mapping[str, Any]) -> np.ndarray | None:
    """Voxel (x, y, z) to mm, as the reader's properties have it."""
    if "nibabel_stuff" in properties:
        return np.asarray(properties["nibabel_stuff"]["original_affine"], dtype=float)
    if "sitk_stuff" not in properties:
        return None
    stuff = properties["sitk_stuff"]
    full = len(stuff["spacing"])
    used = min(full, 3)  # a fourth dimension counts channels
    affine = np.eye(used + 1)
    direction = np.reshape(stuff["direction"], (full, full))[:used, :used]
    affine[:used, :used] = direction * np.asarray(stuff["spacing"])[:used]
    affine[:used, used] = np.asarray(stuff["origin"])[:used]
    return affine


def why_unreadable(error: Exception) -> str:
    """The telling line of a reader's error: ITK's first line names a file of ITK's, and others an object in memory."""
    lines = [line.partition("ERROR: ")[2] for line in str(error).splitlines() if "ERROR: " in line]
    return re.sub(r"\w+\((0x)?[0-9a-fA-F]+\): ", "", lines[0]).rstrip(". ") if lines else first_line(error)


def _check_whole(path: str) -> None:
    """Refuse a truncated NIfTI file, which ITK reads without complaint and fills up with zeros; and see :func:`check_header`.

    The size of a compressed file's content stands in its last four bytes, unless it is made of several parts; only
    where that number is not the one expected is the whole file decompressed.
    """
    header = check_header(path)
    if header is None:
        return
    expected = int(header.dataobj.offset) + math.prod(header.shape) * header.get_data_dtype().itemsize
    if path.endswith(".nii"):
        if os.path.getsize(path) < expected:
            raise EOFError("the file is cut off")
        return
    with open(path, "rb") as file:
        file.seek(-4, os.SEEK_END)
        if struct.unpack("<I", file.read(4))[0] == expected % 2**32:
            return
    size = 0
    with gzip.open(path, "rb") as content:
        while block := content.read(2**20):  # raises EOFError where the file ends too early
            size += len(block)
    if size < expected:
        raise EOFError("the file is cut off")


def _refuse_problems(looks: Sequence[_Look], skip_unreadable: bool) -> None:
    problems = [look for look in looks if look.problem and not (look.is_defect and skip_unreadable)]
    if not problems:
        return
    mistakes = [look for look in problems if not look.is_defect] or problems
    hint = " To go on without it, add --skip_unreadable." if mistakes[0].is_defect else ""
    others = [look.case for look in problems if look is not mistakes[0]]
    more = f" There is a problem with {len(others)} more: {', '.join(others)}." if others else ""
    raise CMEMSError(mistakes[0].problem + hint + more)


# ---------------------------------------------------------------------------------------------------------------------
# Intensities


@dataclass(frozen=True)
class ForegroundShare:
    """How often a voxel of some intensity is foreground, measured on the annotated voxels.

    nnU-Net's CT normalisation needs the foreground's mean, standard deviation and 0.5 and 99.5 percentiles. A painted
    slice of one scan tells them poorly. So the voxels of unlabelled scans count as well, each with the share of annotated
    voxels of its intensity that are foreground; not those beyond the 0.5 and 99.5 percentiles of the annotated foreground,
    nor those of intensities at which foreground is less than a fifth as frequent as on average (air, of which there is so much).
    Each scan has the same weight in the end, as with nnU-Net.

    Attributes:
        edges: per channel, the borders of intensity intervals that hold equal numbers of annotated foreground voxels.
        share: per channel and interval, the share of foreground, scaled to a maximum of 1.
    """

    edges: tuple[np.ndarray, ...]
    share: tuple[np.ndarray, ...]

    @classmethod
    def measure(cls, annotated: Sequence[tuple[np.ndarray, np.ndarray]]) -> ForegroundShare | None:
        """From annotated voxels: per scan, intensities (C, N) and whether each is foreground (N,). None without foreground."""
        if not annotated:
            return None
        values = np.concatenate([v for v, _ in annotated], axis=1)
        is_foreground = np.concatenate([f for _, f in annotated])
        if not is_foreground.any():
            return None
        edges, shares = zip(*[_share_of_channel(channel, is_foreground) for channel in values], strict=True)
        return cls(edges, shares)

    def draw(self, channel: int, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Voxels of an image (Z, Y, X) that stand for the foreground, as a mask of the same shape."""
        edges, share = self.edges[channel], self.share[channel]
        inside = (image >= edges[0]) & (image <= edges[-1])
        chances = share[_interval(edges, image[inside])]
        mask = np.zeros(image.shape, dtype=bool)
        mask[inside] = rng.random(chances.size, dtype=np.float32) < chances
        return mask


def _share_of_channel(values: np.ndarray, is_foreground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    foreground = values[is_foreground]
    bins = int(np.clip(foreground.size // _VOXELS_PER_BIN, 1, _BINS))
    edges = np.unique(np.percentile(foreground, np.linspace(_TRIM, 100 - _TRIM, bins + 1)).astype(np.float64))
    if len(edges) == 1:  # all of one intensity
        edges = np.array([edges[0], np.nextafter(edges[0], np.inf)])
    inside = (values >= edges[0]) & (values <= edges[-1])
    index = _interval(edges, values[inside])
    total = np.bincount(index, minlength=len(edges) - 1)
    share = np.bincount(index[is_foreground[inside]], minlength=len(edges) - 1) / np.maximum(total, 1)
    share[share < _RARE * is_foreground.mean()] = 0.0
    return edges, (share / max(share.max(), 1e-12)).astype(np.float32)


def _interval(edges: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)


def _sample_foreground(mask: np.ndarray, images: np.ndarray, samples: int) -> list[np.ndarray]:
    """Per channel of ``images`` (C, Z, Y, X), intensities drawn from the mask (Z, Y, X) by nnU-Net."""
    drawn, _ = DatasetFingerprintExtractor.collect_foreground_intensities(mask[None], images, _SEED, samples)
    return [np.asarray(values, dtype=np.float32) for values in drawn]


def _sample_annotated(known: np.ndarray, labels: np.ndarray, images: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    values, is_foreground = images[:, known], labels[known] > 0
    if is_foreground.size > _ANNOTATED_SAMPLES:
        chosen = rng.choice(is_foreground.size, _ANNOTATED_SAMPLES, replace=False)
        values, is_foreground = values[:, chosen], is_foreground[chosen]
    return values, is_foreground


# ---------------------------------------------------------------------------------------------------------------------
# Fingerprint and plans


def make_fingerprint(dataset: RawDataset, examination: Examination) -> dict[str, Any]:
    """The content of nnU-Net's ``dataset_fingerprint.json``, with the cases that it was made from under our own key.

    Args:
        dataset: the raw data set.
        examination: of all its scans, with intensities.
    """
    assert examination.foreground is not None
    scans = examination.scans.values()
    remaining = [float(np.prod(scan.shape_after_crop) / np.prod(scan.shape)) for scan in scans]
    return {
        "spacings": [list(scan.spacing) for scan in scans],
        "shapes_after_crop": [list(scan.shape_after_crop) for scan in scans],
        "foreground_intensity_properties_per_channel": {
            str(channel): _statistics(np.concatenate(samples)) for channel, samples in enumerate(examination.foreground)
        },
        "median_relative_size_after_cropping": float(np.median(remaining)),
        OURS: {
            "labelled": [case for case in dataset.labelled if case in examination.scans],
            "unlabelled": [case for case in dataset.unlabelled if case in examination.scans],
        },
    }


def _statistics(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(values, (0.5, 50.0, 99.5))
    return {
        "mean": float(np.mean(values, dtype=np.float64)),
        "median": float(median),
        "std": float(np.std(values, dtype=np.float64)),
        "min": float(values.min()),
        "max": float(values.max()),
        "percentile_99_5": float(high),
        "percentile_00_5": float(low),
    }


@dataclass(frozen=True)
class PlannerOptions:
    """Options of ``nnUNetv2_plan_and_preprocess`` that concern the plans; None stands for the planner's default."""

    planner: str = "ExperimentPlanner"
    gpu_memory_target: float | None = None
    target_spacing: tuple[float, ...] | None = None
    plans_name: str | None = None


@dataclass(frozen=True)
class Plans:
    """Plans that are made but not written yet.

    Attributes:
        name: the plans' identifier, for example ``"nnUNetPlans"``.
        content: of the plans file, custom configurations of an existing one included.
        files: what belongs into the data set's preprocessed folder, by name.
    """

    name: str
    content: dict[str, Any]
    files: dict[str, str]

    def publish(self, folder: str) -> None:
        """Write the files into the data set's preprocessed folder."""
        for name, text in self.files.items():
            write_text(os.path.join(folder, name), text)


class _PlannerThatCutsPlanes(ExperimentPlanner):
    """Puts the axis along which planes are annotated first, so that 2D slices are cut along it."""

    first_axis: int | None = None

    def determine_transpose(self) -> tuple[list[int], list[int]]:
        if self.first_axis is None:
            forward, backward = super().determine_transpose()
            return forward, backward
        forward = [self.first_axis, *(axis for axis in range(3) if axis != self.first_axis)]
        return forward, [forward.index(axis) for axis in range(3)]


def annotated_axes(scans: Iterable[Scan]) -> frozenset[int]:
    """The axes of the raw (z, y, x) arrays along which planes are annotated; empty where all annotations are whole volumes."""
    return frozenset(axis for scan in scans if scan.annotation is not None for axis in scan.annotation.axes)


def make_plans(
    dataset: RawDataset,
    scans: Mapping[str, Scan],
    fingerprint: Mapping[str, Any],
    options: PlannerOptions,
    folder: str,
    verbose: bool = False,
) -> Plans:
    """Let nnU-Net's planner plan from a fingerprint. Writes nothing into ``folder``.

    The planner works in a scratch folder, on a ``dataset.json`` that lists all scans: its cap on the batch size then
    counts the unlabelled ones.

    Args:
        dataset: the raw data set.
        scans: all its usable cases.
        fingerprint: of nnU-Net's form.
        options: the planner and what it is told.
        folder: the data set's preprocessed folder, whose plans' custom configurations are kept.
        verbose: show what the planner prints.

    Raises:
        CMEMSError: there is no such planner, or it fails; the existing plans cannot be read.
    """
    base = find_planner(options.planner)
    axes = annotated_axes(scans.values())
    planner_class = type(base.__name__, (_PlannerThatCutsPlanes, base), {"first_axis": next(iter(axes)) if len(axes) == 1 else None})
    listing = {case: {"images": list(dataset.cases[case].images), "label": dataset.cases[case].label or ""} for case in scans}
    description = {
        **dataset.dataset_json,
        "dataset": listing,
        "numTraining": len(fingerprint["spacings"]),
        "overwrite_image_reader_writer": dataset.reader_class.__name__,
    }
    arguments: dict[str, Any] = {"gpu_memory_target_in_gb": options.gpu_memory_target, "plans_name": options.plans_name}
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as scratch:
        raw, preprocessed = (os.path.join(scratch, kind, dataset.name) for kind in ("raw", "preprocessed"))
        write_json(os.path.join(raw, "dataset.json"), description)
        write_json(os.path.join(preprocessed, "dataset_fingerprint.json"), fingerprint)
        _copy_if_there("splits_final.json", dataset.folder, raw)
        _copy_if_there("splits_final.json", folder, preprocessed)
        try:
            threads = str(max(1, get_allowed_n_proc_DA()))  # nnU-Net's planner fails where no loader processes are wanted
            folders = {"nnUNet_raw": os.path.dirname(raw), "nnUNet_preprocessed": os.path.dirname(preprocessed)}
            with environment(**folders, nnUNet_n_proc_DA=threads):
                with contextlib.redirect_stdout(printed):
                    planner = planner_class(
                        dataset.name,
                        overwrite_target_spacing=list(options.target_spacing) if options.target_spacing else None,
                        **{key: value for key, value in arguments.items() if value is not None},
                    )
                    _copy_plans(planner.plans_identifier, folder, preprocessed)
                    planner.plan_experiment()
        except CMEMSError:
            raise
        except AssertionError as error:
            if not os.path.isfile(os.path.join(raw, "splits_final.json")):
                raise CMEMSError(f"nnU-Net's planner {options.planner} refuses {dataset.name}: {first_line(error)}.") from error
            raise CMEMSError(f"the splits_final.json of {dataset.folder} and of {folder} differ; remove the one that is wrong.") from error
        except Exception as error:  # a planner may raise anything
            raise CMEMSError(f"nnU-Net's planner {options.planner} failed for {dataset.name}: {first_line(error)}.") from error
        name = planner.plans_identifier
        with open(os.path.join(preprocessed, f"{name}.json"), encoding="utf-8") as file:
            text = file.read()
        files = {f"{name}.json": text, "dataset_fingerprint.json": to_json(fingerprint)}
        with open(dataset.dataset_json_path, encoding="utf-8") as file:
            files["dataset.json"] = file.read()
        splits = os.path.join(preprocessed, "splits_final.json")
        if os.path.isfile(splits) and not os.path.isfile(os.path.join(folder, "splits_final.json")):
            with open(splits, encoding="utf-8") as file:
                files["splits_final.json"] = file.read()
        if verbose:
            print(printed.getvalue().replace(os.path.dirname(preprocessed), os.path.dirname(folder)))
    return Plans(name, json.loads(text), files)


def find_planner(name: str) -> type[ExperimentPlanner]:
    """nnU-Net's planner of this name.

    Raises:
        CMEMSError: there is none.
    """
    found = recursive_find_python_class(
        os.path.join(nnunetv2.__path__[0], "experiment_planning"), name, current_module="nnunetv2.experiment_planning"
    )
    if not (isinstance(found, type) and issubclass(found, ExperimentPlanner)):
        raise CMEMSError(f"nnU-Net has no planner '{name}'; correct -pl (for example ExperimentPlanner or nnUNetPlannerResEncM).")
    return found


def _copy_plans(name: str, source: str, target: str) -> None:
    """nnU-Net keeps the custom configurations of an existing plans file."""
    path = os.path.join(source, f"{name}.json")
    if not os.path.isfile(path):
        return
    try:
        with open(path, encoding="utf-8") as file:
            json.load(file)["configurations"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CMEMSError(f"{path} cannot be read ({first_line(error)}); repair it, or move it away to have it written anew.") from error
    shutil.copyfile(path, os.path.join(target, f"{name}.json"))


def _copy_if_there(name: str, source: str, target: str) -> None:
    if os.path.isfile(os.path.join(source, name)):
        shutil.copyfile(os.path.join(source, name), os.path.join(target, name))



# ---------------------------------------------------------------------------------------------------------------------
# Processes


def in_processes(function: Callable[[Job], Result], jobs: Sequence[Job], num_processes: int) -> Generator[Result, None, None]:
    """Results of ``function`` for each job, in the order in which they are done. One process: this one.

    Raises:
        CMEMSError: a worker process died.
    """
    if min(num_processes, len(jobs)) <= 1:
        yield from map(function, jobs)
        return
    pool = ProcessPoolExecutor(
        min(num_processes, len(jobs)), mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_the_main_process
    )
    try:
        for future in as_completed([pool.submit(function, job) for job in jobs]):
            yield future.result()
    except BrokenProcessPool as error:
        raise CMEMSError("a worker process died, most likely for lack of memory; use fewer processes (-np, -npfp).") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_the_main_process() -> None:
    """In a worker: end as soon as the main process does, even if that was killed. Workers would wait for work forever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
