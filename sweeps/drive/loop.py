"""The driving loop of a study.

It asks the search for points, runs their stages, and tells the search the results. It ends when the
search has no more points, or the study has to stop.

Invariant: a rerun of a study is safe. Points come from the study's database and outputs from the
store; existing outputs are reused. One driver at a time holds a study.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from ebbline.cluster.executors.choice import DEFAULT_EXECUTOR, ExecutorKind
from ebbline.cluster.executors.executor import Executor
from ebbline.cluster.running.nodes import Failure
from ebbline.cluster.running.runner import Runner
from ebbline.sweeps.drive.budget_gate import BudgetGate
from ebbline.sweeps.drive.controls_in_flight import ControlsInFlight
from ebbline.sweeps.drive.further_seeds import FurtherSeeds
from ebbline.sweeps.drive.progress import Progress, Watcher
from ebbline.sweeps.drive.snapshot import Writer, mirrored
from ebbline.sweeps.forecast.prediction import Prediction
from ebbline.sweeps.search.knowledge import Knowledge
from ebbline.sweeps.search.searcher import (
    StudySearcher,
    Wait,
    check_written_points,
    limit,
    reaching,
)
from ebbline.sweeps.search.warm_start import prior_results
from ebbline.sweeps.state.in_flight import PointInFlight, has_room, queued_gpus, start_affordable
from ebbline.sweeps.state.jobs import estimates_of
from ebbline.sweeps.state.outcome import Duplicates, result_of
from ebbline.sweeps.state.races.racing import Rivals
from ebbline.sweeps.state.replicates import seeds_of
from ebbline.sweeps.state.result_cache import ResultCache
from ebbline.sweeps.state.spending import Stopped, require_prices, spending
from ebbline.sweeps.state.stopping import Gains, rule_of, still_met
from ebbline.sweeps.study.database import Hold
from ebbline.sweeps.study.points import INVALID, Point, Result, without_stages
from ebbline.sweeps.study.stages import of_seeds, stages_or_reason
from ebbline.sweeps.study.suites import require_servers
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError

# The runner lets go of stages when it has LET_GO_AT, and LET_GO_GROWTH times what it last kept
LET_GO_AT, LET_GO_GROWTH = 1024, 2
_log = logging.getLogger(__name__)


def drive(
    view: StudyView,
    make_executor: Callable[[], Executor],
    watch: Watcher = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
    predict: Callable[[Executor], Prediction | None] = lambda executor: None,
    kind: ExecutorKind = DEFAULT_EXECUTOR,
    retry: Sequence[int] | None = (),
) -> Progress:
    """Run a study to its end: the aligned models before fine-tuning, then the search's points.

    `make_executor` makes an executor of this `kind` after the driver holds the study; it is closed
    at the end. `predict` returns the prediction for a run on it. When `stop` returns true, running
    stages end and the drive returns. `retry` has the numbers of failed points to try again; None
    means all of them. Other processes can watch through ebbline.sweeps.drive.live.

    Raises StudyHeld when another driver holds the study. Raises StudyError when the settings differ
    from those the study began with, or when a model cannot be measured before fine-tuning.
    """
    study, home, database = view.study, view.home, view.database
    with home.driving(study.study) as hold, reaching(database):
        graph = view.graph
        check_written_points(study)
        require_prices(study, home.profile)
        suites = {name: suite.measure for name, suite in study.suites.items()}
        require_servers(suites, home.profile)
        # The database gets a widened study before the home does. A driver that is killed in between
        # finds the old study in the home, and widens it once more.
        searcher = StudySearcher(study, database, view.begun_as())
        if view.revisions():
            searcher.revise()
        view.freeze()
        if retry is None or retry:
            searcher.retry(retry)
        for name, found in prior_results(study, home).items():
            searcher.teach(name, found)
        with spending(study, home.profile, view.folder, hold.driver) as spent:
            executor = make_executor()
            try:
                estimates = estimates_of(home, kind)
                runner = Runner(
                    home.store, executor, graph.needs_of, home.profile, spent, estimates
                )
                progress = Progress(
                    study, graph, runner, spent, limit=limit(study), prediction=predict(executor)
                )
                cache = ResultCache(study, home.store, view.folder)
                with mirrored(progress, view.folder, hold.driver) as live:
                    try:
                        return _Drive(progress, searcher, hold, watch, stop, live, cache).run()
                    finally:
                        cache.close()
            finally:
                _close(executor)


def _close(executor: Executor) -> None:
    """Close an executor. All results are in the store by now, so a failure is only a warning."""
    try:
        executor.close()
    except Exception as error:  # noqa: BLE001  # whatever the executor's library raises
        _log.warning("the executor could not be closed: %s: %s", type(error).__name__, error)


class _Drive:
    """One run of a study.

    `cached` are results of earlier runs that still hold. `reloading` are the other points completed
    in earlier runs: their results are read again from the store. `further` has the points that get
    a further seed.
    """

    def __init__(
        self,
        progress: Progress,
        searcher: StudySearcher,
        hold: Hold,
        watch: Watcher,
        stop: Callable[[], bool],
        live: Writer,
        cache: ResultCache,
    ) -> None:
        self.progress, self.searcher, self.hold, self.watch, self.stop, self.live = (
            progress,
            searcher,
            hold,
            watch,
            stop,
            live,
        )
        self.cache = cache
        self.study, self.graph, self.runner = progress.study, progress.graph, progress.runner
        self.in_turn = self.study.search.in_turn
        self.budget_gate = BudgetGate(self.graph, self.runner, progress.spending)
        self.baselines = [
            stage for suites in self.graph.baselines().values() for stage in suites.values()
        ]
        self.knowledge = Knowledge(self.graph, self.runner)
        self.in_flight: list[PointInFlight] = []
        self.cached: dict[int, Result] = {}
        self.reloading: list[PointInFlight] = []
        self.further = FurtherSeeds(self.graph, searcher.gave_up())
        self.controls = ControlsInFlight(self.graph)
        self.rivals, self.duplicates = Rivals(self.study), Duplicates(self.study)
        self.results: dict[int, Result] = {}  # by number, over all seeds so far
        self.unaffordable: PointInFlight | None = None
        self.exhausted = self.waiting = False
        self.let_go_at = LET_GO_AT
        before = progress.spending.gain
        rule = rule_of(self.study)
        self.ended = still_met(self.study, before)
        self.gains = Gains(
            self.study,
            progress.spending.profile,
            0 if before is None or before.rule == rule else before.points,
        )

    def run(self) -> Progress:
        progress, runner = self.progress, self.runner
        runner.add(self.baselines)
        self.searcher.estimate(self.knowledge)
        self.cached = self.cache.read_to_write(self.searcher.trials.entries)
        self.reloading = [
            self._point_in_flight(number, point)
            for number, point in self.searcher.done()
            if number not in self.cached
        ]
        for entry in self.reloading:
            entry.start(runner)
        progress.completed = self.searcher.completed()
        self.in_flight = [
            self._point_in_flight(number, point) for number, point in self.searcher.in_flight()
        ]
        while True:
            self._ask()
            progress.in_flight = list(self.in_flight)
            self._show()
            self._let_go()
            self._check_baselines()
            if not runner.draining:
                self._request_and_reload()
                if self._tell_ended():
                    continue
                self._run_further_seeds()
                if self._run_controls():
                    continue
            if self._finished():
                if self.ended is None and not self.exhausted:
                    self._end_with_points()
                break
            if self.stop():
                runner.draining, progress.stopped, progress.by = (
                    True,
                    "stopped on request",
                    "request",
                )
            if runner.draining and not runner.running:
                break
            if (
                self.waiting
                and not (self.in_flight or self._reloads or self.further.in_flight)
                and all(map(runner.settled, self.baselines))
            ):
                raise RuntimeError("the search waits for a result, but no point is in flight")
            if runner.starved or (self.unaffordable is not None and runner.idle):
                message = self._budget_message()
                self.ended = Stopped(message, "budget", points=progress.completed)
                progress.spending.stopped(self.ended)
                break
            runner.step(started=self._show)
            progress.spending.settle(runner.running)
        if self.ended is not None and not progress.stopped:
            progress.stopped, progress.by = self.ended.reason, self.ended.by
        progress.in_flight = list(self.in_flight)
        self._show()
        return progress

    def _let_go(self) -> None:
        """Let go of the stages of points that have ended, once they are half of all: looking for
        them takes time.
        """
        if len(self.runner.nodes) >= self.let_go_at:
            open_points = (
                *self.in_flight,
                *self.further.in_flight,
                *self.reloading,
                *self.controls.in_flight,
            )
            needed = [stage for entry in open_points for stage in entry.stages.values()]
            self.graph.forget(self.runner.let_go([*self.baselines, *needed]))
            self._let_go_of_results()
            self.let_go_at = max(LET_GO_AT, LET_GO_GROWTH * len(self.runner.nodes))

    def _let_go_of_results(self) -> None:
        """Let go of the keys and costs of recorded results. Only a policy of further seeds reads
        them again.
        """
        if self.study.replicates.policy != "all":
            return
        for number, result in self.results.items():
            if result.keys or result.costs:
                self.results[number] = without_stages(result)
        for listed in (self.progress.results, self.progress.history):
            for place, result in enumerate(listed):
                lean = self.results[result.number]
                listed[place] = (
                    lean if result.same_as is None else replace(lean, same_as=result.same_as)
                )

    def _show(self) -> None:
        self.live()
        self.watch(self.progress)

    def _point_in_flight(self, number: int, point: Point) -> PointInFlight:
        stages, invalid = stages_or_reason(self.graph, point)
        return PointInFlight(
            number, point, of_seeds(self.study, stages, self.study.first_seeds), invalid
        )

    def _ask(self) -> None:
        """Start the points that the budget affords, and ask for more while there is room."""
        self.waiting = False
        self.unaffordable = (
            None
            if self.runner.draining
            else start_affordable(
                [*self.further.in_flight, *self.in_flight, *self.controls.in_flight],
                self.runner,
                self.budget_gate.affords,
            )
        )
        while self._may_ask():
            self.hold.check()
            proposal = self.searcher.ask(self.knowledge)
            if proposal is None or isinstance(proposal, Wait):
                self.exhausted, self.waiting = proposal is None, proposal is not None
                return
            entry = self._point_in_flight(*proposal)
            self.in_flight.append(entry)
            self.unaffordable = start_affordable([entry], self.runner, self.budget_gate.affords)
            self._request_more(entry)
            if not self.runner.running:
                self.runner.start()  # workers begin while the rest of a window is asked for

    def _may_ask(self) -> bool:
        progress = self.progress
        count = progress.completed + len(self.in_flight)
        self.exhausted = self.exhausted or (progress.limit is not None and count >= progress.limit)
        if (
            self.exhausted
            or self.ended is not None
            or self.runner.draining
            or self.unaffordable is not None
        ):
            return False
        if self._out_of_points():
            if not self.in_turn:
                self._end_with_points()
            return False
        if self._reloads and (self.study.search.stop is not None or self.searcher.constrained):
            # search.stop and the constraints depend on results that are still being reloaded
            return False
        if self.in_turn:
            return len(self.in_flight) < self.study.search.effective_window
        queued = (
            0
            if self._fills_window()
            else queued_gpus(self.runner, lambda stage: self.graph.needs_of(stage).gpus)
        )
        return has_room(
            len(self.in_flight), self.study.search.window, queued, self.runner.executor.capacity
        )

    def _fills_window(self) -> bool:
        """Whether points need not wait for free GPUs. A grid or a list learns nothing from results;
        with a whole window in flight, the longest stages go first. Where the study may end before
        its last point, the points in flight are few.
        """
        search, budget = self.study.search, self.study.budget
        return (
            self.study.sampler in ("grid", "list")
            and search.window is not None
            and search.stop is None
            and not budget.model_dump(exclude_none=True)
        )

    def _out_of_points(self) -> bool:
        budget = self.study.budget.points
        return budget is not None and self.progress.completed + len(self.in_flight) >= budget

    def _end_with_points(self) -> None:
        budget = self.study.budget.points
        message = (
            f"the budget of {budget} points is used up. Raise budget.points in the study file, "
            "and the same command goes on"
        )
        self.ended = Stopped(
            message, "budget", points=self.progress.completed + len(self.in_flight)
        )
        self.progress.spending.stopped(self.ended)

    def _check_baselines(self) -> None:
        """Stop the run when a measurement that all points of a model need has failed.

        Raises StudyError; points are not marked as failed.
        """
        broken = next(
            (
                failure
                for stage in self.baselines
                if (failure := self.runner.failure(stage)) is not None
            ),
            None,
        )
        if broken is not None:
            raise StudyError(f"a model could not be measured before fine-tuning: {_reason(broken)}")

    def _request_and_reload(self) -> None:
        """Request the next stages of all points, and reload the results of earlier runs in order,
        as far as their artifacts are in the store.
        """
        for entry in list(self.reloading):
            self._record_cached(before=entry.number)
            self._request_more(entry)
            if entry.settled(self.runner):
                self.reloading.remove(entry)
                self.cache.begin(entry.number, entry.stages.values(), self.runner)
                result, failure = self._result(entry), entry.failure(self.runner)
                lost = "" if result.status == "done" else entry.invalid
                if failure is not None and result.status != "done":
                    lost = _reason(failure)
                self.hold.check()
                self.searcher.lose(entry.number, lost)
                if lost:
                    result = self._result(entry, lost)
                if result.status == "done" and self.searcher.constrained:
                    self.searcher.amend(entry.number, result)
                self.cache.add(self.searcher.trials.entries[entry.number], result)
                self._record(result)
            elif self.in_turn:
                return  # later points are compared with this one
        self._record_cached(before=None)
        for entry in (*self.in_flight, *self.further.in_flight):
            self._request_more(entry)

    @property
    def _reloads(self) -> bool:
        """Whether results of earlier runs are still to be recorded."""
        return bool(self.cached or self.reloading)

    def _record_cached(self, before: int | None) -> None:
        """Record the cached results of the points before this one; None means of all points."""
        for number in list(self.cached):
            if before is not None and number > before:
                return
            result = self.cached.pop(number)
            if self.searcher.constrained:
                self.searcher.amend(number, result)
            self._record(result)

    def _request_more(self, entry: PointInFlight) -> None:
        if self.rivals.compares and entry.may_request:
            model = entry.point.model
            first = [
                next((each.number for each in entries if each.point.model == model), None)
                for entries in (self.reloading, self.in_flight)
            ]
            if any(
                number is not None and number <= entry.number - self.study.search.effective_window
                for number in first
            ):
                return  # a point that it is compared with has no result yet
        entry.request_next(self.study, self.runner, self.rivals)

    def _tell_ended(self) -> bool:
        """Tell the search the results of points that ended; True when there were any.

        With `order: in_turn`, the search gets one result at a time, so that each proposal sees one
        result more than the one before it. While the budget allows no further proposal, the search
        gets no result: the next run reports them from the store.
        """
        if self.in_turn:
            full = (
                self.exhausted
                or self.ended is not None
                or self.waiting
                or len(self.in_flight) == self.study.search.effective_window
            )
            ended = self.in_flight[:1] if full and not self.reloading else []
        else:
            ended = self.in_flight
        ended = [entry for entry in ended if entry.settled(self.runner)]
        for entry in ended:
            self.hold.check()
            self.in_flight.remove(entry)
            self.cache.begin(entry.number, entry.stages.values(), self.runner)
            result = self._ended(entry)
            self.searcher.tell(entry.number, result)
            self.cache.add(self.searcher.trials.entries[entry.number], result)
            self._record(result)
            self.progress.results.append(result)
            self.progress.completed += 1
        return bool(ended)

    def _ended(self, entry: PointInFlight) -> Result:
        failure = entry.failure(self.runner)
        result = self._result(entry, entry.invalid or (_reason(failure) if failure else ""))
        if result.status == "running":
            raise RuntimeError(f"point {entry.number} ended before it was measured")
        return result

    def _result(self, entry: PointInFlight, reason: str = "") -> Result:
        return result_of(
            self.study, entry.number, entry.point, entry.stages, self.runner, reason, self.rivals
        )

    def _record(self, result: Result) -> None:
        self._keep(result)
        self.progress.history.append(self.duplicates.marked(result))
        if result.status != "done":
            return
        self.gains.add(result)
        message = "" if self._reloads or self.ended is not None else self.gains.met()
        if message:
            self.ended = Stopped(message, "gain", rule_of(self.study), self.gains.points)
            self.progress.spending.stopped(self.ended)

    def _keep(self, result: Result) -> None:
        self.results[result.number] = result
        self.further.note(result)
        self.rivals.add(result)
        self.duplicates.add(result)

    def _run_further_seeds(self) -> None:
        """Run further seeds for points that another point may or may not dominate.

        With `order: in_turn`, this waits until all points have ended.
        """
        for entry in self.further.remove_ended(self.runner):
            self._record_further(entry)
        over = self._over()
        if self.study.replicates.policy == "all" or self._reloads or (self.in_turn and not over):
            return
        if not over and not self.further.is_due(len(self.results)):
            return
        for entry in self.in_flight if over else ():  # ended, but not reported to the search
            if entry.number not in self.results:
                self._keep(self._ended(entry))
        self.further.decide(self.results, self.duplicates, over)

    def _run_controls(self) -> bool:
        """Run the controls, once all points and further seeds have ended; True when they were just
        decided.
        """
        self.controls.step(self.runner)
        if self.controls.decided or self._reloads or self.further.in_flight or not self._over():
            return False
        self.controls.decide([self.duplicates.marked(each) for each in self.results.values()])
        return bool(self.controls.in_flight)

    def _record_further(self, entry: PointInFlight) -> None:
        """Record a further seed of a point: its new metrics, or that it failed."""
        number, failure = entry.number, entry.failure(self.runner)
        if failure is not None:
            most = self.further.max_seeds[number] = seeds_of(self.results[number])
            self.hold.check()
            self.searcher.give_up(number, most, f"a further seed failed: {_reason(failure)}")
            return
        result = self.results[number] = self._result(entry)
        # The search does not have the result of a point that is still in flight
        if all(each.number != number for each in self.in_flight):
            self.searcher.amend(number, result)
            self.progress.history.append(self.duplicates.marked(result))
            self.progress.amended += 1

    def _over(self) -> bool:
        """Whether this run asks for no further point, and all its points have ended.

        With `order: in_turn`, ended points may still be in flight (see _tell_ended).
        """
        if self.exhausted or self.ended is not None:
            return not self.in_flight
        return (
            self.in_turn
            and self._out_of_points()
            and all(entry.settled(self.runner) for entry in self.in_flight)
        )

    def _finished(self) -> bool:
        return (
            self._over()
            and not (self._reloads or self.further.in_flight)
            and self.controls.decided
            and not self.controls.in_flight
            and all(map(self.runner.settled, self.baselines))
        )

    def _budget_message(self) -> str:
        if self.unaffordable is None:
            return self.budget_gate.stage_message()
        return self.budget_gate.point_message(str(self.unaffordable), self.unaffordable.stages)


def _reason(failure: Failure) -> str:
    prefix = INVALID if failure.invalid_input else ""
    return (
        prefix
        + failure.reason
        + (f" (to see it again: {failure.command})" if failure.command else "")
    )
