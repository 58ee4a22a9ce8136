"""One data file: its ending, its bytes, its lines of text, and the type of a row.

Text is UTF-8, with or without a byte-order mark and with any line end; a line that is read ends
with a line feed. Every fault is a DataError that names file and line and quotes nothing.
"""

import gzip
import io
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ebbline.tasks.errors import DataError

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
COMPRESSED = ".gz"  # may follow each of ENDINGS
ACCEPTED = f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}, each also with {COMPRESSED}"
CHUNK = 1 << 20
EXPANDED_BYTES = 64 * CHUNK  # a compressed file may always expand to this size
EXPANSION = 100  # ... and to this multiple of its own size; text reaches about 10
LONGEST_TEXT = 10_000_000  # characters of one value
DEEPEST = 100  # lists and objects in each other
# What Excel writes in the place of a text that it took for a formula, such as "- a list item"
SPREADSHEET_ERRORS = {
    *("#NAME?", "#VALUE!", "#REF!", "#DIV/0!", "#N/A", "#NUM!", "#NULL!", "#SPILL!", "#CALC!")
}

# What a file of another kind begins with, and the remedy
_OTHER_KINDS = (
    (b"\x1f\x8b", f"is compressed by gzip; let its name end in {COMPRESSED}"),
    (b"PK\x03\x04", "is a zip file or an Excel workbook; save the table as CSV UTF-8"),
    (b"PAR1", "is Parquet; let its name end in .parquet"),
    (b"\xff\xfe", "is UTF-16 text; save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16 text; save it as UTF-8"),
    (
        b"version https://git-lfs",
        "is a Git LFS pointer and not the data; download the file itself (git lfs pull)",
    ),
)


@dataclass(frozen=True)
class FileRow:
    """One row. `where` gives file and line, for messages. `number` is the line, or the number of
    the item in a JSON list and of the row in Parquet.

    A value is text, None, a boolean, a list or an object; numbers are text as they are written.
    Parquet has further types, which `text_of` rejects. `lone` marks the only object of a JSON file
    that holds no list.
    """

    where: str
    number: int
    values: Mapping[str, Any]
    lone: bool = False


class InvalidValue(Exception):
    """A value that no row may hold. The reader adds the place."""


def ending_of(path: Path) -> str:
    """One of ENDINGS, or "" for any other file."""
    name = path.name.lower().removesuffix(COMPRESSED)
    return next((ending for ending in ENDINGS if name.endswith(ending)), "")


def stem_of(path: Path) -> str:
    """The file's name without its ending."""
    return Path(path.name[: -len(COMPRESSED)] if is_compressed(path) else path.name).stem


def is_compressed(path: Path) -> bool:
    return path.name.lower().endswith(COMPRESSED)


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, each with its line feed, without a byte-order mark."""
    number = 0
    with open_data(path) as file:
        _require_text(file, path)
        for raw in _raw_lines(file, path):
            try:
                text = raw.decode("utf-8-sig" if number == 0 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number + 1} is not UTF-8 text ({error.reason}); save it as UTF-8"
                ) from None
            text = text.replace("\r\n", "\n").replace("\r", "\n")
            # splitlines would also split at U+2028, inside a text
            for line in io.StringIO(text, newline="\n"):
                number += 1
                if "\0" in line:
                    raise DataError(
                        f"{path}:{number} holds a NUL character; save the file as UTF-8 text, or "
                        "repair it"
                    )
                yield line


def open_data(path: Path) -> BinaryIO:
    """The file's bytes, expanded if it is compressed. Raises DataError for a file that is missing,
    damaged, or expands beyond any text.
    """
    if not path.is_file():
        raise DataError(f"there is no data file at {path}")
    try:
        file = path.open("rb")
        if not is_compressed(path):
            return file
        with file:
            return io.BytesIO(_expanded(file, path))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path} cannot be expanded by gzip ({type(error).__name__}); is the download complete?"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from None


def _expanded(file: BinaryIO, path: Path) -> bytes:
    limit = max(EXPANDED_BYTES, EXPANSION * path.stat().st_size)
    found = bytearray()
    with gzip.GzipFile(fileobj=file) as expanded:
        while chunk := expanded.read(CHUNK):
            found += chunk
            if len(found) > limit:
                raise DataError(
                    f"{path} expands to more than {limit} bytes, {EXPANSION} times its size; "
                    "expand it yourself if that is right"
                )
    return bytes(found)


def _raw_lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    try:
        yield from file
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from None


def _require_text(file: BinaryIO, path: Path) -> None:
    head = file.read(32)
    file.seek(0)
    for start, problem in _OTHER_KINDS:
        if head.startswith(start):
            raise DataError(f"{path} {problem}")


def checked(value: Any, depth: int = 0) -> Any:
    """The value with whole numbers as text. Raises InvalidValue for a text that no tokenizer can
    read or that is too long, and for a value that is nested too deep.
    """
    if isinstance(value, str):
        return _checked_text(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list | tuple | dict):
        if depth == DEEPEST:
            raise InvalidValue(f"has more than {DEEPEST} lists and objects in each other")
        if isinstance(value, dict):
            return {
                _checked_text(str(name)): checked(item, depth + 1) for name, item in value.items()
            }
        return [checked(item, depth + 1) for item in value]
    return value


def _checked_text(text: str) -> str:
    if len(text) > LONGEST_TEXT:
        raise InvalidValue(f"has a text of more than {LONGEST_TEXT} characters; divide it")
    if "\0" in text:
        raise InvalidValue("has a NUL character in a text; remove it")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidValue(
            "has half of a surrogate pair in a text (a character cut in two); remove it"
        ) from None
    return text


def text_of(where: str, column: str, value: Any) -> str:
    """A value as text, "" for none. Raises DataError for what is neither text nor a whole number:
    how it would be written is unknown. The error of a spreadsheet is no text.
    """
    if value is None:
        return ""
    if isinstance(value, str) and value.strip() in SPREADSHEET_ERRORS:
        raise DataError(
            f"{where}: the column {column!r} holds {value.strip()}, which a spreadsheet writes in "
            "the place of a text that begins like a formula; take the text from its source"
        )
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return str(value)
    kinds = {list: "a list", dict: "an object", bool: "true or false", float: "a float"}
    kind = kinds.get(type(value), f"of type {type(value).__name__}")
    raise DataError(
        f"{where}: the column {column!r} is neither text nor a number but {kind}; write it as text"
    )
