"""Rows of JSON and JSON lines, read strictly.

JSON has no NaN and no Infinity, and a key is given once. Numbers stay text as they are written:
1e3 is not 1000.0, and a number of any length is one text.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from ebbline.tasks.data.data_file import DEEPEST, FileRow, InvalidValue, checked, text_lines
from ebbline.tasks.errors import DataError

_SPACE = re.compile(r"[ \t\n\r]*")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # json would keep only the last of two equal keys, and drop text silently.
    if len({name for name, _ in pairs}) != len(pairs):
        raise InvalidValue("is JSON with one key given twice in an object; name each once")
    return dict(pairs)


def _no_constant(name: str) -> NoReturn:
    raise InvalidValue(f"has {name}, which is not JSON; write null, or the text in quotes")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_float=str, parse_int=str, parse_constant=_no_constant
)


def json_line_rows(path: Path) -> Iterator[FileRow]:
    """The object on each line; blank lines are left out."""
    for line, text in enumerate(text_lines(path), start=1):
        if text.strip():
            where = f"{path}:{line}"
            value, end = _value(text, _after_space(text, 0), where)
            if _after_space(text, end) != len(text):
                raise DataError(
                    f"{where} is not JSON lines: more follows its object; write an object on each "
                    "line"
                )
            yield FileRow(where, line, _object(value, where, "write an object on each line"))


def json_rows(path: Path) -> Iterator[FileRow]:
    """The objects of a JSON list, or the objects that follow each other (JSON lines)."""
    text = "".join(text_lines(path))
    start = _after_space(text, 0)
    if text[start : start + 1] == "[":
        yield from _list_rows(text, start + 1, path)
    else:
        yield from _sequence(text, start, path)


def _list_rows(text: str, start: int, path: Path) -> Iterator[FileRow]:
    place, line, number = _after_space(text, start), 1 + text.count("\n", 0, start), 0
    line += text.count("\n", start, place)
    if text[place : place + 1] != "]":
        while True:
            number += 1
            where = f"{path}:{line} (item {number})"
            value, end = _value(text, place, where)
            yield FileRow(where, number, _object(value, where, "write a list of objects"))
            comma = _after_space(text, end)
            line += text.count("\n", place, comma)
            place = comma
            if text[comma : comma + 1] != ",":
                break
            place = _after_space(text, comma + 1)
            line += text.count("\n", comma, place)
    if text[place : place + 1] != "]":
        raise DataError(
            f"{path}:{line} is not JSON: the list does not go on after item {number}; is a comma "
            "missing, or is it truncated?"
        )
    after = _after_space(text, place + 1)
    if after != len(text):
        raise DataError(
            f"{path}:{line + text.count(chr(10), place, after)} is not JSON: more follows the "
            "list; write one list of objects"
        )


def _sequence(text: str, start: int, path: Path) -> Iterator[FileRow]:
    line, place = 1 + text.count("\n", 0, start), start
    while place < len(text):
        where = f"{path}:{line}"
        value, end = _value(text, place, where)
        after = _after_space(text, end)
        if after < len(text) and "\n" not in text[end:after]:
            raise DataError(
                f"{where} is not JSON: more follows its object; write a list of objects, or one "
                "object on each line"
            )
        remedy = "the file must be a JSON list of objects, or one object on each line"
        lone = place == start and after == len(text)
        yield FileRow(where, line, _object(value, where, remedy), lone)
        line += text.count("\n", place, after)
        place = after


def _after_space(text: str, start: int) -> int:
    found = _SPACE.match(text, start)
    return start if found is None else found.end()


def _object(value: Any, where: str, remedy: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where} is not a JSON object; {remedy}")
    return value


def _value(text: str, start: int, where: str) -> tuple[Any, int]:
    """The value that begins at `start`, and where it ends."""
    try:
        value, end = _DECODER.raw_decode(text, start)
        return checked(value), end
    except InvalidValue as error:
        raise DataError(f"{where} {error}") from None
    except RecursionError:
        raise DataError(
            f"{where} has more than {DEEPEST} lists and objects in each other"
        ) from None
    except json.JSONDecodeError as error:
        # The parser's position, not the text, which may be a completion.
        below = text.count("\n", start, error.pos)
        place = f"character {error.colno}" + (f" of line {below + 1} from there" if below else "")
        raise DataError(
            f"{where} is not JSON (at {place}); is it truncated, or a comma too many?"
        ) from None
