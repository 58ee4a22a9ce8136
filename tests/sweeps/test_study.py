"""Study files are read strictly, and every error names the field and the allowed values."""

import json

import pytest
from pydantic import ValidationError

from ebbline.checks.jobs import jobs_of
from ebbline.checks.study_checks import check_study
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.pins import require_pins, require_rows, unpinned
from ebbline.sweeps.study.stages import StageGraph
from ebbline.sweeps.study.study import Study, axis_fields
from ebbline.sweeps.study.study_file import as_yaml, load, parse, shipped, source_of
from ebbline.tasks.errors import DataError, PinError, StudyError
from tests.sweeps.made import TUNED, study, written

ENDPOINT = {"endpoint": "http://judge.example/v1", "model": "judge", "template": "yes-no"}
CLASSIFIER = {"template": "classifier", "refused": "no"}


@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_shipped_study_loads_twice_to_equal_studies_and_states_its_question(name):
    one = load(name)
    assert one == load(name) and one.study == name
    assert one.question.strip().endswith("?") and one.hypothesis
    for objective in one.objectives:
        assert one.metric(objective) == objective


def test_there_are_shipped_studies_and_one_is_the_quickstart():
    assert "quickstart" in shipped()
    assert unpinned(load("quickstart")) == []  # it names no outside content


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"trian": {}}, r"trian: .*did you mean 'train'"),
        ({"train": {"rnak": 4}}, r"train\.rnak: .*did you mean 'rank'"),
        (
            {"models/7b/quantization": "nf4"},
            r"models\.7b\.quantization: .*did you mean 'quantisation'",
        ),
        ({"suites/refusal/prompt": {}}, r"suites\.refusal\.prompt: .*did you mean 'prompts'"),
        ({"search/smapler": "tpe"}, r"search\.smapler: .*did you mean 'sampler'"),
        ({"axes/train.rnak": [4]}, r"axes\.train\.rnak: .*did you mean 'train\.rank'"),
        ({"axes/train.seed": [4]}, r"axes\.train\.seed: .*is not one of"),
        ({"train": {"rank": "eight"}}, r"train\.rank: .*integer.*'eight'"),
        ({"train": {"rank": 8.5}}, r"train\.rank: .*8\.5"),
        ({"train": {"rank": 0}}, r"train\.rank: .*greater than or equal to 1.*0"),
        ({"train": {"learning_rate": -1e-4}}, r"train\.learning_rate: .*greater than 0"),
        ({"train": {"learning_rate": "fast"}}, r"train\.learning_rate: .*'fast'"),
        ({"train": {"learning_rate": float("nan")}}, r"train\.learning_rate: "),
        ({"train": {"dtype": "float16"}}, r"train\.dtype: .*'float32' or 'bfloat16'.*'float16'"),
        ({"apply": {"threshold": 1.5}}, r"apply\.threshold: .*less than or equal to 1"),
        ({"refusal_floor": 90}, r"refusal_floor: .*less than or equal to 1"),
        ({"study": "a name/with a slash"}, r"study: .*pattern"),
        ({"study": "a" * 300}, r"study: .*at most 150 characters"),
        ({"models": {}}, r"models: .*at least 1"),
        ({"seeds": []}, r"seeds: .*at least 1"),
        ({"axes/train.rank": []}, r"axes\.train\.rank"),
        (
            {"suites/refusal/measure/kind": "refusals"},
            r"line \d+: suites\.refusal\.measure\.kind: 'refusals' is not .*mean 'refusal'",
        ),
        ({"models/7b/base": {}}, r"models\.7b\.base: give exactly one of .*got none"),
        (
            {"data/pool": {"language": "a", "path": {"path": "b"}}},
            r"data\.pool: give exactly one of",
        ),
        (
            {"data/settings": {"size": 8, "mix_share": 0.5}},
            r"data: mix_share is 0\.5, but `mix` names no second set",
        ),
        (
            {"models/7b": {"aligned": {"organism": {"size": "small"}}}},
            r"models\.7b: `base` is missing: Safe LoRA subtracts `base` or `unaligned`",
        ),
        (
            {"models/7b/base": {"tuned": TUNED}},
            r"models\.7b: `base` cannot be `tuned`.* Give this model as `unaligned`",
        ),
        (
            {
                "judges": {
                    "guard": {
                        "model": {"hub": {"id": "a/b"}},
                        "settings": {"template": "llama-guard"},
                    }
                },
                "suites/refusal/measure": {"kind": "over_refusal", "scorer": "guard"},
                "objectives": ["task_accuracy"],
            },
            r"suites\.refusal: llama-guard judges harm",
        ),
        (
            {
                "judges": {"far": {"settings": {**ENDPOINT, "template": "sorry-bench"}}},
                "suites/refusal/measure": {"kind": "harm", "scorer": "far"},
                "objectives": ["task_accuracy"],
            },
            r"suites\.refusal\.measure: far does not judge harm; name judges .*wildguard",
        ),
        (
            {
                "suites/refusal/measure": {"kind": "harm", "scorer": "prefix"},
                "objectives": ["task_accuracy"],
            },
            r"suites\.refusal\.measure: prefix does not judge harm",
        ),
        (
            {
                "judges": {
                    "far": {
                        "adapter": {"hub": {"id": "a/b"}},
                        "settings": {**ENDPOINT, "template": "qi"},
                    }
                }
            },
            r"judges\.far: `adapter` needs a `model` that answers",
        ),
        (
            {"suites/task/measure": {"kind": "multiple_choice", "task": "gsm8k"}},
            r"suites\.task\.measure.*'gsm8k' needs `kind: written`",
        ),
        (
            {"suites/task/measure": {"kind": "written", "task": "mmlu"}},
            r"suites\.task\.measure.*'mmlu' needs `kind: multiple_choice`; written tasks begin",
        ),
        (
            {"suites/refusal/measure": {"kind": "refusal", "also": ["nobody"]}},
            r"'nobody' is not one of",
        ),
        ({"models/7b/gpus": 0}, r"models\.7b\.gpus: "),
        (
            {"models/7b/labels": {"ray.io/accelerator-type": "in A100"}},
            r"models\.7b\.labels\.ray.io/accelerator-type: .*'in A100' is invalid",
        ),
        ({"models/7b/train": {"rnak": 4}}, r"models\.7b\.train\.rnak: .*did you mean 'rank'"),
        (
            {"models/7b/train": {"quantisation": "nf4"}},
            r"models\.7b\.train\.quantisation: give models\.7b\.quantisation instead",
        ),
        ({"train": {"chat": {"date": "2025-02-03"}}}, r"train\.chat: give models\.NAME\.chat"),
        ({"models/7b/chat": {"date": "soon"}}, r"models\.7b\.chat\.date: .*'soon'"),
        ({"axes/train.chat": ["a"]}, r"'train\.chat' is not one of"),
        ({"models/7b/axes": {"train.rnak": [8]}}, r"models\.7b\.axes\.train\.rnak: "),
        (
            {"objectives": ["refusal"]},
            r"'refusal' names no metric; this study measures .*refusal\.refusal_rate",
        ),
        (
            {"objectives": ["refusal_rate", "refusal.refusal_rate"]},
            r"objectives: duplicate objective in ",
        ),
        ({"search": {"sampler": "list"}}, r"search\.list: "),
        (
            {
                "search": {"sampler": "tpe"},
                "axes": {"apply.threshold": {"low": 0.1, "high": 0.9}},
            },
            r"search\.points: the sampler 'tpe' needs the number of points",
        ),
        (
            {"axes/train.rank": {"low": 2, "high": 8, "step": 2}},
            r"search\.sampler: a grid needs every axis as a list",
        ),
        ({"axes/train.rank": {"low": 8, "high": 8}}, r"low \(8\.0\) must be below high"),
        (
            {"axes/train.learning_rate": {"low": 0, "high": 1, "log": True}},
            r"a log range needs low > 0",
        ),
        ({"project": {"projector": "exact"}}, r"project: the exact projector needs `energy`"),
        ({"train": {"method": "full", "quantisation": "nf4"}}, r"cannot be quantised"),
        ({"train": {"method": "full", "ema_decay": 0.9}}, r"act on the matrices of an adapter"),
        ({"train": {"ema_decay": 1.0}}, r"train\.ema_decay: .*less than 1"),
        ({"train": {"penalty": "l2"}}, r"train\.penalty: .*'asft'.*'l2'"),
        (
            {
                "models/7b": {"aligned": {"organism": {"size": "small"}}},
                "axes": {"train.penalty": ["norm", "asft"]},
            },
            r"models\.7b: `base` is missing: train\.penalty asft reads .* leave train\.penalty out",
        ),
        (
            {
                "models/7b": {"aligned": {"organism": {"size": "small"}}},
                "axes": {"lox.factor": [0, 1]},
            },
            r"models\.7b: `base` is missing: lox\.factor reads .* leave lox\.factor out",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else "/".join(value),
)
def test_a_fault_is_one_error_that_names_its_path_and_what_is_allowed(tmp_path, changes, fault):
    with pytest.raises(StudyError, match=fault):
        study(tmp_path, changes)


MIX = {"language": "refusal.jsonl"}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"data/settings": {"size": 8, "seed": 7}},
            r"data\.settings\.seed: `seeds` gives .*delete",
        ),
        (
            {"data/settings": {"size": 8, "seed": 0}},
            r"data\.settings\.seed: `seeds` gives .*delete",
        ),
        ({"train": {"seed": 7}}, r"train\.seed: `seeds` gives .*delete this setting"),
        ({"models/7b/train": {"seed": 7}}, r"models\.7b\.train\.seed: `seeds` gives .*delete"),
        (
            {"train": {"dtype": "float32"}},
            r"train\.dtype: 'float32', but 'bfloat16' of models\.7b\.dtype replaces it",
        ),
        (
            {"train": {"quantisation": "int8"}},
            r"train\.quantisation: 'int8', but 'nf4' of models\.7b\.quantisation replaces it",
        ),
        (
            {"models/7b/aligned": {"tuned": {**TUNED, "train": {"method": "full", "rank": 64}}}},
            r"models\.7b\.aligned\.tuned\.train\.rank: only method 'lora' has it",
        ),
        ({"data/mix": MIX}, r"data\.mix: `mix_share` is 0.* give data\.settings\.mix_share"),
        (
            {"models/7b/aligned": {"tuned": {**TUNED, "data": {**TUNED["data"], "mix": MIX}}}},
            r"models\.7b\.aligned\.tuned\.data\.mix: `mix_share` is 0",
        ),
        (
            {"judges": {"far": {"settings": {**ENDPOINT, "dtype": "float32"}}}},
            r"judges\.far\.settings\.dtype: a judge of this kind \(endpoint\) ignores it",
        ),
        (
            {
                "judges": {
                    "near": {
                        "model": {"hub": {"id": "a/b"}},
                        "settings": {**CLASSIFIER, "max_new_tokens": 3},
                    }
                }
            },
            r"judges\.near\.settings\.max_new_tokens: a judge of this kind \(classifier\)",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else "/".join(value),
)
def test_a_setting_that_would_be_silently_ignored_is_an_error_with_its_remedy(
    tmp_path, changes, fault
):
    with pytest.raises(StudyError, match=fault):
        study(tmp_path, changes)


def test_a_setting_that_is_used_is_no_error_and_is_written_again(tmp_path):
    for changes in (
        {"train": {"dtype": "bfloat16", "quantisation": "nf4"}},
        {"data/mix": MIX, "data/settings": {"size": 8, "mix_share": 0.5}},
        {"data/mix": MIX, "axes/data.mix_share": [0.0, 0.5]},
        {"models/7b/aligned": {"tuned": {**TUNED, "train": {"method": "full", "seed": 3}}}},
    ):
        one = study(tmp_path, changes)
        assert parse(tmp_path / "study.yaml", as_yaml(one)) == one


def test_a_stored_study_with_a_seed_of_its_own_still_opens(tmp_path):
    kept = study(tmp_path).model_dump(mode="json")
    kept["train"]["seed"] = kept["data"]["settings"]["seed"] = 7
    assert Study.model_validate_json(json.dumps(kept)).train.seed == 7


def test_one_error_names_all_faults_of_a_file(tmp_path):
    with pytest.raises(StudyError) as caught:
        study(tmp_path, {"train": {"rank": 0, "epochs": -1}, "refusal_floor": 2})
    assert all(
        path in str(caught.value)
        for path in ("train.rank", "train.epochs", "refusal_floor", "study.yaml")
    )


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"axes/train.rank": [4, "eight"]}, r"axes\.train\.rank: .*eight"),
        ({"axes/train.rank": [4, 0]}, r"axes\.train\.rank: .*0"),
        ({"axes/apply.threshold": [None, 1.5]}, r"axes\.apply\.threshold: .*1\.5"),
        ({"models/7b/axes": {"train.rank": [4.5]}}, r"models\.7b\.axes\.train\.rank: .*4\.5"),
        (
            {
                "axes/train.rank": {"low": 0, "high": 8, "step": 1},
                "search": {"sampler": "tpe", "points": 4},
            },
            r"axes\.train\.rank: .*0",
        ),
        (
            {"axes/train.rank": {"low": 2.5, "high": 8}, "search": {"sampler": "tpe", "points": 4}},
            r"axes\.train\.rank: .*2\.5.*needs a `step`",
        ),
        ({"axes/train.method": ["lora", "full"]}, r"axes\.train\.method: "),
    ],
)
def test_an_invalid_value_of_an_axis_is_an_error_when_the_file_is_read(tmp_path, changes, fault):
    with pytest.raises(StudyError, match=fault):
        study(tmp_path, changes)


def test_a_duplicate_key_is_an_error_that_names_key_and_line(tmp_path):
    path = written(tmp_path)
    path.write_text(path.read_text() + "question: another\n")
    with pytest.raises(StudyError, match=r"line \d+: duplicate key .question."):
        parse(path)


@pytest.mark.parametrize(
    "text", ["a: [", "- a list\n", "", "!!python/object/apply:os.system [true]\n"]
)
def test_a_file_that_holds_no_study_is_a_study_error(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(StudyError, match=r"x\.yaml"):
        load(str(tmp_path / "x.yaml"))


def test_a_number_without_a_dot_is_a_number(tmp_path):
    path = written(
        tmp_path, {"train": {"learning_rate": 1.0}, "axes/train.learning_rate": [1.0, 2.0]}
    )
    path.write_text(
        path.read_text()
        .replace("learning_rate: 1.0", "learning_rate: 1e-4")
        .replace("- 1.0\n  - 2.0", "- 1e-4\n  - 3e-4")
    )
    assert "1e-4" in path.read_text() and "3e-4" in path.read_text()
    found = parse(path)
    assert found.train.learning_rate == 1e-4
    assert found.axes["train.learning_rate"] == (1e-4, 3e-4)


def test_every_axis_that_may_be_named_is_a_field_that_can_be_searched():
    fields = set(axis_fields())
    assert {
        "train.rank",
        "data.size",
        "apply.threshold",
        "train.learning_rate",
        "project.projector",
        "data.mix_share",
    } <= fields
    assert not {"train.seed", "data.seed", "train.quantisation"} & fields


def test_a_study_is_frozen_once_loaded(tmp_path):
    found = study(tmp_path)
    with pytest.raises(ValidationError):
        found.question = "another"
    with pytest.raises(ValidationError):
        found.train.rank = 4


def test_a_loaded_study_has_the_full_names_of_its_objectives(tmp_path):
    assert study(tmp_path).objectives == ("refusal.refusal_rate", "task.task_accuracy")


def test_an_objective_that_two_suites_measure_must_be_named_in_full(tmp_path):
    second = {
        "prompts": {"language": "refusal.jsonl"},
        "measure": {"kind": "refusal", "scorer": "anywhere"},
    }
    with pytest.raises(
        StudyError, match=r"'refusal_rate' names \['refusal.refusal_rate', 'other.refusal_rate'\]"
    ):
        study(tmp_path, {"suites/other": second})
    assert (
        study(
            tmp_path,
            {"suites/other": second, "objectives": ["other.refusal_rate", "task_accuracy"]},
        ).objectives[0]
        == "other.refusal_rate"
    )


def test_the_error_for_an_unpinned_study_names_every_unpinned_reference(tmp_path):
    found = study(
        tmp_path,
        {
            "models/7b": {
                "base": {"hub": {"id": "org/base"}},
                "aligned": {"path": {"path": "models/aligned"}},
            },
            "data/pool": {"path": {"path": "rows.jsonl", "sha256": "a" * 64}},
            "suites/refusal/prompts": {"hub": {"id": "org/prompts", "commit": "b" * 40}},
        },
    )
    file = str(tmp_path / "study.yaml")
    with pytest.raises(PinError, match="ebbline pin") as caught:
        require_pins(found, file)
    message = str(caught.value)
    assert f"ebbline pin {file} --to {tmp_path}/study-pinned.yaml" in message
    for named in (
        "models.7b.base.hub: org/base",
        "models.7b.aligned.path: ",
        "suites.refusal.prompts.hub: org/prompts",
    ):
        assert named in message
    assert "rows.jsonl" not in message
    assert len(unpinned(found)) == 3


def test_rows_that_a_stage_could_not_read_are_an_error_before_anything_is_pinned(tmp_path):
    files = {
        "pool.jsonl": '{"prompt": "q", "completion": "a"}\n{"text": "b"}',
        "task.csv": "prompt,answer\np,a\nq,\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = study(
        tmp_path,
        {
            "data/pool": {"path": {"path": "pool.jsonl"}},
            "suites/task/prompts": {"path": {"path": "task.csv"}},
            "suites/refusal/prompts": {"path": {"path": "elsewhere.csv"}},
        },
    )
    with pytest.raises(DataError) as caught:
        require_rows(found)
    message = str(caught.value)
    assert "data.pool: " in message and "pool.jsonl:2 has the keys" in message
    assert "suites.task.prompts: " in message and "task.csv:3 has no `answer`" in message
    assert "elsewhere" not in message
    (tmp_path / "pool.jsonl").write_text(files["pool.jsonl"].partition("\n")[0])
    (tmp_path / "task.csv").write_text("prompt,answer\np,a\n")
    require_rows(found)


def test_prompts_that_are_given_twice_are_counted_before_a_run(tmp_path):
    (tmp_path / "task.csv").write_text("prompt,answer\np,a\nq,b\np,a\n")
    found = study(tmp_path, {"suites/task/prompts": {"path": {"path": "task.csv"}}})
    note = (
        "suites.task.prompts: 1 of 3 rows repeat the prompt of an earlier row. A prompt is asked "
        "and counted once"
    )
    assert note in check_study(found).notes
    (tmp_path / "task.csv").write_text("prompt,answer\np,a\n")
    assert note not in check_study(found).notes


def test_a_relative_path_starts_at_the_files_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    found = study(tmp_path, {"data/pool": {"path": {"path": "rows.jsonl"}}})
    with pytest.raises(PinError, match="no file or folder"):
        found.data.pool.path.located()
    (tmp_path / "rows.jsonl").write_text("")
    assert found.data.pool.path.located() == tmp_path / "rows.jsonl"


def test_the_error_for_an_unknown_study_suggests_a_shipped_one(tmp_path):
    with pytest.raises(StudyError, match="did you mean 'quickstart'"):
        source_of("quickstrat")
    with pytest.raises(StudyError, match="no study file at"):
        source_of(str(tmp_path / "absent.yaml"))


def test_a_judge_has_the_lengths_of_its_card_and_a_written_study_stays_equal(tmp_path):
    found = study(tmp_path, {"judges": {"far": {"settings": {**ENDPOINT, "template": "qi"}}}})
    assert found.judges["far"].settings.max_new_tokens == 1024
    again = tmp_path / "again.yaml"
    again.write_text(as_yaml(found))
    assert load(str(again)) == found


def test_refusal_and_harm_of_one_judge_share_its_stage_and_an_adapter_is_its_input(tmp_path):
    pins = {"commit": "0" * 40, "sha256": "0" * 64}
    measured = {"scorer": "guard", "max_new_tokens": 12}
    found = study(
        tmp_path,
        {
            "judges": {
                "guard": {
                    "model": {"hub": {"id": "a/b", **pins}},
                    "adapter": {"hub": {"id": "a/c", **pins, "sha256": "1" * 64}},
                    "settings": {"template": "wildguard"},
                }
            },
            "suites/refusal/measure": {"kind": "refusal", **measured},
            "suites/harm": {
                "prompts": {"language": "refusal.jsonl"},
                "measure": {"kind": "harm", **measured},
            },
        },
    )
    assert found.metric("harm_score") == "harm.harm_score"
    before = StageGraph(found, Home(tmp_path / "home"), located=False).baselines()["7b"]
    stages = [before[suite].inputs["judge_guard"] for suite in ("refusal", "harm")]
    assert stages[0].lineage == stages[1].lineage
    assert set(stages[0].inputs) == {"generation", "model", "adapter"}


def test_a_judges_chat_template_is_checked_only_where_the_judge_is_asked_through_it(tmp_path):
    (tmp_path / "model").mkdir()

    def job(template, **settings):
        judge = {
            "model": {"path": {"path": "model"}},
            "settings": {"template": template, **settings},
        }
        (found,) = (
            each
            for each in jobs_of(study(tmp_path, {"judges": {"guard": judge}})).models
            if each.where == "judges.guard.model"
        )
        return found.chat is not None, found.checked, found.loaded

    assert job("yes-no") == job("qi") == job("strongreject-rubric") == (True, True, True)
    assert job("llama-guard-3") == job("qwen3guard") == (True, False, True)
    assert job("wildguard") == job("strongreject") == job("harmbench") == (False, False, True)
    assert job("llama-guard-4") == (False, False, False), "it is no causal language model"
    assert job("classifier", refused="R") == (False, False, True)
