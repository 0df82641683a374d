"""Source beside result, for every kind of tokenizer: every public setting, and awkward text."""

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from checks import TEXTS as DRAWN
from checks import (
    add_tokens,
    in_two_files,
    mostly_slow,
    rewrite,
    sentence_piece_tokenizer,
    with_beginning,
)
from conftest import make_tokenizer
from symphony_moe.sources.pretrained import load_tokenizer
from symphony_moe.sources.same_tokenizer import (
    SETTINGS,
    TEXTS,
    cut,
    first_difference,
    settings_of,
    texts_for,
)
from symphony_moe.sources.source_tokenizer import SourceTokenizer, left_out, without_rowless
from symphony_moe.sources.tokenizer_checks import cut_otherwise, found_otherwise
from symphony_moe.sources.tokenizer_files import tokenizer_files
from symphony_moe.sources.vocabulary import merge

Make = Callable[[Path], Any]
TARGETS = {
    "llama": ("mixtral", "jetmoe"),
    "mistral": ("mixtral", "jetmoe"),
    "qwen2": ("ernie4_5_moe",),
    "qwen3": ("qwen3_moe",),
}
"""Family -> those that a result of it may have."""
UNSET = object()
ODD = {
    "content": "<|endoftext|>",
    "lstrip": True,
    "rstrip": False,
    "single_word": False,
    "normalized": False,
    "special": True,
}


def configure(folder: Path, **values: Any) -> Path:
    """Change a tokenizer's config; UNSET takes a key out."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: v for key, v in config.items() if v is not UNSET}))
    return folder


def byte_level(
    named: Any, change: Callable[[dict[str, Any]], Any] | None = None, **more: Any
) -> Make:
    def make(folder: Path) -> None:
        make_tokenizer(folder)
        configure(folder, tokenizer_class=named, **more)
        rewrite(folder, change or (lambda content: None))

    return make


def piece(named: str, change: Callable[[dict[str, Any]], Any] | None = None, **more: Any) -> Make:
    def make(folder: Path) -> None:
        configure(sentence_piece_tokenizer(folder, named), **more)
        rewrite(folder, change or (lambda content: None))

    return make


def in_two(make: Make) -> Make:
    def made(folder: Path) -> None:
        make(folder)
        in_two_files(folder)

    return made


def padded(content: dict[str, Any], token: str = "</s>") -> None:
    """As a training script leaves it: texts of 64 tokens, of which 8 are text."""
    content["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": token,
    }
    content["truncation"] = {
        "direction": "Left",
        "max_length": 8,
        "strategy": "LongestFirst",
        "stride": 0,
    }


def padded_with_none(content: dict[str, Any]) -> None:
    """With the library's default, which is no token here."""
    padded(content, "[PAD]")


def wide(content: dict[str, Any]) -> None:
    """Special tokens that take the spaces beside them."""
    for token in content["added_tokens"]:
        token.update(lstrip=True, rstrip=True)


def unigram(folder: Path) -> None:
    letters = [(letter, -2.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    model = models.Unigram([("<unk>", 0.0), ("▁", -1.0), *letters], unk_id=0)
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), unk_token="<unk>", eos_token="<unk>"
    ).save_pretrained(folder)


CLASSES = (
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
    "Qwen2Tokenizer",
    "Qwen2TokenizerFast",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "GPT2Tokenizer",
    "CodeLlamaTokenizer",
    "GemmaTokenizer",
    "CohereTokenizer",
    "PreTrainedTokenizer",
    "MyTokenizer",
)
CONFIGURED: dict[str, Any] = {
    "padding_side": "left",
    "truncation_side": "left",
    "model_max_length": 77,
    "clean_up_tokenization_spaces": True,
    "split_special_tokens": True,
}
KINDS: dict[str, Make] = {
    **{f"byte-level {named}": byte_level(named) for named in CLASSES},
    **{f"SentencePiece {named}": piece(named) for named in CLASSES},
    "byte-level of no class": byte_level(UNSET),
    "configured": byte_level(
        "PreTrainedTokenizerFast",
        **CONFIGURED,
        model_input_names=["input_ids"],
        extra_special_tokens=["<|endoftext|>"],
        image_token="<s>",
    ),
    "configured Llama": piece(
        "LlamaTokenizer",
        **CONFIGURED,
        extra_special_tokens={"image_token": "<s>"},
        add_prefix_space=False,
    ),
    "Llama that pads right": piece("LlamaTokenizer", padding_side="right"),
    "Qwen2 with a space": byte_level("Qwen2Tokenizer", add_prefix_space=True),
    "padded": byte_level("PreTrainedTokenizerFast", padded),
    "padded Llama": piece("LlamaTokenizer", padded),
    "padded Qwen2": byte_level("Qwen2Tokenizer", padded),
    "padded with none": byte_level("PreTrainedTokenizerFast", padded_with_none),
    "padded Llama with none": piece("LlamaTokenizer", padded_with_none),
    "wide": byte_level("PreTrainedTokenizerFast", wide),
    "wide Qwen2": byte_level("Qwen2Tokenizer", wide),
    "wide Llama": piece("LlamaTokenizer", wide),
    "a wide role": byte_level("Qwen2Tokenizer", pad_token={"__type": "AddedToken", **ODD}),
    "a wide token listed twice": byte_level("Qwen2Tokenizer", added_tokens_decoder={"258": ODD}),
    "beginning": byte_level("PreTrainedTokenizerFast", with_beginning),
    "beginning Qwen2": byte_level("Qwen2Tokenizer", with_beginning, add_bos_token=True),
    "two files GPT2": in_two(byte_level("GPT2Tokenizer")),
    "two files Qwen2": in_two(byte_level("Qwen2Tokenizer")),
    "Unigram": unigram,
}

EACH = mostly_slow(
    itertools.product(KINDS, TARGETS),
    *((kind, "llama") for kind in KINDS),
    *((next(iter(KINDS)), family) for family in TARGETS),
)


def source(folder: Path, make: Make, family: str) -> PreTrainedTokenizerBase | None:
    """A source's tokenizer as everyone else loads it; None where transformers loads none."""
    make(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    try:
        return load_tokenizer(folder)
    except Exception:
        return None


def result(files: Mapping[str, bytes], folder: Path, family: str) -> PreTrainedTokenizerBase:
    """A result's tokenizer as everyone else loads it."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    return load_tokenizer(folder)


def rows_of(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(tokenizer.get_vocab().values()) + 1


@pytest.mark.parametrize(("kind", "family"), EACH)
def test_a_result_has_every_setting_of_its_source_and_cuts_alike(
    kind: str, family: str, tmp_path: Path
) -> None:
    stock = source(tmp_path / "source", KINDS[kind], family)
    if stock is None:
        pytest.skip("transformers makes no tokenizer of it")
    files = tokenizer_files(SourceTokenizer("a", tmp_path / "source", stock, rows_of(stock)))
    for target in TARGETS[family]:
        written = result(files, tmp_path / target, target)
        assert first_difference(stock, written, texts_for(stock)) is None


@pytest.mark.parametrize(("kind", "family"), EACH)
def test_a_table_without_a_row_to_spare_needs_only_what_files_list(
    kind: str, family: str, tmp_path: Path
) -> None:
    """What a class presumes beyond the files is left out, and all else is as stock has it."""
    stock = source(tmp_path / "source", KINDS[kind], family)
    path = tmp_path / "source" / "tokenizer.json"
    if stock is None or not path.is_file():
        pytest.skip("nothing to compare")
    rows = len(json.loads(path.read_text())["model"]["vocab"])
    own, gone = without_rowless(stock, tmp_path / "source", rows)
    made = SourceTokenizer("a", tmp_path / "source", own, rows)
    if SourceTokenizer("a", tmp_path / "source", stock, rows).filed_kind != made.kind:
        assert not gone, "of another kind: refused, as its text is not what was meant"
        return
    assert rows_of(own) == rows and set(gone) == stock.get_vocab().keys() - own.get_vocab().keys()
    assert left_out(own) == tuple(gone)
    kept = {r: t for r, t in stock.special_tokens_map.items() if t not in gone}
    assert own.special_tokens_map == kept
    texts = [text for text in texts_for(stock) if not any(token in text for token in gone)]
    for text in texts:
        for special in (True, False):
            assert cut(own, text, special=special) == cut(stock, text, special=special)
    for name in SETTINGS:
        assert getattr(own, name, SETTINGS[name]) == getattr(stock, name, SETTINGS[name])
    for target in TARGETS[family]:
        written = result(tokenizer_files(made), tmp_path / target, target)
        assert first_difference(own, written, texts_for(own)) is None


FLAGS = st.fixed_dictionaries(
    {flag: st.booleans() for flag in ("lstrip", "rstrip", "single_word", "normalized", "special")}
)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    kind=st.sampled_from(
        [
            "byte-level PreTrainedTokenizerFast",
            "byte-level Qwen2Tokenizer",
            "SentencePiece LlamaTokenizer",
            "padded",
            "wide Qwen2",
        ]
    ),
    family=st.sampled_from(sorted(TARGETS)),
    chosen=st.fixed_dictionaries(
        {},
        optional={
            "padding_side": st.sampled_from(["left", "right"]),
            "truncation_side": st.sampled_from(["left", "right"]),
            "model_max_length": st.sampled_from([16, 1e30, 10**30, 4096]),
            "clean_up_tokenization_spaces": st.booleans(),
            "split_special_tokens": st.booleans(),
            "add_prefix_space": st.sampled_from([True, False, None]),
            "pad_token": st.sampled_from(["</s>", None]),
            "legacy": st.booleans(),
            "chat_template": st.sampled_from(
                ["x\r\n", [{"name": "default", "template": "d"}, {"name": "a/b", "template": "t"}]]
            ),
        },
    ),
    flags=FLAGS,
    texts=st.lists(DRAWN, max_size=4),
)
def test_whatever_files_set_the_result_has(
    kind: str,
    family: str,
    chosen: dict[str, Any],
    flags: dict[str, bool],
    texts: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    root = tmp_path_factory.mktemp("settings")

    def make(folder: Path) -> None:
        KINDS[kind](folder)
        configure(folder, **chosen)
        rewrite(folder, lambda content: add_tokens(content, ["<|tool|>"], **flags))

    stock = source(root / "source", make, family)
    assert stock is not None
    files = tokenizer_files(SourceTokenizer("a", root / "source", stock, rows_of(stock)))
    for target in TARGETS[family]:
        written = result(files, root / target, target)
        assert first_difference(stock, written, [*texts_for(stock), *texts]) is None


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    family=st.sampled_from(["llama", "qwen2", "qwen3"]),
    named=st.sampled_from(["PreTrainedTokenizerFast", "Qwen2Tokenizer"]),
    flags=FLAGS,
    other=st.none() | FLAGS,
    texts=st.lists(DRAWN, max_size=4),
)
def test_a_token_that_one_source_has_is_found_as_by_that_source_or_said_not_to_be(
    family: str,
    named: str,
    flags: dict[str, bool],
    other: dict[str, bool] | None,
    texts: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """`other`: the flags of the anchor's own token of that name, if it has one."""
    root = tmp_path_factory.mktemp("flags")
    owners = []
    for name, these in (("a", other), ("b", flags)):

        def change(content: dict[str, Any], these: dict[str, bool] | None = these) -> None:
            add_tokens(content, [] if these is None else ["<|tool|>"], **(these or {}))

        made = source(root / name, byte_level(named, change), family)
        assert made is not None
        owners.append(SourceTokenizer(name, root / name, made, 310))
    union = merge(owners, "a", "a")
    target = TARGETS[family][0]
    written = result(union.files, root / target, target)
    expected = settings_of(owners[0].tokenizer)
    assert first_difference(union.tokenizer, written, texts_for(written), expected) is None
    number = written.get_vocab()["<|tool|>"]
    said = found_otherwise(owners[1], written)
    ours, theirs = (
        [_found(t, text) for text in [*texts_for(owners[1].tokenizer), *texts]]
        for t in (written, owners[1].tokenizer)
    )
    assert number >= 300 and (ours == theirs or said)
    if other is None:
        assert ours == theirs and not said


def _found(tokenizer: PreTrainedTokenizerBase, text: str) -> list[Any]:
    """Where `<|tool|>` is in a text."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    number = tokenizer.get_vocab()["<|tool|>"]
    places = zip(found["input_ids"], found["offset_mapping"], strict=True)
    return [place for this, place in places if this == number]


def test_a_class_that_cuts_otherwise_than_its_file_is_told(tmp_path: Path) -> None:
    cases = {
        "qwen2": piece("PreTrainedTokenizerFast"),
        "llama": byte_level("PreTrainedTokenizerFast"),
    }
    said = {}
    for family, make in cases.items():
        stock = source(tmp_path / family, make, family)
        assert stock is not None
        said[family] = cut_otherwise(SourceTokenizer("a", tmp_path / family, stock, rows_of(stock)))
    as_filed = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "qwen2" / "tokenizer.json"))
    assert said["llama"] is None and said["qwen2"] is not None
    stock = load_tokenizer(tmp_path / "qwen2")
    assert cut(as_filed, said["qwen2"]) != cut(stock, said["qwen2"])


def test_a_missing_token_is_read_as_the_same_pieces_whatever_padding_is_set(
    tmp_path: Path,
) -> None:
    token = "<|a token of many pieces|>"
    pieces = []
    for name, change in (("plain", None), ("padded", padded)):
        made = source(tmp_path / name, byte_level("PreTrainedTokenizerFast", change), "llama")
        assert made is not None
        owner = SourceTokenizer("a", tmp_path / name, made, 300)
        pieces.append(owner.pieces(token, added=True))
        assert owner.content["padding"] is None and owner.content["truncation"] is None
    assert pieces[0] == pieces[1] and len(pieces[0]) > 8


# That it can fail


OTHERS: dict[str, Any] = {
    "padding_side": "left",
    "truncation_side": "left",
    "model_max_length": 5,
    "model_input_names": ["input_ids"],
    "clean_up_tokenization_spaces": True,
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
    "split_special_tokens": True,
    "add_prefix_space": True,
    "response_template": "x",
    "chat_control_tokens": ["<s>"],
    "chat_template": "x",
    "pad_token": "<s>",
    "extra_special_tokens": ["<s>"],
    "image_token": "<s>",
}


def test_every_setting_is_tried() -> None:
    assert SETTINGS.keys() < OTHERS.keys()


@pytest.mark.parametrize("setting", OTHERS)
def test_every_setting_that_differs_is_found(setting: str, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "a")
    make_tokenizer(tmp_path / "b")
    configure(tmp_path / "b", **{setting: OTHERS[setting]})
    one, other = load_tokenizer(tmp_path / "a"), load_tokenizer(tmp_path / "b")
    assert first_difference(one, one, TEXTS) is None
    found = first_difference(one, other, [])
    names = {"pad_token": "special tokens", "image_token": "special tokens"}
    assert found is not None and found.startswith(f"its {names.get(setting, setting)} is ")


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "numbers": lambda c: c["model"]["vocab"].update({"A": 1 + c["model"]["vocab"]["A"]}),
    "cutting": lambda c: c.update(normalizer={"type": "Lowercase"}),
    "cutting (add_special_tokens=True)": with_beginning,
    "decoding": lambda c: c.update(decoder={"type": "Fuse"}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_done_with_text_is_compared(what: str, tmp_path: Path) -> None:
    for name in "ab":
        make_tokenizer(tmp_path / name, adds_bos=False)
    rewrite(tmp_path / "b", CHANGES[what])
    one, other = load_tokenizer(tmp_path / "a"), load_tokenizer(tmp_path / "b")
    found = first_difference(one, other, TEXTS)
    assert found is not None and what in found


def test_an_added_token_of_other_flags_is_found(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "a")
    one, other = load_tokenizer(tmp_path / "a"), load_tokenizer(tmp_path / "a")
    one.add_tokens([AddedToken("<x>")])
    other.add_tokens([AddedToken("<x>", lstrip=True)])
    found = first_difference(one, other, texts_for(one))
    assert found is not None and "<x>" in found
