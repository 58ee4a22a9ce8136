"""Simulates a cluster: an executor on a virtual clock, and a loop that runs the real scheduler over
a whole graph.

It predicts how long a graph takes on given hosts, and where and when each stage runs.
"""

import heapq
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from ebbline.cluster.executors.executor import Capacity, Executor, Finished, Job, Needs
from ebbline.cluster.executors.starts import WarmProcesses
from ebbline.cluster.schedule.scheduler import Busy, Placement, ReadyQueue, ReadyStage
from ebbline.tasks.errors import StudyError
from ebbline.tasks.stage import Report, Request

# (needs, host -> GPUs, whether the process is new) -> seconds
StartS = Callable[[Needs, Mapping[str, int], bool], float]
Choose = Callable[
    [Sequence[ReadyStage], Sequence[Busy], Capacity, Mapping[str, AbstractSet[str]]],
    list[Placement],
]


@dataclass(frozen=True)
class Step:
    """A stage of a simulated graph. The scheduler sees `expected_s`; the stage runs for `seconds`.
    `after` has the keys of its inputs.
    """

    key: str
    needs: Needs
    resident: str
    expected_s: float
    seconds: float
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepGroups:
    """Groups of steps that are requested over time, as a search requests points. A group has the
    keys that it needs; groups may share keys.

    At most `window` groups are in flight. A new group starts when any has ended, or with `in_turn`
    when the oldest has. None starts while others are in flight and running and ready steps need at
    least `most_gpus` GPUs.
    """

    groups: Sequence[Sequence[str]]
    window: int
    in_turn: bool = False
    most_gpus: int | None = None


@dataclass(frozen=True)
class Span:
    """One stage in a trace: when it became ready, when it ran, and its GPUs by host."""

    key: str
    ready_s: float
    start_s: float
    end_s: float
    hosts: Mapping[str, int]


@dataclass(frozen=True)
class Decision:
    """One call of the scheduler: the number of ready stages, of started batches, and its CPU
    seconds, with those of putting new stages into its queue.
    """

    at_s: float
    ready: int
    started: int
    took_s: float


@dataclass
class Trace:
    """The result of a simulation: spans in the order of their ends. `never` has the keys of steps
    that did not run.
    """

    capacity: Capacity
    spans: list[Span] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    never: tuple[str, ...] = ()

    @property
    def makespan_s(self) -> float:
        return max((span.end_s for span in self.spans), default=0.0)

    @property
    def utilisation(self) -> float:
        """The fraction of all GPU time until the end in which GPUs were in use, in [0, 1]."""
        held_s = sum((span.end_s - span.start_s) * sum(span.hosts.values()) for span in self.spans)
        whole_s = self.makespan_s * self.capacity.gpus
        return held_s / whole_s if whole_s > 0 else 0.0


class SimulatedExecutor(Executor):
    """An executor on a virtual clock. Stages of a job run one after another, each for `seconds_of`
    its key. Only `advance` and `finished` move the clock.
    """

    own_processes = False

    def __init__(self, capacity: Capacity, seconds_of: Callable[[str], float]) -> None:
        self.device = "simulated"
        self.now_s = 0.0
        self.running: dict[str, Job] = {}
        self._capacity = capacity
        self._seconds_of = seconds_of
        self._ends: list[tuple[float, int, Job, int]] = []
        self._finished: list[Finished] = []
        self._numbers = itertools.count()

    def capacity(self) -> Capacity:
        return self._capacity

    def submit(self, batch: Sequence[Request], needs: Needs, hosts: Mapping[str, int]) -> Job:
        return self.start([request.key for request in batch], needs, hosts)

    def start(
        self, keys: Sequence[str], needs: Needs, hosts: Mapping[str, int], start_s: float = 0.0
    ) -> Job:
        """Like `submit`, for keys without requests. The first stage begins after `start_s`."""
        number = next(self._numbers)
        job = Job(f"simulated-{number}", tuple(keys), needs.gpus, hosts)
        self.running[job.id] = job
        self._next_stage(job, number, 0, start_s)
        return job

    def _next_stage(self, job: Job, number: int, index: int, start_s: float = 0.0) -> None:
        heapq.heappush(
            self._ends,
            (self.now_s + start_s + self._seconds_of(job.keys[index]), number, job, index),
        )

    def advance(self, until_s: float = math.inf) -> list[tuple[Job, str]]:
        """Move the clock to the next end of stages, at most to `until_s`. Returns the stages that
        ended.
        """
        while self._ends and self._ends[0][2].id not in self.running:
            heapq.heappop(self._ends)  # cancelled
        if not self._ends or self._ends[0][0] > until_s:
            self.now_s = until_s if until_s < math.inf else self.now_s
            return []
        self.now_s = self._ends[0][0]
        ended = []
        while self._ends and self._ends[0][0] <= self.now_s:
            _, number, job, index = heapq.heappop(self._ends)
            if job.id not in self.running:
                continue
            ended.append((job, job.keys[index]))
            if index + 1 < len(job.keys):
                self._next_stage(job, number, index + 1)
            else:
                del self.running[job.id]
                self._finished.append(
                    Finished(job, tuple(Report(key, self._seconds_of(key)) for key in job.keys))
                )
        return ended

    def finished(self, timeout_s: float) -> Sequence[Finished]:
        until_s = self.now_s + timeout_s
        while not self._finished and self.running and self.now_s < until_s:
            self.advance(until_s)
        done, self._finished = self._finished, []
        return done

    def cancel(self, job: Job) -> None:
        self.running.pop(job.id, None)

    def close(self) -> None:
        self.running.clear()


def simulate(
    steps: Iterable[Step],
    capacity: Capacity,
    choose: Choose | None = None,
    start_s: StartS | None = None,
    groups: StepGroups | None = None,
) -> Trace:
    """Run a whole graph on the virtual clock, with ebbline's queue, or by `choose`. That gets ready
    stages in the order in which they became ready.

    Hosts cache every model that they have used. `start_s` gives the seconds to start a job (default
    0). `groups` are requested over time, other steps at once. Raises StudyError if a step reads
    from an unknown step or from itself.
    """
    by_key = {step.key: step for step in steps}
    downstream, paths = _graph(by_key)
    executor = SimulatedExecutor(capacity, lambda key: by_key[key].seconds)
    admission = _Admission(by_key, groups or StepGroups((), 1))
    trace = Trace(capacity)
    warm = WarmProcesses()
    missing = {key: len(step.after) for key, step in by_key.items()}
    ready_at: dict[str, float] = {}
    ready: dict[str, ReadyStage] = {}
    ready_gpus = 0
    queue = ReadyQueue()
    cached: dict[str, set[str]] = {}
    expected_ends: dict[str, tuple[Mapping[str, int], float]] = {}
    stage_starts: dict[str, float] = {}
    arrived = [key for key in admission.at_once if missing[key] == 0]
    while True:
        queued_s = time.thread_time()
        held = sum(sum(job.hosts.values()) for job in executor.running.values())
        while True:
            for key in arrived:
                step, ready_at[key] = by_key[key], executor.now_s
                # Ageing only compares stages, so `waited_s` may be relative to any one moment.
                # Relative to time 0 it is constant, and this object can be reused.
                stage = ready[key] = ReadyStage(
                    key,
                    step.needs,
                    step.resident,
                    step.expected_s,
                    paths[key],
                    waited_s=-executor.now_s,
                )
                ready_gpus += stage.gpus
                if choose is None:
                    queue.put(stage)
            admitted = admission.admit(held + ready_gpus)
            if admitted is None:
                break
            arrived = [key for key in admitted if missing[key] == 0]
        if ready:
            busy = [
                Busy(hosts, max(1.0, end_s - executor.now_s))
                for hosts, end_s in expected_ends.values()
            ]
            count = len(ready)
            if choose is None:
                placements = queue.place(busy, capacity, cached, executor.now_s)
            else:
                placements = choose(list(ready.values()), busy, capacity, cached)
            took_s = time.thread_time() - queued_s
            trace.decisions.append(Decision(executor.now_s, count, len(placements), took_s))
            for placement in placements:
                starting_s = (
                    start_s(placement.needs, placement.hosts, warm.would_be_new(placement.hosts))
                    if start_s
                    else 0.0
                )
                job = executor.start(placement.keys, placement.needs, placement.hosts, starting_s)
                warm.start(job.id, placement.hosts)
                stage_starts[job.id] = executor.now_s
                expected_s = starting_s + sum(by_key[key].expected_s for key in placement.keys)
                expected_ends[job.id] = (placement.hosts, executor.now_s + expected_s)
                for host in placement.hosts:
                    cached.setdefault(host, set()).add(by_key[placement.keys[0]].resident)
                for key in placement.keys:
                    ready_gpus -= ready.pop(key).gpus
                    queue.remove(key)
        ended = executor.advance()
        if not ended:
            trace.never = tuple(key for key in by_key if key not in admission.done)
            return trace
        arrived = []
        for job, key in ended:
            trace.spans.append(
                Span(key, ready_at[key], stage_starts[job.id], executor.now_s, job.hosts)
            )
            stage_starts[job.id] = executor.now_s
            admission.ended(key)
            if job.id not in executor.running:
                del expected_ends[job.id]
                warm.end(job.id)
            for below in downstream[key]:
                missing[below] -= 1
                if missing[below] == 0 and below in admission.admitted:
                    arrived.append(below)


class _Admission:
    """The groups in flight. `admitted` has the keys that may start, `done` the keys that ended."""

    def __init__(self, by_key: Mapping[str, Step], groups: StepGroups) -> None:
        self._groups = groups
        later = {key for group in groups.groups for key in group}
        self.at_once = [key for key in by_key if key not in later]
        self.admitted, self.done = set(self.at_once), set[str]()
        self._waiting: Iterator[Sequence[str]] = iter(groups.groups)
        self._in_flight: list[set[str]] = []

    def ended(self, key: str) -> None:
        self.done.add(key)
        for group in self._in_flight:
            group.discard(key)
        if self._groups.in_turn:
            while self._in_flight and not self._in_flight[0]:
                del self._in_flight[0]
        else:
            self._in_flight = [group for group in self._in_flight if group]

    def admit(self, needed_gpus: int) -> list[str] | None:
        """The keys that the next group adds; None when no group starts now. `needed_gpus` are the
        GPUs of all running and ready steps.
        """
        most = self._groups.most_gpus
        enough = most is not None and bool(self._in_flight) and needed_gpus >= most
        full = enough or len(self._in_flight) >= self._groups.window
        group = None if full else next(self._waiting, None)
        if group is None:
            return None
        own = [key for key in group if key not in self.admitted]
        self.admitted |= set(own)
        open_keys = set(group) - self.done
        if open_keys or (self._groups.in_turn and self._in_flight):
            self._in_flight.append(open_keys)
        return own


def bound_s(steps: Iterable[Step], capacity: Capacity) -> float:
    """A lower bound of the makespan: all GPU seconds divided by the GPUs, or the longest chain,
    whichever is longer.
    """
    by_key = {step.key: step for step in steps}
    gpu_s = sum(step.seconds * step.needs.gpus for step in by_key.values())
    _, paths = _graph(by_key, seconds_of=lambda step: step.seconds)
    return max(gpu_s / max(1, capacity.gpus), max(paths.values(), default=0.0))


def _graph(
    by_key: Mapping[str, Step], seconds_of: Callable[[Step], float] = lambda step: step.expected_s
) -> tuple[Mapping[str, Sequence[str]], Mapping[str, float]]:
    """(key -> keys that read from it, key -> seconds of the longest chain that starts there)."""
    downstream: dict[str, list[str]] = defaultdict(list)
    for step in by_key.values():
        for above in step.after:
            if above not in by_key:
                raise StudyError(
                    f"step {step.key!r} reads from {above!r}, which is no step; add it, or "
                    "remove it from `after`"
                )
            downstream[above].append(step.key)
    left = {key: len(downstream[key]) for key in by_key}
    last = [key for key, count in left.items() if count == 0]
    paths: dict[str, float] = {}
    while last:
        key = last.pop()
        paths[key] = seconds_of(by_key[key]) + max(
            (paths[below] for below in downstream[key]), default=0.0
        )
        for above in by_key[key].after:
            left[above] -= 1
            if left[above] == 0:
                last.append(above)
    if len(paths) < len(by_key):
        raise StudyError(
            "steps read from each other in a cycle: "
            f"{', '.join(sorted(by_key.keys() - paths.keys())[:5])}"
        )
    return downstream, paths
