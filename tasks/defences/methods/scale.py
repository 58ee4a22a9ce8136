"""Scaling: shorten every update by one factor. Imports no torch."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ebbline.tasks.defences.computing.draws import module_type
from ebbline.tasks.defences.gate import ModuleRow
from ebbline.tasks.defences.methods.knobs import Knob, Values
from ebbline.tasks.defences.methods.method import Measured, Method
from ebbline.tasks.errors import ProjectionError

if TYPE_CHECKING:
    from ebbline.tasks.defences.computing.factors import Factors


class ScaleUpdates(Method):
    """B <- factor * B in all modules, or in those of the module types `types`.

    Source: the weights W_aligned + factor * dW are the interpolation of the tuned with the aligned
    model, as in arXiv 2412.19512. It reads no model: a factor is the same everywhere.

    Knobs: factor from 0 (the aligned model) to 1 (the adapter, bit for bit); types, such as
    q_proj,v_proj. Shapes: B stays (O, R). Errors: ProjectionError for a type that the adapter
    lacks.
    """

    name = "scale"
    formula = "B <- factor * B"
    source = "weight interpolation, as in arXiv 2412.19512"
    knobs = (
        Knob("factor", "number", "what B is multiplied by", default=0.5, low=0.0, high=1.0),
        Knob(
            "types",
            "text",
            "only these module types, such as q_proj,v_proj",
            default="",
            shown_default="all",
        ),
    )
    reads_models = False

    def chosen(self, rows: Mapping[str, ModuleRow], setting: Values) -> frozenset[str]:
        types = [each.strip() for each in str(setting["types"]).split(",") if each.strip()]
        present = sorted({module_type(module) for module in rows})
        unknown = sorted(set(types) - set(present))
        if unknown:
            raise ProjectionError(
                f"the adapter has no module of type {unknown[0]!r}; it has {', '.join(present)}"
            )
        if self.is_off(setting):
            return frozenset()
        return frozenset(each for each in rows if not types or module_type(each) in types)

    def is_off(self, setting: Values) -> bool:
        return setting["factor"] == 1.0

    def strength(self, setting: Values) -> float:
        factor = setting["factor"]
        assert isinstance(factor, float)
        return 1.0 - factor

    def defended(self, module: Measured, setting: Values) -> "Factors":
        factor = setting["factor"]
        assert isinstance(factor, float)
        return module.update.times(factor)
