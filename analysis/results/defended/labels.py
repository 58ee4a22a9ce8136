"""The names of defences and controls in sentences, tables and figures."""

from ebbline.sweeps.study.study import Study
from ebbline.tasks.defences.in_use import DEFENCES

EQUAL_NORM = "shrink_matched"
"""The control with its partner's norm in each module, and nothing else."""
CONTROL_WORDS = {
    EQUAL_NORM: "shrinking to the same length",
    "random_subspace": "a random subspace",
    "random_modules": "random modules",
}
CONTROLS_EXPLAINED = (
    "Shrinking to the same length scales the update of each module that the defence changed to the "
    "length that the defence leaves it. A random subspace takes the place of alignment's, at the "
    "same length. Random modules are as many others of each type, changed in the same way."
)


def defence_of_study(study: Study) -> str:
    """The name of a study's defence in a sentence; "a defence" where it has several."""
    own = [each.words.name for each in study.used_defences if each.method is not None]
    return own[0] if len(own) == 1 else "a defence"


def defence_label(name: str) -> str:
    return DEFENCES[name].words.name if name in DEFENCES else name


def control_label(name: str) -> str:
    return CONTROL_WORDS.get(name, name.replace("_", " "))
