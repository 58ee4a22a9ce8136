"""The defences of a study and their controls: a panel for each model.

Invariants: a defence has one colour and one marker in all panels, and controls are grey. A control
is drawn at the mean of its draws, with their range; it has no frontier. Only adapters that a
defence changed are drawn, each once.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from ebbline.analysis.figures.drawing import (
    SCREEN,
    SEEDS_NOTE,
    Page,
    have_seeds,
    looks,
    seed_sign,
    style,
)
from ebbline.analysis.figures.frontier import draw_frontier
from ebbline.analysis.results.defended.beside import Beside, besides, defended
from ebbline.analysis.results.defended.labels import defence_label
from ebbline.analysis.results.frontier import finished, frontier
from ebbline.analysis.results.wording import directed_label, metric_label, natural, percent
from ebbline.sweeps.state.controls import ControlResult
from ebbline.sweeps.study.points import Result

GREY = "0.55"
CONTROL_MARKERS = ("x", "+", "1", "2", "3")
ACROSS = 3


def defences_figure(
    results: Sequence[Result],
    controls: Sequence[ControlResult],
    names: Sequence[str],
    page: Page = SCREEN,
) -> Figure | None:
    """Refusal rate against usefulness, both of `names`, of each defence and control.

    None with one defence and no control, and without usefulness.
    """
    arms, beside = _arms(results), besides(results, controls)
    defences = list(dict.fromkeys(name for own in arms.values() for name in own))
    if len(names) < 2 or not arms or (len(defences) < 2 and not beside):
        return None
    refusal, useful = names[:2]
    appearance = looks(defences)
    signs = dict(zip(_control_names(beside), CONTROL_MARKERS, strict=False))
    columns = min(ACROSS, len(arms))
    rows = -(-len(arms) // columns)
    with style(page):
        figure = Figure(
            figsize=page.size((max(6.4, 1.0 + 3.4 * columns), 0.8 + 3.4 * rows), 2.6 * rows),
            layout="constrained",
        )
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, (model, own) in zip(grid.flat, arms.items(), strict=False):
            for each in beside:
                if each.model == model:
                    _controls(axes, each, (useful, refusal), signs[each.control], page.marks)
            for name, adapters in own.items():
                draw_frontier(axes, adapters, (useful, refusal), *appearance[name])
            axes.set_title(model, loc="left")
            axes.set_xlabel(directed_label(useful))
            axes.set_ylabel(directed_label(refusal))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(PercentFormatter(1.0))
        for axes in grid.flat[len(arms) :]:
            axes.set_visible(False)
        figure.legend(
            handles=[
                *_legend(appearance, signs, page),
                *([seed_sign(page.marks)] if _have_seeds(arms, (useful, refusal)) else []),
            ],
            loc="outside lower center",
            ncols=2 if page.narrow or columns == 1 else 3,
        )
    return figure


def _arms(results: Sequence[Result]) -> dict[str, dict[str, list[Result]]]:
    """Model -> defence -> its adapters."""
    models = sorted({result.point.model for result in finished(results)}, key=natural)
    return {model: own for model in models if (own := defended(results, model))}


def _have_seeds(arms: Mapping[str, Mapping[str, list[Result]]], names: Sequence[str]) -> bool:
    return have_seeds(
        result.metrics[name]
        for own in arms.values()
        for adapters in own.values()
        for result in adapters
        for name in names
    )


def _control_names(beside: Sequence[Beside]) -> list[str]:
    return list(dict.fromkeys(each.control for each in beside))


def _controls(axes: Axes, each: Beside, names: tuple[str, str], marker: str, marks: float) -> None:
    for place in range(len(each.partners)):
        values_MD = np.array(
            [[draw[place].metrics[name].value for draw in each.draws] for name in names]
        )
        means_M = values_MD.mean(axis=1)
        below_M, above_M = means_M - values_MD.min(axis=1), values_MD.max(axis=1) - means_M
        axes.errorbar(
            means_M[0],
            means_M[1],
            xerr=[[below_M[0]], [above_M[0]]],
            yerr=[[below_M[1]], [above_M[1]]],
            color=GREY,
            marker=marker,
            markersize=6.0 * marks,
            elinewidth=0.7 * marks,
            zorder=2,
        )


def _legend(
    appearance: Mapping[str, tuple[str, str]], signs: Mapping[str, str], page: Page
) -> list[Line2D]:
    found = [
        Line2D(
            [],
            [],
            color=colour,
            marker=marker,
            markersize=6.0 * page.marks,
            linewidth=1.4 * page.marks,
            label=f"{defence_label(name)} and its frontier",
        )
        for name, (colour, marker) in appearance.items()
    ]
    return found + [
        Line2D(
            [],
            [],
            color=GREY,
            marker=marker,
            linestyle="",
            markersize=6.0 * page.marks,
            label=f"control: {name.replace('_', ' ')}",
        )
        for name, marker in signs.items()
    ]


def defences_words(
    results: Sequence[Result], controls: Sequence[ControlResult], names: Sequence[str]
) -> str:
    """The alternative text: each model's defences with their best refusal rates, and its controls.

    Empty without a figure.
    """
    if len(names) < 2:
        return ""
    refusal, useful = names[:2]
    parts, beside = [], besides(results, controls)
    for model, own in _arms(results).items():
        described = []
        for name, adapters in own.items():
            front = frontier(adapters, (useful, refusal))
            most = max(adapters, key=lambda each: each.metrics[refusal].value)
            described.append(
                f"{defence_label(name)}, {len(adapters)} adapters, frontier of {len(front)}, at "
                f"most {percent(most.metrics[refusal].value)} {metric_label(refusal)} with "
                f"{percent(most.metrics[useful].value)} {metric_label(useful)}"
            )
        grey = [
            f"{each.control.replace('_', ' ')} beside {len(each.partners)} settings of "
            f"{defence_label(each.defence)}"
            for each in beside
            if each.model == model
        ]
        parts.append(f"{model}: {'; '.join([*described, *grey])}.")
    return (
        f"Scatter plots: {directed_label(refusal)} against {directed_label(useful)}, a panel for "
        f"each model. {' '.join(parts)}"
    )


def defences_caption(controls: Sequence[ControlResult], results: Sequence[Result] = ()) -> str:
    text = (
        "Every adapter that a defence changed, with its 95% Wilson intervals. The steps are each "
        "defence's frontier; defences with more adapters have more chances."
    )
    if have_seeds(m for result in finished(results) for m in result.metrics.values()):
        text += f" {SEEDS_NOTE}"
    if controls:
        text += (
            " Grey: controls of the settings near each operating point, at the mean of their "
            "draws, with the range of the draws. They are on no frontier."
        )
    return text
