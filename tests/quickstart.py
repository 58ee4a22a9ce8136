"""The quickstart, run once by the real command for every test that looks at a finished study."""

import os
import re
import subprocess
import sys
from pathlib import Path

RUN_S = 1500


def ebbline(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "ebbline.cli", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=RUN_S, env=os.environ | {"WANDB_MODE": "offline"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def run_quickstart(home: Path) -> None:
    said = ebbline("run", "quickstart", "--home", str(home))
    for what in ("results", "frontier", "figure", "report"):
        named = re.search(rf"^{what} +(.+)$", said, re.MULTILINE)
        assert named is not None and Path(named[1]).stat().st_size > 0, said
