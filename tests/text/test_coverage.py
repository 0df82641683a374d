"""Windows chosen for coverage: the best next one each time, by what it adds."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from conftest import make_recipe, make_tokenizer
from symphony_moe.recipe.load import load_recipe, resolve_recipe
from symphony_moe.sources.opening import open_sources
from symphony_moe.text import coverage
from symphony_moe.text import windows as windows_module
from symphony_moe.text.coverage import covering_windows
from symphony_moe.text.texts import Texts
from symphony_moe.text.windows import Encoder, WindowDraw, draw_packed

LENGTH = 6


def value(windows: Sequence[Sequence[int]]) -> float:
    """What is to be large, by its definition."""
    tokens = Counter(token for window in windows for token in window)
    pairs = Counter(pair for window in windows for pair in itertools.pairwise(window))
    return sum(math.log1p(count) for seen in (tokens, pairs) for count in seen.values())


some_windows = st.lists(
    st.lists(st.integers(0, 9), min_size=LENGTH, max_size=LENGTH), min_size=1, max_size=12
)


@settings(max_examples=100, deadline=None)
@given(windows=some_windows, count=st.integers(1, 14), begun=st.integers(0, 12))
def test_each_window_is_the_best_next_one(windows: list[list[int]], count: int, begun: int) -> None:
    """Beside those that are chosen already, within the rounding of the logarithms, and none is
    chosen twice."""
    first = list(range(0, len(windows), 2))[:begun]
    chosen = first + covering_windows(torch.tensor(windows), count, first)
    assert len(set(chosen)) == len(chosen) == min(count + len(first), len(windows))
    so_far = [windows[row] for row in first]
    for row in chosen[len(first) :]:
        left = set(range(len(windows))) - set(chosen[: len(so_far)])
        best = max(value([*so_far, windows[other]]) for other in left)
        so_far.append(windows[row])
        assert value(so_far) == pytest.approx(best, abs=1e-4)


@settings(max_examples=50, deadline=None)
@given(windows=some_windows)
def test_the_choice_is_near_the_best_there_is(windows: list[list[int]]) -> None:
    """1 - 1/e of it at least."""
    chosen = covering_windows(torch.tensor(windows), 3)
    best = max(value(some) for some in itertools.combinations(windows, min(3, len(windows))))
    assert value([windows[row] for row in chosen]) >= (1 - 1 / math.e) * best - 1e-4


def test_rare_windows_and_other_orders_come_before_more_of_the_same() -> None:
    same = [1, 2, 3, 4, 5, 6]
    windows = torch.tensor([same, same, same, [6, 5, 4, 3, 2, 1], [7, 8, 9, 10, 11, 12], same])
    assert set(covering_windows(windows, 3)) == {0, 3, 4}


def test_pairs_of_large_numbers_are_counted_apart() -> None:
    """A vocabulary of today's size: the same tokens in other orders are worth their pairs."""
    tokens = torch.arange(250_000, 250_000 + 64)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(64, generator=generator) for _ in range(40)]
    windows = torch.stack([tokens[order] for order in orders]).int()
    pairs = {pair for window in windows.tolist() for pair in itertools.pairwise(window)}
    places = {
        int(place)
        for window in windows.numpy()
        for place in coverage._counted(window, 250_064)[0]
        if place >= 250_064
    }
    # Of 4 million places few are shared by so few pairs.
    assert 0.99 * len(pairs) < len(places) <= len(pairs)
    again = torch.cat([windows[:1].repeat(20, 1), windows])
    assert set(covering_windows(again, 40)) == {0, *range(21, 60)}


def test_windows_that_are_all_alike_take_no_time() -> None:
    """Each step would count all of them again: 2,000 x 500 times."""
    windows = torch.randint(8, (2000, 32), generator=torch.Generator().manual_seed(0))
    counted = 0
    original = coverage._counted

    def counting(*given: Any) -> Any:
        nonlocal counted
        counted += 1
        return original(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coverage, "_counted", counting)
        patch.setattr(coverage, "_LOOKS", 16)
        assert len(set(covering_windows(windows, 500))) == 500
    assert counted <= 2000 + 500 * 17


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


LETTERS = "abcdefghijklmnopqrstuvwxyz"
DOCUMENTS = ["aaaa bbbb " * 6 + str(number) for number in range(60)] + [
    LETTERS[number % 20 : number % 20 + 6] * 8 for number in range(12)
]


def drawn(
    tokenizer: PreTrainedTokenizerBase, *, covers: bool, tokens: int = 200, seed: int = 0
) -> torch.Tensor:
    drawing = WindowDraw(tokens, 20, seed, covers)
    return draw_packed("w", DOCUMENTS, Encoder.of(tokenizer), drawing).windows


def test_a_draw_for_coverage_has_more_different_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    at_random, covering = (drawn(tokenizer, covers=covers) for covers in (False, True))
    assert at_random.shape == covering.shape == (10, 20)
    assert value(covering.tolist()) > 1.2 * value(at_random.tolist())
    assert len(covering.unique()) > len(at_random.unique())


def test_half_of_a_draw_for_coverage_is_the_random_one(tokenizer: PreTrainedTokenizerBase) -> None:
    """Where both look at the same text."""
    at_random, covering = (
        [tuple(row) for row in drawn(tokenizer, covers=covers, tokens=1200).tolist()]
        for covers in (False, True)
    )
    assert len(covering) == len(at_random) == 60
    assert set(at_random[:30]) <= set(covering) and not set(at_random) <= set(covering)


def test_the_order_of_a_draw_says_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    """The same text each time. Random windows and chosen ones are mixed: a part of the draw is as
    good as another."""
    covering = drawn(tokenizer, covers=True, tokens=1200)
    assert torch.equal(covering, drawn(tokenizer, covers=True, tokens=1200))
    at_random = {tuple(row) for row in drawn(tokenizer, covers=False, tokens=1200)[:30].tolist()}
    places = [row for row, window in enumerate(covering.tolist()) if tuple(window) in at_random]
    assert 5 < sum(place < 30 for place in places) < len(places) - 5
    assert not torch.equal(covering, drawn(tokenizer, covers=True, seed=1, tokens=1200))


@pytest.mark.parametrize(("tokens", "random"), [(20, 1), (60, 2), (80, 2)])
def test_few_windows_are_random_first(
    tokens: int, random: int, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One window alone is not the rarest of all."""
    asked: list[int] = []

    def covering(windows: torch.Tensor, count: int, chosen: Sequence[int]) -> list[int]:
        asked.append(len(chosen))
        return covering_windows(windows, count, chosen)

    monkeypatch.setattr(windows_module, "covering_windows", covering)
    assert len(drawn(tokenizer, covers=True, tokens=tokens)) == tokens // 20
    assert asked == ([] if tokens == 20 else [random])


def test_positions_are_those_of_the_chosen_windows(tokenizer: PreTrainedTokenizerBase) -> None:
    """A document begins where its first letter, behind a BOS, is."""
    packed = draw_packed("w", DOCUMENTS, Encoder.of(tokenizer), WindowDraw(200, 20, 0, True))
    begins = packed.windows == tokenizer.bos_token_id
    begins[:, 0] = True
    assert torch.equal(packed.positions == 0, begins)


def test_text_that_is_all_used_is_drawn_as_ever(tokenizer: PreTrainedTokenizerBase) -> None:
    whole = [drawn(tokenizer, covers=covers, tokens=10**6) for covers in (False, True)]
    assert torch.equal(*whole)


def test_more_text_is_looked_at(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 times as many tokens as are asked for, where a random draw looks at four times as many;
    fewer where that would be very many."""

    def looked_at(*, covers: bool) -> int:
        drawing = WindowDraw(60, 20, seed=0, covers=covers)
        return sum(map(len, windows_module.pooled(DOCUMENTS, Encoder.of(tokenizer), drawing)))

    longest = max(len(Encoder.of(tokenizer).encode(document)) for document in DOCUMENTS)
    for covers, times in ((False, 4), (True, 16)):
        assert times * 60 <= looked_at(covers=covers) < times * 60 + longest
    monkeypatch.setattr(windows_module, "_SPARE", 340)
    assert 400 <= looked_at(covers=True) < 400 + longest
    monkeypatch.setattr(windows_module, "_SPARE", 0)
    assert 240 <= looked_at(covers=True) < 240 + longest


def test_a_recipe_chooses_its_text(tmp_path: Path) -> None:
    """The setting reaches the text of a fit, and not what validates it. `harmonized` sets it."""
    calibration = {"tokens": 384, "sequence_length": 16}
    path = make_recipe(tmp_path, method="harmonized", calibration=calibration)
    at_random, covering = (
        Texts(recipe, open_sources(recipe))
        for choice in ("random", "coverage")
        for recipe in [load_recipe(path, [f"calibration.windows={choice}"])]
    )
    others = at_random.calibration_windows()
    for name, packed in covering.calibration_windows().items():
        assert value(packed.windows.tolist()) > value(others[name].windows.tolist())
    others = at_random.validation_windows()
    for name, packed in covering.validation_windows().items():
        assert torch.equal(packed.windows, others[name].windows)


@pytest.mark.parametrize(
    ("method", "windows"), [("harmonized", "coverage"), ("symphony", "random"), ("btx", "random")]
)
def test_what_methods_set(method: str, windows: str) -> None:
    sources = {name: {"model": "x", "data": "y"} for name in "ab"}
    recipe = resolve_recipe({"sources": sources, "method": method}, Path(), "recipe")
    assert recipe.calibration.windows == windows
