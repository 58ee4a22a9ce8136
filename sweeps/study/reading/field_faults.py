"""The faults of a file's settings as messages: each names its field as the user wrote it, with the
line, and the allowed values.

pydantic names the members of its own unions too (`axes.train.rank.function-after[...].2.bool`).
Those are left out, and the faults of several members become one.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml
from pydantic import ValidationError

from ebbline.sweeps.study.reading.yaml_text import nodes_in
from ebbline.tasks.specs import Frozen

Part = str | int
Path = tuple[Part, ...]
LONGEST = 120  # characters of a value in a message
_WORDS = (
    (re.compile(r"a valid dictionary(?: or instance of \w+)?"), "a mapping"),
    (re.compile(r"a valid tuple"), "a list"),
    (re.compile(r"^Tuple "), "the list "),
)


@dataclass(frozen=True)
class Fault:
    """`path` is the field as written. `members` are the parts of pydantic's path that are no field,
    each with the place in `path` where it stands.
    """

    path: Path
    message: str
    kind: str
    members: tuple[tuple[int, str], ...] = ()


def faults(
    error: ValidationError,
    model: type[Frozen],
    written: Any = None,
    line_of: Callable[[Path], int | None] = lambda path: None,
) -> Iterator[str]:
    """A message for each fault of settings that are no valid `model`. `written` are the settings as
    they were read; without them, pydantic's path is used.
    """
    found = [_fault(each, model, written) for each in error.errors()]
    for fault in _one_member(found):
        line = line_of(fault.path)
        where = "" if line is None else f"line {line}: "
        yield f"{where}{dotted(fault.path) or model.__name__.lower()}: {fault.message}"


def dotted(path: Sequence[Part]) -> str:
    """A path as text: `seeds[0]`, `axes.train.rank`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def lines_of(text: str) -> Callable[[Path], int | None]:
    """A function that gives the line of a field in YAML: of its key, or of the nearest key above
    it. None for no field.
    """
    root = nodes_in(text)

    def line_of(path: Path) -> int | None:
        node, line = root, None
        for part in path:
            if isinstance(node, yaml.MappingNode):
                found = next(((k, v) for k, v in node.value if str(k.value) == str(part)), None)
                if found is None:
                    break
                line, node = found[0].start_mark.line + 1, found[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
                if part >= len(node.value):
                    break
                node = node.value[part]
                line = node.start_mark.line + 1
        return line

    return line_of


def with_lines(messages: Iterable[str], written: Any, text: str) -> Iterator[str]:
    """Messages that begin with a field, each after the field's line in the text."""
    line_of = lines_of(text)
    for message in messages:
        path = path_in(written, message.partition(": ")[0])
        line = line_of(path) if path else None
        yield message if line is None else f"line {line}: {message}"


def path_in(written: Any, text: str) -> Path | None:
    """The path that a dotted text names in the settings; None if there is no such field. A key may
    hold dots itself.
    """
    if text == "":
        return ()
    if not isinstance(written, Mapping):
        return None
    for key in sorted(map(str, written), key=len, reverse=True):
        if text == key or text.startswith(f"{key}."):
            rest = path_in(written[key], text[len(key) + 1 :])
            if rest is not None:
                return (key, *rest)
    return None


def unknown(name: str, allowed: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(allowed), n=1)
    return f"{name!r} is not one of {sorted(allowed)}" + (
        f"; did you mean {close[0]!r}?" if close else ""
    )


def _fault(error: Mapping[str, Any], model: type[Frozen], written: Any) -> Fault:
    kind, message = str(error["type"]), str(error["msg"])
    path, members, value = _as_written(error["loc"], kind, written)
    if kind == "value_error":
        message = message.removeprefix("Value error, ")
        own, separator, rest = message.partition(": ")
        deeper = path_in(value, own) if separator else None
        return Fault((*path, *deeper), rest, kind) if deeper else Fault(path, message, kind)
    if kind == "extra_forbidden":
        models = _models_at(model, error["loc"][:-1])
        allowed = {name for each in models for name in each.model_fields}
        message = unknown(str(error["loc"][-1]), allowed) if allowed else message
    elif kind == "missing":
        message = "this field is required"
    elif kind.startswith("union_tag"):
        context = error["ctx"]
        key = context["discriminator"].strip("'")
        models = _models_at(model, error["loc"])
        tags = {str(each.model_fields[key].default) for each in models if key in each.model_fields}
        given = context.get("tag")
        one_of = f"this field is required: one of {sorted(tags)}"
        message = one_of if given is None else unknown(given, tags)
        return Fault((*path, key), message, kind, members)
    else:
        for pattern, plain in _WORDS:
            message = pattern.sub(plain, message)
        message = f"{message} (got {_shown(error['input'])})"
    return Fault(path, message, kind, members)


def _as_written(
    location: Path, kind: str, written: Any
) -> tuple[Path, tuple[tuple[int, str], ...], Any]:
    """(the path as written, the members of unions in pydantic's path, the value there)."""
    if written is None:
        return location, (), None
    path: list[Part] = []
    members: list[tuple[int, str]] = []
    value = written
    for place, part in enumerate(location):
        is_last = place == len(location) - 1
        if _holds(value, part):
            path.append(part)
            value = value[part]
        elif is_last and kind in ("missing", "extra_forbidden"):
            path.append(part)
        elif part != "[key]":
            members.append((len(path), str(part)))
    return tuple(path), tuple(members), value


def _holds(value: Any, part: Part) -> bool:
    if isinstance(value, Mapping):
        return part in value
    return isinstance(value, list | tuple) and isinstance(part, int) and part < len(value)


def _one_member(found: Sequence[Fault]) -> Iterator[Fault]:
    """The faults, with one for all members of a union: those of the member that got furthest."""
    furthest: dict[tuple[Path, int], int] = {}
    for fault in found:
        for at, _ in fault.members:
            place = fault.path[:at], at
            furthest[place] = max(furthest.get(place, 0), len(fault.path))
    kept: dict[Path, Fault] = {}
    for fault in found:
        if any(len(fault.path) < furthest[fault.path[:at], at] for at, _ in fault.members):
            continue
        # A list whose items are invalid is also empty for pydantic.
        below = any(each.path[: len(fault.path)] == fault.path != each.path for each in found)
        if fault.kind.endswith("too_short") and below:
            continue
        first = kept.get(fault.path)
        if first is None:
            kept[fault.path] = fault
        elif fault.members and fault.message != first.message:
            kept[fault.path] = replace(first, message=_either(first.message, fault.message))
        elif not fault.members:
            kept[fault.path] = replace(first, message=f"{first.message}; {fault.message}")
    yield from kept.values()


def _either(one: str, other: str) -> str:
    """Two messages of one value as one: `... a valid boolean or a valid integer (got ...)`."""
    start, got = "Input should be ", re.compile(r" \(got .*\)$")
    if not (one.startswith(start) and other.startswith(start)):
        return f"{one}; or {other}"
    tail = got.search(one)
    more = got.sub("", other).removeprefix(start)
    return f"{got.sub('', one)} or {more}{tail[0] if tail else ''}"


def _shown(value: Any) -> str:
    text = repr(_lists(value))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _lists(value: Any) -> Any:
    """The value with lists for tuples, as YAML has them."""
    if isinstance(value, list | tuple):
        return [_lists(each) for each in value]
    return {key: _lists(each) for key, each in value.items()} if isinstance(value, dict) else value


def _models_at(model: type[Frozen], location: Path) -> list[type[Frozen]]:
    """The models that the value at pydantic's path may have. A part that is no field is the key of
    a mapping, the number of an item, or the tag of one model among several.
    """
    found = [model]
    for part in map(str, location):
        tagged = [each for each in found if _tag(each) == part]
        if len(found) > 1 and tagged:
            found = tagged
        elif any(part in each.model_fields for each in found):
            found = [
                member
                for each in found
                if part in each.model_fields
                for member in _models_in(each.model_fields[part].annotation)
            ]
    return found


def _models_in(annotation: Any) -> Iterator[type[Frozen]]:
    if isinstance(annotation, type) and issubclass(annotation, Frozen):
        yield annotation
    for member in getattr(annotation, "__args__", ()):
        yield from _models_in(member)


def _tag(model: type[Frozen]) -> Any:
    return model.model_fields["kind"].default if "kind" in model.model_fields else None
