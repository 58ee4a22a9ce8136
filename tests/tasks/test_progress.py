"""Progress: what a worker writes, and what a driver reads."""

import json
import shutil

from ebbline.tasks import progress
from ebbline.tasks.progress import STEPS, ProgressFile, StageProgress, TrainedStep, read_steps
from tests.clock import Clock


def test_progress_counts_from_the_first_step_of_this_attempt(tmp_path, monkeypatch):
    path, clock = tmp_path / "progress.json", Clock()
    monkeypatch.setattr(progress, "time", clock)
    file = ProgressFile(path)
    file.count(50, 99, "resumed at the fiftieth")
    clock.sleep(0.75)
    file.count(51, 99, "one more")
    content = json.loads(path.read_text())
    assert (content["done"], content["own"], content["own_seconds"]) == (51, 2, 0.75)


def test_a_step_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "progress.json"
    ProgressFile(path).step_done(TrainedStep(6, 6, 0.3125, 1e-4, 512))
    found = StageProgress.of(json.loads(path.read_text()))
    assert found == StageProgress(6, 6, loss=0.3125, learning_rate=1e-4)


def test_a_file_of_an_earlier_version_is_read_with_its_loss_in_the_note():
    content = {"done": 1, "total": 3, "note": "loss 0.310", "seconds": 2.0, "own": 1}
    assert StageProgress.of(content) == StageProgress(1, 3, "loss 0.310")


def test_progress_does_not_recreate_the_folder_of_a_discarded_attempt(tmp_path):
    file = ProgressFile(tmp_path / "log" / "progress.json")
    (tmp_path / "log").mkdir()
    file.count(1, 2, "items")
    shutil.rmtree(tmp_path / "log")
    file.count(2, 2, "items")
    assert not any(tmp_path.iterdir())


def test_each_step_of_a_training_is_a_line_and_an_attempt_that_continues_has_all_of_them(tmp_path):
    log = tmp_path / "log"
    log.mkdir()
    file = ProgressFile(log / "progress.json")
    kept = [TrainedStep(step, 4, 1.0 / step, 1e-4, 100) for step in (1, 2)]
    done = TrainedStep(3, 4, 0.25, 1e-4, 100, seconds=0.5, gradient_norm=2.0, micro_batch=8)
    file.resumed(kept)
    file.step_done(done)
    file.step_done(done)  # a step stands once
    text = (log / STEPS).read_bytes()
    assert list(read_steps(text)) == [*kept, done]
    assert list(read_steps(text + b'{"step": 4, "st')) == [*kept, done]
    assert done.tokens_per_s == 200.0 and kept[0].tokens_per_s is None
