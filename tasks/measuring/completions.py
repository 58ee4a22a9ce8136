"""The file of completions that a generation writes. Imports no torch.

Invariant: prompts and completions are stored in this file only, and its name marks it as sensitive.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.specs import GenerateSpec


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
    with (folder / GenerateSpec.COMPLETIONS).open("w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps(asdict(row)) + "\n")


def read_completions(folder: Path) -> list[Completion]:
    """The completions of a generation, in the order of the prompts.

    Raises EvaluationError for an unreadable or empty file; its message never quotes the file.
    """
    path = folder / GenerateSpec.COMPLETIONS
    try:
        rows = [
            Completion(**json.loads(line)) for line in path.read_text("utf-8").split("\n") if line
        ]
    except (OSError, ValueError, TypeError) as error:
        raise EvaluationError(
            f"{path} cannot be read ({type(error).__name__}); is it truncated?"
        ) from None
    if not rows:
        raise EvaluationError(f"{path} holds no completion: an empty set cannot be measured")
    return rows
