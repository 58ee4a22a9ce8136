"""Failed points that are tried again keep their number, and points whose stages are gone have a
status that is true.
"""

import shutil

import pytest

from ebbline.analysis.results.collect import Follower, collect
from ebbline.analysis.results.retrying import AGAIN, INPUT, MACHINE, SAME, advice, retry_hint
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import INVALID, OUTDATED, Point, Result
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError
from tests.sweeps.pretended import Pretended, small

SPACE = {"axes": {"train.rank": [2, 4, 8]}, "search": {"sampler": "grid"}}


class Broken:
    """A cause that can be mended: trainings of these ranks fail."""

    def __init__(self, *ranks):
        self.ranks, self.ran = set(ranks), []

    def __call__(self, request):
        self.ran.append((request.kind, request.spec.get("rank")))
        bad = request.kind == "train" and request.spec["rank"] in self.ranks
        return ("the loss became nan", "TrainingError") if bad else None


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home")


def ran(tmp_path, home, broken, retry=(), stop=lambda: False, **changes):
    view = StudyView(small(tmp_path, **{**SPACE, **changes}), home)
    drive(view, lambda: Pretended(home.store, fails=broken), retry=retry, stop=stop)
    return collect(view)


def statuses(results):
    return [(each.number, dict(each.point.values)["train.rank"], each.status) for each in results]


DONE = [(0, 2, "done"), (1, 4, "done"), (2, 8, "done")]


@pytest.mark.slow
def test_a_failed_point_is_tried_again_only_on_request_and_keeps_its_number(tmp_path, home):
    broken = Broken(4)
    failed = ran(tmp_path, home, broken)
    assert statuses(failed) == [(0, 2, "done"), (1, 4, "failed"), (2, 8, "done")]
    follower = Follower(StudyView(small(tmp_path, **SPACE), home))
    assert statuses(follower.look()) == statuses(failed)
    broken.ranks.clear()
    broken.ran.clear()
    assert statuses(ran(tmp_path, home, broken)) == statuses(failed) and broken.ran == []
    for wrong in ([0], [1, 7]):
        with pytest.raises(StudyError, match="only a point that failed .* that are 1$"):
            ran(tmp_path, home, broken, retry=wrong)
    assert statuses(collect(StudyView(small(tmp_path, **SPACE), home))) == statuses(failed)
    assert statuses(ran(tmp_path, home, broken, retry=[1])) == DONE
    assert [rank for kind, rank in broken.ran if kind == "train"] == [4]
    assert statuses(follower.look()) == DONE
    with pytest.raises(StudyError, match="that are none"):
        ran(tmp_path, home, broken, retry=[1])
    assert statuses(ran(tmp_path, home, broken, retry=None)) == DONE
    wider = ran(tmp_path, home, broken)
    assert statuses(wider) == DONE


@pytest.mark.slow
def test_a_retry_that_fails_again_or_is_cut_off_can_be_retried(tmp_path, home):
    broken = Broken(2, 8)
    ran(tmp_path, home, broken)
    failed = ran(tmp_path, home, broken, retry=None)
    assert statuses(failed) == [(0, 2, "failed"), (1, 4, "done"), (2, 8, "failed")]
    cut = ran(tmp_path, home, broken, retry=None, stop=lambda: True)
    assert [each.status for each in cut] == ["running", "done", "running"]
    broken.ranks.clear()
    assert statuses(ran(tmp_path, home, broken)) == DONE


@pytest.mark.slow
def test_a_point_whose_stages_are_gone_is_outdated_until_the_next_run_measures_it(tmp_path, home):
    broken = Broken()
    before = ran(tmp_path, home, broken)
    assert statuses(before) == DONE
    for kind in ("train", "score", "generate", "apply", "project"):  # as after an upgrade
        shutil.rmtree(home.store.root / kind)
    view = StudyView(small(tmp_path, **SPACE), home)
    gone = collect(view)
    assert {(each.status, each.reason) for each in gone} == {("outdated", OUTDATED)}
    broken.ranks.add(4)
    found = ran(tmp_path, home, broken)
    assert statuses(found) == [(0, 2, "done"), (1, 4, "failed"), (2, 8, "done")]
    assert "the loss became nan" in found[1].reason
    assert statuses(collect(view)) == statuses(found)
    broken.ranks.clear()
    after = ran(tmp_path, home, broken)
    assert [each.metrics for each in after] == [each.metrics for each in before]


@pytest.mark.slow
def test_a_further_seed_that_failed_is_tried_again(tmp_path, home):
    class Seed(Broken):
        def __call__(self, request):
            bad = request.kind == "train" and request.spec["seed"] in self.ranks
            return ("the loss became nan", "TrainingError") if bad else None

    broken, changes = (
        Seed(1),
        {
            "seeds": [0, 1],
            "replicates": {"policy": "near_frontier", "confidence": 0.999},
            "search": {"sampler": "grid", "order": "in_turn"},
        },
    )
    one = ran(tmp_path, home, broken, **changes)
    assert all(each.status == "done" for each in one) and any(each.reason for each in one)
    broken.ranks.clear()
    two = ran(tmp_path, home, broken, retry=None, **changes)
    assert not any(each.reason for each in two)


@pytest.mark.parametrize(
    ("status", "reason", "expected"),
    [
        ("failed", "TrainingError: the loss became nan at step 3 of 40", SAME),
        ("failed", "OutOfMemory: 90 GB were needed (to see it again: ebbline rerun x)", MACHINE),
        ("failed", "lost 3 times (killed for memory)", MACHINE),
        ("failed", "OSError: [Errno 28] No space left on device", MACHINE),
        ("invalid", f"{INVALID}DataError: line 3 of task.jsonl has no answer", INPUT),
        ("outdated", OUTDATED, AGAIN),
        ("done", "", ""),
        ("running", "", ""),
    ],
)
def test_a_point_without_a_result_says_whether_to_retry_it(status, reason, expected):
    assert advice(Result(0, Point.of("7b", {}), status, reason=reason)) == expected


def test_the_hint_names_the_command_and_only_failed_points():
    point = Point.of("7b", {})
    one = [Result(4, point, "failed", reason="x"), Result(5, point, "outdated", reason="y")]
    assert retry_hint(one, "mine") == "to try failed points again: ebbline run mine --retry"
    many = [Result(number, point, "failed", reason="x") for number in range(9)]
    assert retry_hint(many, "mine").endswith("or only some of them: --retry 0 1 2")
    assert retry_hint([Result(5, point, "skipped")], "mine") == ""
