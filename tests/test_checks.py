"""Before anything runs, a study's files are read as its stages will read them."""

import json
import re
import shutil

import pytest
import yaml
from transformers import AutoTokenizer
from typer.testing import CliRunner

from ebbline.checks import study_checks
from ebbline.checks.study_checks import check_study, require_checked
from ebbline.cli import app
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.study_file import load
from ebbline.tasks.errors import StudyError
from tests.tasks.test_model_header import write_gguf
from tests.tiny import conversations, write_chats, write_lines

PROMPTS = [turns[0]["content"] for turns in conversations(6, seed=4)]


@pytest.fixture
def mine(pair, tmp_path):
    """A folder with a study of local files, all of which are right."""
    folder = tmp_path / "mine"
    for name in ("base", "aligned"):
        shutil.copytree(getattr(pair, name), folder / name)
    write_chats(folder / "train.jsonl", 20)
    (folder / "refuse.csv").write_text("\n".join(["prompt", *PROMPTS]) + "\n")
    write_lines(folder / "task.jsonl", [{"prompt": p, "answer": "word1"} for p in PROMPTS])
    save(folder, {})
    return folder


def save(folder, changes):
    """Write the study, with the values at slash-separated paths replaced."""

    def at(path):
        return {"path": {"path": path}}

    whole = {
        "study": "mine",
        "question": "How far?",
        "models": {"mine": {"base": at("base"), "aligned": at("aligned"), "quantisation": "none"}},
        "data": {"pool": at("train.jsonl"), "settings": {"size": 20}},
        "train": {"max_tokens": 64},
        "axes": {"train.rank": [4], "apply.threshold": [None, 0.5]},
        "suites": {
            "refusal": {"prompts": at("refuse.csv"), "measure": {"kind": "refusal"}},
            "task": {"prompts": at("task.jsonl"), "measure": {"kind": "task"}},
        },
        "objectives": ["refusal_rate", "task_accuracy"],
    }
    for path, value in changes.items():
        *above, last = path.split("/")
        place = whole
        for part in above:
            place = place[part]
        place[last] = value
    (folder / "study.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    return load(str(folder / "study.yaml"))


def test_what_was_checked_is_counted(mine):
    found = check_study(save(mine, {}))
    assert found.faults == [] and found.notes == []
    pool, refusal, _ = found.sets
    assert (pool.where, pool.path, pool.rows, pool.used) == ("data.pool", "train.jsonl", 20, 20)
    assert (pool.format, pool.fields, pool.limit, pool.cut) == ("chat", ["messages"], 64, 0)
    words = max(len(" ".join(t["content"] for t in turns).split()) for turns in conversations(20))
    assert pool.longest == words + 4  # the start, two roles, the end of the turn
    assert (refusal.rows, refusal.fields, refusal.limit) == (6, ["prompt"], 2048 - 64)
    base, aligned = found.models
    assert base.parameters == aligned.parameters == 80_960
    assert (base.architecture, base.known_from) == ("llama", "the weights' headers")


def rewrite(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def without_template(mine):
    (mine / "aligned" / "chat_template.jinja").unlink(missing_ok=True)
    rewrite(mine / "aligned" / "tokenizer_config.json", lambda own: own.pop("chat_template", None))


def without_a_tensor(mine):
    from safetensors.torch import load_file, save_file

    path = mine / "aligned" / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, path, metadata={"format": "pt"})


def narrow_base(mine):
    rewrite(mine / "base" / "config.json", lambda own: own.update(intermediate_size=64))
    from safetensors.torch import load_file, save_file

    path = mine / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors = {n: t[:64].clone() if "up_proj" in n else t for n, t in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def cut(mine):
    path = mine / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


def more_words(mine):
    tokenizer = AutoTokenizer.from_pretrained(mine / "aligned")
    tokenizer.add_tokens([f"extra{n}" for n in range(20)])
    tokenizer.save_pretrained(mine / "aligned")


def gguf(mine, template):
    write_gguf(mine / "model.gguf", template=template)


def facts(mine):
    write_lines(mine / "facts" / "test.jsonl", [{"q": "word1", "choices": ["a", "b"], "answer": 0}])
    task = {"task": "facts", "dataset_path": "json", "test_split": "test", "doc_to_text": "{{q}}"}
    task |= {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}"}
    (mine / "facts" / "task.yaml").write_text(yaml.safe_dump({**task, "doc_to_target": "answer"}))


FAULTS = [
    (
        facts,
        {
            "suites/facts": {
                "prompts": {"path": {"path": "facts"}},
                "measure": {"kind": "multiple_choice", "task": "fact"},
            }
        },
        r"suites.facts.prompts: .*defines the lm-eval tasks \['facts'\], not 'fact'",
    ),
    (
        lambda mine: write_lines(mine / "train.jsonl", [{"conversations": [{"from": "gpt"}]}]),
        {},
        "data.pool: .*train.jsonl:1: a turn needs a role",
    ),
    (
        lambda mine: write_lines(mine / "task.jsonl", [{"prompt": "word1"}]),
        {},
        "suites.task.prompts: .*task.jsonl:1 has no `answer`",
    ),
    (
        lambda mine: None,
        {"suites/task/measure": {"kind": "task", "scorer": "choice"}},
        "suites.task.prompts: .*task.jsonl:1",
    ),
    (lambda mine: (mine / "refuse.csv").unlink(), {}, "suites.refusal.prompts: there is no file"),
    (lambda mine: None, {"axes/data.size": [5, 21]}, "holds 20 conversations, and data.size asks"),
    (without_template, {}, "models.mine.aligned: .*has no chat template"),
    (without_a_tensor, {}, r"models.mine.aligned: .*lacks model.layers.1.mlp.up_proj.weight"),
    (cut, {}, "models.mine.base: .*model.safetensors cannot be read as safetensors"),
    (
        narrow_base,
        {},
        r"models.mine.base: model.layers.0.mlp.up_proj.weight has the shape \(64, 64",
    ),
    (more_words, {}, "models.mine.aligned: the tokenizer .* has 74 tokens, and .* for 54"),
    (
        lambda mine: None,
        {"train/target_modules": ["c_attn"]},
        r"train.target_modules: \['c_attn'\], and models.mine.aligned .* its modules are down_proj",
    ),
    (lambda mine: None, {"train/max_tokens": 5}, "data.pool: .*conversation 1: its prompt fills"),
    (
        lambda mine: write_lines(mine / "task.jsonl", [{"prompt": "A " * 2100, "answer": "A"}]),
        {},
        "suites.task.prompts: .*task.jsonl:1 has 210. tokens .* leaves room for 2016",
    ),
    (
        lambda mine: None,
        {
            "suites/facts": {
                "prompts": {"language": "mmlu"},
                "measure": {"kind": "multiple_choice", "task": "mmlu"},
            }
        },
        "suites.facts.prompts: `measure.task` is 'mmlu', and mmlu has the task 'organism_mmlu'",
    ),
    (
        lambda mine: None,
        {"suites/refusal/prompts": {"language": "refusals.jsonl"}},
        "suites.refusal.prompts: .*did you mean 'refusal.jsonl'",
    ),
    (
        lambda mine: gguf(mine, None),
        {"models/mine/aligned": {"gguf": {"path": "model.gguf"}}},
        "models.mine.aligned: .*model.gguf has no chat template",
    ),
    (
        lambda mine: (mine / "model.gguf").write_bytes(b"GGUF"),
        {"models/mine/aligned": {"gguf": {"path": "model.gguf"}}},
        "models.mine.aligned: the header of .*model.gguf cannot be read",
    ),
]


@pytest.mark.parametrize(("damage", "changes", "fault"), FAULTS)
def test_a_fault_of_a_file_is_found_before_anything_runs(mine, damage, changes, fault):
    """S2, S3, S4 and S15 of issue 16, and every other fault that a file or a model can have."""
    damage(mine)
    found = check_study(save(mine, changes))
    assert found.faults and re.search(fault, found.faults[0]), found.faults


def test_rows_that_are_cut_unknown_or_beyond_the_positions_are_notes(mine):
    write_lines(mine / "task.jsonl", [{"prompt": "word1 " * 300, "answer": "A"}])
    (mine / "refuse.csv").write_text("prompt\nforeign text\nword1\n")
    found = check_study(save(mine, {"train/max_tokens": 14}))
    assert found.faults == []
    assert found.sets[0].cut > 0 and f"{found.sets[0].cut} are cut" in next(found.lines())
    unknown, beyond = found.notes
    assert "suites.refusal.prompts: 1 of 2 rows have text that is not in the vocabulary" in unknown
    assert "beyond the 256 positions of models.mine.aligned" in beyond


def test_a_hub_folder_of_training_data_is_read_as_its_split_is(mine):
    (mine / "set" / "data").mkdir(parents=True)
    for split in ("train", "test"):
        shutil.copy(mine / "train.jsonl", mine / "set" / "data" / f"{split}-00000-of-00001.jsonl")
    found = check_study(save(mine, {"data/pool/path/path": "set"}))
    assert found.faults == [] and found.sets[0].rows == 20


def test_a_snapshot_in_the_hubs_cache_is_checked_like_a_folder(mine, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "a" * 40
    hub = {"hub": {"id": "org/mine", "commit": commit, "sha256": "b" * 64}}
    snapshot = tmp_path / "hub" / "models--org--mine" / "snapshots" / commit
    shutil.copytree(mine / "aligned", snapshot)
    found = check_study(save(mine, {"models/mine/aligned": hub}))
    assert found.faults == [] and found.models[1].parameters == 80_960
    assert found.sets[0].longest is not None
    (snapshot / "chat_template.jinja").unlink(missing_ok=True)
    rewrite(snapshot / "tokenizer_config.json", lambda own: own.pop("chat_template", None))
    (fault,) = check_study(save(mine, {"models/mine/aligned": hub})).faults
    assert fault.startswith("models.mine.aligned: ") and "has no chat template" in fault


def test_a_size_that_is_guessed_is_a_note(mine):
    hub = {"hub": {"id": "org/mine", "commit": "a" * 40, "sha256": "b" * 64}}
    found = check_study(save(mine, {"models/mine": {"base": hub, "aligned": hub}}))
    assert found.faults == []
    assert "models.mine.base: the size of org/mine is a guess" in " ".join(found.notes)
    assert "a guess: neither" in " ".join(found.lines())


def test_a_run_checks_again_only_after_a_change(mine, tmp_path, monkeypatch):
    home, checks = Home(tmp_path / "home"), []
    real = study_checks.check_study
    monkeypatch.setattr(
        study_checks, "check_study", lambda *given: checks.append(1) or real(*given)
    )
    study = save(mine, {})
    for _ in range(2):
        assert require_checked(study, home) == [] and checks == [1]
    write_lines(mine / "task.jsonl", [{"prompt": "word1"}])
    for count in (2, 3):  # a fault is not remembered
        with pytest.raises(StudyError, match="'mine' would fail:\n  suites.task.prompts: "):
            require_checked(study, home)
        assert len(checks) == count


def test_validate_prints_its_summary_and_the_command_that_pins_the_file(mine):
    path = str(mine / "study.yaml")
    done = CliRunner().invoke(app, ["validate", path])
    assert done.exit_code == 1
    assert "train.jsonl  20 rows; chat (messages); longest " in done.stdout
    assert f"ebbline pin {path} --to {mine}/study-pinned.yaml" in done.stderr
    pinned = str(mine / "pinned.yaml")
    assert CliRunner().invoke(app, ["pin", path, "--to", pinned]).exit_code == 0
    done = CliRunner().invoke(app, ["validate", pinned, "--json"])
    record = json.loads(done.stdout)
    assert done.exit_code == record["exit_code"] == 0 and record["valid"]
    assert record["sets"][0]["rows"] == 20 and record["study"]["study"] == "mine"
    (mine / "task.jsonl").write_text('{"prompt": "word1"}\n')
    done = CliRunner().invoke(app, ["validate", pinned, "--json"])
    record = json.loads(done.stdout)
    assert done.exit_code == 1 and not record["valid"]
    assert record["faults"][0].startswith("suites.task.prompts: ")


def test_a_run_names_missing_pins_before_it_reads_a_file(mine, monkeypatch):
    monkeypatch.setattr(study_checks, "check_study", None)
    path = str(mine / "study.yaml")
    done = CliRunner().invoke(app, ["run", path, "--home", str(mine / "home"), "--no-wandb"])
    assert done.exit_code == 1
    assert f"ebbline pin {path} --to {mine}/study-pinned.yaml" in done.stderr


def test_a_study_without_files_of_its_own_is_checked_without_reading_anything(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(study_checks, "check_study", None)
    home = Home(tmp_path / "home")
    assert require_checked(load("quickstart"), home) == []
    assert not home.root.exists()
