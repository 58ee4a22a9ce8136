"""Adapters as other tools leave them: folders with what PEFT reads, and all that lies beside it."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ebbline.tasks.headers.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS

LIKE_ORGANISM = {"q_proj": (64, 64), "v_proj": (64, 64)}  # (d_in, d_out) in the smallest organism


def adapter_folder(
    folder: Path,
    shapes: dict[str, tuple[int, int]] = LIKE_ORGANISM,
    layers: int = 2,
    rank: int = 4,
    seed: int = 0,
    prefix: str = "base_model.model.",
    **settings: object,
) -> Path:
    """A plain LoRA of random numbers, without a library that would load a model for it."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(layers):
        for name, (inputs, outputs) in shapes.items():
            stem = f"{prefix}model.layers.{layer}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = rng.normal(size=(rank, inputs)).astype(np.float32)
            tensors[f"{stem}.lora_B.weight"] = rng.normal(size=(outputs, rank)).astype(np.float32)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": list(shapes)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(json.dumps({**config, **settings}))
    return folder


# What the tools write beside the two files, by the tool: none of it is read.
BESIDE = {
    "axolotl": ("README.md", "config.json", "debug.log", "checkpoint-8/optimizer.pt"),
    "llama-factory": (
        "README.md",
        "all_results.json",
        "training_args.bin",
        "trainer_log.jsonl",
        "trainer_state.json",
        "training_loss.png",
        "checkpoint-4/rng_state.pth",
        "checkpoint-4/scheduler.pt",
    ),
    "trl": ("README.md", "training_args.bin", "checkpoint-2/optimizer.pt"),
    "unsloth": ("README.md",),
}


def with_layout(folder: Path, tool: str) -> Path:
    """The files of a tool beside an adapter, and its checkpoints, each with an adapter of its own.

    The pickles hold no pickle: reading one would fail.
    """
    for name in BESIDE[tool]:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("not to be read")
        if "/" in name:
            adapter_folder(path.parent, seed=99)
    if tool == "unsloth":
        config = json.loads((folder / ADAPTER_CONFIG).read_text())
        (folder / ADAPTER_CONFIG).write_text(json.dumps({**config, "unsloth_fixed": True}))
    return folder
