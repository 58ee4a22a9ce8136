"""One prompt file in two sides: what the search asks, and what is held out for a confirmation."""

import random
import unicodedata
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbline.tasks.data.prompts import read_prompts
from ebbline.tasks.data.splits.held_out import chosen, folded
from ebbline.tasks.errors import DataError
from ebbline.tasks.measuring.generate_kind import prompts_of
from ebbline.tasks.specs import GenerateSpec, Split
from ebbline.tasks.stage import Source
from tests.tiny import write_lines

ROWS = st.lists(st.tuples(st.text(max_size=6), st.sampled_from("abc")), max_size=40)
SHARES = st.floats(0.01, 0.99)
Form = Literal["NFC", "NFD"]


def sides(rows: list[tuple[str, str]], share: float) -> tuple[list[int], list[int]]:
    texts, categories = [text for text, _ in rows], [category for _, category in rows]
    search, confirm = (
        chosen(texts, categories, Split(hold_out=share, side=side))
        for side in ("search", "confirm")
    )
    return search, confirm


@given(ROWS, SHARES, st.randoms(use_true_random=False))
def test_the_sides_are_disjoint_whole_and_the_same_for_a_shuffled_file(
    rows: list[tuple[str, str]], share: float, rng: random.Random
) -> None:
    search, confirm = sides(rows, share)
    assert sorted([*search, *confirm]) == list(range(len(rows)))
    held = {folded(rows[place][0]) for place in confirm}
    assert not held & {folded(rows[place][0]) for place in search}, "equal texts are on one side"
    order = list(range(len(rows)))
    rng.shuffle(order)
    _, again = sides([rows[place] for place in order], share)
    assert sorted(order[place] for place in again) == confirm


@given(st.text(max_size=20), st.sampled_from(("NFC", "NFD")))
def test_the_unicode_form_of_a_text_does_not_decide_its_side(text: str, form: Form) -> None:
    assert folded(unicodedata.normalize(form, text)) == folded(text) == folded(folded(text))


@pytest.mark.parametrize(
    "saved",
    [
        "Don\u2019t say \u201ccafe\u0301\u201d \u2013 why\u2026",  # typographic signs, decomposed
        'don\'t  say\u00a0"caf\u00e9" - why...',
        'do\u200bn\'t say "CAF\u00c9" - why...\ufeff',
    ],
)
def test_a_prompt_that_a_program_has_saved_again_is_the_same(saved: str) -> None:
    """A spreadsheet's copy of a search prompt would confirm what that prompt chose."""
    assert folded(saved) == folded('Don\'t say "caf\u00e9" - why...')
    assert folded("3 - 4") != folded("3 + 4") and folded("5\u00b2") != folded("52")


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), SHARES)
def test_each_category_gives_its_share_to_within_one_prompt(
    counts: list[int], share: float
) -> None:
    rows = [
        (f"{category} {number}", str(category))
        for category, n in enumerate(counts)
        for number in range(n)
    ]
    _, confirm = sides(rows, share)
    for category, n in enumerate(counts):
        held = sum(rows[place][1] == str(category) for place in confirm)
        assert abs(held - share * n) < 1 + 1e-9
    assert abs(len(confirm) - share * len(rows)) < 1 + 1e-9


def prompts(folder: Path, count: int = 10) -> Path:
    rows = [
        {"prompt": f"may I {n}", "category": "ab"[n % 2], "label": ("safe", "unsafe")[n % 2]}
        for n in range(count)
    ]
    return write_lines(folder / "asked.jsonl", rows)


def test_the_split_does_not_depend_on_the_label_or_the_limit(tmp_path: Path) -> None:
    path, split = prompts(tmp_path), Split(hold_out=0.3, side="confirm")
    held = {each.id for each in read_prompts(path, split=split).prompts}
    by_label = [
        {each.id for each in read_prompts(path, label=label, split=split).prompts}
        for label in ("harmful", "harmless")
    ]
    assert len(held) == 3 and by_label[0] | by_label[1] == held
    rest = split.model_copy(update={"side": "search"})
    limited = {each.id for each in read_prompts(path, limit=4, split=rest).prompts}
    assert len(limited) == 4 and not limited & held


@pytest.mark.parametrize(("share", "side"), [(0.01, "search"), (0.99, "search"), (0.01, "confirm")])
def test_an_empty_side_is_an_error(tmp_path: Path, share: float, side: str) -> None:
    path = prompts(tmp_path, 1 if share > 0.5 else 10)
    with pytest.raises(DataError, match=r"hold_out 0.\d+ of the \d+ prompts of .* leaves none to"):
        read_prompts(path, split=Split.model_validate({"hold_out": share, "side": side}))


def test_a_prediction_counts_the_prompts_of_one_side(tmp_path: Path) -> None:
    source = Source("content", str(prompts(tmp_path)))
    for side, count in (("search", 7), ("confirm", 3)):
        spec = GenerateSpec(split=Split.model_validate({"hold_out": 0.3, "side": side}))
        assert prompts_of(spec, source)[0] == count


def test_a_generation_without_a_split_has_no_such_field_in_its_key() -> None:
    assert "split" not in GenerateSpec().model_dump(mode="json")
