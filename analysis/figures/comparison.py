"""The frontiers of several studies in one figure, a panel for each model.

Invariants: those of ebbline.analysis.figures.frontier; a study keeps its colour and marker in every
panel.
"""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from ebbline.analysis.figures.drawing import looks, style
from ebbline.analysis.figures.frontier import draw_frontier
from ebbline.analysis.results.comparison import Side
from ebbline.analysis.results.frontier import finished
from ebbline.analysis.results.wording import directed_label, natural

ACROSS = 3


def comparison_figure(sides: Sequence[Side], objectives: Sequence[str]) -> Figure:
    """The finished points and the frontier of each study over the first two objectives.

    Every study must measure them.
    """
    drawn = objectives[:2]
    models = sorted(
        {result.point.model for side in sides for result in finished(side.results)}, key=natural
    )
    across = min(ACROSS, max(1, len(models)))
    down = -(-len(models) // across) or 1
    appearance = looks([side.label for side in sides])
    with style():
        figure = Figure(figsize=(1.4 + 2.9 * across, 1.3 + 2.9 * down), layout="constrained")
        panels = figure.subplots(
            down, across, squeeze=False, sharex=len(drawn) == 2, sharey=True
        ).ravel()
        for panel, model in zip(panels, models, strict=False):
            panel.set_title(model, fontsize=9)
            for side in sides:
                draw_frontier(panel, side.of(model), drawn, *appearance[side.label])
            for axis in (panel.xaxis, panel.yaxis) if len(drawn) == 2 else (panel.yaxis,):
                axis.set_major_formatter(PercentFormatter(1.0))
        for panel in panels[len(models) :]:
            panel.set_visible(False)
        for place, panel in enumerate(panels[: len(models)]):
            panel.label_outer(remove_inner_ticks=True)
            if place % across == 0:
                panel.set_ylabel(directed_label(drawn[-1]))
            if place + across >= len(models):
                panel.set_xlabel(directed_label(drawn[0]) if len(drawn) == 2 else "point number")
                panel.tick_params(labelbottom=True)
        lines = [
            Line2D(
                [],
                [],
                color=colour,
                marker=marker,
                linewidth=1.4,
                label=f"{label} and its frontier",
            )
            for label, (colour, marker) in appearance.items()
        ]
        signs = [
            Line2D(
                [], [], color="0.35", marker="o", linestyle="", markerfacecolor=face, label=label
            )
            for label, face in (("defended", "0.35"), ("not defended", "white"))
        ]
        figure.legend(handles=[*lines, *signs], loc="outside lower center", ncols=2)
    return figure
