"""The runner's data: its shared parts, the nodes of its graph, and its running jobs."""

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
    """The parts that the runner, the starter and the timing share."""

    store: Store
    executor: Executor
    profile: Profile
    needs_of: Callable[[Stage], Needs]
    meter: Meter
    estimates: Estimates
    retry_policy: RetryPolicy


@dataclass(frozen=True)
class Failure:
    """Why a stage has no artifact. `command` reproduces the failure in one process. `inherited`: an
    upstream stage failed.

    `invalid_input`: the stage cannot use this data or model, so a retry would fail too.
    """

    reason: str
    command: str = ""
    inherited: bool = False
    invalid_input: bool = False


@dataclass(eq=False, slots=True)
class Node:
    """One stage and its state. `reused`: its artifact existed before this run.

    `attempt` is the folder of its latest attempt. Nodes with the same key are duplicates: one runs,
    and all get its artifact. `downstream` has each node that reads from it, once.
    """

    stage: Stage
    state: State = "waiting"
    key: str = ""
    artifact: Artifact | None = None
    failure: Failure | None = None
    reused: bool = False
    attempt: Path | None = None
    downstream: list["Node"] = field(default_factory=list)

    @property
    def counts_as(self) -> str:
        """The state; `reused` for a done stage whose artifact existed before this run."""
        return "reused" if self.state == "done" and self.reused else self.state


@dataclass
class Running:
    """A running job. Times are in seconds of the monotonic clock; `seconds` is its expected
    duration.

    `signal` is (key of the current stage, its progress). `signal_at` is when that last changed.
    `follow_ups` maps the lineages of its follow-ups to their attempts. `keys` has the job's stages
    in order, and a follow-up as soon as its key is known.
    """

    job: Job
    started: float
    seconds: float
    signal: tuple[str, Mapping[str, Any]]
    signal_at: float
    follow_ups: Mapping[str, str] = field(default_factory=dict)
    keys: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.keys = list(self.job.keys)
