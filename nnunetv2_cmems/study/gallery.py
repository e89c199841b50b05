"""The report's gallery: scan, truth, every method's mask and where the members disagree, slice by slice.

Slices become small pictures that stand in the page itself: the scan as WebP, and each mask as a transparent PNG that lies over
it, so that a scan is stored once for all of them.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from PIL import Image
from scipy import ndimage

from nnunetv2_cmems.data.annotation import LabelValues
from nnunetv2_cmems.data.raw import RawDataset, open_raw, quiet_itk
from nnunetv2_cmems.errors import CMEMSError, first_line
from nnunetv2_cmems.study.pictures import _bounding_box, class_colours
from nnunetv2_cmems.study.report_runs import Benchmark, Run, cases_of, dice_of, mean_per_case

MOST_SLICES = 24
"""Slices of a volume that a gallery shows at most."""

_SIDE = 288  # pixels of the longer side of a scan in the page, at most
_OVERLAY = 512  # of a mask's
_CT_WINDOW = (-160.0, 240.0)
_FILL, _STRIPE, _EDGE = 52, 120, 235  # opacity of a mask's area, of its texture, and of its outline; of 255
_HEAT = "inferno"
_HEAT_LEVELS = 48
CACHE = "gallery"


_TEXTURES: tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], ...] = (
    lambda y, x: (y < 0) & (x < 0),  # none
    lambda y, x: (x + y) % 14 < 3,
    lambda y, x: (y % 14 < 3) & (x % 14 < 3),
    lambda y, x: (x - y) % 14 < 3,
    lambda y, x: (y % 14 < 3) & (x >= 0),
    lambda y, x: (x % 14 < 3) & (y >= 0),
    lambda y, x: ((x + y) % 14 < 2) | ((x - y) % 14 < 2),
    lambda y, x: (y % 14 < 2) | (x % 14 < 2),
)
"""Of the classes, one after the other: where the texture is, for rows and columns."""


@dataclass
class Layer:
    """What lies over the scan, one picture a slice; None: the scan alone.

    Attributes:
        title: "truth", or the method.
        note: the case's Dice.
        pictures: data URIs.
    """

    title: str
    note: str = ""
    pictures: list[str] | None = None
    kind: str = "mask"


@dataclass
class Case:
    """One case of the gallery.

    Attributes:
        rank: "best", "median" or "worst".
        name: the case identifier.
        dice: of the method that ranks.
        slices: the raw index of each slice that is shown.
        first: position of the slice that is shown first.
        total: slices that the volume has.
        aspect: width / height of a slice as it is drawn.
        scans: data URIs, one a slice.
        layers: what is drawn beside each other.
        zoom: see :func:`zoom_to`.
    """

    rank: str
    name: str
    dice: float
    slices: list[int]
    first: int
    total: int
    aspect: float
    scans: list[str]
    layers: list[Layer]
    zoom: tuple[float, float, float] = (1.0, 50.0, 50.0)


@dataclass
class Gallery:
    """The cases, what their colours mean, and what had to be left out.

    Attributes:
        cases: best, median and worst case.
        legend: class name -> data URI of a piece of its colour and texture.
        method: the method that ranks the cases.
        runs: method -> key of the run whose masks are shown.
        window: how the scans' grey values are shown.
        missing: sentences about what is not shown, and why.
    """

    method: str = ""
    cases: list[Case] = field(default_factory=list)
    legend: dict[str, str] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)
    window: str = ""
    missing: list[str] = field(default_factory=list)

    @property
    def disagreement(self) -> bool:
        return any(layer.kind == "heat" for case in self.cases for layer in case.layers)

    @property
    def cut(self) -> bool:
        """Whether some slices are left out."""
        return any(case.total > len(case.slices) for case in self.cases)


def make_gallery(benchmark: Benchmark) -> Gallery:
    """The best, the median and the worst case of the benchmark's main method.

    What cannot be shown is left out; the gallery says so.
    """
    gallery = Gallery(benchmark.main)
    leader = benchmark.methods[benchmark.main][0]
    ranked = rank_cases(benchmark, leader)
    if not ranked:
        gallery.missing.append(f"No case of {leader.key} has a Dice, so there is no best or worst one.")
        return gallery
    try:
        with quiet_itk():
            raw = open_raw(benchmark.dataset)
            raw.reader()
    except CMEMSError as error:
        gallery.missing.append(f"No scans are shown: {error}")
        return gallery
    chosen = {method: companion(runs, leader) for method, runs in benchmark.methods.items()}
    gallery.runs = {method: run.key for method, run in chosen.items()}
    gallery.legend = legend({value: name for value, name in sorted(raw.values.names.items()) if value > 0})
    _, gallery.window = _grey_window(raw, None)
    picks = {"best": ranked[-1], "median": ranked[len(ranked) // 2], "worst": ranked[0]}
    cases = list(dict.fromkeys(case for case, _ in picks.values()))
    maps = _disagreements(leader, cases, gallery)
    done: set[str] = set()
    with quiet_itk():
        for rank, (case, dice) in picks.items():
            if case in done:  # fewer than three cases
                continue
            done.add(case)
            try:
                gallery.cases.append(_make_case(rank, case, dice, raw, chosen, maps.get(case), benchmark))
            except CMEMSError as error:
                gallery.missing.append(str(error))
    return gallery


def rank_cases(benchmark: Benchmark, run: Run) -> list[tuple[str, float]]:
    """The run's cases with their Dice, mean over the classes; the worst first."""
    dice = mean_per_case(cases_of(benchmark, run))
    return sorted(((str(case), float(value)) for case, value in dice.items()), key=lambda item: (item[1], item[0]))


def companion(runs: Sequence[Run], leader: Run) -> Run:
    """Of a method's runs the one with the leader's exemplar and seed; the first, where there is none."""
    wanted = (leader.record.spec.exemplar, leader.record.spec.seed)
    return next((run for run in runs if (run.record.spec.exemplar, run.record.spec.seed) == wanted), runs[0])


# ------------------------------------------------------------------ one case


def _make_case(
    rank: str, case: str, dice: float, raw: RawDataset, runs: Mapping[str, Run], heat: np.ndarray | None, benchmark: Benchmark
) -> Case:
    """Read a case's files and draw its slices, without the margins in which nothing is seen.

    Raises:
        CMEMSError: its scan or its truth cannot be read.
    """
    if case not in raw.labelled:
        raise CMEMSError(f"Case {case} is not shown: {raw.folder} has no scan with a mask of it.")
    reader = raw.reader()
    try:
        scan, properties = reader.read_images(raw.labelled[case].images)
        truth = reader.read_seg(_truth_file(raw, case))[0][0]
    except Exception as error:  # the readers raise nearly anything on damaged files
        raise CMEMSError(f"Case {case} is not shown: its scan or its mask in {raw.folder} cannot be read ({first_line(error)}).") from error
    scan = scan[0]
    masks: dict[str, np.ndarray | str] = {method: _prediction(run, case, raw, scan.shape) for method, run in runs.items()}
    arrays = [truth, *(mask for mask in masks.values() if isinstance(mask, np.ndarray))]
    shown = choose_slices(arrays)
    (low, high), _ = _grey_window(raw, scan)
    values = raw.values
    visible = (scan[shown] > low + 0.05 * (high - low)) | np.any([mask[shown] > 0 for mask in arrays], axis=0)
    part = _bounding_box(visible.any(axis=0))

    def draw(mask: np.ndarray) -> list[str]:
        return [overlay(mask[z][part], values) for z in shown]

    layers = [Layer("scan", kind="scan"), Layer("truth", "", draw(truth))]
    main = benchmark.main
    for method in [main, *(method for method in masks if method != main)]:
        mask = masks[method]
        if isinstance(mask, str):
            layers.append(Layer(method, mask))
            continue
        own = dice_of(cases_of(benchmark, runs[method]), case=case)
        layers.append(Layer(method, f"Dice {100 * own.mean():.1f} %" if len(own) else "", draw(mask)))
    if heat is not None and heat.shape == scan.shape:
        layers.insert(3, Layer("disagreement", f"of {main}'s members", [heat_map(heat[z][part]) for z in shown], "heat"))
    sizes = [int((truth[z] > 0).sum()) for z in shown]
    height, width = (n * float(s) for n, s in zip(scan[0][part].shape, properties["spacing"][1:], strict=True))
    return Case(
        rank, case, dice, shown, int(np.argmax(sizes)), len(scan), width / height,
        [grey_picture(scan[z][part], low, high) for z in shown], layers, zoom_to(truth[(slice(None), *part)] > 0),
    )  # fmt: skip


def _truth_file(raw: RawDataset, case: str) -> str:
    """nnU-Net's copy of the mask, which it validates against; else the raw one."""
    copy = os.path.join(os.environ.get("nnUNet_preprocessed", ""), raw.name, "gt_segmentations", case + raw.file_ending)
    return copy if os.path.isfile(copy) else str(raw.labelled[case].label)


def _prediction(run: Run, case: str, raw: RawDataset, shape: Sequence[int]) -> np.ndarray | str:
    """A run's mask of a case, (Z, Y, X), or why there is none."""
    path = os.path.join(run.fold, "validation", case + raw.file_ending)
    if not os.path.isfile(path):
        return "no prediction"
    try:
        mask = np.asarray(raw.reader().read_seg(path)[0][0])
    except Exception:  # the readers raise nearly anything on damaged files
        return "the prediction cannot be read"
    return mask if mask.shape == tuple(shape) else "the prediction has another shape"


def zoom_to(organs: np.ndarray, margin: float = 0.3) -> tuple[float, float, float]:
    """How much a slice can be enlarged so that the organs of all slices are still seen, and about which point of it (x, y in percent).

    Args:
        organs: bool (Z, Y, X).
        margin: seen around them, in units of their size.
    """
    seen = organs.any(axis=0)
    if not seen.any():
        return 1.0, 50.0, 50.0
    shares, points = [], []
    for axis in (1, 0):  # x, y
        places = np.flatnonzero(np.any(seen, axis=1 - axis))
        size = seen.shape[axis]
        low, high = places[0] / size, (places[-1] + 1) / size
        shares.append(min(1.0, (high - low) * (1 + 2 * margin)))
        points.append((low + high) / 2)
    zoom = 1 / max(shares)
    if zoom <= 1:
        return 1.0, 50.0, 50.0
    # CSS keeps the named point in its place; the one that moves the organs' middle into the middle, within the slice.
    x, y = (float(np.clip((p - 0.5 / zoom) / (1 - 1 / zoom), 0, 1)) for p in points)
    return float(zoom), 100 * x, 100 * y


def choose_slices(masks: Sequence[np.ndarray], most: int = MOST_SLICES) -> list[int]:
    """All slices of a volume; where there are too many, evenly spread ones from the first to the last that show anything."""
    total = len(masks[0])
    if total <= most:
        return list(range(total))
    occupied = np.flatnonzero(np.any([(mask > 0).any(axis=(1, 2)) for mask in masks], axis=0))
    first, last = (int(occupied[0]), int(occupied[-1])) if len(occupied) else (0, total - 1)
    room = max(0, most - (last - first + 1))
    first, last = max(0, first - (room + 1) // 2), min(total - 1, last + room // 2)
    return sorted({round(z) for z in np.linspace(first, last, min(most, last - first + 1))})


def _grey_window(raw: RawDataset, scan: np.ndarray | None) -> tuple[tuple[float, float], str]:
    """The grey values that become black and white, and how they were chosen."""
    channels = raw.dataset_json.get("channel_names", raw.dataset_json.get("modality", {}))
    if str(channels.get("0", "")).upper() == "CT":
        low, high = _CT_WINDOW
        return _CT_WINDOW, f"the first channel, from {low:g} to {high:g} HU".replace("-", "−")
    note = "the first channel, from the 1st to the 99.5th percentile of the volume"
    if scan is None:
        return (0.0, 1.0), note
    finite = scan[np.isfinite(scan)]
    low, high = (float(v) for v in np.percentile(finite, (1, 99.5))) if finite.size else (0.0, 1.0)
    return (low, high if high > low else low + 1), note


# ------------------------------------------------------------------ pictures


def grey_picture(plane: np.ndarray, low: float, high: float) -> str:
    """A slice (Y, X) as a data URI; no larger than a page shows it."""
    grey = np.nan_to_num((plane.astype(np.float32) - low) / (high - low)).clip(0, 1)
    image = Image.fromarray((255 * grey).astype(np.uint8))
    factor = min(1.0, _SIDE / max(image.size))
    if factor < 1:
        image = image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))), Image.Resampling.LANCZOS)
    return _uri(image, "WEBP", quality=78)


def overlay(mask: np.ndarray, values: LabelValues) -> str:
    """A mask (Y, X) as a transparent data URI: each class in its colour with its own texture, outlined."""
    names = {value: name for value, name in values.names.items() if value > 0}
    present = [int(value) for value in np.unique(mask) if value > 0]
    colours = class_colours({**dict.fromkeys(present, ""), **names})
    factor, step = max(1, _OVERLAY // max(mask.shape)), -(-max(mask.shape) // _OVERLAY)
    large = np.repeat(np.repeat(mask[::step, ::step], factor, 0), factor, 1)
    indices = np.zeros(large.shape, np.uint8)
    palette, alphas = [(0.0, 0.0, 0.0)], [0]
    for value in present:
        inside = large == value
        indices[inside] = _textured(inside, list(colours).index(value))[inside] + len(alphas)
        palette += [to_rgb(colours[value])] * 3
        alphas += [_FILL, _STRIPE, _EDGE]
    return _transparent(indices, palette, alphas)


def _textured(inside: np.ndarray, number: int) -> np.ndarray:
    """0 in a mask's area, 1 on its texture, 2 on its outline, (Y, X); the texture depends on the class's number."""
    y, x = np.ogrid[: inside.shape[0], : inside.shape[1]]
    kind = np.where(_TEXTURES[number % len(_TEXTURES)](y, x), 1, 0).astype(np.uint8) * inside
    part = ndimage.find_objects(inside.astype(np.uint8))[0]
    kind[part][inside[part] & ~ndimage.binary_erosion(np.pad(inside[part], 1), iterations=2)[1:-1, 1:-1]] = 2
    return kind


def legend(names: Mapping[int, str]) -> dict[str, str]:
    """Class name -> a data URI of its colour and texture on grey; ``names`` are those of the foreground values."""
    colours = class_colours(names)
    found = {}
    for number, (value, colour) in enumerate(colours.items()):
        kind = _textured(np.ones((28, 44), bool), number)
        alpha = (np.array([_FILL, _STRIPE, _EDGE]) / 255)[kind][..., None]
        piece = alpha * 255 * np.array(to_rgb(colour)) + (1 - alpha) * 90
        found[names[value]] = _uri(Image.fromarray(piece.astype(np.uint8)), "PNG", optimize=True)
    return found


def heat_map(plane: np.ndarray) -> str:
    """A disagreement (Y, X), 0 to 1, as a transparent data URI: the more disagreement, the less is seen of the scan."""
    step = max(1, -(-max(plane.shape) // _SIDE))
    indices = np.round(plane[::step, ::step].clip(0, 1) * (_HEAT_LEVELS - 1)).astype(np.uint8)
    levels = np.arange(_HEAT_LEVELS) / (_HEAT_LEVELS - 1)
    alphas = (255 * np.clip(levels * 4, 0, 0.85)).astype(int).tolist()
    return _transparent(indices, colormaps[_HEAT](levels)[:, :3].tolist(), alphas)


def heat_gradient() -> str:
    """The disagreement's colours from 0 to 1, for CSS."""
    stops = [", ".join(str(round(255 * c)) for c in colormaps[_HEAT](v)[:3]) for v in np.linspace(0, 1, 9)]
    return f"linear-gradient(to right, {', '.join(f'rgb({stop})' for stop in stops)})"


def picture_file(path: str, width: int = 1400) -> str:
    """A picture's file as a data URI, no wider than ``width``.

    Raises:
        CMEMSError: it cannot be read.
    """
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except Exception as error:  # damaged pictures raise nearly anything
        raise CMEMSError(f"{path} cannot be read ({first_line(error)}).") from error
    if image.width > width:
        image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
    return _uri(image, "WEBP", quality=82)


def _transparent(indices: np.ndarray, palette: Sequence[Sequence[float]], alphas: Sequence[int]) -> str:
    """A data URI of (Y, X) indices into colours (0 to 1) and opacities (0 to 255)."""
    image = Image.frombytes("P", (indices.shape[1], indices.shape[0]), np.ascontiguousarray(indices).tobytes())
    image.putpalette(np.round(255 * np.asarray(palette)).astype(np.uint8).tobytes())
    return _uri(image, "PNG", transparency=bytes(alphas), optimize=True)


def _uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ------------------------------------------------------------------ disagreement


def _disagreements(run: Run, cases: Sequence[str], gallery: Gallery) -> dict[str, np.ndarray]:
    """The members' disagreement in the raw scans' space; {} where there are not several members, or no checkpoint."""
    checkpoint = os.path.join(run.fold, "checkpoint_final.pth")
    if not os.path.isfile(checkpoint):
        gallery.missing.append(f"The members' disagreement is not shown: run {run.key} has no {os.path.basename(checkpoint)}.")
        return {}
    stamp = np.array([os.stat(checkpoint).st_size, os.stat(checkpoint).st_mtime_ns])
    found = {case: cached for case in cases if (cached := _read_cache(run, case, stamp)) is not None}
    missing = [case for case in cases if case not in found]
    if missing:
        try:
            computed = disagreement(run, missing)
        except CMEMSError as error:
            gallery.missing.append(f"The members' disagreement is not shown: {error}")
            return {}
        for case, values in computed.items():
            found[case] = values
            _write_cache(run, case, stamp, values)
    return {case: values.astype(np.float32) / 255 for case, values in found.items() if values.size}


def _cache_path(run: Run, case: str) -> str:
    return os.path.join(run.folder, CACHE, f"{case}.npz")


def _read_cache(run: Run, case: str, stamp: np.ndarray) -> np.ndarray | None:
    """What was computed before from the same checkpoint."""
    try:
        with np.load(_cache_path(run, case)) as content:
            return np.asarray(content["disagreement"]) if np.array_equal(content["checkpoint"], stamp) else None
    except Exception:  # absent or damaged: it is computed again
        return None


def _write_cache(run: Run, case: str, stamp: np.ndarray, values: np.ndarray) -> None:
    path = _cache_path(run, case)
    temporary = f"{path}.tmp.npz"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        np.savez_compressed(temporary, disagreement=values, checkpoint=stamp)
        os.replace(temporary, path)
    except OSError as error:
        print(f"{path} cannot be written ({error.strerror}); the next report computes it again.")
        with contextlib.suppress(OSError):
            os.remove(temporary)


def disagreement(run: Run, cases: Sequence[str]) -> dict[str, np.ndarray]:
    """How far the members are from their mean, in the raw scans' space, predicted anew from the final checkpoint.

    Args:
        run: a finished run.
        cases: validation cases that are preprocessed.

    Returns:
        Case -> uint8 (Z, Y, X), 255 for full disagreement; empty arrays where the run has one network.

    Raises:
        CMEMSError: the checkpoint or a preprocessed case cannot be read.
    """
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    from nnunetv2_cmems.data.exemplar import PreprocessedDataset, read_properties
    from nnunetv2_cmems.files import nnunet_folder
    from nnunetv2_cmems.method.networks import MutualNetworks
    from nnunetv2_cmems.trainers.first_look import look_at
    from nnunetv2_cmems.trainers.heads import label_space
    from nnunetv2_cmems.trainers.prediction import predict_with_one_network

    spec = run.record.spec
    preprocessed = nnunet_folder("nnUNet_preprocessed", "the preprocessed data sets")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # nnU-Net tells how it looks for the trainer
            predictor = nnUNetPredictor(device=device, perform_everything_on_device=device.type == "cuda", allow_tqdm=False)
            predictor.initialize_from_trained_model_folder(os.path.dirname(run.fold), (spec.fold,), "checkpoint_final.pth")
    except Exception as error:  # unpickling a damaged file raises nearly anything
        raise CMEMSError(f"{run.fold}/checkpoint_final.pth cannot be read ({first_line(error)}).") from error
    network = predictor.network
    if not isinstance(network, MutualNetworks) or len(network.members) < 2:
        return {case: np.empty(0, np.uint8) for case in cases}
    configuration, plans = predictor.configuration_manager, predictor.plans_manager
    folder = os.path.join(preprocessed, spec.dataset, configuration.data_identifier)
    if not os.path.isdir(folder):
        raise CMEMSError(f"{folder} does not exist.")
    network.to(device).eval()
    dataset = PreprocessedDataset.from_plans(
        folder, infer_dataset_class(folder), plans, predictor.dataset_json, len(configuration.patch_size)
    )
    space = label_space(predictor.label_manager)
    print(f"Predicting {', '.join(cases)} with each network of {run.key}, for the gallery.")
    with contextlib.redirect_stderr(io.StringIO()):
        looks = look_at(dict.fromkeys(cases, dataset), network, predictor, predict_with_one_network, space, predictor.label_manager)
    backward = list(plans.transpose_backward)
    return {case: to_raw(look.disagreement, read_properties(case, dataset), backward) for case, look in looks.items()}


def to_raw(values: np.ndarray, properties: Mapping[str, Any], transpose_backward: Sequence[int]) -> np.ndarray:
    """A preprocessed map in the raw scan's space, 0 where the scan was cropped away.

    Shape:
        (Z, Y, X) of 0 to 1, to uint8 (Z, Y, X) of 0 to 255, by nnU-Net's properties of the case.
    """
    size = [int(n) for n in properties["shape_after_cropping_and_before_resampling"]]
    factors = [n / m for n, m in zip(size, values.shape, strict=True)]
    zoomed = ndimage.zoom(values.astype(np.float32), factors, order=1, grid_mode=True, mode="nearest")
    whole = np.zeros([int(n) for n in properties["shape_before_cropping"]], np.uint8)
    place = tuple(slice(int(low), int(low) + n) for (low, _), n in zip(properties["bbox_used_for_cropping"], zoomed.shape, strict=True))
    whole[place] = np.round(255 * zoomed.clip(0, 1)).astype(np.uint8)
    return whole.transpose(list(transpose_backward))
