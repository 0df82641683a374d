"""Reads the SVG of a chart back into numbers, by the names on its axes."""

import re
from xml.etree.ElementTree import Element, fromstring

Points = list[tuple[float, float]]


def number_of(text: str) -> float | None:
    """What stands at a mark of an axis: `2.5`, `500k`, `1M`."""
    found = re.fullmatch(r"(-?[\d.]+)([kMB]?)", text.replace("\N{MINUS SIGN}", "-"))
    return float(found[1]) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9}[found[2]] if found else None


class Plot:
    """`across` and `upward`: value -> place of the marks of an axis. `titles`: of all marks."""

    def __init__(self, svg: str) -> None:
        self.root = fromstring(svg)
        self.texts = [(part.text or "", part) for part in self.root.iter("text")]
        self.titles = [part.text or "" for part in self.root.iter("title")]
        grid = [path for path in self._paths() if "stroke: var(--line)" in path.get("style", "")]
        heights = [coordinates(path)[0][1] for path in grid]
        self.across = {
            value: float(part.get("x", ""))
            for text, part in self.texts
            if "middle" in part.get("style", "") and (value := number_of(text)) is not None
        }
        names = [text for text, part in self.texts if "anchor: end" in part.get("style", "")]
        values = [number_of(name) for name in names]
        self.upward = {v: y for v, y in zip(values, heights, strict=True) if v is not None}

    def _paths(self) -> list[Element]:
        return list(self.root.iter("path"))

    def line(self, name: str) -> list[Points]:
        """The parts of a line, in the numbers of the axes."""
        return [
            [(_value(self.across, x), _value(self.upward, y)) for x, y in coordinates(path)]
            for group in self.root.iter("g")
            if group.findtext("title") == name
            for path in group.iter("path")
            if "fill: none" in path.get("style", "")
        ]

    @property
    def colours(self) -> dict[str, str]:
        """Name of a line -> its colour."""
        return {
            title.text or "": found[1]
            for group in self.root.iter("g")
            for title, path in zip(group.iter("title"), group.iter("path"), strict=False)
            if (found := re.search(r"fill: none; .*stroke: ([^;]+)", path.get("style", "")))
        }

    def bands(self, number: int) -> list[Points]:
        """The outlines of what lies around a line, in the numbers of the axes."""
        found = []
        for path in self._paths():
            if f"fill: var(--c{number}); fill-opacity" in path.get("style", ""):
                moved = re.search(r"translate\(\S+ (\S+)\)", path.get("transform", ""))
                down = float(moved[1]) if moved else 0.0
                found.append(
                    [
                        (_value(self.across, x), _value(self.upward, y + down))
                        for x, y in coordinates(path)
                    ]
                )
        return found

    @property
    def _labels(self) -> list[tuple[str, Element]]:
        """What stands beside the ends of the lines."""
        texts = [(text, part) for text, part in self.texts if "start" in part.get("style", "")]
        return texts[1:]  # the first names the axis

    @property
    def labels(self) -> list[str]:
        return [text for text, _ in self._labels]

    @property
    def label_heights(self) -> list[float]:
        return [float(part.get("y", "")) for _, part in self._labels]


def _value(marks: dict[float, float], place: float) -> float:
    (low, start), (high, end) = sorted(marks.items())[:2]
    return low + (place - start) / (end - start) * (high - low)


def coordinates(path: Element) -> Points:
    numbers = [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", path.get("d", ""))]
    return list(zip(numbers[::2], numbers[1::2], strict=True))
