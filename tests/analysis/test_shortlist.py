"""A report of many points reads the files of some of them, and says which."""

from itertools import pairwise
from pathlib import Path

from ebbline.analysis.results.frontier import MOST_READ, shortlist, shortlist_note
from ebbline.analysis.results.statistics import SamplesBySeed
from ebbline.analysis.results.tables import categories_frame, frontier_frame, results_frame
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study
from tests.analysis.conftest import REFUSAL, TASK, result, share

OBJECTIVES = (REFUSAL, TASK)


def many(count: int) -> list[Result]:
    """Dominated points but for the last ten, whose refusals rise and whose accuracy falls."""
    return [
        result(n, refusal=0.3, task=0.3)
        if n < count - 10
        else result(n, refusal=0.5 + (n - count) / 50, task=0.5 - (n - count) / 50)
        for n in range(count)
    ]


def test_few_points_are_all_read() -> None:
    found = many(MOST_READ)
    assert shortlist(found, OBJECTIVES) == found
    assert shortlist_note(found) == ""


def test_of_many_points_the_frontier_is_read_and_others_evenly() -> None:
    found = many(20 * MOST_READ)
    chosen = [each.number for each in shortlist(found, OBJECTIVES)]
    assert len(chosen) == MOST_READ
    assert chosen[-10:] == [each.number for each in found[-10:]]
    gaps = [later - earlier for earlier, later in pairwise(chosen)]
    assert max(gaps[:150]) <= 21
    assert f"Of the {len(found)} finished points, {MOST_READ} are in" in shortlist_note(found)


def test_the_samples_of_no_more_points_are_read(study: Study) -> None:
    class Counted:
        read = 0

        def samples(self, subject: object, suite: str) -> SamplesBySeed:
            self.read += 1
            return {0: share(50)}

        def agreement(self, subject: object, suite: str) -> None:
            return None

    evidence, found = Counted(), many(3 * MOST_READ)
    categories_frame(study, found, {}, evidence)
    assert 0 < evidence.read <= MOST_READ * len(study.suites)


def test_the_frontiers_rows_are_those_of_all_results(results: list[Result], tmp_path: Path) -> None:
    whole = results_frame(results, OBJECTIVES)
    rows = whole[whole["on_frontier"] | whole["on_model_frontier"]].reset_index(drop=True)
    frame = frontier_frame(results, OBJECTIVES)
    assert frame.equals(rows[frame.columns])
    assert set(whole.columns) - set(frame.columns) == {
        *(name for name in whole.columns if "[seed=" in name or "gpu_hours" in name),
        *(name for name in whole.columns if "cost_usd" in name or name == "seconds"),
    }
