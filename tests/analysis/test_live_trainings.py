"""The trainings that W&B shows while they run, and what is known of their steps."""

import json
import time
from pathlib import Path
from typing import Any

from ebbline.analysis.wandb.live import LiveRun, live_trainings
from ebbline.analysis.wandb.pages import live_page
from ebbline.cluster.store.artifacts import Store
from ebbline.sweeps.drive.curves import steps_of
from ebbline.sweeps.drive.live import (
    AtWork,
    Gpus,
    Live,
    PointCounts,
    SpentNow,
    TrainingNow,
)
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.identity import digest
from ebbline.tasks.progress import STEPS, ProgressFile, TrainedStep


def test_points_trainings_are_shown_and_alignments_are_not(study: Study, tmp_path: Path) -> None:
    view = StudyView(study, Home(tmp_path))
    view.home.folder(study.study)
    running = []
    about = TrainingNow(model="7b", settings={"data.size": 1024, "train.rank": 32}, seed=1)
    for key, training in (("a" * 64, about), ("b" * 64, None)):
        attempt = view.home.store.begin("train", key)
        (attempt / "log" / "request.json").write_text(json.dumps({"spec": {"rank": 32}}))
        ProgressFile(attempt / "log" / "progress.json").step_done(TrainedStep(1, 9, 2.0, 1e-4, 100))
        running.append(
            AtWork(
                kind="train",
                label="train",
                key=key,
                host="here",
                gpus=1,
                started=0.0,
                expected_s=9.0,
                attempt=attempt.relative_to(view.home.store.root).as_posix(),
                training=training,
            )
        )
    live = Live(
        driver="d",
        at=time.time(),
        started=0.0,
        ended=None,
        points=PointCounts(completed=0, limit=None, in_flight=1),
        stages={},
        gpus=Gpus(total=1, busy=1),
        hosts=[],
        spent=SpentNow(),
        predicted=None,
        left_s=0.0,
        budget={},
        running=running,
        failures=[],
    )
    (view.folder / "live.json").write_text(live.model_dump_json())
    assert list(live_trainings(view)) == [], "nobody drives the study"
    with view.home.driving(study.study):
        (found,) = live_trainings(view)
    assert (found.key, [step.loss for step in found.steps]) == ("a" * 64, [2.0])
    page = live_page(found, "id")
    assert page.name == "7b r=32 n=1,024 seed 1" and "running" in page.tags


def test_a_step_that_the_log_lacks_is_that_of_the_curve_and_none_is_shown_twice(
    tmp_path: Path,
) -> None:
    """A full disk may lose a line of the log."""
    hashed = {"kind": "train", "version": 1, "spec": {"rank": 8}, "inputs": {}}
    store = Store(tmp_path / "store")
    attempt = store.begin("train", digest(hashed))
    rows = "".join(f"{step},{1 / step},0.1,9\n" for step in range(1, 6))
    (attempt / "payload" / "curve.csv").write_text("step,loss,learning_rate,tokens\n" + rows)
    log = [
        {
            "step": step,
            "steps": 5,
            "loss": 1 / step,
            "learning_rate": 0.1,
            "tokens": 9,
            "seconds": 3,
        }
        for step in (1, 2, 4, 5)
    ]
    (attempt / "log" / STEPS).write_text("".join(f"{json.dumps(each)}\n" for each in log))
    steps = steps_of(store.commit(attempt, hashed, {"seconds": 3.0}))
    assert [step.step for step in steps] == [1, 2, 3, 4, 5]
    assert [step.seconds for step in steps] == [3, 3, None, 3, 3]

    class Run:
        shown: list[int] = []

        def log(self, values: dict[str, Any], step: int, commit: bool) -> None:
            assert commit
            self.shown.append(step)

    live = LiveRun(Run(), "key")
    live.show([(step, {}) for step in (1, 2, 4)])
    live.show([(step, {}) for step in (1, 2, 3, 4, 5)])
    assert live.run.shown == [1, 2, 4, 5] and live.rows == 5
