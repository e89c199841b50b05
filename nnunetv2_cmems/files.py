"""nnU-Net's folders, and files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

from nnunetv2_cmems.errors import CMEMSError


def nnunet_folder(variable: str, holds: str) -> str:
    """The folder that one of nnU-Net's environment variables names.

    Args:
        variable: for example ``"nnUNet_raw"``.
        holds: what the folder holds, for the error's sentence.

    Raises:
        CMEMSError: the variable is not set, or names no folder.
    """
    folder = os.environ.get(variable)
    if not folder:
        raise CMEMSError(f"the environment variable {variable} is not set; set it to the folder that holds {holds}.")
    if not os.path.isdir(folder):
        raise CMEMSError(f"{variable} names '{folder}', which is not a folder; correct the environment variable.")
    return folder


def datasets_in(folder: str) -> list[str]:
    """The data sets' folders in one of nnU-Net's folders, sorted."""
    return sorted(entry for entry in os.listdir(folder) if entry.startswith("Dataset") and os.path.isdir(os.path.join(folder, entry)))


def datasets_called(name_or_id: str | int, folder: str) -> list[str]:
    """The data sets in ``folder`` of a name or number, sorted; of a number there may be several.

    Raises:
        CMEMSError: it is neither.
    """
    name = str(name_or_id)
    if name.startswith("Dataset"):
        return [entry for entry in datasets_in(folder) if entry == name]
    if name.isdecimal():
        return [entry for entry in datasets_in(folder) if entry.startswith(f"Dataset{int(name):03d}_")]
    raise CMEMSError(f"'{name}' is no data set; give its ID, as in '-d 27', or its name, as in '-d Dataset027_ACDC'.")


def to_json(content: Any) -> str:
    return json.dumps(content, indent=4)


def write_json(path: str, content: Any) -> None:
    """Write a JSON file as :func:`write_text` does."""
    write_text(path, to_json(content))


def write_text(path: str, text: str) -> None:
    """Write a file that is there whole or not at all; its folder is made if need be.

    Raises:
        CMEMSError: it cannot be written.
    """
    temporary = f"{path}.tmp"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise CMEMSError(f"{path} cannot be written ({error.strerror or error}); check permissions and free space.") from error
