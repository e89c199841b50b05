"""Which unlabelled scans belong to one series, such as phases of a heartbeat: they show the same body in the same place."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from skimage.measure import block_reduce

from nnunetv2_cmems.data.exemplar import PreprocessedDataset
from nnunetv2_cmems.data.unlabelled import open_image

ALIKE = 0.4
"""Correlation of the fine details of two scans of one series. On ACDC two frames of a patient have at least 0.57 (median 0.88, 84 pairs),
scans of two patients at most 0.03 (60 pairs of one size), on HeadNeckCT 0.22 (302 pairs)."""

LARGEST = 4
"""Scans that are worked on together. A longer series is dealt out in turns, so that each part spans all of it."""

_SIDE = 128  # about so many voxels along the longer side of a slice are compared
_DETAIL = 2.0  # sigma, in these voxels, of the Gaussian whose blur is no detail
_HEIGHTS = (0.25, 0.5, 0.75)  # of the stack: the slices that are compared


def series(cases: Mapping[str, PreprocessedDataset]) -> list[list[str]]:
    """The cases, those of one series together, no more than :data:`LARGEST`; in the order of each one's first.

    Scans of one series have as many voxels along each axis, and their fine details correlate, see :data:`ALIKE`: what moves between two
    scans is a part of the body, and the rest stays where it is. No name counts.

    Args:
        cases: and the preprocessed folder of each.

    Raises:
        CMEMSError: an image is missing or unreadable.
    """
    shapes: dict[tuple[int, ...], list[str]] = {}
    for case, dataset in cases.items():
        shapes.setdefault(tuple(open_image(case, dataset).shape), []).append(case)
    found = itertools.chain.from_iterable(_of_one_size(names, cases) for names in shapes.values())
    parts = [names[start :: -(-len(names) // LARGEST)] for names in found for start in range(-(-len(names) // LARGEST))]
    order = {case: index for index, case in enumerate(cases)}
    return sorted(parts, key=lambda names: order[names[0]])


def _of_one_size(names: list[str], cases: Mapping[str, PreprocessedDataset]) -> list[list[str]]:
    if len(names) == 1:
        return [names]
    details = np.stack([_details(name, cases[name]) for name in names])
    _, numbers = connected_components(coo_array(details @ details.T > ALIKE), directed=False)
    return [[name for name, number in zip(names, numbers) if number == one] for one in dict.fromkeys(numbers.tolist())]


def _details(case: str, dataset: PreprocessedDataset) -> np.ndarray:
    """(N,) of length 1: what a blur takes away from some slices."""
    image = open_image(case, dataset)
    found = []
    for channel, height in itertools.product(range(image.shape[0]), _HEIGHTS):
        whole = np.asarray(image[channel, round(height * (image.shape[1] - 1))], dtype=np.float32)
        factor = max(1, round(max(whole.shape) / _SIDE))
        small = block_reduce(whole, (factor, factor), np.mean)
        found.append((small - ndimage.gaussian_filter(small, _DETAIL)).ravel())
    flat = np.concatenate(found)
    flat -= flat.mean()
    return flat / max(float(np.linalg.norm(flat)), 1e-6)
