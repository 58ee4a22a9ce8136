"""Capability through lm-eval: shared prefixes run once and change no result. Data comes from local
folders and hub snapshots.
"""

import json
import math
import random
import shutil
import socket
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.metrics import aggregate_subtask_metrics
from lm_eval.models import huggingface
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ebbline.tasks.errors import EvaluationError, MissingExtra
from ebbline.tasks.measuring.evaluate import ANSWERS, PROMPTS, run
from ebbline.tasks.measuring.grouped.layers import adapter_on
from ebbline.tasks.measuring.lm_tasks import instructions as checks
from ebbline.tasks.measuring.lm_tasks.prefix_model import PrefixLM
from ebbline.tasks.measuring.lm_tasks.sources import tasks_of
from ebbline.tasks.measuring.metrics import METRICS, read_metrics, read_samples
from ebbline.tasks.measuring.prefix_lm import plan, shared_runs
from ebbline.tasks.models.adapters import with_adapter
from ebbline.tasks.models.loading import Residents, load_model, load_tokenizer
from ebbline.tasks.specs import EvaluateSpec
from tests.tiny import context, fresh, write_lines
from tests.tolerance import UNIT

# Requests.


def words(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(7, 50) for _ in range(count)]


def letters(rng, subjects=3, questions=9):
    """MMLU's shape: a preamble for each subject, questions, and four letters of one token."""
    requests = []
    for _ in range(subjects):
        preamble = [1, *words(rng, 60)]
        for _ in range(questions):
            question = preamble + words(rng, rng.randint(4, 20))
            requests += [(None, question, [47 + letter]) for letter in range(4)]
    return requests


def endings(rng, items=8, longest=90):
    """HellaSwag's shape: every item has its own context, and four endings of different lengths."""
    requests = []
    for _ in range(items):
        start = [1, *words(rng, rng.randint(5, longest))]
        requests += [(None, start, words(rng, rng.randint(1, 12))) for _ in range(4)]
    return requests


def unrelated(rng):
    return [(None, words(rng, rng.randint(1, 30)), words(rng, rng.randint(1, 5))) for _ in range(9)]


def too_long(rng):
    """Requests longer than the model's 256 tokens, and one with a continuation of 256 tokens."""
    start = words(rng, 300)
    requests = [(None, start, words(rng, rng.randint(1, 9))) for _ in range(5)]
    exact = words(rng, 250)
    return [
        *requests,
        *((None, exact, words(rng, length)) for length in (6, 7, 8)),
        (None, words(rng, 1), words(rng, 256)),
    ]


SHAPES = {"letters": letters, "endings": endings, "unrelated": unrelated, "too long": too_long}
SHAPES["all at once"] = lambda rng: [
    request for shape in list(SHAPES.values())[:4] for request in shape(rng)
]


@pytest.fixture(scope="module")
def loaded(pair):
    return load_model(pair.aligned, "none", "float32", "cpu"), load_tokenizer(pair.aligned)


@pytest.fixture(scope="module")
def adapter(pair, tmp_path_factory):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=8, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(pair.aligned), config).save_pretrained(
        folder
    )
    return folder


def answers_of_both(model, tokenizer, requests, batch_size):
    """(lm-eval's answers, ebbline's answers)."""
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16, backend="causal")
    ours = PrefixLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
    assert ours.shares_prefixes
    return theirs._loglikelihood_tokens(requests, disable_tqdm=True), ours._loglikelihood_tokens(
        requests
    )


# A logit is at most about 5 and comes from 15 products of at most 128 terms with independent
# errors: 6 standard deviations for each token. A sum over up to 16 tokens is off by 4 times that.
# The relative tolerance covers longer sums.
ROUNDING = 6 * UNIT * math.sqrt(15 * 128)
CLOSE = {"atol": 4 * 5 * ROUNDING, "rtol": ROUNDING}


def assert_equal(theirs, ours):
    np.testing.assert_allclose(
        [answer[0] for answer in ours], [answer[0] for answer in theirs], **CLOSE
    )
    assert [answer[1] for answer in ours] == [answer[1] for answer in theirs]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_answer_equals_lm_evals_without_sharing(loaded, shape, batch_size):
    requests = SHAPES[shape](random.Random(shape))
    assert_equal(*answers_of_both(*loaded, requests, batch_size))


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_answers_equal_lm_evals_with_an_adapter_and_quantised_weights(pair, adapter, quantisation):
    model, tokenizer = (
        load_model(pair.aligned, quantisation, "float32", "cpu"),
        load_tokenizer(pair.aligned),
    )
    requests = SHAPES["all at once"](random.Random(1))
    without, _ = answers_of_both(model, tokenizer, requests, 16)
    with with_adapter(model, adapter) as adapted:
        theirs, ours = answers_of_both(adapted, tokenizer, requests, 16)
    assert_equal(theirs, ours)
    assert max(abs(a[0] - b[0]) for a, b in zip(without, ours, strict=True)) > 1
    assert_equal(without, answers_of_both(model, tokenizer, requests, 16)[1])
    residents = Residents()
    for _ in range(2):  # put on by PEFT, then by its file alone
        with adapter_on(model, adapter, residents) as adapted:
            assert not hasattr(adapted, "peft_config")
            lm = PrefixLM(pretrained=adapted, tokenizer=tokenizer, batch_size=16, backend="causal")
            assert lm._loglikelihood_tokens(requests) == ours, "to the bit"


def test_is_greedy_is_true_exactly_for_greedy_continuations(loaded):
    model, tokenizer = loaded
    requests, expected = [], []
    for context_ids in ([1, *words(random.Random(seed), 12)] for seed in range(6)):
        generated = model.generate(
            torch.tensor([context_ids]),
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
        )
        greedy = generated[0, len(context_ids) :].tolist()
        for length in range(1, 6):
            requests += [
                (None, context_ids, greedy[:length]),
                (None, context_ids, [*greedy[: length - 1], greedy[length - 1] ^ 1]),
            ]
            expected += [True, False]
    ours = PrefixLM(
        pretrained=model, tokenizer=tokenizer, batch_size=8, backend="causal"
    )._loglikelihood_tokens(requests)
    assert [answer[1] for answer in ours] == expected


def test_one_text_split_at_different_places_is_run_once_and_scored_at_each(loaded):
    model, tokenizer = loaded
    text = [1, *words(random.Random(3), 20)]
    requests = [(None, text[:split], text[split:]) for split in (20, 18, 12, 5)]
    assert [len(group.rows) for group in plan(requests, 256).groups] == [1]
    theirs = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=4, backend="causal", logits_cache=False
    )
    ours = PrefixLM(pretrained=model, tokenizer=tokenizer, batch_size=4, backend="causal")
    assert_equal(
        theirs._loglikelihood_tokens(requests, disable_tqdm=True),
        ours._loglikelihood_tokens(requests),
    )


def test_a_subjects_preamble_and_an_items_context_are_run_once():
    work = plan(letters(random.Random(0), subjects=2, questions=10), 256)
    assert [(len(group.prefix), len(group.rows)) for group in work.groups] == [(61, 10), (61, 10)]
    assert work.full > 3 * work.tokens  # four letters are one row in lm-eval too
    assert [len(group.rows) for group in plan(endings(random.Random(0), items=5), 256).groups] == [
        4
    ] * 5
    assert {len(group.prefix) for group in plan(unrelated(random.Random(0)), 256).groups} == {0}


def test_no_prefix_contains_a_scored_token():
    start = words(random.Random(0), 30)
    work = plan(
        [
            (None, start[:10], start[10:]),
            (None, start[:10], [*start[10:29], 7]),
            (None, start[:4], start[4:20]),
        ],
        256,
    )
    assert work.groups
    for group in work.groups:
        for row in group.rows:
            assert len(row.tokens) >= max(len(continuation) for _, continuation in row.requests)


def test_shared_runs_save_as_many_tokens_as_the_best_choice_by_definition():
    def best(common, start, end):
        """The largest saving by the definition: a run is kept whole or split at its minimum."""
        if end - start < 2:
            return 0
        depth = min(common[start : end - 1])
        cuts = [start, *(i + 1 for i in range(start, end - 1) if common[i] == depth), end]
        return max(depth * (end - start - 1), sum(best(common, a, b) for a, b in pairwise(cuts)))

    rng = random.Random(0)
    for _ in range(300):
        common = [rng.choice([0, 0, 1, 3, 3, 8, 20]) for _ in range(rng.randint(0, 12))]
        runs = shared_runs(common)
        assert all(min(common[start : end - 1]) == length for start, end, length in runs)
        assert all(first[1] <= second[0] for first, second in pairwise(runs))
        assert sum((end - start - 1) * length for start, end, length in runs) == best(
            common, 0, len(common) + 1
        )


def test_a_batch_that_does_not_fit_is_an_error_because_a_smaller_one_rounds_differently(
    loaded, monkeypatch
):
    model, tokenizer = loaded
    requests = SHAPES["all at once"](random.Random(2))
    ours = PrefixLM(pretrained=model, tokenizer=tokenizer, batch_size=32, backend="causal")

    def small(ids, *rest):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(ours, "_forward", small)
    with pytest.raises(EvaluationError, match="set `batch_size: 16`, quantise the model"):
        ours._loglikelihood_tokens(requests)


@pytest.mark.model
def test_a_model_with_a_sliding_window_is_computed_as_lm_eval_does_it():
    from transformers import MistralConfig, MistralForCausalLM

    from tests.tiny import word_tokenizer

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=54,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=8,
        max_position_embeddings=256,
        pad_token_id=0,
    )
    model, requests = MistralForCausalLM(config).eval(), endings(random.Random(0))
    ours = PrefixLM(pretrained=model, tokenizer=word_tokenizer(), batch_size=4, backend="causal")
    theirs = HFLM(pretrained=model, tokenizer=word_tokenizer(), batch_size=4, backend="causal")
    assert not ours.shares_prefixes
    assert ours._loglikelihood_tokens(requests) == theirs._loglikelihood_tokens(
        requests, disable_tqdm=True
    )


# Local folders.

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


def items(count, shift=0):
    return [
        {
            "question": f"word{i} word{i + shift}",
            "choices": ["word30", "word31 word32", "word33", "word34"],
            "label": (i + shift) % 4,
        }
        for i in range(count)
    ]


@pytest.fixture
def choices(tmp_path):
    folder = tmp_path / "choices"
    write_lines(folder / "test.jsonl", items(12, 1))
    write_lines(folder / "dev.jsonl", items(2, 1))
    (folder / "tiny_choice.yaml").write_text(YAML)
    return folder


@pytest.fixture
def subjects(tmp_path):
    """A group of three subjects of different sizes, with a common file. One has no acc_norm."""
    folder = tmp_path / "subjects"
    for index, (name, size) in enumerate({"birds": 5, "fish": 9, "trees": 2}.items()):
        write_lines(folder / f"tiny_{name}" / "test.jsonl", items(size, index))
        write_lines(folder / f"tiny_{name}" / "dev.jsonl", items(3, index + 4))
        (folder / f"{name}.yaml").write_text(f'include: common\n"task": tiny_{name}\n')
    common = YAML.replace("task: tiny_choice\n", "")
    (folder / "common").write_text(common)
    (folder / "trees.yaml").write_text(
        "task: tiny_trees\n" + common.replace("  - metric: acc_norm\n", "")
    )
    (folder / "animals.yaml").write_text("group: tiny_animals\ntask: [tiny_birds, tiny_fish]\n")
    (folder / "all.yaml").write_text(
        "group: tiny_all\ntask:\n  - tiny_animals\n  - task: tiny_trees\n    task_alias: trees\n"
    )
    return folder


def evaluated(folder, pair, prompts, task, ctx=None, quantisation="none", inputs=(), **settings):
    out = fresh(folder)
    spec = EvaluateSpec(task=task, dtype="float32", quantisation=quantisation, **settings)
    run(
        spec,
        {"model": pair.aligned, "prompts": prompts, **dict(inputs)},
        out,
        ctx or context(folder.with_name("ctx")),
    )
    return out, {metric.name: metric for metric in read_metrics(out)}


def likeliest(loaded, question: str, choices: list[str]) -> int:
    """The choice with the highest log-likelihood after the question, by the definition."""
    model, tokenizer = loaded
    scores = []
    for choice in choices:
        context_ids = tokenizer(question)["input_ids"]  # with the start token, as in training
        ids = tokenizer(f"{question} {choice}")["input_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
        scores.append(sum(float(logits[i - 1, ids[i]]) for i in range(len(context_ids), len(ids))))
    return scores.index(max(scores))


def test_a_multiple_choice_answer_is_the_arg_max_of_the_likelihoods(
    pair, loaded, choices, tmp_path
):
    out, metrics = evaluated(tmp_path / "out", pair, choices, "tiny_choice")
    assert set(metrics) == {"acc", "acc_norm"}
    rows = [json.loads(line) for line in (choices / "test.jsonl").read_text().splitlines()]
    expected = [likeliest(loaded, row["question"], row["choices"]) == row["label"] for row in rows]
    samples = read_samples(out)
    assert [sample.success for sample in samples] == expected
    assert (metrics["acc"].successes, metrics["acc"].n) == (sum(expected), 12)
    assert [(sample.id, sample.category) for sample in samples][:2] == [
        ("tiny_choice/0", "tiny_choice"),
        ("tiny_choice/1", "tiny_choice"),
    ]


def test_the_likelihoods_of_every_items_choices_are_stored_without_text(
    pair, loaded, choices, tmp_path
):
    out, metrics = evaluated(tmp_path / "out", pair, choices, "tiny_choice")
    rows = [json.loads(line) for line in (out / ANSWERS).read_text().splitlines()]
    assert [
        int(np.argmax(row["logprobs"])) == i
        for row, i in zip(rows, ((i + 1) % 4 for i in range(12)), strict=True)
    ] == [row["acc"] == 1 for row in rows]
    assert sum(row["acc_norm"] for row in rows) == metrics["acc_norm"].successes
    assert json.loads((out / PROMPTS).read_text()) == {
        "task": "tiny_choice",
        "lm_eval": version("lm_eval"),
        "items": {"tiny_choice": 12},
        "requests": 48,
        "truncated": 0,
        "tokens": json.loads((out / PROMPTS).read_text())["tokens"],
        "chat": {"tokenizer": "model", "unused_beside_adapter": []},
    }
    assert not any("word" in path.read_text() for path in out.iterdir())


def test_a_limit_shots_and_the_chat_template_reach_lm_eval(pair, choices, tmp_path):
    _, metrics = evaluated(
        tmp_path / "out", pair, choices, "tiny_choice", limit=5, shots=2, chat_template=True
    )
    assert metrics["acc"].n == 5
    seen = set()
    for index, settings in enumerate(
        [{}, {"shots": 2}, {"chat_template": True}, {"shots": 2, "chat_template": True}]
    ):
        out, _ = evaluated(tmp_path / f"out{index}", pair, choices, "tiny_choice", **settings)
        seen.add((out / ANSWERS).read_text())
    assert len(seen) == 4


@pytest.mark.parametrize("chat_template", [False, True])
def test_a_group_has_lm_evals_weighted_mean(pair, loaded, subjects, tmp_path, chat_template):
    ticks = []
    ctx = context(
        tmp_path / "c",
        progress=lambda done, total, note: ticks.append((done, total, note)),
    )
    out, metrics = evaluated(
        tmp_path / "out",
        pair,
        subjects,
        "tiny_all",
        ctx,
        shots=2,
        chat_template=chat_template,
        batch_size=4,
    )
    model, tokenizer = loaded
    manager = TaskManager(include_path=str(subjects), include_defaults=False)

    def data(name):
        return {
            "task": name,
            "dataset_kwargs": {
                "data_files": {s: str(subjects / name / f"{s}.jsonl") for s in ("test", "dev")}
            },
        }

    names = ("tiny_birds", "tiny_fish", "tiny_trees")
    theirs = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, backend="causal"),
        tasks=[{"group": "g", "task": [data(name) for name in names]}],
        num_fewshot=2, bootstrap_iters=0, task_manager=manager, apply_chat_template=chat_template,
    )  # fmt: skip
    weighted = aggregate_subtask_metrics(
        [theirs["results"][name]["acc,none"] for name in names], [5, 9, 2]
    )
    assert set(metrics) == {"acc"}  # tiny_trees has no acc_norm
    assert metrics["acc"].n == 16 and metrics["acc"].value == pytest.approx(weighted)
    samples = read_samples(out)
    assert len({sample.id for sample in samples}) == 16
    for subject in names:
        own = [sample.success for sample in samples if sample.category == subject]
        assert sum(own) / len(own) == pytest.approx(theirs["results"][subject]["acc,none"])
    likelihoods = [
        response[0][0]
        for name in names
        for row in theirs["samples"][name]
        for response in row["resps"]
    ]
    ours = [
        value
        for line in (out / ANSWERS).read_text().splitlines()
        for value in json.loads(line)["logprobs"]
    ]
    np.testing.assert_allclose(ours, likelihoods, **CLOSE)
    assert ticks[-1] == (16, 16, "items") and len(ticks) > 2 and ticks == sorted(ticks)
    assert json.loads((out / PROMPTS).read_text())["items"] == {
        "tiny_birds": 5,
        "tiny_fish": 9,
        "tiny_trees": 2,
    }


def test_a_task_may_name_one_subject_or_a_subgroup(pair, subjects, tmp_path):
    assert evaluated(tmp_path / "a", pair, subjects, "tiny_fish")[1]["acc_norm"].n == 9
    assert evaluated(tmp_path / "b", pair, subjects, "tiny_animals")[1]["acc_norm"].n == 14


def test_requests_are_built_once_for_all_adapters_and_each_has_its_own_answers(
    pair, adapter, subjects, tmp_path, monkeypatch
):
    import ebbline.tasks.measuring.evaluate as module

    plans = []
    monkeypatch.setattr(
        module, "plan", lambda *arguments: plans.append(arguments) or plan(*arguments)
    )
    ctx, answers = context(tmp_path / "c", residents=Residents()), []
    for index, inputs in enumerate([{}, {"adapter": adapter}, {}, {"adapter": adapter}]):
        out, _ = evaluated(
            tmp_path / f"out{index}", pair, subjects, "tiny_all", ctx, inputs=inputs, shots=1
        )
        answers.append(
            [json.loads(line)["logprobs"] for line in (out / ANSWERS).read_text().splitlines()]
        )
    np.testing.assert_allclose(answers[2:], answers[:2], **CLOSE)
    assert np.abs(np.subtract(answers[0], answers[1])).max() > 1
    assert len(plans) == 1 and ctx.residents.loads == 1
    write_lines(subjects / "tiny_fish" / "test.jsonl", items(4))
    assert evaluated(tmp_path / "after", pair, subjects, "tiny_all", ctx, shots=1)[1]["acc"].n == 11
    assert len(plans) == 2


def test_a_model_that_cannot_share_prefixes_has_the_same_answers(
    pair, choices, tmp_path, monkeypatch
):
    likelihoods = []
    for index, shares in enumerate([True, False]):
        monkeypatch.setattr(PrefixLM, "shares_prefixes", shares)
        out, metrics = evaluated(tmp_path / f"out{index}", pair, choices, "tiny_choice", shots=2)
        assert metrics["acc"].n == 12
        likelihoods.append(
            [json.loads(line)["logprobs"] for line in (out / ANSWERS).read_text().splitlines()]
        )
    np.testing.assert_allclose(*likelihoods, **CLOSE)
    assert json.loads((out / PROMPTS).read_text())["tokens"] is None


@pytest.mark.parametrize("quantisation", ["nf4", "int8"])
def test_a_quantised_model_is_evaluated(pair, choices, tmp_path, quantisation):
    assert (
        evaluated(tmp_path / "out", pair, choices, "tiny_choice", quantisation=quantisation)[1][
            "acc"
        ].n
        == 12
    )


def test_an_evaluation_leaves_the_resident_tokenizer_unchanged(pair, choices, tmp_path):
    residents = Residents()
    tokenizer = residents.model(pair.aligned, "none", "float32", "cpu")[1]
    before = tokenizer(["word1", "word2 word3"], padding=True)["input_ids"]
    evaluated(
        tmp_path / "out", pair, choices, "tiny_choice", context(tmp_path / "c", residents=residents)
    )
    assert residents.model(pair.aligned, "none", "float32", "cpu")[1] is tokenizer
    assert (
        tokenizer.padding_side == "left"
        and tokenizer(["word1", "word2 word3"], padding=True)["input_ids"] == before
    )


def test_a_task_that_the_folder_lacks_is_an_error_that_names_its_tasks(pair, choices, tmp_path):
    with pytest.raises(EvaluationError, match="tiny_choice.*not 'tiny_chioce'"):
        evaluated(tmp_path / "out", pair, choices, "tiny_chioce")


def test_an_empty_multiple_choice_set_is_an_error_not_a_score(pair, choices, tmp_path):
    (choices / "test.jsonl").write_text("")
    with pytest.raises(EvaluationError, match="tiny_choice cannot be built"):
        evaluated(tmp_path / "out", pair, choices, "tiny_choice")
    assert not (tmp_path / "out" / METRICS).exists()
    for file in choices.glob("*.jsonl"):
        file.unlink()
    with pytest.raises(EvaluationError, match=r"holds no SPLIT\.jsonl"):
        evaluated(tmp_path / "out2", pair, choices, "tiny_choice")


def test_a_subject_without_its_own_folder_is_an_error(pair, subjects, tmp_path):
    (subjects / "tiny_fish").rename(tmp_path / "elsewhere")
    write_lines(subjects / "test.jsonl", items(3))
    with pytest.raises(EvaluationError, match=r"tiny_fish holds no SPLIT\.jsonl"):
        evaluated(tmp_path / "out", pair, subjects, "tiny_all")


def test_more_shots_than_examples_is_an_error(pair, choices, tmp_path):
    with pytest.raises(EvaluationError, match="with 5 shots"):
        evaluated(tmp_path / "out", pair, choices, "tiny_choice", shots=5)
    (choices / "tiny_choice.yaml").write_text(YAML + "num_fewshot: 0\n")
    with pytest.raises(EvaluationError, match="defined without shots; set `shots` to 0, not 1"):
        evaluated(tmp_path / "out2", pair, choices, "tiny_choice", shots=1)


@pytest.mark.parametrize(
    "line", ["process_docs: !function evil.process", "custom_dataset: evil", "class: evil"]
)
def test_code_that_comes_with_the_data_is_never_run(pair, choices, subjects, tmp_path, line):
    (choices / "evil.py").write_text("raise SystemExit('it ran')")
    (choices / "tiny_choice.yaml").write_text(YAML + line + "\n")
    with pytest.raises(EvaluationError, match="runs no code that comes with data"):
        evaluated(tmp_path / "out", pair, choices, "tiny_choice")
    (subjects / "common").write_text((subjects / "common").read_text() + line + "\n")
    with pytest.raises(EvaluationError, match="runs no code that comes with data"):
        evaluated(tmp_path / "out2", pair, subjects, "tiny_fish")


def test_a_local_task_reads_and_includes_only_files_of_its_folder(pair, choices, tmp_path):
    (choices / "tiny_choice.yaml").write_text(
        YAML.replace("dataset_path: json", "dataset_path: cais/mmlu")
    )
    with pytest.raises(EvaluationError, match="must have `dataset_path: json`"):
        evaluated(tmp_path / "out", pair, choices, "tiny_choice")
    (tmp_path / "outside.yaml").write_text("doc_to_target: 0\n")
    (choices / "tiny_choice.yaml").write_text(YAML + "include: ../outside.yaml\n")
    with pytest.raises(EvaluationError, match=r"includes \.\./outside\.yaml, which is not in"):
        evaluated(tmp_path / "out2", pair, choices, "tiny_choice")
    (choices / "tiny_choice.yaml").write_text(YAML + "metric: [\n")
    with pytest.raises(EvaluationError, match="not a YAML mapping"):
        evaluated(tmp_path / "out3", pair, choices, "tiny_choice")


# Hub snapshots with the layout of cais/mmlu and Rowan/hellaswag, in the cache's form (links to
# blobs), with invented items.


@pytest.fixture
def no_network(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(socket.socket, "connect", fail)


def snapshot(folder: Path, name: str, configs: dict[str, dict[str, list[dict]]], at: str) -> Path:
    """A data set repository in the form of the hub client's cache. `at` is the pattern of a file's
    path, with {config} and {split}.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = folder / f"datasets--{name.replace('/', '--')}"
    here = root / "snapshots" / ("c" * 40)
    (root / "blobs").mkdir(parents=True)
    card = ["---", "configs:"]
    for config, splits in configs.items():
        card += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            path = here / at.format(config=config, split=split)
            card += [
                f"  - split: {split}",
                "    path: "
                f"{path.relative_to(here).as_posix().replace('-00000-of-00001.parquet', '-*')}",
            ]
            path.parent.mkdir(parents=True, exist_ok=True)
            blob = root / "blobs" / f"{config}-{split}"
            pq.write_table(pa.Table.from_pylist(rows), blob)
            path.symlink_to(blob)
    (here / "README.md").write_text("\n".join([*card, "---", ""]))
    return here


def questions(rng, count):
    return [
        {
            "question": " ".join(f"word{w % 40}" for w in words(rng, 6)),
            "subject": "s",
            "choices": ["word1", "word2", "word3", "word4"],
            "answer": i % 4,
        }
        for i in range(count)
    ]


@pytest.fixture
def mmlu(tmp_path):
    """All 57 subjects, with 1 to 3 questions each."""
    rng = random.Random(0)
    names = [
        entry.cfg["dataset_name"]
        for name, entry in TaskManager(
            include_path=str(_lm_evals("mmlu/default")), include_defaults=False
        ).task_index.items()
        if entry.cfg and "dataset_name" in entry.cfg
    ]
    configs = {
        name: {
            "test": questions(rng, 1 + i % 3),
            "validation": questions(rng, 1),
            "dev": questions(rng, 5),
        }
        for i, name in enumerate(sorted(names))
    }
    return snapshot(
        tmp_path / "hub", "cais/mmlu", configs, "{config}/{split}-00000-of-00001.parquet"
    )


def _lm_evals(folder: str) -> Path:
    import lm_eval

    return Path(lm_eval.__file__).parent / "tasks" / folder


@pytest.fixture
def hellaswag(tmp_path):
    rng = random.Random(0)

    def text(count):
        return " ".join(f"word{w % 40}" for w in words(rng, count))

    def rows(count):
        return [
            {
                "ind": i,
                "activity_label": text(2),
                "ctx_a": text(6),
                "ctx_b": text(2),
                "ctx": "",
                "source_id": "",
                "split": "",
                "split_type": "",
                "endings": [f"{text(rng.randint(1, 6))} [title]" for _ in range(4)],
                "label": str(i % 4),
            }
            for i in range(count)
        ]

    splits = {"default": {"train": rows(12), "validation": rows(10), "test": rows(3)}}
    return snapshot(
        tmp_path / "hub", "Rowan/hellaswag", splits, "data/{split}-00000-of-00001.parquet"
    )


def test_lm_evals_mmlu_reads_a_hub_snapshot_without_the_network(pair, mmlu, tmp_path, no_network):
    out, metrics = evaluated(tmp_path / "out", pair, mmlu, "mmlu", shots=5)
    described = json.loads((out / PROMPTS).read_text())
    assert len(described["items"]) == 57 and set(metrics) == {"acc"}
    assert metrics["acc"].n == sum(described["items"].values()) == 57 * 2
    assert {sample.category for sample in read_samples(out)} == set(described["items"])
    assert described["tokens"]["run"] < described["tokens"]["without_sharing"]
    _, stem = evaluated(tmp_path / "stem", pair, mmlu, "mmlu_stem", shots=5, limit=1)
    assert stem["acc"].n == 19
    assert (
        evaluated(tmp_path / "anatomy", pair, mmlu, "mmlu_anatomy")[1]["acc"].n
        == described["items"]["mmlu_anatomy"]
    )


def test_hellaswag_on_a_hub_snapshot_gives_lm_evals_numbers(
    pair, loaded, hellaswag, tmp_path, no_network
):
    _, metrics = evaluated(tmp_path / "out", pair, hellaswag, "hellaswag", shots=10)
    model, tokenizer = loaded
    theirs = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, backend="causal"),
        tasks=[{"group": "g", "task": [{"task": "hellaswag", "dataset_path": str(hellaswag)}]}],
        num_fewshot=10,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(_lm_evals("hellaswag")), include_defaults=False),
    )
    assert metrics["acc"].n == 10
    for name in ("acc", "acc_norm"):
        assert metrics[name].value == theirs["results"]["hellaswag"][f"{name},none"]


@pytest.fixture
def roomy(pair, tmp_path):
    """The aligned model with room for a prompt and the 256 tokens of an answer."""
    folder = tmp_path / "roomy"
    shutil.copytree(pair.aligned, folder)
    for name, field in (
        ("config.json", "max_position_embeddings"),
        ("tokenizer_config.json", "model_max_length"),
    ):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, field: 1024}))
    return folder


def sums(folder, answers):
    rows = [
        {"question": f"word{i} word{i + 1}", "answer": f"word1 #### {answer}"}
        for i, answer in enumerate(answers)
    ]
    splits = {"main": {"train": rows, "test": rows}}
    return snapshot(folder, "openai/gsm8k", splits, "{config}/{split}-00000-of-00001.parquet")


def test_gsm8k_is_written_by_the_model_and_scored_by_lm_eval(roomy, tmp_path, no_network):
    """Only here lm-eval scores what a model wrote, with its filters."""
    data = sums(tmp_path / "hub", ["1"] * 6)  # the last number of some answers, by chance
    out = fresh(tmp_path / "out")
    spec = EvaluateSpec(task="gsm8k", dtype="float32", batch_size=4)
    run(spec, {"model": roomy, "prompts": data}, out, context(tmp_path / "ctx"))
    metrics = {metric.name: metric for metric in read_metrics(out)}
    assert set(metrics) == {"exact_match", "exact_match_flexible"}
    model, tokenizer = load_model(roomy, "none", "float32", "cpu"), load_tokenizer(roomy)
    theirs = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, backend="causal"),
        tasks=[{"group": "g", "task": [{"task": "gsm8k", "dataset_path": str(data)}]}],
        num_fewshot=0,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(_lm_evals("gsm8k")), include_defaults=False),
    )["results"]["gsm8k"]
    assert metrics["exact_match"].value == theirs["exact_match,strict-match"]
    flexible = theirs["exact_match,flexible-extract"]
    assert metrics["exact_match_flexible"].value == flexible and 0 < flexible < 1
    assert not any("word" in path.read_text() for path in out.iterdir()), "no text is stored"


@pytest.fixture
def short_answers(monkeypatch):
    """Answers of 48 tokens on both sides, where IFEval has 1,280: a random model ends none."""
    given = huggingface.normalize_gen_kwargs
    monkeypatch.setattr(
        huggingface,
        "normalize_gen_kwargs",
        lambda *args, **settings: {**given(*args, **settings), "max_gen_toks": 48},
    )


@pytest.fixture
def sentences(tmp_path, monkeypatch):
    """NLTK's data on English sentences, with no abbreviation known, in place of the real data."""
    import nltk

    folder = tmp_path / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    for name in ("abbrev_types.txt", "sent_starters.txt", "collocations.tab", "ortho_context.tab"):
        (folder / name).write_text("")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk_data")])


def instructions(folder):
    """Invented rows as google/IFEval has them: one, two and three instructions a prompt."""
    asked = [
        [("punctuation:no_comma", {})],
        [
            ("length_constraints:number_words", {"relation": "at least", "num_words": 3}),
            ("length_constraints:number_sentences", {"relation": "less than", "num_sentences": 9}),
        ],
        [
            ("change_case:english_lowercase", {}),
            ("keywords:forbidden_words", {"forbidden_words": ["zorp"]}),
            ("startend:quotation", {}),
        ],
    ]
    rows = [
        {
            "key": number,
            "prompt": f"word{number} word{number + 1}",
            "instruction_id_list": [name for name, _ in each],
            "kwargs": [given for _, given in each],
        }
        for number, each in enumerate(asked * 2)
    ]
    folder.mkdir()
    write_lines(folder / "train.jsonl", rows)
    return folder


def test_ifeval_is_written_by_the_model_and_checked_by_lm_eval(
    roomy, sentences, short_answers, tmp_path, no_network
):
    """Only here lm-eval checks whether a model followed instructions."""
    data = instructions(tmp_path / "data")
    out = fresh(tmp_path / "out")
    spec = EvaluateSpec(task="ifeval", dtype="float32", batch_size=8)
    run(spec, {"model": roomy, "prompts": data}, out, context(tmp_path / "ctx"))
    metrics = {metric.name: metric for metric in read_metrics(out)}
    model, tokenizer = load_model(roomy, "none", "float32", "cpu"), load_tokenizer(roomy)
    theirs = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, backend="causal"),
        tasks=[{"group": "g", "task": [{"task": "ifeval", "dataset_path": str(data)}]}],
        num_fewshot=0,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(_lm_evals("ifeval")), include_defaults=False),
    )["results"]["ifeval"]
    assert set(metrics) == {
        f"{level}_level_{how}_acc" for level in ("prompt", "inst") for how in ("strict", "loose")
    }
    for name, metric in metrics.items():
        assert metric.direction == "maximise" and metric.n == 6
        assert metric.value == pytest.approx(theirs[f"{name},none"])
    assert 0 < metrics["inst_level_strict_acc"].value < 1
    assert not any("word" in path.read_text() for path in out.iterdir()), "no text is stored"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "given", "message"),
    [
        (["length_constraints:number_words"], [{"relation": "at least"}], r"needs .*num_words"),
        (
            ["keywords:letter_frequency"],
            [{"letter": "t", "let_relation": "less than", "let_frequency": 0}],
            "none of them 0",
        ),
        (["punctuation:no_comma"], [{"num_words": 3}], r"has \['num_words'\]"),
        (["punctuation:no_commas"], [{}], "which is none"),
        (["punctuation:no_comma"], [], "1 instructions and arguments for 0"),
    ],
)
def test_an_instruction_that_lm_eval_would_check_at_random_is_an_error(
    sentences, asked, given, message
):
    row = {"key": 7, "prompt": "", "instruction_id_list": asked, "kwargs": given}
    with pytest.raises(EvaluationError, match=rf"row 7 of lm-eval's ifeval.*{message}"):
        checks.require_arguments("ifeval", [row])


@pytest.mark.slow
def test_ifeval_without_its_packages_or_data_is_an_error(tmp_path, monkeypatch, no_network):
    import nltk

    data = instructions(tmp_path / "data")
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(checks, "CARRIED", ("no_such_package", ""))
    with pytest.raises(
        MissingExtra, match="need NLTK's data punkt_tab.* --no-deps llama-index-core"
    ):
        tasks_of("ifeval", data)
    monkeypatch.setattr(checks, "PACKAGES", ("nltk", "no_such_package"))
    with pytest.raises(MissingExtra, match=r"no_such_package missing.*ebbline\[ifeval\]"):
        tasks_of("ifeval", data)


def test_a_task_that_has_a_model_write_many_answers_is_an_error(roomy, tmp_path, no_network):
    data = sums(tmp_path / "hub", ["1"])
    with pytest.raises(EvaluationError, match="in another way than by exact_match"):
        tasks_of("gsm8k_cot_self_consistency", data)


def test_a_snapshot_of_another_data_set_is_an_error(pair, hellaswag, tmp_path, no_network):
    with pytest.raises(EvaluationError, match="mmlu_anatomy cannot be built from .*with 5 shots"):
        evaluated(tmp_path / "out", pair, hellaswag, "mmlu_anatomy", shots=5)
    with pytest.raises(EvaluationError, match="has none called 'no_such_task'"):
        evaluated(tmp_path / "out2", pair, hellaswag, "no_such_task")
    with pytest.raises(EvaluationError, match="loads or judges its data with code"):
        evaluated(tmp_path / "out3", pair, hellaswag, "arithmetic_2da")
    with pytest.raises(EvaluationError, match="several data sets"):
        evaluated(tmp_path / "out4", pair, hellaswag, "openllm")
    assert not (tmp_path / "out" / METRICS).exists()


def test_an_evaluation_prints_nothing(pair, choices, tmp_path, capfd):
    ctx = context(tmp_path / "c", residents=Residents())
    ctx.residents.model(pair.aligned, "none", "float32", "cpu")
    capfd.readouterr()
    evaluated(tmp_path / "out", pair, choices, "tiny_choice", ctx, shots=1)
    assert capfd.readouterr() == ("", "")
