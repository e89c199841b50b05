"""``nnUNetv2_cmems plan_and_preprocess``, from the raw data set to what nnU-Net trains on."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from few_labels import LABELLED, NAME, NOT_ANNOTATED, SHAPE, UNLABELLED, describe, edit, few, mask_path, paint, refusal, rewrite, scan_path
from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess as nnunet_preprocess
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from skimage import io

from nnunetv2_cmems.commands import main
from nnunetv2_cmems.commands.plan_and_preprocess import plan_and_preprocess
from nnunetv2_cmems.data import preprocessing
from nnunetv2_cmems.data.phantom import LABELS, make_scan
from nnunetv2_cmems.data.planning import PlannerOptions
from nnunetv2_cmems.data.preprocessing import read_manifest

SLICE = 2


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One scan with one painted slice, three without a mask."""
    folder = few(tmp_path, monkeypatch)
    paint(folder, LABELLED, (0, SLICE))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The data set's preprocessed folder, which does not exist yet."""
    return tmp_path / "preprocessed" / NAME


def run(*configurations: str, **arguments: Any) -> None:
    plan_and_preprocess(27, configurations or ["2d"], **arguments)


def manifest(base: Path, configuration: str = "2d") -> dict[str, Any]:
    content = read_manifest(str(base / f"nnUNetPlans_{configuration}"))
    assert content is not None
    return content


def read(path: Path) -> np.ndarray:
    return np.array(blosc2.open(str(path))[:])


def image(base: Path, case: str, configuration: str = "2d") -> np.ndarray:
    """A preprocessed image (C, Z, Y, X)."""
    sibling = "" if "_tr" in case else "_unlabelled"
    return read(base / f"nnUNetPlans_{configuration}{sibling}" / f"{case}.b2nd")


def mask(base: Path, case: str = LABELLED, configuration: str = "2d") -> np.ndarray:
    return read(base / f"nnUNetPlans_{configuration}" / f"{case}_seg.b2nd")[0]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def files_of(*cases: str, labelled: bool = False) -> set[str]:
    return {f"{case}{ending}" for case in cases for ending in ([".b2nd", "_seg.b2nd", ".pkl"] if labelled else [".b2nd", ".pkl"])}


def stamps(base: Path) -> dict[str, int]:
    """When each preprocessed case's files were written."""
    return {path.name: path.stat().st_mtime_ns for path in base.glob("nnUNetPlans_2d*/phantom*")}


def redone(before: dict[str, int], after: dict[str, int]) -> set[str]:
    return {name.split(".")[0].removesuffix("_seg") for name in after if after[name] != before.get(name)}


def by_nnunet(base: Path, raw: Path, case: str, configuration: str = "2d") -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """What nnU-Net's own preprocessor makes of a case."""
    plans = PlansManager(str(base / "nnUNetPlans.json"))
    label = str(mask_path(raw)) if case == LABELLED else None
    dataset_json = json.loads((raw / "dataset.json").read_text())
    preprocessor = DefaultPreprocessor(verbose=False)
    data, seg, properties = preprocessor.run_case(
        [str(scan_path(raw, case))], label, plans, plans.get_configuration(configuration), dataset_json
    )
    return data, seg, properties


# ------------------------------------------------------------------ what is written


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_images_are_nnunets(raw: Path, base: Path, configuration: str) -> None:
    edit(scan_path(raw, UNLABELLED[0]), spacing=(2.0, 2.0, 6.0))
    run(configuration)
    for case in (LABELLED, *UNLABELLED):
        data, seg, properties = by_nnunet(base, raw, case, configuration)
        np.testing.assert_array_equal(image(base, case, configuration), data)
        folder = base / f"nnUNetPlans_{configuration}{'' if case == LABELLED else '_unlabelled'}"
        saved = load_pickle(str(folder / f"{case}.pkl"))
        assert set(saved) - set(properties) == {"nnunetv2_cmems"} and set(properties) <= set(saved)
        assert saved["shape_before_cropping"] == properties["shape_before_cropping"]
        assert ("class_locations" in saved) == (case == LABELLED)
        if case == LABELLED:
            np.testing.assert_array_equal(mask(base, case, configuration), seg[0])


def test_files(raw: Path, base: Path) -> None:
    run()
    assert names(base.parent) == {NAME}
    assert names(base) == {
        "dataset.json", "dataset_fingerprint.json", "nnUNetPlans.json", "cmems_scans.json", "gt_segmentations",
        "nnUNetPlans_2d", "nnUNetPlans_2d_unlabelled",
    }  # fmt: skip
    labelled, unlabelled = base / "nnUNetPlans_2d", base / "nnUNetPlans_2d_unlabelled"
    assert names(labelled) == files_of(LABELLED, labelled=True)
    assert names(unlabelled) == files_of(*UNLABELLED) | {"cmems_preprocessing.json"}
    assert (base / "dataset.json").read_bytes() == (raw / "dataset.json").read_bytes()
    assert (base / "gt_segmentations" / f"{LABELLED}.nii.gz").read_bytes() == mask_path(raw).read_bytes()
    assert len(json.loads((base / "dataset_fingerprint.json").read_text())["spacings"]) == 4
    content = manifest(base)
    assert content["complete"] is True and content["skipped"] == {}
    assert content["labelled"] == [LABELLED] and content["unlabelled"] == UNLABELLED
    assert content["annotation"] == {LABELLED: {"planes": [["z", SLICE]], "classes": [1, 2, 3], "partial": []}}
    state = scan_path(raw, UNLABELLED[0]).stat()
    assert content["cases"][UNLABELLED[0]]["sources"] == {f"imagesUn/{UNLABELLED[0]}_0000.nii.gz": [state.st_size, state.st_mtime_ns]}
    plans = json.loads((base / "nnUNetPlans.json").read_text())
    assert content["configuration_signature"] == preprocessing.configuration_signature(plans, "2d")


def test_nnunet_reads_both_folders(raw: Path, base: Path) -> None:
    run()
    assert infer_dataset_class(str(base / "nnUNetPlans_2d")) is nnUNetDatasetBlosc2
    data, seg, _, properties = nnUNetDatasetBlosc2(str(base / "nnUNetPlans_2d")).load_case(LABELLED)
    assert data.shape[1:] == seg.shape[1:] and len(properties["class_locations"][1]) > 0
    assert sorted(nnUNetDatasetBlosc2.get_identifiers(str(base / "nnUNetPlans_2d_unlabelled"))) == UNLABELLED


def test_several_processes(raw: Path, base: Path) -> None:
    run(num_processes=[2])
    assert manifest(base)["complete"]
    for case in (LABELLED, UNLABELLED[2]):
        np.testing.assert_array_equal(image(base, case), by_nnunet(base, raw, case)[0])


@pytest.mark.parametrize(
    ("spacing", "axis"),
    [((8.0, 1.5, 1.5), 0), ((8.0, 1.5, 1.5), 2), ((1.5, 1.5, 1.5), 0), ((1.5, 1.5, 1.5), 1), ((0.8, 1.5, 1.5), 0), ((1.5, 1.5, 6.0), 0)],
)
def test_painted_slice_survives_resampling_alone(raw: Path, base: Path, spacing: tuple[float, ...], axis: int) -> None:
    """The median scan has other spacings, so that this one is resampled, within its slices only."""
    others = tuple(1.3 * s for s in spacing)
    for case in UNLABELLED:
        edit(scan_path(raw, case), spacing=others[::-1])
    edit(scan_path(raw, LABELLED), spacing=spacing[::-1])
    _, label = make_scan((0, 0, 0), SHAPE)
    index = int(np.moveaxis(label, axis, 0).astype(bool).sum(axis=(1, 2)).argmax())
    edit(mask_path(raw), lambda _: label, spacing=spacing[::-1])
    paint(raw, LABELLED, (axis, index))
    run()
    found, plane = mask(base), np.moveaxis(label, axis, 0)[index]
    assert found.shape[0] == SHAPE[axis] and found.shape[1:] != plane.shape
    assert set(np.unique(np.delete(found, index, axis=0))) == {NOT_ANNOTATED}
    assert NOT_ANNOTATED not in found[index]
    factor = found[index].size / plane.size
    for value in LABELS.values():
        if (plane == value).sum() > 20:
            assert (found[index] == value).sum() == pytest.approx(factor * (plane == value).sum(), rel=0.25), value


def test_organs_painted_without_background(raw: Path, base: Path) -> None:
    def organs_only(labels: np.ndarray) -> np.ndarray:
        return np.where(labels == 0, NOT_ANNOTATED, labels).astype(labels.dtype)

    edit(mask_path(raw), organs_only)
    run()
    assert manifest(base)["annotation"][LABELLED]["planes"] == [["z", SLICE]]
    assert 0 not in mask(base) and {1, 2, 3} <= set(np.unique(mask(base)[SLICE]))


def test_empty_surroundings_do_not_change_the_normalisation(raw: Path, base: Path) -> None:
    """With "not annotated" in them they would count for the mean and the standard deviation."""
    edit(mask_path(raw), lambda labels: np.pad(labels, ((0, 0), (20, 20), (20, 20)), constant_values=NOT_ANNOTATED))

    def surround(scan: np.ndarray) -> np.ndarray:
        padded = np.pad(scan + 1, ((0, 0), (20, 20), (20, 20)))
        padded[:, 0, 0] = padded[:, -1, -1] = 1.0  # so that cropping leaves the surroundings
        return padded

    edit(scan_path(raw, LABELLED), surround)
    shutil.copy(scan_path(raw, LABELLED), scan_path(raw, UNLABELLED[0]))
    for case in UNLABELLED[1:]:  # the planner uses the mask where most scans lose much by cropping
        edit(scan_path(raw, case), lambda scan: np.pad(scan, ((0, 0), (20, 20), (20, 20))))
    run()
    assert json.loads((base / "nnUNetPlans.json").read_text())["configurations"]["2d"]["use_mask_for_norm"] == [True]
    np.testing.assert_array_equal(image(base, LABELLED), image(base, UNLABELLED[0]))


def test_ct_is_normalised_by_all_scans(raw: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    describe(raw, channel_names={"0": "CT"})
    run()
    statistics = json.loads((base / "nnUNetPlans.json").read_text())["foreground_intensity_properties_per_channel"]["0"]
    scan = sitk.GetArrayFromImage(sitk.ReadImage(str(scan_path(raw, LABELLED))))
    clipped = np.clip(scan, statistics["percentile_00_5"], statistics["percentile_99_5"])
    np.testing.assert_allclose(image(base, LABELLED)[0], (clipped - statistics["mean"]) / statistics["std"], atol=1e-4)
    before = stamps(base)
    edit(scan_path(raw, UNLABELLED[0]), lambda scan: scan * 2)
    run()
    assert redone(before, stamps(base)) == {UNLABELLED[0]}, "the fingerprint is kept"
    assert "CT is normalised" not in capsys.readouterr().out
    paint(raw, LABELLED, (0, SLICE))
    run()
    assert f"intensities by which CT is normalised were measured before '{LABELLED}' changed" in capsys.readouterr().out
    run(clean=True)
    assert redone(before, stamps(base)) == {LABELLED, *UNLABELLED}


@pytest.mark.parametrize("ending", [".nrrd", ".nii"])
def test_other_formats(raw: Path, base: Path, ending: str) -> None:
    rewrite(raw, ending)
    run()
    assert manifest(base)["complete"] and set(np.unique(mask(base)[SLICE])) == {0, 1, 2, 3}


def test_flat_images_channels_and_regions(raw: Path, base: Path) -> None:
    """PNG files of two channels, their organs in regions, one image annotated in its left part only."""
    for folder in ("imagesTr", "labelsTr", "imagesUn"):
        shutil.rmtree(raw / folder)
        (raw / folder).mkdir()
    describe(
        raw,
        file_ending=".png",
        channel_names={"0": "grey", "1": "inverse"},
        labels={"background": 0, "heart": [1, 2, 3], "cavities": [2, 3], "left cavity": 2, "ignore": NOT_ANNOTATED},
        regions_class_order=[1, 3, 2],
    )
    for number in range(4):
        scan, label = make_scan((5, number), (1, 40, 48))
        grey = (255 * scan[0] / scan.max()).astype(np.uint8)
        folder, case = ("imagesTr", LABELLED) if number == 0 else ("imagesUn", UNLABELLED[number - 1])
        io.imsave(raw / folder / f"{case}_0000.png", grey, check_contrast=False)
        io.imsave(raw / folder / f"{case}_0001.png", 255 - grey, check_contrast=False)
        if number == 0:
            label[:, :, 30:] = NOT_ANNOTATED
            io.imsave(raw / "labelsTr" / f"{case}.png", label[0], check_contrast=False)
    run()
    assert image(base, LABELLED).shape == image(base, UNLABELLED[2]).shape == (2, 1, 40, 48)
    assert (mask(base)[0, :, 30:] == NOT_ANNOTATED).all() and NOT_ANNOTATED not in mask(base)[0, :, :30]
    assert manifest(base)["annotation"][LABELLED]["planes"] == [["z", 0]]
    locations = load_pickle(str(base / "nnUNetPlans_2d" / f"{LABELLED}.pkl"))["class_locations"]
    assert {(1, 2, 3), (2, 3), 2} <= set(locations)
    plans = json.loads((base / "nnUNetPlans.json").read_text())
    assert list(plans["configurations"]) == ["2d"] and plans["image_reader_writer"] == "NaturalImage2DIO"


def test_whole_volumes_without_unlabelled_scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    raw = few(tmp_path, monkeypatch)
    shutil.rmtree(raw / "imagesUn")
    run()
    assert names(base / "nnUNetPlans_2d") == files_of(LABELLED, labelled=True)
    assert not (base / "nnUNetPlans_2d_unlabelled").exists() and read_manifest(str(base / "nnUNetPlans_2d")) is None
    before = stamps(base)
    run()
    assert stamps(base) == before
    paint(raw, LABELLED, (0, SLICE))
    run()
    assert names(base / "nnUNetPlans_2d_unlabelled") == {"cmems_preprocessing.json"} and manifest(base)["labelled"] == [LABELLED]


def test_folder_of_unlabelled_scans_leaves_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    raw = few(tmp_path, monkeypatch)
    run()
    assert manifest(base)["annotation"][LABELLED]["planes"] is None
    shutil.rmtree(raw / "imagesUn")
    run()
    assert not (base / "nnUNetPlans_2d_unlabelled").exists()


# ------------------------------------------------------------------ configurations


def test_custom_configurations_survive_and_can_be_preprocessed(raw: Path, base: Path) -> None:
    run()
    path = base / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    plans["configurations"]["2d_small"] = {"inherits_from": "2d", "data_identifier": "nnUNetPlans_2d_small", "spacing": [3.0, 3.0]}
    path.write_text(json.dumps(plans))
    run("2d_small")
    assert json.loads(path.read_text())["configurations"]["2d_small"]["spacing"] == [3.0, 3.0]
    assert image(base, UNLABELLED[0], "2d_small").shape == (1, 5, 18, 20)


def test_planners_that_share_their_images_do_not_redo_them(raw: Path, base: Path) -> None:
    run()
    before = stamps(base)
    run(options=PlannerOptions("nnUNetPlannerResEncM"))
    assert stamps(base) == before and (base / "nnUNetResEncUNetMPlans.json").is_file()


def test_unknown_configuration(raw: Path, base: Path) -> None:
    assert "no configuration '2d_smal'" in refusal(lambda: run("2d", "2d_smal"))
    assert not base.exists()


def test_planes_along_different_axes(raw: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """2D slices are cut along one axis only."""
    other = "phantom_tr001"
    scan_path(raw, UNLABELLED[2]).rename(scan_path(raw, other))
    shutil.copy(mask_path(raw), raw / "labelsTr" / f"{other}.nii.gz")
    edit(raw / "labelsTr" / f"{other}.nii.gz", lambda _: make_scan((0, 0, 0), SHAPE)[1])
    paint(raw, other, (2, 20))
    said = refusal(run)
    assert f"z in {LABELLED}, x in {other}" in said and "3d_fullres" in said
    assert not base.exists()
    plan_and_preprocess(27)
    assert "2d cuts all slices along one, so it is left out" in capsys.readouterr().out
    assert not (base / "nnUNetPlans_2d").exists()
    assert manifest(base, "3d_fullres")["annotation"][other]["planes"] == [["x", 20]]


# ------------------------------------------------------------------ a second call


def test_second_call_does_nothing(raw: Path, base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    before = stamps(base)
    monkeypatch.setattr("nnunetv2_cmems.data.planning._look", None)  # nothing is read
    run()
    assert stamps(base) == before and manifest(base)["complete"]
    assert "0 of them preprocessed now" in capsys.readouterr().out


def test_what_has_changed_is_redone(raw: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run()
    before = stamps(base)
    edit(scan_path(raw, UNLABELLED[1]), lambda scan: scan[:, ::-1])
    run()
    assert redone(before, stamps(base)) == {UNLABELLED[1]}
    np.testing.assert_array_equal(image(base, UNLABELLED[1]), by_nnunet(base, raw, UNLABELLED[1])[0])

    before = stamps(base)
    edit(mask_path(raw), lambda _: make_scan((0, 0, 0), SHAPE)[1])
    paint(raw, LABELLED, (0, 1), (0, 3))
    run()
    assert redone(before, stamps(base)) == {LABELLED}
    assert manifest(base)["annotation"][LABELLED]["planes"] == [["z", 1], ["z", 3]]
    assert (base / "gt_segmentations" / f"{LABELLED}.nii.gz").read_bytes() == mask_path(raw).read_bytes()

    before = stamps(base)
    describe(raw, labels={"background": 0, "heart": [1, 2, 3], "right": [3], "ignore": 4}, regions_class_order=[1, 3])
    run()
    assert redone(before, stamps(base)) == {LABELLED}
    assert (1, 2, 3) in load_pickle(str(base / "nnUNetPlans_2d" / f"{LABELLED}.pkl"))["class_locations"]
    assert "The fingerprint was made" not in capsys.readouterr().out


def test_cases_come_and_go(raw: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run()
    before = stamps(base)
    fingerprint = (base / "dataset_fingerprint.json").read_bytes()
    scan_path(raw, UNLABELLED[0]).unlink()
    shutil.copy(scan_path(raw, UNLABELLED[1]), scan_path(raw, "phantom_un007"))
    scan_path(raw, UNLABELLED[2]).rename(scan_path(raw, "phantom_tr009"))
    shutil.copy(mask_path(raw), raw / "labelsTr" / "phantom_tr009.nii.gz")
    run()
    assert names(base / "nnUNetPlans_2d_unlabelled") == files_of(UNLABELLED[1], "phantom_un007") | {"cmems_preprocessing.json"}
    assert names(base / "nnUNetPlans_2d") == files_of(LABELLED, "phantom_tr009", labelled=True)
    assert redone(before, stamps(base)) == {"phantom_un007", "phantom_tr009"}
    assert manifest(base)["unlabelled"] == [UNLABELLED[1], "phantom_un007"]
    said = capsys.readouterr().out
    assert "made from 1 labelled and 3 unlabelled scans; the data set has 2 labelled and 2 unlabelled scans now" in said
    assert (base / "dataset_fingerprint.json").read_bytes() == fingerprint
    run(clean=True)
    assert json.loads((base / "dataset_fingerprint.json").read_text())["nnunetv2_cmems"]["labelled"] == [LABELLED, "phantom_tr009"]


def test_plans_of_another_spacing_redo_everything(raw: Path, base: Path) -> None:
    run("2d", "3d_fullres")
    before = {case: image(base, case, "3d_fullres").shape for case in (LABELLED, *UNLABELLED)}
    flat = stamps(base)
    run("2d", "3d_fullres", options=PlannerOptions(target_spacing=(8.0, 3.0, 3.0)))
    assert all(image(base, case, "3d_fullres").shape == (1, 5, 18, 20) != shape for case, shape in before.items())
    assert redone(flat, stamps(base)) == {LABELLED, *UNLABELLED}, "2d takes its spacing from there"


def test_what_the_user_put_there_stays(raw: Path, base: Path) -> None:
    run()
    kept = {
        base / "splits_final.json": json.dumps([{"train": [LABELLED], "val": []}]),
        base / "cmems.json": "{}",
        base / "nnUNetPlans_2d" / "notes.txt": "mine",
        base / "nnUNetPlans_2d_unlabelled" / "notes.txt": "mine",
        base / "gt_segmentations" / "other.nii.gz": "mine",
    }
    for path, text in kept.items():
        path.write_text(text)
    shutil.rmtree(raw / "imagesUn")
    run(clean=True)
    assert {path: path.read_text() for path in kept} == kept


def test_after_nnunets_own_preprocessing(raw: Path, base: Path, pools_are_threads: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Its fingerprint knows the labelled scans only; its cases carry no signature, and a case may have left since."""
    run()
    fingerprint = json.loads((base / "dataset_fingerprint.json").read_text())
    (base / "dataset_fingerprint.json").write_text(json.dumps({k: v for k, v in fingerprint.items() if k != "nnunetv2_cmems"}))
    nnunet_preprocess([27], configurations=("2d",), num_processes=(1,))
    for ending in (".npz", ".npy"):
        (base / "nnUNetPlans_2d" / f"{LABELLED}{ending}").touch()
    (base / "nnUNetPlans_2d" / "gone.b2nd").touch()
    before = stamps(base)
    run()
    assert redone(before, stamps(base)) == {LABELLED}
    assert names(base / "nnUNetPlans_2d") == files_of(LABELLED, labelled=True)
    assert "made anew" in capsys.readouterr().out
    assert json.loads((base / "dataset_fingerprint.json").read_text()) == fingerprint


@pytest.mark.parametrize("victim", [f"nnUNetPlans_2d/{LABELLED}_seg.b2nd", f"nnUNetPlans_2d_unlabelled/{UNLABELLED[0]}.pkl"])
@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_damaged_case_is_redone(raw: Path, base: Path, victim: str, how: str) -> None:
    run()
    before = stamps(base)
    if how == "missing":
        (base / victim).unlink()
    else:
        os.truncate(base / victim, (base / victim).stat().st_size // 2)
    run()
    assert redone(before, stamps(base)) == {Path(victim).name.split(".")[0].removesuffix("_seg")}
    assert manifest(base)["complete"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
@pytest.mark.parametrize("replacement", range(8, 18))
def test_killed_in_the_middle(raw: Path, base: Path, replacement: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies at its n-th file that is moved into place; a second call ends as if nothing had happened."""
    child = os.fork()
    if child == 0:
        calls, replace = iter(range(100)), os.replace
        os.replace = lambda *paths: os._exit(9) if next(calls) == replacement else replace(*paths)  # type: ignore[assignment, func-returns-value]
        try:
            run()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not manifest(base)["complete"]
    whole = stamps(base)
    run()
    assert manifest(base)["complete"]
    assert names(base / "nnUNetPlans_2d") == files_of(LABELLED, labelled=True)
    assert names(base / "nnUNetPlans_2d_unlabelled") == files_of(*UNLABELLED) | {"cmems_preprocessing.json"}
    assert not [name for name in names(base) if "unfinished" in name or name.endswith(".tmp")]
    finished = {name.removesuffix(".pkl") for name in whole if name.endswith(".pkl")}
    assert redone(whole, stamps(base)) == {LABELLED, *UNLABELLED} - finished
    for case in (LABELLED, *UNLABELLED):
        np.testing.assert_array_equal(image(base, case), by_nnunet(base, raw, case)[0])


# ------------------------------------------------------------------ no space


def free(monkeypatch: pytest.MonkeyPatch, *numbers: float) -> None:
    """Let the device have so many free bytes; the last number holds from then on."""
    left = list(numbers)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=left.pop(0) if len(left) > 1 else left[0]))


def test_no_space_to_begin_with(raw: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 500)
    said = refusal(run)
    assert "no space" in said and "4 images" in said and "0.0 MB are free" in said
    assert not base.exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("Error while creating the NDArray")])
def test_space_runs_out(raw: Path, base: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """blosc2 says nothing about the reason."""
    with monkeypatch.context() as patch:
        save, calls = nnUNetDatasetBlosc2.save_case, iter(range(100))

        def fail(data: np.ndarray, seg: np.ndarray, properties: Any, stem: str, **arguments: Any) -> None:
            if next(calls) == 2:
                Path(f"{stem}.b2nd").write_text("half")
                raise error
            save(data, seg, properties, stem, **arguments)

        patch.setattr(nnUNetDatasetBlosc2, "save_case", staticmethod(fail))
        free(patch, 1e9, 1e9 if isinstance(error, OSError) else 10)
        said = refusal(run)
    assert "not enough space" in said and "the 2 cases still to be preprocessed" in said and "The 2 finished ones are kept" in said
    assert not manifest(base)["complete"]
    assert names(base / "nnUNetPlans_2d_unlabelled") == files_of(UNLABELLED[0]) | {"cmems_preprocessing.json"}
    before = stamps(base)
    run()
    assert redone(before, stamps(base)) == set(UNLABELLED[1:]) and manifest(base)["complete"]


def test_space_will_not_do(raw: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compression of the first cases tells what the others will need."""
    monkeypatch.setattr(preprocessing, "_PILOT", 2)
    with monkeypatch.context() as patch:
        free(patch, 1e9, 10_000)
        said = refusal(run)
    assert "the 2 cases still to be preprocessed" in said and "10000" not in said
    run()
    assert manifest(base)["complete"]


def test_other_failures_name_the_case(raw: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("RGB images are uint 8")

    monkeypatch.setattr(DefaultPreprocessor, "run_case", fail)
    said = refusal(run)
    assert f"case '{LABELLED}'" in said and "RGB images are uint 8" in said


# ------------------------------------------------------------------ bad input


def test_unreadable_scan_is_skipped_when_asked_for(raw: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = scan_path(raw, UNLABELLED[1])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    said = refusal(run)
    assert str(path) in said and "--skip_unreadable" in said and not base.exists()
    run(skip_unreadable=True)
    assert list(manifest(base)["skipped"]) == [UNLABELLED[1]] and manifest(base)["unlabelled"] == [UNLABELLED[0], UNLABELLED[2]]
    assert "1 scan(s) were skipped" in (said := capsys.readouterr().out) and str(path) in said
    before = stamps(base)
    run(skip_unreadable=True)
    assert "The fingerprint was made" not in capsys.readouterr().out, "nothing has changed"
    path.write_bytes(whole)
    run()
    assert redone(before, stamps(base)) == {UNLABELLED[1]} and not manifest(base)["skipped"]


def test_a_broken_link_is_skipped_when_asked_for(raw: Path, base: Path) -> None:
    path = scan_path(raw, UNLABELLED[1])
    path.unlink()
    path.symlink_to(raw / "gone.nii.gz")
    assert str(path) in refusal(run)
    run(skip_unreadable=True)
    assert list(manifest(base)["skipped"]) == [UNLABELLED[1]] and manifest(base)["unlabelled"] == [UNLABELLED[0], UNLABELLED[2]]


def test_slices_that_are_annotated_in_part_are_named(raw: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run()
    assert "Annotated in part" not in capsys.readouterr().out

    def erase(labels: np.ndarray, pixels: int) -> np.ndarray:
        labels[SLICE][labels[SLICE] == 0] = NOT_ANNOTATED
        labels[SLICE, 0, :pixels] = labels[SLICE, 1, :pixels] = 0
        return labels

    for pixels, said in ((3, False), (SHAPE[2], True)):
        edit(mask_path(raw), functools.partial(erase, pixels=pixels))
        for _ in range(2):  # also where the mask is not read again
            run()
            told = capsys.readouterr().out
            assert (f"Annotated in part, beside background (0): slice {SLICE} along z of {mask_path(raw)}." in told) == said
            assert f"paint what holds 0 there with {NOT_ANNOTATED}" in told or not said


def test_images_of_another_ending_are_named(raw: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(scan_path(raw, UNLABELLED[0]), raw / "imagesUn" / "other_0000.NII.GZ")
    run()
    assert "1 image(s) do not end with '.nii.gz'" in (said := capsys.readouterr().out) and "other_0000.NII.GZ" in said


@pytest.mark.parametrize("place", ["raw", "preprocessed"])
def test_unlabelled_case_in_a_validation_fold(raw: Path, base: Path, place: str) -> None:
    folder = raw if place == "raw" else base
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "splits_final.json").write_text(
        json.dumps([{"train": [LABELLED], "val": []}, {"train": [LABELLED], "val": [UNLABELLED[0]], "unlabelled": [UNLABELLED[1]]}])
    )
    said = refusal(run)
    assert "fold 1" in said and UNLABELLED[0] in said
    assert names(base) == (set() if place == "raw" else {"splits_final.json"})
    (folder / "splits_final.json").write_text("{}")
    run()
    (folder / "splits_final.json").write_text('[{"train": []}]')
    assert "splits_final.json is no list of folds" in refusal(run)


def bad_dataset_json(raw: Path) -> None:
    (raw / "dataset.json").unlink()


def bad_value(raw: Path) -> None:
    edit(mask_path(raw), lambda labels: np.where(labels == 1, 7, labels).astype(labels.dtype))


def bad_template(raw: Path) -> None:
    edit(mask_path(raw), lambda labels: np.full_like(labels, NOT_ANNOTATED))


def bad_geometry(raw: Path) -> None:
    edit(mask_path(raw), origin=(10.0, 0.0, 0.0))


def bad_place(raw: Path) -> None:
    shutil.copy(scan_path(raw, LABELLED), raw / "imagesUn")


def bad_channel(raw: Path) -> None:
    shutil.copy(scan_path(raw, UNLABELLED[0]), raw / "imagesUn" / f"{UNLABELLED[0]}_0001.nii.gz")


@pytest.mark.parametrize("spoil", [bad_dataset_json, bad_value, bad_template, bad_geometry, bad_place, bad_channel])
def test_bad_input_writes_and_loses_nothing(raw: Path, base: Path, spoil: Any) -> None:
    run()
    before = {path: path.stat().st_mtime_ns for path in base.rglob("*") if path.is_file()}
    spoil(raw)
    refusal(run)
    assert {path: path.stat().st_mtime_ns for path in base.rglob("*") if path.is_file()} == before
    shutil.rmtree(base.parent)
    refusal(run)
    assert not base.parent.exists()


def test_preprocessed_folder_is_not_set(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_preprocessed")
    assert "nnUNet_preprocessed is not set" in refusal(run)


# ------------------------------------------------------------------ command line


def command(*arguments: str) -> int:
    return main.main(["plan_and_preprocess", *arguments])


def test_command_line(raw: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: Sequence[str] = ("-d", "27", "-pl", "nnUNetPlannerResEncL", "-gpu_memory_target", "12", "-overwrite_plans_name", "Mine")
    assert command(*options, "-c", "2d", "3d_fullres", "-np", "1", "1", "-npfp", "1", "-overwrite_target_spacing", "8", "1.5", "2") == 0
    plans = json.loads((base / "Mine.json").read_text())
    assert plans["configurations"]["3d_fullres"]["spacing"] == [8.0, 1.5, 2.0]
    assert (base / "nnUNetPlans_2d_unlabelled").is_dir() and (base / "nnUNetPlans_3d_fullres_unlabelled").is_dir()
    assert f"{NAME}, Mine, 2d: 1 labelled and 3 unlabelled cases, 4 of them preprocessed now." in capsys.readouterr().out


def test_command_line_refuses(raw: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("-d", "27", "-c", "2d", "-np", "1", "2") == 1
    assert "-np has 2 numbers for 1 configurations" in capsys.readouterr().err
    assert command("-d", "27", "-c", "2d", "-np", "0") == 1
    assert command("-d", "28", "-np", "1") == 1
    error = capsys.readouterr().err
    assert "no data set 28" in error and "Traceback" not in error
    assert not base.exists()
