"""The branches of a study's space: points of one size that differ in the same axes.

    branch      its axes
    trained     the axes of the size
    brought     `adapter`, whose values are the names of the size's `adapters`, and the axes of the
                defence

In a study with `defences`, each of these is a branch for each defence: with the axis `defence` of
one value and the axes of that defence alone. The first of them is no defence.

A training's rank, learning rate or data size are no settings of an adapter that another tool
trained, so points of the second branch have no value of those axes. Nor have they seeds: such an
adapter is one adapter.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ebbline.sweeps.study.adapters.reference import AdapterRef
from ebbline.sweeps.study.axes import AxisValue, Range
from ebbline.tasks.defences.defence import Defence
from ebbline.tasks.defences.in_use import AXIS, DEFENCES, owns
from ebbline.tasks.defences.safe_lora import SAFE_LORA

ADAPTER = "adapter"  # the axis
OwnAxes = Mapping[str, tuple[AxisValue, ...] | Range]


@dataclass(frozen=True)
class Branch:
    """The points of one size that differ in the same axes."""

    model: str
    axes: OwnAxes

    @property
    def defence(self) -> Defence:
        """The defence of its points; Safe LoRA in a study that names none."""
        named = self.axes.get(AXIS)
        return DEFENCES[str(named[0])] if isinstance(named, tuple) else SAFE_LORA


def branches_of(
    model: str,
    axes: OwnAxes,
    adapters: Sequence[str],
    trains: bool,
    defences: Mapping[str, OwnAxes],
) -> Iterator[Branch]:
    """The branches of one size: `axes` are its own, `adapters` the names of those given for it, and
    `defences` the axes of each named defence.
    """
    own = {axis: values for axis, values in axes.items() if owns(axis)}
    trained = {axis: values for axis, values in axes.items() if axis not in own or not defences}
    of_defences: list[OwnAxes] = [{AXIS: (name,), **knobs} for name, knobs in defences.items()] or [
        {}
    ]
    if trains:
        for knobs in of_defences:
            yield Branch(model, {**trained, **knobs})
    if adapters:
        for knobs in of_defences:
            yield Branch(model, {ADAPTER: tuple(adapters), **(knobs or own)})


def adapters_of(
    adapters: Mapping[str, AdapterRef], model: str, models: Sequence[str]
) -> tuple[str, ...]:
    """The names of a size's adapters, in the order of the file."""
    only = models[0] if len(models) == 1 else None
    return tuple(name for name, each in adapters.items() if (each.model or only) == model)


def faults_of(
    adapters: Mapping[str, AdapterRef], models: Sequence[str], axes: Mapping[str, OwnAxes]
) -> Iterator[str]:
    """What is wrong with the adapters of a study, a message for each fault. `axes` maps a place in
    the file to the axes there; empty if the study trains.
    """
    for name, each in adapters.items():
        if each.model is None and len(models) > 1:
            yield f"adapters.{name}.model is missing: give one of {sorted(models)}"
        elif each.model is not None and each.model not in models:
            yield f"adapters.{name}.model: {each.model!r} is not one of {sorted(models)}"
    for where, own in axes.items():
        for axis in own:
            if not owns(axis):
                yield (
                    f"{where}.{axis}: nothing is trained, because the study has no `train`, so no "
                    "point has this setting; remove the axis, or give `train` and `data`"
                )
