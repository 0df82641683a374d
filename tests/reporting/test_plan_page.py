"""The page of a plan says what the plan says: whole, escaped, self-contained."""

import copy
import math
import re
import subprocess
import sys
from typing import Any

from test_report import changed, sample_plan, sample_recipe

from checks import Page
from symphony_moe.reporting.plan_page import parameters_by_part, render_plan
from symphony_moe.reporting.run_page import by_value


def whole_plan() -> dict[str, Any]:
    readers = [
        {"program": "transformers 5", "verdict": "exact", "why": ""},
        {"program": "MLX", "verdict": "other", "why": "it reads no window"},
    ]
    return sample_plan() | {
        "readers": readers,
        "streams_in_memory": False,
        "training_seconds": 7320.0,
        "training_peak_memory_bytes": 19_500_000_000,
        "likeness": {"maths": 0.95, "code": 0.001},
    }


def rendered(plan: dict[str, Any] | None = None, **settings: Any) -> Page:
    return Page(render_plan(plan or whole_plan(), changed(sample_recipe(), **settings)))


def test_the_page_says_what_will_be_built_and_what_it_takes() -> None:
    page = rendered()
    words = page.words
    for fact in ("qwen3_moe", "1.12 billion", "860.38 million", "about 5 minutes and 12 seconds"):
        assert fact in words
    costs = {row[0]: row[1] for row in page.table("Estimates")}
    assert costs["Peak memory of the build"] == "about 3.5 GB"
    assert costs["Disk, for good"] == "2.2 GB"
    assert costs["Disk, until the build ends"] == "812.0 MB"
    assert costs["Time of the training"] == "about 2 hours and 2 minutes"
    assert costs["Peak memory of the training"] == "about 19.5 GB"
    # 4 bytes for each of 1,124,618,240 parameters.
    assert costs["Memory of the evaluation"] == "4.5 GB and the activations"
    assert "wait in files under work/" in words
    assert "(train.scope: all)" in words
    # A GPU trains, and an older version planned no training.
    unknown = whole_plan() | {"training_seconds": None}
    assert "Time of the training" not in rendered(unknown).words
    older = {k: v for k, v in whole_plan().items() if not k.startswith("training_")}
    assert "of the training" not in rendered(older).words
    texts = {row[0]: row[1] for row in page.table("Text that will be read")}
    assert texts["Build (calibration)"] == "262,144" and texts["Evaluation"] == "65,536"


def test_every_difference_is_there_with_what_it_means() -> None:
    page = rendered()
    (_, row) = page.table("In what the sources differ")
    assert row[0] == "rope_theta" and row[2:] == [
        "warning",
        "the anchor's is used for the whole model",
    ]
    assert row[1] == "general, maths: 10000code: 1000000"
    plan = whole_plan() | {"differences": []}
    assert "The sources do not differ" in rendered(plan).words
    assert "backbone.weights has no effect on attention" in page.words


def test_sources_of_one_value_stand_together() -> None:
    (found,) = by_value(sample_plan()["differences"])
    assert found["values"] == [("general, maths", "10000"), ("code", "1000000")]


def test_the_page_says_who_reads_the_result_and_what_sources_are_to_each_other() -> None:
    page = rendered()
    rows = page.table("Programs")
    assert rows[1][0] == "transformers 5" and rows[1][2] == "the same answers"
    assert rows[2][2:] == ["loads it, but gives WRONG ANSWERS", "it reads no window"]
    rows = page.table("How alike the weights are")
    assert rows[1:] == [["maths", "0.95", "branches"], ["code", "0.00", "strangers"]]
    plan = whole_plan() | {"likeness": {}}
    assert "How alike the weights are" not in rendered(plan).words


def test_parameters_are_counted_part_by_part() -> None:
    tensors = {
        "model.embed_tokens.weight": [10, 4],
        "model.layers.0.self_attn.q_proj.weight": [4, 4],
        "model.layers.0.input_layernorm.weight": [4],
        "model.layers.0.mlp.gate.weight": [2, 4],
        "model.layers.0.mlp.experts.0.gate_proj.weight": [8, 4],
        "model.layers.0.block_sparse_moe.router.layer.weight": [2, 4],
        "model.layers.0.block_sparse_moe.input_linear.weight": [2, 16, 4],
        "lm_head.weight": [10, 4],
    }
    total = sum(math.prod(shape) for shape in tensors.values())
    found = parameters_by_part(tensors)
    assert [(part, number) for part, number, _, _ in found] == [
        ("Experts", "160"),
        ("Token embeddings and head", "80"),
        ("Routers", "16"),
        ("Attention", "16"),
        ("Norms", "4"),
    ]
    assert found[0][2:] == (f"{100 * 160 / total:.1f} %", round(100 * 160 / total))


def test_ffns_that_every_token_goes_through_are_not_counted_as_experts() -> None:
    """The gate of a shared expert is a part of it, and no router."""
    tensors = {
        "model.layers.0.mlp.gate_proj.weight": [8, 4],
        "model.layers.0.mlp.up_proj.weight": [8, 4],
        "model.layers.0.mlp.down_proj.weight": [4, 8],
        "model.layers.1.mlp.gate.weight": [2, 4],
        "model.layers.1.mlp.experts.1.down_proj.weight": [4, 8],
        "model.layers.1.mlp.shared_expert.gate_proj.weight": [6, 4],
        "model.layers.1.mlp.shared_expert.down_proj.weight": [4, 6],
        "model.layers.1.mlp.shared_expert_gate.weight": [1, 4],
    }
    assert [row[:2] for row in parameters_by_part(tensors)] == [
        ("FFNs of layers without experts", "96"),
        ("Shared experts", "52"),
        ("Experts", "32"),
        ("Routers", "8"),
    ]


def test_names_are_escaped_and_the_page_loads_nothing() -> None:
    evil = "<script>alert('x')</script>&"
    plan = whole_plan()
    plan["sources"][0]["model"] = evil
    plan["notes"].append(evil)
    plan["differences"][0]["consequence"] = evil
    page = rendered(plan)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed")
        assert (attributes.get("href") or "#").startswith("#")
    assert page.text.count(evil) >= 3 and "<script" not in page.html
    assert not re.search(r"https?://|url\(|@import", page.html)


def test_rendering_is_pure() -> None:
    plan, recipe = whole_plan(), sample_recipe()
    before = copy.deepcopy((plan, recipe))
    assert render_plan(plan, recipe) == render_plan(plan, recipe)
    assert (plan, recipe) == before


def test_importing_the_module_is_cheap() -> None:
    program = (
        "import sys; import symphony_moe.reporting.plan_page;"
        "heavy = {'humanize', 'jinja2', 'matplotlib', 'torch', 'transformers'};"
        "sys.exit(str(sorted(heavy & sys.modules.keys())))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"


def test_warnings_come_first() -> None:
    assert "Warnings" not in rendered().words
    warned = rendered(whole_plan() | {"warnings": ["stage 1 takes about 53,000 MB"]}).words
    assert warned.index("stage 1 takes about 53,000 MB") < warned.index("What goes in")


def test_a_model_without_sparsity_is_said_to_be_so() -> None:
    assert "everything but the experts that it is not sent to" in rendered().words
    plan = whole_plan()
    dense = rendered(plan | {"active_parameters": plan["total_parameters"]}).words
    assert "A token passes through all of them." in dense
