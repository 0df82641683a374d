"""Held-out loss per domain of every model, and where the router sends each domain's tokens.

Losses are nats per token: the mean negative log-likelihood of every token of a window but its
first.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from symphony_moe.forward import WINDOWS_TOKENS
from symphony_moe.recipe import Recipe
from symphony_moe.run_folder import RunFolder
from symphony_moe.sources import Source, anchor_of
from symphony_moe.stock import load_source, load_stock
from symphony_moe.text import Documents, draw_windows, read_documents, split_held_out

log = logging.getLogger(__name__)


def evaluate_run(run: RunFolder, recipe: Recipe, sources: Sequence[Source]) -> dict[str, Any]:
    """Losses of the sources, the built and the trained model on every domain, into `metrics.json`.

    Returns what was written. Raises TextError for a domain without held-out text.
    """
    run.require_checkpoint()
    started = time.monotonic()
    windows = held_out_windows(recipe, sources)
    metrics: dict[str, Any] = {"sources": {}, "routing": {}}
    names = [source.name for source in sources]
    for source in sources:
        losses, _ = losses_and_routing(load_source(source), windows, source.known)
        metrics["sources"][source.name] = losses
        log.info("evaluated source %s: %s", source.name, _spell(losses))
    for stage, folder in (("built", run.checkpoint), ("trained", run.trained)):
        if not folder.is_dir():
            continue
        losses, shares = losses_and_routing(load_stock(folder), windows)
        metrics[stage] = losses
        metrics["routing"][stage] = {
            "experts": names,
            "tokens": {domain: text.numel() for domain, text in windows.items()},
            "share": shares,
        }
        log.info("evaluated %s: %s", stage, _spell(losses))
    known = run.read_json(run.metrics) if run.metrics.is_file() else {}
    seconds = {"evaluate_seconds": round(time.monotonic() - started, 2)}
    forget = [] if run.trained.is_dir() else ["trained"]
    run.update_json(run.metrics, metrics | {"timing": known.get("timing", {}) | seconds}, forget)
    return metrics


def held_out_windows(
    recipe: Recipe, sources: Sequence[Source]
) -> dict[str, Int[Tensor, "windows sequence"]]:
    """Domain -> held-out windows: the sources' domains, then the extra ones. All of an extra
    domain's documents are evaluated on, as none is trained on."""
    settings = recipe.evaluation
    anchor = anchor_of(recipe, sources)
    windows = {}
    for name, data in [(s.name, recipe.sources[s.name].data) for s in sources] + list(
        settings.extra.items()
    ):
        spec = recipe.sources.get(name)
        tokenizer = next((s.own_tokenizer for s in sources if s.name == name), anchor.tokenizer)
        who = f"held-out text of {name}"
        documents: Documents = read_documents(who, data, spec.column if spec else "text", tokenizer)
        if spec:
            _, documents = split_held_out(documents, settings.holdout)
        windows[name] = draw_windows(
            who,
            documents,
            anchor.tokenizer,
            tokens=settings.tokens,
            sequence_length=settings.sequence_length,
            seed=recipe.seed,
        )
    return windows


@torch.inference_mode()
def losses_and_routing(
    model: PreTrainedModel,
    windows: Mapping[str, Int[Tensor, "windows sequence"]],
    known: Bool[Tensor, " vocabulary"] | None = None,
) -> tuple[dict[str, float], dict[str, list[list[float]]]]:
    """Domain -> nats per token; and, for an MoE, domain -> layer -> expert -> share of the token's
    choices (each layer sums to one; no entries for a dense model).

    `known`: the tokens that the model has, where the vocabulary has others (None: all). It gives no
    probability to the others, and where the text has one, it is not asked.
    """
    losses, shares = {}, {}
    top_k = getattr(model.config, "num_experts_per_tok", None)
    for domain, text in windows.items():
        total, predicted = 0.0, 0
        counts: Tensor | None = None
        for batch in text.to(model.device).split(max(1, WINDOWS_TOKENS // text.shape[1])):
            arguments = {} if top_k is None else {"output_router_logits": True}
            output = model(input_ids=batch, use_cache=False, **arguments)
            nats = negative_log_likelihood(output.logits, batch, known)
            total, predicted = total + float(nats.double().sum()), predicted + len(nats)
            if top_k is not None:
                chosen = torch.stack([_choices(logits, top_k) for logits in output.router_logits])
                counts = chosen if counts is None else counts + chosen
        losses[domain] = total / max(predicted, 1)
        if counts is not None:
            share = counts.double() / counts.sum(dim=1, keepdim=True)
            shares[domain] = [[round(value, 6) for value in layer] for layer in share.tolist()]
    return losses, shares


def negative_log_likelihood(
    logits: Float[Tensor, "windows sequence vocabulary"],
    tokens: Int[Tensor, "windows sequence"],
    known: Bool[Tensor, " vocabulary"] | None = None,
) -> Float[Tensor, " predicted"]:
    """Nats of every token but each window's first (of those that are `known`)."""
    logits, wanted = logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()
    if known is not None:
        known = known.to(logits.device)
        asked = known[wanted]
        logits, wanted = logits[asked].masked_fill(~known, -torch.inf), wanted[asked]
    return torch.nn.functional.cross_entropy(logits, wanted, reduction="none")


def _choices(logits: Float[Tensor, "tokens experts"], top_k: int) -> Int[Tensor, " experts"]:
    """How often each expert is among a token's top_k."""
    chosen = logits.topk(top_k, dim=-1).indices.flatten()
    return torch.bincount(chosen, minlength=logits.shape[1])


def _spell(losses: Mapping[str, float]) -> str:
    return ", ".join(f"{domain} {loss:.3f}" for domain, loss in losses.items())


@torch.inference_mode()
def continuations(
    run: RunFolder, recipe: Recipe, sources: Sequence[Source], *, count: int = 3, tokens: int = 48
) -> list[tuple[str, str, str]]:
    """(domain, prompt, sampled continuation) for the beginnings of held-out windows, by the trained
    model (or, where there is none, the built one). `tokens`: length of the prompt, and of the
    text."""
    folder = run.trained if run.trained.is_dir() else run.checkpoint
    model = load_stock(folder)
    tokenizer = anchor_of(recipe, sources).tokenizer
    torch.manual_seed(recipe.seed)
    found = []
    for domain, windows in list(held_out_windows(recipe, sources).items())[:count]:
        prompt = windows[:1, :tokens].to(model.device)
        generate: Any = model.generate
        output = generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=True,
            temperature=0.7,
            top_p=0.9,
            pad_token_id=tokenizer.eos_token_id,
        )
        before, after = (
            str(tokenizer.decode(ids, skip_special_tokens=True))
            for ids in (output[0, :tokens], output[0, tokens:])
        )
        found.append((domain, before, after))
    return found
