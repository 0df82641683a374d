"""The shape of the house: stages know nothing of each other, every recipe that is shipped loads,
and the README tells of what is there."""

import ast
import importlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

import symphony_moe
from checks import mostly_slow
from symphony_moe import cli, pipeline
from symphony_moe.building.least_squares import LeastSquares, Solution
from symphony_moe.bundled import demo_recipe
from symphony_moe.files import sha256_of
from symphony_moe.model.layer import route
from symphony_moe.recipe.load import load_recipe, resolve_recipe
from symphony_moe.recipe.settings import BUNDLED, Recipe
from symphony_moe.recipe.variants import load_variants
from symphony_moe.recipe.yaml_text import read_yaml

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "symphony_moe"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}
README = (ROOT / "README.md").read_text(encoding="utf-8")

ORDER = [
    *("errors", "machine", "processes", "progress", "files"),
    *("bundled", "recipe", "runs", "model", "text", "sources"),
    *("building", "training", "evaluation", "reporting"),
    *(
        "training_cost",
        "uploading",
        "pipeline",
        "comparison",
        "doctor",
        "console",
        "cli",
        "__main__",
    ),
]
"""Folders and modules at the top, each of which knows those before it alone."""

STAGES = {"sweep", "align", "fuse", "fit_layer", "fit_head", "companions", "verify"}


def imports(module: str, *, top_level: bool = False) -> set[str]:
    """Modules of this package that a module imports, anywhere or at its top level."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))

    def nodes(parent: ast.AST) -> Iterator[ast.AST]:
        for node in ast.iter_child_nodes(parent):
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            types_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if top_level and (function or types_only):
                continue
            yield node
            yield from nodes(node)

    found: set[str] = set()
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            # `from symphony_moe import pipeline` imports a module too.
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            assert not isinstance(node, ast.ImportFrom), f"{module}: a relative import"
            continue
        inside = {name.removeprefix("symphony_moe.") for name in names if "symphony_moe." in name}
        found |= inside & MODULES.keys()
    return found - {module}


def test_the_modules_are_found() -> None:
    assert {"cli", "pipeline", "bundled", "bundled.corpus"} <= MODULES.keys()
    assert {f"building.{stage}" for stage in STAGES} <= MODULES.keys()
    assert {"sources.opening", "building.plan", "text.texts"} <= imports("pipeline")
    assert "pipeline" in imports("cli")


def folder_of(module: str) -> str:
    return module.partition(".")[0]


def test_the_order_names_every_folder() -> None:
    assert {folder_of(module) for module in MODULES} == set(ORDER)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_knows_only_what_comes_before_it(module: str) -> None:
    """Of other folders than its own, and wherever in the module it imports them."""
    place = ORDER.index(folder_of(module))
    later = {other for other in imports(module) if ORDER.index(folder_of(other)) > place}
    assert not later


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_stages_do_not_import_one_another(stage: str) -> None:
    found = {other.removeprefix("building.") for other in imports(f"building.{stage}")}
    assert not found & STAGES


@pytest.mark.parametrize("folder", ["building", "training", "evaluation", "reporting"])
def test_what_a_command_does_knows_no_other_command(folder: str) -> None:
    """Each can be read without the others; a module at the top calls them in turn."""
    others = {"building", "training", "evaluation", "reporting"} - {folder}
    for module in MODULES:
        if folder_of(module) == folder:
            assert not {folder_of(other) for other in imports(module)} & others, module


def test_only_the_command_knows_the_main_path() -> None:
    assert {module for module in MODULES if "pipeline" in imports(module)} == {"cli", "comparison"}
    assert {module for module in MODULES if "cli" in imports(module)} == {"__main__"}


def test_no_public_name_stands_for_two_things() -> None:
    """But the functions of the public API, which the command has by the same names."""
    homes: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, set()).add(module)
    twice = {name: modules for name, modules in homes.items() if len(modules - {"cli"}) > 1}
    assert not twice


def test_a_private_function_has_five_parameters_at_most() -> None:
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("_"):
                taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                named = [argument for argument in taken if argument.arg not in ("self", "cls")]
                special = node.name.startswith("__")  # a class has as many parts as it has
                assert special or len(named) <= 5, f"{module}.{node.name}"


def test_imports_have_a_direction() -> None:
    graph = {module: imports(module, top_level=True) for module in MODULES}
    while graph:
        free = {module for module, others in graph.items() if not others & graph.keys()}
        assert free, f"these import each other in a circle: {sorted(graph)}"
        for module in free:
            del graph[module]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_can_be_imported_and_says_what_it_is(module: str) -> None:
    if module == "__main__":  # importing it runs the command
        tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
        assert ast.get_docstring(tree)
        return
    assert importlib.import_module(f"symphony_moe.{module}").__doc__


RECIPES = [*sorted((ROOT / "recipes").glob("*.yaml")), demo_recipe()]


@pytest.mark.parametrize("path", mostly_slow(RECIPES, *RECIPES[::3]), ids=lambda path: path.name)
def test_every_recipe_that_is_shipped_loads(path: Path) -> None:
    recipe = load_recipe(path)
    assert len(recipe.sources) >= 2
    # What the package brings along can be planned without anything else.
    if all(spec.model.startswith(BUNDLED) for spec in recipe.sources.values()):
        assert pipeline.plan(recipe).architecture
        for of_seeds in load_variants(path)[1].values():
            assert pipeline.plan(next(iter(of_seeds.values()))).architecture
    if "compare" in recipe.model_fields_set:
        assert list(load_variants(path)[1]) == recipe.compare.methods


# README


def test_the_readmes_recipes_load(tmp_path: Path) -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        resolve_recipe(read_yaml(block), tmp_path, "README.md")


def test_the_tree_of_contributing_is_what_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = re.search(r"^src/symphony_moe/.*\n((?:[├└│].*\n)+)", text, re.MULTILINE)
    assert tree, "CONTRIBUTING.md has no file tree of src/symphony_moe/"
    named = {line.split()[1] for line in tree[1].splitlines()}
    there = {f"{path.name}/" for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert named == there


def test_the_readmes_commands_are_those_there_are() -> None:
    code = re.findall(r"^(?: {4}|\t).*$", README, re.MULTILINE)
    code += re.findall(r"^```\w*\n.*?^```", README, re.MULTILINE | re.DOTALL)
    code += re.findall(r"`[^`\n]+`", README)
    named = set(re.findall(r"(?<![\w/-])symphony +([a-z]+)", "\n".join(code)))
    there = set(cli.command_names())
    assert named - there == set(), "named in README.md, but not there"
    assert there - named == set(), "there, but not in README.md"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/**/*.md"])
def test_links_lead_somewhere(name: str) -> None:
    for page in ROOT.glob(name):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = target.partition("#")
            linked = page.parent / file if file else page
            assert linked.exists(), f"{page.name}: {target}"
            if anchor:
                titles = re.findall(r"^#+ +(.*)$", linked.read_text("utf-8"), re.MULTILINE)
                # As GitHub makes anchors of titles.
                anchors = {re.sub(r"[^\w\- ]", "", t).lower().replace(" ", "-") for t in titles}
                assert anchor in anchors, f"{page.name}: {target}"


def test_the_files_that_contributing_names_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w./-]+\.(?:py|j2|md|yaml|txt))`", text))
    assert len(named) > 10
    places = [ROOT, PACKAGE, PACKAGE / "evaluation"]
    gone = [name for name in named if not any((place / name).exists() for place in places)]
    assert gone == []


def test_one_version() -> None:
    """It stands in the package, and the build reads it there."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = settings["project"]
    assert project["dynamic"] == ["version"] and "version" not in project
    place = ROOT / settings["tool"]["hatch"]["version"]["path"]
    (stated,) = re.findall(r'^__version__ = "(.+)"$', place.read_text("utf-8"), re.MULTILINE)
    assert stated == symphony_moe.__version__
    assert project["scripts"] == {"symphony": "symphony_moe.cli:main"}


def test_the_image_is_made_of_what_is_there() -> None:
    """Files that are copied into it are sent to the builder, and extras are the package's."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    sent = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = [
        word for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for word in line.split()
    ]
    assert {"pyproject.toml", "constraints.txt", "src"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists() and f"!{name}" in sent, name
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (extras,) = re.findall(r"'\.\[(.*)\]'", text)
    assert set(extras.split(",")) <= set(settings["project"]["optional-dependencies"])


def test_the_paper_map_names_code_that_is_there() -> None:
    text = (ROOT / "docs" / "paper-map.md").read_text(encoding="utf-8")
    rows = [line.split("|")[2] for line in text.splitlines() if line.startswith("|")]
    named = [name for row in rows for name in re.findall(r"`([a-z_]+)\.([A-Za-z_]+)`", row)]
    assert len(named) > 15
    for module, name in named:
        homes = [known for known in MODULES if known.rpartition(".")[2] == module]
        found = [importlib.import_module(f"symphony_moe.{home}") for home in homes]
        settings = module in Recipe.model_fields  # a setting, and no code
        assert settings or any(hasattr(one, name) for one in found), f"{module}.{name}"


def test_contributing_names_files_that_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.partition("## Ten changes")[2].partition("\n## ")[0]
    named = re.findall(r"`((?:[a-z_]+/)+[a-z_0-9]*(?:\.[a-z0-9.]+)?|[a-z]+\.py)`", table)
    assert len(named) >= 20 and table.count("\n| a") >= 10
    for name in named:
        assert (PACKAGE / name).exists() or (ROOT / name).exists(), name


def test_shapes_are_checked_wherever_they_are_stated() -> None:
    """By the tests' import hook: in functions, methods and data classes, and nowhere else."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (option,) = (o for o in settings["tool"]["pytest"]["ini_options"]["addopts"] if "jaxtyp" in o)
    assert option.partition("=")[2].split(",") == ["symphony_moe", "beartype.beartype"]
    flat, square = torch.ones(4), torch.ones(4, 4)
    with pytest.raises(TypeCheckError):
        route(flat, square, 2)
    with pytest.raises(TypeCheckError):
        LeastSquares(4, 4, device=torch.device("cpu")).update(flat, square)
    with pytest.raises(TypeCheckError):
        Solution(flat, None, 1.0, 1.0)
    route(square, square, 2)
    assert not hasattr(sha256_of, "__wrapped__")
