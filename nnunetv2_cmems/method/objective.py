"""One training step: unlabelled batch in, named losses out. Reads like the paper's section 3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnunetv2_cmems.config import CMEMSConfig
from nnunetv2_cmems.method.exemplars import UNDEFORMED, ExemplarBank, ExemplarCrops
from nnunetv2_cmems.method.feature_perturbation import ChannelDropout
from nnunetv2_cmems.method.losses import segmentation_loss
from nnunetv2_cmems.method.networks import MemberOutput
from nnunetv2_cmems.method.perturbations import change_appearance, deform, draw_cutmix, draw_deformation
from nnunetv2_cmems.method.synthesis import SyntheticBatch, choose_backgrounds, synthesise


class Batches(NamedTuple):
    """Images a step: exemplar and synthetic ones per member, unlabelled ones shared by the members."""

    exemplar: int
    synthetic: int
    unlabelled: int


class PseudoLabel(NamedTuple):
    """What a member is taught about the unlabelled images: (U, *spatial) classes, and where they count."""

    labels: Tensor
    confident: Tensor


class Supervised(NamedTuple):
    """The supervised images of one member: exemplar views first, synthetic ones after them."""

    images: Tensor
    labels: Tensor
    mask: Tensor
    num_exemplar: int


class Step(NamedTuple):
    """Result of one step.

    Attributes:
        total: the scalar to minimise.
        terms: each term, unweighted, mean over the members.
        statistics: sums over the batch, from which epoch statistics are made.
    """

    total: Tensor
    terms: dict[str, Tensor]
    statistics: dict[str, Tensor]


def batch_sizes(config: CMEMSConfig, planned: int) -> Batches:
    """Images of each stream, so that a member sees about as many views a step as nnU-Net's batch holds.

    A quarter each of exemplar, synthetic and unlabelled images (the last in two views, weak and
    strong); the share of a stream that is switched off goes to the supervised ones.

    Args:
        config: its ``*_batch`` entries, where given, count instead.
        planned: batch size of nnU-Net's plans.
    """
    quarter = max(1, round(planned / 4))
    unlabelled = 0
    if config.uses_unlabelled:
        unlabelled = config.unlabelled_batch or max(2, quarter)
    left = 2 * quarter if config.uses_unlabelled else 4 * quarter
    synthetic = 0
    if config.synthetic.enabled:
        synthetic = config.synthetic_batch or (max(1, left // 2) if config.supervised.enabled else left)
    exemplar = 0
    if config.supervised.enabled:
        exemplar = config.exemplar_batch or (max(1, left - left // 2) if config.synthetic.enabled else left)
    return Batches(exemplar, synthetic, unlabelled)


class Objective:
    """The loss of CMEMS.

    Args:
        config: weights, ramps and perturbations.
        bank: the exemplars.
        batches: images of each stream.
        supervised_weights: (K,) weights of the supervised cross-entropy, or None.
        pseudo_weights: (K,) weights of the consistency's cross-entropy, or None.
        autocast: makes the context in which the networks run.
    """

    def __init__(
        self,
        config: CMEMSConfig,
        bank: ExemplarBank,
        batches: Batches,
        supervised_weights: Tensor | None,
        pseudo_weights: Tensor | None,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.config = config
        self.bank = bank
        self.batches = batches
        self.supervised_weights = supervised_weights
        self.pseudo_weights = pseudo_weights
        self.autocast = autocast
        self.dropout = ChannelDropout(config.feature_perturbation)

    def __call__(
        self, network: Callable[..., list[MemberOutput]], unlabelled: Tensor | None, progress: float, offsets: Tensor | None = None
    ) -> Step:
        """One step's losses.

        Args:
            network: a :class:`~nnunetv2_cmems.method.networks.MutualNetworks`, wrapped or not.
            unlabelled: (U, C, *larger) unlabelled crops with room for the deformation, or None where
                no stream needs them.
            progress: share of the training that is done, in [0, 1].
            offsets: (U, d) where the crops' centres lie in their images, in voxels from the middle.
        """
        config, members = self.config, range(self.config.num_members)
        with torch.no_grad():
            crops = None if unlabelled is None else self.unlabelled_crops(unlabelled)
            supervised = [self.supervised_batch(crops, offsets) for _ in members]
            u_w = u_s = None
            if config.uses_unlabelled and crops is not None:
                u_w = [change_appearance(crops, config.weak) for _ in members]
                if config.image.weight_at(progress) > 0:
                    u_s = [change_appearance(crops, config.strong) for _ in members]
                    mixes = [draw_cutmix(len(crops), self.bank.patch, config.cutmix, crops.device) for _ in members]
                    u_s = [mix(view) for mix, view in zip(mixes, u_s)]
        dropout = self.dropout if u_w is not None and config.feature.weight_at(progress) > 0 else None

        with self.autocast():
            outputs = network([batch.images for batch in supervised], u_w, u_s, dropout)

        terms: dict[str, list[Tensor]] = {}
        for output, batch in zip(outputs, supervised):
            self._supervised_terms(terms, output, batch)
        statistics: dict[str, Tensor] = {}
        if u_w is not None:
            probabilities = [output.weak.float().softmax(1) for output in outputs if output.weak is not None]
            statistics = unlabelled_statistics(probabilities, config.tau)
            for i, output in enumerate(outputs):
                taught = pseudo_label(probabilities, i, config.tau)
                if output.strong is not None:
                    mixed = PseudoLabel(mixes[i](taught.labels), mixes[i](taught.confident))
                    terms.setdefault("image", []).append(self._consistency(output.strong, mixed))
                if output.perturbed is not None:
                    terms.setdefault("feature", []).append(self._consistency(output.perturbed, taught))

        weights = {name: getattr(config, name).weight_at(progress) for name in terms}
        total = torch.stack([weights[name] * torch.stack(losses).sum() for name, losses in terms.items()]).sum()
        return Step(total, {name: torch.stack(losses).mean().detach() for name, losses in terms.items()}, statistics)

    def unlabelled_crops(self, unlabelled: Tensor) -> Tensor:
        """The crop that all views of an unlabelled image share: (U, C, *larger) to (U, C, *patch)."""
        return deform(unlabelled, draw_deformation(len(unlabelled), self.bank.patch, self.config.unlabelled_views, unlabelled.device))

    def supervised_batch(self, crops: Tensor | None, offsets: Tensor | None = None) -> Supervised:
        """Exemplar views and synthetic pairs for one member; ``crops`` serve Ω as backgrounds."""
        config, batches = self.config, self.batches
        images, labels, masks = [], [], []
        if batches.exemplar:
            views = self.bank.draw(batches.exemplar, config.exemplar_views, foreground=0.5)
            images.append(views.images)
            labels.append(views.labels)
            masks.append(torch.ones_like(views.labels, dtype=torch.bool))
        if batches.synthetic:
            pairs = self.synthetic_batch(crops, offsets)
            images.append(pairs.images)
            labels.append(pairs.labels)
            masks.append(pairs.mask)
        appearance = change_appearance(torch.cat(images), config.supervised_intensity)
        return Supervised(appearance, torch.cat(labels), torch.cat(masks), batches.exemplar)

    def synthetic_batch(self, crops: Tensor | None, offsets: Tensor | None) -> SyntheticBatch:
        """Ω: organs of undeformed exemplar crops on deformed backgrounds.

        On an unlabelled background the organs are pasted about where the exemplar has them, seen from the
        middle of the image.
        """
        config, batch, device = self.config, self.batches.synthetic, self.bank.device
        is_unlabelled = choose_backgrounds(batch, crops, config.synthesis, device)
        if offsets is not None:
            offsets = offsets[torch.arange(batch, device=device) % len(offsets)]
        organs: ExemplarCrops = self.bank.draw(batch, UNDEFORMED, foreground=1.0, offsets=offsets, placed=is_unlabelled)
        move = draw_deformation(batch, self.bank.patch, config.exemplar_views, device)
        return synthesise(organs, deform(organs.backgrounds, move), crops, config.synthesis, is_unlabelled)

    def _supervised_terms(self, terms: dict[str, list[Tensor]], output: MemberOutput, batch: Supervised) -> None:
        assert output.supervised is not None
        parts = {"supervised": slice(0, batch.num_exemplar), "synthetic": slice(batch.num_exemplar, None)}
        for name, part in parts.items():
            if len(batch.labels[part]):
                loss = segmentation_loss(
                    [scale[part] for scale in output.supervised],
                    batch.labels[part],
                    batch.mask[part],
                    weights=self.supervised_weights,
                    dice_weight=self.config.dice_weight,
                )
                terms.setdefault(name, []).append(loss)

    def _consistency(self, scales: list[Tensor], taught: PseudoLabel) -> Tensor:
        return segmentation_loss(
            scales,
            taught.labels,
            taught.confident,
            weights=self.pseudo_weights,
            dice_weight=self.config.pseudo_dice_weight,
            over_all_pixels=True,
        )


def pseudo_label(probabilities: Sequence[Tensor], member: int, tau: float) -> PseudoLabel:
    """What ``member`` is taught: the other members' mean prediction, where it reaches ``tau``.

    A single member teaches itself.

    Args:
        probabilities: one (U, K, *spatial) softmax per member, without gradient.
        member: index of the pupil.
        tau: confidence threshold.
    """
    others = [p for i, p in enumerate(probabilities) if i != member] or [probabilities[member]]
    mean = others[0] if len(others) == 1 else torch.stack(others).mean(0)
    confidence, labels = mean.max(1)
    return PseudoLabel(labels, confidence >= tau)


def unlabelled_statistics(probabilities: Sequence[Tensor], tau: float) -> dict[str, Tensor]:
    """Sums for the epoch's statistics of coverage and agreement.

    Args:
        probabilities: one (U, K, *spatial) softmax per member.
        tau: confidence threshold.

    Returns:
        ``coverage`` (n, 4): per member the pixels at or above tau, all pixels, and the same two for
        pixels predicted as foreground. ``agreement`` (2, K - 1), for two members or more: per
        foreground class the pixels that the first two members share, and the mean of what each has.
    """
    rows, labels = [], []
    for p in probabilities:
        confidence, label = p.max(1)
        sure, foreground = (confidence >= tau).float(), (label > 0).float()
        rows.append(torch.stack([sure.sum(), torch.ones_like(sure).sum(), (sure * foreground).sum(), foreground.sum()]))
        labels.append(label)
    statistics = {"coverage": torch.stack(rows)}
    if len(labels) > 1:
        statistics["agreement"] = overlap(labels[0], labels[1], probabilities[0].shape[1])
    return statistics


def overlap(a: Tensor, b: Tensor, num_classes: int) -> Tensor:
    """(2, K - 1): intersections and mean sizes of each foreground class in two label maps; Dice is their ratio."""
    shared = [((a == k) & (b == k)).sum() for k in range(1, num_classes)]
    sizes = [((a == k).sum() + (b == k).sum()) / 2 for k in range(1, num_classes)]
    return torch.stack([torch.stack(shared).float(), torch.stack(sizes).float()])
