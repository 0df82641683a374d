"""`method: harmonized` keeps the laws of docs/design.md, for every family: aligned, fitted layer by
layer, and never worse than the plain mean of its sources.

Pico models have random weights, so their loss on text means nothing, and which of the two models
is written is chosen here (`preferring`) where a test is about one of them. What needs a loss that
means something is tested on the bundled models.
"""

import importlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checks import (
    EXACT,
    Killed,
    difference,
    expert_names,
    load_clean,
    logits_of,
    models_of,
    mostly_slow,
    random_text,
    read_tensors,
    router_name,
    source_ffn,
)
from conftest import COMMON, VARIANTS, make_recipe, make_text, router_of, target_of_variant
from symphony_moe import pipeline
from symphony_moe.building import build as build_module
from symphony_moe.building import candidate
from symphony_moe.building.fit_head import fit_head
from symphony_moe.errors import RunFolderError, SourceError, TextError, VerificationError
from symphony_moe.evaluation.losses import losses_and_routing
from symphony_moe.files import hash_folder, reserve, sha256_of
from symphony_moe.recipe.load import load_recipe, resolve_recipe
from symphony_moe.runs.folder import RunFolder
from symphony_moe.sources.opening import open_sources
from symphony_moe.sources.stock import load_stock
from symphony_moe.text.texts import Texts
from symphony_moe.text.windows import Packed
from twin import scramble

Recipes = Callable[[str], Path]
Runs = Callable[[str], RunFolder]

QUICK = ("method=harmonized", "fit.epochs=1", "calibration.windows=random")
ALIGNED_ONLY = ("method=harmonized", "fit.method=none", "router.init=random")
MAPS = ("residual", "order", "phases", "values", "neurons", "tokens")
"""What keys of `alignment.safetensors` that change the result end with."""
STAYING = ("olmo2",)
"""Variants whose layers' gains do not fold."""
FAMILIES = ("llama", "qwen2", "qwen3")
"""One variant of each kind: no biases, biases, normed heads."""


@contextmanager
def preferring(model: str) -> Iterator[None]:
    """Let the other one of `harmonized` and `plain mean` lose 100 nats more than it does."""
    whole = candidate.next_token_losses
    other = {"harmonized": "plain", "plain mean": "new"}[model]

    def losses(calibration: Any, stream: str, head: Tensor) -> dict[str, float]:
        more = 100.0 if stream == other else 0.0
        return {name: loss + more for name, loss in whole(calibration, stream, head).items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidate, "next_token_losses", losses)
        yield


def build(
    recipe: Path, out: Path, *overrides: str, prefer: str | None = "harmonized", **how: Any
) -> RunFolder:
    loaded = load_recipe(recipe, (*QUICK, *overrides))
    if prefer is None:
        return pipeline.build(loaded, out, **how)
    with preferring(prefer):
        return pipeline.build(loaded, out, **how)


def changed(recipe: Path, out: Path, **sections: Any) -> Path:
    """A copy of a recipe beside it, with some sections replaced."""
    path = recipe.with_name(out.name)
    path.write_text(json.dumps(json.loads(recipe.read_text()) | sections))
    return path


def once(
    make: Callable[[str, Path], Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Any]:
    """variant -> what `make` gives, made once. Nobody changes what is in there."""
    made: dict[str, Any] = {}

    def get(variant: str) -> Any:
        if variant not in made:
            made[variant] = make(variant, tmp_path_factory.mktemp(f"harmonized-{variant}"))
        return made[variant]

    return get


@pytest.fixture(scope="module")
def fitted(recipes: Recipes, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """variant -> the fitted model of three random sources."""
    return once(lambda variant, root: build(recipes(variant), root / "run"), tmp_path_factory)


@pytest.fixture(scope="module")
def fallen_back(recipes: Recipes, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """variant -> the plain mean of three random sources, which a fit has found to be better."""
    return once(
        lambda variant, root: build(recipes(variant), root / "run", prefer="plain mean"),
        tmp_path_factory,
    )


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Recipes:
    """variant -> recipe of a model and two scrambled twins of it."""

    def make(variant: str, root: Path) -> Path:
        recipe = make_recipe(root / "recipe", variant, count=1)
        models = models_of(recipe)
        for seed, name in enumerate("bc"):
            scramble(models / "a", models / name, seed=seed)
            make_text(root / "recipe" / f"{name}.jsonl", seed=seed + 1)
        sources = {n: {"model": f"models/{n}", "data": f"{n}.jsonl"} for n in "abc"}
        recipe.write_text(json.dumps(json.loads(recipe.read_text()) | {"sources": sources}))
        return recipe

    return once(make, tmp_path_factory)


@pytest.fixture(scope="module")
def aligned_only(twins: Recipes, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """variant -> a model and two twins of it, aligned, and nothing fitted."""

    def make(variant: str, root: Path) -> RunFolder:
        return pipeline.build(load_recipe(twins(variant), ALIGNED_ONLY), root / "run")

    return once(make, tmp_path_factory)


def windows_of(recipe: Path) -> dict[str, Tensor]:
    loaded = load_recipe(recipe, QUICK)
    windows = Texts(loaded, open_sources(loaded)).calibration_windows()
    return {name: text.windows for name, text in windows.items()}


def validation_text(recipe: Path) -> dict[str, Packed]:
    loaded = load_recipe(recipe, QUICK)
    return Texts(loaded, open_sources(loaded)).validation_windows()


@torch.inference_mode()
def loss_by_hand(model: Any, text: Packed) -> float:
    """Of stock: every token but the first of a document."""
    return float(model(input_ids=text.windows, labels=text.labels).loss)


def maps_in(run: RunFolder) -> set[str]:
    return {key for key in load_file(run.alignment) if key.endswith(MAPS)}


# ------------------------------------------------------------------------------------------ laws


@pytest.mark.parametrize(
    ("variant", "prefer"),
    mostly_slow(
        [*((variant, "harmonized") for variant in VARIANTS), ("qwen2", "plain mean")],
        ("qwen2-granitemoe", "harmonized"),
        ("qwen2", "plain mean"),
    ),
)
def test_identical_sources_give_the_dense_model(
    variant: str, prefer: str, recipes: Recipes, tmp_path: Path
) -> None:
    """Law 2, through stock transformers, whatever the router. There is nothing to align or to fit,
    and rounding is not taken for something."""
    project = shutil.copytree(recipes(variant).parent, tmp_path / "same")
    sources = {n: {"model": "models/a", "data": f"{n}.jsonl"} for n in "abc"}
    path = changed(project / "recipe.yaml", project / "same.yaml", sources=sources)
    run = build(path, tmp_path / "run", prefer=prefer)
    dense, moe = load_clean(project / "models" / "a"), load_clean(run.checkpoint)
    text = random_text(0, 3, 48)
    mask = torch.ones_like(text)
    mask[0, :7], mask[1, :20] = 0, 0
    assert difference(logits_of(moe, text), logits_of(dense, text)) <= EXACT
    padded, expected = (logits_of(m, text, mask)[mask.bool()] for m in (moe, dense))
    assert difference(padded, expected) <= EXACT
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in moe.model.layers:
            weight = router_of(layer).weight
            weight.copy_(2 * torch.randn(weight.shape, generator=generator))
    assert difference(logits_of(moe, text), logits_of(dense, text)) <= EXACT
    metrics = run.read_json(run.metrics)
    steps = [step for layer in metrics["fit"]["layers"] for step in layer.items()]
    steps += metrics["fit"]["head"].items()
    assert [what for what, step in steps if step.get("kept")] == []
    assert metrics["alignment"].keys() == {"residual", "heads"}
    for by_source in metrics["alignment"].values():
        for values in by_source.values():
            assert not values["used"] and values["before"] == pytest.approx([1, 1], abs=1e-5)


@pytest.mark.parametrize(
    ("variant", "anchor"),
    mostly_slow(
        [*((variant, "a") for variant in VARIANTS), ("qwen2", "b")],
        ("olmo2", "a"),
        ("qwen2", "b"),
    ),
)
def test_scrambled_twins_are_brought_back(
    variant: str, anchor: str, twins: Recipes, tmp_path: Path
) -> None:
    """Law 3: a model and two twins in strange parameters, to the model's logits; also where the
    anchor is a twin."""
    path = changed(twins(variant), tmp_path / f"anchor-{anchor}.yaml", anchor=anchor)
    run = build(path, tmp_path / "run")
    text = random_text(1, 3, 48)
    expected = logits_of(load_clean(models_of(path) / "a"), text)
    assert difference(logits_of(load_clean(run.checkpoint), text), expected) <= 1e-4
    others = {"a", "b", "c"} - {anchor}
    for kind, by_source in run.read_json(run.metrics)["alignment"].items():
        assert set(by_source) == others, kind
        for values in by_source.values():
            assert values["used"] and max(values["before"]) < 0.9
            assert values["after"] == pytest.approx([1, 1], abs=1e-4)


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe of the bundled English model and two scrambled twins of it."""
    root = tmp_path_factory.mktemp("english")
    original = {"model": "bundled:strangers/english", "data": "bundled:english"}
    content: dict[str, Any] = {
        "sources": {"english": original, "other": original},
        "method": "harmonized",
        "calibration": {"tokens": 3072, "sequence_length": 128},
        "fit": {"epochs": 1},
        "output": {"dtype": "float32"},
        "evaluation": {"tokens": 4096, "sequence_length": 128},
    }
    folder = open_sources(resolve_recipe(content, root, "english"))[0].folder
    twins = {
        f"twin{seed}": {"model": str(scramble(folder, root / f"{seed}", seed=seed))}
        for seed in (1, 2)
    }
    data = {"data": "bundled:english"}
    return content | {"sources": {"english": original} | {n: t | data for n, t in twins.items()}}


@pytest.mark.parametrize("count", mostly_slow([1, 2]))
def test_a_real_models_twins_lose_what_the_model_loses(
    count: int, english: dict[str, Any], tmp_path: Path
) -> None:
    """Law 3: to 1e-3 nats on held-out text, where their plain mean loses nats. Nothing is helped
    here: the build itself finds out which of the two is better."""
    names = list(english["sources"])[: 1 + count]
    sources = {name: english["sources"][name] for name in names}
    recipe = resolve_recipe(english | {"sources": sources}, tmp_path, "twins")
    run = pipeline.build(recipe, tmp_path / "run")
    opened = open_sources(recipe)
    windows = {"english": Texts(recipe, opened).held_out_text()["english"]}
    dense, moe = (
        losses_and_routing(load_stock(folder), windows)[0]["english"]
        for folder in (opened[0].folder, run.checkpoint)
    )
    assert 2 < dense < 3 and abs(moe - dense) <= 1e-3
    fit = run.read_json(run.metrics)["fit"]
    assert fit["chosen"] == "harmonized"
    assert fit["loss"]["plain mean"] > fit["loss"]["harmonized"] + 1


def assert_reordered(
    variant: str, first: Mapping[str, Tensor], second: dict[str, Tensor], order: Sequence[str]
) -> None:
    """`second` is `first` with its experts and router rows in another order, and the backbone
    changed by rounding only."""
    places = ["abc".index(name) for name in order]
    assert first.keys() == second.keys()
    for layer in range(2):
        name = f"model.layers.{layer}.{router_name(variant)}"
        assert torch.equal(second.pop(name), first[name][places]), name
        for expert, place in enumerate(places):
            names = expert_names(variant, layer, expert), expert_names(variant, layer, place)
            for new, old in zip(*names, strict=True):
                assert torch.equal(second.pop(new), first[old]), old
    for name, tensor in second.items():
        if first[name].any():
            assert difference(tensor, first[name]) <= 1e-6, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "prefer"),
    mostly_slow(
        [*((variant, "harmonized") for variant in VARIANTS), ("qwen3", "plain mean")],
        ("llama-tied-rope3", "harmonized"),
    ),
)
def test_reordering_sources_permutes_experts_and_routers_only(
    variant: str,
    prefer: str,
    recipes: Recipes,
    fitted: Runs,
    fallen_back: Runs,
    tmp_path: Path,
) -> None:
    """Law 4, with refinement: where the anchor is named, no fit depends on the order."""
    project = shutil.copytree(recipes(variant).parent, tmp_path / "recipe")
    order = ["c", "a", "b"]
    sources = json.loads((project / "recipe.yaml").read_text())["sources"]
    path = changed(
        project / "recipe.yaml",
        project / "reordered.yaml",
        sources={name: sources[name] for name in order},
        anchor="a",
    )
    run = build(path, tmp_path / "run", prefer=prefer)
    usual = (fitted if prefer == "harmonized" else fallen_back)(variant)
    assert_reordered(variant, read_tensors(usual.checkpoint), read_tensors(run.checkpoint), order)
    assert run.read_json(run.metrics)["fit"] == usual.read_json(usual.metrics)["fit"]


@pytest.mark.parametrize("variant", mostly_slow(COMMON, "qwen2-granitemoe"))
def test_one_recipe_gives_one_set_of_bytes(
    variant: str, recipes: Recipes, fitted: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Law 5: every file of `checkpoint/` and the maps, with refinement; also where recipe, sources
    and run lie elsewhere, and the streams wait in memory-mapped files."""
    monkeypatch.setattr("symphony_moe.building.estimate.STREAMS_IN_MEMORY", 0)
    elsewhere = shutil.copytree(recipes(variant).parent, tmp_path / "quite" / "elsewhere")
    again = build(elsewhere / "recipe.yaml", tmp_path / "again")
    usual = fitted(variant)
    assert hash_folder(again.checkpoint) == hash_folder(usual.checkpoint)
    assert again.alignment.read_bytes() == usual.alignment.read_bytes()
    assert not again.work.exists()


KILLS = [
    ("build.match", 3, "harmonized", False),
    ("records.write_bytes", 2, "harmonized", True),
    ("build.fit_layer", 2, "harmonized", False),
    ("build.CheckpointWriter.when_durable", 1, "harmonized", True),
    ("build.fit_head", 1, "harmonized", False),
    ("candidate.next_token_losses", 2, "harmonized", True),
    # Each of the two layers is assembled as it is fitted, as the plain mean, and in falling back.
    ("candidate.assemble_layer", 6, "plain mean", False),
    ("alignment.Alignment.describe", 1, "plain mean", False),
]
"""(function in building/, call, which model is written, whether streams are in files)"""


@contextmanager
def killing(function: str, call: int) -> Iterator[None]:
    """A signal before some function's n-th call."""
    module, *inside, name = function.split(".")
    owner: Any = importlib.import_module(f"symphony_moe.building.{module}")
    for part in inside:
        owner = getattr(owner, part)
    whole, calls = getattr(owner, name), 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return whole(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, counted)
        with pytest.raises(Killed):
            yield


@pytest.mark.parametrize(
    "kill",
    [
        pytest.param(kill, marks=() if place == 6 else pytest.mark.slow)
        for place, kill in enumerate(KILLS, start=1)
    ],
    ids=str,
)
def test_killed_and_resumed_equals_never_killed(
    kill: tuple[str, int, str, bool],
    recipes: Recipes,
    fitted: Runs,
    fallen_back: Runs,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Law 5: in the sweep that aligns, in the one that fits, in the head's fit and in the
    fallback."""
    function, call, prefer, mapped = kill
    if mapped:
        monkeypatch.setattr("symphony_moe.building.estimate.STREAMS_IN_MEMORY", 0)
    whole = (fitted if prefer == "harmonized" else fallen_back)("llama")
    run = RunFolder(tmp_path / "run")
    with preferring(prefer):
        with killing(function, call):
            build(recipes("llama"), run.root, prefer=None)
        assert not run.checkpoint.exists()
        build(recipes("llama"), run.root, prefer=None, resume=True)
    assert hash_folder(run.checkpoint) == hash_folder(whole.checkpoint)
    for path in (run.alignment, run.manifest, run.recipe):
        assert path.read_bytes() == (whole.root / path.name).read_bytes()
    ours, theirs = (r.read_json(r.metrics) for r in (run, whole))
    assert (ours["alignment"], ours["fit"]) == (theirs["alignment"], theirs["fit"])
    assert not run.work.exists()


def test_dume_killed_and_resumed_equals_dume_never_killed(recipes: Recipes, tmp_path: Path) -> None:
    """Text that went through its own expert goes through it again."""
    recipe = load_recipe(recipes("llama"), ["method=dume"])
    whole = pipeline.build(recipe, tmp_path / "whole")
    with killing("build.fit_layer", 2):
        pipeline.build(recipe, tmp_path / "run")
    run = pipeline.build(recipe, tmp_path / "run", resume=True)
    assert hash_folder(run.checkpoint) == hash_folder(whole.checkpoint)


def test_what_was_compared_and_fitted_is_not_done_again(
    recipes: Recipes, fitted: Runs, tmp_path: Path
) -> None:
    """A build that was cut short before its head was fitted goes through no layer's fit again."""
    with killing("build.fit_head", 1):
        build(recipes("llama"), tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("Sweep", "match", "fit_layer", "calibrate_plain"):
            patch.setattr(build_module, name, None)
        run = build(recipes("llama"), tmp_path / "run", resume=True)
    assert hash_folder(run.checkpoint) == hash_folder(fitted("llama").checkpoint)


@pytest.mark.parametrize(
    ("variant", "dtype"),
    mostly_slow(
        [
            *((variant, "float32") for variant in VARIANTS),
            ("llama-tied-rope3", "bfloat16"),
            ("qwen2", "bfloat16"),
            ("qwen3", "bfloat16"),
            ("mistral", "float16"),
        ],
        ("granite", "float32"),
        ("qwen2", "bfloat16"),
    ),
)
def test_the_checkpoint_computes_what_the_build_says(
    variant: str, dtype: str, recipes: Recipes, fitted: Runs, tmp_path: Path
) -> None:
    """Law 6: `verify` passes, stock transformers finds every tensor, norms are neutral and the head
    untied, and the loss that was reported on the validation text is the checkpoint's own (1e-4)."""
    if dtype == "float32":
        run = fitted(variant)
    else:
        run = build(recipes(variant), tmp_path / "run", f"output.dtype={dtype}")
    checks = pipeline.verify(run)
    assert "logits differ" in checks["checkpoint in stock transformers"]
    assert "were fitted" in checks["experts and backbone"]
    stored = read_tensors(run.checkpoint)
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}
    norms = [name for name in stored if name.endswith(("layernorm.weight", "model.norm.weight"))]
    assert len(norms) == 5
    neutral = [name for name in norms if bool((stored[name] == 1).all())]
    assert neutral == (["model.norm.weight"] if variant in STAYING else norms)
    model = load_clean(run.checkpoint)
    assert model.config.tie_word_embeddings is False
    head, table = stored["lm_head.weight"].float(), stored["model.embed_tokens.weight"].float()
    assert difference(head, table) > 0.1
    fit = run.read_json(run.metrics)["fit"]
    assert fit["chosen"] == "harmonized"
    aside = validation_text(recipes(variant))
    losses = [loss_by_hand(model, text) for text in aside.values()]
    assert fit["loss"]["harmonized"] == pytest.approx(sum(losses) / 3, abs=1e-4)


@pytest.mark.parametrize("variant", mostly_slow(COMMON, "llama-tied-rope3", "qwen3"))
def test_every_step_says_what_it_did(variant: str, fitted: Runs) -> None:
    """For each layer and for the head: the error on the validation text, before and after, and
    whether the step was kept, which is whether it was lowered."""
    fit = fitted(variant).read_json(fitted(variant).metrics)["fit"]
    steps = [
        layer[what] for layer in fit["layers"] for what in ("attention", "experts", "refinement")
    ]
    assert len(steps) == 6
    steps += [fit["head"][what] for what in ("closed form", "refinement")]
    softened = fit["head"]["temperature_scaling"]
    assert softened["kept"] is (softened["temperature"] > 1)
    for step in steps:
        before, after = step["error"]
        assert step["kept"] is (after < before)
    assert any(step["kept"] for step in steps)
    for layer in fit["layers"]:
        assert layer["refinement"]["steps"] > 0
        # It begins with the experts as they were fitted, or were before.
        fitted_experts = layer["experts"]["error"][layer["experts"]["kept"]]
        assert layer["refinement"]["error"][0] == pytest.approx(fitted_experts, abs=2e-6)


def test_what_is_kept_of_the_closed_form_is_what_is_written(
    recipes: Recipes, tmp_path: Path
) -> None:
    """Without refinement: matrices differ from those of a build that fits nothing, layer by layer,
    where and only where their step is said to be kept."""
    path = recipes("llama-tied-rope3")
    run = build(path, tmp_path / "run", "fit.epochs=0")
    unfitted = build(path, tmp_path / "unfitted", "fit.method=none")
    fit = run.read_json(run.metrics)["fit"]
    stored, start = read_tensors(run.checkpoint), read_tensors(unfitted.checkpoint)
    kept = []
    for number, layer in enumerate(fit["layers"]):
        assert layer.keys() >= {"attention", "experts"} and "refinement" not in layer
        attention = [f"model.layers.{number}.self_attn.{part}_proj.weight" for part in "qkvo"]
        experts = [n for e in range(3) for n in expert_names("llama", number, e)]
        for step, names in (("attention", attention), ("experts", experts)):
            for name in names:
                assert torch.equal(stored[name], start[name]) is not layer[step]["kept"], name
            kept.append(layer[step]["kept"])
    assert any(kept)


@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, "olmo2"))
def test_fitting_lowers_the_error_of_every_family(
    variant: str, recipes: Recipes, fitted: Runs, fallen_back: Runs
) -> None:
    """What the fit is for: on its own text each source's logits are better met (mean square) by the
    fitted model than by the plain mean."""
    windows = windows_of(recipes(variant))
    harmonized, plain = (load_clean(runs(variant).checkpoint) for runs in (fitted, fallen_back))
    errors = np.zeros(2)
    for name, text in windows.items():
        wanted = logits_of(load_clean(models_of(recipes(variant)) / name), text)
        for number, model in enumerate((harmonized, plain)):
            found = logits_of(model, text)
            errors[number] += float((found - wanted).square().mean() / wanted.square().mean())
    assert errors[0] < 0.8 * errors[1]


# ------------------------------------------------------------------------- what each tensor is


@pytest.mark.parametrize("variant", mostly_slow(COMMON, "qwen2", "qwen3"))
def test_embeddings_are_weighted_by_how_often_a_token_is_in_each_text(
    variant: str, recipes: Recipes, fitted: Runs
) -> None:
    """By numpy, from the recorded residual maps; one more of each, so that a token of no text gets
    the plain mean."""
    record, windows = load_file(fitted(variant).alignment), windows_of(recipes(variant))
    total, weight = np.zeros((300, 32)), np.zeros(300)
    for name, text in windows.items():
        counts = np.bincount(text.numpy().ravel(), minlength=300)
        assert record[f"{name}.tokens"].tolist() == counts.tolist()
        table = read_tensors(models_of(recipes(variant)) / name)["model.embed_tokens.weight"]
        turned = table.double().numpy()
        if name != "a" and f"{name}.residual" in record:
            turned = turned @ record[f"{name}.residual"].double().numpy()
        total += turned * (counts + 1)[:, None]
        weight += counts + 1
    expected = torch.from_numpy(total / weight[:, None])
    stored = read_tensors(fitted(variant).checkpoint)["model.embed_tokens.weight"].double()
    assert difference(stored, expected) <= 1e-6
    assert len({len(set(text.flatten().tolist())) for text in windows.values()}) > 1


def folded(state: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor of a source with the norm's gain in it (float64)."""
    tensor = state[name].double()
    layer = name.rpartition("self_attn")[0] or name.rpartition("mlp")[0]
    if f"{layer}input_layernorm.weight" not in state:  # norms after the sublayers: nothing folds
        return tensor
    if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
        return tensor * state[f"{layer}input_layernorm.weight"].double()
    if name.endswith(("gate_proj.weight", "up_proj.weight")):
        return tensor * state[f"{layer}post_attention_layernorm.weight"].double()
    return tensor


@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, "qwen2-granitemoe"))
def test_a_fit_that_is_worse_gives_the_plain_mean(
    variant: str, recipes: Recipes, fallen_back: Runs
) -> None:
    """By numpy: the mean of the sources with their gains folded, nothing aligned and no tensor
    fitted but the routers; the metrics say so, and no map is recorded. Its reported loss is the
    checkpoint's own."""
    run = fallen_back(variant)
    fit = run.read_json(run.metrics)["fit"]
    assert fit["chosen"] == "plain mean"
    assert fit["loss"]["plain mean"] < fit["loss"]["harmonized"]
    assert maps_in(run) == set()
    for by_source in run.read_json(run.metrics)["alignment"].values():
        assert not any(values["used"] for values in by_source.values())
    stored = read_tensors(run.checkpoint)
    states = [read_tensors(models_of(recipes(variant)) / name) for name in "abc"]
    for state in states:
        head = state.get("lm_head.weight", state["model.embed_tokens.weight"]).double()
        state["lm_head.weight"] = head * state["model.norm.weight"].double()
    shared, stays = [name for name in states[0] if ".mlp." not in name], variant in STAYING
    for name in shared:
        expected = torch.stack([folded(state, name) for state in states]).mean(dim=0)
        if name == "model.norm.weight" or (name.endswith("layernorm.weight") and not stays):
            expected = torch.ones_like(expected)
        if target_of_variant(variant) == "ernie4_5_moe" and ("q_proj" in name or "k_proj" in name):
            rows = torch.arange(len(expected)).view(-1, 8)  # head by head
            expected = expected[torch.stack([rows[:, :4], rows[:, 4:]], dim=2).flatten()]
        assert difference(stored[name].double(), expected) <= 1e-6, name
    for layer in range(2):
        for number, state in enumerate(states):
            prefix = f"model.layers.{layer}.mlp."
            parts = [folded(state, f"{prefix}{part}_proj.weight") for part in ("gate", "up")]
            parts.append(source_ffn(state, layer)[2].double())
            for name, expected in zip(expert_names(variant, layer, number), parts, strict=True):
                assert difference(stored[name].double(), expected) <= 1e-6, name
        router = stored[f"model.layers.{layer}.{router_name(variant)}"]
        assert float(router.std()) > 0.05, "as random as it began"
    assert load_clean(run.checkpoint).config.tie_word_embeddings is False
    aside = validation_text(recipes(variant))
    losses = [loss_by_hand(load_clean(run.checkpoint), text) for text in aside.values()]
    assert fit["loss"]["plain mean"] == pytest.approx(sum(losses) / 3, abs=1e-4)
    assert "were fitted" not in pipeline.verify(run)["experts and backbone"]


@pytest.mark.parametrize(
    ("variant", "overrides"),
    [
        ("qwen2", ["output.dtype=bfloat16"]),
        pytest.param("llama", ["router.init=random"], marks=pytest.mark.slow),
        pytest.param(
            "qwen3",
            ["align.neurons=activations", "backbone.attention=slerp"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_a_plain_mean_of_any_kind_verifies(
    variant: str, overrides: list[str], recipes: Recipes, tmp_path: Path
) -> None:
    """Law 6 for what is fallen back to: computed again tensor by tensor, and its reported loss is
    that of the checkpoint as it is written (1e-4), rounding included."""
    run = build(recipes(variant), tmp_path / "run", *overrides, prefer="plain mean")
    assert "fitted" not in pipeline.verify(run)["experts and backbone"]
    assert maps_in(run) == set()
    model = load_clean(run.checkpoint)
    losses = [loss_by_hand(model, text) for text in validation_text(run.recipe).values()]
    reported = run.read_json(run.metrics)["fit"]["loss"]["plain mean"]
    assert reported == pytest.approx(sum(losses) / 3, abs=1e-4)


@pytest.mark.parametrize("written", ["harmonized", "plain mean"])
def test_the_manifest_says_which_model_was_written(
    written: str, fitted: Runs, fallen_back: Runs, tmp_path: Path
) -> None:
    """`verify` goes by that; in a run of version 0.1, by what its metrics call `refit`."""
    whole = (fitted if written == "harmonized" else fallen_back)("llama")
    assert whole.read_json(whole.manifest)["model"] == written
    run = RunFolder(shutil.copytree(whole.root, tmp_path / "run"))
    pipeline.verify(run)
    manifest, metrics = run.read_json(run.manifest), run.read_json(run.metrics)
    other = {"harmonized": "plain mean", "plain mean": "harmonized"}[written]
    run.manifest.write_text(json.dumps(manifest | {"model": other}))
    if written == "harmonized":  # what the sources give then is not what was fitted
        with pytest.raises(VerificationError, match=r"missing or surplus|are not what the sources"):
            pipeline.verify(run)
    del manifest["model"]
    metrics["refit"] = metrics.pop("fit")
    run.manifest.write_text(json.dumps(manifest))
    run.metrics.write_text(json.dumps(metrics))
    checks = pipeline.verify(run)
    assert ("were fitted" in checks["experts and backbone"]) == (written == "harmonized")


def test_a_head_that_fits_nothing_is_found_out(
    recipes: Recipes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """Nothing but the losses on text decides: a broken fit is not written."""

    def broken(calibration: Any, start: Tensor, heads: Any, layers: Any) -> Any:
        head, refined, note = fit_head(calibration, start, heads, layers)
        return -10 * head, refined, note

    monkeypatch.setattr(build_module, "fit_head", broken)
    with caplog.at_level(logging.INFO, logger="symphony_moe"):
        run = build(recipes("llama"), tmp_path / "run", prefer=None)
    fit = run.read_json(run.metrics)["fit"]
    assert fit["chosen"] == "plain mean" and maps_in(run) == set()
    assert "writing the plain mean" in caplog.text


@pytest.mark.parametrize(
    ("which", "chosen"),
    mostly_slow(
        [("plain", "harmonized"), ("new", "plain mean"), ("both", "harmonized")],
        ("new", "plain mean"),
    ),
)
def test_a_loss_that_is_no_number_is_never_better(
    which: str, chosen: str, recipes: Recipes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = candidate.next_token_losses

    def losses(calibration: Any, stream: str, head: Tensor) -> dict[str, float]:
        found = whole(calibration, stream, head)
        return found | {"b": math.nan} if which in (stream, "both") else found

    monkeypatch.setattr(candidate, "next_token_losses", losses)
    run = build(recipes("llama"), tmp_path / "run", prefer=None)
    assert run.read_json(run.metrics)["fit"]["chosen"] == chosen


def test_a_domain_that_loses_by_the_fit_is_named(
    recipes: Recipes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """The mean over sources decides; a source on whose text the plain mean is better is told of."""
    whole = candidate.next_token_losses

    def losses(calibration: Any, stream: str, head: Tensor) -> dict[str, float]:
        found = whole(calibration, stream, head)
        return (
            {**dict.fromkeys(found, 5.0), "b": 5.2}
            if stream == "new"
            else dict.fromkeys(found, 5.1)
        )

    monkeypatch.setattr(candidate, "next_token_losses", losses)
    run = build(recipes("llama"), tmp_path / "run", prefer=None)
    fit = run.read_json(run.metrics)["fit"]
    assert fit["chosen"] == "harmonized"
    assert fit["loss_by_source"]["harmonized"] == {"a": 5.0, "b": 5.2, "c": 5.0}
    assert [r.getMessage()[:22] for r in caplog.records if "loses less" in r.getMessage()] == [
        "on the validation text"
    ]


def test_a_single_document_cannot_be_judged_by(recipes: Recipes, tmp_path: Path) -> None:
    """Refused before a run folder exists; a method that fits nothing takes it."""
    project = shutil.copytree(recipes("llama").parent, tmp_path / "project")
    one = " ".join(f"word{number}" for number in range(2000))
    (project / "b.jsonl").write_text(json.dumps({"text": one}), encoding="utf-8")
    given = ["evaluation.holdout=1e-9"]
    with pytest.raises(TextError, match=r"calibration text of b: a single document; .* give text"):
        build(project / "recipe.yaml", tmp_path / "run", *given)
    assert not (tmp_path / "run").exists()
    assert pipeline.build(load_recipe(project / "recipe.yaml", given), tmp_path / "run").checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("windows", [2, 8])
def test_branches_with_little_text_are_not_made_worse(windows: int, tmp_path: Path) -> None:
    """Bundled models of one base, and so little text that a fit can only learn it by heart: the one
    that loses less on the validation documents is written, and held-out text agrees to within 0.1
    nats (the validation text is that short)."""
    names = ("english", "python", "arithmetic", "records")
    content: dict[str, Any] = {
        "sources": {
            name: {"model": f"bundled:branches/{name}", "data": f"bundled:{name}"} for name in names
        },
        "method": "harmonized",
        "calibration": {"tokens": 4 * windows * 128, "sequence_length": 128},
        "output": {"dtype": "float32"},
        "fit": {"epochs": 2},
        "evaluation": {"tokens": 4096, "sequence_length": 128},
    }
    recipe = resolve_recipe(content, tmp_path, "branches")
    held_out = Texts(recipe, open_sources(recipe)).held_out_text()
    run = pipeline.build(recipe, tmp_path / "run")
    fit = run.read_json(run.metrics)["fit"]
    assert fit["chosen"] == min(fit["loss"], key=fit["loss"].__getitem__)
    with preferring("plain mean"):
        plain = pipeline.build(recipe, tmp_path / "plain")
    written, mean = (
        sum(losses_and_routing(load_stock(one.checkpoint), held_out)[0].values()) / 4
        for one in (run, plain)
    )
    assert written <= mean + 0.1


# ---------------------------------------------------------------------- alignment and routers alone


@pytest.mark.parametrize("variant", mostly_slow(FAMILIES, "qwen3"))
def test_alignment_alone_brings_twins_back_exactly(
    variant: str, twins: Recipes, aligned_only: Runs
) -> None:
    """Without a fit, every tensor is computed again from the recorded maps; and the model is the
    original's function (law 2)."""
    run = aligned_only(variant)
    summary = pipeline.verify(run)["experts and backbone"]
    stored = read_tensors(run.checkpoint)
    assert f"{len(stored)} tensors equal" in summary and "fitted" not in summary
    found = {key.rpartition(".")[2] for key in maps_in(run)}
    assert found == {"residual", "order", "phases", "values"}
    assert not {"head", "loss", "chosen"} & run.read_json(run.metrics).get("fit", {}).keys()
    text = random_text(2, 3, 48)
    expected = logits_of(load_clean(models_of(twins(variant)) / "a"), text)
    assert difference(logits_of(load_clean(run.checkpoint), text), expected) <= 1e-4


@pytest.mark.parametrize(
    ("kind", "variant", "endings"),
    [
        pytest.param("residual", "llama-tied-rope3", {"residual"}, marks=pytest.mark.slow),
        pytest.param("heads", "qwen2", {"order", "phases", "values"}, marks=pytest.mark.slow),
        ("heads", "qwen3", {"order", "phases", "values"}),
        ("neurons", "mistral", {"neurons"}),
        pytest.param(
            "all",
            "qwen3",
            {"residual", "order", "phases", "values", "neurons"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_each_alignment_alone_verifies(
    kind: str, variant: str, endings: set[str], twins: Recipes, tmp_path: Path
) -> None:
    """Nothing but what is asked for is recorded; where the residual is left, so are gains and the
    tied head."""
    settings = {
        "residual": ["none", "orthogonal"],
        "heads": ["none", "all"],
        "neurons": ["none", "activations"],
    }
    overrides = [f"align.{k}={v[kind in (k, 'all')]}" for k, v in settings.items()]
    recipe = load_recipe(twins(variant), [*ALIGNED_ONLY, *overrides, "output.dtype=bfloat16"])
    run = pipeline.build(recipe, tmp_path / "run")
    stored = read_tensors(run.checkpoint)
    assert f"{len(stored)} tensors equal" in pipeline.verify(run)["experts and backbone"]
    assert {key.rpartition(".")[2] for key in maps_in(run)} == endings
    assert {key.partition(".")[0] for key in maps_in(run)} == {"b", "c"}
    neutral = bool((stored["model.norm.weight"] == 1).all())
    assert neutral is (kind in ("residual", "all"))
    alignment = run.read_json(run.metrics)["alignment"]
    assert set(alignment) == (set(settings) if kind == "all" else {kind})
    assert all(values["used"] for found in alignment.values() for values in found.values())


@pytest.mark.parametrize("variant", FAMILIES)
def test_aligned_heads_alone_change_no_source(variant: str, twins: Recipes, tmp_path: Path) -> None:
    """Heads in another order and basis are the same function: with the whole backbone from the
    twin and one expert per token, the twin's own logits (law 2)."""
    recipe = load_recipe(
        changed(twins(variant), tmp_path / "heads.yaml", anchor="a"),
        [
            *ALIGNED_ONLY,
            "align.residual=none",
            "backbone.weights={a: 0, b: 1, c: 0}",
            "router.top_k=1",
        ],
    )
    run = pipeline.build(recipe, tmp_path / "run")
    moe = load_clean(run.checkpoint)
    twin = load_clean(models_of(twins(variant)) / "b")
    with torch.no_grad():
        for layer, dense in zip(moe.model.layers, twin.model.layers, strict=True):
            original = dense.self_attn.q_proj.weight
            assert difference(layer.self_attn.q_proj.weight, original) > 0.1
            # Nobody is routed anywhere but to the twin's own expert.
            gate = router_of(layer)
            gate.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 0 + 1,))
            gate.weight.zero_()
            gate.weight[1] = 1
    text = random_text(3, 2, 40)
    assert difference(logits_of(moe, text), logits_of(twin, text)) <= 1e-4


def router_inputs(model: Any, text: Tensor) -> list[Tensor]:
    """What each layer's router reads (tokens x hidden, float64)."""
    seen: list[Tensor] = []
    hooks = [
        layer.post_attention_layernorm.register_forward_hook(
            lambda _, inputs, output: seen.append(output.flatten(0, 1).double())
        )
        for layer in model.model.layers
    ]
    logits_of(model, text)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("variant", mostly_slow(["llama", "qwen2-untied"], "llama"))
def test_hidden_routers_are_the_mean_inputs_of_the_stock_model(
    variant: str, recipes: Recipes, tmp_path: Path
) -> None:
    """Without a fit, layer by layer: each source's mean router input, centred over the sources, of
    length 1 / temperature; everything else is the method's own, and verifies."""
    given = ["router.init=hidden", "router.temperature=0.5"]
    recipe = load_recipe(recipes(variant), given)
    run = pipeline.build(recipe, tmp_path / "run")
    pipeline.verify(run)
    model = load_clean(run.checkpoint)
    windows = windows_of(recipes(variant))
    inputs = {name: router_inputs(model, text) for name, text in windows.items()}
    for layer in range(2):
        means = np.stack([inputs[name][layer].mean(dim=0).numpy() for name in "abc"])
        means = means - means.mean(axis=0)
        expected = 2 * means / np.linalg.norm(means, axis=1, keepdims=True)
        found = router_of(model.model.layers[layer]).weight.detach().double()
        assert difference(found, torch.from_numpy(expected)) <= 1e-4


@pytest.mark.parametrize("variant", mostly_slow(FAMILIES, "qwen2"))
def test_regression_routers_are_the_minimum_on_the_stock_models_inputs(
    variant: str, recipes: Recipes, tmp_path: Path
) -> None:
    """Without a fit: the gradient of the mean cross-entropy plus 1e-4 times the squared weights is
    nothing there, worked out in numpy. Every other tensor is what `symphony` gives, bit for bit
    (but for the order of neurons, which is found on the text that is no validation text)."""
    runs = {}
    for init in ("random", "regression"):
        given = [f"router.init={init}", "align.neurons=none"]
        runs[init] = pipeline.build(load_recipe(recipes(variant), given), tmp_path / init)
    run = runs["regression"]
    pipeline.verify(run)
    usual, stored = read_tensors(runs["random"].checkpoint), read_tensors(run.checkpoint)
    routers = {f"model.layers.{layer}.{router_name(variant)}" for layer in range(2)}
    assert {n for n in usual if not torch.equal(usual[n], stored[n])} == routers
    layers = run.read_json(run.metrics)["fit"]["layers"]
    assert [list(layer) for layer in layers] == [["routing"]] * 2, "the balance is reported"
    model = load_clean(run.checkpoint)
    windows = windows_of(recipes(variant))
    inputs = {name: router_inputs(model, text) for name, text in windows.items()}
    for layer in range(2):
        router = router_of(model.model.layers[layer]).weight.detach().double().numpy()
        gradient = 2e-4 * router
        right = []
        for number, name in enumerate("abc"):
            x = inputs[name][layer].numpy()
            scores = x @ router.T
            shares = np.exp(scores - scores.max(axis=1, keepdims=True))
            shares /= shares.sum(axis=1, keepdims=True)
            right.append((shares.argmax(axis=1) == number).mean())
            shares[:, number] -= 1
            gradient += shares.T @ x / len(x) / 3
        assert np.abs(gradient).max() < 3e-3
        assert np.mean(right) > 0.4, "no better than chance"


def test_calibrated_routers_are_built_again_as_they_were(
    recipes: Recipes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Law 5 where nothing is compared or fitted but routers: killed between the layers, with the
    streams in files."""
    overrides = ["router.init=regression", "align.neurons=none", "output.dtype=bfloat16"]
    recipe = load_recipe(recipes("qwen2"), overrides)
    whole = pipeline.build(recipe, tmp_path / "whole")
    monkeypatch.setattr("symphony_moe.building.estimate.STREAMS_IN_MEMORY", 0)
    with killing("build.CheckpointWriter.when_durable", 2):
        pipeline.build(recipe, tmp_path / "run")
    run = pipeline.build(recipe, tmp_path / "run", resume=True)
    assert hash_folder(run.checkpoint) == hash_folder(whole.checkpoint)
    pipeline.verify(run)


# ------------------------------------------------------------------------------ verify can say no


def trusting(run: RunFolder) -> None:
    """Write hashes of what is there into the manifest, as one who covers up a change."""
    files = {run.alignment.name: sha256_of(run.alignment)} | hash_folder(run.checkpoint)
    run.update_json(run.manifest, {"files": files})


def _skew(record: dict[str, Tensor]) -> None:
    record["b.residual"] = record["b.residual"] * 1.01


def _turn(record: dict[str, Tensor]) -> None:
    record["b.residual"] = record["b.residual"].flip(1).contiguous()


def _split_group(record: dict[str, Tensor]) -> None:
    record["c.layers.1.heads.order"] = torch.tensor([0, 2, 1, 3])


def _repeat_head(record: dict[str, Tensor]) -> None:
    record["c.layers.1.heads.order"] = torch.tensor([0, 0, 2, 3])


def _stretch_values(record: dict[str, Tensor]) -> None:
    record["c.layers.0.heads.values"] = record["c.layers.0.heads.values"] * 2


def _drop(key: str) -> Callable[[dict[str, Tensor]], None]:
    def drop(record: dict[str, Tensor]) -> None:
        del record[key]

    return drop


def _drop_all(ending: str) -> Callable[[dict[str, Tensor]], None]:
    def drop(record: dict[str, Tensor]) -> None:
        for key in [key for key in record if key.endswith(ending)]:
            del record[key]

    return drop


def _of_the_anchor(record: dict[str, Tensor]) -> None:
    record["a.residual"] = torch.eye(32)


def _of_nobody(record: dict[str, Tensor]) -> None:
    record["d.layers.0.heads.order"] = torch.arange(4)


def _neurons(record: dict[str, Tensor]) -> None:
    record["b.layers.0.neurons"] = torch.arange(48)


def _count_wrongly(record: dict[str, Tensor]) -> None:
    record["b.tokens"][5] += 1000


RECORDS = [
    (_skew, "maps: b, layer 0: residual: expected orthogonal matrices"),
    (_turn, "tensors are not what the sources and the recorded maps give"),
    (_split_group, "maps: c, layer 1: heads: expected the query heads of one KV group"),
    (_repeat_head, "maps: c, layer 1: heads: expected each of 0 .. 3 once"),
    (_stretch_values, "maps: c, layer 0: value rotations: expected orthogonal matrices"),
    (_drop("c.layers.1.heads.phases"), "maps: c.layers.1.heads.phases is missing"),
    (_drop("b.residual"), "tensors are not what the sources and the recorded maps give"),
    (_drop_all(".order"), "maps: "),
    (_of_the_anchor, "maps: a.residual is missing or surplus"),
    (_of_nobody, "maps: d.layers.0.heads.order is missing or surplus"),
    (_neurons, "maps: b.layers.0.neurons is missing or surplus"),
    (_count_wrongly, "embed_tokens"),
    (_drop("b.tokens"), ""),
    (_drop_all(".tokens"), ""),
]


@pytest.fixture(scope="module")
def with_maps(twins: Recipes, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A fitted run of which every map is used, and whose embeddings are what the record gives."""
    folder = tmp_path_factory.mktemp("with-maps") / "run"
    return build(twins("llama"), folder, "fit.embeddings=false")


@pytest.mark.parametrize(
    ("change", "said"), mostly_slow(RECORDS, *RECORDS[::5]), ids=range(len(RECORDS))
)
def test_verify_notices_a_changed_record(
    change: Callable[[dict[str, Tensor]], None], said: str, with_maps: RunFolder, tmp_path: Path
) -> None:
    """By its hash, and, where the manifest agrees with the change, by what it says."""
    run = RunFolder(shutil.copytree(with_maps.root, tmp_path / "run"))
    record = load_file(run.alignment)
    change(record)
    save_file(record, run.alignment)
    with pytest.raises(VerificationError, match="alignment: hash differs"):
        pipeline.verify(run)
    trusting(run)
    with pytest.raises(VerificationError) as caught:
        pipeline.verify(run)
    assert said in str(caught.value)


@pytest.mark.parametrize(("ending", "lacks"), [("b.tokens", "b"), (".tokens", "a")])
def test_verify_needs_to_know_which_embeddings_have_learned(
    ending: str, lacks: str, recipes: Recipes, tmp_path: Path
) -> None:
    run = build(recipes("llama"), tmp_path / "run", "fit.embeddings=true")
    pipeline.verify(run)
    record = load_file(run.alignment)
    _drop_all(ending)(record)
    save_file(record, run.alignment)
    trusting(run)
    with pytest.raises(VerificationError, match=f"maps: {lacks}.tokens is missing"):
        pipeline.verify(run)


@pytest.mark.parametrize("change", [_skew, _split_group, _drop("c.layers.0.heads.values"), _turn])
def test_verify_notices_a_changed_record_of_what_is_not_fitted(
    change: Callable[[dict[str, Tensor]], None], aligned_only: Runs, tmp_path: Path
) -> None:
    run = RunFolder(shutil.copytree(aligned_only("qwen3").root, tmp_path / "run"))
    record = load_file(run.alignment)
    change(record)
    save_file(record, run.alignment)
    trusting(run)
    with pytest.raises(VerificationError):
        pipeline.verify(run)


def nudged(whole: RunFolder, root: Path, name: str) -> RunFolder:
    """A copy of a run in which one number of a tensor is another."""
    run = RunFolder(shutil.copytree(whole.root, root))
    path = run.checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[7] += 1e-3
    save_file(tensors, path, {"format": "pt"})
    return run


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.self_attn.o_proj.weight", "lm_head.weight", expert_names("llama", 0, 2)[2]],
)
def test_verify_notices_a_changed_fitted_tensor(name: str, fitted: Runs, tmp_path: Path) -> None:
    """By its hash."""
    run = nudged(fitted("llama"), tmp_path / "run", name)
    with pytest.raises(VerificationError, match=r"checkpoint/model\.safetensors \(changed\)"):
        pipeline.verify(run)


@pytest.mark.slow
def test_verify_deep_notices_a_changed_fitted_tensor_whatever_the_manifest_says(
    fitted: Runs, tmp_path: Path
) -> None:
    """A second build is the check of what no formula gives."""
    run = nudged(fitted("llama"), tmp_path / "run", "model.layers.1.self_attn.o_proj.weight")
    trusting(run)
    pipeline.verify(run)
    with preferring("harmonized"), pytest.raises(VerificationError, match="second build"):
        pipeline.verify(run, deep=True)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_verify_computes_again_what_is_not_fitted(name: str, fitted: Runs, tmp_path: Path) -> None:
    """Whatever the manifest says."""
    run = nudged(fitted("llama"), tmp_path / "run", name)
    trusting(run)
    with pytest.raises(VerificationError, match=f"not what the sources .*first {name}"):
        pipeline.verify(run)


@pytest.mark.parametrize("prefer", mostly_slow(["harmonized", "plain mean"], "harmonized"))
def test_verify_deep_fits_again(
    prefer: str, fitted: Runs, fallen_back: Runs, tmp_path: Path
) -> None:
    """A second build has the same tensors, refinement and fallback included."""
    usual = (fitted if prefer == "harmonized" else fallen_back)("llama")
    run = RunFolder(shutil.copytree(usual.root, tmp_path / "run"))
    with preferring(prefer):
        assert "the same 35 tensors" in pipeline.verify(run, deep=True)["rebuilt"]
    assert sorted(path.name for path in run.root.iterdir()) == sorted(
        path.name for path in usual.root.iterdir()
    )


# ---------------------------------------------------------------------------------- bad input


def finite(run: RunFolder) -> bool:
    tensors = [*read_tensors(run.checkpoint).values(), *load_file(run.alignment).values()]
    return all(bool(torch.isfinite(tensor.float()).all()) for tensor in tensors)


@pytest.mark.parametrize("variant", mostly_slow(FAMILIES, "qwen3"))
def test_one_short_window_per_source_is_fitted_with_a_warning(
    variant: str, recipes: Recipes, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Fewer tokens (16) than unknowns (32 and 48), besides the validation window: said once
    of each fit, and what the text leaves open stays finite."""
    given = ("calibration.tokens=48", "calibration.sequence_length=16")
    with caplog.at_level(logging.WARNING, logger="symphony_moe"):
        run = build(recipes(variant), tmp_path / "run", *given)
    said = [r.getMessage() for r in caplog.records if "unknowns" in r.getMessage()]
    assert any("down_proj of a: 16 calibration tokens for 48 unknowns" in line for line in said)
    assert len(said) == len(set(said)), "the same of every layer"
    assert finite(run)
    losses = run.read_json(run.metrics)["fit"]["loss"]
    assert all(math.isfinite(loss) for loss in losses.values())
    pipeline.verify(run)


def test_sources_may_have_different_amounts_of_text(
    recipes: Recipes, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """What one text lacks, the others have: each is used as it is."""
    project = shutil.copytree(recipes("qwen3").parent, tmp_path / "project")
    make_text(project / "b.jsonl", seed=1, documents=3)
    with caplog.at_level(logging.WARNING, logger="symphony_moe"):
        run = build(project / "recipe.yaml", tmp_path / "run", "calibration.tokens=6144")
    assert "calibration text of b: 1,792 tokens asked for" in caplog.text
    assert "validation text (an eighth of the documents) of b: 256 tokens asked for" in caplog.text
    lengths = {name: len(text) for name, text in windows_of(run.recipe).items()}
    assert lengths["a"] == 28 and lengths["b"] < 8
    assert all(1 <= len(text) <= 4 for text in validation_text(run.recipe).values())
    assert finite(run)
    pipeline.verify(run)


@pytest.mark.slow
def test_no_two_streams_share_a_file(
    recipes: Recipes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever the sources are called: in memory and in files the same bytes."""
    project = shutil.copytree(recipes("llama").parent, tmp_path / "project")
    sources = list(json.loads((project / "recipe.yaml").read_text())["sources"].values())
    # Streams are called `new/x` and `new-middle/x`.
    names = dict(zip(("x", "middle-x", "new-x"), sources, strict=True))
    path = changed(project / "recipe.yaml", project / "names.yaml", sources=names)
    in_memory = build(path, tmp_path / "memory")
    monkeypatch.setattr("symphony_moe.building.estimate.STREAMS_IN_MEMORY", 0)
    in_files = build(path, tmp_path / "files")
    assert hash_folder(in_files.checkpoint) == hash_folder(in_memory.checkpoint)


def damaged(recipe: Path, out: Path, name: str, value: float) -> Path:
    """A copy of a project in which source b has a tensor of one value."""
    project = shutil.copytree(recipe.parent, out)
    weights = project / "models" / "b" / "model.safetensors"
    tensors = load_file(weights)
    tensors[name].fill_(value)
    save_file(tensors, weights, {"format": "pt"})
    return project / "recipe.yaml"


UP = "model.layers.1.mlp.up_proj.weight"
UNALIGNED = ("align.residual=none", "align.heads=none")


@pytest.mark.parametrize(
    ("value", "overrides", "said"),
    [
        (float("nan"), (), rf"^b: {UP} in .*NaN"),
        (float("nan"), UNALIGNED, rf"^b: {UP} in .*NaN"),
        # Finite weights, and a layer that puts out infinities.
        (1e38, (), r"^b .*layer 1 puts out values that are NaN or infinite"),
        (1e38, UNALIGNED, r"^b: layer 1 puts out values that are NaN or infinite"),
    ],
)
def test_a_source_that_is_no_model_leaves_no_checkpoint(
    value: float, overrides: tuple[str, ...], said: str, recipes: Recipes, tmp_path: Path
) -> None:
    """By name, whether it is compared with the anchor or fitted to."""
    path = damaged(recipes("llama"), tmp_path / "project", UP, value)
    with pytest.raises(SourceError, match=said):
        build(path, tmp_path / "run", *overrides)
    assert not (tmp_path / "run" / "checkpoint").exists()


@pytest.mark.parametrize("moment", [2, 9])
def test_a_disk_that_fills_up_with_streams_is_a_message(
    moment: int, recipes: Recipes, fitted: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """While the sources are compared, or while the fit begins; with room, the build goes on."""
    monkeypatch.setattr("symphony_moe.building.estimate.STREAMS_IN_MEMORY", 0)
    from symphony_moe.model import streams

    calls = 0

    def full(file: Any, size: int) -> None:
        nonlocal calls
        calls += 1
        # More than any disk has, and than many a file system calls a file, from some moment on.
        reserve(file, size if calls < moment else 2**62)

    run = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(streams, "reserve", full)
        with pytest.raises(RunFolderError, match=r"no room on the disk|takes no file of"):
            build(recipes("llama"), run.root)
    assert not run.checkpoint.exists()
    assert run.layer_compared(1).exists() is (moment > 3)
    build(recipes("llama"), run.root, resume=True)
    assert hash_folder(run.checkpoint) == hash_folder(fitted("llama").checkpoint)


def test_resuming_with_other_calibration_text_is_refused(recipes: Recipes, tmp_path: Path) -> None:
    """Half of the layers fitted on one text and half on another is no build of any recipe."""
    project = shutil.copytree(recipes("llama").parent, tmp_path / "project")
    with killing("build.fit_layer", 2):
        build(project / "recipe.yaml", tmp_path / "run")
    make_text(project / "a.jsonl", seed=7)
    with pytest.raises(RunFolderError, match="calibration text has changed"):
        build(project / "recipe.yaml", tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / "checkpoint").exists()


# --------------------------------------------------------------------------------- the whole way


@pytest.mark.slow
def test_the_whole_way_with_tied_sources(recipes: Recipes, tmp_path: Path) -> None:
    """Built, verified, trained, evaluated and reported: the untied head, and the metrics of
    alignment and fit."""
    recipe = load_recipe(recipes("qwen2"), [*QUICK, "train.tokens=1024"])
    with preferring("harmonized"):
        run = pipeline.run(recipe, tmp_path / "run")
    stored = read_tensors(run.trained)
    assert "lm_head.weight" in stored and stored.keys() == read_tensors(run.checkpoint).keys()
    metrics = run.read_json(run.metrics)
    assert metrics.keys() >= {"sources", "built", "trained", "alignment", "fit", "routing"}
    assert metrics["fit"]["chosen"] == "harmonized"
    assert run.report.stat().st_size > 1000
    pipeline.verify(run)


@pytest.mark.parametrize("variant", ["llama", "qwen2"])
def test_the_plain_means_router_is_of_its_own_inputs(
    variant: str, recipes: Recipes, fallen_back: Runs
) -> None:
    """Where the logistic regression of its own router inputs has its optimum, the gradient there
    is nothing."""
    model = load_clean(fallen_back(variant).checkpoint)
    windows = windows_of(recipes(variant))
    inputs = {name: router_inputs(model, text) for name, text in windows.items()}
    for layer in range(2):
        router = dict(model.state_dict())[f"model.layers.{layer}.mlp.gate.weight"].double()
        gradient = 2e-4 * router
        for number, name in enumerate("abc"):
            x = inputs[name][layer]
            shares = torch.softmax(x @ router.T, dim=-1)
            shares[:, number] -= 1
            gradient += shares.T @ x / len(x) / 3
        assert float(gradient.abs().max()) < 3e-3
