"""Importance of axes: found where an axis has an effect, and no number where none is possible."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.importance import FanovaImportanceEvaluator

from ebbline.sweeps.search import importance
from ebbline.sweeps.search.forest_shares import Column, forest_shares
from ebbline.sweeps.search.importance import FEW, FEWEST, MODEL, MOST, importances
from ebbline.sweeps.study.points import Point, Result, Value
from ebbline.sweeps.study.study import Study
from ebbline.tasks.measuring.metrics import Metric
from tests.sweeps.made import ORGANISM, TUNED, study

REFUSAL, TASK = "refusal.refusal_rate", "task.task_accuracy"
RANKS, THRESHOLDS = (2, 4, 8), (None, 0.3, 0.5)


def done(
    number: int, refusal: float, task: float = 0.5, model: str = "7b", **values: Value
) -> Result:
    point = Point.of(model, {name.replace("_", ".", 1): value for name, value in values.items()})
    metrics = {
        name: Metric(name, round(1000 * value), 1000)
        for name, value in ((REFUSAL, refusal), (TASK, task))
    }
    return Result(number, point, "done", metrics)


def sweep(points: int, sizes: tuple[str, ...] = ("7b",)) -> list[Result]:
    """Refusals depend on the threshold, and the task score on noise only."""
    rng, found = random.Random(0), []
    for number in range(points):
        rank, threshold = RANKS[number % 3], THRESHOLDS[number // 3 % 3]
        noise = rng.random() / 20
        found.append(
            done(
                number,
                0.2 + 1.2 * (threshold or 0) + noise,
                0.5 + noise,
                sizes[number % len(sizes)],
                train_rank=rank,
                apply_threshold=threshold,
            )
        )
    return found


def optunas_shares(
    columns: dict[str, Column], values: list[float], rows: list[int], trees: int
) -> dict[str, float]:
    distributions: dict[str, BaseDistribution] = {
        name: CategoricalDistribution(range(each.choices))
        if each.choices
        else IntDistribution(int(each.low), int(each.high))
        if each.high > 1
        else FloatDistribution(each.low, each.high)
        for name, each in columns.items()
    }
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.add_trials(
        optuna.trial.create_trial(
            params={name: each.values[row] for name, each in columns.items()},
            distributions=distributions,
            value=values[row],
        )
        for row in rows
    )
    return FanovaImportanceEvaluator(n_trees=trees, seed=0).evaluate(study)


@pytest.mark.parametrize("resampled", [False, True])
def test_the_shares_are_those_of_optunas_evaluator(resampled: bool) -> None:
    rng, count = random.Random(0), 60
    columns = {
        "threshold": Column([rng.random() for _ in range(count)], 0.0, 1.0),
        "rank": Column([rng.randrange(4) for _ in range(count)], 0, 3),
        MODEL: Column([rng.randrange(3) for _ in range(count)], 0, 1, 3),
    }
    threshold, rank, model = (each.values for each in columns.values())
    values = [
        threshold[n] ** 2 + 0.3 * rank[n] * (model[n] == 1) + rng.random() / 9 for n in range(count)
    ]
    rows = np.random.default_rng(1).integers(count, size=count).tolist()
    rows = rows if resampled else list(range(count))
    found, theirs = (
        forest_shares(columns, values, rows, 4),
        optunas_shares(columns, values, rows, 4),
    )
    assert found == pytest.approx(theirs, rel=1e-9)
    assert list(found or ()) == list(columns)


def test_many_points_have_the_shares_of_a_sample_that_is_always_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def counted(columns: Any, values: Any, rows: Any, trees: int) -> dict[str, float]:
        asked.append((len(values), trees))
        return {axis: sum(values) / len(values) for axis in columns}

    monkeypatch.setattr(importance, "forest_shares", counted)
    many = sweep(MOST + 100)
    first, second = (importances(study(tmp_path), rows) for rows in (many, many[::-1]))
    assert first == second and first[REFUSAL].points == MOST
    assert first[REFUSAL].finished == MOST + 100
    assert {points for points, _ in asked} == {MOST}
    assert len(asked) == 2 * 2 * (1 + importance.RESAMPLES)  # twice, for two objectives
    assert importances(study(tmp_path), sweep(MOST))[REFUSAL].finished is None


def test_the_axis_with_an_effect_has_the_largest_share(tmp_path: Path) -> None:
    found = importances(study(tmp_path), sweep(FEW))[REFUSAL]
    assert list(found.shares) == ["apply.threshold", "train.rank"]
    threshold, rank = found.shares.values()
    assert threshold.value > 0.9 > 0.1 > rank.value
    assert 0 <= threshold.interval[0] <= threshold.value <= threshold.interval[1] <= 1
    assert threshold.interval[0] > rank.interval[1]
    assert not found.few


def test_an_axis_with_one_value_has_no_number(tmp_path: Path) -> None:
    rows = [
        done(n, 0.1 + 0.02 * n, train_rank=8, apply_threshold=THRESHOLDS[n % 3]) for n in range(20)
    ]
    found = importances(study(tmp_path), rows)[REFUSAL]
    assert set(found.shares) == {"apply.threshold"}
    assert found.without == {"train.rank": "one value"}


def test_a_constant_objective_has_no_numbers(tmp_path: Path) -> None:
    rows = [done(n, 0.5, n / 40, train_rank=RANKS[n % 3], apply_threshold=None) for n in range(20)]
    found = importances(study(tmp_path), rows)
    assert (
        not found[REFUSAL].shares and found[REFUSAL].reason == "all 20 points have the same value"
    )
    assert found[TASK].shares


def test_a_resample_without_a_rare_value_is_left_out(tmp_path: Path) -> None:
    rows = [
        done(n, 0.3 + 0.01 * n, 0.5, train_rank=8 if n else 4, apply_threshold=None)
        for n in range(FEWEST)
    ]
    share = importances(study(tmp_path), rows)[REFUSAL].shares["train.rank"]
    assert 0 <= share.interval[0] <= share.value <= share.interval[1] <= 1


@pytest.mark.parametrize("points", [0, 1, FEWEST - 1])
def test_too_few_points_have_no_numbers(tmp_path: Path, points: int) -> None:
    found = importances(study(tmp_path), sweep(points))[REFUSAL]
    assert not found.shares and "too few" in found.reason


def test_few_points_are_marked_as_few_and_give_reproducible_shares(tmp_path: Path) -> None:
    first, second = (importances(study(tmp_path), sweep(FEWEST + 2)) for _ in range(2))
    assert first == second and first[REFUSAL].few


def two_sizes(tmp_path: Path, axes: dict[str, Any]) -> Study:
    size = {"base": ORGANISM, "aligned": {"tuned": TUNED}}
    return study(tmp_path, {"models": {"7b": size, "13b": {**size, "axes": axes}}})


def test_the_model_is_an_axis_when_there_are_several(tmp_path: Path) -> None:
    rows = [
        done(
            n,
            0.2 + 0.5 * (n % 2),
            0.5,
            ("7b", "13b")[n % 2],
            train_rank=RANKS[n % 3],
            apply_threshold=None,
        )
        for n in range(24)
    ]
    shares = importances(two_sizes(tmp_path, {}), rows)[REFUSAL].shares
    assert next(iter(shares)) == MODEL and shares[MODEL].value > 0.9


def test_an_axis_with_one_value_for_a_model_is_uneven(tmp_path: Path) -> None:
    rows = [
        done(
            n,
            0.2 + 0.01 * n,
            0.5,
            ("7b", "13b")[n % 2],
            train_rank=2 if n % 2 else RANKS[n // 2 % 3],
            apply_threshold=THRESHOLDS[n // 2 % 3],
        )
        for n in range(24)
    ]
    assert importances(two_sizes(tmp_path, {"train.rank": [2]}), rows)[REFUSAL].uneven == (
        "train.rank",
    )


def test_an_axis_of_one_model_only_has_a_reason_instead_of_a_share(tmp_path: Path) -> None:
    rows = [
        done(
            n,
            0.2 + 0.01 * n,
            0.5,
            "13b",
            train_rank=2,
            apply_threshold=None,
            data_size=(8, 16)[n // 2 % 2],
        )
        if n % 2
        else done(n, 0.2 + 0.01 * n, 0.5, "7b", train_rank=RANKS[n // 2 % 3], apply_threshold=None)
        for n in range(24)
    ]
    assert (
        importances(two_sizes(tmp_path, {"data.size": [8, 16]}), rows)[REFUSAL].without["data.size"]
        == "not every model has it"
    )
