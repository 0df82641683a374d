"""`from symphony_moe import build, ...`: the functions of the commands, for programs."""

import ast
import contextlib
import doctest
import inspect
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import symphony_moe
from conftest import make_recipe
from symphony_moe import Progress, RunFolder, SymphonyError, load_recipe, pipeline
from symphony_moe.errors import RecipeError, RunFolderError
from symphony_moe.machine import process_number

PACKAGE = Path(symphony_moe.__file__).parent
FUNCTIONS = [
    *("load_recipe", "plan", "build", "verify", "train", "evaluate", "report"),
    *("add", "remove", "replace", "push", "run", "load_variants", "compare"),
]
"""In an order in which each finds what it needs."""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small `recipe.yaml` to work in."""
    recipe = make_recipe(
        tmp_path / "project",
        count=2,
        calibration={"tokens": 256},
        train={"tokens": 512, "batch_size": 2},
        evaluation={"tokens": 128},
    )
    monkeypatch.chdir(recipe.parent)
    return recipe.parent


# Names


def test_the_public_names_are_there() -> None:
    asked = "Recipe load_recipe plan build verify train evaluate report push compare run RunFolder"
    assert {*asked.split(), "Progress", "SymphonyError", "__version__"} <= {*symphony_moe.__all__}
    for name in symphony_moe.__all__:
        assert getattr(symphony_moe, name) is not None
        assert name in dir(symphony_moe)
    assert symphony_moe.build is pipeline.build
    with pytest.raises(AttributeError, match=r"'symphony_moe' has no attribute 'biuld'"):
        symphony_moe.biuld  # type: ignore[attr-defined]  # noqa: B018


def test_type_checkers_and_the_interpreter_find_the_same_names() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    typed = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {
        alias.name: str(node.module)
        for node in typed.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    found = {
        name: f"symphony_moe.{module}"
        for module, names in symphony_moe._MODULES.items()
        for name in names
    }
    assert imported == found
    assert {*imported, "__version__"} == set(symphony_moe.__all__)


def test_everything_public_says_what_it_takes_and_gives() -> None:
    assert (PACKAGE / "py.typed").is_file()
    for name in FUNCTIONS:
        signature = inspect.signature(getattr(symphony_moe, name))
        assert signature.return_annotation is not inspect.Signature.empty, name
        for parameter in signature.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, f"{name}: {parameter.name}"


@pytest.mark.slow
def test_a_type_checker_sees_the_names(tmp_path: Path) -> None:
    """In a program of somebody else's: what is misspelled is found, what is right is not `Any`."""
    program = tmp_path / "program.py"
    program.write_text(
        "from symphony_moe import build, load_recipe\n"
        'run = build(load_recipe("recipe.yaml"), "run")\n'
        "reveal_type(run.checkpoint)\n"
        'build("recipe.yaml", "run")\n'
    )
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", str(program)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"MYPYPATH": str(PACKAGE.parent), "PATH": ""},
    )
    ours = [line for line in checked.stdout.splitlines() if line.startswith("program.py")]
    assert len(ours) == 2, checked.stdout + checked.stderr
    assert "pathlib.Path" in ours[0]
    assert "[arg-type]" in ours[1] and '"build"' in ours[1]


# Imports


def modules_after(program: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport sys\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_importing_the_package_imports_nothing_else() -> None:
    loaded = modules_after("import symphony_moe; dir(symphony_moe)")
    assert {name for name in loaded if name.startswith("symphony_moe")} == {"symphony_moe"}
    assert not loaded & {"torch", "transformers", "pydantic", "typer", "rich", "numpy"}


def test_a_recipe_is_read_without_torch() -> None:
    loaded = modules_after("from symphony_moe import Recipe, SymphonyError, load_recipe, Progress")
    assert "pydantic" in loaded
    assert not loaded & {"torch", "transformers", "typer"}


# Examples


@pytest.mark.slow
def test_every_example_runs(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One after the other, in a folder with a recipe.yaml. Nothing but what they print is printed,
    by them or by the processes that they start."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own
    output = []
    for name in FUNCTIONS:
        documented = inspect.getdoc(getattr(symphony_moe, name)) or ""
        assert "Error" in documented, f"{name} says nothing of what it raises"
        example = doctest.DocTestParser().get_doctest(documented, {}, name, None, None)
        assert example.examples, name
        runner = doctest.DocTestRunner(verbose=False)
        runner.run(example, out=lambda text: output.append(text))
        assert runner.summarize(verbose=False).failed == 0, "".join(output)
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if not _is_of_a_library(line)]
    assert (out, lines) == ("", [])
    assert (project / "table" / "comparison.html").is_file()


def _is_of_a_library(line: str) -> bool:
    """Progress bars and notices of transformers and torch, which a program may switch off."""
    return "it/s]" in line or "Warning" in line or not line.strip()


# Progress


@pytest.fixture
def finished(built: Callable[[str], RunFolder], tmp_path: Path) -> RunFolder:
    shutil.copytree(built("llama").root, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def test_every_step_is_told_in_order(project: Path) -> None:
    steps: list[Progress] = []
    folder = symphony_moe.run(load_recipe("recipe.yaml"), "run", progress=steps.append)
    by_stage: dict[str, list[Progress]] = {}
    for step in steps:
        by_stage.setdefault(step.stage, []).append(step)
    assert list(by_stage) == ["align", "build", "train", "evaluate"]
    assert steps == [step for of_stage in by_stage.values() for step in of_stage]
    trained = json.loads(folder.metrics.read_text())["training"]["steps"]
    totals = {"align": 2, "build": 2, "train": trained, "evaluate": 2 + 2}
    for stage, total in totals.items():
        told = [(step.done, step.total) for step in by_stage[stage]]
        assert told == [(done, total) for done in range(1, total + 1)]


@pytest.mark.slow
def test_a_comparison_tells_of_every_run(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from symphony_moe import cli, comparison

    def here(command: list[str], **_: Any) -> Any:
        return subprocess.CompletedProcess(command, cli.main(command[3:]))

    monkeypatch.setattr(comparison.subprocess, "run", here)
    recipe, variants = symphony_moe.load_variants("recipe.yaml", methods=["btx"], seeds=[1, 2])
    steps: list[Progress] = []
    compared = symphony_moe.compare(recipe, variants, "table", progress=steps.append)
    assert steps == [Progress("compare", 1, 2), Progress("compare", 2, 2)]
    assert compared.folder.comparison.is_file() and len(compared.entries) == 4
    assert set(compared.limits) == {"in domain", "out of domain"}


class _Enough(Exception):
    pass


@pytest.mark.parametrize("stage", ["align", "build", "train", "evaluate"])
def test_what_a_listener_raises_ends_the_work(
    stage: str, finished: RunFolder, tmp_path: Path
) -> None:
    def stop(step: Progress) -> None:
        if step.stage == stage:
            raise _Enough
        assert (step.stage, stage) == ("align", "build")

    with pytest.raises(_Enough):
        if stage in ("align", "build"):
            pipeline.build(load_recipe(finished.recipe), tmp_path / "again", progress=stop)
        elif stage == "train":
            pipeline.train(finished, progress=stop)
        else:
            pipeline.evaluate(finished, progress=stop)
    assert not (tmp_path / "again" / "checkpoint").exists() and not finished.trained.exists()


# Mistakes and the log


def test_a_mistake_is_an_exception_and_ends_no_program(project: Path, tmp_path: Path) -> None:
    recipe = load_recipe("recipe.yaml")
    nothing = RunFolder(tmp_path / "nothing")
    variants: Any = {"btx": {1: recipe}}
    (project / "table").write_text("")
    mistakes: list[tuple[type[SymphonyError], Callable[[], object]]] = [
        (RecipeError, lambda: load_recipe("nowhere.yaml")),
        (RecipeError, lambda: load_recipe("recipe.yaml", ["trian.tokens=1"])),
        (RecipeError, lambda: symphony_moe.load_variants("recipe.yaml", methods=["nothing"])),
        (SymphonyError, lambda: symphony_moe.build(recipe, project)),
        (SymphonyError, lambda: symphony_moe.run(recipe, project)),
        (RunFolderError, lambda: symphony_moe.verify(nothing)),
        (RunFolderError, lambda: symphony_moe.train(nothing)),
        (RunFolderError, lambda: symphony_moe.evaluate(nothing)),
        (RunFolderError, lambda: symphony_moe.report(nothing)),
        (RunFolderError, lambda: symphony_moe.compare(recipe, variants, "table")),
    ]
    for kind, mistake in mistakes:
        with pytest.raises(kind):
            mistake()
    shutil.rmtree(project / "models" / "b")
    (project / "models" / "b").mkdir()
    with pytest.raises(SymphonyError, match=r"config\.json"):
        symphony_moe.plan(recipe)


@contextlib.contextmanager
def unchanged_logging() -> Iterator[None]:
    """Inside the block a program's logging may not be changed for longer than a call."""
    loggers = [logging.getLogger(), logging.getLogger("symphony_moe")]

    def state() -> list[Any]:
        return [(one.level, list(one.handlers), one.propagate, one.disabled) for one in loggers]

    before = state()
    yield
    assert state() == before


def test_a_programs_logging_stays_its_own(
    finished: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    with unchanged_logging():
        pipeline.evaluate(finished)
    assert not caplog.records, "quiet, as Python's default is"
    with caplog.at_level(logging.INFO, "symphony_moe"):
        with unchanged_logging():
            pipeline.evaluate(finished)
        with unchanged_logging(), pytest.raises(RecipeError):
            pipeline.evaluate(finished, ["evaluation.holdout=0.9"])
    assert any("evaluated built" in record.message for record in caplog.records)
    assert "evaluated built" in finished.log.read_text(encoding="utf-8")
    assert process_number() == 0
