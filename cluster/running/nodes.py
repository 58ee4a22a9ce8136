"""What a run works with, a stage on its way through it, and the job that a stage runs in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ebbline.cluster.executors.executor import Executor, Job, Needs
from ebbline.cluster.profile import Profile
from ebbline.cluster.schedule.costs import Meter
from ebbline.cluster.schedule.estimates import Estimates
from ebbline.cluster.schedule.retry_policy import RetryPolicy
from ebbline.cluster.store.artifacts import Artifact, Store
from ebbline.tasks.stage import Stage

State = Literal["waiting", "ready", "running", "done", "failed"]


@dataclass(frozen=True)
class Setup:
    """What the parts of a run share: where artifacts lie, where stages run, what they need and
    cost, and what follows when one is lost.
    """

    store: Store
    executor: Executor
    profile: Profile
    needs_of: Callable[[Stage], Needs]
    meter: Meter
    estimates: Estimates
    retry_policy: RetryPolicy


@dataclass(frozen=True)
class Failure:
    """Why a stage has no artifact. `command` reproduces it in one process; `inherited` when the
    fault lay further up.

    `invalid` says that the stage cannot use its data or its model: the machine did nothing
    wrong.
    """

    reason: str
    command: str = ""
    inherited: bool = False
    invalid: bool = False


@dataclass(eq=False, slots=True)
class Node:
    """One stage on its way. `reused` is true when its artifact was there before this runner asked
    for it.

    `attempt` is the folder of its latest attempt. Nodes with the same key are twins: one runs, all
    get its artifact. `behind` are the nodes that read from it, each once.
    """

    stage: Stage
    state: State = "waiting"
    key: str = ""
    artifact: Artifact | None = None
    failure: Failure | None = None
    reused: bool = False
    attempt: Path | None = None
    behind: list["Node"] = field(default_factory=list)

    @property
    def counts_as(self) -> str:
        """Its state, and `reused` for what is done that was there before."""
        return "reused" if self.state == "done" and self.reused else self.state


@dataclass
class Running:
    """A job at work: when it started, how long it was expected to take, and its last sign of
    life.
    """

    job: Job
    started: float
    seconds: float
    said: tuple[str, Mapping[str, Any]]
    heard: float  # when what it says of itself last changed
