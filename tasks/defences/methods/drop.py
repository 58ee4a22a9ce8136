"""Dropping: remove the updates that point away from alignment. Imports no torch."""

from typing import TYPE_CHECKING

from ebbline.tasks.defences.methods.gated import Gated
from ebbline.tasks.defences.methods.knobs import Values
from ebbline.tasks.defences.methods.method import Measured

if TYPE_CHECKING:
    from ebbline.tasks.defences.computing.factors import Factors


class DropModules(Gated):
    """B <- 0 in the modules that Safe LoRA's gate chooses, so these are the aligned model's.

    Source: the idea of arXiv 2506.18931 (leave out the LoRA of some layers), with Safe LoRA's gate.
    Its published code differs: its score compares copies of one pair of matrices, so that the
    spread of the scores is zero, and its shapes are fixed to 4096 and rank 8. It is not followed.

    Knobs: threshold, or modules, as of Safe LoRA; of all modules, the result is the aligned model
    bit for bit. Shapes: B stays (O, R). Errors: as of Safe LoRA.
    """

    name = "drop"
    formula = "B <- 0 where cos(C B A, B A) <= threshold"
    source = "the idea of arXiv 2506.18931, with the gate of arXiv 2405.16833"
    controls = ("random_modules",)

    def defended(self, module: Measured, setting: Values) -> "Factors":
        return module.update.times(0.0)
