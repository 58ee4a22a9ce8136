"""Adapters from outside as points of a study: the space, the stages, seeds, the search, changes."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState, create_trial

from ebbline.analysis.results.collect import collect
from ebbline.analysis.results.comparison import same_settings
from ebbline.analysis.results.measurements import partners, undefended
from ebbline.analysis.results.tables import frontier_cells, results_frame
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.search.importance import importances
from ebbline.sweeps.search.searcher import check_written_points
from ebbline.sweeps.state.parameters import Names, is_whole, point_of
from ebbline.sweeps.state.replicates import seeds_needed, seeds_of
from ebbline.sweeps.study.adapters.kept import kept_path
from ebbline.sweeps.study.changes import differences, lasting, rejections
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.pins import references, unpinned
from ebbline.sweeps.study.points import Point, Result, brought, is_as_trained
from ebbline.sweeps.study.space import listed, space
from ebbline.sweeps.study.stages import StageGraph
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.study_file import as_yaml, parse
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import PinError, StudyError
from ebbline.tasks.headers.files import ADAPTER_WEIGHTS
from ebbline.tasks.models.brought.folder import adapter_digest
from ebbline.tasks.specs import AdapterSpec, GenerateSpec, SubspaceSpec
from ebbline.tasks.stage import Source
from tests.brought import BESIDE, adapter_folder, with_layout
from tests.sweeps.made import changed, study
from tests.sweeps.pretended import Pretended, small

THRESHOLDS = [None, 0.3, 0.5]
ADAPTERS = ("first", "second")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two adapters."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(ADAPTERS):
        adapter_folder(root / name, seed=seed)
    return root


def pinned(folder: Path, **settings: object) -> dict[str, object]:
    return {"path": {"path": str(folder), "sha256": adapter_digest(folder)}, **settings}


def given_two(folder: Path) -> dict[str, object]:
    return {name: pinned(folder / name) for name in ADAPTERS}


def only(tmp_path: Path, folder: Path, **others: object) -> Study:
    """A study that trains nothing."""
    changes = {"adapters": given_two(folder), "axes": {"apply.threshold": THRESHOLDS}, **others}
    whole = changed(changes)
    del whole["train"], whole["data"]
    path = tmp_path / "only.yaml"
    path.write_text(as_text(whole))
    return parse(path)


def as_text(whole: dict[str, object]) -> str:
    return yaml.safe_dump(whole, sort_keys=False)


def test_a_study_of_adapters_has_a_point_for_each_adapter_and_threshold(tmp_path, folder):
    found = only(tmp_path, folder)
    points = list(space(found))
    assert found.sampler == "grid" and found.size == len(points) == 6
    assert [dict(point.values) for point in points] == [
        {"adapter": name, "apply.threshold": value} for name in ADAPTERS for value in THRESHOLDS
    ]
    assert str(points[1]) == "7b adapter=first threshold=0.3"
    assert all(listed({"model": "7b", **dict(p.values)}, found, "here") == p for p in points)


def test_a_study_of_adapters_is_written_and_read_again(tmp_path, folder):
    found = only(tmp_path, folder)
    text = as_yaml(found)
    assert "train:" not in text.partition("suites:")[0].partition("models:")[0]
    assert parse(tmp_path / "again.yaml", text) == found
    stored = found.model_dump_json()
    assert Study.model_validate_json(stored).model_dump_json() == stored
    assert {where for where, _ in references(found)} >= {f"adapters.{n}.path" for n in ADAPTERS}
    assert not [where for where, _ in unpinned(found) if where.startswith("adapters")]


def test_trained_points_keep_their_ids_stages_and_seeds_beside_adapters(tmp_path, folder):
    seeds = {"seeds": [0, 1, 2]}
    plain = study(tmp_path, seeds)
    both = study(tmp_path, {**seeds, "adapters": given_two(folder)})
    trained = [point for point in space(both) if brought(point) is None]
    assert trained == list(space(plain)) and both.size == len(trained) + 6
    one, other = (StageGraph(each, Home(tmp_path / "home")) for each in (plain, both))
    for point in trained:
        before, after = one.stages_for(point), other.stages_for(point)
        assert {n: s.lineage for n, s in before.items()} == {n: s.lineage for n, s in after.items()}
    own = next(point for point in space(both) if brought(point))
    stages = other.stages_for(own)
    assert Counter(stage.kind for stage in stages.values()) == {
        "adapter": 1,
        "project": 1,
        "apply": 1,
        "generate": 2,
        "score": 2,
    }
    assert all(name.endswith("[seed=0]") for name in stages)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"models/13b": "7b"}, "adapters.first.model is missing: give one of ['13b', '7b']"),
        ({"adapters/first/model": "70b"}, "adapters.first.model: '70b' is not one of ['7b']"),
        ({"axes/train.rank": [2]}, "axes.train.rank: nothing is trained"),
        ({"models/7b/axes": {"data.size": [2]}}, "models.7b.axes.data.size: nothing is trained"),
        ({"models/7b/train": {"rank": 2}}, "models.7b.train: nothing is trained"),
        ({"train": {"epochs": 1}}, "`data` is missing: a study with `train` trains adapters"),
        ({"adapters": {}}, "give `train` and `data`, whose adapters are trained, or `adapters`"),
        ({"adapters/first/hub": {"id": "a/b"}}, "adapters.first: give either `path` or `hub`"),
        ({"adapters/first/path": None}, "adapters.first: give either `path` or `hub`"),
        ({"axes/adapter": ["first"]}, "axes.adapter: 'adapter' is not one of"),
        ({"adapters/First": "first"}, "'First' and 'first' differ only in case"),
        ({"adapters/first/tokenizer": "mine"}, "adapters.first.tokenizer: "),
    ],
)
def test_a_fault_of_the_adapters_names_its_field(tmp_path, folder, changes, fault):
    whole = changed({"adapters": given_two(folder), "axes": {"apply.threshold": THRESHOLDS}})
    del whole["train"], whole["data"]
    for path, value in changes.items():
        *above, last = path.split("/")
        place = whole
        for part in above:
            place = place[part]
        place[last] = place[value] if isinstance(value, str) and value in place else value
    with pytest.raises(StudyError) as error:
        parse(tmp_path / "study.yaml", as_text(whole))
    assert fault in str(error.value)


def test_a_written_point_gives_the_axes_of_one_branch(tmp_path, folder):
    search = {"points": 4, "first": [{"model": "7b", "adapter": "first"}]}
    found = study(tmp_path, {"adapters": given_two(folder), "search": search})
    wanted = r"each of \['apply.threshold', 'train.rank'\] or \['adapter', 'apply.threshold'\]"
    with pytest.raises(StudyError, match=wanted):
        check_written_points(found)


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 64), unique=True, max_size=3),
    thresholds=st.lists(st.sampled_from([None, 0.1, 0.2, 0.4]), unique=True, max_size=3),
    own=st.booleans(),
    of_each=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    trains=st.booleans(),
)
def test_every_point_of_any_study_survives_the_file_and_the_database(
    folder, ranks, thresholds, own, of_each, trains
):
    """Sizes with and without adapters, trained or not, with axes of their own."""
    size = changed({})["models"]["7b"]
    models = {"7b": size, "70b": {**size, **({"axes": {"data.size": [8, 9]}} if own else {})}}
    adapters = {
        f"{model}-{number}": pinned(folder / ADAPTERS[number], model=model)
        for model, count in zip(models, of_each, strict=True)
        for number in range(count)
    }
    axes = {"train.rank": ranks} if ranks else {}
    whole = changed({"models": models, "axes": axes, "adapters": adapters})
    if thresholds:
        whole["axes"]["apply.threshold"] = thresholds
    if not trains:
        whole["models"] = {"7b": size, "70b": size}
        whole["axes"].pop("train.rank", None)
        del whole["train"], whole["data"]
        if not adapters:
            return
    found = Study.model_validate_json(json.dumps(whole))
    stored = found.model_dump_json()
    assert Study.model_validate_json(stored).model_dump_json() == stored
    names, points = Names(found), list(space(found))
    assert len(points) == len(set(points)) == found.size
    for point in points:
        trial = create_trial(state=TrialState.RUNNING, **names.parameters(point))
        assert point_of(trial) == point and is_whole(trial, found)
        assert listed({"model": point.model, **dict(point.values)}, found, "here") == point
        trained_axes = {axis for axis, _ in point.values if axis.startswith(("train.", "data."))}
        assert (brought(point) is None) or not trained_axes


@pytest.mark.parametrize("tool", BESIDE)
def test_what_a_tool_leaves_beside_an_adapter_is_no_part_of_it(tmp_path, folder, tool):
    adapter = adapter_folder(tmp_path / "run")
    before = adapter_digest(adapter)
    with_layout(adapter, tool)
    assert (adapter_digest(adapter) == before) == (tool != "unsloth")  # it adds to the config
    found = only(tmp_path, folder, adapters={"run": pinned(adapter)})
    home = Home(tmp_path / "home")
    stages = StageGraph(found, home).stages_for(next(iter(space(found))))
    source = stages["adapter[seed=0]"].inputs["source"]
    assert isinstance(source, Source) and source.content == adapter_digest(adapter)
    copy = Path(source.location)
    assert copy == kept_path(home.root, source.content)
    assert {path.name for path in copy.iterdir()} == {"adapter_config.json", ADAPTER_WEIGHTS}
    (adapter / "checkpoint-9").mkdir(exist_ok=True)
    (adapter / "checkpoint-9" / "optimizer.pt").write_text("later")
    assert StageGraph(found, home).stages_for(next(iter(space(found))))  # the training goes on
    adapter_folder(adapter, seed=5)
    with pytest.raises(PinError, match="differs from its pin"):
        StageGraph(found, home)._outside(found.adapters["run"].path, "model")


def test_a_damaged_copy_in_the_home_is_made_again_and_keys_need_no_original(tmp_path, folder):
    found, home = only(tmp_path, folder), Home(tmp_path / "home")
    point = next(iter(space(found)))
    keys = {name: s.lineage for name, s in StageGraph(found, home).stages_for(point).items()}
    copy = kept_path(home.root, adapter_digest(folder / "first")) / ADAPTER_WEIGHTS
    whole = copy.read_bytes()
    copy.write_bytes(whole[:-1] + b"x")
    StageGraph(found, home).stages_for(point)
    assert copy.read_bytes() == whole
    moved = {n: {"path": {**e["path"], "path": "gone"}} for n, e in given_two(folder).items()}
    elsewhere = only(tmp_path, folder, adapters=moved)
    again = StageGraph(elsewhere, home, located=False).stages_for(point)
    assert {name: stage.lineage for name, stage in again.items()} == keys


def test_the_exact_projector_has_a_basis_for_the_modules_of_each_adapter(tmp_path, folder):
    exact = {"project": {"projector": "exact", "energy": 0.9}}
    hub = {"hub": {"id": "a/b", "commit": "1" * 40, "sha256": "2" * 64}}
    found = only(tmp_path, folder, **exact, adapters={**given_two(folder), "far": hub})
    graph = StageGraph(found, Home(tmp_path / "home"))
    modules = []
    for name in ("first", "far"):
        stages = graph.stages_for(Point.of("7b", {"adapter": name, "apply.threshold": None}))
        spec = stages["subspace[seed=0]"].spec
        assert isinstance(spec, SubspaceSpec)
        modules.append(spec.target_modules)
    assert modules[0] == ("q_proj", "v_proj") and len(modules[1]) == 7


def test_only_an_adapter_that_says_so_brings_its_tokenizer_to_the_suites(tmp_path, folder):
    two = given_two(folder)
    two["first"] = {**two["first"], "tokenizer": "adapter"}
    graph = StageGraph(only(tmp_path, folder, adapters=two), Home(tmp_path / "home"))
    used = {}
    for name in ADAPTERS:
        stages = graph.stages_for(Point.of("7b", {"adapter": name, "apply.threshold": None}))
        made, asked = stages["adapter[seed=0]"].spec, stages["generate:refusal[seed=0]"].spec
        assert isinstance(made, AdapterSpec) and isinstance(asked, GenerateSpec)
        used[name] = made.tokenizer, asked.tokenizer
    assert used == {"first": ("adapter", "adapter"), "second": (None, "model")}
    before = graph.baselines()["7b"]["refusal"].inputs["generation"]
    assert before.spec.tokenizer == "model"


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "gp", "stage_aware"])
def test_a_search_proposes_both_kinds_of_points_once(tmp_path, folder, sampler):
    search = {"sampler": sampler, "points": 8, "seed": 1}
    found = small(tmp_path, adapters=given_two(folder), search=search)
    view = StudyView(found, Home(tmp_path / "home"))
    drive(view, lambda: Pretended(view.home.store))
    results = collect(view)
    assert len(results) == 8 == len({result.point for result in results})
    assert {result.status for result in results} == {"done"}
    assert {brought(result.point) is None for result in results} == {True, False}


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> StudyView:
    """A finished grid of both kinds of points, whose trained ones have two seeds."""
    root = tmp_path_factory.mktemp("driven")
    found = small(root, adapters=given_two(folder), seeds=[0, 1])
    view = StudyView(found, Home(root / "home"))
    drive(view, lambda: Pretended(view.home.store))
    return view


def test_a_grid_has_every_point_of_both_kinds_and_continues(driven):
    results = collect(driven)
    assert Counter(brought(result.point) is None for result in results) == {True: 6, False: 6}
    assert {seeds_of(r) for r in results if brought(r.point)} == {1}
    assert {seeds_of(r) for r in results if not brought(r.point)} == {2}
    again = drive(StudyView(driven.study, driven.home), lambda: Pretended(driven.home.store))
    assert again.results == []


def test_tables_partners_and_importance_keep_the_two_kinds_apart(driven):
    found, results = driven.study, collect(driven)
    frame = results_frame(results, found.objectives)
    assert list(frame["adapter"].dropna().unique()) == list(ADAPTERS)
    assert frame["train.rank"].isna().tolist() == frame["adapter"].notna().tolist()
    frame["on_model_frontier"] = True
    cells = frontier_cells(frame)
    assert set(cells["adapter"]) == {*ADAPTERS, "trained"}
    assert {rank for rank, own in zip(cells["rank"], cells["adapter"], strict=True)
            if own != "trained"} == {"-"}  # fmt: skip
    plain = [result for result in results if is_as_trained(result)]
    assert {brought(result.point) for result in plain} == {None, *ADAPTERS}
    assert len(undefended(results)) == len(partners(results)) == 4  # ranks 2 and 4, two adapters
    axes = importances(found, results)[found.objectives[0]]
    assert axes.without["train.rank"] == axes.without["adapter"] == "not every point has it"


def test_an_adapter_gets_no_further_seed_where_trained_points_do(tmp_path, folder):
    near = {
        "seeds": [0, 1, 2],
        "replicates": {"policy": "near_frontier", "at_least": 2},
        "axes": {"train.rank": [2, 4], "apply.threshold": [0.2]},
    }
    found = small(tmp_path, adapters=given_two(folder), **near)
    home = Home(tmp_path / "home")
    drive(StudyView(found, home), lambda: Pretended(home.store))
    results = collect(StudyView(found, home))
    needed = seeds_needed(found, results)
    for result in results:
        assert seeds_of(result) == needed[result.number]
        assert (seeds_of(result) == 1) == (brought(result.point) is not None)


def test_an_adapter_is_never_matched_with_a_training_of_the_fixed_settings(tmp_path, folder):
    """A study's fixed rank is no setting of an adapter that it did not train."""
    axes = {"apply.threshold": THRESHOLDS}
    fixed = {"axes": axes, "train": {"rank": 8}, "search": {"sampler": "grid"}}
    found = study(tmp_path, {**fixed, "adapters": given_two(folder)})
    own = Result(0, Point.of("7b", {"adapter": "first", "apply.threshold": 0.3}), "done")
    trained = replace(own, point=Point.of("7b", {"apply.threshold": 0.3}))

    class Side:
        def __init__(self, *results: Result) -> None:
            self.study, self._results = found, results

        def of(self, model: str) -> tuple[Result, ...]:
            return self._results

    assert list(same_settings(Side(own), Side(trained), "7b")) == []
    assert list(same_settings(Side(own, trained), Side(own), "7b")) == [(own, own)]


def test_adapters_may_be_added_and_none_may_change(tmp_path, folder):
    def dump(adapters: dict[str, object]) -> dict[str, object]:
        return lasting(only(tmp_path, folder, adapters=adapters).model_dump(mode="json"))

    two = given_two(folder)
    one = {"first": two["first"]}
    assert list(rejections(dump(one), dump(two))) == []
    assert list(rejections(dump(two), dump(one))) == [
        "adapters.second: an adapter that has points cannot be removed"
    ]
    other = {"first": two["second"]}
    (line,) = rejections(dump(one), dump(other))
    assert line.startswith("adapters.first.path.sha256: ")
    shutil.copytree(folder / "first", tmp_path / "moved")
    assert not list(differences(dump(one), dump({"first": pinned(tmp_path / "moved")})))
    plain = study(tmp_path).model_dump(mode="json")
    before = {key: value for key, value in plain.items() if key != "adapters"}
    assert "adapters" not in lasting(plain) and lasting(plain) == lasting(before)


def test_an_adapter_that_is_not_there_names_its_folder(tmp_path, folder):
    gone = {"first": {"path": {"path": str(tmp_path / "gone"), "sha256": "0" * 64}}}
    with pytest.raises(PinError, match="there is no file or folder at .*gone"):
        list(StageGraph(only(tmp_path, folder, adapters=gone), Home(tmp_path / "home")).stages_for(
            Point.of("7b", {"adapter": "first", "apply.threshold": None})))  # fmt: skip
