"""The results as tables: a row for each point, including failed ones, by number; and rates by
category.

Invariant: two runs of a study agree in every column but MEASURED_COLUMNS, however often either was
killed and continued.
"""

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from ebbline.analysis.results.columns import left_out_line, table_text
from ebbline.analysis.results.costs import cost_columns
from ebbline.analysis.results.frontier import finished, frontier, frontier_by_model, shortlist
from ebbline.analysis.results.measurements import (
    Baselines,
    Evidence,
    Subject,
    operating_point,
    refusal_metric,
)
from ebbline.analysis.results.statistics import SHARES, Agreement, by_category
from ebbline.analysis.results.wording import (
    axis_label,
    axis_value_label,
    metric_label,
    natural,
    percent,
    row_label,
    spread_label,
    undecided_label,
)
from ebbline.cluster.profile import Profile
from ebbline.sweeps.state.replicates import seeds_of
from ebbline.sweeps.study.adapters.branches import ADAPTER
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study, axis_fields
from ebbline.tasks.data.csv_rows import spreadsheet_cell
from ebbline.tasks.defences.defence import SHARE_COLUMN
from ebbline.tasks.defences.in_use import AXIS, DEFENCES, owns
from ebbline.tasks.files import write_whole
from ebbline.tasks.measuring.metrics import Metric

MEASURED_COLUMNS = (
    "seconds",
    "gpu_hours",
    "cost_usd",
    "gpu_hours_share",
    "cost_usd_share",
    "gpu_hours_added",
    "cost_usd_added",
)
NO_PRICES = Profile()
ALIGNED = "aligned"
VERDICTS = (
    "refused",
    "partial",
    "complied",
    "harmful",
    "harmless",
    "undecided",
    "incoherent",
)


def results_frame(
    results: Sequence[Result], objectives: Sequence[str], profile: Profile = NO_PRICES
) -> pd.DataFrame:
    """One row for each point: axes, metrics with intervals, whether it is on a frontier, costs.

    The last columns are the keys of its stages.
    """
    rows = sorted(results, key=lambda result: result.number)
    overall, own = _on_frontiers(rows, objectives)
    columns = _settings_and_metrics(rows, rows, overall, own)
    columns["seconds"] = _column([row.seconds for row in rows], "Float64")
    columns |= {
        name: _column(values, "Float64") for name, values in cost_columns(rows, profile).items()
    }
    for stage in sorted({stage for row in rows for stage in row.keys}):
        columns[stage] = _column([row.keys.get(stage) for row in rows], "string")
    return pd.DataFrame(columns)


def frontier_frame(results: Sequence[Result], objectives: Sequence[str]) -> pd.DataFrame:
    """The rows of `results_frame` that are on a frontier, without costs and keys."""
    rows = sorted(results, key=lambda each: each.number)
    overall, own = _on_frontiers(rows, objectives)
    kept = [row for row in rows if row.number in overall or row.number in own]
    return pd.DataFrame(_settings_and_metrics(kept, rows, overall, own))


def _on_frontiers(
    rows: Sequence[Result], objectives: Sequence[str]
) -> tuple[Collection[int], Collection[int]]:
    """The numbers of the points on the frontier over all models, and on that of their own model."""
    overall = {result.number for result in frontier(rows, objectives)}
    by_model = frontier_by_model(rows, objectives).values()
    return overall, {result.number for found in by_model for result in found}


def _settings_and_metrics(
    rows: Sequence[Result],
    everything: Sequence[Result],
    overall: Collection[int],
    own: Collection[int],
) -> dict[str, "pd.Series[Any]"]:
    """The columns of `rows`, with all axes and metrics of `everything`."""
    columns: dict[str, pd.Series[Any]] = {
        "number": _column([row.number for row in rows], "Int64"),
        "point": _column([row.point.id for row in rows], "string"),
        "model": _column([row.point.model for row in rows], "string"),
        "status": _column([row.status for row in rows], "string"),
        "reason": _column([row.reason for row in rows], "string"),
        "same_as": _column([row.same_as for row in rows], "Int64"),
        "seeds": _column([seeds_of(row) or None for row in rows], "Int64"),
    }
    for axis in axes_in(everything):
        columns[axis] = _typed([dict(row.point.values).get(axis) for row in rows])
    for name in metrics_in(everything):
        columns |= _metric_columns(name, [row.metrics.get(name) for row in rows])
    columns["on_frontier"] = _column([row.number in overall for row in rows], "boolean")
    columns["on_model_frontier"] = _column([row.number in own for row in rows], "boolean")
    columns[SHARE_COLUMN] = _column([row.changed_share for row in rows], "Float64")
    return columns


def axes_in(results: Sequence[Result]) -> list[str]:
    return sorted({axis for result in results for axis, _ in result.point.values})


def metrics_in(results: Sequence[Result]) -> list[str]:
    return sorted({name for result in results for name in result.metrics})


def _metric_columns(name: str, metrics: Sequence[Metric | None]) -> dict[str, "pd.Series[Any]"]:
    """The value, its sampling error (interval, stderr), counts, and the spread between seeds."""
    intervals = [m.interval if m else (None, None) for m in metrics]
    return {
        name: _column([m and m.value for m in metrics], "Float64"),
        f"{name}_low": _column([low for low, _ in intervals], "Float64"),
        f"{name}_high": _column([high for _, high in intervals], "Float64"),
        f"{name}_stderr": _column([m and m.stderr for m in metrics], "Float64"),
        f"{name}_n": _column([m and m.n for m in metrics], "Int64"),
        f"{name}_undecided": _column([m and m.undecided for m in metrics], "Int64"),
        f"{name}_seed_sd": _column([m and m.between_seeds for m in metrics], "Float64"),
    }


def _column(
    values: Sequence[object], dtype: Literal["Int64", "Float64", "boolean", "string"]
) -> "pd.Series[Any]":
    """A nullable column; None becomes a missing value, never 0 or text."""
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
        write_whole(
            folder / "results.csv",
            lambda path: write_csv(frame, path),
        ),
        write_whole(
            folder / "frontier.csv",
            lambda path: write_csv(chosen, path),
        ),
    ]


def on_a_frontier(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["on_frontier"] | frame["on_model_frontier"]].reset_index(drop=True)


def frontier_cells(frame: pd.DataFrame, metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """The frontiers as cells of text: percent with 95% intervals. The defences of a study that
    names them have one column, "safe_lora 0.35".

    "*" marks a point on the frontier over all models. `metrics` are the full names of the metrics
    to show (default: all).
    """
    rows = on_a_frontier(frame)
    measured = [
        name.removesuffix("_seed_sd") for name in frame.columns if name.endswith("_seed_sd")
    ]
    metrics = measured if metrics is None else [name for name in metrics if name in measured]
    several = AXIS in frame.columns
    axes = [
        name
        for name in frame.columns
        if name in {ADAPTER, *axis_fields()} and not (several and owns(name))
    ]
    given = rows[ADAPTER].notna() if ADAPTER in axes else pd.Series(False, index=rows.index)
    cells = pd.DataFrame({"point": rows["number"].astype(str), "model": rows["model"].astype(str)})
    cells["overall"] = ["*" if on else "" for on in rows["on_frontier"]]
    if several:
        cells[AXIS] = [_defence_of_row(row) for row in rows.to_dict("records")]
    for axis in axes:
        cells[axis_label(axis)] = [
            axis_value_label(axis, None if pd.isna(value) else value, own)
            for value, own in zip(rows[axis], given, strict=True)
        ]
    cells["changed"] = [
        "none" if pd.isna(share) or not share else f"{share:.0%}" for share in rows[SHARE_COLUMN]
    ]
    for name in metrics:
        columns = (name, f"{name}_low", f"{name}_high", f"{name}_undecided", f"{name}_seed_sd")
        cells[metric_column(name)] = [
            ""
            if pd.isna(row[0])
            else in_percent(*row[:3])
            + ("" if pd.isna(row[4]) else f", seeds sd {100 * row[4]:.1f}")
            + undecided_label(int(row[3]), " (", ")")
            for row in zip(*(rows[column] for column in columns), strict=True)
        ]
    return cells


def in_percent(value: float, low: float, high: float) -> str:
    """A rate with its interval, for a table's cell: "98.8 [96.4, 99.6]"."""
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def metric_cell(metric: Metric) -> str:
    """A metric for a table's cell: "98.8 [96.4, 99.6], 3 seeds sd 9.1 (3 undecided)"."""
    return (
        in_percent(metric.value, *metric.interval)
        + spread_label(metric, ", ")
        + undecided_label(metric.undecided, " (", ")")
    )


def in_points(difference: float) -> str:
    """A difference of rates in percentage points, with its sign: "+12.3"."""
    return f"{round(100 * difference, 1) + 0.0:+.1f}"


def _defence_of_row(row: Mapping[Hashable, Any]) -> str:
    """The label of a row's defence, from its columns."""
    defence = DEFENCES[row[AXIS]]
    own = {
        str(axis): value
        for axis, value in row.items()
        if defence.owns(str(axis)) and not pd.isna(value)
    }
    return row_label(defence.name, own)


def frontier_text(
    frame: pd.DataFrame, objectives: Sequence[str] = (), width: int | None = None
) -> str:
    """The frontiers as a plain table for a terminal of that width, the objectives first.

    A line below names the columns that it has no room for.
    """
    cells = frontier_cells(frame)
    if cells.empty:
        return "No point has finished, so there is no frontier yet."
    named = [AXIS] if AXIS in cells.columns else []
    first = ["point", "model", *named, "overall", *(metric_column(name) for name in objectives)]
    names = [*first, *(name for name in cells.columns if name not in first)]
    table, left_out = table_text(names, cells[names].to_numpy(dtype=str).tolist(), width)
    return "\n".join(
        [
            table,
            *left_out_line(left_out),
            "",
            "[low, high] is the 95% interval over prompts (Wilson's of rates, normal of means); "
            "* is on the frontier over all models.",
        ]
    )


def metric_column(name: str) -> str:
    """The header of a metric's column."""
    return f"{metric_label(name)} %"


def categories_frame(
    study: Study, results: Sequence[Result], baselines: Baselines, evidence: Evidence
) -> pd.DataFrame:
    """A row for each category, suite and finished point, and for each aligned model ("aligned"). Of
    many points, those of the shortlist have rows.

    Only suites whose metric is a share of samples count (see
    ebbline.analysis.results.statistics.SHARES). `point` is a point's id, `number` its number.
    """
    columns = {
        name: list[object]()
        for name in (
            "number",
            "point",
            "model",
            "suite",
            "category",
            "n",
            "successes",
            "undecided",
            "rate",
            "low",
            "high",
        )
    }
    aligned: list[tuple[int | None, str, str, Subject]] = [
        (None, ALIGNED, model, model) for model in sorted(baselines, key=natural)
    ]
    points: list[tuple[int | None, str, str, Subject]] = [
        (r.number, r.point.id, r.point.model, r) for r in shortlist(results, study.objectives)
    ]
    for number, point, model, subject in [*aligned, *points]:
        for suite, name in shares_of(study):
            for category, metric in categories_of(subject, suite, name, evidence).items():
                whole = (metric.n, round(metric.successes), metric.undecided)
                counted = (*whole, metric.value, *metric.interval)
                for column, value in zip(
                    columns.values(), (number, point, model, suite, category, *counted), strict=True
                ):
                    column.append(value)
    integers = {"number", "n", "successes", "undecided"}
    text = {"point", "model", "suite", "category"}
    kinds: dict[str, Literal["Int64", "Float64", "string"]] = {
        name: "Int64" if name in integers else "string" if name in text else "Float64"
        for name in columns
    }
    return pd.DataFrame({name: _column(values, kinds[name]) for name, values in columns.items()})


def write_categories(frame: pd.DataFrame, folder: Path) -> Path:
    """categories.csv."""
    return write_whole(folder / "categories.csv", lambda path: write_csv(frame, path))


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """A table as CSV whose texts no spreadsheet takes for formulas."""
    cells = frame.map(lambda cell: spreadsheet_cell(cell) if isinstance(cell, str) else cell)
    cells.to_csv(path, index=False, lineterminator="\n")


def shares_of(study: Study) -> list[tuple[str, str]]:
    """(suite, full name of its metric), for the suites whose metric is a share of samples."""
    first = {suite: entry.measure.metrics()[0] for suite, entry in study.suites.items()}
    return [(suite, f"{suite}.{metric}") for suite, metric in first.items() if metric in SHARES]


def categories_of(subject: Subject, suite: str, name: str, evidence: Evidence) -> dict[str, Metric]:
    """Category -> its rate; empty where samples are missing."""
    replicates = evidence.samples(subject, suite)
    return by_category(name, replicates) if replicates else {}


def shipped(study: Study, results: Sequence[Result]) -> dict[str, Result]:
    """Model -> its operating point, for the models with a defended point."""
    refusal, found = refusal_metric(study), dict[str, Result]()
    if refusal is None:
        return found
    for model in sorted({result.point.model for result in finished(results)}, key=natural):
        picked = operating_point(
            study, [result for result in finished(results) if result.point.model == model], refusal
        )
        if picked is not None:
            found[model] = picked.result
    return found


def category_cells(
    study: Study, results: Sequence[Result], evidence: Evidence
) -> Iterator[tuple[str, pd.DataFrame]]:
    """(caption, table as text) for each model and suite: the operating point and the aligned model.

    A suite with one category has no table, as it would repeat the metric of the suite.
    """
    for model, result in shipped(study, results).items():
        for suite, name in shares_of(study):
            after, before = (
                categories_of(subject, suite, name, evidence) for subject in (result, model)
            )
            if len(after) < 2:
                continue
            rows = [
                (category or "(none)", before.get(category), metric)
                for category, metric in after.items()
            ]
            cells = pd.DataFrame({"category": [category for category, _, _ in rows]})
            for label, column in (
                ("aligned", [old for _, old, _ in rows]),
                (f"point {result.number}", [new for _, _, new in rows]),
            ):
                cells[f"{label} n"] = ["" if metric is None else str(metric.n) for metric in column]
                cells[f"{label} %"] = [
                    "" if metric is None else metric_cell(metric) for metric in column
                ]
            cells["difference"] = [
                "" if old is None else in_points(new.value - old.value) for _, old, new in rows
            ]
            yield f"{model}, point {result.number}: {metric_label(name)}", cells


def agreement_cells(
    study: Study, results: Sequence[Result], evidence: Evidence
) -> Iterator[tuple[str, pd.DataFrame, pd.DataFrame, pd.DataFrame]]:
    """(caption, verdicts of each scorer, agreement of each two, the same by category) for suites
    with several scorers; the last is empty for a set without categories.

    There is one for each aligned model and one for its operating point.
    """
    points = shipped(study, results)
    for model in sorted(study.models, key=natural):
        subjects: list[tuple[str, Subject]] = [("before fine-tuning", model)]
        if model in points:
            subjects.append((f"point {points[model].number}", points[model]))
        for state, subject in subjects:
            for suite in study.suites:
                found = evidence.agreement(subject, suite)
                if found is not None:
                    caption = f"{model}, {state}: {suite}"
                    yield caption, _verdicts(found), _pair_rows(found), _by_category(found)


def _by_category(found: Agreement) -> pd.DataFrame:
    parts = []
    for category, own in found.categories.items():
        rows = _pair_rows(own)
        rows.insert(0, "category", category or "(none)")
        parts.append(rows)
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _verdicts(found: Agreement) -> pd.DataFrame:
    used = [
        verdict
        for verdict in VERDICTS
        if any(counts.get(verdict) for counts in found.counts.values())
    ]
    rows = {"scorer": list(found.counts)}
    rows |= {
        verdict: [str(counts.get(verdict, 0)) for counts in found.counts.values()]
        for verdict in [*used, "n"]
    }
    return pd.DataFrame(rows)


def _pair_rows(found: Agreement) -> pd.DataFrame:
    """A row for each two scorers; `differ on` lists both verdicts and their count."""
    rows = []
    for pair in found.pairs:
        apart = {
            (left, right): count
            for left, row in pair.confusion.items()
            for right, count in row.items()
            if left != right
        }
        most_first = sorted(apart.items(), key=lambda cell: (-cell[1], cell[0]))
        differ = "; ".join(f"{left}, {right}: {count}" for (left, right), count in most_first)
        kappa = "not defined" if pair.kappa is None else f"{pair.kappa:.2f}"
        rows.append(
            [pair.one, pair.other, str(pair.n), percent(pair.agree), kappa, differ or "nothing"]
        )
    return pd.DataFrame(
        rows,
        columns=["one", "other", "n", "agree", "Cohen's kappa", "differ on (one, other: count)"],
    )
