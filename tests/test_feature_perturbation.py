"""Channel dropout: whole channels, each image and level on its own, the deepest levels first."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nnunetv2_cmems.config import FeatureConfig
from nnunetv2_cmems.method.feature_perturbation import ChannelDropout

DIMENSIONS = pytest.mark.parametrize("d", [2, 3])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def features(d: int, channels: int = 64) -> list[Tensor]:
    return [torch.rand(3, channels, *[n] * d) + 0.5 for n in (4, 2, 1)]


@DIMENSIONS
def test_whole_channels_are_dropped_and_the_rest_is_scaled_up(d: int) -> None:
    before = features(d)
    copies = [level.clone() for level in before]
    after = ChannelDropout(FeatureConfig(dropout=0.25))(before)
    assert len(after) == len(before)
    for old, copy, new in zip(before, copies, after):
        assert torch.equal(old, copy), "the input was written to"
        assert new.shape == old.shape
        dropped = (new == 0).flatten(2).all(-1)
        assert 0.1 < dropped.float().mean() < 0.4
        torch.testing.assert_close(new, old * (~dropped).float().reshape(3, -1, *[1] * d) / 0.75)
        assert not torch.equal(dropped[0], dropped[1]), "images share one draw"


@DIMENSIONS
@pytest.mark.parametrize(("levels", "perturbed"), [(0, [0, 1, 2]), (1, [2]), (2, [1, 2]), (3, [0, 1, 2]), (9, [0, 1, 2])])
def test_levels_are_counted_from_the_deepest(d: int, levels: int, perturbed: list[int]) -> None:
    before = features(d)
    after = ChannelDropout(FeatureConfig(levels=levels))(before)
    assert [i for i in range(3) if not torch.equal(before[i], after[i])] == perturbed


@DIMENSIONS
def test_no_dropout_changes_nothing(d: int) -> None:
    before = features(d)
    for old, new in zip(before, ChannelDropout(FeatureConfig(dropout=0.0))(before)):
        assert torch.equal(old, new)


def test_gradient_flows_through_the_kept_channels_only() -> None:
    level = torch.ones(1, 32, 2, 2, requires_grad=True)
    (after,) = ChannelDropout(FeatureConfig())([level])
    after.sum().backward()
    assert level.grad is not None
    torch.testing.assert_close(level.grad, after.detach())
