"""How right the pseudo-labels are, where hidden labels exist: golden values, and no trace in the training."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CASES, PATCH, Workspace
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from nnunetv2_cmems.data.exemplar import PreprocessedDataset
from nnunetv2_cmems.method.label_space import Classes, LabelSpace, Regions
from nnunetv2_cmems.method.networks import MutualNetworks
from nnunetv2_cmems.trainers.hidden_labels import CONFIDENCES, HiddenLabels, Reliability

SPACE = Classes(("wall", "cavity"))
REGIONS = Regions(("heart", "wall", "cavity"), None, ((1, 2), (1,), (2,)))
CPU = torch.device("cpu")


@pytest.fixture
def dataset(workspace: Workspace) -> PreprocessedDataset:
    return PreprocessedDataset.from_plans(
        str(workspace.images), nnUNetDatasetBlosc2, PlansManager(workspace.plans()), workspace.dataset_json()
    )


def sample(cases: list[str], dataset: PreprocessedDataset, patch: tuple[int, ...] = PATCH, space: LabelSpace = SPACE) -> HiddenLabels:
    found = HiddenLabels.of(cases, dataset, patch, space)
    assert found is not None
    return found


def test_central_crops_of_the_middle_slices(workspace: Workspace, dataset: PreprocessedDataset) -> None:
    found = sample(CASES, dataset)
    assert found.images.shape == (6, 1, 32, 32) and found.images.dtype == torch.float32
    assert found.labels.shape == (6, 32, 32) and found.labels.dtype == torch.int16
    for i, case in enumerate(CASES):
        assert np.array_equal(found.images[i], workspace.image(case)[:, 2, 2:34, 2:34])
        assert np.array_equal(found.labels[i], workspace.label(case)[0, 2, 2:34, 2:34])


def test_central_crops_of_volumes(workspace: Workspace, dataset: PreprocessedDataset) -> None:
    found = sample(CASES, dataset, (3, 32, 40))
    assert found.images.shape == (6, 1, 3, 32, 40) and found.labels.shape == (6, 3, 32, 40)
    for i, case in enumerate(CASES):
        assert np.array_equal(found.images[i, ..., 2:38], workspace.image(case)[:, 1:4, 2:34])
        assert np.array_equal(found.labels[i, ..., 2:38], workspace.label(case)[0, 1:4, 2:34])
    assert (found.labels[..., :2] == -1).all()


def test_what_is_not_annotated_is_unknown(workspace: Workspace, dataset: PreprocessedDataset) -> None:
    label = workspace.label(CASES[0])
    label[..., :10] = 4
    workspace.set_label(CASES[0], label)
    workspace.set_label(CASES[1], np.full_like(label, 4))  # nothing of it can be compared with
    found = sample(CASES[:3], dataset, space=Classes(("wall", "left cavity", "right cavity"), 4))
    assert len(found.labels) == 2
    assert (found.labels[0, :, :8] == -1).all() and (found.labels[0, :, 8:] >= 0).all()


def test_what_lies_beyond_the_image_has_no_label(workspace: Workspace, dataset: PreprocessedDataset) -> None:
    found = sample(CASES[:1], dataset, (40, 40))
    assert (found.labels[0, :2] == -1).all() and (found.images[0, :, :2] == 0).all()
    assert np.array_equal(found.labels[0, 2:38, 2:38], workspace.label(CASES[0])[0, 2])


def test_cases_without_a_usable_label_are_passed_over(workspace: Workspace, dataset: PreprocessedDataset) -> None:
    (workspace.images / f"{CASES[0]}_seg.b2nd").unlink()
    (workspace.images / f"{CASES[1]}_seg.b2nd").write_bytes(b"no label" * 100)
    spoilt = workspace.images / f"{CASES[2]}_seg.b2nd"
    content = bytearray(spoilt.read_bytes())
    content[len(content) // 4 : -(len(content) // 4)] = b"\xaa" * len(content[len(content) // 4 : -(len(content) // 4)])
    spoilt.write_bytes(content)
    found = sample(CASES, dataset)
    assert np.array_equal(found.images, np.stack([workspace.image(case)[:, 2, 2:34, 2:34] for case in CASES[3:]]))
    assert HiddenLabels.of(CASES[:3], dataset, PATCH, SPACE) is None
    assert HiddenLabels.of([], dataset, PATCH, SPACE) is None


class Described:
    """A data set of 40 cases that notes which are asked for."""

    asked: list[str] = []

    def __init__(self, folder: str, identifiers: list[str]) -> None:
        pass

    def load_case(self, case: str) -> Any:
        self.asked.append(case)
        return np.zeros((1, 3, 8, 8)), np.zeros((1, 3, 8, 8)), None, {}


def test_at_most_sixteen_cases_evenly_spread(tmp_path: Path) -> None:
    dataset = PreprocessedDataset(str(tmp_path), Described, (0, 1, 2), {1: "wall"})  # type: ignore[arg-type]
    cases = [f"case{i:02d}" for i in range(40)]
    Described.asked = []
    assert len(sample(cases, dataset, (8, 8)).images) == 16
    places = [cases.index(case) for case in Described.asked]
    assert len(set(places)) == 16 and places[0] < 3 and places[-1] >= 28


def test_of_large_volumes_fewer_cases(tmp_path: Path) -> None:
    class Empty:  # a view of one number: no memory
        def __init__(self, folder: str, identifiers: list[str]) -> None:
            pass

        def load_case(self, case: str) -> Any:
            return *(np.broadcast_to(np.float32(0), (1, 64, 64, 64)) for _ in range(2)), None, {}

    dataset = PreprocessedDataset(str(tmp_path), Empty, (0, 1, 2), {1: "wall"})  # type: ignore[arg-type]
    cases = [f"case{i:02d}" for i in range(40)]
    assert [len(sample(cases, dataset, patch).images) for patch in ((64, 64, 64), (64, 96, 96), (192, 192, 192))] == [16, 7, 4]


class Member(nn.Module):
    """Says the same of every image: ``logits`` (K, Y, X), as the finest of two scales."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> list[Tensor]:
        assert not torch.is_grad_enabled()
        finest = self.logits.expand(len(x), *self.logits.shape)
        return [finest, finest[..., ::2]]


def network(*rows: list[tuple[int, float]]) -> MutualNetworks:
    """One member for each row of (class, probability) of the pixels of an image of one row; the other classes share the rest."""
    members = []
    for row in rows:
        p = torch.tensor([[confidence if k == label else (1 - confidence) / 2 for label, confidence in row] for k in range(3)])
        members.append(Member(p.log()[:, None]))
    made = iter(members)
    return MutualNetworks(lambda: next(made), len(members))


ONE = [(1, 0.9), (1, 0.9), (0, 0.9), (2, 0.6)]
OTHER = [(1, 0.9), (0, 0.8), (0, 0.9), (2, 0.9)]
TRUTH = torch.tensor([[[1, 1, 1, 2]]])  # (N, Y, X)


def test_accuracy_over_the_pixels_that_reach_tau() -> None:
    """Of 4 + 4 pixels, 3 and 3 reach 0.85; right are 2 (ONE: the wall twice) and 2 (OTHER: wall and cavity)."""
    values = HiddenLabels(torch.zeros(1, 1, 1, 4), TRUTH, SPACE).accuracy(network(ONE, OTHER), 0.85, CPU)
    assert values["pseudo_label_accuracy"] == pytest.approx(4 / 6)
    # wall: shared 2 + 1; sizes (2 + 3) / 2 and (1 + 2) / 2. cavity: shared 0 + 1; sizes 0 and 1
    assert values["pseudo_label_dice/wall"] == pytest.approx(3 / 4)
    assert values["pseudo_label_dice/cavity"] == pytest.approx(1.0)
    assert values["pseudo_label_dice/mean"] == pytest.approx(7 / 8)


def test_reliability_by_bins_of_confidence() -> None:
    """OTHER teaches ONE and ONE teaches OTHER: 0.9 four times + 0.9 (3 + 2 right), 0.8 once (wrong), 0.6 once (right)."""
    labels = HiddenLabels(torch.zeros(1, 1, 1, 4), TRUTH, SPACE)
    values = labels.accuracy(network(ONE, OTHER), 0.85, CPU)
    every, foreground = labels.reliability
    shown = {edge: (every.count[i], every.confidence[i], every.right[i]) for i, edge in enumerate(CONFIDENCES[:-1]) if every.count[i]}
    assert shown == {
        0.6: (1, pytest.approx(0.6), 1),
        0.8: (1, pytest.approx(0.8), 0),
        0.9: (6, pytest.approx(5.4), 4),
    }
    assert values["pseudo_label_ece"] == pytest.approx((0.4 + 0.8 + 1.4) / 8)
    assert foreground.count.sum() == 5 and foreground.right.sum() == 5  # background was said three times, never rightly
    assert len(every.to_json()["count"]) == len(CONFIDENCES) - 1


@pytest.mark.parametrize(("confidence", "edge"), [(0.0, 0.0), (0.0999, 0.0), (0.95, 0.95), (0.9799, 0.95), (0.9999, 0.999), (1.0, 0.999)])
def test_each_confidence_falls_into_one_bin(confidence: float, edge: float) -> None:
    one = torch.ones(1)
    found = Reliability.of(confidence * one, one, one > 0)
    assert CONFIDENCES[int(found.count.argmax())] == edge and found.count.sum() == found.right.sum() == 1


def test_calibration_of_no_pixel_is_unknown() -> None:
    nothing = torch.zeros(3)
    assert np.isnan(Reliability.of(nothing, nothing, nothing > 0).calibration_error())


def test_unlabelled_pixels_are_no_part_of_the_reliability() -> None:
    labels = HiddenLabels(torch.zeros(1, 1, 1, 4), torch.tensor([[[1, -1, 1, -1]]]), SPACE)
    labels.accuracy(network(ONE), 0.85, CPU)
    assert labels.reliability[0].count.sum() == 2


def test_regions_count_once_each() -> None:
    inside = torch.tensor([[0.9, 0.2], [0.3, 0.4], [0.9, 0.9]])
    labels = HiddenLabels(torch.zeros(1, 1, 1, 2), torch.tensor([[[1, 2]]]), REGIONS)
    labels.accuracy(MutualNetworks(lambda: Member(inside.logit()[:, None]), 1), 0.5, CPU)
    every, foreground = labels.reliability
    assert every.count.sum() == 6 and foreground.count.sum() == 3


def test_single_member_is_its_own_teacher() -> None:
    values = HiddenLabels(torch.zeros(1, 1, 1, 4), TRUTH, SPACE).accuracy(network(ONE), 0.85, CPU)
    assert values["pseudo_label_accuracy"] == pytest.approx(2 / 3)


def test_pixels_without_a_label_do_not_count() -> None:
    truth = torch.tensor([[[1, -1, -1, -1]]])
    values = HiddenLabels(torch.zeros(1, 1, 1, 4), truth, SPACE).accuracy(network(ONE), 0.85, CPU)
    assert values["pseudo_label_accuracy"] == 1.0
    assert values["pseudo_label_dice/wall"] == 1.0


def test_nothing_is_sure() -> None:
    values = HiddenLabels(torch.zeros(1, 1, 1, 4), TRUTH, SPACE).accuracy(network(ONE), 0.95, CPU)
    assert "pseudo_label_accuracy" not in values
    assert values["pseudo_label_dice/mean"] == 0.0


def test_many_images_are_counted_like_one() -> None:
    """More than one batch of eight."""
    many = HiddenLabels(torch.zeros(19, 1, 1, 4), TRUTH.repeat(19, 1, 1), SPACE).accuracy(network(ONE, OTHER), 0.85, CPU)
    one = HiddenLabels(torch.zeros(1, 1, 1, 4), TRUTH, SPACE).accuracy(network(ONE, OTHER), 0.85, CPU)
    assert many == pytest.approx(one)


def test_accuracy_of_regions() -> None:
    """Four pixels times three regions; the member is its own teacher."""
    inside = torch.tensor([[0.9, 0.9, 0.6, 0.2], [0.9, 0.2, 0.4, 0.6], [0.1, 0.9, 0.6, 0.1]])  # heart, wall, cavity
    member = MutualNetworks(lambda: Member(inside.logit()[:, None]), 1)
    truth = torch.tensor([[[1, 1, 0, -1]]])  # nothing is known of the last pixel
    values = HiddenLabels(torch.zeros(1, 1, 1, 4), truth, REGIONS).accuracy(member, 0.75, CPU)
    # sure and known are heart 2, wall 2, cavity 2 times; wrong are the second pixel's wall and cavity
    assert values["pseudo_label_accuracy"] == pytest.approx(4 / 6)
    assert values["pseudo_label_dice/heart"] == 1.0
    assert values["pseudo_label_dice/wall"] == pytest.approx(2 / 3)
    assert values["pseudo_label_dice/cavity"] == 0.0
    assert values["pseudo_label_dice/mean"] == pytest.approx(5 / 9)


def test_no_trace_is_left_in_the_training(dataset: PreprocessedDataset) -> None:
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[index]
    found = HiddenLabels(torch.zeros(1, 1, 1, 4), TRUTH, SPACE)
    members = network(ONE, OTHER)
    found.accuracy(members, 0.85, CPU)
    sample(CASES, dataset)
    assert all(parameter.grad is None for parameter in members.parameters())
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[index]
