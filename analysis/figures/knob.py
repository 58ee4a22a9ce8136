"""Metrics against the main knob of the defence, as a figure: the refusals that the defence
restores, and their cost.

Invariants: a line joins results that differ only in the knob. Points without a value of it are
drawn apart, over "none". More than MOST_LOOKS trainings are not told apart: their points are dots,
with the median and the middle half of them.
"""

from collections.abc import Sequence
from types import MappingProxyType

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from ebbline.analysis.figures.drawing import (
    COLOURS,
    MOST_INTERVALS,
    MOST_LOOKS,
    SCREEN,
    SEEDS_NOTE,
    Page,
    dots,
    error_bars,
    have_seeds,
    looks,
    seed_dots,
    seed_sign,
    style,
)
from ebbline.analysis.results.frontier import finished
from ebbline.analysis.results.measurements import Baselines, is_defended
from ebbline.analysis.results.wording import axis_label, directed_label, natural, value_label
from ebbline.sweeps.study.points import Result, defence_of
from ebbline.tasks.defences.defence import Defence
from ebbline.tasks.defences.in_use import AXIS, DEFENCES, NONE
from ebbline.tasks.defences.safe_lora import SAFE_LORA

MOST_GROUPS = 20  # of neighbouring values of the knob, each with its median
BAND = 0.28  # opacity
_NO_BASELINES: Baselines = MappingProxyType({})


def threshold_figure(
    results: Sequence[Result],
    metric_names: Sequence[str],
    baselines: Baselines = _NO_BASELINES,
    page: Page = SCREEN,
    defence: Defence = SAFE_LORA,
) -> Figure | None:
    """A row for each metric, a column for each model, a line for each of at most MOST_LOOKS
    trainings.

    A dotted line is the aligned model before fine-tuning. On a narrow page with several models,
    rows are models and columns are metrics. None when no finished result has a value of the knob.
    """
    knob, done = defence.main_knob, along_knob(results, defence)
    thresholds = sorted({_value(result, knob) for result in done if not _is_none(result, knob)})
    models = sorted({result.point.model for result in done}, key=natural)
    if not thresholds or not metric_names:
        return None
    words = defence.words
    line_of = {result.number: _line_of(result, knob) for result in done}
    trainings = set(line_of.values())
    many = len(trainings) > MOST_LOOKS
    appearance = {} if many else looks(trainings)
    none_at = thresholds[0] - max(0.05, 0.2 * (thresholds[-1] - thresholds[0]))
    turned = page.narrow and len(models) > 1
    rows, columns = (len(models), len(metric_names)) if turned else (len(metric_names), len(models))
    drawn = [r.metrics[name] for r in done for name in metric_names if name in r.metrics]
    seeds_shown = not many and len(done) <= MOST_INTERVALS and have_seeds(drawn)
    with style(page):
        own_size = (max(4.6, 3.1 * len(models)), 2.4 * len(metric_names) + 1.0)
        figure = Figure(
            figsize=page.size(own_size, (1.05 if turned else 1.45) * rows + 0.75),
            layout="constrained",
        )
        grid = figure.subplots(
            rows, columns, sharex=True, sharey="col" if turned else "row", squeeze=False
        )
        by_metric = grid.T if turned else grid
        for row, name in zip(by_metric, metric_names, strict=True):
            for axes, model in zip(row, models, strict=True):
                own = [
                    result
                    for result in done
                    if result.point.model == model and name in result.metrics
                ]
                if many:
                    _spread(axes, own, name, none_at, page.marks, knob)
                by_line: dict[str, list[Result]] = {line: [] for line in appearance}
                for result in own if not many else ():
                    by_line[line_of[result.number]].append(result)
                for line, look in appearance.items():
                    _line(
                        axes,
                        by_line[line],
                        name,
                        knob,
                        look,
                        none_at,
                        page.marks,
                        len(done) <= MOST_INTERVALS,
                    )
                if name in baselines.get(model, {}):
                    axes.axhline(
                        baselines[model][name].value,
                        color="0.35",
                        linestyle=":",
                        linewidth=1.2 * page.marks,
                    )
            row[0].yaxis.set_major_formatter(PercentFormatter(1.0))
        labels = [directed_label(name).replace(", ", ",\n") for name in metric_names]
        for axes, title in zip(grid[0], labels if turned else models, strict=True):
            axes.set_title(title)
        for axes, label in zip(grid[:, 0], models if turned else labels, strict=True):
            axes.set_ylabel(label)
        for axes in grid.flat:
            _ticks(
                axes,
                thresholds,
                none_at if any(_is_none(result, knob) for result in done) else None,
                None if page.width is None else page.width / columns,
            )
        for axes in grid[-1]:
            axes.set_xlabel(words.short_knob if turned else words.knob)
        figure.legend(
            handles=[
                *(_spread_legend(len(trainings), page) if many else _legend(appearance, page)),
                *([_aligned_sign(page)] if baselines else []),
                *([seed_sign(page.marks)] if seeds_shown else []),
            ],
            loc="outside lower center",
            ncols=2,
        )
    return figure


def along_knob(results: Sequence[Result], defence: Defence) -> list[Result]:
    """The finished results with a value of the defence's main knob, and those with no defence if
    there is any.
    """
    own = [r for r in finished(results) if defence.main_knob in dict(r.point.values)]
    plain = [r for r in finished(results) if defence_of(r.point) is DEFENCES[NONE]]
    return sorted([*own, *plain], key=lambda result: result.number) if own else []


def threshold_caption(results: Sequence[Result], defence: Defence = SAFE_LORA) -> str:
    done = along_knob(results, defence)
    trainings = len({_line_of(result, defence.main_knob) for result in done})
    if trainings > MOST_LOOKS:
        return (
            f"{defence.words.against} The {trainings} trainings are too many to tell apart: dots "
            "are points without their intervals, which results.csv has. The line is their median "
            "and the band their middle half, in groups of neighbouring values."
        )
    if len(done) > MOST_INTERVALS:
        return (
            f"{defence.words.against} results.csv has the 95% intervals of the {len(done)} points."
        )
    seeds = have_seeds(metric for result in done for metric in result.metrics.values())
    return f"{defence.words.against} 95% Wilson intervals.{f' {SEEDS_NOTE}' if seeds else ''}"


def _value(result: Result, knob: str) -> float:
    value = dict(result.point.values)[knob]
    return float(value) if isinstance(value, int | float) else float("nan")


def _is_none(result: Result, knob: str) -> bool:
    return dict(result.point.values).get(knob) is None


def _line_of(result: Result, knob: str) -> str:
    others = [(axis, value) for axis, value in result.point.values if axis not in (knob, AXIS)]
    return (
        " ".join(f"{axis_label(axis)}={value_label(value)}" for axis, value in others)
        or "all trainings alike"
    )


def _line(
    axes: Axes,
    own: Sequence[Result],
    name: str,
    knob: str,
    look: tuple[str, str],
    none_at: float,
    marks: float,
    intervals: bool,
) -> None:
    colour, marker = look
    at = {
        result.number: none_at if _is_none(result, knob) else _value(result, knob) for result in own
    }
    joined = sorted(
        (result for result in own if not _is_none(result, knob)),
        key=lambda result: at[result.number],
    )
    axes.plot(
        [at[r.number] for r in joined],
        [r.metrics[name].value for r in joined],
        color=colour,
        linewidth=1.1 * marks,
    )
    for defended in (False, True):
        group = [result for result in own if is_defended(result) is defended]
        metrics = [result.metrics[name] for result in group]
        if group:
            if intervals:
                places = [(at[r.number], r.metrics[name]) for r in group]
                seed_dots(axes, places, colour, marks)
            axes.errorbar(
                [at[result.number] for result in group],
                [metric.value for metric in metrics],
                yerr=error_bars(metrics) if intervals else None,
                linestyle="",
                color=colour,
                marker=marker,
                markersize=4.5 * marks,
                markerfacecolor=colour if defended else "white",
                elinewidth=0.7 * marks,
                alpha=0.65,
            )


def _spread(
    axes: Axes, own: Sequence[Result], name: str, none_at: float, marks: float, knob: str
) -> None:
    """All points as dots, and the median and the middle half of each group of neighbours."""
    plain = [result for result in own if _is_none(result, knob)]
    rest = sorted(
        (result for result in own if not _is_none(result, knob)),
        key=lambda result: _value(result, knob),
    )
    at_N = np.array([_value(result, knob) for result in rest])
    value_N = np.array([result.metrics[name].value for result in rest])
    plain_values = [result.metrics[name].value for result in plain]
    colour = COLOURS[0]
    dots(
        axes,
        [*at_N.tolist(), *[none_at] * len(plain)],
        [*value_N.tolist(), *plain_values],
        colour,
        marks,
        zorder=1.5,
    )
    distinct = np.unique(at_N)
    if len(distinct) > MOST_GROUPS:  # groups of about equal size, none of which splits a value
        inner = np.quantile(at_N, np.linspace(0, 1, MOST_GROUPS + 1)[1:-1])
        group_N = np.searchsorted(np.unique(inner), at_N, side="right")
    else:
        group_N = np.searchsorted(distinct, at_N)
    groups = [np.flatnonzero(group_N == group) for group in np.unique(group_N)]
    if groups:
        centres = [float(np.median(at_N[group])) for group in groups]
        low, middle, high = np.array(
            [np.quantile(value_N[group], (0.25, 0.5, 0.75)) for group in groups]
        ).T
        axes.fill_between(centres, low, high, color=colour, alpha=BAND, linewidth=0, zorder=2)
        axes.plot(centres, middle, color=colour, linewidth=1.6 * marks, zorder=3)
    if plain:
        low, middle, high = np.quantile(plain_values, (0.25, 0.5, 0.75))
        axes.errorbar(
            none_at,
            middle,
            yerr=[[middle - low], [high - middle]],
            color=colour,
            marker="_",
            markersize=9 * marks,
            elinewidth=4 * marks,
            alpha=0.65,
            zorder=3,
        )


def _ticks(
    axes: Axes, thresholds: Sequence[float], none_at: float | None, width: float | None
) -> None:
    """A tick at each value, or at three of many, and "none" left of a gap.

    `width` is the width of a panel on paper, in inches.
    """
    if none_at is None:
        return
    few = thresholds
    if len(thresholds) > (6 if width is None else 3):
        few = [thresholds[0], thresholds[len(thresholds) // 2], thresholds[-1]]
    if width is not None and width < 2.2 and len(few) > 2:
        few = few[1:]  # the first label would overlap "none"
    axes.set_xticks([none_at, *few], ["none", *(f"{value:.3g}" for value in few)])
    axes.axvline((none_at + thresholds[0]) / 2, color="0.7", linewidth=0.8)


def _legend(appearance: dict[str, tuple[str, str]], page: Page) -> list[Line2D]:
    size = 6.0 * page.marks
    lines = [
        Line2D([], [], color=c, marker=m, markersize=size, linewidth=1.1, label=line)
        for line, (c, m) in appearance.items()
    ]
    hollow = Line2D(
        [],
        [],
        color="0.35",
        marker="o",
        markersize=size,
        markerfacecolor="white",
        linestyle="",
        label="hollow: not defended",
    )
    return [*lines, hollow]


def _spread_legend(trainings: int, page: Page) -> list[Line2D | Patch]:
    colour, size = COLOURS[0], 2.5 * page.marks
    return [
        Line2D([], [], color=colour, marker="o", markersize=size, linestyle="", label="a point"),
        Line2D([], [], color=colour, linewidth=1.6, label=f"median of {trainings} trainings"),
        Patch(facecolor=colour, alpha=BAND, label="the middle half of the points"),
    ]


def _aligned_sign(page: Page) -> Line2D:
    return Line2D(
        [],
        [],
        color="0.35",
        linestyle=":",
        label="aligned, not fine-tuned" if page.narrow else "aligned model, before fine-tuning",
    )
