"""Two studies compared: their operating points, the points with equal settings, their frontiers.

Invariants: two measurements are paired by prompt only when both suites asked the same prompts, by
content and by id, with the same settings. Otherwise their intervals decide, and the reason is
reported. Tests that are reported together are corrected together. Undecided samples widen every
interval.

Arrays: `worst_NP` and `best_NP` are the share of a point's seeds that were a success, for N points
and P prompts, with undecided samples at their worst and at their best.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ebbline.analysis.results.claims.between_seeds import (
    BetweenSeeds,
    over_paired_seeds,
    over_separate_seeds,
)
from ebbline.analysis.results.frontier import finished, frontier_hypervolume, hypervolume
from ebbline.analysis.results.measurements import (
    Comparison,
    Evidence,
    Measurement,
    compared,
    measurement,
)
from ebbline.analysis.results.picks.floors import Floor, Pick, pick
from ebbline.analysis.results.statistics import SHARES
from ebbline.analysis.results.wording import natural
from ebbline.sweeps.study.points import Point, Result, Value, brought, defence_of, distinct
from ebbline.sweeps.study.study import Study
from ebbline.tasks.defences.in_use import AXIS, NONE, owns
from ebbline.tasks.measuring.metrics import direction

RESAMPLES = 1000
SuiteSettings = Mapping[str, Mapping[str, object]]
"""Suite -> all settings of its measurement: the prompts' digest, the generation, the scoring."""


@dataclass(frozen=True)
class Side:
    """One of the studies and its results; `suite_settings` has only suites with a measurement."""

    label: str
    study: Study
    results: Sequence[Result]
    evidence: Evidence
    suite_settings: SuiteSettings

    def of(self, model: str) -> list[Result]:
        return [result for result in finished(self.results) if result.point.model == model]


@dataclass(frozen=True)
class Volumes:
    """The hypervolumes of two frontiers, and a 95% bootstrap interval of their difference.

    The bootstrap is over prompts. `paired` tells that both studies have the same prompts and were
    resampled together. The interval is None where samples are missing. `points` counts the
    different points behind each: a frontier of more noisy points reaches further, so unequal counts
    support no verdict. `over_seeds` is the difference of the frontiers that each training seed
    gives, None with too few seeds: the bootstrap over prompts does not include it.
    """

    before: float
    after: float
    interval: tuple[float, float] | None = None
    paired: bool = False
    points: tuple[int, int] = (0, 0)
    over_seeds: BetweenSeeds | None = None

    @property
    def comparable(self) -> bool:
        """Whether a difference may be called larger or smaller."""
        return self.points[0] == self.points[1]

    @property
    def move(self) -> Literal["larger", "smaller"] | None:
        """What the difference shows: of the settings where there are enough seeds, else of these
        adapters. None where an interval has 0 in it.
        """
        if self.interval is None or not self.paired or not self.comparable:
            return None
        for low, high in (self.interval, *([self.over_seeds.interval] if self.over_seeds else ())):
            if low <= 0 <= high:
                return None
        return "larger" if self.difference > 0 else "smaller"

    @property
    def difference(self) -> float:
        return self.after - self.before


@dataclass(frozen=True)
class ModelComparison:
    """One model in two studies.

    `picks` are the operating points at equal floors, compared by metric in `at_picks`. `shared` are
    the pairs of points with equal settings, compared by metric in `at_shared`, in the same order.
    """

    model: str
    picks: tuple[Pick, Pick]
    at_picks: Mapping[str, Comparison] = field(default_factory=dict)
    shared: tuple[tuple[Result, Result], ...] = ()
    at_shared: Mapping[str, Sequence[Comparison]] = field(default_factory=dict)
    volumes: Volumes | None = None


@dataclass(frozen=True)
class StudyComparison:
    """A study compared with the first one.

    `apart` maps each suite that is not comparable to the reason. `metrics` are measured by both.
    `sizes` has one comparison for each model.
    """

    before: Side
    after: Side
    apart: Mapping[str, str]
    metrics: tuple[str, ...]
    sizes: tuple[ModelComparison, ...]


def study_comparison(
    before: Side, after: Side, floors: Sequence[Floor], maximised: str | None
) -> StudyComparison:
    """The second study against the first, for the models with finished points in both."""
    apart = dict(unlike_suites(before.suite_settings, after.suite_settings))
    metrics = tuple(name for name in _metrics(before.study) if name in _metrics(after.study))
    objectives = [name for name in before.study.objectives if name in metrics]
    models = sorted({m for m in before.study.models if before.of(m) and after.of(m)}, key=natural)
    picked = {}
    for model in models:
        one, other = (pick(side.of(model), floors, maximised) for side in (before, after))
        if one is not None and other is not None:
            picked[model] = one, other
    # The operating points of all models are one family of tests. The points with equal settings
    # are another family for each model and metric.
    places = [(model, name) for model in models for name in metrics]
    pairs = [
        _pair(before, after, picked[model][0].result, picked[model][1].result, name, apart)
        for model, name in places
    ]
    at_picks = dict(zip(places, compared(pairs), strict=True))
    sizes = []
    for model in models:
        shared = tuple(same_settings(before, after, model))
        at_shared = {
            name: compared([_pair(before, after, one, other, name, apart) for one, other in shared])
            for name in metrics
            if shared
        }
        sizes.append(
            ModelComparison(
                model,
                picked[model],
                {name: at_picks[model, name] for name in metrics},
                shared,
                at_shared,
                volumes(before, after, model, objectives, apart)
                if len(objectives) == len(before.study.objectives)
                else None,
            )
        )
    return StudyComparison(before, after, apart, metrics, tuple(sizes))


def unlike_suites(before: SuiteSettings, after: SuiteSettings) -> Iterator[tuple[str, str]]:
    """(suite, reason) for each suite that is not comparable."""
    for suite in sorted({*before, *after}):
        if suite not in before or suite not in after:
            yield suite, "only one of the studies has measured it"
            continue
        one, other = before[suite], after[suite]
        if any(one.get(name) != other.get(name) for name in ("prompts", "split")):
            yield suite, "different prompts"
            continue
        changed = [
            f"{name} {_setting_label(one.get(name))} and {_setting_label(other.get(name))}"
            for name in sorted({*one, *other})
            if one.get(name) != other.get(name)
        ]
        if changed:
            yield suite, "the same prompts, measured with other settings: " + ", ".join(changed)


def _setting_label(value: object) -> str:
    return "none" if value is None else str(value)


def _metrics(study: Study) -> list[str]:
    """The objectives, then the other suites' main metrics."""
    measured = [
        f"{suite}.{metric}"
        for suite, entry in study.suites.items()
        for metric in entry.measure.metrics()[:1]
    ]
    return list(dict.fromkeys([*study.objectives, *measured]))


def _pair(
    before: Side, after: Side, one: Result, other: Result, name: str, apart: Mapping[str, str]
) -> tuple[Measurement, Measurement]:
    """Two measurements, without samples where the suite is in `apart`.

    Equal seeds are pairs. Of studies with other seeds only the prompts are pairs: their seeds are
    numbered by place, which the total of a prompt does not depend on.
    """
    if name.rpartition(".")[0] in apart:
        return Measurement(one.metrics[name]), Measurement(other.metrics[name])
    found = measurement(one, name, before.evidence), measurement(other, name, after.evidence)
    first, second = found
    if first.replicates.keys() == second.replicates.keys():
        return first, second
    first, second = (
        replace(each, replicates=dict(enumerate(each.replicates.values())), other_seeds=True)
        for each in found
    )
    return first, second


def same_settings(before: Side, after: Side, model: str) -> Iterator[tuple[Result, Result]]:
    """The pairs of points with equal settings: every axis of either study has the same value or
    fixed setting.

    A pair of points that are duplicates in both studies is omitted: it would be counted twice.
    """
    axes = sorted({*before.study.axes_of(model), *after.study.axes_of(model)})
    there = {_settings(after.study, result.point, axes): result for result in after.of(model)}
    firsts, others = (
        {result.number for result in distinct(side.of(model))} for side in (before, after)
    )
    for result in before.of(model):
        settings = _settings(before.study, result.point, axes)
        other = there.get(settings)
        if other is not None and (result.number in firsts or other.number in others):
            yield result, other


def _settings(study: Study, point: Point, axes: Sequence[str]) -> tuple[Value, ...]:
    values = dict(point.values)
    given = brought(point) is not None  # its training has no setting of the study
    found = []
    for axis in axes:
        fixed = None if given and not owns(axis) else study.fixed(point.model, axis)
        value = _defence(study, point) if axis == AXIS else values.get(axis, fixed)
        found.append(
            float(value) if isinstance(value, int) and not isinstance(value, bool) else value
        )
    return tuple(found)


def _defence(study: Study, point: Point) -> str:
    """The name of a point's defence. A study that names none has Safe LoRA, or no defence where its
    knobs are off.
    """
    defence = defence_of(point)
    return NONE if defence.is_off(study.knobs(defence, dict(point.values))) else defence.name


def volumes(
    before: Side, after: Side, model: str, objectives: Sequence[str], apart: Mapping[str, str]
) -> Volumes:
    """The hypervolumes of a model's frontiers in two studies, and an interval of their difference.

    The interval is a percentile bootstrap (Efron 1979) with a fixed seed. It resamples prompts
    within each suite, the same draw for both studies where the prompts are the same. A frontier of
    noisy points reaches further than the true one, and more points increase this bias. The interval
    does not correct it. Its lower end takes the undecided samples of `before` at their best and
    those of `after` at their worst, its upper end the other way round.
    """
    sides = before.of(model), after.of(model)
    one, other = (frontier_hypervolume(own, objectives) for own in sides)
    points = len(distinct(sides[0])), len(distinct(sides[1]))
    seeds = _volumes_over_seeds(before, after, model, objectives)
    found = [
        _shares(own, objectives, side.evidence)
        for own, side in zip(sides, (before, after), strict=True)
    ]
    first, second = found
    if first is None or second is None:
        return Volumes(one, other, points=points, over_seeds=seeds)
    suites = {name: name.rpartition(".")[0] for name in objectives}
    paired = not any(suite in apart for suite in suites.values()) and all(
        first[name].ids == second[name].ids for name in objectives
    )
    rng, ways = np.random.default_rng(0), [direction(name) for name in objectives]

    def drawn_volume(own: Shares, drawn: Mapping[str, NDArray[np.int64]], best: bool) -> float:
        columns = [
            (own[name].best_NP if best else own[name].worst_NP)[:, drawn[suites[name]]].mean(axis=1)
            for name in objectives
        ]
        return hypervolume(np.column_stack(columns), ways)

    decided = all(
        np.array_equal(share.worst_NP, share.best_NP)
        for own in (first, second)
        for share in own.values()
    )
    least, most = np.empty(RESAMPLES), np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        before_drawn = {
            suite: rng.integers(size, size=size) for suite, size in _sizes(first, suites).items()
        }
        after_drawn = {
            suite: before_drawn[suite] if paired else rng.integers(size, size=size)
            for suite, size in _sizes(second, suites).items()
        }
        least[index] = drawn_volume(second, after_drawn, best=False) - drawn_volume(
            first, before_drawn, best=True
        )
        most[index] = (
            least[index]
            if decided
            else drawn_volume(second, after_drawn, best=True)
            - drawn_volume(first, before_drawn, best=False)
        )
    interval = float(np.quantile(least, 0.025)), float(np.quantile(most, 0.975))
    return Volumes(one, other, interval, paired, points, seeds)


def _volumes_over_seeds(
    before: Side, after: Side, model: str, objectives: Sequence[str]
) -> BetweenSeeds | None:
    """The difference of hypervolumes over training seeds: each seed has a frontier of its own."""
    one_S, other_S = (_volume_of_each_seed(side, model, objectives) for side in (before, after))
    if tuple(before.study.seeds) == tuple(after.study.seeds):
        gains = [other - one for one, other in zip(one_S, other_S, strict=False)]
        return over_paired_seeds(gains, gains)
    return over_separate_seeds(one_S, other_S)


def _volume_of_each_seed(side: Side, model: str, objectives: Sequence[str]) -> list[float]:
    """Empty where not every point has a value for every seed, as an adapter from outside."""
    own, count = side.of(model), len(side.study.seeds)
    values = [[result.metrics[name].seeds for name in objectives] for result in own]
    if any(len(seeds) != count for row in values for seeds in row):
        return []
    ways = [direction(name) for name in objectives]
    return [
        hypervolume(np.array([[seeds[place] for seeds in row] for row in values]), ways)
        for place in range(count)
    ]


@dataclass(frozen=True)
class _Share:
    """The ids of an objective's prompts, and the successes of each point on each prompt."""

    ids: tuple[str, ...]
    worst_NP: NDArray[np.float64]
    best_NP: NDArray[np.float64]


Shares = dict[str, _Share]


def _shares(own: Sequence[Result], objectives: Sequence[str], evidence: Evidence) -> Shares | None:
    """Objective -> its successes.

    None where samples are missing, or where points were measured on different prompts.
    """
    found: Shares = {}
    for name in objectives:
        suite, _, metric = name.rpartition(".")
        if metric not in SHARES:
            return None
        ids: tuple[str, ...] | None = None
        worst: list[list[float]] = []
        best: list[list[float]] = []
        for result in own:
            seeds = [
                {sample.id: sample for sample in samples}
                for samples in evidence.samples(result, suite).values()
            ]
            asked = {tuple(sorted(answers)) for answers in seeds}
            ids = next(iter(asked), ()) if ids is None else ids
            if asked != {ids} or not ids:
                return None
            for rows, undecided_as in (
                (worst, direction(name) == "minimise"),
                (best, direction(name) == "maximise"),
            ):
                rows.append(
                    [
                        sum(answers[item].counted(undecided_as) for answers in seeds) / len(seeds)
                        for item in ids
                    ]
                )
        found[name] = _Share(ids or (), np.array(worst), np.array(best))
    return found


def _sizes(shares: Shares, suites: Mapping[str, str]) -> dict[str, int]:
    return {suites[name]: len(share.ids) for name, share in shares.items()}
