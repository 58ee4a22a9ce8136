"""Suites that generate: refusal, over-refusal and the downstream task. One greedy completion a prompt, then a score each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from tasks.data import read_rows
from tasks.errors import DataError
from tasks.metrics import Metric
from tasks.scorers import score, scorer
from tasks.specs import OverRefusalSuite, RefusalSuite, TaskSuite
from tasks.stage import Context

PROMPT_COLUMNS = ("prompt", "goal", "Goal", "Behavior", "forbidden_prompt")


@dataclass(frozen=True)
class Prompt:
    id: str
    text: str
    category: str = ""
    answer: str = ""


@dataclass(frozen=True)
class Sample:
    """One scored prompt: what leaves the model's side of the house. It holds no text of prompt or completion."""

    id: str
    category: str
    verdict: str
    reason: str
    success: bool


def read_prompts(path: Path, limit: int | None, needs_answer: bool = False) -> list[Prompt]:
    """Prompts from a JSONL, JSON or CSV file; raises DataError when it has none, or a row lacks what the suite needs."""
    prompts = []
    for line, row in read_rows(path):
        column = next((name for name in PROMPT_COLUMNS if str(row.get(name) or "").strip()), None)
        if column is None:
            raise DataError(f"{path}:{line} has no prompt; a row needs one of the columns {list(PROMPT_COLUMNS)}")
        answer = str(row.get("answer") or "")
        if needs_answer and not answer.strip():
            raise DataError(f"{path}:{line} has no `answer`, which a task suite compares with")
        prompts.append(Prompt(str(row.get("id", line)), str(row[column]), str(row.get("category") or ""), answer))
    if not prompts:
        raise DataError(f"{path} holds no prompt: an empty set cannot be measured")
    # Evenly spaced, as many files are sorted by category.
    return prompts if limit is None or limit >= len(prompts) else [prompts[i * len(prompts) // limit] for i in range(limit)]


def complete(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, max_tokens: int, ctx: Context) -> list[str]:
    """Greedy completions, in the order of `prompts`; batches of similar length, KV-cached, stopped at the end token."""
    encoded = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False)
        for text in prompts
    ]
    for text_ids in encoded:
        if len(text_ids) + max_new_tokens > max_tokens:
            raise DataError(f"a prompt of {len(text_ids)} tokens and {max_new_tokens} new ones exceed max_tokens={max_tokens}; raise it")
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), i))
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=_end_tokens(model, tokenizer),
        use_cache=True,
    )
    completions = [""] * len(encoded)
    for start in range(0, len(order), ctx.batch_size):
        chosen = order[start : start + ctx.batch_size]
        batch = tokenizer.pad({"input_ids": [encoded[i] for i in chosen]}, padding=True, return_tensors="pt").to(ctx.device)
        with torch.inference_mode():
            generated = model.generate(**batch, generation_config=settings)
        for index, tokens in zip(chosen, generated[:, batch["input_ids"].shape[1] :], strict=True):
            completions[index] = tokenizer.decode(tokens, skip_special_tokens=True)
        ctx.progress(min(start + ctx.batch_size, len(order)), len(order), "completions")
    return completions


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    declared = model.generation_config.eos_token_id
    tokens = {tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])}
    return sorted(token for token in tokens if token is not None)


def refusal(
    suite: RefusalSuite | OverRefusalSuite, model: Any, tokenizer: Any, prompts: Path, max_tokens: int, ctx: Context
) -> tuple[list[Sample], list[Metric], list[dict[str, str]]]:
    """Share refused. An undecided completion counts in n and not as refused, and is counted apart."""
    phrases = scorer(suite.scorer)
    rows = read_prompts(prompts, suite.limit)
    completions = complete(model, tokenizer, [row.text for row in rows], suite.max_new_tokens, max_tokens, ctx)
    samples = []
    for row, completion in zip(rows, completions, strict=True):
        found = score(completion, phrases)
        samples.append(Sample(row.id, row.category, found.verdict, found.reason, found.verdict == "refused"))
    name = "refusal_rate" if isinstance(suite, RefusalSuite) else "over_refusal_rate"
    undecided = sum(sample.verdict == "undecided" for sample in samples)
    metric = Metric(name, sum(sample.success for sample in samples), len(samples), undecided)
    return samples, [metric], list(_completions(rows, completions))


def task(
    suite: TaskSuite, model: Any, tokenizer: Any, prompts: Path, max_tokens: int, ctx: Context
) -> tuple[list[Sample], list[Metric], list[dict[str, str]]]:
    """Share of answers equal to the reference, letter case and white space aside."""
    rows = read_prompts(prompts, suite.limit, needs_answer=True)
    completions = complete(model, tokenizer, [row.text for row in rows], suite.max_new_tokens, max_tokens, ctx)
    samples = []
    for row, completion in zip(rows, completions, strict=True):
        right = _normal(completion) == _normal(row.answer)
        samples.append(Sample(row.id, row.category, "right" if right else "wrong", "exact match", right))
    return samples, [Metric("task_accuracy", sum(s.success for s in samples), len(samples))], list(_completions(rows, completions))


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


def _completions(rows: Sequence[Prompt], completions: Sequence[str]) -> Iterator[dict[str, str]]:
    for row, completion in zip(rows, completions, strict=True):
        yield {"id": row.id, "prompt": row.text, "completion": completion}
