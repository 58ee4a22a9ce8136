"""Which ready stages start where, now: a pure function over (ready, running, capacity, what is
cached where).

order       longest critical path first; what has waited moves up, so nothing waits for ever behind
            more critical work
batches     stages that share a resident base start together, as many as keep all GPUs evenly busy
packs       trainings that may share a GPU start on it at once, as many as fit there, and no more
            than leave the other GPUs their part
gangs       all GPUs or none, on one host unless they may spread. A gang that does not fit reserves
            the hosts that can have it soonest; until then others start there only if they are
            expected to end before (EASY backfill), or on GPUs that the gang leaves over
hosts       the fullest that fits, so that whole hosts stay free for gangs; one that has the base at
            hand counts as fuller
"""

import heapq
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from types import MappingProxyType

from ebbline.cluster.executors.executor import Capacity, Needs
from ebbline.cluster.schedule.host_slots import Busy, HostSlots, host_slots_of, together_s
from ebbline.cluster.schedule.labels import selected
from ebbline.tasks.training.packs import fit

__all__ = ["Busy", "Placement", "Work", "impossible", "place"]

SHORTEST_BATCH_S = 20.0
LONGEST_BATCH_S = 600.0  # what a lost worker costs, and what a gang waits for
AGEING = 0.2  # seconds of critical path that a second of waiting is worth
SHUN_S = 600.0  # how long a stage waits for another host than the one where it was lost
CACHED_GPUS = 2  # a host that has the base at hand counts as having so many GPUs fewer free


@dataclass(frozen=True)
class Work:
    """A ready stage. `resident` names what it needs in memory; `path_s` is the longest chain of
    seconds from here to the end.

    `shun` names hosts where it was lost: it goes elsewhere if there is an elsewhere. `waited_s`
    counts from when it became ready. Works with the same `pack` (empty: none) may run at once on a
    GPU of a type where their `shares` add up to at most 1.
    """

    key: str
    needs: Needs
    resident: str
    seconds: float
    path_s: float
    shun: frozenset[str] = frozenset()
    waited_s: float = 0.0
    pack: str = ""
    shares: Mapping[str | None, float] = field(default_factory=dict)

    @property
    def gpus(self) -> int:
        return self.needs.gpus

    @cached_property
    def order(self) -> tuple[float, str]:
        """The lowest goes first. Kept, because a stage is asked for it as often as the scheduler is
        while it waits.
        """
        return -self.path_s - AGEING * self.waited_s, self.key


@dataclass(frozen=True)
class Placement:
    """Start these stages now, in this order, as one batch on so many GPUs of these hosts. Members
    of a pack are next to each other.
    """

    keys: tuple[str, ...]
    needs: Needs
    hosts: Mapping[str, int]


def place(
    ready: Sequence[Work],
    running: Sequence[Busy],
    capacity: Capacity,
    cached: Mapping[str, frozenset[str]] = MappingProxyType({}),
) -> list[Placement]:
    """The batches to start now. `cached` names the residents that each host has at hand. No order
    of what is given matters.

    Nothing starves. Ageing keeps the order of any two stages once both wait, and paths are bounded,
    so only finitely many stages ever go before a given one, and it comes to be first in line. One
    GPU or one slot cannot be fragmented: the first in line takes the next that is free. A gang that
    is first in line reserves the hosts that can have it soonest, and all that starts there ends
    before; so that moment only comes nearer, until the hosts are given to nobody else (IMMINENT_S),
    whatever the estimates were worth, and their jobs end.
    """
    host_slots = host_slots_of(running, capacity)
    queues = _queues(ready, host_slots)
    heads = [(queue.line[0], number) for number, queue in enumerate(queues)]
    heapq.heapify(heads)
    placed: list[Placement] = []
    while heads:
        _, number = heapq.heappop(heads)
        queue = queues[number]
        work = queue.works[heapq.heappop(queue.line)[1]]
        hosts = queue.fit(work, cached)
        if hosts:
            placed.append(queue.start(work, hosts))
        if hosts or queue.reserve(work):
            for each in queues:
                each.widest_s = None
        while queue.line and queue.line[0][1] in queue.taken:
            heapq.heappop(queue.line)
        if queue.line and queue.open():
            heapq.heappush(heads, (queue.line[0], number))
    return placed


def impossible(work: Work, capacity: Capacity) -> str | None:
    """Why no host of `capacity` could ever take `work`, and what to do; None if one could. Hosts
    that drain count: they are there.
    """
    needs = work.needs
    able = [host for host in capacity.hosts if selected(needs.labels, host.labels)]
    if not able:
        wanted = ", ".join(f"{name}: {value}" for name, value in sorted(needs.labels.items()))
        there = sorted(
            {
                f"{name}: {host.labels[name]}"
                for host in capacity.hosts
                for name in needs.labels
                if name in host.labels
            }
        )
        have = f"theirs are {', '.join(there)}" if there else "none has such a label"
        return (
            f"no host is labelled {wanted} ({have}); change the labels, or add such hosts to "
            "the cluster"
        )
    largest, total = max(host.gpus for host in able), sum(host.gpus for host in able)
    among = " with these labels" if needs.labels else ""
    if needs.gpus == 0 and not any(host.cpus for host in able):
        return (
            f"it needs a slot for work without GPUs, and no host{among} has one; give the "
            "cluster's hosts CPUs"
        )
    if needs.gpus > total:
        return (
            f"it needs {needs.gpus} GPUs at once, and all hosts{among} together have {total}; "
            "give it fewer, or the cluster more"
        )
    if needs.gpus > largest and not needs.spread:
        return (
            f"it needs {needs.gpus} GPUs on one host, and the largest{among} has {largest};"
            " allow `spread: true`, give it fewer GPUs, or give the cluster larger hosts"
        )
    return None


@dataclass
class _Group:
    """The works of a queue that share a resident, in line; those up to `next` are dealt with."""

    works: list[Work]
    total_s: float
    next: int = 0


class _Queue:
    """Ready stages that the same hosts can take: `line` is a heap of their orders.

    `widest_s` is how long the longest stage may last that could start now; None when that may have
    changed.
    """

    def __init__(self, host_slots: list[HostSlots], works: Sequence[Work]) -> None:
        self.needs, self.host_slots = works[0].needs, host_slots
        self.works = {work.key: work for work in works}
        self.line = [work.order for work in works]
        heapq.heapify(self.line)
        self.taken: set[str] = set()
        self.shortest_s = min(work.seconds for work in works)
        self.widest_s: float | None = None
        self._by_resident: dict[str, list[Work]] | None = None
        self._packs: dict[tuple[str, str], list[Work]] | None = None
        self._groups: dict[str, _Group] = {}

    def _group(self, resident: str) -> _Group:
        """Made when its first stage starts: most calls start few stages, and among many."""
        if self._by_resident is None:
            self._by_resident = defaultdict(list)
            for work in self.works.values():
                self._by_resident[work.resident].append(work)
        if resident not in self._groups:
            works = sorted(self._by_resident[resident], key=attrgetter("order"))
            self._groups[resident] = _Group(works, sum(work.seconds for work in works))
        return self._groups[resident]

    def _widest_s(self) -> float:
        if self.widest_s is None:
            gpus = min(1, self.needs.gpus) if self.needs.spread else self.needs.gpus
            self.widest_s = max(on_host.window_s(gpus) for on_host in self.host_slots)
        return self.widest_s

    def open(self) -> bool:
        """Whether any of its stages could still start, or be kept a host for before others take its
        GPUs.
        """
        if self._widest_s() >= self.shortest_s:
            return True
        gang = self.needs.gpus > 1
        return (
            gang
            and any(on_host.gpus > 0 for on_host in self.host_slots)
            and any(on_host.reserved_s is None for on_host in self.host_slots)
        )

    def fit(self, work: Work, cached: Mapping[str, frozenset[str]]) -> dict[str, int]:
        """Where `work` can start now: GPUs by host, {host: 0} for one that needs none, empty if
        nowhere.
        """
        gpus = self.needs.gpus
        if work.seconds > self._widest_s():
            return {}

        def preference(on_host: HostSlots) -> tuple[bool, bool, bool, int, str]:
            name, near = on_host.host.name, work.resident in cached.get(on_host.host.name, ())
            if gpus == 0:
                return name in work.shun, False, not near, -on_host.slots, name
            opened = on_host.gpus == on_host.host.gpus > gpus
            kept = on_host.reserved_s is not None  # what outlasts its estimate there delays a gang
            return name in work.shun, kept, opened, on_host.gpus - CACHED_GPUS * near, name

        able = [on_host for on_host in self.host_slots if on_host.window_s(gpus) >= work.seconds]
        if able:
            return {min(able, key=preference).host.name: gpus}
        hosts: dict[str, int] = {}
        if self.needs.spread:
            for on_host in sorted(
                self.host_slots,
                key=lambda on_host: (
                    on_host.host.name in work.shun,
                    -on_host.gpus,
                    on_host.host.name,
                ),
            ):
                most = (
                    on_host.gpus
                    if on_host.window_s(on_host.gpus) >= work.seconds
                    else min(on_host.gpus, on_host.spare)
                )
                if most > 0 and gpus > 0:
                    hosts[on_host.host.name] = min(most, gpus)
                    gpus -= hosts[on_host.host.name]
        return hosts if gpus == 0 else {}

    def reserve(self, work: Work) -> bool:
        """Keep the hosts that can have this gang soonest for it, if any is not kept for another."""
        gpus = self.needs.gpus
        host_slots = (
            [on_host for on_host in self.host_slots if on_host.reserved_s is None]
            if gpus > 1
            else []
        )
        if not host_slots:
            return False
        soonest = min(
            host_slots,
            key=lambda on_host: (
                on_host.free_s(gpus),
                on_host.host.name in work.shun,
                on_host.host.name,
            ),
        )
        when_s = soonest.free_s(gpus)
        chosen = [soonest]
        if self.needs.spread and (joint_s := together_s(host_slots, gpus)) < when_s:
            when_s, chosen = (
                joint_s,
                sorted(
                    host_slots, key=lambda on_host: (-on_host.free_at(joint_s), on_host.host.name)
                ),
            )
        if when_s == math.inf:
            return False
        for on_host in chosen:
            free = on_host.free_at(when_s)
            if gpus > 0 and free > 0:
                on_host.reserved_s, on_host.spare = when_s, max(0, free - gpus)
                gpus -= free
        return True

    def _mates(
        self, first: Work, gpu_type: str | None, at_once: int, window_s: float
    ) -> Iterator[Work]:
        """Those that run at once with `first`, in line: as many as fit, until every other GPU has
        its part of the queue.
        """
        shares, seconds = [first.shares.get(gpu_type, 1.0)], first.seconds
        if not first.pack or shares[0] >= 1 or self.needs.gpus != 1:
            return
        if self._packs is None:
            self._packs = defaultdict(list)
            for work in sorted(self.works.values(), key=attrgetter("order")):
                self._packs[work.pack, work.resident].append(work)
        part_s = sum(work.seconds for work in self.works.values()) / at_once
        for work in self._packs[first.pack, first.resident]:
            if seconds >= part_s:
                return
            share = work.shares.get(gpu_type, 1.0)
            if (
                work.key != first.key
                and work.key not in self.taken
                and fit([*shares, share])
                and seconds + work.seconds <= window_s
            ):
                shares.append(share)
                seconds += work.seconds
                yield work

    def start(self, first: Work, hosts: Mapping[str, int]) -> Placement:
        """Take the GPUs or slots for `first`, its pack, and those of its group that come next in
        line and fit behind it.
        """
        host_slots = [on_host for on_host in self.host_slots if on_host.host.name in hosts]
        window_s = min(on_host.window_s(hosts[on_host.host.name]) for on_host in host_slots)
        most_s = min(LONGEST_BATCH_S, window_s)
        gpus = self.needs.gpus
        at_once = (
            sum(on_host.host.gpus for on_host in self.host_slots) // gpus
            if gpus
            else sum(on_host.host.cpus for on_host in self.host_slots)
        )
        batch = [
            first.key,
            *(
                work.key
                for work in self._mates(first, host_slots[0].host.gpu_type, at_once, window_s)
            ),
        ]
        total_s = sum(self.works[key].seconds for key in batch)
        self.taken.update(batch)
        if total_s + self.shortest_s <= most_s:
            group = self._group(first.resident)
            limit_s = min(most_s, max(SHORTEST_BATCH_S, group.total_s / at_once))
            for work in itertools.islice(group.works, group.next, None):
                if work.order > first.order and work.key not in self.taken:
                    if total_s + work.seconds > limit_s:
                        break
                    batch.append(work.key)
                    total_s += work.seconds
                group.next += 1
        for on_host in host_slots:
            on_host.take(hosts[on_host.host.name], total_s)
        self.taken.update(batch)
        return Placement(tuple(batch), first.needs, hosts)


def _queues(ready: Sequence[Work], host_slots: Sequence[HostSlots]) -> list[_Queue]:
    """The ready stages by the hosts that can take them, without those for which nothing is free
    anywhere.
    """
    slots, gpus = (
        any(on_host.slots > 0 for on_host in host_slots),
        any(on_host.gpus > 0 for on_host in host_slots),
    )
    if not (slots and gpus):
        ready = [work for work in ready if (gpus if work.needs.gpus else slots)]
    lines: dict[tuple[int, bool, tuple[tuple[str, str], ...], frozenset[str]], list[Work]] = (
        defaultdict(list)
    )
    known: dict[int, list[Work]] = {}  # by the very object: a study has few needs, and many stages
    for work in ready:
        needs = work.needs
        line = known.get(id(needs))
        if line is None or work.shun:
            shun = work.shun if work.waited_s < SHUN_S else frozenset()
            line = lines[
                needs.gpus,
                needs.spread,
                tuple(sorted(needs.labels.items())) if needs.labels else (),
                shun,
            ]
            if not shun:
                known[id(needs)] = line
        line.append(work)
    able = [
        (_able(works[0].needs, shunned, host_slots), works)
        for (_, _, _, shunned), works in lines.items()
    ]
    return [_Queue(among, works) for among, works in able if among]


def _able(needs: Needs, shun: frozenset[str], host_slots: Sequence[HostSlots]) -> list[HostSlots]:
    """The hosts that could ever have a part in such work; without those to be shunned, if the
    others could run it.
    """
    able = [on_host for on_host in host_slots if selected(needs.labels, on_host.host.labels)]
    for among in ([on_host for on_host in able if on_host.host.name not in shun], able):
        if needs.gpus == 0:
            large = [on_host for on_host in among if on_host.host.cpus > 0]
        elif needs.spread:
            large = among if sum(on_host.host.gpus for on_host in among) >= needs.gpus else []
        else:
            large = [on_host for on_host in among if on_host.host.gpus >= needs.gpus]
        if large:
            return large
    return []
