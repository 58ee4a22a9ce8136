"""The `defences` of a study file: their knobs as axes, their fixed settings, and their faults.

    defences:
      safe_lora: {threshold: [0.3, 0.4], projector: exact}
      scale: {factor: {low: 0, high: 1}}

A list or a range is an axis of the points with this defence, a single value a fixed setting. A
study without `defences` has Safe LoRA, with the axes of its stages, such as `apply.threshold`.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from ebbline.sweeps.study.adapters.reference import AdapterFolder
from ebbline.sweeps.study.axes import AxisValue, Choices, Range
from ebbline.sweeps.study.reading.field_faults import unknown
from ebbline.sweeps.study.references import Hub
from ebbline.tasks.defences.defence import Defence, Setting
from ebbline.tasks.defences.in_use import DEFENCES, NONE
from ebbline.tasks.errors import ProjectionError
from ebbline.tasks.specs import Frozen, Spec

Knobs = Mapping[str, Choices | Range | AxisValue]
Axes = Mapping[str, tuple[AxisValue, ...] | Range]


class SafetyAdapter(Frozen):
    """The adapter that `safe_merge` merges with: trained once a base on data that you bring."""

    path: AdapterFolder | None = None
    hub: Hub | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either `path` or `hub`")
        return self


def _known(named: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    names = {name for name in DEFENCES if name != NONE}
    for name, knobs in named.items():
        if name == NONE:
            raise ValueError(f"{NONE}: leave it out; every training has one point with no defence")
        if name not in names:
            raise ValueError(unknown(name, names))
        for knob, given in knobs.items():
            if knob not in DEFENCES[name].knob_names:
                raise ValueError(f"{name}.{knob}: {unknown(knob, set(DEFENCES[name].knob_names))}")
            _check(name, knob, given)
        try:
            DEFENCES[name].specs(fixed_of(knobs), largest_of(knobs))  # type: ignore[arg-type]
        except (ProjectionError, ValidationError) as error:
            raise ValueError(f"{name}: {message_of(error)}") from None
    return named


def _check(name: str, knob: str, given: object) -> None:
    values = given.edges if isinstance(given, Range) else given
    for value in values if isinstance(values, tuple) else (values,):
        try:
            if value is None:
                raise ProjectionError(
                    f"null is no setting; every training has one point with no defence ({NONE})"
                )
            DEFENCES[name].checked(knob, value)
        except (ProjectionError, ValidationError) as error:
            raise ValueError(f"{name}.{knob}: {message_of(error)} (got {value!r})") from None


Defences = Annotated[
    dict[str, dict[str, Choices | Range | AxisValue]],
    Field(exclude_if=lambda named: not named),
    AfterValidator(_known),
]


def message_of(error: ProjectionError | ValidationError) -> str:
    """The fault in one line."""
    return str(error.errors()[0]["msg"]) if isinstance(error, ValidationError) else str(error)


def axes_of(name: str, knobs: Knobs) -> dict[str, tuple[AxisValue, ...] | Range]:
    """Axis -> values, of the varied knobs of one defence."""
    return {
        DEFENCES[name].axis(knob): given
        for knob, given in knobs.items()
        if isinstance(given, tuple | Range)
    }


def fixed_of(knobs: Knobs) -> dict[str, Setting]:
    """Knob -> value, of the fixed settings of one defence."""
    return {knob: given for knob, given in knobs.items() if not isinstance(given, tuple | Range)}


def largest_of(knobs: Knobs) -> dict[str, Setting]:
    """Knob -> its largest value, of the varied knobs of one defence; the last one of texts."""
    found: dict[str, Setting] = {}
    for knob, given in knobs.items():
        if isinstance(given, tuple | Range):
            found[knob] = largest(given)
    return found


def largest(given: tuple[AxisValue, ...] | Range) -> Setting:
    values = given.edges if isinstance(given, Range) else given
    numbers = [value for value in values if isinstance(value, int | float)]
    return max(numbers) if numbers else values[-1]


def specs_of(name: str, knobs: Knobs, sizes: Iterator[Axes]) -> tuple[Spec, Spec]:
    """The fixed Specs of both stages of a defence. `sizes` are the sizes' own axes, which may hold
    larger values.
    """
    defence, most = DEFENCES[name], largest_of(knobs)
    for own in sizes:
        for knob in defence.knob_names:
            values = own.get(defence.axis(knob))
            if values is not None:
                found = [most[knob], largest(values)] if knob in most else [largest(values)]
                most[knob] = largest(tuple(found))
    return defence.specs(fixed_of(knobs), most)


def faults_of(
    defences: Mapping[str, Knobs], axes: Mapping[str, Axes], changed: Mapping[str, bool]
) -> Iterator[str]:
    """What contradicts the `defences` of a study, a message for each fault. `axes` maps a place in
    the file to the axes there, `changed` a section of Safe LoRA to whether the file changes it.
    """
    for where, own in axes.items():
        for axis in own:
            defence = owner_of(axis)
            if defence is not None and where == "axes":
                knob = next(
                    (each for each in defence.knob_names if defence.axis(each) == axis), None
                )
                yield (
                    f"{where}.{axis}: a study with `defences` gives it there; write "
                    f"defences.{defence.name}.{knob or axis.partition('.')[2]}"
                )
            elif defence is not None and defence.name not in defences:
                yield f"{where}.{axis}: {defence.name} is not one of the study's `defences`"
    for part, is_changed in changed.items():
        if is_changed:
            yield f"{part}: a study with `defences` gives these settings in defences.safe_lora"


def owner_of(axis: str) -> Defence | None:
    """The defence that has this axis; None for any other axis."""
    return next(
        (
            defence
            for defence in DEFENCES.values()
            if any(defence.axis(knob) == axis for knob in defence.knob_names)
        ),
        None,
    )
