"""The virtual sides of `bench_search_ratios` take the seconds of their work, and no others."""

from dataclasses import replace

import pytest

from tests.benchmarks import bench_search_ratios
from tests.benchmarks.bench_search_ratios import Work, ebbline, large, ray_tune

WORK = Work(
    "made up",
    {"steps": 4},
    {16: 100.0},
    project_s=1.0,
    load_s=10.0,
    suites={"refusal": 8.0, "task": 2.0},
    modules=6,
    further=0.25,
)


@pytest.fixture(autouse=True)
def one_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_search_ratios, "RANKS", (4,))
    monkeypatch.setattr(bench_search_ratios, "SIZES", (16,))
    # No module, no module, all modules: two distinct adapters
    monkeypatch.setattr(bench_search_ratios, "THRESHOLDS", (None, 0.1, 0.9))


def test_every_trial_of_ray_tune_takes_all_of_its_work() -> None:
    found = ray_tune(WORK, 1, WORK.suites)
    assert found["wall_s"] == found["worker_s"] == 3 * (10.0 + 100.0 + 1.0 + 10.0)
    assert ray_tune(WORK, 3, WORK.suites)["wall_s"] == 121.0


@pytest.mark.slow
def test_a_shared_training_equal_adapters_and_a_group_are_paid_once() -> None:
    found = ebbline(WORK, 1)
    assert (found["points"], found["trainings"]) == (3, 1)
    # The model before fine-tuning and two distinct adapters, on two suites each
    assert found["evaluations"] == 6
    # Without what a group saves, the same generations take longer
    alone = ebbline(replace(WORK, further=1.0), 1)
    assert alone["worker_s"] > found["worker_s"] > WORK.load_s + 100.0 + 6 * 0.25 * 2.0


def test_lm_eval_by_itself_reads_few_shots_again() -> None:
    work = large("7B", epochs=3, choices=True)
    assert 4 < work.others["mmlu"] / work.suites["mmlu"] < 6
    assert 3 < work.others["hellaswag"] / work.suites["hellaswag"] < 4
    assert work.others["refusal"] == work.suites["refusal"]
