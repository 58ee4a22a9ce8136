"""`ebbline project` against the authors' way, as whole processes from files to files:
`python -m tests.benchmarks.bench_project_whole`.

The pair is Llama-shaped and random: 412M parameters in float32, 8 layers, 2048 wide, in shards as
transformers writes them. The adapter has rank 8 on all linear modules, saved by PEFT. Both sides
take turns. `seconds` counts from the start of the process to its exit. `inside_s` counts the
function alone, with everything imported: it is called in a process of its own. `peak_memory_gb` is
the kernel's VmHWM: it counts pages of mapped files, so weights that are read by mapping count.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file

from ebbline.tasks.headers.files import ADAPTER_WEIGHTS
from tests.benchmarks import record

THRESHOLD = "0.75"
_PAIR = """
import sys
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
out = Path(sys.argv[1])
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, num_attention_heads=16,
    num_key_value_heads=16, vocab_size=256))
model.save_pretrained(out / "base", max_shard_size="500MB")
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0.002 * torch.randn_like(parameter))
model.save_pretrained(out / "aligned", max_shard_size="500MB")
tuned = get_peft_model(model, LoraConfig(
    r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
with torch.no_grad():
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.02)
tuned.save_pretrained(out / "adapter")
"""
_INSIDE = """
import json, sys, time
from ebbline.commands.project import project
base, aligned, adapter, threshold, out = sys.argv[1:]
started = time.perf_counter()
project([adapter], base, aligned, out, threshold=float(threshold))
print(json.dumps({"inside_s": time.perf_counter() - started}))
"""


def side(name: str, folder: Path, out: Path, inside: bool = False) -> dict[str, Any]:
    """One run of one side, in a process of its own."""
    base, aligned, adapter = (str(folder / part) for part in ("base", "aligned", "adapter"))
    if name == "reference":
        module = "tests.benchmarks.safe_lora_reference"
        command = ["-m", module, base, aligned, adapter, THRESHOLD, str(out)]
    elif inside:
        command = ["-c", _INSIDE, base, aligned, adapter, THRESHOLD, str(out)]
    else:
        options = {"base": base, "aligned": aligned, "adapter": adapter, "out": str(out)}
        given = [word for key, value in options.items() for word in (f"--{key}", value)]
        command = ["-m", "ebbline", "project", *given, "--threshold", THRESHOLD]
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    assert process.returncode == 0, command
    row = {"seconds": seconds, "processor_s": used.ru_utime + used.ru_stime}
    row["peak_memory_gb"] = used.ru_maxrss / 1024**2
    if name == "reference" or inside:
        row |= json.loads(printed.splitlines()[-1])
    return row


def difference(one: Path, other: Path) -> float:
    """The largest difference of two adapters' tensors, over the largest element of that tensor."""
    ours, theirs = (load_file(folder / ADAPTER_WEIGHTS) for folder in (one, other))
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - theirs[n]).abs().max() / ours[n].abs().max()) for n in ours)


def compared(folder: Path, runs: int) -> list[dict[str, Any]]:
    """The two sides in turn; a row each, with medians."""
    found: dict[str, list[dict[str, Any]]] = {"ebbline": [], "reference": []}
    inside = []
    for number in range(runs):
        for name, rows in found.items():
            rows.append(side(name, folder, folder / f"{name}-{number}"))
            print(name, {k: v for k, v in rows[-1].items() if k != "cosines"}, file=sys.stderr)
        inside.append(side("ebbline", folder, folder / f"inside-{number}", True)["inside_s"])
    times = {"ebbline": inside, "reference": [row["inside_s"] for row in found["reference"]]}
    furthest = difference(folder / "ebbline-0", folder / "reference-0")
    ours = json.loads((folder / "ebbline-0" / "safe_lora.json").read_text())["modules"]
    cosines = sorted(row["cosine"] for row in ours.values())
    theirs = sorted(found["reference"][0]["cosines"])
    return [
        {
            "side": name,
            "seconds": statistics.median(row["seconds"] for row in rows),
            "spread": record.spread([row["seconds"] for row in rows]),
            "processor_s": statistics.median(row["processor_s"] for row in rows),
            "inside_s": statistics.median(times[name]),
            "inside_spread": record.spread(times[name]),
            "peak_memory_gb": max(row["peak_memory_gb"] for row in rows),
            "largest_difference": furthest,
            "largest_cosine_difference": max(map(abs, map(float.__sub__, cosines, theirs))),
            "runs": runs,
        }
        for name, rows in found.items()
    ]


def ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    ours, theirs = rows
    return {
        "time_reference_over_ebbline_whole_process": theirs["seconds"] / ours["seconds"],
        "time_reference_over_ebbline_inside": theirs["inside_s"] / ours["inside_s"],
        "processor_time_reference_over_ebbline": theirs["processor_s"] / ours["processor_s"],
        "peak_memory_reference_over_ebbline": theirs["peak_memory_gb"] / ours["peak_memory_gb"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3, help="runs of each side")
    parser.add_argument("--folder", type=Path, help="a disk with 4 GB free")
    given = parser.parse_args()
    with TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-c", _PAIR, name], check=True, stderr=subprocess.DEVNULL)
        load = os.getloadavg()[0]
        rows = compared(folder, given.runs)
    rows = [
        {**row, "load_before": round(load, 1), "threads": torch.get_num_threads()} for row in rows
    ]
    show = {
        **dict.fromkeys(("side", "spread", "inside_spread"), str),
        **dict.fromkeys(("seconds", "inside_s", "peak_memory_gb"), lambda value: f"{value:.2f}"),
        "largest_difference": lambda value: f"{value:.0e}",
    }
    print(record.table(rows, show), end="\n\n")
    packages = ("torch", "transformers", "peft", "safetensors")
    command = "python -m tests.benchmarks.bench_project_whole"
    path = record.write("project_whole", command, packages, rows, ratios(rows))
    print(json.dumps(ratios(rows), indent=1), f"wrote {path.relative_to(Path.cwd())}", sep="\n")


if __name__ == "__main__":
    main()
