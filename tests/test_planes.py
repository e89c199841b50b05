"""Annotated slices of volumes: neither lost nor thickened by resampling, however the crop is turned."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from batchgenerators.utilities.file_and_folder_operations import write_pickle
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from nnunetv2_cmems.config import ExemplarSpec, SpatialConfig
from nnunetv2_cmems.data.annotation import LabelValues
from nnunetv2_cmems.data.exemplar import Exemplar, PreprocessedDataset, list_annotated, load_exemplars
from nnunetv2_cmems.errors import CMEMSError
from nnunetv2_cmems.method.exemplars import UNDEFORMED, ExemplarBank
from nnunetv2_cmems.method.perturbations import draw_deformation, read_from
from nnunetv2_cmems.method.planes import AnnotatedPlane, look_up

CPU = torch.device("cpu")
LABELS = LabelValues({0: "background", 1: "wall", 2: "cavity"}, 3)
RESAMPLING = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)


def plane_at(position: float, axis: int = 0, size: tuple[int, int] = (16, 16), scale: tuple[float, float] = (1.0, 1.0)) -> AnnotatedPlane:
    return AnnotatedPlane(axis, position, torch.ones(size, dtype=torch.int16), scale)


def grid(patch: tuple[int, ...], config: SpatialConfig = UNDEFORMED, centre: float = 7.5, batch: int = 1) -> Tensor:
    return read_from(draw_deformation(batch, patch, config, CPU), torch.full((batch, 3), centre))


# ------------------------------------------------------------------ looking a plane up in a crop


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("position", [3.0, 7.3, 7.5, 7.7, 12.49])
def test_a_plane_is_one_voxel_thick_wherever_it_lies(axis: int, position: float) -> None:
    found = look_up([plane_at(position, axis)], grid((16, 16, 16)))[0]
    others = tuple(a for a in range(3) if a != axis)
    layers = (found >= 0).numpy().any(axis=others)
    assert layers.sum() == 1 and abs(int(layers.argmax()) - position) <= 0.5
    assert ((found >= 0).sum(axis) == 1).all(), "no hole"


@pytest.mark.parametrize("zoom", [0.5, 1.0, 2.0])
def test_turned_and_zoomed_planes_stay_thin_and_closed(zoom: float) -> None:
    config = SpatialConfig(rotation=40.0, scale=(zoom, zoom), shift=0.0, elastic=0.0)
    plane = plane_at(19.7, 0, (400, 400))
    for _ in range(10):
        voxels = grid((12, 12, 12), config, centre=20.0)
        found = look_up([plane], voxels)[0] >= 0
        steepest = int(np.argmax([voxels[0, ..., 0].diff(dim=a).abs().mean() for a in range(3)]))
        assert (found.sum(steepest) <= 1).all(), "a column crosses the plane once"
        centre = found.sum(steepest)[3:9, 3:9]
        assert (centre == 1).all(), "no hole where the plane crosses the crop"


def test_labels_are_those_of_the_nearest_pixel() -> None:
    """The volume has twice the plane's resolution along y and a third of it along x."""
    labels = torch.arange(8 * 24).reshape(8, 24)
    plane = AnnotatedPlane(0, 5.0, labels, (2.0, 1 / 3))
    found = look_up([plane], grid((3, 16, 8), centre=0.0) + torch.tensor([5.0, 7.5, 3.5]))[0, 1]
    rows = np.arange(16) // 2
    columns = 3 * np.arange(8) + 1
    assert np.array_equal(found.numpy(), labels.numpy()[np.ix_(rows, columns)])


def test_beyond_the_plane_nothing_is_known() -> None:
    found = look_up([plane_at(8.0, 0, (4, 4))], grid((16, 16, 16)))
    assert (found >= 0).sum() == 16


def test_planes_along_different_axes() -> None:
    planes = [plane_at(4.0, 0), plane_at(9.0, 2)._replace(labels=torch.full((16, 16), 2))]
    found = look_up(planes, grid((16, 16, 16)))[0]
    assert (found[4] == 1).all() and (found[:4, :, 9] == 2).all() and (found >= 0).sum() == 2 * 256 - 16


def test_places_and_look_up_agree() -> None:
    labels = torch.zeros(8, 24, dtype=torch.int16)
    labels[5, 20] = 2
    plane = AnnotatedPlane(1, 3.2, labels, (2.0, 0.5))
    (place,) = plane.places(2).tolist()
    assert place == pytest.approx([10.5, 3.2, 9.75])


# ------------------------------------------------------------------ the bank


def sliced_bank(patch: tuple[int, int, int] = (6, 8, 8)) -> ExemplarBank:
    labels = torch.zeros(20, 20, dtype=torch.int16)
    labels[12:16, 3:7], labels[13:15, 4:6] = 1, 2
    labels[:, 19] = -1
    image = torch.arange(12 * 20 * 20, dtype=torch.float32).reshape(1, 12, 20, 20)
    return ExemplarBank([image], [[AnnotatedPlane(0, 5.3, labels, (1.0, 1.0))]], patch, CPU)


@pytest.mark.parametrize("foreground", [0.0, 1.0])
def test_every_crop_holds_a_piece_of_the_annotated_slice(foreground: float) -> None:
    bank = sliced_bank()
    crops = bank.draw(20, UNDEFORMED, foreground)
    assert crops.images.shape == (20, 1, 6, 8, 8) and crops.known is not None
    assert (crops.known.flatten(1).sum(1) >= 8 * 7).all()
    assert (crops.known.any(-1).any(-1).sum(1) == 1).all(), "in one layer"
    first = crops.images[:, 0, 0, 0, 0].round().long()
    for crop, known, z in zip(crops.labels, crops.known, first // 400, strict=True):
        layer = int(known.any(-1).any(-1).long().argmax())
        assert int(z) + layer == 5, "the voxel layer nearest to 5.3"
        assert (crop[~known] == 0).all()
    if foreground:
        assert ((crops.labels > 0) & crops.known).flatten(1).any(1).all()


def test_deformed_crops_show_the_right_label_at_the_right_place() -> None:
    """An image that says what its label is: equal to 1000 in every voxel whose nearest plane pixel is foreground."""
    labels = torch.zeros(40, 40, dtype=torch.int16)
    labels[15:25, 10:30] = 1
    image = (labels > 0).float().expand(40, 40, 40)[None] * 1000
    bank = ExemplarBank([image], [[AnnotatedPlane(0, 19.0, labels, (1.0, 1.0))]], (24, 24, 24), CPU)
    crops = bank.draw(8, SpatialConfig(rotation=30.0, elastic=0.05), 1.0)
    assert crops.known is not None
    clear = crops.known & ((crops.images[:, 0] < 1) | (crops.images[:, 0] > 999))
    assert clear.sum() > 1000
    assert torch.equal(crops.labels[clear] > 0, crops.images[:, 0][clear] > 500)


def test_slices_and_whole_volumes_in_one_bank() -> None:
    label = torch.zeros(12, 20, 20, dtype=torch.int16)
    label[4:8, 5:9, 5:9] = 1
    plane = AnnotatedPlane(0, 5.0, label[5], (1.0, 1.0))
    bank = ExemplarBank([torch.zeros(1, 12, 20, 20), torch.ones(1, 12, 20, 20)], [label, [plane]], (6, 8, 8), CPU)
    crops = bank.draw(40, UNDEFORMED, 0.5)
    assert crops.known is not None
    whole = crops.images.flatten(1).amax(1) == 0
    assert 5 < whole.sum() < 35
    assert crops.known[whole].all() and not crops.known[~whole].all()
    organs = bank.draw(20, UNDEFORMED, 1.0, whole=True)
    assert (organs.images == 0).all()


def test_what_is_not_annotated_of_a_whole_exemplar_is_unknown() -> None:
    label = torch.zeros(20, 20, dtype=torch.int16)
    label[5:9, 5:9], label[:, 15:] = 1, -1
    bank = ExemplarBank([torch.zeros(1, 20, 20)], [label], (20, 20), CPU)
    crops = bank.draw(3, UNDEFORMED, 1.0)
    assert crops.known is not None
    for known, found in zip(crops.known, crops.labels, strict=True):
        assert torch.equal(known, label >= 0) and torch.equal(found, label.clamp_min(0).long())


# ------------------------------------------------------------------ from the native mask, through nnU-Net's own preprocessing


def preprocess(folder: Path, mask: np.ndarray, raw_spacing: tuple[float, ...], spacing: list[float], transpose: list[int]) -> Any:
    """Image (its value is the mask's), preprocessed by nnU-Net; the native mask in ``gt_segmentations``."""
    images = folder / "plans_3d_fullres"
    images.mkdir()
    (folder / "gt_segmentations").mkdir()
    configuration = {
        "data_identifier": "plans_3d_fullres", "preprocessor_name": "DefaultPreprocessor", "patch_size": [8, 8, 8], "spacing": spacing,
        "normalization_schemes": ["NoNormalization"], "use_mask_for_norm": [False], "architecture": {},
        "resampling_fn_data": "resample_data_or_seg_to_shape", "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": RESAMPLING, "resampling_fn_seg_kwargs": {**RESAMPLING, "is_seg": True, "order": 1},
    }  # fmt: skip
    dataset_json = {"labels": {"background": 0, "wall": 1, "cavity": 2, "ignore": 3}, "file_ending": ".nii.gz"}
    plans = {
        "dataset_name": "x", "plans_name": "plans", "transpose_forward": transpose,
        "transpose_backward": np.argsort(transpose).tolist(), "image_reader_writer": "SimpleITKIO", "label_manager": "LabelManager",
        "configurations": {"3d_fullres": configuration}, "foreground_intensity_properties_per_channel": {"0": {}},
    }  # fmt: skip
    manager = PlansManager(plans)
    image = np.where(mask == 3, 0, mask).astype(np.float32)[None] + 10
    data, seg, properties = DefaultPreprocessor(verbose=False).run_case_npy(
        image, mask[None].astype(np.int16), {"spacing": list(raw_spacing)}, manager, manager.get_configuration("3d_fullres"), dataset_json
    )
    nnUNetDatasetBlosc2.save_case(data, seg, properties, str(images / "a"))
    write_pickle(properties, str(images / "a.pkl"))
    picture = sitk.GetImageFromArray(mask.astype(np.uint8))
    picture.SetSpacing(raw_spacing[::-1])
    sitk.WriteImage(picture, str(folder / "gt_segmentations" / "a.nii.gz"))
    return PreprocessedDataset.from_plans(str(images), nnUNetDatasetBlosc2, manager, dataset_json, 3), data


def painted(axis: int, index: int, shape: tuple[int, int, int], template: bool = False) -> np.ndarray:
    mask = np.full(shape, 3, dtype=np.uint8)
    plane = np.moveaxis(mask, axis, 0)[index]
    if not template:
        plane[:] = 0
    rows, columns = plane.shape
    plane[rows // 4 : rows // 2, columns // 4 : columns // 2] = 1
    plane[rows // 3 : rows // 2, columns // 3 : columns // 2] = 2
    return mask


GEOMETRIES = [
    pytest.param((24, 40, 36), (1.0, 1.0, 1.0), [1.0, 1.0, 1.0], [0, 1, 2], id="isotropic"),
    pytest.param((48, 40, 36), (1.0, 1.0, 1.0), [3.0, 3.0, 3.0], [0, 1, 2], id="isotropic, a third of the resolution"),
    pytest.param((10, 40, 36), (8.0, 1.5, 1.5), [8.0, 2.5, 2.5], [0, 1, 2], id="anisotropic"),
    pytest.param((10, 40, 36), (5.0, 1.0, 1.0), [1.0, 1.0, 1.0], [0, 1, 2], id="thick slices, made thin"),
    pytest.param((40, 36, 10), (1.0, 1.0, 6.0), [6.0, 1.7, 1.7], [2, 0, 1], id="transposed"),
]


@pytest.mark.parametrize(("shape", "raw_spacing", "spacing", "transpose"), GEOMETRIES)
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("template", [False, True])
def test_a_painted_slice_survives_preprocessing(
    tmp_path: Path, shape: tuple[int, int, int], raw_spacing: tuple[float, ...], spacing: list[float], transpose: list[int], axis: int,
    template: bool,
) -> None:  # fmt: skip
    """Every painted pixel that a voxel lies next to is looked up, in one layer, at its own place; nothing else is."""
    index = shape[axis] // 2 + 1
    mask = painted(axis, index, shape, template)
    dataset, data = preprocess(tmp_path, mask, raw_spacing, spacing, transpose)
    assert list_annotated(["a"], dataset) == [ExemplarSpec("a", index, "zyx"[axis])]  # type: ignore[arg-type]
    (exemplar,) = load_exemplars([ExemplarSpec("a")], ["a"], dataset)
    assert (exemplar.case, exemplar.axis, exemplar.slice) == ("a", "zyx"[axis], index)
    plane = exemplar.plane
    assert plane is not None and plane.axis == transpose.index(axis)
    size = data.shape[1:]
    voxels = read_from(draw_deformation(1, size, UNDEFORMED, CPU), (torch.tensor([size]) - 1) / 2)
    found = look_up([plane], voxels)[0].numpy()
    others = tuple(a for a in range(3) if a != plane.axis)
    layers = (found >= 0).any(axis=others)
    assert layers.sum() == 1
    native = np.moveaxis(mask, axis, 0)[index]
    expected = np.where(native == 3, 0, native)
    layer = found.take(int(layers.argmax()), plane.axis)
    if others != tuple(transpose.index(a) for a in range(3) if a != axis):
        expected = expected.T
    rows, columns = (
        ((np.arange(n) + 0.5) * m / n - 0.5).round().astype(int).clip(0, m - 1) for n, m in zip(layer.shape, expected.shape, strict=True)
    )
    assert np.array_equal(layer, expected[np.ix_(rows, columns)])
    image, label = exemplar.picture
    assert image.shape == label.shape and {1, 2} <= set(np.unique(label))


def exemplars_of(tmp_path: Path, mask: np.ndarray, *specs: ExemplarSpec) -> list[Exemplar]:
    dataset, _ = preprocess(tmp_path, mask, (1.0, 1.0, 1.0), [1.0, 1.0, 1.0], [0, 1, 2])
    return load_exemplars(specs or [ExemplarSpec("a")], ["a"], dataset)


def test_a_wholly_annotated_volume(tmp_path: Path) -> None:
    mask = np.zeros((12, 20, 20), dtype=np.uint8)
    mask[3:8, 5:9, 5:9], mask[4:6, 6:8, 6:8] = 1, 2
    (exemplar,) = exemplars_of(tmp_path, mask)
    assert exemplar.spec == ExemplarSpec("a") and exemplar.plane is None
    assert np.array_equal(exemplar.label, mask) and exemplar.image.shape == (1, 12, 20, 20)
    assert np.array_equal(exemplar.picture[1], mask[3])


def test_one_slice_of_a_wholly_annotated_volume(tmp_path: Path) -> None:
    mask = np.zeros((12, 20, 20), dtype=np.uint8)
    mask[3:8, 5:9, 5:9], mask[4:6, 6:8, 6:8] = 1, 2
    one, other = exemplars_of(tmp_path, mask, ExemplarSpec("a", 4), ExemplarSpec("a", 7, "y"))
    assert np.array_equal(one.label, mask[4]) and np.array_equal(other.label, mask[:, 7])
    assert one.axis == "z" and other.axis == "y"
    assert one.image is other.image, "the volume is read and held once"


def test_a_slice_painted_into_a_mask_of_zeros_is_not_taken_for_a_volume(tmp_path: Path) -> None:
    """It would teach that the organs end above and below it."""
    mask = np.zeros((12, 20, 20), dtype=np.uint8)
    mask[4, 5:9, 5:9], mask[4, 6:8, 6:8] = 1, 2
    with pytest.raises(CMEMSError, match=r"organs on one slice only \(4 along z\).*fill them with 3") as error:
        exemplars_of(tmp_path, mask)
    assert "gt_segmentations" in str(error.value)


def test_nor_are_several_slices_of_which_none_lies_beside_another(tmp_path: Path) -> None:
    mask = np.zeros((12, 20, 20), dtype=np.uint8)
    mask[[2, 5, 8], 5:9, 5:9], mask[[2, 5, 8], 6:8, 6:8] = 1, 2
    with pytest.raises(CMEMSError, match=r"organs on single slices only \(2, 5, 8 along z\).*fill them with 3"):
        exemplars_of(tmp_path, mask)


def test_that_slice_can_be_named(tmp_path: Path) -> None:
    mask = np.zeros((12, 20, 20), dtype=np.uint8)
    mask[4, 5:9, 5:9], mask[4, 6:8, 6:8] = 1, 2
    (exemplar,) = exemplars_of(tmp_path, mask, ExemplarSpec("a", 4, "z"))
    assert exemplar.plane is not None and exemplar.slice == 4


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (ExemplarSpec("a", 12), "no slice 12 along z: the image has 12"),
        (ExemplarSpec("a", 0), "Slice 0 of case 'a' has no foreground"),
    ],
)
def test_slices_that_cannot_be_used(tmp_path: Path, spec: ExemplarSpec, sentence: str) -> None:
    mask = np.zeros((12, 20, 20), dtype=np.uint8)
    mask[3:8, 5:9, 5:9], mask[4:6, 6:8, 6:8] = 1, 2
    with pytest.raises(CMEMSError, match=sentence):
        exemplars_of(tmp_path, mask, spec)


def test_a_missing_native_mask_is_named(tmp_path: Path) -> None:
    dataset, _ = preprocess(tmp_path, painted(0, 5, (12, 20, 20)), (1.0, 1.0, 1.0), [1.0, 1.0, 1.0], [0, 1, 2])
    (tmp_path / "gt_segmentations" / "a.nii.gz").unlink()
    with pytest.raises(CMEMSError, match=r"gt_segmentations.a\.nii\.gz does not exist"):
        load_exemplars([ExemplarSpec("a")], ["a"], dataset)


def test_a_slice_painted_across_a_2d_configurations_slices(tmp_path: Path) -> None:
    dataset, _ = preprocess(tmp_path, painted(2, 5, (12, 20, 20)), (1.0, 1.0, 1.0), [1.0, 1.0, 1.0], [0, 1, 2])
    with pytest.raises(CMEMSError, match="annotated along x, but .* along z; run nnUNetv2_cmems plan_and_preprocess"):
        list_annotated(["a"], flat(dataset))


def flat(dataset: PreprocessedDataset) -> PreprocessedDataset:
    """The same files as a 2D configuration sees them."""
    return PreprocessedDataset(
        dataset.folder, dataset.dataset_class, dataset.transpose_forward, dataset.class_names, LABELS, ".nii.gz", SimpleITKIO
    )


@pytest.mark.parametrize(
    ("organs", "expected"),
    [
        (range(4, 9), [0, 2, 4, 5, 6, 7, 8, 10, 13, 15]),  # an unbroken row: a volume; as many slices without organs, evenly spread
        (range(2, 14), list(range(16))),  # all that there are
        (range(4, 8), [4, 5, 6, 7]),  # too few: perhaps painted one by one
        ((2, 4, 6, 8, 10), [2, 4, 6, 8, 10]),  # with gaps: painted one by one
    ],
)
def test_slices_without_organs_are_background_where_a_whole_volume_is_annotated(tmp_path: Path, organs: Any, expected: list[int]) -> None:
    mask = np.zeros((16, 20, 20), dtype=np.uint8)
    for z in organs:
        mask[z, 5:9, 5:9], mask[z, 6:8, 6:8] = 1, 2
    dataset, _ = preprocess(tmp_path, mask, (1.0, 1.0, 1.0), [1.0, 1.0, 1.0], [0, 1, 2])
    exemplars = load_exemplars([ExemplarSpec("a")], ["a"], flat(dataset))
    assert [exemplar.slice for exemplar in exemplars] == expected
    assert list_annotated(["a"], flat(dataset)) == [ExemplarSpec("a")]
    for exemplar in exemplars:
        assert np.array_equal(exemplar.label, mask[exemplar.slice])


def test_organ_that_preprocessing_has_lost_from_a_slice(tmp_path: Path) -> None:
    """It is a slice without organs then; whoever names that slice is told."""
    mask = np.zeros((12, 40, 40), dtype=np.uint8)
    mask[3:9, 10:20, 10:20], mask[3:8, 12:18, 12:18] = 1, 2
    mask[9, 11, 11] = 1
    dataset, _ = preprocess(tmp_path, mask, (1.0, 1.0, 1.0), [1.0, 3.0, 3.0], [0, 1, 2])
    exemplars = {exemplar.slice: exemplar for exemplar in load_exemplars([ExemplarSpec("a")], ["a"], flat(dataset))}
    assert not exemplars[9].label.any() and exemplars[8].label.any()
    with pytest.raises(CMEMSError, match="Slice 9 of case 'a' has no foreground"):
        load_exemplars([ExemplarSpec("a", 9)], ["a"], flat(dataset))
