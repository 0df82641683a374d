"""Several methods in one table: who may stand there, and what it says."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from conftest import make_recipe
from symphony_moe import comparison, pipeline
from symphony_moe.cli import main
from symphony_moe.errors import RecipeError, RunFolderError
from symphony_moe.machine import versions
from symphony_moe.recipe.load import load_recipe
from symphony_moe.recipe.presets import PRESETS
from symphony_moe.recipe.variants import load_variants
from symphony_moe.reporting.comparison_table import (
    comparison_as_text,
    entries_of,
    limits_of,
    mark_reached,
    refuse_different,
    tokens_to_reach,
)
from symphony_moe.runs.comparison_folder import CompareFolder
from symphony_moe.runs.folder import RunFolder
from symphony_moe.runs.metrics import Metrics

VARIANTS = {"btx+teachers": {"method": "btx", "train": {"teacher": "sources"}}}


@pytest.fixture
def recipe(recipes: Callable[[str], Path]) -> Path:
    """The pico sources' recipe with a variant."""
    path = recipes("llama").with_name("compare.yaml")
    content = json.loads(recipes("llama").read_text())
    path.write_text(json.dumps(content | {"compare": {"variants": VARIANTS}}))
    return path


# Pure functions


def metrics(**changes: Any) -> Metrics:
    """A finished run's, as `pipeline` writes them."""
    return Metrics.model_validate(content() | changes)


def content() -> dict[str, Any]:
    return {
        "sources": {"a": {"a": 1.0, "b": 3.0, "x": 5.0}, "b": {"a": 4.0, "b": 2.0, "x": 4.0}},
        "built": {"a": 3.0, "b": 4.0, "x": 6.0},
        "trained": {"a": 2.0, "b": 3.0, "x": 5.0},
        "held_out": {"text": "h"},
        "training": {
            "text": "t",
            "tokens": 1000,
            "steps": 10,
            "seconds": 5.0,
            "held_out": [{"tokens": 500, "losses": {"a": 2.5, "b": 3.5, "x": 5.5}}],
        },
        "timing": {
            "calibration_tokens": 200,
            "build_seconds": 3.0,
            "build_peak_rss_bytes": 7,
            "train_peak_rss_bytes": 8,
        },
    }


def test_two_rows_a_run() -> None:
    built, trained = entries_of({("btx", 4): metrics()}, ["a", "b"])
    assert built == {
        "method": "btx",
        "seed": 4,
        "stage": "built",
        "tokens": 200,
        "losses": {"a": 3.0, "b": 4.0, "x": 6.0},
        "mean_in_domain": 3.5,
        "mean_out_of_domain": 6.0,
        "seconds": 3.0,
        "peak_rss_bytes": 7,
    }
    assert (trained["tokens"], trained["seconds"], trained["peak_rss_bytes"]) == (1200, 8.0, 8)
    assert (trained["mean_in_domain"], trained["mean_out_of_domain"]) == (2.5, 5.0)
    point = {"tokens": 700, "mean_in_domain": 3.0, "mean_out_of_domain": 5.5}
    assert trained["curve"] == [point]


def test_a_run_that_is_not_finished_is_named() -> None:
    with pytest.raises(RunFolderError, match=r"btx \(seed 4\): .* no training; .* --resume"):
        entries_of({("btx", 4): metrics(training={})}, ["a", "b"])


def test_benchmarks_stand_beside_the_losses() -> None:
    scores = {"arc": {"acc": 0.5}}
    built, trained = entries_of({("btx", 4): metrics(tasks={"trained": scores})}, ["a", "b"])
    assert trained["tasks"] == scores and "tasks" not in built


def test_a_loss_that_is_no_number_has_no_mean() -> None:
    broken = metrics(trained={"a": None, "b": 3.0, "x": 5.0})
    _, trained = entries_of({("btx", 4): broken}, ["a", "b"])
    assert trained["mean_in_domain"] is None and trained["mean_out_of_domain"] == 5.0


def test_the_specialists_are_each_on_its_own() -> None:
    assert limits_of({("btx", 4): metrics()}, ["a", "b"]) == {
        "in domain": 1.5,
        "out of domain": 4.0,
    }
    sources: dict[str, dict[str, float | None]] = content()["sources"]
    sources["a"]["x"] = None
    best = sources["b"]["x"]
    assert limits_of({("btx", 4): metrics(sources=sources)}, ["a", "b"])["out of domain"] == best
    sources["b"] = dict.fromkeys(sources["b"], None)
    assert limits_of({("btx", 4): metrics(sources=sources)}, ["a", "b"]) == {
        "in domain": None,
        "out of domain": None,
    }


def test_the_specialists_read_missing_tokens_as_the_reference_does(recipe: Path) -> None:
    """Other rows are other losses, and no mean is taken of both."""
    asked = {"skip": 1.0, "regression": 2.0}
    recipes = {
        (name, 4): load_recipe(recipe, [f"backbone.missing_tokens={name}"]) for name in asked
    }
    runs = {
        (name, 4): metrics(sources={"a": {"a": loss}, "b": {"b": loss}})
        for name, loss in asked.items()
    }
    for name, loss in asked.items():
        found = comparison.read_as(name, runs, recipes)
        assert limits_of(found, ["a", "b"])["in domain"] == loss


@pytest.mark.parametrize(
    ("points", "goal", "tokens"),
    [
        ([(100, 5.0), (200, 4.0), (300, 3.0)], 4.5, 150),
        ([(100, 5.0), (200, 4.0), (300, 3.0)], 3.0, 300),
        ([(100, 5.0), (200, 4.0), (300, 3.0)], 6.0, 100),
        ([(100, 5.0), (200, 4.0), (300, 3.0)], 2.9, None),
        ([(100, 5.0), (200, None), (300, 3.0)], 4.0, 200),
        ([(100, 5.0), (200, 6.0), (300, 4.0), (400, 3.0)], 4.5, 275),
        ([], 1.0, None),
    ],
)
def test_the_way_to_a_loss(
    points: list[tuple[int, float | None]], goal: float, tokens: int | None
) -> None:
    assert tokens_to_reach(points, goal) == tokens


def test_every_method_is_measured_by_the_reference_of_its_seed() -> None:
    runs = {
        ("symphony", 1): metrics(trained={"a": 2.0, "b": 3.0, "x": 5.0}),
        ("symphony", 2): metrics(trained={"a": 2.5, "b": 3.5, "x": 5.0}),
        ("btx", 1): metrics(trained={"a": 1.0, "b": 2.0, "x": 5.0}),
        ("btx", 2): metrics(trained={"a": 1.0, "b": 2.0, "x": 5.0}),
    }
    entries = entries_of(runs, ["a", "b"])
    mark_reached(entries, "symphony")
    reached = {(e["method"], e["seed"]): e["reaches"] for e in entries if "reaches" in e}
    assert reached["symphony", 1] == {"tokens": None, "share": None}
    # From 3.0 at 700 tokens to 1.5 at 1200: 2.5 after a third of the way, 3.0 at once.
    assert reached["btx", 1] == {"tokens": 867, "share": round(867 / 1200, 4)}
    assert reached["btx", 2] == {"tokens": 700, "share": round(700 / 1200, 4)}
    text = comparison_as_text(entries, limits_of(runs, ["a", "b"]))
    assert "2.750 (2.500 to 3.000)" in text and "65 %" in text


def test_the_way_to_a_loss_that_nobody_measured_is_not_invented() -> None:
    """Between the built and the trained model a straight line would say much too many tokens."""
    unmeasured = content()["training"] | {"held_out": []}
    runs = {
        ("symphony", 1): metrics(trained={"a": 2.5, "b": 3.5, "x": 5.0}),
        ("btx", 1): metrics(training=unmeasured),
        ("bam", 1): metrics(built={"a": 2.0, "b": 3.0, "x": 5.0}, training=unmeasured),
    }
    entries = entries_of(runs, ["a", "b"])
    mark_reached(entries, "symphony")
    reached = {e["method"]: e["reaches"]["tokens"] for e in entries if "reaches" in e}
    assert reached == {"symphony": None, "btx": None, "bam": 200}  # as it was built


def test_the_way_to_a_loss_is_that_of_the_models_as_they_were_trained() -> None:
    """`train.temperature_scaling` changes the trained model only, not those on the way to it."""

    def scaled(end: float | None, final: float) -> Metrics:
        points = [(500, 3.0)] + ([] if end is None else [(1000, end)])
        training = content()["training"] | {
            "temperature_scaling": {"temperature": 1.2},
            "held_out": [{"tokens": t, "losses": {"a": x, "b": x, "x": 5.0}} for t, x in points],
        }
        return metrics(training=training, trained={"a": final, "b": final, "x": 4.0})

    def reached(reference: Metrics) -> int | None:
        entries = entries_of({("symphony", 1): reference, ("btx", 1): scaled(2.0, 2.3)}, ["a", "b"])
        mark_reached(entries, "symphony")
        assert [entry.get("temperature") for entry in entries] == [None, 1.2, None, 1.2]
        tokens: int | None = entries[3]["reaches"]["tokens"]
        return tokens

    # 2.5 is half way from 3.0 at 700 tokens to 2.0 at 1200.
    assert reached(scaled(2.5, 2.9)) == 950
    assert reached(scaled(None, 2.9)) is None


def test_the_way_to_a_loss_is_that_of_the_weights_that_were_kept() -> None:
    """With `train.keep_best` and temperature scaling: the loss at the chosen step, not the last's;
    unknown where nothing was measured there."""

    def reached(chosen_step: int) -> int | None:
        old = content()["training"]
        steps = old["steps"]
        losses = [(old["tokens"] // 2, 2.5), (old["tokens"], 4.0)]
        training = old | {
            "temperature_scaling": {"temperature": 1.2},
            "held_out": [{"tokens": t, "losses": {"a": x, "b": x}} for t, x in losses],
            "validation": {"tokens": 1, "planned_steps": steps, "chosen_step": chosen_step},
        }
        runs = {
            ("symphony", 1): metrics(training=training, trained={"a": 2.4, "b": 2.4}),
            ("btx", 1): metrics(trained={"a": 2.0, "b": 2.0}),
        }
        entries = entries_of(runs, ["a", "b"])
        mark_reached(entries, "symphony")
        assert entries[1]["kept_tokens"] == 200 + old["tokens"] // steps * chosen_step
        tokens: int | None = entries[3]["reaches"]["tokens"]
        return tokens

    half = content()["training"]["steps"] // 2
    assert reached(half) is not None
    assert reached(half + 1) is None


def manifest(**sources: str) -> dict[str, Any]:
    return {"sources": {"a": {"model.safetensors": "1"}} | sources}


@pytest.mark.parametrize(
    ("what", "second"),
    [
        ("training text, or its order", {"training": content()["training"] | {"text": "u"}}),
        ("number of trained tokens", {"training": content()["training"] | {"tokens": 999}}),
        ("number of steps", {"training": content()["training"] | {"steps": 11}}),
        ("held-out text", {"held_out": {"text": "other"}}),
        ("held-out text", {"held_out": None}),
    ],
)
def test_runs_that_differ_cannot_stand_side_by_side(what: str, second: dict[str, Any]) -> None:
    runs = {("symphony", 1): metrics(), ("btx", 1): metrics(**second)}
    manifests = dict.fromkeys(runs, manifest())
    with pytest.raises(RunFolderError, match=rf"symphony \(seed 1\) and btx .*differ in: {what}"):
        refuse_different(runs, manifests)


def test_a_training_that_stopped_early_stands_beside_one_that_did_not() -> None:
    """The budget is compared, not what was used of it."""
    whole = content()["training"]
    found = {"tokens": 9, "planned_steps": whole["steps"], "chosen_step": 0}
    short = {"steps": whole["steps"] // 2, "tokens": whole["tokens"] // 2, "validation": found}
    runs = {("symphony", 1): metrics(), ("btx", 1): metrics(training=whole | short)}
    refuse_different(runs, dict.fromkeys(runs, manifest()))


def test_other_sources_cannot_stand_side_by_side() -> None:
    runs = {("symphony", 1): metrics(), ("symphony", 2): metrics()}
    manifests = {("symphony", 1): manifest(), ("symphony", 2): manifest(b="2")}
    with pytest.raises(RunFolderError, match="differ in: sources"):
        refuse_different(runs, manifests)


def test_seeds_may_differ_in_their_training_text() -> None:
    runs = {
        ("symphony", 1): metrics(),
        ("symphony", 2): metrics(training=content()["training"] | {"text": "u"}),
    }
    refuse_different(runs, dict.fromkeys(runs, manifest()))
    # As one seed's, the same two may not.
    of_one_seed = {("symphony", 1): runs["symphony", 1], ("btx", 1): runs["symphony", 2]}
    with pytest.raises(RunFolderError, match="differ in: training text"):
        refuse_different(of_one_seed, dict.fromkeys(of_one_seed, manifest()))


# Recipes


def test_a_variant_is_the_recipe_with_other_settings(recipe: Path) -> None:
    own, found = load_variants(recipe, [], ["symphony", "btx+teachers"], [3, 4])
    assert list(found) == ["symphony", "btx+teachers"]
    assert list(found["symphony"]) == [3, 4]
    one = found["btx+teachers"][4]
    assert (one.method, one.train.teacher, one.seed, one.calibration.seed) == (
        "btx",
        "sources",
        4,
        4,
    )
    # What the variant does not name is the recipe's, also in a section that it names.
    assert one.train.tokens == own.train.tokens == 2048
    assert one.calibration.tokens == own.calibration.tokens
    # One held-out text for all.
    assert one.evaluation.seed == own.seed
    # The presets, where nothing else is said.
    assert list(load_variants(recipe)[1]) == list(PRESETS)


def test_what_is_compared_is_no_part_of_a_build(recipe: Path) -> None:
    assert "compare" not in load_recipe(recipe).to_yaml()


@pytest.mark.parametrize(
    ("methods", "overrides", "message"),
    [
        (["symphonie"], [], "'symphonie' is no method.*did you mean symphony"),
        (["qqq"], [], "'qqq' is no method.*there is: symphony"),
        (None, ["compare.variants.x/y.method=btx", "compare.methods=[x/y]"], "x/y"),
        (
            None,
            ["compare.variants.v.align.neuron=1", "compare.methods=[v]"],
            r"v: unknown setting align\.neuron; did you mean align\.neurons",
        ),
        (None, ["compare.variants.v.method=nothing", "compare.methods=[v]"], "v: method"),
        (["btx"], ["compare.reference=symphony"], "'symphony' is not compared"),
        (None, ["compare.seeds=[]"], "compare.seeds"),
        (None, ["compare.methods=[]"], "compare.methods"),
        (None, ["compare.seed=[1]"], "did you mean compare.seeds"),
    ],
)
def test_mistakes_are_named(
    methods: list[str] | None, overrides: list[str], message: str, recipe: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_variants(recipe, overrides, methods)


def test_a_runs_own_recipe_can_be_compared(recipes: Callable[[str], Path], tmp_path: Path) -> None:
    """It spells out what its preset says; the other methods have their own."""
    path = recipes("llama")
    plain = load_variants(path)[1]
    resolved = tmp_path / "recipe.yaml"
    resolved.write_text(load_recipe(path).to_yaml())
    assert load_variants(resolved)[1] == plain
    assert {method for method in plain} == set(PRESETS)


def test_methods_that_are_one_are_refused(recipe: Path) -> None:
    """Where a recipe's own settings leave nothing of the presets."""
    overrides = [
        f"{section}.{key}={value}"
        for section, preset in PRESETS["btx"].items()
        for key, value in preset.items()
    ]
    with pytest.raises(RecipeError, match="symphony and btx are the same in everything"):
        load_variants(recipe, overrides, ["symphony", "btx"])
    twice = ["compare.variants={v: {method: btx}}"]
    with pytest.raises(RecipeError, match="btx and v are the same in everything"):
        load_variants(recipe, twice, ["btx", "v"])


# The whole way


def run_compare(recipe: Path, out: Path, *arguments: str) -> int:
    return main(["compare", str(recipe), "--out", str(out), *arguments])


def test_a_comparison(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped after the first run, it goes on with the second; then the table stands, and what is
    finished is not run again."""
    out = tmp_path / "out"
    methods = ["--methods", "btx,btx+teachers", "--set", "train.evaluations=2"]
    started: list[list[str]] = []
    real = subprocess.run

    def counted(command: list[str], **rest: Any) -> Any:
        started.append(command)
        if len(started) == 2:
            return subprocess.CompletedProcess(command, -9)
        return real(command, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", counted)
        assert run_compare(recipe, out, *methods) == 2
        message = capsys.readouterr().err
        assert "btx+teachers-seed114514: was killed (signal 9; out of memory?)" in message
        assert "--resume" in message and "Traceback" not in message
        assert not (out / "comparison.json").exists()
        assert run_compare(recipe, out, *methods) == 2
        assert "--resume keeps what is finished" in capsys.readouterr().err
        assert run_compare(recipe, out, *methods, "--resume") == 0
        assert len(started) == 3 and "btx+teachers" in started[2][4]
        log = (out / "btx+teachers-seed114514" / "run.log").read_text()
        assert "the sources are evaluated in" in log and "evaluated source" not in log
        assert run_compare(recipe, out, *methods, "--resume") == 0
        assert len(started) == 3
    printed = capsys.readouterr().out
    entries = json.loads((out / "comparison.json").read_text())
    assert [(e["method"], e["stage"]) for e in entries] == [
        ("btx", "built"),
        ("btx", "trained"),
        ("btx+teachers", "built"),
        ("btx+teachers", "trained"),
    ]
    plain, taught = entries[1], entries[3]
    assert plain["losses"] != taught["losses"] and entries[0]["losses"] == entries[2]["losses"]
    assert len(plain["curve"]) == 1 and set(plain["losses"]) == {"a", "b", "c", "other"}
    assert plain["tokens"] == 1792 and plain["calibration_tokens"] == 0
    assert f"{plain['mean_in_domain']:.3f}" in printed and "specialists" in printed
    for entry in entries:
        run = json.loads((out / f"{entry['method']}-seed114514" / "metrics.json").read_text())
        assert run[entry["stage"]] == entry["losses"]
        assert set(run["sources"]) == set(run["cka"]["sources"]["experts"]) == {"a", "b", "c"}
    # They differ in training only: the second is the first's checkpoint, and a whole run all the
    # same.
    first, second = (RunFolder(out / f"{name}-seed114514") for name in ("btx", "btx+teachers"))
    assert "INFO built" not in (second.root / "run.log").read_text()
    hashes = [run.read_json(run.manifest)["tensors"] for run in (first, second)]
    assert hashes[0]["checkpoint"] == hashes[1]["checkpoint"]
    assert hashes[0]["trained"] != hashes[1]["trained"]
    assert pipeline.verify(second)  # raises where anything is not as it should be
    names = [{path.name for path in run.root.iterdir()} for run in (first, second)]
    assert names[0] == names[1]
    # Another recipe's runs are not taken over.
    assert run_compare(recipe, out, *methods, "--resume", "--set", "train.tokens=1024") == 2
    assert "was begun by another recipe (train.tokens 1024 (there " in capsys.readouterr().err
    assert (out / "comparison.html").is_file()
    # Nor is what somebody has trained again with settings of his own.
    training = first.read_json(first.metrics)["training"]
    for name, value, code in (("teacher_loading", "in-turn", 0), ("learning_rate", 0.5, 2)):
        settings = training["settings"] | {name: value}
        first.update_json(first.metrics, {"training": training | {"settings": settings}})
        assert run_compare(recipe, out, *methods, "--resume") == code
    assert "was trained with learning_rate = 0.5, not 0.001" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "adopted"),
    [
        ([], True),
        (["train.scope=router", "train.tokens=99"], True),
        (["calibration.seed=7"], False),
        (["evaluation.holdout=0.3"], False),
        (["anchor=b"], False),
    ],
)
def test_a_build_is_taken_over_where_it_would_be_the_same(
    changes: list[str],
    adopted: bool,
    recipes: Callable[[str], Path],
    built: Callable[[str], RunFolder],
    tmp_path: Path,
) -> None:
    folder = CompareFolder(tmp_path)
    first = folder.run("first", 1)
    shutil.copytree(built("llama").root, first.root)
    manifest = first.read_json(first.manifest)
    of_training = {
        "files": manifest["files"] | {"trained/model.safetensors": "x"},
        "tensors": manifest["tensors"] | {"trained": {"x": "y"}},
    }
    first.update_json(first.manifest, of_training)
    first.update_json(first.metrics, {"trained": {}, "training": {}, "tasks": {}})
    recipe = load_recipe(recipes("llama"), changes)
    comparison._adopt_build(folder, [("first", 1)], ("second", 1), recipe)
    run = folder.run("second", 1)
    assert run.root.exists() == adopted
    if adopted:
        assert run.read_json(run.manifest) == manifest
        assert set(run.read_json(run.metrics)) == {"alignment", "timing"}
        kept = run.read_recipe()
        assert kept.train == recipe.train and kept.sources["a"].sha256 is not None
        assert pipeline.verify(run)


def test_no_build_of_other_software_is_taken_over(
    recipes: Callable[[str], Path], built: Callable[[str], RunFolder], tmp_path: Path
) -> None:
    folder = CompareFolder(tmp_path)
    first = folder.run("first", 1)
    shutil.copytree(built("llama").root, first.root)
    other = versions() | {"torch": "1.0"}
    recipe = load_recipe(recipes("llama"))
    # Nor one that has been begun by it.
    for made_by in ({"versions": other}, {"versions": versions(), "begun_with": other}):
        first.update_json(first.manifest, made_by)
        comparison._adopt_build(folder, [("first", 1)], ("second", 1), recipe)
        assert not folder.run("second", 1).root.exists()


def test_a_kill_while_a_build_is_taken_over(
    recipes: Callable[[str], Path],
    built: Callable[[str], RunFolder],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It leaves a build that was cut short, which the run begins anew."""
    folder = CompareFolder(tmp_path)
    shutil.copytree(built("llama").root, folder.run("first", 1).root)
    recipe = load_recipe(recipes("llama"))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("symphony_moe.runs.folder.publish", killed)
        with pytest.raises(KeyboardInterrupt):
            comparison._adopt_build(folder, [("first", 1)], ("second", 1), recipe)
    run = folder.run("second", 1)
    assert run.recipe.is_file() and not run.checkpoint.exists()
    pipeline.build(recipe, run.root, resume=True)
    of = [folder.run(name, 1) for name in ("first", "second")]
    first, second = (one.read_json(one.manifest)["tensors"]["checkpoint"] for one in of)
    assert first == second and not run.work.exists()


def test_begun_again_and_cut_short_no_old_run_is_left(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`--overwrite` takes all old runs and the old table away first."""
    out = tmp_path / "out"
    methods = ["--methods", "btx,btx+teachers"]
    for name in ("btx", "btx+teachers"):
        run = RunFolder(out / f"{name}-seed114514")
        run.work.mkdir(parents=True)
        run.recipe.write_text("old")
        run.report.write_text("old")
    (out / "comparison.json").write_text("old")
    (out / "mine.txt").write_text("mine")
    assert run_compare(recipe, out, *methods, "--overwrite") == 2
    assert "holds mine.txt, which no comparison has made" in capsys.readouterr().err
    assert (out / "comparison.json").exists()
    (out / "mine.txt").unlink()

    def killed(command: list[str], **_: Any) -> Any:
        return subprocess.CompletedProcess(command, -15)

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", killed)
        assert run_compare(recipe, out, *methods, "--overwrite") == 2
    assert sorted(path.name for path in out.iterdir()) == ["recipes"]


# The interrupted `subprocess.run` has killed it, and may not have waited for it.
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_a_comparison_that_is_terminated_takes_its_run_with_it(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The signal comes from the run that is waited for."""
    path = tmp_path / "number"
    code = "import os, signal, sys, time; from pathlib import Path; "
    code += "Path(sys.argv[1]).write_text(str(os.getpid())); "
    code += "os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    wait = subprocess.run

    def run(command: list[str], **settings: Any) -> Any:
        return wait([sys.executable, "-c", code, str(path)], **settings)

    monkeypatch.setattr(subprocess, "run", run)
    before, started = signal.getsignal(signal.SIGTERM), time.monotonic()
    assert run_compare(recipe, tmp_path / "out", "--methods", "btx") == 130
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    with suppress(ChildProcessError):  # it may have been waited for already
        os.waitpid(int(path.read_text()), 0)
    assert time.monotonic() - started < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int(path.read_text()), 0)


def test_a_comparison_is_a_folder(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    for more in ([], ["--resume"], ["--overwrite"]):
        assert run_compare(recipe, path, "--methods", "btx", *more) == 2
        assert f"{path}: exists and is not a folder" in capsys.readouterr().err
    assert path.read_text() == "mine"


@pytest.mark.slow
def test_runs_made_elsewhere_are_tabulated(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`--prepare` writes the recipes and says the commands; what they have made is taken over."""
    out = tmp_path / "out"
    methods = ["--methods", "btx,sparse-upcycling"]
    assert run_compare(recipe, out, *methods, "--prepare") == 0
    commands = capsys.readouterr().out.splitlines()
    assert len(commands) == 2 and not list(out.glob("*-seed*"))
    for command in commands:
        assert command.startswith(f"symphony run {out}/recipes/")
        assert main(command.split()[1:]) == 0

    def none(*_: Any, **__: Any) -> Any:
        raise AssertionError("everything is there")

    monkeypatch.setattr(subprocess, "run", none)
    assert run_compare(recipe, out, *methods, "--resume") == 0
    assert len(json.loads((out / "comparison.json").read_text())) == 4


@pytest.mark.parametrize(
    ("variant", "what"),
    [
        ({"seed": 9}, "seed"),
        ({"calibration": {"seed": 9}}, "calibration.seed"),
        ({"train": {"tokens": 512}}, "train.tokens"),
        ({"train": {"gradient_accumulation": 2}}, "train.gradient_accumulation"),
        ({"evaluation": {"tokens": 64}}, "evaluation"),
    ],
)
def test_a_variant_with_another_budget_is_refused_at_once(
    variant: dict[str, Any], what: str, recipe: Path
) -> None:
    content = json.loads(recipe.read_text())
    content["compare"] = {"variants": {"v": {"method": "btx"} | variant}}
    recipe.write_text(json.dumps(content))
    with pytest.raises(RecipeError, match=rf"compare.variants.v changes {what}: runs that differ"):
        load_variants(recipe, [], ["btx", "v"])


def test_an_empty_section_of_a_variant_changes_nothing(recipe: Path) -> None:
    content = json.loads(recipe.read_text())
    content["compare"] = {"variants": {"v": {"method": "btx", "train": None, "anchor": "b"}}}
    recipe.write_text(json.dumps(content))
    found = load_variants(recipe, [], ["btx", "v"])[1]
    assert found["v"][114514].train == found["btx"][114514].train


def test_a_method_that_its_sources_forbid_is_named(
    recipes: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_compare(recipes("qwen2"), tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "error: bam: " in error and "--methods chooses" in error


def test_a_method_that_cannot_be_built_is_refused_before_any_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_recipe(
        tmp_path,
        compare={"variants": {"wrong": {"method": "btx", "output": {"architecture": "bert"}}}},
    )
    assert run_compare(path, tmp_path / "out", "--methods", "btx,wrong") == 2
    assert "output.architecture" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    settings = ["--methods", "btx", "--set", "train.report_to=fooboard"]
    assert run_compare(path, tmp_path / "out", *settings) == 2
    assert "'fooboard' is none of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "1,x"], "expected numbers such as 1,2,3"),
        (["--methods", ","], "expected names"),
    ],
)
def test_words_that_are_no_list(
    words: list[str],
    message: str,
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_compare(recipe, tmp_path / "out", *words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
