"""An executor that is opened at the first call of `capacity`."""

from collections.abc import Mapping, Sequence

from ebbline.cluster.executors.choice import ExecutorKind, ExecutorOptions
from ebbline.cluster.executors.executor import Capacity, Executor, Finished, Job, Needs
from ebbline.tasks.stage import Request


class OnDemand(Executor):
    """Wraps an executor, so that a study without stages to run starts no cluster."""

    def __init__(self, kind: ExecutorKind, options: ExecutorOptions) -> None:
        self.device = "not opened yet"
        self.own_processes = kind.own_processes
        self._kind, self._options = kind, options
        self._opened: Executor | None = None

    def capacity(self) -> Capacity:
        if self._opened is None:
            self._opened = self._kind.open(self._options)
            self.device, self.threads = self._opened.device, self._opened.threads
        return self._opened.capacity()

    def submit(self, batch: Sequence[Request], needs: Needs, hosts: Mapping[str, int]) -> Job:
        self.capacity()
        if self._opened is None:
            raise RuntimeError("the executor was closed")
        return self._opened.submit(batch, needs, hosts)

    def finished(self, timeout_s: float) -> Sequence[Finished]:
        return self._opened.finished(timeout_s) if self._opened is not None else []

    def cancel(self, job: Job) -> None:
        if self._opened is not None:
            self._opened.cancel(job)

    def begun(self, job: Job) -> bool:
        return self._opened is not None and self._opened.begun(job)

    def expect(self, queue: Sequence[tuple[Needs, float]]) -> None:
        if self._opened is not None:
            self._opened.expect(queue)

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()
