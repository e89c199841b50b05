"""One training of a benchmark: what it is, how it runs in a process of its own, and what is written down about it.

    python -m nnunetv2_cmems.study.run FOLDER

trains what ``run.json`` in ``FOLDER`` says. :func:`train` writes that file, calls this line, and adds how it ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from filelock import FileLock

from nnunetv2_cmems.config import CONFIG_VARIABLE
from nnunetv2_cmems.errors import CMEMSError, first_line
from nnunetv2_cmems.files import write_json

BENCHMARK = "benchmark.json"
"""File in a benchmark's folder that says what its runs have in common."""

RUNS = "runs"
RECORD, CONFIG, LOG, RESULTS, METRICS = "run.json", "cmems.json", "log.txt", "results", "metrics.csv"
_MEASURED = "measured.json"  # what the training process says about itself
_LOCK = ".training.lock"
_PACKAGES = ("nnunetv2-cmems", "nnunetv2", "torch", "batchgenerators", "batchgeneratorsv2", "dynamic-network-architectures", "numpy")


@dataclass(frozen=True)
class RunSpec:
    """What one training is.

    Attributes:
        dataset: nnU-Net's name, ``Dataset027_ACDC``.
        configuration: nnU-Net's, ``2d``.
        plans: the plans' identifier.
        fold: nnU-Net's, ``0`` to ``4`` or ``all``.
        trainer: the trainer's class name.
        method: what tables call it.
        study: the study that the run is a variant of, if any.
        value: the study's value.
        exemplar: number of the exemplar within the benchmark, from 1.
        seed: the seed that ``overrides`` set.
        overrides: for :func:`nnunetv2_cmems.config.load_config`; trainers of others do not read them.
        device: ``cpu``, ``cuda`` or ``mps``.
        num_gpus: nnU-Net's ``-num_gpus``.
        threads: of the training process on a CPU; None: as many as nnU-Net takes, all.
    """

    dataset: str
    configuration: str
    plans: str
    fold: str
    trainer: str
    method: str
    exemplar: int
    seed: int
    study: str | None = None
    value: str | float | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cuda"
    num_gpus: int = 1
    threads: int | None = None

    @property
    def key(self) -> str:
        """Name of the run's folder, unique within a benchmark."""
        variant = [] if self.study is None else [f"{self.study}_{self.value}"]
        plans = [] if self.plans == "nnUNetPlans" else [self.plans]
        parts = [self.trainer, *plans, *variant, f"exemplar_{self.exemplar}", f"seed_{self.seed}"]
        return re.sub(r"[^\w.+-]", "-", "__".join(parts))


@dataclass
class RunRecord:
    """``run.json``: a run, and how it ended.

    Attributes:
        spec: what was to be trained.
        state: ``running``, ``finished`` or ``failed``. A process that was killed leaves ``running`` behind.
        started: ISO date and time of the (first) start.
        wall_seconds: of training and validation, all attempts together but those that were killed with their parent.
        peak_rss_bytes: largest resident memory of the training process.
        peak_gpu_bytes: largest memory that torch held on the GPU; None without one.
        gpu_hours: wall time times GPUs.
        passes: passes of one image through one network, of the whole training, counted as in ``docs/method.md``; None where
            the trainer is not ours.
        command: the line that trains the same, with ``nnUNet_cmems_config`` set to the run's ``cmems.json``.
        versions: of Python and the packages.
        error: what went wrong, one line.
    """

    spec: RunSpec
    state: str
    started: str
    wall_seconds: float = 0.0
    peak_rss_bytes: int = 0
    peak_gpu_bytes: int | None = None
    gpu_hours: float = 0.0
    passes: float | None = None
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    error: str | None = None


def run_folder(benchmark: str, spec: RunSpec) -> str:
    """Where the run of a benchmark lies."""
    return os.path.join(benchmark, RUNS, spec.key)


def fold_folder(folder: str) -> str:
    """nnU-Net's ``fold_X`` folder of the run in ``folder``.

    Raises:
        CMEMSError: see :func:`read_run`.
    """
    spec = read_run(folder).spec
    model = f"{spec.trainer}__{spec.plans}__{spec.configuration}"
    return os.path.join(folder, RESULTS, spec.dataset, model, f"fold_{spec.fold}")


def read_run(folder: str) -> RunRecord:
    """The record of a run.

    Raises:
        CMEMSError: there is none, or it cannot be read.
    """
    path = os.path.join(folder, RECORD)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        return RunRecord(**{**content, "spec": RunSpec(**content["spec"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CMEMSError(
            f"{path} cannot be read as a run of a benchmark ({first_line(error)}); delete its folder and run the benchmark again."
        ) from error


def is_finished(folder: str) -> bool:
    """Whether the run in ``folder`` has come to its end, validation included.

    Raises:
        CMEMSError: its record cannot be read.
    """
    if not os.path.isfile(os.path.join(folder, RECORD)):
        return False
    return read_run(folder).state == "finished" and os.path.isfile(os.path.join(fold_folder(folder), "validation", "summary.json"))


def train(spec: RunSpec, benchmark: str) -> RunRecord:
    """Train and validate in a process of its own, and write down how it went.

    A training that was interrupted goes on from its last checkpoint. One that fails is recorded, not raised.

    Args:
        spec: what to train.
        benchmark: the benchmark's folder.

    Raises:
        CMEMSError: the folder holds another run under this name, or cannot be written.
    """
    folder = run_folder(benchmark, spec)
    record = _open(spec, folder)
    with contextlib.suppress(OSError):
        os.remove(os.path.join(folder, _MEASURED))
    before, begin = record.wall_seconds, time.monotonic()
    try:
        code = _call(folder)
    finally:
        record.wall_seconds = before + time.monotonic() - begin
        _write(folder, record)  # as running still
    record.gpu_hours = record.wall_seconds / 3600 * spec.num_gpus if spec.device == "cuda" else 0.0
    for name, value in _measured(folder).items():
        setattr(record, name, max(value, getattr(record, name) or 0) if name.startswith("peak") and value is not None else value)
    record.state = "finished" if code == 0 else "failed"
    killed = " (killed, most often because memory ran out)" if code == -9 else ""
    record.error = None if code == 0 else f"exit code {code}{killed}: {_last_line(os.path.join(folder, LOG))}"
    _write(folder, record)
    return record


def training_command(spec: RunSpec) -> str:
    """nnU-Net's own line for this training."""
    plans = "" if spec.plans == "nnUNetPlans" else f" -p {spec.plans}"
    gpus = f" -num_gpus {spec.num_gpus}" if spec.num_gpus > 1 else ""
    what = f"{spec.dataset} {spec.configuration} {spec.fold} -tr {spec.trainer}{plans}"
    return f"nnUNetv2_train {what}{gpus} -device {spec.device}"


def versions() -> dict[str, str]:
    """Of Python, the system and the packages that decide what a training does."""
    return {"python": platform.python_version(), "system": platform.platform(), **{name: version(name) for name in _PACKAGES}}


def _open(spec: RunSpec, folder: str) -> RunRecord:
    """The run's record, marked as running, with its config beside it."""
    record = RunRecord(spec, "running", datetime.datetime.now().isoformat(timespec="seconds"))
    if os.path.isfile(os.path.join(folder, RECORD)):
        old = read_run(folder)
        if _what_is_trained(old.spec) != _what_is_trained(spec):
            raise CMEMSError(
                f"{os.path.join(folder, RECORD)} is of a run with other settings; delete its folder, or choose another folder with -o."
            )
        record.started, record.wall_seconds, record.peak_rss_bytes = old.started, old.wall_seconds, old.peak_rss_bytes
    record.command, record.versions = training_command(spec), versions()
    os.makedirs(os.path.join(folder, RESULTS), exist_ok=True)
    write_json(os.path.join(folder, CONFIG), dict(spec.overrides))
    _write(folder, record)
    return record


def _what_is_trained(spec: RunSpec) -> dict[str, Any]:
    """What must be the same for a training to go on; its config is compared by the trainer itself."""
    names = {"method", "threads", "device", "num_gpus", "study", "value", "overrides"}
    return {key: value for key, value in json.loads(json.dumps(dataclasses.asdict(spec))).items() if key not in names}


def _write(folder: str, record: RunRecord) -> None:
    write_json(os.path.join(folder, RECORD), dataclasses.asdict(record))


def _call(folder: str) -> int:
    """Run the training process, its output in the log; it is stopped where this process is interrupted."""
    command = [sys.executable, "-m", "nnunetv2_cmems.study.run", folder]
    environment = {**os.environ, CONFIG_VARIABLE: os.path.join(folder, CONFIG), "nnUNet_results": os.path.join(folder, RESULTS)}
    with open(os.path.join(folder, LOG), "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )
        try:
            return process.wait()
        except BaseException:
            _stop(process)
            raise


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it has started."""
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGTERM)
        else:  # Windows
            process.terminate()
    process.wait()


def _measured(folder: str) -> dict[str, Any]:
    try:
        with open(os.path.join(folder, _MEASURED), encoding="utf-8") as file:
            return dict(json.load(file))
    except (OSError, ValueError):
        return {}


def _last_line(path: str) -> str:
    """The last line of a log, or the sentence of a :class:`CMEMSError` shortly before it."""
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [line.strip() for line in file if line.strip()]
    sentences = [line for line in lines[-5:] if line.startswith("nnunetv2-cmems: ")]
    return (sentences or lines or ["no output"])[-1]


def _train_here(folder: str) -> None:
    """What the training process does; a second one for the same run waits for the first, whose parent may have been killed."""
    with FileLock(os.path.join(folder, _LOCK)):
        _train_locked(folder)


def _train_locked(folder: str) -> None:
    spec = read_run(folder).spec
    _limit_threads(spec)
    import torch
    from nnunetv2.run.run_training import run_training

    fold = fold_folder(folder)
    latest, final = (os.path.isfile(os.path.join(fold, f"checkpoint_{name}.pth")) for name in ("latest", "final"))
    run_training(
        spec.dataset, spec.configuration, spec.fold, spec.trainer, spec.plans, None, spec.num_gpus,
        continue_training=latest and not final, only_run_validation=final, device=torch.device(spec.device),
    )  # fmt: skip
    on_gpu = spec.device == "cuda" and torch.cuda.is_available()
    measured = {
        "peak_rss_bytes": _peak_rss(),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "passes": _passes(fold, spec),
    }
    write_json(os.path.join(folder, _MEASURED), measured)


def _limit_threads(spec: RunSpec) -> None:
    import torch

    threads = spec.threads or (multiprocessing.cpu_count() if spec.device == "cpu" else 1)  # as nnU-Net chooses them
    torch.set_num_threads(threads)
    if spec.device == "cuda":
        torch.set_num_interop_threads(1)


def _peak_rss() -> int:
    """Bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _passes(fold: str, spec: RunSpec) -> float | None:
    """Network passes of the finished training; None where it is not ours."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunetv2_cmems.config import CMEMSConfig, with_overrides
    from nnunetv2_cmems.method.objective import batch_sizes, passes_per_step

    path = os.path.join(fold, "cmems_config.json")
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        config = with_overrides(CMEMSConfig(), json.load(file)["config"], path)
    plans = PlansManager(os.path.join(os.path.dirname(fold), "plans.json"))
    batch = plans.get_configuration(spec.configuration).batch_size
    steps = config.num_epochs * config.iterations_per_epoch
    with contextlib.suppress(OSError):
        with open(os.path.join(fold, "cmems_history.json"), encoding="utf-8") as file:
            labelling = json.load(file).get("scan_label_passes", [])
        return steps * passes_per_step(config, batch_sizes(config, batch)) + sum(count for count in labelling if count)
    return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry of the training process, see the module's docstring."""
    (folder,) = sys.argv[1:] if arguments is None else arguments
    _train_here(folder)


if __name__ == "__main__":
    main()
