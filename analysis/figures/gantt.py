"""A plan as a Gantt chart: which stage runs where and when. On many GPUs it shows the number of
busy GPUs by stage kind.

Invariants: a bar is a stage of the simulated trace, from its start to its end. It is on a GPU or
slot that no other stage holds at that time. Hosts are numbered, not named, since the report with
this figure is published.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ebbline.analysis.figures.drawing import COLOURS, style
from ebbline.cluster.schedule.simulate import Span, Trace
from ebbline.tasks.kinds import STAGE_KINDS

MOST_LANES = 40
UNITS = (
    (2 * 86_400.0, 86_400.0, "days"),
    (2 * 3600.0, 3600.0, "hours"),
    (180.0, 60.0, "minutes"),
    (0.0, 1.0, "seconds"),
)
OTHER = "0.8"


def gantt_figure(trace: Trace, kinds: Mapping[str, str], title: str = "") -> Figure | None:
    """A row for each used GPU and slot; above MOST_LANES rows, the number of busy GPUs by kind.

    `kinds` maps a key to its stage's kind. None without stages.
    """
    if not trace.spans:
        return None
    scale_s, unit = next(
        (seconds, name) for least, seconds, name in UNITS if trace.makespan_s >= least
    )
    lanes = lanes_of(trace.spans)
    rows = sorted(
        {lane for held in lanes for lane in held},
        key=lambda lane: (lane[0], not lane[1], lane[2]),
    )
    ran = {kinds[span.key] for span in trace.spans}
    seen = {kind: colour for kind, colour in colours().items() if kind in ran}
    with style():
        tall = 1.4 + 0.24 * len(rows) if len(rows) <= MOST_LANES else 4.2
        figure = Figure(figsize=(9.0, tall), layout="constrained")
        axes = figure.subplots()
        if len(rows) <= MOST_LANES:
            _bars(axes, trace.spans, lanes, rows, kinds, seen, scale_s)
        else:
            _areas(axes, trace, kinds, seen, scale_s)
        axes.set_xlabel(f"{unit} from the start, as planned")
        axes.set_xlim(0, trace.makespan_s / scale_s)
        axes.set_title(title)
        shown = [*seen.items(), *([("other", OTHER)] if len(rows) <= MOST_LANES else [])]
        figure.legend(
            handles=[Patch(color=colour, label=name) for name, colour in shown],
            loc="outside lower center",
            ncols=len(shown),
        )
    return figure


def colours() -> dict[str, str]:
    """Stage kind -> its colour, in the order of the kinds, for kinds that have one.

    Training kinds are warm, measuring kinds cold, preparing kinds grey.
    """
    palette = {f"C{place}": colour for place, colour in enumerate(COLOURS)}
    return {
        kind.name: palette.get(kind.colour, kind.colour)
        for kind in STAGE_KINDS.values()
        if kind.colour
    }


Lane = tuple[str, bool, int]  # host, whether it is a GPU (else a slot), its number


def lanes_of(spans: Sequence[Span]) -> list[list[Lane]]:
    """The lanes of each span: the first free ones of each of its hosts.

    A span without a GPU holds one slot.
    """
    free_at: dict[Lane, float] = {}
    held: list[list[Lane]] = [[] for _ in spans]
    for place, span in sorted(enumerate(spans), key=lambda item: (item[1].start_s, item[0])):
        for host, gpus in span.hosts.items():
            number = 0
            missing = max(1, gpus)
            while missing:
                lane = (host, gpus > 0, number)
                if free_at.get(lane, 0.0) <= span.start_s + 1e-9:
                    free_at[lane] = span.end_s
                    held[place].append(lane)
                    missing -= 1
                number += 1
    return held


def _bars(
    axes: Axes,
    spans: Sequence[Span],
    lanes: Sequence[Sequence[Lane]],
    rows: Sequence[Lane],
    kinds: Mapping[str, str],
    seen: Mapping[str, str],
    scale_s: float,
) -> None:
    at = {lane: place for place, lane in enumerate(rows)}
    bars: dict[tuple[Lane, str], list[tuple[float, float]]] = defaultdict(list)
    for span, held in zip(spans, lanes, strict=True):
        for lane in held:
            colour = seen.get(kinds[span.key], OTHER)
            bars[lane, colour].append(
                (span.start_s / scale_s, (span.end_s - span.start_s) / scale_s)
            )
    for (lane, colour), pieces in sorted(bars.items()):
        axes.broken_barh(
            pieces, (at[lane] - 0.4, 0.8), facecolors=colour, edgecolors="white", linewidth=0.3
        )
    numbers = {
        name: place for place, name in enumerate(dict.fromkeys(name for name, _, _ in rows), 1)
    }
    axes.set_yticks(range(len(rows)), [_row_label(lane, numbers) for lane in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")


def _row_label(lane: Lane, numbers: Mapping[str, int]) -> str:
    name, gpu, number = lane
    return (
        f"{f'host {numbers[name]}, ' if len(numbers) > 1 else ''}{'GPU' if gpu else 'slot'} "
        f"{number}"
    )


def _areas(
    axes: Axes, trace: Trace, kinds: Mapping[str, str], seen: Mapping[str, str], scale_s: float
) -> None:
    """The number of busy GPUs over time, stacked by kind."""
    at_s = np.linspace(0.0, trace.makespan_s, 600)
    heights = []
    for kind in seen:
        own = [span for span in trace.spans if kinds[span.key] == kind]
        gpus = np.array([sum(span.hosts.values()) for span in own], dtype=float)
        height = np.zeros_like(at_s)
        for moments, sign in (
            (np.array([span.start_s for span in own]), 1.0),
            (np.array([span.end_s for span in own]), -1.0),
        ):
            order = np.argsort(moments)
            until = np.concatenate([[0.0], np.cumsum(gpus[order])])
            height += sign * until[np.searchsorted(moments[order], at_s, side="right")]
        heights.append(height)
    axes.stackplot(at_s / scale_s, heights, colors=[*seen.values()])
    axes.axhline(trace.capacity.gpus, color="0.35", linestyle=":", linewidth=1.0)
    axes.set_ylabel("GPUs at work")
