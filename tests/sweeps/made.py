"""Small studies for tests: a complete study as data, changed by path, written as YAML and loaded
like a user's file.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ebbline.sweeps.search.knowledge import Knowledge, Readings, WorkEstimate
from ebbline.sweeps.study.points import Point, Result, adapter_of
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.study_file import parse
from ebbline.tasks.identity import digest
from ebbline.tasks.measuring.metrics import Metric

ORGANISM = {"organism": {"size": "small"}}
TUNED = {
    "data": {"pool": {"language": "align.jsonl"}, "settings": {"size": 8}},
    "train": {"method": "full"},
}
WHOLE: dict[str, Any] = {
    "study": "tiny",
    "question": "How far?",
    "models": {"7b": {"base": ORGANISM, "aligned": {"tuned": TUNED}}},
    "data": {"pool": {"language": "benign.jsonl"}, "settings": {"size": 16}},
    "train": {"epochs": 1},
    "axes": {"train.rank": [2, 4, 8], "apply.threshold": [None, 0.3, 0.5]},
    "suites": {
        "refusal": {"prompts": {"language": "refusal.jsonl"}, "measure": {"kind": "refusal"}},
        "task": {"prompts": {"language": "task.jsonl"}, "measure": {"kind": "task"}},
    },
    "objectives": ["refusal_rate", "task_accuracy"],
    "search": {"sampler": "grid"},
}  # fmt: skip


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """WHOLE with values at slash-separated paths replaced: axes have dots in their names."""
    whole = copy.deepcopy(WHOLE)
    for path, value in changes.items():
        *above, last = path.split("/")
        place = whole
        for part in above:
            place = place[part]
        place[last] = value
    return whole


def written(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(changed(changes or {}), sort_keys=False))
    return path


def study(folder: Path, changes: dict[str, Any] | None = None) -> Study:
    return parse(written(folder, changes))


def outcome(number: int, point: Point) -> Result:
    """A result that is a function of the point, so that two searches of one study get equal
    results.
    """
    score = int(point.id, 16)
    if score % 7 == 0:
        return Result(number, point, "failed", reason="TrainingError: the loss became nan")
    metrics = {
        "refusal.refusal_rate": Metric("refusal_rate", score % 101, 100),
        "task.task_accuracy": Metric("task_accuracy", score // 101 % 101, 100),
    }
    return Result(number, point, "done", metrics)


class Imagined(Knowledge):
    """Adapters of `modules` modules with cosines that are a function of the adapter; a training
    costs 100, a measurement 10.

    Adapters in `missing` have no cosines yet.
    """

    def __init__(self, modules: int = 8, seeds: int = 1) -> None:
        self.modules, self.seeds = modules, seeds
        self.missing: set[Point] = set()

    def readings(self, point: Point) -> Readings | None:
        adapter = adapter_of(point)
        if adapter in self.missing:
            return None
        rng = np.random.default_rng(
            int(digest({"model": adapter.model, "values": dict(adapter.values)})[:8], 16)
        )
        return tuple(np.sort(rng.uniform(0.1, 0.9, self.modules)) for _ in range(self.seeds))

    def work(self, point: Point) -> WorkEstimate:
        return WorkEstimate(100.0, 1.0, 10.0)
