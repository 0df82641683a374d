"""Line charts: numbers in, one SVG out, drawn by matplotlib.

The SVG stands by itself inside an HTML page: no script, no link, no style that reaches beyond it.
Its colours are the page's own (`--c0` and on in `page.css`), so it follows the light and the dark
scheme. Equal numbers give equal bytes.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from symphony_moe.errors import shortened
from symphony_moe.reporting.numbers import MISSING, Number, compact, count
from symphony_moe.reporting.svg import COLOURS, PLACEHOLDERS, part_of_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "os^DvP"
"""Colour and marker repeat together after 24 lines."""

_WIDTH, _LEFT, _TOP, _BOTTOM = 740.0, 48.0, 30.0, 44.0
"""Of the whole chart and of what surrounds the plot, in points (1/72 inch)."""

_FONT, _LETTER = 10.5, 6.0
"""Size of the text, and room for one letter of a label, in points."""

_PLOT_HEIGHT = 220.0
"""In points. A chart whose labels need more is higher."""

_LABEL_HEIGHT = 14.0
"""From one label of a line to the next, in points."""

_LABEL_LENGTH = 34
"""Letters of a label. The table of the chart's numbers has the whole name."""


@dataclass(frozen=True)
class Point:
    """A point of a line. One whose `y` is NaN or infinite breaks the line."""

    x: Number
    y: Number
    low: Number | None = None
    high: Number | None = None
    """What the band around the line reaches from and to."""
    title: str = ""
    """Shown where somebody points at it. A point without one is not marked, unless it ends its
    line."""

    @property
    def is_drawn(self) -> bool:
        """Whether it has a place: a NaN or infinite value has none."""
        return math.isfinite(self.y)


@dataclass(frozen=True)
class Line:
    """A line of a chart."""

    number: int
    """Its place among those of its chart, which says how it looks."""
    name: str
    points: tuple[Point, ...]

    @property
    def colour(self) -> int:
        """Its number among COLOURS."""
        return self.number % len(COLOURS)

    @property
    def marker(self) -> str:
        """Its sign among MARKERS."""
        return MARKERS[self.number % len(MARKERS)]

    @property
    def drawn(self) -> list[Point]:
        """The points that have a place."""
        return [point for point in self.points if point.is_drawn]

    @property
    def parts(self) -> list[list[Point]]:
        """The line between its gaps."""
        parts: list[list[Point]] = [[]]
        for point in self.points:
            if point.is_drawn:
                parts[-1].append(point)
            else:
                parts.append([])
        return [part for part in parts if part]


@dataclass(frozen=True)
class Chart:
    """Lines over one axis. At least one of them has a point that can be drawn."""

    title: str
    """What it shows."""
    across: str
    upward: str
    """What the axes measure."""
    lines: tuple[Line, ...]
    write: Callable[[Number], str]
    """A height in words."""
    summary: str = ""
    """What there is to see, for those who do not see it."""
    notes: tuple[str, ...] = ()
    """What is not drawn, in sentences."""
    level: tuple[str, Number] | None = None
    """(name, height) of a dashed line."""
    from_zero: bool = False
    """Whether heights count from 0."""
    whole: bool = False
    """Whether the horizontal axis counts things: it begins at the first, and names whole numbers
    only. Another one begins at 0."""

    @property
    def description(self) -> str:
        """For those who do not see the chart."""
        return ". ".join(filter(None, (self.title, self.summary))) + "."

    @property
    def num_gaps(self) -> int:
        """Points that cannot be drawn."""
        return sum(not point.is_drawn for line in self.lines for point in line.points)

    @property
    def labels(self) -> list[tuple[str, Number, Line | None]]:
        """(text, height, line) of what stands beside the ends of the lines; None for the level."""
        labels: list[tuple[str, Number, Line | None]] = [
            (f"{line.name} {self.write(line.drawn[-1].y)}", line.drawn[-1].y, line)
            for line in self.lines
            if line.drawn
        ]
        if self.level is not None:
            name, height = self.level
            labels.append((f"{name} {self.write(height)}", height, None))
        return labels


def worth_drawing(chart: Chart) -> Chart | None:
    """The chart, or None where no point of any of its lines can be drawn."""
    return chart if any(line.drawn for line in chart.lines) else None


@dataclass(frozen=True)
class Drawing:
    """A chart as a page shows it."""

    chart: Chart
    svg: str
    head: list[str]
    rows: list[list[str]]
    """Its numbers as a table."""


def drawing(chart: Chart) -> Drawing:
    """A chart in a page's colours, with its numbers."""
    head = [chart.across, *(line.name for line in chart.lines)]
    columns = [{point.x: point for point in line.points} for line in chart.lines]
    write = compact if chart.whole else count
    rows = [
        [write(x), *(_number_text(chart, column.get(x)) for column in columns)]
        for x in sorted({x for column in columns for x in column})
    ]
    return Drawing(chart, draw(chart), head, rows)


def _number_text(chart: Chart, point: Point | None) -> str:
    if point is None:
        return MISSING
    text = chart.write(point.y)
    if point.low is None or point.high is None:
        return text
    return f"{text} ({chart.write(point.low)} to {chart.write(point.high)})"


def ticks(low: Number, high: Number, *, whole: bool = False) -> list[float]:
    """About five round values that span `low` to `high`, at least two. `whole`: no fractions."""
    from matplotlib.ticker import MaxNLocator

    if not high > low:
        high = low + (abs(low) or 1.0)
    values = MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=whole).tick_values(low, high)
    return [float(value) for value in values]


def apart(positions: Sequence[Number], gap: Number, low: Number, high: Number) -> list[float]:
    """Positions moved as little as it takes to stand `gap` apart between `low` and `high`, in the
    order that they had."""
    # Neighbours that are too close become one group, whose middle is where their own mean is.
    groups: list[list[int]] = []

    def middle(group: Sequence[int]) -> float:
        half = gap * (len(group) - 1) / 2
        mean = math.fsum(positions[index] for index in group) / len(group)
        return max(low + half, min(high - half, mean))

    for index in sorted(range(len(positions)), key=lambda index: positions[index]):
        groups.append([index])
        while len(groups) > 1:
            upper, lower = groups[-2:]
            if middle(lower) - middle(upper) >= gap * (len(upper) + len(lower)) / 2 - 1e-9:
                break
            groups[-2:] = [upper + lower]
    places = [0.0] * len(positions)
    for group in groups:
        for place, index in enumerate(group):
            places[index] = middle(group) + gap * (place - (len(group) - 1) / 2)
    return places


# Drawing


@lru_cache(maxsize=16)
def draw(chart: Chart, *, on_paper: bool = False) -> str:
    """The chart as SVG. On a page it has the page's colours and font; `on_paper` it is a file of
    its own, with colours of its own on white."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        # Whatever a user has set for other plots.
        matplotlib.rcdefaults()
        matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "symphony"}
        matplotlib.rcParams |= {"font.size": _FONT}
        room = max((len(shortened(text, _LABEL_LENGTH)) for text, _, _ in chart.labels), default=0)
        right = 34 + room * _LETTER
        high = max(_PLOT_HEIGHT, _LABEL_HEIGHT * len(chart.labels))
        size = _WIDTH, _TOP + high + _BOTTOM
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72)
        FigureCanvasSVG(figure)
        figure.patch.set_facecolor(PLACEHOLDERS["page"])
        figure.patch.set_visible(on_paper)
        axes = figure.add_axes(
            (
                _LEFT / size[0],
                _BOTTOM / size[1],
                (size[0] - _LEFT - right) / size[0],
                high / size[1],
            )
        )
        _draw_axes(axes, chart)
        titles: set[str] = set()
        for line in chart.lines:
            titles |= _draw_line(axes, line, chart.write)
        _draw_labels(figure, axes, chart)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return part_of_page(file.getvalue(), chart.description, titles, on_paper=on_paper)


def _draw_axes(axes: "Axes", chart: Chart) -> None:
    """Everything but the lines, and the limits of the plot."""
    drawn = [point for line in chart.lines for point in line.drawn]
    ends = [y for p in drawn for y in (p.y, p.low, p.high) if y is not None and math.isfinite(y)]
    if chart.level is not None:
        ends.append(chart.level[1])
    if chart.from_zero:
        ends.append(0.0)
    right = max(point.x for point in drawn) or 1.0
    left = min(point.x for point in drawn) if chart.whole else 0.0
    rows = ticks(min(ends), max(ends))
    columns = [x for x in ticks(left, right, whole=chart.whole) if left <= x <= 1.01 * right]
    decimals = max(0, -math.floor(math.log10(rows[1] - rows[0]) + 1e-9))
    axes.set_xlim(left, right if right > left else left + 1)
    axes.set_ylim(rows[0], rows[-1])
    axes.set_xticks(columns, [compact(x) for x in columns])
    axes.set_yticks(rows, [f"{y:.{decimals}f}" for y in rows])
    axes.tick_params(length=0, pad=6, labelcolor=PLACEHOLDERS["quiet"])
    axes.grid(axis="y", color=PLACEHOLDERS["line"], linewidth=0.8, clip_on=False)
    axes.patch.set_visible(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel(chart.across, color=PLACEHOLDERS["quiet"], labelpad=6)
    axes.set_title(
        chart.upward, loc="left", pad=12, fontsize=_FONT, color=PLACEHOLDERS["quiet"], x=0
    )
    if chart.level is not None:
        axes.axhline(
            chart.level[1],
            color=PLACEHOLDERS["quiet"],
            linewidth=1.2,
            linestyle=(0, (5, 3)),
            clip_on=False,
        )


def _draw_line(axes: "Axes", line: Line, write: Callable[[Number], str]) -> set[str]:
    """A line and the band around it. The titles of its marks."""
    colour, titles = PLACEHOLDERS[COLOURS[line.colour]], {line.name}
    for part in line.parts:
        x = [point.x for point in part]
        low = [point.y if point.low is None else point.low for point in part]
        high = [point.y if point.high is None else point.high for point in part]
        if len(part) > 1 and low != high:
            axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0, clip_on=False)
    for part in line.parts:
        axes.plot(
            [point.x for point in part],
            [point.y for point in part],
            color=colour,
            linewidth=1.6,
            solid_capstyle="round",
            clip_on=False,
            gid=line.name,
        )
    ends = line.drawn[:1] + line.drawn[-1:]
    for point in line.drawn:
        if not point.title and point not in ends:
            continue
        title = point.title or f"{line.name}: {write(point.y)}"
        axes.plot(
            [point.x],
            [point.y],
            marker=line.marker if point in ends else "o",
            color=colour,
            markersize=6.5 if point in ends else 4.5,
            markerfacecolor=colour,
            markeredgecolor=PLACEHOLDERS["page"],
            markeredgewidth=0.8,
            clip_on=False,
            zorder=3,
            gid=title,
        )
        titles.add(title)
    return titles


def _draw_labels(figure: "Figure", axes: "Axes", chart: Chart) -> None:
    """The name and the last value of every line, right of the plot, led to its end."""
    from matplotlib.lines import Line2D
    from matplotlib.transforms import IdentityTransform

    place = axes.transData.transform
    box = axes.get_window_extent()
    heights = [float(place((0, height))[1]) for _, height, _ in chart.labels]
    for (text, _, line), y, at in zip(
        chart.labels, heights, label_places(heights, box.y0, box.y1), strict=True
    ):
        colour = PLACEHOLDERS["quiet" if line is None else COLOURS[line.colour]]
        end = box.x1 if line is None else float(place((line.drawn[-1].x, 0))[0])
        figure.add_artist(
            Line2D(
                [end + 5, max(box.x1, end) + 6, box.x1 + 17],
                [y, y, at],
                color=colour,
                linewidth=0.7,
                transform=IdentityTransform(),
            )
        )
        if line is not None:
            figure.add_artist(
                Line2D(
                    [box.x1 + 22],
                    [at],
                    marker=line.marker,
                    color=colour,
                    markersize=6,
                    markerfacecolor=colour,
                    markeredgecolor=PLACEHOLDERS["page"],
                    markeredgewidth=0.8,
                    transform=IdentityTransform(),
                )
            )
        figure.text(
            box.x1 + 29,
            at,
            shortened(text, _LABEL_LENGTH),
            transform=IdentityTransform(),
            color=PLACEHOLDERS["quiet" if line is None else "ink"],
            verticalalignment="center_baseline",
            parse_math=False,
        )


def label_places(heights: Sequence[Number], low: Number, high: Number) -> list[float]:
    """Where the labels of lines that end at these heights stand, in points."""
    return apart(heights, _LABEL_HEIGHT, low, high)
