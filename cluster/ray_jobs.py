"""A job on a Ray cluster's machines: which processes it has there, whether they will have to leave, and how they are ended.

Every process of a job signs on, in Ray's own key-value store, so that one that hangs can be killed on its machine: Ray asks
a process to end, and one that is stuck does not hear it.
"""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import ray
import ray._private.state
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_list, _internal_kv_put
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

NAMESPACE = b"ebbline"
LOOK_EVERY_S = 2.0


@dataclass(frozen=True)
class Post:
    """A job's place: its name among the jobs of all drivers, and the Ray id of the node of each of its processes."""

    job: str
    nodes: tuple[str, ...]

    def sign_on(self) -> None:
        process = psutil.Process()
        key = f"{self.job}/{ray.get_runtime_context().get_node_id()}/{process.pid}/{process.create_time()}"
        _internal_kv_put(key, b"", namespace=NAMESPACE)

    def leaving(self) -> Callable[[], bool]:
        """Whether a node of the job drains: asked of Ray's head at most every other second, and true for good."""
        said, looked_at = False, float("-inf")

        def leaving() -> bool:
            nonlocal said, looked_at
            if not said and time.monotonic() - looked_at >= LOOK_EVERY_S:
                said = not ray._private.state.state.get_draining_nodes().keys().isdisjoint(self.nodes)
                looked_at = time.monotonic()
            return said

        return leaving

    def processes(self) -> list[tuple[str, int, float]]:
        """(node, process id, when it started) of those that signed on."""
        signed = [bytes(key).decode().split("/") for key in _internal_kv_list(f"{self.job}/", namespace=NAMESPACE)]
        return [(node, int(pid), float(started)) for _, node, pid, started in signed]

    def forget(self) -> None:
        _internal_kv_del(f"{self.job}/", del_by_prefix=True, namespace=NAMESPACE)

    def end(self) -> None:
        """Kill what signed on, on the machines where it runs; does not wait."""
        for node, pid, started in self.processes():
            kill.options(scheduling_strategy=at(node)).remote(pid, started)
        self.forget()


def at(node: str) -> NodeAffinitySchedulingStrategy:
    """On this node or nowhere: Ray says so at once when the node is gone or drains."""
    return NodeAffinitySchedulingStrategy(node, soft=False)


@ray.remote(max_retries=0, num_cpus=0)  # type: ignore[untyped-decorator]
def kill(pid: int, started: float) -> None:
    if psutil.pid_exists(pid) and psutil.Process(pid).create_time() == started:  # or the number is another's by now
        os.kill(pid, signal.SIGKILL)
