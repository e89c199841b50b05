"""``nnUNetv2_cmems plan_and_preprocess``: nnU-Net's planning and preprocessing, fed with labelled and unlabelled scans."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_cmems.data.annotation import AXES
from nnunetv2_cmems.data.planning import (
    SCANS,
    PlannerOptions,
    Plans,
    Scan,
    annotated_axes,
    examine,
    make_fingerprint,
    make_plans,
)
from nnunetv2_cmems.data.preprocessing import check_space, copy_masks, plan_task, preprocess
from nnunetv2_cmems.data.raw import RawCase, RawDataset, open_raw, source_state, tell_of_left_out
from nnunetv2_cmems.data.sources import read_splits
from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.files import OURS, some, write_json

HELP = """\
nnU-Net's planning and preprocessing for a data set with unlabelled scans.

Labelled scans lie in imagesTr with their masks in labelsTr, unlabelled ones in imagesUn. A mask may be annotated in part:
some slices are painted, everything else has the ignore label of dataset.json. All scans are checked before anything is written.

Spacing, shapes and batch size follow from all scans. So do the intensities of the foreground, which CT normalisation needs:
the annotated voxels count, and the voxels of unlabelled scans, each with the share of annotated voxels of its intensity that
are foreground. Where slices along one axis are annotated, 2D slices are cut along that axis.

A second call does only what has changed, and goes on after an interruption. The fingerprint (spacings and intensities) stays as
it is when scans are added or removed, or masks change; --clean makes it anew. Then train with nnUNetv2_train -tr nnUNetTrainerCMEMS."""

_DEFAULT_CONFIGURATIONS = ("2d", "3d_fullres")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    processes = min(8, os.cpu_count() or 1)
    parser.add_argument("-d", nargs="+", required=True, metavar="DATASET", help="data sets, by id or name")
    parser.add_argument("-c", nargs="+", metavar="CONFIG", help="configurations to preprocess (default: 2d and 3d_fullres, if planned)")
    parser.add_argument("-pl", default="ExperimentPlanner", metavar="PLANNER", help="nnU-Net's planner (default: %(default)s)")
    parser.add_argument("-gpu_memory_target", type=float, metavar="GB", help="GPU memory to plan for (default: the planner's)")
    parser.add_argument("-overwrite_target_spacing", type=float, nargs=3, metavar="MM", help="target spacing of 3d_fullres")
    parser.add_argument("-overwrite_plans_name", metavar="PLANS", help="another name for the plans (default: the planner's)")
    parser.add_argument("-npfp", type=int, default=processes, metavar="N", help="processes for looking at the scans (default: %(default)s)")
    parser.add_argument(
        "-np",
        type=int,
        nargs="+",
        default=[processes],
        metavar="N",
        help=f"processes for preprocessing, one number or one for each configuration (default: {processes})",
    )
    parser.add_argument("--clean", action="store_true", help="make the fingerprint anew; plans and preprocessed data may change with it")
    parser.add_argument("--skip_unreadable", action="store_true", help="go on without scans that cannot be used, and list them at the end")
    parser.add_argument("--verbose", action="store_true", help="show what nnU-Net's planner and preprocessor print")


def run(args: argparse.Namespace) -> None:
    if args.c is not None and len(args.np) not in (1, len(args.c)):
        raise CMEMSError(f"-np has {len(args.np)} numbers for {len(args.c)} configurations; give one, or one per configuration.")
    if min(*args.np, args.npfp) < 1:
        raise CMEMSError("-np and -npfp must be at least 1.")
    spacing = tuple(args.overwrite_target_spacing) if args.overwrite_target_spacing else None
    options = PlannerOptions(args.pl, args.gpu_memory_target, spacing, args.overwrite_plans_name)
    for dataset in args.d:
        plan_and_preprocess(
            dataset,
            args.c,
            options,
            num_processes=args.np,
            num_processes_fingerprint=args.npfp,
            clean=args.clean,
            skip_unreadable=args.skip_unreadable,
            verbose=args.verbose,
        )


def plan_and_preprocess(
    dataset_name_or_id: str | int,
    configurations: Sequence[str] | None = None,
    options: PlannerOptions | None = None,
    *,
    num_processes: Sequence[int] = (1,),
    num_processes_fingerprint: int = 1,
    clean: bool = False,
    skip_unreadable: bool = False,
    verbose: bool = False,
) -> None:
    """Plan and preprocess one data set.

    Args:
        dataset_name_or_id: the data set.
        configurations: to preprocess; None: 2d and 3d_fullres, as far as the plans have them.
        options: nnU-Net's planner.
        num_processes: to preprocess with; one number, or one per configuration.
        num_processes_fingerprint: to look at the scans with.
        clean: make an existing fingerprint anew.
        skip_unreadable: leave out scans that cannot be used.
        verbose: let nnU-Net print.

    Raises:
        CMEMSError: anything is wrong with the data set or the options; then nothing was written. Or the disk is full, or
            nnU-Net's preprocessing fails; then what is whole is kept.
    """
    options = options or PlannerOptions()
    dataset = open_raw(dataset_name_or_id)
    tell_of_left_out(dataset)
    preprocessed = os.environ.get("nnUNet_preprocessed")
    if not preprocessed:
        raise CMEMSError("the environment variable nnUNet_preprocessed is not set; set it to the folder for preprocessed data.")
    base = os.path.join(preprocessed, dataset.name)
    for place in (dataset.folder, base):
        _check_splits(os.path.join(place, "splits_final.json"), dataset)

    fingerprint = None if clean else _kept_fingerprint(base, dataset)
    states = {case: _state(raw_case, dataset, skip_unreadable) for case, raw_case in dataset.cases.items()}
    seen = _seen_scans(base)
    examination = examine(
        dataset,
        num_processes=num_processes_fingerprint,
        skip_unreadable=skip_unreadable,
        intensities=fingerprint is None,
        known={case: scan for case, (state, scan) in seen.items() if state == states.get(case)},
    )
    scans = examination.scans
    _tell_of_partial_planes(dataset, scans)
    kept = fingerprint is not None
    if fingerprint is None:
        fingerprint = make_fingerprint(dataset, examination)
    plans = make_plans(dataset, scans, fingerprint, options, base, verbose)
    if kept:
        changed = [case for case in scans if case in dataset.labelled and case in seen and seen[case][0] != states[case]]
        _tell_of_changes(fingerprint, dataset, scans, changed if _uses_intensities(plans) else [])
    chosen = _choose_configurations(configurations, plans, dataset, scans)
    tasks = [plan_task(dataset, scans, examination.skipped, plans.content, configuration, base) for configuration in chosen]
    check_space(tasks)

    plans.publish(base)
    write_json(os.path.join(base, SCANS), {case: {"state": states[case], **scan.to_json()} for case, scan in scans.items()})
    copy_masks(dataset, scans, base)
    processes = list(num_processes) * len(tasks) if len(num_processes) == 1 else list(num_processes)
    for task, number in zip(tasks, processes):
        preprocess(task, number, verbose)
        unlabelled = sum(case in dataset.unlabelled for case in scans)
        print(
            f"{dataset.name}, {plans.name}, {task.configuration}: {len(scans) - unlabelled} labelled and {unlabelled} unlabelled cases, "
            f"{len(task.todo)} of them preprocessed now."
        )
    if examination.skipped:
        print(f"{len(examination.skipped)} scan(s) were skipped:")
        for reason in examination.skipped.values():
            print(f"  {reason}")


def _state(raw_case: RawCase, dataset: RawDataset, skip_unreadable: bool) -> dict[str, Any]:
    """What the result of looking at a case depends on, as JSON; of a case with a broken link, which can be skipped, nothing."""
    try:
        sources = source_state(raw_case)
    except CMEMSError:
        if skip_unreadable:
            return {}
        raise
    state: dict[str, Any] = {"sources": sources, "channels": dataset.num_channels, "reader": dataset.reader_class.__name__}
    if raw_case.label is not None:
        state["labels"] = dataset.dataset_json["labels"]
    return state


def _seen_scans(base: str) -> dict[str, tuple[Any, Scan]]:
    """What was found in each case, and the state that it had then."""
    try:
        with open(os.path.join(base, SCANS), encoding="utf-8") as file:
            content = json.load(file)
        return {case: (entry["state"], Scan.from_json(entry)) for case, entry in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # then they are read again
        return {}


def _tell_of_partial_planes(dataset: RawDataset, scans: Mapping[str, Scan]) -> None:
    partial = [
        f"slice {index} along {AXES[axis]} of {dataset.cases[case].label}"
        for case, scan in scans.items()
        if scan.annotation is not None
        for axis, index in scan.annotation.partial
    ]
    if partial:
        value = dataset.values.not_annotated
        print(
            f"Annotated in part, beside background (0): {some(partial, quote='')}. What is not (value {value}) is left out of the "
            f"training, as it should be for scribbles. If all else is background, paint what holds 0 there with {value}."
        )


def _uses_intensities(plans: Plans) -> bool:
    """Whether nnU-Net normalises by the fingerprint's intensities, as it does CT."""
    return any("CTNormalization" in entry.get("normalization_schemes", ()) for entry in plans.content["configurations"].values())


def _kept_fingerprint(base: str, dataset: RawDataset) -> dict[str, Any] | None:
    """The fingerprint that this command made before, if there is one and it still fits."""
    path = os.path.join(base, "dataset_fingerprint.json")
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            fingerprint: dict[str, Any] = json.load(file)
        channels = len(fingerprint["foreground_intensity_properties_per_channel"])
        _cases_of(fingerprint)
    except (OSError, ValueError, KeyError, TypeError):
        print(f"{path} was not made by this command and knows the labelled scans at most; it is made anew.")
        return None
    if channels != dataset.num_channels:
        print(f"{path} is for {channels} channel(s); it is made anew.")
        return None
    return fingerprint


def _cases_of(fingerprint: Mapping[str, Any]) -> dict[str, set[str]]:
    return {kind: set(fingerprint[OURS][kind]) for kind in ("labelled", "unlabelled")}


def _tell_of_changes(fingerprint: Mapping[str, Any], dataset: RawDataset, scans: Mapping[str, Scan], changed: Sequence[str]) -> None:
    """Say in what the data set differs from what a fingerprint was made from.

    Args:
        fingerprint: that is kept.
        dataset: the raw data set.
        scans: those of it that can be used.
        changed: labelled cases whose intensities or mask have changed.
    """
    why = "kept, so that what is preprocessed and trained stays valid; --clean makes"
    before = _cases_of(fingerprint)
    now = {"labelled": set(dataset.labelled) & set(scans), "unlabelled": set(dataset.unlabelled) & set(scans)}
    if now != before:
        numbers = [f"{len(cases['labelled'])} labelled and {len(cases['unlabelled'])} unlabelled scans" for cases in (before, now)]
        print(f"The fingerprint was made from {numbers[0]}; the data set has {numbers[1]} now. It is {why} it anew.")
    elif changed:
        print(f"The intensities by which CT is normalised were measured before {some(changed)} changed. They are {why} them anew.")


def _check_splits(path: str, dataset: RawDataset) -> None:
    """An unlabelled case cannot validate."""
    if not os.path.lexists(path):
        return
    for number, fold in enumerate(read_splits(path)):
        wrong = sorted(set(fold["val"]) & set(dataset.unlabelled))
        if wrong:
            raise CMEMSError(
                f"{path} validates fold {number} on '{wrong[0]}', which lies in imagesUn and has no mask; "
                "take it out of the fold's 'val', or add its mask."
            )


def _choose_configurations(wanted: Sequence[str] | None, plans: Plans, dataset: RawDataset, scans: Mapping[str, Scan]) -> list[str]:
    """The configurations to preprocess, all of which the plans have."""
    manager = PlansManager(plans.content)
    there = manager.available_configurations
    missing = [name for name in wanted or () if name not in there]
    if missing:
        raise CMEMSError(f"the plans {plans.name} of {dataset.name} have no configuration '{missing[0]}'; they have {', '.join(there)}.")
    chosen = list(wanted) if wanted is not None else [name for name in _DEFAULT_CONFIGURATIONS if name in there]
    if len(annotated_axes(scans.values())) <= 1:
        return chosen
    flat = [name for name in chosen if len(manager.get_configuration(name).patch_size) == 2]
    if not flat:
        return chosen
    rest = [name for name in chosen if name not in flat]
    axes = _painted_axes(scans)
    sentence = f"the slices painted in {dataset.name} lie along different axes ({axes}), but {flat[0]} cuts all slices along one"
    if wanted is not None or not rest:
        raise CMEMSError(f"{sentence}; paint along one axis, or use a 3D configuration (-c 3d_fullres).")
    print(f"{sentence}, so it is left out; {', '.join(rest)} can be trained.")
    return rest


def _painted_axes(scans: Mapping[str, Scan]) -> str:
    examples: dict[int, str] = {}
    for case, scan in scans.items():
        for axis in sorted(annotated_axes([scan])):
            examples.setdefault(axis, case)
    return ", ".join(f"{AXES[axis]} in {case}" for axis, case in sorted(examples.items()))
