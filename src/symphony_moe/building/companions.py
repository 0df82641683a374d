"""Everything of a checkpoint but its weights: config, tokenizer, generation config, model card.

Nothing in these files tells the time or a path of the machine: the same recipe gives the same
bytes.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers

from symphony_moe.building.plan import Plan, source_in_words
from symphony_moe.files import sync_folder, write_bytes, write_text
from symphony_moe.recipe.settings import BUNDLED, Recipe
from symphony_moe.recipe.yaml_text import write_yaml
from symphony_moe.sources.source import (
    GENERATION,
    Source,
    anchor_of,
    generation_settings,
    public_name,
)
from symphony_moe.sources.tokenizer_files import tokenizer_files


def write_companions(folder: Path, plan: Plan, recipe: Recipe, sources: Sequence[Source]) -> None:
    """Write config, tokenizer, chat template and generation config (the anchor's, or those of the
    union of vocabularies) and model card."""
    config = plan.config | {"transformers_version": transformers.__version__}
    write_json(folder / "config.json", config)
    anchor = anchor_of(recipe, sources)
    vocabulary = anchor.vocabulary
    files = tokenizer_files(anchor.source_tokenizer) if vocabulary is None else vocabulary.files
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_bytes(folder / name, content)
    for parent in {(folder / name).parent for name in files}:
        sync_folder(parent)
    settings = generation_settings(anchor)
    if recipe.output.chat not in (None, recipe.anchor):
        assert vocabulary is not None
        ids = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        settings = dict(vocabulary.generation or ids)
    settings.pop("_from_model_config", None)
    settings |= _all_ends(settings.get("eos_token_id"), sources)
    write_json(
        folder / GENERATION,
        settings | {"transformers_version": transformers.__version__},
    )
    write_text(folder / "README.md", model_card(plan, recipe, sources))
    sync_folder(folder)


def _all_ends(numbers: Any, sources: Sequence[Source]) -> dict[str, Any]:
    """`eos_token_id` with the ends of all sources' documents: each is taught to the new model, so
    that it stops there. Nothing where they are in it already."""
    listed = [] if numbers is None else numbers if isinstance(numbers, list) else [numbers]
    more = sorted({s.encoder.end for s in sources if s.encoder.end is not None} - {*listed})
    return (
        {"eos_token_id": [*listed, *more] if listed or len(more) > 1 else more[0]} if more else {}
    )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file as `transformers` writes its own: indented, keys sorted."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def model_card(plan: Plan, recipe: Recipe, sources: Sequence[Source]) -> str:
    """README.md of the output, with the hub's metadata."""
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        # The hub takes names only, `name` or `owner/name`.
        "base_model": [source.public_name.removeprefix(BUNDLED) for source in sources],
        "base_model_relation": "merge",
        "tags": ["moe", "merge", "symphony-moe"],
    }
    rows = "\n".join(
        f"| {number} | {source['name']}{' (anchor)' if source['anchor'] else ''} | "
        f"{source_in_words(source)} |"
        for number, source in enumerate(plan.sources)
    )
    shown = recipe.model_dump(mode="json", exclude={"train", "evaluation"})
    for name, spec in shown["sources"].items():
        named = {key: public_name(spec[key]) for key in ("model", "adapter") if spec[key]}
        others = ("revision", "gguf_file", "adapter_revision")
        shown["sources"][name] = named | {key: spec[key] for key in others if spec[key]}
    total, active = plan.total_parameters, plan.active_parameters
    made = (
        f"A `{plan.architecture}` model with {total:,} parameters, {active:,} of them active per "
        f"token (top {recipe.router.top_k}), built from {len(sources)} `{plan.family}` models with "
        f"symphony-moe, method `{recipe.method}`, after the paper "
        "[Symphony-MoE](https://arxiv.org/abs/2509.18542)."
    )
    return f"""---
{write_yaml(metadata)}---

# Mixture of {len(sources)} experts

{made}

| expert | source | model |
|---|---|---|
{rows}

## Recipe

```yaml
{write_yaml(shown)}```
"""
