"""The trials that are read from Optuna's tables equal those that Optuna reads."""

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from ebbline.sweeps.state.trial_rows import TrialRows

SPACES = {
    "axis": FloatDistribution(0.0, 1.0),
    "70b/train.rank": IntDistribution(1, 64, log=True),
    "model": CategoricalDistribution(['"7b"', '"70b"', "null"]),
}


def trial(number, state):
    params = {"axis": number / 8, "70b/train.rank": 1 + number, "model": '"70b"'}
    names = list(params)[: 1 + number % 3]  # trials of other sizes have other axes
    return create_trial(
        state=state,
        values=[0.1 * number, 1.0] if state == TrialState.COMPLETE else None,
        params={name: params[name] for name in names},
        distributions={name: SPACES[name] for name in names},
        user_attrs={"drawn": {"generation": number}, "name": "é"} if number % 2 else {},
        constraints={"gpu_hours": number - 2.5} if state == TrialState.COMPLETE else None,
    )


def fields(trials):
    """All but the times of trials, which TrialRows does not read."""
    return [
        {name: value for name, value in vars(each).items() if not name.startswith("_datetime")}
        | {"_datetime_start": None, "datetime_complete": None}
        for each in trials
    ]


def test_the_rows_give_the_trials_that_optuna_reads_and_ended_ones_once(tmp_path):
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/trials.db")
    directions = ["maximize", "minimize"]
    study, other = (
        optuna.create_study(storage=storage, study_name=name, directions=directions)
        for name in ("own", "other")
    )
    rows = TrialRows(storage, study._study_id)
    assert rows.look() == []
    for number, state in enumerate(
        [TrialState.COMPLETE, TrialState.RUNNING, TrialState.FAIL, TrialState.COMPLETE]
    ):
        other.add_trial(trial(number, state))
        study.add_trial(trial(number, state))
    first = rows.look()
    assert fields(first) == fields(study.get_trials())
    study.tell(1, [0.5, float("inf")])
    study.add_trial(trial(4, TrialState.RUNNING))
    second = rows.look()
    assert fields(second) == fields(study.get_trials())
    assert [each is before for each, before in zip(second, first, strict=False)] == [
        True,
        False,
        True,
        True,
    ]
