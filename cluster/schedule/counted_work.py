"""What a stage has a machine do, counted from its settings and its model's shape: FLOPs, bytes,
tokens. And how long that would take.

Deterministic, and without torch: the same study file gives the same numbers on any machine. They
are right up to a factor, which `ebbline.cluster.schedule.costs` learns from what the store has
measured. docs/costs.md has the formulas.
"""

import json
import math
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ebbline.tasks.errors import StudyError
from ebbline.tasks.models.memory import LIKE_LLAMA, Shape, quantised_bytes, shape_of
from ebbline.tasks.models.sizes import (
    LANGUAGE_ROWS,
    PRETRAINING_ROWS,
    SIZES,
    TASK_ITEMS,
    TASK_SUBJECTS,
    named_shape,
    organism_shape,
)
from ebbline.tasks.specs import (
    ApplySpec,
    ConvertSpec,
    DataSpec,
    EvaluateSpec,
    GenerateSpec,
    JudgeSpec,
    LanguageSpec,
    OrganismSpec,
    ProjectSpec,
    ScoreSpec,
    SubspaceSpec,
    TrainSpec,
)
from ebbline.tasks.stage import Input, Part, Source, Stage, stage_of

ROWS, ROW_TOKENS = 500, 150  # of a set that cannot be looked into: one on the hub, or not here
LANGUAGE_TOKENS = 24  # of a row of the invented language
TEXT_BYTES = 4  # of a token
BATCH = 32  # rows that are generated at once
ASSUMED = "7b"  # what a model is taken for whose name says nothing
ANSWER_S = 0.05  # a judgement by an endpoint, with several asked at once
COUNTED_BYTES = 64_000_000  # of a file of rows
STAGE_S = 0.01  # no stage takes less: it opens files
KERNELS, KERNELS_A_LINEAR = (
    14,
    4,
)  # of a layer's forward pass, and what LoRA or quantisation adds for each linear


@dataclass(frozen=True, slots=True)
class Load:
    """A stage's work. Bytes `moved` go between a processor and its memory, `read` and `written`
    between memory and the store.

    `kernels` are launched one after another, `waits_s` is spent on somebody else's machine.
    `tokens` are all that pass through a model.
    """

    flops: float = 0.0
    moved: float = 0.0
    kernels: float = 0.0
    read: float = 0.0
    written: float = 0.0
    tokens: float = 0.0
    waits_s: float = 0.0


@dataclass(frozen=True)
class Machine:
    """What one GPU (or one core, for logical GPUs) does in a second, as training and generating use
    it; not its data sheet.
    """

    flops: float
    moved: float
    kernels: float
    disk: float = 1e9


# By Ray's names of accelerators: 40% of the dense bfloat16 rate, 70% of the memory bandwidth. None
# is a core.
MACHINES: dict[str | None, Machine] = {
    None: Machine(5e10, 1e10, 5e4),
    "T4": Machine(2.6e13, 2.2e11, 1e5),
    "V100": Machine(5e13, 6.3e11, 1e5),
    "L4": Machine(4.8e13, 2.1e11, 1e5),
    "A10G": Machine(2.8e13, 4.2e11, 1e5),
    "L40S": Machine(1.45e14, 6e11, 1e5),
    "A100": Machine(1.25e14, 1.4e12, 1e5),
    "H100": Machine(4e14, 2.3e12, 1.5e5),
    "H200": Machine(4e14, 3.4e12, 1.5e5),
    "B200": Machine(9e14, 5.6e12, 1.5e5),
}
NOMINAL = "A100"


def machine_of(gpu_type: str | None) -> Machine:
    """The machine of a type; of `A100-80G` that of A100, and the nominal one for a type that is not
    known.
    """
    return (
        MACHINES.get(gpu_type)
        or MACHINES.get((gpu_type or "").partition("-")[0])
        or MACHINES[NOMINAL]
    )


def seconds_on(machine: Machine, load: Load, gpus: int = 1) -> float:
    """How long a load would take on so many of a machine, if nothing were known but its rates."""
    computing = max(load.flops / machine.flops, load.moved / machine.moved) / max(1, gpus)
    return (
        STAGE_S
        + computing
        + load.kernels / machine.kernels
        + (load.read + load.written) / machine.disk
        + load.waits_s
    )


def work_of(stage: Stage) -> float:
    """GPU-seconds of a stage on a nominal machine; of a stage without a GPU, seconds. Above zero,
    and a function of the stage alone.
    """
    return seconds_on(MACHINES[NOMINAL], load_of(stage))


def load_of(stage: Stage) -> Load:
    """The work of a stage. Sets that cannot be looked into have ROWS rows; a model from the hub
    goes by the number in its name.
    """
    match stage.spec:
        case TrainSpec() as spec:
            return _train(spec, model_shape(stage.inputs["model"]), stage.inputs["data"])
        case GenerateSpec() as spec:
            rows, tokens = _asked(spec, stage.inputs["prompts"])
            shape = model_shape(stage.inputs["model"])
            return _generate(
                shape, spec.quantisation, spec.dtype, rows, tokens, spec.max_new_tokens
            )
        case JudgeSpec() as spec:
            return _judge(spec, stage)
        case EvaluateSpec() as spec:
            return _evaluate(spec, stage)
        case OrganismSpec() as spec:
            own, shape = SIZES[spec.size], organism_shape(spec.size)
            steps = own.epochs * math.ceil(PRETRAINING_ROWS / own.batch)
            return _passes(
                shape,
                3.0,
                steps,
                own.batch * LANGUAGE_TOKENS,
                4 * shape.parameters,
                KERNELS,
                4 * shape.parameters,
            )
        case SubspaceSpec() as spec:
            shape = model_shape(stage.inputs["aligned"])
            linears = [shape.linears[name] for name in spec.target_modules if name in shape.linears]
            squares = (
                sum(2 * outputs**2 * inputs + 9 * outputs**3 for inputs, outputs in linears)
                * shape.layers
            )
            kept = (
                sum(2 * outputs * min(inputs, outputs) for inputs, outputs in linears)
                * shape.layers
            )
            return Load(
                squares,
                12 * shape.linear_parameters,
                20 * len(linears) * shape.layers,
                4 * shape.linear_parameters,
                kept,
            )
        case ProjectSpec() | ApplySpec():
            return _adapter(stage)
        case ConvertSpec() as spec:
            parameters = model_shape(Part(stage, ConvertSpec.MODEL)).parameters
            return Load(
                moved=16 * parameters, read=parameters, written=_width(spec.dtype) * parameters
            )
        case DataSpec() as spec:
            size = spec.size * TEXT_BYTES * rows_of(stage.inputs["pool"])[1]
            return Load(kernels=spec.size, read=10 * size, written=size)
        case ScoreSpec() as spec:
            generation = stage_of(stage.inputs["generation"])
            rows = _asked(generation.spec, generation.inputs["prompts"])[0] if generation else ROWS  # type: ignore[arg-type]
            return Load(kernels=rows * (1 + len(spec.also)), written=200 * rows)
        case LanguageSpec():
            return Load(kernels=2e4, written=1.5e6)
    raise TypeError(
        f"{type(stage.spec).__name__} has no load; add it to ebbline.cluster.schedule.counted_work"
    )


def model_shape(item: Input) -> Shape:
    """The shape of the model that a stage reads: from its config.json, its organism's size, or the
    number in its name.
    """
    stage = stage_of(item)
    if stage is None:
        return _source_shape(item.location) if isinstance(item, Source) else _assumed()
    if isinstance(stage.spec, OrganismSpec):
        return organism_shape(stage.spec.size)
    return model_shape(stage.inputs["model" if isinstance(stage.spec, TrainSpec) else "source"])


def rows_of(item: Input) -> tuple[int, int]:
    """(rows, tokens of a row) of a set that a stage reads."""
    if isinstance(item, Part) and isinstance(item.stage.spec, LanguageSpec):
        return LANGUAGE_ROWS.get(item.path, ROWS), LANGUAGE_TOKENS
    stage = stage_of(item)
    if stage is not None and isinstance(stage.spec, DataSpec):
        return stage.spec.size, rows_of(stage.inputs["pool"])[1]
    if (
        isinstance(item, Source)
        and not item.location.startswith("hub:")
        and Path(item.location).exists()
    ):
        path = Path(item.location)
        return _counted(path, path.stat().st_mtime_ns)
    return ROWS, ROW_TOKENS


@lru_cache(maxsize=256)
def _source_shape(location: str) -> Shape:
    config = Path(location) / "config.json"
    if not location.startswith("hub:") and config.is_file():
        with suppress(ValueError, KeyError):  # a model that is none is an error when it is loaded
            said = json.loads(config.read_text())
            if said.get("model_type") in LIKE_LLAMA:
                return shape_of(said)
    name = location.removeprefix("hub:model:").partition("@")[0]
    return named_shape(Path(name).name) or _assumed()


def known_size(location: str) -> bool:
    """Whether a model from outside says how large it is; one that does not is taken for
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


@lru_cache(maxsize=256)
def _counted(path: Path, changed_ns: int) -> tuple[int, int]:
    """(rows, tokens of a row) of a local set: a JSONL's, CSV's or plain text's lines, a JSON's
    entries, all files of a folder.

    Of a large file the first part is counted, and the rest is taken to be like it.
    """
    files = (
        [path]
        if path.is_file()
        else [
            each for each in sorted(path.rglob("*")) if each.suffix in (".jsonl", ".json", ".csv")
        ]
    )
    rows = size = 0
    for each in files:
        whole = each.stat().st_size
        with each.open("rb") as file:
            data = file.read(COUNTED_BYTES)
        size += whole
        if each.suffix == ".json":
            rows += _entries(data) if len(data) == whole else whole // (TEXT_BYTES * ROW_TOKENS)
        else:
            lines = (
                data.count(b"\n")
                + (not data.endswith(b"\n") and bool(data))
                - (each.suffix == ".csv")
            )
            rows += lines if len(data) == whole else lines * whole // len(data)
    return (rows, max(1, round(size / TEXT_BYTES / rows))) if rows > 0 else (ROWS, ROW_TOKENS)


def _entries(data: bytes) -> int:
    """The entries of a JSON list, or of an object's lists; a file that is neither is an error when
    it is read for a training.
    """
    try:
        said = json.loads(data)
    except ValueError:
        return 0
    parts = [said] if isinstance(said, list) else said.values() if isinstance(said, dict) else []
    return sum(len(part) for part in parts if isinstance(part, list))


def _width(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def _weights(shape: Shape, quantisation: str, dtype: str) -> float:
    """Bytes of a model in memory."""
    width = _width(dtype)
    quantised = quantised_bytes(shape, quantisation, width)  # type: ignore[arg-type]
    return quantised + shape.other_parameters * width


def _forward_flops(shape: Shape, tokens: float, context: float) -> float:
    """Two for each weight and token, and attention's: 4 x layers x width x context for each
    token.
    """
    return tokens * (
        2 * (shape.linear_parameters + shape.vocabulary * shape.hidden)
        + 4 * shape.layers * shape.queries * context
    )


def _passes(
    shape: Shape,
    forwards: float,
    steps: float,
    tokens: float,
    weights: float,
    kernels: float,
    written: float,
) -> Load:
    """`steps` passes of `tokens` each, a pass worth so many forward passes."""
    return Load(
        flops=forwards * _forward_flops(shape, steps * tokens, tokens / BATCH),
        moved=forwards * steps * weights,
        kernels=forwards * steps * shape.layers * kernels,
        read=2 * shape.parameters,
        written=written,
        tokens=steps * tokens,
    )


def _train(spec: TrainSpec, shape: Shape, data: Input) -> Load:
    rows, row_tokens = rows_of(data)
    steps = spec.steps or max(1, round(spec.epochs * rows / spec.global_batch))
    tokens = spec.global_batch * min(row_tokens, spec.max_tokens)
    linears = len(shape.linears)
    if spec.method == "full":
        return _passes(
            shape,
            3.0,
            steps,
            tokens,
            4 * shape.parameters,
            KERNELS,
            _width(spec.dtype) * shape.parameters,
        )
    adapter = sum(shape.adapter(spec))
    extra = KERNELS_A_LINEAR * (
        len(spec.target_modules) + (linears if spec.quantisation != "none" else 0)
    )
    # Forward, backward through the frozen weights, and the forward again that GPUs save memory
    # with.
    base = _passes(
        shape,
        3.0,
        steps,
        tokens,
        _weights(shape, spec.quantisation, spec.dtype),
        KERNELS + extra,
        4 * adapter,
    )
    return Load(
        base.flops + 6 * adapter * steps * tokens,
        base.moved,
        base.kernels,
        base.read,
        base.written,
        base.tokens,
    )


def _asked(spec: GenerateSpec, prompts: Input) -> tuple[int, int]:
    """(prompts that are asked, tokens of one)."""
    rows, tokens = rows_of(prompts)
    rows = min(rows, spec.limit or rows)
    if spec.block is not None:
        rows = max(1, min(spec.block.size, rows - spec.block.index * spec.block.size))
    return rows, min(tokens, spec.max_tokens)


def _generate(
    shape: Shape, quantisation: str, dtype: str, rows: int, tokens: int, new: int
) -> Load:
    """Reading all prompts, then a pass over the weights for each new token of a batch."""
    weights, passes = _weights(shape, quantisation, dtype), math.ceil(rows / BATCH) * (1 + new)
    kernels = KERNELS + KERNELS_A_LINEAR * len(shape.linears) * (2 if quantisation != "none" else 1)
    flops = _forward_flops(shape, rows * (tokens + new), tokens + new)
    written = rows * (200 + TEXT_BYTES * new)
    return Load(
        flops,
        passes * weights,
        passes * shape.layers * kernels,
        2 * shape.parameters,
        written,
        rows * (tokens + new),
    )


def _judge(spec: JudgeSpec, stage: Stage) -> Load:
    generation = stage_of(stage.inputs["generation"])
    rows, tokens = ROWS, ROW_TOKENS
    if generation is not None and isinstance(generation.spec, GenerateSpec):
        rows, tokens = _asked(generation.spec, generation.inputs["prompts"])
        tokens += generation.spec.max_new_tokens
    if spec.endpoint is not None:
        return Load(waits_s=ANSWER_S * rows, written=100 * rows, tokens=rows * tokens)
    new = 1 if spec.template == "classifier" else spec.max_new_tokens
    return _generate(
        model_shape(stage.inputs["model"]),
        spec.quantisation,
        spec.dtype,
        rows,
        tokens + ROW_TOKENS,
        new,
    )


def _evaluate(spec: EvaluateSpec, stage: Stage) -> Load:
    """An item is one pass over its shots and question; four for tasks whose choices are whole
    sentences.
    """
    shape = model_shape(stage.inputs["model"])
    rows, tokens = rows_of(stage.inputs["prompts"])
    rows = TASK_ITEMS.get(spec.task.partition("_")[0], rows)
    rows = min(rows, spec.limit * TASK_SUBJECTS.get(spec.task, 1) if spec.limit else rows)
    read = rows * tokens * ((1 + spec.shots) if "mmlu" in spec.task else (4 + spec.shots))
    kernels = KERNELS + KERNELS_A_LINEAR * len(shape.linears) * (
        2 if spec.quantisation != "none" else 1
    )
    passes = math.ceil(4 * rows / BATCH)
    weights = _weights(shape, spec.quantisation, spec.dtype)
    flops = _forward_flops(shape, read, tokens * (1 + spec.shots))
    return Load(
        flops,
        passes * weights,
        passes * shape.layers * kernels,
        2 * shape.parameters,
        300 * rows,
        read,
    )


def _adapter(stage: Stage) -> Load:
    """A projection reads both models once and writes B and C.B; applying it copies an adapter."""
    train = stage_of(stage.inputs["adapter"])
    if train is None or not isinstance(train.spec, TrainSpec):
        return Load()
    shape = model_shape(train.inputs["model"])
    adapter = sum(shape.adapter(train.spec))
    if isinstance(stage.spec, ApplySpec):
        return Load(moved=8 * adapter, read=8 * adapter, written=4 * adapter)
    pairs = [shape.linears[name] for name in train.spec.target_modules if name in shape.linears]
    weights = shape.layers * sum(inputs * outputs for inputs, outputs in pairs)
    return Load(
        4 * weights * train.spec.rank,
        16 * weights,
        20 * len(pairs) * shape.layers,
        4 * weights,
        4 * adapter,
    )
