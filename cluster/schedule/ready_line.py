"""The ready stages that the same hosts can run, and what a decision of the scheduler does with
them.
"""

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from ebbline.cluster.executors.executor import Needs
from ebbline.cluster.schedule.host_slots import HostSlots, together_s
from ebbline.cluster.schedule.labels import selected
from ebbline.cluster.schedule.ready_stage import Order, ReadyStage, StagesInOrder
from ebbline.tasks.training.packs import fit

SHORTEST_BATCH_S = 20.0
LONGEST_BATCH_S = 600.0  # limits the work of a lost worker and the wait of a gang
CACHED_GPUS = 2  # a host with the model in its cache counts as having this many fewer free GPUs
Shares = frozenset[tuple[str | None, float]]


@dataclass(frozen=True)
class Placement:
    """A batch to start now: stages in order, and hosts (host -> GPUs). Members of a pack are
    adjacent.
    """

    keys: tuple[str, ...]
    needs: Needs
    hosts: Mapping[str, int]


class ReadyLine:
    """Ready stages with equal needs, which avoid the same hosts. It lasts between decisions."""

    def __init__(self, needs: Needs, shun: frozenset[str]) -> None:
        self.needs, self.shun = needs, shun
        self.stages = StagesInOrder()
        # (pack, resident) -> shares of a GPU -> members
        self.packs: dict[tuple[str, str], dict[Shares, StagesInOrder]] = {}
        self._by_resident: dict[str, StagesInOrder] = {}

    def add(self, stage: ReadyStage) -> None:
        self.stages.add(stage)
        self._by_resident.setdefault(stage.resident, StagesInOrder()).add(stage)
        if stage.pack:
            pack = self.packs.setdefault((stage.pack, stage.resident), {})
            pack.setdefault(_shares(stage), StagesInOrder()).add(stage)

    def remove(self, stage: ReadyStage) -> None:
        self.stages.remove(stage)
        self._by_resident[stage.resident].remove(stage)
        if not self._by_resident[stage.resident]:
            del self._by_resident[stage.resident]
        if stage.pack:
            pack = self.packs[stage.pack, stage.resident]
            pack[_shares(stage)].remove(stage)
            if not pack[_shares(stage)]:
                del pack[_shares(stage)]
            if not pack:
                del self.packs[stage.pack, stage.resident]

    def group(self, resident: str) -> StagesInOrder:
        """The stages with this `resident`."""
        return self._by_resident[resident]

    def able(self, host_slots: Sequence[HostSlots]) -> list[HostSlots]:
        """The hosts that can run these stages; without the avoided hosts, if the others suffice."""
        able = [
            on_host for on_host in host_slots if selected(self.needs.labels, on_host.host.labels)
        ]
        for among in ([on_host for on_host in able if on_host.host.name not in self.shun], able):
            if self.needs.gpus == 0:
                large = [on_host for on_host in among if on_host.host.cpus > 0]
            elif self.needs.spread:
                total = sum(on_host.host.gpus for on_host in among)
                large = among if total >= self.needs.gpus else []
            else:
                large = [on_host for on_host in among if on_host.host.gpus >= self.needs.gpus]
            if large:
                return large
        return []


def _shares(stage: ReadyStage) -> Shares:
    return frozenset(stage.shares.items())


class LineTurn:
    """A line during one decision. `placed` has the keys that this decision has placed.

    A line of gangs is `reserving` while a gang that does not fit may reserve hosts. Otherwise only
    stages that can start are looked at.
    """

    def __init__(self, line: ReadyLine, host_slots: list[HostSlots], placed: set[str]) -> None:
        self.line, self.needs, self._host_slots = line, line.needs, host_slots
        gpus = self.needs.gpus
        self.reserving = gpus > 1
        least = min(1, gpus) if self.needs.spread else gpus
        self._free = [
            on_host
            for on_host in host_slots
            if (on_host.gpus >= least if gpus else on_host.slots > 0)
        ]
        self._placed = placed
        self._widest_s: float | None = None
        self._at_once = (
            sum(on_host.host.gpus for on_host in host_slots) // gpus
            if gpus
            else sum(on_host.host.cpus for on_host in host_slots)
        )
        self._after: Order | None = None
        self._next: ReadyStage | None = None
        self._soonest_hosts: list[tuple[float, str, int]] | None = None

    def hosts_changed(self) -> None:
        self._widest_s = None

    def widest_s(self) -> float:
        """The longest duration of a stage that may start now; negative if none may."""
        if self._widest_s is None:
            gpus = self.needs.gpus
            self._widest_s = (
                _widest_together_s(self._free, gpus)
                if self.needs.spread and gpus > 1
                else max((on_host.window_s(gpus) for on_host in self._free), default=-1.0)
            )
        return self._widest_s

    def head(self) -> ReadyStage | None:
        """The next stage that may start, or with `reserving` the next stage. None: there is none,
        for the rest of the decision.
        """
        most_s = math.inf if self.reserving else self.widest_s()
        if most_s < 0:
            return None
        stage = self._next
        if stage is not None and (stage.seconds > most_s or stage.key in self._placed):
            self._after, stage = stage.order, None
        if stage is None:
            stages = self.line.stages.after(self._after, most_s)
            stage = self._next = next(
                (each for each in stages if each.key not in self._placed), None
            )
        return stage

    def pass_over(self, stage: ReadyStage) -> None:
        """Continue behind `stage`."""
        self._after, self._next = stage.order, None

    def hosts_for(
        self, stage: ReadyStage, cached: Mapping[str, AbstractSet[str]]
    ) -> dict[str, int]:
        """The hosts where `stage` can start now (host -> GPUs; 0 for a slot); empty if there is
        none.
        """
        gpus = self.needs.gpus
        if stage.seconds > self.widest_s():
            return {}

        def preference(on_host: HostSlots) -> tuple[bool, bool, bool, int, str]:
            name, near = on_host.host.name, stage.resident in cached.get(on_host.host.name, ())
            if gpus == 0:
                return name in stage.shun, False, not near, -on_host.slots, name
            opened = on_host.gpus == on_host.host.gpus > gpus
            reserved = on_host.reserved_s is not None  # an overdue job there delays a gang
            return name in stage.shun, reserved, opened, on_host.gpus - CACHED_GPUS * near, name

        able = [on_host for on_host in self._free if on_host.window_s(gpus) >= stage.seconds]
        if able:
            return {min(able, key=preference).host.name: gpus}
        hosts: dict[str, int] = {}
        for on_host in sorted(
            self._free,
            key=lambda on_host: (
                on_host.host.name in stage.shun,
                -on_host.gpus,
                on_host.host.name,
            ),
        ):
            fits_whole = on_host.window_s(on_host.gpus) >= stage.seconds
            most = on_host.gpus if fits_whole else min(on_host.gpus, on_host.spare)
            if most > 0 and gpus > 0:
                hosts[on_host.host.name] = min(most, gpus)
                gpus -= hosts[on_host.host.name]
        return hosts

    def reserve(self, stage: ReadyStage) -> bool:
        """Reserve the hosts that can run this gang soonest, among those without a reservation.
        Returns whether it has reserved any.
        """
        gpus = self.needs.gpus
        soonest = self._soonest(stage) if self.reserving else None
        if soonest is None:
            return False
        when_s, chosen = soonest.free_s(gpus), [soonest]
        if self.needs.spread:
            unreserved = [each for each in self._host_slots if each.reserved_s is None]
            joint_s = together_s(unreserved, gpus)
            if joint_s < when_s:
                when_s = joint_s
                chosen = sorted(
                    unreserved, key=lambda each: (-each.free_at(joint_s), each.host.name)
                )
        if when_s == math.inf:
            return False
        for on_host in chosen:
            free = on_host.free_at(when_s)
            if gpus > 0 and free > 0:
                on_host.reserved_s, on_host.spare = when_s, max(0, free - gpus)
                gpus -= free
        return True

    def _soonest(self, stage: ReadyStage) -> HostSlots | None:
        """The host without a reservation that can run a gang soonest. It is the top of a heap,
        whose times may be too early, because a job has started there since.
        """
        gpus = self.needs.gpus
        if self._soonest_hosts is None:
            self._soonest_hosts = [
                (on_host.free_s(gpus), on_host.host.name, number)
                for number, on_host in enumerate(self._host_slots)
            ]
            heapq.heapify(self._soonest_hosts)
        hosts = self._soonest_hosts
        while hosts:
            when_s, name, number = hosts[0]
            on_host = self._host_slots[number]
            if on_host.reserved_s is not None:
                heapq.heappop(hosts)
            elif on_host.free_s(gpus) != when_s:
                heapq.heapreplace(hosts, (on_host.free_s(gpus), name, number))
            elif name not in stage.shun:
                return on_host
            else:
                return min(
                    (each for each in self._host_slots if each.reserved_s is None),
                    key=lambda each: (
                        each.free_s(gpus),
                        each.host.name in stage.shun,
                        each.host.name,
                    ),
                )
        return None

    def may_reserve(self) -> bool:
        """Whether a host of this line has free GPUs, and one has no reservation."""
        return any(on_host.gpus > 0 for on_host in self._host_slots) and any(
            on_host.reserved_s is None for on_host in self._host_slots
        )

    def start(
        self, first: ReadyStage, hosts: Mapping[str, int], shortest_batch_s: float
    ) -> Placement:
        """Take the GPUs or slots for a batch: `first`, its pack, and the next stages of its group
        that fit in the batch's time, which is at least `shortest_batch_s`.
        """
        host_slots = [on_host for on_host in self._free if on_host.host.name in hosts]
        window_s = min(on_host.window_s(hosts[on_host.host.name]) for on_host in host_slots)
        most_s = min(LONGEST_BATCH_S, window_s)
        batch = [first.key]
        self._placed.add(first.key)
        total_s = first.seconds
        for stage in self._pack_of(first, host_slots[0].host.gpu_type, window_s):
            batch.append(stage.key)
            total_s += stage.seconds
        self._placed.update(batch)
        if total_s + self.line.stages.shortest_s <= most_s:
            group = self.line.group(first.resident)
            limit_s = min(most_s, max(shortest_batch_s, group.total_s / self._at_once))
            for stage in group.after(first.order):
                if stage.key in self._placed:
                    continue
                if total_s + stage.seconds > limit_s:
                    break
                batch.append(stage.key)
                total_s += stage.seconds
        for on_host in host_slots:
            on_host.take(hosts[on_host.host.name], total_s)
        self._placed.update(batch)
        return Placement(tuple(batch), first.needs, hosts)

    def _pack_of(
        self, first: ReadyStage, gpu_type: str | None, window_s: float
    ) -> Iterator[ReadyStage]:
        """The other members of the pack of `first`, in order: as many as fit, and at most one GPU's
        part of the line.
        """
        shares, seconds = [first.shares.get(gpu_type, 1.0)], first.seconds
        if not first.pack or shares[0] >= 1 or self.needs.gpus != 1:
            return
        part_s = self.line.stages.total_s / self._at_once
        members = self.line.packs[first.pack, first.resident]
        after: Order | None = None
        while seconds < part_s:
            nexts = []
            for same in members.values():
                for stage in same.after(after, window_s - seconds):
                    if not fit([*shares, stage.shares.get(gpu_type, 1.0)]):
                        break
                    if stage.key not in self._placed:
                        nexts.append(stage)
                        break
            if not nexts:
                return
            stage = min(nexts, key=lambda stage: stage.order)
            after = stage.order
            shares.append(stage.shares.get(gpu_type, 1.0))
            seconds += stage.seconds
            yield stage


def _widest_together_s(free: Sequence[HostSlots], gpus: int) -> float:
    """The longest duration for which these hosts together have this many GPUs now; negative if they
    have too few.
    """
    held = 0
    windows = []
    for on_host in free:
        spare = min(on_host.gpus, on_host.spare)
        held += spare
        windows.append((on_host.window_s(on_host.gpus), on_host.gpus - spare))
    if held >= gpus:
        return math.inf
    for window_s, more in sorted(windows, reverse=True):
        held += more
        if held >= gpus:
            return window_s
    return -1.0
