"""Kills and errors at every system call that changes the disk, by `strace --inject`.

`python -m tests.hostile.syscalls FOLDER` does each operation of tests.hostile.killed in a child
that strace attaches to. For each system call, its first, second, ... use kills the child, until a
child passes; then each use fails with an error of a full or faulty disk. After each it compares the
home with what was there before. It prints JSON: operation -> how often, and what was lost.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ebbline.tasks.errors import EbblineError
from ebbline.tasks.files import is_unfinished
from ebbline.tasks.identity import digest
from tests.hostile.killed import OPERATIONS, effect, faults, hashed, leftovers, prepare

CALLS = ("write", "fsync", "rename", "linkat", "unlink", "mkdir", "fchmod", "ftruncate")
ERRORS = {
    "write": ("ENOSPC", "EDQUOT", "EIO"),
    "fsync": ("ENOSPC", "EDQUOT", "EIO"),
    "rename": ("ENOSPC", "EIO"),
    "linkat": ("ENOSPC", "EDQUOT", "EIO"),
    "mkdir": ("ENOSPC", "EDQUOT"),
}
MOST = 40  # uses of one system call by one operation


def child(operation: str, folder: Path, inject: str, only: Path | None) -> int:
    """The wait status of an operation in a child, with this injection; -1 without strace."""
    reader, writer = os.pipe()
    number = os.fork()
    if number == 0:
        code = 2
        try:
            os.read(reader, 1)  # strace has attached
            os.chdir(folder)
            OPERATIONS[operation](folder)
            code = 0
        except (EbblineError, OSError):
            code = 1
        finally:
            os._exit(code)
    call = inject.partition(":")[0]
    command = ["strace", "-f", "-o", os.devnull, "-e", f"trace={call}", "-e", f"inject={inject}"]
    if only is not None:
        command += ["-P", str(only)]
    with subprocess.Popen([*command, "-p", str(number)], stderr=subprocess.PIPE) as tracer:
        assert tracer.stderr is not None
        said = tracer.stderr.readline().decode()
        assert "attached" in said, said
        os.write(writer, b"x")
        status = os.waitpid(number, 0)[1]
    os.close(reader)
    os.close(writer)
    return status


def cleaned(operation: str, work: Path) -> list[str]:
    """What stays unfinished, found in a child: the store starts threads."""
    reader, writer = os.pipe()
    number = os.fork()
    if number == 0:
        os.chdir(work)
        os.write(writer, json.dumps(leftovers(operation, work)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        names = json.loads(file.read() or '["the next command failed"]')
    os.waitpid(number, 0)
    return [f"{name} stays" for name in names]


def tried(operation: str, template: Path, work: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"kills": 0, "errors": 0, "lost": []}
    # obstore writes a record in a thread of its own, and strace counts for each thread
    record = work / "home" / "store" / "data" / digest(hashed(1)) / "record.json#1"
    places = [(call, None) for call in CALLS]
    if operation == "store":
        places.append(("write", record))

    def once(what: str, inject: str, only: Path | None) -> int:
        shutil.copytree(template, work)
        status = child(operation, work, inject, only)
        lost = faults(work)
        if what == "errors":
            passed = os.WEXITSTATUS(status)
            if not os.WIFEXITED(status) or passed == 2:
                lost.append("an error that no command explains")
            elif passed == 0 and not effect(operation, work):
                lost.append("no error was reported, and nothing was done")
            lost += [p.name for p in work.rglob("*") if is_unfinished(p.name) or "#" in p.name]
        lost += cleaned(operation, work)
        found["lost"] += [f"{inject} {only or ''}: {each}" for each in lost]
        shutil.rmtree(work)
        return status

    for call, only in places:
        uses = 1
        while os.WIFSIGNALED(once("kills", f"{call}:signal=KILL:when={uses}", only)):
            uses += 1
            assert uses < MOST, f"{operation} uses {call} without an end"
        found["kills"] += uses - 1
        for error in ERRORS.get(call, ()):
            for use in range(1, uses):
                once("errors", f"{call}:error={error}:when={use}", only)
                found["errors"] += 1
    return found


def main(folder: Path) -> None:
    template = folder / "template"
    template.mkdir()
    results = {}
    for name in ("template", *OPERATIONS):
        reader, writer = os.pipe()
        number = os.fork()  # a process that has used the store has threads, and does not fork
        if number == 0:
            os.close(reader)
            if name == "template":
                prepare(template)
            else:
                result = json.dumps(tried(name, template, folder / name))
                os.write(writer, result.encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as file:
            text = file.read()
        os.waitpid(number, 0)
        if name != "template":
            results[name] = json.loads(text)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
