"""What a drive has come to, for whoever watches it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from cluster.runner import Runner
from sweeps.flights import Flight
from sweeps.live import Live
from sweeps.plan import Planner
from sweeps.points import Result
from sweeps.prediction import Prediction
from sweeps.spending import Spending
from sweeps.study import Study


@dataclass
class Progress:
    """What a watcher sees after every heartbeat, and whenever something has started. `told` counts all points told. `results` holds
    those of this run and `taken` those of earlier ones too, in order: as they landed, and with the seeds that they landed with. A
    point that got a further seed is in `taken` again, with all its seeds; `amended` counts these (sweeps.outcome has the table's).

    `prediction` is what this run was expected to take, `live` the latest snapshot (see sweeps.snapshot). `stopped` says why nothing
    more was asked for, and `by` what stopped it; both are empty when the search had no more points.
    """

    study: Study
    planner: Planner
    runner: Runner
    spending: Spending
    results: list[Result] = field(default_factory=list)
    taken: list[Result] = field(default_factory=list)
    in_flight: list[Flight] = field(default_factory=list)
    limit: int | None = None
    told: int = 0
    amended: int = 0
    started: float = field(default_factory=time.monotonic)
    prediction: Prediction | None = None
    live: Live | None = None
    stopped: str = ""
    by: Literal["", "request", "budget", "gain"] = ""


Watcher = Callable[[Progress], None]
