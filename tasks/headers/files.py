"""The files of model folders and of PEFT adapters: their names, and how JSON and the headers of
weights are read. No torch.
"""

import json
from pathlib import Path
from typing import Any

from ebbline.tasks.errors import ModelError

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
GENERATION_CONFIG = "generation_config.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError, which names the file, for anything else."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not JSON ({error}); is the download complete?") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no JSON object; is it the right file?")
    return found


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name -> its shape, from the header of a safetensors file. Raises ModelError for a
    damaged file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as tensors:
            # Not a dict
            names = tensors.keys()
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} cannot be read as safetensors ({error}); is the download complete?"
        ) from error


def adapters_in(folder: Path) -> list[str]:
    """The names of the folders in `folder` that hold adapters. PEFT saves every adapter there whose
    name is not `default`.
    """
    return sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
