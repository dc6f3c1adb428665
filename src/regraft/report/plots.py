"""Plots as SVG text for a page, with the page's font and text colour, and a transparent background."""

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from regraft.report.text import shorten

# Each has a contrast of 3:1 or more on white and on the dark page.
BLUE, ORANGE, GREEN, VIOLET, RED, TEAL = "#3b82f6", "#d97706", "#16a34a", "#a855f7", "#ef4444", "#0d9488"
PART_COLORS = {"training": BLUE, "validation": ORANGE}
CYCLE = (BLUE, ORANGE, GREEN, VIOLET, RED, TEAL)
MARKERS = "osD^vP"
CELL = "#1d4ed8"
# Placeholders that matplotlib writes; they are replaced by colours of the page's style sheet.
INK, GRID, CELL_INK = "#010203", "#040506", "#070809"
# Above this share of CELL, white has a contrast of 4.5:1 with a cell on the light page; below it, black has.
MAX_DARK_INK = 0.82

STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.6,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
}

MAX_NUMBERED_CLASSES = 25
MAX_DRAWN_CLASSES = 120
MAX_VECTOR_POINTS = 2000
MAX_MARKED_POINTS = 40

WIDE, HIGH = 4.7, 3.0  # inches; two stand side by side on a desktop


def learning_curves(
    parts: Mapping[str, Sequence[float | None]],
    best_epoch: int,
    ylabel: str,
    *,
    from_zero: bool = False,
    epochs: Sequence[int] | None = None,
) -> str:
    """Plot values over the epochs, and mark the epoch that was kept.

    Args:
        parts: One value per validated epoch for `training`, `validation` or both.
        best_epoch: Counted from 1.
        ylabel: Label of the values.
        from_zero: Begin the axis at zero unless a value is negative.
        epochs: The validated epochs, from 1; None: all.
    """
    with _drawing(f"curves {ylabel}", WIDE, HIGH) as drawing:
        axes = drawing.figure.subplots()
        axes.axvline(best_epoch, color=INK, linewidth=0.8, linestyle=(0, (3, 3)), label=f"kept: epoch {best_epoch}")
        for name, values in parts.items():
            color = PART_COLORS[name]
            known = [float("nan") if value is None else value for value in values]
            numbers = list(epochs or range(1, len(known) + 1))
            axes.plot(numbers, known, color=color, label=name, marker="o" if len(known) <= MAX_MARKED_POINTS else "")
            axes.plot(best_epoch, known[numbers.index(best_epoch)], "o", color=color, markersize=7)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1, steps=[1, 2, 5, 10]))
        axes.set(xlabel="epoch", ylabel=ylabel)
        axes.margins(x=0.04, y=0.1)
        if from_zero and not any(value is not None and value < 0 for values in parts.values() for value in values):
            axes.set_ylim(bottom=0)
        _legend_above(drawing.figure)
    return drawing.svg


def confusion(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str | None:
    """Plot a confusion matrix: rows are true classes, columns predicted ones, the colour is the share of the row.

    Args:
        counts: K rows of K numbers of photos.
        names: Names of the K classes.

    Returns:
        SVG, without numbers above 25 classes. None above 120 classes, where it would be unreadable.
    """
    size = len(names)
    if size > MAX_DRAWN_CLASSES:
        return None
    numbered = size <= MAX_NUMBERED_CLASSES
    cell = 0.17 if not numbered else 0.36 if size > 12 else 0.52
    labels = [shorten(name, 22) for name in names]
    room = 0.075 * max(map(len, labels)) + 0.55  # inches for the class names, which are vertical below the matrix
    with _drawing("confusion", size * cell + room, size * cell + room) as drawing:
        axes = drawing.figure.subplots()
        for row, line in enumerate(counts):
            for column, count in enumerate(line):
                if count:
                    _draw_cell(axes, row, column, count, count / sum(line), numbered=numbered)
        axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), xlabel="predicted", ylabel="true", aspect="equal")
        font = 9 if numbered else 7
        axes.set_xticks(range(size), labels, rotation=90, fontsize=font)
        axes.set_yticks(range(size), labels, fontsize=font)
        axes.set_xticks([edge - 0.5 for edge in range(size + 1)], minor=True)
        axes.set_yticks([edge - 0.5 for edge in range(size + 1)], minor=True)
        axes.grid(visible=False)
        axes.grid(which="minor", color=GRID)
        axes.tick_params(which="both", length=0)
        axes.spines[:].set_visible(False)
    return drawing.svg


def reliability_diagram(bins: Sequence[tuple[float, float, int]]) -> str:
    """Plot a reliability diagram: accuracy over confidence, and below it the count of each bin.

    Args:
        bins: (mean confidence, accuracy, count) of each nonempty bin, of ten equal ones.
    """
    confidence, accuracy, counts = zip(*bins, strict=True)
    with _drawing("reliability", WIDE, 3.9) as drawing:
        upper, lower = drawing.figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        upper.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=(0, (3, 3)), label="as sure as it is right")
        upper.vlines(confidence, confidence, accuracy, color=ORANGE, linewidth=1.4, label="gap")
        upper.plot(confidence, accuracy, "o-", color=BLUE, label="model")
        upper.set(xlim=(0, 1), ylim=(-0.03, 1.03), ylabel="share that is right")
        _legend_above(drawing.figure)
        edges = [min(int(sure * 10), 9) / 10 for sure in confidence]
        lower.bar(edges, counts, width=0.094, align="edge", color=BLUE, alpha=0.75)
        lower.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=3, min_n_ticks=1))
        lower.set(xlabel="probability of the predicted class", ylabel="count")
    return drawing.svg


def predicted_against_true(predicted: Sequence[float], true: Sequence[float]) -> str:
    """Plot predicted over true values; correct predictions are on the diagonal."""
    low, high = min(*predicted, *true), max(*predicted, *true)
    margin = 0.05 * (high - low) or 1.0
    limits = (low - margin, high + margin)
    with _drawing("scatter", WIDE, 4.2) as drawing:
        axes = drawing.figure.subplots()
        axes.plot(limits, limits, color=INK, linewidth=0.8, linestyle=(0, (3, 3)), label="right")
        many = len(true) > MAX_VECTOR_POINTS
        axes.plot(true, predicted, "o", color=BLUE, alpha=0.6, markeredgewidth=0, label="prediction", rasterized=many)
        axes.set(xlim=limits, ylim=limits, aspect="equal", xlabel="true", ylabel="predicted")
        _legend_above(drawing.figure)
    return drawing.svg


def residuals(errors: Sequence[float]) -> str:
    """Plot a histogram of the errors (predicted − true)."""
    with _drawing("residuals", WIDE, 4.2) as drawing:
        axes = drawing.figure.subplots()
        axes.hist(errors, bins=max(8, min(40, round(len(errors) ** 0.5))), color=BLUE, alpha=0.75)
        axes.axvline(0, color=INK, linewidth=0.8, linestyle=(0, (3, 3)))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set(xlabel="predicted − true", ylabel="count")
    return drawing.svg


def scores_by_depth(
    depths: Sequence[tuple[str, float, float]], chance: float | None, recommended: str | None, ylabel: str
) -> str:
    """Plot a score at each depth of a network with its standard error, from the input to the head.

    Args:
        depths: (name, score, standard error) of each depth.
        chance: Score of a guess; None to leave it out.
        recommended: Name of the depth to mark; None if none is.
        ylabel: Label of the score.
    """
    names, scores, errors = zip(*depths, strict=True)
    with _drawing("depths", WIDE, 3.2) as drawing:
        axes = drawing.figure.subplots()
        axes.errorbar(
            range(len(names)), scores, errors, color=BLUE, marker="o", capsize=3, label="head on frozen layers"
        )
        if chance is not None:
            axes.axhline(chance, color=INK, linewidth=0.8, linestyle=(0, (3, 3)), label="guess")
        if recommended in names:
            place = names.index(recommended)
            axes.plot(place, scores[place], "o", color=ORANGE, markersize=8, label="recommended")
        axes.set_xticks(range(len(names)), [shorten(name, 22) for name in names], rotation=30, ha="right")
        axes.set(ylabel=ylabel)
        axes.margins(x=0.08, y=0.12)
        _legend_above(drawing.figure)
    return drawing.svg


def sweep(
    series: dict[str, list[tuple[float, float, float]]],
    xlabel: str,
    ylabel: str,
    *,
    log_x: bool = True,
    from_zero: bool = False,
) -> str:
    """Plot one line with an error band per method.

    Args:
        series: (x, mean, standard deviation) of each point, by the method's name.
        xlabel: Label of x.
        ylabel: Label of the mean.
        log_x: Use a logarithmic x axis, with a tick at each x.
        from_zero: Begin y at zero, so that heights can be compared.
    """
    with _drawing(f"sweep {ylabel}", WIDE, 3.6) as drawing:
        axes = drawing.figure.subplots()
        for position, (name, points) in enumerate(series.items()):
            color, marker = CYCLE[position % len(CYCLE)], MARKERS[position % len(MARKERS)]
            x, mean, spread = zip(*sorted(points), strict=True)
            lower = [middle - std for middle, std in zip(mean, spread, strict=True)]
            upper = [middle + std for middle, std in zip(mean, spread, strict=True)]
            axes.fill_between(x, lower, upper, color=color, alpha=0.16, linewidth=0)
            axes.plot(x, mean, color=color, marker=marker, label=shorten(name, 40))
        if log_x:
            ticks = sorted({x for points in series.values() for x, _, _ in points})
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        _legend_above(drawing.figure, columns=2)
    return drawing.svg


@dataclass(frozen=True)
class Panel:
    """One plot of points with error bars.

    Attributes:
        series: (x, standard deviation of x, mean, standard deviation) of each point, by the name of the line.
        xlabel: Label of x, whose axis is logarithmic.
        ylabel: Label of the means.
        title: Title above it.
        ticks: Text of each tick, by its x; empty for powers of ten.
    """

    series: Mapping[str, Sequence[tuple[float, float, float, float]]]
    xlabel: str
    ylabel: str
    title: str = ""
    ticks: Mapping[float, str] = field(default_factory=dict)


def error_bars(panels: Sequence[Panel], columns: int = 1) -> str:
    """Plot points with error bars, one line per series, in panels that share their legend."""
    rows = math.ceil(len(panels) / columns)
    with _drawing(f"panels {panels[0].title} {panels[0].xlabel}", WIDE * columns, 3.3 * rows + 0.5) as drawing:
        grid = drawing.figure.subplots(rows, columns, squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            _draw_error_bars(axes, panel)
        handles, labels = grid.flat[0].get_legend_handles_labels()
        drawing.figure.legend(
            handles, labels, loc="outside upper left", ncols=3 * columns, borderaxespad=0.2, handlelength=1.4
        )
    return drawing.svg


def _draw_error_bars(axes: Axes, panel: Panel) -> None:
    middle = (len(panel.series) - 1) / 2
    axes.set_xscale("log")
    for position, (name, points) in enumerate(panel.series.items()):
        shift = 1.025 ** (position - middle) if panel.ticks else 1.0  # so that bars at one x stand side by side
        x, wide, mean, high = zip(*points, strict=True)
        axes.errorbar(
            [value * shift for value in x],
            mean,
            yerr=high,
            xerr=[[min(error, 0.9 * value) for error, value in zip(wide, x, strict=True)], wide],
            color=CYCLE[position % len(CYCLE)],
            marker=MARKERS[position % len(MARKERS)],
            label=shorten(name, 40),
            elinewidth=1.0,
            capsize=2,
            linewidth=1.4,
        )
    if panel.ticks:
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(list(panel.ticks), list(panel.ticks.values()))
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel, title=panel.title)


def standalone(svg: str) -> str:
    """Return the SVG of a plot as a file of its own, which is readable on light and on dark pages."""
    style = (
        "svg{color:#1c2330;--grid:#d9dee6;--ground:#fff;font-family:system-ui,sans-serif}"
        "@media(prefers-color-scheme:dark){svg{color:#e5e9f0;--grid:#3a4452;--ground:#1a1f28}}"
    )
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' style="[^"]*"| aria-hidden="true"', "", opening)
    ground = '<rect width="100%" height="100%" fill="var(--ground)"/>'
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f"{opening} {names}><style>{style}</style>{ground}{rest}\n"


class _Drawing:
    """A figure, and its SVG once it is finished."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.svg = ""


@contextmanager
def _drawing(name: str, width: float, height: float) -> Iterator[_Drawing]:
    """Yield an empty figure of a size in inches, and write it afterwards. Matplotlib's settings are restored.

    The hash salt makes the ids of clip paths and markers equal in each run, and different between figures of a page.
    """
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    style: Any = {**defaults, **STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # The browser has fonts for characters that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="(?s).*Glyph .* missing from")
        drawing = _Drawing(Figure(figsize=(width, height), layout="constrained", facecolor="none"))
        yield drawing
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        drawing.figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    drawing.svg = _inline(buffer.getvalue(), width, height)


def _inline(document: str, width: float, height: float) -> str:
    """Turn an SVG document into an inline element, without prolog and namespaces."""
    box = re.search(r'viewBox="[^"]*"', document)
    body = re.search(r"<svg[^>]*>(.*</svg>)", document, re.DOTALL)
    assert box is not None
    assert body is not None
    # "<" is escaped in names, so these patterns meet tags only.
    text = re.sub(r'<g id="[^"]*_\d+">', "<g>", body[1])
    text = re.sub(rf"(fill|stroke): {INK}", r"\1: currentColor", text)
    text = re.sub(rf"fill: {CELL_INK}", "fill: var(--cell-ink, currentColor)", text)
    text = re.sub(rf"(fill|stroke): {GRID}", r"\1: var(--grid, #8884)", text)
    across, down = (f"{inches * 96:.0f}" for inches in (width, height))
    return f'<svg {box[0]} width="{across}" height="{down}" style="--width: {across}px" aria-hidden="true">{text}'


def _draw_cell(axes: Axes, row: int, column: int, count: int, share: float, *, numbered: bool) -> None:
    strength = 0.06 + 0.9 * share
    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=CELL, alpha=strength, linewidth=0))
    if numbered:
        color, size = "white" if strength > MAX_DARK_INK else CELL_INK, 9 if count < 1000 else 6
        axes.text(column, row, str(count), ha="center", va="center_baseline", fontsize=size, color=color)


def _legend_above(figure: Figure, columns: int = 3) -> None:
    figure.legend(loc="outside upper left", ncols=columns, borderaxespad=0.2, handlelength=1.4, columnspacing=1.2)
