"""A labelled data set becomes one with a single painted slice; nothing of the old one is changed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_cmems.config import ExemplarSpec
from nnunetv2_cmems.data.annotation import read_annotation
from nnunetv2_cmems.data.phantom import write_dataset
from nnunetv2_cmems.data.raw import open_raw
from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.study.withhold import main, parse_exemplar


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    folder = write_dataset(tmp_path, 5, "Made", 6, 0, shape=(5, 32, 32))
    cases = [f"phantom_tr{i:03d}" for i in range(6)]
    (tmp_path / "splits.json").write_text(json.dumps([{"train": cases[:4], "val": cases[4:]}]))
    return folder


def withheld(raw: Path, *exemplars: str) -> Path:
    main(["-d", "5", "--new", "6", "--splits", str(raw.parent / "splits.json"), "--exemplar", *exemplars])
    return raw.parent / "Dataset006_MadeWithheld"


def array(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_one_slice_stays(raw: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in raw.rglob("*")}
    folder = withheld(raw, "phantom_tr001:2:z")
    new = open_raw(6)
    assert set(new.labelled) == {"phantom_tr001"} and set(new.unlabelled) == {"phantom_tr000", "phantom_tr002", "phantom_tr003"}
    assert sorted(p.name for p in (folder / "labelsTs").iterdir()) == ["phantom_tr004.nii.gz", "phantom_tr005.nii.gz"]
    assert len(list((folder / "imagesTs").iterdir())) == 2
    mask, truth = array(folder / "labelsTr" / "phantom_tr001.nii.gz"), array(raw / "labelsTr" / "phantom_tr001.nii.gz")
    assert new.values.ignore == 4
    assert np.array_equal(mask[2], truth[2]) and (np.delete(mask, 2, 0) == 4).all()
    assert read_annotation(mask, new.values, "m").planes == ((0, 2),)
    assert {path: path.stat().st_mtime_ns for path in raw.rglob("*")} == before


def test_several_slices_along_another_axis(raw: Path) -> None:
    folder = withheld(raw, "phantom_tr001:14,16:x")
    mask = array(folder / "labelsTr" / "phantom_tr001.nii.gz")
    assert sorted(np.flatnonzero((mask != 4).all((0, 1))).tolist()) == [14, 16]


def test_a_whole_case_needs_no_ignore_label(raw: Path) -> None:
    folder = withheld(raw, "phantom_tr002", "phantom_tr003")
    assert open_raw(6).values.ignore is None
    assert np.array_equal(array(folder / "labelsTr" / "phantom_tr002.nii.gz"), array(raw / "labelsTr" / "phantom_tr002.nii.gz"))


def test_how_exemplars_are_written() -> None:
    assert parse_exemplar("a") == [ExemplarSpec("a")]
    assert parse_exemplar("a:3") == [ExemplarSpec("a", 3, "z")]
    assert parse_exemplar("a:3,5:y") == [ExemplarSpec("a", 3, "y"), ExemplarSpec("a", 5, "y")]


@pytest.mark.parametrize(
    ("exemplar", "sentence"),
    [
        ("phantom_tr001:x", "is none; write case"),
        ("phantom_tr004:2", "no training case"),
        ("nobody:2", "no labelled case 'nobody'"),
        ("phantom_tr001:5", "no slice 5 along z: it has 5"),
    ],
)
def test_bad_exemplars_leave_nothing_behind(raw: Path, exemplar: str, sentence: str) -> None:
    with pytest.raises(CMEMSError, match=sentence):
        withheld(raw, exemplar)
    assert sorted(p.name for p in raw.parent.iterdir()) == ["Dataset005_Made", "splits.json"]


def test_an_existing_data_set_is_left_alone(raw: Path) -> None:
    withheld(raw, "phantom_tr001:2")
    with pytest.raises(CMEMSError, match="exists already"):
        withheld(raw, "phantom_tr001:3")
