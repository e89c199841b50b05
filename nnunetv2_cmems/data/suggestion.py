"""Which slice to annotate first, told from the scans alone. No file of ``labelsTr`` is opened here.

A good first slice is typical, so that what is learned from it holds for the other scans; it shows structure,
as there is something to paint; and it does not lie at an end of its scan, where organs begin and end. In detail,
for the axis along which nnU-Net's 2D configuration cuts its slices:

* Every slice becomes a small, blurred thumbnail of the same physical extent in all scans. Its *look* is the
  thumbnail less its mean, scaled to length 1, with more weight on the middle of the image.
* *Typicality* of a slice: how much its look correlates with the average look of the other scans, the mean over
  all slices of each. As the average of a whole scan resembles its middle slices more than its ends, so do the picks.
* *Structure* of a slice: the mean gradient of its thumbnail, in units of the scan's own contrast.
* Slices that show next to nothing are left out. Of the others, those of the scan's middle third are candidates. The more
  typical half of all candidates comes first, the one with the most structure leading; the others follow by typicality.
* The best slice of each scan is suggested; scans of a patient who has a slice already come after all other patients.

The result depends on the scans alone: not on the order of files, the number of processes, or any label.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from tqdm import tqdm

from nnunetv2_cmems.data.looks import SIDE, central_window, new_patients_first, thumbnail
from nnunetv2_cmems.data.planning import ScanDefect, check_spacing, in_processes, read_raw_scan, why_unreadable
from nnunetv2_cmems.data.raw import UNLABELLED, RawCase, RawDataset, check_header
from nnunetv2_cmems.errors import CMEMSError

_SHOWS_SOMETHING = 0.25  # share of the structure of the scan's richest slice
_WIDEST = 8  # times a slice's own side; a scan that is much smaller than the others, or says so in its header, is not padded further

Result = TypeVar("Result")


@dataclass(frozen=True)
class ScanSummary:
    """What is kept of a scan to compare it with others.

    Attributes:
        case: the case identifier.
        average: float32 (D,), the mean of the looks of all slices that show something.
        slices: int (N,), the slices that may be suggested, as indices of the raw image along the slice axis.
        looks: float32 (N, D), their looks.
        structure: float64 (N,), their structure.
    """

    case: str
    average: np.ndarray
    slices: np.ndarray
    looks: np.ndarray
    structure: np.ndarray


@dataclass(frozen=True)
class Suggestion:
    """A slice worth annotating.

    Attributes:
        case: the case identifier.
        axis: axis of the raw (Z, Y, X) array that ``slice`` is an index of.
        slice: index, counted from 0, in the raw image as nnU-Net's reader delivers it.
        typicality: correlation with the average look of the other scans, at most 1.
        structure: mean gradient in units of the scan's contrast.
    """

    case: str
    axis: int
    slice: int
    typicality: float
    structure: float


@dataclass(frozen=True)
class ViewerPlace:
    """Where a slice is found in a viewer.

    Attributes:
        plane: ``"axial"``, ``"coronal"`` or ``"sagittal"``: the view that comes closest; "" where the file does not say.
        axis: index of the file's voxel axis, 0 for the first (i in 3D Slicer).
        index: index along it, counted from 0 in the file's own voxel order. 3D Slicer shows this number, ITK-SNAP one more.
        total: number of slices.
    """

    plane: str
    axis: int
    index: int
    total: int


def slice_axis(spacings: Sequence[Sequence[float]]) -> int:
    """The axis of the raw (Z, Y, X) arrays along which nnU-Net's planner will cut 2D slices.

    As nnU-Net decides it: the axis of the largest median spacing, the first one of equals.

    Args:
        spacings: (z, y, x) of every scan, as the reader gives them.
    """
    return int(np.argmax(np.percentile(np.vstack(spacings), 50, 0)))


def summarise_scan(case: str, image: np.ndarray, axis: int, pixel: Sequence[float], extent: Sequence[float]) -> ScanSummary:
    """What is needed of a scan to rank its slices among those of all scans.

    Args:
        case: the case identifier.
        image: (C, Z, Y, X), finite.
        axis: slices are cut along this axis of (Z, Y, X).
        pixel: spacing along the two other axes.
        extent: height and width, in units of the spacing, of the central window that is compared.
    """
    slices = np.moveaxis(image, axis + 1, 1)
    window = [max(1, round(min(e / p, _WIDEST * n))) for e, p, n in zip(extent, pixel, slices.shape[2:], strict=True)]
    low, high = np.percentile(image.reshape(len(image), -1), (1, 99), axis=1)[:, :, None, None]
    planes = (np.clip(slices[:, i], low, high).astype(np.float32) for i in range(slices.shape[1]))
    thumbnails = np.stack([thumbnail(central_window(plane, window)).numpy() for plane in planes])
    structure = _structure(thumbnails)
    shows = np.flatnonzero((structure > 0) & (structure >= _SHOWS_SOMETHING * structure.max()))
    if len(shows) == 0:  # the same grey everywhere
        nothing = np.zeros((0, thumbnails[0].size), np.float32)
        return ScanSummary(case, np.zeros(thumbnails[0].size, np.float32), shows, nothing, structure[:0])
    first, number = int(shows[0]), int(shows[-1] - shows[0] + 1)
    middle = np.arange(first + number // 3, first + -(-2 * number // 3))
    middle = middle[structure[middle] > 0]
    looks = _looks(thumbnails)
    return ScanSummary(case, looks[first : first + number].mean(axis=0), middle, looks[middle], structure[middle])


def rank_slices(
    summaries: Iterable[ScanSummary], axis: int, candidates: Collection[str] | None = None, annotated: Collection[str] = ()
) -> list[Suggestion]:
    """The best slice of each candidate scan, the one most worth annotating first. See the module's text for the rule.

    Args:
        summaries: all scans of the data set, annotated ones included, in any order.
        axis: the axis that they were summarised along.
        candidates: the scans to choose from; ``None``: all.
        annotated: cases whose patients count as served already.
    """
    best: dict[str, Suggestion] = {}
    for slice_ in order_slices(summaries, axis, candidates):
        best.setdefault(slice_.case, slice_)
    return new_patients_first(best.values(), lambda suggestion: suggestion.case, annotated)


def order_slices(summaries: Iterable[ScanSummary], axis: int, candidates: Collection[str] | None = None) -> list[Suggestion]:
    """All slices of the candidate scans that may be suggested, the one most worth annotating first; arguments as in :func:`rank_slices`."""
    scans = sorted(summaries, key=lambda scan: scan.case)
    chosen = [scan for scan in scans if (candidates is None or scan.case in candidates) and len(scan.slices)]
    if not chosen:
        return []
    whole = np.stack([scan.average for scan in scans]).sum(axis=0, dtype=np.float64)
    typicality = np.concatenate([_typicality(scan, whole, len(scans)) for scan in chosen]).round(6)  # to the same digits on every machine
    structure = np.concatenate([scan.structure for scan in chosen]).round(6)
    typical = typicality >= np.median(typicality)
    places = [(scan.case, int(i)) for scan in chosen for i in scan.slices]
    merit = [(not typical[n], -structure[n] if typical[n] else -typicality[n], places[n]) for n in range(len(places))]
    order = sorted(range(len(places)), key=merit.__getitem__)
    return [Suggestion(places[n][0], axis, places[n][1], float(typicality[n]), float(structure[n])) for n in order]


def _typicality(scan: ScanSummary, whole: np.ndarray, num_scans: int) -> np.ndarray:
    """Correlation (N,) of a scan's slices with the mean of the other scans; with the scan itself where there is no other."""
    others = (whole - scan.average) / (num_scans - 1) if num_scans > 1 else whole
    length = float(np.linalg.norm(others))
    return scan.looks.astype(np.float64) @ others / length if length > 1e-9 else np.zeros(len(scan.slices))


def _structure(thumbnails: np.ndarray) -> np.ndarray:
    """Mean gradient (N,) of thumbnails (N, C, Y, X), in units of each channel's standard deviation over the scan."""
    down, right = np.gradient(thumbnails.astype(np.float64), axis=(2, 3))
    contrast = thumbnails.std(axis=(0, 2, 3), dtype=np.float64)
    return (np.hypot(down, right).mean(axis=(2, 3)) / np.where(contrast > 1e-9, contrast, np.inf)).mean(axis=1)


def _looks(thumbnails: np.ndarray) -> np.ndarray:
    """Thumbnails (N, C, Y, X) less their weighted mean, each of length 1 (0 where it is flat): float32 (N, D)."""
    bell = np.exp(-(((np.arange(SIDE) - (SIDE - 1) / 2) / (SIDE / 4)) ** 2) / 2)
    weight = np.outer(bell, bell) / bell.sum() ** 2
    centred = thumbnails - (thumbnails * weight).sum(axis=(2, 3), keepdims=True)
    weighted = (centred * np.sqrt(weight)).reshape(*thumbnails.shape[:2], -1)
    length = np.linalg.norm(weighted, axis=2, keepdims=True)
    unit = np.where(length > 1e-9, weighted / np.maximum(length, 1e-9), 0.0)
    return (unit.reshape(len(unit), -1) / np.sqrt(thumbnails.shape[1])).astype(np.float32)


def summarise_dataset(
    dataset: RawDataset,
    *,
    axis: int | None = None,
    num_processes: int = 1,
    skip_unreadable: bool = False,
    warn: Callable[[str], None] = print,
) -> tuple[int, list[ScanSummary]]:
    """The slice axis, and a summary of every scan of a data set. Each process holds one scan at a time.

    Args:
        dataset: labelled and unlabelled cases; all count for what is typical.
        axis: of the (Z, Y, X) arrays, along which slices are cut; ``None``: as :func:`slice_axis` says.
        num_processes: 1 works in this process.
        skip_unreadable: leave unreadable scans out instead of stopping at the first.
        warn: gets a sentence for each scan that was left out.

    Raises:
        CMEMSError: there is no scan, a scan is unreadable or has NaN or infinite values, or a worker process died.
    """
    jobs = [(raw, dataset.reader_class, dataset.num_channels) for raw in dataset.cases.values()]

    def work(
        function: Callable[[Any], tuple[str, Result | None, str]], jobs: Sequence[Any], processes: int, title: str
    ) -> dict[str, Result]:
        results: dict[str, Result] = {}
        for case, result, problem in tqdm(in_processes(function, jobs, processes), desc=title, total=len(jobs), disable=None):
            if result is not None:
                results[case] = result
            elif skip_unreadable:
                warn(f"Left out: {problem}")
            else:
                raise CMEMSError(f"{problem} To go on without it, add --skip_unreadable.")
        return dict(sorted(results.items()))

    geometry: dict[str, tuple[list[int], list[float]]] = {}
    if jobs:  # reading a header takes less time than starting a process
        geometry = work(_read_geometry, jobs, 1 if dataset.reader_class is SimpleITKIO else num_processes, "Looking at headers")
    if not geometry:
        raise CMEMSError(f"{dataset.folder} has no scan that can be read; put scans into {UNLABELLED}.")
    if axis is None:
        axis = slice_axis([spacing for _, spacing in geometry.values()])
    others = [i for i in range(3) if i != axis]
    extent = np.median([[shape[i] * spacing[i] for i in others] for shape, spacing in geometry.values()], axis=0).tolist()
    summaries = work(_summarise, [(*job, axis, extent) for job in jobs if job[0].case in geometry], num_processes, "Comparing slices")
    return axis, list(summaries.values())


def _read_geometry(job: tuple[RawCase, type[BaseReaderWriter], int]) -> tuple[str, tuple[list[int], list[float]] | None, str]:
    """Shape (z, y, x) and spacing of a scan as the reader gives them; of the default reader's files, the header is enough."""
    raw, reader_class, num_channels = job
    _settle_worker()
    try:
        if reader_class is SimpleITKIO:
            header = _read_header(raw)
            size, spacing = list(header.GetSize()[::-1]), [abs(s) for s in header.GetSpacing()[::-1]]
            if len(size) <= 3:  # a fourth dimension would be the channels
                check_spacing(raw.images[0], spacing if len(size) == 3 else [spacing[0], *spacing])
                return raw.case, (size, spacing) if len(size) == 3 else ([1, *size], [999 * max(spacing), *spacing]), ""
        image, properties = read_raw_scan(reader_class(), raw, num_channels)
        return raw.case, (list(image.shape[1:]), [float(s) for s in properties["spacing"]]), ""
    except ScanDefect as error:
        return raw.case, None, str(error)


def _summarise(
    job: tuple[RawCase, type[BaseReaderWriter], int, int, Sequence[float]],
) -> tuple[str, ScanSummary | None, str]:
    raw, reader_class, num_channels, axis, extent = job
    _settle_worker()
    try:
        image, properties = read_raw_scan(reader_class(), raw, num_channels)
    except ScanDefect as error:
        return raw.case, None, str(error)
    pixel = [float(properties["spacing"][i]) for i in range(3) if i != axis]
    return raw.case, summarise_scan(raw.case, image, axis, pixel, extent), ""


def _settle_worker() -> None:
    """In a worker process: no warnings, and no threads, as there are other workers."""
    if multiprocessing.parent_process() is not None:
        sitk.ProcessObject.SetGlobalWarningDisplay(False)
        torch.set_num_threads(1)


def _read_header(raw: RawCase) -> Any:
    header = sitk.ImageFileReader()
    header.SetFileName(raw.images[0])
    try:
        check_header(raw.images[0])
        header.ReadImageInformation()
    except Exception as error:  # nibabel raises nearly anything
        raise ScanDefect(f"{raw.images[0]} cannot be read ({why_unreadable(error)}); repair or remove the scan.") from error
    return header


def viewer_place(raw: RawCase, reader: BaseReaderWriter, properties: Mapping[str, Any], axis: int, index: int, total: int) -> ViewerPlace:
    """Where ITK-SNAP and 3D Slicer show a slice.

    Both count along the file's own voxel axes. nnU-Net's ``...WithReorient`` readers turn the image first, so that
    their index is translated.

    Args:
        raw: the case.
        reader: the reader that read it.
        properties: what it returned.
        axis: axis of the (Z, Y, X) array.
        index: index along it.
        total: number of slices.
    """
    world = _world(properties)
    plane = "" if world is None else ("sagittal", "coronal", "axial")[_main_direction(world[:3, 2 - axis])[0]]
    if world is None or not type(reader).__name__.endswith("WithReorient"):
        return ViewerPlace(plane, 2 - axis, index, total)
    point = np.array([0.0, 0.0, 0.0, 1.0])
    point[2 - axis] = index
    to_file = np.linalg.inv(_file_world(raw, properties)) @ world
    file_axis = int(np.argmax(np.abs(to_file[:3, 2 - axis])))
    return ViewerPlace(plane, file_axis, round(float((to_file @ point)[file_axis])), total)


def display_plane(
    volume: np.ndarray, axis: int, index: int, properties: Mapping[str, Any]
) -> tuple[np.ndarray, tuple[int, int], tuple[bool, bool]]:
    """A slice of a volume (Z, Y, X), turned as radiologists look at it, if the file says how.

    Axial slices have the front at the top, the others the head; the patient's right (in sagittal slices the front) is at the
    left.

    Returns:
        The image, the array axes that run along its rows' and its columns' index, and whether each is mirrored.
    """
    plane = np.take(volume, index, axis)
    rows, columns = (i for i in range(3) if i != axis)
    world = _world(properties)
    if world is None:
        return plane, (rows, columns), (False, False)
    directions = {i: _main_direction(world[:3, 2 - i]) for i in (rows, columns)}
    if directions[rows][0] < directions[columns][0]:  # the image runs along the body's axes x, y or x, z or y, z: in this order
        plane, rows, columns = plane.T, columns, rows
    flips = []
    for image_axis, array_axis in enumerate((rows, columns)):
        body_axis, sign = directions[array_axis]
        flips.append(sign > 0 if body_axis == 2 else sign < 0)  # z grows towards the head, y to the back, x to the patient's left
        if flips[-1]:
            plane = np.flip(plane, image_axis)
    return plane, (rows, columns), (flips[0], flips[1])


def _world(properties: Mapping[str, Any]) -> np.ndarray | None:
    """The 4 x 4 matrix from voxel indices (x, y, z) of the reader's array to millimetres, in ITK's orientation (LPS)."""
    if "sitk_stuff" in properties and len(properties["sitk_stuff"]["spacing"]) == 3:
        stuff = properties["sitk_stuff"]
        return _matrix(stuff["direction"], stuff["spacing"], stuff["origin"])
    if "nibabel_stuff" in properties:
        stuff = properties["nibabel_stuff"]
        return np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(stuff.get("reoriented_affine", stuff["original_affine"]))
    return None


def _file_world(raw: RawCase, properties: Mapping[str, Any]) -> np.ndarray:
    """As :func:`_world`, for the voxel order of the file."""
    if "nibabel_stuff" in properties:
        return np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(properties["nibabel_stuff"]["original_affine"])
    header = _read_header(raw)
    return _matrix(header.GetDirection(), header.GetSpacing(), header.GetOrigin())


def _matrix(direction: Sequence[float], spacing: Sequence[float], origin: Sequence[float]) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(direction, (3, 3)) * np.asarray(spacing)
    matrix[:3, 3] = origin
    return matrix


def _main_direction(column: np.ndarray) -> tuple[int, float]:
    """The body's axis (0, 1, 2) that a voxel axis comes closest to, and the sign."""
    main = int(np.argmax(np.abs(column)))
    return main, float(np.sign(column[main]))
