"""Loading models, and the model that this process keeps loaded between stages.

Only safetensors are read, and no code that comes with a model runs.
"""

import gc
import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from ebbline.tasks.chat.probes import check_chat
from ebbline.tasks.chat.template import bind
from ebbline.tasks.chat.tokenizers import read_tokenizer
from ebbline.tasks.errors import ModelError
from ebbline.tasks.models.model_folder import load_whole
from ebbline.tasks.models.weights import require_model_folder
from ebbline.tasks.paths import check_named_files
from ebbline.tasks.specs import DEFAULT_CHAT, Chat, Dtype, Quantisation

INT8_LOGGER = "bitsandbytes.autograd._functions"
T = TypeVar("T")


class Closing(Protocol):
    def close(self) -> None: ...


S = TypeVar("S", bound=Closing)
_SAMPLES = 16  # elements of each tensor in a fingerprint
DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_tokenizer(
    folder: Path,
    chat: Chat = DEFAULT_CHAT,
    checked: bool = True,
    adapter: Path | None = None,
) -> Any:
    """The tokenizer of a model folder, or the one beside `adapter`, with a pad token and left
    padding, as generation needs, and its chat template with the settings of `chat`.

    Raises ModelError if it has no chat template, and if `checked` for a template that does not do
    what measurements and trainings need (see ebbline.tasks.chat.probes).
    """
    check_named_files(folder)
    tokenizer, where = read_tokenizer(folder, adapter), adapter or folder
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"the tokenizer in {where} has neither a pad token nor an end token; name one in "
                "tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    bind(tokenizer, chat, where)
    if checked:
        check_chat(tokenizer, chat, where)
    return tokenizer


def load_model(
    folder: Path, quantisation: Quantisation, dtype: Dtype, device: str
) -> PreTrainedModel:
    """A causal language model from a Hugging Face folder of safetensors, quantised while it loads
    if `quantisation` says so. Raises ModelError unless every weight comes from the folder.
    """
    stored = require_model_folder(folder).config.get("quantization_config")
    if stored and quantisation != "none":
        raise ModelError(
            f"{folder} is already quantised ({stored.get('quant_method')}), so `quantisation: "
            f"{quantisation}` would not be what is measured. Use `quantisation: none`, or give the "
            "unquantised model"
        )
    quantised: dict[str, Any] = {}
    if quantisation == "nf4":
        quantised["quantization_config"] = nf4_config(dtype)
    elif quantisation == "int8":
        quantised["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        logging.getLogger(INT8_LOGGER).addFilter(_is_news)
    if (quantised or stored) and device != "cpu":
        quantised["device_map"] = {"": device}
    model = load_whole(AutoModelForCausalLM, folder, dtype=DTYPES[dtype], **quantised)
    if not quantised:
        model.to(device)
    return as_loaded(model, device)


def nf4_config(dtype: Dtype) -> BitsAndBytesConfig:
    """QLoRA's quantisation. Weights are stored in `dtype`, so that ZeRO-3 and FSDP can shard them
    together with the unquantised weights.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[dtype],
        bnb_4bit_quant_storage=DTYPES[dtype],
    )


def as_loaded(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """The model with the settings that every loaded model has."""
    if getattr(model, "is_quantized", False) and device == "cpu":
        _keep_unpacked(model)
    model.config.use_cache = False
    return model


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record is another one than the line that every int8 layer logs at each forward pass
    in bfloat16: the cast is the documented behaviour of LLM.int8().
    """
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast from")


def _keep_unpacked(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from packing NF4 weights in the first forward pass on processors with
    AVX512-BF16.

    Packed weights compute in bfloat16 whatever `dtype` says, and their scales change once an
    adapter was on the model. Then a stage's result would depend on the stages before it in the
    batch.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@dataclass
class _Loaded:
    identity: tuple[str, str, str, str]
    model: PreTrainedModel
    fingerprint: str


class Residents:
    """The base model that this process keeps loaded: one at a time, shared by all stages that need
    it. `load` reads it: a benchmark makes the model in memory instead. In its place there may be a
    server that has the model; the memory is not enough for both.
    """

    def __init__(self, load: Callable[..., PreTrainedModel] | None = None) -> None:
        self._load = load
        self._loaded: _Loaded | None = None
        self._server: Any = None
        self._remembered: dict[object, Any] = {}
        self.loads = 0

    def model(
        self,
        folder: Path,
        quantisation: Quantisation,
        dtype: Dtype,
        device: str,
        chat: Chat = DEFAULT_CHAT,
        checked: bool = True,
        adapter: Path | None = None,
    ) -> tuple[PreTrainedModel, Any]:
        """The model and its tokenizer, read from disk unless this model is already loaded and is as
        it was then. An adapter may have changed it.

        The tokenizer is read first, so that a chat template that cannot be used is an error before
        the weights are read. `checked` and `adapter` are for load_tokenizer.
        """
        identity = (str(folder), quantisation, dtype, device)
        loaded = self._loaded
        if (
            loaded is None
            or loaded.identity != identity
            or loaded.fingerprint != fingerprint(loaded.model)
        ):
            # Also if no model is loaded here: an earlier stage may have left a model in reference
            # cycles
            del loaded
            _freeze_imports()
            self.clear()
            self.tokenizer(folder, chat, checked, adapter)
            model = (self._load or load_model)(folder, quantisation, dtype, device)
            loaded = _Loaded(identity, model, fingerprint(model))
            self._loaded = loaded
            self.loads += 1
        tokenizer = self.tokenizer(folder, chat, checked, adapter)
        rows = loaded.model.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > rows:
            raise ModelError(
                f"the tokenizer in {adapter or folder} has {len(tokenizer)} tokens, and the model "
                f"has embeddings for {rows}; use the tokenizer that belongs to the model"
            )
        return loaded.model, tokenizer

    def tokenizer(
        self,
        folder: Path,
        chat: Chat = DEFAULT_CHAT,
        checked: bool = True,
        adapter: Path | None = None,
    ) -> Any:
        """What load_tokenizer returns, read once while the model stays loaded."""
        return self.remembered(
            ("tokenizer", folder, chat, checked, adapter),
            lambda: load_tokenizer(folder, chat, checked, adapter),
        )

    def server(self, serves: Callable[[S], bool], start: Callable[[], S]) -> S:
        """The server that this process keeps if it `serves`, else what `start` returns. A loaded
        model and another server end before.
        """
        if self._server is None or not serves(self._server):
            self.clear()
            self._server = start()
        found: S = self._server
        return found

    def remembered(self, key: object, make: Callable[[], T]) -> T:
        """The result of `make`, computed once for each key while the model stays loaded. Tokenised
        prompts, for example, are the same for all adapters of a model.
        """
        if key not in self._remembered:
            self._remembered[key] = make()
        found: T = self._remembered[key]
        return found

    @property
    def empty(self) -> bool:
        """Whether nothing has been loaded since the last `clear`."""
        return self._loaded is None and self._server is None and not self._remembered

    def clear(self) -> None:
        """Release the model, and what failed loads and steps left in reference cycles. End the
        server.
        """
        self._loaded, server, self._server = None, self._server, None
        if server is not None:
            server.close()
        self._remembered.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@cache
def _freeze_imports() -> None:
    """Before the first load of a process, take the imported libraries out of garbage collections: a
    collection then takes milliseconds, not 0.3 s.
    """
    gc.freeze()


def fingerprint(model: torch.nn.Module) -> str:
    """A digest of a model's structure and of a few elements of each of its tensors.

    It notices a replaced module, an untied weight, and a tensor that was changed as a whole. It
    costs milliseconds; tests compare all bits.
    """
    content = hashlib.sha256()
    samples: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    first_with: dict[int, int] = {}
    for place, module in model.named_modules():
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        content.update(f"{place} {type(module).__name__} {hooks}".encode())
        for name, tensor in _own_tensors(module):
            shared = first_with.setdefault(tensor.data_ptr(), len(first_with))
            content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {shared}".encode())
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES]
            samples.setdefault((tensor.device, tensor.dtype), []).append(sample)
    for (device, _), parts in samples.items():
        if device.type != "meta":
            sampled = torch.cat(parts).contiguous().view(torch.uint8)
            content.update(sampled.cpu().numpy().tobytes())
    return content.hexdigest()


def _own_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """A module's parameters with their quantisation scales, and its persistent buffers. Others,
    such as the frequencies of rotary embeddings, may change with the length of a text.
    """
    for name, parameter in module.named_parameters(recurse=False):
        yield name, parameter
        scales = getattr(getattr(parameter, "quant_state", None), "absmax", None)
        if isinstance(scales, torch.Tensor):
            yield f"{name}.absmax", scales
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer
