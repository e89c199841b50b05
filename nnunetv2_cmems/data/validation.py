"""nnU-Net's own loader for the online validation, with errors that name the case."""

from __future__ import annotations

import os
from typing import Any

from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from nnunetv2_cmems.data.unlabelled import no_memory
from nnunetv2_cmems.errors import first_line


class _NamedCases:
    """A data set of nnU-Net that remembers which case was loaded last."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self.identifiers = data.identifiers
        self.last = ""

    def load_case(self, identifier: str) -> Any:
        self.last = identifier
        return self.data.load_case(identifier)


class ValidationLoader(nnUNetDataLoader):
    """nnU-Net's loader; a batch that cannot be read becomes ``{"error": sentence}``.

    A worker process cannot raise in the main one, and nnU-Net would report a dead worker or an error of
    the compression library without a name.
    """

    def __init__(self, data: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(_NamedCases(data), *args, **kwargs)

    def generate_train_batch(self) -> dict[str, Any]:
        try:
            return super().generate_train_batch()
        except MemoryError as error:
            return {"error": no_memory(error)}
        except Exception as error:  # damaged files raise nearly anything
            path = os.path.join(self._data.data.source_folder, self._data.last)
            return {"error": f"the validation case {path} cannot be read ({first_line(error)}); run nnUNetv2_preprocess again."}
