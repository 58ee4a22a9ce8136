"""The progress display of a run, drawn from its live snapshot: in the driver (`run`) or in another
process (`status --watch`).

When the output is not a terminal, the display is plain lines.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live as Redrawn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ebbline.analysis.results.costs import gpu_hours_label
from ebbline.analysis.results.wording import clock, progress_label
from ebbline.cluster.schedule.pace import pace_sentence
from ebbline.plot import FrontierSoFar
from ebbline.sweeps.drive.live import Failed, Live
from ebbline.sweeps.drive.progress import Progress
from ebbline.sweeps.state.outcome import metrics_of
from ebbline.sweeps.study.study import Study
from ebbline.tasks.kinds import STAGE_KINDS
from ebbline.tasks.stage import Stage

PLAIN_EVERY_S, PLAIN_AT_LEAST_S = (
    5.0,
    60.0,
)  # the time between lines after a change, and without one
LINES = 8  # running stages that are listed
REASONS = 3  # latest failures that are listed
WIDE = 120  # columns from which the frontier is drawn beside the stages


class Picture:
    """A run in a terminal. The owner replaces `live` and `frontier`; rich redraws the clock."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.live: Live | None = None
        self.frontier = FrontierSoFar(study.objectives)
        self.drawn: Text | None = None
        self.notice = ""

    def draw(self, console: Console) -> None:
        """Redraw the frontier. Called only for new results: rich redraws the rest several times a
        second.
        """
        text = self.frontier.text(unicode=console.encoding.startswith("utf"))
        if self.frontier.fronts:
            text.append(f"\nhypervolume so far {self.frontier.hypervolume:.3f}")
        self.drawn = text

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        live, notice = self.live, [Text(self.notice, style="bold yellow")] if self.notice else []
        if live is None:
            yield Group(Text(f"{self.study.study}: starting"), *notice)
            return
        head = f"{self.study.study}: {progress_line(live)}; {clock(elapsed_s(live))} so far"
        stages: RenderableType = bars(live)
        if self.drawn is not None and options.max_width >= WIDE:
            beside = Table.grid(padding=(0, 4))
            beside.add_row(stages, self.drawn)
            stages = beside
        elif self.drawn is not None:
            stages = Group(stages, self.drawn)
        yield Group(
            Text(head),
            Text(budgeted(live)),
            *notice,
            stages,
            *at_work(live),
            *failed(live.failures[-REASONS:]),
        )


class Screen:
    """Shows a drive: `with Screen(study) as screen: drive(..., watch=screen)`.

    It reads the snapshot and the results since the last call, never all results: a study may have
    very many points.
    """

    def __init__(self, study: Study, console: Console | None = None) -> None:
        self.console = console or Console(markup=False)
        self.picture = Picture(study)
        self.lines = Lines(self.console)
        self._redrawn = (
            Redrawn(self.picture, console=self.console, refresh_per_second=2, transient=True)
            if self.console.is_terminal
            else None
        )
        self._read_count = 0
        self._baselines: Mapping[str, Mapping[str, Stage]] | None = None

    def __enter__(self) -> "Screen":
        if self._redrawn:
            self._redrawn.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._redrawn:
            self._redrawn.stop()

    def __call__(self, progress: Progress) -> None:
        if progress.live is None or progress.live is self.picture.live:
            return
        self.picture.live = progress.live
        self.look(progress)
        if not self._redrawn:
            self.lines.write(progress.live)

    def look(self, progress: Progress) -> None:
        """Read the results since the last call, and the models before fine-tuning."""
        new = progress.history[self._read_count :]
        self._read_count += len(new)
        if not new:
            return
        frontier = self.picture.frontier
        if self._baselines is None:
            self._baselines = progress.graph.baselines()
        for model in self._baselines.keys() - frontier.aligned.keys():
            metrics = metrics_of(progress.study, self._baselines[model], progress.runner)
            if metrics is not None:
                frontier.aligned = {**frontier.aligned, model: metrics}
        frontier.take(new)
        if self._redrawn:
            self.picture.draw(self.console)

    def notice(self, text: str) -> None:
        """Show a message from a signal handler: in the picture, or by a direct write to standard
        error. A `print` could interrupt another `print`.
        """
        self.picture.notice = text
        if self._redrawn is None or not self._redrawn.is_started:
            os.write(sys.stderr.fileno(), f"{text}\n".encode())


class Lines:
    """Plain lines of a run, for a log: one after a change or after a minute, and one for each new
    failure.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._written_at, self._last = float("-inf"), ""
        self._failures = set[tuple[str, str]]()

    def write(self, live: Live) -> None:
        for failure in live.failures:
            if (failure.key, failure.label) not in self._failures:
                self._failures.add((failure.key, failure.label))
                self._print("\n".join(text.plain for text in failed([failure])))
        now, news = time.monotonic(), f"{done(live)}; {at_work_now(live)}"
        if now - self._written_at >= (PLAIN_EVERY_S if news != self._last else PLAIN_AT_LEAST_S):
            self._written_at, self._last = now, news
            self._print(f"[{clock(elapsed_s(live))}] {progress_line(live)}")

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def elapsed_s(live: Live) -> float:
    """The seconds since a drive's start, until its end."""
    return max(0.0, (time.time() if live.ended is None else live.at) - live.started)


def progress_line(live: Live) -> str:
    """A run in one line: what is done, what runs now, the time left, what is spent."""
    cost = gpu_hours_label(live.spent.gpu_hours, live.spent.usd, _hours(live))
    parts = [done(live), at_work_now(live), left(live), f"{cost} spent"]
    return "; ".join(part for part in parts if part)


def done(live: Live) -> str:
    """`12/40 points, 31/98 stages, 2 failed`; stages found in the store count as done."""
    counts = sum((Counter(each) for each in live.stages.values()), Counter[str]())
    finished, limit = counts["done"] + counts["reused"], live.points.limit
    text = f"{live.points.completed}{'' if limit is None else f'/{limit}'} points, "
    text += f"{finished}/{counts.total()} stages"
    return text + (f", {counts['failed']} failed" if counts["failed"] else "")


def at_work_now(live: Live) -> str:
    """The first running stage, and how many run beside it; empty when nothing runs."""
    if not live.running:
        return ""
    more = len(live.running) - 1
    return f"now {live.running[0].label}{f' and {more} more' if more else ''}"


def left(live: Live) -> str:
    """The time left: of the prediction, or of what has started where that takes longer. Both follow
    the pace of this run's stages, which is named where it is another than predicted.
    """
    rest_s = 0.0 if live.predicted is None else live.pace * live.predicted.wall_s - elapsed_s(live)
    if live.ended is not None or max(rest_s, live.left_s) <= 0:
        return ""
    whole = "" if rest_s >= live.left_s else " for what has started"
    pace = pace_sentence(live.pace)
    return f"about {clock(max(rest_s, live.left_s))} left{whole}{f' ({pace})' if pace else ''}"


def _hours(live: Live) -> str:
    return "logical GPU-hours" if live.gpus.logical else "GPU-hours"


def budgeted(live: Live) -> str:
    """Busy GPUs, and what is left of this run's prediction and of the budget."""
    hours = _hours(live)
    busy = (
        f"{live.gpus.busy} of {live.gpus.total} GPUs busy" if live.hosts else "no GPU requested yet"
    )
    parts = [busy]
    predicted, used_now = live.predicted, live.spent_by_drive
    if predicted is not None:
        whole = (
            f"{gpu_hours_label(predicted.gpu_hours, predicted.usd, hours)} in "
            f"{clock(predicted.wall_s)}"
        )
        rest_s, rest = (
            live.pace * predicted.wall_s - elapsed_s(live),
            max(0.0, live.pace * predicted.gpu_hours - used_now.gpu_hours),
        )
        usd = (
            None
            if predicted.usd is None or used_now.usd is None
            else max(0.0, live.pace * predicted.usd - used_now.usd)
        )
        left_of_it = (
            f", of which {gpu_hours_label(rest, usd, hours)} and {clock(rest_s)} are left"
            if rest_s > 0
            else ", now exceeded"
        )
        pace = pace_sentence(live.pace)
        parts.append(f"predicted for this run {whole}{f', but {pace}' if pace else ''}{left_of_it}")
    limits = {
        "usd": (live.spent.usd, "${:.2f} of ${:.2f}"),
        "gpu_hours": (live.spent.gpu_hours, "{:.3g} of {:g} GPU-hours"),
    }
    limits |= {
        "hours": (live.spent.driving_s / 3600, "{:.3g} of {:g} hours"),
        "points": (live.points.completed, "{:g} of {:g} points"),
    }
    rests = [
        phrase.format(max(0.0, live.budget[name] - used), live.budget[name])
        for name, (used, phrase) in limits.items()
        if name in live.budget and used is not None
    ]
    return "; ".join([*parts, *([f"budget left: {', '.join(rests)}"] if rests else [])])


def bars(live: Live) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "", "done", "reused", "running", "waiting", "failed"):
        table.add_column(column, justify="left" if column in ("stage", "") else "right")
    for kind in sorted(live.stages, key=list(STAGE_KINDS).index):
        count = Counter(live.stages[kind])
        finished, total = count["done"] + count["reused"], sum(count.values())
        waiting = count["waiting"] + count["ready"]
        numbers = [
            str(number or "")
            for number in (
                count["done"],
                count["reused"],
                count["running"],
                waiting,
                count["failed"],
            )
        ]
        table.add_row(kind, ProgressBar(total=total, completed=finished, width=24), *numbers)
    return table


def at_work(live: Live) -> list[Text]:
    """A line for each running stage: where it runs, for how long, and its progress."""
    now, lines = time.time(), list[Text]()
    for each in live.running[:LINES]:
        on = (
            f"{each.gpus} GPU{'s' if each.gpus > 1 else ''} of {each.host}"
            if each.gpus
            else each.host
        )
        elapsed = f"{clock(max(0.0, now - each.started))} of about {clock(each.expected_s)}"
        lines.append(
            Text(
                f"  {each.label}, {on}, {elapsed}  {progress_label(each)}",
                style="dim",
                no_wrap=True,
                overflow="ellipsis",
            )
        )
    more = len(live.running) - LINES
    return lines + ([Text(f"  and {more} more", style="dim")] if more > 0 else [])


def failed(failures: Sequence[Failed]) -> list[Text]:
    """A line for each reason, and the command that reruns the stage."""
    lines = list[Text]()
    for each in failures:
        lines.append(Text(f"failed: {each.label}: {each.reason}", style="red"))
        lines += (
            [Text(f"  to see it again: {each.command}", style="dim", overflow="fold")]
            if each.command
            else []
        )
    return lines
