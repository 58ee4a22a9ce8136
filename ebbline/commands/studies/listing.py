"""`ebbline ls`: the studies of a home.

Invariant: it creates nothing, and a study that cannot be read is a row that says so.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ebbline.analysis.results.costs import gpu_hours_label
from ebbline.analysis.results.wording import size_label
from ebbline.bars import progress_bar
from ebbline.cluster.store.places import Folder
from ebbline.cluster.store.retention import Survey
from ebbline.commands.store import needed_by
from ebbline.sweeps.drive.live import Live, read_live
from ebbline.sweeps.state.spending import NAME as LEDGER
from ebbline.sweeps.state.spending import read_spent
from ebbline.sweeps.state.trials import read
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.space import limit
from ebbline.sweeps.study.study import Study
from ebbline.tables import print_table
from ebbline.tasks.errors import EbblineError

STATES = {
    "done": "finished",
    "gain": "finished",
    "request": "stopped",
    "budget": "out of budget",
    "error": "ended by an error",
    None: "killed",
}


@dataclass(frozen=True)
class StudyRow:
    """A study of a home. `bytes` counts its folder and what it needs of the store; None where that
    is unknown, as in a bucket. `total` is None where the study has no limit.
    """

    study: str
    state: str
    done: int = 0
    failed: int = 0
    total: int | None = None
    last_run: float | None = None
    gpu_hours: float = 0.0
    logical: bool = False
    usd: float | None = None
    bytes: int | None = None
    problem: str = ""


def list_studies(home: Home, as_json: bool, wide: bool = False) -> None:
    rows = list(rows_of(home))
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    if not rows:
        print(f"no studies in {home.root}; `ebbline run STUDY` begins one")
        return
    cells = [
        (
            row.study,
            row.state,
            f"{row.done}{'' if row.total is None else f'/{row.total}'}"
            + (f", {row.failed} failed" if row.failed else ""),
            "" if row.last_run is None else _time(row.last_run),
            gpu_hours_label(
                row.gpu_hours, row.usd, "logical GPU-hours" if row.logical else "GPU-hours"
            ),
            "not known" if row.bytes is None else size_label(row.bytes),
        )
        for row in rows
    ]
    print_table(("study", "state", "points", "last run", "spent", "size"), cells, wide)
    for row in rows:
        if row.problem:
            print(f"{row.study}: {row.problem}")


def rows_of(home: Home) -> Iterator[StudyRow]:
    """A row for each study that this home has begun, by name."""
    survey = None
    if isinstance(home.store.place, Folder) and home.store.place.root.is_dir():
        with progress_bar("looking") as progress:
            survey = Survey(home.store, progress)
    for name in home.studies():
        try:
            study = home.begun(name)
            if study is not None:  # nobody removed it meanwhile
                yield _row(home, study, survey)
        except (EbblineError, OSError, ValueError) as error:
            yield StudyRow(name, "cannot be read", problem=str(error))


def _row(home: Home, study: Study, survey: Survey | None) -> StudyRow:
    name, folder = study.study, home.path(study.study)
    counts = Counter(entry.state for entry in read(study, home.database(name))[0])
    spent, live = read_spent(folder), read_live(folder)
    size, problem = None, ""
    if survey is not None:
        try:
            size = folder_bytes(folder) + survey.of(needed_by(study, home).keys)
        except EbblineError as error:
            problem = f"its size is not known: {str(error).splitlines()[0]}"
    return StudyRow(
        name,
        _state(home.holder(name), live),
        counts["done"],
        counts["failed"],
        limit(study),
        _last_run(folder, live),
        spent.cost.gpu_hours,
        set(spent.cost.gpu_s) == {None},
        spent.cost.usd(home.profile),
        size,
        problem,
    )


def _state(holder: str | None, live: Live | None) -> str:
    if holder is not None:
        return "running"
    return "begun" if live is None else STATES[live.ended]


def _last_run(folder: Path, live: Live | None) -> float | None:
    """When the latest driver last wrote."""
    if live is not None:
        return live.at
    return (folder / LEDGER).stat().st_mtime if (folder / LEDGER).exists() else None


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def folder_bytes(folder: Path) -> int:
    total = 0
    for at, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # a driver replaces its files
                total += Path(at, name).lstat().st_size
    return total
