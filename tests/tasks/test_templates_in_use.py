"""Chat templates where models are loaded: checked before the weights are read, recorded, and taken
from beside an adapter only when asked.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ebbline.checks.jobs import Jobs, ModelJob, SetJob
from ebbline.checks.study_checks import check_study
from ebbline.checks.with_models import answers_to
from ebbline.commands.evaluate import chat_of, evaluate
from ebbline.sweeps.study.suites import TaskSuite
from ebbline.tasks.errors import DataError, EvaluationError, ModelError
from ebbline.tasks.headers.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ebbline.tasks.measuring import generate
from ebbline.tasks.measuring.completions import CHANGES_NOTHING, read_completions
from ebbline.tasks.measuring.lm_tasks.prefix_model import PrefixLM
from ebbline.tasks.models.brought.folder import other_base
from ebbline.tasks.models.loading import Residents, load_tokenizer
from ebbline.tasks.specs import Chat, GenerateSpec, TrainSpec
from ebbline.tasks.training import train
from tests.sweeps.made import study
from tests.tiny import TEMPLATE, context, fresh, word_tokenizer, write_chats, write_lines

DATED = "{{ bos_token }}<system> {{ strftime_now('word%-d') }} " + TEMPLATE.removeprefix(
    "{{ bos_token }}"
)
NO_PROMPT = TEMPLATE.partition("{% if add_generation_prompt")[0]


def with_template(folder, source, template):
    """A copy of a model folder with another chat template; without one for None."""
    shutil.copytree(source, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture
def prompts(tmp_path):
    return write_lines(tmp_path / "prompts.jsonl", [{"prompt": "word1 word2"}, {"prompt": "word3"}])


@pytest.fixture(scope="module")
def adapter(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = AutoModelForCausalLM.from_pretrained(pair.aligned)
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def generated(folder, model, prompts, adapter=None, **spec):
    """The completions of a generation and its prompts.json."""
    out, inputs = fresh(folder), {"model": model, "prompts": prompts}
    inputs |= {} if adapter is None else {"adapter": adapter}
    settings = GenerateSpec(**{"dtype": "float32", "max_new_tokens": 4, **spec})
    generate.run(settings, inputs, out, context(folder.with_name("ctx")))
    return read_completions(out), json.loads((out / GenerateSpec.PROMPTS).read_text())


@pytest.mark.parametrize(
    "template, words", [(None, "has no chat template"), (NO_PROMPT, "writes no generation prompt")]
)
def test_a_template_that_cannot_be_used_is_an_error_before_the_weights_are_read(
    pair, tmp_path, template, words
):
    folder = with_template(tmp_path / "model", pair.aligned, template)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ModelError, match=words):
        Residents().model(folder, "none", "float32", "cpu")


def test_a_folder_without_tokenizer_files_is_an_error_that_names_them(pair, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(pair.aligned / "config.json", folder)
    with pytest.raises(ModelError, match=r"model cannot be read .*add tokenizer.json"):
        load_tokenizer(folder)


def test_a_tokenizer_with_more_tokens_than_the_model_is_an_error(pair, tmp_path):
    folder = with_template(tmp_path / "model", pair.aligned, TEMPLATE)
    larger = word_tokenizer()
    larger.add_tokens(["zorp"])
    larger.save_pretrained(folder)
    with pytest.raises(ModelError, match="has 55 tokens, and the model has embeddings for 54"):
        Residents().model(folder, "none", "float32", "cpu")


def test_a_template_file_wins_over_the_configuration_as_in_transformers(pair, tmp_path):
    folder = with_template(tmp_path / "model", pair.aligned, DATED)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "old"}))
    assert load_tokenizer(folder).chat_template.endswith(DATED)


def test_the_date_of_a_template_is_the_specs_and_another_date_is_another_key(
    pair, prompts, tmp_path
):
    folder = with_template(tmp_path / "model", pair.aligned, DATED)
    record = generated(tmp_path / "one/out", folder, prompts)[1]["chat"]
    assert record["dated"] and record["date"] == "2024-07-26"
    texts = {
        day: load_tokenizer(folder, Chat(date=day)).apply_chat_template(
            [{"role": "user", "content": "word1"}], tokenize=False
        )
        for day in ("2024-07-26", "2025-02-03")
    }
    assert "word26" in texts["2024-07-26"] and "word3" in texts["2025-02-03"]
    first, second = (GenerateSpec(chat=Chat(date=day)).model_dump() for day in texts)
    assert first != second


def test_generation_ends_at_the_end_of_turn_that_only_the_template_names(pair, prompts, tmp_path):
    """The model's files name </s> as its end; its template ends turns with <pad>, all it says."""
    template = TEMPLATE.replace("{{ eos_token }}", "<pad>")
    folder = with_template(tmp_path / "model", pair.aligned, template)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.norm.weight.data.zero_()  # equal logits, so that token 0 is the greedy one
    model.save_pretrained(folder)
    completions, record = generated(tmp_path / "one/out", folder, prompts)
    assert [(row.tokens, row.ended) for row in completions] == [(1, True)] * 2
    assert record["chat"]["end_of_turn"] == 0


def test_a_completion_begins_with_the_tag_of_a_thought_that_its_prompt_opened(
    pair, prompts, tmp_path
):
    template = TEMPLATE.replace("<assistant>{% endif %}", "<assistant> <think>{% endif %}")
    folder = with_template(tmp_path / "model", pair.aligned, template)
    completions, record = generated(tmp_path / "one/out", folder, prompts)
    assert all(row.completion.startswith("<think>") for row in completions)
    assert record["chat"]["thoughts"] == "opened"


def test_a_tokenizer_beside_an_adapter_is_named_in_the_result_and_used_when_asked(
    pair, adapter, prompts, tmp_path
):
    beside = tmp_path / "beside"
    shutil.copytree(adapter, beside)
    model, record = generated(tmp_path / "one/out", pair.aligned, prompts, beside)
    assert record["chat"]["unused_beside_adapter"] == []
    word_tokenizer(DATED).save_pretrained(beside)
    named, record = generated(tmp_path / "two/out", pair.aligned, prompts, beside)
    assert named == model and record["chat"]["unused_beside_adapter"] == ["chat template"]
    used, record = generated(
        tmp_path / "three/out", pair.aligned, prompts, beside, tokenizer="adapter"
    )
    assert record["chat"]["tokenizer"] == "adapter" and record["chat"]["dated"]
    assert record["chat"]["unused_beside_adapter"] == [] and used != model


def test_a_template_alone_beside_an_adapter_is_used_with_the_models_tokenizer(
    pair, adapter, prompts, tmp_path
):
    beside = tmp_path / "beside"
    shutil.copytree(adapter, beside)
    with pytest.raises(ModelError, match="needs an adapter"):
        generated(tmp_path / "none/out", pair.aligned, prompts, tokenizer="adapter")
    with pytest.raises(ModelError, match="holds neither a tokenizer nor chat_template.jinja"):
        generated(tmp_path / "one/out", pair.aligned, prompts, beside, tokenizer="adapter")
    (beside / "chat_template.jinja").write_text(DATED)
    _, record = generated(tmp_path / "two/out", pair.aligned, prompts, beside, tokenizer="adapter")
    assert record["chat"]["dated"]


def test_evaluate_names_an_unused_tokenizer_and_rejects_a_template_before_it_hashes(
    pair, adapter, prompts, tmp_path, monkeypatch
):
    beside = tmp_path / "beside"
    shutil.copytree(adapter, beside)
    word_tokenizer(DATED).save_pretrained(beside)
    (measured,) = evaluate(
        pair.aligned,
        "refusal",
        prompts,
        tmp_path / "out",
        adapters=[beside],
        settings={"max_new_tokens": 4},
        dtype="float32",
        baseline=False,
    )
    assert measured.unused_beside_adapter == ["chat template"]
    assert measured.other_base == ""
    monkeypatch.setattr("ebbline.commands.evaluate._source", None)
    broken = with_template(tmp_path / "model", pair.aligned, NO_PROMPT)
    with pytest.raises(ModelError, match="writes no generation prompt"):
        evaluate(broken, "refusal", prompts, tmp_path / "other")


def test_a_generation_records_an_adapter_that_changes_nothing(pair, tmp_path, adapter, prompts):
    assert CHANGES_NOTHING not in generated(tmp_path / "one", pair.aligned, prompts, adapter)[1]
    silent = shutil.copytree(adapter, tmp_path / "silent")
    tensors = load_file(silent / ADAPTER_WEIGHTS)
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()
    save_file(tensors, silent / ADAPTER_WEIGHTS, {"format": "pt"})
    _, record = generated(tmp_path / "two", pair.aligned, prompts, silent)
    assert record[CHANGES_NOTHING] is True


def test_a_model_without_a_template_is_measured_with_the_one_that_is_given(pair, prompts, tmp_path):
    bare = with_template(tmp_path / "model", pair.aligned, None)
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    settings = {"settings": {"max_new_tokens": 4}, "dtype": "float32"}
    evaluate(pair.aligned, "refusal", prompts, tmp_path / "one", **settings)
    chat = chat_of(None, tmp_path / "own.jinja", None)
    evaluate(bare, "refusal", prompts, tmp_path / "two", chat=chat, **settings)
    one, two = (read_completions(tmp_path / name / "model" / "generate") for name in ("one", "two"))
    assert one == two
    with pytest.raises(ModelError, match="has no chat template"):
        evaluate(bare, "refusal", prompts, tmp_path / "three", **settings)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", None])
def test_a_template_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path, content):
    if content is not None:
        (tmp_path / "own.jinja").write_bytes(content)
    with pytest.raises(EvaluationError, match=r"own\.jinja"):
        chat_of(None, tmp_path / "own.jinja", None)


@pytest.mark.parametrize(
    "named, other",
    [
        (None, ""),
        ("Org/Model-7B", ""),
        ("/elsewhere/model-7b/", ""),
        ("C:\\models\\Model-7B", ""),
        ("Org/Saved-As", ""),
        ("Org/Model-13B", "Org/Model-13B"),
    ],
)
def test_an_adapter_that_names_another_base_than_the_measured_model_is_named(
    tmp_path, named, other
):
    adapter, model = fresh(tmp_path / "adapter"), fresh(tmp_path / "Model-7B")
    (adapter / ADAPTER_CONFIG).write_text(json.dumps({"base_model_name_or_path": named}))
    (model / "config.json").write_text(json.dumps({"_name_or_path": "x/saved-as"}))
    assert other_base(adapter, str(model), model) == other
    assert other_base(adapter, "Org/Model-13B@" + "c" * 40, model) == ""


@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_names_the_row_whose_turns_the_template_does_not_support(pair, tmp_path, method):
    template = TEMPLATE.replace(
        "<{{ message.role }}>",
        "{% if message.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "<{{ message.role }}>",
    )
    folder = with_template(tmp_path / "model", pair.aligned, template)
    chats = write_chats(tmp_path / "chats.jsonl", 3)
    turns = json.loads(chats.read_text().splitlines()[0])["messages"]
    with chats.open("a") as handle:
        handle.write(
            json.dumps({"messages": [{"role": "system", "content": "word9"}, *turns]}) + "\n"
        )
    spec = TrainSpec(method=method, dtype="float32", steps=1, global_batch=4, rank=2)
    with pytest.raises(DataError, match=r"chats.jsonl, row 4: .* support system turns"):
        train.run(
            spec,
            {"model": folder, "data": chats},
            fresh(tmp_path / "out"),
            context(tmp_path / "ctx"),
        )
    pool = SetJob("data.pool", str(chats), 512, (0,), 4)
    job = ModelJob("models.7b.aligned", str(folder), {}, trains=True, sets=(pool,))
    (message,) = answers_to(Jobs((job,)), print).faults
    assert "does not support system turns, and 1 of the 4 conversations" in message


def test_full_fine_tuning_saves_the_models_own_template(pair, tmp_path):
    folder = with_template(tmp_path / "model", pair.aligned, DATED)
    spec = TrainSpec(method="full", dtype="float32", steps=1, global_batch=4)
    out = fresh(tmp_path / "out")
    chats = write_chats(tmp_path / "chats.jsonl", 4)
    train.run(spec, {"model": folder, "data": chats}, out, context(tmp_path / "ctx"))
    assert AutoTokenizer.from_pretrained(out / TrainSpec.MODEL).chat_template == DATED


def test_lm_eval_leaves_out_no_turn_that_the_template_does_not_support(pair):
    """lm-eval drops a system turn that the template rejects, with a warning."""
    model = AutoModelForCausalLM.from_pretrained(pair.aligned)
    alternates = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        "{% if messages | length > 2 %}{{ raise_exception('no turns') }}{% endif %}"
    )
    tokenizer = word_tokenizer(alternates + TEMPLATE)
    lm = PrefixLM(pretrained=model, tokenizer=tokenizer, backend="causal")
    user = {"role": "user", "content": "word1"}
    assert lm.apply_chat_template([user]) == "<s><user> word1<assistant>"
    with pytest.raises(EvaluationError, match="description is a system turn"):
        lm.apply_chat_template([{"role": "system", "content": "word2"}, user])
    with pytest.raises(EvaluationError, match="set `shots` to 0"):
        lm.apply_chat_template([user, {"role": "assistant", "content": "word2"}, user])


def test_a_prompt_of_lm_eval_begins_with_one_start_and_has_the_date_of_the_spec(pair, tmp_path):
    """The template writes the start, and the tokenizer would add another."""
    folder = with_template(tmp_path / "model", pair.aligned, DATED)
    tokenizer = load_tokenizer(folder, Chat(date="2025-02-03"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    lm = PrefixLM(pretrained=model, tokenizer=tokenizer, backend="causal")
    text = lm.apply_chat_template([{"role": "user", "content": "word1"}])
    _, tokens, _ = lm.encode(text, " word2")
    assert tokenizer.decode(tokens).startswith("<s> <system> word3")
    assert tokens.count(tokenizer.bos_token_id) == 1


@pytest.mark.process
def test_a_study_with_an_unusable_template_ends_before_its_first_stage(pair, tmp_path):
    """The check is a process of its own, because a driver imports no torch."""
    folder = with_template(tmp_path / "model", pair.aligned, NO_PROMPT)
    rows = write_lines(tmp_path / "task.jsonl", [{"prompt": "word1 word2", "answer": "word3"}])
    measured = SetJob("suites.task.prompts", str(rows), 99, measure=TaskSuite().model_dump())
    jobs = Jobs(
        (
            ModelJob("models.7b.aligned", str(folder), {}, trains=True),
            ModelJob("models.8b.aligned", str(pair.aligned), {}, trains=True, sets=(measured,)),
        )
    )
    done = subprocess.run(
        [sys.executable, "-P", "-m", "ebbline.checks.with_models"],
        input=json.dumps(asdict(jobs)),
        capture_output=True,
        text=True,
        check=True,
    )
    *now, last = map(json.loads, done.stdout.splitlines())
    assert now[0] == {"now": f"models.7b.aligned: {folder}"}
    found = last["found"]
    assert [each["where"] for each in found["lengths"]] == ["suites.task.prompts"]
    (message,) = found["faults"]
    assert message.startswith("models.7b.aligned: the chat template in")
    assert "writes no generation prompt" in message


def test_a_run_names_each_local_model_whose_template_cannot_be_used(pair, tmp_path):
    broken = with_template(tmp_path / "broken", pair.aligned, NO_PROMPT)
    missing = with_template(tmp_path / "missing", pair.aligned, None)
    judge = {"model": {"path": {"path": str(missing)}}, "settings": {"template": "yes-no"}}

    def of(folder):
        aligned = {"path": {"path": str(folder)}}
        return study(
            tmp_path,
            {
                "models": {"7b": {"base": {"organism": {"size": "small"}}, "aligned": aligned}},
                "judges": {"mine": judge} if folder == broken else {},
            },
        )

    assert check_study(of(pair.aligned)).faults == []
    first, second = check_study(of(broken)).faults
    assert first.startswith("models.7b.aligned: ") and "writes no generation prompt" in first
    assert second.startswith("judges.mine.model: ") and "has no chat template" in second
