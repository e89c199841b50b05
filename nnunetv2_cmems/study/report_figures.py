"""The report's figures, as SVG that stands in the page itself and takes its colours and its font from the page's style sheet.

matplotlib draws with stand-in colours, which are replaced by CSS variables: one drawing serves a light and a dark page. Each
panel is a small figure of its own, so that panels can stand side by side or, on a phone, below each other, at the same size.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

INK, MUTED, RULE, ACCENT = "#010203", "#020304", "#030405", "#040506"
NUM_COLOURS = 10
_SERIES = [f"#05060{i:x}" for i in range(NUM_COLOURS)]
_VARIABLES = {INK: "currentColor", MUTED: "var(--muted)", RULE: "var(--rule)", ACCENT: "var(--accent)"}
_VARIABLES |= {colour: f"var(--series-{i})" for i, colour in enumerate(_SERIES)}
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_MARKERS = "osD^vPX"
_WIDTH = 380.0
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Panel:
    """A figure of the page: its heading, the drawing, what stands below it, and the names of its lines with a piece of each."""

    title: str
    drawing: Markup
    note: str = ""
    legend: Sequence[tuple[Markup, str]] = ()


@dataclass(frozen=True)
class Line:
    """Values along a training, (runs, epochs), and which of the page's line styles they are drawn with."""

    name: str
    values: np.ndarray
    style: int


def line_style(index: int) -> dict[str, Any]:
    """Colour, dashes and marker of the method or curve number ``index``: neighbours differ in all three."""
    return {"color": _SERIES[index % NUM_COLOURS], "linestyle": _DASHES[index % 4], "marker": _MARKERS[index % len(_MARKERS)]}


def swatch(index: int) -> Markup:
    """A piece of the line of :func:`line_style`, for a legend in the page."""
    figure = _figure(34, 12, layout=None)
    figure.add_artist(Line2D([0.02, 0.5, 0.98], [0.5] * 3, **line_style(index), markersize=4.5, markevery=[1], linewidth=1.6))
    return _svg(figure, "")


def box_plots(values: Mapping[str, np.ndarray], label: str, main: str | None) -> Markup:
    """A box for each method, below each other: the Dice of each case of each run, in percent.

    Args:
        values: method to its finite Dice, 0 to 1.
        label: what the Dice is of, for the text that describes the figure.
        main: the method that is emphasised.
    """
    shown = {method: 100 * dice for method, dice in values.items() if len(dice)}
    with matplotlib.rc_context(_STYLE):
        longest = max((len(method) for method in shown), default=0)
        figure = _figure(_WIDTH + 5 * max(0, longest - 14), 56 + 25 * max(1, len(shown)))
        axes = figure.add_subplot()
        thin = {"color": INK, "linewidth": 1.0}
        drawn = axes.boxplot(
            list(shown.values()), orientation="horizontal", tick_labels=list(shown), widths=0.58, patch_artist=True, showmeans=True,
            boxprops={"facecolor": RULE, "edgecolor": INK, "linewidth": 1.0}, medianprops={"color": INK, "linewidth": 2.2},
            whiskerprops=thin, capprops=thin,
            flierprops={"marker": "o", "markersize": 2.4, "markerfacecolor": MUTED, "markeredgecolor": MUTED, "alpha": 0.7},
            meanprops={"marker": "D", "markersize": 4.2, "markerfacecolor": ACCENT, "markeredgecolor": ACCENT},
        )  # fmt: skip
        for method, box, text in zip(shown, drawn["boxes"], axes.get_yticklabels(), strict=True):
            if method == main:
                box.set(edgecolor=ACCENT, linewidth=1.8)
                text.set_fontweight("bold")
        axes.set(xlim=(-2, 102), xlabel="Dice, %")
        axes.invert_yaxis()
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        texts = [f"{method}: median {np.median(dice):.1f}, mean {dice.mean():.1f}" for method, dice in shown.items()]
        return _svg(figure, f"Box plots of the Dice of {label} in percent. {'; '.join(texts)}.")


def curves(
    lines: Sequence[Line], what: str, *, share: bool = True, whole: bool = True, of_training: bool = False, band: bool = True
) -> Markup:
    """Lines over the epochs: the mean of the runs and, where there are few lines, the range of the runs.

    Args:
        lines: what is drawn; lines without a finite value are left out.
        what: the quantity, for the axis and for the text that describes the figure.
        share: it lies between 0 and 1, and is shown in percent.
        whole: the axis shows all from 0 to 1.
        of_training: draw over the share of the training that is done instead, as the lengths differ.
        band: draw the range of the runs.
    """
    with matplotlib.rc_context(_STYLE):
        figure = _figure(_WIDTH, 250)
        axes = figure.add_subplot()
        texts = []
        for line in lines:
            found = _mean_and_range(line.values)
            if found is None:
                continue
            mean, low, high = found
            style = line_style(line.style)
            steps = np.arange(1, len(mean) + 1)
            x = 100 * steps / len(mean) if of_training else steps
            axes.plot(x, mean, **style, linewidth=1.7, markersize=4, markevery=_places(mean))
            if band and len(line.values) > 1:
                axes.fill_between(x, low, high, color=style["color"], alpha=0.13, linewidth=0)
            last = mean[np.isfinite(mean)][-1]
            texts.append(f"{line.name}: {100 * last:.1f} %" if share else f"{line.name}: {last:.3g}")
        axes.set(xlabel="share of the training, %" if of_training else "epoch", ylabel=what)
        if share:
            if whole:
                axes.set_ylim(-0.02, 1.02)
            else:
                axes.margins(y=0.15)
                axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
            axes.set_ylabel(f"{what}, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
        axes.grid()
        return _svg(figure, f"{what} along the training. At its end: {'; '.join(texts)}.")


def reliability(parts: Mapping[str, Mapping[str, np.ndarray]], errors: Mapping[str, float]) -> Markup:
    """Accuracy against confidence, one line for each part of the pixels, and below how many pixels lie in each bin.

    Args:
        parts: name to ``edges``, ``count``, ``confidence`` and ``right``.
        errors: name to expected calibration error.
    """
    with matplotlib.rc_context(_STYLE):
        figure = _figure(_WIDTH * 0.86, 330)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        upper.plot([0, 1], [0, 1], color=MUTED, linewidth=1.0, linestyle=_DASHES[1])
        texts = []
        for index, (name, bins) in enumerate(parts.items()):
            filled = bins["count"] > 0
            confidence, accuracy = (bins[key][filled] / bins["count"][filled] for key in ("confidence", "right"))
            style = line_style(index) | {"linestyle": _DASHES[index], "marker": _MARKERS[index]}
            upper.plot(confidence, accuracy, **style, linewidth=1.5, markersize=5, label=name)
            share = bins["count"] / bins["count"].sum()
            lower.stairs(share, bins["edges"], color=style["color"], linestyle=style["linestyle"], linewidth=1.5)
            last = f", the most confident bin is right in {100 * accuracy[-1]:.1f} %"
            texts.append(f"{name}: expected calibration error {100 * errors[name]:.1f} %{last}")
        upper.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="accuracy")
        upper.set_aspect("auto")
        upper.legend(loc="upper left", fontsize=11.5, handlelength=2.6)
        upper.grid()
        lower.set(ylim=(0, 1), xlabel="confidence", ylabel="pixels")
        lower.set_yticks([0, 1], ["0", "all"])
        return _svg(figure, f"Reliability diagram, accuracy against confidence. {'; '.join(texts)}.")


def threshold_curves(series: Mapping[str, tuple[np.ndarray, np.ndarray]], what: str, current: float | None) -> Markup:
    """A share against tau, one line an epoch; the thresholds stand at equal distances, as they crowd below 1.

    Args:
        series: name to (thresholds, shares).
        what: the share.
        current: the training's own tau.
    """
    with matplotlib.rc_context(_STYLE):
        figure = _figure(_WIDTH, 250)
        axes = figure.add_subplot()
        texts = []
        thresholds: np.ndarray = np.empty(0)
        for index, (name, (thresholds, values)) in enumerate(series.items()):
            axes.plot(np.arange(len(values)), values, **line_style(index), linewidth=1.7, markersize=4, label=name)
            finite = np.isfinite(values)
            if finite.any():
                texts.append(f"{name}: {100 * values[finite][0]:.1f} % at {thresholds[finite][0]:g}, "
                             f"{100 * values[finite][-1]:.1f} % at {thresholds[finite][-1]:g}")  # fmt: skip
        place = None if current is None else _position(thresholds, current)
        if place is not None:
            axes.axvline(place, color=MUTED, linewidth=1.2)
            axes.annotate(
                f"τ = {current:g}", (place, 1.0), (-4, 3), xycoords=("data", "axes fraction"), textcoords="offset points", ha="right",
                va="bottom", fontsize=11.5,
            )  # fmt: skip
        axes.set_xticks(np.arange(len(thresholds)), [f"{t:g}" for t in thresholds], rotation=55, ha="right", rotation_mode="anchor")
        axes.set(ylim=(-0.02, 1.02), xlabel="τ", ylabel=f"{what}, %")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        axes.grid()
        return _svg(figure, f"{what} against tau. {'; '.join(texts)}.")


def study(values: Mapping[Any, Sequence[float]], name: str, reference: tuple[str, float] | None) -> Markup:
    """Dice against a study's value: a dot for each run, a bar for their mean, and a line where values are numbers.

    Args:
        values: the study's value to each run's Dice, 0 to 1.
        name: of the study, for the axis.
        reference: a method without the study's change, and its mean Dice.
    """
    with matplotlib.rc_context(_STYLE):
        figure = _figure(_WIDTH, 270)
        axes = figure.add_subplot()
        means = [100 * float(np.mean(dice)) for dice in values.values()]
        numbers = all(isinstance(value, (int, float)) for value in values)
        axes.plot(range(len(values)), means, color=ACCENT, linewidth=1.8, linestyle="-" if numbers else "none")
        axes.plot(range(len(values)), means, color=ACCENT, linestyle="none", marker="_", markersize=16, markeredgewidth=2)
        for place, dice in enumerate(values.values()):
            axes.plot([place] * len(dice), 100 * np.asarray(dice), "o", color=INK, markersize=3.6, alpha=0.75)
        _draw_reference(axes, reference)
        texts = [text_of(value) for value in values]
        slanted = sum(map(len, texts)) > 30
        slant: Any = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
        axes.set_xticks(range(len(values)), texts, **slant)
        axes.set(xlabel="τ" if name == "tau" else name, ylabel="mean Dice, %", xlim=(-0.4, len(values) - 0.6))
        axes.margins(y=0.15)
        axes.grid(axis="y")
        described = "; ".join(f"{value}: {mean:.1f} %" for value, mean in zip(texts, means, strict=True))
        return _svg(figure, f"Mean Dice against {name}. {described}.")


def _draw_reference(axes: Axes, reference: tuple[str, float] | None) -> None:
    """A level that dots are compared with: its name and its Dice."""
    if reference is None:
        return
    name, dice = reference
    axes.axhline(100 * dice, color=INK, linewidth=1.0, linestyle=_DASHES[1])
    axes.annotate(
        name, (1.0, 100 * dice), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", va="bottom",
        fontsize=11.5,
    )  # fmt: skip


def scatter(x: Sequence[float], dice: Sequence[float], label: str, reference: tuple[str, float] | None) -> Markup:
    """Dice, 0 to 1, against a number, a dot for each run."""
    with matplotlib.rc_context(_STYLE):
        figure = _figure(_WIDTH, 260)
        axes = figure.add_subplot()
        axes.plot(x, 100 * np.asarray(dice), "o", color=ACCENT, markersize=5, alpha=0.75)
        _draw_reference(axes, reference)
        axes.set(xlabel=label, ylabel="mean Dice, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
        axes.margins(0.08, 0.15)
        axes.grid()
        return _svg(figure, f"Mean Dice against {label}: from {100 * min(dice):.1f} % to {100 * max(dice):.1f} %, {len(dice)} runs.")


def text_of(value: Any) -> str:
    """A study's value as it is written."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _mean_and_range(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Of (runs, epochs): each (epochs,), NaN where no run has a value; None where there is no value at all."""
    known = np.isfinite(values)
    if not values.size or not known.any():
        return None
    number = known.sum(0)
    mean = np.where(number > 0, np.where(known, values, 0).sum(0) / np.maximum(number, 1), np.nan)
    low = np.where(number > 0, np.where(known, values, np.inf).min(0), np.nan)
    high = np.where(number > 0, np.where(known, values, -np.inf).max(0), np.nan)
    return mean, low, high


def _places(values: np.ndarray) -> list[int]:
    """Where a line is marked: all of a short one, else about six places and its end."""
    finite = np.flatnonzero(np.isfinite(values))
    if len(finite) <= 6:
        return [int(i) for i in finite]
    return sorted({int(finite[round(i)]) for i in np.linspace(0, len(finite) - 1, 6)})


def _position(thresholds: np.ndarray, value: float) -> float | None:
    """Where a threshold lies on the axis that shows ``thresholds`` at equal distances."""
    for place, (low, high) in enumerate(pairwise(thresholds)):
        if low <= value <= high and high > low:
            return place + float((value - low) / (high - low))
    return None


def _figure(width: float, height: float, layout: Any = "constrained") -> Figure:
    """An empty figure, in CSS pixels."""
    figure = Figure(figsize=(width / 72, height / 72), layout=layout)
    FigureCanvasSVG(figure)
    figure.patch.set_visible(False)
    return figure


def _svg(figure: Figure, alt: str) -> Markup:
    """The figure as an element of the page. Without a description it is for the eyes only."""
    for axes in figure.axes:
        _transparent(axes)
    text = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "report"}):
        figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    source = text.getvalue()
    source = source[source.index("<svg") :]
    source = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|font-family: [^;\"]*; ?", "", source, flags=re.DOTALL)
    source = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(?<=\d\.\d\d)\d+", "", tag[0]), source)  # hundredths of a pixel will do
    for colour, variable in _VARIABLES.items():
        source = source.replace(colour, variable)
    source = re.sub(r"font: (?:(bold|\d00) )?([\d.]+)px [^;\"]*", lambda found: _font(found[1], found[2]), source)
    source = _own_ids(source)
    source = re.sub(r"\n\s*", "\n", source)
    view = re.search(r'viewBox="([^"]*)"', source)
    width = float(view[1].split()[2]) if view else _WIDTH
    role = f'role="img" aria-label="{escape(alt)}"' if alt else 'aria-hidden="true"'
    opening = f'<svg class="plot" {role} viewBox="{view[1] if view else ""}" style="max-width:{1.15 * width:.0f}px;--width:{width:.0f}px">'
    return Markup(re.sub(r"<svg[^>]*>", lambda _: opening, source, count=1).strip())


def _font(weight: str | None, size: str) -> str:
    return f"font-size: {float(size):g}px" + (f"; font-weight: {weight}" if weight else "")


def _own_ids(source: str) -> str:
    """Ids that nothing refers to are dropped, the others made unique to this drawing: a page holds many."""
    used = set(re.findall(r'(?:url\(#|href="#)([\w-]+)', source))
    prefix = "f" + hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()[:8]
    source = re.sub(r' id="([\w.-]+)"', lambda found: f' id="{prefix}{found[1]}"' if found[1] in used else "", source)
    return re.sub(r'(url\(#|href="#)([\w-]+)', lambda found: f"{found[1]}{prefix}{found[2]}", source)


def _transparent(axes: Axes) -> None:
    axes.patch.set_visible(False)
