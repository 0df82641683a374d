"""What the report says beside tables of numbers: where a model comes from, what to know of it,
which expert a token prefers, how to make it again."""

import copy
import math
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

import pytest
from test_report import (
    DOMAINS,
    SOURCES,
    changed,
    read,
    sample_metrics,
    sample_plan,
    sample_recipe,
    sample_samples,
)

from checks import Page
from symphony_moe.recipe.settings import FormerSource, HubData, Parent
from symphony_moe.reporting.alignment import alignment_strips
from symphony_moe.reporting.comparison_chart import method_strips
from symphony_moe.reporting.fit import fit_tables
from symphony_moe.reporting.lineage import build_words, lineage, text_words
from symphony_moe.reporting.losses import loss_strips, loss_table, marks_to_beat
from symphony_moe.reporting.numbers import MISSING
from symphony_moe.reporting.repeating import how_to_repeat
from symphony_moe.reporting.routing import likeness_tables
from symphony_moe.reporting.run_page import Beside, render
from symphony_moe.reporting.samples import coloured_text, shown_text
from symphony_moe.reporting.stages import stage_table
from symphony_moe.reporting.strips import Scale, Strips, Value, expert_colour
from symphony_moe.reporting.training import held_out_chart, training_facts
from symphony_moe.reporting.warned import warnings_of
from symphony_moe.runs.samples import Samples

# Lineage


def test_a_source_is_told_with_its_revision_adapter_licence_and_text() -> None:
    plan, recipe = sample_plan(), sample_recipe()
    plan["sources"][0]["licences"] = [{"identifier": "mit", "name": None, "link": None}]
    plan["sources"][1] |= {"adapter": "me/lora", "adapter_base": "org/base"}
    other = {"identifier": "other", "name": "own", "link": None}
    plan["sources"][1]["licences"] = [other, None]
    spec = recipe.sources["maths"].model_copy(
        update={"revision": "v2", "adapter_revision": "v3", "sha256": {"model.safetensors": "ab"}}
    )
    recipe = changed(recipe, sources=recipe.sources | {"maths": spec})
    rows = lineage(plan, recipe).rows
    assert [(row.number, row.name, row.anchor) for row in rows] == [
        (0, "general", True),
        (1, "maths", False),
        (2, "code", False),
    ]
    assert [row.licence for row in rows] == ["mit", "other (own); adapter: none stated", ""]
    assert rows[1].adapter == "with the LoRA me/lora (v3), trained on org/base"
    assert (rows[1].revision, rows[1].text, rows[1].weights) == (
        "v2",
        "maths.jsonl",
        [("model.safetensors", "ab")],
    )


def test_a_source_that_gives_text_alone_and_one_that_was_taken_out_are_told() -> None:
    plan, recipe = sample_plan(), sample_recipe()
    del plan["sources"][2]
    former = FormerSource(
        name="law", hub_ids=["org/law"], licences=[{"identifier": "mit", "name": None}]
    )
    parent = Parent(
        model="trained", sha256="0", added="maths", removed="law", tied_head=False, former=[former]
    )
    found = lineage(plan, recipe.model_copy(update={"parent": parent}))
    assert [(row.number, row.name) for row in found.rows][-1] == (None, "code")
    assert found.former == [("law", "org/law", "mit")]
    assert found.steps[1].words == [
        "backbone and other experts: kept from an earlier run",
        "expert made anew: maths",
        "expert left out: law",
    ]


def test_the_steps_say_what_the_build_and_the_training_did() -> None:
    recipe = sample_recipe()
    words = build_words(recipe)
    assert words[0] == "aligned to general: residual stream, attention heads, FFN neurons"
    assert "fitted to the sources, layer by layer" in words
    plain = changed(
        recipe,
        align__residual="none",
        align__heads="none",
        align__neurons="none",
        fit__method="none",
        router__init="regression",
        experts__init="copy",
    )
    assert build_words(plain) == [
        "nothing aligned",
        "attention: interpolated on the sphere between the sources'",
        "experts: copies of general's FFN",
        "router: by regression",
    ]
    metrics = sample_metrics()
    titles = [step.title for step in lineage(sample_plan(), recipe, read(metrics)).steps]
    assert titles == ["Sources", "Build, method harmonized", "The new model", "Trained"]
    metrics["training"]["settings"] = {"teacher": "sources"}
    last = lineage(sample_plan(), recipe, read(metrics)).steps[-1]
    assert last.words == ["all weights", "1,000,000 tokens", "the sources as teachers"]
    del metrics["training"]
    assert lineage(sample_plan(), recipe, read(metrics)).steps[-1].title == "Not trained"


def test_maps_that_were_refused_are_no_part_of_what_the_build_did() -> None:
    metrics = sample_metrics()
    refused = next(iter(metrics["alignment"]["neurons"]))
    metrics["alignment"]["neurons"][refused]["used"] = False

    def build_step() -> list[str]:
        return lineage(sample_plan(), sample_recipe(), read(metrics)).steps[1].words

    assert f"not used: FFN neurons of {refused}" in build_step()
    metrics["alignment"]["neurons"][refused]["used"] = True
    assert not any("FFN neurons of" in words for words in build_step())


def test_text_is_named_without_the_machines_folders() -> None:
    assert text_words(["/home/me/a.jsonl", "/data/b.txt"]) == "a.jsonl, b.txt"
    assert text_words("bundled:python") == "bundled:python"
    assert text_words(HubData(hub="org/set", name="en")) == "org/set, en, train"
    assert text_words(HubData(hub="/home/me/set")) == "set, train"


# Strips


def test_a_mark_stands_where_its_value_is_on_the_scale() -> None:
    scale = Scale.of(2.0, 3.0)
    assert (scale.axis[0], scale.axis[-1]) == ((0.0, "2.0"), (100.0, "3.0"))
    marks = scale.marks_of([Value("a", 2.25, ""), Value("b", 9.0, ""), Value("c", math.nan, "")])
    assert [(mark.kind, mark.left, mark.beyond) for mark in marks] == [
        ("a", 25.0, False),
        ("b", 100.0, True),
    ]


def test_the_mark_to_beat_is_the_own_source_and_out_of_domain_the_best() -> None:
    metrics = sample_metrics()
    metrics["sources"]["maths"]["medicine"] = 1.5
    marks = marks_to_beat(read(metrics), sample_recipe())
    assert marks["code"] == ("code", metrics["sources"]["code"]["code"])
    assert marks["medicine"] == ("maths", 1.5)
    metrics["sources"]["code"]["code"] = None
    assert "code" not in marks_to_beat(read(metrics), sample_recipe())


def test_a_strip_of_losses_has_the_mark_the_models_and_how_far_they_are_from_it() -> None:
    metrics = sample_metrics()
    metrics["sources"]["general"]["code"] = 99.0
    found = loss_strips(read(metrics), sample_recipe())
    assert found is not None and found.any_beyond
    assert [row.label for row in found.rows] == DOMAINS
    row = found.rows[2]
    mark, built = metrics["sources"]["code"]["code"], metrics["built"]["code"]
    assert row.words[0] == f"mark {mark:.3f}"
    assert row.words[1] == f"built {built:.3f} ({built - mark:+.3f})"
    kinds = [mark.kind for mark in row.marks]
    assert kinds == ["other", "other", "goal", "before", "after"]
    assert [mark.beyond for mark in row.marks] == [True, False, False, False, False]
    assert found.rows[3].note == "out of domain"
    del metrics["built"], metrics["trained"]
    assert loss_strips(read(metrics), sample_recipe()) is None


def test_a_diverged_model_has_no_mark_on_its_strip() -> None:
    metrics = sample_metrics()
    metrics["trained"]["code"] = None
    found = loss_strips(read(metrics), sample_recipe())
    assert found is not None
    assert [mark.kind for mark in found.rows[2].marks][-2:] == ["goal", "before"]
    assert found.rows[2].words[-1] == "trained NaN (NaN)"


def test_the_table_says_how_far_each_model_is_from_the_marks() -> None:
    metrics = sample_metrics()
    table = loss_table(read(metrics), sample_recipe())
    assert table is not None
    (_, built), _ = table.beyond
    marks = [metrics["sources"][name][name] for name in SOURCES]
    marks.append(min(losses["medicine"] for losses in metrics["sources"].values()))
    apart = [metrics["built"][d] - mark for d, mark in zip(DOMAINS, marks, strict=True)]
    expected = [*apart, sum(apart[:3]) / 3, apart[3]]
    assert built == [f"{value:+.3f}" for value in expected]


def test_a_strip_of_alignment_is_the_mean_before_and_after() -> None:
    metrics = sample_metrics()
    metrics["alignment"]["heads"]["maths"]["used"] = False
    found = alignment_strips(read(metrics).alignment, sample_recipe())
    assert found is not None and [row.label for row in found.rows] == ["maths", "code"] * 3
    before = (0.1112 + 0.0147 + 0.02 + 0.018) / 4
    assert found.rows[0].marks[0].left == pytest.approx(100 * before, abs=0.01)
    assert found.rows[0].words[0] == f"before {before:.3f}"
    assert found.rows[2].note == "Attention heads, map refused"
    assert alignment_strips({}, sample_recipe()) is None


def test_a_method_has_a_strip_of_its_means() -> None:
    entries: Any = [
        {"method": "m", "seed": seed, "stage": stage, "mean_in_domain": loss + seed / 10}
        for stage, loss in (("built", 3.0), ("trained", 2.5))
        for seed in (0, 1)
    ]
    found = method_strips(entries, "in domain", 2.0)
    assert isinstance(found, Strips)
    (row,) = found.rows
    assert row.words == ["built 3.050", "trained 2.550"]
    assert [mark.kind for mark in row.marks] == ["goal", "before", "after"]
    assert row.marks[2].title == "m, trained 2.550 (2.500 to 2.600)"
    assert [kind for kind, _ in found.kinds] == ["goal", "before", "after"]
    bare = method_strips(entries, "in domain", None)
    assert bare is not None and len(bare.rows[0].marks) == 2
    assert method_strips([], "in domain", 2.0) is None


# Text by expert


def test_tokens_are_coloured_by_the_mean_of_the_last_stage_and_carry_all_layers() -> None:
    found = coloured_text(Samples.model_validate(sample_samples()))
    assert found is not None
    assert (found.stages, found.shown, found.layers) == (["built", "trained"], "trained", [0, 1])
    first, second, third = found.domains[0][1][0].tokens
    assert (first.colour, first.by) == (expert_colour(2), 45)
    assert first.title == "code 45 %, mean over layers"
    assert first.choices == [("built", "0:45 0:50 0:80"), ("trained", "2:45 2:50 0:80")]
    assert (second.text, third.text) == (" <b>\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n", "·")
    assert coloured_text(None) is None


def test_what_is_not_seen_otherwise_is_shown_by_a_sign() -> None:
    assert shown_text("a\tb") == "a→\tb" and shown_text(" x") == " x"


def test_experts_beyond_the_eighth_have_other_lines() -> None:
    looks = [expert_colour(number) for number in range(24)]
    assert len(set(looks)) == 24 and looks[9] == "e1 s1"


def test_text_is_readable_on_every_experts_colour() -> None:
    """A contrast of 4.5 and more (WCAG AA) at the strongest, in both schemes."""
    style = resources.files("symphony_moe.reporting").joinpath("page.css").read_text("utf-8")
    (strength,) = set(re.findall(r"calc\(var\(--by\) \* ([.\d]+)\)", style))
    light, dark = re.findall(r":root \{\n(.*?)\}", style, re.DOTALL)[:2]
    for scheme in (light, dark):
        colours = {
            name: [int(digits[place : place + 2], 16) for place in (0, 2, 4)]
            for name, digits in re.findall(r"--(\w+): #(\w{6})", scheme)
        }
        for number in range(8):
            behind = [
                float(strength) * own + (1 - float(strength)) * page
                for own, page in zip(colours[f"c{number}"], colours["page"], strict=True)
            ]
            assert contrast(behind, colours["ink"]) >= 4.5, number
        assert contrast(colours["link"], colours["page"]) >= 4.5


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    """As WCAG 2 counts it, of two sRGB colours from 0 to 255."""

    def luminance(colour: Sequence[float]) -> float:
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for c in (part / 255 for part in colour)
        ]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_the_page_has_the_text_and_one_script_that_is_the_packages_own() -> None:
    """What comes from a run is in escaped text and attributes, and never in the script."""
    samples = sample_samples()
    evil = "</script><script>alert('x')</script>"
    samples["domains"][evil] = copy.deepcopy(samples["domains"]["code"])
    samples["domains"][evil][0]["tokens"][0] = evil
    samples["experts"] = [evil, *SOURCES[1:]]
    beside = Beside(Samples.model_validate(samples), {}, [evil])
    html = render(read(sample_metrics()), sample_plan(), sample_recipe(), beside)
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("script") == 1
    (script,) = re.findall(r"<script>\n(.*?)</script>", html, re.DOTALL)
    own = resources.files("symphony_moe.reporting").joinpath("samples.js").read_text("utf-8")
    assert [line.strip() for line in script.splitlines()] == [
        line.strip() for line in own.splitlines()
    ]
    tokens = [a for tag, a in page.tags if "token" in (a.get("class") or "").split()]
    assert len(tokens) == 9 and tokens[0]["data-built"] == "0:45 0:50 0:80"
    assert page.words.count(evil) >= 4
    assert "Text by expert" in page.text
    assert "fetch(" not in own and "import" not in own and "http" not in own


# Warnings


def found_warnings(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    recipe = sample_recipe()
    return warnings_of(sample_plan(), recipe, read(metrics), fit_tables(read(metrics).fit, recipe))


def test_refused_steps_are_warned_of() -> None:
    metrics = sample_metrics()
    source = [("Sources", "rope_theta: the anchor's is used for the whole model.")]
    assert found_warnings(metrics) == source
    metrics["alignment"]["heads"]["maths"]["used"] = False
    metrics["fit"]["layers"][1]["experts"] |= {"error": [0.38, 0.98], "kept": False}
    metrics["fit"]["layers"][1]["experts"]["ridge"]["down_proj of maths"] = 0.1
    metrics["trained"]["code"] = None
    assert found_warnings(metrics) == [
        ("Losses", "The trained model has a loss that is NaN or infinite: it diverged."),
        ("Alignment", "Attention heads: refused for maths."),
        ("Fit", "Step refused, it did not lower its error: experts in 1 of 4 layers."),
        ("Fit", "The ridge was raised in 1 of 33 regressions (see Regressions)."),
        *source,
    ]
    metrics["fit"]["chosen"] = "plain mean"
    words = " ".join(sentence for _, sentence in found_warnings(metrics))
    assert "The fitted model was refused" in words and "Attention heads" not in words


def test_what_was_logged_is_a_warning_and_no_note_beside() -> None:
    note = "backbone.weights has no effect on attention: it is the anchor's"
    beside = Beside(logged=[note])
    page = Page(render(read(sample_metrics()), sample_plan(), sample_recipe(), beside))
    assert page.words.count(note) == 1
    assert "Warnings" in page.text


def test_text_by_expert_that_is_missing_is_named() -> None:
    page = Page(render(read(sample_metrics()), sample_plan(), sample_recipe()))
    assert "No text by expert; run symphony evaluate DIR ." in page.words
    assert "Text by expert" not in page.text and not any(tag == "script" for tag, _ in page.tags)


# Time and memory, curves


def test_every_stage_has_its_time_memory_and_text() -> None:
    metrics = sample_metrics()
    metrics["timing"] |= {"train_peak_rss_bytes": 5e9, "other_tokens": 7, "said": "x"}
    table = stage_table(read(metrics), sample_plan())
    assert table is not None
    build, train, evaluate, every = table.rows
    assert (build.time, build.planned_time) == (
        "4 minutes and 50 seconds",
        "5 minutes and 12 seconds",
    )
    assert (build.memory, build.planned_memory, build.tokens) == ("3.1 GB", "3.5 GB", "262,144")
    assert (train.stage, train.memory, train.tokens) == ("Train", "5.0 GB", "1,000,000")
    assert (evaluate.memory, evaluate.tokens) == (MISSING, MISSING)
    total = 290.4 + 185.2 + 81.7
    assert [row.share for row in table.rows] == [
        *(round(100 * seconds / total) for seconds in (290.4, 185.2, 81.7)),
        100,
    ]
    assert every.time == "9 minutes and 17 seconds"
    assert table.others == [("Other", "7"), ("Said", "x")]
    del metrics["timing"]
    assert stage_table(read(metrics), sample_plan()) is None


def test_held_out_losses_on_the_way_are_a_line_for_every_domain() -> None:
    metrics = sample_metrics()
    points = [{"tokens": t, "losses": {d: 3 - t / 1000 for d in DOMAINS}} for t in (100, 200)]
    metrics["training"]["held_out"] = points
    training = read(metrics).training
    assert training is not None
    chart = held_out_chart(training.held_out, sample_recipe())
    assert chart is not None and [line.name for line in chart.lines] == DOMAINS
    assert [(p.x, p.y) for p in chart.lines[3].points] == [(100, 2.9), (200, 2.8)]
    assert held_out_chart([], sample_recipe()) is None


@pytest.mark.parametrize(
    ("chosen", "steps", "said"),
    [
        (0, 50, "before training (validation loss 2.000, at best 2.100 after, stopped at step 50 "),
        (0, 100, "before training (validation loss 2.000, at best 1.900 after)"),
        (50, 100, "of step 50 (validation loss 2.000 before, 2.100 there, 1.900 at the end)"),
        (100, 100, "of step 100 (validation loss 2.000 before, 1.900 there)"),
    ],
)
def test_the_report_says_which_weights_were_kept(chosen: int, steps: int, said: str) -> None:
    metrics = sample_metrics()
    curve = [{"step": s, "loss": x} for s, x in ((0, 2.0), (50, 2.1), (100, 1.9)) if s <= steps]
    found = {"tokens": 9, "planned_steps": 100, "chosen_step": chosen, "curve": curve}
    assert "Weights kept" not in dict(training_facts(read(metrics).training))
    metrics["training"] |= {"steps": steps, "validation": found}
    assert said in dict(training_facts(read(metrics).training))["Weights kept"]


def test_likeness_by_layer_is_a_line_for_every_model() -> None:
    found = likeness_tables(read(sample_metrics()).cka)
    assert found is not None and found.chart is not None
    lines = {line.name: [round(point.y, 6) for point in line.points] for line in found.chart.lines}
    assert list(lines) == ["sources", "built", "trained"]
    assert lines["built"] == [0.3, 0.31, 0.32, 0.33]


# How to repeat it


def test_the_commands_make_the_same_model_again() -> None:
    metrics, recipe = sample_metrics(), sample_recipe()
    manifest = {"versions": {"torch": "2.9"}, "begun_with": {"torch": "2.8"}, "processes": 4}
    found = how_to_repeat(recipe, read(metrics), manifest)
    assert found.commands == "symphony run recipe.yaml --out DIR\nsymphony verify DIR --deep"
    assert found.versions == [("torch", "2.9")]
    assert found.explanation == [
        "The build ran in 4 processes.",
        "The build was begun with other versions: torch 2.8.",
    ]
    del metrics["training"]
    assert how_to_repeat(recipe, read(metrics), {}).commands.splitlines() == [
        "symphony build recipe.yaml --out DIR",
        "symphony verify DIR",
        "symphony evaluate DIR",
        "symphony report DIR",
    ]


@pytest.mark.parametrize(
    ("added", "removed", "command"),
    [
        ("law", None, "symphony add OLD law --model MODEL --data FILE --out DIR"),
        ("law", "law", "symphony replace OLD law --model MODEL --data FILE --out DIR"),
        (None, "law", "symphony remove OLD law --out DIR"),
        ("my law", None, "symphony add OLD 'my law' --model MODEL --data FILE --out DIR"),
        (None, "it's law", "symphony remove OLD 'it'\"'\"'s law' --out DIR"),
    ],
)
def test_a_changed_run_is_made_again_from_the_old_one(
    added: str | None, removed: str | None, command: str
) -> None:
    parent = Parent(model="trained", sha256="0", added=added, removed=removed, tied_head=False)
    recipe = sample_recipe().model_copy(update={"parent": parent})
    found = how_to_repeat(recipe, read(sample_metrics()), {})
    assert found.commands.splitlines() == [
        command,
        *(f"symphony {name} DIR" for name in ("train", "evaluate", "report")),
    ]
