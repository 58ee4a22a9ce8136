"""A projection as figures: the value of each module by layer and type, and the share of modules
that each value of the knob projects. A module's value is between -1 and 1;
ebbline.tasks.defences.words names it.

Invariants: the colour of a cell depends only on the values, its dot only on which modules are
projected. A module without a value is hatched, never coloured. Shares are of all modules, with or
without a value, as everywhere in a study.
"""

import textwrap
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter

from ebbline.analysis.figures.drawing import COLOURS, style
from ebbline.analysis.results.wording import natural
from ebbline.tasks.defences import words
from ebbline.tasks.defences.gate import (
    ModuleRow,
    ProjectedRows,
    cosines_by_module,
    share_steps,
)
from ebbline.tasks.defences.safe_lora import SAFE_LORA

ATTENTION = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
COLOUR_MAP = "viridis"  # perceptually uniform: readable in grey and by colour-blind readers
NARROWEST_SCALE = 0.01  # the least range of values that the colours span
NAMED_CURVES = 7
DASHES: tuple[str | tuple[int, tuple[int, ...]], ...] = (
    "-",
    "--",
    "-.",
    (0, (7, 2, 1, 2, 1, 2)),
    (0, (10, 3)),
)
CELL_HEIGHT = 0.25  # inches
CELL_WIDTHS = (0.105, 0.45)  # inches, narrowest and widest
NO_LAYER_GAP = 0.5  # columns between the last layer and the modules outside all layers


Projections = Mapping[str, Mapping[str, ProjectedRows]]
"""Model -> label of an adapter -> its projection; the map shows the first adapter."""


@dataclass(frozen=True)
class Cell:
    """The modules of one type in one layer: one module, or one for each expert."""

    value: float | None  # the mean over the modules with a value
    projected_part: float
    without_value: int


def depth_and_type(module: str) -> tuple[int | None, str]:
    """The first whole number in a module's name, and the rest of the name after it.

    In the rest each number is `*`.
    "model.layers.3.self_attn.q_proj" -> (3, "self_attn.q_proj"); "lm_head" -> (None, "lm_head").
    Where nothing follows the number, the type is the name before it.
    """
    parts = module.split(".")
    at = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    if at is None:
        return None, module
    following = ["*" if part.isdecimal() else part for part in parts[at + 1 :]]
    return int(parts[at]), ".".join(following or parts[:at])


def cosine_map(rows: Mapping[str, ModuleRow], projected: Collection[str], title: str) -> Figure:
    """A cell for each layer and module type, coloured by value, with a dot if it is projected.

    For a cell of several modules, such as experts, the colour is their mean and the dot's area
    their projected share. Raises ValueError without modules, or when a projected module is not in
    `rows`.
    """
    cells, types = _cells(rows, projected, title), _types(rows)
    centres, edges = _columns([depth for depth, _ in cells])
    label_width = 0.07 * max(map(len, types)) + 0.3
    cell_width = float(np.clip(6.4 / (edges[-1] - edges[0]), *CELL_WIDTHS))
    width = max(4.2, label_width + cell_width * (edges[-1] - edges[0]) + 1.0)
    headline = textwrap.wrap(title, int(13 * width)) or [""]
    with style():
        figure = Figure(
            figsize=(width, CELL_HEIGHT * len(types) + 1.3 + 0.16 * len(headline)),
            layout="constrained",
        )
        axes = figure.subplots()
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=8)
        _paint(axes, cells, types, centres, edges)
        _hatch(axes, cells, types, centres)
        _dot(axes, cells, types, centres, across=0.5 * 72 * min(cell_width, CELL_HEIGHT))
        axes.set_yticks(range(len(types)), [_plain(kind) for kind in types])
        axes.set_ylim(len(types) - 0.5, -0.5)
        axes.set_xlim(edges[0], edges[-1])
        _layer_ticks(axes, centres, cell_width)
        figure.suptitle(_plain("\n".join(headline)), fontsize=9.5, x=0.01, ha="left")
        figure.legend(
            handles=_handles(rows, projected, cells.values()),
            loc="outside lower left",
            ncols=2 if width > 6 else 1,
            fontsize=8,
        )
    return figure


def share_figure(
    curves: Mapping[str, Mapping[str, ModuleRow]], thresholds: Sequence[float] = ()
) -> Figure:
    """The share of modules that a value of the knob projects, as a step curve for each adapter.

    Dotted lines are the values used. The curve is right-continuous: it includes a module at exactly
    its value. Raises ValueError without adapters or modules.
    """
    if not curves:
        raise ValueError("no adapter is given, so there is no share of projected modules to draw")
    for label, rows in curves.items():
        if not rows:
            raise ValueError(
                f"{label} has no module, so there is no share of projected modules to draw"
            )
    left, right = _span(
        [value for rows in curves.values() for value in cosines_by_module(rows).values()],
        thresholds,
    )
    named = len(curves) <= NAMED_CURVES
    with style():
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        for number, (label, rows) in enumerate(curves.items()):
            steps = share_steps(rows)
            shares = [0.0, *(share for _, share in steps)]
            (curve,) = axes.plot(
                [left, *(value for value, _ in steps), right],
                [*shares, shares[-1]],
                drawstyle="steps-post",
                label=_plain(label),
            )
            if named:
                curve.set(
                    color=COLOURS[number], linestyle=DASHES[number % len(DASHES)], linewidth=1.4
                )
            else:
                curve.set(color=COLOURS[0], linewidth=0.6, alpha=0.5)
        for used_value in thresholds:
            axes.axvline(used_value, color="0.35", linestyle=":", linewidth=1.2)
        axes.set_xlim(left, right)
        axes.set_ylim(-0.02, 1.02)
        axes.xaxis.set_major_formatter(ScalarFormatter(useOffset=False))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel(SAFE_LORA.words.knob)
        axes.set_ylabel(words.SHARE_AXIS)
        handles = (
            axes.lines[: len(curves)]
            if named
            else [Line2D([], [], color=COLOURS[0], linewidth=0.6, label=f"{len(curves)} adapters")]
        )
        used = (
            [Line2D([], [], color="0.35", linestyle=":", label=words.KNOB_USED)]
            if thresholds
            else []
        )
        longest = max(len(str(line.get_label())) for line in handles)
        figure.legend(
            handles=[*handles, *used],
            loc="outside lower center",
            ncols=2 if longest < 45 else 1,
            fontsize=8,
        )
    return figure


def projection_figures(projections: Projections) -> dict[str, Figure]:
    """File name -> figure: `words.MAPS`-MODEL of the first adapter, `words.SHARES`-MODEL of all.

    A model without adapters has no figure.
    """
    figures: dict[str, Figure] = {}
    for model, adapters in projections.items():
        if adapters:
            label, first = next(iter(adapters.items()))
            figures[f"{words.MAPS}-{model}"] = cosine_map(
                first.rows, first.chosen, f"{model}, {label}"
            )
            figures[f"{words.SHARES}-{model}"] = share_figure(
                {name: adapter.rows for name, adapter in adapters.items()}
            )
    return figures


Cells = Mapping[tuple[int | None, str], Cell]
"""(Depth, type) -> its modules."""

Centres = Mapping[int | None, float]
"""Depth -> centre of its column; None is for modules outside all layers, right of a gap."""


def _cells(rows: Mapping[str, ModuleRow], projected: Collection[str], title: str) -> Cells:
    if not rows:
        raise ValueError(words.nothing_to_draw(title))
    if unknown := sorted(set(projected) - set(rows)):
        raise ValueError(
            f"{title}: {unknown[0]} is projected, but is not one of the {len(rows)} "
            "measured modules"
        )
    members: dict[tuple[int | None, str], list[str]] = defaultdict(list)
    for module in rows:
        members[depth_and_type(module)].append(module)
    found: dict[tuple[int | None, str], Cell] = {}
    known = cosines_by_module(rows)
    for at, modules in members.items():
        values = [known[module] for module in modules if module in known]
        share = sum(module in projected for module in modules) / len(modules)
        found[at] = Cell(fmean(values) if values else None, share, len(modules) - len(values))
    return found


def _types(modules: Collection[str]) -> list[str]:
    """The types from top to bottom: attention, MLP, other types, then types outside all layers.

    Attention and MLP are in the order of the data flow.
    """
    layered = {kind for depth, kind in map(depth_and_type, modules) if depth is not None}

    def order(kind: str) -> tuple[int, list[str | float], int]:
        parent, _, leaf = kind.rpartition(".")
        for place, leaves in enumerate((ATTENTION, MLP)):
            if leaf in leaves and kind in layered:
                return place, natural(parent), leaves.index(leaf)
        return (2 if kind in layered else 3), natural(kind), 0

    return sorted({depth_and_type(module)[1] for module in modules}, key=order)


def _columns(depths: Collection[int | None]) -> tuple[Centres, list[float]]:
    """The centre of each depth's column, from the first layer with a module to the last, and the
    edges of all columns.
    """
    layers = [depth for depth in depths if depth is not None]
    shown = range(min(layers), max(layers) + 1) if layers else range(0)
    centres: dict[int | None, float] = {depth: float(depth) for depth in shown}
    edges = [shown.start - 0.5, *(depth + 0.5 for depth in shown)]
    if None in depths:
        if layers:
            edges.append(edges[-1] + NO_LAYER_GAP)
        centres[None] = edges[-1] + 0.5
        edges.append(edges[-1] + 1.0)
    return centres, edges


def _paint(
    axes: Axes, cells: Cells, types: Sequence[str], centres: Centres, edges: Sequence[float]
) -> None:
    values = {at: cell.value for at, cell in cells.items() if cell.value is not None}
    if not values:
        return
    painted = np.full((len(types), len(edges) - 1), np.nan)  # blank
    for (depth, kind), value in values.items():
        painted[types.index(kind), int(np.searchsorted(edges, centres[depth])) - 1] = value
    low, high = min(values.values()), max(values.values())
    if high - low < NARROWEST_SCALE:
        low, high = (low + high - NARROWEST_SCALE) / 2, (low + high + NARROWEST_SCALE) / 2
    levels = np.arange(len(types) + 1) - 0.5
    mesh = axes.pcolormesh(
        edges,
        levels,
        painted,
        cmap=COLOUR_MAP,
        norm=Normalize(low, high),
        edgecolors="white",
        linewidth=0.5,
    )
    number = ScalarFormatter(useOffset=False)
    bar = axes.figure.colorbar(
        mesh, ax=axes, pad=0.02, aspect=14, ticks=MaxNLocator(min(5, len(types) + 1)), format=number
    )
    bar.set_label(words.QUANTITY, fontsize=8)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def _hatch(axes: Axes, cells: Cells, types: Sequence[str], centres: Centres) -> None:
    """Hatch each cell with a module that has no value; on grey if none of its modules has one."""
    for (depth, kind), cell in cells.items():
        if cell.without_value:
            corner = (centres[depth] - 0.5, types.index(kind) - 0.5)
            face = "0.92" if cell.value is None else "none"
            axes.add_patch(
                Rectangle(
                    corner, 1, 1, facecolor=face, edgecolor="0.35", hatch="/////", linewidth=0.5
                )
            )


def _dot(axes: Axes, cells: Cells, types: Sequence[str], centres: Centres, across: float) -> None:
    """Draw the dots; `across` is the diameter in points where all modules are projected."""
    dotted = [at for at, cell in cells.items() if cell.projected_part > 0]
    axes.scatter(
        [centres[depth] for depth, _ in dotted],
        [types.index(kind) for _, kind in dotted],
        s=[max(1.5, across**2 * cells[at].projected_part) for at in dotted],
        facecolor="white",
        edgecolor="black",
        linewidth=min(0.8, across / 6),
        zorder=3,
    )


def _layer_ticks(axes: Axes, centres: Centres, cell_width: float) -> None:
    """Ticks at as many round layer numbers as are readable, and "no layer" for other modules."""
    layers = [depth for depth in centres if depth is not None]
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 10**9) if step * cell_width >= 0.24)
    ticks = [depth for depth in layers if depth % step == 0] or layers[:1]
    places, labels = [centres[depth] for depth in ticks], [str(depth) for depth in ticks]
    if None in centres:
        clear = [depth for depth in ticks if (centres[None] - centres[depth]) * cell_width >= 0.4]
        places, labels = (
            [*(centres[depth] for depth in clear), centres[None]],
            [*map(str, clear), "no\nlayer"],
        )
    axes.set_xticks(places, labels)
    axes.set_xlabel("layer" if layers else "", fontsize=8, labelpad=-6 if None in centres else 3)


def _handles(
    rows: Mapping[str, ModuleRow], projected: Collection[str], cells: Collection[Cell]
) -> list[Line2D | Patch]:
    """The legend for dots and hatching, with counts: a map without dots shows a count of 0."""
    area = (
        "; area: share of the cell's modules"
        if any(0 < cell.projected_part < 1 for cell in cells)
        else ""
    )
    label = f"projected: {len(set(projected))} of {len(rows)} modules{area}"
    dot = Line2D(
        [],
        [],
        linestyle="",
        marker="o",
        markersize=5,
        markerfacecolor="white",
        markeredgecolor="black",
        label=label,
    )
    lacking = len(rows) - len(cosines_by_module(rows))
    hatched = Patch(
        facecolor="0.92",
        edgecolor="0.35",
        hatch="/////",
        linewidth=0.5,
        label=words.lacking_label(lacking),
    )
    return [dot, *([hatched] if lacking else [])]


def _span(values: Sequence[float], thresholds: Sequence[float]) -> tuple[float, float]:
    """The range of the measured and used values, with a margin; -1 to 1 without values."""
    low, high = (
        min([*values, *thresholds], default=-1.0),
        max([*values, *thresholds], default=1.0),
    )
    margin = max(0.04 * (high - low), NARROWEST_SCALE / 2)
    return low - margin, high + margin


def _plain(text: str) -> str:
    """Text that matplotlib shows literally.

    A `$` would begin a formula, and a legend omits labels that begin with an underscore.
    """
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")
