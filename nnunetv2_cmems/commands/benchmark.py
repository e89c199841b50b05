"""``nnUNetv2_cmems benchmark``: trains methods on the same exemplars, seeds and compute, and compares them."""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nnunetv2_cmems.commands.device import check_device
from nnunetv2_cmems.config import CMEMSConfig, differences, with_overrides
from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.files import nnunet_folder, write_json
from nnunetv2_cmems.study import grid as grids
from nnunetv2_cmems.study import launch, records
from nnunetv2_cmems.study import run as runs
from nnunetv2_cmems.study.grid import Fold, Grid
from nnunetv2_cmems.study.methods import DEFAULT_TRAINERS, OURS, Method, check_trainers, is_ours, plain_method
from nnunetv2_cmems.study.run import RunSpec
from nnunetv2_cmems.study.studies import STUDIES, Study, make_study

HELP = """\
Train methods on a labelled data set, each from the same exemplars, with the same seeds and the same compute, and compare them.

Every run is a training and validation of nnU-Net's own, in a process of its own. Runs that are finished are skipped, so a benchmark
that was interrupted goes on with the same line, and a later line may add trainers, exemplars, seeds and studies to the same folder."""

_SLURM = {"partition": "slurm_partition", "account": "slurm_account", "qos": "slurm_qos", "constraint": "slurm_constraint",
          "time": "timeout_min", "gpus": "gpus_per_node", "cpus": "cpus_per_task", "mem": "mem_gb"}  # fmt: skip
"""Options ``--slurm-...`` and what submitit calls them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("-d", required=True, metavar="DATASET", help="labelled data set, ID or name")
    parser.add_argument("-c", required=True, metavar="CONFIGURATION", help="nnU-Net configuration, such as 2d")
    parser.add_argument("-f", default="0", metavar="FOLD", help="fold of the cross-validation (default: %(default)s)")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="plans identifier (default: %(default)s)")
    parser.add_argument("-device", choices=("cuda", "cpu", "mps"), default="cuda", help="where to train (default: %(default)s)")
    parser.add_argument("-num_gpus", type=int, default=1, metavar="N", help="GPUs of each run (default: %(default)s)")
    parser.add_argument(
        "-o",
        metavar="FOLDER",
        help="the benchmark's folder (default: in nnUNet_results, beside the data set's models); with --speed a JSON file",
    )
    what = parser.add_argument_group("what is trained")
    what.add_argument(
        "--trainers",
        nargs="+",
        metavar="TRAINER",
        help="trainers of ours, in full or by their end (uniMatch), or any other of nnU-Net's "
        "(default: exemplar only, the peers, CMEMS, all labels; with --study, none but the study's)",
    )
    what.add_argument(
        "--exemplars",
        metavar="K",
        help="so many exemplars of different patients, or a JSON file with a list of exemplars (default: 3, or as the folder has it)",
    )
    what.add_argument(
        "--seeds", type=int, metavar="S", help="trainings of each, with the seeds 1 to S (default: 1, or as the folder has it)"
    )
    what.add_argument("--study", nargs="+", default=[], metavar="NAME", help=f"variants of CMEMS: {', '.join(STUDIES)}")
    what.add_argument("--values", nargs="+", metavar="VALUE", help="values of the one study that is named, instead of its own")
    what.add_argument("--sample", type=int, metavar="N", help="--study exemplar: so many of the candidate slices (default: all)")
    how = parser.add_argument_group("how it is trained")
    how.add_argument("--epochs", type=int, metavar="N", help=f"epochs of each run (default: {CMEMSConfig().num_epochs})")
    how.add_argument("--iterations", type=int, metavar="M", help=f"steps an epoch of CMEMS (default: {CMEMSConfig().iterations_per_epoch})")
    how.add_argument(
        "--same", choices=("passes", "steps"), help="what all methods get the same number of: network passes (default), or optimiser steps"
    )
    how.add_argument("--config", metavar="FILE", help="JSON file like cmems.json, for all of our trainers (the data set's own is not read)")
    where = parser.add_argument_group("where it runs")
    where.add_argument("--jobs", type=int, metavar="J", help="runs at a time (default: 1; on a cluster: as many as it takes)")
    where.add_argument("--threads", type=int, metavar="T", help="threads of each run on a CPU (default: the cores, shared by the jobs)")
    where.add_argument("--launcher", choices=("local", "slurm"), default="local", help="this machine, or a SLURM cluster (needs submitit)")
    for name, kind, what_for in (
        ("partition", str, "partition"),
        ("account", str, "account"),
        ("qos", str, "quality of service"),
        ("constraint", str, "constraint"),
        ("time", int, "minutes of a job (default: 1440); a run that takes longer goes on in the next job"),
        ("gpus", int, "GPUs of a job (default: -num_gpus)"),
        ("cpus", int, "cores of a job (default: --threads, or 8)"),
        ("mem", int, "GB of memory of a job"),
    ):
        where.add_argument(f"--slurm-{name}", type=kind, metavar=name.upper(), help=what_for)
    where.add_argument("--slurm-extra", nargs="+", metavar="KEY=VALUE", help="any other option of sbatch, such as mail-type=END")
    speed = parser.add_argument_group("what a training step costs")
    speed.add_argument("--speed", action="store_true", help="train nothing; time the training step beside nnU-Net's own (a few minutes)")
    speed.add_argument("-tr", metavar="TRAINER", help="--speed: the trainer that is timed (default: nnUNetTrainerCMEMS)")
    speed.add_argument("--steps", type=int, metavar="N", help="--speed: timed steps of each trainer (default: 50)")
    parser.add_argument("--baseline", metavar="METHOD", help="method, or trainer, that the others are tested against (default: CMEMS)")
    parser.add_argument("--by-patient", action="store_true", help="test patients, not scans: average the scans of each first")
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained, and write nothing")


def run(args: argparse.Namespace) -> None:
    """Run the benchmark.

    Raises:
        CMEMSError: an argument does not fit, the folder holds what cannot be compared, or a run has failed.
    """
    _check_numbers(args)
    if args.speed:
        _measure_speed(args)
        return
    if args.tr or args.steps:
        raise CMEMSError(f"{'-tr' if args.tr else '--steps'} belongs to --speed; add that, or name trainers with --trainers.")
    _check_studies(args)
    parameters = _slurm_parameters(args)
    names = args.trainers or ([] if args.study else DEFAULT_TRAINERS)
    trainers = check_trainers(names)
    if args.launcher == "local" and not args.dry_run:
        check_device(args.device, "choose another with -device, or use --launcher slurm")
    fold = grids.open_fold(args.d, args.c, args.p, args.f)
    folder = os.path.abspath(args.o) if args.o else _default_folder(fold)
    old = records.read_benchmark(folder)
    grid = _make_grid(args, fold, old)
    records.joined(old, {**grid.to_json(), **_nothing_added()}, folder)  # before anything is computed from it
    studies = [make_study(name, grid, args.values, args.sample if name == "exemplar" else None) for name in args.study]
    methods = _methods(trainers, studies)
    specs = _in_order([spec for method in methods for spec in grid.runs(method)])
    states = records.check_runs(specs.values(), folder, fold.images.slice_axis)
    baseline = _find_baseline(args.baseline, methods, folder)
    print(_plan(grid, methods, states), flush=True)
    for line in _warnings(args, fold, trainers, old):
        print(line, flush=True)
    if args.dry_run:
        print(f"\nfolder: {folder}")
        return
    new = {
        **grid.to_json(),
        "trainers": trainers,
        "studies": [study.to_json(grid) for study in studies],
        "versions": runs.versions(),
        "commands": [shlex.join(["nnUNetv2_cmems", *sys.argv[1:]])],
        **({} if baseline is None else {"baseline": baseline}),
        **({"by_patient": True} if args.by_patient else {}),
    }
    write_json(os.path.join(folder, records.BENCHMARK), records.joined(old, new, folder))
    if args.launcher == "slurm":
        outcomes = launch.run_on_cluster(list(specs.values()), folder, parameters)
    else:
        outcomes = launch.run_local(list(specs.values()), folder, args.jobs or 1)
    records.rename_runs(specs.values(), folder)
    _conclude(list(specs.values()), outcomes, folder, baseline)


_NOT_FOR_SPEED = ("trainers", "exemplars", "seeds", "study", "values", "sample", "epochs", "iterations", "same", "config", "jobs",
                  "baseline", "by_patient", "dry_run")  # fmt: skip


def _measure_speed(args: argparse.Namespace) -> None:
    """``--speed``: print the table, and write it as JSON where ``-o`` says.

    Raises:
        CMEMSError: an argument does not fit, or a trainer cannot be started.
    """
    given = [f"--{name.replace('_', '-')}" for name in _NOT_FOR_SPEED if getattr(args, name)]
    if given:
        raise CMEMSError(f"--speed trains nothing, so {given[0]} has no meaning; leave one of them out.")
    if args.device == "mps" or args.num_gpus > 1 or args.launcher != "local":
        raise CMEMSError("--speed measures one process on this machine, on -device cpu or cuda; leave out -num_gpus and --launcher.")
    trainer = check_trainers([args.tr or OURS])[0]
    if not is_ours(trainer):
        raise CMEMSError(f"--speed compares a trainer of ours with nnU-Net's own, but -tr is {trainer}; choose one of ours.")
    check_device(args.device)
    fold = grids.open_fold(args.d, args.c, args.p, args.f)
    from nnunetv2_cmems.study import speed

    found = speed.measure(speed.SpeedSpec.of(fold, trainer, args.device, args.steps or 50, args.threads))
    print(speed.table(found), flush=True)
    if args.o:
        write_json(os.path.abspath(args.o), found)


def _make_grid(args: argparse.Namespace, fold: Fold, old: Mapping[str, Any]) -> Grid:
    """What is asked for; what is not said is as the folder has it."""
    config = old.get("config", {}) if args.config is None else grids.read_config(args.config)
    base = with_overrides(CMEMSConfig(), dict(config), "--config")
    exemplars = old.get("exemplars") if args.exemplars is None else None
    if exemplars is None:
        wanted = args.exemplars or "3"
        if wanted.isdecimal():
            exemplars = grids.choose_exemplars(int(wanted), fold, base.allow_missing_classes)
        else:
            exemplars = grids.read_exemplars(wanted, fold, base.allow_missing_classes)
    threads = args.threads
    if threads is None and args.device == "cpu" and args.launcher == "local" and (args.jobs or 1) > 1:
        threads = max(1, (os.cpu_count() or 1) // args.jobs)
    return Grid(
        fold=fold,
        exemplars=exemplars,
        seeds=old.get("seeds", [1]) if args.seeds is None else list(range(1, args.seeds + 1)),
        epochs=args.epochs or old.get("epochs", base.num_epochs),
        iterations=args.iterations or old.get("iterations", base.iterations_per_epoch),
        same=args.same or old.get("same", "passes"),
        config=config,
        device=args.device,
        num_gpus=args.num_gpus,
        threads=threads,
    )


def _methods(trainers: Sequence[str], studies: Sequence[Study]) -> list[Method]:
    """Each once; a study's variant that is one of the trainers is not there twice."""
    found = [plain_method(trainer) for trainer in trainers]
    for study in studies:
        found += [method for method in study.variants.values() if method not in found]
    return found


def _in_order(specs: Sequence[RunSpec]) -> dict[str, RunSpec]:
    """The runs by their keys: all methods of one seed and exemplar before the next, so that half a grid can be compared."""
    return {spec.key: spec for spec in sorted(specs, key=lambda spec: (spec.seed, spec.exemplar))}


def _plan(grid: Grid, methods: Sequence[Method], states: Mapping[str, str]) -> str:
    """A table of what will be trained."""
    rows = [("method", "steps", "network passes", "runs", "finished")]
    named: dict[str, list[Method]] = {}
    for method in methods:  # a study's exemplars may be hundreds
        named.setdefault("CMEMS, study exemplar" if method.study == "exemplar" else method.name, []).append(method)
    for name, alike in named.items():
        steps, passes = grid.steps(alike[0]), grid.passes(alike[0])
        keys = {spec.key for method in alike for spec in grid.runs(method)}
        finished = sum(states[key] == "finished" for key in keys)
        said = ("its own", "?") if steps is None or passes is None else (f"{grid.epochs * steps:,}", f"{passes:,.0f}")
        rows.append((name, *said, str(len(keys)), str(finished)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths))) for row in rows]
    counts = {state: list(states.values()).count(state) for state in ("finished", "unfinished", "new")}
    return "\n".join([*lines, f"{len(states)} runs: {', '.join(f'{count} {state}' for state, count in counts.items())}"])


def _warnings(args: argparse.Namespace, fold: Fold, trainers: Sequence[str], old: Mapping[str, Any]) -> Iterator[str]:
    """What might be taken for granted and is not so."""
    path = os.path.join(fold.folder, "cmems.json")
    if os.path.isfile(path) and args.config is None:
        yield f"Note: {path} is not used here, as it could make the methods alike; to use it for all of them, name it with --config."
    others = [trainer for trainer in trainers if not is_ours(trainer)]
    if others:
        yield f"Note: {', '.join(others)}: nnU-Net's own; it learns from all labels of the fold, for as long as it decides, from any seed."
    if set(fold.validation) & set(fold.training):
        yield f"Note: fold {fold.fold} validates on the cases that it trains on; with all labels, that is no test."
    changed = differences(old["versions"], runs.versions()) if old.get("versions") else []
    if changed:
        yield f"Note: other versions than at the last call: {', '.join(changed)}."
    if old and old.get("device") != args.device:
        yield f"Note: the last call trained on {old.get('device')}; times of different devices do not compare methods."


def _find_baseline(asked: str | None, methods: Sequence[Method], folder: str) -> str | None:
    """The method that is meant, by its name or its trainer's.

    Raises:
        CMEMSError: there is no such method; the nearest is suggested.
    """
    if asked is None:
        return None
    names = {name: method.name for method in methods for name in (method.name, *([method.trainer] if method.study is None else []))}
    for spec in records.runs_in(folder).values():
        names.update({spec.method: spec.method, **({spec.trainer: spec.method} if spec.study is None else {})})
    short = {name.removeprefix(prefix): method for name, method in names.items() for prefix in (OURS + "_", "nnUNetTrainer")}
    known = {name.lower(): method for name, method in {**short, **names}.items()}
    if asked.lower() in known:
        return known[asked.lower()]
    nearest = difflib.get_close_matches(asked.lower(), known, n=1, cutoff=0.5)
    hint = f"did you mean '{known[nearest[0]]}'?" if nearest else f"there are {', '.join(dict.fromkeys(names.values()))}."
    raise CMEMSError(f"--baseline is '{asked}', which is no method of this benchmark; {hint}")


def _conclude(specs: Sequence[RunSpec], outcomes: Sequence[launch.Outcome], folder: str, baseline: str | None) -> None:
    """Write and print the tables; say what has failed.

    Raises:
        CMEMSError: a run has failed.
    """
    if any(launch.is_done(spec, folder) for spec in specs):
        from nnunetv2_cmems.study.comparison import write_tables

        print(f"\n{write_tables(folder, baseline)}\n")
        print(f"tables: {os.path.join(folder, 'tables')}")
        print(f"report: nnUNetv2_cmems report {shlex.quote(folder)}", flush=True)
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed:
        lines = [f"{one.key}: {one.error} (log: {os.path.join(folder, runs.RUNS, one.key, runs.LOG)})" for one in failed]
        raise CMEMSError(
            f"{len(failed)} of {len(specs)} runs failed; mend the cause and call again, which repeats only these: " + "; ".join(lines)
        )


def _default_folder(fold: Fold) -> str:
    name = f"cmems_benchmark__{fold.plans}__{fold.configuration}__fold_{fold.fold}"
    return os.path.join(nnunet_folder("nnUNet_results", "trained models"), fold.dataset, name)


def _nothing_added() -> dict[str, Any]:
    return {"trainers": [], "studies": [], "versions": {}, "commands": []}


def _check_numbers(args: argparse.Namespace) -> None:
    least = {"num_gpus": "-num_gpus", **{name: f"--{name}" for name in ("seeds", "epochs", "iterations", "jobs", "threads", "steps")}}
    for name, option in least.items():
        value = getattr(args, name)
        if value is not None and value < 1:
            raise CMEMSError(f"{option} is {value}; it must be 1 or more.")
    if args.exemplars is not None and args.exemplars.lstrip("-").isdecimal() and int(args.exemplars) < 1:
        raise CMEMSError(f"--exemplars is {args.exemplars}; it must be 1 or more, or a JSON file.")
    if args.num_gpus > 1 and args.device != "cuda":
        raise CMEMSError(f"-num_gpus is {args.num_gpus}, but -device is {args.device}; leave one of them out.")


def _check_studies(args: argparse.Namespace) -> None:
    for name in args.study:
        if name not in STUDIES:
            nearest = difflib.get_close_matches(name, STUDIES, n=1, cutoff=0.5)
            hint = f"did you mean '{nearest[0]}'?" if nearest else f"there are {', '.join(STUDIES)}."
            raise CMEMSError(f"there is no study '{name}'; {hint}")
    if args.values is not None and len(args.study) != 1:
        raise CMEMSError("--values belong to one study; name one with --study.")
    if args.sample is not None and "exemplar" not in args.study:
        raise CMEMSError("--sample belongs to --study exemplar; leave it out.")


def _slurm_parameters(args: argparse.Namespace) -> dict[str, Any]:
    """For submitit's ``AutoExecutor``."""
    given = {name: getattr(args, f"slurm_{name}") for name in (*_SLURM, "extra") if getattr(args, f"slurm_{name}") is not None}
    if args.launcher != "slurm":
        if given:
            raise CMEMSError(f"--slurm-{next(iter(given))} belongs to --launcher slurm; add that, or leave it out.")
        return {}
    extra = [item.partition("=") for item in given.pop("extra", [])]
    unclear = [key for key, equals, _ in extra if not equals]
    if unclear:
        raise CMEMSError(f"--slurm-extra has '{unclear[0]}'; write KEY=VALUE.")
    given = {"time": 1440, "cpus": args.threads or 8, "gpus": args.num_gpus if args.device == "cuda" else None, **given}
    parameters = {_SLURM[name]: value for name, value in given.items() if value is not None}
    if extra:
        parameters["slurm_additional_parameters"] = {key: value for key, _, value in extra}
    if args.jobs is not None:
        parameters["slurm_array_parallelism"] = args.jobs
    return {**parameters, "name": "cmems_benchmark"}
