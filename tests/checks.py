"""Helpers of several test files: how a checkpoint is loaded, compared and changed."""

import copy
import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from conftest import WORDS, target_of_variant
from symphony_moe.model.families import BY_LAYER, EMBEDDING, FINAL_NORM
from symphony_moe.model.widening import Layers, Shape, Widening, widened_config
from symphony_moe.recipe.settings import SourceSpec
from symphony_moe.sources.opening import open_source
from symphony_moe.sources.source import Source


def mostly_slow(cases: Iterable[Any], *fast: Any) -> list[Any]:
    """Cases of a parametrized test, all but the `fast` ones as slow tests: their law is the same,
    and their way through the code nearly so. Each of `fast` must be among them."""
    cases = list(cases)
    assert all(case in cases for case in fast), fast

    def marked(case: Any) -> Any:
        values = case if isinstance(case, tuple) else (case,)
        return case if case in fast else pytest.param(*values, marks=pytest.mark.slow)

    return [marked(case) for case in cases]


ADDED = [f"<|{word}|>" for word in ("fim", "im_start", "im_end", "tool", "pad", "x1", "x2", "x3")]


def add_tokens(
    content: dict[str, Any], tokens: Sequence[str], *, special: bool = True, **flags: bool
) -> None:
    """Put added tokens after all others of a tokenizer.json's content."""
    number = 1 + max(
        [*content["model"]["vocab"].values(), *(t["id"] for t in content["added_tokens"])]
    )
    for place, token in enumerate(tokens):
        content["added_tokens"].append(
            {
                "id": number + place,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": special,
            }
            | flags
        )


def drop_merges(content: dict[str, Any], count: int) -> list[str]:
    """Take the last merges and what they make out of a tokenizer; the numbers close up."""
    model = content["model"]
    gone = ["".join(merge) for merge in model["merges"][-count:]] if count else []
    model["merges"] = model["merges"][: len(model["merges"]) - count]
    kept = [token for token in model["vocab"] if token not in gone]
    kept.sort(key=model["vocab"].__getitem__)
    numbers = {token: number for number, token in enumerate(kept)}
    model["vocab"] = numbers
    for token in content["added_tokens"]:
        token["id"] = numbers.get(token["content"], token["id"])
    return gone


def sentence_piece_tokenizer(folder: Path, named: str) -> Path:
    """As Llama 2's: `▁` for spaces and before every text, and what has no letter in bytes. Its file
    says that by a normalizer; the class of Llama does it by a pre-tokenizer."""
    letters = ["▁", *(chr(code) for code in range(33, 127) if chr(code) != "~")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = []
    for word in ("▁" + word for word in WORDS):
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                merges.append([word[: end - 1], word[end - 1]])
                tokens.append(word[:end])
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, space],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                back,
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "merges": merges,
            "vocab": {token: number for number, token in enumerate(tokens)},
        },
    }
    add_tokens(content, tokens[:3])
    for number, token in enumerate(content["added_tokens"]):
        token["id"] = number
    config = {
        "tokenizer_class": named,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


TEXTS = st.lists(
    st.sampled_from([*WORDS, *ADDED, " ", "\n", "é", "日本", "1", "<|", "|>", "alphabeta", "x"]),
    max_size=12,
).map("".join)


def rewrite(model: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def in_two_files(folder: Path) -> None:
    """As GPT-2's, vocabulary and merges apart, and no tokenizer.json."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(merge) for merge in model["merges"]))
    (folder / "tokenizer.json").unlink()


def lowercase(content: dict[str, Any]) -> None:
    """Text is read in lower case."""
    content["normalizer"] = {"type": "Lowercase"}


def prefix_space(content: dict[str, Any]) -> None:
    """A space is put before a text."""
    content["pre_tokenizer"]["add_prefix_space"] = True


def swap_tokens(content: dict[str, Any]) -> None:
    """`A` and `B` have each other's number."""
    vocabulary = content["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]


def with_beginning(content: dict[str, Any]) -> None:
    """`<s>` before every text that is not asked for without."""
    whole = {"Sequence": {"id": "A", "type_id": 0}}
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, whole],
        "pair": [begin, whole],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}},
    }


EXACT = 1e-5
"""Law 2: max |a - b| over max |logit|, float32 output."""


FFN = ("gate", "up", "down")


STACKED = {
    "block_sparse_moe.input_linear.weight": ("w1", "w3"),
    "block_sparse_moe.output_linear.weight": ("w2",),
    "block_sparse_moe.experts.gate_up_proj": ("w1", "w3"),
    "block_sparse_moe.experts.down_proj": ("w2",),
}
"""End of the name of what holds a matrix of all experts' -> Mixtral's names of its parts."""


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder, as it is stored."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder, as it is stored; what holds all experts' matrices, in
    parts (see `expert_names`)."""
    tensors = tensors_of(folder)
    for name in [name for name in tensors if name.endswith(tuple(STACKED))]:
        end = next(end for end in STACKED if name.endswith(end))
        prefix, parts = name.removesuffix(end), STACKED[end]
        for expert, stack in enumerate(tensors.pop(name)):
            for part, matrix in zip(parts, stack.chunk(len(parts)), strict=True):
                tensors[f"{prefix}block_sparse_moe.experts.{expert}.{part}.weight"] = matrix
    return tensors


def load_clean(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The stock model; nothing may be missing, surplus or misshapen."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    model, info = loaded
    assert set(info) >= {"missing_keys", "unexpected_keys", "mismatched_keys"}
    assert not any(info.values()), info
    return model.eval()


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a checkpoint folder that has one file of them."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def with_small_outputs(tensors: dict[str, Tensor]) -> None:
    """Make the outputs of all FFNs so small that float16 has few digits for them."""
    for name, tensor in tensors.items():
        if name.endswith("mlp.down_proj.weight"):
            tensor *= 1e-6


def opened(folder: Path, name: str = "a", *, download: bool = True, **spec: Any) -> Source:
    """A source of a model folder, whose text nobody reads."""
    asked = SourceSpec(model=str(folder), data="unused.txt", **spec)
    return open_source(name, asked, download=download)


def widened(source: Source, shape: Shape, layers: Layers) -> Source:
    """A source in a larger shape; layers that are added are of the kinds of its own, in turn."""
    own, reference = source.config, copy.deepcopy(source.config)
    for name in BY_LAYER:
        if getattr(own, name, None):
            kinds = getattr(own, name)
            setattr(reference, name, [kinds[n % len(kinds)] for n in range(shape.layers)])
    config = widened_config(own, shape, layers, reference)
    return replace(source, config=config, widening=Widening(own, config, layers))


def save_widened(model: Path, shape: Shape, layers: Layers, out: Path) -> Path:
    """A model folder in a larger shape: the same function in more weights."""
    source = widened(opened(model), shape, layers)
    tensors = {
        f"model.layers.{layer}.{name}": tensor.contiguous()
        for layer in range(shape.layers)
        for name, tensor in source.read_layer(layer).items()
    }
    tensors[FINAL_NORM] = source.final_norm()
    for name in {EMBEDDING, source.head_name}:
        tensors[name] = torch.cat([rows for _, rows in source.table(name)])
    shutil.copytree(model, out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    source.config.save_pretrained(out)
    return out


def random_windows(seed: int, windows: int, sequence: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(300, (windows, sequence), generator=generator)


def random_text(seed: int, *shape: int) -> Tensor:
    return torch.randint(250, shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def logits_of(model: Any, text: Tensor, mask: Tensor | None = None) -> Tensor:
    """float32, or float64 of a model in float64."""
    logits: Tensor = model(input_ids=text, attention_mask=mask, use_cache=False).logits
    return logits if logits.dtype == torch.float64 else logits.float()


def difference(found: Tensor, expected: Tensor) -> float:
    """Max |a - b| over max |b|."""
    return float((found - expected).abs().max() / expected.abs().max())


def models_of(recipe: Path) -> Path:
    return recipe.parent / "models"


def expert_names(variant: str, layer: int, expert: int) -> tuple[str, str, str]:
    """gate, up and down of an expert in the output. Granite, which stacks all experts', is taken
    apart into Mixtral's names by `read_tensors`."""
    prefix = f"model.layers.{layer}."
    if "granitemoe" in target_of_variant(variant) or target_of_variant(variant) == "mixtral":
        a, b, c = (
            f"{prefix}block_sparse_moe.experts.{expert}.{w}.weight" for w in ("w1", "w3", "w2")
        )
    else:
        a, b, c = (f"{prefix}mlp.experts.{expert}.{part}_proj.weight" for part in FFN)
    return a, b, c


class Killed(BaseException):
    """Stands in for a signal: nothing catches it."""


class ExactNorm(nn.Module):
    """RMS norm in the dtype of its input: the stock ones compute in float32 whatever they get."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.weight: Tensor = stock.weight
        self.eps: float = stock.variance_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + self.eps)
        return hidden * scale * self.weight


class Page(HTMLParser):
    """Reads a page, refusing tags that do not balance; keeps its tags, text and table rows."""

    VOID = ("meta", "br", "link", "img", "hr", "input", "col")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.caption = html, ""
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.struck: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), (tag, names)
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "caption":
            self.caption = ""
        if tag == "tr":
            self.rows.append([])
            self.tables.setdefault(self.caption, []).append(self.rows[-1])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text.append(data)
        if "caption" in self.open:
            self.caption += data
        if "s" in self.open and "td" in self.open:
            self.struck.append(data)
        if "td" in self.open or ("th" in self.open and self.rows):
            self.rows[-1][-1] += data

    def row(self, label: str) -> list[str]:
        """Cells of the first row that begins with a label."""
        return next(row[1:] for row in self.rows if row and row[0] == label)

    def table(self, caption: str) -> list[list[str]]:
        """Rows of the table whose caption begins so."""
        return next(rows for name, rows in self.tables.items() if name.startswith(caption))

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def router_name(variant: str) -> str:
    return {
        "mixtral": "block_sparse_moe.gate.weight",
        "granitemoe": "block_sparse_moe.router.layer.weight",
        "granitemoe_swa": "block_sparse_moe.router.weight",
    }.get(target_of_variant(variant), "mlp.gate.weight")


def source_ffn(state: Mapping[str, Tensor], layer: int) -> tuple[Tensor, Tensor, Tensor]:
    a, b, c = (state[f"model.layers.{layer}.mlp.{part}_proj.weight"] for part in FFN)
    return a, b, c


def make_adapter(
    base: Path, folder: Path, rows: int | None = None, save: Any = "auto", **settings: Any
) -> Path:
    """A random adapter, saved by peft; its model's tables resized to `rows` before."""
    import peft  # takes seconds, which most tests need not wait

    torch.manual_seed(7)
    config: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 12,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "init_lora_weights": False,
    } | settings
    own: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows is not None:
        own.resize_token_embeddings(rows)
    with warnings.catch_warnings(action="ignore"):  # peft's, of adapters that are unusual
        model = peft.get_peft_model(own, peft.LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora_" not in name or config["init_lora_weights"]):
                parameter.add_(0.1 * torch.randn_like(parameter))
    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(str(folder), save_embedding_layers=save)
    return folder
