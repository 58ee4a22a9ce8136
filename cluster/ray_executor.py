"""The Ray executor: one-GPU batches as Ray tasks, gangs through Ray Train, on a cluster of its own or one by address."""

import itertools
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import LocalRayletDiedError, RayError, RaySystemError, RayTaskError

from cluster.executor import Capacity, Executor, Finished, Job, Loss, Needs, run_batch
from tasks.errors import ClusterLost, StudyError
from tasks.stage import Report, Request


class RayExecutor(Executor):
    """`address` "local" starts a cluster that ends with this process; anything else joins the one that is there.

    On a machine without GPUs a local cluster gets `logical_gpus` of them, and stages run on the CPU.
    """

    def __init__(self, address: str = "local", logical_gpus: int = 2) -> None:
        # Ray Train and Ray Data count usage and poll a dashboard by default; a sweep does neither.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
        local: dict[str, Any] = {"include_dashboard": False, "num_cpus": 2 * logical_gpus + 2} if address == "local" else {}
        if address == "local" and shutil.which("nvidia-smi") is None:
            local["num_gpus"] = logical_gpus
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **local)
        resources = ray.cluster_resources()
        self._gpus = int(resources.get("GPU", 0))
        # Ray names the type of every real accelerator; logical GPUs have none.
        real = any(name.startswith("accelerator_type:") for name in resources)
        self.device = "cuda" if real else "cpu"
        variables = {"TOKENIZERS_PARALLELISM": "false", "RAY_TRAIN_V2_ENABLED": "1"}
        # The cores are shared out among the logical GPUs, so that a stage's numbers do not depend on its neighbours.
        self.threads = None if real else max(1, (os.cpu_count() or 1) // max(1, self._gpus))
        if not real:
            variables |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(self.threads), "CUDA_VISIBLE_DEVICES": ""}
        self._environment = {"env_vars": variables}
        if self._gpus == 0:
            ray.shutdown()
            raise StudyError(f"the Ray cluster at {address!r} has no GPU; add GPU workers, or use --address local for logical ones")
        self._scratch = tempfile.mkdtemp(prefix="ebbline-gangs-")
        self._jobs: dict[ray.ObjectRef, Job] = {}
        self._numbers = itertools.count()

    def capacity(self) -> Capacity:
        return Capacity.one_host(gpus=self._gpus, cpus=2)

    def submit(self, batch: Sequence[Request], needs: Needs, hosts: Mapping[str, int]) -> Job:
        job = Job(f"ray-{next(self._numbers)}", tuple(request.key for request in batch), needs.gpus, hosts)
        if needs.gpus > 1:
            reference = _gang.options(runtime_env=self._environment).remote(list(batch), needs.gpus, self._scratch)
        elif needs.gpus == 1:
            # Ray ends the process after each GPU task, to free the GPU's memory. With logical GPUs there is none to free, and
            # a kept process saves seconds of imports a batch.
            task = _batch if self.device == "cpu" else _gpu_batch
            reference = task.options(num_gpus=1, runtime_env=self._environment).remote(list(batch))
        else:
            reference = _batch.options(runtime_env=self._environment).remote(list(batch))
        self._jobs[reference] = job
        return job

    def finished(self, timeout_s: float) -> Sequence[Finished]:
        if not self._jobs:
            return []
        references = list(self._jobs)
        done, _ = ray.wait(references, num_returns=1, timeout=timeout_s)
        if done:
            done, _ = ray.wait(references, num_returns=len(references), timeout=0)
        return [self._outcome(reference) for reference in done]

    def _outcome(self, reference: "ray.ObjectRef") -> Finished:
        job = self._jobs.pop(reference)
        try:
            reports: tuple[Report, ...] = ray.get(reference)
        except (LocalRayletDiedError, RaySystemError) as error:
            # Not this job alone: whatever is submitted next would be lost too, and points would fail for no fault of theirs.
            gone = f"Ray on this machine is gone ({type(error).__name__})"
            raise ClusterLost(f"{gone}; the same command starts it again and continues") from error
        except RayError as error:
            # The worker, its node or a gang member died: nobody reported, so the runner looks at the store and tries again.
            cause = error.cause if isinstance(error, RayTaskError) else error
            return Finished(job, (), Loss(f"{type(cause).__name__}: {(str(cause).strip() or 'no message').splitlines()[0]}"))
        lost = None if len(reports) == len(job.keys) else Loss("a member of the gang ended without reporting")
        return Finished(job, reports, lost)

    def cancel(self, job: Job) -> None:
        for reference, running in list(self._jobs.items()):
            if running == job:
                ray.cancel(reference, force=True)

    def close(self) -> None:
        self._jobs.clear()
        ray.shutdown()
        shutil.rmtree(self._scratch, ignore_errors=True)


@ray.remote(max_retries=0, num_cpus=1)  # type: ignore[untyped-decorator]
def _batch(requests: list[Request]) -> tuple[Report, ...]:
    return run_batch(requests)


@ray.remote(max_retries=0, num_cpus=1, num_gpus=1)  # type: ignore[untyped-decorator]
def _gpu_batch(requests: list[Request]) -> tuple[Report, ...]:
    return run_batch(requests)


@ray.remote(max_retries=0, num_cpus=0)  # type: ignore[untyped-decorator]
def _gang(requests: list[Request], gpus: int, scratch: str) -> tuple[Report, ...]:
    from cluster.gang import run_gang  # ray.train brings torch, which a driver process never needs

    return run_gang(requests, gpus, scratch)
