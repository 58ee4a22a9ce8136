"""A study with an added stage after the training, as in docs/adding-a-stage-kind.md:
`shrink.factor` multiplies every update.
"""

from dataclasses import replace

import pytest

from ebbline.analysis.results.before_after import trios
from ebbline.analysis.results.measurements import partners, undefended
from ebbline.sweeps.study.points import Point, Result, training_of, without_defence
from ebbline.sweeps.study.study import Study
from tests.analysis.conftest import result

FACTORS = (0.25, 1.0, 0.5)  # 1.0, which changes nothing, is not the first


def scaled(number: int, factor: float, threshold: float | None) -> Result:
    """One of the page's points; a factor of 1 has no scaling stage."""
    plain = result(number, threshold=threshold, share=None if threshold is None else 0.4)
    point = Point.of(plain.point.model, {**dict(plain.point.values), "shrink.factor": factor})
    own = {} if factor == 1.0 else {"shrink[seed=0]": f"{number:x}"}
    stages = dict.fromkeys(
        (
            "data[seed=0]",
            "train[seed=0]",
            "subspace[seed=0]",
            "project[seed=0]",
            "apply[seed=0]",
            "generate:refusal[seed=0]",
            "judge:refusal:strict[seed=0]",
            "refusal#2[seed=0]",
        ),
        f"{number:x}",
    )
    return replace(plain, point=point, keys={**stages, **own})


@pytest.fixture
def points() -> list[Result]:
    settings = [(factor, threshold) for threshold in (None, 0.45) for factor in FACTORS]
    return [scaled(number, *each) for number, each in enumerate(settings)]


def test_three_factors_of_one_training_are_one_unprojected_point_the_unscaled_one(
    points: list[Result],
) -> None:
    assert {training_of(each.point) for each in points} == set(undefended(points))
    (plain,) = undefended(points).values()
    assert dict(plain.point.values)["shrink.factor"] == 1.0


def test_a_training_with_scaled_points_only_has_no_unprojected_point(
    points: list[Result],
) -> None:
    assert undefended([each for each in points if "shrink[seed=0]" in each.keys]) == {}


def test_a_projected_point_is_paired_with_the_one_of_its_own_factor(
    points: list[Result],
) -> None:
    found = partners(points)
    assert [found[without_defence(each.point)].number for each in points[3:]] == [0, 1, 2]


def test_the_three_states_of_a_size_differ_by_projection_alone(
    study: Study, points: list[Result]
) -> None:
    best = replace(points[5], metrics=result(5, refusal=0.95).metrics)
    (trio,) = trios(study, [*points[:5], best])
    assert trio.tuned is not None and trio.shipped is not None
    assert (trio.tuned.number, trio.shipped.number) == (2, 5)
