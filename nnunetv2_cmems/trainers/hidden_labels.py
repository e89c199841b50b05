"""How right the pseudo-labels are, where hidden labels exist. Logged only, never used."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from torch import Tensor

from nnunetv2_cmems.data.exemplar import PreprocessedDataset
from nnunetv2_cmems.method.label_space import LabelSpace
from nnunetv2_cmems.method.losses import over_heads
from nnunetv2_cmems.method.networks import MutualNetworks
from nnunetv2_cmems.method.objective import overlap, pseudo_label
from nnunetv2_cmems.trainers.history import dice_values

_LEAST_CASES, _MOST_CASES = 4, 16
_MOST_VOXELS = _MOST_CASES * 512**2  # of all crops together
_BATCH = 8
_BATCH_VOXELS = _BATCH * 512**2


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

        With regions, a pixel counts once for each region that it is sure of.
        """
        space = self.space
        members = len(network.members)
        batch = min(_BATCH, max(1, _BATCH_VOXELS // self.labels[0].numel()))
        right = sure = 0.0
        overlaps = np.zeros((2, len(space.names)))
        for first in range(0, len(self.images), batch):
            images, labels = self.images[first : first + batch].to(device), self.labels[first : first + batch].to(device).long()
            probabilities = [space.probabilities(_finest(member(images))) for member in network.members]
            truth = space.target(labels)
            known = over_heads(labels >= 0, truth)
            for member in range(members):
                found, confident = pseudo_label(probabilities, member, tau, space)
                counted = confident & known
                right += float(((found == truth) & counted).sum())
                sure += float(counted.sum())
                overlaps += overlap(torch.where(counted, found, 0), torch.where(counted, truth, 0), space).cpu().numpy()
        values = dice_values("pseudo_label_dice", overlaps, space.names)
        if sure:
            values["pseudo_label_accuracy"] = right / sure
        return values


def _finest(output: Tensor | list[Tensor]) -> Tensor:
    return output[0] if isinstance(output, (list, tuple)) else output
