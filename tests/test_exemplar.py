"""The annotated slice: found where the user says it is, chosen without looking at labels, refused in one sentence."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2, nnUNetDatasetNumpy
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_cmems.config import ExemplarSpec
from nnunetv2_cmems.data.annotation import LabelValues
from nnunetv2_cmems.data.exemplar import (
    PreprocessedDataset,
    choose_exemplar,
    list_candidates,
    load_exemplars,
    rank_exemplars,
    read_case_image,
)
from nnunetv2_cmems.data.suggestion import rank_slices, summarise_scan
from nnunetv2_cmems.errors import CMEMSError

NAMES = {1: "ring", 2: "disc"}
OFFSET = 2  # slices that cropping took away from the front of every made-up case
CASES = [f"p{i}_t{t}" for i in range(4) for t in (1, 2)]


def labels(shape: tuple[int, int, int], both: range, first_only: range = range(0)) -> np.ndarray:
    """Label (1, Z, Y, X): the slices of ``both`` show classes 1 and 2, those of ``first_only`` class 1."""
    label = np.zeros((1, *shape), np.int16)
    label[:, [*both, *first_only], 2:6, 2:6] = 1
    label[:, [*both], 3:5, 3:5] = 2
    return label


def save(folder: Path, case: str, image: np.ndarray, label: np.ndarray, classes: Any = (1, 2), **changes: Any) -> None:
    """Save image and label (C, Z, Y, X) as nnU-Net does, as if cropped out of an image with two more slices at either end."""
    shape = image.shape[1:]
    properties = {
        "spacing": [5.0, 1.0, 1.0],
        "shape_before_cropping": (shape[0] + 2 * OFFSET, *shape[1:]),
        "bbox_used_for_cropping": [[OFFSET, OFFSET + shape[0]], [0, shape[1]], [0, shape[2]]],
        "shape_after_cropping_and_before_resampling": shape,
        "class_locations": DefaultPreprocessor._sample_foreground_locations(label, list(classes)),
    } | changes
    chunks = (1, 1, *shape[1:])
    nnUNetDatasetBlosc2.save_case(image, label, properties, str(folder / case), chunks=chunks, blocks=chunks)


def scan(seed: int, shape: tuple[int, int, int] = (7, 20, 18)) -> np.ndarray:
    """Image (1, Z, Y, X): a bright square on noise."""
    image = np.random.default_rng(seed).normal(size=(1, *shape)).astype(np.float32)
    image[:, :, 5 : 10 + seed % 3, 5:12] += 5
    return image


def data_set(folder: Path, **changes: Any) -> PreprocessedDataset:
    known = {"folder": str(folder), "dataset_class": nnUNetDatasetBlosc2, "transpose_forward": (0, 1, 2), "class_names": NAMES}
    return PreprocessedDataset(**(known | changes))


@pytest.fixture
def dataset(tmp_path: Path) -> PreprocessedDataset:
    """Eight cases of four patients; slices 1 to 5 of 7 (raw 3 to 7) show both classes, slice 6 (raw 8) one, slice 0 (raw 2) none."""
    for seed, case in enumerate(CASES):
        save(tmp_path, case, scan(seed), labels((7, 20, 18), range(1, 6), range(6, 7)))
    return data_set(tmp_path)


def change_properties(dataset: PreprocessedDataset, case: str, **changes: Any) -> None:
    path = Path(dataset.folder, f"{case}.pkl")
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()) | changes))


def refusal(specs: list[ExemplarSpec], dataset: PreprocessedDataset, cases: list[str] = CASES, allow: bool = False) -> str:
    with pytest.raises(CMEMSError) as caught:
        load_exemplars(specs, cases, dataset, allow)
    return str(caught.value)


# Where a slice lies


def plans(transpose: list[int], spacing: list[float]) -> PlansManager:
    resample = "resample_data_or_seg_to_shape"
    configuration: dict[str, Any] = {
        "data_identifier": "plans_2d",
        "preprocessor_name": "DefaultPreprocessor",
        "patch_size": [16, 16],
        "spacing": spacing,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "architecture": {},
    }
    for what, order in (("data", 3), ("seg", 1), ("probabilities", 1)):
        configuration[f"resampling_fn_{what}"] = resample
        configuration[f"resampling_fn_{what}_kwargs"] = {"is_seg": what == "seg", "order": order, "order_z": 0, "force_separate_z": None}
    return PlansManager(
        {
            "dataset_name": "Dataset999_Made",
            "plans_name": "plans",
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": transpose,
            "transpose_backward": [int(i) for i in np.argsort(transpose)],
            "foreground_intensity_properties_per_channel": {"0": {}},
            "configurations": {"2d": configuration},
        }
    )


@pytest.mark.parametrize(
    ("transpose", "axis", "raw_spacing"),
    [([0, 1, 2], "z", [5.0, 1.0, 1.0]), ([1, 0, 2], "y", [1.0, 3.0, 2.0]), ([2, 0, 1], "x", [1.0, 2.0, 3.0])],
)
def test_a_marked_raw_slice_is_found_after_nnunets_own_preprocessing(
    tmp_path: Path, transpose: list[int], axis: str, raw_spacing: list[float]
) -> None:
    raw_index, along = 9, "zyx".index(axis)
    raw = np.zeros((1, 16, 18, 20), np.float32)
    raw[:, 3:14, 4:16, 5:18] = np.random.default_rng(0).uniform(1, 2, (1, 11, 12, 13))  # the rest is cropped away
    label = np.zeros_like(raw, dtype=np.int16)
    label[:, 6:12, 6:12, 6:12] = 1
    label[:, 8:10, 8:10, 8:10] = 2
    mark = [slice(None), slice(5, 12), slice(5, 12), slice(5, 12)]
    mark[1 + along] = slice(raw_index, raw_index + 1)
    raw[tuple(mark)] = 50.0
    manager = plans(transpose, [0.8, 0.7])
    dataset_json = {"labels": {"background": 0, **{name: value for value, name in NAMES.items()}}, "channel_names": {"0": "MR"}}
    preprocessor = DefaultPreprocessor(verbose=False)
    image, segmentation, properties = preprocessor.run_case_npy(
        raw, label, {"spacing": raw_spacing}, manager, manager.get_configuration("2d"), dataset_json
    )
    chunks = (1, 1, *image.shape[2:])
    nnUNetDatasetBlosc2.save_case(image, segmentation, properties, str(tmp_path / "a"), chunks=chunks, blocks=chunks)
    dataset = PreprocessedDataset.from_plans(str(tmp_path), nnUNetDatasetBlosc2, manager, dataset_json)

    assert (dataset.slice_axis, dataset.class_names) == (axis, NAMES)
    for named in (axis, None):
        (exemplar,) = load_exemplars([ExemplarSpec("a", raw_index, named)], ["a"], dataset)  # type: ignore[arg-type]
        assert (exemplar.axis, exemplar.slice) == (axis, raw_index)
        assert exemplar.index == int(image.max(axis=(0, 2, 3)).argmax())
        assert exemplar.index == raw_index - (3, 4, 5)[along]
        np.testing.assert_array_equal(exemplar.image, image[:, exemplar.index])
        np.testing.assert_array_equal(exemplar.label, np.maximum(segmentation[0, exemplar.index], 0))
        assert exemplar.image.dtype == np.float32 and exemplar.label.dtype == np.int16
    chosen = choose_exemplar(["a"], dataset)
    assert chosen.axis == axis and chosen.slice in (8, 9)  # which show both classes


def test_outside_of_the_nonzero_mask_is_background_and_ignore_is_unknown(tmp_path: Path) -> None:
    label = labels((3, 10, 10), range(3))
    label[..., 0], label[..., 9] = -1, 3
    save(tmp_path, "a", scan(0, (3, 10, 10)), label)
    dataset = dataclasses.replace(data_set(tmp_path), labels=LabelValues({0: "background", 1: "ring", 2: "disc"}, 3))
    (exemplar,) = load_exemplars([ExemplarSpec("a", OFFSET)], ["a"], dataset)
    assert set(np.unique(exemplar.label)) == {-1, 0, 1, 2}
    assert (exemplar.label[:, 0] == 0).all() and (exemplar.label[:, 9] == -1).all()


def test_an_image_of_one_slice(tmp_path: Path) -> None:
    save(tmp_path, "photo", np.ones((3, 1, 10, 12), np.float32), labels((1, 10, 12), range(1)),
         shape_before_cropping=(1, 10, 12), bbox_used_for_cropping=[[0, 1], [0, 10], [0, 12]])  # fmt: skip
    spec = choose_exemplar(["photo"], data_set(tmp_path))
    assert spec == ExemplarSpec("photo", 0, "z")
    (exemplar,) = load_exemplars([spec], ["photo"], data_set(tmp_path))
    assert exemplar.image.shape == (3, 10, 12) and exemplar.label.shape == (10, 12)


def test_numpy_data_sets_are_read_as_well(tmp_path: Path, dataset: PreprocessedDataset) -> None:
    (tmp_path / "npz").mkdir()
    for case in CASES:
        image, label, _, properties = nnUNetDatasetBlosc2(dataset.folder, [case]).load_case(case)
        nnUNetDatasetNumpy.save_case(image[:], label[:], properties, str(tmp_path / "npz" / case))
    other = data_set(tmp_path / "npz", dataset_class=nnUNetDatasetNumpy)
    assert rank_exemplars(CASES, other) == rank_exemplars(CASES, dataset)
    specs = [choose_exemplar(CASES, dataset)]
    np.testing.assert_array_equal(load_exemplars(specs, CASES, other)[0].image, load_exemplars(specs, CASES, dataset)[0].image)
    np.testing.assert_array_equal(read_case_image(CASES[0], other), scan(0))


def test_several_exemplars_come_in_the_order_they_are_named(dataset: PreprocessedDataset) -> None:
    specs = [ExemplarSpec("p3_t1", 4), ExemplarSpec("p0_t1", 8), ExemplarSpec("p3_t1", 3)]
    loaded = load_exemplars(specs, CASES, dataset)
    assert [(e.case, e.slice, e.index) for e in loaded] == [("p3_t1", 4, 2), ("p0_t1", 8, 6), ("p3_t1", 3, 1)]
    assert loaded[0].spec == ExemplarSpec("p3_t1", 4, "z")


# The choice


def test_the_choice_depends_on_nothing_but_the_cases(dataset: PreprocessedDataset) -> None:
    ranked = rank_exemplars(CASES, dataset)
    assert ranked == rank_exemplars(CASES[::-1], dataset) == rank_exemplars(CASES, dataset)
    assert choose_exemplar(CASES, dataset) == ranked[0]
    assert sorted(spec.case for spec in ranked) == CASES
    assert {spec.slice for spec in ranked} <= {2 + OFFSET, 3 + OFFSET, 4 + OFFSET}, "the middle third"
    assert len(load_exemplars(ranked, CASES, dataset)) == len(CASES)


def test_the_choice_is_what_suggest_would_name_first(dataset: PreprocessedDataset) -> None:
    scans = [summarise_scan(case, read_case_image(case, dataset), 0, (1, 1), (20, 18)) for case in CASES]
    named = [(suggestion.case, suggestion.slice + OFFSET) for suggestion in rank_slices(scans, 0)]
    shown = {(spec.case, spec.slice) for spec in list_candidates(CASES, dataset)}
    assert set(named) <= shown, "every middle slice shows all classes here"
    assert [(spec.case, spec.slice) for spec in rank_exemplars(CASES, dataset)] == named


def test_a_case_whose_middle_lacks_a_class_comes_last(tmp_path: Path) -> None:
    for i in range(4):
        save(tmp_path, f"c{i}", scan(3 * i), labels((7, 20, 18), range(2) if i == 1 else range(7)))
    ranked = rank_exemplars([f"c{i}" for i in range(4)], data_set(tmp_path))
    assert (ranked[-1].case, ranked[-1].slice) == ("c1", OFFSET)


def test_every_patient_has_its_turn_before_one_comes_again(dataset: PreprocessedDataset) -> None:
    patients = [spec.case[:2] for spec in rank_exemplars(CASES, dataset)]
    assert sorted(patients[:4]) == sorted(patients[4:]) == ["p0", "p1", "p2", "p3"]


def test_the_odd_one_out_comes_last(tmp_path: Path) -> None:
    for i in range(6):
        image = scan(3 * i)
        save(tmp_path, f"c{i}", image[..., ::-1].copy() if i == 2 else image, labels((7, 20, 18), range(7)))
    assert rank_exemplars([f"c{i}" for i in range(6)], data_set(tmp_path))[-1].case == "c2"


def test_the_pixels_of_labels_do_not_matter(dataset: PreprocessedDataset, tmp_path: Path) -> None:
    (tmp_path / "noise").mkdir()
    for case in CASES:
        image, label, _, properties = nnUNetDatasetBlosc2(dataset.folder, [case]).load_case(case)
        noise = np.random.default_rng(1).integers(0, 3, label.shape).astype(np.int16)
        chunks = (1, 1, *image.shape[2:])
        nnUNetDatasetBlosc2.save_case(image[:], noise, properties, str(tmp_path / "noise" / case), chunks=chunks, blocks=chunks)
    assert rank_exemplars(CASES, data_set(tmp_path / "noise")) == rank_exemplars(CASES, dataset)


def test_areas_do_not_matter(dataset: PreprocessedDataset) -> None:
    before = rank_exemplars(CASES, dataset)
    for case in CASES:
        locations = pickle.loads(Path(dataset.folder, f"{case}.pkl").read_bytes())["class_locations"]
        one_each = {c: np.stack([rows[rows[:, 1] == z][0] for z in np.unique(rows[:, 1])]) for c, rows in locations.items()}
        change_properties(dataset, case, class_locations=one_each)
    assert rank_exemplars(CASES, dataset) == before


def test_images_of_different_size_and_flat_images_can_be_compared(tmp_path: Path) -> None:
    shapes = {"a1": (4, 12, 30), "b1": (6, 30, 12), "c1": (5, 20, 21)}
    for seed, (case, shape) in enumerate(shapes.items()):
        save(tmp_path, case, scan(seed, shape), labels(shape, range(3)))
    save(tmp_path, "d1", np.zeros((1, 4, 20, 20), np.float32), labels((4, 20, 20), range(3)))
    assert len(rank_exemplars([*shapes, "d1"], data_set(tmp_path))) == 4


def test_regions_count_as_shown_when_any_of_their_labels_is(tmp_path: Path) -> None:
    regions = data_set(tmp_path, class_names={(1, 2): "whole", (2,): "core"})
    save(tmp_path, "a1", scan(0), labels((7, 20, 18), range(1, 3), range(3, 6)), classes=((1, 2), (2,)))
    assert [spec.slice - OFFSET for spec in list_candidates(["a1"], regions)] == [1, 2]
    assert len(load_exemplars([ExemplarSpec("a1", 3)], ["a1"], regions)) == 1
    assert "lacks 'core'" in refusal([ExemplarSpec("a1", 6)], regions, ["a1"])


def test_unlabelled_cases_are_passed_over(dataset: PreprocessedDataset) -> None:
    for case in CASES[1:]:
        path = Path(dataset.folder, f"{case}.pkl")
        path.write_bytes(pickle.dumps({k: v for k, v in pickle.loads(path.read_bytes()).items() if k != "class_locations"}))
    assert [spec.case for spec in rank_exemplars(CASES, dataset)] == CASES[:1]


def test_no_slice_with_all_classes(tmp_path: Path) -> None:
    label = labels((7, 20, 18), range(0), range(2, 5))
    label[:, 5, 2:6, 2:6] = 2
    save(tmp_path, "a1", scan(0), label)
    dataset = data_set(tmp_path)
    with pytest.raises(CMEMSError, match=r"slice 4 of case 'a1'\) lacks 'disc'; name the exemplar"):
        choose_exemplar(["a1"], dataset)
    assert choose_exemplar(["a1"], dataset, allow_missing_classes=True) == ExemplarSpec("a1", 3 + OFFSET, "z")

    save(tmp_path, "b1", scan(0), labels((7, 20, 18), range(0), range(2, 5)))
    with pytest.raises(CMEMSError, match="no training case shows 'disc'"):
        choose_exemplar(["b1"], dataset)

    save(tmp_path, "c1", scan(0), labels((7, 20, 18), range(0)))
    for allow in (False, True):
        with pytest.raises(CMEMSError, match="None of the 1 training cases .* has a labelled class"):
            choose_exemplar(["c1"], dataset, allow)


# What is refused


def test_no_exemplar(dataset: PreprocessedDataset) -> None:
    assert "No exemplar is named" in refusal([], dataset)


def test_a_case_that_is_not_there(dataset: PreprocessedDataset) -> None:
    said = refusal([ExemplarSpec("p9_t1", 3)], dataset)
    assert "'p9_t1' is not in" in said and dataset.folder in said and "p0_t1" in said


def test_a_validation_case(dataset: PreprocessedDataset) -> None:
    assert "'p3_t2' is not a training case of this fold" in refusal([ExemplarSpec("p3_t2", 4)], dataset, CASES[:-1])


@pytest.mark.parametrize(("index", "why"), [(0, "crops it away"), (1, "crops it away"), (9, "crops it away"), (11, "the image has 11")])
def test_a_slice_that_is_not_there(dataset: PreprocessedDataset, index: int, why: str) -> None:
    said = refusal([ExemplarSpec("p0_t1", index)], dataset)
    assert f"'p0_t1' has no usable slice {index} along z" in said and why in said and "from 2 to 8" in said


def test_a_slice_along_another_axis(dataset: PreprocessedDataset) -> None:
    said = refusal([ExemplarSpec("p0_t1", 4, "x")], dataset)
    assert "along the x axis" in said and 'along "z"' in said


def test_a_slice_named_twice(dataset: PreprocessedDataset) -> None:
    assert "named twice" in refusal([ExemplarSpec("p0_t1", 4), ExemplarSpec("p0_t1", 4, "z")], dataset)


def test_missing_classes(dataset: PreprocessedDataset) -> None:
    one, other = ExemplarSpec("p0_t1", 8), ExemplarSpec("p1_t1", 8)
    assert "The exemplar lacks 'disc' (slice 8 of case 'p0_t1')" in refusal([one], dataset)
    assert "The 2 exemplars together lack 'disc'" in refusal([one, other], dataset)
    assert len(load_exemplars([one, other], CASES, dataset, allow_missing_classes=True)) == 2
    assert len(load_exemplars([one, ExemplarSpec("p1_t1", 4)], CASES, dataset)) == 2


@pytest.mark.parametrize("allow", [False, True])
def test_an_empty_slice(dataset: PreprocessedDataset, allow: bool) -> None:
    said = refusal([ExemplarSpec("p0_t1", 4), ExemplarSpec("p1_t1", 2)], dataset, allow=allow)
    assert "Slice 2 of case 'p1_t1' has no foreground" in said


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity(tmp_path: Path, value: float) -> None:
    image = scan(0)
    image[0, 3, 1, 1] = value
    save(tmp_path, "a1", image, labels((7, 20, 18), range(7)))
    dataset = data_set(tmp_path)
    assert "Slice 5 of case 'a1' has NaN or infinite values" in refusal([ExemplarSpec("a1", 5)], dataset, ["a1"])
    assert len(load_exemplars([ExemplarSpec("a1", 4)], ["a1"], dataset)) == 1
    with pytest.raises(CMEMSError, match="image of case 'a1' has NaN"):
        choose_exemplar(["a1"], dataset)
    with pytest.raises(CMEMSError, match="image of case 'a1' has NaN"):
        read_case_image("a1", dataset)


@pytest.mark.parametrize("ending", [".b2nd", "_seg.b2nd", ".pkl"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_a_damaged_file(dataset: PreprocessedDataset, ending: str, damage: str) -> None:
    path = Path(dataset.folder, f"p0_t1{ending}")
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    said = refusal([ExemplarSpec("p0_t1", 4)], dataset)
    assert "cannot be read" in said and f"p0_t1{ending}" in said and "run nnUNetv2_preprocess again" in said
    assert "\n" not in said


def test_properties_that_are_not_nnunets(dataset: PreprocessedDataset) -> None:
    path = Path(dataset.folder, "p0_t1.pkl")
    path.write_bytes(pickle.dumps({"spacing": [1, 1, 1]}))
    assert f"{path} cannot be read (KeyError: 'bbox_used_for_cropping')" in refusal([ExemplarSpec("p0_t1", 4)], dataset)
    with pytest.raises(CMEMSError, match="p0_t1.pkl cannot be read"):
        choose_exemplar(CASES, dataset)


def test_slices_that_were_resampled(dataset: PreprocessedDataset) -> None:
    change_properties(dataset, "p0_t1", bbox_used_for_cropping=[[0, 9], [0, 20], [0, 18]],
                      shape_after_cropping_and_before_resampling=(9, 20, 18))  # fmt: skip
    said = refusal([ExemplarSpec("p0_t1", 4)], dataset)
    assert "has 7 slices where the raw image has 9" in said and "-c 2d" in said


def test_properties_that_contradict_each_other(dataset: PreprocessedDataset) -> None:
    change_properties(dataset, "p0_t1", bbox_used_for_cropping=[[0, 9], [0, 20], [0, 18]])
    assert "contradict" in refusal([ExemplarSpec("p0_t1", 4)], dataset)


def test_image_and_label_of_different_shape(dataset: PreprocessedDataset) -> None:
    path = Path(dataset.folder, "p0_t1_seg.b2nd")
    path.unlink()
    Path(dataset.folder, "p0_t1.b2nd").unlink()
    properties = pickle.loads(Path(dataset.folder, "p0_t1.pkl").read_bytes())
    chunks = (1, 1, 10, 10)
    nnUNetDatasetBlosc2.save_case(scan(0), labels((7, 12, 12), range(7)), properties, str(Path(dataset.folder, "p0_t1")),
                                  chunks=chunks, blocks=chunks)  # fmt: skip
    assert "differ in shape" in refusal([ExemplarSpec("p0_t1", 4)], dataset)


def test_an_exemplar_cannot_be_changed(dataset: PreprocessedDataset) -> None:
    (exemplar,) = load_exemplars([ExemplarSpec("p0_t1", 4)], CASES, dataset)
    with pytest.raises(dataclasses.FrozenInstanceError):
        exemplar.slice = 5  # type: ignore[misc]
