"""Labels of annotated volumes on other scans."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from test_refinement import CLASSES, REGIONS, dice
from torch import Tensor

from nnunetv2_cmems.config import ScanLabelsConfig
from nnunetv2_cmems.method import atlas as atlas_module
from nnunetv2_cmems.method.atlas import Atlas, carried, from_tensor, refined_on, to_tensor, weighed_on
from nnunetv2_cmems.method.label_space import LabelSpace
from nnunetv2_cmems.method.refinement import Refinement


def says(atlases: list[Atlas], scan: np.ndarray, space: LabelSpace = CLASSES) -> tuple[Tensor, Tensor]:
    found = carried(atlases, torch.from_numpy(scan).float(), space)
    assert found is not None
    return found


SPACES = pytest.mark.parametrize("space", [CLASSES, REGIONS], ids=["classes", "regions"])
SHAPE = 20, 44, 48


def body(shape: tuple[int, ...] = SHAPE, moved: tuple[float, float, float] = (0, 0, 0), size: float = 1.0) -> tuple[np.ndarray, Tensor]:
    """A scan (1, Z, Y, X) and its labels: an organ in a wall, a second one beside it that looks the same, and a bone behind both."""
    z, y, x = np.meshgrid(*[np.arange(n) - n / 2 for n in shape], indexing="ij")

    def ball(middle: tuple[float, float, float], radii: tuple[float, float, float]) -> np.ndarray:
        parts = zip((z, y, x), middle, moved, radii)
        return sum(((place - size * at - shift) / (size * radius)) ** 2 for place, at, shift, radius in parts) < 1  # type: ignore[return-value]

    wall, organ, other, bone = (
        ball(*one) for one in (((0, -3, -7), (6, 9, 8)), ((0, -3, -7), (4, 6, 5)), ((0, -3, 9), (4, 6, 5)), ((0, 12, 0), (8, 3, 9)))
    )
    label = np.select([organ, wall], [1, 2], 0)
    grey = np.select([organ | other, wall, bone], [0.6, -0.4, 2.0], 0.0) + 0.02 * x / size
    return (grey + np.random.default_rng(0).normal(0, 0.05, shape))[None].astype(np.float32), torch.from_numpy(label)


@SPACES
def test_labels_come_along(space: LabelSpace) -> None:
    """To a scan of another size, whose organs lie elsewhere, are larger and have other grey values."""
    image, label = body()
    scan, truth = body((24, 52, 50), moved=(1.5, 3.0, -3.0), size=1.2)
    found, known = says([Atlas(image, label.numpy())], 0.7 * scan + 0.5, space)
    assert found.shape == (len(space.names) + (space is CLASSES), 24, 52, 50) and found.dtype == torch.float32
    assert known.shape == truth.shape and known.all()
    assert (found >= 0).all() and (found <= 1 + 1e-6).all()
    if space is CLASSES:
        torch.testing.assert_close(found.sum(0), torch.ones(truth.shape))
    assert min(dice(found, truth, space)) > 0.85


def test_the_organ_on_the_other_side_is_not_taken_for_it() -> None:
    image, label = body()
    scan, truth = body(moved=(0.0, 1.0, 2.0))
    found, _ = says([Atlas(image, label.numpy())], scan)
    assert not found[:, ..., 30:].argmax(0).any() and truth.any()


def test_several_volumes_are_averaged() -> None:
    atlases = [Atlas(image, label.numpy()) for image, label in (body(), body(size=0.9))]
    scan = body(moved=(0.0, 1.0, 1.0))[0]
    alone = [says([atlas], scan)[0] for atlas in atlases]
    torch.testing.assert_close(says(atlases, scan)[0], (alone[0] + alone[1]) / 2)


@SPACES
def test_what_is_not_annotated_stays_unknown(space: LabelSpace) -> None:
    image, label = body()
    partly = label.numpy().copy()
    partly[:, :, 36:] = -1
    found, known = says([Atlas(image, partly)], image, space)
    assert known[..., :34].all() and not known[2:-2, 4:-4, 38:-4].any()
    assert min(dice(found, label, space)) > 0.9


def test_it_is_the_same_in_every_thread() -> None:
    image, label = body()
    scans = [body(moved=(0, 0, shift))[0] for shift in (1.0, 2.0)]
    alone = [says([Atlas(image, label.numpy())], scan)[0] for scan in scans]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda scan: says([Atlas(image, label.numpy())], scan)[0], scans))
    assert all(torch.equal(a, b) for a, b in zip(alone, together))


@pytest.mark.parametrize("shape", [(1, 44, 48), (3, 44, 48), (20, 5, 48)])
def test_scans_of_a_few_slices(shape: tuple[int, int, int]) -> None:
    image, label = body()
    found = carried([Atlas(image, label.numpy())], torch.from_numpy(body(shape)[0]), CLASSES)
    assert found is None or (found[0].shape == (3, *shape) and found[0].isfinite().all())


@pytest.mark.parametrize(
    ("atlas", "scan"), [(np.ones, body), (body, np.zeros), (body, "noise")], ids=["flat volume", "flat scan", "another organ"]
)
def test_what_cannot_be_registered_has_no_labels(atlas: Any, scan: Any) -> None:
    """There are no grey values to go by, or alignments lead to different places."""

    def image(made: Any) -> np.ndarray:
        if made is body:
            return body()[0]
        return np.random.default_rng(1).normal(size=(1, *SHAPE)) if made == "noise" else made((1, *SHAPE))

    found = carried([Atlas(image(atlas).astype(np.float32), body()[1].numpy())], torch.from_numpy(image(scan)).float(), CLASSES)
    assert found is None


def test_volumes_that_cannot_be_registered_are_left_out() -> None:
    """The others say what they say without them."""
    image, label = body()
    scan = torch.from_numpy(body(moved=(0.0, 1.0, 1.0))[0])
    good, flat = Atlas(image, label.numpy()), Atlas(np.ones_like(image), label.numpy())
    alone, together = carried([good], scan, CLASSES), carried([flat, good], scan, CLASSES)
    assert alone is not None and together is not None
    assert all(torch.equal(a, b) for a, b in zip(alone, together))


def test_channels_count_together() -> None:
    image, label = body()
    scan = body(moved=(0.0, 1.0, 1.0))[0]
    one = says([Atlas(image, label.numpy())], scan)[0]
    two = says([Atlas(np.repeat(image, 2, 0), label.numpy())], np.repeat(scan, 2, 0))[0]
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("finest", [128, 24], ids=["as it is", "at half of the resolution"])
def test_what_is_kept_registers_as_the_volume_itself(monkeypatch: pytest.MonkeyPatch, finest: int) -> None:
    """Two channels of any brightness; a large volume is kept no finer than demons see it, its label as it is."""
    monkeypatch.setattr(atlas_module, "_FINEST", finest)
    image, label = body()
    partly = label.numpy().copy()
    partly[:, :, 44:] = -1
    whole = Atlas(1e6 * np.concatenate([image, 1 + 2 * image]) + 7e4, partly)
    stored = to_tensor([whole, Atlas(*(one if isinstance(one, np.ndarray) else one.numpy() for one in body(size=0.9)))])
    assert stored.dtype == torch.uint8 and stored.ndim == 1
    kept, other = from_tensor(stored)
    assert np.array_equal(kept.label, partly) and np.array_equal(other.label, body(size=0.9)[1].numpy())
    assert kept.image.shape == ((1, *SHAPE) if finest == 128 else (1, 20, 22, 24))
    scan = body(moved=(0.0, 1.0, 1.0))[0]
    (found, known), (kept_found, kept_known) = says([whole], scan), says([kept], scan)
    assert (known != kept_known).float().mean() < 0.03
    assert (found - kept_found).abs().mean() < (0.001 if finest == 128 else 0.01)
    assert min(dice(kept_found, body(moved=(0.0, 1.0, 1.0))[1], CLASSES)) > 0.85


@SPACES
def test_refined_it_follows_the_scans_grey_values(space: LabelSpace) -> None:
    image, label = body()
    scan, truth = body((24, 52, 50), moved=(1.5, 3.0, -3.0), size=1.2)
    rule = Refinement(ScanLabelsConfig(places=False), (False,) * 3, 1.0)
    given = [Atlas(image, label.numpy())], torch.from_numpy(0.7 * scan + 0.5)
    found, refined = carried(*given, space), refined_on(*given, rule, space, False)
    assert found is not None and refined is not None and torch.equal(found[1], refined[1])
    assert refined[0].shape == found[0].shape and (refined[0] >= 0).all() and (refined[0] <= 1 + 1e-6).all()
    before, after = dice(found[0], truth, space), dice(refined[0], truth, space)
    assert np.mean(after) > np.mean(before) and min(after) > 0.9


@SPACES
def test_who_contradicts_himself_counts_less(space: LabelSpace) -> None:
    """Volumes that several alignments bring to different places, and members that disagree."""
    image, label = body()
    partly = label.numpy().copy()
    partly[:, :, 36:] = -1
    rule = Refinement(ScanLabelsConfig(places=False), (False,) * 3, 1.0)
    scan = torch.from_numpy(body(moved=(0.0, 1.0, 2.0))[0])
    noise = np.random.default_rng(1).normal(size=(1, *SHAPE)).astype(np.float32)

    def shares(atlases: list[Atlas], together: float) -> tuple[Tensor, Tensor]:
        found = weighed_on(atlases, scan, rule, space, False, together)
        assert found is not None and found[1].shape == SHAPE and (found[1] >= 0).all() and (found[1] < 1).all()
        return found

    good, bad = Atlas(image, label.numpy()), Atlas(noise, label.numpy())
    surely, hardly = shares([good], 0.9)[1], shares([good], 0.5)[1]
    assert surely.unique().numel() == 1 and 0.2 < float(surely.mean()) < float(hardly.mean())
    assert float(shares([bad], 0.9)[1].mean()) < 0.2, "though it is not left out"
    assert torch.equal(shares([good], 0.0)[1], shares([good], float("nan"))[1]), "members that see nothing are no witnesses"
    some = shares([Atlas(image, partly)], 0.9)[1]
    assert not some[2:-2, 4:-4, 40:-4].any() and some[..., :34].min() > 0.2
    both, one = (refined_on([good], scan, rule, space, False), shares([good], 0.9))
    assert both is not None
    torch.testing.assert_close(one[0], both[0])
    apart = (shares([good, bad], 0.9)[0] - one[0]).abs().mean()
    equal = carried([good], scan, space)
    assert equal is not None and apart < 0.3 * equal[0].abs().mean()


def test_refined_where_nothing_can_be_registered() -> None:
    image, label = body()
    rule = Refinement(ScanLabelsConfig(), (False,) * 3, 1.0)
    given = [Atlas(np.ones_like(image), label.numpy())], torch.from_numpy(image), rule, CLASSES, False
    assert refined_on(*given) is None and weighed_on(*given, 0.5) is None
