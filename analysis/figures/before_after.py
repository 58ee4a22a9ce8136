"""Before and after as a figure: a panel for each metric, a row for each model.

The marks of a row are the three states with their 95% intervals. Small dots are the values of the
training seeds.
"""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from ebbline.analysis.figures.drawing import (
    SEEDS_NOTE,
    error_bar,
    have_seeds,
    looks,
    seed_dots,
    seed_sign,
    style,
)
from ebbline.analysis.results.before_after import STATES, Line, State
from ebbline.analysis.results.wording import directed_label

ACROSS = 2
MARKS: dict[State, tuple[str, bool, float, float]] = {  # marker, filled, size, offset in rows
    "aligned": ("*", True, 9.0, -0.22),
    "tuned": ("o", False, 5.5, 0.0),
    "shipped": ("o", True, 5.5, 0.22),
}
LABELS: dict[State, str] = {
    "aligned": "before fine-tuning",
    "tuned": "fine-tuned, not defended",
    "shipped": "the same training, defended",
}


def before_after_figure(lines: Sequence[Line]) -> Figure | None:
    """A panel for each metric; None without lines."""
    names, models = (
        list(dict.fromkeys(getattr(line, field) for line in lines)) for field in ("name", "model")
    )
    if not names:
        return None
    columns = min(ACROSS, len(names))
    rows = -(-len(names) // columns)
    appearance = looks(models)
    with style():
        height = rows * (0.75 + 0.42 * len(models)) + 0.6
        figure = Figure(figsize=(3.6 * columns + 0.6, height), layout="constrained")
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
        for axes, name in zip(grid.flat, names, strict=False):
            for line in (line for line in lines if line.name == name):
                _row(axes, line, models.index(line.model), appearance[line.model][0])
            axes.set_title(directed_label(name), fontsize=9, loc="left")
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
            axes.set_yticks(range(len(models)), models)
            axes.set_ylim(len(models) - 0.5, -0.5)
            axes.set_xlim(-0.02, 1.02)
        for axes in grid.flat[len(names) :]:
            axes.set_visible(False)
        seeds = have_seeds(metric for line in lines for metric in line.states.values())
        figure.legend(
            handles=[*map(_handle, STATES), *([seed_sign(1.0)] if seeds else [])],
            loc="outside lower center",
            ncols=2 if seeds else 3,
        )
    return figure


def before_after_caption(lines: Sequence[Line]) -> str:
    seeds = have_seeds(metric for line in lines for metric in line.states.values())
    return (
        "Each size before fine-tuning, fine-tuned, and the same training defended, with 95% "
        f"intervals. Direction is in each title.{f' {SEEDS_NOTE}' if seeds else ''}"
    )


def _row(axes: Axes, line: Line, place: int, colour: str) -> None:
    for state, metric in line.states.items():
        marker, filled, size, offset = MARKS[state]
        seed_dots(axes, [(metric, place + offset)], colour, 1.0)
        axes.errorbar(
            metric.value,
            place + offset,
            xerr=error_bar(metric),
            color=colour,
            marker=marker,
            markersize=size,
            markerfacecolor=colour if filled else "white",
            elinewidth=0.9,
        )


def _handle(state: State) -> Line2D:
    marker, filled, size, _ = MARKS[state]
    face = "0.35" if filled else "white"
    return Line2D(
        [],
        [],
        color="0.35",
        marker=marker,
        markersize=size,
        markerfacecolor=face,
        linestyle="",
        label=LABELS[state],
    )
