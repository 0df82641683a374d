"""Likeness of experts, routing and dynamic routing are what their textbook definitions say."""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from checks import random_windows
from conftest import SIZES, ffn_of, make_recipe, router_of
from symphony_moe import pipeline
from symphony_moe.evaluation.cka import (
    OutputCovariance,
    cka_of_experts,
    cka_of_sources,
    describe_cka,
    shared_text,
)
from symphony_moe.evaluation.losses import dynamic_routing, losses_and_routing
from symphony_moe.evaluation.routing import (
    Routing,
    _by_name,
    _gates_and_choices,
    _with_choices,
    at_least,
    describe_routing,
    experts_by_rule,
    fixed_experts,
    observe_routing,
    router_logits,
    router_weight,
    routers,
)
from symphony_moe.model.families import DOWN, GATE, TARGETS, UP, Family, target_config
from symphony_moe.model.layer import gated_neurons
from symphony_moe.model.symmetry import NeuronMap, reorder_neurons
from symphony_moe.recipe.load import load_recipe
from symphony_moe.runs.folder import RunFolder
from symphony_moe.sources.opening import open_sources
from symphony_moe.sources.stock import load_source, load_stock
from symphony_moe.text.texts import Texts

FAMILIES = ["llama", "qwen2", "qwen2-granitemoe", "qwen3"]


def textbook_cka(one: Tensor, other: Tensor) -> float:
    """Linear CKA by the tokens x tokens Gram matrices, HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)),
    with K and L centred by H = I - 1/n. float64."""
    tokens = len(one)
    centre = torch.eye(tokens, dtype=torch.float64) - 1 / tokens
    left, right = (centre @ (x.double() @ x.double().T) @ centre for x in (one, other))
    return float((left * right).sum() / (left.square().sum() * right.square().sum()).sqrt())


def cka(*outputs: Tensor, batch: int = 10**6) -> Tensor:
    """Of tokens x hidden outputs, in batches."""
    together = torch.stack(outputs)
    statistics = OutputCovariance(len(outputs), together.shape[2])
    for part in together.split(batch, dim=1):
        statistics.update(part)
    return statistics.cka()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -------------------------------------------------------------------------------------------- CKA


def test_cka_is_the_textbook_s() -> None:
    """Of every pair, outputs related or not, with means far from zero; 1e-12."""
    first = random(120, 6) + 50
    outputs = [first, first @ random(6, 6, seed=1) + random(120, 6, seed=2), random(120, 6, seed=3)]
    found = cka(*outputs)
    for one in range(3):
        for other in range(3):
            expected = textbook_cka(outputs[one], outputs[other])
            assert float(found[one, other]) == pytest.approx(expected, abs=1e-12)
    assert 0.2 < float(found[0, 1]) < 0.999


@pytest.mark.parametrize("batch", [1, 7, 50, 119])
def test_batches_change_nothing(batch: int) -> None:
    """Any cut of the tokens gives the same, also where their mean is far from zero; 1e-11."""
    outputs = (random(120, 5) + 1e3, random(120, 5, seed=1).cumsum(dim=0))
    assert cka(*outputs, batch=batch) == pytest.approx(cka(*outputs), abs=1e-11)


def test_rotation_scale_and_shift_change_nothing_and_stretching_does() -> None:
    """CKA(X, aXQ + b) is 1 for orthogonal Q: it sees no basis. So no residual rotation of a source
    changes its likeness to the others."""
    outputs = random(200, 8)
    basis = torch.linalg.qr(random(8, 8, seed=1)).Q
    stretched = outputs * torch.tensor([10.0] + [1.0] * 7, dtype=torch.float64)
    found = cka(outputs, 3 * outputs @ basis + 7, stretched)
    assert float(found[0, 1]) == pytest.approx(1, abs=1e-12)
    assert float(found[0, 2]) < 0.9
    assert float(found[1, 2]) == pytest.approx(float(found[0, 2]), abs=1e-12)


def test_identical_experts_are_alike_and_independent_ones_are_not() -> None:
    """1 for the same outputs; about hidden / (tokens + hidden) for unrelated ones, which goes to 0
    with the tokens."""
    outputs = random(20_000, 8)
    assert float(cka(outputs, outputs.clone())[0, 1]) == pytest.approx(1, abs=1e-12)
    for tokens, most in ((64, 0.25), (20_000, 0.002)):
        found = float(cka(outputs[:tokens], random(tokens, 8, seed=1))[0, 1])
        assert 0 < found < most
        assert found == pytest.approx(8 / (tokens + 8), rel=0.4)


def test_an_expert_that_never_varies_is_like_nothing() -> None:
    """No number rather than a made-up one; the other pairs have theirs."""
    outputs = random(50, 4)
    found = cka(outputs, torch.ones(50, 4, dtype=torch.float64), random(50, 4, seed=1))
    assert math.isnan(found[0, 1]) and math.isnan(found[1, 1]) and math.isnan(found[1, 2])
    assert 0 < float(found[0, 2]) < 1


def test_the_order_of_neurons_does_not_matter() -> None:
    """The paper's functional alignment reorders an expert's neurons. That leaves its outputs, so
    their CKA with any other expert's, as they were: by itself it can specialise nothing."""
    x = random(200, 6)
    one, other = (
        {GATE: random(9, 6, seed=s), UP: random(9, 6, seed=s + 1), DOWN: random(6, 9, seed=s + 2)}
        for s in (1, 4)
    )
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    outputs = [
        gated_neurons(ffn, x, nn.SiLU()) @ ffn[DOWN].T
        for ffn in (
            one,
            other,
            reorder_neurons(other, NeuronMap(order, torch.ones(9, dtype=torch.float64))),
        )
    ]
    found = cka(*outputs)
    assert float(found[0, 1]) < 0.9
    assert float(found[0, 2]) == pytest.approx(float(found[0, 1]), abs=1e-12)
    assert float(found[1, 2]) == pytest.approx(1, abs=1e-12)


def test_the_summary_is_the_mean_of_different_experts_over_layers() -> None:
    """The diagonal says nothing and is not in it."""
    layers = [cka(random(60, 4), random(60, 4, seed=s), random(60, 4, seed=9)) for s in (1, 2)]
    found = describe_cka(["a", "b", "c"], layers, tokens=60)
    pairs = [float(layer[i, j]) for layer in layers for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found["mean"] == pytest.approx(sum(pairs) / 6, abs=1e-6)
    assert found["experts"] == ["a", "b", "c"] and found["tokens"] == 60
    assert torch.tensor(found["layers"]) == pytest.approx(torch.stack(layers), abs=1e-6)


def test_every_domain_has_an_equal_share_of_the_text() -> None:
    """As much as asked for, or as the shortest domain has; whole windows, at least one."""
    windows = {"a": random_windows(0, 9, 16), "b": random_windows(1, 5, 16)}
    assert torch.equal(shared_text(windows, 32), torch.cat((windows["a"][:2], windows["b"][:2])))
    assert shared_text(windows, 10_000).shape == (10, 16)
    assert shared_text(windows, 1).shape == (2, 16)


@pytest.mark.parametrize("variant", FAMILIES)
def test_sources_are_compared_by_the_outputs_of_their_own_layers(
    variant: str, recipes: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the stock models' FFNs put out for the same tokens, in batches that do not divide the
    text; 1e-5."""
    monkeypatch.setattr("symphony_moe.model.streams.WINDOWS_TOKENS", 48)
    sources = open_sources(load_recipe(recipes(variant)))
    text = random_windows(1, 5)
    found = cka_of_sources(sources, text)
    outputs = [ffn_outputs(load_source(source), text) for source in sources]
    assert len(found) == 2
    for layer, alike in enumerate(found):
        for one in range(3):
            for other in range(3):
                expected = textbook_cka(outputs[one][layer], outputs[other][layer])
                assert float(alike[one, other]) == pytest.approx(expected, abs=1e-5)


@torch.inference_mode()
def ffn_outputs(model: Any, text: Tensor) -> list[Tensor]:
    """Layer -> tokens x hidden, of a stock model."""
    outputs: list[Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _, args, output: outputs.append(output))
    model(input_ids=text)
    return [output.flatten(0, 1) for output in outputs]


@pytest.mark.parametrize("variant", FAMILIES)
def test_experts_are_compared_by_all_tokens_wherever_they_are_routed(
    variant: str,
    recipes: Callable[[str], Path],
    built: Callable[[str], RunFolder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the stock class's experts put out for every router input of the stock model; 1e-5."""
    monkeypatch.setattr("symphony_moe.model.streams.WINDOWS_TOKENS", 48)
    anchor = open_sources(load_recipe(recipes(variant)))[0]
    text = random_windows(2, 5)
    found = cka_of_experts(built(variant).checkpoint, anchor, 3, 2, text)
    model: Any = load_stock(built(variant).checkpoint)
    inputs: list[Tensor] = []
    for layer in model.model.layers:
        ffn_of(layer).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.inference_mode():
        model(input_ids=text)
        assert len(found) == len(inputs) == 2
        for alike, layer, x in zip(found, model.model.layers, inputs, strict=True):
            flat = x.flatten(0, 1)
            ones = torch.ones(len(flat), 1)
            outputs = [
                ffn_of(layer).experts(flat, torch.full((len(flat), 1), expert), ones)
                for expert in range(3)
            ]
            for one, other in ((0, 1), (0, 2), (1, 2)):
                expected = textbook_cka(outputs[one], outputs[other])
                assert float(alike[one, other]) == pytest.approx(expected, abs=1e-5)


def test_copies_of_one_model_have_equal_experts(tmp_path: Path) -> None:
    """1 for every pair in every layer, before the MoE and in it."""
    path = make_recipe(tmp_path, "llama", 2, experts={"init": "copy"})
    shutil.rmtree(tmp_path / "models" / "b")
    shutil.copytree(tmp_path / "models" / "a", tmp_path / "models" / "b")
    recipe = load_recipe(path)
    run = pipeline.build(recipe, tmp_path / "run")
    sources, text = open_sources(recipe), random_windows(0, 4)
    for layers in (
        cka_of_sources(sources, text),
        cka_of_experts(run.checkpoint, sources[0], 2, 2, text),
    ):
        assert torch.stack(layers) == pytest.approx(torch.ones(2, 2, 2), abs=1e-9)


# ---------------------------------------------------------------------------------------- routing


@pytest.mark.parametrize("variant", FAMILIES)
def test_a_router_that_knows_nothing_has_the_entropy_of_a_uniform_one(
    variant: str, built: Callable[[str], RunFolder]
) -> None:
    """log N for every token and for their mean, and an even load in the Switch form."""
    model = load_stock(built(variant).checkpoint)
    with torch.no_grad():
        for router in routers(model):
            router.weight.zero_()
    _, routing = losses_and_routing(model, {"x": random_windows(0, 4)})
    flat = torch.full((2,), math.log(3), dtype=torch.float64)
    assert routing["x"].entropy == pytest.approx(flat, abs=1e-6)
    assert routing["x"].entropy_of_mean == pytest.approx(flat, abs=1e-6)
    assert routing["x"].balance == pytest.approx(torch.ones(2), abs=1e-6)


@pytest.mark.parametrize("variant", FAMILIES)
def test_routing_is_what_the_router_s_matrix_says(
    variant: str, built: Callable[[str], RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand from the routers' inputs, token by token, in float64; 1e-6."""
    monkeypatch.setattr("symphony_moe.sources.stock._AT_ONCE", 48)
    model: Any = load_stock(built(variant).checkpoint)
    with torch.no_grad():
        for router in routers(model):
            router.weight.mul_(40)  # as drawn, they hardly choose
    inputs: list[Tensor] = []
    handles = [
        router.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
        for router in routers(model)
    ]
    text = random_windows(3, 5)
    with torch.inference_mode():
        model(input_ids=text)
    for handle in handles:
        handle.remove()
    _, routing = losses_and_routing(model, {"x": text})
    found = routing["x"]
    for layer, (x, router) in enumerate(zip(inputs, routers(model), strict=True)):
        rows = (x.double() @ router.weight.double().T).softmax(dim=1).tolist()
        mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        entropy = sum(-p * math.log(p) for row in rows for p in row) / len(rows)
        counts = [0] * 3
        for row in rows:
            for expert in sorted(range(3), key=lambda e: row[e])[1:]:
                counts[expert] += 1
        share = [count / (2 * len(rows)) for count in counts]
        assert found.probability[layer].tolist() == pytest.approx(mean, abs=1e-6)
        assert float(found.entropy[layer]) == pytest.approx(entropy, abs=1e-6)
        assert found.share[layer].tolist() == pytest.approx(share, abs=1e-9)
        assert float(found.max_share[layer]) == pytest.approx(max(share), abs=1e-9)
        balance = 3 * sum(f * p for f, p in zip(share, mean, strict=True))
        assert float(found.balance[layer]) == pytest.approx(balance, abs=1e-6)
        of_mean = sum(-p * math.log(p) for p in mean)
        assert float(found.entropy_of_mean[layer]) == pytest.approx(of_mean, abs=1e-6)
        assert entropy < of_mean - 0.01 < math.log(3)


def test_one_expert_with_all_of_the_load_has_balance_n() -> None:
    """And a largest share of one, and no entropy."""
    collapsed = torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    routing = Routing(collapsed, collapsed, torch.zeros(1, dtype=torch.float64))
    assert routing.balance.tolist() == [4] and routing.max_share.tolist() == [1]
    assert routing.entropy_of_mean.tolist() == [0]


def test_domains_are_mixed_alike() -> None:
    """Two domains with an expert each: uneven each by itself, even together."""
    parts = {}
    for domain, expert in (("a", 0), ("b", 1), ("other", 0)):
        one = nn.functional.one_hot(torch.tensor([expert]), 2).double()
        parts[domain] = Routing(one, one, torch.zeros(1, dtype=torch.float64))
    found = describe_routing(parts, ["a", "b"])
    assert found["balance"] == {"a": [2], "b": [2], "other": [2]}
    assert found["mixed"]["balance"] == [1] and found["mixed"]["share"] == [[0.5, 0.5]]
    assert found["mixed"]["entropy_of_mean"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert found["mixed"]["entropy"] == [0]


class _AnotherRouter(nn.Module):
    """As in older versions: probabilities for logits, and its parts in another order."""

    def __init__(self, weight: Tensor, form: Sequence[str]) -> None:
        super().__init__()
        self.weight, self.top_k, self.form = nn.Parameter(weight), 2, form

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        probability = router_logits(self, hidden).softmax(dim=1)
        gates, chosen = probability.topk(self.top_k, dim=1)
        gates = gates / gates.sum(dim=1, keepdim=True)
        parts = {"logits": probability, "weights": gates, "experts": chosen}
        return tuple(parts[name] for name in self.form)


@pytest.mark.parametrize(
    ("variant", "form"),
    [
        ("llama", ("logits", "weights", "experts")),  # transformers 5.0
        ("qwen2", ("logits", "experts", "weights")),  # 5.0 to 5.8
        ("qwen2-granitemoe", ("experts", "weights", "logits")),  # 5.17 to 5.20
    ],
)
def test_older_routers_are_read_right(
    variant: str, form: Sequence[str], built: Callable[[str], RunFolder]
) -> None:
    """What a stock router puts out first, and in which order, differs between versions. Neither
    the routing nor a rule depends on it."""
    model: Any = load_stock(built(variant).checkpoint)
    text = random_windows(0, 3)
    with observe_routing(model) as so_far, torch.inference_mode():
        model(input_ids=text)
    expected = so_far()
    for layer in model.model.layers:
        ffn, router = ffn_of(layer), router_of(layer)
        name = next(name for name, module in ffn.named_children() if module is router)
        setattr(ffn, name, _AnotherRouter(router.weight.detach(), form))
    with observe_routing(model) as so_far, torch.inference_mode():
        for layer in model.model.layers:
            router = router_of(layer)
            # The stock layer cannot read it, so it is asked alone.
            ffn_of(layer).forward = lambda x, router=router: 0 * (x + router(x)[1].sum())
        model(input_ids=text)
    first = so_far()
    # The first layer's input is the same in both.
    assert torch.equal(first.share[0], expected.share[0])
    assert float(first.entropy[0]) == pytest.approx(float(expected.entropy[0]), abs=1e-9)
    with experts_by_rule(model, at_least(0.0)):
        parts = dict(
            zip(form, router_of(model.model.layers[0])(random(5, 32).float()), strict=True)
        )
    chosen, gates = parts["experts"], parts["weights"]
    assert chosen.shape == gates.shape == (5, 3)
    assert not chosen.is_floating_point() and gates.is_floating_point()


STOCK = {
    family.moe: family
    for held in TARGETS.values()
    for families in held.values()
    for family in families
}


@pytest.mark.parametrize("family", STOCK.values(), ids=STOCK)
def test_every_row_says_what_its_router_puts_out(family: Family) -> None:
    """Weights and experts are those of the logits, token by token, and whatever is put in their
    place is found there."""
    dense = AutoConfig.for_model(family.dense, **SIZES)
    settings = target_config(family, dense, 3, 2, tied=False, dtype="float32")
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    router, x = routers(model)[0], random(7, 32).float()
    with torch.inference_mode():
        nn.init.normal_(router_weight(router))
        parts = _by_name(router(x), family.router_outputs)
        probability = router_logits(router, x).softmax(dim=1)
    gates, chosen = _gates_and_choices(parts)
    expected, experts = probability.topk(2, dim=1)
    order = chosen.argsort(dim=1), experts.argsort(dim=1)
    assert torch.equal(chosen.gather(1, order[0]), experts.gather(1, order[1]))
    expected = expected / expected.sum(dim=1, keepdim=True)
    torch.testing.assert_close(gates.gather(1, order[0]), expected.gather(1, order[1]))
    others = torch.rand(7, 3), torch.stack([torch.randperm(3) for _ in range(7)])
    changed = _by_name(_with_choices(parts, *others), family.router_outputs)
    assert list(changed) == list(parts)
    for one, other in zip(_gates_and_choices(changed), others, strict=True):
        assert torch.equal(one, other)


# -------------------------------------------------------------------------------- dynamic routing


def test_a_threshold_takes_those_that_reach_it_and_the_best_always() -> None:
    """All at 0; none but the best where none reaches it."""
    probability = torch.tensor([[0.5, 0.3, 0.2], [0.34, 0.33, 0.33]])
    assert at_least(0.0)(probability).all()
    assert at_least(0.3)(probability).tolist() == [[True, True, False], [True, True, True]]
    assert at_least(0.4)(probability).tolist() == [[True, False, False]] * 2
    assert at_least(1.0)(probability).tolist() == [[True, False, False]] * 2


@pytest.fixture(scope="module")
def sharp(built: Callable[[str], RunFolder]) -> Callable[[str], Any]:
    """variant -> its built model in stock transformers, with routers that choose."""

    def get(variant: str) -> Any:
        model = load_stock(built(variant).checkpoint)
        with torch.no_grad():
            for router in routers(model):
                router.weight.mul_(40)
        return model

    return get


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("variant", FAMILIES)
def test_a_rule_that_is_top_k_gives_the_stock_model_s_losses(
    variant: str, count: int, sharp: Callable[[str], Any], built: Callable[[str], RunFolder]
) -> None:
    """The stock class with that number in its config, routed by its own code, and the same model
    routed by the rule: the same losses and the same number of experts; as does setting the
    routers' number."""
    windows = {"x": random_windows(4, 4), "y": random_windows(5, 2)}
    model = sharp(variant)

    def top_k(probability: Tensor) -> Tensor:
        chosen = probability.topk(count, dim=1).indices
        return torch.zeros_like(probability, dtype=torch.bool).scatter(1, chosen, True)

    with experts_by_rule(model, top_k):
        losses, routing = losses_and_routing(model, windows)
    with fixed_experts(model, count):
        fixed, _ = losses_and_routing(model, windows)
    stock: Any = type(model)
    settings = model.config.to_dict() | {_name_of_k(variant): count}
    configured = stock(type(model.config).from_dict(settings)).eval()
    configured.load_state_dict(model.state_dict())
    assert all(router.top_k == count for router in routers(configured))
    expected, _ = losses_and_routing(configured, windows)
    assert fixed == expected
    assert losses == pytest.approx(expected, abs=1e-6)
    assert routing["x"].used.sum(dim=1).tolist() == pytest.approx([count] * 2, abs=1e-9)


def _name_of_k(variant: str) -> str:
    return "moe_k" if variant == "qwen2" else "num_experts_per_tok"


@pytest.mark.parametrize("variant", FAMILIES)
def test_the_stock_config_has_one_number_of_experts_for_all_layers(
    variant: str, built: Callable[[str], RunFolder]
) -> None:
    """docs/design.md says so; where a later transformers takes a list, it is to be said anew."""
    config = load_stock(built(variant).checkpoint).config
    with pytest.raises(StrictDataclassFieldValidationError, match="expected int, got list"):
        type(config).from_dict(config.to_dict() | {_name_of_k(variant): [1, 2]})


@pytest.mark.parametrize("variant", FAMILIES)
def test_the_ends_of_the_threshold_are_all_experts_and_one(
    variant: str, sharp: Callable[[str], Any]
) -> None:
    """Between them, the number of experts falls, and differs from token to token."""
    model = sharp(variant)
    before = [router.top_k for router in routers(model)]
    windows = {"x": random_windows(6, 4), "y": random_windows(7, 3)}
    found = dynamic_routing(model, windows, [0.0, 0.1, 0.3, 0.999])
    assert [row.experts for row in found.fixed] == [1, 2, 3]
    everything, some, fewer, one = found.threshold
    assert everything.mean_experts == 3 and one.mean_experts == 1
    assert everything.losses == pytest.approx(found.fixed[2].losses, abs=1e-6)
    assert one.losses == pytest.approx(found.fixed[0].losses, abs=1e-6)
    assert 3 > some.mean_experts > fewer.mean_experts > 1
    assert len(some.experts_by_layer) == 2
    for mean in (some.experts_by_layer, list(some.experts_by_domain.values())):
        assert sum(mean) / 2 == pytest.approx(some.mean_experts, abs=1e-5)
    assert [router.top_k for router in routers(model)] == before
    again, routing = losses_and_routing(model, windows)
    assert again == found.fixed[1].losses, "the model is as it was"
    assert routing["x"].used.sum(dim=1).tolist() == pytest.approx([2, 2])


@torch.inference_mode()
def test_the_experts_that_reach_the_threshold_are_mixed_by_their_probabilities(
    sharp: Callable[[str], Any],
) -> None:
    """Token by token: `sum_e p_e y_e / sum_e p_e` over those in use; 1e-5."""
    model = sharp("llama")
    layer = model.model.layers[0].mlp
    x = random(1, 20, 32).float()
    with experts_by_rule(model, at_least(0.2)):
        found = layer(x)[0]
    counts = set()
    for token, mixture in zip(x[0], found, strict=True):
        probability = (layer.gate.weight @ token).softmax(dim=0)
        used = [e for e in range(3) if probability[e] >= 0.2]
        counts.add(len(used))
        outputs = {
            e: layer.experts(token[None], torch.tensor([[e]]), torch.ones(1, 1))[0] for e in used
        }
        total = sum(float(probability[e]) for e in used)
        expected = sum(float(probability[e]) / total * output for e, output in outputs.items())
        assert mixture == pytest.approx(expected, abs=1e-5)
    assert len(counts) > 1


# ---------------------------------------------------------------------------------------- the run


@pytest.mark.slow
def test_metrics_and_report_hold_likeness_routing_and_the_dynamic_curve(
    recipes: Callable[[str], Path], built: Callable[[str], RunFolder], tmp_path: Path
) -> None:
    """Of every model; the fixed number that the recipe asks for has the built model's losses."""
    shutil.copytree(built("llama").root, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    shutil.copytree(run.checkpoint, run.trained)
    pipeline.evaluate(run, ["evaluation.thresholds=[0.0, 0.3, 0.9]"])
    metrics = run.read_json(run.metrics)
    assert list(metrics["cka"]) == ["sources", "built", "trained"]
    recipe = load_recipe(recipes("llama"))
    sources = open_sources(recipe)
    text = shared_text({n: t.windows for n, t in Texts(recipe, sources).held_out_text().items()})
    alike = cka_of_sources(sources, text)
    assert metrics["cka"]["sources"] == describe_cka(["a", "b", "c"], alike, text.numel())
    assert metrics["cka"]["sources"]["tokens"] == 4 * 256
    alike = cka_of_experts(run.checkpoint, sources[0], 3, recipe.router.top_k, text)
    assert metrics["cka"]["built"] == describe_cka(["a", "b", "c"], alike, text.numel())
    assert metrics["cka"]["trained"] == metrics["cka"]["built"]
    routing = metrics["routing"]["trained"]
    domains = {"a", "b", "c", "other"}
    for name in ("share", "entropy", "entropy_of_mean", "balance", "max_share"):
        assert set(routing[name]) == domains
        assert len(routing[name]["a"]) == len(routing["mixed"][name]) == 2
    dynamic = metrics["dynamic"]["built"]
    assert dynamic["fixed"][recipe.router.top_k - 1]["losses"] == metrics["built"]
    assert [row["threshold"] for row in dynamic["threshold"]] == [0.0, 0.3, 0.9]
    assert set(dynamic["threshold"][1]["losses"]) == domains
    report = pipeline.report(run).read_text(encoding="utf-8")
    assert "How alike the experts are" in report and "Dynamic routing" in report

    pipeline.evaluate(run)
    metrics = run.read_json(run.metrics)
    assert "dynamic" not in metrics and list(metrics["cka"]) == ["sources", "built", "trained"]
    assert "Dynamic routing" not in pipeline.report(run).read_text(encoding="utf-8")
