"""Models as everyone else loads them: stock `AutoModelForCausalLM`, with nothing missing or
surplus."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from symphony_moe.errors import VerificationError, first_line
from symphony_moe.model.families import EMBEDDING, HEAD_BIAS
from symphony_moe.model.layer import device
from symphony_moe.sources.adapter import Adapter
from symphony_moe.sources.convert import INDEX, SAFETENSORS
from symphony_moe.sources.pretrained import LOCAL
from symphony_moe.sources.source import TABLE_ROWS, Source

_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
    SafetensorError,
)
"""What transformers raises of a folder with damaged files."""


_AT_ONCE = 1024
"""Tokens of short documents that go through a model together: attention is computed between all
of them, and masked."""


def tokens_at_once(model: PreTrainedModel, sequence_length: int) -> int:
    """Tokens of several documents, each no longer than `sequence_length`, that go through a stock
    model together. Where its positions depend on the length of what it reads, every document goes
    by itself."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        return 1
    return max(sequence_length, _AT_ONCE)


def negative_log_likelihood(
    logits: Float[Tensor, "windows sequence vocabulary"],
    tokens: Int[Tensor, "windows sequence"],
    known: Bool[Tensor, " vocabulary"] | None = None,
    positions: Int[Tensor, "windows sequence"] | None = None,
) -> Float[Tensor, " predicted"]:
    """Nats of every token but each window's first (of those that are `known`). `positions`: each
    token's place in its document, whose first token is not asked for."""
    logits, wanted = logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()
    if positions is not None:
        continues = positions[:, 1:].flatten() > 0
        logits, wanted = logits[continues], wanted[continues]
    if known is not None:
        known = known.to(logits.device)
        asked = known[wanted]
        logits, wanted = logits[asked].masked_fill(~known, -torch.inf), wanted[asked]
    return torch.nn.functional.cross_entropy(logits, wanted, reduction="none")


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
        with _with_whole_index(folder) as loadable:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                loadable, dtype=dtype, use_safetensors=True, output_loading_info=True, **LOCAL
            )
    except _UNREADABLE as error:
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
    result: PreTrainedModel = model.eval().to(on or device())
    return result


@contextmanager
def _with_whole_index(folder: Path) -> Iterator[Path]:
    """The folder; one of links to its files where its index has no `metadata`, as other tools write
    it: transformers asks for that, and takes nothing from it."""
    path = folder / INDEX
    unread = (folder / SAFETENSORS).is_file() or not path.is_file()
    index = {} if unread else json.loads(path.read_text(encoding="utf-8"))
    if unread or "metadata" in index:
        yield folder
        return
    with tempfile.TemporaryDirectory() as links:
        for file in folder.iterdir():
            if file != path:
                (Path(links) / file.name).symlink_to(file.resolve())
        (Path(links) / INDEX).write_text(json.dumps(index | {"metadata": {}}), encoding="utf-8")
        yield Path(links)


def ffn_routers(
    router_logits: Sequence[Float[Tensor, "tokens experts"]], num_layers: int
) -> Sequence[Float[Tensor, "tokens experts"]]:
    """Of the router logits that a stock MoE records, those of the FFNs' routers, one tensor for
    each of the `num_layers` that have experts. JetMoE records those of attention before them,
    twice."""
    per_layer = len(router_logits) // num_layers
    return router_logits[per_layer - 1 :: per_layer]


def balance_weight_name(model: nn.Module) -> str:
    """What a stock MoE calls the weight of its balance loss. It reads it from the config when it is
    made, and has a copy of its own from then on."""
    return next(n for n in ("router_aux_loss_coef", "aux_loss_coef") if hasattr(model, n))


def _merge_adapter(model: PreTrainedModel, source: Source, adapter: Adapter) -> None:
    """Put what the adapter changes into the model, whose tables may grow or become two."""
    if adapter.unties:
        model.config.tie_word_embeddings = False
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
    if adapter.rows is not None:
        model.resize_token_embeddings(adapter.rows, mean_resizing=False)
    with torch.no_grad():
        for name in filter(adapter.touches, source.headers):
            model.get_parameter(name).copy_(source.read(name))


def load_alone(source: Source) -> PreTrainedModel:
    """A source in its own vocabulary, in float32, as transformers loads it and peft puts its
    adapter in: nothing that this package reads is in it."""
    model = load_stock(source.folder)
    if source.adapter is None:
        return model
    from peft import PeftModel

    if source.adapter.rows is not None:
        model.resize_token_embeddings(source.adapter.rows, mean_resizing=False)
    adapted: Any = PeftModel.from_pretrained(model, str(source.adapter.folder))
    merged: PreTrainedModel = adapted.merge_and_unload()
    result: PreTrainedModel = merged.eval()
    return result


def load_source(source: Source, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A source as everyone else loads it, with its adapter, and its tables in the vocabulary that
    the sources share.

    Raises VerificationError where the tables that are put in are not those that transformers has
    loaded.
    """
    source = source.as_stored
    model = load_stock(source.folder, dtype)
    if source.adapter is not None:
        _merge_adapter(model, source, source.adapter)
    if source.vocabulary is None:
        return model
    _require_equal_tables(model, source)
    embedding, head = (
        torch.cat([rows for _, rows in source.table(name, as_head=as_head)]).to(model.device, dtype)
        for name, as_head in ((EMBEDDING, False), (source.head_name, True))
    )
    model.set_input_embeddings(nn.Embedding.from_pretrained(embedding))
    output = nn.Linear(head.shape[1], head.shape[0], bias=False, device="meta")
    output.weight = nn.Parameter(head, requires_grad=False)
    model.set_output_embeddings(output)
    model.config.vocab_size = len(embedding)
    return model


@torch.no_grad()
def _require_equal_tables(model: Any, source: Source) -> None:
    """Raise VerificationError where a table is read here as another than transformers reads."""
    tables = {
        EMBEDDING: model.get_input_embeddings().weight,
        source.head_name: model.get_output_embeddings().weight,
    }
    for name, theirs in tables.items():
        for first in range(0, source.own_rows, TABLE_ROWS):
            rows = slice(first, first + TABLE_ROWS)
            own, stock = source.read(name, rows).to(theirs.dtype), theirs[rows].cpu()
            # A number may be rounded once or twice.
            last_bit = torch.finfo(own.dtype).eps
            if own.shape != stock.shape or not torch.allclose(own, stock, rtol=last_bit, atol=0):
                raise VerificationError(
                    f"{source.name}: {name} is another in transformers than as it is read here; "
                    "expected the same. Please report the model as a bug"
                )
