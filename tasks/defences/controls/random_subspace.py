"""Is it alignment's direction? Project onto random directions instead. Imports no torch."""

from typing import TYPE_CHECKING

from ebbline.tasks.defences.controls.control import Control
from ebbline.tasks.defences.methods.knobs import Values
from ebbline.tasks.defences.methods.method import Measured, Method
from ebbline.tasks.errors import ProjectionError

if TYPE_CHECKING:
    from ebbline.tasks.defences.computing.factors import Factors


def rotated(draw: int) -> str:
    """The name of the kept tensor Q C Q^T B of a draw."""
    return f"rotated-{draw}"


class RandomSubspace(Control):
    """B <- a Q C Q^T B in the partner's modules, with Q a uniform random rotation.

    Q C Q^T has C's spectrum and random directions. For the exact projector it is the projection
    onto a uniform random subspace of as many columns. Q is never formed; see
    ebbline.tasks.defences.computing.rotation. The gate is the partner's. The factor
    a = ||C B A||_F / ||Q C Q^T B A||_F of each module gives the partner's norm, to 1e-6 in float32.

    Q is one for each module, draw and adapter. Raises ProjectionError when the rotated projection
    removes an update that the partner's does not.
    """

    name = "random_subspace"
    formula = "B <- a Q C Q^T B, Q a random rotation, a for the partner's ||C B A||"
    question = "do alignment's directions matter, or would any do?"
    drawn = True
    rotates = True

    def controlled(
        self, partner: Method, module: Measured, setting: Values, draw: int
    ) -> "Factors":
        from ebbline.tasks.defences.computing.factors import norm  # torch

        turned = module.update.with_b(module.kept[rotated(draw)])
        wanted, found = norm(partner.defended(module, setting)), norm(turned)
        if wanted and not found:
            raise ProjectionError(
                f"{module.module}: draw {draw} of the random subspace removes the whole update, so "
                "it has no norm to match"
            )
        return turned.times(wanted / found if found else 0.0)
