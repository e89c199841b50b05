"""The members behind one module: independent, computed in one call, averaged for inference."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import Tensor, nn

from nnunetv2_cmems.config import FeatureConfig
from nnunetv2_cmems.method.feature_perturbation import ChannelDropout
from nnunetv2_cmems.method.networks import MutualNetworks, count_members, splits

KINDS = pytest.mark.parametrize(("kind", "d"), [(PlainConvUNet, 2), (PlainConvUNet, 3), (ResidualEncoderUNet, 2)])
FIELDS = ("supervised", "strong", "perturbed")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def networks(kind: Any = PlainConvUNet, d: int = 2, members: int = 2, deep_supervision: bool = False) -> MutualNetworks:
    depth = "n_conv_per_stage" if kind is PlainConvUNet else "n_blocks_per_stage"

    def make() -> nn.Module:
        return kind(
            input_channels=1,
            n_stages=3,
            features_per_stage=(4, 6, 8),
            conv_op=nn.Conv2d if d == 2 else nn.Conv3d,
            kernel_sizes=3,
            strides=(1, 2, 2),
            num_classes=3,
            n_conv_per_stage_decoder=1,
            conv_bias=True,
            norm_op=nn.InstanceNorm2d if d == 2 else nn.InstanceNorm3d,
            norm_op_kwargs={"affine": True},
            nonlin=nn.LeakyReLU,
            deep_supervision=deep_supervision,
            **{depth: 1},
        )

    return MutualNetworks(make, members)


def views(d: int = 2, members: int = 2, batch: int = 2) -> list[Tensor]:
    return [torch.randn(batch, 1, *[8] * d) for _ in range(members)]


def gradient(module: nn.Module) -> float:
    return sum(float(p.grad.abs().sum()) for p in module.parameters() if p.grad is not None)


def test_members_are_drawn_afresh() -> None:
    net = networks(members=3)
    weights = [next(member.parameters()) for member in net.members]
    assert len(weights) == 3
    assert not any(torch.equal(weights[i], weights[j]) for i in range(3) for j in range(i))


@KINDS
@pytest.mark.parametrize("deep_supervision", [False, True])
def test_one_tensor_gives_the_mean_of_the_members_logits(kind: Any, d: int, deep_supervision: bool) -> None:
    net = networks(kind, d, 3, deep_supervision).eval()
    (x,) = views(d, 1)
    with torch.no_grad():
        result, singles = net(x), [member(x) for member in net.members]
    if deep_supervision:
        assert len(result) == 2
        for scale, parts in zip(result, zip(*singles)):
            torch.testing.assert_close(scale, torch.stack(parts).mean(0))
    else:
        assert result.shape == (2, 3, *[8] * d)
        torch.testing.assert_close(result, torch.stack(singles).mean(0))


@KINDS
@pytest.mark.parametrize("deep_supervision", [False, True])
@pytest.mark.parametrize("dropout", [None, ChannelDropout(FeatureConfig(dropout=0.0))])
def test_one_call_equals_each_member_called_for_each_stream(kind: Any, d: int, deep_supervision: bool, dropout: Any) -> None:
    """Computing the streams as one batch changes nothing, and members see only their own views."""
    net = networks(kind, d, 2, deep_supervision)
    supervised, weak, strong = views(d, batch=3), views(d), views(d)
    for i, output in enumerate(net(supervised, weak, strong, dropout)):
        member = net.members[i]
        expected = {"supervised": member(supervised[i]), "strong": member(strong[i])}
        if dropout is None:
            assert output.perturbed is None
        else:
            expected["perturbed"] = member(weak[i])  # nothing is dropped
        for name, scales in expected.items():
            scales = scales if deep_supervision else [scales]
            assert len(getattr(output, name)) == len(scales) == (2 if deep_supervision else 1)
            for got, wanted in zip(getattr(output, name), scales):
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        finest = member(weak[i])[0] if deep_supervision else member(weak[i])
        torch.testing.assert_close(output.weak, finest, rtol=1e-4, atol=1e-5)
        assert output.weak is not None and not output.weak.requires_grad


def test_streams_that_are_not_asked_for_are_none() -> None:
    net, x = networks(), views()
    drop = ChannelDropout(FeatureConfig())
    for supervised, weak, strong, dropout, given in [
        (x, None, None, None, {"supervised"}),
        (x, x, None, None, {"supervised", "weak"}),
        (x, x, x, None, {"supervised", "weak", "strong"}),
        (x, x, None, drop, {"supervised", "weak", "perturbed"}),
        ([None, None], x, x, drop, {"weak", "strong", "perturbed"}),
        ([None, None], x, None, None, {"weak"}),
        (x, None, None, drop, {"supervised"}),
    ]:
        for output in net(supervised, weak, strong, dropout):
            assert {name for name, value in output._asdict().items() if value is not None} == given


@KINDS
@pytest.mark.parametrize("field", FIELDS)
def test_each_stream_trains_the_whole_member_and_no_other(kind: Any, d: int, field: str) -> None:
    net = networks(kind, d)
    first, _ = net(views(d), views(d), views(d), ChannelDropout(FeatureConfig()))
    getattr(first, field)[0].square().mean().backward()
    assert gradient(net.members[0].encoder) > 0 and gradient(net.members[0].decoder) > 0
    assert gradient(net.members[1]) == 0


def test_dropped_channels_change_the_perturbed_view_alone() -> None:
    net, x = networks(), views()
    plain = net(x, x, x, ChannelDropout(FeatureConfig(dropout=0.0)))
    dropped = net(x, x, x, ChannelDropout(FeatureConfig(dropout=0.5)))
    for a, b in zip(plain, dropped):
        torch.testing.assert_close(a.supervised, b.supervised)
        torch.testing.assert_close(a.strong, b.strong)
        torch.testing.assert_close(a.weak, b.weak)
        assert (a.perturbed[0] - b.perturbed[0]).abs().max() > 1e-3


def test_gradients_survive_mixed_precision() -> None:
    """The weak view is decoded without gradient; autocast's cached weights must not cut the other passes off."""
    net = networks()
    for dropout in (None, ChannelDropout(FeatureConfig())):
        trained = []
        for enabled in (False, True):
            net.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                outputs = net(views(), views(), views(), dropout)
            sum(output.strong[0].float().square().mean() for output in outputs).backward()
            trained.append({name for name, p in net.named_parameters() if p.grad is not None})
        assert trained[0] == trained[1] and len(trained[0]) > 20


@pytest.mark.parametrize("kind", [PlainConvUNet, ResidualEncoderUNet])
def test_deep_supervision_is_switched_for_all_members(kind: Any) -> None:
    net = networks(kind, deep_supervision=True)
    (x,) = views(members=1)
    assert net.deep_supervision is True and isinstance(net(x), list)
    net.deep_supervision = False
    assert net.deep_supervision is False and isinstance(net(x), Tensor)
    assert all(isinstance(member(x), Tensor) for member in net.members)
    assert len(net([x, x])[1].supervised) == 1
    net.deep_supervision = True
    assert [scale.shape[-1] for scale in net([x, x])[1].supervised] == [8, 4]


# weights


@pytest.mark.parametrize(("saved", "built"), [(1, 3), (3, 1), (2, 2)])
def test_number_of_members_follows_the_weights(saved: int, built: int) -> None:
    trained, net = networks(members=saved), networks(members=built)
    (x,) = views(members=1)
    assert count_members(trained.state_dict()) == saved
    net.load_state_dict(copy.deepcopy(trained.state_dict()))
    assert len(net.members) == saved
    torch.testing.assert_close(net(x), trained(x))


def test_weights_of_another_network_are_refused() -> None:
    net = networks()
    single = net.members[0].state_dict()
    assert count_members(single) == 0
    with pytest.raises(RuntimeError, match="members.0"):
        net.load_state_dict(single)
    assert len(net.members) == 2


def test_members_are_counted_not_their_highest_number() -> None:
    assert count_members({}) == 0
    assert count_members({"members.0.a": 0, "members.0.b": 0, "members.11.a": 0, "member.2.a": 0}) == 2


# which networks can be perturbed between encoder and decoder


def test_networks_that_split() -> None:
    assert splits(networks().members[0]) and splits(networks(ResidualEncoderUNet).members[0])
    whole = nn.Conv2d(1, 3, 1)
    assert not splits(whole)
    half = nn.Module()
    half.encoder = nn.Identity()
    assert not splits(half)
    half.decoder = nn.Identity()
    assert splits(half)
    half.encoder.return_skips = False
    assert not splits(half)
