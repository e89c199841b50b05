"""How good masks are: Dice, HD95, ASSD and the error of the volume, per case and class.

For each class, or region where ``dataset.json`` defines regions:

* **Dice**, as nnU-Net's evaluation counts it.
* **HD95**: each surface voxel's distance to the other mask's surface; the 95th percentile of either direction, and the larger one.
* **ASSD**: the mean of these distances, both directions together.
* **Volume** of prediction and reference, and the signed error (prediction - reference) in ml and in percent of the reference.

Distances are MONAI's: Euclidean, between the centres of surface voxels, with the reference image's spacing. Voxels at the image's
border belong to the surface. An image of one slice has outlines instead of surfaces. 2D images have no thickness; theirs counts as 1 mm.
Natural images (PNG, BMP, TIF) have no spacing at all: a pixel counts as 1 mm, so that "mm" reads pixels (see :func:`distance_unit`).

Empty masks:

* neither mask shows the class: Dice, distances and errors are NaN. The case does not count for the class.
* only one of them does: Dice is 0 and the volume error counts, but there is no distance: HD95 and ASSD are NaN and are left out of
  means. No penalty is put in their place. Tables tell how often it happened: ``missed`` (only the reference shows the class) and
  ``hallucinated`` (only the prediction does), see :mod:`nnunetv2_cmems.study.comparison`.

Voxels that the reference labels "ignore" belong to no mask, of the prediction neither.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import multiprocessing
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from nnunetv2.evaluation.evaluate_predictions import compute_tp_fp_fn_tn, key_to_label_or_region, region_or_label_to_mask
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from scipy.ndimage import find_objects
from tqdm import tqdm

from nnunetv2_cmems.data.annotation import LabelValues
from nnunetv2_cmems.data.raw import quiet_itk
from nnunetv2_cmems.errors import CMEMSError, first_line
from nnunetv2_cmems.files import write_text
from nnunetv2_cmems.study.run import METRICS, fold_folder
from nnunetv2_cmems.study.table import label_names

SCORES = (
    "dice", "hd95_mm", "assd_mm", "volume_ml", "reference_volume_ml", "volume_error_ml", "volume_error_percent",
)  # fmt: skip
COLUMNS = ("case", "label", *SCORES)
"""Of ``metrics.csv``."""

Label = int | tuple[int, ...]
"""A label's value, or the values of a region."""


def evaluate_run(run_folder: str, reference_folder: str, *, num_processes: int = 1) -> str:
    """Measure what a finished run predicted for its fold's validation cases.

    Args:
        run_folder: a benchmark's ``runs/<key>``.
        reference_folder: the masks, such as nnU-Net's ``gt_segmentations``; those of other cases are not looked at.
        num_processes: 1: all in this process.

    Returns:
        The path of the run's ``metrics.csv``.

    Raises:
        CMEMSError: the run is not finished; see also :func:`evaluate_folder`.
    """
    fold = fold_folder(run_folder)
    validation = os.path.join(fold, "validation")
    description = _read_json(os.path.join(os.path.dirname(fold), "dataset.json"), "the training is not finished")
    summary = _read_json(os.path.join(validation, "summary.json"), "finish the training, or run nnUNetv2_train with --val")
    ending = str(description["file_ending"])
    cases = [os.path.basename(case["prediction_file"])[: -len(ending)] for case in summary["metric_per_case"]]
    table = evaluate_folder(validation, reference_folder, description, cases=cases, num_processes=num_processes)
    path = os.path.join(run_folder, METRICS)
    write_text(path, table.to_csv(index=False))
    return path


def evaluate_folder(
    prediction_folder: str,
    reference_folder: str,
    dataset_json: Mapping[str, Any],
    *,
    cases: Collection[str] | None = None,
    num_processes: int = 1,
) -> pd.DataFrame:
    """Measure all masks of a folder.

    Args:
        prediction_folder: masks named as the references.
        reference_folder: the true masks.
        dataset_json: the content of the data set's ``dataset.json``: labels, regions, file ending, reader.
        cases: identifiers of the cases that must have been predicted, and no others; None: all that have a reference.
        num_processes: 1: all in this process.

    Returns:
        A row per case and class, with the columns :data:`COLUMNS`; cases sorted, classes as in ``dataset.json``.

    Raises:
        CMEMSError: a folder does not exist; a prediction has no reference, or a reference no prediction; shape or spacing of
            the two differ; a file cannot be read.
    """
    ending = str(dataset_json["file_ending"])
    names = _matching_cases(prediction_folder, reference_folder, ending, cases)
    pairs = [tuple(os.path.join(folder, name + ending) for folder in (prediction_folder, reference_folder)) for name in names]
    labels = {name: key_to_label_or_region(key) for key, name in label_names(dataset_json).items()}
    measure = functools.partial(
        _evaluate_pair, labels=labels, ignore=LabelValues.of(dataset_json).ignore, reader_class=_reader_class(dataset_json, pairs[0][1])
    )
    show = functools.partial(tqdm, total=len(pairs), desc="metrics", unit="case", disable=None)
    if num_processes > 1:
        with multiprocessing.get_context("spawn").Pool(min(num_processes, len(pairs))) as pool:
            found = list(show(pool.imap(measure, pairs)))
    else:
        found = list(show(map(measure, pairs)))
    rows = [{"case": name, "label": label, **scores} for name, case in zip(names, found) for label, scores in case.items()]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def evaluate_case(
    prediction_path: str, reference_path: str, labels: Mapping[str, Label], reader: BaseReaderWriter, ignore: int | None = None
) -> dict[str, dict[str, float]]:
    """The scores of one case.

    Args:
        prediction_path: the predicted mask.
        reference_path: the true mask.
        labels: name to the label or region.
        reader: nnU-Net's, of the data set.
        ignore: value of the reference that means "not annotated".

    Returns:
        Name to score to value, see :data:`SCORES`.

    Raises:
        CMEMSError: shape or spacing differ; a file cannot be read.
    """
    prediction, spacing_found = _read_mask(prediction_path, reader)
    reference, spacing = _read_mask(reference_path, reader)
    if prediction.shape != reference.shape:
        raise CMEMSError(
            f"{prediction_path} has the shape {_numbers(prediction.shape)}, its reference {reference_path} {_numbers(reference.shape)}; "
            "predict the scan that the reference belongs to."
        )
    if not np.allclose(spacing_found, spacing, rtol=1e-3, atol=0):
        raise CMEMSError(
            f"{prediction_path} has the spacing {_numbers(spacing_found)}, its reference {reference_path} {_numbers(spacing)}; "
            "predict the scan that the reference belongs to, or correct the file's header."
        )
    counts = np.ones_like(reference, dtype=bool) if ignore is None else reference != ignore
    found = {}
    for name, label in labels.items():
        predicted, true = (region_or_label_to_mask(values, label) & counts for values in (prediction, reference))
        found[name] = compare_masks(predicted, true, spacing)
    return found


def compare_masks(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> dict[str, float]:
    """The scores of one class.

    Args:
        prediction: bool, (Z, Y, X); a 2D image has one slice.
        reference: the same shape.
        spacing: mm, (z, y, x), as nnU-Net's readers give it.

    Returns:
        :data:`SCORES`; NaN where there is none, see the module's docstring.
    """
    voxel = _voxel_volume(prediction.shape, spacing)
    nan = float("nan")
    box = find_objects((prediction | reference).astype(np.uint8))
    if not box:
        return dict(zip(SCORES, (nan, nan, nan, 0.0, 0.0, nan, nan)))
    flat = prediction.shape[0] == 1
    prediction, reference = prediction[box[0]], reference[box[0]]
    tp, fp, fn, _ = (int(n) for n in compute_tp_fp_fn_tn(reference, prediction))
    volume, truth = (tp + fp) * voxel, (tp + fn) * voxel
    hd95 = assd = nan
    if volume and truth:
        hd95, assd = _distances(prediction[0], reference[0], spacing[1:]) if flat else _distances(prediction, reference, spacing)
    percent = 100 * (fp - fn) / (tp + fn) if truth else nan
    return dict(zip(SCORES, (2 * tp / (2 * tp + fp + fn), hd95, assd, volume, truth, (fp - fn) * voxel, percent)))


def distance_unit(dataset_json: Mapping[str, Any]) -> str:
    """``"mm"``, or ``"pixels"`` where the data set's files are natural images, which have no spacing.

    Raises:
        CMEMSError: nnU-Net has no reader for the files.
    """
    return "pixels" if issubclass(_reader_class(dataset_json), NaturalImage2DIO) else "mm"


def read_metrics(path: str) -> pd.DataFrame:
    """A ``metrics.csv``: names as text, whatever they look like, and scores as numbers.

    Raises:
        CMEMSError: the file does not exist, is damaged or lacks a column.
    """
    types = {"case": str, "label": str, **dict.fromkeys(SCORES, float)}
    try:
        table = pd.read_csv(path, dtype=types, keep_default_na=False, na_values=dict.fromkeys(SCORES, ""))
        missing = [column for column in COLUMNS if column not in table]
        if missing or table.empty:
            raise ValueError(f"no column {missing[0]}" if missing else "no rows")
    except (OSError, ValueError) as error:
        raise CMEMSError(f"{path} cannot be read as a run's metrics ({first_line(error)}); delete it and repeat the benchmark.") from error
    return table[list(COLUMNS)]


def _distances(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> tuple[float, float]:
    """HD95 and ASSD in mm of two masks that are not empty."""
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance  # takes seconds to import

    a, b = (torch.from_numpy(np.ascontiguousarray(mask))[None, None] for mask in (prediction, reference))
    scale = [float(s) for s in spacing]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI's, about its own calls
        hd95 = compute_hausdorff_distance(a, b, include_background=True, percentile=95, spacing=scale)
        assd = compute_average_surface_distance(a, b, include_background=True, symmetric=True, spacing=scale)
    return float(hd95), float(assd)


def _voxel_volume(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """In ml. nnU-Net makes up a thickness for 2D images (999 times the largest spacing); 1 mm is taken instead."""
    made_up = shape[0] == 1 and np.isclose(spacing[0], 999 * max(spacing[1:]))
    return float(np.prod(spacing[1:]) * (1.0 if made_up else spacing[0])) / 1000


def _evaluate_pair(
    pair: tuple[str, str], labels: Mapping[str, Label], ignore: int | None, reader_class: type[BaseReaderWriter]
) -> dict[str, dict[str, float]]:
    return evaluate_case(*pair, labels=labels, reader=reader_class(), ignore=ignore)


def _matching_cases(prediction_folder: str, reference_folder: str, ending: str, cases: Collection[str] | None) -> list[str]:
    """The cases, sorted, each of which has a prediction and a reference."""
    predicted, referenced = (_masks(folder, ending) for folder in (prediction_folder, reference_folder))
    wanted = referenced if cases is None else set(cases)
    without_reference = sorted((predicted | wanted) - referenced)
    if without_reference:
        raise CMEMSError(
            f"{os.path.join(prediction_folder, without_reference[0] + ending)} has no reference of this name in {reference_folder}"
            f"{_further(without_reference)}; add the true mask, or remove the prediction."
        )
    without_prediction = sorted(wanted - predicted)
    if without_prediction:
        raise CMEMSError(
            f"{os.path.join(reference_folder, without_prediction[0] + ending)} has no prediction of this name in {prediction_folder}"
            f"{_further(without_prediction)}; predict this case too."
        )
    unexpected = sorted(predicted - wanted)
    if unexpected:
        raise CMEMSError(
            f"{os.path.join(prediction_folder, unexpected[0] + ending)} is of none of the cases that were to be predicted"
            f"{_further(unexpected)}; remove it, or validate again (nnUNetv2_train with --val)."
        )
    if not wanted:
        raise CMEMSError(f"{reference_folder} holds no masks (*{ending}); name the folder of the true masks.")
    return sorted(wanted)


def _masks(folder: str, ending: str) -> set[str]:
    """The cases whose masks lie in a folder."""
    if not os.path.isdir(folder):
        raise CMEMSError(f"{folder} is not a folder; name the one that holds the masks (*{ending}).")
    return {name[: -len(ending)] for name in os.listdir(folder) if name.endswith(ending) and not name.startswith(".")}


def _reader_class(dataset_json: Mapping[str, Any], example: str | None = None) -> type[BaseReaderWriter]:
    # nnU-Net prints the tracebacks of its trials.
    with quiet_itk(), contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(RuntimeError):
        found: type[BaseReaderWriter] = determine_reader_writer_from_dataset_json(dict(dataset_json), example, verbose=False)
        return found
    what = f"files '*{dataset_json['file_ending']}'" if example is None else example
    raise CMEMSError(f"none of nnU-Net's readers can read {what}; repair the file, or correct 'file_ending' in dataset.json.")


def _read_mask(path: str, reader: BaseReaderWriter) -> tuple[np.ndarray, tuple[float, ...]]:
    """Label values (Z, Y, X) and the spacing in mm (z, y, x)."""
    try:
        with quiet_itk():
            mask, properties = reader.read_seg(path)
    except Exception as error:  # every reader has its own
        raise CMEMSError(f"{path} cannot be read ({first_line(error)}); replace it.") from error
    return mask[0], tuple(float(s) for s in properties["spacing"])


def _read_json(path: str, advice: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise CMEMSError(f"{path} cannot be read ({first_line(error)}); {advice}.") from error


def _numbers(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"


def _further(names: Sequence[str]) -> str:
    return f" (nor have {len(names) - 1} more)" if len(names) > 1 else ""
