"""What a run of a study will take: stages, GPU-hours, dollars, wall time on a given cluster, bytes
on disk; by simulating it.

The stages come from the store and the study (ebbline.sweeps.state.todo), their seconds from counted
work and what was measured of the like (ebbline.cluster.schedule.estimates), and their order from
the real scheduler on a virtual clock (ebbline.cluster.schedule.simulate). Of more than EXACT points
that were told, and of more than EXACT points to come, a part is looked up and simulated, and the
rest is taken to be like it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ebbline.cluster.executors.choice import DEFAULT_EXECUTOR, ExecutorKind
from ebbline.cluster.executors.executor import Capacity, Needs
from ebbline.cluster.schedule.costs import Cost, expected_cost, named_type, total
from ebbline.cluster.schedule.estimates import Estimates
from ebbline.cluster.schedule.needs import resident
from ebbline.cluster.schedule.scheduler import ReadyStage, impossible
from ebbline.cluster.schedule.simulate import Step, StepGroups, Trace, simulate
from ebbline.sweeps.forecast.expected import Points, points_of
from ebbline.sweeps.search.masks import twins
from ebbline.sweeps.state.in_flight import AHEAD, IN_FLIGHT_PER_GPU, LEAST_IN_FLIGHT
from ebbline.sweeps.state.jobs import estimates_of
from ebbline.sweeps.state.racing import races
from ebbline.sweeps.state.spending import read_spent
from ebbline.sweeps.state.stopping import still_met
from ebbline.sweeps.state.todo import MODELS, Missing, Todo, Told, todo
from ebbline.sweeps.study.points import Point, adapter_of
from ebbline.sweeps.study.stages import StageGraph
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.kinds import kind_named
from ebbline.tasks.models.model_work import ASSUMED, known_size
from ebbline.tasks.stage import Source

# Points that were told, and points to come; beyond, SAMPLE of them are looked up and simulated
EXACT = 500
SAMPLE = 200


@dataclass(frozen=True)
class KindTotal:
    """What the stages of one kind are expected to come to. `measured` is false where nothing of the
    kind was ever measured.
    """

    stages: float = 0.0
    seconds: float = 0.0
    cost: Cost = field(default_factory=Cost)
    written: float = 0.0
    measured: bool = True

    def plus(self, other: "KindTotal") -> "KindTotal":
        cost, measured = self.cost + other.cost, self.measured and other.measured
        return KindTotal(
            self.stages + other.stages,
            self.seconds + other.seconds,
            cost,
            self.written + other.written,
            measured,
        )


@dataclass(frozen=True)
class Forecast:
    """What is to come. `kinds` has each kind's total, `starts` what starting processes adds.

    `trace` is the simulated part, `simulated` the number of its points to come; `looked_up` is how
    many of the points that were told it looks at. `wall_s` is None when something can run nowhere
    on this cluster, and `never` says what.
    """

    points: Points
    todo: Todo
    kinds: Mapping[str, KindTotal]
    starts: Cost
    wall_s: float | None
    trace: Trace
    simulated: int
    looked_up: int
    capacity: Capacity
    labels: Mapping[str, str]
    never: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    free_bytes: int | None = None

    @property
    def cost(self) -> Cost:
        return total(share.cost for share in self.kinds.values()) + self.starts

    @property
    def written(self) -> float:
        """Bytes that the store will grow by."""
        return sum(share.written for share in self.kinds.values())

    @property
    def complete(self) -> bool:
        """True when a run would find everything in the store, as far as was looked."""
        return not self.todo.missing and not self.points.to_come


def forecast(
    view: StudyView,
    capacity: Capacity,
    told: Told = lambda done, of: None,
    kind: ExecutorKind = DEFAULT_EXECUTOR,
) -> Forecast:
    """Simulate what `ebbline run` would do on such a cluster of this executor."""
    study, home = view.study, view.home
    met = still_met(study, read_spent(view.folder).gain)
    points = points_of(study, view.storage, "" if met is None else met.said)
    graph = view.graph.apart()  # a drawn point gives no stage its label or its needs
    estimates = estimates_of(home, kind)
    estimates.learn_gpu_type(capacity)
    here = points.told if len(points.told) <= EXACT else _evenly(points.told)
    to_come = points.to_come if len(points.to_come) <= EXACT else points.to_come[:SAMPLE]
    found = todo(graph, [*here, *to_come], told)
    same = twins(found, home.store, estimates.distinct_adapters)
    running = [missing for missing in found.missing.values() if missing.id not in same]
    steps = _steps(running, graph, estimates)
    starts: list[Cost] = []

    def start_s(needs: Needs, hosts: Mapping[str, int], new: bool) -> float:
        seconds = (
            estimates.starts.seconds(named_type(needs) or estimates.gpu_type, needs.gpus, new)
            if kind.own_processes
            else 0.0
        )
        starts.append(expected_cost(needs, seconds, home.profile, estimates.gpu_type))
        return seconds

    groups = [tuple(own for own in ids if own in steps) for ids in found.by_point]
    trace = simulate(
        steps.values(), capacity, start_s=start_s, groups=_step_groups(study, groups, capacity.gpus)
    )
    scale_told, scale_to_come = _scale(points.told, here), _scale(points.to_come, to_come)
    looked_up = [
        *((point, scale_told) for point in here),
        *((point, scale_to_come) for point in to_come),
    ]
    kinds: dict[str, KindTotal] = {}
    for missing in running:
        step, factor = steps[missing.id], 1.0
        if missing.asked_by != MODELS:
            point, scale = looked_up[missing.asked_by]
            own = kind_named(missing.stage.kind).belongs_to == "point"
            factor = scale[point.model, own]
        share = KindTotal(
            factor,
            factor * step.seconds,
            expected_cost(step.needs, factor * step.seconds, home.profile, estimates.gpu_type),
            factor * estimates.load(missing.stage).written,
            estimates.measured(missing.stage, step.needs),
        )
        kinds[missing.stage.kind] = (
            kinds[missing.stage.kind].plus(share) if missing.stage.kind in kinds else share
        )
    part = sum(step.seconds * step.needs.gpus for step in steps.values())
    whole = 3600 * total(share.cost for share in kinds.values()).gpu_hours
    more = whole / part if part > 0 else 1.0
    return Forecast(
        points=points,
        todo=found,
        kinds=kinds,
        starts=total(starts).times(more),
        wall_s=sum(share.seconds for share in kinds.values())
        if kind.serial
        else _wall_s(trace, estimates, whole - part),
        trace=trace,
        simulated=len(to_come),
        looked_up=len(here),
        capacity=capacity,
        labels={missing.id: graph.label(missing.stage) for missing in running},
        never=tuple(dict.fromkeys(_never(steps[key], capacity) for key in trace.never)),
        assumed=tuple(_assumed(study, points, len(to_come), len(here), running, kinds)),
        free_bytes=home.store.free_bytes(),
    )


def _steps(running: Iterable[Missing], graph: StageGraph, estimates: Estimates) -> dict[str, Step]:
    steps: dict[str, Step] = {}
    for missing in running:
        needs = graph.needs_of(missing.stage)
        seconds = estimates.seconds(missing.stage, needs)
        above = tuple(own for own in missing.above if own in steps)
        steps[missing.id] = Step(
            missing.id, needs, resident(missing.stage), seconds, seconds, above
        )
    return steps


def _step_groups(study: Study, groups: Sequence[tuple[str, ...]], gpus: int) -> StepGroups:
    """As ebbline.sweeps.state.in_flight starts points: a fixed number in turn, or as others
    end while little enough is queued.
    """
    own = [group for group in groups if group]
    if study.search.in_turn:
        return StepGroups(own, study.search.reach, in_turn=True)
    return StepGroups(
        own,
        study.search.window or max(LEAST_IN_FLIGHT, IN_FLIGHT_PER_GPU * gpus),
        most_gpus=AHEAD * max(1, gpus),
    )


def _evenly(points: Sequence[Point]) -> tuple[Point, ...]:
    """SAMPLE of more points, from the first to the last: what is missing may be missing of all of
    them, or of the latest.
    """
    return tuple(points[place * (len(points) - 1) // (SAMPLE - 1)] for place in range(SAMPLE))


def _scale(every: Sequence[Point], part: Sequence[Point]) -> dict[tuple[str, bool], float]:
    """(model, whether of a point and not of its adapter) -> how many there are of all points, for
    each one of the part.
    """
    found: dict[tuple[str, bool], float] = {}
    for model in {point.model for point in part}:
        counts = []
        for points in (every, part):
            own = [point for point in points if point.model == model]
            counts.append((len({adapter_of(point) for point in own}), len(own)))
        found[model, False], found[model, True] = (
            counts[0][0] / counts[1][0],
            counts[0][1] / counts[1][1],
        )
    return found


def _wall_s(trace: Trace, estimates: Estimates, more_gpu_s: float) -> float | None:
    """The simulated part's time; for the rest, its GPU time at the pace of that part's middle,
    without its begin and its end.
    """
    if trace.never:
        return None
    ends = [
        (span.end_s, (span.end_s - span.start_s) * sum(span.hosts.values())) for span in trace.spans
    ]
    whole, done, marks = sum(gpu_s for _, gpu_s in ends), 0.0, list[float]()
    for end_s, gpu_s in ends:  # in the order in which they ended
        done += gpu_s
        if whole > 0 and done >= (1 + 2 * len(marks)) / 4 * whole and len(marks) < 2:
            marks.append(end_s)
    middle_s = marks[1] - marks[0] if len(marks) == 2 else 0.0
    pace = whole / 2 / middle_s if middle_s > 0 else max(1, trace.capacity.gpus)
    joining_s = estimates.starts.cluster_s if trace.spans else 0.0
    return (
        joining_s + trace.makespan_s + max(0.0, more_gpu_s) / min(pace, max(1, trace.capacity.gpus))
    )


def _never(step: Step, capacity: Capacity) -> str:
    reason = impossible(ReadyStage(step.key, step.needs, step.resident, 0.0, 0.0), capacity)
    return reason or "it waits for a stage that can run nowhere on this cluster"


def _assumed(
    study: Study,
    points: Points,
    simulated: int,
    looked_at: int,
    running: Sequence[Missing],
    kinds: Mapping[str, KindTotal],
) -> Iterator[str]:
    """What the numbers rest on beside measurements."""
    if points.drawn:
        yield (
            f"{len(points.drawn)} points are for the search to choose: random points of the "
            "space stand for them"
        )
    if simulated < len(points.to_come):
        yield (
            f"{simulated} of {len(points.to_come)} points to come were simulated; the others "
            "are taken to be like them"
        )
    if looked_at < len(points.told):
        yield (
            f"{looked_at} of {len(points.told)} points that were told were looked up; the "
            "others are taken to be like them"
        )
    if any(suite is not None for suite in races(study).values()):
        yield "a raced suite counts with its next block alone"
    if study.first_seeds < len(study.seeds):
        yield (
            f"a point counts with its first {study.first_seeds} of {len(study.seeds)} seeds; "
            "near the frontier more are run"
        )
    if study.search.stop is not None and points.to_come:
        yield "the rule of search.stop is not met before all points are measured"
    guessed = sorted(kind for kind, share in kinds.items() if not share.measured)
    if guessed:
        listed = ", ".join(guessed)
        yield (
            "nothing like these has been measured here, so they go by counted work alone, "
            f"which may be off by several times: {listed}"
        )
    sources = (
        item.location
        for missing in running
        for item in missing.stage.inputs.values()
        if isinstance(item, Source)
    )
    unknown = sorted(
        {
            Path(location.partition("@")[0]).name
            for location in sources
            if _a_model(location) and not known_size(location)
        }
    )
    if unknown:
        yield (
            f"nothing says how large {' and '.join(unknown)} is, so it is taken for a "
            f"{ASSUMED} model"
        )


def _a_model(location: str) -> bool:
    return location.startswith("hub:model:") or (
        not location.startswith("hub:") and (Path(location) / "config.json").exists()
    )
