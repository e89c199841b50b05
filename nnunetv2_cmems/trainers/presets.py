"""The method as published, ablations and peers: trainers that change the config and nothing else.

How each peer compares with its publication is in ``docs/peers.md``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from nnunetv2_cmems.config import CMEMSConfig, FeatureConfig, ScanLabelsConfig, SynthesisConfig, TermConfig
from nnunetv2_cmems.trainers.cmems import nnUNetTrainerCMEMS

_OFF = TermConfig(enabled=False)
_DEFAULT = CMEMSConfig()
_NO_ROUNDS = ScanLabelsConfig(at=())


class nnUNetTrainerCMEMS_paper(nnUNetTrainerCMEMS):
    """The method as En & Guo describe it, in nnU-Net's own training: SGD, constant class weights, nothing of ours beyond that.

    What the paper leaves open (weights, ramps, strengths of perturbations) has our defaults.
    """

    config = dataclasses.replace(
        _DEFAULT, architecture="plans", optimizer="sgd", final_class_weighting=1.0, competence=False,
        synthesis=SynthesisConfig(complete_only=False), scan_labels=_NO_ROUNDS, early_steps=0,
    )  # fmt: skip


class nnUNetTrainerCMEMS_exemplarOnly(nnUNetTrainerCMEMS):
    """The floor: one network, supervised on the exemplar alone."""

    config = dataclasses.replace(_DEFAULT, num_members=1, synthetic=_OFF, image=_OFF, feature=_OFF, early_steps=0)


class nnUNetTrainerCMEMS_allLabels(nnUNetTrainerCMEMS_exemplarOnly):
    """The ceiling: one network, supervised on every label of the training fold, in the same training as the others."""

    config = dataclasses.replace(nnUNetTrainerCMEMS_exemplarOnly.config, exemplar="all")


class nnUNetTrainerCMEMS_noSynthesis(nnUNetTrainerCMEMS):
    """CMEMS without the synthetic pairs of the operation Ω."""

    config = dataclasses.replace(_DEFAULT, synthetic=_OFF)


class nnUNetTrainerCMEMS_imageOnly(nnUNetTrainerCMEMS):
    """CMEMS with mutual learning at image granularity only."""

    config = dataclasses.replace(_DEFAULT, feature=_OFF)


class nnUNetTrainerCMEMS_featureOnly(nnUNetTrainerCMEMS):
    """CMEMS with mutual learning at feature granularity only."""

    config = dataclasses.replace(_DEFAULT, image=_OFF)


# ---------------------------------------------------------------------------------------------------------------------
# Peers. They learn from the exemplar as CMEMS does, without synthetic images, and have no warm-up but their own.
#
# Public code that halves its supervised loss, (cross-entropy + Dice) / 2, has its other weights doubled here, where the
# supervised loss is cross-entropy + Dice: the ratio of the terms is what counts.

_PEER = dataclasses.replace(
    _DEFAULT, architecture="plans", synthetic=_OFF, feature=_OFF, competence=False, scan_labels=_NO_ROUNDS, early_steps=0
)
_SAME_VIEWS: dict[str, Any] = {"strong": _DEFAULT.weak, "cutmix": 0.0}  # no strong view: the pupil sees another weak one


class nnUNetTrainerCMEMS_meanTeacher(nnUNetTrainerCMEMS):
    """Mean Teacher (Tarvainen & Valpola, NeurIPS 2017): a running mean of the network teaches it by mean squared error."""

    config = dataclasses.replace(
        _PEER, num_members=1, ema_decay=0.99, consistency="mean_squared_error", tau=0.0,
        image=TermConfig(weight=0.2, rampup=1.0, rampup_shape="gaussian"), **_SAME_VIEWS,
    )  # fmt: skip


class nnUNetTrainerCMEMS_cps(nnUNetTrainerCMEMS):
    """Cross pseudo supervision with CutMix (Chen et al., CVPR 2021): two networks teach each other their hard decisions."""

    config = dataclasses.replace(
        _PEER, tau=0.0, image=TermConfig(weight=1.0), pseudo_dice_weight=0.0, **{**_SAME_VIEWS, "cutmix": 1.0}
    )  # fmt: skip


class nnUNetTrainerCMEMS_fixMatch(nnUNetTrainerCMEMS):
    """FixMatch (Sohn et al., NeurIPS 2020): a network's confident decisions on weak views teach it on strong views."""

    config = dataclasses.replace(_PEER, num_members=1, tau=0.95, image=TermConfig(weight=1.0), pseudo_dice_weight=0.0, cutmix=0.0)


class nnUNetTrainerCMEMS_uniMatch(nnUNetTrainerCMEMS):
    """UniMatch (Yang et al., CVPR 2023): FixMatch with two strong views with CutMix, and one stream of dropped-out features."""

    config = dataclasses.replace(
        _PEER, num_members=1, tau=0.95, num_strong=2, image=TermConfig(weight=1.0), feature=TermConfig(weight=1.0), cutmix=0.5,
        feature_perturbation=FeatureConfig(dropout=0.5, levels=0), pseudo_cross_entropy_weight=0.0, pseudo_dice="all",
    )  # fmt: skip


class nnUNetTrainerCMEMS_crossTeaching(nnUNetTrainerCMEMS):
    """Cross teaching (Luo et al., MIDL 2022): networks of two architectures teach each other their hard decisions by Dice."""

    config = dataclasses.replace(
        _PEER, architecture="mixed", tau=0.0, image=TermConfig(weight=0.2, rampup=1.0, rampup_shape="gaussian"),
        pseudo_cross_entropy_weight=0.0, pseudo_dice="all", **_SAME_VIEWS,
    )  # fmt: skip
