"""Results: every point of a study with its metrics, read from the two truths (Optuna's storage and the store).

Nothing remembers which artifacts a point led to: its stages' keys are computed again and looked up.
"""

import json
from collections.abc import Sequence

from analysis.compare import operating_point, refusal_metric
from analysis.frontier import finished
from analysis.wording import natural, settings_label
from cluster.runner import Resolver
from sweeps.home import Home
from sweeps.outcome import metrics_of, result_of
from sweeps.plan import Planner
from sweeps.points import Result
from sweeps.search import asked
from sweeps.study import Study
from tasks.gate import ProjectedRows, read_rows
from tasks.metrics import Metric
from tasks.specs import ApplySpec, ProjectSpec


def collect(study: Study, home: Home) -> list[Result]:
    """All points asked so far, in the order of asking: done, failed with their reason, or still running."""
    planner, resolver = Planner(study, home), Resolver(home.store)
    results = []
    for number, point, state, reason in asked(study, home.storage_url(study.study)):
        reason = reason or ("no reason was recorded" if state == "failed" else "")
        results.append(result_of(study, number, point, planner.stages_for(point), resolver, reason))
    return results


def projections(study: Study, results: Sequence[Result], home: Home) -> dict[str, dict[str, ProjectedRows]]:
    """Model -> label -> what was projected, an adapter each; first the one of the point to ship, so far as there is one.

    Of a point's replicates the first is shown.
    """
    refusal, found = refusal_metric(study), dict[str, dict[str, ProjectedRows]]()
    for model in sorted({result.point.model for result in finished(results)}, key=natural):
        own = [result for result in finished(results) if result.point.model == model]
        picked = operating_point(study, own, refusal) if refusal is not None else None
        first = own[0] if picked is None else picked[0]
        shown: dict[str, ProjectedRows] = {}
        seen: set[str] = set()
        for result in [first, *own]:
            project, apply = (result.keys[f"{kind}[seed={study.seeds[0]}]"] for kind in ("project", "apply"))
            if project not in seen:
                seen.add(project)
                rows = read_rows(home.store.open("project", project).path / ProjectSpec.COSINES)
                taken = json.loads((home.store.open("apply", apply).path / ApplySpec.CHOSEN).read_text())
                shown[f"point {result.number} ({settings_label(result.point)})"] = ProjectedRows(rows, frozenset(taken))
        found[model] = shown
    return found


def baselines(study: Study, home: Home) -> dict[str, dict[str, Metric]]:
    """Model -> full metric name -> metric of the aligned model before fine-tuning, for the models measured so far."""
    planner, resolver = Planner(study, home), Resolver(home.store)
    found = {model: metrics_of(study, suites, resolver) for model, suites in planner.baselines().items()}
    return {model: metrics for model, metrics in found.items() if metrics is not None}
