"""The contact sheet shows every scan with its mask and its doubts, at A4 width, in a small file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from nnunetv2_cmems.study.pictures import contact_sheet, plot_suggestion

NAMES = {0: "background", 1: "ring", 2: "disc"}
Row = tuple[str, int | None, float, np.ndarray, np.ndarray, np.ndarray]


def row(case: str = "case", index: int | None = 3, agreement: float = 0.87, shape: tuple[int, int] = (60, 50), margin: int = 0) -> Row:
    y, x = np.mgrid[: shape[0], : shape[1]]
    distance = np.hypot(y - shape[0] / 2, x - shape[1] / 2)
    mask = np.where(distance < 6, 2, np.where(distance < 11, 1, 0))
    image = 5 + mask + 0.2 * np.cos(x)
    heat = np.exp(-((distance - 11) ** 2) / 4)
    arrays = [np.pad(array, margin) for array in (image, mask, heat)]
    return case, index, agreement, arrays[0], arrays[1], arrays[2]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_rows_say_what_they_show(tmp_path: Path, figures: list[Figure]) -> None:
    long = "a_hospital_with_a_long_name_0001"
    contact_sheet(tmp_path / "sub" / "a.png", [row(), row(long, None, float("nan")), row("third", 0, 1.0)], NAMES, title="Epoch 10")
    figure = figures[0]
    assert texts(figure)[0] == "case\nslice 3\nagreement 0.87"
    assert texts(figure)[1].replace("\n", "") == long
    assert texts(figure)[2] == "third\nslice 0\nagreement 1.00"
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == ["scan", "mask", "where the members disagree"]
    assert figure.get_suptitle() == "Epoch 10"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ring", "disc"]
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["a.png"]


def test_one_member_has_no_agreement(tmp_path: Path, figures: list[Figure]) -> None:
    contact_sheet(tmp_path / "a.png", [row(agreement=float("nan"))], NAMES)
    assert [axes.get_title() for axes in figures[0].axes if axes.get_title()][-1] == "where it is unsure"
    assert texts(figures[0])[0] == "case\nslice 3"


@pytest.mark.parametrize("number", [1, 3, 8, 16])
def test_as_wide_as_a_page_and_small(tmp_path: Path, figures: list[Figure], number: int) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(number):
        case, index, agreement, image, mask, heat = row(f"case{i}", shape=(256, 224))
        rows.append((case, index, agreement, image + rng.normal(0, 1, image.shape), mask, heat))
    contact_sheet(tmp_path / "a.png", rows, NAMES)
    assert figures[0].get_size_inches()[0] == pytest.approx(8.27)
    assert imread(tmp_path / "a.png").shape[1] > 600
    assert (tmp_path / "a.png").stat().st_size < 1_500_000


def test_disagreement_is_seen_where_it_is(tmp_path: Path, figures: list[Figure]) -> None:
    image, mask = np.zeros((40, 40)), np.zeros((40, 40), int)
    image[::2] = 1
    heat = np.zeros((40, 40))
    heat[5, 30] = 0.7
    contact_sheet(tmp_path / "a.png", [("a", 0, 0.5, image, mask, heat)], NAMES)
    overlay = next(axes for axes in figures[0].axes if axes.get_title().startswith("where")).images[-1]
    drawn, alpha = np.asarray(overlay.get_array()), np.asarray(overlay.get_alpha())
    assert np.argwhere(alpha > 0).tolist() == np.argwhere(drawn > 0).tolist() and (alpha > 0).sum() == 1
    assert overlay.get_clim() == (0, 1) and drawn.max() == pytest.approx(0.7)


def test_margins_are_cut_off_but_no_mask_is(tmp_path: Path, figures: list[Figure]) -> None:
    case, index, agreement, image, mask, heat = row(margin=100)
    contact_sheet(tmp_path / "a.png", [(case, index, agreement, image, mask, heat)], NAMES)
    shown = np.asarray(figures[0].axes[1].images[0].get_array())
    assert shown.shape[0] < 80 and shown.shape[1] < 70
    mask[2, 3] = 1  # the members see something in the corner
    contact_sheet(tmp_path / "a.png", [(case, index, agreement, image, mask, heat)], NAMES)
    assert np.asarray(figures[1].axes[1].images[0].get_array()).shape[0] > 140


def test_flat_empty_and_odd_input(tmp_path: Path, figures: list[Figure]) -> None:
    flat = np.zeros((30, 30))
    heat = np.full((30, 30), np.nan)
    heat[3, 3] = 7.0
    mask = np.zeros((30, 30), int)
    mask[4:8, 4:8] = 9
    contact_sheet(tmp_path / "a.png", [("flat", 1, 0.0, flat, flat.astype(int), flat), ("odd", 1, 0.0, flat + np.nan, mask, heat)], NAMES)
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["ring", "disc", "other label"]


def test_errors_name_the_case(tmp_path: Path) -> None:
    case, index, agreement, image, mask, heat = row("patient7")
    with pytest.raises(ValueError, match="no row"):
        contact_sheet(tmp_path / "a.png", [], NAMES)
    with pytest.raises(ValueError, match="disagreement of case 'patient7'"):
        contact_sheet(tmp_path / "a.png", [(case, index, agreement, image, mask, heat[1:])], NAMES)
    with pytest.raises(ValueError, match="patient7"):
        contact_sheet(tmp_path / "a.png", [(case, index, agreement, image, mask[1:], heat)], NAMES)
    assert not list(tmp_path.iterdir())


def test_suggestion_shows_the_slice_in_its_scan(tmp_path: Path, figures: list[Figure]) -> None:
    volume = np.random.default_rng(0).normal(size=(6, 30, 40))
    plot_suggestion(
        tmp_path / "a.png",
        volume[2],
        {"slice 1": volume[1], "slice 3": volume[3]},
        aspect=1.5,
        side=(volume[:, 15], 4.0, "row", 2),
        title="Suggestion 1: a\nslice 2",
    )
    large, before, after, side = figures[0].axes
    assert np.array_equal(large.images[0].get_array(), volume[2].astype(np.float32)) and large.get_aspect() == 1.5
    assert (before.get_title(), after.get_title()) == ("slice 1", "slice 3")
    assert large.images[0].get_clim() == before.images[0].get_clim() == after.images[0].get_clim()
    assert side.get_aspect() == 4.0 and list(side.lines[0].get_ydata()) == [2, 2]
    assert figures[0].get_suptitle().startswith("Suggestion 1: a")


def test_suggestion_of_a_single_image_or_an_end_slice(tmp_path: Path, figures: list[Figure]) -> None:
    image = np.random.default_rng(0).normal(size=(30, 40))
    plot_suggestion(tmp_path / "a.png", image, {}, title="Suggestion 1: a")
    plot_suggestion(tmp_path / "b.png", image, {"slice 1": image}, side=(image, 1.0, "column", 0))
    plot_suggestion(tmp_path / "c.png", image, {}, side=(image, 1.0, "column", 0))
    assert [len(figure.axes) for figure in figures] == [1, 3, 2]
    assert list(figures[1].axes[2].lines[0].get_xdata()) == [0, 0]
