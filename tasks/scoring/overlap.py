"""ROUGE-L in any script: the longest common subsequence of two texts' words."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from ebbline.tasks.scoring.words import words_of


def rouge_l(completion: str, answer: str) -> float:
    """ROUGE-L F-measure (Lin 2004), computed by Google's rouge-score over the words of `words_of`.

    English words are stemmed by Porter's algorithm, so the value for ASCII text is rouge-score's.
    """
    return float(_scorer().score(answer, completion)["rougeL"].fmeasure)


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk, which only this scorer needs

    return RougeScorer(["rougeL"], tokenizer=_Tokens())


class _Tokens:
    """The tokenizer that rouge-score calls."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._english = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> Sequence[str]:
        return [
            token
            for word in words_of(text)
            for token in (self._english.tokenize(word) if word.isascii() else [word])
        ]
