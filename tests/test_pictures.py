"""Pictures are written whole, show what they are given, and survive histories and labels of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from nnunetv2_cmems.study.pictures import montage, plot_curves, plot_exemplar

NAMES = {0: "background", 1: "ring", 2: "disc"}


def image_and_label(height: int = 40, width: int = 30) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:height, :width]
    distance = np.hypot(y - height / 2, x - width / 2)
    label = np.where(distance < 5, 2, np.where(distance < 9, 1, 0))
    return (label + 0.1 * np.cos(x)).astype(np.float32), label


def history(epochs: int) -> dict[str, list[float]]:
    keys = ["loss/supervised", "loss/total", "coverage/member_0", "coverage/member_1", "coverage_foreground/member_0", "agreement/ring"]
    keys += ["agreement/mean", "pseudo_label_dice/mean", "pseudo_label_accuracy", "validation_dice/mean"]
    return {key: np.linspace(0.2, 0.9, epochs).tolist() for key in keys}


def headings(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


@pytest.mark.parametrize("epochs", [1, 2, 300])
def test_curves_draw_all_panels(tmp_path: Path, figures: list[Figure], epochs: int) -> None:
    plot_curves(history(epochs), tmp_path / "sub" / "cmems_progress.png", "title")
    assert imread(tmp_path / "sub" / "cmems_progress.png").ndim == 3
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["cmems_progress.png"]
    assert len(figures[0].axes) == 5
    assert figures[0].get_suptitle() == "title"
    legend = figures[0].axes[1].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["member 0", "member 1", "foreground, member 0"]


def test_panels_without_data_are_left_out(tmp_path: Path, figures: list[Figure]) -> None:
    values = {"loss/total": [1.0, 0.5], "agreement/mean": [float("nan"), float("inf")], "pseudo_label_accuracy": [], "lr": [0.1, 0.1]}
    plot_curves(values, tmp_path / "a.png")
    assert headings(figures[0]) == ["Loss terms"]


@pytest.mark.parametrize("values", [{}, {"loss/total": []}, {"loss/total": [float("nan")]}])
def test_empty_history_is_a_picture(tmp_path: Path, values: dict[str, list[float]]) -> None:
    plot_curves(values, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0


def test_lonely_points_are_marked(tmp_path: Path, figures: list[Figure]) -> None:
    values: list[Any] = [None] * 100
    values[0] = values[50] = values[80] = values[81] = 0.5
    plot_curves({"agreement/mean": values}, tmp_path / "a.png")
    marked = next(line for line in figures[0].axes[0].lines if line.get_marker() == "o")
    assert np.asarray(marked.get_xdata()).tolist() == [0, 50]


def test_a_class_has_one_colour_in_all_panels(tmp_path: Path, figures: list[Figure]) -> None:
    keys = ["agreement/disc", "agreement/ring", "agreement/mean", "pseudo_label_dice/ring"]
    plot_curves({key: [0.1] * 40 for key in keys}, tmp_path / "a.png")
    colour = {(i, line.get_label()): line.get_color() for i, axes in enumerate(figures[0].axes) for line in axes.lines}
    assert colour[0, "ring"] == colour[1, "ring"] != colour[0, "disc"]
    assert colour[0, "mean"] == "black"


def test_exemplar_panels_and_legend(tmp_path: Path, figures: list[Figure]) -> None:
    image, label = image_and_label()
    mask = np.zeros(label.shape, dtype=bool)
    mask[10:30, 5:25] = True
    views = dict.fromkeys(("unlabelled", "weak 1", "weak 2", "strong 1", "strong 2"), image)
    plot_exemplar(tmp_path / "exemplar.png", image, label, [(image, label, mask), (image, label, np.ones_like(mask))], views, NAMES)
    assert headings(figures[0]) == ["exemplar", "synthetic 1", "synthetic 2", *views]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["ring", "disc", "left out of the loss"]


def test_pixels_outside_the_mask_are_darker(tmp_path: Path, figures: list[Figure]) -> None:
    image, label = np.ones((40, 40), np.float32), np.zeros((40, 40), int)
    image[0, 0] = 0.0
    half = np.zeros(label.shape, dtype=bool)
    half[:, 20:] = True
    plot_exemplar(tmp_path / "a.png", image, label, [(image, label, half)], {}, NAMES)
    picture = imread(tmp_path / "a.png")[..., :3].mean(axis=2)
    box = figures[0].axes[1].get_window_extent()
    middle = picture[picture.shape[0] - int((box.y0 + box.y1) / 2) + np.arange(-15, 16)]
    start, centre, end = (int(x) for x in (box.x0, (box.x0 + box.x1) / 2, box.x1))
    left, right = middle[:, start + 10 : centre - 10], middle[:, centre + 10 : end - 10]
    assert left.mean() < 0.7 < 0.95 < right.mean()


def test_strange_labels_masks_and_images(tmp_path: Path, figures: list[Figure]) -> None:
    """A single voxel, a full label, an unknown and a negative value, an ignore class, a constant and a NaN image."""
    image, label = image_and_label()
    label = label.copy()
    label[0, 0], label[1, 1], label[2, 2] = 9, -1, 3
    rows: list[dict[str, tuple[np.ndarray, np.ndarray | None]]] = [
        {"a": (image, label), "b": (np.zeros_like(image), np.ones_like(label))},
        {"a": (np.full_like(image, np.nan), None), "b": (image[:, :5], label[:, :5])},
    ]
    montage(tmp_path / "m.png", rows, {1: "ring", 2: "disc", 3: "ignore"}, row_titles=["first", "second"], title="all")
    assert headings(figures[0]) == ["a", "b", "", ""]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["ring", "disc", "ignore", "other label"]


def test_rows_with_other_panels_keep_their_titles(tmp_path: Path, figures: list[Figure]) -> None:
    image, label = image_and_label()
    montage(tmp_path / "m.png", [{"a": (image, None)}, {"b": (image, label), "c": (image, label)}], NAMES)
    assert headings(figures[0]) == ["a", "b", "c"]


def test_titles_and_legend_do_not_overlap_the_images(tmp_path: Path, figures: list[Figure]) -> None:
    image, label = image_and_label(30, 60)
    row = {f"method {i}": (image, label) for i in range(3)}
    montage(tmp_path / "m.png", [row, row], {i: f"structure {i}" for i in range(14)}, title="title")
    legend = figures[0].legends[0].get_window_extent()
    assert legend.y1 <= min(axes.get_window_extent().y0 for axes in figures[0].axes)
    assert 0 <= legend.x0 and legend.x1 <= figures[0].bbox.width
    boxes = [axes.get_tightbbox() for axes in figures[0].axes]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i] if a is not None and b is not None)


def test_refuses_what_does_not_fit(tmp_path: Path) -> None:
    image, label = image_and_label()
    with pytest.raises(ValueError, match="no panel"):
        montage(tmp_path / "m.png", [], NAMES)
    with pytest.raises(ValueError, match=r"must be \(Y, X\)"):
        montage(tmp_path / "m.png", [{"a": (image[None], None)}], NAMES)
    with pytest.raises(ValueError, match="the label of panel 'a'"):
        montage(tmp_path / "m.png", [{"a": (image, label[1:])}], NAMES)
    with pytest.raises(ValueError, match="the mask of panel 'synthetic 1'"):
        plot_exemplar(tmp_path / "m.png", image, label, [(image, label, label[1:] > 0)], {}, NAMES)
    assert not list(tmp_path.iterdir())


def test_inputs_stay_as_they_are(tmp_path: Path) -> None:
    image, label = image_and_label()
    before = image.copy(), label.copy()
    plot_exemplar(tmp_path / "a.png", image, label, [(image, label, label > 0)], {"unlabelled": image}, NAMES)
    assert np.array_equal(before[0], image) and np.array_equal(before[1], label)


def test_failed_write_keeps_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fail(self: Figure, file: str, **_: Any) -> None:
        Path(file).write_bytes(b"half a pic")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError):
        plot_curves({"loss/total": [1.0]}, path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
