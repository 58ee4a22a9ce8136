"""Estimates: counted work times what was measured of the nearest like; and what jobs take to
start.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbline.cluster.executors.executor import ACCELERATOR_TYPE, Capacity, Host, Needs
from ebbline.cluster.executors.starts import StartCosts, Starts, WarmProcesses
from ebbline.cluster.schedule.counted_work import load_of, machine_of, seconds_on
from ebbline.cluster.schedule.estimates import Estimates, _between, described
from ebbline.cluster.store.artifacts import Store
from ebbline.tasks.identity import digest
from ebbline.tasks.specs import TrainSpec
from ebbline.tasks.stage import Stage, key_payload
from tests.cluster.test_work import ROWS, SEVEN_B, SEVENTY_B, one_of_each, train

A100 = {ACCELERATOR_TYPE: "A100"}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def record(
    store: Store,
    stage: Stage,
    seconds: float,
    gpus: int = 1,
    gpu_type: str | None = None,
    load: bool = True,
    content: str = "",
):
    """Commit an artifact as if the stage had run so long."""
    hashed = key_payload(stage.spec, {name: item.lineage for name, item in stage.inputs.items()})
    attempt = store.begin(stage.kind, digest(hashed))
    (attempt / "payload" / "f").write_text(content or stage.lineage)
    said = {"seconds": seconds, "gpus": gpus, "gpu_type": gpu_type}
    return store.commit(
        attempt, hashed, {**said, "load": described(load_of(stage))} if load else said
    )


def counted(stage: Stage, gpu_type: str | None = None, gpus: int = 1) -> float:
    return seconds_on(machine_of(gpu_type), load_of(stage), gpus)


def test_before_anything_was_measured_a_stage_takes_its_counted_work(store):
    estimates = Estimates(store)
    for stage in one_of_each():
        assert estimates.seconds(stage, Needs(1)) == pytest.approx(counted(stage))
        assert not estimates.measured(stage, Needs(1))


def test_what_was_measured_is_expected_again_and_other_work_in_proportion(store):
    record(store, train(steps=100), 50.0)
    estimates = Estimates(store)
    assert estimates.seconds(train(steps=100, seed=3)) == pytest.approx(50.0)
    longer = train(steps=300)
    assert estimates.seconds(longer) == pytest.approx(
        50.0 * counted(longer) / counted(train(steps=100))
    )
    assert estimates.measured(longer, Needs(1)) and not estimates.measured(
        one_of_each()[8], Needs(1)
    )


@pytest.mark.slow
@given(st.integers(10, 1000), st.floats(0.2, 5.0), st.floats(0.2, 5.0))
def test_between_two_sizes_the_factor_lies_between_theirs(tmp_path_factory, steps, small, large):
    store = Store(tmp_path_factory.mktemp("store"))
    for each, factor in ((10, small), (1000, large)):
        record(store, train(steps=each), factor * counted(train(steps=each)))
    factor = Estimates(store).seconds(train(steps=steps)) / counted(train(steps=steps))
    assert min(small, large) * 0.999 <= factor <= max(small, large) * 1.001


def test_the_factor_half_way_between_two_sizes_is_their_geometric_mean():
    # Half way by the logarithm: 10 lies between 1 and 100 as 2 does between 1 and 4.
    assert _between({1.0: [1.0], 100.0: [4.0]}, 10.0) == pytest.approx(2.0)


def test_the_nearest_like_counts_and_the_next_only_without_it(store):
    record(
        store,
        train(steps=100, quantisation="nf4"),
        3 * counted(train(steps=100, quantisation="nf4")),
    )
    record(store, train(steps=100), 2 * counted(train(steps=100)))
    estimates = Estimates(store)
    assert estimates.seconds(train(SEVENTY_B, steps=100)) == pytest.approx(
        2 * counted(train(SEVENTY_B, steps=100))
    )
    nf4, int8 = (train(steps=50, quantisation=how) for how in ("nf4", "int8"))
    assert estimates.seconds(nf4) == pytest.approx(3 * counted(nf4))
    assert (
        2 * counted(int8) < estimates.seconds(int8) < 3 * counted(int8)
    )  # nothing like it: all trainings together
    generate = one_of_each()[8]  # nothing of its kind: all that ran on such a machine
    assert 2 * counted(generate) <= estimates.seconds(generate) <= 3 * counted(generate)


def test_a_type_of_gpu_has_factors_of_its_own_and_lends_them_to_a_type_without(store):
    record(store, train(steps=100), 4 * counted(train(steps=100)))
    record(store, train(steps=100, seed=1), 2 * counted(train(steps=100), "A100"), gpu_type="A100")
    estimates = Estimates(store)
    stage = train(steps=200)
    assert estimates.seconds(stage) == pytest.approx(4 * counted(stage))
    assert estimates.seconds(stage, Needs(1, A100)) == pytest.approx(2 * counted(stage, "A100"))
    estimates.met(
        Capacity((Host("a", 8, 2, A100), Host("b", 1, 2)))
    )  # the commonest type, for those without labels
    assert estimates.seconds(stage) == pytest.approx(2 * counted(stage, "A100"))
    smaller = (Host(name, 1, 2) for name in "bcd")
    estimates.met(Capacity((Host("a", 8, 2, A100), *smaller)))
    assert estimates.gpu_type == "A100", "by GPUs, not by hosts"
    other = Needs(1, {ACCELERATOR_TYPE: "H100"})
    assert (
        2 * counted(stage, "H100") <= estimates.seconds(stage, other) <= 4 * counted(stage, "H100")
    )


def test_a_gang_shares_the_work_and_goes_by_gangs_once_there_are_some(store):
    estimates, stage = Estimates(store), train(SEVENTY_B, steps=1000)
    assert estimates.seconds(stage, Needs(4, A100)) < 0.5 * estimates.seconds(stage, Needs(1, A100))
    record(
        store,
        train(SEVENTY_B, steps=500),
        7 * counted(train(SEVENTY_B, steps=500), "A100", 4),
        gpus=4,
        gpu_type="A100",
    )
    assert Estimates(store).seconds(stage, Needs(4, A100)) == pytest.approx(
        7 * counted(stage, "A100", 4)
    )


def test_what_is_learnt_while_a_study_runs_counts_at_once_and_once(store):
    estimates, stage = Estimates(store), train(steps=10)
    made = record(store, train(steps=10, seed=1), 30.0)
    for _ in range(3):
        estimates.learn([made])
    assert estimates.seconds(stage) == pytest.approx(30.0)
    estimates.learn([record(store, train(steps=10, seed=2), 50.0)])
    assert estimates.seconds(stage) == pytest.approx(
        40.0
    )  # the mean: the first of a batch loads the model for all


def test_records_that_do_not_say_their_work_are_gone_by_as_they_are(store):
    for rank, seconds in ((1, 10.0), (2, 30.0), (4, 20.0)):
        record(
            store,
            Stage(TrainSpec(rank=rank), {"model": SEVEN_B, "data": ROWS}),
            seconds,
            load=False,
        )
    assert Estimates(store).seconds(train(rank=64)) == 20.0
    record(store, train(steps=100), 50.0)
    assert Estimates(store).seconds(train(steps=100)) == pytest.approx(50.0)


def test_the_share_of_distinct_adapters_is_one_until_there_are_enough_to_tell(store):
    from ebbline.tasks.specs import ApplySpec

    adapter = one_of_each()[7].inputs
    for number in range(12):
        stage = Stage(ApplySpec(threshold=number / 100), dict(adapter))
        record(store, stage, 0.1, gpus=0, content=str(number // 2))
        assert Estimates(store).distinct_adapters == (
            1.0 if number < 9 else len(range(0, number + 1, 2)) / (number + 1)
        )


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=40))
def test_a_host_keeps_as_many_processes_as_it_ever_ran_at_once(moves):
    warm, running, most, opened = (
        WarmProcesses(),
        dict[str, list[str]](),
        dict[str, int](),
        dict[str, int](),
    )
    for number, (host, ends) in enumerate(moves):
        own = running.setdefault(host, [])
        if ends and own:
            warm.end(own.pop())
        else:
            opened[host] = opened.get(host, 0) + warm.start(str(number), {host: 1})
            own.append(str(number))
        most[host] = max(most.get(host, 0), len(own))
    assert all(opened.get(host, 0) == count for host, count in most.items())


def test_slots_and_gpus_have_processes_of_their_own_and_a_gang_never_finds_one():
    warm = WarmProcesses()
    assert warm.start("a", {"h": 1}) and warm.start("b", {"h": 0})
    warm.end("a")
    assert warm.would_be_new({"h": 0}) and not warm.would_be_new({"h": 1})
    assert warm.would_be_new({"h": 2}) and warm.start("gang", {"h": 1, "i": 1})
    warm.end("gang")
    assert warm.would_be_new({"i": 1})


def test_a_start_is_guessed_until_it_was_measured_and_then_the_median():
    guesses = StartCosts(new_s=7.0, kept_s=0.25, gang_s=21.0, new_after_real_gpu=True)
    starts = Starts(guesses)
    assert starts.seconds(None, 1, new=True) == 7.0 and starts.seconds(None, 1) == 0.25
    assert starts.seconds("A100", 1) == 7.0 and starts.seconds("A100", 4) == 21.0
    assert Starts(StartCosts(kept_s=0.25)).seconds("A100", 1) == 0.25
    for seconds in (3.0, 9.0, 4.0, -1.0):
        starts.learn(None, 1, True, seconds)
    assert starts.seconds(None, 1, new=True) == 4.0 and starts.seconds(None, 1) == 0.25
    assert starts.seconds("L4", 1, new=True) == 4.0  # the same on another type, rather than a guess
    starts.learn(None, 2, True, 30.0)
    assert starts.seconds(None, 8) == 30.0
