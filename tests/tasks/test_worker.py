"""The worker's entry: a failed request gives a report, the batch continues, and a rerun shows the
failure.
"""

import json
import os
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest

from ebbline.tasks.kinds import STAGE_KINDS
from ebbline.tasks.specs import ApplySpec, DataSpec, GenerateSpec, TrainSpec
from ebbline.tasks.worker import run_stages
from tests.tiny import request, write_chats, write_lines

ROOT = Path(__file__).parents[2]


def three(tmp_path, chats):
    """Three requests, of which the second fails."""
    return [
        request(DataSpec(size=5), {"pool": chats}, tmp_path / "one"),
        request(DataSpec(size=500), {"pool": chats}, tmp_path / "two"),
        request(DataSpec(size=6), {"pool": chats}, tmp_path / "three"),
    ]


def test_a_failed_request_is_reported_and_the_requests_after_it_run(tmp_path, chats):
    requests = three(tmp_path, chats)
    reports = list(run_stages(requests))
    assert [report.key for report in reports] == [item.key for item in requests]
    assert [report.error is None for report in reports] == [True, False, True]
    assert reports[1].error_type == "DataError" and "data.size=500" in reports[1].error
    assert "Traceback" in reports[1].traceback
    assert not any(Path(requests[1].out).iterdir())
    assert len((tmp_path / "three" / "payload" / DataSpec.ROWS).read_text().splitlines()) == 6


def test_no_request_starts_once_the_machine_is_about_to_go(tmp_path, chats):
    requests = three(tmp_path, chats)
    signals = iter([False, True, True])
    reports = list(run_stages(requests, leaving=lambda: next(signals)))
    assert [report.error_type for report in reports] == [None, "Leaving", "Leaving"]
    assert not any(Path(requests[2].out).iterdir())


def test_a_report_comes_before_the_next_stage_runs(tmp_path, chats):
    requests = three(tmp_path, chats)
    reports = run_stages(requests)
    next(reports)
    assert any(Path(requests[0].out).iterdir()) and not any(Path(requests[2].out).iterdir())


@pytest.mark.parametrize(
    ("change", "error_type"),
    [
        ({"kind": "distil"}, "StudyError"),
        ({"spec": {"size": 0}}, "ValidationError"),
        ({"inputs": {}}, "KeyError"),
    ],
)
def test_an_invalid_request_gives_a_report(tmp_path, chats, change, error_type):
    good = request(DataSpec(size=5), {"pool": chats}, tmp_path / "one")
    (report,) = run_stages([type(good)(**{**vars(good), **change})])
    assert report.error_type == error_type and report.error


def test_a_batch_loads_its_model_once_for_training_and_measuring(
    tmp_path, pair, chats, monkeypatch
):
    import ebbline.tasks.models.loading

    loads = []
    real = ebbline.tasks.models.loading.load_model
    monkeypatch.setattr(
        ebbline.tasks.models.loading, "load_model", lambda *args: loads.append(args) or real(*args)
    )
    train = TrainSpec(rank=2, dtype="float32", learning_rate=1e-2, max_tokens=32, epochs=0.5)
    suite = GenerateSpec(max_new_tokens=4, limit=3, dtype="float32")
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "word1 word2"}] * 3)
    requests = [
        request(train, {"model": pair.aligned, "data": chats}, tmp_path / "train"),
        request(suite, {"model": pair.aligned, "prompts": prompts}, tmp_path / "before"),
        request(
            suite,
            {
                "model": pair.aligned,
                "prompts": prompts,
                "adapter": tmp_path / "train" / "payload" / "adapter",
            },
            tmp_path / "after",
        ),
    ]
    assert [report.error for report in run_stages(requests)] == [None] * 3
    assert len(loads) == 1


def test_the_progress_file_ends_at_the_total(tmp_path, pair, chats):
    spec = TrainSpec(rank=2, dtype="float32", learning_rate=1e-2, max_tokens=32, epochs=1.0)
    list(run_stages([request(spec, {"model": pair.aligned, "data": chats}, tmp_path / "one")]))
    progress = json.loads((tmp_path / "one" / "log" / "progress.json").read_text())
    assert (progress["done"], progress["total"], progress["note"]) == (3, 3, "")
    assert progress["loss"] > 0 and progress["learning_rate"] > 0


def rerun(folder: Path, item) -> subprocess.CompletedProcess[str]:
    path = folder / "log" / "request.json"
    path.write_text(item.to_json())
    return subprocess.run(
        [sys.executable, "-m", "ebbline", "rerun", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.process
def test_a_rerun_shows_the_failure_with_its_traceback(tmp_path, chats):
    done = rerun(tmp_path / "two", three(tmp_path, chats)[1])
    assert done.returncode == 1
    assert "Traceback" in done.stderr and done.stderr.strip().splitlines()[-1].startswith(
        "data.size=500"
    )


@pytest.mark.process
def test_a_rerun_writes_the_stages_output_into_its_log_only(tmp_path, chats):
    item = three(tmp_path, chats)[0]
    done = rerun(tmp_path / "one", item)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "one" / "log").glob(f"rerun-*/{DataSpec.ROWS}"))) == 1
    assert not any(Path(item.out).iterdir())
    assert rerun(tmp_path / "one", item).returncode == 0  # a second rerun works too


PLANTED = "zyzzyva"


def test_no_text_of_data_prompts_or_completions_reaches_reports_or_progress(tmp_path, pair):
    good = [
        {
            "messages": [
                {"role": "user", "content": f"word1 {PLANTED}"},
                {"role": "assistant", "content": f"{PLANTED} word2"},
            ]
        }
    ]
    cut = tmp_path / "cut.jsonl"
    cut.write_text(json.dumps(good[0])[:-9])
    long = write_lines(tmp_path / "long.jsonl", [{"prompt": f"{PLANTED} " * 40}])
    no_answer = write_lines(tmp_path / "no_prompt.jsonl", [{"text": PLANTED}])
    no_header = tmp_path / "header.csv"
    no_header.write_text(f"{PLANTED} and more,{PLANTED} too\n1,2\n")
    small = GenerateSpec(max_new_tokens=4, dtype="float32", max_tokens=16)
    train = TrainSpec(dtype="float32", max_tokens=3)
    requests = [
        request(DataSpec(size=1), {"pool": cut}, tmp_path / "a"),
        request(DataSpec(size=1), {"pool": no_header}, tmp_path / "b"),
        request(
            DataSpec(size=5), {"pool": write_lines(tmp_path / "one.jsonl", good)}, tmp_path / "c"
        ),
        request(small, {"model": pair.aligned, "prompts": long}, tmp_path / "d"),
        request(small, {"model": pair.aligned, "prompts": no_answer}, tmp_path / "e"),
        request(train, {"model": pair.aligned, "data": tmp_path / "one.jsonl"}, tmp_path / "f"),
        request(
            ApplySpec(), {"adapter": tmp_path / "one.jsonl", "projection": tmp_path}, tmp_path / "g"
        ),
    ]
    reports = list(run_stages(requests))
    assert len(reports) == len(requests) and all(report.error for report in reports)
    for report in reports:
        assert PLANTED not in report.error + (report.traceback or "")
    assert all(PLANTED not in path.read_text() for path in tmp_path.rglob("progress.json"))


def test_a_completion_is_only_in_the_file_marked_as_sensitive(tmp_path, pair):
    prompts = write_lines(
        tmp_path / "prompts.jsonl",
        [{"id": str(i), "prompt": f"word{i} {PLANTED}"} for i in range(6)],
    )
    spec = GenerateSpec(max_new_tokens=8, dtype="float32")
    (report,) = run_stages(
        [request(spec, {"model": pair.aligned, "prompts": prompts}, tmp_path / "run")]
    )
    assert report.error is None
    texts = [
        json.loads(line)["completion"]
        for line in (tmp_path / "run" / "payload" / GenerateSpec.COMPLETIONS)
        .read_text()
        .splitlines()
    ]
    assert any(texts)
    others = [
        path
        for path in (tmp_path / "run").rglob("*")
        if path.is_file() and path.name != GenerateSpec.COMPLETIONS
    ]
    assert {path.name for path in others} >= {GenerateSpec.PROMPTS, "progress.json"}
    for path in others:
        assert not any(text.strip() and text in path.read_text() for text in texts), path
        assert PLANTED not in path.read_text(), path


def test_every_stage_kind_has_a_run_function():
    for kind in STAGE_KINDS.values():
        settings, *rest = signature(kind.load_function()).parameters.values()
        assert settings.annotation is kind.spec, kind.name
        assert [each.name for each in rest] == ["inputs", "out", "ctx"], kind.name


def test_a_pool_may_have_more_rows_than_the_requested_size(tmp_path):
    item = request(DataSpec(size=7), {"pool": write_chats(tmp_path / "p.jsonl", 9)}, tmp_path / "x")
    assert [report.error for report in run_stages([item])] == [None]


def test_a_full_disk_has_an_error_type_of_its_own(tmp_path, chats):
    full = request(DataSpec(size=5), {"pool": chats}, tmp_path / "one")
    (Path(full.out) / DataSpec.ROWS).symlink_to("/dev/full")
    (report,) = run_stages([full])
    assert (
        report.error_type == "DiskFull"
        and "free some, and the same command continues" in report.error
    )


def test_the_message_of_a_foreign_exception_stays_in_the_attempts_log(tmp_path, pair):
    broken = request(GenerateSpec(), {"model": pair.base, "prompts": tmp_path}, tmp_path / "one")
    (report,) = run_stages(
        [type(broken)(**{**vars(broken), "spec": {"format": "planted words of a prompt"}})]
    )
    assert "planted" not in report.error and "error.txt" in report.error
    assert "planted" in (tmp_path / "one" / "log" / "error.txt").read_text()


@pytest.mark.process
def test_a_hub_that_does_not_answer_is_an_endpoint_down(tmp_path):
    """Only this test has a model on a hub that does not answer."""
    code = (
        "from ebbline.tasks.headers.hub import local_path; "
        "local_path('hub:model:nobody/nothing@' + 40 * 'a')"
    )
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        "ebbline.tasks.errors.EndpointDown: nobody/nothing" in done.stderr
        and "the same command continues" in done.stderr
    )
