"""What W&B shows of a study, as plain data: a page for each training and each point, and the study's own table and growth.

Invariant: rates, counts, settings, hashes and reasons only. A prompt, a completion or a path of this machine is in none of it.

W&B is made for some 10,000 runs in a project. Of a study the first `Profile.wandb_points` points, by number, have a run each; every
later one is a row of the table in its trainings' runs. The study's own table has a row for every finished point.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.tables import axes_of, metrics_of, results_frame
from analysis.wording import NO_RESULT, axis_label, metric_label, without_paths
from cluster.costs import total
from cluster.profile import Profile
from cluster.store import Artifact
from sweeps.points import Result
from sweeps.study import Study
from tasks.identity import digest

CURVE = "curve.csv"  # as tasks.train writes it; that module imports torch
TABLE_ROWS = 10_000  # W&B draws no more of a table
Rows = list[list[Any]]


@dataclass(frozen=True)
class Table:
    columns: list[str]
    rows: Rows


@dataclass(frozen=True)
class Page:
    """One W&B run to show. `stamp` changes when there is something new to show for the same id."""

    id: str
    stamp: str
    job_type: str
    name: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    history: Sequence[tuple[int, Mapping[str, float]]] = ()
    table: Table | None = None
    failed: bool = False


def pages(study: Study, results: Sequence[Result], trainings: Sequence[Artifact], profile: Profile) -> Iterator[Page]:
    """The trainings, then the points that have ended."""
    rows = _rows_of_trainings(study, results, profile)
    for artifact in trainings:
        yield _training_page(study, artifact, rows.get(artifact.key))
    for result in results:
        if result.number < profile.wandb_points and result.status not in ("running", "out_of_budget"):
            yield _point_page(study, result, profile)


def _training_page(study: Study, artifact: Artifact, table: Table | None) -> Page:
    history = list(_curve(artifact.file(CURVE)))
    return Page(
        id=f"{study.study}-{artifact.key[:12]}",
        stamp=artifact.content if table is None else digest([artifact.content, table.columns, table.rows]),
        job_type="training",
        name=f"train {artifact.key[:12]}",
        config={"key": artifact.key, "train": artifact.hashed.get("spec", {})},
        summary={"steps": len(history)},
        history=history,
        table=table,
    )


def _point_page(study: Study, result: Result, profile: Profile) -> Page:
    """The settings alone are its config: that is what W&B's parameter importance and parallel coordinates take from there."""
    counts = {name: [m.successes, m.n, m.undecided, list(m.seeds)] for name, m in result.metrics.items()}
    config: dict[str, Any] = {"model": result.point.model}
    for axis, value in result.point.values:
        part, _, name = axis.partition(".")
        config.setdefault(part, {})[name] = value
    cost = total(result.costs.values())
    summary: dict[str, Any] = {
        "point": result.number,
        "status": result.status,
        "reason": without_paths(result.reason)[:300],
        "seconds": result.seconds,
        "gpu_hours": cost.gpu_hours,
        "projected_share": result.projected_share,
        "stages": dict(result.keys),
    }
    usd = cost.usd(profile)
    if usd is not None:
        summary["usd"] = usd
    for name, metric in result.metrics.items():
        shown = summary_key(name)
        summary |= {shown: metric.value, f"{shown}_n": metric.n, f"{shown}_undecided": metric.undecided}
        summary[f"{shown}_low"], summary[f"{shown}_high"] = metric.interval
    return Page(
        id=f"{study.study}-{result.point.id}",
        stamp=digest([result.status, result.reason, counts, dict(result.keys)]),
        job_type="point",
        name=f"{result.number} {result.point}",
        config=config,
        summary=summary,
        failed=result.status in NO_RESULT,
    )


def summary_key(metric: str) -> str:
    """W&B reads a dot as nesting, and a slash as a section."""
    return metric.replace(".", "/")


def _rows_of_trainings(study: Study, results: Sequence[Result], profile: Profile) -> dict[str, Table]:
    """Training's key -> its points without a run of their own, once none of its points is still running."""
    users: dict[str, list[Result]] = {}
    for result in results:
        for key in {key for stage, key in result.keys.items() if stage.startswith("train[")}:
            users.setdefault(key, []).append(result)
    found: dict[str, Table] = {}
    for key, own in users.items():
        later = [result for result in own if result.number >= profile.wandb_points and result.status == "done"]
        if later and all(result.status != "running" for result in own):
            found[key] = points_table(results_frame(later, study.objectives, profile), later)
    return found


def points_table(frame: pd.DataFrame, results: Sequence[Result]) -> Table:
    """A row for each finished point of `frame` (analysis.tables.results_frame); beyond W&B's limit, those on a frontier first."""
    rows = frame[frame["status"] == "done"]
    if len(rows) > TABLE_ROWS:
        rows = rows.sort_values(["on_frontier", "on_model_frontier", "number"], ascending=[False, False, True]).head(TABLE_ROWS)
    named = {"number": "point", "model": "model"} | {axis: axis_label(axis) for axis in axes_of(results)}
    for name in metrics_of(results):
        named |= {f"{name}{part}": f"{metric_label(name)}{part.replace('_', ' ')}" for part in ("", "_low", "_high", "_n")}
    named |= {"projected_share": "projected share", "on_frontier": "on frontier", "on_model_frontier": "on its model's frontier"}
    named |= {"gpu_hours": "GPU-hours alone"}
    plain = rows[list(named)].astype(object)
    return Table(list(named.values()), plain.where(plain.notna(), None).to_numpy().tolist())


def _curve(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, values) of a training; none when retention has dropped the file."""
    if path.exists():
        with path.open(newline="") as handle:
            for row in csv.DictReader(handle):
                step = int(row.pop("step"))
                yield step, {name: float(value) for name, value in row.items()}
