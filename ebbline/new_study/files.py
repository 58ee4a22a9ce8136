"""What is in training data, prompt sets and task items: recognised by the readers of the stages.

No text of a row is kept. Raises DataError, as a stage would, for rows that it could not read.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ebbline.tasks.data.csv_rows import NAMES, separator_of
from ebbline.tasks.data.data_file import FileRow, ending_of
from ebbline.tasks.data.formats.chats import chat_format, conversation_of
from ebbline.tasks.data.formats.choices import REQUEST
from ebbline.tasks.data.formats.folders import Split, files_of, read_set
from ebbline.tasks.data.prompts import FORMATS, PromptSet, read_prompts
from ebbline.tasks.errors import DataError, EvaluationError
from ebbline.tasks.scoring.answers import TASK_SCORERS
from ebbline.tasks.specs import TaskScorerName

TOKEN_CHARACTERS = 3  # of a token; English text has about 4
EXACT_WORDS = 12  # the longest answer that a model may be asked to write exactly
_LETTER = 4  # tokens that an answer of one letter may take


@dataclass(frozen=True)
class FoundData:
    """Training data. `tokens` is the length that 95% of the rows do not exceed, about."""

    given: str
    about: str
    rows: int
    tokens: int


@dataclass(frozen=True)
class FoundPrompts:
    """A prompt set and its labels: `harmful`, `harmless`, or "" for prompts without one."""

    given: str
    about: str
    prompts: int
    labels: Mapping[str, int]


@dataclass(frozen=True)
class FoundTask:
    """Items of a task, the scorer that can compare all their answers, and the tokens of the longest
    answer, about.
    """

    given: str
    about: str
    items: int
    scorer: TaskScorerName
    tokens: int


def look_at_data(given: str) -> FoundData:
    path = Path(given).expanduser()
    rows = list(read_set(_existing(path), "train"))
    conversations = [conversation_of(row.values, row.where) for row in rows]
    if not conversations:
        raise DataError(f"{path} holds no conversation")
    formats = Counter(chat_format(row.values) for row in rows)
    lengths = sorted(sum(len(turn["content"]) for turn in turns) for turns in conversations)
    several = sum(len([t for t in turns if t["role"] == "user"]) > 1 for turns in conversations)
    system = sum(turns[0]["role"] == "system" for turns in conversations)
    facts = [
        " and ".join(f"{name}" for name, _ in formats.most_common()),
        _container(path, "train"),
        f"{len(rows)} rows",
        *([f"{several} with several questions"] if several else []),
        *([f"{system} with a system turn"] if system else []),
    ]
    if shorter := sum(
        _is_cut(row, len(turns)) for row, turns in zip(rows, conversations, strict=True)
    ):
        facts.append(
            f"{shorter} with turns that are not learnt (before the first question, or "
            "after the last answer)"
        )
    tokens = lengths[min(len(lengths) - 1, len(lengths) * 95 // 100)] // TOKEN_CHARACTERS
    return FoundData(given, ", ".join(facts), len(rows), tokens)


def _is_cut(row: FileRow, turns: int) -> bool:
    given = row.values.get("messages") or row.values.get("conversations")
    return isinstance(given, list) and turns < len(given)


def look_at_prompts(given: str) -> FoundPrompts:
    path = Path(given).expanduser()
    found = read_prompts(_existing(path))
    labels = Counter(prompt.label for prompt in found.prompts)
    named = [f"{count} {label}" for label, count in sorted(labels.items()) if label]
    facts = [*_set(path, found), f"{len(found.prompts)} prompts", *named]
    return FoundPrompts(given, ", ".join(facts), len(found.prompts), labels)


def look_at_task(given: str) -> FoundTask:
    path = Path(given).expanduser()
    found = read_prompts(_existing(path), needs_answer=True)
    has_choices = all(prompt.text.endswith(REQUEST) for prompt in found.prompts)
    scorer: TaskScorerName = "choice" if has_choices else _scorer(found)
    longest = max(len(prompt.answer) for prompt in found.prompts) // TOKEN_CHARACTERS + 1
    facts = [
        *(["items with choices"] if has_choices else _set(path, found)[:1]),
        *_set(path, found)[1:],
        f"{len(found.prompts)} items",
        f"answers compared by `{scorer}`",
    ]
    tokens = _LETTER if scorer == "choice" else longest
    return FoundTask(given, ", ".join(facts), len(found.prompts), scorer, tokens)


def _scorer(found: PromptSet) -> TaskScorerName:
    """The strictest scorer that can compare all answers of a set."""
    if _all_compared(found, "number"):
        return "number"
    if all(len(prompt.answer.strip()) == 1 for prompt in found.prompts) and _all_compared(
        found, "choice"
    ):
        return "choice"
    short = all(len(prompt.answer.split()) <= EXACT_WORDS for prompt in found.prompts)
    return "exact" if short or not _all_compared(found, "rouge_l") else "rouge_l"


def _all_compared(found: PromptSet, scorer: TaskScorerName) -> bool:
    try:
        for prompt in found.prompts:
            TASK_SCORERS[scorer].require(prompt.answer, prompt.text, prompt.where)
    except EvaluationError:
        return False
    return True


def _set(path: Path, found: PromptSet) -> Sequence[str]:
    """The format of a prompt set, its prompts' column, and the kind of file."""
    name = found.format
    if path.is_dir() and name == "hex-phi":
        return [name, "a folder of CSV files"]
    row = next(iter(read_set(path, "test")), None)
    wanted = FORMATS[name].text
    column = next((each for each in wanted if row is not None and row.values.get(each)), "")
    return [name, *([f"prompts in `{column}`"] if column else []), _container(path, "test")]


def _container(path: Path, split: Split) -> str:
    if path.is_dir():
        files = files_of(path, split)
        names = f"{files[0].relative_to(path)}" + (
            f" and {len(files) - 1} more" if files[1:] else ""
        )
        return f"a folder ({names})"
    ending = ending_of(path)
    if ending in (".csv", ".tsv"):
        return f"a table with {NAMES[separator_of(path)]} between columns"
    return {".parquet": "Parquet", ".json": "JSON"}.get(ending, "JSON lines")


def _existing(path: Path) -> Path:
    if not path.exists():
        raise DataError(f"there is no file or folder at {path}")
    return path
