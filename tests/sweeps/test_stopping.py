"""The rule `search.stop`: what it counts, when it is met, and that it stays met."""

from dataclasses import replace

import numpy as np
import pytest

from ebbline.cluster.executors.executor import Capacity, Host
from ebbline.cluster.profile import GpuType, Profile
from ebbline.cluster.schedule.costs import Cost
from ebbline.sweeps.dominance import hypervolume
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.forecast.forecast import forecast
from ebbline.sweeps.search.searcher import all_points
from ebbline.sweeps.state.spending import read_spent
from ebbline.sweeps.state.stopping import Gains
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import Point, Result
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError, TrainingError
from ebbline.tasks.kinds import parsed_spec
from ebbline.tasks.measuring.metrics import Metric
from ebbline.tasks.specs import TrainSpec
from tests.sweeps.made import study
from tests.sweeps.pretended import Pretended, changes

PRICES = Profile(gpus={"other": GpuType(usd_per_hour=2.0)})
HOUR = 3600.0


def result(number, refusal, task, costs, n=100_000):
    """A point with these rates in percent; so many samples leave no noise."""
    metrics = {
        "refusal.refusal_rate": Metric("refusal_rate", refusal * n // 100, n),
        "task.task_accuracy": Metric("task_accuracy", task * n // 100, n),
    }
    return Result(number, Point.of("7b", {"train.rank": number}), "done", metrics, costs=costs)


def hours(**named):
    return {key: Cost({None: value * HOUR}) for key, value in named.items()}


def gains(tmp_path, rule, since=0, profile=PRICES):
    return Gains(study(tmp_path, {"search": {"sampler": "grid", "stop": rule}}), profile, since)


def met_after_each(found, results):
    met = []
    for each in results:
        found.add(each)
        met.append(bool(found.met()))
    return met


GROWING = [(50, 50), (60, 60), (61, 61), (61, 61), (61, 61)]  # hypervolumes .25, .36, .3721


def test_a_rule_by_points_is_met_when_the_last_ones_added_too_little(tmp_path):
    results = [result(number, *values, {}) for number, values in enumerate(GROWING)]
    assert met_after_each(gains(tmp_path, {"gain": 0.1, "per_points": 2}), results) == [
        False,
        False,
        False,
        True,
        True,
    ]
    assert met_after_each(gains(tmp_path, {"gain": 0.01, "per_points": 2}), results) == [
        False,
        False,
        False,
        False,
        True,
    ]


def test_noise_alone_does_not_keep_a_study_going(tmp_path):
    """120 points of equal true rates: the best of them seems to get better for ever."""
    rng = np.random.default_rng(0)
    results = [
        result(number, *map(int, rng.binomial(100, 0.6, size=2)), {}, n=100)
        for number in range(120)
    ]
    found = gains(tmp_path, {"gain": 0.02, "per_points": 60})
    assert met_after_each(found, results)[-1]
    seen = [[each.metrics[name].value for name in each.metrics] for each in results]
    then, now = (hypervolume(np.array(seen[:count])) for count in (60, 120))
    assert now > 1.02 * then, "the frontier of the same numbers grew by more than the rule asks for"


def test_the_spread_between_seeds_alone_does_not_keep_a_study_going(tmp_path):
    """As above, with so many prompts that only the training seeds vary, by 20 points."""
    rng = np.random.default_rng(0)
    results = []
    for number in range(120):
        found = result(number, 0, 0, {})
        rates = np.clip(rng.normal(0.5, 0.2, size=(2, 3)), 0, 1)
        metrics = {
            name: Metric(metric.name, float(own.sum()) * 1e5, 300_000, seeds=tuple(own.tolist()))
            for (name, metric), own in zip(found.metrics.items(), rates, strict=True)
        }
        results.append(replace(found, metrics=metrics))
    assert met_after_each(gains(tmp_path, {"gain": 0.02, "per_points": 60}), results)[-1]
    alone = [replace(each, metrics=without_seeds(each.metrics)) for each in results]
    assert not met_after_each(gains(tmp_path, {"gain": 0.02, "per_points": 60}), alone)[-1]


def without_seeds(metrics):
    return {name: replace(metric, seeds=()) for name, metric in metrics.items()}


@pytest.mark.parametrize(
    "rule", [{"gain": 0.1, "per_gpu_hour": 2.0}, {"gain": 0.1, "per_usd": 4.0}]
)
def test_a_shared_stage_counts_once(tmp_path, rule):
    # Each point costs one hour; the shared training of 10 hours counts for the first point.
    results = [
        result(number, *values, hours(train=10.0, **{f"own{number}": 1.0}))
        for number, values in enumerate(GROWING)
    ]
    assert met_after_each(gains(tmp_path, rule), results) == [False, False, False, True, True]


def test_points_before_an_extension_do_not_stop_the_study(tmp_path):
    results = [result(number, 60, 60, {}) for number in range(6)]
    assert met_after_each(gains(tmp_path, {"gain": 0.1, "per_points": 2}, since=3), results) == [
        False
    ] * 5 + [True]


def test_a_missing_price_and_a_rule_without_a_unit_are_errors(tmp_path):
    found = gains(tmp_path, {"gain": 0.1, "per_usd": 1.0}, profile=Profile())
    with pytest.raises(
        StudyError,
        match=r"search\.stop\.per_usd is given, but cluster\.yaml in the home has no price",
    ):
        found.add(result(0, 50, 50, hours(own=1.0)))
    with pytest.raises(StudyError, match="one of per_usd, per_gpu_hour and per_points"):
        study(tmp_path, {"search": {"sampler": "grid", "stop": {"gain": 0.1}}})


@pytest.mark.slow
def test_a_study_that_stopped_stays_stopped_until_its_rule_changes(tmp_path):
    plain = changes(
        tmp_path, axes={"train.rank": [2, 4, 8], "apply.threshold": [None, 0.1, 0.2, 0.3, 0.4, 0.5]}
    )
    plain["models"] = {"7b": plain["models"]["7b"]}
    home = Home(tmp_path / "home")

    def ruled(gain):
        search = {"sampler": "grid", "window": 2, "stop": {"gain": gain, "per_points": 4}}
        return study(tmp_path, {**plain, "search": search})

    def expected(gain):
        return forecast(StudyView(ruled(gain), home), Capacity((Host("here", 8, 8),)))

    def driven(gain):
        found = ruled(gain)
        return drive(StudyView(found, home), lambda: Pretended(home.store)), len(
            all_points(found, home.database("tiny"))
        )

    progress, points = driven(0.5)
    assert (
        progress.by == "gain"
        and "by less than 0.5 per 4 points. Change search.stop" in progress.stopped
        and points < 12
    )
    spent = read_spent(home.folder("tiny"))
    assert spent.stopped.reason == progress.stopped and spent.gain.by == "gain"
    again, same = driven(0.5)
    assert again.by == "gain" and again.stopped == progress.stopped and same == points
    assert expected(0.5).complete and expected(0.5).points.ended == progress.stopped
    assert len(expected(1e-9).points.to_come) == 18 - points
    further, more = driven(1e-9)
    assert more > points and further.results


def test_a_met_rule_records_the_number_of_finished_points(
    tmp_path,
):
    def fails(request):
        spec = parsed_spec(request)
        failing = isinstance(spec, TrainSpec) and spec.rank == 4
        return (
            (f"{TrainingError.__name__}: the loss became nan", TrainingError.__name__)
            if failing
            else None
        )

    plain = changes(
        tmp_path, axes={"train.rank": [4, 2, 8], "apply.threshold": [None, 0.1, 0.2, 0.3, 0.4, 0.5]}
    )
    plain["models"] = {"7b": plain["models"]["7b"]}
    search = {
        "sampler": "grid",
        "order": "in_turn",
        "window": 1,
        "stop": {"gain": 0.5, "per_points": 4},
    }
    found, home = study(tmp_path, {**plain, "search": search}), Home(tmp_path / "home")
    progress = drive(StudyView(found, home), lambda: Pretended(home.store, fails=fails))
    states = [result.status for result in progress.results]
    assert progress.by == "gain" and states.count("failed") == 6
    assert read_spent(home.folder("tiny")).gain.points == states.count("done") == len(states) - 6


def test_a_study_stops_by_the_dollars_that_its_points_cost(tmp_path):
    plain = changes(
        tmp_path,
        axes={"train.rank": [2, 4, 8, 16], "apply.threshold": [None, 0.1, 0.2, 0.3, 0.4, 0.5]},
    )
    plain["models"] = {"7b": plain["models"]["7b"]}
    found = study(
        tmp_path,
        {
            **plain,
            "search": {"sampler": "grid", "window": 2, "stop": {"gain": 0.5, "per_usd": 120.0}},
        },
    )
    home = Home(tmp_path / "home")
    with pytest.raises(
        StudyError,
        match=r"search\.stop\.per_usd is given, but cluster\.yaml in the home has no price for "
        r"other",
    ):
        drive(StudyView(found, home), lambda: Pretended(home.store))
    (home.root / "cluster.yaml").write_text(
        "gpus: {other: {usd_per_hour: 3600}}\n"
    )  # one dollar per second
    home = Home(home.root)
    progress = drive(StudyView(found, home), lambda: Pretended(home.store))
    results = progress.results
    assert (
        progress.by == "gain"
        and "by less than 0.5 per $120. Change search.stop" in progress.stopped
        and len(results) < 24
    )
    costs = {
        key: cost.usd(home.profile) for result in results for key, cost in result.costs.items()
    }
    assert sum(costs.values()) > 120.0
    again = drive(StudyView(found, home), lambda: Pretended(home.store))
    assert (again.by, again.results) == ("gain", [])
