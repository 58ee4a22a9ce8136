"""YAML as plain values, strictly and within bounds, so that no file takes for ever or the whole
memory. Each fault names the file and the line.

A value that aliases repeat counts each time. A key is given once, and a number is written as it is
read: YAML 1.1 takes `010` for 8 and `1:30` for 90.
"""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from ebbline.tasks.errors import StudyError

LARGEST_BYTES = 10_000_000
MOST_VALUES = 200_000
DEEPEST = 50
LONGEST_NUMBER = 100  # characters
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_MISLEADING = re.compile(r"[-+]?0[0-9_]*[0-9]|.*:.*")  # octal, and to the base of 60
_MERGE = "tag:yaml.org,2002:merge"
# What PyYAML raises for a value that does not fit its tag
_UNFIT = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)


def text_of(path: Path) -> str:
    """The text of a YAML file. Raises StudyError for a file that is no UTF-8 text or too large."""
    try:
        if not path.is_file():
            raise StudyError(f"{path} is not a file; name a YAML file")
        if path.stat().st_size > LARGEST_BYTES:
            raise StudyError(f"{path} is larger than {LARGEST_BYTES} bytes; is it a YAML file?")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise StudyError(f"{path} cannot be read ({reason}); check its name and its mode") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise StudyError(
            f"{path}:{line} is not UTF-8 text (byte {error.start}: {error.reason}); save it as "
            "UTF-8"
        ) from None


def values_in(text: str, path: Path) -> Any:
    """The plain values of a YAML text. Raises StudyError with the line of the fault."""
    try:
        return yaml.load(text, Loader=_Bounded)
    except yaml.YAMLError as error:
        raise StudyError(f"{path} is not valid YAML: {_reason(error, text)}") from None
    except _UNFIT as error:
        raise StudyError(
            f"{path} is not valid YAML: a value does not fit its tag ({error}); remove the tags"
        ) from None


def nodes_in(text: str) -> Any:
    """The root node of a YAML text that `values_in` has read."""
    return yaml.compose(text, Loader=_Bounded)


class _Bounded(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth, self._count = 0, 0
        self._sizes: dict[int, int] = {}  # id of a node -> values in it, aliases written out

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        is_alias = self.check_event(yaml.AliasEvent)
        before = self._count
        self._count += 1
        self._depth += 1
        if self._depth > DEEPEST:
            raise ConstructorError(None, None, f"nested over {DEEPEST} levels deep", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias:
            if id(node) not in self._sizes:
                raise ConstructorError(None, None, "an alias inside the value it names", mark)
            self._count += self._sizes[id(node)]
        if self._count > MOST_VALUES:
            raise ConstructorError(
                None, None, f"over {MOST_VALUES} values, each alias counted as its value", mark
            )
        if not is_alias:
            self._sizes[id(node)] = self._count - before
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag in _NUMBERS and len(str(node.value)) > LONGEST_NUMBER:
            raise ConstructorError(
                None, None, f"a number of over {LONGEST_NUMBER} digits", node.start_mark
            )
        if node.tag in _NUMBERS and _MISLEADING.fullmatch(str(node.value)):
            raise ConstructorError(
                None,
                None,
                f"YAML does not read {node.value} as the number that it looks like; write it in "
                f'quotes, as "{node.value}", or a number in decimals without leading zeros',
                node.start_mark,
            )
        try:
            return super().construct_object(node, deep)
        except _UNFIT as error:
            kind = node.tag.rpartition(":")[2]
            raise ConstructorError(
                None,
                None,
                f"this is no valid {kind} ({error}); put text in quotes",
                node.start_mark,
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):  # such as `!!set a`
            raise ConstructorError(None, None, "this is no mapping", node.start_mark)
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                raise ConstructorError(
                    None,
                    None,
                    "merge keys (<<) are not read; write the entries out, or alias a whole value",
                    key_node.start_mark,
                )
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise ConstructorError(
                    None, None, "a key must be one text or number", key_node.start_mark
                )
            if key in seen:
                raise ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _reason(error: yaml.YAMLError, text: str) -> str:
    """`line N: what is wrong`, in one line."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}: "
        about = f" ({error.context})" if error.context else ""
        return f"{where}{error.problem}{about}"
    position = getattr(error, "position", None)
    where = "" if position is None else f"line {text.count(chr(10), 0, position) + 1}: "
    return f"{where}{getattr(error, 'reason', error)}"
