"""`fit.layers_with_head` and `fit.embeddings`: the last layers learn with the head, and the token
embeddings with the first layer."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fit_layer import by_hand, random_heads
from test_harmonized import nudged, trusting
from torch import Tensor
from torch.nn.functional import embedding, kl_div, log_softmax

from checks import load_clean, mostly_slow, read_tensors
from conftest import VARIANTS
from symphony_moe import pipeline
from symphony_moe.building import build as build_module
from symphony_moe.building import fit_head as fit_head_module
from symphony_moe.building import fit_layer as fit_layer_module
from symphony_moe.building.alignment import Alignment
from symphony_moe.building.candidate import Candidate
from symphony_moe.building.fit_embeddings import LearnedEmbeddings
from symphony_moe.building.fit_head import _Gradient, fit_head
from symphony_moe.building.fitting import NEW, NEW_BEFORE_END, SOURCE, Descent, FitState, Step
from symphony_moe.building.learned_layer import LearnedLayer
from symphony_moe.errors import RecipeError, VerificationError
from symphony_moe.model.families import EMBEDDING, HEAD
from symphony_moe.model.layer import device
from symphony_moe.model.moe_layer import MoELayer
from symphony_moe.recipe.load import load_recipe
from symphony_moe.runs.folder import RunFolder
from symphony_moe.runs.metrics import HARMONIZED
from symphony_moe.sources.opening import expected_shapes, open_sources
from symphony_moe.text.texts import Texts

FIT = [
    "calibration.windows=random",
    "method=harmonized",
    "output.dtype=float32",
    "fit.epochs=12",
    "fit.learning_rate=0.02",
    "calibration.tokens=4096",
]
PLAIN = ["fit.embeddings=false", "fit.layers_with_head=0"]
Runs = Callable[..., RunFolder]


@contextmanager
def writing_what_is_fitted() -> Iterator[None]:
    """Whatever the validation text says: random models have nothing to be fitted to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_module, "_better", lambda by_source: HARMONIZED)
        yield


@pytest.fixture(scope="module")
def fitted(recipes: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """(variant, settings) -> a fitted model of three random sources, made once."""
    home, made = tmp_path_factory.mktemp("last"), dict[tuple[str, ...], RunFolder]()

    def get(variant: str, *settings: str) -> RunFolder:
        key = (variant, *settings)
        if key not in made:
            recipe = load_recipe(recipes(variant), [*FIT, *settings])
            with writing_what_is_fitted():
                made[key] = pipeline.build(recipe, home / f"run{len(made)}")
        return made[key]

    return get


def tokens_of(run: RunFolder) -> Tensor:
    """How often each token is in the text that a run was fitted on."""
    alignment = Alignment.load(run.alignment)
    counts = [alignment.token_counts(name) for name in run.read_recipe().sources]
    return torch.stack([count for count in counts if count is not None]).sum(dim=0)


def differing(one: RunFolder, other: RunFolder) -> set[str]:
    """The tensors that two runs have not the same of."""
    first, second = (read_tensors(run.checkpoint) for run in (one, other))
    assert first.keys() == second.keys()
    return {name for name in first if not torch.equal(first[name], second[name])}


# The last layers, with the head


@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, "qwen2"))
def test_the_last_layer_and_the_head_alone_are_others(variant: str, fitted: Runs) -> None:
    without, with_it = fitted(variant, *PLAIN), fitted(variant, PLAIN[0])
    changed = differing(without, with_it)
    assert HEAD in changed and len(changed) > 4
    assert all(name == HEAD or name.startswith("model.layers.1.") for name in changed)
    assert not any("layernorm" in name for name in changed)
    heads = [run.read_json(run.metrics)["fit"]["head"] for run in (without, with_it)]
    assert "with_last_layers" not in heads[0] and "refinement" not in heads[1]
    first, second = heads[0]["refinement"], heads[1]["with_last_layers"]
    assert first["error"][0] == second["error"][0] and first["steps"] == second["steps"]
    assert second["error"][1] < first["error"][1]
    pipeline.verify(with_it)


def test_the_routing_on_record_is_that_of_what_is_written(fitted: Runs) -> None:
    """That of the last layer too, whose router has learned once more."""
    before, after = fitted("qwen2", *PLAIN), fitted("qwen2", PLAIN[0])
    first, second = (run.read_json(run.metrics)["fit"]["layers"] for run in (before, after))
    assert (
        first[0]["routing"] == second[0]["routing"] and first[1]["routing"] != second[1]["routing"]
    )
    recipe = after.read_recipe()
    model, counts = load_clean(after.checkpoint), dict[str, Tensor]()
    for name, text in Texts(recipe, open_sources(recipe)).validation_windows().items():
        with torch.no_grad():
            output = model(input_ids=text.windows, output_router_logits=True)
        chosen = output.router_logits[1].topk(recipe.router.top_k, dim=-1).indices
        counts[name] = torch.bincount(chosen.flatten(), minlength=3)
    share = sum(count / count.sum() for count in counts.values()) / len(counts)
    found = [second[1]["routing"]["share"][name] for name in recipe.sources]
    assert found == pytest.approx(torch.as_tensor(share).tolist(), abs=1e-4)


@pytest.mark.slow
def test_as_many_last_layers_as_there_are(fitted: Runs) -> None:
    """Two, here, whatever more is asked for; the first of them is not what it was."""
    one, two = fitted("qwen2", PLAIN[0]), fitted("qwen2", PLAIN[0], "fit.layers_with_head=2")
    many = fitted("qwen2", PLAIN[0], "fit.layers_with_head=7")
    assert any(name.startswith("model.layers.0.") for name in differing(one, two))
    assert EMBEDDING not in differing(one, two) and not differing(two, many)
    pipeline.verify(two)


@pytest.mark.parametrize("value", ["-1", "1.5", "many"])
def test_what_is_no_number_of_layers_is_refused(value: str, recipes: Callable[[str], Path]) -> None:
    with pytest.raises(RecipeError, match="layers_with_head"):
        load_recipe(recipes("llama"), [*FIT, f"fit.layers_with_head={value}"])


def random_layer(state: FitState, layer: int) -> MoELayer:
    """A layer of random weights, whose experts are the sources."""
    generator = torch.Generator().manual_seed(layer)
    prefix = f"model.layers.{layer}."
    shapes = {
        name.removeprefix(prefix): shape
        for name, shape in expected_shapes(state.config).items()
        if name.startswith(prefix)
    }

    def drawn(names: Any) -> dict[str, Tensor]:
        return {
            name: torch.ones(shapes[name])
            if "norm" in name
            else torch.randn(shapes[name], generator=generator) * 0.3
            for name in names
        }

    return MoELayer(
        drawn([name for name in shapes if name not in state.family.expert]),
        {name: drawn(state.family.expert) for name in state.names},
        {name: torch.randn(8, generator=generator) for name in state.names},
    )


def prepared() -> tuple[FitState, dict[int, MoELayer], dict[str, Tensor]]:
    """Two sources, two last layers of a new model, and heads (that of no name: where it begins)."""
    state = by_hand({"b": 20, "a": 33}, epochs=2, temperature_scaling=0)
    for name in "ab":
        before = state.streams.new(f"{NEW_BEFORE_END}/{name}", *state.stream(NEW, name).shape)
        before.copy_(state.stream(NEW, name))
    return state, {n: random_layer(state, n) for n in range(2)}, random_heads(state)


def normed(state: FitState, stream: Tensor) -> Tensor:
    """As before a head whose norm has gains of one."""
    squares: Tensor = stream.square().mean(dim=-1, keepdim=True) + state.config.rms_norm_eps
    return stream * squares.rsqrt()


BATCH = {"a": torch.tensor([3, 9]), "b": torch.tensor([5])}
"""Windows of a step."""


@pytest.mark.parametrize("at_once", [2**25, 20 * 7])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_gradient_is_that_of_the_divergence(
    count: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against torch's own, in as many pieces as there is memory for."""
    monkeypatch.setattr(fit_head_module, "LOGITS_AT_ONCE", at_once)
    state, layers, heads = prepared()
    head = heads.pop("").requires_grad_(True)
    last = [LearnedLayer(state, number, layers[number]) for number in range(count)]
    parameters = [head, *(parameter for layer in last for parameter in layer.parameters)]
    for parameter in parameters:
        parameter.requires_grad_(True)
    with torch.no_grad():
        read, source = ({n: state.stream(p, n)[b] for n, b in BATCH.items()} for p in (NEW, SOURCE))
        batch = [(name, numbers, read[name], source[name]) for name, numbers in BATCH.items()]
        _Gradient(state, head, heads, last)(batch)
    found = [parameter.grad for parameter in parameters]
    total = torch.zeros(())
    for name, stream in read.items():
        for layer in last:
            stream = layer.run(stream)
        ours = log_softmax(normed(state, stream) @ head.T, dim=-1)
        theirs = log_softmax(normed(state, source[name]) @ heads[name].T, dim=-1)
        total = total + kl_div(ours, theirs, reduction="sum", log_target=True)
    expected = torch.autograd.grad(total / (3 * 8), parameters, allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def passed(layers: Mapping[int, MoELayer]) -> FitState:
    """The same again, with the new model's stream behind its last layers."""
    state, _, _ = prepared()
    with torch.no_grad():
        for name, (number, layer) in itertools.product("ab", layers.items()):
            stream = state.stream(NEW, name)
            stream.copy_(LearnedLayer(state, number, layer).run(stream))
    return state


@pytest.mark.parametrize("harm", [True, False])
def test_last_layers_that_do_harm_are_not_kept(harm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the head is refined alone, and the divergence is that of what is kept."""
    _, layers, heads = prepared()
    start = heads.pop("")
    state = passed(layers)
    descend = fit_head_module.descend

    def astray(state: FitState, descent: Descent) -> int:
        steps = descend(state, descent)
        for parameter in descent.parameters:
            parameter.data *= 9 if harm and len(descent.parameters) > 1 else 1
        return steps

    monkeypatch.setattr(fit_head_module, "descend", astray)
    head, found, note = fit_head(state, start, heads, layers)
    assert note.with_last_layers is not None and note.with_last_layers.kept is not harm
    assert (found is layers) is (note.refinement is not None) is harm
    if note.refinement is not None:
        assert note.refinement.kept and note.refinement.before == note.closed_form.after
        alone, *_ = fit_head(passed(layers), start, heads, {})
        assert torch.equal(head, alone)
    with torch.no_grad():
        for number, layer in found.items():
            for name in "ab":
                before = state.stream(NEW_BEFORE_END, name)
                before.copy_(LearnedLayer(state, number, layer).run(before))
    for name in "ab":
        state.stream(NEW, name).copy_(state.stream(NEW_BEFORE_END, name))
    divergence = fit_head_module._divergence(state, head.to(device()), heads)
    assert divergence == pytest.approx(note.divergence, rel=1e-4)


# The token embeddings, with the first layer


@pytest.mark.parametrize("learned", [False, True])
def test_embeddings_beyond_the_dtype_are_a_message(
    learned: bool, recipes: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float16 ends at 65504: as they are fused, and as they have learned."""
    descend, tables = fit_layer_module.descend, Candidate.tables

    def large(state: FitState, descent: Descent) -> int:
        steps = descend(state, descent)
        descent.parameters[-1].data.fill_(9e4)
        return steps

    if learned:
        monkeypatch.setattr(fit_layer_module, "descend", large)
        monkeypatch.setattr(Step, "kept", True)
    else:
        monkeypatch.setattr(
            Candidate, "tables", lambda *a: ((n, at, 9e4 * r.sign()) for n, at, r in tables(*a))
        )
    recipe = load_recipe(recipes("qwen2"), [*FIT, "output.dtype=float16"])
    with pytest.raises(RecipeError, match=r"embed_tokens.* has a value of 90000, and float16 ends"):
        pipeline.build(recipe, tmp_path / "run")


@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, "qwen2"))
def test_embeddings_of_the_texts_tokens_alone_are_others(variant: str, fitted: Runs) -> None:
    without, with_them = fitted(variant, *PLAIN), fitted(variant, PLAIN[1])
    first, second = (read_tensors(run.checkpoint)[EMBEDDING] for run in (without, with_them))
    counts = tokens_of(with_them)
    changed = (first != second).any(dim=1)
    assert torch.equal(changed, counts > 0) and 0 < int(changed.sum()) < len(counts)
    errors = [
        run.read_json(run.metrics)["fit"]["layers"][0]["refinement"]["error"]
        for run in (without, with_them)
    ]
    assert errors[0][0] == errors[1][0] > errors[1][1] != errors[0][1]
    pipeline.verify(with_them)


def test_verify_computes_the_others_again(fitted: Runs) -> None:
    found = pipeline.verify(fitted("qwen2", PLAIN[1]))["experts and backbone"]
    assert ": 3 tensors equal" in found  # with the final norm, and the bias of zeros


def test_a_build_that_was_cut_short_has_the_same_embeddings(
    fitted: Runs, recipes: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first layer they are what was written, and not what was fused."""
    whole = fitted("qwen2")
    calls, real = [0], build_module.fit_layer

    def killed(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(build_module, "fit_layer", killed)
    recipe = load_recipe(recipes("qwen2"), FIT)
    with writing_what_is_fitted():
        with pytest.raises(KeyboardInterrupt):
            pipeline.build(recipe, tmp_path / "run")
        run = pipeline.build(recipe, tmp_path / "run", resume=True)
    assert calls[0] == 3 and not differing(run, whole)


def test_rows_of_the_text_are_held_and_no_others() -> None:
    table = torch.arange(60.0).view(20, 3)
    texts: Mapping[str, Tensor] = {
        "a": torch.tensor([[5, 5, 19]]),
        "b": torch.tensor([[0, 7, 5], [1, 1, 1]]),
    }
    blocks = [(first, table[first : first + 8]) for first in (0, 8, 16)]
    found = LearnedEmbeddings.begin(texts, blocks)
    assert found.tokens.tolist() == [0, 1, 5, 7, 19]
    config = by_hand({"a": 4, "b": 4}).config
    for text in texts.values():
        assert torch.equal(found.embedded(config, text, found.rows), embedding(text, table))
    found.rows = -found.rows
    written = torch.cat([rows for _, rows in found.put_into(blocks)])
    signs = torch.ones(20, 1).index_fill(0, found.tokens, -1)
    assert torch.equal(written, table * signs) and torch.equal(blocks[0][1], table[:8])


def test_a_changed_row_that_no_text_has_is_found(fitted: Runs, tmp_path: Path) -> None:
    whole = fitted("qwen2", PLAIN[1])
    assert int(tokens_of(whole)[0]) == 0
    run = nudged(whole, tmp_path / "run", EMBEDDING)
    trusting(run)
    with pytest.raises(VerificationError, match="not what the sources"):
        pipeline.verify(run)
