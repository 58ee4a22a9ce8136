"""What every executor is: a place that runs batches of requests. Three abstract verbs, one shared
way to commit.

A Job is finished when its process has nothing more to say; its stages are done when their records
exist, which may be long before. So whoever waits looks at the store, and asks the executor only for
what failed or was lost.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ebbline.cluster.store.workplace import workplace
from ebbline.tasks.errors import EbblineError
from ebbline.tasks.kinds import request_payload
from ebbline.tasks.stage import Report, Request

# The label with the type of a host's GPUs, in studies and on hosts: Ray's name for it. A host
# without real GPUs has none.
ACCELERATOR_TYPE = "ray.io/accelerator-type"
SLOTS = 2  # of a host, for stages without a GPU; each may use all of a machine's disk


@dataclass(frozen=True)
class Host:
    """One machine: its GPUs (logical ones if it has none), and slots for stages that need none.

    `labels` say what it is (`ray.io/accelerator-type: A100`). A host that is `draining` will go,
    and gets no new work.
    """

    name: str
    gpus: int
    cpus: int
    labels: Mapping[str, str] = field(default_factory=dict)
    draining: bool = False

    @property
    def gpu_type(self) -> str | None:
        return self.labels.get(ACCELERATOR_TYPE)


@dataclass(frozen=True)
class Capacity:
    """What an executor has, machine by machine. `grows` when more come to a queue that waits (an
    autoscaler).
    """

    hosts: tuple[Host, ...]
    grows: bool = False

    @staticmethod
    def one_host(gpus: int, cpus: int) -> "Capacity":
        return Capacity((Host("here", gpus, cpus),))

    @property
    def gpus(self) -> int:
        return sum(host.gpus for host in self.hosts if not host.draining)

    @property
    def cpus(self) -> int:
        return sum(host.cpus for host in self.hosts if not host.draining)


@dataclass(frozen=True)
class Needs:
    """What a stage needs of the cluster. Above one GPU it is a gang, on one host unless `spread`
    allows several.

    `labels` select hosts, in Ray's syntax: a value, `!value`, `in(a,b)`, `!in(a,b)`.
    """

    gpus: int
    labels: Mapping[str, str] = field(default_factory=dict)
    spread: bool = False


@dataclass(frozen=True)
class Job:
    """One batch at work. `id` is the executor's name in the table of executors, and a number.
    `hosts` says how many GPUs it has on which host; a job that needs none has its one host with 0.
    """

    id: str
    keys: tuple[str, ...]
    gpus: int
    hosts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """Why a job ended without a word of its stages. `place` when its host went (node lost,
    preempted): no fault of theirs.
    """

    reason: str
    blame: Literal["stage", "place"] = "stage"


@dataclass(frozen=True)
class Finished:
    """A job that ended: reports of the stages it got to, and why it was lost if it did not get to
    all of them.
    """

    job: Job
    reports: tuple[Report, ...]
    lost: Loss | None = None


class Executor(ABC):
    """Runs batches of requests. `device` is what stages on GPUs run on: cpu or cuda; `threads` what
    each may use.

    `own_processes` says whether a job has processes of its own, which take time to start.
    """

    device: str
    threads: int | None = None
    own_processes: bool = True

    @abstractmethod
    def capacity(self) -> Capacity: ...

    @abstractmethod
    def submit(self, batch: Sequence[Request], needs: Needs, hosts: Mapping[str, int]) -> Job:
        """Start a batch on `hosts` (GPUs by host); its requests share a base model and run in the
        given order.
        """

    @abstractmethod
    def finished(self, timeout_s: float) -> Sequence[Finished]:
        """The jobs that ended since the last call, waiting at most `timeout_s` for the first."""

    @abstractmethod
    def cancel(self, job: Job) -> None:
        """Stop a job; what it committed stays."""

    def begun(self, job: Job) -> bool:
        """Whether a running job has its processes; until then it waits for others' work to end, and
        cannot hang.
        """
        return True

    # Most have nobody to tell
    def expect(self, queue: Sequence[tuple[Needs, float]]) -> None:  # noqa: B027
        """All that is ready or runs: (needs, expected seconds) of each stage, so that a cluster
        that can grow does.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop all jobs and give everything back."""


def run_batch(
    requests: Sequence[Request],
    rank: int = 0,
    world_size: int = 1,
    leaving: Callable[[], bool] = lambda: False,
    gpu_type: str | None = None,
) -> tuple[Report, ...]:
    """Run a batch in this process and commit each stage as it is done: what every executor's
    workers call. `gpu_type` is the type of this process's GPUs, None without real ones.
    """
    from ebbline.tasks.worker import (  # brings torch, which a driver process never needs
        described,
        run_stages,
    )

    works = {request.key: workplace(request, rank, world_size) for request in requests}
    local = [work.request for work in works.values()]
    reports = []
    for report in run_stages(
        local,
        rank,
        world_size,
        lambda one: works[one.key].prepared(),
        lambda one: works[one.key].saved(),
        leaving,
    ):
        work = works[report.key]
        if report.error is None and rank == 0:
            request = work.request
            gpus = world_size if world_size > 1 else request.gpus
            provenance = {
                "seconds": report.seconds,
                "gpus": gpus,
                "gpu_type": gpu_type if gpus else None,
                **report.environment,
            }
            if request.load:
                provenance["load"] = dict(request.load)
            try:
                work.store.commit(work.attempt, request_payload(request), provenance)
            except (EbblineError, OSError) as error:
                name, reason = described(error, Path(request.log))
                report = replace(report, error=f"could not be committed: {reason}", error_type=name)
        report = work.ended(report)
        reports.append(report)
        if world_size > 1 and report.error is not None:
            raise MemberFailed(report)
    return tuple(reports)


class MemberFailed(Exception):
    """A gang's member failed: its partners wait for it in a collective, so all of them have to
    end.
    """

    def __init__(self, report: Report) -> None:
        super().__init__(report)  # so that it can be pickled, which Ray Train does
        self.report = report

    def __str__(self) -> str:
        return str(self.report.error)
