"""The checks that need a tokenizer or a library of models, as data. `with_models` does them in a
process of its own, because a driver imports no torch.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ebbline.sweeps.study.axes import Range
from ebbline.sweeps.study.reading.row_sets import RowSet, located, row_sets
from ebbline.sweeps.study.references import Hub, Local, ModelRef
from ebbline.sweeps.study.study import Model, Study
from ebbline.sweeps.study.suites import MultipleChoiceSuite
from ebbline.tasks.errors import PinError
from ebbline.tasks.models.model_work import cached_snapshot
from ebbline.tasks.specs import GenerateSpec


@dataclass(frozen=True)
class SetJob:
    """A set whose rows are rendered and counted in tokens. Training data has `seeds` and `needed`,
    which say what rows are drawn; prompts have the `measure` of their suite.
    """

    where: str
    path: str
    max_tokens: int
    seeds: tuple[int, ...] = ()
    needed: int = 0
    measure: dict[str, Any] | None = None


@dataclass(frozen=True)
class ModelJob:
    """A model folder or GGUF file. `chat` is None where no tokenizer is needed. `checked` is false
    for a judge whose template takes no prompts. A model that is not `loaded` is only read by a
    defence, tensor by tensor.
    """

    where: str
    path: str
    chat: dict[str, Any] | None = None
    checked: bool = True
    trains: bool = False
    loaded: bool = True
    classifier: bool = False
    sets: tuple[SetJob, ...] = ()

    def without(self, wheres: Collection[str]) -> "ModelJob":
        """The job without the sets at these places."""
        return replace(self, sets=tuple(each for each in self.sets if each.where not in wheres))


@dataclass(frozen=True)
class TaskJob:
    """An lm-eval task and the folder with its data."""

    where: str
    path: str
    task: str


@dataclass(frozen=True)
class Jobs:
    models: tuple[ModelJob, ...] = ()
    tasks: tuple[TaskJob, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.models or self.tasks)


def jobs_of(study: Study) -> Jobs:
    """The checks for what is on this machine."""
    sets = [each for each in row_sets(study) if not isinstance(each.measure, MultipleChoiceSuite)]
    tasks = [
        TaskJob(each.where, str(path), each.measure.task)
        for each in row_sets(study)
        if isinstance(each.measure, MultipleChoiceSuite) and (path := _path_of(each)) is not None
    ]
    models = [
        job for name, model in study.models.items() for job in _of_model(study, name, model, sets)
    ]
    return Jobs((*models, *_judges(study)), tuple(tasks))


def path_of(reference: ModelRef) -> Path | None:
    """Where a model from outside is on this machine; None for one that is not here."""
    outside = reference.pinned()
    try:
        if isinstance(outside, Local):
            return outside.located()
        if isinstance(outside, Hub) and outside.commit is not None:
            return cached_snapshot(f"hub:model:{outside.id}@{outside.commit}")
    except PinError:
        pass
    return None


def _path_of(each: RowSet) -> Path | None:
    try:
        return located(each.reference)
    except PinError:
        return None


def _of_model(study: Study, name: str, model: Model, sets: list[RowSet]) -> Iterator[ModelJob]:
    """One job for each model of a size; that of the model which is trained and measured has the
    sets.
    """
    starts = "aligned" if model.aligned.tuned is None else "base"
    for role in ("base", "aligned", "unaligned"):
        reference = getattr(model, role)
        path = None if reference is None else path_of(reference)
        if path is None:
            continue
        where = f"models.{name}.{role}"
        if role == starts:
            own = tuple(_set_jobs(study, name, model, sets))
            trains = study.train is not None or model.aligned.tuned is not None
            yield ModelJob(where, str(path), model.chat.model_dump(), trains=trains, sets=own)
        else:
            yield ModelJob(where, str(path), loaded=False)


def _set_jobs(study: Study, name: str, model: Model, sets: list[RowSet]) -> Iterator[SetJob]:
    fixed = 0 if study.train is None else model.train_settings(study.train).max_tokens
    room: int = GenerateSpec.model_fields["max_tokens"].default
    for each in sets:
        path = _path_of(each)
        if path is None or each.model not in ("", name):
            continue
        if each.measure is None:
            most = each.max_tokens or _least(study, name, fixed)
            yield SetJob(each.where, str(path), most, each.seeds, each.needed)
        elif not isinstance(each.measure, MultipleChoiceSuite):
            most, measure = room - each.measure.max_new_tokens, each.measure
            yield SetJob(each.where, str(path), most, measure=measure.model_dump(mode="json"))


def _least(study: Study, model: str, fixed: int) -> int:
    """The least `train.max_tokens` of a size's points."""
    values = study.axes_of(model).get("train.max_tokens", (fixed,))
    return min(int(str(v)) for v in (values.edges if isinstance(values, Range) else values))


def _judges(study: Study) -> Iterator[ModelJob]:
    # Reads the prompts of all judges, which few studies need.
    from ebbline.tasks.measuring.judges.templates import TEMPLATES

    for name, judge in study.judges.items():
        path = None if judge.model is None else path_of(judge.model)
        if path is None:
            continue
        template = TEMPLATES[judge.settings.template]
        is_classifier = judge.settings.template == "classifier"
        # A judge of images may keep its template in a file of its processor.
        chats = template.text is None and not is_classifier and not template.in_parts
        yield ModelJob(
            f"judges.{name}.model",
            str(path),
            judge.settings.chat.model_dump() if chats else None,
            checked=chats and not template.is_question,
            loaded=not template.in_parts,
            classifier=is_classifier,
        )
