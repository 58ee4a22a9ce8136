"""Reads the trials of a study from Optuna's tables.

Optuna's own reading makes an object of each row of five tables, which takes 1 ms for a trial. Here
the columns are read, and a distribution, which most trials share, is parsed once. The trials equal
Optuna's, but for their times, which nobody reads.
"""

import json
from collections import defaultdict
from functools import lru_cache
from typing import Any

import sqlalchemy
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import (
    TrialModel,
    TrialParamModel,
    TrialSystemAttributeModel,
    TrialUserAttributeModel,
    TrialValueModel,
)
from optuna.trial import FrozenTrial


class TrialRows:
    """The trials of one study, in the order of their numbers. Trials that have ended are read from
    the database once.
    """

    def __init__(self, storage: RDBStorage, study_id: int) -> None:
        self._storage, self._study_id = storage, study_id
        self._ended: dict[int, FrozenTrial] = {}  # by Optuna's ID of a trial
        self._open: set[int] = set()
        self._last = -1  # the largest ID that was read

    def look(self) -> list[FrozenTrial]:
        fresh = self._read()
        self._last = max([self._last, *fresh])
        self._open = {id for id, trial in fresh.items() if not trial.state.is_finished()}
        self._ended |= {id: trial for id, trial in fresh.items() if id not in self._open}
        return sorted((self._ended | fresh).values(), key=lambda trial: trial.number)

    def _read(self) -> dict[int, FrozenTrial]:
        """By ID, the trials that are new or had not ended before."""
        wanted = sqlalchemy.and_(
            TrialModel.study_id == self._study_id,
            sqlalchemy.or_(TrialModel.trial_id > self._last, TrialModel.trial_id.in_(self._open)),
        )

        def rows(model: Any, *columns: Any) -> Any:
            """The rows of a table that belong to these trials, in the order of their IDs."""
            (own,) = sqlalchemy.inspect(model).primary_key
            query = sqlalchemy.select(model.trial_id, *columns).where(wanted).order_by(own)
            if model is not TrialModel:
                query = query.join(TrialModel, TrialModel.trial_id == model.trial_id)
            return connection.execute(query)

        params, distributions, values, user, system = (
            defaultdict[int, dict[str, Any]](dict) for _ in range(5)
        )
        # Trials first, as Optuna does: one that has ended has all of the rest
        with self._storage.engine.connect() as connection:
            trials = rows(TrialModel, TrialModel.number, TrialModel.state).all()
            for id, name, value, text in rows(
                TrialParamModel,
                TrialParamModel.param_name,
                TrialParamModel.param_value,
                TrialParamModel.distribution_json,
            ):
                distributions[id][name] = _distribution(text)
                params[id][name] = distributions[id][name].to_external_repr(value)
            for id, place, value, kind in rows(
                TrialValueModel,
                TrialValueModel.objective,
                TrialValueModel.value,
                TrialValueModel.value_type,
            ):
                values[id][place] = TrialValueModel.stored_repr_to_value(value, kind)
            for model, found in (
                (TrialUserAttributeModel, user),
                (TrialSystemAttributeModel, system),
            ):
                for id, name, text in rows(model, model.key, model.value_json):
                    found[id][name] = json.loads(text)
        return {
            id: FrozenTrial(
                number=number,
                state=state,
                value=None,
                values=[values[id][place] for place in sorted(values[id])] or None,
                datetime_start=None,
                datetime_complete=None,
                params=params[id],
                distributions=distributions[id],
                user_attrs=user[id],
                system_attrs=system[id],
                intermediate_values={},
                trial_id=id,
            )
            for id, number, state in trials
        }


@lru_cache(1024)
def _distribution(text: str) -> BaseDistribution:
    return json_to_distribution(text)
