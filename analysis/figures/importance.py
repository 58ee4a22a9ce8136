"""The importance of each axis, as a table and as a figure.

The figure has a panel for each objective and a row for each axis with a number.
"""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ebbline.analysis.figures.drawing import COLOURS, style
from ebbline.analysis.results.tables import in_percent
from ebbline.analysis.results.wording import axis_label, metric_label
from ebbline.sweeps.search.importance import MODEL, Importance
from ebbline.tasks.defences.in_use import owner
from ebbline.tasks.defences.safe_lora import SAFE_LORA

UNVARIED = "(in every resample)"  # instead of an interval without a width

Importances = Mapping[str, Importance]
"""Objective -> the importance of each axis."""


def importance_figure(found: Importances) -> Figure | None:
    """A panel for each objective with numbers; None where no objective has one."""
    shown = {name: each for name, each in found.items() if each.shares}
    if not shown:
        return None
    axes_names = _axes(found)
    with style():
        figure = Figure(
            figsize=(max(4.6, 3.2 * len(shown)), 0.34 * len(axes_names) + 1.2), layout="constrained"
        )
        grid = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, (name, each) in zip(grid, shown.items(), strict=True):
            for axis, share in each.shares.items():
                low, high = share.interval
                error_bar = [[share.value - low], [high - share.value]]
                axes.errorbar(
                    share.value,
                    axes_names.index(axis),
                    xerr=error_bar,
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
    """A row for each axis, a column for each objective.

    A cell is the share in percent with its interval, or the reason that there is none. The knob of
    a defence has its share among the points of that defence.
    """
    names = [
        *_axes(found),
        *dict.fromkeys(axis for each in found.values() for axis in each.of_defence),
        *dict.fromkeys(axis for each in found.values() for axis in each.without),
    ]
    cells = pd.DataFrame({"axis": [label(axis) for axis in dict.fromkeys(names)]})
    for name, each in found.items():
        cells[f"{metric_label(name)} %"] = [_cell(each, axis) for axis in dict.fromkeys(names)]
    return cells


def importance_notes(found: Importances) -> list[str]:
    """Cautions on reading the numbers, a sentence each."""
    notes = [
        f"No numbers for {metric_label(name)}: {each.reason}."
        for name, each in found.items()
        if each.reason
    ]
    sampled = next((each for each in found.values() if each.finished is not None), None)
    if sampled is not None:
        notes.append(
            f"From {sampled.points} of the {sampled.finished} finished points, drawn at random "
            f"with a fixed seed; the intervals are those of {sampled.points} points."
        )
    few = next((each for each in found.values() if each.few), None)
    if few is not None:
        notes.append(
            f"{few.points} points are few for this: read the order and the intervals of the "
            "axes, not the numbers alone."
        )
    uneven = next((each.uneven for each in found.values() if each.uneven), ())
    if uneven:
        names = ", ".join(label(axis) for axis in uneven)
        notes.append(
            f"Some models ran with fewer values than others of: {names}. The shares of these "
            "axes and of the model cannot be separated well."
        )
    return notes


def label(axis: str) -> str:
    defence = owner(axis)
    if axis == MODEL:
        return "model"
    named = defence is not None and defence.name != SAFE_LORA.name
    return f"{axis_label(axis)} of {defence.name}" if defence and named else axis_label(axis)


def _axes(found: Importances) -> list[str]:
    """The axes with a number, in the order of importance for the first objective."""
    return list(dict.fromkeys(axis for each in found.values() for axis in each.shares))


def _cell(found: Importance, axis: str) -> str:
    if axis in found.shares or axis in found.of_defence:
        share = found.shares.get(axis) or found.of_defence[axis]
        if share.interval[0] == share.interval[1]:
            return f"{100 * share.value:.1f} {UNVARIED}"
        return in_percent(share.value, *share.interval)
    return found.without.get(axis, "none")
