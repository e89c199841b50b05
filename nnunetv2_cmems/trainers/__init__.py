"""The trainers that nnU-Net sees."""

from nnunetv2_cmems.trainers.cmems import nnUNetTrainerCMEMS
from nnunetv2_cmems.trainers.presets import (
    nnUNetTrainerCMEMS_exemplarOnly,
    nnUNetTrainerCMEMS_featureOnly,
    nnUNetTrainerCMEMS_imageOnly,
    nnUNetTrainerCMEMS_noSynthesis,
    nnUNetTrainerCMEMS_paper,
)

__all__ = [
    "nnUNetTrainerCMEMS",
    "nnUNetTrainerCMEMS_exemplarOnly",
    "nnUNetTrainerCMEMS_featureOnly",
    "nnUNetTrainerCMEMS_imageOnly",
    "nnUNetTrainerCMEMS_noSynthesis",
    "nnUNetTrainerCMEMS_paper",
]
