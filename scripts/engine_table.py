"""The tables of programs in README.md and docs/engines.md, from what `make test-clients` measured.

    python scripts/engine_table.py

docs/engines.json has the measurements; the tables stand between two comments in each page.
"""

import json
from pathlib import Path
from typing import Any

from symphony_moe.model.engines import TRIED

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs" / "engines.json"
PAGES = (ROOT / "README.md", ROOT / "docs" / "engines.md")
COLUMNS = {
    "transformers 5": ("transformers-5.0", "transformers-5.24"),
    "transformers 4.57": ("transformers-4.57",),
    "vLLM": ("vllm",),
    "llama.cpp": ("llama.cpp",),
    "MLX": ("mlx",),
}
"""Column -> the environments whose results are in it; the worst counts."""
_STAR = (
    "\\*: with a SentencePiece tokenizer, llama.cpp splits spaces that begin a text, and text "
    "after a special token, into other tokens."
)
_WORDS = {"exact": "exact", "other": "**wrong**", "refused": "no"}


def _verdict(programs: dict[str, Any], names: tuple[str, ...]) -> str:
    """The worst of what was found, of both stages, with a star where texts are split into other
    tokens."""
    found = [
        programs[name][stage]
        for name in names
        if name in programs
        for stage in ("built", "trained")
    ]
    if len(found) < 2 * len(names):
        return "not tried"
    verdicts = {one["verdict"] for one in found}
    newest = {programs[names[-1]][stage]["verdict"] for stage in ("built", "trained")}
    if newest == {"exact"} != verdicts:
        old, new = (name.rpartition("-")[2] for name in (names[0], names[-1]))
        oldest = programs[names[0]]["built"]["verdict"]
        return f"exact in {new}, {_WORDS[oldest]} in {old}"
    worst = next(verdict for verdict in ("other", "refused", "exact") if verdict in verdicts)
    star = worst == "exact" and any(one["texts cut otherwise"] for one in found)
    return _WORDS[worst] + ("\\*" if star else "")


def table(measured: dict[str, Any], page: Path) -> str:
    """The table of a page, in Markdown: README has none of the layouts that `experts` asks for."""
    if page.name == "README.md":
        measured = {name: case for name, case in measured.items() if not case["layout"]}
    lines = [
        f"| sources | become | {' | '.join(COLUMNS)} |",
        f"|---|---|{'---|' * len(COLUMNS)}",
    ]
    for case in sorted(measured.values(), key=lambda case: (case["family"], case["architecture"])):
        cells = [_verdict(case["programs"], names) for names in COLUMNS.values()]
        lines.append(f"| {case['family']} | `{case['architecture']}` | {' | '.join(cells)} |")
    days = {p["day"] for case in measured.values() for p in case["programs"].values()}
    spread = " to ".join(sorted({min(days), max(days)}))
    versions = ", ".join(f"{name.split()[0]} {version}" for name, version in TRIED.items())
    notes = f"Measured on {spread} with {versions}. {_STAR}"
    return "\n".join([*lines, "", notes])


def with_table(page: str, name: str, rows: str) -> str:
    """A page with a table between the two comments of its name."""
    begin, end = f"<!-- {name}: `make test-clients` writes this table -->", f"<!-- /{name} -->"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{rows}\n\n{end}{after}"


def write_tables() -> None:
    """Write the table into every page that has it."""
    measured = json.loads(FILE.read_text(encoding="utf-8"))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(with_table(text, "engines", table(measured, page)), encoding="utf-8")


if __name__ == "__main__":
    write_tables()
