"""What people see in a terminal: live progress and status. Plain lines when the output is not a terminal."""

import json
import math
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from analysis.compare import Baselines, Evidence
from analysis.costs import cost_summary, study_cost, told
from analysis.frontier import frontier, frontier_hypervolume
from analysis.report import summary
from analysis.tables import frontier_text, results_frame
from analysis.wording import NO_RESULT, clock, status_label
from cluster.costs import Cost
from cluster.nodes import Node
from sweeps.expected import points_of
from sweeps.home import Home
from sweeps.points import Result
from sweeps.progress import Progress
from sweeps.search import limit
from sweeps.spending import Spent, read_spent
from sweeps.stopping import still_met
from sweeps.study import Study

ORDER = ("language", "convert", "organism", "data", "train", "subspace", "project", "apply", "generate", "judge", "score", "evaluate")
PLAIN_EVERY_S, PICTURE_EVERY_S = 5.0, 0.5
LINES = 8  # stages that say what they are at
REASONS = 3  # the latest points without a result that are named


class Screen:
    """Watches a drive. `with Screen() as screen: drive(..., watch=screen)`.

    It looks at what is under way and at what landed since the last time, never at all there is: a study may have very many points.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._live = Live(console=self.console, refresh_per_second=2, transient=True) if self.console.is_terminal else None
        self._said_at = -math.inf
        self._last = ""
        self._landed = 0  # results that were looked at
        self._frontier: list[Result] = []  # of these
        self._reasons = deque[str](maxlen=REASONS)

    def __enter__(self) -> "Screen":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._said_at < (PICTURE_EVERY_S if self._live else PLAIN_EVERY_S):
            return
        self._said_at = now
        if self._live:
            self._live.update(self._picture(progress))
            return
        line = _line(progress)
        if line != self._last:
            self.console.print(line, highlight=False, soft_wrap=True)
        self._last = line

    def _picture(self, progress: Progress) -> Group:
        """Bars for the stages of each kind, what those that run say of themselves, and what came of the points of this run."""
        self._look(progress)
        failed = [Text(reason, style="red") for reason in self._reasons]
        reached = frontier_hypervolume(self._frontier, progress.study.objectives) if self._frontier else 0.0
        said = Text(f"hypervolume so far {reached:.3f}" if progress.results else "")
        return Group(_head(progress), _bars(progress), *_at_work(progress), *failed, said)

    def _look(self, progress: Progress) -> None:
        """Take in the results that landed since the last time."""
        new = progress.results[self._landed :]
        self._landed += len(new)
        self._reasons += [f"  {status_label(each.status)}: {each.point}: {each.reason.splitlines()[0]}" for each in new if each.reason]
        if any(each.status == "done" for each in new):
            self._frontier = frontier([*self._frontier, *new], progress.study.objectives)


def _running(progress: Progress) -> Iterator[Node]:
    return (node for node in progress.runner.unsettled() if node.state == "running")


def _line(progress: Progress) -> str:
    total = sum(progress.runner.counts.values(), Counter[str]())
    elapsed = time.monotonic() - progress.started
    at_work = [progress.planner.label(node.stage) for node in _running(progress)]
    head = f"[{clock(elapsed)}] stages {total['done']} done, {total['reused']} reused, {total['running']} running"
    points = f"points {_points(progress)}, about {clock(progress.runner.remaining_s())} left for those in flight"
    return f"{head}; {points}; {_spent(progress)}" + (f"; now: {at_work[0]}" if at_work else "")


def _spent(progress: Progress) -> str:
    """What is spent, and of what this run was predicted to take."""
    spent, profile, prediction = progress.spending.spent(), progress.spending.profile, progress.prediction
    if prediction is None:
        return f"{told(spent.cost, profile)} spent"
    return f"{told(prediction.since(spent)[1], profile)} of predicted {told(prediction.cost, profile)} in {clock(prediction.wall_s)} spent"


def _points(progress: Progress) -> str:
    return f"{progress.told}" + (f"/{progress.limit}" if progress.limit else "")


def _head(progress: Progress) -> Text:
    elapsed = time.monotonic() - progress.started
    left = clock(progress.runner.remaining_s())
    said = f"{clock(elapsed)} so far, about {left} left for those in flight, {_spent(progress)}"
    return Text(f"{progress.study.study}: {_points(progress)} points, {said}")


def _bars(progress: Progress) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "", "done", "reused", "running", "waiting", "failed"):
        table.add_column(column, justify="left" if column in ("stage", "") else "right")
    counts = progress.runner.counts
    for kind in sorted(counts, key=ORDER.index):
        count = counts[kind]
        finished, total = count["done"] + count["reused"], sum(count.values())
        waiting = count["waiting"] + count["ready"]
        numbers = [str(number or "") for number in (count["done"], count["reused"], count["running"], waiting, count["failed"])]
        table.add_row(kind, ProgressBar(total=total, completed=finished, width=24), *numbers)
    return table


def _at_work(progress: Progress) -> list[Text]:
    lines = [(node, said) for node in _running(progress) if (said := progress.runner.progress_of(node))][:LINES]
    return [Text(f"  {progress.planner.label(node.stage)}  {said}", style="dim", no_wrap=True, overflow="ellipsis") for node, said in lines]


def print_status(
    study: Study, home: Home, results: Sequence[Result], before: Baselines, costs: Mapping[str, Cost], evidence: Evidence, as_json: bool
) -> None:
    """`costs` is what measuring the models before fine-tuning cost, by key."""
    counts = Counter(result.status for result in results)
    holder, spent = home.holder(study.study), read_spent(home.folder(study.study))
    limits = study.budget.model_dump(exclude_none=True)
    if as_json:
        cost = cost_summary(study_cost(results, costs, spent), spent, home.profile)
        print(json.dumps({"driver": holder, "cost": cost, "budget": limits, **summary(study, results, before, evidence)}, indent=1))
        return
    without = "".join(f", {counts[status]} {status_label(status)}" for status in NO_RESULT if counts[status] or status == "failed")
    print(f"{study.study}: {counts['done']} points done, {counts['running']} in flight{without}")
    print(f"driver: {holder or f'none; {_standing(study, home, results, spent)}'}")
    words = {"hours": "{:g} hours of driving", "gpu_hours": "{:g} GPU-hours", "usd": "${:,.2f}", "points": "{:g} points"}
    budget = ", ".join(words[name].format(value) for name, value in limits.items())
    driven = f"{told(spent.cost, home.profile)} in {spent.driving_s / 3600:.3g} hours of driving"
    print(f"spent: {driven}{f'; the budget: {budget}' if budget else ''}\n")
    print(frontier_text(results_frame(results, study.objectives)))
    for result in results:
        if result.status in NO_RESULT:
            print(f"{status_label(result.status)}: {result.point}: {result.reason}", file=sys.stderr)


def _standing(study: Study, home: Home, results: Sequence[Result], spent: Spent) -> str:
    """What a run of a study that nobody drives would do."""
    if any(result.status in ("running", "out_of_budget") for result in results):
        return "`ebbline run` continues it"
    if len(results) >= (limit(study) or math.inf):
        return "all its points are there"
    met = still_met(study, spent.gain)
    ended = points_of(study, home.storage(study.study), "" if met is None else met.said).ended
    return f"it has ended: {ended}" if ended else "`ebbline run` continues it"
