"""The page of a comparison shows what the entries say: means, ranges, lines; whole and escaped."""

import copy
import itertools
import math
import re
import subprocess
import sys
from typing import Any

import pytest
from plots import Plot
from test_report import changed, sample_recipe

from checks import Page
from symphony_moe.reporting.charts import Chart, draw
from symphony_moe.reporting.comparison_chart import line_chart
from symphony_moe.reporting.comparison_losses import loss_cells, main_table, task_table_of_methods
from symphony_moe.reporting.comparison_page import comparison_facts, render_comparison
from symphony_moe.reporting.numbers import MISSING, loss_text
from symphony_moe.reporting.over_seeds import spread

LIMITS: dict[str, float | None] = {"in domain": 2.351, "out of domain": 3.08}
DOMAINS = ["general", "maths", "medicine"]
Entries = list[Any]

FINAL = {"paper": (2.9, 3.5), "ours": (2.4, 3.2), "btx": (2.85, 3.6)}
"""Method -> mean in and out of domain of seed 0; seed n has 0.01 n more."""


def means(method: str, seed: int, tokens: int) -> dict[str, Any]:
    """2 nats above the final ones at 200 tokens, down to them in a straight line at 1000."""
    above = 0.01 * seed + 2 * (1000 - tokens) / 800
    inside, outside = FINAL[method]
    return {"mean_in_domain": inside + above, "mean_out_of_domain": outside + above}


def sample_entry(method: str, seed: int, stage: str, tokens: int) -> dict[str, Any]:
    of_model = means(method, seed, tokens)
    inside, outside = of_model.values()
    losses = {"general": inside + 0.1, "maths": inside - 0.1, "medicine": outside}
    who = {"method": method, "seed": seed, "stage": stage, "tokens": tokens}
    return who | {"losses": losses} | of_model


def sample_entries(seeds: tuple[int, ...] = (0, 1, 2), *, curve: bool = True) -> Entries:
    entries: Entries = []
    for method in FINAL:
        for seed in seeds:
            built = {"seconds": 40.0 + seed, "peak_rss_bytes": 1_000_000_000}
            reached = {"tokens": 400 + seed, "share": 0.4 + seed / 1000}
            points = [{"tokens": t} | means(method, seed, t) for t in (400, 600, 1000)]
            trained = {
                "seconds": 100.0 + seed,
                "peak_rss_bytes": 2_000_000_000,
                "calibration_tokens": 200,
                "curve": points if curve else [],
                "reaches": reached if method == "ours" else dict.fromkeys(reached),
            }
            entries.append(sample_entry(method, seed, "built", 200) | built)
            entries.append(sample_entry(method, seed, "trained", 1000) | trained)
    return entries


def with_tasks(entries: Entries) -> Entries:
    """ "ours" measured as built and as trained, "paper" as trained, and there one seed in another
    way too; "btx" not at all."""
    way = {"samples": 1319, "documents": 1319, "chat_template": False, "lm_eval": "0.4.13"}
    for row in entries:
        score = {"built": 0.25, "trained": 0.5}[row["stage"]] + row["seed"] / 100
        mmlu = {"acc": score, "acc_stderr": 0.0123, **way, "fewshot": 0}
        if row["method"] == "ours":
            row["tasks"] = {"mmlu": mmlu}
        if (row["method"], row["stage"]) == ("paper", "trained"):
            row["tasks"] = {"mmlu": mmlu | {"acc": score - 0.1}}
            if row["seed"] == 1:
                chat = {"chat_template": True, "samples": 20, "fewshot": 5}
                row["tasks"]["gsm8k"] = {"exact_match,strict-match": 0.125, **way, **chat}
    return entries


def rendered(entries: Entries, **keywords: Any) -> Page:
    return Page(
        render_comparison(
            "Three methods",
            entries,
            LIMITS,
            "paper",
            [("Sources", "general, maths")],
            {"paper": {}, "ours": {"method": "harmonized", "train": {"teacher": "sources"}}},
            **keywords,
        )
    )


def entry(entries: Entries, method: str, seed: int, stage: str) -> dict[str, Any]:
    return next(e for e in entries if (e["method"], e["seed"], e["stage"]) == (method, seed, stage))


def cells(page: Page, table: str, method: str) -> list[str]:
    row = next(row for row in page.table(table) if row[0] == method)
    return [" ".join(cell.split()) for cell in row[1:]]


def chart_of(entries: Entries, where: str = "in domain", limit: float | None = 2.4) -> Chart:
    chart = line_chart(entries, where, limit)
    assert chart is not None
    return chart


# Tables


def test_every_mean_and_range_is_on_the_page() -> None:
    entries = sample_entries()
    page = rendered(entries)
    for method in FINAL:
        expected = []
        for stage in ("built", "trained"):
            for key in ("mean_in_domain", "mean_out_of_domain"):
                losses = [entry(entries, method, seed, stage)[key] for seed in range(3)]
                expected.append(f"{sum(losses) / 3:.3f} ({min(losses):.3f} to {max(losses):.3f})")
        assert cells(page, "Held-out loss", method)[:4] == expected
    assert cells(page, "Held-out loss", "limit")[:4] == ["2.351", "3.080"] * 2
    assert "mean over 3 seeds (lowest to highest)" in page.words


def test_the_page_says_what_a_method_costs_and_when_it_reaches_the_reference() -> None:
    entries = sample_entries()
    page = rendered(entries)
    cost = ["1 minute and 41 seconds (build 41 seconds)", "2.0 GB (build 1.0 GB)"]
    assert cells(page, "Held-out loss", "ours")[4:] == ["40.1 % (40.0 to 40.2 %)", *cost]
    assert cells(page, "Held-out loss", "paper")[4:] == ["reference", *cost]
    assert cells(page, "Held-out loss", "btx")[4:] == ["not reached", *cost]
    # Where nothing was measured on the way nobody knows.
    for seed in range(3):
        entry(entries, "btx", seed, "trained")["curve"] = []
    assert cells(rendered(entries), "Held-out loss", "btx")[4:] == [MISSING, *cost]


def test_a_seed_that_does_not_reach_the_reference_is_not_averaged_away() -> None:
    entries = sample_entries()
    entry(entries, "ours", 1, "trained")["reaches"] = {"tokens": None, "share": None}
    entry(entries, "btx", 1, "trained")["reaches"] = {"tokens": 500, "share": 0.5}
    page = rendered(entries)
    assert cells(page, "Held-out loss", "ours")[4] == (
        "40.1 % (40.0 to 40.2 %; not reached by 1 of 3 seeds)"
    )
    assert cells(page, "Held-out loss", "btx")[4] == "50.0 % (not reached by 2 of 3 seeds)"


def test_nothing_is_said_of_reaching_a_loss_that_is_not_a_number() -> None:
    entries = sample_entries()
    for seed in range(3):
        entry(entries, "paper", seed, "trained")["mean_in_domain"] = None
    assert cells(rendered(entries), "Held-out loss", "btx")[4] == MISSING


def test_one_seed_has_no_range() -> None:
    entries = sample_entries(seeds=(7,))
    page = rendered(entries)
    row = [f"{loss:.3f}" for loss in (4.47, 5.27, 2.47, 3.27)]
    assert cells(page, "Held-out loss", "ours")[:5] == [*row, "40.7 %"]
    assert "A method with one seed has no range" in page.words
    assert "in nats per token, one seed;" in page.words
    assert "overlap" not in page.words
    plot = Plot(draw(chart_of(entries)))
    assert not any(plot.bands(number) for number in range(3))


def test_the_lowest_mean_of_every_column_is_bold() -> None:
    entries = sample_entries()
    for seed in range(3):
        entry(entries, "btx", seed, "trained")["mean_out_of_domain"] = 3.1
    table = main_table(entries, LIMITS, "paper", ["in domain", "out of domain"])
    best = [[row[0] for row in table.rows if row[1][column].best] for column in range(4)]
    assert best == [["ours"], ["ours"], ["ours"], ["btx"]]
    assert "<b>2.410</b>" in rendered(entries).html


def test_means_that_look_equal_are_marked_alike() -> None:
    column = {"a": {0: 2.00004}, "b": {0: 2.00001}, "c": {0: 2.1}}
    assert [method for method, cell in loss_cells(column).items() if cell.best] == ["a", "b"]


def test_the_best_has_the_lowest_mean_of_all_its_seeds() -> None:
    # Neither the lowest value, nor a mean without the seed that diverged.
    column: dict[str, dict[int, float | None]] = {
        "a": {0: 1.5, 1: 2.7},
        "b": {0: 2.0, 1: 2.0},
        "c": {0: 2.0, 1: None},
    }
    assert [method for method, cell in loss_cells(column).items() if cell.best] == ["b"]


def test_the_page_says_where_the_ranges_of_the_best_and_the_second_best_overlap() -> None:
    entries = sample_entries()
    words = rendered(entries).words
    assert "not tell the two apart" not in words
    assert "do not overlap: built, in domain (ours before btx); " in words
    entry(entries, "ours", 2, "trained")["mean_in_domain"] = 2.86
    words = rendered(entries).words
    assert (
        "Trained, in domain: the ranges of the best and the second best overlap: "
        "ours (2.400 to 2.860) and btx (2.850 to 2.870). These seeds do not tell the two apart."
    ) in words
    assert "trained, in domain (ours before btx)" not in words


@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_a_seed_that_diverged_is_left_out_and_its_method_not_ranked(loss: float | None) -> None:
    entries = sample_entries()
    diverged = entry(entries, "ours", 1, "trained")
    diverged["mean_in_domain"] = loss
    diverged["losses"]["maths"] = loss
    page = rendered(entries)
    assert cells(page, "Held-out loss", "ours")[2] == "2.410 (2.400 to 2.420; 2 of 3 seeds)"
    assert "not ranked in that column: ours, trained, in domain (seed 1)." in page.words
    table = main_table(entries, LIMITS, "paper", ["in domain"])
    assert [row[0] for row in table.rows if row[1][1].best] == ["btx"]
    assert cells(page, "Trained models by domain", "ours")[:2] == ["2.510", "2.310 (2 of 3 seeds)"]
    for seed in (0, 2):
        entry(entries, "ours", seed, "trained")["mean_in_domain"] = loss
    assert cells(rendered(entries), "Held-out loss", "ours")[2] == "NaN"


def test_without_domains_of_no_source_there_is_no_column_and_no_chart_of_them() -> None:
    entries = sample_entries()
    for row in entries:
        row["mean_out_of_domain"] = None
        for point in row.get("curve", []):
            point["mean_out_of_domain"] = None
    page = rendered(entries)
    assert [len(row) for row in page.table("Held-out loss")[1:]] == [6] * 5
    assert "Out of domain" not in page.text
    assert "No loss was measured out of domain." in page.words
    assert "NaN or infinite" not in page.words


def test_trained_losses_by_domain_are_means_over_seeds() -> None:
    entries = sample_entries()
    page = rendered(entries)
    assert page.table("Trained models by domain")[0] == ["Method", *DOMAINS]
    for method in FINAL:
        over_seeds = [
            sum(entry(entries, method, seed, "trained")["losses"][domain] for seed in range(3)) / 3
            for domain in DOMAINS
        ]
        assert cells(page, "Trained models by domain", method) == [f"{m:.3f}" for m in over_seeds]
    grouped = rendered(entries, in_domain=["maths", "general"]).table("Trained models by domain")
    assert grouped[0] == ["", "in domain", "out of domain"]
    assert grouped[1] == ["Method", *DOMAINS]


def test_the_header_says_what_all_runs_have_in_common() -> None:
    facts = dict(comparison_facts([sample_recipe(), sample_recipe()]))
    assert facts["Sources"] == "general, maths, code" and facts["Anchor"] == "general"
    assert facts["Calibration"] == "262,144 tokens" and facts["Dtype"] == "bfloat16"
    assert facts["Training"] == "10,000,000 tokens" and facts["Trained"] == "all"
    assert facts["Held-out text"] == "65,536 tokens a domain"
    other = changed(sample_recipe(), anchor="code", train__scope="router")
    fewer = comparison_facts([sample_recipe(), other])
    assert fewer == [fact for fact in facts.items() if fact[0] not in ("Anchor", "Trained")]


# Charts


def test_points_are_where_tokens_and_losses_put_them() -> None:
    entries = sample_entries(seeds=(0, 1))
    # Positions 0 to 1000 tokens; losses 2.4 to 4.91, so the axis goes from 2 to 5.
    chart = chart_of(entries)
    plot = Plot(draw(chart))
    assert list(plot.upward) == [2, 3, 4, 5]
    assert list(plot.across) == [0, 200, 400, 600, 800, 1000]
    assert {"2", "5", "0", "800", "1k"} <= {text for text, _ in plot.texts}
    ours = chart.lines[1]
    assert ours.name == "ours"

    def losses(above: float) -> list[Any]:
        found = (2.4 + above + 2 * (1000 - tokens) / 800 for tokens in (200, 400, 600, 1000))
        return [pytest.approx(loss, abs=2e-3) for loss in found]

    # The curve's last point is the trained model.
    (placed,) = plot.line("ours")
    assert [x for x, _ in placed] == [pytest.approx(x, abs=0.5) for x in (200, 400, 600, 1000)]
    assert [y for _, y in placed] == losses(0.005)
    assert [p.y for p in ours.points] == losses(0.005)
    assert [p.high for p in ours.points] == losses(0.01)
    assert [p.low for p in ours.points] == losses(0.0)
    (band,) = plot.bands(1)
    assert {round(y, 2) for x, y in band if abs(x - 1000) < 1} == {2.4, 2.41}
    assert [round(p.x, 6) for p in ours.points] == [200, 400, 600, 1000]
    assert ours.points[-1].title == "ours, 1,000 tokens: 2.405 (2.400 to 2.410, 2 seeds)"
    assert ours.points[-1].title in plot.titles
    assert chart.level == ("limit", 2.4) and plot.labels[-1] == "limit 2.400"


def test_a_method_without_a_curve_is_a_line_of_two_points() -> None:
    entries = sample_entries(curve=False)
    assert [len(line.points) for line in chart_of(entries).lines] == [2, 2, 2]
    rendered(entries)


def test_only_positions_that_all_seeds_have_are_drawn() -> None:
    entries = sample_entries(seeds=(0, 1))
    curve = entry(entries, "ours", 1, "trained")["curve"]
    curve[0]["tokens"] = 500
    chart = chart_of(entries)
    assert [round(point.x) for point in chart.lines[1].points] == [200, 600, 1000]
    assert chart.notes == ("ours: 2 point(s) not drawn, which were not measured for every seed.",)


@pytest.mark.parametrize("loss", [None, math.nan])
def test_a_point_that_is_not_a_number_breaks_its_line_and_is_said(loss: float | None) -> None:
    entries = sample_entries(seeds=(0, 1))
    entry(entries, "ours", 1, "trained")["curve"][0]["mean_in_domain"] = loss
    chart = chart_of(entries)
    plot = Plot(draw(chart))
    assert [len(part) for part in plot.line("ours")] == [1, 2]
    assert len(plot.bands(1)) == 1
    assert len(chart.notes) == 1 and chart.notes[0].startswith("ours: 1 of 4 point(s)")
    assert chart.notes[0] in rendered(entries).words
    assert not chart_of(entries, "out of domain").notes


def test_a_method_without_a_number_has_no_line_and_keeps_the_others_colours() -> None:
    entries = sample_entries()
    colours = {line.name: (line.colour, line.marker) for line in chart_of(entries).lines}
    assert len(set(colours.values())) == 3
    for row in entries:
        if row["method"] == "paper":
            row["mean_in_domain"] = None
            for point in row.get("curve", []):
                point["mean_in_domain"] = None
    chart = chart_of(entries, limit=None)
    assert [line.name for line in chart.lines] == ["ours", "btx"]
    assert all(colours[line.name] == (line.colour, line.marker) for line in chart.lines)
    assert chart.level is None and len(chart.labels) == 2
    rendered(entries)


def test_a_chart_without_a_number_says_so() -> None:
    entries = sample_entries(curve=False)
    for row in entries:
        row["mean_in_domain"] = math.nan
    assert line_chart(entries, "in domain", 2.0) is None
    assert "No curve in domain" in rendered(entries).words


@pytest.mark.parametrize("number", [1, 3, 30, 60])
def test_labels_of_many_methods_do_not_overlap(number: int) -> None:
    entries = [
        row | {"method": f"{row['method']} {k}"} for k in range(number) for row in sample_entries()
    ]
    plot = Plot(draw(chart_of(entries)))
    places = sorted(plot.label_heights)
    assert len(places) == 3 * number + 1
    gaps = [after - before for before, after in itertools.pairwise(places)]
    assert min(gaps) >= 13.9
    top, bottom = min(plot.upward.values()), max(plot.upward.values())
    assert places[0] >= top - 1 and places[-1] <= bottom + 8


# Benchmarks


def test_benchmarks_are_means_over_seeds_by_method_and_stage() -> None:
    entries = with_tasks(sample_entries())
    entry(entries, "btx", 0, "built")["tasks"] = {}
    page = rendered(entries)
    methods, stages, *rows = page.table("Tasks of lm-evaluation-harness 0.4.13, mean over 3 seeds")
    assert methods[4:] == ["paper", "ours"]
    assert stages == ["Task", "Metric", "Examples", "Documents", "trained", "built", "trained"]
    assert [[" ".join(cell.split()) for cell in row] for row in rows] == [
        [
            "mmlu",
            "acc",
            "0",
            "1,319",
            "0.410 (0.400 to 0.420)",
            "0.260 (0.250 to 0.270)",
            "0.510 (0.500 to 0.520)",
        ],
        [
            "gsm8k",
            "exact_match,strict-match",
            "5, chat template",
            "20 of 1,319",
            "0.125 (1 of 3 seeds)",
            MISSING,
            MISSING,
        ],
    ]
    titles = [attributes.get("title") for _, attributes in page.tags]
    assert "seed 0: 0.250 ± 0.012, seed 1: 0.260 ± 0.012, seed 2: 0.270 ± 0.012" in titles
    assert "seed 0: not measured, seed 1: 0.125, seed 2: not measured" in titles


@pytest.mark.parametrize(
    "way", [{"fewshot": 5}, {"chat_template": True}, {"samples": 20}, {"lm_eval": "0.4.14"}]
)
def test_what_was_measured_in_another_way_stands_in_another_row(way: dict[str, Any]) -> None:
    entries = with_tasks(sample_entries())
    for seed in range(3):
        entry(entries, "ours", seed, "built")["tasks"]["mmlu"].update(way)
    table = task_table_of_methods(entries)
    assert table is not None
    rows = [[cell.text for cell in row.values] for row in table.rows if row.task == "mmlu"]
    assert rows == [["0.410", MISSING, "0.510"], [MISSING, "0.260", MISSING]]


def test_a_score_that_is_not_a_number_is_left_out_of_the_mean() -> None:
    entries = with_tasks(sample_entries())
    entry(entries, "ours", 1, "trained")["tasks"]["mmlu"]["acc"] = None
    for seed in range(3):
        entry(entries, "ours", seed, "built")["tasks"]["mmlu"]["acc"] = math.nan
    row = cells(rendered(entries), "Tasks of", "mmlu")
    assert row[-2:] == ["NaN", "0.510 (0.500 to 0.520; 2 of 3 seeds)"]


def test_without_benchmarks_there_is_no_section_of_them() -> None:
    entries = sample_entries()
    assert "Benchmarks" not in rendered(entries).text
    entries[0]["tasks"] = {}
    assert "Benchmarks" not in rendered(entries).text
    assert "Benchmarks" in rendered(with_tasks(entries)).text


# The page


def test_every_chart_has_its_numbers_as_a_table() -> None:
    page = rendered(sample_entries(seeds=(0, 1)))
    rows = page.table("Held-out loss in domain against tokens")
    assert rows[0] == ["tokens, calibration included", *FINAL]
    assert [row[0] for row in rows[1:]] == ["200", "400", "600", "1,000"]
    assert rows[-1][2] == "2.405 (2.400 to 2.410)"
    assert "Held-out loss out of domain against tokens: loss, nats per token" in page.tables


def test_names_are_escaped() -> None:
    evil = "<script>alert('x')</script>&\"--x"
    entries = sample_entries()
    way = {"samples": 0, "documents": 0, "chat_template": False}
    for row in entries:
        row["losses"][evil] = 1.0
        row["tasks"] = {evil: {evil: 0.5, **way, "fewshot": 0, "lm_eval": evil}}
    entries += [row | {"method": evil} for row in entries if row["method"] == "ours"]
    page = Page(
        render_comparison(evil, entries, LIMITS, evil, [(evil, evil)], {evil: {evil: evil}})
    )
    assert "script" not in [tag for tag, _ in page.tags]
    assert "<script" not in page.html
    assert any(row[0] == evil for row in page.table("Held-out loss"))
    assert any(row[:2] == [evil, evil] for row in page.table("Tasks of"))
    assert page.text.count(evil) >= 5


def test_the_page_loads_nothing() -> None:
    page = rendered(sample_entries())
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed")
        assert not {"src", "srcset", "xlink:href"} & attributes.keys()
        assert (attributes.get("href") or "#").startswith("#"), "only within the page"
    assert "url(" not in page.html and "@import" not in page.html
    assert not re.search(r"https?://", page.html)


def test_every_colour_and_part_of_the_style_that_is_used_is_there() -> None:
    page = rendered(sample_entries())
    for name in set(re.findall(r"var\((--[\w]+)\)", page.html)) - {"--by"}:
        assert re.search(rf"{name}:", page.html), name
    # Both colour schemes have all of them.
    assert len(re.findall(r"--c7: #", page.html)) == 2


def test_settings_are_shown_as_yaml() -> None:
    page = rendered(sample_entries())
    assert any("method: harmonized\ntrain:\n  teacher: sources\n" in text for text in page.text)
    assert "The recipe as it is." in page.words
    charts = 2  # each with its numbers
    assert [tag for tag, _ in page.tags].count("details") == 1 + charts
    without = Page(render_comparison("Title", sample_entries(), LIMITS, "paper", [], {}))
    assert [tag for tag, _ in without.tags].count("details") == charts


def test_a_run_that_was_not_trained_and_no_run_at_all_render() -> None:
    entries = [row for row in sample_entries() if row["method"] != "btx" or row["stage"] == "built"]
    page = rendered(entries)
    assert cells(page, "Held-out loss", "btx")[2:5] == [MISSING, MISSING, MISSING]
    assert "no model has a loss there" in rendered([]).words


def test_rendering_is_pure() -> None:
    entries = sample_entries()
    before = copy.deepcopy(entries)
    assert rendered(entries).html == rendered(entries).html
    assert entries == before


def test_importing_the_module_is_cheap() -> None:
    program = (
        "import sys; import symphony_moe.reporting.comparison_page;"
        "heavy = {'humanize', 'jinja2', 'matplotlib', 'torch', 'transformers'};"
        "sys.exit(str(sorted(heavy & sys.modules.keys())))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"


def test_a_spread_is_over_numbers_only() -> None:
    found = spread([1.0, None, 3.0, math.nan])
    assert found is not None
    assert (found.mean, found.low, found.high, found.num) == (2.0, 1.0, 3.0, 2)
    assert spread([None, math.inf]) is None and spread([]) is None
    assert loss_text(None) == MISSING
