"""Homes whose files are damaged or hostile. Each case begins with a finished study, `tiny`."""

import shutil
from collections.abc import Callable
from pathlib import Path

from tests.hostile.cases import Case, Content, Make

HOME = Path("home")
TINY = HOME / "studies" / "tiny"
DEEP = "[" * 100_000


def holding(file: Path, content: Content) -> Make:
    def make(folder: Path) -> None:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def changed(change: Callable[[Path], None]) -> Make:
    return change


def as_folder(file: Path) -> Make:
    def make(folder: Path) -> None:
        path = folder / file
        if path.is_file():
            path.unlink()
        path.mkdir(parents=True, exist_ok=True)

    return make


def linked(file: Path, target: str) -> Make:
    def make(folder: Path) -> None:
        path = folder / file
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return make


def cut(file: Path) -> Make:
    """The first half of a file."""

    def make(folder: Path) -> None:
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: len(data) // 2])

    return make


def records(content: Content) -> Make:
    """Every record of the store with this content."""

    def make(folder: Path) -> None:
        for path in (folder / HOME / "store").glob("*/*/record.json"):
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


DAMAGES: dict[str, Make] = {
    "study_empty": holding(TINY / "study.json", ""),
    "study_not_json": holding(TINY / "study.json", "hello"),
    "study_deep": holding(TINY / "study.json", DEEP),
    "study_digits": holding(TINY / "study.json", '{"study": ' + "9" * 5000 + "}"),
    "study_utf16": holding(TINY / "study.json", "{}".encode("utf-16")),
    "study_list": holding(TINY / "study.json", "[]"),
    "study_folder": as_folder(TINY / "study.json"),
    "study_cut": cut(TINY / "study.json"),
    "study_loop": linked(TINY / "study.json", "study.json"),
    "database_empty": holding(TINY / "optuna.db", ""),
    "database_text": holding(TINY / "optuna.db", "hello, I am no database at all" * 100),
    "database_cut": cut(TINY / "optuna.db"),
    "database_folder": as_folder(TINY / "optuna.db"),
    "database_loop": linked(TINY / "optuna.db", "optuna.db"),
    "spending_text": holding(TINY / "spending.jsonl", "hello\n"),
    "spending_binary": holding(TINY / "spending.jsonl", b"\xff\xfe\x00\n"),
    "spending_deep": holding(TINY / "spending.jsonl", DEEP + "\n"),
    "spending_digits": holding(TINY / "spending.jsonl", "9" * 5000 + "\n"),
    "spending_list": holding(TINY / "spending.jsonl", "[]\n"),
    "plans_text": holding(TINY / "plans.jsonl", "hello\n"),
    "plans_binary": holding(TINY / "plans.jsonl", b"\xff\xfe\x00\n"),
    "plans_deep": holding(TINY / "plans.jsonl", DEEP + "\n"),
    "cache_text": holding(TINY / "results.cache", "hello\nhello\n"),
    "cache_binary": holding(TINY / "results.cache", b"\xff\xfe\x00\n"),
    "cache_deep": holding(TINY / "results.cache", DEEP + "\n"),
    "cache_outputs": holding(TINY / "outputs.cache", DEEP),
    "live_text": holding(TINY / "live.json", "hello"),
    "live_binary": holding(TINY / "live.json", b"\xff\xfe"),
    "live_deep": holding(TINY / "live.json", DEEP),
    "timeline_text": holding(TINY / "timeline.jsonl", "hello\n"),
    "timeline_binary": holding(TINY / "timeline.jsonl", b"\xff\xfe\n"),
    "file_binary": holding(TINY / "file", b"\xff\xfe"),
    "file_nul": holding(TINY / "file", "a\0b.yaml"),
    "file_empty": holding(TINY / "file", ""),
    "file_long": holding(TINY / "file", "a" * 5000 + ".yaml"),
    "file_device": holding(TINY / "file", "/dev/zero"),
    "file_folder": as_folder(TINY / "file"),
    "points_name_binary": holding(TINY / "points_name", b"\xff\xfe"),
    "points_name_other": holding(TINY / "points_name", "other"),
    "lock_folder": as_folder(TINY / "driver.lock"),
    "lock_binary": holding(TINY / "driver.lock", b"\xff\xfe"),
    "picks_text": holding(TINY / "picks.json", "hello"),
    "picks_deep": holding(TINY / "picks.json", DEEP),
    "parquet_text": holding(TINY / "results.parquet", "hello"),
    "profile_utf16": holding(HOME / "cluster.yaml", "tries: 3".encode("utf-16")),
    "profile_list": holding(HOME / "cluster.yaml", "- a"),
    "profile_deep": holding(HOME / "cluster.yaml", DEEP),
    "profile_python": holding(HOME / "cluster.yaml", "store: !!python/object/apply:os.getcwd []"),
    "profile_unknown": holding(HOME / "cluster.yaml", "stoer: a"),
    "profile_negative": holding(HOME / "cluster.yaml", "tries: -1"),
    "profile_password": holding(HOME / "cluster.yaml", "storage: postgresql://me:hunter2@x/y"),
    "profile_storage": holding(HOME / "cluster.yaml", "storage: mysql://x/y"),
    "profile_storage_text": holding(HOME / "cluster.yaml", "storage: not a url"),
    "profile_store_url": holding(HOME / "cluster.yaml", "store: gopher://x/y"),
    "profile_store_keys": holding(HOME / "cluster.yaml", "store: 's3://key:hunter2@bucket/x'"),
    "profile_store_user": holding(HOME / "cluster.yaml", "store: ~nobody_here/store"),
    "profile_folder": as_folder(HOME / "cluster.yaml"),
    "profile_loop": linked(HOME / "cluster.yaml", "cluster.yaml"),
    "records_empty": records(""),
    "records_text": records("hello"),
    "records_deep": records(DEEP),
    "records_list": records("[]"),
    "records_binary": records(b"\xff\xfe"),
    "records_digits": records("9" * 5000),
    "store_is_a_file": changed(
        lambda folder: (
            shutil.rmtree(folder / HOME / "store"),
            (folder / HOME / "store").write_text("a"),
        )[0]
    ),
    "store_loop": linked(HOME / "store", "store"),
    "studies_loop": linked(HOME / "studies", "studies"),
    "home_is_a_file": changed(
        lambda folder: (shutil.rmtree(folder / HOME), (folder / HOME).write_text("a"))[0]
    ),
    "id_folder": as_folder(HOME / "id"),
    "id_binary": holding(HOME / "id", b"\xff\xfe"),
    "digests_deep": holding(HOME / "digests.json", DEEP),
}
BEGUN, NONE = "2 points done", "0 points done"
BROKEN = "study.json cannot be read"
LINE = "spending.jsonl, line 1 is damaged"
# damage -> exit code and phrase of `ebbline status`
STATUS: dict[str, tuple[int, str]] = {
    **{name: (1, BROKEN) for name in DAMAGES if name.startswith("study_")},
    "study_loop": (1, "ships no study"),
    "database_empty": (0, NONE),
    "database_text": (1, "is no database any more"),
    "database_cut": (1, "is no database any more"),
    "database_folder": (75, "cannot be used"),
    "database_loop": (0, NONE),
    "spending_text": (1, LINE),
    "spending_binary": (1, "spending.jsonl:1 is not UTF-8 text"),
    "spending_deep": (1, "nested too deeply"),
    "spending_digits": (1, LINE),
    "spending_list": (1, LINE),
    **{
        name: (0, BEGUN)
        for name in DAMAGES
        if name.startswith(("plans_", "cache_", "live_", "timeline_", "picks_", "parquet_"))
    },
    "lock_binary": (0, BEGUN),
    "lock_folder": (1, "driver.lock cannot be used: it is a folder"),
    "file_empty": (0, BEGUN),
    "file_folder": (0, BEGUN),
    "file_device": (0, BEGUN),
    "file_binary": (1, "file is damaged"),
    "file_nul": (1, "file is damaged"),
    "file_long": (1, "file is damaged"),
    "points_name_binary": (1, "points_name is damaged"),
    "points_name_other": (0, NONE),
    "profile_utf16": (1, "cluster.yaml:1 is not UTF-8 text"),
    "profile_list": (1, "must be a mapping"),
    "profile_deep": (1, "nested over"),
    "profile_python": (1, "line 1: could not determine a constructor"),
    "profile_unknown": (1, "did you mean 'store'?"),
    "profile_negative": (1, "tries"),
    "profile_password": (1, "holds a password"),
    "profile_storage": (1, "asks for mysql"),
    "profile_storage_text": (1, "is not the URL of a database"),
    "profile_store_url": (1, "is no valid place for a store"),
    "profile_store_keys": (1, "without keys"),
    "profile_store_user": (1, "write the whole path"),
    "profile_folder": (1, "cluster.yaml is not a file"),
    "profile_loop": (1, "cluster.yaml is not a file"),
    **{name: (1, "record.json is damaged") for name in DAMAGES if name.startswith("records_")},
    "store_is_a_file": (1, "is a file"),
    "store_loop": (1, "cannot be found"),
    "studies_loop": (1, "ships no study"),
    "home_is_a_file": (1, "a home is a folder"),
    "id_folder": (0, BEGUN),
    "id_binary": (0, BEGUN),
    "digests_deep": (0, BEGUN),
}
# damage -> a phrase of `ebbline store gc`, which lists what it would remove: nothing here
KEPT: dict[str, str] = {
    "study_empty": BROKEN,
    "study_deep": BROKEN,
    "study_cut": BROKEN,
    "study_folder": BROKEN,
    "database_empty": "has results, but",
    "database_text": "is no database any more",
    "database_cut": "is no database any more",
    "database_folder": "cannot be used",
    "database_loop": "has results, but",
    "points_name_other": "has results, but",
    "file_binary": "file is damaged",
}
SECRET = "hunter2"
CASES = [
    *(
        Case(
            f"{damage}_status",
            "status tiny --home home",
            phrase,
            DAMAGES[damage],
            code,
            has_home=True,
        )
        for damage, (code, phrase) in STATUS.items()
    ),
    *(
        Case(
            f"{damage}_gc",
            "store gc --older-than-h 0 --yes --home home",
            phrase,
            DAMAGES[damage],
            0,
            ("home/studies/tiny/driver.lock",),
            has_home=True,
        )
        for damage, phrase in KEPT.items()
    ),
    *(
        Case(f"{damage}_verify", "store verify --home home", "record.json", make, 1, has_home=True)
        for damage, make in DAMAGES.items()
        if damage.startswith("records_")
    ),
    *(
        Case(f"{damage}_ls", "ls --home home", "tiny", DAMAGES[damage], 0, has_home=True)
        for damage in ("study_deep", "study_cut", "database_text", "file_binary", "records_text")
    ),
    *(
        Case(f"{damage}_{name}", f"{words} --home home", phrase, DAMAGES[damage], 1, has_home=True)
        for name, words in (("pick", "pick tiny"), ("papers", "papers tiny"))
        for damage, phrase in (
            ("study_cut", BROKEN if name == "papers" else "study"),
            ("database_text", "is no database any more"),
            ("profile_deep", "nested over"),
            ("home_is_a_file", "a home is a folder"),
        )
    ),
]
