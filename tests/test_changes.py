"""Experts that come and go: what is kept of the old run is kept byte for byte, the rest is the
method's, and nothing is done to the old run."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import Tensor

from checks import (
    Killed,
    add_tokens,
    difference,
    edit_weights,
    expert_names,
    load_clean,
    logits_of,
    mostly_slow,
    random_text,
    read_tensors,
    rewrite,
    router_name,
    tensors_of,
)
from conftest import VARIANTS, make_model, make_recipe, make_text
from symphony_moe import add, build, evaluate, load_recipe, remove, replace, report, train, verify
from symphony_moe.building import build as build_module
from symphony_moe.building.kept import KeptModel
from symphony_moe.cli import main
from symphony_moe.errors import RecipeError, RunFolderError, SourceMismatch, VerificationError
from symphony_moe.files import hash_folder, sha256_of
from symphony_moe.progress import Progress
from symphony_moe.recipe.changes import with_source, without_source
from symphony_moe.recipe.settings import Parent, Recipe, SourceSpec
from symphony_moe.runs.folder import RunFolder

Built = Callable[[str], RunFolder]
Spec = dict[str, Any]
FITTED: dict[str, Any] = {
    "fit": {"epochs": 1},
    "calibration": {"tokens": 1024, "sequence_length": 32},
}


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Spec]:
    """variant -> model and text of a fourth source, made once."""
    made: dict[str, Spec] = {}

    def get(variant: str) -> Spec:
        if variant not in made:
            root = tmp_path_factory.mktemp("newcomer")
            model = make_model(root / "d", variant, seed=3)
            made[variant] = {"model": str(model), "data": str(make_text(root / "d.jsonl", seed=3))}
        return made[variant]

    return get


@pytest.fixture(scope="module")
def bam(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A build whose experts have attention of their own. Nobody changes what is in there."""
    root = tmp_path_factory.mktemp("bam")
    recipe = make_recipe(root, method="bam", output={"architecture": "auto"})
    return build(load_recipe(recipe), root / "run")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A build of the method `harmonized`. Nobody changes what is in there."""
    root = tmp_path_factory.mktemp("fitted")
    return build(load_recipe(make_recipe(root, method="harmonized", **FITTED)), root / "run")


@pytest.fixture(scope="module")
def more(
    fitted: RunFolder, newcomer: Callable[[str], Spec], tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    """The same with a fourth expert. Nobody changes what is in there."""
    return add(fitted, "d", fitted.root.parent / "more", **newcomer("llama"))


def tensor_hashes(run: RunFolder, model: str = "checkpoint") -> dict[str, str]:
    found: dict[str, str] = run.read_json(run.manifest)["tensors"][model]
    return found


def kept_tensors(model: Path, variant: str, experts: int) -> dict[str, Tensor]:
    """The tensors of a checkpoint's backbone, of its first experts, and the rows of its routers for
    them."""
    tensors = read_tensors(model)
    for layer in range(2):
        router = f"model.layers.{layer}.{router_name(variant)}"
        tensors[router] = tensors[router][:experts]
        number = experts
        while (names := expert_names(variant, layer, number))[0] in tensors:
            for name in names:
                del tensors[name]
            number += 1
    return {name: tensor for name, tensor in tensors.items() if tensor.any()}


# What is kept


@pytest.mark.parametrize(
    "variant", mostly_slow(VARIANTS, "llama-tied-rope3", "qwen2-granitemoe", "olmo2")
)
def test_adding_keeps_every_byte_and_removing_what_was_added_gives_the_old_model_back(
    variant: str, built: Built, newcomer: Callable[[str], Spec], tmp_path: Path
) -> None:
    """For every family; `verify` finds the old run and the newcomer's source in the new one, which
    loads in stock transformers with nothing missing or surplus."""
    old, before = built(variant), hash_folder(built(variant).root)
    shutil.copytree(old.root, tmp_path / "old")
    more = add(RunFolder(tmp_path / "old"), "d", tmp_path / "more", **newcomer(variant))
    assert more.read_recipe().expert_names == ["a", "b", "c", "d"]
    kept = kept_tensors(old.checkpoint, variant, 3)
    found = kept_tensors(more.checkpoint, variant, 3)
    assert kept.keys() == found.keys()
    assert all(torch.equal(kept[name], found[name]) for name in kept)
    checks = verify(more)
    assert checks["old run"].startswith("found")
    assert "from the old run and the sources" in checks["experts and backbone"]
    assert "fitted" not in checks["experts and backbone"]
    less = remove(more, "d", tmp_path / "less")
    assert tensor_hashes(less) == tensor_hashes(old)
    assert less.alignment.read_bytes() == old.alignment.read_bytes()
    assert [*hash_folder(tmp_path / "old").values()] == [*before.values()]


def test_attention_experts_come_and_go_too(
    bam: RunFolder, newcomer: Callable[[str], Spec], tmp_path: Path
) -> None:
    shutil.copytree(bam.root, tmp_path / "old")
    more = add(RunFolder(tmp_path / "old"), "d", tmp_path / "more", **newcomer("llama"))
    verify(more)
    assert load_clean(more.checkpoint).config.num_local_experts == 4
    assert tensor_hashes(remove(more, "d", tmp_path / "less")) == tensor_hashes(bam)


@pytest.mark.parametrize("method", ["drop-upcycling", "sparse-upcycling", "dume"])
def test_where_no_layer_is_fitted_adding_is_building_anew_with_no_share_in_the_backbone(
    method: str, tmp_path: Path
) -> None:
    """The newcomer's expert and the router are those that a build makes, calibrated or not."""
    path = make_recipe(tmp_path / "recipe", count=4, method=method)
    shares = dict.fromkeys("abc", 1) | {"d": 0}
    whole = load_recipe(path, [f"backbone.weights={json.dumps(shares)}"])
    three = whole.model_copy(
        update={
            "sources": {name: whole.sources[name] for name in "abc"},
            "backbone": whole.backbone.model_copy(update={"weights": None}),
        }
    )
    spec = whole.sources["d"]
    old = build(three, tmp_path / "three")
    more = add(old, "d", tmp_path / "more", model=spec.model, data=spec.data)
    assert tensor_hashes(more) == tensor_hashes(build(whole, tmp_path / "whole"))
    # Nothing of a kept backbone is left in the recipe: without `parent` it builds anew, with all.
    assert more.read_recipe().backbone.weights is None


def test_a_share_for_who_builds_anew_is_the_mean_of_the_others() -> None:
    spec = SourceSpec(model="org/m", data="text.jsonl")
    facts = {"sources": dict.fromkeys("ab", spec), "anchor": "a"}
    old = Recipe.model_validate(facts | {"backbone": {"weights": {"a": 3.0, "b": 1.0}}})
    parent = Parent(model="checkpoint", sha256="0", tied_head=False, added="c")
    new = with_source(old, "c", {"model": "/c", "data": "/c.jsonl"}, (), parent)
    assert new.backbone.weights == {"a": 3.0, "b": 1.0, "c": 2.0}


def test_names_on_the_hub_stay_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever folders there are where the command is called; the newcomer's are looked for."""
    data = {"hub": "org/text"}
    spec = SourceSpec.model_validate({"model": "org/m", "adapter": "org/lora", "data": data})
    old = Recipe.model_validate({"sources": dict.fromkeys("abc", spec), "anchor": "a"})
    for name in ("m", "lora", "text"):
        (tmp_path / "org" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    parent = Parent(model="checkpoint", sha256="0", tied_head=False)
    assert without_source(old, "c", (), parent).sources == dict.fromkeys("ab", spec)
    new = with_source(old, "d", {"model": "org/m", "data": "d.jsonl"}, (), parent)
    assert new.sources["a"] == spec and new.sources["d"].model == str(tmp_path / "org" / "m")


def test_the_card_tells_of_models_whose_experts_are_gone(
    newcomer: Callable[[str], Spec], tmp_path: Path
) -> None:
    """Their weights are in the backbone: so are their licences and ids in the card, however many
    changes there were."""
    path = make_recipe(tmp_path / "sources", count=3, method="btx")
    for name, licence in (("a", "apache-2.0"), ("b", "cc-by-nc-4.0"), ("c", "apache-2.0")):
        card = f"---\nlicense: {licence}\nbase_model: org/{name}\n---\n"
        (path.parent / "models" / name / "README.md").write_text(card)
    old = build(load_recipe(path), tmp_path / "old")
    fewer = remove(old, "b", tmp_path / "fewer")
    other = replace(fewer, "c", tmp_path / "other", **newcomer("llama"))
    heads = [
        ModelCard.load(run.checkpoint / "README.md").data.to_dict() for run in (old, fewer, other)
    ]
    assert [head["base_model"] for head in heads[:2]] == [["org/a", "org/b", "org/c"]] * 2 or (
        sorted(heads[1]["base_model"]) == ["org/a", "org/b", "org/c"]
    )
    assert {"org/a", "org/b", "org/c"} <= set(heads[2]["base_model"])
    assert [head["license"] for head in heads] == ["other"] * 3
    text = (other.checkpoint / "README.md").read_text()
    assert "The backbone was made with b, c too, whose experts were taken out" in text
    assert "b (in the backbone; its expert was taken out): cc-by-nc-4.0" in text
    assert "had been trained" not in text
    verify(other)


def test_an_expert_is_replaced_in_its_place(
    built: Built, newcomer: Callable[[str], Spec], tmp_path: Path
) -> None:
    old = built("llama")
    other = replace(old, "b", tmp_path / "other", **newcomer("llama"))
    assert other.read_recipe().expert_names == ["a", "b", "c"]
    changed = {
        name for name, digest in tensor_hashes(other).items() if digest != tensor_hashes(old)[name]
    }
    # The router's row is drawn by the name, and stays.
    assert changed == {name for layer in (0, 1) for name in expert_names("llama", layer, 1)}
    verify(other, parent=old)


@pytest.mark.parametrize("method", ["btx", "harmonized"])
def test_adding_to_identical_sources_keeps_the_dense_function(method: str, tmp_path: Path) -> None:
    sources = {name: {"model": "models/a", "data": f"{name}.jsonl"} for name in "abc"}
    path = make_recipe(tmp_path / "twins", sources=sources, method=method, **FITTED)
    old = build(load_recipe(path), tmp_path / "run")
    model = tmp_path / "twins" / "models" / "a"
    more = add(old, "d", tmp_path / "more", model=str(model), data=str(path.parent / "c.jsonl"))
    text = random_text(0, 3, 48)
    dense = logits_of(load_clean(model), text)
    assert difference(logits_of(load_clean(more.checkpoint), text), dense) <= 1e-5


@pytest.mark.slow
def test_a_trained_runs_trained_weights_are_kept(
    run: RunFolder, newcomer: Callable[[str], Spec], tmp_path: Path
) -> None:
    """And the new run can be trained, evaluated, reported and verified in its turn."""
    train(run, ["train.tokens=512"])
    more = add(run, "d", tmp_path / "more", **newcomer("llama"))
    assert more.read_json(more.manifest)["parent"]["model"] == "trained"
    kept = kept_tensors(run.trained, "llama", 3)
    found = kept_tensors(more.checkpoint, "llama", 3)
    assert all(torch.equal(kept[name], found[name]) for name in kept)
    assert tensor_hashes(run)["model.norm.weight"] != tensor_hashes(more)["model.norm.weight"]
    train(more, ["train.tokens=512", "train.scope=router"])
    metrics = evaluate(more)
    assert {"a", "b", "c", "d"} <= metrics.trained.keys()
    assert metrics.routing["built"].experts == ["a", "b", "c", "d"]
    assert report(more).is_file()
    assert "loads with nothing missing" in verify(more)["trained in stock transformers"]
    # The old run's other model, or a later training of it, is not the one that was kept.
    train(run, ["train.tokens=1024"], overwrite=True)
    assert "another model" in verify(more)["old run"]


# What is made


def test_a_fitted_run_gets_a_fitted_expert(fitted: RunFolder, more: RunFolder) -> None:
    """Aligned into the run's coordinates, and better on its validation text than the aligned
    one."""
    assert tensor_hashes(fitted).items() - tensor_hashes(more).items() == {
        (name, digest)
        for name, digest in tensor_hashes(fitted).items()
        if name.endswith(router_name("llama"))
    }
    maps = load_file(more.alignment)
    assert {name: maps[name] for name in load_file(fitted.alignment)}.keys() < maps.keys()
    layers = more.read_json(more.metrics)["fit"]["layers"]
    for layer in layers:
        assert "attention" not in layer
        before, after = layer["experts"]["error"]
        assert layer["experts"]["kept"] and after < before
    checks = verify(more, deep=True)
    assert "14 were fitted" in checks["experts and backbone"]
    assert "the same 41 tensors" in checks["rebuilt"]


def test_removing_from_a_fitted_run_leaves_the_router_rows_of_the_others(
    fitted: RunFolder, more: RunFolder, tmp_path: Path
) -> None:
    """A calibrated router was calibrated anew when the expert was added; the rest is the old
    model's."""
    less = remove(more, "d", tmp_path / "less")
    old, new, between = (tensors_of(run.checkpoint) for run in (fitted, less, more))
    assert old.keys() == new.keys()
    for name, tensor in new.items():
        expected = between[name][:3] if name.endswith(router_name("llama")) else old[name]
        assert torch.equal(tensor, expected), name
    assert less.alignment.read_bytes() == fitted.alignment.read_bytes()
    assert "fitted" not in verify(less, parent=more)["experts and backbone"]


# Vocabularies


def test_the_newcomers_own_tokens_come_after_the_others_with_its_rows(
    built: Built, newcomer: Callable[[str], Spec], tmp_path: Path
) -> None:
    old = built("llama")
    shutil.copytree(newcomer("llama")["model"], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["vocab_size"] = 302
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    rewrite(tmp_path / "model", lambda content: add_tokens(content, ["<|x|>", "<|y|>"]))
    generator = torch.Generator().manual_seed(5)

    def grow(tensors: dict[str, Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            own = torch.randn(2, 32, generator=generator)
            tensors[name] = torch.cat((tensors[name], own))

    edit_weights(tmp_path / "model", grow)
    spec: Spec = {"model": str(tmp_path / "model"), "data": newcomer("llama")["data"]}
    more = add(old, "d", tmp_path / "more", **spec)
    verify(more, parent=old)
    assert more.read_json(more.manifest)["parent"]["made"]["token_rows"] == 2
    before, after, own = (
        tensors_of(folder) for folder in (old.checkpoint, more.checkpoint, tmp_path / "model")
    )
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name][:300], before[name])
        assert torch.equal(after[name][300:], own[name][300:])
    assert tensor_hashes(remove(more, "d", tmp_path / "less")) == tensor_hashes(old)


# What is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["add", "b"], "a source of that name already"),
        (["add", "built"], "what the result is called"),
        (
            ["add", "d", "--set", "router.init=ridge"],
            "what can change is: router.top_k, sources.d.",
        ),
        (["add", "d", "--set", "sources.d.colum=x"], "did you mean sources.d.column"),
        (["add", "d", "--set", "router.top_k=5"], "5 experts per token"),
        (["add", "other"], "are sources' names"),
        (["remove", "bb"], "did you mean b?"),
        (["remove", "zzz"], "its experts are a, b, c"),
        (["remove", "a"], "it is the anchor"),
        (["replace", "a"], "it is the anchor"),
        (["replace", "d"], "no expert of the run is called so"),
    ],
)
def test_what_makes_no_run_is_refused_before_anything_is_made(
    words: list[str],
    message: str,
    built: Built,
    newcomer: Callable[[str], Spec],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command, name, *rest = words
    spec = newcomer("llama")
    given = [] if command == "remove" else ["--model", spec["model"], "--data", spec["data"]]
    old = built("llama").root
    before = hash_folder(old)
    arguments = [command, str(old), name, *given, "--out", str(tmp_path / "new"), *rest]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists() and hash_folder(old) == before


def test_two_experts_at_least_and_as_many_as_a_token_has_are_left(tmp_path: Path) -> None:
    path = make_recipe(tmp_path / "recipe", method="btx", router={"top_k": 3})
    old = build(load_recipe(path), tmp_path / "run")
    with pytest.raises(RecipeError, match=r"3 experts per token, but there are only 2"):
        remove(old, "b", tmp_path / "less")
    less = remove(old, "b", tmp_path / "less", overrides=["router.top_k=2"])
    assert load_clean(less.checkpoint).config.num_experts_per_tok == 2
    with pytest.raises(RecipeError, match="a would be the only expert left"):
        remove(less, "c", tmp_path / "one")


def test_a_model_of_another_shape_is_refused(built: Built, tmp_path: Path) -> None:
    spec: Spec = {"model": "bundled:strangers/python", "data": "bundled:python"}
    with pytest.raises(SourceMismatch, match="hidden_size"):
        add(built("llama"), "d", tmp_path / "new", **spec)
    assert not (tmp_path / "new").exists()


def test_the_old_run_is_never_written_over_or_into(run: RunFolder, tmp_path: Path) -> None:
    before = hash_folder(run.root)
    for out in (run.root, run.root / "new", tmp_path):
        for overwrite in (True, False):
            with pytest.raises(RunFolderError, match="beside it"):
                remove(run, "b", out, overwrite=overwrite)
    assert hash_folder(run.root) == before


def test_an_out_that_is_there_is_refused_and_overwritten_only_when_asked(
    run: RunFolder, tmp_path: Path
) -> None:
    less = remove(run, "b", tmp_path / "less")
    with pytest.raises(RunFolderError, match="exists; choose another --out"):
        remove(run, "c", less.root)
    assert less.read_recipe().expert_names == ["a", "c"]
    with pytest.raises(RunFolderError, match="another recipe"):
        remove(run, "c", less.root, resume=True)
    assert remove(run, "c", less.root, overwrite=True).read_recipe().expert_names == ["a", "b"]


def test_only_a_finished_run_is_changed(run: RunFolder, tmp_path: Path) -> None:
    run.training.mkdir(parents=True)
    run.training_begun.write_text("{}")
    with pytest.raises(RunFolderError, match="a training is under way, or was cut short"):
        remove(run, "b", tmp_path / "less")
    shutil.rmtree(run.work)
    run.alignment.rename(tmp_path / "maps")
    with pytest.raises(RunFolderError, match=r"alignment\.safetensors: not what"):
        remove(run, "b", tmp_path / "less")
    (tmp_path / "maps").rename(run.alignment)
    with (run.checkpoint / "config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(RunFolderError, match=r"not what manifest\.json says"):
        remove(run, "b", tmp_path / "less")
    run.checkpoint.rename(tmp_path / "gone")
    with pytest.raises(RunFolderError, match="no finished checkpoint/"):
        remove(run, "b", tmp_path / "less")
    shutil.move(run.root, tmp_path / "table" / "btx-seed1")
    with pytest.raises(RunFolderError, match="holds several runs"):
        remove(RunFolder(tmp_path / "table"), "b", tmp_path / "less")
    assert not (tmp_path / "less").exists()


def test_an_old_run_that_changes_while_it_is_read_is_noticed(
    run: RunFolder, newcomer: Callable[[str], Spec], tmp_path: Path
) -> None:
    def write(step: Progress) -> None:
        if step.stage == "build":
            (run.checkpoint / "config.json").write_text("{}")

    with pytest.raises(RunFolderError, match="was changed while it was read"):
        add(run, "d", tmp_path / "more", **newcomer("llama"), progress=write)
    assert not (tmp_path / "more" / "checkpoint").exists()


def test_no_build_claims_to_make_a_changed_run(run: RunFolder, tmp_path: Path) -> None:
    """Its recipe does not say how the backbone was made."""
    recipe = remove(run, "b", tmp_path / "less").read_recipe()
    with pytest.raises(RecipeError, match="symphony add"):
        build(recipe, tmp_path / "anew")
    anew = build(recipe.model_copy(update={"parent": None}), tmp_path / "anew")
    assert anew.checkpoint.is_dir()


# Kills


def test_a_change_that_was_killed_looks_unfinished_and_goes_on(
    fitted: RunFolder,
    more: RunFolder,
    newcomer: Callable[[str], Spec],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole, calls = build_module.layer_outputs, 0

    def killed(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:  # the first layer is done
            raise Killed
        return whole(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "layer_outputs", killed)
        with pytest.raises(Killed):
            add(fitted, "d", tmp_path / "cut", **newcomer("llama"))
    assert "d is a stranger to the run" in caplog.text
    cut = RunFolder(tmp_path / "cut")
    assert not cut.checkpoint.exists()
    with pytest.raises(RunFolderError, match="no finished checkpoint"):
        remove(cut, "b", tmp_path / "less")
    add(fitted, "d", cut.root, resume=True, **newcomer("llama"))
    assert hash_folder(cut.checkpoint) == hash_folder(more.checkpoint)
    assert cut.manifest.read_bytes() == more.manifest.read_bytes()
    assert not cut.work.exists()


# Verification


def _with_true_hashes(run: RunFolder, change: Callable[[dict[str, Tensor]], Any]) -> None:
    edit_weights(run.checkpoint, change)
    weights = run.checkpoint / "model.safetensors"
    files = run.read_json(run.manifest)["files"]
    files["checkpoint/model.safetensors"] = sha256_of(weights)
    run.update_json(run.manifest, {"files": files})


@pytest.mark.parametrize("name", ["model.norm.weight", expert_names("llama", 1, 0)[1]])
def test_verify_finds_what_was_not_kept(
    name: str, fitted: RunFolder, more: RunFolder, tmp_path: Path
) -> None:
    """Even where every hash agrees with the manifest: as long as the old run is there."""
    shutil.copytree(fitted.root, tmp_path / fitted.root.name)
    shutil.copytree(more.root, tmp_path / "more")
    run = RunFolder(tmp_path / "more")

    def nudge(tensors: Mapping[str, Tensor]) -> None:
        tensors[name].view(-1)[3] += 1e-3

    _with_true_hashes(run, nudge)
    with pytest.raises(VerificationError, match="not what the sources"):
        verify(run)
    (tmp_path / fitted.root.name).rename(tmp_path / "elsewhere")
    assert "is not compared with it" in verify(run)["old run"]
    with pytest.raises(VerificationError, match="not what the sources"):
        verify(run, parent=RunFolder(tmp_path / "elsewhere"))


def test_verify_compares_the_newcomer_without_the_old_run(
    built: Built, newcomer: Callable[[str], Spec], tmp_path: Path
) -> None:
    more = add(built("llama"), "d", tmp_path / "more", **newcomer("llama"))
    assert "8 tensors equal; 39 were kept" in verify(more)["experts and backbone"]

    def nudge(tensors: Mapping[str, Tensor]) -> None:
        tensors[expert_names("llama", 1, 3)[0]][3, 5] += 1e-3

    _with_true_hashes(more, nudge)
    with pytest.raises(VerificationError, match="not what the sources"):
        verify(more)
    with pytest.raises(RunFolderError, match="not the old run"):
        verify(more, deep=True)


def test_a_run_that_was_built_has_no_old_run(built: Built) -> None:
    with pytest.raises(RunFolderError, match="did not come of another run"):
        verify(built("llama"), parent=built("qwen3"))
    assert "parent" not in built("llama").recipe.read_text()


def test_what_a_recipe_says_of_its_parent_is_read_back(more: RunFolder, fitted: RunFolder) -> None:
    parent = more.read_recipe().parent
    assert parent == KeptModel.of(fitted).parent(added="d", removed=None)
    assert str(fitted.root) not in more.recipe.read_text()
    assert str(fitted.root) not in more.manifest.read_text()
    again = Recipe.model_validate(
        json.loads(json.dumps(more.read_recipe().model_dump(mode="json")))
    )
    assert again == more.read_recipe()
