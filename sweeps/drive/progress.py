"""What a drive has come to, for whoever watches it."""

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
    """What a watcher sees after every heartbeat, and whenever something has started. `told` counts
    all points told. `results` holds those of this run and `taken` those of earlier ones too, in
    order: as they landed, and with the seeds that they landed with. A point that got a further seed
    is in `taken` again, with all its seeds; `amended` counts these (ebbline.sweeps.state.outcome
    has the table's).

    `prediction` is what this run was expected to take, `live` the latest snapshot (see
    ebbline.sweeps.drive.snapshot). `stopped` says why nothing more was asked for, and `by` what
    stopped it; both are empty when the search had no more points.
    """

    study: Study
    graph: StageGraph
    runner: Runner
    spending: Spending
    results: list[Result] = field(default_factory=list)
    taken: list[Result] = field(default_factory=list)
    in_flight: list[PointInFlight] = field(default_factory=list)
    limit: int | None = None
    told: int = 0
    amended: int = 0
    started: float = field(default_factory=time.monotonic)
    prediction: Prediction | None = None
    live: Live | None = None
    stopped: str = ""
    by: Literal["", "request", "budget", "gain"] = ""


Watcher = Callable[[Progress], None]
