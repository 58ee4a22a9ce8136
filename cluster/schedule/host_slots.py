"""The free GPUs and slots of each host, and when its jobs and reservations begin and end."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ebbline.cluster.executors.executor import Capacity, Host

# Overdue jobs are assumed to end in 1 s, so nothing is backfilled before a reservation that near.
IMMINENT_S = 1.0


@dataclass(frozen=True)
class Busy:
    """A running job: its GPUs by host, and its expected remaining seconds. A job without GPUs holds
    a slot of one host (`{host: 0}`).
    """

    hosts: Mapping[str, int]
    remaining_s: float

    @property
    def gpus(self) -> int:
        return sum(self.hosts.values())


@dataclass
class HostSlots:
    """The free GPUs and slots of a host. `ends` has (seconds from now, GPUs) of its jobs.

    From `reserved_s` on it is reserved for a gang, except `spare` GPUs.
    """

    host: Host
    gpus: int
    slots: int
    ends: list[tuple[float, int]] = field(default_factory=list)
    reserved_s: float | None = None
    spare: int = 0
    _free_s: dict[int, float] = field(default_factory=dict)

    def window_s(self, gpus: int) -> float:
        """The longest duration of a job with this many GPUs (0: one slot) that may start here now;
        negative if none may start.
        """
        if gpus == 0:
            return math.inf if self.slots > 0 else -1.0
        if gpus > self.gpus:
            return -1.0
        if self.reserved_s is None or gpus <= self.spare:
            return math.inf
        return self.reserved_s if self.reserved_s > IMMINENT_S else -1.0

    def free_s(self, gpus: int) -> float:
        """Seconds until this many GPUs are free, if every job ends as expected."""
        if gpus not in self._free_s:
            free, when_s = self.gpus, 0.0
            for end_s, held in sorted(self.ends):
                if free >= gpus:
                    break
                free, when_s = free + held, max(0.0, end_s)
            self._free_s[gpus] = when_s if free >= gpus else math.inf
        return self._free_s[gpus]

    def free_at(self, when_s: float) -> int:
        return self.gpus + sum(held for end_s, held in self.ends if end_s <= when_s)

    def take(self, gpus: int, seconds: float) -> None:
        if gpus == 0:
            self.slots -= 1
            return
        if self.reserved_s is not None and seconds > self.reserved_s:
            self.spare -= gpus
        self.gpus -= gpus
        self.ends.append((seconds, gpus))
        self._free_s.clear()


def host_slots_of(running: Sequence[Busy], capacity: Capacity) -> list[HostSlots]:
    host_slots = {
        host.name: HostSlots(host, host.gpus, host.cpus)
        for host in capacity.hosts
        if not host.draining
    }
    for job in running:
        for name, gpus in job.hosts.items():
            if name in host_slots and gpus > 0:
                host_slots[name].gpus -= gpus
                host_slots[name].ends.append((job.remaining_s, gpus))
            elif name in host_slots and job.gpus == 0:
                host_slots[name].slots -= 1
    return sorted(host_slots.values(), key=lambda on_host: on_host.host.name)


def together_s(host_slots: Sequence[HostSlots], gpus: int) -> float:
    """Seconds until these hosts together have this many free GPUs."""
    free = sum(on_host.gpus for on_host in host_slots)
    when_s = 0.0
    for end_s, held in sorted(end for on_host in host_slots for end in on_host.ends):
        if free >= gpus:
            break
        free, when_s = free + held, max(0.0, end_s)
    return when_s if free >= gpus else math.inf
