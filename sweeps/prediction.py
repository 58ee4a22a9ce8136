"""What runs of a study were predicted to take, beside what they then took.

    HOME/studies/NAME/plans.jsonl     a line for each run that had something to do, written before it began
        {"wall_s": 250.1, "gpu_s": [[null, 310.5]], "stages": 412, "written": 2.1e7, "spent_s": 0.0, "spent_gpu_s": []}

The last two say what all runs before it had taken, so what was predicted compares with what the ledger (sweeps.spending) says since.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.costs import Cost
from sweeps.forecast import Forecast
from sweeps.spending import Spent
from tasks.errors import StudyError

NAME = "plans.jsonl"


@dataclass(frozen=True)
class Prediction:
    """Seconds of driving, GPU time, stages and bytes that a run was to take, from when `before` was spent."""

    wall_s: float
    cost: Cost
    stages: float
    written: float
    before: Spent

    def since(self, spent: Spent) -> tuple[float, Cost]:
        """Seconds of driving and GPU time from then until `spent`."""
        return spent.driving_s - self.before.driving_s, spent.cost + self.before.cost.times(-1)

    def errors(self, spent: Spent) -> dict[str, float]:
        """By how much each number was off, as a share of what was taken: 0.1 is a prediction that was ten percent too long."""
        driven_s, cost = self.since(spent)
        pairs = {"wall time": (self.wall_s, driven_s), "GPU-hours": (self.cost.gpu_hours, cost.gpu_hours)}
        return {name: predicted / took - 1 for name, (predicted, took) in pairs.items() if took > 0}


def predict(found: Forecast, before: Spent) -> Prediction | None:
    """The prediction of a run that begins now; None when there is nothing to run, or something can never run."""
    if not found.todo.missing or found.wall_s is None:
        return None
    return Prediction(found.wall_s, found.cost, sum(share.stages for share in found.kinds.values()), found.written, before)


def keep(prediction: Prediction, folder: Path) -> None:
    """Add a prediction to those of the study."""
    said = {name: value for name, value in asdict(prediction).items() if name not in ("cost", "before")}
    said |= {"gpu_s": _listed(prediction.cost), "spent_s": prediction.before.driving_s, "spent_gpu_s": _listed(prediction.before.cost)}
    with (folder / NAME).open("a") as file:
        file.write(json.dumps(said) + "\n")


def read_predictions(folder: Path) -> list[Prediction]:
    """All predictions of a study, the first first. Raises StudyError when a line is damaged, other than a last one that was cut off."""
    path, found = folder / NAME, list[Prediction]()
    text = path.read_text() if path.exists() else ""
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            said: Mapping[str, Any] = json.loads(line)
            before = Spent(float(said["spent_s"]), _cost(said["spent_gpu_s"]))
            found.append(Prediction(float(said["wall_s"]), _cost(said["gpu_s"]), float(said["stages"]), float(said["written"]), before))
        except (ValueError, KeyError, TypeError) as error:
            raise StudyError(f"{path}, line {number} is damaged ({type(error).__name__}); delete that line") from error
    return found


def _listed(cost: Cost) -> list[tuple[str | None, float]]:
    return [(name, round(seconds, 3)) for name, seconds in cost.gpu_s.items()]


def _cost(listed: list[tuple[str | None, float]]) -> Cost:
    return Cost({name: float(seconds) for name, seconds in listed})
