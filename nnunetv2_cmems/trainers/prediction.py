"""Whole scans, predicted by the networks of a training that is not over, or has just ended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunetv2_cmems.trainers.distributed import without_talk


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
