"""Adapters as files: what a PEFT folder holds, read strictly. Only safetensors are read.

`read_adapter_file` reads any LoRA adapter that ebbline can measure; `read_adapter` reads one that a
defence can work on, a plain LoRA whose update is B A. Neither needs the model. Whether the tensors
fit a model is checked by ebbline.tasks.models.adapters.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ebbline.tasks.errors import ModelError
from ebbline.tasks.headers.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapters_in, read_json
from ebbline.tasks.models.weights import is_embedding_or_head, opened

# Initialisations that move part of the base weight into A and B. The base that belongs to the
# adapter can be computed again from the base weight only for the first two.
REBUILDS_BASE = ("pissa", "olora")
_MOVES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
# Initialisations that set A and B only. What they set is overwritten by the adapter's file.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_DORA = {"use_dora": "DoRA (it also learns a magnitude for each row)"}
_PARAMETERS = {
    "target_parameters": "an adapter of parameters (as for fused experts), which are no single "
    "weight matrix"
}
# Settings under which a LoRA adapter's update is not B A, and which ebbline does not measure.
_OTHER_UPDATES = {
    "use_qalora": "QALoRA (its A acts on pooled inputs)",
    "use_bdlora": "BD-LoRA (its matrices are block-diagonal)",
    "kasa_config": "KaSA (it has singular values between B and A)",
    "monteclora_config": "MonteCLoRA (its update is a mixture of samples)",
    "velora_config": "VeLoRA (it has projections of its own)",
    "layer_replication": "an adapter for replicated layers, which no checkpoint holds",
    "alora_invocation_tokens": "an activated LoRA (it acts only after its invocation tokens)",
    "arrow_config": "an Arrow router over several adapters",
    "megatron_config": "an adapter of a Megatron model",
}
# Keys that other tools and PEFT add and that change no number.
ABOUT = frozenset(
    {
        "unsloth_version",
        "unsloth_fixed",
        "transformers_version",
        "lora_dtype",
        "lorap_lr_ratio",
    }
)
_SWITCHES = ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class AdapterFile:
    """A LoRA adapter that PEFT or another tool saved: its config and all its tensors."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]

    @property
    def weights(self) -> Path:
        return self.folder / ADAPTER_WEIGHTS

    @property
    def start(self) -> str:
        """The initialisation, in lower case; empty for PEFT's default ones."""
        start = self.config.get("init_lora_weights")
        return start.lower() if isinstance(start, str) else ""

    @property
    def changes_nothing(self) -> bool:
        """Whether every update B A is zero and nothing else was trained: it measures as the base
        does.
        """
        if self.start in REBUILDS_BASE or self.config.get("use_dora"):
            return False
        for name, tensor in self.tensors.items():
            first = name.replace("lora_B", "lora_A").replace("embedding_B", "embedding_A")
            if first == name:  # an A, or no LoRA
                if "lora_" not in name and not _is_copy(name, self.config):
                    return False
            elif tensor.any() and self.tensors.get(first, tensor).any():
                return False
        return True


@dataclass(frozen=True)
class LoraModule:
    """The names of one module's A and B in an adapter's file. An embedding's weight is stored as
    (d_in, d_out).
    """

    lora_A: str
    lora_B: str
    embedding: bool = False


@dataclass(frozen=True)
class Adapter:
    """A PEFT LoRA adapter, with its `modules` by their names in the base model. `carried` has the
    names of the other tensors: copies of the base's embedding, which PEFT saves beside a LoRA.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    modules: Mapping[str, LoraModule]
    carried: tuple[str, ...]


def read_adapter_file(folder: Path) -> AdapterFile:
    """Read a folder that holds one LoRA adapter. Raises ModelError, with the file and the tensor,
    for one that is damaged or that ebbline cannot measure.
    """
    if not (folder / ADAPTER_CONFIG).exists() or not (folder / ADAPTER_WEIGHTS).exists():
        raise ModelError(_no_adapter(folder))
    config = read_json(folder / ADAPTER_CONFIG)
    _require_measurable(folder, config)
    with opened(folder / ADAPTER_WEIGHTS) as file:
        # Not a dict
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        if problem := _problem(tensor):
            raise ModelError(
                f"{folder / ADAPTER_WEIGHTS}: {name} {problem}; the adapter is damaged. Save it "
                "again from its training"
            )
    if not any(".lora_" in name for name in tensors):
        raise ModelError(f"{folder} holds no LoRA matrices in {ADAPTER_WEIGHTS}")
    return AdapterFile(folder, config, tensors)


def _problem(tensor: torch.Tensor) -> str:
    if tensor.dtype not in _FLOATS:
        return f"is stored as {str(tensor.dtype).removeprefix('torch.')}, not as floating point"
    if tensor.numel() == 0:
        return f"is empty (its shape is {tuple(tensor.shape)})"
    return "" if bool(torch.isfinite(tensor).all()) else "holds NaN or infinity"


def _require_measurable(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises ModelError for a config under which the tensors mean something else than a LoRA."""
    where = f"`{{}}` in {folder / ADAPTER_CONFIG}"
    if config.get("peft_type") != "LORA":
        raise ModelError(
            f"{folder} is an adapter of type {config.get('peft_type')}; ebbline measures and "
            "projects LoRA adapters only. Merge it into its base and give the merged model"
        )
    for setting, what in _OTHER_UPDATES.items():
        if config.get(setting):
            raise ModelError(
                f"{folder} is {what}; ebbline measures plain LoRA and DoRA only "
                f"({where.format(setting)})"
            )
    for setting in _SWITCHES:
        if config.get(setting) not in (None, True, False):
            raise ModelError(
                f"{where.format(setting)} is {config[setting]!r}, which is neither true nor false; "
                "the adapter is damaged. Save it again from its training"
            )
    for setting in ("r", "lora_alpha"):
        _require_numbers(config.get(setting), where.format(setting), whole=setting == "r")
    for setting in ("rank_pattern", "alpha_pattern"):
        for value in (config.get(setting) or {}).values():
            _require_numbers(value, where.format(setting), whole=setting == "rank_pattern")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in (*REBUILDS_BASE, *_PLAIN_STARTS):
        raise ModelError(_moved_base(folder, start))


def _require_numbers(value: Any, where: str, whole: bool) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0 or (whole and value != int(value)):
        raise ModelError(
            f"{where} is {value!r}, not a {'whole ' if whole else ''}number above 0; the adapter "
            "is damaged. Save it again from its training"
        )


def _moved_base(folder: Path, start: str) -> str:
    if not start.lower().startswith(_MOVES_BASE):
        return (
            f"{folder} has init_lora_weights={start!r}, which ebbline does not know. Set it to "
            f"true in {ADAPTER_CONFIG} if the adapter belongs to the unchanged base"
        )
    return (
        f"{folder} was started with init_lora_weights={start!r}, which moves part of the base "
        "weights into A and B, so its update is not B A. "
        + (
            "Retrain it from a plain LoRA start"
            if start.lower().startswith("loftq")
            else "Save it with PEFT's `path_initial_model_for_weight_conversion`, which makes it "
            "a plain LoRA"
        )
    )


def read_adapter(folder: Path) -> Adapter:
    """Read a folder that holds one plain LoRA adapter, whose update is B A and nothing else.

    Raises ModelError for anything else, and says what it is and what to do.
    """
    return plain_lora(read_adapter_file(folder))


def plain_lora(file: AdapterFile) -> Adapter:
    """The adapter in a file, as matrices A and B. Raises ModelError if it changes more than B A."""
    folder, config, tensors = file.folder, file.config, file.tensors
    for setting, what in {**_DORA, **_PARAMETERS}.items():
        if config.get(setting):
            raise ModelError(
                f"{folder} is {what}; a defence is defined for LoRA's update B A only "
                f"(`{setting}` in {ADAPTER_CONFIG})"
            )
    if file.start.startswith(_MOVES_BASE):
        raise ModelError(_moved_base(folder, str(config["init_lora_weights"])))
    modules: dict[str, LoraModule] = {}
    for name in sorted(tensors):
        for first, second in (
            (".lora_A.weight", ".lora_B.weight"),
            (".lora_embedding_A", ".lora_embedding_B"),
        ):
            if name.endswith(second) and name.removesuffix(second) + first not in tensors:
                raise ModelError(
                    f"{folder}: {name} has no {name.removesuffix(second)}{first}; the "
                    "adapter is damaged"
                )
            if not name.endswith(first):
                continue
            stem = name.removesuffix(first)
            if stem + second not in tensors:
                raise ModelError(f"{folder}: {name} has no {stem}{second}; the adapter is damaged")
            if tensors[name].ndim != 2 or tensors[stem + second].ndim != 2:
                raise ModelError(
                    f"{folder}: {stem} is a convolution's LoRA; a defence is defined for "
                    "weight matrices"
                )
            modules[stem.removeprefix("base_model.model.")] = LoraModule(
                name, stem + second, "embedding" in first
            )
    used = {name for module in modules.values() for name in (module.lora_A, module.lora_B)}
    carried = tuple(name for name in sorted(tensors) if name not in used)
    _require_only_lora(file, carried)
    if not modules:
        raise ModelError(f"{folder} holds no LoRA matrices")
    return Adapter(folder, config, tensors, modules, carried)


def _require_only_lora(file: AdapterFile, carried: tuple[str, ...]) -> None:
    """Raises ModelError for trained tensors beside A and B: heads, biases, tokens, magnitudes."""
    for name in carried:
        if ".lora_A." in name or (".lora_B." in name and not name.endswith(".bias")):
            raise ModelError(
                f"{file.folder}: {name!r} is not a name that PEFT saves; write the adapter with "
                "`save_pretrained`"
            )
        if not _is_copy(name, file.config):
            raise ModelError(
                f"{file.weights}: {name} was trained beside the LoRA matrices, and a defence is "
                "defined for their update B A only. Train without `modules_to_save`, `bias` and "
                "`trainable_token_indices`"
            )


def _is_copy(name: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT saves this tensor as a copy of the base's. The model's check compares them."""
    if name.endswith(".base_layer.weight"):
        return True
    module, _, kind = name.rpartition(".")
    return kind == "weight" and is_embedding_or_head(module) and not config.get("modules_to_save")


def _no_adapter(folder: Path) -> str:
    if not folder.is_dir():
        return (
            f"{folder} is a file; give the folder that holds it"
            if folder.exists()
            else f"there is no folder {folder}"
        )
    if names := adapters_in(folder):
        return (
            f"{folder} holds no adapter itself, but its folders do: "
            f"{', '.join(names)}. Name one, as {folder / names[0]}"
        )
    if (folder / "adapter_model.bin").exists():
        return (
            f"{folder} holds a pickled adapter_model.bin; ebbline reads safetensors only. Load "
            "it with PEFT and save it again"
        )
    return (
        f"{folder} lacks {ADAPTER_CONFIG} or {ADAPTER_WEIGHTS}; it is not a PEFT adapter in "
        "safetensors"
    )
