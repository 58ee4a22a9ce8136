"""Masks: what the search takes for one is what the gate does."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbline.cluster.store.resolver import Resolver
from ebbline.sweeps.search.masks import distinct_masks, mask_of, share, twins, unmeasured
from ebbline.sweeps.search.searcher import space
from ebbline.sweeps.state.todo import todo
from ebbline.sweeps.study.axes import Range
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.stages import StageGraph
from ebbline.tasks.defences.gate import ModuleRow, chosen, write_rows
from ebbline.tasks.identity import digest
from ebbline.tasks.specs import ProjectSpec
from tests.sweeps.made import study
from tests.sweeps.test_stages import fill

COSINES = st.lists(st.integers(-20, 20).map(lambda n: n / 20), min_size=1, max_size=6).map(
    lambda found: np.sort(np.array(found))
)
SEEDS = st.lists(COSINES, min_size=1, max_size=3).map(tuple)


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home")


@pytest.fixture(scope="module")
def ranged(tmp_path_factory):
    axes = {
        "axes": {"train.rank": [2], "apply.threshold": {"low": -0.9, "high": 0.9}},
        "search": {"points": 5},
    }
    return study(tmp_path_factory.mktemp("ranged"), axes)


def taken(values, cosines):
    """What the gate takes of each seed's adapter, by name."""
    return tuple(
        chosen(
            {f"m{n:02}": ModuleRow(float(cosine), 1.0) for n, cosine in enumerate(each)},
            values["apply.threshold"],
            None,
        )
        for each in cosines
    )


@given(cosines=SEEDS, threshold=st.one_of(st.none(), st.floats(-0.9, 0.9)))
def test_two_thresholds_have_one_mask_exactly_when_the_gate_takes_the_same_modules(
    ranged, cosines, threshold
):
    values = {"apply.threshold": threshold}
    found = distinct_masks(ranged, "7b", cosines)
    assert mask_of(ranged, values, cosines) == tuple(len(names) for names in taken(values, cosines))
    same = [mask for mask, each in found.items() if taken(each, cosines) == taken(values, cosines)]
    # A range has no `null`; a threshold below all cosines would be the same mask, and may lie below
    # the range.
    assert same == ([mask_of(ranged, values, cosines)] if threshold is not None or same else [])


@given(cosines=SEEDS)
def test_every_mask_has_a_threshold_of_its_own_within_the_range(ranged, cosines):
    found = distinct_masks(ranged, "7b", cosines)
    thresholds = [values["apply.threshold"] for values in found.values()]
    assert (
        len({taken(values, cosines) for values in found.values()})
        == len(found)
        == len(set(thresholds))
    )
    assert all(-0.9 <= threshold <= 0.9 for threshold in thresholds)
    assert len(found) == len({-0.9, *(c for each in cosines for c in each if -0.9 < c <= 0.9)})
    assert [share(mask, cosines) for mask in sorted(found)] == sorted(
        share(mask, cosines) for mask in found
    )


def test_a_representative_has_as_few_decimals_as_it_takes(ranged):
    found = distinct_masks(ranged, "7b", (np.array([0.301234, 0.352345]),))
    assert found[1,] == {"apply.threshold": 0.33}


def test_a_list_keeps_one_threshold_a_mask_the_first_in_the_file(tmp_path):
    found = study(tmp_path, {"axes/apply.threshold": [None, 0.1, 0.3, 0.35, 0.5, 0.9]})
    assert list(distinct_masks(found, "7b", (np.array([0.2, 0.4]),)).values()) == [
        {"apply.threshold": None},
        {"apply.threshold": 0.3},
        {"apply.threshold": 0.5},
    ]


def test_a_step_leaves_only_its_own_multiples(tmp_path):
    axis = {"low": 0.0, "high": 1.0, "step": 0.25}
    found = study(tmp_path, {"axes/apply.threshold": axis, "search": {"points": 3}})
    masks = distinct_masks(found, "7b", (np.array([0.1, 0.2, 0.6]),))
    assert {mask: values["apply.threshold"] for mask, values in masks.items()} == {
        (0,): 0.0,
        (2,): 0.25,
        (3,): 0.75,
    }


def test_numbers_of_modules_are_masks_and_more_than_there_are_is_none(tmp_path):
    changes = {
        "axes": {"train.rank": [2], "apply.modules": {"low": 0, "high": 5, "step": 1}},
        "search": {"points": 3},
    }
    found = study(tmp_path, changes)
    cosines = (np.array([0.1, 0.2, 0.6]), np.array([0.2, 0.3, 0.4]))
    assert list(distinct_masks(found, "7b", cosines)) == [(n, n) for n in range(4)]
    assert mask_of(found, {"apply.modules": 4}, cosines) is None


def test_both_rules_at_once_are_never_proposed(tmp_path):
    axes = {"train.rank": [2], "apply.threshold": [None, 0.5], "apply.modules": [None, 1]}
    found = study(tmp_path, {"axes": axes})
    both = {"apply.threshold": 0.5, "apply.modules": 1}
    assert both not in unmeasured(found, "7b", 9) and len(unmeasured(found, "7b", 9)) == 3
    assert both not in distinct_masks(found, "7b", (np.array([0.2, 0.6]),)).values()


def test_values_for_an_unknown_adapter_are_of_the_axis(tmp_path):
    found = study(
        tmp_path,
        {"axes/apply.threshold": {"low": 0.2, "high": 0.8, "step": 0.2}, "search": {"points": 3}},
    )
    axis = found.axes["apply.threshold"]
    assert isinstance(axis, Range)
    assert [round(values["apply.threshold"], 9) for values in unmeasured(found, "7b", 9)] == [
        0.2,
        0.4,
        0.6,
        0.8,
    ]


def test_thresholds_between_the_same_cosines_are_measured_once(tmp_path, home):
    graph = StageGraph(
        study(tmp_path, {"axes": {"apply.threshold": [None, 0.1, 0.2, 0.6, 0.7, 1.0]}}), home
    )
    points = list(space(graph.study))
    fill(home.store, graph, [])
    found = todo(graph, points)
    assert twins(found, home.store, 1.0) == frozenset()
    expected = twins(found, home.store, 0.5)  # every second applied adapter equals an earlier one
    assert len(expected) == 3 * 4 and all(
        found.missing[own].stage.kind in ("generate", "score") for own in expected
    )
    made = graph.stages_for(points[0])
    rows = {
        "a": ModuleRow(0.15, 1.0),
        "b": ModuleRow(0.5, 1.0),
        "c": ModuleRow(None, None, "frozen"),
    }
    attempt = commit_projection(home, graph, made, rows)
    assert attempt.kind == "project"
    known = twins(todo(graph, points), home.store, 0.0)
    # none and 0.1 project nothing, 0.2 the one, 0.6, 0.7 and 1.0 both
    assert len(known) == 3 * 4


def test_two_adapters_with_the_same_modules_below_a_threshold_are_two(tmp_path, home):
    graph = StageGraph(
        study(tmp_path, {"axes": {"train.rank": [2, 4], "apply.threshold": [0.2]}}), home
    )
    points = list(space(graph.study))
    fill(home.store, graph, [])
    for point in points:
        rows = {"a": ModuleRow(0.15, 1.0), "b": ModuleRow(0.5, 1.0)}
        commit_projection(home, graph, graph.stages_for(point), rows)
    assert twins(todo(graph, points), home.store, 0.0) == frozenset()


def commit_projection(home, graph, made, rows):
    """The artifacts up to the projection, which has these cosines."""
    for name in ("data[seed=0]", "train[seed=0]", "project[seed=0]"):
        stage, resolver = made[name], Resolver(home.store)
        hashed = resolver.hashed(stage)
        attempt = home.store.begin(stage.kind, digest(hashed))
        for file in ("data.jsonl", "adapter/w"):
            (attempt / "payload" / file).parent.mkdir(exist_ok=True)
            (attempt / "payload" / file).write_text(stage.lineage)  # two adapters differ
        if name.startswith("project"):
            write_rows(rows, attempt / "payload" / ProjectSpec.COSINES)
        artifact = home.store.commit(attempt, hashed, {"seconds": 1.0})
    return artifact
