"""How alike the experts are: linear CKA of what they put out on the same tokens."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from symphony_moe.evaluation.routing import rounded
from symphony_moe.model.checkpoint import tensor_reader
from symphony_moe.model.families import DOWN, EMBEDDING, moe_config
from symphony_moe.model.layer import (
    decoder_layer,
    device,
    gated_neurons,
    load_dense_layer,
    load_moe_layer,
    run_layer,
)
from symphony_moe.model.moe_layer import read_layer_outputs
from symphony_moe.model.streams import Streams, Windows
from symphony_moe.sources.source import Source, by_table, read_layers

CKA_TOKENS = 4096
"""Text of each domain that outputs are compared on, in tokens (whole windows, at least one)."""


class OutputCovariance:
    """Cross-covariances of the outputs of a layer's experts, from one pass over batches.

    Each batch is centred by its own mean and merged exactly (Chan, Golub and LeVeque), in float64.
    Memory: N (N + 1) / 2 matrices of hidden x hidden for N experts, whatever the number of tokens.
    """

    def __init__(self, num_experts: int, hidden: int, device: torch.device | str = "cpu") -> None:
        """`hidden`: size of what the experts put out."""
        self.num_experts, self.count = num_experts, 0
        self.means = torch.zeros(num_experts, hidden, dtype=torch.float64, device=device)
        self.products = {
            (one, other): torch.zeros(hidden, hidden, dtype=torch.float64, device=device)
            for one in range(num_experts)
            for other in range(one, num_experts)
        }

    def update(self, outputs: Float[Tensor, "experts tokens hidden"]) -> None:
        """Add a batch: what every expert puts out for the same tokens."""
        outputs = outputs.double()
        tokens = outputs.shape[1]
        merged = self.count + tokens
        mean = outputs.mean(dim=1)
        centred, shift = outputs - mean[:, None], mean - self.means
        for (one, other), product in self.products.items():
            product.addmm_(centred[one].T, centred[other])
            product.addr_(shift[one], shift[other], alpha=self.count * tokens / merged)
        self.means += shift * (tokens / merged)
        self.count = merged

    def cka(self) -> Float[Tensor, "experts experts"]:
        """Linear CKA (Kornblith et al. 2019) of every pair: `|X'Y|² / (|X'X| |Y'Y|)` with centred
        outputs X and Y (tokens x hidden) and Frobenius norms. 1: the same up to a rotation and a
        scale; 0: no linear relation. float64; NaN for an expert whose output never varies.

        With few tokens unrelated outputs do not reach 0: about hidden / (tokens + hidden) where
        all directions vary alike.
        """
        norms = {pair: torch.linalg.norm(product) for pair, product in self.products.items()}
        alike = self.means.new_empty(self.num_experts, self.num_experts)
        for (one, other), norm in norms.items():
            value = norm.square() / (norms[one, one] * norms[other, other])
            alike[one, other] = alike[other, one] = value
        return alike.cpu()


def shared_text(
    windows: Mapping[str, Int[Tensor, "windows sequence"]], tokens: int = CKA_TOKENS
) -> Int[Tensor, "shared sequence"]:
    """The same number of windows of every domain: about `tokens` tokens of each, or as many as the
    domain with the shortest text has."""
    sequence = next(iter(windows.values())).shape[1]
    count = min(max(1, tokens // sequence), *(len(text) for text in windows.values()))
    return torch.cat([text[:count] for text in windows.values()])


@torch.inference_mode()
def cka_of_sources(
    sources: Sequence[Source], text: Windows
) -> list[Float[Tensor, "experts experts"]]:
    """Layer -> CKA of the sources' FFN outputs, each on its own residual stream for the same
    tokens (of the vocabulary that the sources share). The paper's "original models"."""
    streams, hidden = Streams(), sources[0].config.hidden_size
    for alike in by_table(sources, EMBEDDING):
        texts = {source.name: text for source in alike}
        streams.embed(texts, alike[0].config, alike[0].table(EMBEDDING))
    found = []
    for layer in range(sources[0].config.num_hidden_layers):
        weights = read_layers(sources, layer)
        models = [load_dense_layer(s.config, layer, weights[s.name]) for s in sources]
        statistics = OutputCovariance(len(sources), hidden, device())
        for batches in zip(*(streams.batches(source.name) for source in sources), strict=True):
            outputs = []
            for model, stream in zip(models, batches, strict=True):
                with _observe_ffn(model) as seen:
                    stream.copy_(run_layer(model, stream))
                outputs.append(seen["output"].flatten(0, 1))
            statistics.update(torch.stack(outputs))
        found.append(statistics.cka())
    return found


@torch.inference_mode()
def cka_of_experts(
    checkpoint: Path,
    anchor: Source,
    num_experts: int,
    top_k: int,
    text: Windows,
    config: PreTrainedConfig | None = None,
) -> list[Float[Tensor, "experts experts"]]:
    """Layer -> CKA of the experts' outputs in a checkpoint folder of ours: every expert on every
    token's router input, wherever the router sends the token. Layers without experts are left out;
    of a source that gives several experts, what they put out together is compared. The stream
    between layers is the model's own, routed to `top_k` experts. `config`: see `new_config`; the
    anchor's, where nothing is given."""
    streams, config = Streams(), moe_config(anchor.family, config or anchor.config)
    # As they are in the file: training parts the experts of a source.
    slices, family = anchor.family.slices, replace(anchor.family, slices=1)
    read, numbers = tensor_reader(checkpoint), list(map(str, range(num_experts * slices)))
    streams.embed({"new": text}, config, [(0, read(EMBEDDING))])
    found = []
    for layer in range(config.num_hidden_layers):
        tensors = read_layer_outputs(family, config, layer, numbers, read)
        model = load_moe_layer(config, layer, tensors, top_k * slices)
        mixture = decoder_layer(model).mlp
        statistics = OutputCovariance(num_experts, config.hidden_size, device())
        for stream in streams.batches("new"):
            with _observe_ffn(model) as seen:
                stream.copy_(run_layer(model, stream))
            if tensors.is_dense:
                continue
            x = seen["input"].flatten(0, 1)
            outputs = [gated_neurons(e, x, mixture.activation) @ e[DOWN].T for e in mixture.experts]
            by_source = torch.stack(outputs).unflatten(0, (num_experts, slices))
            statistics.update(by_source.sum(dim=1))
        if not tensors.is_dense:
            found.append(statistics.cka())
    return found


def describe_cka(
    experts: Sequence[str],
    layers: Sequence[Float[Tensor, "experts experts"]],
    tokens: int,
    numbers: Sequence[int] | None = None,
) -> dict[str, Any]:
    """For `metrics.json`: every layer's matrix, and the mean over layers and pairs of different
    experts. `numbers`: of the layers, where they are not all of the model's."""
    pairs = ~torch.eye(len(experts), dtype=torch.bool)
    return {
        "experts": list(experts),
        "tokens": tokens,
        **({} if numbers is None else {"numbers": list(numbers)}),
        "layers": rounded(torch.stack(list(layers))),
        "mean": round(float(torch.stack([layer[pairs].mean() for layer in layers]).mean()), 6),
    }


@contextmanager
def _observe_ffn(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """`input` and `output` of the FFN, or of what stands in its place, in a one-layer model's last
    run inside the block (windows x sequence x hidden)."""
    seen: dict[str, Tensor] = {}

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen["input"], seen["output"] = inputs[0], output

    handle = decoder_layer(model).mlp.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()
