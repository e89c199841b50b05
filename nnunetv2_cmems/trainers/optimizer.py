"""AdamW with a learning rate that warms up and then decays, per step."""

from __future__ import annotations

from torch.optim import Optimizer

_POWER = 0.9  # nnU-Net's polynomial decay


class WarmedUpPoly:
    """nnU-Net's polynomial decay, taken per step, with a linear warm-up.

    It keeps no state: a resumed training sets the rate by its progress.

    Args:
        optimizer: whose rates are set.
        initial_lr: the rate that the decay starts from.
        warmup: fraction of the training over which the rate grows from 0.
    """

    def __init__(self, optimizer: Optimizer, initial_lr: float, warmup: float) -> None:
        self.optimizer = optimizer
        self.initial_lr = initial_lr
        self.warmup = warmup

    def step(self, current_step: int | None = None) -> None:
        """What nnU-Net calls at the start of each epoch; the rate is set per step, by :meth:`set`."""

    def set(self, progress: float, steps: int) -> None:
        """Set the rate of the step that begins when ``progress`` in [0, 1] of the training's ``steps`` is done."""
        rate = self.initial_lr * (1 - progress) ** _POWER
        if self.warmup > 0:
            rate *= min(1.0, (progress + 1 / steps) / self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
