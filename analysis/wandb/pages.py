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

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ebbline.analysis.results.frontier import finished, frontier, frontier_by_model
from ebbline.analysis.results.tables import axes_in, metrics_in
from ebbline.analysis.results.wording import (
    NO_RESULT,
    axis_label,
    defence_label,
    metric_label,
    value_label,
    without_paths,
)
from ebbline.analysis.wandb.live import LiveTraining, step_values
from ebbline.cluster.profile import Profile
from ebbline.cluster.schedule.costs import total
from ebbline.cluster.store.artifacts import Artifact
from ebbline.sweeps.drive.curves import steps_of
from ebbline.sweeps.study.points import Result, StageName, Value, training_of
from ebbline.sweeps.study.study import Study
from ebbline.tasks.defences.defence import SHARE_COLUMN
from ebbline.tasks.defences.in_use import AXIS
from ebbline.tasks.errors import Incomplete
from ebbline.tasks.identity import digest
from ebbline.tasks.progress import TrainedStep
from ebbline.tasks.specs import TrainSpec

SHORT = {"rank": "r", "size": "n"}  # axes that people shorten
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
    tags: Sequence[str] = ()
    notes: str = ""


@dataclass(frozen=True)
class TrainingTitle:
    """What a training is called, `7b r=32 n=1,024 seed 0`, and its tags."""

    name: str
    tags: tuple[str, ...] = ()


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
    later, titles = _later_points(results, profile), training_titles(results)
    rows = trainings_without_run(results, profile)
    for artifact in (artifact for artifact in trainings if artifact.key not in rows):
        title = titles.get(artifact.key, TrainingTitle(f"train {artifact.key[:12]}"))
        yield _training_page(study, artifact, title, later.get(artifact.key, []), home_id)
    for result in results:
        if result.number < profile.wandb_points and result.status not in (
            "running",
            "skipped",
            "outdated",
        ):
            yield _point_page(study, result, profile, home_id, hosts)


def _training_page(
    study: Study,
    artifact: Artifact,
    title: TrainingTitle,
    points: Sequence[Result],
    home_id: str,
) -> RunPage:
    history = [(step.step, step_values(step)) for step in _steps(artifact)]
    shown = [[result.number, _counts(result)] for result in points]
    return RunPage(
        id=run_id(study, home_id, artifact.key[:12]),
        stamp=digest([artifact.content, shown]) if shown else artifact.content,
        job_type="training",
        name=title.name,
        config={"key": artifact.key, "train": artifact.hashed.get("spec", {})},
        summary={"steps": len(history), "status": "finished"},
        history=history,
        points=points,
        tags=(*title.tags, "finished"),
        notes=rerun_notes(artifact.kind, artifact.key, artifact.folder.name),
    )


def live_page(training: LiveTraining, id: str) -> RunPage:
    """The run of a training at work, without its steps."""
    about = training.trained
    title = training_title(about.model, about.settings, about.seed)
    return RunPage(
        id=id,
        stamp="",
        job_type="training",
        name=title.name,
        config={"key": training.key, "train": training.spec},
        summary={},
        tags=(*title.tags, "running"),
        notes=rerun_notes(TrainSpec.KIND, training.key, training.attempt.rpartition("/")[2]),
    )


def rerun_notes(kind: str, key: str, attempt: str) -> str:
    """How to repeat a stage. The store's place is the reader's own, and is not told."""
    return f"`ebbline rerun HOME/store/{kind}/{key}/{attempt}/log/request.json`"


def training_titles(results: Sequence[Result]) -> dict[str, TrainingTitle]:
    """Key of a training -> its title, from the first point that uses it."""
    titles: dict[str, TrainingTitle] = {}
    for result in results:
        for name, key in result.keys.items():
            parsed = StageName.parse(name)
            if parsed.part == TrainSpec.KIND and key not in titles:
                own = training_of(result.point)
                titles[key] = training_title(own.model, dict(own.values), parsed.seed)
    return titles


def training_title(model: str, settings: Mapping[str, Value], seed: int) -> TrainingTitle:
    """The title of a training with these settings."""
    words = (model, *short_labels(settings), f"seed {seed}")
    return TrainingTitle(" ".join(words), words)


def short_labels(settings: Mapping[str, Value]) -> list[str]:
    """The settings as people say them, those of the training before those of its data."""
    ordered = sorted(settings, key=lambda axis: (not axis.startswith(f"{TrainSpec.KIND}."), axis))
    return [short_label(axis, settings[axis]) for axis in ordered]


def short_label(axis: str, value: Value) -> str:
    """A setting as people say it: `r=32`, `n=1,024`, `threshold=0.35`."""
    name = axis_label(axis)
    shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else None
    return f"{SHORT.get(name, name)}={shown or value_label(value)}"


def uses(result: Result, key: str) -> bool:
    """Whether a point uses this training."""
    return any(
        own == key for stage, own in result.keys.items() if stage.startswith(f"{TrainSpec.KIND}[")
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
    trained = dict(training_of(result.point).values)
    rest = {axis: value for axis, value in result.point.values if axis not in trained}
    defence = [defence_label(result.point)] if AXIS in rest else short_labels(rest)
    settings = [*short_labels(trained), *defence]
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
        name=" ".join([str(result.number), result.point.model, *settings]),
        tags=(result.point.model, *settings, result.status),
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
        steps = _steps(artifact)
        step, loss = (steps[-1].step, steps[-1].loss) if steps else (None, None)
        rows.append([artifact.key[:12], first[artifact.key], step, loss])
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


def _steps(training: Artifact) -> list[TrainedStep]:
    """The steps of a training that ended; empty if retention has dropped its curve."""
    try:
        return steps_of(training)
    except Incomplete:
        return []
