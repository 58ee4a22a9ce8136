"""From a point to its stages: model -> train -> both stages of the defence -> each suite.

ebbline.sweeps.state.outcome reads the measurements of these stages.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import TypeVar

from pydantic import ValidationError

from ebbline.cluster.executors.executor import Needs
from ebbline.cluster.schedule.needs import default_needs
from ebbline.sweeps.study.adapters.kept import keep, kept_path
from ebbline.sweeps.study.adapters.reference import AdapterFolder
from ebbline.sweeps.study.defended.named import message_of
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.pins import require_pins
from ebbline.sweeps.study.points import (
    INVALID,
    OF_TRAINING,
    Point,
    StageName,
    Value,
    adapter_of,
    brought,
    defence_of,
    own_seeds,
    training_of,
)
from ebbline.sweeps.study.references import Data, DataRef, Hub, Local, ModelRef
from ebbline.sweeps.study.study import Judge, Model, Study
from ebbline.sweeps.study.suites import blocks_of, stages_of
from ebbline.tasks.defences.controls.registry import control_named
from ebbline.tasks.defences.defence import Defence
from ebbline.tasks.errors import PinError, ProjectionError, StudyError
from ebbline.tasks.identity import digest
from ebbline.tasks.models.brought.work import as_training
from ebbline.tasks.specs import (
    DEFAULT_CHAT,
    AdapterSpec,
    ApplySpec,
    Block,
    Chat,
    ConvertSpec,
    DataSpec,
    DefendSpec,
    Dtype,
    JudgeSpec,
    LanguageSpec,
    LoxSpec,
    OrganismSpec,
    Spec,
    TrainSpec,
)
from ebbline.tasks.stage import Input, Part, Source, Stage, stage_of

S = TypeVar("S", bound=Spec)
CACHED_ADAPTERS = 4096  # adapters whose stages are kept


@dataclass(frozen=True)
class Family:
    """The models of one size, as inputs of stages. A defence compares `aligned` with `unaligned`,
    by default the base. Without it nothing is projected.
    """

    aligned: Input
    unaligned: Input | None


class StageGraph:
    """The stages of each point of a study. Pins are checked once, at construction. Points share
    equal stages.

    With `located` false, pins of outside content are used without looking for the content, for
    callers that only need keys.
    """

    def __init__(self, study: Study, home: Home, located: bool = True) -> None:
        require_pins(study)
        self._located = located
        self.study, self.home = study, home
        self._language = Stage(LanguageSpec(seed=study.language))
        self._needs: dict[str, Needs] = {}
        self._found: dict[tuple[Local | Hub, str], Source] = {}
        self.labels: dict[str, str] = {}
        self._adapters: dict[tuple[str, tuple[tuple[str, Value], ...], int], dict[str, Stage]] = {}
        self._judges = {
            name: (
                judge.settings,
                self._judge_inputs(judge),
            )
            for name, judge in study.judges.items()
        }
        self._families = {name: self._family(name, model) for name, model in study.models.items()}
        self._defences = {each.name: study.defence_specs(each) for each in study.used_defences}
        self._initial = dict(self.labels), dict(self._needs)

    def fresh_copy(self) -> "StageGraph":
        """A graph of the same study with its own caches: for points that may never be proposed."""
        found = copy(self)
        labels, needs = self._initial
        found.labels, found._needs, found._adapters = dict(labels), dict(needs), {}
        return found

    def needs_of(self, stage: Stage) -> Needs:
        """The resources that a stage needs: its size's gang for a point's training, and its size's
        labels for any stage on a GPU.

        A judge ignores the labels of the size: it is another model.
        """
        found = self._needs.get(stage.lineage)
        return default_needs(stage) if found is None else found

    def baselines(self) -> dict[str, dict[str, Stage]]:
        """Model -> suite -> the stage that measures the aligned model before fine-tuning."""
        found: dict[str, dict[str, Stage]] = {}
        for name in self._families:
            found[name] = {}
            for suite in self.study.suites:
                stages = self._suite_stages(name, suite, None)
                self._place(name, stages.values())
                found[name][suite] = stages[suite]
                for part, stage in stages.items():
                    self.labels.setdefault(stage.lineage, f"{part} {name} before fine-tuning")
        return found

    def stages_for(self, point: Point) -> dict[str, Stage]:
        """Stage name (see ebbline.sweeps.study.points.StageName) -> stage, for every replicate of a
        point, all blocks of raced suites included.
        """
        stages: dict[str, Stage] = {}
        for seed in (seeds := own_seeds(self.study.seeds, point)):
            own = self._seed_stages(point, seed)
            above = self._adapter_stages(point, seed)
            self._place(point.model, own.values())
            for name, stage in own.items():
                stages[sys.intern(str(replace(name, seed=seed)))] = stage
                shown = (
                    training_of(point)
                    if name.part in OF_TRAINING
                    else adapter_of(point)
                    if name.part in above
                    else point
                )
                self.labels.setdefault(
                    stage.lineage,
                    f"{name.part} {shown}" + (f" seed={seed}" if len(seeds) > 1 else ""),
                )
        return stages

    def forget(self, lineages: Iterable[str]) -> None:
        """Forget stages, with their needs and labels, until a point has them again; those of models
        are set once.
        """
        labels, needs = self._initial
        gone = set(lineages) - labels.keys() - needs.keys()
        for lineage in gone:
            self._needs.pop(lineage, None)
            self.labels.pop(lineage, None)
        self._adapters = {
            adapter: stages
            for adapter, stages in self._adapters.items()
            if gone.isdisjoint(stage.lineage for stage in stages.values())
        }

    def label(self, stage: Stage) -> str:
        """The label of a stage on screen: its part and the settings that it depends on, without the
        settings that only change what comes after it.
        """
        return self.labels.get(stage.lineage, stage.kind)

    def _seed_stages(self, point: Point, seed: int) -> dict[StageName, Stage]:
        parts = self._adapter_stages(point, seed)
        makes = defence_of(point).makes.KIND
        stages = {StageName(name, seed): stage for name, stage in parts.items()}
        defended = self._made(point, parts)
        stages[StageName(makes, seed)] = defended
        adapter = _adapter_in({makes: defended})
        return stages | self._measured(point, seed, adapter, list(self.study.suites))

    def _made(self, point: Point, parts: Mapping[str, Stage]) -> Stage:
        """The stage that makes the point's adapter from the stages of `_adapter_stages`."""
        defence = defence_of(point)
        inputs: dict[str, Input] = {
            "adapter": _adapter_in(parts),
            defence.measured_input: parts[defence.measures.KIND],
        }
        if defence.method is not None and defence.method.reads_safety:
            inputs["safety"] = _adapter_in({AdapterSpec.KIND: self._safety(point.model)})
        return Stage(self._specs(defence, dict(point.values))[1], inputs)

    def control_stages(self, point: Point, control: str, draw: int | None) -> dict[str, Stage]:
        """Stage name -> stage, for every replicate of a control of a point's defence. A control is
        measured by the suites of the objectives and of the refusal rate alone.
        """
        stages: dict[str, Stage] = {}
        defence, values = defence_of(point), dict(point.values)
        for seed in (seeds := own_seeds(self.study.seeds, point)):
            parts = dict(self._adapter_stages(point, seed))
            specs = self._specs(defence, values)
            if control_named(control).rotates:
                rotated = defence.rotated(specs, self.study.used_controls.draws)
                given = parts[defence.measures.KIND].inputs
                inputs = {**given, **self._models(point.model)}
                parts[rotated.KIND] = Stage(rotated, inputs)
                measured = parts[rotated.KIND]
            else:
                measured = parts[defence.measures.KIND]
            read: dict[str, Input] = {"adapter": _adapter_in(parts), "measurement": measured}
            if defence.method is not None and defence.method.reads_safety:
                read["safety"] = _adapter_in({AdapterSpec.KIND: self._safety(point.model)})
            made = Stage(defence.controlled(specs, control, draw), read)
            named = {StageName(name, seed): stage for name, stage in parts.items()}
            named[StageName(DefendSpec.KIND, seed)] = made
            adapter = _adapter_in({DefendSpec.KIND: made})
            named |= self._measured(point, seed, adapter, self._main_suites())
            self._place(point.model, named.values())
            what = control if draw is None else f"{control} {draw}"
            for name, stage in named.items():
                stages[sys.intern(str(replace(name, seed=seed)))] = stage
                own = f" seed={seed}" if len(seeds) > 1 else ""
                self.labels.setdefault(stage.lineage, f"{name.part} {what} of {point}{own}")
        return stages

    def _models(self, model: str) -> dict[str, Input]:
        """The two models that a defence compares; none without a base."""
        family = self._families[model]
        if family.unaligned is None:
            return {}
        return {"base": family.unaligned, "aligned": family.aligned}

    def _specs(self, defence: Defence, values: Mapping[str, Value]) -> tuple[Spec, Spec]:
        """The Specs of a defence's two stages. Raises StudyError for invalid settings."""
        own = {axis: value for axis, value in values.items() if defence.owns(axis)}
        try:
            return defence.with_values(self._defences[defence.name], own)
        except (ProjectionError, ValidationError) as error:
            raise StudyError(f"{defence.name} with {own}: {message_of(error)}") from None

    def _safety(self, model: str) -> Stage:
        """The stage that checks a size's safety adapter."""
        reference = self.study.models[model].safety
        if reference is None:
            raise StudyError(f"models.{model}.safety is missing: the adapter to merge with")
        source = self._outside(reference.path or reference.hub, "model")
        return Stage(AdapterSpec(), {"source": source, "model": self._families[model].aligned})

    def _main_suites(self) -> list[str]:
        """The suites of the objectives and of the refusal rate."""
        refusal = self.study.refusal_metric
        main = {name.rpartition(".")[0] for name in (*self.study.objectives, refusal or "")}
        return [suite for suite in self.study.suites if suite in main]

    def _measured(
        self, point: Point, seed: int, defended: Input, suites: Sequence[str]
    ) -> dict[StageName, Stage]:
        """The stages that measure an adapter with these suites."""
        stages = dict[StageName, Stage]()
        parts = self._adapter_stages(point, seed)
        adapted = (parts.get(TrainSpec.KIND) or parts[AdapterSpec.KIND]).inputs["model"]
        for suite in suites:
            entry = self.study.suites[suite]
            blocks: list[Block] | list[None] = blocks_of(entry.measure) or [None]
            for block in blocks:
                own = self._suite_stages(
                    point.model, suite, defended, block, brought(point), adapted
                )
                for name, stage in own.items():
                    stages[StageName(name, seed, None if block is None else block.index)] = stage
        return stages

    def _adapter_stages(self, point: Point, seed: int) -> dict[str, Stage]:
        """The stages that all settings of a defence's knobs share; cached, because points of one
        adapter follow each other.
        """
        values = dict(adapter_of(point).values)
        cached = point.model, tuple(values.items()), seed
        if cached not in self._adapters:
            family = self._families[point.model]
            name = brought(point)
            made, lora = (
                self._trained(point.model, values, seed)
                if name is None
                else self._brought(name, family)
            )
            defence = defence_of(point)
            kind = defence.measures.KIND
            first_spec = self._specs(defence, values)[0]
            inputs = self._defence_inputs(defence, family, first_spec, lora)
            first_stage = Stage(first_spec, {"adapter": _adapter_in(made), **inputs})
            shared = {name: stage for name, stage in inputs.items() if isinstance(stage, Stage)}
            if len(self._adapters) >= CACHED_ADAPTERS:
                self._adapters.clear()
            self._adapters[cached] = {**made, **shared, kind: first_stage}
        train = self._adapters[cached].get(TrainSpec.KIND)
        if train is not None:
            model = self.study.models[point.model]
            self._needs[train.lineage] = Needs(model.gpus, model.labels, model.spread)
        return self._adapters[cached]

    def _trained(
        self, name: str, values: Mapping[str, Value], seed: int
    ) -> tuple[dict[str, Stage], TrainSpec]:
        """The stages that train an adapter, and the settings of its training."""
        if self.study.data is None or self.study.train is None:
            raise StudyError("the study has no `train`, so its points are those of `adapters`")
        model = self.study.models[name]
        of_training, of_data = self.study.drawn_by(seed)
        drawn = _with(self.study.data.settings, "data", values, seed=of_data)
        data = self._data(self.study.data, drawn)
        given = model.train_settings(self.study.train)
        settings = _of_length(given, values, of_training, drawn.size).without_idle_settings()
        family = self._families[name]
        started, extrapolated = self._started(family, values)
        inputs = {"model": started, "data": Part(data, DataSpec.ROWS)}
        if settings.reads_alignment and family.unaligned is not None:
            inputs |= {"base": family.unaligned, "aligned": family.aligned}
        train = Stage(settings, inputs)
        if settings.method == "full":
            raise StudyError(
                "a point's train.method must be 'lora': defences change adapters; `tuned` models "
                "may be full"
            )
        return {"data": data, **extrapolated, "train": train}, settings

    def _started(
        self, family: Family, values: Mapping[str, Value]
    ) -> tuple[Input, dict[str, Stage]]:
        """The model that a point's training starts from, and the stage that makes it: the aligned
        model, or LoX of it.
        """
        settings = _with(self.study.lox, LoxSpec.KIND, values)
        if settings.factor == 0 or family.unaligned is None:
            return family.aligned, {}
        models = {"model": family.aligned, "base": family.unaligned}
        lox = Stage(settings, models)
        return Part(lox, LoxSpec.MODEL), {LoxSpec.KIND: lox}

    def _brought(self, name: str, family: Family) -> tuple[dict[str, Stage], TrainSpec]:
        """The stage of an adapter from outside, and its rank and modules as training settings."""
        reference = self.study.adapters[name]
        source = self._outside(reference.path or reference.hub, "model")
        adapter = Stage(
            AdapterSpec(tokenizer=reference.tokenizer),
            {"source": source, "model": family.aligned},
        )
        return {AdapterSpec.KIND: adapter}, as_training(source.location)

    def _defence_inputs(
        self, defence: Defence, family: Family, first_spec: Spec, train: TrainSpec
    ) -> dict[str, Input]:
        """The inputs of a defence's first stage beside the adapter: the two models, or one stage
        over them that all adapters share.
        """
        if family.unaligned is None or not defence.reads_models:
            return {}
        models: dict[str, Input] = {"base": family.unaligned, "aligned": family.aligned}
        shared = defence.shared(first_spec, train)
        return models if shared is None else {shared.KIND: Stage(shared, models)}

    def _suite_stages(
        self,
        name: str,
        suite: str,
        adapter: Input | None,
        block: Block | None = None,
        brought_as: str | None = None,
        adapted: Input | None = None,
    ) -> dict[str, Stage]:
        """The stages of one suite, or of one of its blocks, on a model with an adapter; without an
        adapter before fine-tuning. `brought_as` is the adapter's name in `adapters`, `adapted` the
        model that it was trained on, by default the aligned one.
        """
        model, entry = self.study.models[name], self.study.suites[suite]
        inputs: dict[str, Input] = {
            "model": adapted or self._families[name].aligned,
            "prompts": self.rows(entry.prompts),
        }
        if adapter is not None:
            inputs["adapter"] = adapter
        loading: dict[str, object] = {
            "quantisation": model.quantisation,
            "dtype": model.dtype,
            "chat": model.chat,
        }
        if brought_as is not None and self.study.adapters[brought_as].tokenizer == "adapter":
            loading["tokenizer"] = "adapter"
        return stages_of(
            suite,
            entry.measure,
            inputs,
            loading,
            self._judges,
            block,
            self.study.split_of(suite),
        )

    def _place(self, name: str, stages: Iterable[Stage]) -> None:
        """Set the labels of a size on its stages on GPUs. A stage that two sizes share has the
        labels of the first in the file.
        """
        for stage in stages:
            if stage.lineage not in self._needs:
                needs = default_needs(stage)
                own = needs.gpus > 0 and not isinstance(stage.spec, JudgeSpec)
                self._needs[stage.lineage] = (
                    replace(needs, labels=self.study.models[name].labels) if own else needs
                )
                self._place(name, stage.upstream())

    def _family(self, name: str, model: Model) -> Family:
        base = None if model.base is None else self._model(model.base, model.dtype, None)
        aligned = self._model(model.aligned, model.dtype, base, model.chat)
        unaligned = (
            base
            if model.unaligned is None
            else self._model(model.unaligned, model.dtype, aligned, model.chat)
        )
        for item, role in ((base, "base"), (aligned, "aligned"), (unaligned, "unaligned")):
            if item is not None and (stage := stage_of(item)) is not None:
                self.labels.setdefault(stage.lineage, f"{role} model {name}")
                self._place(name, [stage])
        return Family(aligned, unaligned)

    def _model(
        self,
        reference: ModelRef,
        dtype: Dtype,
        start: Input | None,
        chat: Chat = DEFAULT_CHAT,
    ) -> Input:
        """The model of a reference; a tuned one is trained from `start`, with the chat settings of
        its size.
        """
        tuned = reference.tuned
        if tuned is not None:
            if start is None:
                raise StudyError(
                    "`base` cannot be `tuned`: a tuned model starts from another model"
                )
            data = self._data(tuned.data, tuned.data.settings)
            settings = tuned.train.model_copy(update={"chat": chat})
            return Part(
                Stage(settings, {"model": start, "data": Part(data, DataSpec.ROWS)}),
                TrainSpec.MODEL,
            )
        if reference.organism is not None:
            return Part(Stage(reference.organism, {"language": self._language}), OrganismSpec.MODEL)
        if reference.gguf is not None:
            source = self._outside(reference.gguf, "model")
            return Part(Stage(ConvertSpec(dtype=dtype), {"source": source}), ConvertSpec.MODEL)
        return self._outside(reference.path or reference.hub, "model")

    def _judge_inputs(self, judge: Judge) -> dict[str, Input]:
        """The weights of a judge; empty for one at an endpoint."""
        if judge.model is None:
            return {}
        found = {"model": self._model(judge.model, judge.settings.dtype, None)}
        if judge.adapter is not None:
            found["adapter"] = self._outside(judge.adapter.path or judge.adapter.hub, "model")
        return found

    def _data(self, data: Data, settings: DataSpec) -> Stage:
        inputs = {"pool": self.rows(data.pool)}
        if settings.mix_share > 0:
            if data.mix is None:
                raise StudyError(
                    f"data.mix_share is {settings.mix_share}, but data.mix names no second set"
                )
            inputs["mix"] = self.rows(data.mix)
        return Stage(settings, inputs)

    def rows(self, reference: DataRef) -> Input:
        """The rows of a reference, as stages read them."""
        if reference.language is not None:
            return Part(self._language, reference.language)
        return self._outside(reference.path or reference.hub, "dataset")

    def _outside(self, reference: Local | Hub | None, repo_type: str) -> Source:
        if reference is None or reference.sha256 is None:
            raise PinError(f"{reference} is not pinned")
        if (reference, repo_type) not in self._found:
            self._found[reference, repo_type] = self._look_for(
                reference, reference.sha256, repo_type
            )
        return self._found[reference, repo_type]

    def _look_for(self, reference: Local | Hub, sha256: str, repo_type: str) -> Source:
        if isinstance(reference, Hub):
            file = f"#{reference.file}" if reference.file else ""
            content = digest({"commit": reference.commit, "files": sha256, "file": reference.file})
            return Source(content, f"hub:{repo_type}:{reference.id}@{reference.commit}{file}")
        is_adapter = isinstance(reference, AdapterFolder)
        if not self._located:
            copy = kept_path(self.home.root, sha256)
            return Source(sha256, str(copy) if is_adapter else reference.path)
        path = reference.located()
        found = reference.content(self.home.digests)
        if found != sha256:
            found = reference.content_now()  # the remembered digests may be what is damaged
        if found != sha256:
            raise PinError(
                f"{path} differs from its pin: its sha256 is {found}, the study has {sha256}."
                " Restore the file, or pin the new content with `ebbline pin`"
            )
        if is_adapter:
            path = keep(path, self.home.root, sha256)
        return Source(found, str(path.resolve()))


def _adapter_in(stages: Mapping[str, Stage]) -> Input:
    """The adapter of the first stage that has one: a defence's, an adapter from outside, or that of
    a training. `apply` writes nothing else.
    """
    if ApplySpec.KIND in stages:
        return stages[ApplySpec.KIND]
    for spec in (DefendSpec, AdapterSpec, TrainSpec):
        if spec.KIND in stages:
            return Part(stages[spec.KIND], spec.ADAPTER)
    raise ValueError(f"none of {sorted(stages)} makes an adapter")


def stages_or_reason(graph: StageGraph, point: Point) -> tuple[dict[str, Stage], str]:
    """A point's stages by name, or the reason why its settings are invalid."""
    try:
        return graph.stages_for(point), ""
    except StudyError as error:
        return {}, f"{INVALID}{error}"


def of_seeds(study: Study, stages: Mapping[str, Stage], seeds: int) -> dict[str, Stage]:
    """The stages of the study's first `seeds` seeds."""
    included = set(study.seeds[:seeds])
    return {name: stage for name, stage in stages.items() if StageName.parse(name).seed in included}


def _of_length(train: TrainSpec, values: Mapping[str, Value], seed: int, rows: int) -> TrainSpec:
    """The training settings of a point. On an axis `train.steps`, steps replace the epochs; `null`
    leaves the epochs. If both give one number of steps, it is one training, written in epochs.
    """
    steps = values.get("train.steps")
    if steps is None or train.steps is not None or "train.epochs" in values:
        return _with(train, "train", values, seed=seed)
    by_epochs = _with(train, "train", {**values, "train.steps": None}, seed=seed)
    if by_epochs.length(rows) == steps:
        return by_epochs
    return _with(train, "train", {**values, "train.epochs": 1.0}, seed=seed)


def _with(spec: S, prefix: str, values: Mapping[str, Value], **fixed: Value) -> S:
    """The settings with a point's values for `prefix`. Raises StudyError for an invalid value."""
    changes = {
        axis.partition(".")[2]: value
        for axis, value in values.items()
        if axis.startswith(f"{prefix}.")
    }
    try:
        return type(spec).model_validate({**spec.model_dump(), **changes, **fixed})
    except ValidationError as error:
        raise StudyError(f"{prefix} with {changes}: {error.errors()[0]['msg']}") from None
