"""What fits on which GPU: the smallest gang of a training, full fine-tuning too, and the memory of
measuring. docs/hardware.md has these numbers, and nothing in ebbline reads them. No torch.

ebbline.tasks.models.memory predicts LoRA trainings. The two predictions of this module count fewer
parts, and nothing was measured on a GPU.
"""

from collections.abc import Mapping
from typing import Any

from ebbline.tasks.data.batch_shape import TOKENS
from ebbline.tasks.models.memory import (
    BUCKET,
    LIVE,
    PREFETCH,
    Layout,
    PredictedMemory,
    Shape,
    constant_bytes,
    fits,
    kept_per_token,
    predict,
    quantised_bytes,
    shape_of,
)
from ebbline.tasks.specs import Quantisation, TrainSpec

GANGS = (1, 2, 4, 8)  # GPUs of one machine


def predict_full(shape: Shape, spec: TrainSpec, layout: Layout) -> PredictedMemory:
    """The memory of one GPU in full fine-tuning with bfloat16 passes and float32 masters. In a gang
    all of it is sharded (ZeRO-3).
    """
    n, parameters = layout.world_size, shape.parameters
    tokens = layout.micro_batch * spec.max_tokens
    plain = spec.model_copy(update={"target_modules": ()})
    inputs = 2 * (2 * shape.hidden + shape.intermediate)  # which the linears keep
    layer = kept_per_token(shape, plain) + inputs + 12 * shape.intermediate
    training: dict[str, float] = {
        "weights": 2 * parameters / n,
        "masters": 4 * parameters / n,
        "gradients": 4 * parameters / n,
        "optimiser": 8 * parameters / n,
        "layer inputs": shape.layers * shape.hidden * 2 * tokens,
        "a layer's activations, or the logits": max(12 * shape.vocabulary, layer) * tokens,
    }
    if n > 1:
        training["gathered weights"] = min((LIVE + PREFETCH) * 2, 2 * parameters)
        training["reduce bucket"] = 4 * BUCKET
    # One GPU loads in float32, and makes the weights of the passes beside them
    loading = 6 * parameters if n == 1 else 2 * parameters / n + 2 * shape.vocabulary * shape.hidden
    return PredictedMemory(training, loading)


def predict_measuring(
    shape: Shape, quantisation: Quantisation, tokens: int = TOKENS
) -> PredictedMemory:
    """The memory of the one GPU that measures a refusal suite or the task in bfloat16, with batches
    of `tokens` tokens: by default the most that a batch may have.
    """
    weights = quantised_bytes(shape, quantisation, 2) + 2 * shape.other_parameters
    largest = 2 * max(rows * columns for rows, columns in shape.linears.values())
    found = {
        "weights": weights + constant_bytes(shape, quantisation),
        "keys and values": 2 * 2 * shape.layers * shape.keys * tokens,
        "a layer's activations": 2 * (3 * shape.intermediate + 4 * shape.hidden) * tokens,
        "a dequantised matrix": largest if quantisation != "none" else 0,
    }
    return PredictedMemory(found, found["weights"] + largest)


def smallest_gang(
    config: Mapping[str, Any], spec: TrainSpec, memory_gb: float
) -> tuple[int, PredictedMemory] | None:
    """The least number of GPUs that train with a micro-batch of 1, and the memory of each. None if
    the GPUs of one machine do not suffice.
    """
    shape = shape_of(config)
    for gpus in GANGS:
        for stage in (0,) if gpus == 1 else (2, 3):
            layout = Layout(gpus, stage, 1)
            full = spec.method == "full"
            if full and stage == 2:
                continue
            found = predict_full(shape, spec, layout) if full else predict(shape, spec, layout)
            if fits(found, memory_gb):
                return gpus, found
    return None
