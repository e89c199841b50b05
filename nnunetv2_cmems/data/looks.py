"""How slices look, as far as comparing them needs it, and whose turn it is when slices of many scans are ranked."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

SIDE = 32
"""Side of the thumbnails that slices are compared by."""

Item = TypeVar("Item")


def central_window(plane: np.ndarray, window: Sequence[int]) -> np.ndarray:
    """The central ``window`` (height, width) of a plane (C, Y, X); where the plane is smaller, its border is repeated."""
    pad = [(max(size - have, 0) // 2, (max(size - have, 0) + 1) // 2) for size, have in zip(window, plane.shape[1:], strict=True)]
    plane = np.pad(plane, [(0, 0), *pad], mode="edge")
    top, left = ((have - size) // 2 for size, have in zip(window, plane.shape[1:], strict=True))
    return plane[:, top : top + window[0], left : left + window[1]]


def thumbnail(plane: np.ndarray) -> Tensor:
    """A plane (C, Y, X), small and blurred: (C, 32, 32), of the plane's floating-point type."""
    small = functional.interpolate(torch.from_numpy(np.ascontiguousarray(plane))[None], size=(SIDE, SIDE), mode="area")
    return functional.avg_pool2d(functional.pad(small, (1, 1, 1, 1), mode="replicate"), 3, stride=1)[0]


def patients_of(cases: Iterable[str]) -> dict[str, str]:
    """The patient of each case, by the names alone: scans belong to one patient whose names agree up to and including the first number.

    What all names begin with counts for none, so that ``BraTS2021_00002`` and ``BraTS2021_00003`` are two.
    """
    cases = list(cases)
    common = re.sub(r"\d+$", "", os.path.commonprefix(cases))  # no number is cut in two
    matches = {case: re.match(r"\D*\d+", case[len(common) :]) for case in cases}
    return {case: common + match.group() if match else case for case, match in matches.items()}


def new_patients_first(ranked: Iterable[Item], case_of: Callable[[Item], str], served: Iterable[str] = ()) -> list[Item]:
    """The same items; further ones of a patient come after all other patients. The order of equals is kept.

    Args:
        ranked: the best first.
        case_of: the case of an item.
        served: cases whose patients have had a turn already.
    """
    ranked, served = list(ranked), list(served)
    patients = patients_of([*served, *map(case_of, ranked)])
    visits: dict[str, int] = {}

    def turn(case: str) -> int:
        patient = patients[case]
        visits[patient] = visits.get(patient, -1) + 1
        return visits[patient]

    for case in served:
        turn(case)
    return [item for _, item in sorted([(turn(case_of(item)), item) for item in ranked], key=lambda pair: pair[0])]
