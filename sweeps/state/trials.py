"""A study's points in its database, kept by Optuna: the only record of points and their states.

The database is read once, when it is opened. Afterwards its only driver keeps the list and writes
each change to the database first. A trial is written with all its parameters at once, so a killed
driver leaves no partial trial. The number of a point is its place among the trials that are points.
Optuna's trial number differs: it also counts closed partial trials and trials from other studies
(see ebbline.sweeps.search.warm_start).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from ebbline.sweeps.state.parameters import Names, is_whole, point_of
from ebbline.sweeps.state.retried import RETRIES, latest, takes_a_place
from ebbline.sweeps.state.trial_rows import TrialRows
from ebbline.sweeps.study.changes import lasting
from ebbline.sweeps.study.database import PointDatabase
from ebbline.sweeps.study.points import Point, current_reason
from ebbline.sweeps.study.study import Study
from ebbline.tasks.errors import StudyError
from ebbline.tasks.identity import digest
from ebbline.tasks.measuring.metrics import direction

optuna.logging.set_verbosity(optuna.logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)
REASON, GAVE_UP, LOST, NOT_A_POINT = (
    "reason",
    "gave_up",
    "lost",
    "not_a_point",
)  # study attributes of one trial, with its number
SETTINGS, EXHAUSTED, WARMED, REVISED = (
    "settings",
    "exhausted",
    "warmed",
    "revised",
)  # study attributes
ERRORS, TAUGHT_BY, DRAWN = "standard_errors", "taught_by", "drawn"  # trial attributes
REFUSAL_FLOOR, GPU_HOURS = "refusal_floor", "gpu_hours"  # names of constraints in Optuna
State = Literal["running", "done", "failed"]
_STATES: Mapping[TrialState, State] = {
    TrialState.COMPLETE: "done",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}
DIRECTIONS = {
    "maximise": optuna.study.StudyDirection.MAXIMIZE,
    "minimise": optuna.study.StudyDirection.MINIMIZE,
}


_NOT_DRAWN: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Entry:
    """A proposed point: its measured objectives (means over seeds), their standard errors, and by
    how much it misses each constraint (at most 0 when it holds). `trial` is Optuna's trial number.

    `max_seeds` is the number of seeds that it can have after a further seed failed. `reason` says
    why the seed or the point failed, `lost` why a finished point could not be measured again.
    """

    trial: int
    point: Point
    state: State = "running"
    values: tuple[float, ...] = ()
    errors: tuple[float, ...] = ()
    misses: tuple[tuple[str, float], ...] = ()
    reason: str = ""
    drawn: Mapping[str, Any] = field(
        default_factory=lambda: _NOT_DRAWN
    )  # what its sampler needs to replay the draw (see ebbline.sweeps.search.samplers)
    max_seeds: int | None = None
    lost: str = ""
    retried: int | None = None

    @property
    def place(self) -> int:
        """Optuna's number of the trial that gives the point its number, also after a retry."""
        return self.trial if self.retried is None else self.retried

    @property
    def feasible(self) -> bool:
        return not self.misses or all(miss <= 0 for _, miss in self.misses)


class Trials:
    """The points of one study in the order of proposals; `taught` are points of other studies."""

    def __init__(self, study: Study, database: PointDatabase, begun_as: str = "") -> None:
        self.study, self._begun_as = study, begun_as
        self._storage = opened(database)
        self._optuna = optuna.create_study(
            storage=self._storage,
            study_name=database.name,
            directions=[DIRECTIONS[direction(name)] for name in study.objectives],
            load_if_exists=True,
            sampler=optuna.samplers.RandomSampler(),  # unused: points are written whole
        )
        if database.shared:
            self._same_settings(database)
        rows = TrialRows(self._storage, self._optuna._study_id)
        found = rows.look()
        self.names = Names(study, found)
        self._written = len(found)
        self._close_non_points(found)
        found, marks = rows.look(), self._optuna.user_attrs
        self.entries = entries_of(found, marks)
        self.taught = [_entry(trial, marks) for trial in found if TAUGHT_BY in trial.user_attrs]

    def add(self, point: Point, drawn: Mapping[str, Any] | None = None) -> int:
        """Write a new point; return its number."""
        attributes = {DRAWN: dict(drawn)} if drawn else {}
        number = self._write(
            create_trial(
                state=TrialState.RUNNING, user_attrs=attributes, **self.names.parameters(point)
            )
        )
        self.entries.append(Entry(number, point, drawn=drawn or _NOT_DRAWN))
        return len(self.entries) - 1

    def finish(
        self,
        number: int,
        values: Sequence[float],
        errors: Sequence[float],
        misses: Mapping[str, float],
    ) -> Entry:
        """Write the measurements of a point."""
        entry = self.entries[number]
        # Through the storage: `tell` of Optuna's study reads the trial three times
        id = self._id(entry.trial)
        self._storage.set_trial_user_attr(id, ERRORS, list(errors))
        if misses:
            trial = optuna.trial.Trial(self._optuna, id)
            for name, miss in misses.items():
                # A driver that was killed here may have written some constraints.
                if name not in trial.constraints:
                    trial.set_constraint(name, miss)
        self._storage.set_trial_state_values(id, TrialState.COMPLETE, list(values))
        done = replace(
            entry,
            state="done",
            values=tuple(values),
            errors=tuple(errors),
            misses=tuple(sorted(misses.items())),
        )
        self.entries[number] = done
        return done

    def amend(
        self,
        number: int,
        values: Sequence[float],
        errors: Sequence[float],
        misses: Mapping[str, float],
    ) -> Entry:
        """Update the measurements of a finished point, for more seeds or changed constraints.

        Nothing is written: a later driver recomputes them from the store.
        """
        amended = replace(
            self.entries[number],
            values=tuple(values),
            errors=tuple(errors),
            misses=tuple(sorted(misses.items())),
        )
        self.entries[number] = amended
        return amended

    def fail(self, number: int, reason: str) -> Entry:
        """Write that a point has no objectives. A trial that stays RUNNING makes samplers avoid its
        neighbourhood.
        """
        entry = self.entries[number]
        self._optuna.set_user_attr(f"{REASON}:{entry.trial}", reason)
        self._optuna.tell(entry.trial, state=TrialState.FAIL)
        self.entries[number] = replace(entry, state="failed", reason=reason)
        return self.entries[number]

    def give_up(self, number: int, most: int, reason: str) -> None:
        """Write that a point can have at most `most` seeds, because a further one failed."""
        entry = self.entries[number]
        self._optuna.set_user_attr(f"{GAVE_UP}:{entry.trial}", {"most": most, "reason": reason})
        self.entries[number] = replace(entry, max_seeds=most, reason=reason)

    def lose(self, number: int, reason: str) -> None:
        """Write why a finished point could not be measured again, or with "" that it was."""
        entry = self.entries[number]
        if entry.lost != reason:
            self._optuna.set_user_attr(f"{LOST}:{entry.trial}", reason)
            self.entries[number] = replace(entry, lost=reason)

    def retry(self, number: int) -> None:
        """Write that a failed point, or a further seed of a finished one, is tried again."""
        entry = self.entries[number]
        self.lose(number, "")
        if entry.max_seeds is not None:
            self._optuna.set_user_attr(f"{GAVE_UP}:{entry.trial}", {})
            self.entries[number] = replace(self.entries[number], max_seeds=None, reason="")
        if entry.state == "failed":
            attributes = {
                RETRIES: entry.place,
                **({DRAWN: dict(entry.drawn)} if entry.drawn else {}),
            }
            trial = self._write(
                create_trial(
                    state=TrialState.RUNNING,
                    user_attrs=attributes,
                    **self.names.parameters(entry.point),
                )
            )
            self.entries[number] = Entry(trial, entry.point, drawn=entry.drawn, retried=entry.place)

    @property
    def revised(self) -> bool:
        """Whether the study was revised, so that stored values may be of other measurements."""
        return bool(self._optuna.user_attrs.get(REVISED, False))

    def revise(self) -> None:
        self._optuna.set_user_attr(REVISED, True)

    def teach(self, name: str, found: Sequence[Entry]) -> None:
        """Write the measurements of another study, once: a second warm start adds nothing."""
        if name in self._optuna.user_attrs.get(WARMED, []):
            return
        present = {entry.point for entry in self.taught}
        for entry in found:
            if entry.point not in present:
                trial = create_trial(
                    state=TrialState.COMPLETE,
                    values=list(entry.values),
                    user_attrs={ERRORS: list(entry.errors), TAUGHT_BY: name},
                    constraints=dict(entry.misses),
                    **self.names.parameters(entry.point),
                )
                self.taught.append(replace(entry, trial=self._write(trial)))
        self._optuna.set_user_attr(WARMED, [*self._optuna.user_attrs.get(WARMED, []), name])

    def exhaust(self) -> None:
        """Write that no point is left to propose for the present axes, seeds and sampler."""
        self._optuna.set_user_attr(EXHAUSTED, _exhausted(self.study, len(self.entries)))

    def _write(self, trial: FrozenTrial) -> int:
        """Optuna's number of a new trial; only the driver that holds the study adds trials."""
        # Not through Optuna's study, which would keep every trial in memory
        self._storage.create_new_trial(self._optuna._study_id, template_trial=trial)
        self._written += 1
        return self._written - 1

    def _id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._optuna._study_id, number)

    def _same_settings(self, database: PointDatabase) -> None:
        """Raise StudyError when another home began the study in a shared database with other
        settings.
        """
        own = digest(lasting(self.study.model_dump(mode="json")))
        before = self._optuna.user_attrs.get(SETTINGS)
        if before is None or before == self._begun_as:
            self._optuna.set_user_attr(SETTINGS, own)
        elif before != own:
            raise StudyError(
                f"a study named {self.study.study!r} was begun in the shared database, as "
                f"{database.name!r}, with other settings;"
                " give this one another name (`study: ...`)"
            )

    def _close_non_points(self, found: Sequence[FrozenTrial]) -> None:
        """Close the running trials that are no points: marked but not closed, incomplete, or a
        duplicate of an earlier one.
        """
        if not any(trial.state == TrialState.RUNNING for trial in found):
            return
        marks = self._optuna.user_attrs
        for trial in found:
            if trial.state == TrialState.RUNNING and f"{NOT_A_POINT}:{trial.number}" in marks:
                self._optuna.tell(trial.number, state=TrialState.FAIL)
        seen: set[Point] = set()
        for trial in own_trials(found, marks):
            whole = is_whole(trial, self.study)
            if trial.state == TrialState.RUNNING and (not whole or point_of(trial) in seen):
                self._optuna.set_user_attr(
                    f"{NOT_A_POINT}:{trial.number}",
                    "duplicate of an earlier point" if whole else "incomplete",
                )
                self._optuna.tell(trial.number, state=TrialState.FAIL)
            elif whole:
                seen.add(point_of(trial))


def own_trials(trials: Sequence[FrozenTrial], marks: Mapping[str, Any]) -> list[FrozenTrial]:
    """The trials that are points of the study, without marked trials, those of other studies, and
    those of a retry.
    """
    return [
        trial
        for trial in trials
        if trial.state != TrialState.WAITING
        and f"{NOT_A_POINT}:{trial.number}" not in marks
        and TAUGHT_BY not in trial.user_attrs
        and not takes_a_place(trial)
    ]


def entries_of(trials: Sequence[FrozenTrial], marks: Mapping[str, Any]) -> list[Entry]:
    """The points of a study in the order of proposals, with the state of their last try."""
    last = latest(trials)
    found = []
    for trial in own_trials(trials, marks):
        entry = _entry(last.get(trial.number, trial), marks)
        retried = trial.number if trial.number in last else None
        found.append(replace(entry, retried=retried))
    return found


def _entry(trial: FrozenTrial, marks: Mapping[str, Any]) -> Entry:
    gave_up = marks.get(f"{GAVE_UP}:{trial.number}", {})
    return Entry(
        trial.number,
        point_of(trial),
        _STATES[trial.state],
        tuple(trial.values or ()),
        tuple(trial.user_attrs.get(ERRORS, ())),
        tuple(sorted(trial.constraints.items())),
        current_reason(str(marks.get(f"{REASON}:{trial.number}", gave_up.get("reason", "")))),
        trial.user_attrs.get(DRAWN, _NOT_DRAWN),
        gave_up.get("most"),
        current_reason(str(marks.get(f"{LOST}:{trial.number}", ""))),
    )


@contextmanager
def reaching(database: PointDatabase) -> Iterator[None]:
    """Turn database errors under Optuna into those of `PointDatabase.unusable`."""
    try:
        with database.explained():
            yield
    except optuna.exceptions.StorageInternalError as error:
        raise database.unusable(error.__cause__ or error) from error


def caching(database: PointDatabase) -> optuna.storages.BaseStorage:
    """The storage for a reader that asks Optuna for the same trials again and again."""
    return optuna.storages.get_storage(opened(database))


def opened(database: PointDatabase) -> optuna.storages.RDBStorage:
    read_only = database.read_only
    if not read_only:
        database.make_folder()
    return optuna.storages.RDBStorage(
        database.url,
        database.settings,
        skip_compatibility_check=read_only,
        skip_table_creation=read_only,
    )


class Reader:
    """Reads a study's points repeatedly; ended points are read from the database once."""

    def __init__(self, study: Study, database: PointDatabase) -> None:
        self._study, self._database = study, database
        self._found: tuple[optuna.Study, TrialRows] | None = None

    def look(self) -> tuple[list[Entry], bool]:
        """All proposed points, and whether no point is left to propose. Empty before the first
        driver, which makes the database.
        """
        if self._found is None and not self._database.exists:
            return [], False
        with reaching(self._database):
            if self._found is None:
                try:
                    storage = opened(self._database)
                    study = optuna.load_study(study_name=self._database.name, storage=storage)
                    self._found = study, TrialRows(storage, study._study_id)
                except KeyError:
                    return [], False
            marks = self._found[0].user_attrs
            trials = self._found[1].look()
            whole = {trial.number for trial in trials if is_whole(trial, self._study)}
            entries = [each for each in entries_of(trials, marks) if each.place in whole]
            return entries, marks.get(EXHAUSTED) == _exhausted(self._study, len(entries))


def read(study: Study, database: PointDatabase) -> tuple[list[Entry], bool]:
    """The same as Reader.look, for a single read."""
    return Reader(study, database).look()


def settings_mark(database: PointDatabase) -> str | None:
    """The digest of a study's settings in the database (see StudyView.begun_as); None when there is
    none, as in an SQLite file.
    """
    if not database.exists:
        return None
    with reaching(database):
        try:
            found = optuna.load_study(study_name=database.name, storage=opened(database))
        except KeyError:
            return None
        mark: str | None = found.user_attrs.get(SETTINGS)
        return mark


def _exhausted(study: Study, points: int) -> str:
    """A digest of what decides whether a further point exists: the number of points, the axes, the
    sampler and the seeds.
    """
    dump = study.model_dump(mode="json")
    own = {name: model["axes"] for name, model in dump["models"].items()}
    return digest(
        {
            "points": points,
            "axes": dump["axes"],
            "models": own,
            "sampler": study.sampler,
            "seeds": dump["seeds"],
            **({"adapters": sorted(study.adapters)} if study.adapters else {}),
        }
    )
