"""The default sampler, the points of the space, and stored studies of earlier versions, which stay
the same study.
"""

import json

import numpy as np
import pytest

from ebbline.sweeps.search.masks import unmeasured
from ebbline.sweeps.study.axes import Range
from ebbline.sweeps.study.changes import lasting
from ebbline.sweeps.study.points import Point
from ebbline.sweeps.study.space import (
    check_written_points,
    drawn_point,
    limit,
    listed,
    space,
    within,
)
from ebbline.tasks.defences.safe_lora import SAFE_LORA
from ebbline.tasks.errors import StudyError
from tests.sweeps.made import WHOLE, study

RANGE = {"low": 1e-5, "high": 1e-3, "log": True}
MANY = {f"train.{name}": [1, 2] for name in ("rank", "global_batch", "max_tokens", "steps")} | {
    "train.learning_rate": RANGE,
    "train.weight_decay": {"low": 0.0, "high": 0.5},
    "train.warmup_share": {"low": 0.0, "high": 0.5},
    "train.gradient_norm": {"low": 0.5, "high": 2.0},
    "train.dropout": {"low": 0.0, "high": 0.5},
    "train.alpha_over_rank": {"low": 0.5, "high": 4.0},
    "data.size": [8, 16],
    "apply.threshold": [None, 0.5],
    "project.projector": ["approximate"],
}


@pytest.mark.parametrize(
    ("changes", "sampler"),
    [
        ({"search": {}}, "grid"),
        ({"search": {"points": 500}}, "grid"),
        ({"search": {"points": 5}}, "stage_aware"),
        ({"search": {"points": 500}, "budget": {"hours": 1.0}}, "stage_aware"),
        ({"search": {}, "budget": {"hours": 1.0}}, "stage_aware"),
        ({"search": {"points": 5}, "axes/train.learning_rate": RANGE}, "stage_aware"),
        ({"search": {"points": 500}, "axes": MANY}, "tpe"),
        ({"search": {"points": 5000}, "axes": MANY}, "nsga2"),
        ({"search": {"points": 5, "sampler": "random"}}, "random"),
    ],
)
def test_the_default_sampler_follows_from_axes_points_and_budget(tmp_path, changes, sampler):
    assert study(tmp_path, changes).sampler == sampler


def test_a_stored_study_without_newer_fields_equals_the_study_with_their_defaults(tmp_path):
    kept = study(tmp_path, {"search": {"points": 5}}).model_dump(mode="json")
    then = {"sampler": "tpe", "points": 5, "window": 4, "seed": 0, "first": [], "list": []}
    assert lasting(kept)["search"] == then
    assert lasting({**kept, "search": then}) == lasting(kept)


@pytest.mark.parametrize(
    "more",
    [
        {"transfer": True},
        {"warm_start": ["other"]},
        {"constraints": {"refusal_floor": True}},
        {"sampler": "gp"},
    ],
)
def test_a_search_field_other_than_its_default_makes_another_study(tmp_path, more):
    assert lasting(study(tmp_path, {"search": {"points": 5}}).model_dump()) != lasting(
        study(tmp_path, {"search": {"points": 5, **more}}).model_dump()
    )


def test_a_size_with_an_axis_of_its_own_has_its_own_points(tmp_path):
    own = {**WHOLE["models"]["7b"], "axes": {"train.rank": [64], "train.global_batch": [8, 16]}}
    found = study(tmp_path, {"models/70b": own})
    points = [point for point in space(found) if point.model == "70b"]
    assert found.size == limit(found) == 9 + 6 == len(list(space(found)))
    assert points[0] == Point.of(
        "70b", {"train.rank": 64, "apply.threshold": None, "train.global_batch": 8}
    )
    row = {"model": "70b", "train.rank": 64, "apply.threshold": 0.3, "train.global_batch": 16}
    assert listed(row, found, "here").model == "70b"
    with pytest.raises(
        StudyError,
        match=r"here must give `model` .* and each of \['apply.threshold', 'train.rank'\]",
    ):
        listed({**row, "model": "7b"}, found, "here")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"models/7b/axes": {"train.rank": {"low": 8, "high": 8}}},
            r"low \(8\.0\) must be below high",
        ),
        (
            {"models/7b/axes": {"train.rank": {"low": 2, "high": 8, "step": 2}}},
            r"search\.sampler: a grid needs every axis as a list",
        ),
        ({"search": {"constraints": {"gpu_hours": 0}}}, r"search\.constraints\.gpu_hours"),
        (
            {"search": {"points": 5, "sampler": "tpe", "warm_start": ["a", "a"]}},
            r"duplicate value 'a'",
        ),
    ],
)
def test_faults_of_the_search_are_errors_that_name_their_path(tmp_path, changes, fault):
    with pytest.raises(StudyError, match=fault):
        study(tmp_path, changes)


STEPPED = {
    "train.rank": {"low": 2, "high": 8, "step": 2},
    "apply.threshold": {"low": 0.0, "high": 0.35, "step": 0.1},
}


def test_ranges_with_steps_list_each_value_once_in_one_form(tmp_path):
    found = study(tmp_path, {"axes": STEPPED, "search": {"sampler": "tpe", "points": 500}})
    values = [dict(point.values) for point in space(found)]
    assert [json.dumps([each["train.rank"], each["apply.threshold"]]) for each in values][:5] == [
        "[2, 0.0]", "[2, 0.1]", "[2, 0.2]", "[2, 0.3]", "[4, 0.0]"
    ]  # fmt: skip
    assert len(values) == found.size == limit(found) == 16
    rng = np.random.default_rng(0)
    assert {drawn_point(rng, found).id for _ in range(500)} == {point.id for point in space(found)}
    assert json.dumps(unmeasured(found, SAFE_LORA, "7b", 6)) == json.dumps(
        [{"apply.threshold": value} for value in (0.0, 0.1, 0.2, 0.3)]
    )
    with pytest.raises(StudyError, match="a range without a step, so its points cannot be listed"):
        list(
            space(
                study(
                    tmp_path,
                    {"axes/apply.threshold": {"low": 0.0, "high": 1.0}, "search": {"points": 5}},
                )
            )
        )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"train.rank": 5},
            r"search\.first\[0\]: train\.rank=5 is not .* for 7b, which has 2 to 8 in "
            r"steps of 2\. Give one of these",
        ),
        ({"train.rank": 4.5}, r"train\.rank=4\.5 is not a value"),
        ({"train.rank": 10}, r"train\.rank=10 is not a value"),
        ({"train.rank": True}, r"train\.rank=True is not a value"),
        (
            {"apply.threshold": 0.35},
            r"apply\.threshold=0\.35 is not a value .* which has 0\.0 to 0\.35 in steps of 0\.1",
        ),
    ],
)
def test_a_written_point_off_the_steps_of_a_range_is_an_error_with_the_allowed_values(
    tmp_path, value, message
):
    first = {"model": "7b", "train.rank": 4, "apply.threshold": 0.2, **value}
    with pytest.raises(StudyError, match=message):
        check_written_points(
            study(tmp_path, {"axes": STEPPED, "search": {"points": 5, "first": [first]}})
        )


def test_a_written_point_is_the_same_point_however_its_numbers_are_written(tmp_path):
    axes = {**STEPPED, "train.learning_rate": RANGE, "train.dropout": {"low": 0.0, "high": 1.0}}
    found = study(tmp_path, {"axes": axes, "search": {"points": 5}})
    row = {
        "model": "7b",
        "train.rank": 4.0,
        "apply.threshold": 0.1 + 0.2,
        "train.learning_rate": 1e-4,
        "train.dropout": 0,
    }
    point = listed(row, found, "here")
    assert json.dumps(dict(point.values)) == (
        '{"apply.threshold": 0.3, "train.dropout": 0.0, "train.learning_rate": 0.0001, '
        '"train.rank": 4}'
    )


@pytest.mark.parametrize(
    ("axis", "count", "last"),
    [
        (Range(low=0.0, high=0.3, step=0.1), 4, 0.3),
        (Range(low=0.0, high=1.0, step=0.3), 4, 0.9),
        (Range(low=2, high=9, step=3), 3, 8),
        (Range(low=1e-5, high=1e-4, step=1e-5), 10, 1e-4),
    ],
)
def test_the_last_value_of_a_range_with_steps_is_not_beyond_its_edge(axis, count, last):
    assert axis.count == count and axis.at(count - 1) == last == axis.nearest(axis.high)


def test_1_and_true_are_two_values_of_an_axis():
    assert within(1, (1, 2)) and not within(True, (1, 2)) and not within(1, (True, False))
