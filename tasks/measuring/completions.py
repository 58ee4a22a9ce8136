"""What a model said to each prompt, as it is kept: in a file that says that it is sensitive, and
nowhere else. Imports no torch.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.specs import GenerateSpec


@dataclass(frozen=True)
class Completion:
    """A prompt with what the model said to it. `tokens` were generated; `ended` when the last of
    them was the end.
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
    """What a generation wrote, in the order of the prompts. Raises EvaluationError, never quoting
    the file.
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
