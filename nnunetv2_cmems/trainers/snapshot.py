"""The picture ``exemplar.png``: what the training is about to see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from nnunetv2_cmems.data.exemplar import Exemplar
from nnunetv2_cmems.method.objective import Objective
from nnunetv2_cmems.method.perturbations import change_appearance
from nnunetv2_cmems.study.pictures import plot_exemplar


@torch.no_grad()
def draw_snapshot(
    path: str,
    objective: Objective,
    exemplars: Sequence[Exemplar],
    unlabelled: Tensor | None,
    offsets: Tensor | None,
    class_names: Mapping[int, str],
) -> None:
    """Draw the (first) exemplar, four synthetic pairs, and an unlabelled image with its views; of volumes a slice each.

    Args:
        path: the PNG to write.
        objective: draws pairs and views as in training.
        exemplars: at least one.
        unlabelled: (U, C, *larger) crops, or None where no stream needs them.
        offsets: where the crops lie in their images, see the objective.
        class_names: the name of each label.
    """
    config = objective.config
    crops = None if unlabelled is None else objective.unlabelled_crops(unlabelled)[0]
    pairs: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    while objective.batches.synthetic and len(pairs) < 4:
        synthetic = objective.synthetic_batch(crops, offsets)
        pairs += [_shown(image, label, mask) for image, label, mask in zip(*synthetic)]
    views = {}
    if crops is not None and config.uses_unlabelled:
        views["unlabelled"] = _first_channel(crops[0])
        for member in range(1, config.num_members + 1):
            views[f"weak {member}"] = _first_channel(change_appearance(crops, config.weak)[0])
            views[f"strong {member}"] = _first_channel(change_appearance(crops, config.strong)[0])
    plot_exemplar(path, *exemplars[0].picture, pairs[:4], views, class_names)


def _first_channel(image: Tensor) -> np.ndarray:
    """(C, (Z,) Y, X) to (Y, X): of a volume the middle slice."""
    first = image[0].float().cpu().numpy()
    return first[len(first) // 2] if first.ndim == 3 else first


def _shown(image: Tensor, label: Tensor, mask: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A pair as (Y, X) arrays: of a volume the slice with the largest organs."""
    if label.ndim == 3:
        z = int((label > 0).sum(dim=(1, 2)).argmax())
        image, label, mask = image[:, z], label[z], mask[z]
    return image[0].float().cpu().numpy(), label.cpu().numpy(), mask.cpu().numpy()
