"""The list of defences. A new one is a file, and a line here. Imports no torch."""

from ebbline.tasks.defences.methods.drop import DropModules
from ebbline.tasks.defences.methods.method import Method
from ebbline.tasks.defences.methods.safe_lora import ProjectUpdates
from ebbline.tasks.defences.methods.safe_merge import MergeSafety
from ebbline.tasks.defences.methods.scale import ScaleUpdates
from ebbline.tasks.defences.methods.subspace_removal import RemoveDirections
from ebbline.tasks.errors import ProjectionError

METHODS: tuple[Method, ...] = (
    ProjectUpdates(),
    ScaleUpdates(),
    DropModules(),
    MergeSafety(),
    RemoveDirections(),
)


def method_named(name: str) -> Method:
    """Raises ProjectionError for an unknown name."""
    for method in METHODS:
        if method.name == name:
            return method
    raise ProjectionError(
        f"no method {name!r}; there are {', '.join(each.name for each in METHODS)}"
    )
