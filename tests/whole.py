"""The quickstart, and a study with all its parts in a fifth of its time, both run by the real
command.

The small study has two sizes instead of three, both with the smallest model. The walk has trained
its base, its aligned model and the first adapter. A gang trains the second size, for few steps. All
other settings come from the quickstart's file.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from ebbline.analysis.wandb.mirror import alone
from ebbline.sweeps.study.study_file import shipped
from tests.organisms import copied

RUN_S = 1500
GANG_STEPS = 24


DECOYS = ("tasks", "cluster", "sweeps", "analysis", "datasets", "wandb")


def decoys(folder: Path) -> Path:
    """A user's folder with modules named like ours and like a library's; each raises on import."""
    for number, name in enumerate(DECOYS):
        path = folder / (f"{name}.py" if number == 0 else f"{name}/__init__.py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"raise ImportError('the user's own {name}')\n")
    return folder


def ebbline(*arguments: str, cwd: Path | None = None) -> str:
    """The command's output. -P keeps the current folder off the path, as the script `ebbline`
    does.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-m", "ebbline.cli", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=RUN_S,
        env=os.environ | {"WANDB_MODE": "offline"},
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def whole_study() -> dict[str, Any]:
    """The quickstart's file with other sizes, Safe LoRA alone on one seed, and fewer points."""
    study: dict[str, Any] = yaml.safe_load(shipped()["quickstart"].read_text("utf-8"))
    small = study["models"]["7b"]
    gang = {"gpus": 2, "train": {"steps": GANG_STEPS}, "axes": {"train.rank": [16]}}
    study["models"] = {"7b": small, "70b": small | gang}
    study["axes"] = {"train.rank": [8], "apply.threshold": [None, 0.3, 0.4, 0.5, 0.55, 1.0]}
    for several in ("defences", "controls", "seeds"):
        del study[several]
    study["search"] |= {"points": 10, "window": 4}
    study["search"]["first"] = [
        {"model": "70b", "train.rank": 16, "apply.threshold": None},
        {"model": "7b", "train.rank": 8, "apply.threshold": None},
    ]
    return study | {"study": "whole"}


def run_whole(home: Path, walk: Path) -> None:
    """Run the small study from a copy of the walk's store."""
    path = copied(walk, home) / "whole.yaml"
    path.write_text(yaml.safe_dump(whole_study(), sort_keys=False))
    run(str(path), home)


def run_quickstart(home: Path) -> None:
    run("quickstart", home)


def run(study: str, home: Path) -> None:
    """Run a study from a folder of decoys: no process of ebbline imports them."""
    with TemporaryDirectory() as folder:
        printed = ebbline("run", study, "--home", str(home), cwd=decoys(Path(folder)))
    for what in ("results", "frontier", "figure", "report"):
        named = re.search(rf"^{what} +(.+)$", printed, re.MULTILINE)
        assert named is not None and Path(named[1]).stat().st_size > 0, printed
    report = re.search(r"^report +(.+)$", printed, re.MULTILINE)
    assert report is not None
    with alone(Path(report[1]).parent, RUN_S) as free:  # the run does not wait for the mirror
        assert free
