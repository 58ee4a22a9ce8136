"""The W&B mirror: reads the truth and shows it on Weights & Biases; nothing reads it back, nothing waits for it.

It runs as a process of its own (`python -m analysis.mirror STUDY --home DIR`) until its standard input closes, which
also happens when the process that started it dies. What it has shown is in FOLDER/wandb/mirrored.json, so a restart goes
on from there; run ids come from the study and the point, so showing something twice changes nothing.

Invariants: W&B down, slow or absent never raises into the caller and never holds `update` past its bound; rates, counts,
settings and hashes leave this machine, prompts, completions, code, console output and files never do.
"""

import csv
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from analysis.files import write_whole
from analysis.frontier import finished, frontier_hypervolume
from analysis.wording import settings_label
from cluster.store import Artifact, Store
from sweeps.points import Result
from sweeps.study import Study
from tasks.identity import digest
from tasks.train_files import CURVE

if TYPE_CHECKING:
    import wandb

Mode = Literal["online", "offline", "disabled"]
