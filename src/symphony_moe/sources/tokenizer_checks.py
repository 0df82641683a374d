"""Where a tokenizer finds other tokens in a text than its files say, or than another one does."""

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from symphony_moe.sources.same_tokenizer import cut, texts_for, with_tokens
from symphony_moe.sources.source_tokenizer import FLAGS, GENERIC, SourceTokenizer, flags


def cut_otherwise(source: SourceTokenizer) -> str | None:
    """A text that the class that `transformers` takes cuts otherwise than tokenizer.json says; None
    where there is none, or no such file."""
    file = source.folder / "tokenizer.json"
    if source.backend is None or not file.is_file() or type(source.tokenizer).__name__ in GENERIC:
        return None
    as_filed = PreTrainedTokenizerFast(tokenizer_file=str(file))
    texts = texts_for(source.tokenizer)
    return next((t for t in texts if cut(as_filed, t) != cut(source.tokenizer, t)), None)


def found_otherwise(source: SourceTokenizer, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Added tokens of a source that another tokenizer has too and finds at other places of a text:
    it has them with other flags, or as something that merges make."""
    entries = SourceTokenizer("", source.folder, tokenizer, source.rows).added
    numbers = tokenizer.get_vocab()
    return sorted(
        token
        for token, entry in source.added.items()
        if token in numbers
        and (entry["normalized"] or flags(entry) != flags(entries.get(token, {})))
        and any(
            _places(source.tokenizer, token, text) != _places(tokenizer, token, text)
            for text in with_tokens([token])
        )
    )


def flags_of(tokenizer: PreTrainedTokenizerBase, token: str) -> str:
    """How a tokenizer finds an added token in a text, in words."""
    added = {t.content: t for t in tokenizer.added_tokens_decoder.values()}
    if token not in added:
        return "none of the added ones"
    set_ = [flag for flag in FLAGS if flag != "special" and getattr(added[token], flag)]
    return ", ".join(set_) or "plain"


def _places(tokenizer: PreTrainedTokenizerBase, token: str, text: str) -> list[tuple[int, int]]:
    """Where a token is in a text: (first character, end)."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    number = tokenizer.get_vocab()[token]
    places = zip(found["input_ids"], found["offset_mapping"], strict=True)
    return [tuple(place) for this, place in places if this == number]
