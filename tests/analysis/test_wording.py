"""A failure's reason for publication: no folder, no host, and still the cause. The progress of a
stage as a label.
"""

import platform
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ebbline.analysis.results.wording import (
    FOLDER,
    HOST,
    axis_label,
    metric_label,
    progress_label,
    reason_label,
    without_paths,
)
from ebbline.sweeps.drive.live import AtWork

# Parts begin with q or z, so that none is a word of the sentence; they also have spaces, quotes and
# signs.
PARTS = st.from_regex(
    re.compile(r"[qz][a-z0-9=+@%_-]{2,6}([ ',.:][qz][a-z0-9]{2,5}){0,2}", re.ASCII), fullmatch=True
)


@pytest.mark.parametrize(
    ("reason", "left"),
    [
        ("no such folder /home/alice", f"no such folder {FOLDER}"),
        ("/root is full", f"{FOLDER} is full"),
        ("/home/alice/my project/secret set/p.csv has no column", "p.csv has no column"),
        ("cannot read /data/run=7b/x,y/z: denied", f"cannot read {FOLDER}: denied"),
        ("'/home/alice/my set' is no model", f"'{FOLDER}' is no model"),
        ("[Errno 2] No such file: '/home/o'brien/a, b/p.csv'", "[Errno 2] No such file: 'p.csv'"),
        ('File "/srv/site/tool.py", line 3', 'File "tool.py", line 3'),
        ("/a/b/x.csv and /c/d/y.csv differ", "x.csv and y.csv differ"),
        ("see ~alice/notes/x.md.", "see x.md."),
        ("copied from /home/alice.smith", f"copied from {FOLDER}"),
        ("no file s3://bucket/team/p.csv", "no file s3:p.csv"),
        ("3/4 of org/model at 12 tokens/s, or not", "3/4 of org/model at 12 tokens/s, or not"),
        ("a / b", "a / b"),
        ("out of memory (to see it again: ebbline stage x)", "out of memory"),
    ],
)
def test_a_path_leaves_the_name_of_its_file_at_most(reason: str, left: str) -> None:
    assert without_paths(reason) == left


@given(st.lists(PARTS, min_size=1, max_size=5), st.sampled_from(["'", '"', "`"]), st.booleans())
@example(["zoe", "q, z"], "'", True)
def test_no_folder_of_any_quoted_path_survives(parts: list[str], quote: str, file: bool) -> None:
    path = "/" + "/".join(parts)
    left = without_paths(f"cannot read {quote}{path}{'/p.csv' if file else ''}{quote}, so it ended")
    assert left == f"cannot read {quote}{'p.csv' if file else FOLDER}{quote}, so it ended"


@given(st.lists(PARTS, min_size=1, max_size=5), st.sampled_from(["", ":", ",", ")", " "]))
def test_no_folder_of_any_path_to_a_file_survives(parts: list[str], after: str) -> None:
    path = "/" + "/".join(parts)
    assert (
        without_paths(f"cannot read {path}/p.csv{after} it ended")
        == f"cannot read p.csv{after} it ended"
    )


def test_the_users_home_is_removed_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/Users/Zoe Q")
    monkeypatch.setenv("EBBLINE_HOME", "/srv/our runs")
    assert str(Path.home()) == "/Users/Zoe Q"
    assert (
        without_paths("in /Users/Zoe Q, or -I/Users/Zoe Q/include/x.py")
        == f"in {FOLDER}, or -Ix.py"
    )
    assert without_paths("nothing in /srv/our runs yet") == f"nothing in {FOLDER} yet"


def test_hosts_and_addresses_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "node", lambda: "login7.cluster.lab")
    reason = (
        "node gpu-12 (10.1.2.3) was lost, as login7 and LOGIN7.cluster.lab say; gpu-120 and "
        "here are well"
    )
    left = f"node {HOST} ({HOST}) was lost, as {HOST} and {HOST} say; gpu-120 and here are well"
    assert without_paths(reason, {"gpu-12/0123456789ab", "here"}) == left


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, ""),
        ({"progress": {"done": 4, "total": 9, "note": "completions"}}, "completions (4/9)"),
        (
            {"progress": {"done": 4, "total": 9, "loss": 0.31, "learning_rate": 1e-4}},
            "loss 0.310 (4/9)",
        ),
        ({"said": "loss 0.310 (4/9)"}, "loss 0.310 (4/9)"),  # a snapshot of an earlier version
    ],
)
def test_the_progress_of_a_stage_is_one_label(fields: dict[str, object], sentence: str) -> None:
    stage = {"kind": "train", "label": "train 7b", "key": "f", "host": "here", "gpus": 1}
    at_work = AtWork.model_validate({**stage, "started": 0.0, "expected_s": 9.0, **fields})
    assert progress_label(at_work) == sentence


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("refusal.refusal_rate", "refusal rate"),
        ("task.rouge_l", "ROUGE-L (task)"),
        ("mmlu.acc", "acc (mmlu)"),
        ("hellaswag.acc_norm", "acc_norm (hellaswag)"),
    ],
)
def test_metrics_are_named_as_the_field_names_them(name: str, label: str) -> None:
    assert metric_label(name) == label


def test_a_reason_beside_its_status_does_not_repeat_it() -> None:
    assert reason_label("invalid: DataError: 64 rows of 32") == "DataError: 64 rows of 32"
    assert reason_label("the data are invalid: no") == "the data are invalid: no"


def test_knobs_of_one_name_have_different_labels() -> None:
    axes = ["apply.threshold", "drop.threshold", "scale.factor", "lox.factor", "train.rank"]
    labels = [axis_label(axis) for axis in axes]
    assert labels == ["threshold", "drop threshold", "scale factor", "lox factor", "rank"]
