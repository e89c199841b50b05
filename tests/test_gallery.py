"""The report's gallery: which cases and slices it shows, how, and what it does where something is missing."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import CASES, CONFIGURATION, VALIDATION, Workspace
from conftest import DATASET as SMALL
from PIL import Image
from test_report import METHODS, fold_of, spec, write_benchmark, write_run

from nnunetv2_cmems.data.annotation import LabelValues
from nnunetv2_cmems.data.phantom import write_dataset
from nnunetv2_cmems.study import gallery
from nnunetv2_cmems.study.gallery import (
    MOST_SLICES,
    choose_slices,
    companion,
    disagreement,
    grey_picture,
    heat_map,
    legend,
    make_gallery,
    overlay,
    to_raw,
    zoom_to,
)
from nnunetv2_cmems.study.report_runs import Run, read_benchmark
from nnunetv2_cmems.study.run import RunRecord, RunSpec

VALUES = LabelValues({0: "background", 1: "wall", 2: "cavity"}, None)


def picture(uri: str) -> np.ndarray:
    """A data URI as (Y, X, 4), 0 to 255."""
    kind, _, content = uri.partition(",")
    assert kind in ("data:image/png;base64", "data:image/webp;base64")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGBA")).astype(int)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("raw"), 905, "Report", 4, 0, shape=(5, 48, 40))


@pytest.fixture
def bench(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A benchmark that predicts the truth."""
    monkeypatch.setenv("nnUNet_raw", str(raw.parent))
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    return write_benchmark(tmp_path / "bench", raw / "labelsTr")


def made(bench: Path) -> gallery.Gallery:
    return make_gallery(read_benchmark(str(bench)))


# ---------------------------------------------------------------------- cases


def test_best_median_and_worst_case_of_the_main_method(bench: Path) -> None:
    found = made(bench)
    assert [(case.rank, case.name) for case in found.cases] == [
        ("best", "phantom_tr003"), ("median", "phantom_tr002"), ("worst", "phantom_tr000"),
    ]  # fmt: skip
    assert found.method == "CMEMS" and found.cases[0].dice == pytest.approx(0.87)
    for case in found.cases:
        assert [layer.title for layer in case.layers] == ["scan", "truth", *METHODS.values()]
        assert len(case.scans) == case.total == 5 and all(len(layer.pictures or case.scans) == 5 for layer in case.layers)
        assert case.layers[2].note == f"Dice {100 * case.dice:.1f} %"
        assert case.layers[1].pictures == case.layers[2].pictures  # it predicts the truth


def test_the_first_slice_is_the_one_with_the_largest_organs(bench: Path, raw: Path) -> None:
    for case in made(bench).cases:
        truth = sitk.GetArrayFromImage(sitk.ReadImage(str(raw / "labelsTr" / f"{case.name}.nii.gz")))
        assert case.slices[case.first] == int((truth > 0).sum(axis=(1, 2)).argmax())


def test_a_method_is_shown_by_its_run_with_the_same_exemplar_and_seed(bench: Path) -> None:
    runs = read_benchmark(str(bench)).methods
    leader = runs["CMEMS"][1]
    assert companion(runs["exemplar only"], leader).record.spec.exemplar == 2
    assert companion(runs["exemplar only"][:1], leader).record.spec.exemplar == 1


def test_a_single_case_is_shown_once(bench: Path) -> None:
    for path in bench.rglob("metrics.csv"):
        lines = path.read_text().splitlines()
        path.write_text("\n".join(line for line in lines if line.startswith(("case,", "phantom_tr001"))) + "\n")
    assert [case.name for case in made(bench).cases] == ["phantom_tr001"]


def test_a_missing_damaged_or_misshapen_prediction_is_told(bench: Path, raw: Path) -> None:
    worst = "phantom_tr000.nii.gz"
    folders = {name: fold_of(bench, spec(trainer)) / "validation" for trainer, name in METHODS.items()}
    (folders["CMEMS"] / worst).unlink()
    (folders["exemplar only"] / worst).write_bytes(b"nothing")
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((2, 3, 4), np.uint8)), str(folders["nnUNetTrainer"] / worst))
    case = made(bench).cases[-1]
    notes = {layer.title: (layer.note, layer.pictures) for layer in case.layers}
    assert notes["CMEMS"] == ("no prediction", None)
    assert notes["exemplar only"] == ("the prediction cannot be read", None)
    assert notes["nnUNetTrainer"] == ("the prediction has another shape", None)


def test_a_scan_that_is_gone_costs_its_case_only(bench: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "raw" / raw.name
    shutil.copytree(raw, own)
    monkeypatch.setenv("nnUNet_raw", str(own.parent))
    (own / "imagesTr" / "phantom_tr003_0000.nii.gz").write_bytes(b"damaged")
    found = made(bench)
    assert [case.rank for case in found.cases] == ["median", "worst"]
    assert any("phantom_tr003 is not shown" in sentence for sentence in found.missing)


def test_without_raw_data_nothing_is_shown(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_raw")
    found = made(bench)
    assert not found.cases and "nnUNet_raw is not set" in found.missing[0]


def test_the_copy_that_was_validated_against_is_the_truth(
    bench: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    copies = tmp_path / raw.name / "gt_segmentations"
    shutil.copytree(raw / "labelsTr", copies)
    image = sitk.ReadImage(str(copies / "phantom_tr000.nii.gz"))
    sitk.WriteImage(image * 0 + 1, str(copies / "phantom_tr000.nii.gz"))
    truth = made(bench).cases[-1].layers[1].pictures
    assert truth is not None and (picture(truth[0])[..., 3] > 0).all()


# ---------------------------------------------------------------------- slices and pictures


def test_all_slices_of_a_small_volume() -> None:
    assert choose_slices([np.zeros((MOST_SLICES, 4, 4))]) == list(range(MOST_SLICES))


def test_of_a_large_volume_the_slices_that_show_something() -> None:
    truth, prediction = np.zeros((2, 200, 4, 4), int)
    truth[50:100], prediction[120] = 1, 1
    chosen = choose_slices([truth, prediction])
    assert len(chosen) == MOST_SLICES and (chosen[0], chosen[-1]) == (50, 120)
    truth[60:] = prediction[:] = 0
    assert len(choose_slices([truth, prediction])) == MOST_SLICES and set(range(50, 60)) < set(choose_slices([truth, prediction]))
    assert choose_slices([np.zeros((200, 4, 4))])[::23] == [0, 199]


def test_a_mask_lies_transparently_over_the_scan() -> None:
    mask = np.zeros((20, 20), int)
    mask[5:15, 5:15] = 1
    drawn = picture(overlay(mask, VALUES))
    factor = drawn.shape[0] // 20
    assert factor > 1 and drawn.shape[:2] == (20 * factor, 20 * factor)
    assert not drawn[: 5 * factor, :, 3].any() and not drawn[:, 15 * factor :, 3].any()
    edge, middle = drawn[5 * factor, 10 * factor], drawn[10 * factor, 10 * factor]
    assert edge[3] > 200 > middle[3] > 20
    assert (edge[:3] == middle[:3]).all()


def test_classes_differ_in_colour_and_texture() -> None:
    drawn = [picture(overlay(np.full((40, 40), value), VALUES)) for value in (1, 2)]
    inner = [image[20:-20, 20:-20] for image in drawn]
    assert (inner[0][0, 0, :3] != inner[1][0, 0, :3]).any()
    assert len(np.unique(inner[0][..., 3])) == 1 and len(np.unique(inner[1][..., 3])) == 2  # plain, and striped
    assert list(legend({1: "wall", 2: "cavity"})) == ["wall", "cavity"]


def test_a_class_has_one_colour_whatever_else_a_slice_shows() -> None:
    alone, both = np.full((8, 8), 2), np.full((8, 8), 2)
    both[:, :4] = 1
    assert (picture(overlay(alone, VALUES))[-1, -1, :3] == picture(overlay(both, VALUES))[-1, -1, :3]).all()


def test_an_empty_mask_and_an_unknown_value() -> None:
    assert not picture(overlay(np.zeros((8, 8), int), VALUES))[..., 3].any()
    assert picture(overlay(np.full((8, 8), 9), VALUES))[..., 3].all()


def test_large_slices_are_made_smaller() -> None:
    plane = np.linspace(0, 1, 900 * 600).reshape(900, 600)
    drawn = picture(grey_picture(plane, 0.0, 1.0))
    assert max(drawn.shape) <= 288 and drawn[0, 0, 0] < 10 and drawn[-1, -1, 0] > 245
    assert max(picture(overlay(np.ones((900, 600), int), VALUES)).shape) <= 512
    assert max(picture(heat_map(plane)).shape) <= 450


def test_damaged_grey_values_are_black() -> None:
    assert (picture(grey_picture(np.full((4, 4), np.nan), 0.0, 1.0))[..., 0] < 5).all()


def test_disagreement_is_seen_through_where_there_is_none() -> None:
    drawn = picture(heat_map(np.array([[0.0, 0.2], [0.5, 1.0]])))
    assert drawn[0, 0, 3] == 0 and drawn[0, 1, 3] > 100 and drawn[1, 1, 3] > 200
    assert drawn[1, 1, :3].sum() > drawn[0, 1, :3].sum()


def test_zoom_keeps_the_organs_in_view() -> None:
    organs = np.zeros((2, 100, 200), bool)
    organs[0, 10:30, 150:170] = True
    zoom, x, y = zoom_to(organs)
    for place, size, origin in ((10, 100, y), (30, 100, y), (150, 200, x), (170, 200, x)):
        where = zoom * (place / size - origin / 100) + origin / 100  # as CSS enlarges about a point
        assert 0 <= where <= 1
    assert zoom > 2 and zoom_to(~organs) == (1.0, 50.0, 50.0) == zoom_to(organs & False)


def test_margins_that_show_nothing_are_cut_off(bench: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "raw" / raw.name
    shutil.copytree(raw, own)
    monkeypatch.setenv("nnUNet_raw", str(own.parent))
    path = own / "imagesTr" / "phantom_tr000_0000.nii.gz"
    image = sitk.ReadImage(str(path))
    array = sitk.GetArrayFromImage(image)
    truth = sitk.GetArrayFromImage(sitk.ReadImage(str(own / "labelsTr" / "phantom_tr000.nii.gz"))) > 0
    array[:, :, :] = np.where(truth, array.max(), 0)
    cut = sitk.GetImageFromArray(array)
    cut.CopyInformation(image)
    sitk.WriteImage(cut, str(path))
    height, width = (int(np.ptp(np.flatnonzero(truth.any(axis=axes)))) + 1 for axes in ((0, 2), (0, 1)))
    case = made(bench).cases[-1]
    assert case.aspect == pytest.approx(width / height, rel=0.15)
    scan, drawn = picture(case.scans[0]), picture((case.layers[1].pictures or [])[0])
    assert scan.shape[0] <= height + 8 and drawn.shape[0] % scan.shape[0] == 0 == drawn.shape[1] % scan.shape[1]


def test_ct_is_shown_in_a_window_of_soft_tissue(raw: Path, bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "raw" / raw.name
    shutil.copytree(raw, own)
    content = json.loads((own / "dataset.json").read_text())
    (own / "dataset.json").write_text(json.dumps({**content, "channel_names": {"0": "CT"}}))
    monkeypatch.setenv("nnUNet_raw", str(own.parent))
    assert "HU" in made(bench).window


# ---------------------------------------------------------------------- disagreement


def properties(**changes: Any) -> dict[str, Any]:
    return {
        "shape_before_cropping": (4, 10, 12), "bbox_used_for_cropping": [[0, 4], [2, 8], [3, 11]],
        "shape_after_cropping_and_before_resampling": (4, 6, 8), **changes,
    }  # fmt: skip


def test_a_map_goes_back_to_where_the_scan_was_cropped() -> None:
    found = to_raw(np.ones((4, 3, 4)), properties(), (0, 1, 2))
    assert found.shape == (4, 10, 12) and found.dtype == np.uint8
    assert (found[:, 2:8, 3:11] == 255).all() and found.sum() == 255 * 4 * 6 * 8


def test_a_map_is_turned_back() -> None:
    found = to_raw(np.ones((4, 6, 8)), properties(), (1, 2, 0))
    assert found.shape == (10, 12, 4)
    half = np.zeros((4, 6, 8))
    half[:2] = 1
    assert not to_raw(half, properties(), (1, 2, 0))[..., 2:].any()


@pytest.fixture
def untrained(workspace: Workspace, tmp_path: Path) -> Run:
    """A run of two networks that have learned nothing, hence disagree."""
    return write_untrained(workspace, tmp_path)


def write_untrained(workspace: Workspace, tmp_path: Path) -> Run:
    trainer = workspace.make()
    trainer.initialize()
    own = RunSpec(SMALL, CONFIGURATION, "nnUNetPlans", "0", "nnUNetTrainerCMEMS", "CMEMS", 1, 1)
    fold = write_run(tmp_path / "bench", dataclasses.replace(own))
    for name in ("plans", "dataset"):
        source = workspace.base / ("nnUNetPlans.json" if name == "plans" else "dataset.json")
        shutil.copy(source, fold.parent / f"{name}.json")
    trainer.save_checkpoint(str(fold / "checkpoint_final.pth"))
    folder = tmp_path / "bench" / "runs" / own.key
    return Run(str(folder), RunRecord(own, "finished", ""))


def test_two_networks_disagree_in_the_raw_scans_space(untrained: Run, workspace: Workspace) -> None:
    found = disagreement(untrained, VALIDATION[:1])[VALIDATION[0]]
    raw = sitk.GetArrayFromImage(sitk.ReadImage(str(workspace.raw / "imagesTr" / f"{VALIDATION[0]}_0000.nii.gz")))
    assert found.shape == raw.shape and found.dtype == np.uint8 and found.max() > 0


def test_one_network_has_nobody_to_disagree_with(workspace: Workspace, tmp_path: Path) -> None:
    workspace.configure(num_members=1)
    run = write_untrained(workspace, tmp_path)
    found = gallery.Gallery()
    assert gallery._disagreements(run, VALIDATION[:1], found) == {} and not found.missing


def test_a_second_report_predicts_nothing_again(untrained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def count(run: Run, cases: list[str]) -> dict[str, np.ndarray]:
        calls.append(list(cases))
        return {case: np.full((2, 3, 4), 51, np.uint8) for case in cases}

    monkeypatch.setattr(gallery, "disagreement", count)
    for _ in range(2):
        found = gallery._disagreements(untrained, CASES[:2], gallery.Gallery())
        assert found[CASES[1]].shape == (2, 3, 4) and found[CASES[1]].max() == pytest.approx(0.2)
    gallery._disagreements(untrained, CASES[:3], gallery.Gallery())
    assert calls == [CASES[:2], CASES[2:3]]
    Path(untrained.fold, "checkpoint_final.pth").write_bytes(b"another")
    gallery._disagreements(untrained, CASES[:1], gallery.Gallery())
    assert calls[2:] == [CASES[:1]]


def test_a_damaged_cache_is_made_again(untrained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "disagreement", lambda run, cases: {case: np.ones((1, 2, 2), np.uint8) for case in cases})
    path = Path(untrained.folder, "gallery", f"{CASES[0]}.npz")
    path.parent.mkdir()
    path.write_bytes(b"half")
    assert CASES[0] in gallery._disagreements(untrained, CASES[:1], gallery.Gallery())
    assert np.load(path)["disagreement"].shape == (1, 2, 2)


@pytest.mark.parametrize("what", ["checkpoint", "preprocessed", "variable"])
def test_without_its_files_the_disagreement_is_left_out(
    what: str, untrained: Run, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "checkpoint":
        Path(untrained.fold, "checkpoint_final.pth").write_bytes(b"damaged")
    elif what == "preprocessed":
        shutil.rmtree(workspace.images)
    else:
        monkeypatch.delenv("nnUNet_preprocessed")
    found = gallery.Gallery()
    assert gallery._disagreements(untrained, VALIDATION[:1], found) == {}
    assert len(found.missing) == 1 and "disagreement is not shown" in found.missing[0]


def test_no_checkpoint_at_all(bench: Path) -> None:
    found = made(bench)
    assert found.cases and not found.disagreement
    assert any("checkpoint_final.pth" in sentence for sentence in found.missing)


def test_the_disagreement_stands_beside_the_method(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = {case: np.full((5, 48, 40), 0.5, np.float32) for case in ("phantom_tr000", "phantom_tr002", "phantom_tr003")}
    monkeypatch.setattr(gallery, "_disagreements", lambda *_: maps)
    found = made(bench)
    assert found.disagreement
    assert [layer.title for layer in found.cases[0].layers][:4] == ["scan", "truth", "CMEMS", "disagreement"]
