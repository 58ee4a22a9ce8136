"""The importance of each axis, as a table and as a figure: a panel for each objective, a row for
each axis that has a number.
"""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ebbline.analysis.figures.drawing import COLOURS, style
from ebbline.analysis.results.tables import in_percent
from ebbline.analysis.results.wording import axis_label, metric_label
from ebbline.sweeps.search.importance import MODEL, Importance

Importances = Mapping[str, Importance]
"""Objective -> what its axes matter."""


def importance_figure(found: Importances) -> Figure | None:
    """None where no objective has a number."""
    told = {name: each for name, each in found.items() if each.shares}
    if not told:
        return None
    axes_names = _axes(found)
    with style():
        figure = Figure(
            figsize=(max(4.6, 3.2 * len(told)), 0.34 * len(axes_names) + 1.2), layout="constrained"
        )
        grid = figure.subplots(1, len(told), sharey=True, squeeze=False)[0]
        for axes, (name, each) in zip(grid, told.items(), strict=True):
            for axis, share in each.shares.items():
                low, high = share.interval
                reach = [[share.value - low], [high - share.value]]
                axes.errorbar(
                    share.value,
                    axes_names.index(axis),
                    xerr=reach,
                    color=COLOURS[0],
                    marker="o",
                    markersize=5,
                    elinewidth=1.0,
                )
            axes.set_title(metric_label(name), fontsize=9, loc="left")
            axes.set_xlim(-0.03, 1.03)
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
            axes.set_yticks(range(len(axes_names)), [label(axis) for axis in axes_names])
            axes.set_ylim(len(axes_names) - 0.5, -0.5)
        figure.supxlabel("share of the variance that the axis makes by itself", fontsize=9)
    return figure


def importance_cells(found: Importances) -> pd.DataFrame:
    """A row for each axis, a column for each objective: the share in percent with its interval, or
    why there is none.
    """
    names = [
        *_axes(found),
        *dict.fromkeys(axis for each in found.values() for axis in each.without),
    ]
    cells = pd.DataFrame({"axis": [label(axis) for axis in dict.fromkeys(names)]})
    for name, each in found.items():
        cells[f"{metric_label(name)} %"] = [_cell(each, axis) for axis in dict.fromkeys(names)]
    return cells


def importance_notes(found: Importances) -> list[str]:
    """What to be careful of, in sentences."""
    notes = [
        f"No numbers for {metric_label(name)}: {each.reason}."
        for name, each in found.items()
        if each.reason
    ]
    few = next((each for each in found.values() if each.few), None)
    if few is not None:
        notes.append(
            f"{few.points} points are few for this: read the order of the axes with the "
            "intervals, and not the numbers alone."
        )
    uneven = next((each.uneven for each in found.values() if each.uneven), ())
    if uneven:
        names = ", ".join(label(axis) for axis in uneven)
        notes.append(
            f"Some model was run with fewer values than others of: {names}. Their shares "
            "and the model's cannot be told apart well."
        )
    return notes


def label(axis: str) -> str:
    return "model" if axis == MODEL else axis_label(axis)


def _axes(found: Importances) -> list[str]:
    """Those with a number anywhere, the most important of the first objective first."""
    return list(dict.fromkeys(axis for each in found.values() for axis in each.shares))


def _cell(found: Importance, axis: str) -> str:
    if axis in found.shares:
        share = found.shares[axis]
        return in_percent(share.value, *share.interval)
    return found.without.get(axis, "none")
