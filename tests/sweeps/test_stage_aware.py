"""Stage-aware search: distinct masks, one threshold while cosines are unknown, gain for cost."""

import pytest

from ebbline.sweeps.forecast.expected import points_of
from ebbline.sweeps.search import samplers, stage_aware
from ebbline.sweeps.search.knowledge import Work
from ebbline.sweeps.search.masks import mask_of
from ebbline.sweeps.search.searcher import WAIT, OptunaSearcher
from ebbline.sweeps.state.trials import Entry
from ebbline.sweeps.study.points import Point, Result, adapter_of
from ebbline.sweeps.study.storage import Storage
from ebbline.tasks.measuring.metrics import Metric
from tests.sweeps.made import WHOLE, Imagined, outcome, study
from tests.sweeps.test_search import empty_storage, fresh_url  # noqa: F401

AXES = {"train.rank": [2, 4], "apply.threshold": {"low": 0.0, "high": 1.0}}
WINDOW = 4


def measured(number, point, refusal, task):
    metrics = {
        "refusal.refusal_rate": Metric("refusal_rate", refusal, 100),
        "task.task_accuracy": Metric("task_accuracy", task, 100),
    }
    return Result(number, point, "done", metrics)


def smooth(known):
    """A result that is a function of the mask: projecting wins refusals and costs accuracy, higher
    rank drifts further.
    """

    def result(number, point):
        taken = sum(mask_of_point(known, point)) / known.modules / known.seeds
        drift = dict(point.values)["train.rank"] / 10
        return measured(
            number,
            point,
            round(100 * (1 - drift * (1 - taken))),
            round(100 * (0.2 + drift) * (1 - taken / 2)),
        )

    return result


def mask_of_point(known, point):
    return mask_of(
        known.study,
        {k: v for k, v in point.values if k.startswith("apply.")},
        known.measured(point),
    )


def searcher_of(tmp_path, empty_storage, in_turn=True, axes=AXES, known=None, **search):  # noqa: F811
    found = study(
        tmp_path,
        {
            "axes": axes,
            "search": {
                "sampler": "stage_aware",
                "points": 60,
                "window": WINDOW,
                "order": "in_turn" if in_turn else "as_they_land",
                **search,
            },
        },
    )
    known = known or Imagined(modules=6)
    known.study = found
    return OptunaSearcher(found, fresh_url(tmp_path / "o.db", empty_storage)), known


def driven(searcher, known, result, window=WINDOW, told_at_most=None):
    """All points in order of asking, until the search has none left; None when it is cut off after
    so many were told.
    """
    in_flight, points, told = list(searcher.in_flight()), [], 0
    while True:
        asked = searcher.ask(known) if len(in_flight) < window else WAIT
        if asked is not None and asked is not WAIT:
            in_flight.append(asked)
            points.append(asked[1])
        elif in_flight:
            if told == told_at_most:
                return None
            number, point = in_flight.pop(0)
            searcher.tell(number, result(number, point))
            told += 1
        else:
            return points


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 2])
def test_every_mask_is_proposed_once_and_then_there_is_nothing_left(tmp_path, empty_storage, seeds):  # noqa: F811
    searcher, known = searcher_of(tmp_path, empty_storage, known=Imagined(modules=6, seeds=seeds))
    points = driven(searcher, known, smooth(known))
    masks = {(adapter_of(point), mask_of_point(known, point)) for point in points}
    assert len(masks) == 2 * (6 * seeds + 1)
    # One threshold of each adapter is chosen before its cosines are known; no later one is the
    # same.
    assert len(points) == len(masks)
    found = points_of(searcher.study, Storage(f"sqlite:///{tmp_path / 'o.db'}", "tiny"))
    assert (
        len(found.told) == len(points) and not found.to_come
    )  # fewer than the 60 asked for, and yet complete
    assert found.ended == "the search has nothing more to propose"


def test_while_cosines_are_unknown_one_threshold_is_in_flight_and_null(tmp_path, empty_storage):  # noqa: F811
    searcher, known = searcher_of(
        tmp_path,
        empty_storage,
        axes={"train.rank": [2, 4], "apply.threshold": [None, 0.2, 0.5, 0.8]},
    )
    in_flight = []
    while (asked := searcher.ask(known)) is not WAIT:
        in_flight.append(asked[1])
    thresholds = [
        (dict(point.values)["train.rank"], dict(point.values)["apply.threshold"] is None)
        for point in in_flight
    ]
    assert sorted(thresholds) == [(2, False), (2, True), (4, False), (4, True)]
    searcher.tell(0, smooth(known)(0, in_flight[0]))
    _, after = searcher.ask(known)
    assert adapter_of(after) == adapter_of(in_flight[0])


def test_cosines_count_as_soon_as_they_are_there_only_when_not_in_turn(tmp_path, empty_storage):  # noqa: F811
    axes = {"train.rank": [2], "apply.threshold": {"low": 0.0, "high": 1.0}}
    for in_turn in (True, False):
        folder = tmp_path / str(in_turn)
        folder.mkdir()
        searcher, known = searcher_of(folder, empty_storage, in_turn, axes)
        _, point = searcher.ask(known)
        assert (searcher.ask(known) is WAIT) == in_turn
        known.missing.add(adapter_of(point))
        assert searcher.ask(known) is WAIT or not in_turn


def test_an_adapter_that_failed_is_not_tried_at_other_thresholds(tmp_path, empty_storage):  # noqa: F811
    searcher, known = searcher_of(tmp_path, empty_storage)
    number, point = searcher.ask(known)
    known.missing.add(adapter_of(point))
    searcher.tell(
        number, Result(number, point, "failed", reason="TrainingError: the loss became nan")
    )
    others = driven(searcher, known, smooth(known))
    assert others and adapter_of(point) not in set(map(adapter_of, others))


class Costs(Imagined):
    """A training of rank r costs r times 100."""

    def work(self, point):
        return Work(100.0 * dict(point.values)["train.rank"], 1.0, self.measure)

    measure = 1.0


def test_masks_of_an_adapter_that_exists_come_before_a_dear_training(tmp_path, empty_storage):  # noqa: F811
    searcher, known = searcher_of(tmp_path, empty_storage, known=Costs(modules=6))
    points = driven(searcher, known, smooth(known), window=1)
    assert [dict(point.values)["train.rank"] for point in points[:4]] == [
        2
    ] * 4  # the cheaper adapter, and its masks at a hundredth


def test_a_cost_ceiling_is_never_crossed(tmp_path, empty_storage):  # noqa: F811
    searcher, known = searcher_of(
        tmp_path, empty_storage, known=Costs(modules=6), constraints={"gpu_hours": 300 / 3600}
    )
    points = driven(searcher, known, smooth(known))
    assert {dict(point.values)["train.rank"] for point in points} == {2} and len(points) == 7
    assert all(dict(entry.misses)["gpu_hours"] <= 0 for entry in searcher.trials.entries)


@pytest.mark.slow
def test_a_refusal_floor_keeps_the_search_where_it_holds(tmp_path, empty_storage):  # noqa: F811
    axes = {"train.rank": [2, 4, 8], "apply.threshold": {"low": 0.0, "high": 1.0}}
    holding = {}
    for floor in (False, True):
        folder = tmp_path / str(floor)
        folder.mkdir()
        known = Imagined(modules=30)
        searcher, known = searcher_of(
            folder,
            empty_storage,
            axes=axes,
            known=known,
            constraints={"refusal_floor": floor},
            points=12,
        )
        driven(searcher, known, smooth(known))
        holding[floor] = sum(entry.values[0] >= 0.9 for entry in searcher.trials.entries)
        assert all(bool(entry.misses) == floor for entry in searcher.trials.entries)
    assert holding[True] > 1.5 * holding[False]


def test_the_constraints_that_optuna_keeps_are_those_that_its_samplers_see(tmp_path, empty_storage):  # noqa: F811
    found = study(
        tmp_path,
        {
            "search": {
                "sampler": "tpe",
                "points": 9,
                "constraints": {"refusal_floor": True, "gpu_hours": 0.02},
            }
        },
    )
    searcher, known = OptunaSearcher(found, fresh_url(tmp_path / "o.db", empty_storage)), Imagined()
    number, point = searcher.ask(known)
    searcher.tell(number, measured(number, point, 80, 50))
    (trial,) = searcher.trials._optuna.trials
    assert trial.constraints == pytest.approx(
        {"refusal_floor": 0.1, "gpu_hours": 111 / 3600 - 0.02}
    )
    assert (
        OptunaSearcher(found, Storage(f"sqlite:///{tmp_path / 'o.db'}", "tiny")).trials.entries
        == searcher.trials.entries
    )


def test_standard_errors_are_told_beside_the_means(tmp_path, empty_storage):  # noqa: F811
    searcher, known = searcher_of(tmp_path, empty_storage)
    number, point = searcher.ask(known)
    searcher.tell(number, measured(number, point, 80, 50))
    again = OptunaSearcher(
        searcher.study, Storage(f"sqlite:///{tmp_path / 'o.db'}", "tiny")
    ).trials.entries[0]
    assert again.values == (0.8, 0.5) and again.errors == pytest.approx((0.0402, 0.0503), abs=1e-3)


PER_SIZE = {
    "models/70b": {
        **WHOLE["models"]["7b"],
        "axes": {"train.rank": {"low": 8, "high": 64, "step": 8}, "train.global_batch": [8, 16]},
    },
    "axes": {"train.rank": [2, 4], "apply.threshold": [None, 0.3, 0.5]},
}


@pytest.mark.parametrize(
    ("sampler", "transfer"),
    [("stage_aware", False), ("stage_aware", True), ("gp", False), ("tpe", False)],
)
def test_a_size_may_have_a_range_and_an_axis_of_its_own(tmp_path, empty_storage, sampler, transfer):  # noqa: F811
    found = study(
        tmp_path,
        {
            **PER_SIZE,
            "search": {
                "sampler": sampler,
                "points": 9,
                "window": 2,
                "order": "in_turn",
                "transfer": transfer,
            },
        },
    )
    searcher = OptunaSearcher(found, fresh_url(tmp_path / "o.db", empty_storage))
    points = driven(searcher, Imagined(), outcome, window=2)
    axes = {point.model: {axis for axis, _ in point.values} for point in points}
    assert axes["7b"] == {"train.rank", "apply.threshold"}
    assert axes["70b"] == {"train.rank", "apply.threshold", "train.global_batch"}
    for point in points:
        values = dict(point.values)
        assert values["train.rank"] in ((2, 4) if point.model == "7b" else range(8, 65, 8))
        assert point.model == "7b" or values["train.global_batch"] in (8, 16)
    assert [
        entry.point
        for entry in OptunaSearcher(
            found, Storage(f"sqlite:///{tmp_path / 'o.db'}", "tiny")
        ).trials.entries
    ] == points


def test_an_axis_that_was_widened_goes_on_with_the_points_that_there_are(tmp_path, empty_storage):  # noqa: F811
    url = fresh_url(tmp_path / "o.db", empty_storage)
    search = {"sampler": "tpe", "points": 12, "window": 2}
    before = driven(
        OptunaSearcher(study(tmp_path, {"search": {**search, "points": 4}}), url),
        Imagined(),
        outcome,
        window=2,
    )
    wider = study(
        tmp_path,
        {"axes/train.rank": [2, 4, 8, 16], "models/70b": WHOLE["models"]["7b"], "search": search},
    )
    searcher = OptunaSearcher(wider, url)
    assert [entry.point for entry in searcher.trials.entries] == before
    after = driven(searcher, Imagined(), outcome, window=2)
    assert len({*before, *after}) == 12 and any(
        dict(point.values)["train.rank"] == 16 or point.model == "70b" for point in after
    )
    assert [entry.point for entry in OptunaSearcher(wider, url).trials.entries] == [*before, *after]


SIZES = {
    "models/13b": WHOLE["models"]["7b"],
    "axes": {
        "train.rank": [2, 4, 8],
        "data.size": [8, 16],
        "apply.threshold": AXES["apply.threshold"],
    },
}


def lessons_of(found):
    """What another study measured: of the smaller data, every size and rank at each of three
    thresholds.
    """
    points = [
        Point.of(model, {"train.rank": rank, "data.size": 8, "apply.threshold": threshold})
        for model in found.models
        for rank in (2, 4, 8)
        for threshold in (0.2, 0.5, 0.9)
    ]
    values = [(int(point.id, 16) % 97 / 97, int(point.id, 16) % 89 / 89) for point in points]
    return [
        Entry(0, point, "done", each, (0.03, 0.04))
        for point, each in zip(points, values, strict=True)
    ]


LEARNERS = [
    ("stage_aware", False, True),
    ("stage_aware", True, False),
    ("stage_aware", True, True),
    ("gp", True, False),
    ("tpe", False, True),
    ("nsga2", False, False),
]


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "transfer", "taught"), LEARNERS)
def test_in_turn_a_search_killed_again_and_again_asks_for_the_same_points(
    tmp_path, empty_storage, monkeypatch, sampler, transfer, taught  # noqa: F811
):  # fmt: skip
    monkeypatch.setattr(stage_aware, "KNOWS", 14)  # so that results are soon chosen among
    monkeypatch.setattr(stage_aware, "AT_ONCE", 4)
    monkeypatch.setattr(stage_aware, "FITTED_ON", 8)
    monkeypatch.setattr(samplers, "MOST", 14)
    found = study(
        tmp_path,
        {
            **SIZES,
            "search": {
                "sampler": sampler,
                "points": 22,
                "window": 3,
                "order": "in_turn",
                "transfer": transfer,
            },
        },
    )

    def asked_for(name, told_at_most):
        url, known = fresh_url(tmp_path / f"{name}.db", empty_storage), Imagined(modules=6)
        known.study = found
        while True:
            searcher = OptunaSearcher(found, url)
            if taught:
                searcher.teach("other", lessons_of(found))
            if driven(searcher, known, outcome, window=3, told_at_most=told_at_most) is not None:
                return [entry.point for entry in searcher.trials.entries]

    undisturbed = asked_for("undisturbed", None)
    assert len(undisturbed) == 22 and {point.model for point in undisturbed} == {"7b", "13b"}
    assert asked_for("killed", 4) == undisturbed


def test_the_share_that_another_study_measured_is_guessed_anew_as_cosines_come_in(
    tmp_path,
    empty_storage,  # noqa: F811
):
    searcher, known = searcher_of(
        tmp_path,
        empty_storage,
        axes={"train.rank": [2, 4, 8], "apply.threshold": AXES["apply.threshold"]},
    )
    other = Point.of(
        "7b", {"train.rank": 8, "apply.threshold": 0.1}
    )  # below every cosine: it projects nothing
    searcher.teach("other", [Entry(0, other, "done", (0.5, 0.5), (0.05, 0.05))])
    shares = []
    for _ in range(2):
        number, point = searcher.ask(known)
        shares.append(searcher._stage_aware._observations("7b").x_NF[0, -1])
        searcher.tell(number, smooth(known)(number, point))
    assert shares == [pytest.approx(0.1), 0.0]
