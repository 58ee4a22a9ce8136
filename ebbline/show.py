"""What people see of a run while it goes on, drawn from its live snapshot: here (`run`) or in
another process (`status --watch`).

Plain lines when the output is not a terminal.
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
)  # lines when something has changed, and when only the clock has
LINES = 8  # stages that say what they are at
REASONS = 3  # the latest failures that are named in a picture
WIDE = 120  # from so many columns on the frontier stands beside the stages


class Picture:
    """A run in a terminal: `live` and `frontier` are replaced as it goes on; the clock moves by
    itself.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.live: Live | None = None
        self.frontier = FrontierSoFar(study.objectives)
        self.drawn: Text | None = None
        self.notice = ""

    def draw(self, console: Console) -> None:
        """Draw the frontier anew: only when there is something new, as the rest is drawn several
        times a second.
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
            yield Group(Text(f"{self.study.study}: getting ready"), *notice)
            return
        head = f"{self.study.study}: {points(live)}; {clock(elapsed_s(live))} so far, {left(live)}"
        stages: RenderableType = bars(live)
        if self.drawn is not None and options.max_width >= WIDE:
            beside = Table.grid(padding=(0, 4))
            beside.add_row(stages, self.drawn)
            stages = beside
        elif self.drawn is not None:
            stages = Group(stages, self.drawn)
        yield Group(
            Text(head),
            Text(spent(live)),
            *notice,
            stages,
            *at_work(live),
            *failed(live.failures[-REASONS:]),
        )


class Screen:
    """Watches a drive. `with Screen(study) as screen: drive(..., watch=screen)`.

    It looks at the snapshot, and at what landed since the last time, never at all there is: a study
    may have very many points.
    """

    def __init__(self, study: Study, console: Console | None = None) -> None:
        self.console = console or Console()
        self.picture = Picture(study)
        self.lines = Lines(self.console)
        self._redrawn = (
            Redrawn(self.picture, console=self.console, refresh_per_second=2, transient=True)
            if self.console.is_terminal
            else None
        )
        self._landed = 0  # results that were looked at
        self._before: Mapping[str, Mapping[str, Stage]] | None = (
            None  # by size, what measures the models before fine-tuning
        )

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
            self.lines.say(progress.live)

    def look(self, progress: Progress) -> None:
        """Take in the results that landed since the last time, and the models before
        fine-tuning.
        """
        new = progress.history[self._landed :]
        self._landed += len(new)
        if not new:
            return
        frontier = self.picture.frontier
        if self._before is None:
            self._before = progress.graph.baselines()
        for model in self._before.keys() - frontier.aligned.keys():
            metrics = metrics_of(progress.study, self._before[model], progress.runner)
            if metrics is not None:
                frontier.aligned = {**frontier.aligned, model: metrics}
        frontier.take(new)
        if self._redrawn:
            self.picture.draw(self.console)

    def notice(self, text: str) -> None:
        """Say something from a signal's handler, where a print may meet another half way: in the
        picture, or past all that prints.
        """
        self.picture.notice = text
        if self._redrawn is None or not self._redrawn.is_started:
            os.write(sys.stderr.fileno(), f"{text}\n".encode())


class Lines:
    """Plain lines of a run, for a log: when something has changed, or a minute has passed; and each
    failure when it is known.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said_at, self._last = float("-inf"), ""
        self._failures = set[tuple[str, str]]()

    def say(self, live: Live) -> None:
        for failure in live.failures:
            if (failure.key, failure.label) not in self._failures:
                self._failures.add((failure.key, failure.label))
                self._print("\n".join(text.plain for text in failed([failure])))
        now, news = time.monotonic(), f"{stages(live)}; {points(live)}"
        if now - self._said_at >= (PLAIN_EVERY_S if news != self._last else PLAIN_AT_LEAST_S):
            self._said_at, self._last = now, news
            at = f"; now: {live.running[0].label}" if live.running else ""
            self._print(f"[{clock(elapsed_s(live))}] {news}; {left(live)}; {spent(live)}{at}")

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def elapsed_s(live: Live) -> float:
    """The seconds that a drive has gone on."""
    return max(0.0, (time.time() if live.ended is None else live.at) - live.started)


def points(live: Live) -> str:
    told, most = live.points.completed, live.points.limit
    return f"{told}{'' if most is None else f'/{most}'} points, {live.points.in_flight} in flight"


def left(live: Live) -> str:
    return f"about {clock(live.left_s)} left for what is under way"


def stages(live: Live) -> str:
    total = sum((Counter(counts) for counts in live.stages.values()), Counter[str]())
    said = {
        "done": total["done"],
        "reused": total["reused"],
        "running": total["running"],
        "waiting": total["waiting"] + total["ready"],
    }
    said |= {"failed": total["failed"]} if total["failed"] else {}
    return f"stages {', '.join(f'{count} {state}' for state, count in said.items())}"


def spent(live: Live) -> str:
    """GPUs at work, what was spent, and what is left of what was predicted for this run and of the
    budget.
    """
    hours = "logical GPU-hours" if live.gpus.logical else "GPU-hours"
    busy = (
        f"{live.gpus.busy} of {live.gpus.total} GPUs busy" if live.hosts else "no GPU asked for yet"
    )
    said = [busy, f"{gpu_hours_label(live.spent.gpu_hours, live.spent.usd, hours)} spent"]
    predicted, taken = live.predicted, live.spent_by_drive
    if predicted is not None:
        whole = (
            f"{gpu_hours_label(predicted.gpu_hours, predicted.usd, hours)} in "
            f"{clock(predicted.wall_s)}"
        )
        rest_s, rest = (
            predicted.wall_s - elapsed_s(live),
            max(0.0, predicted.gpu_hours - taken.gpu_hours),
        )
        usd = (
            None
            if predicted.usd is None or taken.usd is None
            else max(0.0, predicted.usd - taken.usd)
        )
        left_of_it = (
            f", of which {gpu_hours_label(rest, usd, hours)} and {clock(rest_s)} are left"
            if rest_s > 0
            else ", which it has outlasted"
        )
        said.append(f"predicted for this run {whole}{left_of_it}")
    limits = {
        "usd": (live.spent.usd, "${:.2f} of ${:.2f}"),
        "gpu_hours": (live.spent.gpu_hours, "{:.3g} of {:g} GPU-hours"),
    }
    limits |= {
        "hours": (live.spent.driving_s / 3600, "{:.3g} of {:g} hours"),
        "points": (live.points.completed, "{:g} of {:g} points"),
    }
    rests = [
        words.format(max(0.0, live.budget[name] - used), live.budget[name])
        for name, (used, words) in limits.items()
        if name in live.budget and used is not None
    ]
    return "; ".join([*said, *([f"the budget leaves {', '.join(rests)}"] if rests else [])])


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
    """What runs, since when, on what, and what it says of itself."""
    now, lines = time.time(), list[Text]()
    for each in live.running[:LINES]:
        on = (
            f"{each.gpus} GPU{'s' if each.gpus > 1 else ''} of {each.host}"
            if each.gpus
            else each.host
        )
        took = f"{clock(max(0.0, now - each.started))} of about {clock(each.expected_s)}"
        lines.append(
            Text(
                f"  {each.label}, {on}, {took}  {progress_label(each)}",
                style="dim",
                no_wrap=True,
                overflow="ellipsis",
            )
        )
    more = len(live.running) - LINES
    return lines + ([Text(f"  and {more} more", style="dim")] if more > 0 else [])


def failed(failures: Sequence[Failed]) -> list[Text]:
    """The reason of each in a line, and the command that shows it again."""
    lines = list[Text]()
    for each in failures:
        lines.append(Text(f"failed: {each.label}: {each.reason}", style="red"))
        lines += (
            [Text(f"  to see it again: {each.command}", style="dim", overflow="fold")]
            if each.command
            else []
        )
    return lines
