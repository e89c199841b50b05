"""The exemplars on the device: crops for the supervised and the synthetic stream."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy import ndimage
from torch import Tensor

from nnunetv2_cmems.config import SpatialConfig
from nnunetv2_cmems.method.perturbations import deform, draw_deformation

UNDEFORMED = SpatialConfig(probability=0.0, elastic=0.0)
_MOST_GROUPS = 16
_CENTRES = 4096


class ExemplarCrops(NamedTuple):
    """Crops of the exemplars.

    Attributes:
        images: (B, C, *patch).
        labels: (B, *patch) class indices.
        groups: (B, *patch) numbers of the organ groups, see :func:`organ_groups`.
        backgrounds: (B, C, *patch) crops of the inpainted exemplars.
        num_groups: the largest number in ``groups`` over all exemplars.
        near: (B, *patch) bool, the surroundings of organs, also of those just outside of the crop.
    """

    images: Tensor
    labels: Tensor
    groups: Tensor
    backgrounds: Tensor
    num_groups: int
    near: Tensor | None = None


def organ_groups(label: Tensor) -> Tensor:
    """Number the groups of organs that touch each other: anatomy holds them together.

    Args:
        label: (*spatial) class indices, on the CPU.

    Returns:
        (*spatial) int64: 0 for background, 1 to G for the groups, the largest first. At most 16 are
        told apart; smaller ones share the last number.
    """
    foreground = (label > 0).numpy()
    numbers, count = ndimage.label(ndimage.binary_dilation(foreground))
    numbers = numbers * foreground
    sizes = ndimage.sum_labels(foreground, numbers, range(1, count + 1))
    rank = torch.zeros(count + 1, dtype=torch.int64)
    for place, number in enumerate(sorted(range(1, count + 1), key=lambda i: -sizes[i - 1])):
        rank[number] = min(place + 1, _MOST_GROUPS)
    return rank[torch.from_numpy(numbers).long()]


class ExemplarBank:
    """All exemplars, kept on the device, from which crops of the patch size are drawn.

    Args:
        images: one (C, *spatial) image per exemplar.
        labels: one (*spatial) label map of class indices per exemplar.
        patch: size of the crops in voxels.
        device: where they are kept and drawn.
        reach: how far, in voxels, the surroundings of an organ go.
    """

    def __init__(
        self, images: Sequence[Tensor], labels: Sequence[Tensor], patch: Sequence[int], device: torch.device, reach: int = 0
    ) -> None:
        from nnunetv2_cmems.method.synthesis import dilate, inpaint

        self.patch = tuple(patch)
        self.device = device
        self.channels = len(images[0])
        self.labels = [label.long() for label in labels]
        groups = [organ_groups(label) for label in self.labels]
        self.num_groups = max(int(group.max()) for group in groups)
        self._sources = []
        self._centres = []
        for image, label, group in zip(images, self.labels, groups):
            filled = inpaint(image[None].float(), dilate(label[None, None] > 0, 2))[0]
            near = dilate(label[None, None] > 0, reach)[0]
            maps = torch.stack([label, group, near[0]]).float()
            self._sources.append(torch.cat([image.float(), filled, maps])[None].to(device))
            self._centres.append(self._foreground_centres(label).to(device))

    def draw(
        self, batch: int, config: SpatialConfig, foreground: float, *, offsets: Tensor | None = None, placed: Tensor | None = None
    ) -> ExemplarCrops:
        """Random crops, each of a random exemplar.

        Args:
            batch: number of crops B.
            config: their deformation; image, label and background are deformed alike.
            foreground: probability that a crop is centred on a foreground voxel (classes with equal
                probability); otherwise its position is uniform.
            offsets: (B, d) distances in voxels from the exemplar's middle, where ``placed`` is True.
            placed: (B,) bool, which crops are centred at ``offsets`` instead of a random place.
        """
        chosen = sorted(random.randrange(len(self._sources)) for _ in range(batch))
        parts = []
        for i in sorted(set(chosen)):
            part = slice(chosen.index(i), chosen.index(i) + chosen.count(i))
            centres = self._draw_centres(i, chosen.count(i), foreground)
            if offsets is not None and placed is not None:
                there = self._on_voxels(self._middle(i) + offsets[part])
                centres = torch.where(placed[part, None], there, centres)
            parts.append(self._crops(i, centres, config))
        smooth, exact = (torch.cat(part) for part in zip(*parts))
        c = self.channels
        labels, groups, near = exact.unbind(1)
        return ExemplarCrops(smooth[:, :c], labels.long(), groups.long(), smooth[:, c:], self.num_groups, near > 0)

    def _crops(self, i: int, centres: Tensor, config: SpatialConfig) -> tuple[Tensor, Tensor]:
        source = self._sources[i]
        deformation = draw_deformation(len(centres), self.patch, config, self.device)
        smooth = deform(source[:, :-3], deformation, centres)
        return smooth, deform(source[:, -3:], deformation, centres, nearest=True)

    def _draw_centres(self, i: int, batch: int, foreground: float) -> Tensor:
        half = torch.tensor(self.patch, dtype=torch.float32, device=self.device) / 2
        last, middle = 2 * self._middle(i), self._on_voxels(self._middle(i))
        low, high = torch.minimum(half - 0.5, middle), torch.maximum(last + 0.5 - half, middle)
        anywhere = low + (high - low) * torch.rand(batch, len(self.patch), device=self.device)
        known = self._centres[i][torch.randint(_CENTRES, (batch,), device=self.device)]
        wanted = torch.where(torch.rand(batch, 1, device=self.device) < foreground, known, anywhere)
        return torch.minimum(torch.maximum(self._on_voxels(wanted), low), high)

    def _on_voxels(self, centres: Tensor) -> Tensor:
        """The nearest centres at which a crop's voxels are voxels of the image (an even crop's centre lies between two)."""
        half = (torch.tensor(self.patch, dtype=torch.float32, device=self.device) - 1) / 2
        return (centres - half).round() + half

    def _middle(self, i: int) -> Tensor:
        return (torch.tensor(self._sources[i].shape[2:], dtype=torch.float32, device=self.device) - 1) / 2

    @staticmethod
    def _foreground_centres(label: Tensor) -> Tensor:
        """(4096, d) coordinates of foreground voxels, every class equally often."""
        classes = [k for k in label.unique().tolist() if k > 0]
        generator = torch.Generator().manual_seed(0)
        picked = []
        for n, k in enumerate(classes):
            places = (label == k).nonzero()
            count = _CENTRES * (n + 1) // len(classes) - _CENTRES * n // len(classes)
            picked.append(places[torch.randint(len(places), (count,), generator=generator)])
        return torch.cat(picked).float()
