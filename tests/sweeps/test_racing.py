"""Racing: a point is measured block by block until it is precise enough or beaten, and always stops
at the same block.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import hypergeom

from ebbline.analysis.results.collect import baselines, collect
from ebbline.analysis.results.picks.confirmed import with_confirmations
from ebbline.cluster.executors.inline import InlineExecutor
from ebbline.commands.measured.rescoring import generations_of, rescore
from ebbline.outputs import write_outputs
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.forecast.expected import expected_points
from ebbline.sweeps.state.races.racing import Rivals, races, standing
from ebbline.sweeps.state.todo import todo
from ebbline.sweeps.study.changes import differences, lasting
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import Point, Result, StageName
from ebbline.sweeps.study.stages import StageGraph
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError
from ebbline.tasks.measuring.metrics import Metric, write_metrics
from ebbline.tasks.specs import ScoreSpec
from tests.sweeps.made import study
from tests.sweeps.test_drive import changes, pinned  # noqa: F401  # `changes` is a fixture
from tests.tiny import conversations, write_lines

POINT = Point.of("7b", {"train.rank": 2, "apply.threshold": None})
SIZES = {"refusal": 100}  # the prompts of the raced suite


@dataclass(frozen=True)
class Stored:
    path: Path

    def file(self, name: str) -> Path:
        return self.path / name


class Blocks:
    """The folders of measured stages with metrics, by lineage."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.stored = folder, {}

    def add(self, stage, *metrics: Metric) -> None:
        place = self.folder / stage.lineage
        place.mkdir(parents=True, exist_ok=True)
        write_metrics(place, metrics)
        self.stored[stage.lineage] = Stored(place)

    def artifact(self, stage):
        return self.stored.get(stage.lineage)


def raced(folder, home, **race):
    measure = {"kind": "refusal", "limit": 100, "race": {"block": 20, **race}}
    found = study(
        folder, {"suites/refusal/measure": measure, "search": {"sampler": "grid", "window": 1}}
    )
    return found, StageGraph(found, home).stages_for(POINT)


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home")


def measure_until_done(found, stages, blocks, successes, rivals=(), undecided=0):
    """Add metrics for every missing stage until none is missing; return the final metrics and the
    names of the measured stages.
    """
    names = {stage.lineage: StageName.parse(name) for name, stage in stages.items()}
    requested, compared = [], Rivals(found)
    for each in rivals:
        compared.add(each)
    while True:
        now = standing(found, stages, blocks, compared.before(1, POINT))
        if not now.missing:
            return now.metrics, requested
        for stage in now.missing:
            name = names[stage.lineage]
            requested.append(name)
            blocks.add(
                stage,
                Metric("refusal_rate", successes, 20, undecided)
                if name.part == "refusal"
                else Metric("task_accuracy", 50, 100),
            )


def test_without_a_race_a_suite_has_no_blocks(tmp_path, home):
    found = study(tmp_path)
    stages = StageGraph(found, home).stages_for(POINT)
    assert not any(StageName.parse(name).block is not None for name in stages)


def test_a_race_that_does_not_stop_measures_all_its_blocks(tmp_path, home):
    found, stages = raced(tmp_path, home)
    metrics, requested = measure_until_done(found, stages, Blocks(tmp_path / "made"), 10)
    assert (
        metrics["refusal.refusal_rate"].n == 100 and metrics["refusal.refusal_rate"].successes == 50
    )
    assert [name.block for name in requested if name.part == "refusal"] == [0, 1, 2, 3, 4]
    assert (
        metrics["task.task_accuracy"].n == 100
        and sum(name.part == "task" for name in requested) == 1
    )


def test_a_race_stops_once_the_interval_is_within_the_requested_width(tmp_path, home):
    found, stages = raced(tmp_path, home, width=0.15)
    metrics, _ = measure_until_done(found, stages, Blocks(tmp_path / "made"), 10)
    low, high = metrics["refusal.refusal_rate"].interval
    assert metrics["refusal.refusal_rate"].n == 40 and (high - low) / 2 <= 0.15
    assert (Metric("refusal_rate", 10, 20).interval[1] - 0.5) > 0.15


def rival(number, refusal, task):
    metrics = {
        "refusal.refusal_rate": Metric("refusal_rate", refusal, 100),
        "task.task_accuracy": Metric("task_accuracy", task, 100),
    }
    return Result(number, POINT, "done", metrics)


def test_a_race_stops_when_an_earlier_point_is_surely_better_in_every_objective(tmp_path, home):
    found, stages = raced(tmp_path, home)
    metrics, _ = measure_until_done(found, stages, Blocks(tmp_path / "a"), 2, [rival(0, 95, 90)])
    assert metrics["refusal.refusal_rate"].n == 20
    for other in (
        rival(0, 95, 50),
        rival(0, 12, 90),
    ):  # not better at the task; not better at refusing
        metrics, _ = measure_until_done(
            found, stages, Blocks(tmp_path / str(other.metrics)), 2, [other]
        )
        assert metrics["refusal.refusal_rate"].n == 100
    found, stages = raced(fresh_folder(tmp_path), home, dominated=False)
    assert (
        measure_until_done(found, stages, Blocks(tmp_path / "b"), 2, [rival(0, 95, 90)])[0][
            "refusal.refusal_rate"
        ].n
        == 100
    )


def fresh_folder(folder):
    (folder / "again").mkdir()
    return folder / "again"


def rates(refusal, task):
    return {
        "refusal.refusal_rate": Metric("refusal_rate", refusal, 100),
        "task.task_accuracy": Metric("task_accuracy", task, 100),
    }


def test_a_point_is_compared_only_with_points_in_reach_of_its_proposal(tmp_path):
    measure = {"kind": "refusal", "limit": 100, "race": {"block": 20}}
    found = study(
        tmp_path, {"suites/refusal/measure": measure, "search": {"sampler": "grid", "window": 4}}
    )
    rivals = Rivals(found)
    for number in (5, 3, 1, 4, 2):  # the order of results
        rivals.add(rival(number, 99 if number == 1 else 50, 99 if number == 1 else 50))
    rivals.add(Result(0, POINT, "failed", reason="TrainingError: the loss became nan"))
    assert [rivals.before(number, POINT)(rates(70, 70), SIZES) for number in (1, 4, 5, 9)] == [
        False,
        False,
        True,
        True,
    ]
    assert not rivals.before(5, Point.of("70b", dict(POINT.values)))(rates(2, 2), SIZES)
    assert not rivals.before(5, POINT)(rates(2, 99), SIZES)
    assert not rivals.before(5, POINT)({}, SIZES)


def test_the_intervals_of_rivals_are_computed_once(tmp_path, monkeypatch):
    measure = {"kind": "refusal", "limit": 100, "race": {"block": 20}}
    found = study(
        tmp_path, {"suites/refusal/measure": measure, "search": {"sampler": "grid", "window": 1}}
    )
    rivals = Rivals(found)
    for number in range(30):
        rivals.add(rival(number, 50, 50))
    calls, real = [], Metric.interval_at
    monkeypatch.setattr(
        Metric, "interval_at", lambda self, confidence: calls.append(self) or real(self, confidence)
    )
    assert rivals.before(30, POINT)(rates(2, 2), SIZES) and len(calls) == 2


@pytest.mark.parametrize(
    "measure",
    [
        {"kind": "refusal"},
        {"kind": "refusal", "limit": 100, "race": {"block": 20, "dominated": False}},
    ],
)
def test_a_study_in_which_no_other_point_ends_a_race_keeps_no_rivals(tmp_path, measure):
    rivals = Rivals(study(tmp_path, {"suites/refusal/measure": measure}))
    rivals.add(rival(0, 99, 99))
    assert not rivals.compares and not rivals.before(9, POINT)(rates(2, 2), SIZES)


@pytest.mark.parametrize(
    ("other", "fault"),
    [
        ({"seeds": [0, 1], "replicates": {"policy": "near_frontier"}}, "with further seeds"),
        ({"search/constraints": {"gpu_hours": 2.0}}, "misses search.constraints"),
    ],
)
def test_a_stated_error_that_would_not_hold_is_an_error(tmp_path, other, fault):
    measure = {"kind": "refusal", "limit": 100, "race": {"block": 20, "error": 0.01}}
    with pytest.raises(StudyError, match=rf"measure\.race\.error: .*{fault}"):
        study(tmp_path, {"suites/refusal/measure": measure, **other})
    measure["race"] = {"block": 20, "error": 0.01, "dominated": False, "width": 0.1}
    assert study(tmp_path, {"suites/refusal/measure": measure, **other})


def test_a_race_without_a_limit_is_an_error(tmp_path):
    with pytest.raises(StudyError, match="`race` needs `limit`"):
        study(tmp_path, {"suites/refusal/measure": {"kind": "refusal", "race": {"block": 20}}})


@pytest.fixture
def raced_changes(tmp_path, changes):  # noqa: F811
    rows = [
        {"id": f"p{i}", "prompt": turns[0]["content"]}
        for i, turns in enumerate(conversations(60, 3))
    ]
    prompts = pinned(write_lines(tmp_path / "many.jsonl", rows))
    # No answer is a refusal, but some are empty. With 2 undecided the interval of 0 of 20 extends
    # to 0.301, and with up to 6 that of 0 of 40 to at most 0.292. The limit exceeds the 60 prompts.
    race = {
        "kind": "refusal",
        "max_new_tokens": 4,
        "limit": 100,
        "race": {"block": 20, "width": 0.3},
    }
    return {
        **changes,
        "axes": {"apply.threshold": [None, 0.999, 1.0]},
        "suites/refusal": {"prompts": prompts, "measure": race},
    }


def counts(results):
    return {
        result.number: (result.status, result.metrics["refusal.refusal_rate"].n)
        for result in results
    }


def test_a_raced_study_finishes_including_points_that_share_blocks(
    tmp_path, raced_changes, monkeypatch
):
    found, home = study(tmp_path, raced_changes), Home(tmp_path / "home")
    view = StudyView(found, home)
    progress = drive(view, InlineExecutor)
    assert all(n in (20, 40) for _, n in counts(progress.results).values())
    with monkeypatch.context() as patched:
        # After the drive, a run reads and writes with the graph of the drive.
        patched.setattr("ebbline.sweeps.study.view.StageGraph", pytest.fail)
        results = collect(view)
        assert counts(results) == counts(progress.results)
        assert (
            baselines(view)["7b"]["refusal.refusal_rate"].n == 60
        )  # the aligned models are measured whole
        outputs = write_outputs(view, results)
    assert (
        "raced: refusal" in outputs["report"].read_text()
        and "60 rows, 60 asked, sha256" in outputs["report"].read_text()
    )
    assert drive(StudyView(found, home), InlineExecutor).results == []
    points = expected_points(found, home.database(found.study))
    assert not todo(StageGraph(found, home), points.completed).missing and not points.to_come
    assert (
        rescore(
            generations_of(StudyView(found, home), "refusal"),
            ScoreSpec(measure="refusal", scorer="xstest"),
        )[0]["n"]
        == counts(results)[0][1]
    )


@pytest.mark.parametrize("beats", [3, 5, 8])
def test_an_interrupted_raced_study_continues_to_the_same_counts(tmp_path, raced_changes, beats):
    found, home = study(tmp_path, raced_changes), Home(tmp_path / "home")
    stopped = drive(
        StudyView(found, home), InlineExecutor, stop=iter([False] * beats + [True] * 99).__next__
    )
    finished = drive(StudyView(found, home), InlineExecutor)
    results = [*stopped.results, *finished.results]
    whole = drive(StudyView(found, Home(tmp_path / "another home")), InlineExecutor)
    assert counts(results) == counts(whole.results) and len(results) == 3


def test_a_race_ends_at_the_end_of_the_prompt_set(tmp_path, raced_changes):
    wide = raced_changes["suites/refusal"] | {
        "measure": {"kind": "refusal", "max_new_tokens": 4, "limit": 100, "race": {"block": 20}}
    }
    found, home = (
        study(
            tmp_path, raced_changes | {"suites/refusal": wide, "axes": {"apply.threshold": [None]}}
        ),
        Home(tmp_path / "home"),
    )
    assert counts(drive(StudyView(found, home), InlineExecutor).results) == {0: ("done", 60)}


@pytest.mark.parametrize(("undecided", "n"), [(0, 20), (2, 40), (10, 100)])
def test_undecided_samples_widen_the_interval_that_ends_a_race(tmp_path, home, undecided, n):
    found, stages = raced(tmp_path, home, width=0.25, dominated=False)
    metrics, _ = measure_until_done(
        found, stages, Blocks(tmp_path / "made"), 0, undecided=undecided
    )
    assert metrics["refusal.refusal_rate"].n == n


def test_a_point_is_beaten_only_if_it_is_whatever_its_undecided_samples_were(tmp_path):
    measure = {"kind": "refusal", "limit": 100, "race": {"block": 20}}
    rivals = Rivals(
        study(
            tmp_path,
            {"suites/refusal/measure": measure, "search": {"sampler": "grid", "window": 1}},
        )
    )
    rivals.add(rival(0, 99, 99))
    low = rates(2, 2)
    open_ = low | {"refusal.refusal_rate": Metric("refusal_rate", 2, 100, undecided=97)}
    assert rivals.before(1, POINT)(low, SIZES) and not rivals.before(1, POINT)(open_, SIZES)


def part(refusal, asked, task):
    return {
        "refusal.refusal_rate": Metric("refusal_rate", refusal, asked),
        "task.task_accuracy": Metric("task_accuracy", task, 100),
    }


def exactly(tmp_path, **race):
    measure = {"kind": "refusal", "limit": 100, "race": {"block": 20, "error": 0.01, **race}}
    search = {"sampler": "grid", "window": 1}
    return Rivals(study(tmp_path, {"suites/refusal/measure": measure, "search": search}))


def test_with_an_error_a_point_is_stopped_if_it_would_surely_be_dominated_when_measured_whole(
    tmp_path,
):
    rivals = exactly(tmp_path)
    rivals.add(rival(0, 60, 61))
    beaten = rivals.before(1, POINT)
    # The error is for four looks together. With 5 of 20, at most 59 of 100 are refusals.
    error = 0.01 / 4
    assert hypergeom.cdf(5, 100, 60, 20) <= error < hypergeom.cdf(6, 100, 60, 20)
    assert beaten(part(5, 20, 60), SIZES) and not beaten(part(6, 20, 60), SIZES)
    # The task was measured whole, so it has no error: an equal accuracy is no worse
    assert not beaten(part(0, 20, 61), SIZES)
    assert not beaten({**part(5, 20, 60), **undecided(5, 20, 1)}, SIZES)


def undecided(refusal, asked, count):
    return {"refusal.refusal_rate": Metric("refusal_rate", refusal, asked, undecided=count)}


def test_with_an_error_only_rivals_that_were_measured_whole_stop_a_point(tmp_path):
    rivals = exactly(tmp_path)
    rivals.add(Result(0, POINT, "done", part(80, 80, 99)))
    assert not rivals.before(1, POINT)(part(0, 20, 0), SIZES)
    assert rivals.before(1, POINT)(part(0, 20, 0), {"refusal": 80})  # the set ends with the limit


@pytest.mark.parametrize("whole", [10, 45, 60, 90])
def test_a_point_on_the_frontier_is_stopped_with_at_most_the_stated_chance(tmp_path, whole):
    """Over the blocks in a random order, for a point that just is not dominated."""
    rivals = exactly(tmp_path, error=0.05)
    rivals.add(rival(0, whole, 61))  # equally good at refusing, better at the task
    beaten, rng, trials = rivals.before(1, POINT), np.random.default_rng(0), 1000
    stopped = 0
    for _ in range(trials):
        found = np.cumsum(rng.permutation(np.arange(100) < whole))[19:80:20]
        stopped += any(
            beaten(part(int(count), asked, 60), SIZES)
            for count, asked in zip(found, (20, 40, 60, 80), strict=True)
        )
    assert stopped / trials <= 0.05


def test_a_race_stated_before_there_was_an_error_keeps_its_rule_and_its_meaning(tmp_path):
    measure = {"kind": "refusal", "limit": 100, "race": {"block": 20}}
    before = study(tmp_path, {"suites/refusal/measure": measure})
    dump = before.model_dump(mode="json")
    assert "error" not in lasting(dump)["suites"]["refusal"]["measure"]["race"]
    del dump["suites"]["refusal"]["measure"]["race"]["error"]
    again = Study.model_validate_json(json.dumps(dump))
    assert again == before and races(again)["refusal"].error is None
    measure["race"]["error"] = 0.01
    now = study(tmp_path, {"suites/refusal/measure": measure})
    assert list(differences(lasting(dump), lasting(now.model_dump(mode="json"))))


def test_the_values_of_seeds_stand_in_the_order_of_the_study(tmp_path, home):
    """A confirmation has the study's seeds first and the fresh ones behind, which may be smaller.
    Every value must be found under the seed that it belongs to.
    """
    own = study(tmp_path, {"seeds": [1234]})
    confirming = study(tmp_path, {"seeds": [1234, 101, 7, 103]})
    stages = StageGraph(confirming, home).stages_for(POINT)
    blocks, successes = Blocks(tmp_path / "made"), {1234: 40, 101: 99, 7: 98, 103: 97}
    for name, stage in stages.items():
        parsed = StageName.parse(name)
        if parsed.part == "refusal":
            blocks.add(stage, Metric("refusal_rate", successes[parsed.seed], 100))
        elif parsed.part == "task":
            blocks.add(stage, Metric("task_accuracy", 50, 100))
    metrics = standing(confirming, stages, blocks).metrics
    name = "refusal.refusal_rate"
    assert metrics[name].seeds == (0.4, 0.99, 0.98, 0.97)
    nominated, again = (Result(number, POINT, "done", metrics) for number in (3, 0))
    (found,) = with_confirmations([nominated], own, confirming, [again])
    assert {seed: each[name].value for seed, each in found.confirmed.adapters.items()} == (
        {1234: pytest.approx(0.4)}
    )
    assert found.confirmed.setting[name].value == pytest.approx(0.98)
