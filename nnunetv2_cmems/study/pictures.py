"""Pictures: the course of a training, what it feeds its networks, and segmentations side by side.

Every picture is drawn off screen, without pyplot's global state, so that a training process and its
workers may draw at any time. It is written to a temporary file beside the target and then renamed:
a killed run leaves the old picture or the new one, never half of one.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Union

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

PathLike = Union[str, "os.PathLike[str]"]

# Okabe and Ito's colours, then those of Tol's "muted" scheme that differ from them: both are made to
# be told apart by colour-blind readers. On grey images the bright ones come first.
_COLOURS = (
    "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2",
    "#882255", "#44AA99", "#999933", "#332288", "#AA4499", "#DDCC77", "#117733", "#CC6677", "#88CCEE",
)  # fmt: skip
# Yellow and pale blue, good on a grey image, are lost on white paper.
_LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933", "#332288", "#44AA99")
_GREY = "#8C8C8C"
_IGNORE_NAME = "ignore"
_DPI = 130
_SHORT = 30  # epochs up to which every value is marked


def plot_curves(history: Mapping[str, Sequence[float]], path: PathLike, title: str = "") -> None:
    """Draw how a training went, one panel for each kind of number that ``history`` holds.

    The panels, and the keys that they show (a panel without a finite number is left out):

    * loss terms: ``loss/<term>``;
    * share of the unlabelled pixels whose confidence exceeds tau: ``coverage/<member or class>``, and
      among those predicted as foreground ``coverage_foreground/<member or class>``;
    * agreement of the members on unlabelled images, as Dice: ``agreement/<class>``, ``agreement/mean``;
    * pseudo-labels against the hidden labels: ``pseudo_label_dice/<class>``,
      ``pseudo_label_dice/mean``, ``pseudo_label_accuracy``;
    * nnU-Net's online validation, as Dice: ``validation_dice/<class>``, ``validation_dice/mean``.

    Args:
        history: one value an epoch for each key, beginning at epoch 0. Lengths may differ; ``None``, NaN
            and infinity are gaps. Other keys are not drawn.
        path: the PNG file; missing folders are made.
        title: heading of the whole picture.

    Raises:
        OSError: the file cannot be written.
    """
    curves = {key: _finite_or_nan(values) for key, values in history.items()}
    curves = {key: values for key, values in curves.items() if np.isfinite(values).any()}
    panels: list[tuple[str, str, list[tuple[str, str, str]]]] = []  # heading, y label, [(key, name, style)]
    for heading, label, sources in (
        ("Loss terms", "loss", [("loss", "", "-")]),
        ("Unlabelled pixels above tau", "share", [("coverage", "", "-"), ("coverage_foreground", "foreground, ", "--")]),
        ("Agreement of the members, unlabelled images", "Dice", [("agreement", "", "-")]),
        ("Pseudo-labels against hidden labels", "Dice, accuracy", [("pseudo_label_dice", "", "-"), ("pseudo_label_accuracy", "", "--")]),
        ("Online validation (nnU-Net's pseudo Dice)", "Dice", [("validation_dice", "", "-")]),
    ):
        lines = []
        for prefix, lead, style in sources:
            if prefix in curves:
                lines.append((prefix, "pixel accuracy" if prefix == "pseudo_label_accuracy" else f"{lead}all", style))
            own = [key for key in curves if key.startswith(f"{prefix}/")]
            own.sort(key=lambda key: key.rsplit("/", 1)[1] in ("mean", "total"))  # stable: drawn last, on top
            lines += [(key, lead + key[len(prefix) + 1 :].replace("_", " "), style) for key in own]
        if lines:
            panels.append((heading, label, lines))

    num_columns = max(1, min(len(panels), 2 if len(panels) == 4 else 3))
    num_rows = max(1, -(-len(panels) // num_columns))
    most_lines = max((len(lines) for _, _, lines in panels), default=0)
    height = 3.4 + 0.2 * max(0, -(-most_lines // 3) - 1)
    figure = _figure(max(4.9 * num_columns, 5.5), height * num_rows + 0.4, title)
    if not panels:
        figure.text(0.5, 0.5, "nothing to draw yet", ha="center", va="center", color=_GREY)
    colours = _line_colours([key for _, _, lines in panels for key, _, _ in lines])
    num_epochs = max((len(curves[key]) for _, _, lines in panels for key, _, _ in lines), default=1)
    for index, (heading, label, lines) in enumerate(panels):
        axes = figure.add_subplot(num_rows, num_columns, index + 1)
        axes.set_title(heading, fontsize=10)
        axes.set_xlabel("epoch", fontsize=9)
        axes.set_ylabel(label, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        for key, name, style in lines:
            last = key.rsplit("/", 1)[-1]
            main = last in ("mean", "total") or key == "pseudo_label_accuracy"
            _draw_curve(axes, curves[key], name, style, "black" if main else colours[last], 1.8 if main else 1.2)
        if label != "loss":
            axes.set_ylim(-0.03, 1.03)
        margin = max(0.5, 0.02 * num_epochs) if num_epochs > 1 else 0.5
        axes.set_xlim(-margin, num_epochs - 1 + margin)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=min(3, len(lines)), fontsize=8, frameon=False, columnspacing=1.2,
            handlelength=2.2,
        )  # fmt: skip
    _save(figure, path)


def plot_exemplar(
    path: PathLike,
    exemplar_image: np.ndarray,
    exemplar_label: np.ndarray,
    synthetic: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    views: Mapping[str, np.ndarray],
    class_names: Mapping[int, str],
) -> None:
    """Draw what the networks learn from: the exemplar, synthetic pairs, and an unlabelled image's views.

    The first row shows the exemplar and the synthetic pairs, each windowed on its own (1st to 99th
    percentile). The second row shows the views under one common window, so that changes of brightness
    and contrast can be seen. Pixels that are outside a synthetic pair's loss mask are dimmed and hatched.

    Args:
        path: the PNG file; missing folders are made.
        exemplar_image: the exemplar's first channel, shape (Y, X).
        exemplar_label: its label values, integers, shape (Y, X). 0 and values below are not drawn.
        synthetic: triples of image, label and loss mask (bool, True: in the loss), each of shape (Y, X).
        views: panel title -> image of shape (Y, X): the unlabelled image, its weak and its strong views.
        class_names: label value -> name of the class, for the legend. An entry for 0 is not drawn; a
            class named ``ignore`` is grey.

    Raises:
        OSError: the file cannot be written.
        ValueError: an array is not two-dimensional, or a label's or mask's shape is not its image's.
    """
    rows: list[list[_Panel]] = [[_Panel("exemplar", exemplar_image, exemplar_label, np.asarray(exemplar_label) >= 0)]]
    for index, (image, label, mask) in enumerate(synthetic):
        rows[0].append(_Panel(f"synthetic {index + 1}", image, label, mask))
    if views:
        window = _window(*views.values())
        rows.append([_Panel(title, image, window=window) for title, image in views.items()])
    _draw_panels(path, rows, class_names, hatched_name="left out of the loss")


def montage(
    path: PathLike,
    rows: Sequence[Mapping[str, tuple[np.ndarray, np.ndarray | None]]],
    class_names: Mapping[int, str],
    *,
    row_titles: Sequence[str] = (),
    title: str = "",
) -> None:
    """Draw rows of segmentations side by side, for instance image, truth and several predictions.

    Args:
        path: the PNG file; missing folders are made.
        rows: for each row, panel title -> (image of shape (Y, X), label of the same shape or ``None``).
            Titles stand above the first row only, when all rows have the same.
        class_names: label value -> name of the class (see :func:`plot_exemplar`).
        row_titles: a name for each row, written at its left.
        title: heading of the whole picture.

    Raises:
        OSError: the file cannot be written.
        ValueError: no panels at all, an array is not two-dimensional, or a label's shape is not its image's.
    """
    panels = [[_Panel(name, image, label) for name, (image, label) in row.items()] for row in rows]
    for later in panels[1:]:
        if [panel.title for panel in later] == [panel.title for panel in panels[0]]:
            for panel in later:
                panel.repeated = True
    if not all(panel.repeated for row in panels[1:] for panel in row):
        for panel in (panel for row in panels for panel in row):
            panel.repeated = False
    _draw_panels(path, panels, class_names, row_titles=row_titles, title=title)


class _Panel:
    """One image with its title, label, loss mask and grey window, all checked to fit together."""

    def __init__(
        self,
        title: str,
        image: np.ndarray,
        label: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        window: tuple[float, float] | None = None,
    ) -> None:
        self.title = title
        self.repeated = False
        self.image = np.asarray(image, dtype=np.float32)
        if self.image.ndim != 2 or self.image.size == 0:
            raise ValueError(f"the image of panel '{title}' has shape {self.image.shape}; it must be (Y, X).")
        self.label = None if label is None else np.asarray(label)
        self.mask = None if mask is None else np.asarray(mask, dtype=bool)
        for name, array in (("label", self.label), ("mask", self.mask)):
            if array is not None and array.shape != self.image.shape:
                raise ValueError(f"the {name} of panel '{title}' has shape {array.shape}, its image {self.image.shape}.")
        self.window = _window(self.image) if window is None else window

    @property
    def height(self) -> float:
        """Height of the panel in units of its width; very long images are drawn narrower than the panel."""
        return float(np.clip(self.image.shape[0] / self.image.shape[1], 0.35, 2.2))

    def draw(self, axes: Axes, colours: Mapping[int, str]) -> None:
        height, width = self.image.shape
        axes.imshow(self.image, cmap="gray", vmin=self.window[0], vmax=self.window[1])
        if self.mask is not None and not self.mask.all():
            veil = np.zeros((height, width, 4))
            veil[~self.mask] = (0.0, 0.0, 0.0, 0.5)
            axes.imshow(veil, interpolation="nearest")
            # Hatching as a contour fill follows the mask; a border of ones closes it at the image's edge.
            outside = np.pad(~self.mask, 1, mode="edge").astype(float)
            y, x = np.arange(-1, height + 1), np.arange(-1, width + 1)
            hatching = axes.contourf(x, y, outside, levels=[0.5, 2.0], colors="none", hatches=["///"])
            hatching.set_edgecolor("#9A9A9A")
            hatching.set_linewidth(0.0)
        if self.label is not None:
            for value in _values(self.label):
                inside = self.label == value
                colour = colours.get(value, _GREY)
                fill = np.zeros((height, width, 4))
                fill[inside] = to_rgba(colour, 0.28)
                axes.imshow(fill, interpolation="nearest")
                axes.add_collection(LineCollection(_outline(inside), colors=colour, linewidths=1.4, capstyle="projecting"))
        axes.set_xlim(-0.5, width - 0.5)
        axes.set_ylim(height - 0.5, -0.5)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
        if not self.repeated:
            axes.set_title(self.title, fontsize=9, wrap=True)


def _draw_panels(
    path: PathLike,
    rows: Sequence[Sequence[_Panel]],
    class_names: Mapping[int, str],
    *,
    row_titles: Sequence[str] = (),
    title: str = "",
    hatched_name: str = "",
) -> None:
    num_columns = max((len(row) for row in rows), default=0)
    if num_columns == 0:
        raise ValueError("there is no panel to draw.")
    colours = class_colours(class_names)
    panels = [panel for row in rows for panel in row]
    handles = [Patch(facecolor=to_rgba(colours[value], 0.45), edgecolor=colours[value], label=class_names[value]) for value in colours]
    if any(panel.label is not None and set(_values(panel.label)) - set(colours) for panel in panels):
        handles.append(Patch(facecolor=to_rgba(_GREY, 0.45), edgecolor=_GREY, label="other label"))
    if hatched_name and any(panel.mask is not None and not panel.mask.all() for panel in panels):
        handles.append(Patch(facecolor="#595959", edgecolor="white", hatch="////", linewidth=0.0, label=hatched_name))

    panel_width = 2.3
    heights = [panel_width * max((panel.height for panel in row), default=0.1) for row in rows]
    legend_columns = max(1, min(len(handles), int(num_columns * panel_width / 1.25)))
    legend_rows = -(-len(handles) // legend_columns)
    figure = _figure(panel_width * num_columns + 0.3, sum(heights) + 0.3 * len(rows) + 0.22 * legend_rows + 0.25, title)
    grid = figure.add_gridspec(len(rows), num_columns, height_ratios=heights)
    for r, row in enumerate(rows):
        for c, panel in enumerate(row):
            axes = figure.add_subplot(grid[r, c])
            panel.draw(axes, colours)
            if c == 0 and r < len(row_titles):
                axes.set_ylabel(row_titles[r], fontsize=9)
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=legend_columns, fontsize=9, frameon=False, columnspacing=1.4)
    _save(figure, path)


def _figure(width: float, height: float, title: str) -> Figure:
    """An empty figure, in inches, that keeps titles and legends apart by itself."""
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _save(figure: Figure, path: PathLike) -> None:
    """Write a PNG to a temporary file in the target's folder, then rename it."""
    target = os.path.abspath(os.fspath(path))
    os.makedirs(os.path.dirname(target), exist_ok=True)
    temporary = f"{target}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, target)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _finite_or_nan(values: Sequence[Any]) -> np.ndarray:
    array = np.array([np.nan if value is None else float(value) for value in values], dtype=np.float64)
    array[~np.isfinite(array)] = np.nan
    return array


def _draw_curve(axes: Axes, values: np.ndarray, name: str, style: str, colour: str, width: float) -> None:
    """A line over epochs; points that no line reaches, and all points of a short history, get a marker."""
    epochs = np.arange(len(values))
    axes.plot(epochs, values, style, color=colour, linewidth=width)
    finite = np.isfinite(values)
    if len(values) > _SHORT:
        padded = np.pad(finite, 1, constant_values=False)
        finite &= ~padded[:-2] & ~padded[2:]
    axes.plot(epochs[finite], values[finite], linestyle="none", marker="o", markersize=3.0 + 0.6 * width, color=colour)
    axes.plot([], [], style, marker="o" if len(values) <= _SHORT else "", markersize=3.0, color=colour, linewidth=width, label=name)


def _line_colours(keys: Sequence[str]) -> dict[str, str]:
    """A colour for each last part of a key, the same in every panel."""
    names = list(dict.fromkeys(key.rsplit("/", 1)[-1] for key in keys))
    names = [name for name in names if name not in ("mean", "total", "pseudo_label_accuracy")]
    loss_terms = [name for name in names if f"loss/{name}" in keys]
    rest = [name for name in names if name not in loss_terms]
    members = [name for name in rest if name.startswith("member")]
    classes = [name for name in rest if name not in members]
    return {name: _LINE_COLOURS[i % len(_LINE_COLOURS)] for group in (loss_terms, members, classes) for i, name in enumerate(group)}


def class_colours(class_names: Mapping[int, str]) -> dict[int, str]:
    """Label value -> colour, without the background. Depends on the value alone, hence equal in all pictures."""
    values = sorted(value for value in class_names if value > 0)
    return {value: _GREY if class_names[value] == _IGNORE_NAME else _COLOURS[(value - 1) % len(_COLOURS)] for value in values}


def _values(label: np.ndarray) -> list[int]:
    return [int(value) for value in np.unique(label) if value > 0]


def _window(*images: np.ndarray) -> tuple[float, float]:
    """1st and 99th percentile of the finite pixels of all images together."""
    values = np.concatenate([np.asarray(image, dtype=np.float32).ravel() for image in images])
    values = values[np.isfinite(values)]
    if values.size == 0:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(values, (1, 99)))
    if high <= low:  # nearly everything has one value, as in a black image with a bright spot
        low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 1.0, low + 1.0)


def _outline(inside: np.ndarray) -> list[list[tuple[float, float]]]:
    """The pixel edges, as pairs of (x, y) points, between a mask and its outside; exact for single pixels."""
    padded = np.pad(inside, 1, constant_values=False)
    horizontal = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])  # edge above row y
    vertical = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])  # edge left of column x
    segments = [[(x - 0.5, y - 0.5), (x + 0.5, y - 0.5)] for y, x in horizontal]
    segments += [[(x - 0.5, y - 0.5), (x - 0.5, y + 0.5)] for y, x in vertical]
    return segments


def plot_suggestion(
    path: PathLike,
    image: np.ndarray,
    neighbours: Mapping[str, np.ndarray],
    *,
    aspect: float = 1.0,
    side: tuple[np.ndarray, float, str, int] | None = None,
    title: str = "",
) -> None:
    """Draw a slice that is worth annotating, and where it lies in its scan.

    The slice is drawn large. Beside it stand its neighbours, under the same grey window, and below them a cut across the
    scan, with a line where the slice is.

    Args:
        path: the PNG file; missing folders are made.
        image: the slice, shape (Y, X).
        neighbours: panel title -> a neighbouring slice, shape (Y, X); at most two. Empty for an image that has none.
        aspect: height of the slices' pixels, in units of their width.
        side: the cut, shape (P, Q); its pixels' aspect; ``"row"`` or ``"column"``; the row or column that is the slice.
        title: heading of the whole picture; may have several lines.

    Raises:
        OSError: the file cannot be written.
        ValueError: an image is not two-dimensional.
    """
    beside = bool(neighbours) or side is not None
    ratio = float(np.clip(_Panel("slice", image).image.shape[0] * aspect / np.shape(image)[1], 0.35, 2.2))
    width = 4.6 / max(ratio, 0.75)
    figure = _figure(width * (1.9 if beside else 1.0) + 0.4, width * ratio + 0.3 + 0.25 * title.count("\n") + 0.35 * bool(title), title)
    grid = figure.add_gridspec(2, 3 if beside else 1, width_ratios=(2.2, 1, 1) if beside else (1,))
    window = _window(image, *neighbours.values())

    def draw(place: Any, panel: _Panel, pixel: float) -> Axes:
        axes = figure.add_subplot(place)
        panel.draw(axes, {})
        axes.set_aspect(pixel)
        return axes

    draw(grid[:, 0], _Panel("", image, window=window), aspect)
    for column, (name, neighbour) in enumerate(neighbours.items()):
        draw(grid[0, column + 1], _Panel(name, neighbour, window=window), aspect)
    if side is not None:
        cut, pixel, direction, index = side
        axes = draw(grid[1 if neighbours else slice(0, 2), 1:], _Panel("where it lies", cut), pixel)
        (axes.axhline if direction == "row" else axes.axvline)(index, color=_COLOURS[0], linewidth=1.4)
    _save(figure, path)


def contact_sheet(
    path: PathLike,
    rows: Sequence[tuple[str, int | None, float, np.ndarray, np.ndarray, np.ndarray]],
    class_names: Mapping[int, str],
    *,
    title: str = "",
) -> None:
    """Draw what the members make of scans that nobody has labelled, one scan a row, as wide as an A4 page.

    A row shows the scan's slice, the same with the mask of the members' mean, and where the members disagree (or, where no
    row has an agreement, where the only one is unsure). Colours of the disagreement mean the same in all rows. Margins that
    show nothing are cut off.

    Args:
        path: the PNG file; missing folders are made.
        rows: for each scan its case, the slice (``None``: an image that has no slices), the members' agreement (a Dice from
            0 to 1; NaN is not written), and, each of shape (Y, X): the image, the mask (integers; 0 is not drawn), and the
            disagreement (0 to 1).
        class_names: label value -> name of the class (see :func:`plot_exemplar`).
        title: heading of the whole picture.

    Raises:
        OSError: the file cannot be written.
        ValueError: there is no row, an array is not two-dimensional, or the arrays of a row differ in shape.
    """
    if not rows:
        raise ValueError("there is no row to draw.")
    scans = [_SheetRow(*row) for row in rows]
    figure = _sheet(scans, class_names, title, _SHEET_PIXELS)
    _save(figure, path)
    too_large = os.path.getsize(path) / _SHEET_BYTES
    if too_large > 1:  # noise compresses badly
        _save(_sheet(scans, class_names, title, figure.bbox.width * figure.bbox.height / too_large), path)


_A4_WIDTH = 8.27  # inches
_LEGEND_COLUMNS = 5
_HEAT = "inferno"
_SHEET_PIXELS = 1_400_000
_SHEET_BYTES = 1_300_000
_MOST_PIXELS = 320  # along a side, of what a contact sheet shows of a slice


class _SheetRow:
    """A scan of a contact sheet: its text, and its arrays, cut down to what shows something and no finer than can be seen."""

    def __init__(
        self, case: str, index: int | None, agreement: float, image: np.ndarray, mask: np.ndarray, disagreement: np.ndarray
    ) -> None:
        checked = _Panel(case, image, mask)
        heat = np.nan_to_num(np.asarray(disagreement, dtype=np.float32)).clip(0, 1)
        if heat.shape != checked.image.shape:
            raise ValueError(f"the disagreement of case '{case}' has shape {heat.shape}, its image {checked.image.shape}.")
        lines = [case[i : i + 22] for i in range(0, len(case), 22)]  # in full: cases often differ in their last characters alone
        lines += [f"slice {index}"] * (index is not None) + [f"agreement {agreement:.2f}"] * bool(np.isfinite(agreement))
        self.text = "\n".join(lines)
        self.has_agreement = bool(np.isfinite(agreement))
        low, high = checked.window
        self.mask = np.asarray(mask)
        part = _bounding_box((checked.image > low + 0.05 * (high - low)) | (self.mask > 0))
        step = max(1, -(-max(self.mask[part].shape) // _MOST_PIXELS))
        self.mask, self.image, self.disagreement = (array[part][::step, ::step] for array in (self.mask, checked.image, heat))


def _sheet(scans: Sequence[_SheetRow], class_names: Mapping[int, str], title: str, pixels: float) -> Figure:
    """A contact sheet of at most so many pixels."""
    colours = class_colours(class_names)
    handles = [Patch(facecolor=to_rgba(colours[v], 0.45), edgecolor=colours[v], label=class_names[v]) for v in colours]
    if {value for scan in scans for value in _values(scan.mask)} - set(colours):
        handles.append(Patch(facecolor=to_rgba(_GREY, 0.45), edgecolor=_GREY, label="other label"))
    doubt = "where the members disagree" if any(scan.has_agreement for scan in scans) else "where it is unsure"

    text_width, panel_width, tallest = 1.6, 2.05, float(np.clip(15 / len(scans), 1.5, 2.6))
    heights = [min(panel_width * _Panel("scan", scan.image).height, tallest) for scan in scans]
    columns = min(_LEGEND_COLUMNS, len(handles))
    height = sum(heights) + 0.06 * len(heights) + 0.5 + 0.22 * -(-len(handles) // _LEGEND_COLUMNS) + 0.3 * bool(title)
    dpi = min(_DPI, (pixels / (_A4_WIDTH * height)) ** 0.5)
    figure = Figure(figsize=(_A4_WIDTH, height), dpi=dpi, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    grid = figure.add_gridspec(len(scans), 5, height_ratios=heights, width_ratios=(text_width, *[panel_width] * 3, 0.12))
    for r, scan in enumerate(scans):
        text = figure.add_subplot(grid[r, 0])
        text.axis("off")
        text.text(0.0, 0.5, scan.text, ha="left", va="center", fontsize=8.5, linespacing=1.5, transform=text.transAxes)
        for c, (heading, mask) in enumerate((("scan", None), ("mask", scan.mask), (doubt, None))):
            panel = _Panel(heading, scan.image, mask)
            panel.repeated = r > 0
            axes = figure.add_subplot(grid[r, c + 1])
            panel.draw(axes, colours)
        # See-through where the members agree, so that the scan tells the place.
        axes.imshow(scan.disagreement, cmap=_HEAT, vmin=0, vmax=1, alpha=np.clip(scan.disagreement * 4, 0, 0.85))
    scale = figure.colorbar(ScalarMappable(Normalize(0, 1), _HEAT), cax=figure.add_subplot(grid[0, 4]), ticks=[0, 0.5, 1])
    scale.ax.tick_params(labelsize=8)
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9, frameon=False, columnspacing=1.4)
    return figure


def _bounding_box(inside: np.ndarray, margin: float = 0.04) -> tuple[slice, slice]:
    """The smallest rectangle around a mask, with a margin in units of its longer side; everything, if the mask is empty."""
    if not inside.any():
        return slice(None), slice(None)
    ends = [np.flatnonzero(inside.any(axis=1 - axis))[[0, -1]] for axis in (0, 1)]
    room = round(margin * max(last - first + 1 for first, last in ends))
    rows, columns = (slice(max(0, int(first) - room), int(last) + 1 + room) for first, last in ends)
    return rows, columns
