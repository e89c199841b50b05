"""Feature granularity: channel dropout of a member's own weak-view features, at several resolutions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from nnunetv2_cmems.config import FeatureConfig


class ChannelDropout:
    """Drops whole channels of each encoder level, each image and level on its own.

    Args:
        config: ``dropout`` is the probability of a channel, ``levels`` how many of the deepest
            levels are perturbed (0: all).

    Shape:
        A list of (B, C_l, *spatial_l), the finest level first, to a list of the same shapes.
    """

    def __init__(self, config: FeatureConfig) -> None:
        self.dropout = config.dropout
        self.levels = config.levels

    def __call__(self, features: Sequence[Tensor]) -> list[Tensor]:
        first = len(features) - self.levels if self.levels else 0
        return [level if i < first else self._drop(level) for i, level in enumerate(features)]

    def _drop(self, level: Tensor) -> Tensor:
        drop = functional.dropout2d if level.ndim == 4 else functional.dropout3d
        return drop(level, self.dropout, training=True)
