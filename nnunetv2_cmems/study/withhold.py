"""Make of a labelled data set what somebody with one painted slice has: its other labels are withheld.

The new data set shares the scans with the old one through symbolic links::

    python -m nnunetv2_cmems.study.withhold -d 27 --new 127 --exemplar patient053_frame01:3:z --splits splits_final.json

``imagesTr`` and ``labelsTr`` get the exemplars' cases, their masks with everything but the named slices "not
annotated"; ``imagesUn`` the other training cases of the fold; ``imagesTs`` and ``labelsTs`` its validation
cases, for an examination by ``nnUNetv2_predict`` and ``nnUNetv2_evaluate_folder``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nnunetv2_cmems.config import ExemplarSpec
from nnunetv2_cmems.data.annotation import AXES
from nnunetv2_cmems.data.raw import RawCase, RawDataset, check_header, open_raw
from nnunetv2_cmems.data.sources import FEWEST_CASES_TO_SPLIT, read_splits
from nnunetv2_cmems.errors import CMEMSError, first_line, show_errors_as_sentences
from nnunetv2_cmems.files import some


def withhold(raw: RawDataset, name: str, exemplars: Sequence[ExemplarSpec], training: Sequence[str], test: Sequence[str]) -> str:
    """Write the new data set beside the old one. It appears whole or not at all.

    Args:
        raw: the labelled data set.
        name: ``DatasetXXX_Name`` of the new one.
        exemplars: slices that stay annotated; a case without a slice stays annotated as a whole.
        training: the cases to train with.
        test: the cases to examine with.

    Returns:
        The new folder.

    Raises:
        CMEMSError: the new data set exists, a case does not, or a slice does not; a case is to train and to examine with; or
            the new data set cannot be written.
    """
    folder = os.path.join(os.path.dirname(raw.folder), name)
    if os.path.exists(folder):
        raise CMEMSError(f"{folder} exists already; remove it, or choose another --new.")
    training, test = list(dict.fromkeys(training)), list(dict.fromkeys(test))
    for case in [*training, *test, *(spec.case for spec in exemplars)]:
        if case not in raw.labelled:
            raise CMEMSError(f"{raw.folder} has no labelled case '{case}'; correct the split or --exemplar.")
    both = sorted(set(training) & set(test))
    if both:
        raise CMEMSError(f"the split has {some(both)} in 'train' and in 'val', so the examination would be worth nothing; correct it.")
    by_case: dict[str, list[ExemplarSpec]] = {}
    for spec in exemplars:
        if spec.case not in training:
            raise CMEMSError(f"the exemplar's case '{spec.case}' is no training case of the split; choose another exemplar or fold.")
        by_case.setdefault(spec.case, []).append(spec)
    unfinished = os.path.join(os.path.dirname(raw.folder), f".{name}.{os.getpid()}")
    try:
        _link_scans([raw.labelled[case] for case in by_case], unfinished, "imagesTr")
        _link_scans([raw.labelled[case] for case in training if case not in by_case], unfinished, "imagesUn")
        _link_scans([raw.labelled[case] for case in test], unfinished, "imagesTs")
        for case in test:
            _link(str(raw.labelled[case].label), os.path.join(unfinished, "labelsTs"))
        for case, specs in by_case.items():
            _write_mask(raw, case, specs, os.path.join(unfinished, "labelsTr"))
        content = {**raw.dataset_json, "numTraining": len(by_case)}
        content.pop("dataset", None)
        if any(spec.slice is not None for spec in exemplars) and raw.values.ignore is None:
            content["labels"] = {**content["labels"], "ignore": raw.not_annotated}
        with open(os.path.join(unfinished, "dataset.json"), "w", encoding="utf-8") as file:
            json.dump(content, file, indent=4)
        os.replace(unfinished, folder)
    except OSError as error:
        raise CMEMSError(f"{folder} cannot be written ({first_line(error)}); check permissions and free space.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def parse_exemplar(text: str) -> list[ExemplarSpec]:
    """``case``, ``case:3``, ``case:3,5,7`` or ``case:3,5:y`` as exemplars.

    Raises:
        CMEMSError: anything else.
    """
    match = re.fullmatch(r"([^:]+)(?::(\d+(?:,\d+)*)(?::([xyz]))?)?", text)
    if match is None:
        raise CMEMSError(f"--exemplar '{text}' is none; write case, case:slice, or case:slice,slice:axis, as in patient053_frame01:3:z.")
    case, slices, axis = match.groups()
    if slices is None:
        return [ExemplarSpec(case)]
    return [ExemplarSpec(case, int(i), axis or "z") for i in slices.split(",")]  # type: ignore[arg-type]


def _write_mask(raw: RawDataset, case: str, specs: Sequence[ExemplarSpec], folder: str) -> None:
    """The case's mask with all but the exemplars' slices "not annotated"."""
    raw_case = raw.labelled[case]
    assert raw_case.label is not None
    if any(spec.slice is None for spec in specs):
        _link(raw_case.label, folder)
        return
    reader = raw.reader()
    try:
        check_header(raw_case.label)
        mask, properties = reader.read_seg(raw_case.label)
    except Exception as error:  # the readers raise nearly anything on damaged files
        raise CMEMSError(f"{raw_case.label} cannot be read ({first_line(error)}); repair the file.") from error
    kept = np.full_like(mask[0], raw.not_annotated)
    for spec in specs:
        assert spec.slice is not None
        axis = AXES.index(spec.axis or "z")
        if spec.slice >= kept.shape[axis]:
            raise CMEMSError(f"case '{case}' has no slice {spec.slice} along {AXES[axis]}: it has {kept.shape[axis]} (counted from 0).")
        place = (slice(None),) * axis + (spec.slice,)
        kept[place] = mask[0][place]
    os.makedirs(folder, exist_ok=True)
    reader.write_seg(kept.astype(np.uint8), os.path.join(folder, case + raw.file_ending), properties)


def _link_scans(cases: Sequence[RawCase], folder: str, name: str) -> None:
    for case in cases:
        for path in case.images:
            _link(path, os.path.join(folder, name))


def _link(path: str, folder: str) -> None:
    os.makedirs(folder, exist_ok=True)
    os.symlink(os.path.realpath(path), os.path.join(folder, os.path.basename(path)))


def _read_split(path: str, fold: int) -> Mapping[str, Any]:
    folds = read_splits(path)
    if not 0 <= fold < len(folds):
        raise CMEMSError(f"{path} has no fold {fold} (it has {len(folds)}, counted from 0); name another --splits or --fold.")
    return folds[fold]


def _own_split(raw: RawDataset, fold: int) -> Mapping[str, Any]:
    """nnU-Net's own 5-fold split."""
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    if len(raw.labelled) < FEWEST_CASES_TO_SPLIT or not 0 <= fold < FEWEST_CASES_TO_SPLIT:
        raise CMEMSError(
            f"nnU-Net splits {FEWEST_CASES_TO_SPLIT} labelled cases or more into folds 0 to {FEWEST_CASES_TO_SPLIT - 1}, but {raw.folder} "
            f"has {len(raw.labelled)} and --fold is {fold}; correct --fold, or name a split with --splits."
        )
    split: Mapping[str, Any] = generate_crossval_split(sorted(raw.labelled), seed=12345, n_splits=FEWEST_CASES_TO_SPLIT)[fold]
    return split


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry, see the module's docstring."""
    show_errors_as_sentences()
    parser = argparse.ArgumentParser(prog="python -m nnunetv2_cmems.study.withhold", description=__doc__)
    parser.add_argument("-d", required=True, help="labelled data set, name or id")
    parser.add_argument("--new", type=int, required=True, help="id of the new data set")
    parser.add_argument("--exemplar", nargs="+", default=[], help="what stays annotated: case, case:slice or case:slice,slice:axis")
    parser.add_argument("--splits", help="splits_final.json; without it, nnU-Net's own 5-fold split")
    parser.add_argument("--fold", type=int, default=0, help="fold of the split")
    args = parser.parse_args(arguments)
    raw = open_raw(args.d)
    if args.splits:
        split = _read_split(args.splits, args.fold)
    else:
        split = _own_split(raw, args.fold)
    exemplars = [spec for text in args.exemplar for spec in parse_exemplar(text)]
    name = f"Dataset{args.new:03d}_{raw.name.partition('_')[2]}Withheld"
    print(withhold(raw, name, exemplars, split["train"], split["val"]))


if __name__ == "__main__":
    main()
