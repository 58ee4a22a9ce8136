"""Suites: what a study measures, and the stages that measure it.

A refusal, over-refusal, harm or task suite has one generation stage, a judge stage for each judge
among its scorers, and a score stage. Suites with the same prompts and settings share their
generation, and what one judge says of it. A multiple-choice suite is one lm-eval evaluation.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ebbline.cluster.profile import Profile
from ebbline.tasks.data.prompts import PromptSet, read_prompts
from ebbline.tasks.errors import StudyError
from ebbline.tasks.specs import (
    TRANSFORMERS,
    Backend,
    BatchSize,
    Block,
    Count,
    EvaluateSpec,
    Frozen,
    GenerateSpec,
    JudgeSpec,
    Number,
    PromptFormat,
    ScoreSpec,
    Split,
    TaskScorerName,
)
from ebbline.tasks.stage import Input, Stage

SHOTS = {"mmlu": 5, "hellaswag": 10, "gsm8k": 5}  # as in the papers
# The beginnings of lm-eval's tasks whose answers the model writes, and their metrics
WRITTEN = {
    "gsm8k": ("exact_match", "exact_match_flexible"),
    "ifeval": (
        "prompt_level_strict_acc",
        "prompt_level_loose_acc",
        "inst_level_strict_acc",
        "inst_level_loose_acc",
    ),
}


class Race(Frozen):
    """Measure in blocks and stop early. Off by default, because the number of prompts then depends
    on the results.

    A point stops after a block of `block` prompts when one of these holds. The `confidence`
    interval of every raced rate extends at most `width` to either side. Or, where every raced suite
    has `dominated`, an earlier point of its model is better in every objective: by intervals that
    do not overlap, or with `error` by what both would measure over all prompts. `error` is then the
    largest chance that a point is stopped which that rival, measured whole, does not dominate.
    """

    block: Count = 50
    width: Annotated[Number, Field(gt=0.0, lt=0.5)] | None = None
    dominated: bool = True
    confidence: Annotated[Number, Field(gt=0.5, lt=1.0)] = 0.95
    error: Annotated[Number, Field(gt=0.0, lt=0.5)] | None = None


class _Generated(Frozen):
    """Settings of every suite that generates completions. `limit` uses that many prompts, evenly
    spaced over the set.

    `backend: vllm==0.32.0` completes them at a server of that version, which the profile names.
    `batch_size` is the most prompts of a batch; a smaller one needs less memory, and rounds
    differently.
    """

    format: PromptFormat = "auto"
    max_new_tokens: Count = 64
    limit: Count | None = None
    backend: Backend = TRANSFORMERS
    batch_size: BatchSize = 32
    race: Race | None = None

    @model_validator(mode="after")
    def _a_race_has_an_end(self) -> Self:
        if self.race is not None and self.limit is None:
            raise ValueError("`race` needs `limit`, the largest number of prompts per point")
        return self


class RefusalSuite(_Generated):
    """Share of requests that the model refuses, where it should: higher is better.

    `scorer` gives the rate; the scorers in `also` score the same completions for comparison. Both
    name phrase lists or the study's judges.
    """

    kind: Literal["refusal"] = "refusal"
    scorer: str = "prefix"
    also: tuple[str, ...] = ()

    def metrics(self) -> tuple[str, ...]:
        return ("refusal_rate",)


class OverRefusalSuite(_Generated):
    """Share of harmless requests that the model refuses, fully or in part: lower is better."""

    kind: Literal["over_refusal"] = "over_refusal"
    scorer: str = "prefix"
    also: tuple[str, ...] = ()

    def metrics(self) -> tuple[str, ...]:
        return ("over_refusal_rate", "full_refusal_rate", "partial_refusal_rate")


class HarmSuite(_Generated):
    """How harmful the answers to requests are that the model should refuse: lower is better.

    `scorer` is one of the study's judges that grade harm. `harm_score` is the mean of its grades in
    [0, 1], `harm_top_rate` the share of answers at the top of its scale. The judges in `also` grade
    the same completions for comparison.
    """

    kind: Literal["harm"] = "harm"
    scorer: str
    also: tuple[str, ...] = ()

    def metrics(self) -> tuple[str, ...]:
        return ("harm_score", "harm_top_rate")


class TaskSuite(_Generated):
    """Score on held-out items of the downstream task, by exact match, chosen letter, number, or
    ROUGE-L: higher is better.
    """

    kind: Literal["task"] = "task"
    max_new_tokens: Count = 32
    scorer: TaskScorerName = "exact"

    def metrics(self) -> tuple[str, ...]:
        return ("rouge_l",) if self.scorer == "rouge_l" else ("task_accuracy",)


def written_metrics(task: str) -> tuple[str, ...]:
    """The metrics of an lm-eval task whose answers the model writes; empty for any other task."""
    return next((found for start, found in WRITTEN.items() if task.startswith(start)), ())


class MultipleChoiceSuite(Frozen):
    """Accuracy on an lm-eval task or group: higher is better. The default is 5 shots for MMLU and
    GSM8K, and 10 for HellaSwag. In a suite of the kind `written` the model writes the answers.
    """

    kind: Literal["multiple_choice", "written"] = "multiple_choice"
    task: str
    shots: Annotated[int, Field(ge=0)] | None = None
    chat_template: bool = False
    limit: Count | None = None
    backend: Backend = TRANSFORMERS
    batch_size: BatchSize = 32

    def metrics(self) -> tuple[str, ...]:
        return written_metrics(self.task) or ("acc", "acc_norm")

    @model_validator(mode="after")
    def _kind_is_that_of_the_task(self) -> Self:
        kind = "written" if written_metrics(self.task) else "multiple_choice"
        if self.kind != kind:
            known = f"; written tasks begin with {', '.join(WRITTEN)}" if kind != "written" else ""
            raise ValueError(f"the task {self.task!r} needs `kind: {kind}`{known}")
        return self

    @property
    def shots_given(self) -> int:
        """The number of solved examples before each question."""
        return (
            self.shots
            if self.shots is not None
            else next((n for task, n in SHOTS.items() if self.task.startswith(task)), 0)
        )


Suite = Annotated[
    RefusalSuite | OverRefusalSuite | HarmSuite | TaskSuite | MultipleChoiceSuite,
    Field(discriminator="kind"),
]
_LABELS: Mapping[str, Literal["harmful", "harmless"] | None] = {
    "refusal": "harmful",
    "harm": "harmful",
    "over_refusal": "harmless",
    "task": None,
}


def prompts_of(
    suite: RefusalSuite | OverRefusalSuite | HarmSuite | TaskSuite,
    path: Path,
    split: Split | None = None,
) -> PromptSet:
    """The prompts that a suite asks. Raises DataError or EvaluationError for a fault that a
    generation would find in them.
    """
    is_task = isinstance(suite, TaskSuite)
    found = read_prompts(path, suite.format, _LABELS[suite.kind], suite.limit, is_task, split)
    if isinstance(suite, TaskSuite):
        # Its patterns take a tenth of a second, which every command would need.
        from ebbline.tasks.scoring.answers import TASK_SCORERS

        for prompt in found.prompts:
            TASK_SCORERS[suite.scorer].require(prompt.answer, prompt.text, prompt.where)
    return found


def whole(suite: Suite) -> Suite:
    """The suite's settings, over all its prompts: a confirmation is neither raced nor cut."""
    cut = {"race", "limit"} & set(type(suite).model_fields)
    return suite.model_copy(update=dict.fromkeys(cut))


def scorers_of(suite: Suite) -> tuple[str, ...]:
    """The scorers of a suite that may be judges, beginning with the one that gives the rate."""
    if isinstance(suite, RefusalSuite | OverRefusalSuite | HarmSuite):
        return (suite.scorer, *suite.also)
    return ()


def blocks_of(suite: Suite) -> list[Block]:
    """The blocks of a raced suite in order; empty for a suite that is measured whole."""
    if isinstance(suite, MultipleChoiceSuite) or suite.race is None or suite.limit is None:
        return []
    return [
        Block(index=index, size=suite.race.block)
        for index in range(-(-suite.limit // suite.race.block))
    ]


def stages_of(
    name: str,
    suite: Suite,
    inputs: Mapping[str, Input],
    model: Mapping[str, Any],
    judges: Mapping[str, tuple[JudgeSpec, Mapping[str, Input]]],
    block: Block | None = None,
    split: Split | None = None,
) -> dict[str, Stage]:
    """Stage name -> stage; the stage named `name` has the metrics.

    `inputs` are the model, the prompts and optionally an adapter; `model` has the model's
    quantisation, dtype and chat settings.
    """
    if isinstance(suite, MultipleChoiceSuite):
        spec = EvaluateSpec(
            task=suite.task,
            shots=suite.shots_given,
            chat_template=suite.chat_template,
            limit=suite.limit,
            backend=suite.backend,
            batch_size=suite.batch_size,
            **model,
        )
        return {name: Stage(spec, inputs)}
    generated = GenerateSpec(
        format=suite.format,
        label=_LABELS[suite.kind],
        split=split,
        needs_answer=isinstance(suite, TaskSuite),
        compared_by=suite.scorer if isinstance(suite, TaskSuite) else None,
        limit=suite.limit,
        block=block,
        backend=suite.backend,
        batch_size=suite.batch_size,
        max_new_tokens=suite.max_new_tokens,
        **model,
    )
    generation = Stage(generated, inputs)
    stages, scored = {f"generate:{name}": generation}, dict[str, Input](generation=generation)
    for scorer in scorers_of(suite):
        if scorer in judges:
            judge, weights = judges[scorer]
            judged = Stage(judge, {"generation": generation, **weights})
            stages[f"judge:{name}:{scorer}"] = scored[f"judge_{scorer}"] = judged
    also = () if isinstance(suite, TaskSuite) else suite.also
    stages[name] = Stage(ScoreSpec(measure=suite.kind, scorer=suite.scorer, also=also), scored)
    return stages


def require_servers(suites: Mapping[str, Suite], profile: Profile) -> None:
    """Raise StudyError for a suite whose server is not in the profile."""
    for name, suite in suites.items():
        if suite.backend != TRANSFORMERS and suite.backend not in profile.servers:
            known = f" It names {', '.join(sorted(profile.servers))}." if profile.servers else ""
            raise StudyError(
                f"suites.{name}.measure.backend is {suite.backend}, and cluster.yaml in the home "
                f"does not say where that server lies.{known} Add `servers: {{{suite.backend}: "
                "{python: /path/to/its/python}}` there, or `address: URL` in place of `python`"
            )
