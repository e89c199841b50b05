"""The method as published, and ablations: trainers that change the config and nothing else."""

from __future__ import annotations

import dataclasses

from nnunetv2_cmems.config import CMEMSConfig, TermConfig
from nnunetv2_cmems.trainers.cmems import nnUNetTrainerCMEMS

_OFF = TermConfig(enabled=False)
_DEFAULT = CMEMSConfig()


class nnUNetTrainerCMEMS_paper(nnUNetTrainerCMEMS):
    """The method as En & Guo describe it, in nnU-Net's own training: SGD, constant class weights, nothing of ours beyond that.

    What the paper leaves open (weights, ramps, strengths of perturbations) has our defaults.
    """

    config = dataclasses.replace(_DEFAULT, optimizer="sgd", final_class_weighting=1.0)


class nnUNetTrainerCMEMS_exemplarOnly(nnUNetTrainerCMEMS):
    """The floor: one network, supervised on the exemplar alone."""

    config = dataclasses.replace(_DEFAULT, num_members=1, synthetic=_OFF, image=_OFF, feature=_OFF)


class nnUNetTrainerCMEMS_noSynthesis(nnUNetTrainerCMEMS):
    """CMEMS without the synthetic pairs of the operation Ω."""

    config = dataclasses.replace(_DEFAULT, synthetic=_OFF)


class nnUNetTrainerCMEMS_imageOnly(nnUNetTrainerCMEMS):
    """CMEMS with mutual learning at image granularity only."""

    config = dataclasses.replace(_DEFAULT, feature=_OFF)


class nnUNetTrainerCMEMS_featureOnly(nnUNetTrainerCMEMS):
    """CMEMS with mutual learning at feature granularity only."""

    config = dataclasses.replace(_DEFAULT, image=_OFF)
