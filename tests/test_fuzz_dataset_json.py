"""Whatever stands in ``dataset.json``: everything that reads it gets on with it, or one sentence says what is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from batchgenerators.utilities.file_and_folder_operations import load_json
from conftest import Workspace
from few_labels import LABELLED, NAME, few, paint, refusal
from fuzzing import Outcomes, changed, check_sentence, damaged_file, examples
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

from nnunetv2_cmems.commands.plan_and_preprocess import plan_and_preprocess
from nnunetv2_cmems.commands.suggest import _explain, _write_label_tables, add_ignore_label, suggest, write_suggestion
from nnunetv2_cmems.data.raw import RawDataset, open_raw
from nnunetv2_cmems.errors import show_errors_as_sentences

PLAIN = {"background": 0, "wall": 1, "left cavity": 2, "right cavity": 3}
REGIONS = {"background": 0, "heart": [1, 2, 3], "cavities": [2, 3], "right cavity": 3}
REST = {"channel_names": {"0": "MRI"}, "numTraining": 6, "file_ending": ".nii.gz"}
VALID: list[dict[str, Any]] = [
    {"labels": PLAIN, **REST},
    {"labels": {**PLAIN, "ignore": 4}, **REST, "overwrite_image_reader_writer": "NibabelIO"},
    {"labels": REGIONS, "regions_class_order": [1, 2, 3], **REST},
    {"labels": {**REGIONS, "ignore": 4}, "regions_class_order": [1, 2, 3], **REST, "overwrite_image_reader_writer": "SimpleITKIO"},
    {"labels": PLAIN, "modality": {"0": "CT"}, "file_ending": ".nii.gz", "description": "x", "licence": None},
]
CONTENTS = st.sampled_from(VALID).flatmap(lambda content: changed(content, most=2))


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = few(tmp_path, monkeypatch)
    paint(folder, LABELLED, (0, 2))
    return folder


def heads(labels: dict[str, Any]) -> int:
    """Foreground heads of nnU-Net's network."""
    values = {name: value if isinstance(value, list) else [value] for name, value in labels.items() if name != "ignore"}
    every = {part for value in values.values() for part in value}
    assert every == set(range(len(every))) and labels.get("ignore", len(every)) == len(every)
    if any(len(value) > 1 for value in values.values()):
        return sum(set(value) != {0} for value in values.values())
    return len(every) - 1


def test_any_description_of_a_raw_data_set(raw: Path, tmp_path: Path) -> None:
    path, output = raw / "dataset.json", tmp_path / "output"
    output.mkdir()
    outcomes = Outcomes()

    def read() -> RawDataset:
        dataset = open_raw(27, require_labels=False)
        _ = dataset.reader_class
        return dataset

    @examples(80)
    @given(CONTENTS.flatmap(damaged_file))
    def check(data: bytes) -> None:
        path.write_bytes(data)
        dataset = outcomes.of(read, str(raw))
        if dataset is None:
            return
        heads(dataset.dataset_json["labels"])
        _write_label_tables(dataset, str(output))
        before = dataset.not_annotated
        added = add_ignore_label(dataset)
        again = read()
        assert again.values.ignore == before and (added is None) == (dataset.values.ignore is not None)
        assert dict(again.values.names) == dict(dataset.values.names)

    check()
    outcomes.check()


def test_any_description_of_a_preprocessed_data_set(workspace: Workspace) -> None:
    outcomes = Outcomes()

    @examples(80)
    @given(CONTENTS.filter(bool))
    def check(content: Any) -> None:
        trainer = outcomes.of(lambda: workspace.make(dataset_json=content), str(workspace.base / "dataset.json"))
        if trainer is None:
            return
        assert len(trainer.label_space.names) == heads(content["labels"])
        assert len(trainer.preprocessed_dataset().class_names) == len({str(value) for value in content["labels"].values()}) - 1 - (
            "ignore" in content["labels"]
        )
        assert trainer._class_names()[0] == "background"
        assert determine_num_input_channels(trainer.plans_manager, trainer.configuration_manager, content) == 1

    check()
    outcomes.check()


def test_any_description_and_the_whole_commands(raw: Path, tmp_path: Path) -> None:
    path, outcomes = raw / "dataset.json", Outcomes()
    suggested = tmp_path / "suggested"
    suggested.mkdir()

    def run() -> str:
        plan_and_preprocess(27, ["2d"])
        dataset = open_raw(27)
        (best,) = suggest(dataset, 1)
        return _explain(dataset, [write_suggestion(1, best, dataset, str(suggested))], "", [], str(suggested))

    @examples(5)
    @given(st.sampled_from([VALID[1], VALID[3]]).flatmap(lambda content: changed(content, most=1)))
    def check(content: Any) -> None:
        path.write_text(json.dumps(content))
        text = outcomes.of(run)
        assert text is None or NAME in text

    check()
    outcomes.check(0.1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels": {**PLAIN, "again": 1, "ignore": 4}}, "two names have the same value"),
        ({"labels": {**PLAIN, "right cavity": 2.5}}, "the value of 'right cavity' must be a whole number"),
        ({"labels": {**PLAIN, "right cavity": "3"}}, "the value of 'right cavity' must be a whole number"),
        ({"labels": {**PLAIN, "right cavity": True}}, "the value of 'right cavity' must be a whole number"),
        ({"labels": {**PLAIN, "more": []}}, "the value of 'more' must be a whole number"),
        ({"labels": {**PLAIN, "a\nb": 4}}, "\"a\\nb\" is no name for a label"),
        ({"labels": {**PLAIN, "": 4}}, "\"\" is no name for a label"),
        ({"labels": {**PLAIN, "\ud800": 4}}, "\"\\ud800\" is no name for a label"),
        ({"labels": {**PLAIN, "ignore": [4]}}, "the value of 'ignore' must be 4, one more than the highest label value, not [4]"),
        ({"labels": {**PLAIN, "background": [0]}}, "'background' must be there, with the value 0"),
        ({"labels": REGIONS, "regions_class_order": [1, 2, "3"]}, "'regions_class_order' must be a list of label values"),
        ({"labels": REGIONS, "regions_class_order": 3}, "nnU-Net cannot use the labels"),
        ({"channel_names": {"0": 5}}, "channel 0 a name"),
        ({"modality": 5}, "'channel_names' and 'modality' differ"),
        ({"modality": {"0": "CT", "1": "MR"}}, "'channel_names' and 'modality' differ"),
        ({"overwrite_image_reader_writer": 5}, "'overwrite_image_reader_writer' must name"),
        ({"overwrite_image_reader_writer": "sitk"}, "'overwrite_image_reader_writer' is \"sitk\", which is no reader"),
        ({"overwrite_image_reader_writer": "BaseReaderWriter"}, "which is no reader"),
        ({"dataset": {"a": {"images": [], "label": "labelsTr/a.nii.gz"}}}, "'dataset' must give 'images'"),
        ({"dataset": {"../a": {"images": ["x"], "label": "labelsTr/a.nii.gz"}}}, "'../a' in 'dataset' cannot name a file"),
    ],
)
def test_description_that_was_found_by_fuzzing(raw: Path, changes: dict[str, Any], said: str) -> None:
    path = raw / "dataset.json"
    path.write_text(json.dumps({**VALID[0], **changes}))
    check_sentence(refusal(lambda: plan_and_preprocess(27, ["2d"])), str(path), said)


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "\x00", '{"a": 1' + "1" * 5000 + "}"])
def test_description_that_nnunet_cannot_read(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    """nnU-Net reads it before it makes a trainer."""
    path, seen, said = workspace.base / "dataset.json", [], []
    path.write_text(content)
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: seen.append(error))
    monkeypatch.setattr(sys.stderr, "write", said.append)
    show_errors_as_sentences()
    for trainer in ("nnUNetTrainerCMEMS", "nnUNetTrainer"):
        monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "902", "2d", "0", "-tr", trainer])
        try:
            load_json(str(path))
        except (ValueError, RecursionError) as error:
            sys.excepthook(type(error), error, error.__traceback__)
    assert len(seen) == 1, "another trainer's errors are nobody's business"
    check_sentence("".join(said).removeprefix("nnunetv2-cmems: ").strip(), str(path))
