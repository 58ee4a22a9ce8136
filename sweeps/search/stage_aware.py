"""Stage-aware search: each proposal is a new adapter, or a further mask of an existing one,
whichever has the larger expected gain for its cost.

The gain is the expected gain in hypervolume (ebbline.sweeps.search.gain) under a surrogate
(ebbline.sweeps.search.surrogate), averaged over the models, each of which has its own frontier. The
cost is the work that the proposal adds. A further mask costs an evaluation. A new adapter costs its
training too; its gain is that of several thresholds together, for one training and one evaluation
each.

The sampler `gp` ignores stages: all points cost the same, and a knob is a feature as it is.
"""

from collections import Counter
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
from ebbline.sweeps.search.surrogate import (
    MAX_FITTED,
    MAX_RESULTS,
    Prediction,
    fit_at,
    fitted,
)
from ebbline.sweeps.search.turns import fewest
from ebbline.sweeps.state.trials import REFUSAL_FLOOR, Entry
from ebbline.sweeps.study.points import Point, adapter_of, defence_of, is_of
from ebbline.sweeps.study.space import drawn, space
from ebbline.sweeps.study.study import Study

JOINT_SAMPLES, GAIN_POINTS = 16, 128  # for the joint gain of a new adapter's thresholds
GROUP_SIZES = (2, 4, 6)  # numbers of thresholds whose joint gain is computed
JOINT_ADAPTERS = 8  # new adapters whose joint gain is computed
SELECT_EVERY = 16  # results after which the surrogate's results are selected anew
LISTED, POOL = 4096, 256  # a larger space is not listed for `gp`; candidates for `gp`
TIE, LEAST_COST = 1e-9, 1e-6
NEAR_BEST = 0.05  # candidates whose gain is within this share of the best; the seed picks one
IN_FLIGHT_VARIANCE = 1e-4  # noise of the values assumed for points in flight


@dataclass(frozen=True)
class Observations:
    """The results that a surrogate is trained on: N rows of F features, and for each of M metrics
    the values and noise variances.
    """

    x_NF: Array
    y_NM: Array
    noise_NM: Array


class StageAware:
    """Keeps state between proposals only to save time: a proposal is a function of the entries,
    the knowledge, and k.

    A *group* is the models that share a surrogate: all with `transfer`, else each one alone.
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
        # By group, the results of other studies, then the own ones in the order of recording
        self._results: dict[str, list[Entry]] = {}
        # By group, the results that the kernel is fitted to, and their number at that time
        self._fits: dict[str, tuple[int, Observations]] = {}
        # By model, the frontier of the feasible results
        self._fronts: dict[str, list[Entry]] = {model: [] for model in study.models}
        self._chosen: dict[str, tuple[int, list[Entry]]] = {}
        self._rows: dict[Point, Array] = {}
        self._kernels: dict[tuple[str, int, int], Any] = {}

    def propose(
        self, entries: Sequence[Entry], taught: Sequence[Entry], knowledge: Knowledge, k: int
    ) -> tuple[Point | None, bool]:
        """(point, True), or (None, whether a result of a point in flight may allow a proposal)."""
        self._follow(entries, taught, knowledge)
        candidates = self._candidates(
            knowledge, k, {entry.point for entry in entries} if not self._by_stage else set()
        )
        ceiling = self.study.search.constraints.gpu_hours
        if ceiling is not None:
            candidates = [
                each for each in candidates if knowledge.work(each.point).whole <= ceiling * 3600
            ]
        if not candidates:
            return None, bool(self._open)
        candidates = self._in_turn(candidates, entries)
        worth_C = np.zeros(len(candidates))
        for model in self.study.models:
            own = [index for index, each in enumerate(candidates) if each.point.model == model]
            if own:
                worth_C[own] = self._worth(model, [candidates[index] for index in own], k)
        near = [
            candidates[index].point
            for index in np.flatnonzero(worth_C >= (1 - NEAR_BEST) * worth_C.max())
        ]
        rng = np.random.default_rng((self.study.search.seed, k))
        return near[int(rng.integers(len(near)))], True

    def _in_turn(self, candidates: list[Candidate], entries: Sequence[Entry]) -> list[Candidate]:
        """The candidates of the defence with the fewest points, so that each has as many. Each
        point has a mask of its own, so these are distinct adapters.
        """
        if not self.study.defences:
            return candidates
        counts = Counter(defence_of(entry.point).name for entry in entries)
        left = {defence_of(each.point).name for each in candidates}
        ordered = [each.name for each in self.study.used_defences if each.name in left]
        turn = fewest(ordered, counts)
        return [each for each in candidates if defence_of(each.point).name == turn]

    def amend(self, entry: Entry) -> None:
        """Replace the entry of a completed point."""
        model, group = entry.point.model, self._group(entry.point.model)
        if any(each.trial == entry.trial for each in self._done[model]):
            self._done[model] = [
                entry if each.trial == entry.trial else each for each in self._done[model]
            ]
            self._results[group] = [
                entry if each.trial == entry.trial else each for each in self._results[group]
            ]
            self._fronts[model] = self._undominated(
                [each for each in self._done[model] if each.feasible]
            )
            self._chosen.clear()

    def _follow(
        self, entries: Sequence[Entry], taught: Sequence[Entry], knowledge: Knowledge
    ) -> None:
        """Process the proposals, results and measurements since the last call.

        Results are processed one by one. So the state is the same after a restart, when all come at
        once.
        """
        if not self._results:
            self._results = {self._group(model): [] for model in self.study.models}
            self._fits = {group: (0, self._observed([])) for group in self._results}
            for entry in taught:
                if entry.point.model in self.study.models:
                    self._learn(entry)
        for k, entry in enumerate(entries[self._seen :], self._seen):
            if self._by_stage:
                self._adapters.add(entry)
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
                self._adapters.complete(entry, promise, knowledge)
            if entry.state == "done":
                self._done[entry.point.model].append(entry)
                if entry.feasible:
                    self._fronts[entry.point.model] = self._undominated(
                        [*self._fronts[entry.point.model], entry]
                    )
                self._learn(entry)
        if self._by_stage:
            self._adapters.read_measured(knowledge)

    def _learn(self, entry: Entry) -> None:
        """Add a result to its group, and select the results for a new fit when one is due."""
        group = self._group(entry.point.model)
        results = self._results[group]
        results.append(entry)
        if fit_at(len(results)) == len(results):
            self._fits[group] = (
                len(results),
                self._observed(chosen(self.study, results, MAX_FITTED)),
            )

    def _row(self, point: Point) -> Array:
        """The features of a point as (F,), cached once its share of modules is exact."""
        if point not in self._rows:
            share = self._adapters.share_of(point) if self._by_stage else 0.0
            row = self._features.row(point, share, sizes=self._shared)
            if self._by_stage and not self._adapters.is_measured(point):
                return row
            self._rows[point] = row
        return self._rows[point]

    def _candidates(self, knowledge: Knowledge, k: int, proposed: set[Point]) -> list[Candidate]:
        if self._by_stage:
            further = self._adapters.further(knowledge, k)
            return further + self._adapters.fresh(knowledge, k, self._best())
        return [Candidate(point, 0.0, 1.0, point) for point in self._points(proposed, k)]

    def _best(self) -> list[Point]:
        """The adapters on the frontiers of all models, without duplicates."""
        return list(
            dict.fromkeys(
                adapter_of(entry.point) for front in self._fronts.values() for entry in front
            )
        )

    def _points(self, proposed: set[Point], k: int) -> list[Point]:
        """The candidates of `gp`: at most POOL points of the space that are not in `proposed`."""
        rng = np.random.default_rng((self.study.search.seed, k))
        size = self.study.size
        if size is not None and size <= LISTED:
            left = [point for point in space(self.study) if point not in proposed]
            kept = (
                rng.choice(len(left), POOL, replace=False) if len(left) > POOL else range(len(left))
            )
            return [left[index] for index in sorted(kept)]
        found: dict[Point, None] = {}
        near = [entry.point for front in self._fronts.values() for entry in front]
        branches = self.study.branches
        for n in range(POOL):
            branch = branches[n % len(branches)]
            model, axes = branch.model, branch.axes
            values = {axis: drawn(rng, choices) for axis, choices in axes.items()}
            close = [point for point in near if is_of(point, branch)]
            if close and n % 4 == 3:
                axis = list(axes)[int(rng.integers(len(axes)))]
                values = {**dict(close[int(rng.integers(len(close)))].values), axis: values[axis]}
            point = Point.of(model, values)
            if point not in proposed:
                found.setdefault(point)
        return list(found)

    def _worth(self, model: str, candidates: Sequence[Candidate], k: int) -> Array:
        """The expected gain for its cost of each candidate of one model, as (C,)."""
        rows_CF = np.array([self._features_of(candidate) for candidate in candidates])
        observations = self._observations(model)
        pending = [
            entry.point
            for entry in self._open.values()
            if entry.point.model == model or self._shared
        ]
        predictions, believed_PM = [], []
        for metric in range(observations.y_NM.shape[1]):
            prediction, mean_P = self._prediction(
                model, metric, observations, pending, rows_CF.shape[1]
            )
            predictions.append(prediction)
            believed_PM.append(mean_P)
        apart = [prediction.apart(rows_CF) for prediction in predictions]
        mean_CM, sd_CM = (
            np.stack([mean_C for mean_C, _ in apart], axis=1),
            np.stack([sd_C for _, sd_C in apart], axis=1),
        )
        of_model = [n for n, point in enumerate(pending) if point.model == model]
        assumed_PM = np.stack(believed_PM, axis=1)[of_model][:, : self._metrics]
        boxes = undominated(np.concatenate([self._front(model), np.clip(assumed_PM, 0.0, 1.0)]))
        holds_C = np.ones(len(candidates))
        if self._floor:
            holds_C = ndtr(-mean_CM[:, self._metrics] / sd_CM[:, self._metrics])
        objectives = slice(0, self._metrics)
        gain_C = expected_gain(mean_CM[:, objectives], sd_CM[:, objectives], boxes) * holds_C
        cost_C = np.maximum([candidate.cost for candidate in candidates], LEAST_COST)
        worth_C: Array = (gain_C + TIE * sd_CM.mean(axis=1)) / cost_C
        groups = _groups(candidates)
        first = sorted(groups, key=lambda adapter: -max(worth_C[groups[adapter]]))[:JOINT_ADAPTERS]
        points_UM, volume = spread(boxes, GAIN_POINTS)
        for adapter in first:
            own = sorted(groups[adapter], key=lambda index: -worth_C[index])
            gain_G = self._joint_gain(predictions, rows_CF[own], points_UM, volume, k) * float(
                holds_C[own].max()
            )
            best = candidates[own[0]]
            cost_G = [best.cost + best.evaluate * (len(own[:size]) - 1) for size in GROUP_SIZES]
            worth_C[own[0]] = max(worth_C[own[0]], *(gain_G / np.array(cost_G)))
        return worth_C / len(self.study.models)

    def _joint_gain(
        self,
        predictions: Sequence[Prediction],
        rows_CF: Array,
        points_UM: Array,
        volume: float,
        k: int,
    ) -> Array:
        """The joint expected gain of the first of these candidates, for each of GROUP_SIZES."""
        rng = np.random.default_rng((self.study.search.seed, k))
        samples = []
        for prediction in predictions[: self._metrics]:
            belief = prediction.jointly(rows_CF)
            values, vectors = np.linalg.eigh(belief.covariance_CC)
            root = vectors * np.sqrt(np.maximum(values, 0.0))
            samples.append(
                belief.mean_C + rng.standard_normal((JOINT_SAMPLES, len(rows_CF))) @ root.T
            )
        gains_C = expected_joint_gains(np.stack(samples, axis=2), points_UM, volume)
        return gains_C[[min(size, len(rows_CF)) - 1 for size in GROUP_SIZES]]

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
        """The results for predictions.

        Of more than MAX_RESULTS, some were selected at the last multiple of SELECT_EVERY; all later
        results are added.
        """
        group = self._group(model)
        results = self._results[group]
        before = len(results) - len(results) % SELECT_EVERY if len(results) > MAX_RESULTS else 0
        if self._chosen.get(group, (None, []))[0] != before:
            most = MAX_RESULTS - SELECT_EVERY
            self._chosen[group] = before, chosen(self.study, results[:before], most)
        return self._observed([*self._chosen[group][1], *results[before:]])

    def _observed(self, entries: Sequence[Entry]) -> Observations:
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

    def _prediction(
        self,
        model: str,
        metric: int,
        observations: Observations,
        pending: Sequence[Point],
        features: int,
    ) -> tuple[Prediction, Array]:
        """The prediction of a metric, and its means for the points in flight as (P,).

        Points in flight count as measured with their predicted means.
        """
        kernel = self._kernel(model, metric, features)
        x_NF, y_N, noise_N = (
            observations.x_NF.reshape(-1, features),
            observations.y_NM[:, metric],
            observations.noise_NM[:, metric],
        )
        measured = Prediction(kernel, x_NF, y_N, noise_N)
        if not pending:
            return measured, np.zeros(0)
        pending_PF = np.array([self._row(point) for point in pending])
        mean_P, _ = measured.apart(pending_PF)
        return Prediction(
            kernel,
            np.concatenate([x_NF, pending_PF]),
            np.concatenate([y_N, mean_P]),
            np.concatenate([noise_N, np.full(len(pending), IN_FLIGHT_VARIANCE)]),
        ), mean_P

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
        return distinct_front(gains_of(self.study, [entry.values for entry in self._fronts[model]]))


def _groups(candidates: Sequence[Candidate]) -> Mapping[Point, list[int]]:
    """New adapters, each with the indices of its candidates."""
    found: dict[Point, list[int]] = {}
    for index, candidate in enumerate(candidates):
        if candidate.fresh:
            found.setdefault(candidate.adapter, []).append(index)
    return found
