"""The methods of a benchmark side by side: means, spread, cost, and a paired test against one of them.

:func:`write_tables` reads the ``metrics.csv`` of all finished runs of a benchmark folder and writes into its ``tables/``:

* ``cases.csv``: every run's metrics, with what the run is in front.
* ``methods.csv``: a row per method and class, and ``methods.json``: the same and all that is said about it.
* ``methods.md`` and ``methods.tex``: tables to read; the ``.tex`` needs the package ``booktabs``.
* ``tests.csv``: the paired tests.

What is what:

* A *method* is what runs call so; each variant of a study is a method of its own. Its *runs* differ in exemplar and seed.
* The score of one run and class is its mean over the cases that have one. ``mean`` among the classes is, for each case, the mean over
  its classes that have a score, and then the mean over cases.
* ``*_mean`` and ``*_std`` of a method: mean and standard deviation (n - 1) over its runs. This is the spread over exemplars and seeds,
  not over cases. ``*_std_exemplars``: standard deviation of the exemplars' means over their seeds; ``*_std_seeds``: the pooled standard
  deviation of the seeds of an exemplar; ``*_runs``: how many runs had a score.
* Volume errors are taken without their sign here; ``cases.csv`` has it.
* ``missed`` and ``hallucinated``: in how many cases only the reference, or only the prediction, shows the class (for ``mean``: all classes
  together), per run. These have a Dice of 0 but no HD95 and ASSD, see :mod:`nnunetv2_cmems.study.metrics`: a method that misses much may
  have small distances.
* Cost: wall time, GPU-hours and passes are means over runs; memory is that of the largest run.

The test is Wilcoxon's signed-rank test on the Dice (mean over classes), two-sided, against a baseline. Runs repeat the same cases, so they
are no samples of their own: each case's Dice is first averaged over the exemplars and seeds that *both* methods have, and then each case
is one pair. p is corrected over the methods by Holm's procedure. The effect is the median of the differences, method - baseline. Cases
count as independent; where several are scans of one patient, p is too small, and ``by_patient`` averages these first. The test
says nothing about other exemplars than those of the benchmark. Variants of the study ``exemplar`` have exemplars of their own and are
not tested. A method that needs no exemplar has runs of exemplar 1 alone and is compared with the others' runs of that one.
"""

from __future__ import annotations

import datetime
import difflib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import wilcoxon
from statsmodels.stats.multitest import multipletests

from nnunetv2_cmems.data.looks import patients_of
from nnunetv2_cmems.errors import CMEMSError, first_line
from nnunetv2_cmems.files import write_json, write_text
from nnunetv2_cmems.study.metrics import distance_unit, read_metrics
from nnunetv2_cmems.study.run import BENCHMARK, METRICS, RECORD, RUNS, RunRecord, RunSpec, fold_folder, is_finished, read_run
from nnunetv2_cmems.study.table import _cell as mean_and_spread

TABLES = "tables"
DEFAULT_BASELINE = "nnUNetTrainerCMEMS"
MEAN = "mean"
"""The row of all classes together."""

MEASURES = ("dice", "hd95_mm", "assd_mm", "volume_error_ml", "volume_error_percent", "missed", "hallucinated")
COSTS = {"wall_seconds": "mean", "gpu_hours": "mean", "peak_rss_bytes": "max", "peak_gpu_bytes": "max", "passes": "mean"}
"""Field of a run's record to how runs are put together."""

COST_CAPTION = "Wall time, GPU-hours and network passes: mean per run; memory: of the largest run."

MINIMUM_PAIRS = 6
"""With fewer cases that differ, the two-sided signed-rank test cannot give a p below 0.05."""

_RUN = ["method", "trainer", "study", "value", "exemplar", "seed"]
_KEY = ["method", "exemplar", "seed"]
_GRID = ["dataset", "configuration", "fold"]
"""What must be the same for runs to be compared."""

_OWN_EXEMPLARS = "exemplar"
"""The study whose exemplars are numbered on their own: those of the same number are other ones."""

_COUNTED = ["missed", "hallucinated"]
_SPREAD = ["mean", "std", "std_exemplars", "std_seeds", "runs"]
_TESTS = [
    "method", "baseline", "paired_by", "pairs", "better", "worse", "common_runs", "median_difference", "statistic", "p", "p_holm", "note",
]  # fmt: skip

_GLANCE, _COST = "All classes", "Cost"
_LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        **{character: f"${character}$" for character in "<>|"},
        "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
    }
)  # fmt: skip


@dataclass(frozen=True)
class NotCounted:
    """A run that is in no table.

    Attributes:
        run: name of its folder.
        state: ``failed``, ``unfinished``, ``unreadable`` or ``not measured``.
        reason: one sentence.
    """

    run: str
    state: str
    reason: str


@dataclass(frozen=True)
class Comparison:
    """All runs of a benchmark.

    Attributes:
        benchmark: the content of ``benchmark.json``.
        unit: of the distances, ``mm`` or ``pixels``.
        methods: the methods that have finished runs, in the tables' order.
        labels: the classes or regions.
        cases: ``cases.csv``: a row per run, case and class.
        runs: a row per finished run: what it is, and its cost (:data:`COSTS`).
        not_counted: the other runs.
        without_runs: trainers of the benchmark that have no finished run at all.
    """

    benchmark: Mapping[str, Any]
    unit: str
    methods: tuple[str, ...]
    labels: tuple[str, ...]
    cases: pd.DataFrame
    runs: pd.DataFrame
    not_counted: tuple[NotCounted, ...]
    without_runs: tuple[str, ...]


def write_tables(benchmark_folder: str, baseline: str | None = None, *, by_patient: bool | None = None) -> str:
    """Compare all finished runs and write the tables, see the module's docstring.

    Args:
        benchmark_folder: holds ``benchmark.json`` and ``runs``.
        baseline: method (or trainer) that the others are tested against, see :func:`find_baseline`.
        by_patient: average the scans of a patient before the test; scans belong to one patient when their names agree up to
            and including the first number. None: as ``benchmark.json`` has it, else not.

    Returns:
        The tables as Markdown.

    Raises:
        CMEMSError: see :func:`collect`; the baseline has no finished run.
    """
    return write_comparison(collect(benchmark_folder), benchmark_folder, baseline, by_patient=by_patient)


def write_comparison(comparison: Comparison, benchmark_folder: str, baseline: str | None = None, *, by_patient: bool | None = None) -> str:
    """As :func:`write_tables`, of runs that have been read."""
    against = find_baseline(comparison, baseline)
    methods = summarise(comparison)
    tests = paired_tests(comparison, against, by_patient=by_patient)
    notes, missing = captions(comparison, tests), remarks(comparison, tests)
    shown = readable_tables(comparison, methods, tests)
    markdown = _markdown(shown, [*notes, *missing])
    folder = os.path.join(benchmark_folder, TABLES)
    write_text(os.path.join(folder, "cases.csv"), comparison.cases.to_csv(index=False))
    write_text(os.path.join(folder, "methods.csv"), methods.to_csv(index=False))
    write_text(os.path.join(folder, "tests.csv"), tests.to_csv(index=False))
    write_json(os.path.join(folder, "methods.json"), _as_json(comparison, methods, tests, against))
    write_text(os.path.join(folder, "methods.md"), markdown)
    write_text(os.path.join(folder, "methods.tex"), _latex(shown, notes, missing))
    return markdown


def collect(benchmark_folder: str) -> Comparison:
    """Read all runs of a benchmark.

    Raises:
        CMEMSError: ``benchmark.json`` or a ``metrics.csv`` cannot be read; a run is of another data set, configuration or fold; one method
            name stands for two trainings, or the runs were measured on different cases or classes; no run is finished.
    """
    benchmark = _read_benchmark(benchmark_folder)
    finished: dict[str, RunRecord] = {}
    not_counted = []
    root = os.path.join(benchmark_folder, RUNS)
    for name in sorted(os.listdir(root)) if os.path.isdir(root) else []:
        folder = os.path.join(root, name)
        if not os.path.isdir(folder):
            continue
        record, reason = _state(folder)
        if record is not None:
            _must_belong(folder, record.spec, benchmark)
        if reason is not None:
            not_counted.append(reason)
        elif record is not None:
            finished[folder] = record
    if not finished:
        states = "; ".join(f"{run.run}: {run.reason}" for run in not_counted) or "there are no runs"
        raise CMEMSError(f"no run of {benchmark_folder} is finished and measured, so there is nothing to compare ({states}).")
    _must_be_distinct(finished)
    tables = {folder: read_metrics(os.path.join(folder, METRICS)) for folder in finished}
    _must_agree(tables)
    specs = [record.spec for record in finished.values()]
    methods = method_order(benchmark, specs)
    order = sorted(finished, key=lambda folder: _place(finished[folder].spec, methods))
    cases = [tables[folder].assign(**_what_it_is(finished[folder].spec)) for folder in order]
    runs = [{**_what_it_is(finished[f].spec), **{cost: getattr(finished[f], cost) for cost in COSTS}} for f in order]
    labels = tuple(dict.fromkeys(tables[order[0]]["label"]))
    if MEAN in labels:
        raise CMEMSError(f"a class of {benchmark['dataset']} is called '{MEAN}', as are all classes together; rename it in dataset.json.")
    scores = [column for column in cases[0] if column not in _RUN]
    return Comparison(
        benchmark=benchmark,
        unit=_unit(order[0]),
        methods=tuple(methods),
        labels=labels,
        cases=pd.concat(cases, ignore_index=True)[[*_RUN, *scores]],
        runs=pd.DataFrame(runs).astype(dict.fromkeys(COSTS, float)),
        not_counted=tuple(not_counted),
        without_runs=tuple(trainer for trainer in benchmark.get("trainers", ()) if trainer not in {spec.trainer for spec in specs}),
    )


def method_order(benchmark: Mapping[str, Any], specs: Sequence[RunSpec]) -> list[str]:
    """The methods in the tables' order: the benchmark's trainers, then the variants of its studies, as it lists them or by their values.

    Args:
        benchmark: the content of ``benchmark.json``.
        specs: the runs.
    """
    trainers = list(benchmark.get("trainers") or ())
    entries: list[dict[str, Any]] = [{"name": study} if isinstance(study, str) else study for study in benchmark.get("studies") or ()]
    studies = [study["name"] for study in entries]
    listed = [variant["method"] for study in entries for variant in study.get("variants", ())]

    def rank(spec: RunSpec) -> tuple[Any, ...]:
        number = _number(spec.value)
        return (
            spec.study is not None,
            studies.index(spec.study) if spec.study in studies else len(studies),
            spec.study or "",
            listed.index(spec.method) if spec.method in listed else len(listed),
            trainers.index(spec.trainer) if spec.trainer in trainers else len(trainers),
            (number is None, number or 0.0, str(spec.value)),
            spec.method,
        )

    return list(dict.fromkeys(spec.method for spec in sorted(specs, key=rank)))


def find_baseline(comparison: Comparison, name: str | None = None) -> str:
    """The method that the others are tested against.

    Args:
        comparison: all runs.
        name: a method or a trainer; None: as ``benchmark.json`` has it, else that of :data:`DEFAULT_BASELINE`, else the first.

    Raises:
        CMEMSError: there is none of this name among the finished runs.
    """
    plain = comparison.runs[comparison.runs["study"].isna()]
    of_trainer = {trainer: method for method, trainer in zip(plain["method"][::-1], plain["trainer"][::-1])}
    if name is None:
        recorded = comparison.benchmark.get("baseline")
        return str(recorded if recorded in comparison.methods else of_trainer.get(DEFAULT_BASELINE, comparison.methods[0]))
    if name in comparison.methods:
        return name
    if name in of_trainer:
        return str(of_trainer[name])
    known = [*comparison.methods, *of_trainer]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(comparison.methods)}."
    raise CMEMSError(f"the baseline '{name}' has no finished run in this benchmark; {hint}")


def run_scores(comparison: Comparison) -> pd.DataFrame:
    """A row per run and class (:data:`MEAN` first): what the run is, ``cases``, and its :data:`MEASURES`, means over its cases.

    ``missed`` and ``hallucinated`` are numbers of cases.
    """
    groups = _with_mean(comparison).groupby([*_KEY, "label"], sort=False)
    scores = groups[list(MEASURES)].mean().assign(**{name: groups[name].sum() for name in _COUNTED}, cases=groups["case"].nunique())
    every = [(*key, label) for key in comparison.runs[_KEY].itertuples(index=False) for label in (MEAN, *comparison.labels)]
    return comparison.runs[_RUN].merge(scores.loc[every].reset_index(), on=_KEY)


def summarise(comparison: Comparison) -> pd.DataFrame:
    """``methods.csv``: a row per method and class (:data:`MEAN` first), see the module's docstring for its columns."""
    scores = run_scores(comparison)
    rows = []
    for method in comparison.methods:
        runs = comparison.runs[comparison.runs["method"] == method]
        what = {column: runs[column].iloc[0] for column in ("method", "trainer", "study", "value")}
        numbers = {"runs": len(runs), "exemplars": runs["exemplar"].nunique(), "seeds": runs["seed"].nunique()}
        cost = {f"{name}_{how}": float(runs[name].agg(how)) for name, how in COSTS.items()}
        for label in (MEAN, *comparison.labels):
            found = scores[(scores["method"] == method) & (scores["label"] == label)]
            spread = {f"{measure}_{name}": value for measure in MEASURES for name, value in _spread(found, measure).items()}
            rows.append({**what, "label": label, **numbers, "cases": int(found["cases"].max()), **spread, **cost})
    return pd.DataFrame(rows)


def paired_tests(comparison: Comparison, baseline: str, *, by_patient: bool | None = None) -> pd.DataFrame:
    """``tests.csv``: a row per other method, see the module's docstring.

    Columns: ``paired_by`` (case or patient), ``pairs`` (number), ``better`` and ``worse`` (pairs in which the method's Dice is higher or
    lower), ``common_runs`` (pairs of exemplar and seed that both methods have), ``median_difference`` (of the Dice, method - baseline),
    ``statistic``, ``p``, ``p_holm``, and a ``note`` where there is no p.
    """
    if by_patient is None:
        by_patient = bool(comparison.benchmark.get("by_patient", False))
    dice = _with_mean(comparison)
    units = patients_of(dice["case"].unique()) if by_patient else {case: case for case in dice["case"].unique()}
    dice = dice[dice["label"] == MEAN].assign(unit=lambda table: table["case"].map(units))
    rows = []
    for method in comparison.methods:
        if method == baseline:
            continue
        pair = [dice[dice["method"] == name].set_index(["exemplar", "seed"]) for name in (method, baseline)]
        own_exemplars = {_OWN_EXEMPLARS} & set(comparison.runs.loc[comparison.runs["method"].isin([method, baseline]), "study"])
        common = pair[0].index.unique().intersection(pair[1].index.unique()) if not own_exemplars else pair[0].index[:0]
        means = [table[table.index.isin(common)].groupby("unit")["dice"].mean() for table in pair]
        # Rounded, so that equal scores differ by 0 and not by what a mean rounds them to.
        differences = (means[0] - means[1]).dropna().round(9).to_numpy()
        row = {"method": method, "baseline": baseline, "paired_by": "patient" if by_patient else "case", "common_runs": len(common)}
        rows.append({**row, **_signed_rank(differences, len(common))})
    tests = pd.DataFrame(rows, columns=_TESTS)
    tested = tests["p"].notna()
    if tested.any():
        tests.loc[tested, "p_holm"] = multipletests(tests.loc[tested, "p"].to_numpy(float), method="holm")[1]
    return tests


def captions(comparison: Comparison, tests: pd.DataFrame) -> list[str]:
    """What a reader of the tables must know, a sentence or a few each."""
    cases = comparison.cases["case"].unique()
    found = [
        f"Mean over {len(cases)} cases, then mean ± standard deviation over the runs of a method (exemplars and seeds); no ± where "
        "there is one run. 'mean': over the classes of each case. Volume errors without their sign. 'Missed' and 'hallucinated': how "
        "often, per run, only the reference or only the prediction shows a class; such a case has a Dice of 0 and is left out of HD95 "
        "and ASSD.",
        COST_CAPTION,
    ]
    if comparison.unit != "mm":
        found.append(f"These images have no spacing: distances are in {comparison.unit}, and 1000 pixels count as 1 ml.")
    if len(tests):
        by = tests["paired_by"].iloc[0]
        found.append(
            f"Difference: median over the {by}s of the Dice minus that of {tests['baseline'].iloc[0]}, each {by} averaged over the "
            "exemplars and seeds that both methods have; p: Wilcoxon's signed-rank test of these differences, two-sided, corrected over "
            "the methods (Holm)."
        )
        patients = set(patients_of(cases).values())
        if by == "case" and 1 < len(patients) < len(cases):
            found.append(
                f"By their names the {len(cases)} cases are of {len(patients)} patients; the test takes cases as independent, so p is too "
                "small where that is so."
            )
    return found


def remarks(comparison: Comparison, tests: pd.DataFrame) -> list[str]:
    """What is missing from the tables: methods that could not be tested, trainers without runs, runs that are not counted."""
    notes = tests[tests["note"] != ""].groupby(["note", "baseline"], sort=False)["method"].agg(", ".join)
    found = [f"{methods} against {baseline}: {note}." for (note, baseline), methods in notes.items()]
    if comparison.without_runs:
        found.append(f"Without a finished run: {', '.join(comparison.without_runs)}.")
    if comparison.not_counted:
        listed = "; ".join(f"{run.run} ({run.state}: {run.reason})" for run in comparison.not_counted)
        found.append(f"Runs that are not counted: {listed}.")
    return found


def readable_tables(comparison: Comparison, methods: pd.DataFrame, tests: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Title to a table of texts: all methods at a glance, each measure per class, and cost.

    Args:
        comparison: all runs.
        methods: of :func:`summarise`.
        tests: of :func:`paired_tests`.
    """
    names = {
        "dice": "Dice (%)", "hd95_mm": f"HD95 ({comparison.unit})", "assd_mm": f"ASSD ({comparison.unit})",
        "volume_error_ml": "Volume error (ml)", "volume_error_percent": "Volume error (%)",
        "missed": "Missed", "hallucinated": "Hallucinated",
    }  # fmt: skip
    together = methods[methods["label"] == MEAN].set_index("method")
    cells = {names[measure]: _cells(comparison, measure) for measure in MEASURES}
    glance = together[["runs", "exemplars", "seeds"]].astype(str)
    glance = glance.assign(**{name: table.iloc[:, 0] for name, table in cells.items() if name != names["volume_error_percent"]})
    if len(tests):
        tested = tests.set_index("method")
        glance["difference (points)"] = (100 * tested["median_difference"]).map(lambda value: _text(value, "+.1f"))
        glance["p"] = tested["p_holm"].map(_p_text)
        glance.loc[tests["baseline"].iloc[0], ["difference (points)", "p"]] = "baseline", ""
    cost = {
        "wall time (h:min:s)": together["wall_seconds_mean"].map(lambda value: str(datetime.timedelta(seconds=round(value)))),
        "GPU-hours": together["gpu_hours_mean"].map(lambda value: _text(value, ".2f")),
        "memory (GB)": (together["peak_rss_bytes_max"].replace(0, math.nan) / 1e9).map(lambda value: _text(value, ".1f")),
        "GPU memory (GB)": (together["peak_gpu_bytes_max"] / 1e9).map(lambda value: _text(value, ".1f")),
        "network passes": together["passes_mean"].map(lambda value: _text(value, ",.0f")),
    }
    found = {_GLANCE: glance}
    if len(comparison.labels) > 1:
        never = {names[measure] for measure in _COUNTED if not together[f"{measure}_mean"].any()}
        found |= {f"{name}, per class": table for name, table in cells.items() if name not in never}
    found[_COST] = pd.DataFrame(cost)
    return {title: table.rename_axis("method").reset_index() for title, table in found.items()}


def _cells(comparison: Comparison, measure: str) -> pd.DataFrame:
    """A table of texts, methods by classes (all together first): mean and spread over the runs."""
    scores = run_scores(comparison).dropna(subset=[measure])
    values = scores[measure] * (100 if measure == "dice" else 1)
    texts = values.groupby([scores["method"], scores["label"]]).agg(lambda group: mean_and_spread(group.tolist())).unstack()
    texts = texts.reindex(index=list(comparison.methods), columns=[MEAN, *comparison.labels]).fillna("-")
    return texts.rename(columns={MEAN: "all"}) if measure in _COUNTED else texts


def _with_mean(comparison: Comparison) -> pd.DataFrame:
    """:data:`MEASURES` per run, case and class, with rows for :data:`MEAN`."""
    cases = comparison.cases
    shown, predicted = cases["reference_volume_ml"] > 0, cases["volume_ml"] > 0
    errors = {name: cases[name].abs() for name in ("volume_error_ml", "volume_error_percent")}
    cases = cases.assign(**errors, missed=shown & ~predicted, hallucinated=predicted & ~shown)
    cases = cases[[*_KEY, "case", "label", *MEASURES]].astype(dict.fromkeys(_COUNTED, float))
    groups = cases.groupby([*_KEY, "case"], sort=False)
    means = groups[list(MEASURES)].mean().assign(**{name: groups[name].sum() for name in _COUNTED}, label=MEAN)
    return pd.concat([means.reset_index(), cases], ignore_index=True)


def _spread(runs: pd.DataFrame, measure: str) -> dict[str, float]:
    """Mean and standard deviations over the runs of a method, and how many of them have a score."""
    runs = runs.dropna(subset=[measure])
    values, exemplars = runs[measure], runs.groupby("exemplar")[measure]
    repeats = len(values) - len(exemplars)
    within = float(((values - exemplars.transform("mean")) ** 2).sum())
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "std_exemplars": float(exemplars.mean().std()),
        "std_seeds": math.sqrt(within / repeats) if repeats else math.nan,
        "runs": len(values),
    }


def _signed_rank(differences: np.ndarray, common_runs: int) -> dict[str, Any]:
    """The test of the differences of pairs; pairs that do not differ say nothing and are left out of it."""
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    found: dict[str, Any] = {"pairs": len(differences), "better": better, "worse": worse, "statistic": math.nan, "p": math.nan}
    found |= {"median_difference": float(np.median(differences)) if len(differences) else math.nan, "p_holm": math.nan, "note": ""}
    if not common_runs:
        return found | {"note": "no run of the same exemplar and seed, so there is nothing to test"}
    if better + worse < MINIMUM_PAIRS:
        how_many = f"only {better + worse} of {len(differences)} pairs differ" if better + worse else "no pair differs"
        return found | {"note": f"{how_many}, and the test needs {MINIMUM_PAIRS}"}
    test = wilcoxon(differences[differences != 0])
    return found | {"statistic": float(test.statistic), "p": float(test.pvalue)}


def _read_benchmark(folder: str) -> dict[str, Any]:
    path = os.path.join(folder, BENCHMARK)
    try:
        with open(path, encoding="utf-8") as file:
            content: dict[str, Any] = json.load(file)
        missing = [key for key in _GRID if key not in content]
        if missing:
            raise ValueError(f"it lacks '{missing[0]}'")
    except (OSError, ValueError, TypeError) as error:
        raise CMEMSError(f"{path} cannot be read ({first_line(error)}); name a folder that the benchmark has written.") from error
    return content


def _state(folder: str) -> tuple[RunRecord | None, NotCounted | None]:
    """A run's record, and why it is not counted, if so."""
    name = os.path.basename(folder)
    if not os.path.isfile(os.path.join(folder, RECORD)):
        return None, NotCounted(name, "unfinished", f"there is no {RECORD}")
    try:
        record = read_run(folder)
    except CMEMSError as error:
        return None, NotCounted(name, "unreadable", str(error).rstrip("."))
    if record.state == "failed":
        return record, NotCounted(name, "failed", (record.error or "no reason given").rstrip("."))
    if record.state != "finished":
        return record, NotCounted(name, "unfinished", "it is still running, or was killed half-way")
    if not is_finished(folder):
        return record, NotCounted(name, "unfinished", "its validation was not run to the end")
    if not os.path.isfile(os.path.join(folder, METRICS)):
        return record, NotCounted(name, "not measured", f"there is no {METRICS}; repeat the benchmark")
    return record, None


def _must_belong(folder: str, spec: RunSpec, benchmark: Mapping[str, Any]) -> None:
    found, expected = [str(getattr(spec, key)) for key in _GRID], [str(benchmark[key]) for key in _GRID]
    if found != expected:
        raise CMEMSError(
            f"{folder} is a training of {_grid_text(found)}, but {BENCHMARK} of this folder is of {_grid_text(expected)}; two benchmarks "
            "are mixed here and cannot be compared: move the run away, or give each benchmark a folder of its own with -o."
        )


def _must_be_distinct(finished: Mapping[str, RunRecord]) -> None:
    """A method is one training; of each exemplar and seed it has one run."""
    trained: dict[str, tuple[str, tuple[Any, ...]]] = {}
    seen: dict[tuple[str, int, int], str] = {}
    for folder, record in finished.items():
        spec = record.spec
        what = (spec.trainer, spec.plans, spec.study, spec.value)
        other, same = trained.setdefault(spec.method, (folder, what))
        if same != what:
            raise CMEMSError(f"{other} and {folder} are different trainings, but both are called '{spec.method}'; move one of them away.")
        twin = seen.setdefault((spec.method, spec.exemplar, spec.seed), folder)
        if twin != folder:
            raise CMEMSError(
                f"{twin} and {folder} are both '{spec.method}' with exemplar {spec.exemplar} and seed {spec.seed}; move one of them away."
            )


def _must_agree(tables: Mapping[str, pd.DataFrame]) -> None:
    """All runs were measured on the same cases and classes, each once."""
    first, expected = "", None
    for folder, table in tables.items():
        rows = sorted(zip(table["case"], table["label"]))
        path = os.path.join(folder, METRICS)
        if len(set(rows)) < len(rows):
            raise CMEMSError(f"{path} has a case and class twice; delete it and repeat the benchmark.")
        if expected is None:
            first, expected = path, rows
        if rows != expected:
            case, label = min(set(rows) ^ set(expected))
            raise CMEMSError(
                f"{first} and {path} are of different cases or classes (only one of them has '{label}' of {case}) and cannot be compared; "
                "delete the outdated run's folder and repeat the benchmark."
            )


def _unit(folder: str) -> str:
    """Of the distances, from the ``dataset.json`` that nnU-Net keeps with the training."""
    path = os.path.join(os.path.dirname(fold_folder(folder)), "dataset.json")
    if not os.path.isfile(path):
        return "mm"
    with open(path, encoding="utf-8") as file:
        return distance_unit(json.load(file))


def _place(spec: RunSpec, methods: Sequence[str]) -> tuple[int, int, int]:
    return methods.index(spec.method), spec.exemplar, spec.seed


def _what_it_is(spec: RunSpec) -> dict[str, Any]:
    return {column: getattr(spec, column) for column in _RUN}


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _grid_text(parts: Sequence[str]) -> str:
    return f"{parts[0]}, configuration {parts[1]}, fold {parts[2]}"


def _text(value: float, form: str) -> str:
    return "-" if pd.isna(value) else format(value, form)


def _p_text(p: float) -> str:
    return "<0.001" if p < 0.001 else _text(p, ".3f")


def _as_json(comparison: Comparison, methods: pd.DataFrame, tests: pd.DataFrame, baseline: str) -> dict[str, Any]:
    """``methods.json``; a value that is not there is null."""
    tested = {row["method"]: row for row in _records(tests)}
    entries: dict[str, dict[str, Any]] = {}
    for row in _records(methods):
        what = {key: row[key] for key in ("method", "trainer", "study", "value", "runs", "exemplars", "seeds", "cases")}
        cost = {key: row[key] for key in (f"{name}_{how}" for name, how in COSTS.items())}
        entry = entries.setdefault(row["method"], {**what, "cost": cost, "test": tested.get(row["method"]), "classes": {}})
        entry["classes"][row["label"]] = {measure: {name: row[f"{measure}_{name}"] for name in _SPREAD} for measure in MEASURES}
    return {
        **{key: comparison.benchmark.get(key) for key in (*_GRID, "plans")},
        "baseline": baseline,
        "unit": comparison.unit,
        "classes": [MEAN, *comparison.labels],
        "methods": list(entries.values()),
        "captions": captions(comparison, tests),
        "remarks": remarks(comparison, tests),
        "not_counted": [asdict(run) for run in comparison.not_counted],
        "without_runs": list(comparison.without_runs),
    }


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(table.to_json(orient="records", double_precision=15))
    return found


def _markdown(tables: Mapping[str, pd.DataFrame], notes: Sequence[str]) -> str:
    parts = []
    for title, table in tables.items():
        safe = table.rename(columns=_bars).map(_bars)
        align = ["left"] + ["right"] * (table.shape[1] - 1)
        parts += [f"### {title}", safe.to_markdown(index=False, tablefmt="pipe", disable_numparse=True, colalign=align)]
    return "\n\n".join([*parts, *notes]) + "\n"


def _bars(text: str) -> str:
    return text.replace("|", r"\|")


def _latex(tables: Mapping[str, pd.DataFrame], notes: Sequence[str], remarks: Sequence[str]) -> str:
    """All tables, the notes in the first one's caption (that on the cost in the last one's), the remarks as comments."""
    parts = [f"% {' '.join(remark.split())}" for remark in remarks]
    captions = {title: f"{title}." for title in tables}
    captions[_GLANCE] = " ".join([f"{_GLANCE}.", *(note for note in notes if note != COST_CAPTION)])
    captions[_COST] = f"{_COST}. {COST_CAPTION}"
    for title, table in tables.items():
        style = table.rename(columns=_latex_text).map(_latex_text).style.hide(axis="index")
        columns = "l" + "r" * (table.shape[1] - 1)
        parts.append(style.to_latex(hrules=True, caption=_latex_text(captions[title]), column_format=columns, position="htbp"))
    return "\n".join(parts)


def _latex_text(text: str) -> str:
    return text.translate(_LATEX)
