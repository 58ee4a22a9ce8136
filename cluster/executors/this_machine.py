"""The capacity of this machine: its GPUs, or logical GPUs if it has no driver."""

import re
import shutil
import subprocess

from ebbline.cluster.executors.choice import ExecutorOptions
from ebbline.cluster.executors.executor import ACCELERATOR_TYPE, SLOTS, Capacity, Host


def capacity_here(options: ExecutorOptions) -> Capacity:
    """The capacity of an executor that uses this machine alone."""
    names = _own_gpus()
    if names is None:
        return Capacity((Host("here", options.logical_gpus, SLOTS),))
    # The same pattern as Ray's, so that types have Ray's names.
    found = re.search(r"(?:NVIDIA |Tesla )+([A-Z]+\d+[A-Za-z]*)", names[0]) if names else None
    return Capacity(
        (Host("here", len(names), SLOTS, {ACCELERATOR_TYPE: found[1]} if found else {}),)
    )


def _own_gpus() -> list[str] | None:
    """The names of this machine's GPUs; None without NVIDIA's driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return [line.strip() for line in listed.stdout.splitlines() if line.strip()]
