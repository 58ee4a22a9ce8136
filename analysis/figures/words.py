"""The alternative texts of the report's figures: each describes a figure with its numbers.

Invariant: a text gives the main content of its figure: the number of marks, their range, and the
extremes.
"""

from collections.abc import Mapping, Sequence

from ebbline.analysis.figures.before_after import LABELS
from ebbline.analysis.figures.importance import UNVARIED, Importances, label
from ebbline.analysis.figures.knob import along_knob
from ebbline.analysis.results.attainment import Array, Attainment
from ebbline.analysis.results.before_after import Line
from ebbline.analysis.results.frontier import finished, frontier_by_model
from ebbline.analysis.results.measurements import Baselines, is_defended
from ebbline.analysis.results.wording import (
    directed_label,
    metric_label,
    natural,
    percent,
    undecided_label,
)
from ebbline.sweeps.study.points import Result
from ebbline.tasks.defences.defence import Defence
from ebbline.tasks.defences.safe_lora import SAFE_LORA
from ebbline.tasks.measuring.metrics import Metric, direction

MOST_THRESHOLDS = 8


def frontier_words(
    results: Sequence[Result],
    objectives: Sequence[str],
    baselines: Baselines,
    picked: Sequence[Result] = (),
) -> str:
    drawn, done = objectives[:2], finished(results)
    head = (
        f"Scatter plot: {' against '.join(directed_label(name) for name in reversed(drawn))}; "
        f"{len(done)} finished points."
    )
    parts = []
    for model, front in frontier_by_model(results, drawn).items():
        own = [result for result in done if result.point.model == model]
        ends = sorted(front, key=lambda result: result.metrics[drawn[0]].value)
        text = (
            f"{model}: {len(own)} points, {sum(map(is_defended, own))} defended; frontier of "
            f"{len(front)}"
        )
        first, last = (_at(end.metrics, drawn) for end in (ends[0], ends[-1]))
        text += f", {first}" if len(front) == 1 else f", from {first} to {last}"
        before = baselines.get(model, {})
        parts.append(
            text
            + (
                f"; aligned model {_at(before, drawn)}."
                if all(name in before for name in drawn)
                else "."
            )
        )
    parts += [
        f"Picked of {result.point.model}: point {result.number}, {_at(result.metrics, drawn)}."
        for result in picked
    ]
    return " ".join([head, *parts])


def attainment_words(found: Mapping[str, Attainment], objectives: Sequence[str]) -> str:
    x, y = (metric_label(name) for name in objectives[:2])
    parts = [f"Attainment bands: {y} against {x}, a panel for each size."]
    for model, each in found.items():
        some, every = (each.surfaces[level] for level in ("some", "all"))
        spans = []
        for column, (name, objective) in enumerate(zip((x, y), objectives, strict=False)):
            surely, at_best = (
                percent(_best(surface, column, objective)) for surface in (every, some)
            )
            spans.append(f"{name} reaches {surely} with every seed and {at_best} with some")
        parts.append(f"{model}, {each.seeds} seeds, {each.points} points: {'; '.join(spans)}.")
    return " ".join(parts)


def threshold_words(
    results: Sequence[Result],
    names: Sequence[str],
    baselines: Baselines,
    defence: Defence = SAFE_LORA,
) -> str:
    done = along_knob(results, defence)
    parts = [f"Line plots by {defence.words.along}: {'; '.join(map(directed_label, names))}."]
    for model in sorted({result.point.model for result in done}, key=natural):
        for name in names:
            own = [
                result for result in done if result.point.model == model and name in result.metrics
            ]
            at: dict[float | None, list[float]] = {}
            for result in own:
                value = dict(result.point.values).get(defence.main_knob)
                at.setdefault(float(value) if isinstance(value, int | float) else None, []).append(
                    result.metrics[name].value
                )
            thresholds = sorted(value for value in at if value is not None)
            shown = (
                thresholds
                if len(thresholds) <= MOST_THRESHOLDS
                else [thresholds[0], thresholds[len(thresholds) // 2], thresholds[-1]]
            )
            spans = [f"without {_span(at[None])}"] if None in at else []
            spans += [f"at {value:g} {_span(at[value])}" for value in shown]
            before = baselines.get(model, {}).get(name)
            spans += [] if before is None else [f"aligned model {_value(before)}"]
            parts.append(f"{model}, {metric_label(name)}: {', '.join(spans)}.")
    return " ".join(parts)


def before_after_words(lines: Sequence[Line]) -> str:
    """Each metric's values for each model, in the order of the legend."""
    parts = [
        "Dot plots, a panel for each metric and a row for each model; values in this order: "
        f"{'; '.join(LABELS.values())}."
    ]
    for name in dict.fromkeys(line.name for line in lines):
        rows = []
        for line in (line for line in lines if line.name == name):
            values = [
                _value(line.states[state]) if state in line.states else "not measured"
                for state in LABELS
            ]
            rows.append(f"{line.model} {', '.join(values)}")
        parts.append(f"{directed_label(name)}: {'; '.join(rows)}.")
    return " ".join(parts)


def importance_words(found: Importances) -> str:
    parts = [
        "Dot plots with intervals: the share of each objective's variance that an axis "
        "makes by itself."
    ]
    for name, each in found.items():
        shares = [
            f"{label(axis)} {percent(s.value)} "
            + (
                UNVARIED
                if s.interval[0] == s.interval[1]
                else f"({percent(s.interval[0])} to {percent(s.interval[1])})"
            )
            for axis, s in each.shares.items()
        ]
        if shares:
            parts.append(f"{metric_label(name)}: {', '.join(shares)}.")
    return " ".join(parts)


def _best(values_NM: Array, column: int, objective: str) -> float:
    values_N = values_NM[:, column]
    return float(values_N.max() if direction(objective) == "maximise" else values_N.min())


def _at(metrics: Mapping[str, Metric], drawn: Sequence[str]) -> str:
    return " and ".join(f"{metric_label(name)} {_value(metrics[name])}" for name in drawn)


def _value(metric: Metric) -> str:
    return percent(metric.value) + undecided_label(metric.undecided, " (", ")")


def _span(values: Sequence[float]) -> str:
    low, high = percent(min(values)), percent(max(values))
    return low if low == high else f"{low} to {high}"
