"""Knowledge of the search besides results, on real studies and stores.

Every proposal reads it, so a missing artifact must cost little.
"""

import pytest

from ebbline.cluster.store.resolver import Resolver
from ebbline.sweeps.search.knowledge import Knowledge
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import Point, adapter_of, training_of, without_defence
from ebbline.sweeps.study.stages import StageGraph
from tests.sweeps.made import study


def test_work_is_a_function_of_the_adapter_and_does_not_change_the_graph(tmp_path):
    found = study(tmp_path, {"models/7b/gpus": 2, "seeds": [0, 1]})
    home = Home(tmp_path / "home")
    graph = StageGraph(found, home)
    knowledge, labels = Knowledge(graph, Resolver(home.store)), dict(graph.labels)
    small, large = (
        Point.of("7b", {"train.rank": 2, "data.size": size, "apply.threshold": 0.3})
        for size in (16, 4096)
    )
    assert knowledge.work(large).train > 2 * knowledge.work(small).train
    assert (
        knowledge.work(small)
        == knowledge.work(adapter_of(small))
        == Knowledge(graph, Resolver(home.store)).work(small)
    )
    assert graph.labels == labels
    assert knowledge.readings(small) is None


def test_an_adapter_has_no_threshold_and_a_training_no_projection_settings():
    point = Point.of("7b", {"train.rank": 2, "project.energy": 0.9, "apply.threshold": 0.3})
    assert adapter_of(point) == Point.of("7b", {"train.rank": 2, "project.energy": 0.9})
    assert training_of(point) == without_defence(point) == Point.of("7b", {"train.rank": 2})


def test_settings_of_another_stage_belong_to_no_training():
    point = Point.of("7b", {"train.rank": 2, "shrink.factor": 0.5, "apply.threshold": 0.3})
    assert training_of(point) == Point.of("7b", {"train.rank": 2})
    assert without_defence(point) == Point.of("7b", {"train.rank": 2, "shrink.factor": 0.5})


def test_the_stages_of_a_missing_adapter_are_planned_once(
    tmp_path, monkeypatch: pytest.MonkeyPatch
):
    home = Home(tmp_path)
    graph = StageGraph(study(tmp_path), home)
    knowledge = Knowledge(graph, Resolver(home.store))
    planned: list[Point] = []
    real = graph.stages_for
    monkeypatch.setattr(graph, "stages_for", lambda point: planned.append(point) or real(point))
    for threshold in (None, 0.3, 0.3, 0.5):
        assert (
            knowledge.readings(Point.of("7b", {"train.rank": 2, "apply.threshold": threshold}))
            is None
        )
    assert len(planned) == 1
    assert knowledge.readings(Point.of("7b", {"train.rank": 4, "apply.threshold": 0.3})) is None
    assert len(planned) == 2
