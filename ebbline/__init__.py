"""How far do a chat model's refusals ebb when it is fine-tuned, and what brings them back?

Three commands work from Python too, with no study, store or cluster:

    from ebbline import defend, evaluate, project
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ebbline.commands.defended.defend import defend
    from ebbline.commands.evaluate import evaluate
    from ebbline.commands.project import project

__all__ = ["defend", "evaluate", "project"]
_HOMES = {"defend": "defended.defend"}


def __getattr__(name: str) -> Any:
    """Import a command on first use: both import torch."""
    if name not in __all__:
        raise AttributeError(f"module 'ebbline' has no attribute {name!r}")
    return getattr(import_module(f"ebbline.commands.{_HOMES.get(name, name)}"), name)
