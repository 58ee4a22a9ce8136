"""What a gang's job reports, by what its members did. The members here are made up; a gang of real
processes is in test_cluster.py and test_gang_memory.py.
"""

from collections.abc import Sequence

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from ebbline.cluster.executors import gang
from ebbline.cluster.executors.executor import MemberFailed
from ebbline.tasks.stage import Report

Outcome = tuple[Report, ...] | Exception | None  # None: the member never ends


class Members:
    """Ray, whose runs have these outcomes and end in this order."""

    def __init__(self, outcomes: dict[str, Outcome]) -> None:
        self.outcomes = outcomes
        self.waited_s: list[float | None] = []

    def wait(
        self, runs: Sequence[str], num_returns: int, timeout: float | None = None
    ) -> tuple[list[str], list[str]]:
        ended = [run for run in self.outcomes if run in runs and self.outcomes[run] is not None]
        assert ended or timeout is not None, "it would wait for ever"
        self.waited_s.append(timeout)
        done = ended[:num_returns]
        return done, [run for run in runs if run not in done]

    def get(self, run: str) -> Outcome:
        outcome = self.outcomes[run]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def raised(cause: Exception) -> RayTaskError:
    return RayTaskError("run", "a traceback", cause)


def failed(error: str) -> RayTaskError:
    return raised(MemberFailed(Report("key", 1.0, error=error)))


DONE = (Report("key", 9.0),)
DIED = ActorDiedError()


def reports(monkeypatch, outcomes: dict[str, Outcome]) -> tuple[tuple[Report, ...], Members]:
    members = Members(outcomes)
    monkeypatch.setattr(gang, "ray", members)
    return gang._reports(sorted(outcomes)), members


def test_the_reports_of_a_gang_are_those_of_rank_0(monkeypatch):
    found, members = reports(monkeypatch, {"rank 1": (), "rank 0": DONE})
    assert found == DONE and members.waited_s == [None, None]


@pytest.mark.parametrize("other", [None, failed("a broken collective"), raised(OSError("closed"))])
def test_the_report_of_the_first_member_that_failed_is_the_gangs(monkeypatch, other):
    found, members = reports(monkeypatch, {"rank 1": failed("no row fits"), "rank 0": other})
    assert [report.error for report in found] == ["no row fits"]
    assert members.waited_s == [None, gang.LAST_REPORTS_S], "a peer may have died before"


@pytest.mark.parametrize(
    "outcomes",
    [
        {"rank 1": DIED, "rank 0": None},
        {"rank 0": failed("a broken collective"), "rank 1": DIED},
        {"rank 0": DONE, "rank 1": DIED},
    ],
    ids=["first", "after a report of its peer", "after rank 0 has ended"],
)
def test_a_member_that_died_fails_the_gang_even_if_another_has_reported(monkeypatch, outcomes):
    with pytest.raises(gang.GangFailed, match="ActorDiedError") as caught:
        reports(monkeypatch, outcomes)
    assert caught.value.died


def test_a_member_that_raised_without_a_report_fails_the_gang_with_its_reason(monkeypatch):
    with pytest.raises(gang.GangFailed, match="TimeoutError: nobody came") as caught:
        reports(monkeypatch, {"rank 1": raised(TimeoutError("nobody came")), "rank 0": None})
    assert not caught.value.died and not caught.value.killed_for_memory
