"""What a search is measured on: a grid that was run, looked up point by point, or a surface whose
frontier is known.

Each answers what a point measures, which stages it takes with the cost of each, and what a search
may know beforehand. A stage is paid once, whoever asks: every sampler has the store.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from ebbline.cluster.store.artifacts import Store
from ebbline.sweeps.search.knowledge import CPU_SHARE, Knowledge, Readings, WorkEstimate
from ebbline.sweeps.search.masks import mask_of
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import Point, StageName, Value, adapter_of
from ebbline.sweeps.study.space import space
from ebbline.sweeps.study.study import Study
from ebbline.tasks.defences.defence import Mask
from ebbline.tasks.defences.gate import read_rows
from ebbline.tasks.defences.safe_lora import SAFE_LORA
from ebbline.tasks.identity import digest
from ebbline.tasks.measuring.metrics import Metric
from ebbline.tasks.specs import ProjectSpec

Stages = Mapping[str, float]  # what identifies a stage -> its cost


class Surface(Protocol):
    study: Study
    knowledge: Knowledge

    def metrics(self, point: Point) -> dict[str, Metric]: ...

    def stages(self, point: Point) -> Stages: ...


class Table:
    """The grid of a finished study: HOME/studies/NAME/results.parquet for the metrics, its store
    for what each stage took.

    Raises KeyError for a point that the grid does not have.
    """

    def __init__(self, root: Path, name: str, model: str) -> None:
        home = Home(root)
        whole = Study.model_validate_json((root / "studies" / name / "study.json").read_text())
        self.study = whole.model_copy(update={"models": {model: whole.models[model]}})
        frame = pd.read_parquet(root / "studies" / name / "results.parquet")
        frame = frame[(frame["model"] == model) & (frame["status"] == "done")]
        axes = self.study.axes_of(model)
        self._rows = {
            Point.of(model, {axis: _value(row[axis]) for axis in axes}): row
            for _, row in frame.iterrows()
        }
        self._costs: dict[str, float] = {}
        self.knowledge = _OfTable(self, home.store)

    def metrics(self, point: Point) -> dict[str, Metric]:
        row, found = self._rows[point], {}
        for name in self.study.objectives:
            n = int(row[f"{name}_n"])
            found[name] = Metric(name.partition(".")[2], float(row[name]) * n, n)
        return found

    def stages(self, point: Point) -> Stages:
        return {key: self.cost(name, key) for name, key in self.keys(point).items()}

    def keys(self, point: Point) -> dict[StageName, str]:
        row = self._rows[point]
        return {
            StageName.parse(name): row[name]
            for name in row.index
            if "[seed=" in name and isinstance(row[name], str)
        }

    def cost(self, name: StageName, key: str) -> float:
        if key not in self._costs:
            provenance = self.knowledge.store.open(self.study.kind_of(name.part), key).provenance
            self._costs[key] = float(provenance["seconds"]) * (
                float(provenance.get("gpus", 0)) or CPU_SHARE
            )
        return self._costs[key]


class _OfTable(Knowledge):
    def __init__(self, table: Table, store: Store) -> None:
        self.table, self.store = table, store
        self._found: dict[Point, tuple[Readings, WorkEstimate]] = {}

    def readings(self, point: Point) -> Readings:
        return self._of(point)[0]

    def work(self, point: Point) -> WorkEstimate:
        return self._of(point)[1]

    def _of(self, point: Point) -> tuple[Readings, WorkEstimate]:
        adapter = adapter_of(point)
        if adapter not in self._found:
            like = next(each for each in self.table._rows if adapter_of(each) == adapter)
            costs: dict[str, float] = defaultdict(float)
            cosines = []
            for name, key in sorted(self.table.keys(like).items(), key=lambda item: item[0].seed):
                costs[name.part if name.part in ("train", "project") else "evaluate"] += (
                    self.table.cost(name, key)
                )
                if name.part == "project":
                    rows = read_rows(
                        self.store.open("project", key).file(ProjectSpec.COSINES)
                    ).values()
                    cosines.append(np.sort([row.cosine for row in rows if row.cosine is not None]))
            self._found[adapter] = tuple(cosines), WorkEstimate(**costs)
        return self._found[adapter]


@dataclass(frozen=True)
class Made(Surface):
    """A surface by formula, over train.rank, data.size, train.learning_rate and apply.threshold;
    sizes differ in how hard they drift.

    Longer training teaches the task and loses refusals; a projection wins them back and costs some
    of the task. `seed` draws the cosines: which thresholds choose the same modules differs from
    adapter to adapter.
    """

    study: Study
    modules: int = 24
    n: int = 200

    @property
    def knowledge(self) -> Knowledge:  # type: ignore[override]
        return _OfMade(self.modules)

    def metrics(self, point: Point) -> dict[str, Metric]:
        refusal, task = self.rates(point)
        return {
            "refusal.refusal_rate": Metric("refusal_rate", round(refusal * self.n), self.n),
            "task.task_accuracy": Metric("task_accuracy", round(task * self.n), self.n),
        }

    def part(self, point: Point, asked: int) -> dict[str, Metric]:
        """The metrics after the first prompts, which are drawn from all `n` without replacement.

        So a whole measurement is what it is without a race. The order of the prompts is drawn anew
        for each mask and suite; in a study it is one for all, which makes points more alike.
        """
        found = {}
        for name, whole in self.metrics(point).items():
            key = {"measured": self.measured(point), "metric": name}
            rng = np.random.default_rng(int(digest(key)[:8], 16))
            scores = rng.permutation(np.arange(self.n) < whole.successes)[:asked]
            found[name] = Metric(whole.name, int(scores.sum()), asked)
        return found

    def measured(self, point: Point) -> str:
        """What identifies the measurement of a point: its adapter and mask."""
        cosines = self.knowledge.readings(point) or ()
        return f"measure {adapter_of(point)} {self._mask(point, cosines)}"

    def _mask(self, point: Point, cosines: Readings) -> Mask | None:
        return mask_of(self.study, SAFE_LORA, dict(point.values), cosines)

    def rates(self, point: Point) -> tuple[float, float]:
        values: Any = dict(point.values)
        cosines = self.knowledge.readings(point) or ()
        taken = SAFE_LORA.share(self._mask(point, cosines) or (0,), cosines)
        rank, size = (
            np.log2(values["train.rank"]) / 6,
            np.log(values["data.size"] / 64) / np.log(64),
        )
        rate = (np.log10(values["train.learning_rate"]) + 5) / 2
        place = list(self.study.models).index(point.model)
        drift = (0.9 - 0.1 * place) * (0.2 + 0.4 * rank + 0.4 * size) * (0.4 + 0.6 * rate)
        task = (
            (0.3 + 0.05 * place + 0.25 * rank + 0.35 * size)
            * np.exp(-2 * (rate - 0.6) ** 2)
            * (1 - 0.6 * taken**2)
        )
        return float(np.clip(1 - drift * (1 - taken) ** 1.5, 0, 1)), float(np.clip(task, 0, 1))

    def stages(self, point: Point) -> Stages:
        work, adapter = self.knowledge.work(point), adapter_of(point)
        return {
            f"train {adapter}": work.train,
            f"project {adapter}": work.project,
            self.measured(point): work.evaluate,
        }


@dataclass(frozen=True)
class Second(Made):
    """Another surface over the same axes, on which nothing of the search was chosen: another shape,
    other costs and cosines, and 0.02 of noise for each adapter, as seeds have it.

    Refusals are lost in a step as training gets stronger, the task saturates. Many small adapters
    come near the best ones.
    """

    modules: int = 48

    @property
    def knowledge(self) -> Knowledge:  # type: ignore[override]
        return _OfSecond(self.modules)

    def rates(self, point: Point) -> tuple[float, float]:
        values: Any = dict(point.values)
        cosines = self.knowledge.readings(point) or ()
        taken = SAFE_LORA.share(self._mask(point, cosines) or (0,), cosines)
        rank, size = (
            np.log2(values["train.rank"]) / 6,
            np.log(values["data.size"] / 64) / np.log(64),
        )
        rate = (np.log10(values["train.learning_rate"]) + 5) / 2
        strength = 0.35 * rank + 0.65 * size + 0.9 * rate
        noise = _drawn(point, "noise").normal(0.0, 0.02, 2)
        task = (
            0.1
            + 0.75 * (1 - np.exp(-2 * strength))
            - 0.9 * max(0.0, rate - 0.75) ** 2
            - 0.15 * max(0.0, rank - 0.8)
        ) * (1 - 0.45 * taken**1.5)
        drift = 0.95 / (1 + np.exp(-5 * (strength - 1)))
        refusal = 1 - drift * (1 - taken)
        return float(np.clip(refusal + noise[0], 0, 1)), float(np.clip(task + noise[1], 0, 1))


def _drawn(point: Point, what: str) -> np.random.Generator:
    """Numbers that are a function of a point's adapter."""
    adapter = adapter_of(point)
    key = {"model": adapter.model, "values": dict(adapter.values), "what": what}
    return np.random.default_rng(int(digest(key)[:8], 16))


class _OfMade(Knowledge):
    def __init__(self, modules: int) -> None:
        self.modules = modules

    def readings(self, point: Point) -> Readings:
        adapter = adapter_of(point)
        rng = np.random.default_rng(
            int(digest({"model": adapter.model, "values": dict(adapter.values)})[:8], 16)
        )
        return (np.sort(rng.beta(3, 3, self.modules)),)

    def work(self, point: Point) -> WorkEstimate:
        """A training takes as long as its rows; larger sizes take more of everything."""
        times = {"7b": 1.0, "13b": 2.0, "70b": 8.0}.get(point.model, 1.0)
        return WorkEstimate(
            0.1 * float(str(dict(point.values)["data.size"])) * times, 5.0 * times, 30.0 * times
        )


class _OfSecond(_OfMade):
    def readings(self, point: Point) -> Readings:
        return (np.sort(_drawn(point, "cosines").beta(2, 4, self.modules)),)

    def work(self, point: Point) -> WorkEstimate:
        """A training has a fixed cost beside that of its rows."""
        return WorkEstimate(0.05 * float(str(dict(point.values)["data.size"])) + 20.0, 5.0, 20.0)


def everything(surface: Surface) -> list[Point]:
    return list(space(surface.study))


def _value(value: Any) -> Value:
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return None
    plain: Value = value.item() if hasattr(value, "item") else value
    return plain
