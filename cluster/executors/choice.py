"""The executors that a run may choose, in one table, with what is known of each before it is
opened.

A new executor is one file, and one row of EXECUTORS. This module is read for `ebbline --help`, so
it imports only the standard library; an executor's own module is imported when it is opened.
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
class Wanted:
    """What a run asks of its executor: `address` is its cluster's, `gang` the GPUs of the study's
    largest stage, `gpus` how many logical GPUs a machine without real ones is to have.
    """

    address: str
    gang: int
    gpus: int | None = None

    @property
    def logical_gpus(self) -> int:
        """How many logical GPUs there are to be; a few when nobody says."""
        return self.gpus or max(self.gang, min(MOST_LOGICAL_GPUS, len(os.sched_getaffinity(0))))


def _on_this_machine(wanted: Wanted) -> "Capacity | None":
    from ebbline.cluster.executors.this_machine import capacity_here

    return capacity_here(wanted)


def _nothing_to_check(address: str) -> ExecutorCheck:
    return ExecutorCheck()


@dataclass(frozen=True)
class ExecutorKind:
    """An executor before it is opened.

    `name` is what `--executor` takes; its jobs are called NAME-NUMBER. `label` says in a help where
    stages run. `capacity` is what it will have, None when only an open one can tell. `check` tries
    for `ebbline doctor` what it needs at an address, and `packages` are those it needs beside ours.
    """

    name: str
    label: str
    open: "Callable[[Wanted], Executor]"
    capacity: "Callable[[Wanted], Capacity | None]" = _on_this_machine
    own_processes: bool = True  # a job has processes of its own, which take time to start
    serial: bool = False  # stages run one after another, wherever the scheduler placed them
    start_costs: StartCosts = field(default_factory=StartCosts)
    check: Callable[[str], ExecutorCheck] = _nothing_to_check
    packages: tuple[str, ...] = ()

    def ran(self, job_id: str) -> bool:
        """Whether a job was one of this executor's, as ledgers name jobs."""
        return job_id.startswith(f"{self.name}-")


def _open_ray(wanted: Wanted) -> "Executor":
    from ebbline.cluster.executors.ray_executor import RayExecutor

    return RayExecutor(wanted.address, wanted.logical_gpus)


def _ray_capacity(wanted: Wanted) -> "Capacity | None":
    """A cluster of its own is not started to ask it what it has."""
    return _on_this_machine(wanted) if wanted.address == "local" else None


def _check_ray(address: str) -> ExecutorCheck:
    from ebbline.cluster.executors.ray_check import check

    return check(address)


def _open_inline(wanted: Wanted) -> "Executor":
    from ebbline.cluster.executors.inline import InlineExecutor

    return InlineExecutor(gpus=max(wanted.gang, wanted.logical_gpus))


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
    """The row of this name. Raises StudyError when there is none."""
    found = next((kind for kind in EXECUTORS if kind.name == name), None)
    if found is None:
        there = ", ".join(kind.name for kind in EXECUTORS)
        raise StudyError(f"there is no executor {name!r}; choose one of {there}")
    return found
