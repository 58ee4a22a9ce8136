"""The jobs that the studies of a home have run, from their ledgers (ebbline.sweeps.state.spending);
and what they took beside their stages.
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
    """A job that ended: in which of the ledger's drives (from 0), when by that drive's clock, on
    what, and whether its process was new.
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
    """The jobs of a study that ended, in that order. Raises StudyError when a line is damaged."""
    read_spent(folder)  # names a damaged line
    drive, warm, held = -1, WarmProcesses(), dict[str, HeldJob]()
    for line in whole_lines(folder / NAME):
        said = json.loads(line)
        if "driver" in said:
            drive, warm, held = drive + 1, WarmProcesses(), {}
        elif "start" in said and "hosts" in said:
            gpus, new = (
                {name: int(count) for name, count in said["gpus"]},
                warm.start(said["start"], said["hosts"]),
            )
            held[said["start"]] = HeldJob(
                drive,
                said["start"],
                float(said["s"]),
                0.0,
                said["hosts"],
                gpus,
                tuple(said["keys"]),
                new,
            )
        elif "end" in said and said["end"] in held:
            job = held.pop(said["end"])
            warm.end(job.id)
            yield HeldJob(
                job.drive,
                job.id,
                job.start_s,
                float(said["s"]),
                job.hosts,
                job.gpus,
                job.keys,
                job.new,
            )


def estimates_of(home: Home, kind: ExecutorKind = DEFAULT_EXECUTOR) -> Estimates:
    """What the home's store has measured of stages, and its ledgers of starting this executor's
    jobs.
    """
    dearest = max(
        home.profile.gpus, key=lambda name: home.profile.gpus[name].usd_per_hour, default=None
    )
    gpu_type = None if dearest == "other" else dearest
    estimates = Estimates(home.store, gpu_type, kind.start_costs)
    for ledger in sorted((home.root / "studies").glob(f"*/{NAME}")):
        jobs = [job for job in read_jobs(ledger.parent) if kind.ran(job.id)]
        for drive in sorted({job.drive for job in jobs}):
            estimates.starts.learn_cluster(min(job.start_s for job in jobs if job.drive == drive))
        for job in jobs:
            if not all(key in estimates.seconds_by_key for key in job.keys):
                continue  # with stages that came to nothing
            seconds = (
                job.end_s - job.start_s - sum(estimates.seconds_by_key[key] for key in job.keys)
            )
            estimates.starts.learn(
                next(iter(job.gpus), None), sum(job.hosts.values()), job.new, seconds
            )
    return estimates
