"""Labels of whole unlabelled scans on the disk: where each round of them lies, and crops out of it.

``scan_labels/epoch_<e>/<case>.npy`` in the fold's folder holds the labels that count from epoch e on, int8 in head space: (Z, Y, X)
classes, or (R, Z, Y, X) regions. A round's folder has its name once it is complete.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd

from nnunetv2_cmems.errors import CMEMSError, first_line

UNKNOWN = -1
"""Where a scan has no label."""

_ROUND = re.compile(r"epoch_(\d+)")


@dataclass(frozen=True)
class ScanLabelFiles:
    """The rounds of one training.

    Attributes:
        folder: which holds one folder for each round; it need not exist.
        regions: how many regions there are; 0 for classes.
    """

    folder: str
    regions: int = 0

    def rounds(self) -> list[int]:
        """The epochs from which on the complete rounds count, the newest last."""
        try:
            names = os.listdir(self.folder)
        except OSError:  # nothing has been made yet
            return []
        return sorted(int(found[1]) for found in map(_ROUND.fullmatch, names) if found)

    def round_folder(self, epoch: int) -> str:
        return os.path.join(self.folder, f"epoch_{epoch}")

    def keep(self, epochs: Collection[int]) -> None:
        """Remove all rounds but these, and what is left of rounds that never became complete."""
        kept = {os.path.basename(self.round_folder(epoch)) for epoch in epochs}
        for name in os.listdir(self.folder) if os.path.isdir(self.folder) else ():
            if name not in kept:
                shutil.rmtree(os.path.join(self.folder, name), ignore_errors=True)

    def path(self, case: str, epoch: int) -> str:
        """Where a case's labels of a round lie, if it has any."""
        return os.path.join(self.round_folder(epoch), f"{case}.npy")

    def cases(self, epoch: int) -> set[str]:
        """The cases that have labels in a round."""
        try:
            names = os.listdir(self.round_folder(epoch))
        except OSError:
            return set()
        return {name[: -len(".npy")] for name in names if name.endswith(".npy")}

    def whole(self, case: str, epoch: int) -> np.ndarray:
        """A case's labels of a round, int8 (Z, Y, X) or (R, Z, Y, X).

        Raises:
            CMEMSError: the file is missing or damaged.
        """
        path = self.path(case, epoch)
        try:
            labels: np.ndarray = np.load(path)
        except Exception as error:
            raise self._damaged(path, error) from error
        return labels

    def _damaged(self, path: str, error: Exception) -> CMEMSError:
        return CMEMSError(
            f"{path} cannot be read ({first_line(error)}); delete the folder {self.folder} and continue with --c, which makes it again."
        )

    def crop(self, case: str, box: Sequence[Sequence[int]]) -> np.ndarray:
        """A case's newest labels within ((z), y, x) ranges, int8 of the ranges' shape, regions first; -1 where nothing is known.

        Raises:
            CMEMSError: the file is damaged.
        """
        heads = [self.regions] if self.regions else []
        for epoch in reversed(self.rounds()):
            path = self.path(case, epoch)
            try:
                labels = np.load(path, mmap_mode="r")
                cut = crop_and_pad_nd(labels if heads else labels[None], box, UNKNOWN)
                return np.array(cut if heads else cut[0], dtype=np.int8)
            except FileNotFoundError:  # not among the scans that get labels then, or the round has just been removed for a newer one
                pass
            except Exception as error:  # damaged files raise nearly anything
                raise self._damaged(path, error) from error
        return np.full([*heads, *(high - low for low, high in box)], UNKNOWN, np.int8)
