"""The made-up scans: determinism, anatomy, files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_cmems.data.phantom import LABELS, make_scan, write_dataset
from nnunetv2_cmems.errors import CMEMSError

SMALL = (3, 32, 40)


def test_scan_depends_on_the_seed_alone() -> None:
    image, label = make_scan(3, SMALL)
    again, label_again = make_scan(3, SMALL)
    other, _ = make_scan(4, SMALL)
    assert image.shape == label.shape == SMALL
    assert image.dtype == np.float32 and label.dtype == np.uint8
    assert np.isfinite(image).all() and image.min() >= 0
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(label, label_again)
    assert not np.array_equal(image, other)


@pytest.mark.parametrize("shape", [(1, 32, 32), (2, 32, 48), (8, 64, 48)])
def test_some_slice_shows_every_class(shape: tuple[int, int, int]) -> None:
    for seed in range(30):
        _, label = make_scan(seed, shape)
        assert any(set(np.unique(plane)) == set(LABELS.values()) for plane in label), seed


def test_some_end_slices_show_no_organ() -> None:
    ends = [make_scan(seed, (8, 32, 32))[1][[0, -1]].any((1, 2)) for seed in range(20)]
    assert 0 < np.mean(ends) < 1


def test_anatomy() -> None:
    """The wall surrounds the left cavity, and intensity alone does not tell the cavity from the rest."""
    alike = bright = 0
    for seed in range(10):
        image, label = make_scan(seed, (5, 64, 64))
        z = int((label == LABELS["right cavity"]).sum((1, 2)).argmax())
        left = label[z] == LABELS["left cavity"]
        ring = np.zeros_like(left)
        for axis in (0, 1):
            for shift in (-1, 1):
                ring |= np.roll(left, shift, axis)
        ring &= ~left
        assert (label[z][ring] == LABELS["wall"]).all()
        blood = np.median(image[z][left])
        assert blood > 1.15 * np.median(image[z][label[z] == LABELS["wall"]])
        alike += int(((np.abs(image[z] - blood) < 0.15 * blood) & (label[z] == 0)).sum())
        bright += int(left.sum())
    assert alike > bright


@pytest.mark.parametrize("shape", [(0, 64, 64), (4, 31, 64), (64, 64)])
def test_unusable_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(CMEMSError, match="shape"):
        make_scan(0, shape)


def test_data_set_on_disk(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "raw", 7, "Tiny", 2, 1, num_unlabelled=3, seed=5, shape=SMALL, spacing=(8, 1.25, 1.5))
    assert folder == tmp_path / "raw" / "Dataset007_Tiny"
    assert {path.name: len(list(path.iterdir())) for path in folder.iterdir() if path.is_dir()} == {
        "imagesTr": 2, "labelsTr": 2, "imagesTs": 1, "labelsTs": 1, "imagesUn": 3,
    }  # fmt: skip
    description = json.loads((folder / "dataset.json").read_text())
    assert description["numTraining"] == 2 and description["labels"] == LABELS
    image = sitk.ReadImage(str(folder / "imagesTr" / "phantom_tr001_0000.nii.gz"))
    label = sitk.ReadImage(str(folder / "labelsTr" / "phantom_tr001.nii.gz"))
    assert image.GetSpacing() == label.GetSpacing() == (1.5, 1.25, 8.0)
    assert image.GetOrigin() == label.GetOrigin() and image.GetDirection() == label.GetDirection()
    assert sitk.GetArrayFromImage(image).shape == SMALL
    images = [sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in sorted(folder.glob("images*/*"))]
    assert all(not np.array_equal(a, b) for i, a in enumerate(images) for b in images[:i])
    assert not [path for path in (tmp_path / "raw").iterdir() if path != folder]


def test_same_data_set_is_reused_and_another_refused(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, 7, "Tiny", 1, 0, shape=SMALL)
    before = (folder / "dataset.json").stat().st_mtime_ns
    assert write_dataset(tmp_path, 7, "Tiny", 1, 0, shape=SMALL) == folder
    assert (folder / "dataset.json").stat().st_mtime_ns == before
    with pytest.raises(CMEMSError, match="not a phantom data set of the same parameters"):
        write_dataset(tmp_path, 7, "Tiny", 1, 0, seed=1, shape=SMALL)
    with pytest.raises(CMEMSError, match="another data set of the id 007"):
        write_dataset(tmp_path, 7, "Other", 1, 0, shape=SMALL)


@pytest.mark.parametrize("content", [None, "no JSON", "[]", '{"labels": {}}'])
def test_foreign_data_set_is_left_alone(tmp_path: Path, content: str | None) -> None:
    foreign = tmp_path / "Dataset007_Tiny"
    foreign.mkdir()
    if content is not None:
        (foreign / "dataset.json").write_text(content)
    with pytest.raises(CMEMSError, match="remove it or choose another id"):
        write_dataset(tmp_path, 7, "Tiny", 1, 0, shape=SMALL)
    assert [path.name for path in foreign.iterdir()] == ([] if content is None else ["dataset.json"])


@pytest.mark.parametrize(
    "arguments", [{"dataset_id": 0}, {"dataset_id": 1000}, {"num_training": 0}, {"num_test": -1}, {"shape": (1, 2, 3)}]
)
def test_bad_arguments_leave_nothing_behind(tmp_path: Path, arguments: dict) -> None:
    with pytest.raises(CMEMSError):
        write_dataset(tmp_path, **{"dataset_id": 7, "num_training": 1, "num_test": 0, **arguments})
    assert not list(tmp_path.iterdir())
