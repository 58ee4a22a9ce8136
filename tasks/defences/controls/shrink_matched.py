"""Is it only the length? Shrink each update as much as the partner does. Imports no torch."""

from typing import TYPE_CHECKING

from ebbline.tasks.defences.controls.control import Control
from ebbline.tasks.defences.methods.knobs import Values
from ebbline.tasks.defences.methods.method import Measured, Method

if TYPE_CHECKING:
    from ebbline.tasks.defences.computing.factors import Factors


class ShrinkMatched(Control):
    """B <- a B in the partner's modules, with a = ||dW'||_F / ||dW||_F of each module.

    dW' is the partner's update, C B A for Safe LoRA. So ||a B A||_F = ||C B A||_F, to 1e-6 in
    float32. Norms are of B A, not of B. An update of zero stays zero.
    """

    name = "shrink_matched"
    formula = "B <- B * ||dW'|| / ||dW||, dW' the partner's"
    question = "does it do more than shrinking each module by as much?"

    def controlled(
        self, partner: Method, module: Measured, setting: Values, draw: int
    ) -> "Factors":
        from ebbline.tasks.defences.computing.factors import norm  # torch

        before, after = norm(module.update), norm(partner.defended(module, setting))
        return module.update.times(after / before if before else 0.0)
