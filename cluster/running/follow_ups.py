"""The follow-ups of running jobs: small stages that run in the batch of the stage whose output they
read (ebbline.cluster.store.follow_ups). They are jobs of nobody else meanwhile.

The driver learns a follow-up's key when it sees the record of that stage. If the job ends without a
record or a report of a follow-up, that stage is ready, and starts as any other.
"""

from collections.abc import Mapping
from pathlib import Path

from ebbline.cluster.running.nodes import Node, Running
from ebbline.cluster.store.artifacts import Store


class FollowUps:
    """The follow-ups among `nodes` (by lineage) of the jobs `running`."""

    def __init__(
        self, store: Store, running: Mapping[str, Running], nodes: Mapping[str, Node]
    ) -> None:
        self._store, self._running, self._nodes = store, running, nodes

    def waiting(self) -> list[Node]:
        """Those whose keys are not known yet."""
        return [
            node
            for item in self._running.values()
            for lineage in item.follow_ups
            if (node := self._nodes.get(lineage)) is not None and node.state == "waiting"
        ]

    def attempt(self, node: Node) -> Path | None:
        """The attempt of a follow-up whose key is known; None for any other stage."""
        item = self._job_of(node)
        if item is None:
            return None
        name = item.follow_ups[node.stage.lineage]
        return self._store.root / node.stage.kind / node.key / name

    def begin(self, node: Node) -> None:
        """List a follow-up in its job, behind the stage that it reads from."""
        item = self._job_of(node)
        if item is None or node.key in item.keys:
            return
        above = {self._nodes[stage.lineage].key for stage in node.stage.upstream()}
        place = next((number for number, key in enumerate(item.keys) if key in above), -1)
        item.keys.insert(place + 1, node.key)

    def _job_of(self, node: Node) -> Running | None:
        lineage = node.stage.lineage
        return next((item for item in self._running.values() if lineage in item.follow_ups), None)
