"""Is it the gate? Change as many modules, drawn at random. Imports no torch."""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ebbline.tasks.defences.computing.draws import module_type, order
from ebbline.tasks.defences.controls.control import Control
from ebbline.tasks.defences.gate import ModuleRow
from ebbline.tasks.defences.methods.knobs import Values
from ebbline.tasks.defences.methods.method import Measured, Method

if TYPE_CHECKING:
    from ebbline.tasks.defences.computing.factors import Factors


class RandomModules(Control):
    """The partner's change, C B for Safe LoRA, in as many modules of each module type, drawn at
    random among those with a cosine.

    A draw depends on its number and on the modules' names alone. Its norm is not the partner's.
    """

    name = "random_modules"
    formula = "the partner's change in as many random modules of each type"
    question = "does the choice of modules matter?"
    drawn = True

    def chosen(
        self, partner: frozenset[str], rows: Mapping[str, ModuleRow], draw: int
    ) -> frozenset[str]:
        wanted = Counter(module_type(module) for module in partner)
        able = [module for module, row in rows.items() if row.cosine is not None]
        found: set[str] = set()
        for kind, count in wanted.items():
            of_kind = [module for module in able if module_type(module) == kind]
            found |= set(order(self.name, draw, of_kind)[:count])
        return frozenset(found)

    def controlled(
        self, partner: Method, module: Measured, setting: Values, draw: int
    ) -> "Factors":
        return partner.defended(module, setting)
