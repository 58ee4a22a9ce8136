"""A study's outputs beside its store: tables, figures and the report of its results so far."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ebbline.analysis.figures.drawing import save
from ebbline.analysis.figures.projection import projection_figures
from ebbline.analysis.report.findings import figures_of, findings
from ebbline.analysis.report.provenance import provenance
from ebbline.analysis.report.report import write_report
from ebbline.analysis.results.adapter_notes import adapter_notes
from ebbline.analysis.results.choices import chosen
from ebbline.analysis.results.collect import (
    StoredEvidence,
    artifacts_behind,
    baselines,
    costs_before,
    projections,
)
from ebbline.analysis.results.costs import cost_rows, prediction_rows
from ebbline.analysis.results.tables import (
    categories_frame,
    results_frame,
    write_categories,
    write_tables,
)
from ebbline.cluster.store.artifacts import Artifact
from ebbline.commands.plan import GANTT
from ebbline.sweeps.forecast.prediction import read_predictions
from ebbline.sweeps.state.spending import read_spent
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.view import StudyView


def write_outputs(view: StudyView, results: Sequence[Result]) -> dict[str, Path]:
    """Write the tables, figures and report of `results`. Returns name -> path of each output."""
    study, home, folder = view.study, view.home, view.folder
    before = baselines(view)
    _, table, frontier_csv = write_tables(
        results_frame(results, study.objectives, home.profile), folder
    )
    outputs = {"results": table, "frontier": frontier_csv}
    found = findings(study, results, before, StoredEvidence(view), chosen(results, folder))
    drawn = figures_of(found)
    saved = {name: save(each.figure, folder, name)[0] for name, each in drawn.items()}
    outputs["figure"] = saved["frontier"]
    projected = projections(study, results, home)
    for name, figure in projection_figures(projected).items():
        save(figure, folder, name)
    outputs["categories"] = write_categories(
        categories_frame(study, results, before, found.evidence), folder
    )
    artifacts = artifacts_behind(view, results)
    cost, origin = (
        _cost(view, results, artifacts),
        provenance(view, results, artifacts).rows(),
    )
    notes = adapter_notes(view, results)
    outputs["report"] = write_report(
        found, folder, cost, origin, projected, folder / f"{GANTT}.svg", drawn, notes
    )
    return outputs


def print_outputs(outputs: Mapping[str, Path], as_json: bool = False) -> None:
    if as_json:
        print(json.dumps({name: str(path) for name, path in outputs.items()}, indent=1))
        return
    for name, path in outputs.items():
        print(f"{name:10} {path}")


def _cost(
    view: StudyView, results: Sequence[Result], artifacts: Sequence[Artifact]
) -> dict[str, object]:
    folder, profile = view.folder, view.home.profile
    kinds = {artifact.key: artifact.kind for artifact in artifacts}
    rows = cost_rows(results, costs_before(view), kinds, read_spent(folder), profile)
    return rows | prediction_rows(read_predictions(folder), profile)
