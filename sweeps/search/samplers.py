"""Optuna's own samplers: TPE, NSGA-II and random.

Each draws from an Optuna study in memory, which has the points that the sampler may see.

Invariant: a proposal is a function of these points and of its number. Only accepted proposals are
written to the database. TPE gets at most MAX_TPE_POINTS points, since its time grows with them: the
best by non-dominated rank, and a sample of the others.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import (
    BaseSampler,
    NSGAIISampler,
    PartialFixedSampler,
    RandomSampler,
    TPESampler,
)
from optuna.trial import TrialState, create_trial

from ebbline.sweeps.dominance import ranks
from ebbline.sweeps.search.gain import gains_of
from ebbline.sweeps.search.turns import whose_turn
from ebbline.sweeps.state.parameters import Names, plain
from ebbline.sweeps.state.trials import DIRECTIONS, Entry
from ebbline.sweeps.study.adapters.branches import ADAPTER, OwnAxes
from ebbline.sweeps.study.points import Point, Value
from ebbline.sweeps.study.space import written
from ebbline.sweeps.study.study import Study
from ebbline.tasks.defences.in_use import AXIS
from ebbline.tasks.measuring.metrics import direction

REDRAWS = 8
MAX_TPE_POINTS = 160
GENERATION, PARENTS = (
    NSGAIISampler._get_generation_key(),
    NSGAIISampler._get_parent_cache_key_prefix(),
)
Drawn = tuple[Point, Mapping[str, Any]]


class OptunaSampler:
    """Draws points that were not proposed before, by the study's sampler."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._shadow: Shadow | None = None  # NSGA-II only: its generations need all points

    def propose(
        self, entries: Sequence[Entry], taught: Sequence[Entry], proposed: set[Point], k: int
    ) -> Drawn | None:
        """A new point and the state that the sampler needs with it later.

        None when all of REDRAWS draws were in `proposed`.
        """
        shadow = self._shadow_of(entries, taught)
        fixed = shadow.balanced(entries)
        for redraw in range(REDRAWS):
            sampler = _sampler(
                self._study, self._study.search.seed * 1_000_003 + k * REDRAWS + redraw, fixed
            )
            found, drawn = shadow.draw(sampler)
            if found not in proposed:
                shadow.accept(k)
                return found, drawn
            shadow.discard()
        return None

    def amend(self) -> None:
        """Rebuild the study in memory, since the metrics of a finished point changed."""
        self._shadow = None

    def _shadow_of(self, entries: Sequence[Entry], taught: Sequence[Entry]) -> "Shadow":
        if self._study.sampler == "nsga2":
            self._shadow = self._shadow or Shadow(self._study)
            self._shadow.follow(entries)
            return self._shadow
        shadow = Shadow(self._study)
        if self._study.sampler == "tpe":
            shadow.follow([*chosen(self._study, [*taught, *entries], MAX_TPE_POINTS)])
        return shadow


class Shadow:
    """An Optuna study in memory with a trial for each entry, in the same order."""

    def __init__(self, study: Study) -> None:
        self._study, self._names = study, Names(study)
        self._optuna = optuna.create_study(
            directions=[DIRECTIONS[direction(name)] for name in study.objectives]
        )
        self._storage: Any = self._optuna._storage
        self._ids: list[int] = []  # trial ids, in the order of the entries
        self._open: dict[int, Entry] = {}
        self._drawn: optuna.Trial | None = None

    def follow(self, entries: Sequence[Entry]) -> None:
        """Add the proposals and results since the last call."""
        for k in [k for k in self._open if entries[k].state != "running"]:
            self._tell(self._ids[k], entries[k])
            del self._open[k]
        for k, entry in enumerate(entries[len(self._ids) :], len(self._ids)):
            self._add(k, entry)

    def _add(self, k: int, entry: Entry) -> None:
        if entry.state == "failed":
            trial = create_trial(
                state=TrialState.FAIL,
                system_attrs=self._generation(entry),
                **self._names.parameters(entry.point),
            )
        else:
            state = TrialState.COMPLETE if entry.state == "done" else TrialState.RUNNING
            trial = create_trial(
                state=state,
                values=list(entry.values) or None,
                system_attrs=self._generation(entry),
                constraints=dict(entry.misses),
                **self._names.parameters(entry.point),
            )
        self._ids.append(self._storage.create_new_trial(self._optuna._study_id, trial))
        if entry.state == "running":
            self._open[k] = entry
        if "parents" in entry.drawn:
            parents = [self._ids[parent] for parent in entry.drawn["parents"]]
            self._storage.set_study_system_attr(
                self._optuna._study_id, f"{PARENTS}{entry.drawn['generation']}", parents
            )

    def _tell(self, trial_id: int, entry: Entry) -> None:
        trial = optuna.Trial(self._optuna, trial_id)
        if entry.state == "failed":
            self._optuna.tell(trial, state=TrialState.FAIL)
            return
        for name, miss in entry.misses:
            trial.set_constraint(name, miss)
        self._optuna.tell(trial, list(entry.values))

    def draw(self, sampler: BaseSampler) -> Drawn:
        before = self._storage.get_study_system_attrs(self._optuna._study_id)
        self._optuna.sampler = sampler
        trial = self._drawn = self._optuna.ask()
        name, models = self._names.model()
        model = str(plain(_suggest(trial, name, models)))
        axes, values = self._branch(trial, model)
        for axis in axes:
            if axis not in values:
                values[axis] = written(
                    plain(_suggest(trial, *self._names.axis(model, axis))), axes[axis]
                )
        drawn: dict[str, Any] = {}
        generation = self._storage.get_trial_system_attrs(trial._trial_id).get(GENERATION)
        if generation is not None:
            drawn["generation"] = generation
            after = self._storage.get_study_system_attrs(self._optuna._study_id)
            if f"{PARENTS}{generation}" in after.keys() - before.keys():
                drawn["parents"] = [
                    self._ids.index(trial_id) for trial_id in after[f"{PARENTS}{generation}"]
                ]
        return Point.of(model, values), drawn

    def _branch(self, trial: optuna.Trial, model: str) -> tuple[OwnAxes, dict[str, Value]]:
        """The axes of the branch that the sampler draws, and the value that decides it."""
        branches = self._study.branches_of(model)
        decided: dict[str, Value] = {}
        if self._names.is_branched(model):
            name = plain(_suggest(trial, *self._names.axis(model, ADAPTER)))
            branches = tuple(
                each for each in branches if (ADAPTER in each.axes) == (name is not None)
            )
            decided = {} if name is None else {ADAPTER: name}
        if self._study.defences:
            decided[AXIS] = plain(_suggest(trial, *self._names.axis(model, AXIS)))
            branches = tuple(each for each in branches if each.defence.name == decided[AXIS])
        return branches[0].axes, decided

    def balanced(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """The parameter `defence` with the defence whose turn it is, so that each gets as many
        points; empty in a study that names none.
        """
        turn = whose_turn(self._study, [entry.point for entry in entries])
        if turn is None:
            return {}
        names = {self._names.axis(model, AXIS)[0] for model in self._study.models}
        return {name: json.dumps(turn) for name in names}

    def accept(self, k: int) -> None:
        """Use the last drawn trial as that of entry k."""
        if self._drawn is not None and k == len(self._ids):
            self._ids.append(self._drawn._trial_id)
            self._open[k] = Entry(k, Point("", ()))

    def discard(self) -> None:
        if self._drawn is not None:
            self._optuna.tell(self._drawn, state=TrialState.FAIL)

    def _generation(self, entry: Entry) -> dict[str, Any]:
        """NSGA-II keeps generations in its trials; a point it did not draw has generation 0."""
        return (
            {GENERATION: entry.drawn.get("generation", 0)} if self._study.sampler == "nsga2" else {}
        )


def chosen(study: Study, entries: Sequence[Entry], most: int) -> list[Entry]:
    """At most `most` entries: all running ones, and of the others half by non-dominated rank and
    half by an even sample.
    """
    if len(entries) <= most:
        return list(entries)
    running = [index for index, entry in enumerate(entries) if entry.state == "running"]
    done = [index for index, entry in enumerate(entries) if entry.state == "done"]
    room = max(2, most - len(running))
    ranks = ranks_of(study, [entries[index] for index in done])
    order = np.argsort(ranks, kind="stable")
    best, others = np.array(done)[order[: room // 2]], np.array(done)[order[room // 2 :]]
    # An even sample by Knuth's multiplicative hash
    others = others[np.argsort((others * 2654435761) % 2**32, kind="stable")]
    return [
        entries[index]
        for index in sorted({*running, *best.tolist(), *others[: room - len(best)].tolist()})
    ]


def ranks_of(study: Study, entries: Sequence[Entry]) -> Any:
    """The non-dominated rank of each finished entry as (N,), from 0.

    Entries that miss a constraint rank after all others.
    """
    if not entries:
        return np.zeros(0, dtype=np.int64)
    gains_NM = gains_of(study, [entry.values for entry in entries])
    return ranks(gains_NM) + np.array([0 if entry.feasible else len(entries) for entry in entries])


def _suggest(trial: optuna.Trial, name: str, distribution: Any) -> Any:
    match distribution:
        case CategoricalDistribution():
            return trial.suggest_categorical(name, distribution.choices)
        case IntDistribution():
            return trial.suggest_int(
                name,
                distribution.low,
                distribution.high,
                step=distribution.step,
                log=distribution.log,
            )
        case FloatDistribution():
            return trial.suggest_float(
                name,
                distribution.low,
                distribution.high,
                step=distribution.step,
                log=distribution.log,
            )
    raise TypeError(f"{name} has the distribution {distribution!r}")


def _sampler(study: Study, seed: int, fixed: Mapping[str, Any]) -> BaseSampler:
    """The study's sampler; parameters that are `fixed` have that value."""
    with warnings.catch_warnings():
        # An asynchronous search needs constant_liar, which is experimental, as PartialFixedSampler
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = _own_sampler(study, seed)
        return PartialFixedSampler(dict(fixed), sampler) if fixed else sampler


def _own_sampler(study: Study, seed: int) -> BaseSampler:
    match study.sampler:
        case "tpe":
            startup = max(4, min(10, (study.search.points or 20) // 3))
            return TPESampler(seed=seed, constant_liar=True, n_startup_trials=startup)
        case "nsga2":
            return NSGAIISampler(seed=seed)
        case _:
            return RandomSampler(seed=seed)
