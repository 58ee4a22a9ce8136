"""The stage `evaluate`: MMLU, HellaSwag and any other lm-eval task or group, on the resident model.

The data is a local folder or the snapshot of a hub data set. A local folder holds lm-eval YAML
files (ebbline.tasks.measuring.lm_tasks) and the splits as JSON lines. A snapshot is read by
lm-eval's own task of the given name, and its YAML is ignored.

Invariant: this stage downloads nothing and runs no code that comes with data.

lm-eval builds the requests and scores the answers; ebbline.tasks.measuring.prefix_lm computes the
log-likelihoods, or a server does (ebbline.tasks.measuring.lm_tasks.served_model). Tasks, requests
and tokens do not depend on the adapter, so they are built once for a base model. See
docs/capability.md.
"""

import contextlib
import io
import json
import logging
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from datasets.exceptions import DatasetsError  # type: ignore[import-untyped]
from jinja2 import TemplateError
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

from ebbline.tasks.data.batches import even_threads, rows_meet, whole_batches
from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.measuring.generate import (
    adapter_record,
    tokenizer_beside,
    tokenizer_record,
)
from ebbline.tasks.measuring.grouped.layers import adapter_on
from ebbline.tasks.measuring.lm_tasks.definitions import (
    FLEXIBLE,
    FLEXIBLE_FILTER,
    LISTS,
    METRICS,
    WRITTEN,
    use_sandbox,
)
from ebbline.tasks.measuring.lm_tasks.instructions import require_arguments
from ebbline.tasks.measuring.lm_tasks.prefix_model import PrefixLM
from ebbline.tasks.measuring.lm_tasks.rows_cache import fingerprint, rows_cached
from ebbline.tasks.measuring.lm_tasks.sources import tasks_of
from ebbline.tasks.measuring.metrics import Metric, Sample, write_metrics, write_samples
from ebbline.tasks.measuring.prefix_lm import Plan, plan
from ebbline.tasks.specs import TRANSFORMERS, EvaluateSpec
from ebbline.tasks.stage import Context

ANSWERS = "answers.jsonl"
PROMPTS = "prompts.json"
# What datasets, lm-eval and its templates raise for data that does not fit a task.
UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AssertionError,
    RuntimeError,
    AttributeError,
    ArithmeticError,
    SyntaxError,
    StopIteration,  # of an empty split
    re.error,
    DatasetsError,
    TemplateError,
)


@dataclass(frozen=True)
class Prepared:
    """The data that all adapters of a base model share.

    `tasks` maps names to lm-eval's Task objects, `items` to their numbers of items. `instances` are
    lm-eval's requests, in the order of the tasks. `plan` covers the log-likelihood requests; it is
    None for a model that cannot share prefixes.
    """

    tasks: Mapping[str, Any]
    instances: Sequence[Any]
    plan: Plan | None
    items: Mapping[str, int]


def run(spec: EvaluateSpec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> None:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings quote items
    measured = _loaded if spec.backend == TRANSFORMERS else _served
    folder = inputs["prompts"]
    with measured(spec, inputs, ctx) as lm:
        asked = (spec.task, spec.shots, spec.chat_template, spec.limit)
        key = ("lm-eval", *asked, lm.tokenizer, fingerprint(folder))
        prepared = ctx.residents.remembered(key, lambda: prepare(spec, folder, lm))
        answer(prepared, lm, ctx)
        tokenizer = lm.tokenizer
    rows = item_rows(prepared)
    with (out / ANSWERS).open("w") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in rows)
    record = tasks_record(spec, prepared) | adapter_record(inputs)
    record["chat"] = tokenizer_record(spec, inputs, tokenizer)
    (out / PROMPTS).write_text(json.dumps(record, indent=1))
    known = (*METRICS, *WRITTEN, FLEXIBLE)
    names = [name for name in known if all(name in row for row in rows)]
    if not names:
        raise EvaluationError(
            f"lm-eval's {spec.task} has neither acc nor acc_norm for all its items; of other "
            f"metrics of lm-eval, ebbline supports {', '.join(WRITTEN)}"
        )
    how = "arg-max" if names[0] in METRICS else names[0]
    right = [row[names[0]] > 0.5 for row in rows]
    write_samples(
        out,
        [
            Sample(row["id"], row["task"], "right" if ok else "wrong", how, ok)
            for row, ok in zip(rows, right, strict=True)
        ],
    )
    metrics = [Metric.of(name, [row[name] for row in rows]) for name in names]
    metrics += [
        Metric.clustered(name, [row[name] for row in rows])
        for name in LISTS
        if all(name in row for row in rows)
    ]
    write_metrics(out, metrics)


@contextlib.contextmanager
def _loaded(spec: EvaluateSpec, inputs: Mapping[str, Path], ctx: Context) -> Iterator[PrefixLM]:
    """The model in this process, with the adapter on it."""
    resident, tokenizer = ctx.residents.model(
        inputs["model"],
        spec.quantisation,
        spec.dtype,
        ctx.device,
        spec.chat,
        checked=spec.chat_template,
        adapter=tokenizer_beside(spec, inputs),
    )
    resident.eval()
    with adapter_on(resident, inputs.get("adapter"), ctx.residents) as model:
        yield PrefixLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=1 if rows_meet(model) else spec.batch_size,
            backend="causal",
            softmax_dtype="float32",
        )


@contextlib.contextmanager
def _served(spec: EvaluateSpec, inputs: Mapping[str, Path], ctx: Context) -> Iterator[PrefixLM]:
    """The model at the server of the Spec's backend."""
    tokenizer = ctx.residents.tokenizer(
        inputs["model"],
        spec.chat,
        checked=spec.chat_template,
        adapter=tokenizer_beside(spec, inputs),
    )
    from ebbline.tasks.measuring.lm_tasks.served_model import ServedLM  # imports an HTTP client

    yield ServedLM(spec, inputs["model"], inputs.get("adapter"), tokenizer, ctx)


def prepare(spec: EvaluateSpec, folder: Path, lm: PrefixLM) -> Prepared:
    """Build the tasks, their requests and the tokens.

    Raises EvaluationError for a task or a data set that cannot be used.
    """
    # Some tasks shuffle while they load. These are the seeds of lm-eval's own command.
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    use_sandbox()
    with rows_cached(folder):
        tasks = {
            name: _task(name, build, spec, folder, lm)
            for name, build in tasks_of(spec.task, folder)
        }
    instances = [
        instance
        for task in tasks.values()
        for instance in task.instances
        for _ in range(instance.repeats or 1)
    ]
    pairs = [instance.args for instance in instances if instance.request_type == "loglikelihood"]
    prefix_plan = (
        plan([lm.encode(*pair) for pair in pairs], lm.max_length) if lm.shares_prefixes else None
    )
    return Prepared(
        tasks,
        instances,
        prefix_plan,
        {name: len({request.doc_id for request in task.instances}) for name, task in tasks.items()},
    )


def _task(
    name: str,
    build: Callable[[], Any],
    spec: EvaluateSpec,
    folder: Path,
    lm: PrefixLM,
) -> Any:
    """One lm-eval task with its requests built."""
    try:
        # lm-eval has no option to turn off these progress bars.
        with contextlib.redirect_stderr(io.StringIO()):
            task = build()
            if task.get_config("num_fewshot") == 0 and spec.shots:
                raise EvaluationError(
                    f"lm-eval's {name} is defined without shots; set `shots` to 0, not {spec.shots}"
                )
            require_questions(name, task)
            task.set_config("num_fewshot", spec.shots)
            task.set_fewshot_seed(DEFAULT_OTHER_SEED)
            task.build_all_requests(
                limit=spec.limit,
                apply_chat_template=spec.chat_template,
                fewshot_as_multiturn=True,
                chat_template=lm.apply_chat_template if spec.chat_template else None,
                tokenizer_name=lm.tokenizer_name,
            )
    except UNREADABLE as error:
        reason = (str(error).splitlines() or [""])[0][:300]
        raise EvaluationError(
            f"lm-eval's {name} cannot be built from {folder} with {spec.shots} shots: "
            f"{type(error).__name__}: {reason}"
        ) from error
    _require_labels(name, task)
    if set(LISTS) & set(task.aggregation()):
        require_arguments(name, [request.doc for request in task.instances])
    return task


def require_questions(name: str, task: Any) -> None:
    """Let the task raise EvaluationError for a question that lm-eval would take for the number of a
    choice: one of digits alone. Where a task means such numbers, each must be one.
    """
    given = task.doc_to_text

    def question(doc: Any, *rest: Any) -> Any:
        text = given(doc, *rest)
        if task.OUTPUT_TYPE != "multiple_choice" or not hasattr(task, "multiple_input"):
            return text
        if isinstance(text, int) != bool(task.multiple_input) or (
            isinstance(text, int) and not 0 <= text < len(task.doc_to_choice(doc))
        ):
            raise EvaluationError(
                f"lm-eval's {name} has a question of digits alone, which lm-eval takes for the "
                "number of a choice. Put words around it in `doc_to_text`, as in "
                "'Question: {{question}}'"
            )
        return text

    task.doc_to_text = question


def _require_labels(name: str, task: Any) -> None:
    """Raises EvaluationError for an item whose right answer is none of its choices.

    lm-eval would count such an item as wrong.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    for instance in {request.doc_id: request for request in task.instances}.values():
        target, choices = task.doc_to_target(instance.doc), task.doc_to_choice(instance.doc)
        for right in target if isinstance(target, list) else [target]:
            if not (0 <= right < len(choices) if isinstance(right, int) else right in choices):
                raise EvaluationError(
                    f"item {instance.doc_id} of lm-eval's {name} has a right answer that "
                    f"is none of its {len(choices)} choices"
                )


def answer(prepared: Prepared, lm: PrefixLM, ctx: Context) -> None:
    """Store the model's response in every request."""
    items = sum(prepared.items.values())
    for kind in sorted({instance.request_type for instance in prepared.instances}):
        requests = [instance for instance in prepared.instances if instance.request_type == kind]
        if kind == "loglikelihood" and prepared.plan is not None:
            responses = lm.score(
                prepared.plan,
                lambda done, total: ctx.progress(items * done // total, items, "items"),
            )
        else:
            with even_threads(), whole_batches(int(lm.batch_size)):
                responses = getattr(lm, kind)(requests, disable_tqdm=True)
            ctx.progress(items, items, "items")
        for instance in requests:
            instance.resps, instance.filtered_resps = [], {}
        for instance, response in zip(requests, responses, strict=True):
            instance.resps.append(response)


def item_rows(prepared: Prepared) -> list[dict[str, Any]]:
    """A row for each item: its id, its task, lm-eval's metrics and the choices' likelihoods."""
    rows = []
    random.seed(DEFAULT_RANDOM_SEED)  # lm-eval's checks of instructions may draw
    for name, task in prepared.tasks.items():
        task.apply_filters()
        requests: dict[int, list[Any]] = {}
        for instance in sorted(
            task.instances, key=lambda instance: (instance.doc_id, instance.idx)
        ):
            requests.setdefault(instance.doc_id, []).append(instance)
        for item, instances in requests.items():
            first_filter = next(iter(instances[0].filtered_resps))
            measures = task.process_results(
                instances[0].doc, [instance.filtered_resps[first_filter] for instance in instances]
            )
            row: dict[str, Any] = {"id": f"{name}/{item}", "task": name} | {
                metric: float(measures[metric])
                for metric in (*METRICS, *WRITTEN)
                if metric in measures
            }
            row |= {
                metric: [bool(followed) for followed in measures[metric]]
                for metric in LISTS
                if metric in measures
            }
            if FLEXIBLE_FILTER in instances[0].filtered_resps:
                last = [instance.filtered_resps[FLEXIBLE_FILTER] for instance in instances]
                found = task.process_results(instances[0].doc, last)
                row[FLEXIBLE] = float(found["exact_match"])
            if instances[0].request_type == "loglikelihood":
                # Further digits are rounding error.
                row["logprobs"] = [round(instance.resps[0][0], 4) for instance in instances]
            rows.append(row)
    return rows


def tasks_record(spec: EvaluateSpec, prepared: Prepared) -> dict[str, Any]:
    """The evaluated items and requests in numbers, without text."""
    prefix_plan = prepared.plan
    return {
        "task": spec.task,
        "lm_eval": version("lm_eval"),
        "items": dict(prepared.items),
        "requests": len(prepared.instances),
        "truncated": None if prefix_plan is None else prefix_plan.truncated,
        "tokens": None
        if prefix_plan is None
        else {"run": prefix_plan.tokens, "without_sharing": prefix_plan.full},
    }
