"""The exemplars on the device: crops for the supervised and the synthetic stream."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from scipy import ndimage
from torch import Tensor

from nnunetv2_cmems.config import SpatialConfig
from nnunetv2_cmems.method.organ_sizes import Organs, draw_sizes, organs_of, organs_of_planes, resized
from nnunetv2_cmems.method.perturbations import Deformation, as_grid, draw_deformation, read_from, sample
from nnunetv2_cmems.method.planes import AnnotatedPlane, look_up

AS_ANNOTATED = 1.0, 1.0
ANY_SIZE = 0.5, 2.0
"""Zoom factors of organs where one slice is annotated, which does not tell what sizes they have beside each other in other scans."""

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
        known: (B, *patch) bool, what is annotated; None: all of it.
    """

    images: Tensor
    labels: Tensor
    groups: Tensor
    backgrounds: Tensor
    num_groups: int
    near: Tensor | None = None
    known: Tensor | None = None


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


def shows_every_class(shown: Sequence[Collection[int]]) -> list[bool]:
    """For the classes that each exemplar shows: whether these are all that any of them shows."""
    every = frozenset[int]().union(*shown)
    return [every <= frozenset(classes) for classes in shown]


class ExemplarBank:
    """All exemplars, kept on the device, from which crops of the patch size are drawn.

    Args:
        images: one (C, *spatial) image per exemplar.
        labels: per exemplar one (*spatial) label map of class indices, negative where it is not annotated; or, for
            a volume of which only slices are annotated, the list of these.
        patch: size of the crops in voxels.
        device: where they are kept and drawn.
        reach: how far, in voxels, the surroundings of an organ go.
        spacing: the voxels' sides in mm; None: cubes.
        complete_only: crops ``whole`` are of exemplars that show every class that any of them shows.
        organ_scale: smallest and largest factor by which each organ of a crop is zoomed about its own middle, see
            :mod:`~nnunetv2_cmems.method.organ_sizes`.
    """

    def __init__(
        self,
        images: Sequence[Tensor],
        labels: Sequence[Tensor | Sequence[AnnotatedPlane]],
        patch: Sequence[int],
        device: torch.device,
        reach: int = 0,
        spacing: Sequence[float] | None = None,
        complete_only: bool = False,
        organ_scale: tuple[float, float] = AS_ANNOTATED,
    ) -> None:
        self.patch = tuple(patch)
        self.organ_scale = organ_scale
        self.device = device
        self.spacing = spacing
        self.channels = len(images[0])
        self.labels: list[Tensor] = []
        self.num_groups = 1
        self._all_known = True
        self._sources: list[_Source] = []
        self._whole: list[int] = []
        for i, (image, label) in enumerate(zip(images, labels)):
            if isinstance(label, Tensor):
                self._sources.append(self._whole_source(image.float(), label.long(), reach))
                if (label > 0).any():
                    self._whole.append(i)
            else:
                self._sources.append(self._sliced_source(image.float(), label))
        if complete_only:
            complete = shows_every_class([source.classes for source in self._sources])
            self._whole = [i for i in self._whole if complete[i]]
        self._turns = {False: self._by_class(range(len(self._sources))), True: self._by_class(self._whole)}

    def _whole_source(self, image: Tensor, label: Tensor, reach: int) -> _Source:
        from nnunetv2_cmems.method.synthesis import dilate, inpaint

        self.labels.append(label)
        self._all_known &= not bool((label < 0).any())
        shown = label.clamp_min(0)
        groups = organ_groups(shown)
        self.num_groups = max(self.num_groups, int(groups.max()))
        filled = inpaint(image[None], dilate(shown[None, None] > 0, 2))[0]
        near = dilate(shown[None, None] > 0, reach)[0]
        maps = torch.stack([shown, groups, near[0], label < 0]).float()  # beyond the image all are 0: known background
        content = torch.cat([image, filled, maps])[None].to(self.device)
        classes = _classes(shown)
        places = [(shown == k).nonzero().float() for k in classes]
        organs = self._here(organs_of(shown, self.spacing)) if self._resizes else None
        return _Source(content, (), self._centres(places) if classes else None, frozenset(classes), organs=organs)

    def _sliced_source(self, image: Tensor, planes: Sequence[AnnotatedPlane]) -> _Source:
        self.labels += [plane.labels for plane in planes]
        self._all_known = False
        here = tuple(plane._replace(labels=plane.labels.to(self.device)) for plane in planes)
        classes = sorted({k for plane in planes for k in _classes(plane.labels)})
        places = [torch.cat([plane.places(k) for plane in planes]) for k in classes]
        background = torch.cat([plane.places(0) for plane in planes])
        anywhere = self._centres([background if len(background) else torch.cat(places)])
        organs = self._here(organs_of_planes(planes, self.spacing)) if self._resizes else None
        return _Source(image[None].to(self.device), here, self._centres(places), frozenset(classes), anywhere, organs)

    @property
    def _resizes(self) -> bool:
        return self.organ_scale != AS_ANNOTATED

    def _here(self, organs: Organs | None) -> Organs | None:
        return None if organs is None else Organs(*(part.to(self.device) for part in organs))

    def draw_deformation(self, batch: int, config: SpatialConfig) -> Deformation:
        """A random deformation of ``batch`` crops."""
        return draw_deformation(batch, self.patch, config, self.device, self.spacing)

    def draw(
        self,
        batch: int,
        config: SpatialConfig,
        foreground: float,
        *,
        offsets: Tensor | None = None,
        placed: Tensor | None = None,
        whole: bool = False,
    ) -> ExemplarCrops:
        """Random crops, each of a random exemplar.

        Args:
            batch: number of crops B.
            config: their deformation; image, label and background are deformed alike, after organs have changed their sizes.
            foreground: probability that the exemplar is one that shows a class, drawn first with equal probability, and that the
                crop is centred on a foreground voxel (classes with equal probability); otherwise any exemplar will do, and the
                position is uniform, or, where only slices are annotated, uniform on the background of these.
            offsets: (B, d) distances in voxels from the exemplar's middle, where ``placed`` is True.
            placed: (B,) bool, which crops are centred at ``offsets`` instead of a random place.
            whole: only of exemplars that show whole organs.
        """
        candidates = self._whole if whole else range(len(self._sources))
        turns = self._turns[whole] if len(candidates) > 1 else []
        chosen = sorted(
            random.choice(random.choice(turns) if turns and random.random() < foreground else candidates) for _ in range(batch)
        )
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
        labels, groups, near, unknown = exact.unbind(1)
        known = None if self._all_known else unknown == 0
        return ExemplarCrops(smooth[:, :c], labels.long(), groups.long(), smooth[:, c:], self.num_groups, near > 0, known)

    def _by_class(self, candidates: Sequence[int]) -> list[list[int]]:
        """For each class that some of the exemplars show: which do."""
        classes = sorted(frozenset[int]().union(*(self._sources[i].classes for i in candidates)))
        return [[i for i in candidates if k in self._sources[i].classes] for k in classes]

    def _crops(self, i: int, centres: Tensor, config: SpatialConfig) -> tuple[Tensor, Tensor]:
        source = self._sources[i]
        voxels = read_from(self.draw_deformation(len(centres), config), centres)
        if source.organs is not None:
            voxels = resized(voxels, source.organs, draw_sizes(len(centres), source.organs, self.organ_scale))
        grid = as_grid(voxels, source.content.shape[2:])
        if source.planes:
            image, labels = sample(source.content, grid), look_up(source.planes, voxels)
            shown, nothing = labels.clamp_min(0), torch.zeros_like(labels)
            return torch.cat([image, image], 1), torch.stack([shown, (shown > 0).long(), nothing, (labels < 0).long()], 1).float()
        return sample(source.content[:, :-4], grid), sample(source.content[:, -4:], grid, nearest=True)

    def _draw_centres(self, i: int, batch: int, foreground: float) -> Tensor:
        half = torch.tensor(self.patch, dtype=torch.float32, device=self.device) / 2
        last, middle = 2 * self._middle(i), self._on_voxels(self._middle(i))
        low, high = torch.minimum(half - 0.5, middle), torch.maximum(last + 0.5 - half, middle)
        source = self._sources[i]
        anywhere = low + (high - low) * torch.rand(batch, len(self.patch), device=self.device)
        if source.anywhere is not None:
            anywhere = source.anywhere[torch.randint(_CENTRES, (batch,), device=self.device)]
        if source.centres is not None:
            known = source.centres[torch.randint(_CENTRES, (batch,), device=self.device)]
            anywhere = torch.where(torch.rand(batch, 1, device=self.device) < foreground, known, anywhere)
        return torch.minimum(torch.maximum(self._on_voxels(anywhere), low), high)

    def _on_voxels(self, centres: Tensor) -> Tensor:
        """The nearest centres at which a crop's voxels are voxels of the image (an even crop's centre lies between two)."""
        half = (torch.tensor(self.patch, dtype=torch.float32, device=self.device) - 1) / 2
        return (centres - half).round() + half

    def _middle(self, i: int) -> Tensor:
        return (torch.tensor(self._sources[i].content.shape[2:], dtype=torch.float32, device=self.device) - 1) / 2

    def _centres(self, places: Sequence[Tensor]) -> Tensor:
        """(4096, d) of the (N, d) coordinates, each list equally often."""
        generator = torch.Generator().manual_seed(0)
        picked = []
        for n, coordinates in enumerate(places):
            count = _CENTRES * (n + 1) // len(places) - _CENTRES * n // len(places)
            picked.append(coordinates[torch.randint(len(coordinates), (count,), generator=generator)])
        return torch.cat(picked).float().to(self.device)


class _Source(NamedTuple):
    """One exemplar on the device.

    Attributes:
        content: (1, C', *spatial): the image; where whole organs are annotated, also the image without them and
            the maps of labels, groups, surroundings and of what is unknown.
        planes: the annotated slices, where only these are.
        centres: (4096, d) coordinates of foreground voxels, every class equally often; None: it shows none.
        classes: the foreground values that it shows.
        anywhere: (4096, d) coordinates of background, where only slices are annotated.
        organs: those whose sizes change; None: none does.
    """

    content: Tensor
    planes: tuple[AnnotatedPlane, ...]
    centres: Tensor | None
    classes: frozenset[int]
    anywhere: Tensor | None = None
    organs: Organs | None = None


def _classes(label: Tensor) -> list[int]:
    return [k for k in label.unique().tolist() if k > 0]
