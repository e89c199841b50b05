"""What a benchmark folder holds, as the report needs it: its runs, their curves, histograms and per-case scores."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from nnunetv2_cmems.errors import CMEMSError, first_line
from nnunetv2_cmems.study.comparison import DEFAULT_BASELINE, Comparison, collect
from nnunetv2_cmems.study.run import BENCHMARK, RECORD, RUNS, RunRecord, fold_folder, is_finished, read_run
from nnunetv2_cmems.trainers.hidden_labels import Reliability


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: ``runs/<key>``.
        record: its ``run.json``.
    """

    folder: str
    record: RunRecord

    @property
    def key(self) -> str:
        return os.path.basename(self.folder)

    @property
    def fold(self) -> str:
        """nnU-Net's ``fold_X`` folder."""
        return fold_folder(self.folder)

    @cached_property
    def history(self) -> dict[str, np.ndarray]:
        """Key -> a value an epoch, NaN where there is none; {} where the trainer writes no ``cmems_history.json``."""
        content = read_json(os.path.join(self.fold, "cmems_history.json"))
        curves = {key: values for key, values in (content or {}).items() if isinstance(values, list)}
        return {key: _numbers(values) for key, values in curves.items() if all(_is_number(value) for value in values)}

    @cached_property
    def reliability(self) -> dict[str, Any] | None:
        """``cmems_reliability.json``; None where there is none."""
        content = read_json(os.path.join(self.fold, "cmems_reliability.json"))
        return content if content and content.get("epochs") else None


@dataclass(frozen=True)
class StudyRuns:
    """A study's finished runs.

    Attributes:
        name: of the study.
        question: what it answers.
        variants: value -> its runs; those of a value that changes nothing are the method's own.
        notes: value -> what ``benchmark.json`` says about it.
    """

    name: str
    question: str = ""
    variants: dict[Any, list[Run]] = field(default_factory=dict)
    notes: dict[Any, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def runs(self) -> list[Run]:
        return [run for runs in self.variants.values() for run in runs]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark folder.

    Attributes:
        folder: where it lies.
        comparison: what its tables are made of.
        finished: the runs that count, in the tables' order.
    """

    folder: str
    comparison: Comparison
    finished: Sequence[Run]

    @property
    def grid(self) -> Mapping[str, Any]:
        """``benchmark.json``."""
        return self.comparison.benchmark

    @property
    def dataset(self) -> str:
        return self.finished[0].record.spec.dataset

    @property
    def cases(self) -> pd.DataFrame:
        """``cases.csv``: a row per run, case and class."""
        return self.comparison.cases

    @cached_property
    def methods(self) -> dict[str, list[Run]]:
        """Method -> its runs, without the studies' variants (unless there is nothing else), in the tables' order."""
        runs = [run for run in self.finished if run.record.spec.study is None] or list(self.finished)
        return _grouped(runs, lambda run: run.record.spec.method)

    @property
    def main(self) -> str:
        """The method that ranks the gallery's cases: CMEMS, or the first one."""
        ours = [method for method, runs in self.methods.items() if runs[0].record.spec.trainer == DEFAULT_BASELINE]
        return (ours or list(self.methods))[0]

    @cached_property
    def studies(self) -> list[StudyRuns]:
        """The studies that have a finished run: as ``benchmark.json`` lists their variants, then what else the runs say."""
        listed = [entry for entry in self.grid.get("studies") or [] if isinstance(entry, Mapping)]
        by_key = {run.key: run for run in self.finished}
        found: dict[str, StudyRuns] = {}
        for entry in listed:
            study = found.setdefault(str(entry["name"]), StudyRuns(str(entry["name"]), str(entry.get("question", ""))))
            for variant in entry.get("variants", []):
                runs = [by_key[key] for key in variant.get("runs", []) if key in by_key]
                if runs:
                    study.variants[variant["value"]] = runs
                    study.notes[variant["value"]] = variant
        for run in self.finished:
            spec = run.record.spec
            if spec.study is not None:
                runs = found.setdefault(spec.study, StudyRuns(spec.study)).variants.setdefault(spec.value, [])
                if run not in runs:
                    runs.append(run)
        return [study for study in found.values() if study.variants]


def read_benchmark(folder: str) -> Benchmark:
    """Read a benchmark folder.

    Raises:
        CMEMSError: there is no such folder; see also :func:`nnunetv2_cmems.study.comparison.collect`.
    """
    if not os.path.isdir(folder):
        raise CMEMSError(f"there is no folder {folder}; name a benchmark's folder, or give its -d, -c and -f.")
    if not os.path.isfile(os.path.join(folder, BENCHMARK)):
        inside = sorted(entry for entry in os.listdir(folder) if os.path.isfile(os.path.join(folder, entry, BENCHMARK)))
        hint = f", such as {os.path.join(folder, inside[0])}" if inside else ""
        raise CMEMSError(f"{folder} is no benchmark's folder, it has no {BENCHMARK}; name one that nnUNetv2_cmems benchmark wrote{hint}.")
    comparison = collect(folder)
    counted = {run.run for run in comparison.not_counted}
    names = [name for name in sorted(os.listdir(os.path.join(folder, RUNS))) if name not in counted]
    paths = [path for path in (os.path.join(folder, RUNS, name) for name in names) if os.path.isfile(os.path.join(path, RECORD))]
    runs = [Run(path, read_run(path)) for path in paths if is_finished(path)]
    runs = [run for run in runs if run.record.spec.method in comparison.methods]  # one may have ended just now
    place = {method: number for number, method in enumerate(comparison.methods)}
    order = sorted(runs, key=lambda run: (place[run.record.spec.method], run.record.spec.exemplar, run.record.spec.seed))
    return Benchmark(folder, comparison, order)


def dice_of(cases: pd.DataFrame, **wanted: Any) -> np.ndarray:
    """The finite Dice of the rows whose columns have the wanted values."""
    chosen = np.ones(len(cases), bool)
    for column, value in wanted.items():
        chosen &= (cases[column] == value).to_numpy()
    dice = cases.loc[chosen, "dice"].to_numpy(float)
    return dice[np.isfinite(dice)]


def cases_of(benchmark: Benchmark, run: Run) -> pd.DataFrame:
    """The rows of one run."""
    spec, cases = run.record.spec, benchmark.cases
    return cases[(cases["method"] == spec.method) & (cases["exemplar"] == spec.exemplar) & (cases["seed"] == spec.seed)]


def mean_per_case(cases: pd.DataFrame) -> pd.Series:
    """Case -> Dice, mean over the classes that have one; of one run's rows, or of several runs' with a row for each run and case."""
    per_case = cases.dropna(subset=["dice"]).groupby(["method", "exemplar", "seed", "case"], sort=False)["dice"].mean()
    return per_case.droplevel(["method", "exemplar", "seed"])


def mean_curve(runs: Sequence[Run], key: str) -> np.ndarray:
    """(runs, epochs) of a history's key; shorter ones end with NaN. Keys that end with ``/*`` are averaged over what follows."""
    curves = []
    for run in runs:
        if key.endswith("/*"):
            parts = [values for name, values in run.history.items() if name.startswith(key[:-1])]
            curves.append(_nanmean(_stack(parts), 0) if parts else np.empty(0))
        else:
            curves.append(run.history.get(key, np.empty(0)))
    return _stack(curves)


def histogram(run: Run, epoch: int = -1, part: str | None = None) -> dict[str, np.ndarray] | None:
    """``count``, ``confidence`` and ``right`` per bin of an epoch, and the bins' ``edges``.

    Args:
        run: a finished run.
        epoch: counted as in a list.
        part: None for all pixels, ``"foreground"`` for those that are predicted as foreground.
    """
    if run.reliability is None:
        return None
    found = run.reliability["epochs"][epoch]
    found = found.get(part) if part else found
    if not found or not sum(found["count"]):
        return None
    return {"edges": np.array(run.reliability["edges"], float), **{k: np.array(found[k], float) for k in ("count", "confidence", "right")}}


def pooled(runs: Sequence[Run], epoch: int = -1, part: str | None = None) -> dict[str, np.ndarray] | None:
    """The histograms of several runs as one; of those that share the first one's bins."""
    found = [h for run in runs if (h := histogram(run, epoch, part)) is not None]
    if not found:
        return None
    edges = found[0]["edges"]
    same = [h for h in found if np.array_equal(h["edges"], edges)]
    return {"edges": edges, **{key: np.sum([h[key] for h in same], axis=0) for key in ("count", "confidence", "right")}}


def calibration_error(bins: Mapping[str, np.ndarray]) -> float:
    """Expected calibration error of a histogram, see :meth:`~nnunetv2_cmems.trainers.hidden_labels.Reliability.calibration_error`."""
    return Reliability(bins["count"], bins["confidence"], bins["right"]).calibration_error()


def by_threshold(bins: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The possible thresholds (the bins' lower edges), and for each the share of pixels above it and how many of them are right."""
    count, right = (np.cumsum(bins[key][::-1])[::-1] for key in ("count", "right"))
    with np.errstate(invalid="ignore", divide="ignore"):
        return bins["edges"][:-1], count / count[0], np.where(count > 0, right / count, np.nan)


def read_json(path: str) -> dict[str, Any] | None:
    """A file's object; None where there is no file.

    Raises:
        CMEMSError: it cannot be read.
    """
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
        return content
    except (OSError, ValueError) as error:
        raise CMEMSError(f"{path} cannot be read ({first_line(error)}); delete the run's folder and run the benchmark again.") from error


def _grouped(runs: Iterable[Run], name: Callable[[Run], str]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(name(run), []).append(run)
    return found


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, (int, float))


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    array = np.array([math.nan if value is None else value for value in values], dtype=float)
    array[~np.isfinite(array)] = math.nan
    return array


def _stack(curves: Sequence[np.ndarray]) -> np.ndarray:
    length = max((len(curve) for curve in curves), default=0)
    stacked = np.full((len(curves), length), math.nan)
    for row, curve in zip(stacked, curves, strict=True):
        row[: len(curve)] = curve
    return stacked


def _nanmean(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean without NaN, NaN where there is nothing else; without numpy's warning."""
    known = np.isfinite(values)
    number = known.sum(axis)
    total = np.where(known, values, 0.0).sum(axis)
    return np.where(number > 0, total / np.maximum(number, 1), math.nan)
