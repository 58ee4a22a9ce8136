"""The names of defences and controls in sentences, tables and figures."""

from ebbline.tasks.defences.in_use import DEFENCES

EQUAL_NORM = "shrink_matched"
"""The control with its partner's norm in each module, and nothing else."""
CONTROL_WORDS = {
    EQUAL_NORM: "shrinking the same modules to the same length",
    "random_subspace": "projecting them onto a random subspace, to the same length",
    "random_modules": "the same change in random modules",
}


def defence_label(name: str) -> str:
    return DEFENCES[name].words.name if name in DEFENCES else name


def control_label(name: str) -> str:
    return CONTROL_WORDS.get(name, name.replace("_", " "))
