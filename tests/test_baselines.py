"""The paper's baselines and its ablations against their definitions, tensor by tensor."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import VARIANTS, make_model, make_recipe
from symphony_moe import pipeline
from symphony_moe.align import match_neurons
from symphony_moe.calibrate import calibration_windows
from symphony_moe.cli import main
from symphony_moe.errors import RecipeError
from symphony_moe.families import DOWN, GATE, NEURON_AXIS, UP, read_layer_outputs
from symphony_moe.fuse import drop_neurons
from symphony_moe.recipe import load_recipe
from symphony_moe.sources import open_sources
from symphony_moe.stock import load_stock

BASELINES = ("btx", "drop-upcycling", "sparse-upcycling")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", BASELINES)
def test_a_baseline_is_what_the_paper_says(
    method: str, variant: str, recipes: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = load_recipe(recipes(variant), [f"method={method}"])
    run = pipeline.build(recipe, tmp_path / "run")
    pipeline.verify(run)
    sources = open_sources(recipe)
    anchor, family = sources[0], sources[0].family
    written = tensors_of(run.checkpoint)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        of_sources = [source.read(name) for source in sources]
        mean = torch.stack(of_sources).mean(dim=0)
        expected = anchor.read(name) if method == "sparse-upcycling" else mean
        assert relative(written[name], expected) < 1e-6
    for layer in range(anchor.config.num_hidden_layers):
        moe = read_layer_outputs(family, anchor.config, layer, len(sources), written.__getitem__)
        layers = [source.read_layer(layer) for source in sources]
        for name in family.shared:
            mean = torch.stack([weights[name] for weights in layers]).mean(dim=0)
            expected = layers[0][name] if method == "sparse-upcycling" else mean
            assert relative(moe.shared[name], expected) < 1e-6
        for number, expert in enumerate(moe.experts):
            own = layers[0 if method == "sparse-upcycling" else number]
            changed = []
            for name, axis in NEURON_AXIS.items():
                same = (expert[name] == own[name]).all(dim=1 - axis)
                changed.append(tuple((~same).nonzero().flatten().tolist()))
            wanted = len(same) // 2 if method == "drop-upcycling" else 0
            assert len(changed[0]) == wanted
            assert len(set(changed)) == 1  # the same neurons in gate, up and down
        assert 0.01 < float(moe.router.std()) < 0.03


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", BASELINES)
def test_equal_sources_make_the_dense_model(method: str, variant: str, tmp_path: Path) -> None:
    """Law 2; for Drop-Upcycling at share 0."""
    path = make_recipe(tmp_path, variant)
    for name in "bc":
        make_model(tmp_path / "models" / name, variant, seed=0)
    recipe = load_recipe(path, [f"method={method}", "experts.drop_share=0"])
    run = pipeline.build(recipe, tmp_path / "run")
    probe = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "a", dtype=torch.float32)
    with torch.inference_mode():
        expected = dense(probe).logits
        assert relative(load_stock(run.checkpoint)(probe).logits, expected) < 1e-5


def test_neurons_are_drawn_anew_with_the_matrixs_own_mean_and_deviation() -> None:
    generator = torch.Generator().manual_seed(0)
    expert = {
        name: torch.randn(shape, generator=generator) * scale + mean
        for (name, shape), scale, mean in zip(
            {GATE: (4000, 64), UP: (4000, 64), DOWN: (64, 4000)}.items(),
            (0.1, 2.0, 0.5), (0.3, -1.0, 0.0), strict=True,
        )
    }  # fmt: skip
    dropped = drop_neurons(expert, NEURON_AXIS, 0.3, "key")
    for name, axis in NEURON_AXIS.items():
        changed = ~(dropped[name] == expert[name]).all(dim=1 - axis)
        assert int(changed.sum()) == 1200
        drawn = dropped[name].index_select(axis, changed.nonzero().flatten())
        deviation = float(expert[name].std())
        assert abs(float(drawn.mean() - expert[name].mean())) < 0.02 * deviation
        assert abs(float(drawn.std()) / deviation - 1) < 0.02
        # Drawn one by one, not copied from elsewhere in the matrix.
        assert abs(float(torch.corrcoef(drawn.flatten()[:2000].view(2, -1))[0, 1])) < 0.1
    again = drop_neurons(expert, NEURON_AXIS, 0.3, "key")
    other = drop_neurons(expert, NEURON_AXIS, 0.3, "another")
    assert all(torch.equal(again[name], dropped[name]) for name in expert)
    assert not torch.equal(other[GATE], dropped[GATE])
    assert all(
        torch.equal(drop_neurons(expert, NEURON_AXIS, 0.0, "key")[name], expert[name])
        for name in expert
    )


def test_drawn_neurons_follow_the_name_of_the_source(
    recipes: Callable[[str], Path], tmp_path: Path
) -> None:
    """Law 4, and every layer has draws of its own."""
    content = json.loads(recipes("llama").read_text())
    sources = content["sources"]
    turned = content | {"sources": dict(reversed(sources.items())), "anchor": "a"}
    path = recipes("llama").with_name("turned.yaml")
    path.write_text(json.dumps(turned))
    built = [
        tensors_of(pipeline.build(load_recipe(one, ["method=drop-upcycling"]), out).checkpoint)
        for one, out in ((recipes("llama"), tmp_path / "run"), (path, tmp_path / "turned"))
    ]
    for layer in range(2):
        name = f"model.layers.{layer}.block_sparse_moe.experts.{{}}.w2.weight"
        for number in range(3):
            first, second = built[0][name.format(number)], built[1][name.format(2 - number)]
            assert torch.equal(first, second)
    source = open_sources(load_recipe(recipes("llama")))[0]
    changed = [
        ~(built[0][f"model.layers.{n}.block_sparse_moe.experts.0.w1.weight"]
          == source.read(f"model.layers.{n}.{GATE}")).all(dim=1)
        for n in range(2)
    ]  # fmt: skip
    assert not torch.equal(*changed)


def test_a_share_of_the_neurons_is_matched() -> None:
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(50, generator=generator)
    strength = torch.rand(50, generator=generator) * 0.5 + 0.5
    correlation = torch.zeros(50, 50)
    correlation[torch.arange(50), order] = strength
    assert torch.equal(match_neurons(correlation), order)
    assert torch.equal(match_neurons(correlation, 0.0), torch.arange(50))
    partial = match_neurons(correlation, 0.8)
    assert torch.equal(partial.sort().values, torch.arange(50))
    strong = strength.argsort(descending=True)[:40]
    assert torch.equal(partial[strong], order[strong])
    rest = strength.argsort(descending=True)[40:].sort().values
    assert torch.equal(partial[rest], order[rest].sort().values)


def test_the_share_of_neurons_is_a_setting(recipes: Callable[[str], Path], tmp_path: Path) -> None:
    orders = []
    for share in (1, 0.5, 0):
        recipe = load_recipe(recipes("llama"), [f"align.neuron_share={share}"])
        run = pipeline.build(recipe, tmp_path / f"run-{share}")
        pipeline.verify(run)
        orders.append(load_file(run.alignment)["b.layers.0.neurons"])
    moved = [int((order != torch.arange(48)).sum()) for order in orders]
    assert moved[2] == 0 < moved[1] < moved[0]


def test_calibration_text_of_one_domain(recipes: Callable[[str], Path], tmp_path: Path) -> None:
    one = load_recipe(recipes("llama"), ["calibration.domains=[b]"])
    every = load_recipe(recipes("llama"))
    windows = calibration_windows(one, open_sources(one))
    assert list(windows) == ["b"]
    # The same number of tokens in total.
    total = sum(map(len, calibration_windows(every, open_sources(every)).values()))
    assert len(windows["b"]) == total
    run = pipeline.build(one, tmp_path / "run")
    pipeline.verify(run, deep=True)
    record = load_file(run.alignment)
    assert not torch.equal(
        record["c.layers.0.correlation"],
        load_file(pipeline.build(every, tmp_path / "every").alignment)["c.layers.0.correlation"],
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["calibration.domains=[nobody]"], "calibration.domains: 'nobody' is no source"),
        (["calibration.domains=[]"], "calibration.domains"),
        (["method=harmonized", "calibration.domains=[a]"], "text of every source"),
        (["router.init=regression", "calibration.domains=[a]"], "text of every source"),
        (["method=harmonized", "experts.init=drop"], "refit.method"),
        (["experts.drop_share=1.5"], "experts.drop_share"),
        (["align.neuron_share=-1"], "align.neuron_share"),
    ],
)
def test_settings_that_contradict_each_other(
    settings: list[str], message: str, recipes: Callable[[str], Path]
) -> None:
    with pytest.raises(RecipeError, match=message.replace("[", r"\[")):
        load_recipe(recipes("llama"), settings)


def test_a_baseline_from_the_command_line(
    recipes: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = [str(recipes("qwen3")), "--out", str(out), "--set", "method=drop-upcycling"]
    assert main(["build", *arguments]) == 0
    assert main(["verify", str(out)]) == 0
    assert main(["evaluate", str(out)]) == 0
    assert main(["report", str(out)]) == 0
    capsys.readouterr()
