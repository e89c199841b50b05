"""Unlabelled images: 2D and 3D crops out of nnU-Net's preprocessed folders. No label file is opened here."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import blosc2
import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgenerators.dataloading.data_loader import DataLoader
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunetv2_cmems.data.exemplar import PreprocessedDataset, read_properties
from nnunetv2_cmems.data.scan_labels import ScanLabelFiles
from nnunetv2_cmems.errors import CMEMSError, first_line

CACHE_VARIABLE = "nnUNet_cmems_cache_gb"
"""Environment variable: gigabytes of preprocessed images that the workers of a training keep in memory, all together."""


def image_path(case: str, dataset: PreprocessedDataset) -> str:
    """The file that holds a preprocessed image."""
    stem = os.path.join(dataset.folder, case)
    if issubclass(dataset.dataset_class, nnUNetDatasetBlosc2):
        return f"{stem}.b2nd"
    return f"{stem}.npy" if os.path.isfile(f"{stem}.npy") else f"{stem}.npz"


def open_image(case: str, dataset: PreprocessedDataset) -> Any:
    """A preprocessed image (C, Z, Y, X), read lazily where the format allows it.

    Raises:
        CMEMSError: the file is missing or unreadable.
    """
    path = image_path(case, dataset)
    try:
        if path.endswith(".b2nd"):
            mmap = {} if os.name == "nt" else {"mmap_mode": "r"}
            return blosc2.open(urlpath=path, mode="r", dparams={"nthreads": 1}, **mmap)
        return np.load(path, mmap_mode="r") if path.endswith(".npy") else np.load(path)["data"]
    except Exception as error:  # damaged files raise nearly anything
        raise CMEMSError(_unreadable(path, error, dataset)) from error


def read_image(case: str, dataset: PreprocessedDataset) -> np.ndarray:
    """A whole preprocessed image, float32 (C, Z, Y, X).

    Raises:
        CMEMSError: the file is missing or unreadable.
    """
    image = open_image(case, dataset)
    try:
        return np.asarray(image[:], dtype=np.float32)
    except Exception as error:  # damaged files raise nearly anything
        raise CMEMSError(_unreadable(image_path(case, dataset), error, dataset)) from error


def check_images(cases: Sequence[str], dataset: PreprocessedDataset, configuration: ConfigurationManager, num_channels: int) -> None:
    """Refuse images that do not fit the configuration. Reads headers and properties only.

    Args:
        cases: the exemplars' and the unlabelled cases.
        dataset: the preprocessed folder.
        configuration: what is about to be trained.
        num_channels: input channels of the network.

    Raises:
        CMEMSError: a file is missing or unreadable, has another number of channels, or was
            preprocessed for another spacing.
    """
    for case in cases:
        path = image_path(case, dataset)
        shape = tuple(open_image(case, dataset).shape)
        if len(shape) != 4 or shape[0] != num_channels:
            raise CMEMSError(
                f"{path} has {shape[0]} channels where dataset.json names {num_channels}; correct the data set and run "
                f"{_command(dataset)} again."
            )
        properties = read_properties(case, dataset)
        spacing = [properties["spacing"][axis] for axis in dataset.transpose_forward]
        expected = resampled_shape(properties["shape_after_cropping_and_before_resampling"], spacing, configuration)
        if shape[1:] != expected:
            target = " x ".join(f"{side:g}" for side in configuration.spacing)
            raise CMEMSError(
                f"{path} has the shape {shape[1:]}, but at the plans' spacing of {target} mm it would be {expected}: it was preprocessed "
                f"for other plans; run {_command(dataset)} again for this configuration."
            )


def resampled_shape(shape: Sequence[int], spacing: Sequence[float], configuration: ConfigurationManager) -> tuple[int, ...]:
    """The (Z, Y, X) that nnU-Net resamples a cropped, transposed image of this shape and spacing to; 2D keeps the slices."""
    wanted = [spacing[0], *configuration.spacing] if len(configuration.spacing) == 2 else list(configuration.spacing)
    return tuple(int(n) for n in compute_new_shape(shape, spacing, wanted))


class UnlabelledLoader(DataLoader):
    """Random crops of unlabelled images.

    A case is drawn uniformly, then (in 2D) one of its slices, then a place such that the crop's inner part of
    the final patch size lies within the image (or around its centre where the image is smaller). What is read is kept
    in memory as long as there is room, see :func:`cache_size`.

    Args:
        cases: the unlabelled cases, and the preprocessed folder that each lies in.
        batch_size: crops a batch.
        crop: ((z,) y, x) size of the crops, larger than ``patch`` to leave room for the deformation.
        patch: ((z,) y, x) final patch size.
        labels: labels of whole scans, of which a crop is read with each image's; None: the batches have none.

    Yields:
        ``{"data": float32 (U, C, *crop), "offset": float32 (U, d)}``, the offset of the crop's centre from the
        image's middle in voxels, or ``{"error": sentence}`` where a file cannot be read: a
        worker process cannot raise in the main one. With ``labels`` also ``"label"``: int8 (U, *crop), or (U, R, *crop) for
        regions, -1 where nothing is known.
    """

    def __init__(
        self,
        cases: Mapping[str, PreprocessedDataset],
        batch_size: int,
        crop: Sequence[int],
        patch: Sequence[int],
        labels: ScanLabelFiles | None = None,
    ) -> None:
        super().__init__(list(cases), batch_size, 1, None, True, False, True)
        self.indices = list(cases)
        self.cases = dict(cases)
        self.crop = tuple(int(n) for n in crop)
        self.patch = tuple(int(n) for n in patch)
        self.labels = labels
        self._room = cache_size() // max(1, get_allowed_n_proc_DA())  # each worker process keeps its own
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._kept: dict[tuple[str, int | None], np.ndarray] = {}

    def generate_train_batch(self) -> dict[str, Any]:
        try:
            crops, offsets, labels = zip(*[self._crop(case) for case in self.get_indices()])
            batch = {"data": torch.from_numpy(np.stack(crops)), "offset": torch.tensor(offsets, dtype=torch.float32)}
            return batch if self.labels is None else {**batch, "label": torch.from_numpy(np.stack(labels))}
        except CMEMSError as error:
            return {"error": str(error)}
        except MemoryError as error:
            return {"error": no_memory(error)}

    def _crop(self, case: str) -> tuple[np.ndarray, list[float], np.ndarray | None]:
        dataset = self.cases[case]
        shape = self._shape(case)
        flat = len(self.patch) == 2
        z = np.random.randint(shape[1]) if flat else None
        box = [] if z is None else [[z, z + 1]]
        offset = []
        for size, inner, outer in zip(shape[1 + len(box) :], self.patch, self.crop):
            first = np.random.randint(size - inner + 1) if size > inner else (size - inner) // 2
            offset.append(first + inner / 2 - size / 2)
            first -= (outer - inner) // 2
            box.append([first, first + outer])
        try:
            crop = self._cut(case, z, box)
        except CMEMSError:
            raise
        except Exception as error:
            raise CMEMSError(_unreadable(image_path(case, dataset), error, dataset)) from error
        crop = crop[:, 0] if flat else crop
        if not np.isfinite(crop).all():
            path = image_path(case, dataset)
            raise CMEMSError(f"{path} has NaN or infinite values; repair the scan and run {_command(dataset)} again.")
        label = None if self.labels is None else self.labels.crop(case, box)
        return crop, offset, label.squeeze(-3) if flat and label is not None else label

    def _shape(self, case: str) -> tuple[int, ...]:
        if case not in self._shapes:
            self._shapes[case] = tuple(open_image(case, self.cases[case]).shape)
        return self._shapes[case]

    def _cut(self, case: str, z: int | None, box: list[list[int]]) -> np.ndarray:
        """The part of an image within the box, zeros beyond; float32 (C, Z, Y, X). In 2D a slice is read and kept, else the image."""
        kept = self._kept.get((case, z))
        if kept is None:
            image = open_image(case, self.cases[case])
            channels, depth, *others = self._shape(case)
            size = 4 * channels * (depth if z is None else 1) * math.prod(others)
            if size > self._room:
                return crop_and_pad_nd(image, box, 0).astype(np.float32)
            kept = np.asarray(image[:] if z is None else image[:, z : z + 1], dtype=np.float32)
            self._kept[case, z] = kept
            self._room -= size
        return crop_and_pad_nd(kept, box if z is None else [[0, 1], *box[1:]], 0)


def cache_size() -> int:
    """Bytes of images that all workers of a loader together may keep: 2 GB, or what the environment variable says.

    nnU-Net's own loaders take more than that. A share of the computer's memory would be no safer bound, as a job on a cluster gets
    a part of it only, which not every system tells.

    Raises:
        CMEMSError: the variable is no number.
    """
    text = os.environ.get(CACHE_VARIABLE, "2")
    try:
        size = float(text)
    except ValueError:
        size = -1.0
    if not 0 <= size < math.inf:
        raise CMEMSError(f"the environment variable {CACHE_VARIABLE} is '{text}'; set it to gigabytes (0: none), or unset it.")
    return int(size * 1e9)


def no_memory(error: MemoryError) -> str:
    """What a worker process says that cannot get memory."""
    return (
        f"there was no memory left to read images ({first_line(error)}): lower the environment variable nnUNet_n_proc_DA and continue "
        "with --c."
    )


def _unreadable(path: str, error: Exception, dataset: PreprocessedDataset) -> str:
    if isinstance(error, MemoryError):
        return no_memory(error)
    return f"{path} cannot be read ({first_line(error)}); run {_command(dataset)} again."


def _command(dataset: PreprocessedDataset) -> str:
    """What makes the files of a folder."""
    return "nnUNetv2_cmems plan_and_preprocess" if dataset.folder.endswith("_unlabelled") else "nnUNetv2_preprocess"
