"""A chart is where its numbers put it, the same every time, and part of any page."""

import itertools
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any
from xml.etree.ElementTree import fromstring

import pytest
from plots import Plot

from symphony_moe.reporting.charts import (
    Chart,
    Line,
    Point,
    apart,
    draw,
    drawing,
    label_places,
    ticks,
    worth_drawing,
)
from symphony_moe.reporting.numbers import MISSING, Number, loss_text


def chart(*lines: Sequence[float], level: tuple[str, Number] | None = None) -> Chart:
    """Lines over 0, 100, 200 .. tokens."""
    return Chart(
        title="Loss against tokens",
        across="tokens",
        upward="loss",
        lines=tuple(
            Line(n, f"line {n}", tuple(Point(100 * i, y) for i, y in enumerate(line)))
            for n, line in enumerate(lines)
        ),
        write=loss_text,
        level=level,
    )


def test_every_line_is_where_its_numbers_put_it() -> None:
    plot = Plot(draw(chart([5.0, 4.0, 3.5], [2.0, math.nan, 3.0, 2.5], level=("even", 1.25))))
    assert plot.across.keys() == {0, 100, 200, 300}
    (first,) = plot.line("line 0")
    places: Any = [
        (pytest.approx(x, abs=0.1), pytest.approx(y, abs=1e-3))
        for x, y in ((0, 5.0), (100, 4.0), (200, 3.5))
    ]
    assert first == places
    parts = plot.line("line 1")
    assert [len(part) for part in parts] == [1, 2]
    end: Any = (pytest.approx(300, abs=0.1), pytest.approx(2.5, abs=1e-3))
    assert parts[1][1] == end
    assert plot.labels == ["line 0 3.500", "line 1 2.500", "even 1.250"]


def test_equal_numbers_give_equal_bytes_whatever_a_user_has_set_for_other_plots() -> None:
    program = (
        "import sys, matplotlib; matplotlib.rcParams.update({'font.size': 30, 'grid.alpha': 0.1})\n"
        "sys.path[:0] = sys.argv[1:]\n"
        "from test_charts import chart, draw\n"
        "sys.stdout.write(draw(chart([3.0, 2.0])) * 2)"
    )
    command = [sys.executable, "-c", program, *sys.path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == draw(chart([3.0, 2.0])) * 2


def test_a_chart_reaches_for_nothing_outside_it() -> None:
    svg = draw(chart([3.0, 2.0], [1.0, 2.0]))
    for reached in ("href", "http", "url(", "<style", " id=", "class=", "script", "font-family"):
        assert reached not in svg, reached
    root = fromstring(svg)
    assert root.get("role") == "img"
    assert root[0].tag == "title" and root[0].text == "Loss against tokens."


def test_a_chart_has_the_pages_colours_and_as_a_file_its_own() -> None:
    page, file = (draw(chart([3.0, 2.0], [1.0, 2.0]), on_paper=paper) for paper in (False, True))
    assert {"c0", "c1", "quiet", "ink"} <= set(re.findall(r"var\(--(\w+)\)", page))
    assert not re.search(r"#[0-9a-f]{6}", page)
    assert "var(" not in file and 'xmlns="http://www.w3.org/2000/svg"' in file
    assert "#ffffff" in file and "#c0de" not in file


def test_names_are_shown_as_they_are() -> None:
    """Neither as markup nor as mathematics."""
    odd = Chart("a < b", "x", "y", (Line(0, "$<b>&\"'$", (Point(0, 1),)),), loss_text)
    plot = Plot(draw(odd))
    assert plot.labels == ["$<b>&\"'$ 1.000"]
    assert "$<b>&\"'$: 1.000" in plot.titles


def test_a_chart_has_its_numbers_as_a_table() -> None:
    band = Line(0, "ours", (Point(0, 3.0), Point(1000, 2.0, 1.5, 2.5)))
    shown = drawing(
        Chart("t", "tokens", "loss", (band, Line(1, "b", (Point(0, math.nan),))), loss_text)
    )
    assert shown.head == ["tokens", "ours", "b"]
    assert shown.rows == [["0", "3.000", "NaN"], ["1,000", "2.000 (1.500 to 2.500)", MISSING]]


def test_a_chart_that_counts_things_begins_at_the_first() -> None:
    counted = Chart(
        "t", "experts", "y", (Line(0, "a", (Point(1, 1), Point(3, 2))),), loss_text, whole=True
    )
    assert Plot(draw(counted)).across.keys() == {1, 2, 3}


def test_without_a_number_nothing_is_drawn() -> None:
    assert worth_drawing(chart([math.nan, math.inf])) is None
    assert worth_drawing(chart()) is None
    assert worth_drawing(chart([math.nan, 1.0])) is not None
    draw(chart([7.0]))  # one point alone


def test_colour_and_marker_together_tell_24_lines_apart() -> None:
    lines = [Line(n, "", ()) for n in range(24)]
    assert len({(line.colour, line.marker) for line in lines}) == 24


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (2.31, 2.32), (3, 3), (0, 0), (1.9, 11), (0, 3e9)]
)
def test_ticks_are_few_and_span_the_values(low: float, high: float) -> None:
    values = ticks(low, high)
    assert values[0] <= low and high <= values[-1]
    assert 2 <= len(values) <= 8
    assert values == sorted(set(values))


def test_labels_stand_apart_within_the_plot_and_in_order() -> None:
    places = apart([50, 50.5, 10, 51, 99, 100, 98], 5, 0, 100)
    order = sorted(range(7), key=lambda index: [50, 50.5, 10, 51, 99, 100, 98][index])
    ordered = [places[index] for index in order]
    gaps = [after - before for before, after in itertools.pairwise(ordered)]
    assert min(gaps) >= 5 - 1e-6
    assert min(places) >= 0 and max(places) <= 100
    assert places[2] == 10 and places[1] == pytest.approx(50.5)
    assert apart([], 5, 0, 100) == []


@pytest.mark.parametrize("number", [1, 3, 30, 60])
def test_labels_of_many_lines_do_not_overlap(number: int) -> None:
    """Each is a line of text of its own, none above or below the plot."""
    svg = draw(chart(*([3.0, 2.0 + n / 100] for n in range(number))))
    plot = Plot(svg)
    labels = [part for text, part in plot.texts if text.startswith("line ")]
    assert len(labels) == number
    places = sorted(float(part.get("y", "")) for part in labels)
    assert all(after - before >= 13.9 for before, after in itertools.pairwise(places))
    top, bottom = min(plot.upward.values()), max(plot.upward.values())
    assert top - 10 <= places[0] and places[-1] <= bottom + 10
    assert label_places([0.0], 10, 100) == [10]
