"""Where the completions of two backends differ, prompt by prompt: ids and numbers, no text."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.files import write_whole
from ebbline.tasks.measuring.completions import read_completions

CHECKED = "transformers"  # the folder of the completions that a server's are compared with
DIFFERENCES = "differences.csv"


@dataclass(frozen=True)
class Difference:
    """A prompt with two completions: their tokens and ends, and the characters that they share at
    their beginning.
    """

    id: str
    tokens: int
    tokens_by_transformers: int
    ended: bool
    ended_by_transformers: bool
    shared_characters: int


def differences(served: Path, own: Path) -> list[Difference]:
    """The prompts whose completions differ between two generations of the same prompts. Raises
    EvaluationError for different prompts.
    """
    ours, others = read_completions(served), read_completions(own)
    if [row.id for row in ours] != [row.id for row in others]:
        raise EvaluationError(f"{served} and {own} complete different prompts; remove both folders")
    return [
        Difference(
            one.id,
            one.tokens,
            two.tokens,
            one.ended,
            two.ended,
            _shared(one.completion, two.completion),
        )
        for one, two in zip(ours, others, strict=True)
        if (one.completion, one.tokens, one.ended) != (two.completion, two.tokens, two.ended)
    ]


def _shared(one: str, two: str) -> int:
    pairs = enumerate(zip(one, two, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(two)))


def write_differences(path: Path, rows: Sequence[Difference]) -> None:
    """A row for each prompt that differs; the header alone if none does."""
    text = io.StringIO()
    table = csv.DictWriter(text, [field.name for field in fields(Difference)])
    table.writeheader()
    table.writerows(asdict(row) for row in rows)
    write_whole(path, lambda fresh: fresh.write_text(text.getvalue(), "utf-8"))
