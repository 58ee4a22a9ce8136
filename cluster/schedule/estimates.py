"""How long stages will take: their counted work, times what the store has measured of the like.

A record says how many seconds a stage ran, on what, and what its work was. A stage to be is
expected to take its own work's seconds on a machine of its type
(ebbline.cluster.schedule.counted_work), times the factor between measured and counted seconds of
the nearest like that there is.
"""

import itertools
import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from ebbline.cluster.executors.choice import DEFAULT_EXECUTOR
from ebbline.cluster.executors.executor import Capacity, Needs
from ebbline.cluster.executors.starts import StartCosts, Starts
from ebbline.cluster.schedule.costs import named_type
from ebbline.cluster.schedule.counted_work import load_of, machine_of, seconds_on
from ebbline.cluster.schedule.needs import default_needs
from ebbline.cluster.store.artifacts import Artifact, Store
from ebbline.tasks.defences.in_use import DEFENCE
from ebbline.tasks.kinds import STAGE_KINDS, kind_named
from ebbline.tasks.stage import Stage
from ebbline.tasks.stage_kind import Load

REMEMBERED = 200  # the latest stages of a sort
READ = 1000  # records of a kind; keys are hashes, so the first of them are a fair sample
ENOUGH = 10  # applied adapters, to go by their share of distinct ones
Sort = tuple[Any, ...]


class Estimates:
    """Seconds that stages are expected to run, and jobs to start. `learn` takes in what has just
    been measured.

    `gpu_type` is what a stage is expected to run on whose labels name no type; `start_costs` are
    the executor's.
    """

    def __init__(
        self,
        store: Store,
        gpu_type: str | None = None,
        start_costs: StartCosts = DEFAULT_EXECUTOR.start_costs,
    ) -> None:
        self.gpu_type = gpu_type
        self.starts = Starts(start_costs)
        self.took: dict[str, float] = {}  # by key, of what has been read
        self._factors: dict[Sort, dict[float, deque[float]]] = defaultdict(
            dict
        )  # sort -> counted seconds -> measured over counted
        self._plain: dict[Sort, deque[float]] = defaultdict(
            lambda: deque(maxlen=REMEMBERED)
        )  # of records that do not say their work
        self._loads: dict[str, Load] = {}
        self._known: dict[tuple[str, int, str | None], float] = {}
        self._adapters: list[str] = []  # contents of applied adapters
        for kind in STAGE_KINDS:
            self.learn(itertools.islice(store.all(kind), READ))

    def met(self, capacity: Capacity) -> None:
        """Take the commonest type of the cluster's GPUs for that of stages whose labels name
        none.
        """
        types: Counter[str | None] = Counter()
        for host in capacity.hosts:
            types[host.gpu_type] += host.gpus
        commonest = max(types, key=lambda name: (types[name], name or ""), default=None)
        if commonest != self.gpu_type:
            self.gpu_type = commonest
            self._known.clear()

    def learn(self, artifacts: Iterable[Artifact]) -> None:
        """Take in records. One that is known already counts once."""
        for artifact in artifacts:
            if artifact.key in self.took:
                continue
            said = artifact.provenance
            seconds, gpus, gpu_type = (
                float(said.get("seconds", 0.0)),
                int(said.get("gpus", 0)),
                said.get("gpu_type"),
            )
            self.took[artifact.key] = seconds
            if artifact.kind == DEFENCE.makes.KIND:
                self._adapters.append(artifact.content)
            sorts = _sorts(artifact.kind, artifact.hashed["spec"], gpus, gpu_type)
            if "load" not in said:
                for sort in sorts:
                    self._plain[sort].append(seconds)
            else:
                counted = _counted(Load(**said["load"]), gpus, gpu_type)
                for sort in sorts:
                    self._factors[sort].setdefault(
                        _rounded(counted), deque(maxlen=REMEMBERED)
                    ).append(seconds / counted)
            self._known.clear()

    @property
    def distinct_adapters(self) -> float:
        """The share of defended adapters that equal no earlier one: what a setting of the knobs
        gives anew. 1 where there are too few to tell.
        """
        return (
            len(set(self._adapters)) / len(self._adapters) if len(self._adapters) >= ENOUGH else 1.0
        )

    def load(self, stage: Stage) -> Load:
        """A stage's counted work (ebbline.cluster.schedule.counted_work.load_of), remembered by
        lineage.
        """
        if stage.lineage not in self._loads:
            self._loads[stage.lineage] = load_of(stage)
        return self._loads[stage.lineage]

    def seconds(self, stage: Stage, needs: Needs | None = None) -> float:
        """How long a stage will run on what it needs; `needs` are those of its kind when they are
        not given.
        """
        gpus = (default_needs(stage) if needs is None else needs).gpus
        gpu_type = (None if needs is None else named_type(needs)) or self.gpu_type
        asked = stage.lineage, gpus, gpu_type
        if asked not in self._known:
            self._known[asked] = self._seconds(stage, gpus, gpu_type)
        return self._known[asked]

    def measured(self, stage: Stage, needs: Needs) -> bool:
        """Whether the store has measured anything of the stage's kind."""
        sorts = _sorts(stage.kind, vars(stage.spec), needs.gpus, named_type(needs) or self.gpu_type)
        return any(sort in self._factors or sort in self._plain for sort in sorts[:-1])

    def _seconds(self, stage: Stage, gpus: int, gpu_type: str | None) -> float:
        counted = _counted(self.load(stage), gpus, gpu_type)
        *own, machine = _sorts(stage.kind, vars(stage.spec), gpus, gpu_type)
        for sort in own:
            if sort in self._factors:
                return counted * _between(self._factors[sort], counted)
        for sort in own:
            if sort in self._plain:
                return _mean(self._plain[sort])
        return counted * (
            _between(self._factors[machine], counted) if machine in self._factors else 1.0
        )


def described(load: Load) -> dict[str, float]:
    """A load as a record keeps it."""
    return asdict(load)


def _counted(load: Load, gpus: int, gpu_type: str | None) -> float:
    """Seconds by the rates of the machine alone; what needs no GPU runs on a core."""
    return seconds_on(machine_of(gpu_type if gpus else None), load, gpus)


def _sorts(kind: str, spec: Mapping[str, Any], gpus: int, gpu_type: str | None) -> list[Sort]:
    """The sorts that a stage belongs to, the narrowest first; the last is all that runs on such a
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


def _between(factors: Mapping[float, Iterable[float]], counted: float) -> float:
    """The factor at a work of so many counted seconds: between those of the next smaller and
    larger, in proportion of the logarithms.

    Beyond the smallest and the largest it is theirs.
    """
    below = max((known for known in factors if known <= counted), default=min(factors))
    above = min((known for known in factors if known >= counted), default=max(factors))
    if below >= above:
        return _mean(factors[below])
    share = math.log(counted / below) / math.log(above / below)
    low, high = _mean(factors[below]), _mean(factors[above])
    return (
        low
        if min(low, high) <= 0.0
        else math.exp((1 - share) * math.log(low) + share * math.log(high))
    )


def _mean(values: Iterable[float]) -> float:
    """The mean, and not the median: the first stage of a batch loads the model for all of them, and
    each is to carry its part.
    """
    listed = list(values)
    return sum(listed) / len(listed)


def _rounded(counted: float) -> float:
    """Two digits: what is as much work to a percent or so shares its measurements."""
    return float(f"{counted:.1e}")
