"""Which ready stages start where, now: a pure function over (ready, running, capacity).

order       longest critical path first
batches     stages that share a resident base start together, as many as keep all GPUs evenly busy
gangs       all GPUs or none; while the first gang in line waits, one-GPU work may only slip in front of it when it is
            expected to end before the gang could start (EASY backfill)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from cluster.executor import Capacity, Needs

SHORTEST_BATCH_S = 20.0


@dataclass(frozen=True)
class Work:
    """A ready stage. `resident` names what it needs in memory; `path_s` is the longest chain of seconds from here to the end.

    `shun` names hosts where it was lost: it goes elsewhere if there is an elsewhere.
    """

    key: str
    needs: Needs
    resident: str
    seconds: float
    path_s: float
    shun: frozenset[str] = frozenset()

    @property
    def gpus(self) -> int:
        return self.needs.gpus


@dataclass(frozen=True)
class Busy:
    """A running job: what it holds where, and for how much longer. One that needs no GPU holds a slot of its one host (`{host: 0}`)."""

    hosts: Mapping[str, int]
    remaining_s: float

    @property
    def gpus(self) -> int:
        return sum(self.hosts.values())


@dataclass(frozen=True)
class Placement:
    """Start these stages now, in this order, as one batch on so many GPUs of these hosts."""

    keys: tuple[str, ...]
    needs: Needs
    hosts: Mapping[str, int]


def place(
    ready: Sequence[Work], running: Sequence[Busy], capacity: Capacity, cached: Mapping[str, frozenset[str]] = MappingProxyType({})
) -> list[Placement]:
    """The batches to start now. `cached` names the residents that each host has at hand. No order of what is given matters."""
    waiting = sorted(ready, key=lambda work: (-work.path_s, work.key))
    gpus_at = {host.name: host.gpus for host in capacity.hosts if not host.draining}
    cpus_at = {host.name: host.cpus for host in capacity.hosts if not host.draining}
    for job in running:
        for name, gpus in job.hosts.items():
            if name in gpus_at:
                gpus_at[name] -= gpus
                cpus_at[name] -= job.gpus == 0
    free_gpus, free_cpus = sum(gpus_at.values()), sum(cpus_at.values())
    shares = _even_shares(waiting, capacity)
    held: list[Busy] = list(running)
    placed: list[Placement] = []
    deadline_s: float | None = None  # when the first waiting gang could start; nothing longer may go before it
    while waiting:
        first = waiting[0]
        in_time = deadline_s is None or first.seconds <= deadline_s
        fits = free_cpus > 0 if first.gpus == 0 else first.gpus <= free_gpus and in_time
        if not fits:
            if first.gpus > free_gpus and deadline_s is None and first.gpus <= capacity.gpus:
                deadline_s = _free_at(first.gpus, free_gpus, held)
            waiting = waiting[1:]
            continue
        limit_s = shares[first.gpus, first.resident]
        if deadline_s is not None and first.gpus > 0:
            limit_s = min(limit_s, deadline_s)
        batch = _batch(first, waiting, limit_s)
        taken = {work.key for work in batch}
        waiting = [work for work in waiting if work.key not in taken]
        hosts = _hosts(first.gpus, gpus_at, cpus_at)
        placed.append(Placement(tuple(work.key for work in batch), first.needs, hosts))
        held.append(Busy(hosts, sum(work.seconds for work in batch)))
        free_gpus -= first.gpus
        free_cpus -= first.gpus == 0
    return placed


def _even_shares(ready: Sequence[Work], capacity: Capacity) -> dict[tuple[int, str], float]:
    """(gpus, resident) -> the seconds of one batch when that group's work is spread evenly over all it could run on."""
    totals: dict[tuple[int, str], float] = {}
    for work in ready:
        totals[work.gpus, work.resident] = totals.get((work.gpus, work.resident), 0.0) + work.seconds
    slots = {gpus: max(1, capacity.gpus // gpus if gpus else capacity.cpus) for gpus, _ in totals}
    return {group: max(SHORTEST_BATCH_S, total_s / slots[group[0]]) for group, total_s in totals.items()}


def _batch(first: Work, waiting: Sequence[Work], limit_s: float) -> list[Work]:
    """`first` and what else of its group fits into `limit_s` behind it."""
    batch, total_s = [first], first.seconds
    for work in waiting:
        same = (work.gpus, work.resident) == (first.gpus, first.resident) and work.key != first.key
        if same and total_s + work.seconds <= limit_s:
            batch.append(work)
            total_s += work.seconds
    return batch


def _hosts(gpus: int, gpus_at: dict[str, int], cpus_at: dict[str, int]) -> dict[str, int]:
    """Take so many GPUs, or one slot, of the hosts that have them."""
    if gpus == 0:
        name = max(sorted(cpus_at), key=lambda host: cpus_at[host])
        cpus_at[name] -= 1
        return {name: 0}
    hosts: dict[str, int] = {}
    for name in sorted(gpus_at, key=lambda host: (-gpus_at[host], host)):
        taken = min(gpus - sum(hosts.values()), gpus_at[name])
        if taken > 0:
            hosts[name] = taken
            gpus_at[name] -= taken
    return hosts


def _free_at(gpus: int, free: int, held: Sequence[Busy]) -> float:
    """Seconds until `gpus` GPUs are free at once, if every job ends when expected."""
    for job in sorted(held, key=lambda job: job.remaining_s):
        free += job.gpus
        if free >= gpus:
            return max(0.0, job.remaining_s)
    return float("inf")
