"""How a study's hypervolume grew, point by point, against the time and the cost of driving it.

A point lands when the last job ended that was started for one of its stages
(ebbline.sweeps.state.jobs reads the ledger). One that was found whole in the store lands at once.
Hours and costs are of this study's own runs: what the store already held took none.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ebbline.analysis.results.frontier import finished, front, hypervolume, values_of
from ebbline.cluster.schedule.costs import Cost
from ebbline.sweeps.state.jobs import read_jobs
from ebbline.sweeps.study.points import Result
from ebbline.tasks.measuring.metrics import direction


@dataclass(frozen=True)
class Grown:
    """What there was once `finished` points had landed, the last of them point `number`. `hours`
    are hours in which jobs ran.
    """

    finished: int
    number: int
    hours: float
    cost: Cost
    hypervolume: float


def growth(results: Sequence[Result], objectives: Sequence[str], folder: Path) -> Iterator[Grown]:
    """One for each finished point, in the order of landing; of points that landed together, by
    number.

    Raises StudyError when the ledger in `folder` is damaged, EvaluationError when a result lacks an
    objective.
    """
    ended = _ended(folder)
    start = (0.0, Cost())
    landed = [
        (max((ended.get(key, start) for key in r.keys.values()), key=_when, default=start), r)
        for r in finished(results)
    ]
    ways = [direction(name) for name in objectives]
    best_NM, volume = np.empty((0, len(ways))), 0.0
    for count, ((hours, cost), result) in enumerate(
        sorted(landed, key=lambda each: (each[0][0], each[1].number)), 1
    ):
        rows_NM = np.vstack([best_NM, values_of([result], objectives)])
        on_front = front(rows_NM, ways)
        best_NM = rows_NM[on_front]
        volume = hypervolume(best_NM, ways) if on_front[-1] else volume
        yield Grown(count, result.number, hours, cost, volume)


def _when(moment: tuple[float, Cost]) -> float:
    return moment[0]


def _ended(folder: Path) -> dict[str, tuple[float, Cost]]:
    """Key of a stage -> when the last job for it ended, in hours, and what all jobs had cost by
    then.
    """
    found: dict[str, tuple[float, Cost]] = {}
    drive, before_s, last_s, spent = 0, 0.0, 0.0, Cost()
    for job in read_jobs(folder):
        if job.drive != drive:
            drive, before_s, last_s = job.drive, before_s + last_s, 0.0
        last_s = job.end_s
        spent += Cost.of(job.gpus, job.end_s - job.start_s)
        found |= dict.fromkeys(job.keys, ((before_s + job.end_s) / 3600, spent))
    return found
