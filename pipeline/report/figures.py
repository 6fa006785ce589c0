"""Plots of the report: small SVG panels that stand inside the page and take its colours, dark mode included.

The only module that imports matplotlib, and inside its functions: the command line answers before it is loaded. A
panel is drawn with placeholder colours that become CSS variables of the page; its text stays text, in the page's font.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.report.wording import points
from stages.id_data.lazy import Floats
from stages.metrics.ranking import fpr95

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Placeholder of each CSS variable: colours that nothing else in a figure has.
_INK, _GRID = "#010203", "#010204"
COLOURS = {"id": "#010205", "ood": "#010206", "baseline": "#010207", "method": "#010208", "far": "#010209"}
_VARIABLES = {_INK: "muted", _GRID: "grid"} | {placeholder: name for name, placeholder in COLOURS.items()}
_STYLE: dict[Any, Any] = {  # matplotlib's own type of it is a Literal of every parameter
    "svg.fonttype": "none",
    "text.parse_math": False,  # a set may be called "$x$"
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.labelsize": 8.5,
    "axes.edgecolor": _GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
    "path.simplify": False,  # it would drop lines without length, which are dots
}
_POINTS_OF_INCH = 72
_LETTER, _LINE, _PAD = 5.8, 13.5, 6  # points: of a digit of nine points, of a line of text, and around all
_BINS = 40
_MOST_POINTS = 300  # of a ROC curve in the page; more cannot be seen


@dataclass(frozen=True)
class Series:
    """A line of a panel: values per epoch, several where there are several seeds or folds."""

    colour: str
    runs: Sequence[Sequence[float | None]]
    dashed: bool = False


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Differences of shares in a grid, shown in points: negative ones are better.

    Attributes:
        title: above it.
        values: ``[rows, columns]``.
        marked: which are written in bold, likewise.
    """

    title: str
    values: NDArray[np.floating]
    marked: NDArray[np.bool_]


@dataclass(frozen=True)
class Points:
    """Dots of one colour, ``[n, 2]``."""

    colour: str
    at: NDArray[np.floating]
    size: float = 4


def histogram_panel(
    title: str, id_scores: Floats, ood_scores: Floats, threshold: float | None, colour: str = "ood"
) -> str:
    """Shares of ID and OOD rows by score, higher = more OOD, with the threshold that admits 95 % of ID."""
    both = np.concatenate([id_scores, ood_scores])
    # A few far outliers would squeeze all others into one bin: what is beyond is counted in the outermost bins.
    low, high = (float(bound) for bound in np.quantile(both, [0.005, 0.995]))
    if threshold is not None:
        low, high = min(low, threshold), max(high, threshold)
    edges = np.linspace(low, high, _BINS + 1) if high > low else np.linspace(low - 0.5, low + 0.5, _BINS + 1)

    def draw(axes: "Axes") -> None:
        for scores, name in ((id_scores, "id"), (ood_scores, colour)):
            counts, _ = np.histogram(np.clip(scores, edges[0], edges[-1]), edges)
            share = 100 * counts / len(scores)
            axes.stairs(share, edges, fill=True, color=COLOURS[name], alpha=0.35, linewidth=0)
            axes.stairs(share, edges, color=COLOURS[name], linewidth=1.2)
        if threshold is not None:
            axes.axvline(threshold, color=_INK, linewidth=1, linestyle=(0, (3, 2)))
        axes.set(xlabel="score (higher = more OOD)", ylabel="% of the set", xlim=(edges[0], edges[-1]))
        axes.set_ylim(bottom=0)

    return _panel(title, draw)


def roc_panel(title: str, methods: Mapping[str, tuple[Floats, Floats]]) -> str:
    """ROC curves by colour name, from ID and OOD scores; ID positive, a dot where 95 % of ID is admitted."""

    def draw(axes: "Axes") -> None:
        axes.plot([0, 100], [0, 100], color=_GRID, linewidth=1)
        axes.axhline(95, color=_INK, linewidth=0.8, linestyle=(0, (3, 2)))
        for name, (id_scores, ood_scores) in methods.items():
            x, y = admitted(id_scores, ood_scores)
            axes.plot(100 * x, 100 * y, color=COLOURS[name], linewidth=1.8)
            axes.plot(100 * fpr95(id_scores, ood_scores), 95, "o", color=COLOURS[name], markersize=5, clip_on=False)
        axes.set(xlabel="OOD admitted, %", ylabel="ID admitted, %", xlim=(0, 100), ylim=(0, 100))

    return _panel(title, draw)


def admitted(id_scores: Floats, ood_scores: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Shares of OOD (x) and ID (y) rows that every threshold admits; equal scores are admitted together."""
    thresholds = np.unique(np.concatenate([id_scores, ood_scores]))
    if len(thresholds) > _MOST_POINTS:
        thresholds = thresholds[np.linspace(0, len(thresholds) - 1, _MOST_POINTS).round().astype(int)]
    x, y = (
        np.concatenate([[0.0], np.searchsorted(np.sort(scores), thresholds, "right") / len(scores)])
        for scores in (ood_scores, id_scores)
    )
    return x, y


def epoch_panel(
    title: str, series: Sequence[Series], best_epoch: int | None = None, per_cent: bool = False, first: int = 0
) -> str:
    """Values per epoch, counted from 1; `first` is the number of the first one, −1 for what stands at 0: the start."""

    def draw(axes: "Axes") -> None:
        for line in series:
            for run in line.runs:
                values = np.asarray([np.nan if value is None else value for value in run], dtype=float)
                epochs = first + np.arange(1, len(values) + 1)
                values = 100 * values if per_cent else values
                style = (0, (4, 2)) if line.dashed else "-"
                marker = "o" if len(values) <= 12 else ""
                axes.plot(
                    epochs,
                    values,
                    marker=marker,
                    ls=style,
                    color=COLOURS[line.colour],
                    lw=1.6,
                    markersize=3,
                    clip_on=False,
                )
        _epoch_axis(axes, best_epoch)
        if per_cent:
            axes.set(ylabel="%", ylim=(0, 100))

    return _panel(title, draw)


def range_panel(title: str, runs: Sequence[Sequence[Sequence[float]]], best_epoch: int | None = None) -> str:
    """Smallest, median and largest of several values per epoch (α of every class), over all runs."""

    def draw(axes: "Axes") -> None:
        longest = max(len(run) for run in runs)
        pooled = [np.concatenate([run[epoch] for run in runs if epoch < len(run)]) for epoch in range(longest)]
        epochs = np.arange(1, longest + 1)
        low, middle, high = (np.asarray([function(values) for values in pooled]) for function in _LOW_MIDDLE_HIGH)
        axes.fill_between(epochs, low, high, color=COLOURS["method"], alpha=0.2, linewidth=0)
        axes.plot(epochs, high, color=COLOURS["method"], linewidth=0.8)
        axes.plot(epochs, low, color=COLOURS["method"], linewidth=0.8)
        axes.plot(epochs, middle, marker="o" if longest <= 12 else "", ls="-", color=COLOURS["method"], markersize=3)
        _epoch_axis(axes, best_epoch)

    return _panel(title, draw)


def scatter_panel(title: str, points: Sequence[Points], axes_names: tuple[str, str] | None = None) -> str:
    """Dots over two axes; without names the axes are those of a map, whose numbers mean nothing."""

    def draw(axes: "Axes") -> None:
        for dots in points:
            # One path of lines without length, whose round ends are the dots: an element each would be ten times it.
            x, y = (np.stack([column, column, np.full_like(column, np.nan)], axis=1).ravel() for column in dots.at.T)
            axes.plot(
                x, y, color=COLOURS[dots.colour], linewidth=dots.size, alpha=0.6, solid_capstyle="round", clip_on=False
            )
        if axes_names is None:
            axes.set(xticks=[], yticks=[])
            axes.spines["bottom"].set_visible(False)
        else:
            axes.set(xlabel=axes_names[0], ylabel=axes_names[1])
        axes.margins(0.05)

    return _panel(title, draw)


def line_panel(title: str, x: Sequence[float], series: Sequence[Series], axes_names: tuple[str, str]) -> str:
    """Values over a few numbers, each at its own place."""

    def draw(axes: "Axes") -> None:
        places = np.arange(len(x))
        for line in series:
            for run in line.runs:
                axes.plot(places, np.asarray(run, dtype=float), "o-", color=COLOURS[line.colour], markersize=4)
        axes.set_xticks(places, [f"{number:g}" for number in x])
        axes.set(xlabel=axes_names[0], ylabel=axes_names[1])
        axes.margins(0.08)

    return _panel(title, draw)


def heat_map_file(maps: Sequence[HeatMap], rows: Sequence[str], columns: Sequence[str]) -> str:
    """Maps with the same rows and columns, two beside each other, as an SVG file: blue is better, red is worse."""
    import matplotlib
    from matplotlib.figure import Figure

    down = -(-len(maps) // 2)
    size = (2.6 + 1.1 * len(columns), down * (0.6 + 0.22 * len(rows)))
    widest = max(float(np.abs(own.values).max()) for own in maps) or 1.0
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "heat maps", "font.size": 8}):
        figure = Figure(figsize=size, layout="constrained")
        for axes, own in zip(figure.subplots(down, 2, squeeze=False).flat, maps, strict=False):
            axes.imshow(own.values, cmap="RdBu_r", vmin=-widest, vmax=widest, aspect="auto")
            axes.set_title(own.title, fontsize=9)
            axes.set_xticks(range(len(columns)), columns)
            axes.set_yticks(range(len(rows)), rows)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            for (row, column), value in np.ndenumerate(own.values):
                ink = "white" if abs(value) > widest / 2 else "black"
                text = axes.text(column, row, points(float(value)), ha="center", va="center", color=ink)
                text.set_weight("bold" if own.marked[row, column] else "normal")
        out = io.StringIO()
        figure.savefig(out, format="svg", facecolor="white", metadata=_NO_METADATA)
    return out.getvalue()


_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
_LOW_MIDDLE_HIGH: tuple[Callable[[NDArray[np.float64]], float], ...] = (np.min, np.median, np.max)


def _epoch_axis(axes: "Axes", best_epoch: int | None) -> None:
    from matplotlib.ticker import MaxNLocator

    if best_epoch is not None:
        axes.axvline(best_epoch + 1, color=_INK, linewidth=1, linestyle=(0, (1, 2)))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")
    axes.set_ylim(bottom=0)


def _panel(title: str, draw: Callable[["Axes"], None]) -> str:
    """One small figure as an ``<svg>`` element."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": title}):
        # No pyplot: no global figures, no display.
        figure = Figure(figsize=(4.2, 2.7), dpi=72)
        FigureCanvasSVG(figure)
        draw(axes := figure.add_subplot())
        _make_room(figure, axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata=_NO_METADATA)
    return _for_page(out.getvalue(), title)


def _make_room(figure: "Figure", axes: "Axes") -> None:
    """Margins for what stands beside the axes, counted in letters: matplotlib's own layouts draw a panel twice."""
    width, height = figure.get_size_inches() * _POINTS_OF_INCH
    x_numbers, y_numbers = (
        axis.get_major_formatter().format_ticks(axis.get_majorticklocs().tolist()) for axis in (axes.xaxis, axes.yaxis)
    )
    longest_x, longest_y = (_LETTER * max(map(len, numbers), default=0) for numbers in (x_numbers, y_numbers))
    beside = longest_y + _LINE * bool(axes.get_ylabel())
    below = _LINE * (bool(x_numbers) + bool(axes.get_xlabel()))
    above = _LINE * bool(axes.yaxis.get_major_formatter().get_offset())  # a common factor of the numbers
    figure.subplots_adjust(
        left=(_PAD + max(beside, longest_x / 2)) / width,
        right=1 - (_PAD + longest_x / 2) / width,
        bottom=(_PAD + below) / height,
        top=1 - (_PAD + above) / height,
    )


def _for_page(svg: str, title: str) -> str:
    """What the page needs of a stand-alone SVG file: no prolog, no addresses, no styles for all; a label."""
    from markupsafe import escape

    opening = re.search(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', svg)
    assert opening is not None
    svg = svg[opening.end() :]
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"/>', "", svg)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # every figure has an axes_1; an id stands once in a page
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r" font-family: [^;]*;", "", svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    for placeholder, variable in _VARIABLES.items():
        svg = svg.replace(placeholder, f"var(--{variable})")
    return f'<svg role="img" aria-label="{escape(title)}" viewBox="{opening[1]}">{svg.strip()}'
