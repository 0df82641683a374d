"""The report is a pure function of what was measured: complete, escaped, self-contained."""

import copy
import itertools
import math
import re
import subprocess
import sys
from typing import Any

import pytest
from plots import Plot

from checks import Page
from symphony_moe.recipe.settings import Recipe
from symphony_moe.reporting.charts import draw
from symphony_moe.reporting.losses import loss_table
from symphony_moe.reporting.numbers import (
    MISSING,
    compact,
    duration,
    error_text,
    in_words,
    loss_text,
    mean_of_all,
    size,
)
from symphony_moe.reporting.routing import dynamic_curve
from symphony_moe.reporting.run_page import Beside, other_notes, render
from symphony_moe.reporting.tables import Shade, ceiling_share, shade
from symphony_moe.reporting.tasks import task_table
from symphony_moe.reporting.training import loss_chart, share_chart
from symphony_moe.runs.metrics import CurvePoint, DynamicRouting, Metrics
from symphony_moe.runs.samples import Samples

SOURCES = ["general", "maths", "code"]
DOMAINS = [*SOURCES, "medicine"]
KEYS = [
    "sources",
    "built",
    "trained",
    "alignment",
    "fit",
    "routing",
    "cka",
    "dynamic",
    "training",
    "timing",
]
BUILD = "symphony build RECIPE --out DIR"


def sample_recipe() -> Recipe:
    return Recipe.model_validate(
        {
            "sources": {
                name: {"model": f"org/{name}", "data": f"{name}.jsonl"} for name in SOURCES
            },
            "anchor": "general",
            "evaluation": {"extra": {"medicine": "medicine.jsonl"}},
            "method": "harmonized",
            "align": {"residual": "orthogonal", "heads": "all", "neurons": "activations"},
            "fit": {"method": "least-squares"},
        }
    )


def changed(recipe: Recipe, **settings: Any) -> Recipe:
    """With other settings (`fit__method` for `fit.method`), whatever the rules are."""
    for path, value in settings.items():
        section, _, name = path.partition("__")
        if name:
            value = getattr(recipe, section).model_copy(update={name: value})
        recipe = recipe.model_copy(update={section: value})
    return recipe


def sample_plan() -> dict[str, Any]:
    difference = {
        "what": "rope_theta",
        "values": {"general": "10000", "maths": "10000", "code": "1000000"},
        "verdict": "warning",
        "consequence": "the anchor's is used for the whole model",
    }
    note = f"rope_theta (general, maths: 10000; code: 1000000): {difference['consequence']}"
    return {
        "architecture": "qwen3_moe",
        "family": "qwen3",
        "sources": [
            {
                "name": name,
                "model": f"org/{name}",
                "architecture": "qwen3",
                "parameters": 596_049_920,
                "dtype": "bfloat16",
                "files": 1,
                "anchor": name == "general",
            }
            for name in SOURCES
        ],
        "differences": [difference],
        "tensors": {"model.norm.weight": [1024]},
        "config": {"model_type": "qwen3_moe"},
        "dtype": "bfloat16",
        "total_parameters": 1_124_618_240,
        "active_parameters": 860_377_088,
        "disk_bytes": 2_249_236_480,
        "work_bytes": 812_000_000,
        "shards": 1,
        "peak_memory_bytes": 3_512_000_000,
        "seconds": 312.0,
        "notes": [note, "backbone.weights has no effect on attention: it is the anchor's"],
    }


def sample_metrics() -> dict[str, Any]:
    shares = {
        domain: [[0.5 - 0.01 * layer, 0.3 + 0.02 * layer, 0.2 - 0.01 * layer] for layer in range(4)]
        for domain in DOMAINS
    }
    routing = {
        "experts": SOURCES,
        "tokens": dict.fromkeys(DOMAINS, 65_536),
        "share": shares,
        "entropy": {d: [0.9, 0.8, 0.7, 0.24 + 0.004 * i] for i, d in enumerate(DOMAINS)},
        "mixed": {
            "entropy_of_mean": [1.05, 1.04, 1.03, 1.02],
            "balance": [1.0, 1.1, 1.2, 1.3],
            "max_share": [0.3, 0.32, 0.34, 0.36],
        },
    }
    losses = itertools.count(2101, 37)
    rows = {name: {d: next(losses) / 1000 for d in DOMAINS} for name in [*SOURCES, "b", "t"]}
    curve = [
        {"step": s, "tokens": s * 4096, "loss": 4 * math.exp(-s / 40) + 2.3, "learning_rate": 5e-5}
        | sample_load(math.exp(-s / 60))
        for s in range(1, 245)
    ]
    return {
        "sources": {name: rows[name] for name in SOURCES},
        "built": rows["b"],
        "trained": rows["t"],
        "alignment": {
            kind: {
                name: {
                    "before": [0.0112 + shift, 0.0147, 0.02, 0.018],
                    "after": [0.41 + shift, 0.37, 0.33, 0.302],
                    "used": True,
                }
                for name in ("code", "maths")
            }
            for kind, shift in (("residual", 0.1), ("heads", 0.2), ("neurons", 0.0))
        },
        "fit": sample_fit(),
        "routing": {"built": routing, "trained": copy.deepcopy(routing)},
        "cka": {
            name: sample_cka(start)
            for name, start in (("sources", 0.1), ("built", 0.2), ("trained", 0.3))
        },
        "dynamic": {"built": sample_dynamic(), "trained": sample_dynamic()},
        "training": {
            "scope": "all",
            "tokens": 1_000_000,
            "steps": 244,
            "seconds": 185.2,
            "learning_rate": 5e-5,
            "curve": curve,
        },
        "timing": {
            "build_seconds": 290.4,
            "build_peak_rss_bytes": 3_100_000_000,
            "calibration_tokens": 262_144,
            "evaluate_seconds": 81.7,
        },
    }


def sample_load(uneven: float) -> dict[str, float]:
    """Of a point of the curve: `uneven` from 0 to 1."""
    shares = {"code": 1 - 0.4 * uneven, "general": 1 + 0.6 * uneven, "maths": 1 - 0.2 * uneven}
    return {"balance": 1 + 0.2 * uneven} | {f"share/{n}": s / 3 for n, s in shares.items()}


def sample_cka(start: float) -> dict[str, Any]:
    layers = []
    for layer in range(4):
        one, two, three = (start + 0.1 * pair + 0.01 * layer for pair in range(3))
        layers.append([[1.0, one, two], [one, 1.0, three], [two, three, 1.0]])
    return {"experts": SOURCES, "tokens": 16_384, "layers": layers, "mean": start + 0.115}


def sample_dynamic() -> dict[str, Any]:
    return {
        "fixed": [
            {"experts": count, "losses": dict.fromkeys(SOURCES, loss) | {"medicine": loss + 1}}
            for count, loss in ((1, 3.0), (2, 2.5), (3, 2.4))
        ],
        "threshold": [
            {
                "threshold": threshold,
                "mean_experts": mean,
                "experts_by_layer": [mean - 0.25, mean, mean, mean + 0.25],
                "experts_by_domain": dict.fromkeys(SOURCES, mean) | {"medicine": 1.0},
                "losses": dict.fromkeys(SOURCES, loss) | {"medicine": loss + 1},
            }
            for threshold, mean, loss in ((0.1, 2.5, 2.41), (0.3, 1.5, 2.7))
        ],
    }


def sample_tasks() -> dict[str, Any]:
    ways = {"samples": 1319, "documents": 1319, "chat_template": False, "lm_eval": "0.4.13"}
    scores = {"acc": 0.4512, "acc_stderr": 0.0123, "acc_norm": 0.5, "acc_norm_stderr": 0.01}
    few = {"acc": 0.25, **ways, "fewshot": 5, "samples": 20, "chat_template": True}
    return {
        "trained": {"mmlu": {**scores, **ways, "fewshot": 0}},
        "code": {"mmlu": few, "<b>own</b>": {"f1": None, **ways, "fewshot": None}},
        "built": {"mmlu": {**scores, "acc": 0.4, **ways, "fewshot": 0}},
    }


def sample_fit() -> dict[str, Any]:
    ridge = sample_recipe().fit.ridge
    attention = {"q, k and v": 9.4, "o": 6.1}
    experts = {f"input map of {name}": 70.0 + i for i, name in enumerate(SOURCES)}
    experts |= {f"down_proj of {name}": 1069.3 - i for i, name in enumerate(SOURCES)}
    layers = [
        {
            "attention": {
                "error": [0.5 - e, 0.45 - e],
                "kept": True,
                "condition": dict(attention),
                "ridge": dict.fromkeys(attention, ridge),
            },
            "experts": {
                "error": [0.39 - e, 0.3 - e],
                "kept": True,
                "condition": dict(experts),
                "ridge": dict.fromkeys(experts, ridge),
            },
            "refinement": {"error": [0.3 - e, 0.16 - e], "kept": True, "steps": 120},
            # As the build writes them: by name.
            "routing": {
                "share": {"code": 0.2 + 2 * e, "general": 0.5 - e, "maths": 0.3 - e},
                "first_choice_is_source": 0.8 + e,
            },
        }
        for e in (0.0, 0.01, 0.02, 0.03)
    ]
    return {
        "layers": layers,
        "head": {
            "closed form": {
                "error": [1.73, 1.335],
                "kept": True,
                "condition": {"output head": 2101.2},
                "ridge": {"output head": ridge},
            },
            "refinement": {"error": [1.335, 0.591], "kept": True},
            "temperature_scaling": {"error": [0.591, 0.6179], "kept": True, "temperature": 1.25},
        },
        "loss": {"harmonized": 2.4943, "plain mean": 5.5905},
        "loss_by_source": {
            "harmonized": {"code": 1.6, "general": 3.5, "maths": 2.3829},
            "plain mean": {"code": 6.1, "general": 3.25, "maths": 7.4215},
        },
        "chosen": "harmonized",
    }


def old_fit() -> dict[str, Any]:
    """As builds noted it that kept windows aside, not documents."""
    fit = sample_fit()
    del fit["loss_by_source"], fit["head"]["temperature_scaling"]
    del fit["head"]["closed form"]["condition"], fit["head"]["closed form"]["ridge"]
    for layer in fit["layers"]:
        for step in (layer["attention"], layer["experts"]):
            step["condition"] = max(step["condition"].values())
            del step["ridge"]
    return fit


def router_only() -> tuple[dict[str, Any], Recipe]:
    """(metrics, recipe) of a build that fitted a router and nothing else."""
    metrics = sample_metrics()
    layers = [{"routing": layer["routing"]} for layer in metrics["fit"]["layers"]]
    metrics["fit"] = {"layers": layers}
    return metrics, changed(sample_recipe(), fit__method="none", router__init="regression")


def read(metrics: dict[str, Any]) -> Metrics:
    return Metrics.model_validate(metrics)


def sample_choices(first: int) -> dict[str, Any]:
    """Of three tokens in two layers, by three experts."""
    return {
        "experts": [[first, 1, 2], [0, first, 2]],
        "probabilities": [[0.5, 0.6, 0.7], [0.8, 0.9, 1.0]],
        "mean_experts": [first, 1, 2],
        "mean_probabilities": [0.45, 0.55, 0.849],
    }


def sample_samples() -> dict[str, Any]:
    stages = {"built": sample_choices(0), "trained": sample_choices(2)}
    text = {"tokens": ["def", " <b>\n", ""], "choices": stages}
    return {"experts": SOURCES, "domains": {"code": [text], "medicine": [copy.deepcopy(text)]}}


def rendered(metrics: dict[str, Any], recipe: Recipe | None = None) -> str:
    beside = Beside(Samples.model_validate(sample_samples()))
    return render(read(metrics), sample_plan(), recipe or sample_recipe(), beside)


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in sample_metrics().items() if key not in keys}


def test_the_full_page_has_every_section_and_says_what_was_built() -> None:
    page = Page(rendered(sample_metrics()))
    text = " ".join(page.text)
    for heading in (
        "Losses",
        "Training",
        "Routing",
        "Alignment",
        "Residual stream",
        "Attention heads",
        "FFN neurons",
        "Dynamic routing",
        "How alike the experts are",
        "Fit",
        "Time and memory",
        "Recipe",
    ):
        assert heading in page.text
    for fact in (
        "qwen3_moe",
        "1.12 billion",
        "860.38 million",
        "bfloat16",
        "harmonized",
        "org/code",
    ):
        assert fact in text
    assert "Not in this report" not in text
    tags = [tag for tag, _ in page.tags]
    assert tags.count("table") == tags.count("caption")


@pytest.mark.parametrize(
    ("removed", "heading", "command"),
    [
        ("sources", None, "symphony evaluate DIR"),
        ("built", None, "symphony evaluate DIR"),
        ("trained", None, "symphony evaluate DIR"),
        ("training", "Training", "symphony train DIR"),
        ("routing", "Routing", "symphony evaluate DIR"),
        ("cka", "How alike the experts are", "symphony evaluate DIR"),
        ("alignment", "Alignment", BUILD),
        ("fit", "Fit", BUILD),
        ("timing", "Time and memory", BUILD),
    ],
)
def test_a_missing_part_makes_way_for_the_command_that_makes_it(
    removed: str, heading: str | None, command: str
) -> None:
    page = Page(rendered(without(removed)))
    assert heading not in page.text
    assert command in page.text


@pytest.mark.parametrize(
    "kept",
    [
        (),
        *((key,) for key in KEYS),
        *(pytest.param(pair, marks=pytest.mark.slow) for pair in itertools.combinations(KEYS, 2)),
    ],
)
def test_any_part_alone_renders(kept: tuple[str, ...]) -> None:
    """As its own section, and no other."""
    page = Page(rendered(without(*(key for key in KEYS if key not in kept))))
    headings = {
        "training": "Training",
        "routing": "Routing",
        "alignment": "Alignment",
        "fit": "Fit",
        "timing": "Time and memory",
    }
    shown = {key for key, heading in headings.items() if heading in page.text}
    assert shown == headings.keys() & kept


@pytest.mark.parametrize("key", KEYS)
def test_an_empty_part_is_a_missing_part(key: str) -> None:
    assert rendered(sample_metrics() | {key: {}}) == rendered(without(key))


@pytest.mark.parametrize(
    ("settings", "lacking"),
    [
        ({}, "No alignment of: Residual stream, Attention heads, FFN neurons;"),
        ({"residual": "none"}, "No alignment of: Attention heads, FFN neurons;"),
        ({"heads": "none", "neurons": "auto"}, "No alignment of: Residual stream;"),
        ({"residual": "none", "heads": "none", "neurons": "auto"}, None),
        ({"residual": "none", "heads": "none", "neurons": "none"}, None),
        ({"residual": "none", "heads": "none", "init": "copy"}, None),
    ],
)
def test_an_alignment_is_missing_only_where_the_recipe_asks_for_it(
    settings: dict[str, str], lacking: str | None
) -> None:
    sections = {"init": "experts"}
    recipe = changed(
        sample_recipe(), **{f"{sections.get(k, 'align')}__{k}": v for k, v in settings.items()}
    )
    words = Page(rendered(without("alignment"), recipe)).words
    assert ("No alignment" in words) == (lacking is not None)
    assert lacking is None or lacking in words


def test_a_kind_of_alignment_that_is_missing_beside_others_is_named() -> None:
    metrics = sample_metrics()
    metrics["alignment"] |= {"residual": {}}
    del metrics["alignment"]["neurons"]
    page = Page(rendered(metrics))
    assert "No alignment of: Residual stream, FFN neurons;" in page.words
    assert "Attention heads" in page.text
    assert "Residual stream" not in page.text and "FFN neurons" not in page.text


def test_no_fit_is_no_omission_where_the_recipe_asks_for_none() -> None:
    recipe = changed(sample_recipe(), fit__method="none")
    assert "Not in this report" not in rendered(without("fit"), recipe)
    recipe = changed(recipe, router__init="regression")
    page = Page(rendered(without("fit"), recipe))
    assert f"No balance of the fitted router; run  {BUILD}" in " ".join(page.text)


def test_names_are_escaped() -> None:
    evil = "<script>alert('x')</script>&"
    metrics, plan, recipe = sample_metrics(), sample_plan(), sample_recipe()
    for losses in [*metrics["sources"].values(), metrics["built"], metrics["trained"]]:
        losses[evil] = 1.0
    metrics["timing"][evil] = evil
    plan["notes"].append(evil)
    plan["sources"][0]["model"] = evil
    sources = recipe.sources | {evil: recipe.sources["code"]}
    recipe = changed(recipe, sources=sources, anchor=evil)
    metrics["routing"]["built"]["share"][evil] = [[1.0, 0.0, 0.0]]
    metrics["cka"]["built"]["experts"] = [evil, *SOURCES[1:]]
    for kind in metrics["alignment"].values():
        kind[evil] = {"before": [0.1], "after": [0.2], "used": False}
    metrics["fit"] |= {"loss": {evil: 1.0}, "chosen": evil}
    metrics["fit"]["loss_by_source"][evil] = {evil: 1.0}
    metrics["fit"]["layers"][0]["routing"]["share"][evil] = 0.1
    metrics["fit"]["layers"][0]["experts"]["condition"][evil] = 1e9
    metrics["fit"]["layers"][0]["experts"]["ridge"][evil] = 0.1
    metrics["training"]["curve"][0][f"share/{evil}"] = 0.1
    metrics["fit"]["head"][evil] = {"error": [1.0, 2.0], "kept": False}
    page = Page(render(read(metrics), plan, recipe))
    assert "script" not in [tag for tag, _ in page.tags]
    assert any(evil in row for row in page.rows)
    assert f"The {evil} model was written." in page.words
    assert f"Maps not used: {evil}." in page.words
    assert "<script" not in page.html


def test_every_loss_is_on_the_page_with_three_decimals_and_its_perplexity() -> None:
    metrics = sample_metrics()
    page = Page(rendered(metrics))
    models = {name: metrics[name] for name in ("built", "trained")}
    for label, losses in (metrics["sources"] | models).items():
        inside = sum(losses[name] for name in SOURCES) / 3
        cells = next(row[1:] for row in page.rows if row[0] == label and len(row) == 7)
        expected = [*(losses[domain] for domain in DOMAINS), inside, losses["medicine"]]
        assert cells == [f"{loss:.3f}" for loss in expected]
    titles = [attributes.get("title") for _, attributes in page.tags]
    assert f"perplexity {math.exp(metrics['built']['maths']):,.2f}" in titles


def test_bold_marks_the_lowest_model_of_every_column_but_not_the_reference() -> None:
    metrics = sample_metrics()
    metrics["trained"]["maths"] = 1.0
    metrics["sources"]["general"]["code"] = 0.5
    table = loss_table(read(metrics), sample_recipe())
    assert table is not None
    best = [
        [label for label, _, cells in table.rows if cells[column].best]
        for column in range(len(DOMAINS) + 2)
    ]
    assert best == [["general"], ["trained"], ["general"], ["general"], ["general"], ["general"]]
    assert "<b>1.000</b>" in rendered(metrics)
    assert not any(cell.best for _, kind, row in table.rows if kind == "reference" for cell in row)


def test_losses_that_look_equal_are_marked_alike() -> None:
    metrics = sample_metrics()
    metrics["built"]["code"], metrics["trained"]["code"] = 1.00004, 1.00001
    table = loss_table(read(metrics), sample_recipe())
    assert table is not None
    assert [label for label, _, cells in table.rows if cells[2].best] == ["built", "trained"]


def test_own_specialist_is_each_domain_by_its_own_source() -> None:
    metrics = sample_metrics()
    own = [metrics["sources"][name][name] for name in SOURCES]
    page = Page(rendered(metrics))
    assert page.row("own specialist") == [
        *map(loss_text, own),
        MISSING,
        loss_text(sum(own) / 3),
        MISSING,
    ]
    table = loss_table(read(metrics), sample_recipe())
    assert table is not None
    marked = [(row[0], i) for row in table.rows for i, cell in enumerate(row[2]) if cell.own]
    assert marked == [(name, index) for index, name in enumerate(SOURCES)]


def test_the_page_says_how_far_the_models_are_from_the_specialists() -> None:
    metrics = sample_metrics()
    metrics["sources"] = {name: {name: 2.0} for name in SOURCES}
    metrics["built"] = dict.fromkeys(SOURCES, 3.25)
    metrics["trained"] = dict.fromkeys(SOURCES, 1.9)
    text = " ".join(Page(rendered(metrics)).text)
    assert "built 3.250, which is 1.250 above the specialists' 2.000" in text
    assert "trained 1.900, which is 0.100 below the specialists' 2.000" in text


@pytest.mark.parametrize(("loss", "shown"), [(math.nan, "NaN"), (math.inf, "inf"), (None, "NaN")])
def test_a_diverged_model_renders_and_is_never_the_best(loss: float | None, shown: str) -> None:
    metrics = sample_metrics()
    metrics["trained"]["maths"] = loss
    metrics["training"]["curve"][100]["loss"] = loss
    metrics["routing"]["trained"]["share"]["code"][0][0] = loss
    page = Page(rendered(metrics))
    # The maths column and the mean in domain; the other domains are as they were.
    assert [i for i, text in enumerate(page.row("trained")) if text == shown] == [1, 4]
    assert "1 point(s) are NaN or infinite" in " ".join(page.text)
    table = loss_table(read(metrics), sample_recipe())
    assert table is not None
    assert table.diverged
    assert not table.rows[-1][2][1].best


def test_a_source_that_is_asked_nothing_of_a_domain_is_not_measured_on_it() -> None:
    """And it has not diverged."""
    metrics = sample_metrics()
    name = next(iter(sample_recipe().sources))
    metrics["sources"][name]["maths"] = None
    row = Page(rendered(metrics)).row(name)
    assert [i for i, text in enumerate(row) if text == MISSING] == [1, 4]
    table = loss_table(read(metrics), sample_recipe())
    assert table is not None and not table.diverged


def test_a_loss_whose_perplexity_is_too_large_for_a_float_renders() -> None:
    metrics = sample_metrics()
    metrics["trained"]["maths"] = 1e6
    page = Page(rendered(metrics))
    assert page.row("trained")[1] == "1000000.000"


def test_a_curve_without_a_finite_loss_renders() -> None:
    metrics = sample_metrics()
    metrics["training"]["curve"] = [{"step": 1, "tokens": 10, "loss": None, "learning_rate": 1.0}]
    assert "no step logged a finite loss" in rendered(metrics)
    metrics["training"]["curve"] = []
    Page(rendered(metrics))


def test_a_mean_over_fewer_domains_is_no_mean() -> None:
    assert mean_of_all([1.0, 2.0]) == 1.5
    assert mean_of_all([1.0, None]) is None
    assert mean_of_all([]) is None


def test_the_page_loads_nothing() -> None:
    html = rendered(sample_metrics())
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed")  # the script: see its test
        assert not {"src", "srcset", "xlink:href"} & attributes.keys()
        assert (attributes.get("href") or "#").startswith("#"), "only within the page"
    assert "url(" not in html and "@import" not in html
    assert not re.search(r"https?://", html)


def test_rendering_is_pure() -> None:
    metrics, plan, recipe = read(sample_metrics()), sample_plan(), sample_recipe()
    before = copy.deepcopy((metrics, plan, recipe))
    assert render(metrics, plan, recipe) == render(metrics, plan, recipe)
    assert (metrics, plan, recipe) == before


def test_importing_the_module_is_cheap() -> None:
    program = (
        "import sys; import symphony_moe.reporting.run_page;"
        "heavy = {'humanize', 'jinja2', 'matplotlib', 'torch', 'transformers'};"
        "sys.exit(str(sorted(heavy & sys.modules.keys())))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"


def test_the_chart_places_points_within_the_plot_and_breaks_at_gaps() -> None:
    losses = [5.0, math.nan, 3.0, 2.5]
    chart = loss_chart(curve([{"tokens": 100 * i, "loss": loss} for i, loss in enumerate(losses)]))
    assert chart is not None
    (line,) = chart.lines
    assert [len(part) for part in line.parts] == [1, 2]
    plot = Plot(draw(chart))
    assert [len(part) for part in plot.line("loss")] == [1, 2]
    low, high = min(plot.upward), max(plot.upward)
    assert all(
        -0.1 <= x <= 300.1 and low - 0.01 <= y <= high + 0.01
        for p in plot.line("loss")
        for x, y in p
    )
    assert chart.notes == ("1 point(s) are NaN or infinite and not drawn.",)
    ends = [(point.x, chart.write(point.y)) for point in (line.drawn[0], line.drawn[-1])]
    assert ends == [(0, "5.000"), (300, "2.500")]
    assert loss_chart(curve([{"tokens": 7, "loss": 2.0}])) is not None


def curve(points: list[dict[str, Any]]) -> list[CurvePoint]:
    return [CurvePoint.model_validate(point) for point in points]


def load_curve(*shares: tuple[float | None, ...]) -> list[CurvePoint]:
    """Shares of each point in the order of `SOURCES`; metrics.json is written by name."""
    return curve(
        [
            {"tokens": 100 * (i + 1), "loss": 2.0, "balance": 1.25 - i / 8}
            | {f"share/{name}": share for name, share in sorted(zip(SOURCES, row, strict=True))}
            for i, row in enumerate(shares)
        ]
    )


def test_every_experts_share_of_the_choices_is_a_line_of_its_own() -> None:
    chart = share_chart(load_curve((0.5, 0.3, 0.2), (0.4, 0.32, 0.28)), sample_recipe())
    assert chart is not None
    # In the recipe's order, whatever the curve's; heights are per cent and count from 0.
    assert {line.name: [(p.x, p.y) for p in line.points] for line in chart.lines} == {
        "general": [(100, 50), (200, 40)],
        "maths": [(100, 30), (200, 32)],
        "code": [(100, pytest.approx(20)), (200, pytest.approx(28))],
    }
    plot = Plot(draw(chart))
    assert min(plot.upward) == 0 and max(plot.upward) == 50
    for line in chart.lines:
        (placed,) = plot.line(line.name)
        points: Any = [
            (pytest.approx(p.x, abs=0.1), pytest.approx(p.y, abs=0.02)) for p in line.points
        ]
        assert placed == points
    assert [line.name for line in chart.lines] == SOURCES
    ends = [[chart.write(point.y) for point in line.points] for line in chart.lines]
    assert ends == [["50.0 %", "40.0 %"], ["30.0 %", "32.0 %"], ["20.0 %", "28.0 %"]]
    assert len({(line.colour, line.marker) for line in chart.lines}) == 3
    level: Any = ("even", pytest.approx(100 / 3))
    assert chart.level == level
    assert plot.labels[-1] == "even 33.3 %"
    assert chart.summary == "Balance 1.250 at 100 tokens, 1.125 at 200 tokens"


@pytest.mark.parametrize("share", [None, math.nan, math.inf])
def test_a_share_that_is_not_finite_breaks_its_line_alone(share: float | None) -> None:
    rows = [(0.5, 0.3, 0.2), (0.5, 0.3, share), (0.5, 0.3, 0.2), (0.5, 0.3, 0.2)]
    chart = share_chart(load_curve(*rows), sample_recipe())
    assert chart is not None and chart.notes[0].startswith("1 point(s) are NaN or infinite")
    parts = [[len(part) for part in line.parts] for line in chart.lines]
    assert parts == [[4], [4], [1, 2]]


def test_the_report_draws_the_load_of_the_experts_below_the_loss() -> None:
    page = Page(rendered(sample_metrics()))
    plots = [a["aria-label"] or "" for tag, a in page.tags if tag == "svg" and "aria-label" in a]
    assert [label.split(" against")[0] for label in plots[:2]] == [
        "Training loss",
        "Every expert's share of the choices",
    ]
    loss, shares = (Plot(svg) for svg in re.findall(r"<svg.*?</svg>", page.html, re.DOTALL)[:2])
    for plot, names in ((loss, ["loss"]), (shares, SOURCES)):
        for number, name in enumerate(names):
            assert len(plot.line(name)) == 1 and plot.colours[name] == f"var(--c{number})"
    for name, share in (("general", "33.7 %"), ("maths", "33.2 %"), ("code", "33.1 %")):
        assert f"{name} {share}" in shares.labels
    assert "even 33.3 %" in shares.labels
    balance = "Balance 1.197 at 4,096 tokens, 1.003 at 999,424 tokens; 1.0 is even."
    assert balance in page.words
    for name in set(re.findall(r"var\((--\w+)\)", page.html)) - {"--by"}:
        assert len(re.findall(rf"{name}: #", page.html)) == 2, name  # light and dark


def test_a_curve_without_shares_has_no_chart_of_the_load() -> None:
    """As older runs wrote them."""
    metrics = sample_metrics()
    for point in metrics["training"]["curve"]:
        for key in ("balance", *(f"share/{name}" for name in SOURCES)):
            del point[key]
    page = Page(rendered(metrics))
    assert "Load of the experts" not in page.words and "Balance 1" not in page.words
    assert [tag for tag, _ in page.tags].count("figure") == 4  # the loss, dynamic routing, CKA
    bare = load_curve((None, None, None))
    assert share_chart(bare, sample_recipe()) is None and share_chart([], sample_recipe()) is None


def test_colour_is_neutral_at_the_uniform_share_and_full_at_the_ends() -> None:
    assert ceiling_share(num_experts=8, top_k=2) == 0.25
    assert shade(0.125, 0.125, 0.25) == Shade("12.5", "more", 0)
    assert shade(0.0, 0.125, 0.25) == Shade("0.0", "less", 100)
    assert shade(0.4, 0.125, 0.25) == Shade("40.0", "more", 100)
    # With two of three experts per token, none can have more than half.
    assert ceiling_share(num_experts=3, top_k=2) == 0.5
    assert shade(0.5, 0.5, ceiling_share(num_experts=2, top_k=2)) == Shade("50.0", "more", 0)


def test_routing_marks_own_experts_and_ends_with_the_mean_over_layers() -> None:
    page = Page(rendered(sample_metrics()))
    assert page.row("mean") == ["48.5", "33.0", "18.5"]
    own = [attributes for tag, attributes in page.tags if attributes.get("class") == "own-expert"]
    assert len(own) == 2 * len(SOURCES)


def test_routing_shows_how_sure_the_routers_are_and_how_even_the_load_is() -> None:
    """Every layer's numbers and their means."""
    page = Page(rendered(sample_metrics()))
    rows = page.table("built: how sure the routers are (entropy in nats, 0 to 1.099)")
    assert rows[1][1:5] == DOMAINS
    assert rows[5][1:] == ["0.240", "0.244", "0.248", "0.252", "1.020", "1.300", "36.0"]
    assert rows[6][1:] == ["0.660", "0.661", "0.662", "0.663", "1.035", "1.150", "33.0"]
    older = sample_metrics()
    for routing in older["routing"].values():
        del routing["entropy"], routing["mixed"]
    assert "how sure the routers are" not in Page(rendered(older)).words


def test_likeness_is_shown_by_layer_and_by_pair() -> None:
    """The mean over pairs of different experts for every layer and model, and the mean over layers
    for every pair; a pair without a number has none."""
    page = Page(rendered(sample_metrics()))
    rows = page.table("CKA by layer")
    assert rows[0] == ["Layer", "sources", "built", "trained"]
    assert rows[2] == ["1", "0.210", "0.310", "0.410"]
    assert rows[-1] == ["mean", "0.215", "0.315", "0.415"]
    rows = page.table("CKA of built")
    assert rows[1:] == [
        ["general", "1.000", "0.215", "0.315"],
        ["maths", "0.215", "1.000", "0.415"],
        ["code", "0.315", "0.415", "1.000"],
    ]
    metrics = sample_metrics()
    metrics["cka"]["built"]["layers"][0][0][1] = metrics["cka"]["built"]["layers"][0][1][0] = None
    rows = Page(rendered(metrics)).table("CKA of built")
    assert rows[1] == ["general", "1.000", MISSING, "0.315"]
    del metrics["cka"]["trained"], metrics["cka"]["sources"]
    assert Page(rendered(metrics)).table("CKA by layer")[0] == ["Layer", "built"]


def test_dynamic_routing_is_compared_with_the_same_number_of_experts_for_all() -> None:
    """At as many experts per token in domain, on the line between the two nearest fixed numbers;
    every point is in the plot."""
    page = Page(rendered(sample_metrics()))
    rows = page.table("built: loss in nats")
    assert rows[2] == ["2", "2.00", "", "2.500", "", "3.500"]
    assert rows[4] == ["p ≥ 0.1", "2.50", "2.25 to 2.75", "2.410", "-0.040", "3.410"]
    assert rows[5] == ["p ≥ 0.3", "1.50", "1.25 to 1.75", "2.700", "-0.050", "3.700"]
    chart = dynamic_curve(DynamicRouting.model_validate(sample_dynamic()), sample_recipe()).chart
    assert chart is not None
    assert [(line.name, len(line.drawn)) for line in chart.lines] == [
        ("same number for all", 3),
        ("by threshold", 2),
    ]
    plot = Plot(draw(chart))
    assert list(plot.across) == [1, 2, 3]
    parts = [plot.line(line.name) for line in chart.lines]
    assert [len(part) for line in parts for part in line] == [3, 2]
    low, high = min(plot.upward), max(plot.upward)
    assert all(
        0.99 <= x <= 3.01 and low - 0.01 <= y <= high + 0.01
        for line in parts
        for p in line
        for x, y in p
    )
    assert chart.lines[1].points[0].x == 1.5, "sorted by the number of experts"


@pytest.mark.parametrize("loss", [math.nan, None, math.inf])
def test_a_dynamic_curve_that_is_not_finite_renders(loss: float | None) -> None:
    """With the points that are."""
    metrics = sample_metrics()
    for row in metrics["dynamic"]["built"]["fixed"][1:]:
        row["losses"] = dict.fromkeys(row["losses"], loss)
    Page(rendered(metrics))
    chart = dynamic_curve(read(metrics).dynamic["built"], sample_recipe()).chart
    assert chart is not None
    assert [len(line.drawn) for line in chart.lines] == [1, 2]


def test_dynamic_routing_is_missing_only_where_the_recipe_asks_for_it() -> None:
    """It costs as much as several evaluations."""
    assert "No dynamic routing" not in rendered(without("dynamic"))
    recipe = changed(sample_recipe(), evaluation__thresholds=[0.1])
    assert "No dynamic routing" in rendered(without("dynamic"), recipe)


def test_every_kind_of_alignment_has_a_table_in_the_order_of_the_recipe() -> None:
    page = Page(rendered(sample_metrics()))
    for title, first in (("Residual", 0.1112), ("Attention", 0.2112), ("FFN", 0.0112)):
        rows = page.table(title)
        assert rows[0] == ["", "maths", "code"]
        assert rows[1] == ["Layer", "before", "after", "before", "after"]
        assert [row[0] for row in rows[2:]] == ["0", "1", "2", "3", "mean"]
        assert rows[2][1:] == [f"{first:.3f}", f"{first + 0.3988:.3f}"] * 2
        mean = (first + 0.0147 + 0.02 + 0.018) / 4
        assert rows[-1][1] == f"{mean:.3f}"
    assert "The permutation by itself does not change an MoE" in page.words
    assert "not used" not in page.words


def test_the_page_says_which_maps_are_not_used() -> None:
    metrics = sample_metrics()
    metrics["alignment"]["heads"]["maths"]["used"] = False
    del metrics["alignment"]["heads"]["code"]["used"]
    page = Page(rendered(metrics))
    assert page.table("Attention")[0] == ["", "maths (not used)", "code"]
    assert page.table("Residual")[0] == ["", "maths", "code"]
    assert page.words.count("Maps not used: maths.") == 1
    assert "that source keeps its own coordinates" in page.words


@pytest.mark.parametrize(("value", "shown"), [(math.nan, "NaN"), (None, "NaN"), (-1e-9, "0.000")])
def test_an_alignment_that_is_not_finite_or_incomplete_renders(
    value: float | None, shown: str
) -> None:
    metrics = sample_metrics()
    metrics["alignment"]["heads"]["maths"]["before"][1] = value
    metrics["alignment"]["heads"]["code"] = {"before": [0.5]}
    rows = Page(rendered(metrics)).table("Attention")
    assert rows[3] == ["1", shown, "0.370", MISSING, MISSING]
    assert rows[-1][3:] == [MISSING, MISSING]
    assert (rows[-1][1] == "NaN") == (shown == "NaN")
    metrics["alignment"]["heads"] = {"maths": {"before": [], "after": []}}
    assert "Attention heads" not in Page(rendered(metrics)).text


def test_the_fit_shows_every_error_and_their_means() -> None:
    page = Page(rendered(sample_metrics()))
    rows = page.table("Layers")
    assert rows[0] == ["", "after attention", "after the layer"]
    assert rows[1] == ["Layer", "before", "attention", "before", "experts", "refinement"]
    assert rows[2] == ["0", "0.5000", "0.4500", "0.3900", "0.3000", "0.1600"]
    assert rows[5] == ["3", "0.4700", "0.4200", "0.3600", "0.2700", "0.1300"]
    assert rows[6] == ["mean", "0.4850", "0.4350", "0.3750", "0.2850", "0.1450"]
    head = page.table("Output head")
    assert head == [
        ["before", "closed form", "refinement", "temperature scaling"],
        ["1.7300", "1.3350", "0.5910", "0.6179"],
    ]
    assert "validation text, in nats per token: harmonized 2.494, plain mean 5.590." in page.words
    assert "The harmonized model was written." in page.words
    assert not page.struck and "Struck through" not in page.words


def test_a_step_that_was_not_kept_is_struck_through_and_counts_as_it_was_before() -> None:
    metrics = sample_metrics()
    layers, head = metrics["fit"]["layers"], metrics["fit"]["head"]
    layers[1]["experts"] = {"error": [0.38, 0.98], "kept": False}
    layers[2]["refinement"] = {"error": [0.28, math.nan], "kept": False}
    head["closed form"] = {"error": [1.73, 1.9], "kept": False}
    page = Page(rendered(metrics))
    assert page.struck == ["0.9800", "NaN", "1.9000"]
    assert page.table("Layers")[3][4] == "0.9800"
    # (0.3 + 0.38 + 0.28 + 0.27) / 4 and (0.16 + 0.15 + 0.28 + 0.13) / 4
    assert page.table("Layers")[-1][4:] == ["0.3075", "0.1800"]
    dropped = "experts in 1 of 4 layers, refinement in 1 of 4 layers, closed form of the head"
    assert dropped in page.words


def test_a_fit_without_some_of_its_steps_renders() -> None:
    metrics = sample_metrics()
    for layer in metrics["fit"]["layers"]:
        del layer["refinement"]
    del metrics["fit"]["head"]["refinement"], metrics["fit"]["head"]["temperature_scaling"]
    page = Page(rendered(metrics))
    assert page.table("Layers")[1] == ["Layer", "before", "attention", "before", "experts"]
    assert page.table("Output head") == [["before", "closed form"], ["1.7300", "1.3350"]]

    del metrics["fit"]["layers"][0]["attention"]
    metrics["fit"]["layers"][1]["experts"] = {"error": [None, None], "kept": False}
    rows = Page(rendered(metrics)).table("Layers")
    assert rows[2] == ["0", MISSING, MISSING, "0.3900", "0.3000"]
    assert rows[3] == ["1", "0.4900", "0.4400", "NaN", "NaN"]
    assert rows[-1] == ["mean", MISSING, MISSING, "NaN", "NaN"]


@pytest.mark.parametrize("key", ["layers", "head", "loss", "chosen"])
def test_any_part_of_the_fit_may_be_absent(key: str) -> None:
    metrics = sample_metrics()
    del metrics["fit"][key]
    page = Page(rendered(metrics))
    assert "Fit" in page.text
    captions = " ".join(page.tables)
    assert ("Layers:" in captions) == (key != "layers")
    assert ("Output head" in captions) == (key != "head")
    assert ("in nats per token: harmonized" in page.words) == (key != "loss")
    assert ("was written" in page.words) == (key != "chosen")
    Page(rendered(sample_metrics() | {"fit": {key: sample_fit()[key]}}))


def test_the_page_says_that_the_plain_mean_was_written() -> None:
    metrics = sample_metrics()
    metrics["fit"] |= {"loss": {"harmonized": None, "plain mean": 3.25}, "chosen": "plain mean"}
    for kind in metrics["alignment"].values():
        for source in kind.values():
            source["used"] = False
    words = Page(rendered(metrics)).words
    assert "harmonized NaN, plain mean 3.250." in words
    assert "The plain mean was written. The errors, the regressions, the balance" in words
    assert "are those of the fitted model, which is not in the checkpoint." in words
    assert "This build uses no map" in words
    # The maps may well have gained enough.
    assert "Maps not used" not in words


UNWRITTEN = "; the fitted model, which was not written"


@pytest.mark.parametrize("table", ["Layers:", "Regressions", "Balance", "Output head"])
def test_every_table_of_a_fitted_model_that_was_not_written_says_so(table: str) -> None:
    metrics = sample_metrics()

    def caption() -> str:
        return next(c for c in Page(rendered(metrics)).tables if c.startswith(table))

    assert UNWRITTEN not in caption()
    metrics["fit"]["chosen"] = "plain mean"
    assert caption().endswith(UNWRITTEN)


def test_the_fit_shows_the_validation_loss_per_source_and_which_model_was_written() -> None:
    metrics = sample_metrics()
    html = rendered(metrics)
    assert Page(html).table("Validation text") == [
        ["Model", *SOURCES],
        ["harmonized (written)", "3.500", "2.383", "1.600"],
        ["plain mean", "3.250", "7.421", "6.100"],
    ]
    # The mean may be worth it where one source's own is not.
    assert "<b>3.250</b>" in html and "<b>1.600</b>" in html
    assert "<b>3.500</b>" not in html and "<b>6.100</b>" not in html
    metrics["fit"]["chosen"] = "plain mean"
    metrics["fit"]["loss_by_source"]["harmonized"] = {"general": None, "maths": 2.0}
    assert Page(rendered(metrics)).table("Validation text")[1:] == [
        ["harmonized", "NaN", "2.000", MISSING],
        ["plain mean (written)", "3.250", "7.421", "6.100"],
    ]


def test_the_fit_shows_the_balance_between_experts_per_layer_and_its_mean() -> None:
    assert Page(rendered(sample_metrics())).table("Balance") == [
        ["Layer", *SOURCES, "first choice is the text's own source"],
        ["0", "50.0", "30.0", "20.0", "80.0"],
        ["1", "49.0", "29.0", "22.0", "81.0"],
        ["2", "48.0", "28.0", "24.0", "82.0"],
        ["3", "47.0", "27.0", "26.0", "83.0"],
        ["mean", "48.5", "28.5", "23.0", "81.5"],
    ]


def test_a_router_that_is_all_that_was_fitted_has_its_balance_and_nothing_else() -> None:
    metrics, recipe = router_only()
    page = Page(rendered(metrics, recipe))
    assert page.table("Balance")[-1] == ["mean", "48.5", "28.5", "23.0", "81.5"]
    captions = " ".join(page.tables)
    for other in ("Layers:", "Regressions", "Output head", "Validation text"):
        assert other not in captions
    assert "each layer's router was fitted" in page.words
    assert (
        "nothing else was fitted. Shares are measured on validation text: documents" in page.words
    )
    assert "weights were fitted" not in page.words and "steps were kept" not in page.words
    assert "Not in this report" not in page.words


def test_shares_that_are_coloured_have_their_legend_once() -> None:
    for metrics in (sample_metrics(), without("routing"), without("fit")):
        assert rendered(metrics).count('class="legend"') == 1
    assert 'class="legend"' not in rendered(without("routing", "fit"))


def test_the_fit_shows_the_largest_condition_of_every_layer_and_that_no_ridge_was_raised() -> None:
    metrics = sample_metrics()
    metrics["fit"]["layers"][2]["attention"]["condition"]["o"] = 3.14e7
    page = Page(rendered(metrics))
    assert page.table("Regressions") == [
        ["Layer", "condition", "of"],
        ["0", "1,069", "down_proj of general"],
        ["1", "1,069", "down_proj of general"],
        ["2", "3.1e+07", "o"],
        ["3", "1,069", "down_proj of general"],
        ["head", "2,101", "output head"],
    ]
    assert "was enough in all 33 regressions: none was raised." in page.words


def test_the_fit_shows_where_a_ridge_was_raised_above_the_recipe_s() -> None:
    metrics = sample_metrics()
    layers = metrics["fit"]["layers"]
    layers[1]["experts"]["ridge"]["down_proj of maths"] = 0.1
    layers[1]["attention"]["ridge"]["o"] = 10.0
    for key in ("condition", "ridge"):  # nothing could be solved for
        layers[3]["experts"][key]["input map of code"] = None
    metrics["fit"]["head"]["closed form"]["ridge"]["output head"] = 1.0
    page = Page(rendered(metrics))
    rows = page.table("Regressions")
    assert rows[0] == ["Layer", "condition", "of", "ridge raised to"]
    assert [row[-1] for row in rows[1:]] == [
        "",
        "o: 10, down_proj of maths: 0.1",
        "",
        "input map of code: none was enough, left as it was",
        "output head: 1",
    ]
    assert rows[4][1:3] == ["infinite", "input map of code"]
    assert "in 4 of 33 regressions it was raised tenfold" in page.words
    # Beside a recipe that asks for as much, none of these was raised.
    recipe = changed(sample_recipe(), fit__ridge=0.1)
    for note in (note for layer in layers for note in layer.values() if "ridge" in note):
        note["ridge"] = dict.fromkeys(note["ridge"], 0.1)
    metrics["fit"]["head"]["closed form"]["ridge"]["output head"] = 0.1
    assert "none was raised" in Page(rendered(metrics, recipe)).words


def test_the_fit_says_in_words_what_the_temperature_does() -> None:
    metrics = sample_metrics()
    words = Page(rendered(metrics)).words
    assert "logits are divided by 1.25. This is what sampling at temperature 1.25" in words
    # 100 ** (1 / 1.25)
    assert "A token that was 100 times as likely as another is now 40 times as likely." in words
    assert "The divergence may rise by 5 per cent for this" in words
    note = {"error": [0.591, 0.591], "kept": False, "temperature": 1.0}
    metrics["fit"]["head"]["temperature_scaling"] = note
    page = Page(rendered(metrics))
    assert "No temperature scaling: the head" in page.words and "divided by" not in page.words
    # It did not fail: no other temperature was near enough.
    assert not page.struck and "Struck through" not in page.words


def test_the_fit_says_what_text_it_was_judged_by() -> None:
    documents = "validation text: documents of its own, on which no weight was fitted."
    metrics = sample_metrics()
    words = Page(rendered(metrics)).words
    assert documents in words
    assert "They decided which steps were kept and the temperature of the head." in words
    router, recipe = router_only()
    assert documents in Page(rendered(router, recipe)).words
    words = Page(rendered(metrics | {"fit": old_fit()})).words
    assert "validation text: windows of that text, on which no weight was fitted." in words
    assert "documents of its own" not in words


def test_the_fit_of_an_older_build_renders_with_what_it_noted() -> None:
    page = Page(rendered(sample_metrics() | {"fit": old_fit()}))
    assert page.table("Regressions")[:2] == [
        ["Layer", "condition", "of"],
        ["0", "1,069", "experts"],
    ]
    assert page.table("Output head")[0] == ["before", "closed form", "refinement"]
    assert page.table("Layers")[2] == ["0", "0.5000", "0.4500", "0.3900", "0.3000", "0.1600"]
    assert page.table("Balance")[-1][-1] == "81.5"
    assert not any(caption.startswith("Validation text") for caption in page.tables)
    for absent in ("was raised", "temperature scaling"):
        assert absent not in page.words.split("Recipe")[0]


def test_metrics_of_version_0_1_give_the_same_page() -> None:
    """With the names that they had then."""
    note = {"temperature": 1.25, "loss": [2.1, 2.142], "tokens": 65_536}
    current, old = sample_metrics(), sample_metrics()
    current["training"]["temperature_scaling"] = note
    old["training"]["softened"] = note
    old["refit"] = old.pop("fit")
    old["refit"]["head"]["softened"] = old["refit"]["head"].pop("temperature_scaling")
    assert rendered(old) == rendered(current)


@pytest.mark.parametrize(
    ("error", "text"),
    [(None, MISSING), (math.nan, "NaN"), (math.inf, "inf"), (0.00012, "0.0001"), (1e7, "1.00e+07")],
)
def test_errors_in_words(error: float | None, text: str) -> None:
    assert error_text(error) == text


def test_what_temperature_scaling_after_the_training_cost() -> None:
    metrics = sample_metrics()
    assert "Temperature scaling by" not in Page(rendered(metrics)).words
    note = {"temperature": 1.171660, "loss": [2.1, 2.142], "tokens": 65_536}
    metrics["training"]["temperature_scaling"] = note
    words = Page(rendered(metrics)).words
    assert "Temperature scaling by 1.17 (loss on its own text from 2.100 to 2.142)" in words


def test_notes_do_not_repeat_the_table_of_differences() -> None:
    assert other_notes(sample_plan()) == sample_plan()["notes"][1:]


def test_numbers_in_words() -> None:
    assert [compact(0), compact(500_000), compact(2_500_000)] == ["0", "500k", "2.5M"]
    assert in_words(812_000) == "812,000"
    assert [size(512), size(3.1e9)] == ["512 Bytes", "3.1 GB"]
    assert [duration(4.21), duration(185.2)] == ["4.2 seconds", "3 minutes and 5 seconds"]
    assert duration(7800) == "2 hours and 10 minutes"


# Benchmarks


def test_benchmarks_are_compared_only_where_they_were_measured_alike() -> None:
    """A row for each task, metric and way of measuring; the sources first."""
    table = task_table(sample_tasks(), SOURCES)
    assert table is not None
    assert table.models == ["code", "built", "trained"]
    rows = {(r.task, r.metric, r.examples, r.documents): r.values for r in table.rows}
    assert rows == {
        ("mmlu", "acc", "0", "1,319"): [MISSING, "0.400 ± 0.012", "0.451 ± 0.012"],
        ("mmlu", "acc_norm", "0", "1,319"): [MISSING, "0.500 ± 0.010", "0.500 ± 0.010"],
        ("mmlu", "acc", "5, chat template", "20 of 1,319"): ["0.250", MISSING, MISSING],
        ("<b>own</b>", "f1", "mixed", "1,319"): ["NaN", MISSING, MISSING],
    }
    assert table.versions == ["0.4.13"]
    assert task_table({}, SOURCES) is None and task_table({"built": {}}, SOURCES) is None


def test_benchmarks_are_in_the_report_where_there_are_any() -> None:
    assert "Benchmarks" not in rendered(sample_metrics())
    page = rendered(sample_metrics() | {"tasks": sample_tasks()})
    assert "Benchmarks" in page and "0.451 ± 0.012" in page
    assert "&lt;b&gt;own&lt;/b&gt;" in page and "<b>own</b>" not in page
