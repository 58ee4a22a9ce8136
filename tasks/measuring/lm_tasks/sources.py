"""Where the tasks of a name come from: the definitions in a local folder, or lm-eval's own tasks on
a data set's folder.

Invariant: nothing is downloaded, and no code that comes with data runs.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCard
from lm_eval.api.task import ConfigurableTask
from lm_eval.config.group import GroupConfig
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind

from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.measuring.lm_tasks.definitions import LISTS, SCORED, WRITTEN, read_index
from ebbline.tasks.measuring.lm_tasks.instructions import require_checks
from ebbline.tasks.measuring.lm_tasks.local_rows import read_splits

# The settings of a group itself. Every other setting of a group overrides its tasks' setting.
STRUCTURE = {field.name for field in fields(GroupConfig)}
# Settings of tasks that load data by code of their own, or whose data is not text.
OWN_CODE = {
    "class",
    "custom_dataset",
    "unsafe_code",
    "use_prompt",
    "doc_to_image",
    "doc_to_audio",
}


# lm-eval would call the reader of rows with what is in `metadata`.
_NOT_FOR_TASKS = ("tag", "group", "metadata")


def tasks_of(name: str, folder: Path) -> list[tuple[str, Callable[[], Any]]]:
    """The tasks of a name (of a task, a group or a tag), each with a function that builds it.

    Raises EvaluationError for a name that is not defined and for a definition that is not allowed.
    """
    index = {} if _is_snapshot(folder) else read_index(folder)
    return _local(name, folder, index) if index else _built_in(name, folder)


def _is_snapshot(folder: Path) -> bool:
    """Whether a folder is a data set in the hub client's cache. YAML in it defines nothing."""
    return folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("datasets--")


def _local(
    name: str, folder: Path, index: Mapping[str, Entry]
) -> list[tuple[str, Callable[[], Any]]]:
    """The tasks that a local folder defines, each with a function that builds it.

    Splits are FOLDER/TASK/SPLIT.jsonl, or FOLDER/SPLIT.jsonl for the only task of a folder.
    """
    tasks = sorted(key for key, entry in index.items() if entry.kind is Kind.TASK)
    if name not in index:
        raise EvaluationError(f"{folder} defines the lm-eval tasks {sorted(index)}, not {name!r}")
    found: list[tuple[str, Callable[[], Any]]] = []
    try:
        members = _members(name, index, {})
    except RecursionError:
        raise EvaluationError(f"{name} in {folder} is a group that contains itself") from None
    for task, changes in members:
        config = {**(index[task].cfg or {}), **changes}
        if config.get("dataset_path") != "json":
            raise EvaluationError(
                f"{task} in {folder} must have `dataset_path: json`: ebbline downloads no "
                "data that is not pinned"
            )
        own = folder / task if (folder / task).is_dir() or len(tasks) > 1 else folder
        splits = {path.stem: path for path in sorted(own.glob("*.jsonl"))}
        if not splits:
            raise EvaluationError(
                f"{own} holds no SPLIT.jsonl; a local lm-eval task needs its YAML and its splits"
            )
        config = {key: value for key, value in config.items() if key not in _NOT_FOR_TASKS}
        config |= {"task": task, "custom_dataset": partial(read_splits, splits)}
        found.append((task, partial(ConfigurableTask, config=config)))
    return found


@functools.cache
def _lm_evals_own() -> TaskManager:
    return TaskManager()  # takes seconds: it reads thousands of YAML files


def _built_in(name: str, folder: Path) -> list[tuple[str, Callable[[], Any]]]:
    """lm-eval's own tasks of a name, each with a function that builds it on the snapshot in
    `folder`.
    """
    require_own_files(folder)
    manager = _lm_evals_own()
    if name not in manager.task_index:
        raise EvaluationError(
            f"{folder} defines no lm-eval task, and lm-eval {version('lm_eval')} has none "
            f"called {name!r}"
        )
    members = _members(name, manager.task_index, {})
    for task, changes in members:
        config = {**manager.task_index[task].cfg, **changes}
        fetched = any(metric.get("hf_evaluate") for metric in config.get("metric_list") or [])
        if (
            fetched
            or any(config.get(key) for key in OWN_CODE)
            or "://" in str(config.get("dataset_kwargs"))
        ):
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
    for task, changes in members:
        config = {**manager.task_index[task].cfg, **changes}
        plain = config.get("output_type") in SCORED and not config.get("filter_list")
        if not plain and not _is_written(config):
            raise EvaluationError(
                f"lm-eval's {task} scores text that the model writes, in another way than by "
                f"{', '.join(WRITTEN)}; ebbline also measures tasks of the types "
                f"{', '.join(SCORED)} without filters"
            )
        if any(metric.get("metric") in LISTS for metric in config.get("metric_list") or []):
            require_checks(task)
    at = {"dataset_path": str(folder.resolve())}
    return [(task, partial(_loaded, manager, {**changes, **at}, task)) for task, changes in members]


def _is_written(config: Mapping[str, Any]) -> bool:
    """Whether a task has the model write one answer, and scores it in a way that is known here."""
    metrics = [metric.get("metric") for metric in config.get("metric_list") or []]
    return (
        config.get("output_type") == "generate_until"
        and bool(metrics)
        and set(metrics) <= {*WRITTEN, *LISTS}
        and (config.get("repeats") or 1) == 1
    )


def _loaded(manager: TaskManager, changes: Mapping[str, Any], name: str) -> Any:
    group = {"group": "ebbline", "task": [{**changes, "task": name}]}
    (task,) = manager.load([group])["tasks"].values()
    return task


def require_own_files(folder: Path) -> None:
    """Raises EvaluationError when the card of a data set names files outside its folder.

    The library `datasets` would read or download them.
    """
    for card in (folder / "README.md", folder / ".huggingface.yaml"):
        for place in _data_files(card) if card.is_file() else ():
            if "://" in place or "::" in place or place.startswith(("/", "~")) or ".." in place:
                raise EvaluationError(
                    f"{card} names the data file {place}, which is not in {folder}; ebbline "
                    "downloads no data that is not pinned"
                )


def _data_files(card: Path) -> Iterator[str]:
    """The places of data files in a data set's card, as the library `datasets` reads them."""
    try:
        text = card.read_text("utf-8")
        content = (
            yaml.safe_load(text) if card.suffix == ".yaml" else DatasetCard(text).data.to_dict()  # type: ignore[no-untyped-call]
        )
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise EvaluationError(f"the card {card} cannot be read: {type(error).__name__}") from None
    waiting = [content.get("configs")] if isinstance(content, dict) else []
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str):
            yield value


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
