"""`ebbline evaluate`, `rescore` and `prompts check` by themselves, on the tiny pair; and a leak
hunt through everything they write.
"""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ebbline.cli import app
from ebbline.commands.evaluate import evaluate
from ebbline.commands.project import project
from ebbline.tasks.errors import EvaluationError, ModelError
from ebbline.tasks.headers.files import ADAPTER_WEIGHTS
from ebbline.tasks.measuring.completions import read_completions
from ebbline.tasks.models.loading import Residents
from ebbline.tasks.specs import GenerateSpec
from tests.tasks.test_weights import lora
from tests.tiny import conversations, write_lines

PROMPTS = [turns[0]["content"] for turns in conversations(12, seed=4)]


@pytest.fixture(scope="module")
def adapters(pair, tmp_path_factory):
    """Two adapters of the aligned model that answer differently."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=8, lora_alpha=64, target_modules="all-linear", init_lora_weights=False
        )
        get_peft_model(AutoModelForCausalLM.from_pretrained(pair.aligned), config).save_pretrained(
            folder / name
        )
    return [folder / "one", folder / "two"]


@pytest.fixture
def prompts(tmp_path):
    return write_lines(
        tmp_path / "set.jsonl",
        [
            {"id": f"p{i}", "prompt": text, "category": f"c{i % 3}"}
            for i, text in enumerate(PROMPTS)
        ],
    )


@pytest.mark.parametrize("quantisation", ["none", "int8"])
def test_no_library_writes_into_the_output_of_a_command(
    pair, prompts, adapters, tmp_path, caplog, quantisation
):
    """int8 in bfloat16: bitsandbytes would log a line for each layer of each forward pass."""
    arguments = ("--adapter", adapters[0], "--limit", "2", "--quantisation", quantisation)
    done = command(
        *("evaluate", "--model", pair.aligned, "--suite", "refusal", "--prompts", prompts),
        *arguments,
        *("--max-new-tokens", "2", "--out", tmp_path / "out"),
    )
    assert done.exit_code == 0 and done.stderr == ""
    assert [each for each in caplog.records if each.name.startswith("bitsandbytes")] == []


def command(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def test_the_model_is_loaded_once_for_all_adapters_and_each_has_its_own_answers(
    pair, adapters, prompts, tmp_path, monkeypatch
):
    loads, real = [], Residents.model
    monkeypatch.setattr(
        Residents,
        "model",
        lambda self, *args, **how: (real(self, *args, **how), loads.append(self.loads))[0],
    )
    settings = {"max_new_tokens": 6}
    measured = evaluate(
        pair.aligned,
        "refusal",
        prompts,
        tmp_path / "out",
        adapters=adapters,
        settings=settings,
        dtype="float32",
    )
    assert [each.folder.name for each in measured] == ["model", "one", "two"] and max(loads) == 1
    assert [each.adapter for each in measured] == ["", *map(str, adapters)]
    texts = [
        (each.folder / "generate" / GenerateSpec.COMPLETIONS).read_text() for each in measured[1:]
    ]
    alone = evaluate(
        pair.aligned,
        "refusal",
        prompts,
        tmp_path / "alone",
        adapters=adapters[1:],
        settings=settings,
        dtype="float32",
        baseline=False,
    )
    assert (
        texts[0]
        != texts[1]
        == (alone[0].folder / "generate" / GenerateSpec.COMPLETIONS).read_text()
    )
    assert {each.metrics["refusal_rate"].n for each in measured} == {len(PROMPTS)}


def answers(pair, prompts, out, *adapters):
    """Adapter's name -> its completions."""
    measured = evaluate(
        pair.aligned,
        "refusal",
        prompts,
        out,
        adapters=adapters,
        settings={"max_new_tokens": 6},
        dtype="float32",
        baseline=not adapters,
    )
    return {
        each.folder.name: (each.folder / "generate" / GenerateSpec.COMPLETIONS).read_text()
        for each in measured
    }


def renamed(folder, source, rename):
    shutil.copytree(source, folder)
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    tensors = {rename(name): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    return folder


def test_adapters_before_and_after_one_that_moves_the_base_have_their_own_answers(
    pair, adapters, prompts, tmp_path
):
    settings = {"target_modules": ["q_proj", "down_proj"], "r": 8, "lora_alpha": 64}
    moves = lora(tmp_path / "moves", pair.aligned, init_lora_weights="pissa", **settings)
    head = lora(tmp_path / "head", pair.aligned, modules_to_save=["lm_head"], **settings)
    order = [moves, adapters[0], head, adapters[1]]
    together = answers(pair, prompts, tmp_path / "together", *order)
    backwards = answers(pair, prompts, tmp_path / "backwards", *reversed(order))
    assert together == backwards and len(set(together.values())) == 4
    for adapter in order:
        alone = answers(pair, prompts, tmp_path / f"alone-{adapter.name}", adapter)
        assert alone[adapter.name] == together[adapter.name]


def test_an_adapter_of_a_compiled_model_has_the_answers_of_its_plain_names(
    pair, adapters, prompts, tmp_path
):
    compiled = renamed(tmp_path / "compiled", adapters[0], lambda name: f"_orig_mod.{name}")
    found = answers(pair, prompts, tmp_path / "out", adapters[0], compiled)
    assert found["one"] == found["compiled"]


def test_a_dead_adapter_is_named_in_the_result(pair, prompts, adapters, tmp_path):
    shutil.copytree(adapters[0], tmp_path / "dead")
    found = load_file(adapters[0] / ADAPTER_WEIGHTS)
    found = {name: tensor * ("lora_A" in name) for name, tensor in found.items()}
    save_file(found, tmp_path / "dead" / ADAPTER_WEIGHTS)
    asked = ["evaluate", "--model", pair.aligned, "--suite", "refusal", "--prompts", prompts]
    asked += ["--adapter", tmp_path / "dead", "--adapter", adapters[0], "--out", tmp_path / "out"]
    printed = plain(command(*asked, "--max-new-tokens", 4).output)
    assert printed.count("every update B A") == 1
    assert "dead: every update B A of this adapter is zero" in printed
    asked += ["--max-new-tokens", 4]
    rows = json.loads(command(*asked, "--json").stdout)
    assert [row["changes_nothing"] for row in rows] == [False, True, False]


def test_evaluate_and_project_say_the_same_of_an_adapter_that_does_not_land(
    pair, adapters, prompts, tmp_path
):
    half = renamed(tmp_path / "half", adapters[0], lambda name: name.replace(".mlp.", ".x.mlp."))
    with pytest.raises(ModelError, match=f"{half}/.*mlp.* fits no adapter parameter") as measuring:
        answers(pair, prompts, tmp_path / "out", half)
    with pytest.raises(ModelError) as projecting:
        project([half], pair.base, pair.aligned, tmp_path / "projected")
    assert str(measuring.value) == str(projecting.value)


def test_an_adapter_in_the_models_folder_is_an_error_before_anything_is_measured(
    pair, prompts, tmp_path
):
    shutil.copytree(pair.aligned, tmp_path / "model")
    lora(tmp_path / "model", pair.aligned)
    asked = ["evaluate", "--model", tmp_path / "model", "--suite", "refusal"]
    done = command(*asked, "--prompts", prompts, "--out", tmp_path / "out")
    assert done.exit_code == 1 and "transformers would apply that adapter" in plain(done.output)
    assert not (tmp_path / "out").exists()


def test_the_same_command_continues_and_another_one_there_is_refused(pair, prompts, tmp_path):
    asked = [
        "evaluate",
        "--model",
        pair.aligned,
        "--suite",
        "refusal",
        "--prompts",
        prompts,
        "--out",
        tmp_path / "out",
    ]
    asked += ["--dtype", "float32", "--max-new-tokens", 4]
    first = command(*asked, "--json")
    assert first.exit_code == 0, first.output
    file = tmp_path / "out" / "model" / "generate" / GenerateSpec.COMPLETIONS
    before = file.stat().st_mtime_ns
    again = command(*asked, "--json")
    assert (
        json.loads(again.stdout) == json.loads(first.stdout) and file.stat().st_mtime_ns == before
    )
    other = command(*asked, "--limit", 3)
    assert other.exit_code == 1 and "holds another measurement" in other.output and file.exists()
    assert "refusal rate" in command(*asked).stdout


def test_an_lm_eval_task_by_itself(pair, tmp_path):
    folder = tmp_path / "choices"
    items = [
        {"question": f"word{i}", "choices": ["word30", "word31"], "label": i % 2} for i in range(6)
    ]
    write_lines(folder / "test.jsonl", items)
    (folder / "tiny.yaml").write_text(
        "task: tiny\ndataset_path: json\noutput_type: multiple_choice\ntest_split: "
        'test\ndoc_to_text: "{{question}}"\n'
        'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{label}}"\nmetric_list: [{metric: acc}]\n'
    )
    (measured,) = evaluate(pair.aligned, "tiny", folder, tmp_path / "out", dtype="float32")
    assert measured.metrics["acc"].n == 6


@pytest.mark.parametrize(
    ("suite", "settings", "fault"),
    [
        ("refusal", {"shots": 5}, "the suite 'refusal' has no shots"),
        ("mmlu", {"scorer": "prefix"}, "the suite 'mmlu' has no scorer"),
        ("refusal", {"scorer": "prefx"}, "no scorer 'prefx'"),
        ("harm", {}, "needs a judge, and judges need a study"),
    ],
)
def test_what_a_suite_does_not_have_is_refused_by_name(
    pair, prompts, tmp_path, suite, settings, fault
):
    with pytest.raises(EvaluationError, match=fault):
        evaluate(pair.aligned, suite, prompts, tmp_path / "out", settings=settings)
    assert not (tmp_path / "out").exists()


def test_a_prompt_set_or_adapter_that_is_not_there_is_one_clear_error(pair, prompts, tmp_path):
    asked = ["evaluate", "--model", pair.aligned, "--suite", "refusal", "--out", tmp_path / "out"]
    missing = command(*asked, "--prompts", tmp_path / "none.csv")
    assert missing.exit_code == 1 and "there is no prompt set at" in missing.output
    no_adapter = command(*asked, "--prompts", prompts, "--adapter", tmp_path)
    assert no_adapter.exit_code == 1 and "not a PEFT adapter" in plain(no_adapter.output)


def test_stored_completions_are_scored_again_without_a_model(pair, prompts, tmp_path):
    evaluate(
        pair.aligned,
        "refusal",
        prompts,
        tmp_path / "out",
        settings={"max_new_tokens": 6},
        dtype="float32",
    )
    generation = tmp_path / "out" / "model" / "generate"
    done = command(
        "rescore",
        generation,
        "--scorer",
        "advbench",
        "--also",
        "xstest",
        "--also",
        "prefix",
        "--to",
        tmp_path / "rows.csv",
        "--json",
    )
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [row["scorer"] for row in rows] == ["advbench", "xstest", "prefix"] and {
        row["n"] for row in rows
    } == {len(PROMPTS)}
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 4
    bad = command("rescore", generation, "--scorer", "nobody")
    assert bad.exit_code == 1 and "no scorer 'nobody'" in bad.output


def test_prompts_check_speaks_in_counts_and_shows_text_only_when_asked(tmp_path):
    rows = [
        {"id": f"p{i}", "prompt": f"plant a purple zorble by the river bank number {i}"}
        for i in range(4)
    ]
    path = write_lines(tmp_path / "set.jsonl", rows)
    quiet = command("prompts", "check", path)
    assert quiet.exit_code == 0 and "zorble" not in quiet.output and "4" in quiet.output
    assert "zorble" in command("prompts", "check", path, "--show-text").output
    assert json.loads(command("prompts", "check", path, "--json").stdout)
    assert "no format 'advbnch'" in command("prompts", "check", path, "--format", "advbnch").output


def test_no_prompt_or_completion_is_anywhere_but_in_the_file_that_says_it_is_sensitive(
    pair, tmp_path
):
    rows = [
        {"id": str(i), "prompt": f"zyzzyva{i} word{i} word{i + 9}", "category": "c"}
        for i in range(8)
    ]
    prompts = write_lines(tmp_path / "set.jsonl", rows)
    asked = [
        "evaluate",
        "--model",
        pair.aligned,
        "--suite",
        "refusal",
        "--prompts",
        prompts,
        "--out",
        tmp_path / "out",
    ]
    results = [
        command(*asked, "--dtype", "float32", "--also", "xstest", *more)
        for more in ([], ["--json"], ["--limit", "2"])
    ]
    generation = tmp_path / "out" / "model" / "generate"
    results += [
        command("rescore", generation, "--scorer", "xstest", "--to", tmp_path / "rows.csv"),
        command("prompts", "check", prompts),
    ]
    secrets = {
        plain(text)
        for row in read_completions(generation)
        for text in (row.prompt, row.completion)
        if len(text) > 8
    }
    assert len(secrets) > 8
    written = [
        path for path in [*(tmp_path / "out").rglob("*"), tmp_path / "rows.csv"] if path.is_file()
    ]
    texts = [path.read_text() for path in written if path.name != GenerateSpec.COMPLETIONS] + [
        each.output for each in results
    ]
    assert len(texts) > 8
    for text in map(plain, texts):
        assert "zyzzyva" not in text and not any(secret in text for secret in secrets)


def plain(text: str) -> str:
    """A text without its line breaks: what is printed is broken at the terminal's width."""
    return " ".join(text.split())
