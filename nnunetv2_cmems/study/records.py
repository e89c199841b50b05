"""A benchmark's folder: what ``benchmark.json`` says about its runs, what may be added to them, and which of them are there."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from nnunetv2_cmems.config import differences, with_overrides
from nnunetv2_cmems.errors import CMEMSError, first_line
from nnunetv2_cmems.files import write_json
from nnunetv2_cmems.study import run
from nnunetv2_cmems.study.methods import find_trainer, is_ours
from nnunetv2_cmems.study.run import BENCHMARK, RunSpec


def read_benchmark(folder: str) -> dict[str, Any]:
    """The content of ``benchmark.json``; empty for a folder that does not exist or is empty.

    Raises:
        CMEMSError: it cannot be read, or the folder holds something else.
    """
    path = os.path.join(folder, BENCHMARK)
    if not os.path.lexists(folder) or (os.path.isdir(folder) and not os.listdir(folder)):
        return {}
    if not os.path.lexists(path) and os.path.isdir(os.path.join(folder, run.RUNS)):
        return {}  # runs that were trained without it; check_runs looks at them
    if not os.path.isfile(path):
        raise CMEMSError(f"{folder} holds other things than a benchmark (it has no {BENCHMARK}); choose another folder with -o.")
    try:
        with open(path, encoding="utf-8") as file:
            content: dict[str, Any] = json.load(file)
        [content[key] for key in ("dataset", "configuration", "plans", "fold", "epochs", "iterations", "exemplars", "seeds")]
        return content
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CMEMSError(f"{path} cannot be read ({first_line(error)}); choose another folder with -o, or restore the file.") from error


def joined(old: Mapping[str, Any], new: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """What ``benchmark.json`` says after a call that adds ``new`` to ``old``.

    Args:
        old: empty at the first call.
        new: the same keys, and ``trainers``, ``studies``, ``versions``, ``commands``.
        folder: for the sentence of an error.

    Raises:
        CMEMSError: the two cannot be compared.
    """
    new = json.loads(json.dumps(new))  # lists for tuples, as the file has them
    if not old:
        return dict(new)
    options = {"dataset": "-d", "configuration": "-c", "plans": "-p", "fold": "-f", "epochs": "--epochs", "iterations": "--iterations",
               "same": "--same", "config": "--config"}  # fmt: skip
    for key, option in options.items():
        if key in old and old[key] != new[key]:
            raise CMEMSError(
                f"{os.path.join(folder, BENCHMARK)} is of {key} {_say(old[key])}, not {_say(new[key])}, and the two cannot be compared; "
                f"correct {option}, or choose another folder with -o."
            )
    first, second = old["exemplars"], new["exemplars"]
    shared = min(len(first), len(second))
    if first[:shared] != second[:shared]:
        different = next(i for i in range(shared) if first[i] != second[i])
        there, here = json.dumps(first[different]), json.dumps(second[different])
        raise CMEMSError(
            f"exemplar {different + 1} of {os.path.join(folder, BENCHMARK)} is {there}, not {here}; keep the first exemplars and add "
            "others, or choose another folder with -o."
        )
    studies = {study["name"]: study for study in old.get("studies", [])}
    for study in new["studies"]:
        studies[study["name"]] = _join_studies(studies.get(study["name"]), study)
    return {
        **old,
        **new,
        "exemplars": max(first, second, key=len),
        "seeds": sorted({*old["seeds"], *new["seeds"]}),
        "trainers": list(dict.fromkeys([*old.get("trainers", []), *new["trainers"]])),
        "studies": list(studies.values()),
        "commands": [*old.get("commands", []), *new["commands"]],
    }


def _join_studies(old: Mapping[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """The variants of both calls; a variant that both have has the runs of both."""
    if old is None:
        return new
    variants = {str(one["value"]): one for one in old["variants"]}
    for one in new["variants"]:
        runs = variants.get(str(one["value"]), {"runs": []})["runs"]
        variants[str(one["value"])] = {**one, "runs": list(dict.fromkeys([*runs, *one["runs"]]))}
    return {**old, **new, "variants": list(variants.values())}


def _say(value: Any) -> str:
    return str(value) if isinstance(value, (str, int)) else json.dumps(value)


def check_runs(specs: Iterable[RunSpec], folder: str, slice_axis: str | None = None) -> dict[str, str]:
    """What there is of each run already: ``"finished"``, ``"unfinished"`` or ``"new"``, by key.

    Args:
        specs: what is asked for.
        folder: the benchmark's.
        slice_axis: the axis of slices that name none.

    Raises:
        CMEMSError: a run of that name was trained otherwise, another run is of other data, or a record cannot be read.
    """
    wanted = {spec.key: spec for spec in specs}
    states = dict.fromkeys(wanted, "new")
    for key, old in runs_in(folder).items():
        path = os.path.join(folder, run.RUNS, key, run.RECORD)
        for name in ("dataset", "configuration", "fold"):
            asked = {getattr(spec, name) for spec in wanted.values()}
            if wanted and getattr(old, name) not in asked:
                raise CMEMSError(
                    f"{path} is of {name} {getattr(old, name)}, not {', '.join(asked)}, and the two cannot be compared; choose another "
                    "folder with -o."
                )
        if key not in wanted:
            continue
        changed = differences(_trained(old, slice_axis), _trained(wanted[key], slice_axis))
        if changed:
            raise CMEMSError(
                f"{path} was trained with other settings ({', '.join(changed)}), and the two cannot be compared; choose another folder "
                "with -o."
            )
        states[key] = "finished" if run.is_finished(os.path.dirname(path)) else "unfinished"
    return states


def rename_runs(specs: Iterable[RunSpec], folder: str) -> None:
    """Give finished runs the names that tables call them by now: runs of one method must not stand in two rows.

    Raises:
        CMEMSError: a record cannot be written.
    """
    there = runs_in(folder)
    for spec in specs:
        old = there.get(spec.key)
        if old is not None and (old.method, old.study, old.value) != (spec.method, spec.study, spec.value):
            path = os.path.join(folder, run.RUNS, spec.key)
            named = dataclasses.replace(old, method=spec.method, study=spec.study, value=spec.value)
            write_json(os.path.join(path, run.RECORD), dataclasses.asdict(dataclasses.replace(run.read_run(path), spec=named)))


def runs_in(folder: str) -> dict[str, RunSpec]:
    """What was begun in a benchmark's folder, by key."""
    base = os.path.join(folder, run.RUNS)
    keys = sorted(os.listdir(base)) if os.path.isdir(base) else []
    return {key: run.read_run(os.path.join(base, key)).spec for key in keys if os.path.isfile(os.path.join(base, key, run.RECORD))}


def _trained(spec: RunSpec, slice_axis: str | None) -> dict[str, Any]:
    """What decides the weights, however it was written down."""
    content: dict[str, Any] = {name: getattr(spec, name) for name in ("plans", "trainer", "exemplar", "seed")}
    if not is_ours(spec.trainer):
        return content
    config = with_overrides(find_trainer(spec.trainer).config, dict(spec.overrides), f"the run {spec.key}").to_dict()
    if isinstance(config["exemplar"], list):
        for part in config["exemplar"]:
            if part["slice"] is not None and part["axis"] is None:
                part["axis"] = slice_axis
    return {**content, "config": config}
