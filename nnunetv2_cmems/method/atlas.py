"""Labels of an annotated volume, carried onto other scans by registration.

Scans of one kind show the same organs in about the same arrangement. A deformation that makes the annotated volume look like another scan
brings its labels along: atlas-based segmentation. What it knows, the grey values of whole volumes and that organs keep their arrangement,
is not what networks know that have learned from one volume, so each corrects the other.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from nnunetv2_cmems.method.demons import blurred, demons, in_this_thread, matched, resampled, shrunk
from nnunetv2_cmems.method.label_space import LabelSpace, Regions
from nnunetv2_cmems.method.propagation import agreement_in_scan
from nnunetv2_cmems.method.refinement import Refinement, near_organs

LEAST_AGREEMENT = 0.6
"""Dice of an atlas's labels by one alignment with those by another, mean over pairs and organs, from which on they are trusted."""

_LEAST_DISAGREEMENT = 1e-3  # so that nobody counts alone
_COARSEST = 32  # about so many voxels along the longest side at the lowest resolution
_FINEST = 128  # and at the highest: deformations are smooth
_FEWEST = 16  # voxels that a side keeps when it is shrunk
_ITERATIONS = 40  # of the demons, at each resolution
_LARGE = 96  # voxels along the longest side, from which on a few are enough
_FEW_ITERATIONS = 10
_SMOOTHNESS = 0.7  # sigma, in voxels, of the blur of displacements after each iteration
_LINEAR_ITERATIONS = 80
_LINEAR_STEPS = 2.0, 0.05  # of the gradient descent, in voxels: the first, and the one that ends it


@dataclass(frozen=True)
class Atlas:
    """A wholly annotated volume.

    Attributes:
        image: preprocessed, float32 (C, Z, Y, X).
        label: label map, integers (Z, Y, X); negative where nothing is annotated.
        origin: (x, y, z) of the image's first voxel, in voxels of the label.
        spacing: (x, y, z) of the image, in voxels of the label.
    """

    image: np.ndarray
    label: np.ndarray
    origin: tuple[float, ...] = (0.0, 0.0, 0.0)
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0)

    def grey(self) -> sitk.Image:
        """The mean of the channels; its places are voxels of the label."""
        image = _grey(self.image)
        image.SetOrigin(self.origin)
        image.SetSpacing(self.spacing)
        return image


def to_tensor(atlases: Sequence[Atlas]) -> Tensor:
    """Bytes, uint8 (n,), to be kept with the networks' weights: of each atlas the mean of the channels, from 0 to 1 in half precision, at
    the highest resolution that demons see; and the label. How bright an image is makes no difference to registration."""
    parts = {}
    for index, atlas in enumerate(atlases):
        grey = atlas.grey()
        small = shrunk(grey, _factors(grey, _halvings(grey, _FINEST)))
        values = sitk.GetArrayFromImage(small)
        values = (values - values.min()) / max(float(np.ptp(values)), 1e-9)
        geometry = np.array([small.GetOrigin(), small.GetSpacing()])
        kept = {"image": values[None].astype(np.float16), "label": atlas.label.astype(np.int16), "geometry": geometry}
        parts.update({f"{name}_{index}": part for name, part in kept.items()})
    with io.BytesIO() as file:
        np.savez_compressed(file, **parts)
        return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def from_tensor(stored: Tensor) -> list[Atlas]:
    """The inverse of :func:`to_tensor`, but for what it leaves out."""
    with np.load(io.BytesIO(stored.cpu().numpy().tobytes()), allow_pickle=False) as parts:
        atlases = []
        for index in range(len(parts.files) // 3):
            origin, spacing = (tuple(map(float, row)) for row in parts[f"geometry_{index}"])
            atlases.append(Atlas(parts[f"image_{index}"].astype(np.float32), parts[f"label_{index}"], origin, spacing))
        return atlases


class Carried(NamedTuple):
    """What one atlas says about a scan, the mean over its alignments.

    Attributes:
        organs: float32 (F, Z, Y, X).
        known: where the atlas is annotated, float32 (Z, Y, X), from 0 to 1.
        agreement: of its labels by the alignments, see :func:`~nnunetv2_cmems.method.propagation.agreement_in_scan`.
    """

    organs: np.ndarray
    known: np.ndarray
    agreement: float


@torch.no_grad()
def carried(atlases: Sequence[Atlas], image: Tensor, space: LabelSpace) -> tuple[Tensor, Tensor] | None:
    """What atlases say about a scan: their labels, deformed onto it.

    Each atlas is aligned in three ways: image middle on image middle; and from there by the similarity and by the affine transform that
    gives the best correlation of grey values. From each of these start demons (see :mod:`~nnunetv2_cmems.method.demons`), after matching
    of the histograms, from coarse to fine, on the mean of the channels. Which of them ends best cannot be told; their mean is about as good
    as the best. Where they end at different places the registration has failed: an atlas with less than :data:`LEAST_AGREEMENT` is left
    out. No random numbers are drawn.

    Args:
        atlases: one or more.
        image: (C, Z, Y, X), the preprocessed scan.
        space: what the networks' heads mean.

    Returns:
        Probabilities (K, Z, Y, X) of the classes, the background first, or (R, Z, Y, X) of the regions, the mean over alignments and
        atlases; and where most of these know anything, bool (Z, Y, X). None where no atlas could be registered.
    """
    found = [one for one in _each(atlases, image, space) if one.agreement >= LEAST_AGREEMENT]
    if not found:
        return None
    organs, known = np.mean([one.organs for one in found], 0), np.mean([one.known for one in found], 0)
    return _with_background(torch.from_numpy(organs), space), torch.from_numpy(known > 0.5)


@torch.no_grad()
def refined_on(
    atlases: Sequence[Atlas], image: Tensor, rule: Refinement, space: LabelSpace, planar: bool
) -> tuple[Tensor, Tensor] | None:
    """What :func:`carried` says, refined by the scan's grey values.

    Args:
        atlases, image, space: as for :func:`carried`.
        rule: how it is refined.
        planar: see :func:`~nnunetv2_cmems.method.refinement.refine`.

    Returns:
        As :func:`carried`.
    """
    found = carried(atlases, image, space)
    if found is None:
        return None
    return _refined(found[0], image, rule, space, planar), found[1]


@torch.no_grad()
def weighed_on(
    atlases: Sequence[Atlas], image: Tensor, rule: Refinement, space: LabelSpace, planar: bool, together: float
) -> tuple[Tensor, Tensor] | None:
    """What atlases say about a scan, refined, and how much that counts beside what the members say.

    Who contradicts himself is wrong more often. Each atlas counts by one over the disagreement (1 - Dice) of its alignments, the members'
    mean by one over that of the members, as means of measurements are weighted by one over their variances.

    Args:
        atlases, image, space: as for :func:`carried`; none is left out.
        rule, planar: as for :func:`refined_on`.
        together: the members' agreement, from :func:`~nnunetv2_cmems.method.propagation.agreement_in_scan`; NaN: they see no organ.

    Returns:
        Probabilities as of :func:`carried`, and the atlases' share, from 0 to 1, (Z, Y, X). None where no atlas shows an organ.
    """
    found = [one for one in _each(atlases, image, space) if not math.isnan(one.agreement)]
    if not found:
        return None
    weights = np.stack([_weight(one.agreement) * one.known for one in found])
    total = weights.sum(0)
    organs = sum(weight * one.organs for weight, one in zip(weights, found)) / np.maximum(total, 1e-9)
    share = total / (total + _weight(0.0 if math.isnan(together) else together))
    probabilities = _with_background(torch.from_numpy(organs).float(), space)
    return _refined(probabilities, image, rule, space, planar), torch.from_numpy(share).float()


def _weight(agreement: float) -> float:
    return 1 / max(1 - agreement, _LEAST_DISAGREEMENT)


def _refined(probabilities: Tensor, image: Tensor, rule: Refinement, space: LabelSpace, planar: bool) -> Tensor:
    box = rule.around(near_organs(probabilities, space), planar, None)
    if box is not None:
        place = (slice(None), *box)
        probabilities[place] = rule.refined(probabilities[place], image[place], space, planar)
    return probabilities


def _each(atlases: Sequence[Atlas], image: Tensor, space: LabelSpace) -> Iterator[Carried]:
    grey = _grey(image.numpy())
    return (_carried(atlas, grey, space) for atlas in atlases)


def _carried(atlas: Atlas, grey: sitk.Image, space: LabelSpace) -> Carried:
    shape = grey.GetSize()[::-1]
    organs, known = np.zeros((len(space.names), *shape), np.float32), np.zeros(shape, np.float32)
    decided: list[Tensor] = []
    masks, annotated = space.shown(atlas.label), atlas.label >= 0
    everything = annotated.all()
    for deformation in _deformations(grey, atlas.grey()):
        moved = np.stack([_moved(mask, deformation, grey) for mask in masks])
        organs += moved
        known += 1 if everything else _moved(annotated, deformation, grey, beyond=1.0) > 0.5
        decided.append(space.decide(_with_background(torch.from_numpy(moved), space)[None], 0.0).labels.to(torch.int8))
    count = max(1, len(decided))
    return Carried(organs / count, known / count, agreement_in_scan(decided, space))


def _with_background(organs: Tensor, space: LabelSpace) -> Tensor:
    """Probabilities in the heads' terms, of (F, Z, Y, X) organs."""
    return organs if isinstance(space, Regions) else torch.cat([(1 - organs.sum(0, keepdim=True)).clamp(0, 1), organs])


def _grey(image: np.ndarray) -> sitk.Image:
    """(C, Z, Y, X) to an image whose places are voxels."""
    return sitk.GetImageFromArray(np.ascontiguousarray(image.mean(0), dtype=np.float32))


def _moved(mask: np.ndarray, deformation: sitk.Transform, like: sitk.Image, beyond: float = 0.0) -> np.ndarray:
    """A mask (Z, Y, X) on the grid of another image, float32, ``beyond`` outside of the mask's image."""
    moved: np.ndarray = sitk.GetArrayFromImage(
        resampled(sitk.GetImageFromArray(np.ascontiguousarray(mask, dtype=np.float32)), like, deformation, beyond)
    )
    return moved


def _deformations(fixed: sitk.Image, moving: sitk.Image) -> Iterator[sitk.Transform]:
    """From places of the fixed image to those of the moving one, for each alignment; none where an image is of one grey."""
    if any(values.min() == values.max() for values in map(sitk.GetArrayViewFromImage, (fixed, moving))):
        return
    finest, coarsest = (_halvings(fixed, voxels) for voxels in (_FINEST, _COARSEST))
    least = float(sitk.GetArrayViewFromImage(moving).min())
    small = shrunk(fixed, _factors(fixed, coarsest))
    soft = blurred(moving, _factors(moving, coarsest))  # not shrunk: it is looked at between its voxels
    middle = sitk.CenteredTransformInitializer(fixed, moving, sitk.Euler3DTransform(), sitk.CenteredTransformInitializerFilter.GEOMETRY)
    target = shrunk(fixed, _factors(fixed, finest))
    for kind in (None, sitk.Similarity3DTransform, sitk.AffineTransform):
        alignment = middle if kind is None else _aligned(small, soft, kind, middle)
        if alignment is None:
            continue
        near = matched(resampled(moving, target, alignment, least), target)
        factors = [_factors(target, halvings) for halvings in range(coarsest - finest, -1, -1)]
        levels = [(shrunk(target, each), shrunk(near, each)) for each in factors]
        iterations = [_FEW_ITERATIONS if max(image.GetSize()) >= _LARGE else _ITERATIONS for image, _ in levels]
        bent = demons(levels, iterations, _SMOOTHNESS)
        yield sitk.CompositeTransform([alignment, bent])


def _halvings(image: sitk.Image, voxels: int) -> int:
    """Of the resolution, until the longest side has about so many voxels."""
    return max(0, round(math.log2(max(image.GetSize()) / voxels)))


def _factors(image: sitk.Image, halvings: int) -> list[int]:
    """By how much each side is shrunk; short ones, such as across thick slices, by less."""
    return [2 ** min(halvings, max(0, int(math.log2(side / _FEWEST)))) for side in image.GetSize()]


def _aligned(fixed: sitk.Image, moving: sitk.Image, kind: type[Any], start: Any) -> sitk.Transform | None:
    """The transform of a kind with the best correlation; None where there is none to be found."""
    transform = kind(3) if kind is sitk.AffineTransform else kind()  # the registration changes it
    transform.SetCenter(start.GetCenter())
    transform.SetTranslation(start.GetTranslation())
    work = in_this_thread(sitk.ImageRegistrationMethod())
    work.SetMetricAsCorrelation()
    work.SetMetricSamplingStrategy(work.NONE)
    work.SetInterpolator(sitk.sitkLinear)
    work.SetOptimizerAsRegularStepGradientDescent(*_LINEAR_STEPS, _LINEAR_ITERATIONS)
    work.SetOptimizerScalesFromPhysicalShift()
    work.SetInitialTransform(transform, True)
    try:
        work.Execute(fixed, moving)
    except RuntimeError:  # the images do not overlap any more
        return None
    found: sitk.Transform = transform
    return found
