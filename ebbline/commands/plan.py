"""`ebbline plan`: what a run would take on a cluster, simulated and drawn, without running
anything.
"""

import json
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from ebbline.analysis.figures.drawing import save, save_svg
from ebbline.analysis.figures.gantt import gantt_figure
from ebbline.analysis.results.costs import as_json as cost_json
from ebbline.analysis.results.costs import cost_label
from ebbline.analysis.results.wording import clock, size_label
from ebbline.cluster.executors.choice import DEFAULT_EXECUTOR, ExecutorOptions
from ebbline.cluster.executors.executor import ACCELERATOR_TYPE, SLOTS, Capacity, Host
from ebbline.cluster.profile import Profile
from ebbline.sweeps.forecast.forecast import Forecast, forecast
from ebbline.sweeps.state.todo import TodoProgress, explained
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError
from ebbline.tasks.kinds import STAGE_KINDS

GANTT = "plan"  # the picture's name in the study's folder
SLOW_S = 1.0  # a progress bar is shown from then on
_HOSTS = re.compile(r"(?P<hosts>\d+)x(?P<gpus>\d+)(?:x(?P<type>[A-Za-z0-9-]+))?")


def plan_study(view: StudyView, capacity: Capacity, why: int, as_json: bool) -> None:
    """Print the plan of a study, and draw it into the study's folder."""
    with progress_bar(quiet=as_json) as progress:
        found = forecast(view, capacity, progress)
    home, pictures = view.home, draw(view, found)
    reasons = explained(found.todo, home.store, why)
    if as_json:
        print(json.dumps(plan_summary(found, home.profile, reasons), indent=1))
        return
    console = Console()
    console.print(_table(found, home.profile))
    for line in _sentences(found, home.profile):
        console.print(line, highlight=False, soft_wrap=True)
    missing = len(found.todo.missing)
    console.print(f"{missing} misses" + (":" if missing else _nothing_missing(found)))
    for name, reason in reasons:
        console.print(f"  {name}: {reason}", highlight=False, soft_wrap=True)
    if missing > len(reasons):
        console.print(f"  and {missing - len(reasons)} more (--why {missing} shows all)")
    if pictures:
        console.print(f"picture    {pictures[0]}", highlight=False, soft_wrap=True)


def _nothing_missing(found: Forecast) -> str:
    told = len(found.points.completed)
    if found.looked_up < told:
        return (
            f" among the {found.looked_up} of {told} points that were looked up; a run looks "
            "at all of them."
        )
    return "; a run would find all of them in the store."


def capacity_of(study: Study, cluster: str | None, address: str, gpus: int | None) -> Capacity:
    """The hosts to plan for: those that `cluster` describes (`2x8xA100,1x4`: hosts x GPUs x type),
    else what `run` would have.

    Raises StudyError for a description that is none.
    """
    if cluster is not None:
        return described_cluster(cluster)
    wanted = wanted_by(study, address, gpus)
    known = DEFAULT_EXECUTOR.capacity(wanted)
    if known is not None:
        return known
    with closing(DEFAULT_EXECUTOR.open(wanted)) as executor:
        return executor.capacity()


def described_cluster(text: str) -> Capacity:
    """`2x8xA100,1x4`: two hosts of eight A100, one of four GPUs of no known type."""
    hosts: list[Host] = []
    for part in text.split(","):
        found = _HOSTS.fullmatch(part.strip())
        if found is None or int(found["hosts"]) * int(found["gpus"]) == 0:
            raise StudyError(
                f"--cluster: {part.strip()!r} is no group of hosts; write HOSTSxGPUS or "
                "HOSTSxGPUSxTYPE, such as 2x8xA100,1x4"
            )
        labels = {ACCELERATOR_TYPE: found["type"]} if found["type"] else {}
        hosts += [
            Host(f"host{len(hosts) + number}", int(found["gpus"]), SLOTS, labels)
            for number in range(int(found["hosts"]))
        ]
    return Capacity(tuple(hosts))


def wanted_by(study: Study, address: str, gpus: int | None) -> ExecutorOptions:
    """What a run of this study asks of its executor."""
    return ExecutorOptions(address, max(model.gpus for model in study.models.values()), gpus)


def draw(view: StudyView, found: Forecast) -> list[Path]:
    """The Gantt chart as PNG, PDF and SVG in the study's folder; nothing when nothing is to run."""
    kinds = {own: missing.stage.kind for own, missing in found.todo.missing.items()}
    part = (
        f", {found.simulated} of {len(found.points.to_come)} points"
        if found.simulated < len(found.points.to_come)
        else ""
    )
    figure = gantt_figure(found.trace, kinds, f"{view.study.study}{part}")
    folder = view.folder
    return [] if figure is None else [*save(figure, folder, GANTT), save_svg(figure, folder, GANTT)]


def plan_summary(
    found: Forecast, profile: Profile, reasons: list[tuple[str, str]]
) -> dict[str, Any]:
    """A plan as JSON values. `new` counts what the looked-up part lacks, `stages` what all points
    are expected to run.
    """
    points = found.points
    return {
        "points": len(points.completed) + len(points.open) + len(points.chosen) + points.failed,
        "unchosen": len(points.drawn),
        "simulated_points": found.simulated,
        "looked_up_points": found.looked_up,
        "ended": found.points.ended,
        "complete": found.complete,
        "new": dict(found.todo.new),
        "there": dict(found.todo.there),
        "remade": sum(missing.remade for missing in found.todo.missing.values()),
        "stages": {kind: round(share.stages) for kind, share in found.kinds.items()},
        "seconds": {kind: round(share.seconds, 3) for kind, share in found.kinds.items()},
        "expected": cost_json(found.cost, profile),
        "starting_processes": cost_json(found.starts, profile),
        "wall_s": found.wall_s,
        "disk_bytes": round(found.written),
        "free_bytes": found.free_bytes,
        "hosts": {
            host.name: {"gpus": host.gpus, "type": host.gpu_type} for host in found.capacity.hosts
        },
        "never": list(found.never),
        "assumed": list(found.assumed),
        "missing": len(found.todo.missing),
        "misses": [list(reason) for reason in reasons],
    }


def _table(found: Forecast, profile: Profile) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "to run", "there", "each", "GPU-hours", "dollars", "disk"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for kind in sorted({*found.kinds, *found.todo.there}, key=list(STAGE_KINDS).index):
        there = str(found.todo.there[kind])
        share = found.kinds.get(kind)
        if share is None:
            table.add_row(kind, "0", there, "", "", "", "")
            continue
        usd = share.cost.usd(profile)
        each = f"{'' if share.measured else '~'}{share.seconds / share.stages:.3g} s"
        hours = f"{share.cost.gpu_hours:.3g}" if share.cost.gpu_hours else ""
        dollars = "" if usd is None or not hours else f"{usd:.2f}"
        table.add_row(
            kind, f"{share.stages:.0f}", there, each, hours, dollars, size_label(share.written)
        )
    return table


def _sentences(found: Forecast, profile: Profile) -> Iterator[str]:
    points = found.points
    known = len(points.completed) + len(points.open) + len(points.chosen)
    failed = f" ({points.failed} more failed)" if points.failed else ""
    yield f"{known} points are known{failed}, {len(points.drawn)} are for the search to choose."
    if points.ended:
        yield f"No further point is asked for: {points.ended}."
    for reason in found.never:
        yield f"This cannot run: {reason}."
    if found.kinds:
        gpus = found.capacity.gpus
        types = sorted(
            {host.gpu_type or "of no known type" for host in found.capacity.hosts if host.gpus}
        )
        wall = (
            ""
            if found.wall_s is None
            else f", {clock(found.wall_s)} on {gpus} GPU{'s' * (gpus != 1)} ({', '.join(types)})"
        )
        starting = (
            f", of it {cost_label(found.starts, profile)} to start processes"
            if found.starts.gpu_hours
            else ""
        )
        yield (
            f"What is to run is expected to take {cost_label(found.cost, profile)}{wall}{starting}."
        )
        room = (
            "" if found.free_bytes is None else f" of {size_label(found.free_bytes)} that are free"
        )
        yield f"The store will grow by about {size_label(found.written)}{room}."
        if found.free_bytes is not None and found.written > found.free_bytes:
            yield (
                "That is more than the disk has: see `ebbline store gc`, or put the store "
                "elsewhere (docs/store.md)."
            )
    remade = sum(missing.remade for missing in found.todo.missing.values())
    if remade:
        yield (
            f"{remade} of these stages were there; files that were dropped to save space have "
            "to be made again."
        )
    for line in found.assumed:
        yield f"Assumed: {line}."


@contextmanager
def progress_bar(quiet: bool = False) -> Iterator[TodoProgress]:
    """What a forecast tells of its points; shown once it has taken a second, and gone at the
    end.
    """
    bar = Progress(
        TextColumn("looking up points"),
        BarColumn(),
        MofNCompleteColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task("points", total=None)
    began = monotonic()

    def tell(done: int, of: int) -> None:
        if not quiet and monotonic() - began > SLOW_S:
            bar.start()
        bar.update(task, completed=done, total=of)

    try:
        yield tell
    finally:
        bar.stop()
