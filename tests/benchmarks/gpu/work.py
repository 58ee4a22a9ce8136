"""How much each part of `make gpu-check` does, and what it gets."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebbline.tasks.models.loading import Residents
from ebbline.tasks.models.memory import MARGIN, PredictedMemory, Shape, fits, shape_of
from tests.benchmarks.gpu.models import MINIATURE, SHAPES, Peak, residents, write_folder

Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much each part does."""

    device: str = "cuda"
    miniature: bool = False
    tokens: int = 2048  # of a row, in the trainings beside the anchors
    rows: int = 8  # of a step there
    rank: int = 64
    steps: int = 3  # timed
    pack_tokens: int = 512
    packs: tuple[int, ...] = (8, 32)
    pack_steps: int = 4
    adapters: int = 8
    prompts: int = 32
    prompt_words: int = 96
    new_tokens: int = 32
    shots: int = 384  # tokens that the questions of a subject share
    subjects: int = 4
    questions: int = 8  # of a subject, and as many items with four endings
    layers: int = 4  # of the pair that is projected
    decode_steps: int = 8


SMALL = Sizes(
    device="cpu",
    miniature=True,
    tokens=16,
    rows=2,
    rank=2,
    steps=1,
    pack_tokens=8,
    packs=(2, 4),
    pack_steps=1,
    adapters=2,
    prompts=3,
    prompt_words=4,
    new_tokens=3,
    shots=24,
    subjects=2,
    questions=2,
    layers=1,
    decode_steps=2,
)


@dataclass(frozen=True)
class Work:
    """What a part gets: the sizes, an empty folder, and the GPU's memory if there is one."""

    sizes: Sizes
    folder: Path
    memory_gb: float | None

    def model(self, name: str) -> tuple[Path, Residents, Shape]:
        """A model folder without weights, residents that make its weights, and its shape."""
        shape = MINIATURE if self.sizes.miniature else SHAPES[name]
        folder = write_folder(self.folder / name, shape)
        config = json.loads((folder / "config.json").read_text())
        return folder, residents(), shape_of(config)

    def too_large(self, predicted: PredictedMemory) -> str:
        """Why something does not fit on this GPU; empty if it does."""
        if self.memory_gb is None or fits(predicted, self.memory_gb):
            return ""
        free = self.memory_gb * (1 - MARGIN)
        return f"needs {predicted.total_gb:.1f} GB, and {free:.1f} GB may be used"


def note(text: str) -> None:
    print(f"    {text}", file=sys.stderr, flush=True)


def memory(peak: Peak, predicted_gb: float | None) -> Row:
    return {"peak_memory_gb": peak.gb(), "predicted_memory_gb": predicted_gb}
