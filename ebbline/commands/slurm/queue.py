"""The Slurm job of a study: its script writes the number of the job into the study's folder."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

JOB = "slurm-job"
ANSWER_S = 10.0  # how long squeue may take: a busy controller must not block `ebbline status`
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")


@dataclass(frozen=True)
class QueuedJob:
    """A job that waits or runs. `reason` is Slurm's, such as Resources or BeginTime."""

    number: str
    state: str
    reason: str

    def __str__(self) -> str:
        reason = f" ({self.reason})" if self.reason not in ("", "None") else ""
        return f"job {self.number} is {self.state}{reason}"


def queued_job(folder: Path) -> QueuedJob | None:
    """The job of the study with this folder, if Slurm still has it waiting or running.

    None also when this machine has no Slurm, or when Slurm does not answer.
    """
    try:
        number = (folder / JOB).read_text().strip()
    except OSError:
        return None
    if not number.isdigit() or shutil.which("squeue") is None:
        return None
    try:
        done = subprocess.run(
            ["squeue", "--noheader", "--jobs", number, "--format=%T|%r"],
            capture_output=True,
            text=True,
            timeout=ANSWER_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    state, _, reason = done.stdout.strip().partition("|")
    if done.returncode != 0 or not state or state in ENDED:
        return None
    return QueuedJob(number, state, reason)
