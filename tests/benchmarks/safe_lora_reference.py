"""Safe LoRA as its authors' repository applies it (github.com/IBM/SafeLoRA, commit d81fda1, of
arXiv 2405.16833), written anew: the other side of bench_project_whole.

It copies the model with the adapter, loads both models with transformers, and forms V V^T /
||V||_F of every target module. Then it multiplies each B by it, compares the flattened d_out x d_in
products, and rounds the cosine to five digits. The repository has no command: a script loads the
model and saves the outcome, as this one does.

    python -m tests.benchmarks.safe_lora_reference BASE ALIGNED ADAPTER THRESHOLD OUT
"""

import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def alignment(base: Path, aligned: Path, targets: set[str]) -> list[torch.Tensor]:
    """C of every target module, in the order of the models' parameters."""
    models = [
        AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", low_cpu_mem_usage=True)
        for folder in (base, aligned)
    ]
    found = []
    for (_, before), (name, after) in zip(
        *(model.named_parameters() for model in models), strict=True
    ):
        if any(target in name for target in targets):
            v_OI = after - before
            found.append((torch.mm(v_OI, v_OI.t()) / torch.norm(v_OI)).detach())
    return found


def projected(tuned: Any, projectors_OO: list[torch.Tensor], threshold: float) -> list[float]:
    """Replace B by C B in place where the cosine is at or below the threshold; the cosines."""
    rank, original = tuned.peft_config["default"].r, copy.deepcopy(tuned)
    cosines: list[float] = []
    for (name, parameter), (_, before) in zip(
        tuned.named_parameters(), original.named_parameters(), strict=True
    ):
        if "lora" not in name:
            continue
        if parameter.shape[0] == rank:  # A, which comes before its B
            a_RI = before
            continue
        cb_OR = torch.mm(projectors_OO[len(cosines)], before.data)
        products = (torch.mm(cb_OR, a_RI), torch.mm(before, a_RI))
        rows = (product.reshape(1, -1) for product in products)
        cosines.append(round(torch.nn.functional.cosine_similarity(*rows).item(), 5))
        parameter.data = cb_OR if cosines[-1] <= threshold else before.data
    return cosines


def main(base: Path, aligned: Path, adapter: Path, threshold: float, out: Path) -> dict[str, Any]:
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(aligned)
    tuned = PeftModel.from_pretrained(model, adapter)
    targets = set(tuned.peft_config["default"].target_modules)
    cosines = projected(tuned, alignment(base, aligned, targets), threshold)
    tuned.save_pretrained(out)
    return {"inside_s": time.perf_counter() - started, "cosines": cosines}


if __name__ == "__main__":
    *folders, threshold, out = sys.argv[1:]
    base, aligned, adapter = map(Path, folders)
    print(json.dumps(main(base, aligned, adapter, float(threshold), Path(out))))
