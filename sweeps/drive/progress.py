"""The progress of a drive, as the driver passes it to its watcher."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from ebbline.cluster.running.runner import Runner
from ebbline.sweeps.drive.live import Live
from ebbline.sweeps.forecast.prediction import Prediction
from ebbline.sweeps.state.in_flight import PointInFlight
from ebbline.sweeps.state.spending import Spending
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.stages import StageGraph
from ebbline.sweeps.study.study import Study


@dataclass
class Progress:
    """The state that a watcher sees after every heartbeat and after every start of a job.

    `completed` counts the completed points of all runs. `results` holds the results of this run.
    `history` holds those of earlier runs too, in the order of completion, each with the seeds it
    had then. A point that got a further seed is appended to `history` again with all its seeds;
    `amended` counts these. (ebbline.sweeps.state.outcome computes the results of the tables.)

    Once the driver of a long study lets go of stages, the results of ended points have no keys and
    costs any more, unless points may get further seeds.

    `prediction` is the prediction for this run, `live` the latest snapshot (see
    ebbline.sweeps.drive.snapshot). `stopped` is the reason why the run stopped early, and `by` what
    stopped it; both are empty when the search had no more points.
    """

    study: Study
    graph: StageGraph
    runner: Runner
    spending: Spending
    results: list[Result] = field(default_factory=list)
    history: list[Result] = field(default_factory=list)
    in_flight: list[PointInFlight] = field(default_factory=list)
    limit: int | None = None
    completed: int = 0
    amended: int = 0
    started: float = field(default_factory=time.monotonic)
    prediction: Prediction | None = None
    live: Live | None = None
    stopped: str = ""
    by: Literal["", "request", "budget", "gain"] = ""


Watcher = Callable[[Progress], None]
