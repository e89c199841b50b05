"""Running a grid's trainings: what is skipped, what goes on, what fails, how it is stopped, and submitit."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from nnunetv2_cmems.commands import benchmark as command
from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.study import launch, metrics, run
from nnunetv2_cmems.study.launch import Outcome
from nnunetv2_cmems.study.run import RunRecord, RunSpec


def spec(seed: int) -> RunSpec:
    return RunSpec("Dataset901_X", "2d", "nnUNetPlans", "0", "nnUNetTrainerCMEMS", "CMEMS", 1, seed, device="cpu")


SPECS = [spec(seed) for seed in (1, 2, 3)]


def write_run(benchmark: str | Path, one: RunSpec, state: str, *, validated: bool = True, measured: bool = False) -> RunRecord:
    folder = Path(run.run_folder(str(benchmark), one))
    folder.mkdir(parents=True, exist_ok=True)
    record = RunRecord(one, state, "2026-01-01T00:00:00", error="RuntimeError: out of luck" if state == "failed" else None)
    (folder / run.RECORD).write_text(json.dumps(dataclasses.asdict(record)))
    validation = Path(run.fold_folder(str(folder))) / "validation"
    validation.mkdir(parents=True, exist_ok=True)
    if validated:
        (validation / "summary.json").write_text("{}")
    if measured:
        (folder / run.METRICS).write_text("case,label\n")
    return record


class Trainings:
    """Stands in for :func:`run.train`: what was trained, in order, and which seeds fail."""

    def __init__(self) -> None:
        self.trained: list[int] = []
        self.measured: list[str] = []
        self.failing: set[int] = set()

    def train(self, one: RunSpec, benchmark: str) -> RunRecord:
        self.trained.append(one.seed)
        if one.seed == 13:
            raise ZeroDivisionError("thirteen")
        return write_run(benchmark, one, "failed" if one.seed in self.failing else "finished", validated=one.seed not in self.failing)

    def evaluate(self, folder: str, references: str) -> str:
        assert references == os.path.join(os.environ["nnUNet_preprocessed"], "Dataset901_X", "gt_segmentations")
        self.measured.append(os.path.basename(folder))
        path = Path(folder) / run.METRICS
        path.write_text("case,label\n")
        return str(path)


class Here:
    """Stands in for :class:`launch.Processes`: works in this process."""

    def __call__(self, one: RunSpec, benchmark: str) -> Outcome:
        return launch.work(one, benchmark)

    def stop(self) -> None:
        pass


@pytest.fixture
def trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainings:
    made = Trainings()
    (tmp_path / "preprocessed").mkdir()
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    monkeypatch.setattr(run, "train", made.train)
    monkeypatch.setattr(metrics, "evaluate_run", made.evaluate)
    monkeypatch.setattr(launch, "Processes", Here)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path / "benchmark")


# ---------------------------------------------------------------------- what is run


def test_finished_runs_are_skipped_and_killed_ones_are_not(trainings: Trainings, folder: str) -> None:
    write_run(folder, SPECS[0], "finished", measured=True)
    write_run(folder, SPECS[1], "running")  # killed half-way: its process can say no more
    outcomes = launch.run_local(SPECS, folder)
    assert outcomes == [Outcome(SPECS[1].key), Outcome(SPECS[2].key)] and trainings.trained == [2, 3]
    assert launch.run_local(SPECS, folder) == [] and trainings.trained == [2, 3]


def test_finished_but_without_a_summary_is_unfinished(trainings: Trainings, folder: str) -> None:
    write_run(folder, SPECS[0], "finished", validated=False, measured=True)
    launch.run_local(SPECS[:1], folder)
    assert trainings.trained == [1] and trainings.measured == [SPECS[0].key], "the measures were of another training"


def test_a_run_that_was_not_measured_is_measured_only(trainings: Trainings, folder: str) -> None:
    write_run(folder, SPECS[0], "finished")
    assert launch.run_local(SPECS[:1], folder) == [Outcome(SPECS[0].key)]
    assert trainings.trained == [] and trainings.measured == [SPECS[0].key]


def test_a_failed_run_does_not_stop_the_others(trainings: Trainings, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    trainings.failing = {2}
    outcomes = launch.run_local(SPECS, folder)
    assert [outcome.error for outcome in outcomes] == [None, "RuntimeError: out of luck", None] and trainings.trained == [1, 2, 3]
    assert f"failed: {SPECS[1].key}: RuntimeError: out of luck" in capsys.readouterr().out
    trainings.failing = set()
    assert launch.run_local(SPECS, folder) == [Outcome(SPECS[1].key)], "repeated alone"


def test_whatever_goes_wrong_is_one_runs_failure(trainings: Trainings, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> str:
        raise CMEMSError("a prediction has no reference.")

    assert launch.work(spec(13), folder) == Outcome(spec(13).key, "thirteen")
    monkeypatch.setattr(metrics, "evaluate_run", refuse)
    assert launch.work(SPECS[0], folder) == Outcome(SPECS[0].key, "a prediction has no reference.")
    monkeypatch.delenv("nnUNet_preprocessed")
    assert "nnUNet_preprocessed is not set" in str(launch.work(SPECS[0], folder).error)


def test_so_many_at_a_time(trainings: Trainings, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=20)
    train = trainings.train

    def together(one: RunSpec, benchmark: str) -> RunRecord:
        both.wait()  # breaks unless two are here at once
        return train(one, benchmark)

    monkeypatch.setattr(run, "train", together)
    assert launch.run_local(SPECS[:2], folder, jobs=2) == [Outcome(SPECS[0].key), Outcome(SPECS[1].key)]


# ---------------------------------------------------------------------- processes


def unusable(tmp_path: Path) -> str:
    """A benchmark in which no run can have a folder."""
    (tmp_path / "file").write_text("")
    return str(tmp_path / "file")


def test_a_process_says_how_it_ended(tmp_path: Path) -> None:
    outcome = launch.Processes()(SPECS[0], unusable(tmp_path))
    assert outcome.key == SPECS[0].key and "file" in str(outcome.error), "the error that was raised in the process"


def test_a_process_that_dies_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = subprocess.Popen

    def die(command: list[str], **options: Any) -> Any:
        return begin([command[0], "-c", "import os; print('last words', flush=True); os.kill(os.getpid(), 9)"], **options)

    monkeypatch.setattr(launch.subprocess, "Popen", die)
    assert launch.Processes()(SPECS[0], str(tmp_path)) == Outcome(SPECS[0].key, "exit code -9: last words")


@contextlib.contextmanager
def locked(folder: str, one: RunSpec) -> Iterator[None]:
    """As if another process trained this run."""
    os.makedirs(run.run_folder(folder, one))
    with FileLock(os.path.join(run.run_folder(folder, one), launch.LOCK)):
        yield


def test_a_run_that_another_process_trains_is_waited_for(trainings: Trainings, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(folder, SPECS[0]):
        threading.Timer(0.5, lambda: write_run(folder, SPECS[0], "finished", measured=True)).start()
        waiting = threading.Thread(target=launch.run_local, args=(SPECS[:1], folder))
        waiting.start()
        waiting.join(1.5)
        assert waiting.is_alive()
    waiting.join(20)
    assert not waiting.is_alive() and trainings.trained == [], "the other one finished it"
    assert "is being trained by another process" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_stopping_stops_the_processes(folder: str, how: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Any] = []
    begin = subprocess.Popen

    def remember(*arguments: Any, **options: Any) -> Any:
        begun.append(begin(*arguments, **options))
        return begun[-1]

    monkeypatch.setattr(launch.subprocess, "Popen", remember)

    def interrupt() -> None:
        deadline = time.monotonic() + 20
        while not begun and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.5)
        os.kill(os.getpid(), how)

    handler = signal.getsignal(signal.SIGTERM)
    with locked(folder, SPECS[0]):
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            launch.run_local(SPECS[:2], folder)
    assert len(begun) == 1 and begun[0].poll() not in (None, 0), "the second run is not begun any more"
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not os.path.exists(run.run_folder(folder, SPECS[1]))


# ---------------------------------------------------------------------- submitit


def test_jobs_of_submitits_debug_executor(trainings: Trainings, folder: str) -> None:
    pytest.importorskip("submitit")
    trainings.failing = {2}
    write_run(folder, SPECS[0], "finished", measured=True)
    outcomes = launch.run_on_cluster(SPECS, folder, {"timeout_min": 5, "slurm_partition": "gpu"}, "debug")
    assert outcomes == [Outcome(SPECS[1].key, "RuntimeError: out of luck"), Outcome(SPECS[2].key)]
    assert trainings.trained == [2, 3] and trainings.measured == [SPECS[2].key]
    assert json.loads(Path(run.run_folder(folder, SPECS[2]), launch.JOB).read_text())["cluster"] == "debug"


def test_jobs_of_submitits_local_executor(tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real processes, which finish one run (it was finished in the meantime) and fail with the other."""
    pytest.importorskip("submitit")
    write_run(folder, SPECS[0], "finished", measured=True)
    Path(run.run_folder(folder, SPECS[1])).mkdir()
    Path(run.run_folder(folder, SPECS[1]), run.RECORD).write_text("damaged")
    monkeypatch.setattr(launch, "is_done", lambda *_: False)
    done, failed = launch.run_on_cluster(SPECS[:2], folder, {"timeout_min": 2}, "local", lambda: time.sleep(0.1))
    assert done == Outcome(SPECS[0].key)
    assert failed.key == SPECS[1].key and "cannot be read as a run" in str(failed.error)
    assert os.listdir(os.path.join(folder, launch.JOBS)), "what the jobs said"


def test_nothing_to_do_needs_no_cluster(folder: str) -> None:
    write_run(folder, SPECS[0], "finished", measured=True)
    assert launch.run_on_cluster(SPECS[:1], folder, {}, "no such cluster") == []


class FakeJob:
    """A job of a cluster: ends after so many looks at it."""

    def __init__(self, job_id: str, looks: int, result: Any) -> None:
        self.job_id, self.looks, self.outcome, self.state = job_id, looks, result, "CANCELLED"

    def done(self, force_check: bool = False) -> bool:
        self.looks -= 1
        return self.looks < 0

    def result(self) -> Outcome:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        assert isinstance(self.outcome, Outcome)
        return self.outcome


class FakeCluster:
    cluster = "slurm"

    def __init__(self) -> None:
        self.jobs: list[Any] = []

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        yield

    def submit(self, work: Any, one: RunSpec, benchmark: str) -> FakeJob:
        self.jobs.append((work, one))
        return FakeJob(f"7_{len(self.jobs)}", 2, Outcome(one.key))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    pytest.importorskip("submitit")
    made = FakeCluster()
    monkeypatch.setattr(launch, "_executor", lambda *_: made)
    return made


def test_a_job_that_waits_or_runs_is_not_submitted_again(cluster: FakeCluster, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def impatient() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch.run_on_cluster(SPECS, folder, {}, poll=impatient)
    assert len(cluster.jobs) == 3
    states = {"7_1": 3, "7_2": -1, "7_3": 2}  # the second has ended without a result
    earlier: dict[str, Any] = {}

    def find(folder: str, job_id: str) -> FakeJob:
        key = SPECS[int(job_id[-1]) - 1].key
        earlier[job_id] = FakeJob(job_id, states[job_id], Outcome(key) if job_id == "7_1" else RuntimeError("out of memory"))
        return earlier[job_id]

    monkeypatch.setattr("submitit.SlurmJob", find)
    outcomes = launch.run_on_cluster(SPECS, folder, {}, poll=lambda: None)
    assert [one.seed for _, one in cluster.jobs] == [1, 2, 3, 2], "only that one"
    assert [outcome.error for outcome in outcomes[:2]] == [None, None]
    assert "job 7_3 ended as CANCELLED (out of memory)" in str(outcomes[2].error)


def test_a_job_that_is_out_of_time_goes_on_in_the_next() -> None:
    pytest.importorskip("submitit")
    job = launch._Job()
    again = job.checkpoint(SPECS[0], "folder")
    assert again.function is job and again.args == (SPECS[0], "folder")


def test_without_submitit(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "submitit":
            raise ModuleNotFoundError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CMEMSError, match="needs the package submitit; install it with 'pip install submitit'"):
        launch.run_on_cluster(SPECS, folder, {})


def test_without_a_cluster(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CMEMSError, match="cannot use slurm as asked .*srun"):
        launch.run_on_cluster(SPECS, folder, {})


def parsed(*words: str) -> Any:
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(["-d", "1", "-c", "2d", *words])


def test_slurms_options(tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are what submitit takes, and reach sbatch."""
    pytest.importorskip("submitit")
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    words = "--launcher slurm --slurm-partition long --slurm-account us --slurm-time 90 --slurm-mem 24 --jobs 2 -num_gpus 2"
    parameters = command._slurm_parameters(parsed(*words.split(), "--slurm-extra", "mail-type=END", "reservation=r1"))
    executor = launch._executor(folder, parameters, "slurm")
    text = executor._executor._make_submission_file_text("the work", "1")
    for line in ("--partition=long", "--account=us", "--time=90", "--mem=24GB", "--gpus-per-node=2", "--cpus-per-task=8", "--mail-type=END",
                 "--reservation=r1", "--job-name=cmems_benchmark"):  # fmt: skip
        assert f"#SBATCH {line}" in text, line
    assert executor._executor.parameters["array_parallelism"] == 2
    on_cpus = command._slurm_parameters(parsed("--launcher", "slurm", "-device", "cpu", "--threads", "4"))
    assert on_cpus == {"timeout_min": 1440, "cpus_per_task": 4, "name": "cmems_benchmark"}
