"""The table of executors, with the facts that a command needs before it opens one.

A new executor is one file and one row of EXECUTORS. `ebbline --help` reads this module, so it
imports nothing heavy; an executor's own module is imported when it is opened.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ebbline.cluster.checks import ExecutorCheck
from ebbline.cluster.executors.starts import StartCosts
from ebbline.tasks.errors import StudyError

if TYPE_CHECKING:
    from ebbline.cluster.executors.executor import Capacity, Executor

MOST_LOGICAL_GPUS = 4


@dataclass(frozen=True)
class ExecutorOptions:
    """The settings with which a run opens its executor.

    `address` is the cluster's address. `gang` is the number of GPUs of the study's largest stage.
    `gpus` is the number of logical GPUs on a machine without real GPUs.
    """

    address: str
    gang: int
    gpus: int | None = None

    @property
    def logical_gpus(self) -> int:
        """The number of logical GPUs: `gpus`, or a default for this machine's cores."""
        return self.gpus or max(self.gang, min(MOST_LOGICAL_GPUS, len(os.sched_getaffinity(0))))


def _on_this_machine(options: ExecutorOptions) -> "Capacity | None":
    from ebbline.cluster.executors.this_machine import capacity_here

    return capacity_here(options)


def _nothing_to_check(address: str) -> ExecutorCheck:
    return ExecutorCheck()


@dataclass(frozen=True)
class ExecutorKind:
    """An executor before it is opened.

    `name` is the value of `--executor`; its jobs are called NAME-NUMBER. `label` names the place in
    help texts. `capacity` returns its future capacity, or None if only an open executor knows it.
    `check` is its part of `ebbline doctor`; `packages` are the Python packages that it requires.
    """

    name: str
    label: str
    open: "Callable[[ExecutorOptions], Executor]"
    capacity: "Callable[[ExecutorOptions], Capacity | None]" = _on_this_machine
    own_processes: bool = True  # a job has processes of its own, which take time to start
    serial: bool = False  # stages run one after another, wherever the scheduler placed them
    start_costs: StartCosts = field(default_factory=StartCosts)
    check: Callable[[str], ExecutorCheck] = _nothing_to_check
    packages: tuple[str, ...] = ()

    def ran(self, job_id: str) -> bool:
        """Whether this executor ran the job with this id."""
        return job_id.startswith(f"{self.name}-")


def _open_ray(options: ExecutorOptions) -> "Executor":
    from ebbline.cluster.executors.ray_executor import RayExecutor

    return RayExecutor(options.address, options.logical_gpus)


def _ray_capacity(options: ExecutorOptions) -> "Capacity | None":
    """This machine's capacity for a local cluster, which is not started for this."""
    return _on_this_machine(options) if options.address == "local" else None


def _check_ray(address: str) -> ExecutorCheck:
    from ebbline.cluster.executors.ray_check import check

    return check(address)


def _open_inline(options: ExecutorOptions) -> "Executor":
    from ebbline.cluster.executors.inline import InlineExecutor

    return InlineExecutor(gpus=max(options.gang, options.logical_gpus))


EXECUTORS = (
    ExecutorKind(
        "ray",
        "a Ray cluster",
        _open_ray,
        _ray_capacity,
        start_costs=StartCosts(new_after_real_gpu=True),
        check=_check_ray,
        packages=("ray",),
    ),
    ExecutorKind("inline", "this process", _open_inline, own_processes=False, serial=True),
)
DEFAULT_EXECUTOR = EXECUTORS[0]


def executor_kind(name: str) -> ExecutorKind:
    """The row with this name. Raises StudyError if there is none."""
    found = next((kind for kind in EXECUTORS if kind.name == name), None)
    if found is None:
        names = ", ".join(kind.name for kind in EXECUTORS)
        raise StudyError(f"there is no executor {name!r}; choose one of {names}")
    return found
