"""Whatever stands in ``splits_final.json``: nnU-Net's split, or one sentence; every reader of the file says the same."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import CASES, TRAINING, VALIDATION, Workspace
from fuzzing import JSON, Outcomes, changed, check_sentence, damaged_file, examples
from hypothesis import given
from hypothesis import strategies as st
from test_sources import move_to_unlabelled

from nnunetv2_cmems.commands.plan_and_preprocess import _check_splits
from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.study.withhold import _read_split, withhold

SCANS = TRAINING[2:]
"""Lie in imagesUn."""

LABELLED = [case for case in CASES if case not in SCANS]
NAMES = st.sampled_from([*CASES, "nobody"])
FOLDS = st.one_of(
    st.sampled_from(
        [
            {"train": TRAINING, "val": VALIDATION},
            {"train": TRAINING[:2], "val": VALIDATION, "unlabelled": SCANS[:1]},
            {"train": TRAINING[:2], "val": VALIDATION, "unlabelled": VALIDATION[:1]},
            {"train": TRAINING[:2], "val": VALIDATION, "unlabelled": TRAINING[:1]},
            {"train": TRAINING[:1], "val": [], "unlabelled": None},
            {"train": LABELLED, "val": LABELLED},
        ]
    ),
    st.fixed_dictionaries(
        {"train": st.lists(NAMES, max_size=5), "val": st.lists(NAMES, max_size=3)}, optional={"unlabelled": st.lists(NAMES, max_size=3)}
    ),
)
CONTENTS = st.lists(FOLDS, max_size=3).flatmap(lambda folds: changed(folds, st.one_of(JSON, st.sampled_from(CASES)), most=2))


def expected(content: Any, fold: int) -> tuple[list[str], list[str]] | str | None:
    """What nnU-Net makes of a file's content, "drawn" where it has fewer folds; None where it is a mistake."""
    if content == {}:
        return "drawn"
    if not isinstance(content, list):
        return None
    for entry in content:
        if not isinstance(entry, dict) or not {"train", "val"} <= set(entry):
            return None
        for cases in (entry["train"], entry["val"], entry.get("unlabelled") or []):
            if not isinstance(cases, list) or not all(isinstance(case, str) for case in cases):
                return None
        if entry.get("unlabelled", None) is not None and not isinstance(entry["unlabelled"], list):
            return None
    if fold >= len(content):
        return "drawn"
    train, val = content[fold]["train"], content[fold]["val"]
    return (train, val) if train and set(train) <= set(CASES) and set(val) <= set(LABELLED) else None


@pytest.fixture
def splits(workspace: Workspace) -> Path:
    """The file of a data set with two scans in imagesUn."""
    move_to_unlabelled(workspace, SCANS)
    return workspace.base / "splits_final.json"


def test_any_split(workspace: Workspace, splits: Path) -> None:
    trainer = workspace.make()
    dataset = trainer.preprocessed_dataset()
    raw: Any = SimpleNamespace(unlabelled={})
    outcomes, unlabelled = Outcomes(), Outcomes()

    @examples(150)
    @given(CONTENTS, st.sampled_from([0, 0, 1]), st.data())
    def check(content: Any, fold: int, data: st.DataObject) -> None:
        splits.write_bytes(data.draw(damaged_file(content), "bytes of the file"))
        try:
            content = json.loads(splits.read_text())
        except (ValueError, RecursionError):
            content = None
        trainer.fold = fold
        said = expected(content, fold)
        found = outcomes.of(trainer.do_split, str(splits))
        assert found == said if said != "drawn" else found is not None
        for reads in (lambda: _check_splits(str(splits), raw), lambda: _read_split(str(splits), fold)):
            try:
                reads()
            except CMEMSError as error:
                check_sentence(str(error), str(splits))
                assert said is None or (said == "drawn" and "has no fold" in str(error))
        if found is not None:
            training, validation = found
            used = unlabelled.of(lambda: trainer._find_unlabelled(dataset, training, training[:1], validation))
            assert used is None or (set(used) <= set(CASES) - set(training[:1]) and list(used) == sorted(used))

    check()
    outcomes.check()
    unlabelled.check(0.05)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"a": 1}', "no list of folds"),
        ('[{"train": []}]', "no list of folds"),
        ('[{"train": [], "val": []}]', "'train' of fold 0 is empty"),
        ('[{"train": "phantom_tr000", "val": []}]', "'train' of fold 0 must be a list"),
        ('[{"train": ["phantom_tr000"], "val": [["phantom_tr001"]]}]', "'val' of fold 0 must be a list"),
        ('[{"train": ["phantom_tr000", "nobody"], "val": []}]', "'train' of fold 0 names 'nobody', which is not preprocessed"),
        ('[{"train": ["phantom_tr000"], "val": ["phantom_tr002"]}]', "'val' of fold 0 names 'phantom_tr002', which has no label"),
        ('[{"train": ["phantom_tr000"], "val": []}, {"train": 0, "val": []}]', "'train' of fold 1 must be a list"),
    ],
)
def test_split_that_was_found_by_fuzzing(workspace: Workspace, splits: Path, content: str, said: str) -> None:
    trainer = workspace.make()
    splits.write_text(content)
    with pytest.raises(CMEMSError) as caught:
        trainer.do_split()
    check_sentence(str(caught.value), str(splits), said)


def test_folder_in_place_of_the_splits(workspace: Workspace, splits: Path) -> None:
    trainer = workspace.make()
    splits.unlink()
    splits.mkdir()
    with pytest.raises(CMEMSError) as caught:
        trainer.do_split()
    check_sentence(str(caught.value), str(splits))


def test_withheld_cases_are_named_once_and_on_one_side(tmp_path: Path) -> None:
    raw: Any = SimpleNamespace(folder=str(tmp_path / "Dataset027_A"), labelled=dict.fromkeys("abc"))
    with pytest.raises(CMEMSError) as caught:
        withhold(raw, "Dataset127_B", [], ["a", "a", "b"], ["b", "c"])
    check_sentence(str(caught.value), "'b' in 'train' and in 'val'")
    assert list(tmp_path.iterdir()) == []
