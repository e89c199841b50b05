"""Unlabelled crops: whole images are covered, no label is opened, and what cannot be read is said in a sentence."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CASES, CONFIGURATION, Workspace
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2, nnUNetDatasetNumpy
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_cmems.data import unlabelled
from nnunetv2_cmems.data.exemplar import PreprocessedDataset
from nnunetv2_cmems.data.unlabelled import CACHE_VARIABLE, UnlabelledLoader, check_images, image_path, open_image
from nnunetv2_cmems.errors import CMEMSError


@pytest.fixture
def dataset(workspace: Workspace) -> PreprocessedDataset:
    """The preprocessed folder without any label."""
    for path in workspace.images.glob("*_seg.b2nd"):
        path.unlink()
    return PreprocessedDataset.from_plans(
        str(workspace.images), nnUNetDatasetBlosc2, PlansManager(workspace.plans()), workspace.dataset_json()
    )


@pytest.fixture
def configuration(workspace: Workspace) -> ConfigurationManager:
    return PlansManager(workspace.plans()).get_configuration(CONFIGURATION)


def coordinates(case: int, shape: tuple[int, int, int] = (3, 12, 14)) -> np.ndarray:
    """Image (2, Z, Y, X) whose voxels say where they are; none is 0. The second channel is the first's negative."""
    z, y, x = np.mgrid[: shape[0], : shape[1], : shape[2]]
    image = (1 + x + 100 * y + 10_000 * z + 100_000 * case).astype(np.float32)
    return np.stack([image, -image])


def test_batches(dataset: PreprocessedDataset) -> None:
    loader = UnlabelledLoader(dict.fromkeys(CASES, dataset), 3, (40, 44), (32, 32))
    batch = next(loader)
    assert set(batch) == {"data", "offset"}
    assert batch["offset"].shape == (3, 2) and batch["offset"].dtype == torch.float32
    assert batch["data"].shape == (3, 1, 40, 44) and batch["data"].dtype == torch.float32
    assert torch.isfinite(batch["data"]).all() and batch["data"].std() > 0.1


def test_crops_cover_every_case_slice_and_place(workspace: Workspace, dataset: PreprocessedDataset) -> None:
    for number, case in enumerate(CASES[:2]):
        workspace.set_image(case, coordinates(number))
    np.random.seed(0)
    loader = UnlabelledLoader(dict.fromkeys(CASES[:2], dataset), 50, (10, 9), (8, 8))
    batches = [next(loader) for _ in range(4)]
    crops, offsets = (torch.cat([batch[key] for batch in batches]).numpy() for key in ("data", "offset"))
    places = set()
    for crop, offset in zip(crops, offsets, strict=True):
        assert np.array_equal(crop[1], -crop[0])  # the channels stay together
        inner = crop[0, 1:9, 0:8]  # the crop has one row more at either side, and one column more at one side
        assert (inner > 0).all()  # the patch lies within the image: no padding in it
        assert np.array_equal(inner - inner[0, 0], 100 * np.arange(8)[:, None] + np.arange(8))  # and shows neighbours as neighbours
        place = int(inner[0, 0]) - 1
        assert offset.tolist() == [place // 100 % 100 + 4 - 6, place % 100 + 4 - 7]  # from the image's middle to the crop's
        places.add(place)
    assert {place // 100_000 for place in places} == {0, 1}
    assert {place // 10_000 % 10 for place in places} == {0, 1, 2}
    assert {place // 100 % 100 for place in places} == set(range(12 - 8 + 1))
    assert {place % 100 for place in places} == set(range(14 - 8 + 1))


def test_image_smaller_than_the_patch_is_padded_around_its_centre(workspace: Workspace, dataset: PreprocessedDataset) -> None:
    workspace.set_image(CASES[0], coordinates(0, (1, 4, 6)))
    batch = next(UnlabelledLoader(dict.fromkeys(CASES[:1], dataset), 1, (12, 12), (8, 8)))
    crop = batch["data"][0, 0].numpy()
    assert batch["offset"].tolist() == [[0.0, 0.0]]
    expected = np.zeros((12, 12), np.float32)
    expected[4:8, 3:9] = coordinates(0, (1, 4, 6))[0, 0]
    assert np.array_equal(crop, expected)


def test_volumes(workspace: Workspace, dataset: PreprocessedDataset) -> None:
    for number, case in enumerate(CASES[:2]):
        workspace.set_image(case, coordinates(number, (5, 12, 14)))
    np.random.seed(0)
    batch = next(UnlabelledLoader(dict.fromkeys(CASES[:2], dataset), 60, (4, 10, 9), (2, 8, 8)))
    assert batch["data"].shape == (60, 2, 4, 10, 9) and batch["offset"].shape == (60, 3)
    slices = set()
    for crop, offset in zip(batch["data"].numpy(), batch["offset"].tolist(), strict=True):
        inner = crop[0, 1:3, 1:9, 0:8]
        assert np.array_equal(crop[1], -crop[0]) and (inner > 0).all()
        assert np.array_equal(inner[1] - inner[0], np.full((8, 8), 10_000))
        place = int(inner[0, 0, 0]) - 1
        assert offset[0] == place // 10_000 % 10 + 1 - 2.5
        slices.add(place // 10_000 % 10)
    assert slices == set(range(5 - 2 + 1))


def test_each_case_is_read_from_its_own_folder(workspace: Workspace, dataset: PreprocessedDataset) -> None:
    other = workspace.images.with_name(workspace.images.name + "_unlabelled")
    other.mkdir()
    for suffix in (".b2nd", ".pkl"):
        (workspace.images / (CASES[0] + suffix)).rename(other / ("scan" + suffix))
    batch = next(UnlabelledLoader({"scan": dataclasses.replace(dataset, folder=str(other))}, 2, (36, 36), (32, 32)))
    assert batch["data"].shape == (2, 1, 36, 36)
    (other / "scan.b2nd").write_bytes(b"no image")
    error = next(UnlabelledLoader({"scan": dataclasses.replace(dataset, folder=str(other))}, 2, (36, 36), (32, 32)))["error"]
    assert str(other / "scan.b2nd") in error and "nnUNetv2_cmems plan_and_preprocess" in error


def test_draws_follow_numpys_seed(dataset: PreprocessedDataset) -> None:
    loader = UnlabelledLoader(dict.fromkeys(CASES, dataset), 4, (36, 36), (32, 32))
    drawn = []
    for seed in (3, 3, 4):
        np.random.seed(seed)
        drawn.append(next(loader)["data"])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_loader_can_be_sent_to_a_worker(dataset: PreprocessedDataset) -> None:
    """Spawned workers get it by pickle."""
    loader = UnlabelledLoader(dict.fromkeys(CASES, dataset), 2, (36, 36), (32, 32))
    sent = pickle.loads(pickle.dumps(loader))
    batches = []
    for one in (loader, sent):
        np.random.seed(1)
        batches.append(next(one)["data"])
    assert torch.equal(*batches)


def test_stored_images_stay_as_they_are(workspace: Workspace, dataset: PreprocessedDataset) -> None:
    before = {path.name: path.read_bytes() for path in workspace.images.iterdir()}
    batch = next(UnlabelledLoader(dict.fromkeys(CASES, dataset), 8, (36, 36), (32, 32)))["data"]
    batch += 1
    assert {path.name: path.read_bytes() for path in workspace.images.iterdir()} == before


@pytest.mark.parametrize("kind", ["garbage", "missing", "nan", "infinite"])
def test_unusable_image_is_named_in_a_sentence(workspace: Workspace, dataset: PreprocessedDataset, kind: str) -> None:
    """As part of the batch: a worker process cannot raise in the main one."""
    path = workspace.images / f"{CASES[0]}.b2nd"
    if kind == "garbage":
        path.write_bytes(b"no image" * 100)
    elif kind == "missing":
        path.unlink()
    else:
        image = workspace.image(CASES[0])
        image[:, :, 18, 18] = np.nan if kind == "nan" else np.inf  # within every crop
        workspace.set_image(CASES[0], image)
    batch = next(UnlabelledLoader(dict.fromkeys(CASES[:1], dataset), 2, (36, 36), (32, 32)))
    assert set(batch) == {"error"}
    assert str(path) in batch["error"] and "nnUNetv2_preprocess" in batch["error"] and "\n" not in batch["error"]
    assert ("NaN or infinite" in batch["error"]) == (kind in ("nan", "infinite"))


def test_numpy_data_sets_are_read_too(tmp_path: Path) -> None:
    """nnU-Net's older format: ``.npz``, unpacked or not."""
    dataset = PreprocessedDataset(str(tmp_path), nnUNetDatasetNumpy, (0, 1, 2), {1: "wall"})
    np.savez_compressed(tmp_path / "a.npz", data=coordinates(1), seg=np.zeros((1, 3, 12, 14)))
    assert image_path("a", dataset).endswith("a.npz")
    assert np.array_equal(open_image("a", dataset), coordinates(1))
    np.save(tmp_path / "a.npy", coordinates(2))
    assert image_path("a", dataset).endswith("a.npy")
    assert np.array_equal(open_image("a", dataset), coordinates(2))
    crops = next(UnlabelledLoader(dict.fromkeys(["a"], dataset), 2, (8, 8), (8, 8)))["data"]
    assert (crops[:, 0] > 200_000).all()


# ------------------------------------------------------------------ the check before a training


def test_what_nnunet_preprocessed_passes(dataset: PreprocessedDataset, configuration: ConfigurationManager) -> None:
    check_images(CASES, dataset, configuration, 1)


def test_no_voxel_is_read(workspace: Workspace, dataset: PreprocessedDataset, configuration: ConfigurationManager) -> None:
    image = workspace.image(CASES[0])
    workspace.set_image(CASES[0], np.full_like(image, np.nan))
    check_images(CASES, dataset, configuration, 1)


def test_wrong_number_of_channels(dataset: PreprocessedDataset, configuration: ConfigurationManager) -> None:
    with pytest.raises(CMEMSError, match=r"phantom_tr000\.b2nd has 1 channels where dataset\.json names 2"):
        check_images(CASES, dataset, configuration, 2)


def test_wrong_number_of_axes(workspace: Workspace, dataset: PreprocessedDataset, configuration: ConfigurationManager) -> None:
    workspace.set_image(CASES[3], workspace.image(CASES[3])[:, 0:1, :, :].repeat(5, 1)[0:1, :, :35])
    with pytest.raises(CMEMSError, match=r"phantom_tr003\.b2nd has the shape \(5, 35, 36\).* 2 x 2 mm .*\(5, 36, 36\)"):
        check_images(CASES, dataset, configuration, 1)


def test_other_spacing(workspace: Workspace, dataset: PreprocessedDataset) -> None:
    plans = workspace.plans()
    plans["configurations"][CONFIGURATION]["spacing"] = [3.0, 2.0]
    with pytest.raises(CMEMSError, match=r"\(5, 36, 36\).* 3 x 2 mm .*\(5, 24, 36\).*nnUNetv2_preprocess"):
        check_images(CASES, dataset, PlansManager(plans).get_configuration(CONFIGURATION), 1)


def test_unreadable_image(workspace: Workspace, dataset: PreprocessedDataset, configuration: ConfigurationManager) -> None:
    (workspace.images / f"{CASES[2]}.b2nd").write_bytes(b"")
    with pytest.raises(CMEMSError, match=r"phantom_tr002\.b2nd cannot be read"):
        check_images(CASES, dataset, configuration, 1)


@pytest.mark.parametrize("flat", [True, False])
def test_what_is_read_is_kept_where_it_fits(dataset: PreprocessedDataset, monkeypatch: pytest.MonkeyPatch, flat: bool) -> None:
    """The crops are the same with and without the cache, which never holds more than it may."""
    crop, patch = ((36, 36), (32, 32)) if flat else ((4, 36, 36), (2, 32, 32))
    found, reads = {}, {}
    for size in ("0", "0.00002", "2"):
        monkeypatch.setenv(CACHE_VARIABLE, size)
        loader = UnlabelledLoader(dict.fromkeys(CASES[:2], dataset), 30, crop, patch)
        seen: list[str] = []
        original = unlabelled.open_image

        def read(case: str, where: PreprocessedDataset, seen: list[str] = seen, original: Any = original) -> Any:
            seen.append(case)
            return original(case, where)

        monkeypatch.setattr(unlabelled, "open_image", read)
        np.random.seed(0)
        found[size] = [next(loader)["data"] for _ in range(2)]
        monkeypatch.setattr(unlabelled, "open_image", original)
        reads[size] = len(seen)
        assert sum(part.nbytes for part in loader._kept.values()) <= float(size) * 1e9
        assert all(not np.shares_memory(part, found[size][1].numpy()) for part in loader._kept.values())
    for size in ("0.00002", "2"):
        assert all(torch.equal(a, b) for a, b in zip(found["0"], found[size]))
    assert reads["0"] == 60 + 2 and reads["2"] < reads["0.00002"] <= reads["0"]


def test_a_cache_that_is_no_size(dataset: PreprocessedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("much", "-1", "nan", "inf"):
        monkeypatch.setenv(CACHE_VARIABLE, wrong)
        with pytest.raises(CMEMSError, match=f"{CACHE_VARIABLE} is '{wrong}'; set it to gigabytes"):
            UnlabelledLoader(dict.fromkeys(CASES[:2], dataset), 3, (36, 36), (32, 32))
