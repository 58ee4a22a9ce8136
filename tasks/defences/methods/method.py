"""The interface of a post-hoc defence, for one module at a time. Imports no torch.

A defence works in two steps, so that many settings cost one reading of the models:

    step      per                 a defence says
    measure   module and adapter  what to keep of the models' weights (`measure`)
    make      setting             which modules change (`chosen`), and to what (`defended`)

A control (ebbline.tasks.defences.controls) reuses both steps of its partner.

In a study both steps are stages (ebbline.tasks.defences.method_defence): `measure` runs once for
each adapter, and `chosen`, `changes` and `defended` get a setting without its `measured` knobs.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from ebbline.tasks.defences.gate import ModuleRow
from ebbline.tasks.defences.methods.knobs import Knob, Values

if TYPE_CHECKING:  # torch and all that imports it
    import torch

    from ebbline.tasks.defences.computing.directions import Directions
    from ebbline.tasks.defences.computing.factors import Factors
    from ebbline.tasks.defences.projectors import Projection, Update

Tensors = Mapping[str, "torch.Tensor"]
PROJECTED = "projected"
"""The name of the kept tensor C B."""


@dataclass
class ReadModule:
    """One module's weights, while they are in memory. `device` is where to compute."""

    module: str
    base_OI: "torch.Tensor"
    aligned_OI: "torch.Tensor"
    device: str = "cpu"
    _directions: "Directions | None" = field(default=None, repr=False)
    _count: int = 0

    def directions(self, count: int) -> "Directions":
        """The leading directions of aligned - base, computed once for all adapters."""
        from ebbline.tasks.defences.computing.directions import leading_directions  # torch

        if self._directions is None or self._count < count:
            self._directions, self._count = (
                leading_directions(self.module, self.base_OI, self.aligned_OI, count, self.device),
                count,
            )
        return self._directions.first(count)


@dataclass(frozen=True)
class Measured:
    """One adapter's module after the models were read: its update, and what `measure` kept.

    `safety` is the safety adapter's update, for a defence that reads one.
    """

    module: str
    update: "Factors"
    kept: Tensors
    safety: "Factors | None" = None


class Method(ABC):
    """A defence. Its class docstring has the formula, the source, shapes and errors.

    `controls` are the names of the controls that it may stand beside. `reads_models` says whether
    it needs base and aligned weights, `reads_safety` whether it needs a safety adapter.
    `shares_projection` says that Safe LoRA's measurement is enough: each module's cosine and C B.
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    source: ClassVar[str]
    knobs: ClassVar[tuple[Knob, ...]]
    reads_models: ClassVar[bool] = True
    reads_safety: ClassVar[bool] = False
    shares_projection: ClassVar[bool] = False
    controls: ClassVar[tuple[str, ...]] = ()

    def filled(self, values: Values) -> Values:
        """The values with defaults that depend on others. Raises ProjectionError for knobs that
        cannot be combined.
        """
        return values

    def measure(
        self,
        read: ReadModule,
        update: "Update",
        projection: "Projection",
        settings: Sequence[Values],
    ) -> Tensors:
        """What to keep of a module for every setting. Float32 or float64, on the CPU."""
        return {}

    @abstractmethod
    def chosen(self, rows: Mapping[str, ModuleRow], setting: Values) -> frozenset[str]:
        """The modules that a setting changes. Raises ProjectionError for an impossible setting."""

    def changes(self, module: Measured, setting: Values) -> bool:
        """Whether a setting changes a chosen module, once it is measured."""
        return True

    def is_off(self, setting: Values) -> bool:
        """Whether a setting leaves every adapter unchanged, bit for bit."""
        return False

    def strength(self, setting: Values) -> float:
        """How much a setting changes, from 0 to 1, for a search that compares settings. Of a gated
        defence, the share of changed modules is used instead.
        """
        return 0.0 if self.is_off(setting) else 1.0

    @abstractmethod
    def defended(self, module: Measured, setting: Values) -> "Factors":
        """The new update of a chosen module, computed in float32."""

    @property
    def needs(self) -> str:
        """The inputs beside the adapter, in words."""
        models = ["base", "aligned"] if self.reads_models else []
        return ", ".join([*models, *(["safety adapter"] if self.reads_safety else [])]) or "nothing"
