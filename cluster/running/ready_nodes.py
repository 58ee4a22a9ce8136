"""The ready nodes, and the scheduler's queue: the ready nodes that may start now.

Nothing here is done for every ready node at every turn: a node is read when its state changes, and
a few of the others each turn, because estimates change.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator

from ebbline.cluster.executors.executor import Needs
from ebbline.cluster.running.nodes import Node
from ebbline.cluster.running.timing import Timing
from ebbline.cluster.schedule.retry_policy import RetryPolicy
from ebbline.cluster.schedule.scheduler import ReadyQueue, ReadyStage

READ_AGAIN = 100  # the most nodes whose expected seconds are read again at a turn
_Shape = tuple[int, bool, tuple[tuple[str, str], ...]]


class ReadyNodes:
    """The ready nodes by key. `stage_of` makes the scheduler's stage of a node, from its path in
    seconds and the time since which it is ready.
    """

    def __init__(
        self,
        timing: Timing,
        retry_policy: RetryPolicy,
        stage_of: Callable[[Node, float, float], ReadyStage],
    ) -> None:
        self.nodes: dict[str, Node] = {}
        self.queue = ReadyQueue()  # the ready nodes that may start now
        self.unaffordable: dict[str, ReadyStage] = {}  # rejected by the meter
        self._timing, self._retry_policy, self._stage_of = timing, retry_policy, stage_of
        self._stages: dict[str, ReadyStage] = {}
        self._since: dict[str, float] = {}
        self._changed: dict[str, None] = {}
        self._paused: set[str] = set()  # keys of lost stages before their next try
        self._by_shape: dict[_Shape, dict[str, None]] = {}
        self._to_read: OrderedDict[str, None] = OrderedDict()

    def state_changed(self, node: Node) -> None:
        """Add a node that has become ready, or remove one that was ready."""
        self._changed[node.key] = None
        if node.state == "ready":
            self.nodes[node.key] = node
        else:
            self.nodes.pop(node.key, None)
            self._since.pop(node.key, None)

    def update(self, now: float) -> None:
        """Bring the queue up to date: new nodes, ended pauses, and changed estimates of a few."""
        changed, self._changed = self._changed, {}
        for key in changed:
            self._remove(key)
        self._read([key for key in changed if key in self.nodes], now)
        for key in [key for key in self._paused if self._retry_policy.may_start(key, now)]:
            self._paused.discard(key)
            self.queue.put(self._stages[key])
        self._read_again(now)

    def _remove(self, key: str) -> None:
        stage = self._stages.pop(key, None)
        if stage is not None:
            self.queue.remove(key)
            self.unaffordable.pop(key, None)
            self._paused.discard(key)
            del self._to_read[key]
            alike = self._by_shape[_shape(stage.needs)]
            del alike[key]
            if not alike:
                del self._by_shape[_shape(stage.needs)]

    def _read(self, keys: Collection[str], now: float) -> None:
        """Add nodes that were not read before."""
        paths = self._timing.paths(self.nodes[key] for key in keys)
        for key in keys:
            node = self.nodes[key]
            path_s = paths[node.stage.lineage]
            stage = self._stage_of(node, path_s, self._since.setdefault(key, now))
            self._stages[key] = stage
            self._by_shape.setdefault(_shape(stage.needs), {})[key] = None
            self._to_read[key] = None
            if self._retry_policy.may_start(key, now):
                self.queue.put(stage)
            else:
                self._paused.add(key)

    def _read_again(self, now: float) -> None:
        """Read the nodes that were read longest ago, until READ_AGAIN were read, downstream nodes
        included.
        """
        paths: dict[str, float] = {}
        for _ in range(len(self._to_read)):
            if len(paths) >= READ_AGAIN:
                return
            key = next(iter(self._to_read))
            self._to_read.move_to_end(key)
            node = self.nodes[key]
            self._timing.paths([node], paths)
            stage = self._stage_of(node, paths[node.stage.lineage], self._since[key])
            if stage != self._stages[key]:
                self._stages[key] = stage
                self.unaffordable.pop(key, None)
                if key not in self._paused:
                    self.queue.put(stage)

    def reject(self, dear: ReadyStage) -> None:
        """Take a stage that the meter rejected out of the queue, and all stages with the same needs
        that take as long or longer.
        """
        for key in self._by_shape[_shape(dear.needs)]:
            if key in self.queue and self.queue[key].seconds >= dear.seconds:
                self.unaffordable[key] = self.queue[key]
                self.queue.remove(key)

    def reconsider(self) -> None:
        """Put the rejected stages back, because the meter may allow them now."""
        for stage in self.unaffordable.values():
            self.queue.put(stage)
        self.unaffordable.clear()

    def one_of_each_need(self) -> list[ReadyStage]:
        """One of the stages with the same needs, for each need."""
        return [self._stages[next(iter(keys))] for keys in self._by_shape.values()]

    def all(self) -> Iterator[ReadyStage]:
        """All ready stages, whether in the queue or not."""
        return iter(self._stages.values())


def _shape(needs: Needs) -> _Shape:
    labels = tuple(sorted(needs.labels.items())) if needs.labels else ()
    return needs.gpus, needs.spread, labels
