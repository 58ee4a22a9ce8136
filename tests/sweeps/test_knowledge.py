"""What a search knows of adapters: asked at every turn, so an adapter that is not there yet must cost next to nothing."""

from pathlib import Path

import pytest

from cluster.resolver import Resolver
from sweeps.home import Home
from sweeps.knowledge import Knowledge
from sweeps.plan import Planner
from sweeps.points import Point
from tests.sweeps.made import study


def test_an_adapter_that_is_not_there_is_looked_for_in_the_store_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path)
    planner = Planner(study(tmp_path), home)
    knowledge = Knowledge(planner, Resolver(home.store))
    planned: list[Point] = []
    real = planner.stages_for
    monkeypatch.setattr(planner, "stages_for", lambda point: planned.append(point) or real(point))
    for threshold in (None, 0.3, 0.3, 0.5):
        assert knowledge.cosines(Point.of("7b", {"train.rank": 2, "apply.threshold": threshold})) is None
    assert len(planned) == 1
    assert knowledge.cosines(Point.of("7b", {"train.rank": 4, "apply.threshold": 0.3})) is None
    assert len(planned) == 2
