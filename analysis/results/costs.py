"""What a study cost: by stage kind, by point, in all; what sharing saved; and how the hypervolume
grew with the time and the cost of driving it. docs/costs.md defines each number.

alone    what a point's stages cost together: its price if nothing were shared
share    each stage's cost divided among the points that use it; the shares add up to what the
         points cost together
added    the stages that no point before it uses
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ebbline.analysis.results.frontier import finished, front, hypervolume, values_of
from ebbline.analysis.results.wording import clock
from ebbline.cluster.profile import Profile
from ebbline.cluster.schedule.costs import Cost, total
from ebbline.sweeps.forecast.prediction import Prediction
from ebbline.sweeps.state.jobs import read_jobs
from ebbline.sweeps.state.spending import Spent
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
    """`points` counts each stage of the points once, `alone` once for every point that uses it;
    `stages` adds the aligned models'.

    `spent` is what the study's own runs took, `lost` the part of it that is in no finished stage.
    """

    points: Cost
    alone: Cost
    saved: Cost
    stages: Cost
    spent: Cost
    lost: Cost


def point_costs(results: Sequence[Result]) -> dict[int, PointCost]:
    """By number, for the points of which something has run."""
    users = Counter(key for result in results for key in result.costs)
    seen: set[str] = set()
    found: dict[int, PointCost] = {}
    for result in sorted(results, key=lambda result: result.number):
        if result.costs:
            added = total(cost for key, cost in result.costs.items() if key not in seen)
            share = total(cost.times(1 / users[key]) for key, cost in result.costs.items())
            found[result.number] = PointCost(total(result.costs.values()), share, added)
            seen |= set(result.costs)
    return found


def once(results: Sequence[Result], before: Mapping[str, Cost]) -> dict[str, Cost]:
    """Key -> cost of every stage of the points, and of those before fine-tuning."""
    return {**before, **{key: cost for result in results for key, cost in result.costs.items()}}


def study_cost(results: Sequence[Result], before: Mapping[str, Cost], spent: Spent) -> StudyCost:
    """`before` is what measuring the models before fine-tuning cost, by key."""
    everything = once(results, before)
    points = total(once(results, {}).values())
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


def told(cost: Cost, profile: Profile) -> str:
    """`1.25 GPU-hours, $1.88`; without a price the hours alone. Says so when all were on logical
    GPUs.
    """
    return told_numbers(
        cost.gpu_hours,
        cost.usd(profile),
        "logical GPU-hours" if set(cost.gpu_s) == {None} else "GPU-hours",
    )


def told_numbers(gpu_hours: float, usd: float | None, hours: str = "GPU-hours") -> str:
    text = f"{'under 0.001' if 0 < gpu_hours < 0.001 else f'{gpu_hours:.3g}'} {hours}"
    if usd is None:
        return text
    return f"{text}, ${usd:.2f}" if usd == 0 or usd >= 0.01 else f"{text}, ${usd:.2g}"


def cost_rows(
    results: Sequence[Result],
    before: Mapping[str, Cost],
    kinds: Mapping[str, str],
    spent: Spent,
    profile: Profile,
) -> dict[str, object]:
    """The report's rows. `kinds` maps a key to its stage's kind."""
    points, cost, everything = (
        point_costs(results).values(),
        study_cost(results, before, spent),
        once(results, before),
    )
    rows: dict[str, object] = {}
    if points:
        rows["a point alone, if nothing were shared"] = _spread(
            [point.alone for point in points], profile
        )
        rows["for comparison"] = PAPERS
        rows["a point's share"] = _spread([point.share for point in points], profile)
        rows["all points, each alone"] = told(cost.alone, profile)
        rows["all points, each stage once"] = told(cost.points, profile)
        rows["saved by sharing"] = told(cost.saved, profile)
    rows["all stages, with those before fine-tuning"] = told(cost.stages, profile)
    for kind in sorted({kinds[key] for key in everything}):
        own = [each for key, each in everything.items() if kinds[key] == kind]
        if total(own).gpu_hours > 0:
            rows[f"{kind}, {len(own)} stages"] = told(total(own), profile)
    rows["spent by this study's runs"] = told(cost.spent, profile)
    rows["of that, on lost and failed attempts and on starting processes"] = told(
        cost.lost, profile
    )
    rows["hours of driving"] = f"{spent.driving_s / 3600:.3g}"
    rows["prices"] = _prices(cost.stages + cost.spent, profile)
    return rows


def prediction_rows(predictions: Sequence[Prediction], profile: Profile) -> dict[str, object]:
    """The report's rows on the latest run that had something to do and came to the study's end:
    what it was predicted to take, what it took, and by how much the prediction was off. None where
    there was no such run.
    """
    done = [(each, each.after) for each in predictions if each.after is not None]
    if not done:
        return {}
    return {
        "the latest run to the study's end, as predicted and as it was": compared(
            *done[-1], profile
        )
    }


def compared(prediction: Prediction, spent: Spent, profile: Profile) -> str:
    """`predicted 4:10 and 0.12 GPU-hours; took 4:31 and 0.13 GPU-hours (wall time 8% too short,
    GPU-hours 8% too short)`.
    """
    driven_s, cost = prediction.since(spent)
    off = [
        f"{name} {abs(error):.0%} too {'long' if error > 0 else 'short'}"
        for name, error in prediction.errors(spent).items()
    ]
    took = (
        f"predicted {clock(prediction.wall_s)} and {told(prediction.cost, profile)}; took "
        f"{clock(driven_s)} and {told(cost, profile)}"
    )
    return f"{took} (the prediction was off: {', '.join(off)})" if off else took


def _spread(costs: Sequence[Cost], profile: Profile) -> str:
    ranked = sorted(costs, key=lambda cost: cost.gpu_hours)
    least, middle, most = (
        told(ranked[place], profile) for place in (0, (len(ranked) - 1) // 2, -1)
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
    """Columns for the table of results, in its order of rows; None where nothing has run, or has no
    price.
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
class Grown:
    """What there was once `finished` points had landed, the last of them point `number`. `hours`
    are hours in which jobs ran.
    """

    finished: int
    number: int
    hours: float
    cost: Cost
    hypervolume: float


def growth(results: Sequence[Result], objectives: Sequence[str], folder: Path) -> Iterator[Grown]:
    """How the hypervolume grew: one for each finished point, in the order of landing; of points
    that landed together, by number.

    A point lands when the last job ended that was started for one of its stages
    (ebbline.sweeps.state.jobs reads the ledger). One that was found whole in the store lands at
    once. Hours and costs are of this study's own runs: what the store already held took none.

    Raises StudyError when the ledger in `folder` is damaged, EvaluationError when a result lacks an
    objective.
    """
    ended = _ended(folder)
    start = (0.0, Cost())
    landed = [
        (max((ended.get(key, start) for key in r.keys.values()), key=_when, default=start), r)
        for r in finished(results)
    ]
    ways = [direction(name) for name in objectives]
    best_NM, volume = np.empty((0, len(ways))), 0.0
    for count, ((hours, cost), result) in enumerate(
        sorted(landed, key=lambda each: (each[0][0], each[1].number)), 1
    ):
        rows_NM = np.vstack([best_NM, values_of([result], objectives)])
        on_front = front(rows_NM, ways)
        best_NM = rows_NM[on_front]
        volume = hypervolume(best_NM, ways) if on_front[-1] else volume
        yield Grown(count, result.number, hours, cost, volume)


def _when(moment: tuple[float, Cost]) -> float:
    return moment[0]


def _ended(folder: Path) -> dict[str, tuple[float, Cost]]:
    """Key of a stage -> when the last job for it ended, in hours, and what all jobs had cost by
    then.
    """
    found: dict[str, tuple[float, Cost]] = {}
    drive, before_s, last_s, spent = 0, 0.0, 0.0, Cost()
    for job in read_jobs(folder):
        if job.drive != drive:
            drive, before_s, last_s = job.drive, before_s + last_s, 0.0
        last_s = job.end_s
        spent += Cost.of(job.gpus, job.end_s - job.start_s)
        found |= dict.fromkeys(job.keys, ((before_s + job.end_s) / 3600, spent))
    return found
