"""Everything of a checkpoint but its weights: config, tokenizer, generation config, model card.

Nothing in these files tells the time or a path of the machine: the same recipe gives the same
bytes.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers

from symphony_moe.building.model_card import model_card
from symphony_moe.building.plan import Plan
from symphony_moe.files import sync_folder, write_bytes, write_text
from symphony_moe.recipe.settings import Recipe
from symphony_moe.sources.source import (
    GENERATION,
    Source,
    anchor_of,
    generation_settings,
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
    card = model_card(plan, recipe, sources, has_chat_template=_has_chat_template(files))
    write_text(folder / "README.md", card)
    sync_folder(folder)


def _has_chat_template(files: Mapping[str, bytes]) -> bool:
    """Whether a tokenizer's files hold a chat template."""
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    return "chat_template.jinja" in files or bool(settings.get("chat_template"))


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
