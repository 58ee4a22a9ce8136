"""MMLU, HellaSwag and other multiple-choice tasks through lm-eval, on the model that is already in memory.

A local set is a folder with one lm-eval task YAML and its splits as SPLIT.jsonl. lm-eval resolves relative data files
against the working directory, so their absolute paths are passed at load time and never stand in the YAML.
"""

import logging
import re
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from tasks.errors import EvaluationError
from tasks.metrics import Metric
from tasks.specs import MultipleChoiceSuite
from tasks.stage import Context
from tasks.suites.generate import Sample

METRICS = ("acc", "acc_norm")


def multiple_choice(
    suite: MultipleChoiceSuite, model: Any, tokenizer: Any, folder: Path, ctx: Context
) -> tuple[list[Sample], list[Metric], list[dict[str, str]]]:
    """acc (and acc_norm where the task has it) over all its items. Raises EvaluationError when the task cannot be loaded."""
    splits = {path.stem: str(path.resolve()) for path in sorted(folder.glob("*.jsonl"))}
    if not splits:
        raise EvaluationError(f"{folder} holds no SPLIT.jsonl; a local lm-eval task is a folder with its YAML and its splits")
    for file in folder.glob("*.yaml"):
        text = file.read_text("utf-8")
        if "!function" in text or not re.search(r"^dataset_path: *json *$", text, re.MULTILINE):
            raise EvaluationError(
                f"{file} must have `dataset_path: json` and no `!function`: ebbline runs no code that comes with data and"
                " downloads nothing that is not pinned. Write what the function makes into the rows"
            )
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    if suite.task not in manager.all_tasks:
        raise EvaluationError(f"{folder} defines the lm-eval tasks {manager.all_tasks}, not {suite.task!r}")
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    was_padded = tokenizer.padding_side
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=ctx.batch_size, backend="causal"),
        # lm-eval reads a bare {"task": NAME} as a whole configuration; inside a group it overrides the one in the YAML.
        tasks=[{"group": "local", "task": [{"task": suite.task, "dataset_kwargs": {"data_files": splits}}]}],
        num_fewshot=suite.shots,
        limit=suite.limit,
        bootstrap_iters=0,
        apply_chat_template=suite.chat_template,
        task_manager=manager,
    )
    tokenizer.padding_side = was_padded
    if found is None:
        raise EvaluationError(f"lm-eval returned nothing for {suite.task}; it runs on rank 0 only")
    rows = found["samples"][suite.task]
    samples = [Sample(str(row["doc_id"]), "", "right" if row["acc"] else "wrong", "arg-max", bool(row["acc"])) for row in rows]
    metrics = [Metric(name, int(sum(row[name] for row in rows)), len(rows)) for name in METRICS if rows and name in rows[0]]
    if not metrics:
        raise EvaluationError(f"lm-eval measured no item of {suite.task}; an empty set is an error, not a score")
    return samples, metrics, []
