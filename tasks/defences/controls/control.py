"""The interface of a control. Imports no torch.

A control answers one question about its partner. It shares the partner's measurement, setting and
gate, so it costs no reading of the models of its own.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from ebbline.tasks.defences.gate import ModuleRow
from ebbline.tasks.defences.methods.knobs import Values
from ebbline.tasks.defences.methods.method import Measured, Method

if TYPE_CHECKING:
    from ebbline.tasks.defences.computing.factors import Factors


class Control(ABC):
    """A control. `drawn` says that it is random, with a number for each draw from 0. `rotates` says
    that each draw needs a rotated projection, which is computed while the models are read.
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    question: ClassVar[str]
    drawn: ClassVar[bool] = False
    rotates: ClassVar[bool] = False

    def chosen(
        self, partner: frozenset[str], rows: Mapping[str, ModuleRow], draw: int
    ) -> frozenset[str]:
        """The modules that it changes; by default those of its partner."""
        return partner

    @abstractmethod
    def controlled(
        self, partner: Method, module: Measured, setting: Values, draw: int
    ) -> "Factors":
        """The new update of a chosen module, in float32."""
