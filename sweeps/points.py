"""Points and Results: the row of every table.

A Point is a model and one value for each axis. A Result is what became of it: metrics with intervals, or the reason that
it has none. A replicate is a Point with a seed; a Result aggregates its replicates and keeps each one's value.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tasks.identity import digest
from tasks.metrics import Metric

Value = None | bool | int | float | str


@dataclass(frozen=True)
class Point:
    """`values` maps an axis (`train.rank`) to its value, in the order of the axes' names."""

    model: str
    values: tuple[tuple[str, Value], ...]

    @staticmethod
    def of(model: str, values: Mapping[str, Value]) -> "Point":
        return Point(model, tuple(sorted(values.items())))

    @property
    def id(self) -> str:
        return digest({"model": self.model, "values": dict(self.values)})[:12]

    def __str__(self) -> str:
        return " ".join([self.model, *(f"{axis.split('.')[-1]}={'none' if v is None else v}" for axis, v in self.values)])


Status = Literal["done", "running", "failed"]


@dataclass(frozen=True)
class Result:
    """One point of a study: its metrics by full name (`refusal.refusal_rate`), pooled over seeds, or `reason` when it has none.

    `keys` maps a stage's name (`train[seed=0]`) to its key in the store; `seconds` is what its stages took when they ran,
    whether for this point or for an earlier one that it shares them with.
    """

    number: int
    point: Point
    status: Status
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    reason: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    projected_share: float | None = None
