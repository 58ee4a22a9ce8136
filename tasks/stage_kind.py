"""The record of a stage kind: everything that the project knows of one kind, in one place.

Each record is in a file beside the kind's code, `NAME_kind.py`; `ebbline.tasks.kinds` lists them.
The driver process reads these files and has no torch, so they import none. The module of a kind's
function may import torch; it is imported when the function runs.
"""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar, cast

from ebbline.tasks.extras import extras_explained
from ebbline.tasks.specs import TRANSFORMERS, Dtype, Quantisation, Spec
from ebbline.tasks.stage import Stage

S = TypeVar("S", bound=Spec)
Run = Callable[..., None]  # (spec of its kind, inputs: Mapping[str, Path], out: Path, ctx: Context)
# What has a stage of this kind of its own: the study (all points share the stage), each training,
# each adapter (all settings of a defence share the stage), or each point.
Owner = Literal["study", "training", "adapter", "point"]


@dataclass(frozen=True, slots=True)
class Load:
    """The counted work of a stage. `moved` bytes go between a processor and its memory, `read` and
    `written` bytes between memory and the store.

    `kernels` are launched one after another. `waits_s` is the time spent waiting for an external
    service. `tokens` counts all tokens that pass through a model.
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


def model_in_memory(
    stage: Stage, quantisation: Quantisation, dtype: Dtype, backend: str = TRANSFORMERS
) -> str:
    """The stage shares its loaded model with other stages, in this process or at a server."""
    served = "" if backend == TRANSFORMERS else f"/{backend}"
    return f"{stage.inputs['model'].lineage}/{quantisation}/{dtype}{served}"


@dataclass(frozen=True)
class StageKind(Generic[S]):
    """One kind of stage. Fields without a default are required.

    `function` is "MODULE:NAME" of `run(spec, inputs, out, ctx)`, which writes files into `out`.
    `counted_work` depends on the stage alone. By `belongs_to`, plans scale up their sample and the
    search divides a point's work. Stages with equal `resident` can form a batch: they need the same
    model in memory, or are small stages of one kind. An estimate compares a stage with measured
    stages with equal settings `alike`. It prefers stages whose settings `nearer` are equal too.
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
    # Small, and without a GPU: it runs in the batch of the stage whose output it reads
    follows_its_input: bool = False
    # `store gc --keep-adapters` may drop the tensors of the adapter that it writes
    writes_adapter: bool = False
    # In the Gantt chart: C0, C1, ... of the figures' palette, or a grey from 0 to 1; "" is "other"
    colour: str = ""
    shows_key: bool = False  # the live page shows its key for each point

    @property
    def name(self) -> str:
        return self.spec.KIND

    def load_function(self) -> Run:
        """Import the function's module. Raises MissingExtra when one of its packages is missing."""
        with extras_explained(f"the stage {self.name!r}"):
            return cast(Run, pkgutil.resolve_name(self.function))
