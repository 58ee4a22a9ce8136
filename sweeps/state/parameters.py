"""Points as Optuna's parameters: the name and the distribution of each axis, and back.

Invariant: `point_of` a trial with `Names.parameters` of a point is that point.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial

from ebbline.sweeps.study.adapters.branches import ADAPTER
from ebbline.sweeps.study.axes import AxisValue, Range
from ebbline.sweeps.study.points import Point, Value
from ebbline.sweeps.study.study import Study

MODEL = "model"


class Names:
    """Optuna's parameter name and distribution for each axis of each size.

    A size with its own values has its own parameter, `70b/train.rank`. Optuna does not allow a
    categorical parameter to change its choices. So an extended axis continues as `train.rank#2`,
    and readers treat both names as the same axis.
    """

    def __init__(self, study: Study, found: Sequence[FrozenTrial] = ()) -> None:
        self._study = study
        self._before: dict[str, BaseDistribution] = {}
        for trial in found:
            self._before.update(trial.distributions)
        self._cache: dict[tuple[str, str], tuple[str, BaseDistribution]] = {}
        # Sizes with trained adapters and brought ones
        self._branched = {
            name
            for name in study.models
            if len({ADAPTER in branch.axes for branch in study.branches_of(name)}) > 1
        }

    def is_branched(self, model: str) -> bool:
        """Whether a size has trained adapters and brought ones."""
        return model in self._branched

    def model(self) -> tuple[str, BaseDistribution]:
        return self._free(
            MODEL, CategoricalDistribution([json.dumps(name) for name in self._study.models])
        )

    def axis(self, model: str, axis: str) -> tuple[str, BaseDistribution]:
        if (model, axis) not in self._cache:
            own = axis == ADAPTER or axis in self._study.models[model].axes
            self._cache[model, axis] = self._free(
                f"{model}/{axis}" if own else axis, self._distribution(model, axis)
            )
        return self._cache[model, axis]

    def _distribution(self, model: str, axis: str) -> BaseDistribution:
        values = self._study.axes_of(model)[axis]
        if axis == ADAPTER and not isinstance(values, Range) and model in self._branched:
            return distribution((None, *values))  # null: the adapter is trained
        return distribution(values)

    def parameters(self, point: Point) -> dict[str, Any]:
        """`params` and `distributions` of a trial that is this point."""
        name, models = self.model()
        params: dict[str, Any] = {name: json.dumps(point.model)}
        distributions = {name: models}
        trained = {ADAPTER: None} if point.model in self._branched else {}
        for axis, value in {**trained, **dict(point.values)}.items():
            name, own = self.axis(point.model, axis)
            params[name] = json.dumps(value) if isinstance(own, CategoricalDistribution) else value
            distributions[name] = own
        return {"params": params, "distributions": distributions}

    def _free(self, name: str, new: BaseDistribution) -> tuple[str, BaseDistribution]:
        for number in range(1, len(self._before) + 2):
            text = name if number == 1 else f"{name}#{number}"
            before = self._before.get(text)
            if (
                before is None
                or before == new
                or (type(before) is type(new) and not isinstance(new, CategoricalDistribution))
            ):
                break
        return text, new


def distribution(axis: tuple[AxisValue, ...] | Range) -> BaseDistribution:
    """Optuna's distribution for an axis. Choices are JSON text, because Optuna treats 1, 1.0 and
    True as one choice.
    """
    if not isinstance(axis, Range):
        return CategoricalDistribution([json.dumps(value) for value in axis])
    if axis.whole:
        return IntDistribution(
            int(axis.low), int(axis.high), log=axis.log, step=int(axis.step or 1)
        )
    return FloatDistribution(axis.low, axis.high, log=axis.log, step=axis.step)


def point_of(trial: FrozenTrial) -> Point:
    values = {
        name.rpartition("/")[2].partition("#")[0]: plain(value)
        for name, value in trial.params.items()
    }
    if values.get(ADAPTER, "") is None:  # of a point that is trained
        del values[ADAPTER]
    return Point.of(str(values.pop(MODEL)), values)


def plain(value: Any) -> Value:
    found: Value = _parsed(value) if isinstance(value, str) else value
    return found


@lru_cache(1024)
def _parsed(text: str) -> Any:
    """A choice of a list, which many trials share: null, a number, a name or true."""
    return json.loads(text)


def is_whole(trial: FrozenTrial, study: Study) -> bool:
    if not any(name.partition("#")[0] == MODEL for name in trial.params):
        return False
    point = point_of(trial)
    own = {axis for axis, _ in point.values}
    return point.model in study.models and any(
        own == set(branch.axes) for branch in study.branches_of(point.model)
    )
