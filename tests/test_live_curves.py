"""A training's curve reaches W&B while it runs: the offline run on the disk, and a server.

A real driver, worker and mirror; the training takes minutes if nobody stops it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ebbline.cluster.store.artifacts import Store
from ebbline.tasks.identity import content_digest
from tests.tiny import Pair, conversations, write_chats, write_lines
from tests.wandb_server import serving

pytestmark = pytest.mark.cluster

STUDY = """
study: live
question: Is it learning?
models:
  7b:
    base: {{path: {{path: {base}, sha256: {base_sha}}}}}
    aligned: {{path: {{path: {aligned}, sha256: {aligned_sha}}}}}
    dtype: float32
data:
  pool: {{path: {{path: {chats}, sha256: {chats_sha}}}}}
  settings: {{size: 48}}
train: {{learning_rate: 1e-3, steps: 100000, global_batch: 8, max_tokens: 64}}
axes:
  train.rank: [2]
  apply.threshold: [null]
suites:
  task:
    prompts: {{path: {{path: {prompts}, sha256: {prompts_sha}}}}}
    measure: {{kind: task, max_new_tokens: 4}}
objectives: [task_accuracy]
"""


@pytest.fixture
def study(tmp_path: Path, pair: Pair) -> Path:
    chats = write_chats(tmp_path / "chats.jsonl", 48)
    rows = [
        {"id": str(i), "prompt": turns[0]["content"], "answer": turns[1]["content"]}
        for i, turns in enumerate(conversations(16, 9))
    ]
    prompts = write_lines(tmp_path / "prompts.jsonl", rows)
    named = {"base": pair.base, "aligned": pair.aligned, "chats": chats, "prompts": prompts}
    path = tmp_path / "live.yaml"
    path.write_text(
        STUDY.format(
            **named, **{f"{name}_sha": content_digest(place) for name, place in named.items()}
        )
    )
    return path


def offline_steps(home: Path) -> list[dict[str, Any]]:
    """The rows with a loss in the offline run of the training, by W&B's own reader."""
    rows = []
    for log in (home / "studies" / "live" / "wandb").glob("offline-run-*/run-*.wandb"):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        for record in map(json.loads, done.stdout.splitlines()):
            row = record.get("history")
            if row and "loss" in json.dumps(row):
                rows.append(row)
    return rows


def at_least_five(found: Callable[[], list[Any]], home: Path, driver: Any) -> list[Any]:
    end = time.monotonic() + 240
    while len(rows := found()) < 5:
        assert driver.poll() is None and time.monotonic() < end, driver.stdout.read().decode()
        time.sleep(0.5)
    assert not list(Store(home / "store").all("train")), "the training has ended"
    return rows


def test_steps_are_on_wandb_while_the_training_runs(study: Path, tmp_path: Path) -> None:
    """Only this test runs a driver, a worker and a mirror and looks at W&B before the training has
    ended: on the disk, then on a server, in a second run that continues.
    """
    home = tmp_path / "home"
    plain = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    command = [sys.executable, "-m", "ebbline.cli", "run", str(study), "--home", str(home)]
    with serving() as server:

        def online_steps() -> list[dict[str, Any]]:
            with server.lock:
                return [
                    row
                    for run in server.runs.values()
                    for row in run.history.values()
                    if "loss" in row
                ]

        for environment, found in (
            ({"WANDB_MODE": "offline"}, lambda: offline_steps(home)),
            (server.environment(), online_steps),
        ):
            driver = subprocess.Popen(
                [*command, "--gpus", "1"],
                env=plain | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            try:
                at_least_five(found, home, driver)
            finally:
                driver.send_signal(signal.SIGINT)
                time.sleep(1)
                driver.send_signal(signal.SIGINT)  # without waiting for what runs
                driver.communicate(timeout=120)
        rows = online_steps()
        (training,) = (
            run for run in server.runs.values() if run.fields.get("jobType") == "training"
        )
        assert [row["_step"] for row in rows] == list(range(1, len(rows) + 1))
        assert {"loss", "learning_rate", "tokens_per_s", "gradient_norm"} <= rows[-1].keys()
        assert any("machine/cpu_percent" in row for row in rows)
        assert training.fields["displayName"] == "7b r=2 seed 0"
        assert str(home) not in json.dumps(training.fields)
