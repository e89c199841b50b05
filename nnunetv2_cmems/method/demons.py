"""Registration by demons, from coarse to fine, in one thread: scans are worked on side by side, and each of their images is small.

Thirion, Medical Image Analysis 2, 1998; with the symmetric forces of Vercauteren et al., MICCAI 2007. SimpleITK does the work. Places are
in voxels, and nothing is drawn at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import SimpleITK as sitk


def in_this_thread(work: Any, **settings: Any) -> Any:
    """A filter of SimpleITK with its settings, that starts no threads."""
    work.SetNumberOfThreads(1)
    for name, value in settings.items():
        getattr(work, f"Set{name}")(value)
    return work


def demons(levels: Sequence[tuple[sitk.Image, sitk.Image]], iterations: Sequence[int], smoothness: float) -> sitk.Transform:
    """The deformation that makes one image look like another: from places of the fixed image to those of the moving one.

    Args:
        levels: the fixed image and the moving one, on one grid, at each resolution, the lowest first (see :func:`shrunk`).
        iterations: at each resolution.
        smoothness: sigma, in voxels of each resolution, of the blur of displacements after each iteration.

    Returns:
        A displacement field at the highest of these resolutions.
    """
    work = in_this_thread(
        sitk.FastSymmetricForcesDemonsRegistrationFilter(), StandardDeviations=smoothness, SmoothDisplacementField=True
    )
    field: sitk.Image | None = None
    for (fixed, moving), count in zip(levels, iterations, strict=True):
        work.SetNumberOfIterations(count)
        field = work.Execute(fixed, moving) if field is None else work.Execute(fixed, moving, resampled(field, fixed))
    assert field is not None
    return sitk.DisplacementFieldTransform(sitk.Cast(field, sitk.sitkVectorFloat64))


def matched(image: sitk.Image, like: sitk.Image) -> sitk.Image:
    """An image with the grey values' histogram of another."""
    return in_this_thread(sitk.HistogramMatchingImageFilter(), NumberOfHistogramLevels=64, NumberOfMatchPoints=7).Execute(image, like)


def resampled(image: sitk.Image, like: sitk.Image, deformation: sitk.Transform | None = None, beyond: float = 0.0) -> sitk.Image:
    """An image on the grid of another, linearly; ``beyond`` is its value outside of it."""
    work = in_this_thread(sitk.ResampleImageFilter(), ReferenceImage=like, DefaultPixelValue=beyond)
    if deformation is not None:
        work.SetTransform(deformation)
    return work.Execute(image)


def shrunk(image: sitk.Image, factors: Sequence[int]) -> sitk.Image:
    """An image at a lower resolution, blurred before; one factor for each axis (x, y(, z))."""
    return sitk.Shrink(blurred(image, factors), list(factors)) if max(factors) > 1 else image


def blurred(image: sitk.Image, factors: Sequence[int]) -> sitk.Image:
    """An image without the details that are lost where it is shrunk by these factors."""
    variances = [(0.42 * factor) ** 2 if factor > 1 else 0.0 for factor in factors]
    return in_this_thread(sitk.DiscreteGaussianImageFilter(), Variance=variances).Execute(image) if max(factors) > 1 else image
