"""Stages: a Spec plus the named things it reads from; and how one attempt at a stage is described.

Identity is in three steps. A stage's `lineage` is known before anything runs and says which stages
are the same request. Its `key` is known once its inputs are done, because it hashes their
*content*: a stage whose inputs came out the same is never run again. Its artifact's content digest
then feeds the keys of the stages behind it.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ebbline.tasks.identity import digest
from ebbline.tasks.specs import Spec


@dataclass(frozen=True)
class Source:
    """Pinned content from outside: `content` is its digest, `location` where to find it (never
    hashed).

    A location is an absolute path, or `hub:model:ID@COMMIT` / `hub:dataset:ID@COMMIT`.
    """

    content: str
    location: str

    @cached_property
    def lineage(self) -> str:
        return digest({"source": self.content})


@dataclass(frozen=True, eq=False)
class Stage:
    spec: Spec
    inputs: Mapping[str, "Input"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", MappingProxyType(dict(sorted(self.inputs.items()))))

    @property
    def kind(self) -> str:
        return self.spec.KIND

    @cached_property
    def lineage(self) -> str:
        """Equal for two stages that ask for the same thing, whatever their inputs turn out to
        contain.
        """
        return digest(
            {
                **spec_payload(self.spec),
                "inputs": {name: item.lineage for name, item in self.inputs.items()},
            }
        )

    def upstream(self) -> "list[Stage]":
        """The stages that this one reads from, in the order of the input names."""
        return [stage for item in self.inputs.values() if (stage := stage_of(item)) is not None]


@dataclass(frozen=True)
class Part:
    """One file or folder of what a stage produced; only that part's content counts."""

    stage: Stage
    path: str

    @cached_property
    def lineage(self) -> str:
        return digest({"part": self.path, "of": self.stage.lineage})


Input = Stage | Part | Source


def stage_of(item: Input) -> Stage | None:
    """The stage behind an input; None for pinned content from outside."""
    return item.stage if isinstance(item, Part) else item if isinstance(item, Stage) else None


def closure(stages: Iterable[Stage]) -> Iterator[Stage]:
    """Stages and all that they are made from, each once, inputs first."""
    seen: set[str] = set()

    def walk(stage: Stage) -> Iterator[Stage]:
        if stage.lineage not in seen:
            seen.add(stage.lineage)
            for above in stage.upstream():
                yield from walk(above)
            yield stage

    for stage in stages:
        yield from walk(stage)


def spec_payload(spec: Spec) -> dict[str, Any]:
    return {"kind": spec.KIND, "version": spec.VERSION, "spec": spec.model_dump(mode="json")}


def key_payload(spec: Spec, contents: Mapping[str, str]) -> dict[str, Any]:
    """What a key hashes: kind, VERSION, the whole Spec with defaults, and the content digest of
    each input.
    """
    return {**spec_payload(spec), "inputs": dict(contents)}


@dataclass(frozen=True)
class Context:
    """How one attempt runs. Never hashed; what matters of it is recorded as provenance.

    `scratch` outlives the attempt (checkpoints); `log` belongs to it. `rank` and `world_size`
    describe a gang, `micro_batch`, `zero_stage` and `gradient_checkpointing` (None: on GPUs) how a
    training is laid out in memory. `leaving` turns true when a machine of the attempt is about to
    go: checkpoint, and raise Leaving. `step_done` is told of each step of a training: its number,
    how many there are, its loss and its learning rate. `saved` is told of every checkpoint that is
    whole on the disk.
    """

    log: Path
    scratch: Path
    device: str = "cpu"
    threads: int | None = None
    micro_batch: int | None = None
    batch_size: int = 32
    checkpoint_every_s: float = 60.0
    zero_stage: int = 3
    rank: int = 0
    world_size: int = 1
    progress: Callable[[int, int, str], None] = lambda done, total, note: None
    step_done: Callable[[int, int, float, float], None] = lambda step, steps, loss, rate: None
    leaving: Callable[[], bool] = lambda: False
    saved: Callable[[], None] = lambda: None  # called after a checkpoint was written to `scratch`
    gradient_checkpointing: bool | None = None
    # ebbline.tasks.models.loading.Residents: what this process keeps loaded between stages
    residents: Any = None

    @property
    def recomputes(self) -> bool:
        """Whether a LoRA training computes each layer's activations again in the backward pass, in
        place of keeping them.
        """
        return (
            self.device != "cpu"
            if self.gradient_checkpointing is None
            else self.gradient_checkpointing
        )


@dataclass(frozen=True)
class Request:
    """One attempt at one stage, as data: it crosses process and machine borders as JSON, never as a
    pickled closure.

    `inputs`, `out`, `log` and `scratch` are paths when its function runs; the runner may write
    URLs, which the worker brings to its machine first, keeping at most `cache_gb` there. Neighbours
    in a batch with the same `pack` (empty: none) are trained together, as many as their
    `pack_share` of a GPU's room allows.
    """

    key: str
    kind: str
    spec: Mapping[str, Any]
    inputs: Mapping[str, str]
    contents: Mapping[str, str]
    out: str
    log: str
    scratch: str
    gpus: int = 0
    device: str = "cpu"
    threads: int | None = None
    micro_batch: int | None = None
    checkpoint_every_s: float = 60.0
    zero_stage: int = 3
    memory_gb: float | None = (
        None  # of each GPU; with it, a training without a micro-batch gets the largest that fits
    )
    cache_gb: float = 100.0
    pack: str = ""
    pack_share: float = 1.0
    load: Mapping[str, float] = field(
        default_factory=dict
    )  # its counted work (ebbline.cluster.schedule.counted_work), for the record

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "Request":
        return Request(**json.loads(text))

    def context(self, **changes: Any) -> Context:
        return replace(
            Context(
                log=Path(self.log),
                scratch=Path(self.scratch),
                device=self.device,
                threads=self.threads,
                micro_batch=self.micro_batch,
                checkpoint_every_s=self.checkpoint_every_s,
                zero_stage=self.zero_stage,
            ),
            **changes,
        )


@dataclass(frozen=True)
class Report:
    """What became of one Request. `error` is a one-line reason, without any completion or prompt in
    it.

    `smaller` is the micro-batch to try again with when a gang ran out of memory: no failure of the
    stage.
    """

    key: str
    seconds: float
    error: str | None = None
    error_type: str | None = None
    traceback: str | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    smaller: int | None = None
