"""What of a mask counts as annotated."""

import numpy as np
import pytest

from nnunetv2_cmems.data.annotation import LabelValues, complete_plane, read_annotation
from nnunetv2_cmems.errors import CMEMSError

VALUES = LabelValues.of({"labels": {"background": 0, "wall": 1, "cavity": 2, "ignore": 3}})
SHAPE = (8, 20, 24)


def empty() -> np.ndarray:
    return np.full(SHAPE, 3, dtype=np.uint8)


def test_values_of_dataset_json() -> None:
    assert VALUES.names == {0: "background", 1: "wall", 2: "cavity"}
    assert VALUES.ignore == VALUES.not_annotated == 3
    regions = LabelValues.of({"labels": {"background": 0, "heart": [1, 2], "cavity": [2]}})
    assert set(regions.names) == {0, 1, 2} and regions.ignore is None and regions.not_annotated == 3


def test_a_mask_without_gaps_is_a_volume() -> None:
    mask = np.zeros(SHAPE, dtype=np.uint8)
    mask[3, 5:9, 5:9] = 1
    found = read_annotation(mask, VALUES, "m")
    assert found.planes is None and found.classes == {1}


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_one_painted_plane_along_any_axis(axis: int) -> None:
    mask = empty()
    plane = np.moveaxis(mask, axis, 0)
    plane[4] = 0
    plane[4, 3:6, 2:5] = 1
    assert read_annotation(mask, VALUES, "m").planes == ((axis, 4),)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_organs_alone_painted_into_the_empty_template(axis: int) -> None:
    mask = empty()
    plane = np.moveaxis(mask, axis, 0)
    plane[4, 3:6, 2:7] = 1
    plane[4, 4, 3:5] = 2
    found = read_annotation(mask, VALUES, "m")
    assert found.planes == ((axis, 4),) and found.classes == {1, 2}
    completed = complete_plane(plane[4], 3)
    assert set(np.unique(completed)) == {0, 1, 2} and (completed > 0).sum() == 15
    assert (plane[4] == 3).any(), "the input is left alone"


def test_a_plane_with_explicit_background_keeps_its_gaps() -> None:
    labels = np.array([[0, 1], [3, 3]])
    assert complete_plane(labels, 3) is labels


def test_what_a_rubber_has_left_is_no_scribble() -> None:
    """Programs erase with 0; whoever paints into the template and erases here and there means all else to be background."""
    mask = empty()
    mask[4, 3:9, 2:12] = 1
    mask[4, 3, 2:8] = 0
    assert read_annotation(mask, VALUES, "m").partial == ()
    completed = complete_plane(mask[4], 3)
    assert not (completed == 3).any() and (completed == 1).sum() == 54
    mask[4, 15] = 0
    assert read_annotation(mask, VALUES, "m").partial == ((0, 4),), "half as much background as organs is painted on purpose"
    assert complete_plane(mask[4], 3) is not None and (complete_plane(mask[4], 3) == mask[4]).all()


def test_planes_along_different_axes() -> None:
    mask = empty()
    mask[2], mask[:, 7] = 0, 0
    mask[2, 3:5, 3:5], mask[1:4, 7, 10:12] = 1, 2
    assert read_annotation(mask, VALUES, "m").planes == ((0, 2), (1, 7))


def test_planes_without_an_organ_are_left_out() -> None:
    mask = empty()
    mask[2], mask[5] = 0, 0
    mask[5, 3:5, 3:5] = 1
    assert read_annotation(mask, VALUES, "m").planes == ((0, 5),)


def test_a_volume_with_gaps_stays_a_volume() -> None:
    mask = np.zeros(SHAPE, dtype=np.uint8)
    mask[:, 5:9, 5:9] = 1
    mask[:, :3, :3] = 3
    assert read_annotation(mask, VALUES, "m").planes is None


def test_a_two_dimensional_image() -> None:
    mask = np.zeros((1, 20, 24), dtype=np.uint8)
    mask[0, 3:6, 3:6] = 1
    assert read_annotation(mask, VALUES, "m").planes is None
    mask[mask == 0] = 3
    assert read_annotation(mask, VALUES, "m").planes == ((0, 0),)
    mask[0, :, :12] = 0
    mask[0, 3:6, 3:6] = 1
    assert read_annotation(mask, VALUES, "m").planes == ((0, 0),), "wholly annotated columns are no planes"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: m, "wholly 'not annotated'"),
        (lambda m: np.zeros_like(m), "shows no organ"),
        (lambda m: np.where(np.arange(8)[:, None, None] == 1, 0, m), "shows no organ"),
        (lambda m: np.where(np.arange(8)[:, None, None] == 1, 9, m), r"value 9, which dataset\.json does not name"),
    ],
)
def test_bad_masks(change, sentence: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(CMEMSError, match=sentence) as error:
        read_annotation(change(empty()), VALUES, "labelsTr/a.nii.gz")
    assert "labelsTr/a.nii.gz" in str(error.value)


def test_a_template_value_that_dataset_json_does_not_name() -> None:
    values = LabelValues.of({"labels": {"background": 0, "wall": 1, "cavity": 2}})
    mask = empty()
    mask[2, 3:5, 3:5] = 1
    for kind in (np.uint8, np.float32):  # as nnU-Net's readers deliver them
        with pytest.raises(CMEMSError, match='add "ignore": 3 to the labels'):
            read_annotation(mask.astype(kind), values, "m")
