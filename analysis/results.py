"""Results: every point of a study with its metrics, read from the two truths (Optuna's storage and the store).

Nothing remembers which artifacts a point led to: its stages' keys are computed again and looked up.
"""

from cluster.runner import Resolver
from sweeps.home import Home
from sweeps.outcome import metrics_of, result_of
from sweeps.plan import Planner
from sweeps.points import Result
from sweeps.search import asked
from sweeps.study import Study
from tasks.metrics import Metric


def collect(study: Study, home: Home) -> list[Result]:
    """All points asked so far, in the order of asking: done, failed with their reason, or still running."""
    planner, resolver = Planner(study, home), Resolver(home.store)
    results = []
    for number, point, state, reason in asked(study, home.storage_url(study.study)):
        reason = reason or ("no reason was recorded" if state == "failed" else "")
        results.append(result_of(study, number, point, planner.stages_for(point), resolver, reason))
    return results


def baselines(study: Study, home: Home) -> dict[str, dict[str, Metric]]:
    """Model -> full metric name -> metric of the aligned model before fine-tuning, for the models measured so far."""
    planner, resolver = Planner(study, home), Resolver(home.store)
    found = {model: metrics_of(study, suites, resolver) for model, suites in planner.baselines().items()}
    return {model: metrics for model, metrics in found.items() if metrics is not None}
