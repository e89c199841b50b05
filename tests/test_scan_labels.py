"""Labels of whole unlabelled scans: when they are made, what they are, who is taught with them, and a training that is killed."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CASES, EXEMPLAR, TRAINING, VALIDATION, Workspace, in_three_dimensions, logs, same_weights, weights, with_regions
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from test_objective import CALM, CLASSES, DIMENSIONS, REGIONS, FakeNetwork, certain, objective, unsure
from test_resume import differences, scatter, written
from test_speed import network
from test_speed import objective as meta_objective
from torch import Tensor

from nnunetv2_cmems.config import ScanLabelsConfig, SpatialConfig
from nnunetv2_cmems.data.exemplar import Exemplar, PreprocessedDataset
from nnunetv2_cmems.data.scan_labels import ScanLabelFiles
from nnunetv2_cmems.data.unlabelled import UnlabelledLoader
from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.method import atlas, refinement
from nnunetv2_cmems.method.contacts import Contacts
from nnunetv2_cmems.method.label_space import PseudoLabel, Regions
from nnunetv2_cmems.method.networks import MutualNetworks
from nnunetv2_cmems.method.objective import LEFT_OUT, known_first, passes_per_step
from nnunetv2_cmems.method.places import Places
from nnunetv2_cmems.method.refinement import Refinement
from nnunetv2_cmems.method.turns import turned_scan
from nnunetv2_cmems.trainers import prediction as prediction_module
from nnunetv2_cmems.trainers import scan_labels as rounds
from nnunetv2_cmems.trainers.prediction import (
    predict_for,
    predict_like_folds,
    predict_members,
    predict_turned,
    predict_with_agreement,
    predicting,
)  # fmt: skip
from nnunetv2_cmems.trainers.scan_labels import starts

UNLABELLED = [case for case in TRAINING if case != EXEMPLAR["case"]]
AS_PREDICTED = {
    "at": [0.5], "propagation": 0.0, "appearance": 0.0, "smoothing": 0.0, "growth": 0.0, "largest_piece": False, "outlines": False,
    "arranged_only": False,
}  # fmt: skip
ON: dict[str, Any] = {"num_epochs": 2, "exemplar": [EXEMPLAR], "scan_labels": {"at": [0.5]}}
TURNED = {"at": [0.5], "turns_in_labels": [-60, 60]}


def folder(workspace: Workspace) -> Path:
    return workspace.fold() / "scan_labels"


def with_thin_slices(workspace: Workspace) -> dict[str, Any]:
    """Images whose slices are three times as far apart as their pixels, and no more."""
    return {"plans": {**workspace.plans(), "original_median_spacing_after_transp": [4.5, 1.5, 1.5]}}


def keeping_labels(workspace: Workspace, prepare: Callable[[Workspace], dict[str, Any]]) -> Any:
    """A trainer after its training, whose labels stay on the disk."""
    trainer = workspace.make(**prepare(workspace))
    trainer.on_train_end = lambda: None
    trainer.run_training()
    return trainer


# ------------------------------------------------------------------ a training


@pytest.mark.parametrize(
    ("prepare", "heads"),
    [(lambda workspace: {}, 0), (in_three_dimensions, 0), (with_regions, 3)],
    ids=["2d", "3d", "regions"],
)
def test_a_training_with_a_round(workspace: Workspace, prepare: Callable[[Workspace], dict[str, Any]], heads: int) -> None:
    workspace.configure(**{**ON, "num_epochs": 3, "scan_labels": {"at": [0.3], "arranged_only": False}})
    trainer = workspace.make(**prepare(workspace))
    seen: list[dict[str, Tensor]] = []
    step = trainer.train_step

    def remembered(batch: dict[str, Tensor]) -> Any:
        seen.append(batch)
        assert all(module.training for module in trainer.network.modules()) and trainer.mutual_networks.deep_supervision
        return step(batch)

    trainer.train_step = remembered
    workspace.interrupted(2, trainer)
    assert [set(batch) for batch in seen] == [{"data", "offset", "label"}] * 4
    shape = seen[0]["data"].shape
    expected = (shape[0], heads, *shape[2:]) if heads else (shape[0], *shape[2:])
    assert all(batch["label"].shape == expected and batch["label"].dtype == torch.int8 for batch in seen)
    assert all((batch["label"] == -1).all() for batch in seen[:2]), "before the round nothing is known"
    assert all((batch["label"] >= 0).any() for batch in seen[2:])

    made = Path(trainer.output_folder) / "scan_labels"
    assert [path.name for path in made.iterdir()] == ["epoch_1"]
    assert sorted(path.stem for path in (made / "epoch_1").iterdir()) == UNLABELLED
    for case in UNLABELLED:
        labels, size = np.load(made / "epoch_1" / f"{case}.npy"), workspace.image(case).shape[1:]
        assert labels.dtype == np.int8 and labels.shape == ((heads, *size) if heads else size)
        assert labels.min() >= 0 and labels.max() <= (1 if heads else 3)
    logged = logs(trainer)
    for name in (*trainer.label_space.names, "mean"):
        before, after = logged[f"scan_label_dice/{name}"]
        assert np.isnan(before) and 0 <= after <= 1


@pytest.mark.parametrize("prepare", [lambda workspace: {}, in_three_dimensions], ids=["2d", "3d"])
def test_the_networks_passes_are_counted(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, prepare: Callable[[Workspace], dict[str, Any]]
) -> None:
    passes: list[int] = []
    original = rounds.predicting

    @contextlib.contextmanager
    def watched(trainer: Any, **arguments: Any) -> Iterator[Any]:
        with original(trainer, **arguments) as predictor:
            hooks = [
                member.register_forward_hook(lambda module, images, output: passes.append(len(images[0])))
                for member in trainer.mutual_networks.members
            ]
            yield predictor
            for hook in hooks:
                hook.remove()

    monkeypatch.setattr(rounds, "predicting", watched)
    workspace.configure(**{**ON, "scan_labels": TURNED}, log_hidden_accuracy=False)
    logged = logs(workspace.train(**prepare(workspace)))
    assert np.isnan(logged["scan_label_passes"][0]) and logged["scan_label_passes"][1] == sum(passes) > 0


@pytest.mark.parametrize("prepare", [lambda workspace: {}, in_three_dimensions, with_regions], ids=["2d", "3d", "regions"])
def test_only_the_surroundings_of_foreground_are_worked_on(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, prepare: Callable[[Workspace], dict[str, Any]]
) -> None:
    """The labels are those of the whole scan all the same."""
    workspace.configure(**ON)
    trainer = workspace.make(**prepare(workspace))
    trainer.initialize()
    trainer.get_dataloaders()
    made = trainer._scan_labels
    generator = torch.Generator().manual_seed(0)
    shape, heads = (9, 60, 64), 3 if made.files.regions else 4
    truth = torch.zeros(shape, dtype=torch.long)
    truth[3:6, 20:31, 30:44], truth[3:6, 24:28, 34:40] = 1, 2
    image = (truth > 0).float()[None] + 0.1 * torch.randn((1, *shape), generator=generator)
    says = torch.nn.functional.one_hot(truth.roll(2, 2), 4).movedim(-1, 0).float()
    logits = 24 * says[-heads:] - 12 if made.files.regions else 12 * says
    seen: list[tuple[int, ...]] = []
    refine = refinement.refine
    monkeypatch.setattr(refinement, "refine", lambda p, *rest: (seen.append(tuple(p.shape[1:])), refine(p, *rest))[1])
    found = made._labels_of(logits, image)
    monkeypatch.setattr(refinement, "LEAST_LOGIT", -1e9)
    assert np.array_equal(found, made._labels_of(logits, image)) and found.any()
    assert seen[0] < seen[-1] == shape and max(seen[0][1:]) < 50
    monkeypatch.setattr(refinement, "LEAST_LOGIT", 1e9)
    assert not made._labels_of(logits, image).any()


def test_the_scans_that_get_labels_are_of_all_kinds() -> None:
    """Names that alternate, such as two frames of each patient, do not make a choice of one kind only."""
    cases = [f"patient{i:03d}_frame{frame:02d}" for i in range(70) for frame in (1, 12)]
    few = rounds.chosen(cases[::-1], 70)
    assert few == rounds.chosen(cases, 70) == sorted(set(few)) and len(few) == 70
    assert 20 < sum(case.endswith("01") for case in few) < 50
    assert rounds.chosen(cases, 140) == rounds.chosen(cases, 1000) == cases


def test_the_box_around_a_mask() -> None:
    mask = torch.zeros(5, 20, 20, dtype=torch.bool)
    assert refinement.surroundings(mask, [0, 1, 1]) is None
    mask[2, 3, 17] = mask[3, 5, 18] = True
    assert refinement.surroundings(mask, [0, 4, 1]) == (slice(2, 4), slice(0, 10), slice(16, 20))


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_scans_are_finished_in_threads_in_order(threads: int) -> None:
    made: list[int] = []
    done: list[int] = []

    def items() -> Iterator[int]:
        for number in range(12):
            made.append(number)
            assert len(made) - len(done) <= threads + 2, "no more than that wait, as they are large"
            yield number

    def work(number: int) -> int:
        time.sleep(0.01 * (number % 3))
        return number**2

    for result in rounds.in_threads(work, items(), threads):
        done.append(result)
    assert done == [number**2 for number in range(12)]


def test_an_error_in_a_thread_arrives() -> None:
    def work(number: int) -> int:
        raise CMEMSError(f"scan {number}")

    with pytest.raises(CMEMSError, match="scan 0"):
        list(rounds.in_threads(work, iter(range(5)), 2))


def test_windows_overlap_by_half_and_small_images_are_padded() -> None:
    assert rounds.count_windows((6, 70, 20), (32, 32)) == 6 * 4
    assert rounds.count_windows((6, 70, 20), (4, 32, 32)) == 2 * 4


def test_labels_are_the_members_refined_mean(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace.configure(**{**ON, "refine_predictions": False, "scan_labels": AS_PREDICTED})
    found = {}
    make = rounds.ScanLabels._make

    def remembered(self: Any, trainer: Any, begin: int) -> None:
        make(self, trainer, begin)
        case = UNLABELLED[0]
        with predicting(trainer, mirroring=False) as predictor:
            logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(workspace.image(case)))
        found["expected"], found["labels"] = logits.argmax(0).numpy(), np.load(folder(workspace) / "epoch_1" / f"{case}.npy")

    monkeypatch.setattr(rounds.ScanLabels, "_make", remembered)
    workspace.train()
    assert np.array_equal(found["labels"], found["expected"])


@pytest.mark.parametrize("prepare", [lambda workspace: {}, with_regions], ids=["classes", "regions"])
def test_labels_grow(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, prepare: Callable[[Workspace], dict[str, Any]]) -> None:
    """What grows is refined again, together with what the members say; the reach is a share of the patch's side."""
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(refinement, "grow", lambda labels, *rest: (seen.append((labels, *rest)), torch.ones_like(labels))[1])
    config = {"appearance": 0.0, "smoothing": 0.0, "largest_piece": False, "arranged_only": False}
    for growth, grown in ((0.0, False), (0.25, True)):
        labels_of_scans = {"at": [0.5], "growth": growth, "outlines": False, **config}
        workspace.configure(**{**ON, "refine_predictions": False, "scan_labels": labels_of_scans})
        keeping_labels(workspace, prepare)
        labels = np.load(folder(workspace) / "epoch_1" / f"{UNLABELLED[0]}.npy")
        assert bool((labels == 1).all()) == grown == bool(seen)
    assert len(seen) == len(UNLABELLED) and all(reach == 8 and planar for _, _, reach, _, _, planar in seen)


@pytest.mark.parametrize(
    ("prepare", "whole"),
    [
        (lambda workspace: {}, False),
        (lambda workspace: {}, True),
        (with_regions, False),
        (in_three_dimensions, False),
        (in_three_dimensions, True),
    ],
    ids=["slice", "volume", "regions", "slice of thick ones", "volume of thick slices"],
)
def test_what_grows_beyond_its_annotated_border_does_not_grow(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, prepare: Callable[[Workspace], dict[str, Any]], whole: bool
) -> None:
    """Nor does anything in predictions where a volume is annotated as a whole."""
    given: list[tuple[Any, ...]] = []
    reach_of_the_patch = pytest.approx(0.07 * 32)
    monkeypatch.setattr(rounds, "ends_at_edges", lambda *arguments: (given.append(arguments), (False,) * 3)[1])
    monkeypatch.setattr(refinement, "grow", lambda *arguments: pytest.fail("nothing may grow"))
    exemplar = {"case": EXEMPLAR["case"]} if whole else EXEMPLAR
    workspace.configure(**{**ON, "exemplar": [exemplar], "scan_labels": {"at": [0.5], "atlases": 0}})
    trainer = workspace.train(**prepare(workspace))
    assert trainer._scan_labels.prediction_refinement.reach == (0.0 if whole else reach_of_the_patch)
    ((shown, reach, _, _, planar),) = given
    assert reach == reach_of_the_patch and planar
    label, image = workspace.label(EXEMPLAR["case"])[0], workspace.image(EXEMPLAR["case"])
    slices = [z for z in range(len(label)) if label[z].any()] if whole else [EXEMPLAR["slice"]]
    assert len(shown) == len(slices)
    for (found, seen), z in zip(shown, slices):
        assert np.array_equal(found.numpy(), image[:, z : z + 1]) and seen.shape == (1, *label.shape[1:])
        assert (np.maximum(seen[0].numpy(), 0) != label[z]).sum() <= 0.1 * (label[z] > 0).sum()


class Drawing:
    """In place of outlines: all is of the first class, or in every region."""

    seen: list[tuple[int, ...]]
    radius = 0.0, 9.0, 0.0

    def __init__(self) -> None:
        self.seen = []

    def drawn(self, labels: Tensor, image: Tensor, space: Any) -> Tensor:
        assert labels.shape[-3:] == image.shape[1:]
        self.seen.append(tuple(labels.shape))
        return torch.ones_like(labels)


@pytest.mark.parametrize(
    ("prepare", "config", "expected"),
    [
        (lambda workspace: {}, {}, True),
        (with_regions, {}, True),
        (in_three_dimensions, {}, True),
        (lambda workspace: {}, {"outlines": False}, False),
    ],
    ids=["classes", "regions", "thick slices", "off"],
)
def test_labels_have_outlines(
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    prepare: Callable[[Workspace], dict[str, Any]],
    config: dict[str, Any],
    expected: bool,
) -> None:
    """They come last. What they look like is learned from the annotated slice, as it lies in the preprocessed scan."""
    drawing, given, greys_given = Drawing(), [], []
    monkeypatch.setattr(rounds.Outlines, "of", lambda labels, space, greys: (given.extend(labels), greys_given.extend(greys), drawing)[2])
    workspace.configure(**{**ON, "refine_predictions": False, "scan_labels": {**AS_PREDICTED, "outlines": True, **config}})
    trainer = keeping_labels(workspace, prepare)
    labels = np.load(Path(trainer.output_folder) / "scan_labels" / "epoch_1" / f"{UNLABELLED[0]}.npy")
    assert bool((labels == 1).all()) == expected and len(drawing.seen) == (len(UNLABELLED) if expected else 0)
    log = next(Path(trainer.output_folder).glob("training_log_*.txt")).read_text()
    assert (f"drawn along their outlines in other scans: {trainer.label_space.names[1]};" in log) == expected
    if expected:
        (label,), (grey,) = given, greys_given
        assert grey.shape == label.shape and grey[label > 0].std() > 0, "and its grey values"
        truth = workspace.label(EXEMPLAR["case"])[0, EXEMPLAR["slice"]]
        assert label.shape == truth.shape and (np.maximum(label, 0) != truth).sum() <= 0.1 * (truth > 0).sum(), "interpolated otherwise"


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize("deep", [False, True], ids=["2d", "3d"])
def test_outlines_are_learned_from_every_slice_of_a_volume(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, deep: bool) -> None:
    """And where the volume is registered, nothing is drawn: registration tells the shape."""
    drawing, given, greys_given = Drawing(), [], []
    monkeypatch.setattr(rounds.Outlines, "of", lambda labels, space, greys: (given.extend(labels), greys_given.extend(greys), drawing)[2])
    workspace.configure(**{**WHOLE, "refine_predictions": False})
    trainer = workspace.train(**(in_three_dimensions(workspace) if deep else {}))
    shown = [label for label in workspace.label(EXEMPLAR["case"])[0] if label.any()]
    assert len(given) == len(shown) and all(np.array_equal(*pair) for pair in zip(given, shown))
    assert trainer._scan_labels.atlases and not drawing.seen
    monkeypatch.setattr(rounds, "MOST_SLICES", 2)
    some = rounds.annotated_slices(trainer.exemplars, 5)
    assert len(some) == 2 < len(given) and all(any(np.array_equal(label[0].numpy(), one) for one in given) for _, label in some)


@pytest.mark.parametrize("exemplar", [EXEMPLAR, {"case": EXEMPLAR["case"]}], ids=["a slice", "a volume"])
def test_a_whole_volume_shows_where_organs_end(workspace: Workspace, exemplar: dict[str, Any]) -> None:
    workspace.configure(**{**ON, "exemplar": [exemplar], "scan_labels": {"at": [0.5], "atlases": 0}})
    trainer = workspace.make()
    trainer.initialize()
    trainer.get_dataloaders()
    found = trainer._scan_labels.prediction_refinement.contacts
    assert found is not None and any(found.waists) == (exemplar is EXEMPLAR)


@pytest.mark.parametrize(
    ("prepare", "config", "contacts", "waists", "alike", "level"),
    [
        (lambda workspace: {}, {}, True, True, True, True),
        (in_three_dimensions, {}, True, True, True, True),
        (lambda workspace: {}, {"contacts": False}, False, False, True, True),
        (lambda workspace: {}, {"waists": False}, True, False, True, True),
        (lambda workspace: {}, {"shared_appearance": False}, True, True, False, True),
        (lambda workspace: {}, {"levels": False}, True, True, True, False),
        (lambda workspace: {}, {"outlines": False}, True, True, True, False),
        (with_regions, {}, False, False, False, False),
    ],
    ids=["classes", "thick slices", "contacts off", "waists off", "grey values off", "levels off", "outlines off", "regions"],
)
def test_what_never_touches_and_what_is_alike(
    workspace: Workspace,
    prepare: Callable[[Workspace], dict[str, Any]],
    config: dict[str, Any],
    contacts: bool,
    waists: bool,
    alike: bool,
    level: bool,
) -> None:
    """They are learned from the annotated slice, and count in predictions alone: what labels lack networks would forget."""
    workspace.configure(**{**ON, "scan_labels": {"at": [0.5], **config}})
    trainer = workspace.train(**prepare(workspace))
    rules = trainer._scan_labels
    cavities = ((False,) * 3, (False, False, True), (False, True, False))  # kept apart by the left one's wall
    assert rules.refinement.contacts is None
    found = rules.prediction_refinement.contacts
    assert (found is not None) == contacts
    assert found is None or (found.apart, found.enclosed) == (cavities, (False, True, False))
    assert [narrowest > 0 for narrowest in (found.waists if found else [0] * 3)] == [False, False, waists]
    assert rules.refinement.alike == () and rules.prediction_refinement.alike == (cavities if alike else ())
    log = next(Path(trainer.output_folder).glob("training_log_*.txt")).read_text()
    assert ("so not in predictions: left cavity and right cavity, left cavity and background; organs" in log) == contacts
    assert ("than in the annotated images ('scan_labels.waists'): right cavity." in log) == waists
    assert ("('scan_labels.shared_appearance'): left cavity and right cavity." in log) == alike
    outlines = rules.prediction_refinement.outlines
    assert [one > 0 for one in (outlines.level if outlines else [0] * 3)] == [False, level, False]
    assert ("annotated images ('scan_labels.levels'): left cavity (0." in log) == level


@pytest.mark.parametrize("right", [2, 3, 0])
@pytest.mark.parametrize(
    ("prepare", "config", "known"),
    [
        (lambda workspace: {}, {}, True),
        (in_three_dimensions, {}, True),
        (with_regions, {}, False),
        (lambda workspace: {}, {"contacts": False}, False),
    ],
    ids=["2d", "thick slices", "regions", "off"],
)
def test_the_log_says_in_how_many_slices_a_cavity_is_within_its_wall(
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    prepare: Callable[[Workspace], dict[str, Any]],
    config: dict[str, Any],
    known: bool,
    right: int,
) -> None:
    """Of four in each scan; which is made up."""
    monkeypatch.setattr(Contacts, "within", lambda self, labels: (4, right))
    scale = [0.5, 2.0] if right == 0 else [1.0, 1.0]
    workspace.configure(**{**ON, "num_epochs": 4, "organ_scale": scale, "scan_labels": {"at": [0.5, 0.75], **config}})
    trainer = workspace.train(**prepare(workspace))
    log = next(Path(trainer.output_folder).glob("training_log_*.txt")).read_text()
    said = f"as where it is annotated: left cavity, in {25 * right} % of the labelled slices that show it."
    assert log.count(said) == (2 if known else 0)
    understood = [line for line in log.splitlines() if "Told apart by grey values" not in line]
    assert "".join(understood).count("The networks have hardly understood the organs") == (known and right < 3), "after the last round"
    assert log.count("'organ_scale' of [0.5, 2]") == (known and right == 2), "where it has not been tried"
    found = logs(trainer).get("scan_label_contacts", [])
    assert found[-2:] == ([right / 4] * 2 if known else [])


@pytest.mark.parametrize(
    ("prepare", "config", "known"),
    [
        (lambda workspace: {}, {}, True),
        (in_three_dimensions, {}, True),
        (with_regions, {}, False),
        (lambda workspace: {}, {"scan_labels": {"at": [0.5, 0.75], "contacts": False}}, False),
        (lambda workspace: {}, {"exemplar": [{"case": EXEMPLAR["case"], "slice": z} for z in (1, 2)]}, False),
    ],
    ids=["2d", "thick slices", "regions", "off", "two slices of a case"],
)
def test_the_log_says_in_how_many_scans_grey_values_tell_organs_apart(
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    prepare: Callable[[Workspace], dict[str, Any]],
    config: dict[str, Any],
    known: bool,
) -> None:
    """In one of three in each round, which is made up; the warning comes after the last one."""
    asked: list[Any] = []
    monkeypatch.setattr(rounds, "tell_apart", lambda *_: (asked.append(None), len(asked) % 3 == 0)[1])
    workspace.configure(**{**ON, "num_epochs": 4, "scan_labels": {"at": [0.5, 0.75]}, **config})
    trainer = workspace.train(**prepare(workspace))
    told = [line for line in Path(trainer.log_file).read_text().splitlines() if "Told apart by grey values" in line]
    assert len(told) == 2 * known and all("left cavity from wall" in line and "in 1 of 3 scans." in line for line in told)
    assert ["hardly understood" in line for line in told] == [False, True][: len(told)]
    assert logs(trainer).get("scan_label_greys", [])[-2:] == ([1 / 3] * 2 if known else [])


@pytest.mark.parametrize(
    ("early", "limit", "advised"),
    [(0, 3, True), (0, 4, False), (2, 3, False), (4, 3, True)],
    ids=["off", "short", "tried", "as long as the training"],
)
def test_failed_long_trainings_are_advised_to_label_early(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, early: int, limit: int, advised: bool
) -> None:
    monkeypatch.setattr(rounds, "EARLY", limit)
    monkeypatch.setattr(rounds, "tell_apart", lambda *_: False)
    workspace.configure(**ON, early_steps=early)
    log = Path(workspace.train().log_file).read_text()
    assert "hardly understood" in log and (f"'early_steps' of {limit} may help" in log) == advised


@pytest.mark.parametrize("arranged", [True, False])
def test_scans_that_are_not_arranged_as_annotated_wait(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, arranged: bool) -> None:
    asked: list[list[int]] = []

    def answer(self: Contacts, labels: np.ndarray, classes: list[int]) -> bool:
        asked.append(list(classes))
        return arranged

    monkeypatch.setattr(Contacts, "arranged", answer)
    monkeypatch.setattr(rounds, "remove", lambda trainer: None)  # what is made is looked at
    workspace.configure(**ON)
    trainer = workspace.train()
    files = [np.load(path) for path in (Path(trainer.output_folder) / "scan_labels").glob("*/*.npy")]
    assert len(files) == len(UNLABELLED) and asked == [[1, 2, 3]] * len(files)
    assert all(arranged != bool((labels == LEFT_OUT).all()) for labels in files)
    log = next(Path(trainer.output_folder).glob("training_log_*.txt")).read_text()
    assert f"so that they teach ('scan_labels.arranged_only'): {len(files) * arranged} of {len(files)} scans;" in log
    assert logs(trainer)["scan_labels_left_out"][-1] == len(files) * (not arranged)
    assert ("scan_label_dice/mean" in logs(trainer)) == arranged  # of those that teach


@pytest.mark.parametrize(
    ("config", "waiting"),
    [
        ({}, False),
        ({"early_steps": 2}, True),
        ({"early_steps": 2, "scan_labels": {"at": [0.5], "told_apart_only": False}}, False),
        ({"scan_labels": {"at": [0.5], "told_apart_only": True}}, True),
        ({"scan_labels": {"at": [0.5], "told_apart_only": True, "arranged_only": False}}, False),
    ],
    ids=["default", "early", "switched off", "asked for", "with what is arranged otherwise"],
)
def test_scans_wait_that_grey_values_do_not_tell_apart(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], waiting: bool
) -> None:
    """The first of three, which is made up."""
    asked: list[None] = []
    monkeypatch.setattr(Contacts, "arranged", lambda *_: True)
    monkeypatch.setattr(rounds, "tell_apart", lambda *_: (asked.append(None), len(asked) % len(UNLABELLED) != 1)[1])
    workspace.configure(**{**ON, **config})
    trainer = workspace.train()
    log, count = Path(trainer.log_file).read_text(), len(UNLABELLED)
    assert logs(trainer).get("scan_labels_left_out", [0])[-1] == waiting
    assert ("told apart by grey values as in the annotation, so that they teach" in log) == waiting
    assert (f"('scan_labels.arranged_only' and 'told_apart_only'): {count - 1} of {count} scans;" in log) == waiting


@pytest.mark.parametrize(
    ("config", "waiting"),
    [
        ({}, False),
        ({"scan_labels": {"at": [0.5], "arranged_only": True}}, True),
        ({"exemplar": [EXEMPLAR], "scan_labels": {"at": [0.5], "arranged_only": False}}, False),
    ],
    ids=["two slices of a case", "asked for", "not asked for"],
)
def test_scans_wait_where_one_slice_is_annotated(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], waiting: bool
) -> None:
    monkeypatch.setattr(Contacts, "arranged", lambda *_: False)
    workspace.configure(**{**ON, "exemplar": [EXEMPLAR, {**EXEMPLAR, "slice": EXEMPLAR["slice"] + 1}], **config})
    log = next(Path(workspace.train().output_folder).glob("training_log_*.txt")).read_text()
    assert ("so that they teach ('scan_labels.arranged_only'): 0 of" in log) == waiting


@pytest.mark.parametrize(
    ("prepare", "config"), [(with_regions, {}), (lambda workspace: {}, {"contacts": False})], ids=["regions", "contacts are off"]
)
def test_where_nothing_is_enclosed_all_scans_teach(
    workspace: Workspace, prepare: Callable[[Workspace], dict[str, Any]], config: dict[str, Any]
) -> None:
    workspace.configure(**{**ON, "scan_labels": {"at": [0.5], "arranged_only": True, "told_apart_only": True, **config}})
    trainer = workspace.train(**prepare(workspace))
    log = next(Path(trainer.output_folder).glob("training_log_*.txt")).read_text()
    assert "all scans teach, and 'scan_labels.arranged_only' changes nothing" in log
    assert "'scan_labels.told_apart_only' changes nothing" in log
    assert "so that they teach" not in log


def test_what_is_left_out_does_not_count() -> None:
    taught = PseudoLabel(torch.tensor([[2, 2, 2]]), torch.tensor([[True, True, False]]))
    found = known_first(torch.tensor([[LEFT_OUT, -1, 1]]), taught)
    assert found.confident.tolist() == [[False, True, True]] and found.labels.tolist() == [[2, 2, 1]]


@DIMENSIONS
def test_what_is_left_out_is_so_in_deformed_crops(d: int) -> None:
    made = objective(CALM, d)
    size = [side + 4 for side in made.bank.patch]
    _, labels = made.unlabelled_crops(torch.randn(2, 1, *size), torch.full((2, *size), LEFT_OUT, dtype=torch.int8))
    assert labels is not None and (labels == LEFT_OUT).all()


def test_labels_by_registration_are_not_asked_for_walls(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come before the members have said anything."""
    monkeypatch.setattr(Contacts, "within", lambda self, labels: (4, 4))
    workspace.configure(**{**ON, "exemplar": [{"case": EXEMPLAR["case"], "slice": None}], "scan_labels": {"at": [0.5]}})
    trainer = workspace.train()
    assert trainer._scan_labels.begins[0] == 0 and trainer._scan_labels.prediction_refinement.contacts is not None
    log = next(Path(trainer.output_folder).glob("training_log_*.txt")).read_text()
    assert "in 0 % of the labelled slices" not in log and "hardly understood" not in log
    assert np.isnan(logs(trainer)["scan_label_contacts"][0])


@pytest.mark.parametrize(
    ("prepare", "config", "heads"),
    [
        (lambda workspace: {}, {}, 3),
        (with_regions, {}, 3),
        (in_three_dimensions, {}, 3),
        (lambda workspace: {}, {"scan_labels": {"at": [0.5], "propagation": 0}}, 0),
        (lambda workspace: {}, {"num_members": 1}, 0),
        (with_thin_slices, {}, 0),
    ],
    ids=["classes", "regions", "thick slices", "off", "one member", "thin slices"],
)
def test_labels_follow_the_slices_that_members_agree_on(
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    prepare: Callable[[Workspace], dict[str, Any]],
    config: dict[str, Any],
    heads: int,
) -> None:
    """Of each scan, with the agreement that its own slices have."""
    seen: list[tuple[Tensor, ...]] = []
    monkeypatch.setattr(refinement, "propagate", lambda *given: (seen.append(given), torch.zeros_like(given[0]))[1])
    workspace.configure(**{**ON, "refine_predictions": False, **config})
    trainer = keeping_labels(workspace, prepare)
    assert len(seen) == (len(UNLABELLED) if heads else 0)
    assert ("nothing is carried" in Path(trainer.log_file).read_text()) == (prepare is with_thin_slices)
    for probabilities, image, agreement, share, _ in seen:
        assert agreement.shape == (heads, image.shape[1]) == (heads, probabilities.shape[1]) and share == 0.25
        assert not agreement.isnan().all() and (agreement.nan_to_num() >= 0).all() and (agreement.nan_to_num() <= 1).all()


# ------------------------------------------------------------------ annotated volumes


LATER = {"start": 0.2, "rampup": 0.3}
WHOLE: dict[str, Any] = {**ON, "exemplar": [{"case": EXEMPLAR["case"]}], "image": LATER, "feature": LATER}


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The phantoms are too small to be registered well."""
    monkeypatch.setattr(atlas, "LEAST_AGREEMENT", 0.0)


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize(
    ("prepare", "heads"),
    [(lambda workspace: {}, 0), (in_three_dimensions, 0), (with_regions, 3)],
    ids=["2d", "3d", "regions"],
)
def test_annotated_volumes_teach_from_the_first_step(
    workspace: Workspace, prepare: Callable[[Workspace], dict[str, Any]], heads: int
) -> None:
    """Their labels are better than chance, and are there until the end, beside those of the newest round."""
    workspace.configure(**{**WHOLE, "num_epochs": 4})
    trainer = workspace.make(**prepare(workspace))
    step, known = trainer.train_step, []
    trainer.train_step = lambda batch: (known.append(float((batch["label"] >= 0).float().mean())), step(batch))[1]
    workspace.interrupted(3, trainer)
    assert len(known) == 6 and min(known) > 0.2, "only what lies beyond the scans is not known"
    assert trainer._scan_labels.files.rounds() == [0, 2] and trainer._scan_labels.atlases == [EXEMPLAR["case"]]
    first = Path(trainer.output_folder) / "scan_labels" / "epoch_0"
    assert sorted(path.stem for path in first.iterdir()) == UNLABELLED
    for case in UNLABELLED:
        labels, size = np.load(first / f"{case}.npy"), workspace.image(case).shape[1:]
        assert labels.dtype == np.int8 and labels.shape == ((heads, *size) if heads else size)
    logged = logs(trainer)
    assert logged["scan_label_dice/mean"][0] > 0.4 and np.isnan(logged["scan_label_dice/mean"][1])
    assert logged["loss/image"][0] > 0 and logged["loss/feature"][0] > 0, "the consistency terms do not wait"
    assert "registration" in next(Path(trainer.output_folder).glob("training_log_*.txt")).read_text()


def plain(trainer: Any) -> bool:
    """Whether the consistency terms begin as they do where no scan has a label before the members make it."""
    made = trainer._objective
    return made.config.competence and made.config.image.start == made.config.feature.start == 0.2 and made.joining == 0


@pytest.mark.parametrize(
    "config",
    [{"exemplar": [EXEMPLAR]}, {"scan_labels": {"at": [0.5], "atlases": 0}}, {"scan_labels": {"at": []}}],
    ids=["one slice", "off", "no labels at all"],
)
def test_where_nothing_is_registered(workspace: Workspace, config: dict[str, Any]) -> None:
    workspace.configure(**{**WHOLE, **config, "num_epochs": 3})
    trainer = workspace.make()
    begun: list[Any] = []
    step = trainer.train_step
    trainer.train_step = lambda batch: (begun.append("label" in batch and bool((batch["label"] >= 0).any())), step(batch))[1]
    workspace.interrupted(1, trainer)
    assert begun == [False, False] and not (folder(workspace) / "epoch_0").exists()
    assert plain(trainer)
    assert "registration" not in next(workspace.fold().glob("training_log_*.txt")).read_text()


@pytest.mark.usefixtures("trusting")
def test_volumes_of_cubic_voxels_have_labels_by_registration(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Places do not count there, and nothing grows."""
    monkeypatch.setattr(rounds, "is_planar", lambda spacing: False)
    monkeypatch.setattr(refinement, "grow", lambda *_: pytest.fail("registration tells how large organs are"))
    workspace.configure(**WHOLE)
    trainer = workspace.train(**in_three_dimensions(workspace))
    assert np.isfinite(logs(trainer)["scan_label_dice/mean"]).all() and trainer._scan_labels.refinement.places is None


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize("in_space", [False, True], ids=["2d", "3d"])
@pytest.mark.parametrize("fewest", [0.3, 0.4], ids=["enough", "too few"])
def test_scans_that_cannot_be_registered(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, fewest: float, in_space: bool) -> None:
    """They are taught as where there is no volume; and so are all, if it is too few that can be."""
    done = rounds.refined_on
    monkeypatch.setattr(rounds, "refined_on", lambda *given: done(*given) if given[1].sum() == chosen else None)
    monkeypatch.setattr(rounds, "FEWEST_REGISTERED", fewest)
    chosen = torch.from_numpy(workspace.image(UNLABELLED[1])).sum()
    if in_space:
        monkeypatch.setattr(rounds, "is_planar", lambda spacing: False)
    workspace.configure(**{**WHOLE, "num_epochs": 4})
    trainer = workspace.make(**(in_three_dimensions(workspace) if in_space else {}))
    workspace.interrupted(3, trainer)
    enough = fewest < 1 / 3
    assert trainer._scan_labels.files.cases(0) == ({UNLABELLED[1]} if enough else set())
    assert trainer._scan_labels.files.rounds() == [0, 2] or (in_space and not enough)
    assert trainer._scan_labels.files.cases(2) == (set() if in_space and not enough else set(UNLABELLED))
    assert plain(trainer) != enough
    assert (trainer.mutual_networks.refinement is None) == (in_space and not enough), "who labels no scan refines no prediction"
    log = next(Path(trainer.output_folder).glob("training_log_*.txt")).read_text()
    assert f"onto 1 of 3 unlabelled scans: {'their' if enough else 'too few'}" in log


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize("prepare", [lambda workspace: {}, in_three_dimensions, with_regions], ids=["2d", "3d", "regions"])
def test_annotated_volumes_are_registered_onto_what_is_predicted(
    workspace: Workspace, prepare: Callable[[Workspace], dict[str, Any]]
) -> None:
    """The checkpoint holds them, its log says so, and nnU-Net's prediction is the mean with what they say."""
    workspace.configure(**WHOLE)
    trainer = workspace.train(**prepare(workspace))
    fold = Path(trainer.output_folder)
    stored = torch.load(fold / "checkpoint_final.pth", weights_only=False)["network_weights"]["atlases"]
    (kept,) = atlas.from_tensor(stored)
    assert np.array_equal(kept.label, workspace.label(EXEMPLAR["case"])[0])
    log = next(fold.glob("training_log_*.txt")).read_text()
    assert f"the checkpoints hold the grey values and labels of {EXEMPLAR['case']}" in log
    refined, raw = predicted(workspace, fold)
    image, space, planar = torch.from_numpy(workspace.image(VALIDATION[0])), trainer.label_space, trainer._scan_labels._planar
    rule = Refinement.from_tensor(trainer.mutual_networks.refinement, space)  # in single precision
    with predicting(trainer, mirroring=False) as predictor, torch.inference_mode():
        prediction = predict_for(rule, predictor, image, space, planar, registered=True)
        assert prediction.in_scan is not None and (0 <= prediction.in_scan <= 1 or np.isnan(prediction.in_scan))
        said = atlas.weighed_on([kept], image, rule, space, planar, prediction.in_scan)
        given = prediction.logits, image, space, planar, prediction.in_slices
        expected, alone = (rule.logits(*given, one).half() for one in (said, None))
    assert said is not None and np.array_equal(prediction.logits.numpy(), raw)
    assert np.array_equal(refined, expected.numpy()) and (expected - alone).abs().max() > 1


@pytest.mark.usefixtures("trusting")
def test_one_network_is_not_weighed_against_volumes(workspace: Workspace) -> None:
    """How sure it may be is not known, so it predicts alone."""
    workspace.configure(**{**WHOLE, "num_members": 1})
    trainer = workspace.train()
    refined, raw = predicted(workspace)
    rule = Refinement.from_tensor(trainer.mutual_networks.refinement, trainer.label_space)
    image = torch.from_numpy(workspace.image(VALIDATION[0]))
    assert np.array_equal(refined, rule.logits(torch.from_numpy(raw), image, trainer.label_space, True).half().numpy())


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize(
    "config",
    [
        {"scan_labels": {"at": [0.5], "atlases_in_predictions": False}},
        {"refine_predictions": False},
        {"exemplar": [EXEMPLAR]},
        {"scan_labels": {"at": [0.5], "atlases": 0}},
        "too few",
    ],
    ids=["off", "not refined", "a slice", "no atlases", "too few scans"],
)
def test_checkpoints_without_annotated_volumes(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, config: Any) -> None:
    if config == "too few":
        monkeypatch.setattr(rounds, "refined_on", lambda *_: None)
        config = {}
    workspace.configure(**{**WHOLE, **config})
    trainer = workspace.train()
    assert trainer.mutual_networks.atlases is None
    assert "atlases" not in torch.load(workspace.fold() / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert "checkpoints hold" not in next(workspace.fold().glob("training_log_*.txt")).read_text()
    predicted(workspace)


def test_a_few_volumes_are_enough(workspace: Workspace) -> None:
    whole = [{"case": case} for case in TRAINING[:3]]
    workspace.configure(**{**WHOLE, "exemplar": whole, "scan_labels": {"at": [0.5], "atlases": 2}})
    trainer = workspace.make()
    trainer.initialize()
    trainer.get_dataloaders()
    assert trainer._scan_labels.atlases == rounds.chosen(TRAINING[:3], 2)


def test_members_and_volumes_are_weighed(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members that are sure overrule a volume of less than half the weight; what volumes do not know is the members' alone."""
    monkeypatch.setattr(rounds, "SHARE_OF_ATLASES", 0.45)
    config = {**AS_PREDICTED, "places": False}
    workspace.configure(**{**WHOLE, "scan_labels": config})
    trainer = workspace.make()
    trainer.initialize()
    trainer.get_dataloaders()
    shape = 1, 1, 40, 40
    probabilities = torch.full((4, *shape[1:]), 1e-4)
    probabilities[1, ..., :20], probabilities[0, ..., :20] = 0.99, 0.01
    probabilities[1, ..., 20:], probabilities[2, ..., 20:] = 0.55, 0.45
    known = np.full(shape[1:], 2, dtype=np.int8)
    known[:, 20:] = -1
    labels = trainer._scan_labels._labels_of(probabilities.log(), torch.zeros(shape), None, known)
    assert (labels[..., :20] == 1).all() and (labels[:, :20, 20:] == 2).all() and (labels[:, 20:, 20:] == 1).all()
    monkeypatch.setattr(rounds, "SHARE_OF_ATLASES", 0.65)
    labels = trainer._scan_labels._labels_of(probabilities.log(), torch.zeros(shape), None, known)
    assert (labels[:, :20] == 2).all() and (labels[:, 20:] == 1).all()


@pytest.mark.parametrize("prepare", [lambda workspace: {}, in_three_dimensions, with_regions], ids=["2d", "3d", "regions"])
def test_only_the_surroundings_of_registered_organs_are_worked_on(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, prepare: Callable[[Workspace], dict[str, Any]]
) -> None:
    workspace.configure(**WHOLE)
    trainer = workspace.make(**prepare(workspace))
    trainer.initialize()
    trainer.get_dataloaders()
    made, shape = trainer._scan_labels, (9, 60, 64)
    truth = torch.zeros(shape, dtype=torch.long)
    truth[3:6, 20:31, 30:44] = 1
    image = (truth > 0).float()[None] + 0.1 * torch.randn((1, *shape), generator=torch.Generator().manual_seed(0))
    says = made._space.certain(made._space.target(truth.roll(2, 2)[None]))[0].float()
    known = torch.ones(shape, dtype=torch.bool)
    known[:, :5] = False
    monkeypatch.setattr(atlas, "carried", lambda *_: (says.clone(), known))

    def labels() -> np.ndarray:
        refined = atlas.refined_on([], image, made.refinement, made._space, made._planar)
        assert refined is not None
        return made._decided(*refined)

    found = labels()
    assert (found[..., :5, :] == -1).all() and (found[..., 5:, :] >= 0).all() and (found > 0).any()
    seen: list[tuple[int, ...]] = []
    refine = refinement.refine
    monkeypatch.setattr(refinement, "refine", lambda p, *rest: (seen.append(tuple(p.shape[1:])), refine(p, *rest))[1])
    labels()
    monkeypatch.setattr(refinement, "LEAST_PROBABILITY", -1.0)
    assert np.array_equal(found, labels())
    assert max(seen[0][1:]) < 50 and seen[1] == shape
    monkeypatch.setattr(refinement, "LEAST_PROBABILITY", 2.0)
    assert not np.array_equal(found, labels()) and len(seen) == 2, "no organ, nothing to refine"


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize("lost", [False, True], ids=["kept", "lost"])
def test_a_continued_training_with_annotated_volumes(workspace: Workspace, lost: bool) -> None:
    workspace.configure(**{**WHOLE, "num_epochs": 3})
    unbroken = workspace.train()
    broken_off(workspace, "broken")
    workspace.interrupted(1)
    if lost:
        for path in (folder(workspace) / "epoch_0").iterdir():
            path.unlink()
        (folder(workspace) / "epoch_0").rmdir()
    scatter()
    resumed = workspace.resume()
    resumed.run_training()
    assert same_weights(weights(resumed), weights(unbroken))


@pytest.mark.usefixtures("trusting")
def test_a_label_of_volumes_that_is_damaged(workspace: Workspace) -> None:
    workspace.configure(**WHOLE)
    workspace.interrupted(1)
    (folder(workspace) / "epoch_0" / f"{UNLABELLED[0]}.npy").write_bytes(b"no array")
    with pytest.raises(CMEMSError, match=r"epoch_0.*cannot be read.*delete the folder .*scan_labels and continue with --c"):
        workspace.resume().run_training()


@pytest.mark.usefixtures("trusting")
def test_passes_of_the_earlier_consistency_are_counted(workspace: Workspace) -> None:
    workspace.configure(**WHOLE)
    trainer = workspace.train()
    config, batches = trainer._objective.config, trainer._objective.batches
    more = passes_per_step(config, batches) - passes_per_step(trainer.config, batches)
    steps = trainer.num_epochs * trainer.num_iterations_per_epoch
    assert logs(trainer)["scan_label_passes"][0] == pytest.approx(steps * more) and more > 0


# ------------------------------------------------------------------ predictions


def predicted(workspace: Workspace, fold: str | os.PathLike[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """What nnU-Net's own prediction makes of a scan with the trained model, and what the members say."""
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, use_mirroring=False)
    predictor.initialize_from_trained_model_folder(str(Path(fold or workspace.fold()).parent), (0,))
    image = torch.from_numpy(workspace.image(VALIDATION[0]))
    return predictor.predict_logits_from_preprocessed_data(image).numpy(), predict_like_folds(predictor, image).numpy()


@pytest.mark.parametrize(
    ("prepare", "share"),
    [(lambda workspace: {}, 0.25), (with_regions, 0.25), (lambda workspace: {}, 0.0)],
    ids=["classes", "regions", "not propagated"],
)
def test_predictions_are_refined_as_the_labels_are(
    workspace: Workspace, prepare: Callable[[Workspace], dict[str, Any]], share: float
) -> None:
    workspace.configure(**{**ON, "scan_labels": {"at": [0.5], "propagation": share}})
    trainer = workspace.train(**prepare(workspace))
    rule = trainer._scan_labels.prediction_refinement
    assert rule.config.smoothing == trainer.config.scan_labels.smoothing / 2 and rule.single == trainer._scan_labels.refinement.single
    stored = torch.load(workspace.fold() / "checkpoint_final.pth", weights_only=False)["network_weights"]["refinement"]
    assert torch.equal(stored, rule.to_tensor())
    refined, raw = predicted(workspace)
    image = torch.from_numpy(workspace.image(VALIDATION[0]))
    with predicting(trainer, mirroring=False) as predictor:
        mean, agreement, *_ = predict_with_agreement(predictor, image, trainer.label_space)
    assert agreement is not None and np.array_equal(mean.numpy(), raw)
    expected = rule.logits(mean, image, trainer.label_space, True, agreement if share else None).half()
    assert refined.dtype == raw.dtype and np.array_equal(refined, expected.numpy()) and not np.array_equal(refined, raw)


@pytest.mark.parametrize("config", [{"refine_predictions": False}, {"scan_labels": {"at": []}}], ids=["off", "no labels"])
def test_predictions_that_are_not_refined(workspace: Workspace, config: dict[str, Any]) -> None:
    workspace.configure(**{**ON, **config})
    trainer = workspace.train()
    assert trainer.mutual_networks.refinement is None
    assert "refinement" not in torch.load(workspace.fold() / "checkpoint_final.pth", weights_only=False)["network_weights"]
    refined, raw = predicted(workspace)
    assert np.array_equal(refined, raw)


def test_predictions_are_the_mean_over_turned_views(workspace: Workspace) -> None:
    """With test-time augmentation."""
    turns = (-40.0, 60.0)
    workspace.configure(**{**ON, "scan_labels": {"at": [0.5], "turns": turns}})
    trainer = workspace.train()
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(workspace.fold().parent), (0,))
    image, space = torch.from_numpy(workspace.image(VALIDATION[0])), trainer.label_space
    rule = Refinement.from_tensor(trainer.mutual_networks.refinement, space)
    assert rule.config.turns == turns
    with predicting(trainer, mirroring=False) as plain_predictor:
        members = list(predict_turned(plain_predictor, image, space, turns))
    found = {}
    for augmented in (False, True):
        predictor.use_mirroring = augmented
        prediction = predict_for(rule, predictor, image, space, True, turned=augmented)
        found[augmented] = predictor.predict_sliding_window_return_logits(image)
        assert torch.equal(found[augmented], rule.logits(prediction.logits, image, space, True, prediction.in_slices).half())
        said = (members[0].float() + members[1].float()) / 2
        assert torch.allclose(prediction.logits.float(), said, atol=0.02) == augmented
    assert (found[True] - found[False]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("config", "turns"), [({"num_members": 1}, (60.0,)), ({}, ())], ids=["how well one network agrees is not known", "off"]
)
def test_scans_that_are_not_seen_turned(workspace: Workspace, config: dict[str, Any], turns: tuple[float, ...]) -> None:
    workspace.configure(**{**ON, **config})
    trainer = workspace.train()
    image = torch.from_numpy(workspace.image(VALIDATION[0]))
    with predicting(trainer, mirroring=False) as predictor:
        members = list(predict_members(predictor, image))
        found = list(predict_turned(predictor, image, trainer.label_space, turns))
    assert len(found) == len(members) == trainer.config.num_members and all(map(torch.equal, found, members))


@pytest.mark.parametrize(
    ("prepare", "config", "predictions", "labels"),
    [
        (lambda workspace: {}, {}, True, True),
        (in_three_dimensions, {}, True, True),
        (lambda workspace: {}, {"exemplar": [EXEMPLAR, {**EXEMPLAR, "case": TRAINING[0]}]}, True, True),
        (lambda workspace: {}, {"exemplar": [{"case": EXEMPLAR["case"]}]}, False, False),
        (lambda workspace: {}, {"exemplar": [EXEMPLAR, {**EXEMPLAR, "slice": EXEMPLAR["slice"] + 1}]}, False, False),
        (lambda workspace: {}, {"scan_labels": {**TURNED, "turns": []}}, False, True),
        (lambda workspace: {}, {"scan_labels": {"at": [0.5]}}, True, False),
        (lambda workspace: {}, {"num_members": 1}, False, False),
    ],
    ids=["a slice", "thick slices", "slices of two cases", "a volume", "two slices of a case", "only labels", "defaults", "one member"],
)
def test_one_slice_does_not_tell_how_scans_lie(
    workspace: Workspace, prepare: Callable[[Workspace], dict[str, Any]], config: dict[str, Any], predictions: bool, labels: bool
) -> None:
    workspace.configure(**{**ON, "scan_labels": TURNED, **config})
    trainer = workspace.make(**prepare(workspace))
    trainer.initialize()
    trainer.get_dataloaders()
    rules, log = trainer._scan_labels, Path(trainer.log_file).read_text()
    assert rules.prediction_refinement.config.turns == ((-60, -30, 30, 60) if predictions else ())
    assert rules.refinement.config.turns == ((-60, 60) if labels else ())
    assert ("seen turned, too, by -60, -30, 30, 60 degrees" in log) == predictions
    assert ("see them turned, too, by -60, 60 degrees" in log) == labels


def test_slices_across_thick_voxels_lie_close_together(workspace: Workspace) -> None:
    """As coronal ones do where axial ones are thick; the painted axis comes first."""
    spacings = {(8.0, 1.5, 1.5): True, (1.5, 8.0, 1.5): False, (1.5, 1.5, 8.0): False, (1.5, 1.5, 1.5): False}
    assert {spacing: prediction_module.is_planar(spacing) for spacing in spacings} == spacings and prediction_module.is_planar((1.5, 8.0))
    for spacing, thick in spacings.items():
        trainer = workspace.make(plans={**workspace.plans(), "original_median_spacing_after_transp": list(spacing)})
        assert rounds.has_thick_slices(trainer) == thick


@pytest.mark.parametrize(
    "exemplars",
    [[{"case": CASES[1], "slice": 1}, {"case": CASES[1], "slice": 2}, {"case": CASES[0], "slice": 2}], [{"case": CASES[1]}]],
    ids=["slices of two cases", "a volume"],
)
def test_an_organ_whose_place_is_not_known(workspace: Workspace, exemplars: list[dict[str, Any]]) -> None:
    """Its place is not a number in the rule of predictions, which is no fault of the networks' weights."""
    label = workspace.label(CASES[1])
    label[label == 3] = 0
    workspace.set_label(CASES[1], label)
    workspace.configure(**{**ON, "exemplar": exemplars, "allow_missing_classes": True})
    trainer = workspace.train()
    assert not trainer.mutual_networks.refinement.isfinite().all() and trainer.current_epoch == 2


def test_scans_of_cubic_voxels_are_not_turned(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "is_planar", lambda spacing: False)
    workspace.configure(**{**ON, "scan_labels": {**TURNED, "in_space": True}})
    trainer = workspace.make(**in_three_dimensions(workspace))
    trainer.initialize()
    trainer.get_dataloaders()
    assert trainer._scan_labels.prediction_refinement.config.turns == trainer._scan_labels.refinement.config.turns == ()


def test_labels_are_of_the_mean_over_turned_views(workspace: Workspace) -> None:
    workspace.configure(**{**ON, "num_epochs": 3, "scan_labels": {"at": [0.3], "turns_in_labels": [-40, 60], "arranged_only": False}})
    trainer = workspace.make()
    workspace.interrupted(1, trainer)
    made, case, space = trainer._scan_labels, UNLABELLED[0], trainer.label_space
    made.before_epoch(trainer)
    image = torch.from_numpy(workspace.image(case))
    expected = {}
    with predicting(trainer, mirroring=False) as predictor:
        for turned in (False, True):
            prediction = predict_for(made.refinement, predictor, image, space, True, turned=turned)
            expected[turned] = made._labels_of(prediction.logits, image, prediction.in_slices)
    assert np.array_equal(made.files.whole(case, 1), expected[True]) and not np.array_equal(*expected.values())


def test_turned_views_show_the_surroundings_of_organs(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace.configure(**ON)
    trainer = workspace.make()
    trainer.initialize()
    patch = trainer.configuration_manager.patch_size
    image = torch.randn(1, 3, 3 * patch[0], 3 * patch[1], generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []

    def members(predictor: Any, view: Tensor) -> Iterator[Tensor]:
        """Both see the first class in a spot, which in the first view is in a corner."""
        seen.append(view)
        for _ in range(2):
            logits = torch.zeros(4, *view.shape[1:])
            logits[0], logits[1, 1, 4:10, -10:-4] = 3.0, 6.0
            yield logits

    monkeypatch.setattr(prediction_module, "predict_members", members)
    with predicting(trainer, mirroring=False) as predictor:
        found = predict_for(
            Refinement(ScanLabelsConfig(propagation=0.0, turns=(90.0,)), (True,) * 4, 1.0),
            predictor, image, trainer.label_space, True, turned=True,
        )  # fmt: skip
    assert found.shown == ((3, 3 * patch[0], 3 * patch[1]), (3, *patch)) and torch.equal(seen[0], image)
    assert torch.allclose(seen[1], turned_scan(image[..., : patch[0], -patch[1] :], 90, predictor.configuration_manager.spacing[-2:]))


def test_the_folder_goes_after_the_final_checkpoint(workspace: Workspace) -> None:
    workspace.configure(**ON)
    trainer = workspace.make()
    there = []
    save = trainer.save_checkpoint
    trainer.save_checkpoint = lambda path: (save(path), there.append((os.path.basename(path), folder(workspace).exists())))
    trainer.run_training()
    assert ("checkpoint_final.pth", True) in there and not folder(workspace).exists()


def test_switched_off_nothing_changes(workspace: Workspace) -> None:
    """And a round that comes after the end is none."""
    trained = []
    for at in ([], [0.99]):
        workspace.configure(**{**ON, "scan_labels": {"at": at}})
        trained.append(workspace.train())
    assert same_weights(*map(weights, trained))
    assert not any("scan_label" in key for key in logs(trained[0]))
    workspace.configure(**ON)
    assert not same_weights(weights(workspace.train()), weights(trained[0]))


@pytest.mark.parametrize("deep", [False, True], ids=["2d", "3d"])
@pytest.mark.parametrize("whole", [False, True], ids=["slice", "volume"])
def test_what_the_annotation_says_about_pieces(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, whole: bool, deep: bool) -> None:
    """A class that each slice shows in one piece may have two in the volume; a single slice cannot know."""
    case = EXEMPLAR["case"]
    label = workspace.label(case)
    value = 3
    label[label == value] = 0
    label[0, 0, :4, :4] = label[0, 4, -4:, -4:] = value
    workspace.set_label(case, label)
    workspace.configure(**{**ON, "exemplar": [{"case": case} if whole else EXEMPLAR], "allow_missing_classes": True})
    trainer = workspace.make(**(in_three_dimensions(workspace) if deep and whole else {}))
    trainer.initialize()
    trainer.get_dataloaders()
    volumes = rounds.whole_volumes(trainer.exemplars, trainer.preprocessed_dataset())
    assert len(volumes) == whole and trainer._scan_labels.refinement.share == (1.0 if whole else 0.5)
    if whole:
        assert volumes[0].shape == label.shape[1:] and np.array_equal(volumes[0] == value, label[0] == value)
        assert not trainer._scan_labels.refinement.single[value]


@pytest.mark.parametrize(
    ("whole", "config", "expected"),
    [(True, {}, True), (True, {"places": False}, False), (False, {}, False)],
    ids=["volume", "off", "slice"],
)
def test_where_organs_lie_is_known_from_whole_volumes(workspace: Workspace, whole: bool, config: dict[str, Any], expected: bool) -> None:
    """Labels and predictions use it, and the log says so."""
    scan_labels = {"at": [0.5], **config}
    workspace.configure(**{**ON, "exemplar": [{"case": EXEMPLAR["case"]} if whole else EXEMPLAR], "scan_labels": scan_labels})
    trainer = workspace.train()
    rules = trainer._scan_labels.refinement, trainer._scan_labels.prediction_refinement
    assert [rule.places is not None for rule in rules] == [expected] * 2
    assert ("scan_labels.places" in next(workspace.fold().glob("training_log_*.txt")).read_text()) == expected
    if expected:
        known = Places.of([workspace.label(EXEMPLAR["case"])[0]], [], trainer.label_space, True)
        stored = torch.load(workspace.fold() / "checkpoint_final.pth", weights_only=False)["network_weights"]["refinement"]
        found = Refinement.from_tensor(stored, trainer.label_space).places
        assert known is not None and found is not None and np.allclose(found.middles, known.middles, atol=1e-4)


def test_where_organs_end_is_known_from_painted_slices(workspace: Workspace) -> None:
    """The slice that shows one organ alone says it of the others; labels and predictions use it, and the log says so."""
    case = EXEMPLAR["case"]
    label = workspace.label(case).copy()
    label[0, 3] = np.where(label[0, 3] == 1, 1, 0)
    workspace.set_label(case, label)
    workspace.configure(**{**ON, "exemplar": [{"case": case, "slice": z} for z in (1, 2, 3)], "scan_labels": {"at": [0.5]}})
    trainer = workspace.train()
    known = Places.of([], [{z: label[0, z] for z in (1, 2, 3)}], trainer.label_space, True, (1.0, 1.0))
    assert known is not None and known.ends is not None and np.isfinite(known.ends[:, 1]).any()
    stored = torch.load(workspace.fold() / "checkpoint_final.pth", weights_only=False)["network_weights"]["refinement"]
    for rule in (trainer._scan_labels.refinement, Refinement.from_tensor(stored, trainer.label_space)):
        assert rule.places is not None and rule.places.ends is not None
        np.testing.assert_allclose(rule.places.ends, known.ends, atol=1e-4)
        np.testing.assert_allclose(rule.places.factors, known.factors, rtol=1e-6)
    assert "not far beyond where slices without them" in next(workspace.fold().glob("training_log_*.txt")).read_text()


@pytest.mark.parametrize("prepare", [lambda workspace: {}, with_regions, in_three_dimensions], ids=["2d", "regions", "3d"])
def test_labels_keep_to_places(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, prepare: Callable[[Workspace], dict[str, Any]]
) -> None:
    """Distances between slices count as the annotated volume's, or have a factor where slices are not resampled."""
    seen: list[Places] = []
    monkeypatch.setattr(Places, "seen_in", lambda self, probabilities, space: (seen.append(self), probabilities)[1])
    workspace.configure(**{**ON, "exemplar": [{"case": EXEMPLAR["case"]}]})
    trainer = workspace.train(**prepare(workspace))
    assert len(seen) >= len(UNLABELLED) and {known.stretched for known in seen} == {len(trainer.configuration_manager.patch_size) == 2}


@pytest.mark.parametrize(
    ("organs", "empty", "depth", "is_whole"),
    [
        ([2, 3, 4, 5, 6], [0, 9], 12, True),
        ([2, 3, 4, 5, 6], [], 12, False),
        ([0, 1, 2, 3, 4], [], 5, True),
        ([2, 3, 4, 5], [0, 9], 12, False),
        ([2, 3, 4, 5, 7], [0, 9], 12, False),
    ],
    ids=["a volume", "painted slices", "all of them", "a few", "a gap"],
)
def test_which_slices_make_a_volume(
    monkeypatch: pytest.MonkeyPatch, organs: list[int], empty: list[int], depth: int, is_whole: bool
) -> None:
    """A 2D training has no more empty slices of a wholly annotated volume than slices with organs."""
    monkeypatch.setattr(rounds, "open_image", lambda case, dataset: np.zeros((1, depth, 4, 4)))
    image = np.zeros((1, 4, 4), dtype=np.float32)
    exemplars = [Exemplar("a", "z", z, z, image, np.full((4, 4), int(z in organs) * (z + 1), dtype=np.int16)) for z in organs + empty]
    found = rounds.whole_volumes(exemplars[::-1], None)  # type: ignore[arg-type]
    assert len(found) == is_whole
    painted = rounds.painted_slices(exemplars, None)  # type: ignore[arg-type]
    assert [sorted(slices) for slices in painted] == ([] if is_whole else [sorted(organs + empty)])
    assert not rounds.painted_slices(exemplars[:1], None), "one slice says nothing about the others"  # type: ignore[arg-type]
    assert not is_whole or found[0][:, 0, 0].tolist() == [z + 1 for z in organs]


def test_how_far_apart_slices_are_in_other_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    distances = {"annotated": 2.5, "thin": 1.0, "thick": 5.0}
    monkeypatch.setattr(rounds, "read_properties", lambda case, dataset: {"spacing": [7.0, distances[case], 9.0]})
    dataset = PreprocessedDataset("", None, (1, 0, 2), {})  # type: ignore[arg-type]
    image = np.zeros((1, 4, 4), dtype=np.float32)
    exemplars = [Exemplar("annotated", "z", z, z, image, np.zeros((4, 4), dtype=np.int16)) for z in (3, 5)]
    assert rounds.factors_of_distances(exemplars, dataset, dict.fromkeys(["thin", "thick"], dataset)) == (0.5, 2.5)
    assert rounds.factors_of_distances(exemplars, dataset, {"thick": dataset}) == (0.5, 0.5)


@pytest.mark.parametrize("in_space", [False, True])
def test_volumes_of_cubic_voxels_only_where_asked_for(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, in_space: bool) -> None:
    monkeypatch.setattr(rounds, "is_planar", lambda spacing: False)
    workspace.configure(**{**ON, "scan_labels": {"at": [0.5], "in_space": in_space}})
    trainer = workspace.train(**in_three_dimensions(workspace))
    assert any("scan_label_dice" in key for key in logs(trainer)) == in_space


def test_a_few_scans_only(workspace: Workspace) -> None:
    workspace.configure(**{**ON, "num_epochs": 3, "log_hidden_accuracy": False, "scan_labels": {"at": [0.3], "most_scans": 2}})
    trainer = workspace.interrupted(2)
    assert sorted(path.stem for path in (folder(workspace) / "epoch_1").iterdir()) == rounds.chosen(UNLABELLED, 2)
    assert not any("scan_label_dice" in key for key in logs(trainer))


def test_a_long_training_has_early_rounds_and_early_consistency(workspace: Workspace) -> None:
    """Of 8 steps, 4 early: consistency from the second one on, not the third, and rounds after 2 and 4 of them."""
    late = {"start": 0.25, "rampup": 0.0}
    workspace.configure(
        **{**ON, "num_epochs": 4, "iterations_per_epoch": 2, "early_steps": 4, "image": late, "feature": late, "checkpoint_every": 1}
    )
    trainer = workspace.make()
    step, asked = trainer.train_step, []

    def remembered(batch: dict[str, Tensor]) -> Any:
        progress = trainer._progress()
        asked.append(trainer._objective.config.image.weight_at(progress))
        return step(batch)

    trainer.train_step = remembered
    workspace.interrupted(3, trainer)
    assert asked == [0.0, *[1.0] * 5]
    labelled = [epoch for epoch, count in enumerate(logs(trainer)["scan_label_passes"]) if count > 0]
    assert labelled == [1, 2], "half of 4 steps, half of 8"
    assert trainer.config.early_steps == 4 and trainer.config.scan_labels.at == (0.5,), "as asked, for who continues"


def test_probabilities_cannot_be_compared_with_labels(workspace: Workspace) -> None:
    workspace.configure(**ON, consistency="mean_squared_error")
    with pytest.raises(CMEMSError, match=r"'scan_labels\.at'.*\"pseudo_label\".*\"mean_squared_error\" \(.*cmems\.json\)"):
        workspace.train()


def test_where_rounds_begin() -> None:
    assert starts(ScanLabelsConfig(at=(0.6, 0.8)), 200) == [120, 160]
    assert starts(ScanLabelsConfig(at=(0.07, 0.571)), 100) == [7, 58]
    assert starts(ScanLabelsConfig(at=(0.4, 0.5, 0.9)), 2) == [1]
    assert starts(ScanLabelsConfig(at=()), 10) == starts(ScanLabelsConfig(at=(0.5,)), 1) == []


@pytest.mark.parametrize("at", [[0.5, 0.5], [0.6, 0.4, 0.8], [0.0], [0.5, 1.0], [1.5], 0.5, ["a"], [True]])
def test_unusable_fractions(workspace: Workspace, at: Any) -> None:
    workspace.configure(scan_labels={"at": at})
    with pytest.raises(CMEMSError, match=r"cmems\.json: 'scan_labels\.at' (is|must be a list of numbers)"):
        workspace.make()


# ------------------------------------------------------------------ killed and continued


def broken_off(workspace: Workspace, name: str) -> None:
    """The next training has a results folder of its own."""
    workspace.results = workspace.results.with_name(name)
    os.environ["nnUNet_results"] = str(workspace.results)


def test_a_continued_training_ends_with_the_same_weights(workspace: Workspace) -> None:
    """With rounds before the epochs 1 and 2: killed before a round, and after both."""
    workspace.configure(**{**ON, "num_epochs": 4, "tau": 0.4, "scan_labels": {"at": [0.25, 0.5], "arranged_only": False}})
    unbroken = workspace.make()
    end, left = unbroken.on_train_end, []
    unbroken.on_train_end = lambda: (left.append(unbroken._scan_labels.files.rounds()), end())
    unbroken.run_training()
    assert left == [[2]], "the first round is of no use once a checkpoint is newer than the second"
    expected = written(workspace.fold())
    assert np.isfinite(expected["history"]["scan_label_dice/mean"][1:3]).all()
    for epochs in (1, 3):
        broken_off(workspace, f"broken{epochs}")
        workspace.interrupted(epochs)
        scatter()
        resumed = workspace.resume()
        assert resumed.current_epoch == epochs
        resumed.run_training()
        assert same_weights(weights(resumed), weights(unbroken))
        assert differences(written(workspace.fold()), expected) == []


def test_a_checkpoint_that_is_older_than_the_last_round(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The round before it is kept until a checkpoint is newer: killed in epoch 5, the training goes on with epoch 3."""
    monkeypatch.setattr("nnunetv2_cmems.trainers.history.History.last_is_best", lambda self: False)
    config = {**ON, "num_epochs": 6, "tau": 0.4, "checkpoint_every": 3, "scan_labels": {"at": [0.16, 0.6]}}
    workspace.configure(**config)
    unbroken = workspace.train()
    broken_off(workspace, "broken")
    trainer = workspace.make()
    step, there = trainer.train_step, []

    def killed(batch: Any) -> Any:
        there.append(trainer._scan_labels.files.rounds())
        if trainer.current_epoch == 5:
            raise KeyboardInterrupt
        return step(batch)

    trainer.train_step = killed
    with pytest.raises(KeyboardInterrupt):
        trainer.run_training()
    assert there == [[]] * 2 + [[1]] * 6 + [[1, 4]] * 3
    scatter()
    resumed = workspace.resume()
    step, there = resumed.train_step, []
    resumed.train_step = lambda batch: (there.append(resumed._scan_labels.files.rounds()), step(batch))[1]
    assert resumed.current_epoch == 3
    resumed.run_training()
    assert there == [[1]] * 2 + [[1, 4]] * 4
    assert same_weights(weights(resumed), weights(unbroken))


def test_a_round_that_is_lost_is_made_again(workspace: Workspace) -> None:
    workspace.configure(**{**ON, "num_epochs": 4, "scan_labels": {"at": [0.3]}})
    workspace.interrupted(3)
    for path in (folder(workspace) / "epoch_2").iterdir():
        path.unlink()
    (folder(workspace) / "epoch_2").rmdir()
    resumed = workspace.resume()
    resumed.on_train_end = lambda: None
    resumed.run_training()
    assert sorted(path.stem for path in (folder(workspace) / "epoch_2").iterdir()) == UNLABELLED


def test_an_interrupted_round_leaves_no_half_one(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace.configure(**ON)
    save = np.save

    def killed(path: str, labels: np.ndarray) -> None:
        if UNLABELLED[1] in path:
            raise KeyboardInterrupt
        save(path, labels)

    monkeypatch.setattr(np, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        workspace.train()
    assert ScanLabelFiles(str(folder(workspace))).rounds() == [], "what there is of it has another name"
    assert [path.name for path in folder(workspace).iterdir()] == ["epoch_1.tmp"]
    monkeypatch.setattr(np, "save", save)
    resumed = workspace.resume()
    resumed.on_train_end = lambda: None
    resumed.run_training()
    assert [path.name for path in folder(workspace).iterdir()] == ["epoch_1"]


def test_a_full_disk_is_one_sentence(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace.configure(**ON)

    def full(path: str, labels: np.ndarray) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", path)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(CMEMSError, match=r"epoch_1\.tmp.*\.npy cannot be written \(No space left on device\).*make room.*--c"):
        workspace.train()
    assert list(folder(workspace).iterdir()) == [] and (workspace.fold() / "checkpoint_latest.pth").is_file()


@pytest.mark.parametrize("at", [[], [0.5]])
def test_a_fresh_start_removes_what_an_older_training_left(workspace: Workspace, at: list[float]) -> None:
    workspace.configure(**{**ON, "num_epochs": 1, "scan_labels": {"at": at}})
    (folder(workspace) / "epoch_0").mkdir(parents=True)
    (folder(workspace) / "epoch_0" / f"{UNLABELLED[0]}.npy").write_bytes(b"old")
    trainer = workspace.make()
    trainer.on_train_start()
    assert not folder(workspace).exists()


# ------------------------------------------------------------------ the loader


@pytest.fixture
def dataset(workspace: Workspace) -> PreprocessedDataset:
    return PreprocessedDataset.from_plans(
        str(workspace.images), nnUNetDatasetBlosc2, PlansManager(workspace.plans()), workspace.dataset_json()
    )


def write_round(files: ScanLabelFiles, epoch: int, case: str, labels: np.ndarray) -> None:
    os.makedirs(files.round_folder(epoch), exist_ok=True)
    np.save(os.path.join(files.round_folder(epoch), f"{case}.npy"), labels.astype(np.int8))


@pytest.mark.parametrize("patch", [(8, 8), (2, 8, 8)], ids=["2d", "3d"])
@pytest.mark.parametrize("regions", [0, 2])
def test_the_labels_are_of_the_same_place(
    workspace: Workspace, dataset: PreprocessedDataset, tmp_path: Path, patch: tuple[int, ...], regions: int
) -> None:
    shape = (3, 12, 14)
    number = np.arange(np.prod(shape)).reshape(shape) % 100
    workspace.set_image(CASES[0], (number + 1)[None].astype(np.float32))
    files = ScanLabelFiles(str(tmp_path / "rounds"), regions)
    write_round(files, 7, CASES[0], np.stack([number, 99 - number]) if regions else number)
    crop = tuple(n + 4 for n in patch)  # reaches beyond the image
    arguments = {CASES[0]: dataset}, 40, crop, patch
    np.random.seed(3)
    batch = next(UnlabelledLoader(*arguments, files))
    np.random.seed(3)
    plain = next(UnlabelledLoader(*arguments))
    assert set(plain) == {"data", "offset"} and all(torch.equal(plain[key], batch[key]) for key in plain)
    image, label = batch["data"][:, 0], batch["label"]
    inside = image > 0
    assert inside.any() and not inside.all() and label.dtype == torch.int8
    first = label[:, 0] if regions else label
    assert torch.equal(first.long(), image.long() - 1), "and -1 beyond the image"
    if regions:
        assert label.shape == (40, 2, *crop) and torch.equal(label[:, 1].long(), torch.where(inside, 100 - image.long(), -1))


def test_the_newest_complete_round_counts(dataset: PreprocessedDataset, tmp_path: Path) -> None:
    """A loader in a worker process sees a round that was made after it was sent there."""
    files = ScanLabelFiles(str(tmp_path / "rounds"))
    loader = UnlabelledLoader({CASES[0]: dataset, CASES[2]: dataset}, 30, (32, 32), (32, 32), files)
    image = loader._shape(CASES[0])[1:]
    assert set(next(loader)["label"].unique().tolist()) == {-1}
    write_round(files, 9, CASES[0], np.full(image, 1))
    assert set(next(loader)["label"].unique().tolist()) == {-1, 1}, "the other case has no labels"
    write_round(files, 10, CASES[0], np.full(image, 2))
    os.rename(files.round_folder(10), files.round_folder(11) + ".tmp")
    assert set(next(loader)["label"].unique().tolist()) == {-1, 1}
    os.rename(files.round_folder(11) + ".tmp", files.round_folder(11))
    assert set(next(loader)["label"].unique().tolist()) == {-1, 2}
    Path(files.round_folder(11), f"{CASES[0]}.npy").write_bytes(b"no array")
    error = next(loader)["error"]
    assert "epoch_11" in error and f"delete the folder {files.folder} and continue with --c" in error


def test_what_a_round_lacks_an_older_one_may_have(dataset: PreprocessedDataset, tmp_path: Path) -> None:
    """Annotated volumes are registered onto more scans than the members label."""
    files = ScanLabelFiles(str(tmp_path / "rounds"))
    loader = UnlabelledLoader({CASES[0]: dataset, CASES[2]: dataset}, 30, (32, 32), (32, 32), files)
    for case in (CASES[0], CASES[2]):
        write_round(files, 0, case, np.full(loader._shape(case)[1:], 1))
    write_round(files, 3, CASES[0], np.full(loader._shape(CASES[0])[1:], 2))
    assert set(next(loader)["label"].unique().tolist()) == {1, 2}
    assert files.cases(0) == {CASES[0], CASES[2]} and files.cases(3) == {CASES[0]} and files.cases(5) == set()
    assert (files.whole(CASES[0], 3) == 2).all()


# ------------------------------------------------------------------ the loss


@DIMENSIONS
def test_with_labels_the_terms_are_those_of_a_teacher_who_says_them(d: int) -> None:
    torch.manual_seed(3)
    made = objective(CALM, d)
    unlabelled = torch.randn(2, 1, *[8] * d)
    labels = torch.randint(0, 3, (2, *[8] * d), dtype=torch.int8)
    says = 30.0 * torch.nn.functional.one_hot(labels.long(), 3).movedim(-1, 1).float()
    pupil = [torch.randn(2, 3, *[8] * d) for _ in range(2)]

    def terms(weak: list[Tensor], given: Tensor | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        return made(FakeNetwork(weak, pupil, pupil), unlabelled, 1.0, None, given).terms

    expected = terms([says, says], None)
    found = terms([certain(1, d=d), unsure(d=d)], labels)
    for name in ("image", "feature"):
        torch.testing.assert_close(found[name], expected[name])
        assert not torch.isclose(terms([certain(1, d=d), certain(2, d=d)], None)[name], expected[name])
    half = labels.clone()
    half[1] = -1
    one, other = says.clone(), certain(1, d=d)
    one[1] = other[1]
    mixed = terms([certain(1, d=d), certain(1, d=d)], half)
    for name, value in terms([one, one], None).items():
        torch.testing.assert_close(mixed[name], value)


@DIMENSIONS
def test_what_has_no_label_joins_later(d: int) -> None:
    """Where scans have labels from the first step on, the others wait until members know their organs."""
    made = objective(CALM, d)
    made.joining = 0.5
    unlabelled, pupil = torch.randn(2, 1, *[8] * d), [torch.randn(2, 3, *[8] * d) for _ in range(2)]

    def terms(progress: float, second: int) -> dict[str, Tensor]:
        labels = torch.zeros(2, *[8] * d, dtype=torch.int8)
        labels[1] = second
        torch.manual_seed(0)
        return made(FakeNetwork([certain(1, d=d), certain(1, d=d)], pupil, pupil), unlabelled, progress, None, labels).terms

    for name in ("image", "feature"):
        torch.testing.assert_close(terms(0.6, -1)[name], terms(0.4, 1)[name])
        assert terms(0.4, -1)[name] < terms(0.6, -1)[name]


def test_statistics_stay_the_networks() -> None:
    made = objective(CALM)
    arguments = FakeNetwork([certain(1), certain(2)]), torch.randn(2, 1, 8, 8), 1.0, None
    plain, labelled = made(*arguments), made(*arguments, torch.zeros(2, 8, 8, dtype=torch.int8))
    for name, value in plain.statistics.items():
        assert torch.equal(value, labelled.statistics[name])


@pytest.mark.parametrize("space", [CLASSES, REGIONS], ids=["classes", "regions"])
@DIMENSIONS
def test_labels_move_with_the_image(d: int, space: Any) -> None:
    views = SpatialConfig(rotation=40.0, scale=(0.5, 1.5), shift=0.2, elastic=0.05)
    made = objective(dataclasses.replace(CALM, unlabelled_views=views), d, space=space)
    image = torch.zeros(3, 1, *[14] * d)
    image[(slice(None), slice(None), *[slice(3, 10)] * d)] = 1
    labels = (image[:, 0] > 0).to(torch.int8)
    if space is REGIONS:
        labels = torch.stack([labels, 1 - labels, labels], 1)
    torch.manual_seed(5)
    alone, nothing = made.unlabelled_crops(image)
    torch.manual_seed(5)
    crops, moved = made.unlabelled_crops(image, labels)
    assert nothing is None and torch.equal(crops, alone)
    first = moved[:, 0] if space is REGIONS else moved
    assert first.shape == (3, *[8] * d) and first.dtype == torch.long
    agree = (first == 1) == (crops[:, 0] > 0.5)
    assert agree.float().mean() > 0.93 and first.unique().tolist() in ([0, 1], [-1, 0, 1])
    if space is REGIONS:
        assert torch.equal(moved[:, 2], first) and torch.equal(moved[:, 1], torch.where(first < 0, -1, 1 - first))


def test_beyond_the_crop_nothing_is_known() -> None:
    views = SpatialConfig(rotation=0.0, scale=(0.5, 0.5), shift=0.0, elastic=0.0)
    made = objective(dataclasses.replace(CALM, unlabelled_views=views))
    _, moved = made.unlabelled_crops(torch.zeros(1, 1, 8, 8), torch.zeros(1, 8, 8, dtype=torch.int8))
    assert (moved[0, 2:6, 2:6] == 0).all() and (moved[0, 0] == -1).all()


def test_what_is_known_comes_first() -> None:
    taught = PseudoLabel(torch.tensor([[2, 2, 2]]), torch.tensor([[True, False, False]]))
    found = known_first(torch.tensor([[-1, -1, 0]]), taught)
    assert found.labels.tolist() == [[2, 2, 0]] and found.confident.tolist() == [[True, False, True]]
    regions = known_first(torch.tensor([[1, -1]]), PseudoLabel(torch.tensor([[False, False]]), torch.tensor([[False, False]])))
    assert regions.labels.dtype == torch.bool and regions.labels.tolist() == [[True, False]]
    assert regions.confident.tolist() == [[True, False]]


@DIMENSIONS
@pytest.mark.parametrize("space", ["classes", "regions"])
def test_a_step_with_labels_never_waits_for_the_device(d: int, space: str) -> None:
    meta = torch.device("meta")
    regions = Regions(("a", "b"), None, ((1, 2), (2,)))
    made = meta_objective(d, CLASSES if space == "classes" else regions, CALM, False, meta)
    networks = MutualNetworks(lambda: network(d, 3 if space == "classes" else 2), 2).to(meta)
    shape = (2, *[20] * d) if space == "classes" else (2, 2, *[20] * d)
    labels = torch.zeros(shape, dtype=torch.int8, device=meta)
    step = made(networks, torch.randn(2, 1, *[20] * d, device=meta), 0.9, torch.zeros(2, d, device=meta), labels)
    step.total.backward()
    assert step.total.device == meta and set(step.terms) >= {"image", "feature"}
