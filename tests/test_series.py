"""Which scans show the same body in the same place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetNumpy
from scipy import ndimage

from nnunetv2_cmems.data.exemplar import PreprocessedDataset
from nnunetv2_cmems.data.series import LARGEST, series
from nnunetv2_cmems.errors import CMEMSError

SHAPE = (1, 5, 60, 70)


def body(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Tissue with details about two voxels wide."""
    return 3 * ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), (0, 0, 1, 1)).astype(np.float32)


def phase(scan: np.ndarray, radius: float, seed: int) -> np.ndarray:
    """The same body with a ball in its middle that fills and empties, noise, and another gain."""
    y, x = np.indices(scan.shape[-2:])
    inside = (y - scan.shape[-2] / 2) ** 2 + (x - scan.shape[-1] / 2) ** 2 < radius**2
    return 1.3 * np.where(inside, 2.0, scan) + 0.1 * np.random.default_rng(seed).standard_normal(scan.shape)


@pytest.fixture
def cases(tmp_path: Path) -> dict[str, PreprocessedDataset]:
    """Nothing yet; :func:`write` adds scans."""
    write.folder = tmp_path  # type: ignore[attr-defined]
    return {}


def write(cases: dict[str, PreprocessedDataset], name: str, scan: np.ndarray) -> None:
    folder: Path = write.folder  # type: ignore[attr-defined]
    np.save(folder / f"{name}.npy", scan.astype(np.float32))
    cases[name] = PreprocessedDataset(str(folder), nnUNetDatasetNumpy, (0, 1, 2), {1: "wall"})


def test_scans_of_one_body_are_found_whatever_their_names(cases: dict[str, PreprocessedDataset]) -> None:
    one, other = body(0), body(1)
    for name, scan, radius in (("c", one, 18), ("a", other, 12), ("x", one, 8), ("b", other, 20), ("d", body(2), 12)):
        write(cases, name, phase(scan, radius, len(cases)))
    assert series(cases) == [["c", "x"], ["a", "b"], ["d"]]


def test_scans_of_another_size_are_no_series(cases: dict[str, PreprocessedDataset]) -> None:
    write(cases, "a", body(0))
    write(cases, "b", body(0)[:, :4])
    assert series(cases) == [["a"], ["b"]]


def test_what_is_alike_from_afar_only_is_no_series(cases: dict[str, PreprocessedDataset]) -> None:
    """Two patients lie in a scanner alike."""
    y, x = np.indices(SHAPE[-2:])
    torso = 10.0 * (((y - 30) / 25) ** 2 + ((x - 35) / 30) ** 2 < 1)
    for name, blur in (("a", 3.0), ("b", 3.0)):
        write(cases, name, ndimage.gaussian_filter(torso, blur) + body(len(cases)))
    a, b = (np.load(f"{cases['a'].folder}/{name}.npy").ravel() for name in cases)
    assert np.corrcoef(a, b)[0, 1] > 0.9
    assert series(cases) == [["a"], ["b"]]


def test_a_long_series_is_dealt_out_in_turns(cases: dict[str, PreprocessedDataset]) -> None:
    for index in range(LARGEST + 1):
        write(cases, f"phase{index}", phase(body(0), 8 + index, index))
    assert series(cases) == [["phase0", "phase2", "phase4"], ["phase1", "phase3"]]


def test_scans_of_nothing_are_no_series(cases: dict[str, PreprocessedDataset]) -> None:
    for name in "ab":
        write(cases, name, np.full(SHAPE, 2.0))
    assert series(cases) == [["a"], ["b"]]


def test_large_slices_and_channels(cases: dict[str, PreprocessedDataset]) -> None:
    def large(seed: int) -> np.ndarray:
        return body(seed, (2, 3, 50, 100)).repeat(6, 2).repeat(6, 3)

    write(cases, "a", phase(large(0), 60, 0))
    write(cases, "b", phase(large(0), 90, 1))
    write(cases, "c", phase(np.stack([large(0)[0], large(1)[1]]), 60, 2))
    assert series(cases) == [["a", "b", "c"]] and series({name: cases[name] for name in "bc"}) == [["b", "c"]]
    write(cases, "c", phase(large(1), 60, 2))
    assert series(cases) == [["a", "b"], ["c"]]


def test_an_image_that_cannot_be_read(cases: dict[str, PreprocessedDataset]) -> None:
    write(cases, "a", body(0))
    Path(cases["a"].folder, "a.npy").write_bytes(b"nothing")
    with pytest.raises(CMEMSError, match=r"a\.npy"):
        series(cases)
