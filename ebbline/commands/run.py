"""`ebbline run`: drive a study, show its progress, and run the W&B mirror in a second process."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ebbline.analysis.report.attempts import MOST, Attempts
from ebbline.analysis.report.report import rows_for_scripts
from ebbline.analysis.report.second_process import second_process
from ebbline.analysis.results.collect import StoredEvidence, baselines, collect
from ebbline.analysis.results.controls.means import collect_controls
from ebbline.analysis.results.costs import cost_label, prediction_label
from ebbline.analysis.results.frontier import frontier, frontier_hypervolume
from ebbline.analysis.results.no_refusals import no_refusals
from ebbline.analysis.results.retrying import retry_hint
from ebbline.analysis.results.tables import frontier_frame, frontier_text
from ebbline.analysis.results.wording import NO_RESULT, status_label
from ebbline.analysis.wandb import mirror
from ebbline.checks.study_checks import progress as checking
from ebbline.checks.study_checks import require_checked
from ebbline.cluster.executors.choice import ExecutorKind, ExecutorOptions, executor_kind
from ebbline.cluster.executors.executor import Executor
from ebbline.cluster.executors.on_demand import OnDemand
from ebbline.commands.plan import draw, wanted_by
from ebbline.commands.status import without_result
from ebbline.options import FAILED_POINTS, OUTPUT_MISSING, OVER_BUDGET, STOPPED
from ebbline.outputs import answer_text, attempts_of, print_outputs, write_outputs
from ebbline.show import Screen
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.drive.progress import Progress
from ebbline.sweeps.forecast.forecast import forecast
from ebbline.sweeps.forecast.prediction import Prediction, keep, keep_end, predict
from ebbline.sweeps.forecast.reused import reuse_of_changes
from ebbline.sweeps.state.spending import read_spent
from ebbline.sweeps.study.pins import require_pins
from ebbline.sweeps.study.points import STATUSES, Result
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.study_file import source_of
from ebbline.sweeps.study.view import StudyView
from ebbline.tables import table_width

SCREEN, MIRROR_LOG = "the progress display", "log/mirror.log"
OUTCOMES = {
    0: "done",
    FAILED_POINTS: "done, with points that have no result",
    OVER_BUDGET: "out of budget",
    OUTPUT_MISSING: "done, but an output could not be made",
    STOPPED: "stopped",
}


class Interrupts:
    """Counts Ctrl-C: the first drains (running stages finish, nothing new starts), the second stops
    now. The same command continues after both.

    A signal handler calls `notify`, so it must not `print`: it could interrupt another `print`.
    """

    def __init__(self, notify: Callable[[str], None], resume: str) -> None:
        self.count = 0
        self._notify, self._resume = notify, resume

    def __enter__(self) -> "Interrupts":
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, number: int, frame: object) -> None:
        self.count += 1
        if self.count > 1:
            raise KeyboardInterrupt
        self._notify(
            "finishing the running stages; nothing new starts. Press Ctrl-C again to stop now. "
            f"To continue later:\n  {self._resume}"
        )

    def stopping(self) -> bool:
        return self.count > 0


@dataclass(frozen=True)
class Place:
    """Where a study runs: the executor's name, the cluster's address, a local cluster's logical
    GPUs.
    """

    executor: str
    address: str
    gpus: int | None = None


def run_study(
    view: StudyView,
    place: Place,
    wandb: bool,
    resume: str = "",
    as_json: bool = False,
    wide: bool = False,
    retry: Sequence[int] | None = (),
) -> int:
    """Drive a study to its end and print the paths of its outputs. Returns an exit code of
    ebbline.options.EXIT_CODES.

    `resume` is the command as the user typed it. `retry` has the numbers of failed points to try
    again; None means all of them. With `as_json`, standard output gets one object at
    the end; all else goes to standard error.
    """
    require_pins(view.study, view.source)  # at once: the checks read whole files
    with checking(quiet=as_json) as now:
        notes = require_checked(view.study, view.home, now)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    stream, resume = sys.stderr if as_json else sys.stdout, resume or f"ebbline run {view.name}"
    mirrored: list[subprocess.Popen[bytes]] = []
    try:
        with redirect_stdout(stream):
            code, outcome = _run(view, place, wandb, resume, mirrored, wide, retry)
    except KeyboardInterrupt:
        code, outcome = STOPPED, {"stopped": "stopped on request, at once"}
        print(
            "stopped now: interrupted stages restart from their last checkpoints. To "
            f"continue:\n  {resume}",
            file=stream,
        )
        _end(mirrored)
    except BaseException:
        _end(mirrored)
        raise
    if as_json:
        later = resume if code in (STOPPED, OVER_BUDGET) else None
        print(
            json.dumps(
                {
                    "study": view.study.study,
                    "outcome": OUTCOMES[code],
                    "exit_code": code,
                    "resume": later,
                    **outcome,
                },
                indent=1,
            )
        )
    return code


def _run(
    view: StudyView,
    place: Place,
    wandb: bool,
    resume: str,
    mirrored: "list[subprocess.Popen[bytes]]",
    wide: bool,
    retry: Sequence[int] | None,
) -> tuple[int, dict[str, object]]:
    """The exit code, and the results for --json."""
    study, home, folder = view.study, view.home, view.folder
    attempts = attempts_of(view)
    kind, wanted = executor_kind(place.executor), wanted_by(study, place.address, place.gpus)

    def make_executor() -> Executor:
        # drive() calls this once the driver holds the study. A driver that does not get the study
        # starts no second mirror and makes no prediction.
        home.keep_file(study.study, source_of(view.source))
        if wandb:
            log = folder / MIRROR_LOG
            process = attempts.make(
                "the W&B mirror", lambda: mirror.start(view.argument, home.root, log)
            )
            mirrored.extend([] if process is None else [process])
        return OnDemand(kind, wanted)

    started, screen = time.monotonic(), Screen(study)
    print(f"{study.study}: {study.question}\n")
    for line in reuse_of_changes(view):
        print(line)
    with ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts(screen.notice, resume))
        with screen:
            progress = drive(
                view,
                make_executor,
                lambda progress: _show(screen, progress, attempts),
                interrupts.stopping,
                lambda executor: _predicted(view, executor, kind, wanted, attempts),
                kind,
                retry,
            )
        second = stack.enter_context(second_process())
        print(_summary(progress, time.monotonic() - started))
        if (
            progress.prediction is not None
            and not progress.stopped
            and any(counts["done"] for counts in progress.runner.counts.values())
        ):
            print(
                attempts.make("the comparison with the prediction", partial(_took, view, progress))
                or ""
            )
        results = collect(view)
        outputs = write_outputs(view, results, attempts, second)
        table = (
            attempts.make(
                "the table of the frontier",
                lambda: frontier_text(
                    frontier_frame(results, study.objectives), study.objectives, table_width(wide)
                ),
            )
            or "The table of the frontier could not be made."
        )
        print(f"\n{table}\n")
        answer = attempts.make(
            "the answer",
            lambda: answer_text(
                study,
                results,
                baselines(view),
                StoredEvidence(view),
                table_width(wide),
                collect_controls(view, results),
            ),
        )
        if answer:
            print(f"{answer}\n")
        notes = attempts.make("the notes on refusals", lambda: no_refusals(study, baselines(view)))
        for note in notes or ():
            print(f"note: {note}\n")
        for line in [*without_result(results), retry_hint(results, view.name)]:
            if line:
                print(line)
        ends = [_let_go(process, folder / MIRROR_LOG, attempts) for process in mirrored]
        shown = all(ends)
    if not shown:
        print(
            "W&B does not have everything yet. Its mirror goes on by itself: `ebbline sync "
            f"{view.name}` waits for it and says what is left (see {folder / MIRROR_LOG})"
        )
    print_outputs(outputs, attempts=attempts)
    ended = FAILED_POINTS if any(r.status in NO_RESULT for r in results) else 0
    code = {"request": STOPPED, "budget": OVER_BUDGET}.get(
        progress.by, OUTPUT_MISSING if attempts.failed else ended
    )
    if progress.by in ("request", "budget"):
        print(
            f"\n{'to continue' if progress.by == 'request' else 'raise the budget, then'}:\n "
            f" {resume}"
        )
    found = _for_scripts(study, progress, results, outputs, shown, attempts)
    return code, found | {"not_made": attempts.failed}


def _for_scripts(
    study: Study,
    progress: Progress,
    results: Sequence[Result],
    outputs: Mapping[str, Path],
    shown: bool,
    attempts: Attempts,
) -> dict[str, object]:
    """The run's end for --json: its last snapshot, the frontier, and the paths of the outputs."""
    rows = (
        attempts.make("the frontier", lambda: rows_for_scripts(frontier(results, study.objectives)))
        or []
    )
    live = None if progress.live is None else progress.live.model_dump(mode="json")
    counts = Counter(result.status for result in results)
    return {
        "stopped": progress.stopped or None,
        "points": {status: counts[status] for status in STATUSES},
        "live": live,
        "hypervolume": attempts.make(
            "the hypervolume", lambda: frontier_hypervolume(results, study.objectives)
        ),
        "frontier": rows,
        "without_result": without_result(results),
        "wandb_up_to_date": shown,
        "outputs": {what: str(path) for what, path in outputs.items()},
    }


def _show(screen: Screen, progress: Progress, attempts: Attempts) -> None:
    """Show the progress. A display that fails once is not drawn again, and the run goes on."""
    if SCREEN not in attempts.failed:
        attempts.make(SCREEN, lambda: screen(progress))


def _took(view: StudyView, progress: Progress) -> str:
    """Keep what the run took, and compare it with its prediction."""
    spent = progress.spending.spent()
    if progress.prediction is None:
        return ""
    keep_end(progress.prediction, spent, view.folder)
    return prediction_label(progress.prediction, spent, view.home.profile)


def _let_go(process: "subprocess.Popen[bytes]", log: Path, attempts: Attempts) -> bool:
    """Let the mirror show the rest without this process; whether it has shown everything. One that
    has ended with an error is an output that could not be made.
    """
    ended = mirror.let_go(process)
    if ended:
        lines = log.read_text("utf-8", "replace").split("\n") if log.is_file() else []
        last = next(
            (line.strip() for line in reversed(lines) if line.strip()), "no reason in its log"
        )
        attempts.failed["the W&B mirror"] = last[:MOST]
    return ended == 0


def _end(mirrored: "list[subprocess.Popen[bytes]]") -> None:
    for process in mirrored:
        mirror.stop(process, wait_s=0)


def _predicted(
    view: StudyView,
    executor: Executor,
    kind: ExecutorKind,
    wanted: ExecutorOptions,
    attempts: Attempts,
) -> Prediction | None:
    """Predict this run's cost; keep and draw it in the study's folder. None when no stage must
    run.
    """
    folder = view.folder
    capacity = kind.capacity(wanted)
    found = forecast(view, executor.capacity() if capacity is None else capacity, kind=kind)
    prediction = predict(found, read_spent(folder))
    if prediction is not None:
        keep(prediction, folder)
        attempts.make("the picture of the plan", lambda: draw(view, found))
    return prediction


def _summary(progress: Progress, seconds: float) -> str:
    done = progress.runner.done()
    ran = sum(not reused for reused in done.values())
    counts = Counter(result.status for result in progress.results)
    points = len(progress.results)
    line = (
        f"{points} point{'s' * (points != 1)} in this run, {ran} stage{'s' * (ran != 1)} run and "
        f"{len(done) - ran} found in the store, {seconds:.0f} s"
    )
    spent = cost_label(progress.spending.spent().cost, progress.spending.profile)
    line += f", {spent} spent by all runs"
    without = "".join(
        f", {counts[status]} points {status_label(status)}"
        for status in NO_RESULT
        if counts[status]
    )
    return line + without + (f"; {progress.stopped}" if progress.stopped else "")
