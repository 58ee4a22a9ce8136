"""The knobs of a defence: their kinds, ranges and defaults, and the settings that a user gives.
Imports no torch.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ebbline.tasks.errors import ProjectionError

Value = None | bool | int | float | str
Values = Mapping[str, Value]
"""One setting: knob -> value. None is a knob that is not used."""


@dataclass(frozen=True)
class Knob:
    """One knob. `default` None means that the knob is not used. `shown_default` replaces it in
    lists. A `measured` knob is read together with the models, so a call has one value of it. A knob
    that is `measured_to_largest` is measured once, at the largest value of all settings.
    """

    name: str
    kind: Literal["number", "count", "text"]
    what: str
    default: Value = None
    low: float = -math.inf
    high: float = math.inf
    open_ends: bool = False
    choices: tuple[str, ...] = ()
    shown_default: str = ""
    measured: bool = False
    measured_to_largest: bool = False

    @property
    def range(self) -> str:
        """The allowed values in words."""
        if self.kind == "text":
            return " or ".join(self.choices) if self.choices else "text"
        if self.kind == "count":
            return f"integer from {self.low:g}"
        return (
            f"above {self.low:g}, below {self.high:g}"
            if self.open_ends
            else (f"{self.low:g} to {self.high:g}")
        )

    def parsed(self, text: str) -> Value:
        """The value that a text states. Raises ProjectionError."""
        try:
            return self.checked(
                {"number": float, "count": int, "text": str}[self.kind](text.strip())
            )
        except ValueError:
            raise ProjectionError(self._problem(text)) from None

    def checked(self, value: Value) -> Value:
        """The value, a number as float. Raises ProjectionError for one of another type or out of
        range.
        """
        if value is None and self.default is None:
            return None
        if self.kind == "text":
            if isinstance(value, str) and (not self.choices or value in self.choices):
                return value
            raise ProjectionError(self._problem(value))
        kinds = (int, float) if self.kind == "number" else (int,)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise ProjectionError(self._problem(value))
        inside = self.low < value < self.high if self.open_ends else self.low <= value <= self.high
        if not inside:
            raise ProjectionError(self._problem(value))
        return float(value) if self.kind == "number" else value

    def _problem(self, value: object) -> str:
        return f"{self.name} is {value!r}; it takes: {self.range}"


def grid(knobs: Sequence[Knob], given: Mapping[str, Value | Sequence[Value]]) -> list[Values]:
    """Every combination of the given values, with the defaults of the other knobs.

    Raises ProjectionError for an unknown knob, an invalid or duplicate value, and several values
    of a measured knob.
    """
    named = {knob.name: knob for knob in knobs}
    unknown = [name for name in given if name not in named]
    if unknown:
        takes = f"its knobs are {', '.join(named)}" if named else "it has none"
        raise ProjectionError(f"no knob {unknown[0]!r}; {takes}")
    lists = [_listed(knob, given.get(knob.name, knob.default)) for knob in knobs]
    return [dict(zip(named, values, strict=True)) for values in itertools.product(*lists)]


def _listed(knob: Knob, given: Value | Sequence[Value]) -> list[Value]:
    if isinstance(given, Sequence) and not isinstance(given, str):
        values = [knob.checked(value) for value in given]
    else:
        values = [knob.checked(given)]
    if not values:
        raise ProjectionError(f"{knob.name} has no value; leave it out for its default")
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ProjectionError(f"{value} is given twice; each value has one outcome")
    if knob.measured and len(values) > 1:
        raise ProjectionError(
            f"{knob.name} has {len(values)} values; it takes one a call, since it is read together "
            "with the models"
        )
    return values


def folder_name(values: Values, varied: Sequence[str]) -> str:
    """The varied knobs as the name of a folder, such as threshold-0.4."""
    return "+".join(f"{name}-{_in_a_path(values[name])}" for name in varied)


def _in_a_path(value: Value) -> str:
    text = str(value)
    return "".join(each if each.isalnum() or each in "._-" else "-" for each in text)


def shown(values: Values) -> str:
    """The used knobs as `threshold 0.4, projector exact`."""
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
        if value not in (None, "")
    )
