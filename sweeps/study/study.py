"""A Study: one question, as frozen and strict models. See ebbline.sweeps.study.study_file for the
YAML it is written in.

An unknown key, a wrong type or a bad range is an error with its path. Below this file nobody sees a
dict.
"""

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from ebbline.cluster.schedule.labels import parse
from ebbline.sweeps.study.axes import Axis, AxisValue, Range, count_of, distinct, of_size
from ebbline.sweeps.study.policies import REACH, Order, Replicates, Stop
from ebbline.sweeps.study.references import DataRef, Hub, Local, OneOf
from ebbline.sweeps.study.suites import Suite, scorers_of
from ebbline.tasks.errors import PinError, StudyError
from ebbline.tasks.kinds import STAGE_KINDS
from ebbline.tasks.measuring.scorers import SCORERS
from ebbline.tasks.specs import (
    ApplySpec,
    Count,
    DataSpec,
    Dtype,
    Frozen,
    JudgeSpec,
    Number,
    OrganismSpec,
    Positive,
    ProjectSpec,
    Quantisation,
    Seed,
    Spec,
    TrainSpec,
)

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Data(Frozen):
    pool: DataRef
    mix: DataRef | None = None
    settings: DataSpec

    @model_validator(mode="after")
    def _a_share_has_a_source(self) -> Self:
        if self.settings.mix_share > 0 and self.mix is None:
            raise ValueError(
                f"mix_share is {self.settings.mix_share}, but `mix` names no second set"
            )
        return self


class Tuned(Frozen):
    """A model made by full fine-tuning on `data`: an aligned one from the base, an unaligned one
    from the aligned.
    """

    data: Data
    train: TrainSpec

    @model_validator(mode="after")
    def _all_weights(self) -> Self:
        if self.train.method != "full":
            raise ValueError(
                "train.method must be 'full': a tuned model is a whole model, not an adapter"
            )
        return self


class ModelRef(OneOf):
    """Where a model comes from."""

    organism: OrganismSpec | None = None
    path: Local | None = None
    gguf: Local | None = None
    hub: Hub | None = None
    tuned: Tuned | None = None


class Model(Frozen):
    """One size of the family. `gpus` > 1 trains it as a gang. `axes` are this size's own: an axis
    of the study with other values, or one that only this size has.

    `labels` select the hosts of all that this size does on GPUs, in Ray's syntax
    (`{ray.io/accelerator-type: A100}`); `spread` lets its gang stand on several hosts. Where a size
    runs is no part of what it is: these and `gpus` may change between runs.

    `unaligned` stands in for the base where Safe LoRA subtracts: the paper notes that an aligned
    model fine-tuned on bad data behaves like the base. A family whose base is not to be had gives
    an `unaligned` model alone.
    """

    base: ModelRef | None = None
    aligned: ModelRef
    unaligned: ModelRef | None = None
    quantisation: Quantisation = "nf4"
    dtype: Dtype = "bfloat16"
    gpus: Count = 1
    labels: dict[str, str] = {}
    spread: bool = False
    axes: dict[str, Axis] = {}
    train: dict[str, AxisValue] = {}

    def train_settings(self, study: TrainSpec) -> TrainSpec:
        """The study's training settings as this size uses them. Raises ValidationError for a field
        that does not exist.
        """
        changes = {**self.train, "quantisation": self.quantisation, "dtype": self.dtype}
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
                "`base` is missing: Safe LoRA subtracts it, or `unaligned`, and a tuned "
                "`aligned` starts from it"
            )
        if self.base is not None and self.base.tuned is not None:
            raise ValueError(
                "`base` cannot be `tuned`: a tuned model is made from it. Say it as "
                "`unaligned`, which is made from `aligned`"
            )
        return self


class Judge(Frozen):
    """A judge of completions: a model from outside, or an endpoint that `settings` names."""

    model: ModelRef | None = None
    settings: JudgeSpec

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.model is None) == (self.settings.endpoint is None):
            raise ValueError("give `model`, or an `endpoint` in `settings`, and not both")
        if self.model is not None and self.model.tuned is not None:
            raise ValueError("a judge's model cannot be `tuned`")
        return self


class SuiteEntry(Frozen):
    prompts: DataRef
    measure: Suite


class Constraints(Frozen):
    """What an operating point must hold: `refusal_floor` the study's floor; `gpu_hours` bounds what
    a point takes by itself.

    GPU-hours are those of the work's estimate, the same on any cluster, so that no proposal depends
    on how fast a machine was.
    """

    refusal_floor: bool = False
    gpu_hours: Positive | None = None


Sampler = Literal["stage_aware", "gp", "tpe", "nsga2", "random", "grid", "list"]
AXES_OF_A_SURROGATE = (
    12  # beyond these a Gaussian process learns little from what a study can afford
)
POINTS_OF_TPE = 1000


class Search(Frozen):
    """How points are chosen: those in `first`, then the sampler's (see Study.sampler for what it is
    when it is not given).

    `warm_start` names studies of the same home: what they measured is known to the search from the
    beginning, and costs no points. With `transfer`, what one size taught guides the search of the
    others.

    `order: as_they_land` tells the search whatever has ended, and asks as long as less is queued
    than the cluster is wide, up to `window` points in flight. With `in_turn` just `window` are in
    flight, and proposal k has seen exactly the results up to k - window: a study's proposals are
    then a function of its file alone. Killed and continued, neither loses a point.
    """

    sampler: Sampler | None = None
    points: Count | None = None
    window: Count | None = None
    seed: Seed = 0
    first: tuple[dict[str, AxisValue], ...] = ()
    list: tuple[dict[str, AxisValue], ...] = ()
    warm_start: Annotated[tuple[Name, ...], AfterValidator(distinct)] = ()
    transfer: bool = False
    constraints: Constraints = Constraints()
    order: Order = "as_they_land"
    stop: Stop | None = None

    @property
    def in_turn(self) -> bool:
        return self.order == "in_turn"

    @property
    def reach(self) -> int:
        """How far back a point's predecessors end that it may know of: in turn, and as rivals in a
        race, in either order.
        """
        return self.window or REACH


class Budget(Frozen):
    """What a study may take, over all its runs: hours of driving, GPU-hours, dollars by the prices
    of the profile, points.

    Nothing starts that is expected to cross it; what has started is let finish. It may be raised
    between runs.
    """

    hours: Positive | None = None
    gpu_hours: Positive | None = None
    usd: Positive | None = None
    points: Count | None = None


class Study(Frozen):
    study: Name
    question: str
    hypothesis: str = ""
    models: dict[Name, Model] = Field(min_length=1)
    data: Data
    train: TrainSpec
    project: ProjectSpec = ProjectSpec()
    apply: ApplySpec = ApplySpec()
    language: Seed = 0
    axes: dict[str, Axis]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(distinct)] = (0,)
    replicates: Replicates = Replicates()
    judges: dict[Name, Judge] = {}
    suites: dict[Name, SuiteEntry] = Field(min_length=1)
    objectives: Annotated[tuple[str, ...], Field(min_length=1)]
    refusal_floor: Annotated[Number, Field(ge=0.0, le=1.0)] = 0.9
    search: Search = Search()
    budget: Budget = Budget()

    @model_validator(mode="after")
    def _axes_name_fields(self) -> Self:
        known = set(axis_fields())
        narrowed = {f"models.{name}.axes": list(model.axes) for name, model in self.models.items()}
        for where, axes in {"axes": list(self.axes), **narrowed}.items():
            for axis in axes:
                if axis not in known:
                    raise ValueError(f"{where}.{axis}: {unknown(axis, known)}")
        return self

    @model_validator(mode="after")
    def _axes_hold_values_that_a_stage_takes(self) -> Self:
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
                        # Of this field only: what it needs beside it may come from another axis.
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
        """What a point's axes may vary, by the first part of their names."""
        return {
            "data": self.data.settings,
            "train": self.train,
            "project": self.project,
            "apply": self.apply,
        }

    def fixed(self, model: str, axis: str) -> Any:
        """What a point of a size has in place of an axis that is not varied."""
        part, _, name = axis.partition(".")
        own = self.models[model].train_settings(self.train)
        return getattr(own if part == TrainSpec.KIND else self.settings[part], name)

    @property
    def first_seeds(self) -> int:
        """How many of its seeds every point is run with."""
        return len(self.seeds) if self.replicates.policy == "all" else self.replicates.at_least

    @model_validator(mode="after")
    def _suites_are_not_called_like_stages(self) -> Self:
        for name in self.suites:
            if name in STAGE_KINDS:
                raise ValueError(
                    f"suites.{name}: this is the name of a stage; call the suite by what "
                    "it measures"
                )
        return self

    @model_validator(mode="after")
    def _scorers_exist(self) -> Self:
        for judge in self.judges:
            if judge in SCORERS:
                raise ValueError(
                    f"judges.{judge}: a phrase list is called so; give the judge another name"
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
                        f"suites.{name}: {template} judges harm, so every harmless answer "
                        "would count as a refusal"
                    )
        return self

    @model_validator(mode="after")
    def _sizes_can_train(self) -> Self:
        for name, model in self.models.items():
            for field in ("quantisation", "dtype"):
                if field in model.train:
                    raise ValueError(
                        f"models.{name}.train.{field}: say it as models.{name}.{field}, "
                        "which evaluation uses too"
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
            raise ValueError(f"objectives: {list(self.objectives)} names one twice")
        object.__setattr__(self, "objectives", tuple(names))  # in full from here on
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
                f"search.first: the sampler {sampler!r} has an order of its own; use "
                "'list' alone, or stage_aware"
            )
        if sampler == "grid" and not self.has_grid:
            raise ValueError(
                "search.sampler: a grid needs every axis as a list; a {low, high} range has no grid"
            )
        whole = self.search.sampler is None and self.size is not None
        if sampler not in ("grid", "list") and self.search.points is None and not whole:
            raise ValueError(
                f"search.points: the sampler {sampler!r} needs to know how many points to choose"
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
                f"search.warm_start: {self.study!r} is this study; it knows its own points"
            )
        return self

    def axes_of(self, model: str) -> Mapping[str, tuple[AxisValue, ...] | Range]:
        """The axes of one size, in the order of the file: the study's as this size has them, then
        its own.
        """
        return of_size(self.axes, self.models[model].axes)

    @property
    def size(self) -> int | None:
        """How many points there are; None when an axis is a range without a step."""
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
        """`search.sampler`; when it is not given, what fits the number of axes and what may be
        spent.

        A grid, when there is no budget and the whole space is asked for. Else stage_aware, up to 12
        axes. Beyond, where its surrogate has too little to go by, tpe up to 1,000 points and nsga2
        for more. Asked once: a study that was begun goes on with what it was then (see
        ebbline.sweeps.study.view.StudyView).
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
        if len(axes) <= AXES_OF_A_SURROGATE:
            return "stage_aware"
        return "tpe" if (points or size or 0) <= POINTS_OF_TPE else "nsga2"

    @property
    def refusal_metric(self) -> str | None:
        """The refusal rate that the study is about: its first such objective, or else its first
        refusal suite's.
        """
        objectives = [name for name in self.objectives if name.rpartition(".")[2] == "refusal_rate"]
        suites = [
            f"{name}.refusal_rate"
            for name, suite in self.suites.items()
            if suite.measure.kind == "refusal"
        ]
        return next(iter(objectives + suites), None)

    def kind_of(self, stage: str) -> str:
        """The kind of the stage that a point's results call so: `train`, `generate:SUITE`, or SUITE
        for the one with its metrics.
        """
        if stage in self.suites:
            return "evaluate" if self.suites[stage].measure.kind == "multiple_choice" else "score"
        return stage.partition(":")[0]

    def metric(self, name: str) -> str:
        """The full name (`SUITE.METRIC`) of a metric given in full, or by its last part when only
        one suite measures it.
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
_NOT_AXES = {"train.seed", "data.seed", "train.quantisation", "train.dtype", "train.method"}


def axis_fields() -> Iterator[str]:
    """Every Spec field that may be an axis, as `train.rank`."""
    for prefix, spec in SETTINGS.items():
        yield from (
            f"{prefix}.{name}" for name in spec.model_fields if f"{prefix}.{name}" not in _NOT_AXES
        )


def unknown(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"{name!r} is not one of {sorted(known)}" + (
        f"; did you mean {close[0]!r}?" if close else ""
    )


def unpinned(study: Study) -> list[tuple[str, Local | Hub]]:
    """(path in the study file, reference) for all outside content that has no pin yet."""
    return [
        (where, ref)
        for where, ref in references(study)
        if ref.sha256 is None or (isinstance(ref, Hub) and ref.commit is None)
    ]


PLACEMENT = ("gpus", "labels", "spread")  # of a model: where it runs


DRIVING = ("order", "stop")  # fields of `search` that say how a study is driven, not what it is
BEGAN_WITH = (
    "sampler",
    "points",
    "window",
    "seed",
    "first",
    "list",
)  # fields of `search` that every kept study has


def lasting(dump: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a dumped study this study, and may not change once it has been run.

    Not its budget, not where its sizes run, not in which order and until when points are asked for,
    and not the places that its pinned content was found at: a file that moved is the same file. A
    setting that came later counts when it says more than its default; a sampler that is not given
    counts as tpe, which is what it once meant.
    """
    plain = {"replicates": Replicates().model_dump(mode="json")}
    kept = {
        key: value for key, value in dump.items() if key != "budget" and value != plain.get(key)
    }
    models = {
        name: {key: value for key, value in model.items() if key not in PLACEMENT}
        for name, model in dump["models"].items()
    }
    defaults = Search().model_dump(mode="json")
    came_later = {
        key: value
        for key, value in dump["search"].items()
        if key not in DRIVING and value != defaults.get(key)
    }
    search = {**came_later, **{key: dump["search"][key] for key in BEGAN_WITH}}
    search |= {"sampler": search["sampler"] or "tpe", "window": search["window"] or REACH}
    without_paths: dict[str, Any] = _without_paths({**kept, "models": models, "search": search})
    return without_paths


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            k: _without_paths(v)
            for k, v in value.items()
            if not (k == "path" and isinstance(v, str) and value.get("sha256"))
        }
    return [_without_paths(item) for item in value] if isinstance(value, list) else value


def references(study: Study) -> Iterator[tuple[str, Local | Hub]]:
    """Every reference to content from outside, with its path in the study file."""

    def walk(value: Any, where: str) -> Iterator[tuple[str, Local | Hub]]:
        if isinstance(value, Local | Hub):
            yield where, value
        elif isinstance(value, Frozen):
            for name in type(value).model_fields:
                yield from walk(getattr(value, name), f"{where}.{name}" if where else name)
        elif isinstance(value, dict):
            for name, item in value.items():
                yield from walk(item, f"{where}.{name}")

    yield from walk(study, "")


def require_pins(study: Study) -> None:
    """Raise PinError naming every reference without a pin."""
    missing = unpinned(study)
    if missing:
        lines = "\n".join(
            f"  {where}: {ref.id if isinstance(ref, Hub) else ref.path}" for where, ref in missing
        )
        raise PinError(
            f"study {study.study!r} names content that is not pinned, so its results could "
            f"not be told apart later:\n{lines}\n"
            f"Run `ebbline pin {study.study} --to my-{study.study}.yaml`, which fills in "
            "each commit and sha256."
        )


def faults(error: ValidationError) -> Iterator[str]:
    """One line for each fault: its path, what is wrong, and what is allowed."""
    for fault in error.errors():
        path = ".".join(str(part) for part in fault["loc"])
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            message = f"{message}; {_hint(fault['loc'])}" if (_hint(fault["loc"])) else message
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
    """The pydantic model behind one step of an error's path; mappings pass their value type
    through.
    """
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
