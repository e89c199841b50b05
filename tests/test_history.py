"""The curves that are logged beside nnU-Net's own: one value per key and epoch, and their pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import EXEMPLAR, PICTURES, Workspace, logs
from nnunetv2.training.logging.nnunet_logger import LocalLogger, MetaLogger

from nnunetv2_cmems.study.pictures import plot_curves, plot_exemplar
from nnunetv2_cmems.trainers import nnUNetTrainerCMEMS_exemplarOnly
from nnunetv2_cmems.trainers.history import History, dice_values

NAMES = ("wall", "cavity")
NAN = float("nan")
ORIGINALS = dict(zip(PICTURES, (LocalLogger.plot_progress_png, plot_curves, plot_exemplar), strict=True))


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(MetaLogger(str(tmp_path), False))


def test_epochs_without_a_value_are_nan(history: History) -> None:
    history.add({"loss/a": 1.0}, 0)
    history.complete(0)
    history.add({"loss/b": 2.0}, 1)  # a key that is new in epoch 1
    history.complete(1)
    history.add({"loss/a": 3.0}, 2)
    history.complete(2)
    np.testing.assert_equal(history.curves, {"loss/a": [1.0, NAN, 3.0], "loss/b": [NAN, 2.0, NAN]})


def test_keys_of_nnunet_are_left_alone(history: History) -> None:
    history.logger.log("train_losses", 0.5, 0)
    history.add({"loss/a": 1.0}, 0)
    history.complete(0)
    assert history.curves == {"loss/a": [1.0]}
    every = history.logger.local_logger.my_fantastic_logging
    assert every["train_losses"] == [0.5] and every["val_losses"] == []


def test_curves_are_part_of_the_checkpoint(history: History, tmp_path: Path) -> None:
    history.add({"loss/a": 1.0}, 0)
    other = History(MetaLogger(str(tmp_path), True))
    other.logger.load_checkpoint(history.logger.get_checkpoint())
    other.add({"loss/a": 2.0}, 1)
    assert other.curves == {"loss/a": [1.0, 2.0]}


def test_values_of_an_epoch(history: History) -> None:
    """Losses are means over the steps that have them; coverage and agreement are ratios of sums, not means of ratios."""
    first = {"loss": 9.0, "loss/a": 1.0, "coverage": np.array([[1, 10, 0, 0], [10, 10, 1, 2]]), "agreement": np.array([[1.0, 0], [2, 0]])}
    second = {"loss": 9.0, "loss/a": 2.0, "loss/b": 5.0, "coverage": np.array([[29, 90, 0, 0], [0, 90, 0, 6]])}
    second["agreement"] = np.array([[5.0, 0], [6, 0]])
    history.add_epoch([first, second], 0, NAMES)
    expected = {
        "loss/a": [1.5],
        "loss/b": [5.0],
        "coverage/member_0": [0.3],
        "coverage_foreground/member_0": [NAN],  # no foreground was predicted
        "coverage/member_1": [0.1],
        "coverage_foreground/member_1": [0.125],
        "agreement/wall": [0.75],
        "agreement/cavity": [NAN],
        "agreement/mean": [0.75],
    }
    assert history.curves.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(history.curves[key], values, err_msg=key)


def test_epoch_without_unlabelled_images_has_losses_only(history: History) -> None:
    history.add_epoch([{"loss": 1.0, "loss/supervised": 1.0}], 0, NAMES)
    assert history.curves == {"loss/supervised": [1.0]}


def test_dice_values() -> None:
    values = dice_values("x", np.array([[3.0, 0.0], [4.0, 2.0]]), NAMES)
    assert values == {"x/wall": 0.75, "x/cavity": 0.0, "x/mean": 0.375}
    nothing = dice_values("x", np.zeros((2, 2)), NAMES)
    assert math.isnan(nothing["x/wall"]) and nothing["x/mean"] == 0.0  # members that see nothing agree on nothing


@pytest.mark.parametrize(
    ("agreement", "best"),
    [
        ([], True),  # no agreement is logged: the last epoch counts
        ([0.2], True),
        ([0.2, 0.3], True),
        ([0.3, 0.2], False),
        ([0.2, 0.8, 0.3], True),  # 0.26 after 0.26 * 0.9 + 0.03 = 0.264: still rising when smoothed
        ([0.2, 0.8, 0.1], False),
        ([NAN, 0.3, NAN, 0.4], True),
    ],
)
def test_best_epoch_is_that_of_the_highest_smoothed_agreement(history: History, agreement: list[float], best: bool) -> None:
    for epoch, value in enumerate(agreement):
        history.add({"agreement/mean": value}, epoch)
    assert history.last_is_best() is best


def test_written_numbers(history: History, tmp_path: Path) -> None:
    """nnU-Net's numbers are among them; what is no number is null, and what has none at all is left out."""
    history.logger.log("train_losses", np.float32(0.5), 0)
    history.logger.log("dice_per_class_or_region", [0.1, 0.2], 0)
    history.add({"loss/a": 1.0, "agreement/mean": NAN}, 0)
    history.add({"loss/a": float("inf")}, 1)
    history.write(str(tmp_path / "history.json"))
    assert json.loads((tmp_path / "history.json").read_text()) == {"train_losses": [0.5], "loss/a": [1.0, None]}


def test_printed_lines(history: History) -> None:
    lines: list[str] = []
    history.add({"loss/a": 1.0, "loss/b": 0.25, "pseudo_label_accuracy": 0.5, "agreement/wall": NAN}, 0)
    history.print_epoch(lines.append)
    assert lines[0] == "loss: a 1.0000, b 0.2500"
    assert len(lines) == 2 and "0.5000" in lines[1]


# ------------------------------------------------------------------ in a training


def test_every_key_has_one_value_an_epoch(workspace: Workspace) -> None:
    workspace.configure(exemplar=[EXEMPLAR], num_epochs=2, feature={"start": 0.5, "rampup": 0.0}, image={"start": 0.0, "rampup": 0.0})
    logged = logs(workspace.train())
    classes = ("wall", "left cavity", "right cavity")
    ours = {f"loss/{term}" for term in ("supervised", "synthetic", "image", "feature")}
    ours |= {f"{group}/member_{member}" for group in ("coverage", "coverage_foreground") for member in range(2)}
    ours |= {f"agreement/{name}" for name in (*classes, "mean")}
    ours |= {f"pseudo_label_dice/{name}" for name in (*classes, "mean")} | {"pseudo_label_accuracy"}
    assert {key for key in logged if key not in LocalLogger().my_fantastic_logging} >= ours - {"pseudo_label_accuracy"}
    assert all(len(values) == 2 for values in logged.values())
    assert np.isnan(logged["loss/feature"]).tolist() == [True, False]  # the term begins with the second epoch
    assert np.isfinite(logged["loss/image"]).all()
    shares = [value for key, values in logged.items() if key.startswith(("coverage/", "agreement/mean")) for value in values]
    assert len(shares) == 6 and all(0 <= value <= 1 for value in shares)


def test_hidden_accuracy_can_be_switched_off(workspace: Workspace) -> None:
    workspace.configure(log_hidden_accuracy=False)
    assert not [key for key in logs(workspace.train()) if key.startswith("pseudo_label")]


def test_pictures_and_records(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, original in ORIGINALS.items():
        monkeypatch.setattr(name, original)
    workspace.train()
    fold = workspace.fold()
    for name in ("progress.png", "cmems_progress.png", "exemplar.png"):
        assert (fold / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n", name
    assert json.loads((fold / "cmems_config.json").read_text())["config"]["seed"] == 1
    log = next(fold.glob("training_log_*.txt")).read_text()
    for text in ("Exemplar (chosen automatically): case phantom_tr", "Unlabelled training cases: 3", "loss: ", "coverage: ", "agreement: "):
        assert text in log


def test_picture_of_the_exemplar_alone(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither synthetic pairs nor unlabelled images are there to be drawn."""
    shown = []
    monkeypatch.setattr("nnunetv2_cmems.trainers.snapshot.plot_exemplar", lambda *arguments: shown.append(arguments))
    workspace.train(nnUNetTrainerCMEMS_exemplarOnly)
    workspace.configure()
    workspace.train()
    (_, _, _, no_pairs, no_views, _), (path, image, label, pairs, views, names) = shown
    assert no_pairs == [] and no_views == {}
    assert path == str(workspace.fold() / "exemplar.png")
    assert image.shape == label.shape == (36, 36) and set(np.unique(label)) == {0, 1, 2, 3}
    assert len(pairs) == 4 and {array.shape for pair in pairs for array in pair} == {(32, 32)}
    assert set(views) == {"unlabelled", "weak 1", "strong 1", "weak 2", "strong 2"}
    assert names == {0: "background", 1: "wall", 2: "left cavity", 3: "right cavity"}
