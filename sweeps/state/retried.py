"""Retried points. A failed trial stays as it is, because Optuna changes no trial that has ended. A
trial with the same parameters takes its place, so the point keeps its number.
"""

from collections.abc import Sequence

from optuna.trial import FrozenTrial

RETRIES = "retries"  # trial attribute: the number of the trial whose place it takes


def takes_a_place(trial: FrozenTrial) -> bool:
    return RETRIES in trial.user_attrs


def latest(trials: Sequence[FrozenTrial]) -> dict[int, FrozenTrial]:
    """The number of a retried trial -> the last trial that takes its place."""
    ordered = sorted(filter(takes_a_place, trials), key=lambda trial: trial.number)
    return {int(trial.user_attrs[RETRIES]): trial for trial in ordered}
