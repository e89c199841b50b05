"""torch.compile: what a training will need is compiled before it starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._dynamo import OptimizedModule

from nnunetv2_cmems.config import CMEMSConfig
from nnunetv2_cmems.trainers.distributed import without_talk


def phases(config: CMEMSConfig) -> list[float]:
    """A progress, in [0, 1], within each part of a training in which other terms take part."""
    starts = {0.0, config.image.start, config.feature.start}
    found: dict[tuple[bool, ...], float] = {}
    for progress in sorted({*starts, *(math.nextafter(start, 1.0) for start in starts), 1.0}):
        found.setdefault((config.image.weight_at(progress) > 0, config.feature.weight_at(progress) > 0), progress)
    return list(found.values())


def rehearse(network: Any, objective: Any, unlabelled: Tensor | None, offsets: Tensor | None, predict: Callable[[], object] | None) -> None:
    """Run a compiled network once forth and back as in each phase of the training, and forget the gradients.

    Without it the training would stop for a new compilation when the consistency terms begin. Random numbers are drawn.

    Args:
        network: compiled or not; nothing happens if it is not.
        objective: the training's.
        unlabelled: as for ``objective``, like ``offsets``.
        offsets: see there.
        predict: predicts a window, as will be done in the midst of the training; None: that will not be done.
    """
    if not isinstance(without_talk(network), OptimizedModule):
        return
    network.train()
    for progress in phases(objective.config):
        objective(network, unlabelled, progress, offsets).total.backward()
    network.zero_grad(set_to_none=True)
    if predict is not None:
        predict()
