"""A Study: one question, as frozen and strict models. ebbline.sweeps.study.study_file reads it from
YAML.

An unknown key, a wrong type or an invalid range is an error with its path. No other code sees the
YAML as a dict.
"""

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self, TypeVar

from pydantic import AfterValidator, Field, ValidationError, model_validator

from ebbline.cluster.schedule.labels import parse
from ebbline.sweeps.study.axes import Axis, AxisValue, Range, count_of, distinct, of_size
from ebbline.sweeps.study.policies import (
    SURROGATE_AXES,
    TPE_POINTS,
    Budget,
    Name,
    Replicates,
    Sampler,
    Search,
)
from ebbline.sweeps.study.references import Data, DataRef, ModelRef
from ebbline.sweeps.study.suites import Suite, scorers_of
from ebbline.tasks.errors import StudyError
from ebbline.tasks.kinds import STAGE_KINDS
from ebbline.tasks.scoring.phrases import SCORERS
from ebbline.tasks.specs import (
    DEFAULT_CHAT,
    ApplySpec,
    Chat,
    Count,
    DataSpec,
    Dtype,
    Frozen,
    JudgeSpec,
    Number,
    ProjectSpec,
    Quantisation,
    Seed,
    Spec,
    TrainSpec,
)

T = TypeVar("T")


def _distinct_files(named: dict[str, T]) -> dict[str, T]:
    """The mapping, if its names stay different on a file system that ignores case."""
    first: dict[str, str] = {}
    for name in named:
        if first.setdefault(name.casefold(), name) != name:
            raise ValueError(
                f"{name!r} and {first[name.casefold()]!r} differ only in case, and some file "
                "systems take them for one name; rename one"
            )
    return named


class Model(Frozen):
    """One size of the family. `gpus` > 1 trains it as a gang. `axes` are this size's own: other
    values of a study axis, or an axis that only this size has.

    `labels` select the hosts of this size's stages on GPUs, in Ray's syntax
    (`{ray.io/accelerator-type: A100}`). `spread` allows a gang on several hosts. These fields and
    `gpus` may change between runs.

    `chat` says how conversations are rendered, in trainings and in measurements.

    `unaligned` replaces the base in Safe LoRA's subtraction: the paper notes that an aligned model
    fine-tuned on harmful data behaves like the base. A family without an available base gives only
    `unaligned`.
    """

    base: ModelRef | None = None
    aligned: ModelRef
    unaligned: ModelRef | None = None
    quantisation: Quantisation = "nf4"
    dtype: Dtype = "bfloat16"
    chat: Chat = DEFAULT_CHAT
    gpus: Count = 1
    labels: dict[str, str] = {}
    spread: bool = False
    axes: dict[str, Axis] = {}
    train: dict[str, AxisValue] = {}

    def train_settings(self, study: TrainSpec) -> TrainSpec:
        """The study's training settings with this size's changes. Raises ValidationError for an
        unknown field.
        """
        changes = {
            **self.train,
            "quantisation": self.quantisation,
            "dtype": self.dtype,
            "chat": self.chat.model_dump(),
        }
        return TrainSpec.model_validate({**study.model_dump(), **changes})

    @model_validator(mode="after")
    def _labels_are_selectors(self) -> Self:
        for name, selector in self.labels.items():
            try:
                parse(selector)
            except StudyError as error:
                raise ValueError(f"labels.{name}: {error}") from None
        return self

    @model_validator(mode="after")
    def _every_model_comes_from_somewhere(self) -> Self:
        if self.base is None and (self.unaligned is None or self.aligned.tuned is not None):
            raise ValueError(
                "`base` is missing: Safe LoRA subtracts `base` or `unaligned`, and a tuned "
                "`aligned` starts from `base`"
            )
        if self.base is not None and self.base.tuned is not None:
            raise ValueError(
                "`base` cannot be `tuned`, because tuned models start from it. Give this model as "
                "`unaligned`, which starts from `aligned`"
            )
        return self


class Judge(Frozen):
    """A judge of completions: a model, or an endpoint given in `settings`."""

    model: ModelRef | None = None
    settings: JudgeSpec

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.model is None) == (self.settings.endpoint is None):
            raise ValueError("give either `model` or an `endpoint` in `settings`")
        if self.model is not None and self.model.tuned is not None:
            raise ValueError("a judge's model cannot be `tuned`")
        return self


class SuiteEntry(Frozen):
    prompts: DataRef
    measure: Suite


class Study(Frozen):
    study: Name
    question: str
    hypothesis: str = ""
    models: Annotated[dict[Name, Model], AfterValidator(_distinct_files)] = Field(min_length=1)
    data: Data
    train: TrainSpec
    project: ProjectSpec = ProjectSpec()
    apply: ApplySpec = ApplySpec()
    language: Seed = 0
    axes: dict[str, Axis]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(distinct)] = (0,)
    replicates: Replicates = Replicates()
    judges: Annotated[dict[Name, Judge], AfterValidator(_distinct_files)] = {}
    suites: Annotated[dict[Name, SuiteEntry], AfterValidator(_distinct_files)] = Field(min_length=1)
    objectives: Annotated[tuple[str, ...], Field(min_length=1)]
    refusal_floor: Annotated[Number, Field(ge=0.0, le=1.0)] = 0.9
    search: Search = Search()
    budget: Budget = Budget()

    @model_validator(mode="after")
    def _axes_name_fields(self) -> Self:
        fields = set(axis_fields())
        narrowed = {f"models.{name}.axes": list(model.axes) for name, model in self.models.items()}
        for where, axes in {"axes": list(self.axes), **narrowed}.items():
            for axis in axes:
                if axis not in fields:
                    raise ValueError(f"{where}.{axis}: {unknown(axis, fields)}")
        return self

    @model_validator(mode="after")
    def _axes_hold_valid_values(self) -> Self:
        settings = self.settings
        narrowed: list[tuple[str, Mapping[str, Any]]] = [
            (f"models.{name}.axes", model.axes) for name, model in self.models.items()
        ]
        for where, axes in [("axes", self.axes), *narrowed]:
            for axis, values in axes.items():
                prefix, _, field = axis.partition(".")
                for value in values.edges if isinstance(values, Range) else values:
                    try:
                        type(settings[prefix]).model_validate(
                            {**settings[prefix].model_dump(), field: value}
                        )
                    except ValidationError as error:
                        # Errors of other fields are ignored: another axis may change those.
                        own = next(
                            (
                                fault["msg"]
                                for fault in error.errors()
                                if fault["loc"][:1] == (field,)
                            ),
                            None,
                        )
                        if own is not None:
                            hint = (
                                "; a range over whole numbers needs a `step`"
                                if isinstance(values, Range) and values.step is None
                                else ""
                            )
                            raise ValueError(
                                f"{where}.{axis}: {own} (got {value!r}){hint}"
                            ) from None
        return self

    @model_validator(mode="after")
    def _replicates_have_seeds(self) -> Self:
        if self.replicates.policy == "near_frontier" and self.replicates.at_least > len(self.seeds):
            raise ValueError(
                f"replicates.at_least: {self.replicates.at_least}, but the study has "
                f"{len(self.seeds)} seeds"
            )
        return self

    @property
    def settings(self) -> Mapping[str, Spec]:
        """The settings that axes may vary, by the first part of an axis name."""
        return {
            "data": self.data.settings,
            "train": self.train,
            "project": self.project,
            "apply": self.apply,
        }

    def fixed(self, model: str, axis: str) -> Any:
        """The value of a setting, written as an axis, that a size does not vary."""
        part, _, name = axis.partition(".")
        own = self.models[model].train_settings(self.train)
        return getattr(own if part == TrainSpec.KIND else self.settings[part], name)

    @property
    def first_seeds(self) -> int:
        """The number of seeds that every point has."""
        return len(self.seeds) if self.replicates.policy == "all" else self.replicates.at_least

    @model_validator(mode="after")
    def _suites_are_not_named_like_stages(self) -> Self:
        for name in self.suites:
            if name in STAGE_KINDS:
                raise ValueError(
                    f"suites.{name}: this is the name of a stage kind; name the suite after what "
                    "it measures"
                )
        return self

    @model_validator(mode="after")
    def _scorers_exist(self) -> Self:
        for judge in self.judges:
            if judge in SCORERS:
                raise ValueError(
                    f"judges.{judge}: a phrase list has this name; give the judge another name"
                )
        for name, entry in self.suites.items():
            for scorer in scorers_of(entry.measure):
                if scorer not in SCORERS and scorer not in self.judges:
                    raise ValueError(
                        f"suites.{name}.measure.scorer: {unknown(scorer, {*SCORERS, *self.judges})}"
                    )
                template = self.judges[scorer].settings.template if scorer in self.judges else None
                if entry.measure.kind == "over_refusal" and template in (
                    "harmbench",
                    "llama-guard",
                ):
                    raise ValueError(
                        f"suites.{name}: {template} judges harm, so it would count every harmless "
                        "answer as a refusal"
                    )
        return self

    @model_validator(mode="after")
    def _models_say_how_they_chat(self) -> Self:
        if self.train.chat != DEFAULT_CHAT:
            raise ValueError(
                "train.chat: give models.NAME.chat instead, which evaluation also uses"
            )
        return self

    @model_validator(mode="after")
    def _sizes_can_train(self) -> Self:
        for name, model in self.models.items():
            for field in ("quantisation", "dtype", "chat"):
                if field in model.train:
                    raise ValueError(
                        f"models.{name}.train.{field}: give models.{name}.{field} instead, "
                        "which evaluation also uses"
                    )
            try:
                settings = model.train_settings(self.train)
                if settings.global_batch % model.gpus:
                    raise ValueError(
                        f"models.{name}.gpus={model.gpus} must divide "
                        f"train.global_batch={settings.global_batch}"
                    )
            except ValidationError as error:
                raise ValueError(f"models.{name}.train: " + "; ".join(faults(error))) from None
        return self

    @model_validator(mode="after")
    def _objectives_are_measured(self) -> Self:
        names = [self.metric(objective) for objective in self.objectives]
        if len(set(names)) != len(names):
            raise ValueError(f"objectives: duplicate objective in {list(self.objectives)}")
        object.__setattr__(self, "objectives", tuple(names))  # full names
        return self

    @model_validator(mode="after")
    def _search_has_an_end(self) -> Self:
        sampler = self.sampler
        if sampler == "list" and not self.search.list:
            raise ValueError(
                "search.list: the sampler 'list' needs the points to run, each as {model: "
                "..., AXIS: value}"
            )
        if self.search.first and sampler in ("grid", "list"):
            raise ValueError(
                f"search.first: the sampler {sampler!r} has its own order; use "
                "'list' alone, or stage_aware"
            )
        if sampler == "grid" and not self.has_grid:
            raise ValueError(
                "search.sampler: a grid needs every axis as a list, and one is a {low, high} range"
            )
        if sampler not in ("grid", "list") and self.search.points is None and self.size is None:
            raise ValueError(
                f"search.points: the sampler {sampler!r} needs the number of points, because an "
                "axis is a range without a step"
            )
        return self

    @model_validator(mode="after")
    def _constraints_are_measured(self) -> Self:
        if self.search.constraints.refusal_floor and self.refusal_metric is None:
            raise ValueError(
                "search.constraints.refusal_floor: no suite of this study measures a refusal_rate"
            )
        if self.study in self.search.warm_start:
            raise ValueError(
                f"search.warm_start: {self.study!r} is this study, which already has its own points"
            )
        return self

    def axes_of(self, model: str) -> Mapping[str, tuple[AxisValue, ...] | Range]:
        """The axes of one size in the order of the file: the study's with this size's values, then
        the size's own axes.
        """
        return of_size(self.axes, self.models[model].axes)

    @property
    def size(self) -> int | None:
        """The number of points in the space; None when an axis is a range without a step."""
        counts = [
            [count_of(axis) for axis in self.axes_of(model).values()] for model in self.models
        ]
        return (
            None
            if any(None in each for each in counts)
            else sum(math.prod(count or 0 for count in each) for each in counts)
        )

    @property
    def has_grid(self) -> bool:
        """Whether every axis of every size is a list."""
        return not any(
            isinstance(axis, Range)
            for model in self.models
            for axis in self.axes_of(model).values()
        )

    @property
    def sampler(self) -> Sampler:
        """`search.sampler`, or the default for this study.

        The default is grid when there is no budget and the study runs the whole space. Otherwise it
        is stage_aware up to 12 axes. With more axes it is tpe up to 1,000 points, and nsga2 above.
        A study keeps the sampler that it was begun with (see ebbline.sweeps.study.view.StudyView).
        """
        if self.search.sampler is not None:
            return self.search.sampler
        size, points = self.size, self.search.points
        if self.search.list:
            return "list"
        whole = size is not None and (points is None or points >= size)
        if self.has_grid and whole and self.budget == Budget() and not self.search.first:
            return "grid"
        axes = {axis for model in self.models for axis in self.axes_of(model)}
        if len(axes) <= SURROGATE_AXES:
            return "stage_aware"
        return "tpe" if (points or size or 0) <= TPE_POINTS else "nsga2"

    @property
    def refusal_metric(self) -> str | None:
        """The study's main refusal rate: its first refusal objective, else the rate of its first
        refusal suite.
        """
        objectives = [name for name in self.objectives if name.rpartition(".")[2] == "refusal_rate"]
        suites = [
            f"{name}.refusal_rate"
            for name, suite in self.suites.items()
            if suite.measure.kind == "refusal"
        ]
        return next(iter(objectives + suites), None)

    def kind_of(self, stage: str) -> str:
        """The stage kind for a part of a stage name: `train`, `generate:SUITE`, or SUITE for the
        stage with its metrics.
        """
        if stage in self.suites:
            return "evaluate" if self.suites[stage].measure.kind == "multiple_choice" else "score"
        return stage.partition(":")[0]

    def metric(self, name: str) -> str:
        """The full name (`SUITE.METRIC`) of a metric. The last part alone is enough when only one
        suite measures it.
        """
        measured = [
            f"{suite}.{metric}"
            for suite, entry in self.suites.items()
            for metric in entry.measure.metrics()
        ]
        found = [full for full in measured if name in (full, full.partition(".")[2])]
        if len(found) != 1:
            raise ValueError(
                f"{name!r} names {found or 'no metric'}; this study measures {measured}"
            )
        return found[0]


SETTINGS: Mapping[str, type[Spec]] = {
    "data": DataSpec,
    "train": TrainSpec,
    "project": ProjectSpec,
    "apply": ApplySpec,
}
_NOT_AXES = {
    "train.seed",
    "data.seed",
    "train.quantisation",
    "train.dtype",
    "train.chat",
    "train.method",
}


def axis_fields() -> Iterator[str]:
    """Every Spec field that may be an axis, as `train.rank`."""
    for prefix, spec in SETTINGS.items():
        yield from (
            f"{prefix}.{name}" for name in spec.model_fields if f"{prefix}.{name}" not in _NOT_AXES
        )


def unknown(name: str, allowed: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(allowed), n=1)
    return f"{name!r} is not one of {sorted(allowed)}" + (
        f"; did you mean {close[0]!r}?" if close else ""
    )


def faults(error: ValidationError) -> Iterator[str]:
    """A line for each fault: its path, the error, and the allowed values."""
    for fault in error.errors():
        path = ".".join(str(part) for part in fault["loc"])
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            message = f"{message}; {_hint(fault['loc'])}" if _hint(fault["loc"]) else message
        elif fault["type"] != "missing" and not fault["msg"].startswith("Value error"):
            message = f"{message} (got {fault['input']!r})"
        yield f"  {path or 'study'}: {message}"


def _hint(location: tuple[int | str, ...]) -> str:
    model: Any = Study
    for part in location[:-1]:
        model = _member(model, str(part))
        if model is None:
            return ""
    return unknown(str(location[-1]), set(model.model_fields))


def _member(model: Any, part: str) -> Any:
    """The pydantic model at one step of an error's path; for a mapping, the model of its values."""
    if part not in getattr(model, "model_fields", {}):
        return model
    annotation = model.model_fields[part].annotation
    stack = [annotation]
    while stack:
        item = stack.pop(0)
        if isinstance(item, type) and issubclass(item, Frozen):
            return item
        stack.extend(getattr(item, "__args__", ()))
    return None
