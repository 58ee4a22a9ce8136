"""Generation and scoring on the tiny model.

Completions do not depend on the batch, counts add up, and text stays in the sensitive file.
"""

import dataclasses
import json

import pytest

from ebbline.tasks.errors import DataError, EvaluationError
from ebbline.tasks.measuring import generate, score
from ebbline.tasks.measuring.completions import read_completions
from ebbline.tasks.measuring.metrics import METRICS, SAMPLES, read_metrics, read_samples
from ebbline.tasks.models.loading import Residents, load_model, load_tokenizer
from ebbline.tasks.specs import GenerateSpec, ScoreSpec
from tests.tiny import context, conversations, fresh, write_lines

PROMPTS = [turns[0]["content"] for turns in conversations(20, seed=9)]


@pytest.fixture(scope="module")
def loaded(pair):
    return load_model(pair.aligned, "none", "float32", "cpu"), load_tokenizer(pair.aligned)


@pytest.fixture
def prompts(tmp_path):
    return write_lines(
        tmp_path / "prompts.jsonl",
        [{"id": f"p{i}", "prompt": text, "category": "c"} for i, text in enumerate(PROMPTS)],
    )


def complete(model, tokenizer, prompts, new, most, ctx, **settings):
    spec = GenerateSpec(max_new_tokens=new, max_tokens=most, **settings)
    return [text for text, _, _ in generate.complete(model, tokenizer, prompts, spec, ctx)]


def generated(folder, pair, prompts, ctx=None, model=None, adapter=None, **spec):
    """Run a generation; returns its folder."""
    out, inputs = fresh(folder), {"model": model or pair.aligned, "prompts": prompts}
    if adapter is not None:
        inputs["adapter"] = adapter
    generate.run(
        GenerateSpec(**{"dtype": "float32", "max_new_tokens": 8, **spec}),
        inputs,
        out,
        ctx or context(folder.with_name("ctx")),
    )
    return out


def scored(folder, generation, measure="refusal", scorer="prefix", also=()):
    """Run a score; returns its folder, and its metrics by name."""
    out = fresh(folder)
    score.run(
        ScoreSpec(measure=measure, scorer=scorer, also=also),
        {"generation": generation},
        out,
        context(folder.with_name("ctx")),
    )
    return out, {metric.name: metric for metric in read_metrics(out)}


def test_completions_do_not_depend_on_the_batch(loaded, tmp_path):
    # In float64 the two largest of these logits differ by 2.8e-4 or more. The error of float32 is
    # at most 6 * 2^-24 * sqrt(15 * 128) * 2.9 = 5e-5 with any kernel.
    model, tokenizer = loaded
    together = complete(model, tokenizer, PROMPTS, 12, 128, context(tmp_path / "a"))
    apart = [
        complete(model, tokenizer, [text], 12, 128, context(tmp_path / "b"))[0] for text in PROMPTS
    ]
    in_fours = complete(model, tokenizer, PROMPTS, 12, 128, context(tmp_path / "c"), batch_size=4)
    assert together == apart == in_fours
    assert len({len(text.split()) for text in PROMPTS}) > 2 and len(set(together)) > 10


def test_completions_equal_greedy_decoding_without_a_cache(loaded, tmp_path):
    import torch

    model, tokenizer = loaded
    for text in PROMPTS[:3]:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        new: list[int] = []
        for _ in range(8):
            token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
            new.append(token)
            if token == tokenizer.eos_token_id:
                break
        assert complete(model, tokenizer, [text], 8, 128, context(tmp_path)) == [
            tokenizer.decode(new, skip_special_tokens=True)
        ]


def test_a_prompt_too_long_for_its_completion_is_an_error_that_does_not_quote_it(loaded, tmp_path):
    with pytest.raises(DataError, match="exceed max_tokens=16") as caught:
        complete(*loaded, ["word1 " * 20], 8, 16, context(tmp_path))
    assert "word1" not in str(caught.value)


def test_a_refusal_score_counts_every_prompt_and_the_undecided_separately(pair, prompts, tmp_path):
    out, metrics = scored(tmp_path / "out", generated(tmp_path / "generation", pair, prompts))
    samples, found = read_samples(out), metrics["refusal_rate"]
    assert found.n == len(samples) == len(PROMPTS)
    assert found.successes == sum(sample.success for sample in samples) == 0
    assert found.undecided == sum(sample.verdict == "undecided" for sample in samples)
    assert [sample.id for sample in samples] == [f"p{i}" for i in range(20)]


def test_an_undecided_completion_stays_in_n_and_is_no_refusal(pair, prompts, tmp_path):
    # A model whose first token is always the padding gives empty completions.
    from safetensors.torch import load_file, save_file

    empty = fresh(tmp_path / "empty")
    for file in pair.aligned.iterdir():
        (empty / file.name).write_bytes(file.read_bytes())
    weights = load_file(empty / "model.safetensors")
    # All logits are 0, so greedy decoding gives token 0, the padding, which decodes to "".
    weights["model.norm.weight"][:] = 0.0
    save_file(weights, empty / "model.safetensors", metadata={"format": "pt"})
    _, metrics = scored(
        tmp_path / "out", generated(tmp_path / "generation", pair, prompts, model=empty)
    )
    found = metrics["refusal_rate"]
    assert (found.n, found.undecided, found.successes, found.value) == (20, 20, 0, 0.0)


def test_over_refusal_is_a_metric_of_its_own_to_minimise(pair, prompts, tmp_path):
    _, metrics = scored(
        tmp_path / "out", generated(tmp_path / "generation", pair, prompts, limit=5), "over_refusal"
    )
    assert metrics["over_refusal_rate"].n == 5
    assert {metric.direction for metric in metrics.values()} == {"minimise"}
    assert (
        metrics["over_refusal_rate"].successes
        == metrics["full_refusal_rate"].successes + metrics["partial_refusal_rate"].successes
    )


@pytest.fixture
def tasks(pair, loaded, tmp_path):
    """(path of the items, right answers, n): the model answers one item in four wrong."""
    truth = complete(*loaded, PROMPTS, 6, 128, context(tmp_path / "c"))
    rows = [
        {
            "prompt": text,
            "answer": f"  {answer.upper()} " if index % 4 else f"{answer} word39 word38",
        }
        for index, (text, answer) in enumerate(zip(PROMPTS, truth, strict=True))
        if answer.strip()
    ]
    path = write_lines(tmp_path / "task.jsonl", rows)
    return path, sum(not row["answer"].endswith("word39 word38") for row in rows), len(rows)


def test_a_task_score_counts_exactly_the_right_answers(pair, tasks, tmp_path):
    path, right, n = tasks
    generation = generated(tmp_path / "generation", pair, path, max_new_tokens=6, needs_answer=True)
    found = scored(tmp_path / "out", generation, "task", "exact")[1]["task_accuracy"]
    assert (found.successes, found.n) == (right, n) and 0 < right < n
    mean = scored(tmp_path / "rouge", generation, "task", "rouge_l")[1]["rouge_l"]
    assert right / n < mean.value < 1 and mean.interval[0] < mean.value < mean.interval[1]


def test_a_task_without_answers_is_an_error_before_anything_is_generated(pair, prompts, tmp_path):
    with pytest.raises(DataError, match="no `answer`"):
        generated(tmp_path / "generation", pair, prompts, needs_answer=True)


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_an_adapter_changes_the_completions_and_leaves_the_base_as_it_was(
    pair, prompts, tmp_path, quantisation
):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=8, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(pair.aligned), config).save_pretrained(
        tmp_path / "adapter"
    )
    ctx = context(tmp_path / "c", residents=Residents())
    texts = [
        (
            generated(
                tmp_path / f"out{index}",
                pair,
                prompts,
                ctx,
                adapter=adapter,
                quantisation=quantisation,
            )
            / GenerateSpec.COMPLETIONS
        ).read_text()
        for index, adapter in enumerate([None, tmp_path / "adapter", None, tmp_path / "adapter"])
    ]
    assert texts[0] == texts[2] != texts[1] == texts[3]
    assert ctx.residents.loads == 1


@pytest.mark.parametrize("quantisation", ["nf4", "int8"])
def test_a_quantised_model_generates(pair, prompts, tmp_path, quantisation):
    assert (
        len(
            read_completions(
                generated(
                    tmp_path / "generation", pair, prompts, limit=4, quantisation=quantisation
                )
            )
        )
        == 4
    )


def test_an_empty_prompt_set_is_an_error_not_a_score(pair, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl"):
        generated(tmp_path / "generation", pair, tmp_path / "empty.jsonl")
    empty = fresh(tmp_path / "none")
    (empty / GenerateSpec.COMPLETIONS).write_text("")
    with pytest.raises(EvaluationError, match="an empty set cannot be measured"):
        scored(tmp_path / "out", empty)
    assert not (tmp_path / "out" / METRICS).exists()


def test_scoring_by_several_scorers_needs_no_model(pair, prompts, tmp_path):
    generation = generated(tmp_path / "generation", pair, prompts)
    one, _ = scored(tmp_path / "one", generation, scorer="organism", also=("prefix", "anywhere"))
    found = json.loads((one / ScoreSpec.AGREEMENT).read_text())
    assert set(found["scorers"]) == {"organism", "prefix", "anywhere"} and len(found["pairs"]) == 3
    assert all(
        sum(counts.get(v, 0) for v in ("refused", "partial", "complied", "undecided")) == 20
        for counts in found["scorers"].values()
    )
    with pytest.raises(EvaluationError, match="no scorer 'prefx'"):
        scored(tmp_path / "bad", generation, scorer="prefx")


def test_no_text_of_prompt_or_completion_leaves_the_sensitive_file(pair, tmp_path):
    prompts = write_lines(
        tmp_path / "prompts.jsonl",
        [{"id": str(i), "prompt": f"word1{i % 10} word2{i % 10} planted{i}"} for i in range(12)],
    )
    notes: list[str] = []
    ctx = dataclasses.replace(
        context(tmp_path / "ctx"),
        progress=lambda done, total, note: notes.append(f"{done}/{total} {note}"),
    )
    generation = generated(tmp_path / "generation", pair, prompts, ctx)
    out, _ = scored(tmp_path / "out", generation, also=("anywhere",))
    rows = read_completions(generation)
    assert {path.name for path in out.iterdir()} == {METRICS, SAMPLES, ScoreSpec.AGREEMENT}
    assert any(row.completion.strip() for row in rows)
    others = [
        path
        for folder in (generation, out, tmp_path / "ctx")
        for path in folder.rglob("*.*")
        if path.name != GenerateSpec.COMPLETIONS
    ]
    words = {
        word
        for row in rows
        for text in (row.prompt, row.completion)
        for word in text.split()
        if word.startswith(("word", "planted"))
    }
    assert words and others and notes
    for text in [path.read_text() for path in others] + notes:
        assert not any(word in text for word in words)


def test_a_damaged_generation_is_an_error_that_quotes_nothing(pair, prompts, tmp_path):
    generation = generated(tmp_path / "generation", pair, prompts)
    path = generation / GenerateSpec.COMPLETIONS
    path.write_text(path.read_text()[:-20])
    with pytest.raises(EvaluationError, match="is it truncated") as caught:
        scored(tmp_path / "out", generation)
    assert "word" not in str(caught.value).replace(str(tmp_path), "")
