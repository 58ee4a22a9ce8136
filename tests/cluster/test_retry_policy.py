"""Lost stages: which losses count, when a stage is retried, and that retries are bounded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbline.cluster.executors.executor import Capacity, Host, Loss
from ebbline.cluster.schedule.retry_policy import MOST_EVICTIONS, RetryPolicy
from ebbline.tasks.errors import ClusterLost

CRASH, GONE = Loss("the worker died"), Loss("the node is gone", "place")


def test_a_lost_stage_waits_twice_as_long_each_time_and_then_fails():
    policy = RetryPolicy(tries=3, backoff_s=5.0)
    assert policy.may_start("k", 0.0) and policy.shun("k") == frozenset()
    assert policy.count("k", CRASH, ["a"], 100.0, now=0.0) is None
    assert not policy.may_start("k", 4.9) and policy.may_start("k", 5.0)
    assert policy.count("k", CRASH, ["b"], 100.0, now=10.0) is None
    assert not policy.may_start("k", 19.9) and policy.may_start("k", 20.0)
    assert policy.count("k", CRASH, ["a"], 100.0, now=20.0) == "lost 3 times (the worker died)"
    assert policy.shun("k") == {"a", "b"} and policy.may_start("other", 0.0)


def test_a_kill_for_memory_does_not_count_while_the_micro_batch_can_be_halved():
    policy, killed = RetryPolicy(tries=2, backoff_s=5.0), Loss("OutOfMemoryError", "memory")
    for n in range(3):
        assert policy.count("k", killed, ["a"], 1.0, 0.0, attempt=f"{n}", halvings=3) is None
        assert policy.may_start("k", 0.0) and policy.lost("k") == 0
    assert policy.killed("k") == ("0", "1", "2") and policy.killed("other") == ()
    assert policy.count("k", killed, ["a"], 1.0, 0.0, attempt="3", halvings=3) is None
    assert not policy.may_start("k", 4.9) and policy.killed("k") == ("0", "1", "2")
    assert (
        policy.count("k", killed, ["a"], 1.0, 9.0, halvings=3) == "lost 2 times (OutOfMemoryError)"
    )
    assert (
        policy.count("no batch", killed, ["a"], 1.0, 0.0) is None and policy.lost("no batch") == 1
    )


def test_the_loss_of_a_host_is_not_counted_and_the_stage_is_retried_at_once():
    policy = RetryPolicy(tries=1, backoff_s=5.0)
    for number in range(50):
        assert policy.count("k", GONE, [f"host {number}"], lived_s=600.0, now=0.0) is None
        assert policy.may_start("k", 0.0)
    assert policy.lost("k") == 0


def test_a_stage_that_is_evicted_repeatedly_waits_and_then_stops_the_run():
    policy = RetryPolicy(tries=3, backoff_s=1.0)
    waits = []
    for number in range(MOST_EVICTIONS - 1):
        policy.count("k", GONE, [f"host {number}"], lived_s=1.0, now=0.0)
        waits.append(next(second for second in range(10_000) if policy.may_start("k", second)))
    assert waits == [0, *(2**number for number in range(MOST_EVICTIONS - 2))]
    with pytest.raises(
        ClusterLost, match=f"lost by its host {MOST_EVICTIONS} times in a row within 60 s"
    ):
        policy.count("k", GONE, ["last"], lived_s=1.0, now=0.0)


def test_a_long_run_resets_the_count_of_evictions():
    policy = RetryPolicy(tries=3, backoff_s=5.0)
    for now, lived_s in ((0.0, 1.0), (10.0, 1.0), (700.0, 600.0), (800.0, 1.0)):
        policy.count("k", GONE, ["a"], lived_s, now)
    assert policy.may_start("k", 800.0)
    policy.count("k", GONE, ["a"], 1.0, now=900.0)
    assert not policy.may_start("k", 904.9) and policy.may_start("k", 905.0)


def test_a_host_that_only_loses_stages_gets_no_work_while_another_is_left():
    here, there = Host("here", 1, 1), Host("there", 1, 1)
    policy = RetryPolicy(tries=3, backoff_s=1.0)
    for key in "abc":
        policy.count(key, CRASH, ["here"], 1.0, 0.0)
    assert [host.draining for host in policy.in_service(Capacity((here, there))).hosts] == [
        True,
        False,
    ]
    assert policy.in_service(Capacity((here,))) == Capacity((here,)), (
        "the last host is kept; the tries of each stage bound the losses"
    )


def test_hosts_that_finished_a_stage_or_lost_one_stage_repeatedly_stay_in_service():
    both = Capacity((Host("here", 1, 1), Host("there", 1, 1)))
    policy = RetryPolicy(tries=10, backoff_s=1.0)
    for key in "aaaaaab":
        policy.count(key, CRASH, ["here"], 1.0, 0.0)
    assert policy.in_service(both) == both
    policy.succeeded(["here"])
    for key in "cd":
        policy.count(key, CRASH, ["here"], 1.0, 0.0)
    assert policy.in_service(both) == both


@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.sampled_from(["x", "y", "z"]), st.booleans()),
        max_size=60,
    )
)
def test_no_stage_exceeds_its_tries_and_some_host_always_stays(events):
    policy = RetryPolicy(tries=3, backoff_s=1.0)
    hosts = Capacity(tuple(Host(name, 1, 1) for name in "xyz"))
    failed: set[str] = set()
    for key, host, crashed in events:
        if key not in failed and policy.count(key, CRASH if crashed else GONE, [host], 600.0, 0.0):
            failed.add(key)
        assert policy.lost(key) <= 3 and (policy.lost(key) == 3) == (key in failed)
        assert policy.in_service(hosts).gpus >= 1
