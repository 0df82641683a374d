"""What is said of the programs that read a model: by a plan, by the README, and by what was
measured."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import VARIANTS
from engine_table import COLUMNS, FILE, PAGES, with_table
from symphony_moe import pipeline
from symphony_moe.cli import describe_plan, main
from symphony_moe.engines import TRIED, readings
from symphony_moe.recipe import load_recipe


@pytest.fixture(scope="module")
def measured() -> Any:
    return json.loads(FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_the_measured_table(page: Path, measured: Any) -> None:
    text = page.read_text(encoding="utf-8")
    assert with_table(text, measured) == text
    assert text.count("<!-- engines") == 1


def test_everything_that_is_said_was_measured(measured: Any) -> None:
    """Every program was asked about every model, built and trained, and did what is said of it."""
    asked = {name for names in COLUMNS.values() for name in names}
    assert list(COLUMNS) == list(TRIED)
    architectures = set()
    for case in measured.values():
        assert case["programs"].keys() == asked
        architectures.add(case["architecture"])
        for program in case["programs"].values():
            found = {program["built"]["verdict"], program["trained"]["verdict"]}
            assert found == {program["said"]}
    assert architectures == {"mixtral", "ernie4_5_moe", "qwen3_moe", "granitemoe", "jetmoe"}


def said(recipe: Path, *settings: str) -> dict[str, tuple[str, str]]:
    """Program -> (verdict, why) of a plan."""
    plan = pipeline.plan(load_recipe(recipe, settings))
    return {reading.program: (reading.verdict, reading.why) for reading in plan.readers}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_plan_names_every_program(variant: str, recipes: Callable[[str], Path]) -> None:
    plan = pipeline.plan(load_recipe(recipes(variant)))
    assert [reading.program for reading in plan.readers] == list(TRIED)
    assert plan.readers[0].verdict == "exact"
    for reading in plan.readers:
        assert reading.verdict == "exact" or reading.why
    assert plan.to_json()["readers"][0] == {
        "program": "transformers 5", "verdict": "exact", "why": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "settings", "expected"),
    [
        ("llama", (), {"vLLM": "exact", "llama.cpp": "exact", "MLX": "exact"}),
        ("llama-tied-rope3", (), {"llama.cpp": "exact", "MLX": "other"}),
        ("llama-tied-rope3", ("output.architecture=granitemoe",), {"MLX": "exact"}),
        ("mistral", (), {"vLLM": "exact", "llama.cpp": "other", "MLX": "refused"}),
        ("qwen2", (), {"vLLM": "exact", "llama.cpp": "refused", "MLX": "refused"}),
        ("qwen2-granitemoe", (), {"vLLM": "other", "llama.cpp": "exact", "MLX": "exact"}),
        ("qwen3", (), {"vLLM": "exact", "llama.cpp": "exact", "MLX": "exact"}),
        ("llama", ("method=bam",), {"vLLM": "other", "llama.cpp": "refused", "MLX": "refused"}),
    ],
)
def test_a_plan_says_who_reads_the_result(
    variant: str, settings: tuple[str, ...], expected: dict[str, str],
    recipes: Callable[[str], Path],
) -> None:  # fmt: skip
    found = said(recipes(variant), *settings)
    assert {program: found[program][0] for program in expected} == expected


def test_what_nobody_tried_is_not_called_exact() -> None:
    """YaRN, which no measured model has."""
    config = {
        "model_type": "qwen3_moe", "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    }  # fmt: skip
    found = {reading.program: reading for reading in readings(config)}
    assert found["transformers 5"].verdict == "exact"
    assert {found[p].verdict for p in TRIED if p != "transformers 5"} == {"untried"}
    assert str(found["vLLM"]) == "vLLM: not tried (with RoPE of the type yarn)"


def test_a_sentencepiece_tokenizer_is_cut_otherwise_by_llama_cpp() -> None:
    config = {"model_type": "qwen3_moe"}
    plain, pieces = (
        next(r for r in readings(config, sentencepiece=kind) if r.program == "llama.cpp")
        for kind in (False, True)
    )
    assert (plain.verdict, plain.why) == ("exact", "")
    assert pieces.verdict == "exact" and "after a special token" in pieces.why


def test_the_command_says_it(
    recipes: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(recipes("mistral"))]) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"\n  llama\.cpp: loads it and ANSWERS OTHERWISE \(.* window of 16 tok", printed
    )
    plan = pipeline.plan(load_recipe(recipes("mistral")))
    assert describe_plan(plan).count("\nread by\n") == 1
