"""Stage-aware search: each proposal is a new adapter, or a further mask of one that exists,
whichever promises most for its cost.

What it promises is the expected gain in hypervolume (ebbline.sweeps.search.gain) under a surrogate
(ebbline.sweeps.search.surrogate), averaged over the sizes, which have a frontier each; its cost is
the work that it adds. An adapter that exists costs a measurement; a new one costs its training too,
and is worth what several of its thresholds promise together, for the cost of training once and
measuring each.

`gp` is the same without the stages: every point costs the same, a knob is a number like any other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import ndtr

from ebbline.sweeps.dominance import distinct_front
from ebbline.sweeps.search.candidates import Adapters, Candidate
from ebbline.sweeps.search.features import Features
from ebbline.sweeps.search.gain import (
    Array,
    expected_gain,
    expected_joint_gains,
    gains_of,
    spread,
    undominated,
)
from ebbline.sweeps.search.knowledge import Knowledge
from ebbline.sweeps.search.samplers import chosen
from ebbline.sweeps.search.surrogate import FITTED_ON, KNOWS, Belief, believed, fit_at, fitted
from ebbline.sweeps.state.trials import REFUSAL_FLOOR, Entry
from ebbline.sweeps.study.points import Point, adapter_of
from ebbline.sweeps.study.space import drawn, space
from ebbline.sweeps.study.study import Study

SAMPLES, EVENLY = (
    16,
    128,
)  # joint draws of a new adapter's thresholds; points that their gain is counted over
BUNDLES, BUNDLED = (
    (2, 4, 6),
    8,
)  # thresholds of a new adapter that are looked at together; adapters that are looked at so
AT_ONCE = 16
LISTED, POOL = 4096, 256  # points of a space that `gp` writes out; candidates that it looks at
TIE, LEAST = 1e-9, 1e-6
NEAR = 0.05  # proposals that promise as much but for this share are as good: the seed decides
BELIEVED = 1e-4  # variance of what is in flight and counts as measured


@dataclass(frozen=True)
class Observations:
    """What was measured of the sizes that share a surrogate: rows of features, each metric's values
    and variances.
    """

    x_NF: Array
    y_NM: Array
    noise_NM: Array


class StageAware:
    """Keeps what asks have in common; what it proposes is a function of the entries, of what is
    known, and of k.

    A group is the sizes that share a surrogate: all with `transfer`, else each by itself.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self._by_stage = study.sampler == "stage_aware"
        self._features = Features(study, shares=self._by_stage)
        self._adapters = Adapters(study)
        self._metrics = len(study.objectives)
        self._floor = study.search.constraints.refusal_floor
        self._seen = 0
        self._open: dict[int, Entry] = {}
        self._done: dict[str, list[Entry]] = {model: [] for model in study.models}
        self._results: dict[
            str, list[Entry]
        ] = {}  # of each group: what other studies taught, then its own as they were told
        self._fits: dict[
            str, tuple[int, Observations]
        ] = {}  # of each group: what its lengths are fitted to, and after how many results
        self._held: dict[str, list[Entry]] = {
            model: [] for model in study.models
        }  # the frontiers, of what holds the constraints
        self._chosen: dict[str, tuple[int, list[Entry]]] = {}
        self._rows: dict[Point, Array] = {}
        self._kernels: dict[tuple[str, int, int], Any] = {}

    def propose(
        self, entries: Sequence[Entry], taught: Sequence[Entry], known: Knowledge, k: int
    ) -> tuple[Point | None, bool]:
        """(the point, whether there may be one later): a point and True, or None and whether what
        is in flight may open new ones.
        """
        self._follow(entries, taught, known)
        candidates = self._candidates(
            known, k, {entry.point for entry in entries} if not self._by_stage else set()
        )
        ceiling = self.study.search.constraints.gpu_hours
        if ceiling is not None:
            candidates = [
                each for each in candidates if known.work(each.point).whole <= ceiling * 3600
            ]
        if not candidates:
            return None, bool(self._open)
        worth_C = np.zeros(len(candidates))
        for model in self.study.models:
            own = [index for index, each in enumerate(candidates) if each.point.model == model]
            if own:
                worth_C[own] = self._worth(model, [candidates[index] for index in own], k)
        near = [
            candidates[index].point
            for index in np.flatnonzero(worth_C >= (1 - NEAR) * worth_C.max())
        ]
        rng = np.random.default_rng((self.study.search.seed, k))
        return near[int(rng.integers(len(near)))], True

    def amend(self, entry: Entry) -> None:
        """Go by what a point measured over more seeds."""
        model, group = entry.point.model, self._group(entry.point.model)
        if any(each.trial == entry.trial for each in self._done[model]):
            self._done[model] = [
                entry if each.trial == entry.trial else each for each in self._done[model]
            ]
            self._results[group] = [
                entry if each.trial == entry.trial else each for each in self._results[group]
            ]
            self._held[model] = self._undominated(
                [each for each in self._done[model] if each.feasible]
            )
            self._chosen.clear()

    def _follow(self, entries: Sequence[Entry], taught: Sequence[Entry], known: Knowledge) -> None:
        """Take in what was asked for, told and measured since the last time.

        Result by result, as if it had been asked after each: whether it was, or all are heard at
        once as a driver starts, is the same.
        """
        if not self._results:
            self._results = {self._group(model): [] for model in self.study.models}
            self._fits = {group: (0, self._told([])) for group in self._results}
            for entry in taught:
                if entry.point.model in self.study.models:
                    self._learn(entry)
        for k, entry in enumerate(entries[self._seen :], self._seen):
            if self._by_stage:
                self._adapters.asked(entry)
            self._open[k] = entry
        self._seen = len(entries)
        for k in [k for k in self._open if entries[k].state != "running"]:
            entry = entries[k]
            del self._open[k]
            if self._by_stage:
                promise = (
                    float(np.prod(gains_of(self.study, [entry.values])))
                    if entry.state == "done"
                    else 0.0
                )
                self._adapters.told(entry, promise, known)
            if entry.state == "done":
                self._done[entry.point.model].append(entry)
                if entry.feasible:
                    self._held[entry.point.model] = self._undominated(
                        [*self._held[entry.point.model], entry]
                    )
                self._learn(entry)
        if self._by_stage:
            self._adapters.look(known)

    def _learn(self, entry: Entry) -> None:
        """Add a result to what its group knows; its lengths are fitted to what is there now
        whenever that is due.
        """
        group = self._group(entry.point.model)
        results = self._results[group]
        results.append(entry)
        if fit_at(len(results)) == len(results):
            self._fits[group] = len(results), self._told(chosen(self.study, results, FITTED_ON))

    def _row(self, point: Point) -> Array:
        """The features of a point, kept once they are certain: a share that was guessed is guessed
        anew.
        """
        if point not in self._rows:
            share = self._adapters.share_of(point) if self._by_stage else 0.0
            row = self._features.row(point, share, sizes=self._shared)
            if self._by_stage and not self._adapters.knows(point):
                return row
            self._rows[point] = row
        return self._rows[point]

    def _candidates(self, known: Knowledge, k: int, asked: set[Point]) -> list[Candidate]:
        if self._by_stage:
            return self._adapters.further(known, k) + self._adapters.fresh(known, k, self._best())
        return [Candidate(point, 0.0, 1.0, point) for point in self._points(asked, k)]

    def _best(self) -> list[Point]:
        """The adapters on a frontier, of every size: their neighbours are worth a look."""
        return list(
            dict.fromkeys(adapter_of(entry.point) for held in self._held.values() for entry in held)
        )

    def _points(self, asked: set[Point], k: int) -> list[Point]:
        """What `gp` chooses among: the points of the space that were not asked for, or draws from
        it when they are too many.
        """
        rng = np.random.default_rng((self.study.search.seed, k))
        size = self.study.size
        if size is not None and size <= LISTED:
            left = [point for point in space(self.study) if point not in asked]
            kept = (
                rng.choice(len(left), POOL, replace=False) if len(left) > POOL else range(len(left))
            )
            return [left[index] for index in sorted(kept)]
        found: dict[Point, None] = {}
        near = [entry.point for held in self._held.values() for entry in held]
        models = list(self.study.models)
        for n in range(POOL):
            model = models[n % len(models)]
            axes = self.study.axes_of(model)
            values = {axis: drawn(rng, choices) for axis, choices in axes.items()}
            close = [point for point in near if point.model == model]
            if close and n % 4 == 3:
                axis = list(axes)[int(rng.integers(len(axes)))]
                values = {**dict(close[int(rng.integers(len(close)))].values), axis: values[axis]}
            point = Point.of(model, values)
            if point not in asked:
                found.setdefault(point)
        return list(found)

    def _worth(self, model: str, candidates: Sequence[Candidate], k: int) -> Array:
        """Expected gain for the cost of each candidate of one size."""
        rows_CF = np.array([self._features_of(candidate) for candidate in candidates])
        observations = self._observations(model)
        pending = [
            entry.point
            for entry in self._open.values()
            if entry.point.model == model or self._shared
        ]
        beliefs, believed_PM = [], []
        for metric in range(observations.y_NM.shape[1]):
            belief, liar_P = self._belief(model, metric, observations, pending, rows_CF)
            beliefs.append(belief)
            believed_PM.append(liar_P)
        mean_CM, sd_CM = (
            np.array([each.mean_C for each in beliefs]).T,
            np.array([each.sd_C for each in beliefs]).T,
        )
        of_size = [n for n, point in enumerate(pending) if point.model == model]
        lies_PM = np.stack(believed_PM, axis=1)[of_size][:, : self._metrics]
        boxes = undominated(np.concatenate([self._front(model), np.clip(lies_PM, 0.0, 1.0)]))
        holds_C = np.ones(len(candidates))
        if self._floor:
            holds_C = ndtr(-mean_CM[:, self._metrics] / sd_CM[:, self._metrics])
        objectives = slice(0, self._metrics)
        gain_C = expected_gain(mean_CM[:, objectives], sd_CM[:, objectives], boxes) * holds_C
        cost_C = np.maximum([candidate.cost for candidate in candidates], LEAST)
        worth_C: Array = (gain_C + TIE * sd_CM.mean(axis=1)) / cost_C
        groups = _groups(candidates)
        first = sorted(groups, key=lambda adapter: -max(worth_C[groups[adapter]]))[:BUNDLED]
        points_UM, volume = spread(boxes, EVENLY)
        for adapter in first:
            own = sorted(groups[adapter], key=lambda index: -worth_C[index])
            gain_B = self._together(beliefs, own, points_UM, volume, k) * float(holds_C[own].max())
            opened = candidates[own[0]]
            costs_B = [opened.cost + opened.measure * (len(own[:size]) - 1) for size in BUNDLES]
            worth_C[own[0]] = max(worth_C[own[0]], *(gain_B / np.array(costs_B)))
        return worth_C / len(self.study.models)

    def _together(
        self, beliefs: Sequence[Belief], own: Sequence[int], points_UM: Array, volume: float, k: int
    ) -> Array:
        """Expected gain of a new adapter's first so many thresholds together, for each of
        BUNDLES.
        """
        rng = np.random.default_rng((self.study.search.seed, k))
        samples = []
        for belief in beliefs[: self._metrics]:
            values, vectors = np.linalg.eigh(belief.covariance_CC[np.ix_(own, own)])
            root = vectors * np.sqrt(np.maximum(values, 0.0))
            samples.append(belief.mean_C[own] + rng.standard_normal((SAMPLES, len(own))) @ root.T)
        gains_C = expected_joint_gains(np.stack(samples, axis=2), points_UM, volume)
        return gains_C[[min(size, len(own)) - 1 for size in BUNDLES]]

    @cached_property
    def _shared(self) -> bool:
        return self.study.search.transfer and len(self.study.models) > 1

    def _features_of(self, candidate: Candidate) -> Array:
        return self._features.row(candidate.point, candidate.share, sizes=self._shared)

    def _group(self, model: str) -> str:
        return "" if self._shared else model

    def _undominated(self, entries: Sequence[Entry]) -> list[Entry]:
        gains_NM = gains_of(self.study, [entry.values for entry in entries])
        front = {tuple(row) for row in distinct_front(gains_NM)}
        return [
            entry for entry, gains in zip(entries, gains_NM, strict=True) if tuple(gains) in front
        ]

    def _observations(self, model: str) -> Observations:
        """Of many results, those chosen at the last multiple of AT_ONCE, and all that came
        since.
        """
        group = self._group(model)
        results = self._results[group]
        before = len(results) - len(results) % AT_ONCE if len(results) > KNOWS else 0
        if self._chosen.get(group, (None, []))[0] != before:
            self._chosen[group] = before, chosen(self.study, results[:before], KNOWS - AT_ONCE)
        return self._told([*self._chosen[group][1], *results[before:]])

    def _told(self, entries: Sequence[Entry]) -> Observations:
        width = self._metrics + self._floor
        x_NF = np.array([self._row(entry.point) for entry in entries])
        gains_NM = gains_of(self.study, [entry.values for entry in entries])
        noise_NM = np.array(
            [[*(error**2 for error in entry.errors or (0.0,) * self._metrics)] for entry in entries]
        ).reshape(-1, self._metrics)
        if self._floor:
            misses_N1 = np.array(
                [dict(entry.misses).get(REFUSAL_FLOOR, 0.0) for entry in entries]
            ).reshape(-1, 1)
            gains_NM, noise_NM = (
                np.hstack([gains_NM, misses_N1]),
                np.hstack([noise_NM, np.zeros_like(misses_N1)]),
            )
        return Observations(x_NF, gains_NM.reshape(-1, width), noise_NM.reshape(-1, width))

    def _belief(
        self,
        model: str,
        metric: int,
        observations: Observations,
        pending: Sequence[Point],
        rows_CF: Array,
    ) -> tuple[Belief, Array]:
        """What is believed of candidates, with the points in flight counted as measured; and what
        is believed of those.
        """
        kernel = self._kernel(model, metric, rows_CF.shape[1])
        x_NF, y_N, noise_N = (
            observations.x_NF.reshape(-1, rows_CF.shape[1]),
            observations.y_NM[:, metric],
            observations.noise_NM[:, metric],
        )
        if not pending:
            return believed(kernel, x_NF, y_N, noise_N, rows_CF), np.zeros(0)
        pending_PF = np.array([self._row(point) for point in pending])
        liar_P = believed(kernel, x_NF, y_N, noise_N, pending_PF).mean_C
        noise = np.concatenate([noise_N, np.full(len(pending), BELIEVED)])
        return believed(
            kernel,
            np.concatenate([x_NF, pending_PF]),
            np.concatenate([y_N, liar_P]),
            noise,
            rows_CF,
        ), liar_P

    def _kernel(self, model: str, metric: int, features: int) -> Any:
        group = self._group(model)
        at, fit = self._fits[group]
        key = (group, metric, at)
        if key not in self._kernels:
            self._kernels[key] = fitted(
                fit.x_NF.reshape(-1, features), fit.y_NM[:, metric], fit.noise_NM[:, metric]
            )
        return self._kernels[key]

    def _front(self, model: str) -> Array:
        return distinct_front(gains_of(self.study, [entry.values for entry in self._held[model]]))


def _groups(candidates: Sequence[Candidate]) -> Mapping[Point, list[int]]:
    """New adapters, each with the places of its candidates."""
    found: dict[Point, list[int]] = {}
    for index, candidate in enumerate(candidates):
        if candidate.fresh:
            found.setdefault(candidate.adapter, []).append(index)
    return found
