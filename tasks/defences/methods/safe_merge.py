"""SafeMERGE, exact in dW: merge low-cosine updates with a safety adapter. Imports no torch."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ebbline.tasks.defences.gate import ModuleRow
from ebbline.tasks.defences.methods.gated import GATE, Gated
from ebbline.tasks.defences.methods.knobs import Knob, Values
from ebbline.tasks.defences.methods.method import Measured
from ebbline.tasks.errors import ProjectionError

if TYPE_CHECKING:
    from ebbline.tasks.defences.computing.factors import Factors


class MergeSafety(Gated):
    """dW <- (1 - w) dW + w dW_safe in the modules that Safe LoRA's gate chooses.

    Source: SafeMERGE, arXiv 2503.17239; the safety adapter is trained once a base, on data that the
    user brings. The sum is exact in dW: B' = [(1-w) s B, w s_safe B_safe] and A' = [A; A_safe],
    with both scales s = alpha / r baked in. Shapes: the rank becomes R + R_safe, and R_safe for
    w = 1.

    The published code differs in three ways. It merges by PEFT's `linear`, which adds sqrt(w_i s_i)
    times A and B separately, so dW gets the cross terms B A_safe and B_safe A. Its gate is a strict
    `<`, on a cosine rounded to 5 decimals. Its README uses threshold 0.35 and w 0.2.

    Knobs: weight w, from 0 (the adapter) to 1 (the safety adapter); threshold, or modules. Errors:
    ProjectionError when the safety adapter lacks a chosen module or has another shape there.
    """

    name = "safe_merge"
    formula = "dW <- (1-w) dW + w dW_safe where cos(C B A, B A) <= threshold"
    source = "arXiv 2503.17239; exact in dW, unlike its code"
    knobs = (Knob("weight", "number", "the share w of the safety adapter", 0.2, 0.0, 1.0), *GATE)
    reads_safety = True
    controls = ("shrink_matched", "random_modules")

    def chosen(self, rows: Mapping[str, ModuleRow], setting: Values) -> frozenset[str]:
        return frozenset() if self.is_off(setting) else super().chosen(rows, setting)

    def is_off(self, setting: Values) -> bool:
        return setting["weight"] == 0.0

    def defended(self, module: Measured, setting: Values) -> "Factors":
        weight = setting["weight"]
        assert isinstance(weight, float)
        if module.safety is None:
            raise ProjectionError(
                f"the safety adapter has no update of {module.module}; train it on the modules "
                "that the adapter has"
            )
        if weight == 1.0:
            return module.safety
        safety = module.safety.baked().times(weight)
        return module.update.baked().times(1.0 - weight).joined(safety)
