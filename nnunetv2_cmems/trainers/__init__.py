"""The trainers that nnU-Net sees."""

from nnunetv2_cmems.trainers.cmems import nnUNetTrainerCMEMS
from nnunetv2_cmems.trainers.presets import (
    nnUNetTrainerCMEMS_allLabels,
    nnUNetTrainerCMEMS_cps,
    nnUNetTrainerCMEMS_crossTeaching,
    nnUNetTrainerCMEMS_exemplarOnly,
    nnUNetTrainerCMEMS_featureOnly,
    nnUNetTrainerCMEMS_fixMatch,
    nnUNetTrainerCMEMS_imageOnly,
    nnUNetTrainerCMEMS_meanTeacher,
    nnUNetTrainerCMEMS_noSynthesis,
    nnUNetTrainerCMEMS_paper,
    nnUNetTrainerCMEMS_uniMatch,
)

__all__ = [
    "nnUNetTrainerCMEMS",
    "nnUNetTrainerCMEMS_allLabels",
    "nnUNetTrainerCMEMS_cps",
    "nnUNetTrainerCMEMS_crossTeaching",
    "nnUNetTrainerCMEMS_exemplarOnly",
    "nnUNetTrainerCMEMS_featureOnly",
    "nnUNetTrainerCMEMS_fixMatch",
    "nnUNetTrainerCMEMS_imageOnly",
    "nnUNetTrainerCMEMS_meanTeacher",
    "nnUNetTrainerCMEMS_noSynthesis",
    "nnUNetTrainerCMEMS_paper",
    "nnUNetTrainerCMEMS_uniMatch",
]
