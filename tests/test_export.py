"""An exported model: stock nnU-Net predicts the same masks with it, without this package; every refusal is a sentence."""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

import nnunetv2_cmems.trainers  # noqa: F401  (its import teaches nnU-Net to predict with members)
from nnunetv2_cmems.commands import export
from nnunetv2_cmems.commands.export import export_model, export_student, find_model_folder
from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.method.networks import MutualNetworks
from nnunetv2_cmems.trainers import distillation

DATASET = "Dataset901_Made"
IDENTIFIER = "nnUNetTrainerCMEMS__nnUNetPlans__2d"
DATASET_JSON = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "disc": 1, "spot": 2},
    "numTraining": 3,
    "file_ending": ".nii.gz",
}
RESAMPLING = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
PLANS: dict[str, Any] = {
    "dataset_name": DATASET,
    "plans_name": "nnUNetPlans",
    "image_reader_writer": "SimpleITKIO",
    "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2],
    "label_manager": "LabelManager",
    "foreground_intensity_properties_per_channel": {"0": {"mean": 0.0, "std": 1.0, "percentile_00_5": -2.0, "percentile_99_5": 2.0}},
    "configurations": {
        "2d": {
            "data_identifier": "nnUNetPlans_2d",
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": 2,
            "patch_size": [32, 32],
            "spacing": [1.0, 1.0],
            "normalization_schemes": ["ZScoreNormalization"],
            "use_mask_for_norm": [False],
            "resampling_fn_data": "resample_data_or_seg_to_shape",
            "resampling_fn_seg": "resample_data_or_seg_to_shape",
            "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
            "resampling_fn_data_kwargs": RESAMPLING,
            "resampling_fn_seg_kwargs": {**RESAMPLING, "is_seg": True},
            "resampling_fn_probabilities_kwargs": RESAMPLING,
            "batch_dice": True,
            "architecture": {
                "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
                "arch_kwargs": {
                    "n_stages": 2,
                    "features_per_stage": [8, 16],
                    "conv_op": "torch.nn.modules.conv.Conv2d",
                    "kernel_sizes": [[3, 3], [3, 3]],
                    "strides": [[1, 1], [2, 2]],
                    "n_conv_per_stage": [1, 1],
                    "n_conv_per_stage_decoder": [1],
                    "conv_bias": True,
                    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
                    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                    "dropout_op": None,
                    "dropout_op_kwargs": None,
                    "nonlin": "torch.nn.LeakyReLU",
                    "nonlin_kwargs": {"inplace": True},
                },
                "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
            },
        }
    },
}


def make_member() -> nn.Module:
    architecture = PLANS["configurations"]["2d"]["architecture"]
    return get_network_from_plans(
        architecture["network_class_name"], architecture["arch_kwargs"], architecture["_kw_requires_import"], 1, 3, deep_supervision=False
    )


def draw(num: int, size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Noisy discs with a bright spot: images and labels of shape (num, *size)."""
    y, x = np.mgrid[: size[0], : size[1]]
    labels = np.zeros((num, *size), dtype=np.int64)
    for label in labels:
        distance = np.hypot(y - rng.uniform(0.3, 0.7) * size[0], x - rng.uniform(0.3, 0.7) * size[1])
        label[distance < rng.uniform(7, 10)] = 1
        label[distance < rng.uniform(3, 5)] = 2
    return (np.array([-1.0, 0.5, 3.0])[labels] + rng.normal(scale=0.2, size=labels.shape)).astype(np.float32), labels


def networks(seed: int, num_members: int, steps: int) -> MutualNetworks:
    """Members that have each seen a little training, so that few voxels are undecided."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = MutualNetworks(make_member, num_members)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        images, labels = draw(4, (32, 32), rng)
        optimizer.zero_grad()
        for member in model.members:
            nn.functional.cross_entropy(member(torch.from_numpy(images)[:, None]), torch.from_numpy(labels)).backward()
        optimizer.step()
    return model.eval()


def save(model: nn.Module, file: Path, **changes: Any) -> None:
    """A checkpoint as the trainer writes it, with all that ``weights_only=True`` refuses."""
    init_args = {"plans": PLANS, "configuration": "2d", "fold": 0, "dataset_json": DATASET_JSON, "device": torch.device("cpu")}
    checkpoint = {
        "network_weights": model.state_dict(),
        "optimizer_state": torch.optim.SGD(model.parameters(), lr=0.01).state_dict(),
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float64(0.5)]},
        "_best_ema": np.float64(0.5),
        "current_epoch": 3,
        "init_args": init_args,
        "trainer_name": "nnUNetTrainerCMEMS",
        "inference_allowed_mirroring_axes": (0, 1),
        "cmems": {"config": {"tau": 0.95}},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**checkpoint, **changes}, file)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only lose by more threads, and lose a lot where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained() -> list[MutualNetworks]:
    """Two trained folds of two members each."""
    return [networks(seed, 2, steps=60) for seed in (0, 1)]


@pytest.fixture
def model_folder(tmp_path: Path, trained: list[MutualNetworks], monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "results" / DATASET / IDENTIFIER
    for fold, model in enumerate(trained):
        save(model, folder / f"fold_{fold}" / "checkpoint_final.pth")
    for name, content in (("plans", PLANS), ("dataset", DATASET_JSON), ("dataset_fingerprint", {"spacings": [[1.0, 1.0, 1.0]]})):
        (folder / f"{name}.json").write_text(json.dumps(content))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    return folder


@pytest.fixture(scope="module")
def scan() -> np.ndarray:
    """Shape (1, 6, 44, 52): several tiles a slice."""
    return draw(6, (44, 52), np.random.default_rng(5))[0][None]


def our_predictor(parameters: list[MutualNetworks]) -> nnUNetPredictor:
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    plans = PlansManager(copy.deepcopy(PLANS))
    model = MutualNetworks(make_member, len(parameters[0].members))
    weights = [copy.deepcopy(dict(m.state_dict())) for m in parameters]
    predictor.manual_initialization(model, plans, plans.get_configuration("2d"), weights, DATASET_JSON, "nnUNetTrainerCMEMS", (0, 1))
    return predictor


def segment(predictor: nnUNetPredictor, image: np.ndarray) -> np.ndarray:
    return predictor.predict_single_npy_array(image, {"spacing": [1.0, 1.0, 1.0]})


def stock_predictor(folder: Path, folds: tuple[int, ...]) -> nnUNetPredictor:
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), folds)
    return predictor


def only(model: MutualNetworks, member: int) -> MutualNetworks:
    alone = MutualNetworks(make_member, 1)
    alone.members[0].load_state_dict(model.members[member].state_dict())
    return alone


WITHOUT_THE_PACKAGE = """
import os, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "nnunetv2_cmems":
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Blocker())
os.environ.pop("nnUNet_extTrainer", None)
try:
    import nnunetv2_cmems
except ImportError:
    pass
else:
    raise SystemExit("the package can be imported")
import numpy as np
import torch
torch.set_num_threads(1)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

image = np.load(sys.argv[1])
for folder, folds, out in (job.split("|") for job in sys.argv[2:]):
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(folder, tuple(int(fold) for fold in folds.split(",")))
    assert predictor.trainer_name == "nnUNetTrainer"
    np.save(out, predictor.predict_single_npy_array(image, {"spacing": [1.0, 1.0, 1.0]}))
assert not any(name.split(".")[0] == "nnunetv2_cmems" for name in sys.modules)
"""


def test_stock_nnunet_predicts_the_same_masks_without_the_package(
    model_folder: Path, trained: list[MutualNetworks], scan: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student stands for any network that distillation makes; here it is the second member."""
    student = only(trained[0], 1)
    monkeypatch.setattr(distillation, "distil", lambda *_, **__: student.state_dict())
    (model_folder / "fold_0" / "cmems_config.json").write_text('{"unlabelled": ["scan"]}')
    assert export_student(str(model_folder), [0], str(tmp_path / "student"), device="cpu").folds == [0]
    assert export_model(str(model_folder), [0], str(tmp_path / "one")).folds == [0, 1]
    assert export_model(str(model_folder), [0, "1"], str(tmp_path / "both")).folds == [0, 1, 2, 3]
    assert export_model(str(model_folder), [0], str(tmp_path / "first"), member=0).folds == [0]
    expected = {
        "one|0,1": segment(our_predictor(trained[:1]), scan),
        "both|0,1,2,3": segment(our_predictor(trained), scan),
        "first|0": segment(our_predictor([only(trained[0], 0)]), scan),
        "student|0": segment(our_predictor([student]), scan),
    }
    np.save(tmp_path / "scan.npy", scan)
    jobs = [f"{tmp_path / job}|{tmp_path / job.split('|')[0]}.npy" for job in expected]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "nnUNet_extTrainer"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", WITHOUT_THE_PACKAGE, str(tmp_path / "scan.npy"), *jobs]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    for job, ours in expected.items():
        theirs = np.load(tmp_path / f"{job.split('|')[0]}.npy")
        assert theirs.shape == ours.shape == scan.shape[1:]
        assert set(np.unique(ours)) == {0, 1, 2}
        assert np.array_equal(theirs, ours), job
    for alone in ("first|0", "student|0"):
        assert not np.array_equal(expected["one|0,1"], expected[alone])


def test_logits_of_one_fold_are_the_same_to_the_last_bit(model_folder: Path, scan: np.ndarray, tmp_path: Path) -> None:
    """Also where nothing but the rounding of nnU-Net's half precision decides: these networks are untrained."""
    raw = networks(3, 2, steps=0)
    save(raw, model_folder / "fold_7" / "checkpoint_final.pth")
    export_model(str(model_folder), [7], str(tmp_path / "out"))
    data = torch.from_numpy(scan)
    ours = our_predictor([raw]).predict_logits_from_preprocessed_data(data)
    theirs = stock_predictor(tmp_path / "out", (0, 1)).predict_logits_from_preprocessed_data(data)
    assert torch.equal(ours, theirs)


def test_exported_files(model_folder: Path, trained: list[MutualNetworks], tmp_path: Path) -> None:
    out = tmp_path / "new" / "exported"
    export_model(str(model_folder), [1], str(out))
    assert sorted(path.name for path in out.iterdir()) == [
        "dataset.json", "dataset_fingerprint.json", "exported_from.json", "fold_0", "fold_1", "plans.json"
    ]  # fmt: skip
    assert [path.name for path in out.parent.iterdir()] == ["exported"]  # nothing temporary is left
    for name in ("plans.json", "dataset.json", "dataset_fingerprint.json"):
        assert (out / name).read_bytes() == (model_folder / name).read_bytes()
    note = json.loads((out / "exported_from.json").read_text())
    assert note["model"] == IDENTIFIER
    assert note["folds"]["fold_1"] == {"fold": "1", "member": 1, "checkpoint": "checkpoint_final.pth"}
    checkpoint = torch.load(out / "fold_1" / "checkpoint_final.pth", weights_only=True)
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    assert checkpoint["inference_allowed_mirroring_axes"] == (0, 1)
    assert checkpoint["init_args"] == {"plans": PLANS, "configuration": "2d", "fold": 1, "dataset_json": DATASET_JSON}
    expected = trained[1].members[1].state_dict()
    assert list(checkpoint["network_weights"]) == list(expected)
    assert all(torch.equal(checkpoint["network_weights"][key], value) for key, value in expected.items())


def test_no_scan_is_named(trained: list[MutualNetworks], model_folder: Path, tmp_path: Path) -> None:
    """Names of files often are names of patients."""
    listed = {**DATASET_JSON, "dataset": {"Doe_John": {"images": ["Doe_John.nii.gz"], "label": "Doe_John_seg.nii.gz"}}}
    record = {"config": {}, "exemplars": [{"case": "Doe_John", "slice": 4, "axis": "z"}]}
    fingerprint = {"spacings": [[1.0, 1.0, 1.0]], "nnunetv2_cmems": {"labelled": ["Doe_John"], "unlabelled": ["Roe_Jane"]}}
    init_args = {"plans": PLANS, "configuration": "2d", "fold": 0, "dataset_json": listed, "cmems": record}
    save(trained[0], model_folder / "fold_0" / "checkpoint_final.pth", init_args=init_args)
    (model_folder / "dataset.json").write_text(json.dumps(listed))
    (model_folder / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    out = tmp_path / "out"
    export_model(str(model_folder), [0], str(out))
    assert json.loads((out / "dataset.json").read_text()) == DATASET_JSON
    assert json.loads((out / "dataset_fingerprint.json").read_text()) == {"spacings": [[1.0, 1.0, 1.0]]}
    for path in out.rglob("*.*"):
        whole = repr(torch.load(path, weights_only=True)["init_args"]) if path.suffix == ".pth" else path.read_text()
        assert "Doe" not in whole and "Roe" not in whole, path


def test_tensors_stay_shared(model_folder: Path, tmp_path: Path) -> None:
    """nnU-Net's networks name a tensor several times over; the file must hold it once."""
    export_model(str(model_folder), [0], str(tmp_path / "out"), member=1)
    weights = torch.load(tmp_path / "out" / "fold_0" / "checkpoint_final.pth", weights_only=True)["network_weights"]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in weights.values()}
    assert sum(storages.values()) == sum(4 * parameter.numel() for parameter in make_member().parameters())


def test_exported_weights_serve_as_pretrained_weights(model_folder: Path, trained: list[MutualNetworks], tmp_path: Path) -> None:
    export_model(str(model_folder), [0], str(tmp_path / "out"), member=1)
    network = make_member()
    load_pretrained_weights(network, str(tmp_path / "out" / "fold_0" / "checkpoint_final.pth"))
    filled = network.state_dict()
    for key, value in trained[0].members[1].state_dict().items():
        assert "seg_layers" in key or torch.equal(filled[key], value)  # nnU-Net draws the last layers afresh


def test_other_checkpoint_one_member_and_no_fingerprint(model_folder: Path, tmp_path: Path) -> None:
    """A model of one member, saved as the best checkpoint of fold all, is found under nnU-Net's default names."""
    save(networks(4, 1, steps=0), model_folder / "fold_all" / "checkpoint_best.pth", inference_allowed_mirroring_axes=None)
    (model_folder / "dataset_fingerprint.json").unlink()
    (tmp_path / "empty").mkdir()
    assert export_model(str(model_folder), ["all"], str(tmp_path / "empty"), checkpoint="checkpoint_best.pth").folds == [0]
    assert not (tmp_path / "empty" / "dataset_fingerprint.json").exists()
    assert stock_predictor(tmp_path / "empty", (0,)).allowed_mirroring_axes is None


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize("dataset", ["901", DATASET])
def test_command_says_how_to_predict(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dataset: str) -> None:
    out = str(tmp_path / "out")
    export.run(parse("-d", dataset, "-c", "2d", "-f", "0", "1", "-o", out))
    assert f"nnUNetv2_predict_from_modelfolder -i INPUT -o OUTPUT -m {out} -f 0 1 2 3" in capsys.readouterr().out
    assert sorted(os.listdir(out))[-2:] == ["fold_3", "plans.json"]


def refused(*needles: str) -> Any:
    return pytest.raises(CMEMSError, match=".*".join(needles))


def test_refuses_unset_and_wrong_results_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("nnUNet_results", raising=False)
    with refused("nnUNet_results is not set"):
        find_model_folder(901, "nnUNetTrainerCMEMS", "nnUNetPlans", "2d")
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "nowhere"))
    with refused("nowhere", "not a folder"):
        find_model_folder(901, "nnUNetTrainerCMEMS", "nnUNetPlans", "2d")


def test_refuses_unknown_and_ambiguous_models(model_folder: Path) -> None:
    for dataset, trainer, needles in (
        ("902", "nnUNetTrainerCMEMS", ("there is no data set 902", "Dataset901_Made")),
        ("heart", "nnUNetTrainerCMEMS", ("'heart' is no data set",)),
        ("901", "nnUNetTrainer", ("no model folder", f"there are: {IDENTIFIER}", "nnUNetv2_train Dataset901_Made 2d FOLD")),
        ("Dataset903_None", "nnUNetTrainerCMEMS", ("there is no data set Dataset903_None", "train first")),
    ):
        with refused(*needles):
            find_model_folder(dataset, trainer, "nnUNetPlans", "2d")
    (model_folder.parents[1] / "Dataset901_Twin").mkdir()
    with refused("several data sets have the ID 901", "Dataset901_Twin"):
        find_model_folder(901, "nnUNetTrainerCMEMS", "nnUNetPlans", "2d")


def test_refuses_missing_files(model_folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with refused("no model folder"):
        export_model(str(tmp_path / "nowhere"), [0], out)
    with refused("no folder", "fold_4", "trained folds: 0, 1", "train fold 4 first"):
        export_model(str(model_folder), [0, 4], out)
    with refused("no file", "fold_0", "checkpoint_best.pth", "finish the training of fold 0", "-chk \\(checkpoint_final.pth\\)"):
        export_model(str(model_folder), [0], out, checkpoint="checkpoint_best.pth")
    (model_folder / "plans.json").unlink()
    with refused("plans.json is missing"):
        export_model(str(model_folder), [0], out)
    assert not os.path.exists(out)


def test_refuses_other_checkpoints(model_folder: Path, tmp_path: Path) -> None:
    file = model_folder / "fold_0" / "checkpoint_final.pth"
    for content, needles in (
        ({"network_weights": make_member().state_dict(), "init_args": {}, "trainer_name": "nnUNetTrainer"}, ("of nnUNetTrainer", "-tr")),
        ({"model": 1}, ("is not a checkpoint of nnU-Net",)),
    ):
        torch.save(content, file)
        with refused(*needles):
            export_model(str(model_folder), [0], str(tmp_path / "out"))
    for damage in (b"", b"not a checkpoint"):
        file.write_bytes(damage)
        with refused("cannot be read and may be damaged"):
            export_model(str(model_folder), [0], str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("member", [-1, 2])
def test_refuses_member_that_does_not_exist(model_folder: Path, tmp_path: Path, member: int) -> None:
    with refused(f"no network number {member}", "2 networks, numbers 0 to 1", "--member"):
        export_model(str(model_folder), [0], str(tmp_path / "out"), member=member)
    assert not list(tmp_path.glob("out*"))


def test_refuses_folds_that_would_be_weighted_wrongly(model_folder: Path, tmp_path: Path) -> None:
    save(networks(4, 1, steps=0), model_folder / "fold_2" / "checkpoint_final.pth")
    with refused("fold 0 has 2, fold 2 has 1"):
        export_model(str(model_folder), [0, 2], str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))
    assert export_model(str(model_folder), [0, 2], str(tmp_path / "out"), member=0).folds == [0, 1]


def test_refuses_output_that_holds_something(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name in ("full", "file"):
        with refused("exists already"):
            export_model(str(model_folder), [0], str(tmp_path / name))
    assert (tmp_path / "full" / "precious").read_text() == (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file")])
def test_full_disk_leaves_nothing(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with refused("cannot be written", "nothing was left there"):
        export_model(str(model_folder), [0], str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))
