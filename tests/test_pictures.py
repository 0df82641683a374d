"""The pictures of docs/explanation/methods.md say what two runs have measured."""

import re
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import fromstring

import pytest

from pictures import OURS, PAPER, fit, losses, pictures, svg
from symphony_moe.runs.metrics import Metrics

DOCS = Path(__file__).parent.parent / "docs" / "explanation"


def metrics(built: float, trained: float, first: float) -> Metrics:
    """Of two sources in two layers; a share of `first` goes to the first expert on its own text."""
    share = {"a": [[first, 1 - first]] * 2, "b": [[0.25, 0.75]] * 2, "other": [[0.5, 0.5]] * 2}
    step = {"error": [0.9, 0.3]}
    content: dict[str, Any] = {
        "sources": {"a": {"a": 1.0, "b": 5.0}, "b": {"a": 4.0, "b": 2.0}},
        "built": {"a": built, "b": built + 1, "other": built + 2},
        "trained": {"a": trained, "b": trained + 1, "other": trained + 2},
        "alignment": {"residual": {"b": {"before": [0.01, 0.02], "after": [0.6, 0.7]}}},
        "fit": {"layers": [{"experts": step, "refinement": {"error": [0.3, 0.2]}}] * 2},
        "routing": {"trained": {"experts": ["a", "b"], "share": share}},
    }
    return Metrics.model_validate(content)


RUNS = metrics(2.0, 1.5, 0.9375), metrics(3.0, 2.5, 0.5)


def places(picture: str, colour: str) -> list[float]:
    """How far to the right the marks of a colour are, from the left, without the two of the legend,
    which is above all."""
    marks = re.findall(r'<path [^>]*translate\(([\d.]+) ([\d.]+)\)"[^>]*style="([^"]*)"', picture)
    drawn = [(float(y), float(x)) for x, y, style in marks if f"stroke: {colour}" in style]
    return sorted(x for _, x in sorted(drawn)[2:])


def test_losses_stand_where_their_numbers_put_them() -> None:
    picture = svg(lambda: losses(*RUNS), "Losses")
    ours, paper = places(picture, OURS), places(picture, PAPER)
    scale = (paper[5] - ours[0]) / (5.0 - 1.5)
    assert scale > 10
    for place, value in zip(ours, (1.5, 2.0, 2.5, 3.0, 3.5, 4.0), strict=True):
        assert place == pytest.approx(ours[0] + scale * (value - 1.5), abs=0.05)


def test_the_shares_of_the_experts_are_means_over_layers() -> None:
    texts = [part.text for part in fromstring(pictures(*RUNS)["routing.svg"]).iter() if part.text]
    cells = [text for text in texts if text.endswith(" %")]
    assert cells == ["50 %", "50 %", "25 %", "75 %", "94 %", "6 %", "25 %", "75 %"]
    assert "other" not in texts, "a domain without an expert"


def test_every_picture_stands_by_itself_and_is_the_same_every_time() -> None:
    first, second = pictures(*RUNS), pictures(*RUNS)
    assert first == second
    for name, text in first.items():
        root = fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg", name
        assert root.get("aria-label"), name
        assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
        # Nothing is looked up in a page: no variable of its style, no part by its id.
        assert not re.search(r"var\(|url\(|href|<style", text), name


def test_the_pages_show_all_of_them() -> None:
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    for name in pictures(*RUNS):
        assert f"]({name})" in page
        assert fromstring((DOCS / name).read_text(encoding="utf-8")).get("viewBox")


def test_a_run_without_a_fit_is_refused() -> None:
    with pytest.raises(SystemExit, match="is it one of harmonized"):
        fit(RUNS[0].model_copy(update={"fit": None}))
