"""Prompt sets: reads the file formats of public sets into one type.

A set's format is named, or recognised by its columns or its shape (FORMATS below). A message gives
the file, the line and the columns, and quotes no prompt.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from ebbline.tasks.data.csv_rows import csv_records
from ebbline.tasks.data.data_file import FileRow, ending_of, stem_of, text_of
from ebbline.tasks.data.formats.choices import QUESTION, with_choices, written_list
from ebbline.tasks.data.formats.folders import read_set
from ebbline.tasks.data.reader import data_files
from ebbline.tasks.data.splits.held_out import chosen
from ebbline.tasks.errors import DataError
from ebbline.tasks.specs import PromptFormat as Format
from ebbline.tasks.specs import Split

Label = Literal["harmful", "harmless"]
PROMPT_COLUMNS = ("prompt", "goal", "Goal", "Behavior", "forbidden_prompt", "question")
LABELS: Mapping[str, Label] = {
    "harmful": "harmful",
    "unsafe": "harmful",
    "harmless": "harmless",
    "safe": "harmless",
    "benign": "harmless",
}


@dataclass(frozen=True)
class Prompt:
    """One prompt. `label` is "harmful", "harmless", or "" if the set does not say. `answer` is the
    reference answer of a task. `where` is the file and line, for messages.
    """

    id: str
    text: str
    category: str = ""
    source: str = ""
    label: str = ""
    answer: str = ""
    where: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True)
class PromptSet:
    """A set in the order of its file. `rows` counts the file's rows before label and limit;
    `renamed` counts ids that were changed because an earlier row had them. `repeats` are the rows
    that repeat the text of an earlier one. They are not among the `prompts`.
    """

    format: str
    prompts: tuple[Prompt, ...]
    rows: int
    renamed: int = 0
    repeats: tuple[Prompt, ...] = ()


@dataclass(frozen=True)
class Columns:
    """The columns of a format. `needs` identify the format; the others say which column holds what,
    with "" for none.

    The prompt is the first non-empty column of `text`. `context` is put before it. In every format,
    `label` and `answer` are the columns of that name. A `strict` format accepts only the labels of
    LABELS.
    """

    needs: tuple[str, ...]
    text: tuple[str, ...]
    id: str = "id"
    category: str = "category"
    source: str = "source"
    context: str = ""
    strict: bool = False


# hex-phi (a folder) and refusalbench (an object of lists) are recognised by their shape; their rows
# are then read as plain.
SHAPES = ("hex-phi", "refusalbench")
PLAIN = Columns((), PROMPT_COLUMNS)
FORMATS: Mapping[str, Columns] = {
    "plain": PLAIN,
    "advbench": Columns(("goal", "target"), ("goal",)),
    "harmbench": Columns(
        ("Behavior", "SemanticCategory", "ContextString", "BehaviorID"),
        ("Behavior",),
        id="BehaviorID",
        category="SemanticCategory",
        context="ContextString",
    ),
    "strongreject": Columns(("category", "source", "forbidden_prompt"), ("forbidden_prompt",)),
    "xstest": Columns(("id", "prompt", "type", "label"), ("prompt",), category="type", strict=True),
    "sorry-bench": Columns(
        ("question_id", "category", "turns", "prompt_style"),
        ("turns",),
        id="question_id",
        source="prompt_style",
    ),
    "hex-phi": PLAIN,
    "refusalbench": PLAIN,
    "jailbreakbench": Columns(
        ("Index", "Goal", "Target", "Behavior", "Category", "Source"),
        ("Goal",),
        id="Index",
        category="Category",
        source="Source",
    ),
}


@dataclass(frozen=True)
class _SourceRow:
    where: str  # file and line, for messages
    line: int  # or the number of an item
    id: str  # for a row whose id column is empty
    values: Mapping[str, Any]

    @classmethod
    def of(cls, row: FileRow) -> "_SourceRow":
        return cls(row.where, row.number, str(row.number), row.values)


def named_format(name: str) -> Format:
    """The format of that name. Raises DataError that lists all formats."""
    formats: tuple[Format, ...] = get_args(Format)
    for each in formats:
        if each == name:
            return each
    raise DataError(f"no format {name!r}; ebbline reads {', '.join(formats)}")


def read_prompts(
    path: Path,
    format: Format = "auto",
    label: Label | None = None,
    limit: int | None = None,
    needs_answer: bool = False,
    split: Split | None = None,
) -> PromptSet:
    """A prompt set from a data file (see `ebbline.tasks.data.reader`), or from a folder (HEx-PHI,
    or one such file in it).

    `split` keeps one side of the set, and the split does not depend on what else is kept. `label`
    keeps the prompts with that label; a set without labels is kept whole. `limit` then
    keeps that many prompts, evenly spaced, because many files are sorted by category. A duplicate
    id gets its line appended. A prompt given several times is asked once.

    Raises DataError for an empty set, an empty side of the split, the wrong columns, a row without
    a prompt, a label that no prompt has, and for one prompt with two labels. With `needs_answer`,
    also for a row without an answer, and for one prompt with two answers.
    """
    if limit is not None and limit < 1:
        raise DataError(
            f"limit={limit} leaves no prompt of {path}; set it to at least 1, or leave it out"
        )
    shape, rows = _rows(path, format)
    if not rows:
        raise DataError(f"{path} holds no prompt: an empty set cannot be measured")
    name = _named(shape or format, rows, path)
    read = [_prompt(row, FORMATS[name], label is not None, needs_answer) for row in rows]
    named = _unique(read, [row.line for row in rows])
    distinct, repeats = _distinct(named, needs_answer)
    renamed = sum(prompt.id != read[place].id for place, prompt in distinct)
    asked = [prompt for _, prompt in distinct]
    prompts = _labelled(asked if split is None else _side(asked, split, path), label, path)
    if limit is not None and limit < len(prompts):
        prompts = [prompts[i * len(prompts) // limit] for i in range(limit)]
    return PromptSet(name, tuple(prompts), len(rows), renamed, tuple(repeats))


def _named(format: str, rows: Sequence[_SourceRow], path: Path) -> str:
    """The format that the columns identify. Ambiguous or unknown columns are plain, if one of them
    is for the prompt.
    """
    found = {column: None for row in rows for column in row.values}
    if format == "auto":
        fitting = [
            name
            for name, columns in FORMATS.items()
            if columns.needs and found.keys() >= set(columns.needs)
        ]
        format = fitting[0] if len(fitting) == 1 else "plain"
        if format == "plain" and not found.keys() & set(PROMPT_COLUMNS):
            accepted = "; ".join(
                f"{name}: {', '.join(columns.needs)}"
                for name, columns in FORMATS.items()
                if columns.needs
            )
            raise DataError(
                f"{path} has the columns {_shown(found)}, which is no prompt set. Accepted "
                f"are a column {_either(PROMPT_COLUMNS)},"
                f" or {accepted}, or the shapes of {' and '.join(SHAPES)} (docs/prompts.md)"
            )
        return format
    columns = FORMATS[format]
    if columns.needs and (absent := [name for name in columns.needs if name not in found]):
        raise DataError(
            f"{path} is not {format}: it lacks {absent}. Found {_shown(found)}, expected "
            f"{list(columns.needs)}"
        )
    if not columns.needs and not found.keys() & set(PROMPT_COLUMNS):
        raise DataError(
            f"{path} is not {format}: found {_shown(found)}, expected a column "
            f"{_either(PROMPT_COLUMNS)}"
        )
    return format


def _shown(columns: Mapping[str, None]) -> str:
    # Without a header, a CSV's columns are content of its first row, which no message may quote:
    # only column names of formats are shown.
    format_columns = {
        name
        for format in FORMATS.values()
        for name in (*format.needs, *format.text, format.id, format.category, format.source)
    }
    names = [name for name in columns if name in format_columns]
    others = len(columns) - len(names)
    return f"{names}" + (
        f" and {others} that no format has (is the header missing?)" if others else ""
    )


def _either(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _prompt(row: _SourceRow, columns: Columns, labels_matter: bool, needs_answer: bool) -> Prompt:
    text = next((text for name in columns.text if (text := _text(row, name)).strip()), "")
    if not text:
        raise DataError(
            f"{row.where} has no prompt; it belongs in "
            f"{_either(columns.text) if len(columns.text) > 1 else columns.text[0]}"
        )
    if (context := _text(row, columns.context)).strip():
        text = f"{context}\n\n---\n\n{text}"  # as HarmBench's code joins the two
    answer = _text(row, "answer")
    if needs_answer and not answer.strip():
        raise DataError(f"{row.where} has no `answer`, which a task suite compares with")
    given = _label(row)
    if given and given not in LABELS and (labels_matter or columns.strict):
        raise DataError(f"{row.where} has a label that is none of {list(LABELS)}")
    return Prompt(
        id=_text(row, columns.id).strip() or row.id,
        text=text,
        category=_text(row, columns.category).strip(),
        source=_text(row, columns.source).strip(),
        label=LABELS.get(given, ""),
        answer=answer,
        where=row.where,
    )


def _text(row: _SourceRow, column: str) -> str:
    """The text in a column, "" if it has none. SORRY-Bench's `turns` give the first turn; any other
    list or object raises DataError.
    """
    value = row.values.get(column) if column else None
    return text_of(row.where, column, _first_turn(row, value) if column == "turns" else value)


def _label(row: _SourceRow) -> str:
    # A list or another value is a label that no format has, and not an error here.
    value = row.values.get("label")
    return "" if value is None else str(value).strip().lower()


def _first_turn(row: _SourceRow, value: Any) -> Any:
    if isinstance(value, str) and re.match(r"""\s*\[\s*(["'\]])""", value):
        value = written_list(value, "turns", row.where)
    return (value[0] if value else None) if isinstance(value, list) else value


def _unique(prompts: Sequence[Prompt], lines: Sequence[int]) -> list[Prompt]:
    """The prompts with unique ids."""
    seen: set[str] = set()
    result = []
    for prompt, line in zip(prompts, lines, strict=True):
        name = prompt.id
        while name in seen:
            name = f"{name}@{line}"
        seen.add(name)
        result.append(replace(prompt, id=name))
    return result


def _distinct(
    prompts: Sequence[Prompt], needs_answer: bool
) -> tuple[list[tuple[int, Prompt]], list[Prompt]]:
    """(place, prompt) of the first row of each text, and the rows that repeat one.

    Decoding is greedy, so equal prompts have equal completions: a repeat is no further observation,
    and an interval that counts it is too narrow. Outer white space, which templates strip, does not
    make two prompts.
    """
    first: dict[str, tuple[int, Prompt]] = {}
    repeats = []
    for place, prompt in enumerate(prompts):
        text = prompt.text.strip()
        kept, earlier = first.setdefault(text, (place, prompt))
        if kept == place:
            continue
        if needs_answer and prompt.answer.strip() != earlier.answer.strip():
            raise DataError(
                f"{prompt.where} has the prompt of {earlier.where} with another `answer`. One "
                "completion cannot be compared with both; keep one of the two rows"
            )
        if prompt.label and earlier.label and prompt.label != earlier.label:
            raise DataError(
                f"{prompt.where} labels a prompt {prompt.label}, and {earlier.where} labels it "
                f"{earlier.label}; correct or remove one of the two rows"
            )
        repeats.append(prompt)
        if prompt.label and not earlier.label:
            first[text] = (kept, replace(earlier, label=prompt.label))
    return list(first.values()), repeats


def _side(prompts: list[Prompt], split: Split, path: Path) -> list[Prompt]:
    """The prompts on one side of the split. Raises DataError for a split with an empty side."""
    found = chosen([each.text for each in prompts], [_stratum(each) for each in prompts], split)
    if not 0 < len(found) < len(prompts):
        empty = {"search": "confirm", "confirm": "search"}[split.side] if found else split.side
        raise DataError(
            f"hold_out {split.hold_out:g} of the {len(prompts)} prompts of {path} leaves none to "
            f"{empty} with; give another share"
        )
    return [prompts[place] for place in found]


def _stratum(prompt: Prompt) -> str:
    return f"{prompt.label}\0{prompt.category}"


def _labelled(prompts: list[Prompt], label: Label | None, path: Path) -> list[Prompt]:
    counts = Counter(prompt.label for prompt in prompts)
    if label is None or counts.keys() == {""}:
        return prompts
    if not counts[label]:
        there = ", ".join(f"{counts[name]} {name or 'without a label'}" for name in sorted(counts))
        raise DataError(f"{path} holds no prompt labelled {label}: there are {there}")
    return [prompt for prompt in prompts if prompt.label == label]


def _rows(path: Path, format: Format) -> tuple[str, list[_SourceRow]]:
    """The rows, and the format if the shape alone identifies it."""
    if path.is_dir():
        files = sorted(data_files(path), key=_natural)
        if format == "hex-phi" or (
            format == "auto" and len(files) > 1 and all(map(_has_one_column, files))
        ):
            return "hex-phi", [row for file in files for row in _hex_phi(file)]
    elif not path.is_file():
        raise DataError(f"there is no prompt file or folder at {path}")
    elif format == "hex-phi":
        return "hex-phi", list(_hex_phi(path))
    rows = list(read_set(path, "test"))
    if len(rows) == 1 and rows[0].lone and format in ("auto", "refusalbench"):
        if format == "refusalbench" or not _is_prompt(rows[0]):
            return "refusalbench", list(_refusalbench(rows[0].values, path))
    elif format == "refusalbench":
        raise DataError(f"{path} must be an object of {{category: [prompt, ...]}}; its JSON is not")
    if not any(name in row.values for row in rows for name in PROMPT_COLUMNS if name != QUESTION):
        rows = with_choices(rows)
    return "", [_SourceRow.of(row) for row in rows]


def _is_prompt(row: FileRow) -> bool:
    # The values of RefusalBench are lists.
    return any(isinstance(row.values.get(name), str) for name in _columns())


def _columns() -> set[str]:
    return {*PROMPT_COLUMNS, *(name for columns in FORMATS.values() for name in columns.needs)}


def _natural(path: Path) -> list[tuple[int, str]]:
    """A sort key in natural order: category_2 before category_10."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part)
        for part in re.split(r"(\d+)", path.name)
    ]


def _has_one_column(path: Path) -> bool:
    return ending_of(path) == ".csv" and all(len(fields) == 1 for _, fields in csv_records(path))


def _hex_phi(path: Path) -> Iterator[_SourceRow]:
    """One file of HEx-PHI: a prompt in each record, and the category as the file's name. It has no
    header, but a first record that names a prompt column is skipped.
    """
    if ending_of(path) != ".csv":
        raise DataError(f"{path} is not .csv; hex-phi is a folder of CSV files of one column each")
    category = stem_of(path)
    for line, fields in csv_records(path):
        if len(fields) > 1:
            raise DataError(
                f"{path}:{line} has {len(fields)} fields; hex-phi has one. Put text with "
                "commas in quotes"
            )
        if line > 1 or fields[0].strip() not in PROMPT_COLUMNS:
            yield _SourceRow(
                f"{path}:{line}",
                line,
                f"{category}:{line}",
                {"prompt": fields[0], "category": category},
            )


def _refusalbench(value: Mapping[str, Any], path: Path) -> Iterator[_SourceRow]:
    """RefusalBench: {category: [prompt, ...]}. A table written column by column looks alike and
    raises DataError.
    """
    if _columns() & value.keys():
        raise DataError(
            f"{path} is an object of columns; write it as a list of objects, one for each prompt"
        )
    line = 0
    for place, (category, prompts) in enumerate(value.items(), start=1):
        if not isinstance(prompts, list):
            raise DataError(
                f"{path} must be a list of objects, or an object of {{category: [prompt, ...]}}"
            )
        for number, prompt in enumerate(prompts, start=1):
            line += 1
            where = f"{path}: prompt {number} of category {place}"
            if not isinstance(prompt, str):
                raise DataError(f"{where} is not text")
            yield _SourceRow(
                where, line, f"{category}:{number}", {"prompt": prompt, "category": category}
            )
