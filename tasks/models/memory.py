"""GPU memory of a LoRA training, predicted from the model's config.json and the layout before
anything is loaded; the choice of a layout; and the record of where an attempt ran. Importing this
module imports no torch.

Every part counts what PyTorch, PEFT, bitsandbytes and DeepSpeed allocate: docs/gangs.md has the
formulas and the measurements that they were checked against. GB are 2^30 bytes, as GPUs are sold.
Only LoRA on Llama-shaped models is predicted; full fine-tuning is not.
"""

import json
import logging
import math
import platform
import resource
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ebbline.tasks.errors import ModelError, TrainingError
from ebbline.tasks.specs import Quantisation, Spec, TrainSpec
from ebbline.tasks.stage import Context

_log = logging.getLogger(__name__)

GB = 2**30
LIKE_LLAMA = ("llama", "mistral")
# DeepSpeed's buffers, in elements. Its own defaults (a bucket of 5e8, 1e9 live) take 4 GB of each
# GPU for any training.
BUCKET, LIVE, PREFETCH, PERSISTENT = 50_000_000, 500_000_000, 50_000_000, 100_000
CONTEXT_GB = 1.0  # memory of CUDA and NCCL, which no allocator counts
MARGIN = 0.05  # share of a GPU kept free for the allocator's fragments and the driver


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-shaped model."""

    layers: int
    hidden: int
    queries: int  # width of q_proj's output
    keys: int  # width of k_proj's and v_proj's output
    heads: int
    intermediate: int
    vocabulary: int
    tied: bool

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each linear of a layer. These are quantised and have LoRA."""
        return {
            "q_proj": (self.hidden, self.queries),
            "k_proj": (self.hidden, self.keys),
            "v_proj": (self.hidden, self.keys),
            "o_proj": (self.queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def linear_parameters(self) -> int:
        return self.layers * sum(rows * columns for rows, columns in self.linears.values())

    @property
    def norm_parameters(self) -> int:
        return (2 * self.layers + 1) * self.hidden

    @property
    def other_parameters(self) -> int:
        """Embeddings, output head and norms: never quantised."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden + self.norm_parameters

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.other_parameters

    def adapter(self, spec: TrainSpec) -> list[int]:
        """The number of elements of each LoRA matrix."""
        pairs = [self.linears[name] for name in spec.target_modules if name in self.linears]
        return [spec.rank * width for pair in pairs for width in pair] * self.layers


@dataclass(frozen=True)
class Layout:
    """How a training is laid out on its GPUs: Context, never identity. `zero_stage` is 0 on one
    GPU.
    """

    world_size: int
    zero_stage: int
    micro_batch: int
    gradient_checkpointing: bool = True


@dataclass(frozen=True)
class PredictedMemory:
    """Bytes on each GPU: by item in the steps of a training, and in total while the model is
    loaded.
    """

    training: Mapping[str, float]
    loading: float

    @property
    def allocated_gb(self) -> float:
        """The peak that torch's allocator will report."""
        return max(sum(self.training.values()), self.loading) / GB

    @property
    def total_gb(self) -> float:
        return self.allocated_gb + CONTEXT_GB


def predictable(config: Mapping[str, Any], spec: TrainSpec) -> bool:
    plain = not config.get("attention_bias") and not config.get("mlp_bias")
    return spec.method == "lora" and config.get("model_type") in LIKE_LLAMA and plain


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The sizes in a Hugging Face config.json. Raises ModelError for a model that is not
    Llama-shaped.
    """
    if config.get("model_type") not in LIKE_LLAMA:
        raise ModelError(
            f"memory is predicted for {' and '.join(LIKE_LLAMA)} models; this one is "
            f"{config.get('model_type')!r}"
        )
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    width = config.get("head_dim") or hidden // heads
    return Shape(
        layers=config["num_hidden_layers"],
        hidden=hidden,
        queries=heads * width,
        keys=(config.get("num_key_value_heads") or heads) * width,
        heads=heads,
        intermediate=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def zero_buffers(stage: int) -> dict[str, Any]:
    """DeepSpeed's `zero_optimization` settings that limit the memory of its own buffers."""
    if stage < 3:
        return {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    return {
        "reduce_bucket_size": BUCKET,
        "stage3_max_live_parameters": LIVE,
        "stage3_max_reuse_distance": LIVE,
        "stage3_prefetch_bucket_size": PREFETCH,
        "stage3_param_persistence_threshold": PERSISTENT,
    }


def predict(
    shape: Shape, spec: TrainSpec, layout: Layout, others: Sequence[TrainSpec] = ()
) -> PredictedMemory:
    """The memory of one GPU, with sequences of `max_tokens` tokens. `others` are the other
    trainings of its pack.
    """
    n, stage = layout.world_size, layout.zero_stage
    width = 4 if spec.dtype == "float32" else 2
    members = [spec, *others]
    matrices = [size for member in members for size in shape.adapter(member)]
    adapter, small = sum(matrices), sum(size for size in matrices if size <= PERSISTENT)
    weights = quantised_bytes(shape, spec.quantisation, width) + shape.other_parameters * width
    constants = constant_bytes(shape, spec.quantisation)
    largest = max(rows * columns for rows, columns in shape.linears.values()) * width
    tokens = layout.micro_batch * spec.max_tokens * len(members)
    kept = sum(kept_per_token(shape, member) for member in members) / len(members)
    layer = kept + (12 if width == 2 else 8) * shape.intermediate
    step = max(
        12 * shape.vocabulary * tokens,
        layer * tokens + (largest if spec.quantisation != "none" else 0),
        penalty_bytes(shape, members),
    )
    training: dict[str, float] = {
        "base weights": weights / n if stage == 3 else weights,
        "quantisation constants": constants,
        "adapter": 4 * adapter,
        "gradients": 4 * adapter / (n if stage >= 2 else 1),
        "optimiser": 8 * adapter / n,
        "layer inputs": shape.layers * shape.hidden * width * tokens
        if layout.gradient_checkpointing
        else 0,
        "a layer's activations, or the logits": step,
    }
    if not layout.gradient_checkpointing:
        training["a layer's activations, or the logits"] = step + (shape.layers - 1) * kept * tokens
    # Adapters of one rank are multiplied as one stack, which is kept for the backward pass of its
    # layer
    if others:
        training["stacked adapters"] = (
            4 * adapter / (shape.layers if layout.gradient_checkpointing else 1)
        )
    if averaged := sum(sum(shape.adapter(each)) for each in members if each.ema_decay):
        training["moving averages"] = 4 * averaged  # a gang's are on rank 0
    if any(each.reads_alignment for each in members):
        training["alignment of the penalty"] = width * alignment_elements(shape, spec) / n
    if n > 1:
        # The float32 copy that DeepSpeed updates. Under ZeRO-3 the weights are sharded too, and
        # only small ones stay whole.
        shares = 2 if stage == 3 else 1
        training["adapter"] = 4 * (adapter * shares / n + (small if stage == 3 else adapter))
        training["reduce bucket"] = 4 * BUCKET
    if stage == 3:
        stored = 1 if spec.quantisation == "int8" else width
        training["gathered weights"] = (
            min((LIVE + PREFETCH) * stored, weights) + shape.norm_parameters * width
        )
    # A tensor is read, then quantised or sharded, one at a time. zero.Init works only without
    # quantisation.
    whole = weights / n if stage == 3 and spec.quantisation == "none" else weights
    embedding = shape.vocabulary * shape.hidden * width
    return PredictedMemory(training, whole + constants + 4 * adapter + max(largest, embedding))


def alignment_elements(shape: Shape, spec: TrainSpec) -> int:
    """The elements of V in the trained modules. A gang's members each keep a share of them."""
    pairs = [shape.linears[name] for name in spec.target_modules if name in shape.linears]
    return shape.layers * sum(inputs * outputs for inputs, outputs in pairs)


def penalty_bytes(shape: Shape, members: Sequence[TrainSpec]) -> int:
    """Bytes that AsFT's penalty takes for a moment, after the activations are freed: a module's V
    in float32, if it is kept in bfloat16.
    """
    if not any(each.reads_alignment and each.dtype == "bfloat16" for each in members):
        return 0
    return 4 * max(inputs * outputs for inputs, outputs in shape.linears.values())


def quantised_bytes(shape: Shape, quantisation: Quantisation, width: int) -> float:
    """Bytes of the linears' weights, for each weight `width` unquantised, 1 in int8, 0.5 in NF4."""
    return shape.linear_parameters * {"none": float(width), "int8": 1.0, "nf4": 0.5}[quantisation]


def constant_bytes(shape: Shape, quantisation: Quantisation) -> int:
    """Bytes of the constants that bitsandbytes keeps beside quantised weights. They are no
    parameters, so ZeRO-3 leaves them whole on each GPU.

    NF4 with double quantisation: a byte for every 64 weights, a float32 for every 256 of these
    bytes, and two tables and an offset for each matrix. int8: a float32 for each row.
    """
    if quantisation == "none":
        return 0
    if quantisation == "int8":
        return shape.layers * 4 * sum(outputs for _, outputs in shape.linears.values())
    total = 0
    for inputs, outputs in shape.linears.values():
        blocks = math.ceil(inputs * outputs / 64)
        total += blocks + 4 * math.ceil(blocks / 256) + 4 * (16 + 256 + 1)
    return shape.layers * total


def kept_per_token(shape: Shape, spec: TrainSpec) -> int:
    """Bytes of a token that one decoder layer with LoRA keeps for its backward pass.

    PEFT computes LoRA in float32. Each matrix copies its bfloat16 input; matrices with the same
    float32 input share it.
    """
    h, q, kv, ff = shape.hidden, shape.queries, shape.keys, shape.intermediate
    width = 4 if spec.dtype == "float32" else 2
    norms = 2 * (4 * h + 4)
    attention = width * (2 * q + 2 * kv) + 4 * shape.heads
    mlp = 3 * width * ff
    targets = [name for name in spec.target_modules if name in shape.linears]
    middle = 4 * spec.rank * len(targets)
    if width == 2:
        inputs = sum(4 * shape.linears[name][0] for name in targets)
    else:
        shared = [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}]
        inputs = 4 * h * sum(bool(names & set(targets)) for names in shared) + 4 * ff * (
            "down_proj" in targets
        )
    if spec.quantisation == "int8":
        # bitsandbytes keeps each input; in float32 LoRA has already kept it
        inputs += width * (2 * h + ff) if width == 2 else 0
    return norms + attention + mlp + middle + inputs


def fits(prediction: PredictedMemory, memory_gb: float) -> bool:
    return prediction.total_gb <= memory_gb * (1 - MARGIN)


def fitting(
    config: Mapping[str, Any], spec: TrainSpec, world_size: int, memory_gb: float
) -> Layout:
    """The layout with the largest micro-batch that fits on GPUs of `memory_gb`; of these, the one
    that communicates least.

    Raises TrainingError that says what does not fit, and what would.
    """
    shape = shape_of(config)
    found = _largest(shape, spec, world_size, memory_gb)
    if found is not None:
        return found
    smallest = Layout(world_size, 3 if world_size > 1 else 0, 1)
    needed = predict(shape, spec, smallest)
    loads = needed.loading >= sum(needed.training.values())
    most = (
        "the whole model while it is loaded"
        if loads
        else max(needed.training, key=lambda item: needed.training[item])
    )
    instead = (
        ", or ".join(_what_would_fit(shape, spec, world_size, memory_gb))
        or "more GPUs than 64, or larger ones"
    )
    raise TrainingError(
        f"this training needs {needed.total_gb:.1f} GB on each of {world_size} "
        f"GPU{'s' * (world_size > 1)} of {memory_gb:g} GB even with"
        f" a micro-batch of 1 (most of it: {most}; {MARGIN:.0%} of a GPU is kept free). "
        f"What would fit: {instead}"
    )


def most_packed(config: Mapping[str, Any], spec: TrainSpec, memory_gb: float, most: int) -> int:
    """How many trainings like this one fit on a GPU together, at most `most`, with the micro-batch
    that one has alone. 0 if not even one fits.

    Different trainings fit together if the sum of their shares, each one over this number, is at
    most 1.
    """
    shape = shape_of(config)
    layout = _largest(shape, spec, 1, memory_gb)
    if layout is None:
        return 0
    few, many = 1, most + 1
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (
            (middle, many)
            if fits(predict(shape, spec, layout, [spec] * (middle - 1)), memory_gb)
            else (few, middle)
        )
    return few


def _largest(shape: Shape, spec: TrainSpec, world_size: int, memory_gb: float) -> Layout | None:
    share = spec.global_batch // world_size
    for micro_batch in (size for size in range(share, 0, -1) if share % size == 0):
        for stage in (2, 3) if world_size > 1 else (0,):
            layout = Layout(world_size, stage, micro_batch)
            if fits(predict(shape, spec, layout), memory_gb):
                return layout
    return None


def _what_would_fit(
    shape: Shape, spec: TrainSpec, world_size: int, memory_gb: float
) -> Iterator[str]:
    for size in range(world_size + 1, 65):
        if spec.global_batch % size == 0 and _largest(shape, spec, size, memory_gb):
            yield f"{size} such GPUs"
            break
    if spec.quantisation != "nf4" and _largest(
        shape, spec.model_copy(update={"quantisation": "nf4"}), world_size, memory_gb
    ):
        yield "quantisation: nf4"
    shorter = spec.max_tokens // 2
    while shorter >= 64:
        if _largest(shape, spec.model_copy(update={"max_tokens": shorter}), world_size, memory_gb):
            yield f"train.max_tokens: {shorter}"
            break
        shorter //= 2
    for larger in (24, 40, 48, 80, 141, 192):
        if larger > memory_gb and _largest(shape, spec, world_size, larger):
            yield f"GPUs of {larger} GB"
            break


def laid_out(
    spec: Spec,
    inputs: Mapping[str, Path],
    ctx: Context,
    memory_gb: float | None,
    others: Sequence[TrainSpec] = (),
) -> tuple[Context, float | None]:
    """The Context with a training's layout in it, and the GB that the training is predicted to
    allocate on each GPU. None if there is no prediction.

    A training without a set micro-batch gets the largest that fits, if the GPU's memory is known. A
    pack with `others` gets the smallest of the micro-batches that its members would get alone.
    Raises TrainingError, before anything is loaded, if not even one row fits.
    """
    path = inputs["model"] / "config.json" if "model" in inputs else None
    # A folder that is no model raises an error when it is loaded
    if not isinstance(spec, TrainSpec) or path is None or not path.exists():
        return ctx, None
    config = json.loads(path.read_text())
    if not predictable(config, spec):
        return ctx, None
    if ctx.device != "cpu" and memory_gb is None:
        import torch  # only a worker has torch

        memory_gb = torch.cuda.get_device_properties(ctx.device).total_memory / GB
    if (
        ctx.micro_batch is None
        and memory_gb is not None
        and spec.global_batch % ctx.world_size == 0
    ):
        layouts = [fitting(config, member, ctx.world_size, memory_gb) for member in (spec, *others)]
        smallest = min(layouts, key=lambda layout: layout.micro_batch)
        ctx = replace(
            ctx, micro_batch=smallest.micro_batch, zero_stage=smallest.zero_stage or ctx.zero_stage
        )
    share = max(1, spec.global_batch // ctx.world_size)
    stage = ctx.zero_stage if ctx.world_size > 1 else 0
    layout = Layout(ctx.world_size, stage, min(ctx.micro_batch or share, share), ctx.recomputes)
    return ctx, predict(shape_of(config), spec, layout, others).allocated_gb


def reset_peak_memory(device: str) -> None:
    if device != "cpu":
        import torch  # only a worker has torch

        torch.cuda.reset_peak_memory_stats()


def peak_memory_gb(device: str) -> float:
    """The most that torch has allocated on the device since `reset_peak_memory`; on a CPU, the most
    host memory that this process has had.
    """
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    import torch  # only a worker has torch

    return float(torch.cuda.max_memory_allocated() / GB)


def environment(ctx: Context, predicted_gb: float | None) -> dict[str, object]:
    """Where an attempt ran, for its record. `peak_memory_gb` is the host memory of this process
    since it started.
    """
    environment: dict[str, object] = {
        "device": ctx.device,
        "host": platform.node(),
        "python": platform.python_version(),
        "peak_memory_gb": round(peak_memory_gb("cpu"), 3),
    }
    if predicted_gb is not None:
        environment["predicted_memory_gb"] = round(predicted_gb, 3)
    if ctx.device != "cpu":
        peak_gb = peak_memory_gb(ctx.device)
        environment["peak_gpu_memory_gb"] = round(peak_gb, 3)
        warn_of_a_wrong_prediction(predicted_gb, peak_gb)
    return environment


def warn_of_a_wrong_prediction(predicted_gb: float | None, peak_gb: float) -> None:
    if predicted_gb is not None and abs(predicted_gb - peak_gb) > 0.2 * peak_gb:
        _log.warning(
            "this training was predicted to allocate %.1f GB on each GPU and allocated %.1f GB",
            predicted_gb,
            peak_gb,
        )
