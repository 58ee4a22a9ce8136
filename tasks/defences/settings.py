"""The settings of Safe LoRA by itself, checked before any work is done. Imports no torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ebbline.tasks.defences.gate import ModuleRow, chosen, known_cosines
from ebbline.tasks.errors import ProjectionError

DEFAULT_THRESHOLD = 0.5
DEFAULT_ENERGY = 0.9


@dataclass(frozen=True)
class Settings:
    """How adapters are projected. `threshold` takes the modules whose cosine is at or below it,
    `modules` the n lowest.

    `energy` is the share of ||aligned - base||_F^2 that the exact projector keeps, None for the
    approximate one.
    """

    base: str
    aligned: str
    projector: Literal["approximate", "exact"]
    threshold: float | None
    modules: int | None
    energy: float | None

    @property
    def rule(self) -> str:
        return (
            f"the {self.modules} of lowest cosine"
            if self.threshold is None
            else f"modules with a cosine <= {self.threshold:g}"
        )

    @property
    def drawn(self) -> list[float]:
        """The values that a figure over all thresholds marks as used."""
        return [] if self.threshold is None else [self.threshold]

    def chosen(self, rows: Mapping[str, ModuleRow]) -> frozenset[str]:
        """The modules that take C B."""
        return chosen(rows, self.threshold, self.modules)


def checked(
    base: str,
    aligned: str,
    threshold: float | None,
    modules: int | None,
    projector: Literal["approximate", "exact"],
    energy: float | None,
) -> Settings:
    """Settings with their defaults. Raises ProjectionError for those that cannot be."""
    if projector not in ("approximate", "exact"):
        raise ProjectionError(f"no projector {projector!r}; there are 'approximate' and 'exact'")
    if threshold is not None and modules is not None:
        raise ProjectionError("give a threshold or a number of modules, not both")
    if threshold is not None and not -1.0 <= threshold <= 1.0:
        raise ProjectionError(f"the threshold is a cosine, from -1 to 1; {threshold:g} is not")
    if modules is not None and (
        isinstance(modules, bool) or not isinstance(modules, int) or modules < 0
    ):
        raise ProjectionError(f"{modules} is no number of modules")
    if projector == "approximate" and energy is not None:
        raise ProjectionError(
            "energy belongs to the exact projector; the approximate one has no such share"
        )
    if projector == "exact":
        energy = DEFAULT_ENERGY if energy is None else energy
        if not 0.0 < energy < 1.0:
            raise ProjectionError(
                f"energy is a share between 0 and 1, both excluded; {energy:g} is not"
            )
    if threshold is None and modules is None:
        threshold = DEFAULT_THRESHOLD
    return Settings(base, aligned, projector, threshold, modules, energy)


def first_taken(rows: Mapping[str, ModuleRow]) -> str:
    """What to say where no module was projected; empty when no threshold would project one."""
    known = known_cosines(rows).values()
    if not known:
        return ""
    first = math.ceil(min(known) * 1e4) / 1e4  # rounded up: it must project that module
    return f"no module was projected; from a threshold of {first:.4f} on, the first one is"
