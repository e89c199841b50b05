"""The paper's open questions, each a list of variants of CMEMS that the benchmark trains like any other method.

A variant that is the same as one of our trainers is that trainer: it is not trained twice. Values are ordered as they are shown.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nnunetv2_cmems.config import CMEMSConfig, ExemplarSpec, IntensityConfig, with_overrides
from nnunetv2_cmems.data.annotation import AXES
from nnunetv2_cmems.data.exemplar import list_candidates, rank_exemplars
from nnunetv2_cmems.data.raw import open_raw, quiet_itk
from nnunetv2_cmems.data.suggestion import ScanSummary, order_slices, summarise_dataset
from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.files import read_plans
from nnunetv2_cmems.study.grid import Fold, Grid, to_dict
from nnunetv2_cmems.study.methods import OURS, Exemplar, Method, plain_method, variant
from nnunetv2_cmems.trainers import nnUNetTrainerCMEMS

Value = str | float


@dataclass(frozen=True)
class Study:
    """A study, ready to be trained.

    Attributes:
        name: what ``--study`` calls it.
        question: what it answers.
        variants: value to method, in order. A method without a study is that trainer's own runs.
        notes: value to what else is to be written down about it.
    """

    name: str
    question: str
    variants: Mapping[Value, Method]
    notes: Mapping[Value, Mapping[str, Any]] = field(default_factory=dict)

    def to_json(self, grid: Grid) -> dict[str, Any]:
        """As ``benchmark.json`` has it: every variant with the names of its runs."""
        variants = []
        for value, method in self.variants.items():
            entry: dict[str, Any] = {"value": value, "method": method.name, "trainer": method.trainer, "overrides": dict(method.overrides)}
            if method.plans is not None:
                entry["plans"] = method.plans
            if method.exemplars is not None:
                entry["exemplars"] = {str(number): exemplar for number, exemplar in method.exemplars.items()}
            entry["runs"] = [spec.key for spec in grid.runs(method)]
            variants.append({**entry, **self.notes.get(value, {})})
        return {"name": self.name, "question": self.question, "variants": variants}


def make_study(name: str, grid: Grid, values: Sequence[str] | None = None, sample: int | None = None) -> Study:
    """A study of a benchmark.

    Args:
        name: a key of :data:`STUDIES`.
        grid: what all runs have in common.
        values: to try instead of the study's own, as they stand on the command line.
        sample: of the study ``exemplar``: so many candidates instead of all.

    Raises:
        CMEMSError: a value does not fit; the data set does not offer what the study needs.
    """
    if sample is not None and name != "exemplar":
        raise CMEMSError("--sample belongs to --study exemplar alone; leave it out.")
    return STUDIES[name](grid, values, sample)


def _tau(grid: Grid, values: Sequence[str] | None, _: int | None) -> Study:
    chosen = _numbers("tau", values, (0.5, 0.7, 0.8, 0.9, 0.95, 0.99))
    return _of_config(grid, "tau", "How confident must a pseudo-label be?", {value: {"tau": value} for value in chosen})


def _architecture(grid: Grid, values: Sequence[str] | None, _: int | None) -> Study:
    chosen = _names("architecture", values, ["plans", "auto"])
    question = "Should the networks be of one architecture or of two?"
    return _of_config(grid, "architecture", question, {value: {"architecture": value} for value in chosen})


def _members(grid: Grid, values: Sequence[str] | None, _: int | None) -> Study:
    chosen = _whole("members", values, (1, 2, 3, 4))
    question = "How many networks should teach each other?"
    return _of_config(grid, "members", question, {value: {"num_members": value} for value in chosen})


def _perturbation(grid: Grid, values: Sequence[str] | None, _: int | None) -> Study:
    base = with_overrides(nnUNetTrainerCMEMS.config, dict(grid.config), "--config")
    variants: dict[Value, dict[str, Any]] = {}
    factors = _numbers("perturbation", values, (0.5, 1.0, 2.0))
    if min(factors) < 0:
        raise CMEMSError(f"--values of --study perturbation are factors of a strength, 0 or more, not {min(factors):g}.")
    for kind in ("weak", "strong"):
        for factor in factors:
            variants[f"{kind} {factor:g}x"] = {} if factor == 1 else {kind: scaled(getattr(base, kind), factor)}
    for factor in factors:
        variants[f"feature {factor:g}x"] = {"feature_perturbation": {"dropout": scaled_dropout(base.feature_perturbation.dropout, factor)}}
    return _of_config(grid, "perturbation", "How strong should the weak, strong and feature perturbations be?", variants)


def scaled(intensity: IntensityConfig, factor: float) -> dict[str, Any]:
    """Appearance changes of ``factor`` times the strength, as overrides; how often they happen stays.

    Offsets are multiplied, factors and exponents (contrast, gamma, low resolution) are raised to the power, so that 0 changes nothing
    and 1 is as it was. Numbers end where the config's ranges end.
    """
    changed: dict[str, Any] = {}
    for entry in dataclasses.fields(intensity):
        value, (low, high) = getattr(intensity, entry.name), entry.metadata["range"]
        if entry.name == "probability":
            continue
        if isinstance(value, tuple):
            changed[entry.name] = [min(max(round(number**factor, 4), low), high) for number in value]
        else:
            number = value**factor if entry.name == "low_resolution" else value * factor
            changed[entry.name] = min(max(round(number, 4), low), high)
    return changed


def scaled_dropout(dropout: float, factor: float) -> float:
    """A rate of ``factor`` times the strength: it is multiplied, or from 1 on the share that is kept is divided. Of 0.5: 0.25, 0.75."""
    rate = dropout * factor if factor <= 1 else 1 - (1 - dropout) / factor
    low, high = next(f for f in dataclasses.fields(CMEMSConfig().feature_perturbation) if f.name == "dropout").metadata["range"]
    return float(min(max(round(rate, 4), low), high))


def _synthesis(grid: Grid, values: Sequence[str] | None, _: int | None) -> Study:
    known: dict[Value, dict[str, Any]] = {
        "without": {"synthetic": {"enabled": False}},
        "exemplar background": {"synthesis": {"unlabelled_background": 0.0}},
        "both backgrounds": {},
        "unlabelled background": {"synthesis": {"unlabelled_background": 1.0}},
    }
    question = "What are synthetic pairs worth, and which background should they have?"
    return _of_config(grid, "synthesis", question, {value: known[value] for value in _names("synthesis", values, list(known))})


def _competence(grid: Grid, values: Sequence[str] | None, _: int | None) -> Study:
    known: dict[Value, dict[str, Any]] = {"off": {"competence": False}, "on": {"competence": True}}
    question = "Should members teach each other only as far as they know the exemplar?"
    return _of_config(grid, "competence", question, {value: known[value] for value in _names("competence", values, list(known))})


def _scan_labels(grid: Grid, values: Sequence[str] | None, _: int | None) -> Study:
    as_it_lies: dict[str, Any] = {"atlases": 0, "places": False, "turns": []}
    alone = {**as_it_lies, "contacts": False, "shared_appearance": False, "outlines": False}
    known: dict[Value, dict[str, Any]] = {
        "none": {"scan_labels": {"at": []}},
        "as predicted": {
            "scan_labels": {**alone, "propagation": 0.0, "appearance": 0.0, "smoothing": 0.0, "growth": 0.0, "largest_piece": False}
        },
        "refined": {"scan_labels": {**alone, "propagation": 0.0, "growth": 0.0}},
        "refined and grown": {"scan_labels": {**alone, "propagation": 0.0}},
        "with propagation": {"scan_labels": alone},
        "with outlines": {"scan_labels": {**alone, "outlines": True, "levels": False}},
        "with levels": {"scan_labels": {**alone, "outlines": True}},
        "with contacts": {"scan_labels": {**as_it_lies, "waists": False}},
        "with waists": {"scan_labels": as_it_lies},
        "seen turned": {"scan_labels": {"atlases": 0, "places": False}},
        "with places": {"scan_labels": {"atlases": 0}},
        "with atlases": {},
    }
    question = "Should the members label whole scans, and what should happen to these labels?"
    return _of_config(grid, "scan_labels", question, {value: known[value] for value in _names("scan_labels", values, list(known))})


def _exemplar(grid: Grid, values: Sequence[str] | None, sample: int | None) -> Study:
    """Every candidate slice, in an order that was drawn once, so that a larger sample includes a smaller one."""
    if values is not None:
        raise CMEMSError("--study exemplar takes no --values; name how many slices with --sample.")
    if sample is not None and sample < 1:
        raise CMEMSError(f"--sample is {sample}; it must be 1 or more.")
    fold = grid.fold
    candidates = list_candidates(fold.training, fold.images, bool(grid.config.get("allow_missing_classes", False)))
    random.Random(0).shuffle(candidates)
    ranks, of = suggestion_ranks(fold)
    variants: dict[Value, Method] = {}
    notes: dict[Value, dict[str, Any]] = {}
    for number, spec in enumerate(candidates[:sample], start=1):
        exemplar = [to_dict(spec)]
        value = spec.case if spec.slice is None else f"{spec.case} {spec.axis}{spec.slice}"
        if exemplar in grid.exemplars:
            same = list(grid.exemplars).index(exemplar) + 1
            variants[value] = dataclasses.replace(plain_method(OURS), exemplars={same: exemplar})
        else:
            variants[value] = Method(f"CMEMS, exemplar {value}", OURS, {}, "exemplar", value, exemplars={number: exemplar})
        rank = ranks.get((spec.case, spec.slice))
        notes[value] = {"exemplar": exemplar, "suggest_rank": rank, "suggest_of": of}
    return Study("exemplar", "How much does it matter which slice is annotated, and how good is suggest?", variants, notes)


def _shots(grid: Grid, values: Sequence[str] | None, _: int | None) -> Study:
    chosen = _whole("shots", values, (1, 2, 4, 8))
    ranked = [to_dict(spec) for spec in _ranked(grid)]
    variants: dict[Value, Method] = {}
    for count in chosen:
        exemplars = {number: _more_slices(exemplar, number, count, ranked) for number, exemplar in enumerate(grid.exemplars, start=1)}
        if list(exemplars.values()) == list(grid.exemplars):
            variants[count] = plain_method(OURS)
        else:
            variants[count] = Method(f"CMEMS, shots {count}", OURS, {}, "shots", count, exemplars=exemplars)
    return Study("shots", "What do further annotated slices add?", variants)


def _ranked(grid: Grid) -> list[ExemplarSpec]:
    return rank_exemplars(grid.fold.training, grid.fold.images, bool(grid.config.get("allow_missing_classes", False)))


def _more_slices(exemplar: Exemplar, number: int, count: int, ranked: Sequence[dict[str, Any]]) -> Exemplar:
    """``count`` slices that begin with the exemplar's; further ones come in the order of the ranking, from the exemplar's number on."""
    if count < len(exemplar):
        raise CMEMSError(f"--study shots: exemplar {number} has {len(exemplar)} slices already, more than {count}; name larger --values.")
    cases = {spec["case"] for spec in exemplar}
    start = number % len(ranked)
    further = [spec for spec in [*ranked[start:], *ranked[:start]] if spec["case"] not in cases]
    if count > len(exemplar) + len(further):
        raise CMEMSError(
            f"--study shots: {count} slices are asked for, but only {len(exemplar) + len(further)} training cases offer one that shows all "
            "classes; name smaller --values."
        )
    return [*exemplar, *further[: count - len(exemplar)]]


def _backbone(grid: Grid, values: Sequence[str] | None, _: int | None) -> Study:
    fold = grid.fold
    there = other_plans(fold)
    if not there:
        number = int(fold.dataset[len("Dataset") :].partition("_")[0])
        raise CMEMSError(
            f"{fold.folder} has no plans but {fold.plans} that are preprocessed for '{fold.configuration}'; make some, for example with "
            f"'nnUNetv2_plan_experiment -d {number} -pl nnUNetPlannerResEncM' and "
            f"'nnUNetv2_preprocess -d {number} -plans_name nnUNetResEncUNetMPlans -c {fold.configuration}'."
        )
    variants: dict[Value, Method] = {}
    for plans in _names("backbone", values, [fold.plans, *there]):
        own = plans == fold.plans
        variants[plans] = plain_method(OURS) if own else Method(f"CMEMS, {plans}", OURS, {}, "backbone", plans, plans=plans)
    return Study("backbone", "Which of nnU-Net's architectures should be trained?", variants)


def other_plans(fold: Fold) -> list[str]:
    """Identifiers of the data set's other plans that have the configuration and are preprocessed for it."""
    found = []
    for name in sorted(os.listdir(fold.folder)):
        identifier, ending = os.path.splitext(name)
        if ending != ".json" or identifier == fold.plans:
            continue
        try:
            configurations = read_plans(os.path.join(fold.folder, name))["configurations"]
        except CMEMSError:  # dataset.json and others lie there too
            continue
        folder = _data_identifier(configurations, fold.configuration)
        if folder and os.path.isdir(os.path.join(fold.folder, folder)):
            found.append(identifier)
    return found


def _data_identifier(configurations: Mapping[str, Any], configuration: str) -> str | None:
    """The name of a configuration's preprocessed folder; one may inherit it from another."""
    while configuration in configurations:
        entry = configurations[configuration]
        if "data_identifier" in entry:
            return str(entry["data_identifier"])
        configuration = entry.get("inherits_from", "")
    return None


STUDIES: dict[str, Callable[[Grid, Sequence[str] | None, int | None], Study]] = {
    "tau": _tau,
    "perturbation": _perturbation,
    "synthesis": _synthesis,
    "competence": _competence,
    "scan_labels": _scan_labels,
    "exemplar": _exemplar,
    "members": _members,
    "architecture": _architecture,
    "backbone": _backbone,
    "shots": _shots,
}
"""What ``--study`` may name."""


def suggestion_ranks(fold: Fold) -> tuple[dict[tuple[str, int | None], int], int]:
    """The place of every slice in the order in which ``suggest`` would look for one, if it saw the fold's training scans; and their number.

    Slices that ``suggest`` never names (the ends of a scan) are not in the order; neither are volumes.

    Raises:
        CMEMSError: the raw scans are not there or cannot be read.
    """
    if fold.images.dimensions == 3:
        return {}, 0
    raw = open_raw(fold.dataset)
    scans = dataclasses.replace(raw, labelled={case: raw.labelled[case] for case in fold.training if case in raw.labelled}, unlabelled={})
    with quiet_itk():
        axis, summaries = summarise_dataset(scans, axis=AXES.index(fold.images.slice_axis))
    order = suggestion_order(summaries, axis)
    return {place: rank for rank, place in enumerate(order, start=1)}, len(order)


def suggestion_order(summaries: Sequence[ScanSummary], axis: int) -> list[tuple[str, int | None]]:
    """All slices that ``suggest`` may name, the best first: not one of each scan alone."""
    return [(slice_.case, slice_.slice) for slice_ in order_slices(summaries, axis)]


def _of_config(grid: Grid, name: str, question: str, variants: Mapping[Value, Mapping[str, Any]]) -> Study:
    source = f"--study {name}"
    return Study(name, question, {v: variant(name, v, overrides, grid.config, source) for v, overrides in variants.items()})


def _numbers(study: str, values: Sequence[str] | None, default: Sequence[float]) -> list[float]:
    try:
        return sorted({float(value) for value in (default if values is None else values)})
    except ValueError as error:
        raise CMEMSError(f"--values of --study {study} must be numbers, not {' '.join(values or ())}.") from error


def _whole(study: str, values: Sequence[str] | None, default: Sequence[int]) -> list[int]:
    numbers = _numbers(study, values, default)
    if any(number != int(number) or number < 1 for number in numbers):
        raise CMEMSError(f"--values of --study {study} must be whole numbers from 1 on, not {' '.join(values or ())}.")
    return [int(number) for number in numbers]


def _names(study: str, values: Sequence[str] | None, known: Sequence[Any]) -> list[Any]:
    unknown = [value for value in values or () if value not in known]
    if unknown:
        raise CMEMSError(f"--values of --study {study} has '{unknown[0]}'; there are {', '.join(known)}.")
    return list(known) if values is None else list(dict.fromkeys(values))
