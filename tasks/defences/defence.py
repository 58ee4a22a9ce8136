"""The interface of a defence: a change of an adapter after its training, with one or more knobs.

Search, plans and tables use a defence only through this interface. The figures and the report of a
projection also show the cosines of Safe LoRA (ebbline.tasks.defences.gate).

A defence has two stages. The first measures an adapter and does not depend on the knobs. The second
makes the defended adapter; its settings are the knobs. The name of an axis begins with its stage:

    axis        belongs to              of Safe LoRA         of scale
    knob        the stage `makes`       apply.threshold      scale.factor
    setting     the stage `measures`    project.projector

A study that names several defences has one more axis, `defence`, with their names as its values.

Invariant: knobs with the same mask give the same adapters, bit for bit. Imports no torch; the
computation is in other modules.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ebbline.tasks.defences.gate import File, Reading
from ebbline.tasks.defences.methods.method import Method
from ebbline.tasks.specs import DefendSpec, MeasureSpec, Spec, TrainSpec

Setting = None | bool | int | float | str
Mask = tuple[float, ...]
"""The effect of the knobs, one number for each adapter. Equal masks give equal adapters."""


SHARE_COLUMN = "projected_share"
"""The column with the share of modules that a defence changed."""


@dataclass(frozen=True)
class Words:
    """The names of a defence in figures and tables.

    `knob` and `short_knob` label the axis
    of the main knob, `along` names it in a sentence, and `against` is the caption of such a figure.
    """

    name: str
    knob: str
    short_knob: str
    along: str
    against: str


class Defence(ABC):
    """A defence. `kinds` are the kinds of its stages; figures show results along `main_knob`.

    The stage `makes` reads the output of the stage `measures` as its input `measured_input`.
    `method` is what it does to a module, with its controls. `reads_models` says whether the stage
    `measures` reads the base and the aligned model. `adapter_folder` is where `makes` writes the
    adapter.
    """

    name: str
    method: Method | None
    reads_models: bool = True
    adapter_folder: str = ""
    measures: type[Spec]
    makes: type[Spec]
    measured_input: str
    kinds: tuple[str, ...]
    main_knob: str
    words: Words

    @property
    @abstractmethod
    def knob_names(self) -> tuple[str, ...]:
        """The names of its knobs and other settings in a study file."""

    @abstractmethod
    def axis(self, knob: str) -> str:
        """The axis of a knob or another setting, by its name."""

    @abstractmethod
    def is_knob(self, axis: str) -> bool:
        """Whether an axis is a knob of this defence."""

    @abstractmethod
    def owns(self, axis: str) -> bool:
        """Whether an axis is a knob or another setting of this defence."""

    @abstractmethod
    def specs(
        self, fixed: Mapping[str, Setting], largest: Mapping[str, Setting]
    ) -> tuple[Spec, Spec]:
        """The Specs of both stages with a study's fixed settings. `largest` has the largest value
        of each knob that the study varies. Raises ProjectionError or ValidationError.
        """

    @abstractmethod
    def with_values(
        self, fixed: tuple[Spec, Spec], values: Mapping[str, Setting]
    ) -> tuple[Spec, Spec]:
        """Both Specs with a point's values, by axis. Raises ProjectionError or ValidationError."""

    def controlled(self, specs: tuple[Spec, Spec], control: str, draw: int | None) -> DefendSpec:
        """The Spec of one of its controls, from the Specs of a point."""
        second = specs[1]
        knobs = second.knobs if isinstance(second, DefendSpec) else second.model_dump()
        return DefendSpec(method=self.name, knobs=knobs, control=control, draw=draw)

    def rotated(self, specs: tuple[Spec, Spec], draws: int) -> MeasureSpec:
        """The Spec of the stage with the rotated projections, for a control that needs them."""
        first = specs[0]
        knobs = first.knobs if isinstance(first, MeasureSpec) else first.model_dump()
        return MeasureSpec(method=self.name, knobs=knobs, draws=draws)

    @abstractmethod
    def checked(self, knob: str, value: Setting) -> None:
        """Raise ProjectionError or ValidationError for an invalid value of a knob."""

    @abstractmethod
    def knobs(self, fixed: Spec, values: Mapping[str, Setting]) -> dict[str, Setting]:
        """Axis -> value of every knob: the point's value, else the study's fixed value, which is in
        the Spec `fixed` of the stage `makes`.
        """

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
    def is_continuous(self, axis: str) -> bool:
        """Whether every value of a knob has a mask of its own, so that it has no edges."""

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
