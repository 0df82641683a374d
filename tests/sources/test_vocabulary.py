"""The union of vocabularies: ids, segmentation, round trips and rows as promised."""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from checks import (
    ADDED,
    TEXTS,
    add_tokens,
    drop_merges,
    in_two_files,
    mostly_slow,
    rewrite,
    sentence_piece_tokenizer,
    with_beginning,
)
from conftest import COMMON, make_model, make_recipe
from symphony_moe import pipeline
from symphony_moe.building.alignment import Alignment
from symphony_moe.building.assemble import fused_tables
from symphony_moe.cli import main
from symphony_moe.errors import SourceError, VerificationError
from symphony_moe.evaluation.losses import losses_and_routing, negative_log_likelihood
from symphony_moe.model.families import EMBEDDING, HEAD
from symphony_moe.recipe.load import load_recipe
from symphony_moe.sources.opening import open_source, open_sources
from symphony_moe.sources.source import Source
from symphony_moe.sources.source_tokenizer import SourceTokenizer
from symphony_moe.sources.stock import load_source, load_stock
from symphony_moe.sources.tokenizer_files import tokenizer_files
from symphony_moe.sources.vocabulary import is_needed, merge
from symphony_moe.text.texts import Texts


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 300 tokens."""
    return make_model(tmp_path_factory.mktemp("template") / "model", "llama", 0)


SENTENCE_PIECE = ("PreTrainedTokenizerFast", "LlamaTokenizer")


def owner(
    name: str,
    folder: Path,
    template: Path,
    change: Callable[[dict[str, Any]], Any],
    rows: int | None = None,
) -> SourceTokenizer:
    """A tokenizer that is the template's, changed."""
    folder.mkdir(parents=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((template / file).read_bytes())
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return SourceTokenizer(name, folder, tokenizer, rows or max(tokenizer.get_vocab().values()) + 1)


@st.composite
def changes(draw: st.DrawFn) -> Mapping[str, Any]:
    """What sets a tokenizer apart from the template."""
    return {
        "special": draw(st.lists(st.sampled_from(ADDED[:5]), unique=True, max_size=4)),
        "plain": draw(st.lists(st.sampled_from(ADDED[5:]), unique=True, max_size=2)),
        "merges": draw(st.integers(0, 6)),
        "padding": draw(st.integers(0, 9)),
    }


def changed(name: str, folder: Path, template: Path, how: Mapping[str, Any]) -> SourceTokenizer:
    def change(content: dict[str, Any]) -> None:
        drop_merges(content, how["merges"])
        add_tokens(content, how["special"])
        add_tokens(content, how["plain"], special=False)

    made = owner(name, folder, template, change)
    return SourceTokenizer(name, made.folder, made.tokenizer, made.rows + how["padding"])


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    how=st.lists(changes(), min_size=2, max_size=3),
    anchor=st.integers(0, 1),
    texts=st.lists(TEXTS, min_size=1, max_size=4),
)
def test_any_conflict_is_merged_as_promised(
    how: list[Mapping[str, Any]],
    anchor: int,
    texts: list[str],
    template: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    check_conflict(how, anchor, texts, template, tmp_path_factory.mktemp("conflict"))


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    how=st.lists(changes(), min_size=2, max_size=3),
    anchor=st.integers(0, 1),
    texts=st.lists(TEXTS, min_size=1, max_size=4),
    named=st.sampled_from(SENTENCE_PIECE),
)
def test_any_conflict_of_sentencepiece_is_merged_as_promised(
    how: list[Mapping[str, Any]],
    anchor: int,
    texts: list[str],
    named: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    root = tmp_path_factory.mktemp("conflict")
    template = sentence_piece_tokenizer(root / "template", named)
    check_conflict(how, anchor, texts, template, root)


def check_conflict(
    how: Sequence[Mapping[str, Any]], anchor: int, texts: Sequence[str], template: Path, root: Path
) -> None:
    owners = [changed("abc"[i], root / "abc"[i], template, one) for i, one in enumerate(how)]
    first = owners[anchor]
    spaced = first.kind == "SentencePiece BPE"
    union = merge(owners, first.name, first.name)
    tokens = union.tokenizer.get_vocab()

    # The anchor's ids stay; the others' added tokens follow without a gap; nothing else is there.
    assert all(tokens[token] == number for token, number in first.tokens.items())
    theirs = {
        t
        for o in owners
        for t in (*how[owners.index(o)]["special"], *how[owners.index(o)]["plain"])
    }
    new = sorted(set(tokens) - set(first.tokens), key=tokens.__getitem__)
    assert set(new) == theirs - set(first.tokens)
    start = max(first.tokens.values()) + 1
    assert [tokens[token] for token in new] == list(range(start, start + len(new)))
    assert sorted(t for of in union.added.values() for t in of) == sorted(new)
    assert union.size == max(first.rows, start + len(new))
    # What others can only make by merges is lost, by name.
    for other in owners:
        if other is not first:
            missing = set(other.tokens) - set(tokens)
            assert set(union.lost[other.name]) == missing and not union.unused[other.name]

    # Segmentation: the anchor's, where the text has no token that only others have.
    for text in texts:
        ids = encode(union.tokenizer, text)
        back = str(union.tokenizer.decode(ids))
        # SentencePiece puts a space before a text, or before what follows a token.
        assert (back.replace(" ", "") == text.replace(" ", "")) if spaced else (back == text)
        if not any(token in text for token in new):
            assert ids == encode(first.tokenizer, text)
            assert back == first.tokenizer.decode(ids)
        else:
            assert any(number >= start for number in ids)
        if not any(token in text for token in ADDED):
            assert back.strip(" ") == text.strip(" ")

    # Rows: each token is found where its owner has it, by what it says.
    for one in owners:
        table = union.tables[one.name]
        for token, number in tokens.items():
            assert int(table.rows[number]) == one.tokens.get(token, -1)
            assert (number in table.pieces) is (token not in one.tokens)
        for number, pieces in table.pieces.items():
            token = next(t for t, n in tokens.items() if n == number)
            spelled = encode(one.tokenizer, token) if token in theirs else None
            assert pieces and (spelled is None or pieces == spelled)
            said = "".join(one.tokenizer.convert_ids_to_tokens(pieces))
            assert said == ("▁" + token if spaced and token in theirs else token)
        rest = set(range(union.size)) - set(tokens.values())
        own = set(one.tokens.values())
        assert {n for n in rest if table.known[n]} == {n for n in rest if n < one.rows} - own


# Whole builds


def a_pair(root: Path, variant: str = "llama", **sections: Any) -> Path:
    """A recipe of `a` and `b`: b has four more special tokens (of which its text makes use) in a
    table padded to 310 rows, and lacks one of a's."""
    path = make_recipe(root, variant, count=2, **sections)
    rewrite(root / "models" / "a", lambda content: add_tokens(content, ["<|only_a|>"]))
    make_model(root / "models" / "a", variant, 0, vocab_size=301)
    rewrite(root / "models" / "a", lambda content: add_tokens(content, ["<|only_a|>"]))
    make_model(root / "models" / "b", variant, 1, vocab_size=310)
    rewrite(root / "models" / "b", lambda content: add_tokens(content, ADDED[:4]))
    lines = (root / "b.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"].replace(" alpha", " <|fim|>alpha") for line in lines]
    (root / "b.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_pair(tmp_path_factory.mktemp("pair"))


def table(sources: Sequence[Source], name: str, tensor: str) -> Tensor:
    source = next(source for source in sources if source.name == name)
    return torch.cat([rows for _, rows in source.table(tensor)])


def test_a_table_in_the_union_has_each_row_in_its_place(pair: Path) -> None:
    """Rows by content; the mean of its pieces for a token that a source lacks; zeros for padding
    that it has not."""
    sources = open_sources(load_recipe(pair))
    alone = {s.name: open_source(s.name, load_recipe(pair).sources[s.name]) for s in sources}
    tokens = sources[0].tokenizer.get_vocab()
    assert sources[0].config.vocab_size == sources[1].config.vocab_size == 305
    assert [tokens[token] for token in ADDED[:4]] == [301, 302, 303, 304]
    for tensor in (EMBEDDING, HEAD):
        a, b = alone["a"].read(tensor), alone["b"].read(tensor)
        assert torch.equal(table(sources, "a", tensor)[:301], a)
        ours = table(sources, "b", tensor)
        assert torch.equal(ours[:300], b[:300]) and torch.equal(ours[301:], b[300:304])
        pieces = encode(alone["b"].tokenizer, "<|only_a|>")
        assert len(pieces) > 2
        torch.testing.assert_close(ours[300], b[pieces].mean(dim=0))
        pieces = encode(alone["a"].tokenizer, "<|fim|>")
        torch.testing.assert_close(table(sources, "a", tensor)[301], a[pieces].mean(dim=0))
    assert sources[0].known is not None and sources[1].known is not None
    assert sources[0].known.tolist() == [True] * 301 + [False] * 4
    assert sources[1].known.tolist() == [True] * 300 + [False] + [True] * 4


@pytest.mark.parametrize("rows", [1, 7, 8192])
def test_a_table_is_the_same_in_blocks_of_any_size(
    rows: int, pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = open_sources(load_recipe(pair))
    whole = table(sources, "b", EMBEDDING)
    monkeypatch.setattr("symphony_moe.sources.source.TABLE_ROWS", rows)
    blocks = list(next(s for s in sources if s.name == "b").table(EMBEDDING))
    assert [first for first, _ in blocks] == list(range(0, 305, rows))
    assert torch.equal(torch.cat([block for _, block in blocks]), whole)


def test_padding_is_kept_where_it_is_and_zero_where_there_is_none(tmp_path: Path) -> None:
    """Of 301 and 310 rows for the same 300 tokens the output has the anchor's number; a padding row
    of both is the mean, and of the anchor alone the anchor's."""
    path = make_recipe(tmp_path, "llama", count=2)
    make_model(tmp_path / "models" / "a", "llama", 0, vocab_size=301)
    make_model(tmp_path / "models" / "b", "llama", 1, vocab_size=310)
    for anchor, size in (("a", 301), ("b", 310)):
        sources = open_sources(load_recipe(path, [f"anchor={anchor}"]))
        recipe = load_recipe(path, [f"anchor={anchor}"])
        ours = {s.name: open_source(s.name, recipe.sources[s.name]).read(HEAD) for s in sources}
        fused = torch.cat(
            [rows for _, _, rows in fused_tables(recipe, sources, [HEAD], Alignment())]
        )
        assert len(fused) == size
        torch.testing.assert_close(fused[:301], (ours["a"] + ours["b"][:301]) / 2)
        assert torch.equal(fused[301:], ours["b"][301:size])
    assert not table(sources, "a", HEAD)[301:].any()


@pytest.mark.parametrize(
    ("variant", "method"),
    mostly_slow(
        itertools.product(["llama", "llama-tied-rope3", "qwen2"], ["symphony", "harmonized"]),
        ("llama-tied-rope3", "harmonized"),
    ),
)
def test_different_vocabularies_build_verify_and_load(
    method: str, variant: str, tmp_path: Path
) -> None:
    """By both methods, tied and not, in shards: stock transformers loads it, its tokenizer has the
    union, and what one source alone has is exactly that source's."""
    path = a_pair(tmp_path, variant, output={"dtype": "float32", "max_shard_size": "50KB"})
    recipe = load_recipe(path, [f"method={method}", "fit.epochs=0.5"])
    run = pipeline.run(recipe, tmp_path / "run")
    for folder in (run.checkpoint, run.trained):
        assert weight_of(load_stock(folder).get_input_embeddings()).shape == (305, 32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert {t: tokenizer.get_vocab()[t] for t in ("<|only_a|>", "<|fim|>")} == {
            "<|only_a|>": 300,
            "<|fim|>": 301,
        }
        assert encode(tokenizer, "alpha<|fim|>beta") == encode(
            recipe_tokenizer(recipe), "alpha<|fim|>beta"
        )
    sources = open_sources(recipe)
    embeddings = weight_of(load_stock(run.checkpoint).get_input_embeddings())
    if method == "symphony":
        assert torch.equal(embeddings[300], table(sources, "a", EMBEDDING)[300])
        assert torch.equal(embeddings[301:], table(sources, "b", EMBEDDING)[301:])
    losses = run.read_json(run.metrics)
    for stage in ("built", "trained"):
        assert all(0 < loss < 20 for loss in losses[stage].values())
    planned = run.read_json(run.plan)
    assert planned["config"]["vocab_size"] == 305


@pytest.mark.parametrize("named", SENTENCE_PIECE)
@pytest.mark.parametrize("method", mostly_slow(["symphony", "harmonized"], "symphony"))
def test_sentencepiece_models_with_different_tokens_build_and_verify(
    method: str, named: str, tmp_path: Path
) -> None:
    """As Llama 2 and Code Llama: b has infilling tokens and merges of its own, in another order."""
    path = make_recipe(tmp_path, "llama", count=2, anchor="a")
    more = ["▁<PRE>", "▁<SUF>", "▁<MID>"]

    def infilling(content: dict[str, Any]) -> None:
        drop_merges(content, 2)
        add_tokens(content, more)

    size = len(AutoTokenizer.from_pretrained(sentence_piece_tokenizer(tmp_path / "of", named)))
    for seed, (name, rows) in enumerate({"a": size, "b": size + 1}.items()):
        model = tmp_path / "models" / name
        make_model(model, "llama", seed, vocab_size=rows, bos_token_id=1, eos_token_id=2)
        sentence_piece_tokenizer(model, named)
    rewrite(tmp_path / "models" / "b", infilling)
    run = pipeline.build(
        load_recipe(path, [f"method={method}", "fit.epochs=0.5"]), tmp_path / "run"
    )
    pipeline.verify(run)
    sources = open_sources(load_recipe(path))
    written = AutoTokenizer.from_pretrained(run.checkpoint)
    assert [written.get_vocab()[token] for token in more] == [size, size + 1, size + 2]
    assert len(written) == weight_of(load_stock(run.checkpoint).get_input_embeddings()).shape[0]
    for text in ("alpha beta~", " 日本  1", "x\n\n  y", "▁<PRE>alpha ▁<SUF> beta▁<MID>"):
        assert encode(written, text) == encode(sources[0].tokenizer, text)
        if "<" not in text:
            assert encode(written, text) == encode(sources[0].own_tokenizer, text)
    with_fill = encode(written, "▁<PRE>alpha ▁<SUF> beta▁<MID>")
    assert [number for number in with_fill if number >= size] == [size, size + 1, size + 2]
    if method == "symphony":
        ours = weight_of(load_stock(run.checkpoint).get_input_embeddings())
        b = open_source("b", load_recipe(path).sources["b"]).read(EMBEDDING)
        assert torch.equal(ours[size:], b[size - 2 : size + 1])


def recipe_tokenizer(recipe: Any) -> PreTrainedTokenizerBase:
    return open_sources(recipe)[0].tokenizer


def test_the_order_of_the_sources_does_not_change_the_ids(tmp_path: Path) -> None:
    """Law 4 with three vocabularies."""
    path = make_recipe(tmp_path, "llama", count=3)
    for place, name in enumerate("bc"):
        make_model(tmp_path / "models" / name, "llama", 7 + place, vocab_size=303 + place)
        new = ADDED[place : place + 3 + place]
        rewrite(tmp_path / "models" / name, partial(add_tokens, tokens=new))
    recipe = load_recipe(path, ["anchor=a"])
    turned = recipe.model_copy(
        update={"sources": {name: recipe.sources[name] for name in reversed(recipe.sources)}}
    )
    one, other = (open_sources(r)[0].vocabulary for r in (recipe, turned))
    assert one is not None and other is not None
    assert one.files == other.files and one.added == other.added
    tables = [
        torch.cat(
            [rows for _, _, rows in fused_tables(r, open_sources(r), [EMBEDDING], Alignment())]
        )
        for r in (recipe, turned)
    ]
    assert torch.equal(*tables)


@pytest.mark.slow
def test_numbers_say_nothing(tmp_path: Path) -> None:
    """The same model with its tokens under other numbers and its rows moved along gives the same
    checkpoint, tensor by tensor, by either method."""
    made = []
    for shuffled in (False, True):
        root = tmp_path / str(shuffled)
        path = make_recipe(root, "llama", count=2, anchor="a")
        if shuffled:
            _shuffle(root / "models" / "b")
        for method in ("symphony", "harmonized"):
            recipe = load_recipe(path, [f"method={method}", "fit.epochs=0.5"])
            run = pipeline.build(recipe, root / method)
            made.append(run.read_json(run.manifest)["tensors"]["checkpoint"])
    assert made[:2] == made[2:]


def weight_of(layer: Any) -> Tensor:
    weight: Tensor = layer.weight
    return weight


def _shuffle(model: Path) -> None:
    """Renumber every token but the special ones."""
    generator = torch.Generator().manual_seed(0)
    old = torch.cat((torch.randperm(256, generator=generator), torch.arange(256, 300)))
    loaded: Any = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for layer in (loaded.get_input_embeddings(), loaded.get_output_embeddings()):
            weight = weight_of(layer)
            weight.copy_(weight[old].clone())
    loaded.save_pretrained(model)
    new = torch.argsort(old).tolist()

    def renumber(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        content["model"]["vocab"] = {token: new[n] for token, n in vocabulary.items()}

    rewrite(model, renumber)


def test_a_source_is_evaluated_on_the_tokens_that_it_has(pair: Path) -> None:
    """In the union's numbers a source computes what it computes in its own; it gives nothing to
    tokens that it lacks, and where the text has one, it is not asked."""
    sources = open_sources(load_recipe(pair))
    alone = load_stock(open_source("b", load_recipe(pair).sources["b"]).folder)
    model = load_source(next(s for s in sources if s.name == "b"))
    own = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    own[0, 5], own[1, 7] = 300, 303  # <|fim|> and another of b's own
    union = torch.where(own >= 300, own + 1, own)
    with torch.no_grad():
        ours, theirs = model(union).logits, alone(own).logits
    assert torch.equal(ours[..., :300], theirs[..., :300])
    assert torch.equal(ours[..., 301:], theirs[..., 300:304])

    known = next(s for s in sources if s.name == "b").known
    expected = cross_entropy(
        theirs[:, :-1, :304].flatten(0, 1), own[:, 1:].flatten(), reduction="none"
    )
    nats = negative_log_likelihood(ours, union, known)
    torch.testing.assert_close(nats, expected)
    text = {"x": torch.cat((union, torch.full((2, 1), 300), union[:, :1]), dim=1)}
    losses, _ = losses_and_routing(model, text, known)
    with torch.no_grad():
        logits = model(text["x"]).logits
    asked = torch.ones(2, 21, dtype=torch.bool)
    asked[:, 19] = False  # <|only_a|> is not its own
    logits[..., 300] = -torch.inf
    wanted = text["x"][:, 1:]
    each = cross_entropy(logits[:, :-1][asked], wanted[asked])
    assert losses["x"] == pytest.approx(float(each), rel=1e-6)
    losses, _ = losses_and_routing(model, {"x": torch.full((2, 9), 300)}, known)
    assert math.isnan(losses["x"]), "asked nothing, it is not perfect"


def test_tables_that_transformers_does_not_read_are_not_put_into_a_source(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the union's numbers a source is compared with itself no more: before that, it is."""
    source = next(s for s in open_sources(load_recipe(pair)) if s.name == "b")
    read = Source.read

    def other(self: Source, name: str, rows: slice | None = None) -> Any:
        return read(self, name, rows) * (1.01 if name == source.head_name else 1)

    monkeypatch.setattr(Source, "read", other)
    with pytest.raises(VerificationError, match=r"^b: lm_head.weight is another in transformers"):
        load_source(source)


def test_chats_go_through_the_template_of_their_own_source(tmp_path: Path) -> None:
    """And what the template says is cut by the union's tokenizer."""
    path = a_pair(tmp_path)
    (tmp_path / "models" / "b" / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    chats = [
        {"messages": [{"role": "user", "content": f"{number} alpha beta gamma delta"}]}
        for number in range(400)
    ]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, chats)))
    recipe = load_recipe(path, ["method=harmonized", "fit.epochs=0"])
    sources = open_sources(recipe)
    windows = Texts(recipe, sources).calibration_windows()["b"].windows
    start, end = (sources[0].tokenizer.get_vocab()[f"<|im_{x}|>"] for x in ("start", "end"))
    assert (windows == start).any() and (windows == end).any()


def test_the_chat_conventions_may_be_another_sources(tmp_path: Path) -> None:
    """Template, end and padding token, generation config: named by output.chat, their numbers the
    union's. Else all are the anchor's."""
    path = a_pair(tmp_path)
    b = tmp_path / "models" / "b"
    (b / "chat_template.jinja").write_text("{{ messages }}<|im_end|>")
    config = json.loads((b / "tokenizer_config.json").read_text())
    config |= {"eos_token": "<|im_end|>", "pad_token": "<|tool|>"}
    (b / "tokenizer_config.json").write_text(json.dumps(config))
    generation = {
        "eos_token_id": [302, 257],
        "pad_token_id": 303,
        "temperature": 0.5,
        "do_sample": True,
    }
    (b / "generation_config.json").write_text(json.dumps(generation))
    config = json.loads((b / "config.json").read_text()) | {"eos_token_id": [302, 257]}
    (b / "config.json").write_text(json.dumps(config))
    for chat in ("a", "b"):
        run = pipeline.build(load_recipe(path, [f"output.chat={chat}"]), tmp_path / chat)
        tokenizer = AutoTokenizer.from_pretrained(run.checkpoint)
        settings = json.loads((run.checkpoint / "generation_config.json").read_text())
        config = json.loads((run.checkpoint / "config.json").read_text())
        end, ends = (303, [303, 257]) if chat == "b" else (257, 257)
        assert (tokenizer.eos_token_id, config["eos_token_id"]) == (end, ends)
        assert tokenizer.bos_token_id == config["bos_token_id"] == 256
        assert tokenizer.chat_template == ("{{ messages }}<|im_end|>" if chat == "b" else None)
        if chat == "b":
            assert settings["eos_token_id"] == [303, 257] and settings["temperature"] == 0.5
            assert settings["pad_token_id"] == config["pad_token_id"] == tokenizer.pad_token_id
            assert tokenizer.pad_token == "<|tool|>"
        else:
            assert "temperature" not in settings
        pipeline.verify(run)
    (b / "generation_config.json").unlink()
    run = pipeline.build(load_recipe(path, ["output.chat=b"]), tmp_path / "none")
    settings = json.loads((run.checkpoint / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [303, 257] and settings["pad_token_id"] == 304


CHATS = {
    "one": "{{ messages }}",
    "line ends of another system": "{{ messages }}\r\nx",
    "several": {"default": "{{ messages }}", "rag": "RAG", "tool_use": "TOOLS"},
    "no default": {"rag": "RAG"},
    "none": None,
}


def write_templates(model: Path, templates: Any, how: str) -> None:
    """As files, or in the tokenizer's config."""
    if how == "config":
        path = model / "tokenizer_config.json"
        listed = templates
        if isinstance(templates, dict):
            listed = [{"name": name, "template": text} for name, text in templates.items()]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": listed}))
        return
    named = templates if isinstance(templates, dict) else {"default": templates}
    (model / "additional_chat_templates").mkdir()
    for name, text in named.items():
        where = model if name == "default" else model / "additional_chat_templates"
        file = "chat_template.jinja" if name == "default" else f"{name}.jinja"
        if text is not None:
            (where / file).write_text(text)


@pytest.mark.parametrize(
    ("kind", "chat", "how"),
    mostly_slow(
        itertools.product(CHATS, ["a", "b"], ["config", "files"]),
        ("several", "a", "config"),
        ("several", "b", "files"),
    ),
)
def test_every_chat_template_is_carried(kind: str, chat: str, how: str, tmp_path: Path) -> None:
    """The anchor's, or those of the chat's source and none of the anchor's; into training too."""
    path = a_pair(tmp_path)
    for name in "ab":
        other = {"default": "{{ 'other' }}", "other": "OTHER"}
        write_templates(tmp_path / "models" / name, CHATS[kind] if name == chat else other, how)
    stock = AutoTokenizer.from_pretrained(tmp_path / "models" / chat).chat_template
    assert how == "files" or stock == CHATS[kind]
    run = pipeline.build(load_recipe(path, [f"output.chat={chat}"]), tmp_path / "run")
    assert AutoTokenizer.from_pretrained(run.checkpoint).chat_template == stock
    pipeline.verify(run)
    if kind == "several" and how == "files":
        pipeline.train(run)
        assert AutoTokenizer.from_pretrained(run.trained).chat_template == stock
        pipeline.verify(run)


@pytest.mark.parametrize("rows", [301, 302])
def test_a_token_of_other_flags_is_named(
    rows: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where two have one token, and one of them takes the spaces beside it: the anchor's way. With
    tables of one size, or not."""
    path = make_recipe(tmp_path, "llama", count=2)
    for name, wide in (("a", False), ("b", True)):
        model = tmp_path / "models" / name
        make_model(model, "llama", 0, vocab_size=rows if wide else 301)
        rewrite(model, partial(add_tokens, tokens=["<|x|>"], lstrip=wide))
    assert main(["plan", str(path)]) == 0
    out = capsys.readouterr().out
    assert "added token '<|x|>' (b: lstrip; the result: plain): text around 1 of b's is cut" in out


def test_the_chat_conventions_may_differ_where_the_vocabulary_does_not(tmp_path: Path) -> None:
    path = make_recipe(tmp_path, "llama", count=2)
    (tmp_path / "models" / "b" / "chat_template.jinja").write_text("{{ messages }}")
    run = pipeline.build(load_recipe(path, ["output.chat=b"]), tmp_path / "run")
    assert AutoTokenizer.from_pretrained(run.checkpoint).chat_template == "{{ messages }}"
    other = pipeline.build(load_recipe(path), tmp_path / "other")
    manifests = [r.read_json(r.manifest)["tensors"]["checkpoint"] for r in (run, other)]
    assert manifests[0] == manifests[1]


# What cannot be merged


@pytest.mark.parametrize("rows", [300, 301, 320])
@pytest.mark.parametrize("command", ["plan", "build"])
def test_kinds_of_tokenizers_that_cannot_be_compared_are_refused(
    command: str, rows: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the same tokens (and tables of one size, or not) or others."""
    path = make_recipe(tmp_path, "llama", count=2)

    def words(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        content["model"] = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<s>"}
        add_tokens(content, ["<|x|>"] if rows == 301 else [])

    make_model(tmp_path / "models" / "b", "llama", 1, vocab_size=rows)
    rewrite(tmp_path / "models" / "b", words)
    out = ["--out", str(tmp_path / "out")] if command == "build" else []
    assert main([command, str(path), "--set", "output.chat=b", *out]) == 2
    error = capsys.readouterr().err
    assert "kind of tokenizer (a: byte-level BPE; b: WordLevel): no tokenizer can" in error
    assert "Traceback" not in error
    sources = [open_source(n, load_recipe(path).sources[n]) for n in "ab"]
    owners = [source.source_tokenizer for source in sources]
    with pytest.raises(SourceError, match="tokenizers of different kinds cannot be merged"):
        merge(owners, "a", "a")


def test_an_end_that_is_no_token_is_said_to_be_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """-1 of old configs, and numbers of padding rows; and it is not the same as no end."""
    path = a_pair(tmp_path)
    for model, number in (("a", None), ("b", -1)):
        config = tmp_path / "models" / model / "config.json"
        content = json.loads(config.read_text())
        config.write_text(json.dumps(content | {"pad_token_id": number}))
    assert main(["plan", str(path)]) == 0
    assert "pad_token_id (a: None; b: -1, which is no token)" in capsys.readouterr().out
    assert main(["plan", str(path), "--set", "output.chat=b"]) == 2
    error = capsys.readouterr().err
    assert "b: pad_token_id of its config.json has -1, which is no token" in error


@pytest.mark.parametrize("method", ["symphony", "harmonized"])
def test_a_source_of_weight_0_keeps_what_it_alone_has(method: str, tmp_path: Path) -> None:
    path = a_pair(tmp_path)
    settings = ["backbone.weights={a: 1, b: 0}", f"method={method}", "fit.epochs=0"]
    run = pipeline.build(load_recipe(path, settings), tmp_path / "run")
    pipeline.verify(run)
    if method == "symphony":
        sources = open_sources(load_recipe(path))
        embeddings = weight_of(load_stock(run.checkpoint).get_input_embeddings())
        for rows, owner_ in ((slice(301), "a"), (slice(301, 305), "b")):
            assert torch.equal(embeddings[rows], table(sources, owner_, EMBEDDING)[rows])


def test_an_anchor_whose_tokenizer_has_no_json_is_refused(template: Path, tmp_path: Path) -> None:
    one = owner("a", tmp_path / "a", template, lambda content: None)
    two = owner("b", tmp_path / "b", template, lambda content: add_tokens(content, ["<|x|>"]))
    (tmp_path / "a" / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=r"a: .* has no tokenizer.json"):
        merge([one, two], "a", "a")
    merge([one, two], "b", "b")
    # But where nothing is added, what its class made of its files is written.
    alike = owner("c", tmp_path / "c", template, lambda content: drop_merges(content, 1))
    assert merge([one, alike], "a", "a").tokenizer.get_vocab() == one.tokens


def test_an_anchor_without_json_may_have_a_padded_table(tmp_path: Path) -> None:
    path = make_recipe(tmp_path, "qwen2", count=2)
    make_model(tmp_path / "models" / "b", "qwen2", 1, vocab_size=320)
    for name in "ab":
        in_two_files(tmp_path / "models" / name)
    run = pipeline.build(load_recipe(path), tmp_path / "run")
    own = AutoTokenizer.from_pretrained(tmp_path / "models" / "a")
    written = AutoTokenizer.from_pretrained(run.checkpoint)
    assert all(encode(written, text) == encode(own, text) for text in CUT_BY_CLASS)


def test_a_chat_source_that_is_none_is_refused(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(pair), "--set", "output.chat=c"]) == 2
    assert "output.chat: 'c' is no source" in capsys.readouterr().err


def test_special_tokens_that_are_lost_cannot_be_chats(template: Path, tmp_path: Path) -> None:
    one = owner("a", tmp_path / "a", template, lambda content: drop_merges(content, 5))
    two = owner("b", tmp_path / "b", template, lambda content: None)
    lost = merge([one, two], "a", "a").lost["b"]
    two = replace(two, generation={"eos_token_id": two.tokens[lost[0]]})
    with pytest.raises(SourceError, match=r"b: its special token .* is not in the merged"):
        merge([one, two], "a", "b")


def test_a_plan_says_what_becomes_of_every_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = a_pair(tmp_path)
    b = tmp_path / "models" / "b"

    def more(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["alphabeta"] = max(t["id"] for t in content["added_tokens"]) + 1
        content["model"]["merges"].append(["alpha", "beta"])

    rewrite(b, more)
    assert main(["plan", str(path)]) == 0
    out = capsys.readouterr().out
    assert "4 of b's come after the anchor's, as 301 to 304: '<|fim|>'" in out
    assert "1 of b's are lost, as text is cut as by a: 'alphabeta'" in out
    assert "b lacks 1 of the others' and reads their pieces instead" in out
    assert (
        "vocab_size (a: 301; b: 310): rows are matched by their tokens; the output has 305" in out
    )


def test_one_vocabulary_needs_no_union(template: Path, tmp_path: Path) -> None:
    one, two = (owner(n, tmp_path / n, template, lambda content: None) for n in "ab")
    assert not is_needed([one, two], "a", "a") and is_needed([one, two], "a", "b")
    assert is_needed([one, SourceTokenizer("b", two.folder, two.tokenizer, two.rows + 1)], "a", "a")


def test_characters_that_the_anchor_cannot_spell_are_lost(template: Path, tmp_path: Path) -> None:
    def drop(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        last = max(vocabulary, key=vocabulary.__getitem__)
        vocabulary[last] = vocabulary.pop("~")

    one = owner("a", tmp_path / "a", template, drop)
    two = owner("b", tmp_path / "b", template, lambda content: None)
    union = merge([one, two], "a", "a")
    assert union.lost == {"b": ["~"]} and not union.added["b"]


def test_bytes_that_the_anchor_has_no_token_for_are_lost(tmp_path: Path) -> None:
    """No merge leads to them, but `~`, which is no letter here, does."""
    template = sentence_piece_tokenizer(tmp_path / "template", "PreTrainedTokenizerFast")

    def drop(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["<unused>"] = vocabulary.pop("<0x7E>")

    one = owner("a", tmp_path / "a", template, drop)
    two = owner("b", tmp_path / "b", template, lambda content: None)
    assert two.tokens["<0x7E>"] in encode(two.tokenizer, "~")
    assert merge([one, two], "a", "a").lost == {"b": ["<0x7E>"]}
    assert merge([one, two], "b", "b").unused == {"a": ["<unused>"]}


def test_what_no_merge_leads_to_is_no_loss(template: Path, tmp_path: Path) -> None:
    """Placeholders in a vocabulary, which no text becomes."""

    def placeholder(content: dict[str, Any]) -> None:
        content["model"]["vocab"]["<unused>"] = 300

    one = owner("a", tmp_path / "a", template, lambda content: None)
    two = owner("b", tmp_path / "b", template, placeholder)
    union = merge([one, two], "a", "a")
    assert "<unused>" in two.tokens and union.lost == {"b": []}
    assert union.unused == {"b": ["<unused>"]}


def test_a_placeholder_that_only_one_has_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And so the vocabularies are not said to be the same."""
    path = make_recipe(tmp_path, "llama", count=2)
    make_model(tmp_path / "models" / "b", "llama", 1, vocab_size=301)
    rewrite(tmp_path / "models" / "b", lambda c: c["model"]["vocab"].update({"<unused>": 300}))
    assert main(["plan", str(path)]) == 0
    out = capsys.readouterr().out
    assert "301 tokens): 1 of b's are left out, as no text becomes them: '<unused>'" in out


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram", "BPE that ignores merges"])
def test_where_no_merges_are_heeded_every_missing_token_is_lost(
    kind: str, template: Path, tmp_path: Path
) -> None:
    def one_more(content: dict[str, Any], *, more: Sequence[str]) -> None:
        model = content["model"]
        model["vocab"] |= {token: 300 + place for place, token in enumerate(more)}
        if kind == "WordPiece":
            content["model"] = {
                "type": kind,
                "vocab": model["vocab"],
                "unk_token": "!",
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100,
            }
        elif kind == "Unigram":
            pieces = [[token, -1.0] for token in model["vocab"]]
            content["model"] = {"type": kind, "unk_id": 0, "vocab": pieces}
        else:
            model["ignore_merges"] = True

    one = owner("a", tmp_path / "a", template, partial(one_more, more=[]))
    two = owner("b", tmp_path / "b", template, partial(one_more, more=["zzz"]))
    assert encode(two.tokenizer, "zzz") == [300] != encode(one.tokenizer, "zzz")
    union = merge([one, two], "a", "a")
    assert (union.lost, union.unused) == ({"b": ["zzz"]}, {"b": []})


def test_an_added_token_that_the_anchor_has_but_cannot_make_is_lost(
    template: Path, tmp_path: Path
) -> None:
    """Text is cut as by the anchor, to which it is a placeholder."""

    def ordinary(content: dict[str, Any]) -> None:
        drop_merges(content, 1)
        content["model"]["vocab"]["<|fim|>"] = 299

    one = owner("a", tmp_path / "a", template, ordinary)
    two = owner("b", tmp_path / "b", template, lambda content: add_tokens(content, ["<|fim|>"]))
    union = merge([one, two], "a", "a")
    assert union.added == {"b": []} and "<|fim|>" in union.lost["b"]
    assert len(encode(union.tokenizer, "<|fim|>")) > 1 == len(encode(two.tokenizer, "<|fim|>"))


def test_what_another_source_brings_is_not_lost(template: Path, tmp_path: Path) -> None:
    """b makes it by a merge, c has it as an added token."""

    def merged(content: dict[str, Any]) -> None:
        content["model"]["merges"].append(["alpha", "beta"])
        content["model"]["vocab"]["alphabeta"] = 300

    one = owner("a", tmp_path / "a", template, lambda content: None)
    two = owner("b", tmp_path / "b", template, merged)
    three = owner("c", tmp_path / "c", template, lambda c: add_tokens(c, ["alphabeta"]))
    assert merge([one, two, three], "a", "a").lost == {"b": [], "c": []}
    assert merge([one, two], "a", "a").lost == {"b": ["alphabeta"]}


def test_added_tokens_are_written_wherever_the_anchor_lists_them(
    template: Path, tmp_path: Path
) -> None:
    """Older files list them twice more, and transformers believes the configuration: a token that
    is missing there would be lost."""
    one = owner("a", tmp_path / "a", template, lambda content: add_tokens(content, ADDED[:1]))
    two = owner("b", tmp_path / "b", template, lambda content: add_tokens(content, ADDED[:3]))
    path = one.folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    listed = {"300": {"content": ADDED[0], "special": True, **flags}}
    path.write_text(json.dumps(config | {"added_tokens_decoder": listed}))
    (one.folder / "added_tokens.json").write_text(json.dumps({ADDED[0]: 300}))
    union = merge([one, two], "a", "a")
    assert [union.tokenizer.get_vocab()[token] for token in ADDED[:3]] == [300, 301, 302]
    written = {name: json.loads(union.files[name]) for name in union.files if "json" in name}
    decoder = written["tokenizer_config.json"]["added_tokens_decoder"]
    assert {number: token["content"] for number, token in decoder.items()} == {
        "300": ADDED[0],
        "301": ADDED[1],
        "302": ADDED[2],
    }
    assert written["added_tokens.json"] == dict(zip(ADDED[:3], (300, 301, 302), strict=True))


def test_numbers_that_transformers_would_not_give_are_refused(
    template: Path, tmp_path: Path
) -> None:
    """An anchor with a hole in its numbers: its library counts on from the number of tokens."""

    def hole(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        last = max(vocabulary, key=vocabulary.__getitem__)
        vocabulary[last] += 50

    one = owner("a", tmp_path / "a", template, hole)
    two = owner("b", tmp_path / "b", template, lambda content: add_tokens(content, ADDED[:1]))
    with pytest.raises(SourceError, match=r"a: transformers gives the added tokens other numbers"):
        merge([one, two], "a", "a")


def test_tokens_that_the_anchors_class_adds_by_itself_are_written_down(
    template: Path, tmp_path: Path
) -> None:
    """Qwen2's adds <|endoftext|> where no file lists it; what comes after is numbered after it."""

    def without(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["<other>"] = vocabulary.pop("<|endoftext|>")

    folders = {}
    lists: dict[str, list[str]] = {"a": [], "b": ADDED[:2]}
    for name, more in lists.items():
        made = owner(name, tmp_path / name, template, without)
        rewrite(made.folder, partial(add_tokens, tokens=more))
        (made.folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
        tokenizer = AutoTokenizer.from_pretrained(made.folder)
        folders[name] = SourceTokenizer(name, made.folder, tokenizer, 310)
    one, two = folders["a"], folders["b"]
    assert one.tokens["<|endoftext|>"] == 300
    union = merge([one, two], "a", "a")
    tokens = union.tokenizer.get_vocab()
    assert [tokens[t] for t in ("<|endoftext|>", *ADDED[:2])] == [300, 301, 302]
    listed = json.loads(union.files["tokenizer.json"])["added_tokens"]
    assert [t["id"] for t in listed][-3:] == [300, 301, 302]
    # And text is cut as by that class (digits one by one), wherever the files are read.
    assert type(union.tokenizer) is type(one.tokenizer)
    for text in ("alpha 123 beta's", "x\n\n  y", "日本 42"):
        assert encode(union.tokenizer, text) == encode(one.tokenizer, text)


# Transformers takes a class by the family of the model, and the result's is another


def digits_merged(content: dict[str, Any]) -> None:
    """`12` and `zz` (to which no merge leads) are tokens; to the class of Qwen2, which takes digits
    one by one and heeds merges, they are two each."""
    model = content["model"]
    model["ignore_merges"] = True
    model["vocab"]["zz"] = model["vocab"].pop("~")
    left, right = model["merges"].pop()
    model["merges"].append(["1", "2"])
    model["vocab"]["12"] = model["vocab"].pop(left + right)


def sentence_piece(content: dict[str, Any]) -> None:
    """A space before everything, as Llama 2's file says it; to Llama's class, before the text."""
    vocabulary = content["model"]["vocab"]
    vocabulary["▁"] = vocabulary.pop("Ġ")
    vocabulary["<unk>"] = vocabulary.pop("~")
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    content["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": "▁"}, space],
    }
    content["pre_tokenizer"] = None
    content["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "Fuse"},
        ],
    }


def dress(folder: Path, named: str | None, change: Callable[[dict[str, Any]], Any]) -> None:
    """Name another class, or none, in a tokenizer's files, and change its rules."""
    rewrite(folder, change)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": named}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


CLASSES: dict[str, tuple[str, str | None, Callable[[dict[str, Any]], Any]]] = {
    "Qwen2 without a class": ("qwen2", None, digits_merged),
    "Qwen2 with a generic class": ("qwen2", "PreTrainedTokenizerFast", digits_merged),
    "Qwen2 with its class": ("qwen2", "Qwen2Tokenizer", digits_merged),
    "Qwen3 without a class": ("qwen3", None, digits_merged),
    "Llama with the class of Qwen2": ("llama", "Qwen2Tokenizer", digits_merged),
    "Llama 2": ("llama", "LlamaTokenizer", sentence_piece),
}
"""(family, class that is named, what its rules are instead)."""
CUT_BY_CLASS = (
    "alpha 12 beta's",
    "zz alpha",
    "a</s> beta",
    "x\n\n  y",
    "e\u0301 日本 42",
    " alpha",
    "</s>12",
)


@pytest.mark.parametrize(
    ("case", "union"),
    mostly_slow(itertools.product(CLASSES, [False, True]), *((case, True) for case in CLASSES)),
)
def test_the_result_cuts_text_as_its_anchor_does(case: str, union: bool, tmp_path: Path) -> None:
    """Whatever class the anchor's family or files gave it: as in calibration, special tokens
    included."""
    variant, named, change = CLASSES[case]
    path = make_recipe(tmp_path, variant, count=2)
    if union:
        make_model(tmp_path / "models" / "b", variant, 1, vocab_size=302)
    for name in "ab":
        dress(tmp_path / "models" / name, named, change)
    if union:
        rewrite(tmp_path / "models" / "b", partial(add_tokens, tokens=ADDED[:2]))
    run = pipeline.build(load_recipe(path, ["anchor=a"]), tmp_path / "run")
    anchor = open_sources(load_recipe(path))[0]
    written = AutoTokenizer.from_pretrained(run.checkpoint)
    assert written.get_vocab() == anchor.tokenizer.get_vocab()
    assert written.special_tokens_map == anchor.own_tokenizer.special_tokens_map
    for text in CUT_BY_CLASS:
        assert written(text)["input_ids"] == anchor.own_tokenizer(text)["input_ids"]
        assert encode(written, text) == encode(anchor.tokenizer, text)
        ids = encode(anchor.own_tokenizer, text)
        assert written.decode(ids) == anchor.own_tokenizer.decode(ids)
    # By its name or by the family, in any version.
    config = json.loads((run.checkpoint / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == type(anchor.own_tokenizer).__name__


def test_a_result_has_a_tokenizer_where_only_the_anchors_class_could_make_one(
    tmp_path: Path,
) -> None:
    path = make_recipe(tmp_path, "qwen2", count=2)
    for name in "ab":
        in_two_files(tmp_path / "models" / name)
    run = pipeline.build(load_recipe(path), tmp_path / "run")
    tokenizer = open_sources(load_recipe(path))[0].tokenizer
    written = AutoTokenizer.from_pretrained(run.checkpoint)
    assert written.get_vocab() == tokenizer.get_vocab()
    for text in CUT_BY_CLASS:
        assert encode(written, text) == encode(tokenizer, text)


ANY_CLASS = "PreTrainedTokenizerFast"


@pytest.mark.parametrize("named", ["TokenizersBackend", "PreTrainedTokenizerFast", None])
def test_files_that_say_all_stay_as_they_are(named: str | None, tmp_path: Path) -> None:
    """Byte for byte, whether their class is generic or does no more than they say."""
    path = make_recipe(tmp_path, "llama" if named else "qwen2", count=2)
    model = tmp_path / "models" / "a"
    if named:
        dress(model, named, lambda content: None)
    else:
        AutoTokenizer.from_pretrained(model).save_pretrained(model)
    run = pipeline.build(load_recipe(path), tmp_path / "run")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        kept, theirs = ((folder / file).read_bytes() for folder in (run.checkpoint, model))
        if named == "TokenizersBackend" and file == "tokenizer_config.json":
            # Neither older transformers nor llama.cpp's converter know the name.
            assert json.loads(kept) == json.loads(theirs) | {"tokenizer_class": ANY_CLASS}
        else:
            assert kept == theirs


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("union", [False, True])
def test_tokens_that_only_a_class_adds_need_rows(union: bool, named: bool, tmp_path: Path) -> None:
    """Code Llama's adds five for filling in the middle. Where the model has no rows for them they
    are left out, the plan says so, and the result has none; what a file lists is refused as
    ever."""
    path = make_recipe(tmp_path, "llama", count=2, anchor="a")
    if union:
        make_model(tmp_path / "models" / "b", "llama", 1, vocab_size=302)
    for name in "ab":
        model = tmp_path / "models" / name
        dress(model, "CodeLlamaTokenizer", sentence_piece)
        config = json.loads((model / "tokenizer_config.json").read_text())
        roles = {"prefix_token": "▁<PRE>", "fill_token": "<FILL_ME>"} if named else {}
        (model / "tokenizer_config.json").write_text(json.dumps(config | roles))
    if union:
        rewrite(tmp_path / "models" / "b", partial(add_tokens, tokens=ADDED[:2]))
    loaded = AutoTokenizer.from_pretrained(tmp_path / "models" / "a")
    assert len(loaded) == 305
    anchor = open_sources(load_recipe(path))[0]
    assert max(anchor.own_tokenizer.get_vocab().values()) == 299
    assert all(anchor.own_tokenizer(t)["input_ids"] == loaded(t)["input_ids"] for t in CUT_BY_CLASS)
    said = "a: the model has no rows for '▁<PRE>', '▁<MID>', '▁<SUF>', '▁<EOT>', .."
    assert any(note.startswith(said) for note in pipeline.plan(load_recipe(path)).notes)
    run = pipeline.build(load_recipe(path), tmp_path / "run")
    pipeline.verify(run)
    written = AutoTokenizer.from_pretrained(run.checkpoint)
    assert len(written) == (302 if union else 300)
    assert written.special_tokens_map == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    for text in CUT_BY_CLASS:
        assert written(text)["input_ids"] == loaded(text)["input_ids"]
        assert written.decode(encode(written, text)) == loaded.decode(encode(loaded, text))
    rewrite(tmp_path / "models" / "a", partial(add_tokens, tokens=["▁<PRE>"]))
    with pytest.raises(SourceError, match=r"a: the tokenizer in .* has 30. tokens"):
        open_sources(load_recipe(path))


@pytest.mark.parametrize(
    ("variant", "union"),
    mostly_slow(
        itertools.product(COMMON, [False, True]),
        *itertools.product(["llama-tied-rope3", "qwen2"], [False, True]),
    ),
)
def test_no_reader_has_to_know_the_newest_class_name(
    variant: str, union: bool, tmp_path: Path
) -> None:
    """`TokenizersBackend` is what transformers 5 writes of a tokenizer of no class of its own."""
    path = make_recipe(tmp_path, variant, count=2)
    for name in "ab":
        folder = tmp_path / "models" / name
        config = json.loads((folder / "tokenizer_config.json").read_text())
        changed = config | {"tokenizer_class": "TokenizersBackend"}
        (folder / "tokenizer_config.json").write_text(json.dumps(changed))
    if union:
        make_model(tmp_path / "models" / "b", variant, 1, vocab_size=302)
        rewrite(tmp_path / "models" / "b", partial(add_tokens, tokens=ADDED[:2]))
    run = pipeline.build(load_recipe(path), tmp_path / "run")
    written = json.loads((run.checkpoint / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] != "TokenizersBackend"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"extra_special_tokens": []}, {}),
        ({"extra_special_tokens": ["<s>"]}, {"additional_special_tokens": ["<s>"]}),
        (
            {
                "extra_special_tokens": ["<s>", "</s>"],
                "additional_special_tokens": [{"content": "<s>"}],
            },
            {"additional_special_tokens": [{"content": "<s>"}, "</s>"]},
        ),
        (
            {"extra_special_tokens": ["</s>"], "additional_special_tokens": "<s>"},
            {"additional_special_tokens": ["<s>", "</s>"]},
        ),
        (
            {"extra_special_tokens": {"image_token": "<s>"}},
            {"extra_special_tokens": {"image_token": "<s>"}},
        ),
    ],
)
def test_lists_of_special_tokens_have_the_name_that_all_versions_know(
    said: dict[str, Any], expected: dict[str, Any], template: Path, tmp_path: Path
) -> None:
    """A list of `extra_special_tokens` ends the loading in transformers 4.57, where it is a
    table."""
    one = owner("a", tmp_path / "a", template, lambda content: None)
    path = one.folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for key in ("extra_special_tokens", "additional_special_tokens"):
        config.pop(key, None)
    path.write_text(json.dumps(config | said))
    written = json.loads(tokenizer_files(one)["tokenizer_config.json"])
    assert {key: written[key] for key in written if key.endswith("special_tokens")} == expected


@pytest.mark.parametrize("listed", [False, True])
def test_added_tokens_are_listed_beside_a_tokenizer_model(
    listed: bool, template: Path, tmp_path: Path
) -> None:
    """llama.cpp's converter reads that, added_tokens.json and added_tokens_decoder, and not
    tokenizer.json: what only that lists would be lost."""
    own = "<|own|>"
    one = owner("a", tmp_path / "a", template, lambda content: add_tokens(content, [own]))
    two = owner("b", tmp_path / "b", template, lambda content: add_tokens(content, ADDED[:2]))
    (one.folder / "tokenizer.model").write_bytes(b"read by others")
    if listed:
        (one.folder / "added_tokens.json").write_text(json.dumps({own: 300}))
    for files, expected in (
        (tokenizer_files(one), {own: 300}),
        (merge([one, two], "a", "a").files, {own: 300, ADDED[0]: 301, ADDED[1]: 302}),
    ):
        assert json.loads(files["added_tokens.json"]) == expected
        decoder = json.loads(files["tokenizer_config.json"])["added_tokens_decoder"]
        backend = json.loads(files["tokenizer.json"])
        assert {(int(n), t["content"], t["special"]) for n, t in decoder.items()} == {
            (t["id"], t["content"], t["special"]) for t in backend["added_tokens"]
        }


# Details that a union could get wrong without anyone noticing


def test_the_pieces_of_a_token_are_those_of_its_text_alone(template: Path, tmp_path: Path) -> None:
    """As a user writes it, and no BOS among them, whose embedding would be in the token's mean."""
    token = "<| 日本 |>"
    one = owner("a", tmp_path / "a", template, lambda content: add_tokens(content, [token]))
    two = owner("b", tmp_path / "b", template, with_beginning)
    assert two.tokenizer(token)["input_ids"][0] == 256
    pieces = merge([one, two], "a", "a").tables["b"].pieces
    assert pieces == {300: encode(two.tokenizer, token)}


def test_a_token_that_a_source_makes_nothing_of_is_its_unknown_token(
    template: Path, tmp_path: Path
) -> None:
    """Or refused, where it has none."""

    def without_tilde(content: dict[str, Any]) -> None:
        content["model"]["vocab"]["<unk>"] = content["model"]["vocab"].pop("~")

    one = owner("a", tmp_path / "a", template, lambda content: add_tokens(content, ["~~"]))
    two = owner("b", tmp_path / "b", template, without_tilde)
    assert encode(two.tokenizer, "~~") == []
    with pytest.raises(SourceError, match=r"b: its tokenizer makes nothing of the token '~"):
        merge([one, two], "a", "a")
    two.tokenizer.unk_token = "<unk>"
    pieces = merge([one, two], "a", "a").tables["b"].pieces
    assert pieces[300] == [two.tokens["<unk>"]] != [0]


def test_added_tokens_stay_what_they_were_to_text(template: Path, tmp_path: Path) -> None:
    """Special or not, and the spaces that they take along."""

    def more(content: dict[str, Any]) -> None:
        add_tokens(content, ["<|plain|>"], special=False, lstrip=True)
        add_tokens(content, ["<|special|>"], single_word=True)

    one = owner("a", tmp_path / "a", template, lambda content: None)
    two = owner("b", tmp_path / "b", template, more)
    union = merge([one, two], "a", "a").tokenizer
    assert union.added_tokens_decoder == two.tokenizer.added_tokens_decoder
    for text in ("alpha  <|plain|> beta", "alpha<|special|>beta <|special|>"):
        assert encode(union, text) == encode(two.tokenizer, text)


def chat_pair(template: Path, root: Path, **ours: Any) -> list[SourceTokenizer]:
    """`a` with a template in each place, and `b` with settings of its own in its configuration."""
    made = [owner(name, root / name, template, lambda content: None) for name in "ab"]
    configs = {"a": {"chat_template": "a's"}, "b": ours}
    owners = []
    for one in made:
        path = one.folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | configs[one.name]))
        tokenizer = AutoTokenizer.from_pretrained(one.folder)
        owners.append(SourceTokenizer(one.name, one.folder, tokenizer, one.rows))
    (root / "a" / "chat_template.jinja").write_text("a's file")
    (root / "a" / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return owners


def test_nothing_is_left_of_the_anchors_templates(template: Path, tmp_path: Path) -> None:
    """Whatever file they were in; several templates stay several."""
    owners = chat_pair(template, tmp_path / "none")
    assert merge(owners, "a", "b").tokenizer.chat_template is None
    several = [{"name": n, "template": f"b's {n}"} for n in ("default", "tool_use")]
    owners = chat_pair(template, tmp_path / "several", chat_template=several)
    union = merge(owners, "a", "b").tokenizer
    assert union.chat_template == {"default": "b's default", "tool_use": "b's tool_use"}


def test_every_file_has_the_chat_sources_end_token(template: Path, tmp_path: Path) -> None:
    owners = chat_pair(template, tmp_path, eos_token="<|endoftext|>")
    union = merge(owners, "a", "b")
    written = json.loads(union.files["special_tokens_map.json"])
    assert written == {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
    assert union.tokenizer.eos_token == "<|endoftext|>"
    assert union.settings == {"eos_token_id": 258, "pad_token_id": None}
    own = merge(owners, "a", "a")
    assert own.settings == {} and own.generation is None


def two_with_one_each(
    template: Path, root: Path, special: Mapping[str, Any]
) -> list[SourceTokenizer]:
    """`a` and `b` with a token of its own each, of the same number."""
    one = owner("a", root / "a", template, lambda content: add_tokens(content, ["<|x|>"]))
    two = owner("b", root / "b", template, lambda content: add_tokens(content, ["<|y|>"]))
    return [one, replace(two, special=special)]


def test_all_token_numbers_of_a_generation_config_are_translated_and_no_others(
    template: Path, tmp_path: Path
) -> None:
    owners = two_with_one_each(template, tmp_path, {})
    numbers = {
        "eos_token_id": [300, 257],
        "bos_token_id": 256,
        "pad_token_id": None,
        "decoder_start_token_id": 300,
        "forced_bos_token_id": 300,
        "forced_eos_token_id": [300],
        "suppress_tokens": [256, 300],
        "begin_suppress_tokens": [300],
        "bad_words_ids": [[300, 256], [257]],
        "force_words_ids": [[[300]]],
        "sequence_bias": [[[300, 256], -10.0]],
    }
    others = {"max_length": 300, "temperature": 300.0}
    owners[1] = replace(owners[1], generation=numbers | others)
    translated = json.loads(json.dumps(numbers).replace("300", "301"))
    assert merge(owners, "a", "b").generation == translated | others


@pytest.mark.parametrize("number", [301, 309, -1, True, "</s>"])
def test_numbers_of_no_token_are_not_translated_to_none(
    number: Any, template: Path, tmp_path: Path
) -> None:
    owners = two_with_one_each(template, tmp_path, {"eos_token_id": [257, number]})
    with pytest.raises(SourceError, match=r"^b: eos_token_id of its config.json has .* no token"):
        merge(owners, "a", "b")
    generation = {"suppress_tokens": [[257, number]]}
    owners[1] = replace(owners[1], special={}, generation=generation)
    with pytest.raises(SourceError, match=r"^b: suppress_tokens of its generation_config.json has"):
        merge(owners, "a", "b")


def test_the_ends_of_a_chat_sources_config_are_translated(template: Path, tmp_path: Path) -> None:
    """All of them; its tokenizer's, where the config has none."""
    owners = two_with_one_each(template, tmp_path, {"eos_token_id": [300, 257]})
    owners[1].tokenizer.pad_token = "<|y|>"
    assert merge(owners, "a", "b").settings == {"eos_token_id": [301, 257], "pad_token_id": 301}


def test_the_anchors_padding_token_does_not_outlive_the_chat_sources(
    template: Path, tmp_path: Path
) -> None:
    owners = chat_pair(template, tmp_path)
    listed = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<s>"}
    (tmp_path / "a" / "special_tokens_map.json").write_text(json.dumps(listed))
    union = merge(owners, "a", "b")
    written = json.loads(union.files["special_tokens_map.json"])
    assert written == {"bos_token": "<s>", "eos_token": "</s>"}
    assert union.tokenizer.pad_token is None


def test_files_that_make_no_tokenizer_are_a_message(template: Path, tmp_path: Path) -> None:
    one = owner("a", tmp_path / "a", template, lambda content: None)
    two = owner("b", tmp_path / "b", template, lambda content: add_tokens(content, ["<|x|>"]))
    rewrite(one.folder, lambda content: content.update(pre_tokenizer={"type": "None such"}))
    with pytest.raises(SourceError, match=r"a: its tokenizer with the others' tokens is not usab"):
        merge([one, two], "a", "a")


def test_the_pieces_of_a_merged_token_are_spelled_in_bytes(template: Path, tmp_path: Path) -> None:
    """`Ġa` is a space and an a; as text, Ġ is a letter of two bytes."""

    def spaced(content: dict[str, Any]) -> None:
        drop_merges(content, 1)
        content["model"]["merges"].append(["Ġ", "a"])
        content["model"]["vocab"]["Ġa"] = len(content["model"]["vocab"])

    one = owner("a", tmp_path / "a", template, spaced)
    two = owner("b", tmp_path / "b", template, lambda content: None)
    pieces = merge([one, two], "a", "a").tables["b"].pieces
    assert pieces == {one.tokens["Ġa"]: encode(two.tokenizer, " a")}
    assert two.tokenizer.convert_ids_to_tokens(pieces[one.tokens["Ġa"]]) == ["Ġ", "a"]


def test_generation_stops_at_the_ends_of_all_sources(tmp_path: Path) -> None:
    """Each source's documents end with its own EOS, so the result learns all of them, and its
    generation config lists them; `plan` says so. The order of the recipe changes nothing."""
    path = make_recipe(tmp_path, "llama", count=2)
    config = tmp_path / "models" / "b" / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"eos_token": "<|endoftext|>"}))
    recipe = load_recipe(path, ["method=btx"])
    assert any(
        "b: its documents end with '<|endoftext|>'" in n for n in pipeline.plan(recipe).notes
    )
    run = pipeline.build(recipe, tmp_path / "run")
    written = json.loads((run.checkpoint / "generation_config.json").read_text())
    assert written["eos_token_id"] == [257, 258]
    assert AutoModelForCausalLM.from_pretrained(run.checkpoint).generation_config.eos_token_id == [
        257,
        258,
    ]
    alike = pipeline.build(load_recipe(make_recipe(tmp_path / "x")), tmp_path / "alike")
    alone = json.loads((alike.checkpoint / "generation_config.json").read_text())
    assert alone["eos_token_id"] == 257


def test_a_begin_that_the_union_lacks_is_a_message(tmp_path: Path) -> None:
    """A post-processor may put an ordinary token before a text, which no union has to have."""
    path = a_pair(tmp_path)

    def change(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary["[B]"] = 309
        special = {"[B]": {"id": "[B]", "ids": [vocabulary["[B]"]], "tokens": ["[B]"]}}
        single = [
            {"SpecialToken": {"id": "[B]", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ]
        content["post_processor"] |= {"single": single, "special_tokens": special}

    rewrite(tmp_path / "models" / "b", change)
    with pytest.raises(SourceError, match=r"puts '\[B\]' before every text"):
        pipeline.plan(load_recipe(path))
