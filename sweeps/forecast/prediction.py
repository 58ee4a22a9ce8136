"""What runs of a study were predicted to take, beside what they then took.

    HOME/studies/NAME/plans.jsonl     a line for each run that had something to do, before it began;
                                      another at the study's end
        {"wall_s": 250.1, "gpu_s": [[null, 310.5]], "stages": 412, "written": 2.1e7,
         "spent_s": 0.0, "spent_gpu_s": []}
        {"begun_s": 0.0, "done_s": 271.3, "done_gpu_s": [[null, 320.1]]}

`spent_s` and `spent_gpu_s` say what all runs before it had taken, by the ledger
(ebbline.sweeps.state.spending), `done_s` and `done_gpu_s` the same at its end; `begun_s` is the
`spent_s` of the prediction that this belongs to. A run that was stopped or killed has no end: what
it was predicted to take is not what it took.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ebbline.cluster.schedule.costs import Cost
from ebbline.sweeps.forecast.forecast import Forecast
from ebbline.sweeps.ledger import open_to_append, whole_lines
from ebbline.sweeps.state.spending import Spent
from ebbline.tasks.errors import StudyError

NAME = "plans.jsonl"


@dataclass(frozen=True)
class Prediction:
    """Seconds of driving, GPU time, stages and bytes that a run was to take, from when `before` was
    spent.

    `after` is what was spent when it had run the study to its end.
    """

    wall_s: float
    cost: Cost
    stages: float
    written: float
    before: Spent
    after: Spent | None = None

    def since(self, spent: Spent) -> tuple[float, Cost]:
        """Seconds of driving and GPU time from then until `spent`."""
        return spent.driving_s - self.before.driving_s, spent.cost + self.before.cost.times(-1)

    def errors(self, spent: Spent) -> dict[str, float]:
        """By how much each number was off, as a share of what was taken: 0.1 is a prediction that
        was ten percent too long.
        """
        driven_s, cost = self.since(spent)
        pairs = {
            "wall time": (self.wall_s, driven_s),
            "GPU-hours": (self.cost.gpu_hours, cost.gpu_hours),
        }
        return {name: predicted / took - 1 for name, (predicted, took) in pairs.items() if took > 0}


def predict(found: Forecast, before: Spent) -> Prediction | None:
    """The prediction of a run that begins now; None when there is nothing to run, or something can
    never run.
    """
    if not found.todo.missing or found.wall_s is None:
        return None
    stages = sum(share.stages for share in found.kinds.values())
    return Prediction(
        found.wall_s, found.cost, stages, found.written, replace(before, keys=frozenset())
    )


def keep(prediction: Prediction, folder: Path) -> None:
    """Add a prediction to those of the study."""
    said = {
        name: value
        for name, value in asdict(prediction).items()
        if name not in ("cost", "before", "after")
    }
    said |= {
        "gpu_s": _listed(prediction.cost),
        "spent_s": prediction.before.driving_s,
        "spent_gpu_s": _listed(prediction.before.cost),
    }
    _append(folder, said)


def keep_end(prediction: Prediction, after: Spent, folder: Path) -> None:
    """Add that the run of a prediction that was kept has come to the study's end, when so much was
    spent.
    """
    _append(
        folder,
        {
            "begun_s": prediction.before.driving_s,
            "done_s": after.driving_s,
            "done_gpu_s": _listed(after.cost),
        },
    )


def _append(folder: Path, said: Mapping[str, Any]) -> None:
    with open_to_append(folder / NAME) as file:
        file.write(json.dumps(said) + "\n")


def read_predictions(folder: Path) -> list[Prediction]:
    """All predictions of a study, the first first. Raises StudyError when a line is damaged, other
    than a last one that was cut off.
    """
    path, found = folder / NAME, list[Prediction]()
    for number, line in enumerate(whole_lines(path), 1):
        try:
            said: Mapping[str, Any] = json.loads(line)
            if "done_s" in said:
                begun_s, after = (
                    float(said["begun_s"]),
                    Spent(float(said["done_s"]), _cost(said["done_gpu_s"])),
                )
                for place in [
                    place for place, each in enumerate(found) if each.before.driving_s == begun_s
                ][-1:]:
                    found[place] = replace(found[place], after=after)
                continue
            before = Spent(float(said["spent_s"]), _cost(said["spent_gpu_s"]))
            found.append(
                Prediction(
                    float(said["wall_s"]),
                    _cost(said["gpu_s"]),
                    float(said["stages"]),
                    float(said["written"]),
                    before,
                )
            )
        except (ValueError, KeyError, TypeError) as error:
            raise StudyError(
                f"{path}, line {number} is damaged ({type(error).__name__}); delete that line"
            ) from error
    return found


def _listed(cost: Cost) -> list[tuple[str | None, float]]:
    return [(name, round(seconds, 3)) for name, seconds in cost.gpu_s.items()]


def _cost(listed: list[tuple[str | None, float]]) -> Cost:
    return Cost({name: float(seconds) for name, seconds in listed})
