"""Runs a gang: one batch on several processes, with Ray Train, torch.distributed and DeepSpeed.

Ray Train reserves the gang's GPUs in one placement group (all or nothing), on exactly the nodes
that the scheduler chose. It then starts the processes and joins them. The processes and the
placement group end with Ray Train's controller.
"""

import logging
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import (
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    WorkerGroupError,
    get_context,
)
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback

from ebbline.cluster.executors.executor import MemberFailed, run_batch
from ebbline.cluster.executors.job_processes import JobProcesses, at, own_gpu_type
from ebbline.cluster.store.workplace import workplace
from ebbline.tasks.stage import Report, Request
from ebbline.tasks.training.micro_batch import learn, learnt

SUDDEN_END = "Worker exit type: SYSTEM_ERROR"  # in Ray's message; not when a host is lost
_log = logging.getLogger(__name__)
EXIT_DELAY_S = 5.0  # longer than two of Ray Train's health checks


def run_gang(requests: Sequence[Request], processes: JobProcesses) -> tuple[Report, ...]:
    """Run a batch on one process for each of `processes.nodes`, one GPU each. Rank 0 commits.
    Returns rank 0's reports.

    When memory runs out, the current stage and the later ones restart with half the micro-batch,
    from the checkpoint. This also holds for a member that was killed for memory. Half of it is
    kept in the stage's scratch folder for later attempts. Raises TrainingFailedError when a member
    died otherwise, or with one row, even if others reported.
    """
    requests = [_limited(request) for request in requests]
    while True:
        try:
            reports = _run_once(requests, processes)
        except TrainingFailedError as error:
            current = _first_open(requests)
            if current is None or not _killed_for_memory(error):
                raise
            half = _used(current, len(processes.nodes)) // 2
            if half == 0:
                raise
            _log.warning(
                "a member of the gang was killed, probably for memory; %s restarts with a "
                "micro-batch of %d",
                current.key[:12],
                half,
            )
        else:
            short = next((report for report in reports if report.smaller is not None), None)
            if short is None:
                return reports
            current = next(request for request in requests if request.key == short.key)
            half = short.smaller or 1
        learn(_scratch(current), most=half)
        _empty(current)
        requests = [
            replace(request, micro_batch=half) for request in requests[requests.index(current) :]
        ]


def _scratch(request: Request) -> Path:
    """The scratch folder of a request on this machine."""
    return Path(workplace(request).request.scratch)


def _limited(request: Request) -> Request:
    """The request with the micro-batch that an earlier attempt was halved to."""
    most = learnt(_scratch(request)).most
    if most is None:
        return request
    return replace(request, micro_batch=min(request.micro_batch or most, most))


def _first_open(requests: Sequence[Request]) -> Request | None:
    """The request that was running: the first whose artifact is not in the store."""
    return next(
        (one for one in requests if workplace(one).store.find(one.kind, one.key) is None), None
    )


def _used(request: Request, members: int) -> int:
    """The micro-batch of a gang that was killed. Without a note of its rank 0, it is the largest
    that it can have been: a member's whole share.
    """
    share = max(1, int(request.spec.get("global_batch", members)) // members)
    noted = learnt(_scratch(request)).used or share
    # The note may be older than the request: a gang can be killed before it writes one.
    return min(noted, request.micro_batch or noted)


def _empty(request: Request) -> None:
    """Remove what a killed gang has written to the folder of the result."""
    out = Path(workplace(request).request.out)
    for path in out.iterdir() if out.is_dir() else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _run_once(requests: Sequence[Request], processes: JobProcesses) -> tuple[Report, ...]:
    cuda = requests[0].device != "cpu"
    here = at(ray.get_runtime_context().get_node_id())
    outcome = _Outcome.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory(prefix="ebbline-gang-") as here:
        # Ray Train needs a folder that all members see. A temporary folder is seen on one node.
        shared = here if len(set(processes.nodes)) == 1 else f"{requests[0].scratch}.gang"
        trainer = _Trainer(
            _member,
            processes=processes,
            train_loop_config={
                "requests": [request.to_json() for request in requests],
                "outcome": outcome,
                "processes": processes,
            },
            scaling_config=ScalingConfig(
                num_workers=len(processes.nodes),
                use_gpu=True,
                resources_per_worker={"GPU": 1, "CPU": 1},
                label_selector=[{ray._raylet.RAY_NODE_ID_KEY: node} for node in processes.nodes],
            ),
            torch_config=TorchConfig(backend="nccl" if cuda else "gloo"),
            run_config=RunConfig(
                name=f"gang-{requests[0].key[:12]}-{requests[0].micro_batch or 0}",
                storage_path=shared,
                failure_config=FailureConfig(max_failures=0),
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            # The members' reports are more precise than Ray's error, unless a member died or none
            # reported.
            if _died(error) or not ray.get(outcome.get.remote()):
                raise
        finally:
            shutil.rmtree(shared, ignore_errors=True)
    reports: tuple[Report, ...] = ray.get(outcome.get.remote())
    return reports


class _Trainer(TorchTrainer):  # type: ignore[misc]
    """A TorchTrainer whose controller signs on, so that its placement group is freed when it is
    killed (cluster/executors/job_processes.py).

    It runs without Ray Train's own cleaner: that outlives the driver and waits for a dashboard,
    which may not exist.
    """

    def __init__(self, *args: Any, processes: JobProcesses, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._processes = processes

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [
            *(
                callback
                for callback in callbacks
                if not isinstance(callback, PlacementGroupCleanerCallback)
            ),
            _SignOn(self._processes),
        ]


class _SignOn(ControllerCallback):  # type: ignore[misc]
    """Signs on a gang's controller before it makes its placement group."""

    def __init__(self, processes: JobProcesses) -> None:
        self.processes = processes

    def after_controller_start(self, train_run_context: Any) -> None:
        self.processes.sign_on("controller")


def _failures(error: TrainingFailedError) -> list[Exception]:
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
    return [
        failure.health_check_failure
        if isinstance(failure, WorkerHealthCheckFailedError)
        else failure
        for failure in failures
    ]


def _died(error: TrainingFailedError) -> bool:
    """Whether a member's process died; False when a member only raised."""
    return any(
        isinstance(failure, RayActorError | OutOfMemoryError) for failure in _failures(error)
    )


def _killed_for_memory(error: TrainingFailedError) -> bool:
    """Whether a member was killed for memory, by Ray's memory monitor or by the kernel.

    Ray does not tell exit -9 (the kernel's) from another sudden end of a process. A smaller
    micro-batch changes no result, so any such end on a host that lives counts.
    """
    return any(
        isinstance(failure, OutOfMemoryError)
        or (isinstance(failure, RayActorError) and SUDDEN_END in str(failure))
        for failure in _failures(error)
    )


@ray.remote(num_cpus=0)
class _Outcome:
    """Carries the reports of rank 0, or of the first failed member, out of the gang. Ray Train's
    own results hold only metrics.
    """

    def __init__(self) -> None:
        self.reports: tuple[Report, ...] = ()

    def put(self, reports: tuple[Report, ...]) -> None:
        self.reports = self.reports or reports

    def get(self) -> tuple[Report, ...]:
        return self.reports


def _member(config: dict[str, Any]) -> None:
    context, processes = get_context(), config["processes"]
    requests = [Request.from_json(text) for text in config["requests"]]
    processes.sign_on("member")
    if requests[0].device != "cpu":
        # Every member sees all of the gang's GPUs on its node, so "cuda" must name its own.
        torch.cuda.set_device(get_device())
    try:
        reports = run_batch(
            requests,
            context.get_world_rank(),
            context.get_world_size(),
            processes.leaving(),
            own_gpu_type(),
        )
    except MemberFailed as failure:
        ray.get(config["outcome"].put.remote((failure.report,)))
        # The exit of this member breaks the others' collectives. Ray Train must see this error
        # before theirs.
        time.sleep(EXIT_DELAY_S)
        raise
    if context.get_world_rank() == 0:
        ray.get(config["outcome"].put.remote(reports))
