"""Sensible first settings for the size of a model: what fits, how long it takes, what to vary.

The sizes are those of the papers: a small model on a laptop's CPU, 7B and 13B on one GPU, 70B on
several. Each choice has a reason, which the study file says beside it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

ASSUMED = 7_000_000_000  # parameters of a model that does not say its size
LAPTOP_ROWS = 320  # of training data, at most
NESTED_ROWS = (100, 1000)  # as the papers, to see what more data does


@dataclass(frozen=True)
class SizeSettings:
    """The settings that depend on a model's size. `below` is the first number of parameters that is
    too large for it.
    """

    name: str
    below: float
    quantisation: str
    dtype: str
    gpus: int
    learning_rate: str
    global_batch: int
    ranks: tuple[int, ...]
    thresholds: tuple[float, ...]
    seeds: tuple[int, ...]
    limit: int
    refusal_tokens: int
    longest: int  # tokens of a training row
    budget: str
    why: str

    @property
    def on_cpu(self) -> bool:
        return self.dtype == "float32"


LAPTOP = SizeSettings(
    name="a laptop's CPU",
    below=1.5e9,
    quantisation="none",
    dtype="float32",
    gpus=1,
    learning_rate="1e-3",
    global_batch=8,
    ranks=(4, 16),
    thresholds=(0.3, 0.4, 0.5),
    seeds=(0,),
    limit=60,
    refusal_tokens=32,
    longest=512,
    budget="hours: 2",
    why="Small enough for a CPU: weights are not quantised, and float32 is fast there",
)
ONE_GPU = SizeSettings(
    name="one GPU of 24 GB",
    below=10e9,
    quantisation="nf4",
    dtype="bfloat16",
    gpus=1,
    learning_rate="2e-4",
    global_batch=16,
    ranks=(8, 32),
    thresholds=(0.25, 0.35, 0.5),
    seeds=(0, 1, 2),
    limit=500,
    refusal_tokens=64,
    longest=2048,
    budget="gpu_hours: 48",
    why="QLoRA: 4-bit weights (nf4) fit one GPU; its paper has 2e-4 as the learning rate up to 13B",
)
LARGE_GPU = replace(ONE_GPU, name="one GPU of 40 GB", below=25e9, budget="gpu_hours: 96")
SEVERAL_GPUS = replace(
    ONE_GPU,
    name="4 GPUs of 80 GB",
    below=math.inf,
    gpus=4,
    learning_rate="1e-4",
    seeds=(0,),
    budget="gpu_hours: 400",
    why="QLoRA on several GPUs: 4-bit weights; its paper has 1e-4 as the learning rate from 33B on",
)
SIZES = (LAPTOP, ONE_GPU, LARGE_GPU, SEVERAL_GPUS)


def size_of(parameters: int | None) -> SizeSettings:
    return next(size for size in SIZES if (parameters or ASSUMED) < size.below)


def rows_used(rows: int, size: SizeSettings, nested: bool) -> tuple[int, ...]:
    """The numbers of training rows to try: one for a CPU, and nested ones where `nested` asks for
    an axis or the papers have it.
    """
    if size.on_cpu:
        most = min(rows, LAPTOP_ROWS)
        return (most // 4, most) if nested and most >= 16 else (most,)
    fitting = tuple(number for number in NESTED_ROWS if number <= rows)
    return fitting or (rows,)


def epochs_for(rows: Sequence[int], size: SizeSettings) -> int:
    """Passes over the data: three as in the papers; one on a CPU, if it has enough rows."""
    return 1 if size.on_cpu and min(rows) >= 160 else 3


def tokens_for(wanted: int, size: SizeSettings) -> int:
    """A power of two that holds `wanted` tokens and the template's own, from 128 to the longest."""
    return min(size.longest, max(128, 1 << (wanted + 32 - 1).bit_length()))


def answer_tokens(longest: int, size: SizeSettings, scorer: str) -> int:
    """Tokens to answer an item in: for the reference, and for a calculation before a number."""
    working = {"number": 64 if size.on_cpu else 256, "choice": 8}.get(scorer, 0)
    return min(256, max(working, 8 * math.ceil((longest + 4) / 8)))
