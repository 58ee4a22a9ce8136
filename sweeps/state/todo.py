"""The stages that a study still has to run, found by looking up keys, and why each is not in the
store. Nothing runs.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from ebbline.cluster.store.artifacts import Artifact, Store
from ebbline.cluster.store.resolver import Resolver
from ebbline.sweeps.state.races.racing import standing
from ebbline.sweeps.study.changes import differences
from ebbline.sweeps.study.points import Point, StageName
from ebbline.sweeps.study.stages import StageGraph, of_seeds, stages_or_reason
from ebbline.sweeps.study.study import Study
from ebbline.tasks.stage import Part, Stage, stage_of

TodoProgress = Callable[[int, int], None]  # (points looked up, all points)
MODELS = -1  # place of the stages of models before fine-tuning, and of controls


@dataclass(frozen=True)
class Missing:
    """A stage to run. `above` are the ids of the stages to run that it reads from;
    `requested_by` is the place of the first point that needs it.
    """

    id: str
    stage: Stage
    name: str
    above: tuple[str, ...]
    requested_by: int
    remade: bool = False


@dataclass
class Todo:
    """The stages to run, inputs first. An id is a key, or a lineage while the key is unknown.
    `there` counts the stages in the store, by kind.

    `by_point` has the ids that each point waits for, in order of the points. A stage is `remade`
    when its record exists but another stage reads files of it that retention has dropped.
    """

    missing: dict[str, Missing] = field(default_factory=dict)
    there: Counter[str] = field(default_factory=Counter)
    by_point: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def new(self) -> Counter[str]:
        """The number of stages to run, by kind."""
        return Counter(missing.stage.kind for missing in self.missing.values())


def todo(
    graph: StageGraph,
    points: Sequence[Point],
    progress: TodoProgress = lambda done, of: None,
    controls: Mapping[str, Mapping[str, Stage]] = MappingProxyType({}),
) -> Todo:
    """Look up every stage of the models before fine-tuning, of these points and of `controls`, by
    label.
    """
    lookup = _Lookup(graph.home.store, Resolver(graph.home.store))
    for model, suites in graph.baselines().items():
        for suite, stage in suites.items():
            lookup.look(f"{model} before fine-tuning, {suite}", stage, MODELS)
    for place, point in enumerate(points):
        stages, label = (
            of_seeds(graph.study, stages_or_reason(graph, point)[0], graph.study.first_seeds),
            str(point),
        )
        needed = [(name, stages[name]) for name in _needed(graph.study, stages, lookup.resolver)]
        for name, stage in needed:
            lookup.look(f"{label}, {name}", stage, place)
        lookup.found.by_point.append(lookup.waits(stage for _, stage in needed))
        progress(place + 1, len(points))
    for label, own in controls.items():
        for name in _needed(graph.study, own, lookup.resolver):
            lookup.look(f"{label}, {name}", own[name], MODELS)
    return lookup.found


class _Lookup:
    """One pass over the store, which looks up every stage once."""

    def __init__(self, store: Store, resolver: Resolver) -> None:
        self.store, self.resolver, self.found = store, resolver, Todo()
        self._ids: dict[str, str] = {}  # by lineage
        self._counted: set[str] = set()
        self._dropped: dict[str, frozenset[str]] = {}

    def look(self, name: str, stage: Stage, place: int) -> None:
        """Count a stage and all stages above it, and record the missing ones."""
        if stage.lineage in self._ids:
            return
        for above in stage.upstream():
            self.look(f"{name} < {above.kind}", above, place)
        own = self._ids[stage.lineage] = self.resolver.key(stage) or stage.lineage
        if own not in self._counted:
            self._counted.add(own)
            if self.resolver.artifact(stage) is None:
                self._note(stage, name, place)
            else:
                self.found.there[stage.kind] += 1

    def waits(self, stages: Iterable[Stage]) -> tuple[str, ...]:
        """The ids of the missing stages among these and above them, inputs first."""
        ids: dict[str, None] = {}
        for stage in stages:
            self._gather(self._ids[stage.lineage], ids)
        return tuple(ids)

    def _gather(self, own: str, ids: dict[str, None]) -> None:
        if own in self.found.missing and own not in ids:
            for above in self.found.missing[own].above:
                self._gather(above, ids)
            ids[own] = None

    def _note(self, stage: Stage, name: str, place: int, remade: bool = False) -> None:
        for item in stage.inputs.values():
            above = stage_of(item)
            artifact = None if above is None else self.resolver.artifact(above)
            if (
                above is not None
                and artifact is not None
                and self._ids[above.lineage] not in self.found.missing
            ):
                needed = artifact.below(item.path if isinstance(item, Part) else "")
                if not self._dropped_of(artifact).isdisjoint(needed):
                    self.found.there[above.kind] -= 1
                    self._note(above, f"{name} < {above.kind}", place, remade=True)
        own = self._ids[stage.lineage]
        above_ids = (self._ids[above.lineage] for above in stage.upstream())
        ids = tuple(dict.fromkeys(each for each in above_ids if each in self.found.missing))
        self.found.missing[own] = Missing(own, stage, name, ids, place, remade)

    def _dropped_of(self, artifact: Artifact) -> frozenset[str]:
        if artifact.key not in self._dropped:
            self._dropped[artifact.key] = self.store.dropped(artifact)
        return self._dropped[artifact.key]


def _needed(study: Study, stages: Mapping[str, Stage], resolver: Resolver) -> list[str]:
    """The names of the stages that a point needs now: of raced suites, the measured blocks and the
    next one.
    """
    named = {StageName.parse(name): name for name in stages}
    if all(name.block is None for name in named):
        return list(stages)
    next_ones = set(standing(study, stages, resolver).missing)
    blocks = {
        (name.part, name.block)
        for name, text in named.items()
        if name.part in study.suites
        and (resolver.artifact(stages[text]) is not None or stages[text] in next_ones)
    }
    return [
        text
        for name, text in named.items()
        if name.block is None or (_suite(name), name.block) in blocks
    ]


def _suite(name: StageName) -> str:
    """`generate:refusal` and `judge:refusal:mine` serve the suite `refusal`."""
    return name.part.split(":")[1] if ":" in name.part else name.part


def explained(found: Todo, store: Store, most: int) -> list[tuple[str, str]]:
    """(name, why it is not in the store) of the first `most` stages to run."""
    resolver = Resolver(store)
    reasons = []
    for missing in itertools.islice(found.missing.values(), most):
        dropped = (
            "its record exists, but another stage reads files of it that were dropped to save space"
        )
        reasons.append(
            (missing.name, dropped if missing.remade else explain(missing.stage, resolver, store))
        )
    return reasons


def explain(stage: Stage, resolver: Resolver, store: Store) -> str:
    """Why a stage is not in the store: the stages that it waits for, or the fields that differ from
    the most similar artifact of its kind.
    """
    payload = resolver.hashed(stage)
    if payload is None:
        waiting = [above.kind for above in stage.upstream() if resolver.artifact(above) is None]
        return f"waits for {' and '.join(sorted(set(waiting)))}"
    nearest = min(
        (list(differences(artifact.hashed, payload)) for artifact in store.all(stage.kind)),
        key=lambda lines: (len(lines), lines),
        default=None,
    )
    if nearest is None:
        return f"the store has no {stage.kind} yet"
    return "; ".join(nearest[:4])
