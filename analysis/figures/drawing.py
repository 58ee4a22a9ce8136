"""Shared by all figures: a palette for colour-blind readers, page sizes, error bars, saving.

Invariants: on one machine the same results give the same bytes (FreeType and zlib differ between
machines). No module of this folder imports pyplot, which would change global settings.
"""

import io
import itertools
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ebbline.analysis.results.wording import natural
from ebbline.tasks.files import write_whole
from ebbline.tasks.measuring.metrics import Metric

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)  # Okabe and Ito (2008)
MARKERS = ("o", "s", "^", "D", "v")
MOST_LOOKS = len(COLOURS) * len(MARKERS)  # more names than these cannot be told apart
MOST_INTERVALS = 500  # of more points, a figure draws the intervals of the most important alone

PAPER_FONTS = (
    "STIXGeneral",
    "DejaVu Sans",
)  # both paper templates use Times; DejaVu has the characters that STIX lacks
FINE_PT = 6.5  # the smallest font size in a paper's figure


@dataclass(frozen=True)
class Page:
    """The page that shows a figure.

    On paper the figure is `width` inches wide, and its font sizes are the printed ones. Without a
    width it has its own size, for a screen.
    """

    width: float | None = None
    text_pt: float = 9.0

    @property
    def narrow(self) -> bool:
        """Whether the figure is as wide as one column of two."""
        return self.width is not None and self.width < 4.0

    @property
    def marks(self) -> float:
        """The size of points and lines, relative to their size on a screen."""
        return 1.0 if self.width is None else 0.55 if self.narrow else 0.75

    def size(self, own: tuple[float, float], height: float) -> tuple[float, float]:
        """Width and height in inches: the figure's own, or the page's width and `height`."""
        return own if self.width is None else (self.width, height)

    @property
    def settings(self) -> dict[Any, Any]:
        if self.width is None:
            return {}
        fine = dict.fromkeys(
            ("xtick.labelsize", "ytick.labelsize", "legend.fontsize"),
            max(FINE_PT, self.text_pt - 1.0),
        )
        lines = {
            "axes.linewidth": 0.6,
            "xtick.major.width": 0.6,
            "ytick.major.width": 0.6,
            "xtick.major.size": 2.5,
            "ytick.major.size": 2.5,
        }
        return {
            "font.family": list(PAPER_FONTS),
            "font.size": self.text_pt,
            "axes.titlesize": self.text_pt,
            "axes.labelsize": self.text_pt,
            "legend.handlelength": 1.6,
            "legend.columnspacing": 1.2,
            "svg.fonttype": "path",
            **fine,
            **lines,
        }


SCREEN = Page()

_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # TrueType: journals do not accept Type 3
    "svg.hashsalt": "ebbline",
}


def style(page: Page = SCREEN) -> AbstractContextManager[None]:
    return matplotlib.rc_context({**_STYLE, **page.settings})


def looks(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Name -> (colour, marker), in natural order; MOST_LOOKS names differ, since the cycles have
    lengths 7 and 5.
    """
    pairs = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False)
    return dict(zip(sorted(set(names), key=natural), pairs, strict=False))


def error_bar(metric: Metric) -> tuple[list[float], list[float]]:
    """The lengths of the 95% interval below and above the value, for matplotlib's `errorbar`."""
    low, high = metric.interval
    return [max(0.0, metric.value - low)], [max(0.0, high - metric.value)]


def error_bars(metrics: Sequence[Metric]) -> tuple[list[float], list[float]]:
    """The same for several metrics."""
    found = [error_bar(metric) for metric in metrics]
    return [low for (low,), _ in found], [high for _, (high,) in found]


SEEDS = "a training seed"  # the legend's name of a small dot
SEEDS_NOTE = "Small dots: the value of each training seed, whose mean is the point."


def have_seeds(metrics: Iterable[Metric]) -> bool:
    """Whether any metric has the values of several seeds, so that a figure shows them."""
    return any(len(metric.seeds) > 1 for metric in metrics)


def seed_dots(
    axes: Axes,
    places: Iterable[tuple[Metric | float, Metric | float]],
    colour: str,
    marks: float,
    zorder: float = 2.5,
) -> None:
    """The value of each training seed as a small dot behind its mean. A place is (x, y), each a
    metric or a fixed number; one without several seeds has no dots. Where both are metrics, a fine
    line leads from the mean to each dot.
    """
    xs: list[float] = []
    ys: list[float] = []
    rays: tuple[list[float], list[float]] = [], []
    for place in places:
        counts = {len(each.seeds) for each in place if isinstance(each, Metric)}
        if len(counts) != 1 or (count := counts.pop()) < 2:
            continue
        for values, axis in zip((xs, ys), place, strict=True):
            values += axis.seeds if isinstance(axis, Metric) else [axis] * count
        for ray, axis in zip(rays, place, strict=True):
            if isinstance(axis, Metric):
                for value in axis.seeds:
                    ray += [axis.value, value, math.nan]
    if not xs:
        return
    if len(rays[0]) == len(rays[1]):
        axes.plot(*rays, color=colour, linewidth=0.5 * marks, alpha=0.35, zorder=zorder)
    axes.plot(
        xs,
        ys,
        linestyle="",
        marker="o",
        markersize=2.2 * marks,
        markeredgewidth=0,
        color=colour,
        alpha=0.6,
        zorder=zorder,
    )


def seed_sign(marks: float) -> Line2D:
    """The legend's entry of `seed_dots`."""
    return Line2D(
        [], [], color="0.35", marker="o", markersize=2.2 * marks, linestyle="", label=SEEDS
    )


def dots(
    axes: Axes, xs: Sequence[float], ys: Sequence[float], colour: str, marks: float, zorder: float
) -> None:
    """Many points without intervals: small transparent dots, one picture in a vector format."""
    axes.plot(
        xs,
        ys,
        linestyle="",
        marker="o",
        markersize=2.5 * marks,
        markeredgewidth=0,
        color=colour,
        alpha=0.3,
        rasterized=True,
        zorder=zorder,
    )


def lay_out(figure: Figure) -> None:
    """Place the parts of a figure once. Else matplotlib places and draws them anew for each format,
    which takes twice as long. Call it inside the figure's `style`.
    """
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine(None)


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """NAME.png (200 dpi) and NAME.pdf (fonts embedded as TrueType)."""
    return [save_png(figure, folder, name), save_pdf(figure, folder, name)]


def save_png(figure: Figure, folder: Path, name: str) -> Path:
    """NAME.png, 200 dpi."""
    with style():
        lay_out(figure)
        return write_whole(folder / f"{name}.png", lambda path: figure.savefig(path, dpi=200))


def save_pdf(figure: Figure, folder: Path, name: str) -> Path:
    """NAME.pdf, with fonts embedded as TrueType."""
    with style():
        lay_out(figure)
        return write_whole(
            folder / f"{name}.pdf",
            lambda path: figure.savefig(path, dpi=200, metadata={"CreationDate": None}),
        )


def save_for_print(figure: Figure, folder: Path, name: str, page: Page) -> list[Path]:
    """NAME.pdf (fonts embedded as TrueType), NAME.svg (text as paths) and NAME.png (300 dpi)."""
    with style(page):
        lay_out(figure)
        return [
            write_whole(
                folder / f"{name}.pdf",
                lambda path: figure.savefig(path, dpi=300, metadata={"CreationDate": None}),
            ),
            write_whole(
                folder / f"{name}.svg",
                lambda path: figure.savefig(path, dpi=300, metadata={"Date": None}),
            ),
            write_whole(folder / f"{name}.png", lambda path: figure.savefig(path, dpi=300)),
        ]


def save_svg(figure: Figure, folder: Path, name: str) -> Path:
    """NAME.svg with text as text."""
    return write_whole(folder / f"{name}.svg", lambda path: path.write_bytes(svg(figure)))


def svg(figure: Figure) -> bytes:
    with style():
        lay_out(figure)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", dpi=200, metadata={"Date": None})
    return drawn.getvalue()


def save_as(figure: Figure, path: Path) -> Path:
    """One file, in the format of its suffix: .png (200 dpi), .pdf or .svg."""
    dates = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
    with style():
        return write_whole(
            path, lambda fresh: figure.savefig(fresh, dpi=200, metadata=dates.get(path.suffix))
        )
