"""Axes: what a study varies. A list of values, or a numeric range that the search may take any
value of.
"""

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from ebbline.tasks.specs import Frozen, Number, Positive

AxisValue = None | bool | int | Number | str


def distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values, none of which may stand twice."""
    twice = [value for index, value in enumerate(values) if value in values[:index]]
    if twice:
        raise ValueError(f"{twice[0]!r} stands twice; it would be counted twice")
    return values


Choices = Annotated[tuple[AxisValue, ...], Field(min_length=1), AfterValidator(distinct)]


class Range(Frozen):
    """A numeric axis that the search may take any value of; with a `step`, of those that lie whole
    steps above `low`.
    """

    low: Number
    high: Number
    step: Positive | None = None
    log: bool = False

    @property
    def whole(self) -> bool:
        """True when the range is over whole numbers: its edges and its step are."""
        return all(
            float(edge).is_integer()
            for edge in (self.low, self.high, 0.5 if self.step is None else self.step)
        )

    @property
    def edges(self) -> tuple[float, float]:
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)

    @property
    def count(self) -> int | None:
        """How many values there are; None without a step."""
        return (
            None
            if self.step is None
            else int((_exact(self.high) - _exact(self.low)) // _exact(self.step)) + 1
        )

    def at(self, steps: int) -> int | float:
        """The value so many steps above `low`, as a person would write it: 0.3, and not
        0.30000000000000004.
        """
        value = _exact(self.low) + steps * _exact(self.step or 0.0)
        return int(value) if self.whole else float(value)

    def nearest(self, value: float) -> int | float:
        """The value of the axis that lies nearest to one between its edges."""
        if self.step is None or self.count is None:
            return float(value)
        return self.at(min(round((value - self.low) / self.step), self.count - 1))

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("a log range needs low > 0 and no step")
        return self


Axis = Choices | Range


def _exact(value: float) -> Decimal:
    return Decimal(str(value))


def count_of(axis: tuple[AxisValue, ...] | Range) -> int | None:
    """How many values an axis has; None for a range without a step."""
    return axis.count if isinstance(axis, Range) else len(axis)


def values_of(axis: tuple[AxisValue, ...] | Range) -> Iterable[AxisValue]:
    """The values of an axis in order; of a range without a step there is no list."""
    return map(axis.at, range(axis.count or 0)) if isinstance(axis, Range) else axis


def of_size(
    shared: Mapping[str, tuple[AxisValue, ...] | Range],
    own: Mapping[str, tuple[AxisValue, ...] | Range],
) -> dict[str, Any]:
    """One size's axes: the study's, each as the size has it, then those that only the size has."""
    return {
        **{name: own.get(name, axis) for name, axis in shared.items()},
        **{name: own[name] for name in own if name not in shared},
    }
