"""How right the pseudo-labels are, where hidden labels exist. Logged only, never used."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from torch import Tensor

from nnunetv2_cmems.data.exemplar import PreprocessedDataset
from nnunetv2_cmems.method.label_space import LabelSpace
from nnunetv2_cmems.method.losses import over_heads
from nnunetv2_cmems.method.networks import MutualNetworks
from nnunetv2_cmems.method.objective import overlap, teacher
from nnunetv2_cmems.trainers.history import dice_values

CONFIDENCES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)
"""Edges of the bins of a reliability diagram; narrow near 1, where thresholds lie."""

_LEAST_CASES, _MOST_CASES = 4, 16
_MOST_VOXELS = _MOST_CASES * 512**2  # of all crops together
_BATCH = 8
_BATCH_VOXELS = _BATCH * 512**2


@dataclass(frozen=True)
class Reliability:
    """Confidence against accuracy: for each bin of :data:`CONFIDENCES` the pixels, the sum of their confidences, and how many are right.

    Shape:
        Each (bins,). A bin holds its lower edge, and the last one 1.
    """

    count: np.ndarray
    confidence: np.ndarray
    right: np.ndarray

    @classmethod
    def of(cls, confidence: Tensor, right: Tensor, counted: Tensor) -> Reliability:
        """The sums over the pixels of ``counted`` (bool); all of one shape."""
        edges = torch.tensor(CONFIDENCES[1:-1], device=confidence.device)
        bins = torch.bucketize(confidence[counted].contiguous(), edges, right=True)
        weights = (torch.ones_like(confidence), confidence, right)
        sums = (torch.bincount(bins, weight[counted].double(), len(CONFIDENCES) - 1) for weight in weights)
        return cls(*(values.cpu().numpy() for values in sums))

    def __add__(self, other: Reliability) -> Reliability:
        return Reliability(self.count + other.count, self.confidence + other.confidence, self.right + other.right)

    def calibration_error(self) -> float:
        """Expected calibration error (Naeini et al., AAAI 2015): mean gap of confidence and accuracy, by pixels; NaN without pixels."""
        shown = self.count > 0
        if not shown.any():
            return float("nan")
        gaps = np.abs(self.right[shown] - self.confidence[shown])
        return float(gaps.sum() / self.count.sum())

    def to_json(self) -> dict[str, list[float]]:
        return {name: [round(float(value), 3) for value in values] for name, values in asdict(self).items()}


class HiddenLabels:
    """A fixed sample of unlabelled crops with their hidden labels.

    Nothing here draws a random number or touches a gradient, so a run with and without it is the same.

    Args:
        images: (N, C, *patch).
        labels: (N, *patch) label values; negative where unknown.
        space: what the networks' heads mean.
    """

    def __init__(self, images: Tensor, labels: Tensor, space: LabelSpace) -> None:
        self.images = images
        self.labels = labels
        self.space = space
        self.reliability: list[Reliability] = []
        """Of all pixels, and of those that are taken for foreground; from the last call of :meth:`accuracy`."""

    @classmethod
    def of(cls, cases: Sequence[str], dataset: PreprocessedDataset, patch: Sequence[int], space: LabelSpace) -> HiddenLabels | None:
        """Central crops of up to 16 cases (of large patches fewer, but 4), evenly spread; in 2D those of the middle slices.

        Args:
            cases: cases that may have a hidden label.
            dataset: the preprocessed folder with their labels.
            patch: size of the crops in voxels, 2D or 3D.
            space: what the networks' heads mean; its ignore label is unknown here.

        Returns:
            None if no label exists.
        """
        most = min(_MOST_CASES, max(_LEAST_CASES, _MOST_VOXELS // math.prod(patch)))
        step = max(1, len(cases) // most)
        size = patch if len(patch) == 3 else (1, *patch)
        images, labels = [], []
        for case in list(cases)[::step][:most]:
            try:
                image, label, _, _ = dataset.dataset_class(dataset.folder, [case]).load_case(case)
                box = [[n // 2 - m // 2, n // 2 - m // 2 + m] for n, m in zip(image.shape[1:], size)]
                image, label = crop_and_pad_nd(image, box, 0), crop_and_pad_nd(label, box, -1)
            except Exception:  # labels are a luxury here: whatever is wrong with them, the training goes on
                continue
            label = np.where(label[0] == space.ignore, -1, label[0]) if space.ignore is not None else label[0]
            if (label >= 0).any():
                images.append(image.astype(np.float32).reshape(-1, *patch))
                labels.append(label.astype(np.int16).reshape(*patch))
        return cls(torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels)), space) if images else None

    @torch.no_grad()
    def accuracy(self, network: MutualNetworks, tau: float, device: torch.device) -> dict[str, float]:
        """Accuracy and Dice of the pseudo-labels, over the pixels that reach tau, mean over the members.

        With regions, a pixel counts once for each region that it is sure of. The expected calibration error counts all
        pixels that have a label, whatever their confidence.
        """
        space = self.space
        labellers = network.labellers
        batch = min(_BATCH, max(1, _BATCH_VOXELS // self.labels[0].numel()))
        right = sure = 0.0
        overlaps = np.zeros((2, len(space.names)))
        reliability: list[list[Reliability]] = []
        for first in range(0, len(self.images), batch):
            images, labels = self.images[first : first + batch].to(device), self.labels[first : first + batch].to(device).long()
            probabilities = [space.probabilities(_finest(member(images))) for member in labellers]
            truth = space.target(labels)
            known = over_heads(labels >= 0, truth)
            for member in range(len(labellers)):
                taught = teacher(probabilities, member)
                found, confident = space.decide(taught, tau)
                counted = confident & known
                right += float(((found == truth) & counted).sum())
                sure += float(counted.sum())
                overlaps += overlap(torch.where(counted, found, 0), torch.where(counted, truth, 0), space).cpu().numpy()
                right_or_wrong, confidence = (found == truth).float(), space.confidence(taught)
                pixels = (known.expand_as(found), known & (found > 0))
                reliability.append([Reliability.of(confidence, right_or_wrong, counts) for counts in pixels])
        self.reliability = [functools.reduce(Reliability.__add__, parts) for parts in zip(*reliability)]
        values = dice_values("pseudo_label_dice", overlaps, space.names)
        if sure:
            values["pseudo_label_accuracy"] = right / sure
        values["pseudo_label_ece"] = self.reliability[0].calibration_error()
        return values


def _finest(output: Tensor | list[Tensor]) -> Tensor:
    return output[0] if isinstance(output, (list, tuple)) else output
