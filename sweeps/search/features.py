"""Features of a point for the surrogate model, one number for each axis.

An axis is scaled to [0, 1] over all values that any model has for it. The scale is logarithmic when
the values span a factor of 8 or more. The share of modules that the defence changes can replace its
knobs: equal shares mean the same for every adapter and model, equal knobs do not. Each defence of a
study has a feature of its own, since defences have no order.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebbline.sweeps.study.axes import Range
from ebbline.sweeps.study.points import Point, Value, defence_of
from ebbline.sweeps.study.study import Study
from ebbline.tasks.defences.in_use import AXIS, is_knob

Array = NDArray[np.float64]
LOG_SPAN = 8.0
# The feature of a point's own model, and of its own defence; that of others is 0
OWN_FEATURE = 0.5


class Features:
    """Computes feature vectors. With `shares`, the share of modules replaces the knobs."""

    def __init__(self, study: Study, shares: bool) -> None:
        self._study = study
        self._shares = shares
        self._models = list(study.models)
        self._defences = [each.name for each in study.used_defences] if study.defences else []
        axes: dict[str, list[Any]] = {}
        for model in study.models:
            for axis, values in study.axes_of(model).items():
                if axis != AXIS and not (shares and is_knob(axis)):
                    edges = list(values.edges) if isinstance(values, Range) else list(values)
                    axes.setdefault(axis, []).extend(edges)
        self._scales = {axis: _Scale(values) for axis, values in axes.items()}
        own = {
            axis
            for model in study.models
            for axis in study.axes_of(model)
            if axis not in study.axes
        }
        self._fixed = {
            (model, axis): self._setting(model, axis) for model in study.models for axis in own
        }

    def row(self, point: Point, share: float = 0.0, sizes: bool = False) -> Array:
        """The features of a point as (F,). With `sizes`, one feature for each model is added."""
        values = dict(point.values)
        found = [
            scale.of(values.get(axis, self._fixed.get((point.model, axis))))
            for axis, scale in self._scales.items()
        ]
        if self._shares:
            found.append(share)
        own = defence_of(point).name
        found += [OWN_FEATURE if name == own else 0.0 for name in self._defences]
        if sizes:
            found += [OWN_FEATURE if model == point.model else 0.0 for model in self._models]
        return np.array(found)

    def _setting(self, model: str, axis: str) -> Value:
        """The fixed setting of a model that has no such axis."""
        found: Value = self._study.fixed(model, axis)
        return found


class _Scale:
    def __init__(self, values: Sequence[Any]) -> None:
        numbers = sorted(
            {
                float(value)
                for value in values
                if isinstance(value, int | float) and not isinstance(value, bool)
            }
        )
        self._others = sorted(
            {
                json.dumps(value)
                for value in values
                if not isinstance(value, int | float) or isinstance(value, bool)
            }
        )
        self._log = len(numbers) > 1 and numbers[0] > 0 and numbers[-1] / numbers[0] >= LOG_SPAN
        self._low, self._high = (numbers[0], numbers[-1]) if numbers else (0.0, 1.0)

    def of(self, value: Value) -> float:
        """A number in [0, 1]. Non-numeric values (null, names) map to -0.3, -0.6, ..."""
        if not isinstance(value, int | float) or isinstance(value, bool):
            text = json.dumps(value)
            return -0.3 * (1 + self._others.index(text)) if text in self._others else -0.3
        if self._high <= self._low:
            return 0.0
        if self._log:
            return math.log(max(value, self._low / 10) / self._low) / math.log(
                self._high / self._low
            )
        return (value - self._low) / (self._high - self._low)
