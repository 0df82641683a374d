"""Every mistake of a user's is a message and exit code 2, found before it costs anything; `--json`
is all that stdout holds; `--help` answers at once."""

import fcntl
import itertools
import json
import logging
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import symphony_moe
from checks import edit_weights, mostly_slow
from conftest import make_model
from symphony_moe import cli, console, pipeline, progress
from symphony_moe.cli import main
from symphony_moe.errors import RecipeError, shown
from symphony_moe.machine import use_device
from symphony_moe.runs.folder import RunFolder

Recipes = Callable[[str], Path]
Built = Callable[[str], RunFolder]

WEIGHTS = "model.safetensors"
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def project(recipes: Recipes, tmp_path: Path) -> Path:
    """A good project to break: recipe.yaml, models/, text."""
    shutil.copytree(recipes("llama").parent, tmp_path / "project")
    return tmp_path / "project"


class Symphony:
    """Runs commands in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)"""
        self.capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *self.capsys.readouterr()

    def refused(self, *arguments: object) -> str:
        """The message of a mistake; nothing but it is said, on stderr, and again with --json."""
        code, out, err = self(*arguments)
        message = err[err.index("symphony: error: ") :]
        assert (code, out) == (2, "")
        assert "Traceback" not in err and "bug" not in err
        code, out, _ = self(*arguments, "--json")
        assert code == 2
        assert message == f"symphony: error: {json.loads(out)['error']}\n"
        return err


@pytest.fixture
def symphony(capsys: pytest.CaptureFixture[str]) -> Symphony:
    return Symphony(capsys)


def edit_recipe(project: Path, **changes: Any) -> None:
    path = project / "recipe.yaml"
    path.write_text(json.dumps(yaml.safe_load(path.read_text()) | changes))


# Mistakes that are found before any work: plan, build and run refuse, and no run folder is made


def _misspelled(project: Path) -> None:
    edit_recipe(project, align={"neurns": "none"})


def _no_recipe(project: Path) -> None:
    (project / "recipe.yaml").unlink()


def _tab_in_recipe(project: Path) -> None:
    (project / "recipe.yaml").write_text("sources:\n\ta: {model: models/a}\n")


def _text_for_a_recipe(project: Path) -> None:
    (project / "recipe.yaml").write_text('"words": of no recipe: at all')


def _binary_recipe(project: Path) -> None:
    (project / "recipe.yaml").write_bytes(bytes(range(256)))


def _no_model(project: Path) -> None:
    shutil.rmtree(project / "models" / "b")


def _empty_model(project: Path) -> None:
    shutil.rmtree(project / "models" / "b")
    (project / "models" / "b").mkdir()


def _no_data(project: Path) -> None:
    (project / "b.jsonl").unlink()


def _empty_data(project: Path) -> None:
    (project / "b.jsonl").write_text("")


def _no_extra_data(project: Path) -> None:
    (project / "other.jsonl").unlink()


def _other_family(project: Path) -> None:
    shutil.rmtree(project / "models" / "b")
    make_model(project / "models" / "b", "qwen2", 0)


def _other_shapes(project: Path) -> None:
    shutil.rmtree(project / "models" / "b")
    make_model(project / "models" / "b", "llama", 0, num_hidden_layers=3)


def _no_tensor(project: Path) -> None:
    edit_weights(project / "models" / "b", lambda tensors: tensors.pop(Q))


def _truncated(project: Path) -> None:
    path = project / "models" / "b" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def _one_source(project: Path) -> None:
    edit_recipe(project, sources={"a": {"model": "models/a", "data": "a.jsonl"}})


def _edit_b(project: Path, settings: Any) -> None:
    sources = json.loads((project / "recipe.yaml").read_text())["sources"]
    edit_recipe(project, sources=sources | {"b": settings})


def _no_settings_of_a_source(project: Path) -> None:
    _edit_b(project, "models/b")


def _number_for_text(project: Path) -> None:
    _edit_b(project, {"model": "models/b", "data": 5})


def _folder_for_text(project: Path) -> None:
    (project / "b.jsonl").unlink()
    (project / "b.jsonl").mkdir()


def _file_for_a_model(project: Path) -> None:
    shutil.rmtree(project / "models" / "b")
    (project / "models" / "b").write_text("")


def _folder_for_a_recipe(project: Path) -> None:
    (project / "recipe.yaml").unlink()
    (project / "recipe.yaml").mkdir()


def _two_columns(project: Path) -> None:
    _edit_b(project, {"model": "models/b", "data": {"hub": "texts"}, "column": "output"})


def _too_many_experts(project: Path) -> None:
    edit_recipe(project, router={"top_k": 4})


def _no_tokenizer(project: Path) -> None:
    for path in (project / "models" / "b").glob("tokenizer*"):
        path.unlink()


EARLY = [
    (_misspelled, "did you mean align.neurons?"),
    (_no_recipe, "no such recipe file"),
    (_binary_recipe, "not readable as YAML"),
    (_tab_in_recipe, ": a tab; YAML is indented with spaces\n"),
    (_text_for_a_recipe, "; expected settings such as `sources:`"),
    (_no_model, "b: "),
    (_empty_model, "config.json"),
    (_no_data, "b.jsonl"),
    (_empty_data, "b.jsonl is empty"),
    (_no_extra_data, "other.jsonl"),
    (_other_family, "model_type (a, c: llama; b: qwen2)"),
    (_other_shapes, "num_hidden_layers (a, c: 2; b: 3)"),
    (_no_tensor, Q),
    (_truncated, "fetch it again"),
    (
        _one_source,
        "sources: expected two sources or more, each as NAME: {model: ..., data: ...} (got 1)\n",
    ),
    (_no_settings_of_a_source, "sources.b: expected {model: ..., data: ...} (got 'models/b')\n"),
    (
        _number_for_text,
        "sources.b.data: expected a file, a list of files, or {hub: ..., column: ...} (got 5)\n",
    ),
    (_folder_for_text, "b.jsonl is a folder; name its files"),
    (_file_for_a_model, "is a file; name the folder of the model"),
    (_folder_for_a_recipe, "is a folder, not a recipe file"),
    (_two_columns, "the column stands in data: {hub: texts, column: ...}"),
    (_too_many_experts, "router.top_k: 4"),
    (_no_tokenizer, "b: no usable tokenizer"),
]


@pytest.mark.parametrize("odd", ["b\udcffd", "\ud800"])
def test_arguments_that_are_no_text_are_refused(
    odd: str, project: Path, tmp_path: Path, symphony: Symphony
) -> None:
    """A file name may be any bytes, but no safetensors file can lie there."""
    recipe = project / "recipe.yaml"
    for arguments in (
        ["plan", f"{odd}.yaml"],
        ["build", recipe, "--out", tmp_path / odd],
        ["verify", odd],
        ["plan", recipe, "--set", f"anchor={odd}"],
    ):
        assert "is not UTF-8 text; rename what it names" in symphony.refused(*arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["project"]


ODD = os.fsdecode(b"mod\xffel")


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "?"],
        ["build", "RECIPE", "--out", "?"],
        ["train", "?"],
        ["evaluate", "?"],
        ["verify", "?"],
        ["report", "?"],
        ["compare", "RECIPE", "--out", "?"],
        ["demo", "--out", "?"],
        ["init", "?", "?"],
        ["import", "?"],
    ],
    ids=" ".join,
)
def test_bytes_that_are_no_text_are_refused_by_every_command(
    words: list[str], project: Path, tmp_path: Path
) -> None:
    given = {"?": os.fsencode(tmp_path) + b"/mod\xffel", "RECIPE": bytes(project / "recipe.yaml")}
    symphony: list[bytes] = [os.fsencode(sys.executable), b"-m", b"symphony_moe"]
    command = [*symphony, *(given.get(word, word.encode()) for word in words)]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == b""
    assert done.stderr.startswith(b"symphony: error: ") and done.stderr.count(b"\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["project"]


def _odd_model(project: Path) -> None:
    (project / "models" / "b").rename(project / "models" / ODD)
    _edit_b(project, {"model": f"models/{ODD}", "data": "b.jsonl"})


def _odd_data(project: Path) -> None:
    (project / "b.jsonl").rename(project / f"{ODD}.jsonl")
    _edit_b(project, {"model": "models/b", "data": f"{ODD}.jsonl"})


def _odd_data_folder(project: Path) -> None:
    (project / ODD).mkdir()
    (project / "b.jsonl").rename(project / ODD / "b.jsonl")
    _edit_b(project, {"model": "models/b", "data": {"hub": ODD}})


@pytest.mark.parametrize("spoil", [_odd_model, _odd_data, _odd_data_folder])
def test_a_recipes_path_that_is_no_text_is_named(
    spoil: Callable[[Path], None], project: Path, tmp_path: Path, symphony: Symphony
) -> None:
    """A recipe can spell it, by an escape; no safetensors file can lie there, and no output could
    name it."""
    spoil(project)
    for command in (["plan"], ["build", "--out", tmp_path / "out"]):
        error = symphony.refused(command[0], project / "recipe.yaml", *command[1:])
        assert "sources.b" in error and "is not UTF-8 text" in error and "rename it" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_project_in_a_folder_that_is_no_text_is_refused_where_its_files_are(
    project: Path, tmp_path: Path
) -> None:
    """Its name is in no argument. A run that has its sources elsewhere may lie there."""
    recipe, odd = project / "recipe.yaml", tmp_path / ODD
    odd.mkdir()
    symphony = [sys.executable, "-m", "symphony_moe"]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}  # as most terminals are
    shutil.copytree(project, odd / "project")
    for words, code in (
        (["plan", "project/recipe.yaml", "--json"], 2),
        (["build", str(recipe), "--out", "run"], 0),
    ):
        done = subprocess.run(
            [*symphony, *words], capture_output=True, cwd=odd, text=True, env=environment
        )
        assert "Traceback" not in done.stderr
        assert done.returncode == code
        assert code == 0 or "is not UTF-8 text" in json.loads(done.stdout)["error"]


@pytest.mark.slow
def test_json_is_json_where_the_output_takes_ascii_alone(project: Path) -> None:
    """A folder's name may hold more."""
    (project / "models" / "b").rename(project / "models" / "café")
    text = (project / "recipe.yaml").read_text(encoding="utf-8")
    recipe = project / "ascii.yaml"
    recipe.write_text(text.replace("models/b", "models/café"), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "symphony_moe", "plan", str(recipe), "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert "café" in [source["model"] for source in json.loads(done.stdout)["sources"]]


def test_a_stray_file_whose_name_is_no_text_is_named(
    run: RunFolder, project: Path, symphony: Symphony
) -> None:
    (run.root / ODD).write_text("")
    words = ["build", project / "recipe.yaml", "--out", run.root, "--overwrite"]
    assert "holds mod" in symphony.refused(*words)


# `build` begins with all that `plan` does.
@pytest.mark.parametrize(
    ("command", "spoil", "named"),
    [(command, *case) for command in ("build", "run") for case in EARLY]
    + [("plan", *case) for case in EARLY[::4]],
)
def test_a_mistake_is_named_before_anything_is_made(
    command: str,
    spoil: Callable[[Path], None],
    named: str,
    project: Path,
    tmp_path: Path,
    symphony: Symphony,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A model's path that is not there might be a hub id.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    spoil(project)
    out = tmp_path / "out"
    more = [] if command == "plan" else ["--out", out]
    assert named in symphony.refused(command, project / "recipe.yaml", *more)
    assert not out.exists()


def _bad_json(project: Path, name: str) -> None:
    with (project / name).open("a") as file:
        file.write("{not json\n")


def _binary_text(project: Path, name: str) -> None:
    (project / name).write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8)


def _no_column(project: Path, name: str) -> None:
    (project / name).write_text('{"txet": "alpha beta"}\n' * 50)


def _blank(project: Path, name: str) -> None:
    (project / name).write_text('{"text": "  "}\n' * 50)


def _too_short(project: Path, name: str) -> None:
    (project / name).write_text('{"text": "alpha"}\n')


def _numbers(project: Path, name: str) -> None:
    (project / name).write_text('{"text": 3}\n')


@pytest.mark.parametrize(
    "spoil", [_bad_json, _binary_text, _no_column, _blank, _too_short, _numbers]
)
@pytest.mark.parametrize(
    ("command", "name", "changes"),
    [
        ("build", "b.jsonl", {}),
        ("run", "b.jsonl", {}),
        # Read by no stage before the last one: it must not take the whole run to find out.
        ("run", "b.jsonl", {"align": {"neurons": "none"}}),
        ("run", "other.jsonl", {}),
    ],
)
def test_unreadable_text_is_named_before_anything_is_made(
    command: str,
    name: str,
    changes: dict[str, Any],
    spoil: Callable[[Path, str], None],
    project: Path,
    tmp_path: Path,
    symphony: Symphony,
) -> None:
    spoil(project, name)
    edit_recipe(project, **changes)
    out = tmp_path / "out"
    message = symphony.refused(command, project / "recipe.yaml", "--out", out)
    assert name in message or name.split(".")[0] in message
    assert not out.exists()


def test_a_source_without_held_out_text_is_named_before_anything_is_made(
    project: Path, tmp_path: Path, symphony: Symphony
) -> None:
    """One long document cannot be held out and trained on."""
    (project / "b.txt").write_text("alpha beta gamma delta\n" * 2000)
    edit_recipe(
        project,
        sources={
            "a": {"model": "models/a", "data": "a.jsonl"},
            "b": {"model": "models/b", "data": "b.txt"},
        },
    )
    message = symphony.refused("run", project / "recipe.yaml", "--out", tmp_path / "out")
    assert "text of b" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_text_with_halves_of_characters_is_used(
    project: Path, tmp_path: Path, symphony: Symphony
) -> None:
    r"""JSON may hold `\ud83d` alone, cut off from its other half; no tokenizer takes it."""
    with (project / "b.jsonl").open("a") as file:
        file.write('{"text": "alpha \\ud83d beta"}\n' * 100)
    code, _, err = symphony("run", project / "recipe.yaml", "--out", tmp_path / "out")
    assert code == 0, err


@pytest.mark.parametrize(
    "override",
    ["nonsense", "=1", "trian.tokens=1", "train.tokens=many", "seed.x=1", "train.tokens=[", "a=b"],
)
@pytest.mark.parametrize("command", ["plan", "build"])
def test_set_nonsense_is_named(
    command: str, override: str, project: Path, tmp_path: Path, symphony: Symphony
) -> None:
    more = [] if command == "plan" else ["--out", tmp_path / "out"]
    symphony.refused(command, project / "recipe.yaml", *more, "--set", override)
    assert not (tmp_path / "out").exists()


def test_set_reaches_the_plan(project: Path, symphony: Symphony) -> None:
    code, out, _ = symphony(
        "plan",
        project / "recipe.yaml",
        "--json",
        "--set",
        "router.top_k=1",
        "--set",
        "output.dtype=float16",
    )
    planned = json.loads(out)
    assert code == 0
    assert planned["config"]["num_experts_per_tok"] == 1
    assert planned["dtype"] == "float16"


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000])
def test_names_that_are_too_long_are_named(name: str, project: Path, symphony: Symphony) -> None:
    assert name[:50] in symphony.refused("plan", name)
    assert name[:50] in symphony.refused("build", project / "recipe.yaml", "--out", name)
    assert name[:50] in symphony.refused("verify", name)


LONG = {"word": "x" * 50_000, "words": "some words " * 5000}


def _edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _recipe(change: Callable[[Any, str], Any]) -> Callable[[Path, str], None]:
    return lambda project, long: _edit_json(project / "recipe.yaml", lambda c: change(c, long))


def _model(file: str, change: Callable[[Any, str], Any]) -> Callable[[Path, str], None]:
    return lambda project, long: _edit_json(
        project / "models" / "b" / file, lambda c: change(c, long)
    )


def _renamed_tensor(project: Path, long: str) -> None:
    edit_weights(project / "models" / "b", lambda t: t.update({long: t.pop(Q)}))


def _odd_index(project: Path, long: str) -> None:
    (project / "models" / "b" / WEIGHTS).unlink()
    index = {"weight_map": {Q: f"../{long}"}}
    (project / "models" / "b" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def _failing_template(project: Path, long: str) -> None:
    template = f"{{{{ raise_exception('{long}') }}}}"
    _model("tokenizer_config.json", lambda c, _: c.update(chat_template=template))(project, long)
    message = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    (project / "b.jsonl").write_text((json.dumps({"messages": message}) + "\n") * 50)
    _edit_json(project / "recipe.yaml", lambda c: c["sources"]["b"].update(column="messages"))


LONG_VALUES: dict[str, Callable[[Path, str], Any]] = {
    "source's name": _recipe(lambda c, long: c["sources"].update({long: c["sources"]["a"]})),
    "setting": _recipe(lambda c, long: c.update({long: 1})),
    "setting in a section": _recipe(lambda c, long: c["train"].update({long: 1})),
    "value": _recipe(lambda c, long: c["train"].update(tokens=long)),
    "method": _recipe(lambda c, long: c.update(method=long)),
    "anchor": _recipe(lambda c, long: c.update(anchor=long)),
    "model": _recipe(lambda c, long: c["sources"]["b"].update(model=long)),
    "path": _recipe(lambda c, _: c["sources"]["b"].update(model="./" + "y/" * 2000)),
    "data": _recipe(lambda c, long: c["sources"]["b"].update(data=long)),
    "column": _recipe(lambda c, long: c["sources"]["b"].update(column=long)),
    "recipe": lambda project, long: (project / "recipe.yaml").write_text(f"a: [{long}"),
    "row": lambda project, long: (project / "b.jsonl").write_text(long),
    "row's key": lambda project, long: (project / "b.jsonl").write_text(json.dumps({long: 1})),
    "type of the model": _model("config.json", lambda c, long: c.update(model_type=long)),
    "activation": _model("config.json", lambda c, long: c.update(hidden_act=long)),
    "number": _model("config.json", lambda c, long: c.update(hidden_size=long)),
    "token": _model("tokenizer.json", lambda c, long: c["model"]["vocab"].update({long: 300})),
    "merge": _model("tokenizer.json", lambda c, long: c["model"].update(merges=[long])),
    "kind of tokenizer": _model("tokenizer.json", lambda c, long: c["model"].update(type=long)),
    "special token": _model("tokenizer_config.json", lambda c, long: c.update(eos_token=long)),
    "template": _failing_template,
    "tensor": _renamed_tensor,
    "index": _odd_index,
}
"""What a user, or whoever made a source, can make as long as he likes."""


@pytest.mark.parametrize("kind", list(LONG))
@pytest.mark.parametrize("what", list(LONG_VALUES))
def test_no_message_repeats_all_that_it_was_given(
    what: str, kind: str, project: Path, tmp_path: Path, symphony: Symphony
) -> None:
    LONG_VALUES[what](project, LONG[kind])
    code, out, error = symphony("build", project / "recipe.yaml", "--out", tmp_path / "out")
    assert (code, out) == (2, "") and "Traceback" not in error
    assert len(error[error.index("symphony: error: ") :]) < 500 and len(error) < 1000
    assert not (tmp_path / "out" / "checkpoint").exists()


@pytest.mark.parametrize("kind", list(LONG))
@pytest.mark.parametrize(
    "words",
    [
        ["LONG"],
        ["plan", "LONG"],
        ["plan", "RECIPE", "LONG"],
        ["plan", "RECIPE", "--LONG"],
        ["plan", "RECIPE", "--set", "LONG"],
        ["plan", "RECIPE", "--set", "LONG=1"],
        ["plan", "RECIPE", "--set", "method=LONG"],
        ["plan", "RECIPE", "--set", "train.tokens=[LONG"],
        ["build", "RECIPE", "--out", "LONG"],
        ["train", "LONG"],
        ["verify", "LONG"],
        ["evaluate", "LONG", "--tasks", "x"],
        # The harness makes an index of all its tasks before it knows that this is none.
        pytest.param(["evaluate", "RUN", "--tasks", "LONG"], marks=pytest.mark.slow),
        ["evaluate", "RUN", "--tasks", "mmlu", "--models", "LONG"],
        ["evaluate", "RUN", "--tasks", "mmlu", "--limit", "LONG"],
        ["compare", "RECIPE", "--out", "OUT", "--methods", "LONG"],
        ["compare", "RECIPE", "--out", "OUT", "--seeds", "LONG"],
        ["train", "RUN", "--set", "train.LONG=1"],
        ["init", "LONG", "LONG"],
        ["init", "x", "y", "--data", "LONG=x"],
        ["init", "x", "y", "--data", "LONG"],
        ["init", "x", "y", "--out", "LONG/x"],
        ["import", "LONG"],
    ],
    ids=" ".join,
)
def test_no_message_repeats_all_of_a_long_argument(
    words: list[str],
    kind: str,
    project: Path,
    run: RunFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {"RECIPE": project / "recipe.yaml", "RUN": run.root, "OUT": tmp_path / "out"}
    with suppress(SystemExit):  # a mistyped command line's own
        assert main([str(given.get(w, w.replace("LONG", LONG[kind]))) for w in words]) == 2
    error = capsys.readouterr().err
    assert "error: " in error and len(error[error.index("symphony") :]) < 1000
    assert len(error[error.rindex("error: ") :]) < 500


@pytest.mark.parametrize(
    "words", [["--help"], ["plan", "none.yaml"], ["plan", "none.yaml", "--json"]]
)
def test_words_on_a_full_disk_end_as_a_refusal(words: list[str], tmp_path: Path) -> None:
    """Not as a bug of ours, whatever could not be said."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "symphony_moe", *words]
        done = subprocess.run(command, stdout=full, stderr=full, cwd=tmp_path)
    assert done.returncode == 2


def test_a_message_is_cut_in_its_middle_and_steers_no_terminal() -> None:
    assert shown("a: b\nc") == "a: b\nc"
    assert shown("a\x1b[2J\r\x9b\u202e") == "a\\x1b[2J\\r\\x9b\\u202e"
    path = "/" + "y" * 300
    assert shown(f"{path}: not there") == f"{path}: not there", "short enough as it is"
    cut = shown(f"{'x' * 9999}: expected a name, got {'y ' * 9999}; rename it")
    assert len(cut) <= 480 and ": expected a name" in cut and cut.endswith("; rename it")


def test_an_existing_out_is_refused_and_left_alone(
    run: RunFolder, project: Path, symphony: Symphony
) -> None:
    before = {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()}
    for command in ("build", "run"):
        message = symphony.refused(command, project / "recipe.yaml", "--out", run.root)
        assert "exists" in message and "--overwrite" in message
    assert before == {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()}


# Mistakes that only work finds


@pytest.mark.parametrize(
    ("command", "tensor"),
    mostly_slow(
        itertools.product(["build", "run"], [Q, "model.embed_tokens.weight", "lm_head.weight"]),
        ("run", Q),
        ("build", "model.embed_tokens.weight"),
        ("build", "lm_head.weight"),
    ),
)
def test_weights_that_are_no_numbers_leave_no_checkpoint(
    command: str, tensor: str, project: Path, tmp_path: Path, symphony: Symphony
) -> None:
    edit_weights(
        project / "models" / "c", lambda tensors: tensors[tensor].view(-1)[5].fill_(float("nan"))
    )
    out = tmp_path / "out"
    code, stdout, err = symphony(command, project / "recipe.yaml", "--out", out)
    assert (code, stdout) == (2, "")
    assert f"c: {tensor} in " in err and "NaN" in err and "Traceback" not in err
    assert not (out / "checkpoint").exists()
    for later in ("train", "evaluate", "report", "verify"):
        # Whatever each of them looks at first: the weights or the missing checkpoint.
        assert symphony.refused(later, out)
    # Mended, and built again in the same place.
    edit_weights(project / "models" / "c", lambda tensors: tensors[tensor].nan_to_num_())
    assert symphony("build", project / "recipe.yaml", "--out", out, "--overwrite")[0] == 0


def test_values_that_do_not_fit_the_dtype_leave_no_checkpoint(
    project: Path, tmp_path: Path, symphony: Symphony
) -> None:
    edit_weights(project / "models" / "b", lambda tensors: tensors["lm_head.weight"].mul_(1e7))
    out = tmp_path / "out"
    code, _, err = symphony(
        "build", project / "recipe.yaml", "--out", out, "--set", "output.dtype=float16"
    )
    assert code == 2 and "output.dtype: lm_head.weight" in err and "Traceback" not in err
    assert not (out / "checkpoint").exists()


def test_too_little_calibration_text_is_used_with_a_warning(
    project: Path, tmp_path: Path, symphony: Symphony
) -> None:
    code, out, err = symphony(
        "build",
        project / "recipe.yaml",
        "--out",
        tmp_path / "out",
        "--json",
        "--set",
        "calibration.tokens=1_000_000",
    )
    assert code == 0
    warnings = [line for line in err.splitlines() if line.startswith("W calibration text")]
    assert len(warnings) == 3
    for name, line in zip("abc", warnings, strict=True):
        assert f"calibration text of {name}: 333,312 tokens asked for" in line
    used = json.loads(out)["timing"]["calibration_tokens"]
    assert 0 < used < 1_000_000


# Commands in the wrong place or order


@pytest.mark.parametrize("command", ["train", "evaluate", "report", "verify"])
def test_only_a_run_folder_is_worked_on(
    command: str, project: Path, tmp_path: Path, symphony: Symphony
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("empty", "file", "none"):
        assert str(tmp_path / name) in symphony.refused(command, tmp_path / name)
    # The folder of the recipe is not the run's.
    assert "checkpoint" in symphony.refused(command, project)
    assert not (project / "run.log").exists(), "it wrote into a folder that is not its own"


def test_train_goes_on_only_from_what_is_built(run: RunFolder, symphony: Symphony) -> None:
    shutil.rmtree(run.checkpoint)
    assert "symphony build" in symphony.refused("train", run.root)
    assert not run.trained.exists() and not run.work.exists()


def test_a_broken_run_does_not_verify(run: RunFolder, symphony: Symphony) -> None:
    path = run.checkpoint / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "checkpoint/model.safetensors (changed)" in symphony.refused("verify", run.root)


def _gone(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def _half(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _bad_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize("spoil", [_gone, _half, _no_config, _bad_config])
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_damaged_checkpoint_is_named(
    command: str, spoil: Callable[[Path], None], run: RunFolder, symphony: Symphony
) -> None:
    spoil(run.checkpoint)
    words = r"checkpoint(: a file of it is missing or damaged|/.*: lost; put it back)"
    assert re.search(words, symphony.refused(command, run.root))


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_what_is_built_cannot_be_set(command: str, run: RunFolder, symphony: Symphony) -> None:
    assert "what can change now is" in symphony.refused(command, run.root, "--set", "seed=1")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["plan"],
        ["report", "x", "--set", "seed=1"],
        ["build", "recipe.yaml"],
        ["plan", "recipe.yaml", "--ot", "x"],
        ["build", "r.yaml", "--out", "x", "--resume", "--overwrite"],
        ["train"],
        ["plan", "a", "b"],
    ],
    ids=str,
)
def test_a_mistyped_command_line_shows_the_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: symphony" in capsys.readouterr().err


def test_without_a_command_the_help_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code is still a mistake's, for a script that has lost its command."""
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert "Commands" in out and "compare" in out and err == ""


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["buidl"], "Did you mean 'build'?"),
        (["plan", "recipe.yaml", "--jsn"], "--json"),
        (["build", "recipe.yaml"], "'--out'"),
        (["train"], "'DIR'"),
        (["build", "recipe.yaml", "--out", "--overwrite"], "'--out' expects a value"),
        (["plan", "recipe.yaml", "--set"], "'--set'"),
        (["evaluate", "run", "--limit", "0"], "a number above zero, got '0'"),
    ],
    ids=str,
)
def test_a_mistyped_command_line_is_told_what_is_wrong(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line after the usage, which also says where the help is."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    usage, message = err.splitlines()
    assert caught.value.code == 2 and out == ""
    assert usage.startswith("usage: symphony") and message.startswith("symphony: error: ")
    assert named in message and "--help` says more" in message and len(message) < 500


def test_options_may_stand_anywhere_and_set_repeatedly(
    project: Path, symphony: Symphony, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    words = ["--set", "router.top_k=1", "recipe.yaml", "--json", "--set=output.dtype=float16"]
    planned = json.loads(symphony("plan", *words)[1])
    assert planned["config"]["num_experts_per_tok"] == 1 and planned["dtype"] == "float16"


# Bugs


class _Bug(Exception):
    pass


@pytest.mark.parametrize(
    "bug",
    [
        AssertionError("planned 3, got 4"),
        KeyError("x"),
        _Bug(),
        OSError("no number"),
        FileNotFoundError(2, "not there", "x"),
    ],
)
def test_a_bug_of_ours_shows_its_traceback(
    bug: Exception, project: Path, symphony: Symphony, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise bug

    monkeypatch.setattr(pipeline, "plan", fail)
    code, out, err = symphony("plan", project / "recipe.yaml")
    assert (code, out) == (1, "")
    assert "Traceback" in err and "a bug in symphony-moe" in err and type(bug).__name__ in err
    code, out, _ = symphony("plan", project / "recipe.yaml", "--json")
    assert code == 1 and type(bug).__name__ in json.loads(out)["error"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_no_memory_is_nobodys_bug(
    error: Exception,
    recipes: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("symphony_moe.building.candidate.fused_tables", fail)
    assert main(["build", str(recipes("llama")), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "symphony: error: out of memory: " in said and "Traceback" not in said
    assert "A smaller calibration.tokens needs less" in said


def test_an_interruption_is_no_bug(
    project: Path, symphony: Symphony, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "plan", interrupted)
    code, out, err = symphony("plan", project / "recipe.yaml")
    assert (code, out) == (130, "") and "Traceback" not in err


# Output


def parsed(symphony: Symphony, *arguments: object) -> Any:
    code, out, err = symphony(*arguments, "--json")
    assert code == 0, err
    assert out.count("\n") == 1, "one line of JSON and nothing else"
    return json.loads(out)


def test_every_command_speaks_json(project: Path, tmp_path: Path, symphony: Symphony) -> None:
    recipe, out = project / "recipe.yaml", tmp_path / "out"
    planned = parsed(symphony, "plan", recipe)
    assert planned["architecture"] == "mixtral"
    assert [source["name"] for source in planned["sources"]] == ["a", "b", "c"]
    built = parsed(symphony, "build", recipe, "--out", out)
    assert built["paths"] == {"checkpoint": str(out / "checkpoint")}
    assert set(built["alignment"]["neurons"]) == {"b", "c"}
    trained = parsed(symphony, "train", out)
    assert trained["paths"] == {"trained": str(out / "trained")}
    assert trained["training"]["steps"] > 0
    evaluated = parsed(symphony, "evaluate", out)
    assert set(evaluated["sources"]) == {"a", "b", "c"}
    assert set(evaluated["trained"]) == {"a", "b", "c", "other"}
    reported = parsed(symphony, "report", out)
    assert Path(reported["paths"]["report"]).is_file()
    verified = parsed(symphony, "verify", out, "--deep")
    assert verified["verified"] is True and "rebuilt" in verified["checks"]


@pytest.mark.parametrize(
    "words", [["plan"], ["plan", "r.yaml", "--nonsense"], ["frobnicate"], ["verify", "nosuch"]]
)
def test_a_refusal_is_json_as_well(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code: Any = None
    with suppress(SystemExit):
        code = main([*words, "--json"])
    shown = capsys.readouterr()
    assert code in (2, None)  # None: the command line itself is refused, which ends with 2
    assert f"symphony: error: {json.loads(shown.out)['error']}\n" in shown.err


def test_a_run_folder_that_is_none_is_called_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run-one").mkdir()
    (tmp_path / "file").write_text("x")
    for name, said in (
        (
            "run-onr",
            f"no such folder; expected a run folder, as `symphony build --out` makes one; "
            f"did you mean '{tmp_path}/run-one'?",
        ),
        ("file", "is a file; expected a run folder"),
        ("run-one", "no recipe.yaml; is it a run folder"),
    ):
        assert main(["verify", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("did you mean") == ("did you mean" in said)


THEIRS = """
base_model: models/a
gate_mode: random
experts: [{source_model: models/a}, {source_model: models/b}]
"""


def test_a_recipe_is_made_of_models_and_of_mergekits_and_planned(
    project: Path, symphony: Symphony, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On stdout, in JSON, or in a file, where it is the same; a file that is there is left
    alone."""
    monkeypatch.chdir(project)
    (project / "moe.yml").write_text(THEIRS)
    commands = [
        ["init", "models/a", "models/b", "--data", "a=a.jsonl", "--data", "b=b.jsonl"],
        ["import", "moe.yml"],
    ]
    for words in commands:
        _, text, err = symphony(*words)
        assert err == ""
        made = parsed(symphony, *words)
        assert made["recipe"] == text and (made["fill_in"] == []) is (words[0] == "init")
        wrote = parsed(symphony, *words, "--out", f"{words[0]}.yaml")
        assert wrote == made | {"paths": {"recipe": f"{words[0]}.yaml"}}
        assert (project / f"{words[0]}.yaml").read_text() == text
        before = (project / f"{words[0]}.yaml").stat().st_mtime_ns
        assert "exists; choose another" in symphony.refused(*words, "--out", f"{words[0]}.yaml")
        assert (project / f"{words[0]}.yaml").stat().st_mtime_ns == before
        assert "is a folder" in symphony.refused(*words, "--out", "models")
        assert "there is no folder nowhere" in symphony.refused(*words, "--out", "nowhere/r.yaml")
        code, out, _ = symphony(*words, "--out", f"{words[0]}.yaml", "--overwrite")
        assert code == 0 and out.startswith(f"wrote {words[0]}.yaml\n")
        if words[0] == "init":
            assert "theirs: b " in out and "\nnext: symphony plan init.yaml" in out
    assert made["notes"] and all(f"  {note}\n" in out for note in made["notes"])
    assert "fill in sources.a.data, sources.b.data; then: symphony plan import.yaml" in out
    assert parsed(symphony, "plan", "init.yaml")["architecture"] == "mixtral"
    assert "sources.a.data, sources.b.data: expected text" in symphony.refused(
        "plan", "import.yaml"
    )


def test_an_interrupted_command_says_how_it_goes_on(
    project: Path, symphony: Symphony, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("symphony_moe.pipeline.build", interrupted)
    monkeypatch.setattr("symphony_moe.pipeline.plan", interrupted)
    code, _, err = symphony("build", project / "recipe.yaml", "--out", project / "out")
    assert code == 130 and "interrupted; the same command with --resume goes on" in err
    code, _, err = symphony("plan", project / "recipe.yaml")
    assert code == 130 and "interrupted" in err and "--resume" not in err


def test_a_folder_that_cannot_be_written_in_is_refused_before_anything_is_read(
    project: Path, symphony: Symphony, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    for words in (
        ["init", "none", "gone", "--out", "new"],
        ["plan", "recipe.yaml", "--html", "new"],
    ):
        option = words[-2]
        message = f"{option} new: nothing can be written there; choose another folder"
        assert message in symphony.refused(*words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["init", "models/a"], "symphony init: expected two models or more, got 1"),
        (["init", "models/a", "models/b", "--data", "a"], "--data a: expected NAME=FILE"),
        (["init", "models/a", "models/b", "--data", "=x"], "--data =x: expected NAME=FILE"),
        (["init", "models/a", "models/b", "--data", "c=a.jsonl"], "is no source's name"),
        (["import", "recipe.yaml"], "is a recipe of symphony already"),
        (["import", "none.yml"], "none.yml: no such recipe file"),
    ],
    ids=str,
)
def test_what_no_recipe_can_be_made_of_is_named(
    words: list[str],
    said: str,
    project: Path,
    symphony: Symphony,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(project)
    before = sorted(project.rglob("*"))
    assert said in symphony.refused(*words, "--out", "new.yaml")
    assert sorted(project.rglob("*")) == before


def test_run_speaks_json_and_does_everything(
    project: Path, tmp_path: Path, symphony: Symphony
) -> None:
    out = tmp_path / "out"
    done = parsed(symphony, "run", project / "recipe.yaml", "--out", out)
    for part in ("checkpoint", "trained", "report"):
        assert Path(done["paths"][part]).exists()
    assert set(done["built"]) == set(done["trained"]) == {"a", "b", "c", "other"}
    assert sorted(path.name for path in out.iterdir()) == [
        "alignment.safetensors",
        "checkpoint",
        "manifest.json",
        "metrics.json",
        "plan.json",
        "recipe.yaml",
        "report.html",
        "run.log",
        "samples.json",
        "trained",
    ]
    # Once more from where it is: nothing is left to do, and nothing is done twice.
    before = (out / "trained" / WEIGHTS).stat().st_mtime_ns
    parsed(symphony, "run", project / "recipe.yaml", "--out", out, "--resume")
    assert (out / "trained" / WEIGHTS).stat().st_mtime_ns == before
    assert not (out / "work").exists()


def test_a_plan_is_written_as_a_page_and_nothing_else_is(
    project: Path, tmp_path: Path, symphony: Symphony
) -> None:
    """Where it may be written, which is known before anything is read."""
    recipe, page = project / "recipe.yaml", tmp_path / "pages" / "plan.html"
    page.parent.mkdir()
    before = sorted(project.rglob("*"))
    made = parsed(symphony, "plan", recipe, "--html", page)
    assert made == parsed(symphony, "plan", recipe) | {"paths": {"page": str(page)}}
    assert f"{made['total_parameters']:,} parameters" in page.read_text()
    assert list(page.parent.iterdir()) == [page] and sorted(project.rglob("*")) == before
    page.write_text("mine")
    refused = symphony.refused("plan", recipe, "--html", page)
    assert f"--html {page}: exists; choose another, or --overwrite it" in refused
    assert page.read_text() == "mine"
    missing = project / "no-recipe.yaml"
    assert "is a folder; expected the name of a page" in symphony.refused(
        "plan", missing, "--html", tmp_path
    )
    assert "there is no folder" in symphony.refused(
        "plan", missing, "--html", tmp_path / "no" / "plan.html"
    )
    assert "--overwrite: has no effect without --html" in symphony.refused(
        "plan", recipe, "--overwrite"
    )
    _, out, _ = symphony("plan", recipe, "--html", page, "--overwrite")
    assert f"wrote {page}\n" in out and "3 x llama" in out
    assert page.read_text().startswith("<!doctype html>")


def test_people_read_the_plan_and_the_losses(run: RunFolder, symphony: Symphony) -> None:
    code, out, _ = symphony("plan", run.recipe)
    assert code == 0
    assert "3 x llama -> mixtral" in out and "no differences between the sources" in out
    code, out, _ = symphony("evaluate", run.root)
    table = out.splitlines()
    assert table[0].split() == [
        "nats",
        "per",
        "token",
        "a",
        "b",
        "c",
        "other",
        "mean",
        "mean",
        "out",
    ]
    assert [line.split()[0] for line in table[1:5]] == ["a", "b", "c", "built"]


def test_people_read_what_was_aligned_and_fitted(
    project: Path, tmp_path: Path, symphony: Symphony
) -> None:
    """A line for every source and kind, and what the fit has come to; the same in the JSON."""
    recipe, more = (
        project / "recipe.yaml",
        ["--set", "method=harmonized", "--set", "fit.epochs=1"],
    )
    code, out, err = symphony("build", recipe, "--out", tmp_path / "out", *more)
    assert code == 0, err
    lines = out.splitlines()
    for source in "bc":
        for what in ("cosine of residual streams", "correlation of heads"):
            assert any(line.startswith(f"{source}: {what} ") and " after" in line for line in lines)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    fit = next(line for line in lines if "nats per token on validation text" in line)
    for name in ("harmonized", "plain mean"):
        assert f"{name} {metrics['fit']['loss'][name]:.3f}" in fit
    assert metrics["fit"]["chosen"] in fit.rpartition(";")[2]
    assert "compared layer 2 of 2" in err
    built = parsed(symphony, "build", recipe, "--out", tmp_path / "again", *more)
    assert built["fit"] == metrics["fit"] and built["alignment"] == metrics["alignment"]


def test_a_fit_that_the_recipe_contradicts_is_named(
    project: Path, tmp_path: Path, symphony: Symphony
) -> None:
    more = ["--set", "method=harmonized", "--set", "experts.init=copy"]
    for command in (["plan"], ["build", "--out", tmp_path / "out"]):
        message = symphony.refused(command[0], project / "recipe.yaml", *command[1:], *more)
        assert "experts.init copy keeps the anchor's alone" in message
    assert not (tmp_path / "out").exists()


def test_logs_go_to_stderr_and_to_the_run(
    project: Path, tmp_path: Path, symphony: Symphony
) -> None:
    _, out, err = symphony("build", project / "recipe.yaml", "--out", tmp_path / "out")
    assert "layer 2 of 2" in err and "layer 2 of 2" not in out
    assert "layer 2 of 2" in (tmp_path / "out" / "run.log").read_text()


def test_the_same_recipe_text_from_anywhere(
    project: Path, symphony: Symphony, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert symphony("plan", "../project/recipe.yaml")[0] == 0


# The process


def command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    program = "import sys; from symphony_moe.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, **options
    )


def test_help_answers_at_once() -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = command("--help")
        times.append(time.perf_counter() - start)
        assert done.returncode == 0 and "build" in done.stdout and done.stderr == ""
    assert min(times) < 1.0, "a second is what is promised"


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from symphony_moe.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(sorted({name.split('.')[0] for name in sys.modules}))"
    )
    for arguments in (
        ["--help"],
        ["build", "--help"],
        ["--version"],
        ["nonsense"],
        ["--show-completion"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True
        )
        loaded = done.stdout.splitlines()[-1]
        for heavy in ("torch", "transformers", "datasets", "numpy", "pydantic", "huggingface_hub"):
            assert f"'{heavy}'" not in loaded


SHELLS: dict[str, Callable[[str], dict[str, str]]] = {
    "bash": lambda line: {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)},
    "zsh": lambda line: {"_TYPER_COMPLETE_ARGS": line},
    "fish": lambda line: {
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    },
}
"""Shell -> how it tells a program the command line that is to be completed."""


@pytest.mark.parametrize("shell", SHELLS)
def test_a_command_line_is_completed(
    shell: str, symphony: Symphony, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands and options; names of files are the shell's own business."""

    def completed(line: str) -> str:
        monkeypatch.setenv("_SYMPHONY_COMPLETE", f"complete_{shell}")
        for name, value in SHELLS[shell](line).items():
            monkeypatch.setenv(name, value)
        code, out, err = symphony()
        assert (code, err) == (0, "")
        return out

    assert set(re.findall(r"[a-z]+", completed("symphony bui"))) >= {"build"}
    every = completed("symphony ")
    assert all(re.search(rf"\b{name}\b", every) for name in cli.command_names())
    assert "--resume" in completed("symphony build --re")
    assert completed("symphony plan reci").strip() in ("", "_files")


def test_fish_is_told_to_complete_names_of_files(
    symphony: Symphony, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the exit code."""
    for line, code in (("symphony plan reci", 1), ("symphony build --re", 0)):
        monkeypatch.setenv("_SYMPHONY_COMPLETE", "complete_fish")
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "is-args")
        assert symphony()[0] == code


def test_bash_completes_with_the_script_that_is_shown(tmp_path: Path) -> None:
    program = tmp_path / "symphony"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m symphony_moe "$@"\n')
    program.chmod(0o755)
    script = (
        'eval "$(symphony --show-completion)"; COMP_WORDS=(symphony ver); COMP_CWORD=1; '
        '_symphony_completion symphony; echo "${COMPREPLY[@]}"'
    )
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env=os.environ | {"PATH": path}
    )
    assert (done.stdout, done.stderr) == ("verify\n", "")


def test_version_and_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "symphony_moe", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, symphony_moe.__version__)


def test_a_process_ends_with_the_code_and_without_a_traceback(tmp_path: Path) -> None:
    """Nothing between us and the shell, threads and exit handlers included, adds to the message."""
    done = command("plan", "nowhere.yaml", cwd=tmp_path, env=os.environ | {"PYTHONWARNINGS": ""})
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "symphony: error: nowhere.yaml: no such recipe file\n"


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_error(project: Path) -> None:
    program = f"{sys.executable} -m symphony_moe plan {project}/recipe.yaml --json | true"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {program}"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_error_however_little_is_said(project: Path) -> None:
    for words in ("--help", "plan --help", "--version", f"plan {project}/recipe.yaml"):
        program = f"{sys.executable} -m symphony_moe {words} | (exec 0<&-; sleep 0.5)"
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {program}"], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, ""), words


# In a terminal


def in_a_terminal(
    words: Sequence[str], columns: int = 60, environment: Mapping[str, str] | None = None
) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command that writes to terminals."""
    ends = [pty.openpty() for _ in range(2)]
    for _, written in ends:
        fcntl.ioctl(written, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        termios.tcsetattr(written, termios.TCSANOW, _without_carriage_returns(written))
    inherited = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")}
    process = subprocess.Popen(
        [sys.executable, "-m", "symphony_moe", *words],
        stdout=ends[0][1],
        stderr=ends[1][1],
        env=inherited | {"TERM": "xterm-256color"} | dict(environment or {}),
    )
    texts = [b"", b""]
    with ThreadPoolExecutor() as pool:
        readers = [pool.submit(_read_all, end) for end, _ in ends]
        code = process.wait()
        for _, written in ends:
            os.close(written)
        texts = [reader.result() for reader in readers]
    return code, texts[0].decode(), texts[1].decode()


def _without_carriage_returns(terminal: int) -> list[Any]:
    attributes = termios.tcgetattr(terminal)
    attributes[1] &= ~termios.OPOST
    return attributes


def _read_all(end: int) -> bytes:
    text = b""
    with suppress(OSError):  # Linux says that the other end is closed
        while part := os.read(end, 65536):
            text += part
    os.close(end)
    return text


@pytest.mark.slow
def test_a_person_sees_a_bar_and_whole_lines(project: Path, tmp_path: Path) -> None:
    """The terminal breaks long lines, not we: what is copied from it is whole."""
    out = tmp_path / ("a-rather-long-name-" * 4) / "run"
    words = ["run", str(project / "recipe.yaml"), "--out", str(out)]
    code, stdout, stderr = in_a_terminal(words)
    assert code == 0
    for stage in ("build", "train", "evaluate"):
        unit = progress.UNITS[stage]
        assert re.search(rf"{stage} .*\d+ of \d+ {unit}", stderr), stage
    assert re.search(r"steps, \S+ (s each|a second), [\d,]+ tokens a second", stderr)
    assert "I layer " not in stderr  # the bar says it
    assert f"I built {out}/checkpoint\n" in stderr
    assert "\x1b[?25l" not in stderr, "a killed command would leave the cursor hidden"
    assert f"\nmodel:  {out}/trained\n" in stdout
    assert stdout.startswith("\x1b[1mnats per token")

    again = ["evaluate", str(out), "--set", "evaluation.tokens=64"]
    for more, environment in (([], {"NO_COLOR": "1"}), ([], {"TERM": "dumb"}), (["-v"], {})):
        code, stdout, stderr = in_a_terminal([*again, *more], environment=environment)
        assert code == 0 and "evaluated built" in stderr
        assert "\x1b" not in stderr and "2/5" not in stderr
        assert ("\x1b" in stdout) == bool(more)


@pytest.mark.slow
def test_help_is_drawn_for_people_and_plain_for_programs() -> None:
    """Every command's; no word is cut in either."""
    for name in cli.command_names():
        drawn = in_a_terminal([name, "--help"], 80)[1]
        plain = in_a_terminal([name, "--help"], 80, {"NO_COLOR": "1"})[1]
        assert "\x1b[" in drawn and "\u256d" in drawn
        assert "\x1b" not in plain and plain.isascii()
        drawn = re.sub(r"\x1b\[[0-9;]*m", "", drawn)
        options = set(re.findall(r"--[a-z-]+", plain))
        assert {"--json", "--verbose", "--help"} <= options
        assert options == set(re.findall(r"--[a-z-]+", drawn))
        assert "completion" not in plain
    assert in_a_terminal(["--help"], 80, {"PYTHONIOENCODING": "ascii"})[1].isascii()
    assert "--confirm-run-unsafe-code" in in_a_terminal(["evaluate", "--help"], 40)[1]


def test_losses_that_are_no_numbers_are_json_and_a_table(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A diverged model is null for programs and nan for people."""
    metrics = {"sources": {"a": {"a": 1.0, "x": float("nan")}}, "built": {"a": None, "x": 2.0}}
    print(cli._json(metrics))
    assert json.loads(capsys.readouterr().out)["sources"]["a"] == {"a": 1.0, "x": None}
    rows = console.losses_as_table(metrics).splitlines()
    assert rows[1].split() == ["a", "1.000", "nan", "1.000", "nan"]
    assert rows[2].split() == ["built", "nan", "2.000", "nan", "2.000"]


def test_what_a_run_loses_is_set_beside_its_sources() -> None:
    """Each on its own text is the limit; of one source alone, the best for all of it."""
    metrics = {
        "sources": {"a": {"a": 1.0, "b": 4.0, "x": 2.0}, "b": {"a": 9.0, "b": 2.0, "x": 3.0}},
        "built": {"a": 1.5, "b": 2.5, "x": 2.5},
        "trained": {"a": 1.25, "b": 2.25, "x": 1.75},
    }
    head, *rows, out = console.standing_as_table(metrics).splitlines()
    assert head.split()[-4:] == ["nats", "per", "token", "difference"]
    assert [row.rsplit(maxsplit=2)[-2:] for row in rows[1:]] == [
        ["2.000", "+0.500"],
        ["1.750", "+0.250"],
        ["2.500", "+1.000"],
    ]
    assert rows[0].split() == ["each", "source", "on", "its", "own", "text", "1.500"]
    assert rows[3].startswith("the best source alone, a ")
    assert out == "out of domain: built 2.500; trained 1.750; the best source alone, a, 2.000"
    nothing: dict[str, Any] = {
        "sources": {"a": {"a": None, "b": None}, "b": {"a": 1.0, "b": 2.0}},
        "built": {"a": 1.0, "b": None},
    }
    assert "the best source alone, b" in console.standing_as_table(nothing)  # NaN is never best


def test_each_command_says_the_next_one(project: Path, tmp_path: Path, symphony: Symphony) -> None:
    """From the plan to the report, by what stands after `next:` alone."""
    words, done = ["plan", str(project / "recipe.yaml"), "--set", "train.learning_rate=1e-3"], []
    words += ["--memory", "1.5 gb"]
    while words[0] != "push":
        code, out, err = symphony(*words)
        assert code == 0, err
        done.append(words[0])
        words = shlex.split(out.strip().splitlines()[-1].removeprefix("next: symphony "))
        words = [str(tmp_path / "the run") if word == "run" else word for word in words]
        if words[0] == "build":
            assert words[-4:] == ["--set", "train.learning_rate=1e-3", "--memory", "1.5 gb"]
    assert done == ["plan", "build", "verify", "train", "evaluate", "report"]
    assert words[1:] == [str(tmp_path / "the run"), "OWNER/NAME"]
    # And from wherever else a run is.
    run = RunFolder(tmp_path / "the run")
    for gone, then in (("report", "report"), ("metrics", "evaluate"), ("trained", "train")):
        if gone == "metrics":
            kept = run.read_json(run.metrics)
            run.metrics.write_text(json.dumps({k: kept[k] for k in kept if k != "trained"}))
        else:
            path = getattr(run, gone)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        _, out, _ = symphony("verify", run.root)
        assert out.strip().splitlines()[-1].startswith(f"next: symphony {then} ")


def test_a_training_tells_its_losses_and_few_lines_of_steps(
    project: Path, tmp_path: Path, symphony: Symphony
) -> None:
    """At its end; and where nobody looks, the last step's line alone, as it took no 30 seconds."""
    assert symphony("build", project / "recipe.yaml", "--out", tmp_path / "run")[0] == 0
    _, out, err = symphony("train", tmp_path / "run")
    first = re.search(r"; training loss (\d\.\d{3}) at first, (\d\.\d{3}) at last\n", out)
    lines = [line for line in err.splitlines() if re.match(r"I step \d+ of \d+, loss", line)]
    assert first is not None and len(lines) == 1 and lines[0].endswith(f"loss {first[2]}")


def test_lines_of_steps_are_few_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in 30 seconds and the last one of a stage, with how fast it goes; all other lines."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    few, every = console.log_handler(every_step=False), console.log_handler(every_step=True)
    shown: dict[bool, list[str]] = {True: [], False: []}

    def say(words: str, step: progress.Progress | None = None) -> None:
        record = logging.LogRecord("symphony_moe", logging.INFO, "", 0, words, (), None)
        if step is not None:
            record.progress = step
        for handler in (few, every):
            if handler.filter(record):
                shown[handler is every].append(handler.format(record))

    for layer in range(1, 9):
        clock[0] += 11.0
        say(f"layer {layer}", progress.Progress("build", layer, 8))
    say("built")
    assert [line.partition(";")[0] for line in shown[True]] == [
        *(f"I layer {layer}" for layer in range(1, 9)),
        "I built",
    ]
    assert shown[False] == [
        "I layer 3",  # the first that it hears of: nothing to measure by
        "I layer 6; 11.0 s each, 22 s left",
        "I layer 8; 11.0 s each",
        "I built",
    ]


def test_a_pace_counts_from_where_it_began_and_counts_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    pace = progress.Pace()
    assert pace.after(progress.Progress("train", 50, 100, 2048)) == ""
    clock[0] += 5.0
    found = pace.after(progress.Progress("train", 60, 100, 2048))
    assert found == "2.0 a second, 4,096 tokens a second, 20 s left"
    clock[0] += 7200.0
    assert pace.after(progress.Progress("train", 61, 100, 2048)).endswith(" h left")
    # The next stage, and then a second run of the same command.
    for step in (progress.Progress("evaluate", 2, 2), progress.Progress("train", 1, 100)):
        clock[0] += 100.0
        assert pace.after(step) == ""
    clock[0] += 3.0
    assert pace.after(progress.Progress("train", 3, 100)) == "1.5 s each, 2 min left"


@pytest.mark.slow
def test_the_demo_shows_both_methods_and_goes_on_where_it_was_cut_short(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`symphony demo`, on less text: two run folders, one table, a prompt to try."""
    out = tmp_path / "demo"
    small = [
        "calibration.tokens=8192",
        "fit.epochs=0.25",
        "train.tokens=4096",
        "evaluation.tokens=2048",
    ]
    sets = [word for setting in small for word in ("--set", setting)]
    assert main(["demo", "--out", str(out), *sets]) == 0
    shown = capsys.readouterr().out
    for row in ("built", "trained", "paper's, built", "paper's, trained"):
        assert any(line.strip().startswith(row) for line in shown.splitlines()), row
    assert f"report: {out / 'report.html'}" in shown and "pipeline('text-generation'" in shown
    ours, paper = RunFolder(out), RunFolder(tmp_path / "demo-paper")
    assert ours.read_recipe().method == "harmonized" and paper.read_recipe().method == "symphony"
    assert ours.report.is_file() and paper.trained.is_dir()

    assert main(["demo", "--out", str(out), *sets]) == 2
    assert "exists" in capsys.readouterr().err
    # Cut short before the paper's began: that one is made, ours is kept.
    made = ours.trained.stat().st_mtime_ns
    shutil.rmtree(paper.root)
    assert main(["demo", "--out", str(out), "--resume", "--json", *sets]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["paper"]) == {"built", "trained", "paths"}
    assert len(result["continuations"]) == 3
    assert ours.trained.stat().st_mtime_ns == made and paper.trained.is_dir()


@pytest.mark.parametrize(
    ("visible", "name", "left"),
    [
        (None, "cpu", ""),
        ("0,1", "cpu", ""),
        (None, "cuda:2", "2"),
        ("3,5", "cuda:1", "5"),
        ("3,5", "cuda:2", ""),
        ("3,5", "cuda", "3,5"),
    ],
)
def test_the_device_is_the_only_one_that_is_seen(
    visible: str | None, name: str, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its number among those that may be seen; one that is not there is refused."""
    # Set first in any case, so that it is put back as it was.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    there = left != ""
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    if there or name == "cpu":
        use_device(name)
    else:
        with pytest.raises(RecipeError, match=r"^--device cuda:2: torch finds no such GPU here"):
            use_device(name)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CPU", "cpu:0"])
def test_a_device_of_another_name_is_a_mistyped_command(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "run", "--device", name])
    assert ended.value.code == 2
    assert f"expected cpu, cuda or cuda:N, got '{name}'" in capsys.readouterr().err
