"""Items with choices, as prompts that ask for a letter.

A row has `question`, its choices, and `answer` (or `answerKey`). The choices are a list (`choices`,
`options`), an object of letters and texts, ARC's {text, label}, or columns A, B, C, ...

The answer is a letter or label, a choice's text, or its place, counted from 0 or from 1. Which of
these a file means is decided over all its rows: one must fit every row, or all that fit must mean
the same.
"""

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from string import ascii_uppercase
from typing import Any

from ebbline.tasks.data.data_file import FileRow, InvalidValue, checked, text_of
from ebbline.tasks.errors import DataError

QUESTION = "question"
CHOICES = ("choices", "options")
ANSWERS = ("answer", "answerKey")
REQUEST = "Answer with the letter of the right choice."


@dataclass(frozen=True)
class _Item:
    row: FileRow
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    answer: str  # as written; empty in a set without answers
    has_labels: bool  # the row gives them, so an answer that is one of them is meant as one

    def letter(self, meaning: str) -> str | None:
        """The letter of the answer if it is written as `meaning`; None if it cannot be."""
        written = {
            "label": [label.upper() for label in self.labels],
            "text": [text.strip() for text in self.texts],
            "place from 0": [str(place) for place in range(len(self.texts))],
            "place from 1": [str(place + 1) for place in range(len(self.texts))],
        }[meaning]
        answer = self.answer.upper() if meaning == "label" else self.answer
        return ascii_uppercase[written.index(answer)] if written.count(answer) == 1 else None


def with_choices(rows: Sequence[FileRow]) -> list[FileRow]:
    """The rows, where those with choices ask for a letter in `question` and have it as `answer`.
    Rows without choices stay as they are.
    """
    items = [_item(row) if has_choices(row.values) else None for row in rows]
    answered = [item for item in items if item is not None and item.answer]
    meaning = _meaning(answered)
    return [
        row if item is None else _asking(item, meaning)
        for row, item in zip(rows, items, strict=True)
    ]


def has_choices(values: Mapping[str, Any]) -> bool:
    return bool(values.get(QUESTION)) and (
        any(values.get(name) not in (None, "", []) for name in CHOICES)
        or all(values.get(letter) not in (None, "") for letter in "AB")
    )


def _asking(item: _Item, meaning: str) -> FileRow:
    listed = "\n".join(
        f"{letter}. {text}" for letter, text in zip(ascii_uppercase, item.texts, strict=False)
    )
    question = text_of(item.row.where, QUESTION, item.row.values[QUESTION])
    letter = (item.letter(meaning) or "") if item.answer else ""
    changed = {QUESTION: f"{question}\n\n{listed}\n\n{REQUEST}", "answer": letter}
    return replace(item.row, values={**item.row.values, **changed})


def _meaning(items: Sequence[_Item]) -> str:
    """How the answers of a set are written. Raises DataError for answers that are no choice, and
    for a set that may be read in two ways.
    """
    letters = {
        meaning: [item.letter(meaning) for item in items]
        for meaning in ("label", "text", "place from 0", "place from 1")
    }
    fitting = [meaning for meaning, found in letters.items() if None not in found]
    if "label" in fitting and all(item.has_labels for item in items):
        return "label"
    if not fitting:
        best = max(letters, key=lambda meaning: sum(each is not None for each in letters[meaning]))
        wrong = items[letters[best].index(None)]
        raise DataError(
            f"{wrong.row.where}: the answer is none of the {len(wrong.texts)} choices, neither a "
            "letter, nor a choice's text, nor its place; write the letter"
        )
    for index, item in enumerate(items):
        if len({letters[meaning][index] for meaning in fitting}) > 1:
            raise DataError(
                f"{item.row.where}: the answer may be a choice's {' or its '.join(fitting)}, and "
                "no row of the set decides it; write the letter"
            )
    return fitting[0]


def _item(row: FileRow) -> _Item:
    values = row.values
    name = next((each for each in CHOICES if values.get(each) not in (None, "", [])), "")
    found = (
        values[name]
        if name
        else {
            letter: values[letter]
            for letter in ascii_uppercase[:10]
            if values.get(letter) not in (None, "")
        }
    )
    if isinstance(found, str):
        found = written_list(found, name, row.where)
    if isinstance(found, dict) and set(found) == {"text", "label"}:  # ARC
        labels, texts = found["label"], found["text"]
    elif isinstance(found, dict):
        labels, texts = list(found), list(found.values())
    else:
        labels, texts = list(ascii_uppercase[: len(found)]), found
    if not isinstance(texts, list) or len(texts) != len(labels) or not 2 <= len(texts) <= 26:
        raise DataError(f"{row.where}: the choices must be a list of 2 to 26 texts")
    answer = next((values[each] for each in ANSWERS if values.get(each) not in (None, "")), None)
    return _Item(
        row,
        tuple(text_of(row.where, name or "choices", text) for text in texts),
        tuple(text_of(row.where, name or "choices", label) for label in labels),
        text_of(row.where, "answer", answer).strip(),
        isinstance(found, dict) and bool(name),
    )


def written_list(text: str, column: str, where: str) -> list[Any]:
    """A list that was written into a CSV as JSON, or by pandas as a Python literal. Python would
    join the texts of a NumPy array, ['a' 'b'], into one.
    """
    text = text.strip()
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list) and (parse is json.loads or str(found) == text):
            try:
                return list(checked(found))
            except InvalidValue as error:
                raise DataError(f"{where} {error}") from None
    raise DataError(f"{where}: `{column}` is no list in JSON or Python; write one turn as text")
