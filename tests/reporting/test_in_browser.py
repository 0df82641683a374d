"""The pages as a browser shows them: whole, quiet, readable, with the numbers that were measured.

In headless Chromium (`make test-pages`). Every page is looked at in the light and the dark scheme.
"""

import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_comparison_page import rendered as comparison
from test_comparison_page import sample_entries, with_tasks

from conftest import make_recipe
from symphony_moe import pipeline
from symphony_moe.cli import main
from symphony_moe.recipe.load import load_recipe
from symphony_moe.runs.folder import RunFolder

pytestmark = pytest.mark.page

PAGES = ["report", "comparison", "plan"]
SCHEMES = ["light", "dark"]
WIDTHS = [390, 820, 1400]
PAPER = 718
"""CSS pixels between the margins of an A4 page."""

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that has gone the whole way, with everything that a report can show."""
    root = tmp_path_factory.mktemp("pages")
    recipe = make_recipe(
        root,
        method="harmonized",
        fit={"epochs": 1},
        train={"evaluations": 2},
        evaluation={"thresholds": [0.3]},
    )
    return pipeline.run(load_recipe(recipe), root / "run")


@pytest.fixture(scope="module")
def pages(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind of page -> its file."""
    root = tmp_path_factory.mktemp("html")
    (root / "comparison.html").write_text(
        comparison(with_tasks(sample_entries()), in_domain=["general", "maths"]).html
    )
    assert main(["plan", str(run.root.parent / "recipe.yaml"), "--html", f"{root}/plan.html"]) == 0
    return {
        "report": run.report,
        "comparison": root / "comparison.html",
        "plan": root / "plan.html",
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    assert program, "no chromium on the PATH; install it, or name it in CHROMIUM"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def show(browser: Any, pages: dict[str, Path]) -> Iterator[Open]:
    """Opens a page. At the end of the test: it has said nothing, and asked for nothing else."""
    said: list[str] = []
    asked: list[str] = []
    contexts = []

    def get(kind: str, width: int = 820, scheme: str = "light", **settings: Any) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, **settings
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(pages[kind].as_uri())
        return page

    yield get
    for context in contexts:
        context.close()
    assert said == []
    assert set(asked) <= {path.as_uri() for path in pages.values()}


def overflow(page: Any) -> int:
    """By how many pixels a page is wider than what it is shown in."""
    return int(page.evaluate("document.documentElement.scrollWidth - window.innerWidth"))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", PAGES)
def test_axe_finds_nothing(kind: str, scheme: str, show: Open) -> None:
    """Contrast, names, order of headings, tables: what axe can tell by itself."""
    from axe_playwright_python.sync_playwright import Axe

    page = show(kind, scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    found = Axe().run(page).response["violations"]
    told = [(one["id"], [node["target"] for node in one["nodes"]][:5]) for one in found]
    assert told == []


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", PAGES)
def test_a_page_is_never_wider_than_its_window(kind: str, width: int, show: Open) -> None:
    """Only tables and charts scroll, each by itself."""
    page = show(kind, width)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert overflow(page) <= 0


@pytest.mark.parametrize("kind", PAGES)
def test_the_schemes_differ_and_text_is_read_in_both(kind: str, show: Open) -> None:
    colours = []
    for scheme in SCHEMES:
        page = show(kind, scheme=scheme)
        style = "getComputedStyle(document.body)"
        colours.append([page.evaluate(f"{style}.{name}") for name in ("backgroundColor", "color")])
    assert colours[0][0] != colours[1][0] and colours[0][1] != colours[1][1]


@pytest.mark.parametrize("kind", PAGES)
def test_on_paper_everything_is_there_and_black_on_white(kind: str, show: Open) -> None:
    """Nothing that is clicked, all that is folded away, and no line cut at the margin."""
    page = show(kind, PAPER, scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.locator("nav").first.is_visible()
    folded = page.locator("details.printed pre").first
    assert folded.bounding_box()["height"] > 20
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(252, 252, 251)"
    assert overflow(page) <= 0
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_every_link_of_the_contents_leads_to_a_section(show: Open) -> None:
    for kind in PAGES:
        page = show(kind)
        links = page.eval_on_selector_all("nav a", "all => all.map((a) => a.hash)")
        headings = page.eval_on_selector_all(
            "main > section[id]", "all => all.map((one) => '#' + one.id)"
        )
        assert links == headings and len(links) >= 4


# Numbers


def table_of(page: Any, caption: str, number: int = 0) -> list[list[str]]:
    """Cells of the table whose caption begins so (a regular expression); of several the one with
    that number. Empty where there is none."""
    rows: list[list[str]] = page.evaluate(
        """([caption, number]) => {
          const tables = [...document.querySelectorAll("table")];
          const begins = new RegExp("^" + caption);
          const found = tables.filter((one) => begins.test(one.caption?.textContent ?? ""));
          const rows = [...(found[number]?.rows ?? [])];
          return rows.map((row) => [...row.cells].map((cell) => cell.innerText.trim()));
        }""",
        [caption, number],
    )
    return rows


def test_losses_are_those_that_were_measured(run: RunFolder, show: Open) -> None:
    metrics = run.read_json(run.metrics)
    page = show("report")
    rows = {row[0]: row[1:] for row in table_of(page, "Held-out loss in nats per token")}
    domains = ["a", "b", "c", "other"]
    models = metrics["sources"] | {name: metrics[name] for name in ("built", "trained")}
    for model, losses in models.items():
        assert rows[model][:4] == [f"{losses[domain]:.3f}" for domain in domains]
    marks = [metrics["sources"][name][name] for name in "abc"]
    marks.append(min(losses["other"] for losses in metrics["sources"].values()))
    for model in ("built", "trained"):
        apart = [metrics[model][d] - mark for d, mark in zip(domains, marks, strict=True)]
        assert rows[f"{model}, from the mark"][:4] == [f"{value:+.3f}" for value in apart]


def test_marks_stand_where_their_numbers_put_them(run: RunFolder, show: Open) -> None:
    """On every strip of losses, to a pixel, by the numbers of the scale below."""
    metrics = run.read_json(run.metrics)
    page = show("report", 1400)
    found = page.evaluate(
        """() => {
          const middle = (one) => {
            const box = one.getBoundingClientRect();
            return box.left + box.width / 2;
          };
          const strips = document.querySelector("#losses .strips");
          const ticks = [...strips.querySelectorAll(".tick")];
          return {
            scale: ticks.map((one) => [Number(one.textContent), middle(one)]),
            rows: [...strips.querySelectorAll(".strip:not(.axis)")].map((row) =>
              Object.fromEntries(["goal", "before", "after"].map((kind) =>
                [kind, middle(row.querySelector(".mark." + kind))]))),
          };
        }"""
    )
    (low, left), (high, right) = found["scale"][0], found["scale"][-1]
    for domain, row in zip(["a", "b", "c", "other"], found["rows"], strict=True):
        losses = [of[domain] for name, of in metrics["sources"].items()]
        mark = metrics["sources"][domain][domain] if domain != "other" else min(losses)
        values = {"goal": mark, "before": metrics["built"][domain]}
        values["after"] = metrics["trained"][domain]
        for kind, value in values.items():
            place = left + (right - left) * (value - low) / (high - low)
            assert row[kind] == pytest.approx(place, abs=1), (domain, kind)


@pytest.mark.parametrize("stage", ["built", "trained"])
def test_shares_of_experts_are_those_that_were_measured(
    stage: str, run: RunFolder, show: Open
) -> None:
    routing = run.read_json(run.metrics)["routing"][stage]["share"]
    page = show("report")
    for domain, layers in routing.items():
        caption = f"{domain}( .out of domain.)?[0-9]"
        rows = table_of(page, caption, ["built", "trained"].index(stage))
        for layer, shares in enumerate(layers):
            assert rows[1 + layer] == [str(layer), *(f"{100 * share:.1f}" for share in shares)]


def test_the_training_curve_is_the_one_that_was_measured(run: RunFolder, show: Open) -> None:
    """As its table has it, which everybody can open who cannot see a chart."""
    page = show("report")
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    curve = run.read_json(run.metrics)["training"]["curve"]
    losses = [f"{point['loss']:.3f}" for point in curve]
    rows = table_of(page, "Training loss against tokens")
    assert [row[1] for row in rows[1:]] == losses


def test_what_the_fit_found_is_what_it_noted(run: RunFolder, show: Open) -> None:
    metrics = run.read_json(run.metrics)
    head, *rows = table_of(show("report"), "Validation text: loss by source")
    shown = {row[0].removesuffix(" (written)"): row[1:4] for row in rows}
    for name, losses in metrics["fit"]["loss_by_source"].items():
        assert shown[name] == [f"{losses[source]:.3f}" for source in head[1:4]]


def test_seconds_and_memory_are_those_that_were_taken(run: RunFolder, show: Open) -> None:
    import humanize

    timing = run.read_json(run.metrics)["timing"]
    rows = {row[0]: row[1:] for row in table_of(show("report"), "Measured stage by stage")}
    for stage, name in (("Build", "build"), ("Train", "train"), ("Evaluate", "evaluate")):
        assert humanize.naturalsize(timing[f"{name}_peak_rss_bytes"]) in rows[stage]
    assert f"{timing['build_seconds']:.1f} seconds" in " ".join(rows["Build"])


def test_the_plan_page_has_the_numbers_of_the_plan(run: RunFolder, show: Open) -> None:
    import humanize

    page = show("plan")
    plan = run.read_json(run.plan)
    costs = {row[0]: row[1] for row in table_of(page, "Estimates")}
    assert costs["Disk, for good"] == humanize.naturalsize(plan["disk_bytes"])
    assert f"{plan['total_parameters']:,}" in page.locator("#parameters").inner_text()
    parts = {row[0]: row[1:3] for row in table_of(page, "Where they are")}
    number, share = parts["Routers"]
    routers = sum(
        math.prod(shape) for name, shape in plan["tensors"].items() if name.endswith(".gate.weight")
    )
    assert number == f"{routers:,}" and share.endswith("%")


def test_the_comparison_has_the_means_of_its_runs(show: Open) -> None:
    rows = {row[0]: " ".join(row[1:]) for row in table_of(show("comparison"), "Held-out loss")}
    for stage, where in itertools.product(("built", "trained"), ("in_domain", "out_of_domain")):
        for method in ("ours", "paper", "btx"):
            of_seeds = [
                entry[f"mean_{where}"]
                for entry in sample_entries()
                if (entry["method"], entry["stage"]) == (method, stage)
            ]
            assert f"{sum(of_seeds) / len(of_seeds):.3f}" in rows[method]


def test_likeness_and_alignment_are_those_that_were_measured(run: RunFolder, show: Open) -> None:
    metrics = run.read_json(run.metrics)
    page = show("report")
    rows = table_of(page, "CKA of trained")
    layers = metrics["cka"]["trained"]["layers"]
    for one in range(3):
        means = [sum(layer[one][other] for layer in layers) / len(layers) for other in range(3)]
        assert rows[1 + one] == ["abc"[one], *(f"{mean:.3f}" for mean in means)]
    rows = table_of(page, "Residual stream")
    found = metrics["alignment"]["residual"]
    for layer in range(2):
        ends = [found[name][end][layer] for name in "bc" for end in ("before", "after")]
        assert rows[2 + layer] == [str(layer), *(f"{value:z.3f}" for value in ends)]


def coloured(page: Any) -> list[tuple[int, str]]:
    """(expert's colour, strength) of every token."""
    found = page.eval_on_selector_all(
        ".token", "all => all.map((one) => [one.className, one.style.getPropertyValue('--by')])"
    )
    return [(int(name.split()[1].removeprefix("e")), by) for name, by in found]


def chosen(run: RunFolder, stage: str, row: int) -> list[tuple[int, str]]:
    """The same of samples.json. `row`: 0 is the mean, then the layers."""
    content = json.loads(run.samples.read_text())
    found = []
    for samples in content["domains"].values():
        for sample in samples:
            of = sample["choices"][stage]
            experts = [of["mean_experts"], *of["experts"]][row]
            probabilities = [of["mean_probabilities"], *of["probabilities"]][row]
            found += [
                (expert, f"{round(100 * p)}%")
                for expert, p in zip(experts, probabilities, strict=True)
            ]
    return found


def test_tokens_have_the_colour_of_the_chosen_layer_and_model(run: RunFolder, show: Open) -> None:
    page = show("report")
    assert coloured(page) == chosen(run, "trained", 0)
    page.locator("select[name=layer]").select_option(label="1")
    assert coloured(page) == chosen(run, "trained", 2)
    page.locator("select[name=stage]").select_option("built")
    assert coloured(page) == chosen(run, "built", 2)
    page.locator("select[name=layer]").select_option(label="mean over layers")
    assert coloured(page) == chosen(run, "built", 0)
    assert chosen(run, "built", 0) != chosen(run, "built", 2)


def test_a_token_that_is_tapped_tells_its_choices_in_all_layers(run: RunFolder, show: Open) -> None:
    page = show("report", 390)
    token = page.locator(".token").nth(3)
    token.click()
    told = page.locator("output").inner_text()
    name = "abc"[chosen(run, "trained", 1)[3][0]]
    by = chosen(run, "trained", 1)[3][1].removesuffix("%")
    assert f"layer 0: {name} {by} %" in told and "layer 1: " in told


def test_without_a_script_the_mean_is_shown_and_nothing_can_be_chosen(
    run: RunFolder, show: Open
) -> None:
    page = show("report", java_script_enabled=False)
    assert not page.locator(".samples form").is_visible()
    titles = page.locator(".token").first.get_attribute("title")
    expert, by = chosen(run, "trained", 0)[0]
    assert titles == f"{'abc'[expert]} {by.removesuffix('%')} %, mean over layers"
