"""A Study: one question, as frozen and strict models. ebbline.sweeps.study.study_file reads it from
YAML.

An unknown key, a wrong type or an invalid range is an error with its path. No other code sees the
YAML as a dict.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, model_validator

from ebbline.cluster.schedule.labels import parse
from ebbline.sweeps.study.adapters.branches import Branch, adapters_of, branches_of
from ebbline.sweeps.study.adapters.branches import faults_of as adapter_faults
from ebbline.sweeps.study.adapters.reference import AdapterRef
from ebbline.sweeps.study.axes import Axis, AxisValue, Range, count_of, distinct, of_size
from ebbline.sweeps.study.defended.named import (
    Defences,
    SafetyAdapter,
    owner_of,
    specs_of,
)
from ebbline.sweeps.study.defended.named import axes_of as knob_axes
from ebbline.sweeps.study.defended.named import faults_of as defence_faults
from ebbline.sweeps.study.policies import (
    SURROGATE_AXES,
    TPE_POINTS,
    Budget,
    Confirm,
    Constraints,
    Controls,
    Name,
    Replicates,
    Sampler,
    Search,
)
from ebbline.sweeps.study.reading.field_faults import faults, unknown
from ebbline.sweeps.study.references import (
    Data,
    DataRef,
    JudgeAdapter,
    ModelRef,
    same_set,
    template_text,
)
from ebbline.sweeps.study.suites import MultipleChoiceSuite, Suite, scorers_of
from ebbline.tasks.defences.defence import Defence
from ebbline.tasks.defences.in_use import AXIS, DEFENCES, NONE, owns
from ebbline.tasks.defences.safe_lora import SAFE_LORA
from ebbline.tasks.errors import ProjectionError, StudyError
from ebbline.tasks.judges.facts import JUDGES
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
    LoxSpec,
    Number,
    ProjectSpec,
    Quantisation,
    Seed,
    Spec,
    Split,
    TrainSpec,
)

T = TypeVar("T")
USEFULNESS = (
    "task_accuracy",
    "rouge_l",
    "exact_match",
    "exact_match_flexible",
    "prompt_level_strict_acc",
    "prompt_level_loose_acc",
    "inst_level_strict_acc",
    "inst_level_loose_acc",
    "acc_norm",
    "acc",
)
"""The metrics of usefulness."""


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

    `chat` says how conversations are rendered, in trainings and in measurements. `chat_template`
    names a file with a template for a model that has none, or in place of its own. It is read once,
    when the study file is read: its text becomes `chat.text`, and so a part of every key.

    `safety` is the safety adapter of this size, for the defence `safe_merge`.

    `unaligned` replaces the base in Safe LoRA's subtraction: the paper notes that an aligned model
    fine-tuned on harmful data behaves like the base. A family without an available base gives only
    `unaligned`. Without either, a study measures what fine-tuning does and projects nothing.
    """

    base: ModelRef | None = None
    aligned: ModelRef
    unaligned: ModelRef | None = None
    safety: SafetyAdapter | None = Field(default=None, exclude_if=lambda given: given is None)
    quantisation: Quantisation = "nf4"
    dtype: Dtype = "bfloat16"
    chat: Chat = DEFAULT_CHAT
    chat_template: str | None = Field(default=None, exclude=True)
    gpus: Annotated[int, Field(ge=1, le=10_000)] = 1
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
    def _read_chat_template(self, info: ValidationInfo) -> Self:
        if self.chat_template is not None:
            if self.chat.text is not None or self.chat.template is not None:
                raise ValueError("give `chat_template` or a template in `chat`, not both")
            folder = info.context["folder"] if info.context else Path()
            text = template_text(folder / Path(self.chat_template).expanduser())
            chat = Chat.model_validate({**self.chat.model_dump(), "text": text})
            object.__setattr__(self, "chat", chat)
            object.__setattr__(self, "chat_template", None)
        return self

    @model_validator(mode="after")
    def _tuned_models_have_a_start(self) -> Self:
        if self.base is None and self.aligned.tuned is not None:
            raise ValueError("`base` is missing: a tuned `aligned` starts from `base`")
        if self.base is not None and self.base.tuned is not None:
            raise ValueError(
                "`base` cannot be `tuned`, because tuned models start from it. Give this model as "
                "`unaligned`, which starts from `aligned`"
            )
        return self


class Judge(Frozen):
    """A judge of completions: a model, or an endpoint given in `settings`. `adapter` is put on the
    model, for a judge that is published as an adapter.
    """

    model: ModelRef | None = None
    adapter: JudgeAdapter | None = None
    settings: JudgeSpec

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.model is None) == (self.settings.endpoint is None):
            raise ValueError("give either `model` or an `endpoint` in `settings`")
        if self.model is not None and self.model.tuned is not None:
            raise ValueError("a judge's model cannot be `tuned`")
        if self.adapter is not None and (
            self.model is None or self.settings.template == "classifier"
        ):
            raise ValueError(
                "`adapter` needs a `model` that answers, not an endpoint or classifier"
            )
        return self


class SuiteEntry(Frozen):
    """A suite: its prompts, and what is measured on them.

    `split` keeps one side of the prompts. `ebbline confirm` writes it into the study that it
    begins; in a study with `confirm` it follows from `hold_out` (`Study.split_of`).
    """

    prompts: DataRef
    measure: Suite
    split: Split | None = Field(default=None, exclude_if=lambda split: split is None)


class Study(Frozen):
    study: Name
    question: str
    hypothesis: str = ""
    models: Annotated[dict[Name, Model], AfterValidator(_distinct_files)] = Field(min_length=1)
    data: Data | None = None
    train: TrainSpec | None = None
    adapters: Annotated[dict[Name, AdapterRef], AfterValidator(_distinct_files)] = {}
    lox: LoxSpec = LoxSpec()
    project: ProjectSpec = ProjectSpec()
    apply: ApplySpec = ApplySpec()
    defences: Defences = {}
    controls: Controls | None = Field(default=None, exclude_if=lambda given: given is None)
    language: Seed = 0
    axes: dict[str, Axis]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(distinct)] = (0,)
    subsets: Count | None = None
    replicates: Replicates = Replicates()
    judges: Annotated[dict[Name, Judge], AfterValidator(_distinct_files)] = {}
    suites: Annotated[dict[Name, SuiteEntry], AfterValidator(_distinct_files)] = Field(min_length=1)
    objectives: Annotated[tuple[str, ...], Field(min_length=1)]
    refusal_floor: Annotated[Number, Field(ge=0.0, le=1.0)] = 0.9
    search: Search = Search()
    confirm: Confirm | None = None
    budget: Budget = Budget()

    @model_validator(mode="after")
    def _axes_name_fields(self) -> Self:
        fields = set(axis_fields(list(self.defences)))
        narrowed = {f"models.{name}.axes": list(model.axes) for name, model in self.models.items()}
        for where, axes in {"axes": list(self.axes), **narrowed}.items():
            for axis in axes:
                if axis not in fields:
                    raise ValueError(f"{where}.{axis}: {unknown(axis, fields)}")
        return self

    @model_validator(mode="after")
    def _points_have_adapters(self) -> Self:
        if (self.train is None) != (self.data is None):
            missing, given = ("train", "data") if self.train is None else ("data", "train")
            raise ValueError(f"`{missing}` is missing: a study with `{given}` trains adapters")
        if self.train is None and not self.adapters:
            raise ValueError(
                "give `train` and `data`, whose adapters are trained, or `adapters` that you have"
            )
        unused: dict[str, Mapping[str, Any]] = {}
        if self.train is None:
            unused["axes"] = self.axes
            unused |= {f"models.{name}.axes": model.axes for name, model in self.models.items()}
            for name, model in self.models.items():
                if model.train:
                    raise ValueError(
                        f"models.{name}.train: nothing is trained, because the study has no `train`"
                    )
        if faults := list(adapter_faults(self.adapters, list(self.models), unused)):
            raise ValueError("; ".join(faults))
        return self

    @model_validator(mode="after")
    def _defences_have_their_own_axes(self) -> Self:
        if not self.defences:
            return self
        axes: dict[str, Mapping[str, Any]] = {"axes": self.axes}
        axes |= {f"models.{name}.axes": model.axes for name, model in self.models.items()}
        changed = {"project": self.project != ProjectSpec(), "apply": self.apply != ApplySpec()}
        if faults := list(defence_faults(self.defences, axes, changed)):
            raise ValueError("; ".join(faults))
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
                        if self.defences and (defence := owner_of(axis)) is not None:
                            knob = axis.partition(".")[2]
                            defence.checked(knob, value)
                            continue
                        type(settings[prefix]).model_validate(
                            {**settings[prefix].model_dump(), field: value}
                        )
                    except ProjectionError as error:
                        raise ValueError(f"{where}.{axis}: {error}") from None
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
    def _projections_have_a_base(self) -> Self:
        if self.defences:
            return self
        for name, model in self.models.items():
            projected = [axis for axis in self.axes_of(name) if owns(axis)]
            if self.apply != ApplySpec():
                projected.append("apply")
            if model.base is None and model.unaligned is None and projected:
                raise ValueError(
                    f"models.{name}: `base` is missing: {SAFE_LORA.words.name} subtracts `base` or "
                    "`unaligned` from the aligned model. Name the model before its alignment, or "
                    f"leave {' and '.join(projected)} out"
                )
            if model.base is None and model.unaligned is None and self.project != ProjectSpec():
                raise ValueError(f"project: it has no effect, because models.{name} has no base")
        return self

    @model_validator(mode="after")
    def _trainings_that_read_alignment_have_a_base(self) -> Self:
        if self.train is None and self.lox != LoxSpec():
            raise ValueError("lox: nothing is trained, because the study has no `train`; remove it")
        for name, model in self.models.items():
            if model.base is not None or model.unaligned is not None:
                continue
            reads = {"train.penalty asft": "asft", "lox.factor": 1.0}
            for setting, value in reads.items():
                axis = setting.partition(" ")[0]
                values = self.axes_of(name).get(axis, (self.fixed(name, axis),))
                on = isinstance(values, Range) or any(
                    each == value if axis == "train.penalty" else each for each in values
                )
                if on:
                    raise ValueError(
                        f"models.{name}: `base` is missing: {setting} reads the difference of the "
                        "aligned model and `base` or `unaligned`. Name the model before its "
                        f"alignment, or leave {axis} out"
                    )
        return self

    @model_validator(mode="after")
    def _defences_have_their_models(self) -> Self:
        for defence in self.used_defences if self.defences else ():
            for name, model in self.models.items():
                if defence.reads_models and model.base is None and model.unaligned is None:
                    raise ValueError(
                        f"models.{name}: `base` is missing: defences.{defence.name} compares it, "
                        "or `unaligned`, with the aligned model. Name the model before its "
                        f"alignment, or leave {defence.name} out"
                    )
                reads_safety = defence.method is not None and defence.method.reads_safety
                if reads_safety and model.safety is None:
                    raise ValueError(
                        f"models.{name}: `safety` is missing: defences.{defence.name} merges with "
                        "a safety adapter. Give its `path` or `hub`"
                    )
        return self

    @model_validator(mode="after")
    def _replicates_have_seeds(self) -> Self:
        if self.replicates.policy == "near_frontier" and self.replicates.at_least > len(self.seeds):
            raise ValueError(
                f"replicates.at_least: {self.replicates.at_least}, but the study has "
                f"{len(self.seeds)} seeds"
            )
        return self

    @model_validator(mode="after")
    def _races_keep_their_error(self) -> Self:
        """The stated error is one of objectives, over the blocks of a point's first seeds."""
        for name, entry in self.suites.items():
            race = getattr(entry.measure, "race", None)
            if race is None or race.error is None or not race.dominated:
                continue
            where = f"suites.{name}.measure.race.error"
            if self.replicates.policy == "near_frontier":
                raise ValueError(
                    f"{where}: a race with further seeds near the frontier would look again with "
                    "the whole error. Leave `error` out, or set replicates.policy to all"
                )
            if self.search.constraints != Constraints():
                raise ValueError(
                    f"{where}: a point that misses search.constraints may end the race of one that "
                    "holds them. Leave `error` or the constraints out"
                )
        return self

    @property
    def settings(self) -> Mapping[str, Spec]:
        """The settings that axes may vary, by the first part of an axis name."""
        own: dict[str, Spec | None] = {
            "data": None if self.data is None else self.data.settings,
            "lox": None if self.train is None else self.lox,
            "train": self.train,
            "project": self.project,
            "apply": self.apply,
        }
        return {part: settings for part, settings in own.items() if settings is not None}

    @property
    def used_defences(self) -> tuple[Defence, ...]:
        """The defences of the points, no defence first; Safe LoRA alone without `defences`."""
        if not self.defences:
            return (SAFE_LORA,)
        return (DEFENCES[NONE], *(DEFENCES[name] for name in self.defences))

    def defence_specs(self, defence: Defence) -> tuple[Spec, Spec]:
        """The settings of both stages of a defence, without the values of a point."""
        return self._defence_specs[defence.name]

    def knobs(self, defence: Defence, values: Mapping[str, AxisValue]) -> dict[str, AxisValue]:
        """Axis -> value of every knob of a defence, of a point with these values."""
        return defence.knobs(self.defence_specs(defence)[1], values)

    @cached_property
    def _defence_specs(self) -> Mapping[str, tuple[Spec, Spec]]:
        if not self.defences:
            return {SAFE_LORA.name: (self.project, self.apply)}
        return {
            name: specs_of(name, knobs, (model.axes for model in self.models.values()))
            for name, knobs in {NONE: {}, **self.defences}.items()
        }

    @property
    def used_controls(self) -> Controls:
        """`controls`, or the default: those of a study that names its defences, else none."""
        if self.controls is not None:
            return self.controls
        return Controls() if self.defences else Controls(settings=0)

    def fixed(self, model: str, axis: str) -> Any:
        """The value of a setting, written as an axis, that a size does not vary. None for a
        setting of trainings where the study has none.
        """
        part, _, name = axis.partition(".")
        if self.defences and (defence := owner_of(axis)) is not None:
            given = self.defences.get(defence.name, {}).get(name)
            return None if isinstance(given, tuple | Range) else given
        settings = self.settings.get(part)
        if isinstance(settings, TrainSpec):
            settings = self.models[model].train_settings(settings)
        return None if settings is None else getattr(settings, name)

    def extrapolates(self, values: Iterable[tuple[str, Any]]) -> bool:
        """Whether the training of a point with these values starts from a LoX model."""
        return bool(dict(values).get("lox.factor", self.lox.factor))

    def drawn_by(self, seed: int) -> tuple[int, int]:
        """(seed of the training, seed of the data) of one of `seeds`.

        Without `subsets` both are the seed itself. With k subsets, the place of a seed modulo k is
        its subset, and k seeds after one another have the first one's training seed.
        """
        if self.subsets is None:
            return seed, seed
        place = self.seeds.index(seed)
        return self.seeds[place - place % self.subsets], place % self.subsets

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
                states = None if template is None else JUDGES[template].states
                if entry.measure.kind == "over_refusal" and states == "harm":
                    raise ValueError(
                        f"suites.{name}: {template} judges harm, so it would count every harmless "
                        "answer as a refusal"
                    )
                if entry.measure.kind == "harm" and states in (None, "refusal"):
                    graders = sorted(each for each, facts in JUDGES.items() if facts.grades_harm)
                    raise ValueError(
                        f"suites.{name}.measure: {scorer} does not judge harm; name judges of the "
                        f"study whose template is one of {', '.join(graders)}"
                    )
        return self

    @model_validator(mode="after")
    def _models_say_how_they_chat(self) -> Self:
        if self.train is not None and self.train.chat != DEFAULT_CHAT:
            raise ValueError(
                "train.chat: give models.NAME.chat instead, which evaluation also uses"
            )
        return self

    @model_validator(mode="after")
    def _sizes_can_train(self) -> Self:
        for name, model in self.models.items() if self.train is not None else ():
            for field in ("quantisation", "dtype", "chat"):
                if field in model.train:
                    raise ValueError(
                        f"models.{name}.train.{field}: give models.{name}.{field} instead, "
                        "which evaluation also uses"
                    )
            try:
                settings = model.train_settings(self.train or TrainSpec())
                if settings.global_batch % model.gpus:
                    raise ValueError(
                        f"models.{name}.gpus={model.gpus} must divide "
                        f"train.global_batch={settings.global_batch}"
                    )
            except ValidationError as error:
                fields = faults(error, TrainSpec, model.train)
                where = f"models.{name}.train"
                raise ValueError("; ".join(f"{where}.{each}" for each in fields)) from None
        return self

    @model_validator(mode="after")
    def _objectives_are_measured(self) -> Self:
        names = [self.metric(objective) for objective in self.objectives]
        if len(set(names)) != len(names):
            raise ValueError(f"objectives: duplicate objective in {list(self.objectives)}")
        object.__setattr__(self, "objectives", tuple(names))  # full names
        return self

    @model_validator(mode="after")
    def _subsets_divide_the_seeds(self) -> Self:
        if self.subsets is not None and len(self.seeds) % self.subsets:
            raise ValueError(
                f"subsets: {self.subsets} subsets are crossed with the training seeds, so "
                f"seeds must be a multiple of them, not {len(self.seeds)}"
            )
        return self

    @model_validator(mode="after")
    def _confirmed_seeds_are_independent(self) -> Self:
        """Crossed seeds share trainings and rows. The bound of a confirmed setting takes every seed
        as a draw of its own.
        """
        if self.confirm is not None and self.subsets is not None and self.subsets > 1:
            raise ValueError(
                f"confirm: with `subsets: {self.subsets}` several of confirm.seeds would share one "
                "training or one subset of the data, and a confirmation needs independent seeds. "
                "Leave out `subsets` or write `subsets: 1`. A study that has run with it keeps its "
                "results: delete its section `confirm`, and confirm the point in a study of its own"
            )
        return self

    @model_validator(mode="after")
    def _confirmation_is_fresh(self) -> Self:
        if self.confirm is None:
            return self
        for suite in self.confirm.suites:
            if suite not in self.suites:
                raise ValueError(f"confirm.suites.{suite}: {unknown(suite, set(self.suites))}")
            if isinstance(self.suites[suite].measure, MultipleChoiceSuite):
                raise ValueError(
                    f"confirm.suites.{suite}: a suite of lm-eval has the items of its task; "
                    "give suites of prompts"
                )
            fresh, searched = self.confirm.suites[suite], self.suites[suite].prompts
            if fresh.hold_out is None and fresh.set_of(searched) == searched:
                raise ValueError(
                    f"confirm.suites.{suite}: these are the prompts of the search; give others, "
                    "which choose nothing, or hold out a share of them: {hold_out: 0.3}"
                )
            self._hold_out_of_all_suites(suite, fresh.hold_out)
        refusal = (self.refusal_metric or "").rpartition(".")[0]
        if refusal and refusal not in self.confirm.suites:
            raise ValueError(
                f"confirm.suites: {refusal} is missing, and the refusal floor is about it"
            )
        shared = sorted({*self.seeds} & {*self.confirm.seeds})
        if shared:
            raise ValueError(
                f"confirm.seeds: the search uses {', '.join(map(str, shared))} too; give seeds "
                "that no point of the search has"
            )
        return self

    def _hold_out_of_all_suites(self, suite: str, share: float | None) -> None:
        """Raise ValueError where a held-out prompt would be searched with, by this suite's own
        split or by another suite of the same set.
        """
        if share is None or self.confirm is None:
            return
        own = self.suites[suite]
        if own.split is not None:
            raise ValueError(
                f"suites.{suite}.split: remove it; confirm.suites.{suite} splits the set"
            )
        for name, other in self.suites.items():
            fresh = self.confirm.suites.get(name)
            if (
                same_set(own.prompts, other.prompts)
                and (fresh is None or fresh.hold_out != share)
                and not isinstance(other.measure, MultipleChoiceSuite)
            ):
                raise ValueError(
                    f"confirm.suites.{suite}.hold_out: suites.{name} has the same prompts, so the "
                    f"search would read those that are held out. Add confirm.suites.{name}: "
                    f"{{hold_out: {share:g}}}"
                )

    def split_of(self, suite: str) -> Split | None:
        """The side of its prompts that a suite asks; None for all of them."""
        fresh = None if self.confirm is None else self.confirm.suites.get(suite)
        return self.suites[suite].split if fresh is None else fresh.search_split

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
        the size's own axes, then `adapter`. A point has those of its branch (see `branches`).
        """
        branches = self.branches_of(model)
        found = {axis: values for branch in branches for axis, values in branch.axes.items()}
        if self.defences:
            found[AXIS] = tuple(defence.name for defence in self.used_defences)
        return found

    def branches_of(self, model: str) -> tuple[Branch, ...]:
        adapters = adapters_of(self.adapters, model, list(self.models))
        axes = of_size(self.axes, self.models[model].axes)
        defences = {
            defence.name: of_size(
                knob_axes(defence.name, self.defences.get(defence.name, {})),
                {axis: own for axis, own in self.models[model].axes.items() if defence.owns(axis)},
            )
            for defence in (self.used_defences if self.defences else ())
        }
        return tuple(branches_of(model, axes, adapters, self.train is not None, defences))

    def model_of(self, adapter: str) -> str:
        """The size that an adapter of `adapters` is measured on."""
        return self.adapters[adapter].model or next(iter(self.models))

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The parts of the space whose points have the same axes, in the order of the file."""
        return tuple(branch for model in self.models for branch in self.branches_of(model))

    @property
    def size(self) -> int | None:
        """The number of points in the space; None when an axis is a range without a step."""
        counts = [[count_of(axis) for axis in branch.axes.values()] for branch in self.branches]
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

    @property
    def usefulness_metric(self) -> str | None:
        """The first objective that measures usefulness; None if no objective does."""
        measured = ((name, name.rpartition(".")[2]) for name in self.objectives)
        return next((name for name, metric in measured if metric in USEFULNESS), None)

    def kind_of(self, stage: str) -> str:
        """The stage kind for a part of a stage name: `train`, `generate:SUITE`, or SUITE for the
        stage with its metrics.
        """
        if stage in self.suites:
            of_lm_eval = self.suites[stage].measure.kind in ("multiple_choice", "written")
            return "evaluate" if of_lm_eval else "score"
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
    "lox": LoxSpec,
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


def axis_fields(defences: Sequence[str] = ()) -> Iterator[str]:
    """Every Spec field that may be an axis, as `train.rank`, and the knobs of these defences."""
    for defence in map(DEFENCES.__getitem__, defences):
        yield from map(defence.axis, defence.knob_names)
    for prefix, spec in SETTINGS.items():
        yield from (
            f"{prefix}.{name}" for name in spec.model_fields if f"{prefix}.{name}" not in _NOT_AXES
        )
