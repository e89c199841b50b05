"""``nnUNetv2_cmems benchmark``: the command with made-up trainings, and once with real ones, one of which is killed."""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import CASES, CONFIGURATION, DATASET, DATASET_ID, VALIDATION, Workspace

from nnunetv2_cmems.commands import benchmark
from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.study import comparison, launch, run
from nnunetv2_cmems.study.launch import Outcome
from nnunetv2_cmems.study.run import RunSpec

OURS = "nnUNetTrainerCMEMS"


class Benchmarks:
    """The command on the test's data set, with trainings that take no time.

    Attributes:
        trained: keys of the runs that were trained, in order.
        failing: keys of those that fail.
        baselines: what the tables were asked to compare with.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.trained: list[str] = []
        self.failing: set[str] = set()
        self.baselines: list[str | None] = []
        self.jobs: int | None = None

    @property
    def folder(self) -> Path:
        return self.workspace.results / DATASET / f"cmems_benchmark__nnUNetPlans__{CONFIGURATION}__fold_0"

    @property
    def content(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "benchmark.json").read_text())
        return found

    def __call__(self, *words: str, device: str = "cpu") -> None:
        parser = argparse.ArgumentParser()
        benchmark.add_arguments(parser)
        benchmark.run(parser.parse_args(["-d", str(DATASET_ID), "-c", CONFIGURATION, "-device", device, *words]))

    def run_local(self, specs: Sequence[RunSpec], folder: str, jobs: int = 1) -> list[Outcome]:
        self.jobs = jobs
        return [self.work(spec, folder) for spec in specs if not launch.is_done(spec, folder)]

    def work(self, spec: RunSpec, folder: str) -> Outcome:
        self.trained.append(spec.key)
        there = Path(run.run_folder(folder, spec))
        there.mkdir(parents=True, exist_ok=True)
        bad = spec.key in self.failing
        record = {"spec": vars(spec), "state": "failed" if bad else "finished", "started": "now"}
        (there / run.RECORD).write_text(json.dumps(record))
        if bad:
            return Outcome(spec.key, "RuntimeError: out of luck")
        summary = Path(run.fold_folder(str(there))) / "validation" / "summary.json"
        summary.parent.mkdir(parents=True)
        summary.write_text("{}")
        (there / run.METRICS).write_text("")
        return Outcome(spec.key)

    def write_tables(self, folder: str, baseline: str | None = None) -> str:
        self.baselines.append(baseline)
        return "| the | table |"


@pytest.fixture
def bench(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Benchmarks:
    made = Benchmarks(workspace)
    (workspace.base / "cmems.json").unlink()
    workspace.results.mkdir()
    monkeypatch.setattr(launch, "run_local", made.run_local)
    monkeypatch.setattr(comparison, "write_tables", made.write_tables)
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_cmems", "benchmark", "and", "so on"])
    return made


def keys(*trainers: str, exemplars: Sequence[int] = (1,), seeds: Sequence[int] = (1,)) -> list[str]:
    return [f"{trainer}__exemplar_{e}__seed_{s}" for trainer in trainers for e in exemplars for s in seeds]


def test_the_whole_grid(bench: Benchmarks, capsys: pytest.CaptureFixture[str]) -> None:
    bench("--exemplars", "2", "--seeds", "2", "--jobs", "3", "--epochs", "8", "--iterations", "5")
    floor, *peers, ours, ceiling = benchmark.DEFAULT_TRAINERS
    expected = []
    for seed in (1, 2):  # all methods of one exemplar and seed before the next: half a grid can be compared
        expected += keys(floor, *peers, ours, ceiling, seeds=[seed]) + keys(floor, *peers, ours, exemplars=[2], seeds=[seed])
    assert bench.trained == expected and bench.jobs == 3
    said = capsys.readouterr().out
    assert f"{len(expected)} runs: 0 finished, 0 unfinished, {len(expected)} new" in said
    assert "| the | table |" in said and f"nnUNetv2_cmems report {bench.folder}" in said
    content = bench.content
    assert {key: content[key] for key in ("dataset", "configuration", "plans", "fold", "device", "epochs", "iterations", "seeds")} == {
        "dataset": DATASET, "configuration": CONFIGURATION, "plans": "nnUNetPlans", "fold": "0", "device": "cpu", "epochs": 8,
        "iterations": 5, "seeds": [1, 2],
    }  # fmt: skip
    assert content["trainers"] == list(benchmark.DEFAULT_TRAINERS) and content["commands"] == ["nnUNetv2_cmems benchmark and 'so on'"]
    assert len(content["exemplars"]) == 2 and content["versions"]["nnunetv2"]


def test_the_same_call_again_trains_nothing(bench: Benchmarks) -> None:
    bench("--exemplars", "1", "--trainers", "CMEMS")
    bench()  # what is not said is as the folder has it
    bench("--trainers", "CMEMS")
    assert bench.trained == [*keys(OURS), *keys(*(t for t in benchmark.DEFAULT_TRAINERS if t != OURS))]


def test_a_later_call_adds(bench: Benchmarks) -> None:
    bench("--exemplars", "1", "--trainers", "CMEMS", "--epochs", "8")
    bench("--exemplars", "2", "--seeds", "2", "--trainers", "CMEMS", "exemplarOnly")
    assert bench.trained[:1] == keys(OURS)
    assert sorted(bench.trained) == sorted(keys(OURS, f"{OURS}_exemplarOnly", exemplars=(1, 2), seeds=(1, 2))), "each once"
    assert bench.content["epochs"] == 8 and len(bench.content["commands"]) == 2


def test_what_might_be_taken_for_granted(bench: Benchmarks, capsys: pytest.CaptureFixture[str]) -> None:
    bench("--exemplars", "1", "--trainers", "CMEMS")
    assert "Note" not in capsys.readouterr().out
    content = bench.content
    content["versions"]["torch"], content["device"] = "1.0", "cuda"
    (bench.folder / "benchmark.json").write_text(json.dumps(content))
    bench("--trainers", "CMEMS")
    said = capsys.readouterr().out
    assert 'torch ("1.0" then,' in said and "the last call trained on cuda" in said
    splits = [{"train": CASES, "val": CASES[:2]}]
    (bench.workspace.base / "splits_final.json").write_text(json.dumps(splits))
    bench("--trainers", "CMEMS", "--dry-run")
    assert "fold 0 validates on the cases that it trains on" in capsys.readouterr().out


def test_dry_run_writes_nothing(bench: Benchmarks, capsys: pytest.CaptureFixture[str]) -> None:
    bench("--trainers", "CMEMS", "exemplarOnly", "nnUNetTrainer", "--epochs", "10", "--iterations", "5", "--dry-run")
    said = capsys.readouterr().out
    assert re.search(r"^CMEMS +50 +1,680 +3 +0$", said, flags=re.MULTILINE), "2 * 16.8 passes in each of 50 steps"
    assert re.search(r"^exemplar only +140 +1,680 +3 +0$", said, flags=re.MULTILINE)
    assert re.search(r"^nnU-Net +its own +\? +1 +0$", said, flags=re.MULTILINE)
    assert "nnUNetTrainer: nnU-Net's own; it learns from all labels" in said and str(bench.folder) in said
    assert not bench.folder.exists() and not bench.trained and not list(bench.workspace.results.iterdir())


def test_a_failed_run(bench: Benchmarks, capsys: pytest.CaptureFixture[str]) -> None:
    bad = keys(OURS)[0]
    bench.failing = {bad}
    words = ("--exemplars", "1", "--trainers", "CMEMS", "exemplarOnly")
    with pytest.raises(CMEMSError, match=rf"1 of 2 runs failed; .*: {bad}: RuntimeError: out of luck \(log: .*{bad}/log.txt\)"):
        bench(*words)
    assert len(bench.trained) == 2 and "| the | table |" in capsys.readouterr().out, "the other one counts"
    bench.failing = set()
    bench(*words)
    assert bench.trained[2:] == [bad]


def test_nothing_finished_needs_no_table(bench: Benchmarks) -> None:
    bench.failing = set(keys(OURS))
    with pytest.raises(CMEMSError, match="1 of 1 runs failed"):
        bench("--exemplars", "1", "--trainers", "CMEMS")
    assert bench.baselines == []


# ---------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--trainers", "CMEMS", "uniMacth"), "finds no trainer 'uniMacth'; did you mean 'nnUNetTrainerCMEMS_uniMatch'"),
        (("--study", "tua"), "there is no study 'tua'; did you mean 'tau'"),
        (("--study", "tau", "members", "--values", "1"), "--values belong to one study"),
        (("--study", "tau", "--sample", "1"), "--sample belongs to --study exemplar"),
        (("--seeds", "0"), "--seeds is 0"),
        (("--jobs", "-1"), "--jobs is -1"),
        (("--exemplars", "0"), "--exemplars is 0"),
        (("--exemplars", "nowhere.json"), "nowhere.json cannot be read"),
        (("-num_gpus", "2"), "-num_gpus is 2, but -device is cpu"),
        (("--slurm-partition", "gpu"), "--slurm-partition belongs to --launcher slurm"),
        (("--launcher", "slurm", "--slurm-extra", "long"), "--slurm-extra has 'long'; write KEY=VALUE"),
        (("--baseline", "Mean Techer"), "did you mean 'Mean Teacher'"),
        (("-f", "x"), "a fold is a number or 'all'"),
    ],
)
def test_bad_arguments(bench: Benchmarks, words: Sequence[str], said: str) -> None:
    with pytest.raises(CMEMSError, match=said):
        bench(*words)
    assert not bench.trained and not list(bench.workspace.results.iterdir())


def test_a_device_that_is_not_there(bench: Benchmarks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(CMEMSError, match="no cuda device .* or use --launcher slurm"):
        bench("--trainers", "CMEMS", device="cuda")
    bench("--trainers", "CMEMS", "--dry-run", device="cuda")


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_cannot_be_compared_touches_nothing(bench: Benchmarks) -> None:
    bench("--exemplars", "1", "--trainers", "CMEMS", "--epochs", "8")
    before = snapshot(bench.folder)
    for words, said in [
        (("--epochs", "9"), "is of epochs 8, not 9"),
        (("-f", "1", "-o", str(bench.folder)), "is of fold 0, not 1"),
        (("--same", "steps"), "is of same passes, not steps"),
    ]:
        with pytest.raises(CMEMSError, match=said):
            bench(*words)
    other = {**bench.content, "dataset": "Dataset027_ACDC"}
    (bench.folder / "benchmark.json").write_text(json.dumps(other))
    with pytest.raises(CMEMSError, match=f"is of dataset Dataset027_ACDC, not {DATASET}"):
        bench("--trainers", "exemplarOnly")
    (bench.folder / "benchmark.json").write_bytes(before[bench.folder / "benchmark.json"])
    assert snapshot(bench.folder) == before and bench.trained == keys(OURS)


def test_a_folder_of_something_else(bench: Benchmarks, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(CMEMSError, match="holds other things than a benchmark"):
        bench("-o", str(tmp_path / "mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_the_data_sets_config_is_not_read_unless_it_is_named(bench: Benchmarks, capsys: pytest.CaptureFixture[str]) -> None:
    path = bench.workspace.base / "cmems.json"
    path.write_text(json.dumps({"tau": 0.6}))
    bench("--exemplars", "1", "--trainers", "CMEMS")
    assert f"{path} is not used here" in capsys.readouterr().out and bench.content["config"] == {}
    bench("--exemplars", "1", "--trainers", "CMEMS", "--config", str(path), "-o", str(bench.folder) + "_tau")
    record = json.loads((Path(str(bench.folder) + "_tau") / "runs" / keys(OURS)[0] / "run.json").read_text())
    assert record["spec"]["overrides"]["tau"] == 0.6


@pytest.mark.parametrize(
    ("asked", "found"), [("exemplar only", "exemplar only"), (f"{OURS}_exemplarOnly", "exemplar only"), ("exemplaronly", "exemplar only"),
                         ("cmems", "CMEMS"), ("CMEMS, tau 0.5", "CMEMS, tau 0.5")],
)  # fmt: skip
def test_baseline_by_any_of_its_names(bench: Benchmarks, asked: str, found: str) -> None:
    bench("--exemplars", "1", "--trainers", "exemplarOnly")
    bench("--trainers", "CMEMS", "--study", "tau", "--values", "0.5", "0.95", "--baseline", asked)
    assert bench.baselines == [None, found]


def test_a_study_alone_and_beside_trainers(bench: Benchmarks) -> None:
    bench("--exemplars", "1", "--study", "tau", "--values", "0.8", "0.95")
    assert bench.trained == ["nnUNetTrainerCMEMS__tau_0.8__exemplar_1__seed_1", *keys(OURS)]
    bench("--study", "members", "--values", "1", "2", "--trainers", "CMEMS")
    assert bench.trained[2:] == ["nnUNetTrainerCMEMS__members_1__exemplar_1__seed_1"], "the trainer as it is was there"
    tau, members = bench.content["studies"]
    assert [entry["runs"] for entry in tau["variants"]] == [[bench.trained[0]], [bench.trained[1]]]
    assert [entry["value"] for entry in members["variants"]] == [1, 2]


# ---------------------------------------------------------------------- for real


def pid_of_training(folder: Path) -> int | None:
    """The process that trains the run in ``folder``."""
    found = subprocess.run(["ps", "-ww", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    pids = [line.split()[0] for line in found.splitlines() if f"-m nnunetv2_cmems.study.run {folder}" in line]
    return int(pids[0]) if pids else None


def kill_after_the_first_checkpoint(run_folder: Path, latest: Path) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        training = pid_of_training(run_folder) if latest.is_file() else None
        if training is not None:
            os.kill(training, signal.SIGKILL)
            return
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks ps for the training's process")
def test_a_real_benchmark_one_run_of_which_is_killed(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace.results.mkdir()
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    (tmp_path / "all.json").write_text(json.dumps({"val_iterations_per_epoch": 1, "checkpoint_every": 1}))
    folder = tmp_path / "benchmark"
    first, second = (folder / "runs" / key for key in keys(OURS, f"{OURS}_exemplarOnly"))
    fold = first / "results" / DATASET / f"{OURS}__nnUNetPlans__{CONFIGURATION}" / "fold_0"

    def call() -> None:
        parser = argparse.ArgumentParser()
        benchmark.add_arguments(parser)
        words = ["-d", str(DATASET_ID), "-c", CONFIGURATION, "-device", "cpu", "--threads", "1", "-o", str(folder), "--exemplars", "1"]
        short = ["--epochs", "4", "--iterations", "1", "--same", "steps", "--config", str(tmp_path / "all.json")]
        benchmark.run(parser.parse_args([*words, *short, "--trainers", "CMEMS", "exemplarOnly"]))

    def counted() -> list[dict[str, str]]:
        with open(folder / "tables" / "cases.csv", encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    killer = threading.Thread(target=kill_after_the_first_checkpoint, args=(first, fold / "checkpoint_latest.pth"))
    killer.start()
    with pytest.raises(CMEMSError, match=f"1 of 2 runs failed.*: {first.name}: exit code -9.*{first / 'log.txt'}"):
        call()
    killer.join()
    assert not run.is_finished(str(first)) and run.is_finished(str(second))
    assert {row["trainer"] for row in counted()} == {f"{OURS}_exemplarOnly"}, "half a run does not count"
    untouched = (second / "run.json").read_bytes()

    call()
    assert (second / "run.json").read_bytes() == untouched
    epochs = [int(number) for number in re.findall(r"\bEpoch (\d+)\s*$", (first / "log.txt").read_text(), flags=re.MULTILINE)]
    assert sorted(set(epochs)) == list(range(4)) and len(epochs) < 8, f"{epochs}: it goes on from a checkpoint"
    assert {row["case"] for row in counted()} == set(VALIDATION)
    assert {row["method"] for row in counted()} == {"CMEMS", "exemplar only"}
    written = [json.loads((one / "cmems.json").read_text())["exemplar"] for one in (first, second)]
    assert written[0] == written[1] == json.loads((folder / "benchmark.json").read_text())["exemplars"][0]
    assert json.loads((fold / "cmems_config.json").read_text())["exemplars"][0]["case"] == written[0][0]["case"]
