"""Looking at the scans, the fingerprint, and nnU-Net's planners fed with all scans."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from few_labels import LABELLED, NOT_ANNOTATED, SHAPE, UNLABELLED, describe, edit, few, mask_path, paint, refusal, rewrite, scan_path
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnunetv2_cmems.data.annotation import Annotation
from nnunetv2_cmems.data.phantom import write_dataset
from nnunetv2_cmems.data.planning import (
    Examination,
    ForegroundShare,
    PlannerOptions,
    Scan,
    annotated_axes,
    examine,
    make_fingerprint,
    make_plans,
)
from nnunetv2_cmems.data.raw import open_raw


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return few(tmp_path, monkeypatch)


def looked_at(**arguments: Any) -> Examination:
    return examine(open_raw(27), **{"intensities": False, **arguments})


# ------------------------------------------------------------------ looking at the scans


def test_what_is_found(raw: Path) -> None:
    edit(scan_path(raw, UNLABELLED[1]), lambda image: np.pad(image, ((0, 0), (3, 0), (0, 4))))
    paint(raw, LABELLED, (0, 2))
    found = looked_at()
    assert list(found.scans) == [LABELLED, *UNLABELLED] and not found.skipped and found.foreground is None
    assert found.scans[LABELLED] == Scan(SHAPE, (8.0, 1.5, 1.5), SHAPE, Annotation(((0, 2),), frozenset({1, 2, 3})))
    padded = found.scans[UNLABELLED[1]]
    assert padded.shape == (5, 39, 44) and padded.shape_after_crop == SHAPE and padded.annotation is None
    for scan in found.scans.values():
        assert Scan.from_json(json.loads(json.dumps(scan.to_json()))) == scan


def test_known_scans_are_not_read_again(raw: Path) -> None:
    first = looked_at().scans
    scan_path(raw, UNLABELLED[0]).write_bytes(b"damaged")
    again = looked_at(known=first).scans
    assert again == first
    assert UNLABELLED[0] in refusal(lambda: looked_at(known=first, intensities=True)), "intensities have to be read"


def test_processes_change_nothing(raw: Path) -> None:
    one, two = (examine(open_raw(27), num_processes=n) for n in (1, 2))
    assert one.scans == two.scans
    assert make_fingerprint(open_raw(27), one) == make_fingerprint(open_raw(27), two)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"spacing": (1.5, 1.6, 8.0)}, "spacing"),
        ({"origin": (0.0, 0.0, 4.0)}, "origin"),
        ({"direction": (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)}, "direction"),
    ],
)
def test_mask_of_another_geometry(raw: Path, header: dict[str, Any], said: str) -> None:
    edit(mask_path(raw), **header)
    message = refusal(looked_at)
    assert said in message and str(mask_path(raw)) in message and "geometry of the scan" in message


def test_mask_of_another_shape(raw: Path) -> None:
    edit(mask_path(raw), lambda mask: mask[:-1])
    assert "shape (5 x 36 x 40 and 4 x 36 x 40 voxels" in refusal(looked_at)


def test_rounding_in_a_header_is_no_difference(raw: Path) -> None:
    edit(mask_path(raw), spacing=(1.50002, 1.5, 8.00002), origin=(1e-4, 0.0, -1e-3))
    assert looked_at().scans


def test_masks_that_show_nothing(raw: Path) -> None:
    edit(mask_path(raw), lambda mask: mask * 0)
    assert "empty" in refusal(looked_at)
    edit(mask_path(raw), lambda mask: mask * 0 + NOT_ANNOTATED)
    assert "wholly 'not annotated'" in refusal(looked_at)
    edit(mask_path(raw), lambda mask: mask * 0 + 9)
    assert "the value 9, which dataset.json does not name" in refusal(looked_at)
    mask_path(raw).write_bytes(b"no mask")
    assert str(mask_path(raw)) in refusal(lambda: looked_at(skip_unreadable=True)), "a mask is never skipped"


@pytest.mark.parametrize("kind", ["damaged", "truncated", "components"])
def test_useless_scan_among_good_ones(raw: Path, kind: str) -> None:
    path = scan_path(raw, UNLABELLED[1])
    if kind == "damaged":
        path.write_bytes(b"no image")
    elif kind == "truncated":  # ITK fills up what is missing with zeros and says nothing
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        image = sitk.ReadImage(str(path))
        sitk.WriteImage(sitk.Compose([image, image, image]), str(path))
    said = refusal(looked_at)
    assert str(path) in said and "--skip_unreadable" in said
    found = looked_at(skip_unreadable=True)
    assert list(found.scans) == [LABELLED, UNLABELLED[0], UNLABELLED[2]]
    assert list(found.skipped) == [UNLABELLED[1]] and str(path) in found.skipped[UNLABELLED[1]]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scan_with_a_value_that_is_no_number(raw: Path, value: float) -> None:
    """In NIfTI files ITK itself turns them into 0, as for nnU-Net's prediction."""
    rewrite(raw, ".mha")
    path = raw / "imagesUn" / f"{UNLABELLED[1]}_0000.mha"
    edit(path, lambda image: np.where(image == image.max(), value, image).astype(np.float32))
    assert f"{path} has NaN or infinite values" in refusal(looked_at)
    assert list(looked_at(skip_unreadable=True).skipped) == [UNLABELLED[1]]


def test_truncated_uncompressed_nifti(raw: Path) -> None:
    rewrite(raw, ".nii")
    assert len(looked_at().scans) == 4
    path = raw / "imagesUn" / f"{UNLABELLED[2]}_0000.nii"
    os.truncate(path, path.stat().st_size - 10)
    assert f"{path} cannot be read (the file is cut off)" in refusal(looked_at)


def test_parts_of_a_gzip_file_may_be_many(raw: Path) -> None:
    """As parallel compressors write them: the last part's size says nothing about the whole."""
    path = scan_path(raw, UNLABELLED[0])
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content[:5000]) + gzip.compress(content[5000:]))
    assert len(looked_at().scans) == 4


def test_all_problems_are_named_and_mistakes_come_first(raw: Path) -> None:
    for case in (UNLABELLED[0], UNLABELLED[2]):
        scan_path(raw, case).write_bytes(b"no image")
    said = refusal(looked_at)
    assert str(scan_path(raw, UNLABELLED[0])) in said and f"1 more: {UNLABELLED[2]}" in said


def test_channels_that_do_not_fit_each_other(raw: Path) -> None:
    describe(raw, channel_names={"0": "T1", "1": "T2"})
    for case in (LABELLED, *UNLABELLED):
        path = scan_path(raw, case)
        shutil.copy(path, str(path).replace("_0000", "_0001"))
    assert len(looked_at().scans) == 4
    edit(Path(str(scan_path(raw, UNLABELLED[0])).replace("_0000", "_0001")), lambda image: image[1:])
    said = refusal(looked_at)
    assert UNLABELLED[0] in said and "Not all input images have the same shape" in said


def test_no_labelled_scan_is_left(raw: Path) -> None:
    scan_path(raw, LABELLED).write_bytes(b"no image")
    assert "no labelled scan" in refusal(lambda: looked_at(skip_unreadable=True))
    scan_path(raw, LABELLED).unlink()
    mask_path(raw).unlink()
    assert "no labelled case yet" in refusal(looked_at)


def test_axes_of_painted_planes(raw: Path) -> None:
    assert annotated_axes(looked_at().scans.values()) == frozenset()
    paint(raw, LABELLED, (2, 20))
    assert annotated_axes(looked_at().scans.values()) == {2}


# ------------------------------------------------------------------ fingerprint


def fingerprint() -> dict[str, Any]:
    dataset = open_raw(27)
    return make_fingerprint(dataset, examine(dataset))


def test_wholly_labelled_data_set_gets_nnunets_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    write_dataset(tmp_path / "raw", 27, "Whole", 3, 0, shape=SHAPE)
    monkeypatch.setattr("multiprocessing.get_context", lambda method=None: __import__("multiprocessing.dummy").dummy)
    theirs = DatasetFingerprintExtractor(27, 1)
    theirs.num_foreground_voxels_for_intensitystats = 3e6
    expected, found = json.loads(json.dumps(theirs.run(), default=float)), fingerprint()
    for key in ("spacings", "shapes_after_crop", "median_relative_size_after_cropping"):
        assert found[key] == expected[key]
    expected_statistics, statistics = (f["foreground_intensity_properties_per_channel"]["0"] for f in (expected, found))
    assert statistics.keys() == expected_statistics.keys()
    for key, value in expected_statistics.items():
        assert statistics[key] == pytest.approx(value, rel=5e-3), key


def test_all_scans_count(raw: Path) -> None:
    edit(scan_path(raw, UNLABELLED[0]), spacing=(2.0, 2.5, 3.0))
    edit(scan_path(raw, UNLABELLED[2]), lambda image: np.pad(image, ((5, 5), (0, 0), (0, 0))))
    found = fingerprint()
    assert found["spacings"] == [[8.0, 1.5, 1.5], [3.0, 2.5, 2.0], [8.0, 1.5, 1.5], [8.0, 1.5, 1.5]]
    assert found["shapes_after_crop"] == [list(SHAPE)] * 4
    assert found["nnunetv2_cmems"] == {"labelled": [LABELLED], "unlabelled": UNLABELLED}
    assert found == fingerprint(), "the same every time"


def test_what_is_not_annotated_is_no_foreground(raw: Path) -> None:
    """nnU-Net counts the ignore label as foreground."""
    for case in UNLABELLED:
        scan_path(raw, case).unlink()
    mask, image = (sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in (mask_path(raw), scan_path(raw, LABELLED)))
    paint(raw, LABELLED, (0, 2))
    foreground = image[2][mask[2] > 0]
    found = fingerprint()["foreground_intensity_properties_per_channel"]["0"]
    assert found["mean"] == pytest.approx(foreground.mean(), rel=0.01)
    assert (found["min"], found["max"]) == (pytest.approx(foreground.min()), pytest.approx(foreground.max()))
    assert abs(image.mean() - foreground.mean()) > 0.2 * foreground.mean(), "else this test could not fail"


def test_unlabelled_scans_tell_of_other_intensities(raw: Path) -> None:
    """The foreground of the labelled scan lies at 100 to 200, of which those above 150 are rarer in it than in the others."""
    rng = np.random.default_rng(0)

    def write(case: str, high: float) -> np.ndarray:
        organ = np.zeros(SHAPE, bool)
        organ[:, 10:20, 10:30] = True
        image = np.where(organ, np.where(rng.random(SHAPE) < high, rng.uniform(150, 200, SHAPE), rng.uniform(100, 150, SHAPE)), -500.0)
        edit(scan_path(raw, case), lambda _: image.astype(np.float32))
        return organ

    organ = write(LABELLED, 0.2)
    edit(mask_path(raw), lambda mask: organ.astype(mask.dtype))
    paint(raw, LABELLED, (0, 2))
    for case in UNLABELLED:
        write(case, 0.8)
    found = fingerprint()["foreground_intensity_properties_per_channel"]["0"]
    expected = (0.2 * 175 + 0.8 * 125) / 4 + (0.8 * 175 + 0.2 * 125) * 3 / 4  # each scan counts the same
    assert found["mean"] == pytest.approx(expected, abs=3)
    assert found["percentile_00_5"] >= 99, "the air of the unlabelled scans is no foreground"


def test_share_of_foreground() -> None:
    """Between 0 and 1 a third is foreground, between 1 and 2 all; between 2 and 3 three in a hundred, which is air."""
    rng = np.random.default_rng(0)
    values = rng.uniform(0, 3, 60_000).astype(np.float32)
    values[0] = 50.0
    chance = np.select([values < 1, values < 2], [1 / 3, 1.0], 0.03)
    share = ForegroundShare.measure([(values[None], rng.random(values.size) < chance)])
    assert share is not None
    image = np.stack([np.full((40, 50), v, np.float32) for v in (0.5, 1.5, 2.5, 50.0, -1.0)])
    drawn = share.draw(0, image, np.random.default_rng(1)).mean(axis=(1, 2))
    assert drawn[0] == pytest.approx(1 / 3, abs=0.08) and drawn[1] > 0.9
    assert drawn[2:].tolist() == [0.0, 0.0, 0.0]
    np.testing.assert_array_equal(share.draw(0, image, np.random.default_rng(1)), share.draw(0, image, np.random.default_rng(1)))


def test_share_of_foreground_leaves_outliers_out() -> None:
    values = np.random.default_rng(0).uniform(0, 2, 60_000).astype(np.float32)
    is_foreground = values > 1
    values[0], is_foreground[0] = 50.0, True
    share = ForegroundShare.measure([(values[None], is_foreground)])
    assert share is not None
    drawn = share.draw(0, np.array([[[1.5, 50.0]]]), np.random.default_rng(0))
    assert drawn.tolist() == [[[True, False]]]


def test_share_of_foreground_of_one_intensity() -> None:
    share = ForegroundShare.measure([(np.array([[5.0, 5.0, 1.0]]), np.array([True, True, False]))])
    assert share is not None
    assert share.draw(0, np.array([[[5.0, 1.0]]]), np.random.default_rng(0)).tolist() == [[[True, False]]]
    assert ForegroundShare.measure([]) is None


# ------------------------------------------------------------------ plans


def plans(tmp_path: Path, **options: Any) -> dict[str, Any]:
    dataset = open_raw(27)
    found = examine(dataset)
    return make_plans(
        dataset, found.scans, make_fingerprint(dataset, found), PlannerOptions(**options), str(tmp_path / "preprocessed" / dataset.name)
    ).content


def test_batch_size_counts_all_scans(raw: Path, tmp_path: Path) -> None:
    describe(raw, numTraining=1)
    for number in range(3, 60):
        os.symlink(scan_path(raw, UNLABELLED[0]), scan_path(raw, f"phantom_un{number:03d}"))
    dataset = open_raw(27)
    found = looked_at()
    made = make_fingerprint(dataset, Examination(found.scans, {}, [[np.arange(10.0)]]))
    content = make_plans(dataset, found.scans, made, PlannerOptions(), str(tmp_path / "preprocessed" / dataset.name)).content
    planned = content["configurations"]["2d"]
    assert planned["batch_size"] == round(0.05 * 61 * np.prod(SHAPE) / np.prod(planned["patch_size"])) > 10
    assert not (tmp_path / "preprocessed").exists(), "nothing is written yet"


@pytest.mark.parametrize(
    ("planes", "forward"), [((), [0, 1, 2]), (((0, 2),), [0, 1, 2]), (((1, 18),), [1, 0, 2]), (((2, 20), (2, 21)), [2, 0, 1])]
)
def test_slices_are_cut_along_the_axis_that_was_painted(
    raw: Path, tmp_path: Path, planes: tuple[tuple[int, int], ...], forward: list[int]
) -> None:
    if planes:
        paint(raw, LABELLED, *planes)
    content = plans(tmp_path)
    assert content["transpose_forward"] == forward
    assert np.argsort(forward).tolist() == content["transpose_backward"]
    spacing = np.array([8.0, 1.5, 1.5])[forward]
    assert content["configurations"]["2d"]["spacing"] == spacing[1:].tolist()
    assert len(content["configurations"]["2d"]["patch_size"]) == 2


@pytest.mark.parametrize("planner", ["ExperimentPlanner", "nnUNetPlannerResEncM", "nnUNetPlanner_torchres"])
def test_names_in_the_plans_are_nnunets(raw: Path, tmp_path: Path, planner: str) -> None:
    content = plans(tmp_path, planner=planner, gpu_memory_target=4.0, plans_name="Mine")
    assert content["experiment_planner_used"] == planner and content["plans_name"] == "Mine"
    assert content["image_reader_writer"] == "SimpleITKIO" and content["label_manager"] == "LabelManager"
    assert "nnunetv2_cmems" not in json.dumps(content)


def test_plans_of_a_whole_data_set_are_nnunets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    write_dataset(tmp_path / "raw", 27, "Whole", 3, 0, shape=SHAPE)
    made = fingerprint()
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "theirs"))
    theirs = tmp_path / "theirs" / "Dataset027_Whole"
    theirs.mkdir(parents=True)
    (theirs / "dataset_fingerprint.json").write_text(json.dumps(made))
    ExperimentPlanner(27).plan_experiment()
    assert plans(tmp_path) == json.loads((theirs / "nnUNetPlans.json").read_text())


def test_target_spacing(raw: Path, tmp_path: Path) -> None:
    assert plans(tmp_path, target_spacing=(8.0, 2.0, 2.0))["configurations"]["3d_fullres"]["spacing"] == [8.0, 2.0, 2.0]


def test_unusable_planner_or_plans(raw: Path, tmp_path: Path) -> None:
    assert "no planner 'nnUNetPlannerResEncS'" in refusal(lambda: plans(tmp_path, planner="nnUNetPlannerResEncS"))
    existing = tmp_path / "preprocessed" / "Dataset027_Few" / "nnUNetPlans.json"
    existing.parent.mkdir(parents=True)
    existing.write_text("{")
    assert str(existing) in refusal(lambda: plans(tmp_path))
    assert existing.read_text() == "{"


def test_splits_that_contradict_each_other(raw: Path, tmp_path: Path) -> None:
    preprocessed = tmp_path / "preprocessed" / "Dataset027_Few"
    preprocessed.mkdir(parents=True)
    for folder, case in ((raw, "a"), (preprocessed, "b")):
        (folder / "splits_final.json").write_text(json.dumps([{"train": [case], "val": []}]))
    assert "splits_final.json" in refusal(lambda: plans(tmp_path))


def test_environment_is_put_back(raw: Path, tmp_path: Path) -> None:
    before = dict(os.environ)
    plans(tmp_path)
    refusal(lambda: plans(tmp_path, planner="nothing"))
    assert dict(os.environ) == before
