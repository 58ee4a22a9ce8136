"""What this machine has for stages: its GPUs, or logical ones."""

import re
import shutil
import subprocess

from ebbline.cluster.executors.choice import Wanted
from ebbline.cluster.executors.executor import ACCELERATOR_TYPE, SLOTS, Capacity, Host


def capacity_here(wanted: Wanted) -> Capacity:
    """What an executor on this machine alone would have."""
    names = _own_gpus()
    if names is None:
        return Capacity((Host("here", wanted.logical_gpus, SLOTS),))
    known = (
        re.search(r"(?:NVIDIA |Tesla )+([A-Z]+\d+[A-Za-z]*)", names[0]) if names else None
    )  # as Ray names types
    return Capacity(
        (Host("here", len(names), SLOTS, {ACCELERATOR_TYPE: known[1]} if known else {}),)
    )


def _own_gpus() -> list[str] | None:
    """The names of this machine's GPUs; None where there is no driver for any, which is where
    logical ones stand for them.
    """
    if shutil.which("nvidia-smi") is None:
        return None
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return [line.strip() for line in listed.stdout.splitlines() if line.strip()]
