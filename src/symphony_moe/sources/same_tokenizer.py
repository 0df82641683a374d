"""Whether two tokenizers do the same: every public setting, and what they make of awkward text.

The one place that compares tokenizers as everyone else uses them: `verify` compares a checkpoint's
with its sources', the tests every kind of tokenizer with the result's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

SETTINGS = {
    "padding_side": "right",
    "truncation_side": "right",
    "model_max_length": int(1e30),
    "model_input_names": ["input_ids", "attention_mask"],
    "clean_up_tokenization_spaces": False,
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": False,
    "split_special_tokens": False,
    "add_prefix_space": False,
    "response_template": None,
    "chat_control_tokens": None,
}
"""Public settings of a tokenizer that its files may name -> what it has where they do not and its
class has no mind of its own."""

TEXTS = (
    "Two  spaces,\ttabs\n\n  and lines.",
    " a space before",
    "    def f(x):\n        return x",
    "12 1234567 3.14 1,000",
    "It's Thomas' café: naïve, Ångström, e\u0301",
    "ÄÖÜ ß ﬁ Ⅷ ½",
    "русский текст 日本語の文 한국어 العربية",
    "🎉👩‍🔬 \u200b\u00a0x",
    "nul\u0000 \r\n \u2028",
    " ",
    "",
)
"""What tokenizers cut differently, beside text of random tokens."""

_TOKENS_TRIED = 64
"""Added tokens that are written into text; tokenizers may have thousands."""


def settings_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Every public setting, special tokens in words, and chat templates."""
    settings = {name: getattr(tokenizer, name, unset) for name, unset in SETTINGS.items()}
    return settings | {
        "special tokens": dict(tokenizer.special_tokens_map),
        "extra_special_tokens": [str(t) for t in getattr(tokenizer, "extra_special_tokens", [])],
        "chat_template": getattr(tokenizer, "chat_template", None),
    }


def other_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Its settings that no class has by itself."""
    found = {name: getattr(tokenizer, name, unset) for name, unset in SETTINGS.items()}
    return {name: value for name, value in found.items() if value not in (SETTINGS[name], None)}


def with_tokens(tokens: Sequence[str]) -> list[str]:
    """Text with each of some added tokens: within a word, apart, in a row and at the ends."""
    return [text for t in tokens[:_TOKENS_TRIED] for text in (f"a{t}b", f"x {t} y", f" {t}{t} {t}")]


def texts_for(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Awkward text, with and without the tokenizer's added tokens. Without the mark for a gap in
    code, which Code Llama's class alone handles: it makes two texts of one."""
    added = set(tokenizer.get_added_vocab()) - {getattr(tokenizer, "fill_token", None)}
    return [*TEXTS, *with_tokens(sorted(added))]


def cut(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> list[int]:
    """A text's tokens, as a call gives them: unlike the library behind it, that heeds no `padding`
    and `truncation` which tokenizer.json may set."""
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def first_difference(
    expected: PreTrainedTokenizerBase,
    found: PreTrainedTokenizerBase,
    texts: Sequence[str],
    settings: Mapping[str, Any] | None = None,
) -> str | None:
    """The first thing that the second does otherwise than the first, in words. `settings`: those
    that are expected, where they are not the first's."""
    if expected.get_vocab() != found.get_vocab():
        wrong = sorted(dict(expected.get_vocab().items() ^ found.get_vocab().items()))
        return f"{len(wrong)} tokens have other numbers, first {wrong[0]!r}"
    theirs = settings_of(found)
    for name, value in (settings or settings_of(expected)).items():
        if theirs[name] != value:
            return f"its {name} is {_short(theirs[name])}, expected {_short(value)}"
    for text in texts:
        pairs = zip(_uses(expected, text), _uses(found, text), strict=False)
        for (what, ours), (_, other) in pairs:
            if other != ours:
                return f"{what} {_short(text)} gives {_short(other)}, expected {_short(ours)}"
    return None


def _uses(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[tuple[str, Any]]:
    """(what is done with a text, what comes of it)."""
    for special in (True, False):
        ids = _tried(cut, tokenizer, text, special=special)
        yield f"cutting (add_special_tokens={special})", ids
        for skip in (True, False):
            what = f"decoding (after add_special_tokens={special}, skip_special_tokens={skip})"
            yield what, _tried(tokenizer.decode, ids, skip_special_tokens=skip)
    yield "cutting short", _tried(tokenizer, text, truncation=True, max_length=3)
    if tokenizer.pad_token is not None:
        yield "padding", _tried(tokenizer, [text, text + " a b"], padding=True)


def _tried(call: Callable[..., Any], *values: Any, **settings: Any) -> Any:
    """What a call gives, or the kind of its error: that is the same where tokenizers are."""
    try:
        found = call(*values, **settings)
    except Exception as error:
        return type(error).__name__
    return dict(found) if isinstance(found, Mapping) else found


def _short(value: Any) -> str:
    spelled = repr(value)
    return spelled if len(spelled) <= 90 else spelled[:87] + "..."
