"""Models of random weights, made on the device in NF4 layer by layer, for `make gpu-check`.

Nothing is downloaded, and neither the host nor the disk holds the weights: one matrix at a time is
drawn in bfloat16 and quantised by bitsandbytes. The result has the modules, dtypes and quantisation
of a model that ebbline's `load_model` reads (a test compares them).
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from ebbline.tasks.headers.files import ADAPTER_WEIGHTS, SINGLE
from ebbline.tasks.models.loading import DTYPES, Residents, as_loaded, nf4_config
from ebbline.tasks.models.memory import GB, Shape, shape_of
from ebbline.tasks.specs import Dtype, Quantisation
from ebbline.tasks.stage import Context

DTYPE: Dtype = "bfloat16"
# LlamaConfig's names. The Qwen shapes have Llama's layers: Qwen's own have a bias in q, k and v.
_COMMON = {"max_position_embeddings": 4096, "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    name: _COMMON
    | {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
    }
    for name, hidden, layers, heads, intermediate, vocabulary in (
        ("llama-2-7b", 4096, 32, 32, 11008, 32000),
        ("qwen-7b", 4096, 32, 32, 11008, 151936),
        ("qwen-14b", 5120, 40, 40, 13696, 152064),
        ("qwen-72b", 8192, 80, 64, 24576, 152064),
    )
}
MINIATURE = _COMMON | {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 320,
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SPREAD = 0.02  # standard deviation of a weight


def write_folder(folder: Path, shape: Mapping[str, Any]) -> Path:
    """A model folder without weights: what is read of a model before its weights are."""
    threads = torch.get_num_threads()
    from tests.tiny import word_tokenizer  # it sets one thread for the whole process

    torch.set_num_threads(threads)
    folder.mkdir(parents=True)
    LlamaConfig(**shape, pad_token_id=0, bos_token_id=1, eos_token_id=2).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def residents() -> Residents:
    """Residents that make the model of a folder on the device instead of reading it."""
    return Residents(load=random_nf4)


def random_nf4(
    folder: Path, quantisation: Quantisation, dtype: Dtype, device: str
) -> PreTrainedModel:
    """What `load_model` would return for the folder's config.json and random weights."""
    if quantisation != "nf4":
        raise ValueError(f"random models are made in nf4, not {quantisation!r}")
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(folder)
    config.dtype = DTYPES[dtype]
    with torch.device("meta"):  # no memory yet
        model = LlamaForCausalLM(config).to(DTYPES[dtype])
    quantiser = AutoHfQuantizer.from_config(nf4_config(dtype), pre_quantized=False)
    quantiser.preprocess_model(model=model, device_map={"": device})
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, dtype=DTYPES[dtype], device=device)
            if value.ndim == 1:
                value.fill_(1.0)  # a norm
            else:
                value.normal_(std=SPREAD)
            setattr(module, name, _stored(module, parameter, value))
    with torch.device(device):  # its frequencies are no weights, and were on no device
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.hf_quantizer = quantiser
    quantiser.postprocess_model(model)
    return as_loaded(model.eval(), device)


def _stored(
    module: torch.nn.Module, before: torch.nn.Parameter, value: torch.Tensor
) -> torch.nn.Parameter:
    from bitsandbytes.nn import Linear4bit, Params4bit  # parts without NF4 need no bitsandbytes

    if not isinstance(module, Linear4bit):
        return torch.nn.Parameter(value)
    # As transformers quantises a weight that it read; `to` quantises
    fresh: torch.nn.Parameter = Params4bit(value, requires_grad=False, **before.__dict__)
    quantised: torch.nn.Parameter = fresh.to(value.device)
    return quantised


def write_adapter(folder: Path, shape: Shape, rank: int, seed: int) -> Path:
    """A LoRA adapter on all linears, in PEFT's format, with random A and small random B."""
    folder.mkdir(parents=True)
    chance, tensors = torch.Generator().manual_seed(seed), {}
    for place, inputs, outputs in _linears(shape):
        name = f"base_model.model.{place}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=chance) * SPREAD
        tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=chance) * SPREAD
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(shape.linears),
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).save_pretrained(folder)
    return folder


def write_weights(folder: Path, shape: Mapping[str, Any], seed: int, device: str) -> Path:
    """A model folder with only the linears' weights, in bfloat16: what a projection reads."""
    folder.mkdir(parents=True)
    config = LlamaConfig(**shape)
    config.save_pretrained(folder)
    torch.manual_seed(seed)
    save_file(
        {
            f"{place}.weight": torch.randn(outputs, inputs, device=device)
            .mul_(SPREAD)
            .to(torch.bfloat16)
            .cpu()
            for place, inputs, outputs in _linears(shape_of(config.to_dict()))
        },
        folder / SINGLE,
        metadata={"format": "pt"},
    )
    return folder


def _linears(shape: Shape) -> Sequence[tuple[str, int, int]]:
    """(name, inputs, outputs) of every linear of the layers."""
    return [
        (
            f"model.layers.{layer}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}",
            inputs,
            outputs,
        )
        for layer in range(shape.layers)
        for name, (inputs, outputs) in shape.linears.items()
    ]


def context(folder: Path, device: str, kept: Residents, **changes: Any) -> Context:
    """The Context of a stage on a GPU. Activations are recomputed on a CPU too."""
    return Context(
        log=folder / "log",
        scratch=folder / "scratch",
        device=device,
        residents=kept,
        gradient_checkpointing=True,
        **changes,
    )


def now(device: str) -> float:
    """The time, once the device has done all that it was given."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


class Peak:
    """The most memory that torch's allocator held since this object was made; None on a CPU."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device != "cpu"
        if self._on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def gb(self) -> float | None:
        return torch.cuda.max_memory_allocated() / GB if self._on_gpu else None
