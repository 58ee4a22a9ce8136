"""The interface of a defence: a change of an adapter after its training, with one or more knobs.

Search, plans and tables use a defence only through this interface. The figures and the report of a
projection also show the cosines of Safe LoRA (ebbline.tasks.defences.gate).

A defence has two stages. The first measures an adapter and does not depend on the knobs. The second
makes the defended adapter; its settings are the knobs. The name of an axis begins with its stage:

    axis        belongs to              of Safe LoRA
    knob        the stage `makes`       apply.threshold
    setting     the stage `measures`    project.projector

Invariant: knobs with the same mask give the same adapters, bit for bit. Imports no torch; the
computation is in other modules.
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
"""The measured values of one adapter that the effect of the knobs depends on, ascending."""
Mask = tuple[float, ...]
"""The effect of the knobs, one number for each adapter. Equal masks give equal adapters."""
File = Callable[[str], Path]
"""The path of a stage's file, by the file's name. From a remote store only this file is fetched."""


@dataclass(frozen=True)
class Words:
    """The names of a defence in figures and tables.

    `share` is the column with the share of changed modules. `knob` and `short_knob` label the axis
    of the main knob, `along` names it in a sentence, and `against` is the caption of such a figure.
    """

    name: str
    share: str
    knob: str
    short_knob: str
    along: str
    against: str


class Defence(ABC):
    """A defence. `kinds` are the kinds of its stages; figures show results along `main_knob`.

    The stage `makes` reads the output of the stage `measures` as its input `measured_input`.
    """

    measures: type[Spec]
    makes: type[Spec]
    measured_input: str
    kinds: tuple[str, ...]
    main_knob: str
    words: Words

    def is_knob(self, axis: str) -> bool:
        """Whether an axis is a knob of this defence."""
        return axis.partition(".")[0] == self.makes.KIND

    def owns(self, axis: str) -> bool:
        """Whether an axis is a knob or another setting of this defence."""
        return axis.partition(".")[0] in (self.measures.KIND, self.makes.KIND)

    def knobs(self, fixed: Spec, values: Mapping[str, Setting]) -> dict[str, Setting]:
        """Axis -> value of every knob: the point's value, else the study's fixed value."""
        kind = self.makes.KIND
        named = {f"{kind}.{name}": getattr(fixed, name) for name in self.makes.model_fields}
        return {axis: values.get(axis, value) for axis, value in named.items()}

    @abstractmethod
    def shared(self, settings: Spec, train: TrainSpec) -> Spec | None:
        """The Spec of a stage over the base and the aligned model whose output all adapters share.

        None when the first stage reads the two models themselves.
        """

    @abstractmethod
    def reading(self, file: File) -> Reading:
        """Read the measured values from the output of the first stage."""

    @abstractmethod
    def is_possible(self, knobs: Mapping[str, Setting]) -> bool:
        """Whether the knobs can be combined."""

    @abstractmethod
    def is_off(self, knobs: Mapping[str, Setting]) -> bool:
        """Whether the knobs leave every adapter unchanged."""

    @abstractmethod
    def mask(self, knobs: Mapping[str, Setting], adapters: Sequence[Reading]) -> Mask | None:
        """The effect of the knobs on each adapter; None for knobs that are impossible for one."""

    @abstractmethod
    def share(self, mask: Mask, adapters: Sequence[Reading]) -> float:
        """The share of modules that a mask changes, over all adapters."""

    @abstractmethod
    def edges(self, axis: str, adapters: Sequence[Reading]) -> Sequence[float] | None:
        """The values of a knob at which the mask changes, ascending.

        None for a knob with a mask for each integer.
        """

    @abstractmethod
    def rules(self, used: Mapping[str, str]) -> Sequence[str]:
        """Sentences for a paper that state which modules are changed. `used` holds each knob's
        values.
        """

    @abstractmethod
    def which(self, knobs: Mapping[str, Setting]) -> str:
        """The modules that one setting of the knobs changes, as "cosine at or below 0.4"."""

    @abstractmethod
    def changed(self, measured_file: File, made_file: File) -> tuple[int, int]:
        """(changed modules, all modules) of an adapter, from the files of both stages."""
