"""`ebbline plan`: simulate and draw a run on a cluster, and predict its cost. It runs no stage."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ebbline.analysis.figures.drawing import save, save_svg
from ebbline.analysis.figures.gantt import gantt_figure
from ebbline.analysis.results.costs import as_json as cost_json
from ebbline.analysis.results.costs import cost_label
from ebbline.analysis.results.wording import clock, size_label
from ebbline.bars import progress_bar
from ebbline.cluster.executors.choice import DEFAULT_EXECUTOR, ExecutorOptions
from ebbline.cluster.executors.executor import ACCELERATOR_TYPE, SLOTS, Capacity, Host
from ebbline.cluster.profile import Profile
from ebbline.sweeps.forecast.forecast import Forecast, forecast
from ebbline.sweeps.state.todo import explained
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError
from ebbline.tasks.kinds import STAGE_KINDS

GANTT = "plan"  # the picture's name in the study's folder
SLOW_S = 1.0  # the progress bar appears after this time
_HOSTS = re.compile(
    r"(?P<hosts>[0-9]{1,18})x(?P<gpus>[0-9]{1,18})(?:x(?P<type>[A-Za-z0-9-]{1,64}))?"
)
MOST_HOSTS, MOST_GPUS = 10_000, 1_000  # of a described cluster


def plan_study(
    view: StudyView, capacity: Capacity, why: int, as_json: bool, assumed: Sequence[str] = ()
) -> None:
    """Print a study's plan, and draw it into the study's folder. `why` limits the explained
    misses; `assumed` are assumptions to print before the forecast's own.
    """
    with progress_bar("looking up points", SLOW_S, quiet=as_json) as progress:
        found = forecast(view, capacity, progress)
    found = replace(found, assumed=(*assumed, *found.assumed))
    home, pictures = view.home, draw(view, found)
    reasons = explained(found.todo, home.store, why)
    if as_json:
        print(json.dumps(plan_summary(found, home.profile, reasons), indent=1))
        return
    console = Console(markup=False)
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
    finished = len(found.points.completed)
    if found.looked_up < finished:
        return (
            f" among the {found.looked_up} of {finished} points that were looked up; a run looks "
            "up all of them."
        )
    return "; a run finds every stage in the store."


def capacity_of(study: Study, cluster: str | None, address: str, gpus: int | None) -> Capacity:
    """The hosts to plan for: `cluster`'s (`2x8xA100,1x4`: hosts x GPUs x type), or else those of
    `run`.

    Raises StudyError for an invalid description.
    """
    if cluster is not None:
        return described_cluster(cluster)
    wanted = wanted_by(study, address, gpus)
    capacity = DEFAULT_EXECUTOR.capacity(wanted)
    if capacity is not None:
        return capacity
    with closing(DEFAULT_EXECUTOR.open(wanted)) as executor:
        return executor.capacity()


def described_cluster(text: str) -> Capacity:
    """Parse a cluster: `2x8xA100,1x4` is two hosts of eight A100 and one of four GPUs of unknown
    type. Raises StudyError for an invalid text.
    """
    hosts: list[Host] = []
    for part in text.split(","):
        found = _HOSTS.fullmatch(part.strip())
        if found is None or int(found["hosts"]) * int(found["gpus"]) == 0:
            raise StudyError(
                f"--cluster: {part.strip()!r} is not a group of hosts; write HOSTSxGPUS or "
                "HOSTSxGPUSxTYPE, such as 2x8xA100,1x4"
            )
        if len(hosts) + int(found["hosts"]) > MOST_HOSTS or int(found["gpus"]) > MOST_GPUS:
            raise StudyError(
                f"--cluster: {part.strip()!r} is too large to simulate; give at most {MOST_HOSTS} "
                f"hosts with {MOST_GPUS} GPUs each"
            )
        labels = {ACCELERATOR_TYPE: found["type"]} if found["type"] else {}
        hosts += [
            Host(f"host{len(hosts) + number}", int(found["gpus"]), SLOTS, labels)
            for number in range(int(found["hosts"]))
        ]
    return Capacity(tuple(hosts))


def wanted_by(study: Study, address: str, gpus: int | None) -> ExecutorOptions:
    """The resources that a run of this study requests from its executor."""
    return ExecutorOptions(address, max(model.gpus for model in study.models.values()), gpus)


def draw(view: StudyView, found: Forecast) -> list[Path]:
    """Draw the Gantt chart as PNG, PDF and SVG in the study's folder. Draws nothing when no stage
    must run, and makes no home for it.
    """
    if not view.home.exists:
        return []
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
    """A plan as JSON values. `new` counts the missing stages of the looked-up points; `stages`
    estimates those of all points.
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
    given = len(points.completed) + len(points.open) + len(points.chosen)
    failed = f" ({points.failed} more failed)" if points.failed else ""
    yield f"{given} points are known{failed}; the search will choose {len(points.drawn)} more."
    if points.ended:
        yield f"The search asks for no further point: {points.ended}."
    for reason in found.never:
        yield f"This cannot run: {reason}."
    if found.kinds:
        gpus = found.capacity.gpus
        types = sorted(
            {host.gpu_type or "of unknown type" for host in found.capacity.hosts if host.gpus}
        )
        wall = (
            ""
            if found.wall_s is None
            else f", {clock(found.wall_s)} on {gpus} GPU{'s' * (gpus != 1)} ({', '.join(types)})"
        )
        starting = (
            f", including {cost_label(found.starts, profile)} to start processes"
            if found.starts.gpu_hours
            else ""
        )
        yield f"The missing stages take about {cost_label(found.cost, profile)}{wall}{starting}."
        free = "" if found.free_bytes is None else f" of {size_label(found.free_bytes)} free space"
        yield f"The store will grow by about {size_label(found.written)}{free}."
        if found.free_bytes is not None and found.written > found.free_bytes:
            yield (
                "The disk has too little space: run `ebbline store gc`, or move the store to "
                "another disk (docs/store.md)."
            )
    remade = sum(missing.remade for missing in found.todo.missing.values())
    if remade:
        yield (
            f"{remade} of these stages are in the store without files that were dropped to save "
            "space; they run again."
        )
    for line in found.assumed:
        yield f"Assumed: {line}."
