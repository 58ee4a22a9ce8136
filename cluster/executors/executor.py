"""The executor interface, and `run_batch`, with which every executor's workers run and commit.

A stage is done when its record exists, often long before its Job ends. Callers therefore look for
results in the store, and ask the executor only for failed and lost stages.
"""

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ebbline.cluster.store.artifacts import Artifact
from ebbline.cluster.store.follow_ups import requests_after
from ebbline.cluster.store.workplace import Workplace, workplace
from ebbline.tasks.errors import EbblineError
from ebbline.tasks.kinds import request_payload
from ebbline.tasks.stage import Report, Request

# Ray's label for the type of a host's GPUs. A host without real GPUs does not have it.
ACCELERATOR_TYPE = "ray.io/accelerator-type"
_log = logging.getLogger(__name__)
SLOTS = 2  # per host, for stages without a GPU; few, because each may use all of the disk


@dataclass(frozen=True)
class Host:
    """One machine. `gpus` are logical on a machine without real GPUs; `cpus` are slots for stages
    without a GPU.

    `labels` describe it (`ray.io/accelerator-type: A100`). A `draining` host will leave the cluster
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
    """The hosts of an executor. `grows`: an autoscaler adds hosts for waiting work."""

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
    """What a stage needs of the cluster. A stage with several GPUs is a gang; it runs on one host
    unless `spread` allows several.

    `labels` select hosts, in Ray's syntax: a value, `!value`, `in(a,b)`, `!in(a,b)`.
    """

    gpus: int
    labels: Mapping[str, str] = field(default_factory=dict)
    spread: bool = False


@dataclass(frozen=True)
class Job:
    """One submitted batch. `id` is EXECUTOR-NUMBER. `hosts` maps host names to numbers of GPUs; a
    job without GPUs has one host, with 0.
    """

    id: str
    keys: tuple[str, ...]
    gpus: int
    hosts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """Why a job ended without reports. `blame` is `place` when its host left (lost or preempted),
    `memory` when its only process was killed, probably for memory, else `stage`.
    """

    reason: str
    blame: Literal["stage", "place", "memory"] = "stage"


@dataclass(frozen=True)
class Finished:
    """A job that ended: the reports of its stages, and the loss if some have no report."""

    job: Job
    reports: tuple[Report, ...]
    lost: Loss | None = None


class Executor(ABC):
    """Runs batches of requests.

    Stages on GPUs run on `device`, cpu or cuda. Each stage may use `threads` CPU threads.
    `own_processes`: each job has processes of its own, which take time to start.
    """

    device: str
    threads: int | None = None
    own_processes: bool = True

    @abstractmethod
    def capacity(self) -> Capacity: ...

    @abstractmethod
    def submit(self, batch: Sequence[Request], needs: Needs, hosts: Mapping[str, int]) -> Job:
        """Start a batch on `hosts` (host -> GPUs) and return at once. Its requests run in the
        given order. Their stages have equal `resident` (see ebbline.tasks.stage_kind).
        """

    @abstractmethod
    def finished(self, timeout_s: float) -> Sequence[Finished]:
        """The jobs that ended since the last call; waits at most `timeout_s` for the first."""

    @abstractmethod
    def cancel(self, job: Job) -> None:
        """Stop a job. Its committed stages stay."""

    def begun(self, job: Job) -> bool:
        """Whether the processes of a running job exist. Before that it waits for resources and does
        not count as hung.
        """
        return True

    # Empty rather than abstract: only an executor with an autoscaler uses it.
    def expect(self, queue: Sequence[tuple[Needs, float]]) -> None:  # noqa: B027
        """Receive (needs, expected seconds) of each ready or running stage, so that the cluster can
        grow.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop all jobs and release all resources."""


def run_batch(
    requests: Sequence[Request],
    rank: int = 0,
    world_size: int = 1,
    leaving: Callable[[], bool] = lambda: False,
    gpu_type: str | None = None,
) -> tuple[Report, ...]:
    """Run a batch in this process and commit each stage when it is done. Every executor's workers
    call it. `gpu_type` is the type of this process's GPUs, None without real ones.

    A request's follow-ups run after it, if they are not in the store. They have reports too.

    Raises MemberFailed when a stage of a gang fails.
    """
    from ebbline.tasks.worker import error_and_reason, run_stages  # only a worker needs them

    waiting = _Waiting(requests, rank, world_size)
    workplaces, reports = waiting.workplaces, []
    for report in run_stages(
        waiting,
        rank,
        world_size,
        lambda request: workplaces[request.key].prepare(),
        lambda request: workplaces[request.key].send_checkpoint(),
        leaving,
    ):
        place = workplaces[report.key]
        if report.error is None and rank == 0:
            request = place.request
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
                artifact = place.store.commit(place.attempt, request_payload(request), provenance)
                waiting.add_after(request.key, artifact)
            except (EbblineError, OSError) as error:
                name, reason = error_and_reason(error, Path(request.log))
                report = replace(report, error=f"could not be committed: {reason}", error_type=name)
        report = place.finish(report)
        reports.append(report)
        if world_size > 1 and report.error is not None:
            raise MemberFailed(report)
    return tuple(reports)


class _Waiting(Iterator[Request]):
    """The requests of a batch that have not begun, in order; iterating takes them. It ends while
    there are none, and goes on once some were added.
    """

    def __init__(self, requests: Sequence[Request], rank: int, world_size: int) -> None:
        self.workplaces: dict[str, Workplace] = {
            request.key: workplace(request, rank, world_size) for request in requests
        }
        self._original = {request.key: request for request in requests}
        self._waiting = deque(place.request for place in self.workplaces.values())

    def __iter__(self) -> Iterator[Request]:
        return self

    def __next__(self) -> Request:
        if not self._waiting:
            raise StopIteration
        return self._waiting.popleft()

    def add_after(self, key: str, artifact: Artifact) -> None:
        """Put the follow-ups of a committed request first. One that cannot begin here is left to
        the driver, which starts it as a job of its own.
        """
        try:
            added = requests_after(self._original[key], artifact) if key in self._original else []
        except (EbblineError, OSError) as error:
            _log.warning("a stage after %s cannot begin here: %s", artifact.kind, error)
            return
        for request in reversed(added):
            if request.key not in self.workplaces:
                self.workplaces[request.key] = workplace(request)
                self._waiting.appendleft(self.workplaces[request.key].request)


class MemberFailed(Exception):
    """A member of a gang failed. The others wait for it in a collective, so the gang must end."""

    def __init__(self, report: Report) -> None:
        super().__init__(report)  # so that it can be pickled, which Ray does
        self.report = report

    def __str__(self) -> str:
        return str(self.report.error)
