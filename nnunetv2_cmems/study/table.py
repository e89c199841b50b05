"""Table and montage of finished trainings, from the validation that nnU-Net itself wrote.

    python -m nnunetv2_cmems.study.table -d 27 -c 2d_small -r results/exemplar_1 results/exemplar_2 --montage montage.png

Each folder after ``-r`` is an ``nnUNet_results`` folder of one exemplar (or seed). A method's row gives the
mean over these folders and, behind it, their standard deviation. Folders of predictions that nnU-Net has
evaluated are shown by ``--predictions``, each with its mean and standard deviation over the cases.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunetv2_cmems.data.annotation import LabelValues
from nnunetv2_cmems.errors import CMEMSError, first_line, show_errors_as_sentences
from nnunetv2_cmems.study.pictures import montage

Dice = dict[str, dict[str, float]]
"""Case identifier to class name (and ``"mean"``) to 3D Dice."""


def read_validation(fold_folder: str, class_names: Mapping[str, str]) -> Dice:
    """3D Dice per case and class of a finished fold.

    Args:
        fold_folder: nnU-Net's ``fold_X`` folder.
        class_names: foreground label or region, as nnU-Net's summary writes it ("1", "(1, 2)"), to name.

    Raises:
        CMEMSError: the fold's validation has not been run to its end.
    """
    path = os.path.join(fold_folder, "validation", "summary.json")
    if not os.path.isfile(path):
        raise CMEMSError(f"{path} does not exist; finish the training, or run nnUNetv2_train with --val.")
    return read_summary(path, class_names)


def read_summary(path: str, class_names: Mapping[str, str]) -> Dice:
    """The Dice of each case and class (and their mean) from a summary of nnU-Net's evaluation.

    Raises:
        CMEMSError: the file cannot be read.
    """
    try:
        with open(path, encoding="utf-8") as file:
            summary = json.load(file)
    except (OSError, ValueError) as error:
        raise CMEMSError(f"{path} cannot be read ({first_line(error)}); run nnUNetv2_evaluate_folder again.") from error
    found = {}
    for case in summary["metric_per_case"]:
        name = os.path.splitext(os.path.basename(case["prediction_file"]).removesuffix(".gz"))[0]  # dots are part of it
        scores = {class_names[label]: float(metrics["Dice"]) for label, metrics in case["metrics"].items()}
        found[name] = {**scores, "mean": float(np.nanmean(list(scores.values())))}
    return found


def mean_over_cases(dice: Dice) -> dict[str, float]:
    """Mean Dice per class; a case that neither truth nor prediction shows the class in does not count."""
    columns = next(iter(dice.values()))
    return {column: float(np.nanmean([case[column] for case in dice.values()])) for column in columns}


def markdown_table(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """A Markdown table: a row per method, a column per class, ``mean ± standard deviation`` in percent.

    Args:
        rows: method to its results, one per exemplar or seed.
    """
    columns = list(next(iter(rows.values()))[0])
    lines = [f"| method | runs | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 2)}"]
    for method, results in rows.items():
        cells = [_cell([100 * result[column] for result in results]) for column in columns]
        lines.append(f"| {method} | {len(results)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def predictions_table(folders: Sequence[str]) -> str:
    """A Markdown table: a row per folder of predictions, ``mean ± standard deviation`` of the Dice over its cases.

    Args:
        folders: written by ``nnUNetv2_predict`` and evaluated by ``nnUNetv2_evaluate_folder``.

    Raises:
        CMEMSError: a folder has no evaluation, or lacks what ``nnUNetv2_predict`` writes.
    """
    lines = ["| predictions | cases | mean | classes |", "|---|---|---|---|"]
    for folder in folders:
        path = os.path.join(folder, "dataset.json")
        if not os.path.isfile(path):
            raise CMEMSError(f"{path} does not exist; {folder} was not written by nnUNetv2_predict.")
        with open(path, encoding="utf-8") as file:
            names = label_names(json.load(file))
        dice = read_summary(os.path.join(folder, "summary.json"), names)
        shown = {name: [100 * case[name] for case in dice.values() if not np.isnan(case[name])] for name in [*names.values(), "mean"]}
        cells = {name: _cell(values) if values else "-" for name, values in shown.items()}
        classes = ", ".join(f"{name} {cells[name]}" for name in names.values())
        lines.append(f"| {os.path.basename(os.path.normpath(folder))} | {len(dice)} | {cells['mean']} | {classes} |")
    return "\n".join(lines)


def label_names(description: Mapping[str, Any]) -> dict[str, str]:
    """The foreground labels or regions of a ``dataset.json``, as nnU-Net's summaries write them, to their names."""
    return {
        str(tuple(value) if isinstance(value, list) else value): name
        for name, value in description["labels"].items()
        if value != 0 and name != "ignore"
    }


def _cell(values: Sequence[float]) -> str:
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def find_folds(results: Sequence[str], dataset: str, plans: str, configuration: str, fold: str) -> dict[str, list[str]]:
    """Folders of the finished folds of every trainer, one per results folder that has it.

    Raises:
        CMEMSError: none of the results folders holds a finished training.
    """
    ending = f"__{plans}__{configuration}"
    found: dict[str, list[str]] = {}
    for root in results:
        base = os.path.join(root, dataset)
        for name in sorted(os.listdir(base)) if os.path.isdir(base) else []:
            folder = os.path.join(base, name, f"fold_{fold}")
            if name.endswith(ending) and os.path.isfile(os.path.join(folder, "validation", "summary.json")):
                found.setdefault(name[: -len(ending)], []).append(folder)
    if not found:
        raise CMEMSError(f"no finished training of {dataset}, configuration {configuration}, fold {fold} lies in {', '.join(results)}.")
    return found


def draw_montage(
    path: str,
    folds: Mapping[str, str],
    truth_folder: str,
    raw_folder: str,
    ending: str,
    class_names: Mapping[str, str],
    colours: Mapping[int, str],
) -> None:
    """The best, median and worst case of the first method: image, truth and every method's prediction.

    Args:
        path: the PNG to write.
        folds: method to its fold folder; the first one ranks the cases.
        truth_folder: nnU-Net's ``gt_segmentations``.
        raw_folder: nnU-Net's ``imagesTr``.
        ending: the images' file ending.
        class_names: see :func:`read_validation`.
        colours: foreground label value to name.
    """
    scores = read_validation(next(iter(folds.values())), class_names)
    ranked = sorted(scores, key=lambda case: scores[case]["mean"])
    rows, titles = [], []
    for name, case in [("best", ranked[-1]), ("median", ranked[len(ranked) // 2]), ("worst", ranked[0])]:
        image = _slices(os.path.join(raw_folder, f"{case}_0000{ending}"))
        truth = _slices(os.path.join(truth_folder, case + ending))
        z = len(image) // 2
        row = {"image": (image[z], None), "truth": (image[z], truth[z])}
        for method, folder in folds.items():
            row[method] = (image[z], _slices(os.path.join(folder, "validation", case + ending))[z])
        rows.append(row)
        titles.append(f"{name}: {case}, Dice {100 * scores[case]['mean']:.0f} %")
    montage(path, rows, colours, row_titles=titles)


def _slices(path: str) -> np.ndarray:
    return np.asarray(sitk.GetArrayFromImage(sitk.ReadImage(path)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry, see the module's docstring."""
    show_errors_as_sentences()
    from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    parser = argparse.ArgumentParser(prog="python -m nnunetv2_cmems.study.table", description=__doc__)
    parser.add_argument("-d", help="data set, name or id")
    parser.add_argument("-c", default="2d_small", help="configuration")
    parser.add_argument("-p", default="nnUNetPlans", help="plans identifier")
    parser.add_argument("-f", default="0", help="fold")
    parser.add_argument("-r", nargs="+", help="results folders, one per exemplar or seed")
    parser.add_argument("--predictions", nargs="+", help="instead of -d and -r: folders that nnUNetv2_evaluate_folder has evaluated")
    parser.add_argument("--montage", help="PNG with the best, median and worst case of the first results folder")
    parser.add_argument("--trainers", nargs="+", help="trainers, in the table's order; default: all that are found")
    args = parser.parse_args(arguments)
    if args.predictions:
        print(predictions_table(args.predictions))
        return
    if not (args.d and args.r):
        parser.error("-d and -r, or --predictions, are needed")

    dataset = maybe_convert_to_dataset_name(int(args.d) if args.d.isdigit() else args.d)
    with open(os.path.join(nnUNet_preprocessed.get(), dataset, "dataset.json"), encoding="utf-8") as file:
        description = json.load(file)
    class_names = label_names(description)
    colours = {value: name for value, name in LabelValues.of(description).names.items() if value > 0}
    folds = find_folds(args.r, dataset, args.p, args.c, args.f)
    missing = [trainer for trainer in args.trainers or () if trainer not in folds]
    if missing:
        raise CMEMSError(f"no finished training of {', '.join(missing)} was found; found are {', '.join(folds)}.")
    folds = {trainer: folds[trainer] for trainer in args.trainers or folds}
    print(markdown_table({t: [mean_over_cases(read_validation(f, class_names)) for f in found] for t, found in folds.items()}))
    if args.montage:
        truth = os.path.join(nnUNet_preprocessed.get(), dataset, "gt_segmentations")
        raw = os.path.join(nnUNet_raw.get(), dataset, "imagesTr")
        first = {trainer.replace("nnUNetTrainer", ""): found[0] for trainer, found in folds.items()}
        draw_montage(args.montage, first, truth, raw, description["file_ending"], class_names, colours)


if __name__ == "__main__":
    main()
