"""Budgets: a study stops before it crosses one, also after kills, and a raised budget continues to
the same points.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ebbline.cluster.executors.executor import Job
from ebbline.cluster.executors.inline import InlineExecutor
from ebbline.cluster.profile import GpuType, Profile
from ebbline.cluster.schedule.costs import Cost
from ebbline.sweeps.drive.loop import drive
from ebbline.sweeps.search.searcher import all_points
from ebbline.sweeps.state.jobs import read_jobs
from ebbline.sweeps.state.spending import NAME, read_spent, require_prices, spending
from ebbline.sweeps.study.home import Home
from ebbline.sweeps.study.policies import Budget
from ebbline.sweeps.study.view import StudyView
from ebbline.tasks.errors import StudyError
from ebbline.tasks.identity import content_digest
from tests.sweeps.made import study
from tests.tiny import conversations, write_chats, write_lines

PRICES = Profile(gpus={"A100": GpuType(usd_per_hour=1.5), "H100": GpuType(usd_per_hour=4.0)})


def ledger(*lines: dict) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_a_killed_driver_counts_up_to_its_last_line_and_an_incomplete_line_is_ignored(tmp_path):
    text = ledger(
        {"driver": "one", "s": 0.0},
        {"start": "ray-0", "gpus": [["A100", 2]], "keys": ["a"], "s": 10.0},
        {"start": "ray-1", "gpus": [[None, 1]], "keys": ["b"], "s": 20.0},
        {"end": "ray-0", "s": 40.0},
        {"s": 50.0},
        {"driver": "two", "s": 0.0},
        {"start": "ray-0", "gpus": [["H100", 1]], "keys": ["b"], "s": 5.0},
        {"end": "ray-0", "s": 6.0},
    )
    (tmp_path / NAME).write_text(text + '{"s": 99')
    spent = read_spent(tmp_path)
    assert spent.cost.gpu_s == {"A100": 60.0, None: 30.0, "H100": 1.0}
    assert (spent.driving_s, spent.keys) == (56.0, {"a", "b"})


def test_the_next_driver_removes_an_incomplete_line_and_appends(tmp_path):
    (tmp_path / NAME).write_text(ledger({"driver": "one", "s": 0.0}, {"s": 50.0}) + '{"s": 9')
    with spending(study(tmp_path), Profile(), tmp_path, "two") as kept:
        kept.started(Job("inline-0", ("a",), 1, {"here": 1}), {None: 1}, 5.0)
        kept.settle([])
    lines = [json.loads(line) for line in (tmp_path / NAME).read_text().splitlines()]
    assert lines[2]["driver"] == "two"
    assert read_spent(tmp_path).driving_s == pytest.approx(50.0 + lines[-1]["s"])


def test_the_spending_of_a_running_driver_has_no_keys(tmp_path):
    (tmp_path / NAME).write_text(
        ledger(
            {"driver": "one", "s": 0.0},
            {"start": "ray-0", "gpus": [[None, 1]], "keys": ["a"], "s": 0.0},
        )
    )
    with spending(study(tmp_path), Profile(), tmp_path, "two") as kept:
        kept.started(Job("ray-0", ("b",), 1, {"here": 1}), {None: 1}, 5.0)
        assert (
            kept.spent().keys == frozenset()
        )  # computed at each start of a stage, so it may not grow with the study
    assert read_spent(tmp_path).keys == {"a", "b"}


def test_a_damaged_line_is_an_error_that_names_it(tmp_path):
    (tmp_path / NAME).write_text(ledger({"driver": "one", "s": 0.0}) + "{}\n" + ledger({"s": 2.0}))
    with pytest.raises(StudyError, match=r"spending\.jsonl, line 2 is damaged"):
        read_spent(tmp_path)


HELD = """
import sys, time
from pathlib import Path
from ebbline.cluster.executors.executor import Job
from ebbline.cluster.profile import Profile
from ebbline.sweeps.state import spending
from ebbline.sweeps.study.study_file import parse
spending.BEAT_S = 0.05
with spending.spending(parse(Path(sys.argv[1])), Profile(), Path(sys.argv[2]), "one") as kept:
    kept.started(Job("ray-0", ("a",), 2, {"n": 2}), {"A100": 2}, 60.0)
    print("held", flush=True)
    while True:
        kept.settle(["ray-0"])
        time.sleep(0.02)
"""


@pytest.mark.process
def test_the_running_jobs_of_a_killed_driver_are_counted(tmp_path):
    study(tmp_path)
    command = [sys.executable, "-c", HELD, str(tmp_path / "study.yaml"), str(tmp_path)]
    driver = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    assert driver.stdout.readline() == "held\n"
    while read_spent(tmp_path).driving_s < 0.5:
        assert driver.poll() is None
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    spent = read_spent(tmp_path)
    start = json.loads((tmp_path / NAME).read_text().splitlines()[1])
    assert start["start"] == "ray-0" and spent.driving_s > start["s"]
    assert spent.cost.gpu_s == {"A100": pytest.approx(2 * (spent.driving_s - start["s"]))}


def test_each_limit_counts_all_runs_and_the_expected_rest_of_running_jobs(tmp_path):
    (tmp_path / NAME).write_text(
        ledger(
            {"driver": "one", "s": 0.0},
            {"start": "ray-0", "gpus": [["A100", 1]], "keys": [], "s": 0.0},
            {"end": "ray-0", "s": 3600.0},
        )
    )
    found = study(tmp_path, {"budget": {"hours": 3.0, "gpu_hours": 2.0, "usd": 6.0}})
    with spending(found, PRICES, tmp_path, "two") as kept:
        assert kept.affords({"A100": 1}, 3500.0) and not kept.affords({"A100": 1}, 3700.0)
        assert kept.affords({None: 0}, 7100.0)
        assert kept.crossed(Cost(), 7300.0) == "hours"
        assert kept.crossed(Cost({"A100": 3700.0}), 0.0) == "gpu_hours"
        assert kept.crossed(Cost({"H100": 3550.0, "A100": 45.0}), 0.0) == ""
        kept.started(Job("ray-0", ("a",), 1, {"n": 1}), {"A100": 1}, 1800.0)
        assert kept.affords({"A100": 1}, 1700.0) and not kept.affords({"A100": 1}, 1900.0)
        assert kept.crossed(Cost({"H100": 3600.0}), 0.0) in ("gpu_hours", "usd")
        message = kept.over_budget("point 7", Cost({"A100": 7200.0}), 0.0)
        assert (
            "1 of 2 GPU-hours spent, and point 7 is expected to take 2 more. Raise budget.gpu_hours"
            in message
        )


def test_the_message_for_a_crossed_budget_says_that_it_is_used_up(tmp_path):
    with spending(study(tmp_path, {"budget": {"usd": 6.0}}), PRICES, tmp_path, "one") as kept:
        kept._ended = Cost({"A100": 18000.0})
        message = kept.over_budget("point 7", Cost(), 0.0)
    assert (
        "the budget is used up: $" in message
        and "of $6.00 spent" in message
        and "point 7 does not start. Raise budget.usd" in message
    )


@pytest.mark.parametrize(
    ("changes", "profile", "missing"),
    [
        ({}, Profile(), "no price for other"),
        ({"models/7b/labels": {"ray.io/accelerator-type": "L4"}}, PRICES, "no price for L4"),
    ],
)
def test_a_budget_in_dollars_without_prices_names_the_type_and_the_file(
    tmp_path, changes, profile, missing
):
    with pytest.raises(
        StudyError, match=rf"budget.usd is 5, but cluster.yaml .*{missing}.*usd_per_hour"
    ):
        require_prices(study(tmp_path, {"budget": {"usd": 5.0}, **changes}), profile)
    require_prices(study(tmp_path, changes), profile)


def test_a_gpu_type_without_a_price_is_an_error_under_a_budget_in_dollars(tmp_path):
    with (
        spending(study(tmp_path, {"budget": {"usd": 5.0}}), PRICES, tmp_path, "one") as kept,
        pytest.raises(StudyError, match="no price for T4"),
    ):
        kept.affords({"T4": 1}, 1.0)


@pytest.fixture(scope="module")
def changes(tmp_path_factory, pair):
    folder = tmp_path_factory.mktemp("spending")

    def pinned(path) -> dict:
        return {"path": {"path": str(path), "sha256": content_digest(path)}}

    rows = [
        {"prompt": turns[0]["content"], "answer": turns[1]["content"]}
        for turns in conversations(4, 3)
    ]
    prompts = pinned(write_lines(folder / "prompts.jsonl", rows))
    return {
        "models": {
            "7b": {
                "base": pinned(pair.base),
                "aligned": pinned(pair.aligned),
                "quantisation": "none",
                "dtype": "float32",
            }
        },
        "data": {"pool": pinned(write_chats(folder / "chats.jsonl", 24)), "settings": {"size": 16}},
        "train": {"epochs": 1, "global_batch": 8, "learning_rate": 1e-2, "max_tokens": 64},
        "axes": {"train.rank": [1, 2, 4], "apply.threshold": [None, 0.5, 1.0]},
        "suites": {
            "refusal": {"prompts": prompts, "measure": {"kind": "refusal", "max_new_tokens": 2}},
            "task": {"prompts": prompts, "measure": {"kind": "task", "max_new_tokens": 2}},
        },
        "search": {"sampler": "tpe", "points": 7, "order": "in_turn", "window": 2, "seed": 1},
    }


def test_a_study_stopped_by_its_budget_continues_to_the_same_points(tmp_path, changes):
    """Only here a budget ends a study that then continues with a larger one."""
    free = Home(tmp_path / "free")
    found = study(tmp_path, changes)
    drive(StudyView(found, free), InlineExecutor)
    wanted = [
        (number, point, state)
        for number, point, state, _ in all_points(found, free.database("tiny"))
    ]

    # A fraction of what the whole study costs on this machine, so that it is stopped several times
    limit_s = read_spent(free.folder("tiny")).cost.gpu_hours * 3600 / 20
    home, stops = Home(tmp_path / "home"), []
    other = {
        "study": "other",
        "train": {**changes["train"], "learning_rate": 2e-2},
        "axes": {"apply.threshold": [1.0]},
    }
    drive(
        StudyView(study(tmp_path, {**changes, **other, "search": {"sampler": "grid"}}), home),
        InlineExecutor,
    )  # so that estimates are measured
    for _ in range(40):
        progress = drive(
            StudyView(study(tmp_path, {**changes, "budget": {"gpu_hours": limit_s / 3600}}), home),
            InlineExecutor,
        )
        spent_s = read_spent(home.folder("tiny")).cost.gpu_hours * 3600
        longest_s = max(
            (job.end_s - job.start_s for job in read_jobs(home.folder("tiny"))), default=0.0
        )
        assert (
            spent_s <= limit_s + longest_s
        )  # one job may take longer than expected; then no other starts
        if not progress.stopped:
            break
        assert (
            "Raise budget.gpu_hours" in progress.stopped
            and " GPU-hours spent, " in progress.stopped
        )
        states = [state for _, _, state, _ in all_points(found, home.database("tiny"))]
        assert states.count("running") <= 2
        stops.append(len(states))
        limit_s = 1.25 * max(limit_s, spent_s)
    assert [
        (number, point, state)
        for number, point, state, _ in all_points(found, home.database("tiny"))
    ] == wanted
    assert len(set(stops)) >= 3, stops


def test_a_budget_too_small_for_anything_starts_nothing(tmp_path, changes):
    home = Home(tmp_path / "home")
    progress = drive(
        StudyView(study(tmp_path, {**changes, "budget": {"gpu_hours": 1e-9}}), home), InlineExecutor
    )
    assert "0 of 1e-09 GPU-hours spent" in progress.stopped
    assert not list(home.store.all("generate")) and read_spent(home.folder("tiny")).cost == Cost()


def test_a_limit_of_hours_counts_all_runs(tmp_path, changes):
    home = Home(tmp_path / "home")
    (home.folder("tiny") / NAME).write_text(ledger({"driver": "one", "s": 0.0}, {"s": 7200.0}))
    progress = drive(
        StudyView(study(tmp_path, {**changes, "budget": {"hours": 2.0}}), home), InlineExecutor
    )
    assert "of 2 hours spent" in progress.stopped and "Raise budget.hours" in progress.stopped
    assert Budget(hours=2.0).usd is None
