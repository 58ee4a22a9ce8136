"""`ebbline status`: a study's progress, once or live, read from outside the driver's process."""

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.live import Live as Redrawn

from ebbline.analysis.report.report import rows_for_scripts, summary
from ebbline.analysis.results.collect import StoredEvidence, baselines, collect, costs_before
from ebbline.analysis.results.controls.means import collect_controls
from ebbline.analysis.results.costs import cost_label, cost_summary, study_cost
from ebbline.analysis.results.measurements import Baselines, Evidence
from ebbline.analysis.results.no_refusals import no_refusals
from ebbline.analysis.results.retrying import advice, retry_hint
from ebbline.analysis.results.tables import frontier_frame, frontier_text
from ebbline.analysis.results.wording import NO_RESULT, reason_label, status_label
from ebbline.cluster.schedule.costs import Cost
from ebbline.commands.slurm.queue import queued_job
from ebbline.outputs import answer_text
from ebbline.show import Lines, Picture, budgeted, progress_line
from ebbline.sweeps.drive.live import Live, read_live
from ebbline.sweeps.forecast.expected import expected_points
from ebbline.sweeps.state.controls import ControlResult
from ebbline.sweeps.state.spending import Spent, read_spent
from ebbline.sweeps.state.stopping import still_met
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import Result, Status
from ebbline.sweeps.study.space import limit
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tables import table_width
from ebbline.tasks.errors import DatabaseLost, EbblineError, StoreError

LOOK_EVERY_S = 1.0
GIVE_UP_AFTER_S = 60.0  # how long a store that changes, or a database that is away, may fail
SHOWN_EDITS = 10  # lines on what changed in the study file
READ_SHARE = 0.1  # at most this share of the time goes into reading the points
CLOCKS = {
    "at",
    "left_s",
    "pace",
    "spent",
    "taken",
}  # a snapshot's fields that change without an event


def live_of(home: Home, study: str, holder: str | None) -> Live | None:
    """The snapshot of the present drive. None without a driver, or when this home has no snapshot
    of it.
    """
    live = read_live(home.path(study)) if holder is not None else None
    return (
        live
        if live is not None and live.ended is None and live.driver.startswith(holder or "")
        else None
    )


def watch_status(
    view: StudyView, as_json: bool, wide: bool = False, console: Console | None = None
) -> None:
    """Follow a study until its driver ends, then print its status. Ctrl-C ends the watching, not
    the run.

    With `as_json`, print a line for each change: the driver, the snapshot
    (ebbline.sweeps.drive.live) and the frontier. The last line has no driver.
    """
    watched = _Watched(view, as_json, console or Console(markup=False))
    try:
        watched.follow()
    except KeyboardInterrupt:
        print("stopped watching; the run continues", file=sys.stderr)
        return
    if not as_json:
        show_status(view, wide=wide)


def show_status(view: StudyView, as_json: bool = False, wide: bool = False) -> None:
    results = collect(view)
    print_status(
        view.study,
        view.home,
        results,
        baselines(view),
        costs_before(view),
        StoredEvidence(view),
        as_json,
        wide,
        view.edited(),
        collect_controls(view, results),
    )


class _Watched:
    def __init__(self, view: StudyView, as_json: bool, console: Console) -> None:
        self._view, self._as_json, self._console = view, as_json, console
        self._study, self._home = view.study, view.home
        self._picture, self._lines = Picture(view.study), Lines(console)
        self._read_at, self._last = -math.inf, ""
        self._counts: tuple[int, int] | None = None  # finished and amended points, at the last read
        self._unread_since: float | None = None
        self._read_s, self._waits = 0.0, False
        self._holder: str | None = None

    def follow(self) -> None:
        redrawn = None
        if self._console.is_terminal and not self._as_json:
            redrawn = Redrawn(
                self._picture, console=self._console, refresh_per_second=2, transient=True
            )
            redrawn.start()
        try:
            while self._look(redrawn is not None):
                time.sleep(LOOK_EVERY_S)
        finally:
            if redrawn is not None:
                redrawn.stop()
        if self._as_json:
            self._counts, self._read_at = None, -math.inf
            self._read(None)
            self._print_line(None, None)

    def _look(self, drawn: bool) -> bool:
        """Read once and print what is new. Returns False when the study has no driver any more."""
        live = None
        try:
            holder = self._holder = self._home.holder(self._study.study)
            if holder is None:
                return False
            live = live_of(self._home, self._study.study, holder)
            # The last snapshot stays while its driver closes
            self._picture.live = live or self._picture.live
            self._read(live)
            self._unread_since = None
        except (StoreError, DatabaseLost, OSError, ValueError, KeyError) as error:
            self._tolerate(error)
        if self._as_json:
            self._print_line(self._holder, live)
        elif not drawn and live is not None:
            self._lines.write(live)
        elif (
            not drawn
            and self._picture.live is None
            and self._holder is not None
            and not self._waits
        ):
            print(
                f"driven by {self._holder or 'another process'}; no snapshot in this home yet",
                flush=True,
            )
            self._waits = True
        return True

    def _tolerate(self, error: Exception) -> None:
        """Print a read error once: the next read may succeed. Raise it after GIVE_UP_AFTER_S."""
        now, reason = time.monotonic(), str(error) or type(error).__name__
        if self._unread_since is None:
            self._unread_since = now
            print(
                f"the study cannot be read now; retrying: {reason}",
                file=sys.stderr,
                flush=True,
            )
        elif now - self._unread_since >= GIVE_UP_AFTER_S:
            if isinstance(error, EbblineError):
                raise error
            raise StoreError(
                f"{self._study.study!r} could not be read for {GIVE_UP_AFTER_S:.0f} s: {reason}. "
                "Run the same command later"
            ) from error

    def _read(self, live: Live | None) -> None:
        """Read the points when there are more, or when one has more seeds. READ_SHARE limits how
        often.
        """
        counts = (0, 0) if live is None else (live.points.completed, live.points.amended)
        now = time.monotonic()
        if counts == self._counts or now - self._read_at < self._read_s / READ_SHARE:
            return
        frontier = type(self._picture.frontier)(self._study.objectives)
        frontier.aligned = baselines(self._view)
        frontier.take(collect(self._view))
        self._picture.frontier = frontier
        self._picture.draw(self._console)
        self._counts, self._read_at = counts, time.monotonic()
        self._read_s = self._read_at - now

    def _print_line(self, holder: str | None, live: Live | None) -> None:
        snapshot = None if live is None else live.model_dump(mode="json")
        frontier = self._picture.frontier
        line: dict[str, Any] = {
            "study": self._study.study,
            "driver": holder,
            "live": snapshot,
            "hypervolume": frontier.hypervolume,
        }
        line["frontier"] = rows_for_scripts(frontier.results)
        running = None if snapshot is None else [each["key"] for each in snapshot["running"]]
        without_clocks = (
            None
            if snapshot is None
            else {name: value for name, value in snapshot.items() if name not in CLOCKS}
            | {"running": running}
        )
        news = json.dumps({**line, "live": without_clocks})
        if news != self._last:
            self._last = news
            print(json.dumps(line), flush=True)


def print_status(
    study: Study,
    home: Home,
    results: Sequence[Result],
    before: Baselines,
    costs: Mapping[str, Cost],
    evidence: Evidence,
    as_json: bool,
    wide: bool = False,
    edited: Sequence[str] = (),
    controls: Sequence[ControlResult] = (),
) -> None:
    """Print a study's status. `costs` has the cost of measuring the models before fine-tuning, by
    key; `edited` what its file says now that it did not when it was last run.
    """
    counts = Counter(result.status for result in results)
    holder, past = home.holder(study.study), read_spent(home.path(study.study))
    live = live_of(home, study.study, holder)
    # A driver names its own job; this one waits for its next start.
    job = queued_job(home.path(study.study)) if holder is None else None
    limits = study.budget.model_dump(exclude_none=True)
    if as_json:
        cost = cost_summary(study_cost(results, costs, past), past, home.profile)
        now = {"driver": holder, "live": None if live is None else live.model_dump(mode="json")}
        print(
            json.dumps(
                {
                    **now,
                    "slurm": None if job is None else asdict(job),
                    "cost": cost,
                    "budget": limits,
                    "edited_since": list(edited),
                    **summary(study, results, before, evidence, controls),
                },
                indent=1,
            )
        )
        return
    without = "".join(
        f", {counts[status]} {status_label(status)}"
        for status in NO_RESULT
        if counts[status] or status == "failed"
    )
    print(f"{study.study}: {counts['done']} points done, {counts['running']} in flight{without}")
    print(f"driver: {holder or f'none; {_next_run(study, home, results, past)}'}")
    if job is not None:
        print(f"slurm: {job}")
    if live is not None:
        print(f"this run: {progress_line(live)}; {budgeted(live)}")
    phrases = {
        "hours": "{:g} hours of driving",
        "gpu_hours": "{:g} GPU-hours",
        "usd": "${:,.2f}",
        "points": "{:g} points",
    }
    budget = ", ".join(phrases[name].format(value) for name, value in limits.items())
    driven = (
        f"{cost_label(past.cost, home.profile)} in {past.driving_s / 3600:.3g} hours of driving"
    )
    print(f"spent: {driven}{f'; the budget: {budget}' if budget else ''}\n")
    frame = frontier_frame(results, study.objectives)
    print(frontier_text(frame, study.objectives, table_width(wide)))
    if text := answer_text(study, results, before, evidence, table_width(wide), controls):
        print(f"\n{text}")
    for note in no_refusals(study, before):
        print(f"\nnote: {note}")
    for line in [*without_result(results), retry_hint(results, study.study)]:
        if line:
            print(line, file=sys.stderr)
    if edited:
        shown = "\n".join(f"  {line}" for line in edited[:SHOWN_EDITS])
        print(
            f"the study file was edited since its last run, and the above does not follow it:\n"
            f"{shown}",
            file=sys.stderr,
        )


def without_result(results: Sequence[Result]) -> list[str]:
    """Why points have no result, a line for each reason: many points may lack the same stage. A
    reason includes the command that reruns the stage.
    """
    alike: dict[tuple[Status, str], list[Result]] = {}
    for result in results:
        if result.status in NO_RESULT:
            alike.setdefault((result.status, result.reason), []).append(result)
    return [
        f"{status_label(status)}: "
        f"{found[0].point}{f' and {len(found) - 1} more' if len(found) > 1 else ''}: "
        f"{reason_label(reason)}; {advice(found[0])}"
        for (status, reason), found in alike.items()
    ]


def _next_run(study: Study, home: Home, results: Sequence[Result], spent: Spent) -> str:
    """What the next run of a study would do."""
    return ended_because(study, home, results, spent) or "`ebbline run` continues it"


def ended_because(study: Study, home: Home, results: Sequence[Result], spent: Spent) -> str:
    """Why a study has ended; empty when a run would continue it."""
    if any(result.status in ("running", "skipped", "outdated") for result in results):
        return ""
    if len(results) >= (limit(study) or math.inf):
        return "all its points are done"
    met = still_met(study, spent.gain)
    ended = expected_points(
        study, home.database(study.study), "" if met is None else met.reason
    ).ended
    return f"it has ended: {ended}" if ended else ""
