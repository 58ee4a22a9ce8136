"""The simulated cluster: a virtual clock that runs a graph with the real scheduler."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbline.cluster.executors.executor import Capacity, Host, Needs
from ebbline.cluster.schedule.scheduler import LONGEST_BATCH_S
from ebbline.cluster.schedule.simulate import (
    SimulatedExecutor,
    Step,
    StepGroups,
    Trace,
    bound_s,
    simulate,
)
from ebbline.cluster.store.artifacts import Store
from ebbline.tasks.errors import StudyError
from ebbline.tasks.specs import DataSpec
from tests.cluster.made import stored_request

TWO_HOSTS = Capacity((Host("h0", 4, 2), Host("h1", 4, 2)))


def step(key: str, seconds: float, *after: str, gpus: int = 1, resident: str = "base") -> Step:
    return Step(key, Needs(gpus), resident, seconds, seconds, after)


@st.composite
def graphs(draw):
    steps: list[Step] = []
    for index in range(draw(st.integers(0, 15))):
        after = (
            draw(st.sets(st.sampled_from([each.key for each in steps]), max_size=2))
            if steps
            else set()
        )
        seconds, wrong = (
            draw(st.sampled_from([1.0, 30.0, 700.0])),
            draw(st.sampled_from([0.3, 1.0, 3.0])),
        )
        needs = Needs(draw(st.sampled_from([0, 1, 1, 2, 4, 8])), spread=draw(st.booleans()))
        steps.append(
            Step(
                f"k{index}",
                needs,
                draw(st.sampled_from("ab")),
                seconds * wrong,
                seconds,
                tuple(sorted(after)),
            )
        )
    return steps


def most_held(trace: Trace, host: str) -> int:
    events = [(span.start_s, 1, span.hosts.get(host, 0)) for span in trace.spans]
    events += [(span.end_s, 0, -span.hosts.get(host, 0)) for span in trace.spans]
    held = most = 0
    for _, _, gpus in sorted(events):
        held += gpus
        most = max(most, held)
    return most


@given(graphs())
def test_each_step_runs_once_after_its_inputs_and_no_host_exceeds_its_gpus(steps):
    trace = simulate(steps, TWO_HOSTS)
    spans = {span.key: span for span in trace.spans}
    assert len(spans) == len(trace.spans)
    assert spans.keys() | set(trace.never) == {each.key for each in steps}
    for each in steps:
        if each.key in spans:
            span = spans[each.key]
            assert span.end_s - span.start_s == pytest.approx(each.seconds)
            assert (
                span.ready_s
                == max((spans[above].end_s for above in each.after), default=0.0)
                <= span.start_s
            )
    assert all(most_held(trace, host.name) <= host.gpus for host in TWO_HOSTS.hosts)
    assert 0.0 <= trace.utilisation <= 1.0 + 1e-9


@given(graphs())
def test_no_makespan_is_below_the_bound(steps):
    trace = simulate(steps, TWO_HOSTS)
    if not trace.never:
        assert trace.makespan_s >= bound_s(steps, TWO_HOSTS) - 1e-9


@pytest.mark.slow
@given(graphs())
def test_only_impossible_steps_and_their_downstream_steps_never_run(steps):
    dead: set[str] = set()
    for each in steps:
        if (each.needs.gpus == 8 and not each.needs.spread) or dead & set(each.after):
            dead.add(each.key)
    assert set(simulate(steps, TWO_HOSTS).never) == dead


def test_the_same_graph_gives_the_same_trace():
    steps = [step(f"k{number}", 5.0 + number, gpus=1 + number % 4) for number in range(40)]
    assert simulate(steps, TWO_HOSTS).spans == simulate(steps, TWO_HOSTS).spans


def test_the_longest_chain_goes_first_and_sets_the_makespan():
    steps = [
        step("a", 10.0),
        step("b", 10.0, "a"),
        step("c", 10.0, "b"),
        *(step(f"small{n}", 10.0, resident=f"r{n}") for n in range(3)),
    ]
    trace = simulate(steps, Capacity.one_host(2, 1))
    assert trace.makespan_s == bound_s(steps, Capacity.one_host(2, 1)) == 30.0
    assert trace.utilisation == 1.0


def test_a_step_starts_as_soon_as_its_input_in_a_batch_has_ended():
    steps = [
        step("first", 5.0),
        step("second", 4.0),
        step("reader", 1.0, "first", resident="other"),
    ]
    trace = simulate(steps, Capacity.one_host(2, 1))
    spans = {span.key: span for span in trace.spans}
    assert spans["second"].start_s == 5.0  # one batch
    assert spans["reader"].start_s == 5.0


def test_wrong_estimates_change_the_schedule_but_not_the_duration_of_a_step():
    steps = [step(f"k{number}", LONGEST_BATCH_S) for number in range(8)]
    wrong = [replace(each, expected_s=1.0) for each in steps]
    trace = simulate(wrong, Capacity.one_host(4, 1))
    assert {span.end_s - span.start_s for span in trace.spans} == {LONGEST_BATCH_S}
    # All eight were expected to be short, so they formed one batch on one GPU.
    assert trace.makespan_s > simulate(steps, Capacity.one_host(4, 1)).makespan_s


def test_an_unknown_input_or_a_cycle_is_an_error_with_its_steps():
    with pytest.raises(StudyError, match="'a' reads from 'gone'"):
        simulate([step("a", 1.0, "gone")], TWO_HOSTS)
    with pytest.raises(StudyError, match="cycle: a, b"):
        simulate([step("a", 1.0, "b"), step("b", 1.0, "a"), step("c", 1.0)], TWO_HOSTS)


def test_only_waiting_moves_the_clock_of_the_executor(tmp_path: Path):
    (tmp_path / "pool.jsonl").write_text('{"messages": []}\n')
    store = Store(tmp_path / "store")
    one, two = (
        stored_request(store, DataSpec(size=size, seed=0), {"pool": tmp_path / "pool.jsonl"})
        for size in (1, 2)
    )
    executor = SimulatedExecutor(TWO_HOSTS, {one.key: 10.0, two.key: 3.0}.__getitem__)
    job = executor.submit([one, two], Needs(1), {"h0": 1})
    assert executor.now_s == 0.0
    assert executor.finished(5.0) == []
    assert executor.now_s == 5.0
    done = executor.finished(100.0)
    assert executor.now_s == 13.0
    assert [(each.job, [report.key for report in each.reports], each.lost) for each in done] == [
        (job, [one.key, two.key], None)
    ]


def test_a_cancelled_job_never_ends_and_takes_no_time():
    executor = SimulatedExecutor(TWO_HOSTS, lambda _: 10.0)
    kept, gone = (
        executor.start(["kept"], Needs(1), {"h0": 1}),
        executor.start(["gone"], Needs(1), {"h0": 1}),
    )
    executor.cancel(gone)
    assert [done.job for done in executor.finished(100.0)] == [kept]
    assert executor.finished(100.0) == []
    assert executor.now_s == 10.0


def test_the_start_of_a_job_takes_time_and_a_warm_process_takes_less():
    steps = [step(f"k{number}", 10.0, resident=f"r{number}") for number in range(4)]
    calls: list[bool] = []

    def start_s(needs: Needs, hosts, new: bool) -> float:
        calls.append(new)
        return 5.0 if new else 1.0

    trace = simulate(steps, Capacity.one_host(2, 1), start_s=start_s)
    assert calls == [True, True, False, False]
    assert trace.makespan_s == 5.0 + 10.0 + 1.0 + 10.0


@given(graphs(), st.integers(1, 4), st.booleans())
def test_all_groups_end_and_at_most_window_groups_are_in_flight(steps, window, in_turn):
    above = {each.key: set(each.after) for each in steps}

    def whole(key: str) -> set[str]:
        return {key}.union(*(whole(other) for other in above[key]))

    groups = [tuple(sorted(whole(each.key))) for each in steps]
    trace = simulate(steps, TWO_HOSTS, groups=StepGroups(groups, window, in_turn))
    ends, starts = (
        {span.key: span.end_s for span in trace.spans},
        {span.key: span.start_s for span in trace.spans},
    )
    assert starts.keys() | set(trace.never) == above.keys()
    if trace.never:
        return
    ended: list[float] = []
    for number, group in enumerate(groups):
        end_s = max(ends[key] for key in group)
        ended.append(max([end_s, *ended[-1:]]) if in_turn else end_s)
        own = set(group) - {key for earlier in groups[:number] for key in earlier}
        if own:
            started_s = min(starts[key] for key in own)
            assert sum(end > started_s + 1e-9 for end in ended[:number]) < window


def test_only_in_turn_a_slow_group_delays_the_groups_after_it():
    steps = [
        step("slow", 100.0, resident="r0"),
        *(step(f"k{number}", 10.0, resident=f"r{number}") for number in range(1, 8)),
    ]
    groups = [("slow",), *((f"k{number}",) for number in range(1, 8))]
    held, free = (
        simulate(steps, Capacity.one_host(2, 1), groups=StepGroups(groups, 2, in_turn))
        for in_turn in (True, False)
    )
    assert free.makespan_s == 100.0 and held.makespan_s > 120.0


def test_no_group_starts_while_the_ready_steps_need_enough_gpus():
    steps = [step(f"k{number}", 10.0, resident=f"r{number}") for number in range(40)]
    trace = simulate(
        steps, TWO_HOSTS, groups=StepGroups([(each.key,) for each in steps], 100, most_gpus=12)
    )
    assert trace.makespan_s == 50.0 and trace.utilisation == pytest.approx(1.0)
    assert max(decision.ready for decision in trace.decisions) == 12
