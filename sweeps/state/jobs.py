"""The jobs that the studies of a home have run, read from their ledgers
(ebbline.sweeps.state.spending), and the start-up time of these jobs.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ebbline.cluster.executors.choice import DEFAULT_EXECUTOR, ExecutorKind
from ebbline.cluster.executors.starts import WarmProcesses
from ebbline.cluster.schedule.costs import GpuTypes
from ebbline.cluster.schedule.estimates import Estimates
from ebbline.sweeps.ledger import whole_lines
from ebbline.sweeps.state.spending import NAME, read_spent
from ebbline.sweeps.study.home import Home


@dataclass(frozen=True)
class HeldJob:
    """A job that ended. `drive` is the number of its driver in the ledger, from 0. Times are in
    seconds on that driver's clock. `new` says that the job started a process.
    """

    drive: int
    id: str
    start_s: float
    end_s: float
    hosts: Mapping[str, int]
    gpus: GpuTypes
    keys: tuple[str, ...]
    new: bool


def read_jobs(folder: Path) -> Iterator[HeldJob]:
    """The ended jobs of a study in the order in which they ended. Raises StudyError for a damaged
    line.
    """
    read_spent(folder)  # raises the error with the number of a damaged line
    drive, warm, held = -1, WarmProcesses(), dict[str, HeldJob]()
    for line in whole_lines(folder / NAME):
        event = json.loads(line)
        if "driver" in event:
            drive, warm, held = drive + 1, WarmProcesses(), {}
        elif "start" in event and "hosts" in event:
            gpus, new = (
                {name: int(count) for name, count in event["gpus"]},
                warm.start(event["start"], event["hosts"]),
            )
            held[event["start"]] = HeldJob(
                drive,
                event["start"],
                float(event["s"]),
                0.0,
                event["hosts"],
                gpus,
                tuple(event["keys"]),
                new,
            )
        elif "end" in event and event["end"] in held:
            job = held.pop(event["end"])
            warm.end(job.id)
            yield HeldJob(
                job.drive,
                job.id,
                job.start_s,
                float(event["s"]),
                job.hosts,
                job.gpus,
                job.keys,
                job.new,
            )


def estimates_of(home: Home, kind: ExecutorKind = DEFAULT_EXECUTOR) -> Estimates:
    """Estimates from the stages in the home's store and from the job starts in its ledgers."""
    dearest = max(
        home.profile.gpus, key=lambda name: home.profile.gpus[name].usd_per_hour, default=None
    )
    gpu_type = None if dearest == "other" else dearest

    def and_starts(estimates: Estimates) -> None:
        _learn_starts(estimates, home, kind)

    return Estimates(home.store, gpu_type, kind.start_costs, and_starts)


def _learn_starts(estimates: Estimates, home: Home, kind: ExecutorKind) -> None:
    for ledger in sorted((home.root / "studies").glob(f"*/{NAME}")):
        jobs = [job for job in read_jobs(ledger.parent) if kind.ran(job.id)]
        for drive in sorted({job.drive for job in jobs}):
            estimates.starts.learn_cluster(min(job.start_s for job in jobs if job.drive == drive))
        for job in jobs:
            if not all(key in estimates.seconds_by_key for key in job.keys):
                continue  # a stage of the job has no artifact, so its run time is unknown
            if not estimates.generations.isdisjoint(job.keys):
                continue  # the ledger does not list the scores that ran in the same job
            seconds = (
                job.end_s - job.start_s - sum(estimates.seconds_by_key[key] for key in job.keys)
            )
            estimates.starts.learn(
                next(iter(job.gpus), None), sum(job.hosts.values()), job.new, seconds
            )
