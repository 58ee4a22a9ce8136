"""A study's results with everything computed from them once, for its report and figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from ebbline.analysis.figures.attainment import attainment_figure
from ebbline.analysis.figures.before_after import before_after_figure
from ebbline.analysis.figures.defences import defences_caption, defences_figure, defences_words
from ebbline.analysis.figures.frontier import frontier_caption, frontier_figure
from ebbline.analysis.figures.importance import importance_figure
from ebbline.analysis.figures.knob import threshold_caption, threshold_figure
from ebbline.analysis.figures.words import (
    attainment_words,
    before_after_words,
    frontier_words,
    importance_words,
    threshold_words,
)
from ebbline.analysis.report.attempts import Attempts
from ebbline.analysis.results.attainment import Attainment, attainments
from ebbline.analysis.results.before_after import Line, before_after
from ebbline.analysis.results.defended.beside import (
    Against,
    against_controls,
    against_defences,
)
from ebbline.analysis.results.defended.modules import NO_EFFECTS, ModuleEffects
from ebbline.analysis.results.measurements import (
    NO_EVIDENCE,
    Baselines,
    Evidence,
    refusal_metric,
    usefulness_metric,
)
from ebbline.sweeps.search.importance import METHOD, Importance, importances
from ebbline.sweeps.state.controls import ControlResult
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study
from ebbline.tasks.defences.defence import Defence
from ebbline.tasks.defences.safe_lora import SAFE_LORA


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
    controls: Sequence[ControlResult] = ()
    against: Sequence[Against] = ()  # each defence against its controls, and the other defences
    effects: ModuleEffects = field(default_factory=dict)


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
    attempts: Attempts | None = None,
    importance: Callable[[], dict[str, Importance]] | None = None,
    controls: Sequence[ControlResult] = (),
    effects: ModuleEffects = NO_EFFECTS,
) -> Findings:
    """What is computed from the results. A part that fails is empty, and noted in `attempts`.
    `importance` returns that of the axes, if something else computes it. `controls` are the results
    of controls, and `effects` what the defences did to each module at their operating points.
    """
    make = (attempts or Attempts()).make
    return Findings(
        study,
        results,
        baselines,
        evidence,
        (
            make(
                "the comparison before and after",
                lambda: before_after(study, results, baselines, evidence),
            )
            or []
        ),
        (make("the attainment bands", lambda: attainments(results, study.objectives)) or {}),
        (
            make("the importance of the axes", importance or (lambda: importances(study, results)))
            or {}
        ),
        picked,
        controls,
        make(
            "the comparison with controls",
            lambda: [
                *against_controls(study, results, controls, evidence),
                *against_defences(study, results, evidence),
            ],
        )
        or (),
        effects,
    )


@dataclass(frozen=True)
class FigureToDraw:
    """How a figure is made: its drawing, which may be None without data, its text and caption."""

    draw: Callable[[], Figure | None]
    words: Callable[[], str]
    caption: Callable[[], str]


def figures_of(found: Findings, attempts: Attempts | None = None) -> dict[str, DrawnFigure]:
    """File name -> figure; figures without data are left out, except the frontier.

    A figure that fails is left out, too, and noted in `attempts`. A text or caption that fails
    leaves its figure.
    """
    make, drawn = (attempts or Attempts()).make, dict[str, DrawnFigure]()
    for name, picture in pictures_of(found).items():
        figure = make(f"the figure {name}", picture.draw)
        if figure is not None:
            drawn[name] = DrawnFigure(
                figure,
                (
                    make(f"the text of the figure {name}", picture.words)
                    or f"{name}; see the tables"
                ),
                (make(f"the caption of the figure {name}", picture.caption) or name),
            )
    return drawn


def pictures_of(found: Findings) -> dict[str, FigureToDraw]:
    """File name -> how to make the figure."""
    study, results, baselines = found.study, found.results, found.baselines
    names = [name for name in (refusal_metric(study), usefulness_metric(study)) if name is not None]
    return {
        "frontier": FigureToDraw(
            lambda: frontier_figure(results, study.objectives, baselines, picked=found.picked),
            lambda: frontier_words(results, study.objectives, baselines, found.picked),
            lambda: frontier_caption(results, found.picked),
        ),
        "defences": FigureToDraw(
            lambda: defences_figure(results, found.controls, names),
            lambda: defences_words(results, found.controls, names),
            lambda: defences_caption(found.controls),
        ),
        "attainment": FigureToDraw(
            lambda: attainment_figure(found.attained, study.objectives),
            lambda: attainment_words(found.attained, study.objectives),
            lambda: attainment_caption(found),
        ),
        "thresholds": FigureToDraw(
            lambda: threshold_figure(results, names, baselines),
            lambda: threshold_words(results, names, baselines),
            lambda: threshold_caption(results),
        ),
        **{
            f"settings-{defence.name}": _along(found, names, defence)
            for defence in study.used_defences
            if defence is not SAFE_LORA and defence.main_knob
        },
        "before-after": FigureToDraw(
            lambda: before_after_figure(found.lines),
            lambda: before_after_words(found.lines),
            lambda: (
                "Each size before fine-tuning, fine-tuned, and the same training defended, with "
                "95% intervals. Direction is in each title."
            ),
        ),
        "importance": FigureToDraw(
            lambda: importance_figure(found.importance),
            lambda: importance_words(found.importance),
            lambda: (
                f"Importance of each axis by {METHOD}, with 95% intervals from resampled points."
            ),
        ),
    }


def _along(found: Findings, names: Sequence[str], defence: Defence) -> FigureToDraw:
    """The metrics along the main knob of a defence, as `thresholds` for Safe LoRA."""
    results, baselines = found.results, found.baselines
    return FigureToDraw(
        lambda: threshold_figure(results, names, baselines, defence=defence),
        lambda: threshold_words(results, names, baselines, defence),
        lambda: threshold_caption(results, defence),
    )


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
