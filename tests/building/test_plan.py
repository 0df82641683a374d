"""What a plan says a build will take, against what it takes."""

import copy
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from checks import mostly_slow
from symphony_moe import pipeline
from symphony_moe.building import estimate
from symphony_moe.building.estimate import streams_bytes
from symphony_moe.building.plan import Plan
from symphony_moe.cli import main
from symphony_moe.model.checkpoint import CheckpointWriter
from symphony_moe.model.streams import Streams
from symphony_moe.recipe.load import load_recipe
from symphony_moe.runs.folder import RunFolder
from symphony_moe.sources.opening import open_sources

Recipes = Callable[[str], Path]

SETTINGS = {
    "nothing": ["method=symphony", "backbone.attention=linear", "align.neurons=none"],
    "a router": ["method=symphony", "align.neurons=none", "router.init=regression"],
    "the paper's": ["method=symphony"],
    "the paper's and a router": ["method=symphony", "router.init=hidden"],
    "alignment": ["method=harmonized", "fit.method=none", "router.init=random"],
    "a fit": ["method=harmonized", "fit.epochs=0"],
    "a fit of strangers to nothing": [
        "method=harmonized",
        "fit.epochs=0",
        "align.residual=none",
        "align.heads=none",
    ],
}


@pytest.fixture
def largest(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of all streams at once, each time that one is made."""
    sizes = [0]
    make = Streams.new

    def new(self: Streams, *arguments: Any) -> Tensor:
        stream = make(self, *arguments)
        sizes.append(sum(one.numel() * one.element_size() for one in self._streams.values()))
        return stream

    monkeypatch.setattr(Streams, "new", new)
    return sizes


@pytest.mark.parametrize(
    ("settings", "tokens"),
    mostly_slow(
        itertools.product(SETTINGS, [200, 1536, 6000]),
        ("a fit", 200),
        ("a fit", 1536),
        ("a router", 6000),
    ),
)
def test_streams_take_what_was_planned(
    settings: str, tokens: int, recipes: Recipes, tmp_path: Path, largest: list[int]
) -> None:
    """To the byte: one window a source, as many as a router reads at most, and more."""
    recipe = load_recipe(
        recipes("llama"),
        [*SETTINGS[settings], f"calibration.tokens={tokens}", "calibration.sequence_length=32"],
    )
    sources = open_sources(recipe)
    planned = streams_bytes(recipe, sources[0].config, len(sources))
    pipeline.build(recipe, tmp_path / "run")
    assert max(largest) == planned
    assert (planned == 0) is (settings == "nothing")


@pytest.mark.parametrize("settings", mostly_slow(SETTINGS, "a fit", "a router"))
def test_work_takes_what_was_planned(
    settings: str, recipes: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where streams wait in files: what was planned, and the headers of the records and the notes
    of the finished layers (a few KB a layer), which are not."""
    monkeypatch.setattr(estimate, "STREAMS_IN_MEMORY", 0)
    recipe = load_recipe(recipes("llama"), [*SETTINGS[settings], "calibration.tokens=6000"])
    planned = pipeline.plan(recipe)
    run = RunFolder(tmp_path / "run")
    sizes = [0]

    def measure() -> None:
        files = [path for path in run.work.rglob("*") if path.is_file()]
        weights = set(run.staged_checkpoint.glob("*"))
        sizes.append(sum(path.stat().st_size for path in files if path not in weights))

    release, finish = Streams.release, CheckpointWriter.finish

    def released(self: Streams) -> None:
        measure()
        release(self)

    def finished(self: CheckpointWriter) -> dict[str, str]:
        measure()
        return finish(self)

    monkeypatch.setattr(Streams, "release", released)
    monkeypatch.setattr(CheckpointWriter, "finish", finished)
    pipeline.build(recipe, run.root)
    assert planned.work_bytes <= max(sizes) <= planned.work_bytes + 20_000
    assert (planned.work_bytes == 0) is (settings == "nothing")


def test_a_disk_without_room_for_the_work_is_refused_before_anything_is_made(
    recipes: Recipes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Room for the weights alone is not enough; what an earlier build has taken counts as room."""
    monkeypatch.setattr(estimate, "STREAMS_IN_MEMORY", 0)
    settings = ["method=harmonized", "fit.epochs=0"]
    planned = pipeline.plan(load_recipe(recipes("llama"), settings))
    needed = planned.disk_bytes + planned.work_bytes
    usage = shutil.disk_usage(tmp_path)
    free = [needed - 1]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free[0]))
    out = tmp_path / "new" / "out"
    arguments = ["build", str(recipes("llama")), "--out", str(out)]
    for setting in settings:
        arguments += ["--set", setting]
    assert planned.work_bytes > 0
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "the disk has" in error and "until it ends" in error and "Traceback" not in error
    assert not out.parent.exists()

    out.mkdir(parents=True)
    (out / "work").mkdir()
    (out / "work" / "half").write_bytes(b"x")
    (out / "recipe.yaml").write_text("")
    assert main([*arguments, "--overwrite"]) == 0
    # Finished, it needs no room at all.
    free[0] = 0
    assert main([*arguments, "--resume"]) == 0


@pytest.mark.parametrize(
    ("settings", "more", "heads"),
    [
        ("alignment", [], 0),
        ("a fit", [], 3 + 3),
        ("a fit", ["fit.epochs=1", "fit.layers_with_head=0", "fit.embeddings=false"], 3 + 6),
    ],
)
def test_the_peak_counts_what_a_fit_holds(
    settings: str, more: list[str], heads: int, recipes: Recipes
) -> None:
    """Where tables are large: all sources' heads, the fused one, the solved one and a product, all
    of float32; or the one that learns, its gradient and two moments. Where experts are large: three
    matrices ffn x ffn of float64. A build that fits nothing holds neither."""
    recipe = load_recipe(recipes("llama"), [*SETTINGS[settings], *more])
    config = open_sources(recipe)[0].config

    def peak(**sizes: int) -> int:
        changed = copy.deepcopy(config)
        for name, size in sizes.items():
            setattr(changed, name, size)
        return estimate.peak_memory(recipe, changed, len(recipe.sources))

    tables = peak(vocab_size=2 * 10**7) - peak(vocab_size=10**7)
    experts = peak(intermediate_size=2 * 10**5) - peak(intermediate_size=10**5)
    wanted = 3 * (2 * 10**5) ** 2 * 8 - 3 * (10**5) ** 2 * 8
    if heads:
        assert tables == heads * 10**7 * config.hidden_size * 4
        assert wanted < experts < 1.1 * wanted
    else:
        assert tables == 0
        assert experts < 0.02 * wanted


def test_the_peak_counts_what_learns_with_the_head_and_with_the_first_layer(
    recipes: Recipes,
) -> None:
    """Where the head is the largest moment, five copies of each last layer. Where the first layer
    is, five of each row of embeddings that the text has."""
    config = open_sources(load_recipe(recipes("llama")))[0].config
    config.num_hidden_layers = 4
    little = ["fit.epochs=1", "calibration.tokens=96", "calibration.sequence_length=32"]

    def peak(ffn: int, vocabulary: int, *settings: str) -> int:
        recipe = load_recipe(recipes("llama"), [*SETTINGS["a fit"], *little, *settings])
        config.intermediate_size, config.vocab_size = ffn, vocabulary
        return estimate.peak_memory(recipe, config, len(recipe.sources))

    heads = [
        peak(10_000, 10**7, "fit.embeddings=false", f"fit.layers_with_head={count}")
        for count in (1, 2, 4, 9)
    ]
    weights = 3 * 3 * 10_000 * config.hidden_size * 4  # of three experts
    first, second = heads[1] - heads[0], heads[2] - heads[1]
    assert 5 * weights < first < 10 * weights and second == 2 * first and heads[3] == heads[2]
    for vocabulary in (20, 10**7):
        config.vocab_size = vocabulary
        without, with_them = (
            estimate._Moments(load_recipe(recipes("llama"), [*fit, *little]), config, 3).refined()
            for fit in ([*SETTINGS["a fit"], "fit.embeddings=false"], SETTINGS["a fit"])
        )
        recipe = load_recipe(recipes("llama"), little)
        tokens = recipe.windows_each * 3 * recipe.calibration.sequence_length
        assert with_them - without == 5 * min(vocabulary, tokens) * config.hidden_size * 4


def test_plans_are_printed_and_written(
    recipes: Recipes, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", str(recipes("llama")), "--set", "method=harmonized"]
    assert main([*arguments, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert f"{planned['work_bytes'] / 1e9:.3f} GB more until stage 1 ends" in shown
    assert f"about {planned['peak_memory_bytes'] / 1e9:.1f} GB at the peak" in shown


def test_the_peak_counts_the_statistics_of_both_texts(recipes: Recipes) -> None:
    """Of two sources beside the anchor, a matrix (heads x head_dim) squared of float64; of the text
    for validation another, where something is fitted. Three more while heads are matched."""

    def peak(*settings: str) -> int:
        recipe = load_recipe(recipes("llama"), ["method=harmonized", *settings])
        config = copy.deepcopy(open_sources(recipe)[0].config)
        config.head_dim = 20_000
        return estimate.peak_memory(recipe, config, 3)

    for router, texts in (("random", 1), ("regression", 2)):
        settings = ["fit.method=none", f"router.init={router}"]
        heads = peak(*settings) - peak(*settings, "align.heads=none")
        assert heads == pytest.approx((texts * 2 + 3) * (4 * 20_000) ** 2 * 8, rel=0.02)


@pytest.mark.parametrize("settings", ["the paper's", "a fit"])
def test_streams_wait_in_files_where_memory_is_short(
    settings: str, recipes: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As soon as the plan with them is beyond it by a byte; and the same bytes are built."""
    recipe = load_recipe(recipes("llama"), SETTINGS[settings])
    config = open_sources(recipe)[0].config
    streams = streams_bytes(recipe, config, 3)
    rich = pipeline.plan(recipe)
    memory = rich.peak_memory_bytes
    assert pipeline.plan(recipe, memory=memory) == rich and rich.streams_in_memory
    poor = pipeline.plan(recipe, memory=memory - 1)
    assert not poor.streams_in_memory
    assert poor.peak_memory_bytes == memory - streams
    assert poor.work_bytes == rich.work_bytes + streams

    folders = []
    init = Streams.__init__

    def made(self: Streams, folder: Path | None = None) -> None:
        folders.append(folder)
        init(self, folder)

    monkeypatch.setattr(Streams, "__init__", made)
    built = [
        pipeline.build(recipe, tmp_path / str(limit), memory=limit)
        for limit in (memory, memory - 1)
    ]
    assert folders and folders == [None] * (len(folders) // 2) + [built[1].work] * (
        len(folders) // 2
    )
    first, second = (run.read_json(run.manifest)["tensors"] for run in built)
    assert first == second


def test_memory_that_is_too_little_is_noted(
    recipes: Recipes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By `plan` and by `build`, which goes on: the plan is an estimate."""
    arguments = [str(recipes("llama")), "--memory", "10MB"]
    assert main(["plan", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "stage 1 takes about" in shown and "--memory allows 10 MB" in shown
    assert main(["build", *arguments, "--out", str(tmp_path / "run")]) == 0
    assert "--memory allows 10 MB" in capsys.readouterr().err
    assert main(["plan", str(recipes("llama")), "--memory", "1000GB"]) == 0
    assert "--memory allows" not in capsys.readouterr().out


def test_what_needs_less_memory_is_named(recipes: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the fit, up to the first that fits; and the peaks are those of a plan with
    them. Without --memory it is the machine's memory that counts."""
    recipe = load_recipe(recipes("llama"), ["method=harmonized", "fit.epochs=2"])
    config = open_sources(recipe)[0].config
    config.vocab_size = 200_000
    shape = (config, len(recipe.sources))
    ways: dict[str, dict[str, Any]] = {
        "fit.layers_with_head: 0": {"layers_with_head": 0},
        "fit.embeddings: false": {"embeddings": False},
        "fit.layers_with_head: 0 and fit.embeddings: false": {
            "layers_with_head": 0,
            "embeddings": False,
        },
        "fit.epochs: 0": {"epochs": 0},
    }

    def peaks(memory: int | None = None) -> dict[str, int]:
        found = {"": estimate.peak_memory(recipe, *shape, memory)}
        for name, settings in ways.items():
            fit = recipe.fit.model_copy(update=settings)
            lighter = recipe.model_copy(update={"fit": fit})
            found[name] = estimate.peak_memory(lighter, *shape, memory)
        return found

    whole, memory = peaks()[""], peaks()["fit.layers_with_head: 0"]
    assert memory < whole
    said = estimate.beyond_memory(recipe, *shape, memory)
    assert f"--memory allows {memory / 1e6:,.0f} MB" in said
    assert f"With fit.layers_with_head: 0 it takes {memory / 1e6:,.0f} MB" in said
    assert "embeddings" not in said and "epochs" not in said
    said, known = estimate.beyond_memory(recipe, *shape, 10), peaks(10)
    named = [name for name in ways if f"With {name} it takes {known[name] / 1e6:,.0f} MB" in said]
    smallest, expected = known[""], list[str]()
    for name in ways:
        if known[name] < smallest:
            smallest, expected = known[name], [*expected, name]
    assert named == expected and named and len(said) < 500

    assert not estimate.beyond_memory(recipe, *shape, whole)
    machine = SimpleNamespace(total=whole - 1)
    monkeypatch.setattr("psutil.virtual_memory", lambda: machine)
    assert "this machine has" in estimate.beyond_memory(recipe, *shape)
    machine.total += 1
    assert not estimate.beyond_memory(recipe, *shape)


@pytest.mark.parametrize("command", ["plan", "build", "run"])
@pytest.mark.parametrize("size", ["8", "GB", "0GB", "-1GB", "lots"])
def test_memory_that_is_no_size_is_refused(
    command: str, size: str, recipes: Recipes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [command, str(recipes("llama")), f"--memory={size}"]
    if command != "plan":
        arguments += ["--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "--memory" in error and "expected a size such as 8GB or 500MB" in error


def test_more_epochs_take_more_time(recipes: Recipes) -> None:
    def seconds(epochs: int) -> float:
        recipe = load_recipe(recipes("llama"), ["method=harmonized", f"fit.epochs={epochs}"])
        return pipeline.plan(recipe).seconds

    first, second, third = (seconds(epochs) for epochs in (0, 1000, 2000))
    assert second > first + 0.5 and third - second == pytest.approx(second - first)


@pytest.mark.parametrize(
    ("settings", "shares_the_sweep"), [([], False), (["align.residual=orthogonal"], True)]
)
def test_what_matching_costs_is_noted(
    settings: list[str], shares_the_sweep: bool, recipes: Recipes
) -> None:
    """By the paper's preset, with what to set to save it. Where nothing else is aligned, the
    sources need not be run at all without it."""
    more = ["calibration.tokens=100000000", *settings]

    def planned(*others: str) -> Plan:
        return pipeline.plan(load_recipe(recipes("llama"), [*more, *others]))

    with_it, without = planned(), planned("align.neurons=none")
    (note,) = (note for note in with_it.notes if "align.neurons" in note)
    seconds = with_it.seconds - without.seconds
    assert f"takes about {seconds:.0f} s of stage 1" in note and seconds > 10
    assert "align.neurons: none leaves it out" in note
    assert not any("align.neurons" in note for note in without.notes)
    tiny = planned("align.neurons=none", "calibration.tokens=1")
    assert (without.seconds > 1.1 * tiny.seconds) is shares_the_sweep


def test_windows_beyond_the_context_of_any_source_that_reads_them_are_noted(
    recipes: Recipes, tmp_path: Path
) -> None:
    """Training is of the result, which has the anchor's."""
    path = shutil.copytree(recipes("llama").parent, tmp_path / "copy") / "recipe.yaml"
    config = path.parent / "models" / "b" / "config.json"
    content = json.loads(config.read_text()) | {"max_position_embeddings": 48}
    config.write_text(json.dumps(content))

    def beyond(*settings: str) -> list[str]:
        notes = pipeline.plan(load_recipe(path, ["anchor=a", *settings])).notes
        return [note for note in notes if "sequence_length" in note]

    assert beyond() == [
        "calibration.sequence_length 64 is beyond the context of b (48)",
        "evaluation.sequence_length 64 is beyond the context of b (48)",
    ]
    assert beyond("train.sequence_length=300", "calibration.sequence_length=48") == [
        "train.sequence_length 300 is beyond the context of a (256)",
        "evaluation.sequence_length 64 is beyond the context of b (48)",
    ]
    # Teachers read the text of training too; an aligned source that is no expert only evaluates.
    taught = beyond("train.teacher=sources", "experts.sources=[a, c]")
    assert taught == [
        "train.sequence_length 64 is beyond the context of b (48)",
        "evaluation.sequence_length 64 is beyond the context of b (48)",
    ]
    assert beyond("method=btx") == [
        "evaluation.sequence_length 64 is beyond the context of b (48)",
    ]
    assert beyond("calibration.sequence_length=300")[0] == (
        "calibration.sequence_length 300 is beyond the context of a (256), b (48), c (256)"
    )


def test_commands_warn_of_windows_beyond_a_context(
    recipes: Recipes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that read them, in the plan's words; and they go on."""
    path = shutil.copytree(recipes("llama").parent, tmp_path / "copy") / "recipe.yaml"
    for name, context in (("a", 60), ("b", 48)):
        config = path.parent / "models" / name / "config.json"
        content = json.loads(config.read_text()) | {"max_position_embeddings": context}
        config.write_text(json.dumps(content))

    def warned(command: Callable[..., Any], *arguments: Any) -> list[str]:
        caplog.clear()
        command(*arguments)
        return [m for m in caplog.messages if "sequence_length" in m]

    run = RunFolder(tmp_path / "run")
    recipe = load_recipe(path, ["anchor=a"])
    assert warned(pipeline.build, recipe, run.root) == [
        "calibration.sequence_length 64 is beyond the context of a (60), b (48)"
    ]
    assert warned(pipeline.train, run) == [
        "train.sequence_length 64 is beyond the context of a (60)"
    ]
    assert warned(pipeline.evaluate, run, ["evaluation.sequence_length=50"]) == [
        "evaluation.sequence_length 50 is beyond the context of b (48)"
    ]
    assert warned(pipeline.evaluate, run, ["evaluation.sequence_length=48"]) == []


@pytest.mark.parametrize(
    ("setting", "unread", "reason", "read"),
    [
        ("fit.ridge=0.5", [], "fit.method is none", ["method=harmonized"]),
        (
            "fit.pull=1",
            ["method=harmonized", "fit.epochs=0"],
            "fit.epochs is 0",
            ["method=harmonized", "fit.epochs=1"],
        ),
        ("router.temperature=2", [], "router.init is random", ["router.init=hidden"]),
        ("align.neuron_share=0.5", ["method=btx"], "no neurons are matched", ["method=symphony"]),
        ("experts.drop_share=0.1", [], "experts.init is not drop", ["method=drop-upcycling"]),
        ("train.teacher_weight=0.1", [], "train.teacher is none", ["train.teacher=sources"]),
        ("sources.a.revision=main", [], "the model is not on the hub", []),
        ("sources.a.adapter_revision=main", [], "no adapter on the hub", []),
    ],
)
def test_settings_that_nothing_reads_are_noted(
    setting: str, unread: list[str], reason: str, read: list[str], recipes: Recipes
) -> None:
    def notes(*settings: str) -> list[str]:
        found = pipeline.plan(load_recipe(recipes("llama"), settings)).notes
        return [note for note in found if "has no effect" in note]

    assert notes(setting, *unread) == [f"{setting.split('=')[0]} has no effect: {reason}"]
    assert not notes(*unread) and not (read and notes(setting, *read))


@pytest.mark.parametrize(("method", "used"), [("symphony", 3 * 32), ("harmonized", 6 * 32)])
def test_calibration_text_that_is_too_little_is_noted(
    method: str, used: int, recipes: Recipes, tmp_path: Path
) -> None:
    settings = [f"method={method}", "calibration.tokens=10", "calibration.sequence_length=32"]
    recipe = load_recipe(recipes("llama"), settings)
    notes = [note for note in pipeline.plan(recipe).notes if "calibration.tokens 10 is" in note]
    assert len(notes) == 1 and f" {used}, " in notes[0]
    metrics = (run := pipeline.build(recipe, tmp_path / "run")).read_json(run.metrics)
    assert metrics["timing"]["calibration_tokens"] == used
    enough = load_recipe(recipes("llama"), [*settings, f"calibration.tokens={used}"])
    assert not any("calibration.tokens" in note for note in pipeline.plan(enough).notes)


def test_sources_of_one_text_are_noted_where_the_router_learns_of_it(recipes: Recipes) -> None:
    def noted(*settings: str) -> bool:
        content = json.loads(recipes("llama").read_text())["sources"]
        same = f"sources.b.data={content['a']['data']}"
        for text in (settings, (*settings, same)):
            notes = pipeline.plan(load_recipe(recipes("llama"), text)).notes
            found = any("a and b have the same data" in note for note in notes)
            assert not found or same in text
        return found

    assert noted("method=harmonized") and not noted("method=btx")


def test_what_training_would_refuse_is_noted(recipes: Recipes) -> None:
    """Not refused: a build alone does not mind, and the training may be another machine's."""
    found = pipeline.plan(load_recipe(recipes("llama"), ["train.batch_size=100000"]))
    assert "`symphony train` stops here: training text: " in found.warnings[-1]
    others = pipeline.plan(load_recipe(recipes("llama"))).warnings
    assert not any("stops here" in warning for warning in others)


def test_a_model_whose_tokens_go_through_all_experts_is_said_to_be_one(recipes: Recipes) -> None:
    def noted(top_k: int) -> list[str]:
        planned = pipeline.plan(load_recipe(recipes("llama"), [f"router.top_k={top_k}"]))
        return [note for note in planned.notes if "every token goes through all experts" in note]

    assert noted(3) and "1/3 of the experts' work" in noted(3)[0]
    assert not noted(2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], "8 times (fit.epochs), less often where that does harm. The last layer learns once"),
        (["fit.epochs=1", "fit.layers_with_head=0"], "text 1 time (fit.epochs), less often where"),
        (["fit.layers_with_head=2"], "The last 2 layers learn once more, together with the head"),
        (["fit.epochs=0"], "layers are fitted in closed form alone"),
    ],
)
def test_how_often_layers_learn_is_noted(settings: list[str], said: str, recipes: Recipes) -> None:
    planned = pipeline.plan(load_recipe(recipes("llama"), ["method=harmonized", *settings]))
    (note,) = [note for note in planned.notes if "fit." in note and "layer" in note]
    assert said in note
    assert ("once more" in note) == (settings in ([], ["fit.layers_with_head=2"]))


@pytest.mark.parametrize("setting", ["sources.b.data", "evaluation.extra.other"])
def test_text_that_cannot_be_read_is_refused(
    setting: str, recipes: Recipes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its first row is looked at, and no more of it."""
    rows = [{"body": "no text"}, {"text": "alpha"}]
    for order, code in ((rows, 2), (rows[::-1], 0)):
        (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in order))
        words = ["plan", str(recipes("llama")), "--set", f"{setting}={tmp_path / 'rows.jsonl'}"]
        assert main(words) == code
        said = capsys.readouterr().err
        assert ("rows.jsonl, line 1" in said and "expected a column 'text'" in said) == bool(code)


def test_variants_that_compare_would_refuse_are_refused(
    recipes: Recipes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(recipes("llama").read_text())
    content["compare"] = {"variants": {"one": {"methd": "btx"}}}
    path = recipes("llama").with_name("variants.yaml")
    path.write_text(json.dumps(content))
    assert main(["plan", str(path)]) == 2
    assert "did you mean" in capsys.readouterr().err
