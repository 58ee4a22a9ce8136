"""What a job takes beside its stages: starting its processes and their imports, sending it there,
hearing of its end.

A job on a process that has run before takes a fraction of one that needs a new process. Where every
job gets a new one (real GPUs, gangs) what was measured of both is the same.
"""

import statistics
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

REMEMBERED = 200  # the latest jobs of a sort


@dataclass(frozen=True)
class StartCosts:
    """Guesses of an executor's seconds, until the like has been measured. The defaults were
    measured with Ray on 2 cores: docs/costs.md.
    """

    new_s: float = 8.0  # a job on a new process
    kept_s: float = 0.5  # ... on one that has run before
    gang_s: float = 23.0
    cluster_s: float = 4.0  # from the begin of a drive to its first job
    new_after_real_gpu: bool = False  # a process that had a real GPU is ended with its job


@dataclass
class WarmProcesses:
    """Which jobs find a warm process: a host keeps as many as it ever ran at once, apart for
    GPUs and for slots. A gang never does.
    """

    _idle: Counter[tuple[str, bool]] = field(default_factory=Counter)
    _held: dict[str, tuple[str, bool]] = field(default_factory=dict)

    def would_be_new(self, hosts: Mapping[str, int]) -> bool:
        """Whether a job with so many GPUs of these hosts would need a new process, if it started
        now.
        """
        return sum(hosts.values()) > 1 or not all(
            self._idle[name, gpus > 0] for name, gpus in hosts.items()
        )

    def start(self, job: str, hosts: Mapping[str, int]) -> bool:
        """A job has started; whether it needs a new process."""
        new = self.would_be_new(hosts)
        if sum(hosts.values()) <= 1:
            for name, gpus in hosts.items():
                self._held[job] = name, gpus > 0
                if not new:
                    self._idle[name, gpus > 0] -= 1
        return new

    def end(self, job: str) -> None:
        if job in self._held:
            self._idle[self._held.pop(job)] += 1


class Starts:
    """Seconds that jobs take beside their stages, by type of GPU: the median of the latest, the
    executor's guess until there is one.
    """

    def __init__(self, guesses: StartCosts) -> None:
        self._guesses = guesses
        self._seen: dict[tuple[str | None, int, bool], deque[float]] = defaultdict(
            lambda: deque(maxlen=REMEMBERED)
        )
        self._medians: dict[tuple[str | None, int, bool], float] = {}
        self._clusters: deque[float] = deque(maxlen=REMEMBERED)

    def learn_cluster(self, seconds: float) -> None:
        """A drive took so long until its first job had begun."""
        self._clusters.append(seconds)

    @property
    def cluster_s(self) -> float:
        """From the begin of a drive to its first job: joining a cluster, or starting one."""
        return statistics.median(self._clusters) if self._clusters else self._guesses.cluster_s

    def learn(self, gpu_type: str | None, gpus: int, new: bool, seconds: float) -> None:
        """A job took so many seconds beside its stages. Less than none is a stage that ran
        elsewhere before, and says nothing.
        """
        if seconds >= 0.0:
            like = _like(gpu_type, gpus, new)
            self._seen[like].append(seconds)
            self._medians.pop(like, None)

    def seconds(self, gpu_type: str | None, gpus: int, new: bool = False) -> float:
        """Of a job to be. One whose sort was never measured goes by the same on any type of GPU,
        then by the guess.
        """
        like = _like(gpu_type, gpus, new)
        if like not in self._seen:
            like = next((other for other in self._seen if other[1:] == like[1:]), like)
        if like not in self._seen:
            return self._guess(gpu_type, gpus, new)
        if like not in self._medians:
            self._medians[like] = statistics.median(self._seen[like])
        return self._medians[like]

    def _guess(self, gpu_type: str | None, gpus: int, new: bool) -> float:
        if gpus > 1:
            return self._guesses.gang_s
        new = new or (self._guesses.new_after_real_gpu and gpu_type is not None and gpus > 0)
        return self._guesses.new_s if new else self._guesses.kept_s


def _like(gpu_type: str | None, gpus: int, new: bool) -> tuple[str | None, int, bool]:
    """Jobs without GPUs, with one and with several start in different ways; a gang's processes are
    always new.
    """
    return (gpu_type if gpus else None), min(gpus, 2), new or gpus > 1
