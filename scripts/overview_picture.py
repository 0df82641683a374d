"""The picture of README: what goes in, what comes out, and what the numbers are.

    python scripts/strange_parameters.py --out strange
    python scripts/overview_picture.py strange/results.json --out docs/overview.svg

Losses and sizes are those of the study's results.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from strange_parameters import DOMAINS, limit_of, mean_of

WIDTH, HEIGHT = 860, 452
COLOURS = ("#3d6fd6", "#c2571a", "#2c8a4b")
"""Of the sources and their experts."""
STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1c2430; }
.small { font-size: 12.5px; fill: #55606e; }
.bold { font-weight: 600; }
.light { fill: #ffffff; }
.box { fill: #eef1f5; stroke: #b9c2cc; }
.line { stroke: #7a8694; fill: none; stroke-width: 1.5; }
.other { fill: #a3adb8; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6eaf0; }
  .small { fill: #a7b1bd; }
  .box { fill: #232a33; stroke: #4a5563; }
  .line { stroke: #98a3b0; }
  .other { fill: #6c7784; }
}
"""
SHOWN = {
    "harmonized": "symphony, method harmonized",
    "btx": "plain mean, method btx",
    "mergekit-moe": "mergekit-moe",
}
"""Method -> what its bar is called, from the best."""


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """A line of words."""
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: float, y: float, size: tuple[float, float], fill: str | None = None) -> str:
    """A rounded box, filled with a colour or as the page has boxes."""
    look = 'class="box"' if fill is None else f'fill="{fill}"'
    return f'<rect x="{x}" y="{y}" width="{size[0]}" height="{size[1]}" rx="8" {look}/>'


def arrow(x: float, y: float, length: float) -> str:
    """From left to right."""
    end = x + length
    return (
        f'<path class="line" d="M{x} {y}H{end}"/>'
        f'<path class="line" d="M{end - 7} {y - 5}L{end} {y}L{end - 7} {y + 5}"/>'
    )


def sources(found: Mapping[str, Any], size: str) -> list[str]:
    """What goes in."""
    parts = [text(20, 28, "In: models of one family", "bold")]
    for number, (name, domain) in enumerate(DOMAINS.items()):
        y = 44 + 66 * number
        loss = found[f"source, {name}: losses"][name]
        parts += [
            box(20, y, (210, 54), COLOURS[number]),
            text(34, y + 23, f"{name}, {size}", "light bold"),
            text(34, y + 42, f"{loss:.2f} nats on {domain}", "light"),
        ]
    return parts


def model(sizes: str) -> list[str]:
    """What comes out."""
    parts = [
        arrow(238, 137, 130),
        text(303, 120, "align, merge, fit", "", "middle"),
        text(303, 160, "no training needed", "small", "middle"),
        text(380, 28, "Out: one Mixtral", "bold"),
        text(840, 28, sizes, "small", "end"),
        box(380, 44, (460, 186)),
        text(396, 70, "each layer", "small"),
        box(396, 82, (180, 130)),
        text(486, 132, "attention, norms", "", "middle"),
        text(486, 152, "merged and fitted", "small", "middle"),
        arrow(578, 147, 44),
        text(600, 136, "router", "small", "middle"),
    ]
    for number, name in enumerate(DOMAINS):
        y = 82 + 46 * number
        parts += [
            box(630, y, (194, 38), COLOURS[number]),
            text(727, y + 24, f"expert {name}", "light", "middle"),
        ]
    return parts


def bars(found: Mapping[str, Any]) -> list[str]:
    """What the numbers are: of the fine-tunes in strange parameters."""
    losses = {words: mean_of(found[f"strange, {name}: losses"]) for name, words in SHOWN.items()}
    rows = {"each source on its own text": limit_of(found), **losses}
    scale = 420 / max(rows.values())
    parts = [
        text(20, 272, "Held-out nats per token, the mean of the three kinds of text", "bold"),
        text(
            20,
            292,
            "The fine-tunes are written in strange parameters: the same models, in other "
            "coordinates. Lower is better.",
            "small",
        ),
    ]
    for number, (name, loss) in enumerate(rows.items()):
        y = 310 + 34 * number
        fill = f'fill="{COLOURS[0]}"' if name == SHOWN["harmonized"] else 'class="other"'
        width = round(loss * scale, 1)
        parts += [
            text(250, y + 17, name, "", "end"),
            f'<rect x="262" y="{y}" width="{width}" height="24" rx="3" {fill}/>',
            text(272 + width, y + 17, f"{loss:.2f}", "bold"),
        ]
    return parts


def draw(found: Mapping[str, Any]) -> str:
    """The whole picture, as SVG."""
    sizes = found["sizes"]
    words = f"{sizes['total'] / 1e6:,.0f} M parameters, {sizes['active'] / 1e6:,.0f} M active"
    parts = sources(found, f"{sizes['source'] / 1e6:,.0f} M") + model(words) + bars(found)
    title = "Three models go in, one Mixtral with three experts comes out, and what they lose."
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        f"<title>{title}</title><style>{STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/overview.svg"))
    options = parser.parse_args(arguments)
    found = json.loads(options.results.read_text(encoding="utf-8"))
    options.out.write_text(draw(found), encoding="utf-8")


if __name__ == "__main__":
    main()
