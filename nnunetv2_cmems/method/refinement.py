"""Labels of a whole scan from what the networks say about it and from the scan's own grey values.

A scan's organs differ from their surroundings in this very scan, whatever its scanner did to the grey values. The refinement is EM
segmentation with a spatial prior, as of Van Leemput et al. (IEEE TMI 18, 1999) and Ashburner & Friston (NeuroImage 26, 2005). The
simplification is ours: the prior is the networks' blurred prediction of the scan itself, grey values have histograms instead of
Gaussians, their likelihood has a weight below 1, and there is no bias field. What an atlas says of the scan is refined likewise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from acvl_utils.morphology.morphology_helper import label_with_component_sizes
from torch import Tensor

from nnunetv2_cmems.config import ScanLabelsConfig
from nnunetv2_cmems.method.boxes import surroundings
from nnunetv2_cmems.method.contacts import Contacts
from nnunetv2_cmems.method.growth import grow
from nnunetv2_cmems.method.label_space import LabelSpace, Regions
from nnunetv2_cmems.method.outlines import Outlines
from nnunetv2_cmems.method.perturbations import blur
from nnunetv2_cmems.method.places import Places
from nnunetv2_cmems.method.propagation import propagate

ITERATIONS = 3
"""Of histograms from probabilities, and probabilities from histograms."""

ALIKE = 0.75
"""Bhattacharyya coefficient of two classes' histograms in the annotated images from which on they are of one kind."""

BINS = 24
HARDLY_ANY = 0.1
"""Part of an even share of the foreground; where a class or region has less, a piece that shows all of it shows that part."""

LEAST_LOGIT = -6.0
"""Of a class against the background, or of a region: below it a voxel is background and no organ is near."""

LEAST_PROBABILITY = 0.0025
"""Likewise of an organ by registration."""

NEAR = 0.02
"""Prior probability of any foreground above which a voxel takes part. Elsewhere the prior stays: there is no island far from organs."""

ROOM = 16
"""Voxels around what may be foreground that are looked at where slices are registered."""

SHARPNESS = 4.0
"""Of outlines in predictions: logarithm of the odds of being inside, one voxel from the border."""

CONFIDENCE_IN_GROWTH = 0.7
"""Share of the grown labels, beside the members' probabilities, in the prior of the second refinement."""

_SMOOTHING = 1.0  # sigma of the histograms' blur, in bins
_FLOOR = 1e-2  # voxels that each bin has at least
_LEAST_PRIOR = 1e-6
_MOST_VOXELS = 10**6  # that quantiles and annotated histograms are taken of; torch's quantile takes no more than 16 million


@dataclass(frozen=True)
class Refinement:
    """What is done to the prediction of a whole scan, and what the annotated images say for it.

    Attributes:
        config: ``appearance``, ``smoothing``, ``largest_piece``, ``propagation`` and ``turns`` count here.
        single: what is one connected piece, from :func:`in_one_piece`.
        share: which other pieces are kept, see :func:`largest_pieces`.
        places: where organs lie; None: it is not known, or does not count.
        outlines: which organs are round; None: none is, or it does not count.
        grows: which classes or regions grow, see :func:`~nnunetv2_cmems.method.growth.grow`; empty: none.
        reach: how far, in voxels; 0: not at all.
        contacts: what may touch what; None: it is not known, or does not count.
        alike: for each class which ones share its grey values, from :func:`alike_apart`; empty: none does.
    """

    config: ScanLabelsConfig
    single: tuple[bool, ...]
    share: float
    places: Places | None = None
    outlines: Outlines | None = None
    grows: tuple[bool, ...] = ()
    reach: float = 0.0
    contacts: Contacts | None = None
    alike: tuple[tuple[bool, ...], ...] = ()

    def to_tensor(self) -> Tensor:
        """(4 + 1 + F + 1 + 6 F + 1 + F (F + 2) + F + 1 + F (F + 1) + F F + T,) for F classes or regions and T turns, to be kept with
        the networks' weights, 2 F + 2 more where slices say where organs end; of what is not known zeros."""
        config = self.config
        numbers = config.appearance, config.smoothing, config.largest_piece, self.share
        count = len(self.single) - 1
        places = [0.0] * (6 * count + 1) if self.places is None else self.places.numbers()
        outlines = [0.0] * (count * (count + 2)) if self.outlines is None else self.outlines.numbers()
        grows = [*map(float, self.grows or [False] * count), self.reach]
        single = map(float, self.single)
        contacts = [0.0] * (count * (count + 1)) if self.contacts is None else self.contacts.numbers()
        alike = [float(one) for row in self.alike or [[False] * count] * count for one in row]
        propagation = float(config.propagation)
        return torch.tensor([*map(float, numbers), *single, propagation, *places, *outlines, *grows, *contacts, *alike, *config.turns])

    @classmethod
    def from_tensor(cls, stored: Tensor, space: LabelSpace) -> Refinement:
        """The inverse of :meth:`to_tensor`; other values of the config are the defaults. Older checkpoints end after ``single``, or after
        ``propagation``, and do without what comes then."""
        appearance, smoothing, largest_piece, share, *others = stored.tolist()
        count = len(space.names)
        single, propagation, rest = others[: 1 + count], others[1 + count : 2 + count], others[2 + count :]
        places, rest = Places.from_numbers(rest, count)
        outlines, rest = rest[: count * (count + 2)], rest[count * (count + 2) :]
        grows, reach, rest = rest[:count], rest[count : count + 1], rest[count + 1 :]
        contacts, rest = rest[: count * (count + 1)], rest[count * (count + 1) :]
        alike, turns = rest[: count * count], rest[count * count :]
        config = ScanLabelsConfig(
            appearance=appearance, smoothing=smoothing, largest_piece=bool(largest_piece), propagation=sum(propagation), turns=tuple(turns)
        )
        return cls(
            config,
            tuple(map(bool, single)),
            share,
            places,
            Outlines.from_numbers(outlines) if any(outlines) else None,
            tuple(map(bool, grows)),
            sum(reach),
            Contacts.from_numbers(contacts, count) if any(contacts) else None,
            tuple(tuple(map(bool, alike[first : first + count])) for first in range(0, len(alike), count)) if any(alike) else (),
        )

    def propagates(self, planar: bool) -> bool:
        """Whether slices that members agree on count for others: only where slices are apart from each other."""
        return planar and self.config.propagation > 0

    def settled(self, probabilities: Tensor, image: Tensor, agreement: Tensor | None, slices: slice, space: LabelSpace) -> Tensor:
        """What is left of the networks' probabilities before grey values count: organs keep to their places, see
        :meth:`~nnunetv2_cmems.method.places.Places.seen_in`, and slices follow those that members agree on, see
        :func:`~nnunetv2_cmems.method.propagation.propagate`.

        Args:
            probabilities: of these slices of a scan.
            image: the same part of it.
            agreement: (F, Z) of the whole scan. None: it is not known, and nothing is propagated.
            slices: which slices these are.
            space: what the heads mean.
        """
        if self.places is not None:
            probabilities = self.places.seen_in(probabilities, space)
        return probabilities if agreement is None else propagate(probabilities, image, agreement[:, slices], self.config.propagation, space)

    def box(
        self, logits: Tensor, space: LabelSpace, planar: bool, agreement: Tensor | None, organs: Tensor | None
    ) -> tuple[slice, ...] | None:
        """The part of a scan that is worked on; None where there is no organ.

        Args:
            logits, space, planar, agreement: as for :meth:`logits`.
            organs: where else than in ``logits`` there are organs, bool (Z, Y, X); None: nowhere.
        """
        somewhere = space.foreground_logits(logits[None])[0] > LEAST_LOGIT
        return self.around(somewhere if organs is None else somewhere | organs, planar, agreement)

    def around(self, somewhere: Tensor, planar: bool, agreement: Tensor | None) -> tuple[slice, ...] | None:
        """The box, with :meth:`margin`, around where there are organs, bool (Z, Y, X); None where there is none."""
        margin = self.margin(agreement)
        return surroundings(somewhere, [0 if planar else margin, margin, margin])

    def margin(self, agreement: Tensor | None) -> int:
        """How far around what may be foreground a scan is worked on, in voxels."""
        return max(math.ceil(3 * self.config.smoothing) + 1, 0 if agreement is None else ROOM, math.ceil(self.reach) + 2)

    def labels(self, probabilities: Tensor, image: Tensor, space: LabelSpace, planar: bool) -> Tensor:
        """Decisions about a scan without small pieces, int8 (Z, Y, X) or (R, Z, Y, X); arguments as for :func:`refine`. Nothing grows, and
        no outlines are drawn."""
        return self.decided(self.refined(probabilities, image, space, planar), space)

    def decided(self, probabilities: Tensor, space: LabelSpace) -> Tensor:
        """Decisions, int8 (Z, Y, X) or (R, Z, Y, X), without small pieces."""
        return self._large_pieces(_decided(probabilities, space), space)

    def drawn(self, probabilities: Tensor, image: Tensor, space: LabelSpace, planar: bool) -> Tensor:
        """As :meth:`labels`, of organs that have grown, that are drawn along their outlines, and that touch only what they may."""
        labels = self.decided(self._grown(probabilities, image, space, planar), space)
        outlines = self._outlines_in_slices(planar)
        return self._possible(labels if outlines is None else outlines.drawn(labels, image, space), planar)

    def _outlines_in_slices(self, planar: bool) -> Outlines | None:
        """Slices are looked at, so only where they are apart."""
        return self.outlines if planar else None

    def _grown(self, probabilities: Tensor, image: Tensor, space: LabelSpace, planar: bool) -> Tensor:
        """Refined probabilities of organs that have grown."""
        refined = self.refined(probabilities, image, space, planar)
        if not self.reach or not any(self.grows):
            return refined
        labels = self.decided(refined, space)
        grown = space.certain(grow(labels, image, self.reach, self.grows, space, planar)[None])[0]
        return self.refined(torch.lerp(probabilities, grown, CONFIDENCE_IN_GROWTH), image, space, planar)

    def refined(self, probabilities: Tensor, image: Tensor, space: LabelSpace, planar: bool) -> Tensor:
        """See :func:`refine`."""
        return refine(probabilities, image, self.config, space, planar, self.alike)

    def _possible(self, labels: Tensor, planar: bool) -> Tensor:
        """Organs that touch only what they may. Slices are looked at, so only where they are apart."""
        return labels if self.contacts is None or not planar else self.contacts.kept(labels)

    def _large_pieces(self, labels: Tensor, space: LabelSpace) -> Tensor:
        return largest_pieces(labels, self.single, self.share, space) if self.config.largest_piece else labels

    def logits(
        self,
        logits: Tensor,
        image: Tensor,
        space: LabelSpace,
        planar: bool,
        agreement: Tensor | None = None,
        registered: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Refined logits of a scan (heads, Z, Y, X), from the networks'. What is not near foreground stays as it is.

        Where a piece or an organ is removed, or the inner of an outline is drawn anew, what comes is as sure as what was there. Near an
        outline along edges the logarithm of the odds is :data:`SHARPNESS` times the distance to it, so that it stays between voxels where
        an export changes the resolution. With ``agreement``, (F, Z), slices follow each other, see :meth:`settled`. With ``registered``,
        from :func:`~nnunetv2_cmems.method.atlas.weighed_on`, the mean with what annotated volumes say is taken.
        """
        box = self.box(logits, space, planar, agreement, None if registered is None else near_organs(registered[0], space))
        if box is None:
            return logits
        place = (slice(None), *box)
        probabilities = self.settled(space.probabilities(logits[place][None])[0], image[place], agreement, box[0], space)
        if registered is not None:
            said, share = registered
            probabilities = torch.lerp(probabilities, said[place], share[box])
        probabilities = self._grown(probabilities, image[place], space, planar)
        labels = _decided(probabilities, space)
        pieces, outlines = self._large_pieces(labels, space), self._outlines_in_slices(planar)
        drawn, borders = (pieces, []) if outlines is None else outlines.traced(pieces, image[place], space)
        kept = self._possible(drawn, planar)
        near = space.deciding(space.logits(probabilities[None]), kept[None], (labels != kept)[None])[0]
        for organs, (z, y, x), distance in borders:
            if (kept != drawn)[..., z, y, x].any():
                continue  # the outline of something that is not there
            near[:, z, y, x] = space.with_odds(near[:, z, y, x], organs, SHARPNESS * distance)
        refined = logits.to(torch.float32, copy=True)
        refined[place] = near
        return refined


def near_organs(probabilities: Tensor, space: LabelSpace) -> Tensor:
    """Where registration sees an organ, bool (Z, Y, X)."""
    return probabilities[-len(space.names) :].amax(0) > LEAST_PROBABILITY


def _decided(probabilities: Tensor, space: LabelSpace) -> Tensor:
    return space.decide(probabilities[None], 0.0).labels[0].to(torch.int8)


@torch.no_grad()
def refine(
    probabilities: Tensor,
    image: Tensor,
    config: ScanLabelsConfig,
    space: LabelSpace,
    planar: bool,
    alike: Sequence[Sequence[bool]] = (),
) -> Tensor:
    """Probabilities that also follow the grey values of this scan. No random numbers are drawn.

    Regions may overlap, so each is refined on its own, as inside against outside. Classes that are alike get the geometric mean of their
    histograms.

    Args:
        probabilities: (K, Z, Y, X) of the classes, or (R, Z, Y, X) of the regions.
        image: (C, Z, Y, X), the preprocessed scan.
        config: ``appearance`` and ``smoothing``.
        space: what the heads mean.
        planar: blur within slices only.
        alike: for each class which others have the same grey values; empty: none has.

    Returns:
        A tensor of the shape of ``probabilities``; with ``appearance`` and ``smoothing`` 0 equal to them.
    """
    if isinstance(space, Regions):
        return torch.stack([_refined(torch.stack([1 - inside, inside]), image, config, planar)[1] for inside in probabilities])
    return _refined(probabilities, image, config, planar, _shares(alike, len(probabilities)))


def _shares(alike: Sequence[Sequence[bool]], heads: int) -> Tensor | None:
    """(heads, heads): how much each head's histogram counts for each; None: only its own does."""
    if not alike:
        return None
    shares = torch.eye(heads)
    shares[1:, 1:] += torch.tensor(alike, dtype=shares.dtype)
    return shares / shares.sum(1, keepdim=True)


def _refined(
    probabilities: Tensor, image: Tensor, config: ScanLabelsConfig, planar: bool, shares: Tensor | None = None
) -> Tensor:
    """:func:`refine` for heads that exclude each other, the background first."""
    prior = _blurred(probabilities, config.smoothing, planar)
    near = prior[1:].sum(0) > NEAR
    if config.appearance == 0 or not near.any():
        return prior
    bins = torch.stack([_binned(channel[near]) for channel in image])
    log_prior = prior[:, near].clamp_min(_LEAST_PRIOR).log()
    found = probabilities[:, near]
    for _ in range(ITERATIONS):
        likelihood = torch.stack([_log_histograms(found, channel, shares)[:, channel] for channel in bins]).sum(0)
        found = (log_prior + config.appearance * likelihood).softmax(0)
    prior[:, near] = found
    return prior


def _blurred(probabilities: Tensor, sigma: float, planar: bool) -> Tensor:
    """A copy, blurred head by head: a large scan's heads together would need several times the memory."""
    if sigma == 0:
        return probabilities.clone()
    batched = probabilities[:, :, None] if planar else probabilities[:, None, None]  # slices or volumes of one channel
    width = torch.tensor(sigma, device=probabilities.device)
    return torch.stack([blur(head, width, sigma).reshape(probabilities.shape[1:]) for head in batched])


def _binned(values: Tensor) -> Tensor:
    """The bin of each of (N,) grey values; the first and the last bin also hold what lies beyond the quantiles 1 % and 99 %."""
    low, high = torch.quantile(values[_some(len(values))], torch.tensor([0.01, 0.99], device=values.device))
    return ((values - low) / (high - low).clamp_min(1e-3) * (BINS - 1)).round().clamp(0, BINS - 1).long()


def _some(count: int) -> slice:
    """Of so many voxels at most :data:`_MOST_VOXELS`, evenly spread."""
    return slice(None, None, -(-count // _MOST_VOXELS))


def _log_histograms(probabilities: Tensor, bins: Tensor, shares: Tensor | None = None) -> Tensor:
    """(K, BINS): logarithm of how often a voxel of each class has each grey value, from (K, N) probabilities and (N,) bins; with ``shares``
    of the geometric means of several."""
    places = torch.arange(BINS, device=bins.device)
    kernel = torch.exp(-0.5 * ((places[:, None] - places[None]) / _SMOOTHING) ** 2)
    counts = torch.stack([torch.bincount(bins, weights.double(), BINS) for weights in probabilities]).to(kernel.dtype)
    smooth = counts @ (kernel / kernel.sum(0)).T + _FLOOR
    logarithms = (smooth / smooth.sum(1, keepdim=True)).log()
    return logarithms if shares is None else (shares.to(logarithms) @ logarithms).log_softmax(1)


def alike_apart(shown: Sequence[tuple[Tensor, Tensor]], contacts: Contacts, space: LabelSpace) -> tuple[tuple[bool, ...], ...]:
    """Which classes have the same grey values in the annotated images: in every channel the histograms' Bhattacharyya coefficient is at
    least :data:`ALIKE`. Only of classes that never touch: between others grey values are what tells them apart.

    Args:
        shown: annotated images (C, *spatial) and label maps (*spatial).
        contacts: from the same images.
        space: what the heads mean.

    Returns:
        For each class which others; empty where there are none.
    """
    greys = torch.cat([image[:, label > 0] for image, label in shown], 1).float()
    some = _some(greys.shape[1])
    greys, labels = greys[:, some], torch.cat([label[label > 0] for _, label in shown])[some]
    classes = space.certain(labels[None])[0][1:]
    same = torch.tensor(contacts.apart)
    for channel in greys:
        roots = (_log_histograms(classes, _binned(channel)) / 2).exp()
        same &= roots @ roots.T >= ALIKE
    return tuple(map(tuple, same.tolist())) if same.any() else ()


# ------------------------------------------------------------------ pieces


def in_one_piece(labels: Sequence[np.ndarray], space: LabelSpace) -> tuple[bool, ...]:
    """What is shown in one connected piece: the foreground as a whole, then each class or region.

    True where every label map that shows it at all does so, and there is one; each slice or volume is looked at alone.

    Args:
        labels: label maps of slices or volumes.
        space: what the networks' heads mean.
    """
    shown = [[_pieces(mask) for mask in _masks(space.target(torch.from_numpy(np.asarray(label)[None])), space)] for label in labels]
    return tuple(max(counts) == 1 for counts in zip(*shown))


def largest_pieces(labels: Tensor, single: Sequence[bool], share: float, space: LabelSpace) -> Tensor:
    """Labels without the connected pieces that are small beside the largest one; these become background.

    The size of a piece of the foreground is the sum of the shares of each class or region that lie in it: the organs are what shows
    something of all, not what shows a lot of one (a lung that is taken for the wall of a heart). What there is hardly any of counts less,
    see :data:`HARDLY_ANY`.

    Args:
        labels: (Z, Y, X) classes, or (R, Z, Y, X) regions; integers.
        single: from :func:`in_one_piece`: first the foreground is cut down, then each class or region that has one piece.
        share: pieces smaller than this share of the largest one are removed; 1: all but the largest.
        space: what the heads mean.

    Returns:
        A tensor of the same shape.
    """
    labels = labels.clone()
    if single[0]:
        labels.masked_fill_(_small_pieces([mask[0].numpy() for mask in space.masks(labels[None])], share), 0)
    for index, mask in enumerate(space.masks(labels[None])):
        if single[1 + index]:
            where = labels[index] if isinstance(space, Regions) else labels
            where.masked_fill_(_small_pieces([mask[0].numpy()], share), 0)
    return labels


def _masks(labels: Tensor, space: LabelSpace) -> Iterator[np.ndarray]:
    """The foreground, then each class or region, of labels in head space."""
    yield torch.stack(list(space.masks(labels))).any(0).numpy()
    yield from (mask.numpy() for mask in space.masks(labels))


def _small_pieces(masks: Sequence[np.ndarray], share: float) -> Tensor:
    """The pieces (diagonal neighbours are connected) of what masks (Z, Y, X) show together that have less than ``share`` of the largest
    one's size: the sum of the shares of each mask that lie in it. Of equal ones with a share of 1 all but the first."""
    whole = np.any(masks, axis=0)
    pieces, counts = label_with_component_sizes(whole)
    if not counts:
        return torch.from_numpy(whole)
    least = HARDLY_ANY * whole.sum() / len(masks)
    sizes = np.sum([np.bincount(pieces[mask], minlength=max(counts) + 1) / max(least, mask.sum()) for mask in masks], 0)
    small = sizes < share * sizes.max() if share < 1 else np.arange(len(sizes)) != sizes.argmax()
    return torch.from_numpy(whole & small[pieces])


def _pieces(mask: np.ndarray) -> int:
    """The number of connected pieces of a mask (1, *spatial); diagonal neighbours are connected."""
    return len(label_with_component_sizes(mask[0])[1])
