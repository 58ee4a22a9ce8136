"""One suite on one model: completions, a score for each sample, metrics over the samples.

Output: metrics.json, samples.jsonl (ids, verdicts and reasons, no text) and, for suites that generate,
completions.sensitive.jsonl, which never leaves the store unless a person asks for it by name.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tasks.metrics import Metric, write_metrics
from tasks.models import with_adapter
from tasks.specs import EvaluateSpec, MultipleChoiceSuite, OverRefusalSuite, RefusalSuite, TaskSuite
from tasks.stage import Context

SAMPLES = "samples.jsonl"
COMPLETIONS = "completions.sensitive.jsonl"


def run(spec: EvaluateSpec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> None:
    resident, tokenizer = ctx.residents.model(inputs["model"], spec.quantisation, spec.dtype, ctx.device)
    resident.eval()
    with with_adapter(resident, inputs.get("adapter")) as model:
        samples, metrics, completions = _measure(spec, model, tokenizer, inputs["prompts"], ctx)
    _write_lines(out / SAMPLES, (asdict(sample) for sample in samples))
    if completions:
        _write_lines(out / COMPLETIONS, completions)
    write_metrics(out, metrics)


def _measure(
    spec: EvaluateSpec, model: Any, tokenizer: Any, prompts: Path, ctx: Context
) -> tuple[list[Any], list[Metric], list[dict[str, str]]]:
    match spec.suite:
        case RefusalSuite() | OverRefusalSuite():
            from tasks.suites.generate import refusal  # a worker loads only the family of suites it runs

            return refusal(spec.suite, model, tokenizer, prompts, spec.max_tokens, ctx)
        case TaskSuite():
            from tasks.suites.generate import task

            return task(spec.suite, model, tokenizer, prompts, spec.max_tokens, ctx)
        case MultipleChoiceSuite():
            from tasks.suites.multiple_choice import multiple_choice

            return multiple_choice(spec.suite, model, tokenizer, prompts, ctx)


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
