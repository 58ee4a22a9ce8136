"""An adapter in the naming of a model folder, checked tensor by tensor.

The check asks which layers of the model the adapter's config names, and compares names and shapes.
For a plain LoRA on a common model the two config files and the headers of the weights answer that.
Everything else, and every error, is left to PEFT on the model of transformers, whose imports take
seconds.

Invariant: what `lands_by_headers` accepts, `fitted_by_peft` accepts too, with the same outcome.
"""

import math
from collections.abc import Mapping
from typing import Any

from ebbline.tasks.headers.files import tensor_shapes
from ebbline.tasks.models.adapter_file import ABOUT, Adapter, AdapterFile, plain_lora
from ebbline.tasks.models.adapter_names import PEFT_PREFIX
from ebbline.tasks.models.memory import Shape
from ebbline.tasks.models.weights import Checkpoint

# Models whose layers hold the linear modules of `Shape.linears` and no other, under the names of
# `_PARTS`, in memory as in the file. They differ in the width of a head where config.json gives
# none: here it is hidden_size / num_attention_heads, or not known.
SAME_NAMES: Mapping[str, bool] = {
    "llama": True,
    "mistral": True,
    "qwen2": True,
    "olmo2": True,
    "smollm3": True,
    "granite": True,
    "qwen3": False,
    "gemma": False,
    "gemma2": False,
    "gemma3_text": False,
}
_PARTS = {"q": "self_attn", "k": "self_attn", "v": "self_attn", "o": "self_attn"}
_LAYER = "model.layers."
_SIZES = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "vocab_size"),
)
# Settings of PEFT that do not change which layers are meant. `lora_dropout` acts in training only.
_NEUTRAL = ABOUT | {
    *("peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision"),
    *("auto_mapping", "inference_mode", "r", "lora_alpha", "lora_dropout", "target_modules"),
    *("use_rslora", "init_lora_weights", "megatron_core", "qalora_group_size"),
}


def fitted(file: AdapterFile, model: Checkpoint) -> Adapter:
    """A plain LoRA in the naming of a model folder. Raises ModelError unless every tensor lands as
    `adapters.with_adapter` would land it.

    Reads the model's config and headers, and the weights that the adapter holds copies of.
    """
    if lands_by_headers(file, model):
        return plain_lora(file)
    from ebbline.tasks.models.adapters import fitted_by_peft  # imports transformers and PEFT

    return fitted_by_peft(file, model)


def lands_by_headers(file: AdapterFile, model: Checkpoint) -> bool:
    """Whether headers and configs show that the adapter lands whole, under the names it has. False
    says only that they do not show it.
    """
    linears = _linears(model)
    rank, targets = file.config.get("r"), _targets(file.config)
    if not targets or type(rank) is not int or not _scale_is_finite(file.config):
        return False
    expected: dict[str, tuple[int, ...]] = {}
    for module, (inputs, outputs) in linears.items():
        if any(f".{module}".endswith(f".{target}") for target in targets):
            expected[f"{PEFT_PREFIX}{module}.lora_A.weight"] = (rank, inputs)
            expected[f"{PEFT_PREFIX}{module}.lora_B.weight"] = (outputs, rank)
    found = {name: tuple(tensor.shape) for name, tensor in file.tensors.items()}
    return bool(expected) and found == expected


def _linears(model: Checkpoint) -> dict[str, tuple[int, int]]:
    """Module -> (inputs, outputs) of every linear module in the layers; empty unless config.json
    and the headers of the weights agree on them.
    """
    shape = _shape(model.config)
    if shape is None:
        return {}
    linears = {
        f"{_LAYER}{layer}.{_PARTS.get(name[0], 'mlp')}.{name}": sizes
        for layer in range(shape.layers)
        for name, sizes in shape.linears.items()
    }
    shapes = {
        name: size for path in {*model.names.values()} for name, size in tensor_shapes(path).items()
    }
    stored = {
        name.removesuffix(".weight"): size
        for name, size in shapes.items()
        if name.startswith(_LAYER) and name.endswith(".weight") and len(size) > 1
    }
    wanted = {module: (outputs, inputs) for module, (inputs, outputs) in linears.items()}
    return linears if stored == wanted else {}


def _shape(config: Mapping[str, Any]) -> Shape | None:
    """The sizes that config.json states; None if one is missing or the model is another one."""
    kind = str(config.get("model_type"))
    sizes = [size for name in _SIZES if type(size := config.get(name)) is int and size > 0]
    if kind not in SAME_NAMES or len(sizes) < len(_SIZES) or "quantization_config" in config:
        return None
    if kind == "mistral" and "layer_types" in config:  # transformers makes a Ministral of it
        return None
    layers, hidden, heads, key_heads, intermediate, vocabulary = sizes
    width = config.get("head_dim", hidden // heads if SAME_NAMES[kind] else None)
    if type(width) is not int:
        return None
    return Shape(
        layers, hidden, heads * width, key_heads * width, heads, intermediate, vocabulary, False
    )


def _targets(config: Mapping[str, Any]) -> list[str]:
    """The names that `target_modules` lists; empty if any setting could change which layers these
    are, or names one that is not in a layer.
    """
    targets = config.get("target_modules")
    changed = [name for name, value in config.items() if value and name not in _NEUTRAL]
    if changed not in ([], ["bias"]) or config.get("bias", "none") != "none":
        return []
    if config.get("layers_to_transform") == 0:  # the first layer alone
        return []
    dropout = config.get("lora_dropout", 0.0)
    if not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
        return []
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        return []
    within = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    return targets if all(name.rpartition(".")[2] in within for name in targets) else []


def _scale_is_finite(config: Mapping[str, Any]) -> bool:
    rank, alpha = float(config["r"]), float(config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return math.isfinite(scale) and scale > 0
