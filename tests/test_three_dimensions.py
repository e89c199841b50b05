"""Volumes: from one annotated volume, or one annotated slice of it, to masks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CASES, DATASET, DATASET_ID, TRAINING, Workspace, _pools_are_threads, _set_paths, same_weights, weights
from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from PIL import Image

from nnunetv2_cmems.config import SpatialConfig
from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.method.perturbations import draw_deformation, rotation_planes
from nnunetv2_cmems.study.small_configuration import small_configuration
from nnunetv2_cmems.trainers import nnUNetTrainerCMEMS_exemplarOnly
from nnunetv2_cmems.trainers.cmems import _turned

CONFIGURATION = "3d_fullres_small"
PATCH = (4, 32, 32)


@pytest.fixture(scope="module")
def volumes(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared data set, preprocessed by nnU-Net for a small 3D configuration."""
    root = tmp_path_factory.mktemp("volumes")
    shutil.copytree(prepared, root, dirs_exist_ok=True)
    path = root / "preprocessed" / DATASET / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    plans["configurations"][CONFIGURATION] = small_configuration(
        plans, "3d_fullres", CONFIGURATION, patch_size=PATCH, spacing=(8.0, 2.0, 2.0), features=(8, 16, 16), batch_size=4
    )
    path.write_text(json.dumps(plans))
    with pytest.MonkeyPatch.context() as patch:
        _set_paths(patch, root)
        _pools_are_threads(patch)
        preprocess([DATASET_ID], configurations=(CONFIGURATION,), num_processes=(1,))
    return root


class Volumes(Workspace):
    def __init__(self, root: Path, prepared: Path) -> None:
        super().__init__(root, prepared)
        self.images = self.base / f"nnUNetPlans_{CONFIGURATION}"

    def make(self, *arguments: Any, **keywords: Any) -> Any:
        return super().make(*arguments, **{"configuration": CONFIGURATION, **keywords})

    def fold(self, trainer: str = "nnUNetTrainerCMEMS", fold: int | str = 0) -> Path:
        return self.results / DATASET / f"{trainer}__nnUNetPlans__{CONFIGURATION}" / f"fold_{fold}"

    def exemplars(self, trainer: str = "nnUNetTrainerCMEMS") -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((self.fold(trainer) / "cmems_config.json").read_text())["exemplars"]
        return found


@pytest.fixture
def space(volumes: Path, workspace: Workspace, tmp_path: Path) -> Volumes:
    shutil.rmtree(workspace.base)
    made = Volumes(tmp_path, volumes)
    made.configure()
    return made


def test_one_volume_is_chosen_and_trained_from(space: Volumes, pools_are_threads: None) -> None:
    trainer = space.train()
    (exemplar,) = space.exemplars()
    assert exemplar["case"] in TRAINING and exemplar["slice"] is None
    assert set(trainer.history.curves) >= {"loss/supervised", "loss/synthetic", "loss/image", "loss/feature", "pseudo_label_dice/mean"}
    trainer.perform_actual_validation()
    summary = json.loads((space.fold() / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 2
    with Image.open(space.fold() / "unlabelled.png") as picture:
        assert min(picture.size) > 300


def test_the_networks_are_three_dimensional_and_predict_whole_scans(space: Volumes, tmp_path: Path) -> None:
    trainer = space.train()
    assert any(isinstance(module, torch.nn.Conv3d) for module in trainer.network.modules())
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(space.fold().parent), (0,), "checkpoint_final.pth")
    image = space.image(CASES[4])
    logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image))
    assert logits.shape == (4, *image.shape[1:]) and torch.isfinite(logits.float()).all()


@pytest.mark.parametrize("axis", ["x", "y", "z"])
def test_one_slice_of_a_volume_along_any_axis(space: Volumes, axis: str) -> None:
    index = {"z": 2, "y": 22, "x": 22}[axis]
    space.configure(exemplar=[{"case": CASES[1], "slice": index, "axis": axis}], allow_missing_classes=True)
    trainer = space.train()
    assert space.exemplars() == [{"case": CASES[1], "slice": index, "axis": axis}]
    assert "loss/synthetic" not in trainer.history.curves and "loss/image" in trainer.history.curves
    assert trainer._objective.batches.synthetic == 0 and trainer._objective.batches.exemplar == 2


def test_only_the_annotated_slice_supervises(space: Volumes) -> None:
    """Labels of other slices may be anything, in the preprocessed volume and in the native mask's other slices."""
    space.configure(exemplar=[{"case": CASES[1], "slice": 2}], allow_missing_classes=True)
    found = []
    for value in (1, 3):
        label = space.label(CASES[1])
        space.set_label(CASES[1], np.full_like(label, value))
        found.append(weights(space.train(nnUNetTrainerCMEMS_exemplarOnly)))
    assert same_weights(*found)


def test_a_slice_that_does_not_exist(space: Volumes) -> None:
    space.configure(exemplar=[{"case": CASES[1], "slice": 5}])
    with pytest.raises(CMEMSError, match="no slice 5 along z: the image has 5"):
        space.train()


def test_synthesis_alone_needs_a_whole_volume(space: Volumes) -> None:
    space.configure(exemplar=[{"case": CASES[1], "slice": 2}], allow_missing_classes=True, supervised={"enabled": False})
    with pytest.raises(CMEMSError, match="no synthetic images: only slices of volumes are annotated.*switch it on"):
        space.train()


# ------------------------------------------------------------------ geometry


def test_thick_slices_are_not_tilted() -> None:
    assert rotation_planes((1.0, 1.2, 1.1)) == [(1, 2), (0, 2), (0, 1)]
    assert rotation_planes((8.0, 1.0, 1.0)) == [(1, 2)]
    assert rotation_planes((1.0, 8.0, 1.0)) == [(0, 2)]
    assert rotation_planes((1.0, 8.0)) == [(0, 1)]


def test_volumes_are_turned_in_millimetres() -> None:
    """A ball stays a ball: the matrix, taken to millimetres, is a rotation."""
    spacing = torch.tensor([2.0, 1.0, 0.8])
    config = SpatialConfig(rotation=45.0, scale=(1.0, 1.0), shift=0.0, elastic=0.0)
    matrix = draw_deformation(20, (6, 12, 14), config, torch.device("cpu"), spacing.tolist()).matrix
    rotation = matrix * spacing[:, None] / spacing[None, :]
    identity = torch.eye(3).expand(20, 3, 3)
    torch.testing.assert_close(rotation @ rotation.transpose(1, 2), identity, rtol=0, atol=1e-5)
    assert (matrix - identity).abs().amax((1, 2)).min() > 0.01


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (8.0, 1.0, 1.0), (2.0, 1.0, 1.0)])
def test_crops_leave_room_for_turning(spacing: tuple[float, ...]) -> None:
    """Few voxels are read from beyond the crop: corners of the strongest turns, as with nnU-Net's own rule."""
    patch, limit = (16, 40, 40), 15.0
    crop = _turned(patch, spacing, np.deg2rad(limit), (0.85, 1.2))
    assert all(c >= n for c, n in zip(crop, patch, strict=True))
    config = SpatialConfig(rotation=limit, scale=(0.85, 1.2), shift=0.0, elastic=0.0)
    torch.manual_seed(0)
    places = draw_deformation(100, patch, config, torch.device("cpu"), spacing).offsets.abs()
    assert float((places > torch.tensor(crop) / 2).any(-1).float().mean()) < 0.01
    assert float((places > torch.tensor(patch) / 2).any(-1).float().mean()) > 0.05, "the patch itself would be too small"
    if spacing[0] == 8.0:
        assert crop[0] == pytest.approx(16 / 0.85)
