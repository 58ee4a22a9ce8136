"""The driving loop: keep a window of points in flight, run their stages, tell the search, stop when it has no more.

Running the same study again is always safe: points come from the Optuna storage, outputs from the store, and what is
there is not made again. Only one driver holds a study at a time.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from cluster.executor import Executor
from cluster.runner import Failure, Runner
from sweeps.home import Home
from sweeps.jobs import estimates_of
from sweeps.outcome import result_of
from sweeps.outlook import Outlook
from sweeps.plan import Planner
from sweeps.points import Point, Result, StageName
from sweeps.racing import rivals_of, standing
from sweeps.search import OptunaSearcher, Searcher, check_written_points, limit, reaching
from sweeps.spending import Spending, require_prices, spending
from sweeps.storage import Hold
from sweeps.study import Study
from tasks.errors import StudyError
from tasks.specs import KINDS
from tasks.stage import Stage

MEASURES = ("score", "evaluate")  # the kinds of the stages that have metrics


@dataclass
class Flight:
    """A point on its way: all that it may need, and of that what it has asked for so far (a raced suite asks block by block).

    One that has asked for nothing is on the ground: the budget does not afford it.
    """

    number: int
    point: Point
    stages: dict[str, Stage]
    asked: list[Stage] = field(default_factory=list)

    def __str__(self) -> str:
        return f"point {self.number} ({self.point})"


@dataclass
class Progress:
    """What a watcher sees after every heartbeat. `told` counts all points told, `results` holds those of this run, in order."""

    study: Study
    planner: Planner
    runner: Runner
    spending: Spending
    results: list[Result] = field(default_factory=list)
    in_flight: list[Flight] = field(default_factory=list)
    limit: int | None = None
    told: int = 0
    started: float = field(default_factory=time.monotonic)
    stopped: str = ""


Watcher = Callable[[Progress], None]


def drive(
    study: Study,
    home: Home,
    make_executor: Callable[[], Executor],
    watch: Watcher = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
) -> Progress:
    """Run a study to its end: the aligned models before fine-tuning, then the search's points.

    The executor is made once the study is held, and closed at the end; `stop` turning true drains and returns. Raises
    StudyHeld when another driver has the study, StudyError when a model cannot be measured before fine-tuning.
    """
    storage = home.storage(study.study)
    with home.driving(study.study) as hold, reaching(storage):
        planner = Planner(study, home)
        check_written_points(study)
        require_prices(study, home.profile)
        home.freeze(study)
        searcher = OptunaSearcher(study, storage)
        with spending(study, home.profile, home.folder(study.study), hold.driver) as spent:
            executor = make_executor()
            try:
                runner = Runner(home.store, executor, planner.needs_of, home.profile, spent, estimates_of(home))
                return _loop(Progress(study, planner, runner, spent, limit=limit(study)), searcher, hold, watch, stop)
            finally:
                executor.close()


def _loop(progress: Progress, searcher: OptunaSearcher, hold: Hold, watch: Watcher, stop: Callable[[], bool]) -> Progress:
    study, planner, runner = progress.study, progress.planner, progress.runner
    baselines = [stage for suites in planner.baselines().values() for stage in suites.values()]
    runner.want(baselines)
    done: list[Result] = []
    again = [Flight(number, point, planner.stages_for(point)) for number, point in searcher.measured()]
    for flight in again:
        _take_off(flight, runner)
    progress.told = searcher.told()
    flights = deque(Flight(number, point, planner.stages_for(point)) for number, point in searcher.in_flight())
    outlook = Outlook(planner, runner, progress.spending)
    exhausted = False
    while True:
        grounded = None if runner.draining else _take_off_in_turn(flights, runner, outlook)
        while not exhausted and not runner.draining and grounded is None and len(flights) < study.search.window:
            hold.check()
            asked = searcher.ask()
            if asked is None:
                exhausted = True
            else:
                flights.append(Flight(*asked, planner.stages_for(asked[1])))
                grounded = _take_off_in_turn(flights, runner, outlook)
        exhausted = exhausted or (progress.limit is not None and progress.told + len(flights) >= progress.limit)
        progress.in_flight = list(flights)
        watch(progress)
        broken = next((failure for stage in baselines if (failure := runner.failure(stage)) is not None), None)
        # What every point of a size needs has failed: stop, and tell no point that it failed for a fault of its own.
        if broken is not None:
            raise StudyError(f"a model could not be measured before fine-tuning: {_told(broken)}")
        if not runner.draining:
            _hear_again(study, again, runner, done)
            if not again:  # a raced point is compared with those before it, which must be known first
                for flight in flights:
                    if flight.asked:
                        _ask_more(study, flight, runner, done)
        # One at a time: the next proposal is to see exactly this result more than the one before it did. None while nothing is
        # asked, draining or for want of budget: the next run lands them from the store.
        in_turn = exhausted or len(flights) == study.search.window
        if in_turn and not again and not runner.draining and _landing(flights, runner):
            hold.check()
            done.append(_land(study, flights.popleft(), searcher, runner, done))
            progress.results.append(done[-1])
            progress.told += 1
            continue
        if not flights and exhausted and not again and all(map(runner.settled, baselines)):
            break
        if stop():
            runner.draining, progress.stopped = True, "stopped on request"
        if runner.draining and not runner.running:
            break
        if runner.starved or (grounded is not None and runner.idle):
            progress.stopped = outlook.told_of_stage() if grounded is None else outlook.told_of_point(str(grounded), grounded.stages)
            break
        runner.step()
        progress.spending.settle(runner.running)
    progress.in_flight = list(flights)
    watch(progress)
    return progress


def _take_off(flight: Flight, runner: Runner) -> None:
    flight.asked = [stage for name, stage in flight.stages.items() if StageName.parse(name).part in KINDS]
    runner.want(flight.asked)


def _take_off_in_turn(flights: Iterable[Flight], runner: Runner, outlook: Outlook) -> Flight | None:
    """Let the points that are on the ground take off, in order; returns the first that the budget does not afford."""
    for flight in flights:
        if not flight.asked:
            if not outlook.affords(flight.stages):
                return flight
            _take_off(flight, runner)
    return None


def _landing(flights: Sequence[Flight], runner: Runner) -> bool:
    return bool(flights) and bool(flights[0].asked) and all(map(runner.settled, flights[0].asked))


def _ask_more(study: Study, flight: Flight, runner: Runner, done: Sequence[Result]) -> bool:
    """Ask for what a point needs next, until something is under way (True) or it needs nothing more (False).

    What it asks for may be in the store already, and is then there at once.
    """
    own, rivals = set(flight.stages.values()), rivals_of(flight.number, flight.point, done, study.search.window)
    while True:
        if any(not runner.settled(stage) and stage.kind in MEASURES for stage in flight.asked):
            return True
        asked, needed = set(flight.asked), standing(study, flight.stages, runner, rivals).missing
        new = [stage for target in needed for stage in (*target.upstream(), target) if stage in own and stage not in asked]
        if not new:
            return False
        runner.want(new)
        flight.asked += new


def _hear_again(study: Study, again: list[Flight], runner: Runner, done: list[Result]) -> None:
    """Points that were told before: their results in order, as far as their artifacts are there (or made) again."""
    while again:
        flight = again[0]
        if _ask_more(study, flight, runner, done) or not all(map(runner.settled, flight.asked)):
            return
        done.append(result_of(study, flight.number, flight.point, flight.stages, runner, earlier=done))
        del again[0]


def _land(study: Study, flight: Flight, searcher: Searcher, runner: Runner, done: Sequence[Result]) -> Result:
    failures = [failure for stage in flight.asked if (failure := runner.failure(stage)) is not None]
    own = next((failure for failure in failures if not failure.inherited), failures[0] if failures else None)
    result = result_of(study, flight.number, flight.point, flight.stages, runner, reason=_told(own) if own else "", earlier=done)
    if result.status == "running":
        raise RuntimeError(f"point {flight.number} was to be told before it was measured")
    searcher.tell(flight.number, result)
    return result


def _told(failure: Failure) -> str:
    return failure.reason + (f" (to see it again: {failure.command})" if failure.command else "")
