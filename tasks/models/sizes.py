"""Sizes of models, for estimates before anything is loaded. No torch.

The sizes of the organisms are exact. The size of a model on this machine comes from its files. That
of another is the number in its name (`Llama-2-13b`, `SmolLM2-135M`), or a guess.
"""

import math
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from ebbline.tasks.errors import ModelError
from ebbline.tasks.headers.model_header import (
    UNGATED,
    KnownFrom,
    ModelHeader,
    read_header,
    stamps_of,
)
from ebbline.tasks.models.memory import LIKE_LLAMA, Shape


@dataclass(frozen=True)
class Size:
    """An organism's shape and its pretraining. Widths are multiples of 64, so that NF4 blocks
    fit.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    epochs: int
    learning_rate: float
    batch: int = 64


SIZES = {
    "small": Size(layers=2, hidden=64, intermediate=192, heads=4, epochs=8, learning_rate=4e-3),
    "medium": Size(layers=4, hidden=64, intermediate=192, heads=4, epochs=6, learning_rate=4e-3),
    "large": Size(layers=3, hidden=128, intermediate=384, heads=4, epochs=8, learning_rate=3e-3),
}
VOCABULARY = 179  # of the invented language, with its special tokens
PRETRAINING_ROWS = 5020
TASK_ITEMS = {"mmlu": 14_042, "hellaswag": 10_042}  # lm-eval's test sets
TASK_SUBJECTS = {"mmlu": 57}  # tasks of a group; lm-eval applies a limit to each
ASSUMED = "7b"  # the guessed size of a model whose files and name give none

_LLAMA = {  # by parameters
    0.135e9: Shape(30, 576, 576, 192, 9, 1536, 49_152, True),
    0.36e9: Shape(32, 960, 960, 320, 15, 2560, 49_152, True),
    1.1e9: Shape(22, 2048, 2048, 256, 32, 5632, 32_000, False),
    1.7e9: Shape(24, 2048, 2048, 2048, 32, 8192, 49_152, True),
    3e9: Shape(28, 3072, 3072, 1024, 24, 8192, 128_256, True),
    7e9: Shape(32, 4096, 4096, 4096, 32, 11_008, 32_000, False),
    8e9: Shape(32, 4096, 4096, 1024, 32, 14_336, 128_256, False),
    13e9: Shape(40, 5120, 5120, 5120, 40, 13_824, 32_000, False),
    34e9: Shape(48, 8192, 8192, 1024, 64, 22_016, 32_000, False),
    70e9: Shape(80, 8192, 8192, 1024, 64, 28_672, 32_000, False),
}
_NUMBER = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)(b|m)(?![a-z0-9])", re.IGNORECASE)


def organism_shape(size: str) -> Shape:
    """The shape of an organism's model."""
    own = SIZES[size]
    return Shape(
        own.layers,
        own.hidden,
        own.hidden,
        own.hidden,
        own.heads,
        own.intermediate,
        VOCABULARY,
        False,
    )


def named_shape(name: str) -> Shape | None:
    """The known shape with the parameters nearest to the last number in a model's name. None if the
    name has no number.
    """
    found = _NUMBER.findall(name)
    if not found:
        return None
    number, unit = found[-1]
    parameters = float(number) * (1e9 if unit.lower() == "b" else 1e6)
    return (
        _LLAMA[min(_LLAMA, key=lambda count: abs(math.log(count / parameters)))]
        if parameters > 0
        else None
    )


@dataclass(frozen=True)
class ModelSize:
    """A model's number of parameters, how it is known, and a shape with the work and the memory of
    such a model. `exact` is false for a number that follows from a config or a name.
    """

    shape: Shape
    parameters: int
    architecture: str
    known_from: KnownFrom | Literal["the name", "a guess"]
    exact: bool

    @property
    def guessed(self) -> bool:
        return self.known_from == "a guess"


def size_in(path: Path) -> ModelSize | None:
    """The size of the model in a folder or a GGUF file; None if its files do not give it.

    A file that is damaged raises an error when it is loaded.
    """
    return _size_in(path, stamps_of(path))


@lru_cache(maxsize=256)
def _size_in(path: Path, stamps: tuple[tuple[str, int, int], ...]) -> ModelSize | None:
    """`stamps` is only a key of the cache."""
    try:
        header = read_header(path)
    except (ModelError, OSError):
        return None
    shape = header_shape(header)
    if shape is None:
        return None
    counted = header.parameters
    return ModelSize(
        shape,
        shape.parameters if counted is None else counted,
        header.architecture,
        header.known_from,
        counted is not None,
    )


def named_size(name: str) -> ModelSize:
    """The size by the number in a model's name, or a guess."""
    shape = named_shape(name)
    if shape is not None:
        return ModelSize(shape, shape.parameters, "llama", "the name", False)
    shape = named_shape(ASSUMED)
    assert shape is not None
    return ModelSize(shape, shape.parameters, "llama", "a guess", False)


def header_shape(header: ModelHeader) -> Shape | None:
    """A Llama-shaped model with the parameters of any model; None if its config lacks a size.

    Where the weights are counted, the width of its MLP makes up for what other architectures have
    more or fewer of. All experts of a mixture count.
    """
    found = header.numbers
    if not {"layers", "hidden", "heads", "vocabulary"} <= found.keys():
        return None
    heads, hidden = found["heads"], found["hidden"]
    width = found.get("head_width") or max(1, hidden // heads)
    mlp = found.get("intermediate") or 4 * hidden
    if found.get("experts", 1) > 1:
        mlp = found.get("expert_width", mlp) * found["experts"]
    if header.architecture in UNGATED:
        mlp = max(1, round(mlp * 2 / 3))
    shape = Shape(
        found["layers"],
        hidden,
        heads * width,
        found.get("key_heads", heads) * width,
        heads,
        mlp,
        found["vocabulary"],
        header.tied,
    )
    if header.parameters is None or header.architecture in LIKE_LLAMA:
        return shape
    missing = header.parameters - shape.parameters
    return replace(
        shape, intermediate=max(1, mlp + round(missing / (3 * shape.layers * shape.hidden)))
    )
