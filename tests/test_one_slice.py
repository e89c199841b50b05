"""Her whole path, each step by its command: suggest, paint, plan_and_preprocess, train, predict."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import PICTURES, QUICK, _pools_are_threads
from few_labels import describe
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run import run_training
from PIL import Image

from nnunetv2_cmems.commands.main import main
from nnunetv2_cmems.data.phantom import make_scan, write_dataset
from nnunetv2_cmems.study.small_configuration import small_configuration

SMALL: dict[str, dict[str, Any]] = {
    "2d": {"patch_size": (32, 32), "spacing": (2.0, 2.0)},
    "3d_fullres": {"patch_size": (4, 32, 32), "spacing": (8.0, 2.0, 2.0)},
}


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Scans and no mask. What nobody has painted yet lies in ``truth``."""
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.delenv("nnUNet_cmems_config", raising=False)
    for picture in PICTURES:
        monkeypatch.setattr(picture, lambda *_: None)
    monkeypatch.setattr(run_training, "load_pretrained_weights", run_training.load_pretrained_weights)
    _pools_are_threads(monkeypatch)
    folder = write_dataset(tmp_path / "raw", 31, "Hers", 4, 0, shape=(6, 40, 40))
    (folder / "labelsTr").rename(tmp_path / "truth")
    (folder / "imagesTr").rename(folder / "imagesUn")
    describe(folder, numTraining=0)
    return folder


def command(*words: str) -> None:
    assert main(words) == 0


def paint(raw: Path, case: str, axis: int, index: int, ending: str = ".nii.gz") -> None:
    """Paint the organs into the empty mask, as somebody does who leaves the rest of the slice alone."""
    template = raw / "suggestions" / f"{case}{ending}"
    mask = sitk.ReadImage(str(template))
    voxels = sitk.GetArrayFromImage(mask)
    truth = sitk.GetArrayFromImage(sitk.ReadImage(str(raw.parent.parent / "truth" / f"{case}.nii.gz")))
    place = (slice(None),) * axis + (index,)
    voxels[place] = np.where(truth[place] > 0, truth[place], voxels[place])
    painted = sitk.GetImageFromArray(voxels)
    painted.CopyInformation(mask)
    (raw / "labelsTr").mkdir(exist_ok=True)
    sitk.WriteImage(painted, str(raw / "labelsTr" / template.name))


def add_small_configuration(raw: Path, base: str) -> str:
    path = raw.parent.parent / "preprocessed" / raw.name / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    name = f"{base}_small"
    plans["configurations"][name] = small_configuration(plans, base, name, features=(8, 16, 16), batch_size=4, **SMALL[base])
    path.write_text(json.dumps(plans))
    return name


def train(raw: Path, configuration: str, fold: str = "all", **config: Any) -> Path:
    base = raw.parent.parent / "preprocessed" / raw.name
    (base / "cmems.json").write_text(json.dumps({**QUICK, **config}))
    run_training.run_training(raw.name, configuration, fold, "nnUNetTrainerCMEMS", device=torch.device("cpu"))
    return raw.parent.parent / "results" / raw.name / f"nnUNetTrainerCMEMS__nnUNetPlans__{configuration}" / f"fold_{fold}"


def predict(model: Path, fold: str, scans: Path, output: Path) -> list[Path]:
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (fold,), "checkpoint_final.pth")
    output.mkdir()
    predictor.predict_from_files_sequential(str(scans), str(output))
    return sorted(path for path in output.iterdir() if path.suffix in (".gz", ".png"))


@pytest.mark.parametrize("base", ["2d", "3d_fullres"])
def test_from_scans_to_masks(raw: Path, tmp_path: Path, base: str, capsys: pytest.CaptureFixture[str]) -> None:
    command("suggest", "-d", "31", "-n", "2", "-np", "1")
    said = capsys.readouterr().out
    case = next(line.split(".", 1)[1].split(",")[0].strip() for line in said.splitlines() if line.startswith("1."))
    command("suggest", "-d", "31", "--move", case)
    truth = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "truth" / f"{case}.nii.gz")))
    index = int((truth > 0).sum((1, 2)).argmax())
    paint(raw, case, 0, index)
    command("plan_and_preprocess", "-d", "31", "-c", base, "-np", "1", "-npfp", "1")
    configuration = add_small_configuration(raw, base)
    command("plan_and_preprocess", "-d", "31", "-c", configuration, "-np", "1", "-npfp", "1")
    fold = train(raw, configuration, allow_missing_classes=True)
    record = json.loads((fold / "cmems_config.json").read_text())
    assert record["exemplars"] == [{"case": case, "slice": index, "axis": "z"}]
    assert len(record["unlabelled"]) == 3 and case not in record["unlabelled"]
    with Image.open(fold / "unlabelled.png") as picture:
        assert min(picture.size) > 300
    masks = predict(fold.parent, "all", raw / "imagesUn", tmp_path / "masks")
    assert [mask.name for mask in masks] == [f"{name}.nii.gz" for name in record["unlabelled"]]
    voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(masks[0])))
    assert voxels.shape == (6, 40, 40) and set(np.unique(voxels)) <= {0, 1, 2, 3}


@pytest.mark.parametrize("axis", [1, 2])
def test_a_coronal_or_sagittal_slice_in_2d(raw: Path, axis: int) -> None:
    """The 2D configuration then cuts its slices along the painted axis."""
    case = sorted(path.name for path in (raw / "imagesUn").iterdir())[0].removesuffix("_0000.nii.gz")
    command("suggest", "-d", "31", "-n", "4", "-np", "1")
    command("suggest", "-d", "31", "--move", case)
    truth = sitk.GetArrayFromImage(sitk.ReadImage(str(raw.parent.parent / "truth" / f"{case}.nii.gz")))
    others = tuple(a for a in range(3) if a != axis)
    index = int((truth > 0).sum(others).argmax())
    paint(raw, case, axis, index)
    command("plan_and_preprocess", "-d", "31", "-c", "2d", "-np", "1", "-npfp", "1")
    path = raw.parent.parent / "preprocessed" / raw.name / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    assert plans["transpose_forward"][0] == axis
    plans["configurations"]["2d_small"] = small_configuration(
        plans, "2d", "2d_small", patch_size=(8, 32), spacing=tuple(plans["configurations"]["2d"]["spacing"]), features=(8, 16), batch_size=4
    )
    path.write_text(json.dumps(plans))
    command("plan_and_preprocess", "-d", "31", "-c", "2d_small", "-np", "1", "-npfp", "1")
    fold = train(raw, "2d_small", allow_missing_classes=True)
    assert json.loads((fold / "cmems_config.json").read_text())["exemplars"] == [{"case": case, "slice": index, "axis": "zyx"[axis]}]


def test_colour_pictures(tmp_path: Path, raw: Path) -> None:
    """PNG files, three channels in one file, one painted picture."""
    shutil.rmtree(raw / "imagesUn")
    (raw / "imagesUn").mkdir()
    for i in range(5):
        image, label = make_scan((7, i), (1, 48, 48))
        shade = np.clip(image[0] / image.max() * 255, 0, 255).astype(np.uint8)
        Image.fromarray(np.stack([shade, shade // 2, 255 - shade], -1)).save(raw / "imagesUn" / f"p{i}_0000.png")
        Image.fromarray(label[0].astype(np.uint8)).save(tmp_path / f"p{i}.png")
    describe(raw, channel_names={"0": "R", "1": "G", "2": "B"}, file_ending=".png")
    command("suggest", "-d", "31", "-n", "1", "-np", "1", "--move")
    (case,) = (path.name.removesuffix("_0000.png") for path in (raw / "imagesTr").iterdir())
    template = np.array(Image.open(raw / "suggestions" / f"{case}.png"))
    assert template.shape == (48, 48) and (template == 4).all()
    truth = np.array(Image.open(tmp_path / f"{case}.png"))
    (raw / "labelsTr").mkdir(exist_ok=True)
    Image.fromarray(np.where(truth > 0, truth, template)).save(raw / "labelsTr" / f"{case}.png")
    command("plan_and_preprocess", "-d", "31", "-c", "2d", "-np", "1", "-npfp", "1")
    path = raw.parent.parent / "preprocessed" / raw.name / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    plans["configurations"]["2d_small"] = small_configuration(
        plans, "2d", "2d_small", patch_size=(32, 32), spacing=(1.0, 1.0), features=(8, 16), batch_size=4
    )
    path.write_text(json.dumps(plans))
    command("plan_and_preprocess", "-d", "31", "-c", "2d_small", "-np", "1", "-npfp", "1")
    fold = train(raw, "2d_small")
    assert json.loads((fold / "cmems_config.json").read_text())["exemplars"] == [{"case": case, "slice": 0, "axis": "z"}]
    masks = predict(fold.parent, "all", raw / "imagesUn", tmp_path / "masks")
    assert len(masks) == 4 and np.array(Image.open(masks[0])).shape == (48, 48)


def test_training_before_anything_was_preprocessed(raw: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:  # nnU-Net's own; the command shows it as one sentence, see test_errors.py
        run_training.run_training(raw.name, "2d", "all", "nnUNetTrainerCMEMS", device=torch.device("cpu"))
    assert str(error.value.filename).endswith("nnUNetPlans.json")
