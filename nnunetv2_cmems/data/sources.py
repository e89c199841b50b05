"""Where the unlabelled images of a training come from: ``imagesUn``, and training cases whose labels stay unread."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Sequence
from typing import Any

from nnunetv2.paths import nnUNet_raw

from nnunetv2_cmems.data.exemplar import PreprocessedDataset
from nnunetv2_cmems.errors import CMEMSError, clipped
from nnunetv2_cmems.files import read_json

MANIFEST = "cmems_preprocessing.json"
"""File in the unlabelled folder that ``nnUNetv2_cmems plan_and_preprocess`` keeps its books in."""

FEWEST_CASES_TO_SPLIT = 5
"""nnU-Net's cross-validation has this many folds; with fewer labelled cases all of them are used for training."""

_PREPROCESS = "run nnUNetv2_cmems plan_and_preprocess"


def unlabelled_folder(folder: str) -> str:
    """The sibling of a preprocessed folder that holds the scans of ``imagesUn``."""
    return f"{os.path.normpath(folder)}_unlabelled"


def takes_all_annotations(exemplar: Any, folder: str) -> bool:
    """Whether a config's ``exemplar`` means everything that is annotated."""
    return exemplar == "all" or (exemplar == "auto" and os.path.isdir(unlabelled_folder(folder)))


def unlabelled_dataset(dataset: PreprocessedDataset, signature: str | None = None) -> PreprocessedDataset | None:
    """The preprocessed scans of ``imagesUn``; None where the data set has none.

    Args:
        dataset: the labelled cases' folder.
        signature: of the plans, see :func:`~nnunetv2_cmems.data.preprocessing.configuration_signature`; None: not compared.

    Raises:
        CMEMSError: there are scans in ``imagesUn`` that were not preprocessed, preprocessing was interrupted, or was
            done with other plans.
    """
    folder = unlabelled_folder(dataset.folder)
    if not os.path.isdir(folder):
        raw = _raw_scans(dataset)
        if raw:
            raise CMEMSError(f"{raw} has scans that are not preprocessed for this configuration; {_PREPROCESS}.")
        return None
    path = os.path.join(folder, MANIFEST)
    manifest = read_json(path, f"{_PREPROCESS} again")
    if not isinstance(manifest, dict) or "complete" not in manifest:
        raise CMEMSError(f"{path} cannot be read (it lacks 'complete'); {_PREPROCESS} again.")
    complete, made_with = manifest["complete"], manifest.get("configuration_signature", signature)
    if not complete:
        raise CMEMSError(f"the preprocessing of {folder} was interrupted; {_PREPROCESS} again, it goes on where it stopped.")
    if signature is not None and made_with != signature:
        raise CMEMSError(f"{folder} was preprocessed with other plans; {_PREPROCESS} again.")
    return dataclasses.replace(dataset, folder=folder)


def find_unlabelled(
    dataset: PreprocessedDataset,
    training: Sequence[str],
    annotated: Collection[str],
    validation: Collection[str],
    fold: int | str,
    signature: str | None = None,
) -> dict[str, PreprocessedDataset]:
    """The unlabelled cases of a fold, and the preprocessed folder that each lies in; sorted.

    These are the scans of ``imagesUn`` and the training cases that are no exemplars. A list ``"unlabelled"``
    of the fold in ``splits_final.json`` replaces them.

    Args:
        dataset: the labelled cases' folder.
        training: the fold's training cases.
        annotated: the exemplars' cases.
        validation: the fold's validation cases.
        fold: its number, or ``"all"``.
        signature: of the plans, see :func:`unlabelled_dataset`.

    Raises:
        CMEMSError: see :func:`unlabelled_dataset`; a listed case does not exist, is an exemplar or a validation case;
            a scan of ``imagesUn`` is a validation case.
    """
    others = unlabelled_dataset(dataset, signature)
    found = {case: dataset for case in training if case not in annotated}
    if others is not None:
        scans = others.dataset_class.get_identifiers(others.folder)
        _refuse([case for case in scans if case in validation], "imagesUn", "a validation case of the fold")
        _refuse([case for case in scans if case in annotated], "imagesUn", "annotated")
        found.update(dict.fromkeys(scans, others))
    path = os.path.join(os.path.dirname(os.path.normpath(dataset.folder)), "splits_final.json")
    listed = _listed(path, fold)
    if listed is not None:
        missing = [case for case in listed if case not in found and case not in annotated and case not in validation]
        if missing:
            raise CMEMSError(
                f"{path} lists '{clipped(missing[0])}' as unlabelled, which is neither a scan of imagesUn nor a training case; "
                "correct the list."
            )
        _refuse([case for case in listed if case in validation], path, "a validation case of the fold")
        _refuse([case for case in listed if case in annotated], path, "an exemplar")
        found = {case: found[case] for case in listed}
    return dict(sorted(found.items()))


def _refuse(cases: Sequence[str], where: str, what: str) -> None:
    if cases:
        raise CMEMSError(f"'{cases[0]}' is an unlabelled case ({where}) and {what} at once; take it out of one of them.")


def read_splits(path: str) -> list[dict[str, Any]]:
    """The folds of a ``splits_final.json``.

    Raises:
        CMEMSError: it cannot be read, or is no list of folds whose ``"train"`` and ``"val"`` (and ``"unlabelled"``, if it is
            there) are lists of case names.
    """
    content = read_json(path, "correct it, or delete it to have it made again")
    if content == {}:  # no folds, also for nnU-Net
        return []
    if not isinstance(content, list) or not all(isinstance(fold, dict) and "train" in fold and "val" in fold for fold in content):
        raise CMEMSError(f"{path} is no list of folds with 'train' and 'val'; correct or remove it.")
    for number, fold in enumerate(content):
        for key in ("train", "val", "unlabelled"):
            cases = fold.get(key, [])
            if not (isinstance(cases, list) and all(isinstance(case, str) for case in cases)) and (key, cases) != ("unlabelled", None):
                raise CMEMSError(f"{path}: '{key}' of fold {number} must be a list of case names; correct it.")
    return content


def check_split(path: str, fold: int, dataset: PreprocessedDataset) -> None:
    """Refuse a ``splits_final.json`` that nnU-Net would stumble over, at once or in the middle of a training.

    Args:
        path: the file.
        fold: the fold to be trained; where the file has fewer, nnU-Net draws a split of its own.
        dataset: the labelled cases' folder.

    Raises:
        CMEMSError: see :func:`read_splits`; or the fold has no training case, or one that is not preprocessed, or a
            validation case that is not preprocessed or has no label.
    """
    splits = read_splits(path)
    if fold >= len(splits):
        return
    if not splits[fold]["train"]:
        raise CMEMSError(f"{path}: 'train' of fold {fold} is empty; name at least one training case.")
    labelled = set(dataset.dataset_class.get_identifiers(dataset.folder))
    others = unlabelled_folder(dataset.folder)
    scans = set(dataset.dataset_class.get_identifiers(others)) if os.path.isdir(others) else set()
    for key, known in (("train", labelled | scans), ("val", labelled)):
        wrong = [case for case in splits[fold][key] if case not in known]
        if wrong:
            what = "has no label" if wrong[0] in scans else f"is not preprocessed in {dataset.folder}"
            raise CMEMSError(
                f"{path}: '{key}' of fold {fold} names '{clipped(wrong[0])}', which {what}; correct the name, or take it out."
            )


def _listed(path: str, fold: int | str) -> list[str] | None:
    """The cases that ``splits_final.json`` lists as unlabelled for a fold; None where it does not."""
    if fold == "all" or not os.path.isfile(path):
        return None
    splits = read_splits(path)
    listed: list[str] | None = splits[int(fold)].get("unlabelled") if int(fold) < len(splits) else None
    return listed


def _raw_scans(dataset: PreprocessedDataset) -> str | None:
    """The raw folder ``imagesUn`` of a preprocessed data set, if it exists and has scans."""
    if not nnUNet_raw.is_set():
        return None
    name = os.path.basename(os.path.dirname(os.path.abspath(dataset.folder)))
    folder = os.path.join(nnUNet_raw.get(), name, "imagesUn")
    if os.path.isdir(folder) and any(entry.endswith(dataset.file_ending) for entry in os.listdir(folder)):
        return folder
    return None
