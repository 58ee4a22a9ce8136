"""Random kills of whole runs: `make chaos`, outside `make test`.

Each run is a real study on a Ray cluster of its own. At random moments one of its processes is
killed: the driver, a worker, a member of a gang, a raylet, the GCS, or the W&B mirror. The same
command continues it, until it is done. Its table must be that of a run that nobody disturbed, and
no finished stage may run again. Prints a row for each run, and a JSON object at the end.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import psutil

from ebbline.tasks.identity import content_digest
from tests.test_continues import STUDY, descendants, records, start, table
from tests.tiny import build_pair, conversations, write_chats, write_lines

VICTIMS: dict[str, Callable[["subprocess.Popen[str]"], list[psutil.Process]]] = {
    "driver": lambda driver: [psutil.Process(driver.pid)],
    "worker": lambda driver: list(descendants(driver, "ray::_batch")),
    "gang member": lambda driver: list(descendants(driver, "ray::_Member")),
    "raylet": lambda driver: list(descendants(driver, "raylet/raylet")),
    "GCS": lambda driver: list(descendants(driver, "gcs_server")),
    "mirror": lambda driver: list(descendants(driver, "wandb.mirror")),
}
LONGEST_S = 25.0  # between two kills
GANG = "quantisation: nf4\n    gpus: 2"


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


def finish(study: Path, home: Path, gang: bool) -> None:
    """Run the study to its end. A cluster that was lost is continued by the same command."""
    for _ in range(5):
        driver = start(study, home, "--wandb", *(["--gpus", "2"] if gang else []))
        printed, _ = driver.communicate(timeout=1200)
        if driver.returncode == 0:
            return
    raise AssertionError(printed)


def disturbed(
    study: Path, home: Path, gang: bool, kills: int, chance: random.Random
) -> Counter[str]:
    """Kill something so many times; return what was killed."""
    killed: Counter[str] = Counter()
    driver = None
    while killed.total() < kills:
        if driver is None or driver.poll() is not None:
            driver = start(study, home, "--wandb", *(["--gpus", "2"] if gang else []))
        time.sleep(chance.uniform(1.0, LONGEST_S))
        if driver.poll() is not None:
            if driver.returncode == 0:
                break  # it was done before the next kill
            continue
        name = chance.choice(list(VICTIMS))
        found = VICTIMS[name](driver)
        if found:
            chance.choice(found).kill()
            killed[name] += 1
    if driver is not None and driver.poll() is None:
        driver.kill()
        killed["driver"] += 1
        driver.wait()
    return killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=10, help="in each run")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="ebbline-chaos-") as scratch:
        root = Path(scratch)
        undisturbed: dict[bool, pd.DataFrame] = {}
        for number in range(given.runs):
            gang = number % 3 == 2
            study = root / f"study-{gang}" / "tiny.yaml"
            if gang not in undisturbed:
                study_in(study.parent, gang)
                finish(study, root / f"undisturbed-{gang}", gang)
                undisturbed[gang] = table(root / f"undisturbed-{gang}")
            home, chance = root / f"run-{number}", random.Random(given.seed * 1000 + number)
            killed = disturbed(study, home, gang, given.kills, chance)
            before = records(home)
            finish(study, home, gang)
            after = records(home)
            again = [path for path, stamp in before.items() if after.get(path) != stamp]
            pd.testing.assert_frame_equal(table(home), undisturbed[gang])
            assert not again, f"finished stages ran again: {again}"
            total += killed
            print(f"run {number}: {dict(killed)}, the same table", flush=True)
    print(json.dumps({"runs": given.runs, "kills": dict(total), "lost": 0}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
