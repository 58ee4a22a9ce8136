"""Runs a gang: one batch on several processes, joined by torch.distributed; DeepSpeed runs inside.

The driver has reserved the gang's GPUs in one placement group (all or nothing), on exactly the
nodes that the scheduler chose. One Ray actor for each GPU runs the batch. This process only starts
and watches them: it imports no torch. When it ends, Ray ends the actors.
"""

import logging
import os
import shutil
import socket
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.util import get_node_ip_address

from ebbline.cluster.executors.executor import MemberFailed, run_batch
from ebbline.cluster.executors.job_processes import JobProcesses, own_gpu_type
from ebbline.cluster.store.workplace import workplace
from ebbline.tasks.stage import Report, Request
from ebbline.tasks.training.micro_batch import learn, learnt

SUDDEN_END = "Worker exit type: SYSTEM_ERROR"  # in Ray's message; not when a host is lost
JOIN_TIMEOUT_S = 1800.0  # of the members' collectives
# A member whose peer has died may report its broken collective before Ray reports the death. And
# members that leave save their checkpoint meanwhile.
LAST_REPORTS_S = 5.0
Work = Callable[..., tuple[Report, ...]]  # as `run_batch`
_log = logging.getLogger(__name__)


class GangFailed(Exception):
    """A gang ended without a report: a member `died`, or raised anything but MemberFailed.

    `killed_for_memory`: by Ray's memory monitor or by the kernel.
    """

    def __init__(self, reason: str, died: bool, killed_for_memory: bool) -> None:
        super().__init__(reason, died, killed_for_memory)  # so that it can be pickled
        self.died, self.killed_for_memory = died, killed_for_memory

    def __str__(self) -> str:
        return str(self.args[0])


def run_gang(
    requests: Sequence[Request], processes: JobProcesses, work: Work = run_batch
) -> tuple[Report, ...]:
    """Run a batch on one process for each of `processes.nodes`, one GPU each, in the job's
    placement group. Rank 0 commits. Returns rank 0's reports. `work` runs in each process.

    When memory runs out, the current stage and the later ones restart with half the micro-batch,
    from the checkpoint. This also holds for a member that was killed for memory. Half of it is
    kept in the stage's scratch folder for later attempts. Raises GangFailed when a member died
    otherwise, or with one row, even if others reported.
    """
    try:
        return _run_until_it_fits(requests, processes, work)
    finally:
        processes.free()


def _run_until_it_fits(
    requests: Sequence[Request], processes: JobProcesses, work: Work
) -> tuple[Report, ...]:
    requests = [_limited(request) for request in requests]
    while True:
        try:
            reports = _run_once(requests, processes, work)
        except GangFailed as error:
            current = _first_open(requests)
            if current is None or not error.killed_for_memory:
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


def _run_once(
    requests: Sequence[Request], processes: JobProcesses, work: Work
) -> tuple[Report, ...]:
    size = len(processes.nodes)
    members = [
        _Member.options(scheduling_strategy=processes.bundle(rank)).remote(processes)  # type: ignore[attr-defined]
        for rank in range(size)
    ]
    texts = [request.to_json() for request in requests]
    try:
        try:
            seats = _seated(ray.get([member.seat.remote() for member in members]))
        except RayError as error:
            raise _failure([error]) from error
        runs = [
            member.run.remote(texts, seat, work)
            for member, seat in zip(members, seats, strict=True)
        ]
        return _reports(runs)
    finally:
        for member in members:
            ray.kill(member)


def _reports(runs: Sequence["ray.ObjectRef"]) -> tuple[Report, ...]:
    """The reports of the first run, rank 0's; or the report of the first member that failed.

    Raises GangFailed when a member's process died, even if another has reported.
    """
    waiting = list(runs)
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1)
        if _error_of(done[0]) is not None:
            if waiting and not _died(_error_of(done[0])):
                more, _ = ray.wait(waiting, num_returns=len(waiting), timeout=LAST_REPORTS_S)
                done += more
            errors = [error for error in map(_error_of, done) if error is not None]
            failed = next(
                (
                    error.cause
                    for error in errors
                    if isinstance(error, RayTaskError) and isinstance(error.cause, MemberFailed)
                ),
                None,
            )
            if failed is None or any(map(_died, errors)):
                raise _failure(errors)
            return (failed.report,)
    reports: tuple[Report, ...] = ray.get(runs[0])
    return reports


def _error_of(run: "ray.ObjectRef") -> RayError | None:
    """The error of a run that has ended; None without one."""
    try:
        ray.get(run)
    except RayError as error:
        return error
    return None


def _died(error: Exception | None) -> bool:
    """Whether a member's process died; False when a member only raised."""
    return isinstance(error, RayActorError | OutOfMemoryError)


def _failure(errors: Sequence[RayError]) -> GangFailed:
    """The failure of a gang with these errors of members.

    Ray does not tell exit -9 (the kernel's) from another sudden end of a process. A smaller
    micro-batch changes no result, so any such end on a host that lives counts as for memory.
    """
    killed = any(
        isinstance(error, OutOfMemoryError)
        or (isinstance(error, RayActorError) and SUDDEN_END in str(error))
        for error in errors
    )
    worst = next(filter(_died, errors), errors[0])
    cause = worst.cause if isinstance(worst, RayTaskError) else worst
    return GangFailed(f"{type(cause).__name__}: {cause}", any(map(_died, errors)), killed)


@dataclass(frozen=True)
class _Seat:
    """Where a member runs. `gpus` are Ray's ids of its GPUs, then of all the gang's on its node."""

    node: str
    address: str
    port: int
    own_gpus: tuple[str, ...]
    gpus: tuple[str, ...] = ()
    variables: Mapping[str, str] | None = None


def _seated(seats: Sequence[_Seat]) -> list[_Seat]:
    """The seats by rank, with the environment variables of torch.distributed.run."""
    on_node = Counter(seat.node for seat in seats)
    gpus = {
        node: tuple(sorted(gpu for seat in seats if seat.node == node for gpu in seat.own_gpus))
        for node in on_node
    }
    seen = defaultdict[str, int](int)
    seated = []
    for rank, seat in enumerate(seats):
        variables = {
            "MASTER_ADDR": seats[0].address,
            "MASTER_PORT": str(seats[0].port),
            "RANK": str(rank),
            "WORLD_SIZE": str(len(seats)),
            "LOCAL_RANK": str(seen[seat.node]),
            "LOCAL_WORLD_SIZE": str(on_node[seat.node]),
            "NODE_RANK": str(list(on_node).index(seat.node)),
        }
        seen[seat.node] += 1
        seated.append(replace(seat, gpus=gpus[seat.node], variables=variables))
    return seated


@ray.remote(num_cpus=1, num_gpus=1, max_restarts=0)
class _Member:
    """One process of a gang."""

    def __init__(self, processes: JobProcesses) -> None:
        self.processes = processes
        processes.sign_on("member")

    def seat(self) -> _Seat:
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        context = ray.get_runtime_context()
        gpus = tuple(map(str, context.get_accelerator_ids().get("GPU", [])))
        return _Seat(context.get_node_id(), get_node_ip_address(), port, gpus)

    def run(self, texts: Sequence[str], seat: _Seat, work: Work) -> tuple[Report, ...]:
        requests = [Request.from_json(text) for text in texts]
        os.environ |= seat.variables or {}
        cuda = requests[0].device != "cpu"
        if cuda:
            # NCCL reaches its peers only if every member sees all of the gang's GPUs on its node.
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(seat.gpus)
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
        import torch  # after the variables of CUDA are set

        device = torch.device("cpu")
        if cuda:
            device = torch.device("cuda", seat.gpus.index(seat.own_gpus[0]))
            torch.cuda.set_device(device)  # "cuda" must name its own
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
        torch.distributed.init_process_group(
            "nccl" if cuda else "gloo", timeout=timedelta(seconds=JOIN_TIMEOUT_S)
        )
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return work(requests, rank, size, self.processes.leaving(), own_gpu_type())
