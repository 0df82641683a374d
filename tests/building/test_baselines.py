"""The paper's baselines and ablations, and DUME, against their definitions, tensor by tensor."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from checks import difference, mostly_slow, tensors_of
from conftest import COMMON, make_model, make_recipe
from symphony_moe import pipeline
from symphony_moe.building.align import match_neurons
from symphony_moe.building.fuse import drop_neurons
from symphony_moe.cli import main
from symphony_moe.errors import RecipeError, SourceError
from symphony_moe.evaluation.cka import OutputCovariance, cka_of_experts
from symphony_moe.evaluation.losses import losses_and_routing
from symphony_moe.evaluation.routing import at_least, experts_by_rule, fixed_experts
from symphony_moe.model.families import DOWN, GATE, NEURON_AXIS, UP
from symphony_moe.model.moe_layer import read_layer_outputs, router_matrix
from symphony_moe.recipe.load import load_recipe
from symphony_moe.runs.folder import RunFolder
from symphony_moe.sources.opening import open_sources
from symphony_moe.sources.stock import load_stock
from symphony_moe.text.texts import Texts
from symphony_moe.text.windows import Packed
from twin import scramble

BASELINES = ("btx", "drop-upcycling", "sparse-upcycling", "dume")


@pytest.mark.parametrize(
    ("method", "variant"),
    mostly_slow(
        itertools.product(BASELINES, COMMON),
        *itertools.product(BASELINES, ["qwen2-granitemoe"]),
        ("btx", "llama-tied-rope3"),
    ),
)
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
        assert difference(written[name], expected) < 1e-6
    for layer in range(anchor.config.num_hidden_layers):
        names = [source.name for source in sources]
        moe = read_layer_outputs(family, anchor.config, layer, names, written.__getitem__)
        layers = [source.read_layer(layer) for source in sources]
        for name in family.shared:
            mean = torch.stack([weights[name] for weights in layers]).mean(dim=0)
            expected = layers[0][name] if method == "sparse-upcycling" else mean
            assert difference(moe.shared[name], expected) < 1e-6
        for number, expert in enumerate(moe.experts.values()):
            own = layers[0 if method == "sparse-upcycling" else number]
            changed = []
            for name, axis in NEURON_AXIS.items():
                same = (expert[name] == own[name]).all(dim=1 - axis)
                changed.append(tuple((~same).nonzero().flatten().tolist()))
            wanted = len(same) // 2 if method == "drop-upcycling" else 0
            assert len(changed[0]) == wanted
            assert len(set(changed)) == 1  # the same neurons in gate, up and down
        router = router_matrix(moe.router, names)
        if method == "dume":
            assert difference(router.norm(dim=1), torch.full((len(names),), 10.0)) < 1e-4
        else:
            assert 0.01 < float(router.std()) < 0.03


@pytest.mark.parametrize(
    ("method", "variant"),
    mostly_slow(itertools.product(BASELINES, COMMON), *itertools.product(BASELINES, ["qwen2"])),
)
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
        assert difference(load_stock(run.checkpoint)(probe).logits, expected) < 1e-5


def test_neurons_are_drawn_anew_with_the_matrixs_own_mean_and_deviation() -> None:
    generator = torch.Generator().manual_seed(0)
    expert = {
        name: torch.randn(shape, generator=generator) * scale + mean
        for (name, shape), scale, mean in zip(
            {GATE: (4000, 64), UP: (4000, 64), DOWN: (64, 4000)}.items(),
            (0.1, 2.0, 0.5),
            (0.3, -1.0, 0.0),
            strict=True,
        )
    }
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
        ~(
            built[0][f"model.layers.{n}.block_sparse_moe.experts.0.w1.weight"]
            == source.read(f"model.layers.{n}.{GATE}")
        ).all(dim=1)
        for n in range(2)
    ]
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


@pytest.mark.slow
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
    windows = Texts(one, open_sources(one)).calibration_windows()
    assert list(windows) == ["b"]
    # The same number of tokens in total.
    total = sum(map(len, Texts(every, open_sources(every)).calibration_windows().values()))
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
        (["method=harmonized", "experts.init=drop"], "fit.method"),
        (["experts.drop_share=1.5"], "experts.drop_share"),
        (["align.neuron_share=-1"], "align.neuron_share"),
    ],
)
def test_settings_that_contradict_each_other(
    settings: list[str], message: str, recipes: Callable[[str], Path]
) -> None:
    with pytest.raises(RecipeError, match=message.replace("[", r"\[")):
        load_recipe(recipes("llama"), settings)


@pytest.mark.parametrize(
    ("variant", "method"),
    mostly_slow([("qwen3", "drop-upcycling"), ("llama", "bam")], ("llama", "bam")),
)
def test_a_baseline_from_the_command_line(
    variant: str,
    method: str,
    recipes: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    arguments = [str(recipes(variant)), "--out", str(out), "--set", f"method={method}"]
    assert main(["build", *arguments]) == 0
    assert main(["verify", str(out)]) == 0
    assert main(["evaluate", str(out)]) == 0
    assert main(["report", str(out)]) == 0
    capsys.readouterr()


# BAM: q and o are experts too


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


EPS = {"rms_norm_eps": 1e-5}
BAM: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", EPS),
    "llama-tied-rope3": ("llama-tied-rope3", EPS),
    "large-eps": ("llama", {"rms_norm_eps": 1e-2, "tie_word_embeddings": True}),
    "same-eps": ("llama", {"rms_norm_eps": 1e-6}),
    "one-kv-head": ("llama", {"num_key_value_heads": 1, "head_dim": 16}),
    "gelu": ("llama", {"hidden_act": "gelu", **EPS}),
    "all-kv-heads": ("llama", {"num_key_value_heads": 4}),
    "linear": ("llama", rope("linear", factor=2.0)),
    "dynamic": ("llama", rope("dynamic", factor=2.0)),
    "yarn": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "longrope": (
        "llama",
        rope(
            "longrope",
            factor=4.0,
            short_factor=[1.0, 1.1, 1.2, 1.3],
            long_factor=[2.0, 3.0, 4.0, 5.0],
            original_max_position_embeddings=64,
        ),
    ),
    "mistral": ("mistral", {"sliding_window": None, "rms_norm_eps": 1e-5}),
}
"""What JetMoE holds: name -> (variant, changes to its config)."""


def bam_recipe(root: Path, name: str, *, equal: bool = False, **sections: Any) -> Path:
    variant, changes = BAM[name]
    path = make_recipe(root, variant, method="bam", **sections)
    for number, source in enumerate("abc"):
        make_model(root / "models" / source, variant, seed=0 if equal else number, **changes)
    return path


@pytest.fixture(scope="module")
def bam(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunFolder]:
    """Name -> finished build of three random sources, made once. Nobody changes what is in
    there."""
    made: dict[str, RunFolder] = {}

    def get(name: str) -> RunFolder:
        if name not in made:
            root = tmp_path_factory.mktemp(f"bam-{name}")
            made[name] = pipeline.build(load_recipe(bam_recipe(root, name)), root / "run")
        return made[name]

    return get


@pytest.mark.parametrize(
    "name",
    mostly_slow(
        ["llama", "llama-tied-rope3", "same-eps", "mistral"], "llama-tied-rope3", "mistral"
    ),
)
def test_bam_is_what_the_paper_says(name: str, bam: Callable[[str], RunFolder]) -> None:
    """Each expert is its source's FFN, q and o, up to the scale of the residual stream; k, v and
    all else is the mean; a KV head serves the queries that it served; there is nothing else."""
    run = bam(name)
    sources = open_sources(run.read_recipe())
    dense = sources[0].config
    scale = (1e-6 / dense.rms_norm_eps) ** 0.5
    assert (scale == 1) is (name == "same-eps")
    written = tensors_of(run.checkpoint)

    def mean(tensor: str) -> torch.Tensor:
        return torch.stack([source.read(tensor) for source in sources]).mean(dim=0)

    def take(tensor: str) -> torch.Tensor:
        return written.pop(tensor)

    embedding, norm = take("model.embed_tokens.weight"), take("model.norm.weight")
    assert difference(embedding, mean("model.embed_tokens.weight") * scale) < 1e-6
    if dense.tie_word_embeddings:
        # What the head has too much of, the norm before it has too little of.
        assert difference(norm, mean("model.norm.weight") / scale) < 1e-6
    else:
        assert difference(norm, mean("model.norm.weight")) < 1e-6
        assert difference(take("lm_head.weight"), mean("lm_head.weight")) < 1e-6
    routers = []
    for layer in range(dense.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for gain in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            assert difference(take(prefix + gain), mean(prefix + gain)) < 1e-6
        k_and_v = take(f"{prefix}self_attention.kv_proj.weight")
        for part, found in zip("kv", k_and_v.chunk(2), strict=True):
            size = found.shape[0] // dense.num_attention_heads
            shared = mean(f"{prefix}self_attn.{part}_proj.weight")
            for query in range(dense.num_attention_heads):
                head = query * dense.num_key_value_heads // dense.num_attention_heads
                repeated = found[query * size : (query + 1) * size]
                assert difference(repeated, shared[head * size : (head + 1) * size]) < 1e-6
        gates_and_ups, downs = (take(f"{prefix}mlp.{p}_linear.weight") for p in ("input", "output"))
        attention = f"{prefix}self_attention.experts"
        queries, outputs = (take(f"{attention}.{p}_linear.weight") for p in ("input", "output"))
        assert len(gates_and_ups) == len(downs) == len(queries) == len(outputs) == 3
        for number, source in enumerate(sources):
            own = source.read_layer(layer)
            assert torch.equal(gates_and_ups[number], torch.cat([own[GATE], own[UP]]))
            assert torch.equal(queries[number], own["self_attn.q_proj.weight"])
            assert difference(downs[number], own[DOWN] * scale) < 1e-6
            assert difference(outputs[number], own["self_attn.o_proj.weight"] * scale) < 1e-6
        assert not take(f"{attention}.bias").any() and not take(f"{prefix}mlp.bias").any()
        routers += [take(f"{attention}.router.layer.weight")]
        routers += [take(f"{prefix}mlp.router.layer.weight")]
    assert not written
    rows = torch.cat(routers)
    assert rows.shape == (2 * 2 * 3, 32) and len({tuple(row.tolist()) for row in rows}) == len(rows)
    assert float(rows.std()) == pytest.approx(0.02, rel=0.15)


@pytest.mark.parametrize(
    "name", mostly_slow(BAM, "llama-tied-rope3", "large-eps", "one-kv-head", "longrope")
)
def test_equal_sources_with_attention_experts_make_the_dense_model(
    name: str, tmp_path: Path
) -> None:
    """Law 2, whatever the routers, for text beyond the original context, and padded on the left."""
    run = pipeline.build(load_recipe(bam_recipe(tmp_path, name, equal=True)), tmp_path / "run")
    pipeline.verify(run)
    dense = load_stock(tmp_path / "models" / "a")
    moe = load_stock(run.checkpoint)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randint(300, (2, 150), generator=generator)
    mask = torch.ones_like(probe)
    mask[0, :9] = 0
    with torch.inference_mode():
        assert difference(moe(probe).logits, dense(probe).logits) < 1e-5
        padded, expected = (model(probe, attention_mask=mask).logits for model in (moe, dense))
        assert difference(padded[mask.bool()], expected[mask.bool()]) < 1e-5
        for tensor, weights in moe.named_parameters():
            if tensor.endswith("router.layer.weight"):
                weights.copy_(2 * torch.randn(weights.shape, generator=generator))
        assert difference(moe(probe).logits, dense(probe).logits) < 1e-5


@pytest.mark.parametrize("name", ["llama-tied-rope3", "mistral"])
@pytest.mark.parametrize("dtype", mostly_slow(["float32", "bfloat16", "float16"], "bfloat16"))
def test_stock_jetmoe_computes_what_the_pipeline_says(
    dtype: str, name: str, bam: Callable[[str], RunFolder], tmp_path: Path
) -> None:
    """Law 6, with every expert another one, and all tensors computed again."""
    path = bam(name).root.parent / "recipe.yaml"
    run = pipeline.build(load_recipe(path, [f"output.dtype={dtype}"]), tmp_path / "run")
    checks = pipeline.verify(run)
    stored = tensors_of(run.checkpoint)
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}
    assert f"{len(stored)} tensors equal" in checks["experts and backbone"]
    difference = float(checks["checkpoint in stock transformers"].rpartition(" ")[2])
    assert difference < 2e-6


def test_jetmoe_accepts_the_planned_config(bam: Callable[[str], RunFolder]) -> None:
    """With every setting as written; and the plan says what grows."""
    planned = pipeline.plan(bam("llama").read_recipe())
    assert (planned.architecture, planned.family) == ("jetmoe", "llama")
    config = AutoConfig.for_model(**planned.config)
    # The older spellings of RoPE are for other readers; a dtype is read as torch's.
    ignored = ("rope_theta", "rope_scaling", "dtype")
    settings = {key: value for key, value in planned.config.items() if key not in ignored}
    assert {key: getattr(config, key) for key in settings} == settings
    assert (config.num_key_value_heads, config.num_attention_heads) == (4, 8)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert [type(model).__name__] == planned.config["architectures"]
    stored = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert stored == planned.tensors
    # One expert of three rests: its FFN, and its q and o.
    assert planned.total_parameters - planned.active_parameters == 2 * (3 * 32 * 48 + 2 * 32 * 32)
    notes = " | ".join(planned.notes)
    assert "k and v, and the KV cache of the result, are 2 times the sources'" in notes
    assert "fixed epsilon of 1e-06, a's 1e-05: the residual stream is written 0.3162 times" in notes
    alike = pipeline.plan(bam("all-kv-heads").read_recipe()).notes
    assert not any("KV" in note for note in alike)
    assert not any("epsilon" in note for note in pipeline.plan(bam("same-eps").read_recipe()).notes)
    recipe = bam("llama").root.parent / "recipe.yaml"
    pipeline.plan(load_recipe(recipe, ["output.architecture=jetmoe"]))
    with pytest.raises(RecipeError, match="'mixtral' does not hold llama with experts"):
        pipeline.plan(load_recipe(recipe, ["output.architecture=mixtral"]))


def test_attention_experts_follow_the_order_of_the_sources(
    bam: Callable[[str], RunFolder], tmp_path: Path
) -> None:
    """Law 4: experts and the rows of both routers move, and nothing else."""
    run = bam("llama")
    content = json.loads((run.root.parent / "recipe.yaml").read_text())
    content |= {"sources": dict(reversed(content["sources"].items())), "anchor": "a"}
    path = run.root.parent / "turned.yaml"
    path.write_text(json.dumps(content))
    turned = tensors_of(pipeline.build(load_recipe(path), tmp_path / "turned").checkpoint)
    for name, tensor in tensors_of(run.checkpoint).items():
        if name.endswith(("_linear.weight", "router.layer.weight")):
            assert torch.equal(turned[name], tensor.flip(0))
            assert not torch.equal(tensor, tensor.flip(0))
        else:
            assert difference(turned[name], tensor) < 1e-6 or not tensor.any()


def test_cached_generation_of_attention_experts(bam: Callable[[str], RunFolder]) -> None:
    model = load_stock(bam("llama-tied-rope3").checkpoint)
    prompt = torch.randint(300, (2, 70), generator=torch.Generator().manual_seed(1))
    generate: Any = model.generate
    mask = torch.ones_like(prompt)
    mask[0, :5] = 0
    outputs = [
        generate(
            prompt,
            attention_mask=mask,
            max_new_tokens=30,
            do_sample=False,
            use_cache=cached,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
            eos_token_id=None,
        )
        for cached in (True, False)
    ]
    assert outputs[0].sequences.shape == (2, 100)
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert difference(*(torch.stack(output.logits) for output in outputs)) < 1e-5


@pytest.mark.parametrize("scope", ["router", "experts", "all"])
def test_training_of_attention_experts(
    scope: str, bam: Callable[[str], RunFolder], tmp_path: Path
) -> None:
    """A scope changes its tensors and no others (the two biases that Llama lacks are zero and
    stay); the loss is the stock model's, whose balance loss
    counts attention's routers twice, as it records them; shares are those of the FFN."""
    run = RunFolder(shutil.copytree(bam("llama").root, tmp_path / "run"))
    settings = [f"train.scope={scope}", "train.tokens=512", "train.balance_weight=3"]
    recipe = load_recipe(run.recipe, settings)
    text = Texts(recipe, open_sources(recipe)).training_text(run.work)
    first_step = Packed(text.tokens(range(4)), text.positions(range(4)))
    model = load_stock(run.checkpoint)
    with torch.inference_mode():
        output = model(first_step.windows, output_router_logits=True)
        nats = float(model(first_step.windows, labels=first_step.labels).loss)
        attention, again, ffn = (output.router_logits[place::3] for place in range(3))
        assert all(torch.equal(*pair) for pair in zip(attention, again, strict=True))
        scores = torch.cat([*attention, *attention, *ffn])
        counts = torch.nn.functional.one_hot(scores.topk(2).indices, 3).sum(dim=1).double()
        balance = 3 * (counts.mean(dim=0) * scores.softmax(dim=-1).double().mean(dim=0)).sum()
    pipeline.train(run, settings)
    first = run.read_json(run.metrics)["training"]["curve"][0]
    assert first["loss"] == pytest.approx(nats + 3 * float(balance), abs=1e-3)
    assert first["balance"] == pytest.approx(float(balance) / 2, abs=1e-4)
    chosen = torch.cat(ffn).topk(2).indices.flatten()
    shares = torch.bincount(chosen, minlength=3) / len(chosen)
    assert [first[f"share/{n}"] for n in "abc"] == pytest.approx(shares.tolist(), abs=1e-5)

    before, after = tensors_of(run.checkpoint), tensors_of(run.trained)
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {
        n: (t.shape, t.dtype) for n, t in after.items()
    }
    ends = {
        "router": ("router.layer.weight",),
        "experts": ("router.layer.weight", "_linear.weight"),
        "all": ("",),
    }[scope]
    expected = {name for name in before if name.endswith(ends) and before[name].any()}
    assert len(expected) == {"router": 4, "experts": 12, "all": len(before) - 4}[scope]
    assert {name for name in before if not torch.equal(before[name], after[name])} == expected
    count = run.read_json(run.metrics)["training"]["trained_parameters"]
    assert count == sum(before[name].numel() for name in expected)
    pipeline.verify(run)


def test_sources_teach_attention_experts(tmp_path: Path) -> None:
    """Equal sources have nothing to teach, and the balance loss counts as much as without them."""
    recipe = load_recipe(bam_recipe(tmp_path, "llama", equal=True))
    run = pipeline.build(recipe, tmp_path / "run")
    firsts = []
    for weight in (0, 3):
        settings = ["train.teacher=sources", "train.tokens=512", f"train.balance_weight={weight}"]
        pipeline.train(run, settings, overwrite=True)
        firsts.append(run.read_json(run.metrics)["training"]["curve"][0])
        assert firsts[-1]["divergence"] == pytest.approx(0, abs=1e-4)
    gained = firsts[1]["loss"] - firsts[0]["loss"]
    assert gained == pytest.approx(3 * 2 * firsts[0]["balance"], abs=1e-3)


def test_routing_is_that_of_the_ffn(bam: Callable[[str], RunFolder]) -> None:
    """As its routers' matrices say; attention's are neither counted nor changed."""
    model = load_stock(bam("llama").checkpoint)
    probe = torch.randint(300, (4, 40), generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    layers: Any = model.model.layers
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for layer in layers
    ]
    losses, routing = losses_and_routing(model, {"x": probe})
    for hook in hooks:
        hook.remove()
    for layer, hidden, found in zip(layers, seen, routing["x"].share, strict=True):
        router = layer.mlp.router.layer.weight.detach()
        chosen = (hidden @ router.T).topk(2).indices.flatten()
        expected = torch.bincount(chosen, minlength=3) / len(chosen)
        assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-5)

    def best_two(probability: torch.Tensor) -> torch.Tensor:
        chosen = probability.topk(2).indices
        return torch.zeros_like(probability, dtype=torch.bool).scatter(1, chosen, True)

    with experts_by_rule(model, best_two):
        again, by_rule = losses_and_routing(model, {"x": probe})
    assert again["x"] == pytest.approx(losses["x"], abs=1e-5)
    assert torch.allclose(by_rule["x"].used, routing["x"].used)
    alone = []
    with fixed_experts(model, 1):
        alone.append(losses_and_routing(model, {"x": probe}))
    with experts_by_rule(model, at_least(1.0)):
        alone.append(losses_and_routing(model, {"x": probe}))
    assert alone[0][0]["x"] == pytest.approx(alone[1][0]["x"], abs=1e-5)
    assert abs(alone[0][0]["x"] - losses["x"]) > 1e-4
    assert torch.allclose(alone[0][1]["x"].used.sum(dim=1), torch.ones(2).double())


def test_likeness_of_experts_beside_attention_experts(bam: Callable[[str], RunFolder]) -> None:
    """CKA is that of what the stock model's experts make of what its routers read."""
    run = bam("large-eps")
    source = open_sources(run.read_recipe())[0]
    probe = torch.randint(300, (4, 40), generator=torch.Generator().manual_seed(0))
    found = cka_of_experts(run.checkpoint, source, 3, 2, probe)
    model: Any = load_stock(run.checkpoint)
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(probe)
        for layer, hidden, alike in zip(model.model.layers, seen, found, strict=True):
            x = hidden.flatten(0, 1) @ layer.mlp.input_linear.weight.transpose(1, 2)
            gate, up = x.chunk(2, dim=-1)
            neurons = torch.nn.functional.silu(gate) * up
            statistics = OutputCovariance(3, 32)
            statistics.update(neurons @ layer.mlp.output_linear.weight.transpose(1, 2))
            assert torch.allclose(statistics.cka(), alike, atol=1e-5)


def test_attention_experts_of_twins_are_aligned(tmp_path: Path) -> None:
    """Law 3: sources in other bases, with other heads, share k and v once they are aligned."""
    path = bam_recipe(tmp_path, "llama-tied-rope3", calibration={"tokens": 8192})
    for seed, name in enumerate("bc"):
        shutil.rmtree(tmp_path / "models" / name)
        scramble(tmp_path / "models" / "a", tmp_path / "models" / name, seed=seed)
    settings = ["align.residual=orthogonal", "align.heads=all", "align.neurons=activations"]
    run = pipeline.build(load_recipe(path, settings), tmp_path / "run")
    pipeline.verify(run)
    probe = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = load_stock(tmp_path / "models" / "a")(probe).logits
        assert difference(load_stock(run.checkpoint)(probe).logits, expected) < 1e-4


@pytest.mark.parametrize(
    ("variant", "changes", "reason"),
    [
        ("llama", {"attention_bias": True}, "no attention biases"),
        ("llama", {"mlp_bias": True}, "no stock MoE has FFN biases"),
        ("mistral", {}, "JetMoE has no sliding window; set it to shared"),
        ("qwen2", {}, "JetMoE has no attention biases; set it to shared"),
        ("qwen3", {}, "JetMoE has no norms of queries and keys; set it to shared"),
    ],
)
def test_what_jetmoe_cannot_hold_is_refused(
    variant: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = make_recipe(tmp_path, variant, method="bam")
    make_model(tmp_path / "models" / "b", variant, seed=0, **changes)
    who = "a" if not changes else "b"
    for command in (
        lambda: pipeline.plan(load_recipe(path)),
        lambda: pipeline.build(load_recipe(path), tmp_path / "run"),
    ):
        with pytest.raises(SourceError, match=f"^{who}: .* cannot become an expert: .*{reason}"):
            command()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "setting",
    [
        "experts.init=copy",
        "fit.method=least-squares",
        "router.init=regression",
        "router.init=hidden",
        "train.gradient_checkpointing=true",
    ],
)
def test_attention_experts_are_neither_copied_nor_fitted(
    setting: str, recipes: Callable[[str], Path]
) -> None:
    name = setting.partition("=")[0]
    with pytest.raises(RecipeError, match=f"{name}: .*, or experts.attention to shared"):
        load_recipe(recipes("llama"), ["method=bam", setting])
    load_recipe(recipes("llama"), ["method=bam", setting, "experts.attention=shared"])


def test_dropped_neurons_leave_attention_experts(bam: Callable[[str], RunFolder]) -> None:
    run = bam("llama")
    recipe = load_recipe(run.root.parent / "recipe.yaml", ["experts.init=drop"])
    dropped = tensors_of(pipeline.build(recipe, run.root.parent / "dropped").checkpoint)
    for name, tensor in tensors_of(run.checkpoint).items():
        assert torch.equal(dropped[name], tensor) is not name.endswith(
            ("mlp.input_linear.weight", "mlp.output_linear.weight")
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "names", "top_k"),
    mostly_slow(
        [
            (method, *which)
            for method in ("symphony", "harmonized", "dume")
            for which in ((["a"], 1), (["a", "c"], 2))
        ],
        ("harmonized", ["a", "c"], 2),
    ),
)
def test_some_of_the_sources_are_experts(
    method: str, names: list[str], top_k: int, recipes: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of the others, the text is trained and evaluated on, and they can teach."""
    settings = [
        f"method={method}",
        f"experts.sources=[{','.join(names)}]",
        f"router.top_k={top_k}",
        "fit.epochs=1",
        "train.teacher=sources",
    ]
    recipe = load_recipe(recipes("llama"), settings)
    run = pipeline.run(recipe, tmp_path / "run")
    model = load_stock(run.trained)
    assert model.config.num_local_experts == len(names)
    metrics = run.read_json(run.metrics)
    assert set(metrics["trained"]) == {"a", "b", "c", "other"}
    assert set(metrics["sources"]) == {"a", "b", "c"}
    assert metrics["routing"]["built"]["experts"] == names
    shares = {key for key in metrics["training"]["curve"][0] if key.startswith("share/")}
    assert shares == {f"share/{name}" for name in names}
    whole = pipeline.run(
        load_recipe(recipes("llama"), ["method=btx"]), tmp_path / "whole"
    ).read_json(tmp_path / "whole" / "metrics.json")
    # The same batches as with all experts.
    assert metrics["training"]["text"] == whole["training"]["text"]
    if method == "symphony" and names == ["a"]:
        source = open_sources(recipe)[0]
        dense = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
        probe = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            expected = dense(probe).logits
            assert difference(load_stock(run.checkpoint)(probe).logits, expected) < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["experts.sources=[a,x]"], "experts.sources: 'x' is no source"),
        (["experts.sources=[b,c]"], "experts.sources: without the anchor, 'a'"),
        (["experts.sources=[a]"], "router.top_k: 2 experts per token.*only 1"),
        (["experts.sources=[]", "router.top_k=1"], "experts.sources"),
        (["experts.sources=[a,b]", "calibration.domains=[c]"], "'c' is no source"),
    ],
)
def test_mistakes_about_which_are_experts(
    settings: list[str], message: str, recipes: Callable[[str], Path]
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipes("llama"), settings)
