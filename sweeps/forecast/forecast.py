"""Predicts a run of a study by simulating it: stages, GPU-hours, dollars, bytes on disk, and wall
time on a given cluster.

ebbline.sweeps.state.todo finds the stages in the store. ebbline.cluster.schedule.estimates gives
their seconds, from counted work and measured stages. ebbline.cluster.schedule.simulate runs the
real scheduler on a virtual clock. Of more than EXACT completed points, or more than EXACT points to
come, only SAMPLE are looked up and simulated; the others are assumed to be like them.
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
from ebbline.sweeps.forecast.controls import expected_controls
from ebbline.sweeps.forecast.expected import Points, expected_points
from ebbline.sweeps.search.masks import duplicates
from ebbline.sweeps.state.in_flight import GPUS_QUEUED_PER_GPU, IN_FLIGHT_PER_GPU, LEAST_IN_FLIGHT
from ebbline.sweeps.state.jobs import estimates_of
from ebbline.sweeps.state.races.racing import races
from ebbline.sweeps.state.spending import read_spent
from ebbline.sweeps.state.stopping import still_met
from ebbline.sweeps.state.todo import MODELS, Missing, Todo, TodoProgress, todo
from ebbline.sweeps.study.points import Point, adapter_of
from ebbline.sweeps.study.stages import StageGraph
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.kinds import kind_named
from ebbline.tasks.models.model_work import guessed_models
from ebbline.tasks.models.sizes import ASSUMED

# Of more than EXACT completed points, or points to come, SAMPLE are looked up and simulated
EXACT = 500
SAMPLE = 200


@dataclass(frozen=True)
class KindTotal:
    """The expected total of all stages of one kind: `written` in bytes, `seconds` one by one.

    `measured` is false when no stage like these has been measured.
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
    """The prediction for a run. `kinds` has the total of each stage kind, `starts` the cost of
    starting processes.

    `trace` is the simulated part; `simulated` counts its points to come, `looked_up` its completed
    points. `wall_s` is None when a stage cannot run on this cluster; `never` gives the reasons.
    `assumed` lists the assumptions in sentences.
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
        """The growth of the store in bytes."""
        return sum(share.written for share in self.kinds.values())

    @property
    def complete(self) -> bool:
        """True when the store has every stage that was looked up, and no point is to come."""
        return not self.todo.missing and not self.points.to_come


def forecast(
    view: StudyView,
    capacity: Capacity,
    report: TodoProgress = lambda done, of: None,
    kind: ExecutorKind = DEFAULT_EXECUTOR,
) -> Forecast:
    """Simulate `ebbline run` on a cluster of this capacity with an executor of this `kind`.

    `report` is called with the number of points looked up, and of how many.
    """
    study, home = view.study, view.home
    met = still_met(study, read_spent(view.folder).gain)
    points = expected_points(study, view.database, "" if met is None else met.reason)
    graph = view.graph.fresh_copy()  # drawn points must not change labels and needs of the study
    estimates = estimates_of(home, kind)
    estimates.learn_gpu_type(capacity)
    completed = points.completed if len(points.completed) <= EXACT else _evenly(points.completed)
    to_come = points.to_come if len(points.to_come) <= EXACT else points.to_come[:SAMPLE]
    controls = expected_controls(view, graph, [*completed, *to_come], bool(points.to_come))
    found = todo(graph, [*completed, *to_come], report, controls)
    same = duplicates(found, home.store, estimates.distinct_adapters)
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
    scale_completed, scale_to_come = (
        _scale(points.completed, completed),
        _scale(points.to_come, to_come),
    )
    looked_up = [
        *((point, scale_completed) for point in completed),
        *((point, scale_to_come) for point in to_come),
    ]
    kinds: dict[str, KindTotal] = {}
    for missing in running:
        step, factor = steps[missing.id], 1.0
        if missing.requested_by != MODELS:
            point, scale = looked_up[missing.requested_by]
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
    simulated_gpu_s = sum(step.seconds * step.needs.gpus for step in steps.values())
    whole_gpu_s = 3600 * total(share.cost for share in kinds.values()).gpu_hours
    scale_up = whole_gpu_s / simulated_gpu_s if simulated_gpu_s > 0 else 1.0
    return Forecast(
        points=points,
        todo=found,
        kinds=kinds,
        starts=total(starts).times(scale_up),
        wall_s=sum(share.seconds for share in kinds.values())
        if kind.serial
        else _wall_s(trace, estimates, whole_gpu_s - simulated_gpu_s),
        trace=trace,
        simulated=len(to_come),
        looked_up=len(completed),
        capacity=capacity,
        labels={missing.id: graph.label(missing.stage) for missing in running},
        never=tuple(dict.fromkeys(_never(steps[key], capacity) for key in trace.never)),
        assumed=tuple(_assumed(study, points, len(to_come), len(completed), running, kinds)),
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
    """The rule by which ebbline.sweeps.state.in_flight starts points, for the simulation.

    With `order: in_turn` a fixed number is in flight; else points start while the queue is short.
    """
    own = [group for group in groups if group]
    if study.search.in_turn:
        return StepGroups(own, study.search.effective_window, in_turn=True)
    return StepGroups(
        own,
        study.search.window or max(LEAST_IN_FLIGHT, IN_FLIGHT_PER_GPU * gpus),
        most_gpus=GPUS_QUEUED_PER_GPU * max(1, gpus),
    )


def _evenly(points: Sequence[Point]) -> tuple[Point, ...]:
    """SAMPLE points, evenly spaced: stages may be missing for all points, or for the latest."""
    return tuple(points[n * (len(points) - 1) // (SAMPLE - 1)] for n in range(SAMPLE))


def _scale(every: Sequence[Point], part: Sequence[Point]) -> dict[tuple[str, bool], float]:
    """By how much the number in `every` exceeds that in `part`, as a factor.

    Keys are (model, True) for points and (model, False) for adapters.
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
    """The makespan of the simulated part, plus the GPU time of the rest at that part's pace.

    The pace is that of the middle half of the simulated GPU time, since GPUs idle at the start and
    at the end.
    """
    if trace.never:
        return None
    ends = [
        (span.end_s, (span.end_s - span.start_s) * sum(span.hosts.values())) for span in trace.spans
    ]
    whole, done, marks = sum(gpu_s for _, gpu_s in ends), 0.0, list[float]()
    for end_s, gpu_s in ends:  # ordered by end
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
    return reason or "it needs a stage that cannot run on this cluster"


def _assumed(
    study: Study,
    points: Points,
    simulated: int,
    looked_at: int,
    running: Sequence[Missing],
    kinds: Mapping[str, KindTotal],
) -> Iterator[str]:
    """The assumptions behind the numbers, in sentences."""
    if points.drawn:
        yield (
            f"{len(points.drawn)} points are for the search to choose; random points of the "
            "space replace them"
        )
    if simulated < len(points.to_come):
        yield (
            f"{simulated} of {len(points.to_come)} points to come were simulated; the others "
            "are assumed to be like them"
        )
    if looked_at < len(points.completed):
        yield (
            f"{looked_at} of {len(points.completed)} completed points were looked up; the others "
            "are assumed to be like them"
        )
    if any(suite is not None for suite in races(study).values()):
        yield "a raced suite counts with its next block only"
    if study.first_seeds < len(study.seeds):
        yield (
            f"a point counts with its first {study.first_seeds} of {len(study.seeds)} seeds; "
            "points near the frontier will get more"
        )
    if study.used_controls.settings and points.to_come:
        yield (
            "controls will stand near the operating points, which are not known; the middle "
            "settings of each defence replace them"
        )
    if study.search.stop is not None and points.to_come:
        yield "the rule of search.stop counts as never met"
    guessed = sorted(kind for kind, share in kinds.items() if not share.measured)
    if guessed:
        listed = ", ".join(guessed)
        yield (
            "no similar stages have been measured for these kinds, so their time is estimated "
            f"from counted work alone, which may be off by several times: {listed}"
        )
    unknown = sorted(
        {
            Path(location.partition("@")[0]).name
            for location in guessed_models(missing.stage for missing in running)
        }
    )
    if unknown:
        yield (
            f"the size of {' and '.join(unknown)} is unknown; it is guessed to be a {ASSUMED} "
            "model, and the budget stops no stage by this guess"
        )
