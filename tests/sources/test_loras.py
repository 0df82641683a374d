"""Many LoRAs of one model: it is read once for all of them, and the result is the same; LoRAs that
make no experts are named; docs/how-to/loras.md, as it stands there."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checks import make_adapter
from conftest import make_model, make_text
from symphony_moe import pipeline
from symphony_moe.cli import main
from symphony_moe.errors import SourceMismatch
from symphony_moe.files import FileHasher
from symphony_moe.model.checkpoint import tensor_reader
from symphony_moe.recipe.load import load_recipe
from symphony_moe.sources import source
from symphony_moe.sources.opening import open_sources
from symphony_moe.sources.source import Source, read_layers

FFN = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "o_proj"]
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "loras.md"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, LoRAs of it and text. Nobody changes what is in there."""
    root = tmp_path_factory.mktemp("loras")
    base = make_model(root / "models" / "base", "llama", 0)
    targets = {"math": FFN, "code": [*FFN, "v_proj"], "law": ATTENTION, "art": ATTENTION}
    for number, (name, modules) in enumerate(targets.items()):
        settings: dict[str, Any] = {"target_modules": modules, "lora_alpha": 4 + number}
        make_adapter(base, root / "loras" / name, **settings)
    for number, name in enumerate(("general", *targets)):
        (root / "data").mkdir(exist_ok=True)
        make_text(root / "data" / f"{name}.jsonl", seed=number)
    return root


def recipe_of(home: Path, names: list[str], path: Path, **sections: Any) -> Path:
    """A recipe of LoRAs by name, and of the model itself as `general`."""
    content = {
        "sources": {
            name: {"model": str(home / "models/base"), "data": str(home / f"data/{name}.jsonl")}
            | ({} if name == "general" else {"adapter": str(home / "loras" / name)})
            for name in names
        },
        "calibration": {"tokens": 1024, "sequence_length": 64},
        "evaluation": {"tokens": 256, "sequence_length": 64},
        "output": {"dtype": "float32"},
    }
    path.write_text(json.dumps(content | sections))
    return path


@pytest.mark.parametrize(("method", "passes"), [("btx", 1), ("symphony", 2), ("dume", 2)])
def test_the_model_of_many_loras_is_read_hashed_and_cut_with_once(
    method: str, passes: int, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each matrix once in each pass over the layers, whatever the number of sources; at most one
    of each is held beside what is made of it."""
    names = ["general", "math", "code", "law"]
    read, hashed, tokenizers = Counter[str](), Counter[Path](), Counter[Path]()
    stored, hash_, load = Source._stored, FileHasher._hash, source.load_tokenizer

    def counted(self: Source, name: str, rows: slice | None) -> Tensor:
        found = stored(self, name, rows)
        read[name] += found.ndim > 1
        return found

    def counted_hash(self: FileHasher, path: Path) -> str:
        hashed[path] += 1
        return hash_(self, path)

    def counted_load(folder: Path) -> Any:
        tokenizers[folder] += 1
        return load(folder)

    monkeypatch.setattr(Source, "_stored", counted)
    monkeypatch.setattr(FileHasher, "_hash", counted_hash)
    monkeypatch.setattr(source, "load_tokenizer", counted_load)
    path = recipe_of(home, names, tmp_path / "recipe.yaml", method=method)
    pipeline.build(load_recipe(path), tmp_path / "run")
    assert +read and max(read.values()) <= passes
    assert set(hashed.values()) == {1}
    assert set(tokenizers.values()) == {1} and len(tokenizers) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_sources_share_is_what_each_reads_by_itself(
    dtype: torch.dtype, home: Path, tmp_path: Path
) -> None:
    """Layers and tables, whatever the dtype of the file and the order of the sources; a tensor that
    no LoRA changes is one in memory."""
    base = tmp_path / "base"
    shutil.copytree(home / "models/base", base)
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(base)
    other = make_model(tmp_path / "other", "llama", 5)
    path = recipe_of(home, ["math", "general", "code"], tmp_path / "recipe.yaml")
    content = json.loads(path.read_text())
    for spec in content["sources"].values():
        spec["model"] = str(base)
    between = {"model": str(other), "data": content["sources"]["math"]["data"]}
    content["sources"] = {"x": between, **content["sources"], "y": between}
    path.write_text(json.dumps(content))
    sources = open_sources(load_recipe(path))
    for as_stored in (True, False):
        layers = read_layers(sources, 1, as_stored=as_stored)
        assert list(layers) == ["x", "math", "general", "code", "y"]
        for one in sources:
            for name, found in layers[one.name].items():
                alone = one.read(f"model.layers.1.{name}", as_stored=as_stored)
                assert found.dtype == alone.dtype and torch.equal(found, alone)
        q = "self_attn.q_proj.weight"
        assert layers["math"][q] is layers["general"][q] is layers["code"][q]


def test_loras_of_one_folder_build_what_loras_of_copies_build(home: Path, tmp_path: Path) -> None:
    names, hashes = ["math", "code", "law"], []
    for copied in (False, True):
        path = recipe_of(home, names, tmp_path / "recipe.yaml")
        content = json.loads(path.read_text())
        for name in names if copied else ():
            folder = tmp_path / "copies" / name
            shutil.copytree(home / "models/base", folder)
            content["sources"][name]["model"] = str(folder)
        path.write_text(json.dumps(content))
        run = pipeline.build(load_recipe(path), tmp_path / f"run-{copied}")
        hashes.append(run.read_json(run.manifest)["tensors"]["checkpoint"])
    assert hashes[0] == hashes[1]


# ------------------------------------------------------------------------------- equal experts


def test_loras_that_all_leave_the_ffn_are_refused_by_name(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is built; the model itself beside them changes nothing."""
    path = recipe_of(home, ["general", "law", "art"], tmp_path / "recipe.yaml")
    for words in (["plan", str(path)], ["build", str(path), "--out", str(tmp_path / "run")]):
        assert main(words) == 2
        error = capsys.readouterr().err
        message = error[error.index("symphony: error: ") :]
        assert "the adapters of law, art leave the expert's weights as they are" in message
        assert "(gate_proj, up_proj, down_proj)" in message
        assert len(message) < 500 and "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["bam", "sparse-upcycling", "drop-upcycling", "harmonized"])
def test_a_method_that_makes_experts_of_attention_or_makes_them_differ_takes_such_loras(
    method: str, home: Path, tmp_path: Path
) -> None:
    path = recipe_of(home, ["law", "art"], tmp_path / "recipe.yaml", method=method)
    notes = [note for note in pipeline.plan(load_recipe(path)).notes if "an expert keeps" in note]
    begins = {"bam": 0, "sparse-upcycling": 0}.get(method, 2)
    assert len(notes) == begins and all("begins as base's own" in note for note in notes)


def test_the_same_model_twice_is_no_mistake_of_an_adapter(home: Path, tmp_path: Path) -> None:
    path = recipe_of(home, ["general", "math"], tmp_path / "recipe.yaml")
    content = json.loads(path.read_text())
    del content["sources"]["math"]["adapter"]
    path.write_text(json.dumps(content))
    assert not [n for n in pipeline.plan(load_recipe(path)).notes if "adapter" in n]


def test_a_lora_of_attention_among_others_is_named_and_its_expert_is_the_models_own(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = recipe_of(home, ["general", "math", "law"], tmp_path / "recipe.yaml", method="btx")
    recipe = load_recipe(path)
    [note] = [n for n in pipeline.plan(recipe).notes if "what an expert keeps" in n]
    assert note.startswith("law: its adapter changes nothing of what an expert keeps (gate_proj")
    assert "its expert is base's own, as general's" in note
    run = pipeline.build(recipe, tmp_path / "run")
    assert note in caplog.messages
    read = tensor_reader(run.checkpoint)
    w1, w2, w3 = (
        read(f"model.layers.0.block_sparse_moe.experts.{number}.w1.weight") for number in range(3)
    )
    assert torch.equal(w1, w3) and not torch.equal(w1, w2)


def test_a_lora_that_would_leave_nothing_in_a_changed_run_is_refused(
    home: Path, tmp_path: Path
) -> None:
    """A backbone that is kept takes nothing of its attention. What is there already may be so."""
    path = recipe_of(home, ["general", "math", "law"], tmp_path / "recipe.yaml", method="btx")
    run = pipeline.build(load_recipe(path), tmp_path / "run")
    spec: dict[str, Any] = {
        "model": str(home / "models/base"),
        "data": str(home / "data/art.jsonl"),
    }
    with pytest.raises(SourceMismatch, match=r"art: its adapter .* nothing of the adapter"):
        adapter = f"sources.art.adapter={home / 'loras' / 'art'}"
        pipeline.add(run, "art", tmp_path / "more", **spec, overrides=[adapter])
    assert not (tmp_path / "more").exists()
    fewer = pipeline.remove(run, "math", tmp_path / "fewer")  # what is left is as it was
    assert fewer.read_recipe().expert_names == ["general", "law"]


def test_attention_that_a_changed_run_leaves_out_is_said(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = recipe_of(home, ["general", "math"], tmp_path / "recipe.yaml", method="btx")
    run = pipeline.build(load_recipe(path), tmp_path / "run")
    make_adapter(home / "models/base", tmp_path / "ffn", target_modules=FFN, lora_alpha=9)
    adapters = {"new": tmp_path / "ffn", "code": home / "loras" / "code"}
    for name, adapter in adapters.items():
        caplog.clear()
        pipeline.add(
            run,
            name,
            tmp_path / name,
            model=str(home / "models/base"),
            data=str(home / "data/code.jsonl"),
            overrides=[f"sources.{name}.adapter={adapter}"],
        )
        found = [m for m in caplog.messages if "changes attention too" in m]
        said = "code: its adapter changes attention too (v_proj). That part is left out"
        assert len(found) == (name == "code") and all(m.startswith(said) for m in found)


# -------------------------------------------------------------------------------------- the page


def blocks(kind: str) -> list[str]:
    """What the page has in blocks of a kind."""
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


SMALL = [
    "calibration={tokens: 1024, sequence_length: 64}",
    "evaluation={tokens: 256, sequence_length: 64}",
    "train={sequence_length: 64}",
]


@pytest.mark.slow
def test_the_page_does_what_it_says(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its settings train the FFN alone; its recipe, by its commands, becomes a model whose experts
    are those of the LoRAs."""
    for folder in ("models", "data", "loras"):
        shutil.copytree(home / folder, tmp_path / folder)
    names: dict[str, Any] = {}
    [settings], [recipe] = blocks("python"), blocks("yaml")
    exec(settings, names)
    for name in ("math", "code"):
        shutil.rmtree(tmp_path / "loras" / name)
        own = names["settings"].to_dict()
        kept = {key: own[key] for key in ("r", "lora_alpha", "target_modules", "task_type")}
        make_adapter(tmp_path / "models/base", tmp_path / "loras" / name, **kept)
    (tmp_path / "recipe.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    lines = "".join(blocks("sh")).splitlines()
    assert [line.split()[1] for line in lines].count("train") == 1
    for line in lines:
        command, *words = line.replace("=2000000", "=1024").split()
        assert command == "symphony"
        if "recipe.yaml" in words:
            words += [word for setting in SMALL for word in ("--set", setting)]
        assert main(words) == 0, line
    found = open_sources(load_recipe(tmp_path / "recipe.yaml"))
    expert = tensor_reader(tmp_path / "run/checkpoint")(
        "model.layers.1.block_sparse_moe.experts.1.w1.weight"
    )
    merged = found[1].read("model.layers.1.mlp.gate_proj.weight")
    assert found[1].name == "math" and torch.equal(expert, merged.to(expert.dtype))
    assert (tmp_path / "run/trained").is_dir() and (tmp_path / "run/report.html").is_file()
