"""The same budget for every sampler: hypervolume against what was spent, over ten seeds.

    python -m tests.benchmarks.bench_search_budget [--home HOME --study NAME] [--seeds 10]

Surfaces (tests/benchmarks/surfaces.py): the grid of a finished study, size by size, where one is
given; and two by formula whose frontier is known. Every sampler is driven as a study drives it,
with four points in flight that complete in turn, and pays for a stage once. A row is the
hypervolume, as a share of the whole space's, at shares of what the whole space costs: mean and 95%
interval over seeds.

On the surface by formula each sampler is driven twice: with every point measured whole, and raced
(tests/benchmarks/races.py). A raced point that was stopped counts in no hypervolume.
"""

import argparse
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import moocore
import numpy as np
from scipy.stats import t as student

from ebbline.sweeps.search.searcher import WAIT, StudySearcher
from ebbline.sweeps.state.races.racing import races as races_of
from ebbline.sweeps.state.trials import Entry
from ebbline.sweeps.study.database import PointDatabase
from ebbline.sweeps.study.points import Point, Result
from ebbline.sweeps.study.policies import Search
from ebbline.sweeps.study.study import Study
from ebbline.tasks.measuring.metrics import direction
from tests.benchmarks.races import RACE, Races, frontier, least_cost, raced_grid
from tests.benchmarks.record import table, write
from tests.benchmarks.surfaces import Made, Second, Surface, Table, everything
from tests.sweeps.made import WHOLE, study

SAMPLERS = ("stage_aware", "tpe", "nsga2", "random")
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)  # of the whole space's cost
UNTIL = 0.2  # of a large space's; a grid that was run is spent whole
FAMILY_UNTIL, FAMILY_SEEDS = (
    0.05,
    5,
)  # of the space of three sizes, whose largest is eight times as dear
REACHED = 0.95  # of the whole space's hypervolume
WINDOW = 4
AXES = {
    "train.rank": [2, 4, 8, 16, 32, 64],
    "data.size": [64, 256, 1024, 4096],
    "train.learning_rate": [1e-5, 1e-4, 3e-4, 1e-3],
    "apply.threshold": [None, *(n / 20 for n in range(1, 20))],
}


@dataclass(frozen=True)
class Step:
    """After a point is complete: what was spent so far, and the hypervolume, averaged over the
    sizes. `asked` is the share of the prompts that the point was asked.
    """

    spent: float
    hypervolume: float
    point: Point
    asked: float = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path)
    parser.add_argument("--study", default="quickstart")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--short", action="store_true", help="without the study of three sizes")
    given = parser.parse_args()
    surfaces: dict[str, Surface] = {}
    if given.home is not None:
        whole = Study.model_validate_json(
            (given.home / "studies" / given.study / "study.json").read_text()
        )
        surfaces = {
            f"grid {model}": Table(given.home, given.study, model) for model in whole.models
        }
    rows, costs = [], {}
    with tempfile.TemporaryDirectory() as folder:
        made = formula(Path(folder), ["7b"])
        raced = formula(Path(folder), ["7b"], RACE)
        second = Second(made.study)
        surfaces |= {"formula": made, "second formula": second, "formula, raced": raced}
        for name, surface in surfaces.items():
            for sampler in SAMPLERS:
                until = UNTIL if isinstance(surface, Made) else 1.0
                runs = [
                    drive(surface, sampler, seed, Path(folder), until)
                    for seed in range(given.seeds)
                ]
                rows.append(row(name, sampler, surface, runs, until))
                costs[name, sampler] = rows[-1]["cost_to_95"]
                print(table(rows[-1:], COLUMNS), flush=True)
        rows.append(raced_grid(raced))
        known = {"surface": "formula", "sampler": "every result known", "seeds": 1}
        rows.append({**known, "cost_to_95": least_cost(made, REACHED) / whole_cost(made)})
        print(table(rows[-2:], COLUMNS), flush=True)
        if not given.short:
            rows += family(Path(folder), given.seeds)
    print(table(rows, COLUMNS))
    ratios = {
        f"cost_to_95_percent_{sampler}_over_stage_aware_{name.replace(' ', '_')}": costs[
            name, sampler
        ]
        / costs[name, "stage_aware"]
        for name, sampler in costs
        if sampler != "stage_aware"
        and costs[name, sampler] is not None
        and costs[name, "stage_aware"]
    }
    print(ratios)
    print(
        write(
            "search_budget",
            "python -m tests.benchmarks.bench_search_budget",
            ("optuna", "scikit-learn", "moocore"),
            rows,
            ratios,
        )
    )


def formula(
    folder: Path, models: Sequence[str], measure: Mapping[str, Any] = MappingProxyType({})
) -> Made:
    suites = {
        f"suites/{name}/measure": {"kind": name, "limit": Made.n, **measure}
        for name in ("refusal", "task")
    }
    axes = {"axes": AXES, "models": dict.fromkeys(models, WHOLE["models"]["7b"])}
    return Made(study(folder, {**axes, **suites}))


def family(folder: Path, seeds: int) -> list[dict[str, Any]]:
    """Three sizes in one study, each with a frontier of its own: what transfer and a warm start by
    the smallest are worth.
    """
    surface = formula(folder, ["7b", "13b", "70b"])
    small = formula(folder, ["7b"])
    seeds = min(seeds, FAMILY_SEEDS)
    taught = [
        lesson(small, drive(small, "stage_aware", seed, folder, 0.05), seed, folder)
        for seed in range(seeds)
    ]
    ways: dict[str, list[list[Step]]] = {
        "stage_aware, sizes apart": [
            drive(surface, "stage_aware", seed, folder, FAMILY_UNTIL) for seed in range(seeds)
        ],
        "stage_aware, transfer": [
            drive(surface, "stage_aware", seed, folder, FAMILY_UNTIL, transfer=True)
            for seed in range(seeds)
        ],
        "stage_aware, transfer, warm start by 7b": [
            drive(
                surface,
                "stage_aware",
                seed,
                folder,
                FAMILY_UNTIL,
                transfer=True,
                taught=taught[seed],
            )
            for seed in range(seeds)
        ],
        "tpe": [drive(surface, "tpe", seed, folder, FAMILY_UNTIL) for seed in range(seeds)],
    }
    return [
        row("formula, three sizes", way, surface, runs, FAMILY_UNTIL) for way, runs in ways.items()
    ]


def lesson(surface: Surface, steps: Sequence[Step], seed: int, folder: Path) -> list[Entry]:
    searcher = StudySearcher(
        searched(surface, "stage_aware", seed, False),
        PointDatabase(f"sqlite:///{newest(folder)}", "bench"),
    )
    return [entry for entry in searcher.trials.entries if entry.state == "done"]


def newest(folder: Path) -> Path:
    """The storage of the last `drive`, which numbers them."""
    return max(folder.glob("*.db"), key=lambda path: int(path.stem))


def searched(surface: Surface, sampler: Any, seed: int, transfer: bool) -> Study:
    search = Search(
        sampler=sampler,
        points=len(everything(surface)),
        window=WINDOW,
        order="in_turn",
        seed=seed,
        transfer=transfer,
    )
    return surface.study.model_copy(update={"search": search})


def drive(
    surface: Surface,
    sampler: str,
    seed: int,
    folder: Path,
    until: float,
    transfer: bool = False,
    taught: Sequence[Entry] = (),
) -> list[Step]:
    """Ask and tell until `until` of the whole space's cost is spent, or nothing is left."""
    found = searched(surface, sampler, seed, transfer)
    path = folder / f"{len(list(folder.glob('*.db')))}.db"
    searcher = StudySearcher(found, PointDatabase(f"sqlite:///{path}", "bench"))
    if taught:
        searcher.teach("small", taught)
    most = until * whole_cost(surface)
    paid: dict[str, float] = {}
    results: list[Result] = []
    steps: list[Step] = []
    in_flight: list[tuple[int, Point]] = []
    knowledge = surface.knowledge
    races = Races(surface) if isinstance(surface, Made) and _is_raced(surface) else None
    while sum(paid.values()) < most:
        proposal = searcher.ask(knowledge)
        if proposal is not None and proposal is not WAIT:
            in_flight.append(proposal)
            if len(in_flight) < WINDOW:
                continue
        if not in_flight:
            break
        number, point = in_flight.pop(0)
        asked = 1.0
        if races is None or not isinstance(surface, Made):
            result = Result(number, point, "done", surface.metrics(point))
            paid |= surface.stages(point)
        else:
            found_now = races.measure(number, point)
            result, asked = found_now.result, found_now.asked / surface.n
            paid |= found_now.stages
        if asked == 1.0:
            results.append(result)
        searcher.tell(number, result)
        value = mean_hypervolume(surface, results) if results else 0.0
        steps.append(Step(sum(paid.values()), value, point, asked))
        if steps[-1].hypervolume >= 0.9999 * best(surface):
            break
    return steps


def _is_raced(surface: Surface) -> bool:
    return any(races_of(surface.study).values())


def mean_hypervolume(surface: Surface, results: Sequence[Result]) -> float:
    names = surface.study.objectives
    found = 0.0
    for model in surface.study.models:
        values = np.array(
            [
                [each.metrics[name].value for name in names]
                for each in results
                if each.point.model == model
            ]
        )
        if len(values):
            maximise = [direction(name) == "maximise" for name in names]
            found += float(
                moocore.hypervolume(
                    values, ref=[0.0 if up else 1.0 for up in maximise], maximise=maximise
                )
            )
    return found / len(surface.study.models)


_BEST: dict[int, float] = {}
_COST: dict[int, float] = {}


def best(surface: Surface) -> float:
    if id(surface) not in _BEST:
        results = [
            Result(k, point, "done", surface.metrics(point))
            for k, point in enumerate(everything(surface))
        ]
        _BEST[id(surface)] = mean_hypervolume(surface, results)
    return _BEST[id(surface)]


def whole_cost(surface: Surface) -> float:
    if id(surface) not in _COST:
        stages: dict[str, float] = {}
        for point in everything(surface):
            stages |= surface.stages(point)
        _COST[id(surface)] = sum(stages.values())
    return _COST[id(surface)]


def row(
    name: str, sampler: str, surface: Surface, runs: Sequence[Sequence[Step]], until: float
) -> dict[str, Any]:
    found: dict[str, Any] = {"surface": name, "sampler": sampler, "seeds": len(runs)}
    for share in (share for share in SHARES if share <= until):
        at = [
            max(
                (step.hypervolume for step in steps if step.spent <= share * whole_cost(surface)),
                default=0.0,
            )
            for steps in runs
        ]
        found[f"at {share:.0%}"] = interval([value / best(surface) for value in at])
    reached = [
        next(
            (step.spent for step in steps if step.hypervolume >= REACHED * best(surface)), math.inf
        )
        for steps in runs
    ]
    middle = statistics.median(reached)
    found["cost_to_95"] = None if math.isinf(middle) else middle / whole_cost(surface)
    found["points"] = statistics.mean(len(steps) for steps in runs)
    if isinstance(surface, Made) and _is_raced(surface):
        front = frontier(surface)
        every = [step for steps in runs for step in steps]
        on_it = [step for step in every if step.point in front]
        found["asked"] = statistics.mean(step.asked for step in every)
        found["lost"] = [sum(step.asked < 1 for step in on_it), len(on_it)]
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval (Student's t over seeds)."""
    half = (
        float(student.ppf(0.975, len(values) - 1))
        * statistics.stdev(values)
        / math.sqrt(len(values))
        if len(values) > 1
        else 0.0
    )
    return statistics.mean(values), half


COLUMNS = {
    "surface": str,
    "sampler": str,
    **{f"at {share:.0%}": lambda pair: f"{pair[0]:.3f} ± {pair[1]:.3f}" for share in SHARES},
    "cost_to_95": lambda share: f"{share:.1%}",
    "points": lambda count: f"{count:.0f}",
    "asked": lambda share: f"{share:.1%}",
    "lost": lambda pair: f"{pair[0]} of {pair[1]}",
}

if __name__ == "__main__":
    main()
