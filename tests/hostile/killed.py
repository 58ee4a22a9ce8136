"""What a kill at any write, a full disk or a read-only one leaves of a home.

`python -m tests.hostile.killed FOLDER` does each operation in a child process that is killed before
its first, second, ... change of the disk; then with files of limited length; then with every change
refused. After each it compares the home with what was there before. It prints JSON: operation ->
how often it was tried, and what was lost.
"""

import errno
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ebbline.cluster.store.artifacts import Store
from ebbline.cluster.store.retention import Survey, remove
from ebbline.sweeps.ledger import open_to_append, whole_lines
from ebbline.sweeps.state.home_studies import rename
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.pins import pin_study
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.study_file import parse
from ebbline.tasks.errors import EbblineError
from ebbline.tasks.files import is_unfinished, remove_stale, write_whole
from ebbline.tasks.identity import digest
from tests.hostile.cases import study

CHANGES = {
    *("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod"),
    *("shutil.move", "shutil.copyfile", "shutil.rmtree", "os.symlink"),
}
LIMITS = (0, 1, 10, 100, 1000, 4000)  # bytes of a file
FEW = "2 lines\n"
ROWS = '{"prompt": "What is a zorp?", "completion": "A tarn."}\n'
YAML = study(data="{pool: {path: {path: rows.jsonl}}, settings: {size: 1}}")
OLD, NEW = "old table\n" * 500, "new table\n" * 500


def old_study() -> str:
    return frozen("old")


def frozen(question: str) -> str:
    found = parse(Path("study.yaml"), study(question=question))
    return json.dumps(found.model_dump(mode="json"), indent=1)


def hashed(number: int) -> dict[str, Any]:
    return {"kind": "data", "number": number}


def commit(store: Store, number: int) -> None:
    attempt = store.begin("data", digest(hashed(number)))
    for name in ("a.jsonl", "deep/b.jsonl"):
        path = attempt / "payload" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{name} {number}\n" * 200)
    store.commit(attempt, hashed(number), {})


def prepare(folder: Path) -> None:
    (folder / "rows.jsonl").write_text(ROWS)
    (folder / "study.yaml").write_text(YAML)
    (folder / "table.csv").write_text(OLD)
    home = Home(folder / "home")
    home.keep("mine", frozen("old"))
    with open_to_append(home.path("mine") / "spending.jsonl") as file:
        file.write('{"s": 1}\n{"s": 2}\n')
    commit(home.store, 0)


def _append(folder: Path) -> None:
    with open_to_append(folder / "home" / "studies" / "mine" / "spending.jsonl") as file:
        file.write('{"s": 3}\n')


OPERATIONS: dict[str, Callable[[Path], object]] = {
    "study.json": lambda folder: Home(folder / "home").keep("mine", frozen("new")),
    "table": lambda folder: write_whole(folder / "table.csv", lambda path: path.write_text(NEW)),
    "ledger": _append,
    "store": lambda folder: commit(Home(folder / "home").store, 1),
    "pin": lambda folder: list(pin_study("study.yaml", folder / "pinned.yaml")),
    "rename": lambda folder: rename(Home(folder / "home"), "mine", "other"),
}


def effect(operation: str, folder: Path) -> bool:
    """Whether an operation that reported no error has done what it was asked."""
    home = Home(folder / "home")
    match operation:
        case "study.json":
            begun = home.begun("mine")
            return begun is not None and begun.question == "new"
        case "table":
            return (folder / "table.csv").read_text() == NEW
        case "ledger":
            return list(whole_lines(home.path("mine") / "spending.jsonl"))[-1] == '{"s": 3}'
        case "store":
            return home.store.find("data", digest(hashed(1))) is not None
        case "pin":
            return (folder / "pinned.yaml").exists()
        case _:
            return home.studies() == ["other"]


def leftovers(operation: str, folder: Path) -> list[str]:
    """What is unfinished after the same commands were given a day later, and `store gc`."""
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (0, 0))
    with suppress(EbblineError):  # it was done before
        OPERATIONS[operation](folder)
    home = Home(folder / "home")
    for name in home.studies():
        home.keep(name, home.kept(name))
    remove(home.store, Survey(home.store).removable(None, 1.0))
    remove_stale(home.root / "id")
    return [path.name for path in folder.rglob("*") if is_unfinished(path.name) or "#" in path.name]


def faults(folder: Path) -> list[str]:
    """What of the home before is lost, or half there."""
    found = []
    if (folder / "rows.jsonl").read_text() != ROWS or (folder / "study.yaml").read_text() != YAML:
        found.append("a file of the user's changed")
    if (folder / "table.csv").read_text() not in (OLD, NEW):
        found.append("the table is neither the old nor the new one")
    home = Home(folder / "home")
    names = home.studies()
    if names not in (["mine"], ["other"]):
        found.append(f"the studies are {names}")
    for name in names:
        begun = home.begun(name)
        if begun is None or begun.question not in ("old", "new") or not isinstance(begun, Study):
            found.append("study.json is neither the old nor the new one")
        if list(whole_lines(home.path(name) / "spending.jsonl"))[:2] != ['{"s": 1}', '{"s": 2}']:
            found.append("the ledger lost a line")
    for number in (0, 1):
        try:
            artifact = home.store.find("data", digest(hashed(number)))
            if artifact is None and number == 0:
                found.append("the artifact is gone")
            for name in artifact.files if artifact else ():
                artifact.file(name)  # compared with its record
        except EbblineError as error:
            found.append(str(error))
    if (folder / "pinned.yaml").exists():
        parse(folder / "pinned.yaml")
    return found


def _watch(at: int, root: Path, act: Callable[[], None]) -> None:
    """Call `act` before change number `at` of the disk below `root`, or before all if it is 0."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & 0o3
        if not writes and event not in CHANGES:
            return
        if not str(arguments[0]).startswith(str(root)):
            return
        seen += 1
        if at in (0, seen):
            act()

    sys.addaudithook(hook)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _refuse() -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), "the home")


def child(operation: str, folder: Path, prepare_child: Callable[[], None]) -> int:
    """The exit status of an operation in a child; its errors are those that a command explains."""
    number = os.fork()
    if number == 0:
        code = 2
        try:
            os.chdir(folder)
            prepare_child()
            OPERATIONS[operation](folder)
            code = 0
        except (EbblineError, OSError):
            code = 1
        finally:
            os._exit(code)
    return os.waitpid(number, 0)[1]


def tried(operation: str, template: Path, work: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"kills": 0, "limits": 0, "refusals": 0, "lost": []}

    def once(what: str, prepare_child: Callable[[], None]) -> int:
        shutil.copytree(template, work)
        status = child(operation, work, prepare_child)
        lost = faults(work)
        if what != "kills":
            left = [path for path in work.rglob("*") if is_unfinished(path.name)]
            lost += [f"{path} was left" for path in left]
        found["lost"] += [f"{what}: {each}" for each in lost]
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 2:
            found["lost"].append(f"{what}: an error that no command explains")
        found[what] += 1
        shutil.rmtree(work)
        return status

    at = 1
    while os.WIFSIGNALED(once("kills", lambda at=at: _watch(at, work, _die))):  # type: ignore[misc]
        at += 1
    for limit in LIMITS:
        once("limits", lambda most=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)))  # type: ignore[misc]
    once("refusals", lambda: _watch(0, work, _refuse))
    return found


def main(folder: Path) -> None:
    template = folder / "template"
    template.mkdir()
    number = os.fork()  # the parent must not have used the store: its threads do not fork
    if number == 0:
        prepare(template)
        os._exit(0)
    os.waitpid(number, 0)
    print(json.dumps({name: _in_child(name, template, folder) for name in OPERATIONS}, indent=1))


def _in_child(operation: str, template: Path, folder: Path) -> dict[str, Any]:
    reader, writer = os.pipe()
    number = os.fork()
    if number == 0:
        os.write(writer, json.dumps(tried(operation, template, folder / operation)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    os.waitpid(number, 0)
    found: dict[str, Any] = json.loads(text)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
