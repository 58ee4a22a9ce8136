"""How an answer to the downstream task is scored against its reference: a value in [0, 1] for each
item.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class TaskScorer:
    """`metric` is the name of the mean over items: a rate where `value` is 0 or 1, else a mean."""

    metric: str
    value: Callable[[str, str], float]


def exact(completion: str, answer: str) -> float:
    """1 when the completion is the answer, letter case and white space aside."""
    return float(_normal(completion) == _normal(answer))


def choice(completion: str, answer: str) -> float:
    """1 when the first letter that stands alone in the completion ("B", "(B)", "B.", "Answer: B")
    is the answer's.
    """
    found = re.search(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])", completion)
    return float(found is not None and found[0].upper() == answer.strip().strip("().").upper())


def rouge_l(completion: str, answer: str) -> float:
    """ROUGE-L F-measure with Porter stemming (Lin 2004), as Google's rouge-score computes it."""
    from rouge_score.rouge_scorer import RougeScorer  # brings nltk, which only this scorer needs

    return float(
        RougeScorer(["rougeL"], use_stemmer=True).score(answer, completion)["rougeL"].fmeasure
    )


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


TASK_SCORERS = {
    "exact": TaskScorer("task_accuracy", exact),
    "choice": TaskScorer("task_accuracy", choice),
    "rouge_l": TaskScorer("rouge_l", rouge_l),
}
