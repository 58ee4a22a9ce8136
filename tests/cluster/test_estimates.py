"""Predicted seconds of stages: counted work times the measured factor of the narrowest category.
And the overhead of jobs.
"""

import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbline.cluster.executors.executor import ACCELERATOR_TYPE, Capacity, Host, Needs
from ebbline.cluster.executors.starts import StartCosts, Starts, WarmProcesses
from ebbline.cluster.schedule import digest_set
from ebbline.cluster.schedule.counted_work import load_of, machine_of, seconds_on
from ebbline.cluster.schedule.estimates import Estimates, _interpolated, load_record
from ebbline.cluster.store.artifacts import Store
from ebbline.tasks.identity import digest
from ebbline.tasks.specs import TrainSpec
from ebbline.tasks.stage import Source, Stage, key_payload
from tests.cluster.test_work import ROWS, SEVEN_B, SEVENTY_B, one_of, one_of_each, train

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
    """Commit an artifact as if the stage had run for `seconds`."""
    hashed = key_payload(stage.spec, {name: item.lineage for name, item in stage.inputs.items()})
    attempt = store.begin(stage.kind, digest(hashed))
    (attempt / "payload" / "f").write_text(content or stage.lineage)
    provenance = {"seconds": seconds, "gpus": gpus, "gpu_type": gpu_type}
    return store.commit(
        attempt, hashed, {**provenance, "load": load_record(load_of(stage))} if load else provenance
    )


def counted(stage: Stage, gpu_type: str | None = None, gpus: int = 1) -> float:
    return seconds_on(machine_of(gpu_type), load_of(stage), gpus)


def test_a_landed_stage_leaves_its_digest_and_nothing_else(store, monkeypatch):
    """A driver of a long study learns tens of thousands of stages."""
    monkeypatch.setattr(digest_set, "PACK_AT", 500)
    made, count = record(store, one_of("apply"), 50.0, content="one"), 2000
    estimates = Estimates(store)
    estimates.learn([made])
    keys = [(digest(number), digest(-1 - number)) for number in range(count)]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for key, content in keys:
            estimates.learn([replace(made, key=key, content=content)])
        assert (tracemalloc.get_traced_memory()[0] - before) / count < 100  # of two digests
    finally:
        tracemalloc.stop()
    assert estimates.distinct_adapters == 1.0


def test_a_prediction_that_no_stage_needs_any_more_is_let_go(store):
    record(store, train(steps=100), 50.0)
    estimates, stages = Estimates(store), [train(steps=steps) for steps in range(100, 120)]
    before = [estimates.seconds(stage) for stage in stages]
    estimates.forget(stage.lineage for stage in stages[1:])
    assert len(estimates._alike) == len(estimates._numbers) == len(estimates._predictions) == 1
    assert [estimates.seconds(stage) for stage in stages] == before


def test_without_measurements_the_prediction_is_the_counted_work(store):
    estimates = Estimates(store)
    for stage in one_of_each():
        assert estimates.seconds(stage, Needs(1)) == pytest.approx(counted(stage))
        assert not estimates.measured(stage, Needs(1))


def test_measured_seconds_are_predicted_for_equal_work_and_scaled_for_other_work(store):
    record(store, train(steps=100), 50.0)
    estimates = Estimates(store)
    assert estimates.seconds(train(steps=100, seed=3)) == pytest.approx(50.0)
    longer = train(steps=300)
    assert estimates.seconds(longer) == pytest.approx(
        50.0 * counted(longer) / counted(train(steps=100))
    )
    assert estimates.measured(longer, Needs(1)) and not estimates.measured(
        one_of("generate"), Needs(1)
    )


@pytest.mark.slow
@given(st.integers(10, 1000), st.floats(0.2, 5.0), st.floats(0.2, 5.0))
def test_the_factor_between_two_sizes_lies_between_their_factors(
    tmp_path_factory, steps, small, large
):
    store = Store(tmp_path_factory.mktemp("store"))
    for each, factor in ((10, small), (1000, large)):
        record(store, train(steps=each), factor * counted(train(steps=each)))
    factor = Estimates(store).seconds(train(steps=steps)) / counted(train(steps=steps))
    assert min(small, large) * 0.999 <= factor <= max(small, large) * 1.001


def test_the_factor_half_way_between_two_sizes_is_their_geometric_mean():
    # In logarithms 10 is half way between 1 and 100, and 2 is half way between 1 and 4.
    assert _interpolated({1.0: [1.0], 100.0: [4.0]}, 10.0) == pytest.approx(2.0)


def test_the_narrowest_category_with_measurements_is_used(store):
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
    )  # no int8 training was measured: the category of all trainings
    generate = one_of("generate")  # none of its kind was measured: all stages on such a machine
    assert 2 * counted(generate) <= estimates.seconds(generate) <= 3 * counted(generate)


def test_a_gpu_type_has_its_own_factors_and_a_type_without_measurements_uses_others(store):
    record(store, train(steps=100), 4 * counted(train(steps=100)))
    record(store, train(steps=100, seed=1), 2 * counted(train(steps=100), "A100"), gpu_type="A100")
    estimates = Estimates(store)
    stage = train(steps=200)
    assert estimates.seconds(stage) == pytest.approx(4 * counted(stage))
    assert estimates.seconds(stage, Needs(1, A100)) == pytest.approx(2 * counted(stage, "A100"))
    # Stages without labels count as run on the most common type.
    estimates.learn_gpu_type(Capacity((Host("a", 8, 2, A100), Host("b", 1, 2))))
    assert estimates.seconds(stage) == pytest.approx(2 * counted(stage, "A100"))
    smaller = (Host(name, 1, 2) for name in "bcd")
    estimates.learn_gpu_type(Capacity((Host("a", 8, 2, A100), *smaller)))
    assert estimates.gpu_type == "A100", "types are counted by GPUs, not by hosts"
    other = Needs(1, {ACCELERATOR_TYPE: "H100"})
    assert (
        2 * counted(stage, "H100") <= estimates.seconds(stage, other) <= 4 * counted(stage, "H100")
    )


def test_a_gang_divides_the_work_and_uses_measurements_of_gangs_if_any(store):
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


def test_a_new_measurement_counts_immediately_and_once(store):
    estimates, stage = Estimates(store), train(steps=10)
    artifact = record(store, train(steps=10, seed=1), 30.0)
    for _ in range(3):
        estimates.learn([artifact])
    assert estimates.seconds(stage) == pytest.approx(30.0)
    estimates.learn([record(store, train(steps=10, seed=2), 50.0)])
    assert estimates.seconds(stage) == pytest.approx(40.0), "the mean, not the median"


def test_records_without_counted_work_predict_their_measured_seconds(store):
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


def test_the_share_of_distinct_adapters_is_one_until_there_are_enough(store):
    from ebbline.tasks.specs import ApplySpec

    adapter = one_of("apply").inputs
    for number in range(12):
        stage = Stage(ApplySpec(threshold=number / 100), dict(adapter))
        record(store, stage, 0.1, gpus=0, content=str(number // 2))
        assert Estimates(store).distinct_adapters == (
            1.0 if number < 9 else len(range(0, number + 1, 2)) / (number + 1)
        )


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=40))
def test_a_host_keeps_as_many_warm_processes_as_it_ever_ran_at_once(moves):
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


def test_slots_and_gpus_have_separate_processes_and_a_gang_needs_new_ones():
    warm = WarmProcesses()
    assert warm.start("a", {"h": 1}) and warm.start("b", {"h": 0})
    warm.end("a")
    assert warm.would_be_new({"h": 0}) and not warm.would_be_new({"h": 1})
    assert warm.would_be_new({"h": 2}) and warm.start("gang", {"h": 1, "i": 1})
    warm.end("gang")
    assert warm.would_be_new({"i": 1})


def test_an_overhead_is_the_default_until_measured_and_then_the_median():
    defaults = StartCosts(new_s=7.0, kept_s=0.25, gang_s=21.0, new_after_real_gpu=True)
    starts = Starts(defaults)
    assert starts.seconds(None, 1, new=True) == 7.0 and starts.seconds(None, 1) == 0.25
    assert starts.seconds(None, 0, new=True) == defaults.new_without_gpu_s
    assert starts.seconds("A100", 1) == 7.0 and starts.seconds("A100", 4) == 21.0
    assert Starts(StartCosts(kept_s=0.25)).seconds("A100", 1) == 0.25
    for seconds in (3.0, 9.0, 4.0, -1.0):
        starts.learn(None, 1, True, seconds)
    assert starts.seconds(None, 1, new=True) == 4.0 and starts.seconds(None, 1) == 0.25
    assert starts.seconds("L4", 1, new=True) == 4.0, "another type's measurement, not the default"
    starts.learn(None, 2, True, 30.0)
    assert starts.seconds(None, 8) == 30.0


def test_a_guessed_size_costs_a_budget_nothing_until_a_stage_like_it_is_measured(store):
    unnamed, named = (Source(name, f"/nowhere/{name}") for name in ("mine", "mine-7b"))
    guess, known = train(unnamed, steps=100), train(named, steps=100)
    estimates = Estimates(store)
    assert estimates.guessed(guess, Needs(1)) and not estimates.guessed(known, Needs(1))
    assert estimates.budgeted(guess, Needs(1)) == 0.0 < estimates.seconds(guess, Needs(1))
    assert estimates.budgeted(known, Needs(1)) == estimates.seconds(known, Needs(1))
    record(store, train(SEVEN_B, steps=1), 1.0)
    assert Estimates(store).guessed(guess, Needs(1)), "that was much less work"
    record(store, guess, 50.0)
    estimates = Estimates(store)
    assert estimates.budgeted(guess, Needs(1)) == pytest.approx(50.0)
