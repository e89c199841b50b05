"""One step of distillation: a student learns to predict on its own what the members predict together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunetv2_cmems.config import CMEMSConfig
from nnunetv2_cmems.method.label_space import LabelSpace, Regions
from nnunetv2_cmems.method.losses import weighted_scales
from nnunetv2_cmems.method.objective import Step
from nnunetv2_cmems.method.perturbations import change_appearance, deform, draw_cutmix, draw_deformation


def distillation_loss(scales: Sequence[Tensor], probabilities: Tensor, space: LabelSpace) -> Tensor:
    """Cross-entropy against another prediction's probabilities, deeply supervised; the mean over all pixels.

    It differs from the Kullback-Leibler divergence by the target's entropy, which has no gradient.

    Args:
        scales: logits (B, K, *spatial_s), the finest resolution first.
        probabilities: (B, K, *spatial) at the finest resolution, without gradient. Coarser ones are means of it.
        space: what the heads mean: one softmax, or a sigmoid for each (the mean is then over the regions too).

    Returns:
        A scalar.
    """
    total = scales[0].new_zeros((), dtype=torch.float32)
    for logits, weight in weighted_scales(scales):
        target = probabilities
        if logits.shape[2:] != target.shape[2:]:
            target = functional.interpolate(target, size=logits.shape[2:], mode="area")
        if isinstance(space, Regions):
            entropy = functional.binary_cross_entropy_with_logits(logits.float(), target)
        else:
            entropy = functional.cross_entropy(logits.float(), target)
        total = total + weight * entropy
    return total


class Distillation:
    """The loss of a student, called as an :class:`~nnunetv2_cmems.method.objective.Objective` is.

    The teachers see the unlabelled crop as it is, the student a strong view of it.

    Args:
        config: the views.
        teachers: gives the members' mean logits (B, K, *spatial) of images (B, C, *spatial).
        patch: size of the crops that both see, in voxels.
        spacing: of the voxels, in mm.
        space: what the networks' heads mean.
        autocast: makes the context in which the networks run.
    """

    def __init__(
        self,
        config: CMEMSConfig,
        teachers: nn.Module,
        patch: Sequence[int],
        spacing: Sequence[float],
        space: LabelSpace,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.config = config
        self.teachers = teachers
        self.patch = tuple(int(n) for n in patch)
        self.spacing = tuple(float(s) for s in spacing)
        self.space = space
        self.autocast = autocast

    def __call__(
        self, network: Callable[[Tensor], Any], unlabelled: Tensor, progress: float, offsets: Tensor | None = None
    ) -> Step:
        """One step's loss.

        Args:
            network: the student; gives logits at each resolution of deep supervision.
            unlabelled: (U, C, *larger) unlabelled crops with room for the deformation.
            progress: not used, nor are the ``offsets``.
        """
        config, device = self.config, unlabelled.device
        with torch.no_grad():
            crops = deform(unlabelled, draw_deformation(len(unlabelled), self.patch, config.unlabelled_views, device, self.spacing))
            mix = draw_cutmix(len(crops), self.patch, config.cutmix, device)
            views = mix(change_appearance(crops, config.strong))
            with self.autocast():
                taught = self.teachers(crops)
            target = mix(self.space.probabilities(taught))
        with self.autocast():
            scales = network(views)
        loss = distillation_loss(scales if isinstance(scales, (list, tuple)) else [scales], target, self.space)
        return Step(loss, {"distillation": loss.detach()}, {})
