"""What matplotlib has drawn as a part of a page: in the page's colours, and without anything that
reaches beyond it."""

import re
from collections.abc import Iterator, Mapping
from xml.etree.ElementTree import Element, fromstring, tostring

COLOURS = [f"c{number}" for number in range(8)]
"""Of lines: `--c0` and on in `page.css`."""

PLACEHOLDERS = {
    name: f"#c0de{number:02x}"
    for number, name in enumerate([*COLOURS, "ink", "quiet", "line", "page"])
}
"""Colour of a page -> what matplotlib is told in its place."""

_PAPER = {
    "c0": "#0072b2",
    "c1": "#d55e00",
    "c2": "#009e73",
    "c3": "#cc79a7",
    "c4": "#56b4e9",
    "c5": "#a87b00",
    "c6": "#000000",
    "c7": "#777777",
    "ink": "#14140f",
    "quiet": "#5b5a55",
    "line": "#dddcd4",
    "page": "#ffffff",
}
"""Colours of a chart that is a file of its own."""

_SVG = "http://www.w3.org/2000/svg"


def part_of_page(svg: str, title: str, titles: set[str], *, on_paper: bool) -> str:
    """The SVG without what would reach beyond it in a page: style rules, ids, links, metadata.

    `title` says what the whole of it shows, `titles` which names of parts are shown where somebody
    points at them. `on_paper`: a file of its own."""
    root = fromstring(svg)
    shapes = {name: part for part in root.iter() if (name := part.get("id"))}
    kept = {"viewBox": root.get("viewBox", ""), "role": "img", "aria-label": title}
    if on_paper:
        kept |= {"xmlns": _SVG, "font-family": "sans-serif"}
    clean = Element("svg", kept)
    clean.append(_title(title))
    for part in root:
        clean.extend(_parts(part, shapes, titles))
    text = tostring(clean, encoding="unicode")
    names = {colour: name for name, colour in PLACEHOLDERS.items()}
    return re.sub(
        "|".join(names),
        lambda found: _PAPER[names[found[0]]] if on_paper else f"var(--{names[found[0]]})",
        text,
    )


def _parts(part: Element, shapes: Mapping[str, Element], titles: set[str]) -> Iterator[Element]:
    """What is shown of an element, with as few elements as that takes."""
    tag = part.tag.rpartition("}")[2]
    if tag in ("metadata", "defs"):
        return
    if tag == "g":
        inside = [shown for child in part for shown in _parts(child, shapes, titles)]
        if (name := part.get("id", "")) not in titles:
            yield from inside
            return
        group = Element("g")
        group.append(_title(name))
        group.extend(inside)
        yield group
        return
    style = part.get("style", "")
    if tag == "use":  # a marker: the shape itself, where it is used
        reference = next(value for key, value in part.items() if key.endswith("href"))
        shape = shapes[reference.removeprefix("#")]
        move = f"translate({part.get('x', '0')} {part.get('y', '0')})"
        style = "; ".join(filter(None, (style, shape.get("style", ""))))
        shown = Element("path", {"d": shape.get("d", ""), "transform": move})
    else:
        names = ("d", "x", "y")
        shown = Element(tag, {name: part.get(name, "") for name in names if part.get(name)})
        shown.text = part.text if tag == "text" else None
    shown.set("style", re.sub(r"font-family: [^;]*;? ?", "", style))
    for name in ("d", "x", "y", "transform"):
        if name in shown.attrib:
            rounded = re.sub(
                r"-?\d+\.\d+", lambda found: f"{float(found[0]):.2f}", shown.get(name, "")
            )
            shown.set(name, " ".join(rounded.split()))
    yield shown


def _title(text: str) -> Element:
    title = Element("title")
    title.text = text
    return title
