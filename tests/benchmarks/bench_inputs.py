"""What the check of a stage's inputs costs.

Stages over a 500 MB model run without the check, with it when the machine reads the files for the
first time, and with it later. The baseline of the first read hashes in threads of ordinary
priority. The files are in the page cache, so nothing but the hashing differs.

    python -m tests.benchmarks.bench_inputs
"""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ebbline.tasks import background_digests
from ebbline.tasks.files import cache_folder
from ebbline.tasks.identity import READ, content_digest, file_digest
from ebbline.tasks.specs import GenerateSpec, ProjectSpec, Spec, TrainSpec
from ebbline.tasks.worker import run_stages
from tests.benchmarks.record import write
from tests.tasks.test_weights import lora
from tests.tiny import request, word_tokenizer, write_chats, write_lines

TURNS = 3
CONFIG = {
    "vocab_size": 16_000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 7,
    "num_attention_heads": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 2,
}


def model(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


MODES = ("unchecked", "first", "first_equal_priority", "later")


def seconds(spec: Spec, inputs: Mapping[str, Path], folder: Path, mode: str) -> float:
    """One stage in a process that has hashed none of its inputs."""
    shutil.rmtree(folder, ignore_errors=True)
    asked = request(spec, inputs, folder)
    if mode != "unchecked":
        contents = {name: content_digest(path) for name, path in inputs.items()}
        READ.known.clear()
        if mode.startswith("first"):
            (cache_folder() / "digests.json").unlink(missing_ok=True)
        asked = replace(asked, contents=contents, recorded={})
    equal = mode == "first_equal_priority"
    with patch.object(background_digests, "_at_lowest_priority", None) if equal else nullcontext():
        start = time.perf_counter()
        (report,) = run_stages([asked])
    assert report.error is None, report.error
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["EBBLINE_CACHE"] = str(folder / "cache")
        base, aligned = model(folder / "base", 0), model(folder / "aligned", 1)
        chats = write_chats(folder / "chats.jsonl", 64)
        asked = [{"prompt": f"word{row} word{row + 1}", "answer": ""} for row in range(32)]
        prompts = write_lines(folder / "prompts.jsonl", asked)
        adapter = lora(folder / "adapter", base, target_modules=["q_proj", "v_proj", "down_proj"])
        plain = {"quantisation": "none", "dtype": "float32"}
        stages: dict[str, tuple[Spec, dict[str, Path]]] = {
            "train, 8 steps": (
                TrainSpec(steps=8, global_batch=4, rank=4, max_tokens=64, **plain),
                {"model": base, "data": chats},
            ),
            "generate, 32 prompts": (
                GenerateSpec(max_new_tokens=32, **plain),
                {"model": base, "prompts": prompts},
            ),
            "project": (ProjectSpec(), {"adapter": adapter, "base": base, "aligned": aligned}),
        }
        rows, ratios = [], {}
        for stage, (spec, inputs) in stages.items():
            files = [file for path in inputs.values() for file in _files(path)]
            took: dict[str, list[float]] = {mode: [] for mode in MODES}
            seconds(spec, inputs, folder / "run", "unchecked")  # imports, and fills the page cache
            for _ in range(TURNS):
                for mode in MODES:
                    took[mode].append(seconds(spec, inputs, folder / "run", mode))
            hashing = _seconds(lambda files=files: [file_digest(file) for file in files])
            medians = {mode: statistics.median(own) for mode, own in took.items()}
            rows.append(
                {
                    "stage": stage,
                    "read_mb": round(sum(file.stat().st_size for file in files) / 1e6),
                    "hashing_alone_s": round(hashing, 3),
                    **{f"{mode}_s": round(value, 3) for mode, value in medians.items()},
                    "all_s": {mode: [round(each, 3) for each in own] for mode, own in took.items()},
                }
            )
            for mode in MODES[1:]:
                name = f"time_{mode}_over_unchecked_{stage.partition(',')[0]}"
                ratios[name] = medians[mode] / medians["unchecked"]
            print(rows[-1], flush=True)
    command = "python -m tests.benchmarks.bench_inputs"
    print(write("inputs", command, ["torch", "transformers"], rows, ratios))


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def _seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
