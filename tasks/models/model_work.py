"""Counted work of stages with a model: the model's shape, its bytes in memory, and the work of a
pass over it. No torch; docs/costs.md has the formulas.
"""

import math
from collections.abc import Iterable
from pathlib import Path

from ebbline.tasks.data.batch_shape import rows_together, width_of
from ebbline.tasks.data.rows import TEXT_BYTES
from ebbline.tasks.models.memory import Shape, quantised_bytes
from ebbline.tasks.models.sizes import ModelSize, named_shape, named_size, organism_shape, size_in
from ebbline.tasks.specs import Dtype, OrganismSpec, Quantisation
from ebbline.tasks.stage import Input, Source, Stage, closure, stage_of
from ebbline.tasks.stage_kind import Load

BATCH = 32  # rows that are generated together
MODELS = ("model", "source", "base", "aligned")  # inputs of stages that are models
# Kernels of a layer's forward pass, and those that LoRA or quantisation adds for each linear
KERNELS, KERNELS_A_LINEAR = 14, 4


def model_shape(item: Input) -> Shape:
    """The shape of the model that a stage reads: from its files, its organism's size, or the number
    in its name.

    A stage that makes a model from another reads the other as `model` or `source`.
    """
    stage = stage_of(item)
    if stage is None:
        location = item.location if isinstance(item, Source) else ""
        return size_at(location).shape
    if isinstance(stage.spec, OrganismSpec):
        return organism_shape(stage.spec.size)
    return model_shape(stage.inputs["model" if "model" in stage.inputs else "source"])


def size_at(location: str) -> ModelSize:
    """The size of a model from outside. That of a hub model is the number in its name, so that the
    work of a study is the same on every machine.
    """
    name = Path(location.removeprefix("hub:model:").partition("@")[0]).name
    if location.startswith("hub:") and named_shape(name) is not None:
        return named_size(name)
    path = cached_snapshot(location) if location.startswith("hub:") else Path(location)
    found = None if path is None or not path.exists() else size_in(path)
    return named_size(name) if found is None else found


def cached_snapshot(location: str) -> Path | None:
    """The snapshot of a pinned hub model that is already on this machine, with its config.json."""
    from huggingface_hub import try_to_load_from_cache  # only studies with hub models need it

    repo_type, _, rest = location.removeprefix("hub:").partition(":")
    name, _, commit = rest.partition("@")
    found = try_to_load_from_cache(
        name, "config.json", revision=commit.partition("#")[0] or None, repo_type=repo_type
    )
    return Path(found).parent if isinstance(found, str) else None


def guessed_models(stages: Iterable[Stage]) -> set[str]:
    """The locations of the models that the stages build on and whose size is a guess."""
    locations = {
        item.location
        for stage in closure(stages)
        for name, item in stage.inputs.items()
        if name in MODELS and isinstance(item, Source)
    }
    return {location for location in locations if size_at(location).guessed}


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
