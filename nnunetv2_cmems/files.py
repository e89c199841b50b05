"""nnU-Net's folders, and files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from nnunetv2_cmems.errors import CMEMSError, clipped, first_line

OURS = "nnunetv2_cmems"
"""The key of what we add to nnU-Net's files."""


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


def find_dataset(name_or_id: str | int, variable: str, holds: str, remedy: str = "correct -d or the environment variable") -> str:
    """The one data set of a name or number in a folder of nnU-Net's, as a path.

    Args:
        name_or_id: as ``-d`` has it.
        variable: see :func:`nnunet_folder`, as is ``holds``.
        holds: for the error's sentence.
        remedy: what to do where there is no such data set.

    Raises:
        CMEMSError: there is none, or several; see also :func:`nnunet_folder` and :func:`datasets_called`.
    """
    root = nnunet_folder(variable, holds)
    found = datasets_called(name_or_id, root)
    if len(found) == 1:
        return os.path.join(root, found[0])
    if found:
        several = ", ".join(found)
        raise CMEMSError(f"in {variable} ({root}) several data sets have the ID {name_or_id} ({several}); give the name of one with -d.")
    there = some(datasets_in(root))
    raise CMEMSError(f"in {variable} ({root}) there is no data set {name_or_id}{there and f' (there are: {there})'}; {remedy}.")


def some(names: Iterable[str], limit: int = 3, *, quote: str = "'") -> str:
    """A few names for a sentence, between ``quote``."""
    names = list(names)
    quoted = [f"{quote}{name}{quote}" for name in names[:limit]]
    return ", ".join(quoted) + (f" and {len(names) - limit} more" if len(names) > limit else "")


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Environment variables for the time of a block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def read_json(path: str, remedy: str = "correct the file", *, unique_keys: bool = False, byte_order_mark: bool = False) -> Any:
    """The content of a JSON file.

    Args:
        path: the file.
        remedy: what to do where it cannot be read, for the error's sentence.
        unique_keys: refuse a key that stands twice in an object; Python takes the last one without a word.
        byte_order_mark: allow one at the file's beginning, where some editors put it. nnU-Net does not.

    Raises:
        CMEMSError: the file cannot be read, or is not JSON.
    """
    try:
        with open(path, encoding="utf-8-sig" if byte_order_mark else "utf-8") as file:
            return json.load(file, object_pairs_hook=_unique if unique_keys else None)
    except (OSError, ValueError, RecursionError) as error:  # no UTF-8, no JSON, or too long numbers: all are ValueErrors
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise CMEMSError(f"{path} cannot be read as JSON ({reason}); {remedy}.") from error


def read_plans(path: str, remedy: str = "plan the data set, or correct -p") -> dict[str, Any]:
    """nnU-Net's plans.

    Args:
        path: the file.
        remedy: what to do where it cannot be read, for the error's sentence.

    Raises:
        CMEMSError: there is no such file, or it holds no plans.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content: dict[str, Any] = json.load(file)
        content["configurations"], content["plans_name"]
        return content
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CMEMSError(f"{path} cannot be read as nnU-Net's plans ({first_line(error)}); {remedy}.") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key '{clipped(key)}' stands twice in one object")
        content[key] = value
    return content


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
