"""Large training text lies in files, and is what it would be in memory."""

import json
import multiprocessing
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from conftest import WORDS, make_text, make_tokenizer
from symphony_moe.errors import TextError
from symphony_moe.recipe.settings import Data, HubData
from symphony_moe.text import domain as domain_module
from symphony_moe.text import memory_maps
from symphony_moe.text.documents import read_documents, split_held_out
from symphony_moe.text.domain import Domain, DomainReading, Room
from symphony_moe.text.memory_maps import read_packed, write_packed
from symphony_moe.text.windows import Encoder, Packed, WindowDraw, draw_packed

SETTINGS: dict[str, Any] = {"holdout": 0.1, "tokens": 3200, "sequence_length": 32, "seed": 3}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[PreTrainedTokenizerBase]:
    """Two byte-level tokenizers: with a BOS, and without."""
    folders = [tmp_path_factory.mktemp(name) for name in ("with", "without")]
    for folder, bos in zip(folders, (True, False), strict=True):
        make_tokenizer(folder, bos=bos)
    return [AutoTokenizer.from_pretrained(folder) for folder in folders]


@pytest.fixture
def tokenizer(tokenizers: list[PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    return tokenizers[0]


@pytest.fixture
def nothing_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_maps, "_IN_MEMORY", 0)


def get(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    column: str = "text",
    **changes: Any,
) -> Packed:
    settings = SETTINGS | changes
    holdout = settings.pop("holdout")
    reading = DomainReading(data, column, tokenizer)
    domain = Domain(reading, Encoder.of(tokenizer), holdout, Room(0))
    return domain.training_windows("text of b", WindowDraw(**settings), folder)


def in_memory(data: Data, tokenizer: PreTrainedTokenizerBase) -> Packed:
    documents, _ = split_held_out(
        read_documents("text of b", data, "text", tokenizer), SETTINGS["holdout"]
    )
    drawing = {key: value for key, value in SETTINGS.items() if key != "holdout"}
    return draw_packed("text of b", documents, Encoder.of(tokenizer), WindowDraw(**drawing))


def same(one: Packed, other: Packed) -> bool:
    return torch.equal(one.windows.long(), other.windows.long()) and torch.equal(
        one.positions.long(), other.positions.long()
    )


@pytest.mark.usefixtures("nothing_in_memory")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("block", [1, 100, 2**22])
def test_text_in_files_is_the_text_in_memory(
    streaming: bool,
    block: int,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Windows, positions and their order, however many are copied at once; eight bytes for each
    token are left on the disk."""
    monkeypatch.setattr(memory_maps, "_BLOCK", block)
    (tmp_path / "set").mkdir()
    path = make_text(tmp_path / "set" / "a.jsonl", 0)
    data = HubData(hub=str(path.parent), streaming=True) if streaming else str(path)
    stored = get(data, tokenizer, tmp_path / "text")
    assert same(stored, in_memory(data, tokenizer)) and len(stored.windows) == 100
    assert stored.windows.dtype == stored.positions.dtype == torch.int32
    files = [file for file in (tmp_path / "text").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) == 3200 * 8


def test_little_text_stays_in_memory(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """As the tokens that the model takes; nothing is written."""
    path = str(make_text(tmp_path / "a.jsonl", 0))
    drawn = get(path, tokenizer, tmp_path / "text")
    assert same(drawn, in_memory(path, tokenizer)) and drawn.windows.dtype == torch.int64
    assert not (tmp_path / "text").exists()


@pytest.mark.usefixtures("nothing_in_memory")
def test_the_files_cannot_be_changed_through_the_tensors(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = str(make_text(tmp_path / "a.jsonl", 0))
    first = get(path, tokenizer, tmp_path / "text")
    before = first.windows.clone()
    first.windows.zero_()
    assert torch.equal(get(path, tokenizer, tmp_path / "text").windows, before)


@pytest.mark.usefixtures("nothing_in_memory")
def test_finished_files_are_used_again_where_they_were_made_of_the_same(
    tmp_path: Path,
    tokenizers: list[PreTrainedTokenizerBase],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without reading the data; any change of what they were made of makes others, and leaves
    these."""
    tokenizer, other = tokenizers
    path, folder = make_text(tmp_path / "a.jsonl", 0), tmp_path / "text"
    written: list[Path] = []

    def noting(final: Path, *arguments: Any, **named: Any) -> None:
        written.append(final)
        write_packed(final, *arguments, **named)

    monkeypatch.setattr(memory_maps, "write_packed", noting)
    data = str(path)
    first = get(data, tokenizer, folder)
    with monkeypatch.context() as patch:
        patch.setattr(domain_module, "read_documents", lambda *_: pytest.fail("read again"))
        assert same(get(data, tokenizer, folder), first)
    changes: list[dict[str, Any]] = [
        {"seed": 4},
        {"tokens": 1600},
        {"sequence_length": 16},
        {"holdout": 0.2},
    ]
    for change in changes:
        get(data, tokenizer, folder, **change)
    get(data, other, folder)
    get([data], tokenizer, folder)
    make_text(path, 0, documents=201)
    get(data, tokenizer, folder)
    assert len(written) == len(set(written)) == 8 and all(final.is_dir() for final in written)
    with pytest.raises(TextError, match="expected a column 'body'"):
        get(data, tokenizer, folder, column="body")


@pytest.mark.usefixtures("nothing_in_memory")
@pytest.mark.parametrize("function", ["into_windows", "choose_windows", "packed", "publish"])
def test_a_killed_writing_leaves_nothing_that_looks_finished(
    function: str,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Wherever the process ends; the next one writes all of it, and leaves no more on the disk than
    one that was never killed."""
    path, folder = str(make_text(tmp_path / "a.jsonl", 0)), tmp_path / "text"
    process = multiprocessing.get_context("fork").Process(
        target=_die_at, args=(function, path, tokenizer, folder)
    )
    process.start()
    process.join()
    assert process.exitcode == 9
    assert [file.suffix for file in folder.iterdir() if file.is_dir()] == [".part"]
    assert same(get(path, tokenizer, folder), in_memory(path, tokenizer))
    finished = [file for file in folder.iterdir() if file.is_dir()]
    assert len(finished) == 1 and finished[0].suffix == ""
    assert {file.name for file in finished[0].iterdir()} == {"tokens.bin", "positions.bin"}


def _die_at(function: str, path: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    setattr(memory_maps, function, lambda *_: os._exit(9))
    get(path, tokenizer, folder)


@pytest.mark.usefixtures("nothing_in_memory")
def test_a_failed_writing_gives_the_disk_its_room_back(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, and text that does not fill a window."""
    path, folder = str(make_text(tmp_path / "a.jsonl", 0)), tmp_path / "text"

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(memory_maps, "packed", full)
        with pytest.raises(OSError, match="No space left"):
            get(path, tokenizer, folder)
    assert not [file for file in folder.iterdir() if file.is_dir()]
    with pytest.raises(TextError, match="do not fill one window of 1000000"):
        get(path, tokenizer, folder, sequence_length=1_000_000)
    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps({"text": ""}) + "\n" + json.dumps({"text": "a"}))
    with pytest.raises(TextError, match="text of b"):
        get(str(short), tokenizer, folder)
    assert not [file for file in folder.iterdir() if file.is_dir()]


@pytest.mark.usefixtures("nothing_in_memory")
def test_processes_that_want_the_same_text_write_it_once(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """As those of one distributed training do: the others wait for the first."""
    path, folder = str(make_text(tmp_path / "a.jsonl", 0)), tmp_path / "text"
    context = multiprocessing.get_context("fork")
    written = context.Value("i", 0)
    processes = [
        context.Process(target=_count_writings, args=(written, path, tokenizer, folder))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert written.value == 1
    assert same(get(path, tokenizer, folder), in_memory(path, tokenizer))


def _count_writings(
    written: Any, path: str, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    def counting(*arguments: Any, **named: Any) -> None:
        with written.get_lock():
            written.value += 1
        write_packed(*arguments, **named)

    memory_maps.write_packed = counting
    assert len(get(path, tokenizer, folder).windows) == 100


def test_writing_takes_bounded_memory(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight times the tokens take no more of it: in memory they would be 2.5 MB."""
    monkeypatch.setattr(memory_maps, "_BLOCK", 1024)
    documents = [" ".join(WORDS[n * k % 12] for k in range(1000)) for n in range(400)]
    peaks = []
    for tokens in (10_000, 80_000):
        tracemalloc.start()
        drawing = WindowDraw(tokens, sequence_length=100, seed=0)
        write_packed(tmp_path / str(tokens), "w", documents, Encoder.of(tokenizer), drawing)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(read_packed(tmp_path / str(tokens), 100).windows) == tokens // 100
    assert peaks[1] < peaks[0] + 200_000


def test_what_a_tokenizer_is_does_not_depend_on_its_last_call(tmp_path: Path) -> None:
    """Calls switch padding and truncation of the library behind it on, and text would be made
    anew."""
    make_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.pad_token = "</s>"
    before = memory_maps.rules_of(tokenizer)
    tokenizer(["alpha", "alpha beta"], padding=True, truncation=True, max_length=3)
    assert memory_maps.rules_of(tokenizer) == before
