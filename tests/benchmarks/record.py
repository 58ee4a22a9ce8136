"""What every benchmark writes: the machine, the versions, the commit, the command, a row per
measurement, and ratios.

A ratio's name says which way it points: `time_reference_over_ebbline_...` above one is in ebbline's
favour, `time_over_floor_...` is at best one.
"""

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ebbline.tasks.files import write_whole

RESULTS = Path(__file__).parent / "results"


def write(
    name: str,
    command: str,
    packages: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    ratios: Mapping[str, float],
) -> Path:
    """results/NAME.json."""
    found = {
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "commit": commit(),
        "command": command,
        "rows": list(rows),
        "ratios": {key: float(f"{value:.4g}") for key, value in ratios.items()},
    }
    return write_json(RESULTS / f"{name}.json", found)


def write_json(path: Path, found: Mapping[str, Any]) -> Path:
    return write_whole(path, lambda fresh: fresh.write_text(json.dumps(found, indent=1) + "\n"))


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch  # a benchmark that starts other processes may need none

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return host() | {"gpus": gpus}


def host() -> dict[str, Any]:
    """The machine without its GPUs. Imports no torch."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory_gb, 1),
    }


def commit() -> str:
    """The commit of this tree, and whether it has changes."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" with uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown: a copy without git"


def spread(times_s: Sequence[float]) -> str:
    """`+-N%`: half the distance between the fastest and the slowest run, of their median; empty for
    one run.
    """
    middle = statistics.median(times_s)
    return f"+-{(max(times_s) - min(times_s)) / 2 / middle:.0%}" if len(times_s) > 1 else ""


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Callable[[Any], str]]) -> str:
    """Rows as a Markdown table; a column is formatted by its function, and what a row lacks is a
    dash.
    """
    lines = [list(columns)] + [
        ["-" if row.get(name) is None else show(row[name]) for name, show in columns.items()]
        for row in rows
    ]
    lines.insert(1, ["---" for _ in columns])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
