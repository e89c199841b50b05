"""Whole scans, predicted by the members: as nnU-Net ensembles folds, and refined by what the training knows of the organs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor

from nnunetv2_cmems.method.atlas import from_tensor, weighed_on
from nnunetv2_cmems.method.label_space import LabelSpace
from nnunetv2_cmems.method.networks import MutualNetworks
from nnunetv2_cmems.method.perturbations import rotation_planes
from nnunetv2_cmems.method.propagation import agreement_in_scan, agreement_in_slices
from nnunetv2_cmems.method.refinement import Refinement
from nnunetv2_cmems.method.turns import MeanOfViews, part_to_turn, turned_scan
from nnunetv2_cmems.trainers.distributed import unwrapped, without_talk
from nnunetv2_cmems.trainers.faults import one_sentence, while_predicting
from nnunetv2_cmems.trainers.heads import label_space

predict_with_one_network = nnUNetPredictor.predict_sliding_window_return_logits
"""nnU-Net's own sliding window, ``(predictor, image (C, Z, Y, X)) -> logits (heads, Z, Y, X)``."""


@contextlib.contextmanager
def predicting(trainer: Any, *, mirroring: bool) -> Iterator[nnUNetPredictor]:
    """nnU-Net's sliding window with a trainer's networks; afterwards these are as they were, and deep supervision is the training's.

    Args:
        trainer: a trainer of ours that is initialised.
        mirroring: take the mean over the mirrored images, too, along the axes that the training mirrors.
    """
    on_device = trainer.device.type == "cuda"
    predictor = nnUNetPredictor(use_mirroring=mirroring, device=trainer.device, perform_everything_on_device=on_device, allow_tqdm=False)
    predictor.manual_initialization(
        without_talk(trainer.network), trainer.plans_manager, trainer.configuration_manager, None, trainer.dataset_json,
        type(trainer).__name__, trainer.inference_allowed_mirroring_axes,
    )  # fmt: skip
    training = trainer.network.training
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    try:
        yield predictor
    finally:
        trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
        trainer.network.train(training)


def predict_members(predictor: nnUNetPredictor, input_image: Tensor) -> Iterator[Tensor]:
    """Sliding-window logits of each member in turn, on the CPU if there are several.

    Shape:
        (C, *spatial) to one (K, *spatial) a member, half precision.
    """
    predictor.network = without_talk(predictor.network)  # each GPU has cases, and a number of tiles, of its own
    network = unwrapped(predictor.network)
    if not isinstance(network, MutualNetworks) or len(network.members) == 1:
        yield predict_with_one_network(predictor, input_image)
        return
    whole = predictor.network
    try:
        for index, member in enumerate(network.members):
            network.only = index
            predictor.network = member if whole is network else whole  # a compiled network chooses by "only"
            yield predict_with_one_network(predictor, input_image).to("cpu")
    finally:
        network.only, predictor.network = None, whole


@torch.inference_mode()
def predict_like_folds(predictor: nnUNetPredictor, input_image: Tensor) -> Tensor:
    """Sliding-window logits, the members' mean taken as nnU-Net takes the mean of folds.

    nnU-Net sums the tiles in half precision. The mean of the members must be taken after that, as it is
    for folds, so that an export with the members as folds predicts the same to the last voxel.

    Shape:
        (C, *spatial) to (K, *spatial), half precision.
    """
    return _mean(predict_members(predictor, input_image))


class Prediction(NamedTuple):
    """What the members say about a scan, on the CPU.

    Attributes:
        logits: their mean, (heads, Z, Y, X), half precision.
        in_slices: how well they agree on each organ in each slice, (F, Z), see
            :func:`~nnunetv2_cmems.method.propagation.agreement_in_slices`; None: it was not asked for, or there is one member.
        in_scan: likewise on the whole scan, see :func:`~nnunetv2_cmems.method.propagation.agreement_in_scan`.
        shown: (Z, Y, X) voxels of each view that each member has been shown.
    """

    logits: Tensor
    in_slices: Tensor | None = None
    in_scan: float | None = None
    shown: tuple[tuple[int, ...], ...] = ()


def predict_turned(
    predictor: nnUNetPredictor, input_image: Tensor, space: LabelSpace, turns: Sequence[float], shown: list[tuple[int, ...]] | None = None
) -> Iterator[Tensor]:
    """As :func:`predict_members`, the mean over the scan as it is and turned by so many degrees, see :mod:`nnunetv2_cmems.method.turns`.

    Of the turned scan only the surroundings are shown of what a member takes for an organ in the scan as it is. Without ``turns``, and
    where there is one network, whose agreement is not known, the scan is only shown as it is. To ``shown`` the (Z, Y, X) voxels of each
    view are added.
    """
    shown = [] if shown is None else shown
    shown.append(tuple(input_image.shape[1:]))
    network = unwrapped(predictor.network)
    if not turns or not isinstance(network, MutualNetworks) or len(network.members) == 1:
        yield from predict_members(predictor, input_image)
        return
    spacing, patch = predictor.configuration_manager.spacing[-2:], predictor.configuration_manager.patch_size[-2:]
    views, organs = MeanOfViews(space, spacing, predictor.device), None
    for degrees in (0.0, *turns):
        part = None if organs is None else part_to_turn(organs, degrees, spacing, patch)
        view = input_image if part is None else turned_scan(input_image[(..., *part)], degrees, spacing)
        logits = list(predict_members(predictor, view))
        decided = [_decided(member, space)[None] for member in logits]
        views.add(logits, degrees, agreement_in_scan(decided, space), part)
        if organs is None:
            organs = (torch.cat(decided).flatten(0, -4) > 0).any(0)
        else:
            shown.append(tuple(view.shape[1:]))
    yield from views.logits()


@torch.inference_mode()
def predict_with_agreement(
    predictor: nnUNetPredictor,
    input_image: Tensor,
    space: LabelSpace,
    *,
    in_slices: bool = True,
    in_scan: bool = True,
    turns: Sequence[float] = (),
) -> Prediction:
    """:func:`predict_like_folds`, and how well the members agree: in each slice, on the whole scan, or both; with ``turns`` the mean of
    :func:`predict_turned`."""
    decisions: list[Tensor] = []
    shown: list[tuple[int, ...]] = []

    def noted() -> Iterator[Tensor]:
        for logits in predict_turned(predictor, input_image, space, turns, shown):
            decisions.append(_decided(logits, space))
            yield logits

    mean = _mean(noted()).cpu()
    if len(decisions) == 1:
        return Prediction(mean, shown=tuple(shown))
    return Prediction(
        mean,
        agreement_in_slices(decisions, space) if in_slices else None,
        agreement_in_scan([labels[None] for labels in decisions], space) if in_scan else None,
        tuple(shown),
    )


def _decided(logits: Tensor, space: LabelSpace) -> Tensor:
    """int8 in head space; slice by slice, as in single precision a volume may be large."""
    pieces = (space.decide(space.probabilities(piece[None]), 0.0).labels[0].to(torch.int8) for piece in logits.unbind(1))
    return torch.stack(list(pieces), -3)


def predict_for(
    rule: Refinement,
    predictor: nnUNetPredictor,
    input_image: Tensor,
    space: LabelSpace,
    planar: bool,
    *,
    registered: bool = False,
    turned: bool = False,
) -> Prediction:
    """What a refinement takes; the members' agreement where it counts for this rule, or where volumes are ``registered``. Where ``turned``
    the scan is seen turned as this rule says."""
    propagates, turns = rule.propagates(planar), rule.config.turns if turned else ()
    if not (propagates or registered or turns):
        return Prediction(predict_like_folds(predictor, input_image).cpu(), shown=(tuple(input_image.shape[1:]),))
    return predict_with_agreement(predictor, input_image, space, in_slices=propagates, in_scan=registered, turns=turns)


def _mean(members: Iterator[Tensor]) -> Tensor:
    total, count = next(members), 1
    for logits in members:
        total.add_(logits)  # in place, as nnU-Net does: volumes are large
        count += 1
    return total.div_(count)


@one_sentence(while_predicting)
@torch.inference_mode()
def predict_refined(predictor: nnUNetPredictor, input_image: Tensor) -> Tensor:
    """What replaces nnU-Net's sliding window: :func:`predict_like_folds`, refined where the training says how, beside what the volumes say
    by registration that it has kept for this. Test-time augmentation, which nnU-Net's option ``--disable_tta`` switches off, also shows
    the members the scan turned, where the training says so.

    Shape:
        (C, *spatial) to (K, *spatial), half precision.
    """
    network = unwrapped(predictor.network)
    stored = network.refinement if isinstance(network, MutualNetworks) else None
    if stored is None:
        return predict_like_folds(predictor, input_image)
    space = label_space(predictor.label_manager)
    rule = Refinement.from_tensor(stored, space)
    planar = is_planar(predictor.configuration_manager.spacing)
    registered_volumes = network.atlases is not None
    prediction = predict_for(rule, predictor, input_image, space, planar, registered=registered_volumes, turned=predictor.use_mirroring)
    image, registered = input_image.cpu(), None
    if registered_volumes and prediction.in_scan is not None:
        registered = weighed_on(from_tensor(network.atlases), image, rule, space, planar, prediction.in_scan)
    return rule.logits(prediction.logits, image, space, planar, prediction.in_slices, registered).to(prediction.logits.dtype)


def is_planar(spacing: Any) -> bool:
    """Whether a configuration of this spacing is 2D, or its voxels more than three times as thick along the first axis as along another.

    Thick along another axis they are where slices are painted across an image's own (:func:`~nnunetv2_cmems.data.planning.make_plans` puts
    the painted axis first): these slices lie close together, and are not turned within themselves.
    """
    return len(spacing) == 2 or rotation_planes(spacing) == [(1, 2)]


nnUNetPredictor.predict_sliding_window_return_logits = predict_refined
