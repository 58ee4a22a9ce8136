"""The live snapshot that other processes read; it never stops or slows the drive."""

import json
import logging
from itertools import pairwise

import pytest

from ebbline.sweeps.drive import snapshot
from ebbline.sweeps.drive.live import LIVE, TIMELINE, Live, host_names, read_live, read_timeline
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.view import StudyView
from tests.clock import Clock
from tests.sweeps.pretended import RANKS, Pretended, small


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home")


def nan_at_rank_4(request):
    return (
        ("the loss became nan", "TrainingError")
        if request.kind == "train" and request.spec["rank"] == 4
        else None
    )


class Watched:
    """Records every snapshot that another process could read, before the drive continues."""

    def __init__(self, folder) -> None:
        self.folder, self.seen = folder, list[Live]()

    def __call__(self, progress) -> None:
        found = read_live(self.folder)
        if found is not None and (not self.seen or found != self.seen[-1]):
            self.seen.append(found)


def test_other_processes_can_watch_a_drive_while_it_runs_and_after_its_end(
    tmp_path, home, monkeypatch
):
    monkeypatch.setattr(snapshot, "EVERY_S", 0.0)
    watched = Watched(home.folder("tiny"))
    progress = drive(
        StudyView(small(tmp_path, budget={"gpu_hours": 1e6}), home),
        lambda: Pretended(home.store, gpus=2),
        watched,
    )
    at_work = [found for found in watched.seen if found.running]
    assert at_work and all(found.ended is None for found in watched.seen)
    for found in at_work:
        assert (
            found.gpus.total == 2 and found.gpus.busy == sum(host.busy for host in found.hosts) <= 2
        )
        assert sum(each.gpus for each in found.running) <= 2 and all(
            each.host == "here" for each in found.running
        )
        assert (
            found.left_s > 0
            and found.budget == {"gpu_hours": 1e6}
            and found.driver.startswith("process ")
        )
        assert all(each.started <= found.at and each.expected_s > 0 for each in found.running)
    assert any(
        each.kind == "train" and each.label.startswith("train 7b ")
        for found in at_work
        for each in found.running
    )
    shared = {
        each.label
        for found in at_work
        for each in found.running
        if each.kind in ("data", "train", "project")
    }
    assert shared and not any("threshold" in label for label in shared), (
        "a training is named after what it depends on"
    )
    last = read_live(home.folder("tiny"))
    assert last is not None and last.ended == "done" and last.running == [] and last.gpus.busy == 0
    assert (last.points.completed, last.points.limit, last.points.in_flight) == (6, 6, 0)
    assert {kind: counts["done"] for kind, counts in last.stages.items()} == {
        k: c["done"] for k, c in progress.runner.counts.items()
    }


def test_each_stage_that_ended_has_one_line_and_stages_of_a_job_do_not_overlap(tmp_path, home):
    progress = drive(
        StudyView(small(tmp_path), home), lambda: Pretended(home.store, fails=nan_at_rank_4)
    )
    lines = read_timeline(home.folder("tiny"))
    ran = {
        node.key
        for node in progress.runner.nodes.values()
        if node.state == "done" and not node.reused
    }
    failed = {
        node.key
        for node in progress.runner.nodes.values()
        if node.failure is not None and not node.failure.inherited
    }
    assert {line.key for line in lines if line.outcome == "done"} == ran and len(lines) == len(
        ran
    ) + len(failed)
    assert {line.key for line in lines if line.outcome == "failed"} == failed and len(failed) == 1
    assert all(line.started <= line.ended for line in lines)


def test_a_failure_is_listed_once_with_its_command_and_without_the_failures_it_caused(
    tmp_path, home
):
    drive(StudyView(small(tmp_path), home), lambda: Pretended(home.store, fails=nan_at_rank_4))
    last = read_live(home.folder("tiny"))
    (failure,) = last.failures
    assert (failure.kind, failure.reason) == ("train", "train: the loss became nan")
    assert failure.command.startswith("ebbline rerun ") and failure.key in failure.command
    assert sum(counts["failed"] for counts in last.stages.values()) > 1


@pytest.mark.slow
def test_only_the_latest_failures_are_kept(tmp_path, home):
    ranks = {"train.rank": list(range(2, 32)), "apply.threshold": [None]}

    def fails(request):
        return ("the loss became nan", "TrainingError") if request.kind == "train" else None

    drive(StudyView(small(tmp_path, axes=ranks), home), lambda: Pretended(home.store, fails=fails))
    assert len(read_live(home.folder("tiny")).failures) == snapshot.FAILURES


def test_a_point_with_invalid_settings_is_a_failure_without_a_command(tmp_path, home):
    invalid = small(
        tmp_path, axes={"train.rank": [2], "train.epochs": [1.0, 2.0]}, **{"train/steps": 4}
    )
    drive(StudyView(invalid, home), lambda: Pretended(home.store))
    failures = read_live(home.folder("tiny")).failures
    assert [(failure.kind, failure.key, failure.command) for failure in failures] == [
        ("point", "", "")
    ]
    assert "give `epochs` (2.0) or `steps` (4), not both" in failures[0].reason


def test_a_snapshot_that_calls_a_point_refused_is_read_as_invalid(tmp_path, home):
    drive(StudyView(small(tmp_path), home), lambda: Pretended(home.store))
    path = home.folder("tiny") / LIVE
    stored = json.loads(path.read_text())
    point = {"kind": "point", "label": "7b", "key": "", "reason": "refused: both", "command": ""}
    path.write_text(json.dumps({**stored, "failures": [point]}))
    assert [failure.reason for failure in read_live(path.parent).failures] == ["invalid: both"]


def test_a_stage_in_the_driver_s_own_process_is_written_before_it_runs(tmp_path, home, monkeypatch):
    seen = []

    class Recording(Pretended):
        def finished(self, timeout_s):
            seen.append((set(self.running), read_live(home.folder("tiny"))))
            return super().finished(timeout_s)

    drive(StudyView(small(tmp_path), home), lambda: Recording(home.store))
    assert any(running for running, _ in seen)
    for running, found in seen:
        assert len(found.running) >= len(running)


def test_a_job_may_outlive_its_stages_and_the_drive(tmp_path, home):
    class Late(Pretended):
        held = ()

        def finished(self, timeout_s):
            ended, self.held = self.held, super().finished(timeout_s)
            return ended

    progress = drive(StudyView(small(tmp_path), home), lambda: Late(home.store))
    assert progress.runner.running, "no job outlived its stages, so this test proves nothing"
    lines = read_timeline(home.folder("tiny"))
    assert {line.outcome for line in lines} == {"done"} and len(lines) == len(
        {line.key for line in lines}
    )
    assert read_live(home.folder("tiny")).ended == "done"


def test_another_drive_of_a_finished_study_runs_no_stage(tmp_path, home):
    drive(StudyView(small(tmp_path), home), lambda: Pretended(home.store))
    lines = (home.folder("tiny") / TIMELINE).read_bytes()
    drive(StudyView(small(tmp_path), home), lambda: Pretended(home.store))
    last = read_live(home.folder("tiny"))
    assert (
        last.ended == "done"
        and last.gpus.total == 0
        and sum(counts["done"] for counts in last.stages.values()) == 0
    )
    assert (home.folder("tiny") / TIMELINE).read_bytes() == lines


@pytest.mark.parametrize(
    ("error", "ended"), [(KeyboardInterrupt, "request"), (RuntimeError, "error")]
)
def test_an_interrupted_drive_records_its_end_and_its_running_stages_as_lost(
    tmp_path, home, error, ended
):
    class Broken(Pretended):
        def finished(self, timeout_s):
            if self.most > 3:
                raise error
            self.most += 1
            return super().finished(timeout_s)

        most = 0

    with pytest.raises(error):
        drive(StudyView(small(tmp_path), home), lambda: Broken(home.store))
    assert read_live(home.folder("tiny")).ended == ended
    assert "lost" in {line.outcome for line in read_timeline(home.folder("tiny"))}


@pytest.mark.slow
def test_the_snapshot_names_a_stop_request_and_a_budget_as_the_end(tmp_path, home):
    drive(StudyView(small(tmp_path, budget={"points": 2}), home), lambda: Pretended(home.store))
    assert read_live(home.folder("tiny")).ended == "budget"
    drive(StudyView(small(tmp_path), home), lambda: Pretended(home.store), stop=lambda: True)
    assert read_live(home.folder("tiny")).ended == "request"


def test_an_unwritable_snapshot_gives_one_warning_and_the_drive_completes(
    tmp_path, home, caplog, monkeypatch
):
    monkeypatch.setattr(snapshot, "EVERY_S", 0.0)
    (home.folder("tiny") / LIVE / "in the way").mkdir(parents=True)
    (home.folder("tiny") / TIMELINE).mkdir()
    with caplog.at_level(logging.WARNING):
        progress = drive(StudyView(small(tmp_path), home), lambda: Pretended(home.store))
    assert progress.completed == 6 and all(result.status == "done" for result in progress.results)
    assert sum("the run goes on" in record.message for record in caplog.records) == 1
    assert read_live(home.folder("tiny")) is None
    assert not list(home.folder("tiny").glob(".live*"))


def test_an_incomplete_line_of_the_timeline_is_skipped_and_later_drives_append(tmp_path, home):
    drive(
        StudyView(small(tmp_path, axes={**RANKS, "train.rank": [2]}), home),
        lambda: Pretended(home.store),
    )
    path = home.folder("tiny") / TIMELINE
    before = read_timeline(path.parent)
    with path.open("a") as file:
        file.write('{"kind": "train", "lab')
    assert read_timeline(path.parent) == before
    drive(StudyView(small(tmp_path), home, extend=True), lambda: Pretended(home.store))
    after = read_timeline(path.parent)
    assert after[: len(before)] == before and len(after) > len(before)


def test_the_names_of_hosts_come_from_every_whole_line_of_the_timeline(tmp_path):
    lines = [{"host": "node-1"}, {"host": "node-2"}, {"host": ""}, {"host": 3}, ["node-4"], {}]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (tmp_path / TIMELINE).write_text(f'{text}no JSON\n{{"host": "node-5"}}')
    assert host_names(tmp_path) == {"node-1", "node-2"}


def test_live_json_keeps_its_field_names_and_reads_those_of_earlier_versions(tmp_path, home):
    axes = {**RANKS, "train.rank": [2]}
    drive(StudyView(small(tmp_path, axes=axes), home), lambda: Pretended(home.store))
    path = home.folder("tiny") / LIVE
    fields = json.loads(path.read_text())
    assert fields["points"]["told"] == 3 and fields["taken"]["driving_s"] >= 0
    at_work = {"kind": "train", "label": "train", "key": "k", "host": "here", "gpus": 1}
    fields["running"] = [{**at_work, "started": 0.0, "expected_s": 9.0, "said": "step 3 of 4"}]
    path.write_text(json.dumps(fields))
    found = read_live(path.parent)
    assert (
        found is not None and found.model_dump(mode="json")["running"][0]["said"] == "step 3 of 4"
    )


def test_a_missing_incomplete_or_incompatible_snapshot_reads_as_none(tmp_path):
    assert read_live(tmp_path) is None and read_timeline(tmp_path) == []
    for text in ('{"driver": "pro', json.dumps({"driver": "process 1"})):
        (tmp_path / LIVE).write_text(text)
        assert read_live(tmp_path) is None


def test_the_snapshot_is_written_at_most_once_a_second_while_other_processes_work(
    tmp_path, home, monkeypatch
):
    class Elsewhere(Pretended):
        own_processes = True

    clock, write, moments = Clock(), snapshot.Writer._write, []
    monkeypatch.setattr(snapshot, "time", clock)
    monkeypatch.setattr(
        snapshot.Writer,
        "_write",
        lambda self, ended: (moments.append(clock.now), write(self, ended)),
    )
    drive(
        StudyView(small(tmp_path), home),
        lambda: Elsewhere(home.store),
        lambda progress: clock.sleep(snapshot.EVERY_S / 4),
    )
    *regular, _ = moments  # the last write is at the end of the drive
    assert len(regular) > 2 and all(
        late - early >= snapshot.EVERY_S for early, late in pairwise(regular)
    )
