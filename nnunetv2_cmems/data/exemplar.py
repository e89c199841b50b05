"""The annotated slices: found in nnU-Net's preprocessed folder, loaded, or chosen.

A user names a slice by its place in the RAW image. nnU-Net's 2D preprocessing transposes the image,
crops it to its nonzero part and resamples within slices only, so a raw slice lands on exactly one
preprocessed slice; this module does that arithmetic and says in one sentence when it cannot be done.

"Raw image" is the image as the data set's nnU-Net reader delivers it. That is the file's own voxel
order, except for nnU-Net's ``...WithReorient`` readers, which turn the image to a standard
orientation first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch.nn import functional

from nnunetv2_cmems.config import ExemplarSpec
from nnunetv2_cmems.errors import CMEMSError

Class = int | tuple[int, ...]
"""A foreground class: a label, or the labels of a region in region-based training."""

_AXES = "zyx"  # nnU-Net's readers deliver arrays in this order
_SIDE = 32  # side of the thumbnails that slices are compared by
_AGAIN = "run nnUNetv2_preprocess again"


@dataclass(frozen=True)
class PreprocessedDataset:
    """What has to be known about a folder of preprocessed 2D cases.

    Attributes:
        folder: the configuration's preprocessed folder.
        dataset_class: the nnU-Net data set class that reads it (``infer_dataset_class(folder)``).
        transpose_forward: the plans' transposition of the raw (z, y, x) array.
        class_names: the foreground classes and how the user calls them.
    """

    folder: str
    dataset_class: type[nnUNetBaseDataset]
    transpose_forward: tuple[int, ...]
    class_names: Mapping[Class, str]

    @classmethod
    def from_plans(
        cls, folder: str, dataset_class: type[nnUNetBaseDataset], plans_manager: PlansManager, dataset_json: dict[str, Any]
    ) -> PreprocessedDataset:
        """The data set as nnU-Net's plans and ``dataset.json`` describe it."""
        manager = plans_manager.get_label_manager(dataset_json)
        foreground = {_as_class(c) for c in (manager.foreground_regions if manager.has_regions else manager.foreground_labels)}
        names = {_as_class(value): name for name, value in dataset_json["labels"].items()}
        return cls(
            folder=folder,
            dataset_class=dataset_class,
            transpose_forward=tuple(int(axis) for axis in plans_manager.transpose_forward),
            class_names={c: name for c, name in names.items() if c in foreground},
        )

    @property
    def slice_axis(self) -> str:
        """The raw image's axis (``"x"``, ``"y"`` or ``"z"``) that 2D slices are counted along."""
        return _AXES[self.transpose_forward[0]]


@dataclass(frozen=True)
class Exemplar:
    """One annotated slice, preprocessed.

    Attributes:
        case: the case identifier.
        axis: the raw image's voxel axis (``"x"``, ``"y"``, ``"z"``) that ``slice`` is an index of;
            x is the first axis of a NIfTI file, z the last.
        slice: zero-based index in the RAW image along ``axis``.
        index: index along axis 1 of the preprocessed array (C, Z, Y, X).
        image: float32 (C, Y, X), the whole preprocessed slice.
        label: int16 (Y, X). nnU-Net's -1, "outside of the nonzero mask", is turned into 0; an
            ignore label is kept.
    """

    case: str
    axis: str
    slice: int
    index: int
    image: np.ndarray
    label: np.ndarray

    @property
    def spec(self) -> ExemplarSpec:
        """The slice as a user would name it."""
        return ExemplarSpec(case=self.case, slice=self.slice, axis=self.axis)  # type: ignore[arg-type]


def load_exemplars(
    specs: Sequence[ExemplarSpec], cases: Sequence[str], dataset: PreprocessedDataset, allow_missing_classes: bool = False
) -> list[Exemplar]:
    """Load the annotated slices that the user named.

    Args:
        specs: the slices, by their place in the raw images.
        cases: the fold's training cases. Only these may be exemplars.
        dataset: the preprocessed folder.
        allow_missing_classes: go on when the slices together lack a class.

    Returns:
        One exemplar per spec, in the same order.

    Raises:
        CMEMSError: a case is not preprocessed or not a training case; a slice is cut along another
            axis, does not exist, was cropped away, is named twice or has no foreground; an image
            has NaN or infinite values; a file cannot be read; together they lack a class.
    """
    if not specs:
        raise CMEMSError("No exemplar is named; name at least one annotated slice, or set 'exemplar' to \"auto\".")
    exemplars: list[Exemplar] = []
    for spec in specs:
        _check_case(spec.case, cases, dataset)
        index = preprocessed_index(spec, read_properties(spec.case, dataset), dataset)
        if any(e.case == spec.case and e.index == index for e in exemplars):
            raise CMEMSError(f"Slice {spec.slice} of case '{spec.case}' is named twice as an exemplar; name it once.")
        exemplars.append(_load(spec, index, dataset))
    shown = np.unique(np.concatenate([np.unique(exemplar.label) for exemplar in exemplars]))
    missing = [name for c, name in dataset.class_names.items() if not np.isin(_labels_of(c), shown).any()]
    if missing and not allow_missing_classes:
        what = "The exemplar lacks" if len(exemplars) == 1 else f"The {len(exemplars)} exemplars together lack"
        raise CMEMSError(
            f"{what} {_enumerate(missing)} ({', '.join(_say(e.spec) for e in exemplars)}); name a slice that shows it, add one, "
            "or set 'allow_missing_classes' to true."
        )
    return exemplars


def choose_exemplar(cases: Sequence[str], dataset: PreprocessedDataset, allow_missing_classes: bool = False) -> ExemplarSpec:
    """The slice to annotate: the first of :func:`rank_exemplars`, which explains the rule."""
    return rank_exemplars(cases, dataset, allow_missing_classes)[0]


def rank_exemplars(cases: Sequence[str], dataset: PreprocessedDataset, allow_missing_classes: bool = False) -> list[ExemplarSpec]:
    """Slices worth annotating, the most typical first, one per case.

    Every case that has slices with all classes offers the middle one of them, which avoids the ends
    of the organs. The offered slices are compared as small, blurred, normalised thumbnails of equal
    physical extent and ranked by their mean distance to all the others, so that the first is the
    one that looks most like everybody else's. Of the labels, only "which classes does this slice
    show" is used, which is what a person knows who leafs through the scans to choose one.

    The order is the same whenever the cases and images are the same. Further cases of a patient who
    is already in the list come after all other patients; cases belong to one patient when their
    names agree up to and including the first number (``patient002_frame01``, ``patient002_frame12``).

    Args:
        cases: the fold's training cases, in any order.
        dataset: the preprocessed folder.
        allow_missing_classes: when no slice shows all classes, take those that show the most.

    Raises:
        CMEMSError: no slice shows all classes (any class, with ``allow_missing_classes``); a file
            cannot be read; an image has NaN or infinite values.
    """
    offered = [_middle_one(slices) for slices in _by_case(list_candidates(cases, dataset, allow_missing_classes))]
    sizes = [_open(spec.case, "", dataset).shape[2:] for spec in offered]
    height, width = (int(np.median(side)) for side in zip(*sizes, strict=True))
    looks = []
    for spec in offered:  # one image in memory at a time
        index = preprocessed_index(spec, read_properties(spec.case, dataset), dataset)
        looks.append(_look(_read_image(spec, index, dataset), height, width))
    distances = _mean_distances(torch.stack(looks))
    order = sorted(range(len(offered)), key=lambda i: (round(distances[i], 6), offered[i].case))
    visits: dict[str, int] = {}
    turn = []
    for i in order:
        patient = _patient(offered[i].case)
        turn.append(visits.get(patient, 0))
        visits[patient] = turn[-1] + 1
    return [offered[i] for _, i in sorted(zip(turn, order, strict=True), key=lambda pair: pair[0])]


def list_candidates(cases: Sequence[str], dataset: PreprocessedDataset, allow_missing_classes: bool = False) -> list[ExemplarSpec]:
    """The slices that show all classes, sorted by case and slice.

    Presence is taken from the ``class_locations`` that nnU-Net keeps beside every preprocessed
    case; no label array is opened. nnU-Net samples these locations, so a slice with very few voxels
    of a class may be left out.

    Args:
        cases: the cases to search. Those without ``class_locations`` (unlabelled) are passed over.
        dataset: the preprocessed folder.
        allow_missing_classes: when no slice shows all classes, take those that show the most.

    Raises:
        CMEMSError: no slice shows all classes (any class, with ``allow_missing_classes``), or a
            file cannot be read.
    """
    shown: dict[tuple[str, int], set[Class]] = {}
    offsets: dict[str, int] = {}
    for case in sorted(set(cases)):
        properties = read_properties(case, dataset)
        offsets[case] = _check_slices(case, properties, dataset)[0]
        locations = {_as_class(key): rows for key, rows in properties.get("class_locations", {}).items()}
        for c in dataset.class_names:
            rows = np.asarray(locations.get(c, ()))
            for index in np.unique(rows[:, 1]) if rows.size else ():
                shown.setdefault((case, int(index)), set()).add(c)
    everything = set(dataset.class_names)
    most = max((len(classes) for classes in shown.values()), default=0)
    if most == 0:
        raise CMEMSError(
            f"None of the {len(offsets)} training cases in {dataset.folder} has a labelled class, so no exemplar can be chosen; "
            "label a slice and preprocess it."
        )
    if most < len(everything) and not allow_missing_classes:
        nowhere = [dataset.class_names[c] for c in dataset.class_names if not any(c in classes for classes in shown.values())]
        (case, index), classes = next((place, classes) for place, classes in sorted(shown.items()) if len(classes) == most)
        best = [dataset.class_names[c] for c in dataset.class_names if c not in classes]
        lack = f"no training case shows {_enumerate(nowhere)}" if nowhere else (
            f"the slice that shows the most (slice {index + offsets[case]} of case '{case}') lacks {_enumerate(best)}"
        )
        raise CMEMSError(
            f"No single slice shows all classes: {lack}; name the exemplar slice or slices yourself ('exemplar' in cmems.json), "
            "or set 'allow_missing_classes' to true."
        )
    return [
        ExemplarSpec(case=case, slice=index + offsets[case], axis=dataset.slice_axis)  # type: ignore[arg-type]
        for (case, index), classes in sorted(shown.items())
        if len(classes) == most
    ]


def preprocessed_index(spec: ExemplarSpec, properties: Mapping[str, Any], dataset: PreprocessedDataset) -> int:
    """Index along axis 1 of the preprocessed (C, Z, Y, X) array of a slice of the raw image.

    Args:
        spec: the slice, by its place in the raw image.
        properties: the case's properties, as nnU-Net saved them (:func:`read_properties`).
        dataset: the preprocessed folder.

    Raises:
        CMEMSError: the slice is cut along another axis, does not exist, or was cropped away.
    """
    if spec.axis not in (None, dataset.slice_axis):
        raise CMEMSError(
            f"The exemplar of case '{spec.case}' is a slice along the {spec.axis} axis, but this data set's 2D configuration cuts its "
            f"slices along {dataset.slice_axis}; name a slice along \"{dataset.slice_axis}\"."
        )
    first, stop = _check_slices(spec.case, properties, dataset)
    total = int(properties["shape_before_cropping"][0])
    if first <= spec.slice < stop:
        return spec.slice - first
    why = f"the image has {total}" if not 0 <= spec.slice < total else "that slice is empty and nnU-Net crops it away"
    raise CMEMSError(
        f"Case '{spec.case}' has no usable slice {spec.slice} along {dataset.slice_axis}: {why}; "
        f"choose one from {first} to {stop - 1} (counted from 0 in the raw image)."
    )


def read_properties(case: str, dataset: PreprocessedDataset) -> dict[str, Any]:
    """The properties that nnU-Net saved with a preprocessed case.

    Raises:
        CMEMSError: the file is missing, unreadable, or lacks the shapes that nnU-Net writes.
    """
    path = os.path.join(dataset.folder, case + ".pkl")
    try:
        properties = load_pickle(path)
        for key in ("bbox_used_for_cropping", "shape_before_cropping", "shape_after_cropping_and_before_resampling"):
            int(np.ravel(properties[key])[0])
    except Exception as error:  # unpickling damaged data raises nearly anything
        raise CMEMSError(f"{path} cannot be read ({_brief(error)}); {_AGAIN}.") from error
    return properties


def read_case_image(case: str, dataset: PreprocessedDataset) -> np.ndarray:
    """The whole preprocessed image of a case, float32 (C, Z, Y, X).

    Raises:
        CMEMSError: the file is missing or unreadable, or has NaN or infinite values.
    """
    image = _read(case, "", slice(None), dataset).astype(np.float32)
    _check_finite(image, f"The preprocessed image of case '{case}'")
    return image


def _load(spec: ExemplarSpec, index: int, dataset: PreprocessedDataset) -> Exemplar:
    image = _read_image(spec, index, dataset)
    label = _read(spec.case, "_seg", index, dataset)[0].astype(np.int16)
    label[label < 0] = 0
    if label.shape != image.shape[1:]:
        raise CMEMSError(
            f"Image and label of case '{spec.case}' in {dataset.folder} differ in shape, {image.shape[1:]} and {label.shape}; {_AGAIN}."
        )
    if not np.isin(label, [value for c in dataset.class_names for value in _labels_of(c)]).any():
        raise CMEMSError(
            f"Slice {spec.slice} of case '{spec.case}' has no foreground in its annotation, so nothing can be learned from it; "
            "name a slice that shows the classes (slices are counted from 0)."
        )
    return Exemplar(spec.case, dataset.slice_axis, spec.slice, index, image, label)


def _read_image(spec: ExemplarSpec, index: int, dataset: PreprocessedDataset) -> np.ndarray:
    image = _read(spec.case, "", index, dataset).astype(np.float32)
    _check_finite(image, f"Slice {spec.slice} of case '{spec.case}'")
    return image


def _read(case: str, suffix: str, index: int | slice, dataset: PreprocessedDataset) -> np.ndarray:
    """Slice(s) ``index`` along axis 1 of the image (suffix ``""``) or the label (suffix ``"_seg"``)."""
    array = _open(case, suffix, dataset)
    try:
        return np.array(array[:, index])
    except Exception as error:  # blosc2 and numpy raise nearly anything on damaged data
        raise CMEMSError(f"{_path(case, suffix, dataset)} cannot be read ({_brief(error)}); {_AGAIN}.") from error


def _open(case: str, suffix: str, dataset: PreprocessedDataset) -> Any:
    """The image (suffix ``""``) or the label (suffix ``"_seg"``) as the data set class delivers it: (C, Z, Y, X), read when indexed."""
    path = _path(case, suffix, dataset)
    slices = read_properties(case, dataset)["shape_after_cropping_and_before_resampling"][0]
    try:
        image, label, _, _ = dataset.dataset_class(dataset.folder, [case]).load_case(case)
        array = label if suffix else image
        found = array.shape[1]
    except Exception as error:  # as above
        raise CMEMSError(f"{path} or a file beside it cannot be read ({_brief(error)}); {_AGAIN}.") from error
    if found != slices:
        raise CMEMSError(
            f"{path} has {found} slices where the raw image has {slices} after cropping, so slices cannot be matched; "
            "preprocess the data set with a 2D configuration (-c 2d)."
        )
    return array


def _path(case: str, suffix: str, dataset: PreprocessedDataset) -> str:
    stem = os.path.join(dataset.folder, case)
    return next((p for p in (stem + suffix + ".b2nd", stem + suffix + ".npy") if os.path.isfile(p)), stem + ".npz")


def _check_case(case: str, cases: Sequence[str], dataset: PreprocessedDataset) -> None:
    if case in cases:
        return
    if case in dataset.dataset_class.get_identifiers(dataset.folder):
        raise CMEMSError(
            f"The exemplar's case '{case}' is not a training case of this fold (it is a validation case, or left out of the split); "
            "name a training case or train another fold."
        )
    some = ", ".join(sorted(cases)[:3])
    raise CMEMSError(f"The exemplar's case '{case}' is not in {dataset.folder}; training cases are called {some}, for example.")


def _check_slices(case: str, properties: Mapping[str, Any], dataset: PreprocessedDataset) -> tuple[int, int]:
    """First raw slice that survives the cropping, and the one after the last."""
    first, stop = (int(bound) for bound in properties["bbox_used_for_cropping"][0])
    kept = int(properties["shape_after_cropping_and_before_resampling"][0])
    if stop - first != kept:
        raise CMEMSError(f"The properties of case '{case}' in {dataset.folder} contradict each other on its slices; {_AGAIN}.")
    return first, stop


def _check_finite(image: np.ndarray, what: str) -> None:
    if not np.isfinite(image).all():
        raise CMEMSError(f"{what} has NaN or infinite values; repair the image and preprocess it again.")


def _by_case(candidates: Sequence[ExemplarSpec]) -> list[list[ExemplarSpec]]:
    groups: dict[str, list[ExemplarSpec]] = {}
    for spec in candidates:
        groups.setdefault(spec.case, []).append(spec)
    return list(groups.values())


def _middle_one(slices: Sequence[ExemplarSpec]) -> ExemplarSpec:
    return slices[(len(slices) - 1) // 2]


def _patient(case: str) -> str:
    """The name up to and including its first number."""
    match = re.match(r"\D*\d+", case)
    return match.group() if match else case


def _mean_distances(looks: torch.Tensor) -> list[float]:
    """Mean distance of each row (N, values) to all rows."""
    return torch.cdist(looks, looks, compute_mode="donot_use_mm_for_euclid_dist").mean(dim=1).tolist()


def _look(image: np.ndarray, height: int, width: int) -> torch.Tensor:
    """Blurred, normalised thumbnail of the central (height, width) voxels of an image (C, Y, X), as a float64 vector."""
    pad = [(max(size - have, 0) // 2, (max(size - have, 0) + 1) // 2) for size, have in zip((height, width), image.shape[1:], strict=True)]
    image = np.pad(image.astype(np.float64), [(0, 0), *pad], mode="edge")
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    image = image[:, top : top + height, left : left + width]
    low, high = np.percentile(image, (1, 99), axis=(1, 2), keepdims=True)
    thumbnail = functional.interpolate(torch.from_numpy(np.clip(image, low, high))[None], size=(_SIDE, _SIDE), mode="area")
    thumbnail = functional.avg_pool2d(functional.pad(thumbnail, (1, 1, 1, 1), mode="replicate"), 3, stride=1)[0]
    return _unit(thumbnail - thumbnail.mean(dim=(1, 2), keepdim=True))


def _unit(values: torch.Tensor) -> torch.Tensor:
    """Each channel of (C, ...) scaled to length 1, flattened."""
    flat = values.flatten(start_dim=1)
    return (flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-12)).flatten()


def _as_class(value: Any) -> Class:
    if isinstance(value, (tuple, list)):
        return tuple(int(v) for v in value)
    return int(value)


def _labels_of(c: Class) -> tuple[int, ...]:
    return c if isinstance(c, tuple) else (c,)


def _say(spec: ExemplarSpec) -> str:
    return f"case '{spec.case}' slice {spec.slice}"


def _enumerate(names: Sequence[str]) -> str:
    quoted = [f"'{name}'" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def _brief(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
