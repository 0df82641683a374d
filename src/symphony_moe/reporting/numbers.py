"""Numbers in words."""

Number = int | float


# Numbers in words


def count(value: Number) -> str:
    """A number of things, such as `262,144`."""
    return f"{value:,.0f}"


def compact(value: Number) -> str:
    """A number of tokens on an axis, such as `2.5M`."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


def in_words(value: Number) -> str:
    """A number of parameters, such as `1.54 billion`."""
    for unit, word in ((1e9, "billion"), (1e6, "million")):
        if value >= unit:
            return f"{value / unit:,.2f} {word}"
    return count(value)


def size(num_bytes: Number) -> str:
    """Bytes, such as `3.1 GB` (10**9 bytes)."""
    for unit, word in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:,.1f} {word}"
    return f"{num_bytes:,.0f} bytes"


def duration(seconds: Number) -> str:
    """Seconds, such as `4.2 s`, `3 min 05 s` or `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
