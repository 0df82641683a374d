"""A plan as one self-contained HTML page.

A pure function of the plan and its recipe, in the style of the report. `plan.html.j2` has the
markup.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from symphony_moe.recipe.settings import Recipe
from symphony_moe.reporting.lineage import lineage
from symphony_moe.reporting.numbers import count, duration, in_words, percent, size
from symphony_moe.reporting.page import fill, title
from symphony_moe.reporting.run_page import by_value, header_facts, other_notes

_PARTS = (
    ("FFNs of layers without experts", r"mlp\.(gate|up|down)_proj\."),
    ("Shared experts", r"shared_expert"),
    ("Routers", r"(gate|router)(\.layer)?\.(weight|bias)$|moe_statics"),
    ("Token embeddings and head", r"embed_tokens|lm_head"),
    ("Attention", r"self_attn|self_attention"),
    ("Norms", r"norm"),
    ("Experts", r""),
)
"""Part of the model -> what is in the names of its tensors; the first that fits."""

_EVALUATED_BYTES = 4
"""For a parameter: float32 weights."""


def render_plan(plan: Mapping[str, Any], recipe: Recipe) -> str:
    """The plan as HTML. `plan` is `Plan.to_json()`."""
    return fill(
        "plan.html.j2",
        recipe=recipe,
        plan=plan,
        title=f"Plan: {title(recipe.sources)[0].lower()}{title(recipe.sources)[1:]}",
        facts=plan_facts(plan, recipe),
        lineage=lineage(plan, recipe),
        likeness=_likeness(plan, recipe),
        parts=parameters_by_part(plan["tensors"]),
        costs=_costs(plan, recipe),
        texts=_texts(recipe),
        differences=by_value(plan["differences"]),
        readers=_readers(plan["readers"]),
        notes=other_notes(plan),
        warnings=plan.get("warnings", []),
        recipe_yaml=recipe.to_yaml(),
    )


def plan_facts(plan: Mapping[str, Any], recipe: Recipe) -> list[tuple[str, str]]:
    """What will be built and what it takes, as (what, value)."""
    return [
        *header_facts(plan, recipe),
        ("Time of the build", f"about {duration(plan['seconds'])}"),
        ("Memory of the build", f"about {size(plan['peak_memory_bytes'])}"),
    ]


def parameters_by_part(
    tensors: Mapping[str, Sequence[int]],
) -> list[tuple[str, str, str, int]]:
    """(part of the model, its parameters, its share in words, the share in per cent)"""
    sums = dict.fromkeys((part for part, _ in _PARTS), 0)
    for name, shape in tensors.items():
        part = next(part for part, pattern in _PARTS if re.search(pattern, name))
        sums[part] += math.prod(shape)
    total = sum(sums.values())
    ordered = sorted(sums.items(), key=lambda one: -one[1])
    return [
        (part, in_words(number), percent(number / total), round(100 * number / total))
        for part, number in ordered
        if number
    ]


def _costs(plan: Mapping[str, Any], recipe: Recipe) -> list[tuple[str, str, str]]:
    """(what, how much, what it means)"""
    total = plan["total_parameters"]
    waiting = "in memory" if plan.get("streams_in_memory", True) else "in files under work/"
    costs = [
        (
            "Time of the build",
            f"about {duration(plan['seconds'])}",
            "From this machine's speed at multiplying matrices. A rough estimate.",
        ),
        (
            "Peak memory of the build",
            f"about {size(plan['peak_memory_bytes'])}",
            f"One layer of every source, and the text's hidden states, which wait {waiting}. "
            "--memory sets a limit.",
        ),
        (
            "Disk, for good",
            size(plan["disk_bytes"]),
            f"The weights in {plan['dtype']}, in {plan['shards']} file(s). Training writes as much "
            "again.",
        ),
        ("Disk, until the build ends", size(plan["work_bytes"]), "Under work/ in the run folder."),
    ]
    if seconds := plan.get("training_seconds"):
        costs.append(
            (
                "Time of the training",
                f"about {duration(seconds)}",
                "In one process. A rough estimate.",
            )
        )
    if peak := plan.get("training_peak_memory_bytes"):
        costs.append(
            (
                "Peak memory of the training",
                f"about {size(peak)}",
                "Weights in float32, gradients and AdamW's two moments of those that are trained "
                f"(train.scope: {recipe.train.scope}), and the activations of a batch.",
            )
        )
    return [
        *costs,
        (
            "Memory of the evaluation",
            f"{size(_EVALUATED_BYTES * total)} and the activations",
            "4 bytes for each parameter: weights in float32.",
        ),
    ]


def _texts(recipe: Recipe) -> list[tuple[str, str, str, str]]:
    """(stage, tokens, of what, tokens in a window)"""
    rows = []
    if recipe.needs_calibration:
        one = recipe.calibration
        of = "all sources together"
        rows.append(("Build (calibration)", count(one.tokens), of, count(one.sequence_length)))
    train, evaluation = recipe.train, recipe.evaluation
    return [
        *rows,
        (
            f"Training, {train.scope}",
            count(train.tokens),
            "all sources together",
            count(train.sequence_length),
        ),
        (
            "Evaluation",
            count(evaluation.tokens),
            "each domain, held out",
            count(evaluation.sequence_length),
        ),
    ]


def _likeness(plan: Mapping[str, Any], recipe: Recipe) -> list[tuple[str, str, str]]:
    """(source, mean cosine of its weights and the anchor's, what they are to each other)"""
    found = plan.get("likeness") or {}
    if not found:
        return []
    from symphony_moe.sources.kinship import kinship, two_digits

    return [(name, two_digits(cosine), kinship(cosine)) for name, cosine in found.items()]


def _readers(readers: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """(program, versions that were asked, what it makes of the model, why)"""
    from symphony_moe.model.engines import TRIED, Reading

    found = []
    for one in readers:
        words = str(Reading(one["program"], one["verdict"])).partition(": ")[2]
        found.append((one["program"], TRIED.get(one["program"], ""), words, one["why"]))
    return found
