"""Region-based labels, and pixels that are not annotated, from the raw data set to masks and an export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import (
    CONFIGURATION,
    DATASET,
    DATASET_ID,
    EXEMPLAR,
    VALIDATION,
    Workspace,
    _pools_are_threads,
    _set_paths,
    logs,
    weights,
)
from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunetv2_cmems.commands.export import export_model
from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.method.label_space import Classes, Regions
from nnunetv2_cmems.trainers import nnUNetTrainerCMEMS_exemplarOnly

# The phantom's values are 1 wall, 2 left cavity, 3 right cavity. The heads follow the names, not the values.
REGIONS: dict[str, Any] = {
    "labels": {"background": 0, "heart": [1, 2, 3], "left cavity": 2, "left": [1, 2]},
    "regions_class_order": [3, 2, 1],
}
NESTED: dict[str, Any] = {
    "labels": {"background": 0, "heart": [1, 2, 3], "left": [1, 2], "left cavity": [2]},
    "regions_class_order": [3, 1, 2],
}
INSIDE = {"heart": (1, 2, 3), "left": (1, 2), "left cavity": (2,)}
IGNORE = 4
UNKNOWN = np.s_[:, :, :20]
"""What is not annotated of the raw scans, (z, y, x) of 5 x 48 x 48; the hearts reach into it."""


def hide(path: Path) -> None:
    mask = sitk.ReadImage(str(path))
    label = sitk.GetArrayFromImage(mask)
    label[UNKNOWN] = IGNORE
    changed = sitk.GetImageFromArray(label)
    changed.CopyInformation(mask)
    sitk.WriteImage(changed, str(path), useCompression=True)


def variant(prepared: Path, root: Path, changes: dict[str, Any], *, hidden: bool) -> Path:
    """The prepared data set with other labels in ``dataset.json``, preprocessed anew by nnU-Net; its plans hold for these too."""
    shutil.copytree(prepared, root, dirs_exist_ok=True)
    raw, base = root / "raw" / DATASET, root / "preprocessed" / DATASET
    shutil.rmtree(base / f"nnUNetPlans_{CONFIGURATION}")
    content = {**json.loads((raw / "dataset.json").read_text()), **changes}
    if hidden:
        content["labels"] = {**content["labels"], "ignore": IGNORE}
        for path in sorted((raw / "labelsTr").iterdir()):
            hide(path)
            shutil.copy(path, base / "gt_segmentations")
    for folder in (raw, base):
        (folder / "dataset.json").write_text(json.dumps(content))
    with pytest.MonkeyPatch.context() as patch:
        _set_paths(patch, root)
        _pools_are_threads(patch)
        preprocess([DATASET_ID], configurations=(CONFIGURATION,), num_processes=(1,))
    return root


@pytest.fixture(scope="module")
def region_data(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return variant(prepared, tmp_path_factory.mktemp("regions"), NESTED, hidden=False)


@pytest.fixture(scope="module")
def ignore_data(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return variant(prepared, tmp_path_factory.mktemp("ignore"), {}, hidden=True)


def use(workspace: Workspace, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A copy of other prepared data, in the environment that the fixture ``workspace`` has made."""
    root = tmp_path / "variant"
    made = Workspace(root, prepared)
    made.configure()
    _set_paths(monkeypatch, root)
    monkeypatch.setenv("nnUNet_raw", str(prepared / "raw"))
    return made


@pytest.fixture
def regions(workspace: Workspace, region_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    return use(workspace, region_data, tmp_path, monkeypatch)


@pytest.fixture
def ignoring(workspace: Workspace, ignore_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    return use(workspace, ignore_data, tmp_path, monkeypatch)


def read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


# ------------------------------------------------------------------ regions


def test_regions_train(regions: Workspace) -> None:
    regions.configure(exemplar=[EXEMPLAR], tau=0.4, num_epochs=2)
    trainer = regions.make()
    assert trainer.label_space == Regions(("heart", "left", "left cavity"), None, ((1, 2, 3), (1, 2), (2,)))
    trainer.initialize()
    begin = weights(trainer)
    trainer.run_training()
    end, logged = weights(trainer), logs(trainer)
    assert all(torch.isfinite(value).all() for value in end.values())
    for member in range(2):
        heads = [key for key in end if key.startswith(f"members.{member}.decoder.seg_layers") and key.endswith("weight")]
        assert heads and all(len(end[key]) == 3 for key in heads)
        assert not torch.equal(begin[heads[-1]], end[heads[-1]])
    for name in (*INSIDE, "mean"):
        assert len(logged[f"agreement/{name}"]) == len(logged[f"pseudo_label_dice/{name}"]) == 2
    assert not [key for key in logged if "background" in key or "cavity" in key and "left" not in key]
    for term in ("supervised", "synthetic", "image", "feature"):
        assert np.isfinite(logged[f"loss/{term}"]).all()
    assert 0 < logged["pseudo_label_accuracy"][0] <= 1
    assert np.isfinite(logged["val_losses"]).all() and len(logged["dice_per_class_or_region"][0]) == 3  # nnU-Net's own


def test_pictures_of_regions(regions: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2_cmems.study.pictures import plot_curves, plot_exemplar

    monkeypatch.setattr("nnunetv2_cmems.trainers.history.plot_curves", plot_curves)
    monkeypatch.setattr("nnunetv2_cmems.trainers.snapshot.plot_exemplar", plot_exemplar)
    regions.train()
    for name in ("exemplar.png", "cmems_progress.png"):
        assert (regions.fold() / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_masks_of_regions_and_their_export(regions: Workspace, pools_are_threads: None, tmp_path: Path) -> None:
    """What was learned comes out under the right values, also from nnU-Net without this package's networks."""
    regions.configure(exemplar=[EXEMPLAR], iterations_per_epoch=150, num_members=2, exemplar_batch=4, architecture="plans")
    trainer = regions.train(nnUNetTrainerCMEMS_exemplarOnly)
    trainer.perform_actual_validation()
    folder = regions.fold("nnUNetTrainerCMEMS_exemplarOnly")
    masks = {case: read(folder / "validation" / f"{case}.nii.gz") for case in VALIDATION}
    truths = {case: read(regions.raw / "labelsTr" / f"{case}.nii.gz") for case in VALIDATION}
    found, truth = np.stack(list(masks.values())), np.stack(list(truths.values()))
    assert set(np.unique(found)) == {0, 1, 2, 3}
    for name, values in INSIDE.items():
        assert dice(np.isin(found, values), np.isin(truth, values)) > 0.35, name
    summary = json.loads((folder / "validation" / "summary.json").read_text())
    assert set(summary["mean"]) == {"(1, 2, 3)", "(1, 2)", "(2,)"}

    assert export_model(str(folder.parent), [0], str(tmp_path / "out")).folds == [0, 1]
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(tmp_path / "out"), (0, 1))
    assert predictor.trainer_name == "nnUNetTrainer"
    for case, mask in masks.items():
        image = sitk.ReadImage(str(regions.raw / "imagesTr" / f"{case}_0000.nii.gz"))
        array = sitk.GetArrayFromImage(image)[None].astype(np.float32)
        again = predictor.predict_single_npy_array(array, {"spacing": list(reversed(image.GetSpacing()))})
        assert np.array_equal(again, mask), case


def test_heads_follow_the_names_of_dataset_json(regions: Workspace) -> None:
    trainer = regions.make(dataset_json={**regions.dataset_json(), **REGIONS})
    assert trainer.label_space == Regions(("heart", "left cavity", "left"), None, ((1, 2, 3), (2,), (1, 2)))
    plain = {"background": 0, "right cavity": 3, "wall": [1], "left cavity": 2, "ignore": 4}
    trainer = regions.make(dataset_json={**regions.dataset_json(), "labels": plain})
    assert trainer.label_space == Classes(("wall", "left cavity", "right cavity"), 4)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda content: content.pop("regions_class_order"), "regions_class_order"),
        (lambda content: content["regions_class_order"].pop(), "regions_class_order"),
        (lambda content: content["labels"].update(ignore=7), "highest label value"),
    ],
)
def test_labels_that_nnunet_cannot_read(regions: Workspace, change: Callable[[dict[str, Any]], Any], named: str) -> None:
    content = regions.dataset_json()
    change(content)
    with pytest.raises(CMEMSError) as error:
        regions.make(dataset_json=content)
    assert "dataset.json" in str(error.value) and named in str(error.value)
    assert not regions.results.exists()


# ------------------------------------------------------------------ not annotated


def with_regions(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, **NESTED, "labels": {**NESTED["labels"], "ignore": IGNORE}}


@pytest.mark.parametrize("change", [dict, with_regions], ids=["classes", "regions"])
def test_what_is_not_annotated_is_not_learned(ignoring: Workspace, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    ignoring.configure(exemplar=[EXEMPLAR], tau=0.4, exemplar_batch=4, synthetic_batch=4)
    trainer = ignoring.train(dataset_json=change(ignoring.dataset_json()))
    assert all(torch.isfinite(value).all() for value in weights(trainer).values())
    logged = logs(trainer)
    assert np.isfinite([values[-1] for key, values in logged.items() if key.startswith("loss/")]).all()
    assert np.isfinite(logged["val_losses"]).all() and len(logged["dice_per_class_or_region"][0]) == 3
    unknown = ignoring.label(str(EXEMPLAR["case"]))[0, 1] == IGNORE
    assert 0.2 < unknown.mean() < 0.8
    assert np.array_equal(trainer._objective.bank.labels[0] == -1, unknown)
    assert (trainer.hidden_labels.labels == -1).any() and trainer.hidden_labels.labels.max() == 3

    batches, outputs = [], []
    draw = trainer._objective.supervised_batch

    def remembered(*arguments: Any) -> Any:
        batches.append(draw(*arguments))
        return batches[-1]

    def network(*arguments: Any) -> Any:
        for output in trainer.network(*arguments):
            output.supervised[0].retain_grad()
            outputs.append(output)
        return outputs

    trainer._objective.supervised_batch = remembered
    trainer._objective(network, *trainer._unlabelled(next(trainer.dataloader_train))[:1], 1.0).total.backward()
    assert len(batches) == len(outputs) == 2
    for batch, output in zip(batches, outputs, strict=True):
        touched = output.supervised[0].grad.abs().sum(1) > 0
        assert not touched[~batch.mask].any() and touched[batch.mask].any()
        assert not batch.mask[: batch.num_exemplar].all(), "half of the exemplar is unknown"


def test_masks_of_a_data_set_with_unknown_pixels(ignoring: Workspace, pools_are_threads: None) -> None:
    ignoring.configure(exemplar=[EXEMPLAR])
    trainer = ignoring.train()
    trainer.perform_actual_validation()
    folder = ignoring.fold() / "validation"
    for case in VALIDATION:
        assert read(folder / f"{case}.nii.gz").max() <= 3
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["mean"]) == {"1", "2", "3"}
    known = read(ignoring.raw / "labelsTr" / f"{VALIDATION[0]}.nii.gz") != IGNORE
    metrics = summary["metric_per_case"][0]["metrics"]["1"]
    assert metrics["TP"] + metrics["FP"] + metrics["FN"] + metrics["TN"] == known.sum()


def test_automatic_exemplar_with_unknown_pixels(ignoring: Workspace) -> None:
    trainer = ignoring.train(nnUNetTrainerCMEMS_exemplarOnly)
    assert set(np.unique(trainer.exemplars[0].label)) == {-1, 0, 1, 2, 3}
