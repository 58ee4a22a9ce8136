"""The pages of a study as plain files, for trackers other than W&B (MLflow, Aim, a notebook).

    FOLDER/study.json                   question, objectives, seeds
    FOLDER/points.csv                   a row for each finished point
    FOLDER/runs/ID/run.json             id, name, job type, tags, notes, status, config, summary
    FOLDER/runs/ID/history.csv          of a training: a row for each step

The content is that of the W&B runs (ebbline.analysis.wandb.pages), so no prompt, completion, host
or path is in it. Every file is replaced whole. A run that has not changed is not written again.
"""

import csv
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ebbline.analysis.wandb.pages import RunPage, Table, pages, points_table
from ebbline.cluster.profile import Profile
from ebbline.cluster.store.artifacts import Artifact
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study
from ebbline.tasks.files import write_whole

RUNS, STUDY, POINTS = "runs", "study.json", "points.csv"


def write_pages(
    folder: Path,
    study: Study,
    results: Sequence[Result],
    trainings: Sequence[Artifact],
    profile: Profile,
    home_id: str,
    hosts: Collection[str] = (),
) -> int:
    """Write the study's pages into the folder. Returns how many runs were new or had changed."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "study": study.study,
        "question": study.question,
        "objectives": list(study.objectives),
        "seeds": list(study.seeds),
    }
    _write_json(folder / STUDY, about)
    _write_table(folder / POINTS, points_table(results, profile, study.objectives))
    every = pages(study, results, trainings, profile, home_id, hosts)
    return sum(_write_run(folder / RUNS / page.id, page) for page in every)


def _write_run(folder: Path, page: RunPage) -> bool:
    run = {
        "id": page.id,
        "stamp": page.stamp,
        "name": page.name,
        "job_type": page.job_type,
        "tags": list(page.tags),
        "notes": page.notes,
        "status": "failed" if page.failed else "finished",
        "config": dict(page.config),
        "summary": dict(page.summary),
    }
    path = folder / "run.json"
    if path.exists() and json.loads(path.read_text()).get("stamp") == page.stamp:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    if page.history:
        names = sorted({name for _, values in page.history for name in values})
        rows = [[step, *map(values.get, names)] for step, values in page.history]
        _write_table(folder / "history.csv", Table(["step", *names], rows))
    _write_json(path, run)  # last: it says that the run is whole
    return True


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
    write_whole(path, lambda fresh: fresh.write_text(text))


def _write_table(path: Path, table: Table) -> None:
    def write(fresh: Path) -> None:
        with fresh.open("w", newline="") as handle:
            csv.writer(handle).writerows([table.columns, *table.rows])

    write_whole(path, write)
