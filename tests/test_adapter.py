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
from transformers import AutoModelForCausalLM

from conftest import make_model, make_recipe
from symphony_moe import pipeline
from symphony_moe.adapter import FILES, Adapter
from symphony_moe.cli import main
from symphony_moe.errors import SourceError
from symphony_moe.evaluate import held_out_text, losses_and_routing
from symphony_moe.families import HEAD
from symphony_moe.recipe import SourceSpec, load_recipe
from symphony_moe.sources import open_source, open_sources

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "model", "qwen2-untied", 0)


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def make_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """A random adapter, saved by peft."""
    torch.manual_seed(7)
    config: dict[str, Any] = {
        "r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "down_proj"],
        "init_lora_weights": False,
    } | settings  # fmt: skip
    model = peft.get_peft_model(loaded(base), peft.LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(str(folder))
    return folder


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {
        "rank_pattern": {"layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"v_proj": 5},
    },
    "everywhere": {"target_modules": "all-linear"},
    "one layer": {"layers_to_transform": [1]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "whole tables": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "biases": {"bias": "all"},
}  # fmt: skip


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
        assert torch.equal(source.read(name, slice(3, 9)), found[3:9])
        changed += not torch.equal(found, own[name])
    assert changed >= {"one layer": 3, "head": 3}.get(kind, 6)
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
        merged.append(len(weight))
        return merge(self, tensor, weight, rows)

    monkeypatch.setattr(Adapter, "merge", counted)
    monkeypatch.setattr("symphony_moe.sources.TABLE_ROWS", 64)
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
    windows = held_out_text(recipe, open_sources(recipe))
    expected, _ = losses_and_routing(merged, windows)
    runs.append(pipeline.build(recipe, tmp_path / "with-adapter"))
    pipeline.verify(runs[0])
    found = pipeline.evaluate(runs[0])["sources"]["b"]
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
    assert "adapter: my-lora" in card and str(tmp_path) not in card
    described = run.read_json(run.plan)["sources"][1]
    assert (described["adapter"], described["adapter_base"]) == ("my-lora", name)
    assert "b, with the LoRA my-lora</td>" in pipeline.report(run).read_text()


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
    settings = {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": "pissa"}
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    with pytest.raises(SourceError, match=r"^a: .* decomposition of the head \(pissa\)"):
        open_source("a", SourceSpec(model=str(base), data="x.txt", adapter=str(adapter)))


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_tied_embeddings_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    """peft's merged model has a new table as embeddings and the old one as head, or the reverse."""
    base = make_model(tmp_path / "model", "qwen2", 0)
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    with pytest.raises(SourceError, match=r"^a: .*, and the model's head is its embeddings"):
        open_source("a", SourceSpec(model=str(base), data="x.txt", adapter=str(adapter)))
