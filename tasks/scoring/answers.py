"""Task scorers: a completion compared with its item's reference answer, as a value in [0, 1].

Invariant: None, never a guess, for a completion whose answer cannot be read.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ebbline.tasks.chat.thoughts import answer_of
from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.scoring.letters import chosen_letter, reference_letter
from ebbline.tasks.scoring.numbers import number, reference_number
from ebbline.tasks.scoring.overlap import rouge_l
from ebbline.tasks.scoring.text import plain
from ebbline.tasks.scoring.words import words_of


@dataclass(frozen=True)
class TaskScorer:
    """`compare` gives the value of an answer, a reference and the item's prompt; `require` raises
    EvaluationError for a reference that it cannot compare with. `metric` names the items' mean.
    """

    metric: str
    compare: Callable[[str, str, str], float | None]
    require: Callable[[str, str, str], object]

    def value(self, completion: str, answer: str, prompt: str = "") -> float | None:
        """The value of what a completion says after its thought; None where that is not clear."""
        given = answer_of(completion)
        return None if given.lacks else self.compare(given.text, answer, prompt)


def exact(completion: str, answer: str) -> float:
    """1 when the completion equals the answer, ignoring case, runs of white space, characters
    without width and the forms of apostrophes and letters.
    """
    return float(_normal(completion) == _normal(answer))


def choice(completion: str, answer: str, prompt: str = "") -> float | None:
    """1 when the letter that the completion gives is the answer's; None where it gives none."""
    right = reference_letter(answer, prompt, "an item")
    given = chosen_letter(completion, prompt)
    return None if given is None else float(given == right)


def _normal(text: str) -> str:
    return " ".join(plain(text).casefold().split())


def _require_text(answer: str, prompt: str, where: str) -> None:
    if not answer.strip():
        raise EvaluationError(
            f"{where} has no `answer`; a task scorer compares each completion with it"
        )


def _require_words(answer: str, prompt: str, where: str) -> None:
    _require_text(answer, prompt, where)
    if not words_of(answer):
        raise EvaluationError(
            f"{where}: its `answer` has no letter or digit, so the scorer rouge_l finds no word "
            "in it. Write the reference text"
        )


TASK_SCORERS = {
    "exact": TaskScorer(
        "task_accuracy", lambda given, answer, _: exact(given, answer), _require_text
    ),
    "choice": TaskScorer("task_accuracy", choice, reference_letter),
    "number": TaskScorer(
        "task_accuracy",
        lambda given, answer, _: number(given, answer),
        lambda answer, _, where: reference_number(answer, where),
    ),
    "rouge_l": TaskScorer(
        "rouge_l", lambda given, answer, _: rouge_l(given, answer), _require_words
    ),
}
