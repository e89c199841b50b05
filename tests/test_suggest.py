"""The suggested slice is typical, shows organs, and is found without a label; nothing that was there is lost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from matplotlib.image import imread
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from skimage import io
from skimage.io import imsave

from nnunetv2_cmems.commands import suggest as command
from nnunetv2_cmems.commands.main import main
from nnunetv2_cmems.data.phantom import SPACING, make_scan, write_dataset
from nnunetv2_cmems.data.planning import examine
from nnunetv2_cmems.data.raw import RawCase, RawDataset, open_raw
from nnunetv2_cmems.data.suggestion import ScanSummary, display_plane, rank_slices, slice_axis, summarise_scan, viewer_place
from nnunetv2_cmems.errors import CMEMSError

ID, NAME = 903, "Dataset903_Suggest"
SHAPE = (8, 48, 48)
SCANS = 6


def summarise(case: str, volume: np.ndarray) -> ScanSummary:
    height, width = (n * 1.5 for n in SHAPE[1:])
    return summarise_scan(case, volume[None], 0, SPACING[1:], (height, width))


@pytest.fixture(scope="module")
def phantoms() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {f"case{i:02d}": make_scan((7, i), (8, 64, 64)) for i in range(16)}


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw folder with scans in ``imagesUn`` alone."""
    root = tmp_path_factory.mktemp("unlabelled")
    folder = write_dataset(root, ID, "Suggest", 1, 0, num_unlabelled=SCANS, shape=SHAPE)
    shutil.rmtree(folder / "imagesTr")
    shutil.rmtree(folder / "labelsTr")
    return root


@pytest.fixture
def folder(unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it that belongs to one test."""
    made = tmp_path / "raw" / NAME
    shutil.copytree(unlabelled / NAME, made)
    monkeypatch.setenv("nnUNet_raw", str(made.parent))
    yield made
    for path in [made, *made.rglob("*")]:  # so that pytest can clean up
        if not path.is_symlink():
            path.chmod(0o755)


def run(*arguments: str) -> int:
    return main(["suggest", "-d", str(ID), "-np", "1", *arguments])


def picks(folder: Path, number: int = SCANS) -> list[tuple[str, int]]:
    return [(s.case, s.slice) for s in command.suggest(open_raw(folder.name, require_labels=False), number)]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def geometry(path: Path) -> tuple[Any, ...]:
    image = sitk.ReadImage(str(path))
    return image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection()


# The ranking


def test_slices_show_the_organs_more_often_than_random_ones(phantoms: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    suggestions = rank_slices([summarise(case, image) for case, (image, _) in phantoms.items()], 0)

    def shows_all(label: np.ndarray) -> bool:
        return len(np.unique(label)) == 4

    of_all = np.mean([shows_all(plane) for _, label in phantoms.values() for plane in label])
    of_suggested = np.mean([shows_all(phantoms[s.case][1][s.slice]) for s in suggestions])
    assert len(suggestions) == len(phantoms)
    assert of_all < 0.75 and of_suggested > 0.95


def test_order_of_scans_does_not_matter(phantoms: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    summaries = [summarise(case, image) for case, (image, _) in phantoms.items()]
    expected = rank_slices(summaries, 0)
    shuffled = [summaries[i] for i in np.random.default_rng(0).permutation(len(summaries))]
    assert rank_slices(shuffled, 0) == expected
    assert rank_slices(iter(summaries[::-1]), 0) == expected


def outliers(image: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "noise": rng.uniform(0, image.max(), image.shape).astype(np.float32),
        "upside down": image[:, ::-1].copy(),
        "inverted": image.max() - image,
        "stripes": np.broadcast_to(np.arange(image.shape[2]) // 4 % 2 * image.max(), image.shape).astype(np.float32),
    }


@pytest.mark.parametrize("kind", ["noise", "upside down", "inverted", "stripes"])
def test_outliers_come_last(phantoms: dict[str, tuple[np.ndarray, np.ndarray]], kind: str) -> None:
    scans = {case: image for case, (image, _) in phantoms.items()}
    scans["case05"] = outliers(scans["case05"])[kind]
    order = [s.case for s in rank_slices([summarise(case, image) for case, image in scans.items()], 0)]
    assert order.index("case05") >= len(order) // 2


def test_empty_slices_and_ends_are_not_suggested(phantoms: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    scans = {case: np.concatenate([np.zeros((12, 64, 64), np.float32), image]) for case, (image, _) in phantoms.items()}
    suggestions = rank_slices([summarise(case, image) for case, image in scans.items()], 0)
    assert all(12 + 2 <= s.slice < 12 + 6 for s in suggestions), "the middle third of what shows something"


def test_a_typical_slice_beats_one_with_less_in_it() -> None:
    y, x = np.mgrid[:48, :48]
    disc = (np.hypot(y - 24, x - 24) < 12).astype(np.float32)
    faint = (np.hypot(y - 24, x - 24) < 4).astype(np.float32)
    elsewhere = (np.hypot(y - 8, x - 40) < 12).astype(np.float32)
    scan = np.stack([faint, faint, faint, disc, elsewhere, faint, faint, faint, faint])
    suggestions = rank_slices([summarise(f"case{i}", scan + 0.01 * i) for i in range(4)], 0)
    assert {s.slice for s in suggestions} == {3}


def test_one_patient_once_and_annotated_patients_last() -> None:
    cases = [f"patient{p:03d}_frame{f:02d}" for p in range(4) for f in (1, 12)]
    summaries = [summarise(case, make_scan((9, i), SHAPE)[0]) for i, case in enumerate(cases)]
    patients = [s.case[:10] for s in rank_slices(summaries, 0)]
    assert len(set(patients[:4])) == 4 and sorted(patients[:4]) == sorted(patients[4:])
    rest = rank_slices(summaries, 0, candidates=cases[1:], annotated=cases[:1])
    assert cases[0] not in [s.case for s in rest] and [s.case for s in rest].index(cases[1]) >= 3


def test_few_scans_and_few_slices() -> None:
    for slices in (1, 2, 3):
        alone = rank_slices([summarise("only", make_scan(3, (slices, 48, 48))[0])], 0)
        assert [s.case for s in alone] == ["only"] and 0 <= alone[0].slice < slices
    assert rank_slices([], 0) == []
    assert rank_slices([summarise("grey", np.full(SHAPE, 5.0, np.float32))], 0) == []


def test_brightness_and_resolution_do_not_matter(phantoms: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    scans = {case: image for case, (image, _) in list(phantoms.items())[:6]}
    expected = [(s.case, s.slice) for s in rank_slices([summarise(case, image) for case, image in scans.items()], 0)]
    changed = [summarise(case, 40 * image + 1000 * i) for i, (case, image) in enumerate(scans.items())]
    assert [(s.case, s.slice) for s in rank_slices(changed, 0)] == expected
    coarse = [summarise_scan(case, image[None], 0, (1.5, 1.5), (96.0, 96.0)) for case, image in scans.items()]
    fine = [summarise_scan(case, image.repeat(2, 1).repeat(2, 2)[None], 0, (0.75, 0.75), (96.0, 96.0)) for case, image in scans.items()]
    assert [(s.case, s.slice) for s in rank_slices(fine, 0)] == [(s.case, s.slice) for s in rank_slices(coarse, 0)]


@pytest.mark.parametrize(
    ("spacings", "axis"),
    [([(10, 1, 1), (8, 2, 2)], 0), ([(1, 1, 1)], 0), ([(1, 5, 5)], 1), ([(1, 1, 3), (1, 1, 3), (9, 1, 1)], 2), ([(999, 1, 1)], 0)],
)
def test_axis_is_the_one_that_nnunet_cuts_along(spacings: list[tuple[float, ...]], axis: int) -> None:
    assert slice_axis(spacings) == axis


# Where a viewer shows the slice


def test_viewers_count_in_the_order_of_the_file(tmp_path: Path) -> None:
    volume = np.zeros((5, 6, 7), np.float32)
    volume[1] = 1  # the second slice from the file's start
    image = sitk.GetImageFromArray(volume)
    image.SetDirection((1, 0, 0, 0, 1, 0, 0, 0, -1))  # from the head downwards
    path = str(tmp_path / "a_0000.nii.gz")
    sitk.WriteImage(image, path)
    raw = RawCase("a", (path,), None)
    for reader, expected in ((SimpleITKIO(), 1), (NibabelIOWithReorient(), 3)):
        array, properties = reader.read_images((path,))
        index = int(array[0].sum(axis=(1, 2)).argmax())
        assert index == expected, "the second reader turns the image"
        place = viewer_place(raw, reader, properties, 0, index, 5)
        assert (place.plane, place.axis, place.index, place.total) == ("axial", 2, 1, 5)


@pytest.mark.parametrize("direction", [(1, 0, 0, 0, 1, 0, 0, 0, 1), (-1, 0, 0, 0, -1, 0, 0, 0, 1), (0, 1, 0, 1, 0, 0, 0, 0, 1)])
def test_axial_slices_are_drawn_as_radiologists_see_them(tmp_path: Path, direction: tuple[float, ...]) -> None:
    """The patient's right is at the left and the front at the top, however the file stores it."""
    image = sitk.GetImageFromArray(np.zeros((3, 9, 7), np.float32))
    image.SetDirection(direction)
    corners = {corner: image.TransformIndexToPhysicalPoint(corner) for corner in [(x, y, 1) for x in (0, 6) for y in (0, 8)]}
    for value, (left, back) in enumerate([(-1, -1), (1, -1), (-1, 1), (1, 1)], start=1):  # the axes go to the left and to the back
        image[max(corners, key=lambda corner: left * corners[corner][0] + back * corners[corner][1])] = value
    sitk.WriteImage(image, str(tmp_path / "a_0000.nii.gz"))
    array, properties = SimpleITKIO().read_images((str(tmp_path / "a_0000.nii.gz"),))
    drawn, _, _ = display_plane(array[0], 0, 1, properties)
    assert drawn[:: len(drawn) - 1, :: drawn.shape[1] - 1].tolist() == [[1, 2], [3, 4]]


# The command


def test_writes_pictures_masks_and_instructions(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-n", "2") == 0
    text = capsys.readouterr().out
    output = folder / "suggestions"
    chosen = picks(folder, 2)
    assert sorted(path.name for path in output.iterdir()) == sorted(
        ["suggestion_1.png", "suggestion_2.png", "suggestions.txt", "labels_itksnap.txt", "labels_slicer.ctbl"]
        + [f"{case}.nii.gz" for case, _ in chosen]
    )
    assert (output / "suggestions.txt").read_text() == text
    assert imread(output / "suggestion_1.png").ndim == 3
    for case, index in chosen:
        mask = output / f"{case}.nii.gz"
        assert geometry(mask) == geometry(folder / "imagesUn" / f"{case}_0000.nii.gz")
        assert sitk.ReadImage(str(mask)).GetPixelID() == sitk.sitkUInt8
        assert np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(mask)))).tolist() == [4]
        assert f"{case}, slice {index} along z" in text and f"ITK-SNAP: slice {index + 1} of 8" in text
    for said in ("1 = wall", "2 = left cavity", "3 = right cavity", "4 fills the mask", f"labelsTr{os.sep}{chosen[0][0]}.nii.gz"):
        assert said in text
    assert f"--move {chosen[0][0]}" in text and "plan_and_preprocess -d 903" in text


def test_viewers_are_told_the_labels(folder: Path) -> None:
    assert run("-n", "1") == 0
    snap = [line.split(maxsplit=7) for line in (folder / "suggestions" / "labels_itksnap.txt").read_text().splitlines() if line[0] != "#"]
    assert [(int(line[0]), line[7].strip('"')) for line in snap] == [
        (0, "background"), (1, "wall"), (2, "left cavity"), (3, "right cavity"), (4, "not annotated")
    ]  # fmt: skip
    assert [line[5] for line in snap] == ["0", "1", "1", "1", "0"], "what is not annotated is invisible"
    slicer = [line.split() for line in (folder / "suggestions" / "labels_slicer.ctbl").read_text().splitlines() if line[0] != "#"]
    assert [line[:2] for line in slicer][1:3] == [["1", "wall"], ["2", "left_cavity"]]
    assert all(len(line) == 6 and all(0 <= int(n) <= 255 for n in line[2:]) for line in slicer)


def test_same_result_from_another_file_order_and_more_processes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = picks(folder)
    shutil.copy(next((folder / "imagesUn").iterdir()), folder / "imagesUn" / "broken_0000.nii.gz")
    with open(folder / "imagesUn" / "broken_0000.nii.gz", "r+b") as file:
        file.truncate(5000)
    assert main(["suggest", "-d", str(ID), "-np", "2", "-n", str(SCANS), "--skip_unreadable"]) == 0
    text = capsys.readouterr().out
    assert "Left out: " in text
    assert [text.index(f"{rank}. {case}, slice {index} ") for rank, (case, index) in enumerate(expected, 1)]
    (folder / "imagesUn" / "broken_0000.nii.gz").unlink()
    listing = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path=".": sorted(listing(path), reverse=True))
    assert picks(folder) == expected


def test_labels_are_not_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks that no reader can read change nothing but who is a candidate."""
    expected = picks(folder)
    annotated = expected[0][0]
    (folder / "imagesTr").mkdir()
    (folder / "labelsTr").mkdir()
    (folder / "imagesUn" / f"{annotated}_0000.nii.gz").rename(folder / "imagesTr" / f"{annotated}_0000.nii.gz")
    (folder / "labelsTr" / f"{annotated}.nii.gz").write_bytes(b"no image")
    monkeypatch.setattr(SimpleITKIO, "read_seg", lambda *_: pytest.fail("a label was opened"))
    assert run("-n", "3") == 0
    assert annotated not in [case for case, _ in picks(folder)]
    assert (folder / "labelsTr" / f"{annotated}.nii.gz").read_bytes() == b"no image"


def test_patients_without_a_mask_come_first(folder: Path) -> None:
    scans = sorted((folder / "imagesUn").iterdir())
    for i, scan in enumerate(scans):
        scan.rename(scan.with_name(f"patient{i // 2}_frame{i % 2}_0000.nii.gz"))
    best = picks(folder)[0][0]
    annotated = best[:-1] + "01"[best.endswith("0")]  # the other scan of the patient whose scan is the best
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir()
    (folder / "imagesUn" / f"{annotated}_0000.nii.gz").rename(folder / "imagesTr" / f"{annotated}_0000.nii.gz")
    (folder / "labelsTr" / f"{annotated}.nii.gz").touch()
    cases = [case for case, _ in picks(folder)]
    assert best not in cases[:2] and cases[0].split("_")[0] != cases[1].split("_")[0] and best in cases


def test_where_all_is_annotated_everything_is_a_candidate_and_nothing_changes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = picks(folder)
    (folder / "imagesUn").rename(folder / "imagesTr")
    (folder / "labelsTr").mkdir()
    for case, _ in expected:
        (folder / "labelsTr" / f"{case}.nii.gz").write_bytes(b"")
    before = content(folder)
    assert run("-o", str(folder.parent.parent / "out")) == 0
    assert picks(folder) == expected
    assert "what would have been suggested" in capsys.readouterr().out
    assert content(folder) == before


def test_ignore_label_is_added_once_and_the_old_file_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "dataset.json"
    before = path.read_bytes()
    (folder / "dataset.json.bak").write_text("someone else's")
    assert run() == 0
    assert '"ignore": 4 was added' in capsys.readouterr().out
    assert json.loads(path.read_text()) == {**json.loads(before), "labels": {**json.loads(before)["labels"], "ignore": 4}}
    assert (folder / "dataset.json.bak").read_text() == "someone else's" and (folder / "dataset.json.bak1").read_bytes() == before
    after = content(folder)
    assert run() == 0
    assert "was added" not in capsys.readouterr().out
    assert content(folder).keys() == after.keys() and path.read_bytes() == after["dataset.json"]


def test_painted_masks_and_foreign_files_are_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-n", "3") == 0
    painted, broken, empty = (folder / "suggestions" / f"{case}.nii.gz" for case, _ in picks(folder, 3))
    mask = sitk.ReadImage(str(painted))
    mask[24, 24, 4] = 1
    sitk.WriteImage(mask, str(painted))
    broken.write_bytes(b"something else")
    before = {path: path.read_bytes() for path in (painted, broken, empty)}
    capsys.readouterr()
    assert run("-n", "3") == 0
    assert capsys.readouterr().out.count("it was left as it is") == 2
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("option", ["--move", "--link"])
def test_first_scan_is_brought_to_training(folder: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    (case, _), second = picks(folder, 2)
    name = f"{case}_0000.nii.gz"
    before = (folder / "imagesUn" / name).read_bytes()
    assert run("-n", "1", option) == 0
    new = folder / "imagesTr" / name
    assert new.read_bytes() == before and [path.name for path in (folder / "imagesTr").iterdir()] == [name]
    assert new.is_symlink() == (option == "--link") == (folder / "imagesUn" / name).exists()
    assert list((folder / "labelsTr").iterdir()) == []
    assert "lies in imagesTr now" in capsys.readouterr().out
    dataset = open_raw(ID, require_labels=False)
    assert len(dataset.cases) == SCANS and dataset.cases[case].images == (str(new),)
    assert picks(folder, 2) == [(case, _), second], "not annotated yet, so still the first"
    assert run("-n", "1", option) == 0
    shutil.copy(folder / "suggestions" / f"{case}.nii.gz", folder / "labelsTr")
    assert case in open_raw(ID).labelled and case not in open_raw(ID).unlabelled


@pytest.mark.parametrize("option", ["--move", "--link"])
def test_named_scans_are_brought_with_all_channels(folder: Path, option: str) -> None:
    cases = [case for case, _ in picks(folder, 2)]
    for case in cases:
        shutil.copy(folder / "imagesUn" / f"{case}_0000.nii.gz", folder / "imagesUn" / f"{case}_0001.nii.gz")
    assert run(option, *cases) == 0
    assert sorted(path.name for path in (folder / "imagesTr").iterdir()) == sorted(f"{c}_000{i}.nii.gz" for c in cases for i in (0, 1))
    assert not (folder / "suggestions").exists(), "nothing was suggested"


@pytest.mark.parametrize("option", ["--move", "--link"])
def test_all_scans_are_brought_or_none_and_nothing_is_overwritten(
    folder: Path, option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (case for case, _ in picks(folder, 2))
    (folder / "imagesTr").mkdir()
    (folder / "imagesTr" / f"{other}_0000.nii.gz").write_bytes(b"another scan")
    before = content(folder)
    assert run(option, one, other) == 1
    assert "exists already and is not overwritten" in capsys.readouterr().err
    assert content(folder) == before
    assert run(option, one, "nobody") == 1
    assert "has no scan of a case 'nobody'" in capsys.readouterr().err
    assert content(folder) == before

    (folder / "imagesTr" / f"{other}_0000.nii.gz").unlink()
    before = content(folder)
    function = {"--move": "rename", "--link": "symlink"}[option]
    original, calls = getattr(os, function), []

    def fail_second(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("disk on fire")
        original(*arguments)

    monkeypatch.setattr(os, function, fail_second)
    assert run(option, one, other) == 1
    assert "disk on fire" in capsys.readouterr().err
    assert content(folder) == before


def test_moves_between_file_systems(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = picks(folder, 1)[0][0]
    old, original = folder / "imagesUn" / f"{case}_0000.nii.gz", os.rename
    before = old.read_bytes()

    def rename(a: str, b: str) -> None:
        if Path(a).parent != Path(b).parent:
            raise OSError(18, "Invalid cross-device link")
        original(a, b)

    monkeypatch.setattr(os, "rename", rename)
    assert run("--move", case) == 0
    assert not old.exists() and (folder / "imagesTr" / old.name).read_bytes() == before
    assert [path.name for path in (folder / "imagesTr").iterdir()] == [old.name]


def test_relative_links_still_lead_to_the_scan_when_moved(folder: Path) -> None:
    case = picks(folder, 1)[0][0]
    name = f"{case}_0000.nii.gz"
    (folder / "archive").mkdir()
    (folder / "imagesUn" / name).rename(folder / "archive" / name)
    (folder / "imagesUn" / "deep").mkdir()
    os.symlink(os.path.join(os.pardir, "archive", name), folder / "imagesUn" / name)
    assert run("--move", case) == 0
    assert (folder / "imagesTr" / name).resolve() == (folder / "archive" / name).resolve()
    assert not (folder / "imagesUn" / name).is_symlink()


def test_read_only_data_set_needs_another_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = picks(folder, 1)[0][0]
    before = content(folder)
    (folder / "dataset.json").chmod(0o444)
    (folder / "imagesUn").chmod(0o555)
    folder.chmod(0o555)
    assert run() == 1
    assert "is read-only; choose a folder for the suggestions with -o" in capsys.readouterr().err
    assert run("-o", str(tmp_path / "out"), "-n", "1") == 0
    assert 'add "ignore": 4 to "labels"' in capsys.readouterr().out
    assert (tmp_path / "out" / f"{case}.nii.gz").exists()
    assert run("--move", case) == 1
    assert "is read-only" in capsys.readouterr().err
    assert content(folder) == before


def test_output_that_cannot_be_made(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "suggestions").write_text("a file")
    assert run() == 1
    error = capsys.readouterr().err
    assert "suggestions cannot be written to" in error and error.count("\n") == 1


@pytest.mark.parametrize("damage", ["garbage", "truncated", "nan"])
def test_unreadable_scan_is_named(folder: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    path = sorted((folder / "imagesUn").iterdir())[2]
    if damage == "nan":  # ITK reads NaN in NIfTI files as 0, nibabel does not
        description = json.loads((folder / "dataset.json").read_text())
        (folder / "dataset.json").write_text(json.dumps({**description, "overwrite_image_reader_writer": "NibabelIO"}))
        image = nibabel.load(path)
        values = np.asarray(image.dataobj).copy()
        values[3, 3, 3] = np.nan
        nibabel.save(nibabel.Nifti1Image(values, image.affine), path)
    else:
        path.write_bytes(b"garbage" if damage == "garbage" else path.read_bytes()[:-3000])
    assert run("-n", "2") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert path.name in error and "--skip_unreadable" in error
    assert not list((folder / "suggestions").iterdir()) and not (folder / "dataset.json.bak").exists()
    assert run("-n", str(SCANS), "--skip_unreadable") == 0
    text = capsys.readouterr().out
    assert f"Left out: {path}" in text
    assert path.name not in text.split("The best first:")[1] and f"{SCANS - 1}. phantom" in text


@pytest.mark.parametrize("arguments", [("-n", "0"), ("-np", "0")])
def test_bad_numbers_are_refused(folder: Path, arguments: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suggest", "-d", str(ID), *arguments]) == 1
    assert arguments[0] in capsys.readouterr().err


def test_slices_of_another_axis(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--axis", "x", "-n", "1") == 0
    text = capsys.readouterr().out
    assert "along x (counted from 0; there are 48)" in text and "sagittal view; 3D Slicer: i = " in text
    assert (folder / "suggestions" / "suggestion_1.png").exists()


# Other kinds of data


def make_images(root: Path, ending: str, **labels: Any) -> Path:
    """A data set of 2D images, of which one is noise."""
    folder = root / NAME
    (folder / "imagesUn").mkdir(parents=True)
    for i in range(5):
        image = make_scan((4, i), (1, 48, 48))[0][0]
        if i == 2:
            image = np.random.default_rng(0).uniform(0, 1, image.shape)
        imsave(folder / "imagesUn" / f"img{i}_0000{ending}", (255 * image / image.max()).astype(np.uint8), check_contrast=False)
    description = {"channel_names": {"0": "grey"}, "labels": labels or {"background": 0, "cell": 1}, "file_ending": ending}
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


@pytest.mark.parametrize("ending", [".png", ".bmp"])
def test_two_dimensional_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ending: str) -> None:
    folder = make_images(tmp_path, ending)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    assert run("-n", "4") == 0
    text = capsys.readouterr().out
    masks = sorted(path.name for path in (folder / "suggestions").glob("img*"))
    assert len(masks) == 4 and f"img2{ending}" not in masks
    dataset: RawDataset = open_raw(ID, require_labels=False)
    mask = dataset.reader().read_seg(str(folder / "suggestions" / masks[0]))[0]
    assert mask.shape == (1, 1, 48, 48) and (mask == 2).all() and '"ignore": 2 was added' in text
    assert "ITK-SNAP: slice" not in text
    assert imread(folder / "suggestions" / "suggestion_1.png").ndim == 3


def test_tiff_volumes_have_their_spacing_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_images(tmp_path, ".tif")
    for path in (folder / "imagesUn").iterdir():
        imsave(path, make_scan((3, int(path.name[3])), SHAPE)[0], check_contrast=False)
        (folder / "imagesUn" / f"{path.name[:4]}.json").write_text(json.dumps({"spacing": [8, 1.5, 1.5]}))
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    assert run("-n", "1", "--move") == 0
    assert "Copy the .json that lies beside the empty mask" in capsys.readouterr().out
    (mask,) = (folder / "suggestions").glob("img*.tif")
    (folder / "labelsTr").mkdir(exist_ok=True)
    painted = io.imread(mask)
    painted[4, 10:20, 10:20] = 1
    imsave(folder / "labelsTr" / mask.name, painted, check_contrast=False)
    with pytest.raises(CMEMSError, match=rf"differ in spacing.*it has to stand in .*labelsTr/{mask.stem}\.json beside it"):
        examine(open_raw(ID))
    shutil.copy(mask.with_suffix(".json"), folder / "labelsTr")
    examine(open_raw(ID))


def test_regions_and_ignore_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_images(tmp_path, ".png", background=0, whole=[1, 2], core=[2], ignore=3)
    content_json = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**content_json, "regions_class_order": [1, 2]}))
    before = (folder / "dataset.json").read_bytes()
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    assert run("-n", "1") == 0
    text = capsys.readouterr().out
    assert "1 = whole, 2 = whole and core" in text and "The value 3 fills the mask" in text
    assert (folder / "dataset.json").read_bytes() == before


def test_several_channels(folder: Path) -> None:
    """A channel of noise beside the scan changes nothing but makes the typical less certain; the mask fits all channels."""
    path = folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "channel_names": {"0": "MRI", "1": "noise"}}))
    for scan in sorted((folder / "imagesUn").iterdir()):
        image = sitk.ReadImage(str(scan))
        noise = sitk.GetImageFromArray(np.random.default_rng(0).uniform(0, 1, SHAPE).astype(np.float32))
        noise.CopyInformation(image)
        sitk.WriteImage(noise, str(scan).replace("_0000", "_0001"))
    assert run("-n", "2") == 0
    assert all(2 <= index < 6 for _, index in picks(folder))
    case = picks(folder, 1)[0][0]
    assert geometry(folder / "suggestions" / f"{case}.nii.gz") == geometry(folder / "imagesUn" / f"{case}_0001.nii.gz")


def test_no_scans_at_all(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(folder / "imagesUn")
    assert run() == 1
    assert "has no scan" in capsys.readouterr().err
