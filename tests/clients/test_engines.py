"""Every program that is said to read a model gives the answers of stock transformers: built and
trained, with a vocabulary that is a union, of every family.

What is measured is written into docs/engines.json, and the table in README.md and docs/engines.md
is made of it; a claim of `symphony_moe.model.engines` that a program does not keep fails.
"""

import datetime
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from conftest import WORDS
from engine_table import COLUMNS, FILE, write_tables
from environments import ask_script, python, to_gguf
from models import CASES, NEW, keeps, make_run
from servers import Refused, ask_llama_cpp, ask_vllm, last_error
from symphony_moe.model import engines
from symphony_moe.model.engines import readings
from symphony_moe.runs.folder import RunFolder

pytestmark = pytest.mark.client

TOLERANCE = 1e-4
"""Nats, between log-probabilities of a program and of transformers, both in float32: of the 20 most
probable tokens after each prompt, and of each of the 100 that follow."""
TOKENS = 100
SPOKEN = 12
"""Tokens that a client of OpenAI's protocol asks for."""
SPEAK = "alpha beta gamma delta"
AWKWARD = [
    "It's naïve",
    "two  spaces\n\n",
    "日本語 テキスト",
    f"{NEW[0]}",
    f"alpha{NEW[1]}",
    "tabs\t\there",
    "1234567.89 and 😀 é",
    "def f(x):\n    return x",
    "",
]
SPACES = ["  two spaces first", " one space first", f"{NEW[0]} beta", f"alpha{NEW[1]}beta"]
"""Of a SentencePiece tokenizer, llama.cpp cuts spaces at the beginning of a text, and text after a
special token, otherwise than transformers does; a plan says so."""
ASKED = [(case, name) for case in CASES for names in COLUMNS.values() for name in names]
SCRIPT = "ask_transformers.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunFolder]:
    """case -> its finished run, made once. `SYMPHONY_CLIENT_RUNS` names a folder to keep them in,
    so that what was cut short goes on: what is in there is not made again."""
    made: dict[str, RunFolder] = {}
    kept = os.environ.get("SYMPHONY_CLIENT_RUNS")

    def get(case: str) -> RunFolder:
        if case not in made:
            root = tmp_path_factory.mktemp(case) if kept is None else Path(kept) / case
            if not (root / "run" / "trained").is_dir():
                shutil.rmtree(root, ignore_errors=True)
                root.mkdir(parents=True)
                make_run(root, case)
            made[case] = RunFolder(root / "run")
        return made[case]

    return get


def question(folder: Path) -> dict[str, Any]:
    """What is asked about a model: a short, a long and a very long prompt, one with tokens that the
    anchor's vocabulary lacked, and awkward texts for its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [
        SPEAK,
        f"7 kappa {NEW[0]} theta mu {NEW[1]} lambda iota",
        " ".join(WORDS[number * number % len(WORDS)] for number in range(60)),
    ]
    ends = json.loads((folder / "generation_config.json").read_text()).get("eos_token_id")
    return {
        "folder": str(folder),
        "prompts": [tokenizer(text)["input_ids"] for text in texts],
        "tokens": TOKENS,
        "best": 20,
        "texts": AWKWARD + SPACES,
        "speak": SPEAK,
        "spoken_tokens": SPOKEN,
        "ends": ends if isinstance(ends, list) else [] if ends is None else [ends],
    }


STAGES = ("built", "trained")
JUDGED = (
    "model_type",
    "attention_bias",
    "head_dim",
    "hidden_size",
    "num_attention_heads",
    "hidden_act",
    "sliding_window",
    "use_sliding_window",
    "mlp_only_layers",
    "tie_word_embeddings",
    "max_position_embeddings",
    "rope_scaling",
)
"""Settings that `symphony_moe.model.engines` looks at."""


@pytest.fixture(scope="module")
def reference(
    runs: Callable[[str], RunFolder], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[list[Any], list[Any]]]:
    """case -> what is asked of each stage, and what this environment's transformers answers."""
    made: dict[str, tuple[list[Any], list[Any]]] = {}

    def get(case: str) -> tuple[list[Any], list[Any]]:
        if case not in made:
            run = runs(case)
            asked = [question(folder) for folder in (run.checkpoint, run.trained)]
            folder = tmp_path_factory.mktemp("reference")
            made[case] = asked, ask_script(Path(sys.executable), SCRIPT, asked, folder)
        return made[case]

    return get


def ask(name: str, asked: list[Any], folder: Path) -> list[Any]:
    """What the program of an environment answers about each stage; the Refused where it does not
    load it."""
    if name == "vllm":
        return [_or_refusal(ask_vllm, one, folder / "server.log") for one in asked]
    if name == "llama.cpp":
        return [_or_refusal(_ask_gguf, one, folder) for one in asked]
    script = "ask_mlx.py" if name == "mlx" else SCRIPT
    try:
        return list(ask_script(python(name), script, asked, folder))
    except subprocess.CalledProcessError:
        # One of them at least is refused: which?
        return [_or_refusal(_ask_alone, name, script, one, folder) for one in asked]


def _or_refusal(ask_: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return ask_(*arguments)
    except Refused as refusal:
        return refusal
    except subprocess.CalledProcessError as error:
        return Refused(last_error(error.stderr))


def _ask_alone(name: str, script: str, asked: Any, folder: Path) -> Any:
    return ask_script(python(name), script, [asked], folder)[0]


def _ask_gguf(asked: Any, folder: Path) -> Any:
    file = folder / "model.gguf"
    to_gguf(Path(asked["folder"]), file)
    try:
        return ask_llama_cpp(asked | {"file": str(file)}, folder / "server.log")
    finally:
        file.unlink()


def compare(
    theirs: Any, ours: Any, asked: dict[str, Any], *, spaces: bool = False
) -> dict[str, Any]:
    """How far a program's answers are from transformers', and what is wrong with them. `spaces`: it
    is said to cut `SPACES` otherwise, and then it must."""
    nats, same, total = 0.0, 0, 0
    for found, expected in zip(theirs["prompts"], ours["prompts"], strict=True):
        far = [abs(found["best"].get(n, -1e9) - score) for n, score in expected["best"].items()]
        # An end stops a text; programs differ in whether they show it.
        end = next((n for n, t in enumerate(expected["tokens"]) if t in asked["ends"]), None)
        tokens = expected["tokens"][:end]
        first = next(
            (n for n, t in enumerate(tokens) if found["tokens"][n : n + 1] != [t]), len(tokens)
        )
        steps = list(zip(found["steps"][:first], expected["steps"][:first], strict=True))
        nats = max([nats, *far, *(abs(one - other) for one, other in steps if one is not None)])
        same, total = same + first, total + len(tokens)
    texts = sorted(
        {
            text
            for special in ("False", "True")
            for text, cut, expected in zip(
                asked["texts"], theirs["texts"][special], ours["texts"][special], strict=True
            )
            if cut != expected
        }
    )
    spoken = "spoken" not in theirs or _words(theirs["spoken"]) == _words(ours["spoken"])
    exact = nats <= TOLERANCE and same == total and spoken
    exact = exact and texts == (sorted(SPACES) if spaces else [])
    return {
        "verdict": "exact" if exact else "other",
        "warns": bool(theirs.get("unclean")),
        "nats": None if nats > 1e6 else float(f"{nats:.1e}"),
        "tokens": same,
        "of": total,
        "texts cut otherwise": texts,
        "spoken": spoken,
    }


def _words(spoken: str) -> str:
    """A text without spaces around it, and without a character that it ends within: a server may
    leave that out."""
    return spoken.strip().rstrip("\N{REPLACEMENT CHARACTER}")


def note(case: str, name: str, config: Any, entry: dict[str, Any]) -> None:
    """Write what was measured into docs/engines.json and the tables that are made of it."""
    found = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    row = found.setdefault(case, {"programs": {}})
    row |= {
        "architecture": config["model_type"],
        "family": CASES[case].family,
        "config": {key: config[key] for key in JUDGED if key in config},
        "sentencepiece": CASES[case].tokenizer == "sentencepiece",
        "dense": CASES[case].model_type,
        "layout": CASES[case].layout,
    }
    row["programs"][name] = entry
    text = json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False)
    FILE.write_text(text + "\n", encoding="utf-8")
    write_tables()


@pytest.mark.parametrize(("case", "name"), ASKED)
def test_a_program_does_what_is_said_of_it(
    case: str,
    name: str,
    runs: Callable[[str], RunFolder],
    reference: Callable[[str], tuple[list[Any], list[Any]]],
    tmp_path: Path,
) -> None:
    """Exact: 100 greedy tokens of each prompt, log-probabilities, the tokenizer on awkward texts,
    and a text by OpenAI's protocol where there is a server. Otherwise it must fail as is said."""
    program = next(program for program, names in COLUMNS.items() if name in names)
    config = json.loads((runs(case).checkpoint / "config.json").read_text())
    spaces = CASES[case].tokenizer == "sentencepiece"
    about = {"dense": CASES[case].model_type, "layout": CASES[case].layout}
    said = readings(config, sentencepiece=spaces, **about)
    claim = next(reading for reading in said if reading.program == program)
    entry: dict[str, Any] = {"day": datetime.date.today().isoformat()}
    asked, expected = reference(case)
    for stage, question_, found, ours in zip(
        STAGES, asked, ask(name, asked, tmp_path), expected, strict=True
    ):
        assert sum(len(set(one["tokens"])) for one in ours["prompts"]) > 20, "says always the same"
        if isinstance(found, Refused):
            message = str(found).replace(question_["folder"], "run/trained")
            entry[stage] = {"verdict": "refused", "message": message}
        else:
            entry[stage] = compare(found, ours, question_, spaces="otherwise" in claim.why)
    note(case, name, config, entry)
    print(f"\n{case}, {name}: {entry}")
    verdicts = {entry[stage]["verdict"] for stage in STAGES}
    assert keeps(claim, name, verdicts), entry
    if verdicts == {"exact"}:
        assert all(entry[stage]["of"] >= TOKENS for stage in STAGES)
        assert entry["built"]["warns"] == ("warns" in claim.why)


def test_vllm_reads_granitemoe_with_biases_through_transformers(
    reference: Callable[[str], tuple[list[Any], list[Any]]], tmp_path: Path
) -> None:
    """As the note of a plan says."""
    (_, asked), (_, ours) = reference("qwen2-granitemoe")
    found = ask_vllm(asked, tmp_path / "server.log", "--model-impl", "transformers")
    assert compare(found, ours, asked)["verdict"] == "exact"


def test_every_program_is_asked() -> None:
    assert list(COLUMNS) == list(engines.TRIED)
