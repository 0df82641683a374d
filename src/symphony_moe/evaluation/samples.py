"""Which expert each token of a few short held-out texts prefers, in every layer."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from symphony_moe.evaluation.routing import rounded, router_probabilities
from symphony_moe.runs.samples import Choices, Sample, Samples
from symphony_moe.text.windows import Pieces

DOCUMENTS, TOKENS = 2, 64
"""Of each domain, and of each document."""

_ALL = 2048
"""Tokens of all domains together: where there are many domains, each document gives fewer."""

_FEWEST = 8
"""A document with fewer tokens says too little."""

Texts = Mapping[str, Sequence[Int[Tensor, "_"]]]
"""Domain -> the beginnings of documents."""


def beginnings(windows: Mapping[str, Pieces]) -> dict[str, list[Int[Tensor, "_"]]]:
    """Domain -> the first tokens of its first documents that are long enough; of the first one
    where none is. A piece behind a full one goes on with the same document, and is none."""
    most = max(_FEWEST, min(TOKENS, _ALL // (DOCUMENTS * len(windows))))
    found = {}
    for domain, text in windows.items():
        begins = torch.where(text.positions == 0)[0].tolist()
        parts = text.tokens.tensor_split(begins[1:])
        full = [False, *(len(part) == text.sequence_length for part in parts[:-1])]
        pieces = [part for part, goes_on in zip(parts, full, strict=True) if not goes_on]
        long = [piece for piece in pieces if len(piece) >= _FEWEST] or pieces[:1]
        found[domain] = [piece[:most] for piece in long[:DOCUMENTS]]
    return found


@torch.inference_mode()
def choices_of(model: PreTrainedModel, texts: Texts, slices: int = 1) -> dict[str, list[Choices]]:
    """Domain -> for each of its texts what the routers of a stock MoE say of each token. `slices`:
    see `observe_routing`."""
    found: dict[str, list[Choices]] = {}
    for domain, of_domain in texts.items():
        found[domain] = []
        for tokens in of_domain:
            with router_probabilities(model) as by_layer:
                model(input_ids=tokens[None].to(model.device), use_cache=False)
            of_experts = torch.stack([torch.cat(runs) for runs in by_layer])
            found[domain].append(_choices(of_experts.unflatten(2, (-1, slices)).sum(dim=3)))
    return found


def _choices(probabilities: Tensor) -> Choices:
    """`probabilities`: layers x tokens x experts."""
    best = probabilities.max(dim=2)
    mean = probabilities.mean(dim=0).max(dim=1)
    return Choices(
        experts=best.indices.tolist(),
        probabilities=rounded(best.values, 3),
        mean_experts=mean.indices.tolist(),
        mean_probabilities=rounded(mean.values, 3),
    )


def samples_of(
    experts: Sequence[str],
    texts: Texts,
    choices: Mapping[str, Mapping[str, Sequence[Choices]]],
    tokenizer: PreTrainedTokenizerBase,
    layers: list[int] | None = None,
) -> Samples:
    """The content of `samples.json`. `choices`: of each stage, see `choices_of`. `layers`: those
    that have experts, where not all have."""
    domains = {
        domain: [
            Sample(
                tokens=token_texts(tokens.tolist(), tokenizer),
                choices={stage: of_model[domain][place] for stage, of_model in choices.items()},
            )
            for place, tokens in enumerate(of_domain)
        ]
        for domain, of_domain in texts.items()
    }
    return Samples(experts=list(experts), layers=layers, domains=domains)


def token_texts(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token adds to the text. A character that is several tokens stands at the last of
    them, and the others are empty."""
    texts, before = [], ""
    for end in range(1, len(tokens) + 1):
        so_far = str(tokenizer.decode([*tokens[:end]], clean_up_tokenization_spaces=False))
        # Half a character is decoded as this sign until the rest of it comes.
        whole = end == len(tokens) or not so_far.endswith("\N{REPLACEMENT CHARACTER}")
        grown = so_far.startswith(before)
        texts.append(so_far[len(before) :] if whole and grown else "")
        before = so_far if whole else before
    return texts
