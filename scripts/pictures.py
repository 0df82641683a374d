"""The pictures of docs/explanation/methods.md, from two runs of `symphony demo`.

    symphony demo --out demo
    python scripts/pictures.py demo demo-paper --out docs/explanation

The first run is by `harmonized`, the second by the paper's method, of the same sources and text.
Every number is one of their metrics.json. Equal numbers give equal bytes.
"""

import argparse
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from symphony_moe.reporting.numbers import mean
from symphony_moe.reporting.svg import part_of_page
from symphony_moe.runs.folder import RunFolder
from symphony_moe.runs.metrics import FitStep, Metrics, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, PAPER, SOURCE, QUIET = "#0072b2", "#d55e00", "#14140f", "#5b5a55"
SOURCES = ["#000000", "#0072b2", "#d55e00", "#009e73"]
"""Colour-blind safe, as in the reports."""


def losses(ours: Metrics, paper: Metrics) -> "Figure":
    """Held-out loss by domain: the source of the domain, and both methods before and after the
    training."""
    figure, (axes,) = _figure(1, height=4.3)
    domains = list(ours.built)
    marks: list[tuple[str, Mapping[str, float], str, str, str]] = [
        ("the paper's method, built", paper.built, PAPER, "o", "white"),
        ("the paper's method, trained", paper.trained, PAPER, "o", PAPER),
        ("harmonized, built", ours.built, OURS, "s", "white"),
        ("harmonized, trained", ours.trained, OURS, "s", OURS),
        ("the domain's own source", _own(ours), SOURCE, "|", SOURCE),
    ]
    for label, of, colour, marker, face in marks:
        shown = [(of[name], len(domains) - row) for row, name in enumerate(domains) if name in of]
        axes.plot(
            *zip(*shown, strict=True),
            linestyle="none",
            marker=marker,
            color=colour,
            markerfacecolor=face,
            markersize=16 if marker == "|" else 9,
            markeredgewidth=2,
            label=label,
        )
    axes.set_yticks(range(len(domains), 0, -1), domains)
    axes.set_ylim(0.4, len(domains) + 0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("held-out loss, nats per token: lower is better")
    _explain(figure, columns=3)
    figure.subplots_adjust(left=0.14, right=0.97, bottom=0.14, top=0.8)
    return figure


def _own(metrics: Metrics) -> dict[str, float]:
    """Source -> its loss on its own domain."""
    return {name: of[name] for name, of in metrics.sources.items() if name in of}


def alignment(ours: Metrics) -> "Figure":
    """How alike each source's stream is to the anchor's, before and after the rotation."""
    figure, (axes,) = _figure(1, height=3.5)
    for (name, of), colour in zip(ours.alignment["residual"].items(), SOURCES[1:], strict=False):
        layers = range(len(of.before))
        axes.plot(layers, of.before, color=colour, linestyle=(0, (2, 2)), linewidth=1.8)
        axes.plot(layers, of.after, color=colour, linewidth=2.4, marker="o", label=name)
    axes.plot([], [], color=QUIET, linestyle=(0, (2, 2)), linewidth=1.8, label="before")
    axes.set_xticks(range(len(of.before)))
    axes.set_ylim(-0.1, 1)
    axes.set_xlabel("layer")
    _name_upward(axes, "cosine with the anchor's stream")
    _explain(figure, columns=4)
    figure.subplots_adjust(left=0.08, right=0.97, bottom=0.17, top=0.78)
    return figure


def fit(ours: Metrics) -> "Figure":
    """Error of each layer after each step of its fit."""
    figure, (axes,) = _figure(1, height=3.5)
    if ours.fit is None:
        raise SystemExit("the first run has no fit: is it one of harmonized?")
    layers = ours.fit.layers
    bars = {
        "before its experts are fitted": [_error(layer.experts)[0] for layer in layers],
        "after least squares": [_error(layer.experts)[1] for layer in layers],
        "after gradient steps": [_error(layer.refinement)[1] for layer in layers],
    }
    width = 0.26
    for place, ((label, heights), colour) in enumerate(
        zip(bars.items(), ["#bbbab4", "#56b4e9", OURS], strict=True)
    ):
        at = [layer + (place - 1) * width for layer in range(len(heights))]
        axes.bar(at, heights, width * 0.92, color=colour, label=label)
    axes.set_xticks(range(len(layers)), [f"layer {number}" for number in range(len(layers))])
    _name_upward(axes, "error of the layer on validation text")
    _explain(figure, columns=3)
    figure.subplots_adjust(left=0.08, right=0.97, bottom=0.11, top=0.78)
    return figure


def _error(step: FitStep | None) -> tuple[float, float]:
    """Before a step and after it."""
    if step is None or step.error is None:
        raise SystemExit("the first run's fit has no errors of each step: build it anew")
    return step.error


def routing(ours: Metrics, paper: Metrics) -> "Figure":
    """Which expert takes which domain's text, mean over layers, of both trained models."""
    figure, both = _figure(2, height=3.5)
    named = [("the paper's method, trained", paper), ("harmonized, trained", ours)]
    for axes, (title, metrics) in zip(both, named, strict=True):
        of = metrics.routing["trained"]
        domains = [name for name in of.share if name in of.experts]
        table = [
            [mean([layer[expert] for layer in of.share[name]]) for expert in range(len(of.experts))]
            for name in domains
        ]
        _draw_table(axes, table, domains, of.experts)
        _name_upward(axes, title)
    figure.subplots_adjust(left=0.13, right=0.99, bottom=0.1, top=0.88, wspace=0.36)
    return figure


def _draw_table(
    axes: "Axes", table: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str]
) -> None:
    """Cells, the darker the larger, with their per cent."""
    from matplotlib.patches import Rectangle

    for row, values in enumerate(table):
        for column, value in enumerate(values):
            shade = min(1.0, 2 * value)  # half of all places is the most for two experts a token
            colour = tuple(1 - shade * (1 - part) for part in (0.0, 0.447, 0.698))
            axes.add_patch(Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, color=colour))
            text = "white" if shade > 0.6 else SOURCE
            axes.text(column, row, f"{100 * value:.0f} %", ha="center", va="center", color=text)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks(range(len(columns)), columns, fontsize=10.5)
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(visible=False)


def _figure(columns: int, height: float) -> tuple["Figure", list["Axes"]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, height), dpi=72)
    places = [figure.add_subplot(1, columns, number + 1) for number in range(columns)]
    for axes in places:
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.tick_params(length=0, labelcolor=QUIET)
        axes.grid(axis="both", color="#dddcd4", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, places


def _explain(figure: "Figure", columns: int) -> None:
    """The legend, above the plot."""
    figure.legend(
        loc="upper left",
        ncols=columns,
        frameon=False,
        borderaxespad=0.2,
        handletextpad=0.5,
        columnspacing=1.4,
    )


def _name_upward(axes: "Axes", text: str) -> None:
    """What the vertical axis is, above it: turned text would be lost in `part_of_page`."""
    axes.set_title(text, loc="left", x=0, pad=10, fontsize=12, color=QUIET)


def svg(draw: Callable[[], "Figure"], title: str) -> str:
    """A picture as a file of its own."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "symphony"}
        matplotlib.rcParams |= {"font.size": 12}
        file = io.StringIO()
        draw().savefig(file, format="svg", metadata={"Date": None})
    return part_of_page(file.getvalue(), title, set(), on_paper=True) + "\n"


def pictures(ours: Metrics, paper: Metrics) -> dict[str, str]:
    """Name of the file -> SVG."""
    return {
        "losses.svg": svg(
            lambda: losses(ours, paper),
            "Held-out loss by domain: each domain's own source, the paper's method and harmonized, "
            "built and trained.",
        ),
        "alignment.svg": svg(
            lambda: alignment(ours),
            "Cosine of each source's residual stream with the anchor's, before and after it was "
            "rotated.",
        ),
        "fit.svg": svg(lambda: fit(ours), "Error of each layer after each step of its fit."),
        "routing.svg": svg(
            lambda: routing(ours, paper), "Which expert takes which domain's text, in per cent."
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ours", type=Path, help="run folder of harmonized")
    parser.add_argument("paper", type=Path, help="run folder of the paper's method")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    metrics = [read_metrics(RunFolder(folder)) for folder in (options.ours, options.paper)]
    for name, text in pictures(*metrics).items():
        (options.out / name).write_text(text, encoding="utf-8")
        print(f"wrote {options.out / name}")


if __name__ == "__main__":
    main()
