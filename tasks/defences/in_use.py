"""The defences that a study may name, and the defence of an axis. Imports no torch."""

from collections.abc import Mapping

from ebbline.tasks.defences.defence import Defence
from ebbline.tasks.defences.method_defence import NONE, MethodDefence, NoDefence
from ebbline.tasks.defences.methods.registry import METHODS
from ebbline.tasks.defences.safe_lora import SAFE_LORA

AXIS = "defence"
"""The axis with the name of a point's defence. A point without it has Safe LoRA."""
DEFENCES: Mapping[str, Defence] = {
    defence.name: defence
    for defence in (
        NoDefence(),
        SAFE_LORA,
        *(MethodDefence(method) for method in METHODS if method.name != SAFE_LORA.name),
    )
}

KINDS = frozenset(kind for defence in DEFENCES.values() for kind in defence.kinds)
"""The kinds of all their stages."""
MAKERS = frozenset(defence.makes.KIND for defence in DEFENCES.values())
"""The kinds of the stages that write a defended adapter."""


def is_knob(axis: str) -> bool:
    """Whether an axis is a knob of any defence: its values share one training and measurement."""
    return any(defence.is_knob(axis) for defence in DEFENCES.values())


def owns(axis: str) -> bool:
    """Whether an axis is `defence`, or a knob or another setting of any defence."""
    return axis == AXIS or any(defence.owns(axis) for defence in DEFENCES.values())


def owner(axis: str) -> Defence | None:
    """The defence of a knob or setting; None for an axis of no single defence."""
    return next((defence for defence in DEFENCES.values() if defence.owns(axis)), None)


__all__ = ["AXIS", "DEFENCES", "KINDS", "MAKERS", "NONE", "is_knob", "owner", "owns"]
