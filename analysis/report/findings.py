"""A study's results with everything computed from them once, for its report and figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from ebbline.analysis.figures.attainment import attainment_figure
from ebbline.analysis.figures.before_after import before_after_figure
from ebbline.analysis.figures.frontier import frontier_figure
from ebbline.analysis.figures.importance import importance_figure
from ebbline.analysis.figures.knob import threshold_figure
from ebbline.analysis.figures.words import (
    attainment_words,
    before_after_words,
    frontier_words,
    importance_words,
    threshold_words,
)
from ebbline.analysis.results.attainment import Attainment, attainments
from ebbline.analysis.results.before_after import Line, before_after
from ebbline.analysis.results.measurements import (
    NO_EVIDENCE,
    Baselines,
    Evidence,
    refusal_metric,
    usefulness_metric,
)
from ebbline.sweeps.search.importance import METHOD, Importance, importances
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study
from ebbline.tasks.defences.in_use import DEFENCE


@dataclass(frozen=True)
class Findings:
    """The results and what is computed from them.

    See ebbline.analysis.results.before_after, ebbline.analysis.results.attainment and
    ebbline.sweeps.search.importance.
    """

    study: Study
    results: Sequence[Result]
    baselines: Baselines
    evidence: Evidence
    lines: Sequence[Line]
    attained: Mapping[str, Attainment]
    importance: Mapping[str, Importance]
    picked: Sequence[Result] = ()  # what `ebbline pick` recorded


@dataclass(frozen=True)
class DrawnFigure:
    """A figure, a text with its numbers for the `alt` attribute, and its caption."""

    figure: Figure
    words: str
    caption: str


def findings(
    study: Study,
    results: Sequence[Result],
    baselines: Baselines,
    evidence: Evidence = NO_EVIDENCE,
    picked: Sequence[Result] = (),
) -> Findings:
    return Findings(
        study,
        results,
        baselines,
        evidence,
        before_after(study, results, baselines, evidence),
        attainments(results, study.objectives),
        importances(study, results),
        picked,
    )


def figures_of(found: Findings) -> dict[str, DrawnFigure]:
    """File name -> figure; figures without data are left out, except the frontier."""
    study, results, baselines = found.study, found.results, found.baselines
    drawn = {
        "frontier": DrawnFigure(
            frontier_figure(results, study.objectives, baselines, picked=found.picked),
            frontier_words(results, study.objectives, baselines, found.picked),
            "Every finished point with its 95% Wilson intervals. Filled: projected; "
            "hollow: not. The steps are each model's frontier,"
            " the stars its aligned model before fine-tuning."
            + (" A ring marks the point that `ebbline pick` chose." if found.picked else ""),
        )
    }
    attained = attainment_figure(found.attained, study.objectives)
    if attained is not None:
        drawn["attainment"] = DrawnFigure(
            attained, attainment_words(found.attained, study.objectives), attainment_caption(found)
        )
    names = [name for name in (refusal_metric(study), usefulness_metric(study)) if name is not None]
    across = threshold_figure(results, names, baselines)
    if across is not None:
        caption = f"{DEFENCE.words.against} 95% Wilson intervals."
        drawn["thresholds"] = DrawnFigure(
            across, threshold_words(results, names, baselines), caption
        )
    states = before_after_figure(found.lines)
    if states is not None:
        caption = (
            "Each size before fine-tuning, fine-tuned, and the same training projected, with "
            "95% intervals. Direction is in each title."
        )
        drawn["before-after"] = DrawnFigure(states, before_after_words(found.lines), caption)
    matters = importance_figure(found.importance)
    if matters is not None:
        caption = f"Importance of each axis by {METHOD}, with 95% intervals from resampled points."
        drawn["importance"] = DrawnFigure(matters, importance_words(found.importance), caption)
    return drawn


def attainment_caption(found: Findings) -> str:
    """Explains the bands, the points behind them, and the sizes without a band."""
    text = (
        "The frontier's uncertainty from retraining: empirical attainment surfaces over the "
        "training seeds. Every seed attained the region below the dashed line; only some seeds "
        "attained the band. The bands do not include the sampling error of prompts."
    )
    if any(each.seeds == 2 for each in found.attained.values()):
        text += " With two seeds the band is only the span between them."
    left_out = {model: each for model, each in found.attained.items() if each.left_out}
    for model, each in left_out.items():
        text += (
            f" {model}: {each.points} points with all {each.seeds} seeds; {each.left_out} with "
            "fewer are omitted."
        )
    single = {result.point.model for result in found.results if result.status == "done"} - set(
        found.attained
    )
    return text + (
        f" No band for {', '.join(sorted(single))}, whose points have one seed." if single else ""
    )
