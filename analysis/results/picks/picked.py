"""A pick as text and as JSON: the point, its margins over the floors, confidence and bounds."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ebbline.analysis.results.claims.between_seeds import setting_interval
from ebbline.analysis.results.defended.labels import defence_label
from ebbline.analysis.results.measurements import (
    NO_EVIDENCE,
    Comparison,
    Evidence,
    compared,
    pairs_with_aligned,
    usefulness_metric,
)
from ebbline.analysis.results.picks.confirmed import lines_of_confirmed
from ebbline.analysis.results.picks.floors import (
    CONFIDENCE,
    Floor,
    Pick,
    adapter_standing,
    bound,
    floor_confidence,
    slack,
    standing,
)
from ebbline.analysis.results.statistics import SHARES
from ebbline.analysis.results.tables import categories_of, in_points
from ebbline.analysis.results.wording import (
    changed_label,
    measured,
    metric_label,
    percent,
    settings_label,
)
from ebbline.sweeps.state.replicates import seeds_of
from ebbline.sweeps.study.points import Result, brought, defence_of
from ebbline.sweeps.study.study import Study
from ebbline.tasks.defences.defence import SHARE_COLUMN
from ebbline.tasks.defences.in_use import NONE
from ebbline.tasks.measuring.metrics import Metric

FEW_ITEMS = 10  # fewer prompts may have a 95% interval that is wider than +-0.25


@dataclass(frozen=True)
class WeakCategory:
    """A category that misses a floor which is stated for all prompts together."""

    floor: Floor
    category: str
    metric: Metric

    def __str__(self) -> str:
        return (
            f"category {self.category or '(none)'}: {measured(self.metric)}, "
            f"{in_points(-self.floor.margin(self.metric.value)).lstrip('+')} points "
            f"{'below' if self.floor.up else 'above'} {self.floor}"
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "metric": self.floor.metric,
            "category": self.category,
            "value": self.metric.value,
            "low": self.metric.interval[0],
            "high": self.metric.interval[1],
            "n": self.metric.n,
        }


def weak_categories(
    result: Result, floors: Sequence[Floor], evidence: Evidence
) -> list[WeakCategory]:
    """The categories whose values miss a floor, the worst first. Empty where samples are missing,
    for a metric that is no share of samples, and for a suite with one category.
    """
    found = []
    for floor in floors:
        suite, _, metric = floor.metric.rpartition(".")
        if metric not in SHARES:
            continue
        categories = categories_of(result, suite, floor.metric, evidence)
        found += [
            WeakCategory(floor, category, each)
            for category, each in categories.items()
            if len(categories) > 1 and floor.margin(each.value) < 0
        ]
    return sorted(found, key=lambda each: each.floor.margin(each.metric.value))


def missed_by(nearest: Pick, confidence: float | None) -> str:
    """`short by 1.0 points of refusal rate at least 99.0%`, with each floor that its values miss.
    Floors that its confirmed values alone miss come last.
    """
    missed = [
        (floor, slack(nearest.result, [floor], nearest.among, confidence))
        for floor in nearest.floors
    ]
    prefix = "" if confidence is None else f"at {confidence:.0%} confidence "
    gaps = " and ".join(
        f"{in_points(-gap).lstrip('+')} points of {floor}" for floor, gap in missed if gap < 0
    )
    refuted = in_words(nearest.refuted)
    return ", ".join(
        [
            *([f"{prefix}short by {gaps}"] if gaps else []),
            *([f"confirmed not to hold {refuted}"] if refuted else []),
        ]
    )


def named(result: Result) -> str:
    """`point 1 (rank=8 size=100; 40% of modules projected)`."""
    return f"point {result.number} ({settings_label(result.point)}; {changed_label(result)})"


def values_of_pick(found: Pick) -> str:
    names = dict.fromkeys(
        [*(floor.metric for floor in found.floors), *([found.maximised] if found.maximised else [])]
    )
    return ", ".join(
        f"{metric_label(name)} {measured(found.result.metrics[name])}" for name in names
    )


def preferred(found: Pick) -> str | None:
    """Why a simpler defence was picked instead of the most useful point; None where it was not."""
    if found.instead_of is None or found.maximised is None or found.margin is None:
        return None
    name = found.maximised
    less = found.instead_of.metrics[name].value - found.result.metrics[name].value
    simple, other = (
        defence_label(NONE if not each.changed_share else defence_of(each.point).name)
        for each in (found.result, found.instead_of)
    )
    return (
        f"preferred to {named(found.instead_of)}, whose {metric_label(name)} is "
        f"{abs(100 * less):.1f} points higher: {simple} is simpler than {other}, and the margin is "
        f"{100 * found.margin:.1f} points"
    )


def in_words(floors: Sequence[Floor]) -> str:
    return " and ".join(dict.fromkeys(map(str, floors)))


def lines_of(study: Study, found: Pick) -> Iterator[str]:
    """The picked point's values, with the margin, confidence and bound at each floor."""
    for floor in found.floors:
        metric = found.result.metrics[floor.metric]
        if metric.items < FEW_ITEMS:
            label = metric_label(floor.metric)
            yield f"{label}: only {metric.items:.0f} prompts, too few for a claim"
        margin = floor.margin(metric.value)
        side = "over" if floor.up == (margin >= 0) else "under"
        edge = f"{'floor' if floor.up else 'ceiling'} of {percent(floor.value)}"
        yield (
            f"{metric_label(floor.metric)} {measured(metric)}, {abs(100 * margin):.1f} points "
            f"{side} the {edge}"
        )
        alone, picked = (
            _confidence_label(floor_confidence(metric, floor, among)) for among in (1, found.among)
        )
        least = "at least" if floor.up else "at most"
        yield (
            f"{edge} met: confidence {picked}, allowing for the pick among {found.among} "
            f"points ({alone} for this point by itself)"
        )
        yield (
            f"with {CONFIDENCE:.0%} confidence it is {least} "
            f"{percent(bound(metric, found.among))}, allowing for the pick"
            f" ({percent(bound(metric))} by itself)"
        )
    if found.maximised is not None and found.maximised not in [
        floor.metric for floor in found.floors
    ]:
        yield f"{metric_label(found.maximised)} {measured(found.result.metrics[found.maximised])}"
    yield from lines_of_confirmed(found.result, found.floors)
    seeds, confirmed = seeds_of(found.result), found.result.confirmed
    if brought(found.result.point) is not None:
        yield "an adapter from outside: the result of another training of it is unknown"
    elif seeds > 1:
        yield f"pooled over {seeds} training seeds"
    elif confirmed is None or not confirmed.seeds:  # else fresh seeds have shown it
        yield "one training seed: the result with another seed is unknown"
    if too_low(study, found):
        yield (
            f"below the study's own refusal floor of {percent(study.refusal_floor)}: it cannot "
            "be exported"
        )


@dataclass(frozen=True)
class Gain:
    """A picked point's usefulness compared with its model before fine-tuning."""

    metric: str
    comparison: Comparison

    @property
    def is_one(self) -> bool:
        """Whether the point is measurably more useful than not fine-tuning."""
        return self.comparison.move == "higher" and self.comparison.after.value > 0

    def __str__(self) -> str:
        name, before = metric_label(self.metric), measured(self.comparison.before)
        if self.comparison.after.value == 0:
            return (
                f"of no use: its {name} is 0.0%, so no prompt was answered right; before "
                f"fine-tuning the model has {before}"
            )
        if self.is_one:
            return f"better than not fine-tuning: before it, the model's {name} is {before}"
        if self.comparison.move == "lower":
            return (
                f"worse than not fine-tuning: before it, the model's {name} is {before}, which is "
                "measurably higher"
            )
        return (
            f"no gain over not fine-tuning: before it, the model's {name} is {before}, and the "
            "difference may be chance"
        )

    def as_json(self) -> dict[str, Any]:
        low, high = self.comparison.interval
        return {
            "metric": self.metric,
            "before_fine_tuning": self.comparison.before.value,
            "difference": self.comparison.difference,
            "low": low,
            "high": high,
            "move": self.comparison.move,
            "better_than_not_fine_tuning": self.is_one,
        }


def gain_of(
    study: Study, found: Pick, aligned: Mapping[str, Metric], evidence: Evidence = NO_EVIDENCE
) -> Gain | None:
    """How the point's usefulness compares with the model before fine-tuning.

    None for a study that measures no usefulness, and where that model was not measured.
    """
    name = found.maximised or usefulness_metric(study)
    if name is None or name not in aligned or name not in found.result.metrics:
        return None
    model = found.result.point.model
    pairs = pairs_with_aligned(model, aligned[name], [found.result], name, evidence)
    return Gain(name, compared(pairs)[0])


def too_low(study: Study, found: Pick) -> bool:
    """Whether the point misses the study's own refusal floor, whatever floors the pick used."""
    refusal = study.refusal_metric
    return (
        refusal is None
        or slack(found.result, [Floor(refusal, study.refusal_floor)], found.among) < 0
    )


def _confidence_label(confidence: float) -> str:
    return "over 99.9%" if confidence > 0.999 else percent(max(0.0, confidence))


def picked_json(study: Study, found: Pick) -> dict[str, Any]:
    result = found.result
    return {
        "model": result.point.model,
        "number": result.number,
        "point": result.point.id,
        "settings": dict(result.point.values),
        SHARE_COLUMN: result.changed_share,
        "meets": found.meets,
        "holds": found.holds,
        "standing": found.standing,
        "standing_of_setting": standing(result, found.floors, "setting")
        if brought(result.point) is None
        else None,
        "confirmed": confirmed_json(found),
        "picked_among": found.among,
        "maximised": None if found.by_hand else found.maximised,
        "named_by_hand": found.by_hand,
        "margin_for_simplicity": found.margin,
        "preferred_to": None if found.instead_of is None else found.instead_of.number,
        "seeds": list(study.seeds[: seeds_of(result)]),
        "floors": floors_json(found.floors, result, found.among),
        "metrics": {
            name: {
                "value": m.value,
                "low": m.interval[0],
                "high": m.interval[1],
                "n": m.n,
                "undecided": m.undecided,
                "direction": m.direction,
                "seeds": list(m.seeds),
            }
            for name, m in sorted(result.metrics.items())
        },
        "keys": dict(sorted(result.keys.items())),
    }


def confirmed_json(found: Pick) -> dict[str, Any] | None:
    """What was confirmed of a pick; None for a candidate."""
    confirmed = found.result.confirmed
    if confirmed is None:
        return None
    return {
        "study": confirmed.study,
        "number": confirmed.number,
        "points_confirmed": confirmed.among,
        "fresh_seeds": list(confirmed.seeds),
        "adapters": {
            str(seed): {
                "standing": adapter_standing(found.result, found.floors, seed),
                "metrics": {name: _metric_json(each) for name, each in sorted(metrics.items())},
            }
            for seed, metrics in confirmed.adapters.items()
        },
        "setting": {
            name: {**_metric_json(each), "interval_over_seeds": list(setting_interval(each))}
            for name, each in sorted(confirmed.setting.items())
        },
        "keys": dict(sorted(confirmed.keys.items())),
    }


def _metric_json(metric: Metric) -> dict[str, Any]:
    return {
        "value": metric.value,
        "low": metric.interval[0],
        "high": metric.interval[1],
        "n": metric.n,
        "undecided": metric.undecided,
        "seeds": list(metric.seeds),
    }


def floors_json(floors: Sequence[Floor], result: Result, among: int) -> list[dict[str, Any]]:
    return [
        {
            "metric": floor.metric,
            "side": "at least" if floor.up else "at most",
            "floor": floor.value,
            "value": metric.value,
            "undecided": metric.undecided,
            "margin": floor.margin(metric.value),
            "confidence": {
                "by_itself": floor_confidence(metric, floor),
                "allowing_for_the_pick": floor_confidence(metric, floor, among),
            },
            "bound_95": {"by_itself": bound(metric), "allowing_for_the_pick": bound(metric, among)},
        }
        for floor, metric in ((floor, result.metrics[floor.metric]) for floor in floors)
    ]
