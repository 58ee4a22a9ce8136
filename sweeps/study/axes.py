"""Axes: what a study varies. An axis is a list of values or a numeric range."""

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from ebbline.tasks.specs import Frozen, Number, Positive

MOST_VALUES = 1_000_000  # of a range with a step
AxisValue = None | bool | int | Number | str


def distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values. Raises ValueError for a duplicate."""
    seen: set[Any] = set()
    for value in values:
        if value in seen:
            raise ValueError(f"duplicate value {value!r}; remove one")
        seen.add(value)
    return values


Choices = Annotated[tuple[AxisValue, ...], Field(min_length=1), AfterValidator(distinct)]


class Range(Frozen):
    """A numeric axis. The search may choose any value; with a `step`, only values that are a whole
    number of steps above `low`.
    """

    low: Number
    high: Number
    step: Positive | None = None
    log: bool = False

    @property
    def whole(self) -> bool:
        """True when both edges and the step are whole numbers."""
        return all(
            float(edge).is_integer()
            for edge in (self.low, self.high, 0.5 if self.step is None else self.step)
        )

    @property
    def edges(self) -> tuple[float, float]:
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)

    @property
    def count(self) -> int | None:
        """The number of values; None without a step."""
        return (
            None
            if self.step is None
            else int((_exact(self.high) - _exact(self.low)) // _exact(self.step)) + 1
        )

    def at(self, steps: int) -> int | float:
        """The value that many steps above `low`, in decimal arithmetic: 0.3, not
        0.30000000000000004.
        """
        value = _exact(self.low) + steps * _exact(self.step or 0.0)
        return int(value) if self.whole else float(value)

    def nearest(self, value: float) -> int | float:
        """The value of the axis nearest to `value`, which lies between the edges."""
        if self.step is None or self.count is None:
            return float(value)
        return self.at(min(round((value - self.low) / self.step), self.count - 1))

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        if self.step is not None and (self.high - self.low) / self.step > MOST_VALUES:
            raise ValueError(
                f"step ({self.step}) gives over {MOST_VALUES} values; give a larger one, or none"
            )
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("a log range needs low > 0 and no step")
        return self


Axis = Choices | Range


def _exact(value: float) -> Decimal:
    return Decimal(str(value))


def count_of(axis: tuple[AxisValue, ...] | Range) -> int | None:
    """The number of values of an axis; None for a range without a step."""
    return axis.count if isinstance(axis, Range) else len(axis)


def values_of(axis: tuple[AxisValue, ...] | Range) -> Iterable[AxisValue]:
    """The values of an axis in order; empty for a range without a step."""
    return map(axis.at, range(axis.count or 0)) if isinstance(axis, Range) else axis


def of_size(
    shared: Mapping[str, tuple[AxisValue, ...] | Range],
    own: Mapping[str, tuple[AxisValue, ...] | Range],
) -> dict[str, Any]:
    """The axes of one size: the study's, with the size's own values, then the size's own axes."""
    return {
        **{name: own.get(name, axis) for name, axis in shared.items()},
        **{name: own[name] for name in own if name not in shared},
    }
