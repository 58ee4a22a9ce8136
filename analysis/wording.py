"""How names and numbers are worded for people: the one place where a rate in [0, 1] becomes percent."""

import re

from sweeps.points import Point, Status, Value
from tasks.metrics import Metric, direction

NO_RESULT: tuple[Status, ...] = ("failed", "refused", "out_of_budget")


def metric_label(name: str) -> str:
    """`refusal.refusal_rate` -> "refusal rate"; `mmlu.acc` -> "acc (mmlu)"."""
    suite, _, metric = name.rpartition(".")
    words = metric.replace("_", " ")
    return words if not suite or suite.replace("_", " ") in words else f"{words} ({suite})"


def directed_label(name: str) -> str:
    return f"{metric_label(name)}, {'higher' if direction(name) == 'maximise' else 'lower'} is better"


def axis_label(axis: str) -> str:
    """`train.rank` -> "rank": the last parts of all axes differ."""
    return axis.rpartition(".")[2]


def value_label(value: Value) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def settings_label(point: Point) -> str:
    """A point's axes without its model: "rank=8 size=100 threshold=none"."""
    return " ".join(f"{axis_label(axis)}={value_label(value)}" for axis, value in point.values)


def natural(name: str) -> list[str | float]:
    """A sort key that puts 7b before 13b, and rank=4 before rank=16."""
    return [float(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+(?:\.\d+)?)", name))]


def percent(share: float) -> str:
    return f"{share:.1%}"


def measured(metric: Metric) -> str:
    low, high = metric.interval
    return f"{percent(metric.value)} (95% interval {percent(low)} to {percent(high)}, n = {metric.n})"


def without_paths(reason: str) -> str:
    """A failure's reason as it may leave this machine: no command, and of each absolute path only its last part."""
    return re.sub(r"(?<![\w.])/(?:[\w.@+-]+/)+([\w.@+-]*)", r"\1", reason.partition(" (to see it again")[0])


def status_label(status: Status) -> str:
    return {"running": "still running", "out_of_budget": "out of budget"}.get(status, status)
