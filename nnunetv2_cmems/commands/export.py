"""``nnUNetv2_cmems export``: a model folder that a stock nnU-Net, without this package, predicts with.

The members become folds of a plain ``nnUNetTrainer``. Our own prediction takes the mean of the members as
nnU-Net takes the mean of folds, rounding included, so one trained fold and its export predict the same
masks to the last voxel. Several trained folds that are exported together are averaged in another order,
in nnU-Net's half precision: voxels whose two best classes tie can then come out either way.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.files import find_dataset
from nnunetv2_cmems.method.networks import count_members

HELP = "Write a model folder that nnU-Net predicts with, also where this package is not installed."

STOCK_TRAINER = "nnUNetTrainer"
CHECKPOINT = "checkpoint_final.pth"
"""Name of every exported checkpoint, nnU-Net's default, whichever checkpoint it was made from."""

_COPIED = {"plans.json": True, "dataset.json": True, "dataset_fingerprint.json": False}  # file -> is it needed?


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``nnUNetv2_cmems export``."""
    parser.add_argument("-d", required=True, metavar="DATASET", help="data set, ID or name")
    parser.add_argument("-c", required=True, metavar="CONFIGURATION", help="nnU-Net configuration, such as 2d")
    parser.add_argument("-f", nargs="+", default=["0"], metavar="FOLD", help="trained folds to export. Default: 0")
    parser.add_argument("-tr", default="nnUNetTrainerCMEMS", metavar="TRAINER", help="trainer. Default: nnUNetTrainerCMEMS")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="plans. Default: nnUNetPlans")
    parser.add_argument("-chk", default=CHECKPOINT, metavar="FILE", help=f"checkpoint to export. Default: {CHECKPOINT}")
    parser.add_argument("--member", type=int, metavar="N", help="export this network only, counted from 0. Default: all of them")
    parser.add_argument("-o", required=True, metavar="FOLDER", help="folder to write; must be new or empty")


def run(args: argparse.Namespace) -> None:
    """Export what the command line names, and say how to predict with it.

    Raises:
        CMEMSError: see :func:`find_model_folder` and :func:`export_model`.
    """
    model_folder = find_model_folder(args.d, args.tr, args.p, args.c)
    folds = export_model(model_folder, args.f, args.o, checkpoint=args.chk, member=args.member)
    print(f"Wrote {len(folds)} network{'s' if len(folds) > 1 else ''} to {args.o}. With or without nnunetv2-cmems installed, predict with")
    print(f"    nnUNetv2_predict_from_modelfolder -i INPUT -o OUTPUT -m {args.o} -f {' '.join(str(fold) for fold in folds)}")


def find_model_folder(dataset: str | int, trainer: str, plans: str, configuration: str) -> str:
    """The folder in ``nnUNet_results`` that a trainer wrote.

    Args:
        dataset: ID or name of the data set.
        trainer: name of the trainer class.
        plans: name of the plans.
        configuration: name of the configuration.

    Raises:
        CMEMSError: ``nnUNet_results`` is not set or no folder, the data set is unknown or its ID
            ambiguous, or nothing was trained there by this trainer, plans and configuration.
    """
    remedy = "train first, or correct -d or the environment variable"
    trained_sets = find_dataset(dataset, "nnUNet_results", "your trained models", remedy)
    name = os.path.basename(trained_sets)
    folder = os.path.join(trained_sets, f"{trainer}__{plans}__{configuration}")
    if not os.path.isdir(folder):
        parent = os.path.dirname(folder)
        trained = sorted(entry for entry in os.listdir(parent) if entry.count("__") == 2) if os.path.isdir(parent) else []
        there = f" (there are: {', '.join(trained)})" if trained else ""
        command = f"nnUNetv2_train {name} {configuration} FOLD -tr {trainer}"
        raise CMEMSError(f"there is no model folder {folder}{there}; train first with '{command}'.")
    return folder


def export_model(
    model_folder: str, folds: Sequence[str | int], output: str, *, checkpoint: str = CHECKPOINT, member: int | None = None
) -> list[int]:
    """Write the members of trained folds as folds of a stock ``nnUNetTrainer``.

    ``fold_0`` of the output is the first member of the first trained fold, ``fold_1`` its second member,
    and so on through the trained folds. The output appears complete or not at all. Its checkpoints serve
    prediction and ``nnUNetv2_train -pretrained_weights``; a training cannot be continued from them. They
    hold tensors and plain types only (``torch.load(..., weights_only=True)`` reads them).

    Args:
        model_folder: ``<trainer>__<plans>__<configuration>``, with ``plans.json``, ``dataset.json`` and ``fold_X``.
        folds: trained folds: numbers or ``"all"``. A repeated one is exported once.
        output: folder to write; it must not exist or be empty.
        checkpoint: file name of the checkpoint in each fold's folder.
        member: export this member only, counted from 0; ``None``: all of them.

    Returns:
        The numbers of the folds in the output, in order: what ``-f`` of nnU-Net's prediction takes.

    Raises:
        CMEMSError: a file or fold is missing, a checkpoint cannot be read or is not ours, there is no such member or it has another
            architecture than the plans, folds have different numbers of members, the output is not empty or cannot be written.
    """
    output = os.path.abspath(output)
    if os.path.lexists(output) and not (os.path.isdir(output) and not os.listdir(output)):
        raise CMEMSError(f"{output} exists already and is not an empty folder; give another folder with -o, or remove it yourself.")
    files = {str(fold): _checkpoint_file(model_folder, str(fold), checkpoint) for fold in folds}
    for name, needed in _COPIED.items():
        if needed and not os.path.isfile(os.path.join(model_folder, name)):
            raise CMEMSError(f"{os.path.join(model_folder, name)} is missing; nnUNetv2_train writes it, so train first or copy it there.")

    temporary = f"{output}.{uuid.uuid4().hex[:8]}.tmp"
    sources: dict[str, dict[str, Any]] = {}
    counts: dict[str, int] = {}
    try:
        os.makedirs(temporary)
        for fold, file in files.items():
            content = _load(file)
            counts[fold] = count_members(content["network_weights"])
            if member is None and len(set(counts.values())) > 1:
                said = ", ".join(f"fold {key} has {count}" for key, count in counts.items())
                raise CMEMSError(f"the folds differ in the number of networks ({said}) and would be weighted wrongly; export each alone.")
            for index in _chosen(member, counts[fold], file):
                _must_be_of_the_plans(content, index, member, file)
                number = len(sources)
                folder = os.path.join(temporary, f"fold_{number}")
                os.mkdir(folder)
                torch.save(_stock_checkpoint(content, index, number), os.path.join(folder, CHECKPOINT))
                sources[f"fold_{number}"] = {"fold": fold, "member": index, "checkpoint": checkpoint}
        for name in _COPIED:
            if os.path.isfile(os.path.join(model_folder, name)):
                shutil.copyfile(os.path.join(model_folder, name), os.path.join(temporary, name))
        with open(os.path.join(temporary, "exported_from.json"), "w", encoding="utf-8") as out:
            json.dump({"model": os.path.basename(os.path.abspath(model_folder)), "folds": sources}, out, indent=2)
        if os.path.isdir(output):
            os.rmdir(output)
        os.rename(temporary, output)
    except (OSError, RuntimeError) as error:  # torch.save answers a full disk with a RuntimeError
        if isinstance(error, CMEMSError):
            raise
        raise CMEMSError(f"{output} cannot be written ({error}); nothing was left there. Check permissions and free space.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return list(range(len(sources)))


def _checkpoint_file(model_folder: str, fold: str, checkpoint: str) -> str:
    if not os.path.isdir(model_folder):
        raise CMEMSError(f"there is no model folder {model_folder}; train first.")
    folder = os.path.join(model_folder, f"fold_{fold}")
    if not os.path.isdir(folder):
        trained = sorted(entry[5:] for entry in os.listdir(model_folder) if entry.startswith("fold_"))
        there = f"trained folds: {', '.join(trained)}" if trained else "no fold is trained"
        raise CMEMSError(f"there is no folder {folder} ({there}); train fold {fold} first, or correct -f.")
    file = os.path.join(folder, checkpoint)
    if not os.path.isfile(file):
        others = sorted(entry for entry in os.listdir(folder) if entry.endswith(".pth"))
        there = f", or give one of the checkpoints that exist with -chk ({', '.join(others)})" if others else ""
        raise CMEMSError(f"there is no file {file}; finish the training of fold {fold} first{there}.")
    return file


def _load(file: str) -> dict[str, Any]:
    """One of our checkpoints, on the CPU."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=False)  # as nnU-Net itself reads them
    except Exception as error:  # a damaged file raises anything from EOFError to UnpicklingError
        reason = f"{type(error).__name__}: {error}"
        raise CMEMSError(f"{file} cannot be read and may be damaged ({reason}); choose another with -chk or train again.") from error
    if not isinstance(content, dict) or not {"network_weights", "init_args", "trainer_name"} <= set(content):
        raise CMEMSError(f"{file} is not a checkpoint of nnU-Net; choose another with -chk.")
    if count_members(content["network_weights"]) == 0:
        raise CMEMSError(
            f"{file} is a checkpoint of {content['trainer_name']} and holds no networks that teach each other; "
            "only models of nnUNetTrainerCMEMS need an export, so correct -tr."
        )
    return content


def _chosen(member: int | None, count: int, file: str) -> Iterator[int]:
    if member is not None and not 0 <= member < count:
        there = "one network, number 0" if count == 1 else f"{count} networks, numbers 0 to {count - 1}"
        raise CMEMSError(f"there is no network number {member} in {file}, which holds {there}; correct --member.")
    yield from range(count) if member is None else (member,)


def _must_be_of_the_plans(content: Mapping[str, Any], index: int, member: int | None, file: str) -> None:
    """Refuse a member whose architecture is not the one that a stock trainer would build."""
    config = content["init_args"].get("cmems", {}).get("config", {})
    if config.get("architecture") != "mixed" or index % 2 == 0:
        return
    if member is None:
        raise CMEMSError(f"the networks in {file} are of two architectures, of which nnU-Net knows the first; export that with --member 0.")
    raise CMEMSError(f"network number {index} in {file} has another architecture than the plans; export number 0 with --member 0.")


def _stock_checkpoint(content: Mapping[str, Any], member: int, fold: int) -> dict[str, Any]:
    """All keys of a checkpoint of nnU-Net's, of which the state of the training is empty."""
    axes = content.get("inference_allowed_mirroring_axes")
    init_args = {key: value for key, value in content["init_args"].items() if key != "device"}
    return {
        "network_weights": _member_weights(content["network_weights"], member),
        "optimizer_state": None,
        "grad_scaler_state": None,
        "logging": {},
        "_best_ema": None,
        "current_epoch": int(content.get("current_epoch", 0)),
        "init_args": _plain({**init_args, "fold": fold}),
        "trainer_name": STOCK_TRAINER,
        "inference_allowed_mirroring_axes": None if axes is None else tuple(int(axis) for axis in axes),
    }


def _member_weights(weights: Mapping[str, Tensor], member: int) -> dict[str, Tensor]:
    """One member's weights under the names that the plain network gives them.

    nnU-Net's networks name most tensors several times over (``decoder.encoder...``). Copies, which rid
    the file of what a tensor's storage holds besides, are shared as the originals are.
    """
    prefix = f"members.{member}."
    copies: dict[tuple[Any, ...], Tensor] = {}
    plain = {}
    for key, value in weights.items():
        if key.startswith(prefix):
            place = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride(), value.dtype)
            if place not in copies:
                copies[place] = value.detach().to("cpu").clone()
            plain[key[len(prefix) :]] = copies[place]
    return plain


def _plain(value: Any) -> Any:
    """Built-in types in place of numpy's and of anything that ``weights_only=True`` would refuse."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value) if type(value) in (list, tuple) else [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    return str(value)
