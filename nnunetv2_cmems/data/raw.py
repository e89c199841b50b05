"""A raw data set as it lies on disk: labelled cases in ``imagesTr``/``labelsTr``, unlabelled scans in ``imagesUn``.

Only file names and ``dataset.json`` are looked at here (and one scan, to learn which of nnU-Net's readers reads it).
What the files contain is checked in :mod:`nnunetv2_cmems.data.preprocessing`.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_cmems.data.annotation import LabelValues
from nnunetv2_cmems.errors import CMEMSError, clipped, first_line, is_printable, shown
from nnunetv2_cmems.files import find_dataset, read_json, some

IMAGES, LABELS, UNLABELLED = "imagesTr", "labelsTr", "imagesUn"

_VOLUMES = ".nii.gz", ".nii", ".nrrd", ".mha", ".mhd"


@dataclass(frozen=True)
class RawCase:
    """One case.

    Attributes:
        case: the case identifier.
        images: the scan's files, one per channel (``_0000``, ``_0001``, ...), or one file that holds all channels.
        label: the mask's file; ``None`` for an unlabelled scan.
    """

    case: str
    images: tuple[str, ...]
    label: str | None


@dataclass(frozen=True)
class RawDataset:
    """A raw data set.

    Attributes:
        name: ``DatasetXXX_Name``.
        folder: its folder in ``nnUNet_raw``.
        dataset_json: the content of its ``dataset.json``.
        file_ending: of all its files, for example ``".nii.gz"``.
        num_channels: input channels, as ``dataset.json`` names them.
        labelled: cases with a mask, by identifier, sorted.
        unlabelled: cases without one, by identifier, sorted.
        has_unlabelled_folder: there is a folder ``imagesUn`` (which may be empty).
    """

    name: str
    folder: str
    dataset_json: dict[str, Any]
    file_ending: str
    num_channels: int
    labelled: dict[str, RawCase] = field(default_factory=dict)
    unlabelled: dict[str, RawCase] = field(default_factory=dict)
    has_unlabelled_folder: bool = False

    @property
    def cases(self) -> dict[str, RawCase]:
        """All cases, the labelled ones first."""
        return {**self.labelled, **self.unlabelled}

    @property
    def values(self) -> LabelValues:
        """The values that a mask may have."""
        return LabelValues.of(self.dataset_json)

    @property
    def not_annotated(self) -> int:
        """The value in a mask that means "not annotated": the ignore label, else the highest label + 1."""
        return self.values.not_annotated

    @property
    def dataset_json_path(self) -> str:
        return os.path.join(self.folder, "dataset.json")

    @cached_property
    def reader_class(self) -> type[BaseReaderWriter]:
        """nnU-Net's reader/writer of the data set: the first that reads the data set's first readable scan.

        Raises:
            CMEMSError: there is no scan, or none that any of nnU-Net's readers can read.
        """
        for raw_case in self.cases.values():
            found: Any = None
            try:
                check_header(raw_case.images[0])
            except Exception:  # is reported by those that need this scan
                continue
            with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(RuntimeError):  # nnU-Net prints tracebacks of its trials
                found = determine_reader_writer_from_dataset_json(self.dataset_json, raw_case.images[0], verbose=False)
            if isinstance(found, type) and issubclass(found, BaseReaderWriter) and not inspect.isabstract(found):
                return found
            if found is not None:  # anything that nnU-Net's modules have under that name
                name = shown(self.dataset_json.get("overwrite_image_reader_writer"))
                raise CMEMSError(
                    f"{self.dataset_json_path}: 'overwrite_image_reader_writer' is {name}, which is no reader of nnU-Net's; correct it."
                )
        if not self.cases:
            raise CMEMSError(f"{self.folder} has no scans; put them into {IMAGES} (with masks in {LABELS}) and {UNLABELLED}.")
        raise CMEMSError(
            f"none of nnU-Net's readers can read a scan of {self.folder} (file ending '{self.file_ending}'); "
            "repair the files, or correct 'file_ending' or 'overwrite_image_reader_writer' in dataset.json."
        )

    def reader(self) -> BaseReaderWriter:
        """A reader/writer of the data set, see :attr:`reader_class`."""
        return self.reader_class()


def open_raw(dataset_name_or_id: str | int, *, require_labels: bool = True) -> RawDataset:
    """The raw data set, by its name or number.

    Args:
        dataset_name_or_id: ``27``, ``"27"``, ``"027"`` or ``"Dataset027_ACDC"``.
        require_labels: a scan in ``imagesTr`` without a mask is an error. If false, it counts as unlabelled.

    Raises:
        CMEMSError: ``nnUNet_raw`` is not set; there is no such data set, or several; ``dataset.json`` is missing,
            unreadable or lacks something; a file name has no channel number; a channel is missing or one too many; a case
            is in ``imagesTr`` and ``imagesUn`` at once; a scan has no mask, or a mask no scan.
    """
    folder = find_raw_folder(dataset_name_or_id)
    content = _read_dataset_json(os.path.join(folder, "dataset.json"))
    ending = content["file_ending"]
    names = _channel_names(content)
    if "dataset" in content:
        images, labels = _listed_in_dataset_json(folder, content["dataset"])
    else:
        images = _scans(os.path.join(folder, IMAGES), ending)
        labels = _masks(os.path.join(folder, LABELS), ending)
    unlabelled = _scans(os.path.join(folder, UNLABELLED), ending)
    for case in [case for case in unlabelled if case in images and same_files(images[case], unlabelled[case])]:
        del unlabelled[case]  # imagesTr links to imagesUn ("suggest --link"): one scan, which belongs to imagesTr
    both = sorted(set(images) & set(unlabelled))
    if both:
        raise CMEMSError(
            f"case {some(both)} {'is' if len(both) == 1 else 'are'} in {IMAGES} and {UNLABELLED} of {folder} at once; "
            f"a scan with a mask belongs into {IMAGES} alone."
        )
    _check_masks(folder, images, labels, unlabelled, require_labels)
    without = {case: files for case, files in images.items() if case not in labels}
    dataset = RawDataset(
        name=os.path.basename(folder),
        folder=folder,
        dataset_json=content,
        file_ending=ending,
        num_channels=len(names),
        labelled={case: RawCase(case, tuple(files), labels[case]) for case, files in sorted(images.items()) if case in labels},
        unlabelled={case: RawCase(case, tuple(files), None) for case, files in sorted({**unlabelled, **without}.items())},
        has_unlabelled_folder=os.path.isdir(os.path.join(folder, UNLABELLED)),
    )
    _check_channels(dataset, names)
    return dataset


def source_state(raw_case: RawCase) -> dict[str, list[int]]:
    """Size and modification time (ns) of a case's files, each under its folder's and its own name.

    TIFF images keep their spacing in a file beside them, which counts as well.

    Raises:
        CMEMSError: a file is gone.
    """
    files = [*raw_case.images, *([raw_case.label] if raw_case.label is not None else [])]
    spacings = [spacing_file(path) for path in files]
    try:
        return {
            "/".join(path.replace(os.sep, "/").split("/")[-2:]): [os.stat(path).st_size, os.stat(path).st_mtime_ns]
            for path in (*files, *(path for path in spacings if os.path.isfile(path)))
        }
    except OSError as error:
        raise CMEMSError(f"{error.filename} cannot be read ({error.strerror}); restore the file, or remove the case.") from error


def spacing_file(path: str) -> str:
    """Where nnU-Net looks for the spacing of a TIFF image, scan or mask; "" for other formats, which hold it themselves."""
    beside = re.sub(r"(_\d{4})?\.tiff?$", ".json", path)
    return "" if beside == path else beside


def left_out(dataset: RawDataset) -> list[str]:
    """Images in the data set's folders that are none of its scans or masks, as their names end otherwise, as paths."""
    names = [UNLABELLED] if "dataset" in dataset.dataset_json else [IMAGES, LABELS, UNLABELLED]
    folders = [folder for folder in (os.path.join(dataset.folder, name) for name in names) if os.path.isdir(folder)]
    endings = (*_VOLUMES, dataset.file_ending.lower())
    return [
        os.path.join(folder, name)
        for folder in folders
        for name in sorted(os.listdir(folder))
        if not name.startswith(".") and not name.endswith(dataset.file_ending) and name.lower().endswith(endings)
    ]


def tell_of_left_out(dataset: RawDataset) -> None:
    """Print what :func:`left_out` finds."""
    files = left_out(dataset)
    if files:
        print(
            f"{len(files)} image(s) do not end with '{dataset.file_ending}', as 'file_ending' of dataset.json has it, and are left out: "
            f"{some(files)}; convert them if they belong to the data set."
        )


def find_raw_folder(dataset_name_or_id: str | int) -> str:
    """The data set's folder in ``nnUNet_raw``.

    Raises:
        CMEMSError: ``nnUNet_raw`` is not set or no folder; there is no such data set, or several.
    """
    return find_dataset(dataset_name_or_id, "nnUNet_raw", "the raw data sets")


@contextlib.contextmanager
def quiet_itk() -> Iterator[None]:
    """Without ITK's warnings: it prints several lines for each header that it finds unusual, at each reading."""
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)


_PLACES = {
    "sform_code": ("srow_x", "srow_y", "srow_z"),
    "qform_code": ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
}
"""What a NIfTI header says of the place in space, and where it says whether that counts."""


def check_header(path: str) -> Any:
    """Refuse a NIfTI file whose header makes ITK end the process, or never come back, or take another size than the header's.

    Returns:
        The file as nibabel opens it, its voxels unread; None for other formats.

    Raises:
        Exception: the file is refused, or cannot be read; nibabel raises nearly anything.
    """
    if not path.endswith((".nii", ".nii.gz")):
        return None
    opened: Any = nibabel.load(path)
    if any(side < 1 for side in opened.shape):
        raise ValueError(f"its header gives a size of {' x '.join(str(side) for side in opened.shape)} voxels")
    kind = opened.get_data_dtype()
    if kind.names is not None or kind.kind == "c":
        raise ValueError("each voxel has several values, such as a colour or a complex number; save each as a channel of its own")
    for code, names in _PLACES.items():
        if int(opened.header[code]) > 0 and not all(np.isfinite(opened.header[name]).all() for name in names):
            raise ValueError(f"its header has NaN or infinite numbers in the {code.removesuffix('_code')}")
    return opened


def _read_dataset_json(path: str) -> dict[str, Any]:
    if not os.path.isfile(path):
        raise CMEMSError(
            f"{path} does not exist; write it, with the channels, the labels and the file ending, as nnU-Net's documentation of its "
            "raw format describes."
        )
    content = read_json(path)
    check_description(content, path)
    checked: dict[str, Any] = content
    return checked


def check_description(content: Any, path: str) -> None:
    """Refuse a ``dataset.json`` that nnU-Net or this package would stumble over later.

    Args:
        content: what the file holds.
        path: the file, for the error's sentence.

    Raises:
        CMEMSError: it lacks something, or says something else than channels, labels or a file ending where these belong.
    """
    if not isinstance(content, dict):
        raise CMEMSError(f"{path} must hold an object with the keys labels, channel_names and file_ending; correct the file.")
    missing = [key for key in ("labels", "channel_names", "file_ending") if key not in content]
    if "modality" in content:
        missing = [key for key in missing if key != "channel_names"]
    if missing:
        raise CMEMSError(f"{path} lacks {some(missing)}; add {'it' if len(missing) == 1 else 'them'}, as nnU-Net's raw format asks for.")
    names = _channel_names(content)
    if not isinstance(names, dict) or sorted(names) != sorted(str(i) for i in range(len(names))) or not names:
        example = '{"0": "MRI"}'
        raise CMEMSError(f"{path}: 'channel_names' must number the channels from \"0\" upwards, as in {example}; it is {shown(names)}.")
    for number, name in names.items():
        if not isinstance(name, str):
            raise CMEMSError(f"{path}: 'channel_names' must give channel {number} a name, such as \"MRI\", not {shown(name)}.")
    if not isinstance(other := content.get("modality", names), dict) or len(other) != len(names):  # nnU-Net counts these when it trains
        raise CMEMSError(f"{path}: 'channel_names' and 'modality' differ in the number of channels; remove 'modality'.")
    ending = content["file_ending"]
    if not isinstance(ending, str) or not ending.startswith(".") or not is_printable(ending):
        raise CMEMSError(f"{path}: 'file_ending' must be a file ending such as \".nii.gz\", not {shown(ending)}.")
    reader = content.get("overwrite_image_reader_writer", "None")
    if not isinstance(reader, str) or not is_printable(reader):
        raise CMEMSError(f"{path}: 'overwrite_image_reader_writer' must name one of nnU-Net's readers, not {shown(reader)}; correct it.")
    _check_labels(path, content)


def _channel_names(content: Mapping[str, Any]) -> dict[str, str]:
    """Channel number -> name; older data sets call the key "modality"."""
    names: dict[str, str] = content["channel_names"] if "channel_names" in content else content["modality"]
    return names


def _check_labels(path: str, content: Mapping[str, Any]) -> None:
    """Let nnU-Net judge the labels, and speak for it."""
    labels, order = content["labels"], content.get("regions_class_order")
    try:
        if not isinstance(labels, dict):
            raise ValueError(f"'labels' must map each name to its value, but is {shown(labels)}")
        for name, value in labels.items():
            if not name.strip() or not is_printable(name):
                raise ValueError(f"{shown(name)} is no name for a label")
            if not (_is_value(value) or (isinstance(value, (list, tuple)) and value and all(_is_value(part) for part in value))):
                raise ValueError(f"the value of '{clipped(name)}' must be a whole number or a list of them, not {shown(value)}")
        if labels.get("background") != 0:
            raise ValueError("'background' must be there, with the value 0")
        values = sorted({part for name, value in labels.items() if name != "ignore" for part in _parts(value)})
        if values != list(range(len(values))) or len(values) < 2:
            raise ValueError(f"the label values must be 0, 1, 2, ... without a gap, but are {shown(values)}")
        ignore = labels.get("ignore", len(values))
        if ignore != len(values):
            raise ValueError(f"the value of 'ignore' must be {len(values)}, one more than the highest label value, not {shown(ignore)}")
        manager = LabelManager(labels, order) if isinstance(order, (list, tuple)) or not _has_regions(labels) else None
        if manager is None or (manager.has_regions and not all(_is_value(value) for value in order or ())):
            raise ValueError(f"with regions, 'regions_class_order' must be a list of label values, not {shown(order)}")
        if not manager.has_regions and len(labels) > len(values) + manager.has_ignore_label:
            raise ValueError("two names have the same value")
    except Exception as error:  # nnU-Net raises AssertionError, RuntimeError, TypeError, ...
        raise CMEMSError(f"{path}: nnU-Net cannot use the labels ({first_line(error)}); correct them.") from error


def _is_value(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _parts(value: Any) -> Sequence[int]:
    return value if isinstance(value, (list, tuple)) else (value,)


def _has_regions(labels: Mapping[str, Any]) -> bool:
    return any(len(_parts(value)) > 1 for value in labels.values())


def _listed_in_dataset_json(folder: str, listed: Any) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Scans and masks of a ``dataset.json`` that lists its files, which nnU-Net allows as well."""

    def absolute(path: str) -> str:
        return os.path.abspath(os.path.join(folder, os.path.expandvars(path)))

    try:
        images = {case: [absolute(path) for path in entry["images"]] for case, entry in listed.items()}
        labels = {case: absolute(entry["label"]) for case, entry in listed.items()}
        if not all(isinstance(entry["images"], list) and entry["images"] for entry in listed.values()):
            raise TypeError
    except (AttributeError, KeyError, TypeError) as error:
        raise CMEMSError(
            f"{os.path.join(folder, 'dataset.json')}: 'dataset' must give 'images' and 'label' for each case; correct or remove it."
        ) from error
    for case in images:
        if not is_printable(case) or case in ("", ".", "..") or os.path.basename(case) != case or "\\" in case:
            raise CMEMSError(
                f"{os.path.join(folder, 'dataset.json')}: '{clipped(case)}' in 'dataset' cannot name a file, so it is no case; correct it."
            )
    for path in [*labels.values(), *(path for paths in images.values() for path in paths)]:
        if not os.path.isfile(path):
            raise CMEMSError(f"{clipped(path, 300)}, which {os.path.join(folder, 'dataset.json')} lists, does not exist; correct the list.")
    return images, labels


def _files(folder: str, ending: str) -> list[str]:
    """Names of a folder's files of the data set's ending, sorted; hidden ones are nobody's scans."""
    if not os.path.isdir(folder):
        return []
    entries = sorted(entry for entry in os.listdir(folder) if not entry.startswith("."))
    files = [entry for entry in entries if entry.endswith(ending)]
    if entries and not files:
        raise CMEMSError(
            f"{folder} has no file with the ending '{ending}' that dataset.json gives, but {some(entries)}; "
            "correct 'file_ending' or the files."
        )
    return files


def _scans(folder: str, ending: str) -> dict[str, list[str]]:
    """Case -> its files in the order of their channels."""
    scans: dict[str, list[str]] = {}
    for name in _files(folder, ending):
        match = re.fullmatch(r"(.+)_(\d{4})", name[: -len(ending)])
        if match is None:
            stem = name[: -len(ending)]
            raise CMEMSError(
                f"{os.path.join(folder, name)} has no channel number in its name; nnU-Net wants it called {stem}_0000{ending}, "
                f"its further channels {stem}_0001{ending} and so on."
            )
        case = match.group(1)
        if case.endswith("_seg"):
            raise CMEMSError(f"{os.path.join(folder, name)}: nnU-Net overlooks cases whose name ends with '_seg'; rename the case.")
        if int(match.group(2)) != len(scans.setdefault(case, [])):  # sorted, so a gap shows here
            raise CMEMSError(
                f"case '{case}' in {folder} has {name} but lacks channel _{len(scans[case]):04d}; add the file or remove the case."
            )
        scans[case].append(os.path.join(folder, name))
    return scans


def _masks(folder: str, ending: str) -> dict[str, str]:
    return {name[: -len(ending)]: os.path.join(folder, name) for name in _files(folder, ending)}


def same_files(paths: Sequence[str], others: Sequence[str]) -> bool:
    """Whether these are the same files under other names: links."""
    return len(paths) == len(others) and all(os.path.exists(p) and os.path.samefile(p, o) for p, o in zip(paths, others, strict=True))


def _check_masks(
    folder: str, images: Mapping[str, Any], labels: Mapping[str, str], unlabelled: Mapping[str, Any], require_labels: bool
) -> None:
    for case, path in labels.items():
        if case in unlabelled:
            raise CMEMSError(f"{path} is a mask, but its scan lies in {UNLABELLED}; move the scan of case '{case}' to {IMAGES}.")
        if case not in images:
            raise CMEMSError(f"{path} is a mask without a scan: {IMAGES} of {folder} has no case '{case}'; correct the name or remove it.")
    without = [case for case in images if case not in labels]
    if require_labels and without:
        raise CMEMSError(
            f"{len(without)} scan(s) in {os.path.join(folder, IMAGES)} have no mask in {LABELS} ({some(without)}); "
            f"add the masks, or move the scans to {UNLABELLED}."
        )


def _check_channels(dataset: RawDataset, names: Mapping[str, str]) -> None:
    """Every case must have as many files as there are channels, or one that holds all of them, as RGB images do."""
    expected = dataset.num_channels
    one_file_is_enough: bool | None = None
    for raw_case in dataset.cases.values():
        number = len(raw_case.images)
        if number == expected:
            continue
        where = os.path.dirname(raw_case.images[0])
        if number > expected:
            raise CMEMSError(
                f"case '{raw_case.case}' in {where} has {number} channels, of which dataset.json names {expected}; "
                f"remove {os.path.basename(raw_case.images[expected])}, or name the channel in dataset.json."
            )
        if number == 1 and one_file_is_enough is None:
            one_file_is_enough = _channels_in_file(dataset, raw_case.images[0]) == expected
        if number > 1 or not one_file_is_enough:
            raise CMEMSError(
                f"case '{raw_case.case}' in {where} lacks channel _{number:04d} ({names[str(number)]!r} in dataset.json); "
                "add the file or remove the case."
            )


def _channels_in_file(dataset: RawDataset, path: str) -> int:
    """Channels that nnU-Net's reader finds in a single file; 0 where it cannot be read."""
    try:
        check_header(path)
        return int(dataset.reader().read_images((path,))[0].shape[0])
    except Exception:  # readers raise anything; the file is reported by those that need it
        return 0
