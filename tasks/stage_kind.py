"""The record of a stage kind: all that the project knows of one kind, in one place.

Each kind's record is in a file beside the kind's code, `NAME_kind.py`; `ebbline.tasks.kinds` lists
them. The driver process reads the records and has no torch, so these files import none. The module
of a kind's function does, and is imported when the function runs.
"""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar, cast

from ebbline.tasks.specs import Dtype, Quantisation, Spec
from ebbline.tasks.stage import Stage

S = TypeVar("S", bound=Spec)
Run = Callable[..., None]  # (spec of its kind, inputs: Mapping[str, Path], out: Path, ctx: Context)
# What has one stage of a kind for itself: a study (all its points share the stage), a training, an
# adapter (all settings of a defence share the stage), or a point.
Owner = Literal["study", "training", "adapter", "point"]


@dataclass(frozen=True, slots=True)
class Load:
    """A stage's work. Bytes `moved` go between a processor and its memory, `read` and `written`
    between memory and the store.

    `kernels` are launched one after another, `waits_s` is spent on somebody else's machine.
    `tokens` are all that pass through a model.
    """

    flops: float = 0.0
    moved: float = 0.0
    kernels: float = 0.0
    read: float = 0.0
    written: float = 0.0
    tokens: float = 0.0
    waits_s: float = 0.0


def no_gpu(spec: Spec) -> int:
    return 0


def one_gpu(spec: Spec) -> int:
    return 1


def nothing_shared(spec: Spec, stage: Stage) -> str:
    """The stage shares nothing in memory with another stage."""
    return stage.lineage


def same_kind(spec: Spec, stage: Stage) -> str:
    """The stage is small: it runs in one batch with any others of its kind."""
    return spec.KIND


def model_in_memory(stage: Stage, quantisation: Quantisation, dtype: Dtype) -> str:
    """The stage shares its loaded model with other stages."""
    return f"{stage.inputs['model'].lineage}/{quantisation}/{dtype}"


@dataclass(frozen=True)
class StageKind(Generic[S]):
    """One kind of stage. The fields without a default are needed.

    `function` is "MODULE:NAME" of `run(spec, inputs, out, ctx)`, which writes files into `out`.
    `counted_work` is a function of the stage alone. Plans scale up their sample, and the search
    splits a point's work, by `belongs_to`. Stages with equal `resident` need the same thing in
    memory and belong in one batch. Estimates compare a stage with measured ones that are equal in
    the settings `alike`, and first with those that are equal in `nearer` too.
    """

    spec: type[S]
    function: str
    counted_work: Callable[[S, Stage], Load]
    belongs_to: Owner
    gpus: Callable[[S], int] = no_gpu
    resident: Callable[[S, Stage], str] = nothing_shared
    alike: tuple[str, ...] = ()
    nearer: tuple[str, ...] = ()
    has_metrics: bool = False
    # It writes an adapter, whose tensors `store gc --keep-adapters` may drop
    writes_adapter: bool = False
    # In the Gantt chart: C0, C1, ... of the figures' palette, or a grey from 0 to 1; "" is "other"
    colour: str = ""
    shows_key: bool = False  # on the live page, for each point

    @property
    def name(self) -> str:
        return self.spec.KIND

    def load_function(self) -> Run:
        """Import the function's module."""
        return cast(Run, pkgutil.resolve_name(self.function))
