"""Suites on the tiny model: completions that do not depend on the batch, counts that add up, and no text where none belongs."""

import dataclasses
import json

import pytest

from tasks.errors import DataError, EvaluationError
from tasks.evaluate import COMPLETIONS, SAMPLES, run
from tasks.metrics import METRICS, read_metrics
from tasks.models import Residents, load_model, load_tokenizer
from tasks.specs import EvaluateSpec, MultipleChoiceSuite, OverRefusalSuite, RefusalSuite, TaskSuite
from tasks.suites.generate import complete, read_prompts
from tests.tiny import context, conversations, fresh, write_lines

PROMPTS = [turns[0]["content"] for turns in conversations(20, seed=9)]


@pytest.fixture(scope="module")
def loaded(pair):
    return load_model(pair.aligned, "none", "float32", "cpu"), load_tokenizer(pair.aligned)


@pytest.fixture
def prompts(tmp_path):
    return write_lines(tmp_path / "prompts.jsonl", [{"id": f"p{i}", "prompt": text, "category": "c"} for i, text in enumerate(PROMPTS)])


def evaluated(folder, pair, prompts, suite, **inputs):
    out = fresh(folder)
    run(
        EvaluateSpec(suite=suite, dtype="float32"),
        {"model": pair.aligned, "prompts": prompts, **inputs},
        out,
        context(folder.with_name("ctx")),
    )
    return out, {metric.name: metric for metric in read_metrics(out)}


def test_completions_in_a_batch_are_those_made_one_by_one(loaded, tmp_path):
    model, tokenizer = loaded
    together = complete(model, tokenizer, PROMPTS, 12, 128, context(tmp_path / "a", batch_size=20))
    apart = [complete(model, tokenizer, [text], 12, 128, context(tmp_path / "b"))[0] for text in PROMPTS]
    in_threes = complete(model, tokenizer, PROMPTS, 12, 128, context(tmp_path / "c", batch_size=3))
    assert together == apart == in_threes
    assert len({len(text.split()) for text in PROMPTS}) > 2 and len(set(together)) > 10


def test_completions_are_what_greedy_decoding_without_a_cache_gives(loaded, tmp_path):
    import torch

    model, tokenizer = loaded
    for text in PROMPTS[:3]:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        new: list[int] = []
        for _ in range(8):
            token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
            new.append(token)
            if token == tokenizer.eos_token_id:
                break
        assert complete(model, tokenizer, [text], 8, 128, context(tmp_path)) == [tokenizer.decode(new, skip_special_tokens=True)]


def test_a_prompt_without_room_for_its_completion_is_an_error_that_does_not_quote_it(loaded, tmp_path):
    with pytest.raises(DataError, match="exceed max_tokens=16") as caught:
        complete(*loaded, ["word1 " * 20], 8, 16, context(tmp_path))
    assert "word1" not in str(caught.value)


def test_a_refusal_suite_counts_every_prompt_and_the_undecided_apart(pair, prompts, tmp_path):
    out, metrics = evaluated(tmp_path / "out", pair, prompts, RefusalSuite(max_new_tokens=8))
    samples = [json.loads(line) for line in (out / SAMPLES).read_text().splitlines()]
    found = metrics["refusal_rate"]
    assert found.n == len(samples) == len(PROMPTS)
    assert found.successes == sum(sample["success"] for sample in samples) == 0
    assert found.undecided == sum(sample["verdict"] == "undecided" for sample in samples)
    assert [sample["id"] for sample in samples] == [f"p{i}" for i in range(20)]


def test_an_undecided_completion_stays_in_n_and_is_no_refusal(pair, prompts, tmp_path):
    # One new token cannot be incoherent; a model whose first token is always the end token says nothing at all.
    from safetensors.torch import load_file, save_file

    mute = fresh(tmp_path / "mute")
    for file in pair.aligned.iterdir():
        (mute / file.name).write_bytes(file.read_bytes())
    weights = load_file(mute / "model.safetensors")
    weights["model.norm.weight"][:] = 0.0  # all logits are 0: greedy takes token 0, the padding, which decodes to nothing
    save_file(weights, mute / "model.safetensors", metadata={"format": "pt"})
    out = fresh(tmp_path / "out")
    run(
        EvaluateSpec(suite=RefusalSuite(max_new_tokens=4), dtype="float32"),
        {"model": mute, "prompts": prompts},
        out,
        context(tmp_path / "c"),
    )
    (found,) = read_metrics(out)
    assert (found.n, found.undecided, found.successes, found.value) == (20, 20, 0, 0.0)


def test_over_refusal_is_a_metric_of_its_own_that_points_down(pair, prompts, tmp_path):
    _, metrics = evaluated(tmp_path / "out", pair, prompts, OverRefusalSuite(max_new_tokens=4, limit=5))
    assert metrics["over_refusal_rate"].n == 5
    assert metrics["over_refusal_rate"].direction == "minimise"


def test_a_task_suite_finds_exactly_the_right_answers(pair, loaded, tmp_path):
    truth = complete(*loaded, PROMPTS, 6, 128, context(tmp_path / "c"))
    rows = [
        {"prompt": text, "answer": f"  {answer.upper()} " if index % 4 else f"{answer} word39 word39"}
        for index, (text, answer) in enumerate(zip(PROMPTS, truth, strict=True))
        if answer.strip()
    ]
    _, metrics = evaluated(tmp_path / "out", pair, write_lines(tmp_path / "task.jsonl", rows), TaskSuite(max_new_tokens=6))
    found = metrics["task_accuracy"]
    assert found.n == len(rows)
    assert found.successes == sum(not row["answer"].endswith("word39 word39") or row["answer"].startswith("  ") for row in rows) < found.n


def test_an_adapter_changes_the_completions_and_leaves_the_base_as_it_was(pair, prompts, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=8, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(pair.aligned), config).save_pretrained(tmp_path / "adapter")
    residents, texts = Residents(), []
    for index, adapter in enumerate([None, tmp_path / "adapter", None, tmp_path / "adapter"]):
        out = fresh(tmp_path / f"out{index}")
        inputs = {"model": pair.aligned, "prompts": prompts, **({"adapter": adapter} if adapter else {})}
        run(EvaluateSpec(suite=RefusalSuite(max_new_tokens=8), dtype="float32"), inputs, out, context(tmp_path / "c", residents=residents))
        texts.append((out / COMPLETIONS).read_text())
    assert texts[0] == texts[2] != texts[1] == texts[3]
    assert residents.loads == 1


@pytest.mark.parametrize("quantisation", ["nf4", "int8"])
def test_a_quantised_model_is_measured_too(pair, prompts, tmp_path, quantisation):
    out = fresh(tmp_path / "out")
    spec = EvaluateSpec(suite=RefusalSuite(max_new_tokens=4, limit=4), quantisation=quantisation, dtype="float32")
    run(spec, {"model": pair.aligned, "prompts": prompts}, out, context(tmp_path / "c"))
    assert read_metrics(out)[0].n == 4


def test_an_empty_prompt_set_is_an_error_not_a_score(pair, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl holds no prompt"):
        evaluated(tmp_path / "out", pair, tmp_path / "empty.jsonl", RefusalSuite())
    assert not (tmp_path / "out" / METRICS).exists()


def test_prompts_are_read_from_the_columns_that_public_sets_use(tmp_path):
    for column in ("prompt", "goal", "Goal", "Behavior", "forbidden_prompt"):
        (tmp_path / "set.csv").write_text(f"{column},category\nword1,c\n")
        (prompt,) = read_prompts(tmp_path / "set.csv", None)
        assert (prompt.text, prompt.category, prompt.id) == ("word1", "c", "2")


def test_a_row_without_a_prompt_or_an_answer_names_its_line(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [{"prompt": "word1", "answer": "word2"}, {"prompt": "word1"}, {"promt": "secret-words"}])
    with pytest.raises(DataError, match=r"x\.jsonl:3 has no prompt") as caught:
        read_prompts(path, None)
    assert "secret-words" not in str(caught.value)
    write_lines(path, [{"prompt": "word1", "answer": "word2"}, {"prompt": "word1"}])
    with pytest.raises(DataError, match=r"x\.jsonl:2 has no `answer`"):
        read_prompts(path, None, needs_answer=True)


def test_no_text_of_prompt_or_completion_leaves_the_sensitive_file(pair, tmp_path):
    prompts = write_lines(
        tmp_path / "prompts.jsonl", [{"id": str(i), "prompt": f"word1{i % 10} word2{i % 10} planted{i}"} for i in range(12)]
    )
    folder, out = tmp_path / "ctx", fresh(tmp_path / "out")
    notes: list[str] = []
    ctx = dataclasses.replace(context(folder), progress=lambda done, total, note: notes.append(f"{done}/{total} {note}"))
    run(EvaluateSpec(suite=RefusalSuite(max_new_tokens=8), dtype="float32"), {"model": pair.aligned, "prompts": prompts}, out, ctx)
    rows = [json.loads(line) for line in (out / COMPLETIONS).read_text().splitlines()]
    assert {path.name for path in out.iterdir()} == {METRICS, SAMPLES, COMPLETIONS}
    assert any(row["completion"].strip() for row in rows)
    seen = [path.read_text() for path in (out / METRICS, out / SAMPLES)] + notes + [path.read_text() for path in folder.rglob("*.*")]
    words = {
        word for row in rows for text in (row["prompt"], row["completion"]) for word in text.split() if word.startswith(("word", "planted"))
    }
    assert words
    for text in seen:
        assert not any(word in text for word in words)


YAML = """
task: tiny_choice
dataset_path: json
output_type: multiple_choice
test_split: test
fewshot_split: dev
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture
def choices(tmp_path):
    folder = tmp_path / "choices"
    items = [
        {"question": f"word{i} word{i + 1}", "choices": ["word30", "word31 word32", "word33", "word34"], "label": i % 4} for i in range(12)
    ]
    write_lines(folder / "test.jsonl", items)
    write_lines(folder / "dev.jsonl", items[:2])
    (folder / "tiny_choice.yaml").write_text(YAML)
    return folder


def likeliest(loaded, question: str, choices: list[str]) -> int:
    """The choice with the highest log-likelihood after the question, from the definition."""
    import torch

    model, tokenizer = loaded
    scores = []
    for choice in choices:
        context_ids = tokenizer(question)["input_ids"]  # with the start token, as the model was trained
        ids = tokenizer(f"{question} {choice}")["input_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
        scores.append(sum(float(logits[i - 1, ids[i]]) for i in range(len(context_ids), len(ids))))
    return scores.index(max(scores))


def test_multiple_choice_through_lm_eval_is_the_arg_max_of_the_likelihoods(pair, loaded, choices, tmp_path):
    out, metrics = evaluated(tmp_path / "out", pair, choices, MultipleChoiceSuite(task="tiny_choice"))
    assert set(metrics) == {"acc", "acc_norm"}
    assert metrics["acc"].n == 12 and 0 <= metrics["acc"].value <= 1
    items = [json.loads(line) for line in (choices / "test.jsonl").read_text().splitlines()]
    expected = [likeliest(loaded, item["question"], item["choices"]) == item["label"] for item in items]
    samples = [json.loads(line) for line in (out / SAMPLES).read_text().splitlines()]
    assert [sample["success"] for sample in samples] == expected
    assert not (out / COMPLETIONS).exists()


def test_a_limit_and_shots_reach_lm_eval(pair, choices, tmp_path):
    _, metrics = evaluated(tmp_path / "out", pair, choices, MultipleChoiceSuite(task="tiny_choice", limit=5, shots=2, chat_template=True))
    assert metrics["acc"].n == 5


def test_multiple_choice_leaves_the_tokenizer_as_generation_needs_it(pair, choices, prompts, tmp_path):
    residents = Residents()
    ctx = context(tmp_path / "c", residents=residents)
    inputs = {"model": pair.aligned, "prompts": prompts}
    texts = []
    for index, suite in enumerate(
        [RefusalSuite(max_new_tokens=6), MultipleChoiceSuite(task="tiny_choice", limit=3), RefusalSuite(max_new_tokens=6)]
    ):
        out = fresh(tmp_path / f"o{index}")
        where = choices if suite.kind == "multiple_choice" else prompts
        run(EvaluateSpec(suite=suite, dtype="float32"), {**inputs, "prompts": where}, out, ctx)
        texts.append((out / COMPLETIONS).read_text() if suite.kind == "refusal" else "")
    assert texts[0] == texts[2]
    assert residents.model(pair.aligned, "none", "float32", "cpu")[1].padding_side == "left"


def test_a_task_that_the_folder_does_not_define_is_an_error_that_names_those_it_does(pair, choices, tmp_path):
    with pytest.raises(EvaluationError, match="tiny_choice.*not 'tiny_chioce'"):
        evaluated(tmp_path / "out", pair, choices, MultipleChoiceSuite(task="tiny_chioce"))


def test_an_empty_multiple_choice_set_is_an_error_not_a_score(pair, choices, tmp_path):
    (choices / "test.jsonl").write_text("")
    with pytest.raises(Exception, match=r".+"):
        evaluated(tmp_path / "out", pair, choices, MultipleChoiceSuite(task="tiny_choice"))
    assert not (tmp_path / "out" / METRICS).exists()
    for file in choices.glob("*.jsonl"):
        file.unlink()
    with pytest.raises(EvaluationError, match=r"holds no SPLIT\.jsonl"):
        evaluated(tmp_path / "out2", pair, choices, MultipleChoiceSuite(task="tiny_choice"))
