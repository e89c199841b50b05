"""Made-up scans that look like short-axis images of a heart, for the demo and the tests.

Each scan shows a body in air with lungs, a liver, a spine, vessels and a stomach. Its heart has a ring-shaped wall,
a round left cavity within it and a crescent-like right cavity beside it; these three are the classes. Vessels are as
bright as the cavities, the stomach is a ring as well, and the wall shares its grey value with other tissue, so that
intensity alone does not tell the classes. Position, size, rotation, shape, contrast, bias field, noise and blur
differ between scans; within a scan the slices run smoothly from the base to the apex of the heart.

Nothing here comes from a patient, and a model that was trained on it is of no use for one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

from nnunetv2_cmems.errors import CMEMSError

LABELS = {"background": 0, "wall": 1, "left cavity": 2, "right cavity": 3}
"""The classes, as in ``dataset.json``."""

SPACING = (8.0, 1.5, 1.5)
"""Default voxel size in mm, (z, y, x)."""

MARKER = "nnunetv2_cmems_phantom"
"""Key in ``dataset.json`` under which the parameters of a generated data set are kept."""

_VERSION = 1  # of the images: raise it whenever the same seed gives another scan


def make_scan(seed: int | Sequence[int], shape: Sequence[int] = (8, 96, 96)) -> tuple[np.ndarray, np.ndarray]:
    """One scan and its labels, fully determined by the arguments.

    The anatomy scales with the shorter side of a slice, so that any ``shape`` shows all of it. From 6 slices on, one
    slice at the base and up to two at the apex show no organ.

    Args:
        seed: one non-negative number, or several (as for ``numpy.random.default_rng``).
        shape: voxels (z, y, x), at least (1, 32, 32).

    Returns:
        The image (z, y, x), float32, in arbitrary units from 0 upwards, and the labels (z, y, x), uint8, see
        :data:`LABELS`. At least one slice shows all classes.

    Raises:
        CMEMSError: ``shape`` is not three numbers, or too small.
    """
    if len(shape) != 3 or shape[0] < 1 or min(shape[1:]) < 32:
        raise CMEMSError(f"a phantom scan needs a shape (z, y, x) of at least (1, 32, 32), not {tuple(shape)}.")
    rng = np.random.default_rng(seed)
    slices, height, width = (int(n) for n in shape)
    pixel = 2.0 / min(height, width)

    # Coordinates: 1 is half the shorter side. A smooth displacement makes every outline irregular.
    y: np.ndarray = ((np.arange(height) - (height - 1) / 2) * pixel)[None, :, None].astype(np.float32)
    x: np.ndarray = ((np.arange(width) - (width - 1) / 2) * pixel)[None, None, :].astype(np.float32)
    zoom = rng.uniform(0.88, 1.08)
    y = y / zoom + 0.03 * _smooth_field(rng, (slices, height, width))
    x = x / zoom + 0.03 * _smooth_field(rng, (slices, height, width))

    # t: 0 at the heart's base, 1 at its apex; outside [0, 1] there is no heart.
    base = int(slices >= 6 and rng.random() < 0.6)
    apex = int(rng.integers(0, 3)) if slices >= 6 else 0
    heart_slices = slices - base - apex
    t = ((np.arange(slices) - base) / max(heart_slices - 1, 1)).astype(np.float32)[:, None, None]
    if slices == 1:
        t = t + 0.3
    inside_heart = (t > -1e-4) & (t < 1 + 1e-4)
    shrink = np.sqrt(np.clip(1 - (rng.uniform(0.78, 0.9) * np.clip(t, 0, 1)) ** 2, 0, 1))

    blood = rng.uniform(0.75, 1.1)
    wall = rng.uniform(0.22, 0.55)
    fat = rng.uniform(0.45, 1.2)
    muscle = rng.uniform(0.2, 0.5)
    lung = rng.uniform(0.03, 0.16)
    liver = rng.uniform(0.25, 0.7)

    image = np.full((slices, height, width), 0.02, dtype=np.float32)

    def paint(distance: np.ndarray, grey: float | np.ndarray) -> None:
        """Fill where ``distance`` (negative inside) is below 0, with a border one pixel wide."""
        cover = np.clip(0.5 - distance / pixel, 0, 1)
        np.copyto(image, image + cover * (grey - image))

    # The body and what surrounds the heart.
    body = _ellipse(y, x, rng.normal(0, 0.02), rng.normal(0, 0.02), rng.uniform(0.72, 0.84), rng.uniform(0.88, 0.98), rng.normal(0, 0.05))
    paint(body, fat)
    inner = body + rng.uniform(0.04, 0.1)
    paint(inner, muscle)
    cavity = inner + rng.uniform(0.05, 0.09)
    lung_size = 1 - 0.25 * np.clip(t, 0, 1.2)  # the lungs taper toward the diaphragm
    for side in (-1, 1):
        lobe = _ellipse(
            y, x, rng.uniform(-0.12, 0.0), side * rng.uniform(0.42, 0.5), rng.uniform(0.48, 0.56) * lung_size,
            rng.uniform(0.3, 0.38) * lung_size, side * 0.2,
        )
        paint(np.maximum(lobe, cavity), lung)
    liver_size = rng.uniform(0.55, 0.8) * np.clip(0.5 + t, 0.2, 1.1)
    paint(np.maximum(_ellipse(y, x, 0.45, -0.5, 0.42 * liver_size, 0.6 * liver_size, rng.normal(0, 0.15)), cavity), liver)
    stomach = _ellipse(y, x, rng.uniform(0.33, 0.42), rng.uniform(0.5, 0.58), rng.uniform(0.13, 0.18), rng.uniform(0.14, 0.2), 0.0)
    stomach = stomach + 0.12 * np.clip(0.4 - t, 0, None)  # smaller toward the base
    paint(stomach, wall * rng.uniform(0.85, 1.15))
    paint(stomach + rng.uniform(0.04, 0.065), rng.choice([0.12, muscle, blood]))
    spine_x = rng.uniform(-0.05, 0.12)
    spine = _ellipse(y, x, rng.uniform(0.54, 0.6), spine_x, 0.13, 0.16, 0.0)
    paint(spine, muscle * 0.6)
    paint(spine + 0.035, rng.uniform(0.3, 0.75))
    aorta = _ellipse(y, x, rng.uniform(0.3, 0.4), spine_x + rng.uniform(0.14, 0.24), rng.uniform(0.07, 0.1), rng.uniform(0.07, 0.1), 0.0)
    paint(aorta - 0.025, wall)
    paint(aorta, blood * rng.uniform(0.9, 1.1))
    vein = _ellipse(y, x, rng.uniform(0.22, 0.34), rng.uniform(-0.38, -0.26), rng.uniform(0.05, 0.085), rng.uniform(0.05, 0.085), 0.0)
    paint(vein, blood * rng.uniform(0.85, 1.1))

    # The heart: the axis leans, the outline turns a little from slice to slice.
    center_y = rng.uniform(-0.22, -0.02) + rng.uniform(-0.02, 0.14) * (t - 0.5)
    center_x = rng.uniform(-0.02, 0.22) + rng.uniform(-0.02, 0.14) * (t - 0.5)
    angle = np.deg2rad(rng.uniform(-35, 35)) + rng.uniform(-0.25, 0.25) * (t - 0.5)  # 0: the right cavity lies at the image's left
    radius = rng.uniform(0.24, 0.36) * shrink
    oval = rng.uniform(0.9, 1.1)
    outer = _ellipse(y, x, center_y, center_x, radius * oval, radius / oval, angle)
    thickness = radius * rng.uniform(0.26, 0.42)
    left = _ellipse(
        y, x, center_y, center_x, np.maximum(radius * oval - thickness, pixel), np.maximum(radius / oval - thickness, pixel), angle
    )
    right_size = np.clip(1 - rng.uniform(0.9, 1.15) * np.clip(t, 0, 1) ** 2.5, 0, 1) * shrink
    right_center = radius * rng.uniform(0.75, 0.95)
    right_y = np.maximum(radius * rng.uniform(0.95, 1.25) * right_size, 1e-3)
    right_x = np.maximum(radius * rng.uniform(0.7, 0.95) * right_size, 1e-3)
    right = _ellipse(y, x, center_y - np.sin(angle) * right_center, center_x - np.cos(angle) * right_center, right_y, right_x, angle)
    nowhere = np.where(inside_heart, np.float32(0), np.float32(9))
    outer, left, right = outer + nowhere, left + nowhere, right + nowhere
    sac = rng.uniform(0.03, 0.07)
    paint(np.minimum(outer, right) - sac, fat * rng.uniform(0.6, 1.0))
    right_wall = rng.uniform(0.02, 0.035)
    paint(right - right_wall, wall * rng.uniform(0.9, 1.1))
    paint(right, blood * rng.uniform(0.85, 1.1))
    paint(outer, wall)
    if rng.random() < 0.3:  # a scar: part of the wall in another grey
        toward = rng.uniform(0, 2 * np.pi)
        scar = _ellipse(y, x, center_y + np.sin(toward) * radius * 0.85, center_x + np.cos(toward) * radius * 0.85, 0.1, 0.1, 0.0)
        paint(np.maximum(scar, outer), wall * rng.uniform(0.7, 1.5))
    paint(left, blood)
    for _ in range(2):  # papillary muscles; they count as cavity
        toward = rng.uniform(0, 2 * np.pi)
        muscle_y = center_y + np.sin(toward) * (radius - thickness) * 0.62
        muscle_x = center_x + np.cos(toward) * (radius - thickness) * 0.62
        size = np.maximum((radius - thickness) * rng.uniform(0.12, 0.24), 1e-3)
        paint(np.maximum(_ellipse(y, x, muscle_y, muscle_x, size, size, 0.0), left), wall)
    # Above the base: two great vessels where the heart would be.
    above = np.where(t < -1e-4, np.float32(0), np.float32(9))
    for side in (-1, 1):
        vessel_size = rng.uniform(0.09, 0.14)
        vessel = _ellipse(y, x, center_y + 0.06 * side, center_x - 0.15 * side, vessel_size, vessel_size, 0.0) + above
        paint(vessel - 0.03, wall)
        paint(vessel, blood * rng.uniform(0.85, 1.1))

    label = np.zeros(image.shape, dtype=np.uint8)
    label[right < 0] = LABELS["right cavity"]
    label[outer < 0] = LABELS["wall"]
    label[left < 0] = LABELS["left cavity"]

    # The scanner: tissue texture, slice-wise gain, blur, bias field, contrast curve, noise.
    texture = gaussian_filter(rng.standard_normal(image.shape, dtype=np.float32), (0, 1.0, 1.0)) * 3.5
    image *= 1 + rng.uniform(0.03, 0.08) * texture
    image *= rng.normal(1, 0.05, (slices, 1, 1)).astype(np.float32)
    blur = rng.uniform(0.3, 0.8) * min(height, width) / 96
    image = gaussian_filter(image, (0, blur, blur))
    image = np.clip(image, 0, None) ** np.float32(rng.uniform(0.75, 1.35))
    image *= np.exp(rng.uniform(0.1, 0.4) * _smooth_field(rng, image.shape, waves=(2, 3, 3)))
    noise = rng.standard_normal((2, *image.shape), dtype=np.float32) * np.float32(rng.uniform(0.02, 0.07))
    image = np.hypot(image + noise[0], noise[1]) * rng.uniform(200, 1500)
    return image.astype(np.float32), label


def write_dataset(
    raw_folder: str | os.PathLike[str],
    dataset_id: int,
    name: str = "CMEMSPhantom",
    num_training: int = 24,
    num_test: int = 6,
    *,
    num_unlabelled: int = 0,
    seed: int = 0,
    shape: Sequence[int] = (8, 96, 96),
    spacing: Sequence[float] = SPACING,
) -> Path:
    """Write a data set of scans in nnU-Net's raw format.

    The folder appears whole or not at all. A data set that this function wrote before with the same arguments is left
    as it is and reused.

    Args:
        raw_folder: nnU-Net's ``nnUNet_raw``; made if need be.
        dataset_id: 1 to 999.
        name: what follows the id in the folder's name.
        num_training: scans in ``imagesTr``, with labels in ``labelsTr``; at least 1.
        num_test: scans in ``imagesTs``, with labels in ``labelsTs``.
        num_unlabelled: scans in ``imagesUn``, without labels.
        seed: seed of the data set; scan ``i`` of one seed has nothing in common with scan ``i`` of another.
        shape: voxels (z, y, x) of each scan.
        spacing: voxel size (z, y, x) in mm.

    Returns:
        The data set's folder, ``<raw_folder>/Dataset<id>_<name>``.

    Raises:
        CMEMSError: an argument is out of range, or the folder (or another data set of this id) exists and was not
            made by this function with the same arguments.
    """
    if not 1 <= dataset_id <= 999:
        raise CMEMSError(f"a data set's id lies between 1 and 999, not at {dataset_id}.")
    if num_training < 1 or num_test < 0 or num_unlabelled < 0:
        raise CMEMSError(
            f"a phantom data set needs at least one training scan, and no negative numbers of others; "
            f"{num_training} training, {num_test} test and {num_unlabelled} unlabelled scans were asked for."
        )
    parameters: dict[str, Any] = {
        "version": _VERSION,
        "num_training": num_training,
        "num_test": num_test,
        "num_unlabelled": num_unlabelled,
        "seed": seed,
        "shape": [int(n) for n in shape],
        "spacing": [float(s) for s in spacing],
    }
    raw_folder = Path(raw_folder)
    folder = raw_folder / f"Dataset{dataset_id:03d}_{name}"
    others = [path.name for path in raw_folder.glob(f"Dataset{dataset_id:03d}*") if path != folder]
    if others:
        raise CMEMSError(f"{raw_folder} has another data set of the id {dataset_id:03d} ({others[0]}); choose another id.")
    if folder.exists():
        if _parameters_of(folder) != parameters:
            raise CMEMSError(f"{folder} exists and is not a phantom data set of the same parameters; remove it or choose another id.")
        return folder

    # Hidden from nnU-Net, which looks for folders that begin with "Dataset".
    unfinished = raw_folder / f".{folder.name}.{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        groups = (("Tr", num_training, True), ("Ts", num_test, True), ("Un", num_unlabelled, False))
        for group_index, (group, number, labelled) in enumerate(groups):
            for kind in ("images", "labels") if labelled else ("images",):
                if number:
                    (unfinished / f"{kind}{group}").mkdir(parents=True)
            for i in range(number):
                image, label = make_scan((seed, group_index, i), shape)
                case = f"phantom_{group.lower()}{i:03d}"
                _write(unfinished / f"images{group}" / f"{case}_0000.nii.gz", image, spacing)
                if labelled:
                    _write(unfinished / f"labels{group}" / f"{case}.nii.gz", label, spacing)
        description = {
            "channel_names": {"0": "MRI"},
            "labels": LABELS,
            "numTraining": num_training,
            "file_ending": ".nii.gz",
            "description": "Made-up scans, generated by nnunetv2_cmems; no patient is shown.",
            MARKER: parameters,
        }
        (unfinished / "dataset.json").write_text(json.dumps(description, indent=4), encoding="utf-8")
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _parameters_of(folder: Path) -> Any:
    """What the data set in ``folder`` was generated with; ``None`` if it is none of ours."""
    try:
        return json.loads((folder / "dataset.json").read_text(encoding="utf-8")).get(MARKER)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError):
        return None


def _write(path: Path, array: np.ndarray, spacing: Sequence[float]) -> None:
    """Write an array (z, y, x) as NIfTI; ``spacing`` is (z, y, x) in mm."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([float(s) for s in reversed(spacing)])
    sitk.WriteImage(image, str(path), useCompression=True)


def _ellipse(
    y: np.ndarray,
    x: np.ndarray,
    center_y: float | np.ndarray,
    center_x: float | np.ndarray,
    radius_y: float | np.ndarray,
    radius_x: float | np.ndarray,
    angle: float | np.ndarray,
) -> np.ndarray:
    """About the distance to an ellipse's border, negative inside. Coordinates (z, y, x); the rest broadcasts to them."""
    dy, dx = y - center_y, x - center_x
    u = (np.cos(angle) * dx + np.sin(angle) * dy) / radius_x
    v = (np.cos(angle) * dy - np.sin(angle) * dx) / radius_y
    return ((np.hypot(u, v) - 1) * np.sqrt(radius_x * radius_y)).astype(np.float32)


def _smooth_field(rng: np.random.Generator, shape: Sequence[int], waves: Sequence[int] = (2, 4, 4)) -> np.ndarray:
    """A random field (z, y, x), float32, of standard deviation about 1, made of the lowest cosine waves along each axis."""
    amplitudes = rng.standard_normal(tuple(waves))
    bases = [np.cos(np.pi * np.outer(np.arange(k), (np.arange(n) + 0.5) / n)) for k, n in zip(waves, shape, strict=True)]
    amplitudes[0, 0, 0] = 0.0
    field = np.einsum("abc,az,by,cx->zyx", amplitudes, *bases, optimize=True)
    return (field / np.sqrt(np.prod(waves) / 3)).astype(np.float32)
