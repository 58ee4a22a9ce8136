"""The predictions for runs of a study, and their measured totals.

    HOME/studies/NAME/plans.jsonl     one line before each run that has stages to run; another one
                                      when a run reaches the study's end
        {"wall_s": 250.1, "gpu_s": [[null, 310.5]], "stages": 412, "written": 2.1e7,
         "spent_s": 0.0, "spent_gpu_s": []}
        {"begun_s": 0.0, "done_s": 271.3, "done_gpu_s": [[null, 320.1]]}

`spent_s` and `spent_gpu_s` are the totals of all earlier runs, from the ledger
(ebbline.sweeps.state.spending). `done_s` and `done_gpu_s` are the totals at the end of the run;
`begun_s` equals the `spent_s` of its prediction. A run that was stopped or killed has no second
line, since it did not do all that was predicted.
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
    """Predicted seconds of driving, GPU time, stages and bytes of a run.

    `before` is the total spent when the run began, `after` the total when it reached the study's
    end.
    """

    wall_s: float
    cost: Cost
    stages: float
    written: float
    before: Spent
    after: Spent | None = None

    def since(self, spent: Spent) -> tuple[float, Cost]:
        """Seconds of driving and GPU time between `before` and `spent`."""
        return spent.driving_s - self.before.driving_s, spent.cost + self.before.cost.times(-1)

    def errors(self, spent: Spent) -> dict[str, float]:
        """The relative error of each number: 0.1 means that the prediction was 10% too high."""
        driven_s, cost = self.since(spent)
        pairs = {
            "wall time": (self.wall_s, driven_s),
            "GPU-hours": (self.cost.gpu_hours, cost.gpu_hours),
        }
        return {
            name: predicted / measured - 1
            for name, (predicted, measured) in pairs.items()
            if measured > 0
        }


def predict(found: Forecast, before: Spent) -> Prediction | None:
    """The prediction for a run that begins now; None when nothing is missing or cannot run."""
    if not found.todo.missing or found.wall_s is None:
        return None
    stages = sum(share.stages for share in found.kinds.values())
    return Prediction(
        found.wall_s, found.cost, stages, found.written, replace(before, keys=frozenset())
    )


def keep(prediction: Prediction, folder: Path) -> None:
    """Append a prediction to the study's plans.jsonl."""
    fields = {
        name: value
        for name, value in asdict(prediction).items()
        if name not in ("cost", "before", "after")
    }
    fields |= {
        "gpu_s": _listed(prediction.cost),
        "spent_s": prediction.before.driving_s,
        "spent_gpu_s": _listed(prediction.before.cost),
    }
    _append(folder, fields)


def keep_end(prediction: Prediction, after: Spent, folder: Path) -> None:
    """Append that the predicted run reached the study's end with the total `after`."""
    _append(
        folder,
        {
            "begun_s": prediction.before.driving_s,
            "done_s": after.driving_s,
            "done_gpu_s": _listed(after.cost),
        },
    )


def _append(folder: Path, fields: Mapping[str, Any]) -> None:
    with open_to_append(folder / NAME) as file:
        file.write(json.dumps(fields) + "\n")


def read_predictions(folder: Path) -> list[Prediction]:
    """All predictions of a study, oldest first. An incomplete last line is ignored.

    Raises StudyError when another line is damaged.
    """
    path, found = folder / NAME, list[Prediction]()
    for number, line in enumerate(whole_lines(path), 1):
        try:
            fields: Mapping[str, Any] = json.loads(line)
            if "done_s" in fields:
                begun_s, after = (
                    float(fields["begun_s"]),
                    Spent(float(fields["done_s"]), _cost(fields["done_gpu_s"])),
                )
                for index in [
                    index for index, each in enumerate(found) if each.before.driving_s == begun_s
                ][-1:]:
                    found[index] = replace(found[index], after=after)
                continue
            before = Spent(float(fields["spent_s"]), _cost(fields["spent_gpu_s"]))
            found.append(
                Prediction(
                    float(fields["wall_s"]),
                    _cost(fields["gpu_s"]),
                    float(fields["stages"]),
                    float(fields["written"]),
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
