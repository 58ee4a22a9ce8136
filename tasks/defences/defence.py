"""A defence: a change of a trained adapter after its training, with one knob or more.

The search, the plan, the tables and the figures know a defence by this interface alone. A defence
has two stages. The first measures an adapter, and no knob changes what it finds. The second makes
the defended adapter; its settings are the knobs. An axis is called after its stage:

    axis        belongs to              of Safe LoRA
    knob        the stage `makes`       apply.threshold
    setting     the stage `measures`    project.projector

Invariant: two settings of the knobs that have the same outcome give the same adapters, bit for bit.
Imports no torch: the transform itself is in modules of its own.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ebbline.tasks.specs import Spec, TrainSpec

Setting = None | bool | int | float | str
Reading = NDArray[np.float64]
"""What the first stage found of one adapter, as far as the knobs depend on it; ascending."""
Outcome = tuple[float, ...]
"""What knobs come to for each of several adapters: equal outcomes are equal adapters."""
File = Callable[[str], Path]
"""Where a stage's file is, by its name. Of a remote store nothing else is fetched."""


@dataclass(frozen=True)
class Words:
    """How a defence is called in figures and tables.

    `share` is the column that holds the share of modules it changed. `knob` and `short_knob` label
    the axis that results are drawn along, `along` is its name in a sentence, and `against` says
    what such a figure shows.
    """

    name: str
    share: str
    knob: str
    short_knob: str
    along: str
    against: str


class Defence(ABC):
    """See the module. `kinds` are those of all its stages, `main_knob` is the axis that results are
    drawn along.
    """

    measures: type[Spec]
    makes: type[Spec]
    kinds: tuple[str, ...]
    main_knob: str
    words: Words

    def is_knob(self, axis: str) -> bool:
        return axis.partition(".")[0] == self.makes.KIND

    def owns(self, axis: str) -> bool:
        """Whether an axis is a knob or another setting of this defence."""
        return axis.partition(".")[0] in (self.measures.KIND, self.makes.KIND)

    def knobs(self, fixed: Spec, values: Mapping[str, Setting]) -> dict[str, Setting]:
        """Axis -> value of every knob: those of a point, else what the study has fixed."""
        kind = self.makes.KIND
        named = {f"{kind}.{name}": getattr(fixed, name) for name in self.makes.model_fields}
        return {axis: values.get(axis, value) for axis, value in named.items()}

    @abstractmethod
    def shared(self, settings: Spec, train: TrainSpec) -> Spec | None:
        """What the first stage reads beside the adapter: a stage over the base and the aligned
        model that all adapters share, by its Spec; None when it reads the two models themselves.
        """

    @abstractmethod
    def measured(self, file: File) -> Reading:
        """What a first stage wrote."""

    @abstractmethod
    def is_possible(self, knobs: Mapping[str, Setting]) -> bool:
        """False for knobs that exclude each other."""

    @abstractmethod
    def is_off(self, knobs: Mapping[str, Setting]) -> bool:
        """Whether knobs leave every adapter as it was trained."""

    @abstractmethod
    def outcome(self, knobs: Mapping[str, Setting], adapters: Sequence[Reading]) -> Outcome | None:
        """Which settings give the same adapters; None for knobs that one of them cannot have."""

    @abstractmethod
    def share(self, outcome: Outcome, adapters: Sequence[Reading]) -> float:
        """The share of modules that an outcome changes, over all adapters."""

    @abstractmethod
    def edges(self, axis: str, adapters: Sequence[Reading]) -> Sequence[float] | None:
        """The values of a knob, ascending, at which the outcome changes; None for a knob of which
        each whole number is an outcome.
        """

    @abstractmethod
    def rules(self, used: Mapping[str, str]) -> Sequence[str]:
        """Sentences for a paper: which modules it changes, by the values that each knob took."""

    @abstractmethod
    def which(self, knobs: Mapping[str, Setting]) -> str:
        """The modules that one setting of the knobs changes: "cosine at or below 0.4"."""

    @abstractmethod
    def changed(self, measured: File, made: File) -> tuple[int, int]:
        """How many modules of an adapter changed, and how many it has: from what both stages
        wrote.
        """
