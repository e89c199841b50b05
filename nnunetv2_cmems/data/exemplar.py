"""The annotated slices and volumes: found in nnU-Net's preprocessed folder, loaded, or chosen.

A user names a slice by its place in the RAW image. nnU-Net's 2D preprocessing transposes the image,
crops it to its nonzero part and resamples within slices only, so a raw slice lands on exactly one
preprocessed slice; this module does that arithmetic and says in one sentence when it cannot be done.
In 3D a slice keeps its native labels, see :mod:`nnunetv2_cmems.data.planes`.

"Raw image" is the image as the data set's nnU-Net reader delivers it. That is the file's own voxel
order, except for nnU-Net's ``...WithReorient`` readers, which turn the image to a standard
orientation first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from nnunetv2_cmems.config import ExemplarSpec
from nnunetv2_cmems.data.annotation import AXES, LabelValues, complete_plane, read_annotation
from nnunetv2_cmems.data.looks import central_window, new_patients_first, thumbnail
from nnunetv2_cmems.data.planes import annotated_slices, native_mask_path, native_plane, read_native, read_native_mask
from nnunetv2_cmems.data.suggestion import order_slices, summarise_scan
from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.method.planes import AnnotatedPlane

Class = int | tuple[int, ...]
"""A foreground class: a label, or the labels of a region in region-based training."""

_AGAIN = "run nnUNetv2_preprocess again"


@dataclass(frozen=True)
class PreprocessedDataset:
    """What has to be known about a folder of preprocessed cases.

    Attributes:
        folder: the configuration's preprocessed folder.
        dataset_class: the nnU-Net data set class that reads it (``infer_dataset_class(folder)``).
        transpose_forward: the plans' transposition of the raw (z, y, x) array.
        class_names: the foreground classes and how the user calls them.
        labels: the values that a mask may have.
        file_ending: of the raw masks.
        reader: makes nnU-Net's reader of the raw masks.
        dimensions: 2 or 3, of the configuration.
    """

    folder: str
    dataset_class: type[nnUNetBaseDataset]
    transpose_forward: tuple[int, ...]
    class_names: Mapping[Class, str]
    labels: LabelValues = LabelValues({}, None)
    file_ending: str = ".nii.gz"
    reader: Any = None
    dimensions: int = 2

    @classmethod
    def from_plans(
        cls,
        folder: str,
        dataset_class: type[nnUNetBaseDataset],
        plans_manager: PlansManager,
        dataset_json: dict[str, Any],
        dimensions: int = 2,
    ) -> PreprocessedDataset:
        """The data set as nnU-Net's plans and ``dataset.json`` describe it."""
        manager = plans_manager.get_label_manager(dataset_json)
        foreground = {_as_class(c) for c in (manager.foreground_regions if manager.has_regions else manager.foreground_labels)}
        names = {_as_class(value): name for name, value in dataset_json["labels"].items()}
        if not manager.has_regions:  # nnU-Net takes [1] for 1
            names = {c[0] if isinstance(c, tuple) else c: name for c, name in names.items()}
        return cls(
            folder=folder,
            dataset_class=dataset_class,
            transpose_forward=tuple(int(axis) for axis in plans_manager.transpose_forward),
            class_names={c: name for c, name in names.items() if c in foreground},
            labels=LabelValues.of(dataset_json),
            file_ending=dataset_json.get("file_ending", ".nii.gz"),
            reader=plans_manager.image_reader_writer_class,
            dimensions=dimensions,
        )

    @property
    def slice_axis(self) -> str:
        """The raw image's axis (``"x"``, ``"y"`` or ``"z"``) that 2D slices are counted along."""
        return AXES[self.transpose_forward[0]]


@dataclass(frozen=True)
class Exemplar:
    """One annotated slice or volume, preprocessed.

    Attributes:
        case: the case identifier.
        axis: the raw image's voxel axis (``"x"``, ``"y"``, ``"z"``) that ``slice`` is an index of;
            x is the first axis of a NIfTI file, z the last. None for a volume.
        slice: zero-based index in the RAW image along ``axis``; None for a volume.
        index: index along axis 1 of the preprocessed array (C, Z, Y, X); None in 3D.
        image: float32, preprocessed: (C, Y, X), the whole slice; in 3D (C, Z, Y, X), the whole volume.
        label: int16 (Y, X); in 3D (Z, Y, X). nnU-Net's -1, "outside of the nonzero mask", is turned into 0;
            -1 is what is not annotated. For a slice of a volume the slice's native labels.
        plane: in 3D, where only a slice is annotated, where it lies.
    """

    case: str
    axis: str | None
    slice: int | None
    index: int | None
    image: np.ndarray
    label: np.ndarray
    plane: AnnotatedPlane | None = None

    @property
    def spec(self) -> ExemplarSpec:
        """The slice as a user would name it."""
        return ExemplarSpec(case=self.case, slice=self.slice, axis=self.axis)  # type: ignore[arg-type]

    @cached_property
    def picture(self) -> tuple[np.ndarray, np.ndarray]:
        """A slice to look at: the first channel and the labels, both (Y, X); of a volume the slice with the largest organs."""
        if self.image.ndim == 3:
            return self.image[0], self.label
        if self.plane is None:
            z = int((self.label > 0).sum(axis=(1, 2)).argmax())
            return self.image[0, z], self.label[z]
        image = self.image[0].take(min(max(round(self.plane.position), 0), self.image.shape[self.plane.axis + 1] - 1), self.plane.axis)
        rows, columns = (
            np.clip(((np.arange(n) + 0.5) / scale - 0.5).round().astype(int), 0, size - 1)
            for n, scale, size in zip(image.shape, self.plane.scale, self.label.shape, strict=True)
        )
        return image, self.label[np.ix_(rows, columns)]


def load_exemplars(
    specs: Sequence[ExemplarSpec], cases: Sequence[str], dataset: PreprocessedDataset, allow_missing_classes: bool = False
) -> list[Exemplar]:
    """Load the annotated slices or volumes that the user named.

    Args:
        specs: the slices, by their place in the raw images; where one names only a case, all that is annotated of it.
        cases: the fold's training cases. Only these may be exemplars.
        dataset: the preprocessed folder.
        allow_missing_classes: go on when the slices together lack a class.

    Returns:
        One exemplar per slice or volume, in the same order.

    Raises:
        CMEMSError: a case is not preprocessed or not a training case; a slice is cut along another
            axis, does not exist, was cropped away, is named twice or has no foreground; an image
            has NaN or infinite values; a file cannot be read; together they lack a class.
    """
    if not specs:
        raise CMEMSError("No exemplar is named; name at least one annotated slice, or set 'exemplar' to \"auto\".")
    exemplars: list[Exemplar] = []
    volumes: dict[str, _Volume] = {}
    for spec in specs:
        _check_case(spec.case, cases, dataset)
        for exemplar in _load_volume(spec, volumes, dataset) if dataset.dimensions == 3 else _load_slices(spec, dataset):
            if any((e.case, e.axis, e.slice) == (exemplar.case, exemplar.axis, exemplar.slice) for e in exemplars):
                raise CMEMSError(f"{_say(exemplar.spec).capitalize()} is named twice as an exemplar; name it once.")
            exemplars.append(exemplar)
    shown = np.unique(np.concatenate([np.unique(exemplar.label) for exemplar in exemplars]))
    missing = [name for c, name in dataset.class_names.items() if not np.isin(_labels_of(c), shown).any()]
    if missing and not allow_missing_classes:
        what = "The exemplar lacks" if len(exemplars) == 1 else f"The {len(exemplars)} exemplars together lack"
        some = ", ".join(_say(e.spec) for e in exemplars[:5]) + (" and others" if len(exemplars) > 5 else "")
        raise CMEMSError(
            f"{what} {_enumerate(missing)} ({some}); name a slice that shows it, add one, "
            "or set 'allow_missing_classes' to true."
        )
    return exemplars


def list_annotated(cases: Sequence[str], dataset: PreprocessedDataset) -> list[ExemplarSpec]:
    """Everything that is annotated in some cases: wholly annotated cases as such, and slices of the others; sorted.

    Raises:
        CMEMSError: a mask cannot be read or has nothing to learn from, or slices were painted along another
            axis than a 2D configuration cuts along.
    """
    specs: list[ExemplarSpec] = []
    for case in sorted(set(cases)):
        planes = read_native(case, dataset)[1].planes
        if planes is None:
            specs.append(ExemplarSpec(case))
        elif dataset.dimensions == 3:
            specs += [ExemplarSpec(case, i, AXES[axis]) for axis, i in planes]  # type: ignore[arg-type]
        else:
            specs += _slices_of(case, dataset)
    return specs


def choose_exemplar(cases: Sequence[str], dataset: PreprocessedDataset, allow_missing_classes: bool = False) -> ExemplarSpec:
    """The slice (in 3D: the volume) to annotate: the first of :func:`rank_exemplars`, which explains the rule."""
    return rank_exemplars(cases, dataset, allow_missing_classes)[0]


def rank_exemplars(cases: Sequence[str], dataset: PreprocessedDataset, allow_missing_classes: bool = False) -> list[ExemplarSpec]:
    """Slices (in 3D: volumes) worth annotating, the best first, one per case.

    Slices come in the order in which ``suggest`` names them, see :mod:`nnunetv2_cmems.data.suggestion`. All images of
    ``cases`` count for what is typical; candidates are the slices that show all classes. Of the labels, only "which classes
    does this slice show" is used, which is what a person knows who leafs through the scans to choose one. A case whose
    candidates all lie at the ends of its scan offers the middle one of them, after all other cases.

    Volumes are compared by their middle slices, as small, blurred, normalised thumbnails of equal physical extent: the first
    is the one that looks most like all others.

    The order is the same whenever the cases and images are the same. Further cases of a patient who
    is already in the list come after all other patients; cases belong to one patient when their
    names agree up to and including the first number (``patient002_frame01``, ``patient002_frame12``), see
    :func:`~nnunetv2_cmems.data.looks.patients_of`.

    Args:
        cases: the fold's training cases, in any order.
        dataset: the preprocessed folder.
        allow_missing_classes: when no slice shows all classes, take those that show the most.

    Raises:
        CMEMSError: no slice shows all classes (any class, with ``allow_missing_classes``); a file
            cannot be read; an image has NaN or infinite values.
    """
    candidates = list_candidates(cases, dataset, allow_missing_classes)
    ranked = _rank_slices(cases, candidates, dataset) if dataset.dimensions == 2 else _rank_volumes(candidates, dataset)
    return new_patients_first(ranked, lambda spec: spec.case)


def _rank_slices(cases: Sequence[str], candidates: Sequence[ExemplarSpec], dataset: PreprocessedDataset) -> list[ExemplarSpec]:
    """One slice of each case that has candidates, the best first."""
    names = sorted(set(cases))
    _, *extent = np.median([_open(case, "", dataset).shape[1:] for case in names], axis=0).tolist()
    summaries = (summarise_scan(case, read_case_image(case, dataset), 0, (1, 1), extent) for case in names)
    shown = tqdm(summaries, desc="Looking for an exemplar", total=len(names), disable=None)
    places = {(spec.case, preprocessed_index(spec, read_properties(spec.case, dataset), dataset)): spec for spec in candidates}
    best: dict[str, ExemplarSpec] = {}
    for suggested in order_slices(shown, 0):
        if (suggested.case, suggested.slice) in places:
            best.setdefault(suggested.case, places[suggested.case, suggested.slice])
    for slices in _by_case(candidates):
        best.setdefault(slices[0].case, _middle_one(slices))
    return list(best.values())


def _rank_volumes(candidates: Sequence[ExemplarSpec], dataset: PreprocessedDataset) -> list[ExemplarSpec]:
    sizes = [_open(spec.case, "", dataset).shape[1:] for spec in candidates]
    _, height, width = (int(np.median(side)) for side in zip(*sizes, strict=True))
    looks = []
    for spec, (slices, *_) in zip(candidates, sizes, strict=True):  # one image in memory at a time
        looks.append(_look(_read_image(spec, slices // 2, dataset), height, width))
    distances = _mean_distances(torch.stack(looks))
    order = sorted(range(len(candidates)), key=lambda i: (round(distances[i], 6), candidates[i].case))
    return [candidates[i] for i in order]


def list_candidates(cases: Sequence[str], dataset: PreprocessedDataset, allow_missing_classes: bool = False) -> list[ExemplarSpec]:
    """The slices (in 3D: the volumes) that show all classes, sorted by case and slice.

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
        offsets[case] = _check_slices(case, properties, dataset)[0] if dataset.dimensions == 2 else 0
        locations = {_as_class(key): rows for key, rows in properties.get("class_locations", {}).items()}
        for c in dataset.class_names:
            rows = np.asarray(locations.get(c, ()))
            for index in (np.unique(rows[:, 1]) if dataset.dimensions == 2 else [0]) if rows.size else ():
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
            if dataset.dimensions == 2
            else f"the case that shows the most ('{case}') lacks {_enumerate(best)}"
        )
        one, them = ("slice", "slice or slices") if dataset.dimensions == 2 else ("volume", "volumes")
        raise CMEMSError(
            f"No single {one} shows all classes: {lack}; name the exemplar {them} yourself ('exemplar' in cmems.json), "
            "or set 'allow_missing_classes' to true."
        )
    best_places = [place for place, classes in sorted(shown.items()) if len(classes) == most]
    if dataset.dimensions == 3:
        return [ExemplarSpec(case) for case, _ in best_places]
    return [
        ExemplarSpec(case=case, slice=index + offsets[case], axis=dataset.slice_axis)  # type: ignore[arg-type]
        for case, index in best_places
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
    assert spec.slice is not None
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


def load_volume(case: str, dataset: PreprocessedDataset) -> tuple[np.ndarray, np.ndarray]:
    """The whole preprocessed image of a case, float32 (C, Z, Y, X), and its label, int16 (Z, Y, X), -1 where it is not annotated.

    Raises:
        CMEMSError: a file is missing or unreadable, the image has NaN or infinite values, or the two differ in shape.
    """
    image, label = read_case_image(case, dataset), _read_label(case, slice(None), dataset)
    _check_shapes(ExemplarSpec(case), image, label, dataset)
    return image, _without_ignore(label, dataset)


def _slices_of(case: str, dataset: PreprocessedDataset) -> list[ExemplarSpec]:
    """The annotated slices of a case that survive nnU-Net's cropping."""
    first, stop = _check_slices(case, read_properties(case, dataset), dataset)
    slices = [i for i in annotated_slices(case, dataset) if first <= i < stop]
    return [ExemplarSpec(case, i, dataset.slice_axis) for i in slices]  # type: ignore[arg-type]


def _load_slices(spec: ExemplarSpec, dataset: PreprocessedDataset) -> list[Exemplar]:
    if spec.slice is None:
        return [_load_slice(one, dataset) for one in _slices_of(spec.case, dataset)]
    exemplar = _load_slice(spec, dataset)
    _check_foreground(spec, exemplar.label, dataset)
    return [exemplar]


def _load_slice(spec: ExemplarSpec, dataset: PreprocessedDataset) -> Exemplar:
    index = preprocessed_index(spec, read_properties(spec.case, dataset), dataset)
    image = _read_image(spec, index, dataset)
    label = _read_label(spec.case, index, dataset)
    if dataset.labels.ignore is not None:
        label = complete_plane(label, dataset.labels.ignore)
    _check_shapes(spec, image, label, dataset)
    return Exemplar(spec.case, dataset.slice_axis, spec.slice, index, image, _without_ignore(label, dataset))


class _Volume(NamedTuple):
    """What the exemplars of one case in 3D share: the preprocessed image (C, Z, Y, X) and the native mask (Z, Y, X)."""

    image: np.ndarray
    mask: np.ndarray


def _load_volume(spec: ExemplarSpec, volumes: dict[str, _Volume], dataset: PreprocessedDataset) -> list[Exemplar]:
    if spec.case not in volumes:
        volumes[spec.case] = _Volume(read_case_image(spec.case, dataset), read_native_mask(spec.case, dataset))
    image, mask = volumes[spec.case]
    if spec.slice is None:
        planes = read_annotation(mask, dataset.labels, native_mask_path(spec.case, dataset)).planes
        if planes is None:
            label = _read_label(spec.case, slice(None), dataset)
            _check_shapes(spec, image, label, dataset)
            _check_foreground(spec, label, dataset)
            _check_thickness(spec, mask, dataset)
            return [Exemplar(spec.case, None, None, None, image, _without_ignore(label, dataset))]
    else:
        axis = AXES.index(spec.axis) if spec.axis is not None else dataset.transpose_forward[0]
        planes = ((axis, spec.slice),)
    properties = read_properties(spec.case, dataset)
    exemplars = []
    for axis, i in planes:
        plane = native_plane(spec.case, axis, i, mask, properties, image.shape[1:], dataset)
        exemplar = Exemplar(spec.case, AXES[axis], i, None, image, plane.labels.numpy(), plane)
        _check_foreground(exemplar.spec, exemplar.label, dataset)
        exemplars.append(exemplar)
    return exemplars


def _check_thickness(spec: ExemplarSpec, mask: np.ndarray, dataset: PreprocessedDataset) -> None:
    """Refuse a volume whose organs fill a single slice, or several of which none lies beside another: most likely only these were painted,
    the others being 0 unasked."""
    shown = (mask > 0) & (mask != dataset.labels.not_annotated)
    for axis, name in enumerate(AXES):
        others = tuple(a for a in range(3) if a != axis)
        slices = np.flatnonzero(shown.any(axis=others))
        if 0 < len(slices) < mask.shape[axis] and (np.diff(slices) > 1).all():
            which = "one slice" if len(slices) == 1 else "single slices"
            raise CMEMSError(
                f"{native_mask_path(spec.case, dataset)} shows organs on {which} only ({', '.join(map(str, slices))} along {name}), so its "
                f"other slices are hardly annotated; fill them with {dataset.labels.not_annotated} and name that value in dataset.json "
                f'("ignore"), or name each as exemplar ({{"case": "{spec.case}", "slice": {slices[0]}, "axis": "{name}"}}).'
            )


def _read_label(case: str, index: int | slice, dataset: PreprocessedDataset) -> np.ndarray:
    label = _read(case, "_seg", index, dataset)[0].astype(np.int16)
    label[label < 0] = 0
    return label


def _without_ignore(label: np.ndarray, dataset: PreprocessedDataset) -> np.ndarray:
    return label if dataset.labels.ignore is None else np.where(label == dataset.labels.ignore, np.int16(-1), label)


def _check_shapes(spec: ExemplarSpec, image: np.ndarray, label: np.ndarray, dataset: PreprocessedDataset) -> None:
    if label.shape != image.shape[1:]:
        raise CMEMSError(
            f"Image and label of case '{spec.case}' in {dataset.folder} differ in shape, {image.shape[1:]} and {label.shape}; {_AGAIN}."
        )


def _check_foreground(spec: ExemplarSpec, label: np.ndarray, dataset: PreprocessedDataset) -> None:
    if not np.isin(label, [value for c in dataset.class_names for value in _labels_of(c)]).any():
        what, place = (f"Slice {spec.slice} of case", "a slice") if spec.slice is not None else ("Case", "a case")
        raise CMEMSError(
            f"{what} '{spec.case}' has no foreground in its annotation, so nothing can be learned from it; "
            f"name {place} that shows the classes (slices are counted from 0)."
        )


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
    if found != slices and dataset.dimensions == 2:
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


def _mean_distances(looks: torch.Tensor) -> list[float]:
    """Mean distance of each row (N, values) to all rows."""
    return torch.cdist(looks, looks, compute_mode="donot_use_mm_for_euclid_dist").mean(dim=1).tolist()


def _look(image: np.ndarray, height: int, width: int) -> torch.Tensor:
    """Blurred, normalised thumbnail of the central (height, width) voxels of an image (C, Y, X), as a float64 vector."""
    image = central_window(image.astype(np.float64), (height, width))
    low, high = np.percentile(image, (1, 99), axis=(1, 2), keepdims=True)
    small = thumbnail(np.clip(image, low, high))
    return _unit(small - small.mean(dim=(1, 2), keepdim=True))


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
    return f"case '{spec.case}'" if spec.slice is None else f"slice {spec.slice} of case '{spec.case}'"


def _enumerate(names: Sequence[str]) -> str:
    quoted = [f"'{name}'" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def _brief(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
