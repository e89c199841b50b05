"""The picture at the end of a training: what it makes of scans that nobody has labelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor
from tqdm import tqdm

from nnunetv2_cmems.data.exemplar import PreprocessedDataset, read_properties
from nnunetv2_cmems.data.unlabelled import read_image
from nnunetv2_cmems.method.label_space import LabelSpace
from nnunetv2_cmems.method.networks import MutualNetworks
from nnunetv2_cmems.method.objective import overlap
from nnunetv2_cmems.study.pictures import contact_sheet

SAMPLE = 8
"""Most scans that are looked at."""


class Look(NamedTuple):
    """A scan, and what the members make of it; all (Z, Y, X).

    Attributes:
        image: the first channel, preprocessed.
        mask: labels by the members' mean.
        disagreement: 0 to 1, how far the members' probabilities are from their mean, on average; with one
            member how far it is from being sure.
        agreement: Dice of the first two members' masks, mean over the classes that either shows; NaN with one
            member.
        slices: the raw index of each slice along the first axis; None where the scan has but one.
    """

    image: np.ndarray
    mask: np.ndarray
    disagreement: np.ndarray
    agreement: float
    slices: np.ndarray | None


def sample(cases: Sequence[str], most: int = SAMPLE) -> list[str]:
    """Up to ``most`` cases, evenly spread over the sorted ones."""
    ordered = sorted(cases)
    if len(ordered) <= most:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (most - 1))] for i in range(most)]


@torch.inference_mode()
def look_at(
    cases: Mapping[str, PreprocessedDataset],
    network: MutualNetworks,
    predictor: nnUNetPredictor,
    predict: Any,
    space: LabelSpace,
    labels: LabelManager,
) -> dict[str, Look]:
    """Predict whole scans with each member.

    Args:
        cases: the cases, and the preprocessed folder of each.
        network: the members.
        predictor: set up with ``network``.
        predict: nnU-Net's sliding window, ``predict(predictor, image (C, Z, Y, X)) -> logits``, for one network.
        space: what the heads mean.
        labels: nnU-Net's label manager, which makes masks of probabilities.
    """
    looks = {}
    for case in tqdm(cases, desc="Predicting a sample of unlabelled scans"):
        image = read_image(case, cases[case])
        members: list[Tensor] = []
        try:
            for member in range(len(network.members)):
                network.only = member
                logits = predict(predictor, torch.from_numpy(image)).float().cpu()
                members.append(space.probabilities(logits[None])[0])
        finally:
            network.only = None
        mean = torch.stack(members).mean(0)
        mask = np.asarray(labels.convert_probabilities_to_segmentation(mean))
        agreement = float("nan")
        if len(members) > 1:
            disagreement = torch.stack([(p - mean).abs().amax(0) for p in members]).mean(0)
            first, second = (space.decide(p[None], 0.0).labels for p in members[:2])
            shared, size = overlap(first, second, space)
            agreement = float((shared / size)[size > 0].mean()) if bool((size > 0).any()) else 0.0
        else:
            disagreement = 2 * torch.minimum(mean, 1 - mean).amax(0)
        looks[case] = Look(image[0], mask, disagreement.numpy().clip(0, 1), agreement, _raw_slices(case, cases[case], image.shape[1]))
    return looks


def _raw_slices(case: str, dataset: PreprocessedDataset, number: int) -> np.ndarray | None:
    """The raw index of each of ``number`` preprocessed slices."""
    properties = read_properties(case, dataset)
    native = int(properties["shape_after_cropping_and_before_resampling"][0])
    first = int(properties["bbox_used_for_cropping"][0][0])
    if int(properties["shape_before_cropping"][0]) == 1:
        return None
    return first + ((np.arange(number) + 0.5) * native / number - 0.5).round().astype(int)


def best_slice(look: Look) -> int:
    """The slice with the largest organs; the middle one where there are none."""
    sizes = (look.mask > 0).sum(axis=(1, 2))
    return int(sizes.argmax()) if sizes.any() else len(sizes) // 2


def draw_looks(path: str, looks: Mapping[str, Look], class_names: Mapping[int, str]) -> None:
    """The contact sheet: one row per scan, its slice with the largest organs."""
    rows = []
    for case, look in looks.items():
        z = best_slice(look)
        index = None if look.slices is None else int(look.slices[z])
        rows.append((case, index, look.agreement, look.image[z], look.mask[z], look.disagreement[z]))
    one = all(np.isnan(look.agreement) for look in looks.values())
    contact_sheet(path, rows, class_names, title="one network: on the right, where it is unsure" if one else "")
