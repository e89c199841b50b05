"""A benchmark as one page: tables, figures, a gallery, and all that is needed to repeat it, in one HTML file that needs nothing else."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from scipy.stats import spearmanr

import nnunetv2_cmems
from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.files import write_text
from nnunetv2_cmems.study import comparison as tables
from nnunetv2_cmems.study import report_figures as draw
from nnunetv2_cmems.study.gallery import MOST_SLICES, heat_gradient, make_gallery, picture_file
from nnunetv2_cmems.study.report_figures import Line, Panel
from nnunetv2_cmems.study.report_runs import (
    Benchmark,
    Run,
    StudyRuns,
    by_threshold,
    calibration_error,
    cases_of,
    dice_of,
    mean_curve,
    mean_per_case,
    pooled,
    read_benchmark,
    read_json,
)  # fmt: skip
from nnunetv2_cmems.study.run import CONFIG, RUNS

MOST_EXEMPLARS = 6
"""Pictures of exemplars that a page shows at most."""

_MOST_BANDS = 4  # lines with a band around each that can still be told apart


@dataclass(frozen=True)
class Table:
    """A table of texts: its heading, the heads of its columns, and its rows, each beginning with its own head."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Panels:
    """Figures with a common legend."""

    panels: Sequence[Panel]
    legend: Sequence[tuple[Markup, str]]


@dataclass(frozen=True)
class Study:
    """A study, its figures, what has to be said about them, and a table."""

    of: StudyRuns
    panels: Sequence[Panel]
    sentences: Sequence[str] = ()
    table: Table | None = None


def write_report(folder: str, output: str | None = None, baseline: str | None = None) -> str:
    """Write the page of a benchmark, and its tables anew.

    Args:
        folder: the benchmark's.
        output: the HTML file; None: ``report.html`` in the folder.
        baseline: method that the others are tested against, see :func:`nnunetv2_cmems.study.comparison.write_tables`.

    Returns:
        The path of the page.

    Raises:
        CMEMSError: it is no benchmark's folder, no run has finished, a file of a run cannot be read, or the page cannot be written.
    """
    benchmark = read_benchmark(folder)
    tables.write_comparison(benchmark.comparison, folder, baseline)
    path = os.path.abspath(output or os.path.join(folder, "report.html"))
    if os.path.isdir(path):
        raise CMEMSError(f"{path} is a folder; give -o the name of a file.")
    write_text(path, render(benchmark, baseline))
    return path


def render(benchmark: Benchmark, baseline: str | None = None) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("nnunetv2_cmems.study", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    compared = benchmark.comparison
    methods = tables.summarise(compared)
    tests = tables.paired_tests(compared, tables.find_baseline(compared, baseline))
    readable = tables.readable_tables(compared, methods, tests)
    glance, *others = [_table(title, table[table["method"].isin(list(benchmark.methods))]) for title, table in readable.items()]
    variants = [_table(title, table[~table["method"].isin(list(benchmark.methods))]) for title, table in readable.items()]
    main = benchmark.main
    styles = {method: number for number, method in enumerate([main, *(method for method in benchmark.methods if method != main)])}
    context = {
        "dataset": benchmark.dataset,
        "facts": _facts(benchmark),
        "glance": glance,
        "others": others,
        "variants": [table for table in variants if table.rows],
        "notes": [note for note in tables.captions(compared, tests) if not note.startswith("Runs that are not counted")],
        "boxes": _boxes(benchmark),
        "curves": _by_method(benchmark, styles, _CURVES),
        "per_method": _per_method(benchmark),
        "without_curves": [method for method, runs in benchmark.methods.items() if not any(run.history for run in runs)],
        "pseudo_labels": _by_method(benchmark, styles, _PSEUDO_LABELS),
        "thresholds": _thresholds(benchmark),
        "reliability": _reliability(benchmark.methods),
        "studies": [_study(benchmark, study) for study in benchmark.studies],
        "gallery": make_gallery(benchmark),
        "most_slices": MOST_SLICES,
        "heat": Markup(heat_gradient()),
        "exemplars": _exemplars(benchmark),
        "num_exemplars": len({run.record.spec.exemplar for run in benchmark.finished}),
        "configs": _configs(benchmark),
        "versions": _versions(benchmark),
        "commands": [str(line) for line in benchmark.grid.get("commands") or []],
        "run_commands": [(run.key, f"nnUNet_cmems_config={RUNS}/{run.key}/{CONFIG} {run.record.command}") for run in benchmark.finished],
        "runs": _runs(benchmark),
        "not_counted": compared.not_counted,
        "main": main,
        "version": nnunetv2_cmems.__version__,
        "written": datetime.datetime.now().strftime("%d %B %Y, %H:%M").lstrip("0"),
    }
    return environment.get_template("report.html").render(context).lstrip()


# ------------------------------------------------------------------ tables and facts


_LAST = ("runs", "exemplars", "seeds")  # columns; a narrow screen shows the first ones without scrolling


def _table(title: str, table: pd.DataFrame) -> Table:
    """With true dashes and minus signs."""
    table = table[[*(column for column in table if column not in _LAST), *(column for column in table if column in _LAST)]]
    rows = [[_typeset(str(cell)) for cell in row] for row in table.to_numpy().tolist()]
    return Table(title, [str(column) for column in table.columns], rows)


def _typeset(text: str) -> str:
    if text == "-":
        return "–"
    return text.replace("-", "−", 1) if text.startswith("-") and text[1:2].isdigit() else text


def _facts(benchmark: Benchmark) -> list[tuple[str, str]]:
    """What all runs have in common, as far as ``benchmark.json`` tells."""
    grid, spec = benchmark.grid, benchmark.finished[0].record.spec
    counted, others = len(benchmark.finished), len(benchmark.comparison.not_counted)
    found = [
        ("configuration", f"{spec.configuration}, {spec.plans}, fold {spec.fold}"),
        ("classes", ", ".join(benchmark.comparison.labels)),
        ("validation", f"{benchmark.cases['case'].nunique()} cases"),
        ("runs", f"{counted} counted" + (f", {others} not" if others else "")),
        ("methods", str(len(benchmark.methods))),
    ]
    if benchmark.studies:
        found.append(("studies", ", ".join(study.name for study in benchmark.studies)))
    if grid.get("exemplars"):
        found.append(("exemplars", str(len(grid["exemplars"]))))
    if grid.get("seeds"):
        found.append(("seeds", ", ".join(str(seed) for seed in grid["seeds"])))
    if grid.get("epochs") and grid.get("iterations"):
        compute = {"passes": ", the same network passes for all", "steps": ", the same steps for all"}.get(str(grid.get("same")), "")
        found.append(("training", f"{grid['epochs']} epochs of {grid['iterations']} steps{compute}"))
    found.append(("device", ", ".join(dict.fromkeys(run.record.spec.device for run in benchmark.finished))))
    return found


def _versions(benchmark: Benchmark) -> list[tuple[str, str]]:
    """Package -> its version, or all versions where the runs differ."""
    found: dict[str, list[str]] = {}
    for versions in (run.record.versions for run in benchmark.finished):
        for name, version in versions.items():
            if version not in found.setdefault(name, []):
                found[name].append(version)
    return [(name, "; ".join(versions)) for name, versions in found.items()]


def _runs(benchmark: Benchmark) -> Table:
    """The runs that count, one a row."""
    rows = []
    for run in benchmark.finished:
        spec = run.record.spec
        dice = mean_per_case(cases_of(benchmark, run))
        score = f"{100 * dice.mean():.1f}" if len(dice) else "–"
        rows.append([spec.method, str(spec.exemplar), str(spec.seed), score, f"{run.record.wall_seconds / 60:.1f}"])
    return Table("Runs", ["method", "exemplar", "seed", "Dice (%)", "wall time (min)"], rows)


def _configs(benchmark: Benchmark) -> list[tuple[str, str, str]]:
    """Method, the run that is shown, and its configuration as JSON; of the trainers that write one."""
    found = []
    shown = [runs[0] for runs in benchmark.methods.values()]
    for study in benchmark.studies:
        if study.name != "exemplar":  # hundreds that differ in nothing but the slice
            shown += [runs[0] for runs in study.variants.values() if runs[0] not in shown]
    for run in shown:
        content = read_json(os.path.join(run.fold, "cmems_config.json"))
        if content is not None:
            if len(content.get("unlabelled", ())) > 8:
                content["unlabelled"] = [*content["unlabelled"][:4], f"... {len(content['unlabelled'])} cases"]
            found.append((run.record.spec.method, run.key, json.dumps(content, indent=2)))
    return found


def _exemplars(benchmark: Benchmark) -> list[tuple[str, str]]:
    """What was drawn before the first step, as (caption, data URI): of each exemplar once, of the main method where it has one."""
    found: dict[int, tuple[str, str]] = {}
    own = benchmark.methods[benchmark.main]
    for run in [*own, *(run for run in benchmark.finished if run not in own)]:
        spec = run.record.spec
        path = os.path.join(run.fold, "exemplar.png")
        if spec.study == "exemplar" or spec.exemplar in found or len(found) == MOST_EXEMPLARS or not os.path.isfile(path):
            continue
        config = read_json(os.path.join(run.fold, "cmems_config.json")) or {}
        places = [str(e.get("case")) + (f", slice {e['slice']}" if e.get("slice") is not None else "") for e in config.get("exemplars", [])]
        found[spec.exemplar] = (f"Exemplar {spec.exemplar}" + (f": {'; '.join(places)}" if places else ""), picture_file(path))
    return [found[number] for number in sorted(found)]


# ------------------------------------------------------------------ figures


_CURVES = (
    ("Online validation", "pseudo Dice", "mean_fg_dice"),
    ("Agreement of the members", "Dice", "agreement/mean"),
)
_PSEUDO_LABELS = (
    ("Coverage, all pixels", "pixels above τ", "coverage/*"),
    ("Coverage, predicted foreground", "pixels above τ", "coverage_foreground/*"),
    ("Accuracy above τ", "right pixels", "pseudo_label_accuracy"),
    ("Dice above τ", "Dice", "pseudo_label_dice/mean"),
    ("Calibration error (ECE)", "ECE", "pseudo_label_ece"),
)


_PARTS = ((None, "all pixels"), ("foreground", "predicted foreground"))

_PARTLY = ("pseudo_label_accuracy", "pseudo_label_ece")  # nearly all pixels are background, so these hardly move


def _boxes(benchmark: Benchmark) -> list[Panel]:
    """A panel for all classes together and one for each class."""
    cases = benchmark.cases[benchmark.cases["method"].isin(list(benchmark.methods))]
    labels = benchmark.comparison.labels
    main = benchmark.main
    panels = []
    if len(labels) > 1:
        means = {method: mean_per_case(cases[cases["method"] == method]).to_numpy(float) for method in benchmark.methods}
        panels.append(Panel("Mean over the classes", draw.box_plots(means, "the mean over the classes", main)))
    for label in labels:
        values = {method: dice_of(cases, method=method, label=label) for method in benchmark.methods}
        panels.append(Panel(label, draw.box_plots(values, label, main)))
    return panels


def _by_method(benchmark: Benchmark, styles: Mapping[str, int], wanted: Sequence[tuple[str, str, str]]) -> Panels:
    """A panel for each quantity, a line for each method."""
    panels, drawn = [], set()
    for title, what, key in wanted:
        lines = [Line(method, mean_curve(runs, key), styles[method]) for method, runs in benchmark.methods.items()]
        panels += _curve_panel(title, what, lines, whole=key not in _PARTLY, legend=False)
        drawn |= {line.name for line in lines if np.isfinite(line.values).any()}
    return Panels(panels, [(draw.swatch(style), method) for method, style in styles.items() if method in drawn])


def _curve_panel(
    title: str, what: str, lines: Sequence[Line], *, share: bool = True, whole: bool = True, legend: bool = True
) -> list[Panel]:
    """One panel, or none where there is nothing to draw."""
    lines = [line for line in lines if np.isfinite(line.values).any()]
    if not lines:
        return []
    lengths = {line.values.shape[1] for line in lines}
    drawing = draw.curves(lines, what, share=share, whole=whole, of_training=len(lengths) > 1, band=len(lines) <= _MOST_BANDS)
    names = [(draw.swatch(line.style), line.name) for line in lines] if legend else []
    return [Panel(title, drawing, legend=names)]


def _per_method(benchmark: Benchmark) -> list[tuple[str, int, list[Panel]]]:
    """Method, number of its runs, and the figures of its losses and classes."""
    found = []
    for method, runs in benchmark.methods.items():
        keys = list(dict.fromkeys(key for run in runs for key in run.history))

        def lines(prefix: str, keys: Sequence[str] = keys, runs: Sequence[Run] = runs) -> list[Line]:
            own = [key for key in keys if key.startswith(prefix)]
            return [Line(key[len(prefix) :].replace("_", " "), mean_curve(runs, key), i) for i, key in enumerate(own)]

        wholes = (("training", "train_losses"), ("validation", "val_losses"))
        totals = [Line(name, mean_curve(runs, key), i) for i, (name, key) in enumerate(wholes)]
        panels = [
            *_curve_panel("Loss terms", "loss", lines("loss/"), share=False),
            *_curve_panel("Whole loss", "loss", totals, share=False),
            *_curve_panel("Agreement of the members, per class", "Dice", lines("agreement/")),
            *_curve_panel("Pseudo-labels above τ, per class", "Dice", lines("pseudo_label_dice/")),
        ]
        if panels:
            found.append((method, len(runs), panels))
    return found


def _thresholds(benchmark: Benchmark) -> list[Panel]:
    """Coverage and accuracy of the main method's pseudo-labels for every tau, at some epochs."""
    runs = [run for run in benchmark.methods[benchmark.main] if run.reliability is not None]
    if not runs:
        return []
    length = min(len(run.reliability["epochs"]) for run in runs if run.reliability is not None)
    epochs = sorted({round(e) for e in np.linspace(0, length - 1, 4)})
    panels = []
    for part, name in _PARTS:
        found = {f"epoch {epoch + 1}": bins for epoch in epochs if (bins := pooled(runs, epoch, part)) is not None}
        panels += _threshold_panels(found, name, _tau(runs[0]))
    return panels


def _threshold_panels(found: Mapping[str, Mapping[str, np.ndarray]], part: str, current: float | None) -> list[Panel]:
    """Coverage and accuracy against tau, a line for each of ``found``."""
    curves = {name: by_threshold(bins) for name, bins in found.items()}
    if not curves:
        return []
    least = max(0.0, min(thresholds[np.searchsorted(-shares, -1.0, side="right") - 1] for thresholds, shares, _ in curves.values()))
    shown = {name: [values[curve[0] >= least] for values in curve] for name, curve in curves.items()}
    coverage = {name: (curve[0], curve[1]) for name, curve in shown.items()}
    accuracy = {name: (curve[0], curve[2]) for name, curve in shown.items()}
    part = part.removeprefix("predicted ")
    names = [(draw.swatch(i), name) for i, name in enumerate(shown)]
    return [
        Panel(f"Coverage against τ, {part}", draw.threshold_curves(coverage, "pixels above τ", current), legend=names),
        Panel(f"Accuracy against τ, {part}", draw.threshold_curves(accuracy, "right pixels", current), legend=names),
    ]


def _tau(run: Run) -> float | None:
    """The threshold that a run trained with."""
    config = read_json(os.path.join(run.fold, "cmems_config.json")) or {}
    tau = config.get("config", {}).get("tau")
    return float(tau) if isinstance(tau, (int, float)) else None


def _reliability(methods: Mapping[str, Sequence[Run]]) -> list[Panel]:
    """A reliability diagram for each method, of its last epoch."""
    panels = []
    for method, runs in methods.items():
        parts = {name: bins for part, name in _PARTS if (bins := pooled(runs, -1, part)) is not None}
        if not parts:
            continue
        errors = {name: calibration_error(bins) for name, bins in parts.items()}
        note = "ECE " + ", ".join(f"{100 * error:.1f} % ({name})" for name, error in errors.items())
        panels.append(Panel(method, draw.reliability(parts, errors), note))
    return panels


def _study(benchmark: Benchmark, study: StudyRuns) -> Study:
    """Dice against the study's value, and what the pseudo-labels of each value are worth."""
    dice = {value: [_dice(benchmark, run) for run in own] for value, own in study.variants.items()}
    own_values = [draw.text_of(value) for value, own in study.variants.items() if all(run.record.spec.study is None for run in own)]
    sentences = [f"{', '.join(own_values)}: {benchmark.main} itself."] if own_values and study.name != "exemplar" else []
    reference = None if own_values and study.name != "exemplar" else _reference(benchmark, study.runs)
    if study.name == "exemplar":
        return Study(study, _exemplar_panels(study, dice, reference), sentences, _exemplar_table(study, dice))
    panels = [Panel("Dice at the end", draw.study(dice, study.name, reference))]
    variants = {f"τ {draw.text_of(value)}" if study.name == "tau" else draw.text_of(value): own for value, own in study.variants.items()}
    for title, what, key in _PSEUDO_LABELS[:-1]:
        lines = [Line(label, mean_curve(own, key), i) for i, (label, own) in enumerate(variants.items())]
        panels += _curve_panel(title, what, lines, whole=key not in _PARTLY)
    if study.name == "tau":
        for part, text in _PARTS:
            found = {f"trained with {label}": bins for label, own in variants.items() if (bins := pooled(own, -1, part)) is not None}
            panels += _threshold_panels(found, text, None)
    return Study(study, panels, sentences)


def _exemplar_panels(study: StudyRuns, dice: Mapping[Any, Sequence[float]], reference: tuple[str, float] | None) -> list[Panel]:
    """Dice of all annotated slices, sorted; and against the place that ``suggest`` gives them."""
    ordered = sorted(score for scores in dice.values() for score in scores)
    panels = [Panel("Dice of every slice, sorted", draw.scatter(range(1, len(ordered) + 1), ordered, "annotated slice, sorted", reference))]
    ranks = {value: study.notes.get(value, {}).get("suggest_rank") for value in dice}
    pairs = [(rank, score) for value, rank in ranks.items() if rank is not None for score in dice[value]]
    if len(pairs) > 1:
        x, y = [rank for rank, _ in pairs], [score for _, score in pairs]
        of = max((int(note.get("suggest_of") or 0) for note in study.notes.values()), default=0)
        note = ""
        if len(set(x)) > 2 and len(set(y)) > 1:
            found = spearmanr(x, y)
            note = f"Spearman's ρ = {found.statistic:.2f}".replace("-", "−") + f" (p = {found.pvalue:.3f}, {len(pairs)} runs)."
        panels.append(Panel("Dice against suggest's order", draw.scatter(x, y, f"place in suggest's order, of {of}", reference), note))
    return panels


def _exemplar_table(study: StudyRuns, dice: Mapping[Any, Sequence[float]]) -> Table:
    """All annotated slices, the best first."""
    rows = []
    for value, scores in sorted(dice.items(), key=lambda item: -float(np.mean(item[1]))):
        rank = study.notes.get(value, {}).get("suggest_rank")
        rows.append([draw.text_of(value), f"{100 * float(np.mean(scores)):.1f}", "–" if rank is None else str(rank), str(len(scores))])
    return Table("Every annotated slice", ["slice", "Dice (%)", "place in suggest's order", "runs"], rows)


def _dice(benchmark: Benchmark, run: Run) -> float:
    """A run's Dice, mean over cases and classes."""
    return float(mean_per_case(cases_of(benchmark, run)).mean())


def _reference(benchmark: Benchmark, runs: Sequence[Run]) -> tuple[str, float] | None:
    """The main method and its mean Dice over the exemplars and seeds that the study has, too; all of its own in a study of exemplars."""
    places = {(run.record.spec.exemplar, run.record.spec.seed) for run in runs}
    own = [run for run in benchmark.methods[benchmark.main] if run.record.spec.study is None]
    if not any(run.record.spec.study == "exemplar" for run in runs):
        own = [run for run in own if (run.record.spec.exemplar, run.record.spec.seed) in places]
    if not own:
        return None
    return benchmark.main, float(np.mean([_dice(benchmark, run) for run in own]))
