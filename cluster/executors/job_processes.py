"""A job on a Ray cluster's machines: which processes it has there, whether they will have to leave,
and how they are ended.

Every process of a job signs on, in Ray's own key-value store, so that one that hangs can be killed
on its machine: Ray asks a process to end, and one that is stuck does not hear it. A gang's
controller signs on as the actor that it is, because the placement group that it made would keep the
gang's GPUs until the driver ends: Ray gives a group up when its maker AND the driver are gone, and
Ray Train removes it only when its controller ends in peace.
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
    """A process that signed on: what it does for the job, where it runs, since when, and the Ray id
    of the actor that it is, if any.
    """

    role: Literal["task", "controller", "member"]
    node: str
    pid: int
    started: float
    actor: str


@dataclass(frozen=True)
class JobProcesses:
    """The processes of a job: its name among the jobs of all drivers, and the Ray id of the node
    of each process.
    """

    job: str
    nodes: tuple[str, ...]

    def sign_on(self, role: Literal["task", "controller", "member"]) -> None:
        context, process = ray.get_runtime_context(), psutil.Process()
        node, actor = context.get_node_id(), context.get_actor_id() or ""
        key = f"{self.job}/{role}/{node}/{process.pid}/{process.create_time()}/{actor}"
        _internal_kv_put(key, b"", namespace=NAMESPACE)

    def complete(self) -> bool:
        """Whether every process that works is there."""
        role = "task" if len(self.nodes) == 1 else "member"
        return sum(process.role == role for process in self.signed_on()) >= len(self.nodes)

    def begun(self) -> bool:
        """Whether it holds what it runs on. A gang does before its processes are there, and may
        hang while they join each other.
        """
        if len(self.nodes) == 1:
            return self.complete()
        groups = [group for process in self.signed_on() for group in groups_of(process.actor)]
        return any(group.state == PlacementGroupTableData.CREATED for group in groups)

    def leaving(self) -> Callable[[], bool]:
        """Whether a node of the job drains: asked of Ray's head at most every other second, and
        true for good.
        """
        said, looked_at = False, float("-inf")

        def leaving() -> bool:
            nonlocal said, looked_at
            if not said and time.monotonic() - looked_at >= LOOK_EVERY_S:
                said = (
                    not ray._private.state.state.get_draining_nodes().keys().isdisjoint(self.nodes)
                )
                looked_at = time.monotonic()
            return said

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
        """Kill what signed on, on the machines where it runs, and free what it held; does not
        wait.
        """
        for process in self.signed_on():
            kill.options(scheduling_strategy=at(process.node)).remote(process)
            remove_groups_of(
                process.actor
            )  # here too: that machine may be gone, and other machines' GPUs in the group
        self.forget()


def own_gpu_type() -> str | None:
    """The type of this worker's GPUs, as Ray labels its host; None without real GPUs."""
    labels: Mapping[str, str] = ray.get_runtime_context().get_node_labels()
    return labels.get(ACCELERATOR_TYPE)


def at(node: str) -> NodeAffinitySchedulingStrategy:
    """On this node or nowhere: Ray says so at once when the node is gone or drains."""
    return NodeAffinitySchedulingStrategy(node, soft=False)


def groups_of(actor: str) -> list[Any]:
    """Ray's rows of the placement groups that an actor made and that are not removed; none when
    `actor` is empty.
    """
    told = (
        ray._private.state.state._connect_and_get_accessor().get_placement_group_table()
        if actor
        else []
    )
    groups = [PlacementGroupTableData.FromString(row) for row in told]
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
    if (
        psutil.pid_exists(process.pid)
        and psutil.Process(process.pid).create_time() == process.started
    ):  # or the number is another's by now
        os.kill(process.pid, signal.SIGKILL)
    remove_groups_of(process.actor)  # it may have made one since it was told to end
