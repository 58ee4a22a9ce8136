"""What the defences with Safe LoRA's gate share: its knobs and its choice. Imports no torch."""

from collections.abc import Mapping
from typing import ClassVar, Literal, cast

from ebbline.tasks.defences.gate import ModuleRow, chosen
from ebbline.tasks.defences.methods.knobs import Knob, Values
from ebbline.tasks.defences.methods.method import Method
from ebbline.tasks.defences.settings import DEFAULT_ENERGY, DEFAULT_THRESHOLD, checked

THRESHOLD = Knob(
    "threshold",
    "number",
    "change modules whose cosine is at or below it",
    low=-1.0,
    high=1.0,
    shown_default=f"{DEFAULT_THRESHOLD} without modules",
)
MODULES = Knob("modules", "count", "change exactly so many modules, lowest cosine first", low=0)
PROJECTOR = Knob(
    "projector",
    "text",
    "which C the cosines are of",
    default="approximate",
    choices=("approximate", "exact"),
    measured=True,
)
ENERGY = Knob(
    "energy",
    "number",
    "share of ||V||^2 that the exact projector keeps",
    low=0.0,
    high=1.0,
    open_ends=True,
    shown_default=f"{DEFAULT_ENERGY} with exact",
    measured=True,
)
GATE = (THRESHOLD, MODULES, PROJECTOR, ENERGY)


class Gated(Method):
    """A defence that changes the modules whose cos(C B A, B A) is low: at or below a threshold, or
    the lowest ones by number. C is that of `projector`.
    """

    knobs: ClassVar[tuple[Knob, ...]] = GATE
    shares_projection: ClassVar[bool] = True

    def filled(self, values: Values) -> Values:
        """Raises ProjectionError as the settings of `ebbline project` do."""
        threshold, modules = rule_of(values)
        found = checked(
            "",
            "",
            threshold,
            modules,
            cast(Literal["approximate", "exact"], values["projector"]),
            cast(float | None, values["energy"]),
        )
        return {**values, "threshold": found.threshold, "energy": found.energy}

    def chosen(self, rows: Mapping[str, ModuleRow], setting: Values) -> frozenset[str]:
        return chosen(rows, *rule_of(setting))


def rule_of(values: Values) -> tuple[float | None, int | None]:
    """(threshold, modules) of a setting."""
    return cast(float | None, values["threshold"]), cast(int | None, values["modules"])
