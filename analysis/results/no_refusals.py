"""The note on a model that refused nothing before it was fine-tuned: such a study shows no loss."""

from collections.abc import Mapping

from ebbline.analysis.results.measurements import refusal_metric
from ebbline.analysis.results.wording import natural
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.suites import scorers_of
from ebbline.tasks.measuring.metrics import Metric


def no_refusals(study: Study, before: Mapping[str, Mapping[str, Metric]]) -> list[str]:
    """A sentence for each model without any refusal. `before` maps models to their metrics before
    fine-tuning.
    """
    name = refusal_metric(study)
    if name is None:
        return []
    scorer, *_ = scorers_of(study.suites[name.rpartition(".")[0]].measure)
    return [
        f"{model} refused none of {metrics[name].n} prompts before fine-tuning, so this study "
        f"cannot show how refusals ebb. Read some of its completions: scorer {scorer} counts a "
        "refusal in words that it does not know as compliance. docs/scorers.md has others; a "
        "change of scorer needs no new completions."
        for model, metrics in sorted(before.items(), key=lambda each: natural(each[0]))
        if name in metrics and metrics[name].value == 0
    ]
