"""A ready stage as the scheduler sees it, and stages in the order in which they should start."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter

from ebbline.cluster.executors.executor import Needs

AGEING = 0.2  # a second of waiting counts as this many seconds of critical path
BLOCK = 64  # a block with twice as many stages is split; measured best for 10,000 stages
Order = tuple[float, str]


@dataclass(frozen=True)
class ReadyStage:
    """A ready stage. Stages with equal `resident` may form a batch; `path_s` is the critical path
    from its start, in seconds.

    `shun` names hosts where it was lost, which it avoids if others can run it. `waited_s` counts
    from when it became ready until the queue's time 0; it is negative for a later stage. Stages
    with the same `pack` (empty: none) may run at once on one GPU if their `shares` for its type add
    up to at most 1.
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
    def order(self) -> Order:
        """The sort key; the lowest goes first. Time moves all waiting stages up equally, so it is
        constant.
        """
        return -self.path_s - AGEING * self.waited_s, self.key


class _Block:
    """Neighbours in the order. `total_s` is None until it is read after a change."""

    def __init__(self, stages: list[ReadyStage]) -> None:
        self.stages = stages
        self.orders = [stage.order for stage in stages]
        self.shortest_s = min(stage.seconds for stage in stages)
        self.total_s: float | None = None

    def add(self, stage: ReadyStage) -> None:
        index = bisect_left(self.orders, stage.order)
        self.stages.insert(index, stage)
        self.orders.insert(index, stage.order)
        self.shortest_s, self.total_s = min(self.shortest_s, stage.seconds), None

    def remove(self, stage: ReadyStage) -> None:
        index = bisect_left(self.orders, stage.order)
        if self.stages[index].key != stage.key:
            raise KeyError(stage.key)
        del self.stages[index], self.orders[index]
        if stage.seconds == self.shortest_s:
            self.shortest_s = min((each.seconds for each in self.stages), default=math.inf)
        self.total_s = None

    def measured_s(self) -> float:
        if self.total_s is None:
            self.total_s = sum(stage.seconds for stage in self.stages)
        return self.total_s


class StagesInOrder:
    """Stages in their order. It finds the first that is short enough without reading the others: it
    is a list of blocks, each with its shortest duration.
    """

    def __init__(self, stages: Iterable[ReadyStage] = ()) -> None:
        ordered = sorted(stages, key=attrgetter("order"))
        self._blocks = [
            _Block(ordered[start : start + BLOCK]) for start in range(0, len(ordered), BLOCK)
        ]
        self._lasts = [block.orders[-1] for block in self._blocks]
        self._size = len(ordered)

    def __len__(self) -> int:
        return self._size

    def add(self, stage: ReadyStage) -> None:
        self._size += 1
        if not self._blocks:
            self._blocks, self._lasts = [_Block([stage])], [stage.order]
            return
        number = min(bisect_left(self._lasts, stage.order), len(self._blocks) - 1)
        block = self._blocks[number]
        block.add(stage)
        halves = [block]
        if len(block.stages) >= 2 * BLOCK:
            halves = [_Block(block.stages[:BLOCK]), _Block(block.stages[BLOCK:])]
        self._blocks[number : number + 1] = halves
        self._lasts[number : number + 1] = [half.orders[-1] for half in halves]

    def remove(self, stage: ReadyStage) -> None:
        """Remove a stage that was added with this order."""
        number = bisect_left(self._lasts, stage.order)
        block = self._blocks[number]
        block.remove(stage)
        self._size -= 1
        if block.stages:
            self._lasts[number] = block.orders[-1]
        else:
            del self._blocks[number], self._lasts[number]

    @property
    def shortest_s(self) -> float:
        return min(block.shortest_s for block in self._blocks)

    @property
    def total_s(self) -> float:
        return sum(block.measured_s() for block in self._blocks)

    def after(self, order: Order | None, most_s: float = math.inf) -> Iterator[ReadyStage]:
        """The stages behind `order` (None: all) of at most `most_s`, in order."""
        start = 0 if order is None else bisect_right(self._lasts, order)
        for number in range(start, len(self._blocks)):
            block = self._blocks[number]
            if block.shortest_s > most_s:
                continue
            first = 0 if order is None or number > start else bisect_right(block.orders, order)
            for stage in block.stages[first:] if first else block.stages:
                if stage.seconds <= most_s:
                    yield stage
