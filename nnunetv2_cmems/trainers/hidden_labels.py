"""How right the pseudo-labels are, where hidden labels exist. Logged only, never used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from torch import Tensor

from nnunetv2_cmems.data.exemplar import PreprocessedDataset
from nnunetv2_cmems.method.networks import MutualNetworks
from nnunetv2_cmems.method.objective import overlap, pseudo_label
from nnunetv2_cmems.trainers.history import dice_values

_MOST_CASES = 16
_BATCH = 8


class HiddenLabels:
    """A fixed sample of unlabelled slices with their hidden labels.

    Nothing here draws a random number or touches a gradient, so a run with and without it is the same.

    Args:
        images: (N, C, *patch).
        labels: (N, *patch) class indices; negative where unknown.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    @classmethod
    def of(cls, cases: Sequence[str], dataset: PreprocessedDataset, patch: Sequence[int]) -> HiddenLabels | None:
        """Central crops of the middle slices of up to 16 cases, evenly spread; None if no label exists."""
        step = max(1, len(cases) // _MOST_CASES)
        images, labels = [], []
        for case in list(cases)[::step][:_MOST_CASES]:
            try:
                image, label, _, _ = dataset.dataset_class(dataset.folder, [case]).load_case(case)
                z = image.shape[1] // 2
                box = [[z, z + 1], *[[(n - m) // 2, (n - m) // 2 + m] for n, m in zip(image.shape[2:], patch)]]
                image, label = crop_and_pad_nd(image, box, 0), crop_and_pad_nd(label, box, -1)
            except Exception:  # labels are a luxury here: whatever is wrong with them, the training goes on
                continue
            images.append(image[:, 0].astype(np.float32))
            labels.append(label[0, 0].astype(np.int64))
        return cls(torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels))) if images else None

    @torch.no_grad()
    def accuracy(self, network: MutualNetworks, tau: float, device: torch.device, class_names: Mapping[int, str]) -> dict[str, float]:
        """Accuracy and Dice of the pseudo-labels, over the pixels that reach tau, mean over the members."""
        num_classes = len(class_names)
        members = len(network.members)
        right = sure = 0.0
        overlaps = np.zeros((2, num_classes - 1))
        for first in range(0, len(self.images), _BATCH):
            images, labels = self.images[first : first + _BATCH].to(device), self.labels[first : first + _BATCH].to(device)
            probabilities = [_finest(member(images)).float().softmax(1) for member in network.members]
            for member in range(members):
                found, confident = pseudo_label(probabilities, member, tau)
                counted = confident & (labels >= 0)
                right += float(((found == labels) & counted).sum())
                sure += float(counted.sum())
                overlaps += overlap(torch.where(counted, found, 0), torch.where(counted, labels, 0), num_classes).cpu().numpy()
        values = dice_values("pseudo_label_dice", overlaps, class_names)
        if sure:
            values["pseudo_label_accuracy"] = right / sure
        return values


def _finest(output: Tensor | list[Tensor]) -> Tensor:
    return output[0] if isinstance(output, (list, tuple)) else output
