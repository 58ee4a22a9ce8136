"""Counted work of stages with a model: the model's shape, its bytes in memory, and the work of a
pass over it. No torch; docs/costs.md has the formulas.
"""

import json
import math
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from ebbline.tasks.data.batch_shape import rows_together, width_of
from ebbline.tasks.data.rows import TEXT_BYTES
from ebbline.tasks.errors import StudyError
from ebbline.tasks.models.memory import LIKE_LLAMA, Shape, quantised_bytes, shape_of
from ebbline.tasks.models.sizes import named_shape, organism_shape
from ebbline.tasks.specs import Dtype, OrganismSpec, Quantisation
from ebbline.tasks.stage import Input, Source, stage_of
from ebbline.tasks.stage_kind import Load

BATCH = 32  # rows that are generated together
ASSUMED = "7b"  # the assumed size of a model whose name has none
# Kernels of a layer's forward pass, and those that LoRA or quantisation adds for each linear
KERNELS, KERNELS_A_LINEAR = 14, 4


def model_shape(item: Input) -> Shape:
    """The shape of the model that a stage reads: from its config.json, its organism's size, or the
    number in its name.

    A stage that makes a model from another reads the other as `model` or `source`.
    """
    stage = stage_of(item)
    if stage is None:
        return _source_shape(item.location) if isinstance(item, Source) else _assumed()
    if isinstance(stage.spec, OrganismSpec):
        return organism_shape(stage.spec.size)
    return model_shape(stage.inputs["model" if "model" in stage.inputs else "source"])


@lru_cache(maxsize=256)
def _source_shape(location: str) -> Shape:
    config = Path(location) / "config.json"
    if not location.startswith("hub:") and config.is_file():
        with suppress(ValueError, KeyError):  # a folder that is no model raises when it is loaded
            content = json.loads(config.read_text())
            if content.get("model_type") in LIKE_LLAMA:
                return shape_of(content)
    name = location.removeprefix("hub:model:").partition("@")[0]
    return named_shape(Path(name).name) or _assumed()


def known_size(location: str) -> bool:
    """Whether a model from outside says how large it is. If it does not, its size is assumed to be
    `ASSUMED`.
    """
    name = location.removeprefix("hub:model:").partition("@")[0]
    return (Path(location) / "config.json").is_file() or named_shape(Path(name).name) is not None


def _assumed() -> Shape:
    shape = named_shape(ASSUMED)
    if shape is None:
        raise StudyError(
            f"no shape is known for {ASSUMED!r}; name one of ebbline.tasks.models.sizes"
        )
    return shape


def width(dtype: Dtype) -> int:
    """Bytes of one element."""
    return 4 if dtype == "float32" else 2


def weights(shape: Shape, quantisation: Quantisation, dtype: Dtype) -> float:
    """Bytes of a model in memory."""
    quantised = quantised_bytes(shape, quantisation, width(dtype))
    return quantised + shape.other_parameters * width(dtype)


def forward_flops(shape: Shape, tokens: float, context: float) -> float:
    """FLOPs of a forward pass: 2 for each weight and token, plus 4 x layers x width x context of
    attention for each token.
    """
    return tokens * (
        2 * (shape.linear_parameters + shape.vocabulary * shape.hidden)
        + 4 * shape.layers * shape.queries * context
    )


def layer_kernels(shape: Shape, quantisation: Quantisation) -> int:
    """The number of kernels in a layer's forward pass with an adapter."""
    return KERNELS + KERNELS_A_LINEAR * len(shape.linears) * (2 if quantisation != "none" else 1)


def training_passes(
    shape: Shape, steps: float, tokens: float, weight_bytes: float, kernels: float, written: float
) -> Load:
    """The work of `steps` training steps of `tokens` tokens each. A step counts as three forward
    passes.
    """
    forwards = 3.0
    return Load(
        flops=forwards * forward_flops(shape, steps * tokens, tokens / BATCH),
        moved=forwards * steps * weight_bytes,
        kernels=forwards * steps * shape.layers * kernels,
        read=2 * shape.parameters,
        written=written,
        tokens=steps * tokens,
    )


def generation(
    shape: Shape,
    quantisation: Quantisation,
    dtype: Dtype,
    rows: int,
    tokens: int,
    new: int,
    batch_size: int,
) -> Load:
    """The work of reading all prompts, then of one pass over the weights for each new token of a
    batch.
    """
    most = 1 if quantisation == "int8" else batch_size
    passes = math.ceil(rows / rows_together(width_of(tokens), new, most)) * (1 + new)
    return Load(
        flops=forward_flops(shape, rows * (tokens + new), tokens + new),
        moved=passes * weights(shape, quantisation, dtype),
        kernels=passes * shape.layers * layer_kernels(shape, quantisation),
        read=2 * shape.parameters,
        written=rows * (200 + TEXT_BYTES * new),
        tokens=rows * (tokens + new),
    )
