"""Stages: a Spec with its named inputs; and one attempt at a stage, as data.

A stage has an identity in three steps:

1. Its `lineage` hashes the Spec and the lineages of the inputs, before anything runs. Stages of
   equal lineage are one stage.
2. Its `key` hashes the Spec and the *content* of the inputs, once these are complete. A stage
   whose key is in the store does not run.
3. The content digest of its artifact goes into the keys of the stages that read it.

When does a stage run anew? For data -> train -> generate:

    change                            runs                     because
    data.size                         data, train, generate    the content of data.jsonl differs
    train.rank                        train, generate          the key of data is equal
    a blank line in the pool          data                     its data.jsonl comes out equal
    the pool in another folder        nothing                  a location is never hashed
    device, micro-batch, gang size    nothing                  these are Context, never hashed
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ebbline.tasks.identity import digest
from ebbline.tasks.progress import TrainedStep
from ebbline.tasks.specs import Spec


@dataclass(frozen=True)
class Source:
    """Pinned content from outside: `content` is its digest; `location` says where it is and is
    never hashed.

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
        """Equal for two stages with the same request, whatever content their inputs have."""
        return digest(
            {
                **spec_payload(self.spec),
                "inputs": {name: item.lineage for name, item in self.inputs.items()},
            }
        )

    def upstream(self) -> "tuple[Stage, ...]":
        """The stages that this one reads from, in the order of the input names."""
        return self._upstream

    @cached_property
    def _upstream(self) -> "tuple[Stage, ...]":
        found = (stage_of(item) for item in self.inputs.values())
        return tuple(stage for stage in found if stage is not None)


@dataclass(frozen=True)
class Part:
    """One file or folder of a stage's output; only this part's content goes into keys."""

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
    """The stages and all stages that they read from, each once, inputs first."""
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
    """How one attempt runs. Never hashed; the attempt's record keeps what matters as provenance.

    `scratch` outlives the attempt (checkpoints); `log` belongs to it. `gpus` are those that it
    holds. `rank` and `world_size` describe a gang. `micro_batch`, `zero_stage` and
    `gradient_checkpointing` (None: on GPUs) describe the memory layout of a training. `leaving`
    returns true when a machine of the attempt is about to go: the stage then saves a checkpoint and
    raises Leaving. `step_done` is called after each step of a training, and `resumed` with the
    steps of the checkpoint that it continues from. `saved` is called after each complete checkpoint
    in `scratch`. `server` says where the server of the Spec's backend lies (fields of
    ebbline.tasks.measuring.served.place.ServerPlace); None where it is not known. A server that is
    started makes room for `adapters`, those of the stages that follow, where they are known.
    `contents` has the content digests of the inputs, where they are known.
    """

    log: Path
    scratch: Path
    device: str = "cpu"
    threads: int | None = None
    micro_batch: int | None = None
    checkpoint_every_s: float = 60.0
    zero_stage: int = 3
    rank: int = 0
    world_size: int = 1
    progress: Callable[[int, int, str], None] = lambda done, total, note: None
    step_done: Callable[[TrainedStep], None] = lambda step: None
    resumed: Callable[[Sequence[TrainedStep]], None] = lambda steps: None
    leaving: Callable[[], bool] = lambda: False
    saved: Callable[[], None] = lambda: None
    gradient_checkpointing: bool | None = None
    gpus: int = 0
    server: Mapping[str, Any] | None = None
    adapters: Sequence[Path] = ()
    contents: Mapping[str, str] = field(default_factory=dict)
    # ebbline.tasks.models.loading.Residents: what this process keeps loaded between stages
    residents: Any = None

    @property
    def recomputes(self) -> bool:
        """Whether a LoRA training recomputes each layer's activations in the backward pass instead
        of keeping them.
        """
        return (
            self.device != "cpu"
            if self.gradient_checkpointing is None
            else self.gradient_checkpointing
        )


@dataclass(frozen=True)
class FollowUp:
    """A small stage that reads the output of a request, and runs right after it in its batch.

    Its key is known once that output is committed. `reads` maps inputs to parts of the output (""
    is all of it); `inputs` and `contents` have the other inputs, as in a Request. `attempt` is the
    name of its attempt's folder.
    """

    kind: str
    spec: Mapping[str, Any]
    reads: Mapping[str, str]
    inputs: Mapping[str, str]
    contents: Mapping[str, str]
    attempt: str
    load: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """One attempt at one stage, as plain data: it can be written as JSON (`request.json`, gangs)
    and holds no closure.

    `inputs`, `out`, `log` and `scratch` are local paths when the stage's function runs. The runner
    may write URLs; the worker then copies the content to its machine, into a cache of at most
    `cache_gb`. Neighbours in a batch with an equal, non-empty `pack` are trained together, while
    the sum of their `pack_share` is at most 1. A share is of a GPU's memory.
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
    # Of each GPU; with it, a training without a micro-batch gets the largest that fits
    memory_gb: float | None = None
    cache_gb: float = 100.0
    pack: str = ""
    pack_share: float = 1.0
    alone: bool = False  # it was lost with others: it forms no group
    # Input -> digest of each of its files, where a record of the store lists them. The workplace
    # fills it in; the inputs of a request without it are not checked.
    recorded: Mapping[str, Mapping[str, str]] | None = None
    # Attempts of this run at the same training that were killed for memory, the earliest first
    killed: tuple[str, ...] = ()
    # Its counted work (ebbline.cluster.schedule.counted_work), for the record
    load: Mapping[str, float] = field(default_factory=dict)
    follow_ups: tuple[FollowUp, ...] = ()
    server: Mapping[str, Any] | None = None  # as in Context

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "Request":
        fields = json.loads(text)
        return Request(
            **{
                **fields,
                "killed": tuple(fields.get("killed", ())),
                "follow_ups": tuple(FollowUp(**each) for each in fields.get("follow_ups", ())),
            }
        )

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
                gpus=self.gpus,
                server=self.server,
                contents=self.contents,
            ),
            **changes,
        )


@dataclass(frozen=True)
class Report:
    """The result of one Request. `error` is a one-line reason that quotes no completion and no
    prompt.

    `smaller` is set when a gang ran out of memory: retry with this micro-batch. This does not
    count as a failure of the stage.
    """

    key: str
    seconds: float
    error: str | None = None
    error_type: str | None = None
    traceback: str | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    smaller: int | None = None
