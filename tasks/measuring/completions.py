"""The files that a generation writes: its completions, and the record of its prompts and adapter
(prompts.json). Imports no torch.

Invariant: prompts and completions are stored in this file only. Its name marks it as sensitive, and
only its user can read it.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.files import PRIVATE_FOLDER, open_private
from ebbline.tasks.specs import GenerateSpec

_TYPES: Mapping[str, type] = {"tokens": int, "ended": bool}  # of a completion; the others are text
CHANGES_NOTHING = "adapter_changes_nothing"


@dataclass(frozen=True)
class Completion:
    """A prompt with the model's completion.

    `tokens` counts the generated tokens; `ended` says whether the last one was an end token.
    """

    id: str
    category: str
    source: str
    label: str
    prompt: str
    answer: str
    completion: str
    tokens: int
    ended: bool


def write_completions(folder: Path, rows: Iterable[Completion]) -> None:
    folder.chmod(PRIVATE_FOLDER)
    with open_private(folder / GenerateSpec.COMPLETIONS) as handle:
        for row in rows:
            handle.write(json.dumps(vars(row)) + "\n")


def read_completions(folder: Path) -> list[Completion]:
    """The completions of a generation, in the order of the prompts.

    Raises EvaluationError for an unreadable or empty file; its message never quotes the file.
    """
    path = folder / GenerateSpec.COMPLETIONS
    try:
        rows = [_row(json.loads(line)) for line in path.read_text("utf-8").split("\n") if line]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise EvaluationError(
            f"{path} cannot be read ({type(error).__name__}); is it truncated?"
        ) from None
    if not rows:
        raise EvaluationError(f"{path} holds no completion: an empty set cannot be measured")
    return rows


def _row(values: Any) -> Completion:
    row = Completion(**values)
    for name, value in vars(row).items():
        if type(value) is not _TYPES.get(name, str):
            raise TypeError(f"{name} is no {_TYPES.get(name, str).__name__}")
    return row


def adapter_changes_nothing(record: Mapping[str, Any]) -> bool:
    """Whether every update B A of the measured adapter is zero."""
    return bool(record.get(CHANGES_NOTHING, False))


def unused_beside_adapter(record: Mapping[str, Any]) -> list[str]:
    """What differs in a tokenizer that was saved beside the adapter and was not used."""
    found: list[str] = record.get("chat", {}).get("unused_beside_adapter", [])
    return found


def repeated_prompts(record: Mapping[str, Any]) -> int:
    """The number of rows that repeat the prompt of an earlier row."""
    return int(record.get("repeats", 0))
