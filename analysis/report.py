"""The report: one HTML file with the question, the answer and what it rests on, readable anywhere and for good.

Invariants: it asks for nothing from outside; it holds counts, rates, settings and hashes, never a prompt or completion.
"""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from analysis.answer import answer
from analysis.compare import Baselines, refusal_metric, usefulness_metric
from analysis.figures import svg
from analysis.files import write_whole
from analysis.frontier import frontier, frontier_hypervolume
from analysis.frontier_figure import frontier_figure
from analysis.tables import frontier_cells, results_frame
from analysis.threshold_figure import threshold_figure
from analysis.wording import directed_label, settings_label, without_paths
from sweeps.points import Result
from sweeps.study import Study


def write_report(
    study: Study,
    results: Sequence[Result],
    baselines: Baselines,
    folder: Path,
    cost: Mapping[str, object],
    provenance: Mapping[str, object],
) -> Path:
    """FOLDER/report.html. `cost` and `provenance` are rows of a label and a value."""
    page = _template().render(
        study=study,
        paragraphs=[_split(paragraph) for paragraph in answer(study, results, baselines)],
        counts={status: sum(result.status == status for result in results) for status in ("done", "running", "failed")},
        objectives=[directed_label(name) for name in study.objectives],
        hypervolume=frontier_hypervolume(results, study.objectives),
        table=frontier_cells(results_frame(results, study.objectives)),
        figures=_figures(study, results, baselines),
        failed=[
            (result.number, result.point.model, settings_label(result.point), without_paths(result.reason)) for result in _failed(results)
        ],
        cost=cost,
        provenance=provenance,
    )
    return write_whole(folder / "report.html", lambda path: path.write_text(page, "utf-8"))


def summary(study: Study, results: Sequence[Result], baselines: Baselines) -> dict[str, Any]:
    """The report's content as JSON values, for scripts."""
    return {
        "study": study.study,
        "objectives": list(study.objectives),
        "answer": answer(study, results, baselines),
        "hypervolume": frontier_hypervolume(results, study.objectives),
        "points": {status: sum(result.status == status for result in results) for status in ("done", "running", "failed")},
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


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("analysis", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report_template.html")


def _split(paragraph: str) -> tuple[str, str]:
    """A paragraph's heading ("small, projection") and text; the paragraphs that are about no model have no heading."""
    heading, colon, text = paragraph.partition(": ")
    if not colon or not heading.endswith((", fine-tuning", ", projection", ", operating point")):
        return "", paragraph
    return heading, text[0].upper() + text[1:]


def _failed(results: Sequence[Result]) -> list[Result]:
    return sorted((result for result in results if result.status == "failed"), key=lambda result: result.number)


def _figures(study: Study, results: Sequence[Result], baselines: Baselines) -> list[dict[str, str]]:
    drawn = " against ".join(directed_label(name) for name in reversed(study.objectives[:2]))
    names = [name for name in (refusal_metric(study), usefulness_metric(study)) if name is not None]
    across = threshold_figure(results, names, baselines)
    shown = [
        _shown(
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
        shown.append(_shown(across, alt=f"Line plots by threshold: {'; '.join(map(directed_label, names))}.", caption=caption))
    return shown


def _shown(figure: Figure, alt: str, caption: str) -> dict[str, str]:
    drawn = base64.b64encode(svg(figure)).decode("ascii")
    return {"source": f"data:image/svg+xml;base64,{drawn}", "alt": alt, "caption": caption}
