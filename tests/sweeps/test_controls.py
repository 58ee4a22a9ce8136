"""Controls in a study: which results get them, their stages, when they run and what is read."""

import json
from collections import Counter
from pathlib import Path

import pytest

from ebbline.analysis.results.collect import collect
from ebbline.analysis.results.controls.means import (
    collect_controls,
    control_means,
    control_notes,
    controls_frame,
)
from ebbline.analysis.results.costs import stage_costs
from ebbline.analysis.results.frontier import frontier
from ebbline.commands.store import needed_by
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.state.controls import controlled, draws_of, operating_points, stages_of_draw
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import Point, Result
from ebbline.sweeps.study.stages import StageGraph
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.measuring.metrics import Metric
from ebbline.tasks.specs import DefendSpec, MeasureSpec
from tests.sweeps.pretended import Pretended, small
from tests.sweeps.test_defences import several

THREE = {
    "safe_lora": {"threshold": [0.1, 0.2, 0.3, 0.4, 0.5]},
    "scale": {"factor": [0.25, 0.75]},
    "drop": {"threshold": [0.3]},
}


def result(number: int, refused: int, right: int, share: float = 0.5, **values: object) -> Result:
    metrics = {
        "refusal.refusal_rate": Metric("refusal_rate", refused, 100),
        "task.task_accuracy": Metric("task_accuracy", right, 100),
    }
    point = Point.of("7b", {name.replace("__", "."): value for name, value in values.items()})
    return Result(number, point, "done", metrics, changed_share=share)


def projected(number: int, threshold: float, refused: int, right: int, **others) -> Result:
    named = {"defence": "safe_lora", "apply__threshold": threshold, "train__rank": 2}
    return result(number, refused, right, **{**named, **others})


CURVE = [
    projected(1, 0.1, 10, 60),
    projected(2, 0.2, 50, 50),
    projected(3, 0.3, 92, 40),
    projected(4, 0.4, 95, 30),
    projected(5, 0.5, 99, 10),
]


def test_the_operating_point_is_the_most_useful_one_at_the_floor_else_the_nearest(tmp_path):
    found = several(tmp_path, THREE)
    plain = result(0, 5, 99, share=0.0, defence="none", train__rank=2)
    assert operating_points(found, [plain, *CURVE]) == {("7b", "safe_lora"): CURVE[2]}
    assert operating_points(found, CURVE[:2]) == {("7b", "safe_lora"): CURVE[1]}


@pytest.mark.parametrize(
    ("settings", "numbers"), [(0, []), (1, [3]), (2, [3, 2]), (3, [3, 2, 4]), (5, [3, 2, 4, 1, 5])]
)
def test_controls_are_at_the_operating_point_and_its_neighbours(tmp_path, settings, numbers):
    found = several(tmp_path, THREE, controls=settings)
    other = projected(9, 0.29, 40, 40, train__rank=4)  # of another training
    assert [each.number for each in controlled(found, [*CURVE, other])] == numbers


def test_neighbours_are_along_the_knob_that_is_varied(tmp_path):
    by_number = [
        result(
            number,
            95 - number,
            10 * number,
            defence="safe_lora",
            apply__modules=number,
            train__rank=2,
        )
        for number in (1, 2, 4)
    ]
    found = several(tmp_path, {"safe_lora": {"modules": [1, 2, 4]}}, controls=3)
    assert [each.number for each in controlled(found, by_number)] == [4, 2, 1]


def test_an_equal_adapter_is_no_neighbour(tmp_path):
    found = several(tmp_path, THREE)
    same = projected(6, 0.31, 92, 40)
    object.__setattr__(same, "same_as", 3)
    assert [each.number for each in controlled(found, [*CURVE, same])] == [3, 2, 4]


def test_each_draw_of_a_random_control_is_one_and_scale_has_none(tmp_path):
    found = several(tmp_path, THREE, controls={"settings": 1, "draws": 2})
    scaled = result(7, 95, 50, defence="scale", scale__factor=0.25, train__rank=2)
    dropped = result(8, 95, 20, defence="drop", drop__threshold=0.3, train__rank=2)
    draws = [
        (d.partner.number, d.control, d.draw) for d in draws_of(found, [*CURVE, scaled, dropped])
    ]
    assert draws == [
        (3, "shrink_matched", None),
        (3, "random_subspace", 0),
        (3, "random_subspace", 1),
        (3, "random_modules", 0),
        (3, "random_modules", 1),
        (8, "random_modules", 0),
        (8, "random_modules", 1),
    ]


def test_a_control_shares_its_partners_training_and_names_its_draw(tmp_path):
    found = several(tmp_path, THREE, seeds=[0, 1])
    graph = StageGraph(found, Home(tmp_path / "home"))
    own = graph.stages_for(CURVE[2].point)
    lineages = {stage.lineage for stage in own.values()}
    for draw in draws_of(found, [CURVE[2]]):
        stages = stages_of_draw(graph, draw)
        made = stages["defend[seed=0]"]
        assert made.spec == DefendSpec(
            method="safe_lora",
            knobs={"threshold": 0.3, "modules": None},
            control=draw.control,
            draw=draw.draw,
        )
        assert {stages[f"{kind}[seed=0]"].lineage for kind in ("train", "project")} <= lineages
        rotated = stages.get("measure[seed=0]")
        assert (rotated is not None) == (draw.control == "random_subspace")
        if rotated is not None:
            knobs = {"projector": "approximate", "energy": None}
            assert rotated.spec == MeasureSpec(method="safe_lora", knobs=knobs, draws=3)


@pytest.fixture(scope="module")
def driven(tmp_path_factory) -> tuple[StudyView, Path]:
    """A study with three defences and their controls, driven to its end; no stage computes."""
    folder = tmp_path_factory.mktemp("controls")
    axes = {"axes": {"train.rank": [2, 8]}, "defences": THREE, "refusal_floor": 0.5}
    study = small(folder, **axes, seeds=[0, 1])
    view = StudyView(study, Home(folder / "home"))
    drive(view, lambda: Pretended(view.home.store))
    return view, folder


def test_controls_run_after_the_search_and_are_no_points_of_it(driven):
    view, _ = driven
    results = collect(view)
    assert len(results) == view.study.size == 2 * 9
    assert all(each.status == "done" for each in results)
    controls = collect_controls(view, results)
    assert controls and all(each.result.status == "done" for each in controls)
    assert all(set(each.result.metrics) == set(results[0].metrics) for each in controls)
    kinds = Counter(name.partition("[")[0] for each in results for name in each.keys)
    assert kinds["measure"] == 0  # of the points none
    front = frontier(results, view.study.objectives)
    assert {each.number for each in front} <= {each.number for each in results}
    # Their number of seeds is that of the partner
    assert all(
        {f"refusal[seed={seed}]" for seed in (0, 1)} <= each.result.keys.keys() for each in controls
    )


def test_draws_are_averaged_with_their_spread_and_listed_one_by_one(driven):
    view, _ = driven
    results = collect(view)
    controls = collect_controls(view, results)
    means = {(mean.partner.number, mean.control): mean for mean in control_means(controls)}
    name = "task.task_accuracy"
    for (_, control), mean in means.items():
        values = [draw.metrics[name].value for draw in mean.draws]
        assert mean.value(name) == pytest.approx(sum(values) / len(values))
        assert len(values) == mean.planned == (1 if control == "shrink_matched" else 3)
        assert (mean.spread(name) is None) == (control == "shrink_matched")
    frame = controls_frame(view.study, controls)
    assert len(frame) == len(controls) and set(frame["status"]) == {"done"}
    assert set(frame["setting"]) >= {"drop 0.3"} and frame["draw"].dtype == "Int64"


def test_a_finished_study_runs_nothing_again(driven):
    view, _ = driven
    executor = Pretended(view.home.store)
    drive(view, lambda: executor)
    assert not executor.requests


def test_the_notes_say_what_has_no_control_and_that_none_was_run(driven, tmp_path):
    view, _ = driven
    results = collect(view)
    said = list(control_notes(view.study, results, collect_controls(view, results)))
    assert said == [
        "scale has no control: it has neither a gate nor a projector.",
        "drop has no control of equal norm.",
    ]
    off = view.study.model_copy(
        update={"controls": several(tmp_path, THREE, controls=False).controls}
    )
    assert any(
        line.startswith("No control of Safe LoRA was run")
        for line in control_notes(off, results, [])
    )
    missing = collect_controls(view, results)[:1]
    object.__setattr__(missing[0].result, "status", "running")
    assert list(control_notes(view.study, results, missing))[-1].startswith("1 of ")


def test_controls_may_be_turned_off_or_on_between_runs(tmp_path):
    study = several(tmp_path, THREE, controls=False)
    dumped = json.loads(study.model_dump_json())
    assert dumped["controls"] == {"settings": 0, "draws": 3}
    assert several(tmp_path, THREE).used_controls.settings == 3


def test_the_store_keeps_what_controls_need(driven):
    view, _ = driven
    controls = collect_controls(view, collect(view))
    keys = {key for each in controls for key in each.result.keys.values()}
    assert keys <= needed_by(view.study, view.home).keys
    assert keys <= stage_costs([each.result for each in controls], {}).keys()
