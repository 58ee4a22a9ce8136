"""The new updates of one adapter at one setting, under a defence or one of its controls."""

from collections.abc import Callable, Mapping

from ebbline.tasks.defences.computing.factors import Factors
from ebbline.tasks.defences.controls.control import Control
from ebbline.tasks.defences.gate import ModuleRow
from ebbline.tasks.defences.methods.knobs import Values
from ebbline.tasks.defences.methods.method import Measured, Method


def new_updates(
    method: Method,
    setting: Values,
    rows: Mapping[str, ModuleRow],
    measured: Callable[[str], Measured],
    control: Control | None = None,
    draw: int = 0,
) -> dict[str, Factors]:
    """Module -> its new update, of the modules that change. `measured` gives one module.

    Raises ProjectionError for a setting that is impossible for this adapter.
    """
    take = frozenset(
        module
        for module in method.chosen(rows, setting)
        if method.changes(measured(module), setting)
    )
    if control is not None:
        take = control.chosen(take, rows, draw)
    found = dict[str, Factors]()
    for module in sorted(take):
        each = measured(module)
        found[module] = (
            method.defended(each, setting)
            if control is None
            else control.controlled(method, each, setting, draw)
        )
    return found
