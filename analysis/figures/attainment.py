"""Attainment surfaces as a figure: a panel for each model with several seeds.

The band lies between the surface that some seeds attain and the one that all attain.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from ebbline.analysis.figures.drawing import looks, style
from ebbline.analysis.results.attainment import Attainment, staircase
from ebbline.analysis.results.wording import directed_label

ACROSS = 3
BAND = 0.28  # opacity


def attainment_figure(found: Mapping[str, Attainment], objectives: Sequence[str]) -> Figure | None:
    """The bands of all models; each dot is a point with one seed. None without attainments."""
    if not found:
        return None
    columns = min(ACROSS, len(found))
    rows = -(-len(found) // columns)
    with style():
        figure = Figure(figsize=(max(4.6, 3.1 * columns), 2.9 * rows + 0.8), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        appearance = looks(found)
        for axes, (model, each) in zip(grid.flat, found.items(), strict=False):
            _panel(axes, each, objectives, appearance[model][0])
            axes.set_title(f"{model}, {each.seeds} seeds")
        for axes in grid.flat[len(found) :]:
            axes.set_visible(False)
        _limits(grid.flat[0], found)
        for axes in grid.flat:
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        for axes in grid.flat[max(0, len(found) - columns) : len(found)]:
            axes.set_xlabel(directed_label(objectives[0]))
            axes.xaxis.set_tick_params(labelbottom=True)
        for axes in grid[:, 0]:
            axes.set_ylabel(directed_label(objectives[1]))
        figure.legend(
            handles=_legend(max(each.seeds for each in found.values())),
            loc="outside lower center",
            ncols=2,
        )
    return figure


def _panel(axes: Axes, found: Attainment, objectives: Sequence[str], colour: str) -> None:
    best, worst = (staircase(found.surfaces[level], objectives) for level in ("some", "all"))
    axes.fill(
        [*best[0], *worst[0][::-1]],
        [*best[1], *worst[1][::-1]],
        color=colour,
        alpha=BAND,
        linewidth=0,
        zorder=1,
    )
    axes.plot(*worst, color=colour, linewidth=1.0, linestyle="--", zorder=2)
    if found.seeds > 2:
        axes.plot(
            *staircase(found.surfaces["half"], objectives), color=colour, linewidth=1.6, zorder=3
        )
    for values_NM in found.by_seed:
        axes.plot(
            values_NM[:, 0],
            values_NM[:, 1],
            linestyle="",
            marker="o",
            markersize=2.5,
            color="0.25",
            alpha=0.6,
            zorder=4,
        )


def _limits(axes: Axes, found: Mapping[str, Attainment]) -> None:
    values_NM = np.concatenate([values for each in found.values() for values in each.by_seed])
    low_M, high_M = values_NM.min(axis=0), values_NM.max(axis=0)
    margin_M = np.maximum(0.02, 0.06 * (high_M - low_M))
    axes.set_xlim(float(low_M[0] - margin_M[0]), float(high_M[0] + margin_M[0]))
    axes.set_ylim(float(low_M[1] - margin_M[1]), float(high_M[1] + margin_M[1]))


def _legend(seeds: int) -> list[Line2D | Patch]:
    band = Patch(facecolor="0.35", alpha=BAND, label="attained by some seeds, but not by all")
    worst = Line2D(
        [], [], color="0.35", linestyle="--", linewidth=1.0, label="attained by every seed"
    )
    median = Line2D(
        [], [], color="0.35", linewidth=1.6, label="attained by at least half of the seeds"
    )
    dots = Line2D(
        [],
        [],
        color="0.25",
        marker="o",
        markersize=2.5,
        linestyle="",
        label="a point with one seed",
    )
    return [band, worst, *([median] if seeds > 2 else []), dots]
