"""The processes of a job on a Ray cluster: where they run, whether they must leave, how to end
them.

Every process of a job signs on in Ray's key-value store, so that it can be killed on its machine
when it hangs: Ray only asks a process to end. The driver reserves a gang's GPUs in a placement
group. It is removed when the gang ends, by the driver when the job is lost or cancelled, and by Ray
when the driver ends.
"""

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import psutil
import ray
import ray._private.state
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_list, _internal_kv_put
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from ebbline.cluster.executors.executor import ACCELERATOR_TYPE

NAMESPACE = b"ebbline"
LOOK_EVERY_S = 2.0


class Process(NamedTuple):
    """A process that signed on. `node` is a Ray id. `started` is in seconds since the epoch."""

    role: Literal["task", "member"]
    node: str
    pid: int
    started: float


@dataclass(frozen=True)
class JobProcesses:
    """The processes of a job. `job` is unique among the jobs of all drivers; `nodes` has the Ray
    node id of each process; `group` is the id of a gang's placement group.
    """

    job: str
    nodes: tuple[str, ...]
    group: str = ""

    @staticmethod
    def reserve(job: str, nodes: Sequence[str]) -> "JobProcesses":
        """A job on these nodes. For several processes, reserve a CPU and a GPU each on its node,
        without waiting until they are free.
        """
        if len(nodes) == 1:
            return JobProcesses(job, tuple(nodes))
        group = placement_group(
            [{"CPU": 1, "GPU": 1} for _ in nodes],
            bundle_label_selector=[{ray._raylet.RAY_NODE_ID_KEY: node} for node in nodes],
        )
        return JobProcesses(job, tuple(nodes), group.id.hex())

    def bundle(self, rank: int) -> PlacementGroupSchedulingStrategy:
        """Schedule on the reserved GPU of this rank."""
        return PlacementGroupSchedulingStrategy(self._group(), placement_group_bundle_index=rank)

    def _group(self) -> PlacementGroup:
        return PlacementGroup(ray.PlacementGroupID(bytes.fromhex(self.group)))

    def sign_on(self, role: Literal["task", "member"]) -> None:
        node, process = ray.get_runtime_context().get_node_id(), psutil.Process()
        key = f"{self.job}/{role}/{node}/{process.pid}/{process.create_time()}"
        _internal_kv_put(key, b"", namespace=NAMESPACE)

    def complete(self) -> bool:
        """Whether all worker processes have signed on."""
        role = "task" if len(self.nodes) == 1 else "member"
        return sum(process.role == role for process in self.signed_on()) >= len(self.nodes)

    def begun(self) -> bool:
        """Whether the job holds its resources. A gang holds them before its processes exist, and
        may hang while they join.
        """
        if len(self.nodes) == 1:
            return self.complete()
        return bool(placement_group_table(self._group()).get("state") == "CREATED")

    def leaving(self) -> Callable[[], bool]:
        """A function that returns whether a node of the job drains. It asks Ray's head at most
        every LOOK_EVERY_S seconds; once True, it stays True.
        """
        drains, looked_at = False, float("-inf")

        def leaving() -> bool:
            nonlocal drains, looked_at
            if not drains and time.monotonic() - looked_at >= LOOK_EVERY_S:
                draining = ray._private.state.state.get_draining_nodes()
                drains = not draining.keys().isdisjoint(self.nodes)
                looked_at = time.monotonic()
            return drains

        return leaving

    def signed_on(self) -> list[Process]:
        signed = [
            bytes(key).decode().split("/")
            for key in _internal_kv_list(f"{self.job}/", namespace=NAMESPACE)
        ]
        return [
            Process(role, node, int(pid), float(started))  # type: ignore[arg-type]
            for _, role, node, pid, started in signed
        ]

    def free(self) -> None:
        """Free the reserved GPUs; processes that still run there end."""
        if self.group:
            remove_placement_group(self._group())

    def forget(self) -> None:
        """Free what a job that has ended leaves behind."""
        self.free()
        _internal_kv_del(f"{self.job}/", del_by_prefix=True, namespace=NAMESPACE)

    def end(self) -> None:
        """Kill the processes on their machines and free their resources, without waiting."""
        for process in self.signed_on():
            kill.options(scheduling_strategy=at(process.node)).remote(process)
        self.forget()


def own_gpu_type() -> str | None:
    """The type of this worker's GPUs by the Ray label of its host; None without real GPUs."""
    labels: Mapping[str, str] = ray.get_runtime_context().get_node_labels()
    return labels.get(ACCELERATOR_TYPE)


def at(node: str) -> NodeAffinitySchedulingStrategy:
    """Schedule on this node only. Ray fails at once when the node is gone or drains."""
    return NodeAffinitySchedulingStrategy(node, soft=False)


@ray.remote(max_retries=0, num_cpus=0)  # type: ignore[untyped-decorator]
def kill(process: Process) -> None:
    # The start time is compared because the system may have reused the process id.
    if (
        psutil.pid_exists(process.pid)
        and psutil.Process(process.pid).create_time() == process.started
    ):
        os.kill(process.pid, signal.SIGKILL)
