"""What stages cost: GPU-seconds by type of GPU, and dollars by the profile's prices. How long they
take: ebbline.cluster.schedule.estimates.

A record holds facts (seconds, GPUs, their type). Dollars are worked out from the profile whenever
they are shown, and are kept nowhere.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ebbline.cluster.executors.executor import ACCELERATOR_TYPE, Capacity, Job, Needs
from ebbline.cluster.profile import Profile

GpuTypes = Mapping[
    str | None, float
]  # type -> how many; None is the type of logical GPUs, and of those that Ray does not know


@dataclass(frozen=True)
class Cost:
    """GPU-seconds by type of GPU. What needs no GPU costs nothing: a GPU's price includes its
    host.
    """

    gpu_s: GpuTypes = field(default_factory=dict)

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
        """Dollars by the profile's prices; None when it has none, or none for a type that was
        used.
        """
        if not profile.gpus or self.unpriced(profile):
            return None
        return sum(
            seconds / 3600 * (profile.price(name) or 0.0) for name, seconds in self.gpu_s.items()
        )

    def unpriced(self, profile: Profile) -> list[str]:
        """The types that were used and have no price; GPUs without a type go by `other`."""
        return sorted(
            {
                name or "other"
                for name, seconds in self.gpu_s.items()
                if seconds > 0 and profile.price(name) is None
            }
        )


def total(costs: Iterable[Cost]) -> Cost:
    return sum(costs, Cost())


def cost_of(provenance: Mapping[str, Any]) -> Cost:
    """What a stage cost when it ran."""
    return Cost.of(
        {provenance.get("gpu_type"): float(provenance.get("gpus", 0))}, float(provenance["seconds"])
    )


def expected_cost(
    needs: Needs, seconds: float, profile: Profile, gpu_type: str | None = None
) -> Cost:
    """What a stage will cost before it is known where it runs: on the type of its labels, else
    `gpu_type`, else the profile's dearest.
    """
    dearest = max(profile.gpus, key=lambda name: profile.gpus[name].usd_per_hour, default=None)
    return Cost.of({named_type(needs) or gpu_type or dearest: needs.gpus}, seconds)


def named_type(needs: Needs) -> str | None:
    """The type of GPU that labels name; None when they leave a choice, or say nothing of it."""
    named = needs.labels.get(ACCELERATOR_TYPE, "")
    return named if named and not named.startswith(("!", "in(")) else None


def gpu_types(hosts: Mapping[str, int], capacity: Capacity) -> GpuTypes:
    """The types of the GPUs that a job has on `hosts`."""
    known = {host.name: host.gpu_type for host in capacity.hosts}
    types: Counter[str | None] = Counter()
    for name, gpus in hosts.items():
        types[known.get(name)] += gpus
    return types


class Meter(Protocol):
    """Who counts what runs, and may say that something must not start."""

    def affords(self, gpus: GpuTypes, seconds: float) -> bool:
        """Whether a job on these GPUs may start that is expected to take so long."""

    def started(self, job: Job, gpus: GpuTypes, seconds: float) -> None:
        """A job has started, and is expected to take so long."""


class Unmetered:
    """Counts nothing and affords everything."""

    def affords(self, gpus: GpuTypes, seconds: float) -> bool:
        return True

    def started(self, job: Job, gpus: GpuTypes, seconds: float) -> None:
        return None
