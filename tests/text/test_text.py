"""One rule says what is held out, one rule says how documents become windows."""

import hashlib
import itertools
import json
import logging
import random
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from checks import mostly_slow
from conftest import COMMON, WORDS, make_text, make_tokenizer
from symphony_moe.errors import TextError
from symphony_moe.recipe.load import resolve_recipe
from symphony_moe.recipe.settings import Fit, HubData, Router
from symphony_moe.runs.folder import RunFolder
from symphony_moe.sources.opening import open_sources
from symphony_moe.text import documents as documents_module
from symphony_moe.text import windows as windows_module
from symphony_moe.text.documents import (
    Documents,
    DocumentStream,
    check_data_exists,
    is_held_out,
    read_documents,
    split_held_out,
    split_validation,
)
from symphony_moe.text.texts import Texts
from symphony_moe.text.windows import Encoder, Packed, WindowDraw

CHAT = [{"role": "user", "content": "alpha?"}, {"role": "assistant", "content": "beta."}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
BOS, EOS = 256, 257


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer with a BOS, and no chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """The same, without a BOS."""
    folder = tmp_path_factory.mktemp("plain")
    make_tokenizer(folder, bos=False)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def chatty(tmp_path: Path) -> PreTrainedTokenizerBase:
    """A tokenizer with a chat template."""
    make_tokenizer(tmp_path / "chatty")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chatty")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def draw_packed(
    who: str, documents: Documents, tokenizer: PreTrainedTokenizerBase, **drawing: Any
) -> Packed:
    return windows_module.draw_packed(who, documents, Encoder.of(tokenizer), WindowDraw(**drawing))


def draw_windows(
    who: str, documents: Documents, tokenizer: PreTrainedTokenizerBase, **drawing: int
) -> torch.Tensor:
    return draw_packed(who, documents, tokenizer, **drawing).windows


def pack_windows(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int
) -> torch.Tensor:
    return windows_module.pack_windows(documents, Encoder.of(tokenizer), length).windows


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ------------------------------------------------------------------------------------- held out


@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(st.text(), min_size=1, max_size=20, unique=True),
    low=st.floats(0.0, 1.0),
    high=st.floats(0.0, 1.0),
)
def test_hold_out_is_a_property_of_the_text_alone(
    texts: list[str], low: float, high: float
) -> None:
    """Neither order nor company nor anything asked before matters; a larger share holds out all
    that a smaller one does."""
    low, high = sorted((low, high))
    once = {text: is_held_out(text, low) for text in texts}
    assert {text: is_held_out(text, low) for text in reversed(texts)} == once
    for text in texts:
        assert is_held_out(text, low) == once[text]
        assert is_held_out(text, high) or not once[text]
        assert not is_held_out(text, 0.0) and is_held_out(text, 1.0)


def test_hold_out_is_the_same_everywhere() -> None:
    """Fixed by SHA-256: hashes computed by another program."""
    # sha256("alpha") = 8ed3f6ad..., sha256("") = e3b0c442..., as fractions of 1: 0.5579, 0.8894
    assert is_held_out("alpha", 0.56) and not is_held_out("alpha", 0.55)
    assert is_held_out("", 0.89) and not is_held_out("", 0.88)
    assert isinstance(is_held_out("a lone surrogate \ud800", 0.5), bool)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_the_held_out_share_is_about_right(share: float) -> None:
    """On 2,000 documents, within four standard deviations."""
    held_out = sum(is_held_out(f"document {number}", share) for number in range(2000))
    assert abs(held_out - 2000 * share) < 4 * (2000 * share * (1 - share)) ** 0.5


# -------------------------------------------------------------------------------------- packing


def test_documents_are_packed_end_to_end_each_between_bos_and_eos(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """The windows, read in a row, are the documents' tokens; the incomplete one is dropped."""
    documents = ["alpha beta", "x", "gamma " * 30, "some bytes: é"]
    stream: list[int] = []
    for document in documents:
        stream += [BOS, *tokenizer(document, add_special_tokens=False)["input_ids"], EOS]
    windows = pack_windows(documents, tokenizer, 16)
    assert windows.shape == (len(stream) // 16, 16) and windows.dtype == torch.int64
    assert len(stream) % 16
    assert windows.flatten().tolist() == stream[: len(stream) // 16 * 16]
    assert stream.count(BOS) == stream.count(EOS) == 4


def test_a_tokenizer_that_adds_no_bos_gets_none(
    plain: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Neither Qwen's, which has none, nor Yi's and SmolLM2's, which have one and do not add it."""
    make_tokenizer(tmp_path, adds_bos=False)
    silent = AutoTokenizer.from_pretrained(tmp_path)
    assert silent.bos_token_id == BOS
    a, b, c, d = plain("abcd")["input_ids"]
    for tokenizer in (plain, silent):
        windows = pack_windows(["ab", "cd"], tokenizer, 3)
        assert windows.tolist() == [[a, b, EOS], [c, d, EOS]]


def test_bos_is_found_in_a_tokenizer_of_few_letters() -> None:
    """One that can spell nothing but capitals."""
    vocabulary = {letter: number for number, letter in enumerate("XYZ")} | {"<s>": 3, "</s>": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 3)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<s>"
    )
    assert Encoder.of(tokenizer).encode("XYZ") == [3, 0, 1, 2, 4]
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 3)])
    silent = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert silent("a", add_special_tokens=False)["input_ids"] == []
    assert Encoder.of(silent).encode("XYZ") == [3, 0, 1, 2, 4]


def test_bos_and_eos_are_not_doubled(tokenizer: PreTrainedTokenizerBase) -> None:
    """Text may have them already."""
    windows = pack_windows(["<s>ab</s>", "cd<s>"], tokenizer, 9)
    a, b, c, d = tokenizer("abcd", add_special_tokens=False)["input_ids"]
    assert windows.tolist() == [[BOS, a, b, EOS, BOS, c, d, BOS, EOS]]


def test_documents_are_begun_by_their_own_tokenizer_in_the_numbers_of_the_union(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """One BOS where a source's is another token than the anchor's, and its own EOS."""
    make_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        # Its BOS says </s>, and its EOS <s>.
        swapped = (tmp_path / name).read_text().replace('"<s>"', '"?"').replace('"</s>"', '"<s>"')
        (tmp_path / name).write_text(swapped.replace('"?"', '"</s>"'))
    other = AutoTokenizer.from_pretrained(tmp_path)
    assert (other.bos_token, other.bos_token_id) == ("</s>", BOS)
    ids = Encoder.of(other, tokenizer).encode("ab")
    assert tokenizer.convert_ids_to_tokens(ids) == ["</s>", "a", "b", "<s>"]


def test_the_first_token_of_a_document_is_never_a_target(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Whether the document begins with the window or within it; everything else is."""
    text = windows_module.pack_windows(["abc", "xyz", "i"], Encoder.of(tokenizer), 4)
    first = text.windows == BOS
    first[:, 0] = True
    assert ((text.labels == -100) == first).all()
    assert (text.labels[~first] == text.windows[~first]).all()
    assert first.sum() == 5  # three documents, two of them within a window; three windows


def test_too_little_text_packs_into_no_window(tokenizer: PreTrainedTokenizerBase) -> None:
    """Zero windows, of the right width."""
    assert pack_windows(["ab"], tokenizer, 8).shape == (0, 8)
    assert pack_windows([], tokenizer, 8).shape == (0, 8)


# -------------------------------------------------------------------------------------- drawing


def one_token_documents(count: int) -> list[str]:
    """Documents of 7 tokens between BOS and EOS, in 9-token windows of their own: no two alike."""
    return [f"{number:07d}" for number in range(count)]


def test_windows_are_drawn_without_repetition(tokenizer: PreTrainedTokenizerBase) -> None:
    """As many whole windows as the tokens asked for, each from another place of the text."""
    windows = draw_windows(
        "w", one_token_documents(300), tokenizer, tokens=9 * 40 + 8, sequence_length=9, seed=1
    )
    assert windows.shape == (40, 9)
    assert len({tuple(window) for window in windows.tolist()}) == 40
    assert (windows[:, 0] == BOS).all()


def test_windows_are_drawn_over_the_whole_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """Not the first documents only, however many more there are than needed."""
    windows = draw_windows(
        "w", one_token_documents(5000), tokenizer, tokens=900, sequence_length=9, seed=0
    )
    numbers = [int(str(tokenizer.decode(window[1:-1]))) for window in windows.tolist()]
    for tenth in range(10):
        assert any(500 * tenth <= number < 500 * (tenth + 1) for number in numbers)


def test_drawing_is_fixed_by_the_seed(tokenizer: PreTrainedTokenizerBase) -> None:
    """Same seed, same windows; another seed, others."""
    documents = one_token_documents(100)

    def draw(seed: int) -> torch.Tensor:
        return draw_windows("w", documents, tokenizer, tokens=180, sequence_length=9, seed=seed)

    assert torch.equal(draw(5), draw(5))
    assert not torch.equal(draw(5), draw(6))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), tokens=st.integers(1, 200), length=st.integers(2, 20))
def test_every_window_is_one_of_the_texts(
    tokenizer: PreTrainedTokenizerBase, seed: int, tokens: int, length: int
) -> None:
    """At least one, no more than asked for; and every token of it comes from the documents."""
    document = "alpha beta " * 20
    windows = draw_windows(
        "w", [document] * 3, tokenizer, tokens=tokens, sequence_length=length, seed=seed
    )
    assert 1 <= len(windows) <= max(1, tokens // length)
    known = {BOS, EOS, *tokenizer(document, add_special_tokens=False)["input_ids"]}
    assert set(windows.flatten().tolist()) <= known


def test_short_text_is_used_as_it_is_with_a_warning(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    """All of it, once, and a sentence that says how much there was."""
    with caplog.at_level(logging.WARNING, "symphony_moe"):
        windows = draw_windows(
            "text of b", one_token_documents(7), tokenizer, tokens=900, sequence_length=9, seed=0
        )
    assert len({tuple(window) for window in windows.tolist()}) == 7 == len(windows)
    assert "text of b: 900 tokens asked for, the text has 63; using those" in caplog.text


def test_enough_text_warns_of_nothing(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where a text is only just as long as asked for."""
    with caplog.at_level(logging.WARNING, "symphony_moe"):
        draw_windows("w", one_token_documents(10), tokenizer, tokens=90, sequence_length=9, seed=0)
    assert not caplog.records


def test_text_shorter_than_a_window_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    """Who, how much there is, and what to do."""
    with pytest.raises(TextError, match=r"text of b: 2 documents do not fill one window of 64"):
        draw_windows("text of b", ["ab", "cd"], tokenizer, tokens=640, sequence_length=64, seed=0)


@pytest.mark.parametrize(
    ("bos", "tokens", "length", "seed", "count", "digest"),
    [
        (True, 64, 16, 0, 4, "79b8a0c43278eeb8"),
        (True, 5000, 128, 7, 39, "896e7e1e2db1351c"),
        (True, 10**6, 33, 114514, 926, "6db60fd318ec6c5e"),
        (False, 64, 16, 0, 4, "9d156f401ac0beb7"),
        (False, 5000, 128, 7, 39, "ae59801aa39cd526"),
        (False, 10**6, 33, 114514, 914, "f36cc7ef1f6d53d8"),
    ],
)
def test_the_windows_are_those_they_have_been_since_documents_end_with_eos(
    bos: bool,
    tokens: int,
    length: int,
    seed: int,
    count: int,
    digest: str,
    tokenizer: PreTrainedTokenizerBase,
    plain: PreTrainedTokenizerBase,
) -> None:
    """Byte for byte, so that a recipe means the same text in every version: recorded hashes."""
    documents = [
        " ".join(WORDS[number * step % 12] for step in range(1, 5 + number % 60)) + f" {number} é"
        for number in range(400)
    ]
    windows = draw_windows(
        "w",
        documents,
        tokenizer if bos else plain,
        tokens=tokens,
        sequence_length=length,
        seed=seed,
    )
    assert windows.shape == (count, length) and windows.dtype == torch.int64
    found = hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()
    assert found[:16] == digest


# ------------------------------------------------------------------------------------ positions


@pytest.mark.parametrize("bos", [True, False])
def test_positions_count_from_the_beginning_of_document_and_window(
    bos: bool, tokenizer: PreTrainedTokenizerBase, plain: PreTrainedTokenizerBase
) -> None:
    """Documents of one letter each, of 1 to 39 tokens: where the letter (or with a BOS, the BOS)
    begins, the position is 0, and everywhere else it is one more than before."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    documents = [letters[number % 26] * (1 + number * 7 % 39) for number in range(26)]
    chosen = tokenizer if bos else plain
    settings = {"tokens": 200, "sequence_length": 16, "seed": 3}
    drawn = draw_packed("w", documents, chosen, **settings)
    assert torch.equal(drawn.windows, draw_windows("w", documents, chosen, **settings))
    assert drawn.positions.dtype == torch.int64
    for window, positions in zip(drawn.windows.tolist(), drawn.positions.tolist(), strict=True):
        expected: list[int] = []
        for place, token in enumerate(window):
            begins = token == BOS if bos else place == 0 or window[place - 1] == EOS
            expected.append(0 if begins or place == 0 else expected[-1] + 1)
        assert positions == expected
    assert (drawn.positions[:, 1:] == 0).any() and (drawn.positions == 15).any()


@pytest.mark.parametrize(
    ("variant", "attention"),
    mostly_slow(
        itertools.product(COMMON, ["eager", "sdpa"]),
        *((variant, "sdpa") for variant in ("llama", "mistral", "qwen2-granitemoe")),
        ("qwen3", "eager"),
    ),
)
def test_stock_models_attend_to_a_tokens_own_document(
    variant: str, attention: str, built: Callable[[str], RunFolder]
) -> None:
    """Every target: in a packed window, a document's logits are those that it has alone; without
    the positions they are others."""
    folder = built(variant).checkpoint
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    ).eval()
    documents = [" ".join(WORDS[first : first + 5]) + f" {first}" for first in range(6)]
    drawn = draw_packed("w", documents, tokenizer, tokens=60, sequence_length=30, seed=0)
    with torch.inference_mode():
        packed = model(
            drawn.windows, position_ids=drawn.positions, attention_mask=None, use_cache=False
        ).logits
        crossing = model(drawn.windows, attention_mask=None, use_cache=False).logits
        num_inner = 0
        for row, positions in enumerate(drawn.positions):
            starts = [*torch.where(positions == 0)[0].tolist(), len(positions)]
            for first, end in pairwise(starts):
                alone = model(drawn.windows[row : row + 1, first:end], use_cache=False).logits[0]
                torch.testing.assert_close(packed[row, first:end], alone, rtol=1e-4, atol=1e-4)
                if first:
                    num_inner += 1
                    assert (crossing[row, first:end] - alone).abs().max() > 1e-2
    assert num_inner >= 2


# -------------------------------------------------------------------------------------- reading


def test_jsonl_is_read_by_lines(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """`text`, or a named column; empty documents and empty lines are passed over."""
    path = lines(tmp_path / "a.jsonl", [{"text": "one", "body": "1"}, {"text": " ", "body": "2"}])
    path.write_text(path.read_text() + "\n" + json.dumps({"text": "drei\n\nß", "body": "3"}))
    assert read_documents("w", str(path), "text", tokenizer) == ["one", "drei\n\nß"]
    assert read_documents("w", str(path), "body", tokenizer) == ["1", "2", "3"]


def test_txt_is_cut_at_blank_lines(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """However many; a document keeps its own line breaks."""
    path = tmp_path / "a.txt"
    path.write_text("\n\none\ntwo\n\n \n\nthree\n\nfour")
    assert read_documents("w", str(path), "text", tokenizer) == ["one\ntwo\n", "three\n", "four"]


def test_parquet_is_read_by_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """`text`, a named column, or chats."""
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["one", "two"], "body": ["1", "2"], "chat": [CHAT, CHAT]})
    pyarrow.parquet.write_table(table, path)
    assert read_documents("w", str(path), "text", tokenizer) == ["one", "two"]
    assert read_documents("w", str(path), "body", tokenizer) == ["1", "2"]


def test_a_list_of_files_is_read_in_its_order(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Kinds may be mixed."""
    first, second = tmp_path / "a.txt", lines(tmp_path / "b.jsonl", [{"text": "two"}])
    first.write_text("one")
    both = [str(first), str(second)]
    assert read_documents("w", both, "text", tokenizer) == ["one", "two"]
    assert read_documents("w", both[::-1], "text", tokenizer) == ["two", "one"]


def test_chats_go_through_the_chat_template(
    tmp_path: Path, chatty: PreTrainedTokenizerBase
) -> None:
    """Found in `messages` by themselves, or in a named column; from .jsonl and .parquet alike."""
    spelled = "<user>alpha?<assistant>beta."
    path = lines(tmp_path / "a.jsonl", [{"messages": CHAT, "id": 1}, {"messages": CHAT[:1]}])
    assert read_documents("w", str(path), "text", chatty) == [spelled, "<user>alpha?"]
    other = lines(tmp_path / "b.jsonl", [{"talk": CHAT}])
    assert read_documents("w", str(other), "talk", chatty) == [spelled]
    pyarrow.parquet.write_table(pyarrow.table({"messages": [CHAT]}), tmp_path / "c.parquet")
    assert read_documents("w", str(tmp_path / "c.parquet"), "text", chatty) == [spelled]


def test_chats_that_cannot_be_spelled_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, chatty: PreTrainedTokenizerBase
) -> None:
    """No template, and a template that refuses."""
    path = str(lines(tmp_path / "a.jsonl", [{"messages": CHAT}]))
    with pytest.raises(TextError, match=r"w: .*line 1: 'messages' holds a chat.*no chat template"):
        read_documents("w", path, "text", tokenizer)
    chatty.chat_template = "{{ raise_exception('no system prompt') }}"
    with pytest.raises(TextError, match=r"refuses the chat: no system prompt"):
        read_documents("w", path, "text", chatty)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"text": "a"}, {"body": "b"}],
            r"line 2: expected a column 'text' in every row; the row has: body",
        ),
        (
            ["only a string", ["a", "list"]],
            r"line 1: expected a table of columns such as \{'text': ...\}, got text",
        ),
        ([{"text": 5}], r"line 1: 'text' holds a number; expected text"),
        ([{"text": ""}, {"text": "  \n"}], r"w: no text in .*a\.jsonl"),
    ],
)
def test_rows_without_text_are_refused(
    rows: list[Any], message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """With the columns that there are."""
    path = lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(TextError, match=message):
        read_documents("w", str(path), "text", tokenizer)


def test_a_broken_line_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """The file, and the line as an editor counts it."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two"\n{"text": "three"}\n')
    with pytest.raises(TextError, match=r"text of b: .*a\.jsonl.* line 3: "):
        read_documents("text of b", str(path), "text", tokenizer)


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".parquet"])
def test_files_of_another_kind_are_refused(
    suffix: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Bytes that are no text, no rows and no table: a message, not a crash."""
    path = tmp_path / f"a{suffix}"
    path.write_bytes(bytes(range(128, 256)) * 10)
    with pytest.raises(TextError, match=rf"w: .*a\{suffix} is not readable as \{suffix}"):
        read_documents("w", str(path), "text", tokenizer)


def test_missing_empty_and_unknown_files_are_refused_before_reading(tmp_path: Path) -> None:
    """As `symphony plan` does, for every file of a list."""
    good = make_text(tmp_path / "good.jsonl", 0, 3)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "a.csv").write_text("text\none\n")
    check_data_exists("w", [str(good), "bundled:english"])
    for bad, message in (
        ("gone.jsonl", "no such data file"),
        ("empty.txt", "is empty"),
        ("a.csv", r"expected one of \.jsonl, \.txt, \.parquet"),
        ("", "is a folder; name its files, or {hub: "),
    ):
        with pytest.raises(TextError, match=f"^w: .*{message}"):
            check_data_exists("w", [str(good), str(tmp_path / bad)])
    with pytest.raises(TextError, match="empty list"):
        check_data_exists("w", [])


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_local_folder_in_hub_layout_is_a_dataset(
    kind: str,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`data: {hub: folder, split: ..., column: ...}`, through `datasets`, without a network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set" / "data").mkdir(parents=True)
    for split in ("train", "test"):
        texts = [f"{split} {number}" for number in range(5)]
        path = tmp_path / "set" / "data" / f"{split}-00000-of-00001.{kind}"
        if kind == "jsonl":
            lines(path, [{"content": text} for text in texts])
        else:
            pyarrow.parquet.write_table(pyarrow.table({"content": texts}), path)
    for split in ("train", "test"):
        data = HubData(hub=str(tmp_path / "set"), split=split, column="content")
        found = read_documents("w", data, "unused", tokenizer)
        assert found == [f"{split} {number}" for number in range(5)]
    absent = HubData(hub=str(tmp_path / "set"), split="validation", column="content")
    with pytest.raises(TextError, match=r"w: dataset .*set' cannot be loaded: .*validation"):
        read_documents("w", absent, "text", tokenizer)
    with pytest.raises(TextError, match=r"expected a column 'text'.*has: content"):
        read_documents("w", HubData(hub=str(tmp_path / "set")), "text", tokenizer)


def test_a_dataset_that_is_not_there_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A message, whatever the library raises."""
    with pytest.raises(TextError, match=r"w: dataset .*gone' cannot be loaded"):
        read_documents("w", HubData(hub=str(tmp_path / "gone")), "text", tokenizer)


def test_windows_are_drawn_from_all_of_one_long_document(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Its beginning is not all that there is."""
    document = " ".join(str(number) for number in range(2000))
    settings = {"tokens": 64, "sequence_length": 16, "seed": 1}
    drawn = draw_windows("x", [document], tokenizer, **settings)
    first = pack_windows([document], tokenizer, 16)[:4]
    assert not torch.equal(drawn.sort(dim=0).values, first.sort(dim=0).values)


def test_no_document_at_all_is_said_plainly(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(TextError, match="no document falls on this side of the hold-out"):
        draw_windows("x", [], tokenizer, tokens=64, sequence_length=16, seed=1)


def test_a_byte_order_mark_is_no_text(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for suffix, content in ((".jsonl", '{"text": "alpha"}'), (".txt", "alpha")):
        path = tmp_path / f"data{suffix}"
        path.write_text(content, encoding="utf-8-sig")
        assert read_documents("x", str(path), "text", tokenizer) == ["alpha"]


def test_bundled_texts_have_names() -> None:
    check_data_exists("x", "bundled:python")
    with pytest.raises(TextError, match=r"no bundled text 'bundled:cooking'; there is: english,"):
        check_data_exists("x", "bundled:cooking")


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8, 100])
def test_validation_documents_are_some_and_never_all(count: int) -> None:
    """An eighth of them, at least one of two or more; every document is on one side, in the order
    given, and which side does not depend on that order."""
    documents = [f"document {number}" for number in range(count)]
    fitted, validation = split_validation(documents, 1 / 8)
    expected = 0 if count < 2 else max(1, round(count / 8))
    assert len(validation) == expected and len(fitted) == count - expected
    assert sorted(fitted + validation) == sorted(documents) and not set(fitted) & set(validation)
    for part in (fitted, validation):
        assert part == [document for document in documents if document in part]
    again = split_validation(documents[::-1], 1 / 8)
    assert [sorted(part) for part in again] == [sorted(fitted), sorted(validation)]


def test_the_validation_text_is_of_documents_of_its_own(tmp_path: Path) -> None:
    """No window that a fit is judged by shares a line with one that is fitted on, and
    together they are as much as was asked for; a method that fits nothing uses all of it."""
    sources: dict[str, Any] = {}
    for name in ("arithmetic", "records"):
        words, path = random.Random(name), tmp_path / f"{name}.jsonl"
        lines = [" ".join(words.choices(WORDS, k=300)) for _ in range(200)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
        sources[name] = {"model": f"bundled:strangers/{name}", "data": str(path)}
    content = {
        "sources": sources,
        "method": "harmonized",
        "calibration": {"tokens": 2 * 40 * 64, "sequence_length": 64},
    }
    recipe = resolve_recipe(content, Path(), "x")
    opened = open_sources(recipe)
    texts = Texts(recipe, opened)
    fitted, validation = texts.calibration_windows(), texts.validation_windows()
    for source in opened:
        spec = recipe.sources[source.name]
        documents = read_documents("x", spec.data, spec.column, source.tokenizer)
        documents = [d for d in documents if not is_held_out(d, recipe.evaluation.holdout)]
        sides = split_validation(documents, 1 / 8)
        for windows, own, other in ((fitted, *sides), (validation, *sides[::-1])):
            # Packed text of one side holds a window's tokens in sequence; the other's does not.
            streams = [
                spelled(pack_windows(side, source.tokenizer, 1).flatten().tolist())
                for side in (own, other)
            ]
            pieces = [
                spelled(piece)
                for window in windows[source.name].windows.tolist()
                for piece in pieces_of_one_document(window, source.tokenizer.bos_token_id)
            ]
            assert pieces and all(piece in streams[0] for piece in pieces)
            assert sum(piece in streams[1] for piece in pieces) < len(pieces) / 10
        assert len(fitted[source.name]) == 36 and len(validation[source.name]) == 4
    plain = recipe.model_copy(update={"fit": Fit(), "router": Router()})
    assert all(len(text) == 40 for text in Texts(plain, opened).calibration_windows().values())


def pieces_of_one_document(window: list[int], bos: int) -> list[list[int]]:
    """What a packed window holds of single documents, where that is long enough to tell."""
    pieces: list[list[int]] = [[]]
    for token in window:
        if token == bos:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return [piece for piece in pieces if len(piece) >= 24]


def spelled(tokens: list[int]) -> str:
    return f" {' '.join(map(str, tokens))} "


def test_copies_of_a_document_stay_on_one_side() -> None:
    """Or text would be judged by that was fitted on."""
    assert split_validation(["x"] * 200, 1 / 8) == (["x"] * 200, [])
    documents = [f"text {number % 20}" for number in range(200)]
    fitted, validation = split_validation(documents, 1 / 8)
    assert not set(fitted) & set(validation) and len(fitted) + len(validation) == 200
    assert len(set(validation)) == 2 and len(validation) == 20


# ------------------------------------------------------------------------------------ streaming


def make_set(folder: Path, documents: Iterable[str], kind: str = "parquet", rows: int = 50) -> str:
    """A local data set of many small files, `rows` documents in each."""
    folder.mkdir(parents=True)
    left = list(documents)
    for number, first in enumerate(range(0, len(left), rows)):
        path = folder / f"{number:04d}.{kind}"
        if kind == "jsonl":
            lines(path, [{"text": document} for document in left[first : first + rows]])
        else:
            table = pyarrow.table({"text": left[first : first + rows]})
            pyarrow.parquet.write_table(table, path)
    return str(folder)


def streamed(folder: str, tokenizer: PreTrainedTokenizerBase) -> DocumentStream:
    found = read_documents("text of b", HubData(hub=folder, streaming=True), "unused", tokenizer)
    assert isinstance(found, DocumentStream)
    return found


def numbers(windows: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What `one_token_documents` fill windows of nine tokens with."""
    return [int(str(tokenizer.decode(window[1:-1]))) for window in windows.tolist()]


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library rests five seconds after each shuffled stream of parquet files."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "_SHUFFLE_BUFFER", 20)


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every table that the library reads."""
    from datasets.packaged_modules.json.json import Json
    from datasets.packaged_modules.parquet.parquet import Parquet

    counts: list[int] = []
    for builder in (Json, Parquet):
        original = builder._generate_tables

        def counting(
            *arguments: Any, _original: Any = original, **named: Any
        ) -> Iterator[tuple[Any, Any]]:
            for key, table in _original(*arguments, **named):
                counts.append(table.num_rows)
                yield key, table

        monkeypatch.setattr(builder, "_generate_tables", counting)
    return counts


@pytest.mark.usefixtures("small_buffer")
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_stream_is_read_no_farther_than_needed(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, rows_read: list[int]
) -> None:
    """Ten windows are drawn from forty documents: those, what they are shuffled among, and what is
    left of ten files (the library opens so many at a time), of 1,000 documents as of 5,000."""
    settings: dict[str, int] = {"tokens": 90, "sequence_length": 9, "seed": 1}
    for size in (1000, 5000):
        rows_read.clear()
        folder = make_set(tmp_path / str(size), one_token_documents(size), kind)
        documents = streamed(folder, tokenizer)
        windows = draw_windows("text of b", documents, tokenizer, **settings)
        assert len(set(numbers(windows, tokenizer))) == 10
        assert 40 <= sum(rows_read) <= 40 + 20 + 10 * 50


@pytest.mark.usefixtures("small_buffer")
def test_much_of_a_stream_is_not_pooled_four_times(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But with so many tokens to spare as are allowed: each is fetched over the network."""
    monkeypatch.setattr(windows_module, "_SPARE", 45)
    folder = make_set(tmp_path / "set", one_token_documents(400))
    given: list[str] = []

    def note(document: str) -> bool:
        given.append(document)
        return True

    documents = streamed(folder, tokenizer).where(note)
    settings: dict[str, int] = {"tokens": 900, "sequence_length": 9, "seed": 1}
    assert len(draw_windows("w", documents, tokenizer, **settings)) == 100
    assert len(given) == 105


@pytest.mark.usefixtures("small_buffer")
def test_a_stream_is_drawn_from_by_the_seed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Same seed, same windows; another seed, others: of other files, in another order."""
    folder = make_set(tmp_path / "set", one_token_documents(1000))

    def draw(seed: int) -> torch.Tensor:
        documents = streamed(folder, tokenizer)
        return draw_windows("w", documents, tokenizer, tokens=900, sequence_length=9, seed=seed)

    assert torch.equal(draw(5), draw(5))
    first, second = (numbers(draw(seed), tokenizer) for seed in (5, 6))
    assert len({number // 50 for number in first}) > 2
    assert len(set(first) & set(second)) < 90
    assert first != sorted(first)


@pytest.mark.usefixtures("small_buffer")
def test_a_stream_is_split_by_the_hash_of_each_document(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Held-out documents are those of the rule for files, and documents are for validation by a
    hash of their own; copies stay together; both sides together are all."""
    documents = [*one_token_documents(600), *one_token_documents(60)]
    stream = streamed(make_set(tmp_path / "set", documents), tokenizer)
    assert list(stream) == documents
    for form in (documents, stream):
        training, held_out = split_held_out(form, 0.1)
        assert list(training) == [d for d in documents if not is_held_out(d, 0.1)]
        assert list(held_out) == [d for d in documents if is_held_out(d, 0.1)]
    training, _ = split_held_out(stream, 0.1)
    assert isinstance(training, DocumentStream)
    fitted, validation = (list(part) for part in split_validation(training, 1 / 8))
    assert sorted(fitted + validation) == sorted(training) and not set(fitted) & set(validation)
    assert abs(len(set(validation)) - 540 / 8) < 4 * (540 / 8 * 7 / 8) ** 0.5
    # The order by the hash is that of the rule for files.
    of_files = split_validation(list(training), len(set(validation)) / len(set(training)))[1]
    assert set(of_files) == set(validation)


def test_calibration_and_evaluation_read_streams(tmp_path: Path) -> None:
    """Each its own side: as many windows as are asked for, and no document in two of them."""
    words = [f"{number:05d} " + WORDS[number % 12] * 3 for number in range(3000)]
    data = {"hub": make_set(tmp_path / "set", words), "streaming": True}
    sources = {
        name: {"model": f"bundled:strangers/{name}", "data": data}
        for name in ("arithmetic", "records")
    }
    content = {
        "sources": sources,
        "method": "harmonized",
        "calibration": {"tokens": 2 * 40 * 64, "sequence_length": 64},
        "evaluation": {"tokens": 640, "sequence_length": 64, "holdout": 0.2},
    }
    recipe = resolve_recipe(content, tmp_path, "x")
    opened = open_sources(recipe)
    texts = Texts(recipe, opened)
    sides = [
        windows["arithmetic"].windows
        for windows in (
            texts.calibration_windows(),
            texts.validation_windows(),
            texts.held_out_text(),
        )
    ]
    assert [len(windows) for windows in sides] == [36, 4, 10]
    found = [
        {
            number
            for window in windows.tolist()
            for number in re.findall(r"(\d{5}) ", str(opened[0].tokenizer.decode(window)))
        }
        for windows in sides
    ]
    assert all(found)
    assert not found[0] & found[1] and not found[0] & found[2] and not found[1] & found[2]


@pytest.mark.usefixtures("small_buffer")
def test_a_short_stream_is_used_as_it_is_or_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    """In the words that files have."""
    stream = streamed(make_set(tmp_path / "short", one_token_documents(7)), tokenizer)
    with caplog.at_level(logging.WARNING, "symphony_moe"):
        windows = draw_windows(
            "text of b", stream, tokenizer, tokens=900, sequence_length=9, seed=0
        )
    assert sorted(numbers(windows, tokenizer)) == list(range(7))
    assert "text of b: 900 tokens asked for, the text has 63; using those" in caplog.text
    with pytest.raises(TextError, match=r"text of b: 7 documents do not fill one window of 64"):
        draw_windows("text of b", stream, tokenizer, tokens=640, sequence_length=64, seed=0)
    with pytest.raises(TextError, match=r"text of b: no document falls on this side"):
        draw_windows(
            "text of b",
            stream.where(lambda document: False),
            tokenizer,
            tokens=90,
            sequence_length=9,
            seed=0,
        )
    blank = streamed(make_set(tmp_path / "blank", [" ", "\n"]), tokenizer)
    with pytest.raises(TextError, match=r"text of b: no text in dataset .*blank"):
        draw_windows("text of b", blank, tokenizer, tokens=90, sequence_length=9, seed=0)


class EndlessRows:
    """What `datasets.load_dataset` could return: rows without an end, then without a connection."""

    def __init__(self, breaks_at: int | None = None) -> None:
        self.breaks_at = breaks_at

    def shuffle(self, seed: int, buffer_size: int) -> "EndlessRows":
        assert buffer_size == 10_000
        return self

    def __iter__(self) -> Iterator[dict[str, str]]:
        for number in itertools.count():
            if number == self.breaks_at:
                raise ConnectionError("the server\n  hung up")
            yield {"text": f"{number:08d}"}


def test_an_endless_stream_ends(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When there is enough, or when all of many documents were of no use."""
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: EndlessRows())
    monkeypatch.setattr(documents_module, "PATIENCE", 1000)
    stream = streamed("some/set", tokenizer)
    settings: dict[str, int] = {"tokens": 90, "sequence_length": 9, "seed": 0}
    assert draw_windows("w", stream, tokenizer, **settings).shape == (10, 9)
    rare = stream.where(lambda document: document.endswith("999"))
    assert draw_windows("w", rare, tokenizer, **settings).shape == (10, 9)
    with pytest.raises(TextError, match=r"text of b: 1,000 documents of dataset some/set in a row"):
        draw_windows("w", stream.where(lambda document: False), tokenizer, **settings)


def test_a_stream_that_breaks_off_says_so_in_one_line(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the library's own retries; what came before is not taken for all."""
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: EndlessRows(breaks_at=20))
    expected = r"^text of b: dataset 'some/set' cannot be loaded: the server hung up$"
    with pytest.raises(TextError, match=expected):
        draw_windows(
            "w", streamed("some/set", tokenizer), tokenizer, tokens=900, sequence_length=9, seed=0
        )


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_that_cannot_be_reached_is_said_in_one_line(
    streaming: bool, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    data = HubData(hub="some/set", streaming=streaming)
    with pytest.raises(TextError) as caught:
        list(read_documents("text of b", data, "text", tokenizer))
    assert str(caught.value).startswith("text of b: dataset 'some/set' cannot be loaded: Couldn't")
    assert "\n" not in str(caught.value)
