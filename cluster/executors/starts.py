"""The overhead of a job: the seconds that it takes beside its stages.

Overhead is the start of processes, their imports, submission, and the report of the end. A stage's
own seconds have no imports. A job on a warm process has a fraction of the overhead of one on a new
process.
"""

import statistics
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

REMEMBERED = 200  # the latest jobs of a category


@dataclass(frozen=True)
class StartCosts:
    """Default overheads of an executor, in use until some are measured. The values were measured
    with Ray on 2 cores: docs/costs.md.
    """

    new_s: float = 6.0  # a job with a GPU on a new process, which imports torch
    new_without_gpu_s: float = 0.5  # torch comes later: ebbline.cluster.executors.preparation
    kept_s: float = 0.5  # a job on a warm process
    gang_s: float = 11.0
    cluster_s: float = 4.0  # from the start of a drive to its first job
    new_after_real_gpu: bool = False  # a process with a real GPU ends with its job


@dataclass
class WarmProcesses:
    """Models which jobs find a warm process. A host keeps as many as it ever ran at once, counted
    separately for GPUs and slots. A gang always needs new processes.
    """

    _idle: Counter[tuple[str, bool]] = field(default_factory=Counter)
    _held: dict[str, tuple[str, bool]] = field(default_factory=dict)

    def would_be_new(self, hosts: Mapping[str, int]) -> bool:
        """Whether a job that starts now on these hosts (host -> GPUs) would need a new process."""
        return sum(hosts.values()) > 1 or not all(
            self._idle[name, gpus > 0] for name, gpus in hosts.items()
        )

    def start(self, job: str, hosts: Mapping[str, int]) -> bool:
        """Record the start of a job. Returns whether it needs a new process."""
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
    """Measured overheads of jobs, by category: the median of the latest, else the executor's
    default.
    """

    def __init__(self, defaults: StartCosts) -> None:
        self._defaults = defaults
        self._measured: dict[tuple[str | None, int, bool], deque[float]] = defaultdict(
            lambda: deque(maxlen=REMEMBERED)
        )
        self._medians: dict[tuple[str | None, int, bool], float] = {}
        self._clusters: deque[float] = deque(maxlen=REMEMBERED)

    def learn_cluster(self, seconds: float) -> None:
        """Record the seconds from the start of a drive until its first job has begun."""
        self._clusters.append(seconds)

    @property
    def cluster_s(self) -> float:
        """Seconds from the start of a drive to its first job: joining or starting a cluster."""
        return statistics.median(self._clusters) if self._clusters else self._defaults.cluster_s

    def learn(self, gpu_type: str | None, gpus: int, new: bool, seconds: float) -> None:
        """Record the overhead of a job in seconds. Negative values (cached stages) are ignored."""
        if seconds >= 0.0:
            category = _category(gpu_type, gpus, new)
            self._measured[category].append(seconds)
            self._medians.pop(category, None)

    def seconds(self, gpu_type: str | None, gpus: int, new: bool = False) -> float:
        """The expected overhead of a job in seconds. A category without measurements uses those of
        any GPU type, else the default.
        """
        category = _category(gpu_type, gpus, new)
        if category not in self._measured:
            category = next(
                (other for other in self._measured if other[1:] == category[1:]), category
            )
        if category not in self._measured:
            return self._default(gpu_type, gpus, new)
        if category not in self._medians:
            self._medians[category] = statistics.median(self._measured[category])
        return self._medians[category]

    def _default(self, gpu_type: str | None, gpus: int, new: bool) -> float:
        if gpus > 1:
            return self._defaults.gang_s
        new = new or (self._defaults.new_after_real_gpu and gpu_type is not None and gpus > 0)
        if not new:
            return self._defaults.kept_s
        return self._defaults.new_s if gpus else self._defaults.new_without_gpu_s


def _category(gpu_type: str | None, gpus: int, new: bool) -> tuple[str | None, int, bool]:
    """(GPU type, 0, 1 or 2 for a gang, whether the process is new); a gang's are always new."""
    return (gpu_type if gpus else None), min(gpus, 2), new or gpus > 1
