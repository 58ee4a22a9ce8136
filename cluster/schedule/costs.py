"""The cost of stages in GPU-seconds by GPU type, and in dollars by the profile's prices. Durations
are predicted in ebbline.cluster.schedule.estimates.

Invariant: a record has only facts (seconds, GPUs, their type). Dollars are computed when they are
shown, and are never stored.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from ebbline.cluster.executors.executor import ACCELERATOR_TYPE, Capacity, Job, Needs
from ebbline.cluster.profile import Profile

# Type -> number of GPUs. None is the type of logical GPUs and of GPUs that Ray does not recognize.
GpuTypes = Mapping[str | None, float]


class Origin(NamedTuple):
    """What kind of stage ran, by which VERSION, and where."""

    kind: str
    version: int
    gpus: int
    device: str
    gpu_type: str | None
    host: str


@dataclass(frozen=True, slots=True)
class Cost:
    """GPU-seconds by GPU type. Stages without a GPU are free: a GPU's price includes its host.

    The cost of one finished stage has its `origin`; a sum has none.
    """

    gpu_s: GpuTypes = field(default_factory=dict)
    origin: Origin | None = field(default=None, compare=False, repr=False)

    @staticmethod
    def of(gpus: GpuTypes, seconds: float) -> "Cost":
        return Cost({name: count * seconds for name, count in gpus.items() if count})

    def __add__(self, other: "Cost") -> "Cost":
        names = [*self.gpu_s, *(name for name in other.gpu_s if name not in self.gpu_s)]
        return Cost(
            {name: self.gpu_s.get(name, 0.0) + other.gpu_s.get(name, 0.0) for name in names}
        )

    def times(self, factor: float) -> "Cost":
        return Cost({name: seconds * factor for name, seconds in self.gpu_s.items()})

    @property
    def gpu_hours(self) -> float:
        return sum(self.gpu_s.values()) / 3600

    def usd(self, profile: Profile) -> float | None:
        """US dollars by the profile's prices; None if a used type has no price."""
        if not profile.gpus or self.unpriced(profile):
            return None
        return sum(
            seconds / 3600 * (profile.price(name) or 0.0) for name, seconds in self.gpu_s.items()
        )

    def unpriced(self, profile: Profile) -> list[str]:
        """The used types without a price. GPUs without a type count as `other`."""
        return sorted(
            {
                name or "other"
                for name, seconds in self.gpu_s.items()
                if seconds > 0 and profile.price(name) is None
            }
        )


def total(costs: Iterable[Cost]) -> Cost:
    gpu_s: dict[str | None, float] = {}
    for cost in costs:
        for name, seconds in cost.gpu_s.items():
            gpu_s[name] = gpu_s.get(name, 0.0) + seconds
    return Cost(gpu_s)


def cost_of(provenance: Mapping[str, Any]) -> Cost:
    """The cost of a finished stage, from its record's provenance."""
    return Cost.of(
        {provenance.get("gpu_type"): float(provenance.get("gpus", 0))}, float(provenance["seconds"])
    )


def origin_of(kind: str, version: int, provenance: Mapping[str, Any]) -> Origin:
    """The origin of a finished stage, from its record's provenance."""
    device, host = (
        str(provenance.get(name, default))
        for name, default in (("device", "an unknown device"), ("host", "unknown"))
    )
    gpus, gpu_type = int(provenance.get("gpus", 0)), provenance.get("gpu_type")
    return Origin(kind, version, gpus, device, gpu_type, host)


@lru_cache(4096)
def stage_cost(origin: Origin, cost: tuple[tuple[str | None, float], ...]) -> Cost:
    """The cost of one finished stage. The results of points that share the stage share the object,
    as a study has ten of them for each point.
    """
    return Cost(dict(cost), origin)


def expected_cost(
    needs: Needs, seconds: float, profile: Profile, gpu_type: str | None = None
) -> Cost:
    """The expected cost of a stage before its placement. It counts as run on the GPU type of its
    labels, else on `gpu_type`, else on the profile's most expensive type.
    """
    dearest = max(profile.gpus, key=lambda name: profile.gpus[name].usd_per_hour, default=None)
    return Cost.of({named_type(needs) or gpu_type or dearest: needs.gpus}, seconds)


def named_type(needs: Needs) -> str | None:
    """The GPU type that the labels require; None if they allow several types."""
    named = needs.labels.get(ACCELERATOR_TYPE, "")
    return named if named and not named.startswith(("!", "in(")) else None


def gpu_types(hosts: Mapping[str, int], capacity: Capacity) -> GpuTypes:
    """The GPU types of a job on `hosts` (host -> GPUs)."""
    type_of = {host.name: host.gpu_type for host in capacity.hosts}
    types: Counter[str | None] = Counter()
    for name, gpus in hosts.items():
        types[type_of.get(name)] += gpus
    return types


class Meter(Protocol):
    """Counts the cost of jobs, and may reject a job before it starts."""

    def affords(self, gpus: GpuTypes, seconds: float) -> bool:
        """Whether a job may start on these GPUs for an expected number of seconds."""

    def started(self, job: Job, gpus: GpuTypes, seconds: float) -> None:
        """Record that a job has started, for an expected number of seconds."""


class Unmetered:
    """A meter without a budget: it allows every job."""

    def affords(self, gpus: GpuTypes, seconds: float) -> bool:
        return True

    def started(self, job: Job, gpus: GpuTypes, seconds: float) -> None:
        return None
