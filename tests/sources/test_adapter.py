"""LoRA adapters: what is read is what peft itself makes of model and adapter."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import checks
from checks import make_adapter
from conftest import make_model, make_recipe, make_tokenizer
from symphony_moe import pipeline
from symphony_moe.building.plan import make_plan
from symphony_moe.cli import main
from symphony_moe.errors import SourceError
from symphony_moe.evaluation.losses import losses_and_routing
from symphony_moe.model.families import EMBEDDING, HEAD
from symphony_moe.recipe.load import load_recipe
from symphony_moe.recipe.settings import SourceSpec
from symphony_moe.sources.adapter import FILES, Adapter
from symphony_moe.sources.opening import open_source, open_sources
from symphony_moe.sources.source import Source
from symphony_moe.sources.stock import load_source
from symphony_moe.text.texts import Texts

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "model", "qwen2-untied", 0)


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {
        "rank_pattern": {"layers.1.self_attn.q_proj": 3},
        "alpha_pattern": {"v_proj": 5},
    },
    "everywhere": {"target_modules": "all-linear"},
    "one layer": {"layers_to_transform": [1]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "whole tables": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "biases": {"bias": "all"},
    "embeddings": {"target_modules": ["q_proj", "v_proj", "embed_tokens"]},
    "both tables": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "token rows": {"trainable_token_indices": [299, 5, 7]},
    "token rows of both": {"trainable_token_indices": {"embed_tokens": [4, 8], "lm_head": [6]}},
    "norms": {"modules_to_save": ["norm", "input_layernorm"]},
    "a regex": {"target_modules": r".*\.(q|up)_proj", "exclude_modules": r".*\.0\.mlp.*"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "eva": {"init_lora_weights": "eva"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "OLoRA"},
    "dora olora": {"init_lora_weights": "olora", "use_dora": True},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "lora_ga": {"init_lora_weights": "lora_ga"},
    "mica": {"init_lora_weights": "mica"},
}


FEW = {"one layer": 3, "head": 3, "embeddings": 5, "both tables": 4, "a regex": 3}
"""Tensors that a kind changes, where they are fewer."""


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_what_peft_makes_of_it(kind: str, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", **KINDS[kind])
    spec = SourceSpec(model=str(base), data="x.txt", adapter=str(adapter))
    source = open_source("a", spec)
    merged = peft.PeftModel.from_pretrained(loaded(base), adapter).merge_and_unload().state_dict()
    own = loaded(base).state_dict()
    changed = 0
    for name in source.headers:
        found = source.read(name)
        torch.testing.assert_close(found, merged[name], atol=1e-6, rtol=1e-6, msg=name)
        # Products of fewer rows may be added up in another order.
        torch.testing.assert_close(source.read(name, slice(3, 9)), found[3:9], atol=1e-6, rtol=1e-6)
        changed += not torch.equal(found, own[name])
    assert changed >= FEW.get(kind, 6)
    assert torch.equal(merged[Q], own[Q]) is False


@pytest.mark.parametrize("kind", ["head", "dora head", "whole tables"])
def test_a_table_is_merged_once_in_whatever_blocks_it_is_read(
    kind: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its rows by itself, to the same bits; a block never merges rows that are not its
    own."""
    settings = KINDS.get(kind, {"target_modules": ["lm_head"], "use_dora": True})
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    spec = SourceSpec(model=str(base), data="x.txt", adapter=str(adapter))
    source = open_source("a", spec)
    whole = source.read(HEAD)
    merged: list[int] = []
    merge = Adapter.merge

    def counted(self: Adapter, tensor: str, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        found = merge(self, tensor, weight, rows)
        merged.append(len(found))
        return found

    monkeypatch.setattr(Adapter, "merge", counted)
    monkeypatch.setattr("symphony_moe.sources.source.TABLE_ROWS", 64)
    assert torch.equal(torch.cat([rows for _, rows in source.table(HEAD)]), whole)
    assert merged == [64, 64, 64, 64, 44]


def test_a_run_with_an_adapter_is_a_run_with_the_merged_model(base: Path, tmp_path: Path) -> None:
    """Same tensors, same losses; its files are pinned."""
    path = make_recipe(tmp_path, "qwen2-untied", count=2)
    shutil.copytree(base, tmp_path / "models" / "b", dirs_exist_ok=True)
    adapter = make_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    merged: Any = peft.PeftModel.from_pretrained(loaded(base), adapter).merge_and_unload()
    runs = []
    content = json.loads(path.read_text())
    content["sources"]["b"]["adapter"] = "adapter"
    path.write_text(json.dumps(content))
    recipe = load_recipe(path)
    assert recipe.sources["b"].adapter == str(adapter)
    windows = Texts(recipe, open_sources(recipe)).held_out_text()
    expected, _ = losses_and_routing(merged, windows)
    runs.append(pipeline.build(recipe, tmp_path / "with-adapter"))
    pipeline.verify(runs[0])
    found = pipeline.evaluate(runs[0]).sources["b"]
    assert found == pytest.approx(expected, rel=1e-6)
    sha256 = runs[0].read_recipe().sources["b"].sha256
    assert sha256 is not None and "adapter/adapter_model.safetensors" in sha256

    merged.save_pretrained(tmp_path / "models" / "b")
    del content["sources"]["b"]["adapter"]
    path.write_text(json.dumps(content))
    runs.append(pipeline.build(load_recipe(path), tmp_path / "merged"))
    hashes = [run.read_json(run.manifest)["tensors"]["checkpoint"] for run in runs]
    assert hashes[0] == hashes[1]

    tensors = load_file(adapter / FILES[1])
    save_file({k: v * 2 for k, v in tensors.items()}, adapter / FILES[1])
    with pytest.raises(SourceError, match=r"b: .*adapter.* has changed"):
        pipeline.verify(runs[0])


@pytest.mark.parametrize("other", [True, False])
def test_an_adapter_is_named_with_the_model_it_was_trained_on(
    other: bool, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the plan, the model card and the report, without the machine's paths; said aloud where it
    is another than the source's."""
    path = make_recipe(tmp_path, "qwen2-untied", count=2)
    adapter = make_adapter(base, tmp_path / "my-lora")
    with_settings(base_model_name_or_path="some/else-7b" if other else "some/b")(adapter)
    content = json.loads(path.read_text())
    content["sources"]["b"]["adapter"] = "./my-lora"
    path.write_text(json.dumps(content))
    assert main(["plan", str(path)]) == 0
    said, name = capsys.readouterr().out, "some/else-7b" if other else "some/b"
    assert f"  b: b, with the LoRA my-lora of {name} (" in said
    note = f"b: its adapter was trained on {name}, and is merged into b; are they the same model?"
    assert (note in said) is other
    run = pipeline.build(load_recipe(path), tmp_path / "out")
    card = (run.checkpoint / "README.md").read_text()
    assert f"| 1 | b | b, with the LoRA my-lora of {name} |" in card
    assert card.startswith(f"---\nbase_model:\n- {name}\nlibrary_name:")
    assert "none stated and, for its adapter, none stated" in card
    assert "adapter: my-lora" in card and str(tmp_path) not in card
    described = run.read_json(run.plan)["sources"][1]
    assert (described["adapter"], described["adapter_base"]) == ("my-lora", name)
    assert f"b, with the LoRA my-lora, trained on {name}</td>" in pipeline.report(run).read_text()


def without_weights(adapter: Path) -> None:
    (adapter / FILES[1]).rename(adapter / "adapter_model.bin")


def other_method(adapter: Path) -> None:
    config = json.loads((adapter / FILES[0]).read_text())
    (adapter / FILES[0]).write_text(json.dumps(config | {"peft_type": "IA3"}))


def no_json(adapter: Path) -> None:
    (adapter / FILES[0]).write_text("{")


def cut_short(adapter: Path) -> None:
    (adapter / FILES[1]).write_bytes((adapter / FILES[1]).read_bytes()[:100])


def change(adapter: Path, how: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(adapter / FILES[1])
    how(tensors)
    save_file(tensors, adapter / FILES[1])


def another_layer(adapter: Path) -> None:
    def move(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.1." in name]:
            tensors[name.replace("layers.1.", "layers.7.")] = tensors.pop(name)

    change(adapter, move)


def another_size(adapter: Path) -> None:
    change(adapter, lambda t: t.update({k: torch.zeros(4, 31) for k in t if "lora_A" in k}))


def not_finite(adapter: Path) -> None:
    change(adapter, lambda t: [tensor.fill_(torch.nan) for tensor in t.values()])


def without(part: str) -> Callable[[Path], None]:
    """Leave out tensors of the second layer."""

    def damage(adapter: Path) -> None:
        change(adapter, lambda t: [t.pop(k) for k in list(t) if part in k and "layers.1" in k])

    return damage


def no_tensors(adapter: Path) -> None:
    change(adapter, lambda t: t.clear())


def rank_of_a(adapter: Path) -> None:
    change(adapter, lambda t: t.update({k: v[:2].clone() for k, v in t.items() if "lora_A" in k}))


def with_settings(**settings: Any) -> Callable[[Path], None]:
    def damage(adapter: Path) -> None:
        config = json.loads((adapter / FILES[0]).read_text())
        (adapter / FILES[0]).write_text(json.dumps(config | settings))

    return damage


NO_FIT = "do not fit its tensors for model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no such adapter folder"),
        (without_weights, "has no adapter_model.safetensors (found: README.md, adapter_config"),
        (other_method, "is of type 'IA3'; expected 'LORA'"),
        (no_json, "adapter_config.json is not usable"),
        (cut_short, "is not readable"),
        (another_layer, "which the model has not"),
        (another_size, "is [4, 31], for a tensor of"),
        (not_finite, "NaN or infinite"),
        (no_tensors, "holds no tensors"),
        (without("lora_A"), "has no model.layers.1.mlp.down_proj.lora_A.weight"),
        (without("lora_B"), "has no model.layers.1.mlp.down_proj.lora_B.weight"),
        (with_settings(use_dora=True), "has no model.layers.0.mlp.down_proj.lora_magnitude_vector"),
        (rank_of_a, NO_FIT),
        (with_settings(r=8), NO_FIT),
        (with_settings(rank_pattern={"down_proj": 3}), NO_FIT),
        (with_settings(r=0), NO_FIT),
        (with_settings(lora_alpha=None), NO_FIT),
    ],
)
def test_an_adapter_that_does_not_fit_is_a_message(
    damage: Callable[[Path], Any],
    message: str,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Named before anything is built, but for values that only reading shows."""
    path = make_recipe(tmp_path, "qwen2-untied", count=2)
    damage(make_adapter(base, tmp_path / "adapter"))
    content = json.loads(path.read_text())
    content["sources"]["b"]["adapter"] = "./adapter"
    path.write_text(json.dumps(content))
    command = "build" if damage is not_finite else "plan"
    out = ["--out", str(tmp_path / "out")] if command == "build" else []
    assert main([command, str(path), *out]) == 2
    error = capsys.readouterr().err
    assert "symphony: error: b: " in error and message in error and "Traceback" not in error
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_an_adapter_that_began_with_the_whole_head_is_refused(base: Path, tmp_path: Path) -> None:
    """A block of the head has another decomposition."""
    settings: dict[str, Any] = {
        "target_modules": ["q_proj", "lm_head"],
        "init_lora_weights": "pissa",
    }
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    with pytest.raises(SourceError, match=r"^a: .* decomposition of the head \(pissa\)"):
        open_source("a", SourceSpec(model=str(base), data="x.txt", adapter=str(adapter)))


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"trainable_token_indices": {"embed_tokens": [4, 8], "lm_head": [6]}},
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_tied_embeddings_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    """peft's merged model has a new table as embeddings and the old one as head, or the reverse."""
    base = make_model(tmp_path / "model", "qwen2", 0)
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    with pytest.raises(SourceError, match=r"^a: .*, and the model's head is its embeddings"):
        open_source("a", SourceSpec(model=str(base), data="x.txt", adapter=str(adapter)))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 rows more than tokens."""
    return make_model(tmp_path_factory.mktemp("tied") / "model", "qwen2", 0, vocab_size=320)


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 rows more than tokens, and a head of its own."""
    folder = tmp_path_factory.mktemp("padded") / "model"
    return make_model(folder, "qwen2-untied", 0, vocab_size=320)


def opened(base: Path, adapter: Path) -> Source:
    return open_source("a", SourceSpec(model=str(base), data="x.txt", adapter=str(adapter)))


BOTH = {"modules_to_save": ["embed_tokens", "lm_head"]}
TABLES: dict[str, dict[str, Any]] = {
    "grown, saved": BOTH | {"rows": 323},
    "grown, kept": {"rows": 323},
    "grown, token rows": {"rows": 323, "trainable_token_indices": [320, 322]},
    "shrunk, saved": BOTH | {"rows": 303},
    "shrunk, kept": {"rows": 303},
    "saved": BOTH,
    "saved as one": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "token rows": {"trainable_token_indices": [3, 310]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("which", ["tied", "padded"])
def test_tables_are_those_that_peft_ends_with(
    kind: str, which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Grown, shrunk, or two where the model has one: rows, ties and logits."""
    base: Path = request.getfixturevalue(which)
    settings = TABLES[kind]
    source = opened(base, make_adapter(base, tmp_path / "adapter", **settings))
    own = loaded(base)
    if rows := settings.get("rows"):
        own.resize_token_embeddings(rows)
    merged: Any = peft.PeftModel.from_pretrained(own, tmp_path / "adapter").merge_and_unload()
    tensors = {
        EMBEDDING: merged.get_input_embeddings().weight,
        source.head_name: merged.get_output_embeddings().weight,
    }
    assert source.config.tie_word_embeddings == merged.config.tie_word_embeddings
    assert source.config.vocab_size == source.own_rows == len(tensors[EMBEDDING])
    for name, expected in tensors.items():
        assert torch.equal(source.read(name), expected)
        assert torch.equal(source.read(name, slice(290, 400)), expected[290:])
        assert torch.equal(torch.cat([rows for _, rows in source.table(name)]), expected)
    ids = torch.tensor([[1, 299, 302, 5, 4]])
    with torch.no_grad():
        found, expected = (m.eval()(ids).logits for m in (load_source(source), merged))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_rows_that_were_added_and_trained_one_by_one_need_no_table(
    tied: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"rows": 322, "trainable_token_indices": [321, 320], "save": False}
    source = opened(tied, make_adapter(tied, tmp_path / "adapter", **settings))
    table = source.read(EMBEDDING)
    assert table.shape == (322, 32) and source.config.vocab_size == 322
    assert torch.equal(table[:320], loaded(tied).get_input_embeddings().weight)
    trained = load_file(tmp_path / "adapter" / FILES[1])
    rows = next(value for name, value in trained.items() if "trainable_tokens" in name)
    assert torch.equal(table[320:], rows.flip(0))
    assert torch.equal(source.read(EMBEDDING, slice(321, 400)), table[321:])


def test_rows_that_were_added_are_not_looked_for_in_the_models_file(
    tied: Path, tmp_path: Path
) -> None:
    """What stands behind the table there is another tensor, or the end of the file."""
    base = tmp_path / "base"
    shutil.copytree(tied, base, ignore=shutil.ignore_patterns("*.safetensors"))
    loaded(tied).save_pretrained(base, max_shard_size="20KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    settings: dict[str, Any] = {"rows": 322, "trainable_token_indices": [321, 320], "save": False}
    source = opened(base, make_adapter(base, tmp_path / "adapter", **settings))
    assert source.read(EMBEDDING).shape == source.read(EMBEDDING, slice(0, 8192)).shape == (322, 32)
    assert source.read(EMBEDDING, slice(321, 8192)).shape == (1, 32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [320, 322]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
)
def test_tables_that_the_file_has_not_whole_are_refused_with_the_way_out(
    settings: dict[str, Any], padded: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(padded, tmp_path / "adapter", rows=323, save=False, **settings)
    with pytest.raises(SourceError, match=r"^a: .* tables of 323 rows, the model has 320") as error:
        opened(padded, adapter)
    assert "m.resize_token_embeddings(323)" in str(error.value)
    merge_as_told(str(error.value), padded, adapter, tmp_path / "merged")
    assert checks.opened(tmp_path / "merged").own_rows == 323


def merge_as_told(message: str, model: Path, adapter: Path, folder: Path) -> None:
    """Run the lines of Python that a message ends with."""
    assert len(message) < 500
    lines = [line.strip() for line in message.splitlines() if line.startswith("  ")]
    assert 3 <= len(lines) <= 5
    names = {"MODEL": str(model), "ADAPTER": str(adapter), "FOLDER": str(folder)}
    torch.manual_seed(0)
    exec("\n".join(lines), names)
    make_tokenizer(folder, bos=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tied_model_merged_as_told_computes_what_was_trained(
    target: str, tied: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tied, tmp_path / "adapter", target_modules=["q_proj", target])
    with pytest.raises(SourceError, match="head is its embeddings") as error:
        opened(tied, adapter)
    merge_as_told(str(error.value), tied, adapter, tmp_path / "merged")
    ids = torch.tensor([[1, 299, 302, 5, 4]])
    trained = peft.PeftModel.from_pretrained(loaded(tied), adapter).eval()
    with torch.no_grad():
        found = load_source(checks.opened(tmp_path / "merged"))(ids).logits
        torch.testing.assert_close(found, trained(ids).logits, atol=1e-5, rtol=1e-5)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "alora": ({"alora_invocation_tokens": [3, 4]}, "is an activated LoRA: it works only behind"),
    "arrow": ({"arrow_config": {"top_k": 1}}, "routes between adapters"),
    "qalora": ({"use_qalora": True}, "is of a GPTQ model"),
    "megatron": ({"megatron_config": {"a": 1}}, "Megatron's parallel layers"),
    "layers": ({"layer_replication": [[0, 2], [1, 2]]}, "repeats layers of its model; merge it"),
    "bias": ({"lora_bias": True}, "adds biases beside its matrices; merge it"),
    "parameters": ({"target_parameters": ["a"]}, "names parameters, not modules; merge it"),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, "block-diagonal matrices (BD-LoRA); merge it"),
    "velora": ({"velora_config": {"scale": 1.0}}, "is a VeLoRA; merge it"),
    "kasa": ({"kasa_config": {"beta": 1.0}}, "(KaSA); merge it"),
    "monteclora": ({"monteclora_config": {"num_samples": 2}}, "(MonteCLoRA); merge it"),
    "corda": ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
    "loftq": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "; merge it into"),
    "pissa_niter": ({"init_lora_weights": "pissa_niter_4"}, "that peft draws at random whenever"),
    "unknown": ({"init_lora_weights": "brand_new"}, "'brand_new', which is not known here"),
    "classifier": ({"task_type": "SEQ_CLS"}, "for the task 'SEQ_CLS'; expected 'CAUSAL_LM'"),
    "features": ({"task_type": "FEATURE_EXTRACTION"}, "for the task 'FEATURE_EXTRACTION'"),
    "others": ({"target_modules": ["q_proj", "v_proj"]}, "has a LoRA for model.layers.0.mlp.down"),
    "no regex": ({"target_modules": "(("}, "target_modules (or what goes with them) in"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_read_exactly_is_refused_by_name_in_plan(
    kind: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the tensors; in a few lines, with the way out."""
    settings, message = REFUSED[kind]
    path = make_recipe(tmp_path, "qwen2-untied", count=2)
    with_settings(**settings)(make_adapter(base, tmp_path / "adapter"))
    content = json.loads(path.read_text())
    content["sources"]["b"]["adapter"] = "./adapter"
    path.write_text(json.dumps(content))
    assert main(["plan", str(path)]) == 2
    error = capsys.readouterr().err
    error = error[error.index("symphony: error: b: ") :]
    assert message in error and "Traceback" not in error
    assert len(error.replace(str(tmp_path), "")) < 500
    if "; merge it into" in error:
        assert error.endswith("merge_and_unload().save_pretrained(FOLDER)\n")


def test_a_lora_with_biases_merged_as_told_is_what_peft_makes_of_it(
    base: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"target_modules": ["q_proj"], "lora_bias": True}
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    with pytest.raises(SourceError) as error:
        opened(base, adapter)
    merge_as_told(str(error.value), base, adapter, tmp_path / "merged")
    merged = peft.PeftModel.from_pretrained(loaded(base), adapter).merge_and_unload()
    expected = merged.state_dict()[Q]
    torch.testing.assert_close(checks.opened(tmp_path / "merged").read(Q), expected)


@pytest.mark.parametrize("indices", [[3], [3, 3], [3, -1], ["3", 4], {"lm_head": [3, 4]}, None])
def test_token_rows_without_their_numbers_are_refused(
    indices: Any, base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", trainable_token_indices=[3, 4])
    with_settings(trainable_token_indices=indices)(adapter)
    with pytest.raises(SourceError, match=r"^a: .* expected one number for each row"):
        opened(base, adapter)


def said(path: Path) -> list[str]:
    """The notes of a plan, of source b."""
    recipe = load_recipe(path)
    notes = make_plan(recipe, open_sources(recipe, download=False)).notes
    of_b = [note.removeprefix("b: ") for note in notes if note.startswith("b: ")]
    # What the class of a Qwen2's tokenizer does beside its file is not the adapter's.
    return [note for note in of_b if not note.startswith("tokenizer.json says")]


def with_adapter(tmp_path: Path, **settings: Any) -> tuple[Path, Path]:
    """(a recipe of two models whose second has an adapter, that adapter)."""
    path = make_recipe(tmp_path, "qwen2-untied", count=2)
    adapter = make_adapter(tmp_path / "models" / "b", tmp_path / "adapter", **settings)
    content = json.loads(path.read_text())
    content["sources"]["b"]["adapter"] = "./adapter"
    path.write_text(json.dumps(content))
    return path, adapter


def zeros(part: str) -> Callable[[Path], None]:
    def damage(adapter: Path) -> None:
        change(adapter, lambda t: [v.zero_() for k, v in t.items() if part in k])

    return damage


NOTHING = "its adapter changes nothing"


@pytest.mark.parametrize(
    ("damage", "note"),
    [
        (zeros("lora_B"), NOTHING),
        (zeros("lora_A"), NOTHING),
        (zeros("layers.0"), None),
        (with_settings(lora_alpha=0), NOTHING),
        (with_settings(lora_alpha=0, alpha_pattern={"q_proj": 3}), None),
        (with_settings(init_lora_weights="lora_ga"), "its adapter began with LoRA-GA"),
        (with_settings(brand_new=3, other_new=None), "does not know and leaves out: brand_new"),
        (
            with_settings(target_modules=["q_proj", "v_proj", "down_proj", "up_proj"]),
            "its adapter names 2 matrices that it has nothing for, first model.layers.0.mlp.up",
        ),
    ],
)
def test_a_plan_says_what_an_adapter_does_not_do(
    damage: Callable[[Path], Any], note: str | None, tmp_path: Path
) -> None:
    path, adapter = with_adapter(tmp_path)
    assert said(path) == []
    damage(adapter)
    notes = said(path)
    assert len(notes) == (note is not None)
    assert note is None or note in notes[0]


CHAT = "{% for m in messages %}<|turn|>{{ m['content'] }}{{ eos_token }}{% endfor %}"


def own_tokenizer(model: Path, folder: Path) -> Any:
    """A model's tokenizer with a token of its own, another end of text, and a template, as a
    trainer saves it beside an adapter."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"], "pad_token": "<s>"})
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return tokenizer


def chats(path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"alpha {n} beta"}]} for n in range(300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_tokenizer_beside_an_adapter_is_the_sources(tmp_path: Path) -> None:
    """Its template reads the chats, its new token keeps the row that was trained for it, its end of
    text ends texts, and its files are pinned."""
    path = make_recipe(tmp_path, "qwen2-untied", count=2, anchor="b")
    b = make_model(tmp_path / "models" / "b", "qwen2-untied", 1, vocab_size=320)
    settings: dict[str, Any] = {
        "trainable_token_indices": {"embed_tokens": [300, 310], "lm_head": [300]}
    }
    adapter = make_adapter(b, tmp_path / "adapter", **settings)
    content = json.loads(path.read_text())
    content["sources"]["b"]["adapter"] = "./adapter"
    chats(tmp_path / "b.jsonl")
    path.write_text(json.dumps(content))
    assert any("2 row(s) of no token of its tokenizer, from 300" in note for note in said(path))
    own = own_tokenizer(b, adapter)
    assert said(path) == [
        "its tokenizer is the one beside its adapter: 301 tokens, a chat template, text ends with "
        "'<|endoftext|>'",
        "its adapter trained 1 row(s) of no token of its tokenizer, from 310; they stay padding. "
        "Put the tokenizer that it was trained with beside it",
    ]
    recipe = load_recipe(path)
    a, source = open_sources(recipe)
    assert source.own_tokenizer.get_vocab() == own.get_vocab()
    assert source.config.eos_token_id == [258, 257] and source.config.pad_token_id == 256
    turn = source.tokenizer.convert_tokens_to_ids("<|turn|>")
    for name in (EMBEDDING, HEAD):
        trained = load_file(adapter / FILES[1])
        rows = next(v for k, v in trained.items() if "tokens_delta" in k and name[:-7] in k)
        assert torch.equal(torch.cat([rows for _, rows in source.table(name)])[turn], rows[0])
    assert a.known is not None and not a.known[turn]
    run = pipeline.build(recipe, tmp_path / "out")
    written = AutoTokenizer.from_pretrained(run.checkpoint)
    assert written.chat_template == CHAT and written.eos_token == "<|endoftext|>"
    generation = json.loads((run.checkpoint / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [258, 257]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        sha256 = run.read_recipe().sources["b"].sha256
        assert sha256 is not None and f"adapter/{name}" in sha256
    (adapter / "chat_template.jinja").write_text(CHAT + " ")
    with pytest.raises(SourceError, match=r"b: .*chat_template.jinja has SHA-256"):
        pipeline.verify(run)


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("of_model", ["inline", "file", "none"])
def test_a_template_or_settings_alone_beside_an_adapter_change_the_models_tokenizer(
    inline: bool, of_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYMPHONY_CACHE", str(tmp_path / "cache"))
    path, adapter = with_adapter(tmp_path)
    model = tmp_path / "models" / "b"
    settings = json.loads((model / "tokenizer_config.json").read_text())
    if of_model == "inline":
        replaced = settings | {"chat_template": "old"}
        (model / "tokenizer_config.json").write_text(json.dumps(replaced))
    if of_model == "file":
        (model / "chat_template.jinja").write_text("old")
    if inline:
        replaced = settings | {"chat_template": CHAT, "eos_token": "<|endoftext|>"}
        (adapter / "tokenizer_config.json").write_text(json.dumps(replaced))
    else:
        (adapter / "chat_template.jinja").write_text(CHAT)
    source = open_sources(load_recipe(path))[1]
    found = source.own_tokenizer
    ends = "<|endoftext|>" if inline else "</s>"
    assert (found.chat_template, found.eos_token) == (CHAT, ends)
    assert found.get_vocab() == AutoTokenizer.from_pretrained(model).get_vocab()
    assert said(path)[0].startswith(
        "its tokenizer is the model's with the files beside its adapter"
    )
    (adapter / "tokenizer_config.json").write_text("{")
    with pytest.raises(SourceError, match=r"^b: .*tokenizer_config.json"):
        open_sources(load_recipe(path))


def test_a_tokenizer_beside_an_adapter_that_has_no_rows_is_refused_with_the_way_out(
    tmp_path: Path,
) -> None:
    path, adapter = with_adapter(tmp_path)
    own_tokenizer(tmp_path / "models" / "b", adapter)
    way_out = r".*Without tokenizer files beside its adapter the model's are used$"
    with pytest.raises(SourceError, match=r"^b: .* has 301 tokens" + way_out):
        open_sources(load_recipe(path))
    (adapter / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match=r"^b: no usable tokenizer" + way_out):
        open_sources(load_recipe(path))


def test_an_adapter_on_the_hub_comes_with_its_tokenizer(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    AutoTokenizer.from_pretrained(base).save_pretrained(adapter)
    (adapter / "chat_template.jinja").write_text(CHAT)

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        snapshot = tmp_path / "snapshot"
        snapshot.mkdir()
        for pattern in allow_patterns:
            for path in adapter.glob(pattern):
                shutil.copyfile(path, snapshot / path.name)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    spec = SourceSpec(model=str(base), data="x.txt", adapter="someone/adapter")
    source = open_source("a", spec, download=False)
    assert source.own_tokenizer.chat_template == CHAT


def test_named_templates_beside_an_adapter_and_its_model_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's where the adapter has only a default, the adapter's beside them; and they are
    among the hashed files."""
    monkeypatch.setenv("SYMPHONY_CACHE", str(tmp_path / "cache"))
    path, adapter = with_adapter(tmp_path)
    for folder, name, text in (
        (tmp_path / "models" / "b", "tool_use", "of the model"),
        (adapter, "rag", "of the adapter"),
    ):
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(text)
    (adapter / "chat_template.jinja").write_text(CHAT)
    source = open_sources(load_recipe(path))[1]
    expected = {"default": CHAT, "tool_use": "of the model", "rag": "of the adapter"}
    assert source.own_tokenizer.chat_template == expected
    before = source.hash_files()
    assert "adapter/additional_chat_templates/rag.jinja" in before
    (adapter / "additional_chat_templates" / "rag.jinja").write_text("another")
    assert source.hash_files() != before


def test_token_rows_on_a_head_that_the_config_ties_and_the_files_do_not_are_refused(
    tmp_path: Path,
) -> None:
    """peft goes by the config and writes the rows into both tables: not what is read here."""
    folder = make_model(tmp_path / "model", "llama", 0)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    adapter = make_adapter(folder, tmp_path / "adapter", trainable_token_indices=[3, 4])
    with pytest.raises(SourceError, match=r"^a: .*tie_word_embeddings: false"):
        opened(folder, adapter)
