"""The costs of a study: by stage kind, by point, in total, and the saving by sharing.

`growth` is the hypervolume over time and cost. docs/costs.md defines each number:

alone    the cost of all stages of a point: its price if nothing were shared
share    each stage's cost divided among the points that use it; the shares of all points add up to
         their common cost
added    the cost of the stages that no earlier point uses
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ebbline.analysis.results.frontier import finished, front, hypervolume, objective_values
from ebbline.analysis.results.wording import clock
from ebbline.cluster.profile import Profile
from ebbline.cluster.schedule.costs import Cost, total
from ebbline.sweeps.forecast.prediction import Prediction
from ebbline.sweeps.state.jobs import read_jobs
from ebbline.sweeps.state.spending import Spent
from ebbline.sweeps.state.stopping import noise, shrinkage
from ebbline.sweeps.study.points import Result
from ebbline.tasks.measuring.metrics import direction

PAPERS = (
    "the papers report under $200 for theirs: arXiv 2310.20624; 2311.00117, at $1.50 a GPU-hour"
)


@dataclass(frozen=True)
class PointCost:
    alone: Cost
    share: Cost
    added: Cost


@dataclass(frozen=True)
class StudyCost:
    """The costs of a study.

    `points` counts each stage of the points once; `alone` counts it for every point that uses it.
    `saved` is their difference. `stages` is `points` plus the stages of the aligned models. `spent`
    is the cost of this study's own runs; `lost` is its part that is in no finished stage.
    """

    points: Cost
    alone: Cost
    saved: Cost
    stages: Cost
    spent: Cost
    lost: Cost


def point_costs(results: Sequence[Result]) -> dict[int, PointCost]:
    """Number of a point -> its costs, for the points with a stage that ran."""
    users = Counter(key for result in results for key in result.costs)
    seen: set[str] = set()
    found: dict[int, PointCost] = {}
    for result in sorted(results, key=lambda result: result.number):
        if result.costs:
            alone, share, added = (dict[str | None, float]() for _ in range(3))
            for key, cost in result.costs.items():
                for name, seconds in cost.gpu_s.items():
                    alone[name] = alone.get(name, 0.0) + seconds
                    share[name] = share.get(name, 0.0) + seconds / users[key]
                    if key not in seen:
                        added[name] = added.get(name, 0.0) + seconds
            found[result.number] = PointCost(Cost(alone), Cost(share), Cost(added))
            seen.update(result.costs)
    return found


def stage_costs(results: Sequence[Result], before: Mapping[str, Cost]) -> dict[str, Cost]:
    """Key -> cost of every stage of the points, and of the stages in `before`."""
    return {**before, **{key: cost for result in results for key, cost in result.costs.items()}}


def study_cost(results: Sequence[Result], before: Mapping[str, Cost], spent: Spent) -> StudyCost:
    """The costs of the whole study; `before` has the stages before fine-tuning, by key."""
    everything = stage_costs(results, before)
    points = total(stage_costs(results, {}).values())
    alone = total(total(result.costs.values()) for result in results)
    kept = total(cost for key, cost in everything.items() if key in spent.keys)
    lost = {
        name: max(0.0, seconds - kept.gpu_s.get(name, 0.0))
        for name, seconds in spent.cost.gpu_s.items()
    }
    return StudyCost(
        points, alone, alone + points.times(-1), total(everything.values()), spent.cost, Cost(lost)
    )


def cost_summary(cost: StudyCost, spent: Spent, profile: Profile) -> dict[str, object]:
    """The numbers as JSON values; dollars are null without a price."""
    parts = {name: as_json(part, profile) for name, part in vars(cost).items()}
    return {**parts, "driving_hours": round(spent.driving_s / 3600, 4)}


def as_json(cost: Cost, profile: Profile) -> dict[str, float | None]:
    usd = cost.usd(profile)
    return {"gpu_hours": round(cost.gpu_hours, 6), "usd": None if usd is None else round(usd, 6)}


def cost_label(cost: Cost, profile: Profile) -> str:
    """`1.25 GPU-hours, $1.88`; without a price, the hours alone.

    Where every stage ran on logical GPUs, the unit is "logical GPU-hours".
    """
    return gpu_hours_label(
        cost.gpu_hours,
        cost.usd(profile),
        "logical GPU-hours" if set(cost.gpu_s) == {None} else "GPU-hours",
    )


def gpu_hours_label(gpu_hours: float, usd: float | None, hours: str = "GPU-hours") -> str:
    text = f"{'under 0.001' if 0 < gpu_hours < 0.001 else f'{gpu_hours:.3g}'} {hours}"
    if usd is None:
        return text
    return f"{text}, ${usd:.2f}" if usd == 0 or usd >= 0.01 else f"{text}, ${usd:.2g}"


def cost_rows(
    results: Sequence[Result],
    before: Mapping[str, Cost],
    spent: Spent,
    profile: Profile,
) -> dict[str, object]:
    """The report's rows."""
    points, cost, everything = (
        point_costs(results).values(),
        study_cost(results, before, spent),
        stage_costs(results, before),
    )
    rows: dict[str, object] = {}
    if points:
        rows["a point alone, if nothing were shared"] = _spread(
            [point.alone for point in points], profile
        )
        rows["for comparison"] = PAPERS
        rows["a point's share"] = _spread([point.share for point in points], profile)
        rows["all points, each alone"] = cost_label(cost.alone, profile)
        rows["all points, each stage once"] = cost_label(cost.points, profile)
        rows["saved by sharing"] = cost_label(cost.saved, profile)
    rows["all stages, with those before fine-tuning"] = cost_label(cost.stages, profile)
    by_kind: dict[str, list[Cost]] = defaultdict(list)
    for each in everything.values():
        if each.origin is not None:
            by_kind[each.origin.kind].append(each)
    for kind, own in sorted(by_kind.items()):
        if total(own).gpu_hours > 0:
            rows[f"{kind}, {len(own)} stages"] = cost_label(total(own), profile)
    rows["spent by this study's runs"] = cost_label(cost.spent, profile)
    rows["of that, on lost and failed attempts and on starting processes"] = cost_label(
        cost.lost, profile
    )
    rows["hours of driving"] = f"{spent.driving_s / 3600:.3g}"
    rows["prices"] = _prices(cost.stages + cost.spent, profile)
    return rows


def prediction_rows(predictions: Sequence[Prediction], profile: Profile) -> dict[str, object]:
    """The report's row on the latest run that completed the study: its predicted and actual costs.

    Runs without work do not count. Empty where there was no such run.
    """
    done = [(each, each.after) for each in predictions if each.after is not None]
    if not done:
        return {}
    return {
        "the latest run that completed the study, predicted and actual": prediction_label(
            *done[-1], profile
        )
    }


def prediction_label(prediction: Prediction, spent: Spent, profile: Profile) -> str:
    """`predicted 4:10 and 0.12 GPU-hours; took 4:31 and 0.13 GPU-hours`.

    Where the prediction was off, the errors of wall time and GPU-hours follow in parentheses.
    """
    driven_s, cost = prediction.since(spent)
    off = [
        f"{name} {abs(error):.0%} too {'long' if error > 0 else 'short'}"
        for name, error in prediction.errors(spent).items()
    ]
    text = (
        f"predicted {clock(prediction.wall_s)} and {cost_label(prediction.cost, profile)}; took "
        f"{clock(driven_s)} and {cost_label(cost, profile)}"
    )
    return f"{text} (the prediction was off: {', '.join(off)})" if off else text


def _spread(costs: Sequence[Cost], profile: Profile) -> str:
    ranked = sorted(costs, key=lambda cost: cost.gpu_hours)
    least, middle, most = (
        cost_label(ranked[place], profile) for place in (0, (len(ranked) - 1) // 2, -1)
    )
    return f"{middle} (the middle of {len(ranked)}; {least} to {most})"


def _prices(used: Cost, profile: Profile) -> str:
    missing = used.unpriced(profile)
    if not profile.gpus or missing:
        which = f" for {' and '.join(missing)}" if profile.gpus else ""
        return (
            f"none{which} in cluster.yaml, so GPU-hours only; add `gpus: {{TYPE: "
            f"{{usd_per_hour: ...}}}}` there"
        )
    return ", ".join(
        f"{name} ${gpu.usd_per_hour:g} an hour" for name, gpu in sorted(profile.gpus.items())
    )


def cost_columns(results: Sequence[Result], profile: Profile) -> dict[str, list[float | None]]:
    """Cost columns of the results table, a value for each of `results`.

    A value is None where no stage ran, or where a price is missing.
    """
    points = point_costs(results)
    columns: dict[str, list[float | None]] = {}
    for suffix, part in (("", "alone"), ("_share", "share"), ("_added", "added")):
        costs = [
            getattr(points[row.number], part) if row.number in points else None for row in results
        ]
        columns[f"gpu_hours{suffix}"] = [None if cost is None else cost.gpu_hours for cost in costs]
        columns[f"cost_usd{suffix}"] = [
            None if cost is None else cost.usd(profile) for cost in costs
        ]
    return columns


@dataclass(frozen=True)
class GrowthStep:
    """The state of a study after `finished` points, the last of which is point `number`.

    `hours` are the hours in which jobs ran, summed over the runs. The hypervolume of noisy values
    keeps growing. `corrected` is that of the values moved towards their mean, as `search.stop`
    does (ebbline.sweeps.state.stopping).
    """

    finished: int
    number: int
    hours: float
    cost: Cost
    hypervolume: float
    corrected: float


def growth(
    results: Sequence[Result], objectives: Sequence[str], folder: Path
) -> Iterator[GrowthStep]:
    """The growth of the hypervolume: a step for each finished point, in the order of completion.

    A point completes when the last job of its stages ends (ebbline.sweeps.state.jobs reads the
    ledger). A point whose stages were all in the store completes at 0 hours. Points that complete
    at the same time are ordered by number. Hours and costs are those of this study's own runs.

    Raises StudyError when the ledger in `folder` is damaged, EvaluationError when a result lacks an
    objective.
    """
    ended = _ended(folder)
    start = (0.0, Cost())
    completed = [
        (max((ended.get(key, start) for key in r.keys.values()), key=_hours, default=start), r)
        for r in finished(results)
    ]
    ways = [direction(name) for name in objectives]
    best_NM, volume = np.empty((0, len(ways))), 0.0
    in_order = [r for _, r in sorted(completed, key=lambda each: (each[0][0], each[1].number))]
    values_NM = objective_values(in_order, objectives)
    errors_NM = np.array([[noise(r.metrics[name]) for name in objectives] for r in in_order])
    for count, ((hours, cost), result) in enumerate(
        sorted(completed, key=lambda each: (each[0][0], each[1].number)), 1
    ):
        rows_NM = np.vstack([best_NM, objective_values([result], objectives)])
        on_front = front(rows_NM, ways)
        best_NM = rows_NM[on_front]
        volume = hypervolume(best_NM, ways) if on_front[-1] else volume
        # Taking values towards a mean keeps their order, so the front stays the same points.
        mean_M, kept_M = shrinkage(values_NM[:count], errors_NM[:count])
        corrected = hypervolume(mean_M + kept_M * (best_NM - mean_M), ways)
        yield GrowthStep(count, result.number, hours, cost, volume, corrected)


def _hours(end: tuple[float, Cost]) -> float:
    return end[0]


def _ended(folder: Path) -> dict[str, tuple[float, Cost]]:
    """Key of a stage -> the end of its last job in hours, and the cost of all jobs up to then."""
    found: dict[str, tuple[float, Cost]] = {}
    drive, before_s, last_s, spent = 0, 0.0, 0.0, Cost()
    for job in read_jobs(folder):
        if job.drive != drive:
            drive, before_s, last_s = job.drive, before_s + last_s, 0.0
        last_s = job.end_s
        spent += Cost.of(job.gpus, job.end_s - job.start_s)
        found |= dict.fromkeys(job.keys, ((before_s + job.end_s) / 3600, spent))
    return found
