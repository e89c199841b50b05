"""One training step: unlabelled batch in, named losses out. Reads like the paper's section 3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnunetv2_cmems.config import CMEMSConfig, TermConfig
from nnunetv2_cmems.method.exemplars import UNDEFORMED, ExemplarBank, ExemplarCrops
from nnunetv2_cmems.method.feature_perturbation import ChannelDropout
from nnunetv2_cmems.method.label_space import LabelSpace, PseudoLabel
from nnunetv2_cmems.method.losses import mean_squared_error, over_heads, over_processes, segmentation_loss
from nnunetv2_cmems.method.networks import MemberOutput
from nnunetv2_cmems.method.perturbations import change_appearance, deform, draw_cutmix, sample, sampling_grid
from nnunetv2_cmems.method.synthesis import SyntheticBatch, choose_backgrounds, synthesise

LEFT_OUT = -2
"""In place of a label: a place that does not count, whatever the teacher says about it."""


class Batches(NamedTuple):
    """Images a step: exemplar and synthetic ones per member, unlabelled ones shared by the members."""

    exemplar: int
    synthetic: int
    unlabelled: int


class Supervised(NamedTuple):
    """The supervised images of one member, with label maps and known pixels: exemplar views first, synthetic ones after them."""

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


def passes_per_step(config: CMEMSConfig, batches: Batches, decoder_share: float = 0.5) -> float:
    """What a step costs, in passes of one image through one network; the mean over the training.

    A forward pass counts 1, a backward pass 2; nnU-Net's own step costs three times its batch size. The table is in
    ``docs/method.md``.

    Args:
        config: which streams there are, and when.
        batches: images of each stream.
        decoder_share: the decoder's share in a pass.
    """
    passes = 3.0 * (batches.exemplar + batches.synthetic)
    if config.uses_unlabelled:
        scheduled = config.scheduled
        image, feature = (_active(term) for term in (scheduled.image, scheduled.feature))
        perturbed = 3 * decoder_share + 2 * (1 - decoder_share)
        if config.ema_decay:  # the weak view goes through the member's encoder besides its running mean
            perturbed += 1 - decoder_share
        passes += batches.unlabelled * (1 + 3 * config.num_strong * image + perturbed * feature)
    return config.num_members * passes


def _active(term: TermConfig) -> float:
    """Share of the training in which a term is computed."""
    return 1.0 - term.start if term.enabled and term.weight > 0 else 0.0


class Objective:
    """The loss of CMEMS.

    Args:
        config: weights, ramps and perturbations.
        bank: the exemplars.
        batches: images of each stream.
        space: what the networks' heads mean.
        supervised_weights: weights of the supervised cross-entropy at a fraction of the training, or None.
        pseudo_weights: weights of the consistency's cross-entropy, from ``space``, or None.
        autocast: makes the context in which the networks run.

    Attributes:
        joining: share of the training after which unlabelled places without a label from elsewhere count in the consistency terms.
    """

    def __init__(
        self,
        config: CMEMSConfig,
        bank: ExemplarBank,
        batches: Batches,
        space: LabelSpace,
        supervised_weights: Callable[[float], Tensor] | None,
        pseudo_weights: Tensor | None,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.config = config
        self.bank = bank
        self.batches = batches
        self.space = space
        self.supervised_weights = supervised_weights
        self.pseudo_weights = pseudo_weights
        self.autocast = autocast
        self.joining = 0.0
        self.dropout = ChannelDropout(config.feature_perturbation)

    def __call__(
        self,
        network: Callable[..., list[MemberOutput]],
        unlabelled: Tensor | None,
        progress: float,
        offsets: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Step:
        """One step's losses.

        Args:
            network: a :class:`~nnunetv2_cmems.method.networks.MutualNetworks`, wrapped or not.
            unlabelled: (U, C, *larger) unlabelled crops with room for the deformation, or None where
                no stream needs them.
            progress: share of the training that is done, in [0, 1].
            offsets: (U, d) where the crops' centres lie in their images, in voxels from the middle.
            labels: (U, *larger) classes, or (U, R, *larger) regions, that the unlabelled crops have from elsewhere; they take the
                place of the pseudo-labels, but for -1; :data:`LEFT_OUT` counts nowhere. None: there are none.
        """
        config, members = self.config, range(self.config.num_members)
        with torch.no_grad():
            crops, given = (None, None) if unlabelled is None else self.unlabelled_crops(unlabelled, labels)
            supervised = [self.supervised_batch(crops, offsets) for _ in members]
            u_w = u_s = None
            if config.uses_unlabelled and crops is not None:
                u_w = [change_appearance(crops, config.weak) for _ in members]
                if config.image.weight_at(progress) > 0:
                    views = [[change_appearance(crops, config.strong) for _ in range(config.num_strong)] for _ in members]
                    mixes = [
                        [draw_cutmix(len(crops), self.bank.patch, config.cutmix, crops.device) for _ in range(config.num_strong)]
                        for _ in members
                    ]
                    u_s = [torch.cat([mix(view) for mix, view in zip(*pair)]) for pair in zip(mixes, views)]
        dropout = self.dropout if u_w is not None and config.feature.weight_at(progress) > 0 else None

        with self.autocast():
            outputs = network([batch.images for batch in supervised], u_w, u_s, dropout)

        terms: dict[str, list[Tensor]] = {}
        for output, batch in zip(outputs, supervised):
            self._supervised_terms(terms, output, batch, progress)
        statistics: dict[str, Tensor] = {}
        if u_w is not None:
            probabilities = [self.space.probabilities(output.weak) for output in outputs if output.weak is not None]
            decided = [self.space.decide(p, config.tau) for p in probabilities]
            statistics = unlabelled_statistics(decided, self.space)
            for i, output in enumerate(outputs):
                taught = self._taught(probabilities, decided, i)
                if progress < self.joining:
                    taught = PseudoLabel(taught.labels, torch.zeros_like(taught.confident))
                if given is not None:
                    taught = known_first(given, taught)
                if output.strong is not None:
                    each_view = zip(*(scale.chunk(config.num_strong) for scale in output.strong))
                    losses = [
                        self._consistency(list(scales), PseudoLabel(mix(taught.labels), mix(taught.confident)))
                        for mix, scales in zip(mixes[i], each_view)
                    ]
                    terms.setdefault("image", []).append(torch.stack(losses).mean())
                if output.perturbed is not None:
                    terms.setdefault("feature", []).append(self._consistency(output.perturbed, taught))

        weights: dict[str, float | Tensor] = {name: getattr(config, name).weight_at(progress) for name in terms}
        if config.competence and ("image" in terms or "feature" in terms):
            known = competence([output.supervised[0] for output in outputs if output.supervised is not None], supervised, self.space)
            weights.update({name: weights[name] * known for name in ("image", "feature") if name in terms})
        total = torch.stack([weights[name] * torch.stack(losses).sum() for name, losses in terms.items()]).sum()
        return Step(total, {name: torch.stack(losses).mean().detach() for name, losses in terms.items()}, statistics)

    def unlabelled_crops(self, unlabelled: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The crop that all views of an unlabelled image share, and the same part of its labels where it has any.

        Args:
            unlabelled: (U, C, *larger).
            labels: (U, *larger) classes, or (U, R, *larger) regions, -1 where there are none.

        Returns:
            (U, C, *patch), and int64 (U, *patch) or (U, R, *patch), or None where ``labels`` is.
        """
        grid = sampling_grid(unlabelled.shape[2:], self.bank.draw_deformation(len(unlabelled), self.config.unlabelled_views))
        crops = sample(unlabelled, grid)
        if labels is None:
            return crops, None
        found = labels if labels.ndim == unlabelled.ndim else labels[:, None]  # the heads, as channels
        moved = sample(found.float() + 1, grid, nearest=True).long() - 1  # beyond the crop nothing is known
        return crops, moved if found is labels else moved[:, 0]

    def supervised_batch(self, crops: Tensor | None, offsets: Tensor | None = None) -> Supervised:
        """Exemplar views and synthetic pairs for one member; ``crops`` serve Ω as backgrounds."""
        config, batches = self.config, self.batches
        images, labels, masks = [], [], []
        if batches.exemplar:
            views = self.bank.draw(batches.exemplar, config.exemplar_views, foreground=0.5)
            images.append(views.images)
            labels.append(views.labels)
            masks.append(torch.ones_like(views.labels, dtype=torch.bool) if views.known is None else views.known)
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
        organs: ExemplarCrops = self.bank.draw(batch, UNDEFORMED, foreground=1.0, offsets=offsets, placed=is_unlabelled, whole=True)
        move = self.bank.draw_deformation(batch, config.exemplar_views)
        unknown = None if organs.known is None else deform((~organs.known)[:, None].float(), move, nearest=True) > 0
        backgrounds = deform(organs.backgrounds, move)
        return synthesise(organs, backgrounds, crops, config.synthesis, is_unlabelled, unknown=unknown, spacing=self.bank.spacing)

    def _supervised_terms(self, terms: dict[str, list[Tensor]], output: MemberOutput, batch: Supervised, progress: float) -> None:
        assert output.supervised is not None
        weights = None if self.supervised_weights is None else self.supervised_weights(progress)
        sizes = batch.num_exemplar, len(batch.labels) - batch.num_exemplar
        scales = zip(*(scale.split(sizes) for scale in output.supervised))
        for name, logits, labels, mask in zip(("supervised", "synthetic"), scales, batch.labels.split(sizes), batch.mask.split(sizes)):
            if len(labels):
                loss = segmentation_loss(
                    logits,
                    self.space.target(labels),
                    mask,
                    weights=weights,
                    dice_weight=self.config.dice_weight,
                )
                terms.setdefault(name, []).append(loss)

    def _taught(self, probabilities: Sequence[Tensor], decided: Sequence[PseudoLabel], member: int) -> PseudoLabel:
        """What a member is taught: its teacher's decisions, or the teacher's prediction itself; where the teacher is sure."""
        prediction = teacher(probabilities, member)
        own = next((decision for p, decision in zip(probabilities, decided) if p is prediction), None)  # of one member, no mean
        taught = self.space.decide(prediction, self.config.tau) if own is None else own
        return taught if self.config.consistency == "pseudo_label" else PseudoLabel(prediction, taught.confident)

    def _consistency(self, scales: list[Tensor], taught: PseudoLabel) -> Tensor:
        config = self.config
        if config.consistency == "mean_squared_error":
            return mean_squared_error([self.space.probabilities(scale) for scale in scales], taught.labels, taught.confident)
        return segmentation_loss(
            scales,
            taught.labels,
            taught.confident,
            weights=self.pseudo_weights,
            cross_entropy_weight=config.pseudo_cross_entropy_weight,
            dice_weight=config.pseudo_dice_weight,
            dice_over=config.pseudo_dice,
            over_all_pixels=True,
        )


def known_first(labels: Tensor, taught: PseudoLabel) -> PseudoLabel:
    """``taught``, but for places where ``labels`` (in head space) are not negative: these count there, with full confidence. Places that
    are :data:`LEFT_OUT` do not count."""
    known = labels >= 0
    counts = (known | taught.confident) & (labels != LEFT_OUT)
    return PseudoLabel(torch.where(known, labels.to(taught.labels.dtype), taught.labels), counts)


def teacher(probabilities: Sequence[Tensor], member: int) -> Tensor:
    """What teaches ``member``: the other members' mean prediction. A single member teaches itself.

    Args:
        probabilities: one (U, heads, *spatial) per member, without gradient.
        member: index of the pupil.
    """
    others = [p for i, p in enumerate(probabilities) if i != member] or [probabilities[member]]
    return others[0] if len(others) == 1 else torch.stack(others).mean(0)


@torch.no_grad()
def competence(logits: Sequence[Tensor], batches: Sequence[Supervised], space: LabelSpace) -> Tensor:
    """How well the members segment their supervised images: the Dice of the worst class (or region) that these show.

    Args:
        logits: one (B, heads, *spatial) per member.
        batches: the images and labels that they are of.
        space: what the heads mean.

    Returns:
        A scalar in [0, 1]; 1 where nothing is shown.
    """
    overlaps = []
    for found, batch in zip(logits, batches):
        target = space.target(batch.labels)
        known = over_heads(batch.mask, target)
        truth, decided = (torch.where(known, labels, 0) for labels in (target, space.decide(space.probabilities(found), 0.0).labels))
        (shown,) = over_processes(torch.stack([mask.sum() for mask in space.masks(truth)]))
        overlaps.append(torch.where(shown > 0, overlap(decided, truth, space), 0))
    ((shared, sizes),) = over_processes(torch.stack(overlaps).sum(0))
    return torch.where(sizes > 0, shared / sizes.clamp_min(1e-6), 1.0).amin()


def unlabelled_statistics(decided: Sequence[PseudoLabel], space: LabelSpace) -> dict[str, Tensor]:
    """Sums for the epoch's statistics of coverage and agreement.

    Args:
        decided: each member's decisions about the unlabelled images.
        space: what the heads mean.

    Returns:
        ``coverage`` (n, 4): per member the pixels at or above tau, all pixels, and the same two for
        pixels predicted as foreground; with regions, a pixel counts once for each region. ``agreement``
        (2, F), for two members or more: per foreground class or region the pixels that the first two
        members share, and the mean of what each has.
    """
    rows = []
    for label, confident in decided:
        foreground = label > 0
        sums = torch.stack([confident.sum(), (confident & foreground).sum(), foreground.sum()]).float()
        rows.append(torch.stack([sums[0], torch.full_like(sums[0], label.numel()), sums[1], sums[2]]))
    statistics = {"coverage": torch.stack(rows)}
    if len(decided) > 1:
        statistics["agreement"] = overlap(decided[0].labels, decided[1].labels, space)
    return statistics


def overlap(a: Tensor, b: Tensor, space: LabelSpace) -> Tensor:
    """(2, F): intersections and mean sizes of each foreground class or region in two labels; Dice is their ratio.

    Shape:
        ``a`` and ``b`` in head space: (B, *spatial) class indices, or (B, R, *spatial) for regions.
    """
    shared, sizes = [], []
    for one, other in zip(space.masks(a), space.masks(b)):
        shared.append((one & other).sum())
        sizes.append((one.sum() + other.sum()) / 2)
    return torch.stack([torch.stack(shared).float(), torch.stack(sizes).float()])
