"""The specification of the scheduler's decision: it reads all ready stages, and keeps nothing.

The queue that ebbline uses must decide the same (tests/cluster/test_ready_queue.py). It is the
decision as it was until the queue was kept between decisions, with the same rules.
"""

import heapq
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from types import MappingProxyType

from ebbline.cluster.executors.executor import Capacity, Needs
from ebbline.cluster.schedule.host_slots import Busy, HostSlots, host_slots_of, together_s
from ebbline.cluster.schedule.labels import selected
from ebbline.cluster.schedule.ready_line import (
    CACHED_GPUS,
    LONGEST_BATCH_S,
    SHORTEST_BATCH_S,
    Placement,
)
from ebbline.cluster.schedule.ready_stage import ReadyStage
from ebbline.cluster.schedule.scheduler import SHUN_S
from ebbline.tasks.training.packs import fit


def place(
    ready: Sequence[ReadyStage],
    running: Sequence[Busy],
    capacity: Capacity,
    cached: Mapping[str, frozenset[str]] = MappingProxyType({}),
) -> list[Placement]:
    host_slots = host_slots_of(running, capacity)
    queues = _queues(ready, host_slots)
    heads = [(queue.line[0], number) for number, queue in enumerate(queues)]
    heapq.heapify(heads)
    placed: list[Placement] = []
    while heads:
        _, number = heapq.heappop(heads)
        queue = queues[number]
        stage = queue.stages[heapq.heappop(queue.line)[1]]
        hosts = queue.fit(stage, cached)
        if hosts:
            placed.append(queue.start(stage, hosts))
        if hosts or queue.reserve(stage):
            for each in queues:
                each.widest_s = None
        while queue.line and queue.line[0][1] in queue.placed:
            heapq.heappop(queue.line)
        if queue.line and queue.open():
            heapq.heappush(heads, (queue.line[0], number))
    return placed


@dataclass
class _ResidentGroup:
    """A queue's stages with equal `resident`, in order; stages before `next` are placed."""

    stages: list[ReadyStage]
    total_s: float
    next: int = 0


class _Line:
    """Ready stages that the same hosts can run. `line` is a heap of their orders.

    `widest_s` is the longest duration of a stage that may start now; None: to be recomputed.
    """

    def __init__(self, host_slots: list[HostSlots], stages: Sequence[ReadyStage]) -> None:
        self.needs, self.host_slots = stages[0].needs, host_slots
        self.stages = {stage.key: stage for stage in stages}
        self.line = [stage.order for stage in stages]
        heapq.heapify(self.line)
        self.placed: set[str] = set()
        self.shortest_s = min(stage.seconds for stage in stages)
        self.widest_s: float | None = None
        self._by_resident: dict[str, list[ReadyStage]] | None = None
        self._packs: dict[tuple[str, str], list[ReadyStage]] | None = None
        self._groups: dict[str, _ResidentGroup] = {}

    def _group(self, resident: str) -> _ResidentGroup:
        """The stages with this `resident`. Built on demand, because most calls start few of
        many stages.
        """
        if self._by_resident is None:
            self._by_resident = defaultdict(list)
            for stage in self.stages.values():
                self._by_resident[stage.resident].append(stage)
        if resident not in self._groups:
            stages = sorted(self._by_resident[resident], key=attrgetter("order"))
            self._groups[resident] = _ResidentGroup(stages, sum(stage.seconds for stage in stages))
        return self._groups[resident]

    def _widest_s(self) -> float:
        if self.widest_s is None:
            gpus = min(1, self.needs.gpus) if self.needs.spread else self.needs.gpus
            self.widest_s = max(on_host.window_s(gpus) for on_host in self.host_slots)
        return self.widest_s

    def open(self) -> bool:
        """Whether a stage of this queue may still start, or may still reserve a host."""
        if self._widest_s() >= self.shortest_s:
            return True
        gang = self.needs.gpus > 1
        return (
            gang
            and any(on_host.gpus > 0 for on_host in self.host_slots)
            and any(on_host.reserved_s is None for on_host in self.host_slots)
        )

    def fit(self, stage: ReadyStage, cached: Mapping[str, frozenset[str]]) -> dict[str, int]:
        """The hosts where `stage` can start now (host -> GPUs; 0 for a slot); empty if there is
        none.
        """
        gpus = self.needs.gpus
        if stage.seconds > self._widest_s():
            return {}

        def preference(on_host: HostSlots) -> tuple[bool, bool, bool, int, str]:
            name, near = on_host.host.name, stage.resident in cached.get(on_host.host.name, ())
            if gpus == 0:
                return name in stage.shun, False, not near, -on_host.slots, name
            opened = on_host.gpus == on_host.host.gpus > gpus
            reserved = on_host.reserved_s is not None  # an overdue job there delays a gang
            return name in stage.shun, reserved, opened, on_host.gpus - CACHED_GPUS * near, name

        able = [on_host for on_host in self.host_slots if on_host.window_s(gpus) >= stage.seconds]
        if able:
            return {min(able, key=preference).host.name: gpus}
        hosts: dict[str, int] = {}
        if self.needs.spread:
            for on_host in sorted(
                self.host_slots,
                key=lambda on_host: (
                    on_host.host.name in stage.shun,
                    -on_host.gpus,
                    on_host.host.name,
                ),
            ):
                most = (
                    on_host.gpus
                    if on_host.window_s(on_host.gpus) >= stage.seconds
                    else min(on_host.gpus, on_host.spare)
                )
                if most > 0 and gpus > 0:
                    hosts[on_host.host.name] = min(most, gpus)
                    gpus -= hosts[on_host.host.name]
        return hosts if gpus == 0 else {}

    def reserve(self, stage: ReadyStage) -> bool:
        """Reserve the hosts that can run this gang soonest, among those without a reservation.
        Returns whether it has reserved any.
        """
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
                on_host.host.name in stage.shun,
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

    def _pack_of(
        self, first: ReadyStage, gpu_type: str | None, at_once: int, window_s: float
    ) -> Iterator[ReadyStage]:
        """The other members of the pack of `first`, in order: as many as fit, and at most one GPU's
        part of the queue.
        """
        shares, seconds = [first.shares.get(gpu_type, 1.0)], first.seconds
        if not first.pack or shares[0] >= 1 or self.needs.gpus != 1:
            return
        if self._packs is None:
            self._packs = defaultdict(list)
            for stage in sorted(self.stages.values(), key=attrgetter("order")):
                self._packs[stage.pack, stage.resident].append(stage)
        part_s = sum(stage.seconds for stage in self.stages.values()) / at_once
        for stage in self._packs[first.pack, first.resident]:
            if seconds >= part_s:
                return
            share = stage.shares.get(gpu_type, 1.0)
            if (
                stage.key != first.key
                and stage.key not in self.placed
                and fit([*shares, share])
                and seconds + stage.seconds <= window_s
            ):
                shares.append(share)
                seconds += stage.seconds
                yield stage

    def start(self, first: ReadyStage, hosts: Mapping[str, int]) -> Placement:
        """Take the GPUs or slots for a batch: `first`, its pack, and the next stages of its group
        that fit in the batch's time.
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
                stage.key
                for stage in self._pack_of(first, host_slots[0].host.gpu_type, at_once, window_s)
            ),
        ]
        total_s = sum(self.stages[key].seconds for key in batch)
        self.placed.update(batch)
        if total_s + self.shortest_s <= most_s:
            group = self._group(first.resident)
            limit_s = min(most_s, max(SHORTEST_BATCH_S, group.total_s / at_once))
            for stage in itertools.islice(group.stages, group.next, None):
                if stage.order > first.order and stage.key not in self.placed:
                    if total_s + stage.seconds > limit_s:
                        break
                    batch.append(stage.key)
                    total_s += stage.seconds
                group.next += 1
        for on_host in host_slots:
            on_host.take(hosts[on_host.host.name], total_s)
        self.placed.update(batch)
        return Placement(tuple(batch), first.needs, hosts)


def _queues(ready: Sequence[ReadyStage], host_slots: Sequence[HostSlots]) -> list[_Line]:
    """The ready stages by the hosts that can run them, without stages whose resource (GPUs or
    slots) is nowhere free.
    """
    slots, gpus = (
        any(on_host.slots > 0 for on_host in host_slots),
        any(on_host.gpus > 0 for on_host in host_slots),
    )
    if not (slots and gpus):
        ready = [stage for stage in ready if (gpus if stage.needs.gpus else slots)]
    lines: dict[tuple[int, bool, tuple[tuple[str, str], ...], frozenset[str]], list[ReadyStage]] = (
        defaultdict(list)
    )
    line_of: dict[
        int, list[ReadyStage]
    ] = {}  # by id(needs), for speed: many stages share few objects
    for stage in ready:
        needs = stage.needs
        line = line_of.get(id(needs))
        if line is None or stage.shun:
            shun = stage.shun if stage.waited_s < SHUN_S else frozenset()
            line = lines[
                needs.gpus,
                needs.spread,
                tuple(sorted(needs.labels.items())) if needs.labels else (),
                shun,
            ]
            if not shun:
                line_of[id(needs)] = line
        line.append(stage)
    able = [
        (_able(stages[0].needs, shunned, host_slots), stages)
        for (_, _, _, shunned), stages in lines.items()
    ]
    return [_Line(among, stages) for among, stages in able if among]


def _able(needs: Needs, shun: frozenset[str], host_slots: Sequence[HostSlots]) -> list[HostSlots]:
    """The hosts that can run stages with these needs; without the hosts in `shun`, if the others
    suffice.
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
