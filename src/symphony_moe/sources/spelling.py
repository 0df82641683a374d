"""How kinds of tokenizers spell text within their ordinary tokens, and the same text in another
kind's spelling.

Byte-level BPE has a character for each byte; SentencePiece (BPE or Unigram) has the text itself,
`▁` for a space, and `<0x0A>` for a byte that is no text.
"""

import re

BYTE_LEVEL = "byte-level BPE"

SPELLINGS = (BYTE_LEVEL, "SentencePiece BPE", "Unigram")
"""The kinds whose tokens can be compared by what they say."""

_SPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_characters() -> dict[int, str]:
    """Byte -> its character in byte-level BPE: itself where that can be seen, and from 256 on where
    it cannot (GPT-2)."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    found = {byte: chr(byte) for byte in seen}
    others = [byte for byte in range(256) if byte not in found]
    return found | {byte: chr(256 + place) for place, byte in enumerate(others)}


_CHARACTERS = _byte_characters()
_BYTES = {character: byte for byte, character in _CHARACTERS.items()}


def said_by(token: str, kind: str) -> bytes | None:
    """What an ordinary token says (UTF-8, or some bytes of it); None where it is spelled in no way
    that the kind has."""
    if kind == BYTE_LEVEL:
        known = all(character in _BYTES for character in token)
        return bytes(_BYTES[character] for character in token) if known else None
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()


def spelled_as(text: bytes, kind: str) -> list[str]:
    """How a kind spells text: at once, or byte by byte where it is no text by itself."""
    if kind == BYTE_LEVEL:
        return ["".join(_CHARACTERS[byte] for byte in text)]
    try:
        return [text.decode().replace(" ", _SPACE)]
    except UnicodeDecodeError:
        return [f"<0x{byte:02X}>" for byte in text]


def is_byte(token: str) -> bool:
    """Whether a token of SentencePiece's stands for a byte."""
    return _BYTE.fullmatch(token) is not None
