"""Where the images of a training come from: one labelled case and scans of ``imagesUn``, no validation labels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import CASES, CONFIGURATION, DATASET, TRAINING, VALIDATION, Workspace, same_weights, weights
from PIL import Image

from nnunetv2_cmems.data.preprocessing import configuration_signature
from nnunetv2_cmems.data.sources import MANIFEST, unlabelled_folder
from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.trainers import nnUNetTrainerCMEMS, nnUNetTrainerCMEMS_allLabels, nnUNetTrainerCMEMS_exemplarOnly

LABELLED, SCANS = CASES[1], [CASES[0], *CASES[2:]]


def move_to_unlabelled(workspace: Workspace, cases: list[str], complete: bool = True) -> Path:
    """As nnUNetv2_cmems plan_and_preprocess leaves scans of imagesUn: no label, no class_locations."""
    folder = Path(unlabelled_folder(str(workspace.images)))
    folder.mkdir()
    for case in cases:
        workspace.change_properties(case, class_locations={})
        for suffix in (".b2nd", ".pkl"):
            shutil.move(workspace.images / (case + suffix), folder / (case + suffix))
        (workspace.images / f"{case}_seg.b2nd").unlink()
        (workspace.base / "gt_segmentations" / f"{case}.nii.gz").unlink()
    (folder / MANIFEST).write_text(json.dumps({"complete": complete}))
    return folder


@pytest.fixture
def hers(workspace: Workspace) -> Workspace:
    """One labelled case, five scans in imagesUn, no splits."""
    move_to_unlabelled(workspace, SCANS)
    (workspace.base / "splits_final.json").unlink()
    return workspace


def record(workspace: Workspace, fold: int | str = 0) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((workspace.fold(fold=fold) / "cmems_config.json").read_text())
    return content


def organ_slices(workspace: Workspace, case: str) -> list[int]:
    return np.flatnonzero((workspace.label(case) > 0).any(axis=(0, 2, 3))).tolist()


@pytest.mark.parametrize("fold", [0, "all"])
def test_one_labelled_case_is_enough(hers: Workspace, fold: int | str) -> None:
    trainer = hers.train(fold=fold)
    found = record(hers, fold)
    assert found["exemplars"] == [{"case": LABELLED, "slice": None, "axis": None}]
    assert {e.slice for e in trainer.exemplars} >= set(organ_slices(hers, LABELLED)), "everything that is annotated is used"
    assert found["unlabelled"] == SCANS
    assert trainer.hidden_labels is None and np.isnan(trainer.logger.get_value("val_losses", step=-1))
    assert trainer.history.curves["agreement/mean"] and (hers.fold(fold=fold) / "checkpoint_best.pth").is_file()
    assert not (hers.base / "splits_final.json").exists(), "nnU-Net would split by it for ever"


def test_the_exemplar_that_is_chosen_validates_nothing(workspace: Workspace) -> None:
    """In fold ``all``, where every other labelled case does; neither in a training that begins nor in one that goes on."""
    move_to_unlabelled(workspace, CASES[3:])
    workspace.configure(exemplar="one", num_epochs=2)
    begun = workspace.interrupted(1, workspace.make(fold="all"))
    (chosen,) = record(workspace, "all")["exemplars"]
    validated = [case for case in CASES[:3] if case != chosen["case"]]
    continued = workspace.resume(fold="all")
    continued.run_training()
    for trainer in (begun, continued):
        assert sorted(trainer.dataloader_val.data_loader._data.identifiers) == validated == trainer.do_split()[1]


def test_the_end_of_training_shows_unlabelled_scans(hers: Workspace, pools_are_threads: None) -> None:
    trainer = hers.train()
    trainer.perform_actual_validation()
    with Image.open(hers.fold() / "unlabelled.png") as picture:
        assert min(picture.size) > 300
    assert not (hers.fold() / "validation").exists()


def test_the_picture_can_be_had_again_by_val(hers: Workspace, pools_are_threads: None) -> None:
    hers.train()
    again = hers.make()
    again.load_checkpoint(str(hers.fold() / "checkpoint_final.pth"))
    again.perform_actual_validation()
    assert (hers.fold() / "unlabelled.png").is_file()


def test_a_resumed_run_goes_on(hers: Workspace) -> None:
    hers.configure(num_epochs=3)
    hers.interrupted(2)
    resumed = hers.resume()
    resumed.run_training()
    assert len(resumed.logger.get_value("val_losses", step=None)) == 3


def test_what_is_not_annotated_is_not_learned(hers: Workspace) -> None:
    """Pixels of the ignore label may hold anything: the network after training is the same."""
    dataset_json = hers.dataset_json()
    dataset_json["labels"]["ignore"] = 4
    (hers.base / "dataset.json").write_text(json.dumps(dataset_json))
    native = hers.base / "gt_segmentations" / f"{LABELLED}.nii.gz"
    middle = organ_slices(hers, LABELLED)[1]
    mask = sitk.ReadImage(str(native))
    voxels = sitk.GetArrayFromImage(mask)
    voxels[[z for z in range(len(voxels)) if z != middle]] = 4
    partly = sitk.GetImageFromArray(voxels)
    partly.CopyInformation(mask)
    sitk.WriteImage(partly, str(native))
    label = hers.label(LABELLED)
    label[:, [z for z in range(label.shape[1]) if z != middle]] = 4
    hers.set_label(LABELLED, label)
    found = []
    for run in range(2):
        found.append(weights(hers.train(nnUNetTrainerCMEMS_exemplarOnly)))
        changed = hers.image(LABELLED)
        changed[:, [z for z in range(changed.shape[1]) if z != middle]] = run
        hers.set_image(LABELLED, changed)
    assert record_of(hers, "nnUNetTrainerCMEMS_exemplarOnly") == [{"case": LABELLED, "slice": middle, "axis": "z"}]
    assert same_weights(*found)


def test_the_log_says_what_of_an_exemplar_is_not_annotated(hers: Workspace) -> None:
    dataset_json = hers.dataset_json()
    dataset_json["labels"]["ignore"] = 4
    (hers.base / "dataset.json").write_text(json.dumps(dataset_json))
    label = hers.label(LABELLED)
    label[:, 1, :, : label.shape[3] // 4] = 4
    hers.set_label(LABELLED, label)
    for number, said in ((1, True), (2, False)):
        hers.configure(exemplar=[{"case": LABELLED, "slice": number}])
        trainer = hers.make()
        trainer.initialize()
        trainer.get_dataloaders()
        told = [line for line in Path(trainer.log_file).read_text().splitlines() if f"slice {number} along z" in line]
        assert [", of which 25.00% are not annotated and left out" in line for line in told] == [said]


def record_of(workspace: Workspace, trainer: str) -> list[dict[str, Any]]:
    exemplars: list[dict[str, Any]] = json.loads((workspace.fold(trainer) / "cmems_config.json").read_text())["exemplars"]
    return exemplars


def test_named_exemplars_of_a_data_set_with_unlabelled_scans(hers: Workspace) -> None:
    middle = organ_slices(hers, LABELLED)[1]
    hers.configure(exemplar=[{"case": LABELLED, "slice": middle}])
    hers.train()
    assert record(hers)["exemplars"] == [{"case": LABELLED, "slice": middle, "axis": "z"}]


def test_all_annotations_of_a_labelled_data_set(workspace: Workspace) -> None:
    """Few-shot: nothing of the training cases is left unlabelled, so that scans of imagesUn are needed."""
    workspace.configure(exemplar="all")
    with pytest.raises(CMEMSError, match="no unlabelled training case beside the exemplar"):
        workspace.train()
    workspace.configure(exemplar=[{"case": case} for case in TRAINING[:2]])
    trainer = workspace.train()
    expected = {(case, z) for case in TRAINING[:2] for z in organ_slices(workspace, case)}
    assert {(e.case, e.slice) for e in trainer.exemplars} >= expected
    assert [(e["case"], e["slice"]) for e in record(workspace)["exemplars"]] == [(case, None) for case in TRAINING[:2]]
    assert record(workspace)["unlabelled"] == TRAINING[2:]


def test_training_from_all_labels_goes_on(workspace: Workspace) -> None:
    """Also where slices without organs are among the exemplars, which nobody could name one by one."""
    label = workspace.label(TRAINING[0])
    label[:, 0] = 0  # as if preprocessing had lost the organ
    workspace.set_label(TRAINING[0], label)
    workspace.configure(num_epochs=2)
    stopped = workspace.interrupted(1, workspace.make(nnUNetTrainerCMEMS_allLabels))
    assert not all((exemplar.label > 0).any() for exemplar in stopped.exemplars)
    resumed = workspace.resume(nnUNetTrainerCMEMS_allLabels)
    resumed.run_training()
    assert resumed.current_epoch == 2
    assert [e.spec for e in resumed.exemplars] == [e.spec for e in stopped.exemplars]


def test_validation_labels_are_used_where_a_split_names_them(workspace: Workspace) -> None:
    move_to_unlabelled(workspace, TRAINING[2:])
    splits = workspace.base / "splits_final.json"
    splits.write_text(json.dumps([{"train": TRAINING[:2], "val": VALIDATION}]))
    trainer = workspace.train()
    assert not np.isnan(trainer.logger.get_value("val_losses", step=-1))
    assert {e["case"] for e in record(workspace)["exemplars"]} == set(TRAINING[:2])
    assert record(workspace)["unlabelled"] == TRAINING[2:]


def test_a_split_without_validation_cases(workspace: Workspace) -> None:
    (workspace.base / "splits_final.json").write_text(json.dumps([{"train": TRAINING, "val": []}]))
    trainer = workspace.train()
    assert np.isnan(trainer.logger.get_value("val_losses", step=-1)) and len(trainer.exemplars) == 1
    assert trainer.hidden_labels is not None, "hidden labels of unlabelled training cases are still there to log by"


def test_a_split_may_list_the_unlabelled_cases(workspace: Workspace) -> None:
    move_to_unlabelled(workspace, TRAINING[2:])
    splits = workspace.base / "splits_final.json"
    splits.write_text(json.dumps([{"train": TRAINING[:2], "val": VALIDATION, "unlabelled": [TRAINING[3]]}]))
    workspace.train()
    assert record(workspace)["unlabelled"] == [TRAINING[3]]


@pytest.mark.parametrize(
    ("listed", "sentence"),
    [
        (["nobody"], "lists 'nobody' as unlabelled"),
        ([VALIDATION[0]], "a validation case of the fold at once"),
        ([TRAINING[0]], "an exemplar at once"),
        ("all", "must be a list of case names"),
    ],
)
def test_bad_lists_of_unlabelled_cases(workspace: Workspace, listed: Any, sentence: str) -> None:
    move_to_unlabelled(workspace, TRAINING[2:])
    (workspace.base / "splits_final.json").write_text(json.dumps([{"train": TRAINING[:2], "val": VALIDATION, "unlabelled": listed}]))
    with pytest.raises(CMEMSError, match=sentence):
        workspace.train()


def test_a_scan_that_is_a_validation_case_too(workspace: Workspace) -> None:
    folder = move_to_unlabelled(workspace, TRAINING[2:])
    for suffix in (".b2nd", ".pkl"):
        shutil.copy(workspace.images / (VALIDATION[0] + suffix), folder / (VALIDATION[0] + suffix))
    (workspace.base / "splits_final.json").write_text(json.dumps([{"train": TRAINING[:2], "val": VALIDATION}]))
    with pytest.raises(CMEMSError, match=f"'{VALIDATION[0]}' is an unlabelled case"):
        workspace.train()


def test_interrupted_preprocessing_is_not_trained_on(workspace: Workspace) -> None:
    folder = move_to_unlabelled(workspace, SCANS, complete=False)
    with pytest.raises(CMEMSError, match=r"was interrupted; run nnUNetv2_cmems plan_and_preprocess again"):
        workspace.train(fold="all")
    (folder / MANIFEST).write_text("{")
    with pytest.raises(CMEMSError, match=MANIFEST):
        workspace.train(fold="all")


def test_scans_preprocessed_with_other_plans(workspace: Workspace) -> None:
    folder = move_to_unlabelled(workspace, SCANS)
    signature = configuration_signature(workspace.plans(), CONFIGURATION)
    (folder / MANIFEST).write_text(json.dumps({"complete": True, "configuration_signature": signature}))
    workspace.train(fold="all")
    plans = workspace.plans()
    plans["configurations"][CONFIGURATION]["normalization_schemes"] = ["RescaleTo01Normalization"]
    with pytest.raises(CMEMSError, match="was preprocessed with other plans; run nnUNetv2_cmems plan_and_preprocess again"):
        workspace.train(fold="all", plans=plans)


def test_scans_that_were_never_preprocessed(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans = tmp_path / "raw" / DATASET / "imagesUn"
    scans.mkdir(parents=True)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    workspace.train()
    (scans / "new_0000.nii.gz").write_bytes(b"")
    with pytest.raises(CMEMSError, match=r"imagesUn has scans that are not preprocessed.*nnUNetv2_cmems plan_and_preprocess"):
        workspace.train()


def test_no_labelled_case(hers: Workspace) -> None:
    for path in hers.images.glob(f"{LABELLED}*"):
        path.unlink()
    with pytest.raises(CMEMSError, match="no labelled case"):
        hers.train()


def test_a_best_checkpoint_that_needs_labels(hers: Workspace) -> None:
    hers.configure(best_checkpoint="validation_dice")
    with pytest.raises(CMEMSError, match="no validation case to follow"):
        hers.train()


def test_a_configuration_that_is_not_preprocessed(hers: Workspace) -> None:
    shutil.rmtree(hers.images)
    with pytest.raises(CMEMSError, match=r"is not preprocessed for configuration '2d_small'"):
        hers.train()


def test_the_trainer_reads_no_raw_data(hers: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_raw")
    hers.train(nnUNetTrainerCMEMS)
