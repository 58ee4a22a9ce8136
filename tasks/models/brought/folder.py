"""The files of an adapter's folder that ebbline reads, and what they tell without a model. No
torch.

Training tools leave other files beside an adapter: checkpoints, optimizer states, logs, a model
card. They are no part of its identity: a training may go on writing them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebbline.tasks.errors import DataError
from ebbline.tasks.headers.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    adapters_in,
    read_json,
    tensor_shapes,
)
from ebbline.tasks.identity import content_digest, digest_files
from ebbline.tasks.models.memory import Shape

# ebbline.tasks.chat.tokenizers reads them and imports torch
TOKENIZER_FILES = (
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
_A, _B = ".lora_A.weight", ".lora_B.weight"


def adapter_files(folder: Path) -> dict[str, Path]:
    """Name -> path of the files that belong to an adapter. Raises DataError if it lacks one."""
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise DataError(f"{folder} is no adapter: it has no {name}.{_elsewhere(folder)}")
    names = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, *TOKENIZER_FILES)
    return {name: folder / name for name in sorted(names) if (folder / name).is_file()}


def _elsewhere(folder: Path) -> str:
    if (folder / "adapter_model.bin").exists():
        return " ebbline reads safetensors only: load the adapter with PEFT and save it again"
    below = adapters_in(folder)
    return f" Its folders hold adapters: {', '.join(below)}. Name one of them" if below else ""


def adapter_digest(folder: Path, cache: Path | None = None) -> str:
    """The content digest of an adapter: of the files that belong to it. Raises DataError."""
    files = adapter_files(folder)
    return digest_files({name: content_digest(path, cache) for name, path in files.items()})


def other_base(adapter: Path, model: str, folder: Path | None) -> str:
    """The base that an adapter's config names, if it is another model by its name; else empty.

    `model` is the name that the user gave, `folder` where the model is on this machine. A copy
    under another name is not the same by its name, so this is no error.
    """
    named = read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(named, str) or not named.strip():
        return ""
    names = {model}
    if folder is not None:
        saved = read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
        repository = folder.resolve().parent.parent.name.rpartition("--")[2]  # of a hub snapshot
        names |= {str(folder.resolve()), repository, str(saved.get("_name_or_path") or "")}
    return "" if _last(named) in map(_last, names) else named


def _last(name: str) -> str:
    return name.partition("@")[0].rstrip("/\\").replace("\\", "/").rpartition("/")[2].lower()


@dataclass(frozen=True)
class LoraShape:
    """The shapes of an adapter's matrices by layer: (d_in, d_out) of the weight that each changes.

    `rank` is the largest one. A file with other names of matrices gives no layer.
    """

    rank: int
    layers: Mapping[str, tuple[int, int]]

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The last parts of the layers' names, as `q_proj`."""
        return tuple(sorted({name.rpartition(".")[2] for name in self.layers}))


def lora_shape(folder: Path) -> LoraShape:
    """The shapes in an adapter's file; reads no tensor. Raises ModelError for a file that is not
    safetensors.
    """
    shapes = tensor_shapes(folder / ADAPTER_WEIGHTS)
    rank, layers = 0, {}
    for name, first in shapes.items():
        second = shapes.get(name.removesuffix(_A) + _B)
        if name.endswith(_A) and second is not None and len(first) == len(second) == 2:
            rank = max(rank, int(first[0]))
            layers[name.removesuffix(_A)] = (int(first[1]), int(second[0]))
    return LoraShape(rank, layers)


def misfit(lora: LoraShape, model: Shape, what: str) -> str:
    """The first layer of an adapter that does not fit a Llama-shaped model; empty if all fit."""
    linears: Mapping[str, Any] = model.linears
    for name, (inputs, outputs) in sorted(lora.layers.items()):
        wanted = linears.get(name.rpartition(".")[2])
        if wanted is not None and (inputs, outputs) != wanted:
            return (
                f"{name} changes a weight of shape {(outputs, inputs)}, and {what} has "
                f"{(wanted[1], wanted[0])} there. Was the adapter trained on another model?"
            )
        number = next((int(part) for part in name.split(".") if part.isdecimal()), 0)
        if wanted is not None and number >= model.layers:
            return (
                f"{name} is a layer that {what} does not have: it has {model.layers} layers. Was "
                "the adapter trained on another model?"
            )
    return ""
