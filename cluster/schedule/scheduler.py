"""The scheduler: decides which ready stages start now, and on which hosts. It is a pure function of
(ready stages, running jobs, capacity, models cached on hosts).

order       longest critical path first; ageing moves waiting stages up, so that none starves
queue       kept between decisions: a decision reads only stages that it starts, and waiting gangs
batches     stages with equal `resident` start together, as many as keep all GPUs busy
packs       trainings that may share a GPU start on it together: as many as fit in its memory, and
            few enough to leave work for the other GPUs
gangs       all GPUs or none, on one host unless they may spread. A gang that does not fit reserves
            the hosts that can run it soonest. Until then other stages start there only if they are
            expected to end before (EASY backfill), or on GPUs that the gang does not need
hosts       the fullest host that fits, so that whole hosts stay free for gangs; a host with the
            model in its cache counts as fuller
"""

import heapq
from collections.abc import Iterable, KeysView, Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import MappingProxyType

from ebbline.cluster.executors.executor import Capacity
from ebbline.cluster.schedule.host_slots import Busy, HostSlots, host_slots_of
from ebbline.cluster.schedule.labels import selected
from ebbline.cluster.schedule.ready_line import (
    LONGEST_BATCH_S,
    SHORTEST_BATCH_S,
    LineTurn,
    Placement,
    ReadyLine,
)
from ebbline.cluster.schedule.ready_stage import AGEING, ReadyStage

__all__ = [
    "AGEING",
    "LONGEST_BATCH_S",
    "SHORTEST_BATCH_S",
    "SHUN_S",
    "Busy",
    "Placement",
    "ReadyQueue",
    "ReadyStage",
    "impossible",
    "place",
]

SHUN_S = 600.0  # how long a stage waits for hosts other than those where it was lost
_LineKey = tuple[int, bool, tuple[tuple[str, str], ...], frozenset[str]]


def place(
    ready: Iterable[ReadyStage],
    running: Sequence[Busy],
    capacity: Capacity,
    cached: Mapping[str, AbstractSet[str]] = MappingProxyType({}),
    shortest_batch_s: float = SHORTEST_BATCH_S,
) -> list[Placement]:
    """The batches to start now, of stages that no queue holds. Input order is irrelevant."""
    return ReadyQueue(ready).place(running, capacity, cached, shortest_batch_s=shortest_batch_s)


class ReadyQueue:
    """The ready stages. A decision is a function of the stages in the queue and its arguments, and
    changes neither: who starts a stage removes it.

    No stage starves. Ageing preserves the order of any two waiting stages, and paths are bounded.
    So only finitely many stages go before a given one, and it becomes the first in line. The first
    in line takes the next free GPU or slot. A gang that is first in line reserves the hosts that
    can run it soonest. Jobs that start there must be expected to end before that time, so it comes
    nearer. When it is at most IMMINENT_S away, no job starts there, even if estimates were wrong;
    the running jobs end and the gang starts.
    """

    def __init__(self, ready: Iterable[ReadyStage] = ()) -> None:
        self._lines: dict[_LineKey, ReadyLine] = {}
        self._stages: dict[str, tuple[ReadyStage, _LineKey]] = {}
        self._avoiding: set[str] = set()  # stages that still wait for other hosts
        for stage in ready:
            self.put(stage)

    def __len__(self) -> int:
        return len(self._stages)

    def __contains__(self, key: str) -> bool:
        return key in self._stages

    def __getitem__(self, key: str) -> ReadyStage:
        return self._stages[key][0]

    def keys(self) -> KeysView[str]:
        return self._stages.keys()

    def put(self, stage: ReadyStage) -> None:
        """Add a stage, in place of the one with its key."""
        self.remove(stage.key)
        self._put(stage, stage.shun)
        if stage.shun:
            self._avoiding.add(stage.key)

    def _put(self, stage: ReadyStage, shun: frozenset[str]) -> None:
        needs = stage.needs
        labels = tuple(sorted(needs.labels.items())) if needs.labels else ()
        key = needs.gpus, needs.spread, labels, shun
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = ReadyLine(needs, shun)
        line.add(stage)
        self._stages[stage.key] = stage, key

    def remove(self, key: str) -> None:
        """Remove the stage with this key, if there is one."""
        if key not in self._stages:
            return
        stage, line = self._stages.pop(key)
        self._lines[line].remove(stage)
        if not self._lines[line].stages:
            del self._lines[line]
        self._avoiding.discard(key)

    def place(
        self,
        running: Sequence[Busy],
        capacity: Capacity,
        cached: Mapping[str, AbstractSet[str]] = MappingProxyType({}),
        now_s: float = 0.0,
        shortest_batch_s: float = SHORTEST_BATCH_S,
    ) -> list[Placement]:
        """The batches to start now. `cached` maps hosts to the models in their caches. `now_s` is
        the time of the clock to which `waited_s` of the stages refers; it must not decrease. Stages
        that take `shortest_batch_s` together form one batch, although GPUs may be idle: it is what
        the start of another batch is worth.
        """
        self._end_avoiding(now_s)
        host_slots = host_slots_of(running, capacity)
        placed: set[str] = set()
        turns = self._turns(host_slots, placed)
        heads: list[tuple[tuple[float, str], int]] = []
        for number, turn in enumerate(turns):
            _push(heads, turn, number)
        unreserved = [on_host for on_host in host_slots if on_host.gpus > 0]
        placements: list[Placement] = []
        while heads:
            order, number = heapq.heappop(heads)
            turn = turns[number]
            stage = turn.head()
            if stage is None or stage.order != order:
                # Another line has taken hosts since, so a later stage is the next that may start.
                _push(heads, turn, number)
                continue
            turn.pass_over(stage)
            hosts = turn.hosts_for(stage, cached)
            if hosts:
                placements.append(turn.start(stage, hosts, shortest_batch_s))
            reserved = not hosts and turn.reserve(stage)
            if hosts or reserved:
                for each in turns:
                    each.hosts_changed()
            while unreserved and (
                unreserved[-1].gpus == 0 or unreserved[-1].reserved_s is not None
            ):
                unreserved.pop()
            # Reservations matter in this decision while a host with free GPUs has none.
            turn.reserving = (
                turn.reserving and bool(hosts or (reserved and unreserved)) and turn.may_reserve()
            )
            _push(heads, turn, number)
        return placements

    def _turns(self, host_slots: list[HostSlots], placed: set[str]) -> list[LineTurn]:
        """The lines whose resource (GPUs or slots) is free somewhere, on the hosts that can run
        them.
        """
        slots, gpus = (
            any(on_host.slots > 0 for on_host in host_slots),
            any(on_host.gpus > 0 for on_host in host_slots),
        )
        return [
            LineTurn(line, able, placed)
            for line in self._lines.values()
            if (gpus if line.needs.gpus else slots) and (able := line.able(host_slots))
        ]

    def _end_avoiding(self, now_s: float) -> None:
        """Let stages that have waited for SHUN_S use all hosts."""
        for key in [key for key in self._avoiding if self[key].waited_s + now_s >= SHUN_S]:
            stage = self[key]
            self.remove(key)
            self._put(stage, frozenset())


def _push(heads: list[tuple[tuple[float, str], int]], turn: LineTurn, number: int) -> None:
    head = turn.head()
    if head is not None:
        heapq.heappush(heads, (head.order, number))


def impossible(stage: ReadyStage, capacity: Capacity) -> str | None:
    """Why the hosts of `capacity`, draining hosts included, can never run `stage`, and what to do.
    None if they can.
    """
    needs = stage.needs
    able = [host for host in capacity.hosts if selected(needs.labels, host.labels)]
    if not able:
        required = ", ".join(f"{name}: {value}" for name, value in sorted(needs.labels.items()))
        existing = sorted(
            {
                f"{name}: {host.labels[name]}"
                for host in capacity.hosts
                for name in needs.labels
                if name in host.labels
            }
        )
        found = f"the hosts have {', '.join(existing)}" if existing else "no host has such a label"
        return (
            f"no host is labelled {required} ({found}); change the labels, or add such hosts to "
            "the cluster"
        )
    largest, total = max(host.gpus for host in able), sum(host.gpus for host in able)
    among = " with these labels" if needs.labels else ""
    if needs.gpus == 0 and not any(host.cpus for host in able):
        return (
            f"it needs a slot for stages without GPUs, and no host{among} has one; add CPUs to "
            "the cluster's hosts"
        )
    if needs.gpus > total:
        return (
            f"it needs {needs.gpus} GPUs at once, and all hosts{among} together have {total}; "
            "reduce its `gpus`, or add GPUs to the cluster"
        )
    if needs.gpus > largest and not needs.spread:
        return (
            f"it needs {needs.gpus} GPUs on one host, and the largest{among} has {largest};"
            " set `spread: true`, reduce its `gpus`, or add larger hosts to the cluster"
        )
    return None
