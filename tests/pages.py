"""Follow a documentation page in a new folder: write its files, apply its differences, run its
commands.

A fenced block with a title is a file of that name; later blocks with the same title are appended. A
`diff` block changes a file: it replaces the lines with a space or a minus by those with a space or
a plus; @@ separates two places. In a `console` block, lines that begin with $ are commands. The
lines below must occur in the command's output, apart from numbers.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
_FENCE = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"\d[\d.,e+-]*|\b[0-9a-f]{10,}\b")


@dataclass(frozen=True)
class Block:
    language: str
    title: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [Block(*found) for found in _FENCE.findall(page.read_text("utf-8"))]


def follow(
    page: Path, root: Path, environment: Mapping[str, str], only_files: bool = False
) -> None:
    """Do what a page says, in `root`; raises AssertionError with the output of a command that ended
    otherwise than the page has it.
    """
    written: set[str] = set()
    found = blocks(page)
    assert any(block.language in ("console", "diff") or block.title for block in found), (
        f"{page.name} says nothing to do"
    )
    for block in found:
        if block.language == "diff":
            change(root / block.title, block.text)
        elif block.title:
            path = root / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a" if block.title in written else "w", encoding="utf-8") as file:
                file.write(block.text)
            written.add(block.title)
        elif block.language == "console" and not only_files:
            for command, expected in commands(block.text):
                printed = run(command, root, environment)
                lost = lost_lines(expected, printed)
                assert not lost, f"{page.name}: `{command}` does not say {lost}, but:\n{printed}"


def change(path: Path, diff: str) -> None:
    """Apply a difference whose every part is found once."""
    text = path.read_text("utf-8")
    for part in re.split(r"^@@.*\n", diff, flags=re.MULTILINE):
        lines = part.splitlines()
        strange = [line for line in lines if line[:1] not in (" ", "+", "-")]
        assert not strange, (
            f"{path}: a difference's lines begin with a space, + or -, and these do not: {strange}"
        )
        before = "".join(line[1:] + "\n" for line in lines if line[0] in " -")
        after = "".join(line[1:] + "\n" for line in lines if line[0] in " +")
        assert text.count(before) == 1, (
            f"{path.name} has {text.count(before)} places, and not one, that read:\n{before}"
        )
        text = text.replace(before, after)
    path.write_text(text, "utf-8")


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each command of a console block with its expected lines."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, *expected = part.splitlines()
        yield command, [line for line in expected if line.strip() not in ("", "...")]


def run(command: str, root: Path, environment: Mapping[str, str]) -> str:
    """The output of a page's command. `ebbline` and `python` are those of this environment, with
    the code in `root`.
    """
    words = shlex.split(command)
    own = (
        dict(os.environ)
        | {"PYTHONPATH": str(root), "COLUMNS": "400", "WANDB_MODE": "offline"}
        | dict(environment)
    )
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        own[name] = value
    start = {"ebbline": [sys.executable, "-m", "ebbline.cli"], "python": [sys.executable]}[words[0]]
    done = subprocess.run(
        [*start, *words[1:]],
        cwd=root,
        env=own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"`{command}` ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def lost_lines(expected: list[str], printed: str) -> list[str]:
    """The expected lines that a command did not print."""
    return [line for line in expected if not _found(line, printed)]


def _found(line: str, printed: str) -> bool:
    """Whether a line is among the printed ones, apart from numbers and from what `...` replaces."""
    pieces = [re.escape(_plain(piece)) for piece in line.split("...")]
    return any(re.search(r".*".join(pieces), _plain(there)) for there in printed.splitlines())


def _plain(line: str) -> str:
    return _NUMBER.sub("N", " ".join(re.sub(r"[│|]", " ", line).split()))
