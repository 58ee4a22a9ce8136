"""What a study writes beside its store: tables, figures and report of what it has so far."""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from analysis import mirror
from analysis.compare import refusal_metric, usefulness_metric
from analysis.costs import cost_rows, prediction_rows
from analysis.figures import save
from analysis.frontier_figure import frontier_figure
from analysis.projection_figure import projection_figures
from analysis.report import write_report
from analysis.results import StoredEvidence, baselines, collect, costs_before, kinds_of, projections, prompt_sets
from analysis.tables import categories_frame, results_frame, write_categories, write_tables
from analysis.threshold_figure import threshold_figure
from ebbline.planning import GANTT
from sweeps.home import Home
from sweeps.points import Result
from sweeps.prediction import read_predictions
from sweeps.racing import races
from sweeps.spending import read_spent
from sweeps.study import Study, lasting
from tasks.identity import digest

VERSIONS = ("ebbline", "torch", "transformers", "peft", "bitsandbytes", "deepspeed", "lm-eval", "ray", "optuna", "moocore")


def write_outputs(study: Study, home: Home) -> dict[str, Path]:
    """The tables, figures and report of what a study has so far; what -> where."""
    folder = home.folder(study.study)
    results, before = collect(study, home), baselines(study, home)
    _, table, frontier_csv = write_tables(results_frame(results, study.objectives, home.profile), folder)
    outputs = {"results": table, "frontier": frontier_csv}
    outputs["figure"] = save(frontier_figure(results, study.objectives, before), folder, "frontier")[0]
    drawn = [name for name in (refusal_metric(study), usefulness_metric(study)) if name is not None]
    thresholds = threshold_figure(results, drawn, before)
    if thresholds is not None:
        save(thresholds, folder, "thresholds")
    projected = projections(study, results, home)
    for name, figure in projection_figures(projected).items():
        save(figure, folder, name)
    evidence = StoredEvidence(study, home)
    outputs["categories"] = write_categories(categories_frame(study, results, before, evidence), folder)
    cost, provenance = _cost(study, home, results), _provenance(study, results, home)
    outputs["report"] = write_report(study, results, before, folder, cost, provenance, projected, evidence, folder / f"{GANTT}.svg")
    return outputs


def tell_outputs(outputs: Mapping[str, Path], as_json: bool = False) -> None:
    if as_json:
        print(json.dumps({what: str(path) for what, path in outputs.items()}, indent=1))
        return
    for what, path in outputs.items():
        print(f"{what:10} {path}")


def _cost(study: Study, home: Home, results: Sequence[Result]) -> dict[str, object]:
    folder = home.folder(study.study)
    spent = read_spent(folder)
    rows = cost_rows(results, costs_before(study, home), kinds_of(study, home, results), spent, home.profile)
    return rows | prediction_rows(read_predictions(folder), home.profile)


def _provenance(study: Study, results: Sequence[Result], home: Home) -> dict[str, object]:
    trained = mirror.trainings_of(results, home.store)
    hosts = sorted({f"{artifact.provenance.get('device')} on {platform.machine()}" for artifact in trained})
    return {
        "study, sha256": f"{digest(lasting(study.model_dump(mode='json')))} (its settings and pins; not its budget, nor where it ran)",
        "seeds": ", ".join(str(seed) for seed in study.seeds),
        "search": f"{study.sampler}, seed {study.search.seed}, {_order(study)}",
        "stops when": f"the hypervolume grows by less than {study.search.stop}" if study.search.stop else "it has its points",
        "replicates": _replicates(study),
        **{f"prompts of {suite}": said for suite, said in prompt_sets(study, home).items()},
        **{f"raced: {suite}": str(race) for suite, race in races(study).items() if race is not None},
        "trained on": ", ".join(hosts) or "nothing yet",
        "python": platform.python_version(),
        **{name: version(name) for name in VERSIONS},
    }


def _order(study: Study) -> str:
    if study.search.order == "in_turn":
        return f"told in turn, {study.search.reach} points in flight"
    return "told as points land" + (f", at most {study.search.window} in flight" if study.search.window else "")


def _replicates(study: Study) -> str:
    policy = study.replicates
    if policy.policy == "all":
        return "every seed for every point"
    return f"{policy.at_least}, and more while it is not certain at {policy.confidence:g} whether another point is better"
