"""Whatever a NIfTI file's header says: the scan is read exactly as nnU-Net reads it, or one sentence says why not."""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from few_labels import LABELLED, UNLABELLED, edit, few, mask_path, paint, refusal, scan_path
from fuzzing import Outcomes, check_sentence, examples
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient

from nnunetv2_cmems.commands.suggest import write_template
from nnunetv2_cmems.data.planning import Scan, _look, _LookJob, examine
from nnunetv2_cmems.data.raw import RawCase, RawDataset, open_raw, quiet_itk
from nnunetv2_cmems.data.suggestion import ScanSummary, _read_geometry, _summarise, display_plane, summarise_dataset, viewer_place
from nnunetv2_cmems.errors import CMEMSError

READERS = [SimpleITKIO, SimpleITKIO, SimpleITKIO, NibabelIO, SimpleITKIOWithReorient, NibabelIOWithReorient]

FLOATS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1.5, 1e-30, 1e30, 3e38, math.nan, math.inf, -math.inf]), st.floats(-3, 3, width=32)
)
SIZES = st.one_of(st.sampled_from([0, 1, 2, 3, 4, 5, 7, -1, 32767, -32768]), st.integers(30, 45))
CODES = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304, 99, -1]
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "sizeof_hdr": st.sampled_from([348, 540, 0, -1]),
    "dim": SIZES,
    "pixdim": FLOATS,
    "datatype": st.sampled_from(CODES),
    "bitpix": st.sampled_from([0, 1, 8, 16, 32, 64, -1]),
    "vox_offset": st.sampled_from([0.0, 348.0, 352.0, 353.5, 400.0, -16.0, 1e9, 1e30, math.nan, math.inf]),
    "scl_slope": FLOATS,
    "scl_inter": FLOATS,
    "qform_code": st.sampled_from([0, 1, 2, 4, -1, 32767]),
    "sform_code": st.sampled_from([0, 1, 2, 4, -1, 32767]),
    "quatern_b": FLOATS,
    "quatern_c": FLOATS,
    "qoffset_x": FLOATS,
    "srow_x": FLOATS,
    "srow_y": FLOATS,
    "srow_z": FLOATS,
    "xyzt_units": st.integers(0, 255),
    "intent_code": st.sampled_from([0, 1002, 1005, 1007, 2003, -1]),
    "magic": st.sampled_from([b"n+1", b"ni1", b"n+2", b"", b"xxxx"]),
    "slice_duration": FLOATS,
    "cal_max": FLOATS,
}
"""Fields of the header and what they may become; of a field that is a list, one entry."""


@st.composite
def spoilt(draw: st.DrawFn, whole: bytes) -> bytes:
    """A NIfTI file (not compressed) with up to three changes in its header, and now and then of another size."""
    header, rest = nibabel.Nifti1Header(whole[:348], check=False), whole[348:]
    fields = header.structarr
    for name in draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=3)):
        value = draw(FIELDS[name])
        with np.errstate(all="ignore"):
            if fields[name].ndim:
                fields[name][draw(st.integers(0, len(fields[name]) - 1))] = value
            else:
                fields[name] = value
    if draw(st.integers(0, 24)) == 0:  # colours, in a volume of one slice
        fields["datatype"], fields["bitpix"], fields["dim"][:4] = 128, 24, (3, 40, 12, 1)
    data = bytearray(header.binaryblock + rest)
    how = draw(st.sampled_from([*["whole"] * 12, "cut", "longer", "byte", "swapped", "analyze"]))
    if how == "cut":
        return bytes(data[: draw(st.one_of(st.integers(0, 400), st.integers(0, len(data))))])
    if how == "longer":
        return bytes(data) + bytes(draw(st.integers(1, 5000)))
    if how == "byte":
        data[draw(st.integers(0, 351))] = draw(st.integers(0, 255))
    if how == "swapped":
        return header.as_byteswapped().binaryblock + rest
    if how == "analyze":
        data[344:348] = bytes(4)
    return bytes(data)


def save(path: Path, data: bytes, how: str) -> None:
    """Write a file under a name that says that it is compressed, most often truly so."""
    packed = gzip.compress(data, 1)
    path.write_bytes(
        {
            "plain": data,
            "cut": packed[: len(packed) // 2],
            "tail": packed[:-4] + struct.pack("<I", 12345),
            "parts": gzip.compress(data[:1000], 1) + gzip.compress(data[1000:], 1),
            "twice": gzip.compress(packed),
        }.get(how, packed)
    )


WAYS = st.sampled_from([*["packed"] * 20, "plain", "cut", "tail", "parts", "twice"])


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = few(tmp_path, monkeypatch)
    paint(folder, LABELLED, (0, 2))
    with quiet_itk():
        yield folder


def opened(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes())


def looked(raw_case: RawCase, dataset: RawDataset, reader: Any) -> Scan:
    """What plan_and_preprocess learns of a case."""
    look = _look(_LookJob(raw_case, reader, dataset.num_channels, dataset.values, 1000, None))
    if look.scan is None:
        raise CMEMSError(look.problem)
    return look.scan


def summarised(raw_case: RawCase, dataset: RawDataset, reader: Any, axis: int = 0) -> ScanSummary:
    """What suggest learns of a case."""
    job = (raw_case, reader, dataset.num_channels)
    problems = [_read_geometry(job)[2]]
    _, summary, problem = _summarise((*job, axis, (54.0, 60.0)))
    for said in filter(None, [*problems, problem]):
        raise CMEMSError(said)
    assert summary is not None
    return summary


def change_header(path: Path, **changes: Any) -> None:
    """Change fields of a header, or single entries (place, value) of them."""
    whole = opened(path)
    header = nibabel.Nifti1Header(whole[:348], check=False)
    for name, value in changes.items():
        if isinstance(value, tuple):
            header.structarr[name][value[0]] = value[1]
        else:
            header.structarr[name] = value
    save(path, header.binaryblock + whole[348:], "packed")


def check_as_nnunet(scan: Scan, raw_case: RawCase, reader: Any) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()):
        image, properties = reader().read_images(raw_case.images)
    assert scan.shape == image.shape[1:] and np.isfinite(image).all()
    assert list(scan.spacing) == [float(s) for s in properties["spacing"]] and len(scan.spacing) == len(scan.shape) == 3
    assert all(0 < s < math.inf for s in scan.spacing)
    return {"image": image, "properties": properties}


def test_any_scan(raw: Path, tmp_path: Path) -> None:
    dataset = open_raw(27)
    path = scan_path(raw, UNLABELLED[0])
    raw_case, whole = dataset.cases[UNLABELLED[0]], opened(path)
    template = tmp_path / "template.nii.gz"
    outcomes = Outcomes()

    @examples(90)
    @given(spoilt(whole), WAYS, st.sampled_from(READERS), st.integers(0, 2))
    def check(data: bytes, how: str, reader: Any, axis: int) -> None:
        save(path, data, how)
        scan = outcomes.of(lambda: looked(raw_case, dataset, reader), str(path))
        _, geometry, problem = _read_geometry((raw_case, reader, 1))
        if problem:
            check_sentence(problem, str(path))
        _, summary, why = _summarise((raw_case, reader, 1, axis, (54.0, 60.0)))
        assert (summary is None) == (scan is None), "both commands take the same scans"
        if scan is None:
            check_sentence(why, str(path))
            return
        assert summary is not None and np.isfinite(summary.looks).all() and np.isfinite(summary.structure).all()
        assert geometry is not None and tuple(geometry[0]) == scan.shape and np.allclose(geometry[1], scan.spacing)
        read = check_as_nnunet(scan, raw_case, reader)
        index = scan.shape[axis] // 2
        place = viewer_place(raw_case, reader(), read["properties"], axis, index, scan.shape[axis])
        assert 0 <= place.index < place.total
        assert display_plane(read["image"][0], axis, index, read["properties"])[0].ndim == 2
        template.unlink(missing_ok=True)
        try:
            assert write_template(str(template), 4, scan.shape, read["properties"], reader())
        except CMEMSError as error:
            check_sentence(str(error), str(template))
            return
        assert reader().read_seg(str(template))[0].shape[1:] == scan.shape

    check()
    outcomes.check()


def test_any_mask(raw: Path) -> None:
    dataset = open_raw(27)
    path = mask_path(raw)
    raw_case, whole = dataset.cases[LABELLED], opened(path)
    outcomes = Outcomes()

    @examples(60)
    @given(spoilt(whole), WAYS, st.sampled_from(READERS))
    def check(data: bytes, how: str, reader: Any) -> None:
        save(path, data, how)
        scan = outcomes.of(lambda: looked(raw_case, dataset, reader), str(path))
        if scan is not None:
            check_as_nnunet(scan, raw_case, reader)
            with contextlib.redirect_stdout(io.StringIO()):
                mask = reader().read_seg(str(path))[0]
            assert scan.annotation is not None and mask.shape[1:] == scan.shape
            assert scan.annotation.classes == set(np.unique(mask).astype(int).tolist()) - {0, 4}

    check()
    outcomes.check()


@pytest.mark.parametrize(
    ("reader", "changes", "said"),
    [
        (NibabelIO, {"pixdim": (3, math.nan)}, "gives a spacing of nan x 1.5 x 1.5 mm"),
        (NibabelIO, {"pixdim": (1, math.inf)}, "gives a spacing of 8 x 1.5 x inf mm"),
        (SimpleITKIO, {"pixdim": (2, 1e30)}, "gives a spacing of 8 x 1e+30 x 1.5 mm"),
        (SimpleITKIO, {"pixdim": (2, 1e-30)}, "gives a spacing of 8 x 1e-30 x 1.5 mm"),
        (SimpleITKIO, {"dim": (3, -5)}, "gives a size of 40 x 36 x -5 voxels"),
        (SimpleITKIO, {"dim": (slice(8), [7] + [32767] * 7)}, "cut off"),
        (SimpleITKIO, {"datatype": 128, "bitpix": 24, "dim": (slice(4), [3, 40, 12, 1])}, "each voxel has several values"),
        (SimpleITKIO, {"datatype": 32, "bitpix": 64, "dim": (slice(4), [3, 40, 12, 1]), "intent_code": 1007}, "several values"),
        (SimpleITKIO, {"srow_x": (3, math.nan), "qform_code": 0}, "NaN or infinite numbers in the sform"),
        (SimpleITKIO, {"srow_z": (1, math.inf)}, "NaN or infinite numbers in the sform"),  # ITK would never come back
        (NibabelIO, {"qoffset_x": math.nan, "sform_code": 0}, "NaN or infinite numbers in the qform"),
        (SimpleITKIO, {"srow_x": (0, 0.0), "qform_code": 0}, "ITK only supports orthonormal direction cosines"),
    ],
)
def test_header_that_was_found_by_fuzzing(raw: Path, reader: Any, changes: dict[str, Any], said: str) -> None:
    dataset, path = open_raw(27), scan_path(raw, UNLABELLED[0])
    change_header(path, **changes)
    for read in (looked, summarised):
        with pytest.raises(CMEMSError) as caught:
            read(dataset.cases[UNLABELLED[0]], dataset, reader)
        check_sentence(str(caught.value), str(path), said)


def test_first_scan_has_a_header_that_stops_itk(raw: Path) -> None:
    """nnU-Net finds out by a scan which of its readers to take."""
    path = scan_path(raw, LABELLED)
    change_header(path, srow_z=(1, math.inf))
    assert open_raw(27).reader_class is SimpleITKIO
    check_sentence(refusal(lambda: examine(open_raw(27))), str(path), "NaN or infinite numbers in the sform")


def test_mask_whose_place_is_no_number(raw: Path) -> None:
    dataset = open_raw(27)
    change_header(mask_path(raw), srow_x=(3, math.nan))
    assert "NaN or infinite numbers in the sform" in refusal(lambda: looked(dataset.cases[LABELLED], dataset, NibabelIO))


def test_scan_in_another_unit(raw: Path) -> None:
    """Resampled to the others' spacing it would have millions of voxels along each side."""
    path = scan_path(raw, UNLABELLED[0])
    edit(path, spacing=(1.5e6, 1.5, 8.0))
    said = refusal(lambda: examine(open_raw(27)))
    check_sentence(said, str(path), "a spacing of 8 x 1.5 x 1.5e+06 mm", "--skip_unreadable")
    found = examine(open_raw(27), skip_unreadable=True)
    assert set(found.skipped) == {UNLABELLED[0]} and set(found.scans) == {LABELLED, *UNLABELLED[1:]}
    edit(scan_path(raw, UNLABELLED[0]), spacing=(1.5e-6, 1.5e-6, 8.0))
    axis, scans = summarise_dataset(open_raw(27))
    assert axis == 0 and len(scans) == 4, "such a scan is not padded to the others' size"
