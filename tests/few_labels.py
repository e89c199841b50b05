"""A raw data set with few labels, and ways to change it, for the tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_cmems.data.phantom import LABELS, write_dataset
from nnunetv2_cmems.errors import CMEMSError

NAME = "Dataset027_Few"
SHAPE = (5, 36, 40)
NOT_ANNOTATED = len(LABELS)
LABELLED, UNLABELLED = "phantom_tr000", ["phantom_un000", "phantom_un001", "phantom_un002"]


def few(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One scan with its whole volume labelled, three without; ``dataset.json`` names an ignore label.

    Returns:
        The raw data set's folder. nnU-Net's folders are ``raw`` and ``preprocessed`` in ``root``.
    """
    for name in ("raw", "preprocessed"):
        monkeypatch.setenv(f"nnUNet_{name}", str(root / name))
    folder = write_dataset(root / "raw", 27, "Few", 1, 0, num_unlabelled=len(UNLABELLED), shape=SHAPE)
    describe(folder, labels={**LABELS, "ignore": NOT_ANNOTATED})
    return folder


def describe(folder: Path, **changes: Any) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit(path: Path, change: Callable[[np.ndarray], np.ndarray] | None = None, **header: Any) -> None:
    """Change a file's voxels (z, y, x) and its header (``spacing``, ``origin``, ``direction``)."""
    image = sitk.ReadImage(str(path))
    array = sitk.GetArrayFromImage(image)
    written = sitk.GetImageFromArray(array if change is None else change(array))
    written.SetSpacing(header.get("spacing", image.GetSpacing()))
    written.SetOrigin(header.get("origin", image.GetOrigin()))
    written.SetDirection(header.get("direction", image.GetDirection()))
    sitk.WriteImage(written, str(path), useCompression=True)


def paint(folder: Path, case: str, *planes: tuple[int, int]) -> None:
    """Leave only these planes (axis, index) of a case's mask annotated."""

    def only(mask: np.ndarray) -> np.ndarray:
        left = np.full_like(mask, NOT_ANNOTATED)
        for axis, index in planes:
            plane = (slice(None),) * axis + (index,)
            left[plane] = mask[plane]
        return left

    edit(folder / "labelsTr" / f"{case}.nii.gz", only)


def mask_path(folder: Path) -> Path:
    return folder / "labelsTr" / f"{LABELLED}.nii.gz"


def scan_path(folder: Path, case: str) -> Path:
    return folder / ("imagesTr" if "_tr" in case else "imagesUn") / f"{case}_0000.nii.gz"


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(CMEMSError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(folder: Path, ending: str) -> None:
    """Turn the data set into one of another file format."""
    describe(folder, file_ending=ending)
    for path in [*folder.glob("images*/*"), *folder.glob("labels*/*")]:
        sitk.WriteImage(sitk.ReadImage(str(path)), str(path).removesuffix(".nii.gz") + ending)
        path.unlink()
