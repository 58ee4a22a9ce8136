"""What W&B shows of a study, as plain data: a page per training and point, and the study's tables.

Invariant: pages hold only rates, counts, settings, hashes and reasons, never a prompt, a completion
or a path of this machine.

W&B handles about 10,000 runs in a project. So only some points and trainings have their own run:

    the first `Profile.wandb_points` points    a run each
    trainings that one of these points uses    a run each
    later points                               a row in the table of their trainings' runs
    other trainings                            a row, with the last loss, in the study's run

The study's own table has a row for every finished point.
"""

import csv
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ebbline.analysis.results.frontier import finished, frontier, frontier_by_model
from ebbline.analysis.results.tables import axes_in, metrics_in
from ebbline.analysis.results.wording import NO_RESULT, axis_label, metric_label, without_paths
from ebbline.cluster.profile import Profile
from ebbline.cluster.schedule.costs import total
from ebbline.cluster.store.artifacts import Artifact
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study
from ebbline.tasks.defences.defence import SHARE_COLUMN
from ebbline.tasks.errors import Incomplete
from ebbline.tasks.identity import digest

CURVE = "curve.csv"  # as ebbline.tasks.training.train writes it; that module imports torch
TABLE_ROWS = 10_000  # the most rows that W&B draws of a table


@dataclass(frozen=True)
class Table:
    columns: list[str]
    rows: list[list[Any]]


@dataclass(frozen=True)
class RunPage:
    """One W&B run to show. `stamp` changes when the run has new content."""

    id: str
    stamp: str
    job_type: str
    name: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    history: Sequence[tuple[int, Mapping[str, float]]] = ()
    points: Sequence[Result] = ()  # the rows of its table
    failed: bool = False


def run_id(study: Study, home_id: str, part: str = "") -> str:
    """The id of the study's W&B run, or of its `part`. It depends on the home."""
    return "-".join(word for word in (study.study, home_id[:6], part) if word)


def pages(
    study: Study,
    results: Sequence[Result],
    trainings: Sequence[Artifact],
    profile: Profile,
    home_id: str,
    hosts: Collection[str] = (),
) -> Iterator[RunPage]:
    """The trainings, then the points that have ended. Names in `hosts` are removed from reasons."""
    later = _later_points(results, profile)
    rows = trainings_without_run(results, profile)
    for artifact in (artifact for artifact in trainings if artifact.key not in rows):
        yield _training_page(study, artifact, later.get(artifact.key, []), home_id)
    for result in results:
        if result.number < profile.wandb_points and result.status not in (
            "running",
            "skipped",
            "outdated",
        ):
            yield _point_page(study, result, profile, home_id, hosts)


def _training_page(
    study: Study, artifact: Artifact, points: Sequence[Result], home_id: str
) -> RunPage:
    history = list(_curve(artifact))
    shown = [[result.number, _counts(result)] for result in points]
    return RunPage(
        id=run_id(study, home_id, artifact.key[:12]),
        stamp=digest([artifact.content, shown]) if shown else artifact.content,
        job_type="training",
        name=f"train {artifact.key[:12]}",
        config={"key": artifact.key, "train": artifact.hashed.get("spec", {})},
        summary={"steps": len(history)},
        history=history,
        points=points,
    )


def _point_page(
    study: Study, result: Result, profile: Profile, home_id: str, hosts: Collection[str]
) -> RunPage:
    """A point's run. Its config holds only the settings, as W&B's parameter importance needs."""
    config: dict[str, Any] = {"model": result.point.model}
    for axis, value in result.point.values:
        part, _, name = axis.partition(".")
        if name:
            config.setdefault(part, {})[name] = value
        else:  # `defence`, and the adapter from outside
            config[part] = value
    cost = total(result.costs.values())
    summary: dict[str, Any] = {
        "point": result.number,
        "status": result.status,
        "reason": without_paths(result.reason, hosts)[:300],
        "seconds": result.seconds,
        "gpu_hours": cost.gpu_hours,
        SHARE_COLUMN: result.changed_share,
        "stages": dict(result.keys),
    }
    usd = cost.usd(profile)
    if usd is not None:
        summary["usd"] = usd
    for name, metric in result.metrics.items():
        shown = summary_key(name)
        summary |= {
            shown: metric.value,
            f"{shown}_n": metric.n,
            f"{shown}_undecided": metric.undecided,
        }
        summary[f"{shown}_low"], summary[f"{shown}_high"] = metric.interval
    return RunPage(
        id=run_id(study, home_id, result.point.id),
        stamp=digest([result.status, result.reason, _counts(result), dict(result.keys)]),
        job_type="point",
        name=f"{result.number} {result.point}",
        config=config,
        summary=summary,
        failed=result.status in NO_RESULT,
    )


def _counts(result: Result) -> dict[str, Any]:
    return {
        name: [m.successes, m.n, m.undecided, list(m.seeds)] for name, m in result.metrics.items()
    }


def summary_key(metric: str) -> str:
    """A metric's key in W&B, which reads a dot as nesting and a slash as a section."""
    return metric.replace(".", "/")


def _later_points(results: Sequence[Result], profile: Profile) -> dict[str, list[Result]]:
    """Training's key -> its finished points without a run.

    Trainings with a point that is still running, or measured again by the next run, are left out.
    """
    users: dict[str, list[Result]] = {}
    for result in results:
        for key in {key for stage, key in result.keys.items() if stage.startswith("train[")}:
            users.setdefault(key, []).append(result)
    later: dict[str, list[Result]] = {}
    for key, own in users.items():
        if all(result.status not in ("running", "outdated") for result in own):
            later[key] = [
                result
                for result in own
                if result.number >= profile.wandb_points and result.status == "done"
            ]
    return later


def trainings_without_run(results: Sequence[Result], profile: Profile) -> dict[str, int]:
    """Trainings that only points beyond the limit use: key -> the lowest number of these points.

    A training leaves this set when an earlier point uses it and never returns, so no run is
    deleted.
    """
    first: dict[str, int] = {}
    for result in results:
        for key in {key for stage, key in result.keys.items() if stage.startswith("train[")}:
            first[key] = min(first.get(key, result.number), result.number)
    return {key: number for key, number in first.items() if number >= profile.wandb_points}


def trainings_table(
    results: Sequence[Result], trainings: Sequence[Artifact], profile: Profile
) -> Table:
    """A row for each training without a run, sorted by its first point.

    The loss is None if the curve was dropped.
    """
    first = trainings_without_run(results, profile)
    own = sorted(
        (artifact for artifact in trainings if artifact.key in first),
        key=lambda artifact: (first[artifact.key], artifact.key),
    )
    rows: list[list[Any]] = []
    for artifact in own[:TABLE_ROWS]:
        curve = list(_curve(artifact))
        step, values = curve[-1] if curve else (None, {})
        rows.append([artifact.key[:12], first[artifact.key], step, values.get("loss")])
    return Table(["training", "first point", "steps", "last loss"], rows)


def points_table(
    results: Sequence[Result], profile: Profile, objectives: Sequence[str] = ()
) -> Table:
    """A row for each finished point.

    With `objectives` it has columns for the frontiers. Beyond TABLE_ROWS, points on a frontier
    are kept first.
    """
    rows = finished(results)
    axes, metrics = axes_in(rows), metrics_in(rows)
    columns = ["point", "model", *map(axis_label, axes)]
    columns += [
        f"{metric_label(name)}{part}"
        for name in metrics
        for part in ("", " low", " high", " n", " undecided")
    ]
    columns += ["projected share", "GPU-hours alone"]
    marked: list[set[int]] = []
    if objectives:
        columns += ["on frontier", "on its model's frontier"]
        own = frontier_by_model(rows, objectives).values()
        marked = [
            {r.number for r in frontier(rows, objectives)},
            {r.number for found in own for r in found},
        ]
    if len(rows) > TABLE_ROWS:
        rows = sorted(
            rows, key=lambda r: (not any(r.number in numbers for numbers in marked), r.number)
        )[:TABLE_ROWS]
    return Table(
        columns,
        [
            _row(result, axes, metrics) + [result.number in numbers for numbers in marked]
            for result in rows
        ],
    )


def _row(result: Result, axes: Sequence[str], metrics: Sequence[str]) -> list[Any]:
    values = dict(result.point.values)
    cells: list[Any] = [result.number, result.point.model, *(values.get(axis) for axis in axes)]
    for name in metrics:
        metric = result.metrics.get(name)
        cells += (
            [None] * 5
            if metric is None
            else [metric.value, *metric.interval, metric.n, metric.undecided]
        )
    return [*cells, result.changed_share, total(result.costs.values()).gpu_hours]


def _curve(training: Artifact) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, values) of a training; empty if retention has dropped the file."""
    try:
        path = training.file(CURVE)
    except Incomplete:
        return
    with path.open(newline="") as handle:
        for row in csv.DictReader(handle):
            step = int(row.pop("step"))
            yield step, {name: float(value) for name, value in row.items()}
