"""A study's workspace and report on W&B: the panels over the runs of ebbline.analysis.wandb.runs.

They are saved with W&B's own `wandb-workspaces` (a public preview), which needs an existing project
on the server. They hold no results, only which metrics and settings to draw; W&B reads the values
from the runs.
"""

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import wandb
import wandb_workspaces.expr as expr
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from ebbline.analysis.results.wording import axis_label, directed_label, metric_label
from ebbline.analysis.wandb.pages import summary_key
from ebbline.analysis.wandb.runs import project
from ebbline.cluster.profile import Profile
from ebbline.sweeps.study.axes import Range
from ebbline.sweeps.study.study import Study
from ebbline.tasks.errors import StudyError
from ebbline.tasks.measuring.metrics import direction

RUNNING, LEARNING = "Is it running?", "Is it learning?"
OUTCOME, FAILED = "What came out?", "What failed?"


@dataclass(frozen=True)
class WorkspaceUrls:
    """The URLs of a study's workspace and report."""

    workspace: str
    report: str


def save_workspace(
    study: Study, profile: Profile, entity: str | None, before: WorkspaceUrls | None
) -> WorkspaceUrls:
    """Creates the workspace and the report, or updates those at `before`.

    Raises StudyError when W&B rejects the request or the project does not exist.
    """
    try:
        return _save(study, profile, entity or str(wandb.Api().default_entity or ""), before)
    except Exception as error:  # W&B's client raises many types of errors, also plain Exception
        place = f"{entity or 'your default entity'}/{project()}"
        raise StudyError(
            f"W&B did not save the workspace of {study.study!r} in {place}: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}."
            f" A project is created by its first run: `ebbline sync {study.study}` pushes the "
            "runs of this study"
        ) from error


def _save(
    study: Study, profile: Profile, entity: str, before: WorkspaceUrls | None
) -> WorkspaceUrls:
    if not entity:
        raise ValueError("this login has no default entity; give --entity")
    if before is not None and urlsplit(before.workspace).path != f"/{entity}/{project()}":
        before = None
    report = (
        wr.Report(project=project(), entity=entity)
        if before is None
        else wr.Report.from_url(before.report)
    )
    report.title, report.description = f"{study.study} frontier", study.question
    report.width = "fluid"
    report.blocks = [
        wr.P(study.question),
        wr.P(f"Hypothesis: {study.hypothesis or 'none'}"),
        wr.H2(RUNNING),
        _grid(study, entity, "study", status_panels()),
        wr.H2(LEARNING),
        _grid(study, entity, "training", training_panels()),
        wr.H2(OUTCOME),
        _grid(study, entity, "study", [*chart_panels(study), *growth_panels(profile)]),
        _grid(study, entity, "point", [*scatter_panels(study), *settings_panels(study)]),
        wr.H2(FAILED),
        wr.P("A run's summary has the reason, its notes the command that runs it again."),
        wr.PanelGrid(
            runsets=[
                wr.Runset(
                    entity=entity,
                    project=project(),
                    name=f"{study.study}: failed",
                    filters=[
                        expr.Metric("Group") == study.study,
                        expr.Metric("State") == "failed",
                    ],
                )
            ],
            panels=_placed(failure_panels()),
        ),
    ]
    report.save()  # first, because it checks that the project exists

    workspace = (
        ws.Workspace(entity=entity, project=project())
        if before is None
        else ws.Workspace.from_url(before.workspace)
    )
    workspace.name = study.study
    workspace.sections = [
        ws.Section(name=RUNNING, panels=status_panels(), is_open=True),
        ws.Section(name=LEARNING, panels=training_panels(), is_open=True),
        ws.Section(
            name=OUTCOME,
            panels=[*frontier_panels(study), *growth_panels(profile), *settings_panels(study)],
            is_open=True,
        ),
        ws.Section(name=FAILED, panels=failure_panels(), is_open=True),
    ]
    workspace.runset_settings = ws.RunsetSettings(filters=[ws.Metric("Group") == study.study])
    workspace.settings.max_runs = 100
    workspace.save()
    return WorkspaceUrls(workspace.url, report.url)


def status_panels() -> list[Any]:
    """What the study's run shows of the drive, over its hours: points, queue, GPUs and cost."""
    shown = {
        "Points": ["status/points_finished", "status/points_in_flight"],
        "Stages": ["status/stages_running", "status/stages_queued"],
        "GPUs": ["status/gpus_busy", "status/gpus"],
        "GPU-hours spent": ["status/spent_gpu_hours"],
        "Hours left for what has started": ["status/hours_left"],
    }
    return [
        wr.LinePlot(title=title, x="hours", y=names, title_x="hours of driving")
        for title, names in shown.items()
    ]


def training_panels() -> list[Any]:
    """The curves of the trainings by step."""
    shown = {
        "Training loss": "loss",
        "Gradient norm": "gradient_norm",
        "Tokens per second": "tokens_per_s",
        "Peak memory, GB": "peak_memory_gb",
    }
    return [
        wr.LinePlot(title=title, x="Step", y=[name], max_runs_to_show=100)
        for title, name in shown.items()
    ]


def failure_panels() -> list[Any]:
    """How many stages have failed so far; the runs themselves are in the list beside it."""
    return [wr.LinePlot(title="Stages that failed", x="hours", y=["status/stages_failed"])]


def frontier_panels(study: Study) -> list[Any]:
    """The charts of the study's run, then the scatter plots of the points' runs."""
    return [*chart_panels(study), *scatter_panels(study)]


def chart_panels(study: Study) -> list[Any]:
    """Charts from the tables of the study's run: every point, each model's frontier, the defences.

    Empty for a study with one objective.
    """
    if len(study.objectives) < 2:
        return []
    x, y = (metric_label(name) for name in study.objectives[:2])
    return [
        wr.CustomChart(
            query={"summaryTable": {"tableKey": "points_table"}},
            chart_name="wandb/scatter/v0",
            chart_fields={"x": x, "y": y},
            chart_strings={"title": f"Every point: {y} against {x}"},
        ),
        wr.CustomChart(
            query={"summaryTable": {"tableKey": "frontier_table"}},
            chart_name="wandb/lineseries/v0",
            chart_fields={"step": "step", "lineKey": "lineKey", "lineVal": "lineVal"},
            chart_strings={"title": f"Frontier of each model: {y} against {x}", "xname": x},
        ),
        wr.MediaBrowser(title="Refusal against usefulness by defence", media_keys=["defences"]),
    ]


def scatter_panels(study: Study) -> list[Any]:
    """Scatter plots of consecutive objectives from the points' runs.

    In a large study only the first points have a run.
    """
    pairs = zip(study.objectives, study.objectives[1:], strict=False)
    return [
        wr.ScatterPlot(
            title=f"Points with a run: {directed_label(y)}, against {directed_label(x)}",
            x=wr.SummaryMetric(summary_key(x)),
            y=wr.SummaryMetric(summary_key(y)),
        )
        for x, y in pairs
    ]


def growth_panels(profile: Profile) -> list[Any]:
    """The hypervolume over points, hours, GPU-hours, and dollars if the profile has prices."""
    over = {"finished": "points finished", "hours": "hours of driving", "gpu_hours": "GPU-hours"}
    over |= {"usd": "dollars"} if profile.gpus else {}
    return [
        wr.LinePlot(
            title=f"Hypervolume over {words}",
            x=name,
            y=[f"hypervolume/over_{name}"],
            title_x=words,
            title_y="hypervolume",
            smoothing_type="none",
        )
        for name, words in over.items()
    ]


def settings_panels(study: Study) -> list[Any]:
    """Axes and objectives as parallel coordinates, and parameter importance per objective."""
    axes = {axis: values for model in study.models for axis, values in study.axes_of(model).items()}
    columns = [wr.ParallelCoordinatesPlotColumn(metric=wr.Config("model"), display_name="model")]
    for axis, values in axes.items():
        log = isinstance(values, Range) and values.log
        columns.append(
            wr.ParallelCoordinatesPlotColumn(
                metric=wr.Config(axis), display_name=axis_label(axis), log=log
            )
        )
    for name in study.objectives:
        down = direction(name) == "minimise"  # so that up is better on every axis
        metric = wr.SummaryMetric(summary_key(name))
        columns.append(
            wr.ParallelCoordinatesPlotColumn(
                metric=metric, display_name=directed_label(name), inverted=down
            )
        )
    importance = [
        wr.ParameterImportancePlot(with_respect_to=summary_key(name)) for name in study.objectives
    ]
    return [
        wr.ParallelCoordinatesPlot(columns=columns, title="Settings and objectives"),
        *importance,
    ]


def _grid(study: Study, entity: str, job_type: str, panels: list[Any]) -> Any:
    return wr.PanelGrid(runsets=[_runset(study, entity, job_type)], panels=_placed(panels))


def _runset(study: Study, entity: str, job_type: str) -> Any:
    filters = [expr.Metric("Group") == study.study, expr.Metric("JobType") == job_type]
    return wr.Runset(
        entity=entity, project=project(), name=f"{study.study}: {job_type}", filters=filters
    )


def _placed(panels: list[Any]) -> list[Any]:
    """Places the panels in rows of two; W&B's grid is 24 wide."""
    for index, panel in enumerate(panels):
        panel.layout = wr.Layout(x=12 * (index % 2), y=8 * (index // 2), w=12, h=8)
    return panels
