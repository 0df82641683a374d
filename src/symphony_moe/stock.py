"""Models as everyone else loads them: stock `AutoModelForCausalLM`, with nothing missing or
surplus."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from symphony_moe.errors import VerificationError, first_line
from symphony_moe.families import EMBEDDING, HEAD_BIAS
from symphony_moe.forward import device
from symphony_moe.pretrained import LOCAL
from symphony_moe.sources import Source


def load_stock(
    folder: Path, dtype: torch.dtype = torch.float32, on: torch.device | None = None
) -> PreTrainedModel:
    """Load a checkpoint folder from disk, in evaluation mode, `on` a device: the GPU, where there
    is one and nothing else is said.

    `transformers` only warns of tensors that are missing, left over or of another shape; here each
    is a VerificationError, and so are files that are missing or damaged. A head bias that the
    recipe left out may be missing where it is zero.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **LOCAL
        )  # fmt: skip
    except (OSError, ValueError, SafetensorError) as error:
        raise VerificationError(
            f"{folder}: a file of it is missing or damaged ({first_line(error)}); make the folder "
            "again"
        ) from error
    model, info = loaded
    if HEAD_BIAS in info["missing_keys"] and not bool(model.get_parameter(HEAD_BIAS).any()):
        info["missing_keys"].discard(HEAD_BIAS)  # left out by output.head_bias; filled with zeros
    wrong = {what: sorted(map(str, names)) for what, names in info.items() if names}
    if wrong:
        raise VerificationError(f"{folder} does not load cleanly in transformers: {wrong}")
    return model.eval().to(on or device())


def ffn_routers(
    router_logits: Sequence[Float[Tensor, "tokens experts"]], num_layers: int
) -> Sequence[Float[Tensor, "tokens experts"]]:
    """Of the router logits that a stock MoE records, those of the FFNs' routers, one tensor a
    layer. JetMoE records those of attention before them, twice."""
    per_layer = len(router_logits) // num_layers
    return router_logits[per_layer - 1 :: per_layer]


def balance_weight_name(model: nn.Module) -> str:
    """What a stock MoE calls the weight of its balance loss. It reads it from the config when it is
    made, and has a copy of its own from then on."""
    return next(n for n in ("router_aux_loss_coef", "aux_loss_coef") if hasattr(model, n))


def load_source(source: Source, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A source as everyone else loads it, with its adapter, and its tables in the vocabulary that
    the sources share."""
    model = load_stock(source.folder, dtype)
    if source.adapter is not None:
        with torch.no_grad():
            for name in filter(source.adapter.touches, source.headers):
                model.get_parameter(name).copy_(source.read(name))
    if source.vocabulary is None:
        return model
    embedding, head = (
        torch.cat([rows for _, rows in source.table(name)]).to(model.device, dtype)
        for name in (EMBEDDING, source.head_name)
    )
    model.set_input_embeddings(nn.Embedding.from_pretrained(embedding))
    output = nn.Linear(head.shape[1], head.shape[0], bias=False, device="meta")
    output.weight = nn.Parameter(head, requires_grad=False)
    model.set_output_embeddings(output)
    model.config.vocab_size = len(embedding)
    return model
