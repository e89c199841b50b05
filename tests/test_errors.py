"""An error of ours ends a process with one sentence; every other one keeps its traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nnunetv2_cmems.errors import CMEMSError, show_errors_as_sentences

HEAD = "import sys\nfrom nnunetv2_cmems.errors import CMEMSError, show_errors_as_sentences\n"


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", HEAD + code], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("calls", [1, 3])
def test_our_error_is_one_sentence(calls: int) -> None:
    done = run(
        f"for _ in range({calls}): show_errors_as_sentences()\n"
        "class Special(CMEMSError): pass\n"
        "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise Special('tau is 2; write less.') from error"
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "nnunetv2-cmems: tau is 2; write less."
    assert done.stdout == ""


def test_other_errors_keep_their_traceback() -> None:
    done = run("show_errors_as_sentences()\nraise RuntimeError('odd')")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and "RuntimeError: odd" in done.stderr
    assert "nnunetv2-cmems:" not in done.stderr


def test_other_errors_reach_the_hook_that_was_there_before(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: seen.append(error))
    show_errors_as_sentences()
    hook = sys.excepthook
    show_errors_as_sentences()
    assert sys.excepthook is hook, "calling it twice changes nothing"
    other, ours = ValueError("x"), CMEMSError("y")
    hook(ValueError, other, None)
    hook(CMEMSError, ours, None)
    assert seen == [other]
    assert capsys.readouterr().err == "nnunetv2-cmems: y\n"


@pytest.mark.parametrize(
    ("trainer", "name", "expected"),
    [
        ("nnUNetTrainerCMEMS", "nnUNetPlans.json", True),
        ("nnUNetTrainer", "nnUNetPlans.json", False),
        ("nnUNetTrainerCMEMS", "a.pkl", False),
    ],
)
def test_a_data_set_that_is_not_planned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, trainer: str, name: str, expected: bool
) -> None:
    seen: list[BaseException] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: seen.append(error))
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "27", "2d", "0", "-tr", trainer])
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    show_errors_as_sentences()
    path = str(tmp_path / "Dataset027_X" / name)
    sys.excepthook(FileNotFoundError, FileNotFoundError(2, "No such file or directory", path), None)
    said = capsys.readouterr().err
    assert (f"{path} does not exist" in said and "nnUNetv2_cmems plan_and_preprocess" in said) == expected
    assert bool(seen) != expected
