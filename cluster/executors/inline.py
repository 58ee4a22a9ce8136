"""The executor that runs stages in this process, one job at a time. A debugger can step through
them.
"""

import itertools
from collections.abc import Mapping, Sequence

from ebbline.cluster.executors.executor import Capacity, Executor, Finished, Job, Needs, run_batch
from ebbline.tasks.stage import Request


class InlineExecutor(Executor):
    """Runs a job when `finished` is called. A gang runs as one process: the same Spec, and the same
    result within tolerance.
    """

    own_processes = False

    def __init__(self, gpus: int = 1, device: str = "cpu") -> None:
        self.device = device
        self._gpus = gpus
        self._waiting: list[tuple[Job, Sequence[Request]]] = []
        self._numbers = itertools.count()

    def capacity(self) -> Capacity:
        return Capacity.one_host(gpus=self._gpus, cpus=1)

    def submit(self, batch: Sequence[Request], needs: Needs, hosts: Mapping[str, int]) -> Job:
        job = Job(
            f"inline-{next(self._numbers)}",
            tuple(request.key for request in batch),
            needs.gpus,
            hosts,
        )
        self._waiting.append((job, batch))
        return job

    def finished(self, timeout_s: float) -> Sequence[Finished]:
        if not self._waiting:
            return []
        job, batch = self._waiting.pop(0)
        return [Finished(job, run_batch(batch))]

    def begun(self, job: Job) -> bool:
        return all(waiting != job for waiting, _ in self._waiting)

    def cancel(self, job: Job) -> None:
        self._waiting = [item for item in self._waiting if item[0] != job]

    def close(self) -> None:
        self._waiting.clear()
