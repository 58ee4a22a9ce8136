"""The results as tables: a row per point, failed ones too, in the order of their numbers.

Invariant: two runs of a study agree in every column but MEASURED_COLUMNS, however often either was killed and continued.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from analysis.files import write_whole
from analysis.frontier import frontier, frontier_by_model
from analysis.wording import axis_label, metric_label, value_label
from sweeps.points import Result
from sweeps.study import axis_fields
from tasks.metrics import Metric

MEASURED_COLUMNS = ("seconds",)


def results_frame(results: Sequence[Result], objectives: Sequence[str]) -> pd.DataFrame:
    """One row per point: its axes, metrics with intervals, place on the frontier, and its stages' keys as provenance."""
    rows = sorted(results, key=lambda result: result.number)
    overall = {result.number for result in frontier(rows, objectives)}
    own = {result.number for found in frontier_by_model(rows, objectives).values() for result in found}

    columns: dict[str, pd.Series[Any]] = {
        "number": _column([row.number for row in rows], "Int64"),
        "point": _column([row.point.id for row in rows], "string"),
        "model": _column([row.point.model for row in rows], "string"),
        "status": _column([row.status for row in rows], "string"),
        "reason": _column([row.reason for row in rows], "string"),
    }
    for axis in axes_of(rows):
        columns[axis] = _typed([dict(row.point.values).get(axis) for row in rows])
    for name in metrics_of(rows):
        columns |= _metric_columns(name, [row.metrics.get(name) for row in rows])
    columns["on_frontier"] = _column([row.number in overall for row in rows], "boolean")
    columns["on_model_frontier"] = _column([row.number in own for row in rows], "boolean")
    columns["projected_share"] = _column([row.projected_share for row in rows], "Float64")
    columns["seconds"] = _column([row.seconds for row in rows], "Float64")
    for stage in sorted({stage for row in rows for stage in row.keys}):
        columns[stage] = _column([row.keys.get(stage) for row in rows], "string")
    return pd.DataFrame(columns)


def axes_of(results: Sequence[Result]) -> list[str]:
    return sorted({axis for result in results for axis, _ in result.point.values})


def metrics_of(results: Sequence[Result]) -> list[str]:
    return sorted({name for result in results for name in result.metrics})


def _metric_columns(name: str, metrics: Sequence[Metric | None]) -> dict[str, "pd.Series[Any]"]:
    spreads = [statistics.stdev(m.seeds) if m is not None and len(m.seeds) > 1 else None for m in metrics]
    return {
        name: _column([m and m.value for m in metrics], "Float64"),
        f"{name}_low": _column([m and m.interval[0] for m in metrics], "Float64"),
        f"{name}_high": _column([m and m.interval[1] for m in metrics], "Float64"),
        f"{name}_n": _column([m and m.n for m in metrics], "Int64"),
        f"{name}_undecided": _column([m and m.undecided for m in metrics], "Int64"),
        f"{name}_seed_sd": _column(spreads, "Float64"),
    }


def _column(values: Sequence[object], dtype: Literal["Int64", "Float64", "boolean", "string"]) -> "pd.Series[Any]":
    """A nullable column: None stays missing, it is not 0 or text."""
    return pd.Series(list(values), dtype="object").astype(dtype)


def _typed(values: Sequence[object]) -> "pd.Series[Any]":
    """A column of the narrowest type that keeps every value."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return _column(values, "boolean")
    if kinds == {int}:
        return _column(values, "Int64")
    if kinds and kinds <= {int, float}:
        return _column(values, "Float64")
    return _column([None if value is None else str(value) for value in values], "string")


def write_tables(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """results.parquet, results.csv, and frontier.csv with the rows of every frontier."""
    chosen = on_a_frontier(frame)
    return [
        write_whole(folder / "results.parquet", lambda path: frame.to_parquet(path, index=False)),
        write_whole(folder / "results.csv", lambda path: frame.to_csv(path, index=False, lineterminator="\n")),
        write_whole(folder / "frontier.csv", lambda path: chosen.to_csv(path, index=False, lineterminator="\n")),
    ]


def on_a_frontier(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["on_frontier"] | frame["on_model_frontier"]].reset_index(drop=True)


def frontier_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """The frontiers as text, for people: percent with 95% intervals. "*" is on the frontier over all models."""
    rows = on_a_frontier(frame)
    metrics = [name.removesuffix("_seed_sd") for name in frame.columns if name.endswith("_seed_sd")]
    axes = [name for name in frame.columns if name in set(axis_fields())]
    cells = pd.DataFrame({"point": rows["number"].astype(str), "model": rows["model"].astype(str)})
    cells["overall"] = ["*" if on else "" for on in rows["on_frontier"]]
    for axis in axes:
        cells[axis_label(axis)] = [value_label(None if pd.isna(value) else value) for value in rows[axis]]
    cells["projected"] = ["none" if pd.isna(share) or not share else f"{share:.0%}" for share in rows["projected_share"]]
    for name in metrics:
        triples = zip(rows[name], rows[f"{name}_low"], rows[f"{name}_high"], strict=True)
        cells[f"{metric_label(name)} %"] = ["" if pd.isna(triple[0]) else _in_percent(*triple) for triple in triples]
    return cells


def _in_percent(value: float, low: float, high: float) -> str:
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def frontier_text(frame: pd.DataFrame) -> str:
    """The frontiers as a plain table for a terminal."""
    cells = frontier_cells(frame)
    if cells.empty:
        return "No point has finished, so there is no frontier yet."
    lines = [[str(name) for name in cells.columns], *cells.to_numpy(dtype=str).tolist()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    table = ["  ".join(line).rstrip() for line in padded]
    return "\n".join([*table, "", "[low, high] is the 95% Wilson interval; * is on the frontier over all models."])
