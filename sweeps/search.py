"""Choosing points: Optuna, a grid and a fixed list behind one ask/tell protocol. The only file that imports optuna.

The Optuna storage is the one truth about points and their state. A proposal is a pure function of the study file, its
number k, and the results of the points up to k - window: the sampler is made anew for each proposal, seeded by k, and
results are told in the order of asking, one for each proposal. A point's number is its place in that order, not Optuna's
trial number, which also counts proposals that were set aside. So a driver that was killed asks, on restart, for what it would have asked.
"""

import itertools
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import optuna
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from sweeps.points import Point, Result, Value
from sweeps.storage import Storage
from sweeps.study import AxisValue, Range, Study, lasting
from tasks.errors import DatabaseLost, StudyError
from tasks.identity import digest
from tasks.metrics import direction

optuna.logging.set_verbosity(optuna.logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)
REDRAWS = 8
_DIRECTIONS = {"maximise": optuna.study.StudyDirection.MAXIMIZE, "minimise": optuna.study.StudyDirection.MINIMIZE}
REASON, NOT_A_POINT, SAME_AS = "reason", "not_a_point", "same_as"  # study attributes, by trial number
SETTINGS = "settings"  # ... of the whole


class Searcher(Protocol):
    """Proposes distinct points and is told what became of them, in the order it proposed them."""

    def in_flight(self) -> Sequence[tuple[int, Point]]:
        """Points that were asked for and not told, oldest first: what a restarted driver continues with."""

    def told(self) -> int:
        """How many points have been told."""

    def measured(self) -> Sequence[tuple[int, Point]]:
        """The points that were told with their objectives: their artifacts should be in the store, and are made again if not."""

    def ask(self) -> tuple[int, Point] | None:
        """The next point and its number, or None when there is none left to propose."""

    def tell(self, number: int, result: Result) -> None:
        """Record what became of a point: its objectives, or the reason it failed."""

    def amend(self, number: int, result: Result) -> None:
        """What a point that was told before measured over more seeds: the search goes by it; the storage keeps what was told."""


class OptunaSearcher:
    """Every sampler of a study file, over Optuna's storage. Make one driver's worth at a time: see Home.driving."""

    def __init__(self, study: Study, storage: Storage, begun_as: str = "") -> None:
        """`begun_as` is a digest of the settings that the study had before it was widened."""
        self.study, self._begun_as = study, begun_as
        self._limit = limit(study)
        self._optuna = optuna.create_study(
            storage=_opened(storage),
            study_name=storage.name,
            directions=[_DIRECTIONS[direction(name)] for name in study.objectives],
            load_if_exists=True,
        )
        if storage.shared:
            self._same_settings(storage)
        self._clear_half_asked()

    def _same_settings(self, storage: Storage) -> None:
        """Another home may have begun the study in a shared database: with the same settings, or its points are not ours."""
        own = digest(lasting(self.study.model_dump(mode="json")))
        before = self._optuna.user_attrs.get(SETTINGS)
        if before is None or (before != own and before == self._begun_as):
            self._optuna.set_user_attr(SETTINGS, own)
        elif before != own:
            raise StudyError(
                f"a study named {self.study.study!r} was begun in the shared database, as {storage.name!r}, with other settings;"
                " give this one another name (`study: ...`)"
            )

    def in_flight(self) -> Sequence[tuple[int, Point]]:
        return [(k, _point(trial)) for k, trial in enumerate(self._accepted()) if trial.state == TrialState.RUNNING]

    def told(self) -> int:
        return sum(trial.state.is_finished() for trial in self._accepted())

    def measured(self) -> Sequence[tuple[int, Point]]:
        return [(k, _point(trial)) for k, trial in enumerate(self._accepted()) if trial.state == TrialState.COMPLETE]

    def ask(self) -> tuple[int, Point] | None:
        accepted = self._accepted()
        k = len(accepted)
        if self._limit is not None and k >= self._limit:
            return None
        known = {_point(trial).id: trial.number for trial in accepted}
        fixed = self._fixed(k)
        tries = 0 if fixed is not None else self._redraws_since(accepted)
        while True:
            if fixed is None and tries >= REDRAWS:
                # The sampler keeps proposing what is known: take the first point of the space, in a seeded order, that is not.
                fixed = self._unvisited(set(known), k)
                if fixed is None:
                    return None
            if fixed is not None and not any(trial.state == TrialState.WAITING for trial in self._optuna.trials):
                self._optuna.enqueue_trial(_parameters(self.study, fixed))
            self._optuna.sampler = _sampler(self.study, seed=self.study.search.seed * 1_000_003 + k * REDRAWS + min(tries, REDRAWS - 1))
            trial = self._optuna.ask()
            point = _suggest(self.study, trial)
            if point.id not in known:
                return k, point
            self._optuna.set_user_attr(f"{NOT_A_POINT}:{trial.number}", f"the same as {known[point.id]}")
            self._optuna.tell(trial, state=TrialState.FAIL)
            if fixed is not None and k < len(self.study.search.first or self.study.search.list):
                raise StudyError(f"the study file gives the point {point} twice; each point runs once, seeds are its repeats")
            tries += 1

    def tell(self, number: int, result: Result) -> None:
        trial = self._accepted()[number].number
        if result.status == "done":
            if result.same_as is not None:
                self._optuna.set_user_attr(f"{SAME_AS}:{trial}", result.same_as)
            self._optuna.tell(trial, [result.metrics[name].value for name in self.study.objectives])
        else:
            # Without a state, a trial that lacks an objective would stay RUNNING, and constant_liar would avoid its place.
            self._optuna.set_user_attr(f"{REASON}:{trial}", result.reason)
            self._optuna.tell(trial, state=TrialState.FAIL)

    def amend(self, number: int, result: Result) -> None:
        return None

    def _accepted(self) -> list[FrozenTrial]:
        """The trials that are points of the study: no duplicates, nothing cut off while it was being asked."""
        return _points_of(self._optuna)

    def _clear_half_asked(self) -> None:
        """Set aside what a driver was choosing when it was cut off: it will be chosen again."""
        for trial in self._optuna.trials:
            if trial.state == TrialState.RUNNING and f"{NOT_A_POINT}:{trial.number}" in self._optuna.user_attrs:
                self._optuna.tell(trial.number, state=TrialState.FAIL)  # cut off between the mark and this
        seen: set[str] = set()
        for trial in self._accepted():
            whole = "model" in trial.params and len(trial.params) == 1 + len(self.study.axes)
            if trial.state == TrialState.RUNNING and (not whole or _point(trial).id in seen):
                self._optuna.set_user_attr(f"{NOT_A_POINT}:{trial.number}", "the same as an earlier one" if whole else "cut off")
                self._optuna.tell(trial.number, state=TrialState.FAIL)
            elif whole:
                seen.add(_point(trial).id)

    def _redraws_since(self, accepted: Sequence[FrozenTrial]) -> int:
        last = accepted[-1].number if accepted else -1
        marks = self._optuna.user_attrs
        return sum("the same" in marks.get(f"{NOT_A_POINT}:{trial.number}", "") for trial in self._optuna.trials if trial.number > last)

    def _fixed(self, k: int) -> Point | None:
        if self.study.search.sampler == "grid":
            return next(itertools.islice(space(self.study), k, None))
        if self.study.search.sampler == "list":
            return listed(self.study.search.list[k], self.study, f"search.list[{k}]")
        first = self.study.search.first
        return listed(first[k], self.study, f"search.first[{k}]") if k < len(first) else None

    def _unvisited(self, known: set[str], k: int) -> Point | None:
        if not finite(self.study):
            return None
        left = sorted((point for point in space(self.study) if point.id not in known), key=lambda point: point.id)
        return left[k % len(left)] if left else None


@contextmanager
def reaching(storage: Storage) -> Iterator[None]:
    """Turn whatever a database does wrong under Optuna into a DatabaseLost."""
    try:
        with storage.explained():
            yield
    except optuna.exceptions.StorageInternalError as error:
        raise DatabaseLost(storage.told(error.__cause__ or error)) from error


def _opened(storage: Storage) -> optuna.storages.BaseStorage:
    return optuna.storages.get_storage(optuna.storages.RDBStorage(storage.url, engine_kwargs=storage.settings))


def known_points(study: Study, storage: Storage) -> tuple[list[Point], int]:
    """The points that are known before running: those asked so far, or all of a grid or list; and how many are unchosen."""
    searcher_limit = limit(study)
    points = [point for _, point, _, _ in asked(study, storage)]
    if study.search.sampler == "grid":
        points = list(space(study))[:searcher_limit]
    elif study.search.sampler == "list":
        points = [listed(row, study, f"search.list[{k}]") for k, row in enumerate(study.search.list)]
    return points, max(0, (searcher_limit or 0) - len(points))


def limit(study: Study) -> int | None:
    """How many points the study is to have: what it asks for, or its whole space if that is smaller."""
    wanted = len(study.search.list) if study.search.sampler == "list" else study.search.points
    size = None if not finite(study) else sum(1 for _ in space(study))
    return min((n for n in (wanted, size) if n is not None), default=None)


def finite(study: Study) -> bool:
    return not any(isinstance(axis, Range) for axis in study.axes.values())


def check_written_points(study: Study) -> None:
    """Raise StudyError for a point of `search.first` or `search.list` that is not in the space, or stands twice."""
    for name in ("first", "list"):
        seen: set[str] = set()
        for k, row in enumerate(getattr(study.search, name)):
            point = listed(row, study, f"search.{name}[{k}]")
            if point.id in seen:
                raise StudyError(f"search.{name} gives the point {point} twice; each point runs once, seeds are its repeats")
            seen.add(point.id)


def listed(row: Mapping[str, AxisValue], study: Study, where: str) -> Point:
    """A point written out in the study file. Raises StudyError when it lacks the model or an axis, or leaves the space."""
    values = dict(row)
    model = str(values.pop("model", ""))
    if model not in study.models or set(values) != set(study.axes):
        raise StudyError(f"{where} must give `model` (one of {sorted(study.models)}) and each of {sorted(study.axes)}")
    for axis, value in values.items():
        choices = _parameter(study, model, axis)[1]
        if isinstance(choices, Range):
            inside = isinstance(value, int | float) and choices.low <= value <= choices.high
        else:
            inside = json.dumps(value) in [json.dumps(choice) for choice in choices]  # 1, 1.0 and true are three values
        if not inside:
            raise StudyError(f"{where}: {axis}={value!r} is not a value of that axis for {model}, which has {choices}")
    return Point.of(model, values)


def asked(study: Study, storage: Storage) -> list[tuple[int, Point, str, str]]:
    """(number, point, state, reason) of every point asked so far, for readers; state is running, done or failed."""
    names = {TrialState.COMPLETE: "done", TrialState.FAIL: "failed"}
    with reaching(storage):
        try:
            found = optuna.load_study(study_name=storage.name, storage=_opened(storage))
        except KeyError:
            return []
        return [
            (k, _point(trial), names.get(trial.state, "running"), str(found.user_attrs.get(f"{REASON}:{trial.number}", "")))
            for k, trial in enumerate(_points_of(found))
            if len(trial.params) == 1 + len(study.axes)
        ]


def space(study: Study) -> Iterator[Point]:
    """Every point of a study whose axes are all lists, in the order of the file."""
    for name, model in study.models.items():
        choices = []
        for axis, values in study.axes.items():
            values = model.axes.get(axis, values)
            if isinstance(values, Range):
                raise StudyError(f"axes.{axis} is a range; it has no list of points")
            choices.append([(axis, value) for value in values])
        for combination in itertools.product(*choices):
            yield Point.of(name, dict(combination))


def _points_of(found: optuna.Study) -> list[FrozenTrial]:
    """The trials that are points of the study: no duplicates, nothing cut off while it was being asked."""
    marks = found.user_attrs
    return [trial for trial in found.trials if trial.state != TrialState.WAITING and f"{NOT_A_POINT}:{trial.number}" not in marks]


def _point(trial: FrozenTrial) -> Point:
    values = {name.rpartition("/")[2]: _plain(value) for name, value in trial.params.items()}
    return Point.of(str(values.pop("model")), values)


def _plain(value: Any) -> Value:
    # Choices are kept as JSON text: Optuna would take 1, 1.0 and True for one choice.
    plain: Value = json.loads(value) if isinstance(value, str) else value
    return plain


def _suggest(study: Study, trial: optuna.Trial) -> Point:
    model = str(_plain(trial.suggest_categorical("model", [json.dumps(name) for name in study.models])))
    values: dict[str, Value] = {}
    for axis in study.axes:
        name, choices = _parameter(study, model, axis)
        if isinstance(choices, Range):
            if choices.whole:
                values[axis] = trial.suggest_int(name, int(choices.low), int(choices.high), step=int(choices.step or 1), log=choices.log)
            else:
                values[axis] = trial.suggest_float(name, choices.low, choices.high, step=choices.step, log=choices.log)
        else:
            values[axis] = _plain(trial.suggest_categorical(name, [json.dumps(value) for value in choices]))
    return Point.of(model, values)


def _parameter(study: Study, model: str, axis: str) -> tuple[str, tuple[AxisValue, ...] | Range]:
    """Optuna's name for an axis, and its values. A size that narrows an axis has a parameter of its own: `70b/train.rank`."""
    own = study.models[model].axes.get(axis)
    return (axis, study.axes[axis]) if own is None else (f"{model}/{axis}", own)


def _parameters(study: Study, point: Point) -> dict[str, Value]:
    """A point as the parameters that `_suggest` would have drawn for it."""
    drawn: dict[str, Value] = {"model": json.dumps(point.model)}
    for axis, value in point.values:
        name, choices = _parameter(study, point.model, axis)
        drawn[name] = value if isinstance(choices, Range) else json.dumps(value)
    return drawn


def _sampler(study: Study, seed: int) -> BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # constant_liar is what async search needs
        match study.search.sampler:
            case "tpe":
                startup = max(4, min(10, (study.search.points or 20) // 3))
                return TPESampler(seed=seed, constant_liar=True, n_startup_trials=startup)
            case "nsga2":
                return NSGAIISampler(seed=seed)
            case _:
                return RandomSampler(seed=seed)
