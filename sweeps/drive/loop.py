"""The driving loop: keep the cluster busy with points, run their stages, tell the search, stop when
it has no more.

Running the same study again is always safe: points come from the Optuna storage, outputs from the
store, and what is there is not made again. Only one driver holds a study at a time.
"""

from collections import Counter
from collections.abc import Callable, Iterator

from ebbline.cluster.executors.choice import DEFAULT_EXECUTOR, ExecutorKind
from ebbline.cluster.executors.executor import Executor
from ebbline.cluster.running.nodes import Failure
from ebbline.cluster.running.runner import Runner
from ebbline.sweeps.drive.budget_gate import BudgetGate
from ebbline.sweeps.drive.progress import Progress, Watcher
from ebbline.sweeps.drive.snapshot import Writer, mirrored
from ebbline.sweeps.forecast.prediction import Prediction
from ebbline.sweeps.search.knowledge import Knowledge
from ebbline.sweeps.search.searcher import (
    OptunaSearcher,
    Wait,
    check_written_points,
    limit,
    reaching,
)
from ebbline.sweeps.search.warm_start import lessons
from ebbline.sweeps.state.in_flight import PointInFlight, has_room, queued_gpus, start_affordable
from ebbline.sweeps.state.jobs import estimates_of
from ebbline.sweeps.state.outcome import Duplicates, result_of
from ebbline.sweeps.state.racing import Rivals
from ebbline.sweeps.state.replicates import seeds_needed, seeds_of
from ebbline.sweeps.state.spending import Stopped, require_prices, spending
from ebbline.sweeps.state.stopping import Gains, rule_of, still_met
from ebbline.sweeps.study.points import REFUSED, Point, Result
from ebbline.sweeps.study.stages import of_seeds, stages_or_refusal
from ebbline.sweeps.study.storage import Hold
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError
from ebbline.tasks.stage import Stage

NEWS = 20


def drive(
    view: StudyView,
    make_executor: Callable[[], Executor],
    watch: Watcher = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
    predict: Callable[[Executor], Prediction | None] = lambda executor: None,
    kind: ExecutorKind = DEFAULT_EXECUTOR,
) -> Progress:
    """Run a study to its end: the aligned models before fine-tuning, then the search's points.

    The executor, of this `kind`, is made once the study is held, and closed at the end; `predict`
    says what the run will take there. `stop` turning true drains and returns. Others can watch
    through ebbline.sweeps.drive.live. Raises StudyHeld when another driver has the study,
    StudyError when it is another study than was begun, or a model cannot be measured before
    fine-tuning.
    """
    study, home, storage = view.study, view.home, view.storage
    with home.driving(study.study) as hold, reaching(storage):
        graph = view.graph
        check_written_points(study)
        require_prices(study, home.profile)
        # The database learns of a wider study first: a driver that is killed in between finds the
        # old one here, and widens it again.
        searcher = OptunaSearcher(study, storage, view.begun_as())
        view.freeze()
        for name, found in lessons(study, home).items():
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
                with mirrored(progress, view.folder, hold.driver) as live:
                    return _Drive(progress, searcher, hold, watch, stop, live).run()
            finally:
                executor.close()


class _Drive:
    """One run of a study. `again` are points that were told before, and are heard again; `more` get
    a further seed.
    """

    def __init__(
        self,
        progress: Progress,
        searcher: OptunaSearcher,
        hold: Hold,
        watch: Watcher,
        stop: Callable[[], bool],
        live: Writer,
    ) -> None:
        self.progress, self.searcher, self.hold, self.watch, self.stop, self.live = (
            progress,
            searcher,
            hold,
            watch,
            stop,
            live,
        )
        self.study, self.graph, self.runner = progress.study, progress.graph, progress.runner
        self.in_turn = self.study.search.in_turn
        self.budget_gate = BudgetGate(self.graph, self.runner, progress.spending)
        self.baselines = [
            stage for suites in self.graph.baselines().values() for stage in suites.values()
        ]
        self.knowledge = Knowledge(self.graph, self.runner)
        self.in_flight: list[PointInFlight] = []
        self.again: list[PointInFlight] = []
        self.more: list[PointInFlight] = []
        self.rivals, self.duplicates = Rivals(self.study), Duplicates(self.study)
        self.results: dict[int, Result] = {}  # over all seeds that there are
        self.most = dict(
            searcher.gave_up()
        )  # seeds that a point can have, of points whose further seed failed
        self.unaffordable: PointInFlight | None = None
        self.exhausted = self.waiting = False
        self.news = Counter[
            str
        ]()  # by size, results since it was last asked which points need more seeds
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
        self.again = [self._in_flight(number, point) for number, point in self.searcher.measured()]
        for entry in self.again:
            entry.start(runner)
        progress.told = self.searcher.told()
        self.in_flight = [
            self._in_flight(number, point) for number, point in self.searcher.in_flight()
        ]
        while True:
            self._ask()
            progress.in_flight = list(self.in_flight)
            self._show()
            self._check_baselines()
            if not runner.draining:
                self._hear()
                if self._tell_ended():
                    continue
                self._replicate()
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
                and not (self.in_flight or self.again or self.more)
                and all(map(runner.settled, self.baselines))
            ):
                raise RuntimeError("the search waits for a point, and none is under way")
            if runner.starved or (self.unaffordable is not None and runner.idle):
                said = self._told_of_budget()
                self.ended = Stopped(said, "budget", points=progress.told)
                progress.spending.stopped(self.ended)
                break
            runner.step(started=self._show)
            progress.spending.settle(runner.running)
        if self.ended is not None and not progress.stopped:
            progress.stopped, progress.by = self.ended.said, self.ended.by
        progress.in_flight = list(self.in_flight)
        self._show()
        return progress

    def _show(self) -> None:
        self.live()
        self.watch(self.progress)

    def _in_flight(self, number: int, point: Point) -> PointInFlight:
        stages, refused = stages_or_refusal(self.graph, point)
        return PointInFlight(
            number, point, of_seeds(self.study, stages, self.study.first_seeds), refused
        )

    def _ask(self) -> None:
        """Start what the budget affords, and ask for points as long as there is room for
        them.
        """
        self.waiting = False
        self.unaffordable = (
            None
            if self.runner.draining
            else start_affordable(
                [*self.more, *self.in_flight], self.runner, self.budget_gate.affords
            )
        )
        while self._may_ask():
            self.hold.check()
            asked = self.searcher.ask(self.knowledge)
            if asked is None or isinstance(asked, Wait):
                self.exhausted, self.waiting = asked is None, asked is not None
                return
            entry = self._in_flight(*asked)
            self.in_flight.append(entry)
            self.unaffordable = start_affordable([entry], self.runner, self.budget_gate.affords)
            self._ask_more(entry)

    def _may_ask(self) -> bool:
        progress = self.progress
        there = progress.told + len(self.in_flight)
        self.exhausted = self.exhausted or (progress.limit is not None and there >= progress.limit)
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
        if self.again and (self.study.search.stop is not None or self.searcher.constrained):
            # Whether there is to be another point, or what holds the constraints, is not known yet
            return False
        if self.in_turn:
            return len(self.in_flight) < self.study.search.reach
        queued = queued_gpus(
            self._open(), self.runner, lambda stage: self.graph.needs_of(stage).gpus
        )
        return has_room(
            len(self.in_flight), self.study.search.window, queued, self.runner.executor.capacity
        )

    def _out_of_points(self) -> bool:
        budget = self.study.budget.points
        return budget is not None and self.progress.told + len(self.in_flight) >= budget

    def _end_with_points(self) -> None:
        budget = self.study.budget.points
        said = (
            f"the budget of {budget} points is used up. Raise budget.points in the study file, "
            "and the same command goes on"
        )
        self.ended = Stopped(said, "budget", points=self.progress.told + len(self.in_flight))
        self.progress.spending.stopped(self.ended)

    def _open(self) -> Iterator[Stage]:
        yield from self.baselines
        for entry in (*self.in_flight, *self.more, *self.again):
            yield from entry.asked

    def _check_baselines(self) -> None:
        """What every point of a size needs has failed: stop, and tell no point that it failed for a
        fault of its own.
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
            raise StudyError(f"a model could not be measured before fine-tuning: {_told(broken)}")

    def _hear(self) -> None:
        """Ask for what points need next; take in what was told before, in order, as far as its
        artifacts are there (or made) again.
        """
        for entry in list(self.again):
            self._ask_more(entry)
            if entry.settled(self.runner):
                self.again.remove(entry)
                result = self._result(entry)
                if result.status == "done" and self.searcher.constrained:
                    self.searcher.amend(entry.number, result)
                self._take(result)
            elif self.in_turn:
                return  # what follows is compared with those before it, which must be known first
        for entry in (*self.in_flight, *self.more):
            self._ask_more(entry)

    def _ask_more(self, entry: PointInFlight) -> None:
        if self.rivals.compares and entry.asks:
            model = entry.point.model
            first = [
                next((each.number for each in those if each.point.model == model), None)
                for those in (self.again, self.in_flight)
            ]
            if any(
                number is not None and number <= entry.number - self.study.search.reach
                for number in first
            ):
                return  # what it is compared with is not known yet
        entry.ask_more(self.study, self.runner, self.rivals)

    def _tell_ended(self) -> bool:
        """Tell the search of points that ended; True when there were any.

        In turn it is one at a time: the next proposal is to see exactly this result more than the
        one before it did. None while nothing is asked for want of budget, of points or of what they
        take: the next run tells them from the store.
        """
        if self.in_turn:
            full = (
                self.exhausted
                or self.ended is not None
                or self.waiting
                or len(self.in_flight) == self.study.search.reach
            )
            ended = self.in_flight[:1] if full and not self.again else []
        else:
            ended = self.in_flight
        ended = [entry for entry in ended if entry.settled(self.runner)]
        for entry in ended:
            self.hold.check()
            self.in_flight.remove(entry)
            result = self._ended(entry)
            self.searcher.tell(entry.number, result)
            self._take(result)
            self.progress.results.append(result)
            self.progress.told += 1
        return bool(ended)

    def _ended(self, entry: PointInFlight) -> Result:
        failure = entry.failure(self.runner)
        result = self._result(entry, entry.refused or (_told(failure) if failure else ""))
        if result.status == "running":
            raise RuntimeError(f"point {entry.number} was to be told before it was measured")
        return result

    def _result(self, entry: PointInFlight, reason: str = "") -> Result:
        return result_of(
            self.study, entry.number, entry.point, entry.stages, self.runner, reason, self.rivals
        )

    def _take(self, result: Result) -> None:
        self._keep(result)
        self.progress.taken.append(self.duplicates.marked(result))
        if result.status != "done":
            return
        self.gains.add(result)
        said = "" if self.again or self.ended is not None else self.gains.met()
        if said:
            self.ended = Stopped(said, "gain", rule_of(self.study), self.gains.points)
            self.progress.spending.stopped(self.ended)

    def _keep(self, result: Result) -> None:
        self.results[result.number] = result
        self.news[result.point.model] += 1
        self.rivals.add(result)
        self.duplicates.add(result)

    def _replicate(self) -> None:
        """Further seeds for points of which it is not certain whether another dominates them; in
        turn, once all points have ended.
        """
        for entry in [entry for entry in self.more if entry.settled(self.runner)]:
            self.more.remove(entry)
            self.news[entry.point.model] += 1
            self._take_further(entry)
        over = self._over()
        if self.study.replicates.policy == "all" or self.again or (self.in_turn and not over):
            return
        if not over and self.news.total() < len(self.results) / NEWS:
            return  # of many points few change what is certain
        for entry in self.in_flight if over else ():  # ended, and held back from the search
            if entry.number not in self.results:
                self._keep(self._ended(entry))
        # Who needs one more is decided by what all points of a size had before: when no more come,
        # not as long as some are under way.
        sizes = set(self.news) - {entry.point.model for entry in self.more if over}
        for model in sizes:
            del self.news[model]
        known = [
            self.duplicates.marked(result)
            for result in self.results.values()
            if result.point.model in sizes
        ]
        under_way = {entry.number for entry in self.more}
        for number, seeds in seeds_needed(self.study, known, self.most).items():
            result = self.results[number]
            if seeds > seeds_of(result) and number not in under_way:
                stages, _ = stages_or_refusal(self.graph, result.point)
                self.more.append(
                    PointInFlight(number, result.point, of_seeds(self.study, stages, seeds))
                )

    def _take_further(self, entry: PointInFlight) -> None:
        """Take in a further seed of a point: what the point measured with it, or that it can have
        no more.
        """
        number, failure = entry.number, entry.failure(self.runner)
        if failure is not None:
            self.most[number] = seeds_of(self.results[number])
            self.hold.check()
            self.searcher.give_up(
                number, self.most[number], f"a further seed failed: {_told(failure)}"
            )
            return
        result = self.results[number] = self._result(entry)
        if all(
            each.number != number for each in self.in_flight
        ):  # else the search has not been told of it
            self.searcher.amend(number, result)
            self.progress.taken.append(self.duplicates.marked(result))
            self.progress.amended += 1

    def _over(self) -> bool:
        """Whether this run asks for no further point, and all that there are have ended; in turn,
        some may be held back (see _tell_ended).
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
            and not (self.again or self.more)
            and all(map(self.runner.settled, self.baselines))
        )

    def _told_of_budget(self) -> str:
        if self.unaffordable is None:
            return self.budget_gate.told_of_stage()
        return self.budget_gate.told_of_point(str(self.unaffordable), self.unaffordable.stages)


def _told(failure: Failure) -> str:
    refused = REFUSED if failure.invalid_input else ""
    return (
        refused
        + failure.reason
        + (f" (to see it again: {failure.command})" if failure.command else "")
    )
