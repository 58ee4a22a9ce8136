"""The driving loop: keep a window of points in flight, run their stages, tell the search, stop when it has no more.

Running the same study again is always safe: points come from the Optuna storage, outputs from the store, and what is
there is not made again. Only one driver holds a study at a time.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.executor import Executor
from cluster.runner import Failure, Runner
from sweeps.home import Home
from sweeps.outcome import result_of
from sweeps.plan import Planner
from sweeps.points import Point, Result, StageName
from sweeps.racing import rivals_of, standing
from sweeps.search import OptunaSearcher, Searcher, check_written_points, limit
from sweeps.study import Study
from tasks.errors import StudyError
from tasks.specs import KINDS
from tasks.stage import Stage

MEASURES = ("score", "evaluate")  # the kinds of the stages that have metrics


@dataclass
class Flight:
    """A point on its way: all that it may need, and of that what it has asked for so far (a raced suite asks block by block)."""

    number: int
    point: Point
    stages: dict[str, Stage]
    asked: list[Stage]


@dataclass
class Progress:
    """What a watcher sees after every heartbeat. `told` counts all points told, `results` holds those of this run, in order."""

    study: Study
    planner: Planner
    runner: Runner
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
    with home.driving(study.study):
        planner = Planner(study, home)
        check_written_points(study)
        home.freeze(study)
        searcher = OptunaSearcher(study, home.storage_url(study.study))
        executor = make_executor()
        try:
            return _loop(study, planner, searcher, Runner(home.store, executor, planner.needs_of, home.profile), watch, stop)
        finally:
            executor.close()


def _loop(study: Study, planner: Planner, searcher: OptunaSearcher, runner: Runner, watch: Watcher, stop: Callable[[], bool]) -> Progress:
    progress = Progress(study, planner, runner, limit=limit(study))
    baselines = [stage for suites in planner.baselines().values() for stage in suites.values()]
    runner.want(baselines)
    done: list[Result] = []
    again = [_take_off(number, point, planner, runner) for number, point in searcher.measured()]
    progress.told = searcher.told()
    flights = deque(_take_off(number, point, planner, runner) for number, point in searcher.in_flight())
    exhausted = False
    while True:
        while not exhausted and not runner.draining and len(flights) < study.search.window:
            if _over_budget(study, progress):
                exhausted, progress.stopped = True, f"the budget of {study.budget.hours} hours is spent"
                break
            asked = searcher.ask()
            if asked is None:
                exhausted = True
            else:
                flights.append(_take_off(*asked, planner, runner))
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
                    _ask_more(study, flight, runner, done)
        if flights and not again and not runner.draining and all(runner.settled(stage) for stage in flights[0].asked):
            # One at a time: the next proposal is to see exactly this result more than the one before it did. None while
            # draining, as nothing is asked then: the next run lands them from the store.
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
        runner.step()
    progress.in_flight = list(flights)
    watch(progress)
    return progress


def _take_off(number: int, point: Point, planner: Planner, runner: Runner) -> Flight:
    stages = planner.stages_for(point)
    flight = Flight(number, point, stages, [stage for name, stage in stages.items() if StageName.parse(name).part in KINDS])
    runner.want(flight.asked)
    return flight


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


def _over_budget(study: Study, progress: Progress) -> bool:
    return study.budget.hours is not None and time.monotonic() - progress.started > study.budget.hours * 3600
