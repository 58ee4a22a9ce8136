"""A model folder is loaded whole, or it is an error.

Invariant: every weight of the model comes from the folder's safetensors, every tensor there has a
place in the model, and all are finite.

transformers itself fills missing weights with random numbers, leaves out tensors without a place,
and applies an adapter that lies in the folder.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils.logging import set_tqdm_hook

from ebbline.tasks.errors import ModelError
from ebbline.tasks.models.weights import Checkpoint, opened, require_model_folder

# What transformers raises for a config that is missing, foreign or contradicts itself
UNREADABLE = (OSError, KeyError, ValueError, StrictDataclassError)


def require_loadable(auto_class: Any, folder: Path) -> None:
    """Raises ModelError for a folder that `load_whole` would not load, but for weights that are not
    finite; reads no weight.
    """
    checkpoint = require_model_folder(folder)
    if "quantization_config" not in checkpoint.config:  # some quantisers need a GPU
        _require_all(checkpoint, *_loaded(auto_class, folder, device_map={"": "meta"}))


@contextmanager
def without_loading_bar() -> Iterator[None]:
    """Without the bar that transformers draws into a command's output for each model it loads."""

    def undrawn(make: Any, arguments: Any, named: Any) -> Any:
        return make(*arguments, **{**named, "disable": True})

    before = set_tqdm_hook(undrawn)
    try:
        yield
    finally:
        set_tqdm_hook(before)


def load_whole(auto_class: Any, folder: Path, **settings: Any) -> PreTrainedModel:
    """A model of a transformers Auto class. Raises ModelError, with the tensor, if it is not
    whole.
    """
    checkpoint = require_model_folder(folder)
    model, found = _loaded(auto_class, folder, **settings)
    _require_all(checkpoint, model, found)
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if tied and checkpoint.is_tied is None:
        checkpoint.require_one_head()
    if "quantization_config" not in checkpoint.config:
        _require_floats(checkpoint, model)
    _require_quantised_shapes(folder, model)
    _require_finite(checkpoint, model, bool(getattr(model, "is_quantized", False)))
    whole: PreTrainedModel = model
    return whole


def _loaded(auto_class: Any, folder: Path, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """The model, and what transformers reports of its loading."""
    try:
        with without_loading_bar():
            model, found = auto_class.from_pretrained(
                folder,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that the error below can name them
                **settings,
            )
    # ImportError: the weights need a quantiser that is not installed
    except (*UNREADABLE, SafetensorError, ImportError) as error:
        reason = " ".join(str(error).split())[:500]
        raise ModelError(f"{folder} cannot be loaded: {reason}") from error
    return model, found


def _require_all(checkpoint: Checkpoint, model: Any, found: dict[str, Any]) -> None:
    folder, kind = checkpoint.folder, type(model).__name__
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        raise ModelError(_misshapen(folder, name, stored, wanted))
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"{folder} lacks {missing[0]} ({len(missing)} weights of {kind} are missing), which "
            "would be random. Is the download complete, and config.json that of these weights?"
        )
    if unexpected := sorted(found["unexpected_keys"]):
        raise ModelError(
            f"{folder} holds {unexpected[0]} ({len(unexpected)} such tensors), which {kind} has no "
            "place for and would leave out. Is config.json that of these weights? Save the model "
            "again with transformers"
        )


def _require_floats(checkpoint: Checkpoint, model: Any) -> None:
    """Raises ModelError for integers where the model has floating point: transformers would take
    quantised values for the weights.
    """
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and name in checkpoint.names:
            stored = checkpoint.dtype_of(name)
            if not stored.startswith(("F", "BF")):
                raise ModelError(
                    f"{checkpoint.names[name]}: {name} is stored as {stored}, not as floating "
                    "point, and config.json names no quantisation for it. Give the unquantised "
                    "model"
                )


def _require_quantised_shapes(folder: Path, model: Any) -> None:
    """Raises ModelError if a quantised layer has not the shape that config.json asks for;
    transformers compares only unquantised ones.
    """
    for name, layer in model.named_modules():
        weight: Any = getattr(layer, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is not None or hasattr(weight, "SCB"):
            stored = tuple(weight.shape if state is None else state.shape)
            if stored != (wanted := (layer.out_features, layer.in_features)):
                raise ModelError(_misshapen(folder, f"{name}.weight", stored, wanted))


def _misshapen(folder: Path, name: str, stored: Sequence[int], wanted: Sequence[int]) -> str:
    return (
        f"{folder}: {name} has the shape {tuple(stored)}, and config.json asks for "
        f"{tuple(wanted)}. Is config.json that of these weights?"
    )


def _require_finite(checkpoint: Checkpoint, model: Any, quantised: bool) -> None:
    """Raises ModelError for a weight with NaN or infinity. Quantising hides them, and ZeRO-3 keeps
    only a part of each weight here; then the files are read.
    """
    tensors = list(model.named_parameters())
    seen_whole = not quantised and not any(hasattr(tensor, "ds_id") for _, tensor in tensors)
    if seen_whole and all(_is_finite(tensor) for _, tensor in tensors):
        return
    damaged = next(_damaged(checkpoint), None)
    if damaged is not None:
        raise ModelError(
            f"{checkpoint.names[damaged]}: {damaged} holds NaN or infinity; is the download "
            "complete? Download or save the model again"
        )
    if seen_whole:
        wide = next((name for name, tensor in tensors if not _is_finite(tensor)), None)
        if wide is not None:
            raise ModelError(
                f"{checkpoint.folder}: {wide} is beyond the range of {tensors[0][1].dtype}; "
                "load the model in float32"
            )


def _damaged(checkpoint: Checkpoint) -> Iterator[str]:
    for file in sorted(set(checkpoint.names.values())):
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a dict
                # bitsandbytes may store packed weights as floating point; their scales are checked
                is_packed = f"{name}.absmax" in checkpoint.names
                if not is_packed and not _is_finite(tensors.get_tensor(name)):
                    yield name


def _is_finite(tensor: torch.Tensor) -> bool:
    """Without a temporary of the tensor's size: the extremes are NaN or infinite if any is."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:  # float8 has no comparison
        tensor = tensor.to(torch.float16)
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))
