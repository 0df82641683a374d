"""Held-out loss per domain of every model, where the routers send each domain's tokens, and how
alike the experts are.

Losses are nats per token: the mean negative log-likelihood of every token but the first of a
document. Documents are read one by one, as stock models read them (a document that is longer than
`evaluation.sequence_length` in pieces of that length, the first token of each left out).
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from symphony_moe.evaluation.cka import cka_of_experts, cka_of_sources, describe_cka, shared_text
from symphony_moe.evaluation.routing import (
    Routing,
    at_least,
    describe_routing,
    experts_by_rule,
    fixed_experts,
    mixed,
    observe_routing,
    router_weight,
    routers,
)
from symphony_moe.evaluation.samples import beginnings, choices_of, samples_of
from symphony_moe.files import to_json, write_text
from symphony_moe.machine import peak_rss_bytes
from symphony_moe.progress import Listener, Progress, ignore
from symphony_moe.recipe.settings import Recipe
from symphony_moe.runs.folder import RunFolder
from symphony_moe.runs.metrics import (
    ByThreshold,
    Cka,
    DynamicRouting,
    FixedExperts,
    HeldOut,
    Metrics,
    StageRouting,
    Timing,
    read_metrics,
)
from symphony_moe.runs.samples import Choices
from symphony_moe.sources.source import Source, anchor_of, new_config
from symphony_moe.sources.stock import (
    load_source,
    load_stock,
    negative_log_likelihood,
    tokens_at_once,
)
from symphony_moe.text.texts import Texts
from symphony_moe.text.windows import Pieces, as_pieces, digest_of

log = logging.getLogger(__name__)


def evaluate_run(
    run: RunFolder,
    recipe: Recipe,
    sources: Sequence[Source],
    like: RunFolder | None = None,
    texts: Texts | None = None,
    progress: Listener = ignore,
) -> Metrics:
    """Losses of the sources, the built and the trained model on every domain, their routing and the
    likeness of their experts, into `metrics.json`; which experts some short texts prefer, into
    `samples.json`.

    `like`: a run that may have evaluated the same sources on the same text already; what it says of
    them is taken over then. `texts`: what the command has read already. Returns what was written.
    Raises TextError for a domain without held-out text.
    """
    run.require_checkpoint()
    before = read_metrics(run) if run.metrics.is_file() else Metrics()
    started = time.monotonic()
    windows = Texts.of(recipe, sources, texts).held_out_text()
    shared = shared_text({name: text.windows for name, text in windows.items()})
    names = recipe.expert_names
    with_experts = _layers_with_experts(recipe, sources)
    held_out = HeldOut(text=_digest_of_domains(windows))
    known = _known_of_sources(run, like, recipe, held_out) if like else None
    done = len(sources)
    total = done + run.checkpoint.is_dir() + run.trained.is_dir()
    of_sources, cka = known or _evaluate_sources(sources, windows, shared, progress, total)
    losses: dict[str, dict[str, float]] = {}
    routing: dict[str, StageRouting] = {}
    alike: dict[str, Cka] = {"sources": cka}
    dynamic: dict[str, DynamicRouting] = {}
    shown, choices = beginnings(windows), {}
    for stage, folder in (("built", run.checkpoint), ("trained", run.trained)):
        if not folder.is_dir():
            continue
        losses[stage], observed, choices[stage], with_others = _evaluate_moe(
            folder, windows, shown, recipe.evaluation.thresholds, recipe.experts.per_source
        )
        routing[stage] = StageRouting.model_validate(
            {
                "experts": names,
                **({} if with_experts is None else {"layers": with_experts}),
                "routers": "ffn",
                "tokens": {domain: len(text.tokens) for domain, text in windows.items()},
                **describe_routing(observed, names),
            }
        )
        if with_others is not None:
            dynamic[stage] = with_others
        anchor, config = anchor_of(recipe, sources), new_config(recipe, sources)
        likeness = cka_of_experts(folder, anchor, len(names), recipe.router.top_k, shared, config)
        numel = shared.numel()
        alike[stage] = Cka.model_validate(describe_cka(names, likeness, numel, with_experts))
        log.info("evaluated %s: %s", stage, _spell(losses[stage]))
        done += 1
        progress(Progress("evaluate", done, total))
    found: dict[str, Any] = {"sources": of_sources, "routing": routing, "cka": alike, **losses}
    if dynamic:
        found["dynamic"] = dynamic
    metrics = Metrics(held_out=held_out, **found)
    seconds = round(time.monotonic() - started, 2)
    timing = (before.timing or Timing()).model_copy(
        update={"evaluate_seconds": seconds, "evaluate_peak_rss_bytes": peak_rss_bytes()}
    )
    # What an earlier evaluation says of other text must not stand beside this one.
    forget = [key for key in ("trained", "dynamic") if key not in found]
    run.update_json(run.metrics, metrics.to_json() | {"timing": timing.to_json()}, forget)
    tokenizer = anchor_of(recipe, sources).tokenizer
    samples = samples_of(names, shown, choices, tokenizer, with_experts)
    write_text(run.samples, to_json(samples.to_json()) + "\n")
    return metrics


def _layers_with_experts(recipe: Recipe, sources: Sequence[Source]) -> list[int] | None:
    """The numbers of the layers that have experts; None where all have."""
    dense, count = recipe.experts.dense_layers, sources[0].config.num_hidden_layers
    return [layer for layer in range(count) if layer not in dense] if dense else None


def _evaluate_sources(
    sources: Sequence[Source],
    windows: Mapping[str, Pieces],
    shared: Int[Tensor, "shared sequence"],
    progress: Listener,
    total: int,
) -> tuple[dict[str, dict[str, float]], Cka]:
    """Source -> domain -> loss, and the likeness of their FFNs. `total`: models to evaluate."""
    losses = {}
    for done, source in enumerate(sources, start=1):
        losses[source.name], _ = losses_and_routing(load_source(source), windows, source.known)
        log.info("evaluated source %s: %s", source.name, _spell(losses[source.name]))
        progress(Progress("evaluate", done, total))
    alike = cka_of_sources(sources, shared)
    names = [source.name for source in sources]
    return losses, Cka.model_validate(describe_cka(names, alike, shared.numel()))


def _digest_of_domains(windows: Mapping[str, Pieces]) -> str:
    """SHA-256 of what is evaluated on under which names."""
    digests = {
        name: digest_of([torch.stack((text.tokens, text.positions))])
        for name, text in windows.items()
    }
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _known_of_sources(
    run: RunFolder, like: RunFolder, recipe: Recipe, held_out: HeldOut
) -> tuple[dict[str, dict[str, float]], Cka] | None:
    """What `_evaluate_sources` has given in another run. None unless that run's weights, settings
    of the sources, anchor (whose vocabulary is used), rows of missing tokens, text and software are
    this one's."""
    theirs, found = like.read_recipe(), read_metrics(like)
    one, other = (folder.read_json(folder.manifest) for folder in (run, like))
    same = (
        found.held_out is not None
        and found.held_out.text == held_out.text
        and (theirs.sources, theirs.anchor) == (recipe.sources, recipe.anchor)
        # A row that was made for a token is asked for, and changes what a source loses.
        and theirs.backbone.missing_tokens == recipe.backbone.missing_tokens
        and all(one[key] == other[key] for key in ("versions", "sources"))
    )
    if not same:
        log.info("%s is not of the same sources and text: the sources are evaluated", like.root)
        return None
    log.info("the sources are evaluated in %s", like.root)
    return found.sources, found.cka["sources"]


def _evaluate_moe(
    folder: Path,
    windows: Mapping[str, Pieces],
    shown: Mapping[str, Sequence[Int[Tensor, "_"]]],
    thresholds: Sequence[float],
    slices: int,
) -> tuple[dict[str, float], dict[str, Routing], dict[str, list[Choices]], DynamicRouting | None]:
    """Losses and routing of a checkpoint, what its routers say of the texts that are `shown`, and
    its losses with other numbers of experts (None without thresholds). `slices`: see
    `observe_routing`. The model is out of memory afterwards."""
    model = load_stock(folder)
    losses, routing = losses_and_routing(model, windows, slices=slices)
    choices = choices_of(model, shown, slices)
    others = dynamic_routing(model, windows, thresholds) if thresholds else None
    return losses, routing, choices, others


@torch.inference_mode()
def losses_and_routing(
    model: PreTrainedModel,
    windows: Mapping[str, Pieces | Int[Tensor, "windows sequence"]],
    known: Bool[Tensor, " vocabulary"] | None = None,
    slices: int = 1,
) -> tuple[dict[str, float], dict[str, Routing]]:
    """Domain -> nats per token; and, for an MoE, domain -> the routing of its FFNs.

    `windows`: the text, in pieces that are read one by one, as windows are. `slices`: see
    `observe_routing`.

    `known`: the tokens that the model has, where the vocabulary has others (None: all). It gives no
    probability to the others, and where the text has one, it is not asked. The loss of a domain of
    which it is asked nothing is NaN.
    """
    losses, routing = {}, {}
    is_moe = bool(routers(model))
    for domain, text in windows.items():
        total, predicted = 0.0, 0
        with ExitStack() as stack:
            so_far = stack.enter_context(observe_routing(model, slices)) if is_moe else None
            pieces = as_pieces(text) if isinstance(text, Tensor) else text
            for parts in pieces.batches(tokens_at_once(model, pieces.sequence_length)):
                tokens, positions = (part.to(model.device) for part in parts)
                output = model(input_ids=tokens, position_ids=positions, use_cache=False)
                nats = negative_log_likelihood(output.logits, tokens, known, positions)
                total, predicted = total + float(nats.double().sum()), predicted + len(nats)
        losses[domain] = total / predicted if predicted else math.nan
        if so_far is not None:
            routing[domain] = so_far()
    return losses, routing


def dynamic_routing(
    model: PreTrainedModel,
    windows: Mapping[str, Pieces | Int[Tensor, "windows sequence"]],
    thresholds: Sequence[float],
) -> DynamicRouting:
    """Losses of a stock MoE with 1 .. N experts per token, and with as many as reach each of the
    `thresholds` (shares of 1) in the router's probabilities, beside the number of experts that
    tokens then have: the mean over layers and domains alike, of each layer, of each domain."""
    fixed, by_threshold = [], []
    for count in range(1, len(router_weight(routers(model)[0])) + 1):
        with fixed_experts(model, count):
            losses, _ = losses_and_routing(model, windows)
        fixed.append(FixedExperts(experts=count, losses=losses))
    for threshold in thresholds:
        with experts_by_rule(model, at_least(threshold)):
            losses, routing = losses_and_routing(model, windows)
        by_layer = mixed(list(routing.values())).used.sum(dim=1)
        by_domain = {name: float(found.used.sum(dim=1).mean()) for name, found in routing.items()}
        by_threshold.append(
            ByThreshold(
                threshold=threshold,
                mean_experts=round(float(by_layer.mean()), 6),
                experts_by_layer=[round(count, 6) for count in by_layer.tolist()],
                experts_by_domain={name: round(count, 6) for name, count in by_domain.items()},
                losses=losses,
            )
        )
    return DynamicRouting(fixed=fixed, threshold=by_threshold)


def _spell(losses: Mapping[str, float]) -> str:
    return ", ".join(f"{domain} {loss:.3f}" for domain, loss in losses.items())


@torch.inference_mode()
def continuations(
    run: RunFolder, recipe: Recipe, sources: Sequence[Source], *, count: int = 3, tokens: int = 48
) -> list[tuple[str, str, str]]:
    """(domain, prompt, sampled continuation) for the beginnings of held-out documents, by the
    trained model (or, where there is none, the built one). `tokens`: length of the prompt, and of
    the text."""
    folder = run.trained if run.trained.is_dir() else run.checkpoint
    model = load_stock(folder)
    tokenizer = anchor_of(recipe, sources).tokenizer
    torch.manual_seed(recipe.seed)
    found = []
    for domain, text in list(Texts(recipe, sources).held_out_text().items())[:count]:
        prompt = text.tokens[None, :tokens].to(model.device)
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
