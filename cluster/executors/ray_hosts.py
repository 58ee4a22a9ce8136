"""The current hosts of a Ray cluster, looked up at most once a second.

A host counts as lost as soon as its raylet does not answer. Ray's head reports this only after some
15 s, and work placed there meanwhile would be lost. The head counts as lost when its port does not
answer: most calls of Ray do not return without it.
"""

import os
import socket
import time
from collections.abc import Iterable
from typing import Any

import ray

# The only interface with which a driver sees draining nodes. Ray Train uses it too.
import ray._private.state

from ebbline.cluster.executors.executor import ACCELERATOR_TYPE, SLOTS, Host
from ebbline.tasks.errors import ClusterLost

LOOK_EVERY_S = 1.0
PROBE_S = 2.0
GROUP = "ray.io/node-group"  # on nodes that an autoscaler started, and its head


class RayHosts:
    """The hosts of a connected driver's cluster. Methods raise ClusterLost when the head does not
    answer.
    """

    def __init__(self, address: str) -> None:
        self._head = address
        self.head_lost = False
        # After this time without the head (60 s) Ray ends the driver's process without a message.
        # So this class gives up earlier.
        name = "RAY_gcs_rpc_server_reconnect_timeout_s"
        self._patience_s = float(os.environ.get(name, "60")) * 2 / 3
        self._nodes: dict[str, dict[str, Any]] = {}
        self._draining: frozenset[str] = frozenset()
        self._gone: set[str] = set()
        self._looked_at = float("-inf")

    def wait_for_head(self) -> None:
        """Wait until the head answers. Call this before each Ray call that needs the head, because
        such a call does not return without it.
        """
        host, port = self._head.rsplit(":", 1)
        since = time.monotonic()
        while not _answers(host, int(port)):
            if time.monotonic() - since > self._patience_s:
                self.head_lost = True
                raise ClusterLost(
                    f"the head of the Ray cluster at {self._head} has not answered for "
                    f"{self._patience_s:.0f} s; restart it or start another cluster, then run the "
                    "same command to continue from the store"
                )
            time.sleep(0.5)

    def find(self) -> dict[str, Host]:
        """The live hosts by name."""
        self._look()
        spare = any(
            node["Resources"].get("CPU", 0) > node["Resources"].get("GPU", 0)
            for node in self._nodes.values()
        )
        return {name: self._host(name, node, spare) for name, node in self._nodes.items()}

    def node_id(self, name: str) -> str | None:
        """Ray's node id of a live host; None if the host is gone."""
        return str(self._nodes[name]["NodeID"]) if name in self._nodes else None

    def drains(self, name: str) -> bool:
        return name in self._nodes and self._nodes[name]["NodeID"] in self._draining

    def lost(self, names: Iterable[str]) -> str | None:
        """The first of these hosts that is gone, even before Ray's head reports it."""
        for name in names:
            node = self._nodes.get(name)
            if node is None or not _answers(node["NodeManagerAddress"], node["NodeManagerPort"]):
                self._gone.add(name)
                self._nodes.pop(name, None)
                return name
        return None

    @property
    def grows(self) -> bool:
        """Whether an autoscaler runs the cluster and adds hosts on request."""
        self._look()
        return any(node["Labels"].get(GROUP) for node in self._nodes.values())

    def _look(self) -> None:
        if time.monotonic() - self._looked_at < LOOK_EVERY_S:
            return
        self.wait_for_head()
        self._draining = frozenset(ray._private.state.state.get_draining_nodes())
        alive = {_name(node): node for node in ray.nodes() if node["Alive"]}
        self._nodes = {name: node for name, node in alive.items() if name not in self._gone}
        self._looked_at = time.monotonic()

    def _host(self, name: str, node: dict[str, Any], spare: bool) -> Host:
        resources = node["Resources"]
        cpus = int(resources.get("CPU", 0))
        gpus = min(int(resources.get("GPU", 0)), cpus)  # each GPU's process needs a core
        types = [
            key.removeprefix("accelerator_type:")
            for key in resources
            if key.startswith("accelerator_type:")
        ]
        labels = {**({ACCELERATOR_TYPE: types[0]} if types else {}), **node["Labels"]}
        # If every core belongs to a GPU, stages without a GPU must share, or they would never run.
        slots = min(SLOTS, cpus - gpus) if spare else min(1, cpus)
        return Host(name, gpus, slots, labels, draining=self.drains(name))


def _name(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerHostname']}/{node['NodeID'][:12]}"


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=PROBE_S).close()
    except OSError:
        return False
    return True
