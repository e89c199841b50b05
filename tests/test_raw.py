"""Raw data sets: what is found in the folders, and what is refused by its names alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from skimage import io

from nnunetv2_cmems.data.phantom import LABELS, write_dataset
from nnunetv2_cmems.data.raw import left_out, open_raw, source_state
from nnunetv2_cmems.errors import CMEMSError

NAME = "Dataset027_Names"
DESCRIPTION: dict[str, Any] = {
    "channel_names": {"0": "T1", "1": "T2"},
    "labels": {"background": 0, "wall": 1, "cavity": 2, "ignore": 3},
    "numTraining": 1,
    "file_ending": ".nii.gz",
}
CONTENT = [
    "imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz",
    "imagesUn/b_7_0000.nii.gz", "imagesUn/b_7_0001.nii.gz", "imagesUn/c_0000.nii.gz", "imagesUn/c_0001.nii.gz",
]  # fmt: skip


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of empty files, its folder in nnUNet_raw."""
    folder = tmp_path / "raw" / NAME
    monkeypatch.setenv("nnUNet_raw", str(folder.parent))
    for name in CONTENT:
        touch(folder / name)
    describe(folder)
    return folder


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def describe(folder: Path, **changes: Any) -> None:
    content = {key: value for key, value in {**DESCRIPTION, **changes}.items() if value is not None}
    (folder / "dataset.json").write_text(json.dumps(content))


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(CMEMSError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", [27, "27", "027", NAME])
def test_cases_and_their_files(raw: Path, name: int | str) -> None:
    found = open_raw(name)
    assert (found.name, found.folder, found.num_channels, found.file_ending) == (NAME, str(raw), 2, ".nii.gz")
    assert list(found.labelled) == ["a"] and list(found.unlabelled) == ["b_7", "c"] and found.has_unlabelled_folder
    assert found.labelled["a"].label == str(raw / "labelsTr" / "a.nii.gz")
    assert found.labelled["a"].images == (str(raw / "imagesTr" / "a_0000.nii.gz"), str(raw / "imagesTr" / "a_0001.nii.gz"))
    assert found.unlabelled["b_7"].label is None
    assert list(found.cases) == ["a", "b_7", "c"]


def test_without_unlabelled_scans(raw: Path) -> None:
    for path in (raw / "imagesUn").iterdir():
        path.unlink()
    assert open_raw(27).has_unlabelled_folder and not open_raw(27).unlabelled
    (raw / "imagesUn").rmdir()
    assert not open_raw(27).has_unlabelled_folder and not open_raw(27).unlabelled


def test_hidden_files_are_nobodys_scans(raw: Path) -> None:
    touch(raw / "imagesUn" / "._c_0000.nii.gz")
    touch(raw / "labelsTr" / ".DS_Store")
    assert list(open_raw(27).cases) == ["a", "b_7", "c"]


def test_images_that_end_otherwise_are_named(raw: Path) -> None:
    assert left_out(open_raw(27)) == []
    for name in ("imagesUn/d_0000.nii", "imagesTr/E_0000.NII.GZ", "labelsTr/a.nrrd", "imagesUn/notes.txt", "imagesUn/._b_7_0000.nii"):
        touch(raw / name)
    assert left_out(open_raw(27)) == [str(raw / name) for name in ("imagesTr/E_0000.NII.GZ", "labelsTr/a.nrrd", "imagesUn/d_0000.nii")]


def test_value_of_not_annotated(raw: Path) -> None:
    assert open_raw(27).not_annotated == 3
    describe(raw, labels={"background": 0, "heart": [1, 2, 3], "cavity": [2]}, regions_class_order=[1, 2])
    assert open_raw(27).not_annotated == 4


def test_scans_without_a_mask(raw: Path) -> None:
    for channel in (0, 1):
        touch(raw / "imagesTr" / f"d_000{channel}.nii.gz")
    said = refusal(lambda: open_raw(27))
    assert "'d'" in said and "mask" in said and "imagesUn" in said
    found = open_raw(27, require_labels=False)
    assert list(found.labelled) == ["a"] and list(found.unlabelled) == ["b_7", "c", "d"]


def test_files_listed_in_dataset_json(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = {"e": {"images": ["elsewhere/x.nii.gz", "elsewhere/y.nii.gz"], "label": "$NAMES_FOLDER/z.nii.gz"}}
    describe(raw, dataset=listed)
    monkeypatch.setenv("NAMES_FOLDER", "elsewhere")
    for name in "xyz":
        touch(raw / "elsewhere" / f"{name}.nii.gz")
    found = open_raw(27)
    assert list(found.cases) == ["e", "b_7", "c"]
    assert found.labelled["e"].label == str(raw / "elsewhere" / "z.nii.gz")
    (raw / "elsewhere" / "y.nii.gz").unlink()
    assert "y.nii.gz" in refusal(lambda: open_raw(27))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels": None}, "lacks 'labels'"),
        ({"channel_names": None, "file_ending": None}, "lacks 'channel_names', 'file_ending'"),
        ({"channel_names": {"1": "T1", "2": "T2"}}, "number the channels"),
        ({"channel_names": ["T1", "T2"]}, "number the channels"),
        ({"file_ending": "nii.gz"}, "file_ending"),
        ({"labels": {"wall": 1}}, "nnU-Net cannot use the labels"),
        ({"labels": {"background": 0, "wall": 2}}, "without a gap"),
        ({"labels": {"background": 0, "wall": 1, "ignore": 5}}, "nnU-Net cannot use the labels"),
        ({"labels": ["background", "wall"]}, "labels"),
        ({"labels": {"background": 0, "heart": [1, 2]}}, "regions_class_order"),
        ({"file_ending": ".mha"}, ".mha"),
    ],
)
def test_useless_dataset_json(raw: Path, changes: dict[str, Any], said: str) -> None:
    describe(raw, **changes)
    assert said in refusal(lambda: open_raw(27))


def test_older_data_sets_call_channels_modality(raw: Path) -> None:
    describe(raw, channel_names=None, modality={"0": "T1", "1": "T2"})
    assert open_raw(27).num_channels == 2


def test_missing_or_damaged_dataset_json(raw: Path) -> None:
    (raw / "dataset.json").write_text("{")
    assert "dataset.json" in refusal(lambda: open_raw(27))
    (raw / "dataset.json").write_text("[]")
    assert "dataset.json" in refusal(lambda: open_raw(27))
    (raw / "dataset.json").unlink()
    assert "dataset.json does not exist" in refusal(lambda: open_raw(27))


@pytest.mark.parametrize(
    ("add", "remove", "said"),
    [
        ([], ["imagesUn/c_0001.nii.gz"], "lacks channel _0001"),
        ([], ["imagesTr/a_0000.nii.gz"], "lacks channel _0000"),
        (["imagesUn/c_0002.nii.gz"], [], "3 channels"),
        (["imagesUn/a_0000.nii.gz", "imagesUn/a_0001.nii.gz"], [], "imagesTr and imagesUn"),
        (["imagesUn/d.nii.gz"], [], "d_0000.nii.gz"),
        (["labelsTr/d.nii.gz"], [], "mask without a scan"),
        (["labelsTr/c.nii.gz"], [], "move the scan of case 'c' to imagesTr"),
        (["imagesUn/d_seg_0000.nii.gz", "imagesUn/d_seg_0001.nii.gz"], [], "_seg"),
    ],
)
def test_wrong_files(raw: Path, add: list[str], remove: list[str], said: str) -> None:
    for name in add:
        touch(raw / name)
    for name in remove:
        (raw / name).unlink()
    assert said in refusal(lambda: open_raw(27))


def test_no_such_data_set(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "28" in refusal(lambda: open_raw(28))
    assert "is no data set" in refusal(lambda: open_raw("ACDC"))
    (raw.parent / "Dataset027_Other").mkdir()
    assert "Dataset027_Other" in refusal(lambda: open_raw(27))
    assert open_raw(NAME).name == NAME
    monkeypatch.setenv("nnUNet_raw", str(raw / "nowhere"))
    assert "nowhere" in refusal(lambda: open_raw(27))
    monkeypatch.delenv("nnUNet_raw")
    assert "nnUNet_raw is not set" in refusal(lambda: open_raw(27))


def test_reader_is_found_by_a_readable_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    folder = write_dataset(tmp_path, 27, "Real", 1, 0, num_unlabelled=1, shape=(2, 32, 32))
    found = open_raw(27)
    assert found.not_annotated == len(LABELS) and isinstance(found.reader(), SimpleITKIO)
    (folder / "imagesTr" / "phantom_tr000_0000.nii.gz").write_bytes(b"no image")
    assert open_raw(27).reader_class is SimpleITKIO
    assert "Traceback" not in capfd.readouterr().err
    (folder / "imagesUn" / "phantom_un000_0000.nii.gz").write_bytes(b"no image")
    assert "none of nnU-Net's readers" in refusal(lambda: open_raw(27).reader())


def test_one_file_may_hold_all_channels(raw: Path) -> None:
    """As with colour images, of which nnU-Net makes three channels."""
    describe(raw, channel_names={"0": "R", "1": "G", "2": "B"}, file_ending=".png")
    for name in CONTENT:
        (raw / name).unlink()
    for name in ("imagesTr/a_0000.png", "imagesUn/b_0000.png"):
        io.imsave(raw / name, np.zeros((8, 8, 3), np.uint8), check_contrast=False)
    io.imsave(raw / "labelsTr/a.png", np.ones((8, 8), np.uint8), check_contrast=False)
    found = open_raw(27)
    assert found.num_channels == 3 and len(found.labelled["a"].images) == 1 and found.reader_class is NaturalImage2DIO
    for name in ("imagesTr/a_0000.png", "imagesUn/b_0000.png"):
        io.imsave(raw / name, np.zeros((8, 8), np.uint8), check_contrast=False)
    assert "lacks channel _0001" in refusal(lambda: open_raw(27))


def test_source_state_follows_every_file(raw: Path) -> None:
    case = open_raw(27).labelled["a"]
    before = source_state(case)
    assert set(before) == {"imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz"}
    Path(case.images[1]).write_text("changed")
    after = source_state(case)
    assert [name for name in after if after[name] != before[name]] == ["imagesTr/a_0001.nii.gz"]
    Path(case.images[1]).unlink()
    assert "a_0001.nii.gz" in refusal(lambda: source_state(case))
