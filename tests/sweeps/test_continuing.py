"""Continuing: every valid study is read back as it was stored, and readers do not follow an edited
file.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbline.sweeps.study.changes import lasting
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.study_file import as_yaml, parse
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError
from tests.sweeps.made import ORGANISM, TUNED, changed, study, written

STEPS = {"low": 0.1, "high": 0.7, "step": 0.2}
RANGE = {"low": 0.1, "high": 0.7}
ENDPOINT = {"settings": {"endpoint": "http://localhost:1/v1", "endpoint_model": "judge"}}
PARTS: dict[str, list[Any]] = {  # each optional part of a study file, with values to draw from
    "hypothesis": ["Refusals ebb."],
    "language": [3],
    "seeds": [[0, 1], [5]],
    "replicates": [{}, {"policy": "near_frontier"}],
    "refusal_floor": [0.0, 0.5, 1.0],
    "project": [{}, {"projector": "exact", "energy": 0.9}],
    "apply": [{"threshold": 0.4}],
    "budget": [{}, {"points": 3}, {"hours": 1.0, "gpu_hours": 2.0, "usd": 3.0}],
    "objectives": [["task_accuracy"], ["refusal_rate"]],
    "axes": [
        {"train.rank": [2, 4]},
        {"apply.threshold": STEPS},
        {"apply.threshold": RANGE, "train.rank": [2, 4]},
        {"data.size": [8, 16], "train.learning_rate": [1e-4, 1e-3], "train.rank": [4]},
    ],
    "models/13b": [
        {"base": ORGANISM, "aligned": {"tuned": TUNED}},
        {
            "base": ORGANISM,
            "aligned": {"tuned": TUNED},
            "gpus": 2,
            "spread": True,
            "labels": {"ray.io/accelerator-type": "H100"},
            "axes": {"train.rank": [16]},
            "train": {"global_batch": 8},
            "quantisation": "none",
            "dtype": "float32",
        },
    ],
    "judges": [{"reader": ENDPOINT}],
    "suites/refusal/measure": [{"kind": "refusal", "limit": 5, "max_new_tokens": 4}],
    "suites/harmless": [
        {"prompts": {"language": "task.jsonl"}, "measure": {"kind": "over_refusal"}}
    ],
}
SEARCH: dict[str, list[Any]] = {
    "sampler": ["stage_aware", "gp", "tpe", "nsga2", "random", "grid"],
    "points": [1, 4, 1000],
    "window": [1, 8],
    "seed": [7],
    "transfer": [True],
    "order": ["in_turn"],
    "stop": [{"gain": 0.1, "per_points": 2}],
    "constraints": [{"refusal_floor": True}, {"gpu_hours": 1.0}],
    "warm_start": [["another"]],
}


def some_of(parts: dict[str, list[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {}, optional={name: st.sampled_from(values) for name, values in parts.items()}
    )


@pytest.mark.slow
@settings(max_examples=40)
@given(some_of(PARTS), st.none() | some_of(SEARCH))
def test_every_valid_study_continues_as_it_was_stored(tmp_path_factory, parts, search):
    folder = tmp_path_factory.mktemp("study")
    whole = changed(parts)
    whole.pop("search")
    if search is not None:
        whole["search"] = search
    path, home = folder / "study.yaml", Home(folder / "home")
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    try:
        first = parse(path)
    except StudyError:
        return
    home.keep_file(first.study, path)
    StudyView(first, home).freeze()
    text = home.kept(first.study)
    again = StudyView.open(home.root, str(path))
    assert again.changed() == [] and again.begun_as()
    again.freeze()
    assert home.kept(first.study) == text
    stored = StudyView.begun(home.root, "tiny")
    assert stored.study.model_dump_json() == again.study.model_dump_json()
    assert stored.edited() == []
    copy = folder / "copy.yaml"
    copy.write_text(as_yaml(stored.study))
    before, after = (each.model_dump(mode="json") for each in (stored.study, parse(copy)))
    assert lasting(before) == lasting(after)


def test_readers_follow_the_study_that_ran_and_name_what_its_file_says_now(tmp_path):
    home, path = Home(tmp_path / "home"), written(tmp_path)
    StudyView(study(tmp_path), home).freeze()
    home.keep_file("tiny", path)
    written(tmp_path, {"axes": {"train.rank": [2]}, "refusal_floor": 0.1})
    for name in ("tiny", str(path)):
        view = StudyView.begun(home.root, name)
        assert view.study.refusal_floor == 0.9 and len(view.study.axes) == 2
        assert "refusal_floor: 0.9 -> 0.1" in view.edited()
    path.write_text("study: [")
    view = StudyView.begun(home.root, str(path))
    assert view.study.study == "tiny" and "is not valid YAML" in view.edited()[0]
    path.unlink()
    assert "there is no study file" in StudyView.begun(home.root, "tiny").edited()[0]
    assert StudyView.begun(home.root, str(path)).study.study == "tiny"


def test_a_file_that_was_never_run_is_read_as_it_is(tmp_path):
    path = written(tmp_path, {"study": "new"})
    assert StudyView.begun(tmp_path / "home", str(path)).study.study == "new"
    path.write_text("study: [")
    with pytest.raises(StudyError, match="is not valid YAML"):
        StudyView.begun(tmp_path / "home", str(path))


def test_a_stored_study_that_cannot_be_read_is_an_error_that_names_its_file(tmp_path):
    home = Home(tmp_path / "home")
    StudyView(study(tmp_path), home).freeze()
    stored = json.loads(home.kept("tiny"))
    place = Path(home.root, "studies", "tiny", "study.json")
    for text in ("{", json.dumps({**stored, "seeds": []}), json.dumps({**stored, "x": 1})):
        place.write_text(text)
        with pytest.raises(StudyError, match=r"tiny/study\.json cannot be read") as caught:
            StudyView(study(tmp_path), home).changed()
        assert "move the study's folder away" in str(caught.value)
    StudyView(study(tmp_path, {"study": "another"}), home).freeze()
    assert home.begun("another") is not None
