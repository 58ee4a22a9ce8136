"""Predicts the seconds of stages from their counted work and from measurements in the store.

A record has the measured seconds of a stage, its GPUs and its counted work. The prediction for a
stage is its counted seconds (ebbline.cluster.schedule.counted_work) times a factor: measured over
counted seconds, in the narrowest category that has measurements. During a run it is also multiplied
by the run's pace (ebbline.cluster.schedule.pace).
"""

import itertools
import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

from ebbline.cluster.executors.choice import DEFAULT_EXECUTOR
from ebbline.cluster.executors.executor import Capacity, Needs
from ebbline.cluster.executors.starts import StartCosts, Starts
from ebbline.cluster.schedule.costs import named_type
from ebbline.cluster.schedule.counted_work import load_of, machine_of, seconds_on
from ebbline.cluster.schedule.digest_set import DigestSet
from ebbline.cluster.schedule.needs import default_needs
from ebbline.cluster.schedule.pace import Pace
from ebbline.cluster.store.artifacts import Artifact, Store
from ebbline.tasks.defences.in_use import MAKERS
from ebbline.tasks.kinds import STAGE_KINDS, kind_named
from ebbline.tasks.models.model_work import guessed_models
from ebbline.tasks.specs import GenerateSpec
from ebbline.tasks.stage import Stage
from ebbline.tasks.stage_kind import Load

REMEMBERED = 200  # the latest measurements of a category
READ = 1000  # records of a kind; in key order, which is random because keys are hashes
NEAR = (0.25, 4.0)  # counted work of a measured stage that a guessed one can be compared with
ENOUGH = 10  # the fewest defended adapters for a share of distinct ones
Category = tuple[Any, ...]
Latest: TypeAlias = "array[float]"
"""At most REMEMBERED measurements, oldest first: many categories have one or two."""


class Estimates:
    """Predicted seconds of stages, and of the starts of jobs. `learn` adds measurements of a run.

    `gpu_type` is the expected GPU type of stages whose labels name none. `start_costs` are the
    executor's. The store is read at the first use, because a finished study needs no prediction;
    then `and_starts` learns the starts of jobs.
    """

    def __init__(
        self,
        store: Store,
        gpu_type: str | None = None,
        start_costs: StartCosts = DEFAULT_EXECUTOR.start_costs,
        and_starts: Callable[["Estimates"], None] = lambda estimates: None,
    ) -> None:
        self.gpu_type = gpu_type
        self._store, self._and_starts = store, and_starts
        self._is_read = False
        self._starts = Starts(start_costs)
        self.seconds_by_key: dict[str, float] = {}  # measured, of the records of earlier runs
        self.generations: set[str] = set()  # keys, of the same records
        self._learnt = DigestSet()  # keys
        # Category -> counted seconds -> measured over counted seconds
        self._factors: dict[Category, dict[float, Latest]] = defaultdict(dict)
        # Measured seconds of records without counted work
        self._uncounted: dict[Category, Latest] = defaultdict(_none)
        self._loads: dict[str, Load] = {}
        self._guessed: dict[str, bool] = {}
        # Equal categories and counted work mean equal predictions: (these, by number), and by
        # lineage and (GPUs, their type) the number of a stage
        self._next_number = itertools.count()
        self._alike: dict[int, tuple[tuple[Category, ...], float]] = {}
        self._numbers: dict[tuple[tuple[Category, ...], float], int] = {}
        self._number_of: dict[str, dict[tuple[int, str | None], int]] = defaultdict(dict)
        self._predictions: dict[int, float] = {}  # by number, until the next measurement
        self._adapters, self._defended = DigestSet(), 0  # contents, and how many adapters had them
        # The same of this run. Those of earlier runs count times its pace, these as they are
        self._of_run = self._factors  # until the earlier ones are read
        self._paces: dict[Category, Pace] = defaultdict(Pace)

    def _read(self) -> None:
        if not self._is_read:
            self._is_read = True
            for kind in STAGE_KINDS:
                for artifact in itertools.islice(self._store.all(kind), READ):
                    self.seconds_by_key[artifact.key] = _measured_s(artifact)
                    if kind == GenerateSpec.KIND:
                        self.generations.add(artifact.key)
                    self._learn(artifact)
            self._of_run = defaultdict(dict)
            self._and_starts(self)

    @property
    def starts(self) -> Starts:
        """The overheads of starting jobs."""
        self._read()
        return self._starts

    def learn_gpu_type(self, capacity: Capacity) -> None:
        """Use the cluster's most common GPU type for stages whose labels name none."""
        types: Counter[str | None] = Counter()
        for host in capacity.hosts:
            types[host.gpu_type] += host.gpus
        commonest = max(types, key=lambda name: (types[name], name or ""), default=None)
        if commonest != self.gpu_type:
            self.gpu_type = commonest
            self._predictions.clear()

    def learn(self, artifacts: Iterable[Artifact]) -> None:
        """Add the measurements of records. A record that is given twice counts once."""
        self._read()
        for artifact in artifacts:
            self._learn(artifact)

    def _learn(self, artifact: Artifact) -> None:
        key = bytes.fromhex(artifact.key)
        if key in self._learnt:
            return
        self._learnt.add(key)
        provenance, seconds = artifact.provenance, _measured_s(artifact)
        gpus, gpu_type = int(provenance.get("gpus", 0)), provenance.get("gpu_type")
        if artifact.kind in MAKERS:
            self._adapters.add(bytes.fromhex(artifact.content))
            self._defended += 1
        categories = _categories(artifact.kind, artifact.hashed["spec"], gpus, gpu_type)
        if "load" not in provenance:
            for category in categories:
                _remember(self._uncounted[category], seconds)
        else:
            counted = _counted(Load(**provenance["load"]), gpus, gpu_type)
            *own, machine = categories
            predicted_by = next((each for each in own if each in self._factors), None)
            # A generation's seconds are its share of a group, a packed training's those of a pack:
            # with other neighbours they differ although the machine is the same
            shared = artifact.kind == GenerateSpec.KIND or "packed" in provenance
            if self._of_run is not self._factors and predicted_by is not None and not shared:
                usual_s = counted * _interpolated(self._factors[predicted_by], counted)
                self._paces[machine].learn(usual_s, seconds)
            for category in categories:
                measured = self._of_run[category].setdefault(_rounded(counted), _none())
                _remember(measured, seconds / counted)
        self._predictions.clear()

    @property
    def pace(self) -> float:
        """How long this run's stages take, relative to earlier runs: of the type of machine that
        ran most of them. 1 before there are enough.
        """
        most = max(self._paces.values(), key=lambda pace: pace.stages, default=None)
        return 1.0 if most is None else most.factor

    @property
    def distinct_adapters(self) -> float:
        """The share of distinct contents among the defended adapters; 1 if there are fewer than
        ENOUGH.
        """
        self._read()
        return len(self._adapters) / self._defended if self._defended >= ENOUGH else 1.0

    def load(self, stage: Stage) -> Load:
        """The counted work of a stage, cached by its lineage."""
        if stage.lineage not in self._loads:
            self._loads[stage.lineage] = load_of(stage)
        return self._loads[stage.lineage]

    def seconds(self, stage: Stage, needs: Needs | None = None) -> float:
        """The predicted seconds of a stage. `needs` default to those of its kind."""
        self._read()
        gpus = (default_needs(stage) if needs is None else needs).gpus
        gpu_type = (None if needs is None else named_type(needs)) or self.gpu_type
        numbers = self._number_of[stage.lineage]
        number = numbers.get((gpus, gpu_type))
        if number is None:
            number = numbers[gpus, gpu_type] = self._number(stage, gpus, gpu_type)
        if number not in self._predictions:
            self._predictions[number] = self._seconds(*self._alike[number])
        return self._predictions[number]

    def forget(self, lineages: Iterable[str]) -> None:
        """Forget what was counted for stages that are not predicted any more."""
        for lineage in lineages:
            for kept in (self._loads, self._guessed, self._number_of):
                kept.pop(lineage, None)
        used = {number for numbers in self._number_of.values() for number in numbers.values()}
        for number in self._alike.keys() - used:
            del self._numbers[self._alike.pop(number)]
            self._predictions.pop(number, None)

    def budgeted(self, stage: Stage, needs: Needs) -> float:
        """The seconds that a budget counts before a stage starts: the predicted ones, or none while
        they rest on a guessed size of the model.
        """
        return 0.0 if self.guessed(stage, needs) else self.seconds(stage, needs)

    def guessed(self, stage: Stage, needs: Needs) -> bool:
        """Whether the model's size is a guess, and no stage of this kind with about the same
        counted work was measured.
        """
        self._read()
        if stage.lineage not in self._guessed:
            self._guessed[stage.lineage] = bool(guessed_models([stage]))
        if not self._guessed[stage.lineage]:
            return False
        gpu_type = named_type(needs) or self.gpu_type
        counted = _counted(self.load(stage), needs.gpus, gpu_type)
        *own, _ = _categories(stage.kind, vars(stage.spec), needs.gpus, gpu_type)
        return not any(
            NEAR[0] <= each / counted <= NEAR[1]
            for category in own
            for measured in (self._factors, self._of_run)
            for each in measured.get(category, ())
        )

    def measured(self, stage: Stage, needs: Needs) -> bool:
        """Whether the store has a measurement of the stage's kind."""
        self._read()
        gpu_type = named_type(needs) or self.gpu_type
        *own, _ = _categories(stage.kind, vars(stage.spec), needs.gpus, gpu_type)
        return any(
            category in measured
            for category in own
            for measured in (self._factors, self._of_run, self._uncounted)
        )

    def _number(self, stage: Stage, gpus: int, gpu_type: str | None) -> int:
        counted = _counted(self.load(stage), gpus, gpu_type)
        alike = tuple(_categories(stage.kind, vars(stage.spec), gpus, gpu_type)), counted
        if alike not in self._numbers:
            number = self._numbers[alike] = next(self._next_number)
            self._alike[number] = alike
        return self._numbers[alike]

    def _seconds(self, categories: Sequence[Category], counted: float) -> float:
        *own, machine = categories
        pace = self._paces[machine].factor if machine in self._paces else 1.0
        for category in own:
            if category in self._factors or category in self._of_run:
                return counted * self._factor(category, counted, pace)
        for category in own:
            if category in self._uncounted:
                return _mean(self._uncounted[category])
        if machine in self._factors or machine in self._of_run:
            return counted * self._factor(machine, counted, pace)
        return counted

    def _factor(self, category: Category, counted: float, pace: float) -> float:
        """The factor of a category for a work of `counted` seconds, from earlier runs and this."""
        earlier, now = self._factors.get(category, {}), self._of_run.get(category, {})
        near = _neighbours(earlier.keys() | now.keys(), counted)
        return _interpolated(
            {
                each: [*(pace * factor for factor in earlier.get(each, ())), *now.get(each, ())]
                for each in near
            },
            counted,
        )


def _none() -> Latest:
    return array("d")


def _remember(latest: Latest, measured: float) -> None:
    latest.append(measured)
    del latest[:-REMEMBERED]


def _measured_s(artifact: Artifact) -> float:
    return float(artifact.provenance.get("seconds", 0.0))


def load_record(load: Load) -> dict[str, float]:
    """A load as a record stores it."""
    return asdict(load)


def _counted(load: Load, gpus: int, gpu_type: str | None) -> float:
    """Seconds by the machine's rates alone. A stage without a GPU runs on a core."""
    return seconds_on(machine_of(gpu_type if gpus else None), load, gpus)


def _categories(
    kind: str, spec: Mapping[str, Any], gpus: int, gpu_type: str | None
) -> list[Category]:
    """The categories of a stage, the narrowest first. The last one has all stages on such a
    machine.
    """
    gpu_type = gpu_type if gpus else None
    own = kind_named(kind)
    alike = tuple(_plain_value(spec.get(name)) for name in own.alike)
    nearer = tuple(_plain_value(spec.get(name)) for name in own.nearer)
    return [
        (kind, alike, nearer, gpu_type, gpus),
        (kind, alike, gpu_type, gpus),
        (kind, alike, gpu_type),
        (kind, alike),
        (kind, gpu_type),
        (kind,),
        ("any", gpu_type, gpus > 0),
    ]


def _plain_value(value: Any) -> Any:
    return tuple(sorted(value)) if isinstance(value, list | tuple) else value


def _interpolated(factors: Mapping[float, Iterable[float]], counted: float) -> float:
    """The factor for a work of `counted` seconds: log-log interpolation between the next smaller
    and the next larger measured work. Beyond the ends it is constant.
    """
    below, above = _neighbours(factors, counted)
    if below >= above:
        return _mean(factors[below])
    share = math.log(counted / below) / math.log(above / below)
    low, high = _mean(factors[below]), _mean(factors[above])
    return (
        low
        if min(low, high) <= 0.0
        else math.exp((1 - share) * math.log(low) + share * math.log(high))
    )


def _neighbours(measured: Collection[float], counted: float) -> tuple[float, float]:
    """The next smaller and the next larger measured work; at the ends one of them twice."""
    below = max((each for each in measured if each <= counted), default=min(measured))
    above = min((each for each in measured if each >= counted), default=max(measured))
    return below, above


def _mean(values: Iterable[float]) -> float:
    """The mean. A median would ignore the model's load time, which only the first stage of a batch
    has.
    """
    listed = list(values)
    return sum(listed) / len(listed)


def _rounded(counted: float) -> float:
    """Rounded to two digits, so that stages with nearly equal work share measurements."""
    return float(f"{counted:.1e}")
