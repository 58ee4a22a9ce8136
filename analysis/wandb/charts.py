"""The charts and tables of a study's W&B run, from its finished points.

Every table has at most TABLE_ROWS rows (ebbline.analysis.wandb.pages), and a picture one size.

    points, points_table          every point over the first two objectives
    frontier, frontier_table      a line for each model through its frontier
    defences                      refusal against usefulness by defence, controls in grey: a picture
    importance, importance_table  how much of each objective's variance an axis makes
    trainings_table               the trainings without a run of their own
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from ebbline.analysis.figures.defences import defences_figure
from ebbline.analysis.figures.drawing import style
from ebbline.analysis.figures.importance import label
from ebbline.analysis.results.frontier import frontier_by_model
from ebbline.analysis.results.measurements import refusal_metric, usefulness_metric
from ebbline.analysis.results.wording import metric_label
from ebbline.analysis.wandb.pages import Table, points_table, trainings_table
from ebbline.cluster.profile import Profile
from ebbline.cluster.store.artifacts import Artifact
from ebbline.sweeps.search.importance import importances
from ebbline.sweeps.state.controls import ControlResult
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study

PICTURE_DPI = 150


def study_charts(
    run: Any,
    study: Study,
    results: Sequence[Result],
    trainings: Sequence[Artifact],
    controls: Sequence[ControlResult],
    profile: Profile,
) -> dict[str, Any]:
    """What to log in the study's run. A study with one objective has no frontier."""
    import wandb  # here, because `ebbline sync --to-folder` imports no W&B

    objectives = study.objectives
    points = bound(run, "points_table", points_table(results, profile, objectives))
    charts: dict[str, Any] = {}
    if len(objectives) < 2:
        charts["points_table"] = points
    else:
        x, y = (metric_label(name) for name in objectives[:2])
        charts["points"] = wandb.plot.scatter(points, x, y, f"Every point: {y} against {x}")
        charts["frontier"] = wandb.plot_table(
            "wandb/lineseries/v0",
            bound(run, "frontier_table", frontier_table(study, results)),
            {"step": "step", "lineKey": "lineKey", "lineVal": "lineVal"},
            string_fields={"title": f"Frontier of each model: {y} against {x}", "xname": x},
        )
    shares = importance_table(study, results)
    if shares.rows:
        charts["importance"] = wandb.plot.bar(
            bound(run, "importance_table", shares),
            shares.columns[0],
            shares.columns[1],
            "Importance: the share of an objective's variance that an axis makes by itself",
        )
    names = [name for name in (refusal_metric(study), usefulness_metric(study)) if name]
    figure = defences_figure(results, controls, names)
    if figure is not None:
        charts["defences"] = wandb.Image(_picture(figure))
    others = trainings_table(results, trainings, profile)
    if others.rows:
        charts["trainings_table"] = bound(run, "trainings_table", others)
    return charts


def _picture(figure: Figure) -> Image.Image:
    drawn = io.BytesIO()
    with style():
        figure.savefig(drawn, format="png", dpi=PICTURE_DPI)
    return Image.open(drawn)


def frontier_table(study: Study, results: Sequence[Result]) -> Table:
    """The frontier of each model over the first two objectives, by the first."""
    x, y = study.objectives[:2]
    return Table(
        ["step", "lineKey", "lineVal"],
        [
            [result.metrics[x].value, model, result.metrics[y].value]
            for model, found in frontier_by_model(results, study.objectives[:2]).items()
            for result in sorted(found, key=lambda result: result.metrics[x].value)
        ],
    )


def importance_table(study: Study, results: Sequence[Result]) -> Table:
    """A row for each axis and objective with a share, in [0, 1], and its 95% interval."""
    return Table(
        ["axis and objective", "share", "low", "high"],
        [
            [f"{label(axis)}: {metric_label(name)}", share.value, *share.interval]
            for name, found in importances(study, results).items()
            for axis, share in {**found.shares, **found.of_defence}.items()
        ],
    )


def bound(run: Any, key: str, table: Table) -> Any:
    """A W&B table bound to its run; W&B then makes no artifact, which would hold a local path."""
    import wandb

    made = wandb.Table(columns=table.columns, data=table.rows, allow_mixed_types=True)
    made.bind_to_run(run, key, "table")
    return made


def folder_of(run: Any) -> str:
    """The name of the folder that W&B keeps a run in."""
    return Path(run.dir).parent.name
