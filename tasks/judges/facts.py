"""What is known of a judge without asking it: what it states, how long its answers are, and where
it can run. A study is checked with these facts. Imports nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

JudgeTemplate = Literal[
    "harmbench",
    "llama-guard",
    "llama-guard-3",
    "llama-guard-4",
    "wildguard",
    "qwen3guard",
    "shieldgemma",
    "strongreject",
    "strongreject-rubric",
    "qi",
    "sorry-bench",
    "yes-no",
    "classifier",
]


@dataclass(frozen=True)
class JudgeFacts:
    """`states` is what the verdict means: refusal, harm, or refusal with a grade of harm beside it.

    `new_tokens` and `max_tokens` are the defaults of a JudgeSpec. `asks` is the number of prompts
    for one completion. A judge that is read from the probabilities of tokens, and a classifier,
    cannot be at an endpoint.
    """

    states: Literal["refusal", "harm", "both"]
    new_tokens: int = 16
    max_tokens: int = 2048
    asks: int = 1
    at_endpoint: bool = True

    @property
    def grades_harm(self) -> bool:
        return self.states != "refusal"


JUDGES: Mapping[JudgeTemplate, JudgeFacts] = {
    "harmbench": JudgeFacts("harm"),
    "llama-guard": JudgeFacts("harm"),
    "llama-guard-3": JudgeFacts("harm", new_tokens=100, max_tokens=4096),
    "llama-guard-4": JudgeFacts("harm", max_tokens=4096),
    "wildguard": JudgeFacts("both", new_tokens=128),
    "qwen3guard": JudgeFacts("both", new_tokens=128, max_tokens=4096),
    "shieldgemma": JudgeFacts("harm", new_tokens=1, max_tokens=4096, asks=4, at_endpoint=False),
    "strongreject": JudgeFacts("harm", new_tokens=1, at_endpoint=False),
    "strongreject-rubric": JudgeFacts("both", new_tokens=1024, max_tokens=4096),
    "qi": JudgeFacts("harm", new_tokens=1024, max_tokens=8192),
    "sorry-bench": JudgeFacts("refusal"),
    "yes-no": JudgeFacts("refusal"),
    "classifier": JudgeFacts("refusal", at_endpoint=False),
}


def facts_of(name: object) -> JudgeFacts | None:
    """The facts of a judge; None for what is no judge's name."""
    return next((facts for judge, facts in JUDGES.items() if judge == name), None)
