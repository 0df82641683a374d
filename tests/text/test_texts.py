"""A command reads its text once, and gets the windows that it has always got."""

import gc
import hashlib
import itertools
import json
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from checks import mostly_slow
from conftest import WORDS, make_model, make_recipe, make_text, make_tokenizer
from symphony_moe import pipeline
from symphony_moe.errors import TextError
from symphony_moe.recipe.load import load_recipe, resolve_recipe
from symphony_moe.recipe.settings import Calibration, Fit, Recipe, Router, Train
from symphony_moe.sources.opening import open_sources
from symphony_moe.sources.source import Source
from symphony_moe.text import domain as domain_module
from symphony_moe.text import file_formats, memory_maps
from symphony_moe.text import texts as texts_module
from symphony_moe.text.documents import is_held_out
from symphony_moe.text.rows import Document
from symphony_moe.text.texts import Texts
from symphony_moe.text.windows import Packed, Pieces

TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The library rests five seconds after each shuffled stream of parquet files."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# ------------------------------------------------------------------------------- the same windows


def texts_of(count: int) -> list[str]:
    """Documents of 5 to 64 words, no two alike, and of some letters that are several bytes."""
    return [
        f"{number} é " + " ".join(WORDS[number * step % 12] for step in range(1, 6 + number % 60))
        for number in range(count)
    ]


def chats_of(count: int) -> list[list[dict[str, str]]]:
    return [
        [{"role": "user", "content": text[:20]}, {"role": "assistant", "content": text[20:]}]
        for text in texts_of(count)
    ]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_data(kind: str, root: Path) -> dict[str, Any]:
    """The `data` of a source of some kind (and its column)."""
    rows = [{"text": text} for text in texts_of(300)]
    if kind == "bundled":
        return {"data": "bundled:records"}
    if kind == "txt":
        (root / "x.txt").write_text("\n\n".join(texts_of(300)))
        return {"data": str(root / "x.txt")}
    if kind == "chats":
        chats = [{"messages": chat} for chat in chats_of(300)]
        return {"data": write_rows(root / "x.jsonl", chats)}
    if kind == "list":
        first = write_rows(root / "x.jsonl", [{"body": row["text"]} for row in rows[:200]])
        second = write_rows(root / "x.parquet", [{"body": row["text"]} for row in rows[150:]])
        return {"data": [first, second], "column": "body"}
    if kind in ("hub", "stream"):
        for number in range(6):
            write_rows(root / "set" / f"{number}.parquet", rows[50 * number : 50 * (number + 1)])
        return {"data": {"hub": str(root / "set"), "streaming": kind == "stream"}}
    empty = [{"text": " "}] if kind == "with empty ones" else []
    return {"data": write_rows(root / "x.jsonl", [*rows, *empty])}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two models with a chat template. The tokenizer of `b` puts no BOS before a text."""
    return make_models(tmp_path_factory.mktemp("models"))


def make_models(root: Path) -> dict[str, str]:
    for seed, name in enumerate("ab"):
        folder = make_model(root / name, "llama", seed)
        make_tokenizer(folder, adds_bos=name == "a")
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    return {name: str(root / name) for name in "ab"}


def opened(
    kind: str, models: Mapping[str, str], root: Path, overrides: Mapping[str, Any]
) -> tuple[Recipe, list[Source]]:
    """A recipe whose source `a` has text of some kind, and its sources."""
    chats = write_rows(root / "b.jsonl", [{"messages": chat} for chat in chats_of(120)])
    content: dict[str, Any] = {
        "sources": {
            "a": {"model": models["a"], **make_data(kind, root)},
            "b": {"model": models["b"], "data": chats},
        },
        "method": "harmonized",
        "calibration": {"tokens": 2 * 40 * 32, "sequence_length": 32, "windows": "random"},
        "train": {"tokens": 200 * 64, "sequence_length": 64},
        "evaluation": {
            "tokens": 500,
            "sequence_length": 40,
            "holdout": 0.2,
            "extra": {"other": str(make_text(root / "other.jsonl", 9, 40))},
        },
    }
    for section, values in overrides.items():
        old = content.get(section)
        content[section] = {**old, **values} if isinstance(old, dict) else values
    recipe = resolve_recipe(content, root, "x")
    return recipe, open_sources(recipe)


def digest(parts: Mapping[str, Packed | Pieces]) -> str:
    """Of all tokens and positions, by name."""
    found = hashlib.sha256()
    for name, part in parts.items():
        tokens = part.windows if isinstance(part, Packed) else part.tokens
        assert tokens.dtype == part.positions.dtype == torch.int64
        for tensor in (tokens, part.positions):
            found.update(f"{name} {list(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return found.hexdigest()[:12]


USES = ("held_out_text", "calibration_windows", "validation_windows", "training_text")


def windows_of(texts: Texts, use: str, folder: Path) -> dict[str, Packed | Pieces]:
    """What there is for a use, by name."""
    if use == "training_text":
        text = texts.training_text(folder)
        numbers = range(len(text))
        return {"trained": Packed(text.tokens(numbers), text.positions(numbers))}
    found: dict[str, Packed | Pieces] = getattr(texts, use)()
    return found


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "jsonl": ("jsonl", {}),
    "txt": ("txt", {}),
    "chats": ("chats", {}),
    "list": ("list", {}),
    "bundled": ("bundled", {}),
    "hub": ("hub", {}),
    "stream": ("stream", {}),
    "nothing fitted": ("chats", {"method": "symphony"}),
    "nothing fitted, stream": ("stream", {"method": "symphony"}),
    "one domain": ("jsonl", {"method": "symphony", "calibration": {"domains": ["b"]}}),
    "one expert": ("jsonl", {"experts": {"sources": ["a"]}, "router": {"top_k": 1}}),
    "seeds": ("jsonl", {"seed": 5, "evaluation": {"seed": 6}, "calibration": {"seed": 7}}),
    "repeated": ("jsonl", {"train": {"tokens": 200_000}}),
}
RECORDED = {
    "jsonl": "321d3acdc479 87b50b9870f3 f7e346df9216 30620b4e3d41",
    "txt": "de73d504a50e 77699687403d 1cf2a9b6dd8b ef13e63e7387",
    "chats": "e06592fc4aa2 adaa542e6a44 6f130e26e3e7 1dea63ccfc3b",
    "list": "7d9ca7a3d1e0 68275743e88b 8dd161844616 956396a09fca",
    "bundled": "2558c4a02ab4 49aab00ab34f aa1e53f86a19 019a8f82dbb4",
    "hub": "321d3acdc479 87b50b9870f3 f7e346df9216 30620b4e3d41",
    "stream": "d7f4d37443da e7562807b360 cb3f7578a9ed 10e8826c80d7",
    "nothing fitted": "e06592fc4aa2 db9f64d3e039 e3b0c44298fc 1dea63ccfc3b",
    "nothing fitted, stream": "d7f4d37443da 4460a5588471 e3b0c44298fc 10e8826c80d7",
    "one domain": "321d3acdc479 246847e99527 e3b0c44298fc 30620b4e3d41",
    "one expert": "321d3acdc479 0571396c67d4 8ee569d9a67a 30620b4e3d41",
    "seeds": "05ccfc64428b fcf9a2e9814e db9bd739571d 741f152521db",
    "repeated": "321d3acdc479 87b50b9870f3 f7e346df9216 cdb43f4dcc3c",
}
"""Case -> digests by the version before `Texts`, in which every use read the text for itself: held
out, to fit on, to validate by, to train on."""


@pytest.mark.parametrize(
    ("case", "where"),
    mostly_slow(
        itertools.product(CASES, ["kept", "not kept", "in files"]),
        *((case, "kept") for case in CASES),
        *itertools.product(["chats", "stream", "repeated"], ["not kept", "in files"]),
    ),
)
def test_windows_are_those_that_every_use_has_read_for_itself(
    case: str,
    where: str,
    models: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, for every kind of data, and whatever was asked for before; with the documents
    kept, with no room for them, and where the text to train on is in files."""
    if where == "not kept":
        monkeypatch.setattr(texts_module, "KEPT_BYTES", 0)
    if where == "in files":
        monkeypatch.setattr(memory_maps, "_IN_MEMORY", 0)
    kind, overrides = CASES[case]
    recipe, sources = opened(kind, models, tmp_path, overrides)
    texts = Texts(recipe, sources)
    for order in (USES, USES[::-1]) if where == "kept" else (USES,):
        found = {use: digest(windows_of(texts, use, tmp_path / "text")) for use in order}
        assert " ".join(found[use] for use in USES) == RECORDED[case]
    assert (tmp_path / "text").exists() == (where == "in files")


# ------------------------------------------------------------------------------------------- once


@pytest.fixture
def files_read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """File -> how often it was read."""
    counts: Counter[str] = Counter()
    original = file_formats.READERS[".jsonl"]

    def counting(path: Path) -> Iterator[tuple[str, Any]]:
        counts[path.name] += 1
        yield from original(path)

    monkeypatch.setitem(file_formats.READERS, ".jsonl", counting)
    return counts


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Document -> how often a tokenizer has cut it."""
    counts: Counter[str] = Counter()
    original = PreTrainedTokenizerFast.__call__

    def counting(self: Any, text: Any = None, *arguments: Any, **named: Any) -> Any:
        if isinstance(text, str):
            counts[text] += 1
        return original(self, text, *arguments, **named)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counting)
    return counts


def documents_in(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Two sources whose documents differ; a model of theirs is fitted and trained."""
    path = make_recipe(
        tmp_path / "project",
        count=2,
        method="harmonized",
        fit={"epochs": 1},
        train={"evaluations": 1},
        calibration={"tokens": 1024, "sequence_length": 64},
    )
    return load_recipe(path)


def test_a_run_reads_each_file_once_and_tokenises_each_document_at_most_once(
    recipe: Recipe, tmp_path: Path, files_read: Counter[str], tokenised: Counter[str]
) -> None:
    """From the first check to the last evaluation."""
    folder = pipeline.run(recipe, tmp_path / "run")
    assert folder.report.is_file()
    assert files_read == {"a.jsonl": 1, "b.jsonl": 1, "other.jsonl": 1}
    for name in files_read:
        counts = [tokenised[document] for document in documents_in(tmp_path / "project" / name)]
        assert set(counts) <= {0, 1} and sum(counts) >= 3


@pytest.mark.slow
def test_what_a_run_makes_is_what_its_commands_make(recipe: Recipe, tmp_path: Path) -> None:
    """Each alone, from text of its own."""
    together = pipeline.run(recipe, tmp_path / "together")
    alone = pipeline.build(recipe, tmp_path / "alone")
    pipeline.train(alone)
    pipeline.evaluate(alone)
    one, other = (run.read_json(run.manifest)["tensors"] for run in (together, alone))
    assert one == other and {"checkpoint", "trained"} <= one.keys()
    one, other = (run.read_json(run.metrics) for run in (together, alone))
    for key in ("built", "trained", "sources", "routing", "held_out", "fit"):
        assert one[key] == other[key]


def test_more_text_than_there_is_room_for_is_read_again(
    recipe: Recipe,
    tmp_path: Path,
    files_read: Counter[str],
    tokenised: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Room for the documents of one source, and for nothing else."""
    documents = map(Document, documents_in(tmp_path / "project" / "a.jsonl"))
    room = sum(document.memory + domain_module._PER_DOCUMENT for document in documents)
    monkeypatch.setattr(texts_module, "KEPT_BYTES", room)
    texts = Texts(recipe, open_sources(recipe))
    texts.calibration_windows()
    texts.validation_windows()
    texts.training_text(tmp_path)
    assert files_read == {"a.jsonl": 1, "b.jsonl": 3}
    assert texts._room.free == 0
    for name in ("a.jsonl", "b.jsonl"):
        assert max(tokenised[d] for d in documents_in(tmp_path / "project" / name)) > 1


def test_what_is_kept_takes_no_more_memory_than_it_says(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Python's own count, with documents of many sizes; and most of it is used."""
    many = texts_of(60) + [text * 40 for text in texts_of(60)]
    for name in "ab":
        write_rows(tmp_path / "project" / f"{name}.jsonl", [{"text": text} for text in many])
    monkeypatch.setattr(texts_module, "KEPT_BYTES", 2**21)
    texts = Texts(recipe, open_sources(recipe))
    texts.held_out_text()  # what is loaded once is loaded
    fresh = Texts(recipe, list(texts._sources.values()))
    gc.collect()
    tracemalloc.start()
    fresh.calibration_windows()
    fresh.training_text(tmp_path)
    gc.collect()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    taken = 2**21 - fresh._room.free
    assert taken / 3 < kept < taken


def test_nothing_is_read_before_it_is_asked_for(
    recipe: Recipe, tmp_path: Path, files_read: Counter[str]
) -> None:
    """And then no domain but those that are."""
    only_a = recipe.model_copy(
        update={"calibration": Calibration(tokens=512, sequence_length=64, domains=["a"])}
    )
    texts = Texts(only_a, open_sources(only_a))
    assert not files_read
    texts.calibration_windows()
    assert files_read == {"a.jsonl": 1}


def test_texts_are_shared_by_recipes_that_say_the_same(recipe: Recipe, tmp_path: Path) -> None:
    """Whatever hashes they pin their sources to, and what they compare. Any other change makes
    other texts."""
    sources = open_sources(recipe)
    texts = Texts(recipe, sources)
    spec = recipe.sources["a"]
    pinned = recipe.model_copy(
        update={"sources": recipe.sources | {"a": spec.model_copy(update={"sha256": {"x": "1"}})}}
    )
    (tmp_path / "again.yaml").write_text(pinned.to_yaml())
    for same in (recipe, pinned, load_recipe(tmp_path / "again.yaml")):
        assert Texts.of(same, sources, texts) is texts
    column = recipe.sources | {"a": spec.model_copy(update={"column": "body"})}
    for change in ({"seed": 1}, {"sources": column}, {"train": Train(tokens=64)}):
        other = recipe.model_copy(update=change)
        assert Texts.of(other, sources, texts) is not texts
        assert Texts.of(other, sources, texts).recipe == other
    assert Texts.of(recipe, sources) is not texts


class EndlessRows:
    """What `datasets.load_dataset` could return: rows without an end."""

    def shuffle(self, seed: int, buffer_size: int) -> "EndlessRows":
        return self

    def __iter__(self) -> Iterator[dict[str, str]]:
        for number in itertools.count():
            yield {"text": f"{number:08d}"}


def test_a_stream_is_never_read_whole_and_never_kept(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without an end gives all its windows, for every use."""
    recipe, sources = opened("stream", models, tmp_path, {})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: EndlessRows())
    texts = Texts(recipe, sources)
    for use in USES:
        assert windows_of(texts, use, tmp_path)
    assert texts._domain("a")._kept is None and not texts._domain("a")._tokens


# ------------------------------------------------------------------------------- what is refused


def test_text_is_named_by_who_asks_first(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In errors as in warnings, which are said once."""
    path = tmp_path / "project" / "b.jsonl"
    path.write_text(path.read_text() + json.dumps({"text": " "}) + "\n")
    texts = Texts(recipe, open_sources(recipe))
    texts.held_out_text()
    texts.calibration_windows()
    assert caplog.text.count("documents are empty and left out") == 1
    assert "held-out text of b: 1 of 201 documents are empty" in caplog.text
    path.write_text(json.dumps({"body": "alpha"}) + "\n")
    for use, who in (
        ("held_out_text", "held-out text"),
        ("calibration_windows", "calibration text"),
        ("validation_windows", "calibration text"),
        ("training_text", "training text"),
    ):
        with pytest.raises(TextError, match=rf"^{who} of b: .*expected a column 'text'"):
            windows_of(Texts(recipe, open_sources(recipe)), use, tmp_path)


def test_a_single_document_validates_no_fit(recipe: Recipe, tmp_path: Path) -> None:
    """And is enough where nothing is fitted."""
    path, text = tmp_path / "project" / "a.jsonl", documents_in(tmp_path / "project" / "a.jsonl")
    single = next(d for d in text if not is_held_out(d, recipe.evaluation.holdout))
    path.write_text(json.dumps({"text": single}) + "\n")
    sources = open_sources(recipe)
    with pytest.raises(TextError, match="calibration text of a: a single document; a fit is valid"):
        Texts(recipe, sources).validation_windows()
    plain = recipe.model_copy(update={"fit": Fit(), "router": Router()})
    assert Texts(plain, sources).validation_windows() == {}
    assert len(Texts(plain, sources).calibration_windows()["a"]) >= 1


def test_text_too_short_to_train_on_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    """By what it does not fill, whatever `train.tokens` is; enough for one window is enough."""
    sources = open_sources(recipe)
    Texts(recipe, sources).refuse_short_training_text()
    train = recipe.train.model_copy(update={"sequence_length": 100_000, "tokens": 10**9})
    long = recipe.model_copy(update={"train": train})
    expected = r"^training text of a: \d+ documents do not fill one window of 100000 tokens"
    with pytest.raises(TextError, match=expected):
        Texts(long, sources).refuse_short_training_text()
