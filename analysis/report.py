"""The report: one HTML file with the question, the answer and what it rests on, readable anywhere and for good.

Invariants: it asks for nothing from outside; it holds counts, rates, settings and hashes, never a prompt or completion.
"""

import base64
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2
from matplotlib.figure import Figure

from analysis.answer import answer
from analysis.compare import NO_EVIDENCE, Baselines, Evidence, refusal_metric, usefulness_metric
from analysis.figures import svg
from analysis.files import write_whole
from analysis.frontier import frontier, frontier_hypervolume
from analysis.frontier_figure import frontier_figure
from analysis.projection_figure import Projections, projection_figures
from analysis.provenance import Row
from analysis.tables import agreement_cells, category_cells, frontier_cells, results_frame
from analysis.threshold_figure import threshold_figure
from analysis.wording import NO_RESULT, directed_label, settings_label, status_label, without_paths
from sweeps.points import STATUSES, Result
from sweeps.study import Study

_NO_PROJECTIONS: Projections = MappingProxyType({})


def write_report(
    study: Study,
    results: Sequence[Result],
    baselines: Baselines,
    folder: Path,
    cost: Mapping[str, object],
    provenance: Sequence[Row],
    projections: Projections = _NO_PROJECTIONS,
    evidence: Evidence = NO_EVIDENCE,
    plan: Path | None = None,
) -> Path:
    """FOLDER/report.html. `cost` has rows of a label and a value, `plan` is the picture (SVG) of the latest plan.

    Without `evidence` nothing is compared in pairs, and there are no tables by category and of agreement between scorers.
    """
    page = template("report_template.html").render(
        study=study,
        paragraphs=[_split(paragraph) for paragraph in answer(study, results, baselines, evidence)],
        counts={status: sum(result.status == status for result in results) for status in STATUSES},
        objectives=[directed_label(name) for name in study.objectives],
        hypervolume=frontier_hypervolume(results, study.objectives),
        categories=list(category_cells(study, results, evidence)),
        agreements=list(agreement_cells(study, results, evidence)),
        means=any(metric.squares is not None for result in results for metric in result.metrics.values()),
        table=frontier_cells(results_frame(results, study.objectives)),
        figures=[*_figures(study, results, baselines), *_projection_figures(projections), *_plan_figure(plan)],
        failed=[
            (result.number, result.point.model, settings_label(result.point), status_label(result.status), without_paths(result.reason))
            for result in _failed(results)
        ],
        cost=cost,
        provenance=[(group, list(rows)) for group, rows in itertools.groupby(provenance, key=lambda row: row.group)],
    )
    return write_whole(folder / "report.html", lambda path: path.write_text(page, "utf-8"))


def summary(study: Study, results: Sequence[Result], baselines: Baselines, evidence: Evidence = NO_EVIDENCE) -> dict[str, Any]:
    """The report's content as JSON values, for scripts."""
    return {
        "study": study.study,
        "objectives": list(study.objectives),
        "answer": answer(study, results, baselines, evidence),
        "hypervolume": frontier_hypervolume(results, study.objectives),
        "points": {status: sum(result.status == status for result in results) for status in STATUSES},
        "frontier": [
            {
                "number": result.number,
                "model": result.point.model,
                **dict(result.point.values),
                "metrics": {
                    name: {"value": metric.value, "low": metric.interval[0], "high": metric.interval[1], "n": metric.n}
                    for name, metric in sorted(result.metrics.items())
                },
            }
            for result in frontier(results, study.objectives)
        ],
    }


def template(name: str) -> jinja2.Template:
    """A page of analysis/, which escapes whatever it is given and raises for what it was not."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("analysis", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def shown(figure: Figure, alt: str, caption: str) -> dict[str, str]:
    """A figure as the pages' section of figures takes it, drawn into the page itself."""
    drawn = base64.b64encode(svg(figure)).decode("ascii")
    return {"source": f"data:image/svg+xml;base64,{drawn}", "alt": alt, "caption": caption}


def shown_cosines(figure: Figure, what: str) -> dict[str, str]:
    """A cosine map, with the words that explain it."""
    caption = (
        f"{what}: the cosine of each module's projected with its unprojected update, by layer and module type. White dots:"
        " projected. Hatched: no cosine, so never projected. Blank: not adapted."
    )
    return shown(figure, alt=f"Heat map: cosines of {what}, module types by layers, a dot on each projected module.", caption=caption)


def shown_shares(figure: Figure, what: str) -> dict[str, str]:
    """The step curves of projected shares, with the words that explain them."""
    caption = f"{what}: the share of all modules that a threshold projects, which are those with a cosine at or below it."
    return shown(figure, alt=f"Step curves: share of modules projected by threshold, {what}.", caption=caption)


def _split(paragraph: str) -> tuple[str, str]:
    """A paragraph's heading ("small, projection") and text; the paragraphs that are about no model have no heading."""
    heading, colon, text = paragraph.partition(": ")
    if not colon or not heading.endswith((", fine-tuning", ", projection", ", operating point")):
        return "", paragraph
    return heading, text[0].upper() + text[1:]


def _failed(results: Sequence[Result]) -> list[Result]:
    return sorted((result for result in results if result.status in NO_RESULT), key=lambda result: result.number)


def _figures(study: Study, results: Sequence[Result], baselines: Baselines) -> list[dict[str, str]]:
    drawn = " against ".join(directed_label(name) for name in reversed(study.objectives[:2]))
    names = [name for name in (refusal_metric(study), usefulness_metric(study)) if name is not None]
    across = threshold_figure(results, names, baselines)
    found = [
        shown(
            frontier_figure(results, study.objectives, baselines),
            alt=f"Scatter plot: {drawn}, a marker per finished point.",
            caption=(
                "Every finished point with its 95% Wilson intervals. Filled: projected; hollow: not. The steps are each"
                " model's frontier, the stars its aligned model before fine-tuning."
            ),
        )
    ]
    if across is not None:
        caption = "Against the projection threshold: modules whose cosine is at or below it are projected. 95% Wilson intervals."
        found.append(shown(across, alt=f"Line plots by threshold: {'; '.join(map(directed_label, names))}.", caption=caption))
    return found


def _plan_figure(plan: Path | None) -> list[dict[str, str]]:
    if plan is None or not plan.exists():
        return []
    drawn = base64.b64encode(plan.read_bytes()).decode("ascii")
    return [
        {
            "source": f"data:image/svg+xml;base64,{drawn}",
            "alt": "Gantt chart: stages over time, as planned, a row for each GPU.",
            "caption": "What the latest run was expected to do, from before it began. How far off predictions were is under Cost.",
        }
    ]


def _projection_figures(projections: Projections) -> list[dict[str, str]]:
    figures = projection_figures(projections)
    found = []
    for model, adapters in projections.items():
        if adapters:
            found.append(shown_cosines(figures[f"cosines-{model}"], f"{model}, {next(iter(adapters))}"))
            found.append(shown_shares(figures[f"projected-share-{model}"], f"{model}, {len(adapters)} projected adapters"))
    return found
