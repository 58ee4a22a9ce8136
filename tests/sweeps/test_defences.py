"""Several defences in one study: the space, equal points, stages, and what old files mean."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from optuna.trial import TrialState, create_trial

from ebbline.analysis.results.comparison import same_settings
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.search.importance import importances
from ebbline.sweeps.search.masks import distinct_masks
from ebbline.sweeps.search.searcher import StudySearcher
from ebbline.sweeps.state.parameters import Names, is_whole, point_of
from ebbline.sweeps.study.changes import lasting, rejections
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import (
    Point,
    Result,
    adapter_of,
    brought,
    defence_of,
    training_of,
    without_defence,
)
from ebbline.sweeps.study.space import listed, space
from ebbline.sweeps.study.stages import StageGraph
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.study_file import as_yaml, parse
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.defences.in_use import DEFENCES, NONE
from ebbline.tasks.defences.safe_lora import SAFE_LORA
from ebbline.tasks.defences.settings import DEFAULT_ENERGY
from ebbline.tasks.errors import StudyError
from ebbline.tasks.measuring.metrics import Metric
from ebbline.tasks.models.brought.folder import adapter_digest
from ebbline.tasks.specs import ApplySpec, MeasureSpec, ProjectSpec
from tests.brought import adapter_folder
from tests.sweeps.made import Imagined, outcome, study
from tests.sweeps.pretended import Pretended, small
from tests.sweeps.test_search import empty_storage, fresh_url  # noqa: F401
from tests.sweeps.test_stages import kinds

THRESHOLDS = [0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7]
FOUR = {
    "safe_lora": {"threshold": THRESHOLDS},
    "scale": {"factor": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]},
    "drop": {"threshold": THRESHOLDS},
    "subspace_removal": {"k": [1, 2, 4, 8, 16, 32, 48, 64, 96, 128]},
}
RANGES = {
    "safe_lora": {"threshold": {"low": 0.0, "high": 1.0}},
    "scale": {"factor": {"low": 0.0, "high": 1.0}},
}


def several(folder: Path, defences: dict, **others: object) -> Study:
    axes = {"axes": {"train.rank": [2]}, "defences": defences}
    return study(folder, {**axes, **others})


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home")


def test_four_defences_at_ten_settings_on_one_training_are_one_training(tmp_path, home):
    graph = StageGraph(several(tmp_path, FOUR), home)
    found = kinds(graph, space(graph.study))
    # one training is that of the aligned model; no defence and `scale` list modules, without models
    assert found["train"] == 2 and graph.study.size == 41
    assert (found["project"], found["measure"], found["apply"], found["defend"]) == (2, 1, 11, 30)


def test_a_point_has_the_knobs_of_its_own_defence_and_no_defence_is_one_point(tmp_path):
    found = several(tmp_path, {"safe_lora": {"threshold": [0.3]}, "scale": {"factor": [0.5, 0.1]}})
    assert [dict(point.values) for point in space(found)] == [
        {"defence": NONE, "train.rank": 2},
        {"apply.threshold": 0.3, "defence": "safe_lora", "train.rank": 2},
        {"defence": "scale", "scale.factor": 0.5, "train.rank": 2},
        {"defence": "scale", "scale.factor": 0.1, "train.rank": 2},
    ]
    points = list(space(found))
    assert len({training_of(point) for point in points}) == 1
    assert len({without_defence(point) for point in points}) == 1
    assert [defence_of(point).name for point in points] == [NONE, "safe_lora", "scale", "scale"]
    assert adapter_of(points[2]) == adapter_of(points[3]) != adapter_of(points[1])
    assert all(listed({"model": "7b", **dict(p.values)}, found, "here") == p for p in points)


def test_every_point_is_a_trial_and_comes_back(tmp_path):
    found = several(tmp_path, FOUR)
    names = Names(found)
    for point in space(found):
        trial = create_trial(state=TrialState.RUNNING, **names.parameters(point))
        assert point_of(trial) == point and is_whole(trial, found)


def test_safe_lora_among_others_has_the_stages_that_it_has_alone(tmp_path, home):
    (tmp_path / "old").mkdir()
    old = study(tmp_path / "old", {"axes": {"train.rank": [2], "apply.threshold": [0.3]}})
    new = several(tmp_path, {"safe_lora": {"threshold": [0.3]}, "scale": {}})
    (before,) = space(old)
    after = next(point for point in space(new) if defence_of(point).name == "safe_lora")
    one, other = (
        StageGraph(each, home).stages_for(point) for each, point in ((old, before), (new, after))
    )
    assert {n: s.lineage for n, s in one.items()} == {n: s.lineage for n, s in other.items()}


def test_an_old_file_means_safe_lora_and_is_stored_as_before(tmp_path):
    old = study(tmp_path)
    assert [each.name for each in old.used_defences] == ["safe_lora"]
    assert not {"defences", "controls"} & old.model_dump(mode="json").keys()
    assert old.used_controls.settings == 0
    assert all(defence_of(point).name == "safe_lora" for point in space(old))


def test_a_study_with_defences_is_written_and_read_again(tmp_path):
    found = several(tmp_path, {**RANGES, "drop": {"modules": [2], "projector": "exact"}},
                    search={"points": 9}, controls=False)  # fmt: skip
    assert parse(tmp_path / "again.yaml", as_yaml(found)) == found
    stored = found.model_dump_json()
    assert Study.model_validate_json(stored).model_dump_json() == stored
    assert found.used_controls.settings == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"defences": {"skale": {}}}, "did you mean 'scale'"),
        ({"defences": {"scale": {"facto": [0.5]}}}, "did you mean 'factor'"),
        ({"defences": {"scale": {"factor": [0.5, 1.5]}}}, "it takes: 0 to 1"),
        ({"defences": {"scale": {"factor": [0.5, 0.5]}}}, "duplicate"),
        ({"defences": {"none": {}}}, "leave it out"),
        ({"defences": {"safe_lora": {"threshold": [None, 0.5]}}}, "null is no setting"),
        ({"defences": {"safe_lora": {"threshold": [2.0]}}}, "less than or equal to 1"),
        ({"defences": {"drop": {"energy": 0.9}}}, "energy is a setting of the exact projector"),
        ({"defences": {"safe_merge": {}}, "axes": {}}, "`safety` is missing"),
        (
            {"defences": {"scale": {}}, "axes": {"apply.threshold": [0.5]}},
            r"write defences\.safe_lora\.threshold",
        ),
        ({"defences": {"scale": {}}, "apply": {"threshold": 0.5}}, r"defences\.safe_lora"),
        ({"axes": {"scale.factor": [0.5]}}, "is not one of"),
        ({"controls": 12}, "less than or equal to 9"),
    ],
)
def test_a_fault_of_defences_names_its_place(tmp_path, changes, message):
    with pytest.raises(StudyError, match=message):
        study(tmp_path, changes)


def test_a_model_without_a_base_has_only_defences_that_read_none(tmp_path):
    aligned = {"models/7b": {"aligned": {"organism": {"size": "small"}}}}
    found = several(tmp_path, {"scale": {"factor": [0.5]}}, **aligned)
    assert found.size == 2
    with pytest.raises(StudyError, match=r"`base` is missing: defences\.drop"):
        several(tmp_path, {"drop": {}}, **aligned)


def test_one_size_may_have_its_own_values_of_a_knob(tmp_path, home):
    own = {"models/7b/axes": {"subspace_removal.k": [64]}}
    found = several(tmp_path, {"subspace_removal": {"k": [1, 2]}, "scale": {}}, **own)
    points = [point for point in space(found) if defence_of(point).name == "subspace_removal"]
    assert [dict(point.values)["subspace_removal.k"] for point in points] == [64]
    stages = StageGraph(found, home).stages_for(points[0])
    assert stages["measure[seed=0]"].spec == MeasureSpec(method="subspace_removal", knobs={"k": 64})


def test_a_projector_may_be_varied(tmp_path, home):
    found = several(tmp_path, {"drop": {"projector": ["approximate", "exact"], "threshold": [0.4]}})
    graph = StageGraph(found, home)
    points = [point for point in space(found) if defence_of(point).name == "drop"]
    firsts = [graph.stages_for(point)["project[seed=0]"].spec for point in points]
    assert firsts == [ProjectSpec(), ProjectSpec(projector="exact", energy=0.9)]
    assert "subspace[seed=0]" in graph.stages_for(points[1])


@pytest.mark.parametrize(
    ("name", "values", "off"),
    [
        ("scale", {"scale.factor": 1.0}, True),
        ("scale", {"scale.factor": 0.5}, False),
        ("drop", {"drop.threshold": 0.05}, True),
        ("drop", {"drop.threshold": 0.2}, False),
        ("safe_lora", {"apply.threshold": 0.05}, True),
        ("subspace_removal", {"subspace_removal.k": 0}, True),
        (NONE, {}, True),
    ],
)
def test_settings_that_change_nothing_have_the_mask_of_no_defence(tmp_path, name, values, off):
    found, readings = several(tmp_path, FOUR), (np.array([0.1, 0.3]), np.array([0.2, 0.2]))
    defence = DEFENCES[name]
    mask = defence.mask(found.knobs(defence, values), readings)
    assert (mask == (0, 0)) is off and mask is not None


def test_two_thresholds_that_drop_the_same_modules_are_one_mask(tmp_path):
    found = several(tmp_path, {"drop": {"threshold": [0.05, 0.15, 0.4, 0.9]}})
    readings = (np.array([0.1, 0.3]),)
    masks = distinct_masks(found, DEFENCES["drop"], "7b", readings)
    # 0.05 changes nothing, which is the point with no defence; 0.4 and 0.9 drop all modules
    assert list(masks.values()) == [{"drop.threshold": 0.15}, {"drop.threshold": 0.4}]


def test_more_settings_of_a_defence_or_another_one_extend_a_study_and_fewer_do_not(tmp_path):
    def dumped(defences: dict) -> dict:
        return lasting(several(tmp_path, defences).model_dump(mode="json"))

    before = dumped({"scale": {"factor": [0.5]}})
    assert not list(rejections(before, dumped({"scale": {"factor": [0.5, 0.6]}, "drop": {}})))
    (line,) = rejections(before, dumped({"drop": {}}))
    assert line.startswith("defences.scale: ")
    (line,) = rejections(before, dumped({"scale": {"factor": [0.6]}}))
    assert line.startswith("defences.scale.factor: 0.5 is missing")
    (line,) = rejections(before, dumped({"scale": {"factor": [0.5], "types": "q_proj"}}))
    assert line.startswith("defences.scale.types: ")
    assert list(rejections(lasting(study(tmp_path).model_dump(mode="json")), before))


@pytest.mark.parametrize("sampler", ["stage_aware", "gp", "tpe", "random", "nsga2"])
def test_each_defence_is_tried_as_often_as_another(tmp_path, empty_storage, sampler):  # noqa: F811
    search = {"sampler": sampler, "points": 16, "order": "in_turn", "window": 2}
    found = several(tmp_path, RANGES, search=search, axes={"train.rank": [2, 4]})
    searcher, knowledge = (
        StudySearcher(found, fresh_url(tmp_path / "o.db", empty_storage)),
        Imagined(),
    )
    knowledge.study = found
    points: list[Point] = []
    while (asked := searcher.ask(knowledge)) is not None:
        number, point = asked
        points.append(point)
        searcher.tell(number, outcome(number, point))
    counts = Counter(defence_of(point).name for point in points)
    assert counts == {NONE: 2, "safe_lora": 7, "scale": 7}
    assert len(set(points)) == len(points)


def test_no_defence_is_a_stage_that_changes_no_module(tmp_path, home):
    graph = StageGraph(several(tmp_path, FOUR), home)
    stages = graph.stages_for(next(iter(space(graph.study))))
    assert stages["apply[seed=0]"].spec == ApplySpec()
    assert set(stages["project[seed=0]"].inputs) == {"adapter"}


def test_importance_is_told_of_each_defences_own_points(tmp_path):
    factors = [round(0.08 * n, 2) for n in range(12)]
    found = several(tmp_path, {"scale": {"factor": factors}, "drop": {"threshold": [0.3]}})
    results = []
    for number, point in enumerate(space(found)):
        factor = dict(point.values).get("scale.factor", 0.5)
        refused = 90 - round(80 * float(str(factor)))
        metrics = {
            "refusal.refusal_rate": Metric("refusal_rate", refused, 100),
            "task.task_accuracy": Metric("task_accuracy", 100 - refused, 100),
        }
        results.append(Result(number, point, "done", metrics))
    told = importances(found, results)["refusal.refusal_rate"]
    assert told.of_defence["scale.factor"].value > 0.9
    assert "scale.factor" not in told.shares
    assert told.without["drop.threshold"] == "one value"


def test_adapters_from_outside_have_every_defence_beside_trained_ones(tmp_path, home):
    adapter_folder(tmp_path / "mine", seed=0)
    pin = {"path": str(tmp_path / "mine"), "sha256": adapter_digest(tmp_path / "mine")}
    found = several(
        tmp_path,
        {"scale": {"factor": [0.5, 0.1]}, "drop": {"modules": [1]}},
        adapters={"mine": {"path": pin}},
    )
    points = list(space(found))
    assert found.size == len(points) == 2 * 4
    own = [point for point in points if brought(point)]
    assert [defence_of(point).name for point in own] == [NONE, "scale", "scale", "drop"]
    names = Names(found)
    for point in points:
        trial = create_trial(state=TrialState.RUNNING, **names.parameters(point))
        assert point_of(trial) == point and is_whole(trial, found)
    stages = StageGraph(found, home).stages_for(own[1])
    assert {"adapter[seed=0]", "defend[seed=0]"} <= stages.keys()
    assert "train[seed=0]" not in stages


def test_a_study_that_names_defences_is_compared_with_one_that_has_safe_lora_alone(tmp_path):
    (tmp_path / "old").mkdir()
    axes = {"train.rank": [2], "apply.threshold": [None, 0.3]}
    old = study(tmp_path / "old", {"axes": axes})
    new = several(tmp_path, {"safe_lora": {"threshold": [0.3]}, "scale": {"factor": [0.5]}})
    before, after = (
        SimpleNamespace(
            study=each,
            of=lambda model, each=each: [
                Result(number, point, "done") for number, point in enumerate(space(each))
            ],
        )
        for each in (old, new)
    )
    pairs = [(one.number, other.number) for one, other in same_settings(before, after, "7b")]
    assert pairs == [(0, 0), (1, 1)]


@pytest.mark.slow
def test_a_run_of_four_defences_at_ten_settings_trains_once(tmp_path, home):
    axes = {"axes": {"train.rank": [2]}, "defences": FOUR}
    found = small(tmp_path, **axes, controls=False)
    executor = Pretended(home.store)
    progress = drive(StudyView(found, home), lambda: executor)
    ran = Counter(request.kind for request in executor.requests.values())
    assert progress.completed == 41 and all(each.status == "done" for each in progress.results)
    # `project` once with the models for both gated defences, and once without them
    assert (ran["train"], ran["project"], ran["measure"]) == (1, 2, 1)
    assert ran["generate"] < 2 * 41  # equal adapters are measured once


def test_an_axis_of_both_projectors_has_an_energy_where_one_is_needed(tmp_path):
    for safe_lora in (
        {"projector": ["approximate", "exact"], "threshold": [0.3]},
        {"projector": ["approximate", "exact"], "energy": 0.5, "threshold": [0.3]},
    ):
        found = several(tmp_path, {"safe_lora": safe_lora})
        energies = {
            name: SAFE_LORA.with_values(
                found.defence_specs(SAFE_LORA), {"project.projector": name, "apply.threshold": 0.3}
            )[0].energy
            for name in ("approximate", "exact")
        }
        assert energies == {"approximate": None, "exact": safe_lora.get("energy", DEFAULT_ENERGY)}
