"""The list of controls. Imports no torch."""

from collections.abc import Sequence

from ebbline.tasks.defences.controls.control import Control
from ebbline.tasks.defences.controls.random_modules import RandomModules
from ebbline.tasks.defences.controls.random_subspace import RandomSubspace
from ebbline.tasks.defences.controls.shrink_matched import ShrinkMatched
from ebbline.tasks.defences.methods.method import Method
from ebbline.tasks.errors import ProjectionError

CONTROLS: tuple[Control, ...] = (ShrinkMatched(), RandomSubspace(), RandomModules())
DRAWS = 3
"""Draws of each random control, unless a user gives another number."""


def controls_of(method: Method) -> Sequence[Control]:
    """The controls that stand beside a defence."""
    return [control for control in CONTROLS if control.name in method.controls]


def control_named(name: str) -> Control:
    """Raises ProjectionError for an unknown name."""
    for control in CONTROLS:
        if control.name == name:
            return control
    raise ProjectionError(
        f"no control {name!r}; there are {', '.join(each.name for each in CONTROLS)}"
    )
