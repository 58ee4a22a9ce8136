"""A machine that is slower or faster than the measurements of earlier runs is noticed."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbline.cluster.executors.executor import Needs
from ebbline.cluster.schedule.estimates import Estimates
from ebbline.cluster.schedule.pace import ENOUGH, LATEST, Pace, pace_sentence
from ebbline.cluster.store.artifacts import Store
from ebbline.tasks.stage import Stage
from tests.cluster.test_estimates import counted, record
from tests.cluster.test_work import one_of, train


@pytest.fixture
def store(tmp_path):
    """A store with trainings that took three times their counted work."""
    store = Store(tmp_path)
    for seed in range(10):
        stage = train(steps=100, seed=seed)
        record(store, stage, 3 * counted(stage))
    return store


def run(estimates: Estimates, store: Store, slower: float, count: int, first: int = 100) -> None:
    """Stages of one run that take `slower` times what those of earlier runs took."""
    for seed in range(first, first + count):
        stage = train(steps=100, seed=seed)
        estimates.learn([record(store, stage, slower * 3 * counted(stage))])


@pytest.mark.parametrize("slower", [0.5, 1.0, 2.0])
def test_all_predictions_follow_the_pace_of_the_run(store, slower):
    estimates = Estimates(store)
    longer, generate = train(steps=1000), one_of("generate")
    usual_s = [estimates.seconds(stage) for stage in (longer, generate)]
    run(estimates, store, slower, 4 * ENOUGH)
    assert estimates.pace == pytest.approx(slower)
    found_s = [estimates.seconds(stage) for stage in (longer, generate)]
    # The first stages of the run, before it had a pace, are in the categories too
    assert found_s == pytest.approx([slower * each for each in usual_s], rel=0.3)


def test_a_pace_needs_several_stages_and_predictions_of_earlier_runs(store, tmp_path):
    estimates = Estimates(store)
    run(estimates, store, 2.0, ENOUGH - 1)
    assert estimates.pace == 1.0
    new = Estimates(Store(tmp_path / "new"))
    run(new, new_store := Store(tmp_path / "new"), 2.0, 4 * ENOUGH)
    assert new.pace == 1.0, "the first run of a home has nothing to compare with"
    assert Estimates(new_store).pace == 1.0, "a pace is of one run"


def test_a_pace_is_of_one_type_of_machine(store):
    for seed in range(50, 53):
        stage = train(steps=100, seed=seed)
        record(store, stage, 2 * counted(stage, "A100"), gpu_type="A100")
    estimates = Estimates(store)
    on_gpu = Needs(1, {"ray.io/accelerator-type": "A100"})
    usual_s = estimates.seconds(train(steps=200), on_gpu)
    run(estimates, store, 2.0, 4 * ENOUGH)
    assert estimates.seconds(train(steps=200), on_gpu) == usual_s


def test_stages_of_a_slow_run_do_not_count_twice(store):
    """Its measurements enter the categories as if the machine had its usual pace."""
    estimates = Estimates(store)
    run(estimates, store, 2.0, 4 * ENOUGH)
    run(estimates, store, 2.0, LATEST, first=1000)
    assert estimates.pace == pytest.approx(2.0, rel=0.1)
    stage: Stage = train(steps=100, seed=7)
    assert estimates.seconds(stage) == pytest.approx(2 * 3 * counted(stage), rel=0.1)


RATIOS = st.lists(st.tuples(st.floats(0.1, 1e4), st.floats(0.1, 10.0)), min_size=1, max_size=80)


@given(RATIOS)
def test_a_pace_is_the_ratio_of_a_stage_that_halves_the_predicted_seconds(rows):
    pace = Pace()
    for predicted_s, ratio in rows:
        pace.learn(predicted_s, ratio * predicted_s)
    latest = rows[-LATEST:]
    if len(latest) < ENOUGH:
        assert pace.factor == 1.0
        return
    whole = math.fsum(weight for weight, _ in latest)
    below = math.fsum(weight for weight, ratio in latest if ratio < pace.factor * (1 - 1e-9))
    above = math.fsum(weight for weight, ratio in latest if ratio > pace.factor * (1 + 1e-9))
    assert max(below, above) <= whole / 2 * (1 + 1e-9)
    assert min(r for _, r in latest) * (1 - 1e-9) <= pace.factor
    assert pace.factor <= max(r for _, r in latest) * (1 + 1e-9)


def test_only_a_pace_that_matters_is_named():
    assert [pace_sentence(factor) for factor in (0.9, 1.0, 1.2)] == ["", "", ""]
    assert pace_sentence(1.84) == "stages take 1.8 times as long as earlier ones did"
    assert pace_sentence(0.5) == "stages take 0.5 times as long as earlier ones did"


def test_one_earlier_record_and_a_slower_run_predict_what_the_run_takes(tmp_path):
    """The measurements of this run count as they are, not times its pace."""
    store = Store(tmp_path)
    usual_s = counted(train(steps=100))
    record(store, train(steps=100), usual_s)
    estimates = Estimates(store)
    for seed in range(1, 31):
        stage = train(steps=100, seed=seed)
        estimates.learn([record(store, stage, 3 * usual_s)])
        assert estimates.seconds(train(steps=100, seed=99)) <= 3 * usual_s * (1 + 1e-9)
    assert estimates.seconds(train(steps=100, seed=99)) == pytest.approx(3 * usual_s)


def test_shares_of_a_group_say_nothing_about_the_machine(tmp_path):
    store = Store(tmp_path)
    generate = one_of("generate")
    assert generate.kind == "generate"
    record(store, generate, 10.0)
    training = train(steps=100)
    record(store, training, 100.0)
    estimates = Estimates(store)
    for seed in range(4 * ENOUGH):
        again = Stage(generate.spec.model_copy(update={"limit": seed + 1}), generate.inputs)
        estimates.learn([record(store, again, 2.0)])
    assert estimates.pace == 1.0
    assert estimates.seconds(train(steps=100, seed=1)) == pytest.approx(100.0)
