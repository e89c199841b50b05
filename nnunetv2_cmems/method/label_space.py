"""What the networks' heads mean: classes that exclude each other, or regions that may overlap.

Label maps hold one integer per voxel. Losses, pseudo-labels and statistics live in head space: for classes
that is the label map itself, (B, *spatial), for regions one map of 0 and 1 per region, (B, R, *spatial).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nnunetv2_cmems.method.losses import class_counts, weights_from

_LEAST = 1e-6  # probability whose logarithm is still taken


class PseudoLabel(NamedTuple):
    """What is decided about unlabelled images: labels in head space, and where they count (bool, same shape)."""

    labels: Tensor
    confident: Tensor


@dataclass(frozen=True)
class LabelSpace(ABC):
    """From logits to decisions, and from label maps to targets.

    Attributes:
        names: the classes' or regions' names, in the order of the heads; without background.
        ignore: the label value that means "not annotated", if there is one.
    """

    names: tuple[str, ...]
    ignore: int | None = None

    @abstractmethod
    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, heads, *spatial) in single precision, from logits of the same shape."""

    @abstractmethod
    def logits(self, probabilities: Tensor) -> Tensor:
        """Logits of which :meth:`probabilities` makes these, (B, heads, *spatial); finite, also in half precision."""

    @abstractmethod
    def deciding(self, logits: Tensor, labels: Tensor, changed: Tensor) -> Tensor:
        """Logits (B, heads, *spatial) that decide for ``labels`` where ``changed`` (bool, both as labels in head space) is set.

        They are as sure there as they were of what was decided for before.
        """

    @abstractmethod
    def with_odds(self, logits: Tensor, organs: Sequence[int], odds: Tensor) -> Tensor:
        """Logits (heads, N) in which these are the logarithms (N,) of the odds of the likeliest of ``organs`` against the likeliest other.

        ``organs`` are counted from 0 on, without background; among them, and among all others, odds stay as they are. Of a region, which
        is to be the only one, these are the odds of its inside.
        """

    @abstractmethod
    def foreground_logits(self, logits: Tensor) -> Tensor:
        """(B, *spatial): the largest logarithm of the odds of a class against the background, or of a region."""

    @abstractmethod
    def target(self, labels: Tensor) -> Tensor:
        """A label map (B, *spatial) in head space. What is unknown (negative) becomes background."""

    @abstractmethod
    def decide(self, probabilities: Tensor, tau: float) -> PseudoLabel:
        """Hard labels in head space, and where their confidence reaches ``tau``."""

    @abstractmethod
    def certain(self, labels: Tensor) -> Tensor:
        """Probabilities (B, heads, *spatial), each 0 or 1, of which :meth:`decide` makes these labels in head space."""

    @abstractmethod
    def confidence(self, probabilities: Tensor) -> Tensor:
        """How sure :meth:`decide` is, in the shape of its labels."""

    @abstractmethod
    def masks(self, labels: Tensor) -> Iterator[Tensor]:
        """(B, *spatial) bool for each of ``names``, from labels in head space."""

    def shown(self, label: np.ndarray) -> list[np.ndarray]:
        """A mask (*spatial) for each of ``names``, from a label map; what is unknown (negative) shows nothing."""
        return [mask[0].numpy() for mask in self.masks(self.target(torch.from_numpy(np.asarray(label, dtype=np.int64))[None]))]

    @abstractmethod
    def counts(self, labels: Sequence[Tensor]) -> Tensor:
        """Pixels that the cross-entropy's weights are made of, from label maps of any shape."""

    def weights(self, labels: Sequence[Tensor], exponent: float) -> Tensor:
        """Cross-entropy weights from label maps of any shape, see :func:`~nnunetv2_cmems.method.losses.weights_from`."""
        return weights_from(self.counts(labels), exponent)


class Classes(LabelSpace):
    """Softmax over the background and the classes. Label values are 0, 1, 2, ... in the order of the heads.

    Weights are (K,), one per class, the background first.
    """

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.float().softmax(1)

    def logits(self, probabilities: Tensor) -> Tensor:
        return probabilities.clamp_min(_LEAST).log()

    def deciding(self, logits: Tensor, labels: Tensor, changed: Tensor) -> Tensor:
        least, most = logits.aminmax(dim=1, keepdim=True)
        return torch.where(changed[:, None], least.expand_as(logits).scatter(1, labels[:, None].long(), most), logits)

    def with_odds(self, logits: Tensor, organs: Sequence[int], odds: Tensor) -> Tensor:
        inside = torch.zeros(len(logits), 1, dtype=torch.bool)
        inside[[organ + 1 for organ in organs]] = True
        ins, out = (logits.masked_fill(mask, -torch.inf).amax(0) for mask in (~inside, inside))
        return torch.where(inside, logits + (odds - ins + out), logits)

    def foreground_logits(self, logits: Tensor) -> Tensor:
        return logits[:, 1:].amax(1) - logits[:, 0]

    def target(self, labels: Tensor) -> Tensor:
        return labels.clamp_min(0)

    def decide(self, probabilities: Tensor, tau: float) -> PseudoLabel:
        confidence, labels = probabilities.max(1)
        return PseudoLabel(labels, confidence >= tau)

    def certain(self, labels: Tensor) -> Tensor:
        probabilities = torch.zeros(len(labels), len(self.names) + 1, *labels.shape[1:], device=labels.device)
        return probabilities.scatter_(1, labels[:, None].long(), 1.0)

    def confidence(self, probabilities: Tensor) -> Tensor:
        return probabilities.amax(1)

    def masks(self, labels: Tensor) -> Iterator[Tensor]:
        return (labels == k for k in range(1, len(self.names) + 1))

    def counts(self, labels: Sequence[Tensor]) -> Tensor:
        return class_counts(labels, len(self.names) + 1)


@dataclass(frozen=True)
class Regions(LabelSpace):
    """A sigmoid for each region, decided on its own.

    Weights are (R, 2): per region that of its outside and that of its inside, by their own frequencies.

    Attributes:
        values: the label values that make up each region.
    """

    values: tuple[tuple[int, ...], ...] = ()

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.float().sigmoid()

    def logits(self, probabilities: Tensor) -> Tensor:
        return probabilities.clamp(_LEAST, 1 - _LEAST).logit()

    def deciding(self, logits: Tensor, labels: Tensor, changed: Tensor) -> Tensor:
        return torch.where(changed, torch.where(labels > 0, logits.abs(), -logits.abs()), logits)

    def with_odds(self, logits: Tensor, organs: Sequence[int], odds: Tensor) -> Tensor:
        (organ,) = organs
        return torch.where(torch.arange(len(logits))[:, None] == organ, odds, logits)

    def foreground_logits(self, logits: Tensor) -> Tensor:
        return logits.amax(1)

    def target(self, labels: Tensor) -> Tensor:
        return torch.stack([self._inside(labels, region) for region in self.values], 1)

    def decide(self, probabilities: Tensor, tau: float) -> PseudoLabel:
        return PseudoLabel(probabilities > 0.5, self.confidence(probabilities) >= tau)

    def certain(self, labels: Tensor) -> Tensor:
        return labels.float()

    def confidence(self, probabilities: Tensor) -> Tensor:
        return torch.maximum(probabilities, 1 - probabilities)

    def masks(self, labels: Tensor) -> Iterator[Tensor]:
        return (mask > 0 for mask in labels.unbind(1))

    def counts(self, labels: Sequence[Tensor]) -> Tensor:
        def inside(region: tuple[int, ...]) -> list[Tensor]:
            return [torch.where(label < 0, -1, self._inside(label, region).long()) for label in labels]

        return torch.stack([class_counts(inside(region), 2) for region in self.values])

    @staticmethod
    def _inside(labels: Tensor, region: tuple[int, ...]) -> Tensor:
        return reduce(torch.logical_or, [labels == value for value in region])
