"""Stage-aware search: distinct masks, one threshold of an unmeasured adapter, gain for cost."""

import pytest

from ebbline.sweeps.forecast.expected import expected_points
from ebbline.sweeps.search import samplers, stage_aware
from ebbline.sweeps.search.knowledge import WorkEstimate
from ebbline.sweeps.search.masks import mask_of
from ebbline.sweeps.search.searcher import WAIT, StudySearcher
from ebbline.sweeps.state.trials import Entry
from ebbline.sweeps.study.database import PointDatabase
from ebbline.sweeps.study.points import Point, Result, adapter_of
from ebbline.tasks.defences.safe_lora import SAFE_LORA
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


def smooth(knowledge):
    """Results as a function of the mask: projection raises refusals and lowers accuracy, and a
    higher rank drifts further.
    """

    def result(number, point):
        share = sum(mask_of_point(knowledge, point)) / knowledge.modules / knowledge.seeds
        drift = dict(point.values)["train.rank"] / 10
        return measured(
            number,
            point,
            round(100 * (1 - drift * (1 - share))),
            round(100 * (0.2 + drift) * (1 - share / 2)),
        )

    return result


def mask_of_point(knowledge, point):
    return mask_of(
        knowledge.study,
        SAFE_LORA,
        {k: v for k, v in point.values if k.startswith("apply.")},
        knowledge.readings(point),
    )


def searcher_of(tmp_path, empty_storage, in_turn=True, axes=AXES, knowledge=None, **search):  # noqa: F811
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
    knowledge = knowledge or Imagined(modules=6)
    knowledge.study = found
    return StudySearcher(found, fresh_url(tmp_path / "o.db", empty_storage)), knowledge


def driven(searcher, knowledge, result, window=WINDOW, max_results=None):
    """All points in order of asking, until the search has none left.

    None when it is interrupted after `max_results` results.
    """
    in_flight, points, results = list(searcher.in_flight()), [], 0
    while True:
        proposal = searcher.ask(knowledge) if len(in_flight) < window else WAIT
        if proposal is not None and proposal is not WAIT:
            in_flight.append(proposal)
            points.append(proposal[1])
        elif in_flight:
            if results == max_results:
                return None
            number, point = in_flight.pop(0)
            searcher.tell(number, result(number, point))
            results += 1
        else:
            return points


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 2])
def test_every_mask_is_proposed_exactly_once(tmp_path, empty_storage, seeds):  # noqa: F811
    searcher, knowledge = searcher_of(
        tmp_path, empty_storage, knowledge=Imagined(modules=6, seeds=seeds)
    )
    points = driven(searcher, knowledge, smooth(knowledge))
    masks = {(adapter_of(point), mask_of_point(knowledge, point)) for point in points}
    assert len(masks) == 2 * (6 * seeds + 1)
    # One threshold of each adapter is proposed before its cosines are measured; it has no duplicate
    assert len(points) == len(masks)
    found = expected_points(searcher.study, PointDatabase(f"sqlite:///{tmp_path / 'o.db'}", "tiny"))
    # Complete with fewer points than the 60 of the study file
    assert len(found.completed) == len(points) and not found.to_come
    assert found.ended == "the search has nothing more to propose"


def test_an_unmeasured_adapter_has_one_threshold_and_null_in_flight(tmp_path, empty_storage):  # noqa: F811
    searcher, knowledge = searcher_of(
        tmp_path,
        empty_storage,
        axes={"train.rank": [2, 4], "apply.threshold": [None, 0.2, 0.5, 0.8]},
    )
    in_flight = []
    while (proposal := searcher.ask(knowledge)) is not WAIT:
        in_flight.append(proposal[1])
    thresholds = [
        (dict(point.values)["train.rank"], dict(point.values)["apply.threshold"] is None)
        for point in in_flight
    ]
    assert sorted(thresholds) == [(2, False), (2, True), (4, False), (4, True)]
    searcher.tell(0, smooth(knowledge)(0, in_flight[0]))
    _, after = searcher.ask(knowledge)
    assert adapter_of(after) == adapter_of(in_flight[0])


def test_new_cosines_count_at_once_only_without_in_turn(tmp_path, empty_storage):  # noqa: F811
    axes = {"train.rank": [2], "apply.threshold": {"low": 0.0, "high": 1.0}}
    for in_turn in (True, False):
        folder = tmp_path / str(in_turn)
        folder.mkdir()
        searcher, knowledge = searcher_of(folder, empty_storage, in_turn, axes)
        _, point = searcher.ask(knowledge)
        assert (searcher.ask(knowledge) is WAIT) == in_turn
        knowledge.missing.add(adapter_of(point))
        assert searcher.ask(knowledge) is WAIT or not in_turn


def test_a_failed_adapter_gets_no_further_thresholds(tmp_path, empty_storage):  # noqa: F811
    searcher, knowledge = searcher_of(tmp_path, empty_storage)
    number, point = searcher.ask(knowledge)
    knowledge.missing.add(adapter_of(point))
    searcher.tell(
        number, Result(number, point, "failed", reason="TrainingError: the loss became nan")
    )
    others = driven(searcher, knowledge, smooth(knowledge))
    assert others and adapter_of(point) not in set(map(adapter_of, others))


class Costs(Imagined):
    """The cost of a training is 100 times its rank."""

    def work(self, point):
        return WorkEstimate(100.0 * dict(point.values)["train.rank"], 1.0, self.measure)

    measure = 1.0


def test_masks_of_an_existing_adapter_come_before_an_expensive_training(tmp_path, empty_storage):  # noqa: F811
    searcher, knowledge = searcher_of(tmp_path, empty_storage, knowledge=Costs(modules=6))
    points = driven(searcher, knowledge, smooth(knowledge), window=1)
    # The cheaper adapter comes first, then its masks, which cost a hundredth
    assert [dict(point.values)["train.rank"] for point in points[:4]] == [2] * 4


def test_a_cost_ceiling_is_never_crossed(tmp_path, empty_storage):  # noqa: F811
    searcher, knowledge = searcher_of(
        tmp_path, empty_storage, knowledge=Costs(modules=6), constraints={"gpu_hours": 300 / 3600}
    )
    points = driven(searcher, knowledge, smooth(knowledge))
    assert {dict(point.values)["train.rank"] for point in points} == {2} and len(points) == 7
    assert all(dict(entry.misses)["gpu_hours"] <= 0 for entry in searcher.trials.entries)


@pytest.mark.slow
def test_a_refusal_floor_gives_more_points_that_hold_it(tmp_path, empty_storage):  # noqa: F811
    axes = {"train.rank": [2, 4, 8], "apply.threshold": {"low": 0.0, "high": 1.0}}
    holding = {}
    for floor in (False, True):
        folder = tmp_path / str(floor)
        folder.mkdir()
        knowledge = Imagined(modules=30)
        searcher, knowledge = searcher_of(
            folder,
            empty_storage,
            axes=axes,
            knowledge=knowledge,
            constraints={"refusal_floor": floor},
            points=12,
        )
        driven(searcher, knowledge, smooth(knowledge))
        holding[floor] = sum(entry.values[0] >= 0.9 for entry in searcher.trials.entries)
        assert all(bool(entry.misses) == floor for entry in searcher.trials.entries)
    assert holding[True] > 1.5 * holding[False]


def test_constraints_are_stored_in_optuna_and_reloaded(tmp_path, empty_storage):  # noqa: F811
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
    searcher, knowledge = (
        StudySearcher(found, fresh_url(tmp_path / "o.db", empty_storage)),
        Imagined(),
    )
    number, point = searcher.ask(knowledge)
    searcher.tell(number, measured(number, point, 80, 50))
    (trial,) = searcher.trials._optuna.trials
    assert trial.constraints == pytest.approx(
        {"refusal_floor": 0.1, "gpu_hours": 111 / 3600 - 0.02}
    )
    assert (
        StudySearcher(found, PointDatabase(f"sqlite:///{tmp_path / 'o.db'}", "tiny")).trials.entries
        == searcher.trials.entries
    )


def test_standard_errors_are_stored_beside_the_means(tmp_path, empty_storage):  # noqa: F811
    searcher, knowledge = searcher_of(tmp_path, empty_storage)
    number, point = searcher.ask(knowledge)
    searcher.tell(number, measured(number, point, 80, 50))
    reloaded = StudySearcher(
        searcher.study, PointDatabase(f"sqlite:///{tmp_path / 'o.db'}", "tiny")
    ).trials.entries[0]
    assert reloaded.values == (0.8, 0.5) and reloaded.errors == pytest.approx(
        (0.0402, 0.0503), abs=1e-3
    )


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
def test_a_model_may_have_its_own_range_and_axis(tmp_path, empty_storage, sampler, transfer):  # noqa: F811
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
    searcher = StudySearcher(found, fresh_url(tmp_path / "o.db", empty_storage))
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
        for entry in StudySearcher(
            found, PointDatabase(f"sqlite:///{tmp_path / 'o.db'}", "tiny")
        ).trials.entries
    ] == points


def test_a_widened_axis_keeps_the_existing_points(tmp_path, empty_storage):  # noqa: F811
    url = fresh_url(tmp_path / "o.db", empty_storage)
    search = {"sampler": "tpe", "points": 12, "window": 2}
    before = driven(
        StudySearcher(study(tmp_path, {"search": {**search, "points": 4}}), url),
        Imagined(),
        outcome,
        window=2,
    )
    wider = study(
        tmp_path,
        {"axes/train.rank": [2, 4, 8, 16], "models/70b": WHOLE["models"]["7b"], "search": search},
    )
    searcher = StudySearcher(wider, url)
    assert [entry.point for entry in searcher.trials.entries] == before
    after = driven(searcher, Imagined(), outcome, window=2)
    assert len({*before, *after}) == 12 and any(
        dict(point.values)["train.rank"] == 16 or point.model == "70b" for point in after
    )
    assert [entry.point for entry in StudySearcher(wider, url).trials.entries] == [*before, *after]


SIZES = {
    "models/13b": WHOLE["models"]["7b"],
    "axes": {
        "train.rank": [2, 4, 8],
        "data.size": [8, 16],
        "apply.threshold": AXES["apply.threshold"],
    },
}


def prior_entries(found):
    """Results of another study: the smaller data, with every model and rank at three thresholds."""
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
def test_in_turn_a_search_killed_repeatedly_proposes_the_same_points(
    tmp_path, empty_storage, monkeypatch, sampler, transfer, taught  # noqa: F811
):  # fmt: skip
    monkeypatch.setattr(stage_aware, "MAX_RESULTS", 14)  # so that results are selected early
    monkeypatch.setattr(stage_aware, "SELECT_EVERY", 4)
    monkeypatch.setattr(stage_aware, "MAX_FITTED", 8)
    monkeypatch.setattr(samplers, "MAX_TPE_POINTS", 14)
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

    def proposals(name, max_results):
        url, knowledge = fresh_url(tmp_path / f"{name}.db", empty_storage), Imagined(modules=6)
        knowledge.study = found
        while True:
            searcher = StudySearcher(found, url)
            if taught:
                searcher.teach("other", prior_entries(found))
            if driven(searcher, knowledge, outcome, window=3, max_results=max_results) is not None:
                return [entry.point for entry in searcher.trials.entries]

    undisturbed = proposals("undisturbed", None)
    assert len(undisturbed) == 22 and {point.model for point in undisturbed} == {"7b", "13b"}
    assert proposals("killed", 4) == undisturbed


def test_the_share_of_a_prior_result_is_updated_as_cosines_are_measured(
    tmp_path,
    empty_storage,  # noqa: F811
):
    searcher, knowledge = searcher_of(
        tmp_path,
        empty_storage,
        axes={"train.rank": [2, 4, 8], "apply.threshold": AXES["apply.threshold"]},
    )
    # A threshold below every cosine projects no module
    other = Point.of("7b", {"train.rank": 8, "apply.threshold": 0.1})
    searcher.teach("other", [Entry(0, other, "done", (0.5, 0.5), (0.05, 0.05))])
    shares = []
    for _ in range(2):
        number, point = searcher.ask(knowledge)
        shares.append(searcher._stage_aware._observations("7b").x_NF[0, -1])
        searcher.tell(number, smooth(knowledge)(number, point))
    assert shares == [pytest.approx(0.1), 0.0]
