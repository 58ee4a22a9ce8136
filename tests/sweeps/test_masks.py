"""Masks: equal for the search exactly when the gate projects the same modules."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbline.cluster.store.resolver import Resolver
from ebbline.sweeps.search.masks import distinct_masks, duplicates, mask_of, unmeasured
from ebbline.sweeps.search.searcher import space
from ebbline.sweeps.state.todo import todo
from ebbline.sweeps.study.axes import Range
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.stages import StageGraph
from ebbline.tasks.defences.gate import ModuleRow, chosen, write_rows
from ebbline.tasks.defences.safe_lora import SAFE_LORA
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


def projected(values, cosines):
    """The names of the modules that the gate projects, for each seed's adapter."""
    return tuple(
        chosen(
            {f"m{n:02}": ModuleRow(float(cosine), 1.0) for n, cosine in enumerate(each)},
            values["apply.threshold"],
            None,
        )
        for each in cosines
    )


@given(cosines=SEEDS, threshold=st.one_of(st.none(), st.floats(-0.9, 0.9)))
def test_thresholds_have_the_same_mask_exactly_when_the_gate_projects_the_same_modules(
    ranged, cosines, threshold
):
    values = {"apply.threshold": threshold}
    found = distinct_masks(ranged, SAFE_LORA, "7b", cosines)
    assert mask_of(ranged, SAFE_LORA, values, cosines) == tuple(
        len(names) for names in projected(values, cosines)
    )
    same = [
        mask
        for mask, each in found.items()
        if projected(each, cosines) == projected(values, cosines)
    ]
    # A range has no `null`. A threshold below all cosines has the mask of null, but may be outside
    # the range.
    assert same == (
        [mask_of(ranged, SAFE_LORA, values, cosines)] if threshold is not None or same else []
    )


@given(cosines=SEEDS)
def test_every_mask_has_its_own_threshold_within_the_range(ranged, cosines):
    found = distinct_masks(ranged, SAFE_LORA, "7b", cosines)
    thresholds = [values["apply.threshold"] for values in found.values()]
    assert (
        len({projected(values, cosines) for values in found.values()})
        == len(found)
        == len(set(thresholds))
    )
    assert all(-0.9 <= threshold <= 0.9 for threshold in thresholds)
    assert len(found) == len({-0.9, *(c for each in cosines for c in each if -0.9 < c <= 0.9)})
    assert [SAFE_LORA.share(mask, cosines) for mask in sorted(found)] == sorted(
        SAFE_LORA.share(mask, cosines) for mask in found
    )


def test_the_threshold_of_a_mask_has_as_few_decimals_as_possible(ranged):
    found = distinct_masks(ranged, SAFE_LORA, "7b", (np.array([0.301234, 0.352345]),))
    assert found[1,] == {"apply.threshold": 0.33}


def test_a_list_keeps_the_first_threshold_of_each_mask(tmp_path):
    found = study(tmp_path, {"axes/apply.threshold": [None, 0.1, 0.3, 0.35, 0.5, 0.9]})
    assert list(distinct_masks(found, SAFE_LORA, "7b", (np.array([0.2, 0.4]),)).values()) == [
        {"apply.threshold": None},
        {"apply.threshold": 0.3},
        {"apply.threshold": 0.5},
    ]


def test_a_range_with_a_step_gives_only_multiples_of_it(tmp_path):
    axis = {"low": 0.0, "high": 1.0, "step": 0.25}
    found = study(tmp_path, {"axes/apply.threshold": axis, "search": {"points": 3}})
    masks = distinct_masks(found, SAFE_LORA, "7b", (np.array([0.1, 0.2, 0.6]),))
    assert {mask: values["apply.threshold"] for mask, values in masks.items()} == {
        (0,): 0.0,
        (2,): 0.25,
        (3,): 0.75,
    }


def test_numbers_of_modules_are_masks_and_too_large_ones_have_none(tmp_path):
    changes = {
        "axes": {"train.rank": [2], "apply.modules": {"low": 0, "high": 5, "step": 1}},
        "search": {"points": 3},
    }
    found = study(tmp_path, changes)
    cosines = (np.array([0.1, 0.2, 0.6]), np.array([0.2, 0.3, 0.4]))
    assert list(distinct_masks(found, SAFE_LORA, "7b", cosines)) == [(n, n) for n in range(4)]
    assert mask_of(found, SAFE_LORA, {"apply.modules": 4}, cosines) is None


def test_both_rules_at_once_are_never_proposed(tmp_path):
    axes = {"train.rank": [2], "apply.threshold": [None, 0.5], "apply.modules": [None, 1]}
    found = study(tmp_path, {"axes": axes})
    both = {"apply.threshold": 0.5, "apply.modules": 1}
    assert (
        both not in unmeasured(found, SAFE_LORA, "7b", 9)
        and len(unmeasured(found, SAFE_LORA, "7b", 9)) == 3
    )
    assert both not in distinct_masks(found, SAFE_LORA, "7b", (np.array([0.2, 0.6]),)).values()


def test_settings_for_an_unmeasured_adapter_are_values_of_the_axis(tmp_path):
    found = study(
        tmp_path,
        {"axes/apply.threshold": {"low": 0.2, "high": 0.8, "step": 0.2}, "search": {"points": 3}},
    )
    axis = found.axes["apply.threshold"]
    assert isinstance(axis, Range)
    assert [
        round(values["apply.threshold"], 9) for values in unmeasured(found, SAFE_LORA, "7b", 9)
    ] == [
        0.2,
        0.4,
        0.6,
        0.8,
    ]


def test_thresholds_between_the_same_cosines_are_duplicates(tmp_path, home):
    graph = StageGraph(
        study(tmp_path, {"axes": {"apply.threshold": [None, 0.1, 0.2, 0.6, 0.7, 1.0]}}), home
    )
    points = list(space(graph.study))
    fill(home.store, graph, [])
    found = todo(graph, points)
    assert duplicates(found, home.store, 1.0) == frozenset()
    # Every second defended adapter is expected to equal an earlier one
    expected = duplicates(found, home.store, 0.5)
    assert len(expected) == 3 * 4 and all(
        found.missing[own].stage.kind in ("generate", "score") for own in expected
    )
    stages = graph.stages_for(points[0])
    rows = {
        "a": ModuleRow(0.15, 1.0),
        "b": ModuleRow(0.5, 1.0),
        "c": ModuleRow(None, None, "frozen"),
    }
    attempt = commit_projection(home, graph, stages, rows)
    assert attempt.kind == "project"
    exact = duplicates(todo(graph, points), home.store, 0.0)
    # null and 0.1 project no module, 0.2 projects one; 0.6, 0.7 and 1.0 project both
    assert len(exact) == 3 * 4


def test_equal_masks_of_different_adapters_are_no_duplicates(tmp_path, home):
    graph = StageGraph(
        study(tmp_path, {"axes": {"train.rank": [2, 4], "apply.threshold": [0.2]}}), home
    )
    points = list(space(graph.study))
    fill(home.store, graph, [])
    for point in points:
        rows = {"a": ModuleRow(0.15, 1.0), "b": ModuleRow(0.5, 1.0)}
        commit_projection(home, graph, graph.stages_for(point), rows)
    assert duplicates(todo(graph, points), home.store, 0.0) == frozenset()


def commit_projection(home, graph, stages, rows):
    """Commit the artifacts up to the projection, with these cosines."""
    for name in ("data[seed=0]", "train[seed=0]", "project[seed=0]"):
        stage, resolver = stages[name], Resolver(home.store)
        hashed = resolver.hashed(stage)
        attempt = home.store.begin(stage.kind, digest(hashed))
        for file in ("data.jsonl", "adapter/w"):
            (attempt / "payload" / file).parent.mkdir(exist_ok=True)
            (attempt / "payload" / file).write_text(stage.lineage)  # adapters differ
        if name.startswith("project"):
            write_rows(rows, attempt / "payload" / ProjectSpec.COSINES)
        artifact = home.store.commit(attempt, hashed, {"seconds": 1.0})
    return artifact
