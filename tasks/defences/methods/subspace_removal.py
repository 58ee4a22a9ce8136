"""Removal of anti-alignment components: undo what an update undoes. Imports no torch."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ebbline.tasks.defences.gate import ModuleRow
from ebbline.tasks.defences.methods.knobs import Knob, Values
from ebbline.tasks.defences.methods.method import Measured, Method, ReadModule, Tensors

if TYPE_CHECKING:
    from ebbline.tasks.defences.computing.factors import Factors
    from ebbline.tasks.defences.projectors import Projection, Update

LEFT, RIGHT, COMPONENTS = "left", "right", "components"


class RemoveDirections(Method):
    """dW <- dW - sum c_i u_i w_i^T over those of V's k leading directions with c_i < 0.

    V_OI = W_aligned - W_base = sum s_i u_i w_i^T, largest s_i first, and c_i = u_i^T dW w_i.
    Alignment moved the model by s_i > 0 along u_i w_i^T, so a negative c_i undoes alignment there.
    The u_i w_i^T are orthonormal, so every c_i of the result is zero or positive, up to the
    rounding of the adapter's dtype. It is ebbline's own: V's length does not matter, and what
    points with alignment stays, unlike under Safe LoRA's C. The directions themselves are those of
    LoX's SVD_k(V).

    Knob: k, from 0 (the adapter); all modules. Shapes: B' = [B, -c_i u_i], A' = [A; w_i^T], of rank
    R plus the number of removed directions, at most R + k. The scale is unchanged. Errors:
    ProjectionError for weights that are not finite and shapes that do not fit. Costs an
    eigendecomposition of V's smaller Gram matrix in float64 for each module.
    """

    name = "subspace_removal"
    formula = "dW <- dW - sum c_i u_i w_i^T over c_i = u_i^T dW w_i < 0, i <= k"
    source = "ebbline's; u_i, w_i as in arXiv 2506.15606"
    knobs = (
        Knob(
            "k",
            "count",
            "how many leading directions of V are looked at",
            8,
            low=0,
            measured_to_largest=True,
        ),
    )
    controls = ("shrink_matched",)

    def measure(
        self,
        read: ReadModule,
        update: "Update",
        projection: "Projection",
        settings: Sequence[Values],
    ) -> Tensors:
        most = max(_k(setting) for setting in settings)
        if most == 0 or projection.cosine is None:
            return {}
        found = read.directions(most)
        return {
            LEFT: found.left_OK.contiguous(),
            RIGHT: found.right_KI,
            COMPONENTS: found.components(update.lora_A_RI, update.lora_B_OR),
        }

    def chosen(self, rows: Mapping[str, ModuleRow], setting: Values) -> frozenset[str]:
        if self.is_off(setting):
            return frozenset()
        return frozenset(module for module, row in rows.items() if row.cosine is not None)

    def is_off(self, setting: Values) -> bool:
        return _k(setting) == 0

    def strength(self, setting: Values) -> float:
        return _k(setting) / (_k(setting) + 8)

    def changes(self, module: Measured, setting: Values) -> bool:
        return bool((module.kept[COMPONENTS][: _k(setting)] < 0).any())

    def defended(self, module: Measured, setting: Values) -> "Factors":
        components_K = module.kept[COMPONENTS][: _k(setting)]
        negative_K = (components_K < 0).nonzero().flatten()
        removed_K = components_K[negative_K]
        b_OK = -module.kept[LEFT][:, negative_K] * removed_K
        return module.update.joined(
            type(module.update)(module.kept[RIGHT][negative_K], b_OK, module.update.scale)
        )


def _k(setting: Values) -> int:
    value = setting["k"]
    assert isinstance(value, int)
    return value
