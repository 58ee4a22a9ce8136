"""The settings of the command `ebbline project`, checked before any work. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from ebbline.tasks.defences.gate import ModuleRow, chosen, cosines_by_module
from ebbline.tasks.errors import ProjectionError

DEFAULT_THRESHOLD = 0.5
DEFAULT_ENERGY = 0.9
T = TypeVar("T", float, int)


@dataclass(frozen=True)
class Settings:
    """The settings of a projection. `threshold` projects the modules with a cosine at or below it,
    `modules` that many modules of lowest cosine.

    `energy` is the share of ||aligned - base||_F^2 that the exact projector keeps. It is None for
    the approximate projector.
    """

    base: str
    aligned: str
    projector: Literal["approximate", "exact"]
    threshold: float | None
    modules: int | None
    energy: float | None

    @property
    def rule(self) -> str:
        """The chosen modules in words."""
        return (
            f"the {self.modules} of lowest cosine"
            if self.threshold is None
            else f"modules with a cosine <= {self.threshold:g}"
        )

    @property
    def name(self) -> str:
        """The rule as the name of a folder."""
        return (
            f"modules-{self.modules}" if self.threshold is None else f"threshold-{self.threshold}"
        )

    @property
    def drawn(self) -> list[float]:
        """The used thresholds, which a figure over all thresholds marks."""
        return [] if self.threshold is None else [self.threshold]

    def chosen(self, rows: Mapping[str, ModuleRow]) -> frozenset[str]:
        """The modules to project. Raises ProjectionError as `gate.chosen` does."""
        return chosen(rows, self.threshold, self.modules)


def each_checked(
    base: str,
    aligned: str,
    threshold: float | Sequence[float] | None,
    modules: int | Sequence[int] | None,
    projector: Literal["approximate", "exact"],
    energy: float | None,
) -> list[Settings]:
    """The settings of each threshold, or of each number of modules; the default without either.

    Raises ProjectionError for invalid settings, for both rules, and for a duplicate value.
    """
    thresholds, counts = _listed(threshold), _listed(modules)
    if thresholds and counts:
        raise ProjectionError("give a threshold or a number of modules, not both")
    for values in (thresholds, counts):
        for index, value in enumerate(values):
            if value in values[:index]:
                raise ProjectionError(f"{value} is given twice; each value has one outcome")
    rules: list[tuple[float | None, int | None]] = [(value, None) for value in thresholds]
    rules += [(None, count) for count in counts]
    return [
        checked(base, aligned, value, count, projector, energy)
        for value, count in rules or [(None, None)]
    ]


def _listed(given: T | Sequence[T] | None) -> list[T]:
    if given is None:
        return []
    return list(given) if isinstance(given, Sequence) else [given]


def checked(
    base: str,
    aligned: str,
    threshold: float | None,
    modules: int | None,
    projector: Literal["approximate", "exact"],
    energy: float | None,
) -> Settings:
    """Settings with defaults filled in. Raises ProjectionError for invalid settings."""
    if projector not in ("approximate", "exact"):
        raise ProjectionError(f"no projector {projector!r}; choose 'approximate' or 'exact'")
    if threshold is not None and modules is not None:
        raise ProjectionError("give a threshold or a number of modules, not both")
    if threshold is not None and not -1.0 <= threshold <= 1.0:
        raise ProjectionError(f"the threshold must be a cosine from -1 to 1, not {threshold:g}")
    if modules is not None and (
        isinstance(modules, bool) or not isinstance(modules, int) or modules < 0
    ):
        raise ProjectionError(f"the number of modules must be an integer from 0, not {modules}")
    if projector == "approximate" and energy is not None:
        raise ProjectionError(
            "energy is a setting of the exact projector; leave it out for the approximate one"
        )
    if projector == "exact":
        energy = DEFAULT_ENERGY if energy is None else energy
        if not 0.0 < energy < 1.0:
            raise ProjectionError(f"energy must be a share above 0 and below 1, not {energy:g}")
    if threshold is None and modules is None:
        threshold = DEFAULT_THRESHOLD
    return Settings(base, aligned, projector, threshold, modules, energy)


def lowest_threshold_hint(rows: Mapping[str, ModuleRow]) -> str:
    """A hint when no module was projected: the lowest threshold that projects one.

    Empty when no module has a cosine.
    """
    cosines = cosines_by_module(rows).values()
    if not cosines:
        return ""
    first = math.ceil(min(cosines) * 1e4) / 1e4  # rounded up, so that it projects the module
    return f"no module was projected; thresholds from {first:.4f} on project at least one"
