"""What `ebbline confirm` found of points: reading it from its own study, and saying it.

Invariant: the claim about an adapter and the claim about a setting are worded apart. A confirmed
number always stands beside the number that chose the point.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ebbline.analysis.results.claims.between_seeds import setting_interval
from ebbline.analysis.results.picks.floors import (
    CONFIDENCE,
    Floor,
    Standing,
    adapter_standing,
    confirmed_bound,
    fewest_prompts,
    of_seed,
    standing,
)
from ebbline.analysis.results.wording import (
    measured,
    metric_label,
    percent,
    spread_label,
    undecided_label,
)
from ebbline.sweeps.study.points import (
    Confirmed,
    Point,
    Result,
    StageName,
    brought,
    distinct,
)
from ebbline.sweeps.study.study import Study
from ebbline.tasks.defences.in_use import MAKERS
from ebbline.tasks.measuring.metrics import Metric, pooled

STANDS: Mapping[Standing, str] = {
    "holds": "holds",
    "unsure": "is not sure to hold",
    "candidate": "is not confirmed to hold",
    "missed": "does not hold",
}


def with_confirmations(
    results: Sequence[Result], own: Study, confirming: Study, confirmed: Sequence[Result]
) -> list[Result]:
    """The results, each with what the study `confirming` measured of the same point.

    `own` is the study that nominated the points: its seeds made the adapters. A measurement of
    other adapters, of an earlier study with the same name, is left out.
    """
    done = {each.point: each for each in confirmed if each.status == "done"}
    among = len(distinct(list(done.values())))
    return [
        replace(result, confirmed=_confirmed(own, confirming, done[result.point], among))
        if result.status == "done"
        and result.point in done
        and _same_adapters(result, done[result.point])
        else result
        for result in results
    ]


def _same_adapters(nominated: Result, again: Result) -> bool:
    """Whether no adapter of a seed that both have is another one."""
    made = [name for name in again.keys if StageName.parse(name).part in MAKERS]
    return all(nominated.keys.get(name, again.keys[name]) == again.keys[name] for name in made)


def _confirmed(own: Study, confirming: Study, found: Result, among: int) -> Confirmed:
    seeds = _seeds(confirming, found.point)
    by_seed = {
        seed: {name: of_seed(metric, index) for name, metric in found.metrics.items()}
        for index, seed in enumerate(seeds)
    }
    fresh = [seed for seed in seeds if seed not in own.seeds]
    setting = {
        name: pooled([by_seed[seed][name] for seed in fresh]) for name in found.metrics if fresh
    }
    adapters = {seed: metrics for seed, metrics in by_seed.items() if seed in own.seeds}
    return Confirmed(
        confirming.study, found.number, among, adapters, setting, tuple(fresh), found.keys
    )


def _seeds(study: Study, point: Point) -> Sequence[int]:
    return study.seeds if brought(point) is None else study.seeds[:1]


def setting_label(metric: Metric) -> str:
    """A confirmed metric of a setting, with the 95% interval over its seeds and prompts."""
    low, high = setting_interval(metric)
    return (
        f"{percent(metric.value)} (95% interval {percent(low)} to {percent(high)}"
        f"{spread_label(metric, ', ')}{undecided_label(metric.undecided, ', ')})"
    )


def confirmed_rate(result: Result, name: str) -> tuple[Metric, tuple[float, float]] | None:
    """The confirmed metric of a point's setting with its interval over seeds and prompts. Of an
    adapter from outside it is that of the adapter. None where it was not confirmed.
    """
    confirmed = result.confirmed
    if confirmed is None:
        return None
    if (setting := confirmed.setting.get(name)) is not None:
        return setting, setting_interval(setting)
    found = [metrics[name] for metrics in confirmed.adapters.values() if name in metrics]
    return (found[0], found[0].interval) if found and not confirmed.setting else None


def confirmed_words(result: Result, refusal: str) -> str:
    """Sentences on the confirmed refusal rate of a point's setting and adapters; empty for a point
    that was not confirmed.
    """
    confirmed = result.confirmed
    if confirmed is None:
        return ""
    sentences, chose = [], result.metrics[refusal]
    setting = confirmed.setting.get(refusal)
    if setting is not None:
        sentences.append(
            f"This setting, on other prompts and {len(confirmed.seeds)} fresh training seeds: "
            f"{metric_label(refusal)} {setting_label(setting)}, "
            f"{_shrinkage(chose, setting)}."
        )
    adapters = {seed: metrics[refusal] for seed, metrics in confirmed.adapters.items()}
    if adapters:
        values = ", ".join(f"seed {seed} {measured(each)}" for seed, each in adapters.items())
        which = "This adapter" if len(adapters) == 1 else "These adapters"
        sentences.append(f"{which}, on other prompts: {values}.")
    return " ".join(sentences)


def _shrinkage(chose: Metric, confirmed: Metric) -> str:
    """How far the confirmed value is from the one that chose the point."""
    moved = 100 * (confirmed.value - chose.value)
    if abs(moved) < 0.05:
        return f"as in the search ({percent(chose.value)})"
    way = "below" if moved < 0 else "above"
    return f"{abs(moved):.1f} points {way} the {percent(chose.value)} that chose it"


def lines_of_confirmed(result: Result, floors: Sequence[Floor]) -> Iterator[str]:
    """The two claims about a point at its floors, a line each; nothing for one not confirmed."""
    confirmed = result.confirmed
    if confirmed is None:
        return
    for floor in floors:
        for seed, metrics in confirmed.adapters.items():
            if (metric := metrics.get(floor.metric)) is not None:
                stands = adapter_standing(result, [floor], seed)
                yield (
                    f"this adapter (seed {seed}) {STANDS[stands]} {floor}: "
                    f"{measured(metric)} on other prompts, "
                    f"{_bound_words(result, floor, metric, 'adapter')}"
                    f"{_too_few(floor, metric, confirmed.among * len(confirmed.adapters))}"
                )
        if (metric := confirmed.setting.get(floor.metric)) is not None:
            alone = [floor.margin(value) >= 0 for value in metric.seeds]
            yield (
                f"this setting {STANDS[standing(result, [floor], 'setting')]} {floor}: "
                f"{setting_label(metric)} on other prompts and {len(alone)} fresh seeds, "
                f"{_bound_words(result, floor, metric, 'setting')}; {sum(alone)} of {len(alone)} "
                f"seeds meet it by themselves; {_shrinkage(result.metrics[floor.metric], metric)}"
                f"{_too_few(floor, metric, confirmed.among)}"
            )


def _too_few(floor: Floor, metric: Metric, among: int) -> str:
    """Words on a floor that this number of prompts cannot show, whatever the answers; or empty."""
    needed = fewest_prompts(floor, among)
    if metric.items >= needed:
        return ""
    how = f"{needed:.0f} are needed" if math.isfinite(needed) else "none would be enough"
    return f"; {metric.items:.0f} prompts cannot show it, even if none fails: {how}"


def _bound_words(result: Result, floor: Floor, metric: Metric, claim: str) -> str:
    found = confirmed_bound(result, metric, "adapter" if claim == "adapter" else "setting")
    among = 0 if result.confirmed is None else result.confirmed.among
    return (
        f"{'at least' if floor.up else 'at most'} {percent(found)} with {CONFIDENCE:.0%} "
        f"confidence, allowing for {among} point{'s' * (among != 1)} confirmed"
    )
