"""Sources are opened from headers, proved whole, and compared: every way in which a checkpoint can
be broken or two can differ is named, with who has what, before a weight is read."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.utils import (
    SafetensorsFileMetadata,
    SafetensorsRepoMetadata,
    TensorInfo,
    filter_repo_objects,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from checks import (
    add_tokens,
    edit_weights,
    lowercase,
    mostly_slow,
    opened,
    prefix_space,
    swap_tokens,
)
from conftest import make_model, make_tokenizer
from symphony_moe import pipeline
from symphony_moe.building.plan import make_plan
from symphony_moe.errors import SourceError, SourceMismatch
from symphony_moe.recipe.load import load_recipe
from symphony_moe.recipe.settings import Recipe, SourceSpec
from symphony_moe.sources.hub import SMALL_FILES
from symphony_moe.sources.matching import Difference, find_differences, refuse_mismatch
from symphony_moe.sources.opening import open_source, open_sources, share_vocabulary
from symphony_moe.sources.source import Source
from symphony_moe.sources.stock import load_stock

Recipes = Callable[[str], Path]
WEIGHTS = "model.safetensors"
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def model(recipes: Recipes, tmp_path: Path) -> Path:
    """A good Llama folder to break."""
    folder = tmp_path / "model"
    shutil.copytree(recipes("llama").parent / "models" / "a", folder)
    return folder


def refusal(folder: Path, **spec: Any) -> str:
    with pytest.raises(SourceError) as caught:
        opened(folder, **spec)
    message = str(caught.value)
    assert message.startswith("a: "), "the source is not named"
    return message


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


# Differences


def differences(*folders: Path) -> list[Difference]:
    sources = [opened(f, "abc"[i]) for i, f in enumerate(folders)]
    return find_differences(share_vocabulary(sources, "a", "a"), "a")


def one_difference(good: Path, other: Path) -> Difference:
    """The only difference of the third of three sources, named with who has what."""
    found = differences(good, good, other)
    assert len(found) == 1, [str(difference) for difference in found]
    return found[0]


def test_sources_that_match_have_no_differences(recipes: Recipes) -> None:
    models = recipes("llama").parent / "models"
    assert differences(models / "a", models / "b", models / "c") == []


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SCALED = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize(
    ("changes", "what", "verdict", "values"),
    [
        # head_dim is spelled out where the number of heads would change it too.
        ({"hidden_size": 64, "head_dim": 8}, "hidden_size", "error", ("32", "64")),
        ({"num_hidden_layers": 3}, "num_hidden_layers", "error", ("2", "3")),
        ({"intermediate_size": 40}, "intermediate_size", "error", ("48", "40")),
        ({"num_attention_heads": 2, "head_dim": 8}, "num_attention_heads", "error", ("4", "2")),
        ({"num_key_value_heads": 1}, "num_key_value_heads", "error", ("2", "1")),
        ({"head_dim": 16}, "head_dim", "error", ("8", "16")),
        ({"hidden_act": "gelu"}, "hidden_act", "error", ("silu", "gelu")),
        ({"vocab_size": 304}, "vocab_size", "fine", ("300", "304")),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps", "warning", ("1e-05", "1e-06")),
        (
            {"rope_parameters": ROPE | {"rope_theta": 5e5}},
            "rope_parameters",
            "warning",
            ("rope_theta 10000", "rope_theta 500000"),
        ),
        (
            {"rope_parameters": SCALED},
            "rope_parameters",
            "warning",
            ("rope_type default", "rope_type linear"),
        ),
        ({"max_position_embeddings": 512}, "max_position_embeddings", "warning", ("256", "512")),
        ({"tie_word_embeddings": True}, "tie_word_embeddings", "warning", ("False", "True")),
    ],
)
def test_a_different_config_is_named(
    changes: dict[str, Any],
    what: str,
    verdict: str,
    values: tuple[str, str],
    recipes: Recipes,
    tmp_path: Path,
) -> None:
    good = recipes("llama").parent / "models" / "a"
    found = one_difference(good, make_model(tmp_path / "other", "llama", 9, **changes))
    assert (found.what, found.verdict) == (what, verdict)
    before, _, after = str(found).partition("; c: ")
    assert before.startswith(f"{what} (a, b: ") and values[0] in before
    assert values[1] in after
    assert found.consequence


def test_a_different_sliding_window_is_named(recipes: Recipes, tmp_path: Path) -> None:
    good = recipes("mistral").parent / "models" / "a"
    found = one_difference(good, make_model(tmp_path / "other", "mistral", 9, sliding_window=None))
    assert (found.what, found.verdict) == ("sliding_window", "warning")
    assert "(a, b: 16; c: None)" in str(found)


def test_different_dtypes_are_fine(recipes: Recipes, model: Path) -> None:
    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items()}
        tensors["model.norm.weight"] = tensors["model.norm.weight"].half()

    edit_weights(model, halve)
    found = one_difference(recipes("llama").parent / "models" / "a", model)
    assert (found.what, found.verdict) == ("dtype", "fine")
    assert "(a, b: F32; c: BF16, F16)" in str(found)
    refuse_mismatch([found])


def test_different_families_are_one_message(recipes: Recipes) -> None:
    llama, qwen = (recipes(name).parent / "models" / "a" for name in ("llama", "qwen2-untied"))
    found = differences(llama, qwen)
    assert (found[0].what, found[0].verdict) == ("model_type", "error")
    assert "(a: llama; b: qwen2)" in str(found[0])
    assert not [d for d in found if "token" in d.what]


def edit_tokenizer(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_tokenizer_with_other_numbers_is_named(recipes: Recipes, model: Path) -> None:
    edit_tokenizer(model, swap_tokens)
    found = one_difference(recipes("llama").parent / "models" / "a", model)
    assert (found.what, found.verdict) == ("tokenizer vocabulary", "warning")
    assert "the same tokens under other numbers" in found.consequence
    assert "c" in found.values and "a" in found.values


def test_another_anchor_sees_the_same_tokenizers_differ(recipes: Recipes, model: Path) -> None:
    edit_tokenizer(model, swap_tokens)
    sources = [opened(recipes("llama").parent / "models" / "a"), opened(model, "b")]
    for anchor in ("a", "b"):
        found = find_differences(share_vocabulary(sources, anchor, anchor), anchor)
        assert [(d.what, d.verdict) for d in found] == [("tokenizer vocabulary", "warning")]


def _drop_merge(content: dict[str, Any]) -> None:
    content["model"]["merges"].pop()


@pytest.mark.parametrize("change", [_drop_merge, lowercase, prefix_space])
def test_tokenizers_that_cut_text_differently_are_named(
    change: Callable[[dict[str, Any]], None], recipes: Recipes, model: Path
) -> None:
    edit_tokenizer(model, change)
    found = one_difference(recipes("llama").parent / "models" / "a", model)
    assert (found.what, found.verdict) == ("tokenizer merges and normalization", "warning")


def test_different_special_tokens_are_named(recipes: Recipes, model: Path) -> None:
    edit_json(model / "tokenizer_config.json", eos_token="<s>")
    found = one_difference(recipes("llama").parent / "models" / "a", model)
    assert (found.what, found.verdict) == ("special tokens", "warning")
    assert "eos_token </s>" in str(found) and "eos_token <s>" in str(found)


def test_different_chat_templates_are_named(recipes: Recipes, model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    found = one_difference(recipes("llama").parent / "models" / "a", model)
    assert (found.what, found.verdict) == ("chat template", "warning")
    assert "(a, b: none; c: sha256 " in str(found)


def test_every_difference_is_named_at_once(recipes: Recipes, tmp_path: Path) -> None:
    good = recipes("llama").parent / "models" / "a"
    other = make_model(
        tmp_path / "other", "llama", 9, intermediate_size=40, num_hidden_layers=3, rms_norm_eps=1e-6
    )
    found = differences(good, other)
    assert [d.what for d in found] == ["num_hidden_layers", "intermediate_size", "rms_norm_eps"]
    with pytest.raises(SourceMismatch) as caught:
        refuse_mismatch(found)
    message = str(caught.value)
    assert "num_hidden_layers (a: 2; b: 3)" in message
    assert "intermediate_size (a: 48; b: 40)" in message
    assert "rms_norm_eps" not in message, "a warning does not stop a build"


# Broken checkpoints


def test_a_missing_tensor_is_named(model: Path) -> None:
    edit_weights(model, lambda tensors: tensors.pop(Q))
    message = refusal(model)
    assert Q in message and str(model) in message and "1 tensor" in message


def test_a_surplus_tensor_is_named(model: Path) -> None:
    edit_weights(model, lambda tensors: tensors.update({"model.layers.2.x": torch.ones(2)}))
    message = refusal(model)
    assert "model.layers.2.x" in message and "1 tensor" in message


def test_a_head_that_is_missing_is_named(model: Path) -> None:
    edit_weights(model, lambda tensors: tensors.pop("lm_head.weight"))
    assert "lm_head.weight" in refusal(model)


def test_the_buffers_of_old_checkpoints_are_no_surplus(model: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(model, lambda tensors: tensors.update({name: torch.ones(4)}))
    assert name not in opened(model).headers


@pytest.mark.parametrize("shape", [(32, 31), (31, 32), (1024,), (32, 32, 1)])
def test_a_tensor_of_another_shape_than_the_config_says_is_named(
    shape: tuple[int, ...], model: Path
) -> None:
    edit_weights(model, lambda tensors: tensors.update({Q: torch.zeros(shape)}))
    message = refusal(model)
    assert Q in message and str(list(shape)) in message and "[32, 32]" in message


def test_a_config_that_does_not_describe_the_weights_is_refused(model: Path) -> None:
    edit_json(model / "config.json", num_hidden_layers=3)
    assert "model.layers.2." in refusal(model)
    edit_json(model / "config.json", num_hidden_layers=1)
    assert "model.layers.1." in refusal(model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool])
def test_weights_that_are_no_floats_are_refused(dtype: torch.dtype, model: Path) -> None:
    edit_weights(model, lambda tensors: tensors.update({Q: torch.zeros(32, 32, dtype=dtype)}))
    message = refusal(model)
    assert Q in message and "float" in message


@pytest.mark.parametrize("kept", [0, 4, 8, 200, 50_000, -1])
def test_a_truncated_file_is_named(kept: int, model: Path) -> None:
    path = model / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    message = refusal(model)
    assert str(path) in message and "fetch it again" in message


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        b"<html>404</html>" * 100,
        bytes(4000),
        (100).to_bytes(8, "little") + b"{" * 100,
    ],
)
def test_a_file_that_is_something_else_is_named(content: bytes, model: Path) -> None:
    (model / WEIGHTS).write_bytes(content)
    assert str(model / WEIGHTS) in refusal(model)


def shard(model: Path) -> dict[str, str]:
    """Cut a model into two files with an index; tensor -> file."""
    tensors = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    where: dict[str, str] = {}
    names = sorted(tensors)
    for number, part in enumerate((names[:10], names[10:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, model / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": where}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return where


def test_a_checkpoint_of_several_files_is_opened_and_read(model: Path) -> None:
    whole = load_file(model / WEIGHTS)
    where = shard(model)
    # A file beside the index is not the model's, such as Mistral's own consolidated.safetensors.
    save_file({"layers.0.x": torch.ones(1)}, model / "consolidated.safetensors")
    source = opened(model)
    assert {name: header.file for name, header in source.headers.items()} == where
    assert torch.equal(source.read(Q), whole[Q])
    hashed = [file for file in source.hash_files() if file.endswith(".safetensors")]
    assert hashed == sorted({*where.values()})


@pytest.mark.parametrize("sharded", [True, False])
def test_the_weights_are_those_that_transformers_loads(sharded: bool, model: Path) -> None:
    """Whatever else is in the folder: an index beside model.safetensors, an adapter's tensors,
    Mistral's own format."""
    if sharded:
        tensors = load_file(model / WEIGHTS)
        shard(model)
        save_file({k: 0.5 * v for k, v in tensors.items()}, model / WEIGHTS, {"format": "pt"})
    for file in ("adapter_model.safetensors", "consolidated.safetensors"):
        save_file({"layers.0.x": torch.ones(1)}, model / file)
    source = opened(model)
    assert torch.equal(source.read(Q), load_stock(model).state_dict()[Q].cpu())
    assert [f for f in source.hash_files() if f.endswith(".safetensors")] == [WEIGHTS]


def test_weights_that_transformers_would_not_find_are_refused(model: Path) -> None:
    (model / WEIGHTS).rename(model / "model-00001-of-00001.safetensors")
    message = refusal(model)
    assert "neither model.safetensors nor model.safetensors.index.json" in message
    assert "model-00001-of-00001.safetensors" in message


def test_an_adapter_inside_a_model_folder_is_refused(model: Path) -> None:
    """Transformers would load it by itself, where an evaluation loads the source."""
    (model / "adapter_config.json").write_text("{}")
    assert "Name its folder as sources.a.adapter" in refusal(model)


def test_a_file_in_the_index_that_is_not_there_is_named(model: Path) -> None:
    where = shard(model)
    (model / where[Q]).unlink()
    message = refusal(model)
    assert where[Q] in message and "not there" in message


def test_a_tensor_in_the_index_that_no_file_holds_is_named(model: Path) -> None:
    where = shard(model)
    path = model / where[Q]
    tensors = load_file(path)
    del tensors[Q]
    save_file(tensors, path)
    assert Q in refusal(model)


STALE = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.mark.parametrize("listed", [STALE, "lm_head.bias", "model.mtp.fc.weight"])
def test_an_index_may_list_what_no_file_holds_and_no_model_needs(listed: str, model: Path) -> None:
    """transformers takes what is in the files, and looks for what the model has."""
    where = shard(model)
    edit_index(model, {**where, listed: where[Q]})
    source = opened(model)
    assert torch.equal(source.read(Q), load_stock(model).state_dict()[Q].cpu())
    (note,) = source.notes
    assert f"lists 1 tensors that no file holds, first {listed}" in note


def test_an_index_may_list_a_tied_head(recipes: Recipes, tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    shutil.copytree(recipes("llama-tied-rope3").parent / "models" / "a", folder)
    where = shard(folder)
    edit_index(folder, {**where, HEAD: where[EMBEDDING]})
    load_stock(folder)
    assert opened(folder).head_name == EMBEDDING


def test_what_is_ignored_of_the_files_is_said(model: Path) -> None:
    edit_weights(model, lambda tensors: tensors.update({STALE: torch.ones(4)}))
    (note,) = opened(model).notes
    assert note.startswith("a: 1 tensors are ignored") and STALE in note


def edit_index(model: Path, where: dict[str, str], **rest: Any) -> None:
    index = {"metadata": {}, "weight_map": where} | rest
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_tensor_in_several_files_is_the_one_that_transformers_reads(model: Path) -> None:
    """The last file's, whatever the index says."""
    where = shard(model)
    first, last = sorted({*where.values()})
    for name in (Q, EMBEDDING):
        for file in (first, last):
            tensors = load_file(model / file)
            tensors[name] = torch.full((300 if name == EMBEDDING else 32, 32), float(file == last))
            save_file(tensors, model / file, {"format": "pt"})
    source = opened(model)
    stock = load_stock(model).state_dict()
    for name in (Q, EMBEDDING):
        assert torch.equal(source.read(name), stock[name].cpu())
    (note,) = source.notes
    assert "2 tensors are in more than one file" in note and f"that of {last}" in note


@pytest.mark.parametrize("outside", ["../b.safetensors", "x/../../b.safetensors", "{root}/b"])
@pytest.mark.parametrize("preferred", [False, True])
def test_an_index_that_names_files_outside_the_folder_is_refused(
    outside: str, preferred: bool, model: Path
) -> None:
    """Also where transformers would not read it, as model.safetensors is there."""
    tensors = load_file(model / WEIGHTS)
    where = shard(model)
    outside = outside.format(root=model.parent)
    save_file(tensors, model.parent / "b.safetensors", {"format": "pt"})
    save_file(tensors, model.parent / "b", {"format": "pt"})
    edit_index(model, {**where, Q: outside})
    if preferred:
        save_file(tensors, model / WEIGHTS, {"format": "pt"})
    assert "outside of the model's folder" in refusal(model)


@pytest.mark.parametrize("opening", ["[", '{"weight_map":'])
def test_a_file_nested_without_end_is_refused(opening: str, model: Path) -> None:
    shard(model)
    (model / "model.safetensors.index.json").write_text(opening * 100_000)
    message = refusal(model)
    assert "not a usable index" in message and len(message) < 500
    (model / "config.json").write_text(opening * 100_000)
    assert "config.json" in refusal(model)


@pytest.mark.parametrize(
    "index",
    [
        "",
        "not json",
        "[]",
        "3",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": null}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": null, "b": "x"}}',
        '{"weight_map": {"a": "../model.safetensors\\u0000"}}',
    ],
)
def test_an_index_that_is_none_is_refused(index: str, model: Path) -> None:
    shard(model)
    (model / "model.safetensors.index.json").write_text(index)
    assert "index" in refusal(model)


def test_weights_in_another_format_are_refused_with_what_is_there(model: Path) -> None:
    (model / WEIGHTS).rename(model / "weights.h5")
    message = refusal(model)
    assert "weights.h5" in message and "save_pretrained" in message
    (model / "weights.h5").rename(model / "pytorch_model.bin")
    message = refusal(model)
    assert "pytorch_model.bin" in message and "sources.a.allow_pickle: true" in message


@pytest.mark.parametrize("content", [b"", b"{", b"not json", b"[]", b"3", b"null", b"\xff\xfe\x00"])
def test_a_config_that_is_not_json_is_refused(content: bytes, model: Path) -> None:
    (model / "config.json").write_bytes(content)
    assert str(model) in refusal(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "32"},
        {"hidden_size": -32},
        {"hidden_size": 33},
        {"hidden_size": [32]},
        {"num_attention_heads": 0},
        {"num_attention_heads": "four"},
        {"num_key_value_heads": 0},
        {"num_key_value_heads": 3},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 2.5},
        {"vocab_size": "many"},
        {"vocab_size": -1},
        {"head_dim": 7},
        {"head_dim": "x"},
        {"hidden_act": "nonsense"},
        {"hidden_act": 3},
        {"rms_norm_eps": "small"},
        {"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1e4}},
        {"rope_parameters": "none"},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
        {"tie_word_embeddings": "maybe"},
        {"max_position_embeddings": "long"},
        {"model_type": ["llama"]},
        {"model_type": None},
    ],
    ids=str,
)
def test_a_config_of_nonsense_is_refused(changes: dict[str, Any], model: Path) -> None:
    edit_json(model / "config.json", **changes)
    if changes.get("model_type", 0) is None:
        content = json.loads((model / "config.json").read_text())
        assert "model_type" not in content
    message = refusal(model)
    assert str(model) in message or "its config.json says" in message


def test_a_family_without_a_table_is_refused_with_those_there_are(model: Path) -> None:
    edit_json(model / "config.json", model_type="gpt_neox")
    message = refusal(model)
    assert "'gpt_neox'" in message
    assert all(family in message for family in ("llama", "mistral", "qwen2", "qwen3"))


@pytest.mark.parametrize("field", [{"mlp_bias": True}, {"quantization_config": {"bits": 4}}])
def test_a_variant_that_the_target_cannot_hold_is_refused(
    field: dict[str, Any], model: Path
) -> None:
    edit_json(model / "config.json", **field)
    word = "quantized" if "quantization_config" in field else "biases"
    assert word in refusal(model)


def test_a_missing_folder_or_config_is_named(model: Path, tmp_path: Path) -> None:
    assert str(tmp_path / "none") in refusal(tmp_path / "none")
    assert str(model / WEIGHTS) in refusal(model / WEIGHTS)  # a file, not a folder
    (model / "config.json").unlink()
    assert "config.json" in refusal(model)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"nonsense", b"\xff\xfe"])
def test_a_tokenizer_that_cannot_be_read_is_named(content: bytes | None, model: Path) -> None:
    for path in model.glob("*token*"):
        path.unlink()
    if content is not None:
        (model / "tokenizer.json").write_bytes(content)
        (model / "tokenizer_config.json").write_bytes(content)
    source = opened(model)
    with pytest.raises(SourceError, match=r"^a: .*tokenizer"):
        find_differences([source, source], "a")


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(
    recipes: Recipes, tmp_path: Path
) -> None:
    # Such a token has no row: found while text is run, it would be an index out of range or worse.
    small = make_model(tmp_path / "small", "llama", 0, vocab_size=280)
    source = opened(small)
    with pytest.raises(SourceError, match=r"^a: .*tokenizer.*300.*280"):
        _ = source.tokenizer
    # More rows than tokens are usual: tables are padded to round numbers.
    assert len(opened(make_model(tmp_path / "large", "llama", 0, vocab_size=320)).tokenizer) == 300


# The hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a hub that cannot be reached."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.mark.parametrize("download", [True, False])
def test_a_hub_id_that_cannot_be_fetched_is_named(download: bool, hub: Path) -> None:
    spec = SourceSpec(model="no-such-owner/no-such-model", data="x.txt")
    with pytest.raises(SourceError, match=r"^a: 'no-such-owner/no-such-model' is no folder here"):
        open_source("a", spec, download=download)


def test_a_mistyped_folder_is_asked_after(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "coder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=r"; did you mean 'models/coder'\?$"):
        open_source("a", SourceSpec(model="models/codr", data="x.txt"))
    with pytest.raises(SourceError) as caught:
        open_source("a", SourceSpec(model="models/lawyer", data="x.txt"))
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("model", ["models/of/mine", "a b", "models/", "x" * 200, "--"])
def test_a_mistyped_path_is_named_as_neither_folder_nor_hub_id(model: str, hub: Path) -> None:
    with pytest.raises(SourceError) as caught:
        open_source("a", SourceSpec(model=model, data="x.txt"))
    assert str(caught.value).startswith(f"a: {model!r} is ")


def cached(hub: Path, model: Path, commit: str, ref: str | None = "main") -> str:
    """Put a model into the cache as the hub's client lays it out; the hub id."""
    entry = hub / "models--someone--tiny"
    snapshot = entry / "snapshots" / commit
    shutil.copytree(model, snapshot)
    if ref:
        (entry / "refs").mkdir(exist_ok=True)
        (entry / "refs" / ref).write_text(commit)
    return "someone/tiny"


@pytest.mark.parametrize("download", [True, False])
def test_a_hub_id_in_the_cache_needs_no_network(download: bool, hub: Path, model: Path) -> None:
    commit = "0123456789" * 4
    spec = SourceSpec(model=cached(hub, model, commit), data="x.txt")
    source = open_source("a", spec, download=download)
    assert source.folder == hub / "models--someone--tiny" / "snapshots" / commit
    assert source.public_name == "someone/tiny"
    assert torch.equal(source.read(Q), load_file(model / WEIGHTS)[Q])


def test_a_revision_is_the_one_asked_for(hub: Path, model: Path) -> None:
    cached(hub, model, "a" * 40)
    edit_weights(model, lambda tensors: tensors.update({Q: torch.zeros(32, 32)}))
    hub_id = cached(hub, model, "b" * 40, ref="v2")
    for revision, zero in ((None, False), ("v2", True), ("b" * 40, True), ("a" * 40, False)):
        source = open_source("a", SourceSpec(model=hub_id, revision=revision, data="x.txt"))
        assert bool((source.read(Q) == 0).all()) == zero
    with pytest.raises(SourceError, match="someone/tiny"):
        open_source("a", SourceSpec(model=hub_id, revision="v3", data="x.txt"))


# Reading


def test_a_tied_checkpoint_may_store_its_head_twice(recipes: Recipes, tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    shutil.copytree(recipes("llama-tied-rope3").parent / "models" / "a", folder)
    before = opened(folder)

    def twice(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_weights(folder, twice)
    source = opened(folder)
    assert source.head_name == "model.embed_tokens.weight"
    assert source.headers.keys() == before.headers.keys()
    assert source.num_parameters == before.num_parameters


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TIED = {"tie_word_embeddings": True}


@pytest.fixture(params=["llama", "mistral", "qwen2-untied", "qwen3"])
def untied(request: pytest.FixtureRequest, recipes: Recipes, tmp_path: Path) -> Path:
    """A folder of every family with a head of its own."""
    folder = tmp_path / "untied"
    shutil.copytree(recipes(request.param).parent / "models" / "a", folder)
    return folder


def stock_tables(folder: Path) -> dict[str, torch.Tensor]:
    """Embeddings and head, as stock transformers uses them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tables = {EMBEDDING: model.get_input_embeddings(), HEAD: model.get_output_embeddings()}
    return {name: module.weight.detach() for name, module in tables.items()}


def _equal_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()


def _rounded_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors[EMBEDDING] = tensors[EMBEDDING].bfloat16().float()
    tensors[HEAD] = tensors[EMBEDDING].bfloat16()


def _head_of_another_last_row(tensors: dict[str, torch.Tensor]) -> None:
    _equal_head(tensors)
    tensors[HEAD][-1, -1] += 1


HEADS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "another": lambda tensors: None,
    "another in one number": _head_of_another_last_row,
    "the same": _equal_head,
    "the same in another dtype": _rounded_head,
    "the embeddings alone": lambda tensors: tensors.pop(HEAD),
    "the head alone": lambda tensors: tensors.pop(EMBEDDING),
}


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("held", HEADS)
def test_a_tied_models_head_is_the_one_that_transformers_uses(
    held: str, pickled: bool, untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the config says: where the files hold another head, transformers does not tie."""
    monkeypatch.setenv("SYMPHONY_CACHE", str(tmp_path / "cache"))
    edit_json(untied / "config.json", **TIED)
    edit_weights(untied, HEADS[held])
    if pickled:
        torch.save(load_file(untied / WEIGHTS), untied / "pytorch_model.bin")
        (untied / WEIGHTS).unlink()
    expected = stock_tables(untied)
    for download in (False, True):
        spec = SourceSpec(model=str(untied), data="unused.txt", allow_pickle=pickled)
        source = open_source("a", spec, download=download)
        assert torch.equal(source.read(EMBEDDING), expected[EMBEDDING])
        assert torch.equal(source.read(source.head_name), expected[HEAD])
        another = held.startswith("another")
        assert source.config.tie_word_embeddings == (not another)
        said = [note for note in source.notes if "files hold another head" in note]
        assert len(said) == another


def test_an_untied_model_has_the_head_that_it_says(untied: Path) -> None:
    """transformers would draw a missing one at random, so would it where nothing is said of it."""
    edit_weights(untied, _equal_head)
    source = opened(untied)
    assert source.head_name == HEAD and not source.notes
    edit_weights(untied, lambda tensors: tensors.pop(HEAD))
    for said in (False, None):
        edit_json(untied / "config.json", tie_word_embeddings=said)
        message = refusal(untied)
        assert HEAD in message and "tie_word_embeddings: true" in message


def test_a_tied_models_head_of_another_size_is_refused(untied: Path) -> None:
    """transformers does not load it."""
    edit_json(untied / "config.json", **TIED)
    edit_weights(untied, lambda tensors: tensors.update({HEAD: torch.zeros(320, 32)}))
    assert f"{HEAD} is [320, 32]" in refusal(untied)
    with pytest.raises(RuntimeError):
        stock_tables(untied)


def test_a_head_that_cannot_be_compared_yet_is_said(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a hub model, a plan has the headers alone."""
    asked = serve(model, tmp_path / "snapshot", monkeypatch)
    edit_json(model / "config.json", **TIED)
    spec = SourceSpec(model="someone/model", data="x.txt")
    source = open_source("a", spec, download=False)
    assert "*.safetensors" not in asked[0]
    (note,) = source.notes
    assert "whether they are equal shows once the weights are here" in note
    assert open_source("a", spec).head_name == HEAD


def test_a_plan_says_which_head_is_used(recipe: Recipe) -> None:
    for spec in recipe.sources.values():
        edit_json(Path(spec.model) / "config.json", **TIED)
    planned = pipeline.plan(recipe)
    assert sum("its files hold another head; that is used" in n for n in planned.notes) == 3
    assert HEAD in planned.tensors


@pytest.mark.parametrize("held", ["another", "the same"])
def test_a_build_of_sources_with_a_head_against_their_config_is_verified(
    held: str, recipe: Recipe, tmp_path: Path
) -> None:
    for spec in recipe.sources.values():
        edit_json(Path(spec.model) / "config.json", **TIED)
        edit_weights(Path(spec.model), HEADS[held])
    run = pipeline.build(recipe, tmp_path / "out")
    config = json.loads((run.checkpoint / "config.json").read_text())
    assert config["tie_word_embeddings"] == (held == "the same")
    pipeline.verify(run)


@pytest.mark.parametrize("value", [1e300, -3.5e38, 2.0**128])
def test_a_number_beyond_float32_is_named_as_that(value: float, model: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q] = tensors[Q].double()
        tensors[Q][3, 4] = value

    edit_weights(model, spoil)
    with pytest.raises(SourceError) as caught:
        opened(model).read(Q)
    message = str(caught.value)
    assert message.startswith(f"a: {Q} in {model / WEIGHTS} has {value:.4g}, ")
    assert "float32" in message and "NaN" not in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_named(
    dtype: torch.dtype, value: float, model: Path
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q] = tensors[Q].to(dtype)
        tensors[Q][3, 4] = tensors[Q][0, 0] = value

    edit_weights(model, spoil)
    source = opened(model)  # headers do not tell
    source.read("model.norm.weight")
    with pytest.raises(SourceError) as caught:
        source.read(Q)
    assert str(caught.value).startswith(f"a: {Q} in {model / WEIGHTS} has 2 values")
    with pytest.raises(SourceError):
        source.read_layer(1)
    assert not bool(source.read(Q, slice(1, 3)).isnan().any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_tensors_are_read_as_float32(dtype: torch.dtype, model: Path) -> None:
    edit_weights(model, lambda tensors: tensors.update({Q: tensors[Q].to(dtype)}))
    stored = load_file(model / WEIGHTS)[Q]
    source = opened(model)
    assert source.read(Q).dtype == torch.float32
    assert torch.equal(source.read(Q), stored.float())
    assert torch.equal(source.read(Q, slice(5, 9)), stored[5:9].float())


def test_a_file_that_shrinks_after_opening_is_named(model: Path) -> None:
    source = opened(model)
    path = model / WEIGHTS
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(SourceError, match=r"^a: .*q_proj.* is not readable"):
        source.read(Q)
    path.unlink()
    with pytest.raises(SourceError, match=r"^a: .*q_proj.* is not readable"):
        source.read(Q)


def test_pinned_weights_are_checked(model: Path) -> None:
    hashes = opened(model).hash_files()
    assert list(hashes) == [
        WEIGHTS,
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert all(len(digest) == 64 for digest in hashes.values())
    opened(model, sha256=hashes)
    opened(model, sha256={WEIGHTS: hashes[WEIGHTS]})
    edit_weights(model, lambda tensors: tensors[Q].mul_(1.001))
    message = refusal(model, sha256=hashes)
    assert str(model / WEIGHTS) in message and hashes[WEIGHTS][:16] in message
    assert "has changed" in message
    assert "other.safetensors" in refusal(model, sha256={"other.safetensors": "0" * 64})
    assert WEIGHTS in refusal(model, sha256={"config.json": hashes["config.json"]})


# What is read when


@pytest.fixture
def recipe(recipes: Recipes, tmp_path: Path) -> Recipe:
    """A recipe whose sources may be changed."""
    folder = tmp_path / "recipe"
    shutil.copytree(recipes("llama").parent, folder)
    return load_recipe(folder / "recipe.yaml")


def test_planning_reads_a_few_rows_of_matrices_alone(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(How many: tests/sources/test_kinship.py.)"""
    for spec in recipe.sources.values():
        edit_weights(Path(spec.model), lambda t: t["lm_head.weight"].fill_(float("nan")))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it was read")

    read = Source.read

    def read_rows(self: Source, name: str, rows: slice | None = None, **more: Any) -> Any:
        assert name.endswith("proj.weight") and rows is not None and not more
        return read(self, name, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Source, "read", read_rows)
        patch.setattr(Source, "hash_files", refuse)
        before = sorted(tmp_path.rglob("*"))
        planned = pipeline.plan(recipe)
        assert sorted(tmp_path.rglob("*")) == before, "planning wrote something"
    assert planned.architecture == "mixtral"
    with pytest.raises(SourceError, match=r"^a: lm_head\.weight in .* NaN"):
        pipeline.build(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_a_plan_names_differences_with_their_consequences(recipe: Recipe) -> None:
    edit_json(Path(recipe.sources["b"].model) / "config.json", rms_norm_eps=1e-6)
    planned = make_plan(recipe, open_sources(recipe))
    assert [d.what for d in planned.differences] == ["rms_norm_eps"]
    assert any("rms_norm_eps (a, c: 1e-05; b: 1e-06)" in note for note in planned.notes)


def test_verify_notices_weights_that_were_replaced_after_the_build(
    recipe: Recipe, tmp_path: Path
) -> None:
    run = pipeline.build(recipe, tmp_path / "out")
    pipeline.verify(run)
    folder = Path(recipe.sources["b"].model)
    edit_weights(folder, lambda tensors: tensors[Q].mul_(1.5))
    with pytest.raises(SourceError, match=r"^b: .*has changed"):
        pipeline.verify(run)


def test_a_moved_tokenizer_is_noticed_by_the_next_command(recipe: Recipe, tmp_path: Path) -> None:
    run = pipeline.build(recipe, tmp_path / "out")
    folder = Path(recipe.sources["b"].model)
    make_tokenizer(folder, bos=False)
    edit_tokenizer(folder, swap_tokens)
    with pytest.raises(SourceError, match=r"b: .*tokenizer.json has SHA-256 .* has changed"):
        pipeline.verify(run)


def serve(model: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A hub that has the model; the patterns that are asked for."""
    whole = opened(model)
    asked: list[Any] = []

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        snapshot.mkdir(exist_ok=True)
        for pattern in allow_patterns:
            for path in model.glob(pattern):
                shutil.copyfile(path, snapshot / path.name)
        return str(snapshot)

    def metadata(repo: str, *, revision: str | None) -> SafetensorsRepoMetadata:
        tensors = {
            name: TensorInfo(dtype="F32", shape=list(header.shape), data_offsets=(0, 0))
            for name, header in whole.headers.items()
        }
        file = SafetensorsFileMetadata(metadata={}, tensors=tensors)
        return SafetensorsRepoMetadata(
            metadata=None, sharded=False, weight_map={}, files_metadata={WEIGHTS: file}
        )

    def there(repo: str, file: str, *, revision: str | None) -> bool:
        return (model / file).is_file()

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", metadata)
    monkeypatch.setattr("huggingface_hub.file_exists", there)
    return asked


def test_planning_a_hub_model_fetches_its_headers_and_no_weights(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`plan` takes config and tokenizer as files, and the headers by the client's range
    requests."""
    asked = serve(model, tmp_path / "snapshot", monkeypatch)
    source = open_source("a", SourceSpec(model="someone/model", data="x.txt"), download=False)
    assert source.headers == opened(model).headers
    assert source.public_name == "someone/model"
    assert "*.safetensors" not in asked[0]


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("kind", ["both", "pickled alone"])
def test_a_hub_model_with_safetensors_and_pickles_has_safetensors(
    sharded: bool, kind: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on meta-llama/Llama-2-7b-hf: `plan` sees the pickles' index, and of a single safetensors
    file nothing."""
    where = shard(model) if sharded else dict.fromkeys(load_file(model / WEIGHTS), WEIGHTS)
    pickles = {name: f"pytorch_{file}.bin" for name, file in where.items()}
    for file in pickles.values():
        (model / file).write_bytes(b"not read")
    (model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": pickles}))
    asked = serve(model, tmp_path / "snapshot", monkeypatch)
    spec = SourceSpec(model="someone/model", data="x.txt")
    if kind == "both":
        allowed = spec.model_copy(update={"allow_pickle": True})
        for download in (False, True):
            assert open_source("a", spec, download=download).converted == ()
            assert open_source("a", allowed, download=download).converted == ()
        assert not any("*.bin" in patterns for patterns in asked)
        return
    for path in model.glob("model*.safetensors*"):
        path.unlink()
    with pytest.raises(SourceError, match=r"^a: .* is pickled; set sources.a.allow_pickle: true"):
        open_source("a", spec, download=False)


@pytest.mark.parametrize("content", ["{oops", "[]", '{"max_new_tokens": -4}'])
def test_a_generation_config_that_cannot_be_used_is_refused(content: str, model: Path) -> None:
    """It is copied into the output, which would then not load."""
    (model / "generation_config.json").write_text(content)
    assert "generation_config.json is not usable" in refusal(model)


def test_other_ends_of_text_are_named(recipes: Recipes, model: Path) -> None:
    """Base and instruct models often differ in nothing else."""
    edit_json(model / "config.json", eos_token_id=259)
    edit_json(model / "generation_config.json", eos_token_id=[257, 259])
    other = opened(recipes("llama").parent / "models" / "b", "b")
    found = {d.what: d.verdict for d in find_differences([opened(model), other], "a")}
    assert found == {"eos_token_id": "warning", "generation config": "warning"}


def test_equal_numbers_are_no_difference(recipes: Recipes, tmp_path: Path) -> None:
    """However a config spells them."""
    path = shutil.copytree(recipes("llama").parent, tmp_path / "copy") / "recipe.yaml"
    config = path.parent / "models" / "b" / "config.json"
    content = json.loads(config.read_text())
    content["rope_parameters"]["rope_theta"] = 10000
    config.write_text(json.dumps(content))
    sources = open_sources(load_recipe(path))
    thetas = {type(source.config.rope_parameters["rope_theta"]) for source in sources}
    assert thetas == {int, float}
    assert find_differences(sources, "a") == []


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 64,
}
OLD = {"rope_parameters": None, "rope_theta": 10000}
"""As transformers 4 writes it; None: the key is not there."""


SPELLINGS = [
    ("llama", {"hidden_act": "silu"}, {"hidden_act": "swish"}),
    ("llama", {"hidden_act": "gelu_new"}, {"hidden_act": "gelu_pytorch_tanh"}),
    ("llama", {"hidden_act": "gelu_fast"}, {"hidden_act": "gelu_accurate"}),
    ("llama", {"hidden_act": "gelu"}, {"hidden_act": "gelu_python"}),
    ("llama", {}, OLD),
    ("llama", {}, {"rope_parameters": None}),
    ("llama", {}, {"rope_parameters": ROPE | {"factor": 4}}),
    ("llama", {}, OLD | {"rope_scaling": {"type": "default"}}),
    ("llama", {}, OLD | {"rope_scaling": {"type": "linear", "factor": 1.0}}),
    (
        "llama",
        {"rope_parameters": SCALED},
        OLD | {"rope_scaling": {"type": "linear", "factor": 2}},
    ),
    (
        "llama",
        {"rope_parameters": SCALED},
        {"rope_parameters": SCALED | {"original_max_position_embeddings": 64}},
    ),
    (
        "llama",
        {"rope_parameters": YARN},
        {"rope_parameters": YARN | {"beta_fast": 32, "beta_slow": 1, "truncate": True}},
    ),
    (
        "llama",
        {"rope_parameters": YARN},
        {"rope_parameters": YARN | {"attention_factor": 0.1 * math.log(4) + 1}},
    ),
    (
        "llama",
        {"rope_parameters": LLAMA3},
        OLD | {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
    ),
    ("llama", {}, {"sliding_window": 16}),
    ("mistral", {"sliding_window": None}, {"sliding_window": 256}),
    ("mistral", {"sliding_window": 256}, {"sliding_window": 4096}),
    ("qwen2", {}, {"use_sliding_window": False, "sliding_window": 16}),
    (
        "qwen2",
        {},
        {
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 2,
            "layer_types": None,
        },
    ),
    (
        "qwen2",
        {},
        {
            "use_sliding_window": True,
            "sliding_window": 256,
            "max_window_layers": 0,
            "layer_types": None,
        },
    ),
    ("llama", {"eos_token_id": 257}, {"eos_token_id": [257]}),
    ("llama", {"eos_token_id": [258, 257]}, {"eos_token_id": [257, 258]}),
]
"""(family, what one source's config has, what another's has that means the same)."""


@pytest.mark.parametrize(("variant", "one", "other"), mostly_slow(SPELLINGS, *SPELLINGS[::3]))
def test_two_spellings_of_one_meaning_are_no_difference(
    variant: str, one: dict[str, Any], other: dict[str, Any], recipes: Recipes, tmp_path: Path
) -> None:
    """Either of them may be the anchor's, and what is written says what the anchor's config says,
    and computes the same."""
    folders = []
    for name, changes in (("a", one), ("b", other)):
        folder = shutil.copytree(recipes(variant).parent / "models" / "a", tmp_path / name)
        config = json.loads((folder / "config.json").read_text()) | changes
        kept = {k: v for k, v in config.items() if v is not None or k == "sliding_window"}
        (folder / "config.json").write_text(json.dumps(kept))
        folders.append(folder)
    assert differences(*folders) == [] == differences(*reversed(folders))
    text = torch.arange(2 * 200).view(2, 200) % 300
    logits = [load_stock(folder)(text).logits for folder in folders]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    data = str(recipes(variant).parent / "a.jsonl")
    path = tmp_path / "recipe.yaml"
    sources = {name: {"model": name, "data": data} for name in "ab"}
    settings = {"anchor": "b", "method": "btx", "output": {"dtype": "float32"}}
    path.write_text(json.dumps({"sources": sources} | settings))
    run = pipeline.build(load_recipe(path), tmp_path / "run")
    pipeline.verify(run)
    config = json.loads((run.checkpoint / "config.json").read_text())
    own = AutoConfig.from_pretrained(tmp_path / "b")
    assert config["hidden_act"] == own.hidden_act
    assert config["rope_parameters"] == own.rope_parameters
    found = load_stock(run.checkpoint)(text).logits
    torch.testing.assert_close(found, logits[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("variant", "one", "other", "what"),
    [
        ("llama", {"hidden_act": "gelu"}, {"hidden_act": "gelu_new"}, "hidden_act"),
        ("llama", {"hidden_act": "silu"}, {"hidden_act": "quick_gelu"}, "hidden_act"),
        ("llama", {"hidden_act": "gelu"}, {"hidden_act": "gelu_10"}, "hidden_act"),
        ("llama", {}, {"rope_parameters": ROPE | {"rope_theta": 10001}}, "rope_parameters"),
        (
            "llama",
            {},
            {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}},
            "rope_parameters",
        ),
        (
            "llama",
            {"rope_parameters": YARN},
            {"rope_parameters": YARN | {"mscale": 2, "mscale_all_dim": 1}},
            "rope_parameters",
        ),
        (
            "llama",
            {"rope_parameters": YARN},
            {"rope_parameters": YARN | {"truncate": False}},
            "rope_parameters",
        ),
        ("mistral", {"sliding_window": None}, {"sliding_window": 255}, "sliding_window"),
    ],
)
def test_what_means_something_else_is_a_difference(
    variant: str,
    one: dict[str, Any],
    other: dict[str, Any],
    what: str,
    recipes: Recipes,
    tmp_path: Path,
) -> None:
    folders = [make_model(tmp_path / n, variant, 1, **c) for n, c in (("a", one), ("b", other))]
    assert [found.what for found in differences(*folders)] == [what]


def test_a_rope_that_depends_on_the_context_says_so(recipes: Recipes, tmp_path: Path) -> None:
    """The same parameters, but another context that they stretch."""
    rope = {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}}
    folders = [
        make_model(tmp_path / name, "llama", 1, **rope, max_position_embeddings=context)
        for name, context in (("a", 64), ("b", 128))
    ]
    found = {difference.what: str(difference) for difference in differences(*folders)}
    assert found.keys() == {"rope_parameters", "max_position_embeddings"}
    assert "(a: context 64, factor 2" in found["rope_parameters"]


def test_a_gguf_file_in_the_place_of_a_folder_is_told_how(recipes: Recipes, tmp_path: Path) -> None:
    """Written as the model, or alone in a folder."""
    path = shutil.copytree(recipes("llama").parent, tmp_path / "copy") / "recipe.yaml"
    model = path.parent / "models" / "b"
    (model / "q8.gguf").touch()
    open_sources(load_recipe(path))
    told = "write its folder as sources.b.model and sources.b.gguf_file: q8.gguf"
    spec = load_recipe(path).sources["b"]
    with pytest.raises(SourceError, match=f"no such model folder: .*{told}"):
        open_source("b", spec.model_copy(update={"model": f"{spec.model}/q8.gguf"}))
    (model / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=f"has no .safetensors weights.*{told}"):
        open_source("b", spec)
    (model / "config.json").unlink()
    with pytest.raises(SourceError, match=f"has no .safetensors weights.*{told}"):
        open_source("b", spec)


def test_what_reads_a_sentencepiece_model_is_named(
    recipes: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where that is not installed; else the reader's own message is told."""
    path = shutil.copytree(recipes("llama").parent, tmp_path / "copy") / "recipe.yaml"
    model = path.parent / "models" / "b"
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(b"no model")
    source = open_source("b", load_recipe(path).sources["b"])
    for found, told in (
        (None, "pip install sentencepiece protobuf"),
        (object(), "no usable tokenizer in"),
    ):
        monkeypatch.setattr(
            "symphony_moe.sources.source.find_spec", lambda name, found=found: found
        )
        with pytest.raises(SourceError, match=f"b: .*{told}"):
            source.own_tokenizer  # noqa: B018 (reading it is what fails)


# Numbers of tokens that no row has, and code that comes with a model


@pytest.mark.parametrize("number", [300, 12345, -301])
def test_a_padding_token_without_a_row_is_refused(number: int, model: Path) -> None:
    """With it, transformers makes no model of any family."""
    edit_json(model / "config.json", pad_token_id=number)
    with pytest.raises(AssertionError, match="Padding_idx"):
        load_stock(model)
    message = refusal(model)
    assert f"pad_token_id in {model / 'config.json'} is {number}, and" in message
    assert "300 rows" in message and "Set it to null" in message


@pytest.mark.parametrize(
    "file", mostly_slow(["config.json", "generation_config.json"], "generation_config.json")
)
@pytest.mark.parametrize(
    ("numbers", "kept"), [(300, None), ([257, 300], [257]), ([300, 999], None), (299, 299)]
)
def test_ends_without_a_row_are_left_out_and_said_to_be(
    numbers: Any, kept: Any, file: str, recipes: Recipes, model: Path, tmp_path: Path
) -> None:
    """No model ever writes such a token; in a union of vocabularies, its number is another's."""
    edit_json(model / file, eos_token_id=numbers)
    recipe = load_recipe(recipes("llama"), [f"sources.a.model={model}"])
    run = pipeline.build(recipe, tmp_path / "run")
    written = json.loads((run.checkpoint / file).read_text())
    if file == "generation_config.json":
        # Where documents end, by the tokenizer, generation stops too.
        others = kept if isinstance(kept, list) else [kept]
        expected = 257 if kept is None else [*others, *({257} - {*others})]
    else:
        expected = kept
    assert written["eos_token_id"] == expected
    load_stock(run.checkpoint)
    notes = run.read_json(run.plan)["notes"]
    said = [note for note in notes if note.startswith(f"a: eos_token_id in {file} names ")]
    assert len(said) == (kept != numbers)
    assert all("300 rows: left out" in note for note in said)
    pipeline.verify(run)


def test_a_number_beyond_the_table_is_no_other_sources_token(
    recipes: Recipes, model: Path, tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", "llama", 1, vocab_size=301)
    edit_tokenizer(other, lambda content: add_tokens(content, ["<|theirs|>"]))
    edit_json(model / "config.json", eos_token_id=[257, 300])
    specs = {"a": str(model), "b": str(other)}
    recipe = load_recipe(recipes("llama"), [f"sources.{n}.model={m}" for n, m in specs.items()])
    planned = pipeline.plan(recipe)
    assert planned.config["vocab_size"] == 301 and planned.config["eos_token_id"] == [257]


def test_minus_one_pads_nothing_and_can_be_trained(
    recipes: Recipes, model: Path, tmp_path: Path
) -> None:
    """As LLaMA's first configs have it. transformers loads it, but saves no generation config that
    holds it."""
    for file in ("config.json", "generation_config.json"):
        edit_json(model / file, pad_token_id=-1)
    recipe = load_recipe(recipes("llama"), [f"sources.a.model={model}"])
    run = pipeline.run(recipe, tmp_path / "run")
    for folder in (run.checkpoint, run.trained):
        assert json.loads((folder / "generation_config.json").read_text())["pad_token_id"] is None
        load_stock(folder)
    notes = run.read_json(run.plan)["notes"]
    assert any("a: pad_token_id in generation_config.json names -1" in note for note in notes)


def test_no_code_of_a_model_is_run_or_asked_for(
    recipes: Recipes, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named beside a class that transformers has: it is not used, the plan says so, and the result
    names none."""

    def ask(*_: object) -> str:
        raise AssertionError("asked at the terminal")

    monkeypatch.setattr("builtins.input", ask)
    code = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass X: ...\n"
    (model / "code.py").write_text(code)
    edit_json(model / "config.json", auto_map={"AutoConfig": "code.X", "AutoModel": "code.X"})
    edit_json(model / "generation_config.json", auto_map={"AutoModel": "code.X"})
    named = {"auto_map": {"AutoTokenizer": [None, "code.X"]}}
    edit_json(model / "tokenizer_config.json", **named)
    recipe = load_recipe(recipes("llama"), [f"sources.a.model={model}"])
    run = pipeline.build(recipe, tmp_path / "run")
    pipeline.verify(run)
    assert not list(tmp_path.rglob("ran"))
    for path in run.checkpoint.glob("*.json"):
        assert "auto_map" not in path.read_text()
    notes = run.read_json(run.plan)["notes"]
    for file in ("config.json", "tokenizer_config.json"):
        assert any(
            note.startswith(f"a: {file} names code (code.X), which is never") for note in notes
        )


def test_a_tokenizer_that_is_code_is_refused_unasked(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    named = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    edit_json(model / "tokenizer_config.json", **named)
    with pytest.raises(SourceError, match=r"^a: .* needs own.Own, code that comes with it") as told:
        opened(model).own_tokenizer  # noqa: B018 (reading it is what fails)
    assert "take auto_map out" in str(told.value)


# Chat templates beside the default


def test_named_chat_templates_are_hashed_and_fetched(model: Path) -> None:
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "rag.jinja").write_text("RAG")
    assert "additional_chat_templates/rag.jinja" in opened(model).hash_files()
    files = ["additional_chat_templates/rag.jinja", "model.safetensors"]
    assert list(filter_repo_objects(files, allow_patterns=SMALL_FILES)) == files[:1]
