"""Safe LoRA: project low-cosine updates onto alignment's subspace. Imports no torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ebbline.tasks.defences.methods.gated import Gated
from ebbline.tasks.defences.methods.knobs import Values
from ebbline.tasks.defences.methods.method import PROJECTED, Measured, ReadModule, Tensors

if TYPE_CHECKING:
    from ebbline.tasks.defences.computing.factors import Factors
    from ebbline.tasks.defences.projectors import Projection, Update


class ProjectUpdates(Gated):
    """B <- C B where cos(C B A, B A) <= threshold, or in the `modules` of lowest cosine.

    Source: Safe LoRA, arXiv 2405.16833, Eq. 2 and 3. With V_OI = W_aligned - W_base,
    C_OO = V V^T / ||V||_F (approximate) or U U^T (exact, U the leading left singular vectors of V
    that hold `energy` of ||V||_F^2). C is never formed; see ebbline.tasks.defences.projectors. The
    approximate C is no projector: its eigenvalues are s_i^2 / ||V||_F, so V times 2 is C times 2.

    Knobs: threshold, or modules. Shapes: B stays (O, R), A is unchanged. Errors: ProjectionError
    for weights that are not finite, shapes that do not fit, and fewer cosines than `modules`.
    """

    name = "safe_lora"
    formula = "B <- C B where cos(C B A, B A) <= threshold"
    source = "arXiv 2405.16833, Eq. 2 and 3"
    controls = ("shrink_matched", "random_subspace", "random_modules")

    def measure(
        self,
        read: ReadModule,
        update: "Update",
        projection: "Projection",
        settings: Sequence[Values],
    ) -> Tensors:
        return {PROJECTED: projection.projected_OR}

    def defended(self, module: Measured, setting: Values) -> "Factors":
        return module.update.with_b(module.kept[PROJECTED])
