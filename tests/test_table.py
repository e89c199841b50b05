"""Tables from nnU-Net's own summaries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.study.table import label_names, main, markdown_table, predictions_table


def predictions(folder: Path, labels: dict[str, object], cases: dict[str, dict[str, float]]) -> str:
    folder.mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    per_case = [
        {"prediction_file": f"/somewhere/{case}.nii.gz", "metrics": {label: {"Dice": dice} for label, dice in found.items()}}
        for case, found in cases.items()
    ]
    (folder / "summary.json").write_text(json.dumps({"metric_per_case": per_case}))
    return str(folder)


def test_mean_and_spread_over_cases(tmp_path: Path) -> None:
    labels = {"background": 0, "wall": 1, "cavity": 2, "ignore": 3}
    folder = predictions(tmp_path / "ours", labels, {"a": {"1": 0.5, "2": 0.7}, "b": {"1": 0.7, "2": float("nan")}})
    row = predictions_table([folder]).splitlines()[-1]
    assert row == "| ours | 2 | 65.0 ± 7.1 | wall 60.0 ± 14.1, cavity 70.0 |"


def test_dots_are_part_of_a_name(tmp_path: Path) -> None:
    labels: dict[str, object] = {"background": 0, "wall": 1}
    folder = predictions(tmp_path / "ours", labels, {"1.2.840.1": {"1": 0.5}, "1.2.840.2": {"1": 0.7}})
    assert predictions_table([folder]).splitlines()[-1] == "| ours | 2 | 60.0 ± 14.1 | wall 60.0 ± 14.1 |"


def test_regions(tmp_path: Path) -> None:
    labels = {"background": 0, "heart": [1, 2], "cavity": 2}
    assert label_names({"labels": labels}) == {"(1, 2)": "heart", "2": "cavity"}
    folder = predictions(tmp_path / "ours", labels, {"a": {"(1, 2)": 0.5, "2": 0.7}})
    assert "heart 50.0, cavity 70.0" in predictions_table([folder])


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = predictions(tmp_path / "ours", {"background": 0, "wall": 1}, {"a": {"1": 0.5}})
    main(["--predictions", folder])
    assert "| ours | 1 | 50.0 | wall 50.0 |" in capsys.readouterr().out


def test_a_folder_without_predictions(tmp_path: Path) -> None:
    with pytest.raises(CMEMSError, match=r"dataset\.json does not exist"):
        predictions_table([str(tmp_path)])
    folder = Path(predictions(tmp_path / "ours", {"background": 0, "wall": 1}, {"a": {"1": 0.5}}))
    (folder / "summary.json").write_text("{")
    with pytest.raises(CMEMSError, match=r"summary\.json cannot be read"):
        predictions_table([str(folder)])


def test_a_row_per_method_over_runs() -> None:
    assert markdown_table({"ours": [{"mean": 0.5}, {"mean": 0.7}]}).splitlines()[-1] == "| ours | 2 | 60.0 ± 14.1 |"
