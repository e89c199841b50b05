"""Training in several processes. Two of them on the CPU (gloo) stand in for two GPUs: all but the device is as nnU-Net runs them."""

from __future__ import annotations

import datetime
import functools
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    CASES,
    CONFIGURATION,
    DATASET_ID,
    EXEMPLAR,
    Workspace,
    _pools_are_threads,
    in_three_dimensions,
    same_weights,
    with_regions,
)
from nnunetv2.run import run_training
from torch import Tensor
from torch import distributed as dist
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.method.objective import Batches, batch_sizes
from nnunetv2_cmems.trainers import distributed, nnUNetTrainerCMEMS, presets

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are forked, so that they need not import all anew")

PROCESSES = 2
NOW: dict[str, Any] = {"start": 0.0, "rampup": 0.0}
UNEVEN = {"exemplar_batch": 3, "synthetic_batch": 3, "unlabelled_batch": 3}
"""Images a step that two processes cannot share evenly."""

made: list[Any] = []
"""The trainers of this process."""


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net gives each process a GPU; here they share the CPU."""
    construct = nnUNetTrainerCMEMS.__init__

    @functools.wraps(construct)
    def constructed(self: Any, *args: Any, **keywords: Any) -> None:
        construct(self, *args, **keywords)
        self.device, self.grad_scaler = torch.device("cpu"), None
        made.append(self)

    module = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer"
    made.clear()
    monkeypatch.setattr(nnUNetTrainerCMEMS, "__init__", constructed)
    monkeypatch.setattr(f"{module}.DDP", lambda network, device_ids: DistributedDataParallel(network))
    monkeypatch.setattr("torch.cuda.set_device", lambda _: None)
    monkeypatch.setattr(run_training, "recursive_find_trainer_class_by_name", lambda _: nnUNetTrainerCMEMS)
    monkeypatch.setattr(run_training, "setup_ddp", lambda *_: None)
    monkeypatch.setattr(run_training, "cleanup_ddp", lambda: None)


def in_processes(function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What ``function(*arguments)`` returns in each process of a group."""
    start_processes(_process, (function, folder, arguments), PROCESSES, start_method="fork")
    return [torch.load(folder / f"returned_{rank}", weights_only=False) for rank in range(PROCESSES)]


def _process(rank: int, function: Callable[..., Any], folder: Path, arguments: tuple[Any, ...]) -> None:
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=(folder / "store").as_uri(), rank=rank, world_size=PROCESSES, timeout=limit)
    torch.save(function(*arguments), folder / f"returned_{rank}")
    dist.destroy_process_group()


# ------------------------------------------------------------------ gradients


def every_second_channel(levels: list[Tensor]) -> list[Tensor]:
    """A feature perturbation that is the same for every image."""
    return [level * (torch.arange(level.shape[1]) % 2).reshape(1, -1, *[1] * (level.ndim - 2)) for level in levels]


def give_views(trainer: Any) -> dict[str, Any]:
    """Let the trainer's next step see a certain set of images, or this process's part of it; returns the step's batch."""
    objective = trainer._objective
    rank, processes = trainer.local_rank, distributed.count_processes()
    whole = batch_sizes(objective.config, trainer.configuration_manager.batch_size)
    shares = [distributed.share(whole, other, processes) for other in range(processes)]
    first = [sum(counts) for counts in zip((0, 0, 0), *shares[:rank])]
    exemplar, synthetic, unlabelled = (slice(start, start + count) for start, count in zip(first, shares[rank]))
    assert objective.batches == shares[rank]

    random.seed(0), torch.manual_seed(0)
    scans = torch.randn(max(2, whole.unlabelled), trainer.num_input_channels, *[n + 8 for n in objective.bank.patch])
    objective.batches = whole
    crops, _ = objective.unlabelled_crops(scans)
    batches = [objective.supervised_batch(crops) for _ in range(objective.config.num_members)]
    objective.batches = shares[rank]

    def part(values: Tensor) -> Tensor:
        return torch.cat([values[: whole.exemplar][exemplar], values[whole.exemplar :][synthetic]])

    parts = iter(type(b)(part(b.images), part(b.labels), part(b.mask), shares[rank].exemplar) for b in batches)
    objective.supervised_batch = lambda *_: next(parts)
    objective.unlabelled_crops = lambda *_: (crops[unlabelled], None)
    objective.dropout = every_second_channel
    return {"data": scans[unlabelled], "offset": torch.zeros(len(crops[unlabelled]), scans.ndim - 2)} if whole.unlabelled else {}


def one_step(workspace: Workspace, trainer_class: type[nnUNetTrainerCMEMS], keywords: dict[str, Any]) -> dict[str, Any]:
    trainer = workspace.make(trainer_class, **keywords)
    trainer.initialize()
    random.seed(0), torch.manual_seed(0)  # what is drawn once, when the exemplars are prepared
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    values = trainer.train_step(give_views(trainer))
    gradients = {name: value.grad for name, value in trainer.mutual_networks.named_parameters() if value.grad is not None}
    return {"values": values, "gradients": gradients, "weights": dict(trainer.mutual_networks.state_dict())}


def no_validation(workspace: Workspace) -> None:
    (workspace.base / "splits_final.json").write_text(json.dumps([{"train": CASES, "val": []}]))


def classes(workspace: Workspace) -> dict[str, Any]:
    return {}


@pytest.mark.parametrize(
    "data, trainer, config",
    [
        (classes, nnUNetTrainerCMEMS, {"tau": 0.35, "pseudo_class_weighting": 0.5, "competence": True}),
        (with_regions, nnUNetTrainerCMEMS, {"tau": 0.55}),
        (in_three_dimensions, nnUNetTrainerCMEMS, {"tau": 0.35, "exemplar": [{"case": EXEMPLAR["case"]}]}),
        (classes, presets.nnUNetTrainerCMEMS_meanTeacher, {"strong": {"brightness": 0.5}}),
        (classes, presets.nnUNetTrainerCMEMS_uniMatch, {"tau": 0.35, "cutmix": 0.0}),
    ],
    ids=["classes", "regions", "volumes", "mean-teacher", "unimatch"],
)
def test_two_processes_with_half_the_images_have_the_gradient_of_one(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    data: Callable[[Workspace], dict[str, Any]],
    trainer: type[nnUNetTrainerCMEMS],
    config: dict[str, Any],
) -> None:
    monkeypatch.setattr("nnunetv2_cmems.method.objective.change_appearance", lambda images, c: images + c.brightness * images.square())
    no_validation(workspace)
    everything = {"exemplar": [EXEMPLAR], **UNEVEN, "image": NOW, "feature": NOW, "cutmix": 0.0, "log_hidden_accuracy": False, **config}
    keywords = data(workspace)
    workspace.configure(**everything)
    alone = one_step(workspace, trainer, keywords)
    together = in_processes(one_step, tmp_path, workspace, trainer, keywords)

    largest = max(float(gradient.abs().max()) for gradient in alone["gradients"].values())
    for process in together:
        assert process["gradients"].keys() == alone["gradients"].keys()
        for name, gradient in alone["gradients"].items():
            torch.testing.assert_close(process["gradients"][name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=name)
        losses = [key for key in alone["values"] if key.startswith("loss")]
        for key in losses:
            assert process["values"][key] == pytest.approx(alone["values"][key], rel=1e-5), key
    assert same_weights(together[0]["weights"], together[1]["weights"])
    for key in {"coverage", "agreement"} & set(alone["values"]):
        np.testing.assert_allclose(sum(process["values"][key] for process in together), alone["values"][key], rtol=1e-6)
    sure, every, *_ = alone["values"]["coverage"].T
    assert (sure > 0).all() and (trainer is presets.nnUNetTrainerCMEMS_meanTeacher or (sure < every).all())


def spoilt_step(workspace: Workspace) -> dict[str, Any]:
    trainer = workspace.make()
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    batch, before = give_views(trainer), weights_of(trainer)
    if trainer.local_rank:
        trainer._objective.dropout = lambda levels: [level * torch.nan for level in levels]
    taken = bool(trainer.train_step(batch))
    return {"taken": taken or not same_weights(before, weights_of(trainer)), "blamed": set(trainer._skipped.terms)}


def test_what_is_not_finite_on_one_gpu_is_skipped_by_all(workspace: Workspace, tmp_path: Path) -> None:
    workspace.configure(exemplar=[EXEMPLAR], **UNEVEN, image=NOW, feature=NOW, tau=0.0, log_hidden_accuracy=False)
    for process in in_processes(spoilt_step, tmp_path, workspace):
        assert not process["taken"] and process["blamed"] == {"feature"}


# ------------------------------------------------------------------ whole trainings


def whole_training(continues: bool) -> dict[str, Any]:
    """nnU-Net's own function for each of several GPUs, from the trainer to the validation."""
    arguments = (str(DATASET_ID), CONFIGURATION, 0, "nnUNetTrainerCMEMS", "nnUNetPlans", False, continues, False, None, False, False)
    with pytest.MonkeyPatch.context() as patch:
        _pools_are_threads(patch)
        run_training.run_ddp(dist.get_rank(), *arguments, PROCESSES)
    trainer = made[-1]
    return {
        "weights": weights_of(trainer),
        "curves": {key: values for key, values in trainer.logger.local_logger.my_fantastic_logging.items() if "timestamps" not in key},
        "batches": trainer._objective.batches,
        "next draws": (random.random(), np.random.rand(), float(torch.rand(1))),
        "network": type(trainer.network),
    }


def weights_of(trainer: Any) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in trainer.mutual_networks.state_dict().items()}


def test_a_whole_training_in_two_processes(workspace: Workspace, tmp_path: Path) -> None:
    (workspace.base / "splits_final.json").unlink()  # to be made by one process, and read by the other
    workspace.configure(exemplar=[EXEMPLAR], **UNEVEN, ema_decay=0.9, iterations_per_epoch=3)
    first, second = in_processes(whole_training, tmp_path, False)

    assert first["network"] is DistributedDataParallel
    assert same_weights(first["weights"], second["weights"])
    members = [{key[10:]: value for key, value in first["weights"].items() if key.startswith(f"members.{i}.")} for i in (0, 1)]
    assert not same_weights(*members)
    assert first["next draws"][0] != second["next draws"][0] and first["next draws"][2] != second["next draws"][2]
    assert first["next draws"][1] != second["next draws"][1]
    np.testing.assert_equal(first["curves"], second["curves"])
    assert len(json.loads((workspace.base / "splits_final.json").read_text())) == 5
    assert tuple(map(sum, zip(first["batches"], second["batches"]))) == (3, 3, 3)

    fold = workspace.fold()
    history = json.loads((fold / "cmems_history.json").read_text())
    assert history["agreement/mean"] == first["curves"]["agreement/mean"] and len(history["loss/image"]) == 1
    assert len(list(fold.glob("training_log_*.txt"))) == 1
    assert len(json.loads((fold / "validation" / "summary.json").read_text())["metric_per_case"]) == 2
    assert {path.name for path in fold.glob("checkpoint_*")} == {"checkpoint_best.pth", "checkpoint_final.pth"}

    loaded = workspace.resume()
    assert same_weights(weights_of(loaded), first["weights"])


def test_a_training_goes_on_in_two_processes(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nnUNetTrainerCMEMS, "perform_actual_validation", lambda *_: None)
    workspace.configure(exemplar=[EXEMPLAR], **UNEVEN, num_epochs=2, log_hidden_accuracy=False)
    begun = workspace.interrupted(1)
    first, second = in_processes(whole_training, tmp_path, True)
    assert same_weights(first["weights"], second["weights"]) and not same_weights(first["weights"], weights_of(begun))
    np.testing.assert_equal(first["curves"], second["curves"])
    assert len(first["curves"]["loss/supervised"]) == 2
    assert first["next draws"][2] != second["next draws"][2]


# ------------------------------------------------------------------ a step's images


@pytest.mark.parametrize("whole", [Batches(3, 3, 3), Batches(8, 8, 8), Batches(7, 0, 5), Batches(6, 5, 4)])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_steps_images_are_shared_out(whole: Batches, processes: int) -> None:
    shares = [distributed.share(whole, rank, processes) for rank in range(processes)]
    assert tuple(map(sum, zip(*shares))) == whole
    for counts in (*zip(*shares), [sum(part) for part in shares]):  # of each stream, and of all together
        assert max(counts) - min(counts) <= 1


def test_too_few_images_are_refused(workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(CMEMSError, match=r"4 GPUs \(3 exemplar, 2 unlabelled\): set 'exemplar_batch', 'unlabelled_batch' to at least 4"):
        distributed.share(Batches(3, 4, 2), 0, 4)
    plans = workspace.plans()
    plans["configurations"][CONFIGURATION]["batch_size"] = 1
    for sentence in in_processes(refusal, tmp_path, workspace, plans):
        assert "nnUNetPlans.json plans 1 images a step" in sentence and "lower -num_gpus" in sentence


def refusal(workspace: Workspace, plans: dict[str, Any]) -> str:
    with pytest.raises(CMEMSError) as error:
        workspace.make(plans=plans).initialize()
    return str(error.value)
