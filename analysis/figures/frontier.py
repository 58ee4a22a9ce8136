"""The frontier as a figure: every measurement with its 95% Wilson interval.

Invariants: a model has one colour and one marker. A filled mark is defended, a hollow one is not.
A ring is round the point that `ebbline pick` chose. No point is moved; points that overlap are
transparent. Of more than MOST_INTERVALS points, those on a frontier and the picked ones have their
intervals, and the others are dots.
"""

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from ebbline.analysis.figures.drawing import (
    MOST_INTERVALS,
    SCREEN,
    SEEDS_NOTE,
    Page,
    dots,
    error_bar,
    error_bars,
    have_seeds,
    looks,
    seed_dots,
    seed_sign,
    style,
)
from ebbline.analysis.results.frontier import finished, frontier
from ebbline.analysis.results.measurements import Baselines, is_defended
from ebbline.analysis.results.wording import directed_label
from ebbline.sweeps.study.points import Result
from ebbline.tasks.measuring.metrics import Metric, direction

RING = 13.0  # the diameter of a picked point's ring, in points
_NO_BASELINES: Baselines = MappingProxyType({})


def frontier_figure(
    results: Sequence[Result],
    objectives: Sequence[str],
    baselines: Baselines = _NO_BASELINES,
    page: Page = SCREEN,
    picked: Sequence[Result] = (),
) -> Figure:
    """The finished points over the first two objectives, each model's frontier and aligned model.
    The `picked` points have a ring.

    With one objective the points are drawn over their numbers. With three or more, a title says
    which two are drawn.
    """
    done, drawn = finished(results), objectives[:2]
    appearance = looks([*(result.point.model for result in done), *baselines])
    with style(page):
        figure = Figure(
            figsize=page.size((6.4, 4.8), 2.95 if page.narrow else 3.4), layout="constrained"
        )
        axes = figure.subplots()
        own_picked = {result.number for result in picked}
        for model, (colour, marker) in appearance.items():
            own = [result for result in done if result.point.model == model]
            chosen = frontier(own, drawn)
            important = own_picked | _distinct_numbers(chosen, drawn)
            shown = important if len(done) > MOST_INTERVALS else None
            _points(axes, own, drawn, (colour, marker), page.marks, shown)
            _frontier_line(axes, chosen, drawn, colour, page.marks)
            _aligned(axes, baselines.get(model, {}), drawn, colour, page.marks)
        for result in picked:
            _ring(axes, result, drawn, page.marks)
        axes.set_ylabel(directed_label(drawn[-1]))
        axes.set_xlabel(directed_label(drawn[0]) if len(drawn) == 2 else "point number")
        for axis in (axes.xaxis, axes.yaxis) if len(drawn) == 2 else (axes.yaxis,):
            axis.set_major_formatter(PercentFormatter(1.0))
        if len(objectives) > 2:
            note = (
                f"Drawn: the first 2 of {len(objectives)} objectives. Lines: each model's "
                "frontier over these two."
            )
            axes.set_title(note, fontsize=min(8.0, page.text_pt - 1), loc="left", wrap=page.narrow)
        if not done:
            axes.text(
                0.5,
                0.5,
                "no point has finished",
                ha="center",
                va="center",
                transform=axes.transAxes,
            )
        figure.legend(
            handles=[
                *_legend(appearance, drawn, baselines, page, bool(picked)),
                *([seed_sign(page.marks)] if _seeds_shown(done, drawn) else []),
            ],
            loc="outside lower center",
            ncols=2 if page.narrow else 3,
        )
    return figure


def frontier_caption(results: Sequence[Result], picked: Sequence[Result] = ()) -> str:
    count = len(finished(results))
    intervals = (
        "Every finished point with its 95% Wilson intervals. Filled: defended; hollow: not."
        if count <= MOST_INTERVALS
        else f"Every finished point. With {count} of them, the points of the frontiers have their "
        "95% Wilson intervals (filled: defended; hollow: not), and the others are dots; "
        "results.csv has all intervals."
    )
    shown = have_seeds(metric for r in finished(results) for metric in r.metrics.values())
    seeds = f" {SEEDS_NOTE}" if shown else ""
    ring = " A ring marks the point that `ebbline pick` chose." if picked else ""
    return (
        f"{intervals} The steps are each model's frontier, the stars its aligned model before "
        f"fine-tuning.{ring}{seeds}"
    )


def _seeds_shown(done: Sequence[Result], drawn: Sequence[str]) -> bool:
    return have_seeds(result.metrics[name] for result in done for name in drawn)


def _distinct_numbers(chosen: Sequence[Result], drawn: Sequence[str]) -> set[int]:
    """The numbers of the results without those that lie on another, at most MOST_INTERVALS."""
    first = {tuple(r.metrics[name].value for name in drawn): r.number for r in reversed(chosen)}
    return set(sorted(first.values())[:MOST_INTERVALS])


def _points(
    axes: Axes,
    own: Sequence[Result],
    drawn: Sequence[str],
    look: tuple[str, str],
    marks: float,
    important: Collection[int] | None = None,
) -> None:
    """The results with their intervals; without them if their numbers are not among the
    `important`, where these are given.
    """
    colour, marker = look

    def places(results: Sequence[Result]) -> tuple[list[float], list[float]]:
        xs = [r.metrics[drawn[0]].value if len(drawn) == 2 else float(r.number) for r in results]
        return xs, [r.metrics[drawn[-1]].value for r in results]

    plain = [r for r in own if important is not None and r.number not in important]
    if plain:
        dots(axes, *places(plain), colour, marks, zorder=1.5)
    left_out = {result.number for result in plain}
    for defended in (False, True):
        group = [r for r in own if is_defended(r) is defended and r.number not in left_out]
        if group:
            seed_dots(axes, [_place(result, drawn) for result in group], colour, marks)
            axes.errorbar(
                *places(group),
                xerr=error_bars([r.metrics[drawn[0]] for r in group]) if len(drawn) == 2 else None,
                yerr=error_bars([r.metrics[drawn[-1]] for r in group]),
                linestyle="",
                color=colour,
                marker=marker,
                markersize=5.5 * marks,
                markerfacecolor=colour if defended else "white",
                elinewidth=0.7 * marks,
                alpha=0.65,
                zorder=3,
            )


def _place(result: Result, drawn: Sequence[str]) -> tuple[Metric | float, Metric]:
    """Where a result is drawn; over its number with one objective."""
    across = result.metrics[drawn[0]] if len(drawn) == 2 else float(result.number)
    return across, result.metrics[drawn[-1]]


def _ring(axes: Axes, result: Result, drawn: Sequence[str], marks: float) -> None:
    metrics = [result.metrics[name] for name in drawn]
    axes.plot(
        metrics[0].value if len(drawn) == 2 else result.number,
        metrics[-1].value,
        marker="o",
        markersize=RING * marks,
        markerfacecolor="none",
        markeredgecolor="black",
        markeredgewidth=1.2 * marks,
        zorder=5,
    )


def _frontier_line(
    axes: Axes, chosen: Sequence[Result], drawn: Sequence[str], colour: str, marks: float
) -> None:
    """The border of the dominated area: steps over two objectives, a horizontal line over one."""
    values = sorted([result.metrics[name].value for name in drawn] for result in chosen)
    if values and len(drawn) == 1:
        axes.axhline(values[0][0], color=colour, linewidth=1.4 * marks, zorder=2)
    elif values:
        steps = "steps-pre" if direction(drawn[0]) == "maximise" else "steps-post"
        xs, ys = zip(*values, strict=True)
        axes.plot(xs, ys, color=colour, drawstyle=steps, linewidth=1.4 * marks, zorder=2)


def _aligned(
    axes: Axes, baseline: Mapping[str, Metric], drawn: Sequence[str], colour: str, marks: float
) -> None:
    if any(name not in baseline for name in drawn):
        return
    metrics = [baseline[name] for name in drawn]
    if len(drawn) == 1:
        axes.axhline(metrics[0].value, color=colour, linewidth=1.0 * marks, linestyle=":", zorder=4)
        return
    axes.errorbar(
        metrics[0].value,
        metrics[1].value,
        xerr=error_bar(metrics[0]),
        yerr=error_bar(metrics[1]),
        color=colour,
        marker="*",
        markersize=13 * marks,
        markeredgecolor="black",
        markeredgewidth=0.6 * marks,
        elinewidth=0.7 * marks,
        zorder=4,
    )


def _legend(
    appearance: Mapping[str, tuple[str, str]],
    drawn: Sequence[str],
    baselines: Baselines,
    page: Page,
    picked: bool,
) -> list[Line2D]:
    def sign(label: str, marker: str, face: str = "0.35", size: float = 6.0) -> Line2D:
        return Line2D(
            [],
            [],
            color="0.35",
            marker=marker,
            linestyle="",
            markerfacecolor=face,
            markersize=size * page.marks,
            label=label,
        )

    models = [
        Line2D(
            [],
            [],
            color=colour,
            marker=marker,
            markersize=6.0 * page.marks,
            linewidth=1.4 * page.marks,
            label=f"{model} and its frontier",
        )
        for model, (colour, marker) in appearance.items()
    ]
    signs = [sign("defended", "o"), sign("not defended", "o", face="white")]
    if baselines:
        aligned = "aligned, not fine-tuned" if page.narrow else "aligned model, before fine-tuning"
        dotted = Line2D([], [], color="0.35", linestyle=":", label=aligned)
        signs.append(sign(aligned, "*", size=11.0) if len(drawn) == 2 else dotted)
    if picked:
        ring = sign("picked", "o", face="none", size=RING)
        ring.set_markeredgecolor("black")
        signs.append(ring)
    return models + signs


def draw_frontier(
    axes: Axes, own: Sequence[Result], drawn: Sequence[str], colour: str, marker: str
) -> None:
    """Draw finished results with their 95% intervals and their frontier on the given axes."""
    chosen = frontier(own, drawn)
    important = _distinct_numbers(chosen, drawn) if len(own) > MOST_INTERVALS else None
    _points(axes, own, drawn, (colour, marker), SCREEN.marks, important)
    _frontier_line(axes, chosen, drawn, colour, SCREEN.marks)
