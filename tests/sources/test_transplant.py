"""Rows that are made for the anchor's tokens that a source lacks."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from torch import Tensor

from checks import drop_merges, mostly_slow, rewrite, sentence_piece_tokenizer, tensors_of
from conftest import WORDS, make_model, make_recipe
from symphony_moe import pipeline
from symphony_moe.errors import SourceError
from symphony_moe.model.families import EMBEDDING, HEAD
from symphony_moe.recipe.load import load_recipe
from symphony_moe.sources.opening import open_sources
from symphony_moe.sources.source import Source
from symphony_moe.sources.spelling import BYTE_LEVEL, SPELLINGS, said_by, spelled_as
from symphony_moe.sources.transplant import (
    Combination,
    Places,
    Transplant,
    pursue,
    regress,
    terms_for,
)

LACKED = 12
"""Merges that `b` lacks."""


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Pursuit


def test_pursuit_finds_what_a_target_is_made_of() -> None:
    """Of a few atoms among many: the numbers, and the weights whatever the atoms' lengths."""
    atoms = normal(0, 200, 64) * torch.linspace(0.1, 10, 200)[:, None]
    numbers = torch.tensor([[3, 50, 120], [7, 150, 199]])
    weights = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 0.7, 1.0]])
    targets = (weights[:, :, None] * atoms[numbers]).sum(dim=1)
    found, by = pursue(targets, atoms, 3)
    dense = torch.zeros(2, 200).scatter_(1, found, by)
    torch.testing.assert_close(
        dense, torch.zeros(2, 200).scatter_(1, numbers, weights), rtol=1e-3, atol=1e-3
    )


def test_pursuit_is_least_squares_on_greedily_chosen_atoms() -> None:
    """Against the textbook, one target at a time, in float64."""
    atoms, targets = normal(1, 90, 24), normal(2, 7, 24)
    chosen, weights = pursue(targets, atoms, 6)
    units = torch.nn.functional.normalize(atoms.double(), dim=1)
    for target, found, by in zip(targets.double(), chosen, weights, strict=True):
        left, expected, solution = target, list[int](), torch.empty(0)
        for _ in range(6):
            expected.append(int((units @ left).abs().argmax()))
            solution = torch.linalg.lstsq(atoms[expected].double().T, target).solution
            left = target - atoms[expected].double().T @ solution
        assert found.tolist() == expected
        torch.testing.assert_close(by.double(), solution, rtol=1e-3, atol=1e-4)


def test_an_atom_is_never_chosen_twice() -> None:
    """Nor are atoms that are the same a reason to stop, or zeros to be taken."""
    atoms = torch.cat((normal(3, 4, 8), normal(3, 4, 8), torch.zeros(1, 8)))
    chosen, weights = pursue(torch.cat((atoms[:2], normal(4, 3, 8))), atoms, 8)
    assert all(len(set(row)) == 8 for row in chosen.tolist())
    assert bool(weights.isfinite().all())


@pytest.mark.parametrize(("hidden", "terms"), [(2, 1), (128, 16), (512, 64), (4096, 64)])
def test_narrow_tables_take_few_terms(hidden: int, terms: int) -> None:
    assert terms_for(hidden) == terms


def test_regression_finds_a_linear_map() -> None:
    theirs, matrix = normal(5, 400, 16) + 3, normal(6, 16, 24)
    found = regress(theirs, theirs @ matrix + 1)
    new = normal(7, 5, 16) + 3
    torch.testing.assert_close(found.apply(new), new @ matrix + 1, rtol=0.05, atol=0.3)


class Table:
    """Stands in for a source."""

    head_name = EMBEDDING

    def __init__(self, name: str, rows: Tensor) -> None:
        self.name, self.rows, self.asked = name, rows, 0

    def rows_of(self, name: str, wanted: Tensor, reads: object = None) -> Tensor:
        self.asked += 1
        return self.rows[wanted]


def test_one_search_serves_all_sources_of_one_tokenizer() -> None:
    anchor = Table("anchor", normal(8, 60, 16))
    transplant = Transplant("pursuit", anchor)
    shared, missing = torch.arange(50), torch.arange(50, 60)
    for name in "bc":
        own = shared.flip(0) if name == "c" else shared
        how = transplant.find(
            Table(name, normal(9, 50, 16)), (EMBEDDING, EMBEDDING), Places(shared, own, missing)
        )
        expected, _ = pursue(anchor.rows[50:], anchor.rows[:50], terms_for(16))
        assert isinstance(how, Combination)
        assert torch.equal(how.rows, own[expected])
    assert anchor.asked == 2, "atoms and targets, once"


# Spelling


@pytest.mark.parametrize("kind", SPELLINGS)
@given(text=st.text(min_size=1, max_size=8))
def test_every_kind_says_what_it_spells(kind: str, text: str) -> None:
    if "▁" in text or text.startswith("<0x"):
        return
    (spelled,) = spelled_as(text.encode(), kind)
    assert said_by(spelled, kind) == text.encode()


def test_bytes_that_are_no_text_are_spelled_one_by_one() -> None:
    assert spelled_as(b"\xe6\x97", "Unigram") == ["<0xE6>", "<0x97>"]
    assert said_by("<0xE6>", "SentencePiece BPE") == b"\xe6"
    assert [said_by(one, BYTE_LEVEL) for one in ("Ġthe", "Ċ", "日")] == [b" the", b"\n", None]
    alphabet = {said_by(character, BYTE_LEVEL) for character in pre_tokenizers.ByteLevel.alphabet()}
    assert alphabet == {bytes([byte]) for byte in range(256)}


# Sources


def lacking(root: Path, **sections: object) -> Path:
    """A recipe of `a`, and of `b` that lacks some of a's words."""
    path = make_recipe(root, "llama", count=2, **sections)
    gone = len(drop_merges(json.loads((root / "models/a/tokenizer.json").read_text()), LACKED))
    make_model(root / "models" / "b", "llama", 1, vocab_size=300 - gone)
    rewrite(root / "models" / "b", lambda content: drop_merges(content, LACKED))
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lacking(tmp_path_factory.mktemp("pair"))


def opened(path: Path, method: str) -> dict[str, Source]:
    recipe = load_recipe(path, [f"backbone.missing_tokens={method}"])
    return {source.name: source for source in open_sources(recipe)}


def whole(source: Source, name: str) -> Tensor:
    return torch.cat([rows for _, rows in source.table(name)])


@pytest.mark.parametrize("rows", [64, 8192])
@pytest.mark.parametrize("table", [EMBEDDING, HEAD])
def test_a_made_row_is_said_in_the_sources_own_rows(
    table: str, rows: int, pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By each method, whatever the size of a block; the rows that it has stay, bit for bit."""
    before = {method: opened(pair, method)["b"] for method in ("skip", "pieces")}
    skipped = whole(before["skip"], table)
    missing = before["skip"].places.missing
    assert len(missing) == LACKED
    monkeypatch.setattr("symphony_moe.sources.source.TABLE_ROWS", rows)
    b, found = before["pieces"], whole(before["pieces"], table)
    assert b.vocabulary is not None
    last = [b.vocabulary.tables["b"].pieces[number][-1] for number in missing.tolist()]
    expected = skipped.clone()
    expected[missing] = (skipped[missing] + b.read(table)[last]) / 2
    assert torch.equal(found, expected) and not torch.equal(found, skipped)
    as_head = torch.cat([rows for _, rows in b.table(table, as_head=True)])
    assert torch.equal(as_head, skipped)
    for method in ("pursuit", "regression"):
        sources = opened(pair, method)
        a, b, found = sources["a"].read(table), sources["b"], whole(sources["b"], table)
        rest = torch.ones(len(found), dtype=torch.bool)
        rest[missing] = False
        assert torch.equal(found[rest], skipped[rest])
        shared, own = b.places.shared, b.read(table)[b.places.own]
        if method == "pursuit":
            chosen, weights = pursue(a[missing], a[shared], terms_for(32))
            expected = (weights[:, :, None] * own[chosen]).sum(dim=1)
        else:
            expected = regress(a[shared], own).apply(a[missing])
        torch.testing.assert_close(found[missing], expected)
        assert not torch.allclose(found[missing], skipped[missing], atol=0.1)


def test_a_made_row_counts_and_a_skipped_one_does_not(pair: Path) -> None:
    """In what a source is said to know, which merge, fit and evaluation go by. An added token stays
    unknown: what it says is not what it means."""
    known = {method: opened(pair, method)["b"].known for method in ("skip", "pursuit")}
    skip, pursuit = known["skip"], known["pursuit"]
    assert skip is not None and pursuit is not None
    assert int((~skip).sum()) == LACKED and bool(pursuit.all())
    assert opened(pair, "pursuit")["a"].transplant is None, "it lacks nothing"


def test_the_merge_takes_a_made_row(pair: Path, tmp_path: Path) -> None:
    """The mean of both sources' rows, where by default it is the anchor's."""
    found = {}
    for method in ("skip", "pursuit"):
        recipe = load_recipe(pair, ["method=btx", f"backbone.missing_tokens={method}"])
        run = pipeline.build(recipe, tmp_path / method)
        pipeline.verify(run)
        found[method] = tensors_of(run.checkpoint)[EMBEDDING]
        sources = {source.name: source for source in open_sources(recipe)}
        missing = sources["b"].places.missing
        a, b = (whole(sources[name], EMBEDDING)[missing] for name in "ab")
        expected = a if method == "skip" else (a + b) / 2
        torch.testing.assert_close(found[method][missing], expected)
    rest = [n for n in range(300) if n not in missing.tolist()]
    assert torch.equal(found["skip"][rest], found["pursuit"][rest])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "deep"),
    mostly_slow([("pursuit", True), ("regression", True), ("pursuit", False)], ("pursuit", False)),
)
def test_a_fit_with_made_rows_verifies_and_is_built_again(
    method: str, deep: bool, tmp_path: Path
) -> None:
    path = lacking(tmp_path)
    settings = ["method=harmonized", "fit.epochs=1", f"backbone.missing_tokens={method}"]
    run = pipeline.build(load_recipe(path, settings), tmp_path / "run")
    assert ("rebuilt" in pipeline.verify(run, deep=deep)) is deep
    pipeline.evaluate(run)
    losses = json.loads(run.metrics.read_text())["sources"]["b"]
    assert all(loss is not None for loss in losses.values())


def test_losses_of_a_source_with_other_rows_are_not_taken_over(pair: Path, tmp_path: Path) -> None:
    """A made row is asked for and a skipped one is not, so the source loses something else."""
    runs = {}
    for method in ("skip", "regression"):
        asked = ["method=btx", f"backbone.missing_tokens={method}"]
        runs[method] = pipeline.build(load_recipe(pair, asked), tmp_path / method)
    skipped = pipeline.evaluate(runs["skip"]).sources
    alone = pipeline.evaluate(runs["regression"]).sources
    assert alone["b"] != skipped["b"]
    assert pipeline.evaluate(runs["regression"], like=runs["skip"]).sources == alone


def test_the_plan_says_which_rows_are_made(pair: Path, tmp_path: Path) -> None:
    def words(path: Path, method: str) -> str:
        planned = pipeline.plan(load_recipe(path, [f"backbone.missing_tokens={method}"]))
        return " | ".join([*map(str, planned.differences), *planned.notes])

    assert f"of {LACKED} of them it gets a row of its own" in words(pair, "pursuit")
    assert "a row of its own" not in words(pair, "skip")
    alike = make_recipe(tmp_path, "llama", count=2)
    said = words(alike, "pursuit")
    assert "backbone.missing_tokens has no effect: no source lacks a token" in said


@pytest.mark.parametrize("method", ["pieces", "pursuit", "regression"])
def test_rows_of_nothing_in_common_are_refused(
    method: str, pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = torch.empty(0, dtype=torch.int64)
    monkeypatch.setattr(Source, "places", Places(none, none, torch.arange(3)))
    if method == "pieces":
        assert opened(pair, method)["b"].transplant is not None
        return
    with pytest.raises(SourceError, match="a and a, the anchor, have no ordinary token in common"):
        opened(pair, method)


# Kinds of tokenizers


def two_kinds(root: Path, anchor: str, **sections: object) -> Path:
    """`a` is byte-level, `b` SentencePiece; each has words that the other lacks."""
    path = lacking(root, anchor=anchor, **sections)
    folder = root / "models" / "b"
    for file in folder.glob("tokenizer*"):
        file.unlink()
    sentence_piece_tokenizer(folder, "PreTrainedTokenizerFast")
    size = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    make_model(folder, "llama", 1, vocab_size=size, bos_token_id=1, eos_token_id=2)
    sentence_piece_tokenizer(folder, "PreTrainedTokenizerFast")
    return path


@pytest.mark.parametrize("anchor", ["a", "b"])
def test_two_kinds_are_matched_by_what_tokens_say(anchor: str, tmp_path: Path) -> None:
    path = two_kinds(tmp_path, anchor)
    sources = opened(path, "pursuit")
    a, b = (sources[name].own_tokenizer.get_vocab() for name in "ab")
    union = sources["a"].vocabulary
    assert union is not None
    rows = {name: union.tables[name].rows for name in "ab"}
    pairs = [("Ċ", "<0x0A>"), ("x", "x"), ("Ã", "<0xC3>")]
    assert WORDS[0] in a and "▁" + WORDS[0] in b
    for one, other in pairs:
        number = (a[one], b[other])["ab".index(anchor)]
        assert (int(rows["a"][number]), int(rows["b"][number])) == (a[one], b[other])
    # `▁alpha` has no token in `a`: it is read as its pieces, and has a made row.
    if anchor == "b":
        table = union.tables["a"]
        pieces = table.pieces[b["▁" + WORDS[0]]]
        assert "".join(sources["a"].own_tokenizer.convert_ids_to_tokens(pieces)) == "Ġalpha"
    run = pipeline.build(load_recipe(path, ["method=btx"]), tmp_path / "run")
    pipeline.verify(run)
    said = [str(d) for d in pipeline.plan(load_recipe(path)).differences]
    kinds = next(d for d in said if d.startswith("kind of tokenizer"))
    assert f"text is cut as by {anchor}; tokens are matched by what they say" in kinds
