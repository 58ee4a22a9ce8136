"""Figures and report of a projection, read back from matplotlib's objects and from the page."""

import base64
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ebbline.analysis.figures.drawing import save, svg
from ebbline.analysis.figures.projection import (
    cosine_map,
    depth_and_type,
    projection_figures,
    share_figure,
)
from ebbline.analysis.report.projection_report import MOST_MAPS, write_projection_report
from ebbline.tasks.defences.gate import ModuleRow, ProjectedRows, chosen
from tests.analysis.page import Page

LLAMA = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
NO_COSINE = ModuleRow(None, None, "the update is zero")


def llama(layers: int, seed: int = 0, outside: Sequence[str] = ()) -> dict[str, ModuleRow]:
    """Synthetic cosines for every module of a model, in random order."""
    chance = random.Random(seed)
    names = [
        *(f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in LLAMA),
        *outside,
    ]
    chance.shuffle(names)
    return {name: ModuleRow(chance.uniform(0.1, 0.7), chance.uniform(0.1, 0.7)) for name in names}


def projected(layers: int = 2, threshold: float | None = 0.3, seed: int = 0) -> ProjectedRows:
    rows = llama(layers, seed)
    return ProjectedRows(rows, chosen(rows, threshold, None))


def types(figure: Figure) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def dots(figure: Figure) -> dict[tuple[float, str], float]:
    """(Layer, type) -> area of each dot."""
    (found,) = (drawn for drawn in figure.axes[0].collections if isinstance(drawn, PathCollection))
    places = np.asarray(found.get_offsets(), dtype=np.float64)
    return {
        (float(x), types(figure)[int(y)]): float(area)
        for (x, y), area in zip(places, found.get_sizes(), strict=True)
    }


def colours(figure: Figure) -> dict[tuple[float, str], float]:
    """(Middle of the column, type) -> the cosine of the cell's colour."""
    (mesh,) = (drawn for drawn in figure.axes[0].collections if isinstance(drawn, QuadMesh))
    corners = np.asarray(mesh.get_coordinates(), dtype=np.float64)
    values = np.asarray(
        np.ma.asarray(mesh.get_array()).tolist(), dtype=np.float64
    )  # blank cells become nan
    middles = (corners[0, 1:, 0] + corners[0, :-1, 0]) / 2
    cells = {
        (float(x), kind): values[row, column]
        for row, kind in enumerate(types(figure))
        for column, x in enumerate(middles)
    }
    return {at: float(value) for at, value in cells.items() if not np.isnan(value)}


def hatched(figure: Figure) -> dict[tuple[float, str], bool]:
    """(Layer, type) of each hatched cell -> whether it is grey, without a colour."""
    cells = [
        patch
        for patch in figure.axes[0].patches
        if isinstance(patch, Rectangle) and patch.get_hatch()
    ]
    return {
        (cell.get_x() + 0.5, types(figure)[int(cell.get_y() + 0.5)]): to_rgba(cell.get_facecolor())[
            3
        ]
        > 0
        for cell in cells
    }


def curve(figure: Figure, number: int = 0) -> list[tuple[float, float]]:
    line = figure.axes[0].lines[number]
    assert line.get_drawstyle() == "steps-post"
    return [(float(x), float(y)) for x, y in np.asarray(line.get_xydata(), dtype=np.float64)]


def share_at(drawn: Sequence[tuple[float, float]], threshold: float) -> float:
    """The value of a right-continuous step curve at a threshold."""
    return [y for x, y in drawn if x <= threshold][-1]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", (3, "self_attn.q_proj")),
        ("base_model.model.model.layers.31.mlp.down_proj", (31, "mlp.down_proj")),
        ("transformer.h.3.attn.c_attn", (3, "attn.c_attn")),
        ("model.layers.0.mlp.experts.5.w1", (0, "mlp.experts.*.w1")),
        ("lm_head", (None, "lm_head")),
        ("model.embed_tokens2", (None, "model.embed_tokens2")),
        ("classifier.0", (0, "classifier")),
    ],
)
def test_a_modules_name_gives_its_depth_and_type(
    module: str, expected: tuple[int | None, str]
) -> None:
    assert depth_and_type(module) == expected


def test_types_are_in_the_order_of_the_data_flow() -> None:
    rows = llama(2, outside=("lm_head", "model.layers.0.adapter10", "model.layers.0.adapter9"))
    assert types(cosine_map(rows, [], "small")) == [*LLAMA, "adapter9", "adapter10", "lm_head"]


@pytest.mark.parametrize("layers", [2, 32, 80])
def test_each_cell_has_its_modules_cosine(layers: int) -> None:
    rows = llama(layers)
    expected = {
        (float(depth or 0), kind): row.cosine
        for module, row in rows.items()
        for depth, kind in [depth_and_type(module)]
    }
    assert colours(cosine_map(rows, [], "small")) == expected


def test_projected_modules_have_a_dot_and_no_others() -> None:
    rows = llama(4, outside=("lm_head",))
    projected_modules = [*chosen(rows, 0.3, None) - {"lm_head"}]
    figure = cosine_map(rows, projected_modules, "small")
    assert set(dots(figure)) == {depth_and_type(module) for module in projected_modules}
    assert f"projected: {len(projected_modules)} of 29 modules" in legend(figure)


def test_the_legend_of_a_map_without_dots_has_a_count_of_zero() -> None:
    figure = cosine_map(llama(2), [], "small")
    assert dots(figure) == {}
    assert legend(figure) == ["projected: 0 of 14 modules"]


def test_modules_without_a_cosine_are_hatched_and_not_coloured() -> None:
    rows = {**llama(2), "model.layers.1.mlp.up_proj": NO_COSINE}
    figure = cosine_map(rows, [], "small")
    assert hatched(figure) == {(1.0, "mlp.up_proj"): True}
    assert (1.0, "mlp.up_proj") not in colours(figure)
    assert "without a cosine: 1" in legend(figure)


def test_without_any_cosine_all_is_hatched_and_there_is_no_colour_bar() -> None:
    figure = cosine_map(dict.fromkeys(llama(2), NO_COSINE), [], "small")
    assert len(hatched(figure)) == 14
    assert len(figure.axes) == 1


def test_experts_share_a_cell_with_their_mean_and_a_dot_of_the_share_projected() -> None:
    experts = [f"model.layers.0.mlp.experts.{number}.w1" for number in range(4)]
    rows = {
        name: ModuleRow(cosine, 0.5)
        for name, cosine in zip(experts, (0.1, 0.2, 0.6, None), strict=True)
    } | {"model.layers.0.self_attn.q_proj": ModuleRow(0.2, 0.5)}
    figure = cosine_map(rows, [experts[0], "model.layers.0.self_attn.q_proj"], "small")
    cell = (0.0, "mlp.experts.*.w1")
    assert colours(figure)[cell] == pytest.approx(0.3)
    assert dots(figure)[cell] == pytest.approx(dots(figure)[0.0, "self_attn.q_proj"] / 4)
    assert hatched(figure) == {cell: False}


def test_layers_between_without_a_module_stay_blank() -> None:
    rows = {f"model.layers.{layer}.mlp.up_proj": ModuleRow(0.5, 0.5) for layer in (8, 11)}
    figure = cosine_map(rows, [], "small")
    assert figure.axes[0].get_xlim() == (7.5, 11.5)
    assert set(colours(figure)) == {(8.0, "mlp.up_proj"), (11.0, "mlp.up_proj")}


def test_modules_outside_all_layers_are_right_of_all_layers() -> None:
    figure = cosine_map(llama(3, outside=("lm_head",)), ["lm_head"], "small")
    (place,) = dots(figure)
    assert place[0] > 2.5
    assert place in colours(figure)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [
        "0",
        "1",
        "2",
        "no\nlayer",
    ]
    alone = cosine_map({"lm_head": ModuleRow(0.5, 0.5)}, [], "small")
    assert [label.get_text() for label in alone.axes[0].get_xticklabels()] == ["no\nlayer"]


def test_almost_equal_cosines_do_not_fill_the_colour_scale() -> None:
    rows = {
        f"model.layers.{layer}.mlp.up_proj": ModuleRow(0.5 + layer * 1e-9, 0.5)
        for layer in range(3)
    }
    (mesh,) = (
        drawn
        for drawn in cosine_map(rows, [], "small").axes[0].collections
        if isinstance(drawn, QuadMesh)
    )
    assert mesh.norm.vmin == pytest.approx(0.495)
    assert mesh.norm.vmax == pytest.approx(0.505)


@pytest.mark.parametrize("layers", [2, 32, 80])
def test_no_text_of_a_map_is_cut_or_overlaps_another(layers: int) -> None:
    title = (
        "small, point 12 (rank=8 size=100 seed=0 threshold=0.3): a title that goes on for a "
        "good while"
    )
    figure = cosine_map(
        {**llama(layers, outside=("lm_head",)), "model.layers.1.mlp.up_proj": NO_COSINE}, [], title
    )
    svg(figure)  # lays it out
    axes = figure.axes[0]
    for labels in (
        axes.get_xticklabels(),
        axes.get_yticklabels(),
        [axes.xaxis.label],
        figure.legends[0].get_texts(),
        figure.texts,
    ):
        boxes = [label.get_window_extent() for label in labels]
        assert all(
            box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
            for box in boxes
        )
        assert not any(one.overlaps(other) for at, one in enumerate(boxes) for other in boxes[:at])


def test_the_share_at_exactly_a_cosine_includes_its_module() -> None:
    rows = {
        "a": ModuleRow(0.2, 1.0),
        "b": ModuleRow(0.5, 1.0),
        "c": ModuleRow(0.5, 1.0),
        "d": NO_COSINE,
    }
    drawn = curve(share_figure({"adapter": rows}))
    assert [share_at(drawn, at) for at in (0.19, 0.2, 0.4999, 0.5, 0.51)] == [
        0,
        0.25,
        0.25,
        0.75,
        0.75,
    ]


def test_the_share_curve_equals_the_gate() -> None:
    rows = llama(32)
    drawn = curve(share_figure({"adapter": rows}))
    for threshold in (
        0.11,
        0.3,
        0.456,
        0.69,
        *(row.cosine for row in rows.values() if row.cosine is not None),
    ):
        assert share_at(drawn, threshold) == len(chosen(rows, threshold, None)) / len(rows)


def test_used_thresholds_are_dotted_and_within_view() -> None:
    figure = share_figure({"adapter": llama(2)}, [0.3, 0.95])
    dotted = [line for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert [float(np.asarray(line.get_xdata(), dtype=np.float64)[0]) for line in dotted] == [
        0.3,
        0.95,
    ]
    assert figure.axes[0].get_xlim()[1] > 0.95
    assert legend(figure) == ["adapter", "threshold used"]


def test_few_adapters_are_named_and_many_are_counted() -> None:
    few = share_figure({f"rank={rank}": llama(2, seed=rank) for rank in range(7)})
    assert legend(few) == [f"rank={rank}" for rank in range(7)]
    assert len({(line.get_color(), line.get_linestyle()) for line in few.axes[0].lines}) == 7
    many = share_figure({f"rank={rank}": llama(2, seed=rank) for rank in range(8)})
    assert legend(many) == ["8 adapters"]
    assert len(many.axes[0].lines) == 8


def test_a_name_is_neither_a_formula_nor_left_out() -> None:
    figure = share_figure({"_$x": llama(2), "a_$\\frac$": llama(2)})
    svg(figure)
    assert [text.strip() for text in legend(figure)] == ["_\\$x", "a_\\$\\frac\\$"]
    svg(cosine_map({"$a$.0.b$c": ModuleRow(0.1, 0.1)}, [], "$\\nothing$"))


def test_an_adapter_without_cosines_is_never_projected() -> None:
    assert {
        share for _, share in curve(share_figure({"adapter": dict.fromkeys(llama(2), NO_COSINE)}))
    } == {0.0}


def test_nothing_to_draw_is_an_error_that_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rank=8: there is no module"):
        cosine_map({}, [], "rank=8")
    with pytest.raises(ValueError, match="no adapter is given"):
        share_figure({})
    with pytest.raises(ValueError, match="rank=4 has no module"):
        share_figure({"rank=8": llama(2), "rank=4": {}})
    with pytest.raises(ValueError, match="no adapter is given"):
        write_projection_report(tmp_path / "projection.html", {}, {}, [])
    assert list(tmp_path.iterdir()) == []


def test_a_projected_module_that_was_not_measured_is_an_error() -> None:
    with pytest.raises(
        ValueError, match="elsewhere is projected, but is not one of the 14 measured"
    ):
        cosine_map(llama(2), ["elsewhere"], "small")


@pytest.mark.slow
def test_the_same_rows_give_the_same_files(tmp_path: Path) -> None:
    def files(folder: Path) -> list[bytes]:
        rows = {**llama(3), "lm_head": NO_COSINE}
        both = (
            cosine_map(rows, chosen(rows, 0.3, None), "small"),
            share_figure({"a": rows, "b": llama(2)}, [0.3]),
        )
        return [
            path.read_bytes()
            for number, figure in enumerate(both)
            for path in save(figure, folder, str(number))
        ] + [*map(svg, both)]

    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_each_model_has_a_map_of_its_first_adapter_and_the_shares_of_all() -> None:
    figures = projection_figures(
        {
            "7b": {"point 3": projected(4), "point 1": projected(3)},
            "13b": {"point 2": projected(5)},
            "70b": {},
        }
    )
    assert list(figures) == [
        "cosines-7b",
        "projected-share-7b",
        "cosines-13b",
        "projected-share-13b",
    ]
    assert figures["cosines-7b"].get_suptitle() == "7b, point 3"
    assert figures["cosines-7b"].axes[0].get_xlim() == (-0.5, 3.5)
    assert legend(figures["projected-share-7b"]) == ["point 3", "point 1"]


@pytest.mark.process
def test_importing_the_figures_loads_no_torch() -> None:
    code = (
        "import sys, ebbline.analysis.report.projection_report; assert not "
        "{'matplotlib.pyplot', 'torch', 'ray', 'wandb'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_projection_report_is_one_file_that_loads_nothing_else(tmp_path: Path) -> None:
    rows = {
        **projected().rows,
        "lm_head": ModuleRow(None, None, "not in /home/someone/base/model.safetensors"),
    }
    adapter = ProjectedRows(rows, chosen(rows, 0.3, None))
    settings = {
        "projector": "approximate",
        "rule": "cosine <= 0.3",
        "base": "/models/base",
        "energy": None,
    }
    notes = ["seen in /tmp/x/adapter_config.json"]
    written = write_projection_report(
        tmp_path / "p.html", {"/runs/one/adapter/": adapter}, settings, notes
    )
    assert list(written) == ["report", "cosines.png", "cosines.pdf", "share.png", "share.pdf"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "p.html",
        "p-cosines.png",
        "p-cosines.pdf",
        "p-share.png",
        "p-share.pdf",
    }
    assert set(written.values()) == set(tmp_path.iterdir())
    text = written["report"].read_text("utf-8")
    page = Page(text)
    assert page.open == []
    assert len(page.links) == 2
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.links)
    assert all(page.alts)
    for foreign in ("url(", "<script", "@import", "/home/someone", "/tmp/", "/runs/"):
        assert foreign not in text
    drawings = b"".join(base64.b64decode(source.partition(",")[2]) for source in page.links)
    assert not re.search(rb'href="(?!#|data:)', drawings)
    assert b"/runs/" not in drawings
    for expected in (
        "<td>/models/base</td>",
        "<td>none</td>",
        f"adapter: {len(adapter.chosen)} of 15 modules projected",
        "One has no cosine.",
        "no cosine: not in model.safetensors",
        "seen in adapter_config.json",
        "prefers-color-scheme: dark",
    ):
        assert expected in text


def test_every_module_has_a_row_with_its_outcome(tmp_path: Path) -> None:
    adapter = projected(32)
    text = write_projection_report(tmp_path / "p.html", {"adapter": adapter}, {}, [])[
        "report"
    ].read_text("utf-8")
    for module, row in adapter.rows.items():
        outcome = "projected" if module in adapter.chosen else "not projected"
        assert (
            "<tr><th "
            f'scope="row">{module}</th><td>{row.cosine:.4f}</td><td>{row.norm_ratio:.4f}</td><td>{outcome}</td></tr>'
            in text
        )
    assert text.index("layers.9.self_attn.q_proj") < text.index("layers.10.self_attn.q_proj")
    assert 'role="note"' not in text


def test_names_and_notes_are_escaped(tmp_path: Path) -> None:
    rows = {"<b>.0.<script>": ModuleRow(0.1, 0.1), "x": ModuleRow(None, None, "<i>")}
    adapters = {"<u>": ProjectedRows(rows, frozenset())}
    text = write_projection_report(tmp_path / "p.html", adapters, {"<s>": "<em>"}, ["<q>"])[
        "report"
    ].read_text("utf-8")
    assert Page(text).open == []
    assert not re.search("<(b|script|i|u|s|em|q)>", text)
    assert "&lt;b&gt;.0.&lt;script&gt;" in text


@pytest.mark.slow
def test_maps_of_the_first_adapters_are_drawn_and_the_others_counted(tmp_path: Path) -> None:
    adapters = {
        f"/runs/{number}/adapter": projected(seed=number) for number in range(MOST_MAPS + 2)
    }
    written = write_projection_report(tmp_path / "p.html", adapters, {}, [], [0.3])
    names = ["adapter", *(f"adapter-{number}" for number in range(2, MOST_MAPS + 1))]
    assert [name for name in written if name.endswith(".png")] == [
        *(f"cosines-{name}.png" for name in names),
        "share.png",
    ]
    text = written["report"].read_text("utf-8")
    assert len(Page(text).alts) == MOST_MAPS + 1
    assert f"first {MOST_MAPS} adapters are drawn; 2 more are" in text
    assert text.count("<details>") == MOST_MAPS + 2


@pytest.mark.slow
def test_names_that_are_invalid_for_files_get_unique_file_names(tmp_path: Path) -> None:
    adapters = {"a b": projected(), "a/b": projected(), "é": projected()}
    names = ["cosines-a-b", "cosines-a-b-2", "cosines-adapter", "share"]
    written = write_projection_report(tmp_path / "p.html", adapters, {}, [])
    assert list(written) == [
        "report",
        *(f"{name}.{kind}" for name in names for kind in ("png", "pdf")),
    ]


@pytest.mark.slow
def test_the_same_projection_gives_the_same_report(tmp_path: Path) -> None:
    def files(folder: Path) -> list[bytes]:
        written = write_projection_report(
            folder / "p.html",
            {"a": projected(), "b": projected(seed=1)},
            {"rule": "all"},
            ["n"],
            [0.3],
        )
        return [path.read_bytes() for path in written.values()]

    assert files(tmp_path / "a") == files(tmp_path / "b")
