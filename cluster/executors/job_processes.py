"""The processes of a job on a Ray cluster: where they run, whether they must leave, how to end
them.

Every process of a job signs on in Ray's key-value store, so that it can be killed on its machine
when it hangs: Ray only asks a process to end. A gang's controller signs on with its actor id.
Otherwise its placement group would hold the gang's GPUs until the driver ends: Ray frees a group
when its creator and the driver are gone, and Ray Train removes it only at an orderly end.
"""

import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import psutil
import ray
import ray._private.state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_list, _internal_kv_put
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ebbline.cluster.executors.executor import ACCELERATOR_TYPE

NAMESPACE = b"ebbline"
LOOK_EVERY_S = 2.0


class Process(NamedTuple):
    """A process that signed on. `node` and `actor` are Ray ids; `actor` is empty for a task.
    `started` is in seconds since the epoch.
    """

    role: Literal["task", "controller", "member"]
    node: str
    pid: int
    started: float
    actor: str


@dataclass(frozen=True)
class JobProcesses:
    """The processes of a job. `job` is unique among the jobs of all drivers; `nodes` has the Ray
    node id of each process.
    """

    job: str
    nodes: tuple[str, ...]

    def sign_on(self, role: Literal["task", "controller", "member"]) -> None:
        context, process = ray.get_runtime_context(), psutil.Process()
        node, actor = context.get_node_id(), context.get_actor_id() or ""
        key = f"{self.job}/{role}/{node}/{process.pid}/{process.create_time()}/{actor}"
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
        groups = [group for process in self.signed_on() for group in groups_of(process.actor)]
        return any(group.state == PlacementGroupTableData.CREATED for group in groups)

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
            Process(role, node, int(pid), float(started), actor)  # type: ignore[arg-type]
            for _, role, node, pid, started, actor in signed
        ]

    def forget(self) -> None:
        _internal_kv_del(f"{self.job}/", del_by_prefix=True, namespace=NAMESPACE)

    def end(self) -> None:
        """Kill the processes on their machines and free their resources, without waiting."""
        for process in self.signed_on():
            kill.options(scheduling_strategy=at(process.node)).remote(process)
            # Here too: that machine may be gone, while its group holds other machines' GPUs.
            remove_groups_of(process.actor)
        self.forget()


def own_gpu_type() -> str | None:
    """The type of this worker's GPUs by the Ray label of its host; None without real GPUs."""
    labels: Mapping[str, str] = ray.get_runtime_context().get_node_labels()
    return labels.get(ACCELERATOR_TYPE)


def at(node: str) -> NodeAffinitySchedulingStrategy:
    """Schedule on this node only. Ray fails at once when the node is gone or drains."""
    return NodeAffinitySchedulingStrategy(node, soft=False)


def groups_of(actor: str) -> list[Any]:
    """Ray's rows for the existing placement groups of an actor; none when `actor` is empty."""
    rows = (
        ray._private.state.state._connect_and_get_accessor().get_placement_group_table()
        if actor
        else []
    )
    groups = [PlacementGroupTableData.FromString(row) for row in rows]
    return [
        group
        for group in groups
        if group.creator_actor_id.hex() == actor and group.state != PlacementGroupTableData.REMOVED
    ]


def remove_groups_of(actor: str) -> None:
    for group in groups_of(actor):
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


@ray.remote(max_retries=0, num_cpus=0)  # type: ignore[untyped-decorator]
def kill(process: Process) -> None:
    # The start time is compared because the system may have reused the process id.
    if (
        psutil.pid_exists(process.pid)
        and psutil.Process(process.pid).create_time() == process.started
    ):
        os.kill(process.pid, signal.SIGKILL)
    remove_groups_of(process.actor)  # it may have made a group after `end` removed the first
