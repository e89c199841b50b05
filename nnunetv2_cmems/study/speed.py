"""What a training step costs, beside nnU-Net's own on the same plans: ``nnUNetv2_cmems benchmark --speed``.

Both trainers live in one process and take turns, so that whatever else the machine does meets both of them. Times are compared as
ratios of one run; the seconds beside them are those of one machine in one hour.

    python -m nnunetv2_cmems.study.speed SPEC

starts one of the two alone and prints a line of JSON: how long it took to its first step, and its peak memory.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from nnunetv2_cmems.config import CMEMSConfig
from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.files import environment, read_json, read_plans
from nnunetv2_cmems.method.networks import splits
from nnunetv2_cmems.method.objective import Batches, passes_per_step
from nnunetv2_cmems.study.grid import Fold
from nnunetv2_cmems.study.methods import find_trainer
from nnunetv2_cmems.study.run import versions
from nnunetv2_cmems.trainers.distributed import unwrapped
from nnunetv2_cmems.trainers.faults import end_workers

STOCK = "nnUNetTrainer"
_WARM_UP = 3
_BLOCKS = 2
_CHILD = "cmems-speed: "  # begins the line that a child prints


@dataclass(frozen=True)
class SpeedSpec:
    """What is measured.

    Attributes:
        folder: the data set's preprocessed folder.
        configuration: nnU-Net's, ``2d``.
        plans: the plans' identifier.
        fold: nnU-Net's, ``0`` to ``4`` or ``all``.
        trainer: class name of the trainer of ours.
        device: ``cpu`` or ``cuda``.
        steps: timed steps of each trainer, without data and with data each.
        threads: PyTorch's threads.
    """

    folder: str
    configuration: str
    plans: str
    fold: str
    trainer: str
    device: str
    steps: int
    threads: int

    @classmethod
    def of(cls, fold: Fold, trainer: str, device: str, steps: int, threads: int | None) -> SpeedSpec:
        """``threads`` as nnU-Net chooses them, where they are not given."""
        chosen = threads or (multiprocessing.cpu_count() if device == "cpu" else 1)
        return cls(fold.folder, fold.configuration, fold.plans, fold.fold, trainer, device, steps, chosen)


@dataclass(frozen=True)
class Series:
    """Times in seconds."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Half of the range that the middle half of the values lies in."""
        if len(self.values) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.values, n=4)
        return (high - low) / 2


def measure(spec: SpeedSpec) -> dict[str, Any]:
    """Time both trainers, first on batches that do not change, then on their loaders'; plain types.

    Raises:
        CMEMSError: a trainer cannot be started.
    """
    torch.set_num_threads(spec.threads)
    with _aside(), tqdm(total=_total(spec), desc="steps", leave=False, file=sys.stderr) as bar:
        alone = {name: _alone(spec, name) for name in (STOCK, spec.trainer)}
        with contextlib.ExitStack() as stack:
            stock, ours = (stack.enter_context(_running(spec, name)) for name in (STOCK, spec.trainer))
            to_the_end(ours)
            fixed = _time_fixed(stock, ours, spec, bar.update)
            loaded = _time_loaded(stock, ours, spec, bar.update)
            example, config, batches = _example(ours), ours._objective.config, ours._objective.batches
            passes = [passes_of_last_step(config, batches, decoder_share(member, example)) for member in ours.mutual_networks.members]
            costs = [operations(member, example) / operations(unwrapped(stock.network), example) for member in ours.mutual_networks.members]
            share = decoder_share(ours.mutual_networks.members[0], example)
            weighted = statistics.fmean(count * cost for count, cost in zip(passes, costs))
            return {
                **dataclasses.asdict(spec),
                "versions": versions(),
                "device_name": torch.cuda.get_device_name() if spec.device == "cuda" else f"{os.cpu_count()} cores",
                "workers": get_allowed_n_proc_DA(),
                "members": config.num_members,
                "member_costs": costs,
                **results(fixed, loaded, weighted, share, stock.batch_size, alone),
                "images": {**batches._asdict(), "nnU-Net": stock.batch_size},
            }


def results(
    fixed: tuple[Series, Series],
    loaded: Mapping[str, tuple[Series, Series]],
    passes: float,
    share: float,
    batch: int,
    alone: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """What the times say, as plain types.

    Args:
        fixed: seconds a step of nnU-Net and of ours, in pairs, without data.
        loaded: ``step``: the same with data; ``wait``: what of it each waited for its loader.
        passes: network passes of our step, in passes of nnU-Net's network; nnU-Net's makes three for each image of its batch.
        share: the decoder's share in a pass.
        batch: nnU-Net's images a step.
        alone: what each trainer (nnU-Net's first) did in a process of its own.
    """
    (stock, ours), (stock_loaded, ours_loaded), (stock_wait, ours_wait) = fixed, loaded["step"], loaded["wait"]
    ratio = _paired(ours, stock)
    first, second = alone.values()
    return {
        "ms": {"nnU-Net": _ms(stock), "ours": _ms(ours)},
        "ms_with_data": {"nnU-Net": _ms(stock_loaded), "ours": _ms(ours_loaded)},
        "ratio": ratio,
        "ratio_with_data": ours_loaded.median / stock_loaded.median,
        "decoder_share": share,
        "passes": {"nnU-Net": 3.0 * batch, "ours": passes},
        "par_ratio": ratio * 3 * batch / passes,
        "waiting": {"nnU-Net": sum(stock_wait.values) / sum(stock_loaded.values), "ours": sum(ours_wait.values) / sum(ours_loaded.values)},
        "images_per_second": {"nnU-Net": batch / stock_loaded.median, "ours": passes / 3 / ours_loaded.median},
        "peak_memory": {"nnU-Net": first["peak"], "ours": second["peak"], "ratio": second["peak"] / first["peak"]},
        "start": {"nnU-Net": first["start"], "ours": second["start"], "ratio": second["start"] / first["start"]},
    }


def table(found: Mapping[str, Any]) -> str:
    """:func:`measure`'s findings for people."""

    def of(key: str, form: str, scale: float = 1.0) -> list[str]:
        return [form.format(found[key][who] * scale) for who in ("nnU-Net", "ours")]

    def time_of(key: str) -> list[str]:
        return ["{median:.1f} ± {spread:.1f}".format(**found[key][who]) for who in ("nnU-Net", "ours")]

    more_passes = found["passes"]["ours"] / found["passes"]["nnU-Net"]
    where = "GPU memory" if found["device"] == "cuda" else "tensors of a step, weights and optimizer"
    rows = [
        ["", "nnU-Net", "ours", "ours / nnU-Net"],
        ["ms per step, data excluded", *time_of("ms"), f"{found['ratio']:.2f}"],
        ["ms per step, data included", *time_of("ms_with_data"), f"{found['ratio_with_data']:.2f}"],
        ["network passes per step, of nnU-Net's network", *of("passes", "{:.1f}"), f"{more_passes:.2f}"],
        ["par ratio", "1", f"{found['par_ratio']:.3f}", ""],
        ["images (3 passes each) per second", *of("images_per_second", "{:.1f}"), ""],
        ["waiting for data", *of("waiting", "{:.1f} %", 100), ""],
        [f"peak MB ({where})", *of("peak_memory", "{:.0f}", 1e-6), f"{found['peak_memory']['ratio']:.2f}"],
        ["seconds from start to first step", *of("start", "{:.1f}"), f"{found['start']['ratio']:.2f}"],
    ]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip() for row in rows]
    about = (
        f"{found['trainer']}, {os.path.basename(found['folder'])}, {found['configuration']}, {found['device']} ({found['device_name']}), "
        f"{found['threads']} threads, {found['workers']} workers a loader; medians of {found['steps']} steps, ± half the interquartile "
        f"range; the decoder is {found['decoder_share']:.2f} of a pass; the members' passes cost "
        f"{' and '.join(f'{cost:.2f}' for cost in found['member_costs'])} of nnU-Net's, by their floating-point operations"
    )
    return "\n".join([about, *lines])


# ---------------------------------------------------------------------- counting


def passes_of_last_step(config: CMEMSConfig, batches: Batches, share: float) -> float:
    """Passes of a step in which every term takes part, as at the end of a training."""
    terms = {name: dataclasses.replace(getattr(config, name), start=0.0) for name in ("image", "feature")}
    return passes_per_step(dataclasses.replace(config, **terms), batches, share)


def decoder_share(member: nn.Module, image: Tensor) -> float:
    """The decoder's share in the floating-point operations of a pass; 0.5 where the network does not split."""
    if not splits(member):
        return 0.5
    parts: Any = member
    with torch.no_grad():
        with FlopCounterMode(display=False) as encoder:
            features = parts.encoder(image)
        with FlopCounterMode(display=False) as decoder:
            parts.decoder(features)
    return decoder.get_total_flops() / (encoder.get_total_flops() + decoder.get_total_flops())


def operations(network: nn.Module, image: Tensor) -> float:
    """Floating-point operations of a pass. Members of another architecture than the plans' cost another number of them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(image)
    return float(counter.get_total_flops())


def _example(trainer: Any) -> Tensor:
    return torch.zeros(1, trainer.num_input_channels, *trainer.configuration_manager.patch_size, device=trainer.device)


# ---------------------------------------------------------------------- timing


def _time_fixed(stock: Any, ours: Any, spec: SpeedSpec, done: Callable[[], Any]) -> tuple[Series, Series]:
    """Steps in turns, each trainer on one batch of its loader's."""
    pairs = [(trainer, next(trainer.dataloader_train)) for trainer in (stock, ours)]
    times: tuple[list[float], list[float]] = [], []
    for step in range(_WARM_UP + spec.steps):
        for (trainer, batch), found in zip(pairs, times):
            seconds = _timed(trainer, functools.partial(trainer.train_step, copy.copy(batch)))
            if step >= _WARM_UP:
                found.append(seconds)
            done()
    return Series(tuple(times[0])), Series(tuple(times[1]))


def _time_loaded(stock: Any, ours: Any, spec: SpeedSpec, done: Callable[[], Any]) -> dict[str, tuple[Series, Series]]:
    """Blocks of steps in turns, each with its loader. What was loaded while the other one worked is used up before the clock starts."""
    steps: tuple[list[float], list[float]] = [], []
    waits: tuple[list[float], list[float]] = [], []
    for block in range(_BLOCKS):
        for who, trainer in enumerate((stock, ours)):
            for step in range(_stored() + _of_block(spec, block)):
                waited = 0.0

                def work(trainer: Any = trainer) -> None:
                    nonlocal waited
                    start = time.perf_counter()
                    batch = next(trainer.dataloader_train)
                    waited = time.perf_counter() - start
                    trainer.train_step(batch)

                seconds = _timed(trainer, work)
                if step >= _stored():
                    steps[who].append(seconds)
                    waits[who].append(waited)
                done()
    return {"step": (Series(tuple(steps[0])), Series(tuple(steps[1]))), "wait": (Series(tuple(waits[0])), Series(tuple(waits[1])))}


def _timed(trainer: Any, work: Callable[[], Any]) -> float:
    _synchronize(trainer.device)
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        work()
    _synchronize(trainer.device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _stored() -> int:
    """Batches that may lie ready in a loader's queues and in its workers' hands: nnU-Net keeps two queues of this length."""
    workers = get_allowed_n_proc_DA()
    return 2 * max(6, workers // 2) + workers if workers else 1


def _of_block(spec: SpeedSpec, block: int) -> int:
    return spec.steps * (block + 1) // _BLOCKS - spec.steps * block // _BLOCKS


def _total(spec: SpeedSpec) -> int:
    return 2 * (_WARM_UP + spec.steps) + 2 * (_BLOCKS * _stored() + spec.steps)


def _paired(ours: Series, stock: Series) -> float:
    """Median of the ratios of steps that followed each other: what slows the machine for a while meets both."""
    return statistics.median(a / b for a, b in zip(ours.values, stock.values))


def _ms(series: Series) -> dict[str, float]:
    return {"median": 1000 * series.median, "spread": 1000 * series.spread}


# ---------------------------------------------------------------------- trainers


def to_the_end(trainer: Any) -> None:
    """Where every term of ours has its full weight, however many steps follow."""
    trainer.num_epochs = trainer.num_iterations_per_epoch = 10**6
    trainer.current_epoch = trainer.num_epochs - 1


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """Nothing of the user's results is touched, and what the trainers say is not shown."""
    with tempfile.TemporaryDirectory() as folder, environment(nnUNet_results=folder), contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _running(spec: SpeedSpec, name: str) -> Iterator[Any]:
    """A trainer before its first step, its loaders working; they are stopped at the end."""
    dataset_json = read_json(os.path.join(spec.folder, "dataset.json"))
    plans = {**read_plans(os.path.join(spec.folder, f"{spec.plans}.json")), "continue_training": False}
    fold = spec.fold if spec.fold == "all" else int(spec.fold)
    trainer = find_trainer(name)(plans, spec.configuration, fold, dataset_json, torch.device(spec.device))
    try:
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        yield trainer
    finally:
        end_workers(trainer.dataloader_train, trainer.dataloader_val)


def _alone(spec: SpeedSpec, name: str) -> dict[str, float]:
    """One trainer in a process of its own: ``start``, seconds to its first step, and ``peak``, bytes.

    Raises:
        CMEMSError: the process has failed.
    """
    wanted = json.dumps(dataclasses.asdict(dataclasses.replace(spec, trainer=name)))
    command = [sys.executable, "-m", "nnunetv2_cmems.study.speed", wanted]
    process = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    lines = [line.removeprefix(_CHILD) for line in process.stdout.splitlines() if line.startswith(_CHILD)]
    if process.returncode or not lines:
        said = [line for line in (process.stderr or process.stdout).splitlines() if line.strip()] or ["no output"]
        raise CMEMSError(f"{name} cannot be timed ({said[-1].strip()}); try a training with it first.")
    return dict(json.loads(lines[-1]))


def _start_and_peak(spec: SpeedSpec) -> dict[str, float]:
    """What the child measures: the clock runs from before the trainer is made to the end of its first step."""
    find_trainer(spec.trainer)  # imports are the interpreter's affair
    start = time.perf_counter()
    with _running(spec, spec.trainer) as trainer:
        batch = next(trainer.dataloader_train)
        trainer.train_step(copy.copy(batch))
        _synchronize(trainer.device)
        seconds = time.perf_counter() - start
        to_the_end(trainer)
        trainer.train_step(copy.copy(batch))
        return {"start": seconds, "peak": peak_memory(trainer, lambda: trainer.train_step(copy.copy(batch)))}


def peak_memory(trainer: Any, step: Callable[[], Any]) -> float:
    """Bytes of tensors at the step's worst moment. On a CPU what a GPU would hold: weights, their gradients, the optimizer's
    state and the exemplars, and what the step allocates, as torch's profiler counts it; libraries' own scratch memory is not counted.
    """
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
        step()
        return float(torch.cuda.max_memory_allocated(trainer.device))
    before = sum(tensor.untyped_storage().nbytes() for tensor in _resident(trainer))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return float(before + peak)


def _resident(trainer: Any) -> Sequence[Tensor]:
    """The tensors that stay between two steps, each once."""
    network = unwrapped(trainer.network)
    found = [*network.parameters(), *network.buffers()]
    found += [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    found += [value for state in trainer.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    bank = getattr(getattr(trainer, "_objective", None), "bank", None)
    found += [] if bank is None else [source.content for source in bank._sources]
    return list({tensor.data_ptr(): tensor for tensor in found}.values())


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry of the child, see the module's docstring."""
    (text,) = sys.argv[1:] if arguments is None else arguments
    spec = SpeedSpec(**json.loads(text))
    torch.set_num_threads(spec.threads)
    with _aside():
        found = _start_and_peak(spec)
    print(_CHILD + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
