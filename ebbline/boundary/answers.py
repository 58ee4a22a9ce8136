"""The boundary between the world and the terminal: each exception becomes one message and an exit
code. What happens outside ebbline (disks, permissions, damaged files, other libraries) is a
sentence with the file and the remedy. EBBLINE_DEBUG=1 or `--traceback` shows the traceback too.

Invariant: a message holds no control character and no input of a library's error, which may be a
completion.
"""

import os
import re
import sys
import sysconfig
import traceback
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ebbline.boundary.system import REMEDIES
from ebbline.tasks.errors import ClusterLost, DatabaseLost, EbblineError, StudyHeld

DEBUG = "EBBLINE_DEBUG"
# Exit codes of EXIT_CODES in ebbline.options. LOST is EX_TEMPFAIL of sysexits.h: trying again may
# succeed.
FAILED, HELD, LOST = 1, 4, 75
LONGEST = 400  # characters of a name, and of a library's own message
_LONG_WORD = re.compile(rf"\S{{{LONGEST + 1},}}")
MORE = f"`--traceback` (or {DEBUG}=1) shows where"
PACKAGE = Path(__file__).resolve().parents[1]
# The folders of ebbline's own code: in a clone some are links to folders beside the package
OWN = (PACKAGE, *(folder.resolve() for folder in sorted(PACKAGE.iterdir()) if folder.is_symlink()))
# Modules of the standard library whose errors say that a file is damaged
_READERS = ("json", "zipfile", "zlib", "gzip", "csv", "xml", "tarfile", "struct", "lzma", "bz2")
# By name, so that `--help` imports none of them
_DATABASES = {("sqlite3", "Error"), ("sqlalchemy", "SQLAlchemyError")}
# What a library raises for a call that does not fit. No file is damaged then: the call is ebbline's
_MISUSES = (TypeError, AttributeError, LookupError, AssertionError, NameError)
_MISFIT = re.compile(
    r"shapes? .*(cannot|not aligned)|size of tensor|could not be broadcast|must match the size"
    r"|index .*out of (range|bounds)|to have the same dtype|tensors? to be on the same device"
)
_ENDLESS = 100  # own frames of a RecursionError that no reader of a file leaves
_DAMAGED = "Is it damaged, or of another kind? Restore it from a copy, or make it again"


@dataclass(frozen=True)
class Answer:
    """What is printed for an exception, its class in JSON, and the exit code."""

    text: str
    kind: str
    code: int = FAILED


def answer_to(error: BaseException) -> Answer:
    """The message for an exception. The message of an EbblineError is its own."""
    kind = type(error).__name__
    if isinstance(error, EbblineError):
        lost = isinstance(error, ClusterLost | DatabaseLost)
        code = HELD if isinstance(error, StudyHeld) else LOST if lost else FAILED
        return Answer(printable(str(error)), kind, code)
    return Answer(printable(f"{_sentence(error)} ({MORE})"), kind)


def debugging() -> bool:
    """Whether tracebacks are asked for."""
    return os.environ.get(DEBUG, "0") not in ("", "0")


def printable(text: str) -> str:
    """The text with its control characters and direction marks written as escapes: in a terminal
    they could hide or forge what is shown. Names of absurd length are cut.
    """
    text = _LONG_WORD.sub(lambda word: _short(word[0]), text)
    return "".join(
        letter
        if letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cf", "Cs")
        else letter.encode("unicode_escape", "backslashreplace").decode("ascii")
        for letter in text
    )


def _sentence(error: BaseException) -> str:
    file = _file_of(error)
    there = "a file" if file is None else _short(str(file))
    if isinstance(error, OSError) and error.errno is not None:
        return _of_system(error, there)
    if isinstance(error, UnicodeDecodeError):
        return (
            f"{there}{_line_of(error, file)} is not UTF-8 text (byte {error.start}: "
            f"{error.reason}). Save it as UTF-8, or check that it is the right file"
        )
    if isinstance(error, UnicodeEncodeError):
        return (
            f"a text holds a character that {error.encoding} cannot write (half of a surrogate "
            "pair, or a file name that is not UTF-8). Remove it, or rename the file"
        )
    if (
        isinstance(error, RecursionError)
        and sum(_is_own(at) for at, _ in _frames(error)) < _ENDLESS
    ):
        return f"{there} is nested too deeply to be read. Make it flatter"
    if isinstance(error, RuntimeError) and "Symlink loop" in str(error):
        return f"the links of a path lead in a circle: {_first_line(error)}. Remove the links"
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return "a path begins with `~` and a user that is not known here. Write the whole path"
    if _is_out_of_memory(error):
        return "the machine has too little memory. Give a smaller limit or batch, or more memory"
    names = {(each.__module__.partition(".")[0], each.__name__) for each in type(error).__mro__}
    if ("pydantic_core", "ValidationError") in names:
        return f"{there} is not valid: {_faults_of(error)}. {_DAMAGED}"
    if names & _DATABASES:
        return (
            f"the database {there} cannot be used: {_first_line(error)}. {_DAMAGED}; the finished "
            "stages are in the store and are not lost"
        )
    module = type(error).__module__.partition(".")[0]
    if module.removeprefix("_") in _READERS or isinstance(error, EOFError):
        return f"{there} cannot be read: {_first_line(error)}. {_DAMAGED}"
    library = _library_of(error)
    about = "" if library is None or file is None else f" about {there}"
    if library is not None and not _is_misuse(error):
        return f"{library} reports{about}: {_first_line(error)}. {_DAMAGED}"
    return (
        f"ebbline has a fault at {_place_of(error)}{about}: {_first_line(error)}. Please report "
        "it, with the command and the traceback"
    )


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine or its GPU lacks memory. torch says so in errors of its own."""
    of_gpu = any(each.__name__ == "OutOfMemoryError" for each in type(error).__mro__)
    of_torch = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or of_gpu or of_torch


def _is_misuse(error: BaseException) -> bool:
    """Whether a library was called with what does not fit, so that the fault is ebbline's. Errors
    that a library defines say that a file is not as it should be.
    """
    if type(error).__module__ != "builtins":
        return False
    misfits = isinstance(error, RuntimeError | ValueError) and _MISFIT.search(str(error))
    return isinstance(error, _MISUSES) or bool(misfits)


def _faults_of(error: Any) -> str:
    """The first faults of pydantic's error, without the input: it may be a completion."""
    faults = error.errors(include_input=False, include_url=False, include_context=False)
    return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in faults[:3])


def _of_system(error: OSError, there: str) -> str:
    names = [each for each in (error.filename, error.filename2) if isinstance(each, str | bytes)]
    named = " to ".join(_short(os.fsdecode(each)) for each in names) or there
    reason, remedy = REMEDIES.get(
        error.errno or 0, (error.strerror or type(error).__name__, "Check the path and the disk")
    )
    return f"{named} cannot be used: {reason}. {remedy}"


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST // 2]}…{name[-LONGEST // 2 :]}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = type(error).__name__
    if not lines:
        return kind
    text = lines[0] if len(lines[0]) <= LONGEST else f"{lines[0][: LONGEST - 1]}…"
    return f"{kind}: {text.rstrip('.')}"


def _line_of(error: UnicodeDecodeError, file: Path | None) -> str:
    """`:LINE` of an undecodable byte, when the whole file was decoded at once."""
    if file is None or not _is_file(file) or file.stat().st_size != len(error.object):
        return ""
    return f":{error.object.count(bytes([10]), 0, error.start) + 1}"


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """The frames of an exception with their lines, the innermost first."""
    yield from reversed(list(traceback.walk_tb(error.__traceback__)))


def _is_own(frame: FrameType) -> bool:
    return _own_path(frame) is not None


def _own_path(frame: FrameType) -> Path | None:
    """The path of ebbline's code from the folder that holds it; None for other code."""
    path = Path(frame.f_code.co_filename).resolve()
    return next((path.relative_to(own.parent) for own in OWN if path.is_relative_to(own)), None)


def _file_of(error: BaseException) -> Path | None:
    """The file that ebbline's innermost function with a path was busy with. Only paths are read
    from a frame: other values may be completions.
    """
    for frame, _ in _frames(error):
        if _is_own(frame) and frame.f_code.co_filename != __file__:
            paths = [value for value in frame.f_locals.values() if isinstance(value, Path)]
            if paths:
                return next((path for path in reversed(paths) if _is_file(path)), paths[-1])
    return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no disk can have
        return False


def _library_of(error: BaseException) -> str | None:
    """The package that raised an exception; None for ebbline's own code."""
    for frame, _ in _frames(error):
        if _is_own(frame):
            break
        parts = Path(frame.f_code.co_filename).parts
        if "site-packages" in parts:
            return parts[parts.index("site-packages") + 1].removesuffix(".py")
    module = type(error).__module__.partition(".")[0]
    known = module in sys.stdlib_module_names or module in ("ebbline", "__main__")
    return None if known else module


def _place_of(error: BaseException) -> str:
    for frame, line in _frames(error):
        if (path := _own_path(frame)) is not None:
            return f"{path}:{line}"
    standard = sysconfig.get_paths()["stdlib"]
    for frame, line in _frames(error):
        return f"{frame.f_code.co_filename.removeprefix(standard)}:{line}"
    return "an unknown place"
