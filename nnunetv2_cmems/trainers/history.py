"""What is logged per epoch beside nnU-Net's own values: one number per key and epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from nnunetv2.training.logging.nnunet_logger import LocalLogger, MetaLogger

from nnunetv2_cmems.files import write_json
from nnunetv2_cmems.study.pictures import plot_curves

_NNUNETS_KEYS = frozenset(LocalLogger().my_fantastic_logging)
_SMOOTHING = 0.9  # as nnU-Net smoothes its pseudo Dice


class History:
    """Our curves, kept in nnU-Net's logger, so that checkpoints and Weights & Biases get them too.

    Keys: ``loss/<term>``, ``coverage/member_<i>`` (share of unlabelled pixels at or above tau),
    ``coverage_foreground/member_<i>`` (the same among pixels predicted as foreground), both by the member's own
    confidence,
    ``agreement/<class or region>`` and ``agreement/mean`` (Dice between the members on unlabelled images),
    ``pseudo_label_*`` (against hidden labels; logged only), ``scan_label_dice/*`` (likewise, in epochs that begin with labels
    of whole scans), ``scan_label_contacts`` (share of the slices in which what has a wall lies within it),
    ``scan_label_greys`` (share of the scans in which organs are told apart by grey values) and
    ``scan_label_passes`` (of one image through one network, for these labels; in the first epoch those that all
    steps together take more because annotated volumes were registered and the consistency terms begin at once). What an epoch lacks
    is NaN.
    """

    def __init__(self, logger: MetaLogger) -> None:
        self.logger = logger

    @property
    def curves(self) -> dict[str, list[float]]:
        """Our keys with one value per epoch."""
        return {key: values for key, values in self._all.items() if key not in _NNUNETS_KEYS}

    @property
    def _all(self) -> dict[str, list[Any]]:
        return self.logger.local_logger.my_fantastic_logging

    def add(self, values: Mapping[str, float], epoch: int) -> None:
        """Log values of an epoch; a key that is new gets NaN for the epochs before."""
        for key, value in values.items():
            self._all.setdefault(key, []).extend([float("nan")] * (epoch - len(self._all[key])))
            self.logger.log(key, float(value), epoch)

    def complete(self, epoch: int) -> None:
        """Give every key that the epoch lacks a NaN, as nnU-Net's logger counts entries."""
        self.add({key: float("nan") for key, values in self.curves.items() if len(values) <= epoch}, epoch)

    def add_epoch(self, outputs: Sequence[Mapping[str, Any]], epoch: int, names: Sequence[str]) -> None:
        """Log what the steps of an epoch returned; ``names`` are those of the foreground classes or regions."""
        values = {}
        for key in sorted({key for output in outputs for key in output if key.startswith("loss/")}):
            values[key] = float(np.mean([output[key] for output in outputs if key in output]))
        coverage = sum(output["coverage"] for output in outputs if "coverage" in output)
        for member, row in enumerate(coverage if isinstance(coverage, np.ndarray) else ()):
            values[f"coverage/member_{member}"] = _ratio(row[0], row[1])
            values[f"coverage_foreground/member_{member}"] = _ratio(row[2], row[3])
        agreement = sum(output["agreement"] for output in outputs if "agreement" in output)
        if isinstance(agreement, np.ndarray):
            values.update(dice_values("agreement", agreement, names))
        self.add(values, epoch)

    def last_is_best(self) -> bool:
        """Whether the smoothed agreement is higher than ever. Without agreement the last epoch is the best."""
        agreement = [value for value in self._all.get("agreement/mean", ()) if not np.isnan(value)]
        smooth: list[float] = []
        for value in agreement:
            smooth.append(_SMOOTHING * smooth[-1] + (1 - _SMOOTHING) * value if smooth else value)
        return not smooth or smooth[-1] >= max(smooth)

    def print_epoch(self, log: Callable[[str], None]) -> None:
        """One line per group of keys, for nnU-Net's log file."""
        groups: dict[str, list[str]] = {}
        for key, values in self.curves.items():
            group, _, name = key.partition("/")
            if not np.isnan(values[-1]):
                groups.setdefault(group, []).append(f"{name or group} {values[-1]:.4f}")
        for group, texts in groups.items():
            log(f"{group}: {', '.join(texts)}")

    def write(self, path: str) -> None:
        """All curves, nnU-Net's numbers among them, as JSON: a list per key with one entry per epoch; null where there is no number."""
        numbers = {key: [_number(value) for value in values] for key, values in self._all.items()}
        write_json(path, {key: values for key, values in numbers.items() if any(value is not None for value in values)})

    def plot(self, path: str) -> None:
        """Draw all curves."""
        plot_curves(self.curves, path)


def dice_values(prefix: str, overlap: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Dice per class or region and their mean, from (2, F) intersections and mean sizes of the F ``names``.

    A class that neither shows is NaN; when none shows any, the mean is 0: two members that see
    nothing agree on nothing.
    """
    dice = [_ratio(shared, size) for shared, size in overlap.T]
    known = [value for value in dice if not np.isnan(value)]
    return {**{f"{prefix}/{name}": value for name, value in zip(names, dice)}, f"{prefix}/mean": float(np.mean(known)) if known else 0.0}


def _number(value: Any) -> float | None:
    return float(value) if np.ndim(value) == 0 and value is not None and np.isfinite(value) else None


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else float("nan")
