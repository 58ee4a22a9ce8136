"""lm-eval task definitions that come with data, read as data alone.

ebbline reads every `.yaml` file of a local folder itself and gives lm-eval finished settings, so
lm-eval reads no file of the folder. Only plain YAML is read, and only the settings listed here are
taken. Templates are rendered in Jinja's immutable sandbox.

Invariant: no code that comes with data runs, whatever a definition contains.
"""

import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import BaseLoader, StrictUndefined
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval import utils
from lm_eval.tasks._index import Entry, TaskIndex

from ebbline.tasks.errors import EvaluationError

METRICS = ("acc", "acc_norm")
# Of lm-eval's own tasks whose answers the model writes. The second filter of GSM8K reads the last
# number, where the first wants it after ####.
WRITTEN = ("exact_match", "prompt_level_strict_acc", "prompt_level_loose_acc")
FLEXIBLE, FLEXIBLE_FILTER = "exact_match_flexible", "flexible-extract"
LISTS = ("inst_level_strict_acc", "inst_level_loose_acc")  # IFEval's: a list for each item
SCORED = ("multiple_choice", "loglikelihood")  # the output types that give these metrics
NO_CODE = "ebbline runs no code that comes with data"
LARGEST_BYTES, MOST_VALUES, DEEPEST = 1_000_000, 10_000, 20
MOST_MERGED = 100  # mappings of one merge key
IGNORED = {"__pycache__", ".ipynb_checkpoints"}  # folders that lm-eval ignores too
_NAME = re.compile(r"\w[\w.+-]*")
# What PyYAML raises for a value that does not fit its tag, or for deep nesting.
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
_Check = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _text_or(*others: _Check) -> _Check:
    return lambda value: _text(value) or any(check(value) for check in others)


def _named(value: Any) -> bool:
    return _text(value) and _NAME.fullmatch(value) is not None


def _only(*allowed: Any) -> _Check:
    return lambda value: any(type(value) is type(each) and value == each for each in allowed)


def _mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _choices(value: Any) -> bool:
    return _text(value) or _texts(list(value.values()) if isinstance(value, dict) else value)


def _metrics(value: Any) -> bool:
    """Whether each entry is a metric that ebbline measures, with lm-eval's own aggregation."""
    fields = {"metric": METRICS, "aggregation": ("mean",), "higher_is_better": (True,)}
    return isinstance(value, list) and all(
        isinstance(entry, dict)
        and "metric" in entry
        and all(key in fields and _only(*fields[key])(entry[key]) for key in entry)
        for entry in value
    )


_PROMPT: Mapping[str, _Check] = {
    "doc_to_text": _text_or(_whole),
    "doc_to_target": _text_or(_whole),
    "doc_to_choice": _choices,
    "target_delimiter": _text,
    "fewshot_delimiter": _text,
    "gen_prefix": _text,
}
_SHOTS: Mapping[str, _Check] = {
    **_PROMPT,
    "sampler": _only("default", "first_n"),
    "split": _text,
    "samples": lambda value: isinstance(value, list) and all(map(_mapping, value)),
    "fewshot_indices": lambda value: isinstance(value, list) and all(map(_whole, value)),
}
# The settings of a task, and whether a value is one that it may have. `null` means none.
TASK: Mapping[str, _Check] = {
    **_PROMPT,
    "task": _named,
    "task_alias": _text,
    "tag": _text_or(_texts),
    "dataset_path": _only("json"),
    "dataset_name": lambda value: False,
    "training_split": _text,
    "validation_split": _text,
    "test_split": _text,
    "fewshot_split": _text,
    "fewshot_config": lambda value: _mapping(value) and not list(_unfit(value, _SHOTS)),
    "num_fewshot": _whole,
    "description": _text,
    "output_type": _only(*SCORED),
    "metric_list": _metrics,
    "repeats": _only(1),
    "should_decontaminate": _only(False),
    "doc_to_decontamination_query": _text,
    "metadata": lambda value: True,
}
GROUP: Mapping[str, _Check] = {
    **TASK,
    "group": _named,
    "group_alias": _text,
    "task": lambda value: isinstance(value, list) and all(map(_member, value)),
    "aggregate_metric_list": lambda value: True,  # ebbline has its own mean
}


def _member(value: Any) -> bool:
    """Whether an entry of a group's `task` is a name, a task with settings, or a group."""
    if isinstance(value, dict):
        return not list(_unfit(value, GROUP if "group" in value else TASK)) and (
            "group" in value or "task" in value
        )
    return _named(value)


def _unfit(config: Mapping[str, Any], allowed: Mapping[str, _Check]) -> Iterator[str]:
    """The keys that are not allowed or whose value is not."""
    for key, value in config.items():
        if key not in allowed or not (value is None or allowed[key](value)):
            yield str(key)


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader that raises an error for a duplicate key, where yaml would keep the last value,
    and for merge keys (`<<`) that write out more than MOST_VALUES values.
    """

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        merged = [value for key, value in node.value if key.tag == "tag:yaml.org,2002:merge"]
        many = sum(len(value.value) for value in merged) > MOST_MERGED
        if not many:
            super().flatten_mapping(node)
        if many or len(node.value) > MOST_VALUES:
            raise yaml.constructor.ConstructorError(
                None, None, f"over {MOST_VALUES} values by merge keys", node.start_mark
            )

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, Hashable) or key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key!r}", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_index(folder: Path) -> dict[str, Entry]:
    """lm-eval's index of the tasks, groups and tags that the `.yaml` files of a folder define.

    Raises EvaluationError that names the file, and the line or the setting, for everything that is
    not allowed.
    """
    index: dict[str, Entry] = {}
    for file in sorted(folder.rglob("*.yaml")):
        if IGNORED & set(file.relative_to(folder).parts):
            continue
        config = _read(file, folder, ())
        if not config.keys() & {"task", "group", "class"}:
            continue  # a file that others include
        _require_allowed(config, GROUP if "group" in config else TASK, file)
        name = config["group"] if "group" in config else config.get("task")
        if name is None or (name in index and index[name].cfg is not None):
            other = "" if name is None else f", as in {index[name].yaml_path}"
            raise EvaluationError(f"{file} defines the task or group {name!r}{other}; give a name")
        TaskIndex.process_cfg(config, file, index)
    return index


def _require_allowed(config: Mapping[str, Any], allowed: Mapping[str, _Check], file: Path) -> None:
    for key in _unfit(config, allowed):
        if key == "dataset_path":
            raise EvaluationError(
                f"{config.get('task')} in {file} must have `dataset_path: json`: ebbline downloads "
                "no data that is not pinned"
            )
        part = "the setting" if key not in allowed else "the value of"
        raise EvaluationError(
            f"{file}: ebbline does not accept {part} `{key}` in a task definition. {NO_CODE}; "
            f"write its result into the rows, or remove it. Settings: {', '.join(sorted(allowed))}"
        )


def _read(file: Path, folder: Path, above: Sequence[Path]) -> dict[str, Any]:
    """The settings in a file and its includes, as lm-eval merges them: its own settings win."""
    own = _parse(file, folder)
    merged: dict[str, Any] = {}
    included = own.pop("include", None) or []
    for part in included if isinstance(included, list) else [included]:
        target = _inside(folder, file, part)
        if target in above or target == file.resolve():
            raise EvaluationError(f"{file} includes itself through {part}")
        merged |= _read(target, folder, (*above, file.resolve()))
    return {**merged, **own}


def _inside(folder: Path, file: Path, part: Any) -> Path:
    """The file of the folder that an `include` names."""
    target = None
    if isinstance(part, str) and "\0" not in part:
        target = (file.parent / part).resolve()
    if target is None or not target.is_relative_to(folder.resolve()) or not target.is_file():
        raise EvaluationError(f"{file} includes {part}, which is not in {folder}")
    return target


def _parse(file: Path, folder: Path) -> dict[str, Any]:
    if not file.resolve().is_relative_to(folder.resolve()) or not file.is_file():
        raise EvaluationError(f"{file} is not a file in {folder}; copy it there")
    if file.stat().st_size > LARGEST_BYTES:
        raise EvaluationError(f"{file} is larger than {LARGEST_BYTES} bytes; put rows in .jsonl")
    try:
        content = yaml.load(file.read_bytes(), Loader=_PlainLoader)
    except yaml.constructor.ConstructorError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise EvaluationError(f"{file}{line}: {error.problem}: {NO_CODE}") from None
    except (yaml.YAMLError, *_UNREADABLE) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise EvaluationError(
            f"{file} is not a YAML mapping: {type(error).__name__}: {reason}"
        ) from None
    if not isinstance(content, dict):
        raise EvaluationError(
            f"{file} is not a YAML mapping; ebbline reads every .yaml file of the folder"
        )
    counted = iter(range(MOST_VALUES))
    plain: dict[str, Any] = _plain(content, file, counted, DEEPEST)
    return plain


def _plain(value: Any, file: Path, counted: Iterator[int], depth: int) -> Any:
    """A copy of a value that shares nothing, for which aliases are written out."""
    if next(counted, None) is None or depth == 0:
        raise EvaluationError(
            f"{file} has over {MOST_VALUES} values or {DEEPEST} levels, with its aliases written "
            "out; put rows in .jsonl"
        )
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise EvaluationError(f"{file}: the key {key!r} is no text; put it in quotes")
        return {key: _plain(item, file, counted, depth - 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, file, counted, depth - 1) for item in value]
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise EvaluationError(
        f"{file} has a value of the type {type(value).__name__}; put it in quotes: {NO_CODE}"
    )


def use_sandbox() -> None:
    """Make lm-eval render its templates in Jinja's immutable sandbox, in this whole process.

    Raises EvaluationError if this version of lm-eval renders them elsewhere.
    """
    if not isinstance(utils.env, ImmutableSandboxedEnvironment):
        sandbox = ImmutableSandboxedEnvironment(
            loader=BaseLoader(),
            undefined=StrictUndefined,
            keep_trailing_newline=utils.env.keep_trailing_newline,
        )
        sandbox.filters["regex_replace"] = utils.regex_replace  # lm-eval's one filter
        utils.env = sandbox
    try:
        utils.apply_template("{{ ().__class__ }}", {})
    except SecurityError:
        return
    raise EvaluationError(
        "this version of lm-eval renders templates outside ebbline's sandbox; install the version "
        "in constraints.txt"
    )
