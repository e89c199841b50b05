"""Annotated slices in native space: which there are, and where they lie in the preprocessed volume.

nnU-Net's resampling in 3D can delete a single annotated slice or smear it over several. So a slice of a
3D exemplar is never resampled: its labels are read from the native mask that nnU-Net keeps in
``gt_segmentations``, and looked up from there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nnunetv2_cmems.data.annotation import AXES, Annotation, complete_plane, read_annotation
from nnunetv2_cmems.data.raw import check_header
from nnunetv2_cmems.errors import CMEMSError, first_line
from nnunetv2_cmems.method.planes import AnnotatedPlane

if TYPE_CHECKING:
    from nnunetv2_cmems.data.exemplar import PreprocessedDataset


def native_mask_path(case: str, dataset: PreprocessedDataset) -> str:
    """The file with a case's mask as it was annotated."""
    return os.path.join(os.path.dirname(os.path.abspath(dataset.folder)), "gt_segmentations", case + dataset.file_ending)


def read_native_mask(case: str, dataset: PreprocessedDataset) -> np.ndarray:
    """A case's mask as it was annotated, (Z, Y, X) as nnU-Net's reader delivers it.

    Raises:
        CMEMSError: the file is missing or unreadable.
    """
    path = native_mask_path(case, dataset)
    if not os.path.isfile(path):
        raise CMEMSError(f"{path} does not exist; run nnUNetv2_cmems plan_and_preprocess again.")
    try:
        check_header(path)
        return np.asarray(dataset.reader().read_seg(path)[0][0])
    except Exception as error:  # the readers raise nearly anything on damaged files
        raise CMEMSError(f"{path} cannot be read ({first_line(error)}); put the mask back and preprocess the data set again.") from error


def read_native(case: str, dataset: PreprocessedDataset) -> tuple[np.ndarray, Annotation]:
    """A case's native mask (Z, Y, X), and what of it is annotated.

    Raises:
        CMEMSError: see :func:`read_native_mask` and :func:`~nnunetv2_cmems.data.annotation.read_annotation`.
    """
    mask = read_native_mask(case, dataset)
    return mask, read_annotation(mask, dataset.labels, native_mask_path(case, dataset))


FEWEST_OF_A_VOLUME = 5
"""So many neighbouring slices with organs, and a mask without a "not annotated" voxel, are taken for a wholly annotated volume."""


def annotated_slices(case: str, dataset: PreprocessedDataset) -> list[int]:
    """The raw indices, along the 2D configuration's slice axis, of the slices that are annotated.

    In a mask without a "not annotated" voxel, slices without an organ may be background or just not painted. They count as
    background where the slices that show organs are an unbroken row of at least :data:`FEWEST_OF_A_VOLUME`, which somebody who
    paints single slices does not leave behind: as many as there are slices with organs, evenly spread.

    Raises:
        CMEMSError: the slices were painted along another axis than the configuration cuts along.
    """
    mask, annotation = read_native(case, dataset)
    axis = dataset.transpose_forward[0]
    if annotation.planes is None:
        others = tuple(a for a in range(3) if a != axis)
        shown = ((mask > 0) & (mask != dataset.labels.not_annotated)).any(axis=others)
        organs = np.flatnonzero(shown)
        if len(organs) < FEWEST_OF_A_VOLUME or organs[-1] - organs[0] + 1 > len(organs):
            return organs.tolist()
        empty = np.flatnonzero(~shown)
        picked = empty[np.linspace(0, len(empty) - 1, min(len(empty), len(organs))).round().astype(int)] if len(empty) else empty
        return sorted([*organs.tolist(), *picked.tolist()])
    along = [i for a, i in annotation.planes if a == axis]
    if len(along) < len(annotation.planes):
        painted = " and ".join(sorted({AXES[a] for a in annotation.axes}))
        raise CMEMSError(
            f"{native_mask_path(case, dataset)} is annotated along {painted}, but this data set's 2D configuration cuts its slices along "
            f"{AXES[axis]}; run nnUNetv2_cmems plan_and_preprocess, which cuts along the painted axis, or train 3d_fullres."
        )
    return along


def native_plane(
    case: str,
    axis: int,
    index: int,
    mask: np.ndarray,
    properties: Mapping[str, Any],
    shape: tuple[int, ...],
    dataset: PreprocessedDataset,
) -> AnnotatedPlane:
    """The labels of one annotated slice, and where it lies in the preprocessed volume.

    Args:
        case: the case identifier.
        axis: axis of the raw array (Z, Y, X).
        index: raw index along it.
        mask: the case's native mask (Z, Y, X).
        properties: the case's properties, as nnU-Net saved them.
        shape: (Z, Y, X) of the preprocessed image.
        dataset: the preprocessed folder.

    Raises:
        CMEMSError: there is no such slice, or nnU-Net's cropping cut it away.
    """
    if not 0 <= index < mask.shape[axis]:
        raise CMEMSError(f"Case '{case}' has no slice {index} along {AXES[axis]}: the image has {mask.shape[axis]} (counted from 0).")
    mask = mask.transpose(dataset.transpose_forward)
    axis = dataset.transpose_forward.index(axis)
    box = [tuple(int(n) for n in bounds) for bounds in properties["bbox_used_for_cropping"]]
    first, stop = box[axis]
    if not first <= index < stop:
        raise CMEMSError(
            f"Slice {index} of case '{case}' is empty in the scan and nnU-Net crops it away; choose one from {first} to {stop - 1}."
        )
    others = [a for a in range(3) if a != axis]
    labels = mask.take(index, axis)[tuple(slice(*box[a]) for a in others)]
    labels = complete_plane(labels, dataset.labels.not_annotated).astype(np.int16)
    labels[labels == dataset.labels.not_annotated] = -1
    scale = [shape[a] / (box[a][1] - box[a][0]) for a in range(3)]
    return AnnotatedPlane(axis, (index - first + 0.5) * scale[axis] - 0.5, torch.from_numpy(labels), (scale[others[0]], scale[others[1]]))
