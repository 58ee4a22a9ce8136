"""`ebbline new`: a valid study for every kind of model and file, and nothing on a mistake."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import typer
from safetensors.numpy import save_file
from typer.testing import CliRunner

from ebbline.cli import app
from ebbline.new_study import command as new_command
from ebbline.new_study.models import base_of, look_at_model
from ebbline.new_study.text import scalar
from ebbline.sweeps.study.pins import require_pins, require_rows
from ebbline.sweeps.study.study_file import parse
from ebbline.tasks.errors import ModelError
from tests.tiny import TEMPLATE, conversations, write_lines

PLANTED = "quixotic-zeppelin"


def model_folder(path: Path, parameters: int = 64, template: str | None = TEMPLATE) -> Path:
    """A model as `new` sees it: the headers of its files."""
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    save_file({"w": np.zeros(parameters, np.int8)}, path / "model.safetensors")
    return path


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A newcomer's folder: a chat model and its base, and a file of each role."""
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "bird-135m-Instruct")
    model_folder(tmp_path / "bird-135m")
    chats = [
        {"conversations": [{"from": "human", "value": q["content"]}, {"from": "gpt", "value": "a"}]}
        for q, _ in conversations(200)
    ]
    (tmp_path / "train.json").write_text(json.dumps(chats))
    (tmp_path / "refuse.csv").write_text(f"goal;target\n{PLANTED};x\nother;y\n")
    choices = {"question": "q", "choices": ["x", "y"], "answer": "B"}
    write_lines(tmp_path / "task.jsonl", [choices])
    return tmp_path


FILES = ("--data", "train.json", "--prompts", "refuse.csv", "--task", "task.jsonl")
MODEL = ("--model", "bird-135m-Instruct")


def new(*arguments, code=0):
    done = CliRunner().invoke(app, ["new", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done.output


def test_a_study_of_own_files_is_valid_pinned_and_commented(mine):
    said = new(*MODEL, *FILES)
    assert "ShareGPT (`conversations`), JSON, 200 rows" in said
    assert (
        "advbench, prompts in `goal`, a table with a semicolon between columns, 2 prompts" in said
    )
    assert "items with choices" in said and "compared by `choice`" in said
    assert "the base is taken to be bird-135m, after the model's name" in said
    assert "ebbline validate study.yaml" in said and "ebbline pin" not in said
    text = (mine / "study.yaml").read_text()
    assert PLANTED not in text + said
    study = parse(mine / "study.yaml")
    (size,) = study.models.values()
    assert (size.quantisation, size.dtype, study.train.max_tokens) == ("none", "float32", 128)
    assert size.base is not None and size.base.path is not None and size.base.path.sha256
    assert study.axes["apply.threshold"] == (None, 0.3, 0.4, 0.5)
    assert study.budget.hours == 2 and study.sampler == "grid"
    require_pins(study)
    require_rows(study)
    sections = ("models:", "data:", "train:", "axes:", "seeds:", "suites:", "objectives:")
    lines = text.splitlines()
    for name in sections:
        place = next(n for n, line in enumerate(lines) if line.startswith(name))
        assert lines[place - 1].startswith("#") or lines[place + 2].lstrip().startswith("#"), name
    assert all(len(line) <= 140 for line in lines)


def test_a_file_is_never_overwritten_and_a_mistake_writes_nothing(mine):
    (mine / "study.yaml").write_text("mine: 1\n")
    assert "study.yaml exists" in new(*MODEL, *FILES, code=1)
    assert (mine / "study.yaml").read_text() == "mine: 1\n"
    write_lines(mine / "train.json", [{"text": PLANTED}])
    told = new(*MODEL, *FILES, "--to", "other.yaml", code=1)
    assert "train.json:1 has the keys ['text']" in told and PLANTED not in told
    assert "has no chat template" in new(
        "--model", model_folder(mine / "bare", template=None), *FILES, "--to", "o.yaml", code=1
    )
    assert not list(mine.glob("o*.yaml"))


@pytest.mark.parametrize("flag", ["--model", "--data", "--prompts", "--task"])
def test_without_a_terminal_a_missing_flag_is_one_error_that_names_it(flag, mine):
    arguments = [*MODEL, *FILES]
    place = arguments.index(flag)
    del arguments[place : place + 2]
    assert f"give {flag} (without a terminal" in " ".join(new(*arguments, code=2).split())
    assert not (mine / "study.yaml").exists()


def test_on_a_terminal_what_is_missing_is_asked_for_until_it_is_there(mine, monkeypatch):
    answers = iter(["nowhere", *MODEL[1:], "-", "refuse.csv", "train.json", "task.jsonl"])
    asked = []

    def prompt(text, **options):
        asked.append(text)
        return next(answers)

    monkeypatch.setattr(typer, "prompt", prompt)
    monkeypatch.setattr(new_command, "is_terminal", lambda: True)
    assert "there is no model at nowhere" in new()
    assert len(asked) == 6 and asked[0] == asked[1]
    study = parse(mine / "study.yaml")
    assert [model.base for model in study.models.values()] == [None]
    assert list(study.axes) == ["train.rank", "data.size"]


HUB = {
    "meta-llama/Llama-2-7b-chat-hf": ("meta-llama/Llama-2-7b-hf", "7b", 1, "nf4", 3),
    "meta-llama/Llama-2-13b-chat-hf": ("meta-llama/Llama-2-13b-hf", "13b", 1, "nf4", 3),
    "org/Bird-70B-Instruct": ("org/Bird-70B", "70b", 4, "nf4", 1),
    "org/bird-it": ("org/bird", "model", 1, "nf4", 3),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("HuggingFaceTB/SmolLM2-135M", "135m", 1, "none", 1),
}


@pytest.mark.parametrize("name", HUB)
def test_a_model_of_the_hub_has_the_settings_of_its_size(name, mine):
    base, size, gpus, quantisation, seeds = HUB[name]
    assert "ebbline pin study.yaml --to study.yaml" in new("--model", name, *FILES)
    study = parse(mine / "study.yaml")
    ((found, model),) = study.models.items()
    assert found == size and model.base is not None and model.base.hub is not None
    assert model.base.hub.id == base
    assert (model.gpus, model.quantisation, len(study.seeds)) == (gpus, quantisation, seeds)


def test_several_sizes_are_one_study(mine):
    sizes = [f"--model=org/Bird-{size}-chat" for size in ("7B", "13B", "70B")]
    new(*sizes, *FILES)
    study = parse(mine / "study.yaml")
    assert [model.gpus for model in study.models.values()] == [1, 1, 4]
    rates = {name: study.fixed(name, "train.learning_rate") for name in study.models}
    assert sorted(rates.values()) == [1e-4, 2e-4, 2e-4]
    told = new(*sizes, "--base", "org/Bird-7B", *FILES, "--to", "other.yaml", code=1)
    assert "--base is given 1 times for 3 models" in told


def test_a_gguf_file_says_its_size_and_template_whatever_its_name(mine):
    path = mine / "bird.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_chat_template("{{ messages }}")
    writer.add_tensor("w", np.zeros((8, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = look_at_model(str(path))
    assert (found.kind, found.parameters, found.has_template) == ("gguf", 256, True)
    assert base_of(found) is None
    assert "nothing is projected" in new("--model", path.name, *FILES, "--json")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ModelError, match="is the download complete"):
        look_at_model(str(path))


def test_what_is_no_model_is_an_error_that_says_what_it_is(mine):
    (mine / "adapter").mkdir()
    (mine / "adapter" / "adapter_config.json").write_text("{}")
    (mine / "x.bin").write_bytes(b"PK")
    (mine / "cut").mkdir()
    (mine / "cut" / "config.json").write_text("{}")
    (mine / "cut" / "model.safetensors").write_bytes(b"\xff" * 9)
    for name, reason in (
        ("adapter", "is an adapter and not a model"),
        ("x.bin", "neither a folder nor a GGUF file"),
        ("cut", "cannot be read as safetensors"),
        ("./no/model", "there is no model at"),
        ("absent_package:x.gguf", "is not installed: pip install --no-deps absent-package"),
    ):
        with pytest.raises(ModelError, match=reason):
            look_at_model(name)


@pytest.mark.parametrize("text", ["7b", "1e3", "null", "no", "a: b", "x#y", " ", "ü", "0.5", "a'b"])
def test_a_name_is_the_same_text_in_yaml(text):
    import yaml

    assert yaml.safe_load(f"{{x: {scalar(text)}}}") == {"x": text}


def test_a_chat_template_file_becomes_part_of_the_study(mine):
    model_folder(mine / "bare", template=None)
    (mine / "chat.jinja").write_text(TEMPLATE)
    new("--model", "bare", *FILES, "--chat-template", "chat.jinja")
    (model,) = parse(mine / "study.yaml").models.values()
    assert model.chat.text == TEMPLATE and model.chat_template is None
    (mine / "chat.jinja").write_text("no template")
    told = new("--model", "bare", *FILES, "--chat-template", "chat.jinja", "--to", "o.yaml", code=1)
    assert "is no chat template" in told
