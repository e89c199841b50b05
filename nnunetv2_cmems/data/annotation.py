"""What of a mask is annotated: a whole volume, or planes of it along any axis.

Everything here is about masks in native space, as nnU-Net's readers deliver them: integer arrays
(Z, Y, X). "Not annotated" is nnU-Net's ignore label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunetv2_cmems.errors import CMEMSError

AXES = "zyx"
"""Names of the array's axes: x is the first axis of a NIfTI file, z the last."""

ERASED = 0.5
"""Background in a painted plane, as a share of its organs, below which it is what a rubber has left: programs erase with 0."""


@dataclass(frozen=True)
class LabelValues:
    """The values that a mask may have.

    Attributes:
        names: the name of each value, background included; a value of several regions goes by the smallest one's.
        ignore: the value that means "not annotated", or None where ``dataset.json`` names none.
    """

    names: Mapping[int, str]
    ignore: int | None

    @classmethod
    def of(cls, dataset_json: Mapping[str, Any]) -> LabelValues:
        """As ``dataset.json`` names them."""
        names: dict[int, str] = {}
        ignore = None
        by_size = sorted(dataset_json["labels"].items(), key=lambda item: len(item[1]) if isinstance(item[1], (list, tuple)) else 1)
        for name, values in by_size:  # the smallest region names a value
            if name == "ignore":
                ignore = int(values)
                continue
            for value in values if isinstance(values, (list, tuple)) else [values]:
                names.setdefault(int(value), name)
        return cls(names, ignore)

    @property
    def not_annotated(self) -> int:
        """The ignore label, or what nnU-Net would demand as one: the highest value plus 1."""
        return self.ignore if self.ignore is not None else max(self.names) + 1


@dataclass(frozen=True)
class Annotation:
    """What of a mask is annotated.

    Attributes:
        planes: the annotated planes that show an organ, as (axis of the array, index), sorted; None for a
            volume that is annotated as a whole (single voxels of it may still be "not annotated").
        classes: the foreground values that it shows.
        partial: those of the planes of which a part is not annotated, beside explicit background.
    """

    planes: tuple[tuple[int, int], ...] | None
    classes: frozenset[int]
    partial: tuple[tuple[int, int], ...] = ()

    @property
    def axes(self) -> frozenset[int]:
        """The axes of the array along which planes are annotated."""
        return frozenset(axis for axis, _ in self.planes or ())


def read_annotation(mask: np.ndarray, values: LabelValues, path: str) -> Annotation:
    """Find out what of a mask is annotated.

    Without a "not annotated" voxel the whole volume is; also where more than half of it is, with something
    of every plane along every axis. Else the mask is read as planes: the axis is the one along which the
    fewest planes hold anything annotated; where whole planes are annotated, also along different axes,
    these are taken.

    Args:
        mask: (Z, Y, X), as the reader delivers it.
        values: what ``dataset.json`` names.
        path: the mask's file, for the error's sentence.

    Raises:
        CMEMSError: a value that ``dataset.json`` does not name, no organ at all, or nothing annotated.
    """
    found = np.unique(mask)
    _check_values(found, values, path)
    annotated = mask != values.not_annotated
    if not annotated.any():
        raise CMEMSError(
            f"{path} is wholly 'not annotated' (value {values.not_annotated}); paint a slice of it, or take it out of labelsTr."
        )
    classes = frozenset(int(v) for v in found if v > 0 and v != values.not_annotated)
    if not classes:
        raise CMEMSError(f"{path} is empty, it shows no organ; paint a slice of it, or take it out of labelsTr.")
    occupied = [_occupied(annotated, axis) for axis in range(3)]
    if annotated.all() or (annotated.mean() > 0.5 and all(len(o) == n for o, n in zip(occupied, mask.shape, strict=True) if n > 1)):
        return Annotation(None, classes)
    flat = [(axis, 0) for axis, n in enumerate(mask.shape) if n == 1]
    planes = flat[:1] or _whole_planes(annotated)  # the lines of a single image are no planes
    if planes is None:
        axis = min(range(3), key=lambda a: (len(occupied[a]), a))
        planes = [(axis, i) for i in occupied[axis]]
    organs = annotated & (mask != 0)
    shown = tuple(sorted((a, i) for a, i in planes if organs.take(i, a).any()))
    partial = tuple((a, i) for a, i in shown if (complete_plane(mask.take(i, a), values.not_annotated) == values.not_annotated).any())
    return Annotation(shown, classes, partial)


def complete_plane(labels: np.ndarray, not_annotated: int) -> np.ndarray:
    """Labels of one painted plane; where only organs were painted, the rest of the plane is background.

    Whoever paints into an empty template leaves everything but the organs "not annotated", and has erased
    here and there, see :data:`ERASED`. A plane with more explicit background than that is annotated in part
    on purpose, as by scribbles, and left as it is.

    Shape:
        (P, Q) to (P, Q), a new array where something changes.
    """
    unknown, background = labels == not_annotated, labels == 0
    organs = labels.size - np.count_nonzero(unknown) - np.count_nonzero(background)
    if not organs or np.count_nonzero(background) >= ERASED * organs or not unknown.any():
        return labels
    return np.where(labels == not_annotated, 0, labels).astype(labels.dtype)


def _check_values(found: np.ndarray, values: LabelValues, path: str) -> None:
    unknown = [v for v in found.tolist() if v not in values.names and v != values.ignore]
    if not unknown:
        return
    known = ", ".join(f"{v} ({name})" for v, name in sorted(values.names.items()))
    if unknown == [values.not_annotated]:
        value = values.not_annotated
        raise CMEMSError(
            f'{path} has the value {value}, which dataset.json does not name; if it means "not annotated", add "ignore": {value} '
            "to the labels of dataset.json."
        )
    some = ", ".join(f"{v:g}" for v in unknown[:5])
    raise CMEMSError(
        f"{path} has the value{'s' if len(unknown) > 1 else ''} {some}, which dataset.json does not name "
        f"(it names {known}); correct the mask, or name the value in dataset.json."
    )


def _occupied(annotated: np.ndarray, axis: int) -> Sequence[int]:
    others = tuple(a for a in range(3) if a != axis)
    return np.flatnonzero(annotated.any(axis=others)).tolist()


def _whole_planes(annotated: np.ndarray) -> list[tuple[int, int]] | None:
    """The wholly annotated planes along all axes, if together they are all that is annotated; else None."""
    covered = np.zeros_like(annotated)
    planes = []
    for axis in range(3):
        if annotated.shape[axis] == 1:
            continue
        others = tuple(a for a in range(3) if a != axis)
        for i in np.flatnonzero(annotated.all(axis=others)).tolist():
            planes.append((axis, i))
            covered[(slice(None),) * axis + (i,)] = True
    return planes if (covered == annotated).all() else None
