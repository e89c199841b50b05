"""Dice, distances and volumes of masks, by hand and by other code, and what happens to masks that do not fit."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from scipy.ndimage import binary_erosion, distance_transform_edt, generate_binary_structure
from skimage.io import imsave

from nnunetv2_cmems.data.phantom import make_scan
from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.study.metrics import COLUMNS, compare_masks, distance_unit, evaluate_folder, evaluate_run, read_metrics
from nnunetv2_cmems.study.run import RunRecord, RunSpec, fold_folder

LABELS = {"background": 0, "wall": 1, "cavity": 2}
DESCRIPTION: dict[str, Any] = {"labels": LABELS, "file_ending": ".nii.gz", "channel_names": {"0": "MRI"}}
SPACING = (8.0, 1.5, 1.5)

Masks = Mapping[str, np.ndarray]


def write(folder: Path, masks: Masks, spacing: tuple[float, ...] = SPACING) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for case, mask in masks.items():
        image = sitk.GetImageFromArray(mask.astype(np.uint8))
        image.SetSpacing(spacing[::-1])
        sitk.WriteImage(image, str(folder / f"{case}.nii.gz"))
    return folder


def box(low: tuple[int, ...], high: tuple[int, ...], shape: tuple[int, ...] = (5, 12, 12), value: int = 1) -> np.ndarray:
    """A mask that shows one box; ``high`` is outside."""
    mask = np.zeros(shape, dtype=np.uint8)
    mask[tuple(slice(a, b) for a, b in zip(low, high))] = value
    return mask


@pytest.fixture
def measure(tmp_path: Path) -> Callable[..., dict[str, dict[str, float]]]:
    """Scores by class of one case that is written to disk and measured."""

    def of(prediction: np.ndarray, reference: np.ndarray, **changes: Any) -> dict[str, dict[str, float]]:
        folders = write(tmp_path / "predicted", {"a": prediction}), write(tmp_path / "true", {"a": reference})
        table = evaluate_folder(str(folders[0]), str(folders[1]), {**DESCRIPTION, **changes})
        return {str(row.pop("label")): row for row in table.drop(columns="case").to_dict("records")}  # type: ignore[misc]

    return of


def test_scores_worked_out_by_hand(measure: Callable[..., dict[str, dict[str, float]]]) -> None:
    """Two boxes of 1 x 2 x 4 voxels of 8 x 1.5 x 1.5 mm; the prediction lies 3 pixels further along x.

    All voxels are surface. In each row 1 column is common, the others are 1, 2 and 3 pixels from the other mask: 0, 1.5, 3 and 4.5 mm,
    each of them 4 times. The mean is 2.25 mm. The 95th percentile of a direction's 8 values (2 each) is at position 0.95 * 7 = 6.65,
    between two values of 4.5 mm.
    """
    scores = measure(box((2, 4, 5), (3, 6, 9)), box((2, 4, 2), (3, 6, 6)))["wall"]
    assert scores["dice"] == pytest.approx(2 * 2 / (8 + 8))
    assert scores["hd95_mm"] == pytest.approx(4.5)
    assert scores["assd_mm"] == pytest.approx(2.25)
    assert scores["volume_ml"] == pytest.approx(8 * 8 * 1.5 * 1.5 / 1000) == scores["reference_volume_ml"]
    assert scores["volume_error_ml"] == 0


def test_each_axis_has_its_own_spacing(measure: Callable[..., dict[str, dict[str, float]]]) -> None:
    """One slice too far is 8 mm, one pixel too far is 1.5 mm."""
    reference = box((1, 3, 3), (2, 6, 6))
    assert measure(np.roll(reference, 1, axis=0), reference)["wall"]["assd_mm"] == pytest.approx(8)
    assert measure(np.roll(reference, 1, axis=1), reference)["wall"]["hd95_mm"] == pytest.approx(1.5)


def test_volume_error_has_a_sign(measure: Callable[..., dict[str, dict[str, float]]]) -> None:
    reference = box((1, 2, 2), (3, 6, 7))  # 40 voxels
    small, large = box((1, 2, 2), (3, 6, 6)), box((1, 2, 2), (3, 6, 8))  # 32 and 48
    assert measure(small, reference)["wall"]["volume_error_percent"] == pytest.approx(-20)
    assert measure(large, reference)["wall"]["volume_error_ml"] == pytest.approx(8 * 0.018)


def by_distance_transforms(a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...]) -> tuple[float, float]:
    """HD95 and ASSD, computed in another way than MONAI's."""
    faces = generate_binary_structure(a.ndim, 1)
    edges = [mask & ~binary_erosion(mask, faces) for mask in (a, b)]
    directions = [distance_transform_edt(~there, sampling=spacing)[here] for here, there in (edges, edges[::-1])]
    return max(float(np.percentile(found, 95)) for found in directions), float(np.concatenate(directions).mean())


def test_distances_agree_with_distance_transforms() -> None:
    shape = (6, 64, 64)
    masks = [make_scan(seed, shape)[1] for seed in (1, 2)]
    compared = 0
    for value in (1, 2, 3):
        prediction, reference = (mask == value for mask in masks)
        scores = compare_masks(prediction, reference, SPACING)
        expected = by_distance_transforms(prediction, reference, SPACING)
        assert (scores["hd95_mm"], scores["assd_mm"]) == pytest.approx(expected, rel=1e-5)
        compared += expected[0] > 2
    assert compared  # else the masks were too alike to tell


def test_a_mask_at_the_border_of_the_image_has_a_surface_there() -> None:
    whole = np.ones((3, 4, 4), dtype=bool)
    inner = np.zeros_like(whole)
    inner[1:2, 1:3, 1:3] = True
    scores = compare_masks(inner, whole, (1.0, 1.0, 1.0))
    assert (scores["hd95_mm"], scores["assd_mm"]) == pytest.approx(by_distance_transforms(inner, whole, (1.0, 1.0, 1.0)))


def test_dice_is_that_of_nnunet(tmp_path: Path, pools_are_threads: None) -> None:
    predicted = write(tmp_path / "predicted", {"a": make_scan(1, (4, 40, 40))[1], "b": make_scan(2, (4, 40, 40))[1]})
    true = write(tmp_path / "true", {"a": make_scan(3, (4, 40, 40))[1], "b": make_scan(4, (4, 40, 40))[1]})
    ours = evaluate_folder(str(predicted), str(true), {**DESCRIPTION, "labels": {"background": 0, "1": 1, "2": 2, "3": 3}})
    theirs = compute_metrics_on_folder(str(true), str(predicted), None, SimpleITKIO(), ".nii.gz", [1, 2, 3], num_processes=1)  # type: ignore[arg-type]
    expected = {
        (Path(case["prediction_file"]).name.split(".")[0], str(label)): metrics["Dice"]
        for case in theirs["metric_per_case"]
        for label, metrics in case["metrics"].items()
    }
    assert {(row["case"], row["label"]): row["dice"] for row in ours.to_dict("records")} == pytest.approx(expected)


def test_a_class_that_neither_shows_does_not_count(measure: Callable[..., dict[str, dict[str, float]]]) -> None:
    mask = box((1, 2, 2), (3, 6, 6))
    scores = measure(mask, mask)
    assert (scores["wall"]["dice"], scores["wall"]["hd95_mm"], scores["wall"]["assd_mm"]) == (1, 0, 0)
    empty = scores["cavity"]
    assert all(math.isnan(empty[name]) for name in ("dice", "hd95_mm", "assd_mm", "volume_error_ml", "volume_error_percent"))
    assert empty["volume_ml"] == empty["reference_volume_ml"] == 0


def test_a_class_that_only_one_shows(measure: Callable[..., dict[str, dict[str, float]]]) -> None:
    scores = measure(box((1, 2, 2), (3, 6, 6), value=1), box((1, 2, 2), (3, 6, 6), value=2))
    hallucinated, missed = scores["wall"], scores["cavity"]
    volume = 32 * 0.018
    for found in (hallucinated, missed):
        assert found["dice"] == 0
        assert math.isnan(found["hd95_mm"]) and math.isnan(found["assd_mm"])
    assert hallucinated["volume_error_ml"] == pytest.approx(volume)
    assert math.isnan(hallucinated["volume_error_percent"])
    assert missed["volume_error_ml"] == pytest.approx(-volume)
    assert missed["volume_error_percent"] == -100


def test_what_is_not_annotated_does_not_count(measure: Callable[..., dict[str, dict[str, float]]]) -> None:
    reference = box((2, 2, 2), (3, 6, 6))
    prediction = reference + box((0, 0, 0), (1, 12, 12))  # a whole slice too many, where nobody annotated
    labels = {**LABELS, "ignore": 3}
    assert measure(prediction, reference, labels=labels)["wall"]["dice"] < 0.2
    reference[0] = 3
    scores = measure(prediction, reference, labels=labels)
    assert list(scores) == ["wall", "cavity"]
    assert (scores["wall"]["dice"], scores["wall"]["hd95_mm"], scores["wall"]["volume_error_ml"]) == (1, 0, 0)


def test_regions(measure: Callable[..., dict[str, dict[str, float]]]) -> None:
    """The heart is right as a whole, its cavity is not."""
    reference = box((1, 2, 2), (3, 6, 6), value=1) + box((1, 3, 3), (3, 5, 5), value=1)
    prediction = np.minimum(reference, 1)
    scores = measure(prediction, reference, labels={"background": 0, "heart": [1, 2], "cavity": 2}, regions_class_order=[1, 2])
    assert list(scores) == ["heart", "cavity"]
    assert scores["heart"]["dice"] == 1
    assert scores["cavity"]["dice"] == 0


def test_natural_images_are_measured_in_pixels(tmp_path: Path) -> None:
    """Outlines, not surfaces: of two squares of 5 x 5 pixels, one of 3 x 3 within, the corners are the farthest."""
    for name, low, high in (("predicted", 3, 6), ("true", 2, 7)):
        (tmp_path / name).mkdir()
        imsave(str(tmp_path / name / "a.png"), box((low, low), (high, high), (12, 12)), check_contrast=False)
    description = {**DESCRIPTION, "file_ending": ".png"}
    assert distance_unit(description) == "pixels"
    assert distance_unit(DESCRIPTION) == "mm"
    row = evaluate_folder(str(tmp_path / "predicted"), str(tmp_path / "true"), description).iloc[0]
    # The inner outline's 8 pixels are 1 from the outer one's; of the outer one's 16, 4 corners are sqrt(2) from it, the others 1.
    assert row["assd_mm"] == pytest.approx((8 + 12 + 4 * math.sqrt(2)) / 24)
    assert row["hd95_mm"] == pytest.approx(math.sqrt(2))
    assert row["reference_volume_ml"] == pytest.approx(25 / 1000)


def test_a_2d_image_with_spacing_counts_as_one_mm_thick(tmp_path: Path) -> None:
    mask = box((2, 2), (6, 6), (12, 12))
    folders = [write(tmp_path / name, {"a": found}, (0.5, 2.0)) for name, found in (("p", np.roll(mask, 1, axis=0)), ("t", mask))]
    row = evaluate_folder(str(folders[0]), str(folders[1]), DESCRIPTION).iloc[0]
    assert row["reference_volume_ml"] == pytest.approx(16 * 0.5 * 2.0 / 1000)
    assert row["hd95_mm"] == pytest.approx(0.5)


def test_one_slice_of_a_volume_keeps_its_thickness() -> None:
    mask = box((0, 2, 2), (1, 6, 6), (1, 12, 12)).astype(bool)
    assert compare_masks(mask, mask, (8.0, 1.5, 1.5))["volume_ml"] == pytest.approx(16 * 8 * 1.5 * 1.5 / 1000)


def test_several_processes_give_the_same(tmp_path: Path, pools_are_threads: None) -> None:
    predicted = write(tmp_path / "predicted", {f"{i}": make_scan(i, (3, 32, 32))[1] for i in range(3)})
    true = write(tmp_path / "true", {f"{i}": make_scan(i + 9, (3, 32, 32))[1] for i in range(3)})
    one, two = (evaluate_folder(str(predicted), str(true), DESCRIPTION, num_processes=n) for n in (1, 2))
    assert list(one["case"]) == ["0", "0", "1", "1", "2", "2"]
    assert one.equals(two)


# ---------------------------------------------------------------------- what does not fit


def test_a_prediction_without_reference_and_the_other_way_round(tmp_path: Path) -> None:
    mask = box((1, 2, 2), (3, 6, 6))
    both, one = write(tmp_path / "both", {"a": mask, "b": mask}), write(tmp_path / "one", {"a": mask})
    with pytest.raises(CMEMSError, match=r"both.b\.nii\.gz has no reference of this name in .*one"):
        evaluate_folder(str(both), str(one), DESCRIPTION)
    with pytest.raises(CMEMSError, match=r"both.b\.nii\.gz has no prediction of this name in .*one"):
        evaluate_folder(str(one), str(both), DESCRIPTION)
    assert list(evaluate_folder(str(one), str(both), DESCRIPTION, cases=["a"])["case"].unique()) == ["a"]
    with pytest.raises(CMEMSError, match=r"both.b\.nii\.gz is of none of the cases"):
        evaluate_folder(str(both), str(both), DESCRIPTION, cases=["a"])


def test_shapes_that_differ(tmp_path: Path) -> None:
    folders = write(tmp_path / "p", {"a": box((1, 2, 2), (3, 6, 6))}), write(tmp_path / "t", {"a": box((1, 2, 2), (3, 6, 6), (5, 12, 13))})
    with pytest.raises(CMEMSError, match=r"p.a\.nii\.gz has the shape \(5, 12, 12\), its reference .*t.a\.nii\.gz \(5, 12, 13\)"):
        evaluate_folder(*map(str, folders), DESCRIPTION)


def test_spacing_that_differs(tmp_path: Path) -> None:
    mask = box((1, 2, 2), (3, 6, 6))
    folders = write(tmp_path / "p", {"a": mask}, (8.0, 1.5, 1.6)), write(tmp_path / "t", {"a": mask})
    with pytest.raises(CMEMSError, match=r"p.a\.nii\.gz has the spacing \(8, 1\.5, 1\.6\), its reference .*t.a\.nii\.gz \(8, 1\.5, 1\.5\)"):
        evaluate_folder(*map(str, folders), DESCRIPTION)


def test_folders_and_files_that_cannot_be_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    true = write(tmp_path / "true", {"a": box((1, 2, 2), (3, 6, 6))})
    with pytest.raises(CMEMSError, match="nowhere is not a folder"):
        evaluate_folder(str(tmp_path / "nowhere"), str(true), DESCRIPTION)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CMEMSError, match=r"empty holds no masks \(\*\.nii\.gz\)"):
        evaluate_folder(str(tmp_path / "empty"), str(tmp_path / "empty"), DESCRIPTION)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.nii.gz").write_bytes(b"no image")
    with pytest.raises(CMEMSError, match=r"broken.a\.nii\.gz cannot be read"):
        evaluate_folder(str(broken), str(true), DESCRIPTION)
    with pytest.raises(CMEMSError, match=r"none of nnU-Net's readers can read .*broken.a\.nii\.gz"):
        evaluate_folder(str(true), str(broken), DESCRIPTION)
    assert "Traceback" not in capfd.readouterr().err
    with pytest.raises(CMEMSError, match=r"none of nnU-Net's readers can read files '\*\.xyz'"):
        distance_unit({**DESCRIPTION, "file_ending": ".xyz"})


# ---------------------------------------------------------------------- a run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A finished run on two cases, one of them with a dot and a number that looks like one, as nnU-Net leaves it."""
    spec = RunSpec("Dataset001_Made", "2d", "nnUNetPlans", "0", "nnUNetTrainerCMEMS", "CMEMS", 1, 1)
    folder = tmp_path / "runs" / spec.key
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(dataclasses.asdict(RunRecord(spec, "finished", "2026-01-01T00:00:00"))))
    fold = Path(fold_folder(str(folder)))
    validation = write(fold / "validation", {"001": box((1, 2, 2), (3, 6, 6)), "p.2": box((1, 2, 2), (3, 6, 7))})
    (fold.parent / "dataset.json").write_text(json.dumps(DESCRIPTION))
    per_case = [{"prediction_file": f"/elsewhere/{case}.nii.gz", "metrics": {}} for case in ("001", "p.2")]
    (validation / "summary.json").write_text(json.dumps({"metric_per_case": per_case}))
    write(tmp_path / "true", dict.fromkeys(("001", "p.2", "of another fold"), box((1, 2, 2), (3, 6, 6))))
    return folder


def test_a_run(tmp_path: Path, run_folder: Path) -> None:
    path = evaluate_run(str(run_folder), str(tmp_path / "true"))
    assert Path(path) == run_folder / "metrics.csv"
    assert Path(path).read_text().splitlines()[0] == ",".join(COLUMNS)
    table = read_metrics(path)
    assert list(zip(table["case"], table["label"])) == [("001", "wall"), ("001", "cavity"), ("p.2", "wall"), ("p.2", "cavity")]
    assert table["dice"].tolist() == pytest.approx([1, math.nan, 64 / 72, math.nan], nan_ok=True)


def test_a_run_whose_validation_is_incomplete(tmp_path: Path, run_folder: Path) -> None:
    validation = Path(fold_folder(str(run_folder))) / "validation"
    (validation / "001.nii.gz").unlink()
    with pytest.raises(CMEMSError, match=r"001\.nii\.gz has no prediction"):
        evaluate_run(str(run_folder), str(tmp_path / "true"))
    assert not (run_folder / "metrics.csv").exists()
    (validation / "summary.json").unlink()
    with pytest.raises(CMEMSError, match=r"summary\.json cannot be read .*; finish the training"):
        evaluate_run(str(run_folder), str(tmp_path / "true"))
    shutil.rmtree(validation.parent.parent)
    with pytest.raises(CMEMSError, match=r"dataset\.json cannot be read"):
        evaluate_run(str(run_folder), str(tmp_path / "true"))


def test_names_stay_text_and_gaps_stay_gaps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(f"{','.join(COLUMNS)}\n007,NA,0.5,,,1,1,0,0\n")
    row = read_metrics(str(path)).iloc[0]
    assert (row["case"], row["label"]) == ("007", "NA")
    assert math.isnan(row["hd95_mm"])


@pytest.mark.parametrize("content", ["", "case,label\n", "case,label,dice\na,b,0.5\n", f"{','.join(COLUMNS)}\na,b,high,,,1,1,0,0\n"])
def test_a_damaged_table(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.csv").write_text(content)
    with pytest.raises(CMEMSError, match=r"metrics\.csv cannot be read as a run's metrics"):
        read_metrics(str(tmp_path / "metrics.csv"))
