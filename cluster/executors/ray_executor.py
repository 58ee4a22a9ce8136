"""The Ray executor. One-GPU batches run as Ray tasks, gangs as Ray actors, on a local cluster
or on one by address.

Invariant: a batch runs on exactly the hosts of its placement. If one of them is gone, or drains
before the batch has started, the job is lost at once.
"""

import contextlib
import itertools
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import ray
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    RaySystemError,
    RayTaskError,
    TaskUnschedulableError,
    WorkerCrashedError,
)

from ebbline.cluster.executors import preparation
from ebbline.cluster.executors.executor import (
    Capacity,
    Executor,
    Finished,
    Job,
    Loss,
    Needs,
    run_batch,
)
from ebbline.cluster.executors.job_processes import JobProcesses, at, own_gpu_type
from ebbline.cluster.executors.ray_hosts import RayHosts
from ebbline.cluster.executors.ray_start import join
from ebbline.cluster.executors.this_machine import (
    VISIBLE,
    only_visible,
    patched_environment,
    visible_gpus,
)
from ebbline.tasks.errors import ClusterLost, Leaving, StudyError
from ebbline.tasks.stage import Report, Request

# A new host takes minutes to start, so each requested GPU must have this much work.
WORTH_S = 600.0
REQUEST_EVERY_S = 10.0
EXPIRE_S = 120.0  # after this the autoscaler drops the requests of a killed driver
MOST_BUNDLES = 1000
_log = logging.getLogger(__name__)


class RayExecutor(Executor):
    """Address "local" starts a cluster that ends with this process; any other address joins a
    running cluster.

    On a machine without GPUs, or with none in CUDA_VISIBLE_DEVICES, a local cluster has
    `logical_gpus` GPUs, and stages run on the CPU.
    Raises StudyError if the cluster has no GPU, and ClusterLost if a local one does not start.
    """

    def __init__(self, address: str = "local", logical_gpus: int = 2) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        local: dict[str, Any] = (
            {"include_dashboard": False, "num_cpus": 2 * logical_gpus + 2}
            if address == "local"
            else {}
        )
        own = visible_gpus() if address == "local" else {}
        inherited: dict[str, str] = {}
        if address == "local":
            local["num_gpus"] = len(own) or logical_gpus
            # The processes that Ray starts with a cluster then serve the first stages. For other
            # variables it would start more, beside those.
            if VISIBLE not in os.environ:
                inherited = _variables(_threads(bool(own), local["num_gpus"]))
        # Ray puts the driver's folder first on its workers' import path. That folder may contain
        # a module `tasks` or `datasets` of the user, so Ray starts in /.
        visible = only_visible(own) if address == "local" else contextlib.nullcontext()
        with contextlib.chdir("/"), visible, patched_environment(inherited):
            join(address, local)
        context = ray.get_runtime_context()
        self._hosts = RayHosts(context.gcs_address)
        self._local = address == "local"
        self._grows = not self._local and self._hosts.grows
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        # Ray names the type of every real accelerator; logical GPUs have none.
        real = bool(own) or (
            not self._local
            and (
                any(name.startswith("accelerator_type:") for name in resources)
                or (self._grows and gpus == 0)
            )
        )
        self.device = "cuda" if real else "cpu"
        self.threads = _threads(real, gpus)
        self._options: dict[str, Any] = (
            {}
            if inherited
            else {"runtime_env": {"env_vars": {**_variables(self.threads), **_hidden(real)}}}
        )
        if gpus == 0 and not self._grows:
            ray.shutdown()
            raise StudyError(
                f"the Ray cluster at {address!r} has no GPU; add GPU workers, or use "
                "--address local for logical ones"
            )
        self._driver = context.get_job_id()
        self._jobs: dict[ray.ObjectRef, tuple[Job, JobProcesses]] = {}
        self._ended: list[Finished] = []
        self._numbers = itertools.count()
        self._name = f"ebbline-{self._driver}"
        self._requested_at = float("-inf")

    def capacity(self) -> Capacity:
        return Capacity(tuple(self._hosts.find().values()), self._grows)

    def submit(self, batch: Sequence[Request], needs: Needs, hosts: Mapping[str, int]) -> Job:
        self._hosts.wait_for_head()
        number = next(self._numbers)
        job = Job(f"ray-{number}", tuple(request.key for request in batch), needs.gpus, hosts)
        ids = {name: self._hosts.node_id(name) for name in hosts}
        gone = next((name for name, node in ids.items() if node is None), None)
        if gone is not None:
            self._ended.append(
                Finished(job, (), Loss(f"{gone} went before the batch could start there", "place"))
            )
            return job
        processes = JobProcesses.reserve(
            f"{self._driver}-{number}",
            [str(ids[name]) for name, gpus in hosts.items() for _ in range(max(1, gpus))],
        )
        # Ray ends the process after each GPU task, to free GPU memory. A logical GPU has none, and
        # a warm process saves seconds of imports per batch.
        task = (
            _gang
            if needs.gpus > 1
            else _gpu_batch
            if needs.gpus and self.device != "cpu"
            else _batch
        )
        options: dict[str, Any] = {"num_gpus": 1} if needs.gpus == 1 else {}
        reference = task.options(
            scheduling_strategy=at(processes.nodes[0]), **self._options, **options
        ).remote(list(batch), processes)
        self._jobs[reference] = (job, processes)
        return job

    def expect(self, queue: Sequence[tuple[Needs, float]]) -> None:
        if not self._grows or time.monotonic() - self._requested_at < REQUEST_EVERY_S:
            return
        self._hosts.wait_for_head()
        requested = bundles(queue)
        resources = [resource for resource, _ in requested]
        labels = [selector for _, selector in requested]
        _coordinator().request_resources.remote(
            self._name, resources, EXPIRE_S, label_selectors=labels
        )
        self._requested_at = time.monotonic()

    def finished(self, timeout_s: float) -> Sequence[Finished]:
        # A local cluster gets no other host, and the runner would wait for one.
        if not self._hosts.find() and self._local:
            raise ClusterLost(
                "Ray on this machine has ended; run the same command to restart it and continue"
            )
        for reference, (job, processes) in list(self._jobs.items()):
            self._give_up(reference, job, processes)
        if self._jobs:
            references = list(self._jobs)
            done, _ = ray.wait(references, num_returns=1, timeout=0 if self._ended else timeout_s)
            if done:
                done, _ = ray.wait(references, num_returns=len(references), timeout=0)
            self._ended += [self._outcome(reference) for reference in done]
        ended, self._ended = self._ended, []
        return ended

    def begun(self, job: Job) -> bool:
        """False while the job waits in Ray's queue, for resources of other drivers or programs."""
        self._hosts.wait_for_head()
        processes = next(
            (processes for running, processes in self._jobs.values() if running.id == job.id), None
        )
        return processes is None or processes.begun()

    def cancel(self, job: Job) -> None:
        for reference, (running, processes) in list(self._jobs.items()):
            if running.id == job.id:
                self._end(reference, processes)

    def close(self) -> None:
        self._jobs.clear()
        if self._hosts.head_lost:
            # A shutdown would wait for the head. Ray's exit hook ends the process instead.
            return
        if self._requested_at > float("-inf"):
            try:
                ray.get(_coordinator().cancel_request.remote(self._name), timeout=EXPIRE_S)
            except RayError as error:  # only a warning, so as not to hide the run's own error
                _log.warning(
                    "the request to the autoscaler could not be cancelled (%s); it expires after "
                    "%.0f s",
                    type(error).__name__,
                    EXPIRE_S,
                )
        ray.shutdown()

    def _give_up(self, reference: "ray.ObjectRef", job: Job, processes: JobProcesses) -> None:
        """End a job if its host is gone, or drains before all of the job's processes have started.
        Ray would wait for ever.
        """
        gone = next((name for name in job.hosts if self._hosts.node_id(name) is None), None)
        reason = f"{gone} is gone" if gone else ""
        if (
            gone is None
            and job.gpus > 1
            and any(map(self._hosts.drains, job.hosts))
            and not processes.complete()
        ):
            reason = "its host drains before the job has started"
        if reason:
            self._end(reference, processes)
            self._ended.append(Finished(job, (), Loss(reason, "place")))

    def _end(self, reference: "ray.ObjectRef", processes: JobProcesses) -> None:
        self._hosts.wait_for_head()
        del self._jobs[reference]
        ray.cancel(reference, force=True)
        processes.end()

    def _outcome(self, reference: "ray.ObjectRef") -> Finished:
        self._hosts.wait_for_head()
        job, processes = self._jobs.pop(reference)
        try:
            reports: tuple[Report, ...] = ray.get(reference)
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            if isinstance(error, LocalRayletDiedError | RaySystemError) and not isinstance(
                error, RayTaskError
            ):
                # All later jobs would be lost too, and their points would fail without a fault.
                raise ClusterLost(
                    f"Ray on this machine has ended ({type(error).__name__}); run the same command "
                    "to restart it and continue"
                ) from error
            # The worker, its node or a gang member died without a report. The runner checks the
            # store and retries.
            processes.end()
            lost_host = self._hosts.lost(job.hosts)
            if lost_host is not None:
                return Finished(job, (), Loss(f"{lost_host} is gone", "place"))
            reason = (
                f"{type(cause).__name__}: {(str(cause).strip() or 'no message').splitlines()[0]}"
            )
            return Finished(job, (), Loss(reason, _blame(cause, job)))
        processes.forget()
        leaving = next(
            (report for report in reports if report.error_type == Leaving.__name__), None
        )
        if leaving is not None:
            kept = tuple(report for report in reports if report.error_type != Leaving.__name__)
            return Finished(job, kept, Loss(str(leaving.error), "place"))
        if job.gpus > 1 and any(report.error for report in reports):
            # When a host is lost, the other members of its gang fail in their next collective.
            lost_host = self._hosts.lost(job.hosts)
            if lost_host is not None:
                return Finished(job, (), Loss(f"{lost_host} is gone", "place"))
        lost = (
            None
            if {report.key for report in reports} >= set(job.keys)
            else Loss("a member of the gang ended without reporting")
        )
        return Finished(job, reports, lost)


def _threads(real: bool, gpus: int) -> int | None:
    """The threads of a stage: each logical GPU has a fixed share of the cores, so that concurrent
    stages do not change a stage's numbers.
    """
    return None if real else max(1, (os.cpu_count() or 1) // max(1, gpus))


def _variables(threads: int | None) -> dict[str, str]:
    """The environment of the workers. `threads` is None with real GPUs."""
    variables = {"TOKENIZERS_PARALLELISM": "false"}
    if threads is not None:
        variables |= {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": str(threads),
            # Else Ray would set CUDA_VISIBLE_DEVICES to the number of the logical GPU.
            "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
        }
    return variables


def _hidden(real: bool) -> dict[str, str]:
    """Hides the real GPUs of a machine whose GPUs are logical. Ray itself must not see this."""
    return {} if real else {VISIBLE: ""}


def _blame(cause: BaseException, job: Job) -> Literal["stage", "place", "memory"]:
    """What a job's error is blamed on. Ray does not tell exit -9, the kernel's, from another sudden
    end of a process; a smaller micro-batch changes no result, so any such end counts.
    """
    if isinstance(cause, NodeDiedError | TaskUnschedulableError):
        return "place"
    killed = isinstance(cause, OutOfMemoryError | WorkerCrashedError)
    return "memory" if killed and job.gpus <= 1 else "stage"  # a gang halves by itself


def bundles(queue: Sequence[tuple[Needs, float]]) -> list[tuple[dict[str, int], dict[str, str]]]:
    """The bundles to request from an autoscaler: (resources, label selector). There is one for each
    WORTH_S seconds of work in the queue.

    A gang is one bundle, because it needs one host. A gang that may spread has one for each GPU.
    """
    groups: dict[tuple[int, tuple[tuple[str, str], ...], bool], list[float]] = {}
    for needs, seconds in queue:
        groups.setdefault(
            (needs.gpus, tuple(sorted(needs.labels.items())), needs.spread), []
        ).append(seconds)
    requested: list[tuple[dict[str, int], dict[str, str]]] = []
    for (gpus, labels, spread), times in sorted(groups.items(), reverse=True):
        count = max(1, min(len(times), math.ceil(sum(times) / WORTH_S)))
        copies, size = (count * gpus, 1) if spread and gpus > 1 else (count, gpus)
        resources = {"CPU": max(1, size), **({"GPU": size} if size else {})}
        requested += [(resources, dict(labels))] * copies
    return requested[:MOST_BUNDLES]


def _coordinator() -> Any:
    """Ray's actor that adds up the requests of all libraries. `request_resources` alone keeps only
    the last request.
    """
    # A local import: it loads pyarrow and pandas, which only a cluster that can grow needs.
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    return get_or_create_autoscaling_coordinator()


@ray.remote(max_retries=0, num_cpus=1)  # type: ignore[untyped-decorator]
def _batch(requests: list[Request], processes: JobProcesses) -> tuple[Report, ...]:
    processes.sign_on("task")
    preparation.before_a_job()
    reports = run_batch(requests, leaving=processes.leaving(), gpu_type=own_gpu_type())
    preparation.after_a_job()
    return reports


@ray.remote(max_retries=0, num_cpus=1, num_gpus=1)  # type: ignore[untyped-decorator]
def _gpu_batch(requests: list[Request], processes: JobProcesses) -> tuple[Report, ...]:
    processes.sign_on("task")
    return run_batch(requests, leaving=processes.leaving(), gpu_type=own_gpu_type())


@ray.remote(max_retries=0, num_cpus=0)  # type: ignore[untyped-decorator]
def _gang(requests: list[Request], processes: JobProcesses) -> tuple[Report, ...]:
    from ebbline.cluster.executors.gang import run_gang

    processes.sign_on("task")
    return run_gang(requests, processes)
