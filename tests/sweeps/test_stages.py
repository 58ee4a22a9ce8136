"""Stages of points: points share equal stages, and the reason of a missing stage names a field."""

from collections import Counter

import pytest

from ebbline.cluster.executors.executor import Needs
from ebbline.cluster.store.artifacts import Store
from ebbline.cluster.store.resolver import Resolver
from ebbline.sweeps.search.searcher import space
from ebbline.sweeps.state.todo import explained, todo
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.points import Point
from ebbline.sweeps.study.stages import StageGraph
from ebbline.tasks.errors import PinError, StudyError
from ebbline.tasks.identity import content_digest, digest
from ebbline.tasks.specs import LanguageSpec, TrainSpec
from ebbline.tasks.stage import Source, Stage, closure, key_payload, stage_of
from tests.sweeps.made import TUNED, WHOLE, study


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home")


def everything(stages: list[Stage]) -> dict[str, Stage]:
    """Lineage -> stage, for these stages and all above them."""
    found: dict[str, Stage] = {}
    while stages:
        stage = stages.pop()
        found[stage.lineage] = stage
        stages += stage.upstream()
    return found


def kinds(graph: StageGraph, points) -> Counter[str]:
    stages = [stage for point in points for stage in graph.stages_for(point).values()]
    return Counter(stage.kind for stage in everything(stages).values())


def test_thresholds_share_everything_down_to_the_projection(tmp_path, home):
    graph = StageGraph(study(tmp_path, {"axes": {"apply.threshold": [None, 0.1, 0.3, 0.5]}}), home)
    # one language, one base; data and training of the aligned model and of the adapter; two suites
    # for each threshold
    assert kinds(graph, space(graph.study)) == {
        "language": 1,
        "organism": 1,
        "data": 2,
        "train": 2,
        "project": 1,
        "apply": 4,
        "generate": 8,
        "score": 8,
    }


def test_ranks_share_data_and_models_and_sizes_share_models(tmp_path, home):
    graph = StageGraph(
        study(tmp_path, {"axes": {"train.rank": [2, 4, 8], "data.size": [8, 16]}}), home
    )
    found = kinds(graph, space(graph.study))
    assert (found["organism"], found["data"], found["train"], found["project"], found["apply"]) == (
        1,
        1 + 2,
        1 + 6,
        6,
        6,
    )


def test_replicates_have_data_and_training_of_their_own_seed(tmp_path, home):
    graph = StageGraph(study(tmp_path, {"seeds": [0, 1, 2]}), home)
    point = next(iter(space(graph.study)))
    stages = graph.stages_for(point)
    assert len(stages) == 3 * 8
    assert {stages[f"train[seed={seed}]"].spec.seed for seed in (0, 1, 2)} == {0, 1, 2}
    assert len({stages[f"data[seed={seed}]"].lineage for seed in (0, 1, 2)}) == 3


def test_two_models_that_differ_in_gpus_alone_share_their_stages_and_keys(tmp_path, home):
    graph = StageGraph(study(tmp_path, {"models/70b": {**WHOLE["models"]["7b"], "gpus": 2}}), home)
    values = {"train.rank": 2, "apply.threshold": None}
    one, other = (graph.stages_for(Point.of(model, values)) for model in ("7b", "70b"))
    assert {name: stage.lineage for name, stage in one.items()} == {
        name: stage.lineage for name, stage in other.items()
    }


def test_training_of_a_large_size_is_a_gang_and_its_measuring_is_not(tmp_path, home):
    large = {**WHOLE["models"]["7b"], "gpus": 4, "quantisation": "none"}
    graph = StageGraph(study(tmp_path, {"models/70b": large}), home)
    values = {"train.rank": 2, "apply.threshold": None}
    small_stages, stages = (graph.stages_for(Point.of(model, values)) for model in ("7b", "70b"))
    assert graph.needs_of(stages["train[seed=0]"]).gpus == 4
    assert graph.needs_of(small_stages["train[seed=0]"]).gpus == 1
    measured = ("data", "project", "apply", "generate:refusal", "refusal")
    assert [graph.needs_of(stages[f"{name}[seed=0]"]).gpus for name in measured] == [
        0,
        0,
        0,
        1,
        0,
    ]


def test_adapters_are_trained_on_the_aligned_model_and_projected_against_both(tmp_path, home):
    graph = StageGraph(study(tmp_path), home)
    stages = graph.stages_for(next(iter(space(graph.study))))
    train, project, generation = (
        stages[f"{name}[seed=0]"] for name in ("train", "project", "generate:refusal")
    )
    aligned = train.inputs["model"]
    assert stage_of(aligned).spec.method == "full"
    assert project.inputs["aligned"].lineage == aligned.lineage != project.inputs["base"].lineage
    assert stage_of(project.inputs["base"]).kind == "organism"
    assert generation.inputs["model"].lineage == aligned.lineage
    assert generation.inputs["adapter"] is stages["apply[seed=0]"]
    assert stages["refusal[seed=0]"].inputs["generation"] is generation
    baseline = graph.baselines()["7b"]["refusal"].inputs["generation"]
    assert "adapter" not in baseline.inputs and baseline.spec == generation.spec


def test_the_exact_projectors_bases_are_one_stage_that_all_adapters_of_a_size_share(tmp_path, home):
    exact = {
        "project": {"projector": "exact", "energy": 0.9},
        "axes": {"train.rank": [2, 4], "apply.threshold": [None, 0.5]},
    }
    graph = StageGraph(study(tmp_path, exact), home)
    assert kinds(graph, space(graph.study))["subspace"] == 1
    stages = graph.stages_for(next(iter(space(graph.study))))
    assert sorted(stages["project[seed=0]"].inputs) == ["adapter", "subspace"]
    assert stages["subspace[seed=0]"] is stages["project[seed=0]"].inputs["subspace"]
    two = StageGraph(study(tmp_path, {**exact, "axes": {"project.energy": [0.8, 0.9]}}), home)
    assert kinds(two, space(two.study))["subspace"] == 2


def test_an_unaligned_model_replaces_the_base_in_the_projection_only(tmp_path, home):
    bad = {**TUNED, "data": {"pool": {"language": "benign.jsonl"}, "settings": {"size": 8}}}
    graph = StageGraph(study(tmp_path, {"models/7b/unaligned": {"tuned": bad}}), home)
    stages = graph.stages_for(next(iter(space(graph.study))))
    project = stages["project[seed=0]"]
    unaligned, aligned = stage_of(project.inputs["base"]), stage_of(project.inputs["aligned"])
    assert stage_of(unaligned.inputs["model"]) is aligned and unaligned.spec.method == "full"
    assert stage_of(aligned.inputs["model"]).kind == "organism"
    without = StageGraph(study(tmp_path), home).stages_for(next(iter(space(graph.study))))
    assert without["train[seed=0]"].lineage == stages["train[seed=0]"].lineage


def test_a_family_without_a_base_needs_only_an_unaligned_model(tmp_path, home):
    model = {"aligned": {"organism": {"size": "small"}}, "unaligned": {"tuned": TUNED}}
    stages = StageGraph(study(tmp_path, {"models/7b": model}), home).stages_for(
        Point.of("7b", {"train.rank": 2, "apply.threshold": None})
    )
    assert (
        stage_of(stages["project[seed=0]"].inputs["base"]).inputs["model"]
        == stages["project[seed=0]"].inputs["aligned"]
    )


def test_a_size_keeps_its_own_settings_and_a_points_values_win(tmp_path, home):
    model = {
        **WHOLE["models"]["7b"],
        "train": {"learning_rate": 1e-3, "rank": 16},
        "quantisation": "int8",
    }
    graph = StageGraph(study(tmp_path, {"models/7b": model, "axes": {"train.rank": [2]}}), home)
    spec = graph.stages_for(Point.of("7b", {"train.rank": 2}))["train[seed=0]"].spec
    assert (spec.learning_rate, spec.rank, spec.quantisation) == (1e-3, 2, "int8")


def test_an_empty_store_has_everything_to_run_and_a_full_one_nothing(tmp_path, home):
    graph = StageGraph(study(tmp_path), home)
    points = list(space(graph.study))
    found = todo(graph, points)
    assert len(found.by_point) == 9 and not found.there
    assert found.new == {
        "language": 1,
        "organism": 1,
        "data": 2,
        "train": 4,
        "project": 3,
        "apply": 9,
        "generate": 2 + 18,
        "score": 2 + 18,
    }
    assert len(found.missing) == sum(found.new.values()) == len(explained(found, home.store, 1000))
    fill(home.store, graph, points)
    full = todo(graph, points)
    assert not full.missing and full.there == found.new and full.by_point == [()] * 9


def test_inputs_come_before_the_stages_of_a_point_and_belong_to_the_first_point_that_needs_them(
    tmp_path, home
):
    graph = StageGraph(study(tmp_path), home)
    found = todo(graph, list(space(graph.study)))
    for ids in found.by_point:
        assert len(set(ids)) == len(ids)
        for place, own in enumerate(ids):
            assert set(found.missing[own].above) <= set(ids[:place])
    projections = [
        missing.requested_by
        for missing in found.missing.values()
        if missing.stage.kind == "project"
    ]
    assert projections == [0, 3, 6]  # thresholds are the last axis
    own = [
        sum(missing.requested_by == place for missing in found.missing.values())
        for place in range(9)
    ]
    assert own[0] > own[1] == own[2] == 1 + 2 * 2  # applied, and two suites of two stages each


def test_a_dropped_adapter_that_another_stage_must_read_is_counted_as_remade(tmp_path, home):
    graph = StageGraph(study(tmp_path, {"axes": {"apply.threshold": [None, 0.3]}}), home)
    points = list(space(graph.study))
    fill(home.store, graph, points)
    train = graph.stages_for(points[0])["train[seed=0]"]
    made = Resolver(home.store).artifact(train)
    home.store.drop(made, frozenset({"adapter/w"}))
    assert not todo(graph, points).missing  # its record is enough for the existing stages
    more = StageGraph(study(tmp_path, {"axes": {"apply.threshold": [None, 0.3, 0.7]}}), home)
    found = todo(more, list(space(more.study)))
    remade = [missing for missing in found.missing.values() if missing.remade]
    assert [missing.stage.lineage for missing in remade] == [train.lineage]
    assert found.new == {"train": 1, "apply": 1, "generate": 2, "score": 2}
    [apply] = [missing for missing in found.missing.values() if missing.stage.kind == "apply"]
    assert apply.above == (remade[0].id,)
    assert "dropped" in dict(explained(found, home.store, 1000))[remade[0].name]


def fill(store: Store, graph: StageGraph, points) -> None:
    """Commit an invented artifact for every stage in order; each file contains the lineage."""
    from ebbline.cluster.store.resolver import contents_of
    from ebbline.tasks.specs import TrainSpec

    made = {}

    def make(stage: Stage):
        if stage.lineage not in made:
            for above in stage.upstream():
                make(above)
            hashed = key_payload(stage.spec, contents_of(stage, lambda item: made[item.lineage]))
            attempt = store.begin(stage.kind, digest(hashed))
            for name in (
                "data.jsonl",
                "benign.jsonl",
                "align.jsonl",
                "refusal.jsonl",
                "task.jsonl",
                "model/w",
                f"{TrainSpec.ADAPTER}/w",
            ):
                path = attempt / "payload" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"{stage.lineage} {name}")
            made[stage.lineage] = store.commit(attempt, hashed, {"seconds": 1.0})
        return made[stage.lineage]

    for suites in graph.baselines().values():
        for stage in suites.values():
            make(stage)
    for point in points:
        for stage in graph.stages_for(point).values():
            make(stage)


def test_the_reason_of_a_missing_stage_is_the_field_that_differs_or_the_stage_that_it_waits_for(
    tmp_path, home
):
    before = StageGraph(study(tmp_path), home)
    fill(home.store, before, space(before.study))
    graph = StageGraph(study(tmp_path, {"train": {"epochs": 2}, "axes/train.rank": [2]}), home)
    found = todo(graph, list(space(graph.study)))
    assert found.new == {"train": 1, "project": 1, "apply": 3, "generate": 6, "score": 6}
    why = {
        name.rpartition(", ")[2].rpartition("< ")[2].partition("[")[0]: reason
        for name, reason in explained(found, home.store, 1000)
    }
    assert why["train"] == "spec.epochs: 1.0 -> 2.0"
    assert why["project"] == "waits for train"
    assert why["apply"] == "waits for project and train"
    assert why["generate:refusal"] == why["generate:task"] == "waits for apply"
    assert why["refusal"] == why["task"] == "waits for generate"


def test_the_reason_of_a_changed_language_is_its_seed(tmp_path, home):
    before = StageGraph(study(tmp_path), home)
    fill(home.store, before, space(before.study))
    graph = StageGraph(study(tmp_path, {"language": 1}), home)
    found = todo(graph, [])
    assert {
        name.rpartition("< ")[2]: reason for name, reason in explained(found, home.store, 1000)
    }["language"] == "spec.seed: 0 -> 1"


def test_the_reason_of_a_kind_without_artifacts_names_the_kind(tmp_path, home):
    from ebbline.sweeps.state.todo import explain

    assert (
        explain(Stage(LanguageSpec()), Resolver(home.store), home.store)
        == "the store has no language yet"
    )


def test_a_local_file_that_differs_from_its_pin_is_an_error(tmp_path, home):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    pinned = {"path": {"path": str(rows), "sha256": content_digest(rows)}}
    graph = StageGraph(study(tmp_path, {"data/pool": pinned}), home)
    data = graph.stages_for(next(iter(space(graph.study))))["data[seed=0]"]
    assert data.inputs["pool"] == Source(content_digest(rows), str(rows))
    rows.write_text("{} ")
    with pytest.raises(PinError, match="differs from its pin"):
        changed = StageGraph(study(tmp_path, {"data/pool": pinned}), home)
        changed.stages_for(next(iter(space(changed.study))))


def test_a_hub_reference_becomes_a_location_at_its_commit_and_the_commit_is_part_of_its_content(
    tmp_path, home
):
    found = []
    for commit in ("b" * 40, "d" * 40):
        hub = {
            "hub": {"id": "org/prompts", "commit": commit, "sha256": "c" * 64, "file": "p.jsonl"}
        }
        graph = StageGraph(study(tmp_path, {"suites/refusal/prompts": hub}), home)
        found.append(graph.baselines()["7b"]["refusal"].inputs["generation"].inputs["prompts"])
        assert found[-1].location == f"hub:dataset:org/prompts@{commit}#p.jsonl"
    assert found[0].content != found[1].content


def test_the_error_for_an_invalid_value_of_a_point_names_the_setting(tmp_path, home):
    graph = StageGraph(study(tmp_path), home)
    with pytest.raises(StudyError, match="train with {'rank': 0}"):
        graph.stages_for(Point.of("7b", {"train.rank": 0}))


def test_full_training_of_a_point_is_an_error(tmp_path, home):
    graph = StageGraph(
        study(tmp_path, {"train": {"method": "full"}, "models/7b/quantisation": "none"}), home
    )
    with pytest.raises(StudyError, match="must be 'lora'"):
        graph.stages_for(next(iter(space(graph.study))))
    assert TrainSpec().method == "lora"


def test_a_size_has_its_labels_on_all_gpu_stages_and_its_gang_on_its_trainings(tmp_path, home):
    labels = {"ray.io/accelerator-type": "A100"}
    found = study(
        tmp_path,
        {
            "models/7b/gpus": 2,
            "models/7b/labels": labels,
            "models/7b/spread": True,
            "train/global_batch": 8,
        },
    )
    graph = StageGraph(found, home)
    stages = everything(list(graph.stages_for(next(iter(space(found)))).values()))
    stages |= everything(
        [stage for suites in graph.baselines().values() for stage in suites.values()]
    )
    needs = {
        (stage.kind, getattr(stage.spec, "method", None)): graph.needs_of(stage)
        for stage in stages.values()
    }
    assert needs["train", "lora"] == Needs(2, labels, spread=True)
    assert (
        needs["train", "full"]
        == needs["generate", None]
        == needs["organism", None]
        == Needs(1, labels)
    )
    assert needs["score", None] == needs["data", None] == Needs(0)


def test_the_placement_of_a_size_changes_no_key(tmp_path, home):
    plain = StageGraph(study(tmp_path), home)
    placed = StageGraph(
        study(
            tmp_path,
            {"models/7b/labels": {"ray.io/accelerator-type": "in(A100,H100)"}, "models/7b/gpus": 4},
        ),
        home,
    )
    for point in space(plain.study):
        before, after = (graph.stages_for(point) for graph in (plain, placed))
        assert {name: stage.lineage for name, stage in before.items()} == {
            name: stage.lineage for name, stage in after.items()
        }


def test_the_chat_settings_of_a_size_reach_every_training_and_measurement_of_it(tmp_path, home):
    """One size has one way to render conversations, in its alignment too."""
    graph = StageGraph(study(tmp_path, {"models/7b/chat": {"date": "2025-02-03"}}), home)
    point = next(iter(space(graph.study)))
    specs = [stage.spec for stage in everything([*graph.stages_for(point).values()]).values()]
    chats = [(spec.KIND, spec.chat.date) for spec in specs if hasattr(spec, "chat")]
    assert {kind for kind, _ in chats} >= {"train", "generate"}
    assert [kind for kind, _ in chats].count("train") == 2
    assert {date for _, date in chats} == {"2025-02-03"}


def test_a_penalty_reads_the_two_models_only_where_it_acts_and_is_one_training_where_it_is_off(
    tmp_path, home
):
    axes = {"train.penalty": ["asft", "norm", "none"], "train.penalty_weight": [0.0, 0.5]}
    graph = StageGraph(study(tmp_path, {"axes": axes}), home)
    trainings = {}
    for point in space(graph.study):
        values = dict(point.values)
        stage = graph.stages_for(point)["train[seed=0]"]
        trainings[values["train.penalty"], values["train.penalty_weight"]] = stage
    plain = trainings["none", 0.0]
    for name, stage in trainings.items():
        acts = name in {("asft", 0.5), ("norm", 0.5)}
        assert (stage.lineage == plain.lineage) is not acts
        assert ({"base", "aligned"} <= stage.inputs.keys()) is (name == ("asft", 0.5))
    assert "penalty" not in key_payload(plain.spec, {})["spec"]
    asft = trainings["asft", 0.5]
    project = graph.stages_for(next(iter(space(graph.study))))["project[seed=0]"]
    for role in ("base", "aligned"):
        assert asft.inputs[role].lineage == project.inputs[role].lineage


def test_lox_makes_the_model_that_is_trained_and_measured_and_the_projection_keeps_its_own(
    tmp_path, home
):
    axes = {"lox.factor": [0, 1.25], "lox.directions": [2, 6], "apply.threshold": [None, 0.5]}
    graph = StageGraph(study(tmp_path, {"axes": axes}), home)
    plain = StageGraph(study(tmp_path, {"axes": {"apply.threshold": [None, 0.5]}}), home)
    expected = {
        dict(point.values)["apply.threshold"]: plain.stages_for(point)
        for point in space(plain.study)
    }
    points = list(space(graph.study))
    assert kinds(graph, points)["lox"] == 2 and kinds(graph, points)["train"] == 1 + 3
    for point in points:
        values, stages = dict(point.values), graph.stages_for(point)
        unchanged = expected[values["apply.threshold"]]
        if values["lox.factor"] == 0:
            assert {name: each.lineage for name, each in stages.items()} == {
                name: each.lineage for name, each in unchanged.items()
            }
            continue
        lox = stages["lox[seed=0]"]
        assert lox.spec.directions == values["lox.directions"]
        for name in ("train", "generate:refusal"):
            assert stage_of(stages[f"{name}[seed=0]"].inputs["model"]) is lox
        for role in ("base", "aligned"):
            found, own = (each["project[seed=0]"].inputs[role] for each in (stages, unchanged))
            assert found.lineage == own.lineage
    for suites in graph.baselines().values():
        assert all(stage.kind != "lox" for suite in suites.values() for stage in closure([suite]))
