"""The step's speed: no wait for the device within it, no recompilation once every term takes part, and how it is measured."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGURATION, DATASET_ID, Workspace
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import Tensor, nn

from nnunetv2_cmems.commands.main import main
from nnunetv2_cmems.config import CMEMSConfig, FeatureConfig, TermConfig
from nnunetv2_cmems.method.exemplars import AS_ANNOTATED, ExemplarBank
from nnunetv2_cmems.method.feature_perturbation import ChannelDropout
from nnunetv2_cmems.method.label_space import Classes, LabelSpace, Regions
from nnunetv2_cmems.method.losses import weights_from
from nnunetv2_cmems.method.networks import MutualNetworks
from nnunetv2_cmems.method.objective import Batches, Objective, passes_per_step
from nnunetv2_cmems.study import speed
from nnunetv2_cmems.study.speed import Series, decoder_share, passes_of_last_step
from nnunetv2_cmems.trainers.compilation import phases
from nnunetv2_cmems.trainers.host_memory import keep_freed_memory

CPU = torch.device("cpu")
DIMENSIONS = pytest.mark.parametrize("d", [2, 3])
CLASSES = Classes(("a", "b"))
REGIONS = Regions(("a", "b"), None, ((1, 2), (2,)))


def network(d: int, heads: int) -> nn.Module:
    convolution = nn.Conv2d if d == 2 else nn.Conv3d
    norm = nn.InstanceNorm2d if d == 2 else nn.InstanceNorm3d
    return PlainConvUNet(
        1, 3, (4, 8, 8), convolution, 3, (1, 2, 2), 1, heads, 1, True, norm, {"affine": True}, None, None, nn.LeakyReLU, None, True
    )


# ---------------------------------------------------------------------- nothing waits for the device


def objective(d: int, space: LabelSpace, config: CMEMSConfig, ignore: bool, device: torch.device) -> Objective:
    """With one exemplar that shows three organs in two groups."""
    label = torch.zeros([24] * d, dtype=torch.long)
    for value, start in ((1, 4), (2, 8), (1, 17)):
        label[(slice(start, start + 4),) * d] = value
    if ignore:
        label[..., -3:] = -1
    bank = ExemplarBank([torch.randn(1, *label.shape)], [label], [16] * d, device, reach=3, organ_scale=config.organ_scale or AS_ANNOTATED)
    counts = space.counts(bank.labels).to(device)
    pseudo_weights = space.weights(bank.labels, 0.5).to(device)

    def weights(progress: float) -> Tensor:
        return weights_from(counts, config.class_weighting_at(progress))

    return Objective(config, bank, Batches(2, 2, 2), space, weights, pseudo_weights, contextlib.nullcontext)


@DIMENSIONS
@pytest.mark.parametrize("space", [CLASSES, REGIONS], ids=["classes", "regions"])
@pytest.mark.parametrize(
    "config",
    [
        CMEMSConfig(num_strong=2, competence=True, organ_scale=(0.5, 2.0)),
        CMEMSConfig(num_members=3, consistency="mean_squared_error", ema_decay=0.9),
        CMEMSConfig(num_members=1, pseudo_dice="all"),
    ],
    ids=["two members", "three members", "one member"],
)
def test_a_step_never_waits_for_the_device(d: int, space: LabelSpace, config: CMEMSConfig) -> None:
    """On the device "meta", which computes shapes only, whatever needs a value fails: item(), nonzero(), cpu(), a branch on a tensor."""
    meta = torch.device("meta")
    made = objective(d, space, config, config.num_members == 3, meta)
    heads = 3 if isinstance(space, Classes) else 2
    networks = MutualNetworks(lambda: network(d, heads), config.num_members, averaged=config.ema_decay > 0).to(meta)
    step = made(networks, torch.randn(2, 1, *[20] * d, device=meta), 0.9, torch.zeros(2, d, device=meta))
    step.total.backward()
    assert step.total.device == meta and set(step.terms) == {"supervised", "synthetic", "image", "feature"}


@pytest.mark.parametrize("wait", [lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x.cpu(), lambda x: bool((x > 0).any())])
def test_waiting_would_be_noticed(wait: Any) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        wait(torch.zeros(3, device="meta"))


# ---------------------------------------------------------------------- nothing is compiled in the middle of a training


class Compiler:
    """A backend of torch.compile that compiles nothing, but counts."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, example: Any) -> Any:
        self.graphs += 1
        return graph.forward


def test_nothing_is_compiled_after_the_first_epoch(workspace: Workspace) -> None:
    workspace.configure(num_epochs=10, image={"start": 0.3, "rampup": 0.2}, feature={"start": 0.6, "rampup": 0.0})
    torch._dynamo.reset()
    compiler = Compiler()
    trainer = workspace.make()
    trainer.initialize()
    trainer.network = torch.compile(trainer.network, backend=compiler)
    trainer.on_train_start()
    assert all(parameter.grad is None for parameter in trainer.network.parameters())
    counts = []
    for epoch in (0, 3, 4, 6, 9):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        trainer.train_step(next(trainer.dataloader_train))
        with torch.no_grad():
            trainer.on_validation_epoch_start()
            trainer.validation_step(next(trainer.dataloader_val))
        counts.append(compiler.graphs)
    assert counts[0] > 0 and counts == counts[:1] * 5
    torch._dynamo.reset()


@pytest.mark.parametrize("members", [1, 3])
def test_members_share_what_is_compiled(members: int) -> None:
    torch._dynamo.reset()
    compiler = Compiler()
    networks = MutualNetworks(lambda: network(2, 3), members)
    compiled = torch.compile(networks, backend=compiler)
    views = [torch.randn(2, 1, 16, 16) for _ in range(members)]
    arguments = views, views, views, ChannelDropout(FeatureConfig(dropout=0.0))
    for found, expected in zip(compiled(*arguments), networks(*arguments)):
        torch.testing.assert_close(found.perturbed, expected.perturbed)
        torch.testing.assert_close(found.weak, expected.weak)
    assert compiler.graphs == 1
    torch._dynamo.reset()


def test_every_phase_of_a_training_is_rehearsed() -> None:
    def active(config: CMEMSConfig) -> list[tuple[bool, bool]]:
        return [(config.image.weight_at(progress) > 0, config.feature.weight_at(progress) > 0) for progress in phases(config)]

    together = TermConfig(start=0.2, rampup=0.3)
    assert active(CMEMSConfig(image=together, feature=together)) == [(False, False), (True, True)]
    later = TermConfig(start=0.5)
    assert active(CMEMSConfig(image=together, feature=later)) == [(False, False), (True, False), (True, True)]
    assert active(CMEMSConfig(image=TermConfig(enabled=False), feature=TermConfig())) == [(False, True)]


# ---------------------------------------------------------------------- the measurement


def test_passes_of_the_last_step() -> None:
    config, batches = CMEMSConfig(), Batches(3, 3, 3)
    member = 3 * 6 + 3 * (1 + 3 + 3 * 0.6 + 2 * 0.4)
    assert passes_of_last_step(config, batches, 0.6) == pytest.approx(2 * member)
    assert passes_per_step(config, batches, 0.6) < 2 * member, "the mean over a training, whose first part has fewer terms"


def test_decoder_share_is_counted() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 1, 1)

    assert decoder_share(Split(), torch.zeros(1, 1, 8, 8)) == pytest.approx(6 / (6 * 9 + 6))
    assert decoder_share(nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 8, 8)) == 0.5


def test_what_the_times_say() -> None:
    stock, ours = Series((0.1, 0.2, 0.1)), Series((0.3, 0.6, 0.4))
    loaded = {"step": (Series((0.2, 0.2)), Series((0.5, 0.5))), "wait": (Series((0.1, 0.0)), Series((0.0, 0.05)))}
    alone = {"nnUNetTrainer": {"start": 2.0, "peak": 100e6}, "ours": {"start": 3.0, "peak": 150e6}}
    found = speed.results((stock, ours), loaded, 72.0, 0.6, 12, alone)
    assert found["ratio"] == pytest.approx(3.0), "step by step: the second was slow for both"
    assert found["par_ratio"] == pytest.approx(3.0 * 36 / 72)
    assert found["waiting"] == pytest.approx({"nnU-Net": 0.25, "ours": 0.05})
    assert found["images_per_second"] == pytest.approx({"nnU-Net": 60.0, "ours": 48.0})
    assert found["peak_memory"]["ratio"] == pytest.approx(1.5) and found["start"]["ratio"] == pytest.approx(1.5)


def test_peak_memory_of_a_step() -> None:
    class Trainer:
        device = CPU
        network = nn.Linear(1000, 1000, bias=False)
        optimizer = torch.optim.SGD(network.parameters(), 0.1)

    def step() -> None:
        first = torch.ones(2_000_000)  # 8 MB
        second = first + 1
        del first
        (second * 2).sum()

    assert speed.peak_memory(Trainer(), step) == pytest.approx(4e6 + 16e6, rel=0.01)


def test_speed_on_the_command_line(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speed, "_alone", lambda spec, name: speed._start_and_peak(dataclasses.replace(spec, trainer=name)))
    common = ["benchmark", "--speed", "-d", str(DATASET_ID), "-c", CONFIGURATION, "-device", "cpu"]
    assert main([*common, "--steps", "2", "--threads", "1", "-o", str(tmp_path / "speed.json")]) == 0
    said = capsys.readouterr().out
    assert "par ratio" in said and "waiting for data" in said
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["trainer"] == "nnUNetTrainerCMEMS" and found["steps"] == 2 and found["par_ratio"] > 0
    assert found["passes"]["nnU-Net"] == 12 and found["peak_memory"]["ratio"] > 1 and found["start"]["ours"] > 0
    assert not workspace.results.exists(), "nothing of the user's is touched"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--speed", "--seeds", "2"], "--speed trains nothing, so --seeds has no meaning"),
        (["--speed", "--steps", "0"], "--steps is 0"),
        (["--speed", "-device", "mps"], "on -device cpu or cuda"),
        (["--speed", "-tr", "nnUNetTrainer"], "choose one of ours"),
        (["--speed", "-tr", "nnUNetTrainerCMENS"], "did you mean"),
        (["--steps", "3"], "--steps belongs to --speed"),
        (["--speed", "-d", "77"], "no data set 77"),
    ],
)
def test_bad_input_is_one_sentence(workspace: Workspace, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "-d", str(DATASET_ID), "-c", CONFIGURATION, "-device", "cpu", *words]) == 1
    assert sentence in capsys.readouterr().err


def test_a_device_that_is_not_there(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["benchmark", "--speed", "-d", str(DATASET_ID), "-c", CONFIGURATION]) == 1
    assert capsys.readouterr().err.endswith("no cuda device on this computer; choose another with -device.\n")


def test_freed_memory_is_kept_where_there_is_a_glibc() -> None:
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
