"""Whatever is named as an exemplar: it is loaded if it is there and shows something, else one sentence says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import CONFIGURATION, DATASET, TRAINING, VALIDATION
from fuzzing import Outcomes, changed, examples
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_cmems.config import CMEMSConfig, with_overrides
from nnunetv2_cmems.data.exemplar import Exemplar, PreprocessedDataset, load_exemplars

Place = tuple[str, str | None, int | None]

SPECS = st.fixed_dictionaries(
    {"case": st.sampled_from([*TRAINING] * 4 + [VALIDATION[0], "nobody", "", "../x", "a\nb"])},
    optional={
        "slice": st.one_of(st.integers(0, 4), st.integers(0, 50), st.sampled_from([None, -1, 10**9, 10**10])),
        "axis": st.sampled_from([None, "x", "y", "z", "z"]),
    },
)
GOOD = st.lists(st.tuples(st.sampled_from(TRAINING), st.integers(0, 4)), min_size=1, max_size=4, unique=True).map(
    lambda places: [{"case": case, "slice": i} for case, i in places]
)
NAMED = st.one_of(GOOD, st.lists(SPECS, min_size=1, max_size=4)).flatmap(lambda specs: changed(specs, most=1))


@pytest.fixture(scope="module", params=[2, 3])
def dataset(request: pytest.FixtureRequest, prepared: Path) -> PreprocessedDataset:
    """The prepared data set, read as slices or as volumes."""
    base = prepared / "preprocessed" / DATASET
    plans, described = (json.loads((base / name).read_text()) for name in ("nnUNetPlans.json", "dataset.json"))
    folder = str(base / f"nnUNetPlans_{CONFIGURATION}")
    return PreprocessedDataset.from_plans(folder, infer_dataset_class(folder), PlansManager(plans), described, request.param)


@pytest.fixture(scope="module")
def masks(prepared: Path) -> dict[str, np.ndarray]:
    folder = prepared / "raw" / DATASET / "labelsTr"
    return {case: sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"{case}.nii.gz"))) for case in TRAINING}


def expected(specs: Any, masks: dict[str, np.ndarray], dimensions: int, allow_missing: bool) -> list[Place] | None:
    """The slices and volumes that a list of specs means; None where it is a mistake."""
    if not isinstance(specs, list) or not specs:
        return None
    found: list[Place] = []
    for spec in specs:
        if not isinstance(spec, dict) or not set(spec) <= {"case", "slice", "axis"} or spec.get("case") not in TRAINING:
            return None
        index, axis = spec.get("slice"), spec.get("axis")
        if axis not in (None, "x", "y", "z") or not (index is None or type(index) is int) or (index is None and axis is not None):
            return None
        if index is None:
            found += [(spec["case"], None, None)] if dimensions == 3 else [(spec["case"], "z", i) for i in range(5)]
            continue
        axis = axis or "z"
        along = "zyx".index(axis)
        mask = masks[spec["case"]]
        if (dimensions == 2 and axis != "z") or not 0 <= index < mask.shape[along] or not mask.take(index, along).any():
            return None
        found.append((spec["case"], axis, index))
    parts = [masks[case] if i is None or axis is None else masks[case].take(i, "zyx".index(axis)) for case, axis, i in found]
    shown = {int(value) for part in parts for value in np.unique(part)}
    return found if len(found) == len(set(found)) and (allow_missing or shown >= {0, 1, 2, 3}) else None


def test_any_exemplar(dataset: PreprocessedDataset, masks: dict[str, np.ndarray]) -> None:
    outcomes = Outcomes()

    def load(named: Any, allow_missing: bool) -> list[Exemplar]:
        config = with_overrides(CMEMSConfig(), {"exemplar": named, "allow_missing_classes": allow_missing}, "cmems.json")
        assert not isinstance(config.exemplar, str)
        return load_exemplars(config.exemplar, TRAINING, dataset, config.allow_missing_classes)

    @examples(80)
    @given(NAMED.filter(lambda named: named not in ("auto", "all", "one")), st.booleans())
    def check(named: Any, allow_missing: bool) -> None:
        loaded = outcomes.of(lambda: load(named, allow_missing))
        found = None if loaded is None else [(e.case, e.axis, e.slice) for e in loaded]
        assert found == expected(named, masks, dataset.dimensions, allow_missing)
        for exemplar in loaded or ():
            assert (exemplar.label > 0).any() and np.isfinite(exemplar.image).all()

    check()
    outcomes.check(0.15)
