"""Forecasts: the arithmetic of a predicted run, on the virtual clock."""

import json

import pytest

from ebbline.cluster.executors.choice import DEFAULT_EXECUTOR, executor_kind
from ebbline.cluster.executors.executor import ACCELERATOR_TYPE, Capacity, Host
from ebbline.cluster.schedule.costs import Cost
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.forecast import forecast as forecasts
from ebbline.sweeps.forecast.expected import expected_points
from ebbline.sweeps.forecast.forecast import forecast
from ebbline.sweeps.forecast.prediction import Prediction, keep, keep_end, predict, read_predictions
from ebbline.sweeps.search.searcher import space
from ebbline.sweeps.state.jobs import estimates_of, read_jobs
from ebbline.sweeps.state.spending import NAME, Spent
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.stages import StageGraph
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError
from tests.sweeps.made import study
from tests.sweeps.pretended import Pretended, changes
from tests.sweeps.test_stages import fill

ONE = Capacity((Host("here", 1, 2),))
FOUR = Capacity((Host("here", 4, 2),))


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home")


def test_a_forecast_is_the_sum_of_its_stages_and_the_starts_of_their_jobs(tmp_path, home):
    found = forecast(StudyView(study(tmp_path), home), ONE)
    assert {kind: share.stages for kind, share in found.kinds.items()} == found.todo.new
    gpu_s = sum(
        (span.end_s - span.start_s) * sum(span.hosts.values()) for span in found.trace.spans
    )
    assert (
        3600 * found.cost.gpu_hours == pytest.approx(gpu_s) and found.starts.gpu_hours > 0
    )  # a span includes the start of its job
    assert found.wall_s == pytest.approx(
        found.trace.makespan_s + DEFAULT_EXECUTOR.start_costs.cluster_s
    )
    assert found.wall_s >= gpu_s and found.written > 0 and found.free_bytes > 0
    assert "estimated from counted work alone" in " ".join(found.assumed)
    long = study(tmp_path, {"train": {"steps": 20_000}})  # long enough to pay for another process
    assert (
        forecast(StudyView(long, home), FOUR).wall_s
        < 0.7 * forecast(StudyView(long, home), ONE).wall_s
    )


def test_the_forecast_of_a_finished_study_is_zero(tmp_path, home):
    graph = StageGraph(study(tmp_path), home)
    fill(home.store, graph, space(graph.study))
    found = forecast(StudyView(graph.study, home), ONE)
    assert not found.kinds and found.wall_s == 0.0 and found.written == 0
    assert predict(found, Spent()) is None


def test_in_one_process_stages_run_one_by_one_and_no_job_starts(tmp_path, home):
    found = forecast(StudyView(study(tmp_path), home), FOUR, kind=executor_kind("inline"))
    assert found.wall_s == pytest.approx(sum(share.seconds for share in found.kinds.values()))
    assert found.starts.gpu_hours == 0.0


@pytest.mark.slow
def test_a_stage_that_cannot_run_is_reported_and_gives_no_wall_time(tmp_path, home):
    gang = study(tmp_path, {"models/7b/gpus": 4, "train": {"epochs": 1, "global_batch": 8}})
    found = forecast(StudyView(gang, home), ONE)
    assert found.wall_s is None and predict(found, Spent()) is None
    assert "needs 4 GPUs at once, and all hosts together have 1" in " ".join(found.never)
    assert forecast(StudyView(gang, home), FOUR).wall_s > 0


def test_dollars_follow_the_labels_of_a_model_else_the_gpu_type_of_the_cluster(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "cluster.yaml").write_text(
        "gpus: {A100: {usd_per_hour: 2.0}, L4: {usd_per_hour: 1.0}}"
    )
    home = Home(tmp_path / "home")
    mixed = Capacity(
        tuple(
            Host(name, gpus, 2, {ACCELERATOR_TYPE: name}) for name, gpus in (("L4", 4), ("A100", 2))
        )
    )
    assert forecast(StudyView(study(tmp_path), home), mixed).cost.gpu_s.keys() == {"L4"}
    labelled = study(tmp_path, {"models/7b/labels": {ACCELERATOR_TYPE: "A100"}})
    found = forecast(StudyView(labelled, home), mixed)
    assert found.cost.gpu_s.keys() == {"A100"} and found.cost.usd(home.profile) == pytest.approx(
        2.0 * found.cost.gpu_hours
    )


SEARCH = {
    "axes": {
        "train.rank": [2, 4, 8, 16],
        "apply.threshold": [None, *[n / 10 for n in range(1, 10)]],
    }
}


def searched(tmp_path, points: int):
    return study(tmp_path, {**SEARCH, "search": {"sampler": "tpe", "points": points, "window": 4}})


def test_future_proposals_are_distinct_random_points_that_are_always_the_same(tmp_path, home):
    found = expected_points(searched(tmp_path, 12), home.database("tiny"))
    assert len({point.id for point in found.drawn}) == len(found.drawn) == 12
    assert found == expected_points(searched(tmp_path, 12), home.database("tiny"))
    assert (
        len(expected_points(searched(tmp_path, 1000), home.database("tiny")).drawn) == 40
    )  # the whole space
    ranged = study(
        tmp_path,
        {
            "axes": {
                "train.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
                "train.rank": [2],
            },
            "search": {"sampler": "random", "points": 30},
        },
    )
    rates = [
        dict(point.values)["train.learning_rate"]
        for point in expected_points(ranged, home.database("tiny")).drawn
    ]
    assert len(set(rates)) == 30 and all(1e-5 <= rate <= 1e-2 for rate in rates)
    assert sum(rate < 3e-4 for rate in rates) > 8  # uniform in the logarithm


def test_points_that_the_study_file_lists_are_chosen_for_certain(tmp_path, home):
    first = [{"model": "7b", "train.rank": 8, "apply.threshold": 0.5}]
    begun = study(tmp_path, {**SEARCH, "search": {"sampler": "tpe", "points": 5, "first": first}})
    found = expected_points(begun, home.database("tiny"))
    assert [dict(point.values)["train.rank"] for point in found.chosen] == [8] and len(
        found.drawn
    ) == 4
    assert found.chosen[0].id not in {point.id for point in found.drawn}
    grid = expected_points(study(tmp_path, SEARCH), home.database("tiny"))
    assert len(grid.chosen) == 40 and not grid.drawn


def test_a_sample_of_points_to_come_is_scaled_by_points_and_by_adapters(
    tmp_path, home, monkeypatch
):
    whole = forecast(StudyView(searched(tmp_path, 40), home), ONE)
    monkeypatch.setattr(forecasts, "EXACT", 20)
    monkeypatch.setattr(forecasts, "SAMPLE", 16)
    part = forecast(StudyView(searched(tmp_path, 40), home), ONE)
    assert part.simulated == 16 and "16 of 40 points to come were simulated" in " ".join(
        part.assumed
    )
    assert {kind: share.stages for kind, share in part.kinds.items()} == pytest.approx(
        {kind: share.stages for kind, share in whole.kinds.items()}, abs=1.0
    )
    assert part.cost.gpu_hours == pytest.approx(whole.cost.gpu_hours, rel=0.1)
    assert part.wall_s == pytest.approx(whole.wall_s, rel=0.15)


@pytest.mark.slow
def test_a_sample_of_completed_points_is_scaled_to_the_missing_stages_of_all(
    tmp_path, home, monkeypatch
):
    axes = {"train.rank": [2, 4, 8], "apply.threshold": [None, *[n / 10 for n in range(1, 10)]]}
    plain = changes(tmp_path, axes=axes, search={"sampler": "grid"})
    plain["models"].pop("70b")
    drive(StudyView(study(tmp_path, plain), home), lambda: Pretended(home.store))
    wide = study(tmp_path, {**plain, "seeds": [0, 1]})
    whole = forecast(StudyView(wide, home), ONE)
    assert len(whole.points.completed) == whole.looked_up == 30 and whole.todo.new["train"] == 3
    monkeypatch.setattr(forecasts, "EXACT", 20)
    monkeypatch.setattr(forecasts, "SAMPLE", 16)
    part = forecast(StudyView(wide, home), ONE)
    assert part.looked_up == 16 and not part.complete
    assert "16 of 30 completed points were looked up" in " ".join(part.assumed)
    stages = {kind: share.stages for kind, share in whole.kinds.items()}
    assert {kind: share.stages for kind, share in part.kinds.items()} == pytest.approx(
        stages, rel=0.15
    )
    assert part.cost.gpu_hours == pytest.approx(whole.cost.gpu_hours, rel=0.15)
    assert predict(part, Spent()).stages == pytest.approx(sum(stages.values()), rel=0.15)
    none = forecast(StudyView(study(tmp_path, plain), home), ONE)
    assert none.complete and none.looked_up == 16 and predict(none, Spent()) is None


@pytest.mark.slow
def test_a_search_without_further_masks_has_no_points_to_come(tmp_path, home):
    axes = {"train.rank": [2, 4], "apply.threshold": {"low": 0.0, "high": 1.0}}
    plain = changes(
        tmp_path, axes=axes, search={"sampler": "stage_aware", "points": 30, "window": 4}
    )
    plain["models"].pop("70b")
    found = study(tmp_path, plain)
    completed = drive(StudyView(found, home), lambda: Pretended(home.store)).completed
    assert completed < 30
    rest = forecast(StudyView(found, home), ONE)
    assert (
        rest.complete and len(rest.points.completed) == completed and predict(rest, Spent()) is None
    )
    assert rest.points.ended == "the search has nothing more to propose"
    wider = study(tmp_path, {**plain, "axes": {**axes, "train.rank": [2, 4, 8]}})
    assert len(forecast(StudyView(wider, home), ONE).points.drawn) == 30 - completed


def ledger(home, name: str, *lines: dict) -> None:
    (home.folder(name) / NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_start_times_are_estimated_from_all_ledgers_of_the_home(tmp_path, home):
    graph = StageGraph(study(tmp_path), home)
    fill(home.store, graph, space(graph.study))  # each took a second
    keys = sorted(
        artifact.key for kind in ("train", "project", "apply") for artifact in home.store.all(kind)
    )
    assert len(keys) >= 4
    # Its score runs in its job, and the ledger does not list it
    generation = next(artifact.key for artifact in home.store.all("generate"))
    on_gpu = {"gpus": [[None, 1]], "hosts": {"h": 1}}
    ledger(
        home, "one",
        {"driver": "a", "s": 0.0},
        # New process: 9 s beside its 2 stages
        {"start": "ray-0", **on_gpu, "keys": keys[:2], "s": 3.0}, {"end": "ray-0", "s": 14.0},
        # Warm process: 0.5 s
        {"start": "ray-1", **on_gpu, "keys": keys[2:3], "s": 14.0}, {"end": "ray-1", "s": 15.5},
        {"start": "ray-2", **on_gpu, "keys": ["unknown"], "s": 15.5}, {"end": "ray-2", "s": 99.0},
        {"start": "ray-3", **on_gpu, "keys": [generation], "s": 99.0}, {"end": "ray-3", "s": 199.0},
        {"driver": "b", "s": 0.0},
        # Another new process: 11 s
        {"start": "ray-0", **on_gpu, "keys": keys[3:4], "s": 5.0}, {"end": "ray-0", "s": 17.0},
    )  # fmt: skip
    ledger(
        home,
        "two",
        {"driver": "a", "s": 0.0},
        {"start": "inline-0", **on_gpu, "keys": keys[:1], "s": 0.0},
        {"end": "inline-0", "s": 99.0},
    )
    starts = estimates_of(home).starts
    assert starts.seconds(None, 1, new=True) == 10.0 and starts.seconds(None, 1) == 0.5
    assert starts.cluster_s == 4.0
    assert [(job.drive, job.id, job.new) for job in read_jobs(home.folder("one"))] == [
        (0, "ray-0", True), (0, "ray-1", False), (0, "ray-2", False), (0, "ray-3", False),
        (1, "ray-0", True),
    ]  # fmt: skip


def test_a_prediction_is_kept_and_compared_with_the_time_and_cost_since(tmp_path, home):
    found = forecast(StudyView(study(tmp_path), home), ONE)
    before = Spent(100.0, found.cost)
    prediction = predict(found, before)
    keep(prediction, tmp_path)
    keep(prediction, tmp_path)
    first, second = read_predictions(tmp_path)
    assert (
        first == second
        and first.wall_s == found.wall_s
        and first.stages == sum(found.todo.new.values())
    )
    after = Spent(100.0 + found.wall_s / 2, found.cost.times(3.0))
    assert first.errors(after) == pytest.approx({"wall time": 1.0, "GPU-hours": -0.5}, abs=1e-3)
    # No time has passed, so there is no relative error
    assert Prediction(1.0, found.cost, 1, 1.0, before).errors(before) == {}


def test_only_a_run_that_reached_the_end_keeps_its_total_with_its_prediction(tmp_path, home):
    found = forecast(StudyView(study(tmp_path), home), ONE)
    stopped, ended, killed = (
        predict(found, Spent(driving_s, Cost(), frozenset({"a key"})))
        for driving_s in (0.0, 10.0, 500.0)
    )
    keep(stopped, tmp_path)
    keep(ended, tmp_path)
    keep_end(ended, Spent(99.0, found.cost), tmp_path)
    keep(killed, tmp_path)
    predictions = read_predictions(tmp_path)
    assert [(each.before.driving_s, each.after is not None) for each in predictions] == [
        (0.0, False),
        (10.0, True),
        (500.0, False),
    ]
    assert (
        predictions[1].after.driving_s == 99.0
        and predictions[1].since(predictions[1].after)[0] == 89.0
    )


def test_an_incomplete_line_does_not_spoil_the_next_prediction(tmp_path, home):
    found = forecast(StudyView(study(tmp_path), home), ONE)
    first, cut_off, last = (predict(found, Spent(driving_s)) for driving_s in (0.0, 10.0, 20.0))
    keep(first, tmp_path)
    keep(cut_off, tmp_path)
    text = (tmp_path / "plans.jsonl").read_text()
    (tmp_path / "plans.jsonl").write_text(text[:-40])
    keep(last, tmp_path)
    assert [each.before.driving_s for each in read_predictions(tmp_path)] == [0.0, 20.0]


def test_a_damaged_prediction_names_its_line(tmp_path):
    (tmp_path / "plans.jsonl").write_text('{"wall_s": 1}\n')
    with pytest.raises(StudyError, match=r"plans\.jsonl, line 1 is damaged"):
        read_predictions(tmp_path)
    (tmp_path / "plans.jsonl").write_text('{"wall_s": 1')  # incomplete last line
    assert read_predictions(tmp_path) == []
