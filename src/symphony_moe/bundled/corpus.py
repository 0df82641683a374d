"""Text of seven domains, made at run time on any machine, offline.

Four domains have a bundled source each. The other three are out of domain, as no source sees them:
C and C++ headers, the licences of packages, and what packages say of themselves. Code and prose are
read from what is installed anyway (the standard library and this package's dependencies),
arithmetic and records are written here from fixed seeds, so that no text has to be shipped. Content
is deterministic on one machine; what is read follows the installed versions.
"""

import ast
import email
import functools
import hashlib
import importlib.util
import inspect
import json
import math
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from symphony_moe.errors import TextError


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


DOMAINS = ("english", "python", "arithmetic", "records")
OUT_OF_DOMAIN = ("headers", "licences", "readmes")

DOMAIN_CHARACTERS = 4_000_000
"""Text per domain at most, in characters."""

DOCUMENT_CHARACTERS = (1_000, 3_000, 6_000)
"""Shortest, usual and longest document, in characters."""

PROSE_PACKAGES = _words(
    """
    accelerate datasets huggingface_hub jinja2 networkx numpy pandas pydantic sympy torch
    transformers
    """
)
"""Dependencies, direct or of a dependency, whose docstrings are the technical English."""

DISTRIBUTIONS = _words(
    """
    accelerate aiohttp certifi datasets dill filelock fsspec gguf httpx huggingface-hub jinja2
    markdown-it-py multiprocess networkx numpy packaging pandas peft psutil pyarrow pydantic
    pydantic-core pygments pyyaml regex requests rich safetensors setuptools sympy tokenizers torch
    tqdm transformers typer xxhash yarl
    """
)
"""Dependencies, as they are named where they are installed from, whose licences and descriptions
are out-of-domain text. What is not installed is left out."""

PROSE_SOURCE_CHARACTERS = 900_000
"""Source parsed per package, in characters: parsing is what takes the time."""

# Tests and generated tables are code that nobody writes by hand; installed packages are not the
# standard library; `ATen/ops` is thousands of generated headers of one shape.
SKIPPED_FOLDERS = _words(
    """
    __pycache__ _pyrepl encodings ensurepip idlelib lib2to3 ops pydoc_data site-packages test
    testing tests turtledemo
    """
)


@functools.cache
def documents(domain: str) -> list[str]:
    """All documents of a domain, 1 to 6 kB each, in a fixed order and without duplicates.

    The list is shared between callers: do not change it.
    """
    return make_documents(domain)


def make_documents(domain: str) -> list[str]:
    """`documents`, made anew: for one who keeps them."""
    makers: dict[str, Callable[[], Iterator[str]]] = {
        "english": _english,
        "python": _python,
        "arithmetic": lambda: _sheets(random.Random("symphony-moe arithmetic"), _problem_sheet),
        "records": lambda: _sheets(random.Random("symphony-moe records"), _record_sheet),
        "headers": _headers,
        "licences": _licences,
        "readmes": _readmes,
    }
    if domain not in makers:
        raise TextError(f"no domain is named {domain!r}; the bundled ones are {', '.join(makers)}")
    found: dict[str, None] = {}
    characters = 0
    for document in makers[domain]():
        if document in found:
            continue
        if characters + len(document) > DOMAIN_CHARACTERS:
            break
        found[document] = None
        characters += len(document)
    if not found:
        raise TextError(
            f"{domain}: this machine has none of the text it is made of (the standard library's "
            "sources, or the installed dependencies' files); reinstall them with their sources"
        )
    return list(found)


# Text that is read from installed files ---------------------------------------------------------


def _python() -> Iterator[str]:
    """Code of the standard library, without the comments that open each file."""
    for text in _texts(Path(sysconfig.get_path("stdlib")), (".py",)):
        yield from _split(re.sub(r"\A(?:#[^\n]*\n|\s*\n)+", "", text))


def _headers() -> Iterator[str]:
    """C and C++ headers of torch and the interpreter, without the comments that open each file."""
    opening = re.compile(r"\A(?:\s*(?:/\*.*?\*/|//[^\n]*\n))+", re.DOTALL)
    folders = [Path(sysconfig.get_path("include"))]
    folders += [folder / "include" for folder in _package_folders(("torch",))]
    for folder in folders:
        for text in _texts(folder, (".h", ".hpp", ".cuh")):
            yield from _split(opening.sub("", text).lstrip("\n"))


def _licences() -> Iterator[str]:
    """Legal English: the licences that packages come with, theirs and of what they contain. A
    licence that many packages have, with another year or name, comes once."""
    seen: set[str] = set()
    for package in _distributions():
        files = [file for file in package.files or [] if _is_licence(file.name)]
        for file in sorted(files, key=str):
            try:
                text = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            for document in _split(text):
                # The beginning has names and years; whole documents differ by them alone.
                middle = "".join(document[len(document) // 3 :].split())[:200]
                if middle not in seen:
                    seen.add(middle)
                    yield document


def _is_licence(name: str) -> bool:
    known = r"(licen[cs]e|copying|notice)"
    return re.match(known, name, re.IGNORECASE) is not None and not name.endswith(".py")


def _readmes() -> Iterator[str]:
    """What packages say of themselves where they are installed from, in Markdown and
    reStructuredText: prose, commands and code by turns."""
    for package in _distributions():
        # A description stands below the fields, as the body of a letter does.
        said = email.message_from_string(package.read_text("METADATA") or "")
        yield from _split(str(said.get_payload()))


def _distributions() -> Iterator[Distribution]:
    for name in DISTRIBUTIONS:
        try:
            yield distribution(name)
        except PackageNotFoundError:
            continue


def _english() -> Iterator[str]:
    """Prose from docstrings: parsed, never imported. The packages are interleaved.

    Interleaving keeps every package in, however early the limit of the domain is reached.
    """
    streams = [_package_prose(folder) for folder in _package_folders(PROSE_PACKAGES)]
    while streams:
        alive = []
        for stream in streams:
            document = next(stream, None)
            if document is not None:
                yield document
                alive.append(stream)
        streams = alive


def _package_prose(folder: Path) -> Iterator[str]:
    seen: set[str] = set()
    characters = 0
    for text in _texts(folder, (".py",)):
        # Parse only where a good part of the file is docstrings, by a look that costs nothing.
        if sum(map(len, text.split('"""')[1::2])) < 0.35 * len(text):
            continue
        characters += len(text)
        if characters > PROSE_SOURCE_CHARACTERS:
            return
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        # Paragraphs repeat from class to class (the same argument, explained again): each once.
        paragraphs = [p for p in _prose_paragraphs(_docstrings(tree)) if p not in seen]
        paragraphs = list(dict.fromkeys(paragraphs))
        seen.update(paragraphs)
        yield from _split("\n\n".join(paragraphs))


def _docstrings(tree: ast.Module) -> Iterator[str]:
    """Docstrings of a module, its classes and their methods, in the order of the file."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                yield inspect.cleandoc(docstring)
        if isinstance(node, ast.Module | ast.ClassDef):
            waiting.extend(reversed(node.body))


def _prose_paragraphs(docstrings: Iterable[str]) -> Iterator[str]:
    for docstring in docstrings:
        if len(docstring) < 80:
            continue
        without_code = re.sub(r"```.*?(?:```|\Z)", "", docstring, flags=re.DOTALL)
        for paragraph in re.split(r"\n\s*\n", without_code):
            plain = sum(map(paragraph.count, " etaoinshrdlu"))
            is_code = ">>>" in paragraph or "{" in paragraph or "def " in paragraph
            if len(paragraph) >= 40 and not is_code and plain > 0.6 * len(paragraph):
                yield paragraph.strip("\n")


def _package_folders(names: Iterable[str]) -> list[Path]:
    """Folders of those packages that are installed, without importing them."""
    specs = [importlib.util.find_spec(name) for name in names]
    places = [spec.submodule_search_locations for spec in specs if spec is not None]
    return [Path(place[0]) for place in places if place]


def _texts(folder: Path, endings: tuple[str, ...]) -> Iterator[str]:
    """Files below a folder, ordered by the hash of their relative path: any first part is varied.

    Links are not followed; files that are not UTF-8 are skipped.
    """
    files: list[tuple[str, Path]] = []
    waiting = [folder] if folder.is_dir() else []
    while waiting:
        for entry in waiting.pop().iterdir():
            if entry.suffix in endings:
                relative = entry.relative_to(folder).as_posix()
                files.append((hashlib.sha256(relative.encode()).hexdigest(), entry))
            elif _may_hold_text(entry):
                waiting.append(entry)
    for _, file in sorted(files):
        try:
            yield file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue


def _may_hold_text(entry: Path) -> bool:
    if "." in entry.name or entry.name in SKIPPED_FOLDERS:
        return False
    return entry.is_dir() and not entry.is_symlink()


def _split(text: str) -> Iterator[str]:
    """Cut a long text at blank lines, or at lines where there are none for long.

    A file whose lines are longer than a document is data and gives nothing; so does a short one.
    """
    shortest, usual, longest = DOCUMENT_CHARACTERS
    pieces: list[str] = []
    for block in re.split(r"(?<=\n)\n+", text):
        lines = block.splitlines(keepends=True)
        if any(len(line) > shortest for line in lines):
            return
        piece = ""
        for line in lines:
            if len(piece) + len(line) > usual:
                pieces.append(piece)
                piece = ""
            piece += line
        pieces.append(piece)
    document = ""
    for piece in pieces:
        if document and len(document) + len(piece) > usual and len(document) >= shortest:
            yield document
            document = ""
        document += ("\n" if document else "") + piece
    assert len(document) <= longest
    if len(document) >= shortest:
        yield document


# Text that is written here ----------------------------------------------------------------------


def _sheets(rng: random.Random, write: Callable[[random.Random], str]) -> Iterator[str]:
    while True:
        yield write(rng)


NAMES = _words(
    """
    Ada Amir Beatrix Carlos Chen Dalia Daniel Edith Elif Farid Fiona Grace Hana Hugo Ines Ivan
    Jonas Kofi Lena Lucia Marek Mei Nadia Noah Olga Omar Petra Priya Quentin Rosa Samuel Sofia
    Tariq Uma Viktor Wanda Yusuf Zoe
    """
)
THINGS = _words(
    """
    apples bolts books bottles bricks candles chairs coins cups eggs envelopes flowers lamps
    lemons marbles nails notebooks pencils plates ropes seeds shirts stamps tickets tiles
    """
)


def _problem_sheet(rng: random.Random) -> str:
    """Worked problems, numbered, of one kind or of a few."""
    kinds = rng.sample(PROBLEMS, rng.choice((1, 2, 3, 5)))
    heading = rng.choice(
        ("Exercises", "Worked problems", "Practice sheet", "Solutions", "Homework")
    )
    sheet = f"{heading} {rng.randint(1, 999)}\n"
    length = rng.randint(1_300, 3_200)
    number = 1
    while len(sheet) < length:
        sheet += f"\n{number}. {rng.choice(kinds)(rng)}\n"
        number += 1
    return sheet


def _number(rng: random.Random, most_digits: int = 5) -> int:
    """Every number of digits is as likely as any other."""
    digits = rng.randint(1, most_digits)
    return rng.randint(10 ** (digits - 1), 10**digits - 1)


def _addition(rng: random.Random) -> str:
    a, b = _number(rng, 6), _number(rng, 6)
    lines = [
        rng.choice((f"Add {a} and {b}.", f"{a} + {b} = ?", f"What is the sum of {a} and {b}?"))
    ]
    carry = 0
    for place in range(len(str(max(a, b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        carried = f" + {carry}" if carry else ""
        lines.append(f"{x} + {y}{carried} = {total}, write {total % 10}, carry {total // 10}")
        carry = total // 10
    return "\n".join([*lines, f"So {a} + {b} = {a + b}."])


def _subtraction(rng: random.Random) -> str:
    b, a = sorted((_number(rng, 6), _number(rng, 6)))
    lines = [rng.choice((f"Subtract {b} from {a}.", f"{a} - {b} = ?", f"Find {a} minus {b}."))]
    borrow = 0
    for place in range(len(str(a))):
        x, y = a // 10**place % 10 - borrow, b // 10**place % 10
        borrow = int(x < y)
        lent = f"borrow 10: {x + 10} - {y} = {x + 10 - y}" if borrow else f"{x} - {y} = {x - y}"
        lines.append(f"digit {place + 1}: {lent}")
    return "\n".join([*lines, f"So {a} - {b} = {a - b}."])


def _multiplication(rng: random.Random) -> str:
    a, b = _number(rng, 4), _number(rng, 3)
    lines = [rng.choice((f"Multiply {a} by {b}.", f"{a} x {b} = ?", f"Compute {a} times {b}."))]
    total = 0
    for place, digit in enumerate(reversed(str(b))):
        part = a * int(digit) * 10**place
        lines.append(f"{a} x {int(digit) * 10**place} = {part}; {total} + {part} = {total + part}")
        total += part
    return "\n".join([*lines, f"So {a} x {b} = {a * b}."])


def _division(rng: random.Random) -> str:
    a, b = _number(rng, 6), rng.randint(2, 25)
    lines = [
        rng.choice((f"Divide {a} by {b}.", f"{a} / {b} = ?", f"How often does {b} go into {a}?"))
    ]
    rest = 0
    for digit in str(a):
        rest = rest * 10 + int(digit)
        lines.append(f"{rest} = {rest // b} x {b} + {rest % b}")
        rest %= b
    return "\n".join([*lines, f"So {a} / {b} = {a // b} remainder {a % b}."])


def _fractions(rng: random.Random) -> str:
    a, c = rng.randint(1, 20), rng.randint(1, 20)
    b, d = rng.randint(2, 24), rng.randint(2, 24)
    common = math.lcm(b, d)
    left, right = a * common // b, c * common // d
    total = left + right
    shared = math.gcd(total, common)
    return (
        f"Add the fractions {a}/{b} and {c}/{d}.\n"
        f"The common denominator of {b} and {d} is {common}.\n"
        f"{a}/{b} = {left}/{common} and {c}/{d} = {right}/{common}.\n"
        f"{left} + {right} = {total}, so the sum is {total}/{common}.\n"
        f"Both divide by {shared}: {a}/{b} + {c}/{d} = {total // shared}/{common // shared}."
    )


def _equation(rng: random.Random) -> str:
    name = rng.choice("xyztnk")
    a, root, b = rng.randint(2, 19), rng.randint(-30, 60), rng.randint(1, 150)
    sign, undo, does = ("+", "-", "Subtract") if rng.random() < 0.5 else ("-", "+", "Add")
    c = a * root + (b if sign == "+" else -b)
    return (
        f"Solve {a}{name} {sign} {b} = {c} for {name}.\n"
        f"{does} {b} on both sides: {a}{name} = {c} {undo} {b} = {a * root}.\n"
        f"Divide by {a}: {name} = {a * root} / {a} = {root}.\n"
        f"Check: {a} * {root} {sign} {b} = {c}."
    )


def _quadratic(rng: random.Random) -> str:
    p, q = sorted((rng.randint(1, 15), rng.randint(1, 15)))
    return (
        f"Solve x^2 - {p + q}x + {p * q} = 0.\n"
        f"We need two numbers with sum {p + q} and product {p * q}: {p} and {q}.\n"
        f"x^2 - {p + q}x + {p * q} = (x - {p})(x - {q}).\n"
        + (f"So x = {p}, twice." if p == q else f"So x = {p} or x = {q}.")
    )


def _sequence(rng: random.Random) -> str:
    start, step = rng.randint(1, 60), rng.randint(2, 30)
    if rng.random() < 0.5:
        terms, rule = [start + step * i for i in range(6)], f"add {step}"
    else:
        ratio = rng.randint(2, 5)
        terms, rule = [start * ratio**i for i in range(6)], f"multiply by {ratio}"
    shown = ", ".join(map(str, terms[:5]))
    return f"Continue the sequence {shown}, ...\nThe rule is: {rule}.\nThe next term is {terms[5]}."


def _greatest_divisor(rng: random.Random) -> str:
    factor = rng.randint(1, 30)
    a, b = factor * rng.randint(2, 60), factor * rng.randint(2, 60)
    lines = [f"Find the greatest common divisor of {a} and {b}."]
    x, y = max(a, b), min(a, b)
    while y:
        lines.append(f"{x} = {x // y} * {y} + {x % y}")
        x, y = y, x % y
    return "\n".join([*lines, f"The last nonzero remainder is {x}, so gcd({a}, {b}) = {x}."])


def _prime_factors(rng: random.Random) -> str:
    number = rest = rng.randint(12, 4_000)
    lines, factors, divisor = [f"Factor {number} into primes."], [], 2
    while divisor * divisor <= rest:
        if rest % divisor == 0:
            lines.append(f"{rest} / {divisor} = {rest // divisor}")
            factors.append(divisor)
            rest //= divisor
        else:
            divisor += 1
    product = " * ".join(map(str, [*factors, rest]))
    if not factors:
        return f"{lines[0]}\nNo prime up to {math.isqrt(number)} divides it: {number} is prime."
    return "\n".join([*lines, f"{rest} is prime, so {number} = {product}."])


def _expression(rng: random.Random) -> str:
    a, b, c, d = (rng.randint(2, 40) for _ in range(4))
    if rng.random() < 0.5:
        return (
            f"Evaluate {a} + {b} * {c} - {d}.\n"
            f"First the product: {b} * {c} = {b * c}.\n"
            f"Then from the left: {a} + {b * c} = {a + b * c}, {a + b * c} - {d} = {a + b * c - d}."
        )
    return (
        f"Evaluate ({a} + {b}) * ({c} + {d}).\n"
        f"The brackets: {a} + {b} = {a + b} and {c} + {d} = {c + d}.\n"
        f"The product: {a + b} * {c + d} = {(a + b) * (c + d)}."
    )


def _shopping(rng: random.Random) -> str:
    who, thing = rng.choice(NAMES), rng.choice(THINGS)
    count, price = rng.randint(2, 30), rng.randint(15, 999)
    total = count * price
    paid = (total // 1000 + 1) * 1000
    verb = rng.choice(("buys", "orders", "picks out"))
    return (
        f"{who} {verb} {count} {thing} at {price / 100:.2f} each and pays with {paid / 100:.2f}. "
        f"How much change is there?\n"
        f"The {thing} cost {count} * {price / 100:.2f} = {total / 100:.2f}.\n"
        f"The change is {paid / 100:.2f} - {total / 100:.2f} = {(paid - total) / 100:.2f}."
    )


def _sharing(rng: random.Random) -> str:
    first, second = rng.sample(NAMES, 2)
    thing, times, few = rng.choice(THINGS), rng.randint(2, 9), rng.randint(3, 80)
    return (
        f"{first} has {times} times as many {thing} as {second}. Together they have "
        f"{(times + 1) * few}. How many has each?\n"
        f"If {second} has n, then {first} has {times}n, and n + {times}n = {times + 1}n.\n"
        f"{times + 1}n = {(times + 1) * few}, so n = {few}.\n"
        f"{second} has {few} {thing} and {first} has {times} * {few} = {times * few}."
    )


def _journey(rng: random.Random) -> str:
    vehicle = rng.choice(("train", "bus", "ship", "lorry", "cyclist", "drone"))
    speed, hours, minutes = rng.randint(2, 40) * 4, rng.randint(1, 9), rng.choice((0, 15, 30, 45))
    total = hours * 60 + minutes
    return (
        f"A {vehicle} travels at {speed} km/h for {hours} h {minutes} min. How far does it go?\n"
        f"{hours} h {minutes} min = {total} min = {total / 60:g} h.\n"
        f"{speed} * {total / 60:g} = {speed * total // 60}, so it goes {speed * total // 60} km."
    )


def _percentage(rng: random.Random) -> str:
    share, whole = rng.randint(1, 19) * 5, rng.randint(2, 90) * 20
    part = share * whole // 100
    change = rng.choice(("increased", "reduced"))
    result = whole + part if change == "increased" else whole - part
    sign = "+" if change == "increased" else "-"
    return (
        f"A price of {whole} is {change} by {share}%. What is it now?\n"
        f"{share}% of {whole} is {whole} * {share} / 100 = {part}.\n"
        f"{whole} {sign} {part} = {result}."
    )


def _mean(rng: random.Random) -> str:
    count = rng.randint(3, 7)
    values = [rng.randint(1, 99) for _ in range(count)]
    running = [sum(values[: i + 1]) for i in range(count)]
    return (
        f"Find the mean and the median of {', '.join(map(str, values))}.\n"
        f"Running sum: {', '.join(map(str, running))}.\n"
        f"Mean: {running[-1]} / {count} = {running[-1] / count:.2f}.\n"
        f"Sorted: {', '.join(map(str, sorted(values)))}. "
        f"Median: {(sorted(values)[(count - 1) // 2] + sorted(values)[count // 2]) / 2:g}."
    )


PROBLEMS = (
    _addition,
    _subtraction,
    _multiplication,
    _division,
    _fractions,
    _equation,
    _quadratic,
    _sequence,
    _greatest_divisor,
    _prime_factors,
    _expression,
    _shopping,
    _sharing,
    _journey,
    _percentage,
    _mean,
)

Value = str | int | float | bool | None
Record = dict[str, Value]

CITIES = _words(
    """
    Accra Bergen Bogota Cairo Cork Delhi Dakar Gdansk Hanoi Izmir Jena Kyoto Lagos Leeds Lima
    Lyon Malmo Nairobi Odesa Porto Quito Riga Seoul Sofia Tampa Turin Utrecht Vienna Windhoek
    Zagreb
    """
)
STATES = _words("active archived blocked cancelled closed draft open paid pending queued shipped")
LEVELS = _words("DEBUG INFO INFO INFO WARNING ERROR")
SERVICES = _words(
    """
    auth billing cache catalog gateway indexer mailer orders scheduler search storage
    """
)
ADJECTIVES = _words(
    """
    blue bright brass broad calm dark early fresh heavy quick quiet red sharp small
    """
)
TABLES = _words(
    """
    accounts bookings devices employees events flights invoices machines members orders patients
    payments products sensors sessions shipments suppliers tickets users vehicles
    """
)
FIELDS: dict[str, Callable[[random.Random], Value]] = {
    "name": lambda rng: rng.choice(NAMES),
    "email": lambda rng: f"{rng.choice(NAMES).lower()}{rng.randint(1, 99)}@example.org",
    "city": lambda rng: rng.choice(CITIES),
    "status": lambda rng: rng.choice(STATES),
    "created_at": lambda rng: f"{_date(rng)}T{_time(rng)}Z",
    "date": lambda rng: _date(rng),
    "amount": lambda rng: rng.randint(100, 999_999) / 100,
    "quantity": lambda rng: rng.randint(0, 500),
    "price": lambda rng: rng.randint(50, 50_000) / 100,
    "item": lambda rng: f"{rng.choice(ADJECTIVES)} {rng.choice(THINGS)}",
    "enabled": lambda rng: rng.random() < 0.5,
    "score": lambda rng: rng.randint(0, 1000) / 1000,
    "latitude": lambda rng: rng.randint(-90_000, 90_000) / 1000,
    "longitude": lambda rng: rng.randint(-180_000, 180_000) / 1000,
    "host": lambda rng: f"10.{rng.randint(0, 9)}.{rng.randint(0, 255)}.{rng.randint(1, 254)}",
    "token": lambda rng: f"{rng.getrandbits(32):08x}",
    "service": lambda rng: rng.choice(SERVICES),
    "parent_id": lambda rng: rng.choice((None, rng.randint(1, 9999))),
    "version": lambda rng: f"{rng.randint(0, 9)}.{rng.randint(0, 20)}.{rng.randint(0, 9)}",
    "priority": lambda rng: rng.randint(1, 5),
    "temperature": lambda rng: rng.randint(-200, 450) / 10,
    "owner": lambda rng: f"{rng.choice(NAMES)} {rng.choice(NAMES)}son",
    "duration_ms": lambda rng: rng.randint(1, 60_000),
    "tag": lambda rng: f"{rng.choice(ADJECTIVES)}-{rng.choice(SERVICES)}",
}


def _date(rng: random.Random) -> str:
    return f"{rng.randint(2015, 2026)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"


def _time(rng: random.Random) -> str:
    return f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}:{rng.randint(0, 59):02}"


def _record_sheet(rng: random.Random) -> str:
    """Records of one shape, in one format."""
    table = rng.choice(TABLES)
    fields = rng.sample(sorted(FIELDS), rng.randint(3, 8))
    identifier = rng.randint(1, 9_000)
    render, length = rng.choice(FORMATS), rng.randint(1_300, 3_200)
    records: list[Record] = []
    # A guess of the rendered length that holds for every format: values, names and punctuation.
    per_record = 12 * (len(fields) + 1)
    for _ in range(length // per_record + 1):
        records.append({"id": identifier} | {field: FIELDS[field](rng) for field in fields})
        identifier += rng.choice((1, 1, 1, 2, 7))
    sheet = render(rng, table, records)
    while len(sheet) < DOCUMENT_CHARACTERS[0]:
        sheet += "\n" + render(rng, table, records)
    return sheet[: sheet.rfind("\n", 0, length) + 1] if len(sheet) > length else sheet


def _as_json_lines(rng: random.Random, table: str, records: list[Record]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _as_json(rng: random.Random, table: str, records: list[Record]) -> str:
    wrapped = {"table": table, "page": rng.randint(1, 40), "total": len(records), table: records}
    return json.dumps(wrapped, indent=rng.choice((2, 4))) + "\n"


def _as_csv(rng: random.Random, table: str, records: list[Record]) -> str:
    separator = rng.choice((",", ",", ";", "\t", "|"))
    rows = [list(records[0]), *([_plain(v) for v in record.values()] for record in records)]
    return "".join(separator.join(row) + "\n" for row in rows)


def _as_inserts(rng: random.Random, table: str, records: list[Record]) -> str:
    types = {bool: "BOOLEAN", int: "INTEGER", float: "REAL", str: "TEXT", type(None): "INTEGER"}
    columns = ",\n".join(f"    {name} {types[type(v)]}" for name, v in records[0].items())
    names = ", ".join(records[0])
    rows = [", ".join(map(_sql, record.values())) for record in records]
    inserts = "".join(f"INSERT INTO {table} ({names})\nVALUES ({row});\n" for row in rows)
    return f"CREATE TABLE {table} (\n{columns}\n);\n\n{inserts}"


def _as_queries(rng: random.Random, table: str, records: list[Record]) -> str:
    queries = []
    for record in records:
        some = rng.sample(list(record), 2)
        where = f"{some[0]} {rng.choice(('=', '<>', '>='))} {_sql(record[some[0]])}"
        queries.append(
            rng.choice(
                (
                    f"SELECT {some[0]}, {some[1]}\nFROM {table}\nWHERE {where}\n"
                    f"ORDER BY {some[1]} DESC\nLIMIT {rng.randint(1, 100)};\n",
                    f"UPDATE {table} SET {some[1]} = {_sql(record[some[1]])} WHERE {where};\n",
                    f"DELETE FROM {table} WHERE {where} AND id > {record['id']};\n",
                    f"SELECT {some[1]}, COUNT(*) AS n\nFROM {table}\nGROUP BY {some[1]}\n"
                    f"HAVING COUNT(*) > {rng.randint(1, 9)};\n",
                )
            )
        )
    return "\n".join(queries)


def _as_log(rng: random.Random, table: str, records: list[Record]) -> str:
    day, seconds = _date(rng), rng.randint(0, 40_000)
    service, lines = rng.choice(SERVICES), []
    for record in records:
        seconds += rng.randint(0, 90)
        clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        pairs = " ".join(f"{name}={_plain(value)}" for name, value in record.items())
        does = rng.choice(("created", "updated", "deleted", "loaded", "rejected", "synced"))
        lines.append(f"{day} {clock} {rng.choice(LEVELS)} {service}.{table}: {does} {pairs}\n")
    return "".join(lines)


def _as_ini(rng: random.Random, table: str, records: list[Record]) -> str:
    sections = []
    for record in records:
        pairs = "".join(f"{name} = {_plain(value)}\n" for name, value in record.items())
        sections.append(f"[{table}.{record['id']}]\n{pairs}")
    return "\n".join(sections)


def _as_yaml(rng: random.Random, table: str, records: list[Record]) -> str:
    items = []
    for record in records:
        pairs = [f"{name}: {json.dumps(value)}" for name, value in record.items()]
        items.append("  - " + "\n    ".join(pairs) + "\n")
    return f"{table}:\n{''.join(items)}"


def _as_xml(rng: random.Random, table: str, records: list[Record]) -> str:
    items = []
    for record in records:
        pairs = "".join(f"    <{name}>{_plain(v)}</{name}>\n" for name, v in record.items())
        items.append(f"  <row>\n{pairs}  </row>\n")
    return f"<{table}>\n{''.join(items)}</{table}>\n"


def _plain(value: Value) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _sql(value: Value) -> str:
    if isinstance(value, str):
        return f"'{value}'"
    return "NULL" if value is None else str(value).upper()


FORMATS = (
    _as_json_lines,
    _as_json,
    _as_csv,
    _as_csv,
    _as_inserts,
    _as_queries,
    _as_log,
    _as_log,
    _as_ini,
    _as_yaml,
    _as_xml,
)
