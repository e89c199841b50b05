"""Runs the trainings of a benchmark: on this machine, or as jobs of a cluster.

Each run is trained and measured in processes of its own. What one of them does, however it ends, concerns no other. A lock in the
run's folder keeps two benchmarks from training the same run at once.

    python -m nnunetv2_cmems.study.launch RUN_AS_JSON BENCHMARK

is one run on this machine; its last line of output is the :class:`Outcome`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from nnunetv2_cmems.errors import CMEMSError, first_line
from nnunetv2_cmems.files import nnunet_folder, write_json
from nnunetv2_cmems.study import run
from nnunetv2_cmems.study.run import LOG, METRICS, RunSpec

LOCK, JOB = ".lock", "job.json"
"""In a run's folder: held by the process that trains it; the cluster's job that trains it."""

JOBS = "jobs"
"""In a benchmark's folder: what submitit writes."""

_POLL_SECONDS = 2.0


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``error`` is None, or one line that says why it failed."""

    key: str
    error: str | None = None


def is_done(spec: RunSpec, benchmark: str) -> bool:
    """Whether a run is trained and measured.

    Raises:
        CMEMSError: its record cannot be read.
    """
    folder = run.run_folder(benchmark, spec)
    return run.is_finished(folder) and os.path.isfile(os.path.join(folder, METRICS))


def work(spec: RunSpec, benchmark: str) -> Outcome:
    """Train a run to its end and measure it, as far as that is not done yet. Never raises.

    Waits while another process trains the same run.
    """
    folder = run.run_folder(benchmark, spec)
    try:
        os.makedirs(folder, exist_ok=True)
        with FileLock(os.path.join(folder, LOCK)):
            if not run.is_finished(folder):
                with contextlib.suppress(OSError):
                    os.remove(os.path.join(folder, METRICS))  # of a training that is not there any more
                record = run.train(spec, benchmark)
                if record.state != "finished":
                    return Outcome(spec.key, record.error or "no reason is known")
            if not os.path.isfile(os.path.join(folder, METRICS)):
                from nnunetv2_cmems.study.metrics import evaluate_run

                preprocessed = nnunet_folder("nnUNet_preprocessed", "preprocessed data sets")
                evaluate_run(folder, os.path.join(preprocessed, spec.dataset, "gt_segmentations"))
        return Outcome(spec.key)
    except Exception as error:  # one run's failure is one line of the report, whatever it is
        return Outcome(spec.key, first_line(error))


# ---------------------------------------------------------------------- this machine


class Processes:
    """Works on runs in processes of their own, which end with this one."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def __call__(self, spec: RunSpec, benchmark: str) -> Outcome:
        """As :func:`work`."""
        command = [sys.executable, "-m", "nnunetv2_cmems.study.launch", json.dumps(dataclasses.asdict(spec)), benchmark]
        with self._lock:
            if self._stopped:
                return Outcome(spec.key, "stopped")
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
            )
            self._running.add(process)
        try:
            said, _ = process.communicate()
        finally:
            with self._lock:
                self._running.discard(process)
        lines = [line for line in said.splitlines() if line.strip()] or ["no output"]
        try:
            return Outcome(**json.loads(lines[-1]))
        except (ValueError, TypeError):
            return Outcome(spec.key, f"exit code {process.returncode}: {lines[-1]}")

    def stop(self) -> None:
        """Interrupt all of them, which interrupts their trainings; start no others."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                with contextlib.suppress(OSError):
                    process.terminate()


def run_local(specs: Sequence[RunSpec], benchmark: str, jobs: int = 1) -> list[Outcome]:
    """Run what is not done yet, ``jobs`` at a time, with a progress bar.

    Args:
        specs: all runs of the grid; those that are done are counted, not run.
        benchmark: the benchmark's folder.
        jobs: processes at a time.

    Returns:
        One outcome for each run that was not done, in their order.

    Raises:
        KeyboardInterrupt: after Ctrl-C (or SIGTERM, SIGHUP), when all trainings have been stopped.
    """
    left = [spec for spec in specs if not is_done(spec, benchmark)]
    processes = Processes()
    outcomes: dict[str, Outcome] = {}
    with _bar(len(specs), len(left)) as bar, _signals_interrupt(), ThreadPoolExecutor(jobs) as pool:
        for spec in left:
            if _is_locked(run.run_folder(benchmark, spec)):
                tqdm.write(f"{spec.key} is being trained by another process; its end is waited for.")
        futures = [pool.submit(processes, spec, benchmark) for spec in left]
        try:
            for future in as_completed(futures):
                outcome = future.result()
                outcomes[outcome.key] = outcome
                _show(bar, outcome)
        except BaseException:
            for future in futures:
                future.cancel()
            processes.stop()
            raise
    return [outcomes[spec.key] for spec in left]


def _is_locked(folder: str) -> bool:
    path = os.path.join(folder, LOCK)
    if not os.path.isfile(path):
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let what ends a process end it as Ctrl-C does, unless it is ignored (``nohup``)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, interrupt) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bar(total: int, left: int) -> tqdm:
    return tqdm(total=total, initial=total - left, desc="runs", unit="run", smoothing=0, dynamic_ncols=True)


def _show(bar: tqdm, outcome: Outcome) -> None:
    if outcome.error is not None:
        tqdm.write(f"failed: {outcome.key}: {outcome.error}")
    bar.update()


# ---------------------------------------------------------------------- a cluster


class _Job:
    """:func:`work` as a job that the cluster may requeue where its time is up: the training goes on from its last checkpoint."""

    def __call__(self, spec: RunSpec, benchmark: str) -> Outcome:
        return work(spec, benchmark)

    def checkpoint(self, spec: RunSpec, benchmark: str) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, spec, benchmark)


def run_on_cluster(
    specs: Sequence[RunSpec],
    benchmark: str,
    parameters: Mapping[str, Any],
    cluster: str = "slurm",
    poll: Callable[[], None] = lambda: time.sleep(_POLL_SECONDS),
) -> list[Outcome]:
    """Submit a job for each run that is not done yet, and wait for all of them, with a progress bar.

    A run whose job is still waiting or running, submitted by an earlier call, gets no other.

    Args:
        specs: all runs of the grid; those that are done are counted, not run.
        benchmark: the benchmark's folder, which the cluster's machines must see too.
        parameters: for submitit's ``AutoExecutor.update_parameters``.
        cluster: submitit's name of it: ``slurm``; for tests ``local`` or ``debug``.
        poll: waits for a moment.

    Returns:
        One outcome for each run that was not done, in their order.

    Raises:
        CMEMSError: submitit is not installed, there is no such cluster here, or it takes no jobs.
        KeyboardInterrupt: after Ctrl-C; the jobs go on.
    """
    left = [spec for spec in specs if not is_done(spec, benchmark)]
    executor = _executor(benchmark, parameters, cluster) if left else None
    with _bar(len(specs), len(left)) as bar:
        try:
            jobs = {spec.key: _earlier_job(spec, benchmark, executor) for spec in left}
            new = [spec for spec in left if jobs[spec.key] is None]
            jobs.update(_submit(new, benchmark, executor))
            tqdm.write(f"jobs submitted: {len(new)}; there already: {len(left) - len(new)}; what they say: {os.path.join(benchmark, JOBS)}")
            outcomes: dict[str, Outcome] = {}
            while True:
                for spec in left:
                    if spec.key not in outcomes and jobs[spec.key].done():
                        outcomes[spec.key] = _outcome(spec, benchmark, jobs[spec.key])
                        _show(bar, outcomes[spec.key])
                if len(outcomes) == len(left):
                    break
                poll()
        except KeyboardInterrupt:
            tqdm.write("No longer waiting. The jobs go on; call again to see how they are getting on, or cancel them with scancel.")
            raise
    return [outcomes[spec.key] for spec in left]


def _executor(benchmark: str, parameters: Mapping[str, Any], cluster: str) -> Any:
    try:
        import submitit
    except ImportError as error:
        raise CMEMSError("--launcher slurm needs the package submitit; install it with 'pip install submitit'.") from error
    try:
        executor = submitit.AutoExecutor(folder=os.path.join(benchmark, JOBS, "%j"), cluster=cluster)
        executor.update_parameters(**parameters)
        return executor
    except (RuntimeError, NameError, ValueError, AssertionError) as error:
        raise CMEMSError(f"submitit cannot use {cluster} as asked ({first_line(error)}); correct the --slurm options.") from error


def _submit(specs: Sequence[RunSpec], benchmark: str, executor: Any) -> dict[str, Any]:
    """The new jobs by the runs' keys; in SLURM they are one job array."""
    if not specs:
        return {}
    jobs = []
    try:
        with executor.batch():
            for spec in specs:
                jobs.append(executor.submit(_Job(), spec, benchmark))
    except Exception as error:  # sbatch's complaints come as submitit's, subprocess's and others
        raise CMEMSError(f"the cluster takes no jobs ({first_line(error)}); correct the --slurm options.") from error
    for spec, job in zip(specs, jobs, strict=True):
        write_json(os.path.join(run.run_folder(benchmark, spec), JOB), {"cluster": executor.cluster, "job_id": job.job_id})
    return {spec.key: job for spec, job in zip(specs, jobs, strict=True)}


def _earlier_job(spec: RunSpec, benchmark: str, executor: Any) -> Any:
    """The job that an earlier call submitted for a run, if it has not ended; else None."""
    try:
        with open(os.path.join(run.run_folder(benchmark, spec), JOB), encoding="utf-8") as file:
            content = json.load(file)
        if not content["cluster"] == executor.cluster == "slurm":
            return None
        job_id = str(content["job_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    import submitit

    job: Any = submitit.SlurmJob(folder=os.path.join(benchmark, JOBS, "%j"), job_id=job_id)
    return None if job.done(force_check=True) else job


def _outcome(spec: RunSpec, benchmark: str, job: Any) -> Outcome:
    try:
        result: Outcome = job.result()
        return result
    except Exception as error:  # cancelled, out of memory, out of time
        state = str(job.state)
        log = os.path.join(run.run_folder(benchmark, spec), LOG)
        hint = f" {log}" if os.path.isfile(log) else ""
        return Outcome(spec.key, f"job {job.job_id} ended as {state} ({first_line(error)}){hint}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry of one run, see the module's docstring."""
    spec, benchmark = sys.argv[1:] if arguments is None else arguments
    with _signals_interrupt():
        outcome = work(RunSpec(**json.loads(spec)), benchmark)
    print(json.dumps(dataclasses.asdict(outcome)))


if __name__ == "__main__":
    main()
