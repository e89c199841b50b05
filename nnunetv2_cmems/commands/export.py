"""``nnUNetv2_cmems export``: a model folder that a stock nnU-Net, without this package, predicts with.

The members become folds of a plain ``nnUNetTrainer``. Our own prediction takes the mean of the members as
nnU-Net takes the mean of folds, rounding included, so one trained fold and its export predict the same
to the last voxel, but for the refinement that ours adds where the training says so (``refine_predictions``).
Several trained folds that are exported together are averaged in another order, in nnU-Net's half precision:
voxels whose two best classes tie can then come out either way.

With ``--distil`` the members teach one network, which is exported alone: its prediction costs what one network's costs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnunetv2_cmems.commands.device import check_device
from nnunetv2_cmems.errors import CMEMSError, first_line
from nnunetv2_cmems.files import OURS, find_dataset, read_json
from nnunetv2_cmems.method.networks import count_members, shapes

HELP = "Write a model folder that nnU-Net predicts with, also where this package is not installed."

STOCK_TRAINER = "nnUNetTrainer"
CHECKPOINT = "checkpoint_final.pth"
"""Name of every exported checkpoint, nnU-Net's default, whichever checkpoint it was made from."""

DISTIL_STEPS = 300

_SOURCES = "exported_from.json"
_COPIED = {"plans.json": True, "dataset.json": True, "dataset_fingerprint.json": False}  # file -> is it needed?
_LISTS_SCANS = {"dataset.json": "dataset", "dataset_fingerprint.json": OURS}  # file -> the key that does


class Exported(NamedTuple):
    """What an export has written.

    Attributes:
        folds: the numbers of the folds in the output, in order: what ``-f`` of nnU-Net's prediction takes.
        left_out: trained fold and member of each network that could not be exported, as ``exported_from.json`` has it.
    """

    folds: list[int]
    left_out: list[dict[str, Any]]


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
    distil = parser.add_argument_group("one network in place of several")
    distil.add_argument(
        "--distil", action="store_true",
        help="train one network on the same scans, without labels, to predict what all of them predict together, and export it alone",
    )  # fmt: skip
    distil.add_argument(
        "--distil-steps", type=_positive, default=DISTIL_STEPS, metavar="N", help="length of its training. Default: %(default)s steps"
    )
    distil.add_argument("--seed", type=int, metavar="N", help="seed of its training. Default: a fresh one")
    distil.add_argument("-device", choices=("cuda", "cpu", "mps"), default="cuda", help="where to train it. Default: %(default)s")


def run(args: argparse.Namespace) -> None:
    """Export what the command line names, and say how to predict with it.

    Raises:
        CMEMSError: see :func:`find_model_folder`, :func:`export_model` and :func:`export_student`.
    """
    if args.distil and args.member is not None:
        raise CMEMSError("--distil makes one network of all, --member chooses one of them; leave one of the two out.")
    model_folder = find_model_folder(args.d, args.tr, args.p, args.c)
    if args.distil:
        exported = export_student(
            model_folder, args.f, args.o, checkpoint=args.chk, steps=args.distil_steps, device=args.device, seed=args.seed
        )
    else:
        exported = export_model(model_folder, args.f, args.o, checkpoint=args.chk, member=args.member)
    folds, left_out = exported.folds, len(exported.left_out)
    if left_out:
        print(
            f"Left out: {left_out} network{'s' if left_out > 1 else ''} of another architecture than the plans, which a stock nnU-Net "
            "cannot build. export --distil writes one network that has learned from all of them."
        )
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
) -> Exported:
    """Write the members of trained folds as folds of a stock ``nnUNetTrainer``.

    ``fold_0`` of the output is the first member of the first trained fold, ``fold_1`` its second member,
    and so on through the trained folds. The output appears complete or not at all. Its checkpoints serve
    prediction and ``nnUNetv2_train -pretrained_weights``; a training cannot be continued from them. They
    hold tensors and plain types only (``torch.load(..., weights_only=True)`` reads them), and neither they nor the files beside them name
    a scan of the training. Members of another architecture than
    the plans' are left out, as a stock nnU-Net cannot build them; :func:`export_student` is for these.

    Args:
        model_folder: ``<trainer>__<plans>__<configuration>``, with ``plans.json``, ``dataset.json`` and ``fold_X``.
        folds: trained folds: numbers or ``"all"``. A repeated one is exported once.
        output: folder to write; it must not exist or be empty.
        checkpoint: file name of the checkpoint in each fold's folder.
        member: export this member only, counted from 0; ``None``: all of them.

    Raises:
        CMEMSError: a file or fold is missing, a checkpoint cannot be read or is not ours, there is no such member or it has another
            architecture than the plans, folds have different numbers of members, the output is not empty or cannot be written.
    """
    files = _checkpoint_files(model_folder, folds, checkpoint)
    sources: dict[str, dict[str, Any]] = {}
    counts: dict[str, int] = {}
    left_out: list[dict[str, Any]] = []
    with _model_folder(output, model_folder, sources, left_out) as temporary:
        for fold, file in files.items():
            content = _load(file)
            counts[fold] = count_members(content["network_weights"])
            if member is None:
                _must_weigh_the_same(counts)
            for index in _chosen(member, counts[fold], file):
                if not _is_of_the_plans(content["network_weights"], index):
                    if member is None:
                        left_out.append({"fold": fold, "member": index})
                        continue
                    raise CMEMSError(
                        f"network number {index} in {file} has another architecture than the plans; export number 0 with --member 0, or "
                        "with --distil one network that all have taught."
                    )
                number = len(sources)
                _write_fold(temporary, number, _stock_checkpoint(content, index, number), output)
                sources[f"fold_{number}"] = {"fold": fold, "member": index, "checkpoint": checkpoint}
    return Exported(list(range(len(sources))), left_out)


def export_student(
    model_folder: str,
    folds: Sequence[str | int],
    output: str,
    *,
    checkpoint: str = CHECKPOINT,
    steps: int = DISTIL_STEPS,
    device: str = "cuda",
    seed: int | None = None,
) -> Exported:
    """Train one network to predict what the members of trained folds predict together, and write it as the one fold of a stock model.

    It has the plans' architecture, also where members have others. It learns on the scans of the training, which must still be
    in ``nnUNet_preprocessed``: the unlabelled ones that ``cmems_config.json`` in the fold's folder lists, and the exemplars'.

    Args:
        model_folder: see :func:`export_model`, as are ``folds``, ``output`` and ``checkpoint``.
        steps: length of its training.
        device: where to train it: ``cpu``, ``cuda`` or ``mps``.
        seed: of its training; None: a fresh one.

    Raises:
        CMEMSError: see :func:`export_model` and :func:`~nnunetv2_cmems.trainers.distillation.distil`; there is but one network, no
            unlabelled scan, or no such device.
    """
    check_device(device)
    files = _checkpoint_files(model_folder, folds, checkpoint)
    contents = {fold: _load(file) for fold, file in files.items()}
    counts = {fold: count_members(content["network_weights"]) for fold, content in contents.items()}
    _must_weigh_the_same(counts)
    if sum(counts.values()) < 2:
        raise CMEMSError(f"{next(iter(files.values()))} holds one network, so that there is nothing to distil; export it without --distil.")
    cases = {case for fold, file in files.items() for case in _scans(os.path.dirname(file), contents[fold])}

    from nnunetv2_cmems.trainers.distillation import distil  # takes seconds, which the other exports need not wait

    sources: dict[str, dict[str, Any]] = {}
    with _model_folder(output, model_folder, sources) as temporary:
        first = next(iter(contents.values()))
        weights = [content["network_weights"] for content in contents.values()]
        student = distil(weights, first["init_args"], cases, steps=steps, device=device, seed=seed)
        _write_fold(temporary, 0, _stock_checkpoint({**first, "network_weights": student}, 0, 0), output)
        taught = [{"fold": fold, "members": count, "checkpoint": checkpoint} for fold, count in counts.items()]
        sources["fold_0"] = {"distilled_from": taught, "scans": len(cases), "steps": steps, "seed": seed}
    return Exported([0], [])


@contextlib.contextmanager
def _model_folder(
    output: str, model_folder: str, sources: Mapping[str, Any], left_out: Sequence[Mapping[str, Any]] = ()
) -> Iterator[str]:
    """A temporary folder, which becomes ``output`` if the block ends well; else nothing is left.

    Args:
        output: where the folder goes.
        model_folder: plans and the like are copied from here.
        sources: for ``exported_from.json``, as ``left_out``; read at the end.
        left_out: networks that could not be exported.

    Raises:
        CMEMSError: ``output`` is not empty or cannot be written, or the model folder lacks a file.
    """
    output = os.path.abspath(output)
    if os.path.lexists(output) and not (os.path.isdir(output) and not os.listdir(output)):
        raise CMEMSError(f"{output} exists already and is not an empty folder; give another folder with -o, or remove it yourself.")
    for name, needed in _COPIED.items():
        if needed and not os.path.isfile(os.path.join(model_folder, name)):
            raise CMEMSError(f"{os.path.join(model_folder, name)} is missing; nnUNetv2_train writes it, so train first or copy it there.")
    temporary = f"{output}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with _writing(output):
            os.makedirs(temporary)
        yield temporary
        with _writing(output):
            for name in _COPIED:
                if os.path.isfile(os.path.join(model_folder, name)):
                    _copy_without_names(os.path.join(model_folder, name), os.path.join(temporary, name))
            with open(os.path.join(temporary, _SOURCES), "w", encoding="utf-8") as out:
                model = os.path.basename(os.path.abspath(model_folder))
                json.dump({"model": model, "folds": sources, "left_out": list(left_out)}, out, indent=2)
            if os.path.isdir(output):
                os.rmdir(output)
            os.rename(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy_without_names(source: str, target: str) -> None:
    """Copy one of nnU-Net's files, but for what lists scans: their names are patients' names at times, and of no use in predictions."""
    key = _LISTS_SCANS.get(os.path.basename(source), "")
    content = read_json(source, "restore the file, or train again") if key else {}
    if key not in content:
        shutil.copyfile(source, target)
        return
    with open(target, "w", encoding="utf-8") as out:
        json.dump(_without(content, key), out, indent=4)


def _without(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != key}


@contextlib.contextmanager
def _writing(output: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save answers a full disk with a RuntimeError
        raise CMEMSError(f"{output} cannot be written ({error}); nothing was left there. Check permissions and free space.") from error


def _write_fold(folder: str, number: int, content: Mapping[str, Any], output: str) -> None:
    with _writing(os.path.abspath(output)):
        os.mkdir(os.path.join(folder, f"fold_{number}"))
        torch.save(content, os.path.join(folder, f"fold_{number}", CHECKPOINT))


def _checkpoint_files(model_folder: str, folds: Sequence[str | int], checkpoint: str) -> dict[str, str]:
    return {str(fold): _checkpoint_file(model_folder, str(fold), checkpoint) for fold in folds}


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
        from nnunetv2_cmems.trainers.resume import read_checkpoint  # takes seconds, which a wrong argument need not wait for

        content = read_checkpoint(file)
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


def _must_weigh_the_same(counts: Mapping[str, int]) -> None:
    if len(set(counts.values())) > 1:
        said = ", ".join(f"fold {fold} has {count}" for fold, count in counts.items())
        raise CMEMSError(f"the folds differ in the number of networks ({said}) and would be weighted wrongly; export each alone.")


def _chosen(member: int | None, count: int, file: str) -> Iterator[int]:
    if member is not None and not 0 <= member < count:
        there = "one network, number 0" if count == 1 else f"{count} networks, numbers 0 to {count - 1}"
        raise CMEMSError(f"there is no network number {member} in {file}, which holds {there}; correct --member.")
    yield from range(count) if member is None else (member,)


def _is_of_the_plans(weights: Mapping[str, Tensor], index: int) -> bool:
    """Whether a stock trainer would build a member's architecture: the first member's is that of the plans."""
    return shapes(weights, "members.0.") == shapes(weights, f"members.{index}.")


def _scans(folder: str, content: Mapping[str, Any]) -> set[str]:
    """The cases that a fold was trained on: without their labels, and the exemplars'."""
    path = os.path.join(folder, "cmems_config.json")
    try:
        with open(path, encoding="utf-8") as file:
            unlabelled = list(json.load(file)["unlabelled"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CMEMSError(
            f"{path}, which lists the scans that a student learns on, cannot be read ({first_line(error)}); restore it, or export without "
            "--distil."
        ) from error
    if not unlabelled:
        raise CMEMSError(f"{path} lists no unlabelled scans, which a student would learn on; export without --distil.")
    from nnunetv2_cmems.trainers.cmems import RECORD  # as in _load, which has imported it

    return {*unlabelled, *(exemplar["case"] for exemplar in content["init_args"].get(RECORD, {}).get("exemplars", []))}


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _stock_checkpoint(content: Mapping[str, Any], member: int, fold: int) -> dict[str, Any]:
    """All keys of a checkpoint of nnU-Net's, of which the state of the training is empty."""
    from nnunetv2_cmems.trainers.cmems import RECORD  # as in _load, which has imported it
    from nnunetv2_cmems.trainers.resume import RANDOM, plain

    axes = content.get("inference_allowed_mirroring_axes")
    init_args = {key: value for key, value in content["init_args"].items() if key not in ("device", RANDOM, RECORD)}
    init_args["dataset_json"] = _without(init_args["dataset_json"], _LISTS_SCANS["dataset.json"])
    return {
        "network_weights": _member_weights(content["network_weights"], member),
        "optimizer_state": None,
        "grad_scaler_state": None,
        "logging": {},
        "_best_ema": None,
        "current_epoch": int(content.get("current_epoch", 0)),
        "init_args": plain({**init_args, "fold": fold}),
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
