"""The stage `evaluate`: MMLU, HellaSwag and any other lm-eval task or group, on the resident model.

The data is a local folder or the snapshot of a hub data set. A local folder holds lm-eval YAML
files and the splits as JSON lines. A snapshot is read by lm-eval's own task of the given name.

Invariant: this stage downloads nothing and runs no code that comes with data.

lm-eval builds the requests and scores the answers; ebbline.tasks.measuring.prefix_lm computes the
log-likelihoods. Tasks, requests and tokens do not depend on the adapter, so they are built once for
a base model. See docs/capability.md.
"""

import contextlib
import functools
import io
import json
import logging
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from datasets.exceptions import DatasetsError  # type: ignore[import-untyped]
from jinja2 import TemplateError
from lm_eval.config.group import GroupConfig
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager

from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.measuring.metrics import Metric, Sample, write_metrics, write_samples
from ebbline.tasks.measuring.prefix_lm import Plan, PrefixLM, plan
from ebbline.tasks.models.adapters import with_adapter
from ebbline.tasks.specs import EvaluateSpec
from ebbline.tasks.stage import Context

METRICS = ("acc", "acc_norm")
ANSWERS = "answers.jsonl"
PROMPTS = "prompts.json"
# The settings of a group itself. Every other setting of a group overrides its tasks' setting.
STRUCTURE = {field.name for field in fields(GroupConfig)}
CODE = re.compile(r"!function|\b(class|custom_dataset|unsafe_code|hf_evaluate|use_prompt)\b['\"]?:")
# What datasets, lm-eval and its templates raise for data that does not fit a task.
UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AssertionError,
    RuntimeError,
    DatasetsError,
    TemplateError,
)
# Settings of tasks that load data by code of their own, or whose data is not text.
OWN_CODE = {
    "class",
    "custom_dataset",
    "unsafe_code",
    "doc_to_image",
    "doc_to_audio",
}


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
    resident, tokenizer = ctx.residents.model(
        inputs["model"], spec.quantisation, spec.dtype, ctx.device
    )
    resident.eval()
    folder = inputs["prompts"]
    key = ("lm-eval", spec.task, spec.shots, spec.chat_template, spec.limit, _fingerprint(folder))
    with with_adapter(resident, inputs.get("adapter")) as model:
        lm = PrefixLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=ctx.batch_size,
            backend="causal",
            softmax_dtype="float32",
        )
        prepared = ctx.residents.remembered(key, lambda: prepare(spec, folder, lm))
        answer(prepared, lm, ctx)
    rows = item_rows(prepared)
    with (out / ANSWERS).open("w") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in rows)
    (out / PROMPTS).write_text(json.dumps(described(spec, prepared), indent=1))
    names = [name for name in METRICS if all(name in row for row in rows)]
    if not names:
        raise EvaluationError(
            f"lm-eval's {spec.task} has neither acc nor acc_norm for all its items; "
            "ebbline supports no other metric of lm-eval"
        )
    right = [row[names[0]] > 0.5 for row in rows]
    write_samples(
        out,
        [
            Sample(row["id"], row["task"], "right" if ok else "wrong", "arg-max", ok)
            for row, ok in zip(rows, right, strict=True)
        ],
    )
    write_metrics(out, [Metric.of(name, [row[name] for row in rows]) for name in names])


def prepare(spec: EvaluateSpec, folder: Path, lm: PrefixLM) -> Prepared:
    """Build the tasks, their requests and the tokens.

    Raises EvaluationError for a task or a data set that cannot be used.
    """
    # Some tasks shuffle while they load. These are the seeds of lm-eval's own command.
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    manager, members = (
        _local(spec.task, folder) if _definitions(folder) else _built_in(spec.task, folder)
    )
    tasks = {name: _task(manager, name, changes, spec, folder, lm) for name, changes in members}
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
    manager: TaskManager,
    name: str,
    changes: Mapping[str, Any],
    spec: EvaluateSpec,
    folder: Path,
    lm: PrefixLM,
) -> Any:
    """One lm-eval task with its requests built."""
    try:
        # lm-eval has no option to turn off these progress bars.
        with contextlib.redirect_stderr(io.StringIO()):
            (task,) = manager.load([{"group": "ebbline", "task": [{**changes, "task": name}]}])[
                "tasks"
            ].values()
            if task.get_config("num_fewshot") == 0 and spec.shots:
                raise EvaluationError(
                    f"lm-eval's {name} is defined without shots; set `shots` to 0, not {spec.shots}"
                )
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
    return task


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


def _definitions(folder: Path) -> list[Path]:
    """The YAML files of a folder that define tasks or groups. A hub snapshot has none."""
    defines = re.compile(r"^['\"]?(task|group)['\"]?:", re.MULTILINE)
    return [
        file for file in sorted(folder.rglob("*.yaml")) if defines.search(file.read_text("utf-8"))
    ]


def _require_no_code(folder: Path) -> None:
    """Raises EvaluationError when a definition, or a file that it includes, names code or lies
    outside the folder.
    """
    files = _definitions(folder)
    for file in files:  # the loop appends included files
        text = file.read_text("utf-8")
        if code := CODE.search(text):
            raise EvaluationError(
                f"{file} has {code[0]!r}: ebbline runs no code that comes with data. Write "
                "its result into the rows"
            )
        try:
            included = yaml.safe_load(text).get("include") or []
        except (yaml.YAMLError, AttributeError) as error:
            raise EvaluationError(f"{file} is not a YAML mapping: {error}") from error
        for part in [included] if isinstance(included, str) else included:
            target = (file.parent / part).resolve()
            if not target.is_relative_to(folder.resolve()) or not target.is_file():
                raise EvaluationError(f"{file} includes {part}, which is not in {folder}")
            if target not in files:
                files.append(target)


def _local(name: str, folder: Path) -> tuple[TaskManager, list[tuple[str, dict[str, Any]]]]:
    """The tasks of a local folder, each with its changed settings.

    Splits are FOLDER/TASK/SPLIT.jsonl, or FOLDER/SPLIT.jsonl for the only task of a folder.
    """
    _require_no_code(folder)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    if name not in manager.all_tasks:
        raise EvaluationError(
            f"{folder} defines the lm-eval tasks {manager.all_tasks}, not {name!r}"
        )
    found = []
    for task, changes in _members(name, manager.task_index, {}):
        if manager.task_index[task].cfg.get("dataset_path") != "json":
            raise EvaluationError(
                f"{task} in {folder} must have `dataset_path: json`: ebbline downloads no "
                "data that is not pinned"
            )
        own = folder / task if (folder / task).is_dir() or len(manager.all_subtasks) > 1 else folder
        # lm-eval resolves relative paths against the working directory, so these are absolute.
        splits = {path.stem: str(path.resolve()) for path in sorted(own.glob("*.jsonl"))}
        if not splits:
            raise EvaluationError(
                f"{own} holds no SPLIT.jsonl; a local lm-eval task needs its YAML and its splits"
            )
        found.append(
            (
                task,
                {
                    **changes,
                    "dataset_path": "json",
                    "dataset_name": None,
                    "dataset_kwargs": {"data_files": splits},
                },
            )
        )
    return manager, found


@functools.cache
def _lm_evals_own() -> TaskManager:
    return TaskManager()  # takes seconds: it reads thousands of YAML files


def _built_in(name: str, folder: Path) -> tuple[TaskManager, list[tuple[str, dict[str, Any]]]]:
    """lm-eval's own tasks of a name, with the snapshot in `folder` as their data."""
    manager = _lm_evals_own()
    if name not in manager.task_index:
        raise EvaluationError(
            f"{folder} defines no lm-eval task, and lm-eval {version('lm_eval')} has none "
            f"called {name!r}"
        )
    members = _members(name, manager.task_index, {})
    for task, changes in members:
        config = {**manager.task_index[task].cfg, **changes}
        if any(config.get(key) for key in OWN_CODE) or "://" in str(config.get("dataset_kwargs")):
            raise EvaluationError(
                f"lm-eval's {task} loads or judges its data with code or from a source of "
                f"its own; it cannot read {folder}"
            )
    sources = {
        str({**manager.task_index[task].cfg, **changes}.get("dataset_path"))
        for task, changes in members
    }
    if len(sources) > 1:
        raise EvaluationError(
            f"lm-eval's {name} reads several data sets, {sorted(sources)}: write one suite for "
            "each of its tasks"
        )
    return manager, [
        (task, {**changes, "dataset_path": str(folder.resolve())}) for task, changes in members
    ]


def _members(
    item: str | Mapping[str, Any], index: Mapping[str, Any], changes: Mapping[str, Any]
) -> list[tuple[str, dict[str, Any]]]:
    """Every task of a name (or of a group's entry), with the settings that its groups change, as
    lm-eval resolves them.
    """
    item_config: Mapping[str, Any] = {"task": item} if isinstance(item, str) else item
    name = item_config.get("group") or item_config["task"]
    entry = index.get(name)
    own = {key: value for key, value in item_config.items() if key not in STRUCTURE}
    changes = {**changes, **own}
    if entry is not None and entry.cfg is None:  # a tag
        return [
            member for child in sorted(entry.tags) for member in _members(child, index, changes)
        ]
    config = item_config if entry is None else entry.cfg
    if "group" in config:
        changes = {
            **{key: value for key, value in config.items() if key not in STRUCTURE},
            **changes,
        }
        return [
            member
            for child in config.get("task") or []
            for member in _members(child, index, changes)
        ]
    if entry is None:
        raise EvaluationError(f"a group names the lm-eval task {name!r}, which is not defined")
    return [(name, dict(changes))]


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
            responses = getattr(lm, kind)(requests, disable_tqdm=True)
            ctx.progress(items, items, "items")
        for instance in requests:
            instance.resps, instance.filtered_resps = [], {}
        for instance, response in zip(requests, responses, strict=True):
            instance.resps.append(response)


def item_rows(prepared: Prepared) -> list[dict[str, Any]]:
    """A row for each item: its id, its task, lm-eval's metrics and the choices' likelihoods."""
    rows = []
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
                metric: float(measures[metric]) for metric in METRICS if metric in measures
            }
            if instances[0].request_type == "loglikelihood":
                # Further digits are rounding error.
                row["logprobs"] = [round(instance.resps[0][0], 4) for instance in instances]
            rows.append(row)
    return rows


def described(spec: EvaluateSpec, prepared: Prepared) -> dict[str, Any]:
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


def _fingerprint(folder: Path) -> tuple[Any, ...]:
    """A value that changes when a file in the folder changes: paths, sizes and times."""
    files = [(str(path), path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    return (
        str(folder.resolve()),
        tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in files),
    )
