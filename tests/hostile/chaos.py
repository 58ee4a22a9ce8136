"""Random kills of whole runs: `make chaos`, outside `make test`.

Each run is a real study on a Ray cluster of its own. At random moments one of its processes is
killed: the driver, a worker, a member of a gang, a raylet, the GCS, or the W&B mirror. The same
command continues it, until it is done. Its table must be that of a run that nobody disturbed, no
finished stage may start again, and no process may stay behind.

A training whose worker was killed goes on with half the micro-batch: memory may have been the
reason. The sums of its gradients then have another order, so the keys of what is made from it may
differ. They are left out of the comparison; every point and every measured value is in it.

Every run appends a line to `--rows`. Lines that the file has already count, so an interrupted
measurement goes on with the next seed. At the end it prints a table with a line for each kind of
process, and exits with 1 when a run lost something. Its folder stays then.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import psutil

from ebbline.sweeps.ledger import whole_lines
from ebbline.tasks.identity import content_digest
from tests.test_continues import STUDY, descendants, records, table
from tests.tiny import build_pair, conversations, write_chats, write_lines

Driver = subprocess.Popen[bytes]
VICTIMS: dict[str, Callable[[Driver], list[psutil.Process]]] = {
    "driver": lambda driver: [psutil.Process(driver.pid)],
    "worker": lambda driver: list(descendants(driver, "ray::_batch")),
    "gang member": lambda driver: list(descendants(driver, "ray::_Member")),
    "raylet": lambda driver: list(descendants(driver, "raylet/raylet")),
    "GCS": lambda driver: list(descendants(driver, "gcs_server")),
    "mirror": lambda driver: list(descendants(driver, "wandb.mirror")),
}
OF_CLUSTER = ("raylet", "GCS")  # a driver that loses one of them must end by itself
LONGEST_S, LATER_S = 25.0, 6.0  # from a driver's start, and from when another victim is there
APPEARS_S = 40.0
ENDS_S, FINISHES_S, LEAVES_S = 240.0, 1200.0, 120.0  # later is a hang
GANG = "quantisation: nf4\n    gpus: 2"
MARK = "EBBLINE_CHAOS_RUN"  # in the environment of all processes of a run


@dataclass
class Outcome:
    """One run: what was killed, and by kind of the last kill what went wrong after it."""

    run: int
    gang: bool
    kills: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    twice: Counter[str] = field(default_factory=Counter)
    hung: Counter[str] = field(default_factory=Counter)
    exits: Counter[str] = field(default_factory=Counter)
    left: list[str] = field(default_factory=list)
    same_table: bool = False
    minutes: float = 0.0

    @property
    def good(self) -> bool:
        return self.same_table and not (self.lost or self.twice or self.hung or self.left)


def study_in(folder: Path, gang: bool) -> Path:
    folder.mkdir(parents=True)
    pair, chats = build_pair(folder), write_chats(folder / "chats.jsonl", 48)
    rows = [
        {"id": str(index), "prompt": turns[0]["content"], "answer": turns[1]["content"]}
        for index, turns in enumerate(conversations(16, 9))
    ]
    prompts = write_lines(folder / "prompts.jsonl", rows)
    named = {"base": pair.base, "aligned": pair.aligned, "chats": chats, "prompts": prompts}
    digests = {f"{name}_sha": content_digest(place) for name, place in named.items()}
    text = STUDY.format(**named, **digests)
    path = folder / "tiny.yaml"
    path.write_text(text.replace("quantisation: nf4", GANG) if gang else text)
    return path


def begin(study: Path, home: Path, gang: bool) -> Driver:
    """Start the driver. What it prints is appended to a file beside the home."""
    command = [sys.executable, "-m", "ebbline.cli", "run", str(study), "--home", str(home)]
    with home.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [*command, "--wandb", *(["--gpus", "2"] if gang else [])],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, MARK: str(home), "WANDB_MODE": "offline"},
        )


def processes_of(home: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and process.environ().get(MARK) == str(home):
                found.append(process)
    return found


def finish(study: Path, home: Path, gang: bool) -> Iterator[int]:
    """Run the study to its end: the exit codes. A lost cluster is continued by the same command."""
    for _ in range(5):
        driver = begin(study, home, gang)
        try:
            code = driver.wait(FINISHES_S)
        finally:
            driver.kill()
        yield code
        if code == 0:
            return


def started_again(home: Path, line: int, finished: set[str]) -> int:
    """How many starts of finished stages the ledger has from a line on."""
    lines = whole_lines(home / "studies" / "tiny" / "spending.jsonl")[line:]
    return sum(key in finished for text in lines for key in json.loads(text).get("keys", ()))


@dataclass
class Watch:
    """Compares the home after each kill with the home before it."""

    home: Path
    outcome: Outcome
    last: str = "none"
    before: dict[Path, tuple[int, int]] = field(default_factory=dict)
    line: int = 0

    def look(self) -> None:
        after = records(self.home)
        ledger = self.home / "studies" / "tiny" / "spending.jsonl"
        missing = sum(path not in after for path in self.before)
        replaced = sum(path in after and after[path] != old for path, old in self.before.items())
        again = started_again(self.home, self.line, {path.parent.name for path in self.before})
        self.outcome.lost += Counter({self.last: missing})
        self.outcome.twice += Counter({self.last: max(replaced, again)})
        self.line = len(whole_lines(ledger))
        self.before = after

    def killed(self, kind: str) -> None:
        self.look()
        self.last = kind
        self.outcome.kills[kind] += 1


def victim(
    driver: Driver, kind: str, delay_s: float, chance: random.Random
) -> psutil.Process | None:
    """A process of a kind, `delay_s` after one is there; None when there is none in time. A driver
    always is there, so some are killed before they have a cluster.
    """
    deadline = time.monotonic() + APPEARS_S
    while driver.poll() is None and time.monotonic() < deadline:
        if VICTIMS[kind](driver):
            time.sleep(delay_s)
            found = VICTIMS[kind](driver) if driver.poll() is None else []
            return chance.choice(found) if found else None
        time.sleep(0.3)
    return None


def disturb(study: Path, home: Path, kills: int, chance: random.Random, watch: Watch) -> None:
    """Kill something so many times, or until the study is done."""
    driver: Driver | None = None
    outcome = watch.outcome
    kinds = [kind for kind in VICTIMS if outcome.gang or kind != "gang member"]
    while outcome.kills.total() < kills:
        if driver is None or driver.poll() is not None:
            if driver is not None:
                outcome.exits[str(driver.returncode)] += 1
                if driver.returncode == 0:
                    return
            driver = begin(study, home, outcome.gang)
        kind = chance.choice(kinds)
        delay_s = chance.uniform(0.0, LONGEST_S if kind == "driver" else LATER_S)
        with suppress(psutil.NoSuchProcess):  # it ended by itself just now
            found = victim(driver, kind, delay_s, chance)
            if found is None:
                continue
            found.kill()
            watch.killed(kind)
            if kind in (*OF_CLUSTER, "driver"):
                try:
                    driver.wait(ENDS_S)
                except subprocess.TimeoutExpired:
                    outcome.hung[kind] += 1
                    driver.kill()
    if driver is not None and driver.poll() is None:
        driver.wait(FINISHES_S)  # nothing is killed any more: it ends by itself
        outcome.exits[str(driver.returncode)] += 1


def run(root: Path, number: int, gang: bool, kills: int, chance: random.Random) -> Outcome:
    outcome, began = Outcome(number, gang), time.monotonic()
    study, home = root / f"study-{gang}" / "tiny.yaml", root / f"run-{number}"
    watch = Watch(home, outcome)
    try:
        disturb(study, home, kills, chance, watch)
        outcome.exits.update(str(code) for code in finish(study, home, gang))
    except subprocess.TimeoutExpired:
        outcome.hung[watch.last] += 1
    watch.look()
    with suppress(FileNotFoundError, AssertionError):
        pd.testing.assert_frame_equal(values(home), values(root / f"undisturbed-{gang}"))
        outcome.same_table = True
    if not outcome.same_table:
        outcome.lost[watch.last] += 1
    _, alive = psutil.wait_procs(processes_of(home), LEAVES_S)
    for process in (*alive, *processes_of(home)):
        with suppress(psutil.Error):
            outcome.left.append(" ".join(process.cmdline())[:200])
            process.kill()
    outcome.minutes = round((time.monotonic() - began) / 60, 2)
    return outcome


def values(home: Path) -> pd.DataFrame:
    """The results' table without the keys of stages."""
    frame = table(home)
    return frame[[name for name in frame.columns if "[seed=" not in name]]


def undisturbed(root: Path, gang: bool) -> None:
    study = study_in(root / f"study-{gang}", gang)
    codes = list(finish(study, root / f"undisturbed-{gang}", gang))
    assert codes[-1] == 0, f"an undisturbed run ended with {codes}"


def summary(rows: list[dict[str, dict[str, int]]]) -> pd.DataFrame:
    """A line for each kind of process: its kills, and what went wrong after them."""
    sums = {
        what: sum((Counter(row[what]) for row in rows), Counter())
        for what in ("kills", "lost", "twice", "hung")
    }
    frame = pd.DataFrame(
        {what: [found[kind] for kind in VICTIMS] for what, found in sums.items()},
        index=list(VICTIMS),
    )
    frame.loc["all"] = frame.sum()
    return frame


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=10, help="in each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=Path, default=Path("build", "chaos.jsonl"))
    given = parser.parse_args()
    given.rows.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in whole_lines(given.rows)]
    root, good = Path(tempfile.mkdtemp(prefix="ebbline-chaos-")), True
    done = sum(sum(row["kills"].values()) for row in rows)
    while len(rows) < given.runs or done < given.runs * given.kills:
        number = len(rows)
        gang = number % 3 == 2
        if not (root / f"undisturbed-{gang}").exists():
            undisturbed(root, gang)
        chance = random.Random(given.seed * 1000 + number)
        outcome = run(root, number, gang, given.kills, chance)
        rows.append(vars(outcome))
        done += outcome.kills.total()
        with given.rows.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(json.dumps(rows[-1]), flush=True)
        good = good and outcome.good
        if outcome.good:
            shutil.rmtree(root / f"run-{number}")
    print(f"{done} kills in {len(rows)} runs\n{summary(rows).to_string()}")
    if good:
        shutil.rmtree(root)
    else:
        print(f"the homes of the runs that lost something are in {root}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
