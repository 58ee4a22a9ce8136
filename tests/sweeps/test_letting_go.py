"""A driver's memory: the stages of points that have ended are let go, and nothing else changes."""

import tracemalloc
from dataclasses import replace

import pytest

from ebbline.analysis.results.collect import collect
from ebbline.sweeps.drive import loop
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.state.outcome import Duplicates
from ebbline.sweeps.state.trials import Entry
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import Point, without_stages
from ebbline.sweeps.study.view import StudyView
from tests.sweeps.made import outcome
from tests.sweeps.pretended import Pretended, small

AXES = {"train.rank": [2, 4, 8, 16], "apply.threshold": [None, 0.2, 0.4, 0.6]}


def nan_at_rank_4(request):
    bad = request.kind == "train" and request.spec["rank"] == 4
    return ("the loss became nan", "TrainingError") if bad else None


def driven(folder, **others):
    """The results of a study, its counts, and the most stages that its runner held."""
    folder.mkdir()
    study, home = small(folder, axes=AXES, **others), Home(folder / "home")
    view, most = StudyView(study, home), []
    progress = drive(
        view,
        lambda: Pretended(home.store, gpus=2, fails=nan_at_rank_4),
        lambda progress: most.append(len(progress.runner.nodes)),
    )
    results = [
        (each.number, each.point, each.status, dict(each.metrics), each.reason.partition(":")[0])
        for each in collect(view)
    ]
    counts = {kind: +counts for kind, counts in progress.runner.counts.items()}
    done = sorted(progress.runner.done().values())
    return (results, counts, done), max(most), most[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "search",
    [
        {"sampler": "grid", "window": 2},
        {"sampler": "stage_aware", "points": 14, "order": "in_turn", "window": 3},
        {"sampler": "stage_aware", "points": 14, "window": 3},
    ],
)
@pytest.mark.parametrize("budget", [{}, {"gpu_hours": 1000.0}])
def test_letting_go_changes_no_proposal_no_result_and_no_count(
    tmp_path, monkeypatch, search, budget
):
    kept, most_kept, _ = driven(tmp_path / "kept", search=search, budget=budget)
    monkeypatch.setattr(loop, "LET_GO_AT", 1)
    monkeypatch.setattr(loop, "LET_GO_GROWTH", 1)
    let_go, most, last = driven(tmp_path / "let-go", search=search, budget=budget)
    assert let_go == kept
    # What is left: the models, their measurements, and the stages of failed points
    assert most < most_kept * 0.8 and last <= most


def test_an_ended_point_takes_little_memory(tmp_path):
    """What a driver keeps of each point: its result without stages, its row, and its digest."""
    found, count, kept = small(tmp_path), 2000, []
    duplicates = Duplicates(found)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(count):
            point = Point.of("7b", {"train.rank": number, "apply.threshold": number / count})
            result = outcome(number, point)
            result = replace(result, keys={"refusal[seed=0]": f"{number:064x}"})
            duplicates.add(result)
            kept += [without_stages(result), Entry(number, point, "done", (0.1 * number, 0.2))]
        assert (tracemalloc.get_traced_memory()[0] - before) / count < 2000
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["all", "near_frontier"])
def test_results_lose_their_keys_when_stages_are_let_go_unless_seeds_may_follow(
    tmp_path, monkeypatch, policy
):
    monkeypatch.setattr(loop, "LET_GO_AT", 1)
    monkeypatch.setattr(loop, "LET_GO_GROWTH", 1)
    more = {} if policy == "all" else {"seeds": [0, 1], "replicates": {"policy": policy}}
    study, home = small(tmp_path, axes=AXES, **more), Home(tmp_path / "home")
    progress = drive(StudyView(study, home), lambda: Pretended(home.store, gpus=2))
    lean = [result for result in progress.history if not result.keys and not result.costs]
    assert len(lean) >= 12 if policy == "all" else not lean
    assert all(result.metrics for result in progress.history)
